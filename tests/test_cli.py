"""The command line: exit codes, JSON, plain and rich output, and each command on small models."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from opentrans import cli
from opentrans.cli import bench, render, weights
from opentrans_kernels import __version__
from opentrans_kernels.bench import trunk, variants
from opentrans_kernels.bench.environment import isa_environment
from opentrans_kernels.bench.subject import load_subject
from opentrans_kernels.bench.trunk import TrunkOptions
from opentrans_kernels.checkpoint import load_accelerated
from opentrans_kernels.errors import CheckpointError, OpenTransError

TINY = "torchvision:resnet18"


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that limit themselves by a new process then run in this one, which tests can see."""
    for name, value in isa_environment("native", 1).items():
        monkeypatch.setenv(name, value)
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        monkeypatch.setattr("opentrans_kernels.bench.timing.pin", lambda cpus: sorted(allowed))


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("masks") / "uniform80.safetensors"
    load_subject("uniform:0.80", arch=TINY).masks.save(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    import torch

    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(load_subject("uniform:0.80", arch=TINY).model.state_dict(), path)
    return str(path)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from opentrans.cli import main; code = main(['plan', '--help']);"
        "sys.exit(code or ('torch' in sys.modules and 9))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "exit codes" in done.stdout and "MASK" in done.stdout


def test_the_version_and_the_module_without_a_console_script() -> None:
    command = [sys.executable, "-m", "opentrans", "--version"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and done.stdout == f"opentrans {__version__}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert "usage: opentrans " + command in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [[], ["warp"], ["plan"], ["plan", "x", "--threads", "0"], ["inspect", "x", "--siz"]],
)
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_bad_input_is_2_with_the_reason(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "no-such-mask.pth"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"opentrans {command}: mask 'no-such-mask.pth' is neither a file nor" in shown.err
    assert "Traceback" not in shown.err


def test_debug_shows_the_traceback(set_env, capsys: pytest.CaptureFixture[str]) -> None:
    set_env(OPENTRANS_LOG="debug")
    assert cli.main(["inspect", "no-such-mask.pth"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bad_setting_is_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from opentrans_kernels import settings

    monkeypatch.setenv("OPENTRANS_STRICT", "perhaps")
    monkeypatch.setattr(settings, "_current", None)
    assert cli.main(["info"]) == 2
    assert "OPENTRANS_STRICT" in capsys.readouterr().err


def test_a_bug_is_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from opentrans.cli import info

    def broken(options: Namespace, out: render.Output) -> int:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(info, "run", broken)
    assert cli.main(["info"]) == 3
    assert "unexpected ZeroDivisionError: oops" in capsys.readouterr().err


def test_info_shows_what_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("sparse_conv2d", "reference", "OPENTRANS_BACKEND", "torch", "CPU capability"):
        assert word in text
    assert cli.main(["info", "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert {row["backend"] for row in payload["backends"]} >= {"cpu", "reference"}
    assert payload["extension"]["loaded"] == (payload["extension"]["reason"] is None)


def test_inspect_reads_a_file_without_a_model(
    mask_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "audit.json"
    assert cli.main(["inspect", mask_file, "--size", "64", "--json", str(target)]) == 0
    shown = capsys.readouterr()
    payload = json.loads(target.read_text())
    assert payload["synthetic"] and "SYNTHETIC" in shown.err
    rows = {row["name"]: row for row in payload["audit"]["rows"]}
    assert rows["layer3.0.conv1"]["density"] == pytest.approx(0.2, abs=1e-3)
    assert "layer3.0.conv1" in shown.out and "20.00%" in shown.out
    assert f"wrote {target}" in shown.out


def test_inspect_strict_fails_on_leftover_masks(
    mask_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from opentrans_kernels.masks import MaskSet

    extra = dict(load_subject("uniform:0.80", arch=TINY).masks.masks)
    extra["head.conv"] = torch.ones(4, 4, 3, 3, dtype=torch.bool)
    path = tmp_path / "extra.safetensors"
    MaskSet(extra).save(path)
    arguments = ["inspect", str(path), "--arch", TINY, "--size", "64", "--json"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["unmatched_masks"] == ["head.conv"]
    assert "1 masks are not used" in shown.err and "head.conv" in shown.err
    assert cli.main([*arguments, "--strict"]) == 1


def test_plan_covers_every_layer(mask_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", mask_file, "--arch", TINY, "--size", "64", "--no-measure"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "plan for 64x64" in text and "layer4.1" in text and "predicted" in text
    assert cli.main([*arguments, "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    masks = load_subject(mask_file, arch=TINY).masks.masks
    assert set(masks) <= {row["name"] for row in payload["plan"]["rows"]}
    assert payload["subject"]["synthetic_mask"]


def test_accelerate_writes_only_exact_results(
    mask_file: str,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, numbers = tmp_path / "packed.safetensors", tmp_path / "numbers.json"
    arguments = ["accelerate", checkpoint, "--mask", mask_file, "--arch", TINY, "--size", "64"]
    arguments += ["--output", str(target), "--json", str(numbers)]
    assert cli.main(arguments) == 0
    assert target.stat().st_size < 0.6 * Path(checkpoint).stat().st_size
    payload = json.loads(numbers.read_text())
    assert payload["exact"] and payload["max_rel_err"] <= 2 * payload["dense_own_rel_err"]
    assert "load_accelerated builds the network" in capsys.readouterr().out
    assert load_accelerated(target)[1].accelerated, "the file names its architecture"
    target.unlink()
    monkeypatch.setattr("opentrans_kernels.bench.variants.relative_error", wrong_after_one())
    assert cli.main(arguments) == 1
    assert not target.exists()
    assert "inexact" in capsys.readouterr().err


def test_accelerate_without_zeros_says_so_and_writes_nothing(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "packed.safetensors"
    arguments = ["accelerate", checkpoint, "--arch", TINY, "--size", "64", "--output", str(target)]
    assert cli.main(arguments) == 1
    shown = capsys.readouterr()
    assert "no weight is zero" in shown.out and "nothing was accelerated" in shown.err
    assert not target.exists()


def wrong_after_one():
    """Relative errors 1 for the accelerated trunk, which is compared first, then 1e-7."""
    answers = iter([1.0, 1e-7])
    return lambda found, reference: next(answers)


@pytest.mark.parametrize("target", ["missing/packed.safetensors", "."])
def test_accelerate_checks_the_output_first(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["accelerate", "no-such.pth", "--output", str(tmp_path / target)]
    assert cli.main(arguments) == 2
    assert (
        "cannot be written" in (message := capsys.readouterr().err) or "is a directory" in message
    )


def test_bench_trunk_runs_and_checks(
    limited: None,
    mask_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, measured = trunk.run, []

    def run(*given: object) -> dict[str, Any]:
        measured[:] = measured or [real(*given)]
        return measured[0]

    monkeypatch.setattr(trunk, "run", run)
    target = tmp_path / "trunk.json"
    arguments = ["bench", "trunk", "--mask", mask_file, "--arch", TINY, "--size", "40"]
    arguments += ["--size-w", "48", "--rounds", "2", "--variants", "eager", "--no-layers"]
    assert cli.main([*arguments, "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    for key in ("speedup", "max_rel_err", "dense_own_rel_err", "machine", "versions", "isa"):
        assert key in result
    assert result["baseline"]["name"] == "eager" and result["input"] == [1, 3, 40, 48]
    assert "trunk.json" in result["command"] and str(target) not in result["command"]
    assert "speed-up" in capsys.readouterr().out
    assert cli.main([*arguments, "--fail-under", "1e9"]) == 1
    assert "below the limit" in capsys.readouterr().err


def test_bench_starts_a_limited_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    arguments = ["bench", "trunk", "--mask", "no-such-mask.pth"]
    assert cli.main(arguments) == 2
    assert "no-such-mask.pth" in capfd.readouterr().err


def test_bench_failures() -> None:
    good = {"exact": True, "speedup": 4.0, "max_rel_err": 1e-5, "dense_own_rel_err": 1e-5}
    assert bench.failures(good, None) == bench.failures(good, 4.0) == []
    assert "below the limit 4.5x" in bench.failures(good, 4.5)[0]
    assert "inexact" in bench.failures({**good, "exact": False}, None)[0]
    with pytest.raises(OpenTransError, match="--cpus 0,1"):
        bench.chosen_cpus("zero", 1)
    assert bench.chosen_cpus("0,1", 2) == [0, 1]


def test_demo_writes_a_report(
    limited: None, mask_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "report"
    arguments = ["--mask", mask_file, "--arch", TINY, "--size", "40", "--rounds", "2"]
    arguments += ["--variants", "eager", "--no-download", "--no-trained", "--output", str(folder)]
    assert cli.main(["demo", *arguments]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "report.json"]
    page, result = (
        (folder / "index.html").read_text(),
        json.loads((folder / "report.json").read_text()),
    )
    assert "SYNTHETIC weights" in page and page.count("<svg") == 4
    assert f"{result['speedup']:.2f}x" in page and result["banner"]
    assert result["trained"] == {"skipped": "--no-trained was given."}
    assert "Left out: --no-trained was given." in page and "<img" not in page
    assert "fastest of the 1 dense variants that were timed: eager." in page
    shown = capsys.readouterr()
    assert "eager is the fastest of 1 dense variants timed: eager\n" in shown.out
    assert "SYNTHETIC weights" in shown.err


@pytest.mark.parametrize(
    "command", ["demo --no-download --no-trained --output report", "bench trunk"]
)
def test_demo_and_benchmark_time_the_same_dense_variants(
    command: str, limited: None, mask_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stop(subject: object, options: TrunkOptions, *_: object) -> None:
        asked.append(options.variants)
        raise OpenTransError("far enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opentrans_kernels.bench.trunk.run", stop)
    assert cli.main([*command.split(), "--mask", mask_file, "--arch", TINY, "--size", "64"]) == 2
    assert asked == [variants.BASELINE] and TrunkOptions().variants == variants.BASELINE
    # Plain compile and its folded twin end the process together (docs/performance.md, 6).
    assert set(variants.NAMES) - set(variants.BASELINE) == {"compile"}


def test_weights_are_searched_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("open_clip")
    closed = "http://127.0.0.1:9"
    assert weights.why_unreachable(closed, 1.0)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    found = weights.openai_weights("RN50", host=closed, probe_s=1.0)
    assert found.path is None and closed in found.reason
    assert "no 'openai' weights" in weights.openai_weights("RN9", host=closed).reason
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: "/cache/weights.safetensors")
    assert weights.openai_weights("RN50").path == Path("/cache/weights.safetensors")


def output(json_target: str | None = None, use_rich: bool = False) -> render.Output:
    return render.Output(json_target, stdout=io.StringIO(), stderr=io.StringIO(), use_rich=use_rich)


def test_plain_tables_are_aligned() -> None:
    out = output()
    out.table("title", ("layer", "ms"), [["a", "1.00"], ["long.name", "10.25"], ["b", None]])
    lines = out.stdout.getvalue().splitlines()
    assert lines[0] == "title"
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[-1].endswith(" -") and lines[-2].endswith("10.25")
    assert not out.rich


def test_rich_shows_brackets_as_text() -> None:
    pytest.importorskip("rich")
    out = output(use_rich=True)
    out.table(None, ("layer", "size"), [["[bold]conv[/bold]", "1x1"]])
    out.heading("[red]h[/red]")
    out.warn("[blue]w[/blue]")
    assert out.rich
    assert "[bold]conv[/bold]" in out.stdout.getvalue() and "[red]h" in out.stdout.getvalue()
    assert "[blue]w[/blue]" in out.stderr.getvalue()


def test_json_on_stdout_silences_everything_else() -> None:
    out = output("-")
    out.heading("h")
    out.text("t")
    out.table("x", ("a",), [["b"]])
    out.warn("careful")
    out.finish({"value": math.nan, "path": Path("a"), "items": (1, True, None)})
    assert json.loads(out.stdout.getvalue()) == {
        "value": None,
        "path": "a",
        "items": [1, True, None],
    }
    assert "careful" in out.stderr.getvalue()


def test_unwritable_targets_are_refused_early(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist. Create it first"):
        output(str(tmp_path / "no" / "x.json"))
    with pytest.raises(CheckpointError, match="is a directory"):
        output(str(tmp_path))
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="not a directory"):
        render.check_writable(tmp_path / "file", directory=True)
    assert render.check_writable(tmp_path / "new", directory=True) == tmp_path / "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_cells() -> None:
    assert [render.cell_text(cell) for cell in (None, 1234567, 0.123456, "x", True)] == [
        "-",
        "1,234,567",
        "0.1235",
        "x",
        "True",
    ]
