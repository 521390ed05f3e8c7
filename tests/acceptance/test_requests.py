"""Every request of real Codex, and every recorded Responses request that Pomex takes, encoded for each wire, judged by the
request types of the provider's own package, and by what the provider refuses (strict.py)."""
from __future__ import annotations

import functools
import json
import re
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
        complaints = [*(set(given["complaints"]) - known), *refusals(form, given["body"], given["headers"])] if given else []
        if file.endswith(TRIMMED):
            complaints = [complaint for complaint in complaints if not complaint.endswith("not base64")]
        if complaints:
            wrong["/".join(file.split("/")[-3:])] = complaints
    assert not wrong, json.dumps(wrong, indent=1)[:4000]
    assert known <= said, "an exception that is none any more"


def refusals(form, body, headers):
    """What the provider would say besides; signatures of recorded conversations are nobody's here."""
    wire, _, model = form.partition(":")
    try:
        if wire == "messages":
            check_messages(body, ANTHROPIC_MODELS.get(model, AnthropicModel()), {"x-api-key": "upstream-secret", **headers})
        elif wire == "gemini":
            check_generation(model, body.get("generationConfig", {}), bool(check_gemini_tools(model, body)))
            check_contents(body["contents"])
    except Refused as refused:
        return [str(refused)]
    return []


# Fields that may go up nowhere and be named nowhere, by their paths: they ask nothing of a provider.
ASKS_NOTHING = {
    r"metadata|store|stream_options\..*|prompt_cache_key": "the gateway does it itself",
    r"input\[.*\.(id|status|call_id)": "marks of a turn that is over",
    r"input\[\w+\](\.operation\[\w+\])?\.(caller\[\w+\](\..*)?|execution)": "who called, in a turn that is over",
    r"input\[message\]\.(phase|content\[output_text\]\.(annotations|logprobs)\b.*)": "marks of text that is in the history",
    r"input\[function_call_output\]\.(name|namespace)": "its call has them",
    r"input\[(image_generation_call|shell_call|shell_call_output)\]\..*": "how a tool ran, in a turn that is over",
    r"reasoning\.summary": "where thoughts are open they need no summary",
    r".*\[input_(image|file)\]\.(file_id|file_url)": "a second source of the file that is sent",
    r"text\.format\[json_schema\]\.name": "a label",
}
# Values that ask for what happens anyway, by the last name of a path.
NEUTRAL = {
    "background": [False], "include[]": ["reasoning.encrypted_content"], "service_tier": ["auto", "default"], "verbosity": ["medium"],
    "truncation": ["disabled"], "effort": ["none"], "tool_choice": ["auto"], "parallel_tool_calls": [True], "strict": [False], "async": [False],
    "defer_loading": [False], "allowed_callers[]": ["direct"], "detail": ["auto"], "search_context_size": ["medium"],
    "search_content_types[]": ["text"], "external_web_access": [True]}
# Fields that nobody names yet. Each goes as soon as it is named.
OTHERS, ALL = ("chat", "messages", "gemini"), ("responses", "chat", "messages", "gemini")
NOT_YET: dict[str, tuple[str, ...]] = {
    r"(.*\.)?tools\[\w+\]\.defer_loading": ALL,
    r"(.*\.)?tools\[namespace\]\.description": ALL,
    r"(.*\.)?tools\[function\]\.strict": OTHERS,
    r"(.*\.)?tools\[web_search(_preview)?\]\.(external_web_access|search_context_size|search_content_types\[\])": ("messages", "gemini"),
    r"input\[(function_call|custom_tool_call)\]\.async": ALL,
    r"input\[reasoning\]": ALL,
    r".*\[input_(image|file)\]\.detail": OTHERS,
    r".*\[input_file\]\.filename": ("gemini",),
    r"text\.format\[json_schema\]\.(description|strict)": ("messages", "gemini"),
}


def unnamed(silent):
    """Paths and values that ask for something, and are passed over in silence."""
    found = {}
    for path, values in silent.items():
        values = [value for value in values if value not in NEUTRAL.get(path.rpartition(".")[2], [])]
        if values and not any(re.fullmatch(pattern, path) for pattern in ASKS_NOTHING):
            found[path] = values
    return found


FIELD_FORMS = ["responses", "chat", "chat:gpt-5.5:openai", "messages:claude-opus-5", "messages:claude-sonnet-4-5",
               "gemini:gemini-3.8-flash", "gemini:gemini-2.5-pro"]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The driver's findings for a form."""
    @functools.cache
    def walk(form):
        done = subprocess.run([str(package_python("openai-3")), str(HERE / "fields_driver.py"), str(POMEX), form],
                              env=clean_environment(tmp_path_factory.mktemp("home")), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)
    return walk


@pytest.mark.parametrize("form", FIELD_FORMS)
def test_every_field_that_the_sdk_knows_is_carried_or_named(form, walked):
    found = walked(form)
    assert len(found["fields"]) > 300
    assert set(found["refused"]) <= {"conversation", "prompt", "input[]"}, found["refused"]
    wire = form.partition(":")[0]
    missing = {path: values for path, values in unnamed(found["silent"]).items()
               if not any(wire in wires and re.fullmatch(pattern, path) for pattern, wires in NOT_YET.items())}
    assert missing == {}, json.dumps(missing, indent=1)[:6000]


def test_no_exception_for_a_field_is_left_over(walked):
    silent = {(form.partition(":")[0], path) for form in FIELD_FORMS for path in unnamed(walked(form)["silent"])}
    left_over = [(pattern, wire) for pattern, wires in NOT_YET.items() for wire in wires
                 if not any(wire == its and re.fullmatch(pattern, path) for its, path in silent)]
    assert left_over == []
    paths = {path for form in FIELD_FORMS for path in walked(form)["silent"]}
    assert [pattern for pattern in ASKS_NOTHING if not any(re.fullmatch(pattern, path) for path in paths)] == []
