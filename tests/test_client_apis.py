"""Every recorded exchange and field case, on every provider wire, as clients of Chat Completions and of Messages get it.

What they must have is what a Responses client has of the same bytes: the text, the calls in their order, the reasoning,
the counts, and an end that says the same. The readers of client_streams.py judge the form.
"""
from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import streams
from client_streams import (
    Result,
    Violation,
    check_chat_completion,
    check_chat_stream,
    check_message,
    check_messages_stream,
)

import pomex

JSON = dict[str, Any]
SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
if not (SHARED / "recorded").is_dir() or not (SHARED / "cases").is_dir():
    pytest.skip("the recorded exchanges are not beside the repository", allow_module_level=True)

APIS = ("chat", "messages")
MODEL = "m/x"
ENVELOPE = pomex.Envelope(b"s" * 32, "a")
WIRE_OF = {"chat": "chat", "anthropic": "messages", "gemini": "gemini", "responses": "responses"}      # of a folder
UPSTREAM_MODEL = {"chat": "m", "messages": "claude-opus-4-8", "gemini": "gemini-3.5-flash", "responses": "m"}
DIALECTS = {"kimi": "moonshot", "llamacpp": "llama.cpp", "copilot": "openai", "tool": "mistral"}
BREAK = pomex.UpstreamTimeout("silent")
# what each API says for the end of a Responses answer
ENDS = {
    "chat": {"completed": ("stop", "tool_calls"), "max_output_tokens": ("length",), "content_filter": ("content_filter",),
             "failed": ("error",)},
    "messages": {"completed": ("end_turn", "tool_use", "stop_sequence"), "failed": ("error",), "content_filter": ("refusal",),
                 "max_output_tokens": ("max_tokens", "model_context_window_exceeded")},
}
# events that no decoder knows, before each that it knows
UNKNOWN = {
    "chat": b': comment\n\ndata: {"type":"ping"}\n\ndata: {"choices":[]}\n\n',
    "messages": b': comment\n\nevent: new_event\ndata: {"type":"new_event","index":0}\n\n',
    "gemini": b': comment\n\ndata: {"newField":1}\n\n',
    "responses": b'event: response.new.delta\ndata: {"type":"response.new.delta","output_index":0,"delta":5}\n\n: comment\n\n',
}


# --- where the bytes come from

class Source(NamedTuple):
    """An upstream's answer."""
    name: str
    wire: str
    dialect: str
    raw: bytes

    @property
    def blocks(self) -> list[bytes]:
        """The events, each with its empty line."""
        return [block + b"\n\n" for block in self.raw.replace(b"\r\n", b"\n").split(b"\n\n") if block.strip()]


def dialect_of(name: str) -> str:
    first = name.split("-")[0]
    return DIALECTS.get(first, first if first in pomex.DIALECTS else "generic")


def recorded(file: str, custom: bool = False) -> Iterator[Source]:
    """Those with custom tools, which only OpenAI's own API is offered, or the others. Not those whose calls come in
    Vertex's pieces, which nobody asks it to."""
    for folder, wire in WIRE_OF.items():
        for path in sorted((SHARED / "recorded" / folder).glob(f"*/{file}")):
            name, raw = path.parent.name, path.read_bytes()
            status = json.loads((path.parent / "meta.json").read_bytes())["status"]
            is_custom = b'"custom_tool_call"' in raw or name == "openai-custom-tool-call"
            if status == 200 and is_custom == custom and b"partialArgs" not in raw:
                yield Source(f"{wire}-{name}", wire, dialect_of(name) if wire == "chat" else "", raw)


def cases(file: str) -> Iterator[Source]:
    for path in sorted((SHARED / "cases").glob(f"*/{file}")):
        meta = json.loads((path.parent / "meta.json").read_bytes())
        if meta["status"] == 200:
            yield Source(path.parent.name, meta["wire_api"], meta["dialect"], path.read_bytes())


def sse(*events: JSON | str) -> bytes:
    """The events, each named by its type if it has one."""
    named = [(event.get("type", "") if isinstance(event, dict) else "", event) for event in events]
    return "".join((f"event: {name}\n" if name else "") + f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"
                   for name, event in named).encode()


def chunk(finish: str | None = None, /, **delta: Any) -> JSON:
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def piece(index: int, text: str, call_id: str = "") -> JSON:
    new = {"id": call_id, "type": "function"} if call_id else {}
    return chunk(tool_calls=[{"index": index, **new, "function": {**({"name": f"look{index}"} if new else {}), "arguments": text}}])


def item_event(kind: str, index: int, **fields: Any) -> JSON:
    return {"type": f"response.{kind}", "output_index": index, **fields}


def block_event(kind: str, index: int, **fields: Any) -> JSON:
    return {"type": f"content_block_{kind}", "index": index, **fields}


SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello", "annotations": []}]}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"a":1}', "status": "completed"}
THOUGHT = {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "gAAA"}
MESSAGE_START = {"type": "message_start", "message": {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None, "stop_sequence": None,
    "usage": {"input_tokens": 5, "output_tokens": 1}}}
# what no recording shows: (wire, bytes)
MADE = {
    "calls-told-in-turns": ("chat", sse(
        chunk(role="assistant"), piece(0, '{"a":', "x1"), piece(1, '{"b":', "x2"), piece(0, "1}"), piece(1, "2}"),
        chunk("tool_calls"), "[DONE]")),
    "text-between-and-after-calls": ("chat", sse(
        chunk(content="I look. "), piece(0, "{}", "x1"), chunk(content="And again. "), piece(1, '{"a":1}', "x2"),
        chunk(content="Now."), chunk("tool_calls"), "[DONE]")),
    "thoughts-between-texts": ("chat", sse(
        chunk(reasoning_content="one "), chunk(content="Hel"), chunk(reasoning_content="two"), chunk(content="lo"), chunk("stop"))),
    "thoughts-alone": ("chat", sse(chunk(reasoning_content="hm"), chunk("stop"), "[DONE]")),
    "characters-in-halves": ("chat", sse(
        chunk(content="a \ud83d"), chunk(content="\ude00 b"), piece(0, '{"a":"\ud83d', "x1"), piece(0, '\ude00"}'), chunk("tool_calls"))),
    "raw-line-ends-in-arguments": ("chat", sse(piece(0, '{"a":"one\n', "x1"), piece(0, 'two"}'), chunk("tool_calls"), "[DONE]")),
    "a-call-without-arguments": ("chat", sse(piece(0, "", "x1"), chunk("tool_calls"), "[DONE]")),
    "ids-that-anthropic-refuses": ("chat", sse(piece(0, "{}", "functions.look:0"), piece(1, "{}", "x|y/z="), chunk("tool_calls"))),
    "a-call-under-stop": ("chat", sse(piece(0, "{}", "x1"), chunk("stop"), "[DONE]")),
    "half-a-call-under-stop": ("chat", sse(piece(0, '{"a":', "x1"), chunk("stop"), "[DONE]")),
    "half-a-call-under-length": ("chat", sse(chunk(content="So."), piece(0, "{}", "x1"), piece(1, '{"a":', "x2"), chunk("length"))),
    "white-space-alone": ("chat", sse(chunk(content="\n\n"), chunk("stop"), "[DONE]")),
    "a-filter-before-a-word": ("chat", sse(chunk("content_filter"), "[DONE]")),
    "a-filter-after-a-call": ("chat", sse(piece(0, "{}", "x1"), chunk("content_filter"), "[DONE]")),
    "an-error-after-a-call": ("chat", sse(
        chunk(content="So."), piece(0, "{}", "x1"), {"error": {"message": "boom", "code": "rate_limit_exceeded"}})),
    "an-error-after-the-finish": ("chat", sse(chunk(content="So."), chunk("stop"), {"error": {"message": "boom"}})),
    "a-burst": ("chat", sse(*[chunk(content=f"word{n} ") for n in range(200)], chunk("stop"), "[DONE]")),
    "items-told-in-turns": ("responses", sse(
        item_event("output_item.added", 0, item={**SAID, "content": []}),
        item_event("output_text.delta", 0, content_index=0, delta="Hel"),
        item_event("output_item.added", 1, item={**CALL, "arguments": ""}),
        item_event("output_text.delta", 0, content_index=0, delta="lo"),
        item_event("function_call_arguments.delta", 1, delta='{"a"'),
        item_event("output_item.added", 2, item={**THOUGHT, "encrypted_content": None, "summary": []}),
        item_event("reasoning_summary_text.delta", 2, summary_index=0, delta="hm"),
        item_event("output_item.done", 0, item=SAID),
        item_event("function_call_arguments.delta", 1, delta=":1}"),
        item_event("output_item.done", 2, item=THOUGHT), item_event("output_item.done", 1, item=CALL),
        {"type": "response.completed", "response": {"output": [SAID, CALL, THOUGHT], "usage": {"input_tokens": 5, "output_tokens": 3}}})),
    "a-refusal-and-a-text": ("responses", sse({"type": "response.completed", "response": {"output": [
        SAID, {**SAID, "content": [{"type": "refusal", "refusal": "No."}]}], "usage": {"input_tokens": 5, "output_tokens": 3}}})),
    "blocks-told-in-turns": ("messages", sse(
        MESSAGE_START,
        block_event("start", 0, content_block={"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}),
        block_event("start", 1, content_block={"type": "tool_use", "id": "toolu_2", "name": "find", "input": {}}),
        block_event("delta", 0, delta={"type": "input_json_delta", "partial_json": '{"a":'}),
        block_event("delta", 1, delta={"type": "input_json_delta", "partial_json": '{"b":2}'}),
        block_event("delta", 0, delta={"type": "input_json_delta", "partial_json": "1}"}),
        block_event("stop", 0), block_event("stop", 1),
        {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": {"output_tokens": 9}},
        {"type": "message_stop"})),
}
STREAMS = [*recorded("response.sse"), *cases("upstream.sse"),
           *(Source(name, wire, "generic" if wire == "chat" else "", raw) for name, (wire, raw) in MADE.items())]
WHOLES = [*recorded("response.json"), *cases("upstream.json")]
# OpenAI's own API gets the requests of other clients whole, with custom tools
SENT_WHOLE = [*(source for source in STREAMS if source.wire == "responses"), *recorded("response.sse", custom=True)]


# --- a client's request and its answer

def request_body(api: str, names: Iterable[str], stream: bool, search: bool, include_usage: bool, custom: bool) -> JSON:
    """The same question in the form of each API: functions with these names, or custom tools, and web search."""
    functions = [{"name": name, "description": "d", "parameters": {"type": "object", "properties": {}}} for name in names]
    body: JSON = {"model": MODEL, "stream": stream}
    said = [{"role": "user", "content": "hello"}]
    tools: list[JSON]
    if api == "responses":
        body |= {"input": "hello"}
        tools = [{"type": "custom", "name": f["name"]} if custom else {"type": "function", **f} for f in functions]
        tools += [{"type": "web_search"}] * search
    elif api == "chat":
        body |= {"messages": said} | ({"web_search_options": {}} if search else {})
        body |= {"stream_options": {"include_usage": True}} if stream and include_usage else {}
        tools = [{"type": "custom", "custom": {"name": f["name"]}} if custom else {"type": "function", "function": f}
                 for f in functions]
    else:
        body |= {"messages": said, "max_tokens": 4000}
        tools = [{"name": f["name"], "description": "d", "input_schema": f["parameters"]} for f in functions]
        tools += [{"type": "web_search_20250305", "name": "web_search"}] * search
    return body | ({"tools": tools} if tools else {})


def attempt_of(source: Source, api: str, names: Iterable[str], stream: bool = True, passthrough: bool = False,
               include_usage: bool = True, custom: bool = False) -> Any:
    body = request_body(api, names, stream, b"web_search" in source.raw, include_usage, custom)
    request = pomex.parse_request(json.dumps(body).encode(), None, api)
    answer = pomex.CLIENT_APIS[api].answer(request, "resp_0123456789ab", 1_790_000_000, pomex.STANDARD)
    model = UPSTREAM_MODEL[source.wire]
    context = pomex.EncodeContext(answer, ENVELOPE, "p", model, passthrough, source.dialect)
    return pomex.WIRES[source.wire].call(context).attempt


def run(attempt: Any, pieces: Iterable[bytes], error: pomex.GatewayError | None = None) -> bytes:
    """What the client gets of these pieces; `error`: how the connection broke, if it did."""
    raw = b""
    try:
        for piece in pieces:
            attempt.feed(piece)
            raw += attempt.take_output()
        if error is None:
            attempt.end()
    except pomex.GatewayError as fault:
        error = fault
    attempt.finish(error)
    return raw + bytes(attempt.terminal(1_790_000_002))


def run_whole(attempt: Any, raw: bytes) -> Any:
    """The attempt at the end of an answer that came as one JSON object."""
    error = None
    try:
        attempt.whole(raw)
    except pomex.GatewayError as fault:
        error = fault
    attempt.finish(error)
    return attempt


def check_stream(api: str, raw: bytes, names: Iterable[str] | None = None, passed: bool = False,
                 include_usage: bool = True, custom: bool = False) -> Result:
    kind = "custom" if custom else "function"
    tools = None if names is None else [{"type": kind, kind: {"name": name}} for name in names]
    if api == "chat":
        return check_chat_stream(raw, model=MODEL, include_usage=include_usage, tools=tools, passed=passed)
    return check_messages_stream(raw, model=MODEL, tools=tools, passed=passed)


def check_whole(api: str, body: str) -> Result:
    check = check_chat_completion if api == "chat" else check_message
    return check(body.encode(), model=MODEL)


# --- what a Responses client has of it

@dataclass
class Expected:
    end: str                    # "completed", "failed" or why it is incomplete
    texts: list[str]            # of the parts
    refusals: list[str]
    reasoning: list[str]
    sealed: int                 # thoughts that a later turn sends back
    trailing: int               # of these, those without text behind all else: no block may follow the text in Messages
    calls: list[tuple[str, Any]]
    partial: list[str]          # names of calls that were cut
    usage: JSON
    code: str                   # of the error
    billed: pomex.Usage


def arguments(text: str) -> Any:
    """Equal if the JSON is; the input of a custom tool is text."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text


def trailing_thoughts(items: list[JSON]) -> int:
    others = [index for index, item in enumerate(items) if item["type"] != "reasoning" or item["summary"] or item.get("content")]
    return sum(bool(item.get("encrypted_content")) for item in items[others[-1] + 1:]) if others else 0


def expected_of(final: JSON, attempt: Any) -> Expected:
    items = final["output"]
    parts = [part for item in items if item["type"] == "message" for part in item["content"]]
    thoughts = [item for item in items if item["type"] == "reasoning"]
    calls = [item for item in items if item["type"] in ("function_call", "custom_tool_call")]
    return Expected(
        (final["incomplete_details"] or {}).get("reason") or final["status"],
        [part["text"] for part in parts if "text" in part],
        [part["refusal"] for part in parts if "refusal" in part],
        [part["text"] for item in thoughts for part in [*item["summary"], *(item.get("content") or [])]],
        sum(bool(item.get("encrypted_content")) for item in thoughts),
        trailing_thoughts(items),
        [(item["name"], arguments(item.get("arguments", item.get("input")))) for item in calls if item["status"] == "completed"],
        [item["name"] for item in calls if item["status"] != "completed"],
        final["usage"],
        (final["error"] or {}).get("code", ""),
        attempt.usage)


@functools.cache
def expected_of_stream(source: Source, count: int | None = None, broken: bool = False, custom: str = "") -> Expected:
    """Of the first `count` events. `custom`: the custom tools, separated by spaces."""
    attempt = attempt_of(source, "responses", custom.split(), custom=True)
    raw = run(attempt, source.blocks[:count], BREAK if broken else None)
    return expected_of(streams.check(raw), attempt)


def expected_of_whole(source: Source) -> Expected:
    attempt = run_whole(attempt_of(source, "responses", (), False), source.raw)
    return expected_of(json.loads(attempt.body(2)), attempt)


def names_of(expected: Expected) -> list[str]:
    return list(dict.fromkeys([name for name, _ in expected.calls] + expected.partial))


def compare_calls(got: Result, wanted: Expected, streamed: bool) -> None:
    """A call that a limit cut is left out of a body. In a stream of Messages it may be a call without arguments, which
    cannot be told from a whole one."""
    calls = [(call.name, arguments(call.arguments)) for call in got.calls]
    partial = [call.name for call in got.partial]
    if streamed and wanted.partial:
        assert [name for name, _ in calls] + partial == [name for name, _ in wanted.calls] + wanted.partial
        assert all(given == {} for _, given in calls[len(wanted.calls):])
        calls = calls[:len(wanted.calls)]
    else:
        assert partial == [] or partial == wanted.partial
    assert calls == wanted.calls


def compare_texts(api: str, got: Result, wanted: Expected) -> None:
    """Parts that Chat does not tell apart may have an empty line between them. What another item says while a call is
    open comes after it in Messages, and not at all if the call never ends."""
    pairs = [(got.text, wanted.texts), (got.refusal, wanted.refusals), (got.reasoning, wanted.reasoning)]
    if api == "chat":
        assert all(said in ("".join(parts), "\n\n".join(parts)) for said, parts in pairs), pairs
        return
    open_call = got.error is not None and got.partial
    for said, parts in [(got.text, wanted.texts + wanted.refusals), pairs[2]]:
        assert said == "".join(parts) or (open_call and "".join(parts).startswith(said)), (said, parts)


def compare(api: str, got: Result, wanted: Expected, streamed: bool = True) -> None:
    assert got.end in ENDS[api][wanted.end], f"{got.end}, where Responses says {wanted.end}"
    compare_texts(api, got, wanted)
    if got.error is not None:
        assert api == "messages" or got.error["code"] == wanted.code
        return
    compare_calls(got, wanted, streamed)
    assert len(got.signatures) >= wanted.sealed - (wanted.trailing if api == "messages" else 0)
    if api == "messages" and len(got.content) > 1:
        assert got.content[-1]["type"] != "redacted_thinking"      # Claude Code takes the last block as its result
    compare_usage(api, got.usage, wanted.usage)


def compare_passed(source: Source, got: Result, wanted: Expected) -> None:
    """What passes has its own words for reasoning and counts; a paused turn is the client's to resume, and a Responses
    client could not."""
    assert got.end in ENDS[source.wire][wanted.end] or got.end == "pause_turn", f"{got.end} for {wanted.end}"
    text, rest = "".join(wanted.texts).lstrip(), got.text.lstrip()
    assert b"<think>" in source.raw or rest.startswith(text)
    assert b"<think>" in source.raw or "<think>".startswith(rest.removeprefix(text))     # which a decoder waits for
    if got.error is None:
        compare_calls(got, wanted, True)
    if source.wire == "messages":
        assert got.reasoning == "".join(wanted.reasoning) and len(got.signatures) >= wanted.sealed


def compare_usage(api: str, got: JSON | None, wanted: JSON) -> None:
    assert got is not None
    cached = wanted["input_tokens_details"]["cached_tokens"]
    if api == "chat":
        assert (got["prompt_tokens"], got["completion_tokens"]) == (wanted["input_tokens"], wanted["output_tokens"])
        assert ((got.get("prompt_tokens_details") or {}).get("cached_tokens") or 0) == cached
        return
    read, written = (got.get(f"cache_{kind}_input_tokens") or 0 for kind in ("read", "creation"))
    assert (got["input_tokens"] + read + written, got["output_tokens"]) == (wanted["input_tokens"], wanted["output_tokens"])
    assert read == cached


def ids(source: Source) -> str:
    return source.name


@pytest.fixture(params=APIS)
def api(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- translated

@pytest.mark.parametrize("source", STREAMS, ids=ids)
class TestEveryStreamTranslated:
    def test_holds_what_a_responses_client_gets(self, source: Source, api: str) -> None:
        wanted = expected_of_stream(source)
        names = names_of(wanted)
        attempt = attempt_of(source, api, names)
        compare(api, check_stream(api, run(attempt, [source.raw]), names), wanted)
        assert attempt.usage == wanted.billed

    def test_is_the_same_however_it_arrives(self, source: Source, api: str) -> None:
        names = names_of(expected_of_stream(source))
        wanted = check_stream(api, run(attempt_of(source, api, names), [source.raw]))
        for pieces in arrivals(source):
            assert check_stream(api, run(attempt_of(source, api, names), pieces)) == wanted

    def test_ends_once_and_truly_wherever_it_is_cut(self, source: Source, api: str) -> None:
        names = names_of(expected_of_stream(source))
        for count in counts(source):
            for broken in (False, True):
                raw = run(attempt_of(source, api, names), source.blocks[:count], BREAK if broken else None)
                compare(api, check_stream(api, raw), expected_of_stream(source, count, broken))

    def test_is_one_body_for_a_client_that_does_not_stream(self, source: Source, api: str) -> None:
        wanted = expected_of_stream(source)
        attempt = attempt_of(source, api, names_of(wanted), stream=False)
        run(attempt, [source.raw])
        if wanted.end != "failed":          # else the client gets an error's status
            compare(api, check_whole(api, attempt.body(1_790_000_002)), wanted, streamed=False)
        assert (attempt.status == "failed") == (wanted.end == "failed")


def arrivals(source: Source) -> Iterator[list[bytes]]:
    """Byte by byte, event by event, with the other line ends, with events between that nobody knows."""
    step = 1 if len(source.raw) < 10_000 else 61
    yield [source.raw[n:n + step] for n in range(0, len(source.raw), step)]
    yield source.blocks
    yield [b"".join(source.blocks).replace(b"\n", b"\r\n")]
    yield [piece for block in source.blocks for piece in (UNKNOWN[source.wire], block)]


def counts(source: Source) -> list[int]:
    """Every event of a short stream, some of a long one."""
    total = len(source.blocks)
    return [*range(0, total, 1 + total // 60), total]


@pytest.mark.parametrize("source", STREAMS, ids=ids)
def test_a_usage_comes_only_where_it_is_asked_for(source: Source) -> None:
    names = names_of(expected_of_stream(source))
    raw = run(attempt_of(source, "chat", names, include_usage=False), [source.raw])
    assert check_stream("chat", raw, names, include_usage=False).usage is None


@pytest.mark.parametrize("source", WHOLES, ids=ids)
@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_answer_holds_what_a_responses_client_gets(source: Source, api: str, stream: bool) -> None:
    wanted = expected_of_whole(source)
    attempt = run_whole(attempt_of(source, api, names_of(wanted), stream), source.raw)
    if stream:
        raw = bytes(attempt.take_output() + attempt.terminal(2))
        compare(api, check_stream(api, raw, names_of(wanted)), wanted)
    elif wanted.end == "failed":
        assert attempt.status == "failed"
    else:
        compare(api, check_whole(api, attempt.body(2)), wanted, streamed=False)


WITH_CALLS = [source for source in STREAMS if re.search(rb"tool_use|tool_calls|functionCall|function_call", source.raw)]


@pytest.mark.parametrize("source", WITH_CALLS, ids=ids)
def test_a_call_of_a_custom_tool_is_one_for_a_chat_client(source: Source) -> None:
    names = names_of(expected_of_stream(source))
    wanted = expected_of_stream(source, custom=" ".join(names))
    raw = run(attempt_of(source, "chat", names, custom=True), [source.raw])
    compare("chat", check_stream("chat", raw, names, custom=True), wanted)


@pytest.mark.parametrize("api, source", [
    pytest.param(api, source, id=f"{api}-{source.name}") for source in SENT_WHOLE for api in APIS
    if api == "chat" or b'"custom_tool_call"' not in source.raw])      # Messages has no custom tools
def test_an_answer_to_a_request_that_was_sent_whole_is_as_whole(source: Source, api: str) -> None:
    wanted = expected_of_stream(source)
    custom = b'"custom_tool_call"' in source.raw
    names = names_of(wanted)
    raw = run(attempt_of(source, api, names, passthrough=True, custom=custom), [source.raw])
    compare(api, check_stream(api, raw, names, custom=custom), wanted)


# --- passed through: the upstream speaks the client's API

def is_sound(source: Source) -> bool:
    """Can the upstream's own bytes be taken for an answer? Those of some can not, and pass no better than they came."""
    first = next((pomex.parse_object(data) for data in recorded_data(source.raw) if '"model"' in data), None) or {}
    model = first.get("model") or first.get("message", {}).get("model")
    try:
        if source.wire == "chat":
            usage = b'"usage":{' in source.raw.replace(b" ", b"")
            check_chat_stream(source.raw, model=model, include_usage=usage, passed=True)
        else:
            check_messages_stream(source.raw, model=model, passed=True)
    except Violation:
        return False
    return True


def recorded_data(raw: bytes) -> list[str]:
    return [line[5:].strip() for line in raw.decode().splitlines() if line.startswith("data:")]


def is_sound_whole(source: Source) -> bool:
    try:
        (check_chat_completion if source.wire == "chat" else check_message)(source.raw, passed=True)
    except Violation:
        return False
    return True


PASSED = [source for source in STREAMS if source.wire in APIS and is_sound(source)]
PASSED_WHOLE = [source for source in WHOLES if source.wire in APIS and is_sound_whole(source)]


@pytest.mark.parametrize("source", PASSED, ids=ids)
class TestEveryStreamPassedThrough:
    def test_holds_what_a_responses_client_gets(self, source: Source) -> None:
        wanted = expected_of_stream(source)
        attempt = attempt_of(source, source.wire, names_of(wanted), passthrough=True)
        raw = run(attempt, [source.raw])
        compare_passed(source, check_stream(source.wire, raw, names_of(wanted), passed=True), wanted)
        assert attempt.usage == wanted.billed or wanted.billed.estimated

    def test_is_the_same_however_it_arrives(self, source: Source) -> None:
        names = names_of(expected_of_stream(source))
        attempt = functools.partial(attempt_of, source, source.wire, names, passthrough=True)
        wanted = check_stream(source.wire, run(attempt(), [source.raw]), passed=True)
        for pieces in list(arrivals(source))[:3 if source.wire == "chat" else 4]:       # what nobody knows passes, too
            assert check_stream(source.wire, run(attempt(), pieces), passed=True) == wanted

    def test_ends_once_and_truly_wherever_it_is_cut(self, source: Source) -> None:
        wire, names = source.wire, names_of(expected_of_stream(source))
        for count in counts(source):
            for broken in (False, True):
                attempt = attempt_of(source, wire, names, passthrough=True)
                raw = run(attempt, source.blocks[:count], BREAK if broken else None)
                compare_passed(source, check_stream(wire, raw, passed=True), expected_of_stream(source, count, broken))

    def test_has_no_usage_chunk_that_nobody_asked_for(self, source: Source) -> None:
        names = names_of(expected_of_stream(source))
        attempt = attempt_of(source, source.wire, names, passthrough=True, include_usage=False)
        check_stream(source.wire, run(attempt, [source.raw]), passed=True, include_usage=False)


@pytest.mark.parametrize("source", PASSED_WHOLE, ids=ids)
def test_every_whole_answer_is_passed_through(source: Source) -> None:
    wanted = expected_of_whole(source)
    attempt = run_whole(attempt_of(source, source.wire, names_of(wanted), False, passthrough=True), source.raw)
    check = check_chat_completion if source.wire == "chat" else check_message
    compare_passed(source, check(attempt.body(2).encode(), model=MODEL, passed=True), wanted)
    assert attempt.usage == wanted.billed or wanted.billed.estimated


def test_there_are_answers_of_each_kind_to_pass_through() -> None:
    for api in APIS:
        assert sum(source.wire == api for source in PASSED) > 20
        assert sum(source.wire == api for source in PASSED_WHOLE) > 3
