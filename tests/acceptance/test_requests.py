"""Every request of real Codex, and every recorded Responses request that Pomex takes, encoded for each wire, judged by the
request types of the provider's own package, and by what the provider refuses (strict.py)."""
from __future__ import annotations

import json
import subprocess

import pytest
from harness import HERE, POMEX, SHARED, clean_environment, package_python
from strict import ANTHROPIC_MODELS, AnthropicModel, Refused, check_contents, check_gemini_tools, check_generation, check_messages

CODEX = sorted((SHARED / "codex-requests").glob("*/[0-9]*.json"))
RECORDED = sorted((SHARED / "recorded" / "responses").glob("*/request.json"))
REQUESTS = [*CODEX, *RECORDED]
pytestmark = pytest.mark.skipif(not CODEX, reason="../shared/codex-requests does not lie beside the repository")

PACKAGES = {"responses": "openai-3", "chat": "openai-3", "messages": "anthropic", "gemini": "google-genai"}
FORMS = ["responses", "chat", "chat:gpt-5.5:openai", "chat:some-model:xai",
         "messages", "messages:claude-sonnet-4-5", "messages:claude-opus-4-8", "messages:claude-opus-5-5",
         "gemini:gemini-2.5-flash", "gemini:gemini-3.7-flash"]
# What a package complains of although it is right: anthropic 2 has no sampling parameters, as the newest models have none;
# those before claude-opus-4-7, and other vendors behind the same API, take them.
NO_SAMPLING = "temperature: Extra inputs are not permitted"
EXCEPTIONS = {"messages": {NO_SAMPLING}, "messages:claude-sonnet-4-5": {NO_SAMPLING}}
# Whoever recorded these cut the file or image in the middle: it is no base64 any more.
TRIMMED = ("file-in/request.json", "tool-image-as-user-message/request.json")


@pytest.mark.parametrize("form", FORMS)
def test_every_request_is_a_valid_request_of_the_wire(form, tmp_path):
    python = package_python(PACKAGES[form.partition(":")[0]])
    done = subprocess.run([str(python), str(HERE / "encode_driver.py"), str(POMEX), form, *map(str, REQUESTS)],
                          env=clean_environment(tmp_path), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == len(REQUESTS) >= 110
    untaken = [file for file, given in found.items() if given is None]
    assert len(untaken) < 5 and not any("codex-requests" in file for file in untaken), untaken
    known, said = EXCEPTIONS.get(form, set()), set()
    wrong = {}
    for file, given in found.items():
        said |= set(given["complaints"]) if given else set()
        complaints = [*(set(given["complaints"]) - known), *refusals(form, given["body"])] if given else []
        if file.endswith(TRIMMED):
            complaints = [complaint for complaint in complaints if not complaint.endswith("not base64")]
        if complaints:
            wrong["/".join(file.split("/")[-3:])] = complaints
    assert not wrong, json.dumps(wrong, indent=1)[:4000]
    assert known <= said, "an exception that is none any more"


def refusals(form, body):
    """What the provider would say besides; signatures of recorded conversations are nobody's here."""
    wire, _, model = form.partition(":")
    try:
        if wire == "messages":
            headers = {"x-api-key": "upstream-secret", "anthropic-version": "2023-06-01"}
            check_messages(body, ANTHROPIC_MODELS.get(model, AnthropicModel()), headers)
        elif wire == "gemini":
            check_generation(model, body.get("generationConfig", {}), bool(check_gemini_tools(model, body)))
            check_contents(body["contents"])
    except Refused as refused:
        return [str(refused)]
    return []
