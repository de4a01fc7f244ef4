"""The network a mask belongs to, as shapes: from a model, or inferred from mask names and shapes.

Nothing is guessed: names and shapes must fit together as one of the two known layouts, CLIP's
ModifiedResNet (three stem convolutions, average pools for strides) or torchvision's ResNet (one 7x7
stem convolution, strided convolutions). Anything else is an error that asks for the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from opentrans_kernels.errors import MaskError

Shape = tuple[int, int, int, int]

BLOCK_CONV = re.compile(
    r"^(?P<prefix>(?:.*\.)?)layer(?P<stage>\d+)\.(?P<index>\d+)\."
    r"(?P<role>conv[123]|downsample\.(?P<position>\d+))$"
)
CLIP_NAMES = {
    (64, (3, 4, 6, 3)): "CLIP RN50",
    (64, (3, 4, 23, 3)): "CLIP RN101",
    (80, (4, 6, 10, 6)): "CLIP RN50x4",
    (96, (6, 8, 18, 8)): "CLIP RN50x16",
    (128, (3, 15, 36, 10)): "CLIP RN50x64",
}
RESNET_NAMES = {
    ("basic", (2, 2, 2, 2)): "ResNet-18",
    ("basic", (3, 4, 6, 3)): "ResNet-34",
    ("bottleneck", (3, 4, 6, 3)): "ResNet-50",
    ("bottleneck", (3, 4, 23, 3)): "ResNet-101",
    ("bottleneck", (3, 8, 36, 3)): "ResNet-152",
}


@dataclass(frozen=True)
class Layer:
    """One convolution: weight shape [Cout, Cin, k, k], stride, output size in pixels."""

    name: str
    shape: Shape
    stride: int
    padding: int
    h_out: int
    w_out: int

    @property
    def pixels(self) -> int:
        return self.h_out * self.w_out


@dataclass(frozen=True)
class Network:
    """layers in execution order; stem and blocks name the layers whose channels are followed.

    blocks: (name, names of the main path, name of the downsample or None).
    """

    architecture: str
    layers: tuple[Layer, ...]
    stem: tuple[str, ...]
    blocks: tuple[tuple[str, tuple[str, ...], str | None], ...]
    notes: tuple[str, ...] = ()


def _fail(reason: str) -> MaskError:
    return MaskError(
        f"the architecture cannot be inferred from the masks: {reason}. Name the network the masks "
        "were made for: opentrans inspect FILE --arch timm:NAME (RN50, torchvision:NAME), or "
        "audit(masks, model)."
    )


def infer_network(masks: Mapping[str, torch.Tensor], input_size: tuple[int, int]) -> Network:
    """The network of a mask file, sizes for one image of ``input_size`` (H, W).

    Convolutions of the trunk without a mask are filled in where the neighbours fix their shape.
    Raises MaskError if names or shapes fit no known layout, or the image is too small.
    """
    shapes = {n: tuple(m.shape) for n, m in masks.items() if m.ndim == 4}
    found = {n: match for n in shapes if (match := BLOCK_CONV.match(n)) is not None}
    if not found:
        some = ", ".join(list(masks)[:3])
        raise _fail(f"no name looks like layer1.0.conv1 (names: {some}, ...)")
    prefixes = Counter(m["prefix"] for m in found.values()).most_common(2)
    prefix = prefixes[0][0]
    if len(prefixes) > 1 and prefixes[0][1] == prefixes[1][1]:
        names = " and ".join(p.rstrip(".") or "(no prefix)" for p, _ in prefixes)
        one = next(p for p, _ in prefixes if p).rstrip(".")
        raise _fail(f"they are of two networks, {names}; FILE:{one} reads one of them")
    found = {n: m for n, m in found.items() if m["prefix"] == prefix}
    counts = _block_counts(found)
    kind = "bottleneck" if any(m["role"] == "conv3" for m in found.values()) else "basic"
    clip = _is_clip(prefix, shapes, found, kind)
    walk = _Walk(prefix, shapes, kind, clip, input_size)
    walk.stem()
    for stage, count in enumerate(counts, 1):
        for index in range(count):
            walk.block(stage, index, last=index + 1 == count)
    first = shapes.get(f"{prefix}layer1.0.conv2")
    width = first[0] if first is not None else walk.layers[-1].shape[0]
    names = CLIP_NAMES if clip else RESNET_NAMES
    key = (width, tuple(counts)) if clip else (kind, tuple(counts))
    style = "CLIP" if clip else "torchvision"
    blocks = "-".join(map(str, counts))
    architecture = names.get(key, f"{style}-style ResNet, blocks {blocks}")  # type: ignore[call-overload]
    known = {layer.name for layer in walk.layers}
    notes = list(walk.notes)
    outside = [n for n in masks if n not in known]
    if outside:
        shown = ", ".join(outside[:3]) + (", ..." if len(outside) > 3 else "")
        notes.append(
            f"{len(outside)} masks outside the trunk are not audited, their image size is unknown "
            f"without a model: {shown}"
        )
    return Network(
        architecture, tuple(walk.layers), walk.stem_names, tuple(walk.blocks), tuple(notes)
    )


def _block_counts(found: Mapping[str, re.Match[str]]) -> list[int]:
    """Blocks per stage; stages and indices must be complete."""
    seen = sorted({(int(m["stage"]), int(m["index"])) for m in found.values()})
    counts: list[int] = []
    for stage, index in seen:
        if stage == len(counts) + 1 and index == 0:
            counts.append(1)
        elif stage == len(counts) and index == counts[-1]:
            counts[-1] += 1
        else:
            raise _fail(f"layer{stage}.{index} is there but the block before it is not")
    return counts


def _is_clip(
    prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, re.Match[str]],
    kind: str,
) -> bool:
    """CLIP layout (True) or torchvision (False); an error when nothing decides."""
    if f"{prefix}conv2" in shapes or f"{prefix}conv3" in shapes:
        return True
    conv1 = shapes.get(f"{prefix}conv1")
    if conv1 is not None and conv1[2] in (3, 7):
        return conv1[2] == 3
    if kind == "basic":
        return False
    if any(m["position"] == "1" for m in found.values()):
        return True  # position 0 is the average pool
    raise _fail(
        "without a mask for a stem convolution (conv1, conv2 or conv3) CLIP and torchvision "
        "layouts look the same"
    )


class _Walk:
    """Follows one image through the network, shapes only."""

    def __init__(
        self,
        prefix: str,
        shapes: Mapping[str, tuple[int, ...]],
        kind: str,
        clip: bool,
        input_size: tuple[int, int],
    ) -> None:
        self.prefix, self.shapes, self.kind, self.clip = prefix, shapes, kind, clip
        self.size = input_size
        self.input_size = input_size
        self.width = 0
        self.layers: list[Layer] = []
        self.blocks: list[tuple[str, tuple[str, ...], str | None]] = []
        self.stem_names: tuple[str, ...] = ()
        self.notes: list[str] = []

    def _conv(self, name: str, expect: tuple[int | None, int | None, int], stride: int) -> Layer:
        """Append one convolution. ``expect``: (Cout, Cin, k), None where any value is fine."""
        cout, cin, k = expect
        shape = self.shapes.get(name)
        if shape is None:
            if cout is None or cin is None:
                raise _fail(f"{name} has no mask and its neighbours do not fix its shape")
            shape = (cout, cin, k, k)
            self.notes.append(f"{name} has no mask; counted as dense {list(shape)}")
        wanted = (cout or shape[0], cin or shape[1], k, k)
        if shape != wanted:
            raise _fail(f"{name} has shape {list(shape)} where its neighbours need {list(wanted)}")
        padding = k // 2
        height, width = ((v + 2 * padding - k) // stride + 1 for v in self.size)
        self._check(height, width)
        self.size = (height, width)
        layer = Layer(name, shape, stride, padding, height, width)  # type: ignore[arg-type]
        self.layers.append(layer)
        return layer

    def _check(self, height: int, width: int) -> None:
        if height < 1 or width < 1:
            raise MaskError(
                f"input size {self.input_size[0]}x{self.input_size[1]} is too small: the feature "
                "map vanishes on the way. Use at least 32x32."
            )

    def _pool(self, size: int) -> None:
        self.size = (self.size[0] // size, self.size[1] // size)
        self._check(*self.size)

    def _first(self, *options: tuple[str, int]) -> int | None:
        """The first known dimension among (layer name, axis)."""
        for name, axis in options:
            if name in self.shapes:
                return self.shapes[name][axis]
        return None

    def stem(self) -> None:
        p = self.prefix
        out = self._first((f"{p}layer1.0.conv1", 1), (f"{p}layer1.0.downsample.0", 1))
        if not self.clip:
            self._conv(f"{p}conv1", (out, 3, 7), 2)
            self.size = ((self.size[0] - 1) // 2 + 1, (self.size[1] - 1) // 2 + 1)  # 3x3 max pool
            self.stem_names = (f"{p}conv1",)
        else:
            one = self._first((f"{p}conv1", 0), (f"{p}conv2", 1))
            two = self._first((f"{p}conv2", 0), (f"{p}conv3", 1)) or one
            self._conv(f"{p}conv1", (one or two, 3, 3), 2)
            self._conv(f"{p}conv2", (two, one or two, 3), 1)
            self._conv(f"{p}conv3", (out, two, 3), 1)
            self._pool(2)
            self.stem_names = tuple(f"{p}conv{i}" for i in (1, 2, 3))
        self.width = self.layers[-1].shape[0]

    def block(self, stage: int, index: int, last: bool) -> None:
        name = f"{self.prefix}layer{stage}.{index}"
        following = (
            f"{self.prefix}layer{stage + 1}.0" if last else f"{name[: name.rfind('.')]}.{index + 1}"
        )
        c1, c2, c3 = (f"{name}.conv{i}" for i in (1, 2, 3))
        downs = [n for n in self.shapes if n.startswith(f"{name}.downsample.")]
        down = downs[0] if downs else f"{name}.downsample.0"
        strided = stage > 1 and index == 0
        step = 2 if strided and not self.clip else 1
        start = self.size
        tail = c3 if self.kind == "bottleneck" else c2
        out = self._first((tail, 0), (down, 0), (f"{following}.conv1", 1))
        out = self.width if out is None and index > 0 else out
        if self.kind == "bottleneck":
            one = self._first((c1, 0), (c2, 1))
            two = self._first((c2, 0), (c3, 1)) or one
            self._conv(c1, (one or two, self.width, 1), 1)
            self._conv(c2, (two, one or two, 3), step)
            if strided and self.clip:
                self._pool(2)
            last_layer = self._conv(c3, (out, two, 1), 1)
            path = (c1, c2, c3)
        else:
            one = self._first((c1, 0), (c2, 1))
            self._conv(c1, (one, self.width, 3), step)
            last_layer = self._conv(c2, (out, one, 3), 1)
            path = (c1, c2)
        end, out = self.size, last_layer.shape[0]
        needs_down = strided or out != self.width
        if downs or needs_down:
            self.size = start
            if strided and self.clip:
                self._pool(2)
            self._conv(down, (out, self.width, 1), step)
            if self.size != end:
                raise _fail(f"{down} and {tail} give different image sizes")
        self.blocks.append((name, path, down if downs or needs_down else None))
        self.size, self.width = end, out
