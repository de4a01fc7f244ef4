"""The CLIP tower and ``attach``, on small models; no detectron2 is needed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

open_clip = pytest.importorskip("open_clip")

from d2_models import SIZE, Backbone, Segmenter, segmenter, tower  # noqa: E402
from open_clip.modified_resnet import ModifiedResNet  # noqa: E402

from opentrans.d2 import attach, attach_from_config, find_tower, pool_positions, unwrap  # noqa: E402
from opentrans.d2.analysis import fvcore_handles  # noqa: E402
from opentrans.d2.config import OpenTransConfig  # noqa: E402
from opentrans.d2.config_nodes import ConfigError  # noqa: E402
from opentrans.d2.tower import ClipTower, resize_positions  # noqa: E402
from opentrans_kernels import (  # noqa: E402
    CheckpointError,
    MaskError,
    PlanError,
    UnsupportedModelError,
)
from opentrans_kernels.masks.names import conv_modules  # noqa: E402
from opentrans_kernels.plan.subject import accelerated_parts  # noqa: E402
from opentrans_kernels.synthetic import synthetic_masks  # noqa: E402
from opentrans_kernels.topology import conv_shapes, find_trunk  # noqa: E402

FC_CLIP = ["stem", "res2", "res3", "res4", "res5", "clip_embedding"]


def clip(side: int = 64) -> ModifiedResNet:
    torch.manual_seed(1)
    made = ModifiedResNet([1, 1, 1, 1], 32, 8, image_size=side, width=16).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bn3.weight" in name:
                parameter.fill_(0.7)
        made.attnpool.positional_embedding.normal_()
    return made


@pytest.fixture
def weights(tmp_path: Path) -> str:
    state = {f"visual.{name}": value for name, value in clip().state_dict().items()}
    torch.save({**state, "logit_scale": torch.ones(())}, tmp_path / "clip.pth")
    return str(tmp_path / "clip.pth")


def narrow(weights: str, **options: object) -> ClipTower:
    shape = {"width": 16, "layers": [1, 1, 1, 1], "output_dim": 32, "input_resolution": 64}
    return ClipTower("RN50", weights, **{**shape, **options}).eval()  # type: ignore[arg-type]


def test_features_have_the_names_channels_and_strides_of_both_systems() -> None:
    made = tower(out_features=[*FC_CLIP, "attn"])
    assert made.feature_shapes() == {
        "stem": (16, 2), "res2": (64, 4), "res3": (128, 8), "res4": (256, 16), "res5": (512, 32),
        "clip_embedding": (32, -1), "attn": (32, 32),
    }  # fmt: skip
    found = made.eval()(torch.randn(2, 3, 96, 64))
    assert {name: tuple(value.shape[1:]) for name, value in found.items()} == {
        "stem": (16, 48, 32), "res2": (64, 24, 16), "res3": (128, 12, 8), "res4": (256, 6, 4),
        "res5": (512, 3, 2), "clip_vis_dense": (512, 3, 2), "attn": (32, 3, 2),
    }  # fmt: skip
    assert tower(out_features=["res5"]).attnpool is None


def test_features_are_those_of_open_clip_from_every_kind_of_file(
    weights: str, tmp_path: Path
) -> None:
    reference = clip()
    image = torch.randn(2, 3, *SIZE)
    expected = reference(image)
    scripted = nn.Module()
    scripted.visual = reference
    torch.jit.trace_module(scripted.visual, {"forward": image}).save(str(tmp_path / "openai.pt"))
    plain = tmp_path / "plain.pth"
    torch.save(reference.state_dict(), plain)
    for file in (weights, str(tmp_path / "openai.pt"), str(plain)):
        made = narrow(file, out_features=["res5", "attn"])
        found = made(image)
        embedding, _ = pool_positions(made.attnpool, found["res5"])
        torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-6)
        assert found["attn"].shape == (2, 32, 2, 2)


@pytest.mark.parametrize("size", [(64, 64), (75, 101), (33, 160)])
def test_any_size_passes_and_the_position_table_is_interpolated(
    weights: str, size: tuple[int, int]
) -> None:
    made = narrow(weights, out_features=["res5", "attn"])
    found = made(torch.randn(1, 3, *size))
    height, width = found["res5"].shape[2:]
    assert found["attn"].shape == (1, 32, height, width)
    table = torch.arange(10.0).repeat(3, 1).T[:10]  # [1 + 9, 3]
    resized = resize_positions(table, (height, width))
    assert resized.shape == (1 + height * width, 3)
    assert torch.equal(resized[0], table[0])
    grid = table[1:].T.reshape(1, 3, 3, 3)
    wanted = nn.functional.interpolate(grid, size=(height, width), mode="bilinear")
    torch.testing.assert_close(resized[1:].T.reshape(1, 3, height, width), wanted)
    assert resize_positions(table, (3, 3)) is table


def test_a_table_of_another_resolution_is_fitted_when_loaded(weights: str) -> None:
    made = narrow(weights, input_resolution=128, out_features=["attn"])
    assert made.attnpool.positional_embedding.shape == (17, 512)
    wanted = resize_positions(clip().attnpool.positional_embedding, (4, 4))
    torch.testing.assert_close(made.attnpool.positional_embedding, wanted)


def test_random_weights_are_never_silent(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("opentrans.d2.tower").setLevel(logging.WARNING)
    narrow("random")
    assert "RANDOM weights" in caplog.text
    pending = narrow("")
    with pytest.raises(CheckpointError, match="MODEL.OPENTRANS.WEIGHTS random"):
        pending(torch.randn(1, 3, *SIZE))
    state = {k: v for k, v in clip().state_dict().items() if "attnpool" not in k}
    part = {k: v for k, v in state.items() if not k.startswith("layer4")}
    pending.load_state_dict(part, strict=False)
    with pytest.raises(CheckpointError, match="no checkpoint with its weights"):
        pending(torch.randn(1, 3, *SIZE))
    old = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    pending.load_state_dict(old, strict=False)
    assert pending.weights == "checkpoint"
    assert pending(torch.randn(1, 3, *SIZE))["res5"].isfinite().all()


def test_weights_that_do_not_fit_are_refused(weights: str) -> None:
    with pytest.raises(CheckpointError, match="Name a weights file"):
        narrow("/nowhere/RN50.pt")
    with pytest.raises(UnsupportedModelError, match="Check MODEL.OPENTRANS.ARCH"):
        narrow(weights, width=32)
    with pytest.raises(CheckpointError, match="Check MODEL.OPENTRANS.ARCH"):
        narrow(weights, layers=[2, 1, 1, 1])
    with pytest.raises(ConfigError, match="RN50x4"):
        ClipTower("ViT-B-32", "random")


def test_a_file_without_attention_pool_gives_no_pooled_features(tmp_path: Path) -> None:
    state = {k: v for k, v in clip().state_dict().items() if "attnpool" not in k}
    torch.save(state, tmp_path / "trunk.pth")
    file = str(tmp_path / "trunk.pth")
    for feature in ("attn", "clip_embedding"):
        with pytest.raises(CheckpointError, match="take them out of MODEL.OPENTRANS.OUT_FEATURES"):
            narrow(file, out_features=["res5", feature])
    assert torch.equal(narrow(file).conv1.weight, state["conv1.weight"])


def test_a_masked_checkpoint_is_folded_into_the_tower() -> None:
    masks = synthetic_masks(clip(), "global:0.5").masks
    state = {k: v for k, v in clip().state_dict().items() if "attnpool" not in k}
    for name, mask in masks.items():
        state[f"{name}.weight_orig"] = state.pop(f"{name}.weight")
        state[f"{name}.weight_mask"] = mask.float()
    made = narrow("random")
    assert not made.load_state_dict(state).unexpected_keys
    for name, mask in masks.items():
        weight = made.get_submodule(name).weight
        assert torch.equal(weight != 0, mask & (state[f"{name}.weight_orig"] != 0))


def test_the_tower_is_found_where_the_systems_have_it() -> None:
    assert find_tower(segmenter()).path == "backbone"
    nested = Segmenter(Backbone())
    assert find_tower(nested).path == "backbone.clip_model.visual"
    assert find_tower(torch.nn.DataParallel(nested)).module is nested.backbone.clip_model.visual
    with_teacher = segmenter()
    with_teacher.vision_clip = tower()
    assert find_tower(with_teacher).path == "backbone"
    assert find_tower(with_teacher, "vision_clip").module is with_teacher.vision_clip
    two = nn.Module()
    two.a, two.b = tower(), tower()
    with pytest.raises(UnsupportedModelError, match=r"'a', 'b'.*MODEL.OPENTRANS.TOWER"):
        find_tower(two)
    with pytest.raises(UnsupportedModelError, match="leave it empty"):
        find_tower(two, "c")


def test_unwrap_sees_through_every_wrapper() -> None:
    model = segmenter()
    assert unwrap(model) is model
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(model)) is model
    assert unwrap(nn.DataParallel(torch.compile(model))) is model  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["flat", "nested"])
@pytest.mark.parametrize("size", [(64, 64), (75, 101)])
def test_attached_model_is_the_masked_dense_one(kind: str, size: tuple[int, int]) -> None:
    torch.manual_seed(2)
    model = (segmenter() if kind == "flat" else Segmenter(Backbone())).eval()
    masks = synthetic_masks(find_tower(model).module, "global:0.9")
    renamed = {f"module.clip.{name}": mask for name, mask in masks.masks.items()}
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        before = model(image)
        attach(model, masks=renamed)
        dense = model(image)
        keys = {k: v.shape for k, v in model.state_dict().items()}
        done = attach(model, freeze="median", accelerate=True, input_size=SIZE, measure=False)
        fast = model(image)
    assert (before - dense).abs().max() > 1e-3
    torch.testing.assert_close(fast, dense, rtol=1e-4, atol=1e-5)
    assert accelerated_parts(model) and done.report is not None and done.plan is not None
    assert keys == {k: v.shape for k, v in model.state_dict().items()}
    assert find_trunk(done.tower.module).blocks
    assert not any(
        p.requires_grad
        for n, p in done.tower.module.named_parameters()
        if n in done.plan.parameters and "opentrans" not in n
    )
    done.detach()
    assert not accelerated_parts(model)
    with torch.no_grad():
        assert torch.equal(model(image), dense)


def test_what_attach_refuses() -> None:
    model = segmenter().eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MaskError, match="use the architecture"):
        attach(model, masks={"layer1.0.conv1": torch.ones(64, 64, 1, 1)}, accelerate=True)
    with pytest.raises(MaskError, match="recipe such as global:0.90"):
        attach(model, masks="no_such_file.pth")
    with pytest.raises(PlanError, match="Did you mean"):
        attach(model, freeze="meadian")
    with pytest.raises(ConfigError, match="auto, require"):
        attach(model, accelerate="always")
    with pytest.raises(UnsupportedModelError, match="model.eval"):
        attach(model.train(), masks="global:0.5", accelerate=True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.head.requires_grad_(False)
    every = [n for n, m in model.backbone.named_modules() if list(m.parameters(recurse=False))]
    with pytest.raises(PlanError, match="[Ee]verything|nothing"):
        attach(model, freeze=every)


def test_a_tower_that_is_frozen_already_is_said_to_gain_nothing() -> None:
    model = segmenter().eval()
    model.backbone.requires_grad_(False)
    done = attach(model, freeze="all_3x3")
    assert any("only inference speed pays" in note for note in done.notes)
    lone = attach(segmenter().double().eval(), accelerate="auto")
    assert lone.report is None and any("runs densely" in note for note in lone.notes)


def test_attach_reads_the_config() -> None:
    model = segmenter().eval()
    options = OpenTransConfig.from_cfg(
        {
            "mask": {"file": "global:0.8"},
            "freeze": {"rule": "all_3x3"},
            "accelerate": {"enabled": True, "input_size": [64, 64], "measure": False},
        }
    )
    done = attach_from_config(model, options)
    assert done.masks is not None and done.masks.density() == pytest.approx(0.2, abs=1e-3)
    assert done.plan is not None and done.report is not None
    assert "masks:" in str(done) and "frozen by rule all_3x3" in str(done)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"mask": {"file": "global:0.8", "at": 3}}, r"MASK.AT=3.*Set it to 0"),
        ({"mask": {"file": "global:0.8", "remove_at": 3}}, r"MASK.REMOVE_AT=3.*Set it to -1"),
        ({"freeze": {"rule": "all_3x3", "at": 3}}, r"FREEZE.AT=3.*Set it to 0"),
        ({"freeze": {"rule": "all_3x3", "skip": True}}, r"FREEZE.SKIP=True.*Set it to False"),
    ],
)
def test_what_only_hooks_can_do_is_refused(options: dict[str, object], fix: str) -> None:
    model = segmenter().eval()
    with pytest.raises(ConfigError, match=fix):
        attach_from_config(model, OpenTransConfig.from_cfg(options))
    assert all(bool((c.weight != 0).all()) for c in conv_modules(model.backbone).values())


@pytest.mark.parametrize("options", [{"masks": "global:0.95"}, {"accelerate": "auto"}])
def test_an_accelerated_tower_is_to_be_detached_first(options: dict[str, str]) -> None:
    model = segmenter().eval()
    done = attach(model, "global:0.9", accelerate=True, input_size=SIZE, measure=False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=r"accelerated already.*Call detach\(\)"):
        attach(model, **options)  # type: ignore[arg-type]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    done.detach()
    attach(model, **options)  # type: ignore[arg-type]


def test_fvcore_counts_the_sparse_layers() -> None:
    handles = fvcore_handles()
    assert {"opentrans_kernels::sparse_conv2d", "opentrans_kernels::sparse_bottleneck"} <= set(
        handles
    )
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis
    model = segmenter().eval()
    convs = conv_modules(model.backbone)
    # Half of every layer: no channel is dead as a whole, so nothing is left out but zeros.
    alive = {
        n: int(m.sum()) for n, m in synthetic_masks(model.backbone, "uniform:0.5").masks.items()
    }
    pixels = {n: s.h_out * s.w_out for n, s in conv_shapes(model.backbone, SIZE).items()}
    numel = {n: conv.weight.numel() for n, conv in convs.items()}

    def count() -> dict[str, int]:
        found = analysis(model, torch.randn(1, 3, *SIZE))
        found.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return dict(found.by_operator())

    head = model.head.weight.numel() * pixels["layer4.0.conv3"]
    assert count()["conv"] == sum(numel[n] * pixels[n] for n in convs) + head
    attach(model, masks="uniform:0.5", accelerate=True, input_size=SIZE, measure=False)
    parts = accelerated_parts(model.backbone)
    sparse = {n for n in convs if any(n == p or n.startswith(f"{p}.") for p in parts)}
    assert len(sparse) > 10, "next to nothing runs sparsely, so the count proves nothing"
    fast = count()
    ours = sum(macs for name, macs in fast.items() if name.startswith("sparse"))
    assert ours == sum(alive[n] * pixels[n] for n in sparse)
    assert fast["conv"] == sum(numel[n] * pixels[n] for n in set(convs) - sparse) + head
