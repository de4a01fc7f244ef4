"""The numbers of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from opentrans_kernels import flops
from opentrans_kernels.audit.network import Layer
from opentrans_kernels.audit.predict import predicted_speedup
from opentrans_kernels.compact import ChannelSets, any_along, rounded

GROUPS = (8, 16, 32, 64)  # rows per group of the K-union curve
SLICE = 64  # output and input channels of one tap that a tensor core's tile takes at a time


@dataclass(frozen=True)
class Width:
    """A channel count before and after compaction, and after rounding up to 8 and 16."""

    before: int
    after: int
    after_8: int
    after_16: int

    @classmethod
    def of(cls, before: int, after: int) -> Width:
        ceiling = max(before, after)
        sizes = (min(rounded(after, multiple), ceiling) for multiple in (8, 16))
        return cls(before, after, *sizes)


@dataclass(frozen=True)
class AuditRow:
    """One convolution, or a linear layer as a 1x1 on ``h_out`` tokens.

    masked: a mask was given (otherwise the weights' own zeros count, or the layer is dense).
    nominal_macs, effective_macs: per image; effective = nnz * output pixels.
    dead: all-zero rows. constant: outputs that are constant after the exact fixpoint, dead ones
        included; for the last convolution of a block, channels of the sum that are constant.
        unread: outputs that are not constant and that nothing live reads.
    unread_inputs: columns without a nonzero.
    width_in, width_out: channels; only those inside a residual block can shrink.
    ones_channel: this layer emits the channel of ones that carries constants through zero padding.
    outside_24: nonzeros beyond two per group of four input channels of one row and tap.
    k_union: rows per group -> mean share of the Cin*k*k columns with a nonzero in the group.
    live_slices: share of 64 x 64 slices of a tap that have a nonzero once rows and columns are
        sorted by theirs, as tensor cores' tiles need it; None for 1x1, whose order is not free.
    predicted_speedup, engine: first prediction, see ``predict``; a losing layer stays dense (1.0).
    predicted_cost: nominal MACs / predicted speed-up.
    """

    name: str
    kernel: int
    stride: int
    cout: int
    cin: int
    h_out: int
    w_out: int
    masked: bool
    nnz: int
    numel: int
    density: float
    nominal_macs: int
    effective_macs: int
    dead: int
    constant: int
    unread: int
    unread_inputs: int
    width_in: Width
    width_out: Width
    ones_channel: bool
    outside_24: int
    k_union: Mapping[int, float]
    live_slices: float | None
    predicted_speedup: float
    engine: str
    predicted_cost: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def outside_two_four(mask: torch.Tensor) -> int:
    """Nonzeros that a 2:4 pattern along the input channels could not hold. mask: bool 4-D."""
    cout, cin = mask.shape[:2]
    bits = mask.reshape(cout, cin, -1).view(torch.uint8)
    if cin % 4:
        bits = torch.nn.functional.pad(bits, (0, 0, 0, 4 - cin % 4))
    groups = bits.view(cout, -1, 4, bits.shape[-1])
    count = groups[:, :, 0] + groups[:, :, 1] + groups[:, :, 2] + groups[:, :, 3]
    # Of 3 nonzeros one is outside, of 4 two.
    return int(torch.count_nonzero(count >= 3)) + int(torch.count_nonzero(count == 4))


def k_union(mask: torch.Tensor) -> dict[int, float]:
    """Rows per group -> mean share of live (input channel, tap) columns. mask: bool 4-D."""
    live = mask.reshape(mask.shape[0], -1).view(torch.uint8)
    curve = {}
    rows = 1
    for group in GROUPS:
        step = group // rows
        missing = -live.shape[0] % step
        if missing:
            live = torch.nn.functional.pad(live, (0, 0, 0, missing))
        live = live.view(-1, step, live.shape[1]).amax(1)
        rows = group
        curve[group] = int(torch.count_nonzero(live)) / max(1, live.numel())
    return curve


def live_slices(mask: torch.Tensor) -> float | None:
    """Share of slices with a nonzero, rows and columns sorted by nonzeros. mask: bool 4-D."""
    cout, cin = mask.shape[:2]
    bits = mask.reshape(cout, cin, -1)
    if bits.shape[2] == 1:
        return None
    rows, columns = (
        bits.sum(dims).argsort(descending=True, stable=True) for dims in ((1, 2), (0, 2))
    )
    bits = torch.nn.functional.pad(
        bits[rows][:, columns].view(torch.uint8), (0, 0, 0, -cin % SLICE, 0, -cout % SLICE)
    )
    live = bits.unflatten(1, (-1, SLICE)).amax(2).unflatten(0, (-1, SLICE)).amax(1)
    return int(torch.count_nonzero(live)) / max(1, live.numel())


def make_row(
    layer: Layer,
    mask: torch.Tensor | None,
    *,
    masked: bool,
    sets: ChannelSets | None,
    sets_before: ChannelSets | None,
    ones_channel: bool,
) -> AuditRow:
    """The row of one layer.

    mask: bool weight-shaped, None for a dense layer.
    sets: channels of its output; sets_before: channels of its input; None where full width is kept.
    """
    cout, cin, k, _ = layer.shape
    numel = cout * cin * k * k
    dense = mask is None
    bits = torch.ones(layer.shape, dtype=torch.bool) if mask is None else mask
    nnz = numel if dense else int(torch.count_nonzero(bits))
    reads = any_along(bits.reshape(cout, cin, -1), 2)
    dead = cout - int(torch.count_nonzero(any_along(reads, 1)))
    density = nnz / max(1, numel)
    speed = predicted_speedup(k, density)
    nominal = flops.nominal_macs(layer.shape, layer.h_out, layer.w_out)
    wins = speed > 1
    return AuditRow(
        name=layer.name,
        kernel=k,
        stride=layer.stride,
        cout=cout,
        cin=cin,
        h_out=layer.h_out,
        w_out=layer.w_out,
        masked=masked,
        nnz=nnz,
        numel=numel,
        density=density,
        nominal_macs=nominal,
        effective_macs=flops.effective_macs(nnz, layer.h_out, layer.w_out),
        dead=dead,
        constant=dead if sets is None else len(sets.constant),
        unread=0 if sets is None else len(sets.unread),
        unread_inputs=cin - int(torch.count_nonzero(any_along(reads, 0))),
        width_in=Width.of(cin, cin if sets_before is None else sets_before.after),
        width_out=Width.of(cout, cout if sets is None else sets.after),
        ones_channel=ones_channel,
        outside_24=outside_two_four(bits),
        k_union=k_union(bits),
        live_slices=live_slices(bits),
        predicted_speedup=speed if wins else 1.0,
        engine="sparse" if wins else "dense",
        predicted_cost=nominal / (speed if wins else 1.0),
    )
