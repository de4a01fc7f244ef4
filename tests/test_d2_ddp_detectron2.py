"""Two processes (gloo) of the real detectron2: our trainer and models, every hook of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from opentrans.ovs import train_tiny_clip, write_shapes

pytestmark = pytest.mark.d2
pytest.importorskip("open_clip")

# What every program starts with: a process group, configs of a few steps, a comparison.
START = """
import logging, os, sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore("store", 2), rank=rank, world_size=2,
                        timeout=timedelta(seconds=300))
from detectron2.utils import comm

comm.create_local_process_group(2)
from opentrans.d2.hooks import AccelerateForEvalHook, AlphaFreezeHook, IMPHook, MaskHook, ReportHook
from opentrans.d2.train_net import Trainer, load_config
from opentrans_kernels.masks import MaskSet
from opentrans_kernels.plan.subject import accelerated_parts

SMALL = ("INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 SOLVER.IMS_PER_BATCH 2 "
         "MODEL.OPENTRANS.ACCELERATE.INPUT_SIZE [64,64] MODEL.OPENTRANS.ACCELERATE.MEASURE False "
         "SOLVER.CHECKPOINT_PERIOD 2 OUTPUT_DIR").split()


def config(file, output, *options):
    return load_config(file, [*SMALL, output, *map(str, options)])


def hook_of(trainer, kind):
    (found,) = [hook for hook in trainer._hooks if type(hook) is kind]
    return found


def same_everywhere(trainer, what):
    assert isinstance(trainer.model, DistributedDataParallel), what
    for name, value in trainer.model.module.state_dict().items():
        if "running" in name or "batches" in name:
            continue  # of norms that train: every rank has its own
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value)
        assert torch.equal(*both), (what, name)


def zeros_hold(model, masks):
    for name, mask in masks.masks.items():
        weight = model.get_submodule("backbone." + name).weight
        assert int(weight[~mask].count_nonzero()) == 0, name


def finish():
    print("done", rank, flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # gloo has threads that rarely abort a process while Python is torn down; all is said by now.
    os._exit(0)


"""

PRUNE = """
cfg = config("tiny/imp.yaml", "imp", "MODEL.OPENTRANS.IMP.PERIOD", 1, "SOLVER.MAX_ITER", 4,
             "MODEL.OPENTRANS.FREEZE.RULE", "prefix:layer1", "MODEL.OPENTRANS.FREEZE.AT", 2)
trainer = Trainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()
same_everywhere(trainer, "imp")
pruner = hook_of(trainer, IMPHook)
assert abs(pruner.masks.density() - 0.75**4) < 1e-3, pruner.masks.density()
zeros_hold(trainer.model.module, pruner.masks)
frozen = hook_of(trainer, AlphaFreezeHook).plan.frozen
assert frozen and all(name.startswith(("conv", "layer1")) for name in frozen), frozen
if rank == 0:
    files = sorted(p.name for p in Path("imp/masks").iterdir())
    assert files == ["masks.safetensors", *(f"round_0{n}.safetensors" for n in range(1, 5))], files
    saved = MaskSet.load("imp/masks/masks.safetensors")
    assert saved.content_hash() == pruner.masks.content_hash()
dist.barrier()
finish()
"""

TUNE = """
file, mask_at = sys.argv[2], int(sys.argv[3])
options = ["MODEL.WEIGHTS", "", "MODEL.OPENTRANS.MASK.FILE", "global:0.7",
           "MODEL.OPENTRANS.MASK.AT", mask_at, "MODEL.OPENTRANS.FREEZE.AT", 2,
           "DATASETS.TEST", "('shapes_unseen',)", "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 4,
           "MODEL.OPENTRANS.ACCELERATE.DEVICE", "require"]


seen = []


class Watched(Trainer):
    @classmethod
    def test(cls, cfg, model, evaluators=None):
        seen.append(len(accelerated_parts(model)))
        return super().test(cfg, model, evaluators)


trainer = Watched(config(file, "tuned", *options))
trainer.resume_or_load(resume=False)
before = {n: p.detach().clone() for n, p in trainer.model.module.named_parameters()}
trainer.train()
same_everywhere(trainer, "tuned")
assert seen == [seen[0]] * 2 and seen[0] > 0, seen
assert not accelerated_parts(trainer.model)
zeros_hold(trainer.model.module, hook_of(trainer, MaskHook).masks)
plan = hook_of(trainer, AlphaFreezeHook).plan
own = dict(trainer.model.module.named_parameters())
assert plan.frozen and not any(own["backbone." + n].requires_grad for n in plan.parameters)
moved = [n for n, p in own.items() if not torch.equal(p, before[n])]
assert any(not n.startswith(("backbone.", "classifier.")) for n in moved), "the head did not train"
assert not any(p._backward_hooks for p in own.values()), "hooks of the mask are left"
records = hook_of(trainer, ReportHook).records
assert [r["when"] for r in records] == ["start", "end"]
assert records[1]["trainable"] < records[0]["trainable"]
if rank == 0:
    assert Path("tuned/opentrans_report.json").is_file()
    assert "opentrans/frozen_layers" in Path("tuned/metrics.json").read_text()
final = {n: v.clone() for n, v in trainer.model.module.state_dict().items()}
dist.barrier()

# Interrupted after the second step: the resumed run has masks and plan of the run, on both ranks.
if rank == 0:
    Path("tuned/last_checkpoint").write_text("model_0000001.pth")
dist.barrier()
again = Watched(config(file, "tuned", *options))
again.resume_or_load(resume=True)
assert again.start_iter == 2
again.train()
same_everywhere(again, "resumed")
assert hook_of(again, AlphaFreezeHook).plan.digest() == plan.digest()
masks = hook_of(trainer, MaskHook).masks
assert hook_of(again, MaskHook).masks.content_hash() == masks.content_hash()
zeros_hold(again.model.module, masks)
for name in plan.parameters:  # frozen after the step of the checkpoint
    assert torch.equal(again.model.module.state_dict()["backbone." + name],
                       final["backbone." + name]), name
finish()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a CLIP of width 16."""
    folder = tmp_path_factory.mktemp("ddp")
    write_shapes(folder / "shapes", train=6, val=2, size=64)
    train_tiny_clip(folder / "clip.safetensors", steps=2, batch=13)
    return folder


def both(place: Path, program: str, arguments: Sequence[str] = ()) -> None:
    """Run the program as rank 0 and rank 1; raise with what the first failing one said."""
    (place / "store").unlink(missing_ok=True)
    tests = str(Path(__file__).parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", START + program, str(rank), *arguments],
            cwd=place,
            env=environment | {"PYTHONPATH": os.pathsep.join([*sys.path[1:], tests])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [run.communicate(timeout=900)[0] for run in runs]
    finally:
        for run in runs:  # one of them may wait for the other that failed
            run.kill()
    for rank, (run, text) in enumerate(zip(runs, said, strict=True)):
        assert run.returncode == 0 and f"done {rank}" in text, text[-4000:]


def test_pruning_by_distillation_in_two_processes(place: Path) -> None:
    both(place, PRUNE)


@pytest.mark.parametrize(("kind", "mask_at"), [("deeplabv3", 0), ("mask", 1)])
def test_mask_freeze_accelerate_report_and_resume_in_two_processes(
    place: Path, kind: str, mask_at: int
) -> None:
    if kind == "mask":
        pytest.importorskip("transformers", reason="the mask head needs transformers")
    both(place, TUNE, [f"tiny/{kind}.yaml", str(mask_at)])


@pytest.mark.slow
def test_the_command_starts_two_processes(place: Path) -> None:
    command = [
        sys.executable, "-m", "opentrans.d2.train_net", "--num-gpus", "2", "--config-file",
        "tiny/imp.yaml", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4",
        "MODEL.OPENTRANS.IMP.PERIOD", "1", "OUTPUT_DIR", "command",
    ]  # fmt: skip
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[1:])}
    done = subprocess.run(command, cwd=place, env=path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (place / "command" / "masks" / "round_04.safetensors").is_file()
