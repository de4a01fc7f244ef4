"""The audit itself and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from opentrans_kernels.audit.network import Layer, Network, infer_network
from opentrans_kernels.audit.predict import predicted_rate
from opentrans_kernels.audit.rows import AuditRow, make_row
from opentrans_kernels.compact import (
    BlockLayers,
    ChannelSets,
    FoldedConv,
    analyse,
    compact_stem,
    compact_trunk,
)
from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.topology import (
    Projections,
    Trunk,
    conv_shapes,
    find_trunk,
    linear_modules,
    packed_projections,
    pruned_linears,
    token_counts,
)
from opentrans_kernels.topology.collapse import collapse_of, find_collapse
from opentrans_kernels.topology.linears import is_pruned
from opentrans_kernels.topology.shapes import checked_size


@dataclass(frozen=True)
class AuditReport:
    """What a mask contains. ``str()`` is a plain text table, ``to_dict()`` is ready for JSON.

    source: where the masks came from. constants_known: False when no model was given; then every
    dead channel is taken to be a nonzero constant.
    """

    architecture: str
    input_size: tuple[int, int]
    source: str
    constants_known: bool
    rows: tuple[AuditRow, ...]
    totals: Mapping[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "input_size": list(self.input_size),
            "source": self.source,
            "constants_known": self.constants_known,
            "rows": [row.to_dict() for row in self.rows],
            "totals": dict(self.totals),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        header = (
            "layer", "conv", "out", "density", "nnz", "MMAC", "eff.", "dead", "unread", "width",
            "2:4 out", "K32", "K64", "S64", "pred.",
        )  # fmt: skip
        table = [header, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            f"{self.architecture} at {self.input_size[0]}x{self.input_size[1]}, masks: "
            f"{self.source}",
            "",
        ]
        for line in table:
            first = line[0].ljust(widths[0])
            rest = (cell.rjust(size) for cell, size in zip(line[1:], widths[1:], strict=True))
            lines.append("  ".join([first, *rest]))
        t = self.totals
        linear = f" and {t['linear_layers']} linear layers" if t["linear_layers"] else ""
        lines += [
            "",
            f"{t['layers'] - t['linear_layers']} convolutions{linear}, {t['nnz']} of {t['numel']} "
            f"weights kept ({t['density']:.2%}); FLOP density {t['flop_density']:.2%} "
            f"({t['effective_macs'] / 1e6:.0f} of {t['nominal_macs'] / 1e6:.0f} MMAC per image)",
            f"channels: {t['dead']} dead, {t['constant']} constant, {t['unread']} unread; inner "
            f"widths {t['width_before']} -> {t['width_after']} (rounded up to 8: "
            f"{t['width_after_8']}, to 16: {t['width_after_16']})",
            f"outside 2:4: {t['outside_24']} of the nonzeros ({t['outside_24_share']:.1%}); live "
            f"columns per 32 rows {t['k_union'][32]:.0%}, per 64 rows {t['k_union'][64]:.0%} "
            "(weighted by MACs)",
            f"predicted speed-up over dense {t['predicted_speedup']:.1f}x by layers, "
            f"{t['predicted_speedup_flops']:.1f}x by FLOP density (a prediction, not a "
            "measurement)",
        ]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    @staticmethod
    def _cells(row: AuditRow) -> tuple[str, ...]:
        out, before = row.width_out, row.width_out.before
        width = str(before)
        if out.after != before:
            width = f"{before}>{out.after}/{out.after_8}/{out.after_16}"
        return (
            row.name,
            f"{row.cin}>{row.cout} k{row.kernel}" + (f" s{row.stride}" if row.stride > 1 else ""),
            f"{row.h_out}x{row.w_out}",
            f"{row.density:.2%}" if row.masked or row.nnz < row.numel else "no mask",
            str(row.nnz),
            f"{row.nominal_macs / 1e6:.1f}",
            f"{row.effective_macs / 1e6:.1f}",
            str(row.dead),
            str(row.unread),
            width,
            f"{row.outside_24 / max(1, row.nnz):.1%}",
            f"{row.k_union[32]:.0%}",
            f"{row.k_union[64]:.0%}",
            "-" if row.live_slices is None else f"{row.live_slices:.0%}",
            f"{row.predicted_speedup:.1f}x" if row.engine == "sparse" else "dense",
        )


@dataclass
class _Channels:
    """Per layer: channel sets of its output and of its input, and whether it emits ones."""

    sets: dict[str, ChannelSets]
    before: dict[str, ChannelSets]
    ones: set[str]

    def add_block(self, path: tuple[str, ...], sets: list[ChannelSets], ones: bool) -> None:
        for i, name in enumerate(path):
            self.sets[name] = sets[i]
            if i:
                self.before[name] = sets[i - 1]
        if ones:
            self.ones.add(path[0])


def audit(
    masks: MaskSet | Mapping[str, torch.Tensor] | None,
    model: nn.Module | None = None,
    input_size: tuple[int, int] = (224, 224),
) -> AuditReport:
    """Count what a mask contains; nothing is run, nothing changed.

    masks: a MaskSet or module name -> 0/1 tensor. None with a model: the weights' own zeros.
    model: the network in eval mode; masks are matched to it by name. Without it the architecture
        is inferred from names and shapes (CLIP RN50/RN101/RN50x4 and relatives, torchvision
        ResNets).
    input_size: (height, width) in pixels, for MACs.

    Raises MaskError if masks and model do not fit, or nothing can be inferred without a model.
    """
    input_size = checked_size(input_size)
    if model is not None and not isinstance(model, nn.Module):
        raise MaskError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if masks is None and model is None:
        raise MaskError("audit needs masks, a model whose zeros are the mask, or both. Pass one.")
    if masks is None:
        masks = MaskSet.from_model_zeros(model)  # type: ignore[arg-type]
    elif isinstance(masks, Mapping):
        masks = MaskSet.from_tensors(masks)
    elif not isinstance(masks, MaskSet):
        raise MaskError(
            f"audit takes a MaskSet or a dict of name -> 0/1 tensor, got {type(masks).__name__}. "
            "Read a file with load_masks(path)."
        )
    if model is None:
        given = dict(masks.masks)
        network = infer_network(given, input_size)
        given = {layer.name: given[layer.name] for layer in network.layers if layer.name in given}
        own: dict[str, torch.Tensor] = {}
        channels = _from_masks(network, given)
        kept = {layer.name: _bits(layer, given, own) for layer in network.layers}
        collapse = find_collapse(network.stem, network.blocks, kept)
    else:
        match = masks.match(model)
        if not match.masks:
            match.require_complete()
        given = dict(match.masks)
        trunk = find_trunk(model)
        network, own = _from_model(trunk, given, input_size)
        network, own = _with_linears(model, network, own, given, input_size)
        convs = {node.name for node in trunk.convs()}
        if match.unmatched_masks:
            network = _noted(network, str(match).split("\n"))
        channels = _compacted(trunk, {name: m for name, m in given.items() if name in convs})
        weights = {node.name: node.conv.weight.detach() for node in trunk.convs()}
        collapse = collapse_of(
            trunk, lambda name: given[name] if name in given else weights[name] != 0
        )
    network = _noted(network, collapse.notes())
    rows = tuple(
        make_row(
            layer,
            _as_conv(given.get(layer.name, own.get(layer.name))),
            masked=layer.name in given,
            sets=channels.sets.get(layer.name),
            sets_before=channels.before.get(layer.name),
            ones_channel=layer.name in channels.ones,
        )
        for layer in network.layers
    )
    return AuditReport(
        architecture=network.architecture,
        input_size=(input_size[0], input_size[1]),
        source=str(masks.source),
        constants_known=model is not None,
        rows=rows,
        totals=_totals(
            rows,
            {name for _, path, _ in network.blocks for name in path[:-1]},
            set() if model is None else {*linear_modules(model), *packed_projections(model)},
        ),
        notes=network.notes,
    )


def _as_conv(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of a linear layer as that of a 1x1."""
    return mask[:, :, None, None] if mask is not None and mask.dim() == 2 else mask


def _with_linears(
    model: nn.Module, network: Network, own: dict[str, torch.Tensor],
    given: Mapping[str, torch.Tensor], input_size: tuple[int, int],
) -> tuple[Network, dict[str, torch.Tensor]]:  # fmt: skip
    """The network with the linear layers that have a mask or enough zeros of their own."""
    pruned = pruned_linears(model)
    linears = {**packed_projections(model), **linear_modules(model)}
    found = {n: m for n, m in linears.items() if n in given or n in pruned or (
        isinstance(m, Projections) and is_pruned(m.weight)
    )}  # fmt: skip
    if not found:
        return network, own
    # What an attention calls is itself.
    called = {n: n.removesuffix(".in_proj") if isinstance(m, Projections) else n
              for n, m in found.items()}  # fmt: skip
    counts, why = token_counts(model, called.values(), input_size)
    tokens = {name: counts[path] for name, path in called.items() if path in counts}
    reason = why or "not called for an image"
    notes = [f"{name} is not audited: {reason}" for name in found if name not in tokens]
    layers = tuple(
        Layer(n, (*m.weight.shape, 1, 1), 1, 0, tokens[n].h_out, 1)  # type: ignore[arg-type]
        for n, m in found.items()
        if n in tokens
    )
    zeros = {n: m.weight.detach() != 0 for n, m in found.items() if n not in given}
    network = replace(network, layers=(*network.layers, *layers))
    return _noted(network, notes), {**own, **zeros}


def _bits(layer: Layer, *found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """bool: kept weights of a layer, all of them where nothing is known."""
    masks = (masks[layer.name] for masks in found if layer.name in masks)
    return next(masks, torch.ones(layer.shape, dtype=torch.bool))


def _noted(network: Network, notes: list[str]) -> Network:
    return Network(
        network.architecture, network.layers, network.stem, network.blocks, (*network.notes, *notes)
    )


def _from_model(
    trunk: Trunk, given: Mapping[str, torch.Tensor], input_size: tuple[int, int]
) -> tuple[Network, dict[str, torch.Tensor]]:
    """Layers with sizes from the model, and the own zeros of layers without a mask."""
    shapes = conv_shapes(trunk, input_size)
    layers, own = [], {}
    left_out: dict[str, list[str]] = {}
    for node in trunk.convs():
        conv = node.conv
        plain = conv.groups == 1 and len(set(conv.kernel_size)) == 1
        if node.name not in shapes or not plain:
            why = "not reached by the image" if plain else "grouped or not square"
            left_out.setdefault(why, []).append(node.name)
            continue
        size = shapes[node.name]
        shape = tuple(conv.weight.shape)
        padding = conv.padding[0] if isinstance(conv.padding, tuple) else 0
        layers.append(Layer(node.name, shape, conv.stride[0], padding, size.h_out, size.w_out))
        if node.name not in given:
            own[node.name] = conv.weight.detach() != 0
    notes = list(trunk.notes)
    for why, names in left_out.items():
        some = f"{len(names)} convolutions ({names[0]} .. {names[-1]}) are"
        notes.append(f"{some if len(names) > 1 else f'{names[0]} is'} not audited: {why}")
    stem = tuple(node.name for node in trunk.stem.convs) if trunk.stem is not None else ()
    blocks = tuple(
        (b.name, tuple(c.name for c in b.convs), b.downsample.name if b.downsample else None)
        for b in trunk.blocks
    )
    counts = [sum(b.stage == s for b in trunk.blocks) for s in range(len(trunk.stages))]
    kind = f"{trunk.family} ResNet, blocks {'-'.join(map(str, counts))}"
    architecture = kind if trunk.blocks else type(trunk.model).__name__
    return Network(architecture, tuple(layers), stem, blocks, tuple(notes)), own


def _compacted(trunk: Trunk, given: Mapping[str, torch.Tensor]) -> _Channels:
    compact = compact_trunk(trunk, given)
    channels = _Channels(dict(compact.stem_channels), {}, set())
    for node in trunk.blocks:
        summary = compact.summaries[node.name]
        path = tuple(c.name for c in node.convs)
        channels.add_block(path, list(summary.channels.values()), summary.ones_channel)
    return channels


def _from_masks(network: Network, given: Mapping[str, torch.Tensor]) -> _Channels:
    """The fixpoint on masks alone; every bias is taken as 1, so that no constant is zero."""

    def folded(name: str) -> FoldedConv:
        layer = next(la for la in network.layers if la.name == name)
        mask = given.get(name)
        bits = torch.ones(layer.shape, dtype=torch.bool) if mask is None else mask
        bias = torch.ones(layer.shape[0], dtype=torch.float64)
        return FoldedConv(name, bits, bias, layer.stride, layer.padding, relu=True)

    _, stem = compact_stem([folded(name) for name in network.stem])
    channels = _Channels(dict(stem), {}, set())
    constants: Mapping[int, float] = {}
    for name, path, down in network.blocks:
        if name.endswith(".0"):
            constants = {}
        shortcut = None if down is None else folded(down)
        found = analyse(BlockLayers(name, tuple(folded(n) for n in path), shortcut), constants)
        constants = found.constant_out
        channels.add_block(path, list(found.channels.values()), found.ones_channel)
    return channels


def _totals(rows: tuple[AuditRow, ...], inner: set[str], linear: set[str]) -> dict[str, Any]:
    """Sums over all layers; widths over ``inner``, the inner channels of residual blocks.

    linear: names of linear layers.
    """
    nominal = sum(r.nominal_macs for r in rows)
    effective = sum(r.effective_macs for r in rows)
    nnz, numel = sum(r.nnz for r in rows), sum(r.numel for r in rows)
    flop_density = effective / max(1, nominal)
    cost = sum(r.predicted_cost for r in rows)
    widths = [r.width_out for r in rows if r.name in inner]
    outside = sum(r.outside_24 for r in rows)
    by_flops = predicted_rate(flop_density) / max(flop_density, 1e-9)
    return {
        "layers": len(rows),
        "linear_layers": sum(row.name in linear for row in rows),
        "masked_layers": sum(r.masked for r in rows),
        "nnz": nnz,
        "numel": numel,
        "density": nnz / max(1, numel),
        "nominal_macs": nominal,
        "effective_macs": effective,
        "flop_density": flop_density,
        "dead": sum(r.dead for r in rows),
        "constant": sum(r.constant for r in rows),
        "unread": sum(r.unread for r in rows),
        "width_before": sum(w.before for w in widths),
        "width_after": sum(w.after for w in widths),
        "width_after_8": sum(w.after_8 for w in widths),
        "width_after_16": sum(w.after_16 for w in widths),
        "outside_24": outside,
        "outside_24_share": outside / max(1, nnz),
        "k_union": {
            g: sum(r.k_union[g] * r.nominal_macs for r in rows) / max(1, nominal)
            for g in (8, 16, 32, 64)
        },
        "predicted_cost": cost,
        "predicted_speedup": nominal / max(cost, 1e-9),
        "predicted_speedup_flops": max(1.0, by_flops),
        "sparse_layers": sum(r.engine == "sparse" for r in rows),
    }
