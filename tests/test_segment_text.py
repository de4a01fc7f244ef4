"""Text embeddings on disk, and segmenters in one file: what is kept, what is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip", reason="the text encoder is open_clip's")
pytest.importorskip("torchvision", reason="the DeepLab head uses torchvision")

from ovs_nets import small_classifier
from safetensors import safe_open
from safetensors.torch import save_file
from segment_cases import SMALL, small_segmenter

from opentrans.ovs import TextClassifier, text_store
from opentrans.ovs.saved import Design, build_segmenter, load_segmenter, save_segmenter
from opentrans.ovs.text_store import default_folder, load_vocabulary
from opentrans_kernels.errors import CheckpointError, OpenTransError

CLASSES = ("cat", "road")


def answer(classifier: TextClassifier, folder: Path | None) -> tuple[torch.Tensor, int]:
    """The embeddings, and how often the encoder ran for them."""
    load_vocabulary(classifier, CLASSES, folder)
    found = classifier.weights(CLASSES)
    return found, classifier.cache.stats.encoder_calls


def test_a_vocabulary_is_encoded_once_for_all_runs(tmp_path: Path) -> None:
    first, calls = answer(small_classifier(), tmp_path)
    assert calls == 1 and len(list(tmp_path.iterdir())) == 1
    again, calls = answer(small_classifier(), tmp_path)
    assert calls == 0 and torch.equal(first, again)
    assert torch.equal(again, small_classifier().weights(CLASSES))


def test_what_decides_the_embeddings_has_a_file_of_its_own(tmp_path: Path) -> None:
    base = small_classifier()
    load_vocabulary(base, CLASSES, tmp_path)
    load_vocabulary(base, tuple(reversed(CLASSES)), tmp_path)
    other_prompts = small_classifier(templates=("a {}.",))
    other_weights = small_classifier(seed=1)
    for classifier in (other_prompts, other_weights):
        found, calls = answer(classifier, tmp_path)
        assert calls == 1 and not torch.allclose(found, base.weights(CLASSES))
    assert len(list(tmp_path.iterdir())) == 4
    logit = small_classifier()
    with torch.no_grad():
        logit.cache.encoder.logit_scale.add_(1)  # text does not depend on it
    assert answer(logit, tmp_path)[1] == 0


@pytest.mark.parametrize("how", ["empty", "cut", "text", "rows", "name", "length", "pickle"])
def test_a_damaged_file_is_made_again_with_a_note(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right, _ = answer(small_classifier(), tmp_path)
    (file,) = tmp_path.iterdir()
    if how in ("empty", "cut", "text"):
        file.write_bytes({"empty": b"", "cut": file.read_bytes()[:-3], "text": b"hello"}[how])
    elif how == "pickle":
        torch.save({"embeddings": right}, file)
    else:
        tensors = {"rows": {"embeddings": right[:1]}, "name": {"other": right},
                   "length": {"embeddings": 2 * right}}  # fmt: skip
        save_file({k: v.clone() for k, v in tensors[how].items()}, file)
    found, calls = answer(small_classifier(), tmp_path)
    assert torch.equal(found, right) and calls == 1
    assert "made again" in caplog.text and str(file) in caplog.text
    assert answer(small_classifier(), tmp_path)[1] == 0


def test_no_folder_and_one_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert answer(small_classifier(), None)[1] == 1
    (tmp_path / "file").write_text("in the way")
    found, calls = answer(small_classifier(), tmp_path / "file" / "text")
    assert calls == 1 and found.shape == (2, 32) and "not kept" in caplog.text


def test_the_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "opentrans" / "text"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard: to be ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "opentrans" / "text"
    assert text_store.FORMAT == 1


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OpenTransError, match="rows .3, 32. for 2 classes"):
        small_classifier().cache.remember(CLASSES, ("{}",), torch.zeros(3, 32))


@pytest.mark.parametrize("head", ["pixel", "mask"])
def test_a_segmenter_comes_back_from_its_file(head: str, tmp_path: Path) -> None:
    design = SMALL
    if head == "mask":
        pytest.importorskip("transformers", reason="the mask head needs transformers")
        pytest.importorskip("scipy", reason="the mask head needs scipy")
        sizes = {"dim": 32, "heads": 4, "feedforward": 32, "encoder_feedforward": 32}
        sizes |= {"encoder_layers": 1, "decoder_layers": 3, "queries": 4, "points": 32}
        design = Design(**{**vars(SMALL), "head": "mask", "options": sizes, "note": "a note"})
    torch.manual_seed(3)
    model = build_segmenter(design)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image, CLASSES)
        torch.manual_seed(4)
        back, read = load_segmenter(save_segmenter(tmp_path / "x.safetensors", model, design))
        assert read == design and torch.equal(back(image, CLASSES), expected)
    assert not any(p.requires_grad for p in back.classifier.cache.encoder.parameters())


def test_files_that_are_no_segmenter_are_refused(tmp_path: Path) -> None:
    whole = small_segmenter(tmp_path / "x.safetensors")
    with safe_open(whole, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    design = json.loads(metadata["opentrans_segmenter"])
    bad = tmp_path / "bad.safetensors"
    damages = [
        {**design, "head": "none"}, {**design, "size": 0}, {**design, "templates": [1]},
        {**design, "options": {"warp": 1}}, {k: v for k, v in design.items() if k != "clip"},
        {**design, "clip": {"embed_dim": 16}}, [1],
    ]  # fmt: skip
    for one in damages:
        save_file(tensors, bad, {"opentrans_segmenter": json.dumps(one)})
        with pytest.raises(CheckpointError, match="is a file of save_segmenter, but"):
            load_segmenter(bad)
    less = {key: value for key, value in tensors.items() if key != "head.embed.bias"}
    save_file(less, bad, metadata)
    with pytest.raises(CheckpointError, match="head.embed.bias"):
        load_segmenter(bad)
    save_file(tensors, bad)
    with pytest.raises(CheckpointError, match="no file of save_segmenter"):
        load_segmenter(bad)
    model, _ = load_segmenter(whole)
    with pytest.raises(OpenTransError, match="not of the design"):
        save_segmenter(bad, model, Design(**{**vars(SMALL), "options": {}}))
