"""Open-vocabulary segmentation on a CLIP ResNet, in plain torch: text classifier, heads, data.

Classes are names. A head gives every pixel, or every mask, an embedding in CLIP's text space, and
:class:`TextClassifier` compares it with the cached embeddings of the names. ``opentrans.d2`` builds
its detectron2 models from these parts; nothing here needs detectron2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentrans_kernels.lazy import lazy_exports

# Public name -> the module of this package that defines it. Imported when first used: the heads
# need torchvision or transformers, the data needs neither.
_EXPORTS = {
    "Clip": "clip",
    "load_clip": "clip",
    "DeepLabHead": "deeplab",
    "Split": "folder",
    "read_split": "folder",
    "write_shapes": "folder",
    "panoptic_segments": "inference",
    "semantic_scores": "inference",
    "MaskHead": "mask_head",
    "MaskHeadOptions": "mask_head",
    "SemanticQuality": "metrics",
    "Design": "saved",
    "build_segmenter": "saved",
    "load_segmenter": "saved",
    "save_segmenter": "saved",
    "PanopticQuality": "metrics",
    "MaskSegmenter": "segmenter",
    "PixelSegmenter": "segmenter",
    "TrunkFeatures": "segmenter",
    "TEMPLATES": "text",
    "TextClassifier": "text",
    "train_tiny_clip": "tiny",
    "Segmenter": "vit_segmenter",
    "build_vit_segmenter": "vit_segmenter",
    "load_vit_segmenter": "vit_segmenter",
}

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:  # "as" marks a re-export for type checkers
    from .clip import Clip as Clip
    from .clip import load_clip as load_clip
    from .deeplab import DeepLabHead as DeepLabHead
    from .folder import Split as Split
    from .folder import read_split as read_split
    from .folder import write_shapes as write_shapes
    from .inference import panoptic_segments as panoptic_segments
    from .inference import semantic_scores as semantic_scores
    from .mask_head import MaskHead as MaskHead
    from .mask_head import MaskHeadOptions as MaskHeadOptions
    from .metrics import PanopticQuality as PanopticQuality
    from .metrics import SemanticQuality as SemanticQuality
    from .saved import Design as Design
    from .saved import build_segmenter as build_segmenter
    from .saved import load_segmenter as load_segmenter
    from .saved import save_segmenter as save_segmenter
    from .segmenter import MaskSegmenter as MaskSegmenter
    from .segmenter import PixelSegmenter as PixelSegmenter
    from .segmenter import TrunkFeatures as TrunkFeatures
    from .text import TEMPLATES as TEMPLATES
    from .text import TextClassifier as TextClassifier
    from .tiny import train_tiny_clip as train_tiny_clip
    from .vit_segmenter import Segmenter as Segmenter
    from .vit_segmenter import build_vit_segmenter as build_vit_segmenter
    from .vit_segmenter import load_vit_segmenter as load_vit_segmenter

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
