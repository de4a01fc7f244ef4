"""A network pruned on crops by distillation: what trains, what stays zero, what is continued."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from trained_files import Noise, prepare

from opentrans.trained import recipe as recipes
from opentrans.trained.agreement import cosine, f_score, mean_absolute_error
from opentrans.trained.bank import Bank
from opentrans.trained.objective import EdgeMaps, FeatureMaps, Features, Objective
from opentrans.trained.recipe import Recipe, fine_tune, norms_of, prune_on_photographs
from opentrans.trained.resnet_half import ResNetHalf
from opentrans_kernels.errors import CheckpointError, OpenTransError, PlanError
from opentrans_kernels.hed import Hed
from opentrans_kernels.masks import MaskSet

SMALL = ((8, 8), (12, 12))
SCOPE = ["blocks.0.2", "blocks.1.1", "blocks.1.3"]
RECIPE = Recipe(rounds=3, density=0.2, period=2, recovery=6, lr=1e-3, batch=2)


@pytest.fixture
def dense() -> Hed:
    return Hed(SMALL).eval().requires_grad_(False)


@pytest.fixture
def bank(dense: Hed) -> Bank:
    return Bank.build(dense, EdgeMaps(), Noise(16), 5, prepare)


def run(dense: Hed, bank: Bank, folder: Path | None = None, **options: object) -> tuple:
    model = copy.deepcopy(dense)
    masks = prune_on_photographs(
        model, EdgeMaps(), bank, prepare, options.pop("recipe", RECIPE), scope=SCOPE,
        out_dir=folder, **options,
    )  # fmt: skip
    return model, masks


def loss_of(model: nn.Module, bank: Bank) -> float:
    objective = EdgeMaps()
    with torch.no_grad():
        outputs = objective.outputs(model, prepare(bank.images))
        return float(objective.loss(outputs, bank.targets))


def test_a_run_prunes_trains_and_keeps_its_zeros(dense: Hed, bank: Bank, extension: None) -> None:
    seen: list[tuple[str, int, int]] = []
    model, masks = run(dense, bank, on_progress=lambda *at: seen.append(at[:3]))
    assert masks.density() == pytest.approx(0.2, abs=0.01) and set(masks.masks) == set(SCOPE)
    for name, mask in masks.masks.items():
        weight = model.get_submodule(name).weight
        assert not weight[~mask].any() and weight[mask].ne(0).all()
    assert seen[-1] == ("recover", 6, 6) and sum(at[0] == "prune" for at in seen) == 5
    assert len(seen) == RECIPE.steps() == 11
    assert not any(p.requires_grad for p in dense.parameters())
    at_once = copy.deepcopy(dense)
    masks.apply_(at_once)
    assert loss_of(model, bank) < loss_of(at_once, bank), "training brought nothing"
    assert loss_of(dense, bank) < 1e-5, "the dense network is its own answer"
    assert not any("Skip" in type(m).__name__ for m in model.modules())


def test_sparse_and_dense_training_agree(dense: Hed, bank: Bank, extension: None) -> None:
    # Adam's signs turn on roundings of gradients near zero, so a few steps only.
    short = Recipe(rounds=1, density=0.3, period=1, recovery=2, lr=1e-3)
    sparse, masks = run(dense, bank, recipe=short)
    plain, same = run(dense, bank, recipe=Recipe(**{**short.__dict__, "sparse": False}))
    assert masks.content_hash() == same.content_hash()
    for name, tensor in plain.state_dict().items():
        assert torch.allclose(sparse.state_dict()[name], tensor, atol=2e-4), name


@pytest.mark.parametrize("stop", [("prune", 3), ("recover", 4)])
def test_an_interrupted_run_ends_the_same(
    dense: Hed, bank: Bank, tmp_path: Path, stop: tuple[str, int], monkeypatch, extension: None
) -> None:
    monkeypatch.setattr(recipes, "SAVE_EVERY", 2)
    whole, masks = run(dense, bank)

    def interrupt(phase: str, done: int, total: int, loss: float) -> None:
        if (phase, done) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(dense, bank, tmp_path / "run", on_progress=interrupt)
    again, same = run(dense, bank, tmp_path / "run")
    assert same.content_hash() == masks.content_hash()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    finished, _ = run(dense, bank, tmp_path / "run", on_progress=interrupt)
    assert all(torch.equal(a, b) for a, b in zip(finished.parameters(), again.parameters(),
                                                 strict=True))  # fmt: skip


def test_frozen_layers_do_not_train(dense: Hed, bank: Bank, extension: None) -> None:
    masks = MaskSet.from_tensors(
        {name: torch.rand(dense.get_submodule(name).weight.shape) < 0.4 for name in SCOPE}
    )
    for sparse in (True, False):
        model = copy.deepcopy(dense)
        done = fine_tune(
            model, EdgeMaps(), bank, prepare, masks, steps=3, lr=1e-3, frozen=["blocks.1.1"],
            sparse=sparse,
        )  # fmt: skip
        assert done == 3 and not any(p.requires_grad for p in model.parameters())
        pruned = copy.deepcopy(dense)
        masks.apply_(pruned)
        moved = {
            name
            for name, p in model.named_parameters()
            if not torch.equal(p, pruned.get_parameter(name))
        }
        assert "blocks.1.1.weight" not in moved and "blocks.1.3.weight" in moved


@pytest.mark.parametrize("sparse", [True, False])
def test_scales_and_shifts_train_alone(sparse: bool, extension: None) -> None:
    torch.manual_seed(0)
    dense = ResNetHalf(8, (1, 1, 1)).eval().requires_grad_(False)
    for norm in norms_of(dense):
        norm.running_mean.normal_()
        norm.weight.uniform_(0.5, 1.5)
    bank = Bank.build(dense, Features(), Noise(32), 4, prepare)
    convs = [name for name, m in dense.named_modules() if isinstance(m, nn.Conv2d)]
    masks = MaskSet.from_tensors(
        {name: torch.rand(dense.get_submodule(name).weight.shape) < 0.3 for name in convs[1:]}
    )
    pruned, model = copy.deepcopy(dense), copy.deepcopy(dense)
    masks.apply_(pruned)
    done = fine_tune(
        model, Features(), bank, prepare, masks, steps=3, lr=1e-2, affine_only=True, sparse=sparse
    )  # fmt: skip
    assert done == 3 and not any(p.requires_grad for p in model.parameters())
    affine = {id(p) for norm in norms_of(model) for p in norm.parameters()}
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, pruned.get_parameter(name))
        assert same != (id(parameter) in affine), name


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"affine_only": True}, "no norm"),
        ({"frozen": ["blocks", "sides", "fuse"]}, "all is frozen"),
    ],
)
def test_a_run_that_would_train_nothing_is_refused(
    dense: Hed, bank: Bank, options: dict, why: str, extension: None
) -> None:
    masks = MaskSet.from_tensors({SCOPE[0]: torch.rand(8, 8, 3, 3) < 0.4})
    model = copy.deepcopy(dense)
    with pytest.raises(PlanError, match=f"nothing of the network would train: .*{why}"):
        fine_tune(model, EdgeMaps(), bank, prepare, masks, steps=1, lr=1.0, **options)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any("Skip" in type(m).__name__ for m in model.modules())


def test_a_budget_in_seconds_ends_the_training(
    dense: Hed, bank: Bank, tmp_path: Path, extension: None
) -> None:
    masks = MaskSet.from_tensors({SCOPE[0]: torch.rand(8, 8, 3, 3) < 0.4})
    model = copy.deepcopy(dense)
    path = tmp_path / "recovery.pt"
    done = fine_tune(
        model, EdgeMaps(), bank, prepare, masks, steps=10**6, lr=1e-3, seconds=0.2, path=path
    )  # fmt: skip
    assert 0 < done < 10**6
    state = torch.load(path, weights_only=True)
    assert state["steps"] == done, "the last steps were not kept"
    assert all(torch.equal(state["model"][key], now) for key, now in model.state_dict().items())


def test_the_bank_is_read_again_only_for_its_own_network(dense: Hed, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    calls: list[int] = []

    def build(model: nn.Module, count: int = 4) -> Bank:
        calls.clear()
        return Bank.build(
            model, EdgeMaps(), Noise(16), count, prepare, path=path,
            on_crop=lambda done, total: calls.append(done),
        )  # fmt: skip

    first = build(dense)
    assert calls == [1, 2, 3, 4] and first.targets[0].dtype == torch.float16
    assert torch.equal(build(dense).targets[0], first.targets[0]) and not calls
    other = Hed(SMALL)
    build(other)
    assert len(calls) == 4, "other weights, and the old answers were taken"
    build(other, 5)
    assert len(calls) == 5
    path.write_bytes(b"no such file")
    with pytest.raises(CheckpointError, match="Remove it"):
        build(other)


def test_a_bank_beside_a_run_is_not_made_again_for_other_crops(dense: Hed, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    Bank.build(dense, EdgeMaps(), Noise(16), 4, prepare, path=path)
    before = path.read_bytes()
    with pytest.raises(PlanError, match="other crops, or of other weights"):
        Bank.build(dense, EdgeMaps(), Noise(16), 5, prepare, path=path, again=False)
    assert path.read_bytes() == before
    assert len(Bank.build(dense, EdgeMaps(), Noise(16), 4, prepare, path=path, again=False)) == 4


def test_batches_are_passes_in_another_order(bank: Bank) -> None:
    twice = [bank.batch(step, 5)[0] for step in (0, 1, 0)]
    assert torch.equal(twice[0], twice[2]) and not torch.equal(twice[0], twice[1])
    for images in twice:
        assert {i.sum().item() for i in images} == {i.sum().item() for i in bank.images}
    bank.seed = 7
    assert not torch.equal(bank.batch(0, 5)[0], twice[0]), "the seed of a later run is not taken"
    with pytest.raises(OpenTransError, match="as many targets"):
        Bank(bank.images, [bank.targets[0][:2]])


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 4)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu().mean((2, 3))


def test_a_classifier_is_judged_by_features_and_classes() -> None:
    model, objective = Classifier(), Features()
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        same = objective.outputs(model, x)
        other = objective.outputs(Classifier(), x)
    assert float(objective.loss(same, same)) == pytest.approx(0, abs=1e-6)
    numbers = objective.agreement(same, same)
    assert numbers["cosine"] == pytest.approx(1, abs=1e-6) and numbers["top1"] == 1
    assert float(objective.loss(other, same)) > 0
    assert objective.agreement(other, same)["logit_error"] > 0


def test_maps_are_compared_before_they_are_pooled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, objective = ResNetHalf(4, (1, 1, 1)).eval(), FeatureMaps()
    x = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        features, classes, *maps = same = objective.outputs(model, x)
        assert torch.equal(features, model.features(x)) and torch.equal(classes, model(x))
        assert [tuple(m.shape) for m in maps] == [(3, 32, 8, 8), (3, 64, 4, 4)]
        assert float(objective.loss(same, same)) == pytest.approx(0, abs=1e-6)
        # Turned by half a turn the maps are pooled to the same.
        turned = [features, classes, *(m.flip(2, 3) for m in maps)]
        assert float(objective.loss(turned, same)) > 0.01
        none = [features, classes, *map(torch.zeros_like, maps)]
        assert float(objective.loss(none, same)) == pytest.approx(2, abs=1e-4)
    assert objective.agreement(turned, same) == Features().agreement(same[:2], same[:2])
    assert torch.isfinite(objective.loss(same, none)), "a dense map of zeros"

    def build(objective: Objective) -> Bank:
        path = tmp_path / "bank.safetensors"
        return Bank.build(model, objective, Noise(64), 2, prepare, path=path)

    assert [len(build(one).targets) for one in (Features(), FeatureMaps(), Features())] == [2, 4, 2]


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_the_f_score_takes_the_best_threshold(offset: float) -> None:
    reference = torch.zeros(1, 4, 4)
    reference[:, 1] = 0.9
    found = reference * 0.5 + offset
    assert f_score(found, reference) == 1.0
    found[0, 2, 0] = 1.0  # one false alarm: precision 4/5
    assert f_score(found, reference) == pytest.approx(2 * 4 / (5 + 4))
    assert f_score(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)) == 1.0
    assert f_score(torch.zeros(1, 2, 2), torch.ones(1, 2, 2)) == 0.0


def test_mean_error_and_cosine() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert mean_absolute_error(a, torch.zeros(2, 2)) == 0.75
    assert cosine(a, torch.tensor([[2.0, 0.0], [1.0, 0.0]])) == pytest.approx(0.5)


@pytest.mark.parametrize("damage", ["cut", "keys"])
def test_a_damaged_recovery_is_refused(
    dense: Hed, bank: Bank, tmp_path: Path, damage: str, monkeypatch, extension: None
) -> None:
    monkeypatch.setattr(recipes, "SAVE_EVERY", 2)
    run(dense, bank, tmp_path / "run")
    path: Path = tmp_path / "run" / recipes.RECOVERY
    write: dict[str, Callable[[], object]] = {
        "cut": lambda: path.write_bytes(path.read_bytes()[:200]),
        "keys": lambda: torch.save({"steps": 3}, path),
    }
    write[damage]()
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        run(dense, bank, tmp_path / "run")


def test_other_settings_are_refused(
    dense: Hed, bank: Bank, tmp_path: Path, extension: None
) -> None:
    run(dense, bank, tmp_path / "run")
    for change in ({"recovery": 8}, {"recovery_lr": 1e-4}, {"period": 3}):
        with pytest.raises(PlanError, match="other settings"):
            run(dense, bank, tmp_path / "run", recipe=Recipe(**{**RECIPE.__dict__, **change}))
