"""Segmenter: published names, any size, windows, and reduced tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from opentrans.ovs import Segmenter, build_vit_segmenter, load_vit_segmenter
from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.tokens import TokenPlan, restore_tokens

GRID, CLASSES = 4, 5


def published(decoder: str = "mask", *, distilled: bool = False) -> dict[str, torch.Tensor]:
    """Weights under the names of the published checkpoints: ViT of 2 blocks and width 128."""
    random, width = torch.Generator().manual_seed(0), 128

    def block(name: str) -> dict[str, tuple[int, ...]]:
        return {
            f"{name}.norm1.weight": (width,), f"{name}.norm1.bias": (width,),
            f"{name}.norm2.weight": (width,), f"{name}.norm2.bias": (width,),
            f"{name}.attn.qkv.weight": (3 * width, width), f"{name}.attn.qkv.bias": (3 * width,),
            f"{name}.attn.proj.weight": (width, width), f"{name}.attn.proj.bias": (width,),
            f"{name}.mlp.fc1.weight": (4 * width, width), f"{name}.mlp.fc1.bias": (4 * width,),
            f"{name}.mlp.fc2.weight": (width, 4 * width), f"{name}.mlp.fc2.bias": (width,),
        }  # fmt: skip

    shapes = {
        "encoder.cls_token": (1, 1, width),
        "encoder.pos_embed": (1, GRID**2 + 1 + distilled, width),
        "encoder.patch_embed.proj.weight": (width, 3, 16, 16),
        "encoder.patch_embed.proj.bias": (width,),
        "encoder.norm.weight": (width,),
        "encoder.norm.bias": (width,),
        "encoder.head.weight": (CLASSES, width),
        "encoder.head.bias": (CLASSES,),
        **block("encoder.blocks.0"),
        **block("encoder.blocks.1"),
    }
    if distilled:
        shapes["encoder.dist_token"] = (1, 1, width)
        shapes["encoder.head_dist.weight"] = (CLASSES, width)
        shapes["encoder.head_dist.bias"] = (CLASSES,)
    if decoder == "linear":
        shapes |= {"decoder.head.weight": (CLASSES, width), "decoder.head.bias": (CLASSES,)}
    else:
        shapes |= {
            "decoder.cls_emb": (1, CLASSES, width),
            "decoder.proj_patch": (width, width),
            "decoder.proj_classes": (width, width),
            "decoder.proj_dec.weight": (width, width),
            "decoder.proj_dec.bias": (width,),
            "decoder.decoder_norm.weight": (width,),
            "decoder.decoder_norm.bias": (width,),
            "decoder.mask_norm.weight": (CLASSES,),
            "decoder.mask_norm.bias": (CLASSES,),
            **block("decoder.blocks.0"),
        }
    return {k: torch.randn(shape, generator=random) * 0.1 for k, shape in shapes.items()}


def loaded(tmp_path, **options) -> Segmenter:
    torch.save({"model": published(**options), "epoch": 3}, tmp_path / "checkpoint.pth")
    return load_vit_segmenter(tmp_path / "checkpoint.pth")


def block_by_hand(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """One block on [n, 128] with two heads."""

    def norm(key: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (128,), w[f"{name}.{key}.weight"], w[f"{name}.{key}.bias"])

    def linear(key: str, x: torch.Tensor) -> torch.Tensor:
        return x @ w[f"{name}.{key}.weight"].T + w[f"{name}.{key}.bias"]

    q, k, v = linear("attn.qkv", norm("norm1", x)).chunk(3, -1)
    heads = [(q[:, h] @ k[:, h].T / 8).softmax(-1) @ v[:, h] for h in (slice(64), slice(64, 128))]
    x = x + linear("attn.proj", torch.cat(heads, -1))
    return x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x))))


@pytest.mark.parametrize("decoder, distilled", [("mask", False), ("mask", True), ("linear", False)])
@torch.no_grad()
def test_a_published_checkpoint_computes_what_its_paper_says(tmp_path, decoder, distilled):
    w = {k: v.double() for k, v in published(decoder, distilled=distilled).items()}
    model = loaded(tmp_path, decoder=decoder, distilled=distilled).double()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    patches = F.conv2d(
        image, w["encoder.patch_embed.proj.weight"], w["encoder.patch_embed.proj.bias"], stride=16
    )
    first = ["cls_token"] + ["dist_token"] * distilled
    x = torch.cat([*(w[f"encoder.{name}"][0] for name in first), patches[0].flatten(1).T])
    x = x + w["encoder.pos_embed"][0]
    for number in range(2):
        x = block_by_hand(w, f"encoder.blocks.{number}", x)
    x = F.layer_norm(x, (128,), w["encoder.norm.weight"], w["encoder.norm.bias"])[len(first) :]
    if decoder == "linear":
        right = x @ w["decoder.head.weight"].T + w["decoder.head.bias"]
    else:
        x = x @ w["decoder.proj_dec.weight"].T + w["decoder.proj_dec.bias"]
        x = block_by_hand(w, "decoder.blocks.0", torch.cat([x, w["decoder.cls_emb"][0]]))
        x = F.layer_norm(
            x, (128,), w["decoder.decoder_norm.weight"], w["decoder.decoder_norm.bias"]
        )
        masks = F.normalize(x[:16] @ w["decoder.proj_patch"], dim=-1)
        right = masks @ F.normalize(x[16:] @ w["decoder.proj_classes"], dim=-1).T
        right = F.layer_norm(
            right, (CLASSES,), w["decoder.mask_norm.weight"], w["decoder.mask_norm.bias"]
        )
    torch.testing.assert_close(model.token_logits(image)[0], right)
    maps = right.T.reshape(1, CLASSES, 4, 4)
    torch.testing.assert_close(model(image), F.interpolate(maps, (64, 64), mode="bilinear"))


@torch.no_grad()
def test_positions_are_resized_and_odd_sizes_padded(tmp_path):
    model = loaded(tmp_path)
    table = model.encoder.pos_embed[:, 1:].mT.reshape(1, 128, 4, 4)
    wide = F.interpolate(table, (3, 6), mode="bilinear").flatten(2).mT
    found = model.encoder.positions((3, 6))
    torch.testing.assert_close(found[:, 1:], wide)
    assert torch.equal(found[:, :1], model.encoder.pos_embed[:, :1])
    image = torch.randn(2, 3, 40, 90)
    padded = F.pad(image, (0, 6, 0, 8))
    assert model(image).shape == (2, CLASSES, 40, 90)
    torch.testing.assert_close(model(image), model(padded)[..., :40, :90])
    assert model(padded).is_contiguous(), "as planes, which are not copied after enlarging"


@torch.no_grad()
def test_windows_cover_the_image_and_are_averaged(tmp_path):
    model = loaded(tmp_path, decoder="linear")
    image = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(model.slide(image[..., :64], 64), model(image[..., :64]))
    parts = [model(image[..., x : x + 64]) for x in (0, 24, 32)]
    right = torch.zeros(1, CLASSES, 64, 96)
    count = torch.zeros(96)
    for x, part in zip((0, 24, 32), parts, strict=True):
        right[..., x : x + 64] += part
        count[x : x + 64] += 1
    for batch in (1, 2, 8):
        torch.testing.assert_close(model.slide(image, 64, 24, batch=batch), right / count)
    small = torch.randn(1, 3, 40, 50)
    assert model.slide(small, 64, 32).shape == (1, CLASSES, 40, 50)
    for wrong in (
        (image, 64, 65),
        (image, 64, 0),
        (image[0], 64, 64),
        (image.repeat(2, 1, 1, 1), 64),
    ):
        with pytest.raises(OpenTransError, match="0 < stride <= window"):
            model.slide(*wrong)


@pytest.mark.parametrize("method", ["cluster", "pool"])
@torch.no_grad()
def test_the_decoder_works_on_reduced_tokens_and_logits_come_back(tmp_path, method):
    model = loaded(tmp_path)
    image = torch.randn(2, 3, 64, 96)
    dense = model(image)
    state = model.reduce(TokenPlan(method, alpha=1, grid=(2, 3), expand=False))
    seen = []
    handle = model.decoder.proj_dec.register_forward_hook(lambda m, i, out: seen.append(out.shape))
    found = model(image)
    handle.remove()
    assert seen == [(2, 6, 128)] and state.tokens == 6
    logits = model.decoder(model.encoder(image)[:, 1:])
    whole = state.expand(logits).mT.reshape(2, CLASSES, 4, 6)
    torch.testing.assert_close(found, F.interpolate(whole, (64, 96), mode="bilinear"))
    restore_tokens(model)
    model.reduce(TokenPlan(method, alpha=1, grid=(2, 3)))
    assert model(image).shape == dense.shape and model.slide(image[:1], 64).shape[2:] == (64, 96)
    restore_tokens(model)
    assert torch.equal(model(image), dense)


@pytest.mark.parametrize(
    "plan",
    [TokenPlan("tome", r=3), TokenPlan("evit", keep=0.5, at=(1,)), TokenPlan("act", cell=1e-4)],
    ids=lambda plan: plan.method,
)
@torch.no_grad()
def test_other_methods_give_the_decoder_the_full_map(tmp_path, plan):
    model = loaded(tmp_path)
    image = torch.randn(2, 3, 64, 64)
    dense = model(image)
    model.reduce(plan)
    found = model(image)
    assert found.shape == dense.shape
    assert torch.allclose(found, dense, atol=1e-3) == (plan.method == "act")


def test_published_sizes():
    model = build_vit_segmenter("segmenter-s16", classes=7, image_size=64)
    same = build_vit_segmenter("segmenter-s16", classes=7, image_size=64)
    assert len(model.encoder.blocks) == 12 and not model.training
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 32, 48))
    assert logits.shape == (1, 7, 32, 48) and torch.isfinite(logits).all()
    for options in ({"name": "segmenter-x"}, {"name": "segmenter-s16", "decoder": "fpn"}):
        with pytest.raises(OpenTransError, match="no Segmenter is"):
            build_vit_segmenter(**options)
    with pytest.raises(OpenTransError, match="images"):
        model(torch.zeros(3, 32, 32))


def drop(name):
    return lambda w: w.pop(name)


WRONG = {
    "a weight is missing": (drop("encoder.blocks.1.mlp.fc2.bias"), "encoder.blocks.1.mlp.fc2.bias"),
    "the encoder is missing": (drop("encoder.patch_embed.proj.weight"), "KeyError"),
    "no decoder": (drop("decoder.mask_norm.weight"), "KeyError"),
    "left over": (lambda w: w.update({"neck.weight": torch.zeros(2, 2)}), "neck.weight is missing"),
    "shape": (
        lambda w: w.update({"decoder.cls_emb": torch.zeros(1, 9, 128)}),
        "decoder.cls_emb is missing, left over or of another shape",
    ),
    "position table": (
        lambda w: w.update({"encoder.pos_embed": torch.zeros(1, 13, 128)}),
        "12 entries, which is no square",
    ),
    "whole numbers": (
        lambda w: w.update({"decoder.proj_patch": torch.zeros(128, 128, dtype=torch.int64)}),
        "decoder.proj_patch is torch.int64",
    ),
}


@pytest.mark.parametrize("spoil, words", WRONG.values(), ids=WRONG)
def test_checkpoints_of_something_else(tmp_path, spoil, words):
    weights = published()
    spoil(weights)
    torch.save({"model": weights}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=words):
        load_vit_segmenter(tmp_path / "other.pth")


def test_a_position_table_that_is_not_square(tmp_path):
    weights = published()
    weights["encoder.pos_embed"] = torch.randn(1, 13, 128)
    torch.save({"model": weights}, tmp_path / "wide.pth")
    model = load_vit_segmenter(tmp_path / "wide.pth", grid=(3, 4))
    assert model.encoder.positions((3, 4)) is model.encoder.pos_embed
    with pytest.raises(CheckpointError, match="pos_embed"):
        load_vit_segmenter(tmp_path / "wide.pth", grid=(3, 5))
