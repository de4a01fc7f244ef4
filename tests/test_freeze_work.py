"""Training work: against autograd's own operations, published arithmetic, and pairs of norms."""

from __future__ import annotations

import pytest
import torch
from freeze_cases import PUBLISHED_1X1, Chain
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from trunk_models import OpenAITower, Wrapper, small

from opentrans.freeze import freeze_plan, pair_norms, trace_work
from opentrans.freeze.work import owner
from opentrans_kernels.errors import UnsupportedModelError


class CountMacs(TorchDispatchMode):
    """Multiply-adds of everything autograd really runs, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "aten::convolution":
            self.macs += out.numel() * args[1][0].numel()
        elif name == "aten::convolution_backward":
            grad, _, weight = args[:3]
            self.macs += grad.numel() * weight[0].numel() * sum(args[10][:2])
        elif name in ("aten::mm", "aten::bmm"):
            self.macs += args[0].numel() * args[1].shape[-1]
        elif name == "aten::addmm":
            self.macs += args[1].numel() * args[2].shape[-1]
        return out


def executed(model: nn.Module, x: torch.Tensor) -> int:
    with CountMacs() as counter:
        model(x).sum().backward()
    return counter.macs


class Branches(nn.Module):
    """A detached branch, a shared layer used twice, groups, a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.detached = nn.Conv2d(3, 4, 1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x) + self.detached(x).detach()
        with torch.no_grad():
            y = y + self.detached(x)
        y = torch.relu_(self.twice(torch.relu(self.twice(y))))
        rows = self.fc(y.flatten(2).transpose(1, 2))
        return torch.bmm(rows, rows.transpose(1, 2))


CHOICES = {
    "all train": lambda name: False,
    "first": lambda name: name.startswith(("conv1", "a.", "conv0", "bn0")),
    "all but the last": lambda name: not name.startswith(("head", "fc")),
    "every conv2": lambda name: "conv2" in name or "twice" in name,
    "weights, not norms": lambda name: "conv" in name and "bn" not in name,
}


@pytest.mark.parametrize("build", [Chain, Branches, lambda: OpenAITower(4)])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_count_is_what_autograd_runs(build, choice: str) -> None:
    model = build().eval()
    side = 56 if isinstance(model, OpenAITower) else 12
    x = torch.randn(1, 3, side, side)
    work = trace_work(model, (side, side))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not CHOICES[choice](name))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names, "nothing would be compared"
    assert work.training_macs(names) == executed(model, x)
    assert work.training_macs(names) < 3 * work.forward_macs()
    assert not work.failure


def test_tracing_touches_nothing() -> None:
    model = OpenAITower(4).train()
    model.conv1.weight.requires_grad_(False)
    model.conv2.weight.grad = torch.ones_like(model.conv2.weight)
    before = {name: (p, p.requires_grad, p.grad) for name, p in model.named_parameters()}
    trace_work(model, (56, 56))
    assert model.training
    for name, parameter in model.named_parameters():
        assert before[name] == (parameter, parameter.requires_grad, parameter.grad)
        assert parameter.device.type == "cpu"


def test_first_trainable_follows_execution_not_registration() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(4, 4, 1)
            self.first = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))

    model = Reversed()
    plan = freeze_plan(model, rule="prefix:first")
    assert plan.frozen == {"first"}
    report = plan.report(model, (8, 8))
    assert report.is_prefix and report.first_trainable == "last.weight"
    assert report.no_backward == ("first",)
    other = freeze_plan(model, rule="list:last").report(model, (8, 8))
    assert not other.is_prefix and other.first_trainable == "first.weight"


def test_published_set_of_rn50_in_numbers() -> None:
    clip_resnet = pytest.importorskip("open_clip.modified_resnet")
    with torch.device("meta"):
        model = clip_resnet.ModifiedResNet((3, 4, 6, 3), 1024, 32, image_size=512)
    threes = [
        name
        for name, module in model.named_modules()
        if getattr(module, "kernel_size", None) == (3, 3) and name != "layer4.1.conv2"
    ]
    plan = freeze_plan(model, rule="list", layers=[*threes, *PUBLISHED_1X1], input_size=(512, 512))
    report = plan.report(model, (512, 512))
    assert report.frozen_layers == 27 and not report.is_prefix
    assert report.frozen_macs == 19_383_975_936
    conv = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 4)
    frozen = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 4 and n in plan.parameters
    )
    assert (conv, frozen) == (23_474_016, 9_514_848)
    # The paper's rule credits the wgrad of what is frozen and nothing else.
    assert report.published_before - report.published_after == report.frozen_macs
    # Without the batch norms nothing of the stem's gradient falls away.
    bare = freeze_plan(model, rule="list", layers=[*threes, *PUBLISHED_1X1], norms=False)
    coded = bare.report(model, (512, 512))
    assert coded.before_macs - coded.after_macs == report.frozen_macs
    assert round((coded.after_macs - report.after_macs) / 1e9, 2) == 3.02
    assert report.first_trainable == "layer1.0.conv3.weight"


def test_a_model_inside_another_is_found() -> None:
    model = Wrapper(OpenAITower(4))
    work = trace_work(model, (56, 56))
    assert "visual.layer1.0.conv2" in work.layer_macs() and not work.failure
    direct = trace_work(OpenAITower(4), (56, 56))
    assert work.forward_macs() == direct.forward_macs()
    explicit = trace_work(model, inputs=[torch.zeros(1, 3, 56, 56), torch.zeros(1, 4)])
    assert explicit.forward_macs() == direct.forward_macs() + 16


def test_a_head_that_refuses_the_size_is_said() -> None:
    model = OpenAITower(4)
    report = freeze_plan(model, rule="all_3x3").report(model, (64, 64))
    assert "head" in report.unreached
    assert any("forward stopped" in note for note in report.notes)


def test_models_without_images() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(UnsupportedModelError, match=r"Pass example arguments.*inputs="):
        trace_work(model)
    work = trace_work(model, inputs=[torch.zeros(7, 6)])
    assert work.forward_macs() == 7 * (6 * 5 + 5 * 2)
    with pytest.raises(UnsupportedModelError, match=r"input_size=\(height, width\)"):
        trace_work(Chain(), inputs=[torch.zeros(2, 5, 8, 8)])


def test_norms_are_paired_by_tracing() -> None:
    model = OpenAITower(4)
    pairs = pair_norms(model, trace_work(model))
    assert pairs.layer_of["bn2"] == "conv2"
    assert pairs.layer_of["layer2.0.downsample.1"] == "layer2.0.downsample.0"
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(pairs.layer_of) == set(norms) and not pairs.lonely and not pairs.notes
    tv = small()
    traced = pair_norms(tv, trace_work(tv, (64, 64)))
    named = pair_norms(tv)
    assert traced.layer_of == named.layer_of and len(named.layer_of) == 17
    assert "paired by name" in named.notes[0]


def test_a_norm_before_its_convolution_stays_alone() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)
            self.bn2, self.conv2 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))

    model = PreActivation()
    pairs = pair_norms(model, trace_work(model))
    assert pairs.layer_of == {"bn2": "conv1"} and pairs.lonely == ("bn1",)
    assert "bn1" in pairs.notes[0] and "keep training" in pairs.notes[0]
    plan = freeze_plan(model, rule="list:conv1")
    assert plan.modules == {"conv1", "bn2"} and plan.notes == pairs.notes


def test_a_norm_inside_its_convolution() -> None:
    class Conv2d(nn.Conv2d):  # detectron2's wrapper
        def __init__(self, *args, norm: nn.Module) -> None:
            super().__init__(*args, bias=False)
            self.norm = norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(super().forward(x))

    model = nn.Sequential(Conv2d(3, 4, 1, norm=nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1))
    assert pair_norms(model).layer_of == {"0.norm": "0"}
    assert pair_norms(model, trace_work(model)).layer_of == {"0.norm": "0"}


@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        ("layer1.0.conv1.weight", "layer1.0.conv1"),
        ("conv1.weight_orig", "conv1"),
        ("conv1.parametrizations.weight.original0", "conv1"),
        ("weight", ""),
    ],
)
def test_owner(parameter: str, module: str) -> None:
    assert owner(parameter) == module


def test_pruned_and_parametrized_layers_are_attributed() -> None:
    model = Chain()
    plain = trace_work(model, (8, 8))
    prune.l1_unstructured(model.conv1, "weight", amount=0.5)
    nn.utils.parametrizations.weight_norm(model.conv2)
    work = trace_work(model, (8, 8))
    assert work.layer_macs() == plain.layer_macs()
    assert work.pairs == plain.pairs
    names = [name for name, _ in model.named_parameters()]
    assert work.training_macs(names) == plain.training_macs(list(plain.parameters))
    assert model.conv1.weight_orig.requires_grad
