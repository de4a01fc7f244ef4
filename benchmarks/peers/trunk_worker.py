"""Our side: ``trunk_worker.py FOLDER THREADS MASK ARCH CHECKPOINT SEED`` ("" for no checkpoint).

Accelerates the same masked trunk on the image of the neutral graph in FOLDER and serves timings.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from protocol import serve

from opentrans_kernels import accelerate, native
from opentrans_kernels.bench.subject import load_subject
from opentrans_kernels.bench.variants import TrunkModule


def main(arguments: list[str]) -> None:
    """Accelerate and serve."""
    folder, threads, mask, arch, checkpoint, seed = arguments
    torch.set_num_threads(int(threads))
    subject = load_subject(mask, arch=arch, checkpoint=checkpoint or None, seed=int(seed))
    image = torch.from_numpy(np.load(Path(folder) / "tensors.npz")["image"])
    accelerate(subject.model, subject.masks, input_size=tuple(image.shape[-2:]))
    trunk = TrunkModule(subject.model).eval()

    def call() -> torch.Tensor:
        with torch.no_grad():
            return trunk(image)

    described = {
        "engine": "opentrans",
        "cpu_capability": native.cpu_capability() if native.available() else None,
        "torch": torch.__version__,
    }
    serve(call, described, lambda target: np.save(target, call().contiguous().numpy()))


if __name__ == "__main__":
    main(sys.argv[1:])
