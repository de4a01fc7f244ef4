"""``sparse_conv2d_nhwc``: packing, the kernel's own code run on the host, nvcc's report."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from opentrans_kernels import dispatch
from opentrans_kernels.errors import KernelUnavailable, PlanError, UnsupportedModelError
from opentrans_kernels.ops import sparse_conv2d_nhwc
from opentrans_kernels.ops.arguments import BadArgument
from opentrans_kernels.ops.sparse_conv2d_nhwc import build, pack, reference
from opentrans_kernels.ops.sparse_conv2d_nhwc.cuda import problem_of
from opentrans_kernels.ops.sparse_conv2d_nhwc.pack import GROUP, LINES, ROWS, WARPS, plane

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def weight_of(cout: int, cin: int, kernel: int, density: float) -> torch.Tensor:
    weight = torch.randn(cout, cin, kernel, kernel) / max(1.0, density * cin * kernel**2) ** 0.5
    return weight * (torch.rand(weight.shape) < density)


def case(
    dtype: torch.dtype, kernel: int, *, n: int = 2, cin: int = 20, cout: int = 70, h: int = 9,
    w: int = 35, density: float = 0.1, residual: bool = False, relu: bool = True,
    chunk: int | None = None,
) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor | None, bool, torch.Tensor]:  # fmt: skip
    """x, pack, bias, residual, relu and the dense weight."""
    weight = weight_of(cout, cin, kernel, density)
    like = torch.channels_last
    x = torch.randn(n, cin, h, w).to(dtype).contiguous(memory_format=like)
    extra = torch.randn(n, cout, h, w).to(dtype) if residual else None
    extra = None if extra is None else extra.contiguous(memory_format=like)
    bias = torch.randn(cout, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x, pack(weight, chunk), bias, extra, relu, weight


def close(found: torch.Tensor, given: tuple[Any, ...]) -> None:
    x, _, bias, residual, relu, weight = given
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=weight.shape[-1] // 2)
    want = want if residual is None else want + residual.double()
    want = want.clamp_min(0) if relu else want
    assert found.shape == want.shape and found.dtype == x.dtype
    if want.numel():
        error = (found.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
        assert error <= TOLERANCE[x.dtype], f"{float(error):.1e}"


CASES: dict[str, dict[str, Any]] = {
    "3x3": dict(kernel=3),
    "1x1": dict(kernel=1, residual=True),
    "one pixel": dict(kernel=3, h=1, w=1, n=3),
    "exact tiles": dict(kernel=3, h=32, w=64, n=1, cout=64),
    "several chunks": dict(kernel=3, cin=75, chunk=32),
    "several chunks, 1x1": dict(kernel=1, cin=130, cout=33, relu=False),
    "chunk of one": dict(kernel=1, cin=3, chunk=1, cout=5),
    "dense": dict(kernel=3, density=1.0, cout=65),
    "empty": dict(kernel=3, density=0.0),
    "batch 0": dict(kernel=1, n=0),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_reference(name: str, dtype: torch.dtype) -> None:
    given = case(dtype, **CASES[name])
    found = sparse_conv2d_nhwc(*given[:4], relu=given[4])
    assert found.is_contiguous(memory_format=torch.channels_last)
    close(found, given)


def test_packing_is_lossless_and_balanced() -> None:
    for cout, cin, kernel, chunk in ((130, 70, 3, 32), (64, 7, 1, 3), (1, 1, 3, 5)):
        weight = weight_of(cout, cin, kernel, 0.2)
        packed = pack(weight, chunk)
        args = (packed.entries, packed.begin, packed.slots, cin, cout, kernel, chunk)
        assert torch.equal(reference.decode(*args), weight)
        assert packed.nnz == int((weight != 0).sum()) == int(packed.begin[-1, -1, -1])
        assert sorted(packed.slots[packed.slots >= 0].tolist()) == list(range(cout))
    rows = torch.arange(1, GROUP + 1)
    weight = (torch.arange(GROUP)[None] < rows[:, None]).float()[:, :, None, None]
    per_warp = pack(weight, 64).begin[0, 0].diff().tolist()
    assert len(per_warp) == WARPS
    assert max(per_warp) - min(per_warp) <= 8 and sum(per_warp) == GROUP * (GROUP + 1) // 2


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler: the kernel's code cannot be run on the host")
    target = tmp_path_factory.mktemp("host") / "host.so"
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = ROOT / "tests" / "sparse_conv_host.cpp"
    command += [f"-I{ROOT / 'csrc' / 'cuda'}", "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_own_code_on_the_host(host: ctypes.CDLL, name: str) -> None:
    """Tiles, halos, chunks, slots and stores: what the GPU runs, thread after thread."""
    given = case(torch.float32, **CASES[name])
    x, packed, bias, residual, relu, weight = given
    y = torch.full(
        (x.shape[0], weight.shape[0], *x.shape[2:]), float("nan")
    ).contiguous(memory_format=torch.channels_last)  # fmt: skip
    problem = problem_of(
        x, packed.entries, packed.begin, packed.slots, bias, residual, y, packed.kernel,
        packed.chunk, relu,
    )  # fmt: skip
    assert host.otk_host_problem_size() == ctypes.sizeof(build.Problem)
    host.otk_host_sparse_conv(ctypes.byref(problem))
    close(y, given)


@pytest.mark.parametrize("kernel", [1, 3])
def test_two_blocks_fit_into_shared_memory(host: ctypes.CDLL, kernel: int) -> None:
    given = case(torch.float32, kernel, n=1)
    packed = given[1]
    problem = problem_of(
        given[0], packed.entries, packed.begin, packed.slots, given[2], None, given[0], kernel,
        packed.chunk, False,
    )  # fmt: skip
    floats = host.otk_host_shared_floats(ctypes.byref(problem))
    assert floats >= packed.chunk * plane(kernel)
    assert 2 * (4 * floats + 1024 + 256) <= 100 << 10, "sm_86 and sm_89 have 100 KB"


def test_nan_stays_where_a_nonzero_reads_it() -> None:
    weight = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    x = torch.zeros(1, 2, 3, 3)
    x[:, 0, 1, 1] = float("nan")
    found = sparse_conv2d_nhwc(x, pack(weight), torch.zeros(1), relu=True)
    assert found.isnan().sum() == 1


def test_gradients_opcheck_flops_and_autocast() -> None:
    x, packed, bias, residual, _, weight = case(
        torch.float64, 3, n=1, cin=3, cout=4, h=3, w=4, density=0.5, residual=True
    )
    leaves = (x.requires_grad_(), residual.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, r: sparse_conv2d_nhwc(x, packed, bias, r, relu=True), leaves
    )
    with pytest.raises(UnsupportedModelError, match="implicit_gemm_conv2d"):
        sparse_conv2d_nhwc(x, packed, bias.clone().requires_grad_()).sum().backward()
    x, packed, bias, *_ = case(torch.float32, 3, n=1, cin=4, cout=5, h=4, w=4)
    arguments = (
        x,
        packed.entries,
        packed.begin,
        packed.slots,
        bias,
        None,
        4,
        3,
        packed.chunk,
        True,
    )
    torch.library.opcheck(torch.ops.opentrans_kernels.sparse_conv2d_nhwc.default, arguments)
    with FlopCounterMode(display=False) as counter:
        sparse_conv2d_nhwc(x, packed, bias)
    assert counter.get_total_flops() == 2 * packed.nnz * 16
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse_conv2d_nhwc(x, packed, bias).dtype == torch.bfloat16


def test_bad_arguments_name_the_fix() -> None:
    x, packed, bias, *_ = case(torch.float32, 3)
    with pytest.raises(BadArgument, match="x has 3 channels, the pack expects 20"):
        sparse_conv2d_nhwc(x[:, :3], packed, bias)
    with pytest.raises(BadArgument, match="Pack the weights for this input"):
        sparse_conv2d_nhwc(x, packed, bias.half())
    with pytest.raises(PlanError, match="Leave other convolutions with PyTorch"):
        pack(torch.randn(4, 4, 5, 5))
    with pytest.raises(PlanError, match="leave it out"):
        pack(torch.randn(4, 4, 1, 1), 0)


def test_without_nvcc_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._resolve.cache_clear()
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    text = dispatch.explain("sparse_conv2d_nhwc", "cuda", "float32")
    assert "on cuda float32: reference" in text and "nvcc was not found" in text
    build.library.cache_clear()
    with pytest.raises(KernelUnavailable, match="Install the CUDA toolkit"):
        build.library(9, 0)
    monkeypatch.setattr(build, "sources", lambda: [])
    assert "installed without its CUDA sources" in str(build.why_not())
    dispatch._resolve.cache_clear()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_every_cu_file_compiles_without_spills(architecture: str, tmp_path: Path) -> None:
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found: no .cu file was compiled")
    files = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    assert files
    for file in files:
        done = subprocess.run(
            [nvcc, "-cubin", f"-arch={architecture}", "-O3", "-std=c++17", "-Xptxas", "-v",
             "-o", str(tmp_path / "out.cubin"), str(file)],
            capture_output=True, text=True,
        )  # fmt: skip
        report = done.stdout + done.stderr
        assert done.returncode == 0, report
        registers = [int(r) for r in re.findall(r"Used (\d+) registers", report)]
        spills = [int(s) for s in re.findall(r"(\d+) bytes spill", report)]
        print(f"{file.name} {architecture}: {len(registers)} kernels, {max(registers)} registers")
        assert len(registers) == 6 and max(registers) <= 168, "three blocks per multiprocessor"
        assert spills and not any(spills), report


def test_the_table_of_branches_leads_to_the_right_products(tmp_path: Path) -> None:
    """The host runs plain loops instead of these jumps, so their text is read."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found: no .cu file was compiled")
    source, target = ROOT / "csrc" / "cuda" / "sparse_conv.cu", tmp_path / "out.ptx"
    command = [nvcc, "-ptx", "-arch=sm_80", "-O3", "-std=c++17", "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = target.read_text()
    tables = re.findall(r"go: \.branchtargets ([^;]*);(.*?)done:", whole, re.S)
    assert sorted(len(names.split(",")) for names, _ in tables) == [8] * 3 + [24] * 3
    for names, text in tables:
        labels = [name.strip() for name in names.split(",")]
        taps = len(labels) // ROWS
        for code, label in enumerate(labels):
            part = re.search(rf"^{label}:(.*?)bra\.uni done;", text, re.S | re.M)
            assert part, label
            row, dy = divmod(code, taps)
            found = re.findall(r"fma\.rn\.f32 (\w+), (\w+), v, (\w+);", part[1])
            want = [(f"s{row}_{i}", f"w{i + dy}", f"s{row}_{i}") for i in range(LINES)]
            assert found == want, label
    for block in re.findall(r"\.reg \.f32 v, w<18>;.*?\n\s*\}", whole, re.S):
        taken = dict(re.findall(r"mov\.f32 (s\d_\d+), (%f\d+);", block))
        given = {name: register for register, name in
                 re.findall(r"mov\.f32 (%f\d+), (s\d_\d+);", block)}  # fmt: skip
        assert given == taken and len(set(taken.values())) == len(taken) == ROWS * LINES
        words = re.findall(r"mov\.f32 (w\d+), (%f\d+);", block)
        assert [name for name, _ in words] == [f"w{k}" for k in range(LINES + 2)]


def test_building_is_atomic_kept_and_explained(tmp_path: Path, monkeypatch) -> None:
    """With a stand-in for nvcc: a shell script that writes its output, or fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\necho 'sparse_conv.cu(1): error: no such thing' >&2\nexit 2\n")
    script.chmod(0o755)
    monkeypatch.setattr(build, "find_nvcc", lambda: str(script))
    build.library.cache_clear()
    with pytest.raises(KernelUnavailable, match="error: no such thing"):
        build.library(9, 0)
    folder = tmp_path / "opentrans_kernels" / "cuda"
    assert list(folder.iterdir()) == [], "nothing half-built stays"
    build.library.cache_clear()


@pytest.mark.slow
def test_the_library_is_built_once_and_loads(tmp_path: Path, monkeypatch) -> None:
    if build.find_nvcc() is None:
        pytest.skip("nvcc was not found: no library was built")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    library = build.library(9, 0)
    assert library.otk_sparse_conv_problem_size() == ctypes.sizeof(build.Problem)
    assert len(list((tmp_path / "opentrans_kernels" / "cuda").iterdir())) == 1
    build.library.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_on_a_device(name: str, dtype: torch.dtype) -> None:
    given = case(dtype, **CASES[name])
    close(on_device(given, "cuda").cpu(), given)


def on_device(given: tuple[Any, ...], device: str) -> torch.Tensor:
    """The CUDA kernel, forced by name, into an output full of NaN."""
    from opentrans_kernels.ops.sparse_conv2d_nhwc import cuda

    x, packed, bias, residual, relu, _ = given
    packed = packed.to(device)
    before = cuda.empty_nhwc
    cuda.empty_nhwc = lambda *size: before(*size).fill_(float("nan"))
    try:
        return cuda.sparse_conv2d_nhwc(
            x.to(device), packed.entries, packed.begin, packed.slots, bias.to(device),
            None if residual is None else residual.to(device), packed.cin, packed.kernel,
            packed.chunk, relu,
        )  # fmt: skip
    finally:
        cuda.empty_nhwc = before
