"""Pruned linear layers in networks of other libraries: mixers, gated MLPs, CLIP's two towers."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from test_linear_layers import SIZE, sparse
from torch import nn
from vit_nets import prune_

from opentrans_kernels.accelerate import restore
from opentrans_kernels.errors import UnsupportedModelError

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64
}  # fmt: skip
PICTURE = {"image_size": 32, "patch_size": 8}


def _timm(gated: bool) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    mixer = timm.models.mlp_mixer
    form = {"mlp_layer": timm.layers.GatedMlp, "block_layer": mixer.SpatialGatingBlock,
            "mlp_ratio": 4}  # fmt: skip
    return mixer.MlpMixer(
        img_size=32, patch_size=8, num_blocks=2, embed_dim=32, num_classes=0,
        **(form if gated else {}),
    )  # fmt: skip


def _transformers(kind: str, **options: object) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{kind}Config")(**SMALL, **options)
    return getattr(transformers, f"{kind}Model")(config)


def _clip() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    text = {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config={**SMALL, **text}, vision_config={**SMALL, **PICTURE}, projection_dim=16
    )
    return transformers.CLIPModel(config)


#: Model, its output of images, and how many units of which role.
MODELS = {
    "mixer": (lambda: _timm(False), lambda m, x: m(x), {"mlp": 4}),
    "gated mixer": (lambda: _timm(True), lambda m, x: m(x), {"linear": 6}),
    "DINOv2": (
        lambda: _transformers("Dinov2", **PICTURE), lambda m, x: m(x).last_hidden_state,
        {"linear": 8, "mlp": 2},
    ),
    "DINOv2, gated": (
        lambda: _transformers("Dinov2", use_swiglu_ffn=True, **PICTURE),
        lambda m, x: m(x).last_hidden_state, {"linear": 14},
    ),
    "CLIP vision": (
        lambda: _transformers("CLIPVision", **PICTURE), lambda m, x: m(x).last_hidden_state,
        {"linear": 8, "mlp": 2},
    ),
}  # fmt: skip


def pruned(model: nn.Module) -> nn.Module:
    """All linear layers of the blocks, those of towers for text as well."""
    names = tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
    )
    prune_(model.eval(), names=names)
    random = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            weight = module.in_proj_weight.data
            weight[torch.rand(weight.shape, generator=random) < 0.9] = 0
    return model


def assert_close(found: torch.Tensor, want: torch.Tensor) -> None:
    assert found.isfinite().all()
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_networks_of_tokens(extension: None, name: str) -> None:
    build, call, roles = MODELS[name]
    torch.manual_seed(0)
    model = pruned(build())
    dense, x = copy.deepcopy(model), torch.randn(2, 3, *SIZE)
    report = sparse(model, input_size=SIZE)
    assert Counter(u.role for u in report.plan.units if u.kind == "sparse") == roles
    assert_close(call(model, x), call(dense, x))
    restore(model)
    assert torch.equal(call(model, x), call(dense, x))


@torch.no_grad()
def test_the_tower_for_text_with_causal_and_padding_masks(extension: None) -> None:
    torch.manual_seed(0)
    model = pruned(_clip())
    dense = copy.deepcopy(model)
    report = sparse(model, input_size=SIZE)
    kinds = Counter(u.name.partition(".")[0] for u in report.plan.units if u.kind == "sparse")
    assert kinds == {"text_model": 10, "vision_model": 10}
    words = torch.randint(3, 20, (2, 8))
    for padding in (None, torch.tensor([[1] * 8, [1] * 5 + [0] * 3])):
        found, want = (m.text_model(words, attention_mask=padding)[0] for m in (model, dense))
        assert_close(found, want)
    images = torch.randn(2, 3, *SIZE)
    assert_close(model.vision_model(images)[0], dense.vision_model(images)[0])


@torch.no_grad()
def test_a_tower_that_images_do_not_reach_stays_and_is_named(extension: None) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 8, "width": 32, "heads": 2, "layers": 1}
    model = pruned(open_clip.CLIP(32, vision, text))
    dense = copy.deepcopy(model)
    report = sparse(model, input_size=SIZE)
    said = str(report) + str(report.plan)
    assert "2 linear layers with zeros are not called for an image and stay as they are" in said
    assert "transformer.resblocks.0.attn" in said
    x, words = torch.randn(2, 3, *SIZE), torch.randint(0, 8, (2, 4))
    assert_close(model.encode_image(x), dense.encode_image(x))
    assert torch.equal(model.encode_text(words), dense.encode_text(words))
    with pytest.raises(UnsupportedModelError, match="linear layers can only be, inside of a model"):
        sparse(dense.transformer)
