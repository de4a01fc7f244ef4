"""The frozen CLIP teacher: dense features, and embeddings of image regions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.topology import find_trunk, forward_trunk

from .regions import Regions, pool_regions

__all__ = ["DenseFeatures", "RegionEmbedding", "Teacher"]

RegionEmbedding = Literal["pooled", "masked"]
REGION_EMBEDDINGS: tuple[RegionEmbedding, ...] = ("pooled", "masked")


class DenseFeatures(nn.Module):
    """A model as a map of features: images [B, 3, H, W] -> [B, C, h, w].

    A ResNet is run up to its last stage, without the pool and head behind it, so any image size
    works. Any other model must return a map itself, or a dict or tuple whose last 4-d tensor is
    taken. Modules are looked up by name at each call, so replaced layers are used.

    To train with DistributedDataParallel, wrap *this* module in it: a bare model's trunk would run
    beside the wrapper, and its gradients would not be averaged.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        trunk = None
        if any(isinstance(m, nn.Conv2d) for m in model.modules()):
            trunk = find_trunk(model)
        self._trunk = trunk if trunk is not None and trunk.stem is not None else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Raises OpenTransError if the model returns no map."""
        if self._trunk is not None:
            return forward_trunk(self._trunk, images)[-1]
        return _last_map(self.model(images), type(self.model).__name__)


def _last_map(out: Any, name: str) -> torch.Tensor:
    parts = list(out.values()) if isinstance(out, Mapping) else out
    parts = parts if isinstance(parts, list | tuple) else [parts]
    maps = [part for part in parts if isinstance(part, torch.Tensor) and part.dim() == 4]
    if not maps:
        shapes = [
            tuple(p.shape) if isinstance(p, torch.Tensor) else type(p).__name__ for p in parts
        ]
        raise OpenTransError(
            f"{name} returned {shapes}, no map [images, channels, height, width], and is not a "
            "ResNet whose stages are known. Distillation compares regions: pass a model that "
            "returns its last feature map."
        )
    return maps[-1]


class Teacher:
    """A frozen model that says what a region should look like: R(I, M_j) of the paper.

    Not an ``nn.Module``, so that a student or distiller that holds it neither trains nor saves it.

    Args:
        tower: CLIP's visual tower (open_clip ``model.visual``) or any model that DenseFeatures
            accepts. Used in place and frozen for good: eval mode, ``requires_grad=False``.
            :meth:`copy_of` leaves the model alone.
        region: "pooled" runs the tower once per image and averages its last feature map under each
            mask, then applies the value and output projections of CLIP's attention pool. "masked"
            runs the whole tower once per *region*, on the image with everything else set to zero:
            what the released code does, at about the cost of a forward pass per region.
        accelerate: replace the tower's layers by ``opentrans_kernels.accelerate``, which pays for a
            teacher with zeros; ``report`` then tells what was done. Its conditions apply (CPU,
            float32).
        masks: pruning masks of the teacher, for ``accelerate``.
        input_size: (height, width) to plan for.
        chunk: regions per forward pass with "masked".
    """

    def __init__(
        self,
        tower: nn.Module,
        *,
        region: RegionEmbedding = "pooled",
        accelerate: bool = False,
        masks: Any = None,
        input_size: tuple[int, int] | None = None,
        chunk: int = 32,
    ) -> None:
        if region not in REGION_EMBEDDINGS:
            raise OpenTransError(
                f"Teacher has no region embedding {region!r}. Choose one of "
                f"{', '.join(REGION_EMBEDDINGS)}."
            )
        if masks is not None and not accelerate:
            raise OpenTransError(
                "Teacher: masks are used with accelerate=True only. Add it, or apply the masks to "
                "the tower yourself (masks.apply_(tower))."
            )
        self.tower = tower.eval().requires_grad_(False)
        self.region: RegionEmbedding = region
        self.chunk = chunk
        self.report: Any = None
        if accelerate:
            from opentrans_kernels import accelerate as speed_up

            self.report = speed_up(tower, masks, input_size=input_size)
        self._dense = DenseFeatures(tower)
        self._dense.eval()

    @classmethod
    def copy_of(cls, model: nn.Module, **options: Any) -> Teacher:
        """A teacher from a copy of ``model`` as it is now; ``model`` stays as it is."""
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.grad = None
        return cls(twin, **options)

    def to(self, device: torch.device | str) -> Teacher:
        """Move the tower; returns self."""
        self.tower.to(device)
        return self

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> the last feature map [B, C, h, w], without gradient."""
        if self.tower.training:
            self.tower.eval()  # a train() call on a model that holds the tower reaches it too
        return self._dense(images)

    def embed(self, pooled: torch.Tensor) -> torch.Tensor:
        """Region features [N, C] -> embeddings [N, D] in CLIP's image-text space.

        The value and output projections of the tower's attention pool, which is what that pool
        computes where all attention lies on one position; a tower without one: unchanged.
        Differentiable in ``pooled``, so a student of the same width can be read with it.
        """
        pool = getattr(self.tower, "attnpool", None)
        if pool is None or not hasattr(pool, "v_proj") or not hasattr(pool, "c_proj"):
            return pooled
        if pooled.shape[1] != pool.v_proj.in_features:
            raise OpenTransError(
                f"region features have {pooled.shape[1]} channels, the teacher's attention pool "
                f"reads {pool.v_proj.in_features}. Pass Distiller(projection=nn.Linear("
                f"{pooled.shape[1]}, {pool.c_proj.out_features})) for this student."
            )
        with torch.autocast(pooled.device.type, enabled=False):
            return pool.c_proj(pool.v_proj(pooled.to(pool.v_proj.weight.dtype)))

    @torch.no_grad()
    def embeddings(self, images: torch.Tensor, regions: Regions) -> torch.Tensor:
        """R(I, M_j) of every region: images [B, 3, H, W] -> [N, D]."""
        if self.region == "pooled" or not len(regions):
            return self.embed(pool_regions(self.features(images), regions))
        if len(images) != len(regions.counts):
            raise OpenTransError(
                f"{len(images)} images for regions of {len(regions.counts)}. Pass one batch."
            )
        masks, owner = regions.masks.to(images.device), regions.image_of().to(images.device)
        self.tower.eval()
        parts = zip(masks.split(self.chunk), owner.split(self.chunk), strict=True)
        return torch.cat([self._embed_masked(images[image], mask) for mask, image in parts])

    def _embed_masked(self, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        shown = F.adaptive_avg_pool2d(masks.to(images.dtype).unsqueeze(1), images.shape[-2:])
        size = getattr(self.tower, "image_size", None)  # an attention pool accepts one size only
        images = images * shown
        if size is not None:
            size = (size, size) if isinstance(size, int) else tuple(size)
            if tuple(images.shape[-2:]) != size:
                images = F.interpolate(images, size, mode="bilinear", antialias=True)
        out = self.tower(images)
        if not isinstance(out, torch.Tensor) or out.dim() != 2:
            raise OpenTransError(
                f"{type(self.tower).__name__} does not return one embedding [D] per image, which "
                "region='masked' needs. Use the whole visual tower with its pool, or "
                "region='pooled'."
            )
        return out
