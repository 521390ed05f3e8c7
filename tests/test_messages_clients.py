"""POST /v1/messages and its count_tokens: translation, answers, passthrough, and the gateway over loopback."""
import asyncio
import base64
import json
import pathlib

import pytest
from test_handlers import chat, http_answer, native, run, sse

import pomex

ENVELOPE = pomex.Envelope(b"s" * 32, "a")
SHARED = pathlib.Path(__file__).resolve().parent.parent.parent / "shared"
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" * 3).decode()
PDF = base64.b64encode(b"%PDF-1.7 ...").decode()
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"name": "get", "description": "Gets.", "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}}}


def body(messages=HI, **fields):
    return {"model": "m/x", "max_tokens": 100, "messages": messages, **fields}


def parse(given, last=None):
    return pomex.parse_request(given if isinstance(given, bytes) else json.dumps(given).encode(), last, "messages")


def context(request, wire="responses", provider="p", model="up", envelope=ENVELOPE):
    answer = pomex.MessagesAnswer(request, "resp_0123456789", 1, pomex.STANDARD)
    answer.estimated_input = request.estimated_input
    ctx = pomex.EncodeContext(answer, envelope, provider, model, wire != "responses", "")
    return ctx, pomex.WIRES[wire]


def encoded(given, wire="responses", **more):
    """What goes up, and what is named as dropped."""
    ctx, api = context(parse(given), wire, **more)
    call = api.call(ctx)
    return json.loads(call.body), call.dropped


# --- the request ------------------------------------------------------------------------------------

def user(*blocks):
    return [{"role": "user", "content": list(blocks)}]


def text(words):
    return {"type": "text", "text": words}


def part(words):
    return {"type": "input_text", "text": words}


def said(*parts, role="user"):
    return {"type": "message", "role": role, "content": list(parts)}


def source(kind, of="image", **fields):
    return {"type": of, "source": {"type": kind, **fields}}


SEALED = ENVELOPE.seal("p", "m", {"encrypted_content": "gAAA"})
# messages -> input items, names of what is lost
CONVERSATIONS = {
    "a string": (HI, [said(part("Hi"))], []),
    "texts are one message": (user(text("a"), {**text("b"), "cache_control": {"type": "ephemeral"}}), [said(part("a"), part("b"))], []),
    "a system message stays at its place": ([*HI, {"role": "system", "content": "S"}, *HI],
                                            [said(part("Hi")), said(part("S"), role="developer"), said(part("Hi"))], []),
    "an image": (user(source("base64", media_type="image/png", data=PNG)),
                 [said({"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"})], []),
    "an image's address": (user(source("url", url="https://x/i.png")), [said({"type": "input_image", "image_url": "https://x/i.png"})], []),
    "an image at Anthropic": (user(text("a"), source("file", file_id="f")), [said(part("a"))], ["messages:image.file"]),
    "a PDF": (user({**source("base64", "document", media_type="application/pdf", data=PDF), "title": "T", "context": "C",
                    "citations": {"enabled": True}}),
              [said({"type": "input_file", "filename": "T.pdf", "file_data": f"data:application/pdf;base64,{PDF}"})],
              ["messages:document.citations", "messages:document.context"]),
    "a PDF's address": (user(source("url", "document", url="https://x/a.pdf")), [said({"type": "input_file", "file_url": "https://x/a.pdf"})], []),
    "a text document": (user({**source("text", "document", media_type="text/plain", data="D"), "title": "T"}), [said(part("T\n\nD"))], []),
    "a document of blocks": (user(source("content", "document", content=[text("x"), text("y")])), [said(part("x"), part("y"))], []),
    "a document of a string": (user(source("content", "document", content="x")), [said(part("x"))], []),
    "a search result": (user({"type": "search_result", "source": "https://x", "title": "T", "content": [text("r")]}),
                        [said(part("T\nhttps://x\n\nr"))], []),
    "a call and its result": ([{"role": "assistant", "content": [text("a"), {"type": "tool_use", "id": "toolu_1", "name": "get", "input": {"a": "é"}}]},
                               *user({"type": "tool_result", "tool_use_id": "toolu_1", "content": "done"}, text("go on"))],
                              [said(part("a"), role="assistant"),
                               {"type": "function_call", "call_id": "toolu_1", "name": "get", "arguments": '{"a":"\\u00e9"}'},
                               {"type": "function_call_output", "call_id": "toolu_1", "output": "done"}, said(part("go on"))], []),
    "a failed tool": (user({"type": "tool_result", "tool_use_id": "t", "content": "no", "is_error": True}),
                      [{"type": "function_call_output", "call_id": "t", "output": "[error] no"}], []),
    "a failed tool's blocks": (user({"type": "tool_result", "tool_use_id": "t", "is_error": True, "content": [
        text("no"), source("base64", media_type="image/png", data=PNG), {"type": "tool_reference", "tool_name": "get"}]}),
        [{"type": "function_call_output", "call_id": "t", "output": [
            part("[error] "), part("no"), {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}, part("The tool get is available.")]}], []),
    "a tool without output": (user({"type": "tool_result", "tool_use_id": "t"}), [{"type": "function_call_output", "call_id": "t", "output": ""}], []),
    "thinking": ([*HI, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "t", "signature": SEALED}, {"type": "redacted_thinking", "data": SEALED},
        {"type": "thinking", "thinking": "t", "signature": pomex.UNSIGNED}, {"type": "thinking", "thinking": "t", "signature": "EqAB"},
        {"type": "redacted_thinking", "data": "x"}, text("a")]}],
        [said(part("Hi")), *[{"type": "reasoning", "summary": [], "encrypted_content": SEALED}] * 2, said(part("a"), role="assistant")],
        ["messages:thinking", "messages:redacted_thinking"]),
    "blocks of server tools": ([*HI, {"role": "assistant", "content": [
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}, {"type": "mcp_tool_use", "id": "m"},
        {"type": "container_upload", "file_id": "f"}, {"type": "item_reference", "id": "x"}, text("a")]}],
        [said(part("Hi")), said(part("a"), role="assistant")],
        [f"messages:{kind}" for kind in ("server_tool_use", "web_search_tool_result", "mcp_tool_use", "container_upload", "item_reference")]),
    "a compaction": ([{"role": "assistant", "content": [{"type": "compaction", "content": "All so far."}, {"type": "compaction", "content": None}]},
                      *HI], [said(part("All so far."), role="assistant"), said(part("Hi"))], []),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_becomes_items(name):
    messages, items, lost = CONVERSATIONS[name]
    request = parse(body(messages)).translated()
    assert request.input == items
    assert [field for field in request.body if field.startswith("messages:")] == lost
    assert request.stream is False and request.model == "m/x" and request.get("max_output_tokens") == 100


@pytest.mark.parametrize("wire", pomex.WIRES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_wire_encodes_every_conversation(wire, name):
    sent, dropped = encoded(body(CONVERSATIONS[name][0], tools=[TOOL]), wire, provider="other")
    known = json.dumps(sent)
    assert "pmx1." not in known
    if wire in ("chat", "gemini", "responses"):
        assert set(CONVERSATIONS[name][2]) <= set(dropped)
        assert "EqAB" not in known and "cache_control" not in known


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "name": "answer", "schema": SCHEMA}
# fields -> those of Responses (of body, or instructions, tools), names of what is lost on the wire of Responses
FIELDS = {
    "system": ({"system": "S"}, {"instructions": "S"}, []),
    "system blocks": ({"system": [text("a"), {**text("b"), "cache_control": {"type": "ephemeral"}}]}, {"instructions": "a\n\nb"}, []),
    "Claude Code's billing header": ({"system": [text("x-anthropic-billing-header: cc_version=2;"), text("b")]}, {"instructions": "b"},
                                     ["system:x-anthropic-billing-header"]),
    "a budget": ({"thinking": {"type": "enabled", "budget_tokens": 16000}}, {"reasoning": {"effort": "medium", "summary": "auto"}}, []),
    "a large budget": ({"thinking": {"type": "enabled", "budget_tokens": 31999}}, {"reasoning": {"effort": "high", "summary": "auto"}}, []),
    "the least budget": ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"reasoning": {"effort": "low", "summary": "auto"}}, []),
    "adaptive": ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "xhigh"}}, {"reasoning": {"effort": "xhigh", "summary": "auto"}}, []),
    "adaptive, not shown": ({"thinking": {"type": "adaptive", "display": "omitted"}}, {"reasoning": {"effort": None, "summary": None}}, []),
    "off": ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, {"reasoning": {"effort": "none"}}, []),
    "effort alone": ({"output_config": {"effort": "low"}}, {"reasoning": {"effort": "low", "summary": None}}, []),
    "a format": ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, {"text": {"format": FORMAT}}, []),
    "an older format": ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, {"text": {"format": FORMAT}}, []),
    "sampling": ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}, []),
    "stop": ({"stop_sequences": ["END"], "top_k": 5}, {"stop": ["END"], "top_k": 5}, ["stop_sequences", "top_k"]),
    "the user": ({"metadata": {"user_id": "u"}}, {"safety_identifier": "u"}, ["metadata.user_id"]),
    "a long user": ({"metadata": {"user_id": "u" * 100}}, {"safety_identifier": pomex.sha256_hex("u" * 100)}, ["metadata.user_id"]),
    "tiers": ({"service_tier": "standard_only", "speed": "standard"}, {"service_tier": "default"}, []),
    "fast": ({"speed": "fast"}, {}, ["speed"]),
    "Anthropic's own": ({"context_management": {"edits": []}, "container": "c", "mcp_servers": [{}], "inference_geo": "us",
                         "output_config": {"task_budget": {}}, "thinking": {"type": "adaptive", "block_binding": {}}, "cache_control": {}},
                        {}, ["container", "context_management", "inference_geo", "mcp_servers", "output_config.task_budget", "thinking.block_binding"]),
    "fields of another API": ({"input": "x", "store": True, "background": True, "stop": "x", "previous_response_id": "r", "text": 1},
                              {}, [f"messages:{n}" for n in ("background", "input", "previous_response_id", "stop", "store", "text")]),
    "a tool": ({"tools": [{**TOOL, "type": "custom", "cache_control": {}, "eager_input_streaming": True, "input_examples": [{}]}]},
               {"tools": [{"type": "function", "name": "get", "description": "Gets.", "parameters": TOOL["input_schema"], "input_examples": [{}]}]},
               ["tools:function.input_examples"]),
    "web search": ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 3, "allowed_domains": ["a.b"],
                               "user_location": {"type": "approximate", "city": "Bern"}}]},
                   {"tools": [{"type": "web_search", "filters": {"allowed_domains": ["a.b"]}, "max_uses": 3,
                               "user_location": {"type": "approximate", "city": "Bern"}}]}, ["tools:web_search", "tools:web_search.max_uses"]),
    "other server tools": ({"tools": [{"type": "bash_20250124", "name": "bash"}, {"type": "code_execution_20250825", "name": "code_execution"}]},
                           {}, ["tools:bash_20250124", "tools:code_execution_20250825"]),
    "deferred tools are offered": ({"tools": [{**TOOL, "defer_loading": True}, {"name": "DeferredToolPlaceholder", "input_schema": {}, "defer_loading": True}]},
                                   {"tools": [{"type": "function", "name": "get", "description": "Gets.", "parameters": TOOL["input_schema"]}]}, []),
    "auto": ({"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, {"tool_choice": "auto", "parallel_tool_calls": False}, []),
    "any": ({"tools": [TOOL], "tool_choice": {"type": "any"}}, {"tool_choice": "required", "parallel_tool_calls": True}, []),
    "no tool": ({"tools": [TOOL], "tool_choice": {"type": "none"}}, {"tool_choice": "none"}, []),
    "one tool": ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "get"}}, {"tool_choice": {"type": "function", "name": "get"}}, []),
    "nulls": (dict.fromkeys(("system", "tools", "tool_choice", "thinking", "metadata", "stream", "temperature")), {}, []),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_becomes_one_of_responses(name):
    given, expected, lost = FIELDS[name]
    request = parse(body(**given)).translated()
    for field, value in expected.items():
        assert getattr(request, field, request.body.get(field)) == value
    assert sorted(encoded(body(**given))[1]) == lost


def test_the_sealed_reasoning_is_asked_for_and_the_limit_goes_up():
    sent, dropped = encoded(body())
    assert sent == {"model": "up", "input": [{"type": "message", "role": "user", "content": [part("Hi")]}], "max_output_tokens": 100,
                    "include": ["reasoning.encrypted_content"], "stream": False, "store": False}
    assert dropped == []


BAD = {
    "no model": ({"model": None}, "model", "Missing required parameter: model."),
    "a model's type": ({"model": 5}, "model", "model must be a string, not an integer."),
    "max_tokens": ({"max_tokens": 0}, "max_tokens", "max_tokens: its value must be at least 1."),
    "no messages": ({"messages": None}, "messages", "Missing required parameter: messages."),
    "empty": ({"messages": []}, "messages", "messages have no content."),
    "without content": ({"messages": user()}, "messages", "messages have no content."),
    "a message": ({"messages": ["Hi"]}, "messages[0]", "messages[0] must be an object, not a string."),
    "a role": ({"messages": [*HI, {"role": "tool", "content": "x"}]}, "messages[1].role", "messages[1].role must be one of user, assistant, system."),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "messages[0].content must be a string or an array, not an integer."),
    "no block": ({"messages": user("x")}, "messages[0].content[0]", "messages[0].content[0] must be an object with a type."),
    "a text": ({"messages": user(text("a"), {"type": "text", "text": 5})}, "messages[0].content[1].text", "messages[0].content[1].text must be a string, not an integer."),
    "a source": ({"messages": user({"type": "image"})}, "messages[0].content[0].source", "Missing required parameter: messages[0].content[0].source."),
    "its data": ({"messages": user(source("base64", media_type="image/png"))}, "messages[0].content[0].source.data",
                 "Missing required parameter: messages[0].content[0].source.data."),
    "its address": ({"messages": user(source("url", url=5))}, "messages[0].content[0].source.url", "messages[0].content[0].source.url must be a string, not an integer."),
    "its type": ({"messages": user(source("base64", data="x"))}, "messages[0].content[0].source.media_type",
                 "Missing required parameter: messages[0].content[0].source.media_type."),
    "an input": ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "n", "input": "x"}]}]},
                 "messages[0].content[0].input", "messages[0].content[0].input must be an object, not a string."),
    "a result": ({"messages": user({"type": "tool_result", "content": "x"})}, "messages[0].content[0].tool_use_id",
                 "Missing required parameter: messages[0].content[0].tool_use_id."),
    "a result's block": ({"messages": user({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text"}]})},
                         "messages[0].content[0].content[0].text", "Missing required parameter: messages[0].content[0].content[0].text."),
    "system": ({"system": [5]}, "system[0]", "system[0] must be an object with a type."),
    "a tool": ({"tools": ["x"]}, "tools[0]", "tools[0] must be an object, not a string."),
    "a tool's name": ({"tools": [{"input_schema": {}}]}, "tools[0].name", "Missing required parameter: tools[0].name."),
    "a tool's schema": ({"tools": [{"name": "x"}]}, "tools[0].input_schema", "Missing required parameter: tools[0].input_schema."),
    "a choice": ({"tools": [TOOL], "tool_choice": {"type": "x"}}, "tool_choice.type", "tool_choice.type must be one of auto, any, none, tool."),
    "a choice's name": ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name", "Missing required parameter: tool_choice.name."),
    "an unknown tool": ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice", "tool_choice names 'x', which is not among the tools."),
    "an empty thinking": ({"thinking": {}}, "thinking.type", "Missing required parameter: thinking.type."),
    "thinking": ({"thinking": {"type": "x"}}, "thinking.type", "thinking.type must be one of enabled, adaptive, disabled, between_tools."),
    "no kind of thinking": ({"thinking": {"budget_tokens": 5}}, "thinking.type", "Missing required parameter: thinking.type."),
    "no budget": ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "Missing required parameter: thinking.budget_tokens."),
    "an effort": ({"output_config": {"effort": 5}}, "output_config.effort", "output_config.effort must be a string or null, not an integer."),
    "a format": ({"output_config": {"format": {"type": "json"}}}, "output_config.format.type", "output_config.format.type must be one of json_schema."),
    "a format's schema": ({"output_format": {"type": "json_schema"}}, "output_config.format.schema", "Missing required parameter: output_config.format.schema."),
    "a user": ({"metadata": {"user_id": 5}}, "metadata.user_id", "metadata.user_id must be a string or null, not an integer."),
    "stop": ({"stop_sequences": [5]}, "stop_sequences[0]", "stop_sequences[0] must be a string, not an integer."),
    "temperature": ({"temperature": 3}, "temperature", "temperature: its value must be between 0 and 2."),
    "stream": ({"stream": "yes"}, "stream", "stream must be true or false, not a string."),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_named_by_its_own_path(name):
    changes, param, message = BAD[name]
    with pytest.raises(pomex.BadRequest) as refused:
        parse(body(**{"messages": HI, **changes})).translated()
    assert (refused.value.param, str(refused.value)) == (param, message)
    assert pomex.messages_error(refused.value, "req_1") == {
        "type": "error", "error": {"type": "invalid_request_error", "message": message}, "request_id": "req_1"}


def test_a_grown_conversation_is_translated_only_where_it_grew(monkeypatch):
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"{n} " * 100} for n in range(41)]
    first = parse(body(messages[:39]))
    first.translated()
    seen = []
    plain = pomex.message_items
    monkeypatch.setattr(pomex, "message_items", lambda message, *more: seen.append(message) or plain(message, *more))
    second = parse(body(messages), first)
    assert [item["content"][0]["text"] for item in second.translated().input] == [m["content"] for m in messages]
    assert seen == messages[39:]


# --- answers ------------------------------------------------------------------------------------------

def check(raw):
    """All rules of one whole stream. Returns the message, or the error."""
    message, open_block, ended, truncated = None, None, False, False
    for block in raw.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        kind = event["type"]
        assert name == f"event: {kind}" and not ended
        if kind == "message_start":
            assert message is None and event["message"]["content"] == [] and event["message"]["stop_reason"] is None
            message = event["message"]
            assert message["type"] == "message" and message["role"] == "assistant" and message["id"].startswith("msg_")
        elif kind == "content_block_start":
            assert open_block is None and event["index"] == len(message["content"]) and message["stop_reason"] is None
            open_block = dict(event["content_block"])
            given = []
        elif kind == "content_block_delta":
            assert event["index"] == len(message["content"])
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                given.append(delta["partial_json"])
            elif delta["type"] == "citations_delta":
                open_block.setdefault("citations", []).append(delta["citation"])
            elif delta["type"].removesuffix("_delta") in delta:
                field = delta["type"].removesuffix("_delta")
                open_block[field] = open_block.get(field, "") + delta[field]
        elif kind == "content_block_stop":
            assert event["index"] == len(message["content"])
            if "".join(given):
                try:
                    open_block["input"] = json.loads("".join(given))
                except ValueError:
                    truncated = True
            message["content"].append(open_block)
            open_block = None
        elif kind == "message_delta":
            assert open_block is None
            message |= event["delta"]
            assert not truncated or message["stop_reason"] == "max_tokens"
            message["usage"] = {**message["usage"], **event["usage"]}
        elif kind == "message_stop":
            assert message["stop_reason"]
            ended = True
        elif kind == "error":
            ended = True
            message = {"error": event["error"], "so_far": message}
        else:
            assert kind == "ping" and event == {"type": "ping"}
    assert ended
    return message


def answer(wire, upstream, pieces=None, stream=True, messages=HI, cut=None, **fields):
    """The client's bytes for an upstream's bytes."""
    ctx, api = context(parse(body(messages, stream=stream, **fields)), wire)
    call = api.call(ctx)
    attempt = call.attempt
    data = upstream if isinstance(upstream, bytes) else b"".join(upstream)
    failure = None
    try:
        for at in range(0, len(data), pieces or len(data) or 1):
            if not attempt.upstream_done:
                attempt.feed(data[at:at + (pieces or len(data))])
        if cut is None:
            attempt.end()
    except pomex.GatewayError as error:
        failure = error
    attempt.finish(failure or cut)
    if stream:
        return attempt.terminal(5), attempt
    return (attempt.body(5) if attempt.error is None else ""), attempt


def item_event(kind, item, index=0, **more):
    return {"type": f"response.output_item.{kind}", "output_index": index, "item": item, **more}


def responses(*events):
    return [f"event: {e['type']}\ndata: {json.dumps({**e, 'sequence_number': n})}\n\n".encode() for n, e in enumerate(events)]


def done_of(*items, status="completed", **more):
    usage = {"input_tokens": 30, "input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 2}, "output_tokens": 5,
             "output_tokens_details": {"reasoning_tokens": 1}, "total_tokens": 35}
    return {"type": f"response.{status}", "response": {"id": "r", "object": "response", "status": status, "output": list(items),
                                                       "usage": usage, **more}}


def function(name="get", arguments='{"a":"b"}', id="fc_1", call_id="call_aaaaaaaaaaaa", **more):
    return {"type": "function_call", "id": id, "call_id": call_id, "name": name, "arguments": arguments, "status": "completed", **more}


MESSAGE = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
           "content": [{"type": "output_text", "text": "Hello", "annotations": [
               {"type": "url_citation", "start_index": 0, "end_index": 5, "url": "https://x", "title": "X"}]}]}
REASONING = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "One."}, {"type": "summary_text", "text": "Two."}],
             "encrypted_content": "gAAAA"}
CITED = {"type": "web_search_result_location", "cited_text": "", "encrypted_index": "pmx1.", "title": "X", "url": "https://x"}
CALL = {"type": "tool_use", "id": "call_aaaaaaaaaaaa", "name": "get", "input": {"a": "b"}}
COUNTS = {"input_tokens": 20, "cache_creation_input_tokens": 2, "cache_read_input_tokens": 8, "output_tokens": 5}


def thought(words, **replay):
    return {"type": "thinking", "thinking": words, "signature": ENVELOPE.seal("p", "up", replay) if replay else "pmx1."}


# wire, upstream -> content, stop_reason
ANSWERS = {
    "text with a source": ("responses", responses(item_event("done", MESSAGE), done_of(MESSAGE)), [{**text("Hello"), "citations": [CITED]}], "end_turn"),
    "thoughts, then a call": ("responses", responses(item_event("done", REASONING), item_event("done", function(), 1), done_of(REASONING, function())),
                              [thought("One.\n\nTwo.", encrypted_content="gAAAA", id="rs_1"), CALL], "tool_use"),
    "thoughts that are sealed alone": ("responses", responses(item_event("done", {**REASONING, "summary": []}), item_event("done", MESSAGE, 1),
                                                              done_of({**REASONING, "summary": []}, MESSAGE)),
                                       [{"type": "redacted_thinking", "data": ENVELOPE.seal("p", "up", {"encrypted_content": "gAAAA", "id": "rs_1"})},
                                        {**text("Hello"), "citations": [CITED]}], "end_turn"),
    "a custom call": ("responses", responses(item_event("done", {"type": "custom_tool_call", "id": "ctc_1", "call_id": "call_bbbbbbbbbbbb", "name": "patch",
                                                                 "input": "raw", "status": "completed"}), done_of()),
                      [{"type": "tool_use", "id": "call_bbbbbbbbbbbb", "name": "patch", "input": {"input": "raw"}}], "tool_use"),
    "calls at once": ("responses", responses(
        item_event("added", function(arguments="", status="in_progress")),
        item_event("added", function("put", "", "fc_2", "call_cccccccccccc", status="in_progress"), 1),
        {"type": "response.function_call_arguments.delta", "item_id": "fc_2", "output_index": 1, "delta": '{"a":'},
        {"type": "response.function_call_arguments.delta", "item_id": "fc_1", "output_index": 0, "delta": '{"a":"b"}'},
        {"type": "response.function_call_arguments.delta", "item_id": "fc_2", "output_index": 1, "delta": "1}"},
        item_event("done", function("put", '{"a":1}', "fc_2", "call_cccccccccccc"), 1), item_event("done", function()), done_of()),
        [CALL, {"type": "tool_use", "id": "call_cccccccccccc", "name": "put", "input": {"a": 1}}], "tool_use"),
    "cut by length": ("responses", responses(item_event("done", MESSAGE), done_of(MESSAGE, status="incomplete", incomplete_details={"reason": "max_output_tokens"})),
                      [{**text("Hello"), "citations": [CITED]}], "max_tokens"),
    "stopped by a filter": ("responses", responses(done_of(status="incomplete", incomplete_details={"reason": "content_filter"})),
                            [text(pomex.FILTERED)], "refusal"),
    "a refusal": ("responses", responses(item_event("done", {**MESSAGE, "content": [{"type": "refusal", "refusal": "No."}]}), done_of()), [text("No.")], "end_turn"),
    "chat": ("chat", chat({"reasoning_content": "Hm"}, {"content": "He"}, {"content": "llo"}), [thought("Hm"), text("Hello")], "end_turn"),
    "chat with calls": ("chat", chat({"tool_calls": [{"index": 0, "id": "call_0", "function": {"name": "get", "arguments": ""}}]},
                                     {"tool_calls": [{"index": 1, "id": "call_dddddddddddd", "function": {"name": "get", "arguments": '{"a":'}}]},
                                     {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":"b"}'}}]},
                                     {"tool_calls": [{"index": 1, "function": {"arguments": "2}"}}]}, finish="tool_calls"),
                        [{**CALL, "id": "fc_0123456789_0__call_0"}, {**CALL, "id": "call_dddddddddddd", "input": {"a": 2}}], "tool_use"),
    "a call without arguments": ("chat", chat({"tool_calls": [{"index": 0, "id": "call_aaaaaaaaaaaa", "function": {"name": "get", "arguments": ""}}]}, finish="tool_calls"),
                                 [{**CALL, "input": {}}], "tool_use"),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("pieces", [None, 1, 7])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer(name, pieces, stream):
    wire, upstream, content, reason = ANSWERS[name]
    given, _ = answer(wire, upstream, pieces, stream, tools=[TOOL])
    message = check(given) if stream else json.loads(given)
    assert message["content"] == content and message["stop_reason"] == reason
    assert message["model"] == "m/x" and message["id"] == "msg_0123456789" and message["stop_sequence"] is None
    counts = COUNTS if wire == "responses" else {**COUNTS, "input_tokens": 12, "cache_creation_input_tokens": 0}
    assert message["usage"] == counts


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_cut_after_any_event_ends_once(name):
    wire, upstream, content, _ = ANSWERS[name]
    events = (b"".join(upstream) if isinstance(upstream, list) else upstream).split(b"\n\n")
    for count in range(len(events)):
        lost = pomex.UpstreamError("The connection broke.")
        given, attempt = answer(wire, b"".join(event + b"\n\n" for event in events[:count]), cut=lost, tools=[TOOL])
        message = check(given)
        assert ("error" in message) == (attempt.error is not None)
        so_far = message.get("so_far") or message
        assert [block["type"] for block in so_far.get("content", [])] == [block["type"] for block in content][:len(so_far.get("content", []))]


def test_a_failure_is_the_last_event_and_in_anthropics_form():
    kinds = {400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
             405: "invalid_request_error", 413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 502: "api_error",
             503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error"}
    assert {status: pomex.messages_error(pomex.GatewayError("x", status=status), "")["error"]["type"] for status in kinds} == kinds
    assert pomex.messages_error(pomex.GatewayError("x", status=429, code="insufficient_quota"), "")["error"]["type"] == "billing_error"
    given, _ = answer("chat", chat({"content": "He"}, finish=None, usage=False, done=False) + b'data: {"error":{"message":"Overloaded","code":503}}\n\n')
    message = check(given)
    assert message["error"] == {"type": "overloaded_error", "message": "Overloaded"} and message["so_far"]["content"] == [text("He")]


def test_errors_have_the_words_and_types_that_claude_code_knows():
    """It compacts after "prompt is too long", and asks no more after a billing error (measured)."""
    def shown(words, code):
        error = pomex.BadRequest(words, code=code)
        pomex.CLIENT_APIS["messages"].adapt_error(error)
        return pomex.messages_error(error, "")["error"]
    assert shown("Too many tokens.", "context_length_exceeded") == {"type": "invalid_request_error", "message": "Prompt is too long. Too many tokens."}
    assert shown("prompt is too long: 9 > 8", "context_length_exceeded")["message"] == "prompt is too long: 9 > 8"
    assert shown("No price.", "price_unknown")["type"] == "billing_error"


def test_claude_code_gets_a_filtered_answer_as_text():
    wire, upstream, content, _ = ANSWERS["stopped by a filter"]
    profile = pomex.client_profile("", "claude-cli/2.1.332 (external, sdk-cli)")
    ctx, api = context(parse(body(stream=True)), wire)
    ctx.answer.profile = profile
    attempt = api.call(ctx).attempt
    attempt.feed(b"".join(upstream))
    attempt.finish()
    message = check(attempt.terminal(5))
    assert message["content"] == content and message["stop_reason"] == "end_turn" and profile is pomex.CLAUDE_CODE


def test_the_heartbeat_is_a_ping_and_the_early_start_has_the_estimate():
    ctx, _ = context(parse(body(stream=True)))
    assert ctx.answer.heartbeat() == b'event: ping\ndata: {"type":"ping"}\n\n'
    opened = json.loads(ctx.answer.start().split(b"data: ")[1])["message"]
    assert opened["usage"]["input_tokens"] == ctx.request.estimated_input > 0 and ctx.answer.start() == b""


def test_an_empty_text_is_no_block():
    """Anthropic refuses one when it comes back."""
    empty = {**MESSAGE, "content": [{"type": "output_text", "text": "", "annotations": []}]}
    for stream in (True, False):
        given, _ = answer("responses", responses(item_event("done", empty), done_of(empty)), stream=stream)
        message = check(given) if stream else json.loads(given)
        assert message["content"] == [] and message["stop_reason"] == "end_turn"


@pytest.mark.parametrize("wire", ["responses", "chat", "gemini"])
def test_a_tools_image_and_reference_and_later_instructions_reach_every_wire(wire):
    call = {"type": "tool_use", "id": "toolu_0123456789", "name": "get", "input": {"a": "1"}}
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [
        source("base64", media_type="image/png", data=PNG), {"type": "tool_reference", "tool_name": "WebFetch"}]}
    messages = [*HI, {"role": "system", "content": "FIRST"}, {"role": "assistant", "content": [call]}, *user(result, text("loaded")),
                {"role": "system", "content": "LAST"}]
    sent, dropped = encoded(body(messages, tools=[TOOL]), wire)
    known = json.dumps(sent["input"] if wire == "responses" else sent.get("messages") or sent["contents"])
    places = [known.index(word) for word in ("Hi", "FIRST", call["id"], "loaded", "LAST")]
    assert places == sorted(places) and PNG in known and "The tool WebFetch is available." in known and dropped == []


def test_many_items_at_once_take_linear_time():
    events = []
    for n in range(1500):
        events.append(item_event("added", function("get", "", f"fc_{n}", f"call_{n:012}", status="in_progress"), n))
    for n in reversed(range(1500)):
        events.append(item_event("done", function("get", '{"a":"b"}', f"fc_{n}", f"call_{n:012}"), n))
    given, _ = answer("responses", responses(*events, done_of()), tools=[TOOL])
    assert [block["id"] for block in check(given)["content"]] == [f"call_{n:012}" for n in range(1500)]


# --- passthrough ---------------------------------------------------------------------------------------

def anthropic(*blocks, reason="end_turn", stop=True, start=None):
    """A Messages stream as Anthropic sends it, with its padding."""
    usage = {"input_tokens": 20, "cache_creation_input_tokens": 2, "cache_read_input_tokens": 8, "output_tokens": 1}
    events = [{"type": "message_start", "message": {"model": "claude-up", "id": "msg_theirs", "type": "message", "role": "assistant", "content": [],
                                                    "stop_reason": None, "stop_sequence": None, "usage": usage, **(start or {})}}]
    for index, (block, *deltas) in enumerate(blocks):
        events += [{"type": "content_block_start", "index": index, "content_block": block}, *([{"type": "ping"}] if not index else []),
                   *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
                   {"type": "content_block_stop", "index": index}]
    if reason:
        events.append({"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": {"output_tokens": 5}})
    events += [{"type": "message_stop"}] if stop else []
    return [f"event: {e['type']}\ndata: {json.dumps(e, ensure_ascii=False, separators=(',', ':'))[:-1]}  }}\n\n".encode() for e in events]


THINKS = ({"type": "thinking", "thinking": "", "signature": ""}, {"type": "thinking_delta", "thinking": "Hm é"}, {"type": "signature_delta", "signature": "EqAB"})
SPEAKS = (text(""), {"type": "text_delta", "text": 'He"llo'}, {"type": "text_delta", "text": " input_json_delta"})
CALLS = ({"type": "tool_use", "id": "toolu_1", "name": "get", "input": {}}, {"type": "input_json_delta", "partial_json": ""},
         {"type": "input_json_delta", "partial_json": '{"a":'}, {"type": "input_json_delta", "partial_json": '"b"}'})
CUT = (*CALLS[:3],)
PASSED = {
    "text": anthropic(SPEAKS),
    "thinking, text, a call": anthropic(THINKS, SPEAKS, CALLS, reason="tool_use"),
    "redacted": anthropic(({"type": "redacted_thinking", "data": "x"},), SPEAKS),
    "a call without input": anthropic((CALLS[0],), reason="tool_use"),
    "a search": anthropic(({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}, {"type": "input_json_delta", "partial_json": '{"query":"x"}'}),
                          ({"type": "web_search_tool_result", "tool_use_id": "s", "content": []},), SPEAKS, reason="pause_turn"),
    "a call cut by length": anthropic(SPEAKS, CUT, reason="max_tokens"),
    "a refusal": anthropic(SPEAKS, reason="refusal"),
    "nothing, but counted": anthropic(),
    "a stop sequence": anthropic(SPEAKS, reason="stop_sequence"),
}


def with_model(events):
    return b"".join(events).replace(b'"model":"claude-up"', b'"model":"m/x"', 1)


@pytest.mark.parametrize("pieces", [None, 1, 100])
@pytest.mark.parametrize("name", PASSED)
def test_an_answer_of_anthropic_passes_byte_for_byte_but_for_the_model(name, pieces):
    given, attempt = answer("messages", PASSED[name], pieces)
    assert given == with_model(PASSED[name])
    assert attempt.error is None and attempt.terminal_by == "upstream"
    assert (attempt.usage.input, attempt.usage.cached, attempt.usage.cache_write, attempt.usage.output) == (30, 8, 2, 5)
    assert attempt.status == ("incomplete" if name in ("a call cut by length", "a refusal", "a search") else "completed")


def test_nothing_of_the_end_is_sent_before_terminal():
    ctx, api = context(parse(body(stream=True)), "messages")
    attempt = api.call(ctx).attempt
    attempt.feed(b"".join(PASSED["text"]))
    assert attempt.upstream_done
    before = attempt.take_output()
    assert b"content_block_stop" in before and b"message_delta" not in before and b"message_stop" not in before
    attempt.finish()
    assert before + attempt.terminal(5) == with_model(PASSED["text"])


def test_an_early_start_is_ours_and_the_upstreams_is_left_out():
    ctx, api = context(parse(body(stream=True)), "messages")
    attempt = api.call(ctx).attempt
    early = ctx.answer.start() + ctx.answer.heartbeat()
    attempt.feed(b"".join(PASSED["text"]))
    attempt.finish()
    message = check(early + attempt.terminal(5))
    assert message["id"] == "msg_0123456789" and message["usage"]["output_tokens"] == 5 and message["stop_reason"] == "end_turn"


ENDS = {
    "no message_stop": (PASSED["text"][:-1], "end_turn", ""),
    "only message_stop": (anthropic(SPEAKS, reason=""), "end_turn", ""),
    "only message_stop, after a call": (anthropic(CALLS, reason=""), "tool_use", ""),
    "[DONE] too": ([*PASSED["text"][:-1], b"data: [DONE]\n\n", PASSED["text"][-1]], "end_turn", ""),
    "a block left open": ([*anthropic(SPEAKS)[:-3], *anthropic(SPEAKS)[-2:]], "end_turn", ""),
    "no end": (anthropic(SPEAKS, reason="", stop=False), "", "before the model had finished"),
    "a call cut, but finished": (anthropic(CUT, reason="tool_use"), "", "not one whole JSON object"),
    "a call cut, then text": (anthropic(CUT, SPEAKS), "", "not one whole JSON object"),
    "a call cut, no reason": (anthropic(CUT, reason=""), "", "not one whole JSON object"),
    "NaN": (anthropic((CALLS[0], {"type": "input_json_delta", "partial_json": '{"a":NaN}'}), reason="tool_use"), "", "not one whole JSON object"),
    "overloaded": ([*PASSED["text"][:4], b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n'], "", "Overloaded"),
    "an error after the reason": ([*PASSED["text"][:-1], b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"Broke"}}\n\n'], "", "Broke"),
    "an error without a type": ([*PASSED["text"][:4], b'data: {"error":{"message":"Overloaded"}}\n\n'], "", "Overloaded"),
    "an error by its name": ([*PASSED["text"][:4], b'event: error\ndata: {"message":"Overloaded"}\n\n'], "", "Overloaded"),
    "a second message": ([*PASSED["text"][:4], anthropic(SPEAKS, start={"id": "msg_2"})[0]], "", "spliced"),
    "no JSON": ([*PASSED["text"][:4], b"event: content_block_stop\ndata: {\n\n"], "", "cannot be read"),
    "heartbeats of a proxy": ([PASSED["text"][0], b"event: ping\ndata: {}\n\n", b": hi\n\n", *PASSED["text"][1:]], "end_turn", ""),
    "the start twice": ([PASSED["text"][0], *PASSED["text"]], "end_turn", ""),
}


@pytest.mark.parametrize("pieces", [None, 1])
@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_passed_stream(name, pieces):
    upstream, reason, error = ENDS[name]
    given, attempt = answer("messages", upstream, pieces)
    if name == "heartbeats of a proxy":
        given = given.replace(b"event: ping\ndata: {}\n\n", b"")
    message = check(given)
    if error:
        assert error in message["error"]["message"] and (attempt.status == "failed")
    else:
        assert message["stop_reason"] == reason and attempt.error is None


@pytest.mark.parametrize("name", PASSED)
def test_a_passed_stream_that_is_cut_after_any_event_ends_once(name):
    for count in range(len(PASSED[name])):
        given, attempt = answer("messages", PASSED[name][:count], cut=pomex.UpstreamError("The connection broke."))
        finished = count >= len(PASSED[name]) - 1
        assert (attempt.error is None) == finished
        assert ("error" in check(given)) != finished


@pytest.mark.parametrize("name", PASSED)
def test_an_object_for_a_client_that_streams_becomes_a_stream(name):
    if name == "a call cut by length":
        pytest.skip("its input is no JSON")
    whole = check(with_model(PASSED[name]))
    ctx, api = context(parse(body(stream=True)), "messages")
    attempt = api.call(ctx).attempt
    attempt.whole(json.dumps({**whole, "model": "claude-up"}).encode())
    attempt.finish()
    assert check(attempt.terminal(5)) == {**whole, "stop_details": None} and attempt.status != "failed"


def test_a_stream_for_a_client_that_does_not_stream_is_an_error():
    _, attempt = answer("messages", PASSED["text"], stream=False)
    assert "was not asked for" in str(attempt.error) and attempt.status == "failed"


def test_a_whole_answer_passes_but_for_the_model():
    for content in ([text("Hé")], [text("x"), {**CALL, "input": {"model": "sonnet"}}]):
        sent = {"model": "claude-up", "id": "msg_1", "type": "message", "role": "assistant", "content": content, "stop_reason": "end_turn",
                "usage": {"input_tokens": 3, "output_tokens": 2}}
        raw = json.dumps(sent, ensure_ascii=False, indent=1)
        ctx, api = context(parse(body()), "messages")
        attempt = api.call(ctx).attempt
        attempt.whole(raw.encode())
        attempt.finish()
        assert json.loads(attempt.body(5)) == {**sent, "model": "m/x"} and attempt.usage.output == 2


def test_a_whole_error_is_an_error():
    ctx, api = context(parse(body()), "messages")
    attempt = api.call(ctx).attempt
    attempt.whole(b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}')
    attempt.finish()
    assert str(attempt.error) == "Overloaded" and attempt.error.status == 503


def test_a_key_whose_money_is_used_up_ends_the_open_block():
    ctx, api = context(parse(body(stream=True)), "messages")
    attempt = api.call(ctx).attempt
    attempt.feed(b"".join(PASSED["text"][:4]))
    attempt.set_stop(pomex.Stop("max_output_tokens"))
    attempt.finish()
    message = check(attempt.terminal(5))
    assert message["stop_reason"] == "max_tokens" and message["content"] == [text('He"llo')]


# --- what goes up where it passes --------------------------------------------------------------------------

def upward(raw, **more):
    ctx, api = context(parse(raw), "messages", **more)
    return api.call(ctx)


def test_the_body_goes_up_byte_for_byte_if_the_place_of_the_model_is_certain():
    raw = ('{ "model" : "m/x","max_tokens":100, "messages":[{"role":"user","content":[{"type":"text","text":"h\\u00e9 é","cache_control":{"type":"ephemeral","ttl":"1h"}}]},'
           '{"role":"assistant","content":[{"type":"tool_use","id":"t","name":"n","input":{"model":"sonnet"}}]}], "future": 1.0 }').encode()
    call = upward(raw)
    assert list(json.loads(call.body).items()) == list(json.loads(raw.replace(b'"m/x"', b'"up"', 1)).items()) and call.dropped == []
    plain = raw.replace(b'{"model":"sonnet"}', b'{"of":"sonnet"}')
    assert upward(plain).body == plain.replace(b'"m/x"', b'"up"')
    assert call.headers == [("anthropic-version", "2023-06-01")] and call.path == "/messages"
    last = json.dumps({"max_tokens": 5, "messages": HI, "model": "m/x", "tools": [TOOL]}).encode()
    assert upward(last).body == last.replace(b'"m/x"', b'"up"')
    mixed = json.dumps({"messages": [*HI, {"role": "assistant", "content": [{**CALL, "input": {"model": "m/x"}}]}], "max_tokens": 5, "model": "m/x"}).encode()
    assert json.loads(upward(mixed).body) == {**json.loads(mixed), "model": "up"}
    nested = b'{"metadata":{"model":"m/x"},"max_tokens":5,"messages":[{"role":"user","content":"Hi"}],"\\u006dodel":"m/x"}'
    assert json.loads(upward(nested).body)["max_tokens"] == 5


@pytest.mark.parametrize("path", sorted((SHARED / "agent-requests").glob("claude-code/*.json")) + sorted((SHARED / "agent-requests").glob("opencode-anthropic/*.json"))
                         or [pytest.param(None, marks=pytest.mark.skip(reason="no ../shared/agent-requests"))], ids=lambda path: path and f"{path.parent.name}-{path.stem}")
def test_a_real_request_goes_up_as_it_is_and_on_every_wire(path):
    given = json.loads(path.read_text())["body"]
    raw = json.dumps(given, ensure_ascii=False, separators=(",", ":")).encode()
    own = json.dumps(given["model"]).encode()
    call = upward(raw)
    assert call.body == raw.replace(b'"model":' + own, b'"model":"up"', 1) and call.dropped == []
    for wire in ("responses", "chat", "gemini"):
        sent, dropped = encoded(raw, wire)
        assert {name.partition(":")[0] for name in dropped} <= {"context_management", "system", "metadata.user_id", "thinking", "output_config.format"}
        assert "cache_control" not in json.dumps(sent)


def test_a_lower_limit_goes_up_and_the_thinking_budget_stays_below_it():
    import dataclasses
    for limit, thinking in ((5000, {"type": "enabled", "budget_tokens": 4999}), (900, {"type": "disabled"}), (20000, {"type": "enabled", "budget_tokens": 16000})):
        request = parse(body(max_tokens=32000, thinking={"type": "enabled", "budget_tokens": 16000}))
        ctx, api = context(dataclasses.replace(request, body={**request.body, "max_output_tokens": limit}), "messages")
        call = api.call(ctx)
        sent = json.loads(call.body)
        assert sent["max_tokens"] == limit and sent["thinking"] == thinking and sent["model"] == "up"
        assert call.dropped == (["thinking"] if limit == 900 else [])


def test_thoughts_keep_their_signatures_over_turns_and_nothing_foreign_goes_up():
    """Anthropic, OpenAI, Gemini, and Anthropic again: each sees its own reasoning only."""
    conversation = [*HI]

    def turn(wire, provider, upstream):
        request = parse(body(conversation, stream=True, tools=[TOOL]))
        ctx, api = context(request, wire, provider=provider)
        call = api.call(ctx)
        call.attempt.feed(b"".join(upstream))
        call.attempt.end()
        call.attempt.finish()
        message = check(call.attempt.terminal(5))
        conversation.extend([{"role": "assistant", "content": message["content"]}, *HI])
        return json.loads(call.body), call.dropped

    def thoughts(sent):
        return [block for message in sent["messages"] for block in message["content"] if isinstance(block, dict) and "thinking" in block["type"]]

    turn("messages", "anthropic", anthropic(THINKS, SPEAKS))
    own = {"type": "thinking", "thinking": "Hm é", "signature": "EqAB"}
    sent, dropped = turn("responses", "openai", responses(item_event("done", REASONING), item_event("done", MESSAGE, 1), done_of(REASONING, MESSAGE)))
    assert "EqAB" not in json.dumps(sent) and dropped == ["messages:thinking"]
    gemini = {"candidates": [{"content": {"role": "model", "parts": [{"text": "So", "thought": True}, {"functionCall": {"name": "get", "args": {}}, "thoughtSignature": "c2ln"}]},
                              "finishReason": "STOP"}], "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 2}}
    sent, dropped = turn("gemini", "google", [f"data: {json.dumps(gemini)}\n\n".encode()])
    assert "EqAB" not in json.dumps(sent) and "gAAAA" not in json.dumps(sent) and set(dropped) == {"reasoning:openai", "messages:thinking"}
    sent, dropped = turn("messages", "anthropic", anthropic(SPEAKS))
    assert thoughts(sent) == [own] and set(dropped) == {"thinking:openai", "thinking:google"}
    assert "pmx1." not in json.dumps(sent)
    sent, dropped = turn("responses", "openai", responses(item_event("done", MESSAGE), done_of(MESSAGE)))
    assert [item["encrypted_content"] for item in sent["input"] if item["type"] == "reasoning"] == ["gAAAA"]
    sent, dropped = turn("gemini", "google", [f"data: {json.dumps(gemini)}\n\n".encode()])
    assert "c2ln" in json.dumps(sent)


def test_thoughts_that_this_provider_sealed_are_opened_and_others_are_not():
    block = {"type": "thinking", "thinking": "t", "signature": "EqAB"}
    mine, theirs = ENVELOPE.seal("p", "m", {"blocks": [block]}), pomex.Envelope(b"s" * 32, "other").seal("p", "m", {"blocks": [block]})
    said = [{"type": "thinking", "thinking": "t", "signature": mine}, {"type": "redacted_thinking", "data": theirs},
            {**text("a"), "citations": [CITED, {"type": "char_location"}]}]
    call = upward(json.dumps(body([*HI, {"role": "assistant", "content": said}, *HI, {"role": "assistant", "content": said[1:2]}])).encode())
    assert json.loads(call.body)["messages"] == [*HI, {"role": "assistant", "content": [block, {**text("a"), "citations": [{"type": "char_location"}]}]}, *HI]
    assert call.dropped == ["thinking:unverified"]


# --- over loopback -----------------------------------------------------------------------------------------

async def post(world, given, path="/v1/messages", key=None, **headers):
    return await asyncio.to_thread(lambda: world.ask("POST", path, given, key, **headers))


def test_a_stream_passes_through_the_gateway(tmp_path):
    async def scenario(world):
        given = body(model="a/claude-up", stream=True)
        status, headers, raw = await post(world, given, key="", **{
            "x-api-key": world.token, "anthropic-beta": "b1,b2", "anthropic-version": "2023-06-01", "x-claude-code-session-id": "ses"})
        assert status == 200 and headers["request-id"] == headers["x-request-id"] and headers["content-type"].startswith("text/event-stream")
        assert raw == b"".join(PASSED["thinking, text, a call"]).replace(b'"model":"claude-up"', b'"model":"a/claude-up"')
        head, sent = world.upstreams["a"].asked[0]
        assert sent == {**given, "model": "claude-up"} and head.startswith("POST /v1/messages HTTP/1.1")
        assert "anthropic-beta: b1,b2\r\n" in head and head.count("anthropic-version: 2023-06-01") == 1 and "x-api-key: sk-theirs" in head
        assert world.token not in head and "x-pomex-dropped" not in headers
        row = await world.row()
        assert (row["endpoint"], row["session"], row["input"], row["cached"], row["cache_write"], row["output"], row["status"]) == (
            "/v1/messages", "ses", 30, 8, 2, 5, "completed")
    run(tmp_path, scenario, {"a": ("messages", "normalise", [sse(*PASSED["thinking, text, a call"])])})


def test_a_translated_answer_whole_and_streamed(tmp_path):
    async def scenario(world):
        for stream in (True, False):
            status, headers, raw = await post(world, body(model="c/m", stream=stream, top_k=3, context_management={}), **{"anthropic-beta": "b1"})
            message = check(raw) if stream else json.loads(raw)
            assert status == 200 and message["content"] == [text("Hello")] and message["model"] == "c/m"
            assert {"anthropic-beta", "context_management"} <= set(headers["x-pomex-dropped"].split(", "))
        head, _ = world.upstreams["c"].asked[0]
        assert "anthropic" not in head
    answers = [sse(chat({"content": "Hello"})), http_answer(200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
                                                                  "usage": {"prompt_tokens": 3, "completion_tokens": 1}})]
    run(tmp_path, scenario, {"c": ("chat", "normalise", answers)})


def test_a_limit_above_the_models_own_is_lowered_and_named(tmp_path):
    """Claude Code asks any model for 64,000 tokens."""
    async def scenario(world):
        for limit, wanted, dropped in ((64_000, 8191, "max_tokens"), (100, 100, None)):
            _, headers, _ = await post(world, body(model="mistral/mistral-small", stream=True, max_tokens=limit))
            assert world.upstreams["mistral"].asked[-1][1]["max_tokens"] == wanted and headers.get("x-pomex-dropped") == dropped
    run(tmp_path, scenario, {"mistral": ("chat", "normalise", [sse(chat({"content": "Hello"}))] * 2)})


def test_the_demo_answers(tmp_path):
    async def scenario(world):
        status, _, raw = await post(world, body(model="demo/tools", stream=True, tools=[TOOL]))
        message = check(raw)
        assert status == 200 and message["stop_reason"] == "tool_use" and message["content"][-1]["name"] == "get"
        result = {"type": "tool_result", "tool_use_id": message["content"][-1]["id"], "content": "42"}
        history = [*HI, {"role": "assistant", "content": message["content"]}, {"role": "user", "content": [result]}]
        status, _, raw = await post(world, body(history, model="demo/tools", tools=[TOOL]))
        assert status == 200 and json.loads(raw)["stop_reason"] == "end_turn"
    run(tmp_path, scenario, {})


def test_errors_are_in_anthropics_form(tmp_path):
    async def scenario(world):
        async def refused(status, kind, words, given, **headers):
            got, fields, raw = await post(world, given, **headers)
            error = json.loads(raw)
            assert (got, error["type"], error["error"]["type"]) == (status, "error", kind) and words in error["error"]["message"]
            assert error["request_id"] == fields["request-id"]
            return fields
        good = body(model="r/gpt-x")
        fields = await refused(401, "authentication_error", "No API key", good, key="")
        assert fields["x-should-retry"] == "false"
        await refused(401, "authentication_error", "two different keys", good, **{"x-api-key": "sk-rh-other"})
        await refused(400, "invalid_request_error", "max_tokens", body(model="r/gpt-x", max_tokens=None))
        await refused(400, "invalid_request_error", "messages[0].role", body([{"role": "x"}], model="r/gpt-x"))
        await refused(400, "invalid_request_error", "JSON", b"{")
        await refused(400, "invalid_request_error", "nobody", body(model="nobody/x"))
        fields = await refused(429, "rate_limit_error", "Slow", good)
        assert fields["retry-after"] == "60"
        status, _, raw = await post(world, body(model="r/gpt-x", stream=True))
        assert status == 200 and check(raw)["error"]["type"] == "api_error"
        status, _, raw = await post(world, good, "/v1/messages/batches")
        assert status == 404 and json.loads(raw)["error"]["type"] == "not_found_error"
        assert "not /v1/messages/batches. Send this to the provider itself." in json.loads(raw)["error"]["message"]
    limit = http_answer(429, {"error": {"message": "Slow down", "type": "rate_limit_error"}}, "application/json", "retry-after: 70")
    run(tmp_path, scenario, {"r": ("responses", "bytes", [limit, sse(*native()[:5])])})


def test_counting_tokens_never_begins_a_stream(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(pomex.ClientStream, "_tick", lambda self: begun.append(self))

    async def scenario(world):
        world.server.reload(pomex.dataclasses.replace(world.server.gateway.config, server=pomex.dataclasses.replace(
            world.server.gateway.config.server, early_200_after_s=0.05)))
        given = {"model": "a/claude-up", "messages": HI, "stream": True}
        for counted in (True, False):
            status, _, raw = await post(world, {**given, **({} if counted else {"max_tokens": 1})}, "/v1/messages/count_tokens")
            assert status == 200 and json.loads(raw)["input_tokens"]
        assert (await post(world, given))[0] == 400       # nor does a request without max_tokens
        await asyncio.sleep(0.1)
        assert not begun
    run(tmp_path, scenario, {"a": ("messages", "normalise", [http_answer(200, {"input_tokens": 77})] * 2)})


def test_tokens_are_counted_by_the_provider_or_estimated(tmp_path):
    async def scenario(world):
        given = {"model": "a/claude-up", "messages": HI, "system": "S"}
        status, headers, raw = await post(world, given, "/v1/messages/count_tokens", **{"anthropic-beta": "b1"})
        assert (status, json.loads(raw)) == (200, {"input_tokens": 77}) and "x-pomex-estimated" not in headers
        head, sent = world.upstreams["a"].asked[0]
        assert head.startswith("POST /v1/messages/count_tokens ") and sent == {**given, "model": "claude-up"} and "anthropic-beta: b1" in head
        for model in ("a/claude-up", "c/m"):        # the provider cannot, or knows no such thing
            status, headers, raw = await post(world, {**given, "model": model}, "/v1/messages/count_tokens")
            assert status == 200 and headers["x-pomex-estimated"] == "true" and json.loads(raw)["input_tokens"] > 5
        assert world.upstreams["c"].asked == []
        for path, bad, code in (("", {"model": "a/claude-up"}, 400), ("", {**given, "model": "nobody/x"}, 400), ("", b"[]", 400)):
            status, _, raw = await post(world, bad, "/v1/messages/count_tokens" + path)
            assert status == code and json.loads(raw)["type"] == "error"
        assert (await post(world, given, "/v1/messages/count_tokens", key="sk-rh-no"))[0] == 401
        key = await world.ledger.create_key("slow", 1_800_000_000, rpm=1)
        assert (await post(world, given, "/v1/messages/count_tokens", key=key))[0] == 200
        status, headers, raw = await post(world, given, "/v1/messages/count_tokens", key=key)
        assert (status, json.loads(raw)["error"]["type"]) == (429, "rate_limit_error") and headers["retry-after"]
    run(tmp_path, scenario, {"a": ("messages", "normalise", [http_answer(200, {"input_tokens": 77}), http_answer(404, {})]), "c": ("chat", "normalise", [b""])},
        more='[models."c/m"]\n')


def test_models_are_listed_in_a_form_that_anthropics_clients_know(tmp_path):
    async def scenario(world):
        for headers in ({"anthropic-version": "2023-06-01"}, {"x-api-key": world.token}):
            key = "" if "x-api-key" in headers else None
            listed = json.loads((await asyncio.to_thread(lambda: world.ask("GET", "/v1/models", None, key, **headers)))[2])
            assert set(listed) >= {"data", "has_more", "first_id", "last_id"} and listed["has_more"] is False
            assert listed["data"][0]["id"] == listed["first_id"] and set(listed["data"][0]) >= {"type", "id", "display_name", "created_at"}
            one = json.loads((await asyncio.to_thread(lambda: world.ask("GET", "/v1/models/c/m", None, key, **headers)))[2])
            assert one["type"] == "model" and one["id"] == "c/m" and one["created_at"].endswith("Z")
        assert json.loads((await world.get("/v1/models"))[2])["object"] == "list"
    run(tmp_path, scenario, {"c": ("chat", "normalise", [b""])}, more='[models."c/m"]\n')


def test_a_money_limit_lowers_max_tokens(tmp_path):
    async def scenario(world):
        key = await world.ledger.create_key("poor", 1_800_000_000, budget_nanos=1_000_000, period="total")
        given = body(model="a/claude-up", stream=True, max_tokens=64000)
        status, _, raw = await post(world, given, key=key)
        assert status == 200 and check(raw)["stop_reason"] == "end_turn"
        sent = world.upstreams["a"].asked[0][1]
        assert 0 < sent["max_tokens"] < 1000 and {**sent, "max_tokens": 64000} == {**given, "model": "claude-up"}
    run(tmp_path, scenario, {"a": ("messages", "normalise", [sse(*PASSED["text"])])}, more='[prices."a/claude-up"]\ninput = 1.0\noutput = 1.0\n')


def test_another_target_takes_over_before_output(tmp_path):
    async def scenario(world):
        status, headers, raw = await post(world, body(model="both", stream=True))
        assert status == 200 and headers["x-pomex-provider"] == "c" and check(raw)["content"] == [text("Hello")]
    busy = [b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n']
    run(tmp_path, scenario, {"a": ("messages", "normalise", [sse(PASSED["text"][0], *busy)]), "c": ("chat", "normalise", [sse(chat({"content": "Hello"}))])},
        more='[models.both]\ntargets = ["a:claude-up", "c:m"]\n')


def test_claude_code_need_not_repeat_what_was_tried_on_every_target(tmp_path):
    async def scenario(world):
        for agent, header in (("claude-cli/2.1.332 (external, cli)", "false"), ("Anthropic/Python 2.14", None)):
            status, headers, raw = await post(world, body(model="both"), **{"user-agent": agent})
            assert status >= 500 and headers.get("x-should-retry") == header and "a: " in json.loads(raw)["error"]["message"]
    down = http_answer(529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
    run(tmp_path, scenario, {"a": ("messages", "normalise", [down]), "c": ("chat", "normalise", [http_answer(500, {})])},
        more='[models.both]\ntargets = ["a:claude-up", "c:m"]\n')


def test_a_refused_signature_is_dropped_and_the_clients_betas_stay(tmp_path):
    async def scenario(world):
        said = {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "EqAB"}, text("a")]}
        given = body([*HI, said, *HI], model="a/claude-up", stream=True)
        status, _, raw = await post(world, given, **{"anthropic-beta": "b1"})
        assert status == 200 and check(raw)["stop_reason"] == "end_turn"
        head, sent = world.upstreams["a"].asked[1]
        assert "anthropic-beta: b1\r\n" in head and json.loads(json.dumps(sent))["messages"][0] == HI[0]
        assert not any(block["type"] == "thinking" for block in sent["messages"][1]["content"])
    refused = http_answer(400, {"type": "error", "error": {"type": "invalid_request_error", "message": "messages.1.content.0: Invalid `signature` in `thinking` block"}})
    run(tmp_path, scenario, {"a": ("messages", "normalise", [refused, sse(*PASSED["text"])])})


def test_a_model_that_does_not_reason_is_asked_again_without(tmp_path):
    async def scenario(world):
        status, headers, raw = await post(world, body(model="r/gpt-x", stream=True, thinking={"type": "disabled"}))
        assert status == 200 and check(raw)["content"] == [text("Hello")]
        first, second = (sent for _, sent in world.upstreams["r"].asked)
        assert first["reasoning"] == {"effort": "none"} and "reasoning" not in second and "include" not in second
        assert "reasoning:refused" in headers["x-pomex-dropped"]
    refused = http_answer(400, {"error": {"message": "Unsupported value: 'none' is not supported with the 'gpt-x' model.", "code": "unsupported_value"}})
    run(tmp_path, scenario, {"r": ("responses", "bytes", [refused, sse(*native())])})


RECORDINGS = sorted((SHARED / "recorded" / "anthropic").glob("*/response.sse"))


@pytest.mark.parametrize("path", RECORDINGS or [pytest.param(None, marks=pytest.mark.skip(reason="no ../shared/recorded"))],
                         ids=lambda path: path and path.parent.name)
def test_a_recorded_stream_passes_byte_for_byte(path):
    raw = path.read_bytes().replace(b"\r\n", b"\n")
    frames = [frame.removeprefix(b"data: \n") for frame in raw.strip(b"\n").split(b"\n\n")]
    given, attempt = answer("messages", raw, 1000)
    message = check(given)
    if "error" in message:
        assert attempt.error is not None and (b"message_stop" not in frames[-1] or "spliced" in path.parent.name)
        return
    ours, theirs = given.strip(b"\n").split(b"\n\n"), [frame for frame in frames if not frame.startswith(b":")]
    if "duplicate" in path.parent.name:
        del theirs[1]
    if path.parent.name == "incomplete-tool-json-stream":
        assert ours.pop(-3).startswith(b"event: content_block_stop")        # which the upstream left out
    model = json.loads(theirs[0].partition(b"data: ")[2])["message"]["model"].encode()
    assert ours[0] == theirs[0].replace(b'"' + model + b'"', b'"m/x"', 1)
    assert [line.rstrip() for line in ours[1:]] == [line.rstrip() for line in theirs[1:]]
    assert attempt.usage.output > 0 and not attempt.usage.estimated
