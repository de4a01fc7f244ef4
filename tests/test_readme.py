"""Every command and example of README.md, run as printed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LONGEST = 82

#: Printed, but not run here, and why.
NOT_RUN = {
    "make demo": "installs an environment from the network; the command it ends in is tested in "
    "tests/test_cli.py",
    "make test": "would run this test within itself",
}
#: Longer than about 20 seconds of one core: `make test-all` runs them.
SLOW = ("opentrans plan", "opentrans prune", "opentrans bench")
#: Command -> a package beside torch that it takes its data from.
NEEDS = {"opentrans prune --example": "skimage"}
#: Words of the output that show the command did what its comment says.
SAYS = {
    "opentrans inspect global:0.90": "55 convolutions, 2348179 of 23474016 weights kept",
    "opentrans plan global:0.90": "sum over layers",
    "opentrans prune --example": "after 9 rounds",
    "opentrans bench trunk --mask global:0.90 --quick": "is the fastest of 2 dense variants timed",
}


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block, and of every indented one as language ""."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^|\n)\n((?: {4}.*\n)+)", rest)
    return [*fenced, *(("", block) for block in indented)]


def commands(text: str) -> list[str]:
    """Every line of every block that is not Python, without the comment behind it."""
    lines = [line for language, block in blocks(text) if not language for line in block.split("\n")]
    found = [re.split(r"\s+#", line)[0].strip() for line in lines]
    return [line for line in found if line]


COMMANDS = commands(README)
RUN = [
    pytest.param(line, id=line, marks=[pytest.mark.slow] if line.startswith(SLOW) else [])
    for line in COMMANDS
    if line not in NOT_RUN
]


def environment(folder: Path) -> dict[str, str]:
    """``opentrans``, ``python`` and this checkout first on the paths; one thread."""
    programs = folder / "bin"
    programs.mkdir()
    for name, words in (("opentrans", "-m opentrans"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OPENTRANS_")}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return kept | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=folder, env=environment(folder), timeout=3600
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("line", RUN)
def test_a_command_runs_as_printed(line: str, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    package = NEEDS.get(line)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{line} takes its data from {package}, which is not installed")
    assert SAYS[line] in run(["sh", "-c", line], tmp_path)


@pytest.mark.slow
def test_the_example_runs_as_printed(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    (code,) = [block for language, block in blocks(README) if language == "python"]
    assert sum(bool(line.strip()) for line in code.splitlines()) == 5
    shown = run([sys.executable, "-c", code], tmp_path)
    assert "trunk at 224x224:" in shown and "SYNTHETIC" in shown


def test_what_is_not_run_is_printed_and_exists() -> None:
    assert {language for language, _ in blocks(README)} == {"", "python"}
    assert set(NOT_RUN) <= set(COMMANDS) and len(RUN) >= 4
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line, reason in NOT_RUN.items():
        program, target = line.split()
        assert program == "make" and target in targets and reason


def test_blocks_of_either_form_are_found() -> None:
    text = "x\n\n    one   # why\n    two --a#b\n\ny\n\n```\nthree\n```\n\n```python\nfour\n```\n"
    assert sorted(commands(text)) == ["one", "three", "two --a#b"]
    assert ("python", "four\n") in blocks(text)


def test_the_readme_is_one_page() -> None:
    """Beside its table, which has a row for every stored network."""
    assert len([line for line in README.splitlines() if line[:1] != "|"]) <= LONGEST
