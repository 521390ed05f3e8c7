"""The fault kit at every place where a stream can be cut; the core tests take one of each kind."""
from __future__ import annotations

import os
import subprocess
import sys

from harness import ROOT


def test_every_fault_at_every_place() -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_faults.py"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "POMEX_FAULTS": "all"}, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
