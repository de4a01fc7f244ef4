"""Which layers stop training: rules, plans, and what they save.

    alphas = estimate_alpha(model, fit="xmin_peak")
    plan = freeze_plan(model, alphas, rule="median")
    print(plan)
    print(plan.report(model, input_size=(512, 512)))
    plan.apply(model)

See ``docs/freezing.md`` for the rules and the baselines every result needs.
"""

from __future__ import annotations

from .compare import freeze_set, tables_of
from .make import alpha_digest, freeze_plan, parse_rule
from .pairing import NormPairs, pair_norms
from .plan import Applied, FreezePlan
from .record import Decision, Disagreement
from .report import FreezeReport
from .rounds import AlphaRounds, AlphaStage, alpha_along_rounds
from .rules import RULES, FreezeRule
from .work import Work, trace_work

__all__ = [
    "RULES",
    "AlphaRounds",
    "AlphaStage",
    "Applied",
    "Decision",
    "Disagreement",
    "FreezePlan",
    "FreezeReport",
    "FreezeRule",
    "NormPairs",
    "Work",
    "alpha_along_rounds",
    "alpha_digest",
    "freeze_plan",
    "freeze_set",
    "pair_norms",
    "parse_rule",
    "tables_of",
    "trace_work",
]
