"""DeepSparse: ``deepsparse_worker.py FOLDER THREADS``, in its own environment."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from onnx_graph import OPSET, build_onnx
from protocol import serve, take_stdout


def main(arguments):
    """Compile and serve."""
    answers = take_stdout()
    folder, threads = Path(arguments[0]), int(arguments[1])
    path = build_onnx(folder)
    import deepsparse

    x = np.load(folder / "input.npy")
    engine = deepsparse.Engine(model=str(path), batch_size=x.shape[0], num_cores=threads)
    described = {
        "engine": "deepsparse",
        "version": deepsparse.__version__,
        "isa": deepsparse.cpu.cpu_architecture().isa,
        "opset": OPSET,
        "fraction_supported": getattr(engine, "fraction_of_supported_ops", None),
        "onnx_bytes": path.stat().st_size,
    }
    serve(
        answers,
        lambda: engine.run([x]),
        described,
        lambda target: np.save(target, engine.run([x])[0]),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
