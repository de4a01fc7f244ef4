"""Which of a file's dicts is read, and masks that no reader knows: named, never dropped."""

from __future__ import annotations

import copy

import pytest
import torch
from mask_cases import (
    STATES,
    Tower,
    compressed_state,
    masked_state,
    pruned_state,
    random_masks,
    wrapped,
)
from torch import nn
from torch.nn.utils import parametrize, prune

from opentrans import cli
from opentrans_kernels.bench.subject import load_weights
from opentrans_kernels.errors import CheckpointError, MaskError
from opentrans_kernels.masks import MaskSet, load_masks, make_permanent, read_state_dict
from opentrans_kernels.spectrum import estimate_alpha


@pytest.fixture
def tower() -> nn.Module:
    torch.manual_seed(0)
    return Tower()


@pytest.fixture
def masks(tower) -> dict[str, torch.Tensor]:
    return random_masks(tower)


def test_masks_win_over_dense_weights_beside_them(tower, masks, tmp_path):
    path = tmp_path / "f.pth"
    for name in ("mask", "kept"):  # the second says by its names and shapes what it is
        torch.save({"state_dict": tower.state_dict(), name: masks}, path)
        loaded = load_masks(path)
        assert loaded.content_hash() == MaskSet(masks).content_hash()
        assert loaded.source.notes["taken from entry"] == name
        assert loaded.source.notes["entries passed over"] == "state_dict"
        expected = masked_state(tower, masks)
        state = read_state_dict(path)
        assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_masks_beside_weights_find_them_under_any_prefix_or_are_refused(tower, masks, tmp_path):
    weights = {f"module.{key}": value for key, value in tower.state_dict().items()}
    torch.save({"state_dict": weights, "mask": masks}, tmp_path / "f.pth")
    state = read_state_dict(tmp_path / "f.pth")
    for key, value in masked_state(tower, masks).items():
        assert torch.equal(state[f"module.{key}"], value)
    masks["layer9.0.conv1"] = masks["layer1.0.conv1"]
    torch.save({"state_dict": weights, "mask": masks}, tmp_path / "f.pth")
    with pytest.raises(MaskError, match=r"1 of 22 masks .*fit none of them \(layer9\.0\.conv1\)"):
        read_state_dict(tmp_path / "f.pth")


def test_a_table_of_numbers_beside_weights_is_no_mask(tower, masks, tmp_path):
    state = masked_state(tower, masks)
    torch.save(
        {"model": state, "anchors": {"grid": torch.eye(4, dtype=torch.int64)}}, tmp_path / "f"
    )
    loaded = load_masks(tmp_path / "f")
    assert loaded.source.kind == "dense" and "layer1.0.conv1" in loaded.masks


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("key", ["hooks.7.keep_{}", "pruner.{}.alive", "mask_of_{}"])
def test_masks_of_no_known_kind_beside_whole_weights_are_refused(
    key, dtype, tower, masks, tmp_path
):
    state = dict(tower.state_dict())
    state[key.format("layer1_0_conv2")] = masks["layer1.0.conv2"].to(dtype)
    torch.save(state, tmp_path / "f.pth")
    for read in (load_masks, read_state_dict):
        with pytest.raises(MaskError, match=r"1 entries that look like masks.*layer1_0_conv2"):
            read(tmp_path / "f.pth")


def test_masks_of_channels_beside_whole_weights_are_refused(tower, tmp_path):
    state = dict(tower.state_dict())
    state["layer1.0.conv2.out_mask"] = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    torch.save(state, tmp_path / "f.pth")
    with pytest.raises(MaskError, match=r"layer1\.0\.conv2\.out_mask.*another network"):
        load_masks(tmp_path / "f.pth")


def test_masks_of_no_known_kind_are_a_note_where_the_weights_are_masked(tower, masks, tmp_path):
    state = masked_state(tower, masks)
    state["hooks.keep_first"] = masks["layer1.0.conv2"]
    state["conv1.weight"] = state["conv1.weight"].index_fill(0, torch.tensor([0]), 0)
    state["text.attn_mask"] = torch.ones(4, 4).tril()
    torch.save(state, tmp_path / "f.pth")
    notes = load_masks(tmp_path / "f.pth").source.notes
    assert notes["look like masks, not used"] == "hooks.keep_first, text.attn_mask"


def test_weights_of_a_mask_head_are_no_masks(tower, tmp_path):
    state = dict(tower.state_dict())
    state |= {
        "mask_head.conv.weight": torch.zeros(4, 4, 3, 3),
        "mask_head.norm.bias": torch.zeros(8),
    }
    torch.save(state, tmp_path / "f.pth")
    assert "look like masks, not used" not in load_masks(tmp_path / "f.pth").source.notes


def test_scores_in_place_of_a_mask_are_refused(tower, tmp_path):
    state = dict(tower.state_dict())
    state["layer1.0.conv2.mask_scores"] = torch.randn(3, 3, 3, 3)
    torch.save(state, tmp_path / "f.pth")
    for read in (load_masks, read_state_dict):
        with pytest.raises(MaskError, match=r"mask_scores.*values other than 0 and 1.*threshold"):
            read(tmp_path / "f.pth")


def test_two_masks_of_one_weight_are_refused(tower, masks, tmp_path):
    state = pruned_state(tower, masks)
    state["layer1.0.conv2.weight"] = state["layer1.0.conv2.weight_orig"]
    state["layer1.0.conv2._mask"] = masks["layer1.0.conv2"]
    torch.save(state, tmp_path / "f.pth")
    with pytest.raises(
        MaskError, match=r"two masks for 'layer1\.0\.conv2\.weight'.*weight_mask.*_m"
    ):
        load_masks(tmp_path / "f.pth")


def test_layers_without_a_mask_are_counted_apart(tower, masks, tmp_path):
    few = {name: masks[name] for name in ("layer1.0.conv1", "layer1.0.conv2")}
    state = masked_state(tower, {n: m for n, m in masks.items() if n not in few})
    tower.load_state_dict(state)
    torch.save(pruned_state(tower, few), tmp_path / "f.pth")
    loaded = load_masks(tmp_path / "f.pth")
    assert sorted(loaded.masks) == sorted(few)
    kept = sum(int(m.sum()) for m in masks.values()) + tower.conv1.weight.numel()
    total = sum(m.numel() for m in masks.values()) + tower.conv1.weight.numel()
    notes = loaded.source.notes
    said = notes["kept of all convolutions in the file"]
    assert said == f"{kept} of {total} ({kept / total:.2%})"
    assert notes["convolutions without a mask"].startswith("conv1, ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.update({"c.bitmask": s["c.bitmask"][:1]}),
            "not the mask of a weight of shape",
        ),
        (lambda s: s.update({"c.bitmask": s["c.bitmask"].short()}), "int16"),
        (lambda s: s.update({"c.shape": torch.tensor([2, 3, 3, -3])}), r"\(2, 3, 3, -3\).*damaged"),
        (lambda s: s.update({"c.shape": torch.tensor(4)}), "not the mask of a weight"),
        (
            lambda s: s.update({"c.compressed": s["c.compressed"][1:]}),
            "keeps .* of 54 weights, but",
        ),
        (lambda s: s.update({"c.bitmask": s["c.bitmask"] ^ 1}), "keeps"),
    ],
)
def test_packed_bits_that_do_not_fit_their_values(change, words, tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"c": nn.Conv2d(3, 2, 3, bias=False)})
    mask = torch.rand(2, 3, 3, 3) < 0.3
    state = compressed_state(model, {"c": mask})
    torch.save(state, tmp_path / "f")
    assert torch.equal(load_masks(tmp_path / "f").masks["c"], mask)
    change(state)
    torch.save(state, tmp_path / "f")
    for read in (load_masks, read_state_dict):
        with pytest.raises(MaskError, match=words):
            read(tmp_path / "f")


def test_entry_after_a_colon(tower, masks, tmp_path):
    other = random_masks(tower, seed=7)
    path = tmp_path / "f.pth"
    nets = {"state_dict": masked_state(tower, masks), "state_dict_ema": masked_state(tower, other)}
    torch.save(nets | {"optimizer": {"state": {0: {"exp_avg": torch.zeros(5, 3, 3, 3)}}}}, path)
    with pytest.raises(
        MaskError, match=r"masks 2 times.*state_dict, state_dict_ema.*f\.pth:state_"
    ):
        load_masks(path)
    with pytest.raises(CheckpointError, match="same network 2 times, with different values"):
        read_state_dict(path)
    for entry, expected in (("state_dict", masks), ("state_dict_ema", other)):
        loaded = load_masks(f"{path}:{entry}").masks
        assert all(torch.equal(loaded[n], m) for n, m in expected.items())
        state = read_state_dict(f"{path}:{entry}")
        assert all(torch.equal(state[k], v) for k, v in nets[entry].items())
    with pytest.raises(CheckpointError, match=r"no entry 'ema'.*state_dict, state_dict_ema"):
        load_masks(f"{path}:ema")
    torch.save(nets["state_dict_ema"], f"{path}:state_dict")  # a file of that very name goes first
    assert torch.equal(load_masks(f"{path}:state_dict").masks["conv2"], other["conv2"])


def test_equal_copies_are_no_question(tower, masks, tmp_path):
    state = masked_state(tower, masks)
    torch.save({"model": state, "ema": copy.deepcopy(state)}, tmp_path / "f.pth")
    assert load_masks(tmp_path / "f.pth").source.notes["entries passed over"] == "ema"
    assert len(read_state_dict(tmp_path / "f.pth")) == len(state)


def test_scores_at_the_top_do_not_hide_the_network(tower, tmp_path):
    content = {"best": torch.tensor(0.7), "epoch": torch.tensor(3), "model": tower.state_dict()}
    torch.save(content, tmp_path / "f.pth")
    assert set(read_state_dict(tmp_path / "f.pth")) == set(tower.state_dict())


def test_a_student_beside_its_teacher_is_never_taken_silently(tmp_path, capsys, monkeypatch):
    nets = {}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        nets[name] = Tower().state_dict()
    both = {f"{name}.{key}": value for name, net in nets.items() for key, value in net.items()}
    path = tmp_path / "pair.pth"
    torch.save({"model": both}, path)
    with pytest.raises(CheckpointError, match=r"twice.*student and teacher.*pair\.pth:student"):
        load_weights(Tower(), path)
    monkeypatch.setattr("opentrans_kernels.bench.subject.build_tower", lambda *a, **k: Tower())
    assert cli.main(["alpha", str(path)]) == 2
    assert "pair.pth:student" in capsys.readouterr().err
    assert cli.main(["alpha", f"{path}:teacher"]) == 0
    for name, expected in nets.items():
        for entry in (name, f"model.{name}"):
            net = Tower()
            load_weights(net, f"{path}:{entry}")
            assert all(torch.equal(net.state_dict()[k], v) for k, v in expected.items())


@pytest.mark.parametrize("how", ["prune", "parametrize", "nncf", "buffer"])
def test_alpha_of_a_state_dict_is_that_of_the_dense_or_the_masked_weights(how, tower, masks):
    few = {n: masks[n] for n in ("layer2.0.conv2", "layer2.1.conv2")}
    expected = {k: v for k, v in masked_state(tower, few).items() if v.dim() > 1}
    state = (pruned_state if how == "prune" else STATES[how])(tower, few)
    held = {k: v for k, v in state.items() if v.dim() > 1}
    found = estimate_alpha(held, linear_aspect=None, weights="masked")
    masked = estimate_alpha(expected, linear_aspect=None)
    assert found.alphas() == masked.alphas() and found.weights_seen == "masked"
    assert not any("mask" in row.name or "orig" in row.name for row in found)
    plain = {k: v for k, v in tower.state_dict().items() if v.dim() > 1}
    dense = estimate_alpha(plain, linear_aspect=None)
    found = estimate_alpha(held, linear_aspect=None)
    assert found.alphas() == dense.alphas() != masked.alphas()
    assert found.weights_seen == "dense" and "2 of the weights have masks" in found.notes[0]


def test_masks_match_a_model_compiled_in_parts(tower, masks):
    tower.layer1[0] = wrapped(tower.layer1[0], "_orig_mod")  # the names that torch.compile gives
    match = MaskSet(masks).match(tower, strict=True)
    assert "layer1.0._orig_mod.conv1" in match.masks and len(match.masks) == len(masks)
    assert match.mask_names["layer1.0._orig_mod.conv1"] == "layer1.0.conv1"
    MaskSet(masks).apply_(tower)
    assert torch.equal(tower.layer1[0]._orig_mod.conv1.weight != 0, masks["layer1.0.conv1"])
    inside = MaskSet({n.replace("layer1.0", "layer1.0._orig_mod"): m for n, m in masks.items()})
    assert set(inside.match(Tower(), strict=True).masks) == set(masks)


def test_advice_names_what_computes_the_weight(tower, masks):
    convs = [tower.layer1[0].conv1, tower.layer1[0].conv2, tower.layer1[0].conv3]
    prune.l1_unstructured(convs[0], "weight", 0.5)
    parametrize.register_parametrization(convs[1], "weight", nn.Identity())
    calls = ["prune.remove(", "parametrize.remove_parametrizations(module, 'weight', leave_"]
    for conv, call in zip(convs, calls, strict=False):
        assert f"torch.nn.utils.{call}" in make_permanent(conv)
    namespace = {"torch": torch, "module": convs[1]}
    expected = convs[1].weight.detach().clone()
    exec(make_permanent(convs[1]), namespace)  # the advice itself is carried out
    assert isinstance(convs[1].weight, nn.Parameter) and torch.equal(convs[1].weight, expected)
