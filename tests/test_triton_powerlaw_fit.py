"""The Triton fit: in the interpreter against the reference, compiled ahead of time for two GPUs."""

from __future__ import annotations

import pytest
import torch
from triton_tools import (
    CAPABILITIES,
    Interpreter,
    compile_for,
    pointers,
    why_no_triton,
)

from opentrans_kernels import dispatch
from opentrans_kernels.ops.powerlaw_fit import reference

TARGET = "opentrans_kernels.ops.powerlaw_fit.triton:powerlaw_fit"


def geometric(ratio: float, count: int) -> torch.Tensor:
    return ratio ** torch.arange(count, dtype=torch.float64)


def heavy(count: int) -> torch.Tensor:
    return (torch.randn(count, dtype=torch.float64).abs() + 0.01).pow(-1.5).sort().values


def packed(spectra: list[tuple[torch.Tensor, int, int]]) -> tuple[torch.Tensor, ...]:
    """x, offsets, first, last of (values, first, last) triples."""
    sizes = [0, *(len(values) for values, _, _ in spectra)]
    return (
        torch.cat([values for values, _, _ in spectra]),
        torch.tensor(sizes).cumsum(0),
        torch.tensor([first for _, first, _ in spectra]),
        torch.tensor([last for _, _, last in spectra]),
    )


def same(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert torch.equal(found[:, 0], exact[:, 0]), "another start was chosen"
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13, equal_nan=True)


def cases() -> list[tuple[torch.Tensor, int, int]]:
    plateau = torch.cat([geometric(1.1, 20), torch.full((7,), 8.0, dtype=torch.float64)])
    return [
        (geometric(1.3, 40), 0, 39),
        (torch.rand(300, dtype=torch.float64).exp().sort().values, 0, 299),
        (torch.full((16,), 0.5, dtype=torch.float64), 0, 15),  # one tie: alpha inf, D = 1/2 at 14
        (torch.tensor([2.0]).double(), 0, 1),
        (torch.tensor([2.0, 3.0]).double(), 0, 1),
        (plateau.sort().values, 3, 26),
        (heavy(600), 100, 599),  # several blocks, several chunks, not starting at 0
        (heavy(257), 256, 257),  # one start, the last value
        (torch.randint(1, 6, (100,)).double().sort().values, 0, 99),  # plateaus everywhere
        (heavy(64) * 1e-40, 0, 63),
        (heavy(64) * 1e40, 0, 63),
    ]


def test_the_interpreted_kernel_finds_the_reference_start(interpreter: Interpreter) -> None:
    arguments = packed(cases())
    exact = reference.powerlaw_fit(*arguments)
    assert exact[2].tolist() == [14.0, float("inf"), 0.5]
    same(interpreter(TARGET, *arguments), exact)


def test_random_spectra_with_ties(interpreter: Interpreter) -> None:
    """Rounded values give plateaus inside and at the top; windows are random."""
    spectra = []
    for trial in range(60):
        count = int(torch.randint(2, 90, ()))
        values = heavy(count)
        if trial % 2:
            values = (values * 4).ceil() / 4
        first = int(torch.randint(0, count, ()))
        spectra.append((values, first, int(torch.randint(first, count, ()))))
    arguments = packed(spectra)
    exact = reference.powerlaw_fit(*arguments)
    assert (exact[:, 0] >= 0).sum() > 40, "most windows must hold a start"
    same(interpreter(TARGET, *arguments), exact)


def test_empty_windows_may_hold_anything(interpreter: Interpreter) -> None:
    """What the threshold removed lies between the spectra: zeros, NaN, nothing at all."""
    junk = torch.tensor([0.0, float("nan"), -3.0]).double()
    empty = torch.empty(0, dtype=torch.float64)
    good = (heavy(50), 0, 49)
    arguments = packed([(junk, 0, 0), good, (empty, 0, 0), (junk, 2, 1), good, (empty, 0, 0)])
    found = interpreter(TARGET, *arguments)
    same(found[[1, 4]], reference.powerlaw_fit(*packed([good, good])))
    for row in (0, 2, 3, 5):
        assert found[row, [0, 2]].tolist() == [-1.0, 1.0] and found[row, 1].isnan()
    none = interpreter(TARGET, empty, torch.zeros(1, dtype=torch.int64), *[empty.long()] * 2)
    assert none.shape == (0, 3)


def test_inputs_are_not_modified(interpreter: Interpreter) -> None:
    arguments = packed([(heavy(40), 0, 39)])
    before = [a.clone() for a in arguments]
    first, again = interpreter(TARGET, *arguments), interpreter(TARGET, *arguments)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile_without_spills(capability: int) -> None:
    if (reason := why_no_triton()) is not None:
        pytest.skip(reason)
    from opentrans_kernels.ops.powerlaw_fit import triton as kernels

    windows = pointers("offsets first last ends best_start", "i64")
    compiled = [
        compile_for(
            kernels.starts_kernel, capability,
            pointers("x logs slopes") | pointers("offsets", "i64"), {"CHUNK": 256},
        ),
        compile_for(
            kernels.distances_kernel, capability,
            pointers("logs slopes best") | windows | {"spectra": "i32"},
            {"STARTS": 16, "VALUES": 64, "SEARCH": 128},
        ),
        compile_for(
            kernels.best_kernel, capability,
            pointers("slopes best out") | windows, {"STARTS": 16, "CHUNK": 256},
        ),
    ]  # fmt: skip
    assert all(one.stack == 0 and one.registers <= 200 for one in compiled)
    assert all(one.shared <= 4096 for one in compiled)
    distances = compiled[1]
    assert distances.count(r"fma\.rn\.f64") > 20, "the exponential is not float64"
    assert distances.atomics == 0, "atomics would make ties depend on timing"


def test_cuda_takes_the_triton_row_and_says_what_else(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._resolve.cache_clear()
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    assert dispatch.resolve("powerlaw_fit", "cuda", "float64").row.backend == "triton"
    dispatch._resolve.cache_clear()
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    text = dispatch.explain("powerlaw_fit", "cuda", "float64")
    assert text.startswith("powerlaw_fit on cuda float64: reference")
    assert "triton is not installed. Install it with: pip install triton" in text
    assert dispatch._resolve("powerlaw_fit", "cuda", "float64", "auto").fallback is not None
    dispatch._resolve.cache_clear()


@pytest.mark.gpu
def test_on_a_device() -> None:
    from opentrans_kernels.ops.powerlaw_fit import triton as kernels

    arguments = packed(cases())
    found = kernels.powerlaw_fit(*(a.cuda() for a in arguments)).cpu()
    same(found, reference.powerlaw_fit(*arguments))
