"""MaskSet: matching by name, transfer, applying, hashing."""

from __future__ import annotations

import pytest
import torch
from mask_cases import Tower, random_masks, wrapped
from torch import nn
from torch.nn.utils import parametrize, prune

from opentrans_kernels.errors import MaskError
from opentrans_kernels.masks import MaskSet, Provenance, load_masks


@pytest.fixture
def tower() -> nn.Module:
    torch.manual_seed(0)
    return Tower()


PREFIXES = ["", "module.", "backbone.", "visual.", "clip_model.visual.", "model.", "image_encoder."]
PREFIXES += ["module.backbone.clip_model.visual."]


@pytest.mark.parametrize("on_model", PREFIXES)
@pytest.mark.parametrize("on_mask", PREFIXES)
def test_prefixes_are_found_in_both_directions(on_mask, on_model, tower):
    masks = random_masks(tower)
    model = wrapped(tower, on_model.rstrip("."))
    match = MaskSet({on_mask + n: m for n, m in masks.items()}).match(model, strict=True)
    assert set(match.masks) == {on_model + n for n in masks}
    assert all(
        match.masks[on_model + n] is m or torch.equal(match.masks[on_model + n], m)
        for n, m in masks.items()
    )
    assert match.mask_names == {on_model + n: on_mask + n for n in masks}
    assert match.unmasked_convs == [on_model + "conv1"]
    if not (on_mask and on_model):
        assert (match.prefix_mask, match.prefix_model) == (on_mask[:-1], on_model[:-1])


def test_shortcut_conv_is_matched_by_name_not_by_index():
    clip, other = Tower(shortcut_index=1), Tower(shortcut_index=0)
    assert isinstance(clip.layer1[0].downsample[1], nn.Conv2d)
    assert isinstance(other.layer1[0].downsample[0], nn.Conv2d)
    match = MaskSet(random_masks(clip)).match(other, strict=True)
    assert match.mask_names["layer1.0.downsample.0"] == "layer1.0.downsample.0"


def test_few_masks_do_not_slip_to_another_block():
    # Blocks 1 and 2 of layer2 are alike: a shifted name would fit as well by shape.
    tower = Tower()
    mask = random_masks(tower)["layer2.1.conv1"]
    match = MaskSet({"layer2.1.conv1": mask}).match(wrapped(tower, "visual"), strict=True)
    assert list(match.masks) == ["visual.layer2.1.conv1"]


def test_a_mask_for_a_missing_block_never_goes_to_another_block_of_equal_shape(tower):
    mask = random_masks(tower)["layer2.1.conv1"]
    for name in ("layer2.7.conv1", "module.layer2.7.conv1"):
        match = MaskSet({name: mask}).match(wrapped(tower, "visual"))
        assert not match.masks and match.unmatched_masks == [name]


def test_two_places_that_fit_are_an_error_naming_both(tower):
    both = nn.ModuleDict({"student": Tower(), "teacher": wrapped(Tower(), "visual")})
    with pytest.raises(MaskError, match=r"2 ways.*student.*teacher\.visual.*get_submodule"):
        MaskSet(random_masks(tower)).match(both)
    named = {f"student.{n}": m for n, m in random_masks(tower).items()}
    assert set(MaskSet(named).match(both, strict=True).masks) == set(named)  # names as they are win
    assert MaskSet(random_masks(tower)).match(both.student, strict=True).complete


def test_masks_of_a_deeper_network_are_refused_with_names(tower):
    masks = random_masks(Tower(blocks=(2, 9)))
    match = MaskSet(masks).match(tower)
    assert not match.complete and len(match.masks) == len(random_masks(tower))
    assert match.unmatched_masks[0] == "layer2.3.conv1" and len(match.unmatched_masks) == 24
    assert "no module 'layer2.3.conv1'" in str(match)
    with pytest.raises(MaskError, match=r"'layer2\.3\.conv1'.*\(\+16 more\).*architecture"):
        MaskSet(masks).match(tower, strict=True)


def test_wrong_shapes_and_other_modules_give_the_reason(tower):
    masks = random_masks(tower)
    masks["layer1.0.conv2"] = torch.ones(3, 3, 1, 1, dtype=torch.bool)
    masks["head"] = torch.ones(8, 24, dtype=torch.bool)
    masks["layer1.0.downsample.1"] = torch.ones(12, 8, 1, 1, dtype=torch.bool)
    match = MaskSet(masks).match(tower)
    assert match.unmatched_masks == ["layer1.0.conv2", "head", "layer1.0.downsample.1"]
    assert "(3, 3, 1, 1)" in match.reasons["layer1.0.conv2"]
    assert "(3, 3, 3, 3)" in match.reasons["layer1.0.conv2"]
    assert "linear layer 'head' has a weight of shape (7, 24)" in match.reasons["head"]
    fits = MaskSet({**masks, "head": torch.ones(7, 24, dtype=torch.bool)}).match(tower)
    assert "head" in fits.masks and len(fits.unmatched_masks) == 2
    assert "BatchNorm2d" in match.reasons["layer1.0.downsample.1"]
    assert "layer1.0.conv2" in match.unmasked_convs
    with pytest.raises(MaskError, match="do not fit"):
        MaskSet(masks).apply_(tower)


def test_masks_of_a_wider_network_name_both_shapes():
    wide = {n: m.repeat(2, 1, 1, 1) for n, m in random_masks(Tower()).items()}
    match = MaskSet(wide).match(wrapped(Tower(), "visual"))
    assert not match.masks and len(match.unmatched_masks) == len(wide)
    assert "weight of shape" in match.reasons["layer1.0.conv1"]  # the prefix was found by name


def test_one_shape_that_fits_elsewhere_does_not_outweigh_the_names(tower):
    wrong = {n: m.repeat(2, 1, 1, 1) for n, m in random_masks(tower).items()}
    wrong["layer1.0.conv2"] = random_masks(tower)["conv2"]  # would fit with layer1.0 taken off
    match = MaskSet(wrong).match(tower)
    assert not match.masks and (match.prefix_mask, match.prefix_model) == ("", "")
    assert "(3, 3, 3, 3)" in match.reasons["layer1.0.conv2"]


def test_nothing_in_common(tower):
    match = MaskSet({"a.b": torch.ones(2, 2, 1, 1, dtype=torch.bool)}).match(tower)
    assert not match.masks and match.unmatched_masks == ["a.b"]


def test_single_conv_without_a_name(tmp_path):
    conv = nn.Conv2d(3, 4, 3)
    prune.random_unstructured(conv, "weight", 0.5)
    torch.save(conv.state_dict(), tmp_path / "c.pth")
    loaded = load_masks(tmp_path / "c.pth")
    assert list(loaded.match(nn.Conv2d(3, 4, 3), strict=True).masks) == [""]
    loaded.save(tmp_path / "packed")
    assert load_masks(tmp_path / "packed").content_hash() == loaded.content_hash()


def test_transfer_and_back(tower):
    original = MaskSet(random_masks(tower), Provenance("memory", notes={"run": "7"}))
    there = original.transfer_to(wrapped(tower, "clip_model.visual"))
    assert all(name.startswith("clip_model.visual.") for name in there.masks)
    back = there.transfer_to(Tower())
    assert back.content_hash() == original.content_hash()
    assert back.source.notes["run"] == "7"


def test_apply_sets_exact_zeros_and_masked_weights_leaves_the_model_alone(tower):
    masks = random_masks(tower)
    before = {n: p.detach().clone() for n, p in tower.named_parameters()}
    weights = MaskSet(masks).masked_weights(tower)
    assert all(torch.equal(p, before[n]) for n, p in tower.named_parameters())
    model = wrapped(tower, "backbone")
    MaskSet(masks).apply_(model)
    for name, mask in masks.items():
        weight = tower.get_submodule(name).weight
        assert torch.equal(weight, before[f"{name}.weight"] * mask)
        assert torch.equal(weight, weights[name])
        assert not torch.signbit(weight[~mask]).any()  # +0, not -0
    assert torch.equal(tower.conv1.weight, before["conv1.weight"])
    found = MaskSet.from_model_zeros(tower)
    assert all(torch.equal(found.masks[n], m) for n, m in masks.items())


def test_apply_changes_nothing_if_a_later_weight_is_not_finite(tower):
    masks = random_masks(tower)
    with torch.no_grad():
        tower.layer2[2].conv3.weight[0, 0] = float("nan")
    before = {n: p.detach().clone() for n, p in tower.named_parameters()}
    with pytest.raises(MaskError, match=r"layer2\.2\.conv3.*NaN.*finite"):
        MaskSet(masks).apply_(tower)
    with pytest.raises(MaskError, match=r"layer2\.2\.conv3.*1 values.*earlier checkpoint"):
        MaskSet.from_model_zeros(tower)
    for name, parameter in tower.named_parameters():
        assert torch.equal(parameter.nan_to_num(9), before[name].nan_to_num(9))


@pytest.mark.parametrize("how", ["prune", "parametrize"])
def test_apply_refuses_computed_weights(how, tower):
    masks = MaskSet(random_masks(tower))
    if how == "prune":
        prune.l1_unstructured(tower.layer1[0].conv1, "weight", 0.5)
    else:
        parametrize.register_parametrization(tower.layer1[0].conv1, "weight", nn.Identity())
    with pytest.raises(MaskError, match=r"layer1\.0\.conv1.*computed.*remove"):
        masks.apply_(tower)


def test_a_large_finite_weight_is_not_called_infinite():
    conv = nn.Conv2d(2, 4, 1)
    with torch.no_grad():
        conv.weight.fill_(3e38)  # the sum overflows, no weight does
    assert MaskSet.from_model_zeros(conv).density() == 1.0


def test_content_hash_sees_names_shapes_and_bits():
    bits = torch.tensor([True, False, True, True, False, False])
    base = MaskSet({"a": bits.view(6, 1, 1, 1)}).content_hash()
    assert base == MaskSet({"a": bits.clone().view(6, 1, 1, 1)}).content_hash()
    assert base != MaskSet({"b": bits.view(6, 1, 1, 1)}).content_hash()
    assert base != MaskSet({"a": bits.view(3, 2, 1, 1)}).content_hash()
    assert base != MaskSet({"a": ~bits.view(6, 1, 1, 1)}).content_hash()
    one, two = bits[:3].view(3, 1, 1, 1), bits[3:].view(3, 1, 1, 1)
    assert (
        MaskSet({"a": one, "b": two}).content_hash() == MaskSet({"b": two, "a": one}).content_hash()
    )


def test_mask_set_refuses_what_is_not_a_mask():
    with pytest.raises(MaskError, match="at least one"):
        MaskSet({})
    with pytest.raises(MaskError, match="from_tensors"):
        MaskSet({"c": torch.ones(2, 2, 1, 1)})
    with pytest.raises(MaskError, match="values other than 0 and 1.*threshold"):
        MaskSet.from_tensors({"c": torch.full((2, 2, 1, 1), 0.5)})
    with pytest.raises(MaskError, match="list, not a tensor"):
        MaskSet.from_tensors({"c": [1, 0]})
    with pytest.raises(MaskError, match="no Conv2d"):
        MaskSet.from_model_zeros(nn.Linear(2, 2))
    masks = MaskSet.from_tensors({"c.weight": torch.tensor([[[[1.0]], [[0.0]]]])})
    assert list(masks.masks) == ["c"] and masks.density() == 0.5
    with pytest.raises(TypeError):
        masks.masks["d"] = masks.masks["c"]
