"""The CUDA path: plan a whole trunk by measurement, pack it, run it in CUDA graphs.

Device-agnostic but for timer and graphs: on the CPU the same plans run on the reference kernels,
which is how their exactness is tested.
"""

from __future__ import annotations

from .cache import TuneCache, default_folder
from .graphs import GraphCache
from .kernels import Place
from .network import describe_network
from .plan import TrunkPlan, dense_program, plan_trunk, program_of
from .precision import PRECISIONS, Precision
from .program import Program

__all__ = [
    "PRECISIONS",
    "GraphCache",
    "Place",
    "Precision",
    "Program",
    "TrunkPlan",
    "TuneCache",
    "default_folder",
    "dense_program",
    "describe_network",
    "plan_trunk",
    "program_of",
]
