"""Alpha along the rounds of pruning: how masks move it, and the freeze set with it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from opentrans_kernels.errors import PlanError
from opentrans_kernels.masks import MaskSet, atomic_write
from opentrans_kernels.spectrum import AlphaTable

from .compare import freeze_set, tables_of
from .record import Disagreement
from .rules import median_of

__all__ = ["AlphaRounds", "AlphaStage", "alpha_along_rounds"]

_KIND, _FORMAT = "opentrans alpha rounds", 1


@dataclass(frozen=True)
class AlphaStage:
    """The network dense, or after one round.

    Attributes:
        name: "dense", or the round's.
        zeros: share of the measured weights that are exactly 0.
        tables: label ("xmin_peak", "farms xmin_mid") -> alphas.
        frozen: label -> layers that the rule freezes, in network order.
        moved: label -> where the freeze set differs from that of the dense weights; empty for
            them.
    """

    name: str
    zeros: float
    tables: Mapping[str, AlphaTable]
    frozen: Mapping[str, tuple[str, ...]]
    moved: Mapping[str, Disagreement]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; NaN and infinities become strings."""
        return {
            "name": self.name,
            "zeros": self.zeros,
            "layer_zeros": {row.name: row.zeros for row in next(iter(self.tables.values()))},
            "estimates": {
                label: {
                    "median": _plain(table.median()),
                    "alpha": {row.name: _plain(row.alpha) for row in table},
                    "ks_distance": {row.name: _plain(row.ks_distance) for row in table},
                    "remarks": {row.name: row.reason for row in table if row.reason},
                    "frozen": list(self.frozen[label]),
                    "moved": self.moved[label].to_dict() if label in self.moved else None,
                }
                for label, table in self.tables.items()
            },
        }


@dataclass(frozen=True)
class AlphaRounds:
    """Alphas of one network dense and after each round of pruning; ``print`` shows the summary.

    Attributes:
        rule: of the freeze sets.
        stages: the dense network, then the rounds.
    """

    rule: str
    stages: tuple[AlphaStage, ...]

    @property
    def dense(self) -> AlphaStage:
        """The stage the others are compared with."""
        return self.stages[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "kind": _KIND,
            "format": _FORMAT,
            "rule": self.rule,
            "labels": list(self.dense.tables),
            "stages": [stage.to_dict() for stage in self.stages],
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON text; with ``path`` also written there, atomically.

        Raises:
            CheckpointError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        if path is not None:
            atomic_write(path, text.encode("utf-8"))
        return text

    def __str__(self) -> str:
        rows = [("weights", "zeros", "fit", "median alpha", "ratio", "frozen", "differ from dense")]
        for stage in self.stages:
            for label, table in stage.tables.items():
                ratio = _moved_by(self.dense.tables[label], table)
                moved = stage.moved.get(label)
                rows.append(
                    (
                        stage.name,
                        f"{stage.zeros:.1%}",
                        label,
                        f"{table.median():.4f}",
                        "" if moved is None else f"{ratio:.3f}",
                        str(len(stage.frozen[label])),
                        "" if moved is None else f"{moved.count} of {moved.layers}",
                    )
                )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append(
            f"rule {self.rule}; ratio: median over the layers of alpha over that of the dense "
            "weights"
        )
        return "\n".join(lines)


def alpha_along_rounds(
    model: nn.Module,
    rounds: Iterable[MaskSet | nn.Module] | Mapping[str, MaskSet | nn.Module],
    *,
    labels: Sequence[str] = ("xmin_peak",),
    rule: str = "median",
    **options: Any,
) -> AlphaRounds:
    """Alphas of ``model`` as it is and after each round, with the freeze set of each.

    Args:
        model: the dense network; it is not changed.
        rounds: in order, name -> round or only the rounds: masks, under which the weights of
            ``model`` are measured, or the network of a round whose weights were trained on, which
            is measured as it computes. Taken one by one, so a generator need not hold them all.
        labels: fits, or methods with a fit: "ks", "farms", "farms xmin_peak".
        rule: a freeze rule on alphas, "median" or "ratio:0.25".
        options: other arguments of ``estimate_alpha`` (threads, match, linear_aspect, ...).

    Raises:
        PlanError: no label, a rule that does not look at alphas, or a round with other layers.
        MaskError: masks that do not fit the model.
        OpenTransError: as ``estimate_alpha``.
    """
    if not labels:
        raise PlanError("alpha_along_rounds needs at least one fit. Pass labels=('xmin_peak',).")
    dense = _stage("dense", tables_of(model, labels, **options), rule, None)
    stages = [dense]
    named = (
        rounds.items()
        if isinstance(rounds, Mapping)
        else ((f"round {i}", one) for i, one in enumerate(rounds, 1))
    )
    for name, one in named:
        if isinstance(one, MaskSet):
            tables = tables_of(model, labels, masks=one, **options)
        elif isinstance(one, nn.Module):
            tables = tables_of(one, labels, **{**options, "weights": "masked"})
        else:
            raise PlanError(
                f"{name} is a {type(one).__name__}, neither masks nor a network. Pass a MaskSet "
                "(load_masks(PATH)) or the network of that round."
            )
        stages.append(_stage(name, tables, rule, dense))
    return AlphaRounds(rule, tuple(stages))


def _stage(
    name: str, tables: Mapping[str, AlphaTable], rule: str, dense: AlphaStage | None
) -> AlphaStage:
    frozen, moved = {}, {}
    for label, table in tables.items():
        layers = list(dict.fromkeys(row.module for row in table))
        chosen = freeze_set(table, rule)
        frozen[label] = tuple(layer for layer in layers if layer in chosen)
        if dense is not None:
            if [row.name for row in table] != [row.name for row in dense.tables[label]]:
                raise PlanError(
                    f"{name} has {len(table)} layers, the dense network "
                    f"{len(dense.tables[label])}, or others. Pass rounds of the same network."
                )
            moved[label] = Disagreement.of(
                "dense weights", dense.frozen[label], name, frozen[label], layers
            )
    return AlphaStage(name, next(iter(tables.values())).zeros, tables, frozen, moved)


def _moved_by(dense: AlphaTable, now: AlphaTable) -> float:
    """Median over the layers of alpha now over alpha then; NaN if there is none."""
    pairs = zip(dense, now, strict=True)
    return median_of(
        [
            two.alpha / one.alpha
            for one, two in pairs
            if 0 < one.alpha < math.inf and 0 < two.alpha < math.inf
        ]
    )


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
