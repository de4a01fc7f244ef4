"""The page of benchmark results: every kind is shown, and it needs nothing from outside."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import bench_results as make
import pytest

from opentrans.cli import main
from opentrans_kernels.bench import derive
from opentrans_kernels.bench.compare import compare
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.report import results_page
from opentrans_kernels.report.page import _SORT, Page
from opentrans_kernels.report.plots import Axis, Curve, log_ticks, plot


def page_of(**results) -> str:
    return results_page({f"{name}.json": result for name, result in results.items()})


def circles(svg: str, css: str) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(svg)
    return [
        (float(one.get("cx", "nan")), float(one.get("cy", "nan")))
        for one in root.iter("circle")
        if one.get("class") == css
    ]


def test_linear_and_logarithmic_axes_place_points() -> None:
    linear = plot([Curve("a", [(0, 0), (5, 5), (10, 10)], "c0")], Axis("x"), Axis("y"))
    (x0, y0), (x1, y1), (x2, y2) = circles(linear, "c0")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x2 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y2, "y grows upwards"
    log = plot([Curve("a", [(1, 1), (10, 10), (100, 100)], "c1")], Axis("x", True), Axis("y", True))
    (x0, _), (x1, _), (x2, _) = circles(log, "c1")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert "<polyline" in log
    loose = plot([Curve("a", [(1, 1), (2, 2)], "c0", joined=False)], Axis("x"), Axis("y"))
    assert "<polyline" not in loose


@pytest.mark.parametrize(("low", "high"), [(0.02, 1.0), (1.0, 1.0), (3.0, 700.0), (1e-4, 2e-4)])
def test_log_ticks_enclose(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert ticks[0] <= low * 1.001 and ticks[-1] >= high * 0.999 and len(ticks) >= 2
    assert ticks == sorted(ticks)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_impossible_points_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="no place on 'x'"):
        plot([Curve("a", [(value, 1.0)], "c0")], Axis("x", True), Axis("y"))
    with pytest.raises(ValueError, match="at least one point"):
        plot([Curve("a", [], "c0")], Axis("x"), Axis("y"))
    with pytest.raises(ValueError, match="tips"):
        plot([Curve("a", [(1, 1)], "c0", tips=[])], Axis("x"), Axis("y"))


def test_crossovers_are_interpolated_and_their_absence_is_said() -> None:
    rows = make.op()["rows"]
    (found,) = derive.crossovers(rows)
    # 1.25x at 0.5 and 0.833x at 0.8, on straight lines in logarithms.
    share = math.log(1.25) / math.log(1.25 / (1 / 1.2))
    assert found.density == pytest.approx(0.5 * (0.8 / 0.5) ** share)
    assert found.verdict.startswith("sparse wins below 0.6")
    always = derive.crossovers([make.op_row(0.1, 1.0, 0.2), make.op_row(1.0, 1.0, 0.9)])
    assert always[0].density is None and "up to 1, the densest" in always[0].verdict
    never = derive.crossovers([make.op_row(0.1, 1.0, 1.2), make.op_row(1.0, 1.0, 9.0)])
    assert never[0].density is None and "dense wins from 0.1" in never[0].verdict
    inexact = [{**row, "speedup": None} for row in rows]
    assert derive.crossovers(inexact) == []


def test_roofline_counts_flops_and_bytes() -> None:
    row = make.layer("a", sparse=0.5, cin=64, cout=256, nnz=1000, h_out=10, w_out=10)
    (point,) = derive.roofline([row], {"dense_gflops": 100.0, "copy_gbs": 10.0}, batch=2)
    assert derive.layer_bytes(row, 2) == 4 * 2 * (64 + 256) * 100 + 6 * 1000
    assert point.intensity == pytest.approx(2 * 1000 * 100 * 2 / (256_000 + 6000))
    assert point.gflops == pytest.approx(2 * 1000 * 100 * 2 / 0.5e-3 / 1e9)
    assert point.bound == "memory" and point.limit_gflops == pytest.approx(point.intensity * 10)
    strided = make.layer("b", cin=64, cout=64, nnz=0, stride=2, h_out=5, w_out=5)
    assert derive.layer_bytes(strided) == 4 * (64 * 100 + 64 * 25)
    assert derive.roofline([strided], {"dense_gflops": 1.0, "copy_gbs": 1.0}) == []


def test_engines_beside_an_operator_are_shown() -> None:
    op = make.op()
    peer = {**make.timing(6.0), "available": True, "max_rel_err": 2e-7, "ours_ms": 2.0}
    peer["speedup_of_ours"] = make.spread(3.0)
    gone = {"available": False, "skipped": True, "error": "no environment"}
    op["rows"][0] |= {"peers": {"deepsparse": peer, "openvino": gone}}
    html = page_of(op=op)
    assert "64-&gt;256 k1 56x56, 0.1, 1 t, avx2" in html and "skipped: no environment" in html
    assert "deepsparse" in html and "3.00x" in html and "2.94 - 3.06" in html


def test_the_page_shows_every_kind() -> None:
    html = page_of(**{name: one() for name, one in make.ALL.items()})
    for text in (
        "Benchmarks on amd-epyc-zen4-2cpu",
        "Trunk: fastest dense PyTorch against ours",
        "global:0.90, 224, 1 t, avx2",
        "4.00x",
        "Work and time",
        "10.73",  # 2 x nominal multiply-adds, GFLOP
        "Peers",
        "onnxruntime",
        "4.40x",
        "no environment",
        "Roofline",
        "1 of 3 are slower sparse than dense: layer1.0.conv3.",
        "Crossover",
        "sparse wins below 0.6",
        "Cost against nonzeros",
        "Rows of the dispatch table that were not timed here",
        "Whole model: RN50",
        "Scaling with threads",
        "Scaling with batch",
        "Scaling with pixels",
        "Memory",
        "1.80x (1.76 - 1.84) of ours xmin_peak",
        "Training step, 224 pixels, batch 4",
        "SYNTHETIC",
    ):
        assert text in html, text
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) >= 8
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert html.count('class="lose"') >= 3
    html = html.replace('href="#', "")  # the contents lead to places of the page itself
    for outside in ("http:", "https:", "src=", "href=", "@import", "url("):
        assert outside not in html, outside


def test_disturbed_interrupted_and_failed_runs_are_marked() -> None:
    bad = make.trunk()
    bad["canary"] |= {"disturbed": True, "reasons": ["the fixed kernel was 20% slower"]}
    bad |= {"complete": False, "exact": False, "failed_checks": ["inexact: <b>"]}
    html = page_of(bad=bad)
    assert "DISTURBED machine: the fixed kernel was 20% slower" in html
    assert "was interrupted" in html and "FAILED a check: inexact: &lt;b&gt;" in html
    tables = "".join(
        re.findall(r"<tbody>.*?</tbody>", html.split("<summary>Layers:")[0], re.DOTALL)
    )
    assert "inexact" in tables and "4.00x" not in tables, "a wrong answer has no speed"


def test_hostile_labels_stay_text() -> None:
    one = make.trunk()
    one["mask"]["label"] = "<script>alert(1)</script>"
    one["layers"][0]["name"] = "<img>"
    html = page_of(one=one)
    assert html.count("<script>") == 1 and "&lt;script&gt;alert" in html and "<img>" not in html


def test_before_and_after_is_on_the_page() -> None:
    base, new = {"b.json": make.trunk(25.0)}, {"n.json": make.trunk(30.0)}
    html = results_page(new, compare(base, new))
    assert "Before and after" in html and "+20.0%" in html


def test_results_of_two_machines_are_refused(tmp_path: Path, capsys) -> None:
    other = copy.deepcopy(make.op())
    other["machine"]["cpu"] = "Intel Xeon"
    with pytest.raises(OpenTransError, match="keep one folder per machine"):
        page_of(a=make.trunk(), b=other)
    for name, result in (("a", make.trunk()), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "-o", str(page)]) == 2
    assert "different machines" in capsys.readouterr().err and not page.exists()


def test_the_command_writes_the_page(tmp_path: Path, capsys) -> None:
    for name, one in make.ALL.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(one()))
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "trunk.json", tmp_path / "old")
    page = tmp_path / "page.html"
    arguments = [str(tmp_path / f"{name}.json") for name in make.ALL]
    assert main(["report", *arguments, "-o", str(page), "--base", str(tmp_path / "old")]) == 0
    assert "from 5 result files" in capsys.readouterr().out
    assert "Before and after" in page.read_text()
    assert main(["report", str(tmp_path / "none.json"), "-o", str(page)]) == 2
    assert main(["report", *arguments, "-o", str(tmp_path / "no" / "page.html")]) == 2
    said = capsys.readouterr().err
    assert "cannot be read" in said and "Create it first" in said


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_sorts(tmp_path: Path) -> None:
    script = """
    const row = (...cells) => ({ cells: cells.map((textContent) => ({ textContent })) });
    const body = { rows: %s.map((text, i) => row("abcdefg"[i], text)) };
    body.append = (...rows) => { body.rows = rows; };
    const head = { cellIndex: 1, ariaSort: null };
    const table = { tBodies: [body], querySelectorAll: () => [head] };
    head.closest = () => table;
    head.addEventListener = (kind, call) => { head[kind] = call; };
    global.document = { querySelectorAll: () => [head] };
    %s
    const names = () => body.rows.map((r) => r.cells[0].textContent).join("");
    head.click(); const up = names() + head.ariaSort;
    head.keydown({ key: "Tab" }); head.keydown({ key: "Enter" });
    console.log(up, names() + head.ariaSort, head.tabIndex);
    """
    file = tmp_path / "sort.js"
    for cells, up, down in (
        (["10.0", "9.5x", "", "1,200", "inexact", "-3%", "1e-7"], "fgbadec", "dabgfec"),
        (["3x3", "1x1 reduce", "1x1 expand", "112x112"], "cbad", "dabc"),
        (["3.56 - 3.63", "12.0 - 12.5", "4.25x of ours"], "acb", "bca"),
    ):
        file.write_text(script % (json.dumps(cells), _SORT))
        done = subprocess.run(["node", str(file)], capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == [f"{up}ascending", f"{down}descending", "0"], done.stderr


def test_contents_lead_to_every_section_and_folded_ones_hold_their_tables() -> None:
    html = page_of(**{name: one() for name, one in make.ALL.items()}, two=make.trunk(20.0, size=64))
    links = dict(re.findall(r'<a href="#(s\d+)">(.*?)</a>', html))
    places = re.findall(r' id="(s\d+)"', html)
    assert sorted(links) == sorted(places) and len(links) >= 12
    folds = re.findall(r'<details class="section" id="s\d+"( open)?>(.*?)</details>', html, re.S)
    assert [bool(opened) for opened, _ in folds] == [True, False, False]
    assert "Roofline" in folds[0][1] and "layer1.0.conv3" in folds[1][1]
    assert "by backend: 2 of 4 of cpu." in folds[2][1]
    assert "Operators" in folds[2][1] and "no CUDA device" in folds[2][1]
    assert html.count("<details") == html.count("</details>")


def test_columns_of_text_stand_left_and_long_notes_are_wrapped() -> None:
    page = Page("p")
    note = "a note that is longer than the cells of a table usually are"
    page.table(("n", "run", "ms", "x"), [["1", "3x3", "1.0", note], ["2", "", "inexact", ""]] * 2)
    page.table(("n", "ms"), [["a", "1.0"], ["b", "2.5x"], ["c", "inexact"]])
    html = page.render()
    assert '<th class="text">run</th>' in html and f'<td class="text note">{note}</td>' in html
    assert "<th>ms</th>" in html.split("<table>")[2] and "<script" not in html


def test_a_long_comparison_shows_what_changed_most_and_folds_the_rest() -> None:
    base, new = make.trunk(25.0), make.trunk(25.0)
    base["layers"] = [make.layer(f"l{i}", 2.0, 1.0) for i in range(40)]
    new["layers"] = [make.layer(f"l{i}", 2.0, 1.5 if i == 7 else 1.0) for i in range(40)]
    html = results_page({"n": new}, compare({"b": base}, {"n": new}))
    first, _, rest = html.partition("Before and after: all 41 cases</summary>")
    shown = first.split(">Before and after<", 2)[-1]
    assert shown.count("quartiles overlap") == 19 and ": l7<" in shown and "+50.0%" in shown
    assert rest.split("</details>")[0].count("quartiles overlap") == 40


def test_training_rows_are_compared_with_the_baseline_they_name() -> None:
    training = make.training()
    own = {"baseline": "baseline, affine trains", "kept_baseline_mib": 240.0}
    training["results"][0]["rows"][1] |= own
    html = page_of(t=training)
    assert "<td>0.25</td>" in html and "baseline, affine trains" in html, "60 of 240 MiB"
    assert "<td>0.60</td>" in page_of(t=make.training()), "60 of 100 MiB"


def test_synthetic_weights_are_said_for_every_kind() -> None:
    for name, one in make.ALL.items():
        if name != "op":  # random operators of no network
            assert "SYNTHETIC" in page_of(**{name: one()}), name
