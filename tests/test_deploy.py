"""The ways of ``docs/deploy.md``: an AOTInductor package, from Python and from a C++ program."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from pathlib import Path

import accel_nets as nets
import pytest
import torch

import opentrans_kernels as otk
from opentrans_kernels import native
from opentrans_kernels.ops.library import schemas

SOURCE = Path(__file__).resolve().parents[1] / "docs" / "deploy" / "serve.cpp"
pytestmark = pytest.mark.usefixtures("extension")


def image(*size: int) -> torch.Tensor:
    return torch.arange(math.prod(size), dtype=torch.float32).div(1000).view(size)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    model = nets.randomise(nets.tower())
    assert otk.accelerate(model, nets.random_masks(model), measure=False).accelerated
    batch = torch.export.Dim("batch", min=1, max=16)
    with torch.no_grad():
        program = torch.export.export(model, (image(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
        path = tmp_path_factory.mktemp("deploy") / "model.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return model, path


def test_schemas_cover_every_operator_that_a_program_calls() -> None:
    found = schemas()
    assert len(found) == len(set(found)) >= 10
    for op in ("sparse_conv2d", "sparse_bottleneck", "sparse_stage", "avg_pool2d"):
        (schema,) = (one for one in found if one.startswith(f"opentrans_kernels::{op}("))
        assert schema == str(getattr(torch.ops.opentrans_kernels, op).default._schema)


@pytest.mark.slow
def test_a_package_in_python(packaged) -> None:
    model, path = packaged
    run = torch._inductor.aoti_load_package(str(path))
    for n in (1, 2, 5):
        with torch.no_grad():
            torch.testing.assert_close(run(image(n, 3, 64, 64)), model(image(n, 3, 64, 64)))


@pytest.mark.slow
def test_a_package_in_a_program_without_python(packaged, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: set CXX, or install g++")
    model, path = packaged
    root = Path(torch.__file__).parent
    program = tmp_path / "serve"
    subprocess.run(
        [compiler, "-std=c++20", "-O1", SOURCE, "-o", program,
         f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}",
         f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed",
         "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"],
        check=True,
    )  # fmt: skip
    table = tmp_path / "schemas.txt"
    table.write_text("\n".join(schemas()) + "\n", encoding="utf-8")
    (library,) = Path(native.__file__).parent.glob("_C.*so")
    size = (3, 3, 64, 64)
    done = subprocess.run(
        [program, path, table, library, *map(str, size)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(image(*size))
    shape, _, total = done.stdout.strip().rpartition(" ")
    assert shape == str(list(expected.shape))
    assert float(total) == pytest.approx(float(expected.double().sum()), rel=1e-4)


def test_the_documented_command_is_the_one_that_is_tested() -> None:
    text = (SOURCE.parents[1] / "deploy.md").read_text(encoding="utf-8")
    for part in ("-std=c++20", "-Wl,--no-as-needed", "-ltorch -ltorch_cpu -lc10 -ldl"):
        assert part in text
