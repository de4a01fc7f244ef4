"""The tiny run on detectron2: distil and prune, transfer, fine-tune, accelerate, evaluate.

Without detectron2 every test here prints one skip line. The quick tests train a few steps, for the
mechanics; the slow one follows docs/tiny-run.md and must learn.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opentrans.ovs import SemanticQuality, train_tiny_clip, write_shapes
from opentrans.ovs.shapes import UNSEEN as NEVER_SEEN
from opentrans_kernels.errors import CheckpointError, OpenTransError, PlanError
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.plan.subject import accelerated_parts

pytestmark = pytest.mark.d2
UNSEEN = "('shapes_unseen',)"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data and CLIP; datasets are named after it, so there is one per process."""
    folder = tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    write_shapes(folder / "shapes", train=8, val=3, size=64)
    train_tiny_clip(folder / "clip.safetensors", steps=4, batch=13)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def config(file: str, output: str, *options: Any) -> Any:
    """One of our configs, a few steps long, on 64 pixels."""
    from opentrans.d2.train_net import load_config

    small = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH",
             "2", "SOLVER.MAX_ITER", "3", "OUTPUT_DIR", output,
             "MODEL.OPENTRANS.ACCELERATE.INPUT_SIZE", "[64, 64]",
             "MODEL.OPENTRANS.ACCELERATE.MEASURE", "False"]  # fmt: skip
    return load_config(file, [*small, *map(str, options)])


def weights(path: str) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture(scope="module")
def pruned(place: Path) -> dict[str, str]:
    """Four rounds of pruning by distillation, one step each."""
    from opentrans.d2.train_net import train

    train(
        config("tiny/imp.yaml", "imp", "MODEL.OPENTRANS.IMP.PERIOD", 1, "SOLVER.MAX_ITER", 4,
               "MODEL.OPENTRANS.IMP.RATE", 0.4)
    )  # fmt: skip
    return {"MODEL.WEIGHTS": "imp/model_final.pth",
            "MODEL.OPENTRANS.MASK.FILE": "imp/masks/masks.safetensors"}  # fmt: skip


def flat(options: dict[str, str]) -> list[str]:
    return [part for pair in options.items() for part in pair]


def test_pruning_by_distillation_writes_masks_that_hold(pruned: dict[str, str]) -> None:
    masks = MaskSet.load(pruned["MODEL.OPENTRANS.MASK.FILE"])
    assert masks.density() == pytest.approx(0.6**4, abs=1e-3)
    state = weights(pruned["MODEL.WEIGHTS"])
    assert not any(key.startswith("distiller.teacher") for key in state)
    for name, mask in masks.masks.items():
        weight = state[f"backbone.{name}.weight"]
        assert int(weight[~mask].count_nonzero()) == 0, name
        assert int(weight[mask].count_nonzero()) == int(mask.sum()), name


@pytest.mark.parametrize("kind", ["deeplabv3", "mask"])
def test_pruned_tower_is_transferred_frozen_tuned_accelerated_and_evaluated(
    pruned: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentrans.d2 import train_net

    if kind == "mask":
        pytest.importorskip("transformers", reason="the mask head needs transformers")
    output = f"tuned-{kind}"
    own = ["DATASETS.TEST", UNSEEN, *flat(pruned)]
    results = train_net.train(config(f"tiny/{kind}.yaml", output, *own))
    assert np.isfinite(results["sem_seg"]["mIoU"])
    assert results["sem_seg"]["chance_things"] == pytest.approx(100 / 7)
    assert ("panoptic_seg" in results) == (kind == "mask")
    start, end = weights(pruned["MODEL.WEIGHTS"]), weights(f"{output}/model_final.pth")
    masks = MaskSet.load(pruned["MODEL.OPENTRANS.MASK.FILE"]).masks
    for name, mask in masks.items():
        assert int(end[f"backbone.{name}.weight"][~mask].count_nonzero()) == 0, name
    convs = [f"backbone.{name}.weight" for name in masks]
    moved = {key for key in convs if not torch.equal(start[key], end[key])}
    assert 0.3 < len(moved) / len(convs) < 0.7, "half of the layers are frozen, half train"

    # Dense against accelerated, from the same checkpoint, on seen and unseen classes.
    found: dict[bool, Any] = {}
    ran: dict[bool, int] = {}
    test = train_net.Trainer.test
    for fast in (False, True):

        def spy(cfg: Any, model: Any, fast: bool = fast) -> Any:
            ran[fast] = len(accelerated_parts(model))
            return test(cfg, model)

        monkeypatch.setattr(train_net.Trainer, "test", spy)
        own = [*flat(pruned), "MODEL.WEIGHTS", f"{output}/model_final.pth"]
        own += ["MODEL.OPENTRANS.ACCELERATE.ENABLED", str(fast)]
        found[fast] = train_net.evaluate(config(f"tiny/{kind}.yaml", f"{output}-eval", *own))
    assert ran[False] == 0 and ran[True] > 0, "the accelerated evaluation ran densely"
    assert set(found[True]) == {"shapes_seen", "shapes_unseen", "shapes_all"}
    for name, dense in found[False].items():
        fast_result = found[True][name]["sem_seg"]
        # Rounding may move a pixel that lies between two classes, so not to the last bit.
        assert fast_result["mIoU"] == pytest.approx(dense["sem_seg"]["mIoU"], abs=0.02), name


def test_every_image_is_judged_by_the_names_of_its_own_dataset(pruned: dict[str, str]) -> None:
    from opentrans.d2.data import vocabulary_of
    from opentrans.d2.train_net import Trainer

    cfg = config("tiny/deeplabv3.yaml", "names", *flat(pruned))
    model = Trainer.build_model(cfg).eval()
    calls = model.classifier.cache.stats
    for name in ("shapes_seen", "shapes_unseen", "shapes_all", "shapes_unseen"):
        record = next(iter(Trainer.build_test_loader(cfg, name)))
        classes, things = vocabulary_of(name)
        assert record[0]["vocabulary"] == classes and len(things) == len(classes) - 1
        with torch.no_grad():
            assert model(record)[0]["sem_seg"].shape == (len(classes), 64, 64)
    assert calls.encoder_calls == 2, "one run of the encoder per new list of names"


def test_evaluator_agrees_with_the_plain_metric(place: Path) -> None:
    from detectron2.data import DatasetCatalog

    from opentrans.d2.data import register_folder, vocabulary_of
    from opentrans.d2.evaluation import build_evaluator

    names = register_folder("shapes")
    assert register_folder(place / "shapes") == names, "a second call changes nothing"
    evaluator = build_evaluator("shapes_all", str(place), panoptic=True)
    evaluator.reset()
    classes, _ = vocabulary_of("shapes_all")
    plain = SemanticQuality(classes)
    random = np.random.default_rng(0)
    for record in DatasetCatalog.get("shapes_all"):
        truth = np.array(Image.open(record["sem_seg_file_name"])).astype(int)
        guess = np.where(
            random.random(truth.shape) < 0.3, random.integers(17, size=truth.shape), truth
        )
        plain.add(guess, truth)
        ids = np.array(Image.open(record["pan_seg_file_name"])).astype(int) @ [1, 256, 65536]
        output = {
            "sem_seg": torch.nn.functional.one_hot(torch.from_numpy(guess), 17).permute(2, 0, 1),
            "panoptic_seg": (torch.from_numpy(ids), record["segments_info"]),
        }
        evaluator.process([record], [output])
    results = evaluator.evaluate()
    assert results["sem_seg"]["mIoU"] == pytest.approx(plain.mean())
    assert results["sem_seg"]["mIoU_things"] == pytest.approx(plain.mean(["background"]))
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)


def test_training_records_hold_labels_and_one_mask_per_object(place: Path) -> None:
    from opentrans.d2.data import OpenVocabularyMapper, register_folder
    from opentrans.ovs import read_split

    register_folder("shapes")
    cfg = config(
        "tiny/imp.yaml", "records", "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MAX_SIZE_TRAIN", 96
    )
    mapper = OpenVocabularyMapper(cfg, ["shapes_train"], training=True, panoptic=True)
    for record in read_split("shapes", "train").records[:4]:
        made = mapper(record)
        assert made["image"].shape == (3, 96, 96) and made["image"].dtype == torch.uint8
        masks, kinds = made["mask_targets"]
        assert len(masks) == len(record["segments_info"]) and masks.any(0).all()
        for mask, kind in zip(masks, kinds, strict=True):
            assert (made["sem_seg"][mask] == kind).all()


def test_resume_with_another_freeze_rule_is_refused(pruned: dict[str, str]) -> None:
    from opentrans.d2.train_net import train

    own = ["DATASETS.TEST", "()", *flat(pruned)]
    train(config("tiny/deeplabv3.yaml", "resumed", *own, "SOLVER.MAX_ITER", 1))
    with pytest.raises(PlanError, match="(?s)median.*prefix|prefix.*median"):
        train(
            config("tiny/deeplabv3.yaml", "resumed", *own, "SOLVER.MAX_ITER", 2,
                   "MODEL.OPENTRANS.FREEZE.RULE", "prefix:layer2"),
            resume=True,
        )  # fmt: skip
    train(config("tiny/deeplabv3.yaml", "resumed", *own, "SOLVER.MAX_ITER", 2), resume=True)
    assert torch.load("resumed/model_final.pth", weights_only=True)["iteration"] == 1


def test_freezing_the_whole_tower_is_refused(pruned: dict[str, str]) -> None:
    from opentrans.d2.train_net import train

    own = ["DATASETS.TEST", "()", *flat(pruned), "MODEL.OPENTRANS.FREEZE.RULE", "prefix:layer4"]
    with pytest.raises(PlanError, match="freezes every|everything|nothing"):
        train(config("tiny/deeplabv3.yaml", "frozen", *own))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.OVS.DATA_FOLDER", "nowhere"], "nowhere does not exist.*opentrans.ovs shapes"),
        (["DATASETS.TRAIN", "('shapes_test',)"], "no dataset 'shapes_test'.*DATA_FOLDER"),
        (["DATASETS.TRAIN", "()"], "TRAIN and DATASETS.TEST are empty"),
        (["DATASETS.TRAIN", "('ade20k_sem_seg_train',)"], "cannot be read.*DETECTRON2_DATASETS"),
        (["MODEL.WEIGHTS", "none.pth"], "'none.pth' does not exist.*MODEL.OPENTRANS.WEIGHTS"),
        (["MODEL.OPENTRANS.WEIGHTS", ""], "CLIP_WEIGHTS random"),
        (["MODEL.OPENTRANS.MASKS.FILE", "x"], "cannot be used|not a key"),
        (["MODEL.OVS.SKALE", "1.0"], "Non-existent key: MODEL.OVS.SKALE.*docs/tiny-run.md"),
        (["MODEL.OVS.OPTIMIZER", "LAMB"], "must be one of AdamW, SGD"),
        (["MODEL.OVS.SCALE", "high"], "Type mismatch.*MODEL.OVS.SCALE"),
        (["MODEL.OVS.DISTILL.LOSS", "l2"], "must be one of opentrans, paper, visual"),
        (["MODEL.OPENTRANS.FREEZE.RULE", "ratio:1.0"], "freezes everything.*between 0 and 1"),
        (["MODEL.DEVICE", "cuda"], "Add MODEL.DEVICE cpu"),
    ],
)
def test_bad_configs_are_named_with_their_fix(
    place: Path, options: list[str], message: str
) -> None:
    if options[0] == "MODEL.DEVICE" and torch.cuda.is_available():
        pytest.skip("a CUDA device is there, so asking for it is no error")
    with pytest.raises(OpenTransError, match=f"(?s){message}"):
        config("tiny/imp.yaml", "bad", *options)


def test_random_towers_and_heads_are_refused(pruned: dict[str, str]) -> None:
    from opentrans.d2.train_net import evaluate, train

    with pytest.raises(OpenTransError, match="WEIGHTS is empty, so the head would be random"):
        evaluate(config("tiny/imp.yaml", "empty", "DATASETS.TEST", UNSEEN))
    # A checkpoint without a head is not evaluated with a random one.
    with pytest.raises(CheckpointError, match="lacks .* tensors .*would stay random"):
        evaluate(config("tiny/deeplabv3.yaml", "empty", *flat(pruned)))
    state = {"model": {"classifier.log_scale": torch.zeros(())}}
    torch.save(state, "headless.pth")
    with pytest.raises(CheckpointError, match="backbone.*MODEL.OPENTRANS.WEIGHTS"):
        train(
            config("tiny/imp.yaml", "empty", "MODEL.OPENTRANS.WEIGHTS", "", "MODEL.WEIGHTS",
                   "headless.pth", "MODEL.OVS.CLIP_WEIGHTS", "clip.safetensors")
        )  # fmt: skip


def test_the_wrong_head_or_feature_is_named(pruned: dict[str, str]) -> None:
    from opentrans.d2.train_net import Trainer

    for options, message in (
        (["MODEL.SEM_SEG_HEAD.NAME", "PointHead"], "must be one of DeepLabV3PlusHead"),
        (["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res6']"], "'res6'.*res2, res3"),
    ):
        cfg = config("tiny/deeplabv3.yaml", "wrong", *flat(pruned), *options)
        with pytest.raises(OpenTransError, match=message):
            Trainer.build_model(cfg)
    model = Trainer.build_model(config("tiny/imp.yaml", "wrong")).eval()
    with pytest.raises(OpenTransError, match="Leave DATASETS.TEST empty"):
        model([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}])


@pytest.mark.parametrize("head", ["DeepLabV3Head", "DeepLabV3PlusHead"])
def test_both_of_detectron2s_heads_give_embeddings(pruned: dict[str, str], head: str) -> None:
    from opentrans.d2.train_net import Trainer

    feature = ["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res5']", "MODEL.SEM_SEG_HEAD.NAME", head]
    cfg = config("tiny/deeplabv3.yaml", "heads", *flat(pruned), *feature)
    model = Trainer.build_model(cfg)
    records = next(iter(Trainer.build_train_loader(cfg)))
    model.train()
    losses = model(records)
    losses["loss_sem_seg"].backward()
    assert all(p.grad is not None for p in model.sem_seg_head.parameters())
    odd = {"image": torch.zeros(3, 50, 70, dtype=torch.uint8), "height": 33, "width": 45,
           "vocabulary": ("a", "b", "c")}  # fmt: skip
    with torch.no_grad():
        assert model.eval()([odd])[0]["sem_seg"].shape == (3, 33, 45)


def run_command(folder: Path, module: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_command_reports_bad_input_without_a_traceback(place: Path) -> None:
    from opentrans.d2.train_net import run

    assert run(["--config-file", "tiny/none.yaml"]) == 2
    assert run(["--config-file", "tiny/imp.yaml", "MODEL.WEIGHTS", "none.pth"]) == 2


def results_of(folder: Path, name: str) -> dict[str, float]:
    file = folder / "inference" / name / "results.json"
    return json.loads(file.read_text())["sem_seg"]


@pytest.mark.slow
def test_the_tutorial_learns_seen_and_unseen_classes(tmp_path: Path) -> None:
    """Every command of docs/tiny-run.md, in fresh processes: three to five minutes."""
    pytest.importorskip("transformers", reason="the mask head needs transformers")
    run_command(tmp_path, "opentrans.ovs", "shapes", "shapes")
    run_command(tmp_path, "opentrans.ovs", "clip", "clip.safetensors")
    net = "opentrans.d2.train_net"
    run_command(tmp_path, net, "--config-file", "tiny/imp.yaml")
    assert MaskSet.load(tmp_path / "tiny-imp/masks/masks.safetensors").density() < 0.32
    for kind in ("deeplabv3", "mask"):
        run_command(tmp_path, net, "--config-file", f"tiny/{kind}.yaml")
        final = f"tiny-{kind}/model_final.pth"
        outputs = {}
        for fast in ("True", "False"):
            outputs[fast] = run_command(
                tmp_path, net, "--config-file", f"tiny/{kind}.yaml", "--eval-only",
                "MODEL.WEIGHTS", final, "OUTPUT_DIR", f"eval-{kind}-{fast}",
                "MODEL.OPENTRANS.ACCELERATE.ENABLED", fast,
                "MODEL.OPENTRANS.ACCELERATE.MEASURE", "False",
            )  # fmt: skip
        ran = re.search(r"(\d+) convolutions: .*?(\d+) sparse", outputs["True"])
        assert ran is not None and int(ran[2]) > 0, "the accelerated evaluation ran densely"
        apart = re.search(r"difference from the masked dense network: (\S+)", outputs["True"])
        assert apart is not None and 0 < float(apart[1]) < 1e-5, "no sparse kernel computed this"
        assert "runs densely" not in outputs["True"] and "runs densely" in outputs["False"]
        for name in ("shapes_seen", "shapes_unseen", "shapes_all"):
            fast_, dense = (
                results_of(tmp_path / f"eval-{kind}-{flag}", name) for flag in ("True", "False")
            )
            assert fast_["mIoU"] == pytest.approx(dense["mIoU"], abs=0.02), (kind, name)
            for found in (fast_, dense):
                # Right names, not only right masks: more than twice what random names would get.
                assert found["mIoU_things"] > 2 * found["chance_things"], (kind, name)
        # The hard case: names that were never seen, beside names that were.
        unseen = [dense[f"IoU-{name}"] for name in NEVER_SEEN]
        assert np.mean(unseen) > dense["chance_things"], (kind, unseen)
