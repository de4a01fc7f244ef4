"""The GPU path without a GPU: its logic on the CPU device, with a cuSOLVER made of NumPy.

The stand-in library is called through ctypes with the C signatures, reads and writes the memory it
is given, and records every call, so marshalling, chunks, workspaces and flags are those of the
real one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import fresh_process
import pytest
import torch
from cusolver_standin import Library, use
from triton_tools import Runner

from opentrans_kernels.errors import KernelUnavailable, OpenTransError, UnsupportedModelError
from opentrans_kernels.spectrum import FitOptions, estimate_alpha, rows_of, select
from opentrans_kernels.spectrum import solvers as cpu_solvers
from opentrans_kernels.spectrum.cuda import eigenvalues
from opentrans_kernels.spectrum.cuda import solve as solve_module
from opentrans_kernels.spectrum.cuda import spectra as spectra_module
from opentrans_kernels.spectrum.cuda.cusolver import _SIGNATURES, CuSolver, Handle, find
from opentrans_kernels.spectrum.cuda.gram import gram_into
from opentrans_kernels.spectrum.cuda.solve import BATCHED_UP_TO, method, solve


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """The stand-in as the library of this process."""
    yield use(monkeypatch, Library())


def gram(batch: int, n: int) -> torch.Tensor:
    weight = torch.randn(batch, n, n + 2, dtype=torch.float64)
    return (weight @ weight.mT).contiguous()


def heavy(*shape: int) -> torch.Tensor:
    """A weight with a heavy-tailed spectrum."""
    return torch.randn(shape) * torch.rand(shape[1]).pow(-0.7).view(-1, *[1] * (len(shape) - 2))


def weights() -> dict[str, torch.Tensor]:
    """Shapes and degenerate cases, several of each order."""
    return {
        "conv3": heavy(16, 16, 3, 3),
        "again": heavy(16, 16, 3, 3),
        "tall": heavy(40, 16, 1, 1),
        "wide": heavy(16, 30, 1, 1).half(),
        "conv1d": heavy(12, 20, 5),
        "depthwise": torch.randn(8, 1, 3, 3),
        "linear": heavy(60, 33),
        "transposed": heavy(21, 50).t(),
        "equal": 0.5**0.5 * torch.eye(16),
        "two": torch.diag(torch.tensor([1.0, 2.0])),
        "zero": torch.zeros(7, 9),
        "tiny": torch.randn(12, 5) * 1e-4,
        "rank": torch.randn(20, 3) @ torch.randn(3, 20),
        "steep": torch.randn(60, 60) @ torch.diag(torch.logspace(-4, 4, 60)),
    }


# The binding


def test_a_batch_is_solved_and_marshalled(library: Library) -> None:
    handle = Handle(solve_module.cusolver.load())
    matrices = gram(5, 7)
    exact = torch.linalg.eigvalsh(matrices)
    for routine, calls in (("batched", [(5,)]), ("one_by_one", [(1,)] * 5)):
        library.calls.clear()
        values = torch.full((5, 7), math.nan, dtype=torch.float64)
        info = torch.full((5,), -1, dtype=torch.int32)
        keep = getattr(handle, routine)(matrices.clone(), values, info)
        torch.testing.assert_close(values, exact, rtol=1e-12, atol=1e-12)
        assert info.tolist() == [0] * 5
        assert [(batch,) for _, _, batch, *_ in library.calls] == calls
        assert sorted({t.numel() for t in keep}) == [Library.HOST, Library.DEVICE]


def test_batches_beyond_the_32_bit_limit_go_in_chunks(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solve_module.cusolver, "INT32_MAX", 7 * 7 * 2 + 48)
    handle = Handle(solve_module.cusolver.load())
    matrices = gram(5, 7)
    exact = torch.linalg.eigvalsh(matrices)
    values = torch.empty(5, 7, dtype=torch.float64)
    handle.batched(matrices, values, torch.empty(5, dtype=torch.int32))
    assert [call[2] for call in library.calls] == [2, 2, 1]
    torch.testing.assert_close(values, exact, rtol=1e-12, atol=1e-12)
    large = torch.zeros(1, 13, 13, dtype=torch.float64)
    with pytest.raises(OpenTransError, match="13 x 13.*Use solver='xsyevd'"):
        handle.batched(large, values.new_empty(1, 13), torch.empty(1, dtype=torch.int32))


def test_wrong_tensors_are_refused_before_the_call(library: Library) -> None:
    handle = Handle(solve_module.cusolver.load())
    good = (gram(2, 3), torch.empty(2, 3).double(), torch.empty(2, dtype=torch.int32))
    bad = [
        (good[0].float(), *good[1:]),
        (good[0].mT, *good[1:]),
        (good[0][:, :2], *good[1:]),
        (good[0], good[1].float(), good[2]),
        (good[0], good[1][:, :2], good[2]),
        (good[0], good[1], good[2].long()),
    ]
    for arguments in bad:
        with pytest.raises(OpenTransError, match="Make them with|Allocate it so"):
            handle.batched(*arguments)
    assert not library.calls


def test_a_status_is_an_error_with_name_version_and_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Library(status=2))
    with pytest.raises(OpenTransError) as caught:
        solve({4: gram(1, 4)})
    message = str(caught.value)
    assert "cusolverDnXsyevBatched of cuSOLVER 11.7.3 returned status 2" in message
    assert "ALLOC_FAILED" in message and "solver='sturm'" in message
    assert not any(queue.qsize() for queue in solve_module._idle.values()), "handle reused"


def test_a_library_without_the_batched_solver_is_named() -> None:
    with pytest.raises(KernelUnavailable) as caught:
        CuSolver(Library(leave_out="cusolverDnXsyevBatched"), "/old/libcusolver.so.11")
    message = str(caught.value)
    assert "cuSOLVER 11.7.3 (/old/libcusolver.so.11) has no cusolverDnXsyevBatched" in message
    assert "CUDA >= 12.6.2" in message and "newer CUDA, or choose solver='sturm'" in message


def test_no_library_at_all_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = solve_module.cusolver
    monkeypatch.setattr(module, "find", lambda: ["/nowhere/libcusolver.so.12"])
    module.load.cache_clear()
    with pytest.raises(KernelUnavailable, match="/nowhere/libcusolver.so.12.*solver='sturm'"):
        module.load()
    module.load.cache_clear()


def test_the_libcusolver_of_torch_has_every_function() -> None:
    """In a process of its own: loading hundreds of megabytes is not for the others."""
    paths = find()
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is built without CUDA")
    code = (
        "import torch\n"
        "from opentrans_kernels.spectrum.cuda import cusolver\n"
        "solver = cusolver.load()\n"
        "print(len(solver._functions), solver.version)\n"
        "try:\n    cusolver.Handle(solver)\n"
        "except cusolver.OpenTransError as error:\n    print(error)\n"
    )
    done = fresh_process.run(code)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert paths and first.split()[0] == str(len(_SIGNATURES))
    major, minor = map(int, first.split()[1].split(".")[:2])
    assert (major, minor) >= (11, 7)
    if not torch.cuda.is_available():
        assert "status 1 (NOT_INITIALIZED: no usable CUDA driver" in rest[0]


# Gram matrices


@pytest.mark.parametrize("shape", [(5, 9, 4), (9, 5, 4), (6, 6, 1), (1, 7, 3)], ids=str)
@pytest.mark.parametrize("stage", [1 << 20, 8 * 5 * 9 * 4 * 2, 8 * 20, 1])
def test_gram_matrices_do_not_depend_on_the_staging(shape, stage: int, poison: None) -> None:
    stack = [torch.randn(shape), torch.randn(*shape, 2)[..., 1], torch.randn(shape).half()]
    before = [w.clone() for w in stack]
    n = min(shape[:2])
    out = torch.empty(len(stack) * shape[2], n, n, dtype=torch.float64)
    gram_into(out, stack, 0.5, stage_bytes=stage)
    exact = []
    for weight in stack:
        for matrix in weight.double().permute(2, 0, 1):
            product = matrix @ matrix.T if shape[0] <= shape[1] else matrix.T @ matrix
            exact.append(0.5 * product)
    torch.testing.assert_close(out, torch.stack(exact), rtol=1e-13, atol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(stack, before, strict=True))


# The solve


def test_large_orders_go_one_by_one_and_first(library: Library) -> None:
    matrices = {4: gram(3, 4), BATCHED_UP_TO + 1: gram(2, BATCHED_UP_TO + 1)}
    exact = {n: torch.linalg.eigvalsh(m) for n, m in matrices.items()}
    found = solve(matrices)
    for n, values in exact.items():
        torch.testing.assert_close(found.values[n], values, rtol=1e-10, atol=1e-10)
        assert not found.info[n].any()
    calls = sorted(call[:3] for call in library.calls)
    assert calls == [("XsyevBatched", 4, 3), ("Xsyevd", 513, 1), ("Xsyevd", 513, 1)]
    assert len(found.keep) == 2 * 3, "device and host workspace of each call"
    assert method(BATCHED_UP_TO, "cusolver") == "xsyev_batched"
    library.calls.clear()
    solve({4: gram(3, 4)}, "xsyevd")
    solve({600: gram(1, 600)}, "xsyev_batched")
    assert [c[:3] for c in library.calls] == [("Xsyevd", 4, 1)] * 3 + [("XsyevBatched", 600, 1)]
    assert solve({}).values == {}


def test_an_unknown_solver_lists_the_known(library: Library) -> None:
    with pytest.raises(OpenTransError, match="'jacobi' is not known on CUDA.*cusolver.*sturm"):
        eigenvalues(select({"a": torch.randn(3, 4)}), device="cpu", solver="jacobi")
    with pytest.raises(OpenTransError, match="solver='sturm'.*device='cuda'"):
        estimate_alpha({"a": torch.randn(3, 4)}, device="cpu", solver="sturm")


# All layers


@pytest.mark.parametrize("fit", ["xmin_peak", "xmin_mid", "ks", "xmin_peak_fixed", "weightwatcher"])
def test_rows_equal_those_of_the_cpu(library: Library, fit: str) -> None:
    exact = estimate_alpha(weights(), fit, device="cpu", threads=1)
    layers = select(weights_like(exact))
    found = eigenvalues(layers, device="cpu")
    for row, other in zip(exact, rows_of(layers, found, FitOptions(fit)), strict=True):
        for name in ("num_evals", "num_total", "xmin_index", "matrix_rank", "reason", "ambiguous"):
            assert getattr(row, name) == getattr(other, name), (row.name, name)
        for name in ("alpha", "ks_distance", "norm", "spectral_norm", "log_alpha_norm", "entropy"):
            a, b = getattr(row, name), getattr(other, name)
            same = a == b or (math.isnan(a) and math.isnan(b))
            assert same or math.isclose(a, b, rel_tol=1e-6), (row.name, name, a, b)


@pytest.mark.parametrize("fit", ["xmin_peak", "xmin_mid", "ks", "xmin_peak_fixed", "weightwatcher"])
@pytest.mark.parametrize("threshold", [1e-5, 0.0])
def test_the_host_reads_once(
    library: Library, monkeypatch: pytest.MonkeyPatch, fit: str, threshold: float
) -> None:
    """Fits come with the eigenvalues, in the one copy; only layers done again are fitted again."""
    from opentrans_kernels.spectrum import rules

    layers = select(weights())
    options = FitOptions(fit, threshold=threshold)
    apart = rows_of(layers, eigenvalues(layers, device="cpu", threshold=threshold), options)
    copies: list[int] = []
    cpu = torch.Tensor.cpu

    def counted(tensor: torch.Tensor, *rest: object) -> torch.Tensor:
        copies.append(tensor.numel())
        return cpu(tensor, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", counted)
        found = eigenvalues(layers, device="cpu", options=options)
    again = [i for i, spectrum in enumerate(found) if "svdvals" in spectrum.solver]
    assert len(copies) == 1 + len(again) and len(again) < len(layers) / 2
    fitted: list[int] = []
    together = rules._fit_all

    def watched(spectra: list[torch.Tensor], *rest: object) -> list[rules.Fit]:
        fitted.extend(one.numel() for one in spectra)
        return together(spectra, *rest)

    monkeypatch.setattr(rules, "_fit_all", watched)
    rows = rows_of(layers, found, options)
    sizes = [layers[i].num_eigenvalues for i in again]
    assert len(fitted) <= 3 * len(again) and all(any(n <= m for m in sizes) for n in fitted)
    for one, other in zip(rows, apart, strict=True):
        for name, value in vars(one).items():
            same = value == getattr(other, name) or value != value
            assert same, (one.name, name, value, getattr(other, name))
    # Other options were not fitted ahead, and are fitted now.
    fitted.clear()
    assert rows_of(layers, found, FitOptions("xmin_mid", xmin_pos=3.0)) and fitted


def weights_like(table) -> dict[str, torch.Tensor]:
    """The same weights again: they are drawn from a fixed seed."""
    torch.manual_seed(0)
    found = weights()
    assert list(found) == [row.name for row in table]
    return found


def test_each_row_names_its_solver_and_what_was_redone(library: Library) -> None:
    layers = select(weights())
    found = dict(
        zip((layer.name for layer in layers), eigenvalues(layers, device="cpu"), strict=True)
    )
    assert found["conv3"].solver == "cpu: xsyev_batched"
    assert found["tiny"].solver.startswith("cpu: svdvals, as xsyev_batched leaves everything")
    assert found["steep"].solver == "cpu: svdvals, as xsyev_batched would lose digits"
    exact = cpu_solvers.eigenvalues(layers)
    for layer, expected in zip(layers, exact, strict=True):
        values = found[layer.name].values
        assert values.dtype == torch.float64 and values.is_contiguous()
        assert torch.equal(values, found[layer.name].on_device)
        assert torch.equal(values, values.sort().values) and (values >= 0).all()
        largest = expected.values[-1].clamp_min(1e-300)
        assert ((values - expected.values).abs() / largest).max() < 1e-13, layer.name
    # Every order is one call, whatever the larger side: 16 comes from five layers.
    orders = [n for name, n, *_ in library.calls if name == "XsyevBatched"]
    assert sorted(set(orders)) == sorted(orders)
    assert (9 * 2 + 3) in [batch for _, n, batch, *_ in library.calls if n == 16]


def test_a_small_budget_means_more_waves_and_the_same_numbers(library: Library) -> None:
    layers = select(weights())
    whole = eigenvalues(layers, device="cpu")
    once = len(library.calls)
    seen: list[tuple[int, int, str]] = []
    parts = eigenvalues(
        layers, device="cpu", budget=1, progress=lambda *step: seen.append(step)
    )  # fmt: skip
    assert len(library.calls) > 2 * once
    assert [step[0] for step in seen] == list(range(1, len(layers) + 1))
    assert {name for _, _, name in seen} == {layer.name for layer in layers}
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a.values, b.values, rtol=1e-9, atol=1e-18)
        assert a.solver == b.solver


def test_no_convergence_is_redone_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Library(info=5))
    layers = select({"a": torch.randn(5, 9), "b": torch.randn(6, 9)})
    first, second = eigenvalues(layers, device="cpu")
    assert first.solver == "cpu: svdvals, as xsyev_batched did not converge"
    assert second.solver == "cpu: xsyev_batched"
    exact = torch.linalg.svdvals(layers[0].weight.double()).square().flip(0)
    torch.testing.assert_close(first.values, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(library: Library, bad: float) -> None:
    broken = torch.randn(5, 9)
    broken[2, 3] = broken[4, 1] = bad
    layers = select({"good": torch.randn(5, 9), "encoder.broken": broken})
    with pytest.raises(UnsupportedModelError, match="'encoder.broken': its weight holds 2 NaN"):
        eigenvalues(layers, device="cpu")
    layers = select({"huge": torch.full((3, 3), 1e200, dtype=torch.float64)})
    with pytest.raises(UnsupportedModelError, match="'huge': the squares.*Scale the weight"):
        eigenvalues(layers, device="cpu")


def test_the_fit_takes_the_device_tensor_and_the_table_the_host_one(library: Library) -> None:
    (spectrum,) = eigenvalues(select({"a": torch.randn(5, 9)}), device="cpu")
    tail = spectrum.tail(3)
    assert tail.data_ptr() == spectrum.on_device.data_ptr() + 2 * 8
    assert tail.data_ptr() != spectrum.values.data_ptr() + 2 * 8
    assert torch.equal(tail, spectrum.values[2:]) and spectrum.tail(0).numel() == 0


def test_cuda_without_a_device_is_an_error_not_the_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is present")
    with pytest.raises(KernelUnavailable, match="sees no CUDA device.*device='cpu'"):
        estimate_alpha({"a": torch.randn(5, 9)}, device="cuda")


def test_from_weights_to_eigenvalues_in_own_kernels(interpreter: Runner) -> None:
    some = {"conv": heavy(4, 6, 1, 2), "linear": heavy(9, 20)}
    found = interpreter("triton_targets:eigenvalues", some, "sturm")
    for values, expected in zip(found, cpu_solvers.eigenvalues(select(some)), strict=True):
        torch.testing.assert_close(values, expected.values, rtol=1e-9, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["cusolver", "xsyev_batched", "xsyevd", "sturm"])
@pytest.mark.parametrize("fit", ["xmin_peak", "xmin_mid", "ks"])
def test_alpha_on_a_device_equals_that_of_the_cpu(solver: str, fit: str) -> None:
    some = weights() | {"large": heavy(600, 700), "larger": heavy(1100, 1100)}
    exact = estimate_alpha(some, fit, device="cpu")
    found = estimate_alpha(some, fit, device="cuda", solver=solver)
    for row, other in zip(exact, found, strict=True):
        assert other.solver.startswith("cuda: ")
        assert (row.num_evals, row.xmin_index) == (other.num_evals, other.xmin_index), row.name
        assert row.alpha == other.alpha or math.isclose(row.alpha, other.alpha, rel_tol=1e-6)


def test_waves_hold_at_least_one_layer() -> None:
    layers = select({"a": torch.randn(5, 9), "b": torch.randn(50, 90), "c": torch.randn(3, 4)})
    assert spectra_module._waves(layers, 0) == [[1], [0], [2]]
    assert spectra_module._waves(layers, 1 << 30) == [[1, 0, 2]]
