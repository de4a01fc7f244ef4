"""Files replaced as a whole, and temporary files of processes that were killed in between."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import fresh_process
import pytest

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks import atomic, atomic_write

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def look_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "LOOK_AGAIN_AFTER", -1.0)


def killed_writer(folder: Path) -> Path:
    """What a process leaves that is killed before it renames."""
    script = """
        import os, signal, sys
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        from opentrans_kernels.masks import atomic_write
        atomic_write(sys.argv[1], b"half")
    """
    done = fresh_process.run(script, folder / "state.pt")
    assert done.returncode == -signal.SIGKILL
    [left] = [path for path in folder.iterdir() if path.name != "state.pt"]
    return left


def test_leftovers_of_killed_processes_go_with_the_next_write(tmp_path: Path) -> None:
    left = killed_writer(tmp_path)
    assert left.read_bytes() == b"half"
    atomic_write(tmp_path / "other.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def _name(host: str, pid: int, started: int) -> str:
    return f".state.pt.opentrans-{host}-{pid}-{started}-abc.tmp"


def test_files_of_running_processes_and_other_machines_stay(tmp_path: Path) -> None:
    own, start = os.getpid(), atomic._started(os.getpid()) or 0
    stays = [
        _name(atomic._host(), own, start),  # another thread of this process
        _name(atomic._host(), 1, 0),  # start unknown
        _name("0" * 12, 2**22 + 5, 1),  # another machine: its processes cannot be asked for
        ".state.pt.abcd1234",
        ".hidden.tmp",
        "state.tmp",
    ]
    goes = [_name(atomic._host(), 2**22 + 5, 1)]
    if start:  # the number was given to a later process
        goes.append(_name(atomic._host(), own, start - 1))
    for name in (*stays, *goes):
        (tmp_path / name).write_bytes(b"x")
    atomic_write(tmp_path / "new", b"1")
    assert {path.name for path in tmp_path.iterdir()} == {*stays, "new"}


def test_forgotten_files_of_other_machines_go(tmp_path: Path) -> None:
    path = tmp_path / _name("0" * 12, 5, 1)
    path.write_bytes(b"x")
    old = time.time() - atomic.FORGOTTEN_AFTER - 60
    os.utime(path, (old, old))
    atomic_write(tmp_path / "new", b"1")
    assert not path.exists()


def test_a_folder_is_not_listed_for_every_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(atomic, "LOOK_AGAIN_AFTER", 3600.0)
    listed, real = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or real(path))
    for number in range(5):
        atomic_write(tmp_path / str(number), b"1")
    assert len(listed) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_behind_by_an_error(error: BaseException, tmp_path, monkeypatch) -> None:
    (tmp_path / "f").write_bytes(b"old")

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fails)
    kind = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind):
        atomic_write(tmp_path / "f", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"
