"""The peers: what they are, pinned versions, and how their workers are started."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import OpenTransError


@dataclass(frozen=True)
class Peer:
    """One engine.

    Attributes:
        requirements: what pip installs, pinned.
        worker: script in ``workers``; None if the peer is timed elsewhere (``where`` says where).
        python: versions its wheels exist for, (lowest, highest), or None for any.
        shares_torch: its environment sees the packages of this one, so both use the same torch.
        isa_variable: environment variable that limits its instruction set, or None: it then uses
            whatever the CPU has, also under ``--isa``.
        build: what its sources are built with, pinned, where there is no wheel; a C++ compiler too.
        same_network: False if it computes another network, whose outputs are not compared.
        reads_graph: it is given the graph of a network or of an operator; False if it needs
            the network's own code.
    """

    name: str
    about: str
    requirements: tuple[str, ...]
    worker: str | None = None
    where: str = ""
    python: tuple[str, str] | None = None
    shares_torch: bool = False
    isa_variable: str | None = None
    build: tuple[str, ...] = ()
    same_network: bool = True
    reads_graph: bool = True

    @property
    def limited(self) -> bool:
        """Whether ``--isa`` holds for it; torch obeys the variables that limit our own process."""
        return self.shares_torch or self.isa_variable is not None


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "onnxruntime",
            "dense CPU engine",
            ("onnxruntime==1.31.1", "onnx==1.19.1", "numpy"),
            "onnxruntime_worker.py",
        ),
        Peer(
            "openvino",
            "dense CPU engine, float32",
            ("openvino==2026.4.1", "onnx==1.19.1", "numpy"),
            "openvino_worker.py",
        ),
        Peer(
            "deepsparse",
            "sparse CPU engine (archived 2025)",
            ("deepsparse==1.8.0",),
            "deepsparse_worker.py",
            python=("3.8", "3.11"),
            isa_variable="NM_ARCH",
        ),
        Peer(
            "torch-pruning",
            "removes channels of the dense network, at equal multiply-adds",
            ("torch-pruning==1.6.1",),
            "torch_pruning_worker.py",
            shares_torch=True,
            same_network=False,
            reads_graph=False,
        ),
        Peer(
            "weightwatcher",
            "power-law exponents of weight spectra",
            ("weightwatcher==0.7.7", "torch"),
            where="opentrans bench alpha",
        ),
        Peer(
            "torch-ms-deform-attn",
            "deformable attention, C++ and OpenMP",
            ("torch-ms-deform-attn==0.1.1",),
            where="python benchmarks/bench_deform.py",
            shares_torch=True,
            build=("setuptools==80.9.0", "wheel==0.45.1", "ninja==1.13.0"),
        ),
    )
}
#: Peers that need no environment of their own: one of the dense variants of every trunk run.
BUILT_IN = "torch.compile"


def chosen(text: str, *, operators: bool = False) -> list[str]:
    """Names of ``--peers``: "all" (every peer that times the network) or a comma-separated list.

    operators: of those that time single operators.

    Raises:
        OpenTransError: an unknown peer, or one that other commands time.
    """
    timing = [peer.name for peer in PEERS.values() if peer.worker is not None]
    single = [name for name in timing if PEERS[name].reads_graph]
    if text == "all":
        return single if operators else [BUILT_IN, *timing]
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if operators and name in (BUILT_IN, *timing) and name not in single:
            raise OpenTransError(
                f"peer {name!r} runs whole networks only ('opentrans bench trunk'). Choose among "
                f"all, {', '.join(single)}; PyTorch's own ways are timed beside every operator."
            )
        if name in PEERS and PEERS[name].worker is None:
            raise OpenTransError(f"peer {name!r} is timed by '{PEERS[name].where}', not here.")
        if name not in (BUILT_IN, *timing):
            raise OpenTransError(
                f"peer {name!r} is not known. Choose among all, {BUILT_IN}, {', '.join(timing)}."
            )
    return names
