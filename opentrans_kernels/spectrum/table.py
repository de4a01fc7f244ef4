"""The result of an estimate: one frozen row per layer, and the table that holds them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch

from ..errors import OpenTransError
from ..masks import atomic_write
from ..masks.limits import parse_json

__all__ = ["MASKED_SHARE", "AlphaTable", "LayerAlpha"]

#: From this share of exact zeros on a layer counts as masked: a trained weight is hardly ever 0.
MASKED_SHARE = 0.01

_KIND = "opentrans alpha table"
_FORMAT = 1
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class LayerAlpha:
    """The fitted power law of one layer, or of one third of a fused attention projection.

    Eigenvalues are those of W W^T, all kernel positions of a convolution pooled and scaled by
    ``conv_norm``. "Kept" ones exceed the threshold. No unit.

    Attributes:
        name: as the published tools print it: the module's name, with ``_q``, ``_k`` or ``_v``
            behind it for a third of a fused projection.
        parameter: the exact name of the parameter, or the key of the mapping, it came from.
        part: ``""``, ``"q"``, ``"k"`` or ``"v"``.
        kind: ``"conv"`` or ``"linear"``.
        shape: of the weight (of the part, if there is one).
        fit: the mode, a key of :data:`~opentrans_kernels.spectrum.rules.MODES`.
        alpha: the exponent. NaN: undefined, see ``reason``. Infinite: all fitted values are equal.
            0 (``xmin_peak``) and -1 (``weightwatcher``) are what those tools return without a fit.
        ks_distance: one-sided Kolmogorov-Smirnov distance D of the fit; 1 if there is none.
        xmin: the eigenvalue the fitted tail starts at; NaN without a fit.
        xmin_index: its index among the sorted kept eigenvalues; -1 without a fit.
        num_evals: kept eigenvalues N.
        num_total: all eigenvalues.
        spectral_norm: largest kept eigenvalue.
        stable_rank: ``norm / spectral_norm``.
        norm: sum of the kept eigenvalues.
        log_norm, log_spectral_norm: log10 of the two.
        alpha_weighted: ``alpha * log_spectral_norm``.
        log_alpha_norm: log10 of the sum of x^alpha over the kept eigenvalues x.
        matrix_rank: singular values above ``max * shape[1] * eps32`` (float32's eps on purpose).
        entropy: of the kept eigenvalues, over ln of the rank.
        smallest: smallest kept eigenvalue; the published tools call this one ``xmin``.
        params: elements of the module's trainable parameters.
        precision: ``"float64"``, ``"float32"``, or what was redone, in words.
        solver: how the eigenvalues were computed.
        ambiguous: another correct implementation may return another alpha, see ``reason``.
        reason: why alpha is undefined or ambiguous; ``""`` otherwise.
        approx: how the eigenvalues were approximated; ``""`` if they were not.
        zeros: share of the measured weights that are exactly 0, 0 to 1; NaN: not counted.
    """

    name: str
    parameter: str
    part: str
    kind: str
    shape: tuple[int, ...]
    fit: str
    alpha: float
    ks_distance: float
    xmin: float
    xmin_index: int
    num_evals: int
    num_total: int
    spectral_norm: float
    stable_rank: float
    norm: float
    log_norm: float
    log_spectral_norm: float
    alpha_weighted: float
    log_alpha_norm: float
    matrix_rank: int
    entropy: float
    smallest: float
    params: int
    precision: str = "float64"
    solver: str = ""
    ambiguous: bool = False
    reason: str = ""
    approx: str = ""
    zeros: float = math.nan

    @property
    def module(self) -> str:
        """Name of the module the parameter belongs to."""
        return self.parameter.removesuffix(".weight")

    @property
    def defined(self) -> bool:
        """Whether alpha may be compared: not NaN and not WeightWatcher's -1."""
        return self.alpha >= 0

    @property
    def masked(self) -> bool:
        """Whether so many weights are exactly 0 that they must have been removed."""
        return self.zeros >= MASKED_SHARE


_COLUMNS = tuple(f.name for f in dataclasses.fields(LayerAlpha))


@dataclass(frozen=True, eq=False)
class AlphaTable(Sequence[LayerAlpha]):
    """Rows in network order; ``table["layer1.0.conv1"]`` or ``table[3]``. Printing shows them.

    Attributes:
        rows: one per layer.
        fit: the mode, part of any decision taken from the table.
        parameters: the other arguments that define the numbers (bins, threshold, ...).
        versions: of the software.
        skipped: name -> reason, for weights that were looked at and left out.
        spectra: name -> sorted kept eigenvalues, float64 [N]; only with ``keep_spectra=True``, and
            never written to files.
        notes: what a reader of the table must know (synthetic weights, approximations).
    """

    rows: tuple[LayerAlpha, ...]
    fit: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    spectra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        index: dict[str, int] = {}
        for position, row in enumerate(self.rows):
            if row.name in index:
                raise OpenTransError(
                    f"two rows are called {row.name!r} (from {self.rows[index[row.name]].parameter}"
                    f" and {row.parameter}), so names would not be unique. Rename one of the "
                    "modules, or estimate them in two calls."
                )
            index[row.name] = position
        object.__setattr__(self, "_index", index)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LayerAlpha]:
        return iter(self.rows)

    def __contains__(self, item: object) -> bool:
        return item in self._index if isinstance(item, str) else item in self.rows  # type: ignore[attr-defined]

    @overload
    def __getitem__(self, key: str | int) -> LayerAlpha: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[LayerAlpha]: ...
    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.rows[key]
        position = self._index.get(key)  # type: ignore[attr-defined]
        if position is None:
            raise OpenTransError(
                f"no layer {key!r} in this table of {len(self.rows)} layers. Names are those of "
                "table.alphas(); skipped layers are in table.skipped."
            )
        return self.rows[position]

    def alphas(self) -> dict[str, float]:
        """Name -> alpha, in network order; NaN where it is undefined."""
        return {row.name: row.alpha for row in self.rows}

    @property
    def method(self) -> str:
        """How matrices were made of weights: "whole" or "farms"."""
        return str(self.parameters.get("method", "whole"))

    @property
    def label(self) -> str:
        """Method and fit, which make a freeze set together: "xmin_peak", "farms xmin_mid"."""
        return self.fit if self.method == "whole" else f"{self.method} {self.fit}"

    @property
    def zeros(self) -> float:
        """Share of the measured weights that are exactly 0; NaN if they were not counted."""
        counted = [(row.zeros, math.prod(row.shape)) for row in self.rows]
        total = sum(size for _, size in counted)
        return sum(share * size for share, size in counted) / total if total else math.nan

    @property
    def weights_seen(self) -> str:
        """ "masked" if a layer has a mask's zeros (:attr:`LayerAlpha.masked`), else "dense"."""
        return "masked" if any(row.masked for row in self.rows) else "dense"

    def median(self) -> float:
        """Median alpha, the mean of the two middle ones for an even count.

        Rows without a comparable alpha (:attr:`LayerAlpha.defined`) do not count; NaN if there is
        no other row. Infinite alphas count as larger than all others.
        """
        known = [row.alpha for row in self.rows if row.defined]
        return statistics.median(known) if known else math.nan

    def sorted(self, by: str = "alpha", descending: bool = False) -> list[LayerAlpha]:
        """Rows ordered by one of their attributes; NaN last either way, equal ones in order.

        Raises:
            OpenTransError: ``by`` is no attribute of a row.
        """
        if by not in _COLUMNS:
            raise OpenTransError(
                f"rows cannot be sorted by {by!r}. Use one of {', '.join(_COLUMNS)}."
            )
        known = [row for row in self.rows if getattr(row, by) == getattr(row, by)]
        rest = [row for row in self.rows if getattr(row, by) != getattr(row, by)]
        return sorted(known, key=lambda row: getattr(row, by), reverse=descending) + rest

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The table as standard JSON; NaN and infinities become the strings "nan", "inf", "-inf".

        path: also write it there, atomically.
        """
        record = {
            "kind": _KIND,
            "format": _FORMAT,
            "fit": self.fit,
            "median": _plain(self.median()),
            "parameters": _plain(dict(self.parameters)),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "skipped": dict(self.skipped),
            "layers": [
                {name: _plain(getattr(row, name)) for name in _COLUMNS} for row in self.rows
            ],
        }
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        if path is not None:
            atomic_write(path, text.encode("utf-8"))
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> AlphaTable:
        """Read what :meth:`to_json` made: a path, or the text itself. Numbers come back exactly.

        Raises:
            OpenTransError: not such a file, or not readable.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        what = "the text" if is_text else os.fspath(source)
        fix = "Write one with AlphaTable.to_json(PATH), or opentrans alpha --json PATH."
        try:
            text = source if is_text else Path(source).read_text(encoding="utf-8")
            record = parse_json(str(text))
        except (OSError, ValueError) as error:
            raise OpenTransError(f"{what} cannot be read as an alpha table: {error}. {fix}") from (
                error
            )
        if not isinstance(record, dict) or record.get("kind") != _KIND:
            raise OpenTransError(f"{what} is JSON, but not an alpha table. {fix}")
        if record.get("format") != _FORMAT:
            raise OpenTransError(
                f"{what} has format {record.get('format')!r}; this version reads {_FORMAT}. {fix}"
            )
        try:
            rows = tuple(_row(entry) for entry in record["layers"])
            return cls(
                rows,
                record["fit"],
                _restored(record["parameters"]),
                record["versions"],
                record["skipped"],
                notes=tuple(record["notes"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise OpenTransError(
                f"{what} lacks or garbles a field of an alpha table ({error!r}). {fix}"
            ) from error

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One line per layer with every attribute, under a header line; shapes as "64x3x7x7".

        path: also write it there, atomically.
        """
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for row in self.rows:
            cells = [getattr(row, name) for name in _COLUMNS]
            cells[_COLUMNS.index("shape")] = "x".join(map(str, row.shape))
            writer.writerow(cells)
        text = buffer.getvalue()
        if path is not None:
            atomic_write(path, text.encode("utf-8"))
        return text

    def __str__(self) -> str:
        header = ("layer", "shape", "alpha", "D", "xmin", "kept/all", "stable rank", "remark")
        lines = [header]
        for row in self.rows:
            mark = "ambiguous: " if row.ambiguous and row.reason else ""
            remark = "; ".join(filter(None, (mark + row.reason, row.approx)))
            if row.precision != "float64":
                remark = "; ".join(filter(None, (remark, row.precision)))
            lines.append(
                (
                    row.name,
                    "x".join(map(str, row.shape)),
                    f"{row.alpha:.4f}",
                    f"{row.ks_distance:.4f}",
                    f"{row.xmin:.3e}",
                    f"{row.num_evals}/{row.num_total}",
                    f"{row.stable_rank:.2f}",
                    remark,
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
        text = [
            "  ".join(
                [line[0].ljust(widths[0]), *(map(str.rjust, line[1:-1], widths[1:])), line[-1]]
            )
            for line in lines
        ]
        flagged = sum(row.ambiguous for row in self.rows)
        text.append(
            f"{len(self.rows)} layers, fit {self.label}, median alpha {self.median():.4f}"
            + (f", {flagged} ambiguous" if flagged else "")
            + (f", {len(self.skipped)} skipped" if self.skipped else "")
        )
        text += [f"note: {note}" for note in self.notes]
        return "\n".join(line.rstrip() for line in text)


def _plain(value: Any) -> Any:
    """A value that standard JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _restored(entry) for key, entry in value.items()}
    return value


def _row(entry: Mapping[str, Any]) -> LayerAlpha:
    # Tables written before zeros were counted lack them alone.
    values = {name: entry[name] for name in _COLUMNS if name != "zeros"}
    values["zeros"] = entry.get("zeros", math.nan)
    for one in dataclasses.fields(LayerAlpha):
        if one.type == "float":
            values[one.name] = float(_restored(values[one.name]))
    values["shape"] = tuple(int(size) for size in values["shape"])
    return LayerAlpha(**values)
