"""Fake timers and a fake graph capturer, and the trunk's oracle, for the tests of the CUDA path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from opentrans_kernels.gpu import Place, Precision
from opentrans_kernels.plan.subject import prepare
from opentrans_kernels.topology import find_trunk, forward_trunk

#: Below it no error is a defect: a few roundings of the dtype.
FLOOR = {"float16": 2e-3, "bfloat16": 1.2e-2, "tf32": 5e-7, "float32": 5e-7}


class Prices:
    """A timer that charges by kernel name; runs everything once and remembers what it timed."""

    def __init__(self, default: float = 2.0, **prices: float) -> None:
        self.default, self.prices = default, prices
        self.timed: list[str] = []

    def __call__(self, name: str, run: Callable[[], Any]) -> float:
        run()
        self.timed.append(name)
        kernel = name.rpartition(" ")[2]
        for key, price in self.prices.items():
            if kernel.startswith(key) or name.startswith(key):
                return price
        return self.default


class FakeCapturer:
    """Replays by running again into the same tensors, as a graph writes into the same memory."""

    def __init__(self, size: int = 1, fail: set[tuple[int, ...]] | None = None) -> None:
        self.size, self.fail = size, fail or set()
        self.log: list[str] = []
        self._held = 0

    def capture(self, run):
        outputs = run()
        if tuple(outputs[0].shape) in self.fail:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
        self._held += self.size
        self.log.append("capture")

        def replay() -> None:
            self.log.append("replay")
            for output, new in zip(outputs, run(), strict=True):
                output.copy_(new)

        return replay, outputs

    def begin(self) -> None:
        self.log.append("begin")

    def end(self) -> None:
        self.log.append("end")

    def wait(self) -> None:
        self.log.append("wait")

    def reset(self) -> None:
        self._held = 0
        self.log.append("reset")

    def bytes(self) -> int:
        return self._held


def place(precision: str = "float32") -> Place:
    return Place.of(torch.device("cpu"), Precision.of(precision))


def subject(model: nn.Module, masks: Any, size: tuple[int, int] = (64, 64)):
    return prepare(model, masks, size)


def exact_trunk(dense: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of stem and stages in float64."""
    twin = copy.deepcopy(dense).double()
    with torch.no_grad():
        return forward_trunk(find_trunk(twin), x.double())


def own_trunk(dense: nn.Module, x: torch.Tensor, precision: str) -> list[torch.Tensor]:
    """Outputs of PyTorch's dense network in a precision, as a user would run it."""
    dtype = Precision.of(precision).dtype
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return forward_trunk(find_trunk(dense), x)


def errors(found: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    return [
        float((f.double() - w).abs().max() / w.abs().max().clamp_min(1e-30))
        for f, w in zip(found, want, strict=True)
    ]


def check_trunk(
    found: list[torch.Tensor], dense: nn.Module, x: torch.Tensor, precision: str
) -> None:
    """Every output errs at most twice as much as the dense network in the same precision."""
    want = exact_trunk(dense, x)
    assert all(not torch.equal(w, torch.zeros_like(w)) for w in want), "zeros prove nothing"
    mine, own = errors(found, want), errors(own_trunk(dense, x, precision), want)
    for error, other in zip(mine, own, strict=True):
        assert error <= max(2 * other, FLOOR[precision]), f"{error:.1e} against {other:.1e}"
