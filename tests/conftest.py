"""Workers of pytest-xdist share the cores: one thread each, set before torch is imported.

Properties are tried on the same examples in every run, so that a failure is never met by chance alone; new ones are
looked for with `pytest --hypothesis-profile=explore`.
"""

from __future__ import annotations

import os

from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("same", derandomize=True)
settings.register_profile("explore", print_blob=True)
settings.load_profile("same")
