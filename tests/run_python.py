"""The wheel on another Python: ``run_python.py PYTHON WHEEL``, as ``make test-python`` calls it.

In ``build/python-VERSION``: an environment of that Python with what ``constraints.txt`` pins, the
wheel that another Python made, and a copy of the tree in which the installed packages stand in the
place of their sources. Everything public is imported there, the command line is called, and the
tests of the compiled extension run. The environment stays for the next run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from run_torch import ROOT, copy_tree

PACKAGES = ("opentrans_kernels", "opentrans")
TESTS = ("test_ops", "test_native", "test_csrc", "test_layering")
#: Of the optional dependencies; what needs them is named and not imported.
OPTIONAL = ("open_clip", "torchvision", "transformers", "scipy", "timm", "matplotlib", "detectron2")
OPTIONAL += ("yaml",)  # of detectron2

IMPORTS = """
import importlib, pkgutil, sys
names, left_out = 0, {}
for package in sys.argv[1].split(","):
    found = importlib.import_module(package)
    assert "site-packages" in found.__file__, found.__file__
    modules = [package, *(m.name for m in pkgutil.walk_packages(found.__path__, package + "."))]
    for module in modules:
        if module.endswith("__main__") or ".workers." in module:
            continue  # scripts, the latter of other environments
        try:
            loaded = importlib.import_module(module)
            for name in getattr(loaded, "__all__", ()):
                getattr(loaded, name)
                names += 1
        except Exception as error:
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            missing = str(getattr(cause, "name", "")).partition(".")[0]
            if missing not in sys.argv[2].split(","):
                raise
            left_out.setdefault(missing, []).append(module)
for missing, modules in left_out.items():
    print(f"not all of it without {missing}: {', '.join(modules)}")
from opentrans_kernels import native
assert native.load(), native.reason()
print(f"{names} public names of {len(sys.modules)} modules, compiled kernels: loaded")
"""


def version_of(python: str) -> str:
    """Its major and minor version; ends the run, with the reason, if it cannot be used."""
    code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"{python} does not start ({error}). Name another: make test-python PYTHON=...")
    version = done.stdout.strip()
    if done.returncode or tuple(map(int, version.split("."))) < (3, 11):
        said = done.stderr.strip().splitlines()[-1:] or [f"it is Python {version}"]
        sys.exit(f"{python} must be Python >= 3.11 with venv: {said[0]}")
    return version


def made_under(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as packed:
        return json.loads(packed.read("opentrans_kernels/_build.json"))["python"]


def install(to: Path, python: str, wheel: Path) -> Path:
    """The environment's folder of executables."""
    bin_ = to / ".venv" / "bin"
    if not (bin_ / "python").exists():
        subprocess.run([python, "-m", "venv", to / ".venv"], check=True)
    pip = [bin_ / "python", "-m", "pip", "install", "-q"]
    pinned = ["-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, *pinned, f"{wheel}[cli]", "pytest>=8", "hypothesis"], check=True)
    # Again without a look at versions: an older build of the same version may be installed.
    subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel], check=True)
    return bin_


def put_installed(tree: Path, bin_: Path) -> None:
    """Put the installed packages in the place of their sources, for whatever runs in ``tree``."""
    code = "import sysconfig; print(sysconfig.get_path('platlib'))"
    done = subprocess.run([bin_ / "python", "-c", code], check=True, capture_output=True, text=True)
    for name in PACKAGES:
        shutil.rmtree(tree / name)
        (tree / name).symlink_to(Path(done.stdout.strip(), name))


def main(python: str, wheel: Path) -> int:
    version = version_of(python)
    to = ROOT / "build" / f"python-{version}"
    copy_tree(to)
    bin_ = install(to, python, wheel)
    put_installed(to, bin_)
    print(f"== Python {version}: {wheel.name}, made under {made_under(wheel)}", flush=True)
    # Nothing but what is installed.
    isolated = [bin_ / "python", "-I", "-c", IMPORTS, ",".join(PACKAGES), ",".join(OPTIONAL)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    files = [f"tests/{name}.py" for name in TESTS]
    for command in (
        isolated,
        [bin_ / "opentrans", "--version"],
        [bin_ / "opentrans", "info"],
        [bin_ / "pytest", "-q", "-rs", "-m", "not slow", *files],
    ):
        if status := subprocess.run(command, cwd=to, env=environment).returncode:
            return status
    print(f"== Python {version}: passed")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Name a Python: make test-python PYTHON=python3.13")
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).resolve()))
