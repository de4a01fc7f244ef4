"""Every instruction set of this CPU, forced in its own process, and the refusal of all others."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import fresh_process
import pytest

from opentrans_kernels import native

ROOT = Path(__file__).resolve().parents[1]
ALL = ("avx512", "avx2", "neon", "generic")
pytestmark = pytest.mark.usefixtures("extension")


def cpu_flags() -> set[str]:
    """The flags the system reports, read without the extension's help."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        pytest.skip("/proc/cpuinfo is not readable, so the CPU's instruction sets are not known")
    for line in lines:
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(values.split())
    return set()


def supported() -> dict[str, bool]:
    if platform.machine() in ("aarch64", "arm64"):
        return {"avx512": False, "avx2": False, "neon": True, "generic": True}
    flags = cpu_flags()
    wide = {"avx512f", "avx512vl", "avx512bw", "avx512dq"}
    return {
        "avx512": wide <= flags,
        "avx2": {"avx2", "fma"} <= flags,
        "neon": False,
        "generic": True,
    }


def child(code: str, capability: str | None) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("OPENTRANS_")}
    if capability is not None:
        environ["OPENTRANS_CPU_CAPABILITY"] = capability
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return fresh_process.run(code, environment=environ)


def test_the_best_one_is_chosen_by_default() -> None:
    best = next(name for name in ALL if supported()[name])
    done = child("from opentrans_kernels import native; print(native.cpu_capability())", None)
    assert done.stdout.strip() == best, done.stderr


@pytest.mark.parametrize("capability", ALL)
def test_a_forced_one_keeps_the_contract(capability: str) -> None:
    if not supported()[capability]:
        pytest.skip(f"this CPU has no {capability}")
    done = child(
        """
        import torch
        import deform_cases
        from kernel_cases import guarded_inputs, sweep
        from opentrans_kernels import native
        torch.manual_seed(0)
        torch.set_num_threads(1)
        print(native.cpu_capability(), sweep(), guarded_inputs(), deform_cases.sweep())
        torch.set_num_threads(3)
        print(sweep(), deform_cases.sweep())
        """,
        capability,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    name, results, guarded, sampled, *threaded = done.stdout.split()
    assert name == capability
    assert int(results) >= 250 and int(guarded) >= 40 and int(sampled) >= 60
    assert [results, sampled] == threaded


@pytest.mark.parametrize("capability", ALL)
def test_threads_batch_and_repetition_do_not_change_a_bit(capability: str) -> None:
    if not supported()[capability]:
        pytest.skip(f"this CPU has no {capability}")
    code = """
        import torch
        from kernel_cases import masked_weight
        from opentrans_kernels import ops
        from opentrans_kernels.pack import SparseWeight
        for kernel in (1, 3):
            weight = masked_weight(70, 70, kernel, 0.3)
            packed = SparseWeight.from_dense(weight, None, 1, kernel // 2)
            x = torch.randn(3, 70, 15, 13)
            torch.set_num_threads(1)
            once = ops.sparse_conv2d(x, packed)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(ops.sparse_conv2d(x, packed), once), (kernel, threads)
                alone = torch.cat([ops.sparse_conv2d(image[None], packed) for image in x])
                assert torch.equal(alone, once), (kernel, threads)
        print("same")
        """
    done = child(code, capability)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


REFUSED = """
    import torch
    from kernel_cases import bottleneck_parts, masked_weight
    from opentrans_kernels import native, ops
    from opentrans_kernels.errors import OpenTransError
    from opentrans_kernels.pack import SparseWeight
    packed = SparseWeight.from_dense(masked_weight(4, 3, 1, 0.5))
    x = torch.randn(1, 3, 4, 4)
    calls = (
        lambda: native.cpu_capability(),
        lambda: ops.sparse_conv2d(x, packed),
        lambda: ops.avg_pool2d(x, 2),
        lambda: ops.max_pool2d(x, 2),
        lambda: ops.window_avg_pool2d(x, 2),
        lambda: ops.sparse_bottleneck(x, *bottleneck_parts(3, 2, 3, 0.5, False)[1]),
    )
    for call in calls:
        try:
            call()
        except (OpenTransError, RuntimeError) as error:
            print(str(error).splitlines()[0])
        else:
            print("ran")
    """


@pytest.mark.parametrize("capability", [*ALL, "avx1024"])
def test_one_that_this_cpu_lacks_raises_in_every_op(capability: str) -> None:
    if supported().get(capability):
        pytest.skip(f"this CPU has {capability}")
    done = child(REFUSED, capability)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and all("OPENTRANS_CPU_CAPABILITY" in line for line in lines), lines
    assert all("unset" in line.lower() for line in lines), lines


def test_this_process_reports_a_supported_one() -> None:
    name = native.cpu_capability()
    assert name is not None and supported()[name]
