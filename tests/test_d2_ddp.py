"""Every hook in two processes under DistributedDataParallel (gloo)."""

from __future__ import annotations

from pathlib import Path

import fresh_process
import pytest

pytest.importorskip("open_clip")

TESTS = Path(__file__).parent

PROGRAM = """
import os, sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, {tests!r})
from d2_models import SIZE, Evaluation, Trainer, segmenter
from opentrans.d2 import unwrap
from opentrans.d2.training import AccelerateStep, FreezeStep, ImpStep, MaskStep, ReportStep
from opentrans.imp.config import ImpConfig
from opentrans.imp.schedule import ImpSchedule
from opentrans_kernels import OpenTransError, PlanError
from opentrans_kernels.masks.names import conv_modules
from opentrans_kernels.plan.subject import accelerated_parts

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2,
                        timeout=timedelta(seconds=300))


def wrapped(seed=0, **options):
    # Unused parameters are an error in DDP, so a freeze that it does not know of would show.
    return DistributedDataParallel(segmenter(seed), broadcast_buffers=False, **options)


def same_everywhere(model, what):
    for name, value in unwrap(model).state_dict().items():
        if "running" in name or "batches" in name:
            continue  # of norms that train: every rank has its own
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value)
        assert torch.equal(*both), (what, name)


def trained(hooks, steps, **options):
    trainer = Trainer(wrapped(**options), hooks)
    trainer.seed = 1000 * rank  # other data on every rank
    return trainer.train(steps)


# Freezing after two steps, under a live wrapper, with a mask, evaluations and a report.
seen = []
hooks = [
    MaskStep("global:0.7", at=1, remove_at=4),
    FreezeStep("median", at=2),
    AccelerateStep("require", SIZE, measure=False),
    Evaluation(2, lambda: seen.append(len(accelerated_parts(trainer.model)))),
    ReportStep(folder / "report", SIZE),
]
trainer = Trainer(wrapped(gradient_as_bucket_view=True), hooks)
trainer.seed = 1000 * rank
trainer.train(6)
assert isinstance(trainer.model, DistributedDataParallel) and trainer.model.gradient_as_bucket_view
same_everywhere(trainer.model, "mask and freeze")
frozen = hooks[1].plan.frozen
assert frozen and seen and all(seen), (frozen, seen)
assert not any(p.requires_grad for n, p in hooks[1].tower.named_parameters()
               if n in hooks[1].plan.parameters)
assert len(list((folder / "report").iterdir())) == 1
print("freeze", rank, len(frozen))

# A hook that holds the wrapper gets the new one.
class Holder(Evaluation):
    pass
holder = Holder(100, lambda: None)
trainer = Trainer(wrapped(), [FreezeStep("median"), holder])
holder.model_of = trainer.model
trainer.train(2)
assert holder.model_of is trainer.model
same_everywhere(trainer.model, "freeze at once")

# Whoever else holds the old wrapper would break it: an error says so.
trainer = Trainer(wrapped(), [FreezeStep("median")])
kept = trainer.model
try:
    trainer.train(1)
    raise SystemExit("a held wrapper went unnoticed")
except PlanError as error:
    assert "unwrap" in str(error), error
del kept, trainer

# Pruning: same masks on both, one set of files.
hook = ImpStep(ImpConfig(ImpSchedule(rounds=2, rate=0.5, period=2)), folder / "masks")
trainer = trained([hook, FreezeStep("prefix:layer1", at=1)], 5)
same_everywhere(trainer.model, "imp")
assert hook.masks.density() < 0.26
assert len(list((folder / "masks").iterdir())) == 3
print("imp", rank, f"{{hook.masks.density():.3f}}")

# Ranks that were given other masks notice before a step is made.
other = {{n: torch.rand(c.weight.shape) > (0.2 + 0.5 * rank)
         for n, c in conv_modules(segmenter().backbone).items()}}
try:
    trained([MaskStep(other)], 1)
    raise SystemExit("different masks went unnoticed")
except OpenTransError as error:
    assert "rank" in str(error), error

# A plan that rank 0 cannot make is an error on both.
try:
    trained([FreezeStep("list:nothing")], 1)
    raise SystemExit("no error")
except PlanError as error:
    assert "nothing" in str(error), error
    print("refused", rank)
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
# gloo has threads that rarely abort a process while Python is torn down; all is said by now.
os._exit(0)
"""


def test_every_hook_under_ddp(tmp_path: Path) -> None:
    program = PROGRAM.format(tests=str(TESTS))
    done = fresh_process.run_together(program, [(rank, tmp_path) for rank in range(2)])
    for rank, run in enumerate(done):
        assert run.returncode == 0, run.stderr[-3000:]
        said = {line.split()[0] for line in run.stdout.splitlines()}
        assert said == {"freeze", "imp", "refused"}, run.stdout
        assert f"imp {rank} 0.250" in run.stdout


WRAPPERS = """
import logging, os, sys, warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

warnings.simplefilter("ignore")
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
from opentrans.d2.training.wrap import unwrapped, wrapper_options
from opentrans_kernels import PlanError


class Holder:
    _hooks = ()

    def __init__(self, **options):
        self.model = DDP(nn.Linear(3, 2), **options)


def rebuilt(**options):
    trainer = Holder(**options)
    before = trainer.model
    expected = {name: getattr(before, name) for name in KEPT}
    with unwrapped(trainer) as model:
        assert trainer.model is model
    assert trainer.model is not before and trainer.model.module is model
    assert expected == {name: getattr(trainer.model, name) for name in KEPT}, options
    return trainer.model


KEPT = ["bucket_bytes_cap", "bucket_bytes_cap_default", "find_unused_parameters", "static_graph",
        "gradient_as_bucket_view", "broadcast_buffers", "dim"]
KEPT += [name for name in ("skip_all_reduce_unused_params", "batched_grad_copy",
                           "bucket_bytes_cap_list") if hasattr(DDP(nn.Linear(1, 1)), name)]
rebuilt()
assert rebuilt(bucket_cap_mb=7).bucket_bytes_cap == 7 << 20
assert rebuilt(bucket_cap_mb=0.5).bucket_bytes_cap == 1 << 19
assert rebuilt(find_unused_parameters=True).find_unused_parameters
assert not rebuilt(broadcast_buffers=False).broadcast_buffers
assert rebuilt(static_graph=True, gradient_as_bucket_view=True).static_graph
if "skip_all_reduce_unused_params" in KEPT:
    assert rebuilt(skip_all_reduce_unused_params=True).skip_all_reduce_unused_params
if "bucket_bytes_cap_list" in KEPT:
    found = rebuilt(bucket_cap_mb_list=[1, 2])
    assert list(found.bucket_bytes_cap_list) == [1 << 20, 2 << 20]
group = dist.new_group([0])
assert rebuilt(process_group=group).process_group is group
said = []
logging.getLogger("opentrans.d2.training.wrap").warning = lambda text, *rest: said.append(rest)
rebuilt()
assert not said, f"arguments of DistributedDataParallel that are not carried over: {said}"

trainer = Holder()
trainer.model.eval()
with unwrapped(trainer):
    pass
assert not trainer.model.training


def refused(what, change=lambda wrapper: None, **options):
    trainer = Holder(**options)
    change(trainer.model)
    before = trainer.model
    try:
        with unwrapped(trainer):
            raise SystemExit(f"taken off all the same: {what}")
    except PlanError as error:
        assert what in str(error) and "Freeze before wrapping" in str(error), error
    assert trainer.model is before


class Sub(DDP):
    pass


def become(wrapper):
    wrapper.__class__ = Sub


refused("the subclass", become)
refused("forward or backward hook", lambda w: w.register_forward_pre_hook(lambda *_: None))
builtin = dist.BuiltinCommHookType.ALLREDUCE
refused("_register_builtin_comm_hook", lambda w: w._register_builtin_comm_hook(builtin))
# torch builds wrappers with mixed precision on GPUs only
refused("mixed_precision", lambda w: setattr(w, "mixed_precision", object()))
refused("delay_all_reduce", lambda w: setattr(w, "_delay_all_reduce_params", [w.module.weight]))
print("all", flush=True)
dist.destroy_process_group()
os._exit(0)
"""


def test_a_new_wrapper_has_every_option_of_the_old_one_or_is_refused(tmp_path: Path) -> None:
    done = fresh_process.run(WRAPPERS, tmp_path / "store")
    assert done.returncode == 0 and done.stdout.split() == ["all"], done.stderr[-3000:]
