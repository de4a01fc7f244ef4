"""The folder of a run: what was asked, and what is done.

::

    settings.json          what decides the results, and its fingerprint
    classes.json           {"classes": [{"number", "name", "colour"}], "none": 255}
    labels/NAME.png        class number per pixel
    overlays/NAME.png      to look at
    records/NAME.json      one picture; written last, so that it says the others are there
    results.json           all records, and the pictures that failed

Every file is written whole or not at all, and by one process only, so a run that was killed goes
on where it stopped, and several processes share a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.masks import atomic_write
from opentrans_kernels.masks.limits import brief, parse_json

from .pictures import Picture
from .recipe import fingerprint
from .vocabulary import colours_of, none_of

__all__ = ["OutputFolder", "stamp_of"]

PARTS = ("labels", "overlays", "records")


def stamp_of(file: str) -> dict[str, int]:
    """Size and time of a file: another picture under its name is noticed."""
    found = os.stat(file)
    return {"bytes": found.st_size, "modified_ns": found.st_mtime_ns}


@dataclass(frozen=True)
class OutputFolder:
    """Paths and contents of the folder of a run."""

    path: Path

    def label(self, name: str) -> Path:
        return self.path / "labels" / f"{name}.png"

    def overlay(self, name: str) -> Path:
        return self.path / "overlays" / f"{name}.png"

    def record(self, name: str) -> Path:
        return self.path / "records" / f"{name}.json"

    def open(self, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Make the folder, or go on in it.

        overwrite: remove the outputs of the run before, so that everything is done anew.

        Raises OpenTransError, with what differs, for a run of other settings, and CheckpointError
        for a folder that cannot be written or settings that are damaged.
        """
        settings = dict(settings)
        file = self.path / "settings.json"
        if file.exists() and not overwrite:
            self._compare(_read(file), settings)
        if overwrite:
            self._clear()
        try:
            for part in PARTS:
                (self.path / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror or error}). Name another folder."
            ) from error
        names = settings["classes"]
        colours = colours_of(names)
        rows = [
            {"number": number, "name": name, "colour": list(colour)}
            for number, (name, colour) in enumerate(zip(names, colours, strict=True))
        ]
        _write(self.path / "classes.json", {"classes": rows, "none": none_of(len(names))})
        _write(file, {"fingerprint": fingerprint(settings), "settings": settings})

    def known(self) -> dict[str, str]:
        """File -> name of every picture that has a record."""
        return {record["file"]: name for name, record in self._records().items()}

    def done(self, picture: Picture) -> bool:
        """Whether the outputs of a picture are there, and the picture is the one they are of."""
        record = self._load(self.record(picture.name))
        try:
            return (
                record is not None
                and record["file"] == picture.file
                and record["stamp"] == stamp_of(picture.file)
                and self.label(picture.name).is_file()
                and self.overlay(picture.name).is_file()
            )
        except OSError:
            return False  # the picture itself is gone: reading it will say so

    def finish(
        self,
        failed: Sequence[Mapping[str, str]],
        settings: Mapping[str, Any],
        model: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Write results.json from all records; returns the rows, by name.

        model: what ``systems.describe`` says; empty if none was built this time, where what stands
        there stays.
        """
        file = self.path / "results.json"
        before = _read(file) if not model and file.is_file() else None
        if isinstance(before, dict):
            model = before.get("model", {})
        rows = [record for _, record in sorted(self._records().items())]
        missing = {row["file"] for row in failed}
        rows = [row for row in rows if row["file"] not in missing]
        about = {"settings": settings, "model": model}
        _write(file, {**about, "pictures": rows, "failed": list(failed)})
        return rows

    def _records(self) -> dict[str, dict[str, Any]]:
        folder = self.path / "records"
        found = {}
        for file in sorted(folder.rglob("*.json")):
            name = file.relative_to(folder).with_suffix("").as_posix()
            record = self._load(file)
            if record is not None:
                found[name] = record
        return found

    def _load(self, file: Path) -> dict[str, Any] | None:
        """A record, or None where there is none or it is damaged: the picture is done again."""
        try:
            content = parse_json(file.read_bytes())
        except (OSError, ValueError):
            return None
        keys = {"file", "name", "stamp", "label", "overlay", "classes", "seconds"}
        return content if isinstance(content, dict) and keys <= set(content) else None

    def _compare(self, before: Any, settings: Mapping[str, Any]) -> None:
        try:
            old = dict(before["settings"])
            same = before["fingerprint"] == fingerprint(dict(settings))
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self.path / 'settings.json'} is damaged, so what the outputs there were made "
                "with is not known. Name another folder, or start over with --overwrite."
            ) from error
        if same:
            return
        changed = [key for key in settings if old.get(key) != settings[key]] or ["settings"]
        detail = "; ".join(
            f"{key}: {_shown(old.get(key))} before, {_shown(settings.get(key))} now"
            for key in changed[:3]
        )
        raise OpenTransError(
            f"{self.path} holds the outputs of a run with other settings ({detail}). Name another "
            "folder, or replace them with --overwrite."
        )

    def _clear(self) -> None:
        """Remove what earlier runs wrote, and nothing else."""
        for name in self._records():
            for file in (self.record(name), self.overlay(name), self.label(name)):
                file.unlink(missing_ok=True)
        (self.path / "results.json").unlink(missing_ok=True)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) and len(value) < 120 else brief(value)


def _read(file: Path) -> Any:
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError):
        return None


def _write(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(file, (text + "\n").encode("utf-8", "surrogatepass"))
