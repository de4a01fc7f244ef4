"""OpenVINO: ``openvino_worker.py FOLDER THREADS``, in its own environment."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from onnx_graph import OPSET, build_onnx
from protocol import serve, take_stdout


def main(arguments):
    """Compile for float32 and low latency, and serve."""
    answers = take_stdout()
    folder, threads = Path(arguments[0]), int(arguments[1])
    path = build_onnx(folder)
    import openvino

    # Without the hint it computes in bfloat16 where the CPU can: another network.
    compiled = openvino.Core().compile_model(
        str(path),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # the process is pinned already
        },
    )
    x = np.load(folder / "input.npy")
    request = compiled.create_infer_request()

    def call():
        return request.infer({0: x}, share_inputs=True, share_outputs=True)

    described = {
        "engine": "openvino",
        "version": openvino.get_version(),
        "opset": OPSET,
        "precision": str(compiled.get_property("INFERENCE_PRECISION_HINT")),
        "onnx_bytes": path.stat().st_size,
    }
    serve(answers, call, described, lambda target: np.save(target, call()[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
