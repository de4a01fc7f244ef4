"""``opentrans segment --ray`` with two local workers; skipped where Ray is not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pictures are read by Pillow")
pytest.importorskip("open_clip", reason="the text encoder is open_clip's")
pytest.importorskip("torchvision", reason="the DeepLab head uses torchvision")
pytest.importorskip("ray.data", reason="--ray needs Ray: pip install 'ray[data]'")

from segment_cases import CLASSES, label, names, picture, results, segment, small_segmenter


@pytest.mark.slow
def test_two_workers_do_what_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = small_segmenter(tmp_path / "small.safetensors")
    for number in range(4):
        picture(tmp_path / "in" / f"{number}.png", 30 + number, 40, number)
    (tmp_path / "in" / "text.jpg").write_text("no picture")
    words = [tmp_path / "in", "--weights", weights, "--classes", ", ".join(CLASSES),
             "--no-accelerate", "--text-cache", tmp_path / "text"]  # fmt: skip
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    one, two = tmp_path / "one", tmp_path / "two"
    assert segment(*words, "-o", one) == 2
    assert segment(*words, "-o", two, "--ray", "--processes", 2) == 2
    assert names(two) == names(one) == ["0", "1", "2", "3"]
    for name in names(one):
        assert np.array_equal(label(one, name), label(two, name))
    (failed,) = results(two)["failed"]
    assert failed["file"].endswith("text.jpg") and "cannot be read" in failed["reason"]
    capsys.readouterr()
    weights.write_bytes(b"no weights")
    assert segment(*words, "-o", tmp_path / "three", "--ray", "--processes", 2) == 2
    assert "small.safetensors" in capsys.readouterr().err
