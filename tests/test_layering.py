"""The shape of the code: imports go downwards only, files stay short, the library stays quiet."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "opentrans_kernels"

# A unit may import units of its own floor and of the floors below, and units form no cycle.
FLOORS = (
    ("errors", "settings", "native", "lazy", "finite", "timing", "activations"),
    ("masks", "clip_resnet", "hed", "synthetic", "topology", "towers"),
    ("flops", "compact", "audit", "pack", "dispatch", "ops"),
    ("plan", "nn", "engines", "linears", "pools", "stage", "watch", "freshness")
    + ("spectrum", "gpu"),
    ("accelerate", "checkpoint", "half", "heads", "tokens"),
    ("bench",),
    ("report",),
    ("opentrans",),
    ("cli",),
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
MAY_PRINT = ("opentrans/cli/", "tests/", "benchmarks/")
LONGEST = 400

LIBRARY = sorted(path for name in (PACKAGE, "opentrans") for path in (ROOT / name).rglob("*.py"))
PYTHON = LIBRARY + sorted(
    path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py")
)
SOURCES = PYTHON + sorted(
    path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".inc", ".cpp", ".cu")
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path))


def unit_of(module: str) -> str | None:
    """The unit a dotted module name belongs to: 'masks' for 'opentrans_kernels.masks.readers'.

    All of ``opentrans`` is one, but for its command line, which nothing imports.
    """
    first, _, rest = module.partition(".")
    if first == PACKAGE:
        return rest.partition(".")[0] or None
    if first == "opentrans" and rest.partition(".")[0] in ("cli", "__main__"):
        return "cli"
    return first if first in ("opentrans", "tests", "benchmarks") else None


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Absolute dotted names of all imports, also those inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, base]).rstrip(".")
            # "from .. import native" names a module only in its second half.
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> tuple[str, bool]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package else parts), is_package


@cache
def edges() -> set[tuple[str, str, str]]:
    """(file, importing unit, imported unit) over the library, without the lazy package root."""
    found = set()
    for path in LIBRARY:
        module, is_package = module_of(path)
        importer = unit_of(module)
        if importer is None:
            continue
        for target in imported_modules(parse(path), module, is_package):
            imported = unit_of(target)
            if imported not in (None, importer, "__version__"):
                found.add((name_of(path), importer, imported))
    return found


def problems_of(found: set[tuple[str, str, str]]) -> list[str]:
    problems = []
    for file, importer, imported in sorted(found):
        for unit in (importer, imported):
            if unit not in FLOOR_OF:
                problems.append(f"{file}: {unit!r} is on no floor; add it to FLOORS")
        if FLOOR_OF.get(imported, 0) > FLOOR_OF.get(importer, 99):
            problems.append(f"{file}: {importer} imports {imported}, a floor above it")
    return problems


def cycle_of(found: set[tuple[str, str, str]]) -> list[str] | None:
    graph: dict[str, set[str]] = {}
    for _, importer, imported in found:
        graph.setdefault(importer, set()).add(imported)

    def walk(unit: str, trail: list[str]) -> list[str] | None:
        if unit in trail:
            return [*trail[trail.index(unit) :], unit]
        if unit in finished:
            return None
        for nxt in sorted(graph.get(unit, ())):
            if cycle := walk(nxt, [*trail, unit]):
                return cycle
        finished.add(unit)
        return None

    finished: set[str] = set()
    return next((cycle for unit in sorted(graph) if (cycle := walk(unit, []))), None)


def test_imports_go_downwards_only() -> None:
    found = edges()
    assert len(found) > 10, "the walk found almost no imports, so it proves nothing"
    assert problems_of(found) == []


def test_units_form_no_cycle() -> None:
    assert cycle_of(edges()) is None


def text_of(node: ast.AST, known: dict[str, str]) -> str | None:
    """The string that a constant, a name in ``known`` or an f-string of these gives."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, known)
    if isinstance(node, ast.JoinedStr):
        parts = [text_of(part, known) for part in node.values]
        return None if None in parts else "".join(part for part in parts if part)
    return None


def called(node: ast.AST) -> str:
    """The last name of what a call calls; empty if it is no call, or of no name."""
    function = getattr(node, "func", None)
    return getattr(function, "attr", None) or getattr(function, "id", "")


def modules_by_name(tree: ast.Module, module: str, is_package: bool) -> set[str]:
    """Absolute names given to ``importlib.import_module`` as text that stands in the file."""
    package = module if is_package else module.rpartition(".")[0]
    known = {"__name__": module, "__package__": package}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if (text := text_of(node.value, known)) is not None:
                known[node.targets[0].id] = text
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) == "import_module":
            if name := text_of(node.args[0], known):
                found.add(importlib.util.resolve_name(name, package))
    return found


def module_arrows(files: dict[str, tuple[ast.Module, bool]]) -> dict[str, set[str]]:
    """Module -> modules of ``files`` (name -> tree, is a package) that it imports, anywhere.

    Imports inside functions, below ``TYPE_CHECKING`` and by ``import_module`` with a text count.
    A package whose names are lazy (``lazy_exports``) loads nothing when imported: what it shows to
    type checkers is no arrow. Nor are names in tables that are resolved per call (``dispatch``),
    nor the package that Python runs first on the way to a module in it.
    """
    arrows = {}
    for module, (tree, is_package) in files.items():
        names = imported_modules(tree, module, is_package)
        targets = {name if name in files else name.rpartition(".")[0] for name in names}
        targets |= modules_by_name(tree, module, is_package)
        if any(called(node) == "lazy_exports" for node in ast.walk(tree)):
            targets = {name for name in targets if not name.startswith(f"{module}.")}
            targets |= {f"{module}.lazy"} & set(files)
        arrows[module] = (targets & set(files)) - {module}
    return arrows


def library_arrows() -> dict[str, set[str]]:
    named = ((module_of(path), path) for path in LIBRARY)
    return module_arrows({name: (parse(path), package) for (name, package), path in named})


def test_modules_form_no_circle() -> None:
    arrows = library_arrows()
    assert "opentrans_kernels.spectrum.options" in arrows["opentrans_kernels.spectrum.estimate"]
    assert "opentrans.d2.backbone" in arrows["opentrans.d2.register"], "imported by its name"
    assert sum(map(len, arrows.values())) > 500, "the walk found almost no imports"
    assert cycle_of({("", one, other) for one, found in arrows.items() for other in found}) is None


@pytest.mark.parametrize(
    "back",
    [
        "from .a import x",
        "from . import a",
        "import p.a",
        "def f():\n    from p.a import x",
        "if TYPE_CHECKING:\n    from .a import X",
        'import importlib\nimportlib.import_module(".a", __package__)',
        'ROOT = "p"\ndef f():\n    import_module(f"{ROOT}.a")',
    ],
)
def test_the_walk_over_modules_catches_a_circle(back: str) -> None:
    files = {
        "p": (ast.parse("from .a import x"), True),
        "p.a": (ast.parse("from .b import y\nimport torch"), False),
        "p.b": (ast.parse("import math"), False),
    }
    arrows = module_arrows(files)
    assert arrows == {"p": {"p.a"}, "p.a": {"p.b"}, "p.b": set()}
    files["p.b"] = (ast.parse(back), False)
    arrows = module_arrows(files)
    found = cycle_of({("", one, other) for one, targets in arrows.items() for other in targets})
    assert found == ["p.a", "p.b", "p.a"]


def test_the_kernels_import_nothing_from_the_training_layer() -> None:
    arrows = [
        (name_of(path), target)
        for path in LIBRARY
        if path.is_relative_to(ROOT / PACKAGE)
        for target in imported_modules(parse(path), *module_of(path))
        if target.partition(".")[0] == "opentrans"
    ]
    assert arrows == []


def native_arrows(files: dict[str, str]) -> set[tuple[str, str]]:
    """(folder, folder it includes from) between the folders of ``csrc/cpu``."""
    return {
        (name.partition("/")[0], (Path(name).parent / included).parts[-2])
        for name, text in files.items()
        for included in re.findall(r'#include "(\.\./[a-z].*)"', text)
    }


def test_native_folders_share_only_what_supports_them() -> None:
    folder = ROOT / "csrc" / "cpu"
    files = {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*.*")
    }
    assert not [name for name in files if "/" not in name], "native code stands in a folder"
    assert not any(re.search(r'#include ".*(cuda|torch)/', text) for text in files.values())
    arrows = native_arrows(files)
    assert ("conv", "support") in arrows, "the walk found nothing, so it proves nothing"
    assert {target for _, target in arrows} == {"support"}
    assert native_arrows({"spectrum/a.cpp": '#include "../conv/run.h"'}) == {("spectrum", "conv")}


def test_every_unit_is_on_a_floor() -> None:
    children = {
        path.stem if path.suffix == ".py" else path.name
        for path in (ROOT / PACKAGE).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert children - {"__init__", "__main__"} <= set(FLOOR_OF)


def test_the_checks_themselves_catch_a_violation() -> None:
    tree = ast.parse("def f():\n    from ..accelerate import accelerate\n    from .. import nn\n")
    names = imported_modules(tree, "opentrans_kernels.masks.readers", False)
    assert names == {"opentrans_kernels.accelerate.accelerate", "opentrans_kernels.nn"}
    upward = {("masks/readers.py", "masks", unit_of(name) or "") for name in names}
    assert len(problems_of(upward)) == 2
    assert cycle_of({("a", "pack", "ops"), ("b", "ops", "pack")}) == ["ops", "pack", "ops"]
    package = imported_modules(ast.parse("from .names import x"), "opentrans_kernels.masks", True)
    assert package == {"opentrans_kernels.masks.names.x"}
    bad = "print(1)\ntorch.load(p)\nassert x\nraise NotImplementedError\n"
    bad += "try:\n    f()\nexcept Exception:\n    pass\n"
    assert len(list(forbidden(ast.parse(bad), may_print=False))) == 5
    good = "torch.load(p, weights_only=True)\nassert x is not None\nself.console.print(1)\n"
    assert list(forbidden(ast.parse(good), may_print=False)) == []


def test_files_are_short() -> None:
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert len(lines) > 500, "the walk found almost no files, so it proves nothing"
    long = {name: count for name, count in lines.items() if count > LONGEST}
    assert not long, f"split them at {LONGEST} lines: {long}"


def forbidden(tree: ast.AST, may_print: bool):
    """Yield (line, what) for constructs that library code must not contain."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "print" and not may_print:
                yield node.lineno, "print: log it, or return it"
            if called(node) == "load" and ast.unparse(node.func) == "torch.load":
                safe = any(
                    word.arg == "weights_only" and ast.unparse(word.value) == "True"
                    for word in node.keywords
                )
                if not safe:
                    yield node.lineno, "torch.load without weights_only=True runs code from files"
        elif isinstance(node, ast.Assert):
            # Narrowing a type is fine; a check of user input would vanish under python -O.
            parts = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
            if not all(
                ast.unparse(part).endswith("is not None") or ast.unparse(part).startswith("isinst")
                for part in parts
            ):
                yield node.lineno, "assert: raise an OpenTransError that says what to do"
        elif isinstance(node, ast.Raise) and node.exc is not None:
            if ast.unparse(node.exc).startswith("NotImplementedError"):
                yield node.lineno, "NotImplementedError: raise an OpenTransError that says why"
        elif isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if broad and all(isinstance(step, ast.Pass | ast.Continue) for step in node.body):
                yield node.lineno, "a silent except hides errors"


def test_no_forbidden_construct() -> None:
    found = [
        f"{name}:{line}: {what}"
        for name, path in ((name_of(path), path) for path in PYTHON)
        for line, what in forbidden(parse(path), may_print=name.startswith(MAY_PRINT))
        if not (name.startswith("tests/") and what.startswith("assert"))
    ]
    assert found == []


def test_no_open_ends_in_comments() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X:")
    found = [
        f"{name_of(path)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(word in line for word in words)
    ]
    assert found == []


def run_python(code: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_torch_nor_triton_nor_the_extension() -> None:
    run_python(
        """
        import sys
        import opentrans_kernels, opentrans
        heavy = {"torch", "triton", "numpy", "opentrans_kernels._C"} & set(sys.modules)
        assert not heavy, heavy
        """
    )


def test_using_every_public_name_touches_neither_cuda_nor_triton() -> None:
    run_python(
        """
        import sys
        import torch

        def refuse(*args, **kwargs):
            raise AssertionError("CUDA was queried while importing")

        for name in ("is_available", "device_count", "init", "current_device", "_lazy_init"):
            setattr(torch.cuda, name, refuse)
        torch._C._cuda_getDeviceCount = refuse
        before = set(sys.modules)
        import opentrans_kernels
        for name in opentrans_kernels.__all__:
            getattr(opentrans_kernels, name)
        gained = {module.partition(".")[0] for module in set(sys.modules) - before}
        assert not {"triton", "detectron2", "open_clip", "timm", "torchvision"} & gained, gained
        """
    )
