"""Which convolutions run on the sparse kernels, and the patterns they run with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from opentrans_kernels import native
from opentrans_kernels.errors import MaskError, PlanError
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.pack import SparseWeight
from opentrans_kernels.plan import Plan
from opentrans_kernels.topology import ConvNode, Trunk
from opentrans_kernels.topology.blocks import plain_conv

__all__ = ["Sparse", "choose_sparse"]

#: Without a plan: densities below which forward and input gradient together beat oneDNN, and below
#: which the weight gradient does, for 1x1 and for larger windows (docs/training.md has the times).
SPARSE_BELOW = {1: 0.5, 9: 0.5}
WGRAD_BELOW = {1: 0.35, 9: 0.5}


@dataclass(frozen=True)
class Sparse:
    """A convolution on the sparse kernels.

    structure: pattern of the mask. wgrad: the weight gradient visits live weights only.
    nnz: live weights.
    """

    structure: torch.Tensor
    wgrad: bool
    nnz: int


def choose_sparse(
    trunk: Trunk, masks: MaskSet | Mapping[str, torch.Tensor] | None, plan: Plan | None
) -> tuple[dict[str, Sparse], list[str]]:
    """Convolutions to run sparsely, and notes on why others are not.

    Raises:
        MaskError: a mask without a convolution, or weights that are not zero where it is.
        PlanError: a plan without masks.
    """
    if masks is None:
        if plan is not None:
            raise PlanError(
                "skip_frozen was given a plan without masks, so it cannot tell which weights are "
                "dead for good and which are zero by chance. Pass masks= as well."
            )
        return {}, []
    if not isinstance(masks, MaskSet):
        masks = MaskSet.from_tensors(dict(masks))
    found = masks.match(trunk.model, strict=True).masks
    nodes = {node.name: node for node in trunk.convs()}
    _check_zeros(nodes, found)
    if not native.load():
        return {}, [f"masked layers run densely: {native.reason()}"]
    wanted = _planned(plan) if plan is not None else None
    chosen: dict[str, Sparse] = {}
    dense: list[str] = []
    for name, mask in found.items():
        node = nodes.get(name)
        density = float(mask.float().mean())
        if node is None or not _runs_sparsely(node, node in trunk.loose):
            continue
        kernel = node.conv.kernel_size[0] ** 2
        below = SPARSE_BELOW.get(kernel, 0.5)
        if name in wanted if wanted is not None else density < below:
            conv = node.conv
            pack = SparseWeight.from_dense(mask.float(), None, conv.stride[0], conv.padding[0])  # type: ignore[arg-type]
            wgrad = density < WGRAD_BELOW.get(kernel, 0.5)
            chosen[name] = Sparse(pack.structure, wgrad, pack.nnz)
        else:
            dense.append(name)
    notes = (
        [f"{len(dense)} masked convolutions stay dense: {', '.join(dense[:4])}"] if dense else []
    )
    return chosen, notes


def _planned(plan: Plan) -> set[str]:
    return {row.name for row in plan.rows if row.kind == "sparse"}


def _runs_sparsely(node: ConvNode, loose: bool) -> bool:
    conv = node.conv
    if loose and (plain_conv(conv) is not None or conv.kernel_size[0] % 2 == 0):
        return False  # inside recognised blocks neither is there
    return (
        conv.weight.dtype == torch.float32
        and conv.weight.device.type == "cpu"
        and (loose or node.bn is not None)
        and "weight" in conv._parameters
        and conv.dilation == (1, 1)
    )


def _check_zeros(nodes: Mapping[str, ConvNode], masks: Mapping[str, torch.Tensor]) -> None:
    wrong = []
    for name, mask in masks.items():
        if name in nodes:
            weight = nodes[name].conv.weight.detach()
            if bool(weight[~mask.to(weight.device)].any()):
                wrong.append(name)
    if wrong:
        raise MaskError(
            f"{len(wrong)} masked weights are not zero where their mask is (the first is "
            f"{wrong[0]!r}), so sparse and dense layers would disagree. Call "
            "masks.apply_(model) first."
        )
