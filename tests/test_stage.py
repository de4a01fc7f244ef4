"""``sparse_stage``: the bits of its blocks one by one, whatever sizes, threads and leftovers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import accel_nets as nets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    assert_within,
    at_end_of_page,
    bottleneck_exact,
    bottleneck_parts,
    layouts,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from opentrans_kernels import PlanError, UnsupportedModelError, accelerate, ops, restore
from opentrans_kernels.accelerate import stages as decisions
from opentrans_kernels.stage import AcceleratedStage

NATIVE = torch.ops.opentrans_kernels
QUICK = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def stage(widths: list[tuple[int, ...]], density: float = 0.4, seed: int = 0):
    """Blocks of (inner width, output channels, pool, stride = 1); all but a plain one of the same
    width need a shortcut."""
    dense, packs, cin = [], [], widths[0][1] if max(widths[0][2:]) == 1 else 5
    for i, (inner, cout, pool, *rest) in enumerate(widths):
        stride = rest[0] if rest else 1
        down = max(pool, stride) > 1 or cin != cout
        convs, pack = bottleneck_parts(cin, inner, cout, density, down, seed + 7 * i, stride)
        dense.append(convs)
        packs.append(tuple(pack))
        cin = cout
    return dense, packs, [width[2] for width in widths]


def channels(packs) -> int:
    return packs[0][0].cin


def one_by_one(x: torch.Tensor, packs, pools) -> torch.Tensor:
    for pack, pool in zip(packs, pools, strict=True):
        x = ops.sparse_bottleneck(x, *pack, pool, pool)
    return x


CHAINS = {
    "three plain": [(7, 9, 1)] * 3,
    "shortcut first": [(5, 12, 2), (6, 12, 1), (3, 12, 1)],
    "pools in the middle": [(4, 6, 1), (5, 8, 2), (7, 8, 1), (3, 10, 3), (4, 10, 1)],
    "one block": [(6, 9, 1)],
    "a stride first": [(5, 12, 1, 2), (6, 12, 1), (3, 12, 1)],
    "strides and pools": [(4, 6, 1), (5, 8, 1, 2), (7, 8, 2), (3, 10, 1, 2), (4, 10, 1)],
}
# Rows of whole vectors and of odd lengths; tall enough for many bands, and for one.
SIZES = [(61, 16), (45, 33), (70, 8), (7, 7), (24, 56), (9, 128), (131, 6), (6, 6)]


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_bits_of_the_blocks_one_by_one(extension: None, chain, threads: int) -> None:
    _, packs, pools = stage(chain)
    for h, w in SIZES:
        for batch in (1, 3, 5):
            x = torch.randn(batch, channels(packs), h, w)
            expected = one_by_one(x, packs, pools)
            for in_turn in (False, True):
                found = ops.sparse_stage(x, packs, pools, in_turn)
                assert torch.equal(found, expected), (h, w, batch, in_turn)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_stage(extension: None, threads: int, data: st.DataObject) -> None:
    widths = data.draw(
        st.lists(
            st.tuples(
                st.integers(1, 20),
                st.integers(1, 20),
                st.sampled_from([(1,), (1,), (2,), (1, 2)]),
            ).map(lambda block: (*block[:2], *block[2])),
            min_size=1,
            max_size=5,
        )
    )
    _, packs, pools = stage(widths, data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))
    shrink = 2 ** sum(pool == 2 for pool in pools)
    h, w = (data.draw(st.integers(shrink, 90)) for _ in range(2))
    x = torch.randn(data.draw(st.integers(1, 2)), channels(packs), h, w)
    assert torch.equal(ops.sparse_stage(x, packs, pools), one_by_one(x, packs, pools))


@pytest.mark.parametrize("chain", ["shortcut first", "strides and pools"])
def test_every_row_against_float64(set_env: Callable, chain: str) -> None:
    dense, packs, pools = stage(CHAINS[chain])
    x = torch.randn(2, channels(packs), 37, 29)
    exact, single = x.double(), x
    for convs, pack, pool in zip(dense, packs, pools, strict=True):
        stride = pack[1].stride
        exact = bottleneck_exact(exact, convs, pool, pool, stride=stride)
        single = bottleneck_exact(single, convs, pool, pool, torch.float32, stride)
    for backend in ("auto", "reference"):
        set_env(OPENTRANS_BACKEND=backend)
        assert_within(ops.sparse_stage(x, packs, pools), exact, single, backend)
    set_env(OPENTRANS_BACKEND="reference")
    torch.testing.assert_close(ops.sparse_stage(x.double(), packs, pools), exact)


def test_layouts_guarded_pages_and_left_over_scratch(extension: None, threads: int) -> None:
    _, packs, pools = stage(CHAINS["shortcut first"])
    x = torch.randn(2, channels(packs), 41, 27)
    expected = one_by_one(x, packs, pools)
    for name, other in layouts(x):
        before = other.clone()
        assert torch.equal(ops.sparse_stage(other, packs, pools), expected), name
        assert torch.equal(other, before), name
    assert torch.equal(ops.sparse_stage(at_end_of_page(x), packs, pools), expected)
    assert ops.sparse_stage(torch.full_like(x, float("nan")), packs, pools).isnan().any()
    assert torch.equal(ops.sparse_stage(x, packs, pools), expected), "NaN left in scratch"
    assert ops.sparse_stage(x[:0], packs, pools).shape == (0, *expected.shape[1:])


def test_scratch_does_not_grow(extension: None) -> None:
    _, packs, pools = stage(CHAINS["three plain"])
    x = torch.randn(1, channels(packs), 64, 64)
    ops.sparse_stage(x, packs, pools)
    held = ops.scratch_bytes()
    for _ in range(50):
        ops.sparse_stage(x, packs, pools)
    assert ops.scratch_bytes() == held


def flat(packs) -> list[torch.Tensor]:
    return [
        t for pack in packs for w in pack if w is not None for t in (w.structure, w.values, w.bias)
    ]


@pytest.mark.parametrize("chain", ["shortcut first", "a stride first"])
def test_opcheck_compile_and_flops(extension: None, chain: str) -> None:
    _, packs, pools = stage(CHAINS[chain])
    x = torch.randn(2, channels(packs), 14, 12)
    couts, downs = [pack[2].cout for pack in packs], [int(pack[3] is not None) for pack in packs]
    for more in ((), (True,)):
        torch.library.opcheck(
            NATIVE.sparse_stage.default,
            (x, flat(packs), couts, pools, downs, [pack[1].stride for pack in packs], *more),
            test_utils=QUICK,
        )
    # Where torch may use no vectors, inductor's C++ does not always compile. One chain is enough
    # for it: to inductor a stage is one call, whatever its blocks are.
    plain = torch.backends.cpu.get_cpu_capability() == "DEFAULT" or chain != "a stride first"
    compiled = torch.compile(
        lambda x: ops.sparse_stage(x, packs, pools) + 1,
        fullgraph=True,
        backend="aot_eager" if plain else "inductor",
    )
    assert torch.equal(compiled(x), one_by_one(x, packs, pools) + 1)
    counts = []
    for run in (ops.sparse_stage, one_by_one):
        with FlopCounterMode(display=False) as counter:
            run(x, packs, pools)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input(extension: None, set_env: Callable, backend: str) -> None:
    set_env(OPENTRANS_BACKEND=backend)
    _, packs, pools = stage(CHAINS["shortcut first"])
    x = torch.randn(1, channels(packs), 16, 16)
    with pytest.raises(PlanError, match="one pool window for each"):
        ops.sparse_stage(x, packs, pools[:-1])
    with pytest.raises(PlanError, match="at least one block"):
        ops.sparse_stage(x, [], [])
    c1, c2, c3, down = packs[0]
    with pytest.raises(PlanError, match="block 0 is no fused bottleneck: conv2 is 1x1"):
        ops.sparse_stage(x, [(c1, c3, c3, down), *packs[1:]], pools)
    with pytest.raises(RuntimeError, match="do not chain|has 12 channels, the weight expects 5"):
        ops.sparse_stage(x, [packs[0], packs[0]], [2, 2])
    with pytest.raises(RuntimeError, match="too small for a"):
        ops.sparse_stage(x[..., :1], packs, pools)
    with pytest.raises(RuntimeError, match="different output sizes"):
        ops.sparse_stage(x, packs, [2, 2, 1])
    raw = (
        NATIVE.sparse_stage.default
        if backend == "auto"
        else __import__("opentrans_kernels.ops.sparse_stage.reference", fromlist=["x"]).sparse_stage
    )
    with pytest.raises(RuntimeError, match="have 30 tensors .* got 29"):
        raw(x, flat(packs)[:-1], [12, 12, 12], pools, [1, 0, 0])
    with pytest.raises(RuntimeError, match="one element per block"):
        raw(x, flat(packs), [12, 12, 12], pools, [1, 0])
    with pytest.raises(RuntimeError, match="one element per block"):
        raw(x, flat(packs), [12, 12, 12], pools, [1, 0, 0], [1, 1])
    with pytest.raises(RuntimeError, match="stride 2 must be 1, or 2 with a shortcut"):
        raw(x, flat(packs), [12, 12, 12], pools, [1, 0, 0], [2, 1, 1])
    with pytest.raises(RuntimeError, match="stride 3 must be 1, or 2 with a shortcut"):
        raw(x, flat(packs), [12, 12, 12], [1, 1, 1], [1, 0, 0], [3, 1, 1])


def test_gradients_are_refused_with_the_fix(extension: None) -> None:
    _, packs, pools = stage(CHAINS["three plain"])
    x = torch.randn(1, channels(packs), 8, 8, requires_grad=True)
    with pytest.raises(PlanError, match=r"no_grad\(\), or chain sparse_conv2d"):
        ops.sparse_stage(x, packs, pools).sum().backward()


def deep_tower() -> nn.Module:
    net = nets.clip_resnet.ModifiedResNet((2, 3, 1, 2), 64, 4, image_size=64, width=8)
    return nets.randomise(net)


@pytest.fixture
def model(extension: None) -> nn.Module:
    net = deep_tower()
    accelerate(net, nets.random_masks(net), input_size=(64, 64), measure=False)
    if not isinstance(net.layer1, AcceleratedStage):
        pytest.fail("no stage was replaced")
    return net


def test_a_stage_is_still_a_sequential_of_its_blocks(model: nn.Module) -> None:
    plain = deep_tower()
    assert isinstance(model.layer2, nn.Sequential) and len(model.layer2) == 3
    assert model.layer2[1] is dict(model.layer2.named_children())["1"]
    assert [n for n, _ in model.named_modules() if "opentrans" not in n] == [
        n for n, _ in plain.named_modules()
    ]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert type(model.layer3) is nn.Sequential, "a single block is no stage"
    assert "3 blocks at a time" in repr(model.layer2)
    x = torch.randn(2, 32, 33, 20)
    with torch.no_grad():
        expected = x
        for block in model.layer2:
            expected = block(expected)
        assert torch.equal(model.layer2(x), expected)
        assert torch.equal(copy.deepcopy(model).layer2(x), expected)


def test_hooks_of_a_block_run(model: nn.Module) -> None:
    x, seen = torch.randn(1, 32, 16, 16), []
    with torch.no_grad():
        expected = model.layer2(x)
        handle = model.layer2[1].register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(model.layer2(x), expected) and seen == [1]
        handle.remove()
        assert torch.equal(model.layer2(x), expected) and seen == [1]


def test_gradients_of_the_input_training_mode_and_compile(model: nn.Module) -> None:
    x = torch.randn(1, 32, 16, 16)
    leaf = x.clone().requires_grad_()
    model.layer2(leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    with torch.no_grad():
        expected = model.layer2(x)
        found = torch.compile(model.layer2, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(found, expected)
        program = torch.export.export(model.layer2, (x,))
        assert torch.equal(program.module()(x), expected)
    assert any("sparse_stage" in str(node.target) for node in program.graph.nodes)
    model.layer2[2].train()
    with pytest.raises(UnsupportedModelError, match=r"Call model.eval\(\)"), torch.no_grad():
        model.layer2(x)


def test_gradients_pass_blocks_behind_a_trainable_one(model: nn.Module) -> None:
    stage = model.layer2
    stage._modules["0"] = nn.Conv2d(32, 64, 3, stride=2, padding=1)  # any child that trains
    stage(torch.randn(1, 32, 16, 16)).sum().backward()
    assert stage[0].weight.grad.abs().sum() > 0


def test_restore_brings_the_sequential_back(extension: None) -> None:
    net = deep_tower()
    before = dict(net.named_modules())
    accelerate(net, nets.random_masks(net), input_size=(64, 64), measure=False)
    restore(net)
    after = dict(net.named_modules())
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)


@pytest.mark.parametrize("turns", [1.0, 3.0])
def test_the_faster_order_is_taken_and_said(monkeypatch, extension, turns: float) -> None:
    monkeypatch.setattr(decisions, "_times", lambda blocks, x: (2.0, turns))
    monkeypatch.setattr(  # every block is sparse, however busy the machine is
        "opentrans_kernels.plan.choose.interleaved_ms",
        lambda calls, *_: {name: [0.5 if name == "sparse" else 1.0] for name in calls},
    )
    net = deep_tower()
    report = accelerate(net, nets.random_masks(net), input_size=(64, 64), measure=True)
    if not report.accelerated:
        pytest.skip("the narrow tower is faster dense on this machine")
    notes = [note for note in report.notes if note.startswith("layer2")]
    assert net.layer2.opentrans_in_turn == (turns < 2) == ("in turn" in repr(net.layer2))
    ways = ["rows apart 2.00 ms", f"one after the other {turns:.2f} ms"]
    way, other = reversed(ways) if turns < 2 else ways
    assert len(notes) == 1 and f"3 blocks run as one op, {way}; {other}" in notes[0]
