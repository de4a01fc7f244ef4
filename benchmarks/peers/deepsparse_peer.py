"""DeepSparse is timed by ``opentrans bench trunk --peers deepsparse``; the worker process that was
made for it serves the spectra benchmark too.
"""

from __future__ import annotations

from opentrans_kernels.bench.peers.process import Worker

__all__ = ["Worker"]
