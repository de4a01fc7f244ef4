"""Peers: environments, worker processes, and sessions in which one of them is absent or dies."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from opentrans.cli import main
from opentrans_kernels.bench import schema
from opentrans_kernels.bench.peers import environments, process, registry, session
from opentrans_kernels.bench.peers.work import Work
from opentrans_kernels.errors import OpenTransError

PROTOCOL = session.WORKERS / "protocol.py"
WORKER = """
import sys
import numpy as np
from protocol import serve, take_stdout
answers = take_stdout()
print("engines print on stdout, which must not reach the parent's stream")
calls = []
def call():
    calls.append(1)
    {body}
serve(answers, call, {{"engine": "fake", "cpu_capability": {capability!r}}},
      lambda path: np.save(path, np.full({shape}, {value}, dtype=np.float32)))
"""


def fake(
    folder: Path,
    name: str,
    body: str = "sum(range(2000))",
    value: float = 1.0,
    shape: str = "(1, 2, 3)",
    capability: str | None = None,
) -> None:
    text = WORKER.format(body=body, value=value, shape=shape, capability=capability)
    (folder / f"{name}_worker.py").write_text(text)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Workers and environments in a temporary place; our own side is a fake as well."""
    workers, home = tmp_path / "workers", tmp_path / "home"
    workers.mkdir()
    (workers / "protocol.py").write_text(PROTOCOL.read_text())
    monkeypatch.setattr(session, "WORKERS", workers)
    monkeypatch.setattr(session.native, "available", lambda: False)
    for name in ("onnxruntime", "openvino", "deepsparse"):
        (home / name / "bin").mkdir(parents=True)
        (home / name / "bin" / "python").symlink_to(sys.executable)
        fake(workers, name)
    # A symlinked interpreter finds no packages of its own here; NumPy comes from this environment.
    monkeypatch.setenv("PYTHONPATH", str(Path(np.__file__).parents[1]))
    fake(workers, "ours")
    return SimpleNamespace(workers=workers, home=home)


def measure(stage: SimpleNamespace, names: list[str], **options: Any) -> tuple[dict, bool]:
    graph = options.pop("graph", lambda folder: None)
    work = Work(lambda folder: None, graph, "ours_worker.py", ("RN50", "native"))
    settings = {"rounds": 3, "isa": "native", "threads": 1, "allowed": 1e-6, **options}
    reference = torch.ones(1, 2, 3, dtype=torch.float64)
    return session.measure_peers(work, reference, names, home=stage.home, **settings)


def test_peers_take_turns_and_are_compared(stage: SimpleNamespace) -> None:
    fake(stage.workers, "openvino", body="sum(range(200000))", value=1.5)
    found, interrupted = measure(stage, ["onnxruntime", "openvino"])
    assert not interrupted and set(found) == {"onnxruntime", "openvino"}
    for entry in found.values():
        assert entry["available"] and entry["rounds"] == 3 and entry["wall"]["n"] == 3
        assert entry["engine"] == "fake" and entry["ours_ms"] > 0
        assert list(schema.problems(entry, schema.SIDE)) == []
    assert found["onnxruntime"]["max_rel_err"] == 0
    assert found["openvino"]["max_rel_err"] == pytest.approx(0.5)
    assert found["openvino"]["speedup_of_ours"]["median"] > 5
    assert found["openvino"]["speedup_of_ours_cpu"]["median"] > 5


def test_a_peer_that_dies_mid_run_is_recorded_and_the_others_go_on(stage: SimpleNamespace) -> None:
    # Three settle calls and three timed ones warm up, then three calls a round: dies in round 2.
    fake(stage.workers, "onnxruntime", body="len(calls) > 10 and sys.exit(7)")
    found, _ = measure(stage, ["onnxruntime", "openvino"], rounds=4)
    dead = found["onnxruntime"]
    assert not dead["available"] and not dead["skipped"]
    assert "ended with code 7" in dead["error"] and "Make its environment" in dead["error"]
    assert dead["partial"]["rounds"] == 1
    assert found["openvino"]["available"] and found["openvino"]["rounds"] == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"body": "raise RuntimeError('no such kernel')"}, "RuntimeError: no such kernel"),
        ({"shape": "(1, 9)"}, "shape [1, 9] instead of [1, 2, 3]"),
        ({"body": "sys.stdout.flush(); answers.write('hello\\n')"}, "which is not JSON"),
    ],
)
def test_a_peer_that_fails_at_the_start_is_recorded(
    stage: SimpleNamespace, changes: dict[str, str], said: str
) -> None:
    fake(stage.workers, "deepsparse", **changes)
    found, _ = measure(stage, ["deepsparse", "openvino"])
    assert said in found["deepsparse"]["error"] and not found["deepsparse"]["available"]
    assert found["openvino"]["available"]


def test_an_absent_peer_is_skipped_with_the_command_that_helps(stage: SimpleNamespace) -> None:
    found, _ = measure(stage, ["torch-pruning", "openvino"])
    gone = found["torch-pruning"]
    assert gone["skipped"] and "opentrans bench peers torch-pruning --setup" in gone["error"]
    assert found["openvino"]["available"]
    only, _ = measure(stage, ["torch-pruning"])
    assert set(only) == {"torch-pruning"}


def test_a_network_without_graph_is_a_row_of_every_engine_that_reads_one(
    stage: SimpleNamespace,
) -> None:
    def graph(folder: Path) -> None:
        raise OpenTransError("the network calls aten.sort.default")

    (stage.home / "torch-pruning" / "bin").mkdir(parents=True)
    (stage.home / "torch-pruning" / "bin" / "python").symlink_to(sys.executable)
    fake(stage.workers, "torch_pruning")
    found, _ = measure(stage, ["openvino", "torch-pruning", "deepsparse"], graph=graph)
    for name in ("openvino", "deepsparse"):
        assert found[name]["skipped"] and not found[name]["available"]
        assert found[name]["error"] == "the network calls aten.sort.default"
    assert found["torch-pruning"]["available"], "it has the network's own code"
    fake(stage.workers, "ours", body="sys.exit(3)")  # and is not started for nothing
    assert set(measure(stage, ["openvino"], graph=graph)[0]) == {"openvino"}


def test_nothing_is_timed_against_a_wrong_or_different_own_side(stage: SimpleNamespace) -> None:
    fake(stage.workers, "ours", value=1.1)
    with pytest.raises(OpenTransError, match="exceeds 1.0e-06, twice that of dense"):
        measure(stage, ["openvino"])
    fake(stage.workers, "ours", capability="avx2")
    with pytest.raises(OpenTransError, match="runs on avx2, this process on the reference"):
        measure(stage, ["openvino"])
    fake(stage.workers, "ours", body="sys.exit(3)")
    with pytest.raises(OpenTransError, match="ended with code 3"):
        measure(stage, ["openvino"])


def test_instruction_sets_are_limited_or_it_is_said(
    stage: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NM_ARCH", "none")
    body = "import os; assert os.environ['NM_ARCH'] == 'avx2', os.environ['NM_ARCH']"
    fake(stage.workers, "deepsparse", body=body)
    found, _ = measure(stage, ["deepsparse", "openvino"], isa="avx2")
    assert found["deepsparse"]["available"] and found["deepsparse"]["note"] == ""
    assert "cannot be limited to avx2" in found["openvino"]["note"]


def test_an_interrupt_keeps_finished_rounds(
    stage: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rounds = session._round, []

    def interrupted(turns: list[session.Turn], index: int) -> None:
        rounds.append(index)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        real(turns, index)

    monkeypatch.setattr(session, "_round", interrupted)
    found, stopped = measure(stage, ["openvino"], rounds=9)
    assert stopped and found["openvino"]["available"] and found["openvino"]["rounds"] == 2


def test_a_silent_worker_is_ended(stage: SimpleNamespace, tmp_path: Path) -> None:
    script = tmp_path / "silent.py"
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(OpenTransError, match="silent for 1 s and was ended.*leave this peer out"):
        process.Worker("sleepy", [sys.executable, str(script)], {}, patience_s=1)


def test_unknown_peers_are_explained(capsys) -> None:
    assert registry.chosen("all")[0] == registry.BUILT_IN
    assert "weightwatcher" not in registry.chosen("all")
    with pytest.raises(OpenTransError, match="Choose among all, torch.compile, onnxruntime"):
        registry.chosen("openvino,warp")
    with pytest.raises(OpenTransError, match="timed by 'opentrans bench alpha'"):
        registry.chosen("weightwatcher")
    assert registry.chosen("all", operators=True) == ["onnxruntime", "openvino", "deepsparse"]
    for name in ("torch-pruning", registry.BUILT_IN):
        with pytest.raises(OpenTransError, match=f"{name}' runs whole networks only"):
            registry.chosen(f"openvino,{name}", operators=True)
    assert main(["bench", "peers", "warp"]) == 2
    assert "Choose among onnxruntime" in capsys.readouterr().err


def test_every_peer_is_pinned_and_has_its_worker() -> None:
    for peer in registry.PEERS.values():
        assert "==" in peer.requirements[0], peer.name
        assert (peer.worker is None) == bool(peer.where)
        if peer.worker:
            assert (Path(environments.__file__).parent / "workers" / peer.worker).exists()


def test_the_list_names_what_is_missing(tmp_path: Path, capsys) -> None:
    assert main(["bench", "peers", "--peer-envs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("--setup") == len(registry.PEERS) and "deepsparse==1.8.0" in said


def test_one_command_makes_an_environment_and_a_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    nothing = dataclasses.replace(
        registry.PEERS["torch-pruning"], requirements=(str(tmp_path / "no-such.whl"),)
    )
    monkeypatch.setitem(registry.PEERS, "torch-pruning", nothing)
    assert main(["bench", "peers", "torch-pruning", "--setup", "--peer-envs", str(tmp_path)]) == 1
    said = capfd.readouterr().err
    assert "installing" in said and "failed (see above)" in said
    python = environments.python_of("torch-pruning", tmp_path)
    assert python.exists(), "the environment itself was made"
    shared = list(tmp_path.glob("torch-pruning/lib/*/site-packages/opentrans_host_packages.pth"))
    assert len(shared) == 1 and Path(shared[0].read_text().splitlines()[0]).is_dir()
