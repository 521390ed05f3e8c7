"""Anthropic Messages: the decoder, the encoder, what is mended, what is cached."""
from __future__ import annotations

import base64
import copy
import itertools
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import pytest
import sinks
from sinks import whole

import pomex

JSON = dict[str, Any]
SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
RECORDED = SHARED / "recorded"
NO_RECORDINGS = pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded exchanges are not beside the repository")
NEWEST, BUDGET, OTHER = "claude-opus-5-5", "claude-sonnet-4-5", "glm-5"
MODELS = (NEWEST, "claude-sonnet-5-5", "claude-haiku-5-5", "claude-opus-4-8", "claude-opus-4-6", BUDGET, "claude-3-5-haiku",
          OTHER)
SEARCH = {"type": "web_search"}
TOOL = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


# --- what a decoder says

class View(sinks.View):
    def calls(self) -> list[tuple[str, str, str]]:
        return [(i["id"], i["name"], i["arguments"]) for i in self.all("function_call")]

    def thoughts(self) -> list[JSON]:
        replays = [i["fields"].get("sealed_replay") for i in self.all("reasoning")]
        return [block for replay in replays if replay for block in replay["blocks"]]

    def citations(self) -> list[tuple[str, str]]:
        """Every annotation with the text that it stands for."""
        return [(item["text"][a["start_index"]:a["end_index"]], a["url"]) for item in self.items.values()
                for a in item["annotations"]]

    def outcome(self) -> tuple[Any, ...]:
        searches = [i["fields"]["action"]["query"] for i in self.all("web_search_call")]
        return (self.said(), self.said("summary"), self.calls(), self.thoughts(), searches, self.citations(), self.usage,
                self.end())


def book(tools: Iterable[JSON] = (), model: str = BUDGET) -> pomex.ToolMap:
    return pomex.ToolMap(list(tools), bool(pomex.longest_prefix(pomex.ANTHROPIC_MODELS, model).web_search), "claude")


def decoder(tools: Iterable[JSON] = ()) -> pomex.MessagesDecoder:
    made = pomex.MessagesDecoder(book(tools), None, "call_new_")
    made.sink = View()
    return made


def view_of(events: Iterable[Any], reader: pomex.MessagesDecoder | None = None) -> View:
    return sinks.feed_all(reader or decoder([SEARCH]), events)


# --- every recorded exchange

def exchanges(name: str, protocol: str = "anthropic") -> list[pathlib.Path]:
    return sorted(RECORDED.glob(f"{protocol}/*/{name}"))


def named(path: pathlib.Path) -> str:
    return path.parent.name


def recorded_data(path: pathlib.Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line[5:].strip() for line in lines if line.startswith("data:")]


def message_of(events: list[JSON]) -> JSON:
    """The message that a stream adds up to, put together the plain way."""
    message: JSON = {"content": [], "usage": {}}
    blocks: dict[int, JSON] = {}
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            message["usage"].update(event["message"]["usage"])
        elif kind == "content_block_start":
            blocks[event["index"]] = {**event["content_block"], "json": ""}
            message["content"].append(blocks[event["index"]])
        elif kind == "content_block_delta":
            block, delta = blocks[event["index"]], dict(event["delta"])
            what = delta.pop("type")
            if what == "input_json_delta":
                block["json"] += delta["partial_json"]
            elif what in ("text_delta", "thinking_delta"):
                block[what[:-6]] += delta[what[:-6]]
            elif what == "signature_delta":
                block["signature"] = delta["signature"]
            elif what == "citations_delta":
                block["citations"] = [*block.get("citations", []), delta["citation"]]
        elif kind == "message_delta":
            message["usage"].update({k: v for k, v in event["usage"].items() if v is not None})
            message.update({k: v for k, v in event["delta"].items() if v})
        elif kind == "error":
            message["error"] = event["error"]
    return message


def expected_of(message: JSON) -> tuple[Any, ...]:
    blocks = message["content"]
    thoughts = [{k: v for k, v in b.items() if k != "json"} for b in blocks if b["type"] in ("thinking", "redacted_thinking")]
    calls = [(b["id"], b["name"], b.get("json") or (json.dumps(b["input"], separators=(",", ":")) if b["input"] else ""))
             for b in blocks if b["type"] == "tool_use"]
    searches = [json.loads(b.get("json") or json.dumps(b["input"]))["query"] for b in blocks
                if b["type"] == "server_tool_use" and b["name"] == "web_search"]
    cited = [(b["text"], c["url"]) for b in blocks if b["type"] == "text" for c in b.get("citations") or [] if "url" in c]
    counts = message["usage"]
    passes = counts.get("iterations") or [counts]
    read, written = (sum(p.get(f"cache_{w}_input_tokens") or 0 for p in passes) for w in ("read", "creation"))
    usage = pomex.Usage(sum(p["input_tokens"] for p in passes) + read + written, read, written,
                        sum(p["output_tokens"] for p in passes),
                        (counts.get("output_tokens_details") or {}).get("thinking_tokens", 0),
                        estimated="stop_reason" not in message,
                        cache_write_1h=sum((p.get("cache_creation") or {}).get("ephemeral_1h_input_tokens", 0) for p in passes),
                        web_searches=(counts.get("server_tool_use") or {}).get("web_search_requests", 0))
    end = {"max_tokens": "max_output_tokens", "refusal": "content_filter", "pause_turn": "none", None: "none"}.get(
        message.get("stop_reason"), "completed")
    return ("".join(b["text"] for b in blocks if b["type"] == "text"),
            "".join(b["thinking"] for b in blocks if b["type"] == "thinking"),
            calls, thoughts, searches, cited, usage, "failed" if "error" in message else end)


def feed_bytes(pieces: Iterable[bytes]) -> View:
    return sinks.feed_bytes(decoder([SEARCH]), pieces)


SPLICED = "spliced-message-start-stream"


@NO_RECORDINGS
@pytest.mark.parametrize("path", exchanges("response.sse"), ids=named)
class TestEveryRecordedStream:
    def test_says_what_it_holds(self, path: pathlib.Path) -> None:
        view = feed_bytes([path.read_bytes()])
        events = [json.loads(data) for data in recorded_data(path)]
        if named(path) == SPLICED:      # two answers in one: what followed is nobody's
            assert view.end() == "failed" and "spliced" in str(view.error)
            return
        if named(path) == "documented-overloaded-first-event":
            assert view.end() == "failed" and not view.items
            return
        assert view.outcome() == expected_of(message_of(events))
        if view.end() not in ("failed", "none"):
            assert view.stops[-1].final
            cut = view.end() != "completed"
            assert all(item["closed"] or (cut and item["kind"] == "function_call") for item in view.items.values())

    def test_says_the_same_byte_by_byte(self, path: pathlib.Path) -> None:
        data = path.read_bytes()
        size = 1 if len(data) < 30_000 else 97
        assert feed_bytes(data[i:i + size] for i in range(0, len(data), size)).outcome() == feed_bytes([data]).outcome()

    def test_cut_after_any_event_claims_no_more_than_came(self, path: pathlib.Path) -> None:
        reader, finished = decoder([SEARCH]), False
        view = reader.sink
        for data in recorded_data(path):
            event = json.loads(data)
            reason = (event.get("delta") or {}).get("stop_reason") if event["type"] == "message_delta" else None
            finished = finished or event["type"] == "message_stop" or bool(reason and reason != "pause_turn")
            reader.feed(data)
            reader.end()
            assert bool(view.stops) <= finished
            for item in view.all("function_call"):
                assert not item["closed"] or isinstance(json.loads(item["arguments"] or "{}"), dict)

    def test_passes_over_events_that_nobody_knows(self, path: pathlib.Path) -> None:
        strange = ['{"type":"ping"}', '{"type":"new_thing","index":0,"delta":{}}',
                   '{"type":"content_block_start","index":901,"content_block":{"type":"hologram","text":"?"}}',
                   '{"type":"content_block_delta","index":901,"delta":{"type":"hologram_delta","text":"?"}}',
                   '{"type":"content_block_delta","index":901,"delta":{"type":"text_delta","text":""}}',
                   '{"type":"content_block_stop","index":901}']
        known = recorded_data(path)
        between = [json.loads(data)["type"] in ("content_block_start", "message_delta", "message_stop") for data in known]
        mixed = [data for data, free in zip(known, between) for data in (*(strange if free else strange[:2]), data)]
        plain = view_of(known).outcome()
        assert view_of(mixed).outcome()[:4] == plain[:4] and view_of(mixed).end() == view_of(known).end()


@NO_RECORDINGS
@pytest.mark.parametrize("path", exchanges("response.json"), ids=named)
def test_every_recorded_whole_answer_says_what_it_holds(path: pathlib.Path) -> None:
    body = json.loads(path.read_bytes())
    if body["type"] == "error":
        pytest.skip("an error: see below")
    view = whole(decoder([SEARCH]), copy.deepcopy(body))
    assert view.outcome() == expected_of({**body, "content": [{"json": "", **block} for block in body["content"]]})
    assert view.stops[-1].final and all(item["closed"] for item in view.items.values())


KINDS = {"err-400-context-length": "context_length", "err-401": "auth", "err-404-model": "model_not_found", "documented-err-429": "rate_limit",
         "documented-err-529": "overload"}


@NO_RECORDINGS
@pytest.mark.parametrize("path", [p for p in exchanges("response.json") if "-err-" in named(p) or named(p).startswith("err-")],
                         ids=named)
def test_every_recorded_error_is_of_its_kind(path: pathlib.Path) -> None:
    meta = json.loads(path.with_name("meta.json").read_text(encoding="utf-8"))
    headers = pomex.Headers(list(meta.get("response_headers", {}).items()))
    error = pomex.provider_error(meta["status"], headers, path.read_bytes())
    assert error.kind == KINDS.get(named(path), "bad_request")
    inside = whole(decoder(), json.loads(path.read_bytes()))
    assert inside.error is not None and (inside.error.kind == error.kind
                                         or meta["status"] == 404)     # type: ignore[attr-defined]


# --- streams, each by what is odd in it

def started(index: int, **block: Any) -> JSON:
    return {"type": "content_block_start", "index": index, "content_block": block}


def piece(index: int, kind: str, **fields: Any) -> JSON:
    return {"type": "content_block_delta", "index": index, "delta": {"type": f"{kind}_delta", **fields}}


def stopped(index: int) -> JSON:
    return {"type": "content_block_stop", "index": index}


def ended(reason: str | None, **usage: Any) -> list[JSON]:
    return [{"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 5, **usage}},
            {"type": "message_stop"}]


def said(text: str, index: int = 0) -> list[JSON]:
    return [started(index, type="text", text=""), piece(index, "text", text=text), stopped(index)]


def called(index: int = 0, arguments: str = "{}", name: str = "f") -> list[JSON]:
    return [started(index, type="tool_use", id=f"toolu_{index}", name=name, input={}),
            *([piece(index, "input_json", partial_json=arguments)] if arguments else []), stopped(index)]


BEGIN = {"type": "message_start", "message": {"id": "msg_1",
                                              "usage": {"input_tokens": 7, "cache_read_input_tokens": 3, "output_tokens": 1}}}
ERROR = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}

STREAMS: dict[str, tuple[list[JSON], list[str], str, str]] = {
    "plain": ([BEGIN, *said("a"), *ended("end_turn")], ["message"], "a", "completed"),
    "no message_stop": ([BEGIN, *said("a"), ended("end_turn")[0]], ["message"], "a", "completed"),
    "no stop_reason": ([BEGIN, *said("a"), {"type": "message_stop"}], ["message"], "a", "completed"),
    "a stop_reason that nobody knows": ([BEGIN, *said("a"), *ended("tired")], ["message"], "a", "completed"),
    "no content_block_stop": ([BEGIN, *said("a")[:2], *ended("end_turn")], ["message"], "a", "completed"),
    "text in content_block_start": ([BEGIN, started(0, type="text", text="a"), stopped(0), *ended("end_turn")], ["message"],
                                    "a", "completed"),
    "texts that follow each other": ([BEGIN, *said("a", 0), *said("b", 1), *ended("end_turn")], ["message"], "ab", "completed"),
    "a block that nobody knows between texts": ([BEGIN, *said("a", 0), started(1, type="hologram"), stopped(1), *said("b", 2),
                                                 *ended("end_turn")], ["message", "message"], "ab", "completed"),
    "#41: an error first": ([ERROR], [], "", "failed"),
    "an error in the middle": ([BEGIN, *said("a")[:2], ERROR], ["message"], "a", "failed"),
    "#14: nothing at the end": ([BEGIN, *said("a")], ["message"], "a", "none"),
    "#42: a second answer": ([BEGIN, *said("a"), {"type": "message_start", "message": {"id": "msg_2"}}], ["message"], "a",
                             "failed"),
    "the beginning again": ([BEGIN, BEGIN, *said("a"), BEGIN, *ended("end_turn")], ["message"], "a", "completed"),
    "context window": ([BEGIN, *said("a"), *ended("model_context_window_exceeded")], ["message"], "a", "max_output_tokens"),
    "a thought without signature": ([BEGIN, started(0, type="thinking", thinking=""), piece(0, "thinking", thinking="t"),
                                     stopped(0),
                                     *ended("max_tokens")], ["reasoning"], "", "max_output_tokens"),
    "an empty thought": ([BEGIN, started(0, type="thinking", thinking="", signature=""), stopped(0), *said("a", 1),
                          *ended("end_turn")],
                         ["message"], "a", "completed"),
    "a web search without its result": ([BEGIN, started(0, type="server_tool_use", id="s", name="web_search",
                                                        input={"query": "q"}), stopped(0),
                                         *ended("refusal")], ["web_search_call"], "", "content_filter"),
    "a pause where nothing can be resumed": ([BEGIN, *ended("pause_turn")], [], "", "max_output_tokens"),
}


@pytest.mark.parametrize("events, kinds, text, end", STREAMS.values(), ids=STREAMS)
def test_streams_of_every_shape_end_as_they_should(events: list[JSON], kinds: list[str], text: str, end: str) -> None:
    view = view_of(events)
    assert ([item["kind"] for item in view.items.values()], view.said(), view.end()) == (kinds, text, end)
    assert end in ("failed", "none") or all(item["closed"] for item in view.items.values())


CALLS: dict[str, tuple[list[JSON], str, list[bool]]] = {
    "no arguments": ([*called(0, ""), *ended("tool_use")], "completed", [True]),
    "no arguments, cut": ([*called(0, ""), *ended("max_tokens")], "max_output_tokens", [False]),
    "no arguments, another call after it": ([*called(0, ""), *called(1, '{"a":'), *ended("max_tokens")], "max_output_tokens",
                                            [True, False]),
    "half of the arguments": ([*called(0, '{"a":'), *ended("max_tokens")], "max_output_tokens", [False]),
    "half of them, and yet tool_use": ([*called(0, '{"a":'), *ended("tool_use")], "completed", [False]),
    "the input at once": ([started(0, type="tool_use", id="x", name="f", input={"a": 1}), stopped(0), *ended("tool_use")],
                          "completed", [True]),
    "no block stop": ([*called(0, '{"a":')[:2], *ended("max_tokens")], "max_output_tokens", [False]),
    "not an object": ([*called(0, "[1]"), *ended("tool_use")], "completed", [False]),
}


@pytest.mark.parametrize("events, end, closed", CALLS.values(), ids=CALLS)
def test_a_call_is_finished_only_when_its_arguments_are_whole(events: list[JSON], end: str, closed: list[bool]) -> None:
    view = view_of([BEGIN, *events])
    assert view.end() == end and [item["closed"] for item in view.all("function_call")] == closed


def test_ids_of_calls_are_kept_made_where_missing_and_told_apart() -> None:
    twice = [*called(0), {**called(1)[0], "content_block": called(0)[0]["content_block"]}, *called(1)[1:]]
    nameless = {**called(2)[0], "content_block": {"type": "tool_use", "name": "f"}}
    view = view_of([BEGIN, *twice, nameless, *called(2)[1:], *ended("tool_use")])
    assert [item["id"] for item in view.all("function_call")] == ["toolu_0", "toolu_0_1", "call_new_2"]
    assert all(item["closed"] for item in view.all("function_call"))


def test_what_follows_a_call_without_a_stop_does_not_finish_it() -> None:
    """Its arguments may still have been to come."""
    for cut in ([*called(0, "")[:1], *ended("tool_use")], [*called(0, '{"a":')[:2], *ended("tool_use")]):
        assert [item["closed"] for item in view_of([BEGIN, *cut]).all("function_call")] == [False]


def test_citations_that_began_with_the_block_stay_before_those_that_follow() -> None:
    first, second = ({"type": "web_search_result_location", "url": f"https://{name}.example/", "title": name} for name in "ab")
    block = started(0, type="text", text="It ", citations=[first])
    view = view_of([BEGIN, block, piece(0, "text", text="is."), piece(0, "citations", citation=second), stopped(0),
                    *ended("end_turn")])
    assert view.citations() == [("It is.", first["url"]), ("It is.", second["url"])]


@pytest.mark.parametrize("data", ["{", "[]", "null",
                                  '{"type":"content_block_delta","index":3,"delta":{"type":"text_delta","text":"a"}}'])
def test_what_cannot_be_read_is_the_upstreams_error(data: str) -> None:
    with pytest.raises(pomex.UpstreamError):
        list(decoder().feed(data))


def test_usage_replaces_and_never_adds() -> None:
    """#39, #40: message_start and message_delta are two readings of one meter."""
    view = view_of([BEGIN, *said("a"), ended(None, input_tokens=9)[0],
                    *ended("end_turn", input_tokens=11, cache_creation_input_tokens=2)])
    assert view.usage == pomex.Usage(16, 3, 2, 5)
    assert view_of([BEGIN]).usage == pomex.Usage(10, 3, 0, 1, estimated=True)
    uncounted = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}
    assert view_of([BEGIN, *said("a"), uncounted]).usage == pomex.Usage(10, 3, 0, 1, estimated=True)


def test_a_refusal_says_why() -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": "Blocked."}
    view = view_of([BEGIN, {"type": "message_delta", "delta": {"stop_reason": "refusal", "stop_details": details},
                            "usage": {}}])
    assert view.stops == [pomex.Stop("content_filter", explanation="Blocked.")]


# --- a turn that is paused

def resumed(body: bytes, reader: Any) -> JSON:
    """The body that goes up after the pause that `reader` has read."""
    call = pomex.WIRES["messages"].call(job({"input": "q"}))._replace(body=body)
    assert isinstance(call.attempt, pomex.TranslatedStream)
    call.attempt.decoder = reader
    again = call.resumed()
    assert again is not None
    sent: JSON = json.loads(again.body)
    return sent


@NO_RECORDINGS
def test_a_paused_turn_goes_on_with_the_recorded_request_in_the_same_answer() -> None:
    paused, rest = (RECORDED / "anthropic" / name for name in ("pause-turn-stream", "pause-turn-resumed-stream"))
    reader = decoder([SEARCH])
    view = view_of(recorded_data(paused / "response.sse"), reader)
    assert view.end() == "none" and not view.all("web_search_call")[-1]["closed"]
    first = view.usage
    sent = resumed((paused / "request.json").read_bytes(), reader)
    recorded = json.loads((rest / "request.json").read_bytes())

    def shape(blocks: list[JSON]) -> list[Any]:
        return [(b["type"], b.get("text"), b.get("thinking"), b.get("signature"), b.get("id"), b.get("input"),
                 b.get("tool_use_id")) for b in blocks]
    assert shape(sent["messages"][-1]["content"]) == shape(recorded["messages"][-1]["content"])
    assert sent["messages"][:-1] == recorded["messages"][:-1] and reader.paused == []
    for data in recorded_data(rest / "response.sse"):
        reader.feed(data)
    assert view.end() == "completed" and all(item["closed"] for item in view.items.values())
    assert view.usage.input == first.input + 482529 and view.usage.output == first.output + 1310
    assert len(view.all("web_search_call")) == 15
    assert {item["fields"]["status"] for item in view.all("web_search_call")} == {"completed"}


def test_pauses_end_after_five() -> None:
    reader = decoder([SEARCH])
    for turn in range(pomex.MAX_PAUSES):
        view = view_of([{**BEGIN, "message": {"id": f"msg_{turn}", "usage": {"input_tokens": 1}}}, *said("a"),
                        *ended("pause_turn")], reader)
        assert view.end() == "none" and reader.paused == [{"type": "text", "text": "a"}]
        reader.paused = []
    view = view_of([BEGIN, *said("a"), *ended("pause_turn")], reader)
    assert view.end() == "max_output_tokens" and view.usage.output == 30 and reader.paused == []


def test_a_second_pause_continues_the_same_assistant_turn() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}
    reader = decoder([SEARCH])
    for text in "ab":
        view = view_of([{**BEGIN, "message": {"id": f"msg_{text}", "usage": {"input_tokens": 1}}}, *said(text), *ended("pause_turn")], reader)
        assert view.end() == "none"
        body = resumed(json.dumps(body).encode(), reader)
    assert [m["role"] for m in body["messages"]] == ["user", "assistant"]
    assert [block["text"] for block in body["messages"][1]["content"]] == ["a", "b"]


@pytest.mark.parametrize("arguments, given", [('{"a": 1}', {"a": 1}), ('{"a":', {}), ("[1]", {}), ("", {})])
def test_a_call_in_a_paused_turn_goes_back_with_an_object(arguments: str, given: JSON) -> None:
    reader = decoder([SEARCH])
    view_of([BEGIN, *called(0, arguments), *ended("pause_turn")], reader)
    assert reader.paused == [{"type": "tool_use", "id": "toolu_0", "name": "f", "input": given}]


# --- through the whole gateway: answers, and what comes back with the next turn

ENVELOPE = pomex.Envelope(b"secret", "account")


def request_of(body: JSON) -> pomex.ResponsesRequest:
    return pomex.parse_request(json.dumps({"model": "anthropic/x", **body}).encode())


def job(body: JSON, model: str = BUDGET, prompt_cache: str = "5m") -> pomex.EncodeContext:
    answer = pomex.ResponsesAnswer(request_of(body), "resp_test", 1790000000, pomex.STANDARD)
    return pomex.EncodeContext(answer, ENVELOPE, "anthropic", model, False, "", prompt_cache)


def encoded(body: JSON, model: str = BUDGET, prompt_cache: str = "off") -> tuple[JSON, list[str]]:
    call = pomex.WIRES["messages"].call(job(body, model, prompt_cache))
    return json.loads(call.body), call.dropped


def output_of(data: bytes, body: JSON | None = None) -> JSON:
    """The response object that a stream of the provider becomes."""
    call = pomex.WIRES["messages"].call(job(body or {"input": "hi", "tools": [SEARCH]}))
    call.attempt.feed(data)
    call.attempt.end()
    call.attempt.finish()
    return json.loads(call.attempt.body(0))


def as_bytes(events: Iterable[JSON]) -> bytes:
    return b"".join(pomex.sse_frame(event["type"], json.dumps(event)) for event in events)


@NO_RECORDINGS
@pytest.mark.parametrize("path", [p for p in exchanges("response.sse") if "_delta" in p.read_text(encoding="utf-8") and (
    "signature_delta" in p.read_text(encoding="utf-8") or "redacted_thinking" in p.read_text(encoding="utf-8"))
                                  and named(p) != SPLICED], ids=named)
def test_every_recorded_thought_goes_back_byte_for_byte(path: pathlib.Path) -> None:
    """#15, #16, #17: signature-only and redacted ones too, before the call that they led to."""
    output = output_of(path.read_bytes())["output"]
    given = [{"type": "message", "role": "user", "content": "q"}, *output,
             {"type": "message", "role": "user", "content": "go on"}]
    body, dropped = encoded({"input": given})
    known = expected_of(message_of([json.loads(data) for data in recorded_data(path)]))[3]
    assert known and [block for block in body["messages"][1]["content"] if block["type"] in pomex.THINKING_BLOCKS] == known
    check_body(body, BUDGET)
    assert not [name for name in dropped if name.startswith("reasoning")]


def test_thoughts_of_others_are_dropped_and_named() -> None:
    """#18: another provider's, an altered envelope, another account's; OpenAI's own."""
    replay = {"blocks": [{"type": "thinking", "thinking": "t", "signature": "s"}]}
    sealed = ENVELOPE.seal("anthropic", "m", replay)
    foreign = [ENVELOPE.seal("google", "m", replay), sealed[:-3] + "AAA",
               pomex.Envelope(b"secret", "other").seal("anthropic", "m", replay), "gAAAA"]
    items = [{"type": "reasoning", "summary": [], "encrypted_content": text} for text in (*foreign, sealed)]
    body, dropped = encoded({"input": [*items, {"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]})
    assert body["messages"][1]["content"] == [*replay["blocks"], {"type": "text", "text": "a"}]
    assert {"reasoning:google", "reasoning:unverified", "input:reasoning"} <= set(dropped)


def test_a_thought_at_the_end_of_a_turn_is_left_out() -> None:
    sealed = ENVELOPE.seal("anthropic", "m", {"blocks": [{"type": "redacted_thinking", "data": "d"}]})
    thought = {"type": "reasoning", "summary": [], "encrypted_content": sealed}
    user = {"role": "user", "content": "q"}
    assert roles(encoded({"input": [user, thought, user]})[0]) == ["user"]
    body, _ = encoded({"input": [user, {"role": "assistant", "content": "a"}, thought, user]})
    assert body["messages"][1]["content"] == [{"type": "text", "text": "a"}]


def test_a_web_search_is_an_item_with_its_events_and_its_citations() -> None:
    result = {"type": "web_search_result", "url": "https://a.example/", "title": "A", "encrypted_content": "x"}
    cited = {"type": "web_search_result_location", "url": "https://a.example/", "title": "A", "cited_text": "c",
             "encrypted_index": "i"}
    events = [BEGIN, *said("I look. ", 0), started(1, type="server_tool_use", id="s1", name="web_search", input={}),
              piece(1, "input_json", partial_json='{"query":"pomex"}'), stopped(1),
              started(2, type="web_search_tool_result", tool_use_id="s1", content=[result]), stopped(2),
              *said("It is ", 3), started(4, type="text", text="", citations=[]), piece(4, "citations", citation=cited),
              piece(4, "text", text="A gateway"), stopped(4), *said(".", 5), *ended("end_turn")]
    call = pomex.WIRES["messages"].call(job({"input": "hi", "stream": True, "tools": [SEARCH]}))
    call.attempt.feed(as_bytes(events))
    call.attempt.end()
    call.attempt.finish()
    frames = [json.loads(line[6:]) for line in call.attempt.terminal(0).decode().splitlines() if line.startswith("data: {")]
    assert [f["type"] for f in frames if "web_search" in f["type"]] == [
        "response.web_search_call.in_progress", "response.web_search_call.searching", "response.web_search_call.completed"]
    first, search, second = frames[-1]["response"]["output"]
    assert first["content"][0]["text"] == "I look. "
    assert search["status"] == "completed" and search["action"] == {"type": "search", "query": "pomex", "queries": ["pomex"]}
    part = second["content"][0]
    assert part["text"] == "It is A gateway."
    assert part["annotations"] == [{"type": "url_citation", "start_index": 6, "end_index": 15, "url": "https://a.example/",
                                    "title": "A"}]
    assert frames[-1]["response"]["status"] == "completed"


OUTPUTS: dict[str, tuple[list[JSON], str, list[str]]] = {
    "nothing at all": ([BEGIN, *ended("end_turn")], "completed", ["message"]),
    "white space before a thought": ([BEGIN, *said("\n\n", 0), started(1, type="redacted_thinking", data="d"), stopped(1),
                                      *said("a", 2),
                                      *ended("end_turn")], "completed", ["reasoning", "message"]),
    "a refusal": ([BEGIN, *ended("refusal")], "incomplete", ["message"]),
    "half a call": ([BEGIN, *called(0, '{"a":'), *ended("max_tokens")], "incomplete", ["function_call"]),
    "half a call that counts as whole": ([BEGIN, *called(0, '{"a":'), *ended("tool_use")], "failed", []),
    "a cut": ([BEGIN, *called(0), *said("b", 1)[:2]], "failed", ["function_call", "message"]),
}


@pytest.mark.parametrize("events, status, kinds", OUTPUTS.values(), ids=OUTPUTS)
def test_answers_end_truly(events: list[JSON], status: str, kinds: list[str]) -> None:
    response = output_of(as_bytes(events))
    assert (response["status"], [item["type"] for item in response["output"]]) == (status, kinds)


def test_a_cut_stream_is_billed_by_its_counted_input_and_an_estimate_of_its_output() -> None:
    response = output_of(as_bytes([BEGIN, *said("word " * 80)[:2]]))
    assert response["usage"]["input_tokens"] == 10 and response["usage"]["output_tokens"] == 100


# --- what Anthropic refuses: every encoded body is checked against it

IMAGE = "data:image/png;base64,iVBORw0KGgo="


def texts_in(blocks: list[JSON]) -> Iterable[str]:
    return (block["text"] for block in blocks if block["type"] == "text")


def check_body(body: JSON, model: str) -> None:
    """The 400s of TRANSLATION.md 3 and 5.1, said again without the table of the code."""
    tail = model.partition("claude-")[2].replace(".", "-")
    strict = re.match(r"(fable|mythos)-5|opus-4-[78]|opus-5|sonnet-5|haiku-5-5", tail)
    assert set(body) <= {"model", "max_tokens", "system", "tools", "tool_choice", "messages", "thinking", "output_config",
                         "metadata",
                         "temperature", "top_p", "stream"}
    assert isinstance(body["max_tokens"], int) and 1 <= body["max_tokens"] <= 128_000
    check_turns(body, tail)
    for blocks in (*([body["system"]] if "system" in body else []), *(message["content"] for message in body["messages"])):
        assert blocks and all(text.strip() for text in texts_in(blocks)), "text content blocks must be non-empty"
    names = [tool["name"] for tool in body.get("tools", [])]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    for tool in body.get("tools", []):
        if "input_schema" in tool:
            assert tool["input_schema"]["type"] == "object" and not {"anyOf", "oneOf", "allOf",
                                                                     "$ref"} & set(tool["input_schema"])
            assert "strict" not in tool
    marks = json.dumps(body).count('"cache_control"')
    assert marks <= 4, "a maximum of 4 blocks with cache_control"
    thinking = body.get("thinking") or {}
    check_thinking(body, thinking, tail)
    if strict or thinking.get("type") in ("enabled", "adaptive"):
        assert not {"temperature", "top_p"} & set(body), "sampling parameters"
    assert not {"temperature", "top_p"} <= set(body) and 0 <= body.get("temperature", 0) <= 1
    if (body.get("tool_choice") or {}).get("type") in ("any", "tool"):
        assert not re.match(r"(fable|mythos)-5-[12]|(opus|sonnet)-5-5", tail) and thinking.get("type") != "enabled"
    if "tool_choice" in body:
        assert body.get("tools") and (body["tool_choice"].get("name") or names[0]) in names
    shape = (body.get("output_config") or {}).get("format")
    if shape:
        check_strict(shape["schema"])


def check_turns(body: JSON, tail: str) -> None:
    messages = body["messages"]
    assert messages[0]["role"] == "user"
    if messages[-1]["role"] == "assistant":
        assert not re.match(r"(fable|mythos)|(opus|sonnet)-(4-[678]|5)|haiku-5",
                            tail), "does not support assistant message prefill"
    open_ids: list[str] = []
    seen: set[str] = set()
    for before, message in itertools.pairwise([{"role": ""}, *messages]):
        role, blocks = message["role"], message["content"]
        assert role != before["role"]
        if role == "system":
            assert before["role"] == "user" and re.match(r"opus-4-8|opus-5|(fable|mythos)-5", tail)
            continue
        if role == "user":
            results = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
            assert results == open_ids, "every tool_use needs its tool_result in the next message"
            kinds = [block["type"] == "tool_result" for block in blocks]
            assert kinds == sorted(kinds, reverse=True), "results before text"
            assert not {"thinking", "redacted_thinking", "tool_use"} & {block["type"] for block in blocks}
            open_ids = []
            continue
        assert not open_ids
        assert blocks[-1]["type"] not in ("thinking", "redacted_thinking"), "the final block cannot be thinking"
        open_ids = [block["id"] for block in blocks if block["type"] == "tool_use"]
        assert len(set(open_ids)) == len(open_ids) and not seen & set(open_ids)
        assert all(re.fullmatch(r"[a-zA-Z0-9_-]+", each) for each in open_ids)
        assert all(isinstance(block["input"], dict) for block in blocks if block["type"] == "tool_use")
        seen |= set(open_ids)
    assert not open_ids


def check_thinking(body: JSON, thinking: JSON, tail: str) -> None:
    kind, effort = thinking.get("type"), (body.get("output_config") or {}).get("effort")
    adaptive = re.match(r"(fable|mythos)-5|(opus|sonnet)-(4-[678]|5)|haiku-5-5|unheard-of", tail)
    allowed = {None, "adaptive"} if adaptive else {None, "enabled"}
    if re.match(r"(opus|sonnet)-5$|haiku-5-5", tail):
        allowed.add("disabled")
    if tail.startswith("sonnet-5-5"):
        allowed.add("between_tools")
    assert kind in allowed
    if effort:
        assert adaptive or tail.startswith("opus-4-5")
        assert effort in {"low", "medium", "high", "max"} or (effort == "xhigh" and not re.match(r"(opus|sonnet)-4-6", tail))
        assert kind not in ("disabled", "between_tools") or effort not in ("xhigh", "max")
    if kind == "enabled":
        assert 1024 <= thinking["budget_tokens"] < body["max_tokens"]
        last, before = body["messages"][-1], body["messages"][-2:-1]
        if last["content"][0]["type"] == "tool_result":
            assert before[0]["content"][0]["type"] in ("thinking",
                                                       "redacted_thinking"), "Expected `thinking` or `redacted_thinking`"


def check_strict(schema: Any) -> None:
    if isinstance(schema, list):
        for each in schema:
            check_strict(each)
    if not isinstance(schema, dict):
        return
    refused = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "maxItems",
               "pattern",
               "oneOf", "$schema", "uniqueItems", "patternProperties", "minProperties", "default"}
    assert not refused & set(schema), refused & set(schema)
    if schema.get("type") == "object":
        assert schema["additionalProperties"] is False
    assert schema.get("minItems", 0) in (0, 1)
    for key, value in schema.items():
        for inner in value.values() if key in ("properties", "$defs") else [value]:
            check_strict(inner)


def asked_bodies() -> list[tuple[str, JSON]]:
    """Every request of Codex, and every recorded Responses request that this gateway takes."""
    found = []
    for path in [*sorted(SHARED.glob("codex-requests/*/[0-9]*.json")), *exchanges("request.json", "responses")]:
        body = json.loads(path.read_bytes())
        body = body.get("body", body) if "input" not in body else body
        try:
            request_of(body)
        except pomex.BadRequest:
            continue
        found.append((f"{path.parent.name}/{path.stem}", body))
    return found


@NO_RECORDINGS
@pytest.mark.parametrize("model", MODELS)
def test_every_recorded_request_encodes_to_what_is_not_refused(model: str) -> None:
    bodies = asked_bodies()
    assert len(bodies) > 100
    for name, asked in bodies:
        body, dropped = encoded(asked, model, "5m")
        try:
            check_body(body, model)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}\n{json.dumps(body)[:3000]}") from error
        assert not any("message" in each for each in dropped), (name, dropped)


def roles(body: JSON) -> list[str]:
    return [message["role"] for message in body["messages"]]


def fcall(call_id: str, name: str = "f", arguments: str = "{}") -> JSON:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def fout(call_id: str, output: Any = "ok") -> JSON:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def user(text: Any = "q") -> JSON:
    return {"type": "message", "role": "user", "content": text}


def assistant(text: str = "a") -> JSON:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def developer(text: str = "d") -> JSON:
    return {"type": "message", "role": "developer", "content": text}


def shape(body: JSON) -> list[str]:
    """Turns in short: the role's first letter, then one for every block; r is a tool_result."""
    return [message["role"][0] + ":" + "".join("r" if block["type"] == "tool_result" else block["type"][0]
                                               for block in message["content"]) for message in body["messages"]]


TURNS: dict[str, tuple[str, list[JSON], list[str]]] = {
    "one text": (NEWEST, [user()], ["u:t"]),
    "neighbours of one role": (NEWEST, [user(), user(), assistant(), assistant(), user()], ["u:tt", "a:tt", "u:t"]),
    "blank texts": (NEWEST, [user(), user(" \n"), assistant(""), user("")], ["u:t"]),
    "nothing but blanks": (NEWEST, [user(" ")], ["u:t"]),
    "the first is the assistant's": (NEWEST, [assistant(), user()], ["u:t", "a:t", "u:t"]),
    "#30: the last is the assistant's": (NEWEST, [user(), assistant()], ["u:t", "a:t", "u:t"]),
    "the last is the assistant's, and may be": (BUDGET, [user(), assistant()], ["u:t", "a:t"]),
    "parallel calls": (NEWEST, [user(), fcall("1"), fcall("2"), fout("2"), fout("1")], ["u:t", "a:tt", "u:rr"]),
    "#29: text between call and output": (NEWEST, [user(), fcall("1"), assistant(), fout("1"), user()],
                                          ["u:t", "a:tt", "u:rt"]),
    "results before text": (NEWEST, [user(), fcall("1"), user("interrupt"), fout("1")], ["u:t", "a:t", "u:rt"]),
    "#28: a call without output": (NEWEST, [user(), fcall("1"), user()], ["u:t", "a:t", "u:rt"]),
    "#27: an output without a call": (NEWEST, [user(), fout("9")], ["u:tt"]),
    "later system": (BUDGET, [user(), developer(), assistant(), user()], ["u:tt", "a:t", "u:t"]),
    "later system, native": (NEWEST, [user(), developer(), assistant(), user()], ["u:t", "s:t", "a:t", "u:t"]),
    "later system, native, before the user's": (NEWEST, [user(), assistant(), developer(), user()],
                                                ["u:t", "a:t", "u:t", "s:t"]),
    "two of them": (NEWEST, [user(), developer(), user(), developer()], ["u:tt", "s:tt"]),
    "between two of the assistant's": (NEWEST, [user(), assistant(), developer(), assistant(), user()],
                                       ["u:t", "a:t", "u:t", "a:t", "u:t"]),
    "after the assistant's, at the end": (NEWEST, [user(), assistant(), developer()], ["u:t", "a:t", "u:t", "s:t"]),
    "a system message that is first": (NEWEST, [developer(), user()], ["u:t"]),
}


@pytest.mark.parametrize("model, items, turns", TURNS.values(), ids=TURNS)
def test_items_become_turns(model: str, items: list[JSON], turns: list[str]) -> None:
    body, _ = encoded({"input": items, "tools": [TOOL]}, model)
    check_body(body, model)
    assert shape(body) == turns


def test_the_encoder_has_a_row_for_each_bug_of_others() -> None:
    """TRANSLATION.md 12, those that an encoder to Anthropic can have."""
    for number, (asked, look, wanted) in ENCODER_BUGS.items():
        body, dropped = encoded(asked, BUDGET, "5m")
        check_body(body, BUDGET)
        assert look(body, dropped) == wanted, number


NAMESPACE = {"type": "namespace", "name": "mcp__x", "tools": [{"type": "function", "name": "f",
                                                               "parameters": {"type": "object", "properties": {}}}]}
CUSTOM = {"type": "custom", "name": "apply_patch", "description": "Edits.",
          "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"}}
LONG = {"type": "function", "name": "n" * 90, "parameters": {}}
ENCODER_BUGS: dict[str, tuple[JSON, Any, Any]] = {
    "#1": ({"input": [{"type": "additional_tools", "role": "developer", "tools": [TOOL]}, user()]},
           lambda b, d: [t["name"] for t in b["tools"]], ["f"]),
    "#2": ({"input": [{"type": "additional_tools", "role": "developer", "tools": [TOOL]}, user()]}, lambda b, d: shape(b),
           ["u:t"]),
    "#3": ({"input": "q", "tools": [NAMESPACE]}, lambda b, d: [t["name"] for t in b["tools"]], ["mcp__x__f"]),
    "#4": ({"input": "q", "tools": [CUSTOM]}, lambda b, d: ("start: X" in b["tools"][0]["description"],
                                                            b["tools"][0]["input_schema"]["required"]),
           (True, ["input"])),
    "#26": ({"input": "q", "tools": [LONG]}, lambda b, d: len(b["tools"][0]["name"]), 64),
    "#27": ({"input": [user(), fout("")]}, lambda b, d: b["messages"][0]["content"][1]["text"], "[tool output] ok"),
    "#28": ({"input": [user(), fcall("1"), user()]}, lambda b, d: b["messages"][2]["content"][0],
            {"type": "tool_result", "tool_use_id": "1", "content": pomex.NO_OUTPUT, "is_error": True}),
    "#29": ({"input": [user(), fcall("1"), assistant("t"), fout("1")]}, lambda b, d: shape(b), ["u:t", "a:tt", "u:r"]),
    "#36": ({"input": "q", "tools": [TOOL, {"type": "image_generation"}, {"type": "mystery"}]}, lambda b,
            d: (len(b["tools"]), d),
            (1, ["tools:image_generation", "tools:mystery"])),
    "#37": ({"input": [user(), fcall("1"), fout("1", [{"type": "input_text", "text": "x"},
                                                      {"type": "input_image", "image_url": IMAGE}])]},
            lambda b, d: [part["type"] for part in b["messages"][2]["content"][0]["content"]], ["text", "image"]),
    "#38": ({"input": [user([{"type": "input_text", "text": "x", "cache_control": {"type": "ephemeral"}}])], "tools": [TOOL],
             "instructions": "i"},
            lambda b, d: json.dumps(b).count('"cache_control"'), 1),
    "#44": ({"input": "q", "reasoning": {"effort": "enormous"}}, lambda b, d: b["thinking"]["budget_tokens"], 16384),
}


def test_the_decoder_gives_tools_back_under_their_own_names() -> None:
    """#3, #4, #46: namespaces and custom tools come back as what the client knows."""
    patch = "*** Begin Patch\n*** End Patch"
    events = [BEGIN, *called(0, '{"a":1}', "mcp__x__f"), *called(1, json.dumps({"input": patch}), "apply_patch"),
              *ended("tool_use")]
    first, second = output_of(as_bytes(events), {"input": "q", "tools": [NAMESPACE, CUSTOM]})["output"]
    assert (first["type"], first["name"], first["namespace"], first["call_id"]) == ("function_call", "f", "mcp__x", "toolu_0")
    assert (second["type"], second["name"], second["input"]) == ("custom_tool_call", "apply_patch", patch)


def test_ids_are_made_fit_and_stay_apart() -> None:
    ids = ["a.b", "a_b", "a:b", "x" * 80, "x" * 81, "call_0"]
    items = [user(), *(fcall(each) for each in ids), *(fout(each) for each in ids), fcall("call_0"), fout("call_0")]
    body, _ = encoded({"input": items})
    check_body(body, BUDGET)
    assert len({block["id"] for message in body["messages"] for block in message["content"]
                if block["type"] == "tool_use"}) == 7


GARBAGE: list[JSON] = [
    {"tools": [{**TOOL, "parameters": {"anyOf": 3, "properties": [1], "required": True, "$ref": {}, "$defs": 1}}]},
    {"tools": [{"type": "web_search", "filters": [1], "user_location": "here"}]},
    {"reasoning": {"effort": ["high"], "summary": {}}},
    {"text": {"format": {"type": "json_schema", "name": "x",
                         "schema": {"properties": 1, "anyOf": {}, "items": [{}], "type": {}, "minItems": []}}}},
]


@pytest.mark.parametrize("asked", GARBAGE)
@pytest.mark.parametrize("model", MODELS)
def test_nonsense_of_a_client_is_no_error_of_ours(asked: JSON, model: str) -> None:
    encoded({"input": "q", **asked}, model)


# --- parts

def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


PARTS: dict[str, tuple[JSON, JSON | None]] = {
    "image, inline": ({"type": "input_image", "image_url": IMAGE},
                      {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}),
    "image, jpg": ({"type": "input_image", "image_url": "data:image/jpg;base64,AA=="},
                   {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "AA=="}}),
    "image, address": ({"type": "input_image", "image_url": "https://a.example/x.png", "detail": "high"},
                       {"type": "image", "source": {"type": "url", "url": "https://a.example/x.png"}}),
    "image, of another kind": ({"type": "input_image", "image_url": "data:image/tiff;base64,AA=="}, None),
    "pdf": ({"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="},
            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="},
             "title": "a.pdf"}),
    "pdf, bare": ({"type": "input_file", "filename": "a.pdf", "file_data": "AA=="},
                  {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="},
                   "title": "a.pdf"}),
    "file, address": ({"type": "input_file", "file_url": "https://a.example/x.pdf"},
                      {"type": "document", "source": {"type": "url", "url": "https://a.example/x.pdf"}}),
    "text file": ({"type": "input_file", "filename": "a.md", "file_data": f"data:text/markdown;base64,{b64('# ä')}"},
                  {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "# ä"}, "title": "a.md"}),
    "a file of another kind": ({"type": "input_file", "filename": "a.zip", "file_data": "data:application/zip;base64,AA=="},
                               None),
    "a part that nobody knows": ({"type": "input_smell"}, None),
    "image, called otherwise": ({"type": "input_image", "image_url": "data:image/jpeg;base64,iVBORw0KGgo="},
                                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}),
    "image, without a type": ({"type": "input_image", "image_url": "data:;base64,iVBORw0KGgo="},
                              {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}),
    "image, bare": ({"type": "input_image", "image_url": "/9j/4AAQSkZJRg=="},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "/9j/4AAQSkZJRg=="}}),
    "image, with line ends, for URLs, unpadded": (
        {"type": "input_image", "image_url": "data:image/png;base64,_9j_\r\n4AAQ SkZJRg"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "/9j/4AAQSkZJRg=="}}),
    "image, no base64": ({"type": "input_image", "image_url": "data:image/png;base64,?"}, None),
    "image, no base64 by its word": ({"type": "input_image", "image_url": "data:image/png,AAAA"}, None),
    "image, at OpenAI's": ({"type": "input_image", "file_id": "file-1"}, None),
    "file, at OpenAI's": ({"type": "input_file", "file_id": "file-1"}, None),
    "image as a file": ({"type": "input_file", "filename": "a.pdf", "file_data": "R0lGODlhAQ=="},
                        {"type": "image", "source": {"type": "base64", "media_type": "image/gif", "data": "R0lGODlhAQ=="}}),
    "pdf as an image": ({"type": "input_image", "image_url": "data:image/png;base64,JVBERi0xLjQ="},
                        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0xLjQ="}}),
    "binary file": ({"type": "input_file", "filename": "a.docx", "file_data": "UEsDBBQABgA="}, None),
    "binary file that is called text": ({"type": "input_file", "filename": "a.txt", "file_data": "data:text/plain;base64,UEsDBBQABgA="}, None),
    "text file of no known kind": ({"type": "input_file", "filename": "Makefile", "file_data": f"data:application/octet-stream;base64,{b64('all:')}"},
                                   {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "all:"},
                                    "title": "Makefile"}),
    "text file with a byte order mark": ({"type": "input_file", "filename": "a.csv", "file_data": "77u/YTti"},
                                         {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a;b"},
                                          "title": "a.csv"}),
}


@pytest.mark.parametrize("part, block", PARTS.values(), ids=PARTS)
def test_parts_become_blocks(part: JSON, block: JSON | None) -> None:
    body, dropped = encoded({"input": [user([{"type": "input_text", "text": "q"}, part])]})
    assert body["messages"][0]["content"][1:] == ([block] if block else [])
    assert (f"content:{part['type']}" in dropped) is (block is None)


# --- thinking, limits, sampling

def thinks(model: str, effort: str | None = None, summary: str | None = None, **more: Any) -> tuple[Any, ...]:
    body, _ = encoded({"input": "q", "reasoning": {"effort": effort, "summary": summary}, **more}, model)
    check_body(body, model)
    thinking = body.get("thinking") or {}
    return thinking.get("type"), thinking.get("budget_tokens") or thinking.get("display"), (body.get("output_config")
                                                                                            or {}).get("effort")


EFFORTS: list[tuple[str, str | None, str | None, tuple[Any, ...]]] = [
    ("claude-sonnet-4-5", None, None, (None, None, None)), ("claude-sonnet-4-5", "none", None, (None, None, None)),
    ("claude-sonnet-4-5-20250929", "minimal", None, ("enabled", 1024, None)),
    ("claude-sonnet-4-5", "low", None, ("enabled", 2048, None)),
    ("claude-sonnet-4-5", "medium", None, ("enabled", 10000, None)),
    ("claude-sonnet-4-5", "max", None, ("enabled", 31231 + 1537, None)),
    ("claude-opus-4-1", "max", None, ("enabled", 32000 - 1024, None)),
    ("claude-3-5-sonnet", "high", "auto", (None, None, None)),
    ("claude-opus-4-5", "xhigh", None, ("enabled", 32768, "high")),
    ("claude-opus-4-6", "xhigh", None, ("adaptive", None, "max")),
    ("claude-opus-4-6", "high", "auto", ("adaptive", "summarized", "high")),
    ("claude-opus-4-6", None, "auto", ("adaptive", "summarized", None)),
    ("claude-opus-4-7", "xhigh", None, ("adaptive", None, "xhigh")), ("claude-opus-4-8", "none", None, (None, None, None)),
    ("claude-sonnet-5", "none", None, ("disabled", None, None)), ("claude-opus-5", "minimal", None, ("adaptive", None, "low")),
    ("claude-haiku-5-5", "none", "auto", ("disabled", None, None)),
    ("claude-sonnet-5-5", "none", None, ("between_tools", None, None)),
    ("claude-opus-5-5", "none", None, ("adaptive", "summarized", "low")),
    ("claude-opus-5-5", None, None, ("adaptive", "summarized", None)),
    ("claude-fable-5", "none", None, ("adaptive", None, "low")), ("claude-fable-5", None, None, (None, None, None)),
    ("anthropic/claude-opus-4.6", "max", None, ("adaptive", None, "max")),
    ("claude-unheard-of", "high", None, ("adaptive", None, "high")),
    ("glm-5", "high", "auto", (None, None, None)),
]


@pytest.mark.parametrize("model, effort, summary, wanted", EFFORTS)
def test_effort_takes_the_form_of_the_model(model: str, effort: str | None, summary: str | None,
                                            wanted: tuple[Any, ...]) -> None:
    assert thinks(model, effort, summary) == wanted


@pytest.mark.parametrize("model, asked, binds", [
    *((model, effort, True) for effort in (None, "low", "max") for model in (
        "claude-fable-5-1", "claude-fable-5-2", "claude-mythos-5-2", "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5")),
    ("claude-fable-5-1", "none", True), ("claude-sonnet-5-5", "none", False), ("claude-haiku-5-5", "none", False),
    *((model, "low", False) for model in ("claude-mythos-5-1", "claude-fable-5", "claude-opus-5", "claude-opus-4-6", BUDGET, "claude-new")),
])
def test_models_that_bind_thoughts_are_asked_beforehand_to_drop_stale_ones(model: str, asked: str | None, binds: bool) -> None:
    """Else every turn after a change of its prefix is refused once (NousResearch/hermes-agent#106426)."""
    call = pomex.WIRES["messages"].call(job({"input": "q", "reasoning": {"effort": asked}}, model))
    thinking = json.loads(call.body).get("thinking", {})
    assert thinking.get("block_binding") == ({"prefix_mismatch_behavior": "drop_block"} if binds else None)
    assert (pomex.BINDING_BETA in dict(call.headers).get("anthropic-beta", "")) is binds


def test_a_budget_comes_on_top_of_the_answer() -> None:
    """#49 too: adaptive models get no budget."""
    def limits(tokens: int | None, model: str = BUDGET) -> tuple[Any, ...]:
        body, dropped = encoded({"input": "q", "max_output_tokens": tokens, "reasoning": {"effort": "high"}}, model)
        check_body(body, model)
        return body["max_tokens"], (body.get("thinking") or {}).get("budget_tokens"), dropped
    assert limits(None) == (64000, 16384, []) and limits(4000) == (20384, 16384, [])
    assert limits(1000) == (1000, None, ["reasoning.effort"]) and limits(500_000) == (64000, 16384, [])
    assert limits(4000, NEWEST) == (4000, None, []) and limits(None, NEWEST) == (128_000, None, [])
    assert limits(None, OTHER) == (8192, None, ["reasoning.effort"]) and limits(99_999, "claude-3-haiku")[0] == 4096


def test_thinking_with_a_budget_is_off_where_a_tool_loop_lost_its_thought() -> None:
    asked = {"input": [user(), fcall("1"), fout("1")], "tools": [TOOL], "reasoning": {"effort": "high"}}
    body, dropped = encoded(asked)
    assert "thinking" not in body and dropped == ["reasoning.effort"]
    assert encoded(asked, "claude-opus-4-6")[0]["thinking"] == {"type": "adaptive"}
    sealed = ENVELOPE.seal("anthropic", "m", {"blocks": [{"type": "thinking", "thinking": "t", "signature": "s"}]})
    thought = {"type": "reasoning", "summary": [], "encrypted_content": sealed}
    assert encoded({**asked, "input": [user(), thought, fcall("1"), fout("1")]})[0]["thinking"]["type"] == "enabled"
    assert encoded({**asked, "input": [user(), fcall("1"), fout("1"), assistant(), user()]})[0]["thinking"]["type"] == "enabled"


SAMPLING: list[tuple[str, JSON, JSON, list[str]]] = [
    (BUDGET, {"temperature": 0.3}, {"temperature": 0.3}, []), (BUDGET, {"temperature": 1.7}, {"temperature": 1}, []),
    (BUDGET, {"top_p": 0.5}, {"top_p": 0.5}, []), (BUDGET, {"temperature": 0, "top_p": 0.5}, {"temperature": 0}, ["top_p"]),
    (BUDGET, {"temperature": 0, "reasoning": {"effort": "low"}}, {}, ["temperature"]),
    (NEWEST, {"temperature": 0.5, "top_p": 1}, {}, ["temperature"]),
    (NEWEST, {"temperature": 1}, {}, []), ("claude-opus-4-6", {"temperature": 0.5}, {"temperature": 0.5}, []),
]


@pytest.mark.parametrize("model, asked, wanted, lost", SAMPLING)
def test_sampling_goes_where_it_is_taken(model: str, asked: JSON, wanted: JSON, lost: list[str]) -> None:
    body, dropped = encoded({"input": "q", **asked}, model)
    check_body(body, model)
    assert ({k: body[k] for k in ("temperature", "top_p") if k in body}, dropped) == (wanted, lost)


def test_what_cannot_be_carried_is_named() -> None:
    _, dropped = encoded({"input": "q", "text": {"verbosity": "low"}, "top_logprobs": 3, "max_tool_calls": 2,
                          "service_tier": "priority",
                          "tools": [{"type": "code_interpreter"}], "tool_choice": "required"})
    assert set(dropped) == {"text.verbosity", "top_logprobs", "max_tool_calls", "service_tier", "tools:code_interpreter"}
    body, dropped = encoded({"input": "q", "safety_identifier": "u1", "user": "u2", "prompt_cache_key": "k", "store": False,
                             "metadata": {"a": "b"}, "truncation": "disabled", "include": [], "service_tier": "default"})
    assert body["metadata"] == {"user_id": "u1"} and dropped == []


# --- tool choice, schemas

ONLY = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}
CHOICES: list[tuple[str, JSON, JSON | None, bool]] = [
    (BUDGET, {}, None, False), (BUDGET, {"tool_choice": "none"}, {"type": "none"}, False),
    (BUDGET, {"tool_choice": "required"}, {"type": "any"}, False),
    (BUDGET, {"tool_choice": {"type": "function", "name": "f"}}, {"type": "tool", "name": "f"}, False),
    (BUDGET, {"tool_choice": ONLY}, None, False), (BUDGET, {"tool_choice": {**ONLY, "mode": "required"}},
                                                   {"type": "tool", "name": "f"}, False),
    (BUDGET, {"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}, False),
    (BUDGET, {"parallel_tool_calls": False, "tool_choice": "required"}, {"type": "any", "disable_parallel_tool_use": True},
     False),
    (BUDGET, {"tool_choice": "required", "reasoning": {"effort": "low"}}, {"type": "auto"}, True),
    (NEWEST, {"tool_choice": "required"}, {"type": "auto"}, True),
    (NEWEST, {"tool_choice": {"type": "function", "name": "f"}}, {"type": "auto"}, True),
    ("claude-opus-5", {"tool_choice": "required", "reasoning": {"effort": "low"}}, {"type": "any"}, False),
    (BUDGET, {"tool_choice": {"type": "web_search"}, "tools": [TOOL, SEARCH]}, {"type": "tool", "name": "web_search"}, False),
]


@pytest.mark.parametrize("model, asked, choice, in_words", CHOICES)
def test_tool_choice_is_forced_where_it_may_be(model: str, asked: JSON, choice: JSON | None, in_words: bool) -> None:
    body, dropped = encoded({"input": "q", "tools": [TOOL], **asked}, model)
    check_body(body, model)
    assert body.get("tool_choice") == choice and not dropped
    assert ("Answer this turn with a call" in json.dumps(body["messages"])) is in_words


def test_tools_that_may_not_be_called_and_are_still_offered_are_named() -> None:
    other = {**TOOL, "name": "g"}
    for choice, lost in ((ONLY, ["tool_choice.tools"]), ({**ONLY, "mode": "required"}, []),
                         ({**ONLY, "tools": [*ONLY["tools"], {"type": "function", "name": "g"}]}, [])):
        assert encoded({"input": "q", "tools": [TOOL, other], "tool_choice": choice}, BUDGET)[1] == lost


ROOTS: list[tuple[JSON, JSON]] = [
    ({"$ref": "#/definitions/X", "definitions": {"X": {"properties": {"x": {}}, "required": ["x"]}}},     # zod-to-json-schema
     {"type": "object", "properties": {"x": {}}, "required": ["x"], "definitions": {"X": {"properties": {"x": {}}, "required": ["x"]}}}),
    ({}, {"type": "object", "properties": {}}),
    ({"properties": {"a": {}}}, {"type": "object", "properties": {"a": {}}}),
    ({"anyOf": [{"properties": {"a": {"type": "string"}}, "required": ["a"]},
                {"properties": {"b": {}, "a": {"type": "integer"}}, "required": ["a", "b"]}]},
     {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "b": {}}, "required": ["a"]}),
    ({"allOf": [{"properties": {"a": {}}, "required": ["a"]}, {"$ref": "#/$defs/X"}],
      "$defs": {"X": {"properties": {"b": {}}}}},
     {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a"], "$defs": {"X": {"properties": {"b": {}}}}}),
    ({"$ref": "#/$defs/X", "$defs": {"X": {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}}}},
     {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}},
      "$defs": {"X": {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}}}}),
]


@pytest.mark.parametrize("schema, wanted", ROOTS)
def test_a_tools_schema_has_an_object_at_its_root(schema: JSON, wanted: JSON) -> None:
    body, _ = encoded({"input": "q", "tools": [{"type": "function", "name": "f", "parameters": schema, "strict": True}]})
    check_body(body, BUDGET)
    assert body["tools"][0]["input_schema"] == wanted


def test_an_answers_schema_keeps_what_is_known_and_says_the_rest() -> None:
    schema = {"$schema": "x", "type": "object", "properties": {
        "n": {"type": "integer", "minimum": 1, "description": "count"},
        "s": {"type": "string", "format": "date", "pattern": "^x"},
        "u": {"type": "string", "format": "uri-template"}, "l": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        "o": {"oneOf": [{"type": "null"}, {"$ref": "#/$defs/D", "description": "gone"}]}, "e": {"enum": ["a"]}},
              "required": ["n"],
        "additionalProperties": False, "$defs": {"D": {"type": ["object", "null"], "properties": {}}}}
    asked = {"input": "q", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}
    body, _ = encoded(asked)
    check_body(body, BUDGET)
    assert body["output_config"]["format"]["schema"] == {
        "type": "object", "properties": {
            "n": {"type": "integer", "description": 'count\n\n{"minimum":1}'},
            "s": {"type": "string", "format": "date", "description": '{"pattern":"^x"}'},
            "u": {"type": "string", "description": '{"format":"uri-template"}'},
            "l": {"type": "array", "items": {"type": "string"}, "description": '{"minItems":2}'},
            "o": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/D"}]}, "e": {"enum": ["a"]}}, "required": ["n"],
        "$defs": {"D": {"type": ["object", "null"], "properties": {}, "additionalProperties": False}},
        "additionalProperties": False}
    in_words, _ = encoded(asked, OTHER)
    assert "output_config" not in in_words and "JSON schema" in in_words["system"][0]["text"]
    plain, _ = encoded({"input": "q", "instructions": "i", "text": {"format": {"type": "json_object"}}})
    assert [block["text"] for block in plain["system"]] == ["i", pomex.JSON_ONLY]


@pytest.mark.parametrize("inner", [
    {"type": "object", "additionalProperties": {"type": "integer"}}, {"type": "object"}, {"type": ["object", "null"], "properties": {}, "additionalProperties": True},
    {"type": "object", "properties": {"a": {}}, "patternProperties": {"^x": {}}}, {"anyOf": [{"type": "null"}, {"type": "object"}]}])
def test_a_schema_with_a_map_is_told_in_words_and_not_narrowed(inner: JSON) -> None:
    schema = {"type": "object", "properties": {"m": inner}, "required": ["m"], "additionalProperties": False}
    body, _ = encoded({"input": "q", "text": {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": schema}}})
    assert "output_config" not in body and json.dumps(schema, separators=(",", ":")) in body["system"][0]["text"]


def test_a_definition_named_none_is_not_merged_into_a_schema_without_a_reference() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}, "$defs": {"None": {"properties": {"b": {}}}}}
    body, _ = encoded({"input": "q", "tools": [TOOL | {"parameters": parameters}]})
    assert list(body["tools"][0]["input_schema"]["properties"]) == ["a"]


def test_parameters_go_up_under_fitting_names_in_tools_and_history_alike() -> None:
    tool = TOOL | {"parameters": {"type": "object", "properties": {"$top": {"type": "integer"}}, "required": ["$top"]}}
    items = [user(), fcall("c", arguments='{"$top":5}'), fout("c"), fcall("d", arguments='{"$top"'), fout("d")]
    body, dropped = encoded({"input": items, "tools": [tool]})
    assert body["tools"][0]["input_schema"]["required"] == ["_top"] and not dropped
    assert [block["input"] for block in body["messages"][1]["content"]] == [{"_top": 5}]
    assert body["messages"][3]["content"][0]["input"] == {"_raw": '{"$top"'}
    events = [{"type": "message_start", "message": {"id": "m", "usage": {}}},
              {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}}},
              *({"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": text}} for text in ('{"_t', 'op": 5}')),
              {"type": "content_block_stop", "index": 0}, {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 1}},
              {"type": "message_stop"}]
    assert output_of(as_bytes(events), {"input": "q", "tools": [tool]})["output"][0]["arguments"] == '{"$top":5}'


# --- web search

def searching(model: str, tool: JSON, *others: JSON) -> tuple[list[JSON], list[str]]:
    body, dropped = encoded({"input": "q", "tools": [tool, *others]}, model)
    return [each for each in body.get("tools", []) if "input_schema" not in each], dropped


def test_hosted_web_search_is_the_providers_own() -> None:
    full = {"type": "web_search", "external_web_access": True, "filters": {"allowed_domains": ["example.com"]},
            "search_context_size": "high",
            "user_location": {"type": "approximate", "country": "US", "city": "NY", "region": None}}
    where = {"type": "approximate", "country": "US", "city": "NY"}
    assert searching(BUDGET, full) == ([{"type": "web_search_20250305", "name": "web_search",
                                         "allowed_domains": ["example.com"], "user_location": where}], [])
    assert searching(NEWEST, {"type": "web_search_preview"}) == ([{"type": "web_search_20260209", "name": "web_search",
                                                                   "allowed_callers": ["direct"]}], [])
    assert searching(BUDGET, {"type": "web_search_2025_08_26",
                              "filters": {"blocked_domains": ["a.example"]}})[0][0]["blocked_domains"] == ["a.example"]
    assert searching(OTHER, full) == ([], ["tools:web_search"])
    assert searching(BUDGET, SEARCH, {**TOOL, "name": "web_search"}) == ([], ["tools:web_search"])


def test_traces_of_searches_are_left_out_as_a_whole() -> None:
    trace = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "q"}}
    body, dropped = encoded({"input": [user(), trace, assistant(), user()], "tools": [SEARCH]})
    assert shape(body) == ["u:t", "a:t", "u:t"] and dropped == ["input:web_search_call"]


# --- caching

def marked(body: JSON) -> list[str]:
    places = [("tool", body.get("tools", [])), ("system", body.get("system", [])),
              *((f"{i}:{message['role']}", message["content"]) for i, message in enumerate(body["messages"]))]
    return [f"{name}[{i}]" for name, blocks in places for i, block in enumerate(blocks) if "cache_control" in block]


THOUGHT = {"type": "reasoning", "summary": [], "encrypted_content": ENVELOPE.seal("anthropic", "m",
                                                                                  {"blocks": [{"type": "thinking",
                                                                                               "thinking": "t",
                                                                                               "signature": "s"}]})}
PLACES: dict[str, tuple[JSON, list[str]]] = {
    "a first turn": ({"input": "q"}, ["0:user[0]"]),
    "everything": ({"input": [user(), assistant(), user(), assistant(), user()], "tools": [TOOL, TOOL | {"name": "g"}],
                    "instructions": "i"},
                   ["tool[1]", "system[0]", "2:user[0]", "4:user[0]"]),
    "a tool loop": ({"input": [user(), THOUGHT, fcall("1"), fcall("2"), fout("1"), fout("2")]}, ["0:user[0]", "2:user[1]"]),
    "the client's own": ({"input": [user([{"type": "input_text", "text": "x", "cache_control": {"type": "ephemeral"}}]),
                                    assistant(), user()],
                          "instructions": "i"}, ["0:user[0]"]),
}


@pytest.mark.parametrize("asked, places", PLACES.values(), ids=PLACES)
def test_breakpoints_stand_where_the_next_turn_finds_them(asked: JSON, places: list[str]) -> None:
    body, _ = encoded(asked, BUDGET, "5m")
    assert marked(body) == places
    check_body(body, BUDGET)


def test_how_long_a_prompt_is_kept_is_said() -> None:
    assert encoded({"input": "q"}, BUDGET, "1h")[0]["messages"][0]["content"][0]["cache_control"] == {"type": "ephemeral",
                                                                                                      "ttl": "1h"}
    assert encoded({"input": "q"}, BUDGET, "5m")[0]["messages"][0]["content"][0]["cache_control"] == {"type": "ephemeral"}
    assert marked(encoded({"input": "q"}, BUDGET, "off")[0]) == []


def test_a_breakpoint_never_stands_on_a_thought() -> None:
    body = {"tools": [], "system": [],
            "messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                         {"role": "assistant", "content": [{"type": "text", "text": "a"},
                                                           {"type": "thinking", "thinking": "", "signature": "s"}]}]}
    pomex.place_cache_control(body, "5m")
    assert marked(body) == ["0:user[0]", "1:assistant[0]"]


def prefix(body: JSON, messages: int) -> list[str]:
    """What a later request must begin with, breakpoints removed."""
    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: bare(v) for k, v in value.items() if k != "cache_control"}
        return [bare(each) for each in value] if isinstance(value, list) else value
    return [json.dumps(bare(part)) for part in (body.get("tools"), body.get("system"), *body["messages"][:messages])]


@pytest.mark.parametrize("model", MODELS)
def test_twenty_turns_keep_their_prefix_and_their_signatures(model: str) -> None:
    """#17, #19: thoughts, parallel calls, images, a switch of provider in the middle."""
    items: list[JSON] = [developer("permissions"), user("begin")]
    signatures: list[str] = []
    before: list[str] = []
    for turn in range(20):
        body, dropped = encoded({"input": items, "instructions": "i", "tools": [TOOL, SEARCH],
                                 "reasoning": {"effort": "high", "summary": "auto"}}, model, "5m")
        check_body(body, model)
        now = prefix(body, len(body["messages"]))
        assert now[:len(before)] == before
        before = now
        found = [block["signature"] for message in body["messages"] for block in message["content"]
                 if block["type"] == "thinking"]
        assert found == signatures
        assert ("reasoning:google" in dropped) == (turn > 10)
        if turn == 10:          # another provider answers in between
            items += [{"type": "reasoning", "summary": [], "encrypted_content": ENVELOPE.seal("google", "g", {"sig": "x"})},
                      assistant("from another"), user()]
            continue
        signatures.append(f"sig{turn}+/=\u2028")
        events = [BEGIN, started(0, type="thinking", thinking="", signature=""), piece(0, "thinking", thinking=f"t{turn} \n"),
                  piece(0, "signature", signature=signatures[-1]), stopped(0), *said(f"step {turn}", 1),
                  *called(2, '{"a": 1.50}'), *called(3, ""),
                  *ended("tool_use")]
        events = json.loads(json.dumps(events).replace("toolu_", f"toolu_{turn}_"))
        output = output_of(as_bytes(events))["output"]
        picture = [{"type": "input_image", "image_url": IMAGE}]
        items += [*output, fout(f"toolu_{turn}_2"), fout(f"toolu_{turn}_3", picture)]
        if turn % 4 == 3:
            items += [user(f"next {turn}")]


CONSECUTIVE = [("01-text", "04-apply-patch-turn2"), ("02-shell-turn1", "03-shell-turn2-with-output"),
               ("02-shell-turn1", "09-web-search-roundtrip"), ("18-mcp-namespace-turn1", "19-mcp-namespace-turn2")]


@NO_RECORDINGS
@pytest.mark.parametrize("version", ["0.128.0", "0.169.0"])
@pytest.mark.parametrize("first, second", CONSECUTIVE)
@pytest.mark.parametrize("model", [NEWEST, BUDGET, "claude-opus-4-6"])
def test_consecutive_turns_of_codex_share_their_prefix(version: str, first: str, second: str, model: str) -> None:
    asked = [json.loads((SHARED / "codex-requests" / version / f"{name}.json").read_bytes()) for name in (first, second)]
    one, two = (encoded(each.get("body", each), model, "5m")[0] for each in asked)
    known = prefix(one, len(one["messages"]))
    assert len(known) > 2 and prefix(two, len(two["messages"]))[:len(known)] == known


# --- headers, repairs

def test_headers_say_the_version_and_the_betas_that_are_used() -> None:
    def headers(asked: JSON, model: str = BUDGET) -> dict[str, str]:
        return dict(pomex.WIRES["messages"].call(job(asked, model)).headers)
    assert headers({"input": "q"}) == {"anthropic-version": "2023-06-01"}
    assert headers({"input": "q", "tools": [TOOL], "reasoning": {"effort": "low"}})["anthropic-beta"] == pomex.INTERLEAVED_BETA
    assert headers({"input": "q"}, NEWEST)["anthropic-beta"] == pomex.BINDING_BETA
    assert "anthropic-beta" not in headers({"input": "q", "tools": [TOOL], "reasoning": {"effort": "low"}}, "claude-opus-5")
    assert pomex.WIRES["messages"].auth("k") == [("x-api-key", "k")]


def refusal(message: str, status: int = 400) -> pomex.ProviderError:
    body = json.dumps({"type": "error", "error": {"type": "invalid_request_error", "message": message}}).encode()
    return pomex.provider_error(status, pomex.Headers([]), body)


LOOP = {"input": [user(), THOUGHT, fcall("1"), fout("1")], "tools": [TOOL], "reasoning": {"effort": "high"},
        "max_output_tokens": 30000,
        "safety_identifier": "u"}
BOUND = "messages.1.content.0: Invalid `signature` in `thinking` block. The block is bound to a different conversation."
REPAIRS: dict[str, tuple[str, str, Any, Any]] = {
    "bound": ("claude-opus-5", BOUND, lambda b: b["thinking"]["block_binding"], {"prefix_mismatch_behavior": "drop_block"}),
    "bound, though its provider drops stale blocks": (NEWEST, BOUND, shape, ["u:t", "a:t", "u:r"]),
    "bound, with a budget": (BUDGET, BOUND, lambda b: ("thinking" in b, shape(b)), (False, ["u:t", "a:t", "u:r"])),
    "a signature": ("claude-opus-4-6", "messages.1.content.0: Invalid `signature` in `thinking` block",
                    lambda b: (b["thinking"]["type"], shape(b)),
                    ("adaptive", ["u:t", "a:t", "u:r"])),
    "a thought that is wanted": (BUDGET,
                                 "messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but found `tool_use`",
                                 lambda b: "thinking" in b, False),
}


@pytest.mark.parametrize("model, message, look, wanted", REPAIRS.values(), ids=REPAIRS)
def test_known_refusals_are_mended(model: str, message: str, look: Any, wanted: Any) -> None:
    call = pomex.WIRES["messages"].call(job(LOOP, model))
    again = call.repaired(refusal(message))
    assert again is not None and again.attempt is call.attempt and again.dropped == call.dropped
    body = json.loads(again.body)
    assert look(body) == wanted
    assert ("block_binding" in body.get("thinking", {})) == (pomex.BINDING_BETA in dict(again.headers).get("anthropic-beta",
                                                                                                           ""))


@pytest.mark.parametrize("error", [refusal("prompt is too long: 3 tokens > 2 maximum"),
                                   refusal("messages: at least one message is required"),
                                   refusal("`temperature` is deprecated for this model."), refusal("thinking", 529),
                                   refusal("max_tokens: 46384 > 8192, which is the maximum allowed number of output tokens for x"),
                                   refusal("This model does not support effort level 'xhigh'. Supported levels: high, low, max, medium."),
                                   refusal("This model does not support assistant message prefill."),
                                   pomex.UpstreamError("x")])
def test_what_is_not_known_is_not_asked_twice(error: pomex.GatewayError) -> None:
    assert pomex.WIRES["messages"].call(job(LOOP)).repaired(error) is None


def settings_of(model: str, overrides: JSON) -> pomex.AnthropicModel:
    ctx = job({"input": "q"}, model)
    ctx.overrides = overrides
    pomex.WIRES["messages"].call(ctx)
    assert isinstance(ctx.settings, pomex.AnthropicModel)
    return ctx.settings


@pytest.mark.parametrize("given", ["claude-opus-5-5", "claude-opus-5.5", "anthropic/claude-opus-5.5", "us.anthropic.claude-opus-5-5"])
@pytest.mark.parametrize("model", ["claude-opus-5-5", "anthropic/claude-opus-5.5", "us.anthropic.claude-opus-5-5-v1:0"])
def test_the_table_can_be_overridden_by_the_longest_prefix(given: str, model: str) -> None:
    """However the vendor and the version are written, in the configuration and in the model's name."""
    overrides = {"claude-opus": {"sampling": True}, given: {"efforts": "low " * 7}}
    assert (settings_of(model, overrides).efforts, settings_of(model, overrides).sampling) == ("low " * 7, False)
    assert settings_of("claude-opus-5", overrides).sampling
    assert settings_of("claude-fable-5", overrides) == pomex.ANTHROPIC_MODELS["claude-fable-5"]


@pytest.mark.parametrize("values, wanted", [("low", "low low low low low low low"), ("none high", "none high high high high high high"),
                                            ("none -", "none      "), ("a b c d e f g", "a b c d e f g")])
def test_the_last_value_holds_for_all_efforts_that_follow(values: str, wanted: str) -> None:
    assert " ".join(pomex.effort_value(values, effort) for effort in pomex.EFFORTS) == wanted
    assert pomex.effort_value(values, "unheard-of") == pomex.effort_value(values, "high")


@pytest.mark.parametrize("table", [pomex.ANTHROPIC_MODELS, pomex.GEMINI_MODELS])
def test_every_row_of_a_table_is_found_by_its_own_prefix(table: JSON) -> None:
    for prefix, row in table.items():
        assert pomex.longest_prefix(table, prefix or "x") is row
