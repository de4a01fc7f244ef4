"""``attach`` and the hooks accelerate the head behind the tower, and leave nothing half done."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

pytest.importorskip("open_clip")

from d2_models import SIZE, Evaluation, MaskFormer, Trainer, segmenter, tower  # noqa: E402

import opentrans.d2.attachment as attachment  # noqa: E402
from opentrans.d2 import attach, attach_from_config  # noqa: E402
from opentrans.d2.config import OpenTransConfig  # noqa: E402
from opentrans.d2.config_nodes import ConfigError  # noqa: E402
from opentrans.d2.training import AccelerateStep  # noqa: E402
from opentrans_kernels import UnsupportedModelError, accelerate_heads, restore  # noqa: E402
from opentrans_kernels.bench.parts import REST  # noqa: E402
from opentrans_kernels.heads.parts import head_parts  # noqa: E402
from opentrans_kernels.plan.subject import accelerated_parts  # noqa: E402

pytestmark = pytest.mark.usefixtures("extension")
FAST = {"accelerate": True, "input_size": SIZE, "measure": False}


@pytest.fixture
def model() -> MaskFormer:
    torch.manual_seed(3)
    return MaskFormer().eval()


def image() -> torch.Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(5))


def is_dense(model: nn.Module, before: dict[str, nn.Module]) -> bool:
    """Whether the very same modules are in place."""
    now = dict(model.named_modules())
    return now.keys() == before.keys() and all(now[n] is m for n, m in before.items())


def test_attach_accelerates_the_head_and_detach_restores_it(model: MaskFormer) -> None:
    attach(model, "global:0.9")
    before = dict(model.named_modules())
    keys = {k: v.shape for k, v in model.state_dict().items()}
    with torch.no_grad():
        dense = model(image())
        done = attach(model, **FAST)
        assert done.heads is not None and len(done.heads.replaced) == len(head_parts(model)) > 2
        assert accelerated_parts(model.backbone)
        assert keys == {k: v.shape for k, v in model.state_dict().items()}
        torch.testing.assert_close(model(image()), dense, rtol=1e-4, atol=1e-5)
        text = str(done)
        assert "2 x encoder layer" in text and "2 x deformable attention" in text
        done.detach()
        assert is_dense(model, before) and done.heads is None and done.report is None
        assert torch.equal(model(image()), dense)
    done.detach()  # nothing left to do


def test_the_head_may_be_left_alone(model: MaskFormer) -> None:
    done = attach(model, "global:0.9", heads=False, **FAST)
    assert done.heads is None and not head_parts(model) and accelerated_parts(model)
    config = {"accelerate": {"enabled": True, "input_size": [64, 64], "measure": False}}
    done.detach()
    assert head_parts_of(config, model)
    config["accelerate"]["heads"] = False
    assert not head_parts_of(config, model)
    with pytest.raises(ConfigError, match=r"ACCELERATE.HEADS must be a bool"):
        OpenTransConfig.from_cfg({"accelerate": {"heads": "yes"}})


def head_parts_of(config: dict[str, object], model: nn.Module) -> int:
    done = attach_from_config(model, OpenTransConfig.from_cfg(config))
    count = len(head_parts(model))
    done.detach()
    return count


def test_a_model_without_a_known_head_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        done = attach(segmenter().eval(), "global:0.9", **FAST)
    assert str(done).count("no part of the head was recognised") == 1
    assert sum("no part of the head" in r.message for r in caplog.records) == 1
    alone = attach(tower().eval(), "global:0.9", **FAST)  # no head, and none is missed
    assert alone.notes == [] and "head" not in str(alone)


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("no memory")


@pytest.mark.parametrize("what", ["accelerate", "accelerate_heads"])
def test_an_error_leaves_neither_tower_nor_head_accelerated(
    what: str, model: MaskFormer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(model.named_modules())
    monkeypatch.setattr(attachment, what, broken)
    with pytest.raises(RuntimeError, match="no memory"):
        attach(model, **FAST)
    assert is_dense(model, before)


def test_what_is_refused_before_anything_changes(model: MaskFormer) -> None:
    before = dict(model.named_modules())
    weights = copy.deepcopy(model.state_dict())
    model.train()
    model.backbone.eval()
    with pytest.raises(UnsupportedModelError, match="heads=False"):
        attach(model, "global:0.9", **FAST)
    assert is_dense(model, before)
    done = attach(model, **FAST | {"accelerate": "auto"})  # type: ignore[arg-type]
    assert done.heads is None and any("training mode" in note for note in done.notes)
    done.detach()
    model.eval()
    accelerate_heads(model)
    with pytest.raises(UnsupportedModelError, match=r"head is accelerated already.*detach\(\)"):
        attach(model, "global:0.9", **FAST)
    assert not any(p for p in accelerated_parts(model.backbone))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    attach(model, heads=False, **FAST)
    restore(model.backbone)


@pytest.mark.parametrize("make", [MaskFormer, segmenter])
def test_evaluations_run_on_the_accelerated_head_and_training_on_its_own(
    make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(4)
    model = make()
    step = AccelerateStep("require", SIZE, measure=False)
    before = dict(model.named_modules())
    seen = []

    def evaluate() -> None:
        seen.append(len(head_parts(model)))

    with caplog.at_level(logging.INFO, "opentrans.d2.training.evaluate"):
        Trainer(model, [step, Evaluation(1, evaluate)]).train(2)
    assert is_dense(model, before) and all(module.training for module in model.modules())
    told = [r.message for r in caplog.records if "head:" in r.message or "the head" in r.message]
    assert len(told) == 1, told
    if make is MaskFormer:
        assert (
            step.heads is not None
            and seen == [len(step.heads.replaced)] * 2
            and seen[0]
            and "2 x encoder layer" in told[0]
        )
    else:
        assert seen == [0, 0] and "no part of the head was recognised" in told[0]


def test_an_example_gives_times_by_part_and_of_the_whole(model: MaskFormer) -> None:
    attach(model, "global:0.9")
    with torch.no_grad():
        dense = model(image())
        done = attach(model, example=image(), **FAST)
        torch.testing.assert_close(model(image()), dense, rtol=1e-4, atol=1e-5)
    assert done.parts is not None
    rows = {name: (slow, fast, what) for name, slow, fast, what in done.parts.rows()}
    assert list(rows)[-2:] == [REST, "the whole"]
    assert {"trunk", "encoder.layers", "head"} <= set(rows)
    assert rows["encoder.layers"][2].endswith("2 x encoder layer") and rows["trunk"][2]
    assert rows["the whole"][2] == rows[REST][2] == ""
    for side in (0, 1):
        times = [row[side] for row in rows.values()]
        assert all(time >= 0 for time in times) and times[-1] > 0
    for times in (done.parts.dense, done.parts.accelerated):
        for values in zip(*times.values(), strict=True):
            assert sum(values[:-1]) == pytest.approx(values[-1]), "parts add up to the whole"
    assert "the whole" in str(done) and "tower alone" not in str(done)
    assert done.heads is not None
    assert len(head_parts(model)) == len(done.heads.replaced), "the fast paths are in place again"
    done.detach()
    assert not accelerated_parts(model)
    plain = attach(model, **FAST)
    assert plain.parts is None and "of the tower alone; attach(example=...)" in str(plain)


def test_an_example_that_does_not_run_leaves_nothing_accelerated(model: MaskFormer) -> None:
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError):
        attach(model, example=torch.zeros(1, 4, 8, 8), **FAST)
    assert is_dense(model, before)
