"""``MODEL.OVS``: the options of our own open-vocabulary models, beside ``MODEL.OPENTRANS``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..ovs.text import TEMPLATES
from .config import ConfigError, OpenTransConfig, _key, _node, _read, _rows

__all__ = ["OVS", "OvsConfig", "add_ovs_config", "ovs_rows"]

OVS = "OVS"  # below cfg.MODEL
OPTIMIZERS = ("AdamW", "SGD")
REGIONS = ("labels", "grid")
OBJECTIVES = ("opentrans", "paper", "visual")
PIXEL_HEADS = ("DeepLabV3PlusHead", "DeepLabV3Head")


@dataclass(frozen=True)
class MaskHeadKeys:
    """``MODEL.OVS.MASK_HEAD``: see ``opentrans.ovs.MaskHeadOptions``."""

    DIM: int = _key(256, "channels, a multiple of 32")
    HEADS: int = _key(8, "attention heads")
    FEEDFORWARD: int = _key(2048, "hidden channels of the transformer decoder")
    ENCODER_FEEDFORWARD: int = _key(1024, "hidden channels of the pixel decoder")
    ENCODER_LAYERS: int = _key(6, "deformable layers of the pixel decoder")
    DECODER_LAYERS: int = _key(10, "layers of the transformer decoder")
    QUERIES: int = _key(100, "masks per image")
    POINTS: int = _key(12544, "pixels sampled per mask in the loss")
    CLASS_WEIGHT: float = _key(2.0, "weight of the classification loss")
    MASK_WEIGHT: float = _key(5.0, "weight of the binary mask loss")
    DICE_WEIGHT: float = _key(5.0, "weight of the dice loss")
    NO_OBJECT_WEIGHT: float = _key(0.1, "weight of queries without an object")


@dataclass(frozen=True)
class DistillKeys:
    """``MODEL.OVS.DISTILL``: see ``opentrans.Distiller``."""

    LOSS: str = _key("opentrans", "objective: opentrans, paper, visual")
    REGIONS: str = _key("labels", "labels: the classes of each image; grid: boxes, no labels used")
    REGION: str = _key("pooled", "teacher embedding of a region: pooled or masked")
    KD_WEIGHT: float = _key(10.0, "weight of the loss")
    TEXT_KD_WEIGHT: float = _key(0.0, "weight of the text part alone; 0: one mean over both parts")
    MAX_REGIONS: int = _key(200, "regions per step and process")


@dataclass(frozen=True)
class PanopticKeys:
    """``MODEL.OVS.PANOPTIC``."""

    ENABLED: bool = _key(False, "train with one mask per object, and evaluate panoptic quality too")
    LEAST_SCORE: float = _key(0.5, "queries of a lower class probability are dropped")
    LEAST_OVERLAP: float = _key(0.8, "share of its mask that a segment must keep")


@dataclass(frozen=True)
class OvsConfig:
    """``MODEL.OVS``."""

    CLIP_ARCH: str = _key("", "CLIP whose text encoder is used; empty: MODEL.OPENTRANS.ARCH")
    CLIP_WEIGHTS: str = _key(
        "",
        "the whole CLIP: a file, a tag that open_clip downloads, or random; empty: the file of "
        "MODEL.OPENTRANS.WEIGHTS",
    )
    TEMPLATES: list[str] = _key(list(TEMPLATES), "prompts; {} stands for the class")
    SCALE: float = _key(14.3, "what cosines are multiplied with at the start")
    OPTIMIZER: str = _key("AdamW", "AdamW or SGD")
    BACKBONE_MULTIPLIER: float = _key(0.1, "learning rate of the tower, relative to BASE_LR")
    DATA_FOLDER: str = _key("", "folder of docs/tiny-run.md, registered as FOLDER_SPLIT; or empty")
    PROJECT_CHANNELS: int = _key(48, "channels of the shallow features in the DeepLab decoder")
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
        options: OvsConfig = _read(cls, node, f"MODEL.{OVS}")
        options._check()
        return options

    def clip(self, options: OpenTransConfig) -> tuple[str, str]:
        """Weights and arch of the CLIP, for ``load_clip``."""
        return self.CLIP_WEIGHTS or options.WEIGHTS, self.CLIP_ARCH or options.ARCH

    def _check(self) -> None:
        choices = (
            ("OPTIMIZER", self.OPTIMIZER, OPTIMIZERS),
            ("DISTILL.REGIONS", self.DISTILL.REGIONS, REGIONS),
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
    cfg.MODEL[OVS] = _node(asdict(OvsConfig()), type(cfg))


def ovs_rows() -> Iterator[tuple[str, Any, str]]:
    """(key below MODEL, default, meaning) of every option, for documentation."""
    yield from _rows(OvsConfig, OVS)
