"""Build of the optional compiled extension; the rest of the package is described in pyproject.toml.

OPENTRANS_CPU and OPENTRANS_CUDA (auto, 0 or 1) switch the extensions: built where possible, never,
or an error where impossible. What was built, and why the rest was not, is recorded in
``opentrans_kernels/_build.json``, which ``opentrans info`` prints.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# The contraction rule is explicit because compilers differ in their default. The target version
# selects the stable ABI of torch 2.11: one binary for it and every later torch.
CXX_FLAGS = "-O3 -g0 -std=c++20 -fvisibility=hidden -ffp-contract=fast".split()
CXX_FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
MISSING_TORCH = """\
OpenTrans compiles against the torch that is installed, and this environment has none. Type:
    pip install 'torch>=2.11' numpy 'setuptools>=77,<82' wheel ninja
    pip install --no-build-isolation .
Where torch is installed already, only --no-build-isolation is missing.
OPENTRANS_CPU=0 installs without compiled kernels."""


def switch(name: str) -> str:
    value = os.environ.get(name, "").strip() or "auto"
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name}={value} is not a known value. Use auto, 0 or 1, or unset {name}.")
    return value


def find_compiler() -> tuple[str | None, str | None]:
    """Return (the compiler's version line, why it cannot be used or None)."""
    named = os.environ.get("CXX", "").strip()
    tried = [named] if named else ["c++", "g++", "clang++"]
    found = next((c for c in tried if shutil.which(shlex.split(c)[0])), None)
    if found is None:
        return None, f"no C++ compiler ({', '.join(tried)}) was found; on Debian: apt install g++"
    os.environ["CXX"] = found  # torch would take c++ even where only g++ exists
    command, include = shlex.split(found), sysconfig.get_path("include")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    compiler = (version.splitlines() or [found])[0]
    if not Path(include, "Python.h").exists():
        return compiler, "Python's headers are missing; on Debian: apt install python3-dev"
    command += ["-std=c++20", f"-I{include}", "-x", "c++", "-fsyntax-only", "-"]
    source = "#include <Python.h>\n#include <span>\n"
    probe = subprocess.run(command, input=source, capture_output=True, text=True)
    errors = [line for line in probe.stderr.splitlines() if "error" in line] or ["no message"]
    return compiler, f"{compiler} fails on C++20: {errors[0]}" if probe.returncode else None


def cpu_extension(record: dict) -> tuple[Extension | None, str | None]:
    """Return (the extension ``_C`` or None, why not)."""
    sources = sorted(str(p) for d in ("torch", "cpu") for p in Path("csrc", d).rglob("*.cpp"))
    if not any(Path(source).name == "module.cpp" for source in sources):
        return None, "the source tree has no csrc/torch/module.cpp"
    record["compiler"], why = find_compiler()
    if why:
        return None, why
    try:
        import torch
    except ModuleNotFoundError:
        sys.exit(MISSING_TORCH)
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        sys.exit(f"torch {torch.__version__} is too old. Type: pip install 'torch>=2.11'")
    from torch.utils.cpp_extension import CppExtension

    record |= {"torch": str(torch.__version__), "flags": CXX_FLAGS}
    headers = sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".inc"))
    return CppExtension(
        "opentrans_kernels._C",
        sources,
        include_dirs=[str(Path("csrc").resolve())],
        depends=[*headers, "setup.py"],
        py_limited_api=True,
        # The build's own folder stays out of error messages and out of the record.
        extra_compile_args={"cxx": [*CXX_FLAGS, f"-fmacro-prefix-map={Path.cwd()}/="]},
    ), None


def cuda_extension(record: dict) -> tuple[Extension | None, str | None]:
    """Return (the extension ``_C_cuda`` or None, why not)."""
    return None, "this version has no CUDA kernels"


EXTENSIONS: list[Extension] = []
RECORD: dict = {"torch": None, "torch_target": "2.11", "python": platform.python_version()}
RECORD |= {"platform": sysconfig.get_platform(), "compiler": None, "flags": [], "not_built": {}}


def choose() -> None:
    """Fill EXTENSIONS and RECORD; a switch set to 1 turns the reason against it into an error."""
    rows = (("_C", "OPENTRANS_CPU", cpu_extension), ("_C_cuda", "OPENTRANS_CUDA", cuda_extension))
    for name, variable, make in rows:
        off = switch(variable) == "0"
        extension, why = (None, f"{variable}=0 when it was built") if off else make(RECORD)
        if extension is not None:
            EXTENSIONS.append(extension)
        elif switch(variable) == "1":
            sys.exit(f"{variable}=1 but {why}")
        else:
            RECORD["not_built"][name] = why


def write_record(command: build_py | build_ext, in_source: bool, built: list[str]) -> None:
    folder = Path("" if in_source else command.build_lib, "opentrans_kernels")
    for name in RECORD["not_built"]:  # a stale one would still be found and loaded
        for stale in folder.glob(f"{name}.*so"):
            stale.unlink()
    record = {"version": command.distribution.get_version(), **RECORD, "built": built}
    (folder / "_build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    off = [f"{name} OFF ({why})" for name, why in RECORD["not_built"].items()]
    print("opentrans:", "; ".join([f"{name} ON" for name in built] + off), file=sys.stderr)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not EXTENSIONS:  # otherwise BuildExt writes it once they are compiled
            write_record(self, self.editable_mode, [])


if "sdist" not in sys.argv:  # which packs files only, so it needs neither torch nor a compiler
    choose()
COMMANDS: dict = {"build_py": BuildPy}
if EXTENSIONS:
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def run(self) -> None:
            in_source = bool(self.inplace or self.editable_mode)
            super().run()
            write_record(self, in_source, [e.name.rpartition(".")[2] for e in EXTENSIONS])

    COMMANDS["build_ext"] = BuildExt
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(2)
    os.environ.setdefault("MAX_JOBS", str(len(usable)))
limited_api = {"bdist_wheel": {"py_limited_api": "cp311"}} if EXTENSIONS else {}
setup(ext_modules=EXTENSIONS, cmdclass=COMMANDS, options=limited_api)
