"""The demo's trained network: pictures, agreement, times; and what is said where a part lacks."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import accel_nets as nets
import pytest
import torch
from report_result import example_result

from opentrans.cli import demo_trained
from opentrans.cli.render import Output
from opentrans.trained import edges
from opentrans.trained.catalog import network
from opentrans.trained.fetch import place_of
from opentrans.trained.shipped import FILES, FOLDER, shipped
from opentrans_kernels import accelerate
from opentrans_kernels.checkpoint.file import read
from opentrans_kernels.errors import CheckpointError, OpenTransError
from opentrans_kernels.hed import MEAN_RGB, Hed
from opentrans_kernels.report import demo_page

pytest.importorskip("skimage")
SMALL = ((4, 4), (8, 8))


def output() -> Output:
    return Output(stdout=io.StringIO(), stderr=io.StringIO(), use_rich=False)


def small_network(_: Path) -> tuple[Any, Any, list[str]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the biases
        model = nets.randomise(Hed(SMALL))
    masks = nets.random_masks(model, 0.3)
    masks.apply_(model)
    return model, accelerate(model, masks, input_size=(32, 48), measure=False), ["notice: MIT"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped files with a small network in it, and an empty cache."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(FOLDER / FILES["coffee-dense"], folder)
    (folder / FILES["hed-090"]).write_bytes(b"x" * 4_800_000)
    monkeypatch.setattr(sys.modules["opentrans.trained.shipped"], "FOLDER", folder)
    monkeypatch.setattr(edges, "place_of", lambda chosen: tmp_path / "cache" / "weights.h5")
    monkeypatch.setattr(demo_trained, "_network", small_network)
    monkeypatch.setattr(demo_trained, "_RESULTS", tmp_path / "results")
    return folder


def images(page: str) -> list[bytes]:
    import base64

    return [
        base64.b64decode(one) for one in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]


def test_three_pictures_two_times_and_the_agreement(data: Path) -> None:
    out = output()
    found, pictures = demo_trained.trained_part(out, 1, ("eager",))
    photo = edges.photograph()
    model, _, _ = small_network(data)
    pruned = edges.edge_map(model, photo)
    dense = edges.read_map(shipped("coffee-dense"), (320, 480))
    assert found["agreement"]["mae"] == pytest.approx(
        float((pruned - dense).abs().mean()), rel=1e-4
    )
    assert found["difference"] < 1e-5 and found["dense_kind"] == "eager"
    assert [one.png for one in pictures] == [edges.png(photo), edges.png(dense), edges.png(pruned)]
    page = demo_page({**example_result(), "trained": found}, pictures)
    assert images(page) == [one.png for one in pictures]
    timing = found["timing"]
    for text in (
        f"Dense: {timing['before_ms']:.0f} ms",
        f"Pruned, accelerated: {timing['after_ms']:.0f} ms",
        f"{timing['speedup']:.2f}x",
        f"{found['agreement']['f_score']:.3f}",
        "the file is 4.8 MB",
        "The dense answer comes with the package",
        "From the file: notice: MIT",
        "Show what was done with each layer",
    ):
        assert text in page, text
    assert page.index("A trained network") < page.index("RN50 trunk")
    assert "What other ways" not in page
    for outside in ("http:", "https:", "href=", "@import", "url("):
        assert outside not in page, outside
    shown = out.stdout.getvalue()  # type: ignore[attr-defined]
    assert f"accelerated {timing['after_ms']:.0f} ms: {timing['speedup']:.2f}x" in shown
    json.dumps(found)


def left_out(words: str) -> None:
    """The part is left out, on the terminal and on the page, and the rest of the page is there."""
    out = output()
    found, pictures = demo_trained.trained_part(out, 1, ("eager",))
    assert list(found) == ["skipped"] and not pictures and re.search(words, found["skipped"])
    said = out.stderr.getvalue()  # type: ignore[attr-defined]
    assert "warning: the trained network is left out: " in said
    page = demo_page({**example_result(), "trained": found})
    assert "Left out: " in page and "<img" not in page and page.count("<svg") == 4


@pytest.mark.parametrize("name", sorted(FILES))
def test_without_a_shipped_file(name: str, data: Path) -> None:
    (data / FILES[name]).unlink()
    left_out(f"{FILES[name]} is not in this installation .*complete checkout")


@pytest.mark.parametrize(("package", "pip"), [("skimage", "scikit-image"), ("PIL", "pillow")])
def test_without_a_package(
    package: str, pip: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    left_out(f"pip install {pip}$")


def test_no_dense_variant_runs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out_variants = demo_trained.trained_part(output(), 1, ("no-such",))[0]
    assert "unknown dense variants" in left_out_variants["skipped"]
    monkeypatch.setattr(
        "opentrans_kernels.bench.variants._bind",
        lambda *_: (_ for _ in ()).throw(RuntimeError("no")),
    )
    left_out("no dense variant of the trained network runs here.*RuntimeError: no")


def test_the_dense_network_answers_itself_where_it_was_fetched(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "cache" / "weights.h5"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    photo = edges.photograph()
    out = output()
    with pytest.raises(CheckpointError, match="not the file that was fetched"):
        edges.cached_hed()
    dense, answer = demo_trained._dense_answer(out, photo)
    assert "comes with the package" in answer
    assert "the dense network is not used: " in out.stderr.getvalue()  # type: ignore[attr-defined]
    pinned = network("hed").__class__(
        **{**vars(network("hed")), "sha256": hashlib.sha256(b"weights").hexdigest()}
    )
    small = nets.randomise(Hed(SMALL))
    monkeypatch.setattr(edges, "network", lambda name: pinned)
    monkeypatch.setattr(edges, "load_hed", lambda path: small if path == weights else None)
    found, answer = demo_trained._dense_answer(out, photo)
    assert "computed here" in answer
    assert torch.equal(found, edges.edge_map(small, photo)) and not torch.equal(found, dense)


def test_an_empty_cache_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "place_of", lambda chosen: tmp_path / "none" / "weights.h5")
    assert edges.cached_hed() is None and not list(tmp_path.iterdir())
    assert place_of(network("hed")).suffix == ".h5"


def test_maps_and_pictures(tmp_path: Path) -> None:
    photo = edges.photograph()
    assert photo.shape == (3, 320, 480) and photo.dtype == torch.uint8
    x = edges.edge_input(photo)
    pixel = photo[:, 5, 7].float() - torch.tensor(MEAN_RGB)
    assert x.shape == (1, 3, 320, 480) and torch.equal(x[0, :, 5, 7], pixel)
    found = torch.rand(20, 30)
    path = tmp_path / "map.png"
    path.write_bytes(edges.png(found))
    again = edges.read_map(path, (20, 30))
    assert (again - found).abs().max() <= 0.5 / 255 + 1e-6
    assert edges.png(again) == path.read_bytes()
    with pytest.raises(CheckpointError, match="mode L and 20x30 pixels, not a grey one of 30x20"):
        edges.read_map(path, (30, 20))
    path.write_bytes(edges.png(photo))
    with pytest.raises(CheckpointError, match="mode RGB"):
        edges.read_map(path, (320, 480))
    for content in (b"", b"no picture", edges.png(found)[:60]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read as a picture"):
            edges.read_map(path, (20, 30))


def test_the_figure_of_the_study(data: Path, tmp_path: Path) -> None:
    def cell(left: float, score: float) -> dict[str, Any]:
        return {"macs_left": left, "agreement": {"mean": {"f_score": score, "mae": 0.1}}}

    path = tmp_path / "results" / "hed.json"
    assert demo_trained.frontier(path) == []
    path.parent.mkdir()
    cells = {
        "untrained/global/0.5": cell(0.6, 0.97), "untrained/global/0.1": cell(0.3, 0.74),
        "imp/2:4": cell(0.5, 0.95), "imp/macs-0.2": cell(0.2, 0.9), "speed": {"ratio": 2.0},
    }  # fmt: skip
    path.write_text(json.dumps({"cells": cells}))
    found = demo_trained.frontier(path)
    assert [one["way"] for one in found] == ["untrained/global"] * 2 + ["imp/2:4", "imp/macs-0.2"]
    part, pictures = demo_trained.trained_part(output(), 1, ("eager",))
    page = demo_page({**example_result(), "trained": part}, pictures)
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 5 and "What other ways and amounts of pruning keep" in page
    circles = list(ElementTree.fromstring(drawings[0]).iter("circle"))
    assert len(circles) == 4
    texts = [one.text for one in ElementTree.fromstring(drawings[0]).iter("text")]
    assert {"untrained/global", "imp, single runs"} <= {*texts}
    assert drawings[0].count("<polyline") == 1 and "imp/2:4: 50.0% left, F-score 0.950" in page
    for text in ("", "[]", "{}", '{"cells": [1]}', json.dumps({"cells": {"a": {"agreement": 1}}}),
                 json.dumps({"cells": {"a": cell(float("nan"), 1.0)}})):  # fmt: skip
        path.write_text(text)
        with pytest.raises(CheckpointError, match="no result of the study"):
            demo_trained.frontier(path)
    out = output()
    assert demo_trained._frontier(out) == []
    assert "the figure of the study is left out" in out.stderr.getvalue()  # type: ignore[attr-defined]


def test_what_is_shipped() -> None:
    with pytest.raises(OpenTransError, match="no file 'rn50' comes with.*hed-090"):
        shipped("rn50")
    assert {path.name for path in FOLDER.iterdir()} <= {*FILES.values(), "NOTICE.txt"}
    notice = (FOLDER / "NOTICE.txt").read_text()
    assert all(name in notice for name in FILES.values()) and "Permission is hereby" in notice
    dense = edges.read_map(shipped("coffee-dense"), (320, 480))
    assert 0.02 < float((dense > 0.5).float().mean()) < 0.2


def test_the_shipped_network_is_for_any_machine() -> None:
    try:
        path = shipped("hed-090")
    except CheckpointError as missing:
        pytest.skip(str(missing))
    tensors, header = read(str(path))
    assert path.stat().st_size <= 5.2e6 and header["arch"] == "HED"
    assert header["plan"] is None and header["values"] == "float16"
    kept = sum(t.numel() for key, t in tensors.items() if key.startswith("values/"))
    assert kept <= 0.101 * 14_708_736 and "MIT" in json.dumps(header["provenance"])
