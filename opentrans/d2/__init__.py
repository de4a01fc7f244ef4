"""OpenTrans for detectron2: config keys, a backbone, hooks, and ``attach`` for built models.

Public names are imported when they are first used. Only what registers itself with detectron2
(``OpenTransCLIPResNet``, the hooks) needs detectron2; where it is missing or too old, using such a
name raises one error that says how to get it.
"""

from __future__ import annotations

from opentrans_kernels.lazy import lazy_exports

# Public name -> the module of this package that defines it.
_EXPORTS = {
    "AccelerateForEvalHook": "hooks",
    "AlphaFreezeHook": "hooks",
    "Attachment": "attachment",
    "ClipTower": "tower",
    "ConfigError": "config_nodes",
    "DetectronMissing": "presence",
    "IMPHook": "hooks",
    "MaskHook": "hooks",
    "ReportHook": "hooks",
    "OpenTransCLIPResNet": "backbone",
    "OpenTransConfig": "config",
    "add_opentrans_config": "register",
    "attach": "attachment",
    "attach_from_config": "attachment",
    "build_opentrans_hooks": "hooks",
    "fvcore_handles": "analysis",
    "find_tower": "towers",
    "lazy_opentrans_config": "config",
    "pool_positions": "tower",
    "register_with_fvcore": "analysis",
    "require_detectron2": "presence",
    "unwrap": "towers",
}

__all__ = sorted(_EXPORTS)

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
