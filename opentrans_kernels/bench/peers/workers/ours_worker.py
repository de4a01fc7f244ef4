"""Our side: ``ours_worker.py FOLDER THREADS ARCH ISA``.

Accelerates the tower of ``tower.pt`` with the masks of ``masks.safetensors`` in FOLDER, on the
image of ``input.npy`` there, and serves timings.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from ours import serve_ours
from protocol import take_stdout

from opentrans_kernels import accelerate
from opentrans_kernels.bench.part import TrunkModule
from opentrans_kernels.bench.subject import load_subject


def main(arguments: list[str]) -> None:
    """Accelerate and serve."""
    answers = take_stdout()
    folder, threads, arch = Path(arguments[0]), arguments[1], arguments[2]
    torch.set_num_threads(int(threads))
    subject = load_subject(
        str(folder / "masks.safetensors"), arch=arch, checkpoint=folder / "tower.pt"
    )
    image = torch.from_numpy(np.load(folder / "input.npy"))
    batch, _, height, width = image.shape
    size = height, width
    accelerate(subject.model, subject.masks, input_size=size, threads=int(threads), batch=batch)
    trunk = TrunkModule(subject.model).eval()
    serve_ours(answers, lambda: trunk(image))


if __name__ == "__main__":
    main(sys.argv[1:])
