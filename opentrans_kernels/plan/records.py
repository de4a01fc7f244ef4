"""The plan as data: what is done with every convolution and why; printable, JSON both ways."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..errors import PlanError
from ..masks.limits import brief
from .reading import KINDS, PLAN, ROW, UNIT, check_parts, checked, time_or_none
from .subject import PlanSubject

FORMAT_VERSION = 1


@dataclass(frozen=True)
class PlanRow:
    """One convolution, or a linear layer as a 1x1 on ``h_out`` tokens.

    MACs are per image; predicted_ms comes from a cost model, per batch.

    executed_macs: what its kind computes: with vector padding (sparse), cut widths (compact), four
        ninths (winograd).
    """

    unit: str
    name: str
    kind: str
    cin: int
    cout: int
    kernel: int
    stride: int
    h_out: int
    w_out: int
    nnz: int
    numel: int
    nominal_macs: int
    effective_macs: int
    executed_macs: int
    predicted_ms: float | None

    @property
    def density(self) -> float:
        """Share of nonzero weights, 0 to 1."""
        return self.nnz / max(1, self.numel)


@dataclass(frozen=True)
class PlanUnit:
    """What is decided as one: a residual block, a convolution with its norm and activation, a
    linear layer, or an MLP.

    dense_ms ... winograd_ms: measured milliseconds per batch; None if not measured.
    reason: why this kind, in words and numbers.
    """

    name: str
    role: str
    kind: str
    density: float
    reason: str
    dense_ms: float | None = None
    compact_ms: float | None = None
    sparse_ms: float | None = None
    winograd_ms: float | None = None

    @property
    def chosen_ms(self) -> float | None:
        return getattr(self, f"{self.kind}_ms")


@dataclass(frozen=True)
class Plan:
    """A decision with its reason for every convolution; ``print(plan)`` shows all of it.

    units: decisions, in execution order. rows: one per convolution.
    architecture, masks_hash: what it was made for; it applies to nothing else.
    measured: times are measurements on this machine; False: predictions.
    """

    architecture: str
    masks_hash: str
    masks_label: str
    input_size: tuple[int, int]
    batch: int
    threads: int
    isa: str
    torch: str
    measured: bool
    units: tuple[PlanUnit, ...]
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()
    totals: Mapping[str, Any] = field(default_factory=dict)

    def kind(self, unit: str) -> str:
        """Kind of a block or of a single convolution; KeyError if the plan has none."""
        for entry in self.units:
            if entry.name == unit:
                return entry.kind
        raise KeyError(unit)

    def check(self, subject: PlanSubject) -> None:
        """Raise PlanError unless this plan was made for this architecture and these masks."""
        fix = "Make a plan for them with make_plan(model, masks)."
        if self.architecture != subject.architecture():
            raise PlanError(
                f"the plan is for another network: it has {len(self.rows)} layers such as "
                f"{self.rows[0].name if self.rows else 'none'}, the model "
                f"{sum(len(u.layers) for u in subject.units)} such as "
                f"{subject.units[0].layers[0].name}, or their shapes differ. {fix}"
            )
        names = [unit.name for unit in self.units]
        rows = {row.name: (row.unit, row.numel) for row in self.rows}
        own = {la.name: (u.name, la.numel) for u in subject.units for la in u.layers}
        if names != [unit.name for unit in subject.units] or rows != own:
            raise PlanError(f"the plan's layers are not those of the model. {fix}")
        if self.masks_hash != subject.masks_hash:
            raise PlanError(
                f"the plan is for other masks ({self.masks_label}, hash {self.masks_hash[:12]}), "
                f"given were {subject.masks_label} (hash {subject.masks_hash[:12]}). {fix}"
            )

    def changed(self, kinds: Mapping[str, tuple[str, str]]) -> Plan:
        """The plan with other decisions: unit -> (kind, reason)."""
        own = {unit.name: (unit.kind, unit.reason) for unit in self.units} | dict(kinds)
        units = tuple(
            replace(unit, kind=own[unit.name][0], reason=own[unit.name][1]) for unit in self.units
        )
        rows = tuple(
            row
            if row.kind == own[row.unit][0]
            else replace(
                row, kind=own[row.unit][0], executed_macs=row.nominal_macs, predicted_ms=None
            )
            for row in self.rows
        )
        totals = totals_of(units, rows, self.totals.get("predicted_dense_ms"))
        return replace(self, units=units, rows=rows, totals=totals)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "input_size": list(self.input_size),
            "units": [{**asdict(unit), "chosen_ms": unit.chosen_ms} for unit in self.units],
            "rows": [{**asdict(row), "density": row.density} for row in self.rows],
            "notes": list(self.notes),
            "totals": dict(self.totals),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_dict`. Raises PlanError for anything else."""
        version = record.get("format_version") if isinstance(record, Mapping) else FORMAT_VERSION
        if version != FORMAT_VERSION:
            raise PlanError(
                f"plan format version {brief(version)}, this version of opentrans_kernels reads "
                f"{FORMAT_VERSION}. Make the plan again."
            )
        given = checked("the plan", cls, record, PLAN)
        units = tuple(
            PlanUnit(**checked(f"unit {i}", PlanUnit, unit, UNIT))
            for i, unit in enumerate(given["units"])
        )
        rows = tuple(
            PlanRow(**checked(f"row {i}", PlanRow, row, ROW)) for i, row in enumerate(given["rows"])
        )
        check_parts(units, rows)
        predicted = given.get("totals", {}).get("predicted_dense_ms")
        given |= {
            "input_size": tuple(given["input_size"]),
            "units": units,
            "rows": rows,
            "notes": tuple(given.get("notes", ())),
            # Sums are made again: what is printed then agrees with what is done.
            "totals": totals_of(units, rows, predicted if time_or_none(predicted) else None),
        }
        return cls(**given)

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._table(), "", *self._feet()])

    def _head(self) -> list[str]:
        height, width = self.input_size
        times = "measured" if self.measured else "predicted, nothing was run"
        return [
            f"plan for {height}x{width}, batch {self.batch}, {self.threads} thread"
            f"{'s' if self.threads > 1 else ''}, {self.isa}, torch {self.torch}; times {times}",
            f"masks: {self.masks_label}",
        ]

    def _table(self) -> list[str]:
        header = (
            "layer", "conv", "out", "density", "nnz", "MMAC", "eff.", "exec.", "pred. ms",
            "dense ms", "ms", "decision",
        )  # fmt: skip
        lines = [header]
        for unit in self.units:
            rows = [row for row in self.rows if row.unit == unit.name]
            own = ("", _ms(unit.dense_ms), _ms(unit.chosen_ms), unit.reason)
            if unit.role in _SEVERAL:
                work = [sum(getattr(r, f"{k}_macs") for r in rows) for k in _WORK]
                nnz = str(sum(row.nnz for row in rows))
                predicted = _ms(_total(row.predicted_ms for row in rows))
                cells = (f"{unit.density:.1%}", nnz, *(f"{w / 1e6:.1f}" for w in work), predicted)
                lines.append((unit.name, unit.role, "", *cells, *own[1:]))
            for row in rows:
                name = (
                    row.name if unit.role not in _SEVERAL else "  " + row.name[len(unit.name) + 1 :]
                )
                tail = ("", "", "") if unit.role in _SEVERAL else own[1:]
                lines.append((name, *self._cells(row), *tail))
        widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
        return [
            "  ".join(
                [
                    line[0].ljust(widths[0]),
                    *(c.rjust(w) for c, w in zip(line[1:-1], widths[1:], strict=True)),
                    line[-1],
                ]
            ).rstrip()
            for line in lines
        ]

    @staticmethod
    def _cells(row: PlanRow) -> tuple[str, ...]:
        shape = f"{row.cin}>{row.cout} k{row.kernel}" + (f" s{row.stride}" * (row.stride > 1))
        work = (f"{getattr(row, f'{key}_macs') / 1e6:.1f}" for key in _WORK)
        out = f"{row.h_out}x{row.w_out}" if row.h_out else "-"
        return (shape, out, f"{row.density:.1%}", str(row.nnz), *work, _ms(row.predicted_ms))

    def _counted(self) -> str:
        """How many layers of each kind there are, in words."""
        roles = {unit.name: unit.role for unit in self.units}
        linear = sum(roles[row.unit] in _LINEAR for row in self.rows)
        counts = ((len(self.rows) - linear, "convolutions"), (linear, "linear layers"))
        return " and ".join(f"{n} {what}" for n, what in counts if n or not self.rows) or "none"

    def _feet(self) -> list[str]:
        t = self.totals
        kinds = Counter(row.kind for row in self.rows)
        lines = [
            f"{self._counted()}: "
            + ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind]),
            f"{t['nnz']} of {t['numel']} weights are nonzero ({t['density']:.2%}); MMAC per image "
            f"{t['nominal_macs'] / 1e6:.0f} nominal, {t['effective_macs'] / 1e6:.0f} effective, "
            f"{t['executed_macs'] / 1e6:.0f} executed",
        ]
        if t.get("dense_ms"):
            lines.append(
                f"sum over layers: {t['dense_ms']:.1f} ms dense, {t['chosen_ms']:.1f} ms as "
                f"planned ({t['dense_ms'] / max(t['chosen_ms'], 1e-9):.2f}x, each layer timed "
                "alone)"
            )
        elif t.get("predicted_ms") and t.get("predicted_dense_ms"):
            lines.append(
                f"predicted: {t['predicted_dense_ms']:.1f} ms dense, {t['predicted_ms']:.1f} ms "
                "as planned, on a nominal core; only the ratio means something"
            )
        return [*lines, *(f"note: {note}" for note in self.notes)]


_WORK = ("nominal", "effective", "executed")
_LINEAR = ("linear", "mlp", "attention")
_SEVERAL = ("block", "mlp", "attention")  # of several layers, each with a row of its own


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _total(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _from(cls: type, record: Mapping[str, Any]) -> Any:
    return cls(**{f.name: record[f.name] for f in fields(cls)})


def totals_of(
    units: tuple[PlanUnit, ...], rows: tuple[PlanRow, ...], predicted_dense_ms: float | None
) -> dict[str, Any]:
    """Sums over a plan. Times are None unless every timed unit has both of them."""
    nnz, numel = sum(row.nnz for row in rows), sum(row.numel for row in rows)
    timed = [unit for unit in units if unit.dense_ms is not None and unit.chosen_ms is not None]
    return {
        "nnz": nnz,
        "numel": numel,
        "density": nnz / max(1, numel),
        **{f"{key}_macs": sum(getattr(row, f"{key}_macs") for row in rows) for key in _WORK},
        "predicted_ms": _total(row.predicted_ms for row in rows),
        "predicted_dense_ms": predicted_dense_ms,
        "dense_ms": _total(unit.dense_ms for unit in timed),
        "chosen_ms": _total(unit.chosen_ms for unit in timed),
    }
