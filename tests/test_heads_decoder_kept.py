"""Masked transformer decoders: what is kept (training, hooks, modules), and who is left alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import decoder_cases as cases
import pytest
import torch
import torch.nn.functional as F
from decoder_runs import KINDS, Case, assert_exact, decided, make
from torch import nn

from opentrans_kernels.heads import HeadPart, accelerate_heads, named_decoder, restore_heads
from opentrans_kernels.heads.deferred import Deferred
from opentrans_kernels.heads.lazy import LazyMasks


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


def test_training_is_untouched(case: Case) -> None:
    args, kwargs = case.inputs(0)
    before = copy.deepcopy(case.model)
    accelerate_heads(case.model)
    results = []
    for model in (before, case.model):
        model.train()
        torch.manual_seed(0)  # OneFormer has dropout
        found = case.read(model.decoder(*args, **kwargs))
        sum(value.square().mean() for value in found.values()).backward()
        results.append((found, {n: p.grad for n, p in model.named_parameters()}))
    (dense, dense_grads), (ours, grads) = results
    assert not any(isinstance(value, Deferred) for value in ours.values())
    assert all(torch.equal(ours[key], dense[key]) for key in dense) and ours.keys() == dense.keys()
    assert grads.keys() == dense_grads.keys()
    for name, grad in dense_grads.items():
        assert grad is not None and torch.equal(grads[name], grad), name


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
        "task:layers.2",
        "task:layers.1.self_attn.self_attn",
        "task:class_embed",
    ],
)
def test_a_hook_put_on_later_is_called_as_ever(path: str, caplog: pytest.LogCaptureFixture) -> None:
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
    "path",
    [
        "plain:input_proj.1",
        "text:mask_embed",
        "named:decoder.mask_predictor.mask_embedder",
        "task:query_transformer",
        "task:mask_embed",
    ],
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


def test_with_other_levels_or_a_mask_of_padding_the_original_answers() -> None:
    case = make("plain")
    accelerate_heads(case.model)
    (x, features), _ = case.inputs(0)
    with torch.no_grad():
        out = case.model.decoder(x, features, mask=torch.ones(2, 3, 4))
        assert not isinstance(case.before_last(out)[0], Deferred)
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


def test_a_whole_model_computes_earlier_masks_on_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = pytest.importorskip("transformers", reason="needs transformers")
    swin = library.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = library.Mask2FormerForUniversalSegmentation(
        library.Mask2FormerConfig(
            backbone_config=swin, hidden_dim=32, feature_size=32, mask_feature_size=32,
            num_attention_heads=4, dim_feedforward=32, encoder_feedforward_dim=32,
            encoder_layers=1, decoder_layers=4, num_queries=6,
        )
    ).eval()  # fmt: skip
    image = torch.randn(1, 3, 64, 64)
    products: list[int] = []
    product = named_decoder.mask_product

    def counted(*args: torch.Tensor) -> torch.Tensor:
        products.append(1)
        return product(*args)

    with torch.no_grad():
        dense = model(image, output_auxiliary_logits=True)
        report = accelerate_heads(model)
        assert "model.transformer_module" in {part.path for part in report.replaced}, str(report)
        monkeypatch.setattr(named_decoder, "mask_product", counted)
        model(image)
        assert len(products) == 1
        ours = model(image, output_auxiliary_logits=True)
    assert len(ours.auxiliary_logits) == len(dense.auxiliary_logits) == 3
    pairs = [(ours, dense), *zip(ours.auxiliary_logits, dense.auxiliary_logits, strict=True)]
    for got, right in pairs:
        for key in ("masks_queries_logits", "class_queries_logits"):
            assert torch.allclose(got[key], right[key], atol=1e-4 * float(right[key].abs().max()))
    # What follows the model in pictures: enlarged, squashed, met by classes, tile by tile.
    assert isinstance(ours.masks_queries_logits, LazyMasks)
    scores = []
    for got in (ours, dense):
        full = F.interpolate(
            got.masks_queries_logits, size=(96, 80), mode="bilinear", align_corners=False
        )
        shares = got.class_queries_logits.softmax(-1)[..., :-1]
        scores.append(torch.einsum("bqc, bqhw -> bchw", shares, full.sigmoid()))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)
