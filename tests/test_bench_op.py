"""Operator benchmark: the real trunk's cases, exactness before speed, interrupts keep rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench_results import spread, timing

from opentrans.cli import build_parser, main
from opentrans_kernels import dispatch, native
from opentrans_kernels.bench import cases, compare, derive, ops, schema
from opentrans_kernels.bench.environment import isa_environment
from opentrans_kernels.bench.linear_ops import LinearCase, linear_cases
from opentrans_kernels.errors import OpenTransError

SMALL = cases.ConvCase(8, 12, 3, 1, 9, 10)
#: Ops on another form of case.
SHAPES = {
    "sparse_bottleneck": cases.BlockCase(8, 4, 2, True, 9, 10),
    "sparse_linear": LinearCase(24, 40, 13),
    "sparse_mlp": LinearCase(24, 24, 13, 40),
}


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process counts as started for one thread, and is not pinned."""
    for name, value in isa_environment("native", 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("opentrans_kernels.bench.timing.pin", lambda cpus: list(cpus))
    monkeypatch.setattr("opentrans_kernels.bench.environment.onednn_isa", lambda: "test")
    monkeypatch.setattr("opentrans_kernels.bench.canary.copy_gbs", lambda **_: 10.0)
    monkeypatch.setattr("opentrans_kernels.bench.cases.representative", lambda _: [SMALL])
    monkeypatch.setattr("opentrans_kernels.bench.ops.representative", lambda _: [SMALL])
    block = cases.BlockCase(8, 4, 2, True, 8, 8)
    monkeypatch.setattr("opentrans_kernels.bench.ops.block_cases", lambda _: [block, block])


@pytest.mark.parametrize("size", [(224, 224), (160, 96)])
def test_the_cases_are_the_convolutions_of_the_real_tower(size: tuple[int, int]) -> None:
    pytest.importorskip("open_clip")
    from opentrans_kernels.synthetic import synthetic_rn50
    from opentrans_kernels.topology import conv_shapes, find_trunk

    model = synthetic_rn50()
    shapes = conv_shapes(model, size)
    real: dict[tuple[int, ...], int] = {}
    for node in find_trunk(model).convs():
        if node.name not in shapes or node.conv.in_channels == 3:
            continue
        shape = shapes[node.name]
        key = (node.conv.in_channels, node.conv.out_channels, node.conv.kernel_size[0],
               node.conv.stride[0], shape.h_in, shape.w_in)  # fmt: skip
        real[key] = real.get(key, 0) + 1
    made = {
        (c.cin, c.cout, c.kernel, c.stride, c.height, c.width): c.count
        for c in cases.conv_cases(size)
    }
    assert made == real and sum(made.values()) == 54
    assert sum(case.count for case in cases.block_cases(size)) == 16


def test_names_kinds_and_sizes_of_cases() -> None:
    case = cases.ConvCase(64, 256, 1, 1, 56, 56)
    assert (case.name, case.kind, case.padding) == ("64->256 k1 56x56", "1x1 expand", 0)
    assert cases.ConvCase(64, 64, 3, 2, 9, 8).out == (5, 4)
    kinds = {one.kind for one in cases.representative(cases.conv_cases())}
    assert kinds == {"3x3", "1x1 expand", "1x1 reduce", "1x1 same"}


def test_no_case_comes_twice() -> None:
    """Two rows of one name could not be compared with those of another run."""
    cases = ops.build_cases((64, 64), ops=("avg_pool2d",))
    names = [case.name for case in cases]
    assert len(names) > 5 and len(names) == len(set(names))


@pytest.mark.parametrize("op", sorted(ops.BUILDERS))
@pytest.mark.parametrize("batch", [1, 2])
def test_every_row_is_exact_and_counted(op: str, batch: int) -> None:
    case = ops.BUILDERS[op](SHAPES.get(op, SMALL), 0.3, batch)
    rows = ops.measure_case(case, rounds=2, warmup_s=0)
    backends = {row["backend"] for row in rows}
    assert "reference" in backends and ("cpu" in backends) == native.load()
    for row in rows:
        assert row["exact"] and row["op"] == op and row["batch"] == batch
        assert row["speedup"]["median"] > 0 and row["ms"] > 0 and row["dense_ms"] > 0
        assert list(schema.problems(row, schema.OP_ROW)) == []
    if op == "sparse_conv2d":
        macs = rows[0]["macs"]
        assert macs["nominal"] == 8 * 12 * 9 * 9 * 10 * batch
        assert macs["effective"] == rows[0]["nnz"] * 90 * batch
        assert macs["effective"] <= macs["executed"]
    if op == "sparse_mlp":
        assert rows[0]["case"] == "24->40->24, 13 tokens" and rows[0]["h_out"] == 13
        assert rows[0]["macs"]["nominal"] == 2 * 24 * 40 * 13 * batch


def test_linear_layers_are_those_of_vision_transformers() -> None:
    layers = [(c.cin, c.cout, c.tokens) for c in linear_cases("sparse_linear")]
    assert layers[0] == (768, 3072, 197) and (1024, 4096, 1601) in layers
    assert [c.name for c in linear_cases("sparse_mlp")] == [
        "768->3072->768, 197 tokens", "1024->4096->1024, 1601 tokens"
    ]  # fmt: skip
    made = list(ops.build_cases(ops=("sparse_linear",), densities=(0.1,), quick=True))
    assert [one.name for one in made] == ["768->3072, 197 tokens"]
    assert "eager" in made[0].dense and made[0].macs["nominal"] == 768 * 3072 * 197
    only = ops.build_cases(
        ops=("sparse_mlp",), densities=(0.1,), only=("768->3072->768, 197 tokens",)
    )
    assert [one.kind for one in only] == ["mlp"]


def test_an_inexact_row_gets_no_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ops.BUILDERS["sparse_conv2d"](SMALL, 0.3, 1)
    case.reference = case.reference * 1.001
    rows = ops.measure_case(case, rounds=1, warmup_s=0)
    # Dense is as far from the shifted reference, so the rule of twice its error still holds it.
    assert all(row["exact"] for row in rows)
    wrong = case.dense
    case = ops.BUILDERS["sparse_conv2d"](SMALL, 0.3, 1)
    case.dense = wrong
    monkeypatch.setattr(
        ops.dispatch.Resolution, "function", lambda self: lambda *_: case.reference.float() * 1.001
    )
    rows = ops.measure_case(case, rounds=1, warmup_s=0)
    assert rows and all(not row["exact"] and row["speedup"] is None for row in rows)
    assert derive.crossovers(rows) == []


def test_the_reference_row_is_held_to_the_operator_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN rounds differently by layout; only PyTorch's own row may use its plain layout's."""
    case = ops.BUILDERS["sparse_conv2d"](SMALL, 0.3, 1)
    off = case.reference * (1 + 1e-5)  # beyond the 1e-6 that is always accepted
    case.plain = lambda: off.float()
    function = dispatch.Resolution.function
    monkeypatch.setattr(ops.dispatch.Resolution, "function", lambda self: lambda *_: off.float())
    rows = {row["backend"]: row for row in ops.measure_case(case, rounds=1, warmup_s=0)}
    assert rows["reference"]["exact"] and rows["reference"]["dense_error"] > 5e-6
    assert set(rows) == {"reference", "cpu"} if native.load() else {"reference"}
    assert not any(row["exact"] for name, row in rows.items() if name != "reference")
    monkeypatch.setattr(ops.dispatch.Resolution, "function", function)
    for op, build in ops.BUILDERS.items():
        case = build(SHAPES.get(op, SMALL), 0.3, 1)
        assert ops.relative_error(case.select(case.plain()), case.reference) < 1e-5


def test_rows_that_do_not_run_say_why() -> None:
    skipped = {one["backend"]: one["reason"] for one in ops.skipped_rows()}
    every = {f"{row.op} {row.backend}" for row in dispatch.TABLE}
    timed = {
        f"{op} {row.backend}" for op in ops.BUILDERS for row in ops.rows_for(op)[0]
    }  # fmt: skip
    assert set(skipped) | timed == every and not set(skipped) & timed
    assert all(len(reason) > 5 for reason in skipped.values())
    assert "bench alpha" in skipped["powerlaw_fit reference"]
    assert "no CPU case is defined for it" not in skipped.values(), "say where it is timed"


def test_the_command_writes_a_valid_result(limited: None, tmp_path: Path, capsys) -> None:
    target = tmp_path / "op.json"
    arguments = ["--quick", "--densities", "0.1,0.9", "--rounds", "1", "--backends", "reference"]
    assert main(["bench", "op", *arguments, "--json", str(target)]) == 0
    result = compare.load_result(target)
    assert result["complete"] and len(result["rows"]) == 4
    assert result["command"][-1] == "op.json"
    said = capsys.readouterr().out
    assert "8->12 k3 9x10" in said and "skipped:" in said


def test_an_interrupt_keeps_the_finished_rows(
    limited: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    real, calls = ops.measure_case, []

    def interrupted(case: ops.Case, **options: object) -> list:
        calls.append(case)
        if len(calls) == 3:
            held = json.loads(target.read_text())
            assert len(held["rows"]) == 2 and not held["complete"], "not on disk before the end"
            raise KeyboardInterrupt
        return real(case, **options)

    target = tmp_path / "op.json"
    monkeypatch.setattr(ops, "measure_case", interrupted)
    arguments = ["--quick", "--densities", "0.1,0.5", "--rounds", "1", "--backends", "reference"]
    assert main(["bench", "op", *arguments, "--json", str(target)]) == 130
    result = compare.load_result(target)
    assert len(result["rows"]) == 2 and not result["complete"]
    assert "what was finished was kept" in capsys.readouterr().err


def test_an_inexact_row_fails_the_command(
    limited: None, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("opentrans_kernels.bench.ops.relative_error", lambda *_: next(errors))
    errors = iter([1e-3, 1e-7, 1e-7, 1e-7] * 10)
    arguments = ["--quick", "--ops", "sparse_conv2d", "--densities", "0.1", "--rounds", "1"]
    assert main(["bench", "op", *arguments, "--backends", "reference"]) == 1
    said = capsys.readouterr()
    assert "is inexact: 1.0e-03" in said.err and "inexact" in said.out


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["--densities", "0.1,2"], "Write for example 0.05,0.1,0.5"),
        (["--densities", "x"], "Write for example"),
        (["--ops", "warp"], "Choose among: sparse_conv2d"),
        (["--backends", "warp"], "Choose among: cpu"),
        (["--cpus", "zero"], "--cpus 0,1"),
        (["--peers", "warp"], "Choose among all"),
        (["--peers", "torch-pruning"], "'torch-pruning' runs whole networks only"),
        (["--peers", "all", "--ops", "max_pool2d"], "only sparse_linear and sparse_mlp are"),
    ],
)
def test_bad_options_are_explained(limited: None, capsys, words: list[str], fix: str) -> None:
    assert main(["bench", "op", *words]) == 2
    assert fix in capsys.readouterr().err


def test_engines_beside_rows_are_timed_skipped_or_told(
    limited: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("opentrans_kernels.bench.linear_ops._NETWORKS", ((24, 40, 13),))
    target = tmp_path / "op.json"
    words = ["--peers", "all", "--peer-envs", "none", "--densities", "0.3", "--rounds", "1"]
    command = ["bench", "op", *words, "--json", str(target), "--quick", "--backends"]
    assert main([*command, "reference"]) == 0
    assert all("peers" not in row for row in compare.load_result(target)["rows"])
    if not native.load():
        return
    assert main([*command, "cpu"]) == 0
    rows = compare.load_result(target)["rows"]
    assert {row["op"] for row in rows} == {"sparse_linear", "sparse_mlp"}
    for row in rows:
        assert list(row["peers"]) == ["onnxruntime", "openvino", "deepsparse"]
        assert "--setup" in row["peers"]["openvino"]["error"]
    assert "density 0.3, against other engines" in capsys.readouterr().out

    def measured(work, reference, names, *, allowed, rounds, **_) -> tuple[dict, bool]:
        assert work.words == ("cpu",) and rounds == 1 and allowed >= 1e-6
        if "->24," in next(asked):
            raise OpenTransError("our worker stopped")
        found = {**timing(2.0), "available": True, "speedup_of_ours": spread(2.0), "ours_ms": 1.0}
        found |= {"max_rel_err": 1e-7, "note": "", "match": None}
        return {"onnxruntime": found}, True

    monkeypatch.setattr("opentrans_kernels.bench.peers.session.measure_peers", measured)
    ops_asked = ["--ops", "sparse_mlp,sparse_linear"]
    asked = iter(["24->40"])
    assert main([*command, "cpu", *ops_asked]) == 130, "an interrupted session ends the command"
    row = compare.load_result(target)["rows"][-1]
    words = row["peers"]["onnxruntime"]["command"]
    again = build_parser().parse_args(words[1:])
    assert (again.peers, again.peer_envs, again.case) == ("onnxruntime", "none", [row["case"]])
    asked = iter(["->24,"] * 9)
    assert main([*command, "cpu", "--ops", "sparse_mlp"]) == 1
    assert "the peers were not timed: our worker stopped" in capsys.readouterr().err


def test_threads_are_left_as_they_were() -> None:
    from opentrans_kernels.bench import canary

    before = torch.get_num_threads()
    reading = canary.look(threads=1, seconds=0.01)
    assert torch.get_num_threads() == before and reading.gflops > 0.1
    assert canary.copy_gbs(threads=1, repeats=1) > 0.1
