"""Self-contained HTML reports: inline SVG, no scripts, nothing fetched from elsewhere."""

from __future__ import annotations

from .alpha import alpha_files, alpha_page
from .trunk import trunk_page

__all__ = ["alpha_files", "alpha_page", "trunk_page"]
