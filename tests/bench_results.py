"""Small valid result files of every kind, for tests of schema, comparison and report."""

from __future__ import annotations

import copy
from typing import Any

MACHINE = {
    "cpu": "AMD EPYC",
    "architecture": "x86_64",
    "flags": ["avx2", "avx512f", "fma"],
    "cpus": 2,
    "caches": {"L1d": "32K", "L2": "1024K"},
}


def spread(median: float, width: float = 0.02) -> dict[str, Any]:
    return {"median": median, "q1": median * (1 - width), "q3": median * (1 + width), "n": 5}


def timing(ms: float) -> dict[str, Any]:
    return {
        "ms": ms, "cpu_ms": ms, "wall": spread(ms), "cpu": spread(ms), "contended_share": 0.0
    }  # fmt: skip


def envelope(kind: str) -> dict[str, Any]:
    reading = {"wall_ms": spread(1.0), "gflops": 100.0, "contended_share": 0.0}
    return {
        "schema": {"kind": kind, "version": 2},
        "complete": True,
        "canary": {
            "disturbed": False, "reasons": [], "drift": 0.01, "before": reading, "after": reading
        },
        "machine": copy.deepcopy(MACHINE),
        "versions": {"torch": "2.14.1", "opentrans_kernels": "0.1.0"},
        "source": {"commit": "0123456789abcdef", "dirty": False},
        "threads": 1,
        "isa": "avx2",
        "opentrans_cpu_capability": "avx2",
    }  # fmt: skip


def layer(name: str, dense: float = 2.0, sparse: float = 1.0, **changes: Any) -> dict[str, Any]:
    row = {
        "name": name, "cin": 64, "cout": 256, "kernel": 1, "stride": 1, "h_out": 56, "w_out": 56,
        "density": 0.5, "nnz": 8192, "dense_ms": dense, "sparse_ms": sparse,
        "speedup": dense / sparse, "speedup_q1": dense / sparse * 0.98,
        "speedup_q3": dense / sparse * 1.02, "dense_kind": "onednn_prepacked", "clock": "cpu",
        "error": 1e-7, "dense_error": 1e-7, "loses": dense < sparse, "exact": True,
    }  # fmt: skip
    return row | changes


def trunk(ms: float = 25.0, threads: int = 1, size: int = 224, batch: int = 1) -> dict[str, Any]:
    """A trunk result: dense 100 ms, ours ``ms``."""
    variants = {
        name: {"available": True, **timing(dense), "speedup_of_accelerated": spread(dense / ms)}
        for name, dense in (("eager", 130.0), ("compile", 100.0))
    }
    variants["jit_optimized"] = {"available": False, "error": "RuntimeError: gone"}
    row = {
        "unit": "layer1.0", "name": "layer1.0.conv1", "kind": "sparse", "nominal_macs": 51_380_224,
        "effective_macs": 25_690_112, "executed_macs": 25_700_000, "nnz": 8192, "numel": 16384,
    }  # fmt: skip
    return {
        **envelope("trunk"),
        "threads": threads,
        "baseline": {"name": "compile", **timing(100.0)},
        "accelerated": timing(ms),
        "variants": variants,
        "speedup": 100.0 / ms,
        "speedup_spread": spread(100.0 / ms),
        "speedup_cpu_time": 100.0 / ms,
        "rounds": 5,
        "max_rel_err": 2e-7,
        "dense_own_rel_err": 3e-7,
        "exact": True,
        "failed_checks": [],
        "layers": [
            layer("layer1.0.conv1"),
            layer("layer1.0.conv2", 4.0, 1.0, kernel=3, cout=64, density=0.1, nnz=3686),
            layer("layer1.0.conv3", 1.0, 1.5),
        ],
        "losing_layers": [layer("layer1.0.conv3", 1.0, 1.5)],
        "ceilings": {"dense_gflops": 100.0, "copy_gbs": 20.0},
        "report": {
            "packed_bytes": 14_000_000,
            "plan": {
                "rows": [row],
                "totals": {
                    "nominal_macs": 5_367_226_368, "effective_macs": 833_685_706,
                    "executed_macs": 838_250_856, "nnz": 2_348_179, "numel": 23_474_016,
                },
            },
        },
        "mask": {
            "label": "global:0.90 (synthetic mask)", "synthetic": True,
            "parameter_density": 0.1, "flop_density": 0.155,
        },
        "subject": {
            "arch": "RN50", "weights": "synthetic weights (seed 0)", "synthetic": True,
            "mask": "global:0.90 (synthetic mask)",
        },
        "input": [batch, 3, size, size],
        "peers": {
            "onnxruntime": {"available": True, **timing(110.0), "version": "1.0",
                            "speedup_of_ours": spread(110.0 / ms), "max_rel_err": 1e-6},
            "openvino": {"available": False, "error": "no environment"},
        },
        "command": ["opentrans", "bench", "trunk"],
    }  # fmt: skip


def op_row(density: float, dense: float, ours: float, **changes: Any) -> dict[str, Any]:
    nominal = 64 * 256 * 56 * 56
    row = {
        "op": "sparse_conv2d", "backend": "cpu", "case": "64->256 k1 56x56", "kind": "1x1 expand",
        "cin": 64, "cout": 256, "kernel": 1, "stride": 1, "h_out": 56, "w_out": 56, "batch": 1,
        "density": density, "density_asked": density, "nnz": int(density * 16384),
        "macs": {"nominal": nominal, "effective": int(nominal * density),
                 "executed": int(nominal * density)},
        "dense_kind": "conv2d", "dense_ms": dense, "ms": ours, "speedup": spread(dense / ours),
        "exact": True, "error": 1e-7, "dense_error": 1e-7, "clock": "cpu",
    }  # fmt: skip
    return row | changes


def op() -> dict[str, Any]:
    rows = [op_row(d, 1.0, ms) for d, ms in ((0.1, 0.2), (0.5, 0.8), (0.8, 1.2), (1.0, 1.5))]
    return {
        **envelope("op"),
        "rows": rows,
        "skipped": [{"backend": "triton", "reason": "no CUDA device"}],
        "ceilings": {"dense_gflops": 100.0, "copy_gbs": 20.0},
    }


def model() -> dict[str, Any]:
    rows = [
        {
            "part": "trunk", "batch": batch, "height": size, "width": size, "threads": threads,
            "dense_kind": "compile", "dense_ms": 100.0 * batch / threads * size / 224,
            "ms": 25.0 * batch / threads * size / 224, "speedup": spread(4.0), "exact": True,
            "macs": {"nominal": 5_000_000_000 * batch, "effective": 800_000_000 * batch,
                     "executed": 810_000_000 * batch},
            "memory": {"dense_peak_bytes": 200_000_000, "peak_bytes": 250_000_000},
        }
        for batch, size, threads in ((1, 224, 1), (4, 224, 1), (1, 384, 1), (1, 224, 2))
    ]  # fmt: skip
    one = trunk()
    return {**envelope("model"), "rows": rows, "subject": one["subject"], "mask": one["mask"]}


def alpha() -> dict[str, Any]:
    sides = {
        "ours xmin_peak": {"ms": 500.0, "slower_than": {}},
        "published xmin_peak": {"ms": 900.0, "slower_than": {"ours xmin_peak": spread(1.8)}},
    }
    label = "RN50 with planted heavy tails (seed 0, SYNTHETIC)"
    return {**envelope("alpha"), "subject": label, "synthetic_weights": True, "sides": sides}


def training() -> dict[str, Any]:
    rows = [
        {"variant": name, "kept_mib": kept, "time_vs_baseline": spread(time)}
        for name, kept, time in (("baseline", 100.0, 1.0), ("skip", 60.0, 0.8))
    ]
    return {
        **envelope("training"),
        "weights": "synthetic",
        "mask": "global:0.90",
        "size": 224,
        "batch": 4,
        "results": [{"set": "odd", "rows": rows}],
    }


def tokens() -> dict[str, Any]:
    """A segmenter on the sparse kernels: reduced 2x, pooled tokens faster, a smaller input slower
    than dense."""
    sides = {
        "eager": ("dense", 100.0, 40), "cluster": ("reduced", 80.0, 30),
        "sparse": ("exact", 70.0, 20), "sparse, cluster": ("reduced", 50.0, 10),
        "pooled tokens, sparse": ("baseline", 40.0, 10),
        "smaller input, sparse": ("baseline", 125.0, 10),
    }  # fmt: skip
    rows = [
        {
            "name": name, "kind": kind, "ms": ms, "cpu_ms": ms, "wall": spread(ms),
            "contended_share": 0.0, "speedup": spread(100 / ms), "over_eager": spread(100 / ms),
            "macs": macs * 10**9, "work": macs / 40, "difference": 0.0, "same_class": 1.0,
            "peak_bytes": 2_000_000,
        }
        for name, (kind, ms, macs) in sides.items()
    ]  # fmt: skip
    return {
        **envelope("tokens"), "command": ["bench", "tokens"], "failed_checks": [],
        "system": "segmenter-s16", "decoder": "mask", "weights": "synthetic weights (seed 0)",
        "classes": 150, "height": 640, "width": 640, "rounds": 3, "baseline": "eager",
        "plan": {"method": "cluster", "alpha": 5, "r": None, "keep": None, "grid": [28, 28]},
        "smaller": [448, 448], "fewer": 8, "kept": 0.1,
        "mask": {"label": "uniform:0.90 (synthetic mask)", "synthetic": True},
        "replaced": {"sparse": 24}, "unavailable": {"compiled": "not asked for"}, "rows": rows,
        "parts": [{"part": "reducing", "cpu_ms": 2.0, "share": 0.04}],
    }  # fmt: skip


ALL = {"trunk": trunk, "op": op, "model": model, "alpha": alpha, "training": training}
