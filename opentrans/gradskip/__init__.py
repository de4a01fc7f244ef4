"""Gradient skipping: frozen layers that keep only what backward needs.

    report = skip_frozen(model, ["layer1.0.conv2", "layer2"])
    print(report)
    print(report.explain(input_size=(224, 224), batch=4))

See ``docs/training.md`` for the rules and the measured memory.
"""

from __future__ import annotations

from .apply import is_skipped, restore_skipped, skip_frozen
from .explain import Explanation, Kept
from .report import GradSkipReport

__all__ = ["Explanation", "GradSkipReport", "Kept", "is_skipped", "restore_skipped", "skip_frozen"]
