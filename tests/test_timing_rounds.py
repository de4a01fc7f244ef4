"""Short measurements on a fake clock: numbers that agree, and disturbed rounds measured again."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import accel_nets as nets
import pytest
import torch

from opentrans_kernels import accelerate
from opentrans_kernels.plan import clock as plan_clock
from opentrans_kernels.timing import rounds
from opentrans_kernels.timing.canary import Reading
from opentrans_kernels.timing.rounds import Clock, PairTiming, measure_pair
from opentrans_kernels.timing.spread import Spread, median_pair

COMPARE = sys.modules["opentrans_kernels.accelerate.compare"]  # the package's name is a function
QUIET_MS = 0.25


@pytest.fixture(autouse=True)
def rounds_as_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests measure in the fewest rounds, see ``conftest``."""
    of_pairs = {"budget_s": rounds.BUDGET_S, "rounds": rounds.ROUNDS, "extra_s": rounds.EXTRA_S}
    monkeypatch.setattr(measure_pair, "__kwdefaults__", {**of_pairs, "clock": None})
    of_plans = (plan_clock.BUDGET_S, plan_clock.ROUNDS)
    monkeypatch.setattr(plan_clock.interleaved_ms, "__defaults__", of_plans)


class Machine:
    """Time that passes only in calls; ``slow(seconds) -> factor`` says how busy others are.

    stolen: they take the core, so that CPU time stays what it was; else they slow it down.
    """

    def __init__(
        self, slow: Callable[[float], float] = lambda _: 1.0, stolen: bool = False
    ) -> None:
        self.now = self.used = 0.0
        self.slow, self.stolen = slow, stolen
        self.calls = 0
        self.clock = Clock(lambda: self.now, lambda: self.used, self.look)

    def work(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            factor = self.slow(self.now)
            self.calls += 1
            self.now += seconds * factor
            self.used += seconds * (1 if self.stolen else factor)

        return call

    def look(self, threads: int) -> Reading:
        ms = QUIET_MS * self.slow(self.now)
        self.now += 0.02
        wall = Spread.of([ms] * 3)
        return Reading(wall, wall, 0.0, 1.0)


@pytest.fixture(autouse=True)
def _one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_quiet_machine_needs_no_more_than_its_rounds() -> None:
    machine = Machine()
    found = measure_pair(machine.work(0.1), machine.work(0.04), clock=machine.clock)
    assert (found.before_ms, found.after_ms) == pytest.approx((100, 40))
    assert found.rounds % 2 == 1 and found.left_out == 0
    assert not found.disturbed and found.notes() == []
    assert machine.calls == 2 * (found.rounds + 2)
    assert found.rule == f"median round of {found.rounds} rounds"


@pytest.mark.parametrize("stolen", [False, True])
def test_disturbed_rounds_are_measured_again_and_left_out(stolen: bool) -> None:
    machine = Machine(lambda now: 3.0 if 0.5 < now < 0.9 else 1.0, stolen)
    quiet = Machine()
    wanted = measure_pair(quiet.work(0.1), quiet.work(0.04), clock=quiet.clock).rounds
    found = measure_pair(machine.work(0.1), machine.work(0.04), clock=machine.clock)
    assert (found.before_ms, found.after_ms) == pytest.approx((100, 40))
    assert found.q1 == pytest.approx(2.5) == found.q3, "no disturbed round is in the spread"
    assert found.rounds == wanted and found.left_out > 0 and not found.disturbed
    (note,) = found.notes()
    assert f"{found.left_out} of {wanted + found.left_out} rounds were disturbed" in note
    assert ("waited for a core" in note) if stolen else ("fixed dense kernel" in note)


def test_the_disturbance_would_have_decided_otherwise() -> None:
    """A burst that meets only the sides afterwards: the median of all rounds says slower."""
    turn = iter(range(10**6))
    machine = Machine()

    def after() -> None:
        burst = 2 <= next(turn) < 5  # the first three of five rounds
        machine.slow = (lambda _: 3.0) if burst else (lambda _: 1.0)
        machine.work(0.08)()

    found = measure_pair(machine.work(0.1), after, budget_s=1.0, clock=machine.clock)
    assert found.speedup == pytest.approx(1.25) and found.left_out in (3, 4)


def test_a_machine_that_stays_disturbed_is_bounded_and_said() -> None:
    noise = random.Random(1)
    machine = Machine(lambda _: noise.choice([1.5, 2.0, 3.0]))
    found = measure_pair(machine.work(0.1), machine.work(0.04), clock=machine.clock)
    assert found.disturbed and found.left_out == 0
    assert machine.now < 60 and machine.calls <= 2 * (2 * 15 + 2)
    assert (found.before_ms, found.after_ms) == pytest.approx((150, 60)), "the smallest of each"
    assert found.rule == f"smallest times of {found.rounds} rounds on a disturbed machine"
    assert "disturbed machine" in found.notes()[0] and "these decided" in found.notes()[0]


def test_extra_rounds_end_with_their_time() -> None:
    machine = Machine(lambda now: 1 + now / 10)  # slower and slower
    found = measure_pair(machine.work(3.0), machine.work(1.0), clock=machine.clock)
    assert found.disturbed and found.rounds == 4, "three rounds, and one that took over 2 seconds"


@pytest.mark.parametrize("seed", range(200))
def test_what_is_printed_agrees_with_itself(seed: int) -> None:
    noise = random.Random(seed)
    machine = Machine(lambda _: noise.lognormvariate(0, noise.choice([0.01, 0.3, 1.0])))
    before, after = noise.uniform(1e-3, 0.3), noise.uniform(1e-3, 0.3)
    found = measure_pair(machine.work(before), machine.work(after), clock=machine.clock)
    check_agrees(f"{found.before_ms:.2f}", f"{found.after_ms:.2f}", f"{found.speedup:.2f}")
    if not found.disturbed:
        assert found.q1 <= found.speedup <= found.q3
    assert found.to_dict()["speedup"] == found.before_ms / found.after_ms
    assert bool(found.notes()) == (found.disturbed or found.left_out > 0)


def check_agrees(before: str, after: str, speedup: str) -> None:
    """Printed with two decimals, the quotient of the times is the speed-up."""
    low = (float(before) - 0.0051) / (float(after) + 0.0051)
    high = (float(before) + 0.0051) / max(float(after) - 0.0051, 1e-9)
    assert low - 0.0051 <= float(speedup) <= high + 0.0051, (before, after, speedup)


def test_medians_of_sides_would_contradict_the_ratio() -> None:
    """The rounds of a report that read '96.27 ms before, 314.99 after: 2.44x'."""
    before, after = [96.27, 95.0, 900.0], [39.45, 314.99, 330.0]
    pair = median_pair(before, after)
    assert (pair.slow_ms, pair.fast_ms) == (96.27, 39.45)
    assert pair.ratios.median == pair.slow_ms / pair.fast_ms == pytest.approx(2.44, abs=0.005)
    assert pair.ratios.n == 3 and pair.ratios.maximum == pytest.approx(900 / 330)
    even = median_pair([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    assert even.ratios.median == even.slow_ms == 2.0, "a round that took place, claiming less"
    two = median_pair([1.0, 3.0], [1.0, 1.0]).ratios
    assert (two.q1, two.median, two.q3) == (1.0, 1.0, 2.5), "no median beside its quartiles"


def test_to_dict_is_plain() -> None:
    found = PairTiming(2.0, 1.0, 1.9, 2.1, 5, 1, False, ("a reason",)).to_dict()
    assert found["speedup"] == 2.0 and found["reasons"] == ["a reason"]


def test_a_form_that_only_a_burst_made_hopeless_is_measured_after_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine()
    monkeypatch.setattr(plan_clock.time, "process_time", lambda: machine.now)
    turns = {"sparse": 0, "dense": 0}

    def form(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            turns[name] += 1
            burst = name == "sparse" and turns[name] <= 4  # its first touch and all first samples
            machine.work(seconds * (4 if burst else 1))()

        return call

    calls = {"sparse": form("sparse", 0.004), "dense": form("dense", 0.006)}
    ms = plan_clock.undisturbed(plan_clock.interleaved_ms(calls))
    assert ms == pytest.approx({"sparse": 4.0, "dense": 6.0})


def test_a_hopeless_form_costs_one_call_more(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(plan_clock.time, "process_time", lambda: machine.now)
    calls = {"a": machine.work(0.004), "b": machine.work(0.04)}
    samples = plan_clock.interleaved_ms(calls)
    assert len(samples["b"]) == 2 and len(samples["a"]) == plan_clock.ROUNDS[1]


def test_a_disturbed_measurement_is_told_with_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    why = ("samples waited for a core",)
    slower = PairTiming(1.0, 1.5, 0.6, 0.7, 3, disturbed=True, reasons=why)
    monkeypatch.setattr(COMPARE, "measure_pair", lambda *_: slower)
    model = nets.tower()
    nets.random_masks(model).apply_(model)
    text = str(report := accelerate(model))
    assert not report.accelerated and report.to_dict()["timing"]["disturbed"]
    assert "1.50 ms against 1.00 ms, smallest times of 3 rounds on a disturbed machine" in text
    assert "disturbed machine: samples waited for a core" in text
    faster = PairTiming(2.0, 1.0, 1.9, 2.1, 3, 2, reasons=why)
    monkeypatch.setattr(COMPARE, "measure_pair", lambda *_: faster)
    text = str(report := accelerate(model))
    assert report.accelerated and "2.00 ms before, 1.00 ms after: 2.00x" in text
    assert "2 of 5 rounds were disturbed, measured again and left out: samples waited" in text
