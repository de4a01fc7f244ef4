"""Self-contained HTML reports: inline SVG, nothing fetched from elsewhere."""

from __future__ import annotations

from .alpha import alpha_files, alpha_page
from .demo import demo_page
from .page import Picture
from .results import results_page
from .trunk import trunk_page

__all__ = ["Picture", "alpha_files", "alpha_page", "demo_page", "results_page", "trunk_page"]
