"""DeepLab head, mask-classification head, inference rules, and whole models in plain torch."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from ovs_nets import CHANNELS, CLASSES, small_classifier, small_clip, small_features
from torch import nn

from opentrans.ovs import (
    DeepLabHead,
    MaskHead,
    MaskHeadOptions,
    MaskSegmenter,
    PixelSegmenter,
    TrunkFeatures,
    panoptic_segments,
    semantic_scores,
)
from opentrans.ovs.mask_head import mask_targets
from opentrans.ovs.segmenter import pixel_loss
from opentrans_kernels import accelerate, restore
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.synthetic import synthetic_masks

SMALL = MaskHeadOptions(
    dim=32, heads=4, feedforward=32, encoder_feedforward=32, encoder_layers=1, decoder_layers=3,
    queries=6, points=64,
)  # fmt: skip


def mask_head(seed: int = 0) -> MaskHead:
    pytest.importorskip("transformers", reason="the mask head needs transformers")
    pytest.importorskip("scipy", reason="the mask head needs scipy")
    torch.manual_seed(seed)
    return MaskHead(CHANNELS, 32, SMALL)


@pytest.mark.parametrize("shallow", [(), ("res2",), ("res4", "res3", "res2")])
def test_deeplab_head_has_the_stride_of_its_finest_feature(shallow: tuple[str, ...]) -> None:
    head = DeepLabHead(CHANNELS, 32, shallow=shallow, width=16, project=8, rates=(1, 2))
    out = head(small_features())
    side = 16 if shallow else 2
    assert out.shape == (2, 32, side, side)
    out.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_deeplab_head_names_the_feature_it_misses() -> None:
    with pytest.raises(OpenTransError, match="gives res2, res3.*not 'res6'"):
        DeepLabHead(CHANNELS, 32, deep="res6")


def test_mask_head_gives_masks_and_embeddings_of_every_layer() -> None:
    head = mask_head().eval()
    masks, embeddings = head(small_features())
    assert len(masks) == len(embeddings) == SMALL.decoder_layers
    assert all(m.shape == (2, 6, 16, 16) for m in masks)
    assert all(e.shape == (2, 6, 32) for e in embeddings)
    classifier = small_classifier()
    logits = head.class_logits(embeddings[-1], classifier, CLASSES)
    assert logits.shape == (2, 6, len(CLASSES) + 1)
    assert torch.equal(logits[..., :-1], classifier(embeddings[-1], CLASSES))


def test_mask_head_is_per_image() -> None:
    head = mask_head().eval()
    both = small_features()
    with torch.no_grad():
        masks, embeddings = head(both)
        alone, own = head({name: value[1:] for name, value in both.items()})
    assert torch.allclose(masks[-1][1:], alone[-1], atol=1e-4)
    assert torch.allclose(embeddings[-1][1:], own[-1], atol=1e-4)


def test_mask_loss_has_all_layers_and_reaches_every_parameter() -> None:
    head, classifier = mask_head(), small_classifier()
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, 10:40, 10:40] = 1
    labels[1] = 255  # an image without any label is left out
    targets = mask_targets(labels)
    assert [len(m) for m, _ in targets] == [2, 0]
    losses = head.loss(*head(small_features()), targets, classifier, CLASSES)
    assert len(losses) == 3 * SMALL.decoder_layers
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    unreached = [n for n, p in head.named_parameters() if p.grad is None]
    assert unreached == [] and classifier.log_scale.grad is not None


def test_mask_loss_weights_multiply_the_librarys_losses() -> None:
    features, targets = small_features(), mask_targets(torch.ones(2, 64, 64, dtype=torch.long))
    values = []
    for factor in (1.0, 3.0):
        head = mask_head()
        head.options = MaskHeadOptions(
            **{**vars(SMALL), "class_weight": 2 * factor, "dice_weight": 5 * factor}
        )
        torch.manual_seed(1)  # the points sampled
        values.append(head.loss(*head(features), targets, small_classifier(), CLASSES))
    for name, value in values[0].items():
        factor = 1.0 if name.startswith("loss_mask") else 3.0
        assert torch.allclose(value * factor, values[1][name]), name


def test_without_any_target_the_loss_is_zero_and_still_reaches_all() -> None:
    head, classifier = mask_head(), small_classifier()
    empty = mask_targets(torch.full((2, 64, 64), 255))
    losses = head.loss(*head(small_features()), empty, classifier, CLASSES)
    total = sum(losses.values())
    assert float(total.detach()) == 0.0
    total.backward()
    reached = {n for n, p in head.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in head.named_parameters()}


def test_mask_head_learns_two_masks_and_their_names() -> None:
    head, classifier = mask_head(), small_classifier()
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    labels[:, 16:48, 16:48] = 2
    features, targets = small_features(1), mask_targets(labels)
    optimizer = torch.optim.AdamW([*head.parameters(), *classifier.parameters()], 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(head.loss(*head(features), targets, classifier, CLASSES).values()).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    masks, embeddings = head.eval()(features)
    logits = head.class_logits(embeddings[-1], classifier, CLASSES)
    scores = semantic_scores(logits, masks[-1])
    right = scores.argmax(1)[0] == labels[0, ::4, ::4]
    assert right.float().mean() > 0.95


def test_missing_extra_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.mask2former", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        OpenTransError, match="Mask2Former, which.*: pip install 'transformers>=5'$"
    ):
        MaskHead(CHANNELS, 32, SMALL)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(OpenTransError, match="them with: pip install scipy 'transformers>=5'$"):
        MaskHead(CHANNELS, 32, SMALL)


def test_bad_options_of_the_mask_head() -> None:
    for options, fix in (
        ({"dim": 48}, "multiple of 32"),
        ({"dim": 64, "heads": 3}, "heads=3"),
        ({"queries": 0}, "queries=0 must be 1"),
        ({"decoder_layers": 1}, "must be 2 or more"),
    ):
        with pytest.raises(OpenTransError, match=fix):
            MaskHeadOptions(**options)
    with pytest.raises(OpenTransError, match="Add res2 to the backbone"):
        MaskHead({"res3": 1, "res4": 1, "res5": 1}, 32, SMALL)


def test_semantic_scores_are_the_double_sum() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64)  # two classes and "no object"
    masks = torch.randn(4, 5, 6, dtype=torch.float64)
    expected = torch.zeros(2, 5, 6, dtype=torch.float64)
    for query in range(4):
        for kind in range(2):
            probability = logits[query].exp()[kind] / logits[query].exp().sum()
            expected[kind] += probability / (1 + (-masks[query]).exp())
    assert torch.allclose(semantic_scores(logits, masks), expected)
    assert torch.allclose(semantic_scores(logits[None], masks[None])[0], expected)


def test_panoptic_segments_count_things_join_stuff_and_drop_the_hidden() -> None:
    sure = 8.0
    logits = torch.full((6, 4), -sure)
    masks = torch.full((6, 8, 8), -sure)
    for query, (kind, rows, strength) in enumerate(
        [
            (0, slice(0, 2), sure),  # stuff
            (0, slice(2, 4), sure),  # the same stuff: joined with it
            (1, slice(4, 6), sure),  # a thing
            (1, slice(6, 8), sure),  # another one of its class: counted
            (3, slice(0, 8), sure),  # no object
            (2, slice(0, 8), 0.5),  # covers all, wins nothing: dropped
        ]
    ):
        logits[query, kind] = strength * 10
        masks[query, rows] = strength
    ids, segments = panoptic_segments(logits, masks, {1, 2})
    assert [(s["category_id"], s["isthing"]) for s in segments] == [
        (0, False),
        (1, True),
        (1, True),
    ]
    assert [len(ids[rows].unique()) for rows in (slice(0, 4), slice(4, 6), slice(6, 8))] == [
        1,
        1,
        1,
    ]
    assert ids.unique().tolist() == [1, 2, 3]
    nothing, none = panoptic_segments(torch.zeros(6, 4), masks, {1})
    assert none == [] and not nothing.any()


def test_pixel_loss_ignores_refuses_and_never_is_nan() -> None:
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(3, (2, 4, 4))
    labels[0, :2] = 255
    expected = nn.functional.cross_entropy(logits.float(), labels, ignore_index=255)
    assert torch.allclose(pixel_loss(logits, labels, 255), expected)
    empty = pixel_loss(logits, torch.full((2, 4, 4), 255), 255)
    empty.backward()
    assert float(empty.detach()) == 0 and logits.grad is not None
    with pytest.raises(OpenTransError, match="0 to 7.*classes 0 to 2.*class list"):
        pixel_loss(logits, torch.tensor([0, 7]).view(2, 1, 1).expand(2, 4, 4), 255)


@pytest.mark.parametrize("kind", ["pixel", "mask"])
def test_a_whole_model_is_the_same_masked_dense_and_accelerated(kind: str) -> None:
    clip = small_clip()
    tower = copy.deepcopy(clip.model.visual)
    masks = synthetic_masks(tower, "global:0.90")
    masks.apply_(tower)
    backbone = TrunkFeatures(tower)
    assert backbone.channels == {"res2": 64, "res3": 128, "res4": 256, "res5": 512}
    if kind == "pixel":
        head = DeepLabHead(backbone.channels, 32, width=16, project=8, rates=(1, 2))
        model: nn.Module = PixelSegmenter(backbone, head, small_classifier())
    else:
        pytest.importorskip("transformers", reason="the mask head needs transformers")
        model = MaskSegmenter(backbone, MaskHead(backbone.channels, 32, SMALL), small_classifier())
    model.eval()
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        dense = model(images, CLASSES)
        report = accelerate(tower, input_size=(96, 64), measure=False)
        fast = model(images, CLASSES)
        restore(tower)
        again = model(images, CLASSES)
    assert dense.shape == (1, 3, 96, 64) and str(report).count("sparse") > 3
    assert torch.allclose(fast, dense, atol=1e-4 * float(dense.abs().max()))
    assert torch.equal(again, dense)
    assert not torch.equal(fast, dense), "the accelerated tower did not run"


def test_channels_of_a_trunk_leave_its_state_alone() -> None:
    tower = copy.deepcopy(small_clip().model.visual).train()
    tower.layer1.eval()
    before = copy.deepcopy(tower.state_dict())
    modes = [m.training for m in tower.modules()]
    assert len(TrunkFeatures(tower).channels) == 4
    assert modes == [m.training for m in tower.modules()] and True in modes and False in modes
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())


def test_trunk_features_refuse_what_is_no_resnet() -> None:
    with pytest.raises(OpenTransError, match="Pass open_clip's model.visual"):
        TrunkFeatures(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))


def test_training_steps_of_a_pixel_model_lower_its_loss() -> None:
    clip = small_clip()
    backbone = TrunkFeatures(copy.deepcopy(clip.model.visual).requires_grad_(True))
    head = DeepLabHead(backbone.channels, 32, width=16, project=8, rates=(1, 2))
    model = PixelSegmenter(backbone, head, small_classifier())
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 64, 64))).float()
    labels = (images[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = model.loss(images, labels, CLASSES)["loss_sem_seg"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert model.classifier.cache.stats.encoder_calls == 1
