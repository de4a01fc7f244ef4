"""Python code in a process of its own, where torch is imported already and nothing of this project.

Importing torch takes seconds. A server imports it once and forks before every piece of code, which
then runs as with ``python -c``: its own environment, folder, output and exit code. What is read
while Python starts or torch is imported (``OMP_NUM_THREADS``, hash seeds) is the server's, so tests
of that start Python themselves. Run as a script this file is the server.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]


def run(
    code: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with ``sys.argv[1:]`` = arguments in ``folder``, which is first on its path.

    Args:
        environment: None: that of this process. ``PYTHONPATH`` counts as ever.

    Raises:
        subprocess.TimeoutExpired: it was ended after ``timeout`` seconds.
    """
    (done,) = run_together(code, [arguments], environment, folder, timeout)
    return done


def run_together(
    code: str,
    arguments: Sequence[Sequence[object]],
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    timeout: float = 600,
) -> list[subprocess.CompletedProcess[str]]:
    """:func:`run` at the same time in as many processes as there are ``arguments``."""
    commands = [["-c", *map(str, words)] for words in arguments]
    with tempfile.TemporaryDirectory() as place:
        files = [[os.path.join(place, f"{name}{n}") for name in ("out", "err")]
                 for n in range(len(commands))]  # fmt: skip
        shared = (textwrap.dedent(code), dict(environment or os.environ), folder)
        statuses = _ask((*shared, list(zip(commands, files, strict=True))), timeout)
        texts = [[Path(file).read_text("utf-8", "replace") for file in pair] for pair in files]
    return [
        subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(status), *said)
        for words, status, said in zip(commands, statuses, texts, strict=True)
    ]


@cache
def _server() -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"  # as in the tests themselves
    made = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment, start_new_session=True,
    )  # fmt: skip
    atexit.register(_end, made)
    return made


def _end(server: subprocess.Popen[bytes]) -> None:
    if server.stdin is not None and server.poll() is None:
        server.stdin.close()
        server.wait(30)


def _ask(request: Any, timeout: float) -> list[int]:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    send(server.stdin, request)
    if not select.select([server.stdout], [], [], timeout)[0]:
        os.killpg(server.pid, signal.SIGKILL)
        _server.cache_clear()
        raise subprocess.TimeoutExpired(request[3][0][0], timeout)
    statuses = receive(server.stdout)
    if statuses is None:
        _server.cache_clear()
        raise RuntimeError(f"the server of {__file__} ended with {server.wait(30)}")
    return statuses


def send(stream: IO[bytes], value: Any) -> None:
    """One pickled value down a pipe."""
    data = pickle.dumps(value)
    stream.write(struct.pack("<q", len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """The next one; None at the end."""
    header = stream.read(8)
    return pickle.loads(stream.read(struct.unpack("<q", header)[0])) if len(header) == 8 else None


def _serve() -> str:
    """Answers requests with wait statuses; returns the code to run, in the process to run it."""
    import torch  # noqa: F401

    own, back = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    packages = sys.path[1:]  # without the folder of this file
    gc.freeze()  # a collection in a child would copy what it only looks at
    while (request := receive(own)) is not None:
        code, environment, folder, processes = request
        children: list[int] = []
        while len(children) < len(processes) and 0 not in children:
            children.append(os.fork())
        if 0 not in children:
            send(back, [os.waitpid(child, 0)[1] for child in children])
            continue
        words, files = processes[len(children) - 1]
        back.close()
        for handle, name in enumerate((os.devnull, *files)):
            opened = os.open(name, os.O_RDWR | os.O_CREAT)
            os.dup2(opened, handle)
            os.close(opened)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = words
        added = environment.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:] = ["", *filter(None, added), *packages]
        return code
    os._exit(0)


def _status(code: str) -> int:
    """Runs it as the main module; what Python's exit code would be."""
    try:
        exec(compile(code, "<string>", "exec"), globals())
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    ended = _status(_serve())
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Destructors of libraries run; taking torch's modules apart one by one costs a second.
    ctypes.CDLL(None).exit(ended)
