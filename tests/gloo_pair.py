"""Two processes with gloo for a test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def run_pair(worker: Callable[[int, str, str], None], folder: Path) -> None:
    """Run ``worker(rank, store, folder)`` twice; each must touch ``doneRANK`` and end with 0."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch was built without gloo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # once, not in every process
    arguments = (str(folder / "store"), str(folder))
    workers = [context.Process(target=worker, args=(rank, *arguments)) for rank in range(2)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(300)
    assert [process.exitcode for process in workers] == [0, 0]
    assert (folder / "done0").exists() and (folder / "done1").exists()
