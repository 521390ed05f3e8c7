"""A provider that plays a script: each request gets the next answer, rendered in the wire of its path.

A test says what the model does in one vocabulary (`Text`, `Reasoning`, `Call`, `Custom`); the request's own
path (`.../responses` or `.../chat/completions`) decides how that is spelled, and the tools that the request
offers decide the spelling of a call, so one script serves native, downgraded and translated requests.
"""
from __future__ import annotations

import http.server
import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

JSON = dict[str, Any]


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str
    encrypted: str = ""


@dataclass(frozen=True)
class Call:
    """A function call; `namespace` is where the client declared the tool, not how the provider sees it."""
    name: str
    arguments: JSON
    namespace: str = ""


@dataclass(frozen=True)
class Custom:
    """A freeform call (apply_patch)."""
    name: str
    input: str
    namespace: str = ""


Item = Text | Reasoning | Call | Custom


@dataclass(frozen=True)
class Answer:
    """One response. `end`: whole | drop (finished, no terminal event) | cut (in the middle) | length."""
    items: tuple[Item, ...]
    end: str = "whole"
    input_tokens: int = 120
    cached_tokens: int = 20
    output_tokens: int = 15

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


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


def says(*items: Item | str, **how: Any) -> Answer:
    return Answer(tuple(Text(item) if isinstance(item, str) else item for item in items), **how)


@dataclass
class Seen:
    """One request as it arrived."""
    path: str
    headers: dict[str, str]
    body: JSON

    @property
    def items(self) -> list[JSON]:
        """The history: `input` of a Responses request, `messages` of a chat request."""
        found: list[JSON] = self.body.get("input", self.body.get("messages", []))
        return found

    def of_type(self, kind: str) -> list[JSON]:
        return [item for item in self.items if item.get("type") == kind]

    @property
    def tool_results(self) -> list[str]:
        """The text of every tool output in the history, in order, on either wire."""
        return [flat_text(item.get("output", item.get("content"))) for item in self.items
                if item.get("role") == "tool" or str(item.get("type", "")).endswith("_call_output")]

    @property
    def text(self) -> str:
        return json.dumps(self.items, ensure_ascii=False)


def flat_text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return str(content or "")


# --- what the request offers -----------------------------------------------------------------------

def offered(body: JSON) -> list[JSON]:
    """Every tool of a request, flat: {"type", "name", "namespace", "parameters"}."""
    tools = list(body.get("tools") or [])
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
        yield {"type": tool.get("type"), "name": inner.get("name", tool.get("type")), "namespace": namespace,
               "parameters": inner.get("parameters") or {}}


class Unoffered(Exception):
    """The script wants a tool that the request does not offer: an answer to the test, not to the client."""


def find_tool(body: JSON, name: str, namespace: str) -> JSON:
    """The offered tool for `name`: itself, or flattened with its namespace in front."""
    tools = offered(body)
    ranked = ([t for t in tools if t["name"] == name and (not namespace or t["namespace"] == namespace)]
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


def pieces(text: str, size: int = 7) -> list[str]:
    return [text[i:i + size] for i in range(0, len(text), size)]


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


def responses_events(body: JSON, answer: Answer) -> list[JSON]:
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


def responses_bytes(body: JSON, answer: Answer) -> bytes:
    events = responses_events(body, answer)
    if not body.get("stream"):
        return json.dumps(events[-1]["response"]).encode()
    return b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events)


# --- the chat wire ---------------------------------------------------------------------------------

def _chat_deltas(body: JSON, answer: Answer) -> Iterator[JSON]:
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


def chat_chunks(body: JSON, answer: Answer) -> list[JSON | str]:
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


def _chat_usage(answer: Answer) -> JSON:
    return {"prompt_tokens": answer.input_tokens, "completion_tokens": answer.output_tokens,
            "total_tokens": answer.total_tokens, "prompt_tokens_details": {"cached_tokens": answer.cached_tokens}}


def chat_bytes(body: JSON, answer: Answer) -> bytes:
    chunks = chat_chunks(body, answer)
    if body.get("stream"):
        return b"".join(f"data: {c if isinstance(c, str) else json.dumps(c)}\n\n".encode() for c in chunks)
    message: JSON = {"role": "assistant", "content": "", "tool_calls": []}
    for item in answer.items:
        if isinstance(item, Text):
            message["content"] += item.text
        elif isinstance(item, Reasoning):
            message["reasoning_content"] = item.text
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
    """What the provider is to answer, and what it was asked."""
    answers: list[Answer | Raw | Refusal] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def play(self, *answers: Answer | Raw | Refusal) -> None:
        self.answers[:] = answers
        self.seen.clear()
        self.sent.clear()
        self.faults.clear()

    def next(self) -> Answer | Raw | Refusal:
        if self.answers:
            return self.answers.pop(0)
        self.faults.append("a request came after the script's end")
        return Refusal(400, {"error": {"message": "the script is over", "type": "invalid_request_error",
                                       "param": None, "code": "invalid_request_error"}})

    def played_out(self, requests: int | None = None) -> None:
        """Every answer was asked for, no more, no less."""
        assert not self.faults, self.faults
        assert not self.answers, f"{len(self.answers)} scripted answers were not asked for"
        if requests is not None:
            assert len(self.seen) == requests


class Upstream:
    """The provider's HTTP server, on a loopback port of its own. `/NAME/v1/...` is played by the script."""

    def __init__(self) -> None:
        self.script = Script()
        self.catalogue: JSON = {"object": "list", "data": []}
        self.headers = [("openai-model", "upstreams-own-name")]     # Codex would say that the account was flagged
        script, answer_models, own_headers = self.script, lambda: self.catalogue, self.headers

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"] or 0))
                body = json.loads(raw)
                script.seen.append(Seen(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                answer = script.next()
                if isinstance(answer, Raw):
                    self.play(answer.payload, stream=True)
                    return
                if isinstance(answer, Answer):
                    try:
                        render = chat_bytes if self.path.endswith("/chat/completions") else responses_bytes
                        self.play(render(body, answer), bool(body.get("stream")), answer.end == "cut")
                        return
                    except Unoffered as error:
                        script.faults.append(str(error))
                        answer = Refusal(400, {"error": {"message": str(error), "type": "invalid_request_error"}})
                self.refuse(answer)

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
                pass                # a client that hangs up is no fault: Codex does so after response.completed

        self.server = Server(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def base_url(self, name: str) -> str:
        return f"{self.origin}/{name}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
