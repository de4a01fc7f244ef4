"""``opentrans alpha``: numbers, plans, files and pictures, on small networks; and its refusals."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from freeze_cases import Chain, alpha_row, alpha_table
from torch.nn.utils import prune

from opentrans import FreezePlan, cli, freeze_plan
from opentrans.cli import render
from opentrans.cli.progress import progress_bar
from opentrans_kernels.bench.subject import build_tower
from opentrans_kernels.report import alpha_files
from opentrans_kernels.report.alpha_plots import Freezing, alphas_svg, spectra_svg, standalone
from opentrans_kernels.spectrum import AlphaTable, estimate_alpha

TINY = "torchvision:resnet18"
BASE = ["alpha", "--arch", TINY, "--size", "64"]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(build_tower(TINY, seed=3).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def run_of_everything(
    checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path]:
    """One run that writes every file, on the checkpoint."""
    folder = tmp_path_factory.mktemp("out")
    arguments = [
        "alpha", checkpoint, "--arch", TINY, "--size", "64", "--fit", "xmin_mid",
        "--freeze", "median", "--plot", str(folder / "plots"), "--csv", str(folder / "a.csv"),
        "--save-plan", str(folder / "plan.json"), "--json", str(folder / "a.json"),
    ]  # fmt: skip
    return cli.main(arguments), folder


def test_files_agree_with_the_library(run_of_everything) -> None:
    code, folder = run_of_everything
    assert code == 0
    model = build_tower(TINY, seed=3).requires_grad_(True)
    alphas = estimate_alpha(model, "xmin_mid")
    read = AlphaTable.from_json(folder / "a.json")  # the JSON is a table, with more beside it
    assert read.rows == alphas.rows
    payload = json.loads((folder / "a.json").read_text())
    assert payload["subject"]["weights"] == "weights of resnet18.pth"
    assert not payload["subject"]["synthetic"] and not payload["notes"]
    plan = FreezePlan.from_json(folder / "plan.json")
    assert plan.digest() == freeze_plan(model, alphas, "median").digest()
    assert payload["freeze"]["frozen"] == [one.name for one in plan.decisions if one.frozen]
    report = plan.report(model, (64, 64))
    assert payload["savings"]["after_macs"] == report.after_macs < report.before_macs
    rows = list(csv.DictReader(io.StringIO((folder / "a.csv").read_text())))
    assert [float(row["alpha"]) for row in rows] == [row.alpha for row in alphas]
    assert sorted(p.name for p in folder.iterdir()) == ["a.csv", "a.json", "plan.json", "plots"]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count = 0

    def handle_starttag(self, tag, attrs) -> None:
        self.count += 1
        if tag not in ("meta",):
            self.open.append(tag)
        for key, value in attrs:
            assert key not in ("src", "href"), f"{tag} refers to {value}"

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(run_of_everything) -> None:
    folder = run_of_everything[1] / "plots"
    assert sorted(p.name for p in folder.iterdir()) == ["alpha.svg", "index.html", "spectra.svg"]
    page = (folder / "index.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not tags.open and tags.count > 500 and page.count("<svg") == 2
    assert "training step" in page and "SYNTHETIC" not in page
    for name in ("alpha.svg", "spectra.svg"):
        assert ElementTree.parse(folder / name).getroot().tag == f"{SVG}svg"


def test_synthetic_weights_are_loudly_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*BASE, "--fit", "ks", "--freeze", "random:1"]) == 0
    shown = capsys.readouterr()
    assert "SYNTHETIC weights" in shown.err and "say nothing about a trained" in shown.err
    assert "fit ks, median alpha" in shown.out and "10 of 21" in shown.out
    assert re.search(r"layer4\.1\.conv2 +512x512x3x3 .*(frozen|trains)", shown.out)
    assert "training step" in shown.out and "first trainable" in shown.out
    assert cli.main([*BASE, "--json"]) == 0
    shown = capsys.readouterr()
    payload = json.loads(shown.out)
    assert payload["subject"]["synthetic"] and "SYNTHETIC" in payload["notes"][0]
    assert "freeze" not in payload and len(payload["layers"]) == 21


def test_dense_weights_decide_where_masked_ones_are_beside_them(checkpoint: str, capsys) -> None:
    arguments = ["alpha", checkpoint, "--arch", TINY, "--size", "64", "--fit", "xmin_mid"]
    arguments += ["--freeze", "median", "--json"]
    assert cli.main([*arguments, "--mask", "uniform:0.90"]) == 0
    shown = capsys.readouterr()
    both = json.loads(shown.out)
    assert "SYNTHETIC mask" in shown.err and "masked weights: " not in shown.err
    assert cli.main(arguments) == 0
    dense = json.loads(capsys.readouterr().out)
    assert cli.main([*arguments, "--mask", "uniform:0.90", "--weights", "masked"]) == 0
    shown = capsys.readouterr()
    masked = json.loads(shown.out)
    count = sum(layer["zeros"] > 0 for layer in masked["layers"])
    assert f"masked weights: {count} of 21 layers hold exact zeros (90" in shown.err
    assert [one["weights_seen"] for one in (both, dense, masked)] == ["dense", "dense", "masked"]
    assert [one["freeze"]["weights_seen"] for one in (both, masked)] == ["dense", "masked"]
    assert both["layers"] == dense["layers"] and both["masked"]["layers"] == masked["layers"]
    assert dense["layers"][3]["alpha"] != masked["layers"][3]["alpha"]
    differ = both["freeze"]["disagreement"]
    sets = [set(one["freeze"]["frozen"]) for one in (dense, masked)]
    assert set(differ["only_first"]) == sets[0] - sets[1] and differ["count"] > 0
    assert set(differ["only_second"]) == sets[1] - sets[0] and differ["layers"] == 21
    assert (differ["first"], differ["second"]) == ("dense weights", "masked weights")


def test_a_pruned_checkpoint_gives_the_weights_under_its_masks(
    checkpoint: str, tmp_path: Path, capsys
) -> None:
    model = build_tower(TINY, seed=3)
    for block in (model.layer1, model.layer2):
        prune.l1_unstructured(block[0].conv1, "weight", amount=0.9)
    both, folded = tmp_path / "pruned.pth", tmp_path / "folded.pth"
    torch.save(model.state_dict(), both)
    for block in (model.layer1, model.layer2):
        prune.remove(block[0].conv1, "weight")
    torch.save(model.state_dict(), folded)
    found = {}
    for name, path in (("dense", checkpoint), ("both", both), ("folded", folded)):
        arguments = ["alpha", str(path), "--arch", TINY, "--fit", "xmin_mid", "--json"]
        assert cli.main(arguments) == 0
        shown = capsys.readouterr()
        found[name] = json.loads(shown.out)
        assert ("masked weights: 2 of 21 layers" in shown.err) == (name == "folded")
    assert found["both"]["layers"] == found["dense"]["layers"]
    assert found["both"]["masked"]["layers"] == found["folded"]["layers"]
    assert found["both"]["subject"]["mask"] == "masks in pruned.pth"
    assert "masked" not in found["folded"] and found["folded"]["weights_seen"] == "masked"


def test_farms_lays_its_freeze_set_beside_the_others(checkpoint: str, capsys) -> None:
    arguments = ["alpha", checkpoint, "--arch", TINY, "--method", "farms", "--freeze", "median"]
    assert cli.main([*arguments, "--size", "64", "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    assert payload["fit"] == "xmin_mid" and payload["freeze"]["fit"] == "farms xmin_mid"
    sets = {one["label"]: one for one in payload["freeze_sets"]}
    assert list(sets) == ["farms xmin_mid", "xmin_peak", "xmin_mid", "ks"]
    own = set(sets["farms xmin_mid"]["frozen"])
    assert own == set(payload["freeze"]["frozen"]) and sets["xmin_peak"]["without_alpha"] == []
    assert sets["farms xmin_mid"]["without_alpha"] == ["conv1"]
    for label in ("xmin_peak", "xmin_mid", "ks"):
        differ = sets[label]["disagreement"]
        assert set(differ["only_second"]) == set(sets[label]["frozen"]) - own
    assert cli.main([*arguments, "--size", "64"]) == 0
    shown = capsys.readouterr().out
    assert "Freeze sets by rule median" in shown and "differ from farms xmin_mid" in shown
    assert re.search(r"freeze sets of farms xmin_mid and of ks: \d+ of 21 layers differ", shown)
    assert re.search(r"conv1 +64x3x7x7 +nan ", shown)
    assert "farms cannot judge it: 21 blocks of 3x3" in payload["layers"][0]["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such.pth"], "no-such.pth"),
        (["--fit", "median"], "xmin_peak"),
        (["--freeze", "medium"], "there is no freeze rule 'medium'. Did you mean median?"),
        (["--freeze", "prefix:layer9"], "Did you mean layer"),
        (["--save-plan", "plan.json"], "Add --freeze median"),
        (["--csv", "no/such/dir/a.csv"], "does not exist. Create it first"),
        (["--plot", "no/such/dir"], "does not exist. Create it first"),
        (["--device", "abacus"], "Use 'cpu' or 'cuda'"),
        (["--arch", "RN9000"], "RN9000"),
    ],
)
def test_bad_input_is_2_with_the_fix(arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*BASE, *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "\nopentrans alpha: " in f"\n{shown.err}"
    assert not list(tmp_path.iterdir())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("use_rich", [True, False])
def test_progress_bar(use_rich: bool) -> None:
    if use_rich:
        pytest.importorskip("rich")
    streams = {"stdout": Terminal(), "stderr": Terminal()}
    out = render.Output(None, **streams, use_rich=use_rich)
    with progress_bar(out, "alpha") as progress:
        for step in range(1, 5):
            progress(step, 4, f"layer{step}")
    shown = streams["stderr"].getvalue()
    assert "4/4" in shown and "layer4" in shown and not streams["stdout"].getvalue()
    piped = render.Output(None, stdout=io.StringIO(), stderr=io.StringIO(), use_rich=use_rich)
    with progress_bar(piped, "alpha") as progress:
        progress(1, 4, "layer1")
    assert piped.stderr.getvalue() == "alpha: 1 of 4, layer1\n"
    assert piped.stdout.getvalue() == ""


def marks(svg: str, css: str) -> int:
    root = ElementTree.fromstring(standalone(svg))
    return sum(
        1 for one in root.iter() if one.get("class") == css and one.find(f"{SVG}title") is not None
    )


def test_alpha_drawing_marks_and_line() -> None:
    model = Chain()
    table = alpha_table(model, {"conv0": 2.0, "conv1": 8.0, "conv2": math.nan, "conv3": math.inf})
    plan = freeze_plan(model, table, "median")
    svg = alphas_svg(table, Freezing(plan.frozen, plan.threshold, "median"))
    legend = 1  # one filled mark
    assert marks(svg, "frozen") == 1 + legend and marks(svg, "trains") == 2 + 3
    assert "median 8" in svg and "all zero" in svg and "infinite" in svg
    plain = alphas_svg(table)
    assert 'class="cut"' not in plain and marks(plain, "frozen") == 0
    x = [float(v) for v in re.findall(r'<circle class="frozen" cx="([\d.]+)"', svg)]
    cut = float(re.search(r'class="cut" x1="([\d.]+)"', svg).group(1))
    assert x[-1] < cut


def test_tail_is_drawn_where_the_fit_says() -> None:
    count = 4000
    share = torch.arange(count, 0, -1, dtype=torch.float64) / count
    values = share.pow(-1 / 1.5)  # an exact power law: P(X >= x) = x^-1.5, alpha 2.5
    weights = {"w": torch.diag(values[-64:].sqrt())}
    table = estimate_alpha(weights, "xmin_mid", keep_spectra=True)
    svg = spectra_svg(table)
    line = re.search(r'class="tail" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"', svg)
    x1, y1, x2, y2 = map(float, line.groups())
    points = re.search(r'class="points" points="([^"]+)"', svg).group(1).split(",")
    curve = [tuple(map(float, point.split())) for point in points]
    assert len(curve) == 64 and (x1, y1) in curve
    assert x2 > x1 and y2 > y1
    start = float(re.search(r'class="start" x1="([\d.]+)"', svg).group(1))
    assert start == x1
    assert curve == sorted(curve) and all(0 <= y <= 104 for _, y in curve)


def test_drawings_survive_anything() -> None:
    weights = {
        "<i>&evil": torch.randn(8, 9),
        "zero": torch.zeros(4, 4),
        "equal": torch.eye(5),
        "one": torch.randn(1, 6),
        "wide.range": torch.diag(torch.logspace(-2, 4, 30)),
    }
    table = estimate_alpha(weights, "xmin_mid", linear_aspect=None, keep_spectra=True)
    for name, text in alpha_files(table, title="<script>").items():
        assert "<i>" not in text and "<script>" not in text
        assert "nan" not in re.sub(r"<(style|pre|td|title).*?</\1>", "", text, flags=re.S).lower()
        if name.endswith(".svg"):
            ElementTree.fromstring(text)
    assert "0 eigenvalues" in spectra_svg(table) and "1 eigenvalues" in spectra_svg(table)
    with pytest.raises(ValueError, match="keep_spectra=True"):
        spectra_svg(AlphaTable((alpha_row("a", 2.0, (4, 4)),), "ks"))


def test_vision_transformers_of_clip_by_name(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    open_clip = pytest.importorskip("open_clip")

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = torch.nn.Sequential(torch.nn.Linear(40, 40))

    asked: list[str] = []
    monkeypatch.setattr(
        open_clip, "create_model", lambda name, pretrained: asked.append(name) or Tiny()
    )
    first, again = build_tower("ViT-L-14", seed=1), build_tower("ViT-L-14", seed=1)
    assert asked == ["ViT-L-14"] * 2 and not first.training
    assert torch.equal(first[0].weight, again[0].weight) and not first[0].weight.requires_grad
    assert cli.main(["alpha", "--arch", "ViT-L-14", "--fit", "ks"]) == 0
    assert "1 layers, fit ks" in capsys.readouterr().out
    assert cli.main(["alpha", "--arch", "ViT-L-140"]) == 2
    assert "does not know 'ViT-L-140'. Use for example one of: ViT-" in capsys.readouterr().err
