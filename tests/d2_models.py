"""A small model with a CLIP tower, and the least trainer that detectron2's hooks can follow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from head_nets import Encoder
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from opentrans.d2.tower import ClipTower
from opentrans.d2.training import Step
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.masks.names import conv_modules

SIZE = (64, 64)
CLASSES = 5
LEVELS = ("res3", "res4", "res5")


class Backbone(nn.Module):
    """A tower where FC-CLIP has it: ``backbone.clip_model.visual``."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_model = nn.Module()
        self.clip_model.visual = tower()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.clip_model.visual(x)["res5"]


class Segmenter(nn.Module):
    """Tower and a linear classifier per position; losses in training, scores in evaluation."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(512, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> Any:
        found = self.backbone(x)
        scores = self.head(found["res5"] if isinstance(found, dict) else found)
        return {"loss": scores.square().mean()} if self.training else scores


class MaskFormer(Segmenter):
    """A tower, a deformable encoder over three of its maps, and a classifier per position."""

    def __init__(self) -> None:
        super().__init__(tower())
        self.input_proj = nn.ModuleList(nn.Conv2d(w, 32, 1) for w in (128, 256, 512))
        self.encoder = Encoder()
        self.head = nn.Conv2d(32, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> object:
        found = self.backbone(x)
        maps = [p(found[n]) for p, n in zip(self.input_proj, LEVELS, strict=True)]
        src = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        shapes = torch.tensor([m.shape[-2:] for m in maps])
        sizes = shapes.prod(1)
        reference = torch.linspace(0, 1, src.shape[1]).view(1, -1, 1, 1)
        reference = reference.expand(len(src), -1, len(maps), 2)
        out = self.encoder(src, None, reference, shapes, sizes.cumsum(0) - sizes)
        fine = out[:, : int(sizes[0])].transpose(1, 2).unflatten(2, maps[0].shape[-2:])
        scores = self.head(fine)
        return {"loss": scores.square().mean()} if self.training else scores


def tower(**options: Any) -> ClipTower:
    """Width 16, one block per stage, random weights in which every layer matters."""
    logging.getLogger("opentrans.d2.tower").setLevel(logging.ERROR)
    shape = {"width": 16, "layers": [1, 1, 1, 1], "output_dim": 32, "input_resolution": 64}
    made = ClipTower("RN50", "random", **{**shape, **options})
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return made


def segmenter(seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    return Segmenter(tower())


def dead_are_zero(model: Segmenter, masks: MaskSet) -> bool:
    convs = conv_modules(model.backbone)
    return all(bool((convs[n].weight[~m] == 0).all()) for n, m in masks.masks.items())


class Storage:
    """Keeps the scalars; ``latest`` as detectron2's EventStorage."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def put_scalar(self, name: str, value: float, smoothing_hint: bool = True) -> None:
        self.scalars[name] = value

    def latest(self) -> dict[str, tuple[float, int]]:
        return {name: (value, 0) for name, value in self.scalars.items()}


class Checkpointer:
    def __init__(self) -> None:
        self.saved: list[str] = []

    def save(self, name: str) -> None:
        self.saved.append(name)


class Evaluation(Step):
    """As detectron2's EvalHook: ``_func`` every ``_period`` steps."""

    def __init__(self, period: int, function: Callable[[], Any]) -> None:
        super().__init__()
        self._period, self._func = period, function

    def after_step(self) -> None:
        if self.done % self._period == 0:
            self._func()


class Trainer:
    """The loop of detectron2's TrainerBase, in thirty lines."""

    def __init__(
        self,
        model: nn.Module,
        hooks: Iterable[Step] = (),
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        **options: Any,
    ) -> None:
        self.model = model
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        options = {"lr": 1e-2, "weight_decay": 0.05} | options
        self.optimizer = optimizer(plain.parameters(), **options)
        self.storage, self.checkpointer = Storage(), Checkpointer()
        self.iter = self.start_iter = 0
        self.seed = 0
        self._hooks = list(hooks)
        for hook in self._hooks:
            hook.trainer = self

    def train(self, until: int, last: int | None = None) -> Trainer:
        """Steps ``start_iter`` to ``until`` of a run that is to have ``last`` steps."""
        self.max_iter = until if last is None else last
        self.model.train()
        self.iter = self.start_iter
        try:
            for hook in self._hooks:
                hook.before_train()
            for step in range(self.start_iter, until):
                self.iter = step
                for hook in self._hooks:
                    hook.before_step()
                self.run_step()
                for hook in self._hooks:
                    hook.after_step()
            self.iter = until
        finally:
            for hook in self._hooks:
                hook.after_train()
        return self

    def run_step(self) -> None:
        generator = torch.Generator().manual_seed(self.seed + self.iter)
        loss = self.model(torch.randn(2, 3, *SIZE, generator=generator))["loss"]
        self.storage.scalars["total_loss"] = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """What a checkpoint would hold, through torch.save's own rules for plain data."""
        import io

        plain = self.model.module if hasattr(self.model, "module") else self.model
        state = {
            "model": plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iter - 1,
            "hooks": {type(h).__name__: h.state_dict() for h in self._hooks},
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    def resume(self, state: dict[str, Any]) -> Trainer:
        """In detectron2's order: model, hooks, optimizer."""
        plain = self.model.module if hasattr(self.model, "module") else self.model
        plain.load_state_dict(state["model"])
        for hook in self._hooks:
            if state["hooks"].get(type(hook).__name__):
                hook.load_state_dict(state["hooks"][type(hook).__name__])
        self.optimizer.load_state_dict(state["optimizer"])
        self.start_iter = state["iteration"] + 1
        return self
