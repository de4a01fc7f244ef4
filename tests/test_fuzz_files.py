"""Damaged files of every kind, for some seconds; and the search itself finds planted faults."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import fuzz_files
import pytest
import torch
from fuzz_files import Target, run

from opentrans_kernels.errors import CheckpointError


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_damaged_files_end_in_an_error_or_unchanged() -> None:
    summary = run(12, seed=0)
    assert not summary.failures, str(summary)
    for name in fuzz_files.TARGETS:
        assert summary.outcomes[name, "refused"] >= 1, str(summary)


def _write(path: Path) -> None:
    torch.save({"w": torch.ones(64)}, path)


def test_the_search_notices_what_must_not_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_files, "MOST_SECONDS", 0.05)
    valid: list[bytes] = []

    def only_valid(then: Any) -> Any:
        def read(path: Path) -> Any:
            if not valid:
                valid.append(path.read_bytes())
            return {"w": 1} if path.read_bytes() == valid[0] else then()

        return read

    def wrong() -> Any:
        raise KeyError("w")

    def short() -> Any:
        raise CheckpointError("no")

    cases = {
        "KeyError": wrong,
        "checksum covers it": lambda: {"w": 2},
        "helps nobody": short,
        "Hang": lambda: time.sleep(5),
    }
    for words, then in cases.items():
        valid.clear()
        summary = run(0.2, 0, {"planted": Target(_write, only_valid(then), True)})
        assert summary.failures and all(words in one for one in summary.failures), str(summary)


def test_a_case_is_named_by_seed_target_and_number(tmp_path: Path) -> None:
    import random

    target = fuzz_files.TARGETS["zip"]
    target.make(tmp_path / "f")
    data = (tmp_path / "f").read_bytes()
    one, two = (fuzz_files.damaged(target, data, random.Random("0 zip 5")) for _ in range(2))
    assert one == two and one[0] != data
