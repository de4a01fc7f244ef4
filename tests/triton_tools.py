"""Triton kernels without a GPU: run in the interpreter, and compile ahead of time for a GPU.

The interpreter is chosen when triton is imported, so :class:`Interpreter` runs functions in a
process of its own, which stays up: importing torch once, not per call. Run as a script this file is
that process. The interpreter proves indexing, masks and arithmetic; not races, barriers, times.

:func:`compile_for` needs neither driver nor device. It proves that a kernel compiles for a
capability and what it uses: registers, stack (spills), shared memory, instructions.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fresh_process import receive, send

ROOT = Path(__file__).resolve().parents[1]
CAPABILITIES = (80, 90)


def why_no_triton() -> str | None:
    """Why no Triton kernel can be tried here, for a printed skip."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed: {error}"
    return None


def why_no_interpreter() -> str | None:
    """Why the interpreter cannot run kernels with runtime loop bounds here."""
    if (reason := why_no_triton()) is not None:
        return reason
    import numpy
    import triton

    def version(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text)[:2])

    if version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4):
        return (
            f"the interpreter of triton {triton.__version__} fails on runtime loop bounds with "
            f"numpy {numpy.__version__}; numpy < 2.4 works"
        )
    return None


class Interpreter:
    """A process with ``TRITON_INTERPRET=1`` that calls functions by name.

    ``with Interpreter() as run: run("package.module:function", *args, **kwargs)``. Arguments and
    results are pickled; tensors are on the CPU. An exception there is raised here as RuntimeError
    with its traceback.
    """

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            cwd=ROOT,
        )

    def __call__(self, target: str, *args: Any, **kwargs: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        send(self._process.stdin, (target, args, kwargs))
        answer = receive(self._process.stdout)
        if answer is None:
            self._errors.seek(0)
            raise RuntimeError(self._errors.read().decode(errors="replace")[-4000:])
        value, trace = answer
        if trace is not None:
            raise RuntimeError(trace)
        return value

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, *unused: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._errors.close()


def _serve() -> None:
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints must not end up between the answers
    while (request := receive(sys.stdin.buffer)) is not None:
        target, args, kwargs = request
        try:
            module, name = target.split(":")
            answer = getattr(importlib.import_module(module), name)(*args, **kwargs), None
        except Exception:
            answer = None, traceback.format_exc()
        send(channel, answer)


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel uses: per thread registers and stack bytes, per block shared bytes."""

    registers: int
    stack: int
    shared: int
    ptx: str
    cubin: bytes = b""

    def count(self, pattern: str) -> int:
        """Instructions of the PTX that match a regular expression."""
        return len(re.findall(pattern, self.ptx))

    @property
    def atomics(self) -> int:
        """Atomic instructions. Triton 3.9 writes ``red`` where the result is not used."""
        return self.count(r"\b(atom|red)\.")

    def steps(self) -> list[int]:
        """Machine instructions of each loop that holds a tensor-core instruction, in order."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            text = subprocess.run(
                [_cuobjdump(), "-sass", file.name], capture_output=True, text=True, check=True
            ).stdout
        line = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", re.M)
        code = [(int(at, 16), words) for at, words in line.findall(text)]
        found = []
        for at, words in code:
            back = re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", words)
            if back is None or int(back[1], 16) >= at:
                continue
            body = [other for place, other in code if int(back[1], 16) <= place <= at]
            if any(re.search(r"\bH(G)?MMA", other) for other in body):
                found.append(len(body))
        return found


def compile_for(
    kernel: Any,
    capability: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int = 4,
    aligned: tuple[str, ...] = (),
    **options: Any,
) -> Compiled:
    """Compile a ``triton.jit`` function for ``sm_<capability>`` and ask what it uses.

    Args:
        types: argument -> Triton type such as "*fp64", "*i32", "i32". Pointers are taken to be
            aligned to 16 bytes, as torch's are; integers are not specialised.
        aligned: integer arguments that are multiples of 16, which triton recognises by itself.
        constants: ``tl.constexpr`` argument -> value. With ``types`` it covers every argument.
        options: num_stages and other compile options.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from opentrans_kernels.ops.launch import OPTIONS

    missing = set(kernel.arg_names) ^ (set(types) | set(constants))
    assert not missing, f"{kernel.__name__}: not the arguments of the kernel: {sorted(missing)}"
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=dict(constants),
        attrs={
            (position,): [["tt.divisibility", 16]]
            for position, name in enumerate(kernel.arg_names)
            if types.get(name, "").startswith("*") or name in aligned
        },
    )
    done = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, **OPTIONS, **options},
    )
    registers, stack = _resources(done.asm["cubin"])
    ptx, cubin = str(done.asm["ptx"]), bytes(done.asm["cubin"])
    return Compiled(registers, stack, int(done.metadata.shared), ptx, cubin)


@cache
def _cuobjdump() -> str:
    import triton

    found = sorted(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    assert found, "triton ships no cuobjdump, so resources cannot be read"
    return str(found[0])


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    uses = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    assert uses, text
    return max(int(r) for r, _ in uses), max(int(s) for _, s in uses)


def pointers(names: str, dtype: str = "fp64") -> dict[str, str]:
    """Types of several pointer arguments: ``pointers("x y")`` is {"x": "*fp64", "y": "*fp64"}."""
    return dict.fromkeys(names.split(), f"*{dtype}")


Runner = Callable[..., Any]

if __name__ == "__main__":
    _serve()
