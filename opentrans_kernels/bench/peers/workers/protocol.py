"""The worker's side: one timed callable per process. Standard library only, Python 3.8 or later.

The parent writes one command per line to stdin and reads one JSON object per line from stdout:

* ``sample SETTLE REPEATS``: SETTLE untimed calls, then REPEATS timed ones; the answer has
  ``wall_ms`` and ``cpu_ms`` (all threads of the process) per call.
* ``output PATH``: save the output of one call as a NumPy file.
* ``quit``.
"""

from __future__ import annotations

import json
import os
import sys
import time


def take_stdout():
    """The stream for answers. Call it first: what libraries print then goes to stderr, and an
    exception that ends the process is answered with its reason."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(kind, error, trace):
        sys.__excepthook__(kind, error, trace)
        answers.write(json.dumps({"error": f"{kind.__name__}: {error}"}) + "\n")

    sys.excepthook = tell
    return answers


def serve(answers, call, describe, save):
    """Answer commands until ``quit`` or end of input.

    answers: the stream of ``take_stdout``. call: function without arguments to be timed.
    describe: dict sent first, when ready. save: function of a path that stores one output.
    """
    answers.write(json.dumps(describe) + "\n")
    for line in sys.stdin:
        words = line.split()
        if not words or words[0] == "quit":
            return
        if words[0] == "sample":
            answers.write(json.dumps(sample(call, int(words[1]), int(words[2]))) + "\n")
        elif words[0] == "output":
            save(words[1])
            answers.write(json.dumps({"saved": words[1]}) + "\n")
        else:
            answers.write(json.dumps({"error": "unknown command " + words[0]}) + "\n")


def sample(call, settle, repeats):
    """One sample: milliseconds of wall and CPU time per call."""
    for _ in range(settle):
        call()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"wall_ms": wall * 1e3 / repeats, "cpu_ms": cpu * 1e3 / repeats}
