"""ONNX Runtime: ``onnxruntime_worker.py FOLDER THREADS``, in its own environment."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from onnx_graph import OPSET, build_onnx
from protocol import serve, take_stdout


def main(arguments):
    """Optimise and serve."""
    answers = take_stdout()
    folder, threads = Path(arguments[0]), int(arguments[1])
    path = build_onnx(folder)
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    x = np.load(folder / "input.npy")
    inputs = {session.get_inputs()[0].name: x}
    described = {
        "engine": "onnxruntime",
        "version": onnxruntime.__version__,
        "opset": OPSET,
        "providers": session.get_providers(),
        "onnx_bytes": path.stat().st_size,
    }
    serve(
        answers,
        lambda: session.run(None, inputs),
        described,
        lambda target: np.save(target, session.run(None, inputs)[0]),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
