"""Options that every Triton launch of this package states, whatever Triton's defaults become."""

from __future__ import annotations

__all__ = ["OPTIONS"]

#: A product and a sum in one rounding: more exact and half the instructions, and the registers and
#: steps that the tests count are those of this choice.
OPTIONS: dict[str, bool] = {"enable_fp_fusion": True}
