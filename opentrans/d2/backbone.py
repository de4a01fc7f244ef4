"""``OpenTransCLIPResNet`` in detectron2's ``BACKBONE_REGISTRY``."""

from __future__ import annotations

from typing import Any

from ..ovs.clip import RANDOM
from .config import OpenTransConfig
from .config_nodes import ConfigError
from .presence import require_detectron2
from .tower import ClipTower, tower_arguments

require_detectron2()

from detectron2.config import configurable  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ShapeSpec  # noqa: E402

__all__ = ["OpenTransCLIPResNet"]


@BACKBONE_REGISTRY.register()
class OpenTransCLIPResNet(ClipTower, Backbone):
    """:class:`~opentrans.d2.tower.ClipTower` as a detectron2 backbone.

    ``OpenTransCLIPResNet(cfg, input_shape)`` reads ``MODEL.OPENTRANS``; in Python and in LazyConfig
    files it takes the arguments of ``ClipTower``. Strides, channels and names are those of
    ``CLIPResNetWithAttention`` (res2 to res5, attn) and of FC-CLIP's ``CLIP`` (stem,
    clip_vis_dense, and clip_embedding in ``output_shape`` only).
    """

    @configurable
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: ShapeSpec) -> dict[str, Any]:
        """Arguments from a config. Raises ConfigError for what does not fit."""
        options = OpenTransConfig.from_cfg(cfg)
        if not options.WEIGHTS and not cfg.MODEL.WEIGHTS:
            raise ConfigError(
                "no weights for the CLIP tower: MODEL.OPENTRANS.WEIGHTS and MODEL.WEIGHTS are "
                "empty. Set MODEL.OPENTRANS.WEIGHTS to OpenAI's RN50.pt, an open_clip checkpoint "
                "or a state dict, MODEL.WEIGHTS to a checkpoint of the whole model, or write "
                f"MODEL.OPENTRANS.WEIGHTS {RANDOM} to start from random weights."
            )
        return tower_arguments(options)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Feature -> channels and stride."""
        return {
            name: ShapeSpec(channels=channels, stride=stride)
            for name, (channels, stride) in self.feature_shapes().items()
        }

    @property
    def size_divisibility(self) -> int:
        """0: images of any size are taken as they are."""
        return 0
