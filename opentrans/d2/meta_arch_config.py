"""``MODEL.OVS``: the options of our own open-vocabulary models, beside ``MODEL.OPENTRANS``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..distill.distiller import MAX_REGIONS as MOST_REGIONS
from ..distill.distiller import OBJECTIVES
from ..distill.teacher import REGION_EMBEDDINGS
from ..ovs.mask_head import MaskHeadOptions
from ..ovs.text import START_SCALE, TEMPLATES
from .config import OpenTransConfig
from .config_nodes import ConfigError, option, option_rows, read_options, to_node

__all__ = ["OPTIMIZERS", "OVS", "OvsConfig", "add_ovs_config", "ovs_rows"]

OVS = "OVS"  # below cfg.MODEL
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
REGIONS = ("labels", "grid")
PIXEL_HEADS = ("DeepLabV3PlusHead", "DeepLabV3Head")


@dataclass(frozen=True)
class MaskHeadKeys:
    """``MODEL.OVS.MASK_HEAD``: see ``opentrans.ovs.MaskHeadOptions``."""

    DIM: int = option(MaskHeadOptions.dim, "channels, a multiple of 32")
    HEADS: int = option(MaskHeadOptions.heads, "attention heads")
    FEEDFORWARD: int = option(
        MaskHeadOptions.feedforward, "hidden channels of the transformer decoder"
    )
    ENCODER_FEEDFORWARD: int = option(
        MaskHeadOptions.encoder_feedforward, "hidden channels of the pixel decoder"
    )
    ENCODER_LAYERS: int = option(
        MaskHeadOptions.encoder_layers, "deformable layers of the pixel decoder"
    )
    DECODER_LAYERS: int = option(
        MaskHeadOptions.decoder_layers, "layers of the transformer decoder"
    )
    QUERIES: int = option(MaskHeadOptions.queries, "masks per image")
    POINTS: int = option(MaskHeadOptions.points, "pixels sampled per mask in the loss")
    CLASS_WEIGHT: float = option(MaskHeadOptions.class_weight, "weight of the classification loss")
    MASK_WEIGHT: float = option(MaskHeadOptions.mask_weight, "weight of the binary mask loss")
    DICE_WEIGHT: float = option(MaskHeadOptions.dice_weight, "weight of the dice loss")
    NO_OBJECT_WEIGHT: float = option(
        MaskHeadOptions.no_object_weight, "weight of queries without an object"
    )


@dataclass(frozen=True)
class DistillKeys:
    """``MODEL.OVS.DISTILL``: see ``opentrans.Distiller``."""

    LOSS: str = option("opentrans", "objective: opentrans, paper, visual")
    REGIONS: str = option(
        "labels", "labels: the classes of each image; grid: boxes, no labels used"
    )
    REGION: str = option("pooled", "teacher embedding of a region: pooled or masked")
    KD_WEIGHT: float = option(10.0, "weight of the loss")
    TEXT_KD_WEIGHT: float = option(
        0.0, "weight of the text part alone; 0: one mean over both parts"
    )
    MAX_REGIONS: int = option(MOST_REGIONS, "regions per step and process")


@dataclass(frozen=True)
class PanopticKeys:
    """``MODEL.OVS.PANOPTIC``."""

    ENABLED: bool = option(
        False, "train with one mask per object, and evaluate panoptic quality too"
    )
    LEAST_SCORE: float = option(0.5, "queries of a lower class probability are dropped")
    LEAST_OVERLAP: float = option(0.8, "share of its mask that a segment must keep")


@dataclass(frozen=True)
class OvsConfig:
    """``MODEL.OVS``."""

    CLIP_ARCH: str = option("", "CLIP whose text encoder is used; empty: MODEL.OPENTRANS.ARCH")
    CLIP_WEIGHTS: str = option(
        "",
        "the whole CLIP: a file, a tag that open_clip downloads, or random; empty: the file of "
        "MODEL.OPENTRANS.WEIGHTS",
    )
    TEMPLATES: list[str] = option(list(TEMPLATES), "prompts; {} stands for the class")
    SCALE: float = option(START_SCALE, "what cosines are multiplied with at the start")
    OPTIMIZER: str = option("AdamW", "AdamW or SGD")
    BACKBONE_MULTIPLIER: float = option(
        0.1,
        "learning rate of the tower, relative to BASE_LR; 0: it is frozen as a whole, as FC-CLIP's",
    )
    DATA_FOLDER: str = option(
        "", "folder of docs/tiny-run.md, registered as FOLDER_SPLIT; or empty"
    )
    PROJECT_CHANNELS: int = option(48, "channels of the shallow features in the DeepLab decoder")
    MASK_HEAD: MaskHeadKeys = field(default_factory=MaskHeadKeys)
    DISTILL: DistillKeys = field(default_factory=DistillKeys)
    PANOPTIC: PanopticKeys = field(default_factory=PanopticKeys)

    @classmethod
    def from_cfg(cls, cfg: Any) -> OvsConfig:
        """Read and check. Raises ConfigError: unknown key, wrong type, impossible value."""
        node = cfg.MODEL.get(OVS) if isinstance(cfg, Mapping) and "MODEL" in cfg else None
        if node is None:
            raise ConfigError(
                f"the config has no MODEL.{OVS}. Call opentrans.d2.meta_arch_config."
                "add_ovs_config(cfg) before cfg.merge_from_file."
            )
        options: OvsConfig = read_options(cls, node, f"MODEL.{OVS}")
        options._check()
        return options

    def clip(self, options: OpenTransConfig) -> tuple[str, str]:
        """Weights and arch of the CLIP, for ``load_clip``."""
        return self.CLIP_WEIGHTS or options.WEIGHTS, self.CLIP_ARCH or options.ARCH

    def _check(self) -> None:
        choices = (
            ("OPTIMIZER", self.OPTIMIZER, OPTIMIZERS),
            ("DISTILL.REGIONS", self.DISTILL.REGIONS, REGIONS),
            ("DISTILL.REGION", self.DISTILL.REGION, REGION_EMBEDDINGS),
            ("DISTILL.LOSS", self.DISTILL.LOSS, OBJECTIVES),
        )
        for key, value, allowed in choices:
            if value not in allowed:
                raise ConfigError(
                    f"MODEL.{OVS}.{key}={value!r} must be one of {', '.join(allowed)}."
                )
        if self.BACKBONE_MULTIPLIER < 0:
            raise ConfigError(
                f"MODEL.{OVS}.BACKBONE_MULTIPLIER={self.BACKBONE_MULTIPLIER} must be 0 or more."
            )
        if not self.TEMPLATES:
            raise ConfigError(f"MODEL.{OVS}.TEMPLATES is empty. Write for instance ['{{}}'].")


def add_ovs_config(cfg: Any) -> None:
    """Add ``cfg.MODEL.OVS`` with its defaults. Raises ConfigError if it is there already."""
    if OVS in cfg.MODEL:
        raise ConfigError(f"MODEL.{OVS} is there already. Call add_ovs_config only once.")
    cfg.MODEL[OVS] = to_node(asdict(OvsConfig()), type(cfg))


def ovs_rows() -> Iterator[tuple[str, Any, str]]:
    """(key below MODEL, default, meaning) of every option, for documentation."""
    yield from option_rows(OvsConfig, OVS)
