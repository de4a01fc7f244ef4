"""The fit: pruned equals naive equals the plain PyTorch one, on spectra of every kind."""

from __future__ import annotations

import math

import alpha_reference as oracle
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opentrans_kernels import dispatch, settings
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.ops import powerlaw_fit
from opentrans_kernels.ops.powerlaw_fit import OP, reference

KINDS = ("pareto", "lognormal", "plateaus", "steps", "geometric", "nearly equal", "spikes")


def spectrum(kind: str, count: int, generator: np.random.Generator) -> np.ndarray:
    """Ascending positive values."""
    u = generator.random(count)
    x = {
        "pareto": lambda: (1 - u) ** (-1 / (0.5 + 2 * generator.random())),
        "lognormal": lambda: np.exp(2 * generator.standard_normal(count)),
        "plateaus": lambda: generator.choice([0.1, 0.5, 0.5000001, 3.0, 40.0], count),
        "steps": lambda: np.round((1 - u) ** -0.7, 1),
        "geometric": lambda: 1.1 ** np.arange(count),
        "nearly equal": lambda: 1 + 1e-7 * u,
        "spikes": lambda: np.where(u > 0.9, 1e6 * u, u + 1e-3),
    }[kind]()
    return np.sort(x)


def batch(spectra: list[np.ndarray], windows=None):
    """(x, offsets, first, last) of spectra; all starts by default."""
    sizes = [len(x) for x in spectra]
    windows = windows or [(0, max(0, size - 1)) for size in sizes]
    first, last = [a for a, _ in windows], [b for _, b in windows]
    x = np.concatenate(spectra) if spectra else np.empty(0)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return [
        torch.from_numpy(x),
        *(torch.tensor(t, dtype=torch.int64) for t in (offsets, first, last)),
    ]


def many(count: int, largest: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [
        spectrum(KINDS[i % len(KINDS)], int(generator.integers(2, largest)), generator)
        for i in range(count)
    ]


@pytest.mark.usefixtures("extension")
def test_pruned_equals_naive_on_thousands_of_spectra() -> None:
    arguments = batch(many(5000, 130))
    naive = OP(*arguments, samples=0)
    assert naive.shape == (5000, 3) and (naive[:, 0] >= 0).all()
    assert torch.equal(OP(*arguments), naive)
    assert len(set(naive[:, 0].tolist())) > 50


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("samples", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("block", [1, 2, 16, 64])
def test_pruning_parameters_change_nothing(samples: int, block: int) -> None:
    arguments = batch(many(120, 400, seed=samples * 100 + block))
    assert torch.equal(OP(*arguments, samples, block), OP(*arguments, 0, 1))


@pytest.mark.usefixtures("extension")
def test_large_spectra_and_windows() -> None:
    generator = np.random.default_rng(5)
    spectra = [spectrum(kind, 3000, generator) for kind in KINDS]
    windows = [(0, 2999), (17, 2500), (5, 6), (0, 1), (2999, 3000), (40, 40), (1000, 2000)]
    arguments = batch(spectra, windows)
    naive = OP(*arguments, samples=0)
    assert torch.equal(OP(*arguments).nan_to_num(-7), naive.nan_to_num(-7))
    assert naive[5, 0] == -1 and naive[5, 1].isnan() and naive[5, 2] == 1, "an empty window"
    assert naive[4].tolist() == [2999, math.inf, 0], "the largest value alone"


def test_the_op_equals_the_definition() -> None:
    spectra = many(350, 60, seed=3)
    found = powerlaw_fit(*batch(spectra)).tolist()
    for x, (index, alpha, distance) in zip(spectra, found, strict=True):
        starts = [oracle.start_at(x, i) for i in range(len(x) - 1)]
        expected = min(d for _, d in starts)
        assert distance == pytest.approx(expected, abs=1e-7)
        # Plateaus tie exactly in real numbers, and to rounding in any program.
        nearly = {i for i, (_, d) in enumerate(starts) if d <= expected + 1e-7}
        assert index in nearly and (len(nearly) > 1 or index == nearly.pop())
        assert alpha == pytest.approx(starts[int(index)][0], rel=1e-6)


def test_reference_and_compiled_agree() -> None:
    spectra = many(200, 150, seed=4)
    arguments = batch(spectra)
    plain, found = reference.powerlaw_fit(*arguments), powerlaw_fit(*arguments)
    torch.testing.assert_close(plain[:, 2], found[:, 2], rtol=0, atol=1e-12)
    same = plain[:, 0] == found[:, 0]
    assert same.float().mean() > 0.9
    torch.testing.assert_close(plain[same], found[same], rtol=1e-9, atol=1e-12)


def test_reference_in_tiles_equals_one_tile(monkeypatch) -> None:
    arguments = batch(many(30, 200, seed=6))
    whole = reference.powerlaw_fit(*arguments)
    monkeypatch.setattr(reference, "_TILE", 300)
    assert torch.equal(reference.powerlaw_fit(*arguments), whole)


@given(
    st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=40),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_any_positive_values_in_any_window(values: list[float], a: int, b: int) -> None:
    x = np.sort(np.array(values))
    window = (min(a, len(x)), min(b, len(x)))
    arguments = batch([x], [window])
    index, alpha, distance = powerlaw_fit(*arguments)[0].tolist()
    if window[0] >= window[1]:
        assert index == -1 and math.isnan(alpha) and distance == 1
        return
    assert window[0] <= index < window[1] and alpha > 1 and 0 <= distance <= 1
    naive = OP(*arguments, samples=0)[0].tolist()
    assert [index, alpha, distance] == naive


def test_a_tie_takes_the_first_index() -> None:
    # The tail of x from any start is x again, scaled: one D for each length, none for others.
    x = np.array([1.0, 1.0, 5.0, 5.0])
    index, alpha, distance = powerlaw_fit(*batch([x]))[0].tolist()
    expected = [oracle.start_at(x, i)[1] for i in range(3)]
    assert index == expected.index(min(expected)) and distance == pytest.approx(min(expected))
    equal = np.full(9, 0.25)
    assert powerlaw_fit(*batch([equal]))[0].tolist() == [7, math.inf, 0.5]


def test_one_call_is_many_calls_and_threads_do_not_matter() -> None:
    spectra = many(60, 300, seed=8)
    together = powerlaw_fit(*batch(spectra))
    for i, x in enumerate(spectra):
        assert torch.equal(powerlaw_fit(*batch([x]))[0], together[i])
    torch.set_num_threads(3)
    assert torch.equal(powerlaw_fit(*batch(spectra)), together)
    assert powerlaw_fit(*batch([])).shape == (0, 3)


@pytest.mark.usefixtures("poison")
def test_every_output_is_written_and_no_input_changed() -> None:
    arguments = batch(many(20, 50))
    before = [t.clone() for t in arguments]
    found = OP(*arguments)
    assert not found.isnan().any()
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_bad_arguments_are_refused() -> None:
    x, offsets, first, last = batch(many(3, 30))
    with pytest.raises(OpenTransError, match="do not fit. For L spectra pass"):
        powerlaw_fit(x, offsets, first[:2], last)
    with pytest.raises(OpenTransError, match="no kernel for cpu int64"):
        powerlaw_fit(x.long(), offsets, first, last)


@pytest.mark.usefixtures("extension")
def test_the_compiled_kernel_reads_nothing_outside() -> None:
    x, offsets, first, last = batch(many(3, 30))
    bad = {
        "offsets must run from 0 to": (x, offsets + 1, first, last),
        "its window is": (x, offsets, first - 1, last),
        "spectrum 0 has": (x, offsets, first, last + 100),
        "must be a contiguous 1-d int64": (x, offsets, first.int(), last),
        "x must be a contiguous 1-d float64": (x.float(), offsets, first, last),
        "x must be": (x[::2], offsets, first, last),
    }
    for words, arguments in bad.items():
        with pytest.raises(RuntimeError, match=words):
            OP(*arguments)
    with pytest.raises(RuntimeError, match="block at least 1"):
        OP(x, offsets, first, last, 16, 0)
    shuffled = offsets.clone()
    shuffled[1], shuffled[2] = offsets[2], offsets[1]
    with pytest.raises(RuntimeError, match="spectrum 1 has"):
        OP(x, shuffled, first, last)


def test_opcheck_and_compile() -> None:
    arguments = batch(many(4, 30))
    torch.library.opcheck(OP, tuple(arguments))
    compiled = torch.compile(OP, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), OP(*arguments))


def test_its_rows(set_env) -> None:
    rows = {row.backend: row for row in dispatch.TABLE if row.op == "powerlaw_fit"}
    assert {"cpu", "reference"} <= set(rows)
    assert all("float64" in row.dtypes for row in rows.values())
    assert "takes float64, not float32" in str(
        pytest.raises(OpenTransError, dispatch.resolve, "powerlaw_fit", "cpu", "float32").value
    )
    set_env(OPENTRANS_BACKEND="reference")
    assert settings.get().backend == "reference"
    arguments = batch(many(10, 40))
    assert torch.equal(powerlaw_fit(*arguments), reference.powerlaw_fit(*arguments))
