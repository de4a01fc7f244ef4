"""Pictures in, labels and overlays out: what ``opentrans segment`` does, for use from Python.

One picture is read, segmented and written by ``job``; ``folder`` says what is done already;
``pool`` and ``ray_data`` do the same in several processes. ``systems`` builds a model from files.
"""

from __future__ import annotations

from opentrans_kernels.lazy import lazy_exports

# Public name -> the module of this package that defines it.
_EXPORTS = {
    "OutputFolder": "folder",
    "Picture": "pictures",
    "Recipe": "recipe",
    "Segmenter": "systems",
    "build": "systems",
    "find_pictures": "pictures",
    "labels_of": "labels",
    "parse_classes": "vocabulary",
    "read_picture": "pictures",
    "segment_picture": "job",
    "work_in_processes": "pool",
    "work_with_ray": "ray_data",
}

__all__ = sorted(_EXPORTS)

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
