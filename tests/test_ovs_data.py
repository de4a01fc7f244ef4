"""The shapes dataset: what is held out is held out, labels are exact, damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opentrans.ovs import read_split, write_shapes
from opentrans.ovs.__main__ import main
from opentrans.ovs.folder import splits_of
from opentrans.ovs.shapes import BACKGROUND, COLOURS, SEEN, SHAPES, UNSEEN, draw_scene, photo
from opentrans_kernels.errors import OpenTransError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", train=6, val=4, size=48)


def test_every_word_is_seen_and_no_unseen_pair_is() -> None:
    assert set(SEEN).isdisjoint(UNSEEN) and len({*SEEN, *UNSEEN}) == len(COLOURS) * len(SHAPES)
    words = {word for name in SEEN for word in name.split()}
    assert words == {*COLOURS, *SHAPES}, "an unseen class must consist of words that were seen"
    assert {word for name in UNSEEN for word in name.split()} == words


def test_a_scene_is_a_function_of_its_seed() -> None:
    first, again = (draw_scene(SEEN, size=48, seed=5) for _ in range(2))
    other = draw_scene(SEEN, size=48, seed=6)
    assert np.array_equal(first.image, again.image) and first.names == again.names
    assert np.array_equal(first.objects, again.objects)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("name", [*SEEN, *UNSEEN])
def test_objects_have_their_colour_and_stand_out(name: str) -> None:
    scene = draw_scene([name], size=96, count=(1, 1), seed=3)
    inside = scene.objects == 1
    assert scene.names == (name,) and 50 < inside.sum() < 96 * 96 / 2
    mean = scene.image[inside].mean(0) / 255
    distance = {colour: np.abs(mean - rgb).sum() for colour, rgb in COLOURS.items()}
    assert min(distance, key=distance.get) == name.split()[0]  # type: ignore[arg-type]


def test_every_object_stays_visible() -> None:
    for seed in range(20):
        scene = draw_scene(SEEN, size=64, count=(3, 3), seed=seed)
        assert set(np.unique(scene.objects)) - {0} == set(range(1, len(scene.names) + 1))


def test_photos_have_the_spectrum_of_photos_and_muted_colours() -> None:
    slopes = []
    for seed in range(8):
        image = photo(64, np.random.default_rng(seed))
        assert image.shape == (64, 64, 3) and 0 <= image.min() and image.max() <= 1
        assert (image.max(-1) - image.min(-1)).mean() < 0.25
        power = np.abs(np.fft.fft2(image.mean(-1) - image.mean()))[0, 1:32]
        slopes.append(np.polyfit(np.log(np.arange(1, 32)), np.log(power), 1)[0])
    assert -1.8 < np.mean(slopes) < -0.7  # amplitude ~ 1/f


def test_splits_hold_their_classes_only(folder: Path) -> None:
    assert set(splits_of(folder)) == {"train", "seen", "unseen", "all"}
    for split, names in (("train", SEEN), ("unseen", UNSEEN), ("all", (*SEEN, *UNSEEN))):
        found = read_split(folder, split)
        assert found.classes == (BACKGROUND, *names) and found.things == names
        assert len(found.records) == (6 if split == "train" else 4)
        used = set()
        for record in found.records:
            labels = np.array(Image.open(record["sem_seg_file_name"]))
            image = np.array(Image.open(record["file_name"]))
            assert image.shape == (*labels.shape, 3) == (record["height"], record["width"], 3)
            used |= set(np.unique(labels).tolist())
            ids = np.array(Image.open(record["pan_seg_file_name"])).astype(int) @ [1, 256, 65536]
            assert {s["id"] for s in record["segments_info"]} == set(np.unique(ids).tolist())
            for segment in record["segments_info"]:  # panoptic and semantic labels agree
                assert (labels[ids == segment["id"]] == segment["category_id"]).all()
                assert segment["isthing"] == (segment["category_id"] > 0)
        assert used > {0} and max(used) < len(found.classes)


def test_images_of_the_splits_differ(folder: Path) -> None:
    first = [read_split(folder, s).records[0]["file_name"] for s in ("train", "seen")]
    pixels = [np.array(Image.open(name)) for name in first]
    assert not np.array_equal(*pixels)


def test_command_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "again"
    assert main(["shapes", str(made), "--train", "6", "--val", "4", "--size", "48"]) == 0
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert len(files) > 30
    assert all((folder / f).read_bytes() == (made / f).read_bytes() for f in files)


def test_bad_input_is_named_with_its_fix(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OpenTransError, match="does not exist.*python -m opentrans.ovs shapes"):
        read_split(tmp_path / "none", "train")
    with pytest.raises(OpenTransError, match="no split 'test'; it has all, seen"):
        read_split(folder, "test")
    with pytest.raises(OpenTransError, match="'purple circle' is no class.*such as 'red circle'"):
        draw_scene(["purple circle"])
    with pytest.raises(OpenTransError, match="16 pixels or more"):
        draw_scene(SEEN, size=8)
    with pytest.raises(OpenTransError, match="train=0"):
        write_shapes(tmp_path / "x", train=0)
    assert main(["shapes", str(tmp_path), "--train", "0"]) == 2
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(OpenTransError, match="cannot be written.*Name another folder"):
        write_shapes(blocked, train=1, val=1, size=32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: next((f / "labels").iterdir()).unlink(), "has no label file.*remove the image"),
        (lambda f: next((f / "panoptic").iterdir()).unlink(), "or remove panoptic.json"),
        (lambda f: (f / "classes.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "classes.json").write_text('{"classes": ["a", "a"]}'), "different names"),
        (lambda f: (f / "classes.json").write_text("[1]"), "different names"),
        (lambda f: next((f / "images").iterdir()).write_bytes(b"x"), "Remove or replace it"),
        (lambda f: shutil.rmtree(f / "images"), "holds no .png or .jpg image"),
    ],
)
def test_a_damaged_split_is_refused(folder: Path, tmp_path: Path, damage, message: str) -> None:
    shutil.copytree(folder / "seen", tmp_path / "copy" / "seen")
    damage(tmp_path / "copy" / "seen")
    with pytest.raises(OpenTransError, match=message):
        read_split(tmp_path / "copy", "seen")


def test_a_folder_without_panoptic_files_is_semantic_only(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "seen", tmp_path / "copy" / "seen")
    (tmp_path / "copy" / "seen" / "panoptic.json").unlink()
    content = json.loads((tmp_path / "copy" / "seen" / "classes.json").read_text())
    del content["things"], content["ignore"]
    (tmp_path / "copy" / "seen" / "classes.json").write_text(json.dumps(content))
    split = read_split(tmp_path / "copy", "seen")
    assert split.things == () and split.ignore == 255
    assert all("pan_seg_file_name" not in record for record in split.records)
