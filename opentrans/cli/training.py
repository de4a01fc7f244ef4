"""What the training commands share: images, tower, frozen teacher, distillation loss, optimizer."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import ARCH_HELP, add_json, add_threads, arch_packages, positive
from .render import Output, check_writable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from opentrans.distill import Distiller
    from opentrans.images import ImageFolder
    from opentrans_kernels.masks import MaskSet

LOSSES = ("visual", "opentrans", "paper")
#: Those that scikit-image installs without a download, as of its version 0.26.
EXAMPLE_PHOTOS = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "horse",
    "hubble_deep_field", "ihc", "moon", "motorcycle_left", "motorcycle_right", "page", "retina",
    "rocket", "text",
)  # fmt: skip


def add_training(parser: argparse.ArgumentParser, *, output: str) -> None:
    """Options of every training command; ``output`` is the default folder."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", metavar="DIR", help="folder of images, searched recursively")
    source.add_argument(
        "--example", action="store_true",
        help="the sample images of scikit-image and settings for two minutes on a CPU",
    )  # fmt: skip
    parser.add_argument("--arch", default="RN50", help=ARCH_HELP)
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights to start from; without it they are synthetic"
    )
    parser.add_argument(
        "--teacher", metavar="FILE",
        help="weights of the frozen teacher, for instance those before pruning; without it the "
        "network as it starts",
    )  # fmt: skip
    parser.add_argument("--output", default=output, metavar="DIR", help=f"default {output}")
    parser.add_argument(
        "--loss", choices=LOSSES, default="visual",
        help="distillation from the network as it starts: visual-guided (default), or text-guided "
        "as in the released code (opentrans) or the paper; the latter two need --classes",
    )  # fmt: skip
    parser.add_argument(
        "--classes", metavar="A,B,...", help="class names for a text-guided loss, or a text file"
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="default 8")
    parser.add_argument("--size", type=positive, default=224, metavar="PX", help="default 224")
    parser.add_argument(
        "--lr", type=float, default=1.5e-5,
        help="of AdamW (default 1.5e-5, the published rate of the backbone)",
    )  # fmt: skip
    parser.add_argument("--weight-decay", type=float, default=0.05, help="default 0.05")
    parser.add_argument(
        "--clip-norm", type=float, default=0.01, metavar="X",
        help="largest norm of the gradient (default 0.01, 0: no limit)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of data and weights")
    parser.add_argument(
        "--fresh", action="store_true", help="an error if the folder holds a run; else it continues"
    )
    add_threads(parser)
    add_json(parser)
    parser.set_defaults(packages=training_packages)


def training_packages(options: argparse.Namespace) -> dict[str, str]:
    """What a training command needs beside torch."""
    needs = {"PIL": "images are read and written by Pillow"}
    if options.example:
        needs["skimage"] = "--example uses the sample images of scikit-image"
    if options.loss != "visual":
        needs["open_clip"] = "the text encoder is open_clip's"
    return arch_packages(options) | needs


def example_images() -> list[Path]:
    """Photographs that come with scikit-image. Raises OpenTransError if they are not there."""
    from opentrans_kernels.errors import OpenTransError
    from opentrans_kernels.lazy import require_packages

    require_packages({"skimage": "--example uses the sample images of scikit-image"})
    found = importlib.util.find_spec("skimage")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    files = [
        file
        for place in places
        for name in EXAMPLE_PHOTOS
        for file in (Path(place) / "data").glob(f"{name}.*")
    ]
    if not files:
        raise OpenTransError(
            "--example uses the sample images of scikit-image, and the one that is installed has "
            "none of them. Install version 0.26 or use any folder of images: --images DIR."
        )
    return files


def example_settings(
    options: argparse.Namespace,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    settings: Mapping[str, Any],
) -> None:
    """Set ``settings`` in ``options`` wherever the command line left the default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, value in settings.items():
        if getattr(options, name) == parser.get_default(name):
            setattr(options, name, value)


@dataclass
class Training:
    """A student in eval mode (batch statistics stay fixed), its teacher, loss, data, settings.

    ``settings`` must be the same when a run is continued. ``banner``: what must be said about it.
    """

    model: nn.Module
    distiller: Distiller
    images: ImageFolder
    settings: dict[str, Any]
    banner: str | None
    clip_norm: float

    @property
    def synthetic(self) -> bool:
        """Whether the weights were made up."""
        return self.banner is not None

    def parameters(self) -> list[nn.Parameter]:
        """What the loss reaches and may train: the trunk, and what the loss itself learns."""
        trunk = [
            p
            for name, p in self.model.named_parameters()
            if p.requires_grad and "attnpool" not in name.split(".")
        ]
        return [*trunk, *(p for p in self.distiller.parameters() if p.requires_grad)]

    def stepper(self, optimizer: torch.optim.Optimizer) -> Callable[[nn.Module, int], torch.Tensor]:
        """``step(model, iteration)``: one optimizer step on the batch of that number."""
        from torch.nn.utils import clip_grad_norm_

        def step(model: nn.Module, iteration: int) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = self.distiller.loss(model, self.images.batch(iteration))
            if not math.isfinite(loss.item()):
                return loss.detach()  # the caller refuses it; the weights stay as they are
            loss.backward()
            if self.clip_norm > 0:
                clip_grad_norm_(self.parameters(), self.clip_norm)
            optimizer.step()
            return loss.detach()

        return step


def prepare(options: argparse.Namespace, out: Output, masks: MaskSet | None = None) -> Training:
    """Check the options and build everything. ``masks`` are applied to the student only."""
    from opentrans.distill import Distiller, Teacher
    from opentrans.images import ImageFolder
    from opentrans_kernels.bench.subject import build_tower, load_weights
    from opentrans_kernels.errors import OpenTransError

    check_writable(options.output, directory=True)
    if not options.images and not options.example:
        raise OpenTransError("no images to train on. Pass --images DIR, or --example.")
    source = example_images() if options.example else options.images
    images = ImageFolder(source, options.size, options.batch, seed=options.seed)
    images.check()
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = build_tower(options.arch, seed=options.seed, empty=options.checkpoint is not None)
    banner = None
    if options.checkpoint is not None:
        load_weights(model, options.checkpoint)
    else:
        banner = "SYNTHETIC weights: what is pruned and learnt here says nothing about CLIP."
        out.warn(banner)
    text = _vocabulary(options) if options.loss != "visual" else None
    teacher = Teacher.copy_of(model)
    if options.teacher is not None:
        load_weights(teacher.tower, options.teacher)
    distiller = Distiller(teacher, loss=options.loss, text=text)
    model.eval().requires_grad_(True)
    if masks is not None:
        masks.apply_(model)
    out.text(
        f"{len(images)} images of {options.images or 'scikit-image'}, {options.batch} per step at "
        f"{options.size}x{options.size}; distillation loss {options.loss!r} from "
        f"{options.teacher or 'the network as it starts'}"
    )
    names = ("arch", "loss", "batch", "size", "lr", "weight_decay", "clip_norm", "seed", "classes")
    settings = {name: getattr(options, name) for name in names}
    for name in ("checkpoint", "teacher"):
        path = getattr(options, name)
        settings[name] = path and Path(path).name
    return Training(model, distiller, images, settings, banner, options.clip_norm)


def _vocabulary(options: argparse.Namespace) -> torch.Tensor:
    """Text embeddings of ``--classes``, from the text encoder of the checkpoint, made once."""
    from opentrans.distill import TextCache
    from opentrans_kernels.bench.subject import load_weights
    from opentrans_kernels.errors import OpenTransError
    from opentrans_kernels.lazy import optional_module

    if not options.classes:
        raise OpenTransError(
            f"--loss {options.loss} compares with text. Name the classes with --classes "
            "A,B,... or a file with one per line, or use --loss visual."
        )
    listed = Path(options.classes)
    text = listed.read_text(encoding="utf-8") if listed.is_file() else options.classes
    names = [name.strip() for name in text.replace("\n", ",").split(",") if name.strip()]
    open_clip = optional_module("open_clip", "the text encoder is open_clip's")
    if open_clip.get_model_config(options.arch) is None:
        raise OpenTransError(
            f"{options.arch} has no text encoder in open_clip. Use a CLIP tower such as RN50, or "
            "--loss visual."
        )
    clip = open_clip.create_model(options.arch, pretrained=None)
    if options.checkpoint is not None:
        load_weights(clip, options.checkpoint)  # names what is missing if it has no text encoder
    clip.eval().requires_grad_(False)
    return TextCache(clip, open_clip.get_tokenizer(options.arch)).vocabulary(names)
