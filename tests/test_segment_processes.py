"""``opentrans segment`` in several processes: the same results, and what a dying one costs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pictures are read by Pillow")
pytest.importorskip("open_clip", reason="the text encoder is open_clip's")
pytest.importorskip("torchvision", reason="the DeepLab head uses torchvision")

from segment_cases import CLASSES, label, names, picture, results, segment, small_segmenter

from opentrans.segment import find_pictures, pool
from opentrans.segment.folder import OutputFolder
from opentrans.segment.recipe import Recipe


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_segmenter(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture
def words(weights: Path, tmp_path: Path) -> list[object]:
    return ["--weights", weights, "--classes", ", ".join(CLASSES), "-o", tmp_path / "out",
            "--no-accelerate", "--text-cache", tmp_path / "text"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "deep" / "b.jpg", 33, 47, 1)
    return tmp_path / "in"


def test_two_processes_do_what_one_does(words: list[object], folder: Path, tmp_path: Path) -> None:
    for number in range(3):
        picture(folder / f"more{number}.png", 20 + number, 30, number)
    (folder / "text.jpg").write_text("no picture")
    assert segment(folder, *words) == 2
    two = tmp_path / "two"
    assert segment(folder, *words, "-o", two, "--processes", 2) == 2
    assert names(two) == names(tmp_path / "out") and len(names(two)) == 5
    for name in names(two):
        assert np.array_equal(label(two, name), label(tmp_path / "out", name))
    assert [Path(row["file"]).name for row in results(two)["failed"]] == ["text.jpg"]


@pytest.mark.slow
def test_a_process_that_dies_costs_its_picture_only(
    weights: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(folder / "z.png")
    (tmp_path / "dying_worker.py").write_text(DYING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    import dying_worker

    monkeypatch.setattr(pool, "_serve", dying_worker.serve)
    recipe = Recipe(str(weights), CLASSES, accelerate=False)
    out = OutputFolder(tmp_path / "out")
    out.open(recipe.settings())
    done: dict[str, str] = {}
    pictures = find_pictures([folder])
    pool.work_in_processes(
        recipe, pictures, out, processes=2,
        on_done=lambda p, reason: done.update({p.name: reason}), on_ready=lambda _: None,
    )  # fmt: skip
    assert done.pop("a").startswith("the process that segmented it ended (signal SIGKILL)")
    assert done == {"deep/b": "", "z": ""}
    assert not out.done(pictures[0]) and out.done(pictures[1])


DYING = f"""
import os
from opentrans.segment import job
from opentrans.segment.pool import _serve

tried = job.tried


def dies(segmenter, picture, folder, font):
    if picture.name == "a":
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return tried(segmenter, picture, folder, font)


def serve(*arguments):
    job.tried = dies
    _serve(*arguments)
"""


def test_a_model_that_cannot_be_built_ends_all_processes(
    words: list[object], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no weights")
    assert segment(folder, *words, "--weights", damaged, "--processes", 2) == 2
    assert "damaged.safetensors" in capsys.readouterr().err
    assert list((tmp_path / "out" / "records").iterdir()) == []
