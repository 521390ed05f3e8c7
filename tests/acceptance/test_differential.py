"""Our HTTP request reader against h11's, our event decoder against httpx-sse's, on the same random bytes (fuzz_driver.py).

The seed is of the day of the run, so that every run looks elsewhere; a failure names it: POMEX_FUZZ_SEED repeats the run.
"""
from __future__ import annotations

import json
import os
import subprocess
import time

import pytest
from harness import HERE, POMEX, TOOLS, clean_environment, required

SECONDS = float(os.environ.get("POMEX_FUZZ_SECONDS", "10"))
SEED = os.environ.get("POMEX_FUZZ_SEED") or str(int(time.time()) // 86400)


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
