"""Who reads a convolution's value: proof, from traced forwards, of what may be folded into it.

Modules that hold convolutions are traced by ``torch.fx``, which follows every value and refuses
control flow that depends on data, the largest traceable module first. A norm or an activation may
be computed by the convolution where *every* call of the convolution is read by one call of it and
by nothing else, and it is never called otherwise. Modules with hooks are not looked into from
outside, so what leaves them counts as read.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook

from opentrans_kernels.activations import NONE, Activation, activation_of
from opentrans_kernels.errors import UnsupportedModelError
from opentrans_kernels.topology.behaviour import first_changed, own_behaviour
from opentrans_kernels.topology.fold import norm_activation
from opentrans_kernels.topology.nodes import PoolNode, original
from opentrans_kernels.topology.tracing import meta_copy

__all__ = ["Chain", "Dataflow", "dataflow"]

_FUNCTIONAL = {
    F.relu, torch.relu, torch.relu_, F.relu_, F.relu6, F.hardtanh, F.hardtanh_, F.silu, F.hardswish,
    F.leaky_relu, F.leaky_relu_, "relu", "relu_",
}  # fmt: skip
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Chain:
    """Module paths behind a convolution: a norm, an activation, and what values pass between them.

    activation: what ``act`` computes, or the norm itself after scale and shift.
    through: modules that pass the value on as it is, or that it leaves or enters on the way; a hook
        given to one of them would see another value than before.
    """

    bn: str | None = None
    act: str | None = None
    activation: Activation = NONE
    through: tuple[str, ...] = ()


@dataclass
class Dataflow:
    """What was found. chains: convolution -> what may be folded into it.

    pools: between convolutions. sources: convolution -> those whose values it reads as they are,
    and no others. kept: reason -> convolutions whose norm or activation stays.
    untraced: reason -> modules whose forward cannot be followed.
    """

    chains: dict[str, Chain] = field(default_factory=dict)
    pools: list[PoolNode] = field(default_factory=list)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    untraced: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def notes(self) -> list[str]:
        """Sentences for people."""
        lines = [
            f"{_some('modules', names)} cannot be traced as a whole ({reason}): what is inside was "
            "looked at part by part, and convolutions between the parts stand alone"
            for reason, names in self.untraced.items()
        ]
        kept = self.kept.items()
        return lines + [f"{_some('convolutions', names)}: {reason}" for reason, names in kept]


def _some(what: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{len(names)} {what} ({names[0]} .. {names[-1]})"


def dataflow(model: nn.Module, opaque: AbstractSet[int] = frozenset()) -> Dataflow:
    """Trace ``model`` and read its graphs. Nothing in it changes, and no hook of it runs.

    opaque: ids of modules that are not looked into.
    """
    found = Dataflow()
    if _has_any_global_hook():
        found.untraced["global module hooks see what every module computes"].append("the model")
        return found
    graphs = _Graphs(model, opaque, found)
    graphs.trace("", model)
    _Reading(graphs, found).read()
    return found


class _Tracer(fx.Tracer):
    def __init__(self, leaves: AbstractSet[int]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._leaves


class _Graphs:
    """Calls of modules in all graphs: path -> nodes, and the module paths each was made inside."""

    def __init__(self, model: nn.Module, opaque: AbstractSet[int], found: Dataflow) -> None:
        self.model, self.opaque, self.found = model, opaque, found
        self.modules = {name: original(m) for name, m in model.named_modules()}
        self.calls: dict[str, list[fx.Node]] = defaultdict(list)
        self.inside: dict[fx.Node, tuple[str, ...]] = {}
        self.path: dict[fx.Node, str] = {}

    def trace(self, path: str, module: nn.Module) -> None:
        """Trace ``module``, or what is inside it; and what its trace does not look into."""
        module = original(module)
        if not _holds_conv(module) or isinstance(module, nn.Conv2d) or id(module) in self.opaque:
            return
        prefix, where = f"{path}." if path else "", path or type(module).__name__
        why = own_behaviour(module)
        if why and why != "has hooks":  # not the forward of its class
            self.found.untraced[why].append(where)
        elif type(module).forward is not _UNIMPLEMENTED:  # a ModuleList computes nothing
            try:
                closed = self._trace(prefix, module)
            except Exception as error:  # the model's own code; the parts may do
                first = next(iter(str(error).splitlines()), "")
                reason = f"{type(error).__name__}: {first}".rstrip(": ")
                self.found.untraced[reason].append(where)
            else:
                for name in closed:
                    self.trace(f"{prefix}{name}", self.modules[f"{prefix}{name}"])
                return
        for key, child in module.named_children():
            self.trace(f"{prefix}{key}", child)

    def _trace(self, prefix: str, module: nn.Module) -> list[str]:
        """Record the calls. Returns the modules inside that were not looked into, for later."""
        twin = meta_copy(module)
        leaves, closed = set(), []
        for name, part in twin.named_modules():
            own = self.modules.get(f"{prefix}{name}".rstrip("."))
            if own is None:
                raise UnsupportedModelError(f"{name} has another place in the copy")
            part.training = own.training
            if not name:
                continue
            if own_behaviour(own) and _holds_conv(own) and not isinstance(own, nn.Conv2d):
                closed.append(name)
            if own_behaviour(own) or id(own) in self.opaque or _is_leaf(own):
                leaves.add(id(part))
        graphs = [_Tracer(leaves).trace(twin, given) for given in _arguments(type(twin))]
        closed = [n for n in closed if not any(n.startswith(f"{other}.") for other in closed)]
        for graph in graphs:
            for node in graph.nodes:
                if node.op == "call_module":
                    path = f"{prefix}{node.target}"
                    self.calls[path].append(node)
                    self.path[node] = path
                    stack = node.meta.get("nn_module_stack") or {}
                    around = [entry[0] for entry in stack.values()]
                    self.inside[node] = tuple(
                        f"{prefix}{n}" for n in around if n and n != node.target
                    )
        return closed


_UNIMPLEMENTED = nn.Module.forward


def _arguments(kind: type[nn.Module]) -> list[dict[str, Any]]:
    """Arguments to trace a forward with: its defaults, and in turn each of them as it may differ.

    A flag may make it return what it otherwise hands on.
    """
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    plain = {
        p.name: p.default
        for p in parameters
        if p.default is not p.empty and isinstance(p.default, _PLAIN)
    }
    others = [{**plain, name: not value} for name, value in plain.items() if type(value) is bool]
    others += [
        {key: v for key, v in plain.items() if key != name}
        for name, value in plain.items()
        if value is None
    ]
    return [plain, *others]


def _holds_conv(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in module.modules())


def _is_leaf(module: nn.Module) -> bool:
    """Whether tracing stops at it: nothing of interest is inside."""
    if not module._modules or hasattr(module, "running_mean"):
        return True
    if type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential):
        return True
    return not any(
        isinstance(part, nn.Conv2d) or hasattr(part, "running_mean") for part in module.modules()
    )


@dataclass(frozen=True)
class _Reader:
    """What reads the value of a module's calls: one other module, or why there is no such one."""

    path: str | None = None
    why: str | None = None
    through: tuple[str, ...] = ()


class _Reading:
    """Reads chains and pools from graphs."""

    def __init__(self, graphs: _Graphs, found: Dataflow) -> None:
        self.graphs, self.found = graphs, found
        self.ends: dict[str, str] = {}  # last module of a chain -> its convolution

    def read(self) -> None:
        convs = [p for p in self.graphs.calls if isinstance(self._module(p), nn.Conv2d)]
        for path in convs:
            if id(self._module(path)) not in self.graphs.opaque:
                self._chain(path)
        for path in convs:
            if sources := self._sources(path):
                self.found.sources[path] = sources
        for path in self.graphs.calls:
            if isinstance(self._module(path), nn.MaxPool2d | nn.AvgPool2d):
                self._pool(path)

    def _module(self, path: str) -> nn.Module:
        return self.graphs.modules[path]

    def _chain(self, path: str) -> None:
        conv: Any = self._module(path)
        bn = act = None
        through: tuple[str, ...] = ()
        end = path
        reader = self._reader(path)
        activation = NONE
        own = self._norm(reader.path, conv.out_channels)
        if reader.path is not None and own is not None:
            norm: Any = self._module(reader.path)
            if why := first_changed(norm.named_modules(prefix=reader.path)):
                reader = _Reader(why=why)
            else:
                bn = end = reader.path
                inside = (f"{bn}.{name}" for name, _ in norm.named_modules() if name)
                activation, through = own, (*reader.through, *inside)
                reader = _Reader() if own else self._reader(end)
        if reader.path is not None and (found := activation_of(self._module(reader.path))):
            if why := own_behaviour(self._module(reader.path)):
                reader = _Reader(why=f"{reader.path} {why}")
            else:
                act, end, activation = reader.path, reader.path, found
                through += reader.through
        if reader.why is not None:
            self.found.kept[reader.why].append(path)
        if bn or act:
            self.found.chains[path] = Chain(bn, act, activation, tuple(dict.fromkeys(through)))
        self.ends[end] = path

    def _norm(self, path: str | None, channels: int) -> Activation | None:
        """What the norm at ``path`` applies itself; None if it is no norm of so many channels."""
        module: Any = None if path is None else self._module(path)
        found = norm_activation(module)
        if found is None:
            return None
        mean = module.running_mean
        features = getattr(module, "num_features", None) if mean is None else len(mean)
        return found if features == channels else None

    def _reader(self, path: str) -> _Reader:
        """The one module that reads every value of the module at ``path``, and nothing else."""
        calls = self.graphs.calls[path]
        paths, through = set(), []
        for call in calls:
            readers, passed = self._readers(call)
            if len(readers) != 1:
                folds = any(self._could_fold(node) for node in readers)
                return _Reader(why=_SEVERAL if folds else None)
            (node,) = readers
            if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
                functional = node.target in _FUNCTIONAL
                return _Reader(why=_STAYS if functional else None)
            paths.add(self.graphs.path[node])
            through += [*passed, *self._boundaries(call, node)]
        if len(paths) != 1:
            return _Reader()
        (reader,) = paths
        if len(self.graphs.calls[reader]) != len(calls):
            folds = self._could_fold(self.graphs.calls[reader][0])
            return _Reader(why=_SHARED if folds else None)
        return _Reader(reader, None, tuple(dict.fromkeys(through)))

    def _readers(self, node: fx.Node) -> tuple[list[fx.Node], list[str]]:
        """Readers of a value, seen through identities; and those."""
        readers, passed = [], []
        for user in node.users:
            if self._passes(user):
                more, deeper = self._readers(user)
                readers += more
                passed += [self.graphs.path[user], *deeper]
            else:
                readers.append(user)
        return readers, passed

    def _passes(self, node: fx.Node) -> bool:
        path = self.graphs.path.get(node)
        module = None if path is None else self._module(path)
        return type(module) is nn.Identity and own_behaviour(module) is None

    def _could_fold(self, node: fx.Node) -> bool:
        path = self.graphs.path.get(node)
        if path is None:
            return node.target in _FUNCTIONAL
        module = self._module(path)
        return bool(activation_of(module)) or hasattr(module, "running_mean")

    def _boundaries(self, first: fx.Node, second: fx.Node) -> Iterable[str]:
        """Modules that one of two calls is made inside and the other is not."""
        a, b = self.graphs.inside[first], self.graphs.inside[second]
        return [path for path in (*a, *b) if (path in a) != (path in b)]

    def _sources(self, path: str) -> tuple[str, ...]:
        """The convolutions at the head of what every call reads; none if one reads other things."""
        found = set()
        for call in self.graphs.calls[path]:
            source = call.args[0] if call.args else None
            while isinstance(source, fx.Node) and self._passes(source):
                source = source.args[0]
            name = self.graphs.path.get(source) if isinstance(source, fx.Node) else None
            if name is None or name not in self.ends:
                return ()
            found.add(self.ends[name])
        return tuple(sorted(found))

    def _pool(self, path: str) -> None:
        before, after = self._sources(path), set()
        for call in self.graphs.calls[path] if before else ():
            for reader in self._readers(call)[0]:
                follower = self.graphs.path.get(reader)
                if follower is None or not isinstance(self._module(follower), nn.Conv2d):
                    return
                after.add(follower)
        if after and own_behaviour(self._module(path)) is None:
            self.found.pools.append(
                PoolNode(path, self._module(path), before, tuple(sorted(after)))
            )


_STAYS = (
    "the activation that follows is a function, not a module, and cannot be exchanged, so it stays "
    "a pass of its own"
)
_SEVERAL = "the value is read at several places, so nothing is folded in"
_SHARED = "the module that follows is called elsewhere as well and stays a pass of its own"
