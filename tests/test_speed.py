"""What was made fast: the short road says what the long one says, and a request leaves nothing behind."""
import gc
import json
import time

import pytest
import pomex

CONTENTS = ["Hel", "lo", "", " ", "\n\n", 'quote " back \\ slash', "é", "\ud83d", "\ude00", "😀", "}", '"}', "<th", "ink>", "deep",
            "</thi", "nk>", "\n", "end"]


def chunk(**delta):
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [
        {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]}


def with_choice(made, **fields):
    return {**made, "choices": [{**made["choices"][0], **fields}]}


CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SAID = [chunk(content=text) for text in CONTENTS]
THOUGHT = [chunk(content=None, reasoning_content=text) for text in CONTENTS]
END = [with_choice(chunk(), finish_reason="stop"), {**chunk(), "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}]
STREAMS = {
    "text": [chunk(role="assistant", content=""), *SAID, *END],
    "thoughts": [*THOUGHT, *END],
    "thoughts, then text": [*THOUGHT, *SAID, *THOUGHT, *SAID, *END],
    "tags": [chunk(content=text) for text in ("<think>", "a", "b", "</think>", "c", "d")] + END,
    "calls between": [*SAID, chunk(content="x", tool_calls=[CALL]), *SAID, *END],
    "a finish_reason with text": [*SAID[:2], with_choice(chunk(content="!"), finish_reason="length"), *END],
    "usage with every piece": [{**made, "usage": {"prompt_tokens": 3, "completion_tokens": n}} for n, made in enumerate(SAID, 1)] + END,
    "an error with text": [*SAID[:2], {**chunk(content="no"), "error": {"message": "overloaded"}}, *SAID],
    "two choices": [{**made, "choices": made["choices"] * 2} for made in SAID] + END,
    "a refusal": [*SAID[:2], chunk(content="x", refusal="never"), *SAID[:2], *END],
    "many texts": [chunk(content="x") for _ in range(40)] + END,
    "many thoughts": [chunk(content=None, reasoning_content="x y") for _ in range(40)] + END,
    "another model": [*SAID[:2], *({**made, "model": "n"} for made in SAID), *END],
}
SPELLINGS = {"compact": {"separators": (",", ":")}, "spaced": {}, "as it is": {"ensure_ascii": False}}


def translated(wire="chat", **fields):
    tools = [{"type": "function", "name": "f", "parameters": {}}]
    raw = json.dumps({"model": "p/m", "stream": True, "input": "hi", "tools": tools, **fields}).encode()
    answer = pomex.ResponsesAnswer(pomex.parse_request(raw), "resp_1", 1, pomex.STANDARD)
    model = "claude-opus-5" if wire == "messages" else "m"
    context = pomex.EncodeContext(answer, pomex.Envelope(b"k" * 32, "a"), "p", model, False, "")
    return pomex.WIRES[wire].call(context).attempt


def outcome(pieces, wire="chat", **fields):
    """What the client gets, the usage, and how many events were parsed."""
    attempt, parsed, error = translated(wire, **fields), [], None
    feed = attempt.decoder.feed
    attempt.decoder.feed = lambda data, name="": (parsed.append(data), feed(data, name))
    try:
        for piece in pieces:
            attempt.feed(piece)
        attempt.end()
    except pomex.UpstreamError as raised:
        error = raised
    attempt.finish(error)
    del attempt.decoder.feed
    return attempt.terminal(2) if fields.get("stream", True) else attempt.body(2), attempt.usage, len(parsed)


def frames(events, **spelling):
    texts = [event if isinstance(event, str) else json.dumps(event, **spelling) for event in events]
    return [f"data: {text}\n\n".encode("utf-8", "surrogatepass") for text in texts]


def cuts(events):
    """The same bytes in one piece, event by event, each event cut, and byte by byte."""
    body = b"".join(events)
    yield "in one piece", [body]
    yield "event by event", events
    yield "two events at a time", [b"".join(events[at:at + 2]) for at in range(0, len(events), 2)]
    yield "cut in events", [body[at:at + 97] for at in range(0, len(body), 97)]
    yield "byte by byte", [body[at:at + 1] for at in range(len(body))]


def check_both_roads(events, monkeypatch, wire="chat", **fields):
    """Every cutting gives the client the same bytes with templates and without; returns the number of events parsed."""
    with monkeypatch.context() as context:
        context.setattr(pomex, "MAX_TEMPLATES", 0)
        plain, usage, _ = outcome(events, wire, **fields)
    parsed = {}
    for cut, pieces in cuts(events):
        found, counted, parsed[cut] = outcome(pieces, wire, **fields)
        assert (found, counted) == (plain, usage), cut
    return parsed


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("streamed", [True, False])
def test_an_event_that_is_not_parsed_says_what_it_would_say_parsed(stream, spelling, streamed, monkeypatch):
    check_both_roads(frames([*stream, "[DONE]"], **spelling), monkeypatch, stream=streamed)


def test_only_text_takes_the_short_road(monkeypatch):
    parsed = {name: check_both_roads(frames(stream), monkeypatch)["in one piece"] for name, stream in STREAMS.items()}
    assert parsed["many texts"] == parsed["many thoughts"] == 3          # the first text, the finish and the usage
    for name in ("usage with every piece", "two choices"):
        assert parsed[name] == len(STREAMS[name])


def named(kind, **fields):
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def block(index, start, deltas):
    return [named("content_block_start", index=index, content_block=start),
            *(named("content_block_delta", index=index, delta=delta) for delta in deltas),
            named("content_block_stop", index=index)]


MESSAGE = [
    named("message_start", message={"id": "m1", "usage": {"input_tokens": 3}}),
    *block(0, {"type": "thinking", "thinking": ""}, [
        *({"type": "thinking_delta", "thinking": text} for text in ["", "", *CONTENTS]), {"type": "signature_delta", "signature": "s"}]),
    *block(1, {"type": "text", "text": ""}, [{"type": "text_delta", "text": text} for text in ["", "", "\n", " ", *CONTENTS]]),
    *block(2, {"type": "tool_use", "id": "t", "name": "f", "input": {}}, [
        {"type": "input_json_delta", "partial_json": text} for text in ('{"a": "', "\\n", "b\nc", 'x"', "}")]),
    *block(3, {"type": "text", "text": ""}, [{"type": "text_delta", "text": text} for text in 40 * ["x"]]),
    named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 9}), named("message_stop")]


@pytest.mark.parametrize("streamed", [True, False])
def test_messages_say_the_same_on_both_roads(monkeypatch, streamed):
    parsed = check_both_roads(MESSAGE, monkeypatch, "messages", stream=streamed)
    assert parsed["in one piece"] < len(MESSAGE) - 38


def content(*parts, count=1, **fields):
    candidate = {"content": {"parts": parts, "role": "model"}, "index": 0, **fields}
    usage = {"promptTokenCount": 12, "candidatesTokenCount": count, "totalTokenCount": 12 + count}
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "gemini-9", "responseId": "r"}


CONTENT = [
    *(content({"text": text, "thought": True}, count=n) for n, text in enumerate(CONTENTS)),
    *(content({"text": text}, count=n) for n, text in enumerate([*CONTENTS, *40 * ["y"]])),
    content({"text": "s", "thoughtSignature": "sig"}, count=70), *(content({"text": text}) for text in ["", "", *CONTENTS[:3]]),
    *(content({"text": text, "thought": True}) for text in ["", "t", "u", "v"]),
    content({"functionCall": {"name": "f", "args": {"a": 1}}}), content({"text": "z"}), content({"text": "z"}, count=99)]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("end", [[], [content({"text": ""}, count=101, finishReason="STOP")]], ids=["cut", "whole"])
def test_gemini_says_the_same_on_both_roads(monkeypatch, streamed, end):
    events = [event.replace(b"\n\n", b"\r\n\r\n") for event in frames([*CONTENT, *end])]
    parsed = check_both_roads(events, monkeypatch, "gemini", stream=streamed)
    assert parsed["in one piece"] < len(events) - 38


@pytest.mark.parametrize("data", ['{"a":"content', '{"delta":{"content":"x', "{"])
def test_a_broken_event_is_an_error_on_both_roads(data):
    whole = json.dumps(SAID[0])
    for broken in (data, whole[:whole.index("Hel") + 2], whole[:-1], whole.replace("Hel", "\n")):
        attempt = translated()
        attempt.feed(b"".join(frames([whole, whole])))
        with pytest.raises(pomex.UpstreamError):
            attempt.feed(b"".join(frames([broken])))


# events as they may look on the line; every one is also fed behind every other
RAW = {
    "plain": '{"choices":[{"index":0,"delta":{"content":"Hi"}}]}',
    "another text": '{"choices":[{"index":0,"delta":{"content":"you"}}]}',
    "empty": '{"choices":[{"index":0,"delta":{"content":""}}]}',
    "null": '{"choices":[{"index":0,"delta":{"content":null}}]}',
    "a number": '{"choices":[{"index":0,"delta":{"content":7}}]}',
    "parts": '{"choices":[{"index":0,"delta":{"content":[{"type":"text","text":"part"}]}}]}',
    "escapes": '{"choices":[{"index":0,"delta":{"content":"\\"\\\\ \\n\\u00e9\\/"}}]}',
    "a backslash before a u": '{"choices":[{"index":0,"delta":{"content":"C:\\\\users"}}]}',
    "a surrogate pair": '{"choices":[{"index":0,"delta":{"content":"\\ud83d\\ude00"}}]}',
    "a field's name in the text": '{"choices":[{"index":0,"delta":{"content":"\\"content\\": \\"x"}}]}',
    "half a surrogate pair": '{"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}',
    "its other half": '{"choices":[{"index":0,"delta":{"content":"\\ude00"}}]}',
    "a lone surrogate as it is": '{"choices":[{"index":0,"delta":{"content":"\ud83d"}}]}',
    "a raw line end": '{"choices":[{"index":0,"delta":{"content":"a\nb"}}]}',
    "a raw null": '{"choices":[{"index":0,"delta":{"content":"a\0b"}}]}',
    "a raw delete": '{"choices":[{"index":0,"delta":{"content":"a\x7f\u2028b"}}]}',
    "cut behind a backslash": '{"choices":[{"index":0,"delta":{"content":"a\\',
    "cut in an escape": '{"choices":[{"index":0,"delta":{"content":"a\\u00"}}]}',
    "cut behind the text": '{"choices":[{"index":0,"delta":{"content":"a"',
    "an escaped end": '{"choices":[{"index":0,"delta":{"content":"a\\"}}]}',
    "no such escape": '{"choices":[{"index":0,"delta":{"content":"\\x"}}]}',
    "more behind the end": '{"choices":[{"index":0,"delta":{"content":"a"}}]}{}',
    "blanks behind the end": '{"choices":[{"index":0,"delta":{"content":"a"}}]} ',
    "blanks before the brace": '{"choices":[{"index":0,"delta":{"content":"a" }}]}',
    "blanks before the colon": '{"choices":[{"index":0,"delta":{"content" : "a"}}]}',
    "another order": '{"choices":[{"delta":{"content":"a"},"index":0}]}',
    "a role": '{"choices":[{"index":0,"delta":{"role":"assistant","content":"a"}}]}',
    "the field's name as a role": '{"choices":[{"index":0,"delta":{"role":"content","\\u0063ontent":"a"}}]}',
    "the field's name as a role, and a thought": '{"choices":[{"index":0,"delta":{"role":"content","reasoning":"a"}}]}',
    "a thought": '{"choices":[{"index":0,"delta":{"reasoning":"a"}}]}',
    "two fields of a thought": '{"choices":[{"index":0,"delta":{"reasoning":"a","thinking":"a"}}]}',
    "a thought and a text": '{"choices":[{"index":0,"delta":{"reasoning":"a","content":"b"}}]}',
    "a thought and no text": '{"choices":[{"index":0,"delta":{"reasoning":"a","content":null}}]}',
    "the field twice": '{"choices":[{"index":0,"delta":{"content":"a","content":"b"}}]}',
    "the field twice, once escaped": '{"choices":[{"index":0,"delta":{"content":"a","\\u0063ontent":"a"}}]}',
    "the field twice, the other escaped": '{"choices":[{"index":0,"delta":{"content":"b","\\u0063ontent":"a"}}]}',
    "the field outside": '{"content":"x","choices":[{"index":0,"delta":{"content" :"a"}}]}',
    "another field outside": '{"content":"y","choices":[{"index":0,"delta":{"content" :"a"}}]}',
    "the field in a field": '{"id":{"content":"x"},"choices":[{"index":0,"delta":{"\\u0063ontent":"a"}}]}',
    "another field in a field": '{"id":{"content":"y"},"choices":[{"index":0,"delta":{"\\u0063ontent":"a"}}]}',
    "the delta twice": '{"choices":[{"index":0,"delta":{"content":"x"},"delta":{"reasoning":"a"}}]}',
    "two choices": '{"choices":[{"index":0,"delta":{"content":"a"}},{"index":1,"delta":{"content":"b"}}]}',
    "no choice": '{"choices":[],"delta":{"content":"a"}}',
    "a message": '{"choices":[{"index":0,"message":{"content":"Hi you"}}]}',
    "a finish": '{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}',
    "a call": '{"choices":[{"index":0,"delta":{"content":"a","tool_calls":[{"index":0,"id":"c","function":{"name":"f","arguments":"{}"}}]}}]}',
    "a call alone": '{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c","function":{"name":"f","arguments":"{}"}}]}}]}',
    "half a tag": '{"choices":[{"index":0,"delta":{"content":"<think>a</"}}]}',
    "usage": '{"choices":[{"index":0,"delta":{"content":"a"}}],"usage":{"prompt_tokens":1,"completion_tokens":2}}',
    "a tier": '{"service_tier":"priority","choices":[{"index":0,"delta":{"content":"a"}}]}',
    "an error": '{"choices":[{"index":0,"delta":{"content":"a"}}],"error":"no"}',
    "done": "[DONE]",
    "nothing": "",
}


@pytest.mark.parametrize("first", RAW)
def test_any_event_behind_any_other_says_the_same_on_both_roads(first, monkeypatch):
    streams = [frames([RAW[first], *[second] * 3, RAW[first], RAW["plain"], second]) for second in RAW.values()]
    short = [[outcome(pieces)[:2] for pieces in (stream, [b"".join(stream)])] for stream in streams]
    monkeypatch.setattr(pomex, "MAX_TEMPLATES", 0)
    for second, found, stream in zip(RAW, short, streams):
        assert found == [outcome(stream)[:2]] * 2, second


def test_a_giant_event_in_splinters_takes_the_short_road_too():
    text = 'a"\\\nb' * 200_000
    events = frames([chunk(content=piece) for piece in ("a", text, text, "b")])
    body = b"".join(events)
    _, _, parsed = outcome([body[at:at + 1000] for at in range(0, len(body), 1000)])
    assert parsed == 1


def test_a_template_is_found_or_given_up_in_linear_time():
    events = ['data: {"x":[' + '{"content":"a"},' * 50_000 + '"\\""]}\n\n', 'data: {"content":"' + '\\"' * 400_000 + 'a\\"}\n\n']
    started = time.perf_counter()
    assert [pomex.field_template(event, "content").before for event in events] == ["", ""]
    assert time.perf_counter() - started < 5


def test_a_stream_whose_events_always_differ_is_not_looked_at_for_ever(monkeypatch):
    made = []
    template = pomex.field_template
    monkeypatch.setattr(pomex, "field_template", lambda *given: made.append(given) or template(*given))
    outcome(frames([{**chunk(content="x"), "created": n} for n in range(500)]))
    assert len(made) == pomex.MAX_TEMPLATES


@pytest.mark.parametrize("wire", sorted(set(pomex.WIRES) - {"demo"}))
@pytest.mark.parametrize("relay", [True, False])
def test_a_request_leaves_nothing_to_the_garbage_collector(wire, relay):
    """It would be kept, its body included, until a collection: 30 MB more under 16 connections with 122 KB bodies."""
    def once():
        tools = [{"type": "function", "name": "f", "parameters": {}}]
        raw = json.dumps({"model": "p/m", "stream": True, "input": "hi", "tools": tools}).encode()
        answer = pomex.ResponsesAnswer(pomex.parse_request(raw), "resp_1", 1, pomex.STANDARD)
        envelope = pomex.Envelope(b"k" * 32, "a")
        attempt = pomex.WIRES[wire].call(pomex.EncodeContext(answer, envelope, "p", "m", relay, "")).attempt
        attempt.feed(b'event: response.created\ndata: {"type":"response.created","response":{}}\n\n')
        attempt.finish(pomex.UpstreamError("cut"))
        attempt.terminal(2)
    once()
    gc.collect()
    gc.disable()
    try:
        once()
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("wire", ["chat", "responses"])
@pytest.mark.parametrize("blank", ["\n\n\n", "\n\n\n\n", "\n\n\n\n\n", "\r\n\r\n\r\n", "\n\n: ping\n\n", "\n\n\n: ping\n\n\n"])
def test_blank_lines_between_events_change_nothing_and_end(monkeypatch, wire, blank):
    """Three line ends behind the last event of a read once kept the loop over events from ending."""
    events = frames([*STREAMS["many texts"], "[DONE]"])
    if wire == "responses":
        deltas = [{"type": "response.output_text.delta", "item_id": "m", "output_index": 0, "content_index": 0, "delta": "x"}] * 20
        item = {"id": "m", "type": "message", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": "x" * 20, "annotations": []}]}
        made = [{"type": "response.created", "response": {"id": "r"}}, {"type": "response.output_item.added", "output_index": 0,
                "item": {**item, "content": []}}, *deltas, {"type": "response.output_item.done", "output_index": 0, "item": item},
                {"type": "response.completed", "response": {"id": "r", "status": "completed", "output": [item]}}]
        events = [named(event.pop("type"), sequence_number=n, **event) for n, event in enumerate(map(dict, made))]
    for passthrough in {"chat": [False], "responses": [False, True]}[wire]:
        plain = read_whole(wire, passthrough, [b"".join(events)])
        odd = [event.replace(b"\n\n", blank.encode()) for event in events]
        for pieces in ([b"".join(odd)], odd, [bytes([byte]) for byte in b"".join(odd)]):
            assert read_whole(wire, passthrough, pieces) == plain


def read_whole(wire, passthrough, pieces):
    raw = json.dumps({"model": "p/m", "stream": True, "input": "hi"}).encode()
    answer = pomex.ResponsesAnswer(pomex.parse_request(raw), "resp_1", 1, pomex.STANDARD)
    context = pomex.EncodeContext(answer, pomex.Envelope(b"k" * 32, "a"), "p", "m", passthrough, "")
    attempt = pomex.WIRES[wire].call(context).attempt
    for piece in pieces:
        attempt.feed(piece)
    attempt.end()
    attempt.finish()
    assert attempt.status == "completed"
    return attempt.terminal(2)
