"""A first prediction of speed from density alone, before any timing.

Two models, both from measurements of one AVX2 core (planar engine against oneDNN, float32, batch 1,
synthetic masks; hot-loop ratios averaged over eight 1x1 and six 3x3 shapes, times the share that
survives inside the network). They rank layers and say whether a mask is worth accelerating; the
plan's own timings replace them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

# density -> speed of the sparse layer relative to the dense one, both hot.
SPEED_1X1 = (
    (0.05, 9.3), (0.1, 5.7), (0.2, 3.4), (0.3, 2.45), (0.5, 1.56), (0.7, 1.15), (1.0, 0.87)
)  # fmt: skip
SPEED_3X3 = (
    (0.02, 19.0), (0.05, 8.4), (0.1, 4.85), (0.2, 2.9),
    (0.3, 2.1), (0.5, 1.33), (0.7, 0.99), (1.0, 0.74)
)  # fmt: skip
IN_NETWORK = 0.87  # the engine is 12-15 % slower behind other layers than in a hot loop
LEAST_DENSITY = 0.01  # rows this empty cost their overhead, not their nonzeros

# FLOP density -> r, rate on nonzeros relative to the dense rate, whole trunk.
RATE = ((0.05, 0.33), (0.085, 0.44), (0.1, 0.44), (0.152, 0.55), (0.271, 0.64), (1.0, 0.74))


def _interpolate(curve: Sequence[tuple[float, float]], x: float) -> float:
    """Straight lines in log-log, continued beyond the ends."""
    position = bisect_right([point[0] for point in curve], x)
    position = min(max(position, 1), len(curve) - 1)
    (x0, y0), (x1, y1) = curve[position - 1], curve[position]
    share = math.log(x / x0) / math.log(x1 / x0)
    return math.exp(math.log(y0) + share * math.log(y1 / y0))


def predicted_speedup(kernel: int, density: float) -> float:
    """Speed of one sparse layer in the network relative to the dense layer; below 1 it loses."""
    curve = SPEED_1X1 if kernel == 1 else SPEED_3X3
    return IN_NETWORK * _interpolate(curve, max(density, LEAST_DENSITY))


def predicted_rate(flop_density: float) -> float:
    """r of the whole-trunk model: speed-up = r / FLOP density."""
    return _interpolate(RATE, max(flop_density, LEAST_DENSITY))
