"""What a checkpoint holds once it is open: its dicts of name -> tensor, and which one is meant.

A file may hold several: weights and their moving average, masks beside dense weights, a student and
its teacher. ``FILE:ENTRY`` names one of them, by its place in the file ("state_dict_ema",
"model.ema") or by the first part of its tensors' names ("teacher").
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks.files import CheckpointFile, open_checkpoint, shorten
from opentrans_kernels.masks.sparse_file import expanded, is_sparse

# Where training code keeps the network, most telling first.
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "backbone",
    "weights",
    "masks",
    "mask",
)
# Parameters in a table {module: {parameter: tensor}}, and what pruners keep beside them.
_TABLE_KEYS = ("weight", "bias", "mask")
_TABLE_PREFIXES = ("_input_", "_output_")
_DEEPEST = 8  # a self-referencing dict would never end


@dataclass(frozen=True, eq=False)
class Section:
    """One dict of name -> tensor: ``entry`` is its dotted place in ``file``, "" for all of it.

    ``others``: names beside the tensors that hold no tensor.
    """

    file: str
    entry: str
    tensors: Mapping[str, torch.Tensor]
    others: tuple[str, ...] = ()

    @property
    def steps(self) -> list[str]:
        """``entry``, level by level."""
        return self.entry.split(".") if self.entry else []

    @property
    def origin(self) -> str:
        """How messages call it; also what to pass to read just this one."""
        return f"{self.file}:{self.entry}" if self.entry else self.file


@dataclass(frozen=True)
class Source:
    """An opened file and its sections, in the order in which they stand. ``entry``: as asked."""

    file: CheckpointFile
    sections: tuple[Section, ...]
    entry: str = ""

    def notes(self, chosen: Section) -> dict[str, str]:
        """What was passed over to read ``chosen``."""
        notes = {}
        if chosen.entry:
            notes["taken from entry"] = chosen.entry
        passed_over = [s.entry or "(the file itself)" for s in self.sections if s is not chosen]
        if passed_over:
            notes["entries passed over"] = shorten(passed_over)
        if chosen.others:
            notes["entries that are not tensors"] = shorten(chosen.others)
        return notes


def split_entry(path: str | os.PathLike[str]) -> tuple[str, str]:
    """("ckpt.pth", "teacher") for "ckpt.pth:teacher"; (path, "") if there is no such file.

    A file whose own name holds the colon goes first.
    """
    name = os.fspath(path)
    file, colon, entry = name.rpartition(":")
    try:
        named = bool(colon and file and entry) and not Path(name).exists() and Path(file).is_file()
    except (OSError, ValueError):  # no path at all; opening it says why
        named = False
    return (file, entry) if named else (name, "")


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open FILE or FILE:ENTRY. Raises CheckpointError if it cannot be read or has no such entry."""
    name, entry = split_entry(path)
    file = open_checkpoint(name)
    if is_sparse(file):
        file = expanded(file)
    found = tuple(_sections(file.content, name, ()))
    return Source(file, _narrowed(found, entry) if entry else found, entry)


def _sections(content: Any, file: str, steps: tuple[str, ...]) -> Iterator[Section]:
    """All dicts with tensors but those of optimizers, whose tensors have the shapes of weights."""
    if not isinstance(content, Mapping) or len(steps) > _DEEPEST:
        return
    entry = ".".join(steps)
    if _is_table(content):
        flat = {f"{n}.{k}": t for n, row in content.items() for k, t in row.items()}
        tensors = {k: t for k, t in flat.items() if isinstance(t, torch.Tensor)}
        yield Section(file, entry, tensors)
        return
    found = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if any(t.ndim for t in found.values()):  # counters and scores alone are no network
        others = tuple(str(k) for k in content if str(k) not in found)
        yield Section(file, entry, found, others)
    for key, value in content.items():
        if isinstance(key, str) and "optim" not in key.lower():
            yield from _sections(value, file, (*steps, key))


def _is_table(content: Mapping[Any, Any]) -> bool:
    """{module: {"weight": mask, "bias": None}} of NNI, {parameter: {"mask": mask}} of torch.ao."""
    rows = list(content.values())
    if not rows or not all(isinstance(row, Mapping) and row for row in rows):
        return False
    entries = [(str(key), value) for row in rows for key, value in row.items()]
    return (
        all(k in _TABLE_KEYS or k.startswith(_TABLE_PREFIXES) for k, _ in entries)
        and all(v is None or isinstance(v, torch.Tensor) for _, v in entries)
        and any(k != "bias" and v is not None for k, v in entries)
    )


def _narrowed(sections: Sequence[Section], entry: str) -> tuple[Section, ...]:
    inside = [s for s in sections if s.entry == entry or s.entry.startswith(f"{entry}.")]
    if inside:
        return tuple(inside)
    found = []
    for section in sections:
        # "state_dict.teacher" is the teacher of one section, "teacher" that of all.
        names = {entry, entry.removeprefix(f"{section.entry}.") if section.entry else entry}
        for start in sorted(f"{name}." for name in names):
            tensors = {
                k.removeprefix(start): t for k, t in section.tensors.items() if k.startswith(start)
            }
            if tensors:
                inner = f"{section.entry}.{start[:-1]}" if section.entry else start[:-1]
                found.append(Section(section.file, inner, tensors))
                break
    if not found:
        file = sections[0].file if sections else ""
        starts = [s.entry for s in sections if s.entry]
        starts += sorted({k.partition(".")[0] for s in sections for k in s.tensors if "." in k})
        raise CheckpointError(
            f"{file} has no entry {entry!r} and no tensor whose name begins with '{entry}.'. It "
            f"has {shorten(starts, 16) or 'no tensors'}. Write one of them after the colon."
        )
    return tuple(found)


def weights_section(source: Source, sections: Sequence[Section]) -> Section:
    """The one of ``sections`` that is the network.

    The usual containers ("state_dict", "model" ...) go first. Raises CheckpointError if there is
    none, several of equal standing, or another that holds the same network with other values: no
    rule would tell which is meant.
    """
    chosen = preferred(source, sections)
    others = [s for s in sections if s is not chosen]
    rivals = [s for s in others if same_network(s.tensors, chosen.tensors)]
    differ = [s for s in rivals if not equal_tensors(s.tensors, chosen.tensors)]
    if differ:
        raise CheckpointError(ambiguous(source, [chosen, *differ], "the same network"))
    return chosen


def preferred(source: Source, sections: Sequence[Section]) -> Section:
    """The first of ``sections`` by CONTAINERS. Raises CheckpointError if they stand equal."""
    path = source.file.path
    if not sections:
        if not isinstance(source.file.content, Mapping):
            raise CheckpointError(
                f"{path} holds a {type(source.file.content).__name__}, not a dict of name -> "
                "tensor. Save the masks or weights as a dict, for example with "
                "torch.save(model.state_dict(), FILE)."
            )
        raise CheckpointError(
            f"{path} holds no tensors, so it is not clear what to read. Save the one dict of name "
            "-> tensor that is meant, for example with torch.save(model.state_dict(), FILE)."
        )

    def rank(section: Section) -> tuple[int, ...]:
        return tuple(_standing(step) for step in section.steps)

    def tied(section: Section) -> bool:
        pairs = zip(section.steps, first.steps, strict=False)  # one may stand inside the other
        at_fork = next(((a, b) for a, b in pairs if a != b), None)
        return at_fork is not None and _standing(at_fork[0]) == _standing(at_fork[1])

    first = min(sections, key=rank)
    equal = [s for s in sections if s is first or tied(s)]
    if len(equal) > 1:
        names = shorten(s.entry for s in equal)
        raise CheckpointError(
            f"{path} holds several dicts with tensors ({names}), so it is not clear what to read. "
            f"Name the one that is meant after a colon, {equal[0].origin} for instance."
        )
    return first


def _standing(step: str) -> int:
    return CONTAINERS.index(step) if step in CONTAINERS else len(CONTAINERS)


def ambiguous(source: Source, sections: Sequence[Section], what: str) -> str:
    """The message for sections between which nothing decides."""
    names = shorten(s.entry or "(the file itself)" for s in sections)
    named = next(s for s in reversed(sections) if s.entry)
    return (
        f"{source.file.path} holds {what} {len(sections)} times, with different values: {names}. "
        f"Choosing one would be a guess. Name the one that is meant after a colon, "
        f"{named.origin} for instance."
    )


def same_network(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether at least half of the tensors of ``other`` are in ``one``, by name ending and shape.

    Prefixes may differ: that of a moving average is often "module.".
    """

    def signature(tensors: Mapping[str, torch.Tensor]) -> Counter[tuple[str, torch.Size]]:
        return Counter((".".join(k.split(".")[-2:]), t.shape) for k, t in tensors.items())

    common = signature(one) & signature(other)
    return 2 * common.total() >= len(other)


def equal_tensors(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two dicts of one layout hold the same values, in any order of equal names."""
    if len(one) != len(other):
        return False
    pairs = (
        ((one[k], other[k]) for k in one)
        if one.keys() == other.keys()
        else zip(one.values(), other.values(), strict=True)
    )
    return all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.layout == b.layout == torch.strided
        and torch.equal(a, b)
        for a, b in pairs
    )
