"""Building and installing: setup.py, the Makefile and what ends up in the packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

import opentrans_kernels

ROOT = Path(__file__).resolve().parents[1]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "Makefile", "requirements.txt")
FILES += ("constraints.txt",)


def run(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OPENTRANS_", "MAKE"))}
    environ.pop("CXX", None)
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    return subprocess.run(
        command,
        cwd=cwd,
        env=environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree, as after a checkout."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    (tree / "README.md").write_text("# OpenTrans\n")
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("opentrans_kernels", "opentrans", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    return tree


@pytest.fixture
def no_torch(tmp_path: Path) -> str:
    """A PYTHONPATH on which importing torch fails as where it is not installed."""
    (tmp_path / "shadow").mkdir()
    text = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    (tmp_path / "shadow" / "torch.py").write_text(text)
    return str(tmp_path / "shadow")


def build(tree: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Run build_py (which compiles nothing) and return it with the record it wrote."""
    done = run([sys.executable, "setup.py", "-q", "build_py", "-d", "out"], tree, **variables)
    record = tree / "out" / "opentrans_kernels" / "_build.json"
    return done, json.loads(record.read_text()) if record.exists() else {}


def test_without_a_compiler_the_package_is_pure_python_and_says_so(tree: Path) -> None:
    done, record = build(tree, CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout
    assert "opentrans: _C OFF (no C++ compiler (no-such-compiler) was found" in done.stdout
    assert record["built"] == [] and "apt install g++" in record["not_built"]["_C"]
    assert record["not_built"]["_C_cuda"] == "this version has no CUDA kernels"
    assert record["version"] == opentrans_kernels.__version__
    assert str(tree) not in json.dumps(record)
    shipped = Path("opentrans", "trained", "data")
    names = {path.name for path in (ROOT / shipped).iterdir()}
    assert "NOTICE.txt" in names and names == {p.name for p in (tree / "out" / shipped).iterdir()}


def test_a_compiler_that_fails_is_named(tree: Path) -> None:
    _, record = build(tree, CXX="false")
    assert "fails on C++20" in record["not_built"]["_C"]


def test_a_stale_extension_does_not_survive_switching_it_off(tree: Path) -> None:
    stale = tree / "out" / "opentrans_kernels" / "_C.abi3.so"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    _, record = build(tree, OPENTRANS_CPU="0")
    assert not stale.exists()
    assert record["not_built"]["_C"] == "OPENTRANS_CPU=0 when it was built"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OPENTRANS_CPU": "1", "CXX": "nowhere++"}, "OPENTRANS_CPU=1 but no C++ compiler"),
        ({"OPENTRANS_CPU": "0", "OPENTRANS_CUDA": "1"}, "OPENTRANS_CUDA=1 but this version has no"),
        ({"OPENTRANS_CPU": "yes"}, "Use auto, 0 or 1, or unset OPENTRANS_CPU."),
        ({"OPENTRANS_CPU": "0", "OPENTRANS_CUDA": "on"}, "or unset OPENTRANS_CUDA."),
    ],
)
def test_an_impossible_wish_stops_the_build(tree: Path, variables: dict, message: str) -> None:
    done, record = build(tree, **variables)
    assert done.returncode == 1 and message in done.stdout
    assert record == {}


def test_missing_torch_stops_the_build_with_the_lines_to_type(tree: Path, no_torch: str) -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler, so the build does not ask for torch")
    done, _ = build(tree, PYTHONPATH=no_torch)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert "pip install 'torch>=2.11'" in done.stdout
    assert "pip install --no-build-isolation ." in done.stdout
    done, record = build(tree, PYTHONPATH=no_torch, OPENTRANS_CPU="0")
    assert done.returncode == 0 and record["torch"] is None, "pure Python needs no torch to build"


def test_the_sdist_has_every_source_and_needs_no_torch(tree: Path, no_torch: str) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", "out"]
    done = run(command, tree, PYTHONPATH=no_torch)
    assert done.returncode == 0, done.stdout
    (archive,) = (tree / "out").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {p.relative_to(tree).as_posix() for p in (tree / "csrc").rglob("*") if p.is_file()}
    assert len(wanted) > 5
    assert wanted | set(FILES) | {"opentrans_kernels/py.typed"} <= names


@pytest.mark.slow
def test_the_wheel_is_one_abi3_wheel_with_the_extension(tree: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps"]
    done = run([*command, "-w", "dist"], tree, OPENTRANS_CPU="1")
    assert done.returncode == 0, done.stdout
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.startswith(f"opentrans_kernels-{opentrans_kernels.__version__}-cp311-abi3-")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        record = json.loads(packed.read("opentrans_kernels/_build.json"))
        (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
        assert b"opentrans = opentrans.cli:main" in packed.read(scripts)
        library = packed.read("opentrans_kernels/_C.abi3.so")
    assert record["built"] == ["_C"] and record["torch_target"] == "2.11"
    assert {"opentrans_kernels/py.typed", "opentrans/__init__.py", "opentrans/py.typed"} <= {*names}
    data = {path.name for path in (ROOT / "opentrans" / "trained" / "data").iterdir()}
    assert "NOTICE.txt" in data
    assert {f"opentrans/trained/data/{name}" for name in data} <= {*names}
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
    assert str(tree).encode() not in library, "a build path would show in error messages"
    assert not list((tree / "opentrans_kernels").glob("_*.so")), "a wheel leaves the sources alone"


def test_the_version_is_stated_once() -> None:
    try:
        installed = importlib.metadata.version("opentrans-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("opentrans-kernels is not installed here, only on the path")
    assert installed == opentrans_kernels.__version__


def test_public_names_resolve_and_are_listed() -> None:
    for name in opentrans_kernels.__all__:
        value = getattr(opentrans_kernels, name)
        assert not isinstance(value, types.ModuleType), f"{name} is a module"
    assert set(opentrans_kernels.__all__) <= set(dir(opentrans_kernels))
    with pytest.raises(AttributeError, match="has no attribute 'acelerate'"):
        _ = opentrans_kernels.acelerate


def test_accelerate_stays_the_function_when_its_module_is_imported_first() -> None:
    code = (
        "from opentrans_kernels.accelerate import accelerate\n"
        "import opentrans_kernels.accelerate\n"
        "assert opentrans_kernels.accelerate is accelerate\n"
    )
    done = run([sys.executable, "-c", code], ROOT)
    assert done.returncode == 0, done.stdout


def test_setup_stays_readable() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 150


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_installs_builds_and_runs_from_nothing(tree: Path, target: str) -> None:
    done = run(["make", "-n", target], tree)
    assert done.returncode == 0, done.stdout
    steps = ("-m venv .venv", "-r requirements.txt -c constraints.txt", "--no-deps -e .")
    steps += ({"demo": "opentrans demo", "test": '-m "not slow" tests'}[target],)
    at = [done.stdout.find(step) for step in steps]
    assert -1 not in at and at == sorted(at), done.stdout


def test_make_builds_again_only_after_a_source_changed(tree: Path) -> None:
    stamps = [tree / ".venv" / name for name in (".deps", ".built")]
    stamps[0].parent.mkdir()
    for stamp in stamps:
        stamp.touch()
    assert "pip install" not in run(["make", "-n", "demo"], tree).stdout
    source = next((tree / "csrc").rglob("*.h"))
    later = stamps[1].stat().st_mtime + 5
    os.utime(source, (later, later))
    output = run(["make", "-n", "demo"], tree).stdout
    assert "-e ." in output and "requirements.txt" not in output


def test_make_names_what_a_bare_machine_lacks(tree: Path) -> None:
    python = tree / "python-without-venv"
    python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexit 0\n')
    python.chmod(0o755)
    done = run(["make", "test", f"PYTHON={python}"], tree)
    assert done.returncode and "apt install python3-venv" in done.stdout
    assert not (tree / ".venv").exists()
    done = run(["make", "test", "PYTHON=false"], tree)
    assert done.returncode and "older than 3.11" in done.stdout


@pytest.mark.parametrize("status", [0, 2])
def test_ci_runs_make_test_and_passes_its_exit_code_on(tmp_path: Path, status: int) -> None:
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "called with $* in $PWD"\nexit {status}\n')
    make.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = run([str(ROOT / ".ci" / "run")], tmp_path, PATH=path)
    assert done.returncode == status
    assert f"called with test in {ROOT}" in done.stdout


def test_outputs_are_ignored_by_git(tmp_path: Path) -> None:
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    run(["git", "init", "-q"], tmp_path)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    outputs = [".venv/x", "build/x", "dist/x", "demo-report/x", "opentrans_kernels.egg-info/x"]
    outputs += ["opentrans_kernels/_C.abi3.so", "opentrans_kernels/_build.json"]
    outputs += ["tests/__pycache__/x", ".pytest_cache/x", ".ruff_cache/x", ".hypothesis/x"]
    sources = ["opentrans_kernels/report/page.py", "csrc/otk.h", ".ci/run", "tests/test_native.py"]
    done = run(["git", "check-ignore", *outputs, *sources], tmp_path)
    assert sorted(done.stdout.split()) == sorted(outputs)


def test_every_requirement_of_the_extras_is_installed_by_make() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = (ROOT / "requirements.txt").read_text().splitlines()

    def names(lines: list[str]) -> set[str]:
        return {line.partition(">")[0].partition("=")[0] for line in lines if line[:1] != "#"}

    extras = dict(project["optional-dependencies"])
    assert extras.pop("ray") == ["ray[data]"], "for clusters: not what every checkout installs"
    needed = [*project["dependencies"], *sum(extras.values(), [])]
    assert names(needed) <= names(listed)
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert all("==" in pin for pin in pins)
    module, _, function = project["scripts"]["opentrans"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
