"""The ``opentrans`` command.

Exit codes: 0 success; 1 a check failed (inexact result, a limit given on the command line missed);
2 bad input or environment, explained on stderr; 3 an unexpected error, that is, a bug. Tracebacks
appear with ``OPENTRANS_LOG=debug`` only. Parsing imports no torch, so ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from opentrans_kernels import __version__
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import require_packages

from .progress import begin
from .render import Output

OK, FAILED_CHECK, BAD_INPUT, UNEXPECTED, INTERRUPTED = 0, 1, 2, 3, 130

#: Commands in the order of first use; each is a module of this package.
COMMANDS = (
    "info", "inspect", "plan", "accelerate", "alpha", "prune", "freeze", "flops", "segment",
    "trained", "bench", "report", "demo",
)  # fmt: skip

#: These may start over in a process of their own, and speak when they have; the last two need no
#: torch.
RESTARTING = ("bench", "demo", "report", "trained")

_EPILOG = """\
MASK is a mask file or a recipe: global:0.90 prunes 90 % of all weights by magnitude, uniform:0.90
90 % of every layer. Recipes without --checkpoint work on synthetic weights and say so.

exit codes: 0 success, 1 a check failed, 2 bad input (reason on stderr), 3 a bug
            (OPENTRANS_LOG=debug shows the traceback)
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``opentrans`` with all commands."""
    parser = argparse.ArgumentParser(
        prog="opentrans",
        description="Pruning masks in, exact and measurably faster CLIP ResNets out.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"opentrans {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see the module's docstring)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = build_parser().parse_args(arguments)
    except SystemExit as stop:  # argparse: --help is 0, a wrong option 2
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    options.arguments = arguments
    try:
        _start_logging()
        needs = getattr(options, "packages", None)
        if needs is not None:  # before anything slow, the import of torch included
            require_packages(needs(options))
        out = Output(getattr(options, "json", None))
        if options.command not in RESTARTING:
            begin(out, f"opentrans {options.command}")
        return options.run(options, out)
    except OpenTransError as error:
        return _explain(f"opentrans {options.command}: {error}", BAD_INPUT)
    except KeyboardInterrupt:
        return _explain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe (head, less) closed it; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        return _explain(
            f"opentrans {options.command}: unexpected {type(error).__name__}: {error}. This is a "
            "bug; OPENTRANS_LOG=debug shows where.",
            UNEXPECTED,
        )


def _start_logging() -> None:
    from opentrans_kernels import settings

    settings.get()  # checks the environment, and attaches the handler OPENTRANS_LOG asks for


def _explain(message: str, code: int) -> int:
    if os.environ.get("OPENTRANS_LOG", "").strip().lower() == "debug":
        traceback.print_exc()
    sys.stderr.write(f"{message}\n")
    return code
