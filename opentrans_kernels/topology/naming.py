"""What the parts of a ResNet are called: two families of names, everything else is shared.

Paths are relative to the trunk's root, or to a block; convolutions of a block count from 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from opentrans_kernels.topology.nodes import original

__all__ = ["PLAIN", "TRANSFORMERS", "Naming", "child", "naming_of_block", "naming_of_root"]


def child(module: nn.Module, path: str) -> nn.Module | None:
    """The original module at ``path`` below ``module``; None if there is none."""
    found: nn.Module | None = module
    for key in path.split("."):
        found = getattr(found, key, None)
        if not isinstance(found, nn.Module):
            return None
        found = original(found)
    return found


@dataclass(frozen=True)
class Naming:
    """Formats take the number ``i`` of a convolution, ``before`` it from 0, or of a stage.

    conv, bn: of a block. acts: candidates for the ReLU behind it, of which the first ``own`` serve
    it alone. last: candidates behind the addition. downsample: of the shortcut. stage: whose
    children are the blocks. iterated: a stage's blocks are called one by one by what holds them.
    stem_conv, stem_bn, stem_acts, stem_pools: before the first stage.
    """

    conv: str
    bn: str
    acts: tuple[str, ...]
    own: int
    last: tuple[str, ...]
    downsample: str
    stage: str
    iterated: bool
    stem_conv: str
    stem_bn: str
    stem_acts: tuple[str, ...]
    stem_pools: tuple[str, ...]

    def at(self, path: str, i: int) -> str:
        return path.format(i=i, before=i - 1)

    def acts_of(self, i: int, last: bool) -> tuple[str, ...]:
        return tuple(self.at(path, i) for path in (self.last if last else self.acts))


_SHARED = ("act{i}", "relu{i}", "relu", "act")
#: CLIP, torchvision, timm.
PLAIN = Naming(
    conv="conv{i}", bn="bn{i}", acts=_SHARED, own=2, last=_SHARED, downsample="downsample",
    stage="layer{i}", iterated=False, stem_conv="conv{i}", stem_bn="bn{i}", stem_acts=_SHARED,
    # In torchvision ``avgpool`` is the head's pool and ``maxpool`` the stem's.
    stem_pools=("maxpool", "avgpool"),
)  # fmt: skip
#: Hugging Face's ResNet and its backbone.
TRANSFORMERS = Naming(
    conv="layer.{before}.convolution", bn="layer.{before}.normalization",
    acts=("layer.{before}.activation",), own=1, last=("activation",), downsample="shortcut",
    stage="encoder.stages.{before}.layers", iterated=True,
    stem_conv="embedder.embedder.convolution", stem_bn="embedder.embedder.normalization",
    stem_acts=("embedder.embedder.activation",), stem_pools=("embedder.pooler",),
)  # fmt: skip


def naming_of_block(block: nn.Module) -> Naming:
    named = child(block, "layer.0.convolution") is not None
    return TRANSFORMERS if named else PLAIN


def naming_of_root(root: nn.Module) -> Naming | None:
    """None if ``root`` does not hold stages of residual blocks."""
    for naming in (PLAIN, TRANSFORMERS):
        stage = child(root, naming.at(naming.stage, 1))
        for block in stage.children() if stage is not None else ():
            convs = (child(original(block), naming.at(naming.conv, i)) for i in (1, 2))
            if all(isinstance(conv, nn.Conv2d) for conv in convs):
                return naming
    return None
