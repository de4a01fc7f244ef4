"""The estimate shared out over ranks: two real processes, equal bits, no hang when one fails."""

from __future__ import annotations

import pickle
import textwrap
from pathlib import Path

import fresh_process
import pytest
import torch
from freeze_cases import Chain
from torch import nn

from opentrans import freeze_plan
from opentrans_kernels.errors import OpenTransError, UnsupportedModelError
from opentrans_kernels.spectrum import AlphaTable, estimate_alpha, select
from opentrans_kernels.spectrum.distributed import (
    check_same,
    estimate_alpha_distributed,
    shares,
)
from opentrans_kernels.spectrum.parts import solving_cost, weight_digest

HERE = Path(__file__).parent

CASES = ("good", "nan on rank 1", "other weights", "no layers on rank 0", "plans differ")
WORKER = """
import os, pickle, sys
from datetime import timedelta
import torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
from freeze_cases import Chain
from opentrans import freeze_plan
from opentrans_kernels.spectrum.distributed import check_same, estimate_alpha_distributed

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
store = dist.FileStore(folder + "/store", 2)
wait = timedelta(seconds=300)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=wait)


def run(case):
    torch.manual_seed(0)
    model = Chain(6, width=12)
    if case == "nan on rank 1" and rank == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
    if case == "other weights" and rank == 1:
        with torch.no_grad():
            model.conv3.weight[0, 0, 0, 0] += 1
    if case == "no layers on rank 0" and rank == 0:
        model = torch.nn.ReLU()
    seen = []
    table = estimate_alpha_distributed(
        model, "xmin_mid", keep_spectra=True, progress=lambda *step: seen.append(step)
    )
    plan = freeze_plan(model, table, "median")
    check_same("freeze plan", plan.digest())
    if case == "plans differ":
        check_same("freeze plan", str(rank))
    spectra = {{name: values.tolist() for name, values in table.spectra.items()}}
    return dict(table=table.to_json(), plan=plan.to_json(), digest=plan.digest(),
                solved=len(seen), spectra=spectra)


results = {{}}
for case in {cases!r}:
    try:
        results[case] = run(case)
    except Exception as error:
        results[case] = dict(error=f"{{type(error).__name__}}: {{error}}")
    dist.barrier()
with open(f"{{folder}}/{{rank}}.pkl", "wb") as file:
    pickle.dump(results, file)
dist.barrier()
dist.destroy_process_group()
# gloo has threads that rarely abort a process while Python is torn down; all is written by now.
os._exit(0)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """What each of two processes got, case by case."""
    folder = tmp_path_factory.mktemp("ranks")
    code = textwrap.dedent(WORKER.format(tests=str(HERE), cases=CASES))
    for done in fresh_process.run_together(code, [(rank, folder) for rank in range(2)]):
        assert done.returncode == 0, done.stderr
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(2)]


def same_model() -> nn.Module:
    torch.manual_seed(0)
    return Chain(6, width=12)


def test_two_ranks_agree_to_the_bit(ranks) -> None:
    first, second = (results["good"] for results in ranks)
    assert "error" not in first and "error" not in second, (first, second)
    assert first["table"] == second["table"] and first["plan"] == second["plan"]
    assert first["spectra"] == second["spectra"]
    alone = estimate_alpha(same_model(), "xmin_mid")
    assert first["solved"] and second["solved"]
    assert first["solved"] + second["solved"] == len(alone) == len(first["spectra"])
    shared = AlphaTable.from_json(first["table"])
    assert [row.name for row in shared] == [row.name for row in alone]
    for row, other in zip(shared, alone, strict=True):
        assert row.alpha == pytest.approx(other.alpha, rel=1e-12)
    assert freeze_plan(same_model(), alone, "median").digest() == first["digest"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "nan on rank 1",
            ("1 of 2 ranks, so no rank has a table. rank 1: ", "UnsupportedModelError: "),
        ),
        ("other weights", ("ranks 1 differ from rank 0", "broadcast the weights from rank 0")),
        ("no layers on rank 0", ("nothing to measure", "rank 0: UnsupportedModelError")),
        ("plans differ", ("freeze plan: ranks 1 differ", "freeze plan: ranks 1 differ")),
    ],
)
def test_a_failure_reaches_every_rank(ranks, case: str, words: tuple[str, str]) -> None:
    for results, expected in zip(ranks, words, strict=True):
        assert expected in results[case]["error"]


def test_alone_it_is_the_plain_estimate() -> None:
    model = same_model()
    shared, plain = estimate_alpha_distributed(model, "ks"), estimate_alpha(model, "ks")
    assert shared.rows == plain.rows and shared.skipped == plain.skipped
    check_same("freeze plan", "anything")
    with pytest.raises(UnsupportedModelError, match="nothing to measure"):
        estimate_alpha_distributed(nn.ReLU())
    with pytest.raises(OpenTransError, match="xmin_mid"):
        estimate_alpha_distributed(model, "median")


@pytest.mark.parametrize("world", [1, 2, 3, 50])
def test_shares_cover_every_layer_once_and_are_even(world: int) -> None:
    layers = select({f"w{i}": torch.zeros(8 + 3 * i, 64) for i in range(20)}, linear_aspect=None)
    found = shares(layers, world)
    assert sorted(index for part in found for index in part) == list(range(20))
    loads = [sum(solving_cost(layers[index]) for index in part) for part in found]
    costs = [solving_cost(layer) for layer in layers]
    best = max(sum(costs) / world, max(costs))
    assert len(found) == world and max(loads) <= 4 / 3 * best
    assert found == shares(layers, world)


def test_digest_sees_bits_dtype_and_shape() -> None:
    weight = torch.randn(4, 6)
    assert weight_digest(weight) == weight_digest(weight.t().contiguous().t())
    changed = weight.clone()
    changed[0, 0] = -changed[0, 0]
    others = [changed, weight.t(), weight.double(), weight.bfloat16(), weight.reshape(6, 4)]
    assert len({weight_digest(one) for one in [weight, *others]}) == 6
