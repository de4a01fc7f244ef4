"""Rows of every benchmark say whether they match, how far they spread, and what repeats them."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_results as make
import pytest
import torch

from opentrans.cli import bench_model, bench_op, bench_trunk, build_parser, main
from opentrans.cli.bench_rows import match_cell, ratio_cell, show_repeats
from opentrans.cli.render import Output
from opentrans_kernels.bench import cases, compare, ops, schema
from opentrans_kernels.bench.environment import isa_environment
from opentrans_kernels.bench.layers import measure_layers
from opentrans_kernels.bench.rows import command_words, matched
from opentrans_kernels.bench.subject import load_subject
from opentrans_kernels.errors import OpenTransError

ROOT = Path(__file__).resolve().parents[1]
SMALL = cases.ConvCase(8, 12, 3, 1, 9, 10)
NAN = float("nan")


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process counts as started for one thread; RN50 has one convolution."""
    for name, value in isa_environment("native", 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("opentrans_kernels.bench.timing.pin", lambda cpus: list(cpus))
    monkeypatch.setattr("opentrans_kernels.bench.environment.onednn_isa", lambda: "test")
    monkeypatch.setattr("opentrans_kernels.bench.canary.copy_gbs", lambda **_: 10.0)
    monkeypatch.setattr("opentrans_kernels.bench.ops.conv_cases", lambda _: [SMALL])


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """A script of benchmarks/ as a module, by name."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module


def read(words: list[str]) -> argparse.Namespace:
    """The options of an ``opentrans`` command, as its parser reads them."""
    assert words[0] == "opentrans"
    return build_parser().parse_args(words[1:])


def read_by(module: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The options of a command that starts a script, as the script reads them."""
    assert words[:2] == ["python", f"benchmarks/{module.__name__}.py"]
    held: list[argparse.Namespace] = []
    monkeypatch.setattr(module, "run", lambda options, out: held.append(options) or 0)
    assert module.main(words[2:]) == 0
    return held[0]


def longest(text: str) -> int:
    """Width of the tables: the commands below them may be longer."""
    return max(len(line) for line in text.splitlines() if "--" not in line.split("-" * 9)[0])


def test_a_match_is_an_error_within_its_bound() -> None:
    assert matched(1e-7, 1e-7) == {"equal": True, "error": 1e-7, "bound": 1e-7}
    assert not matched(1.1e-7, 1e-7)["equal"] and not matched(NAN, 1.0)["equal"]
    assert match_cell(matched(3e-7, 4e-7)) == "equal 3.0e-07"
    assert match_cell(matched(3e-7, 2e-7)) == "DIFFERS 3.0e-07 > 2.0e-07"
    assert match_cell(None) is None
    assert ratio_cell(make.spread(2.0)) == "2.00x (1.96-2.04)" and ratio_cell(None) == "inexact"


def test_a_command_is_words_that_a_shell_reads_back(capsys) -> None:
    words = command_words(("opentrans", "bench"), case=["a b", "64->64"], size_w=None, quick=True,
                          cpus=False, mask="global:0.90")  # fmt: skip
    assert words == [
        "opentrans", "bench", "--case", "a b", "--case", "64->64", "--quick", "--mask",
        "global:0.90",
    ]  # fmt: skip
    show_repeats([("one", words), ("two", ["make", "test"])], Output(None))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "repeat one row:" and said[2] == "  two: make test"
    assert shlex.split(said[1].partition(": ")[2]) == words
    show_repeats([("one", words), ("two", words)], Output(None))
    assert capsys.readouterr().out.count("repeat") == 1
    show_repeats([], Output(None))
    assert capsys.readouterr().out == ""


def test_the_command_of_an_op_row_measures_that_row(limited: None, tmp_path: Path, capsys) -> None:
    words = ["bench", "op", "--ops", "sparse_conv2d,avg_pool2d", "--densities", "0.1,0.5"]
    words += ["--backends", "reference", "--rounds", "2", "--size", "64"]
    assert main([*words, "--json", str(tmp_path / "all.json")]) == 0
    said = capsys.readouterr().out
    assert "equal" in said and "spread" in said and longest(said) <= 120
    rows = compare.load_result(tmp_path / "all.json")["rows"]
    assert len(rows) == 3 and all(row["speedup"]["q1"] <= row["speedup"]["q3"] for row in rows)
    for row in rows[1:]:
        assert row["match"]["equal"] == row["exact"] and row["match"]["error"] == row["error"]
        assert main([*row["command"][1:], "--json", str(tmp_path / "one.json")]) == 0
        (again,) = compare.load_result(tmp_path / "one.json")["rows"]
        keys = ("op", "backend", "case", "density_asked", "nnz", "error", "command")
        assert {key: again[key] for key in keys} == {key: row[key] for key in keys}
    assert f"sparse_conv2d reference {SMALL.name}: opentrans bench op" in said
    assert main(["bench", "op", "--case", "9->9"]) == 2
    assert "no case is called '9->9' at 224x224" in capsys.readouterr().err


def test_an_op_line_shows_its_worst_match(capsys) -> None:
    rows = [
        make.op_row(0.1, 1.0, 0.5, match=matched(1e-7, 1e-6)),
        make.op_row(0.5, 1.0, 0.8, match=matched(1e-3, 1e-6), speedup=None, exact=False),
    ]
    options = read(["opentrans", "bench", "op"])
    result = {**make.op(), "rows": rows}
    bench_op.show(result, Output(None), options)
    said = capsys.readouterr().out
    assert "DIFFERS 1.0e-03 > 1.0e-06" in said and "2.0%" in said and "inexact" in said
    assert "--densities 0.1,0.5" in said


def test_every_measured_row_of_a_trunk_gets_its_command(
    script, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    options = read(["opentrans", "bench", "trunk", "--mask", "global:0.90", "--isa", "avx2",
                    "--cpus", "1", "--size", "96", "--peer-envs", "envs"])  # fmt: skip
    result = {**make.trunk(), "torch_cpu_capability": "", "onednn_isa": "", "pinned_cpus": [1]}
    for entry in (result["accelerated"], *result["variants"].values(), *result["peers"].values()):
        entry["match"] = matched(1e-7, 2e-7)
    result["peers"]["onnxruntime"]["note"] = ""
    result["peers"]["openvino"]["skipped"] = True
    layers = importlib.import_module("bench_layers")
    monkeypatch.setattr(layers, "missing_limits", lambda isa, threads: [])
    found = list(bench_trunk.row_commands(result, options))
    names = [name for _, name, _ in found]
    assert names[:4] == ["accelerated", "eager", "compile", "peer onnxruntime"]
    for row, name, words in found:
        if words[0] == "python":
            again = read_by(layers, words, monkeypatch)
            assert again.layer == [name] == [row["name"]]
        else:
            again = read(words)
            assert again.rounds == result["rounds"] and again.cpus == "1" and again.no_layers
        assert (again.mask, again.size, again.threads) == ("global:0.90", 96, 1)
        assert again.isa == "avx2"
    by_name = {name: words for _, name, words in found}
    assert read(by_name["compile"]).variants == "compile"
    peer = read(by_name["peer onnxruntime"])
    assert (peer.peers, peer.variants, peer.peer_envs) == ("onnxruntime", "compile", "envs")
    shown = [name for name, _ in bench_trunk.shown_commands(result, options)]
    assert "layer1.0.conv3" in shown and "layer1.0.conv1" not in shown
    bench_trunk.show(result, Output(None))
    said = capsys.readouterr().out
    assert "4.00x (3.92-4.08)" in said and "equal 1.0e-07" in said and longest(said) <= 120


def test_the_command_of_a_model_row_is_its_setting() -> None:
    options = read(["opentrans", "bench", "model", "--quick", "--batches", "1,4"])
    row = {"part": "trunk", "batch": 4, "height": 64, "width": 96, "threads": 2}
    again = read(bench_model.row_command(options, row))
    assert (again.batches, again.sizes, again.counts, again.rounds) == ("4", "64x96", "2", 3)
    assert again.mask == options.mask and again.arch == options.arch


def test_one_layer_can_be_measured_alone() -> None:
    subject = load_subject("global:0.90", arch="torchvision:resnet18")
    names: list[str] = []
    rows = measure_layers(subject, (64, 64), rounds=1, warmup_s=0, only=["layer1.0.conv2"],
                          on_layer=lambda done, total, name: names.append(name))  # fmt: skip
    assert [row.name for row in rows] == names == ["layer1.0.conv2"]
    made = rows[0].to_dict()
    assert made["match"]["equal"] == made["exact"] is True
    with pytest.raises(OpenTransError, match=r"no masked convolution that .* is called 'x'"):
        measure_layers(subject, (64, 64), only=["x"])


@pytest.mark.parametrize(
    ("name", "given", "row", "key"),
    [
        ("bench_alpha", ["--repeats", "2", "--seed", "3"], "ks", "fits"),
        ("bench_allocation", ["--sparsity", "0.8", "--size", "64"], "macs, strength 0.25", "rule"),
        ("bench_freshness", ["--batch", "2", "--rounds", "5"], None, ""),
        ("bench_masked_optimizer", ["--density", "0.2", "--freeze", "half"], None, ""),
        ("bench_layers", ["--size", "64", "--size-w", "96", "--batch", "2"], "layer1.0", "layer"),
    ],
)
def test_the_command_of_a_script_row_has_the_options_of_its_run(
    name: str, given: list[str], row: str | None, key: str, script, monkeypatch
) -> None:
    module = script(name)
    if hasattr(module, "missing_limits"):
        monkeypatch.setattr(module, "missing_limits", lambda isa, threads: [])
    options = read_by(module, ["python", f"benchmarks/{name}.py", *given], monkeypatch)
    words = module.row_command(options, row) if row else module.row_command(options)
    again = vars(read_by(module, words, monkeypatch))
    wanted = vars(options) | ({key: [row]} if row else {})
    assert again == wanted


def test_a_training_set_is_repeated_by_one_command(script, capsys) -> None:
    module = script("bench_training")
    options = argparse.Namespace(layouts=["contiguous"], mask="none", size=64, batch=1, threads=1,
                                 rounds=3, fail_above=1.03)  # fmt: skip
    row = {
        "variant": "baseline, affine trains, channels_last", "kept_mib": 123.4,
        "kept_baseline_mib": 100.0, "cpu_ms": make.spread(1000.0),
        "time_vs_baseline": make.spread(1.5), "time_vs_frozen_norms": make.spread(1.1),
        "match": matched(1e-6, 2e-6),
    }  # fmt: skip
    rows = [row, row | {"variant": "skip"}]
    module.show({"set": "odd", "names": [], "rows": rows}, options, Output(None))
    said = capsys.readouterr().out
    assert "1.500x (1.470-1.530)" in said and "equal 1.0e-06" in said and longest(said) <= 120
    assert "repeat: python benchmarks/bench_training.py --layouts contiguous --sets odd" in said


def test_gradients_are_held_against_float64(script) -> None:
    module = script("training_gradients")
    from gradskip_nets import small_trunk

    model, x = small_trunk().visual.eval(), torch.randn(1, 3, 64, 64)
    exact = module.gradients(copy.deepcopy(model).double(), x.double())
    assert len(exact) > 10 and 0 < module.gradient_error(model, x, exact) < 1e-3
    name = next(iter(exact))
    wrong = exact | {name: exact[name] * 1.1}
    assert 0.05 < module.gradient_error(model, x, wrong) < 0.2
    model.get_submodule(name).weight.requires_grad_(False)
    assert module.gradient_error(model, x, exact) == float("inf")


def test_optimizer_rows_are_compared_with_float64(script, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("bench_masked_optimizer")
    from gradskip_nets import small_trunk

    def network(arch: str) -> torch.nn.Module:
        torch.manual_seed(0)
        return small_trunk().visual

    monkeypatch.setattr("opentrans_kernels.synthetic.synthetic_rn50", network)
    options = argparse.Namespace(arch="RN50", density=0.3, freeze="half")
    rows = module.subjects("RN50", 0.3, "half")
    found = module.compared(rows, options)
    assert set(found) == set(rows) and all(match["equal"] for match in found.values())
    rows = module.subjects("RN50", 0.3, "half")
    rows["masked loop"]["step"] = lambda: None
    found = module.compared(rows, options)
    assert [name for name, match in found.items() if not match["equal"]] == ["masked loop"]


def test_looking_at_weights_leaves_a_row_that_matches(
    script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    module = script("bench_freshness")
    from gradskip_nets import small_trunk

    monkeypatch.setattr("opentrans_kernels.synthetic.synthetic_rn50", lambda: small_trunk().visual)
    monkeypatch.setattr(module, "chosen_cpus", lambda text, threads: None)
    words = ["--set", "odd", "--batch", "1", "--rounds", "1", "--limit", "1e9", "--size", "64"]
    before = torch.get_num_threads()
    try:
        assert module.main([*words, "--json", str(tmp_path / "run.json")]) == 0
    finally:
        torch.set_num_threads(before)
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert len(rows) == 2 and all(row["match"]["equal"] for row in rows)
    assert all(row["ratio"]["q1"] <= row["ratio"]["q3"] for row in rows)
    assert rows[0]["command"][:2] == ["python", "benchmarks/bench_freshness.py"]
    said = capsys.readouterr().out
    assert said.count("equal ") == 2 and said.count("repeat: ") == 1 and longest(said) <= 120


def test_a_comparison_shows_quartiles_match_and_command(tmp_path: Path, capsys) -> None:
    old, new = make.op(), make.op()
    for row in new["rows"]:
        row |= {
            "match": matched(1e-7, 1e-6),
            "command": ["opentrans", "bench", "op", "--batch", "2"],
        }
    for name, result in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    files = [str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert main(["bench", "compare", *files, "--json", str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr().out
    assert "5.000x (4.900-5.100)" in said and "equal 1.0e-07" in said
    assert "repeat: opentrans bench op --batch 2" in said
    change = json.loads((tmp_path / "out.json").read_text())["changes"][0]
    assert change["base"]["match"] is None and change["new"]["match"]["equal"]
    assert change["new"]["command"][-2:] == ["--batch", "2"] and change["base"]["q1"] > 0
    assert main(["bench", "compare", files[0], files[0]]) == 0, "files from before have no commands"
    assert "repeat" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", sorted(make.ALL))
def test_files_from_before_are_read_and_a_wrong_match_is_refused(kind: str) -> None:
    result = make.ALL[kind]()
    assert schema.check_result(result, "old.json") is result
    rows = {
        "trunk": lambda r: r["variants"]["compile"],
        "alpha": lambda r: r["sides"]["ours xmin_peak"],
        "training": lambda r: r["results"][0]["rows"][0],
    }.get(kind, lambda r: r["rows"][0])(result)
    rows |= {"match": matched(1e-7, 1e-6), "command": ["opentrans"]}
    schema.check_result(result, "new.json")
    for bad in ({"match": {"equal": "yes", "error": 0, "bound": 0}}, {"command": "opentrans"}):
        wrong = copy.deepcopy(rows)
        rows |= bad
        with pytest.raises(OpenTransError, match="no valid"):
            schema.check_result(result, "bad.json")
        rows |= wrong


def test_a_pool_is_chosen_by_its_name() -> None:
    (case,) = ops.build_cases((64, 64), ops=["avg_pool2d"], only=["64 channels, 2x2 pool, 8x8"])
    assert case.name == "64 channels, 2x2 pool, 8x8"
