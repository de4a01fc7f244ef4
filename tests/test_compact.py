"""Compaction is exact: float64 property tests against the masked dense network."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from compact_nets import MASK_KINDS, Block, Net, masked, random_masks, randomise, run_compact
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from opentrans_kernels.compact import (
    CompactBlock,
    FoldedConv,
    compact_layers,
    compact_trunk,
    fold_block,
    fold_conv,
    forward_reference,
    rounded,
)
from opentrans_kernels.errors import MaskError, UnsupportedModelError
from opentrans_kernels.topology import ConvNode, find_trunk

CHEAP = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)


def assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    scale = float(want.abs().max()) or 1.0
    assert float((got - want).abs().max()) / scale < 1e-10


@CHEAP
@given(
    seed=st.integers(0, 2**20),
    kinds=st.lists(st.sampled_from(MASK_KINDS), min_size=7, max_size=7),
    style=st.sampled_from(["clip", "torchvision"]),
    basic=st.booleans(),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
)
def test_network_equals_masked_dense(seed, kinds, style, basic, height, width):
    if style == "clip" and basic:
        style = "torchvision"
    if style == "clip":
        height, width = max(2, height), max(2, width)  # a 2x2 pool needs two pixels
    model = Net(style, basic)
    gen = randomise(model, seed)
    masks = random_masks(model, lambda n: kinds[sum(map(ord, n)) % len(kinds)], gen)
    trunk = find_trunk(model)
    assert len(trunk.blocks) == 5, trunk.notes
    x = torch.randn(2, 3, height, width, generator=gen, dtype=torch.float64)
    with torch.no_grad():
        assert_equal(run_compact(trunk, masks, x), masked(model, masks)(x))


@CHEAP
@given(
    seed=st.integers(0, 2**20),
    kinds=st.tuples(*[st.sampled_from(MASK_KINDS)] * 4),
    stride=st.sampled_from([1, 2]),
    style=st.sampled_from(["clip", "torchvision"]),
    basic=st.booleans(),
    size=st.tuples(st.integers(2, 13), st.integers(2, 13)),
)
def test_single_block_equals_masked_dense(seed, kinds, stride, style, basic, size):
    widths = (7, 12) if basic else (7, 5, 12)
    block = Block(6, widths, stride, "torchvision" if basic else style)
    model = nn.Module()
    model.layer1 = nn.Sequential(block)
    gen = randomise(model, seed)
    order = iter(kinds)
    masks = random_masks(model, lambda _: next(order), gen)
    compact = compact_trunk(find_trunk(model), masks).blocks["layer1.0"]
    x = torch.randn(1, 6, *size, generator=gen, dtype=torch.float64)
    with torch.no_grad():
        want = masked(model, masks).layer1(x)
        assert_equal(forward_reference(compact, x), want)
        assert float((forward_reference(compact, x.float()) - want).abs().max()) < 1e-3
    for conv, sets in zip(compact.convs, compact.channels.values(), strict=True):
        assert conv.weight.shape[0] == sets.after == conv.bias.numel()
        assert conv.weight.is_contiguous()


def two_padded(constant: float) -> tuple[CompactBlock, nn.Module, dict[str, torch.Tensor]]:
    """A bottleneck whose conv1 channel 0 is dead and constant; conv2 reads it everywhere."""
    model = nn.Module()
    model.layer1 = nn.Sequential(Block(4, (3, 3, 4), 1, "clip"))
    randomise(model, 3)
    block = model.layer1[0]
    bn = block.bn1
    bn.weight.data[0], bn.running_mean[0], bn.running_var[0] = -1.5, 0.0, 1.0
    bn.bias.data[0] = constant
    masks = {n: torch.ones_like(m.weight, dtype=torch.bool)
             for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}  # fmt: skip
    masks["layer1.0.conv1"][0] = False
    return compact_trunk(find_trunk(model), masks).blocks["layer1.0"], model, masks


def test_plain_bias_fold_is_wrong_at_the_border_and_ours_is_right():
    compact, model, masks = two_padded(constant=2.0)
    assert compact.ones_channel
    assert compact.channels["conv1"].constant == {0: 2.0}
    x = torch.randn(1, 4, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        want = masked(model, masks).layer1(x)
        ours = forward_reference(compact, x)
        # The fold one would write first: every tap's w*c into the bias, no channel of ones.
        full = fold_block(find_trunk(model).blocks[0], masks).convs[1]
        naive = copy.copy(compact)
        plain = FoldedConv(
            full.name,
            compact.conv2.weight[:, :-1],
            full.bias + 2.0 * full.weight[:, 0].sum((1, 2)),
            1,
            1,
            True,
        )
        object.__setattr__(naive, "conv2", plain)
        keep = compact.conv1.weight.shape[0] - 1
        first = FoldedConv("c1", compact.conv1.weight[:keep], compact.conv1.bias[:keep], relu=True)
        object.__setattr__(naive, "conv1", first)
        wrong = (forward_reference(naive, x) - want).abs().amax((0, 1)) > 1e-9
    assert_equal(ours, want)
    assert not wrong[1:-1, 1:-1].any()
    border = wrong.clone()
    border[1:-1, 1:-1] = False
    assert int(border.sum()) == 2 * 9 + 2 * 11 - 4 == 36


def test_zero_constant_vanishes_without_a_channel_of_ones():
    compact, model, masks = two_padded(constant=-2.0)  # relu(-2) = 0
    assert not compact.ones_channel
    assert compact.channels["conv1"].constant == {0: 0.0}
    assert compact.conv1.weight.shape[0] == compact.conv2.weight.shape[1] == 2
    x = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        assert_equal(forward_reference(compact, x), masked(model, masks).layer1(x))


def test_constant_read_only_by_centre_taps_needs_no_channel_of_ones():
    _, model, masks = two_padded(constant=2.0)
    centre = torch.zeros(3, 3, dtype=torch.bool)
    centre[1, 1] = True
    masks["layer1.0.conv2"][:, 0] = centre
    compact = compact_trunk(find_trunk(model), masks).blocks["layer1.0"]
    assert not compact.ones_channel
    x = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        assert_equal(forward_reference(compact, x), masked(model, masks).layer1(x))


def test_fixpoint_follows_chains_in_both_directions():
    model = nn.Module()
    model.layer1 = nn.Sequential(Block(4, (6, 5, 4), 1, "clip"))
    randomise(model, 5)
    block = model.layer1[0]
    for bn in (block.bn1, block.bn2):
        bn.bias.data.fill_(-9.0)  # every constant is relu(-9) = 0
        bn.running_mean.zero_()
        bn.running_var.fill_(1.0)
    names = [f"layer1.0.conv{i}" for i in (1, 2, 3)]
    masks = {n: torch.ones_like(model.get_submodule(n).weight, dtype=torch.bool) for n in names}
    # Backward: conv3 ignores conv2's channel 4, which alone reads conv1's channel 5.
    masks[names[2]][:, 4] = False
    masks[names[1]][:4, 5] = False
    # Forward: conv1's channel 0 is dead with value 0; conv2's channel 1 reads nothing else.
    masks[names[0]][0] = False
    masks[names[1]][1, 1:] = False
    compact = compact_trunk(find_trunk(model), masks).blocks["layer1.0"]
    one, two = compact.channels["conv1"], compact.channels["conv2"]
    assert (one.dead, one.unread, one.live) == ((0,), (5,), (1, 2, 3, 4))
    assert (two.dead, two.unread, two.live) == ((), (4,), (0, 2, 3))
    assert dict(two.constant) == {1: 0.0}
    assert [tuple(c.weight.shape[:2]) for c in compact.convs] == [(4, 4), (3, 4), (4, 3)]
    assert (one.rounded(8), one.rounded(4), two.rounded(2)) == (6, 4, 4)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_all_zero_layer_keeps_one_empty_channel(layer):
    _, model, masks = two_padded(constant=2.0)
    masks[f"layer1.0.conv{layer}"].zero_()
    compact = compact_trunk(find_trunk(model), masks).blocks["layer1.0"]
    assert all(min(c.weight.shape) >= 1 for c in compact.convs)
    x = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        assert_equal(forward_reference(compact, x), masked(model, masks).layer1(x))
    if layer == 3:
        assert compact.channels["conv1"].after == compact.channels["conv2"].after == 1


def residual_net() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Stage of four blocks; output channels 0 and 3 of the stream are constant from block 0 on."""
    model = nn.Module()
    model.layer1 = nn.Sequential(*(Block(c, (4, 4, 6), 1, "clip") for c in (5, 6, 6, 6)))
    randomise(model, 11)
    masks = {n: torch.ones_like(m.weight, dtype=torch.bool)
             for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}  # fmt: skip
    for name, mask in masks.items():
        if name.endswith(("conv3", "downsample.1")):
            mask[[0, 3]] = False
    masks["layer1.2.conv3"][3] = True  # channel 3 comes alive again in block 2
    return model, masks


def test_constants_of_the_residual_stream_travel_through_the_stage():
    model, masks = residual_net()
    trunk = find_trunk(model)
    compact = compact_trunk(trunk, masks)
    used = [sorted(s.constant_in) for s in compact.summaries.values()]
    assert used == [[], [0, 3], [0, 3], [0]]
    for name in ("layer1.1", "layer1.2"):
        assert not compact.blocks[name].conv1.weight[:, [0, 3]].any()
    x = torch.randn(2, 5, 7, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        want = masked(model, masks).layer1(x)
        assert_equal(run_compact(trunk, masks, x), want)
        out = compact.summaries["layer1.3"].constant_out
        assert list(out) == [0]
        assert torch.allclose(want[:, 0], torch.full_like(want[:, 0], out[0]), atol=1e-12)
    assert "2 constant input channels folded away" in compact.report()


def test_blocks_stand_alone_without_residual_constants():
    model, masks = residual_net()
    compact = compact_trunk(find_trunk(model), masks, residual_constants=False)
    assert all(not s.constant_in for s in compact.summaries.values())
    dense = masked(model, masks)
    x = torch.randn(1, 6, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        for i in (1, 2, 3):
            assert_equal(forward_reference(compact.blocks[f"layer1.{i}"], x), dense.layer1[i](x))


def test_an_unrecognised_block_interrupts_the_constants():
    model, masks = residual_net()
    model.layer1[1].conv2.groups = 2
    model.layer1[1].conv2.weight.data = model.layer1[1].conv2.weight.data[:, :2].contiguous()
    masks.pop("layer1.1.conv2")
    trunk = find_trunk(model)
    assert [b.name for b in trunk.blocks] == ["layer1.0", "layer1.2", "layer1.3"]
    compact = compact_trunk(trunk, masks)
    assert [sorted(s.constant_in) for s in compact.summaries.values()] == [[], [], []]


def test_stem_rows_nobody_reads_are_emptied_and_the_visible_output_stays():
    model = Net("clip", False)
    gen = randomise(model, 7)
    masks = random_masks(model, lambda _: "full", gen)
    masks["conv3"][:, 2] = False  # nobody reads conv2's channel 2 ...
    masks["conv2"][[0, 1, 3, 4], 1] = False  # ... and only that reads conv1's channel 1
    masks["layer1.0.conv1"][:, 4] = False
    masks["layer1.0.downsample.1"][:, 4] = False
    trunk = find_trunk(model)
    compact = compact_trunk(trunk, masks)
    assert compact.stem_channels["conv2"].unread == (2,)
    assert compact.stem_channels["conv1"].unread == (1,)
    assert compact.stem_channels["conv3"].unread == ()
    assert not compact.stem["conv2"].weight[2].any() and compact.stem["conv2"].bias[2] == 0
    assert not compact.stem["conv1"].weight[1].any()
    x = torch.randn(1, 3, 9, 7, generator=gen, dtype=torch.float64)
    with torch.no_grad():
        y = x
        for conv in compact.stem.values():
            y = F.relu(F.conv2d(y, conv.weight, conv.bias, conv.stride, conv.padding))
        assert_equal(y, masked(model, masks).stem(x))
    assert "conv2: 1 unread output channels emptied" in compact.report()


def test_without_masks_the_zeros_of_the_weights_count():
    model, masks = residual_net()
    trunk = find_trunk(masked(model, masks))
    own, given = compact_trunk(trunk), compact_trunk(find_trunk(model), masks)
    assert [r["after"] for r in own.rows()] == [r["after"] for r in given.rows()]


def test_model_and_masks_are_left_alone():
    model, masks = residual_net()  # float64: a cast alone would not copy
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in masks.items()}
    compact = compact_trunk(find_trunk(model), masks)
    compact.blocks["layer1.0"].conv1.weight.zero_()
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(before[k], v) for k, v in masks.items())


def test_bad_masks_and_weights_are_named():
    model, masks = residual_net()
    trunk = find_trunk(model)
    with pytest.raises(MaskError, match=r"nope.*Masks are matched by module name"):
        compact_trunk(trunk, {"nope": masks["layer1.0.conv1"]})
    with pytest.raises(MaskError, match=r"layer1.0.conv1.*\(4, 4, 3, 3\).*use one made for"):
        compact_trunk(trunk, {"layer1.0.conv1": masks["layer1.0.conv2"]})
    with pytest.raises(MaskError, match=r"other than 0 and 1.*binarise"):
        compact_trunk(trunk, {"layer1.0.conv1": masks["layer1.0.conv1"] * 0.5})
    model.layer1[0].conv1.weight.data[0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"layer1.0.conv1: 1 of 20 weights are NaN"):
        compact_trunk(trunk, {"layer1.0.conv1": torch.zeros(4, 5, 1, 1)})


def test_fold_conv_refuses_what_it_cannot_express():
    node = ConvNode("c", nn.Conv2d(4, 4, 3, dilation=(2, 1)))
    with pytest.raises(UnsupportedModelError, match=r"dilation \(2, 1\).*Leave it dense"):
        fold_conv(node)


def test_compact_layers_takes_constants_of_a_padded_input():
    """A 3x3 reader of the residual stream may drop zero constants only."""
    model = nn.Module()
    model.layer1 = nn.Sequential(Block(4, (3, 4), 1, "torchvision"))
    gen = randomise(model, 13)
    layers = fold_block(find_trunk(model).blocks[0])
    x = torch.randn(1, 4, 5, 6, generator=gen, dtype=torch.float64)
    x[:, 0], x[:, 1] = 0.0, 1.5
    compact, _ = compact_layers(layers, {0: 0.0, 1: 1.5})
    assert not compact.conv1.weight[:, 0].any()
    assert compact.conv1.weight[:, 1].any()
    with torch.no_grad():
        assert_equal(forward_reference(compact, x), model.layer1(x))


def test_rounded():
    assert [rounded(w, 8) for w in (1, 8, 9, 57)] == [8, 8, 16, 64]
