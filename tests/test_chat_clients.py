"""Chat Completions for clients: the translation of requests, the answers, the passthrough to chat servers."""
import asyncio
import json
import pathlib

import pytest
from test_handlers import chat as chat_stream
from test_handlers import http_answer, run, sse, told

import pomex

SHARED = pathlib.Path(__file__).parents[2] / "shared"
ENVELOPE = pomex.Envelope(b"secret", "account")
HI = [{"role": "user", "content": "Hi"}]
PNG = "data:image/png;base64,iVBORw0KGgo="
LOOK = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object", "properties": {}}}}
PATCH = {"type": "custom", "custom": {"name": "patch", "format": {
    "type": "grammar", "grammar": {"syntax": "lark", "definition": "start: x"}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def parse(body=None, /, **fields):
    given = body if body is not None else {"model": "p/m", "messages": HI, **fields}
    return pomex.parse_request(given if isinstance(given, bytes) else json.dumps(given).encode(), api="chat")


def context(request, provider="p", dialect=""):
    answer = pomex.ChatAnswer(request, "resp_0123456789abcdef", 1_800_000_000, pomex.STANDARD)
    return pomex.EncodeContext(answer, ENVELOPE, provider, "m", True, dialect)


def up(wire, body=None, /, dialect="", model="m", **fields):
    """The body for a provider of this wire, and what it does not carry."""
    ctx = context(parse(body, **fields), dialect=dialect)
    ctx.model = model
    call = pomex.WIRES[wire].call(ctx)
    return json.loads(call.body), call.dropped


def refusal(**fields):
    with pytest.raises(pomex.BadRequest) as refused:
        parse(**fields).translated()
    return refused.value.param, str(refused.value)


# --- requests -------------------------------------------------------------------------------------

def items(*messages):
    return parse(messages=list(messages)).translated().input


def user(*parts):
    return {"type": "message", "role": "user", "content": list(parts)}


SEALED = ENVELOPE.seal("p", "m", {"form": "x"})
DETAIL = {"type": "reasoning.encrypted", "data": SEALED, "format": "pomex", "index": 0}
REASONING = {"type": "reasoning", "summary": [], "encrypted_content": SEALED}
SAID = {"type": "message", "role": "assistant", "content": "a"}
LOOKED = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
FORMS = {
    "system": ({"role": "system", "content": "s"}, [{"type": "message", "role": "system", "content": "s"}]),
    "developer": ({"role": "developer", "content": [{"type": "text", "text": "s"}]},
                  [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "s"}]}]),
    "image": ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}]},
              [user({"type": "input_image", "image_url": PNG, "detail": "low"})]),
    "file": ({"role": "user", "content": [{"type": "file", "file": {"file_data": "QQ==", "filename": "a.txt"}}]},
             [user({"type": "input_file", "file_data": "QQ==", "filename": "a.txt"})]),
    "file id": ({"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]},
                [user({"type": "input_file", "file_id": "f"})]),
    "audio": ({"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},
              [user({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}})]),
    "assistant": ({"role": "assistant", "content": "a"}, [SAID]),
    "a refusal": ({"role": "assistant", "content": None, "refusal": "no"},
                  [{**SAID, "content": [{"type": "refusal", "refusal": "no"}]}]),
    "a refusal part": ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                       [{**SAID, "content": [{"type": "refusal", "refusal": "no"}]}]),
    "calls": ({"role": "assistant", "content": None, "tool_calls": [CALL]}, [LOOKED]),
    "text and calls": ({"role": "assistant", "content": "a", "tool_calls": [{**CALL, "index": 0}]}, [SAID, LOOKED]),
    "a custom call": ({"role": "assistant", "tool_calls": [{"id": "c2", "type": "custom", "custom": {"name": "patch", "input": "x"}}]},
                      [{"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "x"}]),
    "a function call": ({"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": "{}"}},
                        [{**LOOKED, "call_id": "look"}]),
    "its result": ({"role": "function", "name": "look", "content": "r"},
                   [{"type": "function_call_output", "call_id": "look", "output": "r"}]),
    "a result": ({"role": "tool", "tool_call_id": "c1", "content": "r"},
                 [{"type": "function_call_output", "call_id": "c1", "output": "r"}]),
    "a result in parts": ({"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "r"}]},
                          [{"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "r"}]}]),
    "sealed reasoning": ({"role": "assistant", "content": "a", "reasoning_content": "hm", "reasoning_details": [DETAIL]}, [REASONING, SAID]),
    "reasoning in its place": ({"role": "assistant", "content": "a", "tool_calls": [CALL], "reasoning_details": [
        DETAIL, {**DETAIL, "index": 2}]}, [REASONING, SAID, REASONING, LOOKED]),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_of_a_message(name):
    message, wanted = FORMS[name]
    assert items(*HI, message) == [{"type": "message", **HI[0]}, *wanted]


FIELDS = {
    "max_tokens": ({"max_tokens": 5}, {"max_output_tokens": 5}),
    "max_completion_tokens": ({"max_completion_tokens": 5, "max_tokens": None}, {"max_output_tokens": 5}),
    "one stop": ({"stop": "x"}, {"stop": ["x"]}),
    "stops": ({"stop": ["x", "y"]}, {"stop": ["x", "y"]}),
    "effort": ({"reasoning_effort": "high"}, {"reasoning": {"effort": "high", "summary": "auto"}}),
    "openrouter's effort": ({"reasoning": {"effort": "low"}}, {"reasoning": {"effort": "low", "summary": "auto"}}),
    "no effort": ({}, {"reasoning": {"effort": None}, "include": ["reasoning.encrypted_content"]}),
    "schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}}, "verbosity": "low"},
               {"text": {"verbosity": "low", "format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}}}),
    "json": ({"response_format": {"type": "json_object"}}, {"text": {"verbosity": None, "format": {"type": "json_object"}}}),
    "tools": ({"tools": [LOOK, PATCH]}, {"tools": [
        {"type": "function", **LOOK["function"]},
        {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}}]}),
    "search": ({"web_search_options": {"search_context_size": "low", "user_location": {
        "type": "approximate", "approximate": {"city": "Bonn"}}}}, {"tools": [
            {"type": "web_search", "search_context_size": "low", "user_location": {"type": "approximate", "city": "Bonn"}}]}),
    "a choice": ({"tools": [LOOK], "tool_choice": "required"}, {"tool_choice": "required"}),
    "a function": ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "look"}}},
                   {"tool_choice": {"type": "function", "name": "look"}}),
    "a custom tool": ({"tools": [PATCH], "tool_choice": {"type": "custom", "custom": {"name": "patch"}}},
                      {"tool_choice": {"type": "custom", "name": "patch"}}),
    "allowed tools": ({"tools": [LOOK], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
        {"type": "function", "function": {"name": "look"}}]}}},
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]}}),
    "others": ({"seed": 1, "logit_bias": {"1": 2}, "top_k": 3, "chat_template_kwargs": {"a": 1}, "logprobs": None, "metadata": {"a": "b"}},
               {"seed": 1, "logit_bias": {"1": 2}, "top_k": 3, "chat_template_kwargs": {"a": 1}, "metadata": {"a": "b"}}),
}


@pytest.mark.parametrize("name", FIELDS)
def test_each_field(name):
    given, wanted = FIELDS[name]
    body = parse(**given).translated().body
    assert {key: body.get(key) for key in wanted} == wanted
    assert not body.keys() & {"messages", "max_tokens", "max_completion_tokens", "response_format", "reasoning_effort"}


def said(**fields):
    return {"messages": [*HI, {"role": "user", "content": "x", **fields}]}


def called(**fields):
    return {"messages": [*HI, {"role": "assistant", "tool_calls": [{**CALL, **fields}]}]}


ERRORS = [
    ({"messages": None}, "messages", "Missing required parameter: messages."),
    ({"messages": []}, "messages", "messages must hold some content."),
    ({"messages": [{"role": "assistant", "content": ""}]}, "messages", "messages must hold some content."),
    ({"messages": ["x"]}, "messages[0]", "messages[0] must be an object, not a string."),
    ({"model": None}, "model", "Missing required parameter: model."),
    ({"model": "a\nb"}, "model", "model holds characters that no name has."),
    (said(role="robot"), "messages[1].role", "must be one of developer, system, user, assistant, tool, function."),
    (said(role=None), "messages[1].role", "Missing required parameter: messages[1].role."),
    (said(content=None), "messages[1].content", "must be a string or an array of parts."),
    (said(content=[{"type": "text", "text": 1}]), "messages[1].content[0].text", "must be a string."),
    (said(content=["x"]), "messages[1].content[0]", "must be an object with a type."),
    (said(content=[{"type": "image_url", "image_url": {}}]), "messages[1].content[0].image_url.url", "Missing required"),
    (said(content=[{"type": "image_url", "image_url": 1}]), "messages[1].content[0].image_url", "must be an object, not an integer"),
    (said(content=[{"type": "file"}]), "messages[1].content[0].file", "Missing required"),
    (said(role="tool"), "messages[1].tool_call_id", "Missing required parameter: messages[1].tool_call_id."),
    (said(role="function"), "messages[1].name", "Missing required parameter: messages[1].name."),
    (said(role="assistant", refusal=1), "messages[1].refusal", "must be a string or null, not an integer"),
    (said(role="assistant", tool_calls={}), "messages[1].tool_calls", "must be an array or null, not an object"),
    (called(id=None), "messages[1].tool_calls[0].id", "Missing required"),
    (called(type="x"), "messages[1].tool_calls[0].type", "must be one of function, custom."),
    (called(function={"name": "look"}), "messages[1].tool_calls[0].function.arguments", "Missing required"),
    (called(function={"name": "", "arguments": ""}), "messages[1].tool_calls[0].function.name", "at least 1"),
    ({"tools": {}}, "tools", "must be an array"),
    ({"tools": [{"type": "function", "name": "look"}]}, "tools[0].function", "Missing required parameter: tools[0].function."),
    ({"tools": [{"type": "function", "function": {"name": 1}}]}, "tools[0].function.name", "must be a string"),
    ({"tools": [{"type": "local_shell"}]}, "tools[0].type", "must be one of function, custom."),
    ({"tool_choice": "any"}, "tool_choice", "must be none, auto, required or an object."),
    ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice", "names 'no', which is not among the tools."),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "must be one of text, json_object, json_schema."),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Missing required"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name", "Missing required"),
    ({"max_tokens": 0}, "max_tokens", "its value must be at least 1."),
    ({"temperature": 3}, "temperature", "between 0 and 2"),
    ({"stop": [1]}, "stop[0]", "must be a string"),
    ({"n": 0}, "n", "between 1 and 128"),
    ({"reasoning_effort": 1}, "reasoning_effort", "must be a string"),
    ({"stream_options": []}, "stream_options", "must be an object"),
    ({"input": "Hi"}, "input", "is a field of the Responses API"),
]


@pytest.mark.parametrize("fields, param, words", ERRORS)
def test_each_mistake_is_named_by_its_own_path(fields, param, words):
    given, sentence = refusal(**fields)
    assert given == param and words in sentence


@pytest.mark.parametrize("field, value", [("n", 2), ("functions", [{"name": "f"}]), ("function_call", "auto")])
def test_what_only_a_chat_server_can_do_is_refused_elsewhere(field, value):
    for wire in ("responses", "messages", "gemini"):
        with pytest.raises(pomex.BadRequest) as refused:
            up(wire, **{field: value})
        assert refused.value.param == field and refused.value.code == "unsupported_parameter"
    body, dropped = up("chat", **{field: value})
    assert body[field] == value and not dropped


def test_what_no_wire_carries_is_named_in_the_words_of_chat():
    body, dropped = up("messages", logprobs=True, verbosity="low", frobnicate=1, messages=[
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, {"type": "text", "text": "x"}],
         "name": "ana"}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}, *HI])
    assert sorted(dropped) == ["content:input_audio", "frobnicate", "logprobs", "messages.name", "messages.reasoning_content", "verbosity"]


def test_sampling_goes_where_it_can():
    given = {"stop": ["x"], "top_k": 4, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.25, "temperature": 0.5}
    body, dropped = up("gemini", **given)
    assert body["generationConfig"].items() >= {"stopSequences": ["x"], "topK": 4, "seed": 5, "presencePenalty": 0.5,
                                                "frequencyPenalty": 0.25, "temperature": 0.5}.items() and not dropped
    body, dropped = up("messages", model="deepseek-x", **given)
    assert (body["stop_sequences"], body["top_k"]) == (["x"], 4)
    assert sorted(dropped) == ["frequency_penalty", "presence_penalty", "seed"]
    body, dropped = up("responses", **given)
    assert sorted(dropped) == ["frequency_penalty", "presence_penalty", "seed", "stop", "top_k"]


def test_sealed_reasoning_returns_to_its_provider_only():
    sealed = ENVELOPE.seal("p", "m", {"encrypted_content": "theirs"})
    messages = [*HI, {"role": "assistant", "content": "a", "reasoning_details": [{**DETAIL, "data": sealed}]}, *HI]
    body, dropped = up("responses", messages=messages)
    assert {"encrypted_content": "theirs"}.items() <= body["input"][1].items() and not dropped
    call = pomex.WIRES["responses"].call(context(parse(messages=messages), provider="other"))
    assert "theirs" not in call.body.decode() and call.dropped == ["reasoning:p"]
    body, dropped = up("chat", messages=messages)
    assert body["messages"] == [*HI, {"role": "assistant", "content": "a"}, *HI] and dropped == ["reasoning_details"]
    foreign = {"type": "reasoning.text", "text": "hm", "index": 0}
    messages[1]["reasoning_details"] = [foreign, {**DETAIL, "data": "pmx1.x"}]
    body, dropped = up("chat", messages=messages)
    assert body["messages"][1]["reasoning_details"] == [foreign] and dropped == ["reasoning_details"]


def test_a_grown_conversation_is_translated_once(monkeypatch):
    seen, real = [], pomex.chat_items
    monkeypatch.setattr(pomex, "chat_items", lambda message, path: seen.append(path) or real(message, path))
    messages = [{"role": "user", "content": str(n)} for n in range(3)]
    text = json.dumps({"model": "p/m", "messages": messages}).replace(", ", ",").encode()
    first = parse(text)
    first.translated()
    grown = text[:-2] + b',{"role":"user","content":"more"}]}'
    second = pomex.parse_request(grown, first, "chat")
    assert len(second.translated().input) == 4
    assert seen == ["messages[0]", "messages[1]", "messages[2]", "messages[3]"]


# --- answers --------------------------------------------------------------------------------------

def assembled(feed, stop=None, error=None, usage=None, **fields):
    """The frames, the body and the attempt of an answer whose sink calls `feed` makes."""
    request = parse(stream=True, **fields)
    answer = context(request).answer
    attempt = pomex.Assembler(answer, lambda replay: "pmx1.sealed")
    feed(attempt)
    attempt.set_usage(usage or pomex.Usage(20, 8, 0, 5, 2))
    if stop:
        attempt.set_stop(stop)
    attempt.finish(error)
    return attempt.terminal(2), attempt


def chunks(raw):
    return [json.loads(block.removeprefix(b"data: ")) for block in raw.split(b"\n\n") if block and block != b"data: [DONE]"]


def joined(raw):
    """The message and finish_reason that an SDK puts together."""
    message, finish, usage = {}, None, None
    for chunk in chunks(raw):
        assert "error" not in chunk
        assert chunk["id"] == "chatcmpl-0123456789abcdef" and chunk["object"] == "chat.completion.chunk"
        assert (chunk["created"], chunk["model"]) == (1_800_000_000, "p/m")
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            assert finish is None, "nothing follows the finish"
            finish = choice["finish_reason"]
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    for call in value:
                        held = message.setdefault(name, [])
                        if len(held) == call["index"]:
                            held.append({key: part for key, part in call.items() if key != "index"})
                            continue
                        for kind in ("function", "custom"):
                            for key, part in call.get(kind, {}).items():
                                held[call["index"]][kind][key] += part
                elif isinstance(value, list):
                    message.setdefault(name, []).extend(value)
                else:
                    message[name] = message.get(name, "") + value
    return message, finish, usage


def everything(sink):
    sink.text("Hm", "summary")
    sink.done(sealed_replay={"a": 1})
    sink.text("Hello ")
    sink.text("world\n\"é\"")
    sink.annotate({"type": "url_citation", "start_index": 0, "end_index": 5, "url": "u", "title": "t"})
    sink.call(1, "c1", pomex.Tool("function_call", "look", ""))
    sink.call(2, "c2", pomex.Tool("custom_tool_call", "patch", ""))
    sink.add(1, '{"a":', "arguments")
    sink.add(2, '{"input":"x\\ny"}', "arguments")
    sink.add(1, "1}", "arguments")
    sink.done(1)
    sink.done(2)


STOP = pomex.Stop(final=True)
WHOLE = {
    "role": "assistant", "content": 'Hello world\n"é"', "reasoning_content": "Hm",
    "reasoning_details": [{"type": "reasoning.encrypted", "data": "pmx1.sealed", "format": "pomex", "index": 0}],
    "annotations": [{"type": "url_citation", "url_citation": {"start_index": 0, "end_index": 5, "url": "u", "title": "t"}}],
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}},
                   {"id": "c2", "type": "custom", "custom": {"name": "patch", "input": "x\ny"}}]}
USAGE = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25,
         "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 2}}


def test_an_answer_streamed_and_whole():
    raw, attempt = assembled(everything, STOP, stream_options={"include_usage": True})
    assert joined(raw) == (WHOLE, "tool_calls", USAGE)
    assert raw.endswith(b"data: [DONE]\n\n") and chunks(raw)[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks(raw)[-1]["choices"] == []
    body = json.loads(attempt.body(2))
    [choice] = body.pop("choices")
    assert choice == {"index": 0, "message": {**WHOLE, "refusal": None}, "logprobs": None, "finish_reason": "tool_calls"}
    assert body == {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion", "created": 1_800_000_000, "model": "p/m", "usage": USAGE}
    raw, _ = assembled(everything, STOP)
    assert joined(raw)[2] is None, "usage only where it is asked for"


def test_an_answer_that_fails_has_an_error_and_no_end():
    raw, _ = assembled(everything, error=pomex.UpstreamError("It broke."))
    *_, last = chunks(raw)
    assert last == {"error": {"message": "It broke.", "type": "server_error", "param": None, "code": "server_error"}}
    assert b"[DONE]" not in raw and b'"finish_reason":"' not in raw


@pytest.mark.parametrize("reason, finish", [("", "stop"), ("max_output_tokens", "length"), ("content_filter", "content_filter")])
def test_the_finish_says_why(reason, finish):
    raw, attempt = assembled(lambda sink: sink.text("Hi"), pomex.Stop(reason, final=True))
    assert joined(raw)[1] == finish and json.loads(attempt.body(2))["choices"][0]["finish_reason"] == finish


def test_a_truncated_call_is_never_whole():
    def cut(sink):
        sink.call(1, "c1", pomex.Tool("function_call", "look", ""))
        sink.add(1, '{"a":', "arguments")
    raw, attempt = assembled(cut, pomex.Stop("max_output_tokens", final=True))
    assert joined(raw)[1] == "length"
    choice = json.loads(attempt.body(2))["choices"][0]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]
    raw, attempt = assembled(cut, STOP)
    assert attempt.status == "failed" and "error" in chunks(raw)[-1] and b"finish_reason\":\"" not in raw


def test_texts_of_one_kind_are_separated():
    def twice(sink):
        for text in ("one", "two"):
            sink.text(f"{text}!", "summary")
            sink.text(text)
            sink.annotate({"type": "url_citation", "start_index": 0, "end_index": 3, "url": text, "title": ""})
            sink.done()
    raw, attempt = assembled(twice, STOP)
    message = joined(raw)[0]
    assert (message["content"], message["reasoning_content"]) == ("one\n\ntwo", "one!\n\ntwo!")
    assert [note["url_citation"]["start_index"] for note in message["annotations"]] == [0, 5]
    assert json.loads(attempt.body(2))["choices"][0]["message"]["content"] == "one\n\ntwo"


def test_a_heartbeat_is_a_comment_and_starts_nothing():
    answer = context(parse(stream=True)).answer
    assert answer.start() == b"" and answer.heartbeat() == b": keep-alive\n\n" and not answer.started


STREAMS = {
    "chat": chat_stream({"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}),
    "messages": b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in [
        {"type": "message_start", "message": {"usage": {"input_tokens": 20, "output_tokens": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"}]),
    "gemini": b"".join(f"data: {json.dumps(e)}\n\n".encode() for e in [
        {"candidates": [{"content": {"parts": [{"text": "Hel"}]}}]},
        {"candidates": [{"content": {"parts": [{"text": "lo"}]}, "finishReason": "STOP"}],
         "usageMetadata": {"promptTokenCount": 20, "candidatesTokenCount": 5}}]),
}


def read(wire, pieces, **fields):
    """The attempt over these pieces of a provider's stream, and all frames."""
    call = pomex.WIRES[wire].call(context(parse(stream=True, **fields)))
    out, error = b"", None
    try:
        for piece in pieces:
            call.attempt.feed(piece)
            if call.attempt.output_started:
                out += call.attempt.take_output()
        call.attempt.end()
    except pomex.GatewayError as failure:
        error = failure
    call.attempt.finish(error)
    return out + call.attempt.terminal(2), call.attempt


def ends(raw):
    """The number of true ends and of failures of a stream."""
    return raw.count(b"data: [DONE]\n\n"), sum("error" in chunk for chunk in chunks(raw))


@pytest.mark.parametrize("wire", STREAMS)
def test_every_wire_byte_by_byte_and_cut_after_every_event(wire):
    stream = STREAMS[wire]
    whole, _ = read(wire, [stream])
    text = "".join(choice["delta"].get("content", "") for chunk in chunks(whole) for choice in chunk["choices"])
    assert text == "Hello" and ends(whole) == (1, 0)
    slow, attempt = read(wire, [stream[at:at + 1] for at in range(len(stream))])
    assert attempt.usage.output == 5 and ends(slow) == (1, 0) and slow.replace(b": ", b":").count(b'"finish_reason":"stop"') == 1
    blocks = stream.split(b"\n\n")[:-1]
    for count in range(len(blocks)):
        raw, attempt = read(wire, [b"".join(block + b"\n\n" for block in blocks[:count])])
        assert sum(ends(raw)) == 1, "exactly one end"
        finished = attempt.stop is not None
        assert ends(raw) == ((1, 0) if finished and attempt.error is None else (0, 1))
        assert (b'"finish_reason":"' in raw.replace(b'": "', b'":"')) == (ends(raw) == (1, 0))


# --- passthrough ----------------------------------------------------------------------------------

def chunk(delta, finish=None, **fields):
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "theirs", "choices": [
        {"index": 0, "delta": delta, "finish_reason": finish}], **fields}


def frames(*events):
    return b"".join(b"data: " + pomex.dumps(event).encode() + b"\n\n" for event in events)


USED = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "theirs", "choices": [], "usage": {
    "prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}}
TEXT = [chunk({"role": "assistant", "content": ""}), *[chunk({"content": word}) for word in ("Hel", "lo ", 'a "b"\n{', "é")]]
FINISH = chunk({}, "stop")
DONE = b"data: [DONE]\n\n"
ASKED = {"stream_options": {"include_usage": True}}


def as_given(raw):
    return raw.replace(b'"model":"theirs"', b'"model":"p/m"')


def test_bytes_pass_but_for_the_model():
    stream = frames(*TEXT, FINISH, USED) + DONE
    for pieces in ([stream], [stream[at:at + 1] for at in range(len(stream))], [stream[at:at + 100] for at in range(0, len(stream), 100)]):
        raw, attempt = read("chat", pieces, **ASKED)
        assert raw == as_given(stream)
        assert (attempt.usage.input, attempt.usage.output, attempt.status) == (20, 5, "completed")
        raw, attempt = read("chat", pieces)
        assert raw == as_given(frames(*TEXT, FINISH) + DONE) and attempt.usage.output == 5, "the usage was not asked for"


def test_hot_chunks_pass_unread(monkeypatch):
    seen, real = [], pomex.ChatDecoder.read
    monkeypatch.setattr(pomex.ChatDecoder, "read", lambda self, event: seen.append(event) or real(self, event))
    plain = [
        chunk({"content": "x"}), chunk({"reasoning_content": "x"}), chunk({"content": '"error"'}, usage=None, obfuscation="abc"),
        {"choices": [{"finish_reason": None, "index": 0, "delta": {"content": "x"}}], "created": 1, "id": "c", "model": "theirs",
         "system_fingerprint": "b1", "object": "chat.completion.chunk"},
        {**chunk({}), "choices": [{"index": 0, "delta": {"content": "a\\"}, "logprobs": None, "finish_reason": None}]}]
    raw, _ = read("chat", [frames(*TEXT[:2]), frames(*plain), frames(FINISH) + DONE])
    assert raw == as_given(frames(*TEXT[:2], *plain, FINISH) + DONE)
    assert seen == [*TEXT[:2], FINISH]
    first, spaced = ("".join(f"data: {json.dumps(event)}\n\n" for event in some).encode() for some in (TEXT[:2], plain))
    seen.clear()
    raw, _ = read("chat", [first, spaced, frames(FINISH) + DONE])
    assert seen == [*TEXT[:2], FINISH] and b"theirs" not in raw
    seen.clear()
    others = [chunk({"tool_calls": []}), chunk({"content": "x"}, "stop"), chunk({"content": "x"}, usage={"prompt_tokens": 1})]
    read("chat", [frames(*TEXT[:2]), frames(others[0]), frames(others[2]), frames(others[1]) + DONE])
    assert seen == [*TEXT[:2], others[0], others[2], others[1]]


def tool_chunks(*arguments, finish="tool_calls"):
    first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": ""}}
    rest = [chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}) for piece in arguments]
    return [chunk({"role": "assistant", "content": None}), chunk({"tool_calls": [first]}), *rest, chunk({}, finish)]


def test_arguments_pass_as_they_came():
    events = tool_chunks('{"a":', '"\\u00e9\\n"', "}")
    raw, attempt = read("chat", [frames(*events) + DONE])
    assert raw == as_given(frames(*events) + DONE) and attempt.status == "completed"
    events[3]["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"] = '"'
    raw, attempt = read("chat", [frames(*events) + DONE])
    assert ends(raw) == (0, 1) and attempt.status == "failed"


def test_what_is_supplied_is_part_of_the_passed_answer():
    events = tool_chunks("{}")
    raw, _ = read("chat", [frames(*events)], **ASKED)
    assert {(each["id"], each["created"], each["model"]) for each in chunks(raw)} == {("chatcmpl-1", 1, "p/m")}
    assert raw.startswith(as_given(frames(*events))) and "usage" in chunks(raw)[-1]
    raw, _ = read("chat", [frames(*events[:-1]) + DONE])
    assert chunks(raw)[-1]["choices"][0]["finish_reason"] == "tool_calls", "the finish that was missing"


def test_the_text_that_passes_is_counted():
    for first in (chunk({"role": "assistant", "content": "", "refusal": None}, service_tier="default"), chunk({"content": "x"})):
        words = [chunk({"content": "word"}) for _ in range(50)]
        _, attempt = read("chat", [frames(first, *words)])
        assert 50 <= attempt.usage.output <= 51 and attempt.usage.estimated


def test_calls_pass_and_half_ones_are_a_failure():
    stream = frames(*tool_chunks('{"a":', "1}")) + DONE
    assert read("chat", [stream])[0] == as_given(stream)
    raw, attempt = read("chat", [frames(*tool_chunks('{"a":')) + DONE])
    assert ends(raw) == (0, 1) and b'"finish_reason":"' not in raw and attempt.status == "failed"
    stream = frames(*tool_chunks('{"a":', finish="length")) + DONE
    assert read("chat", [stream])[0] == as_given(stream), "a cut call under length"


@pytest.mark.parametrize("asked", [True, False])
def test_a_missing_end_is_supplied_and_no_evidence_is_a_failure(asked):
    fields = ASKED if asked else {}
    complete = read("chat", [frames(*TEXT, FINISH, USED) + DONE], **fields)[0]
    raw, attempt = read("chat", [frames(*TEXT, FINISH, USED)], **fields)
    assert raw == complete
    raw, attempt = read("chat", [frames(*TEXT, FINISH)], **fields)
    assert raw.startswith(as_given(frames(*TEXT, FINISH))) and ends(raw) == (1, 0)
    assert (len(chunks(raw)) == len(TEXT) + 2) == asked and attempt.usage.estimated
    raw, _ = read("chat", [frames(*TEXT) + DONE], **fields)
    assert ends(raw) == (1, 0) and raw.count(b'"finish_reason":"stop"') == 1
    raw, _ = read("chat", [frames(*TEXT)], **fields)
    assert ends(raw) == (0, 1) and raw.startswith(as_given(frames(*TEXT)))


def test_an_error_in_the_stream_is_the_end():
    for error in (frames({"error": {"message": "Overloaded", "code": 529}}), b"event: error\ndata: " + b'{"message":"Overloaded"}\n\n'):
        raw, attempt = read("chat", [frames(*TEXT) + error + frames(FINISH) + DONE])
        assert ends(raw) == (0, 1) and chunks(raw)[-1]["error"]["message"] == "Overloaded" and attempt.status == "failed"


def test_nothing_goes_out_before_output():
    raw, attempt = read("chat", [frames(TEXT[0])])
    assert not attempt.output_started and ends(raw) == (0, 1) and len(chunks(raw)) == 1
    raw, attempt = read("chat", [frames(TEXT[0], chunk({}, "length"), USED) + DONE])
    assert raw == as_given(frames(TEXT[0], chunk({}, "length"))) + DONE and attempt.status == "incomplete"


def test_all_choices_pass():
    def two(index, delta, finish=None):
        return {**chunk({}), "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}
    stream = frames(two(0, {"content": "a"}), two(1, {"content": "b"}), two(0, {}, "stop"), two(1, {"content": "c"}),
                    two(1, {}, "length")) + DONE
    raw, attempt = read("chat", [stream], n=2)
    assert raw == as_given(stream)
    call = pomex.WIRES["chat"].call(context(parse(stream=True, n=2)))
    call.attempt.feed(frames(two(0, {"content": "a"}), two(0, {}, "stop")))
    assert call.attempt.stop is None, "the other has not finished"


ANSWER = {"id": "x", "object": "chat.completion", "created": 1, "model": "theirs", "choices": [
    {"index": 0, "message": {"role": "assistant", "content": "Hi", "tool_calls": [CALL]}, "finish_reason": "tool_calls"}],
    "usage": {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}, "extra": 1.50}


def whole(answer, **fields):
    call = pomex.WIRES["chat"].call(context(parse(**fields)))
    error = None
    try:
        call.attempt.whole(pomex.dumps(answer).encode())
    except pomex.GatewayError as failure:
        error = failure
    call.attempt.finish(error)
    return call.attempt


def test_a_whole_answer_passes():
    attempt = whole(ANSWER)
    assert json.loads(attempt.body(2)) == {**ANSWER, "model": "p/m"} and attempt.usage.input == 20
    raw = whole(ANSWER, stream=True, **ASKED).terminal(2)
    assert ends(raw) == (1, 0) and chunks(raw)[0]["choices"][0]["delta"]["tool_calls"] == [{**CALL, "index": 0}]
    assert chunks(raw)[-1]["usage"]["total_tokens"] == 25
    for bad in ({"error": {"message": "no"}}, {"x": 1}, {**ANSWER, "choices": [{"index": 0, "finish_reason": "tool_calls", "message": {
            "tool_calls": [{**CALL, "function": {"name": "look", "arguments": "{"}}]}}]}):
        assert whole(bad).status == "failed", bad


def test_a_stream_that_nobody_asked_for_is_a_failure():
    call = pomex.WIRES["chat"].call(context(parse()))
    with pytest.raises(pomex.UpstreamError, match="should have come whole"):
        call.attempt.feed(frames(*TEXT))


def relayed(body, cap=0, dialect=""):
    request = parse(body)
    if cap:
        request = pomex.dataclasses.replace(request, body={**request.body, "max_output_tokens": cap})
    call = pomex.WIRES["chat"].call(context(request, dialect=dialect))
    return call.body


def test_bytes_go_up_but_for_the_listed_changes():
    body = b'{ "model" : "p/m", "messages":[{"role":"user","content":"\\"model\\":\\"x\\" 1.0"}],"frobnicate":1.50}'
    assert relayed(body) == body.replace(b'"p/m"', b'"m"')
    streamed = body.replace(b"1.50", b'1.50,"stream":true')
    assert relayed(streamed) == streamed.replace(b'"p/m"', b'"m","stream_options":{"include_usage":true}')
    own = json.loads(streamed) | {"stream_options": {"include_usage": False, "x": 1}}
    assert json.loads(relayed(own)) == {**own, "model": "m", "stream_options": {"include_usage": True, "x": 1}}
    assert json.loads(relayed(body, cap=7))["max_tokens"] == 7
    assert json.loads(relayed(body, cap=7, dialect="openai"))["max_completion_tokens"] == 7
    for name in ("max_tokens", "max_completion_tokens"):
        limited = json.loads(relayed(json.loads(body) | {name: 9}, cap=7, dialect="openai"))
        assert limited[name] == 7 and len(limited.keys() & {"max_tokens", "max_completion_tokens"}) == 1
        assert json.loads(relayed(json.loads(body) | {name: 5}))[name] == 5


@pytest.mark.skipif(not (SHARED / "agent-requests").is_dir(), reason="../shared/agent-requests is not here")
def test_requests_of_real_agents():
    count = 0
    for path in sorted((SHARED / "agent-requests").glob("*/*.json")):
        raw = path.read_bytes()
        given = json.loads(raw)
        given = given.get("body", given)
        if "messages" not in given or path.parent.name in ("claude-code", "opencode-anthropic"):
            continue
        count += 1
        raw = json.dumps(given, ensure_ascii=False).encode()
        sent = relayed(raw)
        options = b',"stream_options":{"include_usage":true}' if "stream_options" not in given else b""
        wanted = json.dumps(given["model"]).encode()
        assert sent == raw.replace(b'"model": ' + wanted, b'"model": "m"' + options, 1), path
        for wire in ("responses", "messages", "gemini"):
            body, dropped = up(wire, raw)
            assert not dropped, (path, wire, dropped)
    assert count > 10


def recordings(kind):
    return [path.read_bytes() for path in sorted((SHARED / "recorded" / kind).glob("*/response.sse"))]


@pytest.mark.skipif(not (SHARED / "recorded").is_dir(), reason="../shared/recorded is not here")
@pytest.mark.parametrize("kind, wire", [("chat", "chat"), ("anthropic", "messages"), ("gemini", "gemini"), ("responses", "responses")])
def test_every_recording_has_one_end(kind, wire):
    for stream in recordings(kind):
        raw, attempt = read(wire, [stream], **ASKED)
        finish = raw.replace(b'": "', b'":"').count(b'"finish_reason":"')
        assert ends(raw) == ((0, 1) if attempt.error else (1, 0)) and bool(finish) == (attempt.error is None)
        assert read(wire, [stream[at:at + 7] for at in range(0, len(stream), 7)], **ASKED)[0] == raw
        for cut in range(0, len(stream), max(1, len(stream) // 20)):
            assert sum(ends(read(wire, [stream[:cut]])[0])) == 1


# --- through the gateway --------------------------------------------------------------------------

async def post(world, model, key=None, **fields):
    body = {"model": model, "messages": HI, **fields}
    return await asyncio.to_thread(lambda: world.ask("POST", "/v1/chat/completions", body, key=key))


def test_a_turn_through_the_gateway(tmp_path):
    async def scenario(world):
        for model in ("c/m", "a/m"):
            status, headers, raw = await post(world, model, stream=True, frobnicate=1, **ASKED)
            assert status == 200 and headers["content-type"].startswith("text/event-stream"), raw
            text = "".join(choice["delta"].get("content") or "" for each in chunks(raw) for choice in each["choices"])
            assert text == "Hello" and ends(raw) == (1, 0)
            assert headers.get("x-pomex-dropped", "") == ("frobnicate" if model == "a/m" else "")
            assert any(each.get("usage") for each in chunks(raw))
        row = await world.row()
        assert row["endpoint"] == "/v1/chat/completions" and row["output"] == 5
        status, _, raw = await post(world, "a/m")
        body = json.loads(raw)
        assert status == 200 and body["choices"][0]["message"]["content"] == "Hello" and body["object"] == "chat.completion"
        assert world.upstreams["c"].asked[0][1]["stream_options"] == {"include_usage": True}
        assert "authorization: Bearer sk-theirs" in world.upstreams["c"].asked[0][0]
        status, _, raw = await post(world, "demo/echo")
        assert status == 200 and json.loads(raw)["choices"][0]["message"]["content"]
    run(tmp_path, scenario, {"c": ("chat", "bytes", [sse(STREAMS["chat"])]), "a": ("messages", "bytes", [sse(STREAMS["messages"])])})


def test_whole_answers_and_errors_through_the_gateway(tmp_path):
    async def scenario(world):
        status, _, raw = await post(world, "c/m")
        assert status == 200 and json.loads(raw) == {**ANSWER, "model": "c/m"}
        status, _, raw = await post(world, "c/m")
        assert status == 400 and told(raw)[0] == "invalid_request_error" and "bad field" in told(raw)[1]
        status, _, raw = await post(world, "c/m", key="wrong")
        assert status == 401 and told(raw)[0] == "invalid_api_key"
        status, _, raw = await post(world, "demo/ecko")
        assert status == 400 and told(raw)[0] == "model_not_found"
        status, _, raw = await post(world, "demo/echo", n=2)
        assert status == 400 and "send n = 1." in told(raw)[1] and json.loads(raw)["error"]["param"] == "n"
        status, _, raw = await post(world, "demo/echo", messages=[{"role": "user", "content": [{"type": "text"}]}])
        assert json.loads(raw)["error"]["param"] == "messages[0].content[0].text"
    run(tmp_path, scenario, {"c": ("chat", "bytes", [http_answer(200, ANSWER), http_answer(400, {"error": {"message": "bad field"}})])})


def test_a_cut_through_the_gateway(tmp_path):
    async def scenario(world):
        status, _, raw = await post(world, "c/m", stream=True)
        assert status == 200 and ends(raw) == (0, 1) and raw.startswith(frames(*TEXT).replace(b"theirs", b"c/m"))
    run(tmp_path, scenario, {"c": ("chat", "bytes", [sse(frames(*TEXT), cut=True)])})


def test_the_money_of_a_key_limits_the_output(tmp_path):
    prices = '[prices."c/m"]\ninput = 0.0\noutput = 10.0\n[prices."a/claude-opus-5"]\ninput = 0.0\noutput = 10.0\n'

    async def scenario(world):
        token = await world.ledger.create_key("small", 1_800_000_000, budget_nanos=10_000_000, period="day")    # 1,000 tokens
        for fields, sent in (({}, {"max_tokens": 1000}), ({"max_completion_tokens": 5000}, {"max_completion_tokens": 1000}),
                             ({"max_tokens": 7}, {"max_tokens": 7}), ({"n": 4, "max_tokens": 5000}, {"max_tokens": 250})):
            status, _, raw = await post(world, "c/m", key=token, **fields)
            assert status == 200, raw
            body = world.upstreams["c"].asked[-1][1]
            assert {name: body[name] for name in body if name.startswith("max_")} == sent
        status, _, raw = await post(world, "x/m", key=token)
        assert status == 400 and told(raw)[0] == "price_unknown"
    none = {**ANSWER, "usage": {"prompt_tokens": 20, "completion_tokens": 0}}
    run(tmp_path, scenario, {"c": ("chat", "bytes", [http_answer(200, none)]), "x": ("chat", "bytes", [http_answer(200, none)])}, more=prices)
