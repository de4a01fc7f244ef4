"""Checkpoints as other tools write them, made in the tool's own environment, without this package.

``tools.py TOOL FOLDER`` prunes one small network with the tool's public functions and saves what
its users save. Beside every NAME goes NAME.truth: the convolutions' weights as the live network
computes with them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from writing import Net, Writer

RATIO = 0.7
SIZE = 64


def convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    """All but the first, which pruning leaves alone."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {n: m for n, m in found.items() if n.rpartition(".")[2] != "conv1" or "layer" in n}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of all convolutions as the network computes with them."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    # ``weight`` of a pruned module is of its last pass; the optimizer went on since.
    return {
        n: m.weight_orig * m.weight_mask if hasattr(m, "weight_mask") else m.weight
        for n, m in found.items()
    }


def pruned(model: nn.Module) -> nn.Module:
    for conv in convs(model).values():
        prune.l1_unstructured(conv, "weight", RATIO)
    return model


def with_zeros(model: nn.Module) -> nn.Module:
    """Pruned for good: zeros in ordinary weights."""
    for conv in convs(pruned(model)).values():
        prune.remove(conv, "weight")
    return model


class Mask(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", (weight.abs() > weight.abs().quantile(RATIO)).float())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


def parametrized(model: nn.Module, count: int | None = None) -> nn.Module:
    for conv in list(convs(model).values())[:count]:
        parametrize.register_parametrization(conv, "weight", Mask(conv.weight.detach()))
    return model


def of_torch(out: Writer) -> None:
    net = pruned(Net())
    out.save("prune.pth", net.state_dict(), weights(net))
    net = Net()
    for conv in list(convs(with_zeros(net)).values())[:2]:
        prune.l1_unstructured(conv, "weight", 0.5)
    out.save("prune_partly.pth", net.state_dict(), weights(net))
    net = parametrized(Net())
    out.save("parametrize.pth", net.state_dict(), weights(net))
    net = parametrized(Net(), 3)
    out.save("parametrize_partly.pth", net.state_dict(), weights(net))
    net = Net()
    dense = copy.deepcopy(net.state_dict())
    masks = {name: (w != 0).float() for name, w in weights(with_zeros(net)).items()}
    out.save("dense_and_masks.pth", {"state_dict": dense, "mask": masks}, weights(net))
    net = with_zeros(Net())
    out.save("zeros.pth", {"model": net.state_dict(), "epoch": 3}, weights(net))
    net = pruned(Net())
    net.layer1[0] = torch.compile(net.layer1[0])
    regional = {n.replace("_orig_mod.", ""): w for n, w in weights(net).items()}
    out.save("compiled_blocks.pth", net.state_dict(), regional)
    net = pruned(Net())
    out.save("compiled_whole.pth", torch.compile(net).state_dict(), weights(net))
    net = pruned(Net())
    parallel = {f"module.{k}": v for k, v in net.state_dict().items()}
    out.save("data_parallel.pth", parallel, weights(net))
    both = nn.ModuleDict({"student": with_zeros(Net()), "teacher": Net()})
    out.save("student_teacher.pth", both.state_dict(), weights(both["student"]))


def of_torch_ao(out: Writer) -> None:
    from torch.ao.pruning import BaseSparsifier

    class Magnitude(BaseSparsifier):
        def update_mask(self, module: nn.Module, tensor_name: str, **_options: Any) -> None:
            made = getattr(module.parametrizations, tensor_name)
            made[0].mask.copy_(made.original.abs() > made.original.abs().quantile(RATIO))

    net, sparsifier = Net(), Magnitude(defaults={})
    sparsifier.prepare(net, [{"tensor_fqn": f"{name}.weight"} for name in convs(net)])
    sparsifier.step()
    out.save("fake_sparsity.pth", net.state_dict(), weights(net))
    out.save("sparsifier.pth", sparsifier.state_dict(), weights(net))
    both = {"model": net.state_dict(), "sparsifier": sparsifier.state_dict()}
    out.save("both.pth", both, weights(net))
    sparsifier.squash_mask()
    out.save("squashed.pth", net.state_dict(), weights(net))


def of_timm(out: Writer) -> None:
    from timm.utils import CheckpointSaver, ModelEmaV3

    net = with_zeros(Net())
    ema = ModelEmaV3(net, decay=0.5)
    with torch.no_grad():
        net.conv1.weight.mul_(2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    saver = CheckpointSaver(net, optimizer, model_ema=ema, checkpoint_dir=str(out.folder))
    saver.save_checkpoint(0)
    (out.folder / "checkpoint-0.pth.tar").rename(out.folder / "ema.pth")
    for made in [*out.folder.glob("last*"), *out.folder.glob("checkpoint-*")]:
        made.unlink()
    out.truth("ema.pth", weights(net))


def of_nncf(out: Writer) -> None:
    import nncf

    example = torch.randn(1, 3, SIZE, SIZE)
    net = nncf.prune(
        Net().eval(),
        mode=nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL,
        ratio=RATIO,
        examples_inputs=example,
    )
    hooks = net.state_dict()

    def masked(model: nn.Module) -> dict[str, torch.Tensor]:
        masks = {
            key.split("post_hooks.")[1].partition(":weight")[0].replace(":", "."): mask
            for key, mask in model.state_dict().items()
            if key.endswith("binary_mask")
        }
        return {n: w * masks[n] if n in masks else w for n, w in weights(model).items()}

    truth = masked(net)
    out.save("magnitude.pth", hooks, truth)
    for form in nncf.StripFormat:
        stripped = nncf.strip(net, do_copy=True, strip_format=form, example_input=example)
        out.save(f"strip_{form.value}.pth", stripped.state_dict(), truth)
    net = nncf.prune(Net().eval(), mode=nncf.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED,
                     examples_inputs=example)  # fmt: skip
    state = net.state_dict()
    for key, logits in state.items():
        if key.endswith(".mask"):
            logits.copy_(torch.randn(logits.shape))  # as training moves them
    truth = {}
    for name, weight in weights(net).items():
        key = next(k for k in state if k.endswith(f"s.{name.replace('.', ':')}:weight__0.0.mask"))
        truth[name] = weight * (torch.sigmoid(state[key]) > 0.5)
    out.save("regularization.pth", state, truth)


def of_nni(out: Writer) -> None:
    from nni.compression.pruning import LevelPruner

    net = Net().eval()
    before = weights(net)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": RATIO, "exclude_op_names": ["conv1"]}]
    pruner = LevelPruner(net, config)
    _, masks = pruner.compress()
    truth = {n: w * masks[n]["weight"] if n in masks else w for n, w in before.items()}
    out.save("masks.pth", masks, truth)
    out.save("wrapped.pth", net.state_dict(), truth)


def of_lightning(out: Writer) -> None:
    import lightning
    from lightning.pytorch.callbacks import ModelPruning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net()

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)

    images = torch.utils.data.TensorDataset(torch.randn(8, 3, SIZE, SIZE))
    for name, permanent in (("pruned.ckpt", False), ("permanent.ckpt", True)):
        module = Module()
        chosen = [(conv, "weight") for conv in convs(module.model).values()]
        pruning = ModelPruning(
            "l1_unstructured",
            parameters_to_prune=chosen,
            amount=RATIO,
            make_pruning_permanent=permanent,
            use_lottery_ticket_hypothesis=False,
        )
        trainer = lightning.Trainer(
            max_epochs=1,
            callbacks=[pruning],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            default_root_dir=str(out.folder),
        )
        trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=4))
        trainer.save_checkpoint(out.folder / name)
        out.truth(name, weights(module.model))


def of_fasterai(out: Writer) -> None:
    from fasterai.core.criteria import large_final
    from fasterai.sparse.sparsifier import Sparsifier

    net = Net()
    sparsifier = Sparsifier(net, "weight", "local", large_final, layer_type=nn.Conv2d)
    sparsifier.sparsify_model(RATIO)
    out.save("sparsified.pth", net.state_dict(), weights(net))
    with torch.no_grad():  # an optimizer step between two calls of the callback
        for conv in convs(net).values():
            conv.weight.add_(0.01)
    masked = {n: w * net.get_submodule(n)._mask for n, w in weights(net).items()}
    out.save("between_steps.pth", net.state_dict(), masked)


def of_torch_pruning(out: Writer) -> None:
    import torch_pruning

    net = Net().eval()
    pruner = torch_pruning.pruner.MagnitudePruner(
        net,
        torch.randn(1, 3, SIZE, SIZE),
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[net.fc],
    )
    pruner.step()
    out.save("smaller.pth", net.state_dict(), weights(net))


def of_compressed_tensors(out: Writer) -> None:
    from compressed_tensors.compressors import BitmaskCompressor
    from safetensors.torch import save_file

    net = with_zeros(Net())
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    compressed = BitmaskCompressor().compress(state, compression_targets=set(convs(net)))
    save_file(compressed, out.folder / "model.safetensors")
    out.truth("model.safetensors", weights(net))


def of_neural_compressor(out: Writer) -> None:
    from neural_compressor.training import WeightPruningConfig, prepare_compression

    net = Net()
    config = WeightPruningConfig(
        [
            {
                "target_sparsity": RATIO,
                "pattern": "1x1",
                "pruning_type": "magnitude",
                "start_step": 0,
                "end_step": 2,
                "pruning_op_types": ["Conv"],
                "excluded_op_names": ["^conv1"],
            }
        ]
    )
    manager = prepare_compression(net, config)
    manager.callbacks.on_train_begin()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for step in range(4):
        manager.callbacks.on_step_begin(step)
        net(torch.randn(2, 3, SIZE, SIZE)).square().mean().backward()
        manager.callbacks.on_before_optimizer_step()
        optimizer.step()
        manager.callbacks.on_after_optimizer_step()
        optimizer.zero_grad()
        manager.callbacks.on_step_end()
    manager.callbacks.on_train_end()
    manager.save(str(out.folder / "saved"))
    (out.folder / "saved" / "best_model.pt").rename(out.folder / "best_model.pt")
    out.truth("best_model.pt", weights(net))


def of_mmengine(out: Writer) -> None:
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, *images: torch.Tensor, mode: str = "loss") -> Any:
            found = self.backbone(images[0])
            return {"loss": found.square().mean()} if mode == "loss" else found

    class Structure(Hook):
        def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
            out.structure(runner.experiment_name.partition("_")[0] + ".pth", checkpoint)

    for name, network, hooks in (
        ("pruned.pth", pruned(Net()), []),
        ("ema.pth", with_zeros(Net()), [{"type": "EMAHook", "momentum": 0.5}]),
    ):
        model = Model(network)
        runner = Runner(
            model,
            work_dir=str(out.folder / "work"),
            train_dataloader=torch.utils.data.DataLoader(
                [(torch.randn(3, SIZE, SIZE),) for _ in range(8)], batch_size=4
            ),
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
            custom_hooks=[*hooks, Structure()],
            experiment_name=name.partition(".")[0],
        )
        runner.train()
        (out.folder / "work" / "epoch_1.pth").rename(out.folder / name)
        out.truth(name, weights(network))


TOOLS: dict[str, Callable[[Writer], None]] = {
    "torch": of_torch,
    "torch.ao": of_torch_ao,
    "timm": of_timm,
    "nncf": of_nncf,
    "nni": of_nni,
    "lightning": of_lightning,
    "fasterai": of_fasterai,
    "torch-pruning": of_torch_pruning,
    "compressed-tensors": of_compressed_tensors,
    "neural-compressor": of_neural_compressor,
    "mmengine": of_mmengine,
}


def main(tool: str, folder: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    TOOLS[tool](Writer(Path(folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
