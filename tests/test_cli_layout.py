"""What the commands print: at most 120 columns, nothing dropped, notes once, signs of life."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from opentrans.cli import RESTARTING, inspect, layout, render
from opentrans.cli.progress import PAUSE_S, begin, progress_bar, steps

PREFIX = "backbone.clip_model.visual"
NAMES = [f"{PREFIX}.layer{s}.{b}.{c}" for s in (3, 4) for b in (0, 5) for c in ("conv2", "conv3")]
NAMES.append(f"{PREFIX}.layer4.0.downsample.0")
REMARK = (
    "ambiguous: two bins tie for the peak; the other gives 1.5971; sampled float32 of two bands"
)

#: Tables as the commands print them: columns, one row behind the name, right-aligned columns.
TABLES = {
    "inspect": (
        inspect._COLUMNS,
        ["1024>2048 k3 s2", "112x112", "no mask", "1,048,576", "1024.5", "1024.5", "2048", "2048",
         "2048>2047/2048/2048", "100.0%", "100%", "100%", "100%", "10.1x"],
        set(range(1, 15)),
    ),
    "alpha": (
        ("layer", "shape", "alpha", "D", "xmin", "kept/all", "norm", "stable rank", "freeze",
         "remark"),
        ["2048x1024x1x1", "2.0268", "0.1053", "2.339e+00", "4500/4608", "31.7", "137.87", "frozen",
         REMARK],
        set(range(2, 8)),
    ),
    "flops": (
        ("layer", "weights", "alive", "density", "nominal", "effective", "executed", "as"),
        ["2,359,296", "2,359,296", "100.00%", "1023.4", "1023.4", "1023.4", "compact"],
        set(range(1, 7)),
    ),
    "bench op": (
        ("op", "case", "density", "backend", "wall ms", "quartiles", "GFLOP/s", "dense ms",
         "speed-up", "error", "remark"),
        ["layer4.0.conv2 512x512x3x3 at 14x14", "0.100", "reference", "1234.56",
         "1234.56-1234.56", "123.4", "1234.56", "12.34x", "1.2e-07", REMARK],
        {2, 4, 5, 6, 7, 8, 9},
    ),
    "bench compare": (
        ("row", "before", "after", "ratio", "remark"),
        ["1234.56 ms", "1234.56 ms", "1.234x", REMARK],
        {1, 2, 3},
    ),
    "info": (
        ("variable", "value", "default", "when", "choices", "meaning"),
        ["auto", "auto", "run", "auto, avx512, avx2, neon, generic", REMARK * 2],
        set(),
    ),
}  # fmt: skip


def output(**kwargs: object) -> render.Output:
    streams = {"stdout": io.StringIO(), "stderr": io.StringIO()}
    return render.Output(None, **{"use_rich": False, **streams, **kwargs})


def letters(text: str) -> str:
    """Without what wrapping and borders may add."""
    return "".join(c for c in text if c.isalnum())


@pytest.mark.parametrize("use_rich", [False, True])
@pytest.mark.parametrize("command", TABLES)
def test_tables_fit_and_drop_nothing(command: str, use_rich: bool) -> None:
    if use_rich:
        pytest.importorskip("rich")
    columns, cells, right = TABLES[command]
    out = output(use_rich=use_rich)
    if use_rich:
        out._console.width = 200  # a wide terminal
    out.table(None, columns, [[name, *cells] for name in NAMES], right=sorted(right))
    shown = out.stdout.getvalue()
    assert max(map(len, shown.splitlines())) <= 120
    elided = f"~ = {PREFIX}" in shown
    assert elided or command == "flops"  # the only one that has room for whole names
    for name in NAMES:
        assert (f"~{name.removeprefix(PREFIX)}" if elided else name) in shown
    for column in range(1, len(columns)):
        if column in right:
            assert shown.count(cells[column - 1]) >= len(NAMES)
            assert all(word in shown for word in columns[column].split())
    if not use_rich:
        wrapped = layout.lay_out(columns, [[name, *cells] for name in NAMES], right)[1]
        found = {
            " ".join(header).strip(): " ".join(row)
            for block in wrapped
            for header, row in zip(block.header, block.rows[0], strict=True)
        }
        for column, cell in zip(columns[1:], cells, strict=True):
            assert letters(found[column]) == letters(cell)


def test_a_table_that_fits_stays_as_it_is() -> None:
    out = output()
    out.table(None, ("layer", "of 2:4"), [[name, "1"] for name in NAMES])
    lines = out.stdout.getvalue().splitlines()
    assert lines[0].split() == ["layer", "of", "2:4"]
    assert [line.split()[0] for line in lines[2:]] == NAMES


@pytest.mark.parametrize(
    "names, path",
    [
        (NAMES, PREFIX),
        ([*NAMES, "total"], PREFIX),
        (["a.b.conv1", "a.b.conv2"], "a.b"),
        (["conv1", "conv2"], None),
        ([NAMES[0]], None),
        (["left.a", "left.b", "right.a", "right.b"], None),
    ],
)
def test_the_path_that_names_share(names: list[str], path: str | None) -> None:
    assert layout.shared_path(names) == path


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_paragraphs_wrap_under_their_indent_and_paths_stay_whole() -> None:
    out = output(stdout=Terminal())
    note = "  core check: " + "word " * 60
    out.text(note)
    lines = out.stdout.getvalue().splitlines()
    assert max(map(len, lines)) <= 120 and lines[1].startswith("    word")
    assert " ".join(out.stdout.getvalue().split()) == " ".join(note.split())
    out.text("wrote " + "x" * 200, whole=True)
    assert "wrote " + "x" * 200 + "\n" in out.stdout.getvalue()
    out.heading("y" * 150)
    assert max(map(len, out.stdout.getvalue().splitlines()[-3:])) <= 120


def test_a_paragraph_in_a_pipe_is_one_line() -> None:
    out = output()
    out.text("kept of all " * 40)
    assert out.stdout.getvalue().splitlines() == ["kept of all " * 40]


def test_what_must_be_said_is_said_once() -> None:
    out = output()
    for _ in range(3):
        out.warn("SYNTHETIC mask")
        out.note("the rule needs no alphas")
    out.warn("another")
    assert out.stderr.getvalue() == "warning: SYNTHETIC mask\nwarning: another\n"
    assert out.stdout.getvalue() == "note: the rule needs no alphas\n"


def test_steps_in_a_pipe_are_lines_with_pauses() -> None:
    now = [0.0]
    out = output()
    with out.progress("scripts"):
        assert out.stderr.getvalue() == "scripts ...\n"
    out.stderr.truncate(out.stderr.seek(0))
    with steps(out, "plan", clock=lambda: now[0]) as step:
        assert out.stderr.getvalue() == "plan ...\n"  # before any work
        step("first")
        now[0] = PAUSE_S - 0.1
        step("too early")
        now[0] = PAUSE_S
        step("second")
    assert out.stderr.getvalue() == "plan ...\nplan: first\nplan: second\n"
    with progress_bar(out, "alpha", clock=lambda: now[0]) as bar:
        bar(1, 9, "conv1")
        bar(2, 9, "conv2")
        now[0] += PAUSE_S
        bar(3, 9, "conv3")
    assert out.stderr.getvalue().endswith("alpha: 1 of 9, conv1\nalpha: 3 of 9, conv3\n")
    assert out.stdout.getvalue() == ""


def test_a_command_speaks_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    out = output()
    monkeypatch.setattr("opentrans.cli.progress.sys", SimpleNamespace(modules={}))
    begin(out, "opentrans inspect")
    begin(out, "opentrans inspect")
    assert out.stderr.getvalue() == "opentrans inspect: loading PyTorch\n"
    monkeypatch.setattr("opentrans.cli.progress.sys", SimpleNamespace(modules={"torch": 1}))
    silent = output()
    begin(silent, "opentrans inspect")
    assert silent.stderr.getvalue() == ""


def test_every_command_speaks_first() -> None:
    code = (
        "import sys, importlib; from opentrans import cli\n"
        "def stub(options, out):\n"
        "    assert 'torch' not in sys.modules; sys.stderr.write('works\\n'); return 0\n"
        "for name, words in (('info', []), ('inspect', ['m']), ('plan', ['m']), ('alpha', []),\n"
        "                    ('accelerate', ['c', '--output', 'o']), ('flops', []),\n"
        "                    ('prune', ['--images', 'd']), ('freeze', ['--images', 'd'])):\n"
        "    importlib.import_module(f'opentrans.cli.{name}').run = stub\n"
        "    assert cli.main([name, *words]) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[1::2] == ["works"] * 8 and done.stdout == ""
    assert [line.split(":")[0].removeprefix("opentrans ") for line in lines[::2]] == [
        "info", "inspect", "plan", "alpha", "accelerate", "flops", "prune", "freeze",
    ]  # fmt: skip
    assert set(RESTARTING) == {"bench", "demo", "report", "trained"}
