"""What all sides of a session compute: a masked network, or one operator on one shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...errors import OpenTransError
from ..op_case import Case
from ..part import TrunkModule
from ..subject import Subject
from ..variants import fold_batch_norms_
from .graph import write_graph

__all__ = ["Work", "network_work", "operator_work"]


@dataclass(frozen=True)
class Work:
    """What is handed to the workers.

    Attributes:
        write: fills a folder with ``input.npy`` and with what our own worker reads.
        graph: writes the graph for the other engines there; may raise OpenTransError.
        ours: script of our worker.
        words: what it, and peers that share torch, get behind FOLDER and THREADS.
    """

    write: Callable[[Path], None]
    graph: Callable[[Path], None]
    ours: str
    words: tuple[str, ...]


def network_work(subject: Subject, image: torch.Tensor, isa: str) -> Work:
    """The masked network, whose batch norms the others get folded. image: float32 [N, 3, H, W]."""

    def write(folder: Path) -> None:
        np.save(folder / "input.npy", image.numpy())
        # Files, not a seed: synthetic weights made under another instruction set differ slightly.
        torch.save(subject.model.state_dict(), folder / "tower.pt")
        subject.masks.save(folder / "masks.safetensors")

    def graph(folder: Path) -> None:
        tower = subject.masked_copy()
        trunk = TrunkModule(tower).eval()
        fold_batch_norms_(tower)
        write_graph(trunk, image, folder)

    return Work(write, graph, "ours_worker.py", (subject.arch, isa))


def operator_work(case: Case, backend: str) -> Work:
    """One case, ours by the row ``backend`` of the dispatch table.

    Raises:
        OpenTransError: the case has no form that other engines can be given.
    """
    module, x = case.module, case.arguments[0]
    if module is None:
        raise OpenTransError(
            f"{case.op} has no form that other engines can be given. Leave --peers out, or name "
            "--ops sparse_linear,sparse_mlp."
        )

    def write(folder: Path) -> None:
        np.save(folder / "input.npy", x.numpy())
        torch.save({"op": case.op, "arguments": list(case.arguments)}, folder / "operator.pt")

    return Work(
        write, lambda folder: write_graph(module, x, folder), "our_operator_worker.py", (backend,)
    )
