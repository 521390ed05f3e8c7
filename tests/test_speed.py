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


@pytest.mark.parametrize("wire", sorted(set(pomex.WIRES) - {"demo"}))
@pytest.mark.parametrize("relay", [True, False])
def test_a_request_leaves_nothing_to_the_garbage_collector(wire, relay):
    """It would be kept, its body included, until a collection: 30 MB more under 16 connections with 122 KB bodies."""
    def once():
        tools = [{"type": "function", "name": "f", "parameters": {}}]
        raw = json.dumps({"model": "p/m", "stream": True, "input": "hi", "tools": tools}).encode()
        answer = pomex.ResponseContext(pomex.parse_request(raw), "resp_1", 1, pomex.STANDARD)
        envelope = pomex.Envelope(b"k" * 32, "a")
        attempt = pomex.WIRES[wire].call(pomex.Job(answer, envelope, "p", "m", relay, "")).attempt
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
