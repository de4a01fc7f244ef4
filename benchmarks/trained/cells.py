"""The cells of the study: ways of pruning, each under one budget."""

from __future__ import annotations

from typing import Any

from opentrans.trained.recipe import FIT_BELOW, Recipe
from opentrans.trained.subjects import SUBJECTS

BUDGET = 300  # steps of every trained cell but the long ones
LONG = 3000  # steps of those: 22 rounds and a recovery, or a fit and a recovery
FIT = 64  # crops that kept weights are refitted on
SELECT = 30  # turns in which weights are chosen anew while they are
LATENCY = 0.3  # how much milliseconds weigh in that allocation
BARE = {"untrained/": {}, "fitted/": {"fit": FIT}, "selected/": {"fit": FIT, "select": SELECT}}


def _kinds(allocation: str, density: float, quick: bool) -> tuple[str, ...]:
    """What else is done to masks of that density without a training step."""
    if density > FIT_BELOW:
        return ()
    return ("fitted",) if quick or allocation == "random" else ("fitted", "selected")


def cells_of(name: str, quick: bool) -> dict[str, Any]:
    """Cell -> how to run it: a Recipe, or a tuple for the untrained and random ones."""
    found: dict[str, Any] = {}
    densities = (0.1,) if quick else (0.5, 0.3, 0.2, 0.1)
    ways = (
        ("global", 0.5), ("uniform", 0.5), ("macs", 0.2), ("latency", LATENCY), ("random", 0.0),
    )  # fmt: skip
    for allocation, strength in ways[:2] if quick else ways:
        for density in densities:
            found[f"untrained/{allocation}/{density:g}"] = (allocation, strength, density)
            for kind in _kinds(allocation, density, quick):
                found[f"{kind}/{allocation}/{density:g}"] = (allocation, strength, density)
    budget = 6 if quick else BUDGET
    rounds, period = (2, 1) if quick else (11, budget // 20)
    batch, lr, statistics = SUBJECTS[name].batch, SUBJECTS[name].lr, SUBJECTS[name].statistics
    same = {"batch": batch, "lr": lr / 2, "recovery_lr": lr, "statistics": statistics}
    recovery = budget - 1 - (rounds - 1) * period
    trained = {
        "imp/global": Recipe(rounds, 0.1, period, recovery, **same),
        "imp/uniform": Recipe(
            rounds, 0.1, period, recovery, allocation="uniform", **same
        ),
        "imp/macs-0.2": Recipe(
            rounds, 0.1, period, recovery, allocation="macs", strength=0.2, **same
        ),
        "one-shot/global": Recipe(1, 0.1, 1, budget - 1, **same),
        "one-shot/uniform": Recipe(1, 0.1, 1, budget - 1, allocation="uniform", **same),
        "one-shot/macs-0.2": Recipe(
            1, 0.1, 1, budget - 1, allocation="macs", strength=0.2, **same
        ),
        "fit/global": Recipe(1, 0.1, 1, budget - 1, fit=FIT, **same),
        "fit/uniform": Recipe(
            1, 0.1, 1, budget - 1, allocation="uniform", fit=FIT, **same
        ),
        "fit/macs-0.2": Recipe(
            1, 0.1, 1, budget - 1, allocation="macs", strength=0.2, fit=FIT, **same
        ),
        "select/global": Recipe(1, 0.1, 1, budget - 1, fit=FIT, select=SELECT, **same),
        "select/macs-0.2": Recipe(
            1, 0.1, 1, budget - 1, allocation="macs", strength=0.2, fit=FIT, select=SELECT,
            **same,
        ),
        f"select/latency-{LATENCY}": Recipe(
            1, 0.1, 1, budget - 1, allocation="latency", strength=LATENCY, fit=FIT,
            select=SELECT, **same,
        ),
        "imp/channel": Recipe(
            rounds, 0.5, period, recovery, allocation="uniform",
            pattern="channel", **same,
        ),
        "imp/2:4": Recipe(
            rounds, 0.5, period, recovery, allocation="uniform", pattern="2:4",
            **same,
        ),
    }  # fmt: skip
    if quick:
        trained = {key: trained[key] for key in ("imp/macs-0.2", "one-shot/global")}
    found |= trained
    if not quick:
        found["random"] = (0.1, budget, lr, batch)
        for density in (0.2, 0.05):
            found[f"imp/global/{density:g}"] = Recipe(rounds, density, period, recovery, **same)
        whole = same | {"lr": lr, "recovery_lr": 2 * lr}
        found["long/global"] = Recipe(22, 0.1, 25, LONG - 526, **whole)
        found["long/fit/global"] = Recipe(1, 0.1, 1, LONG - 1, fit=FIT, **same)
        found["long/fit/macs-0.2"] = Recipe(
            1, 0.1, 1, LONG - 1, allocation="macs", strength=0.2, fit=FIT, **same
        )
        found["long/select/global"] = Recipe(1, 0.1, 1, LONG - 1, fit=FIT, select=SELECT, **same)
        found[f"long/select/latency-{LATENCY}"] = Recipe(
            1, 0.1, 1, LONG - 1, allocation="latency", strength=LATENCY, fit=FIT,
            select=SELECT, **same,
        )  # fmt: skip
    return found
