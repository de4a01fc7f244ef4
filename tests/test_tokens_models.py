"""Token reduction in vision transformers of timm, open_clip and transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from test_tokens import CLUSTER, NOTHING, PLANS
from token_nets import LIBRARIES, images, library

from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.tokens import TokenPlan, reduce_tokens, restore_tokens


@pytest.mark.parametrize("name", LIBRARIES)
def test_models_of_libraries(name):
    model, tokens = library(name)
    x = images()
    with torch.no_grad():
        dense = tokens(model, x)
        for method, plan in PLANS.items():
            if method == "evit" and name == "transformers SigLIP":
                with pytest.raises(UnsupportedModelError, match="no class token"):
                    reduce_tokens(model, plan)
                continue
            keys = list(model.state_dict())
            state = reduce_tokens(model, plan)
            found = tokens(model, x)
            assert state.prefix == dense.shape[1] - 36 and found.shape == dense.shape
            assert method == "act" or state.tokens < 36
            assert method == "act" or not torch.allclose(found, dense, atol=1e-3)
            again = tokens(copy.deepcopy(model), x[1:])
            torch.testing.assert_close(again, found[1:], rtol=1e-3, atol=1e-4)
            restore_tokens(model)
            assert list(model.state_dict()) == keys
        for plan in (TokenPlan("act", cell=1e-4), *NOTHING.values()):
            if plan.method == "evit" and name == "transformers SigLIP":
                continue
            reduce_tokens(model, plan)
            torch.testing.assert_close(tokens(model, x), dense, rtol=1e-3, atol=1e-4)
            restore_tokens(model)
        assert torch.equal(tokens(model, x), dense)


def test_hidden_states_of_transformers_come_reduced_or_whole():
    model, _ = library("transformers ViT")
    x = images()
    for taps, lengths in (((), [37, 37, 37, 13, 37]), ((2,), [37, 37, 37, 37, 37])):
        reduce_tokens(model, TokenPlan(alpha=2, grid=(3, 4), taps=taps))
        with torch.no_grad():
            found = model(x, output_hidden_states=True)
        assert [one.shape[1] for one in found.hidden_states] == lengths
        assert found.last_hidden_state.shape[1] == 37
        restore_tokens(model)
        for module in model.modules():  # the library leaves its hooks
            module._forward_hooks.clear()
        model = copy.deepcopy(model)
        vars(model).pop("_output_capturing_hooks_installed", None)


def test_the_vision_tower_of_a_whole_clip_is_found():
    model, _ = library("open_clip")
    state = reduce_tokens(model, CLUSTER)
    words = torch.zeros(1, 8, dtype=torch.long)
    with torch.no_grad():
        assert model(images(batch=1), words)[0].shape == (1, 16)
    assert (state.depth, state.prefix) == (4, 1)
