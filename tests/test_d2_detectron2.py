"""Config, backbone and hooks in the real detectron2; one line where it is missing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.d2
pytest.importorskip("open_clip")


@pytest.fixture
def cfg(tmp_path: Path) -> Any:
    from detectron2.config import get_cfg

    from opentrans.d2 import add_opentrans_config

    logging.getLogger("opentrans.d2.tower").setLevel(logging.ERROR)
    made = get_cfg()
    add_opentrans_config(made)
    made.MODEL.DEVICE = "cpu"
    made.MODEL.BACKBONE.NAME = "OpenTransCLIPResNet"
    made.MODEL.OPENTRANS.WEIGHTS = "random"
    made.MODEL.OPENTRANS.WIDTH = 16
    made.MODEL.OPENTRANS.LAYERS = [1, 1, 1, 1]
    made.MODEL.OPENTRANS.ACCELERATE.INPUT_SIZE = [64, 64]
    made.MODEL.OPENTRANS.ACCELERATE.MEASURE = False
    made.OUTPUT_DIR = str(tmp_path)
    made.SOLVER.CHECKPOINT_PERIOD = 2
    made.SOLVER.MAX_ITER = 4
    made.SOLVER.CLIP_GRADIENTS.ENABLED = True
    made.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    made.TEST.EVAL_PERIOD = 2
    return made


def test_keys_merge_and_unknown_ones_are_named(cfg: Any, tmp_path: Path) -> None:
    from opentrans.d2 import ConfigError, OpenTransConfig

    cfg.merge_from_list(["MODEL.OPENTRANS.FREEZE.RULE", "median"])
    assert OpenTransConfig.from_cfg(cfg.clone()).FREEZE.RULE == "median"
    file = tmp_path / "c.yaml"
    file.write_text("VERSION: 2\nMODEL:\n  OPENTRANS:\n    MASK:\n      FIEL: m.pth\n")
    cfg.merge_from_file(str(file))
    with pytest.raises(ConfigError, match=r"Did you mean MODEL\.OPENTRANS\.MASK\.FILE"):
        OpenTransConfig.from_cfg(cfg)


def test_the_backbone_comes_from_the_registry(cfg: Any) -> None:
    from detectron2.modeling import build_backbone

    from opentrans.d2 import ConfigError

    cfg.MODEL.OPENTRANS.OUT_FEATURES = ["stem", "res2", "res5", "attn", "clip_embedding"]
    made = build_backbone(cfg)
    shapes = {name: (s.channels, s.stride) for name, s in made.output_shape().items()}
    assert shapes == {
        "stem": (16, 2), "res2": (64, 4), "res5": (512, 32), "attn": (1024, 32),
        "clip_embedding": (1024, -1),
    }  # fmt: skip
    assert made.size_divisibility == 0
    found = made(torch.randn(1, 3, 75, 101))
    assert set(found) == {"stem", "res2", "res5", "attn", "clip_vis_dense"}
    cfg.MODEL.OPENTRANS.WEIGHTS = ""
    with pytest.raises(ConfigError, match="MODEL.OPENTRANS.WEIGHTS random"):
        build_backbone(cfg)
    cfg.MODEL.WEIGHTS = "model_final.pth"
    assert build_backbone(cfg).weights == ""


def test_lazy_configs_read_the_same_options(tmp_path: Path) -> None:
    from detectron2.config import LazyCall, LazyConfig, instantiate

    from opentrans.d2 import (
        ConfigError,
        OpenTransCLIPResNet,
        OpenTransConfig,
        build_opentrans_hooks,
        lazy_opentrans_config,
    )

    node = LazyConfig.apply_overrides(
        lazy_opentrans_config(freeze={"rule": "median"}), ["imp.rate=0.2"]
    )
    found = OpenTransConfig.from_cfg(node)
    assert (found.FREEZE.RULE, found.IMP.RATE) == ("median", 0.2)
    node = lazy_opentrans_config(imp={"enabled": True})
    with pytest.raises(ConfigError, match="output_dir=cfg.train.output_dir"):
        build_opentrans_hooks(node)  # mask files would go nowhere
    hooks = build_opentrans_hooks(node, output_dir=str(tmp_path))
    (imp,) = [hook for hook in hooks if type(hook).__name__ == "IMPHook"]
    assert imp.output == tmp_path / "masks"
    call = LazyCall(OpenTransCLIPResNet)(
        arch="RN50", weights="random", width=16, layers=[1, 1, 1, 1], out_features=["res5"]
    )
    assert list(instantiate(call).output_shape()) == ["res5"]


class Model(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(512, 3, 1)

    def forward(self, images: torch.Tensor) -> Any:
        scores = self.head(self.backbone(images)["res5"])
        return {"loss": scores.square().mean()} if self.training else scores


class Images:
    """A batch per step, the same in every run."""

    def __init__(self, start: int = 0) -> None:
        self.step = start

    def __iter__(self) -> Images:
        return self

    def __next__(self) -> torch.Tensor:
        self.step += 1
        return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(self.step))


def trainer_class(start: int, evaluations: list[int]) -> Any:
    from detectron2.engine import DefaultTrainer
    from detectron2.modeling import build_backbone

    from opentrans.d2 import build_opentrans_hooks
    from opentrans_kernels.plan.subject import accelerated_parts

    class Trainer(DefaultTrainer):
        @classmethod
        def build_model(cls, cfg: Any) -> nn.Module:
            torch.manual_seed(0)
            return Model(build_backbone(cfg))

        @classmethod
        def build_train_loader(cls, cfg: Any) -> Any:
            return Images(start)

        @classmethod
        def test(cls, cfg: Any, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
            evaluations.append(len(accelerated_parts(model)))
            return {}

        def build_hooks(self) -> list[Any]:
            return build_opentrans_hooks(self.cfg, super().build_hooks())

    return Trainer


def options_of(case: str, cfg: Any) -> None:
    node = cfg.MODEL.OPENTRANS
    if case == "imp":
        node.IMP.ENABLED, node.IMP.ROUNDS, node.IMP.PERIOD, node.IMP.RATE = True, 3, 1, 0.3
    else:
        node.MASK.FILE, node.MASK.AT, node.MASK.REMOVE_AT = "global:0.7", 1, 3
        node.ACCELERATE.ENABLED, node.ACCELERATE.DEVICE = True, "require"
    node.FREEZE.RULE, node.FREEZE.AT = "all_3x3", 1


@pytest.mark.parametrize("case", ["mask", "imp"])
def test_default_trainer_runs_resumes_and_evaluates(case: str, cfg: Any, tmp_path: Path) -> None:
    options_of(case, cfg)
    evaluations: list[int] = []
    whole = trainer_class(0, evaluations)(cfg)
    whole.resume_or_load(resume=False)
    whole.train()
    assert evaluations and (case == "imp" or all(evaluations))
    final = {n: v.clone() for n, v in whole.model.state_dict().items()}
    if case == "imp":
        assert len(list((tmp_path / "masks").iterdir())) == 4
    else:
        assert (tmp_path / "opentrans_masked_0000003.pth").exists()
    metrics = (tmp_path / "metrics.json").read_text()
    assert "opentrans/density" in metrics and "opentrans/frozen_layers" in metrics
    # Interrupted after two steps: continue from that checkpoint in a new trainer.
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    again = trainer_class(2, [])(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    again.train()
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, final[name]), name


def test_resume_with_a_changed_rule_is_refused(cfg: Any, tmp_path: Path) -> None:
    from opentrans_kernels import PlanError

    options_of("imp", cfg)
    trainer = trainer_class(0, [])(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    cfg.MODEL.OPENTRANS.FREEZE.RULE = "prefix:layer2"
    other = trainer_class(0, [])(cfg)
    with pytest.raises(PlanError, match="MODEL.OPENTRANS.FREEZE settings of the run"):
        other.resume_or_load(resume=True)


@pytest.mark.parametrize("case", ["imp", "mask"])
def test_resume_with_a_hook_taken_out_or_added_is_refused(case: str, cfg: Any) -> None:
    from opentrans_kernels import PlanError

    plain = cfg.clone()
    options_of(case, cfg)
    trainer = trainer_class(0, [])(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    unfrozen = cfg.clone()
    unfrozen.MODEL.OPENTRANS.FREEZE.RULE, unfrozen.MODEL.OPENTRANS.FREEZE.AT = "", 0
    for other in (plain, unfrozen):
        with pytest.raises(PlanError, match="MODEL.OPENTRANS settings of the run"):
            trainer_class(0, [])(other).resume_or_load(resume=True)
    added = trainer_class(0, [])(plain)
    added.resume_or_load(resume=False)
    added.train()
    with pytest.raises(PlanError, match="started with no MaskHook"):
        trainer_class(0, [])(cfg).resume_or_load(resume=True)


@pytest.mark.parametrize(("at", "remove_at"), [(0, 3), (1, -1), (0, -1)])
def test_evaluation_takes_the_zeros_of_a_checkpoint_whose_mask_had_a_schedule(
    at: int, remove_at: int, cfg: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from opentrans.d2.train_net import _inference

    model = trainer_class(0, []).build_model(cfg).eval()
    node = cfg.MODEL.OPENTRANS.MASK
    node.FILE, node.AT, node.REMOVE_AT = "global:0.9", at, remove_at
    before = {n: v.clone() for n, v in model.state_dict().items()}
    caplog.set_level(logging.WARNING)
    done = _inference(model, cfg)
    scheduled = bool(at) or remove_at >= 0
    assert (done.masks is None) is scheduled
    assert ("zeros it has" in caplog.text) is scheduled
    same = all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert same is scheduled
    assert cfg.MODEL.OPENTRANS.MASK.FILE == "global:0.9"


def test_hooks_come_off_and_a_trainer_trains_twice(cfg: Any, tmp_path: Path) -> None:
    """detectron2's loop with hooks registered by hand; DefaultTrainer itself trains only once."""
    from detectron2.engine import SimpleTrainer
    from detectron2.engine.hooks import EvalHook

    from opentrans.d2 import build_opentrans_hooks
    from opentrans_kernels.plan.subject import accelerated_parts

    for case in ("mask", "imp"):
        own = cfg.clone()
        options_of(case, own)
        own.OUTPUT_DIR = str(tmp_path / case)
        model = trainer_class(0, []).build_model(own)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        trainer = SimpleTrainer(model, Images(), optimizer)
        seen: list[int] = []

        def evaluate(model: nn.Module = model, seen: list[int] = seen) -> None:
            seen.append(len(accelerated_parts(model)))

        trainer.register_hooks(build_opentrans_hooks(own, [EvalHook(2, evaluate)]))
        trainer.train(0, 4)
        if case == "mask":
            assert len(seen) == 2 and all(seen), "also the last evaluation is accelerated"
        trainer._hooks.pop()  # detectron2's own EvalHook does not survive the end of a training
        for _ in range(2):
            assert not any(p._backward_hooks for p in model.parameters())
            assert not optimizer._optimizer_state_dict_pre_hooks
            trainer.train(4, 6)


def test_detectron2s_own_counter_sees_the_sparse_layers(cfg: Any) -> None:
    from detectron2.utils.analysis import FlopCountAnalysis

    from opentrans.d2 import attach

    model = trainer_class(0, []).build_model(cfg).eval()
    attach(model, masks="global:0.9")
    image = torch.randn(1, 3, 64, 64)

    class Counted(nn.Module):
        """What analyze_model counts takes detectron2's list of dicts; this takes the image."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
            return self.model(inputs[0]["image"])

    def count() -> Any:
        return FlopCountAnalysis(Counted(), [{"image": image}])

    dense = count().by_operator()
    assert not any(name.startswith("sparse") for name in dense)
    attach(model, accelerate=True, input_size=(64, 64), measure=False)
    fast = count().by_operator()
    ours = sum(macs for name, macs in fast.items() if name.startswith("sparse"))
    # The zeros are a tenth of the weights everywhere but in the first layer, which stays dense.
    assert 0 < ours < 0.3 * dense["conv"] and fast["conv"] < 0.1 * dense["conv"]
