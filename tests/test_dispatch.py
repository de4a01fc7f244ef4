"""Which kernel runs, why, and that it really is the one that runs."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_cases import masked_weight

import opentrans_kernels
from opentrans_kernels import dispatch, native, ops
from opentrans_kernels.errors import KernelUnavailable
from opentrans_kernels.pack import SparseWeight

OPS = sorted({row.op for row in dispatch.TABLE})
# float64 throughout; the others take float32 activations
SPECTRA = {"gram_eigenvalues", "powerlaw_fit"}
# The GPU path: half precision too; on the CPU only the reference, so that its plans run there.
NHWC = {row.op for row in dispatch.TABLE if row.layouts == "channels_last"}
ACTIVATIONS = sorted(set(OPS) - SPECTRA - NHWC)
# Compiled for the CPU, in Triton for CUDA.
BOTH = {"ms_deform_attn", "ms_deform_attn_backward"}


def test_every_op_has_a_reference_row_for_every_dtype() -> None:
    for op in OPS:
        rows = [row for row in dispatch.TABLE if row.op == op]
        (reference,) = (row for row in rows if row.backend == "reference")
        assert reference.device == "any" and reference.needs == ""
        floats = ("float64",) if op in SPECTRA else ("float32", "float64")
        floats += ("bfloat16", "float16") if op in NHWC else ()
        assert reference.dtypes == floats, "the oracle runs in float64"
        assert reference.rank == max(row.rank for row in rows)
        assert len({row.rank for row in rows}) == len(rows), "equal ranks leave the choice open"


def test_every_folder_of_ops_has_a_row() -> None:
    folder = Path(ops.__file__).parent
    found = {path.parent.name for path in folder.glob("*/reference.py")}
    assert found and found <= set(OPS)
    assert set(ops.__all__) - {"release_memory", "scratch_bytes"} <= set(OPS)


@pytest.mark.parametrize("row", dispatch.TABLE, ids=lambda row: f"{row.op}-{row.backend}")
def test_every_target_exists(row: dispatch.Row) -> None:
    if row.needs == "extension" and not native.load():
        pytest.skip(str(native.reason()))
    found = dispatch.Resolution(row, ()).function()
    assert callable(found) and found is dispatch.Resolution(row, ()).function()
    if row.backend == "cpu":
        assert found is getattr(torch.ops.opentrans_kernels, row.op).default


def test_float32_prefers_the_compiled_row(extension: None) -> None:
    for op in ACTIVATIONS:
        found = dispatch.resolve(op)
        assert found.row.backend == "cpu"
        others = [("triton", "takes cuda tensors, not cpu")] if op in BOTH else []
        assert [(row.backend, why) for row, why in found.rejected] == [
            *others,
            ("reference", "slower than cpu"),
        ]


def test_float64_and_other_devices_take_the_reference_and_say_why() -> None:
    for op in ACTIVATIONS:
        assert dispatch.resolve(op, "cpu", "float64").row.backend == "reference"
        assert "float32, not float64" in dispatch.explain(op, "cpu", "float64")
        if op not in BOTH:
            assert dispatch.resolve(op, "cuda", "float32").row.backend == "reference"
        assert dispatch.resolve(op, "cuda", "float64").row.backend == "reference"
        assert "takes cpu tensors, not cuda" in dispatch.explain(op, "cuda")


def test_the_gpu_path_has_one_compiled_row_and_is_checked_by_the_reference() -> None:
    assert "implicit_gemm_conv2d" in NHWC
    for op in NHWC:
        (compiled,) = (r for r in dispatch.TABLE if r.op == op and r.device == "cuda")
        assert {"float16", "bfloat16"} <= set(compiled.dtypes)
        for dtype in compiled.dtypes:
            assert dispatch.resolve(op, "cpu", dtype).row.backend == "reference"
            found = dispatch._resolve(op, "cuda", dtype, "auto")
            assert found.row is compiled or any("cannot be built" in w for _, w in found.rejected)


def test_explain_names_the_choice_first(extension: None) -> None:
    lines = dispatch.explain("sparse_conv2d").splitlines()
    assert lines[0].startswith("sparse_conv2d on cpu float32: cpu")
    assert lines[1:] == ["  not reference: slower than cpu"]


def test_an_unknown_op_or_dtype_is_refused_with_the_fix() -> None:
    with pytest.raises(KernelUnavailable, match="unknown op"):
        dispatch.resolve("dense_conv2d")
    with pytest.raises(KernelUnavailable) as caught:
        dispatch.resolve("sparse_conv2d", "cpu", "int8")
    message = str(caught.value)
    assert "sparse_conv2d: no kernel for cpu int8" in message
    assert "cpu: takes float32, not int8" in message and "reference: takes" in message
    assert "OPENTRANS_BACKEND=reference" in message and "Move the tensors" in message


def test_a_forced_backend_is_used_or_refused(extension: None, set_env) -> None:
    set_env(OPENTRANS_BACKEND="reference")
    assert dispatch.resolve("sparse_conv2d").row.backend == "reference"
    assert "not cpu: OPENTRANS_BACKEND=reference" in dispatch.explain("sparse_conv2d")
    set_env(OPENTRANS_BACKEND="cpu")
    assert dispatch.resolve("sparse_conv2d").row.backend == "cpu"
    with pytest.raises(KernelUnavailable, match="reference: OPENTRANS_BACKEND=cpu"):
        dispatch.resolve("sparse_conv2d", "cpu", "float64")


def test_the_forced_backend_is_what_runs(extension: None, set_env) -> None:
    """A NaN activation under a dropped weight spreads in dense arithmetic only."""
    packed = SparseWeight.from_dense(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
    x = torch.zeros(1, 2, 3, 3)
    x[:, 1] = float("nan")
    for backend, spreads in (("cpu", False), ("reference", True), ("auto", False)):
        set_env(OPENTRANS_BACKEND=backend)
        assert ops.sparse_conv2d(x, packed).isnan().any().item() == spreads, backend


@pytest.fixture
def no_extension(monkeypatch) -> Iterator[None]:
    """As if the extension had not been built, and nothing been warned of yet."""
    monkeypatch.setattr(native, "load", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "it was left out. Build it again.")
    monkeypatch.setattr(dispatch, "_warned", set())
    dispatch._resolve.cache_clear()
    yield
    dispatch._resolve.cache_clear()


def test_a_missing_extension_is_named_with_its_reason(no_extension: None) -> None:
    found = dispatch.resolve("sparse_conv2d")
    assert found.row.backend == "reference"
    assert "it was left out. Build it again" in dispatch.explain("sparse_conv2d")
    records = {r["backend"]: r for r in dispatch.backends() if r["op"] == "sparse_conv2d"}
    assert "it was left out" in records["cpu"]["available"]


def test_a_fallback_is_logged_once_per_op(no_extension: None, set_env, caplog) -> None:
    caplog.set_level(logging.INFO, "opentrans_kernels")
    dispatch.explain("sparse_conv2d")
    dispatch.resolve("sparse_conv2d", "cpu", "float64")  # the reference's own, not a fallback
    set_env(OPENTRANS_BACKEND="reference")
    dispatch.resolve("sparse_conv2d")  # asked for
    assert not caplog.records
    set_env(OPENTRANS_BACKEND=None)
    packed = SparseWeight.from_dense(masked_weight(4, 3, 1, 0.5))
    for _ in range(3):
        ops.sparse_conv2d(torch.randn(1, 3, 4, 4), packed)
        ops.avg_pool2d(torch.randn(1, 3, 4, 4), 2)
    assert [(r.levelname, r.getMessage().split()[0]) for r in caplog.records] == [
        ("WARNING", "sparse_conv2d"), ("WARNING", "avg_pool2d"),
    ]  # fmt: skip
    assert "slower reference kernel" in caplog.text and "Build it again" in caplog.text


def test_strict_refuses_the_fallback_only(no_extension: None, set_env, caplog) -> None:
    set_env(OPENTRANS_STRICT="1")
    packed = SparseWeight.from_dense(masked_weight(4, 3, 1, 0.5))
    for _ in range(2):
        with pytest.raises(KernelUnavailable) as caught:
            ops.sparse_conv2d(torch.randn(1, 3, 4, 4), packed)
    message = str(caught.value)
    assert "OPENTRANS_STRICT=1" in message and "it was left out. Build it again." in message
    assert "unset OPENTRANS_STRICT" in message
    assert ops.sparse_conv2d(torch.randn(1, 3, 4, 4).double(), packed).dtype == torch.float64
    assert "not cpu: the compiled extension" in dispatch.explain("sparse_conv2d")
    set_env(OPENTRANS_STRICT="1", OPENTRANS_BACKEND="reference")
    assert ops.sparse_conv2d(torch.randn(1, 3, 4, 4), packed).shape == (1, 4, 4, 4)
    assert not caplog.records


def test_strict_changes_nothing_where_the_extension_is_loaded(extension: None, set_env) -> None:
    set_env(OPENTRANS_STRICT="1")
    for op in sorted(set(OPS) - NHWC):
        dtype = "float64" if op in SPECTRA else "float32"
        assert dispatch.resolve(op, "cpu", dtype).row.backend == "cpu"


def test_backends_lists_every_row(extension: None, set_env) -> None:
    records = dispatch.backends()
    assert [(r["op"], r["backend"]) for r in records] == [
        (row.op, row.backend) for row in dispatch.TABLE
    ]
    assert all(r["available"] == "yes" for r in records if r["device"] != "cuda")
    assert all(r["layouts"] and r["dtypes"] and r["device"] for r in records)
    set_env(OPENTRANS_BACKEND="reference")
    assert dispatch.backends() == records, "what is available does not depend on what is forced"


def test_the_public_names_are_the_same_objects() -> None:
    for name in ("sparse_conv2d", "sparse_bottleneck", "release_memory"):
        assert getattr(opentrans_kernels, name) is getattr(ops, name)
    assert opentrans_kernels.SparseWeight is SparseWeight


def test_the_table_is_data_without_imports() -> None:
    for row in dispatch.TABLE:
        module, _, name = row.target.partition(":")
        assert name and importlib.util.find_spec(module) is not None


def test_resolving_costs_little(extension: None) -> None:
    packed = SparseWeight.from_dense(masked_weight(4, 3, 1, 0.5))
    before = dispatch._resolve.cache_info().misses
    x = torch.randn(1, 3, 4, 4)
    for _ in range(10):
        ops.sparse_conv2d(x, packed)
    assert dispatch._resolve.cache_info().misses <= before + 1
