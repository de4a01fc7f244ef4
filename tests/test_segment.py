"""``opentrans segment``: outputs, going on, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pictures are read by Pillow")
pytest.importorskip("open_clip", reason="the text encoder is open_clip's")
pytest.importorskip("torchvision", reason="the DeepLab head uses torchvision")

from PIL import Image
from segment_cases import (
    CLASSES,
    label,
    names,
    noise,
    picture,
    results,
    segment,
    small_segmenter,
    times,
)

from opentrans.ovs.saved import load_segmenter
from opentrans.ovs.tiny import normalise
from opentrans.segment import find_pictures, read_picture
from opentrans.segment.folder import OutputFolder
from opentrans_kernels.errors import CheckpointError, OpenTransError


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_segmenter(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture
def words(weights: Path, tmp_path: Path) -> list[object]:
    """Options that every run here shares; dense, which needs no planning."""
    return ["--weights", weights, "--classes", ", ".join(CLASSES), "-o", tmp_path / "out",
            "--no-accelerate", "--text-cache", tmp_path / "text"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one of them deeper, and a file of another kind."""
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "deep" / "b.jpg", 33, 47, 1)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    picture(tmp_path / "in" / ".hidden" / "c.png")
    return tmp_path / "in"


def test_labels_are_the_best_class_of_every_pixel(
    words: list[object], folder: Path, tmp_path: Path, weights: Path
) -> None:
    assert segment(folder, *words) == 0
    out = tmp_path / "out"
    assert names(out) == ["a", "deep/b"]
    found = label(out, "deep/b")
    assert found.shape == (33, 47) and found.dtype == np.uint8
    pixels = read_picture(folder / "deep" / "b.jpg")
    model, design = load_segmenter(weights)
    size = (design.size, round(47 * design.size / 33))
    image = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    padded = torch.nn.functional.pad(normalise(np.array(image)[None]), (0, -size[1] % 32, 0, 0))
    with torch.no_grad():
        scores = model(padded, CLASSES)[:, :, :, : size[1]].softmax(1)
    full = torch.nn.functional.interpolate(scores, (33, 47), mode="bilinear", align_corners=False)
    assert np.array_equal(found, full[0].argmax(0).numpy())
    assert len(np.unique(found)) > 1, "one class everywhere proves nothing"


def test_the_machine_readable_outputs_agree_with_the_labels(
    words: list[object], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(folder, *words, "--json") == 0
    out = tmp_path / "out"
    printed = json.loads(capsys.readouterr().out)
    written = results(out)
    assert printed["pictures"] == written["pictures"] and printed["failed"] == []
    listed = json.loads((out / "classes.json").read_text())
    assert [row["name"] for row in listed["classes"]] == list(CLASSES) and listed["none"] == 255
    for row in written["pictures"]:
        found = label(out, row["name"])
        assert (row["height"], row["width"]) == found.shape and row["seconds"] >= 0
        assert row["label"] == f"labels/{row['name']}.png" and (out / row["overlay"]).is_file()
        counts = {one["number"]: one["pixels"] for one in row["classes"]}
        assert counts == {int(n): int((found == n).sum()) for n in np.unique(found)}
        assert sum(one["share"] for one in row["classes"]) == pytest.approx(1, abs=1e-5)
    with Image.open(out / "labels" / "a.png") as image:
        palette = np.array(image.getpalette()).reshape(-1, 3)
        assert image.mode == "P" and palette[0].tolist() == listed["classes"][0]["colour"]
    with Image.open(out / "overlays" / "a.png") as image:
        assert image.mode == "RGB" and image.height == 480 and image.width > image.height * 56 / 40


def test_a_run_goes_on_where_it_stopped(
    words: list[object], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert segment(folder, *words, "--limit", 1) == 0
    assert names(out) == ["a"] and "1 pictures are left" in capsys.readouterr().out
    before = times(out)
    assert segment(folder, *words) == 0
    after = times(out)
    assert names(out) == ["a", "deep/b"] and before.items() <= after.items()
    model = results(out)["model"]
    assert segment(folder, *words) == 0 and times(out) == after
    assert results(out)["model"] == model and model["name"] == "PixelSegmenter"
    assert "2 of 2 pictures are done already" in capsys.readouterr().out
    (out / "labels" / "a.png").unlink()  # an output that is gone, and one that is damaged
    (out / "records" / "deep" / "b.json").write_text("{")
    assert segment(folder, *words) == 0
    assert names(out) == ["a", "deep/b"] and label(out, "a").shape == (40, 56)
    assert all(times(out)[name] > when for name, when in after.items())


def test_a_picture_that_changed_is_done_again(
    words: list[object], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert segment(folder, *words) == 0
    before = times(out)
    picture(folder / "a.png", 24, 24, 5)
    assert segment(folder, *words) == 0
    changed = {name for name, when in times(out).items() if before[name] != when}
    assert changed == {"labels/a.png", "overlays/a.png", "records/a.json"}
    assert label(out, "a").shape == (24, 24)


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (["--classes", "cat, road"], "classes:"),
        (["--size", 64], "size: None before, 64 now"),
        (["--mask", "global:0.50"], "mask: None before, 'global:0.50' now"),
        (["--least", 0.5], "least: 0.0 before, 0.5 now"),
    ],
)
def test_other_settings_are_refused_unless_told(
    extra: list[object], what: str, words: list[object], folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert segment(folder, *words) == 0
    before = times(out, ("labels", "overlays", "records", "."))
    assert segment(folder, *words, *extra) == 2
    message = capsys.readouterr().err
    assert what in message and "--overwrite" in message
    assert times(out, ("labels", "overlays", "records", ".")) == before
    (out / "labels" / "mine.txt").write_text("not of a run")
    assert segment(folder / "a.png", *words, *extra, "--overwrite") == 0
    assert names(out) == ["a"], "labels of the run before would mean other classes"
    assert {file.name for file in (out / "labels").rglob("*.*")} == {"a.png", "mine.txt"}


def test_other_weights_under_the_same_name_are_noticed(
    words: list[object], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = small_segmenter(tmp_path / "own.safetensors", 1)
    assert segment(folder, *words, "--weights", own) == 0
    small_segmenter(own, 2)
    assert segment(folder, *words, "--weights", own) == 2
    assert "weights: 'own.safetensors sha256:" in capsys.readouterr().err


def test_damaged_settings_are_no_run_to_go_on_with(
    words: list[object], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(folder, *words) == 0
    (tmp_path / "out" / "settings.json").write_text("[]")
    assert segment(folder, *words) == 2 and "damaged" in capsys.readouterr().err
    assert segment(folder, *words, "--overwrite") == 0


def test_pictures_that_cannot_be_read_are_reported_and_the_others_done(
    words: list[object], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty.png").write_bytes(b"")
    whole = picture(tmp_path / "whole.png", 64, 64).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no picture")
    Image.fromarray(noise(8, 8).astype(np.float32)[..., 0]).save(folder / "float.tiff")
    assert segment(folder, *words) == 2
    message = capsys.readouterr().err
    out = tmp_path / "out"
    assert names(out) == ["a", "deep/b"]
    failed = {Path(row["file"]).name: row["reason"] for row in results(out)["failed"]}
    assert set(failed) == {"empty.png", "cut.png", "text.jpg", "float.tiff"}
    assert "floats" in failed["float.tiff"] and "cannot be read" in failed["text.jpg"]
    for name, reason in failed.items():
        assert f"{folder / name}: {reason}" in message
    assert "4 of 6 pictures failed" in message and not (out / "labels" / "cut.png").exists()
    (folder / "cut.png").write_bytes(whole)  # once mended, it is done
    assert segment(folder, *words) == 2 and "cut" in names(out)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 31), (65, 33), (300, 20)])
def test_odd_sizes_give_labels_of_that_size(
    size: tuple[int, int], words: list[object], tmp_path: Path
) -> None:
    picture(tmp_path / "x.png", *size)
    assert segment(tmp_path / "x.png", *words) == 0
    assert label(tmp_path / "out", "x").shape == size


def kinds(folder: Path) -> dict[str, Path]:
    """One picture in many forms, 16 x 24: what is seen is the same."""
    rgb = noise(16, 24)
    grey = rgb[..., 0]
    made = {
        "grey": Image.fromarray(grey),
        "deep": Image.fromarray(grey.astype(np.uint16) * 257),
        "wide": Image.fromarray(grey.astype(np.int32) * 257),
        "bits": Image.fromarray(grey > 127),
        "rgba": Image.fromarray(np.dstack([rgb, np.full((16, 24), 255, np.uint8)])),
        "clear": Image.fromarray(np.dstack([rgb, np.zeros((16, 24), np.uint8)])),
        "palette": Image.fromarray(rgb).quantize(16),
        "cmyk": Image.fromarray(rgb).convert("CMYK"),
        "turned": Image.fromarray(rgb),
    }
    files = {}
    for name, image in made.items():
        suffix = {"wide": "tiff", "cmyk": "tiff"}.get(name, "png")
        extra = {}
        if name == "turned":
            exif = Image.Exif()
            exif[0x0112] = 6  # the camera was turned: shown a quarter clockwise
            extra["exif"] = exif
        files[name] = folder / f"{name}.{suffix}"
        image.save(files[name], **extra)
    return files


def test_pixels_of_every_kind_of_picture(tmp_path: Path) -> None:
    rgb, files = noise(16, 24), kinds(tmp_path)
    seen = {name: read_picture(file) for name, file in files.items()}
    assert all(pixels.dtype == np.uint8 and pixels.shape[2] == 3 for pixels in seen.values())
    grey = np.repeat(rgb[..., :1], 3, axis=2)
    for name in ("grey", "deep", "wide"):
        assert np.array_equal(seen[name], grey), name
    assert np.array_equal(seen["bits"], (grey > 127) * 255)
    assert np.array_equal(seen["rgba"], rgb) and (seen["clear"] == 255).all()
    assert np.array_equal(seen["turned"], np.rot90(rgb, -1))
    assert abs(seen["cmyk"].astype(int) - rgb).max() <= 1
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "more.tiff")
    with pytest.raises(OpenTransError, match="70000, beyond 16 bits"):
        read_picture(tmp_path / "more.tiff")


def test_names_are_kept_apart_and_stay_the_same(tmp_path: Path) -> None:
    for name in ("one/x.png", "two/x.png", "two/X.jpg", "two/sub/x.png"):
        picture(tmp_path / name)
    one, two = tmp_path / "one", tmp_path / "two"
    found = {p.file: p.name for p in find_pictures([one, two, one / "x.png"])}
    assert sorted(found.values()) == ["X-2", "sub/x", "x", "x-3"]
    assert found[str(one / "x.png")] == "x"
    known = {str(two / "x.png"): "x"}  # done first, in an earlier run
    again = {p.file: p.name for p in find_pictures([one, two], known)}
    assert again[str(two / "x.png")] == "x" and again[str(one / "x.png")] != "x"
    odd = picture(tmp_path / "three" / "a:b*.png")
    assert find_pictures([odd])[0].name == "a_b_"


def test_results_among_the_pictures_are_no_pictures(
    words: list[object], folder: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        assert segment(folder, *words, "-o", folder / "out") == 0
        assert names(folder / "out") == ["a", "deep/b"]


def test_what_is_no_input_is_refused_before_anything_is_written(
    words: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path
) -> None:
    (tmp_path / "empty").mkdir()
    one = picture(tmp_path / "one.png")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\x00")
    foreign = tmp_path / "foreign.pt"
    torch.save({"a": torch.zeros(2)}, foreign)
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "empty", *words], "holds no picture"),
        ([tmp_path / "none", *words], "does not exist"),
        ([*words], "IMAGE is missing"),
        ([one, "-o", tmp_path / "out", "--weights", weights], "--classes is missing"),
        ([one, *words, "--classes", " , "], "names no class"),
        ([one, *words, "--classes", "cat, dog, cat"], "'cat' more than once"),
        ([one, *words, "--classes", f"@{tmp_path}/classes.txt"], "cannot be read"),
        ([one, *words, "--classes", "@none.txt"], "cannot be read"),
        ([one, *words, "--weights", tmp_path / "none.pt"], "is not a file"),
        ([one, *words, "--config", "none.yaml"], "neither a file nor one of our own"),
        ([one, *words, "--mask", "none.pth"], "neither a file nor a recipe"),
        ([one, *words, "--font", weights], "font"),
        ([one, *words, "--example"], "brings its own"),
        ([one, *words, "-o", one], "not a directory"),
    ]
    for line, reason in cases:
        assert segment(*line) == 2, line
        assert reason in capsys.readouterr().err, line
        assert not (tmp_path / "out").exists(), line
    assert segment(one, *words, "--weights", foreign) == 2
    assert "no file of save_segmenter" in capsys.readouterr().err


def test_classes_come_from_a_file(words: list[object], tmp_path: Path) -> None:
    listed = tmp_path / "classes.txt"
    listed.write_text("\ufeffcat, kitten\n\n# a remark\n  traffic   light \r\nsky\n", "utf-8")
    one = picture(tmp_path / "one.png")
    assert segment(one, *words, "--classes", f"@{listed}") == 0
    found = json.loads((tmp_path / "out" / "classes.json").read_text())["classes"]
    assert [row["name"] for row in found] == ["cat, kitten", "traffic light", "sky"]
    colours = [tuple(row["colour"]) for row in found]
    assert len(set(colours)) == 3


def test_many_classes_have_16_bits_and_none(words: list[object], tmp_path: Path) -> None:
    one = picture(tmp_path / "one.png")
    listed = ",".join(f"thing {n}" for n in range(300))
    assert segment(one, *words, "--classes", listed, "--least", 0.999) == 0
    found = label(tmp_path / "out", "one")
    assert found.dtype == np.uint16 and (found == 65535).all()
    (row,) = results(tmp_path / "out")["pictures"]
    assert row["classes"] == [{"name": None, "number": 65535, "pixels": 40 * 56, "share": 1.0}]


def test_an_accelerated_mask_gives_the_labels_of_the_masked_dense_model(
    words: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = picture(tmp_path / "one.png")
    fast, dense = tmp_path / "fast", tmp_path / "out"
    masked = [one, *words, "--mask", "uniform:0.90"]
    assert segment(*masked) == 0
    accelerated = [word for word in masked if word != "--no-accelerate"]
    assert segment(*accelerated, "-o", fast) == 0
    shown = capsys.readouterr()
    assert "SYNTHETIC mask uniform:0.90" in shown.err
    same = label(fast, "one") == label(dense, "one")
    assert same.mean() > 0.999  # a tie may fall either way by rounding
    assert len(np.unique(label(dense, "one"))) > 1
    written = results(fast)
    assert written["settings"]["accelerate"] and "plan for" in written["model"]["report"]


def test_scores_that_are_not_finite_are_no_labels(
    words: list[object], folder: Path, tmp_path: Path, weights: Path
) -> None:
    from opentrans.ovs.saved import save_segmenter

    model, design = load_segmenter(weights)
    with torch.no_grad():
        model.head.embed.bias.fill_(float("nan"))
    broken = save_segmenter(tmp_path / "nan.safetensors", model, design)
    assert segment(folder, *words, "--weights", broken) == 2
    reasons = [row["reason"] for row in results(tmp_path / "out")["failed"]]
    assert len(reasons) == 2 and all("not finite" in reason for reason in reasons)


def test_a_folder_that_cannot_be_made_is_named(
    words: list[object], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match="cannot be written .No space left"):
        OutputFolder(tmp_path / "full").open({"classes": ["a"]})
