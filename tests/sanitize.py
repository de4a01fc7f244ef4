"""The native code under address and undefined-behaviour sanitizers: ``make sanitize``.

Builds the kernels alone and the whole extension into ``build/sanitize`` with g++, then runs tests
and the fuzz of the ops on them, once per instruction set of this CPU. Buffers that tests hand in
end where their sizes say, and scratch memory has gaps (``csrc/cpu/support/scratch.cpp``), so one
float too far is an error. Less than 6 minutes on two idle cores. Exit code 1: something failed; 2:
there is no g++.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from sysconfig import get_path

from native_build import ROOT, call_sources, compile_all, compiler, kernel_sources
from test_isa import supported
from torch.utils.cpp_extension import include_paths, library_paths

FOLDER = ROOT / "build" / "sanitize"
# -O1: loops as they are, and a build of a minute. A wrong shift or overflow ends the process.
FLAGS = "-O1 -g1 -std=c++20 -fPIC -fno-omit-frame-pointer -fsanitize=address,undefined "
FLAGS += "-fno-sanitize-recover=all -DTORCH_TARGET_VERSION=0x020b000000000000"
CASES = 400  # of the fuzz, per instruction set
#: Once per instruction set, and once in all.
EVERY = ("test_csrc", "test_csrc_ops", "test_csrc_planes", "test_csrc_sizes")
ONCE = (
    "test_ops_errors",
    "test_native_bounds",
    "test_powerlaw_fit",
    "test_gram_eigenvalues",
    "test_ms_deform_attn",
    "test_mask_scores",
)
SWEEP = """
import torch
import deform_cases
from kernel_cases import guarded_inputs, sweep
import opentrans_kernels._C as loaded
assert "sanitize" in loaded.__file__, loaded.__file__
torch.manual_seed(0)
print(sweep(), guarded_inputs(), deform_cases.sweep(), "cases")
torch.set_num_threads(3)
print(sweep(), deform_cases.sweep(), "cases on three threads")
"""


def build(command: list[str]) -> dict[str, str]:
    """Compile what is out of date, and link; returns the environment in which it runs."""
    started = time.monotonic()
    package = FOLDER / "opentrans_kernels"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in include_paths())]
    flags = [*command, *FLAGS.split(), *includes, f"-isystem{get_path('include')}"]
    torch_sources = sorted((ROOT / "csrc" / "torch").glob("*.cpp"))
    kernel, calls = kernel_sources(), call_sources()
    sources = [*kernel, *torch_sources, *calls]
    objects, _ = compile_all(flags, sources, FOLDER, jobs=os.cpu_count() or 1)
    extension, program = objects[: -len(calls)], objects[: len(kernel)] + objects[-len(calls) :]
    link = [*command, "-fsanitize=address,undefined", "-pthread"]
    subprocess.run([*link, *program, "-o", FOLDER / "kernels"], check=True)
    torch_libraries = [f"-L{path}" for path in library_paths()] + [
        "-lc10",
        "-ltorch",
        "-ltorch_cpu",
    ]
    shared = ["-o", package / "_C.abi3.so", *torch_libraries]
    subprocess.run([*link, "-shared", *extension, *shared], check=True)
    # The package as it is, but for the extension beside it.
    for path in (ROOT / "opentrans_kernels").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    print(f"built in {time.monotonic() - started:.0f} s", flush=True)

    def library(name: str) -> str:
        done = subprocess.run(
            [*command, f"-print-file-name={name}"], capture_output=True, text=True
        )
        return os.path.realpath(done.stdout.strip())

    # libstdc++ too: the sanitizer looks for the real __cxa_throw when it starts.
    return os.environ | {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
        "OTK_TEST_PROGRAM": str(FOLDER / "kernels"),
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(ROOT), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
    }


def main() -> int:
    command = compiler()
    if command is None or "clang" in command[0]:
        print("make sanitize needs g++ with its sanitizers; on Debian: apt install g++")
        return 2
    environ = build(command)
    python, failed = sys.executable, []
    jobs: list[tuple[str, str, list[str]]] = []
    levels = [name for name, there in supported().items() if there]
    tests = ROOT / "tests"
    pytest = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not fuzz and not compile",
    ]
    for level in levels:
        fuzz = [python, str(tests / "fuzz_ops.py"), "--isa", level, "--cases", str(CASES)]
        jobs += [
            (level, "kernels alone", [*pytest, *(f"{tests / name}.py" for name in EVERY)]),
            (level, "sweep", [python, "-c", SWEEP]),
            (level, "fuzz", fuzz),
        ]
    once = [*pytest, *(f"{tests / name}.py" for name in ONCE)]
    jobs.append((levels[0], "errors, spectra and attention", once))
    for level, what, job in jobs:
        started = time.monotonic()
        # Not from the root: the package there is not the sanitized one.
        code = subprocess.run(
            job, cwd=FOLDER, env=environ | {"OPENTRANS_CPU_CAPABILITY": level}
        ).returncode
        verdict = "passed" if code == 0 else f"FAILED with exit code {code}"
        print(f"== {level}, {what}: {verdict}, {time.monotonic() - started:.0f} s", flush=True)
        failed += [f"{level}, {what}"] * (code != 0)
    print(f"sanitize failed: {'; '.join(failed)}" if failed else "sanitize passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
