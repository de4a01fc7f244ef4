"""What is added to a module before or after gradient skipping: called, or refused by name."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from gradskip_nets import conv_names, gradients, small_trunk
from test_gradskip import compare, plain_twin
from torch import nn

from opentrans.gradskip import restore_skipped, skip_frozen
from opentrans_kernels.errors import UnsupportedModelError

X = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def doubled(module: nn.Module) -> None:
    """Set a forward on the instance that gives twice what the class would."""

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 2 * type(self).forward(self, x)

    module.forward = types.MethodType(forward, module)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("visual.conv1", "visual.conv1"), ("visual.bn2", "visual.conv2"),
        ("visual.act3", "visual.conv3"), ("visual.layer2.0.conv2", "visual.layer2.0"),
        ("visual.layer1.0.bn3", "visual.layer1.0"), ("visual.layer3.0", "visual.layer3.0"),
    ],
)  # fmt: skip
def test_a_forward_set_on_an_instance_is_called(path: str, part: str) -> None:
    model = small_trunk().double()
    doubled(model.get_submodule(path))
    names = conv_names(model)[::2]
    twin = plain_twin(model, names, "frozen")
    doubled(twin.get_submodule(path))  # a copy's would call the module it was copied from
    report = skip_frozen(model, names, bn="frozen")
    told = report.untouched.get(part) or next(note for note in report.notes if part in note)
    assert "forward of its own" in told or "Bottleneck.forward computes something else" in told
    g = torch.randn_like(twin(X))
    plain = gradients(twin, X, g)
    # The norms of a block that is not taken as one train on.
    compare({n: v for n, v in gradients(model, X, g).items() if n in plain}, plain, tolerance=1e-7)


HOOKS: tuple[Callable[[nn.Module], object], ...] = (
    lambda m: m.register_forward_hook(lambda *_: None),
    lambda m: m.register_forward_pre_hook(lambda *_: None),
    lambda m: m.register_full_backward_hook(lambda *_: None),
    doubled,
)


@pytest.mark.parametrize("add", HOOKS)
@pytest.mark.parametrize("path", ["visual.bn1", "visual.act2", "visual.layer2.0.conv2"])
def test_what_is_added_afterwards_is_refused_until_it_goes(path: str, add: Callable) -> None:
    model = small_trunk().double()
    names = conv_names(model)[::2]
    expected = plain_twin(model, names, "frozen")(X)
    skip_frozen(model, names, bn="frozen")
    module = model.get_submodule(path)
    handle = add(module)
    with pytest.raises(UnsupportedModelError, match=rf"{path} has .*restore_skipped\(model\)"):
        model(X)
    if handle is None:
        del module.forward
    else:
        handle.remove()
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("path", ["visual.conv1", "visual.bn2", "visual.layer2.0.conv2"])
def test_a_module_that_was_exchanged_is_refused(path: str) -> None:
    """As low-rank adapters do: what stands around it computes with the old one."""
    model = small_trunk().double()
    skip_frozen(model, conv_names(model)[::2], bn="frozen")
    model.set_submodule(path, nn.Sequential(model.get_submodule(path)))
    with pytest.raises(UnsupportedModelError, match=f"{path} was exchanged"):
        model(X)


def test_hooks_on_whole_parts_are_called() -> None:
    model = small_trunk().double()
    names = conv_names(model)[::2]
    expected = plain_twin(model, names, "frozen")
    skip_frozen(model, names, bn="frozen")
    seen: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}
    for target, store in ((model, seen), (expected, wanted)):
        for path in ("visual.layer1.0", "visual.layer2"):
            target.get_submodule(path).register_forward_hook(
                lambda _m, _x, y, p=path, s=store: s.__setitem__(p, y.detach())
            )
        target(X)
    assert set(seen) == {"visual.layer1.0", "visual.layer2"}
    for path, value in wanted.items():
        torch.testing.assert_close(seen[path], value)
    restore_skipped(model)


def test_derivatives_that_the_operators_lack_are_refused() -> None:
    model = small_trunk().double()
    skip_frozen(model, conv_names(model)[::2], bn="frozen")
    with pytest.raises(UnsupportedModelError, match=r"backward only.*restore_skipped"):
        torch.func.jvp(model, (X,), (X,))
