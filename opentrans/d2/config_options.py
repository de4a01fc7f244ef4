"""Names, defaults and meaning of every option of ``MODEL.OPENTRANS``: the one place of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from .config_nodes import option

__all__ = [
    "DEVICE_POLICIES",
    "FEATURES",
    "NODE",
    "NORM_POLICIES",
    "AccelerateOptions",
    "FreezeOptions",
    "ImpOptions",
    "MaskOptions",
    "Options",
    "TextCacheOptions",
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
    HEADS: bool = option(True, "the known parts of the head, too: docs/fc-clip.md")
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
class Options:
    """``MODEL.OPENTRANS``, unchecked."""

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
