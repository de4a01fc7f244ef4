"""`opentrans prune` and `opentrans freeze` on a folder of images, and what they are made of."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from trunk_models import OpenAITower, randomise

from opentrans import cli
from opentrans.cli import training
from opentrans.images import ImageFolder
from opentrans_kernels.bench import subject as subject_module
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.masks import MaskSet, read_state_dict
from opentrans_kernels.report.prune import density_map, prune_page

Image = pytest.importorskip("PIL.Image")


def tower(arch: str, *, seed: int = 0, empty: bool = False) -> torch.nn.Module:
    torch.manual_seed(seed)
    return randomise(OpenAITower()).requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of several kinds and sizes, one of them in a folder inside, and other files."""
    path = tmp_path_factory.mktemp("images")
    (path / "inside").mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, mode, size in (
        ("a.png", "RGB", (40, 60)), ("b.JPG", "RGB", (50, 33)), ("c.png", "L", (33, 33)),
        ("d.png", "RGBA", (64, 40)), ("inside/e.bmp", "RGB", (90, 41)),
    ):  # fmt: skip
        channels = len(mode)
        pixels = torch.randint(0, 256, (size[1], size[0], channels), generator=generator)
        array = pixels.to(torch.uint8).squeeze(-1).numpy()
        Image.fromarray(array, mode=mode).save(path / name)
    (path / "notes.txt").write_text("no image")
    (path / ".hidden.png").write_bytes(b"broken")
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject_module, "build_tower", tower)


def prune(folder: Path, output: Path, *more: str) -> int:
    options = "--size 32 --batch 2 --period 2 --rounds 3 --rate 0.4".split()
    return cli.main(["prune", "--images", str(folder), "--output", str(output), *options, *more])


def freeze(folder: Path, output: Path, *more: str) -> int:
    options = "--size 32 --batch 2 --steps 4 --save-every 2 --rule all_3x3".split()
    return cli.main(["freeze", "--images", str(folder), "--output", str(output), *options, *more])


def test_batches_depend_on_seed_and_number_only(folder: Path) -> None:
    images = ImageFolder(folder, 16, 2, seed=1)
    images.check()
    assert len(images) == 5
    batches = [images.batch(step) for step in range(6)]
    assert batches[0].shape == (2, 3, 16, 16) and batches[0].dtype == torch.float32
    again = ImageFolder(folder, 16, 2, seed=1)
    for step in (4, 0, 5, 2):
        assert torch.equal(again.batch(step), batches[step])
    assert not torch.equal(ImageFolder(folder, 16, 2, seed=2).batch(0), batches[0])
    # Every file comes once in each pass over the folder.
    for first in (0, 5):
        images.batch(first)
        seen = []
        for number in range(first, first + 5):
            images._image(number, torch.Generator().manual_seed(0))
            seen.append(images._passes[number])
        assert sorted(seen) == [0, 1, 2, 3, 4]


def test_pixels_are_normalised_as_clip_does(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (255, 0, 128)).save(tmp_path / "flat.png")
    pixels = ImageFolder(tmp_path, 8, 1).batch(3)[0]
    expected = [(1 - 0.48145466) / 0.26862954, (0 - 0.4578275) / 0.26130258]
    expected.append((128 / 255 - 0.40821073) / 0.27577711)
    for channel, value in zip(pixels, expected, strict=True):
        assert torch.allclose(channel, torch.tensor(value), atol=1e-5)


def test_folders_without_usable_images(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(OpenTransError, match="is not a folder.*jpg"):
        ImageFolder(tmp_path / "none", 8, 1)
    with pytest.raises(OpenTransError, match="holds no image. Name a folder"):
        ImageFolder(tmp_path, 8, 1)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    with pytest.raises(OpenTransError, match=r"broken\.png cannot be read.*Remove or replace"):
        ImageFolder(tmp_path, 8, 1).check()
    whole = (folder / "a.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    images = ImageFolder(tmp_path, 8, 1)
    images.check()  # the header is whole
    with pytest.raises(OpenTransError, match=r"broken\.png cannot be read.*it continues"):
        images.batch(0)


def test_prune_continues_and_shows_what_it_did(
    tmp_path: Path, folder: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert prune(folder, run, "--json", str(tmp_path / "result.json")) == 0
    shown = capsys.readouterr()
    assert "SYNTHETIC" in shown.err and "round 3 of 3" in shown.out
    result = json.loads((tmp_path / "result.json").read_text())
    masks = MaskSet.load(run / "round-003.safetensors")
    assert masks.source.synthetic and masks.content_hash() == result["content_hash"]
    assert [r["round"] for r in result["rounds"]] == [1, 2, 3]
    assert json.loads((run / "log.json").read_text())["rounds"] == result["rounds"]
    page = (run / "index.html").read_text()
    assert "SYNTHETIC" in page and "layer2.1.conv3" in page
    # The state is a checkpoint that the other commands read: pruned weights are zero in it.
    state = read_state_dict(run / "state.pt")
    for name, mask in masks.masks.items():
        assert not bool(state[f"{name}.weight"][~mask].any())
    before = (run / "state.pt").stat().st_mtime_ns
    assert prune(folder, run) == 0, "a finished run is shown again"
    assert (run / "state.pt").stat().st_mtime_ns == before
    assert prune(folder, run, "--fresh") == 2
    assert "name a new folder" in capsys.readouterr().err
    assert prune(folder, run, "--lr", "0.5") == 2
    assert "extra.lr is 1.5e-05 in the run, 0.5 now" in capsys.readouterr().err


def test_a_stopped_prune_ends_like_one_that_was_not(
    tmp_path: Path, folder: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prune(folder, tmp_path / "whole") == 0
    real = ImageFolder.batch

    def stop(self: ImageFolder, step: int) -> torch.Tensor:
        if step == 3:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(ImageFolder, "batch", stop)
    assert prune(folder, tmp_path / "run") == 130
    monkeypatch.setattr(ImageFolder, "batch", real)
    assert prune(folder, tmp_path / "run") == 0
    masks = [MaskSet.load(tmp_path / n / "round-003.safetensors") for n in ("whole", "run")]
    assert masks[0].content_hash() == masks[1].content_hash()


@pytest.mark.parametrize(
    "more",
    [
        ("--allocation", "macs", "--pattern", "2:4"),
        ("--allocation", "latency", "--measure", "--rewind", "1"),
        ("--pattern", "channel", "--target-density", "0.5"),
    ],
)
def test_prune_by_other_rules(
    tmp_path: Path, folder: Path, small: None, more: tuple[str, ...]
) -> None:
    assert prune(folder, tmp_path / "run", *more) == 0
    assert len(list((tmp_path / "run").glob("round-*.safetensors"))) >= 2
    assert (tmp_path / "run" / "plan.json").exists() == ("--measure" in more)


@pytest.mark.parametrize("command", [prune, freeze])
def test_bad_input_is_2_with_the_fix(
    command: object,
    tmp_path: Path,
    folder: Path,
    small: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        ((empty,), "holds no image"),
        ((folder, "--loss", "paper"), "--classes"),
        ((folder, "--mask", "nosuch.pth"), "existing file"),
        ((folder, "--checkpoint", "nosuch.pth"), "nosuch.pth"),
    ]
    for (source, *more), words in cases:
        assert command(source, tmp_path / "run", *more) == 2
        assert words in capsys.readouterr().err
    (empty / "x.jpeg").write_bytes(b"not a picture")
    assert command(empty, tmp_path / "run") == 2
    assert "x.jpeg cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "skimage", None)
    name = command.__name__
    assert cli.main([name, "--example", "--output", str(tmp_path / "run")]) == 2
    assert "pip install scikit-image" in capsys.readouterr().err
    assert cli.main([name, "--output", str(tmp_path / "run")]) == 2
    assert "--images DIR, or --example" in capsys.readouterr().err


def test_masks_of_another_network_are_refused(
    tmp_path: Path, folder: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    MaskSet({"layer9.conv1": torch.ones(2, 2, 1, 1, dtype=torch.bool)}).save(tmp_path / "m.st")
    for command in (prune, freeze):
        assert command(folder, tmp_path / "run", "--mask", str(tmp_path / "m.st")) == 2
        assert "architecture the masks were made for" in capsys.readouterr().err


@pytest.mark.parametrize("command", [prune, freeze])
def test_a_loss_without_a_value_keeps_what_was_saved(
    command: object, tmp_path: Path, folder: Path, small: None,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real = ImageFolder.batch

    def broken(self: ImageFolder, step: int) -> torch.Tensor:
        return real(self, step) * (torch.nan if step == 3 else 1)

    monkeypatch.setattr(ImageFolder, "batch", broken)
    assert command(folder, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "the loss is nan" in error and "earn" in error  # "learning rate", "lower --lr"
    monkeypatch.setattr(ImageFolder, "batch", real)
    assert command(folder, tmp_path / "run") == 0


def test_example_settings_give_way_to_the_command_line() -> None:
    from argparse import ArgumentParser

    from opentrans.cli.prune import EXAMPLE, add_arguments

    parser = ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["--example", "--size", "96"])
    training.example_settings(options, add_arguments, EXAMPLE)
    assert options.size == 96 and options.period == EXAMPLE["period"]
    assert {name for name in EXAMPLE if not hasattr(options, name)} == set()


def test_example_images_are_found_where_they_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "skimage" / "data").mkdir(parents=True)
    (tmp_path / "skimage" / "__init__.py").write_text("")
    for name in ("coffee.png", "rocket.jpg", "multipage.tif"):
        (tmp_path / "skimage" / "data" / name).write_bytes(b"")
    monkeypatch.delitem(sys.modules, "skimage", raising=False)  # where another test imported it
    monkeypatch.syspath_prepend(tmp_path)
    assert [file.name for file in training.example_images()] == ["coffee.png", "rocket.jpg"]


def test_freeze_trains_the_rest_and_nothing_else(
    tmp_path: Path, folder: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert freeze(folder, run, "--mask", "global:0.5", "--json", str(tmp_path / "r.json")) == 0
    shown = capsys.readouterr().out
    assert "kept for backward" in shown and "optimizer: state" in shown
    start, end = tower("").state_dict(), read_state_dict(run / "weights.safetensors")
    assert set(start) == set(end)
    plan = json.loads((run / "plan.json").read_text())
    kept = read_masks(run)
    moved = 0
    for name, before in start.items():
        layer, _, kind = name.rpartition(".")
        expected = before
        if layer in kept and kind == "weight":
            expected = before * kept[layer]
            assert not bool(end[name][~kept[layer]].any()), "a pruned weight came back"
        if layer in plan["frozen"]:
            assert torch.equal(end[name], expected), f"{name} is frozen and moved"
        moved += not torch.equal(end[name], expected)
    assert moved > 5
    result = json.loads((tmp_path / "r.json").read_text())
    assert 0 < result["kept_bytes"] <= result["baseline_bytes"]
    assert [row["step"] for row in result["log"]] == [2, 4]
    assert freeze(folder, run, "--mask", "global:0.5", "--rule", "random:1") == 2
    assert "rule is 'all_3x3' in the run, 'random:1' now" in capsys.readouterr().err
    assert freeze(folder, run, "--mask", "global:0.5", "--fresh") == 2
    assert "Leave out --fresh" in capsys.readouterr().err


def test_another_teacher(
    tmp_path: Path, folder: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the same weights nothing is to be learnt; from others the loss is not zero."""
    torch.save(tower("", seed=5).state_dict(), tmp_path / "other.pth")
    first = ("--steps", "1", "--save-every", "1")
    assert freeze(folder, tmp_path / "self", *first) == 0
    given = ("--teacher", str(tmp_path / "other.pth"))
    assert freeze(folder, tmp_path / "other", *first, *given) == 0
    losses = [json.loads((tmp_path / n / "log.json").read_text()) for n in ("self", "other")]
    assert abs(losses[0][0]["loss"]) < 1e-4 < abs(losses[1][0]["loss"])
    assert freeze(folder, tmp_path / "x", "--teacher", str(tmp_path / "none.pth")) == 2
    assert "none.pth" in capsys.readouterr().err


def read_masks(run: Path) -> dict[str, torch.Tensor]:
    from opentrans.state import read_training_state

    masks = read_training_state(run / "state.pt").masks
    return dict(masks.masks)


@pytest.mark.parametrize("more", [(), ("--mask", "uniform:0.6"), ("--plain",)])
def test_a_stopped_freeze_ends_like_one_that_was_not(
    tmp_path: Path, folder: Path, small: None, monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
) -> None:  # fmt: skip
    assert freeze(folder, tmp_path / "whole", *more) == 0
    real, kills = os.replace, []

    def stop(source: str, target: str) -> None:
        if Path(target).name == "log.json" and not kills:
            kills.append(target)
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", stop)
    assert freeze(folder, tmp_path / "run", *more) == 130
    monkeypatch.setattr(os, "replace", real)
    assert freeze(folder, tmp_path / "run", *more) == 0
    one, two = (read_state_dict(tmp_path / n / "weights.safetensors") for n in ("whole", "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_page_shows_every_layer_of_every_round() -> None:
    rounds = [
        {"round": r, "steps": 5 * r, "kept": 10, "removed": 3, "density": 0.5 / r,
         "threshold": 0.1, "loss": None if r == 1 else 0.3,
         "layers": {"a<b": 0.8 / r, "dead": 0.0}}
        for r in range(1, 31)
    ]  # fmt: skip
    page = prune_page("A & B", rounds, "SYNTHETIC weights")
    assert "A &amp; B" in page and "a&lt;b" in page and "<b" not in page.split("a&lt;b")[1][:3]
    drawing = density_map(rounds)
    assert drawing.count("<rect") == 60
    assert "dead, round 30: 0.00%" in drawing and 'fill-opacity="0.000"' in drawing
    with pytest.raises(ValueError, match="at least one round"):
        prune_page("x", [])


def test_masks_find_the_convolutions_that_skip_gradients() -> None:
    from opentrans.gradskip import skip_frozen

    model = tower("").requires_grad_(True)
    masks = MaskSet.from_model_zeros(model)
    skip_frozen(model, ["conv2", "layer1.0.conv2"])
    assert type(model.conv2) is not torch.nn.Conv2d, "nothing was replaced"
    assert masks.match(model, strict=True).unmasked_convs == []
    masks.apply_(model)
