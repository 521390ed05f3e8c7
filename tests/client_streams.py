"""Strict readers of what Chat Completions and Messages clients get: every rule of one answer in one place.

They know the two APIs, as their SDKs' types and clients read them, and nothing of the program. `check_*` raises a
Violation, which names the event, or returns what a client has of the answer: a Result. `passed`: the upstream speaks
the client's API and its bytes pass, so that habits of its own, which clients bear, are no faults.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

JSON = dict[str, Any]


class Violation(AssertionError):
    """The answer breaks a rule of its API."""


class Call(NamedTuple):
    id: str
    name: str
    arguments: str      # JSON text; a custom tool's input as it is


@dataclass
class Result:
    """What a client has in hand at the end of an answer."""
    end: str = ""               # finish_reason or stop_reason, or "error"
    text: str = ""
    refusal: str = ""
    reasoning: str = ""
    signatures: list[str] = field(default_factory=list)     # what a later turn sends back with the reasoning
    calls: list[Call] = field(default_factory=list)
    partial: list[Call] = field(default_factory=list)       # calls that a limit or a failure cut
    usage: JSON | None = None
    error: JSON | None = None
    content: list[JSON] = field(default_factory=list)       # Messages: the blocks; Chat: the reasoning_details
    ids: set[str] = field(default_factory=set)              # of the chunks, or of the message

    @property
    def ok(self) -> bool:
        return self.error is None


# --- shapes of JSON ---------------------------------------------------------------------------------
# A type, a constant, a pattern of a string, a tuple of alternatives, [shape of each], or {field: shape}, where a "?"
# at its end marks a field that may be absent. Fields without a shape are not looked at. An int is never negative.

SOME = re.compile(".+", re.DOTALL)


def need(condition: object, complaint: str) -> None:
    if not condition:
        raise Violation(complaint)


def fits(value: Any, shape: Any) -> str:
    """What is wrong with it, as "path: complaint", or ""."""
    if isinstance(shape, tuple):
        found = [fits(value, each) for each in shape]
        return "" if "" in found else max(found, key=len)
    if isinstance(shape, dict):
        return "; ".join(misfits(value, shape)) if isinstance(value, dict) else f": no object but {value!r}"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f": no list but {value!r}"
        return "; ".join(f"[{n}]{fault}" for n, each in enumerate(value) if (fault := fits(each, shape[0])))
    if isinstance(shape, re.Pattern):
        right = isinstance(value, str) and shape.fullmatch(value)
    elif isinstance(shape, type):
        right = type(value) is shape and not (shape is int and value < 0)
    else:
        right = type(value) is type(shape) and value == shape
    return "" if right else f": {value!r} is not {getattr(shape, '__name__', shape)!r}"


def misfits(value: JSON, shape: JSON) -> Iterator[str]:
    for given, inner in shape.items():
        name = given.removesuffix("?")
        if name in value:
            fault = fits(value[name], inner)
            if fault:
                yield f".{name}{fault}"
        elif name == given:
            yield f".{name} is missing"


def check_shape(value: Any, shape: Any, what: str) -> None:
    fault = fits(value, shape)
    need(not fault, f"{what}{fault}")


def one_of(*values: str) -> re.Pattern[str]:
    return re.compile("|".join(values))


# --- JSON and SSE, strictly -------------------------------------------------------------------------

def unique(pairs: list[tuple[str, Any]]) -> JSON:
    need(len(dict(pairs)) == len(pairs), f"a key twice in {[name for name, _ in pairs]}")
    return dict(pairs)


def no_constant(name: str) -> Any:
    raise Violation(f"{name} is no JSON")


def strict_json(text: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Violation("half a surrogate pair") from None
    except ValueError as error:
        raise Violation(f"no JSON: {error}: {text[:80]!r}") from None
    return value


def is_object(text: str) -> bool:
    try:
        return isinstance(strict_json(text), dict)
    except Violation:
        return False


class Frame(NamedTuple):
    event: str      # "" if it has no name
    data: str


def frames(raw: bytes) -> list[Frame]:
    """The events of a body. Comments may stand before any of them, but not after the last one."""
    text = raw.decode("utf-8")          # an error of its own
    text = text.replace("\r\n", "\n")
    need("\r" not in text, "a CR alone")
    need(text.endswith("\n\n"), f"the body ends inside an event: {text[-60:]!r}")
    found: list[Frame | None] = [read_frame(block) for block in text[:-2].split("\n\n")]
    need(found[-1] is not None, "something after the end")
    return [frame for frame in found if frame is not None]


def read_frame(block: str) -> Frame | None:
    """One event, or None for a comment."""
    lines = [line for line in block.split("\n") if not line.startswith(":")]
    if not lines and block:
        return None
    fields: dict[str, list[str]] = {"event": [], "data": []}
    for line in lines:
        name, colon, value = line.partition(":")
        need(colon and name in fields, f"an SSE line that is neither event nor data: {line[:80]!r}")
        fields[name].append(value.removeprefix(" "))
    need(fields["data"], f"an event without data: {block[:80]!r}")
    need(len(fields["event"]) <= 1, "two names of one event")
    return Frame("".join(fields["event"]), "\n".join(fields["data"]))


# --- what both APIs have ----------------------------------------------------------------------------

def tool_kinds(tools: Iterable[JSON] | None) -> dict[str, str] | None:
    """The offered tools of either API, name to type; None if the caller does not say."""
    if tools is None:
        return None
    kinds = {}
    for tool in tools:
        kind = "custom" if "custom" in tool else "function"     # Anthropic's type "custom" is a function
        inner = tool.get(kind, tool)
        if "name" in inner:
            kinds[inner["name"]] = kind
    return kinds


def sort_calls(result: Result, calls: list[tuple[str, Call]], offered: dict[str, str] | None, may_be_cut: bool) -> None:
    """Whole calls and those that were cut, from (type, call); the arguments of a custom tool are text."""
    for kind, call in calls:
        need(offered is None or offered.get(call.name) == kind, f"a {kind} call of {call.name!r}, which is not offered as such")
        need(call.id not in [other.id for other in result.calls + result.partial], f"two calls with the id {call.id!r}")
        whole = kind == "custom" or is_object(call.arguments)
        need(whole or may_be_cut, f"the arguments of {call.name} are not one JSON object: {call.arguments!r}")
        (result.calls if whole else result.partial).append(call)


# --- Chat Completions -------------------------------------------------------------------------------

COUNTS = (None, {name + "?": (None, int) for name in (
    "cached_tokens", "audio_tokens", "cache_write_tokens", "reasoning_tokens",
    "accepted_prediction_tokens", "rejected_prediction_tokens")})
COMPLETION_USAGE = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int,
                    "prompt_tokens_details?": COUNTS, "completion_tokens_details?": COUNTS}
HEAD = {"id": SOME, "created": int, "model": str, "choices": [{"index": 0}], "usage?": (None, COMPLETION_USAGE),
        "system_fingerprint?": (None, str), "service_tier?": (None, str)}
FINISH = one_of("stop", "length", "tool_calls", "content_filter")
CUT_FINISH = ("length", "content_filter")
LOGPROB = {"token": str, "logprob": float, "bytes": (None, [int]), "top_logprobs": list}
LOGPROBS = (None, {"content?": (None, [LOGPROB]), "refusal?": (None, [LOGPROB])})
REASONING_DETAIL = (
    {"type": "reasoning.text", "text?": (None, str), "signature?": (None, str), "index?": int, "id?": (None, str)},
    {"type": "reasoning.summary", "summary": str, "index?": int, "id?": (None, str)},
    {"type": "reasoning.encrypted", "data": SOME, "index?": int, "id?": (None, str)},
)
URL_CITATION = {"type": "url_citation", "url_citation": {"url": str, "title": str, "start_index": int, "end_index": int}}
DELTA = {"role?": "assistant", "content?": (None, str), "refusal?": (None, str), "reasoning_content?": (None, str),
         "reasoning_details?": [REASONING_DETAIL], "annotations?": [URL_CITATION],
         "tool_calls?": [{"index": int}]}
MESSAGE = {**DELTA, "role": "assistant", "content": (None, str), "refusal": (None, str), "tool_calls?": [(
    {"id": SOME, "type": "function", "function": {"name": SOME, "arguments": str}},
    {"id": SOME, "type": "custom", "custom": {"name": SOME, "input": str}})]}
TOOL_TEXT = {"function": "arguments", "custom": "input"}
CHAT_ERROR = {"error": {"message": SOME, "type": SOME, "code": (None, SOME), "param": (None, SOME)}}


class ChatReader:
    """The chunks of one answer, one after the other."""

    def __init__(self, model: str, include_usage: bool, tools: Iterable[JSON] | None, passed: bool) -> None:
        self.model, self.include_usage, self.offered, self.passed = model, include_usage, tool_kinds(tools), passed
        self.result = Result()
        self.started = False
        self.created: set[int] = set()
        self.calls: list[tuple[str, Call]] = []         # (type, call), by index
        self.done = False

    def take(self, frame: Frame) -> None:
        need(not self.done and self.result.error is None, "an event after the end")
        need(not frame.event, f"a named event: {frame.event}")
        if frame.data == "[DONE]":
            need(self.result.end, "[DONE] without a finish_reason")
            need(self.result.usage is not None or not self.include_usage, "[DONE] without the usage that was asked for")
            self.done = True
            return
        chunk = strict_json(frame.data)
        if isinstance(chunk, dict) and "error" in chunk:
            check_shape(chunk, CHAT_ERROR, "error")
            need(set(chunk) == {"error"}, "an error with something beside it")
            need(not self.result.end, "an error after the finish_reason")
            self.result.error = chunk["error"]
            self.result.end = "error"
            self.result.partial = [call for _, call in self.calls]
        else:
            self.chunk(chunk)

    def chunk(self, chunk: Any) -> None:
        check_shape(chunk, {**HEAD, "object": "chat.completion.chunk", "model": self.model}, "chunk")
        self.result.ids.add(chunk["id"])
        self.created.add(chunk["created"])
        need(len(self.result.ids) == 1, f"the id changes: {sorted(self.result.ids)}")
        need(len(self.created) == 1 or self.passed, "the time of creation changes")
        usage = chunk.get("usage")
        beside = self.passed and chunk["choices"]       # some always send it with the finish_reason
        need(usage is None or self.include_usage or beside, "a usage that was not asked for")
        need(len(chunk["choices"]) <= 1, "two choices")
        if chunk["choices"]:
            need(usage is None or self.passed, "a usage beside choices")
            need(not self.result.end, "a choice after the finish_reason")
            self.choice(chunk["choices"][0])
        need(usage is not None or chunk["choices"] or self.passed, "a chunk without choices and without usage")
        if usage is not None:
            need(self.result.end or self.passed, "the usage comes before the finish_reason")
            need(self.result.usage is None or self.passed, "two usages")
            check_completion_usage(usage, self.passed)
            self.result.usage = usage

    def choice(self, choice: JSON) -> None:
        choice = {"finish_reason": None, **choice} if self.passed else choice
        check_shape(choice, {"delta": DELTA, "finish_reason": (None, FINISH), "logprobs?": LOGPROBS}, "choice")
        delta, result = choice["delta"], self.result
        need("role" in delta or self.started, "the first delta has no role")
        need("role" not in delta or not self.started or self.passed, "a second role")
        self.started = True
        take_texts(result, delta)
        need(delta.get("tool_calls", True), "an empty list of calls")
        for piece in delta.get("tool_calls", []):
            self.piece(piece)
        if choice["finish_reason"] is not None:
            result.end = choice["finish_reason"]
            sort_calls(result, self.calls, self.offered, result.end in CUT_FINISH)
            check_finish(result, len(self.calls))

    def piece(self, piece: JSON) -> None:
        """SDKs put pieces together by concatenating every string: an id that came again would be doubled."""
        index = piece["index"]
        need(index <= len(self.calls), f"the call {index} comes before the call {len(self.calls)}")
        if index == len(self.calls):
            check_shape(piece, {"id": SOME, "type": one_of(*TOOL_TEXT)}, f"first piece of call {index}")
            kind = piece["type"]
            text = TOOL_TEXT[kind]
            check_shape(piece, {kind: {"name": SOME, text: str}}, f"first piece of call {index}")
            self.calls.append((kind, Call(piece["id"], piece[kind]["name"], piece[kind][text])))
            return
        kind, call = self.calls[index]
        again = (None, "", call.id), (None, "", kind), (None, "", call.name)
        identity, type_again, name_again = again if self.passed else (None, None, None)
        check_shape(piece, {"id?": identity, "type?": type_again, kind: {"name?": name_again, TOOL_TEXT[kind]: str}},
                    f"later piece of call {index}")
        self.calls[index] = kind, call._replace(arguments=call.arguments + piece[kind][TOOL_TEXT[kind]])

    def finish(self) -> Result:
        need(self.done or self.result.error is not None, "neither [DONE] nor an error: cut")
        return self.result


def take_texts(result: Result, said: JSON) -> None:
    """Adds the texts and the reasoning of a delta or of a message."""
    result.text += said.get("content") or ""
    result.refusal += said.get("refusal") or ""
    result.reasoning += said.get("reasoning_content") or ""
    for detail in said.get("reasoning_details", []):
        result.content.append(detail)
        result.signatures += [detail[name] for name in ("data", "signature") if detail.get(name)]


def check_finish(result: Result, calls: int) -> None:
    need(result.end in CUT_FINISH or (result.end == "tool_calls") == bool(calls), f"{result.end} with {calls} calls")


def check_completion_usage(usage: JSON, passed: bool = False) -> None:
    check_shape(usage, COMPLETION_USAGE, "usage")
    if passed:
        return              # some count reasoning apart
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    need(usage["total_tokens"] == total, f"the total of {usage} is not {total}")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    need(cached <= usage["prompt_tokens"] and reasoning <= usage["completion_tokens"], f"a part that is more: {usage}")


def check_chat_stream(data: bytes, *, model: str, include_usage: bool,
                      tools: Iterable[JSON] | None = None, passed: bool = False) -> Result:
    """All rules of a stream of chat.completion.chunk. `tools`: those of the request, if calls are to be judged."""
    return read_all(ChatReader(model, include_usage, tools, passed), data)


def check_chat_completion(body: Any, *, model: str | None = None, tools: Iterable[JSON] | None = None,
                          passed: bool = False) -> Result:
    """All rules of an answer that is not streamed: a chat.completion as JSON, decoded or as bytes."""
    body = strict_json(body.decode()) if isinstance(body, bytes) else body
    check_shape(body, {**HEAD, "object": "chat.completion", "model": model or str, "usage": COMPLETION_USAGE}, "body")
    need(len(body["choices"]) == 1, f"{len(body['choices'])} choices")
    choice = body["choices"][0]
    if passed and "message" in choice:
        said = {name: value for name, value in choice["message"].items() if (name, value) != ("tool_calls", None)}
        choice = {"logprobs": None, **choice, "message": {"refusal": None, **said}}
    check_shape(choice, {"message": MESSAGE, "finish_reason": FINISH, "logprobs": LOGPROBS}, "choice")
    message = choice["message"]
    need(message.get("tool_calls", True), "an empty list of calls")
    check_completion_usage(body["usage"], passed)
    result = Result(end=choice["finish_reason"], usage=body["usage"], ids={body["id"]})
    take_texts(result, message)
    calls = []
    for call in message.get("tool_calls", []):
        kind = call["type"]
        calls.append((kind, Call(call["id"], call[kind]["name"], call[kind][TOOL_TEXT[kind]])))
    sort_calls(result, calls, tool_kinds(tools), result.end in CUT_FINISH)
    check_finish(result, len(calls))
    return result


# --- Messages ---------------------------------------------------------------------------------------

MESSAGES_COUNTS = {name + "?": (None, int) for name in ("cache_creation_input_tokens", "cache_read_input_tokens")}
MESSAGES_USAGE = {"input_tokens": int, "output_tokens": int, **MESSAGES_COUNTS}
DELTA_USAGE = {"input_tokens?": (None, int), "output_tokens": int, **MESSAGES_COUNTS}
STOPS = one_of("end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal",
               "model_context_window_exceeded")
CUT_STOPS = ("max_tokens", "refusal", "model_context_window_exceeded")
MESSAGE_HEAD = {"id": re.compile("msg_.+"), "type": "message", "role": "assistant", "usage": MESSAGES_USAGE}
START = {**MESSAGE_HEAD, "content": list, "stop_reason": None, "stop_sequence": None}
TOOL_ID = re.compile("[a-zA-Z0-9_-]+")
RESULT = {"tool_use_id": TOOL_ID, "content": (list, dict)}
# what a block has at its start (clients throw the text of a start away), and the deltas that it may have
BLOCKS: dict[str, tuple[JSON, tuple[str, ...]]] = {
    "text": ({"text": ""}, ("text_delta", "citations_delta")),
    "thinking": ({"thinking": "", "signature": ""}, ("thinking_delta", "signature_delta")),
    "redacted_thinking": ({"data": SOME}, ()),
    "tool_use": ({"id": TOOL_ID, "name": SOME, "input": dict}, ("input_json_delta",)),
    "server_tool_use": ({"id": TOOL_ID, "name": SOME, "input": dict}, ("input_json_delta",)),
    "web_search_tool_result": (RESULT, ()),
    "web_fetch_tool_result": (RESULT, ()),
    "code_execution_tool_result": (RESULT, ()),
    "bash_code_execution_tool_result": (RESULT, ()),
    "text_editor_code_execution_tool_result": (RESULT, ()),
    "tool_search_tool_result": (RESULT, ()),
}
UNKNOWN: tuple[JSON, tuple[str, ...]] = ({}, ())
DELTAS: dict[str, JSON] = {
    "text_delta": {"text": str},
    "citations_delta": {"citation": {"type": SOME}},
    "thinking_delta": {"thinking": str},
    "signature_delta": {"signature": SOME},
    "input_json_delta": {"partial_json": str},
}
ERROR_TYPES = one_of("invalid_request_error", "authentication_error", "billing_error", "permission_error", "not_found_error",
                     "request_too_large", "rate_limit_error", "timeout_error", "api_error", "overloaded_error")
MESSAGES_ERROR = {"type": "error", "error": {"type": ERROR_TYPES, "message": SOME}, "request_id?": (None, str)}
# a whole answer's blocks
FULL_BLOCKS: dict[str, JSON] = {
    **{kind: start for kind, (start, _) in BLOCKS.items()},
    "text": {"text": SOME},
    "thinking": {"thinking": str, "signature": SOME},
}


class MessagesReader:
    """The events of one answer, one after the other."""

    def __init__(self, model: str, tools: Iterable[JSON] | None, passed: bool) -> None:
        self.model, self.offered, self.passed = model, tool_kinds(tools), passed
        self.result = Result()
        self.block: JSON | None = None      # the open one
        self.json = ""                      # of its input
        self.inputs: list[str] = []         # the JSON texts of the tool_use blocks
        self.stopped = False                # message_stop came

    def take(self, frame: Frame) -> None:
        event = strict_json(frame.data)
        check_shape(event, {"type": SOME}, "event")
        kind = event["type"]
        need(frame.event == kind, f"event {frame.event!r} has the type {kind!r}")
        need(not self.stopped and self.result.error is None, f"{kind} after the end")
        if kind == "ping":
            return
        if kind == "error":
            self.fail(event)
            return
        step = {"message_start": self.start, "content_block_start": self.open, "content_block_delta": self.delta,
                "content_block_stop": self.close, "message_delta": self.stop, "message_stop": self.end}.get(kind)
        if step is None and self.passed:
            return
        need(step is not None, f"an event that nobody knows: {kind}")
        need((kind == "message_start") == (not self.result.ids), f"{kind} where message_start belongs, or twice")
        need(not self.result.end or kind == "message_stop", f"{kind} after the stop_reason")
        assert step is not None
        step(event)

    def start(self, event: JSON) -> None:
        check_shape(event, {"message": {**START, "model": self.model}}, "message_start")
        need(event["message"]["content"] == [], "message_start with content")
        self.result.ids.add(event["message"]["id"])
        self.result.usage = dict(event["message"]["usage"])

    def open(self, event: JSON) -> None:
        need(self.block is None, "a block inside another")
        content = self.result.content
        known = SOME if self.passed else one_of(*BLOCKS)
        check_shape(event, {"index": len(content), "content_block": {"type": known}}, "content_block_start")
        self.block, self.json = dict(event["content_block"]), ""
        kind = self.block["type"]
        if kind == "thinking" and self.passed:
            self.block.setdefault("signature", "")
        check_shape(self.block, BLOCKS.get(kind, UNKNOWN)[0], kind)
        need(not self.block.get("input"), "an input at the start of its block")
        need(not self.block.get("citations"), "citations at the start of their block")
        content.append(self.block)

    def delta(self, event: JSON) -> None:
        block = self.open_block(event)
        if block["type"] not in BLOCKS:
            return          # of a server's tool from the future
        allowed = BLOCKS[block["type"]][1]
        check_shape(event, {"delta": {"type": one_of(*allowed) if allowed else "no delta"}}, f"delta of {block['type']}")
        delta = event["delta"]
        kind = delta["type"]
        check_shape(delta, DELTAS[kind], kind)
        need(block.get("signature") in (None, ""), "something after the signature")
        if kind == "input_json_delta":
            self.json += delta["partial_json"]
        elif kind == "citations_delta":
            block["citations"] = [*(block.get("citations") or []), delta["citation"]]
        else:
            name = kind.removesuffix("_delta")
            block[name] += delta[name]

    def open_block(self, event: JSON) -> JSON:
        need(self.block is not None, f"{event['type']} outside of a block")
        check_shape(event, {"index": len(self.result.content) - 1}, event["type"])
        assert self.block is not None
        return self.block

    def close(self, event: JSON) -> None:
        block, self.block = self.open_block(event), None
        need(block.get("signature") != "", "a thinking block without a signature")
        if is_object(self.json):
            block["input"] = strict_json(self.json)
        if block["type"] == "tool_use":
            self.inputs.append(self.json or "{}")
        elif "input" in block:
            need(not self.json or is_object(self.json), f"a server's tool with the input {self.json!r}")

    def stop(self, event: JSON) -> None:
        need(self.block is None, "a stop_reason inside a block")
        check_shape(event, {"delta": {"stop_reason": STOPS, "stop_sequence": (None, str)}, "usage": DELTA_USAGE}, "message_delta")
        said, usage = event["delta"], self.result.usage or {}
        given = {name: count for name, count in event["usage"].items() if count is not None}
        need(given["output_tokens"] >= usage["output_tokens"], "output_tokens are not cumulative")
        self.result.usage = {**usage, **given}
        finish_message(self.result, said, self.inputs, self.offered)

    def end(self, event: JSON) -> None:
        need(self.result.end, "message_stop without a stop_reason")
        need(set(event) == {"type"}, f"message_stop has more to say: {event}")
        self.stopped = True

    def fail(self, event: JSON) -> None:
        check_shape(event, MESSAGES_ERROR, "error")
        need(not self.result.end, "an error after the stop_reason")
        self.result.error, self.result.end = event["error"], "error"
        texts = iter(self.inputs + [self.json])
        calls = [call_of(block, next(texts)) for block in self.result.content if block["type"] == "tool_use"]
        self.result.partial = calls
        gather_content(self.result)

    def finish(self) -> Result:
        need(self.stopped or self.result.error is not None, "neither message_stop nor an error: cut")
        return self.result


def call_of(block: JSON, arguments: str) -> Call:
    return Call(block["id"], block["name"], arguments)


def gather_content(result: Result) -> None:
    blocks = result.content
    result.text = "".join(block["text"] for block in blocks if block["type"] == "text")
    result.reasoning = "".join(block["thinking"] for block in blocks if block["type"] == "thinking")
    result.signatures = [block.get("signature") or block.get("data") for block in blocks
                         if block["type"] in ("thinking", "redacted_thinking")]


def finish_message(result: Result, said: JSON, inputs: list[str], offered: dict[str, str] | None) -> None:
    """The rules of an ending, streamed or not. `inputs`: the JSON texts of the tool_use blocks."""
    reason = result.end = said["stop_reason"]
    need((reason == "stop_sequence") == (said["stop_sequence"] is not None), f"{reason} with {said['stop_sequence']!r}")
    uses = [block for block in result.content if block["type"] == "tool_use"]
    need(reason in CUT_STOPS or (reason == "tool_use") == bool(uses), f"{reason} with {len(uses)} tool_use blocks")
    whole_but_last = inputs[:-1] if reason in CUT_STOPS else inputs
    for text in whole_but_last:
        need(is_object(text), f"the input of a tool_use block is not one JSON object: {text!r}")
    sort_calls(result, [("function", call_of(*each)) for each in zip(uses, inputs)], offered, reason in CUT_STOPS)
    gather_content(result)


def read_all(reader: Any, data: bytes) -> Result:
    for n, frame in enumerate(frames(data)):
        try:
            reader.take(frame)
        except Violation as fault:
            raise Violation(f"event {n}: {fault}\n{frame.data[:300]}") from None
    result: Result = reader.finish()
    return result


def check_messages_stream(data: bytes, *, model: str, tools: Iterable[JSON] | None = None,
                          passed: bool = False) -> Result:
    """All rules of a stream of Messages. `tools`: those of the request, if calls are to be judged."""
    return read_all(MessagesReader(model, tools, passed), data)


def check_message(body: Any, *, model: str | None = None, tools: Iterable[JSON] | None = None,
                  passed: bool = False) -> Result:
    """All rules of an answer that is not streamed: a message as JSON, decoded or as bytes."""
    body = strict_json(body.decode()) if isinstance(body, bytes) else body
    known = SOME if passed else one_of(*BLOCKS)
    check_shape(body, {**MESSAGE_HEAD, "model": model or str, "content": [{"type": known}], "stop_reason": STOPS,
                       "stop_sequence": (None, str)}, "message")
    for n, block in enumerate(body["content"]):
        check_shape(block, FULL_BLOCKS.get(block["type"], {}), f"content[{n}]")
    result = Result(usage=body["usage"], content=body["content"], ids={body["id"]})
    inputs = [json.dumps(block["input"], ensure_ascii=False) for block in body["content"] if block["type"] == "tool_use"]
    finish_message(result, body, inputs, tool_kinds(tools))
    return result
