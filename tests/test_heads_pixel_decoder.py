"""Pixel decoders of both forms: the same maps, the original in training, hooks and copies."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from head_nets import Layer
from torch import nn

import opentrans_kernels as otk
from opentrans_kernels.heads.pixel_decoder import NamedPixelDecoder, PixelDecoder

pytestmark = pytest.mark.usefixtures("extension")
WIDTHS = {"res2": 8, "res3": 12, "res4": 16, "res5": 24}


class Sine(nn.Module):
    """Positions from the size alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.scale = width, 2 * math.pi

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        h, w = x.shape[-2:]
        rates = 10.0 ** (-torch.arange(self.width // 2, dtype=x.dtype))
        y = (torch.arange(h, dtype=x.dtype) / h)[:, None, None] * self.scale * rates
        across = (torch.arange(w, dtype=x.dtype) / w)[None, :, None] * self.scale * rates
        found = torch.cat((y.sin().expand(h, w, -1), across.cos().expand(h, w, -1)), -1)
        return found.permute(2, 0, 1).expand(len(x), -1, -1, -1)


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x, shapes, starts, pos, padding):
        grids = []
        for h, w in shapes.tolist():
            y, across = torch.meshgrid(
                (torch.arange(h, dtype=x.dtype) + 0.5) / h,
                (torch.arange(w, dtype=x.dtype) + 0.5) / w,
                indexing="ij",
            )
            grids.append(torch.stack((across, y), -1).flatten(0, 1))
        reference = torch.cat(grids)[None, :, None].expand(len(x), -1, len(shapes), -1)
        for layer in self.layers:
            x = layer(x, pos, reference, shapes, starts, padding)
        return x


class Transformer(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.encoder = Stack(layers)
        self.level_embed = nn.Parameter(torch.randn(3, 32))

    def forward(self, maps, positions):
        shapes = torch.tensor([x.shape[-2:] for x in maps])
        sizes = shapes.prod(1)
        x = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        embed = [p.flatten(2).transpose(1, 2) + e for p, e in
                 zip(positions, self.level_embed, strict=True)]  # fmt: skip
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        starts = sizes.cumsum(0) - sizes
        return self.encoder(x, shapes, starts, torch.cat(embed, 1), padding), shapes


class Decoder(nn.Module):
    """The structure of the detectron2 trees' pixel decoders."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_features = list(WIDTHS)
        self.transformer_in_features = list(WIDTHS)[1:]
        self.feature_channels = list(WIDTHS.values())
        self.num_fpn_levels, self.maskformer_num_feature_levels = 1, 3
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(WIDTHS[name], 32, 1), nn.GroupNorm(4, 32))
            for name in self.transformer_in_features[::-1]
        )
        self.transformer = Transformer(layers)
        self.pe_layer = Sine(32)
        self.mask_features = nn.Conv2d(32, 20, 1)
        self.adapter_1 = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.GroupNorm(4, 32))
        self.layer_1 = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.GroupNorm(4, 32), nn.ReLU()
        )
        self.lateral_convs, self.output_convs = [self.adapter_1], [self.layer_1]
        self.eval()

    def forward_features(self, features):
        names = self.transformer_in_features[::-1]
        maps = [p(features[n]) for p, n in zip(self.input_proj, names, strict=True)]
        x, shapes = self.transformer(maps, [self.pe_layer(features[n]) for n in names])
        parts = x.split(shapes.prod(1).tolist(), 1)
        out = [
            part.transpose(1, 2).reshape(len(x), -1, h, w)
            for part, (h, w) in zip(parts, shapes.tolist(), strict=True)
        ]
        y = self.lateral_convs[0](features["res2"])
        y = y + F.interpolate(out[-1], y.shape[-2:], mode="bilinear", align_corners=False)
        out.append(self.output_convs[0](y))
        return self.mask_features(out[-1]), out[0], out[:3]


def maps_of(n: int, scale=(3, 2), dtype=torch.float32) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(n, width, scale[0] << (3 - i), scale[1] << (3 - i), generator=made).to(
            dtype
        )
        for i, (name, width) in enumerate(WIDTHS.items())
    }


def flat(out) -> list[torch.Tensor]:
    return [out[0], out[1], *out[2]]


def assert_exact(model: Decoder, dense: Decoder, n: int, scale) -> None:
    exact = flat(copy.deepcopy(dense).double().forward_features(maps_of(n, scale, torch.float64)))
    rough = flat(dense.forward_features(maps_of(n, scale)))
    found = flat(model.forward_features(maps_of(n, scale)))
    for a, b, right in zip(found, rough, exact, strict=True):
        assert a.shape == right.shape
        assert (a - right).abs().max() <= 2 * (b - right).abs().max() + 2e-6 * right.abs().max()


def test_maps_err_no_more_than_dense() -> None:
    dense = Decoder()
    model = nn.ModuleDict({"pixel_decoder": copy.deepcopy(dense)}).eval()
    report = otk.accelerate_heads(model)
    assert not report.left, str(report)
    new = model["pixel_decoder"]
    assert isinstance(new, PixelDecoder)
    with torch.no_grad():
        for n, scale in ((1, (3, 2)), (2, (2, 5)), (1, (1, 1)), (1, (3, 2))):
            assert_exact(new, dense, n, scale)
    found, rough = (flat(m.forward_features(maps_of(2))) for m in (new, dense))  # gradients on
    for a, b in zip(found, rough, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    otk.restore_heads(model)
    assert type(model["pixel_decoder"]) is Decoder
    assert model["pixel_decoder"].lateral_convs[0] is model["pixel_decoder"].adapter_1


def test_training_and_hooks_run_the_original(caplog) -> None:
    model = nn.ModuleDict({"pixel_decoder": Decoder(1)}).eval()
    otk.accelerate_heads(model)
    new = model["pixel_decoder"]
    model.train()
    new.forward_features(maps_of(1))[0].sum().backward()
    assert new.transformer.level_embed.grad is not None
    model.eval()
    seen = []
    with torch.no_grad():
        before = new.forward_features(maps_of(1))[0]
        new.input_proj[0].register_forward_hook(lambda *_: seen.append("projection"))
        new.forward_features(maps_of(1))
        assert seen == ["projection"]
        handle = new.pe_layer.register_forward_hook(lambda *_: seen.append("positions"))
        with caplog.at_level(logging.WARNING):
            found = new.forward_features(maps_of(1))[0]
        assert seen.count("positions") == 3 and "pe_layer has hooks" in caplog.text
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)
        handle.remove()
        new.pe_layer.scale = 3.0  # positions are made anew
        changed = new.forward_features(maps_of(1))[0]
        assert not torch.allclose(changed, before)
        assert torch.equal(copy.deepcopy(new).forward_features(maps_of(1))[0], changed)


def test_learned_positions_stay_as_they_are() -> None:
    model = nn.ModuleDict({"pixel_decoder": Decoder(1)}).eval()
    model["pixel_decoder"].pe_layer.extra = nn.Parameter(torch.zeros(3))
    report = otk.accelerate_heads(model)
    reasons = {part.path: part.reason for part in report.left}
    assert "learned" in reasons["pixel_decoder"]
    assert type(model["pixel_decoder"]) is Decoder


@pytest.fixture(scope="module")
def named() -> nn.Module:
    library = pytest.importorskip(
        "transformers.models.mask2former.modeling_mask2former",
        reason="transformers is not installed",
    )
    config = library.Mask2FormerConfig(
        feature_size=32, mask_feature_size=32, num_attention_heads=4, encoder_layers=2,
        encoder_feedforward_dim=40,
    )  # fmt: skip
    torch.manual_seed(0)
    model = library.Mask2FormerPixelDecoder(config, list(WIDTHS.values()))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return nn.ModuleDict({"decoder": model}).eval()


def test_asking_for_hidden_states_is_not_asking_for_the_original(
    named: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models with auxiliary losses do, and the result holds none."""
    model = copy.deepcopy(named)
    assert not otk.accelerate_heads(model).left
    maps = list(maps_of(1).values())
    with torch.no_grad():
        plain = model["decoder"](maps)
        monkeypatch.setattr(NamedPixelDecoder, "as_it_was", None)
        for named_or_not in ({"output_hidden_states": True}, {"return_dict": True}):
            found = model["decoder"](maps, **named_or_not)
            assert torch.equal(found.mask_features, plain.mask_features)
        assert torch.equal(
            model["decoder"](maps, None, None, True).mask_features, plain.mask_features
        )
        with pytest.raises(TypeError, match="not callable"):
            model["decoder"](maps, return_dict=False)


def test_the_form_of_transformers(named: nn.Module) -> None:
    dense, model = copy.deepcopy(named), copy.deepcopy(named)
    report = otk.accelerate_heads(model)
    assert not report.left, str(report)
    assert isinstance(model["decoder"], NamedPixelDecoder)
    with torch.no_grad():
        for n in (1, 2):
            maps = list(maps_of(n).values())
            found, rough = model["decoder"](maps), dense["decoder"](maps)
            exact = copy.deepcopy(dense["decoder"]).double()([x.double() for x in maps])
            assert type(found) is type(rough)
            for key in ("mask_features", "multi_scale_features"):
                for a, b, right in zip(*(
                    [v] if torch.is_tensor(v) else v for v in (found[key], rough[key], exact[key])
                ), strict=True):  # fmt: skip
                    bound = 2 * (b - right).abs().max() + 2e-6 * right.abs().max()
                    assert (a - right).abs().max() <= bound
        asked = model["decoder"](list(maps_of(1).values()), output_attentions=True)
        assert len(asked.attentions) == 2
        assert model["decoder"](list(maps_of(1).values())).attentions is None


class InFloat32(Decoder):
    """Makes float32 of its features, as the trees do, so it has no run in float64."""

    def forward_features(self, features):
        return super().forward_features({k: v.float() for k, v in features.items()})


class InFloat32Shifted(InFloat32):
    def forward_features(self, features):
        first, *rest = super().forward_features(features)
        return (first + 0.01 * first.abs().max(), *rest)


def test_what_has_no_run_in_float64_is_proved_against_ours() -> None:
    dense = InFloat32(1)
    model = nn.ModuleDict({"good": copy.deepcopy(dense), "other": InFloat32Shifted(1)}).eval()
    report = otk.accelerate_heads(model)
    assert isinstance(model["good"], PixelDecoder), str(report)
    reasons = {part.path: part.reason for part in report.left}
    assert reasons.keys() == {"other"} and "computes something else" in reasons["other"]
    with torch.no_grad():
        found, rough = (flat(m.forward_features(maps_of(2))) for m in (model["good"], dense))
    for a, b in zip(found, rough, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
