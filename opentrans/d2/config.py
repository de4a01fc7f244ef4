"""``MODEL.OPENTRANS``: every option of masks, freezing, pruning and acceleration, checked.

The dataclasses below are the one place of names, defaults and meaning. ``add_opentrans_config``
turns them into a config node, ``OpenTransConfig.from_cfg`` reads one back and checks it. Nothing
here imports detectron2: nodes are made from the class of the config that is given.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..ovs.clip import RANDOM
from .config_nodes import ConfigError, option, option_rows, read_options, to_node

__all__ = [
    "NODE",
    "RANDOM",
    "ConfigError",
    "OpenTransConfig",
    "add_opentrans_config",
    "config_rows",
    "lazy_opentrans_config",
]

NODE = "OPENTRANS"  # below cfg.MODEL
FEATURES = ("stem", "res2", "res3", "res4", "res5", "attn", "clip_vis_dense", "clip_embedding")
NORM_POLICIES = ("frozen", "affine", "train")
DEVICE_POLICIES = ("auto", "require")


@dataclass(frozen=True)
class MaskOptions:
    """``MODEL.OPENTRANS.MASK``."""

    FILE: str = option("", "mask file, or a recipe such as global:0.90 (synthetic); empty: none")
    AT: int = option(0, "steps after which the mask is applied; 0: before the first")
    REMOVE_AT: int = option(-1, "steps after which pruned weights may grow again; -1: never")
    SAVE: bool = option(True, "save a checkpoint just before the mask is removed")


@dataclass(frozen=True)
class FreezeOptions:
    """``MODEL.OPENTRANS.FREEZE``."""

    RULE: str = option("", "a rule of docs/freezing.md, such as median or ratio:0.25; empty: none")
    PLAN: str = option("", "a file of FreezePlan.to_json instead of a rule")
    FIT: str = option("xmin_peak", "how alpha is fitted: a fit of docs/spectrum.md")
    AT: int = option(0, "steps after which the layers are frozen; 0: before the first")
    NORMS: str = option(
        "frozen",
        "batch norms of the tower: frozen (running statistics, affine frozen with its layer), "
        "affine (running statistics, affine trains), train (left alone)",
    )
    SKIP: bool = option(
        False, "keep for backward only what the trainable layers need (skip_frozen)"
    )


@dataclass(frozen=True)
class ImpOptions:
    """``MODEL.OPENTRANS.IMP``."""

    ENABLED: bool = option(False, "prune the tower while it trains")
    ROUNDS: int = option(22, "rounds at most")
    RATE: float = option(0.1, "share of the remaining weights a round removes")
    TARGET_DENSITY: float = option(0.0, "share of weights left at the end; 0: what ROUNDS lead to")
    PERIOD: int = option(1000, "steps between rounds")
    FIRST_AFTER: int = option(0, "steps before the first round; 0: PERIOD")
    ALLOCATION: str = option("global", "how a round is shared out: global, uniform, macs, latency")
    PATTERN: str = option("unstructured", "unstructured, 2:4, channel, block")
    REWIND: int = option(-1, "step whose weights are put back after each round; -1: none")
    OUTPUT: str = option("masks", "folder below OUTPUT_DIR for the mask file of every round")


@dataclass(frozen=True)
class AccelerateOptions:
    """``MODEL.OPENTRANS.ACCELERATE``."""

    ENABLED: bool = option(False, "run the masked tower on the sparse kernels during evaluation")
    DEVICE: str = option(
        "auto", "auto: where the tower is float32 on the CPU, else dense; require: else an error"
    )
    INPUT_SIZE: list[int] = option([512, 512], "height and width in pixels to plan and measure for")
    MEASURE: bool = option(True, "time every layer and keep dense what is faster dense")
    THREADS: int = option(0, "threads to plan for; 0: torch's setting")


@dataclass(frozen=True)
class TextCacheOptions:
    """``MODEL.OPENTRANS.TEXT_CACHE``."""

    ENABLED: bool = option(True, "encode every prompt of the frozen text encoder once")
    MAX_ROWS: int = option(20_000, "prompts kept")
    CHUNK: int = option(256, "prompts per run of the encoder")


@dataclass(frozen=True)
class OpenTransConfig:
    """``MODEL.OPENTRANS``. :meth:`from_cfg` checks; :meth:`check` for one made in Python."""

    ARCH: str = option("RN50", "RN50, RN101, RN50x4 or another CLIP ResNet of open_clip")
    WEIGHTS: str = option(
        "",
        "file with the tower's weights (open_clip, OpenAI TorchScript, plain state dict), or "
        "random; empty: they must come with MODEL.WEIGHTS",
    )
    WIDTH: int = option(0, "channels after the stem, a multiple of 16; 0: the arch's (64 for RN50)")
    LAYERS: list[int] = option([], "blocks per stage; empty: the arch's")
    OUTPUT_DIM: int = option(0, "channels of attn; 0: the arch's")
    INPUT_RESOLUTION: int = option(0, "side in pixels of the position table; 0: the arch's")
    OUT_FEATURES: list[str] = option(
        ["res2", "res3", "res4", "res5"], "features to return: " + ", ".join(FEATURES)
    )
    TOWER: str = option("", "module path of the CLIP tower in the model; empty: found by structure")
    REPORT: bool = option(True, "log densities, trainable parameters and multiply-adds")
    MASK: MaskOptions = field(default_factory=MaskOptions)
    FREEZE: FreezeOptions = field(default_factory=FreezeOptions)
    IMP: ImpOptions = field(default_factory=ImpOptions)
    ACCELERATE: AccelerateOptions = field(default_factory=AccelerateOptions)
    TEXT_CACHE: TextCacheOptions = field(default_factory=TextCacheOptions)

    @classmethod
    def from_cfg(cls, cfg: Any) -> OpenTransConfig:
        """Read and check a whole detectron2 config, its ``MODEL.OPENTRANS`` node, or a mapping.

        Keys may be written in lower case, as LazyConfig files do. A key that is missing has its
        default.

        Raises:
            ConfigError: unknown key, wrong type, impossible value, or no such node.
        """
        if isinstance(cfg, cls):
            return cfg.check()
        node = cfg
        if isinstance(cfg, Mapping) and "MODEL" in cfg:
            node = cfg["MODEL"].get(NODE)
            if node is None:
                raise ConfigError(
                    f"the config has no MODEL.{NODE}. Call opentrans.d2.add_opentrans_config(cfg) "
                    "after the other add_..._config calls and before cfg.merge_from_file."
                )
        if not isinstance(node, Mapping):
            raise ConfigError(
                f"{type(node).__name__} is no config. Pass the detectron2 config, its "
                f"MODEL.{NODE} node, or a dict."
            )
        return read_options(cls, node, f"MODEL.{NODE}").check()

    def check(self) -> OpenTransConfig:
        """Return self. Raises ConfigError for values that are impossible or contradict."""
        from .config_check import check

        check(self)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return dataclasses.asdict(self)


def add_opentrans_config(cfg: Any) -> None:
    """Add ``cfg.MODEL.OPENTRANS`` with its defaults; nothing else is touched.

    Call it after the ``add_..._config`` functions of the model's own project. Values are checked
    when the config is used (:meth:`OpenTransConfig.from_cfg`). Under detectron2 the backbone
    ``OpenTransCLIPResNet`` is registered too.

    Raises:
        ConfigError: the config has no MODEL node, or has MODEL.OPENTRANS already.
    """
    model = getattr(cfg, "MODEL", None)
    if model is None:
        raise ConfigError(
            "the config has no MODEL node. Start from detectron2.config.get_cfg(), then call "
            "add_opentrans_config(cfg)."
        )
    if NODE in model:
        raise ConfigError(f"MODEL.{NODE} is there already. Call add_opentrans_config only once.")
    model[NODE] = to_node(OpenTransConfig().to_dict(), type(cfg))
    if "detectron2" in sys.modules:
        importlib.import_module(".backbone", __package__)


def config_rows() -> Iterator[tuple[str, Any, str]]:
    """(key below MODEL, default, meaning) of every option, for documentation."""
    yield from option_rows(OpenTransConfig, NODE)


def lazy_opentrans_config(**options: Any) -> Any:
    """The options for a LazyConfig file, as an omegaconf node whose keys are in lower case.

    ``cfg.opentrans = lazy_opentrans_config(mask={"file": "m.safetensors"})``; overrides such as
    ``opentrans.freeze.rule=median`` then work, and ``build_opentrans_hooks(cfg.opentrans)``
    reads it.

    Raises ConfigError for options that do not exist or cannot be.
    """
    from omegaconf import OmegaConf

    values = OpenTransConfig.from_cfg(options).to_dict()
    return OmegaConf.create(_lower(values))


def _lower(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k.lower(): _lower(v) if isinstance(v, Mapping) else v for k, v in values.items()}
