"""Writes to the weights of an accelerated model, by whatever means: noticed, and never wrongly."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import accel_nets as nets
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from opentrans_kernels import UnsupportedModelError, accelerate, restore
from opentrans_kernels.freshness import SMALL, TURNS
from opentrans_kernels.nn import SparseConv2d
from opentrans_kernels.ops.contents import Contents

STEM, BLOCK, NORM = "conv2.weight", "layer2.0.conv2.weight", "layer3.0.bn1.running_var"


def accelerated(seed: int = 0) -> nn.Module:
    model = nets.tower(seed)
    accelerate(model, nets.random_masks(model), measure=False)
    return model


def tensor_of(model: nn.Module, path: str) -> torch.Tensor:
    owner, _, key = path.rpartition(".")
    return getattr(model.get_submodule(owner), key)


def image() -> torch.Tensor:
    return torch.randn(1, 3, 64, 64)


def refuses(model: nn.Module, path: str, within: int = 1) -> None:
    """At one of the next ``within`` calls, and at every call from then on."""
    with torch.no_grad():
        for _ in range(within - 1):
            try:
                model(image())
            except UnsupportedModelError:
                break
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="restore") as info, torch.no_grad():
            model(image())
        assert path in str(info.value)


def replace_data(t: torch.Tensor) -> None:
    t.data = t.detach() * 0.5


def by_numpy(t: torch.Tensor) -> None:
    t.detach().numpy()[...] *= 0.5


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "data in place": lambda t: t.data.mul_(0.5),
    "data replaced": replace_data,
    "foreach on data": lambda t: torch._foreach_mul_([t.data], 0.5),
    "counted": lambda t: t.detach().mul_(0.5),
    "numpy": by_numpy,
    "signs": lambda t: t.data.copy_(t.data.abs().neg()),
    "order": lambda t: t.data.copy_(t.data.flip(0)),
    "nan": lambda t: t.data.fill_(float("nan")),
    "storage freed": lambda t: t.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("path", [STEM, BLOCK, NORM])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_refused_by_name_at_once(write: str, path: str) -> None:
    model = accelerated()
    model(image())
    WRITES[write](tensor_of(model, path))
    refuses(model, path, SMALL if path == NORM and write != "counted" else 1)


@pytest.mark.parametrize("path", [STEM, BLOCK])
def test_a_write_before_the_first_call_is_refused(path: str) -> None:
    model = accelerated()
    tensor_of(model, path).data.mul_(0.5)
    refuses(model, path)


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_a_single_bit_is_found_within_the_promised_calls(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "reference":
        monkeypatch.setattr("opentrans_kernels.native.load", lambda: False)
    conv = nn.Conv2d(300, 40, 3).eval().requires_grad_(False)
    sparse = SparseConv2d.from_conv(conv)
    sparse.opentrans_freshness.require()
    conv.weight.detach().numpy().view("int32")[37, 250, 1, 1] ^= 1
    calls = 0
    while sparse.opentrans_freshness.changed() is None:
        calls += 1
        assert calls < TURNS
    conv.weight.detach().numpy().view("int32")[37, 250, 1, 1] ^= 1
    sparse.opentrans_freshness.require()  # as it was


def test_a_single_bit_of_a_norm_is_found_within_the_promised_calls() -> None:
    norm = nn.BatchNorm2d(2048).eval().requires_grad_(False)
    sparse = SparseConv2d.from_conv(nn.Conv2d(8, 2048, 1).eval().requires_grad_(False), bn=norm)
    for at in (0, 1000, 2047):
        sparse.opentrans_freshness.require()
        norm.running_mean.numpy().view("int32")[at] ^= 1
        assert any(sparse.opentrans_freshness.changed() for _ in range(TURNS))
        norm.running_mean.numpy().view("int32")[at] ^= 1


def test_strict_mode_looks_at_everything(set_env: Callable) -> None:
    set_env(OPENTRANS_STRICT="1")
    model = accelerated()
    model(image())
    tensor_of(model, "layer4.0.conv2.weight").detach().numpy()[-1, -1, -1, -1] += 1
    refuses(model, "layer4.0.conv2.weight")


def test_restore_brings_the_written_weights() -> None:
    model = accelerated()
    twin = copy.deepcopy(model)
    restore(twin)
    for network in (model, twin):
        tensor_of(network, BLOCK).data.mul_(0.5)
    refuses(model, BLOCK)
    restore(model)
    x = image()
    assert torch.equal(model(x), twin(x))
    masks = nets.random_masks(model)
    accelerate(model, masks, measure=False)
    nets.check_exact(model, nets.masked(twin, masks), x)


def test_weights_written_back_are_accepted() -> None:
    model, x = accelerated(), image()
    before = model(x)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    parameter = tensor_of(model, BLOCK)
    average = parameter.detach() * 0.9
    parameter.data, average.data = average.data, parameter.data
    refuses(model, BLOCK)
    parameter.data, average.data = average.data, parameter.data
    assert torch.equal(model(x), before)
    parameter.data.zero_()
    refuses(model, BLOCK)
    parameter.data.copy_(kept[BLOCK])
    assert torch.equal(model(x), before)


def as_channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def in_a_flat_buffer(model: nn.Module) -> None:
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True):
        p.data = part.view(p.shape)


def through_state(assign: bool) -> Callable[[nn.Module], None]:
    def load(model: nn.Module) -> None:
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return load


SAME: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": through_state(False),
    "load_state_dict, assigned": through_state(True),
    "data cloned": lambda m: [setattr(p, "data", p.data.clone()) for p in m.parameters()],
    "shared memory": lambda m: m.share_memory(),
    "float": lambda m: m.float(),
    "to": lambda m: m.to("cpu"),
    "channels_last": as_channels_last,
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "flat buffer": in_a_flat_buffer,
    "requires_grad": lambda m: m.requires_grad_(True),
    "equal bits in place": lambda m: [p.data.mul_(1) for p in m.parameters()],
}


@pytest.mark.parametrize("change", SAME)
def test_the_same_weights_are_no_change(change: str) -> None:
    model, x = accelerated(), image()
    with torch.no_grad():
        before = model(x)
        SAME[change](model)
        for twin in (model, copy.deepcopy(model)):
            if change in ("double", "half"):  # of the attention pool, which is dense
                twin.attnpool.float()
            found = twin(x)
            torch.testing.assert_close(found, before, rtol=1e-2, atol=1e-2)
            assert torch.equal(twin(x), found)
        if change not in ("double", "half"):
            assert torch.equal(found, before)
    tensor_of(model, BLOCK).data.mul_(0.5)
    refuses(model, BLOCK)


def test_other_parameters_of_functional_call_are_refused() -> None:
    model, x = accelerated(), image()
    own = dict(model.named_parameters())
    with torch.no_grad():
        want = model(x)
        assert torch.equal(torch.func.functional_call(model, own, (x,)), want)
        equal = {name: p.detach().clone() for name, p in own.items()}
        assert torch.equal(torch.func.functional_call(model, equal, (x,)), want)
        with pytest.raises(UnsupportedModelError, match="restore") as info:
            torch.func.functional_call(model, {**own, BLOCK: own[BLOCK] * 2}, (x,))
        assert BLOCK in str(info.value)
        assert torch.equal(model(x), want)


def test_copies_and_averages_watch_their_own_weights() -> None:
    model, x = accelerated(), image()
    want = model(x)
    average = AveragedModel(model)
    assert torch.equal(average(x), want)
    twin = copy.deepcopy(model)
    tensor_of(twin, BLOCK).data.mul_(0.5)
    refuses(twin, BLOCK)
    refuses(copy.deepcopy(twin), BLOCK)
    assert torch.equal(model(x), want)
    average.update_parameters(model)
    assert torch.equal(average(x), want), "an average of equal weights"
    average.update_parameters(twin)
    with pytest.raises(UnsupportedModelError, match="restore"):
        average(x)


def test_a_pickled_watch_is_held_against_the_weights_it_brings() -> None:
    sparse = SparseConv2d.from_conv(nn.Conv2d(7, 12, 3).eval().requires_grad_(False))
    pickle.loads(pickle.dumps(sparse.opentrans_freshness)).require()
    sparse.weight.data.mul_(0.5)
    with pytest.raises(UnsupportedModelError, match="conv.weight"):
        pickle.loads(pickle.dumps(sparse.opentrans_freshness)).require()


def test_parts_that_are_replaced_are_refused() -> None:
    model = accelerated()
    model.layer2[0].conv2 = nn.Conv2d(16, 16, 3, padding=1)
    refuses(model, "layer2.0.conv2")
    model = accelerated()
    model.layer1[0].bn2.eps = 1.0
    refuses(model, "layer1.0.bn2.eps")
    model = accelerated()
    model.layer1[0].conv1.bias = nn.Parameter(torch.ones(8))
    refuses(model, "layer1.0.conv1.bias")
    model = accelerated()
    model.layer1[0].conv1.weight = nn.Parameter(torch.ones_like(model.layer1[0].conv1.weight))
    refuses(model, "layer1.0.conv1.weight")
    model = accelerated()
    parametrize.register_parametrization(model.layer1[0].conv1, "weight", nn.Tanh())
    refuses(model, "layer1.0.conv1")


def test_weights_computed_from_others_are_watched_at_their_source() -> None:
    conv = nn.Conv2d(7, 12, 3).eval().requires_grad_(False)
    prune.random_unstructured(conv, "weight", 0.7)
    sparse, x = SparseConv2d.from_conv(conv), torch.randn(1, 7, 6, 6)
    sparse(x)
    sparse.weight_orig.data.mul_(0.5)
    with pytest.raises(UnsupportedModelError, match="conv.weight_orig"):
        sparse(x)


def _write(shared: torch.Tensor) -> None:
    shared.mul_(0.5)


def test_another_process_that_writes_to_shared_weights_is_noticed() -> None:
    model = accelerated()
    model.share_memory()
    model(image())
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_write, args=(tensor_of(model, BLOCK).data,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    refuses(model, BLOCK)


def test_a_model_of_inference_tensors_is_watched() -> None:
    with torch.inference_mode():
        model = accelerated()
        before = model(image())
        assert before.is_inference()
        tensor_of(model, BLOCK).mul_(0.5)
        refuses(model, BLOCK)


def test_counters_and_tracers_see_the_network_only() -> None:
    model, x = accelerated(), image()
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            want = model(x)
        assert counter.get_total_flops() > 0
        traced = torch.jit.trace(model, x, check_trace=False)
        assert "first_changed" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), want)
        graph = make_fx(model)(x)
        assert "first_changed" not in graph.code
        tensor_of(model, BLOCK).data.mul_(0.5)
        with FlopCounterMode(display=False), pytest.raises(UnsupportedModelError, match=BLOCK):
            model(x)


def test_safetensors_of_other_weights_are_refused(tmp_path: Path) -> None:
    model, path = accelerated(), tmp_path / "weights.safetensors"
    save_model(nets.tower(), str(path))
    load_model(model, path)
    model(image())
    save_model(nets.tower(5), str(path))
    with pytest.raises(UnsupportedModelError, match="other weights cannot be loaded"):
        load_model(model, path)


def test_a_compiler_asks_once_when_it_captures() -> None:
    model, x = accelerated(), image()
    with torch.no_grad():
        want = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model.layer1, fullgraph=True, backend="aot_eager")
        y = torch.randn(1, 8, 16, 16)
        torch.testing.assert_close(compiled(y), model.layer1(y))
        assert torch.equal(torch.export.export(model, (x,)).module()(x), want)
        tensor_of(model, "layer1.0.conv2.weight").data.mul_(0.5)
        torch._dynamo.reset()
        with pytest.raises(UnsupportedModelError, match="layer1.0.conv2.weight"):
            torch.compile(model.layer1, backend="aot_eager")(y)
        for strict in (False, True):
            with pytest.raises(Exception, match="layer1.0.conv2.weight"):
                torch.export.export(model, (x,), strict=strict)


def test_what_is_collected_meanwhile_is_in_no_graph(extension: None) -> None:
    held = [hold_contents(torch.ones(300))]

    def traced(x: torch.Tensor) -> torch.Tensor:
        held.clear()
        gc.collect()
        return x + 1

    graph = make_fx(traced)(torch.zeros(2)).graph
    assert not held
    assert not [node for node in graph.nodes if "contents" in str(node.target)]


def hold_contents(tensor: torch.Tensor) -> Callable[[int, int], int]:
    return Contents([tensor]).hold([tensor], [0])
