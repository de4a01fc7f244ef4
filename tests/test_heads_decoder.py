"""Masked transformer decoders: same numbers, less work, nothing lost that a caller can read."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import decoder_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.heads import HeadPart, accelerate_heads, restore_heads
from opentrans_kernels.heads.deferred import Deferred
from opentrans_kernels.heads.masked import attention_mask

FLOOR = 8 * torch.finfo(torch.float32).eps
Call = Callable[[nn.Module, torch.dtype], Any]


class Case:
    """A model with one decoder, its inputs, and its results as named tensors."""

    sizes: tuple[tuple[int, int], ...] = ((3, 4), (6, 8), (12, 16))

    def __init__(self, decoder: nn.Module) -> None:
        self.model = nn.Module()
        self.model.decoder = decoder
        self.model.eval()

    def inputs(self, seed: int, **sizes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return cases.inputs(self.model.decoder, seed, **sizes)

    def read(self, out: Any) -> dict[str, torch.Tensor]:
        found = {"logits": out["pred_logits"], "masks": out["pred_masks"]}
        for index, one in enumerate(out["aux_outputs"]):
            found |= {f"logits_{index}": one["pred_logits"], f"masks_{index}": one["pred_masks"]}
        return found

    def before_last(self, out: Any) -> list[torch.Tensor]:
        return [value for one in out["aux_outputs"] for value in one.values()]


class NamedCase(Case):
    def inputs(self, seed: int, **sizes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        made = torch.Generator().manual_seed(seed)
        levels = sizes.get("sizes", self.sizes)
        batch, full = sizes.get("batch", 2), sizes.get("full", (48, 64))
        maps = [torch.randn(batch, 32, *size, generator=made) for size in levels]
        features = torch.randn(batch, 32, *full, generator=made)
        named = {"multi_scale_features": maps, "mask_features": features}
        return (), named | {"output_hidden_states": True}

    def read(self, out: Any) -> dict[str, torch.Tensor]:
        found = {"last": out.last_hidden_state, "masks": out.masks_queries_logits[-1]}
        for index, mask in enumerate(out.masks_queries_logits[:-1]):
            found[f"masks_{index}"] = mask
        for name in ("intermediate_hidden_states", "hidden_states"):
            found |= {f"{name}_{i}": value for i, value in enumerate(getattr(out, name))}
        return found

    def before_last(self, out: Any) -> list[torch.Tensor]:
        return list(out.masks_queries_logits[:-1])


def named_module(norm_first: bool) -> nn.Module:
    library = pytest.importorskip(
        "transformers.models.mask2former.modeling_mask2former", reason="needs transformers"
    )
    from transformers import Mask2FormerConfig

    config = Mask2FormerConfig(
        hidden_dim=32, feature_size=32, mask_feature_size=32, num_attention_heads=4,
        dim_feedforward=48, decoder_layers=5, num_queries=11, pre_norm=norm_first,
    )  # fmt: skip
    return library.Mask2FormerTransformerModule(32, config)


def make(kind: str, norm_first: bool = False, **options: Any) -> Case:
    torch.manual_seed(1)
    if kind == "named":
        return NamedCase(named_module(norm_first))
    form = cases.TextDecoder if kind == "text" else cases.Decoder
    return Case(form(norm_first=norm_first, **options))


KINDS = ("plain", "text", "named")


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield make(request.param)


def margin(found: dict[str, torch.Tensor], sizes: tuple[tuple[int, int], ...]) -> float:
    """How near to zero the logit comes that decides on a pixel, relative to the largest."""
    nearest = 1.0
    for index in range(sum(name.startswith("masks_") for name in found)):
        logits = F.interpolate(
            found[f"masks_{index}"], size=sizes[index % 3], mode="bilinear", align_corners=False
        )
        nearest = min(nearest, float(logits.abs().min() / logits.abs().max()))
    return nearest


def decided(case: Case, **sizes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Inputs of which no rounding can turn a pixel of a mask, and their results in float64."""
    double = copy.deepcopy(case.model.decoder).double()
    for seed in range(40):
        args, kwargs = case.inputs(seed, **sizes)
        with torch.no_grad():
            given = cases.to(torch.float64, args), cases.to(torch.float64, kwargs)
            found = case.read(double(*given[0], **given[1]))
        if margin(found, sizes.get("sizes", case.sizes)) > 5e-6:
            return (args, kwargs), found
    raise AssertionError("no such inputs")


def distances(
    found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> dict[str, float]:
    assert found.keys() == exact.keys()
    return {
        key: float((found[key].double() - exact[key]).abs().max() / exact[key].abs().max())
        for key in exact
    }


def assert_exact(case: Case, given: Any, exact: dict[str, torch.Tensor], dense: Any) -> None:
    with torch.no_grad():
        ours = distances(case.read(case.model.decoder(*given[0], **given[1])), exact)
    rough = distances(case.read(dense), exact)
    worst = max(rough.values())
    for key, error in ours.items():
        # Of a single small output the dense error may happen to be next to nothing.
        assert error <= max(2 * rough[key], worst, FLOOR), (key, error, rough[key])


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


def test_training_is_untouched(case: Case) -> None:
    args, kwargs = case.inputs(0)
    before = copy.deepcopy(case.model)
    accelerate_heads(case.model)
    results = []
    for model in (before, case.model):
        model.train()
        found = case.read(model.decoder(*args, **kwargs))
        sum(value.square().mean() for value in found.values()).backward()
        results.append((found, {n: p.grad for n, p in model.named_parameters()}))
    (dense, dense_grads), (ours, grads) = results
    assert not any(isinstance(value, Deferred) for value in ours.values())
    assert all(torch.equal(ours[key], dense[key]) for key in dense) and ours.keys() == dense.keys()
    assert grads.keys() == dense_grads.keys()
    for name, grad in dense_grads.items():
        assert grad is not None and torch.equal(grads[name], grad), name


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


@pytest.mark.parametrize(
    "path",
    [
        "plain:transformer_cross_attention_layers.1.multihead_attn",
        "plain:transformer_self_attention_layers.0",
        "plain:transformer_ffn_layers.2.linear1",
        "plain:class_embed",
        "plain:pe_layer",
        "text:mask_pooling",
        "text:decoder_norm",
        "named:decoder",
        "named:decoder.layers.3",
        "named:decoder.layers.0.self_attn.q_proj",
        "named:decoder.mask_predictor",
    ],
)
def test_a_hook_put_on_later_is_called_as_ever(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind, path = path.split(":")
    case = make(kind)
    given = case.inputs(0)
    calls: list[tuple[int, ...]] = []
    shapes: list[list[tuple[int, ...]]] = []
    accelerate_heads(case.model)
    part = case.model.decoder
    hooked = part.get_submodule(path)

    def note(_module: nn.Module, _args: Any, out: Any) -> None:
        first = out[0] if isinstance(out, tuple) else out
        calls.append(tuple(getattr(first, "shape", ())))

    for run in (part.as_it_was, part):
        calls.clear()
        handle = hooked.register_forward_hook(note)
        with torch.no_grad(), caplog.at_level(logging.WARNING):
            run(*given[0], **given[1])
        shapes.append(list(calls))
        handle.remove()
    assert shapes[0] and shapes[0] == shapes[1]
    told = [r.getMessage() for r in caplog.records if "has hooks since" in r.getMessage()]
    assert len(told) == 1 and path in told[0]
    calls.clear()
    with torch.no_grad():
        assert isinstance(case.before_last(part(*given[0], **given[1]))[0], Deferred)


@pytest.mark.parametrize(
    "path", ["plain:input_proj.1", "text:mask_embed", "named:decoder.mask_predictor.mask_embedder"]
)
def test_a_hook_on_what_is_called_costs_nothing(path: str) -> None:
    kind, path = path.split(":")
    case = make(kind)
    given = case.inputs(0)
    accelerate_heads(case.model)
    part = case.model.decoder
    seen: list[torch.Tensor] = []
    part.get_submodule(path).register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        out = part(*given[0], **given[1])
        ours = list(seen)
        seen.clear()
        part.as_it_was(*given[0], **given[1])
    assert isinstance(case.before_last(out)[0], Deferred)
    assert [one.shape for one in ours] == [one.shape for one in seen]


def test_restoring_gives_the_very_same_modules(case: Case) -> None:
    before = dict(case.model.named_modules())
    keys = list(case.model.state_dict())
    accelerate_heads(case.model)
    assert list(case.model.state_dict()) == keys
    assert isinstance(case.model.decoder, HeadPart)
    names = set(dict(case.model.named_modules()))
    assert set(before) == names
    restore_heads(case.model)
    after = dict(case.model.named_modules())
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)


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


def test_a_copy_is_independent(case: Case) -> None:
    accelerate_heads(case.model)
    given = case.inputs(0)
    with torch.no_grad():
        before = case.read(case.model.decoder(*given[0], **given[1]))["masks"].clone()
        copied = copy.deepcopy(case.model)
        assert torch.equal(case.read(copied.decoder(*given[0], **given[1]))["masks"], before)
        for weight in copied.parameters():
            weight.mul_(1.5)
        assert not torch.equal(case.read(copied.decoder(*given[0], **given[1]))["masks"], before)
        assert torch.equal(case.read(case.model.decoder(*given[0], **given[1]))["masks"], before)


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
    accelerate_heads(case.model)
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
    sine = part.pe_layer

    def run(**sizes: Any) -> torch.Tensor:
        given = case.inputs(0, **sizes)
        with torch.inference_mode():
            return part(*given[0], **given[1])["pred_masks"]

    run()
    made = sine.calls
    first = run()
    # The counter is an attribute of the module: what changes it makes new embeddings.
    del sine.calls
    sine.forward = None  # nothing may call it
    del sine.forward
    assert sine.width and made >= 3 and torch.isfinite(first).all()


def test_without_layers_to_attend_or_with_other_levels_the_original_answers() -> None:
    case = make("plain")
    accelerate_heads(case.model)
    (x, features), _ = case.inputs(0)
    with pytest.raises(AssertionError):  # the original's own check
        case.model.decoder(x[:2], features)


class Nearest(cases.Decoder):
    def resize(self, masks: torch.Tensor, size: Any) -> torch.Tensor:
        return F.interpolate(masks, size=size, mode="nearest")


class Corners(cases.Decoder):
    def resize(self, masks: torch.Tensor, size: Any) -> torch.Tensor:
        return F.interpolate(masks, size=size, mode="bilinear", align_corners=True)


class Surer(cases.Decoder):
    def hide(self, masks: torch.Tensor, size: Any) -> torch.Tensor:
        hidden = self.resize(masks, size).sigmoid().flatten(2) < 0.45
        return hidden[:, None].repeat(1, self.num_heads, 1, 1).flatten(0, 1)


class NoMask(cases.Decoder):
    def hide(self, masks: torch.Tensor, size: Any) -> torch.Tensor:
        return torch.zeros_like(super().hide(masks, size))


class MoreResults(cases.Decoder):
    def forward(self, x: Any, mask_features: torch.Tensor, mask: Any = None) -> dict[str, Any]:
        return {**self.decode(x, mask_features), "queries": self.query_feat.weight}


class Scaled(cases.Own):
    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return super().forward(x, 2 * at)


@pytest.mark.parametrize("form", [Nearest, Corners, Surer, NoMask])
def test_a_relative_that_masks_otherwise_is_left(form: type[cases.Decoder]) -> None:
    torch.manual_seed(0)
    case = Case(form())
    kept = case.model.decoder
    report = accelerate_heads(case.model)
    assert case.model.decoder is kept and not report.replaced
    assert "computes something else" in report.left[0].reason
    assert "decoder (masked decoder) stays as it was" in str(report)


def changed(change: Callable[[Any], Any]) -> nn.Module:
    torch.manual_seed(0)
    decoder = cases.Decoder()
    change(decoder)
    return decoder


@pytest.mark.parametrize(
    ("decoder", "why"),
    [
        (lambda: MoreResults(), "its results are .*queries"),
        (
            lambda: changed(
                lambda d: d.transformer_self_attention_layers.__setitem__(1, Scaled(32, 4, False))
            ),
            "computes something else",
        ),
        (
            lambda: changed(
                lambda d: setattr(
                    d.transformer_cross_attention_layers[2], "multihead_attn",
                    nn.MultiheadAttention(32, 4, add_bias_kv=True),
                )
            ),
            "cross-attention 2 has keys or values",
        ),
        (
            lambda: changed(
                lambda d: setattr(
                    d.transformer_self_attention_layers[0], "self_attn", nn.Linear(32, 32)
                )
            ),
            "self-attention 0 is a Linear",
        ),
        (
            lambda: changed(
                lambda d: d.transformer_ffn_layers[0].register_forward_hook(lambda *_: None)
            ),
            "transformer_ffn_layers.0 has hooks",
        ),
        (
            lambda: changed(lambda d: setattr(d.pe_layer, "row", nn.Parameter(torch.ones(2)))),
            "position embeddings are learned",
        ),
        (lambda: changed(lambda d: setattr(d, "mask_classification", False)), "no class head"),
        (
            lambda: changed(lambda d: d.transformer_ffn_layers.append(cases.Feed(32, False))),
            "not as many layers",
        ),
    ],
)  # fmt: skip
def test_a_relative_is_left_with_its_reason(decoder: Callable[[], Any], why: str) -> None:
    case = Case(decoder())
    report = accelerate_heads(case.model)
    assert not report.replaced and len(report.left) == 1
    assert pytest.importorskip("re").search(why, report.left[0].reason), report.left[0].reason


def test_a_child_in_training_mode_is_seen() -> None:
    case = make("plain")
    accelerate_heads(case.model)
    given = case.inputs(0)
    part = case.model.decoder
    part.transformer_ffn_layers[1].dropout.p = 0.5
    part.transformer_ffn_layers[1].dropout.train()
    with torch.no_grad():
        torch.manual_seed(0)
        ours = part(*given[0], **given[1])
        torch.manual_seed(0)
        dense = part.as_it_was(*given[0], **given[1])
    assert torch.equal(ours["pred_masks"], dense["pred_masks"])
    assert not isinstance(case.before_last(ours)[0], Deferred)


def test_a_layer_exchanged_later_is_called() -> None:
    case = make("plain")
    accelerate_heads(case.model)
    part = case.model.decoder
    layers = part.transformer_self_attention_layers
    other = Scaled(32, 4, False).eval()
    other.load_state_dict(layers[1].state_dict())
    layers[1] = other
    given = case.inputs(0)
    with torch.no_grad():
        assert torch.equal(
            part(*given[0], **given[1])["pred_masks"],
            part.as_it_was(*given[0], **given[1])["pred_masks"],
        )


class OtherHead(cases.Decoder):
    """Classes by distance to prototypes: a class head nobody knows."""

    def make_class_head(self, width: int) -> None:
        self.prototypes = nn.Parameter(torch.randn(7, width))

    def forward_prediction_heads(
        self, output: torch.Tensor, mask_features: torch.Tensor, attn_mask_target_size: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed = self.decoder_norm(output).transpose(0, 1)
        masks = self.masks_of(normed, mask_features)
        scores = -torch.cdist(normed, self.prototypes[None])
        return scores, masks, self.hide(masks, attn_mask_target_size)


def test_a_class_head_of_another_tree_is_called_once() -> None:
    torch.manual_seed(0)
    case = Case(OtherHead())
    given, exact = decided(case)
    with torch.no_grad():
        dense = case.model.decoder(*given[0], **given[1])
    report = accelerate_heads(case.model)
    assert report.replaced, str(report)
    assert_exact(case, given, exact, dense)


def test_our_own_mask_head_is_one_of_them() -> None:
    pytest.importorskip("transformers", reason="the mask head needs transformers")
    pytest.importorskip("scipy", reason="the mask head needs scipy")
    from opentrans.ovs import MaskHead, MaskHeadOptions

    torch.manual_seed(0)
    small = MaskHeadOptions(
        dim=32, heads=4, feedforward=32, encoder_feedforward=32, encoder_layers=1,
        decoder_layers=4, queries=6, points=64,
    )  # fmt: skip
    channels = {"res2": 8, "res3": 12, "res4": 16, "res5": 20}
    model = nn.ModuleDict({"head": MaskHead(channels, 16, small)}).eval()
    features = {
        name: torch.randn(2, width, 64 >> index, 64 >> index)
        for index, (name, width) in enumerate(channels.items())
    }
    with torch.no_grad():
        masks, embeddings = model["head"](features)
        report = accelerate_heads(model)
        assert {part.path for part in report.replaced} >= {"head.transformer"}, str(report)
        ours, own = model["head"](features)
    assert len(ours) == len(masks) == small.decoder_layers
    for got, right in zip((*ours, *own), (*masks, *embeddings), strict=True):
        assert torch.allclose(got, right, atol=1e-4 * float(right.abs().max()))
    assert isinstance(ours[0], Deferred) and not isinstance(ours[-1], Deferred)
