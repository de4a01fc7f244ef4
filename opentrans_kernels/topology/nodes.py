"""What a trunk is made of: plain frozen records that refer to the model's own modules."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

from torch import nn

from opentrans_kernels.activations import NONE, Activation


def original(module: nn.Module) -> nn.Module:
    """The module that was there before acceleration.

    An accelerated replacement keeps the module it replaced in ``opentrans_original``; every lookup
    of this package goes through here, so an accelerated model looks like the dense one.
    """
    inner = getattr(module, "opentrans_original", None)
    return inner if isinstance(inner, nn.Module) else module


@dataclass(frozen=True)
class ConvNode:
    """One convolution with what follows it.

    name: module path of the convolution in the model given to ``find_trunk``.
    bn: the batch norm directly behind it (``BatchNorm2d`` or a frozen one), to be folded; None if
        unknown.
    relu: a ReLU follows; for the last convolution of a block it comes *after* the residual
        addition.
    act_name: module path of the activation when it serves this convolution alone, so that it may be
        swapped; None when it is shared or sits behind the addition. Leaving a ReLU in place after a
        fused one is harmless: relu(relu(x)) = relu(x).
    act: that module, with ``act_name``.
    activation: what a replacement applies last: that of ``act``, or one that the norm has built in.
    through: (path, module) of what the values between these pass through or cross, unchanged.
    sources: names of the convolutions whose values it reads as they are, each with what follows it
        here; empty where it reads something else, or that is not known.
    """

    name: str
    conv: nn.Conv2d
    bn: nn.Module | None = None
    bn_name: str | None = None
    relu: bool = False
    act_name: str | None = None
    act: nn.Module | None = None
    activation: Activation = NONE
    through: tuple[tuple[str, nn.Module], ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def follows(self) -> bool:
        """Whether a replacement computes more than the convolution."""
        return self.bn is not None or self.act is not None

    @property
    def plain_bn(self) -> nn.Module | None:
        """The norm, if scale and shift are all that it applies."""
        return None if self.activation and self.act is None else self.bn

    def folded(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of the convolution and of what a replacement of it computes as well."""
        yield self.name, self.conv
        if self.bn is not None:
            yield str(self.bn_name), self.bn
        if self.act is not None:
            yield str(self.act_name), self.act


@dataclass(frozen=True)
class BlockNode:
    """One residual block: relu(convs(x) + shortcut(x)).

    kind: "bottleneck" (1x1, 3x3, 1x1) or "basic" (3x3, 3x3).
    pool: size of the average pool between conv2's ReLU and conv3 (1 = none).
    down_pool: size of the average pool before the shortcut convolution (1 = none).
    stage, index: position; blocks of one stage run one after the other in an ``nn.Sequential``.
    module: the original block (seen through an accelerated replacement).
    """

    name: str
    module: nn.Module
    kind: str
    convs: tuple[ConvNode, ...]
    pool: int
    downsample: ConvNode | None
    down_pool: int
    stage: int = 0
    index: int = 0

    @property
    def all_convs(self) -> tuple[ConvNode, ...]:
        return self.convs if self.downsample is None else (*self.convs, self.downsample)


@dataclass(frozen=True)
class StemNode:
    """The convolutions before the first block.

    steps: module paths in execution order (conv, norm, activation, ..., pool); running them one
        after the other is the stem.
    pool_name: module path of the pool at its end.
    """

    convs: tuple[ConvNode, ...]
    steps: tuple[str, ...]
    pool_name: str | None


@dataclass(frozen=True)
class PoolNode:
    """A pool that reads nothing but convolutions and is read by nothing else.

    before, after: names of the convolutions; between those before and the pool there is only what
    may be folded into them.
    """

    name: str
    module: nn.Module
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class Trunk:
    """A recognised trunk; ``blocks`` in execution order.

    prefix: path of the trunk inside the model with a trailing dot ("visual."), "" at the top.
    family: "open_clip" | "openai" | "torchvision" | "timm" | "transformers", or "generic" when no
        ResNet was found and every convolution is loose.
    stages: module paths of layer1, layer2, ...; their children are the blocks.
    iterated: whatever holds a stage calls its blocks one by one, so it cannot be replaced as a
        whole.
    loose: convolutions outside recognised structure; replaceable one by one.
    pools: pools between them.
    notes: what was not recognised and why, one sentence each.
    """

    model: nn.Module
    prefix: str
    family: str
    stem: StemNode | None
    blocks: tuple[BlockNode, ...]
    loose: tuple[ConvNode, ...]
    stages: tuple[str, ...] = ()
    iterated: bool = False
    notes: tuple[str, ...] = ()
    pools: tuple[PoolNode, ...] = ()

    def convs(self) -> Iterator[ConvNode]:
        """Every convolution: stem, blocks (conv1, conv2, conv3, downsample), loose."""
        if self.stem is not None:
            yield from self.stem.convs
        for block in self.blocks:
            yield from block.all_convs
        yield from self.loose

    def pools_behind(self, planar: Set[str]) -> Iterator[PoolNode]:
        """Pools that read loose convolutions of these names alone."""
        for pool in self.pools:
            if planar >= {*pool.before}:
                yield pool

    def conv(self, name: str) -> ConvNode:
        """The convolution called ``name``; KeyError if the trunk has none."""
        for node in self.convs():
            if node.name == name:
                return node
        raise KeyError(name)

    def block(self, name: str) -> BlockNode:
        """The block called ``name``; KeyError if the trunk has none."""
        for node in self.blocks:
            if node.name == name:
                return node
        raise KeyError(name)


@dataclass(frozen=True)
class ConvShape:
    """Feature map sizes of one convolution in pixels, for one image."""

    h_in: int
    w_in: int
    h_out: int
    w_out: int

    @property
    def pixels(self) -> int:
        """Output pixels per image and channel."""
        return self.h_out * self.w_out
