"""Masked transformer decoders: the same numbers for less work, at any size, of the weights now."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import decoder_cases as cases
import pytest
import torch
import torch.nn.functional as F
from decoder_runs import KINDS, Case, assert_exact, decided, make
from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.heads import accelerate_heads, restore_heads
from opentrans_kernels.heads.deferred import Deferred
from opentrans_kernels.heads.masked import attention_mask


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_output_is_exact(kind: str, norm_first: bool) -> None:
    case = make(kind, norm_first)
    given, exact = decided(case)
    with torch.no_grad():
        dense = case.model.decoder(*given[0], **given[1])
    report = accelerate_heads(case.model)
    assert [part.path for part in report.replaced] == ["decoder"] and not report.left
    assert "masked decoder" in str(report) and "computed when read" in str(report)
    assert_exact(case, given, exact, dense)


@pytest.mark.parametrize(
    ("sizes", "full"),
    [
        (((3, 5), (5, 9), (9, 17)), (33, 65)),  # what padding to odd sizes leaves
        (((4, 4), (7, 8), (15, 13)), (29, 53)),  # no level is a whole fraction
        (((1, 1), (1, 2), (2, 1)), (3, 5)),
    ],
)
def test_any_size_and_one_image(case: Case, sizes: Any, full: Any) -> None:
    given, exact = decided(case, sizes=sizes, full=full, batch=1)
    with torch.no_grad():
        dense = case.model.decoder(*given[0], **given[1])
    accelerate_heads(case.model)
    assert_exact(case, given, exact, dense)


def test_channels_last_inputs(case: Case) -> None:
    given, exact = decided(case)
    accelerate_heads(case.model)
    with torch.no_grad():
        dense = case.model.decoder.as_it_was(*given[0], **given[1])
    last = torch.channels_last

    def turned(value: Any) -> Any:
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            return [one.contiguous(memory_format=last) for one in value]
        four = isinstance(value, torch.Tensor) and value.ndim == 4
        return value.contiguous(memory_format=last) if four else value

    args = tuple(turned(one) for one in given[0])
    kwargs = {key: turned(value) for key, value in given[1].items()}
    assert_exact(case, (args, kwargs), exact, dense)


def test_masks_flip_only_where_rounding_decides() -> None:
    torch.manual_seed(0)
    flips = {"ours": 0, "dense": 0}
    for _ in range(3):
        embedded, features = torch.randn(1, 100, 32), torch.randn(1, 32, 96, 96)
        size = (48, 48)

        def logits(dtype: torch.dtype, e: Any = embedded, f: Any = features) -> torch.Tensor:
            full = torch.einsum("bqc,bchw->bqhw", e.to(dtype), f.to(dtype))
            small = F.interpolate(full, size=(48, 48), mode="bilinear", align_corners=False)
            return small.flatten(2)

        exact, dense = logits(torch.float64), logits(torch.float32)
        bound = 2 * float((dense - exact).abs().max())
        small = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
        ours = attention_mask(embedded, small)[:, 0] != 0
        assert not (ours != (exact < 0))[exact.abs() > bound].any()
        flips["ours"] += int((ours != (exact < 0)).sum())
        flips["dense"] += int(((dense.sigmoid() < 0.5) != (exact < 0)).sum())
    # A sigmoid next to 0.5 rounds to it: the dense mask loses pixels there that ours does not.
    assert flips["ours"] <= flips["dense"] + 4, flips


def test_a_query_without_pixels_attends_to_all(case: Case) -> None:
    accelerate_heads(case.model)
    args, kwargs = case.inputs(0)
    shown = attention_mask(torch.tensor([[[1.0], [-1.0]]]), torch.ones(1, 1, 2, 3))
    assert torch.equal(shown, torch.zeros(1, 1, 2, 6))
    nowhere = attention_mask(torch.tensor([[[1.0]]]), torch.tensor([[[[1.0, -1.0, 0.0]]]]))
    assert nowhere.flatten().tolist() == [0.0, float("-inf"), 0.0]
    dark = [torch.zeros_like(a) if torch.is_tensor(a) else a for a in args]
    named = {k: torch.zeros_like(v) if k == "mask_features" else v for k, v in kwargs.items()}
    with torch.no_grad():  # no logit is negative, and none is positive
        ours = case.read(case.model.decoder(*dark, **named))
        dense = case.read(case.model.decoder.as_it_was(*dark, **named))
    assert all(torch.isfinite(value).all() for value in ours.values())
    for key, value in dense.items():
        assert torch.allclose(ours[key], value, atol=1e-5), key


def test_a_pixel_that_is_not_a_number_is_attended_to_as_before() -> None:
    mask = attention_mask(torch.ones(1, 1, 1), torch.tensor([[[[float("nan"), -1.0]]]]))
    assert mask.flatten().tolist() == [0.0, float("-inf")]


def test_gradients_in_eval_mode_too(case: Case) -> None:
    given, _ = decided(case)
    accelerate_heads(case.model)
    part = case.model.decoder
    grads = []
    for call in (part.as_it_was, part):
        case.model.zero_grad()
        found = case.read(call(*given[0], **given[1]))
        sum(value.square().mean() for value in found.values()).backward()
        grads.append({n: p.grad.clone() for n, p in part.named_parameters()})
    for name, grad in grads[0].items():
        # Keys' biases get none but rounding: a softmax does not see what all scores share.
        assert torch.allclose(grads[1][name], grad, atol=2e-4 * float(grad.abs().max()) + 1e-6), (
            name
        )


def test_earlier_predictions_cost_nothing_until_read(case: Case) -> None:
    accelerate_heads(case.model)
    given = case.inputs(0)
    with torch.no_grad():
        part = case.model.decoder
        out = part(*given[0], **given[1])
        dense = part.as_it_was(*given[0], **given[1])
    early = case.before_last(out)
    assert early and all(isinstance(one, Deferred) and torch.is_tensor(one) for one in early)
    assert len(early) == len(case.before_last(dense))
    for one, right in zip(early, case.before_last(dense), strict=True):
        assert (one.shape, one.dtype, one.device) == (right.shape, right.dtype, right.device)
        assert one.ndim == right.ndim and one.size(-1) == right.size(-1) and len(one) == len(right)
    first, right = early[-1], case.before_last(dense)[-1]
    near = {"atol": 1e-4 * float(right.abs().max())}
    for read in (
        lambda t: t + 0, lambda t: torch.stack([t])[0], lambda t: torch.cat(tensors=[t]),
        lambda t: torch.from_numpy(t.numpy()), lambda t: torch.tensor(t.tolist()),
        lambda t: copy.deepcopy(t), lambda t: pickle.loads(pickle.dumps(t)), lambda t: t.clone(),
        lambda t: t[:], lambda t: t.view(-1).view(t.shape), lambda t: F.relu(t) - F.relu(-t),
        lambda t: torch.ops.aten.alias(t),
    ):  # fmt: skip
        got = read(first)
        assert not isinstance(got, Deferred) and torch.allclose(got, right, **near)
    assert "tensor(" in repr(first)


def test_earlier_predictions_are_never_of_other_weights(case: Case) -> None:
    accelerate_heads(case.model)
    args, kwargs = case.inputs(0)
    with torch.no_grad():
        out = case.model.decoder(*args, **kwargs)
        read = case.before_last(out)[0].clone()
        features = kwargs["mask_features"] if not args else args[1]
        features.mul_(2)
        assert torch.equal(case.before_last(out)[0], read)  # computed already
        with pytest.raises(OpenTransError, match="after weights or inputs were changed.*Read it"):
            case.before_last(out)[-1].clone()


def test_weights_may_be_written_at_any_time(case: Case) -> None:
    accelerate_heads(case.model)
    with torch.no_grad():
        for index, weight in enumerate(case.model.parameters()):
            weight.mul_(1.0 + 0.01 * (index % 7))
        case.model.load_state_dict({k: v * 1.01 for k, v in case.model.state_dict().items()})
    part = case.model.decoder
    wanted = copy.deepcopy(case.model)
    restore_heads(wanted)
    case.model.decoder = wanted.decoder
    given, exact = decided(case)
    with torch.no_grad():
        dense = wanted.decoder(*given[0], **given[1])
    case.model.decoder = part
    assert_exact(case, given, exact, dense)


def test_other_dtypes_run_the_original(case: Case) -> None:
    args, kwargs = case.inputs(0)
    given = cases.to(torch.float64, args), cases.to(torch.float64, kwargs)
    accelerate_heads(case.model)
    case.model.double()
    with torch.no_grad():
        found = case.before_last(case.model.decoder(*given[0], **given[1]))
    assert not isinstance(found[0], Deferred) and found[0].dtype == torch.float64


def test_pruned_attention_uses_the_weight_of_the_moment() -> None:
    case = make("plain")
    attention = case.model.decoder.transformer_cross_attention_layers[1].multihead_attn
    nn.utils.prune.random_unstructured(attention, "in_proj_weight", 0.5)
    report = accelerate_heads(case.model)
    assert report.replaced, str(report)
    with torch.no_grad():
        attention.in_proj_weight_orig.mul_(3.0)
        given = case.inputs(3)
        ours = case.read(case.model.decoder(*given[0], **given[1]))
        dense = case.read(case.model.decoder.as_it_was(*given[0], **given[1]))
    assert torch.allclose(ours["masks"], dense["masks"], atol=1e-4)


def test_position_embeddings_are_made_once_per_size_and_never_stale() -> None:
    case = make("plain")
    accelerate_heads(case.model)
    part = case.model.decoder

    def masks(run: Any, **sizes: Any) -> torch.Tensor:
        given = case.inputs(0, **sizes)
        with torch.inference_mode():
            return run(*given[0], **given[1])["pred_masks"].clone()

    first = masks(part)
    cases.Sine.calls.clear()
    assert torch.equal(masks(part), first) and not cases.Sine.calls
    larger = {"sizes": ((3, 5), (6, 9), (12, 17))}
    other = masks(part, **larger)
    assert len(cases.Sine.calls) == 3
    assert torch.allclose(other, masks(part.as_it_was, **larger), atol=1e-4)
    part.pe_layer.base = 3.0
    changed = masks(part)
    assert torch.allclose(changed, masks(part.as_it_was), atol=1e-4)
    assert not torch.allclose(changed, first, atol=1e-4)
    for width in range(20, 60):  # no more than a few are kept
        masks(part, sizes=((3, width), (6, 8), (12, 16)))
    assert len(part.opentrans_positions._kept) <= part.opentrans_positions.KEPT
