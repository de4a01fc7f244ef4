"""The suite: crashes, interrupts; the quick trunk with peers; scripts behind the verbs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import bench_results as make
import pytest

from opentrans_kernels.bench import schema
from opentrans_kernels.bench.environment import isa_environment
from opentrans_kernels.cli import bench_all, bench_scripts, build_parser, main

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
    assert main(["bench", "all", "-o", str(tmp_path / "out"), "--json", str(target)]) == 1
    record = json.loads(target.read_text())
    codes = {one["name"]: one["exit_code"] for one in record["runs"]}
    assert codes == {"a": -signal.SIGSEGV, "b": 1, "c": 0}
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.json")) == ["b.json", "c.json"]
    said = capsys.readouterr()
    assert "a was ended by signal 11; the suite goes on" in said.err
    assert "opentrans report" in said.out


def test_a_quick_trunk_run_is_valid_and_names_absent_peers(
    limited: None, tmp_path: Path, capsys
) -> None:
    target = tmp_path / "trunk.json"
    words = ["--mask", "uniform:0.80", "--arch", TINY, "--size", "40", "--variants", "eager,folded"]
    peers = ["--peers", "torch.compile,openvino", "--peer-envs", str(tmp_path / "none")]
    command = ["bench", "trunk", *words, *peers, "--quick", "--rounds", "2", "--no-layers"]
    assert main([*command, "--json", str(target)]) == 0
    result = schema.load_result(target)
    assert result["complete"] and result["rounds"] == 2 and not result["layers"]
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
    assert "x over" not in said.out


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
    result = schema.load_result(target)
    said = capsys.readouterr().err
    if kind == "alpha":
        assert code == 0 and "weightwatcher is skipped" in said
    else:
        assert code == 1 and result["failed_checks"] and "failed; see above" in said
    script.write_text("raise SystemExit(2)")
    assert main(["bench", kind, *extra]) == 2
    assert "ended with code 2 and left no result" in capsys.readouterr().err


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


def test_a_model_row_is_exact_and_valid() -> None:
    import torch

    from opentrans_kernels.bench.model import Setting, measure_setting
    from opentrans_kernels.bench.subject import load_subject

    before = torch.get_num_threads()
    row = measure_setting(
        load_subject("uniform:0.80", arch=TINY), Setting("trunk", 2, 40, 48, 1), rounds=1,
        warmup_s=0, variants=("folded",),
    )  # fmt: skip
    torch.set_num_threads(before)
    assert list(schema.problems(row, schema.MODEL_ROW)) == []
    assert row["exact"] and row["speedup"]["median"] > 0 and row["dense_kind"] == "folded"
    assert row["macs"]["effective"] < row["macs"]["nominal"]
