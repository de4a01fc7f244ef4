"""What fewer tokens cost in a trained network, without training it again, and what they gain.

    python benchmarks/trained/tokens.py --json PATH   # agreement, then times
    python benchmarks/trained/tokens.py --json PATH --part agreement   # the other part stays
    python benchmarks/trained/tokens.py --json PATH --part times --rounds 7
    python benchmarks/trained/tokens.py --json PATH --plot PATH.svg --table   # of what is stored

The network is ``focus``, a ViT-S/14 with a dense head, at the 224 pixels it was trained with. Its
map of every photograph that is held out is compared with the map of the same network with all of
its tokens: the mean absolute difference of the saliency, and intersection over union of what is
above 0.5. That is agreement with the dense network, not accuracy: no labels are involved.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opentrans.trained import load, photographs, pixels
from opentrans_kernels import TokenPlan, reduce_tokens
from opentrans_kernels.bench.environment import machine, versions
from opentrans_kernels.bench.timing import interleave
from opentrans_kernels.masks.atomic import atomic_write

SIZE = 224
DENSE = "dense"
THRESHOLD = 0.5  # of saliency


@dataclass(frozen=True)
class Side:
    """One way to make the network cheaper. ``make(model)``: the function from images to logits."""

    method: str
    setting: str
    make: Callable[[nn.Module], Callable[[Tensor], Tensor]]

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting}".strip()


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the very same tensors."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def reduced(plan: TokenPlan) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    def make(model: nn.Module) -> Callable[[Tensor], Tensor]:
        own = twin(model)
        reduce_tokens(own.get_submodule("encoder"), plan)
        return own

    return make


def smaller(side: int) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    def make(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(image: Tensor) -> Tensor:
            options: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
            small = F.interpolate(image, (side, side), antialias=True, **options)
            return F.interpolate(model(small), image.shape[2:], **options)

        return call

    return make


def without(blocks: tuple[int, ...]) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    def make(model: nn.Module) -> Callable[[Tensor], Tensor]:
        own: Any = twin(model)
        kept = [block for i, block in enumerate(own.encoder.blocks) if i not in blocks]
        own.encoder.blocks = nn.ModuleList(kept)
        return own

    return make


def sides() -> list[Side]:
    """Dense first, then every method from mild to strong."""
    found = [Side(DENSE, "", lambda model: model)]
    for method in ("cluster", "pool"):
        for alpha, grid in ((8, 11), (6, 11), (4, 11), (8, 8), (6, 8), (4, 8), (2, 8)):
            plan = TokenPlan(method, alpha=alpha, grid=(grid, grid))  # type: ignore[arg-type]
            found.append(Side(method, f"alpha {alpha}, {grid}x{grid}", reduced(plan)))
    for alpha, r in ((0, 4), (0, 8), (0, 12), (0, 16), (0, 20), (4, 16), (4, 24)):
        found.append(Side("tome", f"alpha {alpha}, r {r}", reduced(TokenPlan("tome", alpha, r=r))))
    for keep in (0.95, 0.9, 0.8, 0.7, 0.5):
        found.append(Side("evit", f"keep {keep}", reduced(TokenPlan("evit", keep=keep))))
    for cell in (2.0, 4.0, 8.0, 16.0):
        found.append(Side("act", f"cell {cell:g}", reduced(TokenPlan("act", cell=cell))))
    for side in (196, 168, 140, 112):
        found.append(Side("smaller input", f"{side}x{side}", smaller(side)))
    for blocks in ((11,), (10, 11), (9, 10, 11), (6,), (4, 8), (3, 6, 9)):
        told = ", ".join(str(i + 1) for i in blocks)
        found.append(Side("fewer blocks", f"without {told}", without(blocks)))
    return found


def squares() -> dict[str, Tensor]:
    """The middle square of every held-out photograph, as the network takes it."""
    network = load("focus")
    found = {}
    for photo in photographs("holdout"):
        image = pixels(photo, 1024)
        side = min(image.shape[1:])
        top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
        square = image[:, top : top + side, left : left + side]
        found[photo.name] = network.prepare(square[None])
    return found


def agreement(found: Tensor, dense: Tensor) -> dict[str, float | None]:
    """Of two maps of saliency; ``iou`` is None where neither has anything above the threshold."""
    ours, theirs = found > THRESHOLD, dense > THRESHOLD
    union = (ours | theirs).sum().item()
    return {
        "mae": (found - dense).abs().mean().item(),
        "iou": (ours & theirs).sum().item() / union if union else None,
    }


def measure_agreement(model: nn.Module) -> dict[str, Any]:
    """Every side's maps against the dense ones: name -> photograph -> numbers."""
    images = squares()
    dense = {name: model(image).sigmoid() for name, image in images.items()}
    found: dict[str, Any] = {}
    for side in sides():
        call = side.make(model)
        found[side.name] = {
            name: agreement(call(image).sigmoid(), dense[name]) for name, image in images.items()
        }
        mean = sum(one["mae"] for one in found[side.name].values()) / len(images)
        print(f"{side.name:32} MAE {mean:.4f}", flush=True)
    return found


def measure_times(model: nn.Module, rounds: int) -> dict[str, Any]:
    """Every side on one photograph, interleaved: name -> milliseconds and ratio to dense."""
    image = squares()["voc"]
    calls = {}
    for side in sides():
        call = side.make(model)
        calls[side.name] = lambda call=call: call(image)
    table = interleave(calls, rounds=rounds, warmup_s=0.1, settle=0)
    return {
        name: {
            "ms": table[name].wall.median,
            "cpu_ms": table[name].cpu.median,
            "contended_share": table[name].contended_share(),
            "speedup": table.ratio(DENSE, name, "cpu").to_dict(),
        }
        for name in calls
    }


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per side: means over photographs, and what was timed."""
    rows = []
    for side in sides():
        photos = result["agreement"][side.name].values()
        ious = [one["iou"] for one in photos if one["iou"] is not None]
        timed = result.get("times", {}).get(side.name)
        rows.append(
            {
                "method": side.method,
                "setting": side.setting,
                "mae": sum(one["mae"] for one in photos) / len(photos),
                "iou": sum(ious) / len(ious),
                "least_iou": min(ious),
                "cpu_ms": timed and timed["cpu_ms"],
                "speedup": timed and timed["speedup"]["median"],
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table of docs/vision-transformers.md."""
    print("| method | setting | MAE | IoU at 0.5 | worst photograph | CPU ms | speed-up |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        times = (
            f"{row['cpu_ms']:.0f} | {row['speedup']:.2f}x" if row["cpu_ms"] is not None else "| "
        )
        print(
            f"| {row['method']} | {row['setting']} | {row['mae']:.4f} | {row['iou']:.3f} | "
            f"{row['least_iou']:.3f} | {times} |"
        )


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Agreement over speed-up, a line per method from mild to strong."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tokens"  # the same file for the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = sorted((r["speedup"], r["iou"]) for r in rows if r["method"] == method)
        style = "-" if method not in ("act", "fewer blocks") else ":"
        axes.plot(*zip(*own, strict=True), marker="o", linestyle=style, label=method)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("speed-up over the dense network (CPU, one thread)")
    axes.set_ylabel("IoU with the dense map at 0.5, mean of 10 photographs")
    axes.set_title("Training-free token reduction of a trained ViT-S/14, saliency at 224x224")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure what was asked for, keep the rest of the file, and show it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", required=True, metavar="PATH")
    parser.add_argument("--part", choices=("agreement", "times", "both"))
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default 7")
    parser.add_argument("--plot", metavar="PATH", help="SVG of agreement over speed-up")
    parser.add_argument("--table", action="store_true", help="print the table in Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(options.json)
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    part = options.part or (None if options.plot or options.table else "both")
    if part is not None:
        model = load("focus").module
        with torch.no_grad():
            if part in ("agreement", "both"):
                result["agreement"] = measure_agreement(model)
            if part in ("times", "both"):
                result["times"] = measure_times(model, options.rounds)
                result["machine"], result["versions"] = machine(), versions()
        result |= {"network": "focus", "size": [SIZE, SIZE], "threshold": THRESHOLD}
        if "agreement" in result:
            result["rows"] = summary(result)
        atomic_write(path, json.dumps(result, indent=1).encode())
    if options.table:
        show(result["rows"])
    if options.plot:
        draw(result["rows"], options.plot)


if __name__ == "__main__":
    main()
