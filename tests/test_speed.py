"""What was made fast: the short road says what the long one says, and a request leaves nothing behind."""
import gc
import json

import pytest
from sinks import Recorder

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
    "another model": [*SAID[:2], *({**made, "model": "n"} for made in SAID), *END],
}
SPELLINGS = {"compact": {"separators": (",", ":")}, "spaced": {}, "as it is": {"ensure_ascii": False}}


def said(stream, spelling):
    """All calls of the sink, and how many events took the short road."""
    decoder, short = pomex.ChatDecoder(pomex.ToolMap([]), pomex.DIALECTS["generic"]), 0
    decoder.sink = Recorder()
    for event in stream:
        data = json.dumps(event, **spelling)
        short += decoder.template.text_in(data) is not None
        decoder.feed(data)
    decoder.feed("[DONE]")
    return decoder.sink.made, short


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_an_event_that_is_not_parsed_says_what_it_would_say_parsed(stream, spelling, monkeypatch):
    short, _ = said(stream, spelling)
    monkeypatch.setattr(pomex, "chat_template", lambda data, chunk: pomex.DeltaTemplate())
    assert short == said(stream, spelling)[0]


def test_only_text_takes_the_short_road():
    taken = {name: said(stream, {})[1] for name, stream in STREAMS.items()}
    assert taken["text"] == len(SAID) - 1 and taken["thoughts"] == len(THOUGHT) - 1
    assert taken["usage with every piece"] == taken["two choices"] == 0


@pytest.mark.parametrize("data", ['{"a":"content', '{"delta":{"content":"x', "{"])
def test_a_broken_event_is_an_error_on_both_roads(data):
    decoder = pomex.ChatDecoder(pomex.ToolMap([]), pomex.DIALECTS["generic"])
    decoder.sink = Recorder()
    whole = json.dumps(SAID[0])
    decoder.feed(whole)
    for broken in (data, whole[:whole.index("Hel") + 2], whole[:-1], whole.replace("Hel", "\n")):
        with pytest.raises(pomex.UpstreamError):
            decoder.feed(broken)



# events as they may look on the line; every one is also fed behind every other
RAW = {
    "plain": '{"choices":[{"index":0,"delta":{"content":"Hi"}}]}',
    "another text": '{"choices":[{"index":0,"delta":{"content":"you"}}]}',
    "empty": '{"choices":[{"index":0,"delta":{"content":""}}]}',
    "null": '{"choices":[{"index":0,"delta":{"content":null}}]}',
    "a number": '{"choices":[{"index":0,"delta":{"content":7}}]}',
    "parts": '{"choices":[{"index":0,"delta":{"content":[{"type":"text","text":"part"}]}}]}',
    "escapes": '{"choices":[{"index":0,"delta":{"content":"\\"\\\\ \\n\\u00e9\\/"}}]}',
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


def outcome(events):
    """All calls of the sink, an error in the place of the event that it came of."""
    decoder = pomex.ChatDecoder(pomex.ToolMap([]), pomex.DIALECTS["generic"])
    decoder.sink = Recorder()
    for data in events:
        try:
            decoder.feed(data)
        except pomex.UpstreamError as error:
            decoder.sink.made.append(("raised", str(error), {}))
    return decoder.sink.made


@pytest.mark.parametrize("first", RAW)
def test_any_event_behind_any_other_says_the_same_on_both_roads(first, monkeypatch):
    streams = [[RAW[first], *[second] * 3, RAW[first], RAW["plain"], second] for second in RAW.values()]
    short = [outcome(stream) for stream in streams]
    monkeypatch.setattr(pomex, "chat_template", lambda data, chunk: pomex.DeltaTemplate())
    for second, found, stream in zip(RAW, short, streams):
        assert found == outcome(stream), second


def test_a_giant_event_in_splinters_takes_the_short_road_too():
    text = 'a"\\\n\u00e9\U0001f600' * 200_000
    events = [chunk(content=piece) for piece in ("a", text, text, "b")]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()
    decoder, frames = pomex.ChatDecoder(pomex.ToolMap([]), pomex.DIALECTS["generic"]), pomex.SSEDecoder()
    decoder.sink = Recorder()
    for at in range(0, len(body), 1000):
        for event in frames.feed(body[at:at + 1000]):
            assert len(decoder.sink.made) < 2 or decoder.template.text_in(event.data) is not None
            decoder.feed(event.data)
    assert "".join(given[0] for name, given, _ in decoder.sink.made if name == "text") == f"a{text}{text}b"


@pytest.mark.parametrize("wire", sorted(set(pomex.WIRES) - {"demo"}))
@pytest.mark.parametrize("relay", [True, False])
def test_a_request_leaves_nothing_to_the_garbage_collector(wire, relay):
    """It would be kept, its body included, until a collection: 30 MB more under 16 connections with 122 KB bodies."""
    def once():
        tools = [{"type": "function", "name": "f", "parameters": {}}]
        raw = json.dumps({"model": "p/m", "stream": True, "input": "hi", "tools": tools}).encode()
        answer = pomex.ResponseContext(pomex.parse_request(raw), "resp_1", 1, pomex.STANDARD)
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
