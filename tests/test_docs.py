"""What the pages name exists: links, files, commands with their options, excerpts of code."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from opentrans.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md", ROOT / "benchmarks/README.md"]
SOURCES = ("opentrans_kernels", "opentrans", "csrc", "tests", "benchmarks", "docs")
SUFFIXES = (".py", ".md", ".cpp", ".h", ".inc", ".cu", ".yaml", ".toml")
#: Folders from which a page may name a file, as "masks/readers/families.py".
BASES = ("", "opentrans_kernels", "opentrans", "csrc", "csrc/cpu", "opentrans/d2/configs", "docs")
#: Named as a place for code to come; once it is there, it is no plan.
PLANNED: set[str] = set()
WRITTEN = {"dist/", "out/", "shapes/", "config.yaml"}  # by commands


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def files() -> dict[str, str]:
    """Path -> text of every source file."""
    paths = [path for top in SOURCES for path in (ROOT / top).rglob("*")]
    paths += [path for path in ROOT.iterdir() if path.suffix != ".md"]
    known = (*SUFFIXES, "", ".sh", ".cfg")
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in paths
        if path.is_file() and path.suffix in known and "__pycache__" not in path.parts
    }


@cache
def code() -> str:
    here = Path(__file__).relative_to(ROOT).as_posix()
    return "\n".join(
        text for name, text in files().items() if not name.endswith(".md") and name != here
    )


def split(text: str) -> tuple[str, list[str]]:
    """(prose, blocks of code): fenced blocks and those indented by four spaces."""
    prose, blocks, block, fenced = [], [], [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (block or not (prose and prose[-1].strip()))):
            block.append(line)
            continue
        else:
            prose.append(line)
        if block:
            blocks.append("\n".join(block))
            block = []
    return "\n".join(prose), [*blocks, "\n".join(block)] if block else blocks


def spans(text: str) -> list[str]:
    """Inline code, also across a line's end."""
    prose, _ = split(text)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose)]


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", split(text)[0], re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(page: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        if not place.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in slugs(place.read_text(encoding="utf-8")):
            yield f"{target}: no such heading"


def looks_like_a_path(span: str) -> bool:
    if not re.fullmatch(r"[\w.*<>/-]+", span) or span.startswith(("-", "/", ".")):
        return False
    return span.endswith(SUFFIXES) or (span.endswith("/") and span != "/")


def missing_paths(text: str) -> Iterator[str]:
    for span in spans(text):
        if not looks_like_a_path(span) or span in PLANNED | WRITTEN:
            continue
        pattern = re.sub(r"<\w+>", "*", span).rstrip("/")
        if any(part.isupper() for part in Path(pattern).with_suffix("").parts):
            continue  # DIR, MACHINE: the reader's own
        found = any(any((ROOT / base).glob(pattern)) for base in BASES)
        if not found and "/" not in span:
            found = any(Path(name).match(pattern) for name in files())
        if not found:
            yield f"{span}: no such file or folder"


def command_lines(text: str) -> Iterator[str]:
    """Lines of blocks (continued ones joined) and spans that start with a known program."""
    _, blocks = split(text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *spans(text)]:
        line = re.sub(r"\s#.*$", "", line).strip()
        if re.match(r"(opentrans |python benchmarks/|make )", line):
            yield line


def parser_of(words: list[str]) -> tuple[argparse.ArgumentParser | None, list[str]]:
    """(parser of the last known command, the words behind it); None for an unknown command."""
    parser = build_parser()
    while True:
        menus = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not menus or not words or words[0].startswith("-"):
            return parser, words
        if words[0] not in menus[0].choices:
            return None, words
        parser, words = menus[0].choices[words[0]], words[1:]


def wrong_commands(text: str) -> Iterator[str]:
    targets = set(re.findall(r"^([\w-]+):", files()["Makefile"], re.M))
    for line in command_lines(text):
        program, *words = shlex.split(line, posix=True)
        flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        if program == "make":
            goals = {word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)}
            known, unknown = targets, goals - targets
        elif program == "python":
            script = files().get(words[0], "")
            shared = files()["opentrans/cli/options.py"]
            known = set(re.findall(r'"(--?[a-z][a-z-]*)"', script + shared))
            unknown = flags - known if script else {words[0]}
        else:
            parser, _ = parser_of(words)
            if parser is None:
                yield f"{line}: no such command"
                continue
            unknown = flags - {name for a in parser._actions for name in a.option_strings}
        if unknown:
            yield f"{line}: {', '.join(sorted(unknown))} is not known"


def unknown_flags(text: str) -> Iterator[str]:
    """Options that stand alone, as ``--isa avx2``: of some command, script or tool used here."""
    for span in spans(text):
        if span.startswith("--") and (flag := span.split()[0].partition("=")[0]) not in code():
            yield f"{span}: {flag} stands in no source file"


def wrong_excerpts(text: str) -> Iterator[str]:
    """Fenced blocks behind a line that is only a path, as ```python opentrans/x.py``."""
    for path, block in re.findall(r"^```\w+ (\S+)\n(.*?)^```", text, re.M | re.S):
        source = iter(files().get(path, "").splitlines())
        for line in filter(str.strip, block.splitlines()):
            if line.strip() != "..." and not any(line.strip() == real.strip() for real in source):
                yield f"{path} has no line {line.strip()!r} there"
                break


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    checks = (wrong_commands, unknown_flags, missing_paths, wrong_excerpts)
    wrong = [*broken_links(page, text), *(found for check in checks for found in check(text))]
    assert wrong == []


def test_every_name_of_the_page_on_adding_is_in_the_source() -> None:
    text = (ROOT / "docs/adding.md").read_text(encoding="utf-8")
    names = {
        name
        for span in spans(text)
        if " " not in span and not looks_like_a_path(span)
        for name in re.findall(r"[A-Za-z_][A-Za-z0-9_]{3,}", span)
    }
    assert len(names) > 40, "the walk found almost no names, so it proves nothing"
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code())] == []


def test_what_is_planned_is_not_there() -> None:
    assert not [place for place in PLANNED if (ROOT / place).exists()]
    named = {span for page in PAGES for span in spans(page.read_text(encoding="utf-8"))}
    assert PLANNED | WRITTEN <= named


def test_the_checks_themselves_catch_what_is_wrong() -> None:
    page = ROOT / "docs/adding.md"
    bad = "[a](nothing.md) [b](design.md#no-such) [c](#none) `masks/none.py` `csrc/none/`\n"
    bad += "`--no-such-flag x`\n\n    opentrans bench trunk --maks x\n    opentrans warp\n\n"
    bad += "`python benchmarks/bench_layers.py --warp` `make nothing` `python benchmarks/x.py`\n"
    bad += "```python opentrans/images.py\nno such line\n```\n"
    assert len(list(broken_links(page, bad))) == 3
    assert [one.split(":")[0] for one in missing_paths(bad)] == ["masks/none.py", "csrc/none/"]
    assert len(list(unknown_flags(bad))) == 1 and len(list(wrong_excerpts(bad))) == 1
    wrong = list(wrong_commands(bad))
    assert len(wrong) == 5 and "--maks is not known" in wrong[0] and "no such" in wrong[1]
    good = "[a](design.md#decisions) `masks/` `ops/<op>/` `csrc/cpu/conv/isa_*.cpp`\n\n"
    good += "    opentrans bench op --isa avx2 \\\n      --json x.json   # a remark --none\n"
    for found in (broken_links(page, good), missing_paths(good), wrong_commands(good)):
        assert list(found) == []
