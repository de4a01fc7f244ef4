"""The published tables reproduced, and ``opentrans flops``."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from opentrans.cli import main
from opentrans.systems import (
    PAPER_SIZE,
    PRUNABLE,
    SYSTEMS,
    backbone_part,
    density_after,
    head_parts,
    reproduce,
)
from opentrans_kernels import OpenTransError

pytest.importorskip("open_clip")


def test_the_published_table_within_three_per_mille() -> None:
    rows = {row.key: row for row in reproduce(round(0.1 * PRUNABLE), 0.15)}
    assert max(row.worst for row in rows.values()) < 0.003
    got = {key: [round(v, 2) for v in row.macs] for key, row in rows.items()}
    assert got == {
        "han": [268.16, 173.46],
        "fc-clip": [200.05, 105.36],
        "deeplab": [241.42, 146.72],
    }
    parameters = {key: [round(v, 2) for v in row.parameters] for key, row in rows.items()}
    assert parameters == {
        "han": [44.09, 22.93], "fc-clip": [38.97, 17.81], "deeplab": [40.31, 19.15],
    }  # fmt: skip
    assert rows["fc-clip"].honest_parameters[0] == pytest.approx(44.56, abs=5e-3)
    assert density_after() == 2_311_567 / PRUNABLE


def test_the_backbone_constants_are_those_of_the_network() -> None:
    from opentrans.d2.tower import clip_resnet
    from opentrans_kernels.topology.tracing import meta_copy

    model = meta_copy(clip_resnet("RN50"))
    del model.attnpool
    count = {"norm": 0, "pool": 0, "macs": 0}

    def record(module: nn.Module, _: Any, out: torch.Tensor) -> None:
        if isinstance(module, nn.BatchNorm2d):
            count["norm"] += out.numel()
        elif isinstance(module, nn.AvgPool2d):
            count["pool"] += out.numel()
        elif isinstance(module, nn.Conv2d):
            count["macs"] += module.weight.numel() * out.shape[2] * out.shape[3]

    for module in model.modules():
        module.register_forward_hook(record)
    x = model.stem(torch.empty(1, 3, 512, 512, device="meta"))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
    part = backbone_part((512, 512))
    assert part.macs["convs"] == count["macs"] == 28_041_019_392
    assert part.macs["fvcore"] == count["macs"] + 2 * count["norm"]
    assert part.macs["thop"] == count["macs"] + 4 * count["norm"] + count["pool"]
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert (len(weights), sum(weights), sum(weights[1:])) == (55, 23_474_016, PRUNABLE)
    assert part.parameters["fvcore"] == sum(p.numel() for p in model.parameters()) == 23_527_264
    assert backbone_part(PAPER_SIZE).macs["convs"] == 104_058_470_400


def test_the_deeplab_head_is_that_of_its_modules() -> None:
    """ASPP with a 1280-channel projection and the decoder, written out as modules."""
    aspp = [nn.Conv2d(2048, 256, 1, bias=False), nn.Conv2d(1280, 256, 1, bias=False)]
    aspp += [nn.Conv2d(2048, 256, 3, bias=False) for _ in range(3)]
    pooled = nn.Conv2d(2048, 256, 1, bias=False)
    decoder = [nn.Conv2d(i, o, k, bias=False) for i, o, k in ((256, 48, 1), (304, 256, 3), (256, 256, 3))]  # fmt: skip  # noqa: E501
    first, second = head_parts("deeplab", PAPER_SIZE)
    positions = (800 // 16) * (1216 // 16)
    work = sum(c.weight.numel() for c in aspp) * positions + pooled.weight.numel()
    assert first.macs["convs"] == pytest.approx(work, rel=1e-12)
    positions = (800 // 4) * (1216 // 4)
    assert second.macs["convs"] == sum(c.weight.numel() for c in decoder) * positions
    assert second.macs["thop"] == pytest.approx(79.330e9, rel=1e-5)
    assert second.macs["fvcore"] == pytest.approx(79.324e9, rel=1e-5)


def test_a_size_between_multiples_of_32_and_unknown_names_are_refused() -> None:
    with pytest.raises(OpenTransError, match="Use 800x1216"):
        backbone_part((799, 1200))
    with pytest.raises(OpenTransError, match=", ".join(SYSTEMS)):
        head_parts("segformer", (512, 512))
    with pytest.raises(OpenTransError, match="fvcore, thop"):
        head_parts("han", (512, 512))[0].count("convs")


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = main(["flops", *arguments, "--json"])
    out, errors = capsys.readouterr()
    assert code == 0, errors
    return json.loads(out)


def test_a_backbone_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    dense = run_json(capsys, "--system", "deeplab")
    totals = dense["totals"]
    assert totals["nominal"] == totals["effective"] == totals["executed"] == 28_041_019_392
    assert (totals["convolutions"], totals["weights"]) == (55, 23_474_016)
    assert totals["parameters"] == 23_527_264
    assert [part["name"] for part in dense["heads"]] == ["ASPP", "decoder"]
    masked = run_json(capsys, "global:0.9", "--size", "224")
    assert masked["totals"]["nominal"] == 5_367_226_368
    for layer in masked["layers"]:
        pixels = layer["output"][0] * layer["output"][1]
        assert layer["effective_macs"] == layer["nnz"] * pixels
        assert layer["nominal_macs"] == layer["numel"] * pixels
    # Global magnitude pruning keeps more of the work than of the weights.
    assert masked["totals"]["effective"] > 1.3 * masked["totals"]["uniform"]


def test_both_tables_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    paper = run_json(capsys, "--table", "paper")
    assert max(row["worst"] for row in paper["rows"]) < 0.003
    assert paper["kept_weights"] == pytest.approx(2_311_567, abs=20)
    assert paper["kept_macs_share"] > 1.3 * paper["density"]
    training = run_json(capsys, "--table", "training")["rows"]
    for row in training:
        if row["published"] is not None:
            assert row["paper"] == pytest.approx(row["published"], rel=0.003)
    assert training[0]["honest"] == pytest.approx(307.6, abs=0.05)
    assert main(["flops", "--table", "paper"]) == 0
    text = capsys.readouterr().out
    assert "44.1 / 268.2 -> 22.9 / 173.3" in text and "fvcore, thop, fvcore" in text
    for words, fix in (
        (["--system", "han", "--size", "500"], "multiples of 32"),
        (["--system", "han", "--arch", "RN101"], "Leave --arch out"),
        (["--table", "paper", "--arch", "RN50x4"], "Leave --arch out"),
        (["--table", "paper", "--system", "han"], "Leave --system or --table out"),
        (["global:0.9", "--table", "training"], "Leave MASK out"),
    ):
        assert main(["flops", *words]) == 2
        assert fix in capsys.readouterr().err
