"""Pruning runs that are stopped: between two writes, by a signal, by a full disk; two processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fresh_process
import pytest
from imp_training import Training, fresh, same

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks import MaskSet

ROOT = Path(__file__).resolve().parents[1]


def test_an_interrupted_write_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each single replacement of a file, the run still ends as it would have."""
    whole = fresh()
    expected = whole.run(rounds=3, rewind=1).masks.content_hash()
    real = os.replace

    def attempt(folder: Path, allowed: int) -> int | None:
        """Writes done if the run ended, None if it was stopped."""
        done = 0

        def replace(source: str, target: str) -> None:
            nonlocal done
            if done == allowed:
                raise KeyboardInterrupt
            done += 1
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            result = fresh().run(folder, rounds=3, rewind=1)
        except KeyboardInterrupt:
            return None
        finally:
            monkeypatch.setattr(os, "replace", real)
        assert result.masks.content_hash() == expected
        return done

    writes = attempt(tmp_path / "whole", 10**6)
    assert writes is not None and writes > 9
    for allowed in range(writes):
        folder = tmp_path / f"stopped-{allowed}"
        assert attempt(folder, allowed) is None
        for path in folder.glob("round-*.safetensors"):
            MaskSet.load(path)
        again = fresh()
        assert again.run(folder, rounds=3, rewind=1).masks.content_hash() == expected
        assert same(again.model, whole.model)
        assert len(list(folder.glob("round-*.safetensors"))) == 3


KILLING = """
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from imp_training import fresh
from opentrans.imp.folder import STATE
from opentrans_kernels.masks import MaskSet

fresh().run(Path(sys.argv[2] + "-warm"), rounds=1)  # late imports
folder, told = Path(sys.argv[2]), Path(sys.argv[3])
rng, kills, rounds = random.Random(5), 0, 0
while True:
    child = os.fork()
    if child == 0:
        def tell(progress):
            if progress.record is not None:
                told.write_text(str(progress.round))
        fresh().run(folder, rounds=40, rate=0.05, on_progress=tell)
        os._exit(0)
    # Longer each time: early enough to kill, late enough to finish, on any machine.
    time.sleep(rng.uniform(0.02, 0.08) * (1 + kills / 2))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    kills += 1
    saved = 0
    if (folder / STATE).exists():
        state = torch.load(folder / STATE, weights_only=True)
        saved = len(state["pruner"]["records"])
    for path in folder.glob("round-*.safetensors"):
        MaskSet.load(path)
    reported = int(told.read_text() or 0) if told.exists() else 0
    assert saved >= reported, (saved, reported)
    assert saved >= rounds, "a saved round was lost"
    rounds = saved
sys.stdout.write(json.dumps({"kills": kills}))
"""


def test_kill_9_loses_at_most_the_running_round(tmp_path: Path) -> None:
    """Children of one process are killed at random moments until one of them finishes."""
    done = fresh_process.run(KILLING, ROOT / "tests", tmp_path / "run", tmp_path / "told")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] >= 2, "nothing was killed, so nothing was shown"
    expected = fresh().run(rounds=40, rate=0.05).masks.content_hash()
    last = MaskSet.load(tmp_path / "run" / "round-040.safetensors")
    assert last.content_hash() == expected


def test_a_full_disk_is_an_error_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, real = fresh(), os.fsync

    def full(handle: int) -> None:
        if len(training.seen) > 7:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        training.run(tmp_path / "run")
    monkeypatch.undo()
    again = Training()
    again.run(tmp_path / "run")
    assert again.seen[0] == 6


RANKS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from imp_training import fresh
from opentrans_kernels.errors import OpenTransError

child = os.fork()  # before any thread exists
rank = int(child == 0)
torch.set_num_threads(1)
store = dist.FileStore(sys.argv[2] + "/store", 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
training = fresh()
result = training.run(sys.argv[2] + "/same", rounds=2)
again = fresh()
repeated = again.run(sys.argv[2] + "/same", rounds=2)
assert again.seen == []
assert repeated.masks.content_hash() == result.masks.content_hash()
other = fresh()
if rank:
    other.model[3].weight.data.add_(torch.randn(16, 8, 3, 3))
try:
    other.run(sys.argv[2] + "/other", rounds=2)
except OpenTransError as error:
    assert "DistributedDataParallel" in str(error)
else:
    raise SystemExit("nobody noticed")
dist.destroy_process_group()
if rank:
    os._exit(0)
_, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


def test_two_processes_write_once_and_must_agree(tmp_path: Path) -> None:
    """Rank 1 starts from other weights in the second run: both ranks refuse to go on."""
    done = fresh_process.run(RANKS, ROOT / "tests", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "same").glob("round-*.safetensors"))) == 2
    assert not list((tmp_path / "other").glob("round-*.safetensors"))
