"""The 2:4 prototype: its format, its code run on the host instruction by instruction, its build."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opentrans_kernels.ops.nvcc import find_nvcc

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "gpu" / "prototype"
LATE, EARLY, RANDOM = 0, 1, 2
NHWC = torch.channels_last


@pytest.fixture(scope="module", autouse=True)
def prototype() -> Any:
    sys.path.insert(0, str(FOLDER.parent))
    try:
        from prototype import library, pack

        yield (library, pack)
    finally:
        sys.path.remove(str(FOLDER.parent))


def masked(cout: int, cin: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(cout, cin, 3, 3, generator=generator)
    weight *= torch.rand(weight.shape, generator=generator) < density
    return weight.bfloat16().float()


@pytest.mark.parametrize("density", [0.0, 0.02, 0.2, 1.0])
def test_packing_is_lossless(prototype: Any, density: float) -> None:
    _, pack = prototype
    weight = masked(128, 128, density)
    packed = pack.pack(weight, 300)
    assert torch.equal(pack.decode(packed), weight)
    assert sorted(packed.rows.tolist()) == sorted(packed.channels.tolist()) == list(range(128))
    assert packed.dense == 2 * 128 * 128 * 9 // (64 * 32)
    expected = {0.0: 0, 1.0: packed.dense}
    assert packed.slices == expected.get(density, packed.slices) <= packed.dense
    assert packed.begin[-1] == (len(packed.used) if density else 0)


def test_crowded_rows_and_channels_leave_slices_empty(prototype: Any) -> None:
    _, pack = prototype
    rows, columns = torch.randperm(256)[:64], torch.randperm(128)[:32]
    weight = torch.zeros(256, 128, 3, 3)
    weight[rows[:, None], columns] = torch.randn(64, 32, 3, 3)
    packed = pack.pack(weight, 0)
    assert packed.slices == 2 * 9, "one block and one slice of channels, both parts, nine taps"
    assert set(packed.rows[:64].tolist()) == set(rows.tolist())
    scattered = masked(256, 128, 0.03)
    assert pack.pack(scattered, 2000).slices < pack.pack(scattered, 0).slices


def test_every_stored_group_has_two_rising_places(prototype: Any) -> None:
    """Equal places are undefined behaviour of the instruction, zeros or not."""
    _, pack = prototype
    packed = pack.pack(masked(128, 64, 0.05), 50)
    for group in packed.groups.numpy():
        words = group[: pack.HEADER].view("int32")
        assert 1 <= words[0] <= pack.SLICES // 2
        count = 2 * int(words[0])
        indices = group[pack.HEADER : pack.HEADER + count * pack.INDICES].view("uint32")
        for shift in range(0, 32, 4):
            pair = indices >> shift & 15
            assert ((pair & 3) < (pair >> 2)).all()


def test_what_it_does_not_take(prototype: Any) -> None:
    _, pack = prototype
    for shape in ((64, 64, 3, 3), (128, 32, 3, 3), (128, 64, 1, 1)):
        with pytest.raises(ValueError, match=r"multiple of 128 output and of 64 input"):
            pack.pack(torch.zeros(shape))


def compiled(folder: Path, header: str | None = None) -> ctypes.CDLL:
    """The kernel on the host; ``header`` instead of two_four_conv.h."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler: the kernel's code cannot be run on the host")
    if header is not None:
        (folder / "two_four_conv.h").write_text(header)
    target = folder / "host.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    done = subprocess.run(
        [compiler, *flags, f"-I{folder}", f"-I{FOLDER}", f"-I{ROOT / 'tests'}", "-o", str(target),
         str(ROOT / "tests" / "two_four_host.cpp")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("host"))


def run(
    prototype: Any, host: ctypes.CDLL, weight: torch.Tensor, size: tuple[int, int, int],
    rows: int = 16, blocks: int = 1, when: int = RANDOM, relu: bool = True, seed: int = 0,
) -> tuple[str, float]:  # fmt: skip
    """(what the emulation objects to, error); the error is judged in units of bfloat16's."""
    library, pack = prototype
    packed = pack.pack(weight, 50)
    cout, cin = weight.shape[:2]
    x = torch.randn(size[0], cin, *size[1:]).bfloat16().contiguous(memory_format=NHWC)
    bias = torch.randn(cout)
    y = torch.full((size[0], cout, *size[1:]), float("nan")).bfloat16()
    y = y.contiguous(memory_format=NHWC)
    problem = library.problem_of(x, packed, bias, y, relu)
    message = ctypes.create_string_buffer(400)
    host.otk_host_two_four(ctypes.byref(problem), rows, blocks, seed, when, message, 400)
    ordered = weight[packed.rows][:, packed.channels].double()
    want = F.conv2d(x.double(), ordered, bias.double(), padding=1)
    want = want.clamp_min(0) if relu else want
    error = (y.double() - want).abs().max() / want.abs().max()
    return message.value.decode(), float(error)


@pytest.mark.parametrize("when", [LATE, EARLY, RANDOM])
@pytest.mark.parametrize(
    ("rows", "size", "cout", "cin", "density", "blocks"),
    [
        (16, (1, 1, 1), 128, 64, 0.3, 1),
        (16, (2, 17, 9), 128, 128, 0.1, 3),
        (25, (1, 26, 8), 256, 64, 0.05, 2),
        (32, (1, 33, 5), 128, 64, 0.6, 2),
        (16, (1, 3, 9), 128, 64, 0.0, 1),
    ],
)
def test_the_kernels_own_code_on_the_host(
    prototype: Any, host: ctypes.CDLL, rows: int, size: tuple[int, int, int], cout: int, cin: int,
    density: float, blocks: int, when: int,
) -> None:  # fmt: skip
    """All roles of a block, in random order, with asynchronous work done as late as it may be."""
    weight = masked(cout, cin, density)
    problem, error = run(prototype, host, weight, size, rows, blocks, when, relu=when != EARLY)
    assert not problem
    assert error < 4e-3


#: What is taken out of the kernel, what for, and with which words the emulation notices it; None:
#: a wrong result is enough.
SABOTAGE = {
    "no fence behind copies": ("      fence_async();\n", "", "no fence.proxy.async follows"),
    "copies not waited for": ("      copies_wait();\n", "", "before the copies were waited for"),
    "weights released too early": ("multiply_wait<1>();", "multiply_wait<3>();", None),
    "image released too early": ("      multiply_wait<0>();\n", "", "never waited for"),
    "wrong parity": ("ring.parity ^ 1);\n      const uint32_t full", "ring.parity);\n"
                     "      const uint32_t full", "every thread waits"),
    "too few arrivals": ("barrier_init(barriers.image_full(stage), kCopiers)",
                         "barrier_init(barriers.image_full(stage), kCopiers / 2)", None),
    "no fence before multiplying": ("          multiply_fence();\n", "", "wgmma.fence must come"),
    "tap shifted": ("(place & 255) * 16", "(place & 255) * 16 + 16", None),
    "planes too close": ("16 * (halo | 1)", "16 * (halo - 3)", None),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTAGE)
def test_the_emulation_notices_what_a_gpu_would_punish(
    prototype: Any, tmp_path: Path, name: str
) -> None:
    old, new, words = SABOTAGE[name]
    header = (FOLDER / "two_four_conv.h").read_text()
    assert old in header, "the kernel has changed: change the sabotage too"
    broken = compiled(tmp_path, header.replace(old, new))
    weight = masked(128, 128, 0.5)
    seen = [run(prototype, broken, weight, (1, 9, 9), when=when, seed=when) for when in range(3)]
    noticed = [problem or "None" for problem, error in seen if problem or not error < 4e-3]
    assert noticed, seen
    if words is not None:
        assert any(re.search(words, problem) for problem in noticed), noticed


def test_shared_memory_fits(host: ctypes.CDLL) -> None:
    assert host.otk_host_two_four_shared(32) <= 227 << 10, "what sm_90 gives to a block"


def test_it_compiles_for_hopper_without_spills_or_waits_between_products(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found: two_four_conv.cu was not compiled")
    target = tmp_path / "out.cubin"
    done = subprocess.run(
        [nvcc, "-cubin", "-arch=sm_90a", "-O3", "-std=c++17", "-Xptxas", "-v", "-o", str(target),
         str(FOLDER / "two_four_conv.cu")],
        capture_output=True, text=True,
    )  # fmt: skip
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert len(re.findall(r"Used \d+ registers", report)) == 3
    spills = [int(s) for s in re.findall(r"(\d+) bytes spill", report)]
    assert spills and not any(spills), report
    assert "serialized" not in report and "arrive is injected" not in report, report
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    code = subprocess.run([str(tool), "-sass", str(target)], capture_output=True, text=True).stdout
    for n in (128, 200, 256):
        assert f"HGMMA.SP.64x{n}x32.F32.BF16" in code


def test_the_library_is_built_as_a_gpu_machine_builds_it(
    prototype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_nvcc() is None:
        pytest.skip("nvcc was not found: no library was built")
    library, _ = prototype
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.library.cache_clear()
    loaded = library.library()
    assert loaded.otk_two_four_problem_size() == ctypes.sizeof(library.Problem)
    library.library.cache_clear()
