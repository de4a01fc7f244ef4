"""Self-contained HTML reports: inline SVG, nothing fetched from elsewhere."""

from __future__ import annotations

from .alpha import alpha_files, alpha_page
from .results import results_page
from .trunk import trunk_page

__all__ = ["alpha_files", "alpha_page", "results_page", "trunk_page"]
