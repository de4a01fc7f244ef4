"""Statistics of batch norms, measured on crops: what changes, and what must not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from trained_files import Noise, prepare

from opentrans.gradskip import restore_skipped, skip_frozen
from opentrans.trained.bank import Bank
from opentrans.trained.objective import Features
from opentrans.trained.recipe import Recipe, prune_on_photographs
from opentrans.trained.resnet_half import ResNetHalf
from opentrans.trained.statistics import bank_inputs, batch_norms, centre, recalibrate
from opentrans.trained.subjects import SUBJECTS
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.masks import MaskSet

RECIPE = Recipe(rounds=3, density=0.2, period=2, recovery=3, lr=1e-3, batch=2, statistics=8, fit=4)


@pytest.fixture
def dense() -> ResNetHalf:
    """Odd scales, and the variance of 1 that a file without statistics gives."""
    torch.manual_seed(0)
    model = ResNetHalf(4, (1, 1)).eval().requires_grad_(False)
    for norm in batch_norms(model).values():
        norm.weight.uniform_(0.3, 3)
        norm.bias.normal_()
        norm.running_mean.normal_()
    return model


@pytest.fixture
def bank(dense: ResNetHalf) -> Bank:
    return Bank.build(dense, Features(), Noise(32), 8, prepare)


def masks_of(model: nn.Module) -> MaskSet:
    torch.manual_seed(1)
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:]
    shapes = {n: model.get_submodule(n).weight.shape for n in convs}
    return MaskSet.from_tensors({n: torch.rand(s) < 0.2 for n, s in shapes.items()})


def inputs_of_norms(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        norm.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0].double()}))
        for name, norm in batch_norms(model).items()
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_centre_keeps_the_function_and_stores_what_was_seen(dense: ResNetHalf, bank: Bank) -> None:
    x = prepare(bank.images)
    before = copy.deepcopy(dense).double()
    seen = inputs_of_norms(dense, x)
    centre(dense, [x[:5], x[5:]])
    with torch.no_grad():
        wanted = before(x.double())
        assert torch.allclose(dense.double()(x.double()), wanted, rtol=1e-4, atol=1e-4)
    for name, norm in batch_norms(dense).items():
        assert torch.allclose(norm.running_mean, seen[name].mean((0, 2, 3)), atol=1e-4)
        spread = seen[name].var((0, 2, 3), unbiased=False)
        assert torch.allclose(norm.running_var, spread, rtol=1e-3, atol=1e-6)
        assert norm.weight.std() > 0 and not norm.training


def test_a_channel_that_never_changes_keeps_its_value(dense: ResNetHalf, bank: Bank) -> None:
    dense.conv1.weight[0] = 0
    x = prepare(bank.images)
    with torch.no_grad():
        wanted = dense(x)
        centre(dense, [x])
        assert dense.bn1.running_var[0] > 0 and torch.allclose(dense(x), wanted, atol=1e-3)


@pytest.mark.parametrize("sparse", [False, True])
def test_recalibrate_measures_the_pruned_network(
    dense: ResNetHalf, bank: Bank, sparse: bool, extension: None
) -> None:
    """As one pass in training mode does, whatever kernels the model itself runs on."""
    masks, x = masks_of(dense), prepare(bank.images)
    model, reference = copy.deepcopy(dense), copy.deepcopy(dense)
    masks.apply_(model)
    masks.apply_(reference)
    for norm in batch_norms(reference).values():
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        reference(x)
    if sparse:
        model.requires_grad_(True)
        skip_frozen(model, (), bn="affine", masks=masks)
    others = {n: p.detach().clone() for n, p in model.named_parameters()}
    recalibrate(model, copy.deepcopy(dense), [x])
    if sparse:
        restore_skipped(model)
    for name, norm in batch_norms(reference).items():
        own = model.get_submodule(name)
        assert torch.allclose(own.running_mean, norm.running_mean, atol=1e-5)
        assert torch.allclose(own.running_var, norm.running_var, rtol=1e-5)
        assert own.momentum == 0.1 and not own.training
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        assert torch.allclose(model(x), reference.eval()(x), rtol=1e-3, atol=1e-3)


def test_without_images_or_with_a_norm_nobody_calls(dense: ResNetHalf, bank: Bank) -> None:
    for use in (lambda: centre(dense, []), lambda: recalibrate(dense, copy.deepcopy(dense), [])):
        with pytest.raises(OpenTransError, match="bn1 saw no image"):
            use()
    assert [len(x) for x in bank_inputs(bank, prepare, 5)] == [5]
    assert sum(len(x) for x in bank_inputs(bank, prepare, 100)) == len(bank)


def test_rounds_are_followed_by_a_measurement(bank: Bank, dense: ResNetHalf) -> None:
    assert list(RECIPE.after_rounds()) == [1, 3, 5] and RECIPE.steps() == 8
    means = {}
    for crops in (0, 8):
        model = copy.deepcopy(dense)
        recipe = Recipe(**{**RECIPE.__dict__, "statistics": crops, "fit": 0, "recovery": 0})
        prune_on_photographs(model, Features(), bank, prepare, recipe)
        means[crops] = model.layer2[0].bn3.running_mean
    assert torch.equal(means[0], dense.layer2[0].bn3.running_mean)
    assert not torch.allclose(means[8], means[0], atol=1e-3)


def test_a_stopped_run_continues_to_the_same_numbers(
    dense: ResNetHalf, bank: Bank, tmp_path: Path
) -> None:
    whole, broken = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_on_photographs(whole, Features(), bank, prepare, RECIPE)

    def stop(phase: str, done: int, *_: object) -> None:
        if phase == "prune" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_on_photographs(
            broken, Features(), bank, prepare, RECIPE, out_dir=tmp_path, on_progress=stop
        )
    again = copy.deepcopy(dense)
    prune_on_photographs(again, Features(), bank, prepare, RECIPE, out_dir=tmp_path)
    for (name, one), two in zip(
        whole.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name


def test_which_networks_are_measured(dense: ResNetHalf, bank: Bank) -> None:
    """The edge detector has no batch norm; the classifier's file holds no variances."""
    assert SUBJECTS["hed"].statistics == 0
    assert SUBJECTS["resnet50-half"].statistics > 0
    before = dense.bn1.running_var.clone()
    SUBJECTS["resnet50-half"].ready(dense, bank, prepare)
    assert not torch.equal(dense.bn1.running_var, before)


def test_kept_weights_are_refitted_after_rounds(bank: Bank, dense: ResNetHalf) -> None:
    """Only where few are left; masks stay, and the answers come nearer without a training step."""
    fits = {}
    for density, fit in ((0.3, 0), (0.3, 8), (0.6, 0), (0.6, 8)):
        model = copy.deepcopy(dense)
        recipe = Recipe(1, density, 1, 0, lr=0.0, batch=2, fit=fit)
        masks = prune_on_photographs(model, Features(), bank, prepare, recipe)
        with torch.no_grad():
            outputs = Features().outputs(model, prepare(bank.images))
            apart = float((outputs[0] - bank.targets[0].float()).square().mean())
        weight = model.layer2[0].conv3.weight
        assert torch.equal(weight != 0, masks.masks["layer2.0.conv3"])
        fits[density, fit] = weight.detach(), apart
    assert torch.equal(fits[0.6, 0][0], fits[0.6, 8][0]), "above the limit nothing is refitted"
    assert not torch.equal(fits[0.3, 0][0], fits[0.3, 8][0])
    assert fits[0.3, 8][1] < fits[0.3, 0][1]
