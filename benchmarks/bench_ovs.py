"""Open-vocabulary DeepLabV3 on CLIP RN50: inference dense and accelerated, and the text cache.

Example::

    python benchmarks/bench_ovs.py --json ovs.json
    python benchmarks/bench_ovs.py --parts text --train-size 256 --rounds 3

*inference*: the whole model on one image, its backbone alone and its head alone, every dense
variant of PyTorch beside the accelerated one, interleaved on one pinned CPU; the fastest dense one
is the baseline. Only the tower is accelerated, so Amdahl's law bounds the whole; the bound from the
measured shares is printed beside the measured speed-up.
*text*: a training step with 133 class names, with cached text embeddings and with the frozen text
encoder run in every step, as the published training does.

CPU time of the process decides. Weights and masks are synthetic, predictions mean nothing. Exit
code 1 if the accelerated model is slower than the baseline or its output differs.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from opentrans import TextCache
from opentrans.ovs import DeepLabHead, PixelSegmenter, TextClassifier, TrunkFeatures, load_clip
from opentrans_kernels import accelerate
from opentrans_kernels.bench.environment import environment_block
from opentrans_kernels.bench.timing import Spread, TimingTable, choose_cpus, interleave, pin
from opentrans_kernels.bench.variants import fold_batch_norms_
from opentrans_kernels.cli.render import Output
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.synthetic import synthetic_masks, synthetic_rn50

PARTS = ("inference", "text")
CLASSES = 150  # of ADE20K, for the size of the classifier
PROMPTS = 133  # of COCO panoptic, as published
OURS = "accelerated"
# Tower accelerated; the head behind it in either layout, or compiled.
ACCELERATED = (OURS, "accelerated, head channels_last", "accelerated, head compiled")
TOLERANCE = 1e-4  # of the largest logit


class Words(nn.Module):
    """Stands for a text encoder whose embeddings are cached: a random one per token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        table = torch.randn(4096, channels, generator=torch.Generator().manual_seed(0))
        self.register_buffer("table", table)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens[:, 0] % 4096]


def segmenter(tower: nn.Module, classifier: TextClassifier) -> PixelSegmenter:
    """DeepLabV3 with decoder on res2, 256 channels, embeddings of 1024 channels."""
    backbone = TrunkFeatures(tower)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = DeepLabHead(backbone.channels, 1024)
    return PixelSegmenter(backbone, head, classifier)


def words_classifier() -> TextClassifier:
    return TextClassifier(
        TextCache(
            Words(1024).eval(), lambda texts: torch.tensor([[hash(t) % 4096] for t in texts])
        ),
        templates=("{}",),
    )


def compiled(module: nn.Module, *examples: Any) -> Callable[..., Any]:
    """``torch.compile`` with the weights as constants; compiled here, on the examples."""
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True), torch.no_grad():
        call = torch.compile(module)
        call(*examples)
        call(*examples)
    return call


def measure_inference(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    """Times of the whole model, backbone and head, and their shares."""
    tower = synthetic_rn50(image_size=options.size)
    synthetic_masks(tower, options.mask).apply_(tower)
    classifier = words_classifier()
    names = tuple(f"class {i}" for i in range(CLASSES))
    models = {"eager": segmenter(tower, classifier).eval()}
    models["channels_last"] = copy.deepcopy(models["eager"]).to(memory_format=torch.channels_last)
    folded = copy.deepcopy(models["eager"])
    fold_batch_norms_(folded.backbone.tower)
    models["folded, channels_last"] = folded.to(memory_format=torch.channels_last)
    models[OURS] = copy.deepcopy(models["eager"])
    with out.progress("bench ovs: accelerating the tower") as told:
        told("timing every layer")
        report = accelerate(models[OURS].backbone.tower, input_size=(options.size,) * 2)
    head = copy.deepcopy(models[OURS].head).to(memory_format=torch.channels_last)
    models[ACCELERATED[1]] = PixelSegmenter(models[OURS].backbone, head, classifier).eval()
    plain = torch.randn(1, 3, options.size, options.size,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    last = plain.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Any]] = {}
    outputs: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for name, model in models.items():
            x = last if "channels_last" in name and name not in ACCELERATED else plain
            features = model.backbone(x)
            outputs[name] = model(x, names)
            calls[f"whole: {name}"] = lambda m=model, x=x: m(x, names)
            if name != ACCELERATED[1]:  # the same backbone
                calls[f"backbone: {name}"] = lambda m=model, x=x: m.backbone(x)
            if not name.startswith("folded"):  # the same head
                calls[f"head: {name}"] = lambda m=model, f=features: m.classifier(m.head(f), names)
    if options.compile:
        model = models["folded, channels_last"]
        body = nn.Sequential(model.backbone, model.head)
        whole, backbone = compiled(body, last), compiled(model.backbone, last)
        calls["whole: compiled"] = lambda: nn.functional.interpolate(
            model.classifier(whole(last), names), last.shape[-2:], mode="bilinear"
        )
        calls["backbone: compiled"] = lambda: backbone(last)
        calls["head: compiled"] = _head_alone(model, last)
        calls[f"whole: {ACCELERATED[2]}"] = _compiled_head(models[ACCELERATED[1]], plain, names)
        with torch.inference_mode():
            outputs[ACCELERATED[2]] = calls[f"whole: {ACCELERATED[2]}"]()
    with torch.no_grad(), out.progress("bench ovs: inference") as told:
        table = interleave(
            calls, rounds=options.rounds, warmup_s=0.1, settle=0,
            on_round=lambda done, total: told(f"round {done} of {total}"),
        )  # fmt: skip
    largest = float(outputs["eager"].abs().max())
    ours = [value for name, value in outputs.items() if name in ACCELERATED]
    error = max(float((value - outputs["eager"]).abs().max()) for value in ours) / largest
    return {**summary(table), "error": error, "tower": str(report).splitlines()[-1]}


def _head_alone(model: PixelSegmenter, x: torch.Tensor) -> Callable[[], Any]:
    with torch.no_grad():
        features = {name: value.clone() for name, value in model.backbone(x).items()}
    head = compiled(model.head, features)
    return lambda: head(features)


def _compiled_head(
    model: PixelSegmenter, x: torch.Tensor, names: Sequence[str]
) -> Callable[[], Any]:
    """The accelerated tower with a compiled head."""
    with torch.no_grad():
        head = compiled(model.head, model.backbone(x))

    def run() -> torch.Tensor:
        logits = model.classifier(head(model.backbone(x)), names)
        return nn.functional.interpolate(logits, x.shape[-2:], mode="bilinear")

    return run


def summary(table: TimingTable) -> dict[str, Any]:
    """Baselines, speed-ups, the backbone's share of the dense model and Amdahl's bound."""
    ours = table.fastest([n for n in table.timings if n.startswith(f"whole: {OURS}")], "cpu")
    best = {
        part: table.fastest(
            [n for n in table.timings if n.startswith(part) and OURS not in n], "cpu"
        )
        for part in ("whole", "backbone", "head")
    }
    whole = table.ratio(best["whole"], ours, "cpu")
    backbone = table.ratio(best["backbone"], f"backbone: {OURS}", "cpu")
    dense = table[best["whole"]].cpu.median
    share = min(1.0, table[best["backbone"]].cpu.median / dense)
    left = table[f"backbone: {OURS}"].cpu.median / table[ours].cpu.median
    return {
        "baseline": best,
        "accelerated": ours,
        "speedup": whole.to_dict(),
        "backbone_speedup": backbone.to_dict(),
        "backbone_share_dense": share,
        "head_share_accelerated": 1 - left,
        "amdahl_bound": 1 / (1 - share),
        "amdahl_predicted": 1 / (1 - share + share / backbone.median),
        "timings": table.to_dict(),
    }


def measure_text(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    """A training step (forward, backward, AdamW) with and without cached text embeddings."""
    with out.progress("bench ovs: open_clip RN50") as told:
        told("random weights, asked for")
        clip = load_clip("random", "RN50")
    cache = TextCache(clip.model, clip.tokenizer)
    classifier = TextClassifier(cache, templates=("a photo of a {}.",))
    tower = synthetic_rn50(image_size=options.train_size).requires_grad_(True)
    model = segmenter(tower, classifier).train()
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    generator = torch.Generator().manual_seed(0)
    size = (options.train_size, options.train_size)
    images = torch.randn(2, 3, *size, generator=generator)
    labels = torch.randint(PROMPTS, (2, *size), generator=generator)
    names = tuple(f"class number {i}" for i in range(PROMPTS))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step(cached: bool) -> None:
        classifier.cached = cached
        optimizer.zero_grad()
        model.loss(images, labels, names)["loss_sem_seg"].backward()
        optimizer.step()

    step(True)
    before = cache.stats.encoder_calls
    step(True)
    if cache.stats.encoder_calls != before:
        raise OpenTransError("the text encoder ran although its embeddings were cached.")
    # An uncached step takes many seconds, so no warm-up of its own: the steps above were it.
    spent: dict[str, list[float]] = {"cached": [], "encoder in every step": []}
    with out.progress("bench ovs: training step") as told:
        for done in range(options.rounds):
            for name, times in spent.items():
                began = time.process_time()
                step(name == "cached")
                times.append(1e3 * (time.process_time() - began))
            told(f"round {done + 1} of {options.rounds}")
    ratios = [slow / fast for fast, slow in zip(*spent.values(), strict=True)]
    return {
        "prompts": PROMPTS,
        "images_per_step": len(images),
        "size": options.train_size,
        "cache_bytes": cache.nbytes,
        "speedup": Spread.of(ratios).to_dict(),
        "timings": {name: {"cpu": Spread.of(times).to_dict()} for name, times in spent.items()},
    }


def show(part: str, result: dict[str, Any], out: Output) -> None:
    out.heading(f"{part}: CPU milliseconds, median (quartiles)")
    rows = []
    for name, timing in result["timings"].items():
        cpu = timing["cpu"]
        rows.append([name, f"{cpu['median']:.0f} ({cpu['q1']:.0f}-{cpu['q3']:.0f})"])
    out.table(None, ("what", "ms"), rows)
    speed = result["speedup"]
    text = f"speed-up {speed['median']:.2f}x ({speed['q1']:.2f}-{speed['q3']:.2f})"
    if part == "text":
        out.text(f"step with cached text embeddings: {text}, {result['prompts']} prompts")
        return
    back = result["backbone_speedup"]
    out.text(
        f"{result['accelerated']}: {text} over {result['baseline']['whole']}; backbone alone "
        f"{back['median']:.2f}x ({back['q1']:.2f}-{back['q3']:.2f}) over "
        f"{result['baseline']['backbone']}"
    )
    out.text(
        f"the backbone is {result['backbone_share_dense']:.0%} of the dense model, so Amdahl's law "
        f"allows {result['amdahl_bound']:.2f}x at most and predicts "
        f"{result['amdahl_predicted']:.2f}x; the head is {result['head_share_accelerated']:.0%} of "
        f"the accelerated one. Largest difference of the logits: {result['error']:.1e}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--mask", default="global:0.90", help="recipe")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--train-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile among the dense ones")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", default=None)
    options = parser.parse_args(argv)
    out = Output(options.json)
    results: dict[str, Any] = {}
    try:
        cpus = choose_cpus(options.threads)
        if cpus is not None:
            pin(cpus)
        torch.set_num_threads(options.threads)
        for part in options.parts:
            measure = measure_inference if part == "inference" else measure_text
            results[part] = measure(options, out)
            show(part, results[part], out)
    except OpenTransError as error:
        sys.stderr.write(f"bench_ovs: {error}\n")
        return 2
    found = results.get("inference")
    failed = found and (found["speedup"]["median"] < 1 or not found["error"] <= TOLERANCE)
    out.finish(
        {
            "benchmark": "ovs",
            "weights": "synthetic",
            "mask": options.mask,
            "size": options.size,
            "threads": options.threads,
            "rounds": options.rounds,
            "compile": options.compile,
            "environment": environment_block(),
            "results": results,
        }
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
