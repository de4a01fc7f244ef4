"""Which models can be accelerated: checks that come before anything is planned."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod

from ..errors import UnsupportedModelError
from ..finite import count_non_finite

__all__ = ["accelerated_parts", "check_model", "refresh_pruned", "require_module"]


def accelerated_parts(model: nn.Module) -> list[str]:
    """Names of the replacements that an earlier ``accelerate`` put into the model."""
    return [n for n, m in model.named_modules() if "opentrans_original" in vars(m)]


def require_module(model: nn.Module) -> None:
    """Raise UnsupportedModelError for anything that is no module."""
    if isinstance(model, nn.Module):
        return
    hint = "Build the network and load its weights first."
    if isinstance(model, torch.export.ExportedProgram):
        hint = "Accelerate the model first, then export it."
    elif isinstance(model, type) and issubclass(model, nn.Module):
        hint = f"That is the class; make one: {model.__name__}(...)."
    raise UnsupportedModelError(f"a torch.nn.Module is needed, got {type(model).__name__}. {hint}")


def _check_form(model: nn.Module) -> None:
    """Raise UnsupportedModelError for models whose code no longer looks at their modules."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "the model is a TorchScript module, whose code is fixed and holds no Conv2d modules "
            "to replace. Accelerate the Python model; torch.export and torch.compile work "
            "afterwards."
        )
    for name, module in model.named_modules():
        here = repr(name) if name else "the model"
        if not any(isinstance(part, nn.Conv2d) for part in module.modules()):
            continue
        if "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None:
            raise UnsupportedModelError(
                f"{here} is compiled already (torch.compile), and its code would keep running the "
                "modules it was compiled from. Accelerate first, then compile: "
                "accelerate(model, masks); model = torch.compile(model). The module that was "
                "compiled is in its _orig_mod."
            )


def check_model(model: nn.Module) -> None:
    """Raise UnsupportedModelError unless ``model`` is a dense float32 CPU model in eval mode."""
    require_module(model)
    _check_form(model)
    if found := accelerated_parts(model):
        raise UnsupportedModelError(
            f"the model is already accelerated ({len(found)} modules, the first is "
            f"{found[0] or type(model).__name__!r}). Call opentrans_kernels.restore(model) first "
            "to plan it again."
        )
    if isinstance(model, nn.Conv2d):
        raise UnsupportedModelError(
            "the model is a bare Conv2d, which cannot be replaced in place. Use "
            "opentrans_kernels.nn.SparseConv2d.from_conv(conv, mask), or wrap it in nn.Sequential."
        )
    refresh_pruned(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        _check_conv(name, module)


def refresh_pruned(model: nn.Module) -> None:
    """Compute ``weight = weight_orig * weight_mask`` of pruned modules, as each forward does."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                hook(module, None)


def _check_conv(name: str, conv: nn.Conv2d) -> None:
    if is_lazy(conv.weight):
        raise UnsupportedModelError(
            f"{name} is a {type(conv).__name__} that has no shape yet. Run one image through the "
            "model, which makes its weights."
        )
    weight = conv.weight
    if weight.dim() != 4:
        raise UnsupportedModelError(
            f"{name}: its weight has shape {tuple(weight.shape)}, not [cout, cin, k, k]: it is "
            "flattened or sharded (FSDP). Gather the full weights into a plain model first."
        )
    if weight.device.type != "cpu":
        raise UnsupportedModelError(
            f"{name} is on {weight.device}; this version accelerates on the CPU only. Call "
            "model.cpu() first."
        )
    if weight.dtype != torch.float32:
        raise UnsupportedModelError(
            f"{name} is {weight.dtype}; the sparse kernels compute in float32. Call model.float() "
            "first."
        )
    if conv.training:
        raise UnsupportedModelError(
            f"{name} is in training mode; acceleration folds batch norms and packs weights for "
            "inference. Call model.eval() first."
        )
    for label, tensor in (("weight", weight), ("bias", conv.bias)):
        if tensor is not None and (bad := count_non_finite(tensor)):
            raise UnsupportedModelError(
                f"{name}: {bad} of {tensor.numel()} {label} values are NaN or Inf. The checkpoint "
                "is damaged or diverged; load a sound one."
            )
