"""Scores of classes from masks: the reference against the models' own steps, the kernel against it
in float64, on every instruction set of this CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mask_score_cases import (
    STEPS,
    as_lists,
    assert_as_exact,
    guarded,
    make,
    odd_numbers,
    same_bits,
    sweep,
)
from test_isa import ALL, child, supported
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import opentrans_kernels as otk
from opentrans_kernels import ops
from opentrans_kernels.errors import KernelUnavailable, UnsupportedModelError
from opentrans_kernels.ops.mask_scores import reference as plain

OP = torch.ops.opentrans_kernels.mask_scores.default


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def given(steps) -> dict:
    return dict(zip(("size", "crop", "resize"), steps, strict=True))


@pytest.mark.parametrize(("shape", "size", "crop", "resize"), STEPS)
def test_the_reference_is_what_the_models_compute(shape, size, crop, resize) -> None:
    masks, classes = make(shape, n=2, dtype=torch.float64)
    full = masks
    if size:
        full = F.interpolate(full, size, mode="bilinear", align_corners=False)
    if crop:
        full = full[..., : crop[0], : crop[1]]
    if resize:
        full = F.interpolate(full, resize, mode="bilinear", align_corners=False)
    right = torch.einsum("bqc,bqhw->bchw", classes, full.sigmoid())
    found = plain.mask_scores(masks, classes, *as_lists(size, crop, resize))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    assert torch.equal(ops.mask_scores(masks, classes, size=size, crop=crop, resize=resize), found)


def test_every_form_against_the_oracle(extension: None, poison: None) -> None:
    assert sweep() >= 100


def test_numbers_that_are_none_or_infinite(extension: None) -> None:
    odd_numbers()


def test_memory_outside_the_tensors_is_not_touched(extension: None) -> None:
    assert guarded() == 2 * len(STEPS)


def test_results_do_not_depend_on_threads_batch_or_crop(extension: None) -> None:
    same_bits()


@pytest.mark.parametrize("capability", ALL)
def test_every_instruction_set_keeps_the_contract(extension: None, capability: str) -> None:
    if not supported()[capability]:
        pytest.skip(f"this CPU has no {capability}")
    done = child(
        """
        import torch
        from mask_score_cases import guarded, odd_numbers, same_bits, sweep
        from opentrans_kernels import native
        torch.set_num_threads(1)
        odd_numbers()
        same_bits()
        print(native.cpu_capability(), sweep(), guarded())
        """,
        capability,
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    name, results, inputs = done.stdout.split()
    assert name == capability and int(results) >= 100 and int(inputs) == 2 * len(STEPS)


def test_labels_are_those_of_the_dense_product(extension: None) -> None:
    """Of 100,000 pixels at most 10 change their class, each between classes that dense float32
    cannot tell apart itself."""
    masks, classes = make((64, 100), q=100, k=30)
    steps = ((256, 400), (250, 400), None)
    exact = plain.mask_scores(masks.double(), classes.double(), *as_lists(*steps))[0]
    dense = plain.mask_scores(masks, classes, *as_lists(*steps))[0]
    ours = ops.mask_scores(masks, classes, **given(steps))[0]
    assert_as_exact(ours[None], masks, classes, *steps)
    changed = ours.argmax(0) != exact.argmax(0)
    assert changed.numel() == 100_000 and int(changed.sum()) <= 10
    best = exact.topk(2, 0).values
    rough = (dense.double() - exact).abs().max()
    assert bool(((best[0] - best[1])[changed] <= 4 * rough).all())


def test_a_sigmoid_is_right_to_a_few_ulp(extension: None) -> None:
    x = torch.cat((torch.linspace(-86, 86, 100_001), torch.linspace(-1, 1, 1001)))
    out = ops.mask_scores(x.view(1, 1, 1, -1), torch.ones(1, 1, 1)).flatten().double()
    right = x.double().sigmoid()
    assert float(((out - right) / right).abs().max()) <= 4 * 2.0**-23
    far = torch.tensor([-1e30, -200.0, -89.0, 89.0, 1e30]).view(1, 1, 1, -1)
    assert ops.mask_scores(far, torch.ones(1, 1, 1)).flatten().tolist() == [0, 0, 0, 1, 1]


def test_inputs_of_any_strides(extension: None) -> None:
    masks, classes = make((9, 12), n=2, q=6, k=5)
    steps = {"size": (36, 48), "crop": (30, 40), "resize": (50, 50)}
    once = ops.mask_scores(masks, classes, **steps)
    last = masks.contiguous(memory_format=torch.channels_last)
    turned = masks.transpose(2, 3).contiguous().transpose(2, 3)
    wide = torch.full((2, 6, 20, 30), float("nan"))
    wide[:, :, 3:12, 5:29:2] = masks
    for m in (last, turned, wide[:, :, 3:12, 5:29:2], masks.flip(1).flip(1)):
        for c in (classes, classes.transpose(1, 2).contiguous().transpose(1, 2)):
            assert torch.equal(ops.mask_scores(m, c, **steps), once)
    spread = ops.mask_scores(masks[:1].expand(3, -1, -1, -1), classes[:1].expand(3, -1, -1))
    assert torch.equal(spread, ops.mask_scores(masks[:1], classes[:1]).expand(3, -1, -1, -1))
    leading = ops.mask_scores(masks.unflatten(0, (1, 2)), classes.unflatten(0, (1, 2)), **steps)
    assert leading.shape == (1, 2, 5, 50, 50) and torch.equal(leading[0], once)
    assert torch.equal(ops.mask_scores(masks[0], classes[0], **steps), once[0])


@pytest.mark.parametrize(("n", "q", "k"), ((0, 3, 2), (1, 0, 2), (1, 3, 0), (2, 0, 0)))
def test_nothing_to_add_up_is_zero(extension: None, poison: None, n: int, q: int, k: int) -> None:
    masks, classes = torch.randn(n, q, 4, 5), torch.rand(n, q, k)
    for steps in ({}, {"size": (9, 9)}, {"size": (9, 9), "crop": (8, 7), "resize": (20, 30)}):
        out = ops.mask_scores(masks, classes, **steps)
        lists = as_lists(*(steps.get(name) for name in ("size", "crop", "resize")))
        assert out.shape == OP(masks, classes, *lists).shape
        assert out.shape[:2] == (n, k) and not out.any()
        assert plain.mask_scores(masks, classes, *lists).shape == out.shape
    empty = ops.mask_scores(torch.randn(1, 3, 0, 5), torch.rand(1, 3, 2))
    assert empty.shape == (1, 2, 0, 5)


def test_no_map_of_all_queries_is_made(extension: None) -> None:
    masks, classes = make((32, 40), q=60, k=4)
    with Largest() as ours:
        ops.mask_scores(masks, classes, size=(128, 160), crop=(120, 150), resize=(200, 240))
    with Largest() as dense:
        plain.mask_scores(masks, classes, [128, 160], [120, 150], [200, 240])
    assert dense.elements == 60 * 200 * 240
    assert ours.elements == 4 * 200 * 240  # the result


def test_half_precision_is_computed_in_float32(extension: None) -> None:
    masks, classes = make((6, 7), q=5, k=3)
    for dtype in (torch.bfloat16, torch.float16):
        half = [t.to(dtype) for t in (masks, classes)]
        out = ops.mask_scores(*half, size=(24, 28))
        exact = ops.mask_scores(*(t.float() for t in half), size=(24, 28))
        assert out.dtype == dtype and torch.equal(out, exact.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            found = OP(*half, [24, 28], [], [])
        assert found.dtype == torch.float32 and torch.equal(found, exact)


def test_where_a_gradient_is_needed_the_reference_gives_it() -> None:
    masks, classes = make((4, 3), q=3, k=2, dtype=torch.float64)
    leaves = [masks.requires_grad_(), classes.requires_grad_()]
    steps = {"size": (8, 7), "crop": (7, 7), "resize": (5, 9)}
    torch.autograd.gradcheck(lambda m, c: ops.mask_scores(m, c, **steps), leaves)
    single = [t.detach().float().requires_grad_() for t in leaves]
    out = ops.mask_scores(*single, **steps)
    assert out.requires_grad
    with torch.no_grad():
        assert not ops.mask_scores(*single, **steps).requires_grad
    given = single[1].detach()
    (right,) = torch.autograd.grad(ops.mask_scores(single[0], given).sum(), single[0])
    of_masks = torch.func.grad(lambda m: ops.mask_scores(m, given).sum())
    torch.testing.assert_close(of_masks(single[0].detach()), right)
    with pytest.raises(UnsupportedModelError, match="forward-mode"):
        torch.func.jvp(lambda m: ops.mask_scores(m, given), (right,), (right,))


def test_opcheck(extension: None) -> None:
    masks, classes = make((4, 5), n=2, q=3, k=2)
    for steps in ([[], [], []], [[8, 9], [], []], [[8, 9], [7, 9], [5, 20]]):
        torch.library.opcheck(OP, (masks, classes, *steps))


def test_compiles_into_one_graph(extension: None) -> None:
    masks, classes = make((4, 5), q=3, k=2)
    run = torch.compile(lambda m, c: otk.mask_scores(m * 2, c, size=(8, 10)).cos(), fullgraph=True)
    torch.testing.assert_close(
        run(masks, classes), otk.mask_scores(masks * 2, classes, size=(8, 10)).cos()
    )


def test_flops_are_those_of_the_dense_product() -> None:
    masks, classes = make((4, 5), n=2, q=7, k=3)
    with FlopCounterMode(display=False) as ours:
        ops.mask_scores(masks, classes, size=(16, 20))
    with FlopCounterMode(display=False) as dense:
        plain.mask_scores(masks, classes, [16, 20], [], [])
    assert ours.get_total_flops() == dense.get_total_flops() == 2 * 2 * 3 * 7 * 16 * 20


def bad_calls() -> dict[str, tuple[tuple, dict]]:
    masks, classes = make((4, 5), q=3, k=2)
    good = (masks, classes)
    return {
        "size must be": (good, {"size": (8,)}),
        "size must be a height": (good, {"size": (0, 8)}),
        "resize must be": (good, {"resize": (8, 1 << 23)}),
        "crop must be": (good, {"crop": (3, -1)}),
        "crop is": (good, {"crop": (5, 5)}),
        r"larger than the masks, which are \[8, 8\]": (good, {"size": (8, 8), "crop": (8, 9)}),
        "classes are torch.float64": ((masks, classes.double()), {}),
        "same leading sizes": ((masks, classes[:, :2]), {}),
        r"masks must be \[\.\.\., Q, h, w\]": ((masks[0, 0], classes[0, 0]), {}),
        "no pixels": ((masks[..., :0], classes), {"size": (8, 8)}),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_arguments_are_named(message: str) -> None:
    arguments, steps = bad_calls()[message]
    with pytest.raises(RuntimeError, match=message):
        ops.mask_scores(*arguments, **steps)


def test_the_operator_itself_refuses_them_too(extension: None) -> None:
    for message, ((masks, classes), steps) in bad_calls().items():
        lists = as_lists(*(steps.get(name) for name in ("size", "crop", "resize")))
        with pytest.raises(RuntimeError):
            print(message, OP(masks, classes, *lists).shape)


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(KernelUnavailable, match="int32"):
        ops.mask_scores(torch.ones(1, 2, 3, 3).int(), torch.ones(1, 2, 2).int())
