"""The suite: crashes, interrupts; the quick trunk with peers; scripts behind the verbs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import bench_results as make
import pytest

from opentrans.cli import bench, bench_all, bench_scripts, bench_trunk, build_parser, main
from opentrans.cli.render import Output
from opentrans_kernels.bench import compare, schema
from opentrans_kernels.bench.environment import isa_environment, machine, portable_words
from opentrans_kernels.bench.machines import machine_slug
from opentrans_kernels.errors import OpenTransError

ROOT = Path(__file__).resolve().parents[1]
TINY = "torchvision:resnet18"


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in isa_environment("native", 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("opentrans_kernels.bench.timing.pin", lambda cpus: list(cpus))
    for module in ("environment", "trunk"):
        monkeypatch.setattr(f"opentrans_kernels.bench.{module}.onednn_isa", lambda: "test")


@pytest.mark.parametrize("quick", [True, False])
def test_every_command_of_the_suite_is_understood(quick: bool) -> None:
    found = dict(bench_all.commands(quick, 2))
    assert len(found) >= 3
    for words in found.values():
        build_parser().parse_args(["bench", *words])
    if not quick:
        assert {words[0] for words in found.values()} == set(schema.KINDS)
        assert any("all" in words for words in found.values()), "no peers"
        assert any(words[-2:] == ["--threads", "2"] or "2" in words for words in found.values())
    assert not any("--threads" in words for words in dict(bench_all.commands(False, 1)).values())


def test_a_crash_is_recorded_and_the_suite_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal, sys
        name = sys.argv[sys.argv.index("bench") + 1]
        if name == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        open(sys.argv[-1], "w").write("{}")
        sys.exit({"fails": 1}.get(name, 0))
        """)
    )
    runs = [("a", ["crash"]), ("b", ["fails"]), ("c", ["fine"])]
    monkeypatch.setattr(bench_all, "commands", lambda quick, cpus: iter(runs))
    real = subprocess.Popen

    def start(command: list[str], **options: object) -> subprocess.Popen:
        return real([sys.executable, str(script), *command[3:]], **options)

    monkeypatch.setattr(bench_all.subprocess, "Popen", start)
    target = tmp_path / "all.json"
    folder = tmp_path / "out" / machine_slug(machine())
    folder.mkdir(parents=True)
    (folder / "a.json").write_text("an older run")  # must not pass for the crashed one
    (folder / "other.json").write_text("not of this suite")
    assert main(["bench", "all", "-o", str(tmp_path / "out"), "--json", str(target)]) == 1
    record = json.loads(target.read_text())
    codes = {one["name"]: one["exit_code"] for one in record["runs"]}
    assert codes == {"a": -signal.SIGSEGV, "b": 1, "c": 0}
    names = sorted(p.name for p in (tmp_path / "out").rglob("*.json"))
    assert names == ["b.json", "c.json", "other.json"] and record["complete"]
    said = capsys.readouterr()
    assert "a was ended by signal 11; the suite goes on" in said.err
    assert "opentrans report" in said.out


def test_an_interrupt_is_recorded_and_ends_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    started = []

    class Child:
        """Its first wait is interrupted in the second benchmark."""

        def __init__(self, command: list[str], **options: object) -> None:
            started.append(command[-3])
            self.waits = 0

        def wait(self) -> int:
            self.waits += 1
            if started[-1] == "second" and self.waits == 1:
                raise KeyboardInterrupt
            return 0

    runs = [(name[0], [name]) for name in ("first", "second", "third")]
    monkeypatch.setattr(bench_all, "commands", lambda quick, cpus: iter(runs))
    monkeypatch.setattr(bench_all.subprocess, "Popen", Child)
    monkeypatch.setattr("opentrans_kernels.bench.environment.machine", lambda: make.MACHINE)
    target = tmp_path / "all.json"
    assert main(["bench", "all", "-o", str(tmp_path / "out"), "--json", str(target)]) == 130
    record = json.loads(target.read_text())
    assert started == ["first", "second"] and record["complete"] is False
    assert [(one["name"], one["exit_code"]) for one in record["runs"]] == [("f", 0), ("s", 130)]
    said = capsys.readouterr()
    assert "interrupted in s: the suite stops" in said.err and "results in" in said.out


def test_a_recorded_command_names_no_place_of_one_machine() -> None:
    words = ["--peer-envs", "/srv/me/peers", "--json=/srv/me/a.json", "--size", "64x96", "a/b"]
    want = ["--peer-envs", "peers", "--json=a.json", "--size", "64x96", "a/b"]
    assert portable_words(words) == want


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/results").rglob("*.json")), ids=lambda path: path.name
)
def test_a_stored_result_names_no_place_of_one_machine(path: Path) -> None:
    text = path.read_text()
    command = json.loads(text).get("command", [])
    assert portable_words(command) == command
    assert not re.search(r"(?<!\w)/(tmp|home|root|work|mnt|Users)/", text), "a reason or a label"


def test_a_quick_trunk_run_is_valid_and_names_absent_peers(
    limited: None, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)  # so that the folder's name fits a cell, however long the path is
    target = tmp_path / "trunk.json"
    words = ["--mask", "uniform:0.80", "--arch", TINY, "--size", "40", "--variants", "eager,folded"]
    peers = ["--peers", "torch.compile,openvino", "--peer-envs", "none"]
    command = ["bench", "trunk", *words, *peers, "--quick", "--rounds", "2", "--no-layers"]
    assert main([*command, "--json", str(target)]) == 0
    result = compare.load_result(target)
    assert result["complete"] and result["rounds"] == 2 and not result["layers"]
    assert {"none", "trunk.json"} < set(result["command"])
    assert str(tmp_path) not in str(result["command"])
    for name in ("torch.compile", "openvino"):
        assert result["peers"][name]["skipped"]
    said = capsys.readouterr().out
    assert "skipped: no environment at" in said and "openvino --setup" in said
    assert "skipped: no compiled dense variant was timed" in said
    assert main(["report", str(target), "-o", str(tmp_path / "page.html")]) == 0
    assert main(["bench", "compare", str(target), str(target), "--fail-if-slower", "0"]) == 0


def test_an_inexact_trunk_states_no_speed_up(limited: None, tmp_path: Path, monkeypatch, capsys):
    from opentrans_kernels.bench import trunk
    from opentrans_kernels.bench.variants import relative_error

    calls = []

    def worse(found, reference) -> float:
        calls.append(1)  # the second comparison is that of ours
        return 1.0 if len(calls) == 2 else relative_error(found, reference)

    monkeypatch.setattr(trunk, "relative_error", worse)
    words = ["--mask", "uniform:0.80", "--arch", TINY, "--size", "40", "--variants", "eager"]
    assert main(["bench", "trunk", *words, "--rounds", "1", "--no-layers"]) == 1
    said = capsys.readouterr()
    assert "no speed-up is stated" in said.out and "inexact: error 1.00e+00" in said.err
    assert "x over" not in said.out and "inexact" in said.out


def test_inexact_stands_in_place_of_every_ratio(capsys) -> None:
    result = {**make.trunk(), "exact": False, "torch_cpu_capability": "", "onednn_isa": ""}
    result |= {"pinned_cpus": [0], "losing_layers": [make.layer("wrong", 1.0, 1.5, exact=False)]}
    result["thread_scaling"] = {
        "one_thread_ms": 50.0, "ms": 25.0, "speedup": make.spread(1.9), "cores_before": [],
        "cores_after": [],
        "stages": [
            {"part": "layer4", "one_thread_ms": 6.0, "ms": 4.0, "speedup": make.spread(1.5),
             "efficiency": 0.75},
        ],
    }  # fmt: skip
    result["peers"]["onnxruntime"]["note"] = ""
    result["peers"]["openvino"]["skipped"] = True
    bench_trunk.show(result, Output(None))
    said = capsys.readouterr().out
    assert "layer4" not in said, "a wrong answer has no efficiency"
    for ratio in ("4.00x", "5.20x", "4.40x", "0.67x", "1.90x", "1.50x"):
        assert ratio not in said
    assert said.count("inexact") == 5  # two variants, one peer, one layer, the threads
    result |= {"exact": True, "losing_layers": [make.layer("right", 1.0, 1.5)]}
    bench_trunk.show(result, Output(None))
    said = capsys.readouterr().out
    assert "75%" in next(line for line in said.splitlines() if line.startswith("layer4"))
    assert "4.00x" in said and "0.67x" in said and "1.90x" in said and "inexact" not in said
    assert any("below the limit" in line for line in bench.failures(result, 99.0))
    assert len(bench.failures({**result, "exact": False}, 99.0)) == 1  # no speed to judge


def test_a_mask_that_does_not_fit_is_explained(limited: None, tmp_path: Path, capsys) -> None:
    import torch

    from opentrans_kernels.masks import MaskSet

    MaskSet({"encoder.0": torch.ones(4, 4, 3, 3, dtype=torch.bool)}).save(
        tmp_path / "m.safetensors"
    )
    for verb in (["trunk"], ["model", "--threads", "1"]):
        words = ["--mask", str(tmp_path / "m.safetensors"), "--arch", TINY]
        assert main(["bench", *verb, *words]) == 2
        assert "no mask of" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["alpha", "training"])
def test_scripts_become_results_of_the_common_form(
    limited: None, kind: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    content = {key: value for key, value in make.ALL[kind]().items()
               if key not in make.envelope(kind)}  # fmt: skip
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nopen(sys.argv[-1], 'w').write({json.dumps(json.dumps(content))})\n"
        "sys.exit(int('--mask' in sys.argv and 'none' in sys.argv))\n"
    )
    monkeypatch.setattr(bench_scripts, "script_path", lambda name: script)
    target = tmp_path / "result.json"
    extra = ["--peer-envs", str(tmp_path)] if kind == "alpha" else ["--mask", "none"]
    code = main(["bench", kind, *extra, "--quick", "--json", str(target)])
    result = compare.load_result(target)
    said = capsys.readouterr().err
    if kind == "alpha":
        assert code == 0 and "weightwatcher is skipped" in said
    else:
        assert (
            code == 1 and result["failed_checks"] and "failed; what it printed says which" in said
        )
    script.write_text("raise SystemExit(2)")
    assert main(["bench", kind, *extra]) == 2
    assert "ended with code 2 and left no result" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 1, 3, 139, 130, -signal.SIGSEGV])
def test_only_a_clean_exit_of_a_script_is_no_failure(
    limited: None, code: int, tmp_path: Path, monkeypatch, capsys
) -> None:
    end = f"sys.exit({code})" if code >= 0 else f"os.kill(os.getpid(), {-code})"
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys\nwith open(sys.argv[-1], 'w') as f:\n"
        f"    f.write({json.dumps(json.dumps(make.training()))})\n{end}\n"
    )
    monkeypatch.setattr(bench_scripts, "script_path", lambda name: script)
    target = tmp_path / "result.json"
    ended = main(["bench", "training", "--quick", "--json", str(target)])
    result = compare.load_result(target)
    assert ended == {0: 0, 130: 130}.get(code, 1)
    assert result["complete"] is (code != 130)
    said = {0: None, 130: None, 1: "failed; what it printed says which"}.get(
        code, f"failed with code {code}; see"
    )
    assert bool(result["failed_checks"]) is (said is not None)
    assert said is None or said in result["failed_checks"][0]


@pytest.fixture
def bench_alpha(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds to it
    path = ROOT / "benchmarks" / "bench_alpha.py"
    spec = importlib.util.spec_from_file_location("bench_alpha_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [("#!/bin/sh\nexit 3\n", 0o755, "ended with code 3"), ("", 0o644, "Permission denied")],
)
def test_a_weightwatcher_that_cannot_start_is_left_out(
    bench_alpha, tmp_path: Path, text: str, mode: int, said: str
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(text)
    python.chmod(mode)
    options = argparse.Namespace(weightwatcher=tmp_path / "venv", threads=1)
    peer, reason = bench_alpha.start_peer(options, tmp_path, {})
    assert peer is None and "did not start" in reason and said in reason


@pytest.mark.parametrize("answers", [0, 1, 3])
def test_a_weightwatcher_that_crashes_costs_only_itself(bench_alpha, answers: int) -> None:
    class Peer:
        asked = 0

        def ask(self, command: str) -> dict[str, float]:
            self.asked += 1
            if self.asked > answers:
                raise OpenTransError("the weightwatcher process ended with code -9")
            return {"wall_ms": 1.0, "cpu_ms": 1.0}

    peer, name = Peer(), bench_alpha.WEIGHTWATCHER
    calls = {"ours ks": lambda: None, "published ks": lambda: None}
    table, lost = bench_alpha.interleaved(calls, peer, 3, Output(None))
    assert all(len(table[side].wall_ms) == 3 for side in calls)
    assert (name in table.timings) is (answers == 3)
    assert lost == ("" if answers == 3 else "the weightwatcher process ended with code -9")
    assert peer.asked == min(answers + 1, 3), "a lost peer is not asked again"


def test_alpha_of_a_trained_network_is_not_called_synthetic(bench_alpha, monkeypatch) -> None:
    from torch import nn

    import opentrans.trained

    module = nn.Conv2d(4, 8, 3)
    loaded = argparse.Namespace(module=module)
    monkeypatch.setattr(opentrans.trained, "load", {"hed": loaded}.__getitem__)
    options = argparse.Namespace(trained="hed", threads=1, repeats=2, weightwatcher=None)
    assert bench_alpha.network(options, Output(None)) == (module, "hed, trained")
    words = bench_alpha.row_command(options, "ks")
    assert words[words.index("--trained") + 1] == "hed" and "--arch" not in words


def test_the_published_estimator_leaves_out_what_it_cannot_fit(bench_alpha) -> None:
    import torch
    from published_alpha import estimate

    weights = {"one value": torch.ones(1, 8), "enough": torch.randn(16, 8)}
    assert all(set(estimate(weights, fit)) == {"enough"} for fit in bench_alpha.FITS)


def test_a_weightwatcher_without_alphas_is_explained(bench_alpha, tmp_path: Path) -> None:
    class Peer:
        def ask(self, command: str) -> dict[str, str]:
            return {}

    found, reason = bench_alpha.peer_alphas(Peer(), tmp_path / "absent.json")
    assert found == {} and "absent.json" in reason
    (tmp_path / "cut.json").write_text('{"a": ')
    assert bench_alpha.peer_alphas(Peer(), tmp_path / "cut.json")[1]


def test_the_scripts_are_there() -> None:
    for name in ("bench_alpha.py", "bench_training.py"):
        assert bench_scripts.script_path(name) == ROOT / "benchmarks" / name


@pytest.mark.parametrize("text", ["0", "224,x", "8x8"])
def test_impossible_sizes_are_explained(text: str, capsys) -> None:
    assert main(["bench", "model", "--sizes", text]) == 2
    assert "at least 32 pixels. Write for example" in capsys.readouterr().err


def test_one_axis_is_varied_at_a_time() -> None:
    pytest.importorskip("torch")
    from opentrans_kernels.bench.model import settings

    found = settings([1, 4], [(224, 224), (384, 320)], [1, 2], 224)
    assert [str(one) for one in found] == [
        "trunk 224x224, batch 1, 1 thread(s)",
        "tower 224x224, batch 1, 1 thread(s)",
        "trunk 224x224, batch 1, 2 thread(s)",
        "trunk 224x224, batch 4, 1 thread(s)",
        "trunk 384x320, batch 1, 1 thread(s)",
    ]


@pytest.mark.parametrize("part", ["trunk", "tower"])
def test_a_model_row_is_exact_and_valid(part: str) -> None:
    import torch

    from opentrans_kernels.bench.model import Setting, measure_setting
    from opentrans_kernels.bench.subject import load_subject

    before = torch.get_num_threads()
    row = measure_setting(
        load_subject("uniform:0.80", arch=TINY), Setting(part, 2, 40, 48, 1), rounds=1,
        warmup_s=0, variants=("folded",),
    )  # fmt: skip
    torch.set_num_threads(before)
    assert list(schema.problems(row, schema.MODEL_ROW)) == []
    assert row["exact"] and row["speedup"]["median"] > 0 and row["dense_kind"] == "folded"
    assert row["macs"]["effective"] < row["macs"]["nominal"]
