"""TextCache: one run of the encoder per prompt and weights, and never a stale embedding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opentrans.distill import TextCache
from opentrans_kernels import OpenTransError

CLASSES = [f"class {n}" for n in range(133)]


def tokenize(texts: Sequence[str]) -> torch.Tensor:
    rows = [[ord(letter) % 97 for letter in text[:24].ljust(24)] for text in texts]
    return torch.tensor(rows)


class Encoder(nn.Module):
    """Token ids [n, L] to embeddings [n, 16]; counts the prompts it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(97, 16)
        self.mix = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.0)
        self.seen = 0
        self.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += len(tokens)
        return self.mix(self.dropout(self.table(tokens).cumsum(1).relu().mean(1)))


def test_the_encoder_runs_once_per_vocabulary() -> None:
    encoder = Encoder()
    cache = TextCache(encoder, tokenize)
    first = cache.vocabulary(CLASSES)
    assert encoder.seen == 133 and first.shape == (133, 16)
    for _ in range(20):
        assert cache.vocabulary(CLASSES) is first
    assert encoder.seen == 133 and cache.stats.encoder_calls == 1
    assert (cache.stats.misses, cache.stats.hits) == (133, 20 * 133)
    prompts = [f"a photo of a {name}." for name in CLASSES]
    with torch.no_grad():
        expected = F.normalize(encoder(tokenize(prompts)), dim=1)
    torch.testing.assert_close(first, expected)
    assert "133 misses" in repr(cache) and not first.requires_grad


def test_captions_are_found_by_their_tokens() -> None:
    encoder = Encoder()
    cache = TextCache(encoder, tokenize, chunk=4)
    rows = cache(["a cat", "a dog", "a cat"])
    assert encoder.seen == 2 and torch.equal(rows[0], rows[2])
    more = cache(["a dog", "a cow", *(f"thing {n}" for n in range(8))])
    assert torch.equal(more[0], rows[1]) and encoder.seen == 11
    assert cache.stats.encoder_calls == 1 + 3 and len(cache) == 11
    long = "a very long caption of some length"  # tokenizers cut: equal tokens, equal text
    assert torch.equal(cache([long])[0], cache([long[:24]])[0]) and encoder.seen == 12


def test_prompt_ensembles() -> None:
    encoder = Encoder()
    cache = TextCache(encoder, tokenize)
    templates = ("a photo of a {}.", "{} in a scene", "the {}")
    found = cache.vocabulary(["cat", "dog"], templates)
    rows = [
        F.normalize(torch.stack([cache([t.format(n)])[0] for t in templates]).mean(0), dim=0)
        for n in ("cat", "dog")
    ]
    torch.testing.assert_close(found, torch.stack(rows))
    assert encoder.seen == 6
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    assert not torch.equal(found, cache.vocabulary(["cat", "dog"]))


def test_new_weights_are_never_mistaken_for_old_ones() -> None:
    encoder, other = Encoder(), Encoder()
    cache = TextCache(encoder, tokenize)
    before = cache.vocabulary(["cat"])
    encoder.load_state_dict(other.state_dict())
    after = cache.vocabulary(["cat"])
    assert encoder.seen == 2 and not torch.equal(before, after)
    with torch.no_grad():
        encoder.mix.bias.add_(0.5)
    assert not torch.equal(cache.vocabulary(["cat"]), after) and encoder.seen == 3
    encoder.mix = nn.Linear(16, 16).requires_grad_(False)
    cache(["a photo of a cat."])
    assert encoder.seen == 4
    one, kept = cache(["a photo of a cat."]), encoder.mix.bias.clone()
    encoder.mix.bias.data.add_(0.5)
    assert not torch.equal(cache(["a photo of a cat."]), one) and encoder.seen == 5
    encoder.mix.bias.data.copy_(kept)
    assert torch.equal(cache(["a photo of a cat."]), one) and encoder.seen == 5, "known weights"
    cache.clear()
    cache(["a photo of a cat."])
    assert encoder.seen == 6 and len(cache) == 1


def test_dtypes_do_not_mix() -> None:
    encoder = Encoder()
    cache = TextCache(encoder, tokenize)
    cache(["cat"])
    cache.dtype = torch.float16
    assert cache(["cat"]).dtype == torch.float16 and encoder.seen == 2
    with torch.autocast("cpu", torch.bfloat16):  # the cached value must not depend on it
        fresh = TextCache(encoder, tokenize)(["cat"])
    cache.dtype = torch.float32
    assert torch.equal(fresh, cache(["cat"]))


def test_it_is_bounded() -> None:
    encoder = Encoder()
    cache = TextCache(encoder, tokenize, max_rows=10)
    for number in range(50):
        cache([f"caption {number}"])
    assert len(cache) == 10 and cache.stats.evicted == 40
    assert cache.nbytes == 10 * 16 * 4
    cache(["caption 49"])
    assert encoder.seen == 50
    cache(["caption 0"])
    assert encoder.seen == 51
    big = cache.vocabulary(CLASSES)  # larger than the bound: right, but not kept
    assert big.shape == (133, 16) and cache.nbytes <= 10 * 16 * 4
    for number in range(8):
        cache.vocabulary([f"one {number}", f"two {number}"])
    assert cache.nbytes <= 2 * 10 * 16 * 4
    with pytest.raises(OpenTransError, match="use the defaults"):
        TextCache(encoder, tokenize, max_rows=0)


def test_a_live_encoder_is_refused() -> None:
    encoder = Encoder()
    cache = TextCache(encoder, tokenize)
    cache(["cat"])
    encoder.mix.weight.requires_grad_(True)
    with pytest.raises(OpenTransError, match=r"mix.weight.*encoder.requires_grad_\(False\)"):
        cache(["cat"])
    encoder.requires_grad_(False)
    encoder.dropout.p = 0.1
    with pytest.raises(OpenTransError, match=r"'dropout' behaves differently.*encoder.eval\(\)"):
        cache.vocabulary(["cat"])
    encoder.eval()
    cache(["cat"])


def test_bad_calls() -> None:
    encoder = Encoder()
    cache = TextCache(encoder, tokenize)
    with pytest.raises(OpenTransError, match="at least one string"):
        cache([])
    with pytest.raises(OpenTransError, match="has no {}"):
        cache.vocabulary(["cat"], ["a photo"])
    with pytest.raises(OpenTransError, match="at least one class"):
        cache.vocabulary([])
    with pytest.raises(OpenTransError, match=r"pools its output to \[n, D\]"):
        TextCache(encoder.table, tokenize)(["cat"])


def test_an_open_clip_model_whose_image_tower_trains() -> None:
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 4},
        text_cfg={"context_length": 24, "vocab_size": 97, "width": 16, "heads": 2, "layers": 1},
    )
    model.requires_grad_(False)
    model.visual.train().requires_grad_(True)
    cache = TextCache(model, tokenize)
    rows = cache.vocabulary(["cat", "dog"])
    with torch.no_grad():
        model.visual.conv1.weight.add_(1.0)
        expected = model.encode_text(tokenize(["a photo of a cat.", "a photo of a dog."]))
    torch.testing.assert_close(rows, F.normalize(expected, dim=1))
    assert cache.vocabulary(["cat", "dog"]) is rows and cache.stats.encoder_calls == 1
    model.token_embedding.weight.requires_grad_(True)
    with pytest.raises(OpenTransError, match="token_embedding"):
        cache(["cat"])
