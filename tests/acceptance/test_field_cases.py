"""Streams of imperfect servers, as their users report them, under real Codex: the command runs, and runs once."""
from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from harness import JSON, Codex
from scripted import Raw, Script, says

COMMAND = "echo ran >> marker.txt"
ARGUMENTS = json.dumps({"cmd": COMMAND}, separators=(",", ":"))


def sse(events: Iterable[JSON | str]) -> bytes:
    return "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events).encode()


# --- the responses wire: `native` passes its bytes on, `foreign` makes it anew

THOUGHT = {"id": "rs_1", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
SAID = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "I look.", "annotations": []}]}
CALL = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "exec_command", "arguments": ARGUMENTS,
        "status": "completed"}
BEGUN = {**CALL, "arguments": "", "status": "in_progress"}
EMPTY = {**CALL, "arguments": ""}


def added(item: JSON, at: int = 0) -> JSON:
    return {"type": "response.output_item.added", "output_index": at, "item": item}


def done(item: JSON, at: int = 0) -> JSON:
    return {"type": "response.output_item.done", "output_index": at, "item": item}


def arguments(kind: str, **fields: Any) -> JSON:
    return {"type": f"response.function_call_arguments.{kind}", "output_index": 0, "item_id": "fc_1", **fields}


def responses(*events: JSON, output: Iterable[JSON] = ()) -> bytes:
    head = {"id": "resp_up", "object": "response", "created_at": 1_790_000_000, "model": "m"}
    usage = {"input_tokens": 50, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 9,
             "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 59}
    first = {"type": "response.created", "response": {**head, "status": "in_progress", "output": []}}
    last = {"type": "response.completed", "response": {**head, "status": "completed", "output": list(output), "usage": usage}}
    return sse([first, *events, last])


RESPONSES = {
    "index-reused": responses(added(THOUGHT), done(THOUGHT), added(BEGUN), arguments("delta", delta=ARGUMENTS), done(CALL),
                              output=[THOUGHT, CALL]),
    "arguments-in-done-alone": responses(added(BEGUN), arguments("done", arguments=ARGUMENTS), done(EMPTY), output=[EMPTY]),
    "arguments-in-the-end-alone": responses(added(BEGUN), arguments("done", arguments=""), done(EMPTY), output=[CALL]),
    "call-in-the-end-alone": responses(added({**SAID, "content": []}), done(SAID), output=[SAID, CALL]),
    "done-twice": responses(added(BEGUN), done(CALL), done(CALL), output=[CALL]),
    "another-id-in-done-and-end": responses(added(BEGUN), done({**CALL, "id": "fc_8"}), output=[{**CALL, "id": "fc_9"}]),
    "an-object": responses(added(BEGUN), done({**CALL, "arguments": {"cmd": COMMAND}}), output=[]),
}


@pytest.mark.parametrize("wire", ["native", "foreign"])
@pytest.mark.parametrize("payload", RESPONSES.values(), ids=RESPONSES)
def test_a_command_of_the_responses_wire_runs_once(codex: Codex, script: Script, payload: bytes) -> None:
    runs_once(codex, script, payload)


# --- the chat wire

def chunk(finish: str | None = None, **fields: Any) -> JSON:
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_790_000_000, "model": "m",
            "choices": [{"index": 0, "finish_reason": finish, **fields}]}


def calls(text: str, finish: str | None = None, **fields: Any) -> JSON:
    call = {"index": 0, "function": {"arguments": text, **({"name": "exec_command"} if fields else {})}, **fields}
    return chunk(finish, delta={"tool_calls": [call]})


NAMED = {"id": "call_a", "type": "function"}
WHOLE = {"id": "call_a", "type": "function", "function": {"name": "exec_command", "arguments": ARGUMENTS}}
ENDED = [chunk("tool_calls", delta={}), "[DONE]"]
CHAT = {
    "whole-message-at-the-end": [calls("", **NAMED), calls(ARGUMENTS), chunk("tool_calls", message={
        "role": "assistant", "content": "", "tool_calls": [WHOLE]}), "[DONE]"],
    "arguments-told-again": [calls("", **NAMED), calls(ARGUMENTS[:8]), calls(ARGUMENTS[8:]),
                             calls(ARGUMENTS, "tool_calls", **NAMED), "[DONE]"],
    "arguments-told-again-without-an-id": [calls("", **NAMED), calls(ARGUMENTS[:8]), calls(ARGUMENTS[8:]),
                                           calls(ARGUMENTS, "tool_calls", type="function"), "[DONE]"],
    "each-piece-from-the-beginning": [calls("", **NAMED), *(calls(ARGUMENTS[:end]) for end in (8, 16, len(ARGUMENTS))), *ENDED],
    "a-placeholder-first": [calls("{}", **NAMED), calls(ARGUMENTS), *ENDED],
}


@pytest.mark.parametrize("wire", ["chat"])
@pytest.mark.parametrize("events", CHAT.values(), ids=CHAT)
def test_a_command_of_the_chat_wire_runs_once(codex: Codex, script: Script, events: list[JSON | str]) -> None:
    runs_once(codex, script, sse(events))


def runs_once(codex: Codex, script: Script, payload: bytes) -> None:
    script.play(Raw(payload), says("Done."))
    turn = codex.exec("Leave a mark")
    assert turn.answer == "Done."
    assert (codex.work / "marker.txt").read_text() == "ran\n"
    script.played_out(requests=2)
