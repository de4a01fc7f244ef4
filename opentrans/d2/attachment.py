"""``attach(model, ...)``: masks, freezing and acceleration for a model that is built already."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from opentrans_kernels.accelerate import Report, accelerate, restore
from opentrans_kernels.bench.parts import PartTimes, time_parts
from opentrans_kernels.errors import PlanError, UnsupportedModelError
from opentrans_kernels.heads import HeadReport, accelerate_heads, restore_heads
from opentrans_kernels.heads.parts import head_parts
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.plan import Plan
from opentrans_kernels.plan.subject import accelerated_parts, check_model
from opentrans_kernels.spectrum import AlphaTable, estimate_alpha

from ..freeze import RULES, FreezePlan, freeze_plan, parse_rule
from .analysis import register_with_fvcore
from .config import OpenTransConfig
from .config_nodes import ConfigError
from .config_options import DEVICE_POLICIES
from .head_masks import apply_to_head, describe_head_masks, split_masks
from .norms import hold_norms
from .towers import Masks, Tower, find_tower, read_masks, unwrap

__all__ = ["Attachment", "attach", "plan_freezing", "speed_up", "speed_up_head"]

log = logging.getLogger(__name__)


@dataclass
class Attachment:
    """What :func:`attach` did.

    tower: where. masks: in force, under the tower's names. head_masks: those of other layers, by
    module path; see ``head_masks.split_masks``. plan: of freezing. report: of
    acceleration; None if the tower runs densely. heads: the same of the head behind it. model: the
    whole, unwrapped. parts: times of an example, part by part. notes: what a user should know.
    """

    tower: Tower
    masks: MaskSet | None = None
    plan: FreezePlan | None = None
    report: Report | None = None
    notes: list[str] = field(default_factory=list)
    heads: HeadReport | None = None
    parts: PartTimes | None = None
    model: nn.Module | None = field(default=None, repr=False)
    head_masks: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def detach(self) -> None:
        """Take the acceleration off; masked weights stay zero and frozen ones frozen."""
        if self.heads is not None and self.model is not None:
            restore_heads(self.model)
        if accelerated_parts(self.tower.module):
            restore(self.tower.module)
        self.report = self.heads = None

    def __str__(self) -> str:
        lines = [str(self.tower)]
        if self.masks is not None:
            lines.append(f"masks: {self.masks}")
        if self.head_masks:
            lines.append(describe_head_masks(self.head_masks, self.heads is not None))
        if self.plan is not None:
            lines.append(str(self.plan).splitlines()[-1 - len(self.plan.notes)])
        lines.append(str(self.report) if self.report is not None else "runs densely")
        if self.heads is not None and self.heads.parts:
            lines.append(str(self.heads))
        if self.parts is not None:
            lines.append(str(self.parts))
        elif self.report is not None and self.tower.path:
            lines.append("the times are of the tower alone; attach(example=...) measures the whole")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def attach(
    model: nn.Module,
    masks: Masks | None = None,
    freeze: FreezePlan | str | Iterable[str] | None = None,
    accelerate: bool | str | Plan = False,
    *,
    heads: bool = True,
    example: object = None,
    tower: str = "",
    alphas: AlphaTable | None = None,
    fit: str = "xmin_peak",
    norms: str = "frozen",
    input_size: tuple[int, int] | None = None,
    measure: bool = True,
    threads: int | None = None,
) -> Attachment:
    """Mask, freeze and accelerate the CLIP tower of a built model, and its head, in place.

    Any module with a tower will do; detectron2 is not needed. Module paths and the keys and shapes
    of the ``state_dict`` stay, so code that walks the tower attribute by attribute, as FC-CLIP
    does, and checkpoints go on working. Checks come before changes, and an error leaves neither
    tower nor head accelerated. Load the model's weights first.

    Args:
        model: an FC-CLIP, Mask2Former-style or DeepLab model, or any with one ResNet tower.
        masks: MaskSet, name -> 0/1 tensors, mask file or recipe. Removed weights become zero, also
            those of convolutions and linear layers of the head that a file names by module path.
        freeze: a FreezePlan for the tower, a rule ("median", "ratio:0.25"), or layer names.
        accelerate: True or "require": run the tower on the sparse kernels, or raise; "auto": where
            that is possible (float32, CPU, eval mode), else densely with a note; or a Plan.
        heads: with ``accelerate``, also ``opentrans_kernels.accelerate_heads`` of the whole model.
        example: with ``accelerate``, what the model is called with (a tensor, a list of records as
            detectron2 has them, or a tuple of arguments): the whole is then timed on it, dense and
            accelerated in turns, and the report has a row for every part.
        tower: module path of the tower; "": found by structure.
        alphas: for rules that need them; None: estimated with ``fit``.
        norms: with ``freeze``: see ``MODEL.OPENTRANS.FREEZE.NORMS``.
        input_size: (height, width) in pixels to plan for; None: the tower's own.
        measure, threads: as in ``opentrans_kernels.accelerate``.

    Raises:
        UnsupportedModelError: no tower, several, or one that cannot be accelerated or is already.
        MaskError: the masks are of another backbone. PlanError: the plan is, or it leaves nothing
            to train, or the model is wrapped already. ConfigError: an option that does not exist.
    """
    policy = accelerate if isinstance(accelerate, str) else "require"
    if policy not in DEVICE_POLICIES:
        raise ConfigError(
            f"accelerate={accelerate!r} must be True, False, a Plan, or one of "
            f"{', '.join(DEVICE_POLICIES)}."
        )
    found = find_tower(model, tower)
    whole = unwrap(model)
    if accelerate is not False and heads and (there := head_parts(whole)):
        raise UnsupportedModelError(
            f"the head is accelerated already ({len(there)} parts, the first is "
            f"{next(iter(there))!r}). Call detach() of the Attachment, or "
            "opentrans_kernels.restore_heads(model), first; or pass heads=False."
        )
    parts = accelerated_parts(found.module)
    if parts and (masks is not None or accelerate is not False):
        raise UnsupportedModelError(
            f"the tower is accelerated already ({len(parts)} layers, the first is {parts[0]!r}), "
            "for the zeros it had then. Call detach() of the Attachment, or "
            "opentrans_kernels.restore(model), first."
        )
    done = Attachment(found, notes=list(found.notes), model=whole)
    if masks is not None:
        given, done.head_masks = split_masks(whole, found, read_masks(found.module, masks))
        done.masks = given.transfer_to(found.module)
    if freeze is not None:
        done.plan = plan_freezing(found.module, freeze, alphas=alphas, fit=fit, norms=norms)
        _leaves_something(whole, found, done)
    if accelerate is not False and policy == "require":
        check_model(found.module)
        if heads:
            _in_eval_mode(whole)
    if done.masks is not None:
        done.masks.apply_(found.module)
        apply_to_head(whole, done.head_masks)
    if done.plan is not None:
        done.plan.apply(found.module)
        hold_norms(found.module, norms)
    if accelerate is not False:
        plan = accelerate if isinstance(accelerate, Plan) else None
        done.report, note = speed_up(
            found.module, policy, plan, input_size=input_size, measure=measure, threads=threads
        )
        done.notes += [note] if note else []
        if heads and done.report is not None:
            try:
                done.heads, note = speed_up_head(whole, found.module, policy)
            except BaseException:
                restore(found.module)
                raise
            done.notes += [note] if note else []
        if example is not None and done.report is not None:
            done.parts = _timed(done, whole, example)
    for note in done.notes:
        log.warning("%s", note)
    return done


def attach_from_config(model: nn.Module, cfg: object) -> Attachment:
    """:func:`attach` with what ``MODEL.OPENTRANS`` says, for inference or before training.

    Raises ConfigError besides what ``attach`` raises, also for what only hooks can do.
    """
    options = OpenTransConfig.from_cfg(cfg)
    _needs_no_trainer(options)
    freeze: FreezePlan | str | None = options.FREEZE.RULE or None
    if options.FREEZE.PLAN:
        freeze = FreezePlan.from_json(options.FREEZE.PLAN)
    return attach(
        model,
        options.MASK.FILE or None,
        freeze,
        options.ACCELERATE.DEVICE if options.ACCELERATE.ENABLED else False,
        heads=options.ACCELERATE.HEADS,
        tower=options.TOWER,
        fit=options.FREEZE.FIT,
        norms=options.FREEZE.NORMS,
        input_size=(options.ACCELERATE.INPUT_SIZE[0], options.ACCELERATE.INPUT_SIZE[1]),
        measure=options.ACCELERATE.MEASURE,
        threads=options.ACCELERATE.THREADS or None,
    )


def _needs_no_trainer(options: OpenTransConfig) -> None:
    """Masks and freezing at a step need a trainer to follow."""
    mask, freeze = options.MASK, options.FREEZE
    wrong = {
        "MASK.AT": (mask.AT, 0) if mask.AT else None,
        "MASK.REMOVE_AT": (mask.REMOVE_AT, -1) if mask.REMOVE_AT >= 0 else None,
        "FREEZE.AT": (freeze.AT, 0) if freeze.AT else None,
        "FREEZE.SKIP": (freeze.SKIP, False) if freeze.SKIP else None,
    }
    for key, values in wrong.items():
        if values is not None:
            raise ConfigError(
                f"MODEL.OPENTRANS.{key}={values[0]} is for a training run, and attach_from_config "
                f"acts at once. Set it to {values[1]}, or train with build_opentrans_hooks(cfg)."
            )


def plan_freezing(
    tower: nn.Module,
    freeze: FreezePlan | str | Iterable[str],
    *,
    alphas: AlphaTable | None = None,
    fit: str = "xmin_peak",
    norms: str = "frozen",
) -> FreezePlan:
    """A plan that fits ``tower``, from a plan, a rule or layer names.

    Raises PlanError for unknown rules and layers, a plan of another model, one that freezes
    nothing or everything, or one that would make frozen parameters train again.
    """
    if isinstance(freeze, FreezePlan):
        freeze.check(tower)
        plan = freeze
    elif isinstance(freeze, str):
        row = parse_rule(freeze, {})
        if RULES[row.name].needs_alphas and alphas is None:
            alphas = estimate_alpha(tower, fit=fit)
        plan = freeze_plan(tower, alphas, freeze, norms=norms == "frozen")
    else:
        plan = freeze_plan(tower, rule="list", layers=list(freeze), norms=norms == "frozen")
    if plan.trainable_again:
        raise PlanError(
            f"rule {plan.rule!r} makes {len(plan.trainable_again)} frozen parameters trainable "
            f"again (first: {plan.trainable_again[0]}). Use the rule median, which freezes the "
            "same layers by exact name and unfreezes none."
        )
    return plan


def speed_up(
    tower: nn.Module,
    policy: str,
    plan: Plan | None = None,
    *,
    input_size: tuple[int, int] | None = None,
    measure: bool = True,
    threads: int | None = None,
) -> tuple[Report | None, str]:
    """Accelerate ``tower`` for its own zeros; (report, "") or, under "auto", (None, why not)."""
    if policy == "auto":
        try:
            check_model(tower)
        except UnsupportedModelError as error:
            return None, f"the tower runs densely, and the head as it was: {error}"
    register_with_fvcore()  # so that analyze_model sees the layers that are put in
    size = None if plan is not None else input_size
    return accelerate(tower, plan=plan, input_size=size, measure=measure, threads=threads), ""


def _timed(done: Attachment, model: nn.Module, example: object) -> PartTimes:
    """Times of every part on ``example``; an error takes the acceleration off again."""
    given = example if isinstance(example, tuple) else (example,)
    try:
        if model.training:
            raise UnsupportedModelError(
                "the whole model is timed in eval mode, and it is in training mode. Call "
                "model.eval(), or leave example out."
            )
        return time_parts(model, lambda: model(*given), done.tower.path, done.heads)
    except BaseException:
        done.detach()
        raise


def speed_up_head(model: nn.Module, tower: nn.Module, policy: str) -> tuple[HeadReport | None, str]:
    """Accelerate the head of ``model``; (report, note). A head of no known kind is left, with a
    note, and so is, under "auto", one in training mode."""
    if policy == "auto" and model.training:
        return None, "the head runs as it was: the model is in training mode. Call model.eval()"
    report = accelerate_heads(model)
    if report.parts or not _has_more_than(model, tower):
        return report, ""
    return report, "no part of the head was recognised, so only the tower is faster"


def _has_more_than(model: nn.Module, tower: nn.Module) -> bool:
    """Whether there are parameters outside the tower."""
    inside = {id(parameter) for parameter in tower.parameters()}
    return any(id(parameter) not in inside for parameter in model.parameters())


def _in_eval_mode(model: nn.Module) -> None:
    if model.training:
        raise UnsupportedModelError(
            "the tower is in eval mode, but the model around it is in training mode, and its head "
            "is accelerated for inference. Call model.eval() first, or pass heads=False "
            "(MODEL.OPENTRANS.ACCELERATE.HEADS False)."
        )


def _leaves_something(model: nn.Module, tower: Tower, done: Attachment) -> None:
    """A tower that was frozen anyway gains a note, a model that would not train an error."""
    assert done.plan is not None
    place = f"{tower.path}." if tower.path else ""
    frozen = {place + name for name in done.plan.parameters}
    left = [n for n, p in model.named_parameters() if p.requires_grad and n not in frozen]
    before = [n for n, p in model.named_parameters() if p.requires_grad]
    if not left and before:
        raise PlanError(
            f"the plan freezes the last {len(before)} trainable parameters of the model, so "
            "nothing would train. Freeze fewer layers (MODEL.OPENTRANS.FREEZE.RULE ratio:0.5), or "
            "train without a rule."
        )
    if not any(name.startswith(place) for name in before):
        done.notes.append(
            "the tower is frozen as a whole already (as FC-CLIP's is), so a freeze plan changes "
            "nothing: only inference speed pays here"
        )
