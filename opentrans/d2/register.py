"""``MODEL.OPENTRANS`` in a config, and the backbone in detectron2's registry."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from typing import Any

from .config_nodes import ConfigError, to_node
from .config_options import NODE, Options

__all__ = ["add_opentrans_config"]


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
    model[NODE] = to_node(dataclasses.asdict(Options()), type(cfg))
    if "detectron2" in sys.modules:
        importlib.import_module(".backbone", __package__)
