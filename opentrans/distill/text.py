"""Cached text embeddings of a frozen text encoder.

The published training runs the frozen text encoder on all class prompts for every image: 133
prompts cost 386.7 GMAC per image, five times the forward pass of the network that is trained. The
result never changes, so it is computed once per vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.freshness import Freshness

__all__ = ["CacheStats", "TextCache"]

Key = tuple[bytes, int, torch.dtype]
Tokenizer = Callable[[list[str]], torch.Tensor]


@dataclass
class CacheStats:
    """Prompts found (``hits``) and encoded (``misses``), runs of the encoder, rows dropped."""

    hits: int = 0
    misses: int = 0
    encoder_calls: int = 0
    evicted: int = 0


class TextCache:
    """Embeddings of prompts by (token ids, weights of the encoder, dtype).

    The encoder runs on prompts it has not seen, once; everything else is a look-up. Weights count
    as changed when a parameter or buffer holds other bits. Writes that PyTorch counts and those to
    a whole tensor are seen by the next call, a few elements written through ``parameter.data``
    within the number of calls that :mod:`opentrans_kernels.freshness` states; on a GPU only writes
    that PyTorch counts.

    Args:
        encoder: an open_clip CLIP (its ``encode_text`` is used, its visual tower ignored) or a
            module from token ids [n, L] to embeddings [n, D]. Must be frozen.
        tokenizer: list of strings -> integer token ids [n, L].
        dtype: of the embeddings returned; the encoder runs in its own, without autocast.
        max_rows: prompts kept (and vocabularies, with their prompts); the least recently used go
            first. 1024 floats per prompt are 4 KB.
        chunk: prompts per run of the encoder.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: Tokenizer,
        *,
        dtype: torch.dtype = torch.float32,
        max_rows: int = 20_000,
        chunk: int = 256,
    ) -> None:
        if max_rows < 1 or chunk < 1:
            raise OpenTransError(
                f"TextCache: max_rows={max_rows} and chunk={chunk} must be 1 or more; use the "
                "defaults if memory allows (20000 prompts of 1024 floats are 82 MB)."
            )
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.max_rows = max_rows
        self.chunk = chunk
        self.stats = CacheStats()
        self._rows: OrderedDict[Key, torch.Tensor] = OrderedDict()
        self._vocabularies: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()
        self._versions: dict[tuple[Any, ...], int] = {}
        self._watched: tuple[Freshness, tuple[Any, ...], int] | None = None

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit-length embeddings [n, D] of ``prompts``, on the encoder's device.

        Raises OpenTransError if a parameter of the encoder trains, or its output depends on the
        mode and it is in training mode.
        """
        return self._look_up(list(prompts), self._version())

    def vocabulary(
        self, classes: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> torch.Tensor:
        """One unit-length embedding per class [K, D]: the prompt ensemble over ``templates``.

        The unit embeddings of a class under all templates are averaged and normalised again, as
        CLIP does. ``{}`` in a template stands for the class name.
        """
        missing = [template for template in templates if "{}" not in template]
        if missing or not templates or not classes:
            raise OpenTransError(
                f"a vocabulary of {len(classes)} classes and {len(templates)} templates"
                + (f", of which {missing[0]!r} has no {{}}" if missing else "")
                + ". Pass at least one class, and templates such as 'a photo of a {}.'"
            )
        version = self._version()
        key = (tuple(classes), tuple(templates), version, self.dtype)
        if key in self._vocabularies:
            self._vocabularies.move_to_end(key)
            self.stats.hits += len(classes) * len(templates)
            return self._vocabularies[key]
        prompts = [t.replace("{}", name) for name in classes for t in templates]
        rows = self._look_up(prompts, version).to(torch.promote_types(self.dtype, torch.float32))
        mean = rows.view(len(classes), len(templates), -1).mean(dim=1)
        result = F.normalize(mean, dim=1).to(self.dtype)
        if result.shape[0] <= self.max_rows:
            self._vocabularies[key] = result
            self._trim()
        return result

    def remember(
        self, classes: Sequence[str], templates: Sequence[str], rows: torch.Tensor
    ) -> None:
        """Take ``rows`` [K, D] as the answer of ``vocabulary(classes, templates)``, until the
        weights change: embeddings that this encoder made earlier, such as those of a file."""
        if rows.dim() != 2 or len(rows) != len(classes):
            raise OpenTransError(
                f"TextCache: rows {tuple(rows.shape)} for {len(classes)} classes; one embedding "
                "per class is needed, [K, D]."
            )
        device = next((t.device for _, t in self._tensors()), rows.device)
        key = (tuple(classes), tuple(templates), self._version(), self.dtype)
        self._vocabularies[key] = rows.to(device, self.dtype)

    def clear(self) -> None:
        """Forget every embedding; the statistics stay."""
        self._rows.clear()
        self._vocabularies.clear()
        self._versions.clear()
        self._watched = None

    def __len__(self) -> int:
        """Prompts kept."""
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings kept."""
        kept = [*self._rows.values(), *self._vocabularies.values()]
        return sum(t.numel() * t.element_size() for t in kept)

    def _look_up(self, prompts: list[str], version: int) -> torch.Tensor:
        if not prompts:
            raise OpenTransError("TextCache: no prompt. Pass a list with at least one string.")
        tokens = self.tokenizer(prompts)
        keys = [(row.numpy().tobytes(), version, self.dtype) for row in tokens.cpu()]
        found = {key: self._rows[key] for key in keys if key in self._rows}
        new = {key: row for key, row in zip(keys, tokens, strict=True) if key not in found}
        self.stats.misses += len(new)
        self.stats.hits += len(keys) - len(new)
        if new:
            encoded = self._encode(torch.stack(list(new.values())))
            found.update(zip(new, encoded, strict=True))
        for key in dict.fromkeys(keys):
            self._rows[key] = found[key]
            self._rows.move_to_end(key)
        self._trim()
        return torch.stack([found[key] for key in keys])

    @torch.no_grad()
    def _encode(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        device = next((p.device for _, p in self._tensors()), tokens.device)
        encode = getattr(self.encoder, "encode_text", self.encoder)
        rows: list[torch.Tensor] = []
        for part in tokens.to(device).split(self.chunk):
            with torch.autocast(device.type, enabled=False):
                out = encode(part)
            if not isinstance(out, torch.Tensor) or out.dim() != 2 or len(out) != len(part):
                shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
                raise OpenTransError(
                    f"the text encoder returned {shape} for token ids {tuple(part.shape)}, not one "
                    "embedding [D] per prompt. Pass an open_clip model, or a module that pools its "
                    "output to [n, D]."
                )
            wide = out.to(torch.promote_types(out.dtype, torch.float32))
            self.stats.encoder_calls += 1
            # Copies, so that a kept row does not keep its whole chunk alive.
            rows += [row.clone() for row in F.normalize(wide, dim=1).to(self.dtype)]
        return rows

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        """Parameters and buffers that text embeddings depend on."""
        skipped = self._left_out()
        named = [*self.encoder.named_parameters(), *self.encoder.named_buffers()]
        return [(name, t) for name, t in named if not name.startswith(skipped)]

    def _left_out(self) -> tuple[str, ...]:
        clip = hasattr(self.encoder, "encode_text")
        return ("visual.", "logit_scale", "logit_bias") if clip else ()

    def _version(self) -> int:
        """A number that changes with the weights. Raises OpenTransError for a live encoder."""
        tensors = self._tensors()
        live = [name for name, t in tensors if t.requires_grad]
        if live:
            raise OpenTransError(
                f"{len(live)} parameters of the text encoder train (first: {live[0]}), so its "
                "embeddings change with every step and must not be cached. Freeze it with "
                "encoder.requires_grad_(False), or call the encoder itself."
            )
        moody = [
            name
            for name, m in self.encoder.named_modules()
            if m.training and _depends_on_mode(m) and not name.startswith("visual")
        ]
        if moody:
            raise OpenTransError(
                f"the text encoder is in training mode and {moody[0]!r} behaves differently there, "
                "so embeddings would be random. Call encoder.eval() first."
            )
        # The watch knows of writes and of modules replaced, not of places and of tensors added.
        places = tuple((name, t.device) for name, t in tensors)
        if self._watched is not None and self._watched[1] == places:
            watch, _, version = self._watched
            if watch.changed() is None:
                return version
        watch = Freshness({"": self.encoder}, ("", self.encoder), self._left_out(), every=1)
        state = (watch.digest(), places)
        if state not in self._versions:
            if len(self._versions) >= 1000:  # weights that keep changing; old rows are of no use
                self.clear()
            self._versions[state] = len(self._versions)
        self._watched = (watch, places, self._versions[state])
        return self._versions[state]

    def _trim(self) -> None:
        while len(self._rows) > self.max_rows:
            self._rows.popitem(last=False)
            self.stats.evicted += 1
        while sum(len(t) for t in self._vocabularies.values()) > self.max_rows:
            self._vocabularies.popitem(last=False)

    def __repr__(self) -> str:
        s = self.stats
        return (
            f"TextCache({len(self)} prompts, {self.nbytes / 1e6:.2f} MB, {s.hits} hits, "
            f"{s.misses} misses, {s.encoder_calls} encoder calls)"
        )


def _depends_on_mode(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
