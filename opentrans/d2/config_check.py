"""Which values of ``MODEL.OPENTRANS`` go together; the rules of the parts are asked, not copied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentrans_kernels.errors import OpenTransError, PlanError

from .config_nodes import ConfigError
from .config_options import (
    DEVICE_POLICIES,
    FEATURES,
    NODE,
    NORM_POLICIES,
    ImpOptions,
    Options,
)

if TYPE_CHECKING:
    from ..imp.config import ImpConfig

__all__ = ["check", "imp_config"]

STAGES = 4


def check(config: Options) -> None:
    """Raise ConfigError with the key, the value and what to write instead."""
    _tower(config)
    _mask(config)
    _freeze(config)
    _imp(config)
    _acceleration(config)
    cache = config.TEXT_CACHE
    for key in ("MAX_ROWS", "CHUNK"):
        if getattr(cache, key) < 1:
            raise _wrong(f"TEXT_CACHE.{key}", getattr(cache, key), "must be 1 or more")


def imp_config(options: ImpOptions, extra: dict[str, object] | None = None) -> ImpConfig:
    """The settings of a pruning run. Raises ConfigError for values that are not possible."""
    from ..imp.allocation import Allocation
    from ..imp.config import ImpConfig
    from ..imp.patterns import Pattern
    from ..imp.schedule import ImpSchedule

    try:
        return ImpConfig(
            schedule=ImpSchedule(
                rounds=options.ROUNDS,
                rate=options.RATE,
                target_density=options.TARGET_DENSITY or None,
                period=options.PERIOD,
                first_after=options.FIRST_AFTER or None,
            ),
            allocation=Allocation(options.ALLOCATION),
            pattern=Pattern(options.PATTERN),
            rewind=None if options.REWIND < 0 else options.REWIND,
            extra=dict(extra or {}),
        )
    except PlanError as error:
        raise ConfigError(f"MODEL.{NODE}.IMP: {error}") from error


def _wrong(key: str, value: object, reason: str) -> ConfigError:
    return ConfigError(f"MODEL.{NODE}.{key}={value!r} {reason}.")


def _tower(config: Options) -> None:
    if not config.ARCH:
        raise _wrong("ARCH", config.ARCH, "names no tower. Write for instance RN50")
    if config.WIDTH < 0 or config.WIDTH % 16:
        raise _wrong(
            "WIDTH", config.WIDTH, "must be a multiple of 16, or 0 for the width of the arch"
        )
    if config.LAYERS and (
        len(config.LAYERS) != STAGES
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in config.LAYERS)
    ):
        raise _wrong(
            "LAYERS", config.LAYERS, f"must be {STAGES} numbers of blocks, such as [3, 4, 6, 3]"
        )
    if config.OUTPUT_DIM < 0:
        raise _wrong("OUTPUT_DIM", config.OUTPUT_DIM, "must be 0 (the arch's) or more")
    if config.INPUT_RESOLUTION < 0 or config.INPUT_RESOLUTION % 32:
        raise _wrong("INPUT_RESOLUTION", config.INPUT_RESOLUTION, "must be a multiple of 32, or 0")
    unknown = [name for name in config.OUT_FEATURES if name not in FEATURES]
    if (
        unknown
        or not config.OUT_FEATURES
        or len(set(config.OUT_FEATURES)) != len(config.OUT_FEATURES)
    ):
        raise _wrong(
            "OUT_FEATURES", config.OUT_FEATURES, f"must be different ones of {', '.join(FEATURES)}"
        )


def _mask(config: Options) -> None:
    mask = config.MASK
    if mask.AT < 0:
        raise _wrong("MASK.AT", mask.AT, "must be a number of steps, 0 or more")
    if mask.REMOVE_AT >= 0 and mask.REMOVE_AT <= mask.AT:
        raise _wrong(
            "MASK.REMOVE_AT", mask.REMOVE_AT, f"must lie behind MASK.AT={mask.AT}, or be -1"
        )
    if mask.FILE:
        from opentrans_kernels.synthetic import is_mask_spec, parse_mask_spec

        if is_mask_spec(mask.FILE):
            try:
                parse_mask_spec(mask.FILE)
            except OpenTransError as error:
                raise ConfigError(f"MODEL.{NODE}.MASK.FILE: {error}") from error
    elif mask.AT or mask.REMOVE_AT >= 0:
        raise _wrong("MASK.FILE", mask.FILE, "is empty, so MASK.AT and REMOVE_AT mean nothing")


def _freeze(config: Options) -> None:
    from opentrans_kernels.spectrum.rules import check_fit

    from ..freeze import parse_rule

    freeze = config.FREEZE
    if freeze.NORMS not in NORM_POLICIES:
        raise _wrong("FREEZE.NORMS", freeze.NORMS, f"must be one of {', '.join(NORM_POLICIES)}")
    if freeze.AT < 0:
        raise _wrong("FREEZE.AT", freeze.AT, "must be a number of steps, 0 or more")
    if freeze.RULE and freeze.PLAN:
        raise _wrong(
            "FREEZE.PLAN", freeze.PLAN, f"and FREEZE.RULE={freeze.RULE!r} exclude each other"
        )
    if freeze.AT and not (freeze.RULE or freeze.PLAN):
        raise _wrong("FREEZE.AT", freeze.AT, "without FREEZE.RULE or PLAN freezes nothing")
    if freeze.SKIP and not (freeze.RULE or freeze.PLAN):
        raise _wrong("FREEZE.SKIP", True, "needs FREEZE.RULE or FREEZE.PLAN")
    if freeze.SKIP and freeze.NORMS != "frozen":
        raise _wrong("FREEZE.SKIP", True, f"needs FREEZE.NORMS frozen, got {freeze.NORMS!r}")
    if freeze.SKIP and freeze.AT:
        raise _wrong(
            "FREEZE.SKIP", True, f"works from the first step on, and FREEZE.AT is {freeze.AT}. "
            "Set FREEZE.AT 0"
        )  # fmt: skip
    mask = config.MASK
    if freeze.SKIP and (mask.AT or mask.REMOVE_AT >= 0):
        raise _wrong(
            "FREEZE.SKIP", True, "is planned for the zeros of the first step, and MASK.AT="
            f"{mask.AT}, REMOVE_AT={mask.REMOVE_AT} change them later. Set MASK.AT 0 and "
            "MASK.REMOVE_AT -1, or FREEZE.SKIP False"
        )  # fmt: skip
    try:
        check_fit(freeze.FIT, 2.0, 100)
        if freeze.RULE:
            options: dict[str, object] = {}
            row = parse_rule(freeze.RULE, options)
    except OpenTransError as error:
        raise ConfigError(f"MODEL.{NODE}.FREEZE: {error}") from error
    if not freeze.RULE:
        return
    if row.name == "opentrans":
        raise _wrong(
            "FREEZE.RULE", freeze.RULE, "makes every other parameter trainable again, which would "
            "undo what the model froze. Use median: the same layers, by exact name"
        )  # fmt: skip
    ratio = options.get("ratio")
    if isinstance(ratio, float) and not 0.0 < ratio < 1.0:
        raise _wrong(
            "FREEZE.RULE", freeze.RULE, f"freezes {'everything' if ratio >= 1 else 'nothing'}. Use "
            "a share between 0 and 1"
        )  # fmt: skip


def _imp(config: Options) -> None:
    imp_config(config.IMP)
    if config.IMP.ENABLED and (config.MASK.AT or config.MASK.REMOVE_AT >= 0):
        raise _wrong(
            "IMP.ENABLED", True, "prunes from MASK.FILE on; MASK.AT must be 0 and MASK.REMOVE_AT -1"
        )
    if config.IMP.ENABLED and config.FREEZE.SKIP:
        raise _wrong("IMP.ENABLED", True, "changes the zeros FREEZE.SKIP was planned for. Use one")
    if config.IMP.ENABLED and not config.IMP.OUTPUT:
        raise _wrong("IMP.OUTPUT", "", "must name a folder for the mask files")


def _acceleration(config: Options) -> None:
    options = config.ACCELERATE
    if options.ENABLED and config.FREEZE.SKIP:
        raise _wrong(
            "ACCELERATE.ENABLED", True, "and FREEZE.SKIP=True both replace the tower's layers. "
            "Use one while training, and accelerate in a run with --eval-only"
        )  # fmt: skip
    if options.DEVICE not in DEVICE_POLICIES:
        raise _wrong(
            "ACCELERATE.DEVICE", options.DEVICE, f"must be one of {', '.join(DEVICE_POLICIES)}"
        )
    size = options.INPUT_SIZE
    if len(size) != 2 or not all(isinstance(n, int) and n >= 32 for n in size):
        raise _wrong(
            "ACCELERATE.INPUT_SIZE", size, "must be [height, width] in pixels, 32 at least"
        )
    if options.THREADS < 0:
        raise _wrong("ACCELERATE.THREADS", options.THREADS, "must be 0 (torch's setting) or more")
