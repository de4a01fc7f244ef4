"""Part "text": a training step with 133 class names, with and without the text cache."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from ovs_inference import segmenter
from torch import nn

from opentrans import TextCache
from opentrans.cli.render import Output
from opentrans.ovs import TextClassifier, load_clip
from opentrans_kernels.bench.timing import Spread
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.synthetic import synthetic_rn50

BATCH = 2
CACHED, UNCACHED = "cached", "encoder in every step"


def measure(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    """A training step (forward, backward, AdamW) with and without cached text embeddings."""
    with out.progress("bench ovs: open_clip RN50") as told:
        told("random weights, asked for")
        clip = load_clip("random", "RN50")
    cache = TextCache(clip.model, clip.tokenizer)
    classifier = TextClassifier(cache, templates=("a photo of a {}.",))
    tower = synthetic_rn50(image_size=options.train_size).requires_grad_(True)
    model = segmenter(tower, classifier, clip.embed_dim).train()
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    generator = torch.Generator().manual_seed(0)
    size = (options.train_size, options.train_size)
    images = torch.randn(BATCH, 3, *size, generator=generator)
    labels = torch.randint(options.prompts, (BATCH, *size), generator=generator)
    names = tuple(f"class number {i}" for i in range(options.prompts))
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
    cpu: dict[str, list[float]] = {CACHED: [], UNCACHED: []}
    wall: dict[str, list[float]] = {CACHED: [], UNCACHED: []}
    with out.progress("bench ovs: training step") as told:
        for done in range(options.rounds):
            for name in cpu:
                began = time.perf_counter(), time.process_time()
                step(name == CACHED)
                wall[name].append(1e3 * (time.perf_counter() - began[0]))
                cpu[name].append(1e3 * (time.process_time() - began[1]))
            told(f"round {done + 1} of {options.rounds}")
    ratios = [slow / fast for fast, slow in zip(cpu[CACHED], cpu[UNCACHED], strict=True)]
    return {
        "prompts": options.prompts,
        "images_per_step": BATCH,
        "size": options.train_size,
        "cache_bytes": cache.nbytes,
        "speedup": Spread.of(ratios).to_dict(),
        "timings": {
            name: {"cpu": Spread.of(cpu[name]).to_dict(), "wall": Spread.of(wall[name]).to_dict()}
            for name in cpu
        },
    }
