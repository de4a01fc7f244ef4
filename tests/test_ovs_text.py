"""The text classifier and its cache; CLIP files; nothing random unless asked for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ovs_nets import CLASSES, SHAPE, small_classifier, small_clip

from opentrans import TextCache
from opentrans.ovs import TEMPLATES, TextClassifier, load_clip, train_tiny_clip
from opentrans.ovs.clip import build_clip, save_clip
from opentrans.ovs.tiny import TINY_SHAPE
from opentrans_kernels.errors import CheckpointError, OpenTransError


def test_weights_are_the_normalised_mean_over_templates_of_open_clips_own_embeddings() -> None:
    clip = small_clip()
    classifier = TextClassifier(TextCache(clip.model, clip.tokenizer))
    with torch.no_grad():
        rows = [
            F.normalize(clip.model.encode_text(clip.tokenizer([t.replace("{}", name)])), dim=1)
            for name in CLASSES
            for t in TEMPLATES
        ]
    expected = F.normalize(torch.cat(rows).double().view(3, len(TEMPLATES), -1).mean(1), dim=1)
    assert torch.allclose(classifier.weights(CLASSES).double(), expected, atol=1e-6)


def test_encoder_runs_once_per_vocabulary_and_a_second_call_is_a_hit() -> None:
    classifier = small_classifier()
    runs = []
    classifier.cache.encoder.transformer.register_forward_hook(lambda *_: runs.append(1))
    x = torch.randn(2, 32, 3, 3)
    first = classifier(x, CLASSES)
    assert len(runs) == classifier.cache.stats.encoder_calls == 1
    hits = classifier.cache.stats.hits
    assert torch.equal(classifier(x, CLASSES), first)
    assert len(runs) == 1 and classifier.cache.stats.hits == hits + 3 * len(TEMPLATES)
    # A longer list encodes the new names only; the order of names is the caller's.
    longer = classifier(x, (*reversed(CLASSES), "green cross"))
    assert len(runs) == 2 and classifier.cache.stats.misses == 4 * len(TEMPLATES)
    assert torch.allclose(longer[:, :3].flip(1), first, atol=1e-6)


def test_new_weights_or_a_training_encoder_are_noticed() -> None:
    classifier = small_classifier()
    before = classifier.weights(CLASSES)
    other = small_clip(seed=1).model.state_dict()
    classifier.cache.encoder.load_state_dict(other)
    assert not torch.allclose(classifier.weights(CLASSES), before)
    assert classifier.cache.stats.encoder_calls == 2
    classifier.cache.encoder.token_embedding.weight.requires_grad_(True)
    with pytest.raises(OpenTransError, match="token_embedding.*requires_grad_\\(False\\)"):
        classifier(torch.randn(1, 32), CLASSES)


def test_uncached_classifier_encodes_at_every_call() -> None:
    classifier = small_classifier(cached=False)
    x = torch.randn(1, 32)
    assert torch.equal(classifier(x, CLASSES), classifier(x, CLASSES))
    assert classifier.cache.stats.encoder_calls == 2


def test_logits_are_scaled_cosines_of_maps_and_of_rows() -> None:
    classifier = small_classifier(scale=10.0).double()
    x = torch.randn(2, 32, 4, 5, dtype=torch.float64, requires_grad=True)
    words = classifier.weights(CLASSES).double()
    cosine = torch.einsum("bdhw,kd->bkhw", x / x.norm(dim=1, keepdim=True), words)
    assert torch.allclose(classifier(x, CLASSES), 10 * cosine, atol=1e-9)
    rows = classifier(x.flatten(2).transpose(1, 2), CLASSES)  # [2, 20, 3]
    assert torch.allclose(rows.transpose(1, 2), 10 * cosine.flatten(2), atol=1e-9)
    classifier(x, CLASSES).sum().backward()
    assert x.grad is not None and classifier.log_scale.grad is not None
    with torch.no_grad():
        classifier.log_scale.fill_(99.0)
    assert torch.allclose(classifier(x, CLASSES), 100 * cosine, atol=1e-9)


def test_the_encoder_is_neither_trained_nor_saved_nor_moved_with_the_classifier() -> None:
    classifier = small_classifier()
    assert [name for name, _ in classifier.named_parameters()] == ["log_scale"]
    assert list(classifier.state_dict()) == ["log_scale"]


def test_bad_input_of_the_classifier() -> None:
    classifier = small_classifier()
    with pytest.raises(OpenTransError, match="have 31 channels.*embed_dim=32"):
        classifier(torch.randn(1, 31, 2, 2), CLASSES)
    with pytest.raises(OpenTransError, match="'a' more than once.*its own name"):
        classifier.weights(["a", "b", "a"])
    with pytest.raises(OpenTransError, match="no class|at least one class"):
        classifier.weights([])
    with pytest.raises(OpenTransError, match="CLIP starts at 14.3"):
        small_classifier(scale=0.0)


def test_a_clip_file_knows_its_shape_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = build_clip(SHAPE)
    path = save_clip(tmp_path / "clip.safetensors", model, SHAPE)
    clip = load_clip(str(path))
    assert clip.embed_dim == 32 and not clip.random and not clip.model.training
    assert not any(p.requires_grad for p in clip.model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(clip.model.state_dict()[key], value), key
    assert clip.tokenizer(["a"]).shape == (1, 16)


def test_random_weights_are_never_silent(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OpenTransError, match="random ones are never used unasked.*'random'"):
        load_clip("")
    with caplog.at_level(logging.WARNING):
        assert load_clip("random", "RN50").random
    assert "random weights" in caplog.text


def test_every_option_of_our_models_is_documented() -> None:
    from opentrans.d2.meta_arch_config import ovs_rows

    page = (Path(__file__).parents[1] / "docs" / "tiny-run.md").read_text(encoding="utf-8")
    rows = list(ovs_rows())
    missing = [key for key, _, meaning in rows if f"| `{key}` |" not in page or meaning not in page]
    assert len(rows) > 20 and missing == []


def test_wrong_clip_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_clip(str(tmp_path / "none.pt"))
    with pytest.raises(
        OpenTransError, match="neither a file nor weights that open_clip has.*openai"
    ):
        load_clip("opnai")
    with pytest.raises(OpenTransError, match="open_clip knows no model 'RN51'.*RN50"):
        load_clip("random", "RN51")
    torch.save({"state_dict": {"visual.conv1.weight": torch.zeros(1)}}, tmp_path / "half.pt")
    with pytest.raises(CheckpointError, match="is not this CLIP.*text encoder included"):
        load_clip(str(tmp_path / "half.pt"))


def test_a_few_steps_of_the_tiny_clip_learn_and_repeat(tmp_path: Path) -> None:
    losses: list[float] = []
    first = train_tiny_clip(
        tmp_path / "a.safetensors", steps=6, batch=13, on_step=lambda _, loss: losses.append(loss)
    )
    again = train_tiny_clip(tmp_path / "b.safetensors", steps=6, batch=13)
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert first.read_bytes() == again.read_bytes()
    clip = load_clip(str(first))
    assert clip.embed_dim == TINY_SHAPE["embed_dim"]
    with pytest.raises(OpenTransError, match="steps=0"):
        train_tiny_clip(tmp_path / "c.safetensors", steps=0)
