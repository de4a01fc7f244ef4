"""Models of one masked decoder each: their inputs, and their results against float64."""

from __future__ import annotations

import copy
from typing import Any

import decoder_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

FLOOR = 8 * torch.finfo(torch.float32).eps
KINDS = ("plain", "text", "named")


class Case:
    """A model with one decoder, its inputs, and its results as named tensors."""

    sizes: tuple[tuple[int, int], ...] = ((3, 4), (6, 8), (12, 16))

    def __init__(self, decoder: nn.Module) -> None:
        self.model = nn.Module()
        self.model.decoder = decoder
        self.model.eval()

    def inputs(self, seed: int, **sizes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return cases.inputs(self.model.decoder, seed, **sizes)

    def read(self, out: Any) -> dict[str, torch.Tensor]:
        found = {"logits": out["pred_logits"], "masks": out["pred_masks"]}
        for index, one in enumerate(out["aux_outputs"]):
            found |= {f"logits_{index}": one["pred_logits"], f"masks_{index}": one["pred_masks"]}
        return found

    def before_last(self, out: Any) -> list[torch.Tensor]:
        return [value for one in out["aux_outputs"] for value in one.values()]


class NamedCase(Case):
    def inputs(self, seed: int, **sizes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        made = torch.Generator().manual_seed(seed)
        levels = sizes.get("sizes", self.sizes)
        batch, full = sizes.get("batch", 2), sizes.get("full", (48, 64))
        maps = [torch.randn(batch, 32, *size, generator=made) for size in levels]
        features = torch.randn(batch, 32, *full, generator=made)
        named = {"multi_scale_features": maps, "mask_features": features}
        return (), named | {"output_hidden_states": True}

    def read(self, out: Any) -> dict[str, torch.Tensor]:
        found = {"last": out.last_hidden_state, "masks": out.masks_queries_logits[-1]}
        for index, mask in enumerate(out.masks_queries_logits[:-1]):
            found[f"masks_{index}"] = mask
        for name in ("intermediate_hidden_states", "hidden_states"):
            found |= {f"{name}_{i}": value for i, value in enumerate(getattr(out, name))}
        return found

    def before_last(self, out: Any) -> list[torch.Tensor]:
        return list(out.masks_queries_logits[:-1])


def named_module(norm_first: bool) -> nn.Module:
    library = pytest.importorskip(
        "transformers.models.mask2former.modeling_mask2former", reason="needs transformers"
    )
    from transformers import Mask2FormerConfig

    config = Mask2FormerConfig(
        hidden_dim=32, feature_size=32, mask_feature_size=32, num_attention_heads=4,
        dim_feedforward=48, decoder_layers=5, num_queries=11, pre_norm=norm_first,
    )  # fmt: skip
    return library.Mask2FormerTransformerModule(32, config)


def make(kind: str, norm_first: bool = False, **options: Any) -> Case:
    torch.manual_seed(1)
    if kind == "named":
        return NamedCase(named_module(norm_first))
    form = cases.TextDecoder if kind == "text" else cases.Decoder
    return Case(form(norm_first=norm_first, **options))


def margin(found: dict[str, torch.Tensor], sizes: tuple[tuple[int, int], ...]) -> float:
    """How near to zero the logit comes that decides on a pixel, relative to the largest."""
    nearest = 1.0
    for index in range(sum(name.startswith("masks_") for name in found)):
        logits = F.interpolate(
            found[f"masks_{index}"], size=sizes[index % 3], mode="bilinear", align_corners=False
        )
        nearest = min(nearest, float(logits.abs().min() / logits.abs().max()))
    return nearest


def decided(case: Case, **sizes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Inputs of which no rounding can turn a pixel of a mask, and their results in float64."""
    double = copy.deepcopy(case.model.decoder).double()
    for seed in range(40):
        args, kwargs = case.inputs(seed, **sizes)
        with torch.no_grad():
            given = cases.to(torch.float64, args), cases.to(torch.float64, kwargs)
            found = case.read(double(*given[0], **given[1]))
        if margin(found, sizes.get("sizes", case.sizes)) > 5e-6:
            return (args, kwargs), found
    raise AssertionError("no such inputs")


def distances(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == exact.keys()
    return {
        key: float((found[key].double() - exact[key]).abs().max() / exact[key].abs().max())
        for key in exact
    }


def assert_exact(case: Case, given: Any, exact: dict[str, torch.Tensor], dense: Any) -> None:
    with torch.no_grad():
        ours = distances(case.read(case.model.decoder(*given[0], **given[1])), exact)
    rough = distances(case.read(dense), exact)
    worst = max(rough.values())
    for key, error in ours.items():
        # Of a single small output the dense error may happen to be next to nothing.
        assert error <= max(2 * rough[key], worst, FLOOR), (key, error, rough[key])
