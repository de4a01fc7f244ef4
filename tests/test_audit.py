"""The audit counts what brute force counts, with a model and from a mask file alone."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from opentrans_kernels.audit import audit, predicted_rate, predicted_speedup
from opentrans_kernels.audit.network import infer_network
from opentrans_kernels.audit.rows import k_union, live_slices, outside_two_four
from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.topology import conv_shapes, find_trunk, forward_trunk

resnet = pytest.importorskip("torchvision.models.resnet")


def clip_tower(layers: tuple[int, ...] = (1, 2, 1, 1), width: int = 16) -> nn.Module:
    module = pytest.importorskip("open_clip.modified_resnet")
    model = module.ModifiedResNet(list(layers), 16, 4, image_size=64, width=width).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.fill_(1.0)  # the constructor zeroes the last norm of every block
    return model


def torchvision_net(kind: str) -> nn.Module:
    block = resnet.BasicBlock if kind == "basic" else resnet.Bottleneck
    return resnet.ResNet(block, [2, 1, 1, 1], num_classes=2).eval()


def random_masks(
    model: nn.Module, density: float = 0.1, skip: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(m.weight.shape, generator=gen) < density
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and name not in skip
    }


MODELS = {
    "clip": clip_tower,
    "clip-x4-like": lambda: clip_tower((2, 1, 2, 1), 10),
    "basic": lambda: torchvision_net("basic"),
    "bottleneck": lambda: torchvision_net("bottleneck"),
}


@pytest.mark.parametrize("size", [(64, 64), (97, 130), (224, 224)])
@pytest.mark.parametrize("name", MODELS)
def test_sizes_and_macs_are_those_of_a_real_forward(name, size):
    model = MODELS[name]()
    masks = random_masks(model)
    trunk = find_trunk(model)
    model.to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward_trunk(trunk, torch.empty(1, 3, *size, device="meta"))
    alone = audit(masks, input_size=size)
    assert 2 * alone.totals["nominal_macs"] == counter.get_total_flops()
    shapes = conv_shapes(trunk, size)
    assert {r.name: (r.h_out, r.w_out) for r in alone.rows} == {
        n: (s.h_out, s.w_out) for n, s in shapes.items()
    }
    for row in alone.rows:
        assert row.effective_macs == int(masks[row.name].sum()) * shapes[row.name].pixels
        assert row.stride == trunk.conv(row.name).conv.stride[0]
    assert alone.totals["effective_macs"] == sum(r.effective_macs for r in alone.rows)


@pytest.mark.parametrize("name", MODELS)
def test_mask_file_alone_and_with_the_model_agree(name):
    model = MODELS[name]()
    # A 7x7 stem is what tells torchvision's bottlenecks from CLIP's.
    skip = ("layer2.0.conv1",) if name == "bottleneck" else ("conv1",)
    masks = random_masks(model, skip=skip)
    alone, full = audit(masks, input_size=(96, 64)), audit(masks, model, (96, 64))
    assert not alone.constants_known and full.constants_known
    assert [r.name for r in alone.rows] == [r.name for r in full.rows]
    same = ("nnz", "nominal_macs", "effective_macs", "dead", "unread_inputs", "k_union", "engine")
    for a, b in zip(alone.rows, full.rows, strict=True):
        for key in same:
            assert getattr(a, key) == getattr(b, key), (a.name, key)
    (free,) = (r for r in alone.rows if not r.masked)
    assert (free.name, free.density) == (skip[0], 1.0)
    assert any(f"{skip[0]} has no mask" in n for n in alone.notes)


@pytest.mark.parametrize("layers, width, name", [
    ((3, 4, 6, 3), 64, "CLIP RN50"), ((3, 4, 23, 3), 64, "CLIP RN101"),
    ((4, 6, 10, 6), 80, "CLIP RN50x4"), ((1, 1, 1, 1), 16, "CLIP-style ResNet, blocks 1-1-1-1"),
])  # fmt: skip
def test_clip_architectures_are_named(layers, width, name):
    module = pytest.importorskip("open_clip.modified_resnet")
    with torch.device("meta"):
        model = module.ModifiedResNet(list(layers), 16, 4, image_size=64, width=width)
    masks = {
        f"visual.{n}": torch.empty(m.weight.shape, dtype=torch.bool, device="meta")
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }
    network = infer_network(masks, (224, 224))
    assert network.architecture == name
    assert network.stem == ("visual.conv1", "visual.conv2", "visual.conv3")
    assert len(network.blocks) == sum(layers)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvision_architectures_are_named(name):
    with torch.device("meta"):
        model = getattr(resnet, name)()
    masks = {n: torch.empty(m.weight.shape, dtype=torch.bool, device="meta")
             for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}  # fmt: skip
    found = infer_network(masks, (224, 224)).architecture
    assert found.replace("-", "").lower() == name


def small_block_masks() -> dict[str, torch.Tensor]:
    masks = random_masks(clip_tower((1, 1, 1, 1)), 1.0)
    masks["layer2.0.conv1"][:40] = False  # width 32: rows 0..31 and
    masks["layer2.0.conv1"][3:] = True  # ... alive again from 3 on
    masks["layer2.0.conv2"][:, 5:9] = False  # conv1's channels 5..8 are unread
    masks["layer2.0.conv3"][:, :20] = False  # conv2's channels 0..19 are unread
    masks["layer2.0.conv3"][7] = False
    return masks


@pytest.mark.parametrize("with_model", [False, True])
def test_channels_after_the_fixpoint(with_model):
    masks = small_block_masks()
    model = clip_tower((1, 1, 1, 1))
    if with_model:
        model.layer2[0].bn1.bias.data[:3] = torch.tensor([-1.0, -2.0, 3.0])
        model.layer2[0].bn1.running_mean.zero_()
    report = audit(masks, model if with_model else None, (64, 64))
    rows = {r.name: r for r in report.rows}
    one, two, three = (rows[f"layer2.0.conv{i}"] for i in (1, 2, 3))
    assert (one.dead, one.constant, one.unread) == (3, 3, 4)
    # 32 - 3 constant - 4 unread, and the channel of ones for the nonzero constants.
    assert one.ones_channel
    assert (one.width_out.before, one.width_out.after) == (32, 26)
    assert (one.width_out.after_8, one.width_out.after_16) == (32, 32)
    assert two.width_in == one.width_out
    assert (two.unread, two.width_out.after, two.width_out.after_8) == (20, 12, 16)
    assert (three.dead, three.width_out.after, three.unread_inputs) == (1, 64 * 2, 20)
    assert two.unread_inputs == 4
    totals = report.totals
    assert totals["width_before"] - totals["width_after"] == 6 + 20


def test_model_decides_whether_constants_need_ones():
    model = clip_tower((1, 1, 1, 1))
    model.layer2[0].bn1.bias.data[:3] = -1.0
    model.layer2[0].bn1.running_mean.zero_()
    row = {r.name: r for r in audit(small_block_masks(), model, (64, 64)).rows}["layer2.0.conv1"]
    assert not row.ones_channel and row.width_out.after == 25


@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (64, 16, 1, 1), (70, 9, 1, 1), (1, 1, 3, 3)])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
def test_structure_counts_against_loops(shape, density):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < density
    cout, cin, kh, kw = shape
    outside = 0
    for o in range(cout):
        for tap in range(kh * kw):
            line = mask[o].reshape(cin, -1)[:, tap].tolist()
            outside += sum(max(0, sum(line[i : i + 4]) - 2) for i in range(0, cin, 4))
    assert outside_two_four(mask) == outside
    columns = cin * kh * kw
    for group, share in k_union(mask).items():
        parts = [mask[i : i + group].reshape(-1, columns).any(0) for i in range(0, cout, group)]
        assert share == pytest.approx(sum(int(p.sum()) for p in parts) / (columns * len(parts)))


def test_live_slices_of_crowded_channels():
    mask = torch.zeros(130, 128, 3, 3, dtype=torch.bool)
    rows, columns = torch.randperm(130)[:64], torch.randperm(128)[:60]
    mask[rows[:, None], columns] = True
    assert live_slices(mask) == pytest.approx(9 / (9 * 3 * 2)), "one piece of 3 x 2 per tap"
    mask[:, :, 1, 1] = True
    assert live_slices(mask) == pytest.approx((8 + 6) / 54)
    assert live_slices(mask[:, :, :1, :1]) is None
    assert live_slices(torch.zeros(5, 7, 3, 3, dtype=torch.bool)) == 0


def test_prediction_follows_the_measurements():
    """Speed-ups measured with synthetic masks on RN50, per FLOP density, within 10 %."""
    for density, measured in ((0.271, 2.35), (0.152, 3.6), (0.1, 4.4), (0.085, 5.17), (0.05, 6.55)):
        assert predicted_rate(density) / density == pytest.approx(measured, rel=0.1)
    for kernel in (1, 3):
        speeds = [predicted_speedup(kernel, d / 200) for d in range(201)]
        assert speeds == sorted(speeds, reverse=True)
        assert speeds[-1] < 1 < speeds[100]
    assert predicted_speedup(3, 0.6) < predicted_speedup(1, 0.6)  # 3x3s lose earlier


def test_layers_that_would_lose_are_predicted_dense():
    model = clip_tower()
    masks = {name: torch.ones_like(mask) for name, mask in random_masks(model).items()}
    report = audit(masks, input_size=(64, 64))
    assert {r.engine for r in report.rows} == {"dense"}
    assert report.totals["predicted_speedup"] == report.totals["predicted_speedup_flops"] == 1.0
    assert report.totals["sparse_layers"] == 0
    sparse = audit(random_masks(model, 0.05), input_size=(64, 64))
    assert {r.engine for r in sparse.rows} == {"sparse"}
    assert sparse.totals["predicted_speedup"] > 5


def test_all_zero_masks_are_legal():
    masks = {n: torch.zeros_like(m) for n, m in random_masks(clip_tower()).items()}
    report = audit(masks, input_size=(64, 64))
    assert report.totals["nnz"] == report.totals["effective_macs"] == 0
    assert json.loads(json.dumps(report.to_dict()))["totals"]["nnz"] == 0
    assert "0.00%" in str(report)


def test_report_as_text_and_json():
    model = clip_tower()
    report = audit(random_masks(model), model, (64, 96))
    text = str(report)
    for row in report.rows:
        assert text.count(f"\n{row.name} ") == 1
    assert "64x96" in text and "a prediction, not a measurement" in text
    assert max(map(len, text.splitlines()[:-8])) < 160
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["rows"]) == len(report.rows)
    assert data["rows"][5]["width_out"]["before"] == report.rows[5].cout
    assert data["rows"][5]["k_union"]["32"] == report.rows[5].k_union[32]
    assert data["input_size"] == [64, 96]


def test_without_masks_the_models_zeros_count():
    model = clip_tower()
    model.layer1[0].conv2.weight.data[:, 1::2] = 0
    report = audit(None, model, (64, 64))
    rows = {r.name: r for r in report.rows}
    assert rows["layer1.0.conv2"].density == 0.5
    assert rows["layer1.0.conv1"].unread == 8
    with pytest.raises(MaskError, match="masks, a model whose zeros are the mask, or both"):
        audit(None)


def test_names_are_matched_through_prefixes_and_leftovers_noted():
    model = clip_tower()
    masks = {f"module.visual.{n}": m for n, m in random_masks(model).items()}
    masks["module.visual.layer9.0.conv1"] = torch.ones(3, 3, 1, 1, dtype=torch.bool)
    wrapper = nn.Module()
    wrapper.visual = model
    report = audit(MaskSet(masks), wrapper, (64, 64))
    assert all(r.masked and r.name.startswith("visual.") for r in report.rows)
    assert any("layer9.0.conv1" in note for note in report.notes)
    with pytest.raises(MaskError, match="Masks are matched by module name"):
        audit({"nothing.fits": torch.ones(3, 3, 1, 1, dtype=torch.bool)}, model)


def test_masks_outside_the_trunk_are_said():
    masks = random_masks(clip_tower())
    masks["sem_seg_head.conv"] = torch.ones(4, 4, 3, 3, dtype=torch.bool)
    masks["attnpool.q_proj"] = torch.ones(4, 4, dtype=torch.bool)
    report = audit(masks, input_size=(64, 64))
    assert not {"sem_seg_head.conv", "attnpool.q_proj"} & {r.name for r in report.rows}
    assert any("2 masks outside the trunk are not audited" in n for n in report.notes)


def test_missing_masks_are_filled_in_from_the_neighbours():
    model = clip_tower()
    skip = ("conv1", "layer2.0.downsample.0", "layer2.1.conv2", "layer3.0.conv1")
    report = audit(random_masks(model, skip=skip), input_size=(64, 64))
    rows = {r.name: r for r in report.rows}
    for name in skip:
        assert not rows[name].masked
        assert (rows[name].cout, rows[name].cin) == tuple(
            model.get_submodule(name).weight.shape[:2]
        )
        assert any(name in n and "no mask" in n for n in report.notes)


def drop(masks: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {n: m for n, m in masks.items() if not n.startswith(prefixes)}


@pytest.mark.parametrize("change, message", [
    (lambda m: {"a.b": torch.ones(2, 2, 1, 1)}, "no name looks like layer1.0.conv1"),
    (lambda m: drop(m, "layer2.0"), "layer2.1 is there but the block before it is not"),
    (lambda m: drop(m, "conv"), "CLIP and torchvision layouts look the same"),
    (lambda m: {**m, "layer2.0.conv2": torch.ones(9, 32, 3, 3)}, r"layer2.0.conv3 has shape"),
    (lambda m: drop(m, "layer4.0.conv"), "layer4.0.conv1 has no mask.*fix its shape"),
])  # fmt: skip
def test_what_cannot_be_inferred_is_an_error_that_asks_for_the_model(change, message):
    with pytest.raises(MaskError, match=rf"{message}.*audit\(masks, model\)"):
        audit(change(random_masks(clip_tower())))


def test_too_small_an_image():
    with pytest.raises(MaskError, match=r"8x8 is too small.*at least 32x32"):
        audit(random_masks(clip_tower()), input_size=(8, 8))


def test_rn50_is_audited_in_under_two_seconds():
    model = clip_tower((3, 4, 6, 3), 64)
    masks = MaskSet(random_masks(model))
    for arguments in ((masks,), (masks, model)):
        start = time.process_time()
        report = audit(*arguments)
        assert time.process_time() - start < 2
        assert report.totals["layers"] == 55
        assert report.totals["nominal_macs"] == pytest.approx(5.37e9, rel=2e-3)


def test_what_is_not_audited_is_told_once_for_every_reason() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, (3, 1)), nn.Conv2d(8, 8, 1),
    ).eval()  # fmt: skip
    masks = {"0": torch.ones(8, 3, 3, 3), "4": torch.ones(8, 8, 1, 1)}
    report = audit(masks, model, (32, 32))
    assert [row.name for row in report.rows] == ["0", "4"]
    told = [note for note in report.notes if "not audited" in note]
    assert told == ["3 convolutions (1 .. 3) are not audited: grouped or not square"]
    del model[2:4]
    masks["2"] = masks.pop("4")
    assert "1 is not audited: grouped or not square" in audit(masks, model, (32, 32)).notes
