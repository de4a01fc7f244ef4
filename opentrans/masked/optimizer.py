"""A torch optimizer whose state exists for live, trainable weights only.

Zero weight, zero gradient and zero state is a fixed point of SGD with momentum, Adam and AdamW,
with weight decay too. So pruned weights need no multiplication in the forward pass and none after
the step; they only have to be left out. Here the masked weights of a parameter are gathered into a
1-d tensor, an ordinary torch optimizer updates that, and the result is scattered back.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from opentrans_kernels.errors import MaskError, OpenTransError

from .clipping import ClippedGradients
from .live import Masks, apply_masks, as_mask_set, check_regrowth, masks_digest
from .memory import StateBytes

__all__ = ["ELEMENTWISE", "MaskedOptimizer"]

log = logging.getLogger(__name__)

# Each weight's update reads that weight, its gradient and its state only.
ELEMENTWISE: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
)
DIGEST_KEY = "opentrans_masks"  # beside "state" and "param_groups", which is all that torch reads
_NOT_OPTIONS = ("params", "param_names")


class MaskedOptimizer(Optimizer):
    """``optimizer_class`` on the live, trainable weights of ``model``.

    ::

        optimizer = MaskedOptimizer(torch.optim.AdamW, model, masks, lr=1.5e-4, weight_decay=0.05)

    Used like any torch optimizer: parameter groups, learning-rate schedulers, GradScaler,
    clipping, ``foreach``, closures. On live weights the update is torch's own. Pruned weights are
    set to zero once, here, and never written again.

    ``state_dict()`` has torch's layout with dense tensors, so a plain optimizer can load it;
    ``load_state_dict`` takes dense state back. Both check: saving raises if a pruned weight is not
    zero any more, loading raises for a checkpoint of other masks or of unpruned training.

    Parameters that do not train have no state and no index; those frozen later lose theirs at the
    next step. Make the optimizer after the model has its device and memory format.

    Args:
        optimizer_class: one of ELEMENTWISE (SGD, Adam, AdamW, ...). Others: ``preserve_masks``.
        model: holds the masked convolutions.
        masks: a MaskSet, name -> 0/1 tensors, or a mask file; matched by module name.
        params: parameters or groups as torch takes them; None: all of ``model``. Masked parameters
            that are not among them stay masked and checked, but are not updated.
        gradients: "hook" zeroes the gradient of pruned weights as it arrives, before anything takes
            a norm of it and before DistributedDataParallel averages it. "call" leaves it alone, for
            :meth:`mask_gradients` or, cheapest, :meth:`clip_live_gradients` in the place of
            ``clip_grad_norm_``. The step itself reads live gradients only.
        options: those of ``optimizer_class`` (lr, momentum, betas, weight_decay, foreach, ...).

    Raises:
        MaskError: masks and model disagree.
        OpenTransError: the class or an option cannot work on gathered weights.
    """

    def __init__(
        self,
        optimizer_class: type[Optimizer],
        model: nn.Module,
        masks: Masks,
        params: Iterable[Any] | None = None,
        *,
        gradients: Literal["hook", "call"] = "hook",
        **options: Any,
    ) -> None:
        if optimizer_class not in ELEMENTWISE:
            raise OpenTransError(
                f"{optimizer_class.__name__} is not known to update each weight on its own, so it "
                "cannot run on gathered weights. Use one of "
                f"{', '.join(c.__name__ for c in ELEMENTWISE)}, or keep your optimizer with dense "
                "state and call preserve_masks(model, optimizer, masks)."
            )
        for option in ("capturable", "differentiable"):
            if options.get(option):
                raise OpenTransError(
                    f"{option}=True needs parameters that stay in one place, and gathered ones "
                    "do not. Leave it out, or call preserve_masks(model, optimizer, masks)."
                )
        if gradients not in ("hook", "call"):
            raise OpenTransError(f"gradients={gradients!r} is not 'hook' or 'call'; choose one.")
        # The first group only checks the options and shows the defaults.
        inner = optimizer_class([nn.Parameter(torch.zeros(1))], **options)  # type: ignore[call-arg]
        inner.param_groups.clear()
        self._inner = inner
        self._live = apply_masks(model, masks)
        self._of = {live.parameter: live for live in self._live.values()}
        self._digest = masks_digest(self._live)
        self._keys: dict[torch.Tensor, nn.Parameter] = {}
        self._hooks: dict[torch.Tensor, Any] = {}
        self._hooked = gradients == "hook"
        # The model may outlive this optimizer and get another one.
        weakref.finalize(self, _remove_hooks, self._hooks)
        self._trainable: tuple[bool, ...] = ()
        self._clipped = ClippedGradients()
        super().__init__(list(model.parameters()) if params is None else params, inner.defaults)
        self._follow_freezing()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        options = {k: v for k, v in group.items() if k not in _NOT_OPTIONS}
        self._inner.param_groups.append({**options, "params": []})
        self._trainable = ()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_freezing()
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({k: v for k, v in outer.items() if k not in _NOT_OPTIONS})
        moved = []
        for parameter, key in self._keys.items():
            if parameter.grad is None:
                continue
            live = self._of[parameter]
            live.check_place()
            if parameter.grad.is_sparse:
                raise OpenTransError(
                    f"{live.name}: its gradient is a sparse tensor. Use dense gradients; those of "
                    "pruned weights are left out here."
                )
            clipped = self._clipped.of(parameter)
            key.data = live.gather(parameter)
            key.grad = live.gather(parameter.grad) if clipped is None else clipped
            moved.append((parameter, key, live))
        self._clipped.clear()
        for key in [k for p, k in self._members() if p not in self.state]:
            self._inner.state.pop(key, None)  # somebody cleared optimizer.state
        self._inner.step()
        for parameter, key, live in moved:
            live.scatter_(parameter, key.detach())
            key.grad = None
            key.data = key.data.new_empty(0)
        self._link_state()
        return loss

    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights now; for ``gradients="call"``, before clipping."""
        for parameter in self._keys:
            if parameter.grad is not None:
                live = self._of[parameter]
                values = live.gather(parameter.grad)
                live.scatter_(parameter.grad.zero_(), values)

    @torch.no_grad()
    def clip_live_gradients(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """``clip_grad_norm_`` over the live gradients of all groups; returns their norm.

        To be called right before :meth:`step` (after ``scaler.unscale_``). It reads the gradients
        of pruned weights no more than the step does, so with ``gradients="call"`` nothing dense is
        multiplied at all; ``.grad`` of masked parameters stays as it was, unscaled.
        """
        self._follow_freezing()
        compact = {p: self._of[p].gather(p.grad) for p in self._keys if p.grad is not None}
        members = [p for group in self.param_groups for p in group["params"]]
        dense = [p.grad for p in members if p.grad is not None and p not in compact]
        return self._clipped.clip(compact, dense, max_norm, norm_type)

    def set_masks(self, model: nn.Module, masks: Masks) -> None:
        """Go on with masks that prune more, as between pruning rounds; the state of what stays is
        kept, bit for bit.

        Raises MaskError, with nothing changed, if they do not fit the model or if a weight that is
        pruned now would be alive again.
        """
        given = as_mask_set(masks)
        wanted = given.match(model, strict=True).masks
        for name, live in self._live.items():
            new = wanted.get(name)
            grown = live.count if new is None else int((new & ~live.mask()).sum())
            if grown:
                raise MaskError(
                    f"{name}: "
                    + ("the new masks leave it out" if new is None else f"{grown} weights return")
                    + ", and their state is lost. Masks may only lose weights here; make a new "
                    "optimizer for other masks."
                )
        dense = {
            parameter: self._convert(parameter, values, dense=True)
            for parameter, values in self.state.items()
        }
        fresh = apply_masks(model, given)
        for parameter in list(self._keys):
            self._forget(parameter, keep_gradient=True)
        self._live = fresh
        self._of = {live.parameter: live for live in self._live.values()}
        self._digest = masks_digest(self._live)
        self._trainable = ()
        self._follow_freezing()
        for parameter, values in dense.items():
            compact = self._convert(parameter, values, dense=False, check=False)
            self.state[parameter] = compact
            self._inner.state[self._keys.get(parameter, parameter)] = compact

    def check(self) -> None:
        """Raise MaskError, with names and counts, if a pruned weight is not zero any more."""
        check_regrowth(self._live)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the masks under the model's names."""
        return self._digest

    def state_bytes(self) -> StateBytes:
        """What this optimizer keeps between steps; complete after the first step."""
        state, slots = 0, 0
        for parameter, values in self.state.items():
            tensors = [t for t in values.values() if isinstance(t, torch.Tensor)]
            state += sum(t.numel() * t.element_size() for t in tensors)
            shape = self._compact_shape(parameter)
            slots = max(slots, sum(t.shape == shape for t in tensors))
        parameters = [p for group in self.param_groups for p in group["params"]]
        return StateBytes(
            state=state,
            index=sum(live.index_bytes for live in self._live.values()),
            bits=sum(live.bits.nbytes for live in self._live.values()),
            dense=slots * sum(p.numel() * p.element_size() for p in parameters),
        )

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's layout, dense, with the digest of the masks beside it.

        Raises MaskError if a pruned weight is not zero any more: what is saved then would not be
        the pruned network.
        """
        self.check()
        saved = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        saved["state"] = {
            number: self._convert(parameters[number], values, dense=True)
            for number, values in saved["state"].items()
        }
        saved[DIGEST_KEY] = self._digest
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take dense state of this class or of the plain torch optimizer.

        Raises MaskError, before anything is changed, if it was saved with other masks, or holds
        state for pruned weights and hence comes from unpruned training.
        """
        saved = state_dict.get(DIGEST_KEY, self._digest)
        if saved != self._digest:
            raise MaskError(
                f"this optimizer state was saved with masks {saved[:12]}, the model is masked with "
                f"{self._digest[:12]}. Make the optimizer with the masks of the checkpoint."
            )
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        if len(numbers) != len(parameters):
            raise OpenTransError(
                f"the state is for {len(numbers)} parameters, the optimizer has "
                f"{len(parameters)}. Pass the same model and parameter groups as when it was saved."
            )
        by_number = dict(zip(numbers, parameters, strict=True))
        state = {
            number: self._convert(by_number[number], values, dense=False)
            for number, values in state_dict["state"].items()
            if by_number[number].requires_grad
        }
        super().load_state_dict({**state_dict, "state": state})
        self._trainable = ()
        self._inner.state.clear()
        self._follow_freezing()
        for parameter, values in self.state.items():
            self._inner.state[self._keys.get(parameter, parameter)] = values

    def _convert(
        self, parameter: torch.Tensor, values: dict[str, Any], *, dense: bool, check: bool = True
    ) -> dict[str, Any]:
        """One parameter's state in the other form; numbers and steps stay as they are."""
        live = self._of.get(parameter)
        if live is None:
            return values
        found: dict[str, Any] = {}
        for key, value in values.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                found[key] = value
            elif dense:
                found[key] = live.to_dense(value)
            else:
                value = value.to(parameter.device)
                dead = live.dead_nonzero(value) if check else 0
                if dead:
                    raise MaskError(
                        f"{live.name}: {key!r} is not zero at {dead} pruned weights, so this state "
                        "comes from training without the mask, and its live part was moved by "
                        "clipping with them. Load the checkpoint of the masked run, or start with "
                        "fresh optimizer state."
                    )
                found[key] = live.gather(value)
        return found

    def _compact_shape(self, parameter: torch.Tensor) -> torch.Size:
        live = self._of.get(parameter)
        return parameter.shape if live is None else torch.Size([live.count])

    def _follow_freezing(self) -> None:
        """Keys, indices, hooks and state for what trains now, and for nothing else."""
        flags = tuple(p.requires_grad for group in self.param_groups for p in group["params"])
        if flags == self._trainable:
            return
        self._trainable = flags
        before = len(self.state)
        present = {p for group in self.param_groups for p in group["params"]}
        for parameter in [p for p in {*self._keys, *self.state} if p not in present]:
            self._forget(parameter)  # taken out of the groups, as FreezePlan.apply does
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            for parameter in outer["params"]:
                if parameter.requires_grad:
                    self._track(parameter)
                else:
                    self._forget(parameter)
            inner["params"] = [self._keys.get(p, p) for p in outer["params"] if p.requires_grad]
        if before > len(self.state):
            log.info("%d parameters were frozen; their state is dropped", before - len(self.state))

    def _track(self, parameter: torch.Tensor) -> None:
        live = self._of.get(parameter)
        if live is None or parameter in self._keys:
            return
        live.build_index()
        self._keys[parameter] = nn.Parameter(parameter.detach().new_empty(0))
        if self._hooked:
            self._hooks[parameter] = parameter.register_hook(live.masked)

    def _forget(self, parameter: torch.Tensor, keep_gradient: bool = False) -> None:
        key = self._keys.pop(parameter, None)
        self._inner.state.pop(parameter if key is None else key, None)
        self.state.pop(parameter, None)
        if not keep_gradient:
            parameter.grad = None
        if key is not None:
            self._of[parameter].drop_index()
        if (hook := self._hooks.pop(parameter, None)) is not None:
            hook.remove()

    def _members(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(parameter, what stands for it in the inner optimizer), all groups."""
        members = [p for group in self.param_groups for p in group["params"]]
        return [(p, self._keys.get(p, p)) for p in members]

    def _link_state(self) -> None:
        for parameter, key in self._members():
            if key in self._inner.state:
                self.state[parameter] = self._inner.state[key]

    def __getstate__(self) -> dict[str, Any]:
        raise OpenTransError(
            "a MaskedOptimizer is not pickled or deep-copied: its hooks and indices belong to the "
            "model's own tensors. Keep state_dict() and make a new one with the same masks."
        )


def _remove_hooks(hooks: dict[torch.Tensor, Any]) -> None:
    for hook in hooks.values():
        hook.remove()
