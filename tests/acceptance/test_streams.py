"""Raw streams as they leave Pomex, judged by ../shared/tools/validate_stream.py in each line of the SDK.

A stream that Pomex makes has no finding. A relayed stream has none that the upstream's own bytes did not have.
"""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import model_of
from harness import JSON, SDK_LINES, SHARED, Pomex, Sdk, stream_events, terminal
from scripted import ResponsesAnswer, Call, Custom, Raw, Reasoning, Script, responses_bytes, responses_events, says

TOOL = SHARED / "tools" / "validate_stream.py"
pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="../shared does not lie beside the repository")

FUNCTION = {"type": "function", "name": "look", "description": "Look", "strict": False,
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}}
FREEFORM = {"type": "custom", "name": "apply_patch", "description": "Edit files",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/s"}}
BASE = {"input": [{"role": "user", "content": "Hi"}], "stream": True, "tools": [FUNCTION, FREEFORM]}
SPACE = {"type": "namespace", "name": "mcp__demo", "description": "Demo", "tools": [FUNCTION]}

CASES: dict[str, tuple[JSON, ResponsesAnswer]] = {
    "text": ({"instructions": "Be short.", "metadata": {"k": "v"}, "temperature": 0.5}, says("Hello ✓")),
    "empty": ({}, says("")),
    "nothing": ({}, says()),
    "reasoning": ({"reasoning": {"effort": "low", "summary": "auto"}, "include": ["reasoning.encrypted_content"]},
                  says(Reasoning("So it is.", "gAAAAopaque"), "Yes.")),
    "function": ({"parallel_tool_calls": False}, says("I look.", Call("look", {"at": "it"}))),
    "parallel": ({}, says(Call("look", {"at": "a"}), Call("look", {"at": "b"}), "And text after.")),
    "custom": ({}, says(Custom("apply_patch", "*** Begin Patch\n\"x\"\n*** End Patch"))),
    "namespace": ({"tools": [SPACE]}, says(Call("look", {"at": "x"}, namespace="mcp__demo"))),
    "schema": ({"text": {"format": {"type": "json_schema", "name": "n", "strict": True, "schema": {
        "type": "object", "properties": {}, "required": [], "additionalProperties": False}}}}, says("{}")),
    "length": ({"max_output_tokens": 16}, says("The first half", end="length")),
    "length in a call": ({}, says("Well.", Call("look", {"at": "it"}), end="length")),
    "drop": ({}, says("All of it", Call("look", {"at": "it"}), end="drop")),
    "cut": ({}, says("Some", "This is never whole, the wire is cut", end="cut")),
}
DEMOS = ("echo", "tools", "flaky")


class Capture(NamedTuple):
    """A stream that came out, the request that asked for it, and the bytes that the upstream had sent."""
    name: str
    raw: bytes
    body: JSON
    upstream: bytes = b""


@pytest.fixture(params=SDK_LINES, scope="module")
def sdk(request: pytest.FixtureRequest, pomex: Pomex) -> Sdk:       # type: ignore[misc]
    with Sdk(request.param, pomex.url, pomex.key) as driver:
        yield driver


def captures(pomex: Pomex, script: Script, wire: str) -> list[Capture]:
    taken = []
    for name, (more, answer) in CASES.items():
        script.play(answer)
        body = {**BASE, "model": model_of(wire), **more}
        reply = pomex.post(body)
        assert reply.status == 200, (name, reply.raw)
        taken.append(Capture(name, reply.raw, body, script.sent[0]))
    return taken


def findings(sdk: Sdk, folder: Path, streams: list[Capture]) -> list[list[tuple[str, str]]]:
    """For each stream its findings as (code, message without what differs from stream to stream)."""
    cases = []
    for n, (_, raw, body, _) in enumerate(streams):
        (folder / f"{n}.sse").write_bytes(raw)
        (folder / f"{n}.json").write_text(json.dumps(body))
        cases.append({"capture": str(folder / f"{n}.sse"), "body": str(folder / f"{n}.json")})
    return [[(code, message) for _, code, message in found] for found in sdk("validate", tool=str(TOOL), cases=cases)]


def blemished(sdk: Sdk, folder: Path, streams: list[Capture]) -> dict[str, list[tuple[str, str]]]:
    ours = {stream.name: found for stream, found in zip(streams, findings(sdk, folder, streams), strict=True)}
    if sdk.line == 1:       # it has no types for namespaces and tool_search, and says so of the echoed tools
        ours = {name: [f for f in found if f[0] != "SDK_UNKNOWN_TYPE"] for name, found in ours.items()}
    return {name: found for name, found in ours.items() if found}


def worsened(sdk: Sdk, folder: Path, streams: list[Capture]) -> dict[str, Counter[str]]:
    """The streams that have more findings of a kind than what the upstream sent."""
    ours = findings(sdk, folder, streams)
    theirs = findings(sdk, folder, [stream._replace(raw=stream.upstream) for stream in streams])
    more = {stream.name: Counter(code for code, _ in a) - Counter(code for code, _ in b)
            for stream, a, b in zip(streams, ours, theirs, strict=True)}
    return {name: codes for name, codes in more.items() if codes}


@pytest.mark.parametrize("wire", ["foreign", "chat", "thinker", "messages", "gemini"])
def test_a_stream_that_pomex_makes_has_no_finding(
        sdk: Sdk, pomex: Pomex, script: Script, wire: str, tmp_path: Path) -> None:
    assert blemished(sdk, tmp_path, captures(pomex, script, wire)) == {}


def test_a_demo_stream_has_no_finding(sdk: Sdk, pomex: Pomex, tmp_path: Path) -> None:
    bodies = [{**BASE, "model": f"demo/{name}"} for name in DEMOS]
    streams = [Capture(body["model"], pomex.post(body).raw, body) for body in bodies]
    assert blemished(sdk, tmp_path, streams) == {}


def test_a_relayed_stream_is_no_worse_than_it_came(sdk: Sdk, pomex: Pomex, script: Script, tmp_path: Path) -> None:
    assert worsened(sdk, tmp_path, captures(pomex, script, "native")) == {}


# --- what real providers sent -----------------------------------------------------------------------

def recordings(protocol: str) -> list[Path]:
    """Without those whose calls come in Vertex's pieces, which is asked for by no request of Pomex's."""
    paths = sorted((SHARED / "recorded" / protocol).glob("*/response.sse"))
    return [path.parent for path in paths if b'"partialArgs"' not in path.read_bytes()]


FAILURES = (b'"response.failed"', b"overloaded_error", b"MALFORMED_FUNCTION_CALL")


def asked_tools(asked: JSON) -> Iterator[JSON]:
    """The functions of a request of any wire, and web search."""
    for given in asked.get("tools", []):
        if "googleSearch" in given or "google_search" in given or str(given.get("type")).startswith("web_search"):
            yield {"type": "web_search"}
        for tool in given.get("functionDeclarations", [given]):
            tool = tool.get("function", tool)
            if "name" in tool and ("parameters" in tool or "input_schema" in tool or "parametersJsonSchema" in tool):
                parameters = tool.get("parameters") or tool.get("input_schema") or tool.get("parametersJsonSchema")
                yield {"type": "function", "name": tool["name"], "description": None, "strict": None,
                       "parameters": parameters}


def replay(pomex: Pomex, script: Script, wire: str, folder: Path) -> Capture | None:
    """One recorded stream as the upstream's answer to its own request (of another wire's request: only its tools).

    None where it failed before any output: the client then gets an HTTP error and no stream.
    """
    request = folder / "request.json"       # not every recording kept it
    asked = json.loads(request.read_text()) if request.exists() else {}
    body = {**BASE, **asked} if "input" in asked else {**BASE, "tools": list(asked_tools(asked))}
    body |= {"model": model_of(wire), "stream": True}
    for unserved in ("previous_response_id", "background", "conversation"):
        body.pop(unserved, None)
    raw = (folder / "response.sse").read_bytes()
    rest = folder.parent / folder.name.replace("-turn-stream", "-turn-resumed-stream") / "response.sse"     # of a pause
    script.play(Raw(raw), *([Raw(rest.read_bytes())] if rest.parent != folder and rest.exists() else []))
    reply = pomex.post(body)
    if reply.status >= 400 and b'"response.output_item.added"' not in raw and any(sign in raw for sign in FAILURES):
        assert reply.json["error"]["message"]
        return None
    script.played_out()
    assert reply.status == 200, (folder.name, reply.raw[:500])
    terminal(stream_events(reply.raw))
    return Capture(folder.name, reply.raw, body, raw)


@pytest.mark.parametrize(("wire", "protocol"), [
    ("foreign", "responses"), ("chat", "chat"), ("messages", "anthropic"), ("gemini", "gemini")])
def test_recorded_streams_made_anew_have_no_finding(
        sdk: Sdk, pomex: Pomex, script: Script, wire: str, protocol: str, tmp_path: Path) -> None:
    streams = [stream for folder in recordings(protocol) if (stream := replay(pomex, script, wire, folder))]
    assert streams
    assert blemished(sdk, tmp_path, streams) == {}


def test_recorded_streams_relayed_are_no_worse(sdk: Sdk, pomex: Pomex, script: Script, tmp_path: Path) -> None:
    streams = [stream for folder in recordings("responses") if (stream := replay(pomex, script, "native", folder))]
    assert streams
    assert worsened(sdk, tmp_path, streams) == {}


def test_the_scripted_provider_itself_has_no_finding(sdk: Sdk, tmp_path: Path) -> None:
    """Otherwise a fault in the script would hide one of the relay."""
    ends_well = {name: case for name, case in CASES.items() if case[1].end in ("whole", "length")}
    streams = []
    for name, (more, answer) in ends_well.items():
        body = {**BASE, "model": "plain-model", **more}
        streams.append(Capture(name, responses_bytes(body, answer), body))
    assert blemished(sdk, tmp_path, streams) == {}


def test_items_are_told_apart_without_output_index(pomex: Pomex, script: Script) -> None:
    """llama.cpp sends neither output_index nor sequence_number nor function_call_arguments.done."""
    body = {**BASE, "model": "foreign/plain-model"}
    answer = says(Reasoning("So."), "I look twice.", Call("look", {"at": "a"}), Call("look", {"at": "b"}))
    events = [event for event in responses_events(body, answer) if not event["type"].endswith("arguments.done")]
    for event in events:
        for left_out in ("output_index", "sequence_number", "content_index", "summary_index"):
            event.pop(left_out, None)
    script.play(Raw("".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events).encode()))
    output = pomex.post(body).final["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[1]["content"][0]["text"] == "I look twice."
    assert [json.loads(item["arguments"])["at"] for item in output[2:]] == ["a", "b"]
