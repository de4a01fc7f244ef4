"""The network ``opentrans alpha`` measures, dense and masked, and its freeze sets side by side."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .render import Cell, Output

if TYPE_CHECKING:
    from torch import nn

    from opentrans_kernels.spectrum import AlphaTable

#: What the freeze set of a method is compared with.
USUAL = ("xmin_peak", "xmin_mid", "ks")


@dataclass
class AlphaSubject:
    """What is measured.

    Attributes:
        model: the network, all of it trainable; dense where dense weights are at hand.
        masked: the same with its masks applied, if both are there.
        labels: for JSON.
        banner: what must be said about synthetic weights or masks; None if nothing.
    """

    model: nn.Module
    masked: nn.Module | None
    labels: dict[str, Any]
    banner: str | None


def load_alpha_subject(options: argparse.Namespace) -> AlphaSubject:
    """The network of the options ``arch``, ``checkpoint``, ``mask``, ``seed`` and ``weights``."""
    import torch

    from opentrans_kernels.bench.subject import build_tower, load_subject, load_weights_from
    from opentrans_kernels.masks import read_state_dict

    where = None if options.checkpoint is None else Path(options.checkpoint).name
    masked: nn.Module | None
    if options.mask is not None:
        found = load_subject(
            options.mask, arch=options.arch, checkpoint=options.checkpoint, seed=options.seed
        )
        model, masked, labels = found.model, found.masked_copy(), found.describe()
        if where is not None:
            load_weights_from(model, read_state_dict(options.checkpoint, masked=False), where)
    else:
        state = None if where is None else read_state_dict(options.checkpoint)
        model, masked = build_tower(options.arch, seed=options.seed, empty=state is not None), None
        if state is not None and where is not None:
            load_weights_from(model, state, where)
            under = read_state_dict(options.checkpoint, masked=False)
            if any(not torch.equal(under[name], tensor) for name, tensor in state.items()):
                masked = copy.deepcopy(model)
                load_weights_from(model, under, where)
        labels = {
            "arch": options.arch,
            "weights": f"weights of {where}"
            if where
            else f"synthetic weights (seed {options.seed})",
            "mask": f"masks in {where}" if masked is not None else None,
            "synthetic": where is None,
        }
    if masked is not None and options.weights == "masked":
        model, masked = masked, None
    for network in filter(None, (model, masked)):
        network.requires_grad_(True)
    banner = None
    if labels["synthetic"]:
        what = "mask" if where is not None else "weights"
        banner = (
            f"SYNTHETIC {what}: alphas and freeze decisions say nothing about a trained network."
        )
    return AlphaSubject(model, masked, labels, banner)


def compare_methods(
    options: argparse.Namespace, model: nn.Module, table: AlphaTable, out: Output
) -> list[dict[str, Any]]:
    """Show the freeze set of ``table`` against those of whole matrices; plain data for JSON."""
    from opentrans.freeze import Disagreement, freeze_set, parse_rule, tables_of

    rule = options.freeze or "median"
    if not parse_rule(rule, {}).needs_alphas:
        rule = "median"
    others = tables_of(model, USUAL, device=options.device, threads=options.threads)
    layers = list(dict.fromkeys(row.module for row in table))
    own = freeze_set(table, rule)
    rows: list[list[Cell]] = []
    found, sentences = [], []
    for label, one in {table.label: table, **others}.items():
        frozen = freeze_set(one, rule)
        differ = Disagreement.of(table.label, own, label, frozen, layers)
        without = [row.name for row in one if not row.defined]
        shared = "" if one is table else f"{differ.count} of {differ.layers}"
        rows.append([label, f"{one.median():.4f}", str(len(without)), str(len(frozen)), shared])
        found.append(
            {
                "label": label,
                "median": one.median(),
                "without_alpha": without,
                "frozen": [name for name in layers if name in frozen],
                "disagreement": None if one is table else differ.to_dict(),
            }
        )
        if one is not table:
            sentences.append(str(differ))
    out.heading(f"Freeze sets by rule {rule}")
    header = ("estimate", "median alpha", "without alpha", "frozen", f"differ from {table.label}")
    out.table(None, header, rows, right=[1, 2, 3, 4])
    for sentence in sentences:
        out.text(sentence)
    return found
