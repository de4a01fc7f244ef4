"""Masks that empty whole layers: legal, exact, and said in plan, report and audit."""

from __future__ import annotations

import logging

import accel_nets as nets
import pytest
import torch
from torch import nn

from opentrans import cli
from opentrans_kernels import MaskSet, accelerate, make_plan
from opentrans_kernels.audit import audit
from opentrans_kernels.topology import find_trunk
from opentrans_kernels.topology.collapse import collapse_of

CUT = "output no longer depends on the input"


def emptied(model: nn.Module, *names: str, density: float = 0.6) -> MaskSet:
    masks = dict(nets.random_masks(model, density).masks)
    return MaskSet.from_tensors({n: m & (n not in names) for n, m in masks.items()})


def notes_of(model: nn.Module, masks: MaskSet) -> list[str]:
    return collapse_of(find_trunk(model), lambda name: masks.masks[name]).notes()


def constant(model: nn.Module) -> bool:
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = model(x)
    return torch.equal(out[0], out[1])


@pytest.mark.parametrize(
    "names,cut,branches",
    [
        ((), None, 0),
        (("conv2",), "conv2", 0),
        (("conv1",), "conv1", 0),
        (("layer2.0.conv2",), None, 1),
        (("layer2.0.conv3", "layer3.0.conv1"), None, 2),
        (("layer2.0.downsample.0",), None, 0),
        (("layer2.0.downsample.0", "layer2.0.conv3"), "layer2.0", 1),
        (("layer4.0.downsample.0", "layer4.0.conv1"), "layer4.0", 1),
    ],
)
def test_what_is_said_is_what_the_network_does(names, cut, branches) -> None:  # type: ignore[no-untyped-def]
    model = nets.tower()
    masks = emptied(model, *names)
    notes = notes_of(model, masks)
    text = "\n".join(notes)
    if not names:
        assert notes == []
    else:
        are = "is" if len(names) == 1 else "are"
        assert f"{len(names)} of 19 layers {are} entirely zero" in text
        assert all(name in text for name in names)
    assert (CUT in text) == (cut is not None) == constant(nets.masked(model, masks))
    if cut is not None:
        assert f"nothing of the image passes {cut}," in text
    assert ("residual branches" in text) == (branches > 0 and cut is None)
    report = accelerate(model, masks, measure=False)
    assert constant(model) == (cut is not None)
    assert all(note in report.notes and note in report.plan.notes for note in notes)
    assert all(str(report).count(note) == 1 for note in notes)


def test_a_cut_without_an_empty_layer() -> None:
    """Live rows of one layer meet only empty columns of the next."""
    model = nets.tower()
    masks = {name: mask.clone() for name, mask in emptied(model).masks.items()}
    masks["conv1"][1:] = False
    masks["conv2"][:, :1] = False
    found = MaskSet.from_tensors(masks)
    notes = notes_of(model, found)
    assert len(notes) == 1 and f"{CUT}: nothing of the image passes conv2" in notes[0]
    assert constant(nets.masked(model, found))


def test_plan_and_log_warn(caplog: pytest.LogCaptureFixture) -> None:
    model = nets.tower()
    masks = emptied(model, "conv2")
    assert CUT in str(make_plan(model, masks, measure=False))
    with caplog.at_level(logging.WARNING):
        accelerate(model, masks, measure=False)
    assert CUT in caplog.text and "1 of 19 layers is entirely zero (conv2)" in caplog.text


def test_where_the_order_of_layers_is_not_known_the_network_is_asked() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    masks = {"0": torch.ones(4, 3, 3, 3), "2": torch.zeros(4, 4, 3, 3)}
    report = accelerate(model, masks, input_size=(12, 12), measure=False)
    assert any(CUT in note and "two random images" in note for note in report.notes)

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) + self.two(x)

    masks = {"one": torch.ones(4, 3, 3, 3), "two": torch.zeros(4, 3, 3, 3)}
    report = accelerate(Beside().eval(), masks, input_size=(12, 12), measure=False)
    assert any("1 of 2 layers is entirely zero (two)" in note for note in report.notes)
    assert not any(CUT in note for note in report.notes)


@pytest.mark.parametrize("with_model", [True, False])
def test_the_audit_and_inspect_say_it(with_model, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    model = nets.tower()
    masks = emptied(model, "layer2.0.downsample.0", "layer2.0.conv3")
    report = audit(masks, model if with_model else None, input_size=(64, 64))
    assert any(f"{CUT}: nothing of the image passes layer2.0" in note for note in report.notes)
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    assert cli.main(["inspect", str(path), "--size", "64"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert CUT in text and "2 of 19 layers are entirely zero" in text
