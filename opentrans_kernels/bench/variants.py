"""The dense competitors: every reasonable way PyTorch has to run the same masked trunk.

All of them run the trunk with the pruned weights set to zero, so all compute the same function as
the accelerated trunk. The best of them *on the day* is the baseline. A variant that cannot be
built keeps its place in the result, with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import OpenTransError
from ..topology import find_trunk
from .part import TrunkModule, WholeModule

Run = Callable[[], torch.Tensor]

# Plain, with a fused residual addition, and the latter in place.
_PREPACKED_CALL = re.compile(r"torch\.ops\.mkldnn\._convolution_pointwise_?\.\w+\(")


@dataclass
class Variant:
    """One competitor. ``run`` is None when it could not be built; ``error`` then says why."""

    name: str
    run: Run | None = None
    error: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How to build one variant: name, one line of description, builder."""

    name: str
    doc: str
    build: Callable[[nn.Module, torch.Tensor, int | None], tuple[Run, dict[str, Any]]]


def fold_batch_norms_(tower: nn.Module) -> nn.Module:
    """Fold the trunk's eval batch norms with PyTorch's own tool, in place; returns ``tower``."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for node in list(find_trunk(tower).convs()):
        if node.plain_bn is None or node.bn_name is None:
            continue
        tower.set_submodule(node.name, fuse_conv_bn_eval(node.conv, node.plain_bn))
        tower.set_submodule(node.bn_name, nn.Identity())
    return tower


def _eager(folded: bool, last: bool) -> Callable[..., tuple[Run, dict[str, Any]]]:
    def build(tower: nn.Module, x: torch.Tensor, _: int | None) -> tuple[Run, dict[str, Any]]:
        trunk, x = _prepared(tower, x, folded, last)
        return _bind(trunk, x), {}

    return build


def _compiled(folded: bool, last: bool) -> Callable[..., tuple[Run, dict[str, Any]]]:
    def build(
        tower: nn.Module, x: torch.Tensor, simd_bits: int | None
    ) -> tuple[Run, dict[str, Any]]:
        trunk, x = _prepared(tower, x, folded, last)
        return _freeze_compile(trunk, x, simd_bits)

    return build


def _traced(tower: nn.Module, x: torch.Tensor, _: int | None) -> tuple[Run, dict[str, Any]]:
    trunk, x = _prepared(tower, x, False, False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # "deprecated": still a competitor while it exists
        frozen = torch.jit.freeze(torch.jit.trace(trunk, x))
        frozen = torch.jit.optimize_for_inference(frozen)
    return _bind(frozen, x), {"nodes": len(list(frozen.graph.nodes()))}


RECIPES: tuple[Recipe, ...] = (
    Recipe("eager", "eager, NCHW", _eager(False, False)),
    Recipe("eager_channels_last", "eager, channels_last", _eager(False, True)),
    Recipe("folded", "batch norm folded, NCHW", _eager(True, False)),
    Recipe("folded_channels_last", "batch norm folded, channels_last", _eager(True, True)),
    Recipe("compile", "torch.compile with freezing", _compiled(False, False)),
    Recipe(
        "compile_folded_channels_last",
        "torch.compile with freezing on folded channels_last",
        _compiled(True, True),
    ),
    Recipe("jit_optimized", "torch.jit.trace, freeze, optimize_for_inference", _traced),
)
NAMES = tuple(recipe.name for recipe in RECIPES)
#: Those that are timed unless others are asked for; the fastest is the baseline, in the demo as in
#: the benchmarks. Without plain "compile", which lost to its folded twin in every stored result and
#: ends the process if both are compiled in it for AVX-512 (docs/performance.md, 6).
BASELINE = tuple(name for name in NAMES if name != "compile")


def build_variants(
    tower: nn.Module,
    x: torch.Tensor,
    names: Sequence[str] | None = None,
    *,
    simd_bits: int | None = None,
    on_build: Callable[[str], None] | None = None,
) -> list[Variant]:
    """Build the dense variants of ``tower``.

    Args:
        tower: eval-mode tower whose pruned weights are already zero; it is not changed. Its trunk
            runs, or all of it if it is a WholeModule.
        x: float32 [N, 3, H, W] example input, also the input of every timed call.
        names: which recipes (default all).
        simd_bits: vector bits torch.compile may use, None for its own choice.
        on_build: called with each name before it is built.

    Raises:
        OpenTransError: an unknown name.
    """
    wanted = list(NAMES if names is None else names)
    unknown = [name for name in wanted if name not in NAMES]
    if unknown or not wanted:
        raise OpenTransError(
            f"unknown dense variants {unknown}. Choose among: {', '.join(NAMES)}."
            if unknown
            else f"no dense variant was asked for. Choose at least one of: {', '.join(NAMES)}."
        )
    variants = []
    for recipe in RECIPES:
        if recipe.name not in wanted:
            continue
        if on_build is not None:
            on_build(recipe.name)
        variant = Variant(recipe.name)
        try:
            variant.run, variant.detail = recipe.build(tower, x, simd_bits)
            variant.run()
        except Exception as error:  # a competitor that fails is a result
            variant.run = None
            variant.error = f"{type(error).__name__}: {str(error).strip()[:500]}"
        variant.detail["doc"] = recipe.doc
        variants.append(variant)
    return variants


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """max |found - reference| / max |reference|, in float64."""
    reference = reference.double()
    scale = reference.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found.double() - reference).abs().max() / scale)


@contextlib.contextmanager
def freezing(simd_bits: int | None = None) -> Iterator[None]:
    """Inductor with weights as constants, in vectors of ``simd_bits`` (None: its own choice)."""
    import torch._inductor.config as inductor

    changes: dict[str, Any] = {"freezing": True}
    if simd_bits is not None:
        changes["cpp.simdlen"] = simd_bits
    # A CUDA build of torch warns here that no GPU is visible, which is no news to a CPU benchmark.
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with inductor.patch(changes):
            yield
    finally:
        logger.setLevel(level)


def _freeze_compile(
    trunk: nn.Module, x: torch.Tensor, simd_bits: int | None
) -> tuple[Run, dict[str, Any]]:
    """Compile with inductor's freezing, and read in the generated code whether it happened."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    compiled = torch.compile(trunk, fullgraph=True, dynamic=False)
    with torch.no_grad(), freezing(simd_bits):
        _, codes = run_and_get_code(compiled, x)
    return _bind(compiled, x), frozen_evidence(codes)


def frozen_evidence(codes: Sequence[str]) -> dict[str, Any]:
    """What inductor's generated code says about freezing.

    ``frozen`` is true when the compiled function takes the image alone (weights are constants) and
    no batch-norm arithmetic is left.
    """
    code = "\n".join(codes)
    unpack = re.search(r"^\s*((?:\w+,\s*)+\w*)\s*=\s*args\s*$", code, re.MULTILINE)
    inputs = [name for name in (unpack.group(1) if unpack else "").split(",") if name.strip()]
    leftovers = len(re.findall(r"rsqrt|batch_norm", code))
    return {
        "graphs": len(codes),
        "inputs": len(inputs),
        "prepacked_convolutions": len(_PREPACKED_CALL.findall(code)),
        "batch_norm_leftovers": leftovers,
        "frozen": len(codes) == 1 and len(inputs) == 1 and leftovers == 0,
    }


def _prepared(
    tower: nn.Module, x: torch.Tensor, folded: bool, last: bool
) -> tuple[nn.Module, torch.Tensor]:
    """A private copy of the trunk and its input in the variant's memory format."""
    own = copy.deepcopy(tower)
    trunk = own if isinstance(own, WholeModule) else TrunkModule(own)
    trunk = trunk.eval().requires_grad_(False)
    if folded:
        fold_batch_norms_(own)
    if last:
        trunk = trunk.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    return trunk, x


def _bind(module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Run:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    return run
