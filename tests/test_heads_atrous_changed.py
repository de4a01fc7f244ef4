"""DeepLab decoders whose modules are unusual, shared, or exchanged after acceleration."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_heads_atrous import TwoInputs, assert_exact, pair, randomised
from torch import nn

import opentrans_kernels as otk
from opentrans_kernels.heads import atrous
from opentrans_kernels.heads.zeros import TrimmedConv

pytestmark = pytest.mark.usefixtures("extension")
WIDE = 33


def decoder(*behind: nn.Module) -> TwoInputs:
    """``behind``: what follows the first convolution, norm and ReLU, in place of the usual."""
    head = TwoInputs(False, wide=WIDE, second=WIDE)
    if behind:
        head.last_conv = nn.Sequential(*head.last_conv[:3], *behind)
    return head


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    x, low = (torch.randn(2, *s, generator=made) for s in ((16, 6, 5), (12, 17, 14)))
    return x, low


@torch.no_grad()
def agree(ours: nn.Module, dense: nn.Module) -> None:
    exact = copy.deepcopy(dense).double()(*(t.double() for t in inputs()))
    assert_exact(ours(*inputs()), dense(*inputs()), exact)


def replaced(ours: nn.Module) -> bool:
    return isinstance(ours.head, atrous._Atrous)


@pytest.mark.parametrize("first", (True, False))
def test_a_dilated_convolution_in_the_chain(first: bool) -> None:
    far = nn.Conv2d(22 if first else WIDE, WIDE, 3, padding=12, dilation=12)
    head = decoder(far)
    if first:  # from 32 channels on: the fine map has six, the coarse one the rest
        far = nn.Conv2d(6 + WIDE, WIDE, 3, padding=12, dilation=12)
        head.last_conv = nn.Sequential(far, nn.ReLU(), nn.Conv2d(WIDE, WIDE, 3, padding=1))
    dense, ours, _ = pair(head)
    assert replaced(ours) and any(isinstance(m, TrimmedConv) for m in ours.modules())
    x, low = inputs()
    x = torch.randn(2, WIDE, 6, 5) if first else x
    with torch.no_grad():
        exact = copy.deepcopy(dense).double()(x.double(), low.double())
        assert_exact(ours(x, low), dense(x, low), exact)


def test_one_convolution_with_two_norms() -> None:
    twice = nn.Conv2d(WIDE, WIDE, 3, padding=1)
    head = decoder(
        twice, nn.BatchNorm2d(WIDE), nn.ReLU(), twice, nn.BatchNorm2d(WIDE), nn.ReLU(),
    )  # fmt: skip
    head.last_conv[0].padding = (0, 0)  # the maps behind are smaller than the first
    dense, ours, _ = pair(head)
    assert replaced(ours) and len(ours.head.opentrans_smooth) == 2
    agree(ours, dense)
    agree(pickle.loads(pickle.dumps(copy.deepcopy(ours))), dense)


def exchange(index: int, made: nn.Module) -> Callable[[nn.Sequential], None]:
    return lambda chain: chain.__setitem__(index, copy.deepcopy(made).eval())


def widen(chain: nn.Sequential) -> None:
    chain[4].padding = chain[4].dilation = (2, 2)


def without_statistics(chain: nn.Sequential) -> None:
    chain[5].track_running_stats = False
    chain[5].running_mean = chain[5].running_var = None


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another norm": (exchange(5, randomised(nn.BatchNorm2d(WIDE), 7)), ""),
    "another convolution": (exchange(4, nn.Conv2d(WIDE, WIDE, 3, padding=1)), ""),
    "another reach": (widen, ""),
    "a group norm": (exchange(5, nn.GroupNorm(3, WIDE)), "GroupNorm between convolutions since"),
    "another activation": (exchange(6, nn.GELU()), "GELU between convolutions since"),
    "a norm in training mode": (lambda chain: chain[5].train(), "last_conv.5 is in training mode"),
    "statistics taken away": (without_statistics, "BatchNorm2d between convolutions since"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_exchanged_after_acceleration_counts(
    change: str, caplog: pytest.LogCaptureFixture
) -> None:
    apply, said = CHANGES[change]
    dense, ours, _ = pair(decoder())
    agree(ours, dense)
    for model in (dense, ours):
        apply(model.head.last_conv)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):  # of a norm in training mode the statistics move on in both
            if said:
                assert torch.equal(ours(*inputs()), dense(*inputs()))
            else:
                agree(ours, dense)
    assert [said in record.message for record in caplog.records] == [True] * bool(said)


def test_dropout_put_in_training_mode_drops() -> None:
    _, ours, _ = pair(decoder())
    ours.head.last_conv[3].train()
    with torch.no_grad():
        assert not torch.equal(ours(*inputs()), ours(*inputs()))
        ours.eval()
        assert torch.equal(ours(*inputs()), ours(*inputs()))


def test_acceleration_writes_no_statistics() -> None:
    head = randomised(decoder())
    model = nn.ModuleDict({"head": head}).eval()
    norm = head.last_conv[1].train()
    before = copy.deepcopy(norm.state_dict())
    report = otk.accelerate_heads(model)
    assert type(model["head"]) is TwoInputs
    assert "has last_conv.1 in training mode" in report.left[0].reason
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, before[name]), name
