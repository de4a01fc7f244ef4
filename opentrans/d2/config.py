"""``MODEL.OPENTRANS``: every option of masks, freezing, pruning and acceleration, checked.

``config_options`` names the options, ``config_check`` says which values go together;
``OpenTransConfig.from_cfg`` reads a node back and checks it. Nothing here imports detectron2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .config_check import check
from .config_nodes import ConfigError, option_rows, read_options
from .config_options import NODE, Options

__all__ = ["OpenTransConfig", "config_rows", "lazy_opentrans_config"]


@dataclass(frozen=True)
class OpenTransConfig(Options):
    """``MODEL.OPENTRANS``. :meth:`from_cfg` checks; :meth:`check` for one made in Python."""

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
        check(self)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return dataclasses.asdict(self)


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
