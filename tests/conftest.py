"""Shared test set-up: one thread, fixed seeds, skips that print their reason, poisoned memory."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable, Iterator

import csrc_process
import hypothesis
import numpy
import pytest
import torch

from opentrans_kernels import native, settings
from opentrans_kernels.plan.clock import BUDGET_S, interleaved_ms
from opentrans_kernels.timing.rounds import measure_pair

# Fixed examples and no deadline: a failure repeats, and a busy machine is not a failure.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

# The fewest rounds: tests show what follows from a measurement, not its numbers. How many rounds
# decide, and what disturbed ones add, is shown on a clock of their own in test_timing_rounds.
interleaved_ms.__defaults__ = (BUDGET_S, (3, 3))
measure_pair.__kwdefaults__ |= {"rounds": (3, 3), "extra_s": 0.0}

#: Files that start processes and compilers or train. They come first: a worker that began one near
#: the end would run alone while the others wait. The first builds what the later csrc files use.
LONGEST = [
    "test_csrc", "test_cli", "test_gpu_run", "test_isa", "test_bench_system", "test_imp_killed",
    "test_d2_ddp", "test_segment_processes", "test_native_bounds", "test_tiny_run",
    "test_trained_study", "test_fuzz_files", "test_packaging", "test_triton_conv",
    "test_triton_chain", "test_gradskip_writes", "test_accelerate", "test_segment",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files keep their order otherwise; the Makefile tells pytest-xdist to keep it as well."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def _why_not_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    return f"no CUDA device is visible to torch {torch.__version__}"


def _why_not_d2() -> str | None:
    try:
        importlib.import_module("detectron2.modeling")
    except Exception as error:  # a mismatched torchvision raises RuntimeError, not ImportError
        if os.environ.get("OPENTRANS_REQUIRE_DETECTRON2") == "1":
            raise
        return f"detectron2 unusable: {type(error).__name__}: {error}"
    return None


_CAPABILITIES = {"gpu": _why_not_gpu, "d2": _why_not_d2}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, why_not in _CAPABILITIES.items():
        if item.get_closest_marker(marker) and (reason := why_not()):
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """One thread and fixed seeds before every test, whatever the one before it left behind."""
    torch.set_num_threads(1)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill uninitialised memory: NaN in floating point, the largest value in integer tensors.

    Covers ``torch.empty*``, ``new_empty*`` and the allocations of compiled kernels, because torch
    itself fills them; a kernel that leaves part of its output unwritten then shows NaN.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture
def extension() -> None:
    """Skip, with the reason, where the compiled extension is not loaded."""
    if not native.load():
        pytest.skip(str(native.reason()))


@pytest.fixture
def set_env(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., settings.Settings]]:
    """Set variables (None unsets) and read the settings again; undone after the test."""

    def change(**variables: str | None) -> settings.Settings:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        return settings.reload()

    yield change
    monkeypatch.undo()
    settings.reload()


# Not skipped test by test: what is missing is said once, by the test that compares both.
_EMULATED = [] if csrc_process.why_not_emulated() else ["neon", "neon generic"]


@pytest.fixture(scope="session", params=["native", *_EMULATED])
def library(request: pytest.FixtureRequest) -> Iterator[object]:
    """The kernels without torch, as they run here and, emulated, on 64-bit Arm."""
    family, _, capability = request.param.partition(" ")
    native = family == "native"
    made = csrc_process.native() if native else csrc_process.emulated(capability or family)
    yield made
    made.close()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[object]:
    """Triton's interpreter in a process of its own; see ``triton_tools``."""
    import triton_tools

    if (reason := triton_tools.why_no_interpreter()) is not None:
        pytest.skip(reason)
    with triton_tools.Interpreter() as run:
        yield run
