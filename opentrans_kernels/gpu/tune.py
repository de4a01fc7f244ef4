"""Choosing a kernel per layer by measurement; PyTorch's own kernels are always candidates.

Every candidate is first compared with float64 on the images' own size: it may err twice as much as
PyTorch's dense convolution in the same precision, or it is refused. Running out of memory, failing
to compile and computing something else are reasons that the plan prints; under
``OPENTRANS_STRICT=1`` they are errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from .. import settings
from ..errors import KernelUnavailable
from .clock import Timer
from .kernels import Candidate, Place, candidates, layer_signature, output_size, random_inputs
from .network import Layer

__all__ = ["Choice", "Tuner", "exact_layer"]

#: Relative to the largest output: below it no error is a defect.
FLOORS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}
_TF32_FLOOR = 1e-3
_log = logging.getLogger(__name__)


@dataclass
class Choice:
    """What was chosen for one layer, and what else was tried.

    kernel, ms: the fastest; dense, dense_ms: the fastest of PyTorch's own kernels.
    times: candidate -> milliseconds; rejected: candidate -> why it does not count.
    """

    kernel: str
    ms: float
    dense: str
    dense_ms: float
    times: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Tuner:
    """Times the candidates of layers, equal ones once."""

    def __init__(self, place: Place, timer: Timer) -> None:
        self.place, self.timer = place, timer
        self._known: dict[Any, Choice] = {}

    def layer(self, layer: Layer, size: tuple[int, int, int]) -> Choice:
        """The choice for ``layer`` on inputs of ``size`` (batch, height, width)."""
        found, rejected = candidates(layer, self.place, size)
        # Times of a kernel that skips zeros depend on how many it skips.
        shares = tuple((c.name, round(20 * c.share)) for c in found if c.share < 1)
        key = (layer_signature(layer, size), shares)
        if key not in self._known:
            self._known[key] = self._measure(layer, size, found, dict(rejected))
        return self._known[key]

    def _measure(
        self, layer: Layer, size: tuple[int, int, int], found: list[Candidate],
        rejected: dict[str, str],
    ) -> Choice:  # fmt: skip
        inputs = random_inputs(layer, size, self.place)
        judge = Judge(self.place, lambda *xs: exact_layer(layer, *xs))
        times: dict[str, float] = {}
        for candidate in found:  # PyTorch's plain convolution comes first and sets the bound
            time = self.attempt(
                f"{layer.name} {candidate.name}", lambda c=candidate: c.pack(layer), inputs, judge
            )
            if isinstance(time, str):
                rejected[candidate.name] = time
            else:
                times[candidate.name] = time
        dense = {c.name: times[c.name] for c in found if c.dense and c.name in times}
        if not dense:
            raise KernelUnavailable(
                f"{layer.name}: not even PyTorch's own convolution runs: "
                f"{'; '.join(f'{k}: {v}' for k, v in rejected.items())}. Use a smaller batch or "
                "image."
            )
        best, best_dense = min(times, key=times.__getitem__), min(dense, key=dense.__getitem__)
        return Choice(best, times[best], best_dense, dense[best_dense], times, rejected)

    def attempt(
        self, name: str, pack: Callable[[], Callable[..., Any]], inputs: tuple[Any, ...],
        judge: Judge,
    ) -> float | str:  # fmt: skip
        """Milliseconds of a candidate, or why it does not count."""
        try:
            run = pack()
            spoil(run(*inputs))
            problem = judge.problem(run(*inputs), inputs)
            if problem is None:
                return self.timer(name, lambda: run(*inputs))
        except torch.OutOfMemoryError as error:
            problem = f"out of memory: {str(error).splitlines()[0]}"
            if self.place.device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:  # a kernel that does not compile or launch is only left out
            problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        if settings.get().strict:
            raise KernelUnavailable(
                f"{name}: {problem}. OPENTRANS_STRICT=1 refuses to go on without this candidate; "
                "unset it to plan with the others, or use a smaller batch or image."
            )
        _log.warning("%s is left out: %s", name, problem)
        return problem


def spoil(outputs: Any) -> None:
    """Fill outputs with NaN and give them back to the allocator, for the next call to meet.

    It gets the same memory again, so what a kernel leaves unwritten, or multiplies by zero instead
    of not reading it, becomes visible.
    """
    for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
        output.fill_(float("nan"))


class Judge:
    """Compares outputs with float64; the first one judged, PyTorch's own, sets the bound."""

    def __init__(self, place: Place, exact: Callable[..., Any]) -> None:
        self.place, self.exact = place, exact
        self._want: list[torch.Tensor] | None = None
        self._own: list[float] = []
        floor = _TF32_FLOOR if place.precision.tf32 else FLOORS[place.precision.dtype]
        self.floor = floor

    def problem(self, found: Any, inputs: tuple[Any, ...]) -> str | None:
        """Why ``found`` is not the layer's output; None if it is."""
        ends = slice(None, None, max(1, len(inputs[0]) - 1))  # the first image and the last
        outputs = [f[ends] for f in (found if isinstance(found, tuple | list) else [found])]
        if self._want is None:
            before = torch.backends.cudnn.benchmark
            try:
                torch.backends.cudnn.benchmark = False  # float64 runs once: no search for it
                want = self.exact(*(None if t is None else t[ends].double() for t in inputs))
            finally:
                torch.backends.cudnn.benchmark = before
            self._want = list(want) if isinstance(want, tuple | list) else [want]
        errors = []
        for got, want in zip(outputs, self._want, strict=True):
            if got.shape != want.shape:
                return f"it computes {list(got.shape)} instead of {list(want.shape)}"
            scale = float(want.abs().max().clamp_min(1e-30)) if want.numel() else 1.0
            difference = (got.double() - want).abs().max() / scale if want.numel() else got.sum()
            errors.append(float(difference))
        first, self._own = not self._own, self._own or errors
        for error, own in zip(errors, self._own, strict=True):
            # PyTorch's own sets the bound, but NaN is no bound; and nothing may exceed 30 floors.
            most = 30 * self.floor
            bound = most if first or own != own else min(most, max(2 * own, self.floor))
            if not error <= bound:
                return f"its error {error:.1e} exceeds {bound:.1e}"
        return None


def exact_layer(
    layer: Layer, x: torch.Tensor, residual: torch.Tensor | None, x2: torch.Tensor | None
) -> torch.Tensor:
    """The layer in float64, whatever the device."""
    weight, bias = layer.weight.to(x.device), layer.bias.to(x.device)
    y = F.conv2d(x, weight, bias, layer.stride, layer.padding)
    if layer.second is not None:
        second = layer.second
        pooled = F.avg_pool2d(x2, second.pool) if second.pool > 1 else x2
        y += F.conv2d(pooled, second.weight.to(x.device), None, second.stride)
    if residual is not None:
        y += residual
    if layer.relu:
        y.relu_()
    return F.avg_pool2d(y, layer.pool) if layer.pool > 1 else y


__all__ += ["Judge", "output_size"]
