"""For every test: torch's operators run on one thread, since two of them would spin against the servers that
tests start on the same cores.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
