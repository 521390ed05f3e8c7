"""Gemini's generateContent: the decoder, the encoder, signatures there and back, what it refuses."""

from __future__ import annotations

import base64
import dataclasses
import json
import pathlib
import re
import time
import types
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import sinks
from sinks import whole

import pomex

JSON = dict[str, Any]
SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
RECORDED = SHARED / "recorded"
NO_RECORDINGS = pytest.mark.skipif(
    not RECORDED.is_dir(), reason="the recorded exchanges are not beside the repository"
)
DUMMY = "c2tpcF90aG91Z2h0X3NpZ25hdHVyZV92YWxpZGF0b3I="
PRO, FLASH3, FLASH25, FLASH20 = "gemini-3.1-pro-preview", "gemini-3.5-flash", "gemini-2.5-flash", "gemini-2.0-flash"
MODELS = (PRO, FLASH3, FLASH25, FLASH20)


# --- what a decoder says


class View(sinks.View):
    def calls(self) -> list[tuple[str, JSON]]:
        return [(i["name"], json.loads(i["arguments"])) for i in self.items.values() if i["id"]]

    def call_ids(self) -> list[str]:
        return [i["id"] for i in self.items.values() if i["id"]]

    def replays(self) -> list[JSON]:
        return [i["fields"]["sealed_replay"] for i in self.items.values() if "sealed_replay" in i["fields"]]

    def outcome(self) -> tuple[Any, ...]:
        return self.said(), self.said("summary"), self.calls(), self.replays(), self.usage, self.end(), self.kinds()


def decoder(tools: Iterable[JSON] = ()) -> pomex.GeminiDecoder:
    made = pomex.GeminiDecoder(pomex.ToolMap(list(tools), searches=True), None, "call_0123456789ab_")
    made.sink = View()
    return made


def view_of(chunks: Iterable[Any], tools: Iterable[JSON] = ()) -> View:
    reader = decoder(tools)
    sinks.feed_all(reader, chunks)
    reader.end()
    return reader.sink


def chunk(*parts: JSON, reason: str | None = None, **more: Any) -> JSON:
    candidate: JSON = {"content": {"role": "model", "parts": list(parts)}, "index": 0, **more}
    return {"candidates": [candidate if reason is None else {**candidate, "finishReason": reason}]}


def fc(name: str, args: JSON | None = None, signature: str = "", **more: Any) -> JSON:
    part: JSON = {"functionCall": {"name": name, "args": args or {}, **more}}
    return {**part, "thoughtSignature": signature} if signature else part


STOPPED = chunk({"text": ""}, reason="STOP")


# --- every recorded exchange


def exchanges(name: str) -> list[pathlib.Path]:
    return sorted(RECORDED.glob(f"gemini/*/{name}"))


def named(path: pathlib.Path) -> str:
    return path.parent.name


def is_error(path: pathlib.Path) -> bool:
    return json.loads((path.parent / "meta.json").read_bytes())["status"] >= 400


def in_pieces(path: pathlib.Path) -> bool:
    """Does Vertex stream arguments in it? Nobody asks it to."""
    return "partialArgs" in path.read_text(encoding="utf-8")


STREAMS = [path for path in exchanges("response.sse") if not in_pieces(path)]
WHOLES = [path for path in exchanges("response.json") if not is_error(path)]
ERRORS = [path for path in exchanges("response.json") if is_error(path)]


def recorded_chunks(path: pathlib.Path) -> list[JSON]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    return [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]


def expected_of(chunks: list[JSON]) -> tuple[Any, ...]:
    """What an exchange holds, computed the plain way: nothing shared with the decoder."""
    parts = [p for c in chunks for d in c.get("candidates", [])[:1] for p in d.get("content", {}).get("parts", [])]
    text = "".join(p["text"] for p in parts if "text" in p and not p.get("thought"))
    thought = "".join(p["text"] for p in parts if "text" in p and p.get("thought"))
    whole = [p["functionCall"] for p in parts if p.get("functionCall", {}).get("name")]
    calls = [(c["name"], c.get("args", {})) for c in whole]
    signatures = [p["thoughtSignature"] for p in parts if "thoughtSignature" in p and ("text" in p or "functionCall" in p)]
    return text, thought, calls, signatures, usage_of(chunks), end_of(chunks)


def usage_of(chunks: list[JSON]) -> pomex.Usage | None:
    counts = [c["usageMetadata"] for c in chunks if "totalTokenCount" in c.get("usageMetadata", {})]
    if not counts:
        return None
    last = counts[-1]
    thoughts, tools = last.get("thoughtsTokenCount", 0), last.get("toolUsePromptTokenCount", 0)
    output = last.get("candidatesTokenCount", 0) + thoughts
    assert last["totalTokenCount"] == last["promptTokenCount"] + tools + output or "totalTokenCount" not in last
    queries = [query for each in chunks for candidate in each.get("candidates") or [] if isinstance(candidate, dict)
               for query in (candidate.get("groundingMetadata") or {}).get("webSearchQueries") or []]
    old = any(str(each.get("modelVersion")).startswith("gemini-2") for each in chunks)
    return pomex.Usage(last["promptTokenCount"] + tools, last.get("cachedContentTokenCount", 0), 0, output, thoughts,
                       web_searches=min(len(queries), 1) if old else len(queries))


def end_of(chunks: list[JSON]) -> str:
    reasons = [d["finishReason"] for c in chunks for d in c.get("candidates", []) if "finishReason" in d]
    blocked = any(c.get("promptFeedback", {}).get("blockReason") for c in chunks)
    if not reasons:
        return "content_filter" if blocked else "none"
    return {"STOP": "completed", "MAX_TOKENS": "max_output_tokens", "SAFETY": "content_filter"}.get(reasons[-1], "failed")


def feed_bytes(path: pathlib.Path, pieces: Iterable[bytes]) -> View:
    return sinks.feed_bytes(decoder(), pieces)


def check_against(view: View, chunks: list[JSON]) -> None:
    text, thought, calls, signatures, usage, end = expected_of(chunks)
    assert (view.said(), view.said("summary"), view.usage, view.end()) == (text, thought, usage, end)
    assert view.calls() == calls
    assert [replay["signature"] for replay in view.replays()] == signatures
    assert len(set(view.call_ids())) == len(view.call_ids())
    if view.error is None:
        assert all(item["closed"] for item in view.items.values())


@NO_RECORDINGS
@pytest.mark.parametrize("path", STREAMS, ids=named)
class TestEveryRecordedStream:
    def test_says_what_it_holds(self, path: pathlib.Path) -> None:
        check_against(feed_bytes(path, [path.read_bytes()]), recorded_chunks(path))

    def test_says_the_same_byte_by_byte(self, path: pathlib.Path) -> None:
        data = path.read_bytes()
        bytewise = feed_bytes(path, (data[i : i + 1] for i in range(len(data))))
        assert bytewise.outcome() == feed_bytes(path, [data]).outcome()

    def test_cut_after_any_event_claims_no_more_than_came(self, path: pathlib.Path) -> None:
        chunks = recorded_chunks(path)
        for count in range(len(chunks)):
            view = view_of(chunks[:count])
            assert view.end() == end_of(chunks[:count])
            assert view.said() == expected_of(chunks[:count])[0]
            assert all(item["closed"] for item in view.items.values() if item["id"])

    def test_passes_over_events_that_nobody_knows(self, path: pathlib.Path) -> None:
        strange: list[Any] = [
            {"type": "strange"}, {"candidates": [{"strange": 1}]}, chunk({"strange": {"a": 1}}), {"candidates": None},
            {"usageMetadata": {"trafficType": "ON_DEMAND"}, "strange": [1]}, [], "", {"candidates": [None, 3]},
            chunk({"executableCode": {"code": "1"}}, {"inlineData": {"data": ""}}, {"functionResponse": {}}),
        ]
        chunks = recorded_chunks(path)
        for count in range(len(chunks) if len(chunks) < 20 else 3):
            mixed = [*chunks[:count], *strange, *chunks[count:]]
            assert view_of(mixed).outcome() == view_of(chunks).outcome()


@NO_RECORDINGS
@pytest.mark.parametrize("path", WHOLES, ids=named)
def test_every_recorded_whole_answer_says_what_it_holds(path: pathlib.Path) -> None:
    view = whole(decoder(), json.loads(path.read_bytes()))
    check_against(view, recorded_chunks(path))


KINDS = {
    "documented-err-503": ("overload", None), "err-400-key": ("auth", None), "err-404-model": ("model_not_found", None),
    "err-400-vertex-context-length": ("context_length", None), "err-404-stream": ("model_not_found", None),
    "err-429-quota-retryinfo": ("rate_limit", 48.9), "err-429-retryinfo-fraction": ("rate_limit", 34.4), "err-429-short": ("rate_limit", None),
}


@NO_RECORDINGS
@pytest.mark.parametrize("path", ERRORS, ids=named)
def test_50_every_recorded_error_is_told_by_its_kind(path: pathlib.Path) -> None:
    status = json.loads((path.parent / "meta.json").read_bytes())["status"]
    kind, wait_s = KINDS[named(path)]
    error = pomex.provider_error(status, pomex.Headers([]), path.read_bytes())
    assert error.kind == kind
    assert wait_s is None or error.retry_after_s == pytest.approx(wait_s, abs=1)
    inside = view_of([json.loads(path.read_bytes())])
    assert isinstance(inside.error, pomex.ProviderError) and inside.error.kind == kind


# --- quirks of streams


ENDS = [
    ("STOP", "completed", ""), ("MAX_TOKENS", "max_output_tokens", ""), ("CONTINUATION", "max_output_tokens", ""),
    *((reason, "content_filter", reason) for reason in (
        "SAFETY", "PROHIBITED_CONTENT", "BLOCKLIST", "SPII", "RECITATION", "LANGUAGE", "IMAGE_SAFETY", "MODEL_ARMOR",
        "ESCALATION")),
    *((reason, "failed", reason) for reason in (
        "MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "MALFORMED_RESPONSE", "TOO_MANY_TOOL_CALLS", "OTHER",
        "MISSING_THOUGHT_SIGNATURE")),
]


@pytest.mark.parametrize(("reason", "end", "word"), ENDS)
@pytest.mark.parametrize("before", [[], [chunk({"text": "Hm"})]], ids=["alone", "after text"])
def test_24_every_finish_reason_ends_truly(reason: str, end: str, word: str, before: list[JSON]) -> None:
    view = view_of([*before, {"candidates": [{"finishReason": reason, "finishMessage": "As it was."}]}])
    assert view.end() == end
    said = str(view.error) if view.error else view.stops[-1].explanation
    assert word in said
    assert ("As it was." in said) == (end == "content_filter"), "what the model wrote is not for the log of failures"
    if end == "failed" and reason != "MISSING_THOUGHT_SIGNATURE":
        assert isinstance(view.error, pomex.ProviderError)
        assert view.error.kind == "tool_generation" and view.error.retryable and view.error.code == "server_error"
    if reason == "MISSING_THOUGHT_SIGNATURE":
        assert view.error is not None and view.error.code == "invalid_prompt" and not view.error.retryable


@pytest.mark.parametrize(("chunks", "end"), [
    ([chunk({"text": "a"})], "none"),
    ([chunk({"text": "a"}, reason="FINISH_REASON_UNSPECIFIED")], "none"),
    ([chunk({"text": "a"}, reason="NEW_REASON")], "completed"),
    ([{"candidates": [{"finishReason": "NEW_REASON"}]}], "failed"),
    ([{"promptFeedback": {"blockReason": "SAFETY"}}], "content_filter"),
    ([{"promptFeedback": {"blockReason": "BLOCKED_REASON_UNSPECIFIED"}}], "none"),
    ([{"promptFeedback": {"safetyRatings": []}}, STOPPED], "completed"),
    ([chunk({"text": "a"}), {"error": {"code": 503, "status": "UNAVAILABLE", "message": "m"}}, STOPPED], "failed"),
    ([[{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "m"}}]], "failed"),
    ([chunk({"functionCall": {"args": {"a": 1}}}, {"text": "a"}), STOPPED], "failed"),
])
def test_41_streams_end_by_their_evidence(chunks: list[Any], end: str) -> None:
    assert view_of(chunks).end() == end


def test_a_block_says_what_struck() -> None:
    blocked = view_of([{"promptFeedback": {"blockReason": "MODEL_ARMOR", "blockReasonMessage": "It is a jailbreak."}}])
    assert blocked.stops[-1].explanation == "The provider blocked this prompt (MODEL_ARMOR): It is a jailbreak."
    rated = view_of([{"candidates": [{"finishReason": "SAFETY", "safetyRatings": [
        {"category": "HARM_A", "blocked": True}, {"category": "HARM_B"}]}]}])
    assert rated.stops[-1].explanation == "The provider stopped this answer (SAFETY, HARM_A)."


@pytest.mark.parametrize("data", ["{", "nonsense", "[" * 100_000])
def test_what_is_not_json_is_the_upstreams_error(data: str) -> None:
    with pytest.raises(pomex.UpstreamError):
        list(decoder().feed(data))


STRANGE_VALUES: list[Any] = [None, 1, "s", [], {}, [[]], [None], {"a": None}, True]
FIELDS = ["candidates", "content", "parts", "functionCall", "args", "inlineData", "mimeType", "data", "text", "thoughtSignature", "toolCall",
          "groundingMetadata", "groundingChunks", "groundingSupports", "segment", "usageMetadata", "promptTokenCount",
          "promptFeedback", "finishReason", "webSearchQueries", "safetyRatings", "name", "id", "web", "groundingChunkIndices"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_any_shape_gives_deltas_or_the_upstreams_error(field: str) -> None:
    whole: JSON = {
        "candidates": [{"content": {"parts": [
            {"text": "a", "thoughtSignature": "s"}, {"functionCall": {"name": "f", "id": "i", "args": {}}},
            {"inlineData": {"mimeType": "image/png", "data": "AAAA"}},
            {"toolCall": {"toolType": "GOOGLE_SEARCH_WEB", "args": {}}}, {"text": "b"}]},
            "finishReason": "SAFETY", "safetyRatings": [],
            "groundingMetadata": {"webSearchQueries": ["q"], "groundingChunks": [{"web": {"uri": "u"}}], "groundingSupports": [
                {"segment": {"endIndex": 1, "text": "b"}, "groundingChunkIndices": [0]}]}}],
        "usageMetadata": {"promptTokenCount": 1}, "promptFeedback": {"blockReason": "A"}}

    def put(value: Any, at: Any) -> Any:
        if isinstance(at, list):
            return [put(value, each) for each in at]
        if isinstance(at, dict):
            return {key: value if key == field else put(value, each) for key, each in at.items()}
        return at

    for value in STRANGE_VALUES:
        try:
            view_of([put(value, whole)])
        except pomex.UpstreamError:
            pass


def test_23_parallel_calls_are_items_of_their_own_in_order_over_the_whole_stream() -> None:
    view = view_of([chunk(fc("f", {"a": 1})), chunk(fc("f", {"a": 2}), fc("g")), chunk(fc("f", {"a": 1})), STOPPED])
    assert view.calls() == [("f", {"a": 1}), ("f", {"a": 2}), ("g", {}), ("f", {"a": 1})]
    assert len(set(view.call_ids())) == 4 and all(pomex.MINTED_ID.fullmatch(i) for i in view.call_ids())


def test_ids_are_kept_and_told_apart() -> None:
    view = view_of([chunk(fc("f", id="8hd01vsf"), fc("f", id="8hd01vsf"), fc("g", id="k0")), STOPPED])
    first, second, third = view.call_ids()
    assert (first, third) == ("8hd01vsf", "k0") and second not in (first, third)


def test_20_21_signatures_go_before_their_call_and_behind_their_message() -> None:
    view = view_of([chunk({"text": "I think", "thought": True}), chunk({"text": "So "}), chunk({"text": "it is.", "thoughtSignature": "T"}),
                    chunk(fc("f", {}, "F"), fc("g"), fc("h", {}, "H")), chunk({"text": "", "thoughtSignature": "E"}, reason="STOP")])
    assert view.kinds() == ["reasoning", "message", "reasoning", "reasoning", "function_call", "function_call",
                            "reasoning", "function_call", "reasoning"]
    f, _, h = view.call_ids()
    assert view.replays() == [{"signature": "T", "characters": 6}, {"for": f, "signature": "F", "arguments": pomex.json_digest({})},
                              {"for": h, "signature": "H", "arguments": pomex.json_digest({})}, {"signature": "E", "characters": 0}]


def test_a_call_that_the_client_changed_has_the_dummy() -> None:
    signed = replay(**{"for": "a"}, signature="S", arguments=pomex.json_digest({"path": "x"}))
    for arguments, wanted in (({"path": "x"}, "S"), ({"path": "x", "all": False}, DUMMY)):
        contents, _ = replayed([user("q"), signed, {**function_call("a"), "arguments": json.dumps(arguments)}])
        [call] = [part for content in contents for part in content["parts"] if "functionCall" in part]
        assert call["thoughtSignature"] == wanted


def test_text_after_a_signed_part_is_a_message_of_its_own() -> None:
    view = view_of([chunk({"text": "a", "thoughtSignature": "A"}, {"text": "b", "thoughtSignature": "B"}), STOPPED])
    assert view.kinds() == ["message", "reasoning", "message", "reasoning"]
    assert [r["signature"] for r in view.replays()] == ["A", "B"]


@pytest.mark.parametrize("given", [{"name": "f", "willContinue": True}, {"partialArgs": [{"jsonPath": "$.a", "stringValue": "x"}]}])
def test_a_call_in_pieces_fails_rather_than_lose_its_arguments(given: JSON) -> None:
    view = view_of([chunk({"text": "a"}), chunk({"functionCall": given}), STOPPED])
    assert view.end() == "failed" and not view.calls()


@pytest.mark.parametrize("args", [[1], 3, "x", "[1]", {"a": float("nan")}, {"a": float("inf")}, True])
def test_arguments_that_are_no_object_are_no_call(args: Any) -> None:
    call = pomex.WIRES["gemini"].call(job_of({"model": "google/x", "input": "q", "tools": TOOLS}))
    answer = answer_of(call, [chunk({"text": "Hm"}), chunk({"functionCall": {"name": "f", "args": args}}), STOPPED])
    assert answer["status"] == "failed" and [item["type"] for item in answer["output"]] == ["message"]


@pytest.mark.parametrize(("given", "arguments"), [({}, "{}"), ({"args": None}, "{}"), ({"args": '{"a": 1}'}, '{"a": 1}')])
def test_arguments_may_be_missing_or_text(given: JSON, arguments: str) -> None:
    assert view_of([chunk({"functionCall": {"name": "f", **given}}), STOPPED]).calls() == [("f", json.loads(arguments))]


COUNTS = {"promptTokenCount": 1000, "cachedContentTokenCount": 600, "candidatesTokenCount": 42}


@pytest.mark.parametrize(("later", "usage"), [
    ({"promptTokenCount": 1000}, (1000, 600, 42, 0)), ({"promptTokenCount": 1, "candidatesTokenCount": None}, (1000, 600, 42, 0)),
    ({"candidatesTokenCount": 50, "thoughtsTokenCount": 7}, (1000, 600, 57, 7)), ({}, (1000, 600, 42, 0))])
def test_what_follows_the_end_changes_neither_the_answer_nor_counts(later: JSON, usage: tuple[int, ...]) -> None:
    ended = {**chunk({"text": "done"}, reason="STOP"), "usageMetadata": COUNTS}
    view = view_of([ended, {**chunk({"text": " more"}, fc("f")), "usageMetadata": later}])
    assert (view.said(), view.calls(), view.end()) == ("done", [], "completed") and view.usage is not None
    assert (view.usage.input, view.usage.cached, view.usage.output, view.usage.reasoning) == usage
    assert view_of([ended, {"error": {"code": 500, "message": "m"}}]).end() == "failed"


def test_an_empty_end_before_the_answer_is_none_and_counts_left_out_stay() -> None:
    view = view_of([chunk(reason="STOP"), {**chunk({"text": "a"}), "usageMetadata": COUNTS},
                    {**chunk({"text": "b"}, reason="STOP"), "usageMetadata": {"candidatesTokenCount": 50}}])
    assert view.said() == "ab" and view.usage == pomex.Usage(1000, 600, 0, 50)


def test_images_are_items_and_go_back_signed_as_the_models_own() -> None:
    call = pomex.WIRES["gemini"].call(job_of({"model": "google/x", "input": "q", "stream": True}))
    image = {"inlineData": {"mimeType": "image/png", "data": PIXEL}, "thoughtSignature": "SIG"}
    draft = {"inlineData": {"mimeType": "image/png", "data": "AAAA"}, "thought": True}
    answer = answer_of(call, [chunk({"text": "Here"}), chunk(draft), chunk(image), chunk({"text": "!"}, {"inlineData": {"mimeType": "audio/wav", "data": "AA"}}, reason="STOP")])
    assert [item["type"] for item in answer["output"]] == ["message", "image_generation_call", "reasoning", "message"]
    assert (answer["output"][1]["status"], answer["output"][1]["result"]) == ("completed", PIXEL)
    again = pomex.WIRES["gemini"].call(job_of({"model": "google/x", "input": [user("q"), *answer["output"], user("blue")]}))
    assert not again.dropped
    assert json.loads(again.body)["contents"][1] == {"role": "model", "parts": [{"text": "Here"}, image, {"text": "!"}]}


NAMESPACE = {"type": "namespace", "name": "mcp__x", "tools": [{"type": "function", "name": "look", "parameters": {"type": "object"}}]}
PATCH = {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}}
DIGIT = {"type": "function", "name": "3d-view", "parameters": {"type": "object", "properties": {}}}


def test_3_4_26_names_come_back_as_they_were_asked() -> None:
    tools = [NAMESPACE, PATCH, DIGIT]
    offered = [function["name"] for function in pomex.ToolMap(tools, searches=True).functions]
    assert offered == ["mcp__x__look", "apply_patch", pomex.upstream_tool_name("3d-view", "")]
    view = view_of([chunk(*(fc(name, {"input": "x"}) for name in offered), fc("default_api:apply_patch", {"input": "x"})), STOPPED], tools)
    assert [(i["kind"], i["namespace"], i["name"]) for i in view.items.values()] == [
        ("function_call", "mcp__x", "look"), ("custom_tool_call", "", "apply_patch"), ("function_call", "", "3d-view"),
        ("custom_tool_call", "", "apply_patch")]


def test_a_search_becomes_an_item_and_annotations() -> None:
    text = "Das heißt: Zürich ist größer."
    encoded = text.encode()
    begin, end = encoded.index("Zürich".encode()), len(encoded)
    grounding = {"webSearchQueries": ["size of zurich"], "groundingChunks": [{"web": {"uri": "https://a", "title": "A"}}, {"web": {"uri": "https://b"}}],
                 "groundingSupports": [
                     {"segment": {"startIndex": begin, "endIndex": end, "text": "Zürich ist größer."}, "groundingChunkIndices": [0, 1, 7]},
                     {"segment": {"startIndex": 1, "endIndex": 4, "text": "Das"}, "groundingChunkIndices": [0]},
                     {"segment": {"endIndex": 4, "text": "nicht da"}, "groundingChunkIndices": [0]}]}
    view = view_of([chunk({"text": text[:12]}), chunk({"text": text[12:]}, groundingMetadata=grounding),
                    chunk({"text": "", "thoughtSignature": "S"}, reason="STOP")])
    assert view.kinds() == ["message", "reasoning", "web_search_call"]
    assert [(a["url"], a["title"], text[a["start_index"]:a["end_index"]]) for a in view.items[0]["annotations"]] == [
        ("https://a", "A", "Zürich ist größer."), ("https://b", "", "Zürich ist größer."), ("https://a", "A", "Das")]
    search = list(view.items.values())[-1]["fields"]
    assert search == {"type": "web_search_call", "status": "completed",
                      "action": {"type": "search", "query": "size of zurich", "queries": ["size of zurich"]}}


SEARCHED = ({"toolCall": {"id": "t1", "toolType": "GOOGLE_SEARCH_WEB", "args": {"queries": ["q"]}}, "thoughtSignature": "S1"},
            {"toolResponse": {"id": "t1", "toolType": "GOOGLE_SEARCH_WEB", "response": {"x": 1}}, "thoughtSignature": "S2"})


def test_a_search_between_functions_is_shown_once_and_comes_back_whole() -> None:
    view = view_of([chunk(*SEARCHED), chunk({"text": "a"}, reason="STOP", groundingMetadata={"webSearchQueries": ["q"]})])
    assert view.kinds() == ["reasoning", "web_search_call", "reasoning", "message"]
    assert [replay["part"] for replay in view.replays()] == list(SEARCHED)


def test_usage_is_the_last_that_says_anything() -> None:
    counts = [{"promptTokenCount": 9}, {"promptTokenCount": 5, "toolUsePromptTokenCount": 3, "cachedContentTokenCount": 4,
              "candidatesTokenCount": 2, "thoughtsTokenCount": 7}, {"trafficType": "ON_DEMAND"}, {}]
    view = view_of([{"usageMetadata": count} for count in counts])
    assert view.usage == pomex.Usage(input=8, cached=4, output=9, reasoning=7)
    view = view_of([{"usageMetadata": count} for count in [*counts, {"promptTokenCount": 6, "candidatesTokenCount": None}]])
    assert view.usage == pomex.Usage(input=9, cached=4, output=9, reasoning=7)


# --- the request


def user(text: str, role: str = "user") -> JSON:
    return {"type": "message", "role": role, "content": text}


def says(text: str) -> JSON:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text, "annotations": []}]}


def function_call(call_id: str, name: str = "f", arguments: str = "{}") -> JSON:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def output(call_id: str, value: Any = "ok") -> JSON:
    return {"type": "function_call_output", "call_id": call_id, "output": value}


def replay(**fields: Any) -> JSON:
    return {"type": "reasoning", "summary": [], "sealed_replay": fields}


def encode(items: list[JSON] | str, model: str = PRO, overrides: Any = None, **fields: Any) -> tuple[JSON, list[str]]:
    job = job_of({"model": "google/x", "input": items, **fields}, model)
    call = pomex.WIRES["gemini"].call(dataclasses.replace(job, overrides=overrides or {}))
    body = json.loads(call.body)
    check_body(body, model)
    return body, call.dropped


def contents(items: list[JSON], model: str = PRO, **fields: Any) -> list[JSON]:
    made = encode(items, model, **fields)[0]["contents"]
    assert isinstance(made, list)
    return made


# a stub of what the API refuses: TRANSLATION.md 4 to 6, and the types of google-genai 3.4

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]{0,63}")
BODY_FIELDS = {"contents", "systemInstruction", "tools", "toolConfig", "generationConfig"}
PART_DATA = {"text", "inlineData", "fileData", "functionCall", "functionResponse", "toolCall", "toolResponse"}
CONFIG_FIELDS = {"maxOutputTokens", "temperature", "topP", "responseMimeType", "responseJsonSchema", "thinkingConfig"}
REFUSED_KEYWORDS = {"$schema", "discriminator", "examples", "title", "exclusiveMinimum", "exclusiveMaximum", "const", "encrypted"}
LEVELS = {"gemini-3.1-pro-preview": "LOW MEDIUM HIGH", "gemini-3-pro-preview": "LOW HIGH", "gemini-3.7-flash": "LOW MEDIUM HIGH",
          "gemini-4-argon": "LOW MEDIUM HIGH", "gemini-3.5-flash": "MINIMAL LOW MEDIUM HIGH"}


def check_body(body: JSON, model: str) -> None:
    new = not re.match(r"gemini-[12]", model)
    thinks = new or model.startswith("gemini-2.5")
    assert set(body) <= BODY_FIELDS and body["contents"]
    json.dumps(body, allow_nan=False)
    if "systemInstruction" in body:
        assert all(part["text"] for part in body["systemInstruction"]["parts"])
    check_contents(body["contents"], new, thinks)
    check_tools(body, new)
    check_config(body, model, new, thinks)


def check_contents(made: list[JSON], new: bool, thinks: bool) -> None:
    assert made[0]["role"] == "user" and made[-1]["role"] == "user"
    waiting: list[JSON] = []
    for index, content in enumerate(made):
        assert set(content) == {"role", "parts"} and content["parts"]
        assert content["role"] == ("user", "model")[index % 2], "roles take turns"
        responses = [part["functionResponse"] for part in content["parts"] if "functionResponse" in part]
        assert len(responses) == len(waiting), "number of function response parts"
        assert responses == [part["functionResponse"] for part in content["parts"][:len(responses)]], "results come first"
        for call, response in zip(waiting, responses):
            assert response["name"] == call["name"] and response.get("id") == call.get("id")
            assert isinstance(response["response"], dict)
            check_result_parts(response.get("parts", []), new)
        waiting = [part["functionCall"] for part in content["parts"] if "functionCall" in part]
        assert not waiting or content["role"] == "model"
        signed = [part for part in content["parts"] if "functionCall" in part][:1]
        assert not thinks or all(part.get("thoughtSignature") for part in signed), "missing a thought_signature"
        for part in content["parts"]:
            check_part(part, content["role"])
    assert not waiting


def check_result_parts(parts: list[JSON], new: bool) -> None:
    assert new or not parts
    for part in parts:
        assert set(part) == {"inlineData"} and part["inlineData"]["mimeType"] in pomex.RESULT_MEDIA


def check_part(part: JSON, role: str) -> None:
    assert len(PART_DATA & set(part)) == 1 and set(part) <= PART_DATA | {"thoughtSignature"}
    if "thoughtSignature" in part:
        assert role == "model" and part["thoughtSignature"]
    if "text" in part:
        assert part["text"] or "thoughtSignature" in part, "an empty text"
    if "functionCall" in part:
        assert NAME.fullmatch(part["functionCall"]["name"]) and isinstance(part["functionCall"]["args"], dict)
        assert "thoughtSignature" not in part["functionCall"]
        assert not pomex.MINTED_ID.fullmatch(part["functionCall"].get("id", ""))
    if "inlineData" in part:
        assert base64.b64decode(part["inlineData"]["data"], validate=True)
        assert re.fullmatch(r"(image/(png|jpeg|webp|heic|heif)|application/pdf|text/plain|audio/\S+|video/\S+)", part["inlineData"]["mimeType"])


def check_tools(body: JSON, new: bool) -> None:
    tools, config = body.get("tools", []), body.get("toolConfig", {})
    functions = [function for tool in tools for function in tool.get("functionDeclarations", [])]
    names = [function["name"] for function in functions]
    assert len(set(names)) == len(names) and all(NAME.fullmatch(name) for name in names)
    for function in functions:
        assert set(function) == {"name", "description", "parametersJsonSchema"}
        check_schema(function["parametersJsonSchema"])
    searches = any("googleSearch" in tool for tool in tools)
    assert new or not (searches and functions), "Tool use with function calling is unsupported"
    assert bool(config.get("includeServerSideToolInvocations")) == (searches and bool(functions))
    mode = config.get("functionCallingConfig", {"mode": "AUTO"})
    assert "functionCallingConfig" not in config or functions, "Function calling config is set without function_declarations"
    assert mode["mode"] in ("AUTO", "ANY", "NONE", "VALIDATED")
    assert "allowedFunctionNames" not in mode or (mode["mode"] in ("ANY", "VALIDATED") and set(mode["allowedFunctionNames"]) <= set(names))


def check_schema(schema: Any, named: bool = False) -> None:
    if isinstance(schema, list):
        for each in schema:
            check_schema(each)
    if not isinstance(schema, dict):
        return
    assert named or not REFUSED_KEYWORDS & set(schema), "Unknown name"
    assert named or "$ref" not in schema or all(key.startswith("$") for key in schema)
    assert named or not (schema.get("type") == "string" and "format" in schema)
    for key, value in schema.items():
        if named or key not in ("enum", "default", "required"):
            check_schema(value, not named and key in ("properties", "$defs"))


def check_config(body: JSON, model: str, new: bool, thinks: bool) -> None:
    config = body.get("generationConfig", {})
    thinking = config.get("thinkingConfig", {})
    assert set(config) <= CONFIG_FIELDS and set(thinking) <= {"thinkingBudget", "thinkingLevel", "includeThoughts"}
    assert not {"thinkingBudget", "thinkingLevel"} <= set(thinking), "both thinking knobs"
    assert thinks or not thinking, "Thinking is not enabled for this model"
    assert "thinkingBudget" not in thinking or not new
    assert "thinkingLevel" not in thinking or new
    assert thinking.get("thinkingLevel") in (None, *LEVELS.get(model, "MINIMAL LOW MEDIUM HIGH").split())
    assert not (thinking.get("thinkingBudget") == 0 and (thinking.get("includeThoughts") or "pro" in model))
    assert "responseJsonSchema" not in config or config["responseMimeType"] == "application/json"
    functions = any("functionDeclarations" in tool for tool in body.get("tools", []))
    assert new or not (functions and "responseMimeType" in config), "with a response mime type"
    check_schema(config.get("responseJsonSchema"))


def recorded_requests() -> Iterator[pathlib.Path]:
    yield from sorted((SHARED / "codex-requests").glob("*/[0-9]*.json"))
    yield from sorted(RECORDED.glob("responses/*/request.json"))


@NO_RECORDINGS
@pytest.mark.parametrize("path", list(recorded_requests()), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recorded_request_can_be_sent(path: pathlib.Path) -> None:
    recorded = json.loads(path.read_bytes())
    body = recorded.get("body", recorded) if isinstance(recorded, dict) else {}
    if not body.get("input"):
        pytest.skip("no input in it")
    try:
        pomex.parse_request(json.dumps(body).encode())
    except pomex.BadRequest as error:
        pytest.skip(f"refused at the door: {error}")
    more = {key: value for key, value in body.items() if key not in ("model", "input")}
    for model in MODELS:
        once, again = (encode(body["input"], model, **more) for _ in range(2))
        assert json.dumps(once) == json.dumps(again)


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\nIHDR").decode()
IMAGE = {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}
INLINE = {"inlineData": {"mimeType": "image/png", "data": PNG}}


def shape(made: list[JSON]) -> list[str]:
    """One line a content."""
    def word(part: JSON) -> str:
        key = next(key for key in part if key in PART_DATA)
        value = part[key]
        return value if key == "text" else f"{key[8:].lower()}:{value['name']}#{value.get('id', '')}" if key.startswith("function") else key
    return [f"{content['role']}: {' | '.join(word(part) for part in content['parts'])}" for content in made]


CALLS = [function_call("a"), function_call("b", "g")]
HISTORIES: list[tuple[str, list[JSON], list[str]]] = [
    ("22 results of parallel calls are one turn", [user("q"), *CALLS, output("b", "2"), output("a", "1"), user("r")],
     ["user: q", "model: call:f#a | call:g#b", "user: response:f#a | response:g#b | r"]),
    ("28 a call without output gets one", [user("q"), *CALLS, output("a")],
     ["user: q", "model: call:f#a | call:g#b", "user: response:f#a | response:g#b"]),
    ("27 an output without its call is text", [user("q"), output("x", "lost")], ["user: q | [tool output] lost"]),
    ("29 text between a call and its output goes before it", [user("q"), function_call("a"), says("t"), output("a")],
     ["user: q", "model: t | call:f#a", "user: response:f#a"]),
    ("30 the last word is the user's", [user("q"), says("t")], ["user: q", "model: t", "user: Continue."]),
    ("the first word is the user's", [says("t"), user("q")], ["user: (continue)", "model: t", "user: q"]),
    ("neighbours of a role are one turn", [user("q"), user("r"), says("t"), says("u"), user("s")],
     ["user: q | r", "model: t | u", "user: s"]),
    ("a step is one turn", [user("q"), says("t"), function_call("a"), output("a"), function_call("b", "g"), output("b"), says("u"), user("s")],
     ["user: q", "model: t | call:f#a", "user: response:f#a", "model: call:g#b", "user: response:g#b", "model: u", "user: s"]),
    ("ids that were made up stay at home", [user("q"), function_call("call_0123456789ab_g1"), output("call_0123456789ab_g1")],
     ["user: q", "model: call:f#", "user: response:f#"]),
    ("only instructions", [user("be brief", "developer")], ["user: (continue)"]),
    ("2 later instructions stay where they are", [user("q"), says("t"), user("be brief", "developer"), user("r")],
     ["user: q", "model: t", "user: <developer_message>\nbe brief\n</developer_message> | r"]),
    ("empty texts are left out", [user("q"), says(""), user(""), user("r")], ["user: q | r"]),
]


@pytest.mark.parametrize(("items", "lines"), [row[1:] for row in HISTORIES], ids=[row[0] for row in HISTORIES])
@pytest.mark.parametrize("model", MODELS)
def test_histories_are_mended(items: list[JSON], lines: list[str], model: str) -> None:
    assert shape(contents(items, model)) == lines


def test_leading_instructions_are_the_system_instruction() -> None:
    body, _ = encode([user("a", "developer"), user("b", "system"), user("q")], instructions="i")
    assert body["systemInstruction"] == {"parts": [{"text": "i"}, {"text": "a"}, {"text": "b"}]}


@pytest.mark.parametrize(("given", "sent"), [
    ("text", {"result": "text"}), ("", {"result": ""}), ('{"$ref": "#/x"}', {"result": '{"$ref": "#/x"}'}),
    ([{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}], {"result": "a\nb"}),
])
def test_37_results_are_objects(given: Any, sent: JSON) -> None:
    made = contents([user("q"), function_call("a"), output("a", given)])
    assert made[-1]["parts"] == [{"functionResponse": {"name": "f", "id": "a", "response": sent}}]


def test_a_missing_result_is_an_error() -> None:
    (part,) = contents([user("q"), function_call("a")])[-1]["parts"]
    assert part["functionResponse"]["response"] == {"error": pomex.NO_OUTPUT}


def test_37_images_of_results_go_inside_or_behind_all_results() -> None:
    items = [user("q"), *CALLS, output("a", [{"type": "input_text", "text": "t"}, IMAGE]), output("b")]
    inside, behind = contents(items, PRO)[-1]["parts"], contents(items, FLASH25)[-1]["parts"]
    assert inside[0]["functionResponse"]["parts"] == [INLINE] and len(inside) == 2
    assert [next(iter(part)) for part in behind] == ["functionResponse", "functionResponse", "inlineData"]


MEDIA: list[tuple[JSON, JSON | None]] = [
    (IMAGE, INLINE),
    ({"type": "input_image", "image_url": "data:image/jpg;base64,AAAA"}, {"inlineData": {"mimeType": "image/jpeg", "data": "AAAA"}}),
    ({"type": "input_image", "image_url": f"data:image/gif;base64,{PNG}"}, INLINE),      # its bytes say what it is
    ({"type": "input_image", "image_url": PNG}, INLINE),
    ({"type": "input_image", "image_url": f"data:;base64,{PNG[:4]}\n{PNG[4:].rstrip('=')}"}, INLINE),
    ({"type": "input_image", "image_url": "data:image/png;base64,R0lGODlhAQ=="}, None),
    ({"type": "input_image", "image_url": "AAAA"}, None),
    ({"type": "input_image", "image_url": "data:image/png,raw"}, None),
    ({"type": "input_image", "image_url": "data:image/png;base64,cut off..."}, None),
    ({"type": "input_image", "image_url": "data:image/png;base64,"}, None),
    ({"type": "input_image", "image_url": "https://x/y.PNG?z=1"}, {"fileData": {"fileUri": "https://x/y.PNG?z=1", "mimeType": "image/png"}}),
    ({"type": "input_image", "image_url": "gs://x/y"}, {"fileData": {"fileUri": "gs://x/y"}}),
    ({"type": "input_image", "file_id": "file-1"}, None),
    ({"type": "input_file", "filename": "a.pdf", "file_data": PNG}, INLINE),
    ({"type": "input_file", "filename": "a.pdf", "file_data": "AAAA"}, {"inlineData": {"mimeType": "application/pdf", "data": "AAAA"}}),
    ({"type": "input_file", "filename": "a.py", "file_data": "data:text/x-python;base64,eD0x"}, {"inlineData": {"mimeType": "text/plain", "data": "eD0x"}}),
    ({"type": "input_file", "filename": "a.zip", "file_data": "data:application/zip;base64,UEsDBBQABgA="}, None),
    ({"type": "input_file", "filename": "a.docx", "file_data": "UEsDBBQABgA="}, None),
    ({"type": "input_file", "filename": "a.mp4", "file_data": "AAAAGA=="}, {"inlineData": {"mimeType": "video/mp4", "data": "AAAAGA=="}}),
    ({"type": "input_file", "file_url": "https://x/y.pdf"}, {"fileData": {"fileUri": "https://x/y.pdf", "mimeType": "application/pdf"}}),
    ({"type": "input_new", "x": 1}, None),
    ({"type": "refusal", "refusal": "No."}, {"text": "No."}),
]


@pytest.mark.parametrize(("given", "sent"), MEDIA)
def test_media_go_inline_or_by_address_or_are_named(given: JSON, sent: JSON | None) -> None:
    body, dropped = encode([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "q"}, given]}])
    assert body["contents"][0]["parts"][1:] == ([sent] if sent else [])
    assert (f"content:{given['type']}" in dropped) == (sent is None)


# --- reasoning, there and back


SIGNED = [user("q"), replay(**{"for": "a"}, signature="SIG"), function_call("a"), function_call("b", "g")]


def replayed(items: list[JSON], model: str = PRO) -> tuple[list[JSON], list[str]]:
    """The contents of items whose `sealed_replay` comes in an envelope."""
    envelope = pomex.Envelope(b"secret", "account")
    sealed = [{**item, "encrypted_content": envelope.seal("google", model, item["sealed_replay"])} if "sealed_replay" in item else item
              for item in items]
    body, dropped = encode(sealed, model)
    return body["contents"], dropped


def user_item(text: str) -> JSON:
    return {**user(text), "content": [{"type": "input_text", "text": text}]}


@pytest.mark.parametrize(("items", "signatures"), [
    ([replay(**{"for": "a"}, signature="S"), function_call("a"), function_call("b")], ["S", None]),
    ([replay(**{"for": "a"}, signature="S"), function_call("a"), replay(**{"for": "b"}, signature="T"), function_call("b")], ["S", "T"]),
    ([function_call("a"), function_call("b")], [DUMMY, None]),
    ([replay(**{"for": "b"}, signature="S"), function_call("a"), function_call("b")], [DUMMY, "S"]),
    ([replay(**{"for": "elsewhere"}, signature="S"), function_call("a")], [DUMMY]),
    ([replay(encrypted_content="gAAAA"), function_call("a")], [DUMMY]),
    ([replay(**{"for": "a"}, signature="S"), function_call("a"), output("a"), replay(**{"for": "a"}, signature="T"), function_call("a"), output("a")],
     ["S", "T"]),
    ([function_call("a"), output("a"), function_call("b"), output("b"), user_item("r"), function_call("c")], [DUMMY, DUMMY, DUMMY]),
])
def test_18_20_signatures_stand_on_their_calls_or_the_dummy_does(items: list[JSON], signatures: list[str | None]) -> None:
    made, dropped = replayed([user_item("q"), *items])
    calls = [part for content in made for part in content["parts"] if "functionCall" in part]
    assert [part.get("thoughtSignature") for part in calls] == signatures
    assert dropped == (["reasoning:foreign"] if "encrypted_content" in json.dumps(items) else [])


def test_a_model_that_does_not_think_gets_no_dummy() -> None:
    made, _ = replayed([user_item("q"), function_call("a")], FLASH20)
    assert DUMMY not in json.dumps(made)


@pytest.mark.parametrize(("characters", "parts"), [
    (0, [{"text": "So it is."}, {"text": "", "thoughtSignature": "S"}]),
    (9, [{"text": "So it is.", "thoughtSignature": "S"}]),
    (6, [{"text": "So "}, {"text": "it is.", "thoughtSignature": "S"}]),
    (99, [{"text": "So it is.", "thoughtSignature": "S"}]),
])
def test_21_a_signature_of_text_stands_on_the_part_it_came_with(characters: int, parts: list[JSON]) -> None:
    made, _ = replayed([user_item("q"), says("So it is."), replay(signature="S", characters=characters), user_item("r")])
    assert made[1]["parts"] == parts


def test_a_signature_whose_text_is_gone_is_named() -> None:
    made, dropped = replayed([user_item("q"), replay(signature="S", characters=3), user_item("r")])
    assert shape(made) == ["user: q | r"] and dropped == ["reasoning:signature"]


def test_each_signature_looks_only_at_the_text_since_the_one_before() -> None:
    signed = [replay(signature="S", characters=2), replay(signature="T", characters=2)]
    made, dropped = replayed([user_item("q"), says("abcd"), signed[0], says("efgh"), *signed, user_item("r")])
    first, second = ([{"text": text[:2]}, {"text": text[2:], "thoughtSignature": "S"}] for text in ("abcd", "efgh"))
    assert made[1]["parts"] == first + second and dropped == ["reasoning:signature"]


def test_signatures_take_linear_time() -> None:
    many, signature = 20_000, replay(signature="S", characters=1)
    for items in ([*[says("ab")] * many, *[signature] * many], [*[function_call("a")] * many, *[signature] * many],
                  [says("ab" * many), *[signature] * many]):
        history = pomex.History([], pomex.gather_turns(items))
        began = time.process_time()
        pomex.GeminiContents(types.SimpleNamespace(history=history, settings=pomex.GEMINI_MODELS["gemini-3-pro"], dropped=[])).encode()
        assert time.process_time() - began < 3, "40,000 items took 15 s before"


def test_parts_of_a_search_come_back_only_to_models_that_take_them() -> None:
    items = [user_item("q"), *(replay(part=part) for part in SEARCHED), says("a"), user_item("r")]
    assert replayed(items)[0][1]["parts"] == [*SEARCHED, {"text": "a"}]
    made, dropped = replayed(items, FLASH25)
    assert made[1]["parts"] == [{"text": "a"}] and dropped == ["reasoning:foreign"]


# --- tools, choice, settings


FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOLS = [FUNCTION, {**FUNCTION, "name": "g"}, NAMESPACE]
ADDITIONAL = {"type": "additional_tools", "role": "developer", "tools": [FUNCTION]}


def test_1_2_additional_tools_are_offered_and_say_nothing() -> None:
    body, dropped = encode([ADDITIONAL, user("q")])
    assert [f["name"] for f in body["tools"][0]["functionDeclarations"]] == ["f"]
    assert shape(body["contents"]) == ["user: q"] and not dropped and "systemInstruction" not in body


def test_36_tools_that_cannot_be_carried_are_named() -> None:
    _, dropped = encode("q", tools=[{"type": "image_generation"}, {"type": "mcp"}, FUNCTION])
    assert dropped == ["tools:image_generation", "tools:mcp"]


def test_26_names_are_valid_and_calls_have_the_same() -> None:
    long = {**FUNCTION, "name": "x" * 128}
    body, _ = encode([user("q"), function_call("a", "3d-view"), function_call("b", "x" * 128)], tools=[DIGIT, long])
    offered = [f["name"] for f in body["tools"][0]["functionDeclarations"]]
    assert offered == [part["functionCall"]["name"] for part in body["contents"][1]["parts"]]
    for name in ("3d-view", "-x", "1" * 64, "é", "$top"):
        assert pomex.re.fullmatch("[a-zA-Z_][a-zA-Z0-9_-]{0,63}", pomex.upstream_tool_name(name, ""))


@pytest.mark.parametrize(("model", "tools", "sent", "lost"), [
    (PRO, [{"type": "web_search"}], [{"googleSearch": {}}], []),
    (FLASH25, [{"type": "web_search_preview"}], [{"googleSearch": {}}], []),
    (FLASH25, [{"type": "web_search"}, FUNCTION], [{"functionDeclarations": 1}], ["tools:web_search"]),
    (PRO, [{"type": "web_search", "filters": {"allowed_domains": ["a"]}}, FUNCTION], [{"functionDeclarations": 1}, {"googleSearch": {}}],
     ["web_search.filters"]),
])
def test_web_search_is_googles_own_where_it_may_stand(model: str, tools: list[JSON], sent: list[JSON], lost: list[str]) -> None:
    body, dropped = encode("q", model, tools=tools)
    assert [list(tool) for tool in body["tools"]] == [list(tool) for tool in sent] and dropped == lost


@pytest.mark.parametrize(("choice", "mode"), [
    ("auto", None), ("none", {"mode": "NONE"}), ("required", {"mode": "ANY"}),
    ({"type": "function", "name": "g"}, {"mode": "ANY", "allowedFunctionNames": ["g"]}),
    ({"type": "function", "name": "look", "namespace": "mcp__x"}, {"mode": "ANY", "allowedFunctionNames": ["mcp__x__look"]}),
    ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}, {"type": "function", "name": "f"}]},
     {"mode": "ANY", "allowedFunctionNames": ["g", "f"]}),
    ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]},
     {"mode": "VALIDATED", "allowedFunctionNames": ["g"]}),
    ({"type": "image_generation"}, "lost"),
])
def test_tool_choice_is_a_calling_mode(choice: Any, mode: Any) -> None:
    body, dropped = encode("q", tools=TOOLS, tool_choice=choice)
    assert body.get("toolConfig", {}).get("functionCallingConfig") == (None if mode == "lost" else mode)
    assert dropped == (["tool_choice"] if mode == "lost" else [])
    assert len(body["tools"][0]["functionDeclarations"]) == 3, "tools stay as they are: caches begin with them"


def test_a_choice_without_functions_is_named() -> None:
    body, dropped = encode("q", tools=[{"type": "web_search"}], tool_choice="required")
    assert "toolConfig" not in body and dropped == ["tool_choice"]


THINKING: list[tuple[str, str, Any]] = [
    ("gemini-2.0-flash", "high", None), ("gemma-3-27b-it", "high", None), ("gemini-1.5-pro", "low", None),
    ("gemini-2.5-flash-image", "high", None), ("gemini-2.5-flash", "none", 0), ("gemini-2.5-flash-lite", "high", 16384),
    ("gemini-2.5-flash", "max", 24576), ("gemini-2.5-pro", "none", 128), ("gemini-2.5-pro", "xhigh", 32768),
    ("gemini-3-pro-preview", "medium", "HIGH"), ("gemini-3-pro-preview", "none", "LOW"), ("gemini-3.1-pro-preview", "minimal", "LOW"),
    ("gemini-3.7-flash", "none", "LOW"), ("gemini-3.8-flash", "medium", "MEDIUM"), ("gemini-4-argon", "minimal", "LOW"),
    ("gemini-3.1-flash-lite-image", "low", "HIGH"), ("gemini-3.5-flash", "none", "MINIMAL"), ("gemini-3.5-flash", "strange", "HIGH"),
    ("models/gemini-3.6-flash", "xhigh", "HIGH"), ("gemini-flash-latest", "max", "HIGH"), ("gemini-9", "low", "LOW"),
    ("gemini-pro-latest", "minimal", "LOW"), ("gemini-4-hydrogen", "none", "LOW"),
]


@pytest.mark.parametrize(("model", "effort", "value"), THINKING)
def test_44_49_effort_is_said_the_way_the_model_knows(model: str, effort: str, value: Any) -> None:
    body, dropped = encode("q", model, reasoning={"effort": effort})
    thinking = body.get("generationConfig", {}).get("thinkingConfig", {})
    assert list(thinking.values()) == ([] if value is None else [value])
    assert dropped == (["reasoning.effort"] if value is None else [])


@pytest.mark.parametrize(("model", "reasoning", "thinking"), [
    (PRO, {"summary": "auto"}, {"includeThoughts": True}), (FLASH20, {"summary": "auto"}, None), (PRO, {}, None),
    (FLASH25, {"summary": "auto", "effort": "none"}, {"thinkingBudget": 0}),
    (PRO, {"summary": "auto", "effort": "low"}, {"thinkingLevel": "LOW", "includeThoughts": True}),
])
def test_thoughts_are_told_to_who_asks(model: str, reasoning: JSON, thinking: JSON | None) -> None:
    assert encode("q", model, reasoning=reasoning)[0].get("generationConfig", {}).get("thinkingConfig") == thinking


@pytest.mark.parametrize(("model", "stream", "asked", "sent"), [
    ("gemini-4-argon", True, 1_000_000, 65_536), ("gemini-4-argon", False, 1_000_000, 32_768), ("gemini-4-argon", False, 99, 99),
    ("gemini-4-argon", True, None, None), (PRO, True, 1_000_000, 1_000_000)])
def test_no_more_is_asked_than_one_answer_may_have(model: str, stream: bool, asked: int | None, sent: int | None) -> None:
    body, _ = encode("q", model, stream=stream, max_output_tokens=asked)
    assert body.get("generationConfig", {}).get("maxOutputTokens") == sent


def test_what_is_known_of_a_model_can_be_overridden() -> None:
    overrides = {"gemini-5": {"thinking_param": "", "combines_tools": False}, "gemini-5-pro": {"values": "LOW " * 7}}
    _, dropped = encode("q", "gemini-5-flash", overrides, reasoning={"effort": "low"})
    assert dropped == ["reasoning.effort"]
    for model, level in (("gemini-5-pro", "LOW"), ("models/gemini-5-pro", "LOW"), ("gemini-6", "HIGH")):
        body, _ = encode("q", model, overrides, reasoning={"effort": "high"})
        assert body["generationConfig"]["thinkingConfig"] == {"thinkingLevel": level}


def test_plain_fields_go_under_geminis_names_and_others_are_named() -> None:
    body, dropped = encode("q", max_output_tokens=9, temperature=0.5, top_p=0.9, service_tier="flex", top_logprobs=2,
                           parallel_tool_calls=False, tools=[FUNCTION], text={"verbosity": "low"}, user="u", store=True)
    assert body["generationConfig"] == {"maxOutputTokens": 9, "temperature": 0.5, "topP": 0.9}
    assert set(dropped) == {"service_tier", "top_logprobs", "parallel_tool_calls", "text.verbosity", "user"}


SCHEMA_FORMAT = {"type": "json_schema", "name": "n", "schema": {"type": "object", "title": "T", "properties": {"title": {"type": "string"}}}}


@pytest.mark.parametrize(("model", "tools", "kept"), [(FLASH25, [], True), (FLASH25, [FUNCTION], False), (PRO, [FUNCTION], True)])
def test_structured_output_stands_beside_functions_only_since_gemini_3(model: str, tools: list[JSON], kept: bool) -> None:
    body, dropped = encode("q", model, tools=tools, text={"format": SCHEMA_FORMAT})
    schema = {"type": "object", "properties": {"title": {"type": "string"}}}
    assert body.get("generationConfig") == ({"responseMimeType": "application/json", "responseJsonSchema": schema} if kept else None)
    assert dropped == ([] if kept else ["text.format"])


@pytest.mark.parametrize(("given", "sent"), [
    ({"$schema": "x", "type": "object", "title": "T", "examples": [1]}, {"type": "object"}),
    ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 9, "minimum": 1}, {"type": "integer", "minimum": 1}),
    ({"const": "a"}, {"enum": ["a"], "type": "string"}),
    ({"const": True}, {"enum": [True], "type": "boolean"}),
    ({"type": "string", "format": "uri"}, {"type": "string", "description": "Format: uri"}),
    ({"type": "string", "format": "uri", "description": "d"}, {"type": "string", "description": "d (format: uri)"}),
    ({"type": "number", "format": "double"}, {"type": "number", "format": "double"}),
    ({"$ref": "#/$defs/a", "description": "d"}, {"$ref": "#/$defs/a"}),
    ({"$ref": "#/definitions/a", "definitions": {"a": {"title": "A"}}}, {"$ref": "#/$defs/a", "$defs": {"a": {}}}),
    ({"anyOf": [{"const": 1}, {"type": ["string", "null"]}]}, {"anyOf": [{"enum": [1], "type": "integer"}, {"type": ["string", "null"]}]}),
    ({"properties": {"title": {"title": "T"}, "const": {"const": 1}, "format": {"type": "string"}}, "required": ["title"]},
     {"properties": {"title": {}, "const": {"enum": [1], "type": "integer"}, "format": {"type": "string"}}, "required": ["title"]}),
    ({"$defs": {"examples": {"discriminator": 1, "type": "string"}}}, {"$defs": {"examples": {"type": "string"}}}),
    ({"items": True, "additionalProperties": False, "enum": [{"title": 1}]}, {"items": True, "additionalProperties": False, "enum": [{"title": 1}]}),
])
def test_25_schemas_hold_only_what_gemini_takes(given: JSON, sent: JSON) -> None:
    before = json.dumps(given)
    assert pomex.gemini_schema(given) == sent
    assert json.dumps(given) == before, "the request's own schema is not touched"


# --- what it refuses


MISSING = "Function call is missing a thought_signature in functionCall parts. Additional data, function call `default_api:f` , position 2."
def repaired(body: JSON, error: pomex.GatewayError) -> JSON:
    attempt: Any = None
    again = pomex.UpstreamCall(pomex.WIRES["gemini"], "/", json.dumps(body).encode(), attempt, []).repaired(error)
    changed: JSON = json.loads(again.body) if again else body
    return changed


def test_a_refused_keyword_is_left_out_once() -> None:
    said = 'Invalid JSON payload received. Unknown name "pattern" at \'tools[0].function_declarations[0].parameters\': Cannot find field.'
    tool = {**FUNCTION, "parameters": {"type": "object", "properties": {"pattern": {"type": "string", "pattern": "a"}}}}
    body, _ = encode("q", tools=[tool, {"type": "web_search"}])
    error = pomex.provider_error(400, pomex.Headers([]), json.dumps({"error": {"code": 400, "message": said, "status": "INVALID_ARGUMENT"}}).encode())
    changed = repaired(body, error)
    schema = changed["tools"][0]["functionDeclarations"][0]["parametersJsonSchema"]
    assert schema["properties"]["pattern"] == {"type": "string"}
    check_body(changed, PRO)
    assert repaired(changed, error) == changed
    assert repaired(body, pomex.BadRequest("No such thing.")) == body


@pytest.mark.parametrize("said", [
    "Thinking is not enabled for this model", "Tool use with function calling is unsupported", "temperature is out of range",
    "Function calling with a response mime type: 'application/json' is unsupported"])
def test_what_overrides_can_set_is_not_tried_again(said: str) -> None:
    body, _ = encode("q", tools=[FUNCTION, {"type": "web_search"}], temperature=2, reasoning={"effort": "high"})
    error = pomex.provider_error(400, pomex.Headers([]), json.dumps({"error": {"code": 400, "message": said}}).encode())
    assert error.kind == "bad_request" and repaired(body, error) == body


@pytest.mark.parametrize("error", [pomex.ProviderError(MISSING, kind="bad_request"),
                                   view_of([{"candidates": [{"finishReason": "MISSING_THOUGHT_SIGNATURE"}]}]).error])
def test_20_a_signature_that_is_refused_becomes_the_dummy_once(error: pomex.GatewayError) -> None:
    items = [user_item("q"), says("t"), replay(signature="T", characters=1), replay(**{"for": "a"}, signature="S"), *CALLS]
    made, _ = replayed(items)
    mended = repaired({"contents": made}, error)
    assert [part.get("thoughtSignature") for part in mended["contents"][1]["parts"]] == [None, DUMMY, None]
    assert repaired(mended, error) == mended


# --- whole conversations


def job_of(body: JSON, model: str = PRO, response_id: str = "resp_0123456789abcdef") -> pomex.EncodeContext:
    request = pomex.parse_request(json.dumps(body).encode())
    answer = pomex.ResponsesAnswer(request, response_id, 0, pomex.STANDARD)
    return pomex.EncodeContext(answer, pomex.Envelope(b"secret", "account"), "google", model, False, "")


def answer_of(call: pomex.UpstreamCall, chunks: list[JSON]) -> JSON:
    for each in chunks:
        call.attempt.feed(b"data: " + json.dumps(each).encode() + b"\r\n\r\n")
    call.attempt.end()
    call.attempt.finish()
    answer: JSON = json.loads(call.attempt.body(0))
    return answer


def test_the_call_names_the_model_in_its_path_and_the_key_in_a_header() -> None:
    body = {"model": "google/x", "input": "q"}
    assert pomex.WIRES["gemini"].call(job_of({**body, "stream": True})).path == f"/models/{PRO}:streamGenerateContent?alt=sse"
    assert pomex.WIRES["gemini"].call(job_of(body, "models/a/../b")).path == "/models/a%2F..%2Fb:generateContent"
    assert pomex.WIRES["gemini"].auth("secret") == [("x-goog-api-key", "secret")]


def test_45_a_whole_answer_keeps_its_calls_and_its_signature() -> None:
    call = pomex.WIRES["gemini"].call(job_of({"model": "google/x", "input": "q", "tools": TOOLS}))
    call.attempt.whole(json.dumps(chunk({"text": "Hm"}, fc("f", {"a": 1}, "S"), reason="STOP")).encode())
    call.attempt.finish()
    output_items = json.loads(call.attempt.body(0))["output"]
    assert [item["type"] for item in output_items] == ["message", "reasoning", "function_call"]
    assert output_items[1]["encrypted_content"].startswith("pmx1.")


def test_a_refusal_that_leaves_nothing_to_change_is_not_repeated() -> None:
    tool = {**FUNCTION, "parameters": {"type": "object", "properties": {"a": {"type": "string", "pattern": "a"}}}}
    call = pomex.WIRES["gemini"].call(job_of({"model": "google/x", "input": "q", "tools": [tool]}))
    said = "Unknown name \"pattern\" at 'tools[0].function_declarations[0].parameters'"
    again = call.repaired(pomex.ProviderError(said, kind="bad_request", upstream_status=400))
    assert again is not None and b"pattern" not in again.body and again.attempt is call.attempt
    assert again.repaired(pomex.ProviderError(said, kind="bad_request", upstream_status=400)) is None
    assert call.repaired(pomex.BadRequest("No such thing.")) is None


def test_24_nothing_is_begun_by_a_malformed_call() -> None:
    call = pomex.WIRES["gemini"].call(job_of({"model": "google/x", "input": "q", "stream": True}))
    answer = answer_of(call, [{"candidates": [{"finishReason": "MALFORMED_FUNCTION_CALL"}]}])
    assert answer["status"] == "failed" and not call.attempt.output_started


def scripted(turn: int) -> list[list[JSON]]:
    """The chunks of one turn's steps: thoughts, parallel calls with and without ids, text signed in three ways."""
    sig = [base64.b64encode(f"{turn}-{n}/+=".encode() * 9).decode() for n in range(4)]
    with_ids = {"id": f"g{turn}x"} if turn % 2 else {}
    calls = [fc("look", {"n": turn, "ü": "😀"}, sig[0], **with_ids), fc("look", {"n": -turn}, **({"id": f"h{turn}x"} if with_ids else {})), fc("g")]
    calls = [calls[0], calls[1]] if with_ids else calls
    finals = [[chunk({"text": "Done "}), chunk({"text": "now."}), chunk({"text": "", "thoughtSignature": sig[2]}, reason="STOP")],
              [chunk({"text": "Done now.", "thoughtSignature": sig[2]}, reason="STOP")],
              [chunk({"text": "Done "}), chunk({"text": "now.", "thoughtSignature": sig[2]}, reason="STOP")]]
    return [[chunk({"text": "I think.", "thought": True}), chunk({"text": "I look."}), *(chunk(call) for call in calls), STOPPED],
            [chunk(fc("f", {}, sig[1], **({"id": "again"} if with_ids else {})), reason="STOP")],
            finals[turn % 3]]


def given_parts(chunks: list[JSON]) -> list[JSON]:
    """What must come back of an answer: all but thoughts and empty texts, unsigned pieces of one text together."""
    parts: list[JSON] = []
    for part in (p for c in chunks for p in c["candidates"][0]["content"]["parts"] if not p.get("thought")):
        if list(part) == ["text"] and parts and list(parts[-1]) == ["text"]:
            parts[-1] = {"text": parts[-1]["text"] + part["text"]}
        elif part != {"text": ""}:
            parts.append(part)
    return parts


def conversation(turns: int) -> tuple[list[JSON], list[list[JSON]], list[JSON]]:
    """(bodies, answers, history) of a client that echoes all it gets."""
    tools = [FUNCTION, {**FUNCTION, "name": "look"}, {**FUNCTION, "name": "g"}, PATCH]
    history: list[JSON] = []
    bodies, answers = [], []
    for turn in range(turns):
        history.append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": f"question {turn}"}, IMAGE]})
        for step, chunks in enumerate(scripted(turn)):
            body = {"model": "google/x", "input": history, "tools": tools, "instructions": "be brief", "stream": True, "reasoning": {"summary": "auto"}}
            call = pomex.WIRES["gemini"].call(job_of(body, response_id=f"resp_{turn:06x}{step:06x}ab"))
            bodies.append(json.loads(call.body))
            answers.append(given_parts(chunks))
            answer = answer_of(call, chunks)
            assert answer["status"] == "completed" and not call.dropped
            history = json.loads(json.dumps([*history, *answer["output"]]))
            history += [output(item["call_id"], [{"type": "input_text", "text": "seen"}, IMAGE]) for item in answer["output"] if item["type"] == "function_call"]
    return bodies, answers, history


def test_17_20_21_twenty_turns_come_back_byte_for_byte() -> None:
    bodies, answers, _ = conversation(20)
    for count, body in enumerate(bodies):
        check_body(body, PRO)
        came_back = [content["parts"] for content in body["contents"] if content["role"] == "model"]
        for parts, given in zip(came_back, answers[:count], strict=True):
            assert json.dumps([without_id(part) for part in parts]) == json.dumps([without_id(part) for part in given])
            assert [p["functionCall"].get("id", "")[:5] for p in parts if "functionCall" in p] == [
                p["functionCall"].get("id", "")[:5] for p in given if "functionCall" in p]      # "again" is numbered
        assert DUMMY not in json.dumps(body)


def without_id(part: JSON) -> JSON:
    if "functionCall" not in part:
        return part
    return {**part, "functionCall": {k: v for k, v in part["functionCall"].items() if k != "id"}}


def test_19_what_was_sent_once_is_sent_again_to_the_byte() -> None:
    bodies, _, _ = conversation(4)
    for shorter, longer in zip(bodies, bodies[1:]):
        for name in ("systemInstruction", "tools", "generationConfig"):
            assert json.dumps(shorter[name]) == json.dumps(longer[name])
        sent = json.dumps(shorter["contents"])[:-len("]}]")]       # the last turn may go on
        assert json.dumps(longer["contents"]).startswith(sent)


def test_18_after_another_provider_its_reasoning_is_named_and_the_dummy_steps_in() -> None:
    _, _, history = conversation(2)
    foreign = {"type": "reasoning", "summary": [], "encrypted_content": pomex.Envelope(b"secret", "account").seal("anthropic", "m", {"b": 1})}
    broken = {**foreign, "encrypted_content": "pmx1.AAAA"}
    items = [*history, user("r"), foreign, broken, function_call("toolu_1"), output("toolu_1"), user("s")]
    call = pomex.WIRES["gemini"].call(job_of({"model": "google/x", "input": items}))
    assert call.dropped == ["reasoning:anthropic", "reasoning:unverified"]      # a thought that was only shown is no loss
    body = json.loads(call.body)
    check_body(body, PRO)
    assert body["contents"][-2]["parts"] == [{"functionCall": {"name": "f", "id": "toolu_1", "args": {}}, "thoughtSignature": DUMMY}]
    assert json.dumps(body).count(DUMMY) == 1


def codex_conversations() -> list[tuple[JSON, JSON]]:
    """Pairs of recorded requests of which one goes on where the other ends."""
    bodies = [json.loads(path.read_bytes()) for path in sorted((SHARED / "codex-requests").glob("*/[0-9]*.json"))]
    return [(a, b) for a in bodies for b in bodies
            if len(a["input"]) < len(b["input"]) and b["input"][:len(a["input"])] == a["input"] and a.get("tools") == b.get("tools")]


@NO_RECORDINGS
def test_19_recorded_codex_conversations_keep_their_prefix() -> None:
    pairs = codex_conversations()
    assert pairs
    for shorter, longer in pairs:
        for model in (PRO, FLASH25):
            made = [encode(b["input"], model, **{k: v for k, v in b.items() if k not in ("model", "input")})[0] for b in (shorter, longer)]
            first, second = (json.dumps(body["contents"]) for body in made)
            assert second.startswith(first[:-len("]}]")]) and made[0].get("tools") == made[1].get("tools")
            assert made[0].get("systemInstruction") == made[1].get("systemInstruction")
