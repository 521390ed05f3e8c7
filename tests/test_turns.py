"""One history on every wire: what stands between calls, outputs, reasoning and late system texts."""
from __future__ import annotations

import base64
import json

import pytest

import pomex

ENVELOPE = pomex.Envelope(b"s" * 32, "a")
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" * 3).decode()
WIRES = {
    "chat": ("m", "generic"),
    "openai": ("gpt-5", "openai"),
    "deepseek": ("deepseek-chat", "deepseek"),
    "mistral": ("mistral-small", "mistral"),
    "messages": ("claude-sonnet-4-5", ""),
    "opus": ("claude-opus-5", ""),
    "gemini": ("gemini-3-pro", ""),
    "gemini-2": ("gemini-2.0-flash", ""),
}


def user(*content):
    return {"type": "message", "role": "user", "content": [PARTS.get(part) or {"type": "input_text", "text": part} for part in content]}


def said(*content):
    return {**user(*content), "role": "assistant"}


def late(text):
    return {**user(text), "role": "developer"}


def call(name):
    return {"type": "function_call", "call_id": name, "name": name, "arguments": "{}"}


def output(name, *content):
    return {"type": "function_call_output", "call_id": name, "output": user(*content)["content"]}


def sealed(**replay):
    return {"type": "reasoning", "summary": [], "encrypted_content": ENVELOPE.seal("p", "m", replay)}


PARTS = {
    "<image>": {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"},
    "<lost>": {"type": "input_image", "file_id": "file-1"},
}
THOUGHT = sealed(blocks=[{"type": "thinking", "thinking": "t", "signature": "s"}], reasoning_content="t ", signature="sig", characters=2)
SEARCH = sealed(blocks=[{"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}}], part={"toolCall": {}})
SIGNED = sealed(signature="sig-a", **{"for": "a"})
EXTRA = sealed(extra_content=[{"id": "a", "extra_content": {"google": {}}}])


def sketch(wire, items):
    """The upstream conversation, a string for each message: "role part, part"."""
    model, dialect = WIRES[wire]
    api = {"opus": "messages", "gemini-2": "gemini"}.get(wire, wire if wire in pomex.WIRES else "chat")
    request = pomex.parse_request(json.dumps({"model": "m", "input": items, "stream": True}).encode())
    job = pomex.EncodeContext(pomex.ResponsesAnswer(request, "resp_1", 1, pomex.STANDARD), ENVELOPE, "p", model, False, dialect)
    made = pomex.WIRES[api].call(job)
    body = json.loads(made.body)
    found = []
    for message in body.get("messages") or body["contents"]:
        parts = message.get("content") if "content" in message else message["parts"]
        texts = [parts] if isinstance(parts, str) else [part_sketch(part) for part in parts]
        texts += [f"think({message['reasoning_content']})"] if "reasoning_content" in message else []
        texts += ["call " + each["function"]["name"] + ("+" if "extra_content" in each else "") for each in message.get("tool_calls", [])]
        texts = [f"result {message['tool_call_id']}: {texts[0]}", *texts[1:]] if message["role"] == "tool" else texts
        found.append(f"{message['role']} {', '.join(texts)}".replace("\n", "|").replace("developer_message>", "dev>"))
    return found, made.dropped


def part_sketch(part):
    signed = "!" if part.get("thoughtSignature", pomex.DUMMY_SIGNATURE) != pomex.DUMMY_SIGNATURE else ""
    if "functionCall" in part:
        return f"call {part['functionCall']['name']}{signed}"
    if "functionResponse" in part:
        response = part["functionResponse"]
        return f"result {response['name']}: {[*response['response'].values()][0]}{' +media' if 'parts' in response else ''}"
    if part.get("type") == "tool_use":
        return f"call {part['name']}"
    if part.get("type") == "tool_result":
        content = part.get("content", "")
        return f"result {part['tool_use_id']}: {content if isinstance(content, str) else ', '.join(map(part_sketch, content))}"
    return f"{part['text']}{signed}" if "text" in part else part.get("type") or next(iter(part))


HISTORIES = {
    "only the assistant": [said("a")],
    "nothing at all": [user("<lost>")],
    "an empty user message between two answers": [user("u"), said("a"), user(""), said("b"), user("v")],
    "text between a call and its output": [user("u"), call("a"), said("so"), output("a", "1"), user("v")],
    "reasoning, text and calls": [user("u"), THOUGHT, said("so"), SIGNED, EXTRA, call("a"), call("b"), output("b", "2"), output("a", "1")],
    "reasoning that led to nothing": [user("u"), THOUGHT, user("v")],
    "reasoning after a call": [user("u"), call("a"), output("a", "1"), THOUGHT],
    "reasoning behind text": [user("u"), said("so far"), THOUGHT, user("v")],
    "a late system text before the answer": [user("u"), late("d"), said("a"), user("v")],
    "a late system text after the answer": [user("u"), said("a"), late("d"), said("b"), late("e")],
    "late system texts around dangling reasoning": [user("u"), late("d"), THOUGHT, user("v"), late("e"), said("a"), THOUGHT, late("f"), said("b")],
    "a late system text without text": [user("u"), late(""), user("v")],
    "images of two results": [user("u"), call("a"), call("b"), output("a", "<image>"), output("b", "x", "<image>", "y"), user("v")],
    "an answer of images only": [user("u"), said("<image>"), user("v")],
    "a provider's own search": [user("u"), SEARCH, said("found"), user("v")],
    "an output without a call": [user("u"), output("z", "lost"), said("a"), user("v")],
    "a call without an output": [user("u"), call("a"), user("v")],
}


# history -> wires -> the messages, then what was dropped
EXPECTED: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "only the assistant": {
        "chat openai deepseek mistral": (["assistant a", "user Continue."], []),
        "messages": (["user (continue)", "assistant a"], []),
        "opus": (["user (continue)", "assistant a", "user Continue."], []),
        "gemini gemini-2": (["user (continue)", "model a", "user Continue."], []),
    },
    "nothing at all": {
        "chat openai deepseek mistral messages opus gemini gemini-2": (["user (continue)"], ["content:input_image"]),
    },
    "an empty user message between two answers": {
        "chat openai deepseek mistral": (["user u", "assistant a", "assistant b", "user v"], []),
        "messages opus": (["user u", "assistant a, b", "user v"], []),
        "gemini gemini-2": (["user u", "model a, b", "user v"], []),
    },
    "text between a call and its output": {
        "chat openai": (["user u", "assistant so, call a", "tool result a: 1", "user v"], []),
        "deepseek": (["user u", "assistant so, think(), call a", "tool result a: 1", "user v"], []),
        "mistral": (["user u", "assistant so, call a", "tool result ca978112c: 1", "user v"], []),
        "messages opus": (["user u", "assistant so, call a", "user result a: 1, v"], []),
        "gemini gemini-2": (["user u", "model so, call a", "user result a: 1, v"], []),
    },
    "reasoning, text and calls": {
        "chat openai": (["user u", "assistant so, call a+, call b", "tool result a: 1", "tool result b: 2"], []),
        "deepseek": (["user u", "assistant so, think(t ), call a+, call b", "tool result a: 1", "tool result b: 2"], []),
        "mistral": (["user u", "assistant so, call a+, call b", "tool result ca978112c: 1", "tool result 3e23e8160: 2"], []),
        "messages opus": ([
            "user u",
            "assistant thinking, so, call a, call b",
            "user result a: 1, result b: 2",
        ], ["reasoning"]),
        "gemini gemini-2": ([
            "user u",
            "model so, call a!, call b",
            "user result a: 1, result b: 2",
        ], ["reasoning:signature", "reasoning:foreign"]),
    },
    "reasoning that led to nothing": {
        "chat openai deepseek mistral": (["user u||v"], []),
        "messages opus": (["user u, v"], []),
        "gemini gemini-2": (["user u, v"], ["reasoning:signature"]),
    },
    "reasoning after a call": {
        "chat openai": (["user u", "assistant , call a", "tool result a: 1"], []),
        "deepseek": (["user u", "assistant , think(), call a", "tool result a: 1"], []),
        "mistral": (["user u", "assistant , call a", "tool result ca978112c: 1"], []),
        "messages opus": (["user u", "assistant call a", "user result a: 1"], []),
        "gemini gemini-2": (["user u", "model call a", "user result a: 1"], ["reasoning:signature"]),
    },
    "reasoning behind text": {
        "chat openai mistral messages opus": (["user u", "assistant so far", "user v"], []),
        "deepseek": (["user u", "assistant so far, think(t )", "user v"], []),
        "gemini gemini-2": (["user u", "model so f, ar!", "user v"], []),
    },
    "a late system text before the answer": {
        "chat deepseek mistral": (["user u||<dev>|d|</dev>", "assistant a", "user v"], []),
        "openai opus": (["user u", "system d", "assistant a", "user v"], []),
        "messages": (["user u, <dev>|d|</dev>", "assistant a", "user v"], []),
        "gemini gemini-2": (["user u, <dev>|d|</dev>", "model a", "user v"], []),
    },
    "a late system text after the answer": {
        "chat deepseek mistral messages": ([
            "user u",
            "assistant a",
            "user <dev>|d|</dev>",
            "assistant b",
            "user <dev>|e|</dev>",
        ], []),
        "openai": (["user u", "assistant a", "system d", "assistant b", "system e"], []),
        "opus": (["user u", "assistant a", "user <dev>|d|</dev>", "assistant b", "user Continue.", "system e"], []),
        "gemini gemini-2": (["user u", "model a", "user <dev>|d|</dev>", "model b", "user <dev>|e|</dev>"], []),
    },
    "late system texts around dangling reasoning": {
        "chat mistral": ([
            "user u||<dev>|d|</dev>||v||<dev>|e|</dev>",
            "assistant a",
            "user <dev>|f|</dev>",
            "assistant b",
            "user Continue.",
        ], []),
        "openai": ([
            "user u",
            "system d",
            "user v",
            "system e",
            "assistant a",
            "system f",
            "assistant b",
            "user Continue.",
        ], []),
        "deepseek": ([
            "user u||<dev>|d|</dev>||v||<dev>|e|</dev>",
            "assistant a, think(t )",
            "user <dev>|f|</dev>",
            "assistant b",
            "user Continue.",
        ], []),
        "messages": (["user u, <dev>|d|</dev>, v, <dev>|e|</dev>", "assistant a", "user <dev>|f|</dev>", "assistant b"], []),
        "opus": ([
            "user u",
            "system d",
            "user v",
            "system e",
            "assistant a",
            "user <dev>|f|</dev>",
            "assistant b",
            "user Continue.",
        ], []),
        "gemini gemini-2": ([
            "user u, <dev>|d|</dev>, v, <dev>|e|</dev>",
            "model a!",
            "user <dev>|f|</dev>",
            "model b",
            "user Continue.",
        ], ["reasoning:signature"]),
    },
    "a late system text without text": {
        "chat deepseek mistral": (["user u||<dev>||</dev>||v"], []),
        "openai": (["user u", "system ", "user v"], []),
        "messages opus gemini gemini-2": (["user u, v"], []),
    },
    "images of two results": {
        "chat openai": ([
            "user u",
            "assistant , call a, call b",
            "tool result a: The images follow.",
            "tool result b: x|y",
            "user Images from tool call a:, image_url, Images from tool call b:, image_url, v",
        ], []),
        "deepseek": ([
            "user u",
            "assistant , think(), call a, call b",
            "tool result a: The images follow.",
            "tool result b: x|y",
            "user Images from tool call a:, image_url, Images from tool call b:, image_url, v",
        ], []),
        "mistral": ([
            "user u",
            "assistant , call a, call b",
            "tool result ca978112c: image_url",
            "tool result 3e23e8160: x, image_url, y",
            "user v",
        ], []),
        "messages opus": (["user u", "assistant call a, call b", "user result a: image, result b: x, image, y, v"], []),
        "gemini": ([
            "user u",
            "model call a, call b",
            "user result a: The content follows. +media, result b: x|y +media, v",
        ], []),
        "gemini-2": ([
            "user u",
            "model call a, call b",
            "user result a: The content follows., result b: x|y, inlineData, inlineData, v",
        ], []),
    },
    "an answer of images only": {
        "chat openai deepseek mistral": (["user u||v"], []),
        "messages opus": (["user u", "assistant image", "user v"], []),
        "gemini gemini-2": (["user u", "model inlineData", "user v"], []),
    },
    "a provider's own search": {
        "chat openai deepseek mistral": (["user u", "assistant found", "user v"], []),
        "messages opus": (["user u", "assistant server_tool_use, found", "user v"], []),
        "gemini": (["user u", "model toolCall, found", "user v"], []),
        "gemini-2": (["user u", "model found", "user v"], ["reasoning:foreign"]),
    },
    "an output without a call": {
        "chat openai deepseek mistral": (["user u||[tool output] lost", "assistant a", "user v"], []),
        "messages opus": (["user u, [tool output] lost", "assistant a", "user v"], []),
        "gemini gemini-2": (["user u, [tool output] lost", "model a", "user v"], []),
    },
    "a call without an output": {
        "chat openai": (["user u", "assistant , call a", "tool result a: no output was recorded for this call", "user v"], []),
        "deepseek": ([
            "user u",
            "assistant , think(), call a",
            "tool result a: no output was recorded for this call",
            "user v",
        ], []),
        "mistral": ([
            "user u",
            "assistant , call a",
            "tool result ca978112c: no output was recorded for this call",
            "user v",
        ], []),
        "messages opus": (["user u", "assistant call a", "user result a: no output was recorded for this call, v"], []),
        "gemini gemini-2": (["user u", "model call a", "user result a: no output was recorded for this call, v"], []),
    },
}


def test_every_history_has_its_expectation():
    assert EXPECTED.keys() == HISTORIES.keys()
    assert all(sorted(" ".join(wires).split()) == sorted(WIRES) for wires in EXPECTED.values())


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_on_every_wire(name, wire):
    [expected] = [expected for wires, expected in EXPECTED[name].items() if wire in wires.split()]
    assert sketch(wire, HISTORIES[name]) == expected
