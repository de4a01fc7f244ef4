"""Self-contained HTML reports: inline SVG, no scripts, nothing fetched from elsewhere."""

from __future__ import annotations

from .trunk import trunk_page

__all__ = ["trunk_page"]
