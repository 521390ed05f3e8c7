"""A provider that plays a script: each request gets the next answer, rendered in the wire of its path.

A test says what the model does in one vocabulary (`Text`, `Reasoning`, `Call`, `Custom`); the request's own path
(`.../responses`, `.../chat/completions`, `.../messages`, `.../models/MODEL:generateContent`) decides how that is
spelled, and the tools that the request offers decide the spelling of a call, so one script serves native, downgraded
and translated requests. Where the real provider would refuse a request, this one does (strict.py).
"""
from __future__ import annotations

import http.server
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from strict import THINKING_BLOCKS, Memory, gemini_complaint, in_blocks, messages_complaint, signatures_in
from vendors import (gemini_answers, gemini_items, gemini_model, gemini_parts, messages_blocks, messages_events,
                     messages_items, messages_whole)
from vocabulary import JSON, ResponsesAnswer, Call, Custom, Item, Reasoning, Text, pieces


@dataclass(frozen=True)
class Raw:
    """A stream as it was recorded."""
    payload: bytes


@dataclass(frozen=True)
class Refusal:
    """An HTTP error."""
    status: int
    body: JSON
    headers: tuple[tuple[str, str], ...] = ()


RESET, STALL = "reset", "stall"         # the connection breaks; nothing more comes


@dataclass(frozen=True)
class Broken:
    """An answer that goes wrong. `steps` is given the request and the answer as it would be sent, and says what goes over
    the socket instead, from the status line on: bytes, RESET or STALL. The connection is closed at the end."""
    answer: ResponsesAnswer
    steps: Callable[[Seen, bytes], list[bytes | str]]


def says(*items: Item | str, **how: Any) -> ResponsesAnswer:
    return ResponsesAnswer(tuple(Text(item) if isinstance(item, str) else item for item in items), **how)


@dataclass
class Seen:
    """One request as it arrived."""
    path: str
    headers: dict[str, str]
    body: JSON

    @property
    def items(self) -> list[JSON]:
        """The history: `input` of a Responses request, `messages` of a chat request, the others' as Responses items."""
        if self.path.endswith("/messages"):
            return messages_items(in_blocks(self.body))
        if "contents" in self.body:
            return gemini_items(self.body)
        found: list[JSON] = self.body.get("input", self.body.get("messages", []))
        return found

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream")) or ":streamGenerateContent" in self.path

    @property
    def model(self) -> str:
        return str(self.body.get("model") or gemini_model(self.path))

    @property
    def schema(self) -> JSON | None:
        """The JSON schema that the answer is to have; None where the wire was asked for none."""
        body = self.body
        form = (body.get("text", {}).get("format") or body.get("output_config", {}).get("format")
                or body.get("response_format") or {"schema": body.get("generationConfig", {}).get("responseJsonSchema")})
        found: JSON | None = form.get("json_schema", form).get("schema")
        return found

    @property
    def signatures(self) -> list[str]:
        """What a thought or a part was signed with, in order."""
        body = in_blocks(self.body) if self.path.endswith("/messages") else self.body
        return signatures_in(body) if self.path.endswith("/messages") or "contents" in body else []

    def of_type(self, kind: str) -> list[JSON]:
        return [item for item in self.items if item.get("type") == kind]

    @property
    def tool_results(self) -> list[str]:
        """The text of every tool output in the history, in order, on either wire."""
        return [flat_text(item.get("output", item.get("content"))) for item in self.items
                if item.get("role") == "tool" or str(item.get("type", "")).endswith("_call_output")]

    def worded(self, refused: Refusal) -> Refusal:
        """An OpenAI refusal in the words of the provider that is asked."""
        error = refused.body["error"]
        too_long = error.get("code") == "context_length_exceeded"
        if self.path.endswith("/messages"):
            message = "prompt is too long: 8200 tokens > 8192 maximum" if too_long else error["message"]
            return Refusal(refused.status, {"type": "error", "request_id": "req_1", "error": {
                "type": "invalid_request_error", "message": message}}, refused.headers)
        if "contents" in self.body:
            message = ("The input token count (8200) exceeds the maximum number of tokens allowed (8192)."
                       if too_long else error["message"])
            return Refusal(refused.status, {"error": {"code": refused.status, "message": message,
                                                      "status": "INVALID_ARGUMENT"}}, refused.headers)
        return refused

    @property
    def text(self) -> str:
        return json.dumps(self.items, ensure_ascii=False)


def refusal(message: str, code: str = "invalid_request_error") -> Refusal:
    return Refusal(400, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}})


def flat_text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return str(content or "")


# --- what the request offers -----------------------------------------------------------------------

def offered(body: JSON) -> list[JSON]:
    """Every tool of a request, flat: {"type", "name", "namespace", "parameters"}."""
    tools = [inner for tool in body.get("tools") or [] for inner in tool.get("functionDeclarations", [tool])]
    for item in body.get("input") or []:
        if isinstance(item, dict) and item.get("type") in ("additional_tools", "tool_search_output"):
            tools += item.get("tools") or []
    return list(_flatten(tools, ""))


def _flatten(tools: Iterable[JSON], namespace: str) -> Iterator[JSON]:
    for tool in tools:
        if tool.get("type") == "namespace":
            yield from _flatten(tool["tools"], tool["name"])
            continue
        inner = tool.get("function", tool)
        own = inner.get("parameters") or inner.get("input_schema") or inner.get("parametersJsonSchema") or {}
        yield {"type": tool.get("type"), "name": inner.get("name") or tool.get("type") or next(iter(tool)), "namespace": namespace,
               "parameters": own}


class Unoffered(Exception):
    """The script wants a tool that the request does not offer: an answer to the test, not to the client."""


def find_tool(body: JSON, name: str, namespace: str) -> JSON:
    """The offered tool for `name`: itself, or flattened with its namespace in front."""
    tools = offered(body)
    ranked = ([t for t in tools if t["name"] == name and (not namespace or t["namespace"] == namespace)]
              or [t for t in tools if t["name"].endswith(name) and t["name"].startswith(namespace)]
              or [t for t in tools if t["name"].endswith(name)])
    if not ranked:
        raise Unoffered(f"{namespace}/{name} is not among {sorted(t['name'] for t in tools)}")
    return ranked[0]


def spell(body: JSON, item: Call | Custom) -> tuple[str, str, str, str]:
    """(kind, name, namespace, payload) of a call as this request's own tools ask for it."""
    tool = find_tool(body, item.name, item.namespace)
    if tool["type"] == "custom":
        assert isinstance(item, Custom)
        return "custom_tool_call", tool["name"], tool["namespace"], item.input
    if isinstance(item, Call):
        kind = "tool_search_call" if tool["type"] == "tool_search" else "function_call"
        return kind, tool["name"], tool["namespace"], json.dumps(item.arguments)
    field_name = next(iter(tool["parameters"]["properties"]))       # a freeform tool as a one-string function
    return "function_call", tool["name"], tool["namespace"], json.dumps({field_name: item.input})


def plainly(body: JSON) -> Callable[[Call | Custom], tuple[str, JSON]]:
    """spell() for the wires that know functions only."""
    def spelled(item: Call | Custom) -> tuple[str, JSON]:
        _, name, _, payload = spell(body, item)
        return name, json.loads(payload)
    return spelled


# --- the Responses wire ----------------------------------------------------------------------------

_ids = itertools.count(1)


def _response(body: JSON, response_id: str, status: str, output: list[JSON], usage: JSON | None,
              reason: str = "") -> JSON:
    echo = {key: body[key] for key in ("instructions", "tools", "tool_choice", "parallel_tool_calls", "metadata",
                                       "max_output_tokens", "temperature", "top_p", "store", "prompt_cache_key",
                                       "service_tier") if body.get(key) is not None}
    for tool in echo.get("tools", ()):
        if tool.get("type") == "function":
            tool.setdefault("description", None)
            tool.setdefault("strict", True)
    text = {"format": {"type": "text"}, "verbosity": "medium", **(body.get("text") or {})}
    reasoning = {"effort": None, "summary": None, **(body.get("reasoning") or {})}
    return {"id": response_id, "object": "response", "created_at": 1790000000, "status": status,
            "model": body.get("model"), "output": output, "background": False,
            "completed_at": 1790000001 if status == "completed" else None, "error": None, "frequency_penalty": 0,
            "incomplete_details": {"reason": reason} if reason else None, "instructions": None,
            "max_output_tokens": None, "max_tool_calls": None, "metadata": {}, "parallel_tool_calls": True,
            "presence_penalty": 0, "previous_response_id": None, "prompt_cache_key": None,
            "safety_identifier": None, "service_tier": "default", "store": True, "temperature": 1,
            "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": 1, "truncation": "disabled",
            "usage": usage, "user": None, **echo, "text": text, "reasoning": reasoning}


def _text_events(item: JSON, text: str) -> Iterator[JSON]:
    at = {"item_id": item["id"], "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    yield {"type": "response.content_part.added", **at, "part": part}
    for piece in pieces(text):
        yield {"type": "response.output_text.delta", **at, "delta": piece, "logprobs": []}
    yield {"type": "response.output_text.done", **at, "text": text, "logprobs": []}
    yield {"type": "response.content_part.done", **at, "part": {**part, "text": text}}
    item["content"] = [{**part, "text": text}]


def _reasoning_events(item: JSON, text: str) -> Iterator[JSON]:
    at = {"item_id": item["id"], "summary_index": 0}
    yield {"type": "response.reasoning_summary_part.added", **at, "part": {"type": "summary_text", "text": ""}}
    for piece in pieces(text):
        yield {"type": "response.reasoning_summary_text.delta", **at, "delta": piece}
    yield {"type": "response.reasoning_summary_text.done", **at, "text": text}
    yield {"type": "response.reasoning_summary_part.done", **at, "part": {"type": "summary_text", "text": text}}
    item["summary"] = [{"type": "summary_text", "text": text}]


def _call_events(item: JSON, key: str, payload: str) -> Iterator[JSON]:
    prefix = "response.function_call_arguments" if key == "arguments" else "response.custom_tool_call_input"
    for piece in pieces(payload):
        yield {"type": f"{prefix}.delta", "item_id": item["id"], "delta": piece}
    done = {"type": f"{prefix}.done", "item_id": item["id"], key: payload}
    yield {**done, "name": item["name"]} if key == "arguments" else done
    item[key] = payload


def _item_events(body: JSON, item: Item) -> tuple[JSON, Iterator[JSON]]:
    n = next(_ids)
    if isinstance(item, Text):
        made: JSON = {"id": f"msg_{n:06d}", "type": "message", "status": "in_progress", "role": "assistant",
                      "content": []}
        return made, _text_events(made, item.text)
    if isinstance(item, Reasoning):
        made = {"id": f"rs_{n:06d}", "type": "reasoning", "status": "in_progress", "summary": []}
        return made, _reasoning_events(made, item.text)
    kind, name, namespace, payload = spell(body, item)
    if kind == "tool_search_call":
        return {"id": f"tsc_{n:06d}", "type": kind, "status": "in_progress", "call_id": f"call_{n:06d}",
                "execution": "client", "arguments": json.loads(payload)}, iter(())
    key = "input" if kind == "custom_tool_call" else "arguments"
    made = {"id": f"{'ctc' if key == 'input' else 'fc'}_{n:06d}", "type": kind, "status": "in_progress",
            "call_id": f"call_{n:06d}", "name": name, key: ""}
    if namespace:
        made["namespace"] = namespace
    return made, _call_events(made, key, payload)


def responses_events(body: JSON, answer: ResponsesAnswer) -> list[JSON]:
    response_id = f"resp_up{next(_ids):06d}"
    output: list[JSON] = []
    blank = _response(body, response_id, "in_progress", [], None)
    events: list[JSON] = [{"type": "response.created", "response": blank},
                          {"type": "response.in_progress", "response": blank}]
    for index, item in enumerate(answer.items):
        made, middle = _item_events(body, item)
        events.append({"type": "response.output_item.added", "output_index": index, "item": dict(made)})
        events += [{**event, "output_index": index} for event in middle]
        last_cut = answer.end == "length" and index == len(answer.items) - 1
        made["status"] = "incomplete" if last_cut else "completed"
        if isinstance(item, Reasoning) and item.encrypted:
            made["encrypted_content"] = item.encrypted
        events.append({"type": "response.output_item.done", "output_index": index, "item": made})
        output.append(made)
    usage = {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens,
             "total_tokens": answer.total_tokens, "output_tokens_details": {"reasoning_tokens": 0},
             "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0}}
    status = "incomplete" if answer.end == "length" else "completed"
    reason = "max_output_tokens" if answer.end == "length" else ""
    events.append({"type": f"response.{status}",
                   "response": _response(body, response_id, status, output, usage, reason)})
    if answer.end == "drop":
        del events[-1]
    if answer.end == "cut":
        del events[2 + len(events) // 2:]
    return [{**event, "sequence_number": n} for n, event in enumerate(events)]


def responses_bytes(body: JSON, answer: ResponsesAnswer) -> bytes:
    events = responses_events(body, answer)
    if not body.get("stream"):
        return json.dumps(events[-1]["response"]).encode()
    return b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events)


# --- the chat wire ---------------------------------------------------------------------------------

def _chat_deltas(body: JSON, answer: ResponsesAnswer) -> Iterator[JSON]:
    yield {"role": "assistant", "content": ""}
    calls = itertools.count()
    for item in answer.items:
        if isinstance(item, Text):
            yield from ({"content": piece} for piece in pieces(item.text))
        elif isinstance(item, Reasoning):
            yield from ({"reasoning_content": piece} for piece in pieces(item.text))
        else:
            _, name, _, payload = spell(body, item)
            index = next(calls)
            head = {"index": index, "id": f"call_{next(_ids):06d}", "type": "function"}
            yield {"tool_calls": [{**head, "function": {"name": name, "arguments": ""}}]}
            yield from ({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}
                        for piece in pieces(payload))


def chat_chunks(body: JSON, answer: ResponsesAnswer) -> list[JSON | str]:
    head = {"id": f"chatcmpl-{next(_ids):06d}", "object": "chat.completion.chunk", "created": 1790000000,
            "model": body.get("model")}
    called = any(isinstance(item, Call | Custom) for item in answer.items)
    finish = "length" if answer.end == "length" else "tool_calls" if called else "stop"
    chunks: list[JSON | str] = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
                                for delta in _chat_deltas(body, answer)]
    if answer.end == "cut":
        return chunks[:1 + len(chunks) // 2]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if answer.end == "drop":
        return chunks
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**head, "choices": [], "usage": _chat_usage(answer)})
    return [*chunks, "[DONE]"]


def _chat_usage(answer: ResponsesAnswer) -> JSON:
    return {"prompt_tokens": answer.input_tokens, "completion_tokens": answer.output_tokens,
            "total_tokens": answer.total_tokens, "prompt_tokens_details": {"cached_tokens": answer.cached_tokens}}


def chat_bytes(body: JSON, answer: ResponsesAnswer) -> bytes:
    chunks = chat_chunks(body, answer)
    if body.get("stream"):
        return b"".join(f"data: {c if isinstance(c, str) else json.dumps(c)}\n\n".encode() for c in chunks)
    message: JSON = {"role": "assistant", "content": "", "tool_calls": []}
    for item in answer.items:
        if isinstance(item, Text):
            message["content"] += item.text
        elif isinstance(item, Reasoning):
            message["reasoning_content"] = message.get("reasoning_content", "") + item.text
        else:
            _, name, _, payload = spell(body, item)
            message["tool_calls"].append({"id": f"call_{next(_ids):06d}", "type": "function",
                                          "function": {"name": name, "arguments": payload}})
    finish = "length" if answer.end == "length" else "tool_calls" if message["tool_calls"] else "stop"
    if not message["tool_calls"]:
        del message["tool_calls"]
    return json.dumps({"id": f"chatcmpl-{next(_ids):06d}", "object": "chat.completion", "created": 1790000000,
                       "model": body.get("model"), "usage": _chat_usage(answer),
                       "choices": [{"index": 0, "message": message, "finish_reason": finish}]}).encode()


# --- the server ------------------------------------------------------------------------------------

@dataclass
class Script:
    """What the provider is to answer, and what it was asked. A request that the real one would refuse is refused:
    its complaint stands in `refused`, and the test fails unless it takes it from there."""
    answers: list[ResponsesAnswer | Raw | Refusal] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    signed: list[str] = field(default_factory=list)                     # every signature that was given out
    memory: Memory = field(default_factory=Memory)
    whole_answers: bool = False             # clients of the Messages API ask, who need not stream

    def play(self, *answers: ResponsesAnswer | Raw | Refusal) -> None:
        """Begins anew; complaints that nobody took stay."""
        self.answers[:] = answers
        for kept in (self.seen, self.sent, self.faults, self.signed):
            kept.clear()
        self.memory = Memory(recorded=b"".join(answer.payload for answer in answers if isinstance(answer, Raw)),
                             whole_answers=self.whole_answers)

    def memory_of(self, seen: Seen) -> Memory:
        """What the provider that is asked has given out; all share one memory unless a script says otherwise."""
        return self.memory

    def complaint(self, seen: Seen) -> str:
        memory = self.memory_of(seen)
        if seen.path.endswith("/messages"):
            return messages_complaint(seen.body, seen.headers, memory)
        if "contents" in seen.body:
            model = gemini_model(seen.path)
            return gemini_complaint(model, seen.body, seen.headers, memory) if model else f"no path: {seen.path}"
        return ""

    def render(self, seen: Seen, answer: ResponsesAnswer) -> bytes:
        body, memory = seen.body, self.memory_of(seen)
        if seen.path.endswith("/messages"):
            body = in_blocks(body)
            blocks = messages_blocks(body, answer, plainly(body))
            thoughts = [block for block in blocks if block["type"] in THINKING_BLOCKS]
            memory.thought_of.update({block["id"]: thoughts for block in blocks if block["type"] == "tool_use"})
            self.signed += [block.get("signature") or block["data"] for block in thoughts]
            if not seen.streams:
                return json.dumps(messages_whole(body, answer, blocks)).encode()
            return b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode()
                            for e in messages_events(body, answer, blocks))
        if "contents" in body:
            model = gemini_model(seen.path)
            parts = gemini_parts(model, body, answer, plainly(body))
            events = gemini_answers(model, answer, parts, seen.streams)
            sent = [part for event in events for part in event["candidates"][0]["content"]["parts"]]
            self.signed += [part["thoughtSignature"] for part in sent if "thoughtSignature" in part]
            for part in sent:
                if "functionCall" in part and "thoughtSignature" in part:
                    memory.signed_calls[json.dumps(part["functionCall"], sort_keys=True)] = part["thoughtSignature"]
            return (b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) if seen.streams
                    else json.dumps(events[0]).encode())
        return chat_bytes(body, answer) if seen.path.endswith("/chat/completions") else responses_bytes(body, answer)

    def next(self, seen: Seen) -> ResponsesAnswer | Raw | Refusal | Broken:
        if self.answers:
            return self.answers.pop(0)
        self.faults.append("a request came after the script's end")
        return refusal("the script is over")

    def played_out(self, requests: int | None = None) -> None:
        """Every answer was asked for, no more, no less."""
        assert not self.faults, self.faults
        assert not self.answers, f"{len(self.answers)} scripted answers were not asked for"
        if requests is not None:
            assert len(self.seen) == requests


class Upstream:
    """The provider's HTTP server, on a loopback port of its own. `/NAME/v1/...` is played by the script."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.catalogue: JSON = {"object": "list", "data": []}
        self.headers = [("openai-model", "upstreams-own-name")]     # Codex would say that the account was flagged
        script, answer_models, own_headers = self.script, lambda: self.catalogue, self.headers

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True          # head and body go out apart: 40 ms for each answer

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"] or 0))
                path = self.path.removesuffix("?beta=true")         # Claude Code's own ending
                seen = Seen(path, {k.lower(): v for k, v in self.headers.items()}, json.loads(raw))
                if path.endswith("/messages/count_tokens"):
                    self.refuse(Refusal(200, {"input_tokens": len(raw) // 4}))
                    return
                script.seen.append(seen)
                complaint = script.complaint(seen)
                script.refused += [complaint] if complaint else []
                answer = refusal(complaint) if complaint else script.next(seen)
                if isinstance(answer, Raw):
                    self.play(answer.payload, stream=True)
                    return
                if isinstance(answer, Broken):
                    self.fail(answer.steps(seen, script.render(seen, answer.answer)))
                    return
                if isinstance(answer, ResponsesAnswer):
                    try:
                        # Gemini's finishReason is the last of all: only the connection can be lost after it
                        cut = answer.end == "cut" or (answer.end == "drop" and "contents" in seen.body)
                        self.play(script.render(seen, answer), seen.streams, cut)
                        return
                    except Unoffered as error:
                        script.faults.append(str(error))
                        answer = refusal(str(error))
                self.refuse(seen.worded(answer))

            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                self.refuse(Refusal(200, answer_models()) if "/models" in self.path else Refusal(404, {}))

            def play(self, payload: bytes, stream: bool, cut: bool = False) -> None:
                script.sent.append(payload)
                self.send_response(200)
                self.send_header("content-type", "text/event-stream" if stream else "application/json")
                if not stream:
                    self.send_header("content-length", str(len(payload)))
                    self.end_headers()
                    self.wfile.write(payload)
                    return
                self.send_header("transfer-encoding", "chunked")
                for name, value in own_headers:
                    self.send_header(name, value)
                self.end_headers()
                for frame in re.findall(rb".+?(?:\r?\n\r?\n|\Z)", payload, re.S):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(frame), frame))
                if cut:
                    self.close_connection = True
                else:
                    self.wfile.write(b"0\r\n\r\n")

            def fail(self, steps: list[bytes | str]) -> None:
                self.close_connection = True
                for step in steps:
                    if isinstance(step, bytes):
                        self.wfile.write(step)
                    elif step == STALL:
                        self.connection.settimeout(30)
                        self.connection.recv(1)             # until the gateway hangs up
                    else:
                        time.sleep(0.05)                    # what was sent is to be read: a reset may overtake it
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        os.close(self.connection.detach())

            def refuse(self, refusal: Refusal) -> None:
                payload = json.dumps(refusal.body).encode()
                self.send_response(refusal.status)
                for name, value in (("content-type", "application/json"),
                                    ("content-length", str(len(payload))), *refusal.headers):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                error = sys.exception()     # a client that hangs up is no fault: Codex does so after response.completed
                if not isinstance(error, ConnectionError):
                    script.refused.append("".join(traceback.format_exception(error)))

        self.server = Server(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def base_url(self, name: str) -> str:
        return f"{self.origin}/{name}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
