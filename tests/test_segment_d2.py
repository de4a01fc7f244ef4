"""``opentrans segment`` with detectron2: our configs, and trees that can or cannot take classes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pictures are read by Pillow")
pytest.importorskip("open_clip", reason="the text encoder is open_clip's")

from segment_cases import label, noise, picture, results, segment

from opentrans.ovs.clip import build_clip, save_clip
from opentrans.ovs.tiny import TINY_SHAPE
from opentrans_kernels.masks import MaskSet

pytestmark = pytest.mark.d2
CLASSES = ("cat", "road", "sky")
KEYS = ["MODEL.OPENTRANS.MASK.FILE", ""]

TREE = """
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from opentrans.d2.tower import ClipTower


class Model(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = ClipTower("RN50", "random", width=16, layers=[1, 1, 1, 1], output_dim=32,
                                  input_resolution=64)
        self.head = torch.nn.Conv2d(3, 8, 1)
        self.bias = cfg.MODEL.BIAS
        self.names = ["a", "b"]

    def forward(self, records):
        image = records[0]["image"].float()[None] / 255
        scores = self.head(image)[0, : len(self.names)] + self.bias
        return [{"sem_seg": scores}]


@META_ARCH_REGISTRY.register()
class ClosedTree(Model):
    pass


@META_ARCH_REGISTRY.register()
class OpenTree(Model):
    semantic_on, panoptic_on = False, True

    def set_metadata(self, metadata):
        self.names = metadata.stuff_classes

    def forward(self, records):
        assert self.semantic_on and not self.panoptic_on
        return super().forward(records)


def add_tree_config(cfg):
    cfg.MODEL.BIAS = 0.0
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config and a checkpoint of a tree on the path."""
    from detectron2.config import get_cfg
    from detectron2.modeling import META_ARCH_REGISTRY

    (tmp_path / "some_tree.py").write_text(TREE)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ClosedTree", "OpenTree"):
        META_ARCH_REGISTRY._obj_map.pop(name, None)
    sys.modules.pop("some_tree", None)
    import some_tree

    cfg = get_cfg()
    some_tree.add_tree_config(cfg)
    torch.save({"model": some_tree.OpenTree(cfg).state_dict()}, tmp_path / "tree.pth")
    (tmp_path / "tree.yaml").write_text("MODEL:\n  META_ARCHITECTURE: OpenTree\n  BIAS: 1.0\n")
    return tmp_path


def words(folder: Path) -> list[object]:
    return ["--classes", ", ".join(CLASSES), "-o", folder / "out", "--text-cache",
            folder / "text", "--no-accelerate"]  # fmt: skip


@pytest.mark.parametrize("config", ["tiny/deeplabv3.yaml", "tiny/mask.yaml"])
def test_our_configs_give_the_labels_of_their_models(config: str, tmp_path: Path) -> None:
    from opentrans.d2.train_net import Trainer, load_config

    if "mask" in config:
        pytest.importorskip("transformers", reason="the mask head needs transformers")
        pytest.importorskip("scipy", reason="the mask head needs scipy")
    torch.manual_seed(0)
    save_clip(tmp_path / "clip.safetensors", build_clip(TINY_SHAPE), TINY_SHAPE)
    keys = ["MODEL.OPENTRANS.WEIGHTS", str(tmp_path / "clip.safetensors")]
    cfg = load_config(config, [*keys, *KEYS, "MODEL.WEIGHTS", ""], data=False)
    model = Trainer.build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    picture(tmp_path / "x.png", 96, 128)
    line = [tmp_path / "x.png", *words(tmp_path), "--config", config, "--weights",
            tmp_path / "model.pth", "--size", 96, "--set", *keys]  # fmt: skip
    assert segment(*line, "--set", *KEYS) == 0
    image = torch.from_numpy(noise(96, 128).transpose(2, 0, 1).copy())
    with torch.no_grad():
        found = model([{"image": image, "vocabulary": CLASSES}])[0]["sem_seg"]
    assert np.array_equal(label(tmp_path / "out", "x"), found.argmax(0).numpy())
    # The config's own mask is applied where none is named.
    mask = tmp_path / "mask.safetensors"
    convolutions = {
        name: torch.zeros_like(module.weight, dtype=torch.bool)
        for name, module in model.backbone.named_modules()
        if name.startswith("layer4") and isinstance(module, torch.nn.Conv2d)
    }
    MaskSet.from_tensors(convolutions).save(mask)
    masked = tmp_path / "masked"
    own = ["--set", "MODEL.OPENTRANS.MASK.FILE", mask, "-o", masked]
    assert segment(*line, *own) == 0
    assert f"masks: {len(convolutions)} masks" in results(masked)["model"]["report"]


def test_a_checkpoint_that_lacks_the_head_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_clip(tmp_path / "clip.safetensors", build_clip(TINY_SHAPE), TINY_SHAPE)
    torch.save({"model": {"backbone.conv1.weight": torch.zeros(8, 3, 3, 3)}}, tmp_path / "m.pth")
    picture(tmp_path / "x.png")
    assert segment(
        tmp_path / "x.png", *words(tmp_path), "--config", "tiny/deeplabv3.yaml", "--weights",
        tmp_path / "m.pth", "--set", "MODEL.OPENTRANS.WEIGHTS", tmp_path / "clip.safetensors",
        "--set", *KEYS,
    ) == 2  # fmt: skip
    assert "would stay random" in capsys.readouterr().err


def test_a_tree_that_takes_classes_is_given_them(tree: Path) -> None:
    import some_tree

    picture(tree / "x.png", 40, 48)
    line = [tree / "x.png", *words(tree), "--config", tree / "tree.yaml", "--weights",
            tree / "tree.pth", "--size", 40, "--setup", "some_tree:add_tree_config"]  # fmt: skip
    assert segment(*line) == 0
    pixels = noise(40, 48)[:, :, ::-1].copy()  # detectron2's INPUT.FORMAT is BGR
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float()[None] / 255
    head = torch.nn.Conv2d(3, 8, 1)
    state = torch.load(tree / "tree.pth", weights_only=True)["model"]
    head.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("head.")})
    with torch.no_grad():
        expected = head(image)[0, :3].argmax(0).numpy()
    assert some_tree.OpenTree and np.array_equal(label(tree / "out", "x"), expected)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["--set", "MODEL.META_ARCHITECTURE", "ClosedTree"], "ClosedTree cannot take other"),
        (["--set", "MODEL.META_ARCHITECTURE", "NoTree"], "no NoTree can be built"),
        (["--set", "MODEL.WARP", "1"], "WARP"),
        (["--setup", "some_tree:none"], "is no MODULE:FUNCTION"),
        (["--setup", "no_such_module:f"], "no_such_module cannot be imported"),
    ],
)
def test_what_a_tree_cannot_is_said(
    extra: list[str], reason: str, tree: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    picture(tree / "x.png")
    line = [tree / "x.png", *words(tree), "--config", tree / "tree.yaml", "--weights",
            tree / "tree.pth", "--setup", "some_tree:add_tree_config"]  # fmt: skip
    assert segment(*line, *extra) == 2
    assert reason in capsys.readouterr().err
