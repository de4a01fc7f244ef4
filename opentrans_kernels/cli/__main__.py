"""``python -m opentrans_kernels.cli``: the ``opentrans`` command without its console script."""

from __future__ import annotations

import sys

from . import main

sys.exit(main())
