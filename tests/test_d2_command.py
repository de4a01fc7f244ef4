"""The training command on detectron2: its configs, a frozen tower, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.d2
pytest.importorskip("open_clip")


@pytest.mark.parametrize(
    ("file", "architecture", "steps"),
    [
        ("imp_rn50.yaml", "OpenTransDistillation", 22_000),
        ("deeplabv3_rn50.yaml", "OpenTransDeepLab", 50_000),
        ("mask_rn50.yaml", "OpenTransMaskClassifier", 50_000),
        ("frozen_mask_rn50.yaml", "OpenTransMaskClassifier", 50_000),
    ],
)
def test_the_rn50_configs_name_every_file_and_start_with_none_missing(
    file: str, architecture: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentrans.d2 import ConfigError, train_net
    from opentrans.ovs import write_shapes

    monkeypatch.chdir(tmp_path)
    data = tmp_path / file.partition(".")[0]
    write_shapes(data, train=1, val=1, size=64)
    options = ["MODEL.OVS.DATA_FOLDER", str(data), "DATASETS.TRAIN", f"('{data.name}_train',)",
               "DATASETS.TEST", "()", "MODEL.DEVICE", "cpu"]  # fmt: skip
    needed = ["RN50.pt"]
    if architecture != "OpenTransDistillation":
        needed += ["rn50-imp/model_final.pth", "rn50-imp/masks/masks.safetensors"]
    Path("rn50-imp/masks").mkdir(parents=True)
    for name in reversed(needed):  # every one of them is missed, by its own name
        for other in needed:
            Path(other).touch()
        Path(name).unlink()
        with pytest.raises(ConfigError, match=rf"{name}'.*(Name|leave)"):
            train_net.load_config(file, options)
    Path("RN50.pt").touch()
    for name in needed:
        Path(name).touch()
    cfg = train_net.load_config(file, options)
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.SOLVER.MAX_ITER) == (architecture, steps)
    node = cfg.MODEL.OPENTRANS
    assert node.IMP.ENABLED == (architecture == "OpenTransDistillation")
    assert node.IMP.ROUNDS * node.IMP.PERIOD == 22_000
    assert bool(node.MASK.FILE) != node.IMP.ENABLED
    assert cfg.MODEL.OVS.BACKBONE_MULTIPLIER == {"imp": 1.0, "frozen": 0.0}.get(
        file.partition("_")[0], 0.1
    )
    assert (node.FREEZE.RULE == "median") == (file in ("deeplabv3_rn50.yaml", "mask_rn50.yaml"))
    # Without mask, freezing and checkpoint: fine-tuning of the plain tower.
    plain = [
        "MODEL.WEIGHTS",
        "",
        "MODEL.OPENTRANS.MASK.FILE",
        "",
        "MODEL.OPENTRANS.FREEZE.RULE",
        "",
    ]
    for name in needed[1:]:
        Path(name).unlink()
    assert train_net.load_config(file, [*options, *plain]).MODEL.OPENTRANS.WEIGHTS == "RN50.pt"


def test_configs_that_cannot_be_read_or_evaluated_are_refused(tmp_path: Path) -> None:
    from opentrans.d2 import ConfigError
    from opentrans.d2.train_net import load_config

    for text in ("MODEL: [1\n", "_BASE_: nowhere.yaml\n"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"(?s)bad.yaml or a _BASE_.*Correct the file"):
            load_config(str(tmp_path / "bad.yaml"))
    options = ["MODEL.META_ARCHITECTURE", "OpenTransDeepLab", "MODEL.WEIGHTS", ""]
    with pytest.raises(ConfigError, match="MODEL.META_ARCHITECTURE OpenTransMaskClassifier"):
        load_config("tiny/mask.yaml", [*options, "MODEL.DEVICE", "cpu"])


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (["MODEL.OPENTRANS.MASK.FIEL", "x"], r"Did you mean MODEL\.OPENTRANS\.MASK\.FILE\?"),
        (["MODEL.OVS.TEMPLATE", "x"], r"Did you mean MODEL\.OVS\.TEMPLATES\?"),
        (["SOLVER.BASE_LRR", "1"], r"Did you mean SOLVER\.BASE_LR\?"),
        (["MODEL.META_ARCHITECTURE", "OpenTransDeplab"], "Ours: OpenTransDeepLab"),
        (["MODEL.BACKBONE.NAME", "ResNext"], "Ours: OpenTransCLIPResNet"),
        (["MODEL.OVS.BACKBONE_MULTIPLIER", "0.0"], "Set RULE '' and PLAN ''"),
        (["MODEL.WEIGHTS", "gone.pth"], "gone.pth' does not exist"),
        (["MODEL.WEIGHTS", "", "MODEL.OPENTRANS.WEIGHTS", "gone.pt"], "or write random"),
    ],
)
def test_configs_of_the_command_that_cannot_be(options: list[str], fix: str) -> None:
    from opentrans.d2 import ConfigError
    from opentrans.d2.train_net import load_config

    with pytest.raises(ConfigError, match=fix):
        load_config("tiny/deeplabv3.yaml", ["MODEL.DEVICE", "cpu", *options])


def test_a_frozen_tower_learns_nothing_and_its_norms_stay(tmp_path: Path) -> None:
    from opentrans.d2 import ConfigError
    from opentrans.d2.train_net import Trainer, load_config
    from opentrans.ovs import train_tiny_clip, write_shapes

    data = tmp_path / "frozen"
    write_shapes(data, train=2, val=1, size=64)
    clip = str(train_tiny_clip(tmp_path / "clip.safetensors", steps=1, batch=13))
    options = [
        "MODEL.OVS.DATA_FOLDER", str(data), "DATASETS.TRAIN", "('frozen_train',)",
        "DATASETS.TEST", "()", "MODEL.OPENTRANS.WEIGHTS", clip, "MODEL.WEIGHTS", "",
        "MODEL.OPENTRANS.MASK.FILE", "global:0.5", "MODEL.OPENTRANS.FREEZE.RULE", "",
        "MODEL.OVS.BACKBONE_MULTIPLIER", "0.0", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH",
        "2", "OUTPUT_DIR", str(tmp_path / "out"),
    ]  # fmt: skip
    trainer = Trainer(load_config("tiny/deeplabv3.yaml", options))
    before = {n: v.clone() for n, v in trainer.model.state_dict().items()}
    trainer.resume_or_load(resume=False)
    trainer.train()
    masks = next(h for h in trainer._hooks if type(h).__name__ == "MaskHook").masks.masks
    for name, value in trainer.model.backbone.state_dict().items():
        conv = masks.get(name.removesuffix(".weight"))
        kept = before[f"backbone.{name}"] if conv is None else before[f"backbone.{name}"] * conv
        assert torch.equal(value, kept), name
    head = {n: v for n, v in trainer.model.named_parameters() if n.startswith("sem_seg_head")}
    assert any(not torch.equal(v, before[n]) for n, v in head.items())
    with pytest.raises(ConfigError, match="Set it to 1"):
        Trainer.build_model(load_config("tiny/imp.yaml", [*options[:8], *options[14:16]]))


def test_checkpoints_that_hold_nothing_of_the_model_are_refused(tmp_path: Path) -> None:
    from opentrans.d2.trainer import Checkpointer
    from opentrans_kernels import CheckpointError

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"123")
    with pytest.raises(CheckpointError, match="Name a whole checkpoint"):
        Checkpointer(model).load(str(broken))
    checkpointer = Checkpointer(model)
    for state, nowhere in (({"a.b": torch.ones(1)}, True), (model.state_dict(), False)):
        torch.save({"model": state}, tmp_path / "other.pth")
        checkpointer.load(str(tmp_path / "other.pth"))
        assert checkpointer.fits_nowhere is nowhere
