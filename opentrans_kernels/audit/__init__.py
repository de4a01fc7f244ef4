"""What a mask is worth before anything is run: counts, dead channels, structure, predicted cost.

``print(audit(load_masks("mask.pth")))`` needs the mask file alone; with ``model`` the constants of
dead channels and convolutions outside the trunk are known as well.
"""

from __future__ import annotations

from opentrans_kernels.audit.predict import predicted_rate, predicted_speedup
from opentrans_kernels.audit.report import AuditReport, audit
from opentrans_kernels.audit.rows import AuditRow

__all__ = ["AuditReport", "AuditRow", "audit", "predicted_rate", "predicted_speedup"]
