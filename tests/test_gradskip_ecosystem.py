"""Gradient skipping under torch.compile, autocast, activation checkpointing and DDP."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from gloo_pair import run_pair
from gradskip_nets import freeze_set, gradients, saved_bytes, small_trunk
from torch.utils.checkpoint import checkpoint

from opentrans import restore_skipped, skip_frozen
from opentrans_kernels.errors import PlanError
from opentrans_kernels.ops.folded_conv2d import fold

SIZE = (64, 64)


def close(found: dict, want: dict, tolerance: float) -> None:
    assert set(found) == set(want)
    for name, value in want.items():
        scale = value.abs().max().clamp_min(1e-12)
        error = float((found[name] - value).abs().max() / scale)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("policy", ["frozen", "affine", "train"])
def test_compile_is_one_graph_with_the_same_gradients(policy: str) -> None:
    torch._dynamo.reset()
    model = small_trunk()
    skip_frozen(model, freeze_set(model, "odd"), bn=policy)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(2, 3, *SIZE)
    g = torch.randn(2, 256, 2, 2)
    want = gradients(model, x, g)
    x_in = x.clone().requires_grad_(True)
    model.zero_grad(set_to_none=True)
    y = compiled(x_in)
    y.backward(g)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    close({"output": y.detach(), "input": x_in.grad, **found}, want, 1e-5)


def test_compiled_graphs_find_the_folded_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = small_trunk()
    skip_frozen(model, freeze_set(model, "odd"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, *SIZE)
    compiled(x).sum().backward()
    made = []
    real = fold._Folded
    monkeypatch.setattr(fold, "_Folded", lambda *a: made.append(1) or real(*a))
    first = compiled(x)
    first.sum().backward()
    assert not made, "a second step folds nothing again"
    frozen = model.visual.conv2.weight
    with torch.no_grad():
        frozen.mul_(0.5)
    assert not torch.equal(compiled(x), first), "a compiled graph sees new weights"
    assert len(made) == 1


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    model = small_trunk()
    skip_frozen(model, freeze_set(model, "odd"))
    compiled = torch.compile(model, fullgraph=True)
    x, g = torch.randn(2, 3, *SIZE), torch.randn(2, 256, 2, 2)
    want = gradients(model, x, g)
    model.zero_grad(set_to_none=True)
    compiled(x).backward(g)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    close(found, {n: v for n, v in want.items() if n in found}, 1e-4)
    assert found


def test_autocast_computes_in_bfloat16_and_casts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_trunk()
    names = freeze_set(model, "odd")
    twin = copy.deepcopy(model).eval()
    for name, module in twin.named_modules():
        if name in names or isinstance(module, torch.nn.BatchNorm2d):
            module.requires_grad_(False)
    report = skip_frozen(model, names)
    x = torch.randn(2, 3, *SIZE)
    g = torch.randn(2, 256, 2, 2)
    exact = gradients(twin, x, g)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        kept = saved_bytes(model, lambda: model(x))
    found, own = {}, {}
    for subject, into in ((model, found), (twin, own)):
        subject.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = subject(x)
        out.backward(g.to(out.dtype))
        into.update({n: p.grad for n, p in subject.named_parameters() if p.grad is not None})
    assert set(found) == set(own)
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        error, yardstick = (
            float((t - exact[name]).norm() / exact[name].norm()) for t in (grad, own[name])
        )
        assert error <= max(2 * yardstick, 0.02), f"{name}: {error:.3f} against {yardstick:.3f}"
    told = report.explain(SIZE, batch=2, itemsize=2)
    assert kept == told.total
    made = []
    real = fold._Folded
    monkeypatch.setattr(fold, "_Folded", lambda *a: made.append(1) or real(*a))
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert not made, "the cast copy is kept"


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = small_trunk().double()
    skip_frozen(model, freeze_set(model, "odd"))
    x = torch.randn(1, 3, *SIZE, dtype=torch.float64)
    g = torch.randn(1, 256, 2, 2, dtype=torch.float64)
    want = gradients(model, x, g)
    visual = model.visual

    def run(image: torch.Tensor) -> torch.Tensor:
        y = visual.stem(image)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            y = checkpoint(stage, y, use_reentrant=reentrant)
        return y

    model.zero_grad(set_to_none=True)
    x_in = x.clone().requires_grad_(True)
    y = run(x_in)
    y.backward(g)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    close({"output": y.detach(), "input": x_in.grad, **found}, want, 1e-12)


def _ddp_worker(rank: int, store: str, failures: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = small_trunk().double()
    names = freeze_set(model, "odd")
    skip_frozen(model, names)
    single = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        batch = torch.randn(2, 3, *SIZE, dtype=torch.float64, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        wrapped(batch[rank : rank + 1]).square().mean().backward()
        optimizer.step()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD([p for p in single.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        batch = torch.randn(2, 3, *SIZE, dtype=torch.float64, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        single(batch).square().mean().backward()
        optimizer.step()
    for (name, a), b in zip(model.named_parameters(), single.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10), name
    before = {n: id(m) for n, m in model.named_modules()}
    for call in (lambda: skip_frozen(model, freeze_set(model, "first")),
                 lambda: restore_skipped(model)):  # fmt: skip
        with pytest.raises(PlanError, match="unwrap"):
            call()
        assert {n: id(m) for n, m in model.named_modules()} == before
    assert single.visual.conv1.weight.requires_grad
    del wrapped  # as the error says: unwrap, apply, wrap again
    skip_frozen(model, freeze_set(model, "first"))
    again = DistributedDataParallel(model, broadcast_buffers=False)
    for _ in range(2):
        again(torch.randn(1, 3, *SIZE, dtype=torch.float64)).square().mean().backward()
    Path(failures, f"done{rank}").touch()
    dist.destroy_process_group()


def test_two_processes_with_gloo(tmp_path: Path) -> None:
    run_pair(_ddp_worker, tmp_path)
