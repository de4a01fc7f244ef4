"""Distillation from a frozen CLIP teacher over image regions, without segmentation labels.

A Teacher says what each region of an image should look like, a Distiller compares the student
with it, and TextCache keeps the embeddings of the frozen text encoder, which would otherwise cost
more than the network that is trained.
"""

from __future__ import annotations

from .distiller import Distiller, Objective
from .losses import TextForm, TextGuidedLoss, VisualGuidedLoss
from .regions import Regions, pool_regions
from .teacher import DenseFeatures, RegionEmbedding, Teacher
from .text import CacheStats, TextCache

__all__ = [
    "CacheStats",
    "DenseFeatures",
    "Distiller",
    "Objective",
    "RegionEmbedding",
    "Regions",
    "Teacher",
    "TextCache",
    "TextForm",
    "TextGuidedLoss",
    "VisualGuidedLoss",
    "pool_regions",
]
