"""Our HTTP request reader against h11's, our event decoder against httpx-sse's, on the same random bytes (fuzz_driver.py).

The seed is fixed, so that a change is judged by itself; to look elsewhere, and for longer:
POMEX_FUZZ_SEED=$RANDOM POMEX_FUZZ_SECONDS=300. A failure names its seed.
"""
from __future__ import annotations

import json
import os
import subprocess

import pytest
from harness import HERE, POMEX, TOOLS, clean_environment, required

SECONDS = float(os.environ.get("POMEX_FUZZ_SECONDS", "10"))
SEED = os.environ.get("POMEX_FUZZ_SEED", "1")


@pytest.mark.parametrize("kind, least", [("http", 5000), ("sse", 5000)])
def test_both_read_the_same_but_for_the_differences_that_are_allowed(kind, least, tmp_path):
    python = required(TOOLS / "fuzz" / "bin" / "python", "h11 and httpx-sse")
    done = subprocess.run([str(python), str(HERE / "fuzz_driver.py"), str(POMEX), kind, SEED, str(SECONDS)],
                          env=clean_environment(tmp_path), capture_output=True, text=True, timeout=SECONDS + 60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print(json.dumps(found["counts"], indent=1))
    assert not found["unexplained"], f"seed {SEED}: " + json.dumps(found["unexplained"], indent=1)[:4000]
    assert found["tried"] * 10 / SECONDS >= least
