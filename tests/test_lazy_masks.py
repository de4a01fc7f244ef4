"""Lazy masks: what is remembered and what comes of it; all else is done to the tensor itself."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lazy_mask_nets import MaskClassifier, resize, to_image
from mask_score_cases import make
from test_mask_scores import Largest

import opentrans_kernels as otk
from opentrans_kernels.heads.lazy import LazyMasks, lazy_masks

OUT = ((61, 45), (80, 70))


def waiting(masks: torch.Tensor) -> bool:
    return isinstance(masks, LazyMasks) and masks._owner.value is None


def pair(n: int = 2, q: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain masks, the same as lazy ones, and classes."""
    masks, classes = make((16, 12), n=n, q=q, k=4)
    return masks, lazy_masks(masks), classes


def close(found: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=2e-6, atol=2e-6)


def test_what_the_models_do_is_remembered() -> None:
    masks, lazy, classes = pair()
    full, right = resize(lazy, (64, 48)), resize(masks, (64, 48))
    assert waiting(full) and full.shape == right.shape and full.stride() == right.stride()
    assert (full.dtype, full.device, full.dim(), len(full)) == (right.dtype, right.device, 4, 2)
    for one, dense, given in zip(full, right, classes, strict=True):
        one, dense = to_image(one, *OUT[:1], *OUT[1]), to_image(dense, *OUT[:1], *OUT[1])
        assert waiting(one) and one.shape == dense.shape
        assert torch.equal(given.to(one), given)
        scores = torch.einsum("qc,qhw->chw", given, one.sigmoid())
        assert not isinstance(scores, LazyMasks) and waiting(one)
        close(scores, torch.einsum("qc,qhw->chw", given, dense.sigmoid()))
        assert torch.equal(one, dense)
    assert waiting(full) and waiting(lazy)


FORMS = {
    "bqc,bqhw->bchw": lambda c, m: torch.einsum("bqc, bqhw -> bchw", c, m),
    "...qk,...qhw->...khw": lambda c, m: torch.einsum("...qk,...qhw->...khw", c, m),
    "bkq,bqhw->bkhw": lambda c, m: torch.einsum("bkq,bqhw->bkhw", c.transpose(1, 2), m),
    "masks first": lambda c, m: torch.einsum("nqyx,nqc->ncyx", m, c),
    "a list": lambda c, m: torch.einsum("bqc,bqhw->bchw", [c, m]),
    "of one": lambda c, m: torch.einsum("qc,qhw->chw", c[1], m[1]),
    "of one, transposed": lambda c, m: torch.einsum("cq,qhw->chw", c[1].t(), m[1]),
    "of one, any": lambda c, m: torch.einsum("...qk,...qhw->...khw", c[0], m[0]),
}
OTHERS = {
    "another order": lambda c, m: torch.einsum("bqc,bqhw->bhwc", c, m),
    "a sum over pixels": lambda c, m: torch.einsum("bqc,bqhw->bc", c, m),
    "no batch in the classes": lambda c, m: torch.einsum("qc,bqhw->bchw", c[0], m),
    "over the batch": lambda c, m: torch.einsum("bqc,bqhw->chw", c, m),
    "a diagonal": lambda c, m: torch.einsum("bqc,bqhh->bch", c, m[..., :48, :]),
    "three operands": lambda c, m: torch.einsum("bqc,bqhw,c->bchw", c, m, torch.ones(4)),
    "implicit": lambda c, m: torch.einsum("bqc,bqhw", c, m),
    "masks twice": lambda c, m: torch.einsum("bqhw,bqhw->bhw", m, m),
    "in double": lambda c, m: torch.einsum("bqc,bqhw->bchw", c.double(), m.double()),
    "a broadcast batch": lambda c, m: torch.einsum("...qk,...qhw->...khw", c[:1], m),
    "matmul": lambda c, m: c.transpose(1, 2) @ m.flatten(2),
}


@pytest.mark.parametrize("form", [*FORMS, *OTHERS])
def test_a_sum_over_queries_gives_what_it_gives(form: str) -> None:
    masks, lazy, classes = pair()
    run = (FORMS | OTHERS)[form]
    probability = resize(lazy, (64, 48)).sigmoid()
    close(run(classes, probability), run(classes, resize(masks, (64, 48)).sigmoid()))
    assert waiting(probability) == (form in FORMS)


def test_chosen_queries_stay_lazy() -> None:
    masks, lazy, _ = pair()
    full = resize(lazy, (64, 48))[1].sigmoid()
    right = resize(masks, (64, 48))[1].sigmoid()
    keep = torch.arange(12) % 3 == 1
    for index in (keep, torch.tensor([3, 3, -1]), torch.zeros(12, dtype=torch.bool)):
        some = full[index]
        assert waiting(some) and some.shape == right[index].shape
        with Largest() as made:
            doubled = some * 2
        # To rounding: how torch interpolates depends on the number of maps.
        torch.testing.assert_close(doubled, right[index] * 2, rtol=2e-6, atol=0)
        assert made.elements == some.numel() < right.numel()
    assert waiting(full)
    logits = resize(lazy, (64, 48))[1][keep]
    assert waiting(logits) and torch.equal(logits > 0, resize(masks, (64, 48))[1][keep] > 0)
    with pytest.raises(IndexError):
        full[torch.ones(11, dtype=torch.bool)]
    with pytest.raises(IndexError):
        full[torch.tensor([12])]


EVERYTHING = {
    "number": lambda t: t[1, 2, 3, 4],
    "query": lambda t: t[:, 2],
    "from the middle": lambda t: t[:, :, 2:9, 3:],
    "with a step": lambda t: t[..., ::2, ::3],
    "to the end": lambda t: t[..., :-1, :-2],
    "none of it": lambda t: t[..., :0, :5],
    "new axis": lambda t: t[:, None],
    "list": lambda t: t[[1, 0]],
    "last image": lambda t: t[-1],
    "image 9": lambda t: t[9],
    "cut twice": lambda t: t[..., :20, :30][:, :, :25, :10],
    "cut": lambda t: t[..., :20, :],
    "unbind": lambda t: torch.stack(t.unbind(0)),
    "unbind queries": lambda t: torch.stack(t.unbind(1)),
    "unsqueeze": lambda t: t[0].unsqueeze(0),
    "unsqueeze last": lambda t: t[0].unsqueeze(-1),
    "squeeze": lambda t: t[0][None].squeeze(0),
    "squeeze all": lambda t: t[0][None].squeeze(),
    "expand": lambda t: t[0].expand(3, -1, -1, -1),
    "expand to its own": lambda t: t[0].expand((1, 12, 64, 48)),
    "argmax": lambda t: t.argmax(1),
    "compare": lambda t: t > 0,
    "mean": lambda t: t.mean(),
    "tolist": lambda t: torch.tensor(t[0, 0, :2, :2].tolist()),
    "numpy": lambda t: torch.from_numpy(np.asarray(t)),
    "cat": lambda t: torch.cat([t, t]),
    "twice": lambda t: resize(resize(t, (20, 30)), (10, 11)),
    "three times": lambda t: resize(resize(resize(t, (20, 30)), (10, 11)), (12, 40)),
    "nearest": lambda t: F.interpolate(t, size=(20, 30), mode="nearest"),
    "corners": lambda t: F.interpolate(t, size=(20, 30), mode="bilinear", align_corners=True),
    "antialias": lambda t: F.interpolate(t, size=(20, 30), mode="bilinear", antialias=True),
    "factor": lambda t: F.interpolate(t, scale_factor=2, mode="bilinear"),
    "one size": lambda t: F.interpolate(t, 20, mode="bilinear"),
    "sigmoid twice": lambda t: t.sigmoid().sigmoid(),
    "sigmoid of a cut": lambda t: torch.sigmoid(t[..., :20, :30]),
    "cut of a sigmoid": lambda t: t.sigmoid()[..., :20, :30],
    "sigmoid into": lambda t: torch.sigmoid(t, out=torch.empty(t.shape)),
    "expit": lambda t: torch.special.expit(t),
    "double": lambda t: t.double(),
    "float": lambda t: t.float(),
    "to bfloat16": lambda t: t.to(torch.bfloat16),
    "to itself": lambda t: t.to("cpu", torch.float32),
    "to another": lambda t: t.to(torch.ones(1)),
    "a copy": lambda t: t.to(torch.float32, copy=True),
    "contiguous": lambda t: t[..., :20, :30].contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "deepcopy": lambda t: copy.deepcopy(t),
    "saved": lambda t: saved(t),
    "repr": lambda t: torch.tensor([ord(c) for c in repr(t)]),
    "attribute": lambda t: t[0].mT,
    "new_zeros": lambda t: t.new_zeros(3),
    "out": lambda t: torch.add(t, t, out=torch.empty(t.shape)),
    "module": lambda t: torch.nn.Conv2d(12, 2, 1).requires_grad_(False).double()(t.double()) * 0,
    "as_strided": lambda t: t.contiguous().as_strided((2, 2), (3, 1)),
    "masked": lambda t: torch.ones(2, 12, 64, 48)[t > 0].sum(),
    "operator": lambda t: torch.ops.aten.mul.Tensor(t, 2),
    "our operator": lambda t: torch.ops.opentrans_kernels.mask_scores(
        t, torch.ones(2, 12, 1), [], [], []
    ),
    "a function of autograd": lambda t: Twice.apply(t),
    "strides": lambda t: torch.tensor([*t.stride(), *t[..., :9, :9].stride(), *t[1].stride()]),
    "offset": lambda t: torch.tensor(t[..., :9, :9].storage_offset()),
}


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.add.Tensor(x, x)


def saved(t: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", EVERYTHING)
def test_everything_else_is_what_the_tensor_gives(name: str) -> None:
    masks, lazy, _ = pair()
    run = EVERYTHING[name]
    outcomes = []
    for given in (masks, lazy):
        try:
            outcomes.append(run(resize(given, (64, 48))))
        except Exception as error:
            outcomes.append(error)
    right, found = outcomes
    if isinstance(right, Exception):
        assert type(found) is type(right) and str(found) == str(right)
        return
    assert isinstance(found, torch.Tensor), found
    assert found.shape == right.shape and found.dtype == right.dtype
    assert found.stride() == right.stride()
    torch.testing.assert_close(found * 1, right * 1, rtol=0, atol=0)


def test_what_is_written_to_one_view_is_seen_in_the_others() -> None:
    for dense in (True, False):
        masks, lazy, _ = pair()
        full = resize(masks if dense else lazy, (64, 48))
        first, cut = full[0], full[..., :20, :30]
        before = full.sigmoid()
        first.mul_(0)
        cut[1, 2] = 7
        full[:, 3] += 1
        seen = [t.clone() for t in (full, first, cut, full[0], before)]
        if dense:
            right = seen
    assert all(torch.equal(a, b) for a, b in zip(seen, right, strict=True))


def test_masks_that_were_read_or_written_to_are_enlarged_as_they_are() -> None:
    masks, lazy, classes = pair()
    kept = masks.clone()
    early = resize(lazy, (32, 24)).sigmoid()
    lazy[:, 0] = 5
    assert torch.equal(masks, kept)
    changed = kept.clone()
    changed[:, 0] = 5
    late = resize(lazy, (32, 24)).sigmoid()
    assert waiting(early) and waiting(late)
    lazy.zero_()
    assert torch.equal(early, resize(kept, (32, 24)).sigmoid())
    close(
        torch.einsum("bqc,bqhw->bchw", classes, late),
        torch.einsum("bqc,bqhw->bchw", classes, resize(changed, (32, 24)).sigmoid()),
    )
    assert not lazy.any() and torch.equal(resize(lazy, (4, 4)), torch.zeros(2, 12, 4, 4))


def test_what_cannot_wait_is_returned_as_it_is() -> None:
    masks = torch.randn(1, 3, 4, 5)
    others = (
        masks.double(), masks.bfloat16(), masks[0, 0], masks[..., ::2], masks[:, :0],
        masks.clone().requires_grad_(), torch.nn.Parameter(masks, requires_grad=False),
        masks.to("meta"),
    )  # fmt: skip
    for other in others:
        assert lazy_masks(other) is other
    with torch.autocast("cpu", torch.bfloat16):
        assert lazy_masks(masks) is masks
    lazy = lazy_masks(masks)
    assert lazy_masks(lazy) is lazy and waiting(lazy_masks(masks[0]))
    run = torch.compile(lambda m: resize(lazy_masks(m), (8, 8)).sigmoid(), backend="eager")
    assert type(run(masks)) is torch.Tensor


def test_a_product_under_autocast_or_with_a_gradient_is_dense() -> None:
    masks, lazy, classes = pair()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.einsum("bqc,bqhw->bchw", classes, resize(lazy, (32, 24)).sigmoid())
        right = torch.einsum("bqc,bqhw->bchw", classes, resize(masks, (32, 24)).sigmoid())
    assert found.dtype == torch.bfloat16 and torch.equal(found, right)
    classes.requires_grad_()
    probability = resize(lazy, (32, 24)).sigmoid()
    torch.einsum("bqc,bqhw->bchw", classes, probability).sum().backward()
    right = resize(masks, (32, 24)).sigmoid().sum((2, 3))[..., None].expand(-1, -1, 4)
    torch.testing.assert_close(classes.grad, right)


@pytest.mark.parametrize("first", (True, False))
def test_a_whole_model_gives_the_same(first: bool) -> None:
    model = MaskClassifier(first).eval()
    images = torch.randn(2, 3, 64, 48)
    with torch.inference_mode():
        dense = model(images, *OUT)
        report = otk.accelerate_heads(model)
        fast = model(images, *OUT)
    assert [p.path for p in report.replaced] == ["sem_seg_head"]
    assert "1 x mask classifier: masks enlarged tile by tile" in str(report)
    for ours, theirs in zip(fast, dense, strict=True):
        for found, right in zip(ours, theirs, strict=True):
            assert type(found) is torch.Tensor
            if right.is_floating_point():
                close(found, right)
            else:
                assert torch.equal(found, right)
    otk.restore_heads(model)
    with torch.inference_mode():
        again = model(images, *OUT)
    for ours, theirs in zip(again, dense, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_semantic_segmentation_makes_no_map_of_all_queries() -> None:
    model = MaskClassifier().eval()
    model.panoptic = model.instances = lambda classes, mask: ()
    images, sizes = torch.randn(1, 3, 64, 48), ((61, 45), (160, 140))
    with torch.no_grad():
        with Largest() as dense:
            model(images, *sizes)
        otk.accelerate_heads(model)
        with Largest() as ours:
            model(images, *sizes)
    assert dense.elements == 20 * 160 * 140
    assert ours.elements == 5 * 160 * 140  # the result


def test_training_and_hooks_and_state_are_left_alone() -> None:
    model = MaskClassifier().eval()
    images = torch.randn(1, 3, 64, 48)
    state = copy.deepcopy(model.state_dict())
    otk.accelerate_heads(model)
    head = model.sem_seg_head
    assert head.num_classes == 5 and head.layers({"res2": images})["pred_masks"].requires_grad
    outputs = model.train()(images, *OUT)
    assert type(outputs["pred_masks"]) is torch.Tensor
    outputs["pred_masks"].sum().backward()
    assert head.scale.grad is not None
    model.eval()
    assert type(head({"res2": images})["pred_masks"]) is torch.Tensor  # it has a gradient
    with torch.no_grad():
        seen: list = []
        handle = head.register_forward_hook(lambda *args: seen.append(args[-1]["pred_masks"]))
        assert waiting(head({"res2": images})["pred_masks"]) and len(seen) == 1
        handle.remove()
    now = model.state_dict()
    assert now.keys() == state.keys() and now._metadata == state._metadata
    old = {("sem_seg_head.factor" if k.endswith("scale") else k): v + 1 for k, v in state.items()}
    model.load_state_dict(old)
    assert all(torch.equal(v, state[k] + 1) for k, v in model.state_dict().items())
    otk.restore_heads(model)
    model.sem_seg_head.register_forward_hook(lambda *args: None)
    report = otk.accelerate_heads(model)
    assert [(p.path, p.reason) for p in report.left] == [("sem_seg_head", "has hooks")]


def test_transformers_take_lazy_masks() -> None:
    pytest.importorskip("transformers", reason="its image processor is what is tried")
    pytest.importorskip("torchvision", reason="its image processor needs torchvision")
    from transformers import Mask2FormerImageProcessor
    from transformers.models.mask2former.modeling_mask2former import (
        Mask2FormerForUniversalSegmentationOutput,
    )

    made = torch.Generator().manual_seed(0)
    masks = 4 * torch.randn(2, 12, 24, 24, generator=made)
    logits = 3 * torch.randn(2, 12, 5, generator=made)
    processor = Mask2FormerImageProcessor()
    found = []
    for given in (masks, lazy_masks(masks)):
        outputs = Mask2FormerForUniversalSegmentationOutput(
            class_queries_logits=logits, masks_queries_logits=given
        )
        with Largest() as made_here:
            labels = processor.post_process_semantic_segmentation(outputs, [(60, 90), (45, 30)])
        panoptic = processor.post_process_panoptic_segmentation(
            outputs, threshold=0.1, target_sizes=[(60, 90), (45, 30)]
        )
        found.append((made_here.elements, labels, panoptic))
    (whole, dense, segments), (tiles, ours, same) = found
    assert whole == 2 * 12 * 384 * 384 and tiles == 2 * 4 * 384 * 384
    for a, b in zip(ours, dense, strict=True):
        assert int((a != b).sum()) <= 1e-4 * a.numel()
    for a, b in zip(same, segments, strict=True):
        assert a["segments_info"] == b["segments_info"]
        assert int((a["segmentation"] != b["segmentation"]).sum()) <= 1
