"""Synthetic towers and masks: sane activations, exact counts, repeatable, labelled."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from opentrans_kernels.clip_resnet import ARCHS, ModifiedResNet, arch_of
from opentrans_kernels.errors import MaskError, OpenTransError
from opentrans_kernels.synthetic import (
    MaskSpec,
    is_mask_spec,
    maskable_convs,
    parse_mask_spec,
    synthetic_masks,
    synthetic_rn50,
)

# Of seed 0: what these name must never change.
FIRST_WEIGHTS = [-0.01782582, -0.06131906, 0.0464691]
LAST_BIASES = [0.4170278, -0.03849825, 0.2115114]


@pytest.fixture(scope="module")
def rn50() -> nn.Module:
    return synthetic_rn50()


def stages(model: nn.Module, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        out = [model.stem(torch.randn((1, 3, size, size), generator=generator))]
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            out.append(stage(out[-1]))
    return out


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 1), nn.ReLU(), nn.Conv2d(10, 6, 3))


@pytest.mark.parametrize("size", [96, 224])
def test_activations_stay_finite_and_alive(rn50, size):
    for x in stages(rn50, size):
        assert torch.isfinite(x).all()
        assert 0.1 <= x.std().item() <= 100
        assert 0.05 < (x > 0).float().mean().item() < 0.999  # neither dead nor linear
    assert torch.isfinite(rn50(torch.randn(1, 3, 224, 224))).all() if size == 224 else True


def test_masked_activations_stay_alive(rn50):
    masks = synthetic_masks(rn50, "global:0.90")
    dense = {name: rn50.get_submodule(name).weight.clone() for name in masks.masks}
    try:
        masks.apply_(rn50)
        for x in stages(rn50, 96):
            assert torch.isfinite(x).all() and 0.1 <= x.std().item() <= 100
    finally:
        for name, weight in dense.items():
            rn50.get_submodule(name).weight.copy_(weight)


def test_batch_norms_are_plausible(rn50):
    norms = [m for m in rn50.modules() if isinstance(m, nn.BatchNorm2d)]
    gamma = torch.cat([bn.weight for bn in norms])
    beta = torch.cat([bn.bias for bn in norms])
    var = torch.cat([bn.running_var for bn in norms])
    assert 0.005 < (gamma < 0).float().mean() < 0.1
    assert (beta > 0).any() and (beta < 0).any()
    assert (var > 0).all() and torch.isfinite(var).all()
    assert all(bn.running_mean.abs().max() > 0 for bn in norms)


def test_eval_without_gradients_repeatable_and_global_random_state_untouched(rn50):
    state = torch.get_rng_state()
    again, other = synthetic_rn50(seed=0), synthetic_rn50(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m.training for m in again.modules())
    assert not any(p.requires_grad for p in again.parameters())
    theirs = rn50.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in again.state_dict().items())
    assert not torch.equal(other.conv1.weight, again.conv1.weight)


def test_other_towers_and_sizes():
    wide = synthetic_rn50("RN50x4", image_size=64)
    assert wide.conv1.weight.shape == (40, 3, 3, 3)
    assert wide.attnpool.positional_embedding.shape[0] == 2 * 2 + 1
    x = stages(wide, 64)[-1]
    assert torch.isfinite(x).all() and 0.1 <= x.std().item() <= 100


@pytest.mark.parametrize("arch", ["RN51", "ViT-B-32", "RN50x4-nope", ""])
def test_unknown_arch(arch):
    with pytest.raises(OpenTransError, match="not a CLIP ResNet.*Use one of: .*RN50"):
        synthetic_rn50(arch)


@pytest.mark.parametrize("size", [0, -32, 31, 225])
def test_bad_image_size(size):
    with pytest.raises(OpenTransError, match="multiple of 32.*Use for example 224"):
        synthetic_rn50(image_size=size)


def test_nothing_needs_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert synthetic_rn50(image_size=32).conv1.weight.shape == (32, 3, 3, 3)
    assert synthetic_masks(small_net(), "global:0.5").density() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("arch", list(ARCHS))
def test_towers_are_those_of_open_clip(arch):
    open_clip = pytest.importorskip("open_clip")
    from open_clip.modified_resnet import ModifiedResNet as Theirs

    config = open_clip.get_model_config(arch)
    vision, ours = config["vision_cfg"], arch_of(arch)
    assert arch_of(f"{arch}-quickgelu") == ours
    assert list(ours.layers) == vision["layers"] and ours.width == vision["width"]
    assert (ours.image_size, ours.output_dim) == (vision["image_size"], config["embed_dim"])
    with torch.device("meta"):
        mine = ModifiedResNet(ours.layers, ours.output_dim, ours.image_size, ours.width)
        theirs = Theirs(
            vision["layers"], config["embed_dim"], ours.width * 32 // 64, ours.image_size,
            vision["width"],
        )  # fmt: skip
    # In the same order too: synthetic weights are drawn one after the other.
    assert [n for n, _ in mine.named_modules()] == [n for n, _ in theirs.named_modules()]
    shapes = [[(k, v.shape) for k, v in m.state_dict().items()] for m in (mine, theirs)]
    assert shapes[0] == shapes[1]


def test_the_forward_is_that_of_open_clip():
    theirs = pytest.importorskip("open_clip.modified_resnet").ModifiedResNet
    torch.manual_seed(0)
    mine = ModifiedResNet((1, 2, 1, 1), 16, image_size=64, width=8).eval()
    for parameter in mine.parameters():
        nn.init.normal_(parameter, std=0.3)
    other = theirs([1, 2, 1, 1], 16, 4, image_size=64, width=8).eval()
    other.load_state_dict(mine.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(mine(x), other(x))


def test_the_recipe_gives_the_weights_that_stored_results_refer_to(rn50):
    assert rn50.conv1.weight[0, 0, 0].tolist() == pytest.approx(FIRST_WEIGHTS, rel=1e-5)
    assert rn50.layer4[2].bn3.bias[:3].tolist() == pytest.approx(LAST_BIASES, rel=1e-5)


@pytest.mark.parametrize("text", ["global:0.90", " uniform:0 ", "global:1", "uniform:.5"])
def test_specs_that_parse(text):
    spec = parse_mask_spec(text)
    assert parse_mask_spec(str(spec)) == spec
    assert spec.allocation == text.strip().partition(":")[0]
    assert spec.sparsity == float(text.partition(":")[2])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("global", "ALLOCATION:SPARSITY.*for example global:0.90"),
        ("local:0.9", "one of global, uniform"),
        ("global:90", r"Did you mean global:0\.9\?"),
        ("global:-1", "from 0 to 1, got '-1'"),
        ("global:nan", "from 0 to 1"),
        ("uniform:", "for example uniform:0.90"),
        ("uniform:x", "from 0 to 1, got 'x'"),
    ],
)
def test_specs_that_do_not_parse(text, words):
    with pytest.raises(MaskError, match=words):
        parse_mask_spec(text)


def test_spec_or_file():
    assert is_mask_spec("global:0.90") and is_mask_spec("uniform:abc")
    assert not is_mask_spec("global.pth") and not is_mask_spec("masks/a:b.pth")


def test_global_masks_of_rn50(rn50):
    masks = synthetic_masks(rn50, "global:0.90")
    assert len(masks.masks) == 54 and "conv1" not in masks.masks and "conv2" in masks.masks
    assert masks.numel == 23_473_152
    assert masks.nnz == masks.numel - round(0.9 * masks.numel)
    assert masks.source.synthetic and masks.source.notes["spec"] == "global:0.9"
    assert masks.match(rn50, strict=True).unmasked_convs == ["conv1"]
    density = {name: mask.float().mean().item() for name, mask in masks.masks.items()}
    assert density["layer1.0.conv3"] > 0.4 and density["layer4.2.conv2"] < 0.04  # as trained ones
    dead = sum(int((~m.flatten(1).any(1)).sum()) for m in masks.masks.values())
    assert dead > 100  # lognormal channel scales kill whole channels
    kept = torch.cat([rn50.get_submodule(n).weight[m].abs() for n, m in masks.masks.items()])
    lost = torch.cat([rn50.get_submodule(n).weight[~m].abs() for n, m in masks.masks.items()])
    assert kept.min() >= lost.max()


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 1.0])
def test_exact_counts_even_with_ties(sparsity):
    net = small_net()
    with torch.no_grad():
        net[3].weight.fill_(0.25)
        net[3].weight[0] = -0.25
    for allocation in ("uniform", "global"):
        masks = synthetic_masks(net, MaskSpec(allocation, sparsity))
        assert list(masks.masks) == ["1", "3"]
        assert masks.numel - masks.nnz == round(sparsity * masks.numel)
        if allocation == "uniform":
            for mask in masks.masks.values():
                assert int((~mask).sum()) == round(sparsity * mask.numel())


def test_only_trunk_convs_are_masked():
    net = nn.ModuleDict({"first": nn.Conv2d(3, 2, 1), "body": nn.Conv2d(2, 2, 1)})
    net["attnpool"] = nn.Sequential(nn.Conv2d(2, 2, 1))
    assert list(maskable_convs(net)) == ["body"]
    assert list(maskable_convs(nn.Conv2d(3, 2, 1))) == [""]


def test_models_that_cannot_be_masked():
    with pytest.raises(MaskError, match="no Conv2d"):
        synthetic_masks(nn.Linear(3, 3), "global:0.9")
    net = small_net()
    with torch.no_grad():
        net[1].weight[0, 0] = float("nan")
    with pytest.raises(MaskError, match="conv '1' holds NaN.*Load finite weights"):
        synthetic_masks(net, "global:0.9")
