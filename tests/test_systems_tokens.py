"""Counts of token reduction: the published tables, and torch's own counter on real models."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opentrans.cli import main
from opentrans.ovs import Segmenter
from opentrans.systems_tokens import VitShape, published, segmenter_macs
from opentrans_kernels.tokens import TokenPlan

#: Published, and reproduced from shapes, in GFLOPs: dense, ours, EViT, ToMe; three settings each.
REPRODUCED = {
    "ADE20K": (658.98, 529.81, 443.84, 309.41, 572.56, 500.62, 351.82, 516.20, 448.65, 321.21),
    "Cityscapes": (995.55, 840.87, 690.94, 529.65, 822.67, 707.20, 506.19, 760.70, 651.47, 448.43),
    "Pascal Context": (
        338.74, 251.20, 201.30, 160.96, 271.66, 260.99, 184.37, 269.75, 236.47, 172.33
    ),
}  # fmt: skip


def test_every_published_row_is_reproduced():
    rows = published()
    assert len(rows) == 39
    assert max(row.error for row in rows) < 0.001
    for table, numbers in REPRODUCED.items():
        own = [row for row in rows if row.table == table]
        assert [row.method for row in own] == [
            "dense", *["ours"] * 3, *["evit"] * 3, *["tome"] * 3, *["act"] * 3
        ]  # fmt: skip
        for row, number in zip(own, numbers, strict=False):
            assert row.reproduced == pytest.approx(number, abs=0.006), row
        assert all("data-dependent" in row.counted for row in own[10:])


def test_three_published_rows_are_encoders_alone():
    alone = [(r.table, r.setting) for r in published() if "no decoder" in r.counted]
    assert alone == [
        ("Cityscapes", "keep 0.9"), ("Cityscapes", "keep 0.8"), ("Pascal Context", "keep 0.9")
    ]  # fmt: skip


def test_the_honest_column_leaves_no_product_out():
    honest = {(row.table, row.setting): row for row in published()}
    assert honest["ADE20K", "-"].honest == pytest.approx(673.61, abs=0.01)
    decoder = honest["ADE20K", "-"].honest - honest["ADE20K", "-"].reproduced
    matched = honest["ADE20K", "merge 20%"]
    assert matched.honest - decoder == pytest.approx(547.86, abs=0.01), "matching counts"
    backbone = honest["Cityscapes", "keep 0.9"]
    assert backbone.honest > backbone.reproduced + 30, "and so does the decoder"
    assert all(row.honest > row.reproduced for row in honest.values())
    ours = honest["ADE20K", "alpha 10, 28x28"]
    assert ours.honest == pytest.approx(455.96, abs=0.01)


PLANS = {
    "dense": None,
    "cluster": TokenPlan(alpha=1, grid=(3, 4), expand=False),
    "cluster, features back": TokenPlan(alpha=1, grid=(3, 4), iters=2),
    "pool": TokenPlan("pool", alpha=2, grid=(3, 4), expand=False),
    "tome": TokenPlan("tome", r=5),
    "evit": TokenPlan("evit", keep=0.5, at=(1,)),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("layers", [0, 2])
def test_counts_agree_with_what_torch_counts(name, layers):
    """Products that run, but for the elementwise work that the counter here adds."""
    shape, plan = VitShape(64, 3, 2, decoder_layers=layers), PLANS[name]
    torch.manual_seed(0)
    model = Segmenter(64, 3, 2, grid=(8, 8), classes=7, decoder_layers=layers).eval()
    if plan is not None:
        model.reduce(plan)
    # The counter does not know the fused attention of CPUs.
    attention = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), attention, FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 96, 128))
    counted = segmenter_macs(shape, (96, 128), 7, plan)
    assert counted == pytest.approx(counter.get_total_flops() / 2, rel=0.05)


def test_counts_of_a_plan_that_does_nothing_are_dense():
    shape = VitShape(64, 3, 2)
    dense = segmenter_macs(shape, (96, 128), 7)
    for plan in (
        TokenPlan(alpha=3, grid=(2, 2)),
        TokenPlan("tome", r=0),
        TokenPlan("evit", keep=1.0),
    ):
        assert segmenter_macs(shape, (96, 128), 7, plan) == dense
    assert segmenter_macs(shape, (90, 120), 7) == dense, "odd sizes are padded"
    assert segmenter_macs(shape, (96, 128), 7, TokenPlan("act")) is None


def test_the_table_on_the_command_line(capsys):
    assert main(["flops", "--table", "tokens", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["table"] == "tokens" and len(result["rows"]) == 39
    assert {"gflops", "reproduced", "counted", "honest", "fps", "miou", "error"} <= set(
        result["rows"][0]
    )
    assert main(["flops", "--table", "tokens"]) == 0
    text = capsys.readouterr().out
    assert "alpha 10, 28x28" in text and "443.84" in text and "455.96" in text
    assert "1001 clusters of 1601 queries" in text
    for words, fix in (
        (["--table", "tokens", "--size", "512"], "Leave --size"),
        (["global:0.9", "--table", "tokens"], "Leave MASK out"),
        (["--table", "tokens", "--system", "han"], "Leave --system or --table out"),
    ):
        assert main(["flops", *words]) == 2
        assert fix in capsys.readouterr().err
