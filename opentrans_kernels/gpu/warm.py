"""Compiles the Triton kernels of a whole network side by side, before they are timed one by one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from .chains import links
from .kernels import Place, candidates, layer_signature
from .network import Layer, Network
from .program import block_sizes, sizes_of

__all__ = ["compile_all", "jobs_of"]

_log = logging.getLogger(__name__)


def jobs_of(network: Network, place: Place, size: tuple[int, int, int]) -> list[Callable[[], None]]:
    """One job per candidate that can be compiled ahead, equal layers once."""
    where = block_sizes(network, size)
    sequences: list[tuple[tuple[Layer, ...], tuple[int, int, int]]] = [(network.stem, size)]
    for block in network.blocks:
        sequences += [(layers, where[block.name]) for layers in block.variants.values()]
    jobs: list[Callable[[], None]] = []
    seen: set[object] = set()
    for layers, start in sequences:
        for layer, at in zip(layers, sizes_of(layers, start), strict=False):
            found = candidates(layer, place, at)[0]
            key = (layer_signature(layer, at), tuple(c.name for c in found))
            if key in seen:
                continue
            seen.add(key)
            for candidate in found:
                if candidate.warm is not None:
                    jobs.append(lambda c=candidate, i=layer, s=at: c.warm(i, s))
    for name in ("full", "compact"):
        variants = {b.name: name if name in b.variants else "full" for b in network.blocks}
        for link in links(network, variants, size):
            widths = tuple(layer.weight.shape for layer in link.layers)
            if widths not in seen and link.problem(place) is None:
                seen.add(widths)
                jobs += link.warm(place)
    return jobs


def compile_all(jobs: Iterable[Callable[[], None]]) -> None:
    """Run the jobs, compilations in threads. A failure is logged: the timing will meet it again."""
    import triton

    workers = max(1, min(16, os.cpu_count() or 1))
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:
        return
    try:
        with ThreadPoolExecutor(workers) as executor, mode(executor, ignore_errors=True):
            for job in jobs:
                job()
    except Exception as error:
        _log.warning(
            "kernels are compiled one by one: %s: %s", type(error).__name__, str(error)[:300]
        )
