"""Text embeddings on disk, by vocabulary, prompts and weights of the encoder.

A file is one safetensors tensor: loading it runs no code, and it is read before the encoder runs.
What is damaged or of another shape is made again, with a line in the log.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import nn

from opentrans_kernels.errors import CheckpointError
from opentrans_kernels.masks import atomic_write

from .text import TextClassifier

__all__ = ["default_folder", "encoder_identity", "load_vocabulary", "stored"]

log = logging.getLogger(__name__)

NAME = "embeddings"
FORMAT = 1  # part of every key: files of another form are never read
# Of a CLIP, what its text does not depend on.
NOT_TEXT = ("visual.", "logit_scale", "logit_bias")


def default_folder() -> Path:
    """``opentrans/text`` in the user's cache folder: ``$XDG_CACHE_HOME``, else ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return base / "opentrans" / "text"


def encoder_identity(encoder: nn.Module, leave_out: Sequence[str] = NOT_TEXT) -> str:
    """SHA-256 (hex) over names, shapes, dtypes and values of an encoder's state.

    leave_out: how names begin of tensors that text does not depend on.
    """
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        if name.startswith(tuple(leave_out)):
            continue
        data = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}\n".encode())
        digest.update(data.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def stored(
    folder: str | os.PathLike[str] | None,
    identity: str,
    prompts: Sequence[object],
    rows: int,
    make: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Embeddings [rows, D], float32: from a file in ``folder``, else of ``make()`` and kept there.

    Args:
        folder: made if it is not there; None: nothing is read or written.
        identity: of the encoder.
        prompts: everything else that decides the result; plain values.

    A folder that cannot be written costs the next run time, so it is a warning and no error.
    """
    if folder is None:
        return make()
    key = json.dumps([FORMAT, identity, list(prompts), rows])
    file = Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    found = _read(file, rows)
    if found is not None:
        return found
    made = make().detach().float().cpu().contiguous()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, to_safetensors({NAME: made}))
    except (OSError, CheckpointError) as error:
        log.warning("text embeddings are not kept for the next run: %s", error)
    return made


def load_vocabulary(
    classifier: TextClassifier, classes: Sequence[str], folder: str | os.PathLike[str] | None
) -> None:
    """Have the embeddings of ``classes`` at hand in the classifier's cache, from disk if they are
    there. Raises OpenTransError as :meth:`TextClassifier.weights` does."""
    cache = classifier.cache
    rows = stored(
        folder,
        encoder_identity(cache.encoder),
        [list(classes), list(classifier.templates)],
        len(classes),
        lambda: classifier.weights(classes),
    )
    cache.remember(classes, classifier.templates, rows)


def _read(file: Path, rows: int) -> torch.Tensor | None:
    if not file.is_file():
        return None
    try:
        found = from_safetensors(file.read_bytes())
        value = found[NAME]
        unit = value.float().norm(dim=1)
        valid = value.shape[0] == rows and value.dtype == torch.float32
        valid = valid and bool(((unit - 1).abs() < 1e-3).all())
    except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
        log.warning("the text cache %s is damaged (%s); it is made again", file, error)
        return None
    if not valid:
        log.warning("the text cache %s is not what was written; it is made again", file)
        return None
    return value
