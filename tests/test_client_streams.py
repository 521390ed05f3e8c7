"""The readers of client streams themselves: what is right passes, and each single fault is found."""
from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from client_streams import (
    Call,
    Violation,
    check_chat_completion,
    check_chat_stream,
    check_message,
    check_messages_stream,
)

JSON = dict[str, Any]
Change = Callable[[list[Any]], Any]
MODEL = "p/m"
CHAT_TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}},
              {"type": "custom", "custom": {"name": "patch"}}]
TOOLS = [{"name": "look", "input_schema": {"type": "object"}}, {"type": "custom", "name": "find", "input_schema": {}}]


def chunk(delta: JSON | None = None, finish: str | None = None, **fields: Any) -> JSON:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_790_000_000, "model": MODEL,
            "choices": choices, **fields}


def piece(index: int, text: str, **fields: Any) -> JSON:
    name = {"name": "look"} if fields else {}
    return chunk({"tool_calls": [{"index": index, **fields, "function": {**name, "arguments": text}}]})


NEW = {"id": "call_1", "type": "function"}
ROLE = chunk({"role": "assistant", "content": ""})
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 2},
         "completion_tokens_details": {"reasoning_tokens": 3}}
SAID = chunk({"content": "Hello"})
STOPPED, CALLED, COUNTED = chunk({}, "stop"), chunk({}, "tool_calls"), chunk(usage=USAGE)
TEXT = [ROLE, chunk({"content": "Hel"}), chunk({"content": "lo"}), STOPPED]
CALLS = [ROLE, piece(0, "", **NEW), piece(0, '{"at":'), piece(0, "1}"),
         piece(1, "{}", id="call_2", type="function"), CALLED]
SEALED = {"type": "reasoning.encrypted", "data": "pmx1.x", "index": 0}
THOUGHT = [ROLE, chunk({"reasoning_content": "hm"}), chunk({"reasoning_details": [SEALED]}), SAID, STOPPED]
ERROR = {"error": {"message": "It broke.", "type": "server_error", "code": "server_error", "param": None}}
CUSTOM = {"index": 0, "id": "c", "type": "custom", "custom": {"name": "patch", "input": "*** Be"}}
PATCH = [ROLE, chunk({"tool_calls": [CUSTOM]}), chunk({"tool_calls": [{"index": 0, "custom": {"input": "gin"}}]}), CALLED]


def chat_bytes(told: list[Any]) -> bytes:
    return b"".join(each if isinstance(each, bytes) else b"data: " + text_of(each).encode() + b"\n\n" for each in told)


def text_of(event: Any) -> str:
    return event if isinstance(event, str) else json.dumps(event)


def changed(told: list[Any], change: Change) -> list[Any]:
    told = copy.deepcopy(told)
    change(told)
    return told


def drop(*indices: int) -> Change:
    return lambda told: [told.pop(n) for n in indices]


def put(at: int, *events: Any) -> Change:
    return lambda told: told.__setitem__(slice(at, at), events)


def fields(at: int, **new: Any) -> Change:
    return lambda told: told[at].update(new)


def delta(at: int, **new: Any) -> Change:
    return lambda told: told[at]["choices"][0]["delta"].update(new)


def call_fields(at: int, **new: Any) -> Change:
    return lambda told: told[at]["choices"][0]["delta"]["tool_calls"][0].update(new)


def function(at: int, **new: Any) -> Change:
    return lambda told: told[at]["choices"][0]["delta"]["tool_calls"][0]["function"].update(new)


def without(at: int, name: str) -> Change:
    return lambda told: told[at].pop(name)


# --- chat

GOOD_CHAT = {
    "text": (TEXT, ("stop", "Hello", "", [], [])),
    "calls": (CALLS, ("tool_calls", "", "", [("call_1", "look", '{"at":1}'), ("call_2", "look", "{}")], [])),
    "custom": (PATCH, ("tool_calls", "", "", [("c", "patch", "*** Begin")], [])),
    "reasoning": (THOUGHT, ("stop", "Hello", "hm", [], ["pmx1.x"])),
    "refusal": ([ROLE, chunk({"refusal": "No."}), chunk({}, "content_filter")], ("content_filter", "", "", [], [])),
    "cut": ([ROLE, SAID, chunk({}, "length")], ("length", "Hello", "", [], [])),
    "nothing": ([ROLE, STOPPED], ("stop", "", "", [], [])),
    "comments": ([b": ping\n\n", ROLE, b": ping\n\n", SAID, STOPPED, b":\n\n"], ("stop", "Hello", "", [], [])),
    "all at once": ([chunk({"role": "assistant", "content": "Hello"}, "stop")], ("stop", "Hello", "", [], [])),
}


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("told, wanted", GOOD_CHAT.values(), ids=GOOD_CHAT)
def test_a_good_chat_stream_passes(told: list[Any], wanted: Any, include_usage: bool) -> None:
    raw = chat_bytes([*told, *([COUNTED] if include_usage else []), "[DONE]"])
    got = check_chat_stream(raw, model=MODEL, include_usage=include_usage, tools=CHAT_TOOLS)
    end, text, reasoning, calls, signatures = wanted
    assert (got.ok, got.end, got.text, got.reasoning, got.signatures) == (True, end, text, reasoning, signatures)
    assert got.calls == [Call(*each) for each in calls]
    assert got.usage == (USAGE if include_usage else None)


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("told", [[], [ROLE], [ROLE, SAID], CALLS[:3]])
def test_a_chat_stream_that_fails_passes_and_is_not_ok(told: list[Any], include_usage: bool) -> None:
    got = check_chat_stream(chat_bytes([*told, ERROR]), model=MODEL, include_usage=include_usage)
    assert (got.ok, got.end, got.calls) == (False, "error", [])
    assert got.error == ERROR["error"]
    assert [call.arguments for call in got.partial] == (['{"at":'] if len(told) == 3 else [])


def test_a_call_that_a_limit_cut_is_partial() -> None:
    raw = chat_bytes([*CALLS[:3], chunk({}, "length"), "[DONE]"])
    got = check_chat_stream(raw, model=MODEL, include_usage=False, tools=CHAT_TOOLS)
    assert (got.end, got.calls, got.partial) == ("length", [], [Call("call_1", "look", '{"at":')])


USUAL = [*CALLS, COUNTED, "[DONE]"]         # 0 role, 1 to 4 pieces, 5 finish, 6 usage, 7 [DONE]
BAD_CHAT: dict[str, tuple[Change, str]] = {
    "another id": (fields(2, id="chatcmpl-2"), "the id changes"),
    "an empty id": (fields(0, id=""), "chunk.id"),
    "another object": (fields(1, object="chat.completion"), "object"),
    "another time": (fields(3, created=1), "time of creation"),
    "a time with a fraction": (fields(0, created=1.5), "created"),
    "another model": (fields(3, model="m"), "model"),
    "no model": (without(2, "model"), "model is missing"),
    "no choices": (without(2, "choices"), "choices is missing"),
    "choices of null": (fields(2, choices=None), "choices"),
    "an empty chunk": (fields(2, choices=[]), "without choices"),
    "two choices": (lambda told: told[2]["choices"].append(told[2]["choices"][0]), "two choices"),
    "index 1": (lambda told: told[2]["choices"][0].update(index=1), "index"),
    "no finish_reason": (lambda told: told[2]["choices"][0].pop("finish_reason"), "finish_reason is missing"),
    "an unknown finish": (lambda told: told[5]["choices"][0].update(finish_reason="end"), "finish_reason"),
    "stop with calls": (lambda told: told[5]["choices"][0].update(finish_reason="stop"), "stop with 2 calls"),
    "calls without calls": (drop(1, 1, 1, 1), "tool_calls with 0 calls"),
    "no role": (drop(0), "no role"),
    "another role": (delta(0, role="user"), "role"),
    "a second role": (delta(1, role="assistant"), "a second role"),
    "content that is no string": (delta(1, content=["x"]), "content"),
    "no calls in the list": (delta(1, tool_calls=[]), "an empty list of calls"),
    "no id": (lambda told: told[1]["choices"][0]["delta"]["tool_calls"][0].pop("id"), "id is missing"),
    "no type": (lambda told: told[1]["choices"][0]["delta"]["tool_calls"][0].pop("type"), "type is missing"),
    "no name": (function(1, name=""), "name"),
    "a tool of nobody": (function(1, name="hide"), "'hide', which is not offered"),
    "a function as custom": (function(1, name="patch"), "function call of 'patch'"),
    "the id again": (call_fields(2, id="call_1"), "later piece of call 0.id"),
    "the name again": (function(2, name="look"), "later piece of call 0.function.name"),
    "arguments of null": (function(2, arguments=None), "arguments"),
    "arguments that are an object": (function(1, arguments={}), "arguments"),
    "half the arguments": (drop(3), "not one JSON object"),
    "arguments twice": (function(3, arguments='1}{"at":1}'), "not one JSON object"),
    "arguments with NaN": (function(3, arguments="NaN}"), "not one JSON object"),
    "arguments that are a list": (function(4, arguments="[]"), "not one JSON object"),
    "one id for two": (call_fields(4, id="call_1"), "two calls with the id"),
    "a hole in the indices": (call_fields(4, index=2), "comes before the call 1"),
    "no finish": (drop(5), "before the finish_reason"),
    "neither finish nor usage": (drop(5, 5), "[DONE] without a finish_reason"),
    "two finishes": (put(6, CALLED), "a choice after the finish_reason"),
    "text after the finish": (put(6, SAID), "a choice after the finish_reason"),
    "no usage": (drop(6), "without the usage"),
    "two usages": (put(7, COUNTED), "two usages"),
    "usage before the finish": (put(5, COUNTED), "before the finish_reason"),
    "usage beside choices": (fields(5, usage=USAGE), "beside choices"),
    "a wrong sum": (fields(6, usage={**USAGE, "total_tokens": 14}), "total"),
    "a negative count": (fields(6, usage={**USAGE, "prompt_tokens": -1}), "prompt_tokens"),
    "a count as a float": (fields(6, usage={**USAGE, "prompt_tokens": 9.0}), "prompt_tokens"),
    "more cached than read": (fields(6, usage={**USAGE, "prompt_tokens_details": {"cached_tokens": 10}}), "more"),
    "no [DONE]": (drop(7), "cut"),
    "cut": (drop(5, 5, 5), "cut"),
    "nothing but a role": (drop(1, 1, 1, 1, 1, 1, 1), "cut"),
    "[DONE] twice": (put(8, "[DONE]"), "after the end"),
    "a chunk after [DONE]": (put(8, SAID), "after the end"),
    "a comment after [DONE]": (put(8, b": ping\n\n"), "something after the end"),
    "an error after the finish": (put(6, ERROR), "an error after the finish_reason"),
    "an error that is not the last": (put(2, ERROR), "after the end"),
    "a named event": (put(2, b"event: chunk\ndata: {}\n\n"), "a named event"),
    "two events in one": (put(2, b"data: {}\ndata: {}\n\n"), "no JSON"),
    "an id line": (put(2, b"id: 1\ndata: {}\n\n"), "neither event nor data"),
    "an event without data": (put(2, b"event: x\n\n"), "without data"),
    "an empty line too many": (put(2, b"\n"), "neither event nor data"),
    "no empty line at the end": (lambda told: told.__setitem__(7, b"data: [DONE]\n"), "inside an event"),
    "no JSON": (put(2, "{"), "no JSON"),
    "no object": (put(2, "[]"), "no object"),
    "a key twice": (put(2, '{"id":1,"id":1}'), "a key twice"),
    "NaN": (put(2, '{"id":NaN}'), "no JSON"),
    "half a character": (put(2, '{"id":"\\ud83d"}'), "surrogate"),
    "an annotation without its place": (delta(1, annotations=[{"type": "url_citation", "url_citation": {"url": "u"}}]), "annotations"),
    "an unknown kind of reasoning": (delta(1, reasoning_details=[{"type": "reasoning.new"}]), "reasoning_details"),
    "a seal of nothing": (delta(1, reasoning_details=[{**SEALED, "data": ""}]), "reasoning_details"),
}


def test_the_usual_chat_stream_is_right() -> None:
    check_chat_stream(chat_bytes(USUAL), model=MODEL, include_usage=True, tools=CHAT_TOOLS)


@pytest.mark.parametrize("change, complaint", BAD_CHAT.values(), ids=BAD_CHAT)
def test_a_fault_in_a_chat_stream_is_found(change: Change, complaint: str) -> None:
    with pytest.raises(Violation) as found:
        check_chat_stream(chat_bytes(changed(USUAL, change)), model=MODEL, include_usage=True, tools=CHAT_TOOLS)
    assert complaint in str(found.value)


@pytest.mark.parametrize("change, complaint", [
    (lambda told: None, "not asked for"), (drop(6), ""), (lambda told: told[6].update(usage=None), "without choices")])
def test_a_usage_that_nobody_asked_for_is_found(change: Change, complaint: str) -> None:
    raw = chat_bytes(changed(USUAL, change))
    if not complaint:
        assert check_chat_stream(raw, model=MODEL, include_usage=False).usage is None
        return
    with pytest.raises(Violation, match=complaint):
        check_chat_stream(raw, model=MODEL, include_usage=False)


@pytest.mark.parametrize("error, complaint", [
    ({"error": "It broke."}, "no object"), ({"error": {"message": "It broke."}}, "type is missing"),
    ({"error": {**ERROR["error"], "message": ""}}, "message"), ({"error": {**ERROR["error"], "code": 500}}, "code"),
    ({**ERROR, "choices": []}, "beside it")])
def test_an_error_in_another_form_is_found(error: JSON, complaint: str) -> None:
    with pytest.raises(Violation) as found:
        check_chat_stream(chat_bytes([ROLE, error]), model=MODEL, include_usage=False)
    assert complaint in str(found.value)


@pytest.mark.parametrize("change", [
    fields(3, created=1), delta(1, role="assistant"), call_fields(2, id="call_1"), function(2, name="look"),
    lambda told: told[2]["choices"][0].pop("finish_reason"), fields(6, usage={**USAGE, "total_tokens": 16})])
def test_habits_of_an_upstream_are_borne_where_its_bytes_pass(change: Change) -> None:
    raw = chat_bytes(changed(USUAL, change))
    got = check_chat_stream(raw, model=MODEL, include_usage=True, tools=CHAT_TOOLS, passed=True)
    assert [call.arguments for call in got.calls] == ['{"at":1}', "{}"]


FUNCTION_CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at":1}'}}
COMPLETION = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1_790_000_000, "model": MODEL, "usage": USAGE,
              "choices": [{"index": 0, "finish_reason": "tool_calls", "logprobs": None, "message": {
                  "role": "assistant", "content": None, "refusal": None, "reasoning_content": "hm",
                  "reasoning_details": [SEALED], "tool_calls": [FUNCTION_CALL]}}]}


def test_a_good_completion_passes() -> None:
    got = check_chat_completion(json.dumps(COMPLETION).encode(), model=MODEL, tools=CHAT_TOOLS)
    assert (got.end, got.reasoning, got.signatures, got.usage) == ("tool_calls", "hm", ["pmx1.x"], USAGE)
    assert got.calls == [Call("call_1", "look", '{"at":1}')]


def message(**new: Any) -> Change:
    return lambda told: told[0]["choices"][0]["message"].update(new)


BAD_COMPLETION: dict[str, tuple[Change, str]] = {
    "an error": (lambda told: told.__setitem__(0, ERROR), "choices is missing"),
    "a chunk": (fields(0, object="chat.completion.chunk"), "object"),
    "another model": (fields(0, model="m"), "model"),
    "no choice": (fields(0, choices=[]), "0 choices"),
    "two choices": (lambda told: told[0]["choices"].append(told[0]["choices"][0]), "2 choices"),
    "no usage": (without(0, "usage"), "usage is missing"),
    "a wrong sum": (fields(0, usage={**USAGE, "total_tokens": 1}), "total"),
    "a delta": (lambda told: told[0]["choices"][0].update(delta=told[0]["choices"][0].pop("message")), "message is missing"),
    "content that is missing": (lambda told: told[0]["choices"][0]["message"].pop("content"), "content is missing"),
    "calls of null": (message(tool_calls=None), "tool_calls"),
    "no calls": (message(tool_calls=[]), "an empty list"),
    "calls that are not there": (lambda told: told[0]["choices"][0]["message"].pop("tool_calls"), "with 0 calls"),
    "half a call": (message(tool_calls=[{**FUNCTION_CALL, "function": {"name": "look", "arguments": "{"}}]), "JSON object"),
    "a call without an id": (message(tool_calls=[{**FUNCTION_CALL, "id": ""}]), "id"),
    "no finish": (lambda told: told[0]["choices"][0].update(finish_reason=None), "finish_reason"),
    "another finish": (lambda told: told[0]["choices"][0].update(finish_reason="stop"), "stop with 1 calls"),
}


@pytest.mark.parametrize("change, complaint", BAD_COMPLETION.values(), ids=BAD_COMPLETION)
def test_a_fault_in_a_completion_is_found(change: Change, complaint: str) -> None:
    with pytest.raises(Violation) as found:
        check_chat_completion(changed([COMPLETION], change)[0], model=MODEL, tools=CHAT_TOOLS)
    assert complaint in str(found.value)


# --- messages

COUNTS = {"input_tokens": 9, "output_tokens": 1}
START = {"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant", "model": MODEL,
         "content": [], "stop_reason": None, "stop_sequence": None, "usage": COUNTS}}
PING, STOP = {"type": "ping"}, {"type": "message_stop"}
BROKEN = {"type": "error", "error": {"type": "api_error", "message": "It broke."}}


def opened(index: int, kind: str, **given: Any) -> JSON:
    return {"type": "content_block_start", "index": index, "content_block": {"type": kind, **given}}


def adds(index: int, kind: str, **given: Any) -> JSON:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **given}}


def closed(index: int) -> JSON:
    return {"type": "content_block_stop", "index": index}


def ended(reason: str, sequence: str | None = None, output_tokens: int = 4, **counts: Any) -> JSON:
    return {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": {"output_tokens": output_tokens, **counts}}


def block(index: int, text: str) -> list[JSON]:
    return [opened(index, "text", text=""), adds(index, "text_delta", text=text), closed(index)]


def used(index: int, call_id: str, *pieces: str, name: str = "look") -> list[JSON]:
    told = [adds(index, "input_json_delta", partial_json=each) for each in pieces]
    return [opened(index, "tool_use", id=call_id, name=name, input={}), *told, closed(index)]


def messages_bytes(told: list[Any]) -> bytes:
    return b"".join(each if isinstance(each, bytes) else f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode()
                    for each in told)


MUSED = [opened(0, "thinking", thinking="", signature=""), adds(0, "thinking_delta", thinking="hm"),
         adds(0, "signature_delta", signature="sig"), closed(0)]
HIDDEN = [opened(0, "redacted_thinking", data="secret"), closed(0)]
SEARCHED = [opened(0, "server_tool_use", id="srvtoolu_1", name="web_search", input={}),
            adds(0, "input_json_delta", partial_json='{"query":"x"}'), closed(0),
            opened(1, "web_search_tool_result", tool_use_id="srvtoolu_1", content=[]), closed(1)]
GOOD_MESSAGES = {
    "text": ([*block(0, "Hello"), ended("end_turn")], ("end_turn", "Hello", "", [], [])),
    "calls": ([*block(0, "I look."), *used(1, "toolu_1", "", '{"at":', "1}"), *used(2, "toolu_2", name="find"), ended("tool_use")],
              ("tool_use", "I look.", "", [("toolu_1", "look", '{"at":1}'), ("toolu_2", "find", "{}")], [])),
    "thinking": ([*MUSED, PING, *block(1, "Hello"), ended("end_turn")], ("end_turn", "Hello", "hm", [], ["sig"])),
    "thinking unseen": ([MUSED[0], *MUSED[2:], ended("end_turn")], ("end_turn", "", "", [], ["sig"])),
    "redacted": ([*HIDDEN, *block(1, "Hello"), ended("end_turn")], ("end_turn", "Hello", "", [], ["secret"])),
    "search": ([*SEARCHED, *block(2, "Found."), ended("end_turn")], ("end_turn", "Found.", "", [], [])),
    "nothing": ([ended("end_turn")], ("end_turn", "", "", [], [])),
    "cut": ([*block(0, "Hel"), ended("max_tokens")], ("max_tokens", "Hel", "", [], [])),
    "a stop sequence": ([*block(0, "Hel"), ended("stop_sequence", "lo")], ("stop_sequence", "Hel", "", [], [])),
    "a refusal": ([*used(0, "toolu_1", "{}"), ended("refusal")], ("refusal", "", "", [("toolu_1", "look", "{}")], [])),
}


@pytest.mark.parametrize("told, wanted", GOOD_MESSAGES.values(), ids=GOOD_MESSAGES)
def test_a_good_messages_stream_passes(told: list[Any], wanted: Any) -> None:
    got = check_messages_stream(messages_bytes([START, PING, *told, STOP]), model=MODEL, tools=TOOLS)
    end, text, reasoning, calls, signatures = wanted
    assert (got.ok, got.end, got.text, got.reasoning, got.signatures) == (True, end, text, reasoning, signatures)
    assert got.calls == [Call(*each) for each in calls]
    assert got.usage == {"input_tokens": 9, "output_tokens": 4}


@pytest.mark.parametrize("told", [[], [START], [START, *block(0, "Hi")], [START, *block(0, "Hi")[:2]], [PING],
                                  [START, *used(0, "toolu_1", "{}"), *used(1, "toolu_2", '{"a')[:2]]])
def test_a_messages_stream_that_fails_passes_and_is_not_ok(told: list[Any]) -> None:
    got = check_messages_stream(messages_bytes([*told, BROKEN]), model=MODEL, tools=TOOLS)
    assert (got.ok, got.end, got.calls, got.error) == (False, "error", [], BROKEN["error"])
    assert got.text == ("Hi" if told[1:2] == [opened(0, "text", text="")] else "")
    assert [call.arguments for call in got.partial] == (["{}", '{"a'] if len(told) == 6 else [])


def test_an_input_that_a_limit_cut_is_partial() -> None:
    raw = messages_bytes([START, *used(0, "toolu_1", "{}"), *used(1, "toolu_2", '{"a'), ended("max_tokens"), STOP])
    got = check_messages_stream(raw, model=MODEL, tools=TOOLS)
    assert (got.calls, got.partial) == ([Call("toolu_1", "look", "{}")], [Call("toolu_2", "look", '{"a')])


# 0 start, 1 to 4 thinking, 5 to 7 text, 8 to 11 a call, 12 the stop_reason, 13 message_stop
EVENTS = [START, *MUSED, *block(1, "Hello"), *used(2, "toolu_1", '{"at":', "1}"), ended("tool_use", input_tokens=9), STOP]


def inner(at: int, within: str, /, **new: Any) -> Change:
    return lambda told: told[at][within].update(new)


BAD_MESSAGES: dict[str, tuple[Change, str]] = {
    "no start": (drop(0), "where message_start belongs"),
    "two starts": (put(1, START), "or twice"),
    "a foreign id": (inner(0, "message", id="resp_1"), "id"),
    "another model": (inner(0, "message", model="m"), "model"),
    "another role": (inner(0, "message", role="user"), "role"),
    "content at the start": (inner(0, "message", content=[{"type": "text", "text": "x"}]), "with content"),
    "a stop_reason at the start": (inner(0, "message", stop_reason="end_turn"), "stop_reason"),
    "no stop_sequence at the start": (lambda told: told[0]["message"].pop("stop_sequence"), "stop_sequence is missing"),
    "no usage at the start": (lambda told: told[0]["message"].pop("usage"), "usage is missing"),
    "no input_tokens": (inner(0, "message", usage={"output_tokens": 1}), "input_tokens is missing"),
    "input_tokens of null": (inner(0, "message", usage={**COUNTS, "input_tokens": None}), "input_tokens"),
    "an index left out": (lambda told: [e.update(index=3) for e in told[8:12]], "index"),
    "an index again": (lambda told: [e.update(index=0) for e in told[5:8]], "index"),
    "a delta of another block": (fields(6, index=0), "index"),
    "the stop of another block": (fields(7, index=0), "index"),
    "a delta outside of a block": (drop(5), "outside of a block"),
    "a block inside another": (drop(7), "a block inside another"),
    "a block that never stops": (drop(11), "inside a block"),
    "a stop too many": (put(8, closed(1)), "outside of a block"),
    "an unknown block": (inner(5, "content_block", type="new"), "type"),
    "text at the start": (inner(5, "content_block", text="Hel"), "text"),
    "no text at the start": (lambda told: told[5]["content_block"].pop("text"), "text is missing"),
    "no signature at the start": (lambda told: told[1]["content_block"].pop("signature"), "signature is missing"),
    "no signature": (drop(3), "without a signature"),
    "an empty signature": (inner(3, "delta", signature=""), "signature"),
    "a thought after its signature": (put(4, adds(0, "thinking_delta", thinking="x")), "after the signature"),
    "a second signature": (put(4, adds(0, "signature_delta", signature="x")), "after the signature"),
    "a thought inside a text": (put(6, adds(1, "thinking_delta", thinking="x")), "delta of text"),
    "text inside a call": (put(9, adds(2, "text_delta", text="x")), "delta of tool_use"),
    "an input at the start": (inner(8, "content_block", input={"at": 1}), "input at the start"),
    "an input that is text": (inner(8, "content_block", input=""), "input"),
    "no id": (inner(8, "content_block", id=""), "id"),
    "an id that Anthropic refuses": (inner(8, "content_block", id="call.1"), "id"),
    "no name": (lambda told: told[8]["content_block"].pop("name"), "name is missing"),
    "a tool of nobody": (inner(8, "content_block", name="hide"), "'hide', which is not offered"),
    "half the input": (drop(10), "not one JSON object"),
    "the input twice": (inner(10, "delta", partial_json='1}{"at":1}'), "not one JSON object"),
    "an input that is a list": (
        lambda told: told.__setitem__(slice(9, 11), [adds(2, "input_json_delta", partial_json="[]")]), "not one JSON object"),
    "one id for two": (put(12, *used(3, "toolu_1")), "two calls with the id"),
    "no stop_reason": (drop(12), "without a stop_reason"),
    "a stop_reason of null": (lambda told: told[12]["delta"].update(stop_reason=None), "stop_reason"),
    "an unknown stop_reason": (lambda told: told[12]["delta"].update(stop_reason="stop"), "stop_reason"),
    "end_turn with a call": (lambda told: told[12]["delta"].update(stop_reason="end_turn"), "end_turn with 1"),
    "tool_use without a call": (drop(8, 8, 8, 8), "tool_use with 0"),
    "a sequence without its reason": (lambda told: told[12]["delta"].update(stop_sequence="x"), "tool_use with 'x'"),
    "no stop_sequence": (lambda told: told[12]["delta"].pop("stop_sequence"), "stop_sequence is missing"),
    "two stop_reasons": (put(13, ended("tool_use")), "after the stop_reason"),
    "a block after the stop_reason": (put(13, *block(3, "x")), "after the stop_reason"),
    "no usage at the end": (without(12, "usage"), "usage is missing"),
    "no output_tokens": (fields(12, usage={"input_tokens": 1}), "output_tokens is missing"),
    "fewer output_tokens": (fields(12, usage={"output_tokens": 0}), "not cumulative"),
    "input_tokens that are text": (fields(12, usage={"output_tokens": 4, "input_tokens": "9"}), "input_tokens"),
    "no message_stop": (drop(13), "cut"),
    "cut in a block": (drop(*[10] * 4), "cut"),
    "cut between blocks": (drop(*[8] * 6), "cut"),
    "nothing but pings": (lambda told: told.__setitem__(slice(0, None), [PING]), "cut"),
    "two message_stops": (put(14, STOP), "after the end"),
    "a ping after the end": (put(14, PING), "after the end"),
    "an error after the stop_reason": (put(13, BROKEN), "after the stop_reason"),
    "an error after the end": (put(14, BROKEN), "after the end"),
    "an error that is not the last": (put(8, BROKEN), "after the end"),
    "a message_stop that says more": (fields(13, usage={}), "more to say"),
    "[DONE]": (put(14, b"data: [DONE]\n\n"), "no JSON"),
    "an event without a name": (put(8, b'data: {"type":"ping"}\n\n'), "has the type"),
    "another name": (put(8, b'event: pong\ndata: {"type":"ping"}\n\n'), "has the type"),
    "an unknown event": (put(8, {"type": "message_pause"}), "nobody knows"),
    "no type": (put(8, b"event: ping\ndata: {}\n\n"), "type is missing"),
}


def test_the_usual_messages_stream_is_right() -> None:
    check_messages_stream(messages_bytes(EVENTS), model=MODEL, tools=TOOLS)


@pytest.mark.parametrize("change, complaint", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_fault_in_a_messages_stream_is_found(change: Change, complaint: str) -> None:
    with pytest.raises(Violation) as found:
        check_messages_stream(messages_bytes(changed(EVENTS, change)), model=MODEL, tools=TOOLS)
    assert complaint in str(found.value)


@pytest.mark.parametrize("new, complaint", [
    ({"error": "It broke."}, "no object"), ({"error": {"type": "server_error", "message": "x"}}, "type"),
    ({"error": {"type": "api_error", "message": ""}}, "message"), ({"error": {"type": "api_error"}}, "message is missing")])
def test_an_error_event_in_another_form_is_found(new: JSON, complaint: str) -> None:
    with pytest.raises(Violation) as found:
        check_messages_stream(messages_bytes([START, {**BROKEN, **new}]), model=MODEL)
    assert complaint in str(found.value)


def test_blocks_of_the_future_are_borne_where_an_upstreams_bytes_pass() -> None:
    told = [START, {"type": "new"}, opened(0, "new", x=1), adds(0, "new_delta", x=1), closed(0), ended("end_turn"), STOP]
    assert check_messages_stream(messages_bytes(told), model=MODEL, passed=True).content == [{"type": "new", "x": 1}]
    with pytest.raises(Violation):
        check_messages_stream(messages_bytes(told), model=MODEL)


WHOLE = {"id": "msg_1", "type": "message", "role": "assistant", "model": MODEL, "stop_reason": "tool_use", "stop_sequence": None,
         "usage": COUNTS, "content": [{"type": "thinking", "thinking": "hm", "signature": "sig"}, {"type": "text", "text": "I look."},
                                      {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "✓"}}]}


def test_a_good_message_passes() -> None:
    got = check_message(json.dumps(WHOLE).encode(), model=MODEL, tools=TOOLS)
    assert (got.end, got.text, got.reasoning, got.signatures) == ("tool_use", "I look.", "hm", ["sig"])
    assert got.calls == [Call("toolu_1", "look", '{"at": "✓"}')]


def content(at: int, **new: Any) -> Change:
    return lambda told: told[0]["content"][at].update(new)


BAD_MESSAGE: dict[str, tuple[Change, str]] = {
    "an error": (lambda told: told.__setitem__(0, BROKEN), "id is missing"),
    "another model": (fields(0, model="m"), "model"),
    "no content": (fields(0, content=None), "content"),
    "no stop_reason": (fields(0, stop_reason=None), "stop_reason"),
    "another stop_reason": (fields(0, stop_reason="end_turn"), "end_turn with 1"),
    "a sequence": (fields(0, stop_sequence="x"), "tool_use with 'x'"),
    "an unknown block": (content(1, type="new"), "type"),
    "no signature": (content(0, signature=""), "signature"),
    "an empty text": (content(1, text=""), "text"),
    "an input as text": (content(2, input='{"at":1}'), "input"),
    "a tool of nobody": (content(2, name="hide"), "not offered"),
    "no usage": (without(0, "usage"), "usage is missing"),
    "half a usage": (fields(0, usage={"output_tokens": 1}), "input_tokens is missing"),
}


@pytest.mark.parametrize("change, complaint", BAD_MESSAGE.values(), ids=BAD_MESSAGE)
def test_a_fault_in_a_message_is_found(change: Change, complaint: str) -> None:
    with pytest.raises(Violation) as found:
        check_message(changed([WHOLE], change)[0], model=MODEL, tools=TOOLS)
    assert complaint in str(found.value)
