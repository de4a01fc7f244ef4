"""Trained networks that packages ship, as plain torch modules, and photographs to try them on.

The public names are imported when they are first used: the catalog and the fetching need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentrans_kernels.lazy import lazy_exports

# Public name -> the module of this package that defines it.
_EXPORTS = {
    "NETWORKS": "catalog",
    "Network": "catalog",
    "Crops": "crops",
    "fetch": "fetch",
    "load_efficientnet_lite0": "efficientnet",
    "load_focus": "focus",
    "load_hed": "hed",
    "load_resnet_half": "resnet_half",
    "Loaded": "load",
    "load": "load",
    "Photograph": "photographs",
    "folder_photographs": "photographs",
    "photographs": "photographs",
    "pixels": "crops",
    "shipped": "shipped",
}

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:  # "as" marks a re-export for type checkers
    from .catalog import NETWORKS as NETWORKS
    from .catalog import Network as Network
    from .crops import Crops as Crops
    from .crops import pixels as pixels
    from .efficientnet import load_efficientnet_lite0 as load_efficientnet_lite0
    from .fetch import fetch as fetch
    from .focus import load_focus as load_focus
    from .hed import load_hed as load_hed
    from .load import Loaded as Loaded
    from .load import load as load
    from .photographs import Photograph as Photograph
    from .photographs import folder_photographs as folder_photographs
    from .photographs import photographs as photographs
    from .resnet_half import load_resnet_half as load_resnet_half
    from .shipped import shipped as shipped

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
