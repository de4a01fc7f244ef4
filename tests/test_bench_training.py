"""The training benchmark's gate and baselines, and the tables made from its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_results import envelope, spread
from gradskip_nets import small_trunk
from torch import nn

from opentrans_kernels.errors import OpenTransError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import bench_training  # noqa: E402
import training_tables  # noqa: E402
from training_variants import SETS, FrozenNorm, freeze_plainly, freeze_set  # noqa: E402


def row(variant: str, same: float = 1.0, fastest: float = 1.0, kept: float = 50.0) -> dict:
    return {
        "set": "odd",
        "variant": variant,
        "kept_mib": kept,
        "kept_baseline_mib": 60.0,
        "cpu_ms": spread(100.0),
        "baseline": "baseline",
        "time_vs_baseline": spread(fastest),
        "time_vs_same_layout": spread(same),
        "time_vs_frozen_norms": spread(fastest),
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("skip")], []),
        ([row("baseline", 9.0, 9.0, 99.0), row("plain", 9.0, 9.0, 99.0)], []),
        ([row("skip", same=1.1)], ["1.100 of its layout's baseline"]),
        ([row("skip", fastest=1.1)], ["1.100 of the fastest baseline"]),
        # The better layout of ours against the better one of theirs.
        ([row("skip", fastest=1.1), row("skip, channels_last", fastest=0.9)], []),
        ([row("skip, affine trains", fastest=1.1), row("skip", fastest=0.9)],
         ["skip, affine trains: 1.100 of the fastest"]),
        ([row("skip", kept=61.0)], ["keeps 61.0 MiB, its baseline 60.0"]),
    ],
)  # fmt: skip
def test_the_gate(rows: list[dict], said: list[str]) -> None:
    found = bench_training.failures([{"set": "odd", "rows": rows}], 1.03)
    assert len(found) == len(said)
    assert all(part in line for part, line in zip(said, found, strict=True))


def test_freeze_sets_of_the_tower() -> None:
    from opentrans_kernels.synthetic import synthetic_rn50

    tower = synthetic_rn50(image_size=64)
    sizes = [len(freeze_set(tower, name)) for name in SETS]
    assert sizes == [0, 27, 27, 28, 19, 27, 26, 28]
    published = freeze_set(tower, "published")
    threes = [n for n in published if tower.get_submodule(n).kernel_size == (3, 3)]
    assert len(threes) == 18 and "layer4.1.conv2" not in published
    assert set(SETS) == set(training_tables.SETS)


@pytest.mark.parametrize("kind", ["all", "behind frozen", "none"])
def test_the_baselines_compute_the_same_network(kind: str) -> None:
    model = small_trunk().double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    want = model(x)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][::2]
    changed = freeze_plainly(model, names, kind)
    assert torch.allclose(changed(x), want)
    frozen = sum(isinstance(m, FrozenNorm) for m in changed.modules())
    norms = frozen + sum(isinstance(m, nn.BatchNorm2d) for m in changed.modules())
    assert frozen == {"all": norms, "behind frozen": len(names), "none": 0}[kind]
    changed(x).sum().backward()
    assert changed.get_submodule(names[0]).weight.grad is None


def test_a_run_writes_a_result_with_its_origin(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench_training, "choose_cpus", lambda threads: None)
    monkeypatch.setattr(bench_training, "synthetic_rn50", lambda image_size: small_trunk().visual)
    target = tmp_path / "training" / "run.json"
    target.parent.mkdir()
    threads = torch.get_num_threads()
    words = ["--sets", "3x3", "--rounds", "1", "--size", "64", "--batch", "1"]
    words += ["--layouts", "contiguous", "--mask", "none", "--fail-above", "1e9"]
    try:
        assert bench_training.main([*words, "--json", str(target)]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(target.read_text())
    assert result["schema"]["kind"] == "training" and result["complete"]
    assert {"machine", "versions", "source", "canary", "threads", "command"} <= set(result)
    made = training_tables.tables(tmp_path)
    assert "all nineteen 3x3" in made["training.md"]["memory"]
    assert "skip, affine trains" in made["training.md"]["step"]
    assert result["machine"]["cpu"] in made["training.md"]["step"]
    assert made["pruning.md"]["allocation"] == training_tables.EMPTY
    for changes, fix in (
        ({"complete": False}, "was interrupted. Measure it again"),
        (
            {"failed_checks": ["inexact"], "schema": {"kind": "allocation", "version": 2}},
            "failed its checks. Measure it again",
        ),
        ({"schema": {"kind": "trunk", "version": 2}}, "Move it elsewhere"),
    ):
        target.write_text(json.dumps({**result, **changes}))
        with pytest.raises(OpenTransError, match=fix):
            training_tables.tables(tmp_path)
    target.write_text(json.dumps(result | {"failed_checks": ["odd, skip: 1.05 of its baseline"]}))
    assert training_tables.tables(tmp_path)["training.md"] == made["training.md"], (
        "losing rows stay"
    )


def test_tables_of_optimizers_and_allocations(tmp_path: Path) -> None:
    folder = tmp_path / "training"
    folder.mkdir()

    def write(name: str, kind: str, **content: Any) -> None:
        head = {**envelope("trunk"), "schema": {"kind": kind, "version": 2}, "failed_checks": []}
        (folder / name).write_text(json.dumps({**head, **content}))

    numbers = {"state_bytes": 2e6, "index_bytes": 1e6, "cpu_ms": 3.0}
    rows = {"dense fused": {**numbers, "speedup_cpu": spread(1.0)},
            "masked loop": {**numbers, "speedup_cpu": spread(0.9)}}  # fmt: skip
    write("optimizer.json", "masked optimizer", freeze="half", rows=rows)
    shares = dict.fromkeys(("macs_kept", "magnitude_kept", "squares_kept", "least_density"), 0.5)
    write(
        "allocation.json", "allocation", rows=[{"rule": "macs", "speedup": spread(2.0), **shares}]
    )
    made = training_tables.tables(tmp_path)
    assert "| masked loop | half | 2.0 | 1.0 | 3.0 | 0.90x" in made["finetuning.md"]["optimizer"]
    assert made["finetuning.md"]["optimizer"].count("loses") == 1
    assert "| macs | 0.500 | 2.00x" in made["pruning.md"]["allocation"]
