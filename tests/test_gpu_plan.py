"""The CUDA path planned and run on the CPU: exact, measured choices, kept on disk, restorable."""

from __future__ import annotations

import json
from pathlib import Path

import accel_nets as nets
import gpu_cases as cases
import pytest
import torch
from torch import nn
from triton_tools import why_no_triton

from opentrans_kernels.errors import KernelUnavailable
from opentrans_kernels.gpu import (
    PRECISIONS,
    Place,
    Precision,
    TuneCache,
    dense_program,
    describe_network,
    plan_trunk,
    program_of,
)
from opentrans_kernels.gpu import kernels as gpu_kernels
from opentrans_kernels.gpu.cache import cache_key
from opentrans_kernels.gpu.kernels import candidates
from opentrans_kernels.gpu.network import MULTIPLE
from opentrans_kernels.gpu.warm import jobs_of
from opentrans_kernels.masks import MaskSet

OURS = {"gemm": 1.0, "gather": 1.5}


def nhwc(x: torch.Tensor, precision: str) -> torch.Tensor:
    dtype = Precision.of(precision).dtype
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def masks_of(kind: str, model: nn.Module):
    return None if kind == "none" else getattr(nets, f"{kind}_masks")(model)


PRICES = (OURS, {"matmul": 1.0}, {"sparse": 1.0}, {"gather": 1.0})
EXACT = [
    (("random", "killing", "none")[i % 3], precision, PRICES[(i + j) % 4])
    for j, precision in enumerate(PRECISIONS)
    for i in range(3)
]


@pytest.mark.parametrize(("kind", "precision", "prices"), EXACT, ids=str)
def test_planned_trunks_are_exact(kind: str, precision: str, prices: dict[str, float]) -> None:
    model = nets.tower()
    masks = masks_of(kind, model)
    dense = nets.masked(model, masks)
    place = cases.place(precision)
    plan, network = plan_trunk(cases.subject(model, masks), place, timer=cases.Prices(**prices))
    if kind == "killing" or (kind == "random" and "gather" not in prices):
        assert any(row.kernel.startswith(tuple(prices)) for row in plan.rows)
    for program in (program_of(plan, network, place), dense_program(plan, network, place)):
        for n, h, w in ((2, 64, 64), (1, 33, 47)):
            x = torch.randn(n, 3, h, w)
            cases.check_trunk(program(nhwc(x, precision)), dense, x, precision)


def test_ties_go_to_dense_and_dense_is_always_measured() -> None:
    model = nets.tower()
    timer = cases.Prices()
    plan, _ = plan_trunk(cases.subject(model, nets.random_masks(model)), cases.place(), timer=timer)
    assert {row.kernel for row in plan.rows} == {"aten"}, "equal times: no reason to leave dense"
    for row in plan.rows:
        assert row.dense == "aten" and row.ms <= row.dense_ms
    assert sum(name.endswith(" aten") for name in timer.timed) >= 10
    assert len(timer.timed) == len(set(timer.timed)), "equal layers are timed once"


def test_the_faster_candidate_wins_layer_by_layer() -> None:
    model = nets.tower()
    timer = cases.Prices(**{"layer2.0.conv2 gemm": 1.0, "layer3.0.conv1 matmul": 0.5})
    plan, network = plan_trunk(cases.subject(model, None), cases.place(), timer=timer)
    chosen = {row.name: row.kernel for row in plan.rows if row.kernel != "aten"}
    assert chosen == {"layer2.0.conv2": "gemm:any", "layer3.0.conv1": "matmul"}
    row = next(row for row in plan.rows if row.name == "layer3.0.conv1")
    assert row.times == {"aten": 2.0, "matmul": 0.5, "gemm:any": 2.0}
    assert "density of 100% is above" in row.rejected["sparse"]
    assert "runs on CUDA" in row.rejected["cudnn"]
    text = str(plan)
    assert "layer3.0.conv1" in text and "matmul" in text and "left out: cudnn" in text


def wide_tower() -> nn.Module:
    """Wide enough for widths to shrink by whole multiples."""
    net = nets.clip_resnet.ModifiedResNet((2, 1, 1, 1), 64, 4, image_size=64, width=32)
    return nets.randomise(net)


def test_compact_widths_are_padded_exact_and_chosen_only_if_faster() -> None:
    model = wide_tower()
    masks = nets.killing_masks(model)
    dense = nets.masked(model, masks)
    subject = cases.subject(model, masks)
    network = describe_network(subject)
    compact = [b for b in network.blocks if "compact" in b.variants]
    assert len(compact) >= 3
    for block in compact:
        full, narrow = block.variants["full"], block.variants["compact"]
        assert narrow[0].weight.shape[1] == full[0].weight.shape[1]
        assert narrow[-1].weight.shape[0] == full[-1].weight.shape[0]
        assert all(layer.weight.shape[0] % MULTIPLE == 0 for layer in narrow)
        assert sum(i.weight.numel() for i in narrow) < sum(i.weight.numel() for i in full)
    place = cases.place()
    x = torch.randn(2, 3, 64, 96)
    for name, sign in (("compact", 1), ("full", -1)):

        def timer(label: str, run, sign: int = sign) -> float:
            return 1e9 + sign * run().numel()  # narrow layers have small outputs

        plan, _ = plan_trunk(subject, place, timer=timer, network=network)
        assert all(plan.variants[block.name] == name for block in compact)
        cases.check_trunk(program_of(plan, network, place)(x), dense, x, "float32")


def crowded_masks(model: nn.Module) -> MaskSet:
    """The 3x3 of every block lives in half of its rows and columns, scattered over all."""
    masks = {}
    for name, conv in nets.convs(model).items():
        if conv.kernel_size == (3, 3) and name.startswith("layer"):
            rows, columns = (torch.rand(c).argsort() < c // 2 for c in conv.weight.shape[:2])
            masks[name] = (rows[:, None] & columns)[:, :, None, None].expand_as(conv.weight)
    return MaskSet.from_tensors(masks)


def test_inner_channels_are_ordered_so_that_slices_run_empty() -> None:
    model = wide_tower()
    masks = crowded_masks(model)
    dense, place = nets.masked(model, masks), cases.place()
    subject = cases.subject(model, masks)
    network = describe_network(subject)
    shares = {}
    for block in network.blocks:
        for layer in block.variants["full"]:
            live = layer.weight != 0
            if layer.kernel == 3:
                for dims in ((1, 2, 3), (0, 2, 3)):
                    counts = live.sum(dims)
                    assert torch.equal(counts, counts.sort(descending=True).values)
            found = candidates(layer, place, (1, 8, 8))[0]
            for candidate in found:
                if candidate.name.startswith("slices"):
                    shares[layer.name] = candidate.share
    assert set(shares) == {"layer3.0.conv2", "layer4.0.conv2"}, "the others are a tile wide"
    assert all(0.2 < share < 0.7 for share in shares.values())
    plan, network = plan_trunk(subject, place, timer=cases.Prices(slices=1.0), network=network)
    assert {row.name for row in plan.rows if row.kernel.startswith("slices")} == set(shares)
    x = torch.randn(2, 3, 64, 96)
    cases.check_trunk(program_of(plan, network, place)(nhwc(x, "float32")), dense, x, "float32")


def test_chains_are_taken_where_they_are_faster_and_stay_exact() -> None:
    net = nets.clip_resnet.ModifiedResNet((3, 2, 1, 1), 64, 4, image_size=64, width=16)
    model = nets.randomise(net)
    masks = nets.killing_masks(model)
    dense, place = nets.masked(model, masks), cases.place()
    x = torch.randn(2, 3, 64, 64)
    for price, taken in ((2.0, 3), (5.9, 3), (6.0, 0)):  # instead of three kernels of 2 ms each
        timer = cases.Prices(chain=price, **{"stem stem": 5.0})
        plan, network = plan_trunk(cases.subject(model, masks), place, timer=timer)
        assert len(plan.chains) == taken
        assert not set(plan.chains) - {"layer1.1", "layer1.2", "layer2.1"}
        program = program_of(plan, network, place)
        found = program(nhwc(x, "float32"))
        cases.check_trunk(found, dense, x, "float32")
        torch.testing.assert_close(program.stage(1, found[1]), found[2])
        assert "identity shortcut" in str(plan)
        assert "not chained: stem: 5.0000 ms instead of 4.0000" in str(plan)
        if taken:
            assert plan.chains["layer1.1"] == ("chain:any", price, 6.0)
            assert "in one kernel" in str(plan)
    halves = cases.place("float16")
    plan, network = plan_trunk(cases.subject(model, masks), halves, timer=cases.Prices(chain=1.0))
    cases.check_trunk(program_of(plan, network, halves)(nhwc(x, "float16")), dense, x, "float16")


def test_stages_alone_and_the_torchvision_form() -> None:
    from torchvision.models.resnet import Bottleneck, ResNet

    for block_layers in ((1, 1, 1, 1), (2, 1, 1, 1)):
        model = nets.randomise(ResNet(Bottleneck, list(block_layers), width_per_group=16))
        place = cases.place()
        plan, network = plan_trunk(cases.subject(model, None), place, timer=cases.Prices(**OURS))
        x = torch.randn(1, 3, 64, 80)
        program = program_of(plan, network, place)
        found = program(nhwc(x, "float32"))
        cases.check_trunk(found, model, x, "float32")
        torch.testing.assert_close(program.stage(2, found[2]), found[3])


def test_choices_are_kept_and_found_again(tmp_path: Path, caplog) -> None:
    model = nets.tower()
    subject, place = cases.subject(model, nets.random_masks(model)), cases.place()
    cache = TuneCache(tmp_path / "new")
    first, _ = plan_trunk(subject, place, timer=cases.Prices(gemm=1.0), cache=cache)
    (file,) = (tmp_path / "new").iterdir()

    def never(name: str, run) -> float:
        raise AssertionError("nothing may be measured again")

    again, _ = plan_trunk(subject, place, timer=never, cache=cache)
    assert again.cached and not first.cached
    assert again.kernels == first.kernels and "from the cache" in str(again)
    for damage in ("{", "[]", '{"key": {}, "record": {}}', "null"):
        file.write_text(damage)
        caplog.clear()
        plan, _ = plan_trunk(subject, place, timer=cases.Prices(matmul=1.0), cache=cache)
        assert not plan.cached and "tuning again" in caplog.text and file.name in caplog.text
    record = json.loads(file.read_text())
    record["record"]["rows"][-1]["kernel"] = "gone"
    file.write_text(json.dumps(record))
    plan, _ = plan_trunk(subject, place, timer=cases.Prices(), cache=cache)
    assert not plan.cached and "no kernel 'gone' here" in caplog.text


def test_every_part_of_the_key_matters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = nets.tower()
    a = cases.subject(model, nets.random_masks(model))
    other_masks = cases.subject(model, nets.random_masks(model, seed=5))
    other_net = cases.subject(nets.tower().requires_grad_(False), None, (64, 96))
    paths = {
        TuneCache(tmp_path).path(cache_key(*given))
        for given in (
            (a, cases.place(), (1, 64, 64)), (a, cases.place(), (2, 64, 64)),
            (a, cases.place("tf32"), (1, 64, 64)), (other_masks, cases.place(), (1, 64, 64)),
            (other_net, cases.place(), (1, 64, 64)),
        )
    }  # fmt: skip
    from opentrans_kernels.gpu import cache as module

    for part in ("versions", "_sources"):
        monkeypatch.setattr(module, part, lambda: "changed")
        paths.add(TuneCache(tmp_path).path(cache_key(a, cases.place(), (1, 64, 64))))
    assert len(paths) == 7
    assert TuneCache(None).path({}) is None


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    model = nets.tower()
    plan, _ = plan_trunk(
        cases.subject(model, None), cases.place(), timer=cases.Prices(),
        cache=TuneCache(tmp_path / "file" / "below"),
    )  # fmt: skip
    assert plan.rows and "tuning results are not kept" in caplog.text


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch):
    """Adds a candidate whose function is given to every layer."""

    def add(function) -> None:
        before = gpu_kernels.candidates

        def more(layer, place, size):
            found, rejected = before(layer, place, size)
            return [*found, gpu_kernels.Candidate("broken", False, lambda _: function)], rejected

        monkeypatch.setattr("opentrans_kernels.gpu.tune.candidates", more)

    return add


def _out_of_memory(x, residual, x2):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nAnd more.")


def _wrong(x, residual, x2):
    return x[:, :1]


def _nan(x, residual, x2):
    return torch.full((1, 4, 32, 32), float("nan"))


def _crash(x, residual, x2):
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (_out_of_memory, "out of memory: CUDA out of memory. Tried to allocate 9 GiB."),
        (_wrong, "it computes [1, "),
        (_nan, "its error nan exceeds"),
        (_crash, "RuntimeError: no kernel image"),
    ],
)
def test_a_failing_candidate_is_left_out_with_its_reason(
    broken, set_env, caplog, function, words: str
) -> None:
    model = nets.tower()
    broken(function)
    plan, _ = plan_trunk(cases.subject(model, None), cases.place(), timer=cases.Prices(broken=0.1))
    assert all(row.kernel != "broken" for row in plan.rows)
    assert words in plan.rows[0].rejected["broken"] and words in caplog.text
    assert "left out: broken" in str(plan)
    set_env(OPENTRANS_STRICT="1")
    with pytest.raises(KernelUnavailable, match="OPENTRANS_STRICT=1") as caught:
        plan_trunk(cases.subject(model, None), cases.place(), timer=cases.Prices())
    assert words in str(caught.value) and "unset it" in str(caught.value)


def test_kernels_of_a_gpu_are_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates of an H200, seen from a machine without one; launches are only recorded."""
    if (reason := why_no_triton()) is not None:
        pytest.skip(reason)
    from opentrans_kernels.ops.implicit_gemm_conv2d import triton as kernels
    from opentrans_kernels.ops.launch import OPTIONS

    model = wide_tower()
    subject = cases.subject(model, nets.killing_masks(model))
    place = Place(torch.device("cuda"), Precision.of("bfloat16"), (9, 0))
    network = describe_network(subject)
    launched: list[tuple[tuple, dict]] = []
    monkeypatch.setattr(
        kernels.conv_kernel, "warmup", lambda *a, **k: launched.append((a, k)), raising=False
    )
    from opentrans_kernels.ops.bottleneck_chain import triton as chains

    chained: list[tuple[tuple, dict]] = []
    monkeypatch.setattr(
        chains.chain_kernel, "warmup", lambda *a, **k: chained.append((a, k)), raising=False
    )
    for job in jobs_of(network, place, (2, 64, 64)):
        job()
    options = 3 + len(OPTIONS)  # grid, num_warps, num_stages
    assert chained and len(chained[0][0]) + len(chained[0][1]) - options == len(
        chains.chain_kernel.arg_names
    )
    assert len(launched) > 60
    tiles = {tuple(k[name] for name in ("BM", "BN", "BK")) for _, k in launched}
    assert {(128, 256, 64), (64, 64, 64), (128, 128, 32)} <= tiles
    assert {k["TAPS"] for _, k in launched} == {1, 9} and {k["POOL"] for _, k in launched} == {1, 2}
    assert any(k["GATHER"] for _, k in launched) and any(k["SECOND"] for _, k in launched)
    arguments, keywords = launched[0]
    assert arguments[0] is torch.bfloat16 and arguments[2] is torch.float32
    assert len(arguments) + len(keywords) - options == len(kernels.conv_kernel.arg_names)
    layer = network.stem[1]
    old = Place(torch.device("cuda"), Precision.of("float16"), (7, 5))
    found, rejected = candidates(layer, old, (1, 32, 32))
    assert [c.name for c in found if c.dense] == ["aten", "cudnn"]
    assert {c.name for c in found if not c.dense} <= {"sparse"}
    assert "compute capability >= 8.0" in rejected["gemm"] and "7.5" in rejected["gemm"]
