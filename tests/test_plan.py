"""Plans: what is decided, why, printing, JSON, and refusing another model or mask."""

from __future__ import annotations

import json

import accel_nets as nets
import pytest
import torch
from torch import nn

from opentrans_kernels import MaskSet, Plan, PlanError, UnsupportedModelError, accelerate, make_plan
from opentrans_kernels.plan.reading import KINDS


def test_every_convolution_has_a_row_and_every_unit_a_reason() -> None:
    model = nets.tower()
    before = nets.snapshot(model)
    plan = make_plan(model, nets.random_masks(model), input_size=(64, 96))
    nets.check_unchanged(model, before)
    assert {row.name for row in plan.rows} == set(nets.convs(model))
    assert [u.name for u in plan.units[:4]] == ["conv1", "conv2", "conv3", "layer1.0"]
    text = str(plan)
    for unit in plan.units:
        assert unit.kind in KINDS
        assert unit.reason.startswith(unit.kind) and unit.reason in text
        assert unit.dense_ms is not None and unit.dense_ms > 0
        assert unit.chosen_ms is not None
        if unit.kind == "dense":
            assert unit.chosen_ms == unit.dense_ms
    conv1 = plan.rows[0]
    assert (conv1.h_out, conv1.w_out, conv1.stride) == (32, 48, 2)
    assert conv1.nominal_macs == 3 * 4 * 9 * 32 * 48
    assert conv1.effective_macs == conv1.nnz * 32 * 48
    assert plan.measured and plan.threads == 1 and plan.input_size == (64, 96)
    assert "64x96" in text and "nonzero" in text
    assert plan.totals["numel"] == sum(c.weight.numel() for c in nets.convs(model).values())


def test_prediction_runs_nothing_and_follows_the_density(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a layer was timed")

    monkeypatch.setattr("opentrans_kernels.plan.choose.interleaved_ms", refuse)
    model = nets.tower()
    sparse = make_plan(model, nets.random_masks(model, 0.05), measure=False)
    dense = make_plan(model, nets.random_masks(model, 0.99), measure=False)
    assert {row.kind for row in sparse.rows} == {"sparse"}
    assert not {row.kind for row in dense.rows} & {"sparse"}
    assert "predicted, nothing was run" in str(sparse)
    assert sparse.totals["predicted_ms"] < dense.totals["predicted_ms"]


def test_the_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest form is taken, and dense keeps the layer unless another is 3 % faster."""
    model = nets.tower()
    masks = nets.random_masks(model)
    masks.apply_(model)
    times = {"dense": 1.0, "dense here": 1.0, "winograd": 2.0}

    def clock(calls: dict, *args: object) -> dict[str, list[float]]:
        return {name: [times[name]] for name in calls}

    monkeypatch.setattr("opentrans_kernels.plan.choose.interleaved_ms", clock)
    for compact, sparse, expected in (
        (2.0, 0.5, "sparse"),
        (0.5, 2.0, "compact"),
        (0.98, 0.98, "dense"),
        (2.0, 2.0, "dense"),
    ):
        times.update(compact=compact, sparse=sparse)
        plan = make_plan(model)
        assert {unit.kind for unit in plan.units} == {expected}
        assert plan.kind("layer1.0") == expected
    # Winograd's form is that of the 3x3s of stems alone.
    times.update(compact=2.0, sparse=2.0, winograd=0.9)
    kinds = {unit.name: unit.kind for unit in make_plan(model).units}
    assert kinds["conv2"] == "winograd" and kinds["layer1.0"] == "dense"
    times["winograd"] = 2.0
    # Behind a sparse layer the dense form pays for its input's layout; it does not at the start.
    times.update({"compact": 2.0, "sparse": 0.5, "dense here": 0.4})
    assert {u.kind for u in make_plan(model).units} == {"sparse"}


def test_a_slow_form_is_still_taken_where_the_mask_must_be_applied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = {"dense": 1.0, "dense here": 1.0, "compact": 1.5, "sparse": 2.0, "winograd": 2.0}
    monkeypatch.setattr(
        "opentrans_kernels.plan.choose.interleaved_ms",
        lambda calls, *a: {name: [clock[name]] for name in calls},
    )
    model = nets.tower()
    plan = make_plan(model, nets.random_masks(model))
    assert {unit.kind for unit in plan.units} == {"compact"}
    assert all("mask is not in the weights" in unit.reason for unit in plan.units)


def test_no_zeros_stays_dense_and_says_so() -> None:
    plan = make_plan(nets.tower())
    assert {unit.reason for unit in plan.units} == {"dense: no zeros"}
    assert "Pass the pruning masks" in str(plan)


def test_layers_the_kernels_cannot_run_say_why() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, dilation=(2, 1)),
        nn.Conv2d(8, 8, (1, 3)),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    ).eval()
    for conv in nets.convs(model).values():
        conv.weight.data[torch.rand(conv.weight.shape) < 0.9] = 0
    plan = make_plan(model, input_size=(32, 32), measure=False)
    reasons = {unit.name: unit.reason for unit in plan.units}
    assert plan.kind("0") == plan.kind("1") == "sparse"
    expected = {"2": "dilation (2, 1)", "3": "not square", "4": "circular"}
    for name, words in expected.items():
        assert reasons[name].startswith("dense") and words in reasons[name]


def test_json_round_trip() -> None:
    model = nets.tower()
    plan = make_plan(model, nets.random_masks(model), measure=False)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert str(again) == str(plan) and again.units == plan.units and again.rows == plan.rows
    with pytest.raises(PlanError, match="to_dict"):
        Plan.from_dict({"format_version": 1})
    with pytest.raises(PlanError, match="format version 99"):
        Plan.from_dict({**plan.to_dict(), "format_version": 99})
    record = plan.to_dict()
    record["units"][0]["kind"] = "magic"
    with pytest.raises(PlanError, match="unknown kind"):
        Plan.from_dict(record)


def test_a_plan_is_refused_for_anything_else() -> None:
    model = nets.tower()
    masks = nets.random_masks(model)
    plan = make_plan(model, masks, input_size=(64, 64), measure=False)
    before = nets.snapshot(model)
    with pytest.raises(PlanError, match="other masks"):
        accelerate(model, nets.random_masks(model, seed=9), plan=plan)
    with pytest.raises(PlanError, match="other masks"):
        accelerate(model, plan=plan)
    with pytest.raises(PlanError, match="input_size"):
        accelerate(model, masks, plan=plan, input_size=(32, 32))
    nets.check_unchanged(model, before)
    other = nets.clip_resnet.ModifiedResNet((1, 2, 1, 1), 64, 4, image_size=64, width=8).eval()
    with pytest.raises(PlanError, match="another network"):
        accelerate(other, nets.random_masks(other), plan=plan)


def test_a_plan_made_under_other_conditions_still_applies_with_a_note() -> None:
    model = nets.tower()
    masks = nets.random_masks(model)
    plan = make_plan(model, masks, threads=2, measure=False)
    assert torch.get_num_threads() == 1
    report = accelerate(model, masks, plan=plan, measure=False)
    assert any("threads 2 -> 1" in note for note in report.notes)


def test_hooks_keep_a_layer_dense() -> None:
    model = nets.tower()
    masks = nets.random_masks(model)
    model.layer2[0].conv2.register_forward_hook(lambda *a: None)
    with pytest.raises(UnsupportedModelError, match=r"layer2\.0\.conv2 has hooks"):
        make_plan(model, masks)
    masks.apply_(model)
    plan = make_plan(model, masks, measure=False)
    assert plan.kind("layer2.0") == "dense" and plan.kind("layer1.0") == "sparse"


@pytest.mark.parametrize(
    "options,words",
    [
        ({"input_size": (0, 64)}, "height, width"),
        ({"input_size": 64}, "height, width"),
        ({"threads": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
        ({"device": "cuda"}, "device='cpu'"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make_plan(nets.tower(), measure=False, **options)


def test_masks_may_be_a_dict_or_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = nets.tower()
    masks = nets.random_masks(model)
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    plans = [make_plan(model, m, measure=False) for m in (masks, dict(masks.masks), path)]
    assert len({plan.masks_hash for plan in plans}) == 1
    prefixed = MaskSet({f"module.visual.{n}": m for n, m in masks.masks.items()})
    assert make_plan(model, prefixed, measure=False).masks_hash == plans[0].masks_hash
