"""Every request of real Codex, encoded for each wire, judged by the request types of the provider's own package."""
from __future__ import annotations

import json
import subprocess

import pytest
from harness import HERE, POMEX, SHARED, clean_environment, sdk_python

REQUESTS = sorted((SHARED / "codex-requests").glob("*/*.json"))
pytestmark = pytest.mark.skipif(not REQUESTS, reason="../shared/codex-requests does not lie beside the repository")


@pytest.mark.parametrize("form", ["responses", "chat", "chat:gpt-5.5:openai", "chat:some-model:xai"])
def test_every_codex_request_is_a_valid_request_of_the_wire(form, tmp_path):
    done = subprocess.run([str(sdk_python(3)), str(HERE / "encode_driver.py"), str(POMEX), form, *map(str, REQUESTS)],
                          env=clean_environment(tmp_path), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == len(REQUESTS) >= 60
    wrong = {file.rpartition("codex-requests/")[2]: complaints for file, complaints in found.items() if complaints}
    assert not wrong, json.dumps(wrong, indent=1)[:4000]
