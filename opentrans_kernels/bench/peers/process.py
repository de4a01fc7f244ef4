"""A worker process that times one callable on command (see ``workers/protocol.py``)."""

from __future__ import annotations

import json
import selectors
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import OpenTransError

#: Seconds for an answer; compiling a network is the slowest.
PATIENCE_S = 600.0


class Worker:
    """Starts the process and waits for its description of itself.

    Raises:
        OpenTransError: it ended, stayed silent for ``patience_s``, or answered something else.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.name = name
        self.patience_s = patience_s
        self._rest = b""
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(environ)
        )
        try:
            self.description = self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, command: str) -> dict[str, Any]:
        """Send one command and return the answer.

        Raises:
            OpenTransError: the process ended or failed; says so.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{command}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died since the last answer; reading says how
        return self._read()

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                continue  # a request was still buffered; its reader is gone

    def _read(self) -> dict[str, Any]:
        line = self._line()
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise OpenTransError(
                f"the {self.name} process answered {line.strip()[:80]!r}, which is not JSON: "
                "something in its environment prints on stdout. Make the environment again in a "
                "fresh directory."
            ) from error
        if "error" in answer:
            raise OpenTransError(f"the {self.name} process failed: {answer['error']}")
        return answer

    def _line(self) -> str:
        assert self.process.stdout is not None
        deadline = time.monotonic() + self.patience_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self.close()
                    raise OpenTransError(
                        f"the {self.name} process was silent for {self.patience_s:.0f} s and was "
                        "ended. Run it again on a free machine, or leave this peer out."
                    )
                chunk = self.process.stdout.read1(65536)
                if not chunk:
                    raise OpenTransError(
                        f"the {self.name} process ended with code {self.process.wait()}; its "
                        "messages are above. Make its environment again if it is incomplete."
                    )
                self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")
