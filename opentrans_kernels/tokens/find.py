"""The transformer of a vision model, recognised by structure, and what cannot be reduced in it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..topology.behaviour import added_behaviour
from ..topology.cover import covered
from ..topology.nodes import original
from .anatomy import anatomy_of, attention_of, length_first

__all__ = ["Trunk", "check_blocks", "find_trunk", "prove"]

#: Tokens in front of the map, by the parameter they come from: how many, None for its length.
_PREFIX = {
    "cls_token": 1,
    "class_embedding": 1,
    "dist_token": 1,
    "distillation_token": 1,
    "reg_token": None,
    "register_tokens": None,
}
_CLASS = ("cls_token", "class_embedding")
_CONTAINERS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Trunk:
    """Patch convolution and blocks, by path in the model; owner: the part that holds both."""

    owner: nn.Module
    patches: tuple[str, nn.Module]
    blocks: tuple[tuple[str, nn.Module], ...]
    prefix: int
    has_class: bool
    length_first: bool


def find_trunk(model: nn.Module) -> Trunk:
    """The one vision transformer in ``model``.

    Raises:
        UnsupportedModelError: there is none, or more than one.
    """
    stacks = dict(_stacks(model))
    found: dict[str, tuple[str, str]] = {}
    for path, module in model.named_modules():
        if any(path.startswith(f"{stack}.") for stack in stacks) or not _is_patches(module):
            continue
        above = path
        while above:
            above = above.rpartition(".")[0]
            inside = [s for s in stacks if not above or s.startswith(f"{above}.")]
            if inside:
                if len(inside) > 1:
                    raise UnsupportedModelError(
                        f"beside the patch convolution {path!r} there are several stacks of blocks "
                        f"({', '.join(map(repr, inside[:3]))}). Pass the part that holds one."
                    )
                found.setdefault(inside[0], (path, above))
                break
    if len(found) != 1:
        what = f"{len(found)} vision transformers" if found else "no vision transformer"
        raise UnsupportedModelError(
            f"{what} in this {type(model).__name__}: needed is one stack of blocks (norms, "
            "attention and mlp, as timm, open_clip and transformers name them) beside one patch "
            "convolution whose stride is its window. "
            + ("Pass the part that holds one." if found else "Convolutional models have no tokens.")
        )
    ((stack, (patches, owner)),) = found.items()
    holder = model.get_submodule(owner)
    prefix, has_class = _prefix(holder, stack[len(owner) :].strip("."))
    blocks = tuple((f"{stack}.{n}", block) for n, block in stacks[stack]._modules.items() if block)
    found_patches = (patches, model.get_submodule(patches))
    return Trunk(holder, found_patches, blocks, prefix, has_class, length_first(blocks[0][1]))


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Outermost containers whose children are all transformer blocks."""
    outer: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{one}.") for one in outer) or not path:
            continue
        children = [child for child in module._modules.values() if child is not None]
        if isinstance(module, _CONTAINERS) and children and all(map(attention_of, children)):
            outer.append(path)
            yield path, module


def _is_patches(module: nn.Module) -> bool:
    module = original(module)
    if not isinstance(module, nn.Conv2d):
        return False
    plain = module.groups == 1 and set(module.dilation) == {1}
    return plain and max(module.kernel_size) > 1 and tuple(module.kernel_size) == module.stride


def _prefix(owner: nn.Module, stack: str) -> tuple[int, bool]:
    """Tokens in front of the map, and whether the first is a class token."""
    count, has_class = 0, False
    for path, parameter in owner.named_parameters():
        name = path.rpartition(".")[2]
        if path.startswith(f"{stack}.") or name not in _PREFIX:
            continue
        has_class |= name in _CLASS
        fixed = _PREFIX[name]
        count += parameter.shape[-2] if fixed is None else fixed
    return count, has_class


def check_blocks(model: nn.Module, trunk: Trunk, numbers: tuple[int, ...], method: str) -> None:
    """Raise UnsupportedModelError for what would not be computed as it is now."""
    if any(map(covered, model.modules())):
        raise UnsupportedModelError(
            "tokens of this model are reduced already. Call restore_tokens(model) first."
        )
    for path, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise UnsupportedModelError(
                f"{path or 'the model'} is compiled already, and would keep running what it was "
                "compiled from. Reduce the tokens of the module in its _orig_mod, then compile."
            )
    for path, _ in trunk.owner.named_modules():
        if numbers and "rope" in path.rpartition(".")[2].lower():
            raise UnsupportedModelError(
                f"{path} turns queries and keys by their place on the map (rotary positions), "
                "which reduced tokens do not have. Such models cannot be reduced."
            )
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    parts = [trunk.patches, *(trunk.blocks[i] for i in numbers)]
    for path, part in parts:
        if uses[id(part)] > 1:
            raise UnsupportedModelError(
                f"{path} is tied: the same module stands in {uses[id(part)]} places of the model, "
                "so it cannot be reduced in one of them. Copy it (copy.deepcopy) where it repeats."
            )
        if isinstance(part, torch.jit.ScriptModule) or vars(part).get("_compiled_call_impl"):
            raise UnsupportedModelError(
                f"{path} is compiled already, and would keep running what it was compiled from. "
                "Reduce the tokens first, then compile."
            )
        for inner, module in part.named_modules():
            _check_module(".".join(filter(None, (path, inner))), module)
    if method == "evit" and not trunk.has_class:
        raise UnsupportedModelError(
            "method 'evit' keeps what the class token attends to, and this model has no class "
            "token. Use method='cluster', 'pool' or 'tome'."
        )


def _check_module(path: str, module: nn.Module) -> None:
    if (why := added_behaviour(module)) is not None:
        raise UnsupportedModelError(
            f"{path} {why}, which would see other tokens than it was made for. Remove it, reduce, "
            "and add it again if it fits reduced tokens."
        )
    weight = getattr(module, "weight", None)
    odd = callable(weight) and not isinstance(weight, torch.Tensor)
    if isinstance(weight, torch.Tensor):
        odd = not weight.is_floating_point() or weight.is_quantized or weight.is_meta
    if odd:
        raise UnsupportedModelError(
            f"{path} is a {type(module).__name__} whose weight is no plain floating-point tensor "
            "(quantised, or without values). Reduce the tokens of the floating-point model."
        )


def prove(path: str, block: nn.Module, method: str) -> object:
    """Run ``block`` on noise: it must not care about number and order of tokens, and, for methods
    that work inside it, be what its anatomy says. Returns the anatomy, None where not needed.

    Raises:
        UnsupportedModelError: it is something else.
    """
    anatomy = None if method in ("cluster", "pool") else anatomy_of(path, block)
    parameter = next(block.parameters(), None)
    width = _width(block)
    if parameter is None or width is None:
        raise UnsupportedModelError(f"{path} has no norm from which its width could be known.")
    modes = {module: module.training for module in block.modules()}
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, width, generator=random).to(parameter.device, parameter.dtype)
    order = torch.tensor([3, 0, 6, 1, 5], device=x.device)
    turned = length_first(block)
    limit = min(1e3 * torch.finfo(x.dtype).eps, 0.1)
    try:
        block.eval()
        with torch.no_grad():
            mixed = torch.tensor([4, 2, 0, 6, 5, 3, 1], device=x.device)
            whole = _run(block, x, turned)
            moved = _run(block, x[:, mixed], turned)
            fewer = _run(block, x[:, order], turned)
            copy = _run(block, x[:, order], turned) if anatomy is None else None
            if anatomy is not None:
                copy = anatomy.forward(block, x[:, order])
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UnsupportedModelError(
            f"{path}: {type(block).__name__} does not run on tokens alone, of any number "
            f"({type(error).__name__}: {str(error).splitlines()[0][:120]}). Blocks with position "
            "tables, windows or rotations tied to the map cannot be reduced."
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    top = float(whole.float().abs().max()) or 1.0
    if whole.shape != x.shape or float((moved - whole[:, mixed]).float().abs().max()) > limit * top:
        raise UnsupportedModelError(
            f"{path}: {type(block).__name__} depends on the order of tokens, so tokens that were "
            "reduced have no place in it. Blocks with position tables, windows or rotations tied "
            "to the map cannot be reduced."
        )
    if copy is None or float((copy - fewer).float().abs().max()) > limit * top:
        raise UnsupportedModelError(
            f"{path}: {type(block).__name__} computes something else than norm, attention and MLP "
            f"in this order, so method {method!r} cannot work inside it. Use method='cluster' or "
            "'pool'."
        )
    return anatomy


def _run(block: nn.Module, x: torch.Tensor, turned: bool) -> torch.Tensor:
    arguments = (None,) if _needs_mask(block) else ()
    out = block(x.transpose(0, 1) if turned else x, *arguments)
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(0, 1) if turned else out


def _needs_mask(block: nn.Module) -> bool:
    wanted = list(inspect.signature(block.forward).parameters.values())[1:]
    return bool(wanted) and wanted[0].default is inspect.Parameter.empty and (
        wanted[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )  # fmt: skip


def _width(block: nn.Module) -> int | None:
    """Channels, as the first norm with a weight tells them."""
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in name.lower() or name.startswith("ln"):
            if isinstance(weight, torch.Tensor) and weight.dim() == 1:
                return weight.numel()
    return None
