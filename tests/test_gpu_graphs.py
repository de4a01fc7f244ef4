"""The cache of CUDA graphs with a capturer that only pretends: buckets, bounds, order, failures."""

from __future__ import annotations

import threading

import pytest
import torch
from gpu_cases import FakeCapturer

from opentrans_kernels.errors import KernelUnavailable, PlanError
from opentrans_kernels.gpu import GraphCache

LIKE = torch.empty(0)


def forward(x: torch.Tensor) -> list[torch.Tensor]:
    return [x * 2, x.sum((2, 3), keepdim=True)]


def cache(capturer: FakeCapturer | None = None, **options) -> GraphCache:
    return GraphCache(
        forward, LIKE, capturer=FakeCapturer() if capturer is None else capturer, **options
    )


def image(h: int, w: int = 4, n: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, h, w)


def right(found: list[torch.Tensor], x: torch.Tensor) -> None:
    for got, want in zip(found, forward(x), strict=True):
        torch.testing.assert_close(got, want)


def test_every_call_is_right_whether_captured_or_not() -> None:
    graphs = cache(capture_after=2, capacity=2)
    torch.manual_seed(1)
    for step in range(40):
        x = image(2 + step * 7 % 5, n=step % 3)
        right(graphs(x), x)
    stats = graphs.stats
    assert stats.captures > 3 and stats.replays > 5 and stats.eager > 5 and stats.evicted > 0
    assert len(graphs.shapes) <= 2
    assert all(shape[0] > 0 for shape in graphs.shapes), "nothing to capture for an empty batch"


def test_a_shape_seen_once_costs_no_capture() -> None:
    graphs = cache(capture_after=3)
    for expected in (0, 0, 1, 1):
        x = image(4)
        right(graphs(x), x)
        assert graphs.stats.captures == expected
    for h in range(5, 50):
        graphs(image(h))
    assert graphs.stats.captures == 1 and graphs.shapes == [(1, 3, 4, 4)]


def test_outputs_outlive_the_next_call_unless_told_otherwise() -> None:
    graphs = cache(capture_after=1)
    x, other = image(4), image(4)
    first = graphs(x)
    graphs(other)
    right(first, x)
    kept = graphs(x, None, [0])
    graphs(other)
    torch.testing.assert_close(kept[0], forward(x)[0])
    torch.testing.assert_close(kept[1], forward(other)[1])  # handed out without a copy
    assert [y.dtype for y in graphs(x, torch.float16)] == [torch.float16] * 2
    assert [y.dtype for y in cache(capture_after=9)(x, torch.float64)] == [torch.float64] * 2


def test_an_output_that_is_not_copied_is_a_new_tensor_for_every_call() -> None:
    """What a caller attaches to one call's output must not appear on a later one's."""
    graphs = cache(capture_after=1)
    first = graphs(image(4), None, [1])[0]
    second = graphs(image(4), None, [1])[0]
    assert first is not second and first.data_ptr() == second.data_ptr()


def test_the_least_recently_used_graph_goes_first() -> None:
    graphs = cache(capture_after=1, capacity=2)
    for h in (4, 5, 4, 6):
        graphs(image(h))
    assert [shape[2] for shape in graphs.shapes] == [4, 6]
    assert graphs.stats.evicted == 1


def test_memory_is_bounded() -> None:
    capturer = FakeCapturer(size=10)
    graphs = cache(capturer, capture_after=1, max_bytes=25)
    for h in (4, 5, 6, 7):
        x = image(h)
        right(graphs(x), x)
        assert capturer.bytes() <= 25
    assert capturer.log.count("reset") == 1 and [s[2] for s in graphs.shapes] == [6, 7]
    graphs.clear()
    assert capturer.bytes() == 0 and graphs.shapes == []
    big = cache(FakeCapturer(size=99), capture_after=1, max_bytes=25)
    x = image(4)
    right(big(x), x)
    assert len(big.shapes) == 1, "one graph is always allowed"


def test_out_of_memory_falls_back_once_and_says_so(caplog, set_env) -> None:
    bad = image(5)
    capturer = FakeCapturer(fail={tuple(bad.shape)})
    graphs = cache(capturer, capture_after=1)
    graphs(image(4))
    for _ in range(3):
        right(graphs(bad), bad)
    assert capturer.log.count("reset") == 1, "the others' memory was given back"
    assert len(caplog.records) == 1 and "it runs without: out of memory" in caplog.text
    assert list(graphs.stats.failed) == [(1, 3, 5, 4)]
    set_env(OPENTRANS_STRICT="1")
    strict = cache(FakeCapturer(fail={tuple(bad.shape)}), capture_after=1)
    with pytest.raises(KernelUnavailable, match="smaller batch or image"):
        strict(bad)


def test_streams_and_threads_are_ordered() -> None:
    """Between two uses of a graph's memory lie its own end and the next begin, in any thread."""
    capturer = FakeCapturer()
    graphs = cache(capturer, capture_after=1)
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            x = torch.randn(1, 3, 3 + seed % 2, 4, generator=generator)
            if not torch.equal(graphs(x)[0], x * 2):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and graphs.stats.replays == 80
    steps = [s for s in capturer.log if s in ("begin", "replay", "end")]
    inside = False
    for before, step in zip([None, *steps], steps, strict=False):
        if step == "replay":
            assert before == "begin"
        if step == "end":
            assert before == "replay"
        inside = step == "replay"
    assert not inside


def test_other_layouts_and_dtypes_are_converted() -> None:
    graphs = GraphCache(
        lambda x: [x], torch.empty(0, dtype=torch.float16), capturer=FakeCapturer(),
        capture_after=1,
    )  # fmt: skip
    x = torch.randn(2, 3, 4, 5).transpose(2, 3)
    for given in (x, x.double(), x.contiguous(memory_format=torch.channels_last)):
        (found,) = graphs(given)
        assert found.dtype == torch.float16
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, given.half())


def test_without_a_capturer_nothing_is_captured() -> None:
    graphs = GraphCache(forward, LIKE)
    for _ in range(4):
        x = image(4)
        right(graphs(x), x)
    assert graphs.stats.captures == 0 and graphs.stats.eager == 4


@pytest.mark.parametrize("option", ["capacity", "capture_after", "max_bytes"])
def test_bounds_must_be_positive(option: str) -> None:
    with pytest.raises(PlanError, match="graphs=False"):
        cache(**{option: 0})


def test_a_capture_that_fails_otherwise_leaves_the_shape_without_a_graph(set_env) -> None:
    """An operator that cannot be captured: the same numbers without a graph, and the reason."""

    class Refusing(FakeCapturer):
        def capture(self, run):
            raise RuntimeError("operation not permitted when stream is capturing\nMore.")

    graphs, x = cache(Refusing(), capture_after=1), image(4)
    for _ in range(2):
        right(graphs(x), x)
    reason = "operation not permitted when stream is capturing"
    assert graphs.stats.failed == {(1, 3, 4, 4): reason} and graphs.stats.eager == 2
    set_env(OPENTRANS_STRICT="1")
    with pytest.raises(KernelUnavailable, match="unset OPENTRANS_STRICT"):
        cache(Refusing(), capture_after=1)(image(5))


def test_the_host_waits_for_a_replay_before_its_graph_goes() -> None:
    capturer = FakeCapturer()
    graphs = cache(capturer, capacity=1, capture_after=1)
    for side in (4, 5):
        graphs(image(side))
    steps = [step for step in capturer.log if step in ("capture", "wait", "reset")]
    # The pool of the only graph is given up with it.
    assert steps == ["capture", "wait", "reset", "capture"]
