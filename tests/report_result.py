"""A trunk's result as the report takes it, with a hostile label."""

from __future__ import annotations

from typing import Any


def spread(value: float) -> dict[str, Any]:
    return {"median": value, "q1": value * 0.9, "q3": value * 1.1}


def entry(ms: float) -> dict[str, Any]:
    return {"ms": ms, "cpu_ms": ms, "wall": spread(ms), "contended_share": 0.0}


def example_result() -> dict[str, Any]:
    row = {"density": 0.1, "dense_ms": 2.0, "sparse_ms": 0.5, "speedup": 4.0, "loses": False}
    return {
        "subject": {"arch": "RN50", "weights": "synthetic weights (seed 0)"},
        "mask": {"label": "<script>alert(1)</script>", "flop_density": 0.152},
        "banner": "SYNTHETIC weights and mask",
        "input": [1, 3, 224, 192],
        "threads": 1,
        "isa": "avx2",
        "machine": {"cpu": "Example CPU"},
        "baseline": {"name": "compile", "ms": 120.25},
        "accelerated": entry(33.4),
        "speedup": 3.6,
        "rounds": 15,
        "variants": {
            "compile": {
                "available": True,
                **entry(120.25),
                "speedup_of_accelerated": spread(3.6),
            },
            "jit_optimized": {"available": False, "error": "RuntimeError: no compiler"},
        },
        "max_rel_err": 2e-5,
        "dense_own_rel_err": 1.5e-5,
        "exact": True,
        "layers": [
            {"name": "layer1.0.conv1", **row},
            {"name": "layer1.0.conv3", **row, "speedup": 0.7, "loses": True},
        ],
        "audit": "density table",
        "plan": "plan table",
        "versions": {"torch": "2.14"},
    }
