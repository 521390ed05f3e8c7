"""Chat Completions and its dialects: the decoder, the encoder, the errors of providers."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import sinks
from sinks import whole
from streams import check

import pomex

JSON = dict[str, Any]
SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
RECORDED = SHARED / "recorded"
NO_RECORDINGS = pytest.mark.skipif(
    not RECORDED.is_dir(), reason="the recorded exchanges are not beside the repository"
)


# --- what a decoder says


class View(sinks.View):
    def calls(self) -> list[tuple[str, str, str]]:
        return [(i["id"], i["name"], i["arguments"]) for i in self.items.values() if i["kind"].endswith("_call")]

    def outcome(self) -> tuple[Any, ...]:
        return self.said(), self.said("refusal"), self.said("summary"), self.calls(), self.usage, self.end()


def decoder(dialect: str = "generic", tools: Iterable[JSON] = ()) -> pomex.ChatDecoder:
    made = pomex.ChatDecoder(pomex.ToolMap(list(tools)), pomex.DIALECTS[dialect], "call_new_")
    made.sink = View()
    return made


def view_of(chunks: Iterable[Any], dialect: str = "generic", tools: Iterable[JSON] = ()) -> View:
    return sinks.feed_all(decoder(dialect, tools), chunks)


def piece(finish: str | None = None, /, **delta: Any) -> JSON:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def call(
    index: int | None = None, call_id: str | None = None, name: str | None = None, arguments: Any = ""
) -> JSON:
    given = {"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}
    return piece(tool_calls=[{k: v for k, v in given.items() if v is not None}])


STOPPED, CALLED = piece("stop"), piece("tool_calls")


# --- every recorded exchange


def exchanges(protocol: str, name: str) -> list[pathlib.Path]:
    found = sorted(RECORDED.glob(f"{protocol}/*/{name}"))
    return [path for path in found if named(path) != "openai-custom-tool-call"]      # no provider is offered one


def named(path: pathlib.Path) -> str:
    return path.parent.name


def dialect_of(path: pathlib.Path) -> str:
    first = path.parent.name.split("-")[0]
    return {"kimi": "moonshot", "llamacpp": "llama.cpp", "copilot": "openai", "tool": "mistral"}.get(
        first, first if first in pomex.DIALECTS else "generic"
    )


def recorded_data(path: pathlib.Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line[5:].strip() for line in lines if line.startswith("data:")]


def expected_of(messages: list[JSON], chunks: list[JSON], router: bool) -> tuple[Any, ...]:
    """What an exchange holds, computed the plain way: nothing shared with the decoder."""
    text = refusal = thought = ""
    calls: dict[Any, list[str]] = {}
    part: Any
    for message in messages:
        content = message.get("content") or ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "thinking":
                thought += "".join(t["text"] for t in part["thinking"])
            elif part["type"] == "text":
                text += part["text"]
        refusal += message.get("refusal") or ""
        details = "".join(d.get("text", "") for d in message.get("reasoning_details") or [])
        thought += message.get("reasoning") or message.get("reasoning_content") or details
        for given in message.get("tool_calls") or []:
            entry = calls.setdefault(given.get("index", given.get("id")), ["", "", ""])
            entry[0] = entry[0] or given.get("id") or ""
            entry[1] = entry[1] or given["function"].get("name") or ""
            entry[2] += given["function"].get("arguments") or ""
    text = text.lstrip() if text.startswith("<think>") else text
    if text.startswith("<think>"):
        thought, _, text = text.removeprefix("<think>").partition("</think>")
        text = text.lstrip()
    return (
        text,
        refusal,
        thought,
        [tuple(entry) for entry in calls.values()],
        usage_of(chunks, router),
        end_of(chunks),
    )


def usage_of(chunks: list[JSON], router: bool) -> pomex.Usage | None:
    """The last count; reasoning is added if completion_tokens cannot hold it (OpenRouter's: off by one)."""
    given = [c.get("usage") or (c.get("x_groq") or {}).get("usage") for c in chunks]
    last = next((u for u in reversed(given) if u), None)
    if last is None:
        return None
    inner = last.get("completion_tokens_details") or {}
    thought = inner.get("reasoning_tokens", 0)
    apart = not router and (
        thought > last["completion_tokens"]
        or last["total_tokens"] > last["prompt_tokens"] + last["completion_tokens"]
    )
    cache = last.get("prompt_tokens_details") or {}
    return pomex.Usage(
        last["prompt_tokens"],
        cache.get("cached_tokens", 0),
        cache.get("cache_write_tokens", 0),
        last["completion_tokens"] + (thought if apart else 0),
        thought if apart else min(thought, last["completion_tokens"]),
    )


def end_of(chunks: list[JSON]) -> str:
    if any(chunk.get("error") for chunk in chunks):
        return "failed"
    reasons = [choice.get("finish_reason") for chunk in chunks for choice in chunk.get("choices", [])]
    last = [reason for reason in reasons if reason][-1:]
    return {"length": "max_output_tokens", "content_filter": "content_filter"}.get("".join(last), "completed")


def feed_bytes(path: pathlib.Path, pieces: Iterable[bytes]) -> View:
    return sinks.feed_bytes(decoder(dialect_of(path)), pieces)


@NO_RECORDINGS
@pytest.mark.parametrize("path", exchanges("chat", "response.sse"), ids=named)
class TestEveryRecordedStream:
    def test_says_what_it_holds(self, path: pathlib.Path) -> None:
        chunks = [json.loads(data) for data in recorded_data(path) if data != "[DONE]"]
        deltas = [c.get("delta", {}) for chunk in chunks for c in chunk.get("choices", [])]
        view = feed_bytes(path, [path.read_bytes()])
        assert view.outcome() == expected_of(deltas, chunks, "openrouter" in named(path))
        if view.error is None:
            assert view.stops[-1].final
            cut = view.end() != "completed"
            assert all(
                item["closed"] or (cut and item["kind"].endswith("_call")) for item in view.items.values()
            )

    def test_says_the_same_byte_by_byte(self, path: pathlib.Path) -> None:
        data = path.read_bytes()
        bytewise = feed_bytes(path, (data[i : i + 1] for i in range(len(data))))
        assert bytewise.outcome() == feed_bytes(path, [data]).outcome()

    def test_cut_after_any_event_claims_no_more_than_came(self, path: pathlib.Path) -> None:
        whole = recorded_data(path)
        for count in range(len(whole)):
            view = view_of(whole[:count], dialect_of(path))
            finished = any(
                choice.get("finish_reason")
                for data in whole[:count]
                if data != "[DONE]"
                for choice in json.loads(data).get("choices", [])
            )
            assert bool(view.stops) <= (finished or "[DONE]" in whole[:count])
            for item in view.items.values():
                if item["closed"] and item["kind"].endswith("_call"):
                    assert isinstance(json.loads(item["arguments"] or "{}"), dict)

    def test_passes_over_events_that_nobody_knows(self, path: pathlib.Path) -> None:
        strange = [
            '{"type":"ping"}',
            '{"choices":[]}',
            "",
            "null",
            '{"choices":[{"index":0,"delta":{"new":[1]}}]}',
            '{"choices":[{"index":0,"delta":null,"finish_reason":null}],"usage":null}',
        ]
        mixed = [data for known in recorded_data(path) for data in (*strange, known)]
        assert (
            view_of(mixed, dialect_of(path)).outcome()
            == view_of(recorded_data(path), dialect_of(path)).outcome()
        )


@NO_RECORDINGS
@pytest.mark.parametrize("path", exchanges("chat", "response.json"), ids=named)
def test_every_recorded_whole_answer_says_what_it_holds(path: pathlib.Path) -> None:
    body = json.loads(path.read_bytes())
    if "choices" not in body:
        pytest.skip("an error: see below")
    view = whole(decoder(dialect_of(path)), body)
    assert view.outcome() == expected_of(
        [c.get("message", {}) for c in body["choices"]], [body], "openrouter" in named(path)
    )
    assert view.stops[-1].final and all(item["closed"] for item in view.items.values())


# --- quirks of streams, each by a table of its own

ONE = [("call_1", "f", '{"a":1}')]
TWO = [("call_1", "f", '{"a":1}'), ("call_2", "f", '{"a":2}')]
BRACES = json.dumps({"s": '}"{\\', "t": ["}", {}], "u": "{"})
CALL_QUIRKS: dict[str, tuple[list[Any], list[tuple[str, str, str]]]] = {
    "index at 1": ([call(1, "call_1", "f"), call(1, None, None, '{"a":1}'), CALLED], ONE),
    "index missing": ([call(None, "call_1", "f", '{"a"'), call(None, None, None, ":1}"), CALLED], ONE),
    "index missing, parallel by id": (
        [
            call(None, "call_1", "f", '{"a"'),
            call(None, "call_2", "f", '{"a"'),
            call(None, "call_1", None, ":1}"),
            call(None, "call_2", None, ":2}"),
            CALLED,
        ],
        TWO,
    ),
    "#33: all at index 0, new id": (
        [call(0, "call_1", "f", '{"a":1}'), call(0, "call_2", "f", '{"a":2}'), CALLED],
        TWO,
    ),
    "#33: all at index 0, streamed": (
        [
            call(0, "call_1", "f"),
            call(0, None, None, '{"a":1}'),
            call(0, "call_2", "f"),
            call(0, None, None, '{"a":2}'),
            CALLED,
        ],
        TWO,
    ),
    "#5: no ids at all": (
        [call(0, None, "f", '{"a":1}'), call(1, None, "f", '{"a":2}'), CALLED],
        [("call_new_0", "f", '{"a":1}'), ("call_new_1", "f", '{"a":2}')],
    ),
    "no ids, whole calls at index 0": (
        [call(0, None, "f", '{"a":1}'), call(0, None, "f", '{"a":2}'), CALLED],
        [("call_new_0", "f", '{"a":1}'), ("call_new_1", "f", '{"a":2}')],
    ),
    "the same id for every call": (
        [call(0, "call_1", "f", '{"a":1}'), call(1, "call_1", "f", '{"a":2}'), CALLED],
        [("call_1", "f", '{"a":1}'), ("call_1_1", "f", '{"a":2}')],
    ),
    "name repeated": ([call(0, "call_1", "f", '{"a"'), call(0, "call_1", "f", ":1}"), CALLED], ONE),
    "name and id repeated without an index": (
        [call(None, "call_1", "f", '{"a"'), call(None, "call_1", "f", ":1}"), CALLED],
        ONE,
    ),
    "#34: name late, arguments null": (
        [
            call(0, "call_1", None, None),
            call(0, None, None, '{"a"'),
            call(0, None, "f", None),
            call(0, None, None, ":1}"),
            CALLED,
        ],
        ONE,
    ),
    "an id that rotates": ([call(0, "call_1", "f", '{"a"'), call(0, "other", None, ":1}"), CALLED], ONE),
    "arguments an object": ([call(0, "call_1", "f", {"a": 1}), CALLED], [("call_1", "f", '{"a": 1}')]),
    "the whole call repeated at its end": (
        [
            call(0, "call_1", "f", '{"a":1}'),
            call(1, "call_2", "f", '{"a":2}'),
            call(0, "call_1", "f", '{"a":1}'),
            CALLED,
        ],
        TWO,
    ),
    "interleaved": (
        [
            call(0, "call_1", "f"),
            call(1, "call_2", "f"),
            call(0, None, None, '{"a"'),
            call(1, None, None, '{"a"'),
            call(0, None, None, ":1}"),
            call(1, None, None, ":2}"),
            CALLED,
        ],
        TWO,
    ),
    "two in one chunk": (
        [
            piece(
                "tool_calls",
                tool_calls=[
                    {"id": "call_1", "function": {"name": "f", "arguments": '{"a":1}'}},
                    {"id": "call_2", "function": {"name": "f", "arguments": '{"a":2}'}},
                ],
            )
        ],
        TWO,
    ),
    "an id that is a number": ([call(0, 7, "f", '{"a":1}'), CALLED], [("7", "f", '{"a":1}')]),  # type: ignore[arg-type]
    "finish_reason stop": ([call(0, "call_1", "f", '{"a":1}'), STOPPED], ONE),
    "finish_reason missing": ([call(0, "call_1", "f", '{"a":1}'), "[DONE]"], ONE),
    "finish_reason empty": ([call(0, "call_1", "f", '{"a":1}'), piece(""), "[DONE]"], ONE),
    "no arguments": ([call(0, "call_1", "f"), CALLED], [("call_1", "f", "")]),
    "no arguments, twice": (
        [call(0, "call_1", "f"), call(0, "call_2", "f"), CALLED],
        [("call_1", "f", ""), ("call_2", "f", "")],
    ),
    "a placeholder, and another call": (
        [call(0, "call_1", "f", "{}"), call(0, "call_2", "f", '{"a":2}'), CALLED],
        [("call_1", "f", "{}"), ("call_2", "f", '{"a":2}')],
    ),
    "a name with every letter, braces in strings": (
        [*(call(0, None, "f", letter) for letter in BRACES), call(0, None, "f", '{"a":2}'), CALLED],
        [("call_new_0", "f", BRACES), ("call_new_1", "f", '{"a":2}')],
    ),
    "a name and a new id with every letter": (
        [*(call(0, f"call_{n}", "f", letter) for n, letter in enumerate(BRACES, 1)), CALLED],
        [("call_1", "f", BRACES)],
    ),
    "pieces by index, then by id": (
        [call(0, "call_1", "f", '{"a"'), call(1, "call_2", "f", '{"a"'), call(None, "call_1", None, ":1}"),
         call(None, None, None, ":2}"), CALLED],
        TWO,
    ),
    "a call behind the finish": ([call(0, "call_1", "f"), CALLED, call(0, "call_2", "f", '{"a":2}'), "[DONE]"],
                                 [("call_1", "f", ""), ("call_2", "f", '{"a":2}')]),
}


@pytest.mark.parametrize("chunks, calls", CALL_QUIRKS.values(), ids=CALL_QUIRKS)
def test_calls_of_every_habit_come_out_whole(chunks: list[Any], calls: list[tuple[str, str, str]]) -> None:
    view = view_of(chunks)
    assert view.calls() == calls
    assert all(item["closed"] for item in view.items.values()) and view.end() == "completed"


def message(finish: str | None = None, /, delta: Any = None, **fields: Any) -> JSON:
    """A whole message in a chunk of a stream."""
    return {"choices": [{"index": 0, "delta": delta, "message": fields, "finish_reason": finish}]}


def told(call_id: str | None, arguments: str, name: str = "f") -> JSON:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


PIECES = [call(0, "call_1", "f"), call(0, None, None, '{"a"'), call(0, None, None, ":1}")]
NESTED = [("call_1", "f", '{"a":{"a":1}}')]
DEEP = [call(0, "call_1", "f"), call(0, None, None, '{"a":')]
# chunks, what was said, thought and called
SNAPSHOTS: dict[str, tuple[list[Any], str, str, list[tuple[str, str, str]]]] = {
    "text": ([piece(content="hel"), piece(content="lo"), message("stop", content="hello")], "hello", "", []),
    "text, beside an empty delta": (
        [piece(content="hel"), piece(content="lo"), message("stop", delta={}, content="hello")],
        "hello",
        "",
        [],
    ),
    "text, beside a filled delta": (
        [piece(content="hel"), message("stop", delta={"content": "lo"}, content="hello")],
        "hello",
        "",
        [],
    ),
    "text with more than its pieces": (
        [piece(content="hel"), message("stop", content="hello")],
        "hello",
        "",
        [],
    ),
    "text without its first blanks": (
        [piece(content="\n\nhel"), piece(content="lo"), message("stop", content="hello")],
        "\n\nhello",
        "",
        [],
    ),
    "text in parts": (
        [
            piece(content="hel"),
            message("stop", content=[{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]),
        ],
        "hello",
        "",
        [],
    ),
    "a thought": (
        [piece(reasoning="r"), piece(content="a"), message("stop", reasoning="r", content="a")],
        "a",
        "r",
        [],
    ),
    "a thought in tags": (
        [piece(content="<think>r</think>a"), message("stop", reasoning="r", content="a")],
        "a",
        "r",
        [],
    ),
    "a refusal": ([piece(refusal="n"), piece(refusal="o"), message("stop", refusal="no")], "", "", []),
    "all after a role": (
        [piece(role="assistant"), message("tool_calls", content="a", tool_calls=[told("call_1", '{"a":1}')])],
        "a",
        "",
        ONE,
    ),
    "messages in the place of deltas": ([message(content="ha"), message("stop", content="ha")], "haha", "", []),
    "text that repeats": ([piece(content="ha"), piece(content="ha"), STOPPED], "haha", "", []),
    "a call": ([*PIECES, message("tool_calls", tool_calls=[told("call_1", '{"a": 1}')])], "", "", ONE),
    "a call without its id": (
        [*PIECES, message("tool_calls", tool_calls=[told(None, '{"a":1}')])],
        "",
        "",
        ONE,
    ),
    "a call with the rest of it": (
        [*PIECES[:2], message("tool_calls", tool_calls=[told("call_1", '{"a":1}')])],
        "",
        "",
        ONE,
    ),
    "a call, and one that is new": (
        [*PIECES, message("tool_calls", tool_calls=[told("call_1", '{"a":1}'), told("call_2", '{"a":2}')])],
        "",
        "",
        TWO,
    ),
    "two whole calls without ids": (
        [
            call(0, None, "f", '{"a":1}'),
            call(1, None, "f", '{"a":1}'),
            message("tool_calls", tool_calls=[told(None, '{"a":1}')] * 2),
        ],
        "",
        "",
        [("call_new_0", "f", '{"a":1}'), ("call_new_1", "f", '{"a":1}')],
    ),
    "arguments, same id": ([*PIECES, call(0, "call_1", "f", '{"a":1}'), CALLED], "", "", ONE),
    "arguments, same id, other blanks": ([*PIECES, call(0, "call_1", "f", '{"a": 1}'), CALLED], "", "", ONE),
    "arguments, no id": ([*PIECES, call(0, None, "f", '{"a":1}'), CALLED], "", "", ONE),
    "arguments, no id or name": ([*PIECES, call(0, None, None, '{"a":1}'), CALLED], "", "", ONE),
    "arguments, an id at last": (
        [call(0, None, "f"), call(0, None, None, '{"a":1}'), call(0, "call_1", "f", '{"a":1}'), CALLED],
        "",
        "",
        [("call_new_0", "f", '{"a":1}')],
    ),
    "arguments, all the time": (
        [call(0, "call_1", "f", '{"a"'), *[call(0, None, None, '{"a":1}')] * 3, CALLED],
        "",
        "",
        ONE,
    ),
    "arguments, cumulative from the brace on": (
        [call(0, "call_1", "f", text) for text in ("", "{", '{"a"', '{"a":', '{"a":1', '{"a":1}')] + [CALLED],
        "",
        "",
        ONE,
    ),
    "a placeholder": (
        [call(0, "call_1", "f", "{}"), call(0, None, None, '{"a"'), call(0, None, None, ":1}"), CALLED],
        "",
        "",
        ONE,
    ),
    "placeholders of parallel calls": (
        [
            call(0, "call_1", "f", "{}"),
            call(1, "call_2", "f", "{ }"),
            call(0, None, None, '{"a":1}'),
            call(1, None, None, '{"a":2}'),
            CALLED,
        ],
        "",
        "",
        TWO,
    ),
    "no placeholder": ([call(0, "call_1", "f", "{}"), CALLED], "", "", [("call_1", "f", "{}")]),
    "no placeholders, no ids": (
        [call(0, None, "f", "{}"), call(0, None, "f", "{}"), CALLED],
        "",
        "",
        [("call_new_0", "f", "{}"), ("call_new_1", "f", "{}")],
    ),
    "an object in an object": ([*DEEP, call(0, None, None, '{"a":1}'), call(0, None, None, "}"), CALLED], "", "", NESTED),
    "an object in an object, at the end": ([*DEEP, call(0, None, None, '{"a":1}}'), CALLED], "", "", NESTED),
    "no object in an object": ([*DEEP, call(0, None, None, '{"a":1}'), CALLED], "", "", ONE),
    "two equal calls": (
        [call(0, "call_1", "f", '{"a":1}'), call(0, "call_2", "f", '{"a":1}'), CALLED],
        "",
        "",
        [("call_1", "f", '{"a":1}'), ("call_2", "f", '{"a":1}')],
    ),
    "two equal calls in pieces": (
        [*PIECES, call(0, "call_2", "f"), *PIECES[1:], CALLED],
        "",
        "",
        [("call_1", "f", '{"a":1}'), ("call_2", "f", '{"a":1}')],
    ),
    "two equal calls without ids": (
        [call(0, None, "f", '{"a":1}'), call(0, None, "f", '{"a":1}'), CALLED],
        "",
        "",
        [("call_new_0", "f", '{"a":1}'), ("call_new_1", "f", '{"a":1}')],
    ),
    "two equal calls without ids, in pieces": (
        [call(0, None, "f"), call(0, None, None, '{"a":1}')] * 2 + [CALLED],
        "",
        "",
        [("call_new_0", "f", '{"a":1}'), ("call_new_1", "f", '{"a":1}')],
    ),
    "a field and tags": (
        [
            piece(content="<think>The ", reasoning="The "),
            piece(content="user</think>\n\nHi", reasoning="user"),
            piece(content="!"),
            STOPPED,
        ],
        "Hi!",
        "The user",
        [],
    ),
    "tags, and a field that comes later": (
        [piece(content="<think>r"), piece(reasoning="r"), piece(content="</think>a"), STOPPED],
        "a",
        "r",
        [],
    ),
    "a tag, and a field in its place": (
        [piece(content="<think>\n"), piece(reasoning="r"), piece(content="</think>a"), STOPPED],
        "a",
        "\nr",
        [],
    ),
    "a field, then tags": ([piece(reasoning="r"), piece(content="<think>\nr\n</think>a"), STOPPED], "a", "r", []),
    "a field, then tags with another thought": (
        [piece(reasoning="r"), piece(content="<think>other</think>a"), STOPPED],
        "a",
        "rother",
        [],
    ),
    "a field, then a tag that never ends": (
        [piece(reasoning="r"), piece(content="<think> is "), piece(content="a tag"), STOPPED],
        "<think> is a tag",
        "r",
        [],
    ),
    "a tag after the thought": (
        [piece(content="<think>r</think>a <think>b</think>"), STOPPED],
        "a <think>b</think>",
        "r",
        [],
    ),
}


@pytest.mark.parametrize("chunks, text, thought, calls", SNAPSHOTS.values(), ids=SNAPSHOTS)
def test_a_snapshot_is_not_one_more_piece(
    chunks: list[Any], text: str, thought: str, calls: list[tuple[str, str, str]]
) -> None:
    strange = ["", "null", '{"choices":[]}', '{"choices":[{"delta":{},"message":null,"new":1}]}']
    for given in (chunks, [mixed for known in chunks for mixed in (*strange, known)]):
        view = view_of(given)
        assert (view.said(), view.said("summary"), view.calls(), view.end()) == (text, thought, calls, "completed")
        assert len([kind for kind in view.kinds() if kind == "reasoning"]) == bool(thought)
        assert all(item["closed"] for item in view.items.values())
    for count in range(len(chunks)):        # cut after any event nothing is done that is not what it was to be
        view = view_of([*chunks[:count], piece("length")])
        assert text.startswith(view.said()) and thought.startswith(view.said("summary"))
        for item, given in zip([i for i in view.items.values() if i["kind"] == "function_call"], calls):
            assert given[2].startswith(item["arguments"]) and (not item["closed"] or item["arguments"] == given[2])


THOUGHTS: dict[str, tuple[str, list[JSON], str, str]] = {      # content, what comes before it, text and thought
    "tags": ("\n<think>r <r</think>\n\n a </think>", [], "a </think>", "r <r"),
    "no tags": (" <thin>a", [], " <thin>a", ""),
    "a field with the same": ("<think>\nrr\n</think> a", [piece(reasoning="rrr")], "a", "rrr"),
    "a field with another": ("<think>\nrr\n</think> a", [piece(reasoning="s")], "a", "s\nrr\n"),
    "a field, and no end": ("<think> rr </thin", [piece(reasoning="s")], "<think> rr </thin", "s"),
    "no end": ("<think> rr </thin", [], "", " rr </thin"),
}


@pytest.mark.parametrize("content, before, text, thought", THOUGHTS.values(), ids=THOUGHTS)
def test_a_thought_in_tags_is_the_same_however_it_is_cut(content: str, before: list[JSON], text: str, thought: str) -> None:
    for first in range(len(content) + 1):
        for second in range(first, len(content) + 1):
            parts = (content[:first], content[first:second], content[second:])
            view = view_of([*before, *(piece(content=part) for part in parts), STOPPED])
            assert (view.said(), view.said("summary"), view.end()) == (text, thought, "completed")


def test_what_a_snapshot_repeats_beside_text_is_taken_once() -> None:
    cited = {"type": "url_citation", "url_citation": {"url": "https://a.example", "start_index": 0, "end_index": 1}}
    sealed = {"type": "reasoning.encrypted", "data": "x", "index": 0}
    again: JSON = {"reasoning_details": [sealed], "content": "a", "annotations": [cited, cited]}
    view = view_of([piece(reasoning_details=[sealed]), piece(content="a", annotations=[cited]), message("stop", **again)], "openrouter")
    assert view.items[0]["fields"] == {"sealed_replay": {"reasoning_details": [sealed]}}
    assert view.kinds() == ["reasoning", "message"] and len(view.items[1]["annotations"]) == 1
    view = view_of([piece(role="assistant"), message("stop", **again)], "openrouter")
    assert view.kinds() == ["reasoning", "message"] and len(view.items[1]["annotations"]) == 2


def test_whole_calls_of_one_answer_may_share_an_id() -> None:
    answer = {"choices": [{"message": {"tool_calls": [told("call_1", '{"a":1}'), told("call_1", '{"a":1}')]}, "finish_reason": "stop"}]}
    assert whole(decoder(), answer).calls() == [("call_1", "f", '{"a":1}'), ("call_1_1", "f", '{"a":1}')]


def answered(pieces: Iterable[bytes]) -> JSON:
    """The final response that the client sees of these bytes, every rule of its stream kept."""
    request = pomex.parse_request(b'{"model":"p/m","input":"hi","stream":true}')
    job = pomex.EncodeContext(
        pomex.ResponsesAnswer(request, "resp_1", 1, pomex.STANDARD), pomex.Envelope(b"s" * 32, "a"), "p", "m", False, ""
    )
    attempt, shown = pomex.WIRES["chat"].call(job).attempt, b""
    for data in pieces:
        attempt.feed(data)
        shown += attempt.take_output()
    attempt.end()
    attempt.finish()
    return check(shown + attempt.terminal(2))


@pytest.mark.parametrize("chunks, text, thought, calls", SNAPSHOTS.values(), ids=SNAPSHOTS)
def test_snapshots_are_the_same_to_the_client_however_they_come(
    chunks: list[Any], text: str, thought: str, calls: list[tuple[str, str, str]]
) -> None:
    frames = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    data = b"".join(frames)
    whole = answered([data])
    assert whole["status"] == "completed" and answered(data[i : i + 1] for i in range(len(data))) == whole
    assert [i["arguments"] for i in whole["output"] if i["type"] == "function_call"] == [c[2] for c in calls]
    for count in range(len(frames)):        # without its end nothing is called done
        cut = answered(frames[:count])
        assert cut["status"] == "failed"
        assert {i["arguments"] for i in cut["output"] if i["type"] == "function_call"} <= {c[2] for c in calls}


def test_what_contradicts_the_pieces_of_a_call_makes_no_call() -> None:
    for other in ('{"a":2}', "}", '{"b"'):
        view = view_of([*PIECES, call(0, "call_1", "f", other), CALLED])
        assert not view.items[0]["closed"]


def test_snapshots_are_read_in_linear_time() -> None:
    text = json.dumps({"input": "{}{\"a\":1}" * 20_000})
    began = time.process_time()
    chunks = [call(0, "c", "f"), *(call(0, None, None, text[at : at + 2]) for at in range(0, len(text), 2)), CALLED]
    assert view_of(chunks).calls() == [("c", "f", text)] and time.process_time() - began < 10


STREAM_QUIRKS: dict[str, tuple[list[Any], list[str], str, str]] = {
    "text after calls": (
        [call(0, "c", "f", "{}"), piece(content="done"), CALLED],
        ["function_call", "message"],
        "done",
        "completed",
    ),
    "text between the pieces of a call": (
        [call(0, "c", "f", "{"), piece(content="x"), call(0, None, None, "}"), CALLED],
        ["function_call", "message"],
        "x",
        "completed",
    ),
    "content null, role repeated": (
        [piece(role="assistant", content=None), piece(role="assistant", content="a"), STOPPED],
        ["message"],
        "a",
        "completed",
    ),
    "azure's first chunk": (
        [{"choices": [], "model": "", "prompt_filter_results": []}, piece(content="a"), STOPPED],
        ["message"],
        "a",
        "completed",
    ),
    "#32: reasoning": (
        [piece(reasoning="r"), piece(content="a"), STOPPED],
        ["reasoning", "message"],
        "a",
        "completed",
    ),
    "both reasoning fields": (
        [piece(reasoning="r", reasoning_content="r"), STOPPED],
        ["reasoning"],
        "",
        "completed",
    ),
    "reasoning between texts": (
        [piece(content="a"), piece(reasoning="r"), piece(content="b"), STOPPED],
        ["message", "reasoning", "message"],
        "ab",
        "completed",
    ),
    "think tags": (
        [
            piece(content="\n<thi"),
            piece(content="nk>r</th"),
            piece(content="ink>\n"),
            piece(content="\na"),
            STOPPED,
        ],
        ["reasoning", "message"],
        "a",
        "completed",
    ),
    "think tag never ended": (
        [piece(content="<think>r</thi"), piece("length")],
        ["reasoning"],
        "",
        "max_output_tokens",
    ),
    "a tag inside the text": ([piece(content="a <think>r"), STOPPED], ["message"], "a <think>r", "completed"),
    "a tag that is none": (
        [piece(content="<th"), piece(content="ead>"), STOPPED],
        ["message"],
        "<thead>",
        "completed",
    ),
    "half a tag at the end": ([piece(content="<th"), STOPPED], ["message"], "<th", "completed"),
    "a tag after a reasoning field": (
        [piece(reasoning="r"), piece(content="<think>"), STOPPED],
        ["reasoning"],
        "",
        "completed",
    ),
    "chunks after the finish": (
        [piece(content="a"), STOPPED, piece(content=""), STOPPED, "[DONE]"],
        ["message"],
        "a",
        "completed",
    ),
    "a reason that nobody knows": ([piece(content="a"), piece("eos_token")], ["message"], "a", "completed"),
    "length": ([piece(content="a"), piece("length")], ["message"], "a", "max_output_tokens"),
    "content filter": ([piece("content_filter")], [], "", "content_filter"),
    "#14: no end at all": ([piece(content="a")], ["message"], "a", "none"),
    "only [DONE]": (["[DONE]"], [], "", "failed"),
    "#41: an error in the stream": (
        [piece(content="a"), {"error": {"message": "m", "code": 502}}],
        ["message"],
        "a",
        "failed",
    ),
    "an error after the finish": ([piece(content="a"), STOPPED, {"error": "m"}], ["message"], "a", "failed"),
    "an error inside a choice": (
        [{"choices": [{"error": {"code": 502, "message": "m"}, "delta": {}}]}],
        [],
        "",
        "failed",
    ),
    "vLLM's old error": ([{"object": "error", "message": "m", "code": 400}], [], "", "failed"),
    "#24: malformed call": ([piece("function_call_filter: MALFORMED_FUNCTION_CALL")], [], "", "failed"),
    "#24: by native reason": (
        [
            {
                "choices": [
                    {"delta": {}, "finish_reason": "stop", "native_finish_reason": "MALFORMED_FUNCTION_CALL"}
                ]
            }
        ],
        [],
        "",
        "failed",
    ),
    "a call without a name": ([call(0, "c", None, "{}"), CALLED, "[DONE]"], [], "", "failed"),
    "deepseek out of resources": (
        [piece(content="a"), piece("insufficient_system_resource")],
        ["message"],
        "a",
        "failed",
    ),
}


@pytest.mark.parametrize("chunks, kinds, text, end", STREAM_QUIRKS.values(), ids=STREAM_QUIRKS)
def test_streams_of_every_habit_end_truly(chunks: list[Any], kinds: list[str], text: str, end: str) -> None:
    view = view_of(chunks)
    assert (view.kinds(), view.said(), view.end()) == (kinds, text, end)
    assert view.said("summary") in ("", "r", "r</thi")


def test_tags_are_text_where_the_dialect_has_none() -> None:
    assert view_of([piece(content="<think>a"), STOPPED], "openai").said() == "<think>a"


def test_a_call_cut_by_length_is_never_closed() -> None:
    for arguments in ("", '{"a"'):
        view = view_of([call(0, "c", "f", arguments), piece("length"), "[DONE]"])
        assert view.end() == "max_output_tokens" and not view.items[0]["closed"]


def test_a_whole_call_is_closed_as_soon_as_the_next_begins() -> None:
    reader = decoder()
    view = reader.sink
    for chunk in (call(0, "call_1", "f", '{"a":1}'), call(1, "call_2", "f", '{"a"')):
        reader.feed(json.dumps(chunk))
    assert [item["closed"] for item in view.items.values()] == [True, False]


def test_nothing_more_is_awaited_after_done_or_the_usage_after_the_finish() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
    assert [s.final for s in view_of([piece("length"), usage, "[DONE]"]).stops] == [False, True, True]
    assert [s.incomplete_reason for s in view_of([piece("length"), usage, "[DONE]"]).stops] == [
        "max_output_tokens"
    ] * 3


@pytest.mark.parametrize("data", ["{", "hello", '{"choices":', "[" * 100_000])
def test_what_is_not_json_is_the_upstreams_error(data: str) -> None:
    with pytest.raises(pomex.UpstreamError):
        list(decoder().feed(data))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"choices": []},
        {"choices": None},
        {"error": {"message": "m"}},
        {"detail": "m"},
        {"choices": [{"message": {"content": ""}}]},
    ],
    ids=json.dumps,
)
def test_a_whole_answer_without_an_answer_fails(body: JSON) -> None:
    assert whole(decoder(), body).end() == "failed"


STRANGE: list[Any] = [
    None,
    True,
    -1,
    2.5,
    "",
    "x",
    "{}",
    [],
    {},
    [1],
    [[]],
    [{}],
    {"a": 1},
    [{"type": "thinking", "thinking": 7}],
]


@pytest.mark.parametrize(
    "field",
    [
        "choices",
        "delta",
        "content",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "id",
        "index",
        "reasoning_details",
        "type",
        "text",
        "usage",
        "x_groq",
        "finish_reason",
        "error",
    ],
)
def test_a_field_of_any_shape_gives_deltas_or_the_upstreams_error(field: str) -> None:
    for value in STRANGE:
        function: JSON = {"name": "f", "arguments": "{}"}
        given: JSON = {"index": 0, "id": "c", "function": function}
        detail: JSON = {"type": "reasoning.text", "index": 0, "text": "t"}
        delta: JSON = {"content": "a", "tool_calls": [given], "reasoning_details": [detail]}
        choice: JSON = {"delta": delta, "finish_reason": "stop"}
        chunk: JSON = {"choices": [choice], "usage": {}, "x_groq": {"usage": {}}}
        for holder in (function, given, detail, delta, choice, chunk):
            if field in holder or (holder is chunk and field == "error"):
                holder[field] = value
        assert view_of([chunk, "[DONE]"], "openrouter").end() in ("completed", "failed")


def test_45_a_whole_answer_keeps_its_calls() -> None:
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": n})}}
        for n in (1, 2)
    ]
    answer = {"choices": [{"message": {"content": "t", "tool_calls": calls}, "finish_reason": "tool_calls"}]}
    view = whole(decoder(), answer)
    assert [i[2] for i in view.calls()] == ['{"a": 1}', '{"a": 2}'] and view.said() == "t"


TOOLS: list[JSON] = [
    {
        "type": "function",
        "name": "plain",
        "parameters": {"type": "object", "properties": {}},
        "strict": False,
    },
    {
        "type": "custom",
        "name": "apply_patch",
        "description": "d",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"},
    },
    {
        "type": "namespace",
        "name": "mcp__demo",
        "tools": [{"type": "function", "name": "add", "parameters": {"type": "object"}}],
    },
    {"type": "web_search"},
]


def test_3_4_namespaces_and_custom_tools_come_back_as_they_were_asked() -> None:
    view = view_of(
        [call(0, "a", "mcp__demo__add", "{}"), call(1, "b", "apply_patch", '{"input":"x"}'), CALLED],
        tools=TOOLS,
    )
    seen = [(i["kind"], i["name"], i["namespace"]) for i in view.items.values()]
    assert seen == [("function_call", "add", "mcp__demo"), ("custom_tool_call", "apply_patch", "")]


DOTTED: list[JSON] = [
    *TOOLS,
    {"type": "function", "name": "functions.dotted", "parameters": {}},
    {"type": "namespace", "name": "one", "tools": [{"type": "function", "name": "both", "parameters": {}}]},
    {"type": "namespace", "name": "two", "tools": [{"type": "function", "name": "both", "parameters": {}}]},
    {"type": "function", "name": "functions.plain", "parameters": {}},
]
LEAKED = {
    "plain<|channel|>commentary": ("", "plain"),
    "plain <|constrain|>json": ("", "plain"),
    "default_api:plain": ("", "plain"),
    "default_api.plain": ("", "plain"),
    "default_api:plain:0": ("", "plain"),
    "functions.apply_patch": ("", "apply_patch"),
    "functions.apply_patch:1<|channel|>": ("", "apply_patch"),
    "functions.mcp__demo__add": ("mcp__demo", "add"),
    "functions.add": ("mcp__demo", "add"),
    "functions.plain": ("", "functions.plain"),
    "functions.dotted": ("", "functions.dotted"),
    "functions.dotted<|channel|>": ("", "functions.dotted<|channel|>"),
    "functions.both": ("", "functions.both"),
    "functions.none": ("", "functions.none"),
    "other.plain": ("", "other.plain"),
    "none<|channel|>commentary": ("", "none<|channel|>commentary"),
}


@pytest.mark.parametrize("name", LEAKED)
def test_what_a_template_leaves_in_a_tools_name_is_not_its_name(name: str) -> None:
    said = [call(0, "a", name, "{}"), CALLED]
    book = pomex.ToolMap(DOTTED)
    event = {"type": "response.output_item.added", "output_index": 0, "item": {"type": "function_call", "call_id": "a", "name": name}}
    candidate = {"content": {"parts": [{"functionCall": {"name": name, "args": {}}}]}, "finishReason": "STOP"}
    block = {"type": "tool_use", "id": "a", "name": name, "input": {}}
    readers = [
        (pomex.ChatDecoder(book, pomex.DIALECTS["generic"]), "feed", json.dumps(said[0])),
        (pomex.ResponsesDecoder(book), "feed", json.dumps(event)),
        (pomex.GeminiDecoder(book), "whole", {"candidates": [candidate]}),
        (pomex.MessagesDecoder(pomex.ToolMap(DOTTED, True, "claude")), "whole", {"type": "message", "content": [block]}),
    ]
    found = []
    for reader, method, given in readers:
        reader.sink = View()
        getattr(reader, method)(given)
        found += [(item["namespace"], item["name"]) for item in reader.sink.items.values()]
    assert found == [LEAKED[name]] * 4


def test_a_misspelt_name_of_the_history_goes_back_as_its_tools() -> None:
    book = pomex.ToolMap(DOTTED)
    for name, meant in LEAKED.items():
        item = {"type": "function_call", "call_id": "a", "name": name, "arguments": "{}"}
        namespace, own = meant
        sent = [made["name"] for made in (pomex.normalize_item(each, book, []) for each in (item, {**item, "namespace": "other"})) if made]
        assert sent == [pomex.upstream_tool_name(own, namespace), pomex.upstream_tool_name(name, "other")]


USAGES: dict[str, tuple[JSON, pomex.Usage]] = {
    "openai": (
        {
            "prompt_tokens": 9,
            "completion_tokens": 5,
            "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 3},
        },
        pomex.Usage(9, 4, 0, 5, 3),
    ),
    "xai leaves reasoning out": (
        {
            "prompt_tokens": 390,
            "completion_tokens": 26,
            "total_tokens": 493,
            "completion_tokens_details": {"reasoning_tokens": 77},
        },
        pomex.Usage(390, 0, 0, 103, 77),
    ),
    "vercel leaves gemini's reasoning out of the total too": (
        {
            "prompt_tokens": 57,
            "completion_tokens": 10,
            "total_tokens": 67,
            "completion_tokens_details": {"reasoning_tokens": 37},
        },
        pomex.Usage(57, 0, 0, 47, 37),
    ),
    "deepseek": (
        {"prompt_tokens": 9, "completion_tokens": 5, "prompt_cache_hit_tokens": 4},
        pomex.Usage(9, 4, 0, 5),
    ),
    "moonshot": ({"prompt_tokens": 9, "completion_tokens": 5, "cached_tokens": 4}, pomex.Usage(9, 4, 0, 5)),
    "openrouter": (
        {
            "prompt_tokens": 9,
            "completion_tokens": 5,
            "cost": 0.1,
            "prompt_tokens_details": {"cache_write_tokens": 2},
        },
        pomex.Usage(9, 0, 2, 5),
    ),
    "cached is not within, so it is not cut in silence": (
        {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 50}},
        pomex.Usage(9, 50, 0, 5),
    ),
    "nulls": ({"prompt_tokens": 9, "completion_tokens": None, "prompt_tokens_details": None}, pomex.Usage(9)),
    "floats": ({"prompt_tokens": 9.0, "completion_tokens": 5.0}, pomex.Usage(9, 0, 0, 5)),
    "the words of responses": (
        {
            "input_tokens": 9,
            "output_tokens": 5,
            "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2},
            "output_tokens_details": {"reasoning_tokens": 3},
        },
        pomex.Usage(9, 4, 2, 5, 3),
    ),
    "nothing": ({"prompt_tokens": 0, "completion_tokens": 0}, pomex.Usage()),
}


@pytest.mark.parametrize("given, usage", USAGES.values(), ids=USAGES)
def test_usage_is_counted_one_way(given: JSON, usage: pomex.Usage) -> None:
    assert pomex.checked_usage(usage).estimated == (usage.cached > usage.input)
    assert view_of([{"choices": [], "usage": given}]).usage == usage
    assert view_of([{"choices": [], "x_groq": {"usage": given}}]).usage == usage
    assert view_of([{"choices": [{"delta": {}, "usage": given}]}]).usage == usage      # Moonshot


@pytest.mark.parametrize(
    "given", [None, {}, [], "x", {"tokens": 7}, {"prompt_tokens": True}, {"prompt_tokens": "7"}]
)
def test_no_usage_is_no_usage(given: Any) -> None:
    assert view_of([{"choices": [], "usage": given}]).usage is None


FIRST = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2}}
LATER: dict[str, tuple[JSON, pomex.Usage]] = {
    "details left out": ({"prompt_tokens": 9, "completion_tokens": 5}, pomex.Usage(9, 4, 2, 5)),
    "details null": (
        {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": None},
        pomex.Usage(9, 4, 2, 5),
    ),
    "one of the details": (
        {"completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3, "cache_write_tokens": None}},
        pomex.Usage(9, 3, 2, 5),
    ),
    "details alone": ({"completion_tokens_details": {"reasoning_tokens": 1}}, pomex.Usage(9, 4, 2, 1, 1)),
    "another count": (
        {"prompt_tokens": 8, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 0}},
        pomex.Usage(8, 0, 2, 5),
    ),
    "nothing": ({}, pomex.Usage(9, 4, 2, 1)),
}


@pytest.mark.parametrize("later, usage", LATER.values(), ids=LATER)
def test_a_count_that_a_later_usage_leaves_out_stays(later: JSON, usage: pomex.Usage) -> None:
    chunks = [{"choices": [], "usage": FIRST}, piece(content="a"), STOPPED, {"choices": [], "usage": later}]
    assert view_of(chunks).usage == usage


# --- reasoning, there and back


def details(**fields: Any) -> JSON:
    return piece(
        reasoning_details=[{"type": "reasoning.text", "index": 0, **fields}], reasoning=fields.get("text")
    )


SEALED = {"type": "reasoning.encrypted", "index": 0, "format": "google-gemini-v1"}
REPLAYS: dict[str, tuple[str, list[JSON], JSON]] = {
    "#31: deepseek": (
        "deepseek",
        [piece(reasoning_content="a"), piece(reasoning_content="b")],
        {"reasoning_content": "ab"},
    ),
    "openrouter, signed": (
        "openrouter",
        [details(text="a", id=None), details(text="b", id=None), details(signature="s")],
        {
            "reasoning_details": [
                {"type": "reasoning.text", "index": 0, "text": "ab", "id": None, "signature": "s"}
            ]
        },
    ),
    "openrouter, sealed": (
        "openrouter",
        [
            piece(reasoning_details=[{**SEALED, "id": "1", "data": "x"}]),
            piece(reasoning_details=[{**SEALED, "id": "2", "data": "y"}]),
        ],
        {"reasoning_details": [{**SEALED, "id": "1", "data": "x"}, {**SEALED, "id": "2", "data": "y"}]},
    ),
    "mistral": (
        "mistral",
        [piece(content=[{"type": "thinking", "thinking": [{"type": "text", "text": t}]}]) for t in "ab"],
        {"thinking": [{"type": "thinking", "thinking": [{"type": "text", "text": "ab"}]}]},
    ),
}


@pytest.mark.parametrize("dialect, chunks, replay", REPLAYS.values(), ids=REPLAYS)
def test_15_reasoning_comes_back_on_the_message_it_belongs_to(
    dialect: str, chunks: list[JSON], replay: JSON
) -> None:
    view = view_of([*chunks, call(0, "c", "f", "{}"), CALLED], dialect)
    assert view.items[0]["fields"] == {"sealed_replay": replay} and view.kinds() == [
        "reasoning",
        "function_call",
    ]
    message = encoded(
        [
            user("q"),
            {"type": "reasoning", "summary": [], "sealed_replay": replay},
            function_call("c"),
            output("c"),
        ],
        dialect,
    )["messages"][1]
    assert message["tool_calls"][0]["id"] == "c" or dialect == "mistral"
    assert (
        (message["content"] == replay["thinking"])
        if dialect == "mistral"
        else (message.items() >= replay.items())
    )


def test_reasoning_is_not_sent_back_where_nobody_wants_it() -> None:
    assert view_of([piece(reasoning="a"), STOPPED]).items[0]["fields"] == {}
    bare = encoded(
        [
            user("q"),
            {"type": "reasoning", "summary": [], "sealed_replay": {"reasoning_content": "a"}},
            says("b"),
            user("c"),
        ]
    )
    assert bare["messages"][1] == {"role": "assistant", "content": "b"}


def test_31_deepseek_gets_the_field_on_every_message_with_calls() -> None:
    body = encoded([user("q"), function_call("c"), output("c"), says("t"), user("r")], "deepseek")
    assert [m.get("reasoning_content") for m in body["messages"]] == [None, "", None, None, None]


def test_what_another_wire_kept_of_its_thoughts_is_no_trouble_here() -> None:
    history = [user("q"), {"type": "reasoning", "sealed_replay": {"signature": "s", "characters": 5, "blocks": [{"type": "thinking"}]}}]
    assert [message["role"] for message in encoded([*history, function_call("c"), output("c")])["messages"]][1:] == ["assistant", "tool"]


def test_48_a_signature_of_gemini_behind_its_openai_endpoint_comes_back_on_its_call() -> None:
    extra = {"google": {"thought_signature": "s"}}
    given = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}, "extra_content": extra}
    view = view_of([piece(tool_calls=[given]), CALLED])
    replay = view.items[0]["fields"]["sealed_replay"]
    assert view.items[0]["kind"] == "reasoning"
    message = encoded(
        [user("q"), {"type": "reasoning", "sealed_replay": replay}, function_call("c"), output("c")]
    )["messages"][1]
    assert message["tool_calls"][0]["extra_content"] == extra


# --- the request


def user(text: str, role: str = "user") -> JSON:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


def says(text: str) -> JSON:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def function_call(call_id: str, arguments: str = "{}") -> JSON:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": arguments}


def output(call_id: str, value: Any = "ok") -> JSON:
    return {"type": "function_call_output", "call_id": call_id, "output": value}


def encode(body: JSON, dialect: str = "generic", model: str = "m") -> tuple[JSON, list[str]]:
    envelope = pomex.Envelope(b"s", "a")
    sealed = [
        {**item, "encrypted_content": envelope.seal("p", model, item["sealed_replay"])} if "sealed_replay" in item else item
        for item in body["input"]
        if isinstance(item, dict)
    ]
    request = pomex.parse_request(json.dumps({**body, "input": sealed or body["input"]}).encode())
    answer = pomex.ResponsesAnswer(request, "resp_" + "0" * 32, 0, pomex.STANDARD)
    call = pomex.WIRES["chat"].call(pomex.EncodeContext(answer, envelope, "p", model, False, dialect))
    return json.loads(call.body), call.dropped


def encoded(items: list[JSON], dialect: str = "generic", model: str = "m", **fields: Any) -> JSON:
    return encode({"model": "x/m", "input": items, **fields}, dialect, model)[0]


def recorded_requests() -> Iterator[pathlib.Path]:
    yield from sorted((SHARED / "codex-requests").glob("*/[0-9]*.json"))
    yield from exchanges("responses", "request.json")


def check_messages(messages: list[JSON], dialect: pomex.Dialect) -> None:
    """What the strictest servers ask of a conversation."""
    waiting: list[str] = []
    seen: set[str] = set()
    for index, message in enumerate(messages):
        role = message["role"]
        assert isinstance(message["content"], (str, list))
        assert role in ("user", "assistant", "tool") or (
            role == "system" and (index == 0 or dialect.system_anywhere)
        )
        if role == "tool":
            assert waiting and message["tool_call_id"] == waiting.pop(0)
            continue
        assert not waiting, "a call without its result directly after it"
        if role == "user":
            assert message["content"] and (index == 0 or messages[index - 1]["role"] != "user")
        if role == "assistant":
            assert message["content"] or message["tool_calls"]
            for given in message.get("tool_calls", []):
                assert isinstance(json.loads(given["function"]["arguments"]), dict)
                assert given["id"] not in seen and given["id"]
                seen.add(given["id"])
                waiting.append(given["id"])
    assert not waiting and messages[-1]["role"] in ("user", "tool", "system")


@NO_RECORDINGS
@pytest.mark.parametrize("path", list(recorded_requests()), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recorded_request_can_be_sent_to_every_dialect(path: pathlib.Path) -> None:
    recorded = json.loads(path.read_bytes())
    body = recorded.get("body", recorded) if isinstance(recorded, dict) else {}
    if not body.get("input"):
        pytest.skip("no input in it")
    try:
        pomex.parse_request(json.dumps(body).encode())
    except pomex.BadRequest as error:
        pytest.skip(f"refused at the door: {error}")
    for name, dialect in pomex.DIALECTS.items():
        once, dropped = encode(body, name)
        again, _ = encode(body, name)
        assert json.dumps(once) == json.dumps(again)
        check_messages(once["messages"], dialect)
        for tool in once.get("tools", []):
            assert tool["type"] == "function" and len(tool["function"]["name"]) <= 64
            assert isinstance(tool["function"]["parameters"], dict)
        if not once.get("tools"):
            assert "tool_choice" not in once and "parallel_tool_calls" not in once
        assert "web_search" not in json.dumps(once.get("tools", "")) or "tools:web_search" not in dropped


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "high"}
IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "high"}}


def shape(messages: list[JSON]) -> list[str]:
    """Messages as short lines: role, and the calls or the text."""
    lines = []
    for message in messages:
        ids = ",".join(given["id"] for given in message.get("tool_calls", []))
        content = (
            message["content"]
            if isinstance(message["content"], str)
            else [p["type"] for p in message["content"]]
        )
        lines.append(
            " ".join(
                str(part) for part in (message["role"], message.get("tool_call_id"), content, ids) if part
            )
        )
    return lines


HISTORIES: dict[str, tuple[list[JSON], list[str]]] = {
    "leading texts are one system message": (
        [user("a", "developer"), user("b", "system"), user("q")],
        ["system i\n\na\n\nb", "user q"],
    ),
    "a later developer text stays in its place": (
        [user("q"), says("t"), user("d", "developer"), user("r")],
        ["system i", "user q", "assistant t", "user <developer_message>\nd\n</developer_message>\n\nr"],
    ),
    "#2: additional_tools is no message": (
        [{"type": "additional_tools", "role": "developer", "tools": []}, user("q")],
        ["system i", "user q"],
    ),
    "parallel calls are one message": (
        [user("q"), function_call("a"), function_call("b"), output("a", "1"), output("b", "2"), user("r")],
        ["system i", "user q", "assistant a,b", "tool a 1", "tool b 2", "user r"],
    ),
    "calls one after another are not": (
        [user("q"), function_call("a"), output("a", "1"), function_call("b"), output("b", "2")],
        ["system i", "user q", "assistant a", "tool a 1", "assistant b", "tool b 2"],
    ),
    "outputs in the order of the calls": (
        [user("q"), function_call("a"), function_call("b"), output("b", "2"), output("a", "1")],
        ["system i", "user q", "assistant a,b", "tool a 1", "tool b 2"],
    ),
    "#29: text between a call and its output": (
        [user("q"), function_call("a"), says("t"), output("a", "1")],
        ["system i", "user q", "assistant t a", "tool a 1"],
    ),
    "text before calls is of their message": (
        [user("q"), says("t"), function_call("a"), output("a", "1")],
        ["system i", "user q", "assistant t a", "tool a 1"],
    ),
    "#28: a call without its output": (
        [user("q"), function_call("a"), user("r")],
        ["system i", "user q", "assistant a", "tool a no output was recorded for this call", "user r"],
    ),
    "#27: an output without its call": (
        [user("q"), output("z", "1"), output("", "2"), user("r")],
        ["system i", "user q\n\n[tool output] 1\n\n[tool output] 2\n\nr"],
    ),
    "repeated call ids": (
        [user("q"), function_call("a"), output("a", "1"), function_call("a"), output("a", "2")],
        ["system i", "user q", "assistant a", "tool a 1", "assistant a_2", "tool a_2 2"],
    ),
    "#30: an assistant at the end is nudged": (
        [user("q"), says("t")],
        ["system i", "user q", "assistant t", "user Continue."],
    ),
    "#37: images of outputs follow them all": (
        [
            user("q"),
            function_call("a"),
            function_call("b"),
            output("a", [IMAGE]),
            output("b", "2"),
            user("r"),
        ],
        [
            "system i",
            "user q",
            "assistant a,b",
            "tool a The images follow.",
            "tool b 2",
            "user ['text', 'image_url', 'text']",
        ],
    ),
    "output of several texts": (
        [user("q"), function_call("a"), output("a", [{"type": "input_text", "text": t} for t in "xy"])],
        ["system i", "user q", "assistant a", "tool a x\ny"],
    ),
    "an empty message is none": ([user("q"), says(""), user("r")], ["system i", "user q\n\nr"]),
}


@pytest.mark.parametrize("items, lines", HISTORIES.values(), ids=HISTORIES)
def test_histories_are_mended(items: list[JSON], lines: list[str]) -> None:
    messages = encoded(items, instructions="i")["messages"]
    assert shape(messages) == lines
    check_messages(messages, pomex.DIALECTS["generic"])


def test_only_some_dialects_take_images_in_tool_results_and_system_messages_anywhere() -> None:
    items = [
        user("q"),
        function_call("abcdefgh1"),
        output("abcdefgh1", [{"type": "input_text", "text": "t"}, IMAGE]),
    ]
    assert encoded(items, "mistral")["messages"][2]["content"] == [{"type": "text", "text": "t"}, IMAGE_PART]
    assert shape(encoded([user("q"), user("d", "developer")], "openai")["messages"])[1] == "system d"


CALL_HISTORIES: dict[str, tuple[JSON, str, JSON]] = {
    "invalid arguments": (function_call("c", "{not json"), "f", {"_raw": "{not json"}),
    "arguments that are no object": (function_call("c", "[1]"), "f", {"_raw": "[1]"}),
    "empty arguments": (function_call("c", ""), "f", {}),
    "custom": (
        {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": '*** "x"\n'},
        "apply_patch",
        {"input": '*** "x"\n'},
    ),
    "namespace": ({**function_call("c"), "namespace": "mcp__demo"}, "mcp__demo__f", {}),
    "tool_search": (
        {"type": "tool_search_call", "call_id": "c", "execution": "client", "arguments": {"query": "x"}},
        "tool_search",
        {"query": "x"},
    ),
    "local_shell": (
        {
            "type": "local_shell_call",
            "call_id": "c",
            "action": {"type": "exec", "command": ["ls"], "env": {}, "user": None},
        },
        "local_shell",
        {"command": ["ls"]},
    ),
    "shell": (
        {"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"]}},
        "shell",
        {"commands": ["ls"]},
    ),
    "apply_patch": (
        {"type": "apply_patch_call", "call_id": "c", "operation": {"type": "delete_file", "path": "x"}},
        "apply_patch",
        {"type": "delete_file", "path": "x"},
    ),
}


@pytest.mark.parametrize("item, name, arguments", CALL_HISTORIES.values(), ids=CALL_HISTORIES)
def test_calls_of_every_kind_become_functions(item: JSON, name: str, arguments: JSON) -> None:
    message = encoded([user("q"), item, output("c")])["messages"][1]
    function = message["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == (name, arguments)


def test_call_ids_fit_the_server() -> None:
    long = "call_" + "x" * 60
    for dialect, fits in (("generic", 40), ("mistral", 9)):
        messages = encoded([user("q"), function_call(long), output(long)], dialect)["messages"]
        assert len(messages[1]["tool_calls"][0]["id"]) <= fits
        check_messages(messages, pomex.DIALECTS[dialect])


def test_36_what_cannot_be_carried_is_named() -> None:
    parts = [
        {"type": "input_text", "text": "q"},
        {"type": "input_file", "file_id": "file_1"},
        {"type": "input_audio", "audio_url": "x"},
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="},
        {"type": "input_image", "file_id": "f"},
    ]
    items = [
        {"type": "message", "role": "user", "content": parts},
        {"type": "web_search_call", "id": "w", "status": "completed"},
        {"type": "computer_call", "call_id": "k"},
        {"type": "computer_call_output", "call_id": "k", "output": {}},
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"},
        {"type": "what_is_new"},
    ]
    body, dropped = encode(
        {
            "model": "m",
            "input": items,
            "tools": TOOLS,
            "reasoning": {"effort": "low"},
            "text": {"verbosity": "low"},
            "service_tier": "flex",
            "top_logprobs": 3,
        }
    )
    assert shape(body["messages"]) == ["user q"]
    assert dropped == [
        "tools:web_search",
        "input:web_search_call",
        "input:computer_call",
        "input:computer_call_output",
        "input:reasoning",
        "input:what_is_new",
        "reasoning.effort",
        "content:input_file",
        "content:input_audio",
        "content:input_image",
        "text.verbosity",
        "service_tier",
        "top_logprobs",
    ]


def test_files_go_as_text_or_as_files() -> None:
    text = {"type": "input_file", "filename": "a.py", "file_data": "data:text/x-python;base64,eD0x"}
    pdf = {"type": "input_file", "filename": "a.pdf", "file_data": "AA=="}
    items = [{"type": "message", "role": "user", "content": [text, pdf]}]
    parts = encoded(items, "openrouter")["messages"][0]["content"]
    assert parts[0]["text"] == '<file name="a.py">\nx=1\n</file>'
    assert parts[1] == {
        "type": "file",
        "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="},
    }


def data_url(mime: str, data: str, kind: str = "input_image") -> JSON:
    where = {"image_url": f"data:{mime};base64,{data}"} if kind == "input_image" else {"filename": "a.bin", "file_data": f"data:{mime};base64,{data}"}
    return {"type": kind, **where}


SHOWN: list[tuple[JSON, str, JSON | None]] = [
    (data_url("image/jpeg", "iVBORw0KGgo="), "generic", {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}),
    ({"type": "input_image", "image_url": "iVBORw0KGgo="}, "generic", {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}),
    (data_url("", "_9j_\n4AA"), "generic", {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/4AA="}}),
    (data_url("image/png", "cut off..."), "generic", None),
    (data_url("image/svg+xml", "PHN2Zz4="), "generic", None),
    ({"type": "input_image", "image_url": "https://x/y"}, "generic", {"type": "image_url", "image_url": {"url": "https://x/y"}}),
    (data_url("text/plain", "UEsDBBQABgA=", "input_file"), "generic", None),
    (data_url("application/octet-stream", "R0lGODlhAQ==", "input_file"), "generic", {"type": "image_url", "image_url": {"url": "data:image/gif;base64,R0lGODlhAQ=="}}),
    (data_url("image/png", "JVBERi0xLjQ="), "openai", {"type": "file", "file": {"filename": "file", "file_data": "data:application/pdf;base64,JVBERi0xLjQ="}}),
    ({"type": "input_file", "filename": "a.docx", "file_data": "UEsDBBQABgA="}, "openai", None),
    ({"type": "input_file", "filename": "a.svg", "file_data": "PHN2Zz4="}, "openai", {"type": "text", "text": '<file name="a.svg">\n<svg>\n</file>'}),
]


@pytest.mark.parametrize(("part", "dialect", "sent"), SHOWN)
def test_images_and_files_go_as_what_their_bytes_are_or_are_named(part: JSON, dialect: str, sent: JSON | None) -> None:
    text = {"type": "input_text", "text": "q"}
    body, dropped = encode({"model": "x/m", "input": [{"type": "message", "role": "user", "content": [text, part]}]}, dialect)
    content = body["messages"][0]["content"]
    texts = "q\n\n" + str((sent or {}).get("text")) if sent and sent["type"] == "text" else "q"
    assert content == (texts if sent is None or sent["type"] == "text" else [{"type": "text", "text": "q"}, sent])
    assert (f"content:{part['type']}" in dropped) == (sent is None)


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


@pytest.mark.parametrize("chunks", [
    [piece(content="Here"), piece(images=[PICTURE]), piece(content="!"), piece("stop")],
    [{"choices": [{"message": {"content": "Here!", "images": [PICTURE]}, "finish_reason": "stop"}]}],
    [piece(content="Here"), piece(images=[PICTURE]), piece(images=[PICTURE]), piece("stop", content="!")],
])
def test_images_of_openrouter_are_items_once(chunks: list[JSON]) -> None:
    view = view_of(chunks, "openrouter")
    assert [item["fields"] for item in view.items.values() if item["kind"] == "image_generation_call"] == [{"result": "iVBORw0KGgo="}]
    assert view.said() == "Here!" and view.end() == "completed"


def test_an_image_at_an_address_is_told_as_text() -> None:
    view = view_of([piece("stop", images=[{"image_url": {"url": "https://a.example/x.png"}}, {"image_url": 5}, 7])])
    assert view.said() == "https://a.example/x.png"


def test_parameters_fit_the_vendor_behind_a_router() -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"$top": {"type": "integer"}}}}
    body = {"model": "x/m", "input": [user("q"), function_call("a", '{"$top":5}'), output("a")], "tools": [tool]}
    for model, name in (("anthropic/claude-opus-5", "_top"), ("google/gemini-3-pro", "_top"), ("openai/gpt-6", "$top")):
        answer = pomex.ResponsesAnswer(pomex.parse_request(json.dumps(body).encode()), "resp_0123456789abcdef", 0, pomex.STANDARD)
        made = json.loads(pomex.WIRES["chat"].call(pomex.EncodeContext(answer, pomex.Envelope(b"s", "a"), "p", model, False, "openrouter")).body)
        assert list(made["tools"][0]["function"]["parameters"]["properties"]) == [name]
        assert json.loads(made["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {name: 5}


def test_1_3_tools_of_every_kind_are_offered_as_functions() -> None:
    body, dropped = encode(
        {
            "model": "m",
            "input": [{"type": "additional_tools", "role": "developer", "tools": TOOLS}, user("q")],
        }
    )
    assert [t["function"]["name"] for t in body["tools"]] == ["plain", "apply_patch", "mcp__demo__add"]
    assert dropped == ["tools:web_search"] and "strict" not in body["tools"][0]["function"]
    assert "start: X" in body["tools"][1]["function"]["description"]
    assert encoded([user("q")], "openai", tools=TOOLS)["tools"][0]["function"]["strict"] is False


FORCED = {"type": "function", "function": {"name": "plain"}}
CHOICES: dict[str, tuple[str, Any, Any]] = {
    "auto is left out": ("generic", "auto", None),
    "none": ("generic", "none", "none"),
    "required": ("generic", "required", "required"),
    "function": ("generic", {"type": "function", "name": "plain"}, FORCED),
    "custom": (
        "generic",
        {"type": "custom", "name": "apply_patch"},
        {"type": "function", "function": {"name": "apply_patch"}},
    ),
    "in a namespace": (
        "generic",
        {"type": "function", "name": "add"},
        {"type": "function", "function": {"name": "mcp__demo__add"}},
    ),
    "allowed tools": (
        "generic",
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "plain"}, {"type": "function", "name": "add"}],
        },
        "required",
    ),
    "one allowed tool": (
        "generic",
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "plain"}]},
        FORCED,
    ),
    "allowed tools, auto": (
        "generic",
        {"type": "allowed_tools", "tools": [{"type": "function", "name": "plain"}]},
        None,
    ),
    "a hosted tool": ("generic", {"type": "web_search"}, None),
    "deepseek refuses force": ("deepseek", "required", None),
}


@pytest.mark.parametrize("dialect, choice, sent", CHOICES.values(), ids=CHOICES)
def test_tool_choice(dialect: str, choice: Any, sent: Any) -> None:
    body, dropped = encode(
        {"model": "m", "input": "q", "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": True},
        dialect,
    )
    assert body.get("tool_choice") == sent and body["parallel_tool_calls"] is True
    assert ("tool_choice" in dropped) == (choice == {"type": "web_search"} or dialect == "deepseek")


PRESERVED = {"type": "enabled", "clear_thinking": False}
EFFORT_KEYS = ("reasoning_effort", "thinking", "reasoning", "chat_template_kwargs", "enable_thinking", "thinking_budget")
EFFORT_ROWS = [
    ("openai", "gpt-5.6", "max", {"reasoning_effort": "max"}),
    ("openai", "gpt-4o", "high", {}),
    ("openai", "o3", "xhigh", {"reasoning_effort": "high"}),
    ("deepseek", "v4", "xhigh", {"thinking": {"type": "enabled"}, "reasoning_effort": "high"}),
    ("deepseek", "v4", "none", {"thinking": {"type": "disabled"}}),
    ("groq", "openai/gpt-oss-120b", "minimal", {"reasoning_effort": "low"}),
    ("groq", "qwen/qwen3-32b", "low", {"reasoning_effort": "default"}),
    ("groq", "llama-3.3", "low", {}),
    ("openrouter", "x", "max", {"reasoning": {"effort": "xhigh"}}),
    ("mistral", "mistral-small-latest", "low", {"reasoning_effort": "high"}),
    ("mistral", "magistral-medium", "low", {}),
    ("moonshot", "kimi-k2.5", "none", {"thinking": {"type": "disabled"}}),
    ("moonshot", "kimi-k3", "medium", {"reasoning_effort": "high"}),
    ("zai", "glm-4.7", "low", {"thinking": {"type": "enabled"}}),
    ("vllm", "Qwen3-8B", "none", {"chat_template_kwargs": {"enable_thinking": False}}),
    ("generic", "gpt-oss-20b", "brand-new", {"reasoning_effort": "high"}),
    *(("openai", "gpt-6.2-sol", effort, {"reasoning_effort": sent}) for effort, sent in
      (("none", "low"), ("minimal", "low"), ("medium", "medium"), ("max", "max"))),
    *(("zai", "glm-5.3", effort, {"thinking": PRESERVED, "reasoning_effort": sent}) for effort, sent in
      (("none", "low"), ("low", "low"), ("medium", "high"), ("high", "high"), ("xhigh", "max"), ("max", "max"))),
    ("minimax", "MiniMax-M3", "none", {"thinking": {"type": "disabled"}}),
    ("minimax", "MiniMax-M3", "low", {"thinking": {"type": "adaptive"}}),
    ("minimax", "MiniMax-M3.1-Flash", "low", {"reasoning_effort": "low"}),
    ("minimax", "MiniMax-M3.1", "max", {"reasoning_effort": "max"}),
    ("minimax", "MiniMax-M2.5", "low", {}),
    ("qwen", "qwen3.8-max", "none", {"enable_thinking": False}),
    ("dashscope", "qwen3.8-max", "high", {"enable_thinking": True, "thinking_budget": 16384}),
    ("dashscope", "qwen3-coder-plus", "high", {}),
    ("generic", "anything", "high", {}),
]


@pytest.mark.parametrize("dialect, model, effort, fields", EFFORT_ROWS)
def test_44_effort_is_said_the_way_the_server_knows(
    dialect: str, model: str, effort: str, fields: JSON
) -> None:
    body, dropped = encode({"model": "m", "input": "q", "reasoning": {"effort": effort}}, dialect, model)
    assert {k: body[k] for k in EFFORT_KEYS if k in body} == fields
    assert ("reasoning.effort" in dropped) == (not fields)


@pytest.mark.parametrize("dialect, model, fields", [
    ("zai", "glm-5.3", {"thinking": PRESERVED}), ("zai", "glm-4.7", {}), ("minimax", "MiniMax-M3", {"reasoning_split": True}),
    ("minimax", "MiniMax-M2.5", {"reasoning_split": True}), ("dashscope", "qwen3.8-max", {"preserve_thinking": True})])
def test_some_servers_are_sent_fields_with_every_request(dialect: str, model: str, fields: JSON) -> None:
    body = encoded([user("q")], dialect, model)
    assert {key: body[key] for key in body if key not in ("model", "messages")} == fields


def test_zai_is_asked_to_stream_the_arguments_of_calls() -> None:
    for stream, tools in ((True, TOOLS), (True, []), (False, TOOLS)):
        body = encoded([user("q")], "zai", "glm-5.3", stream=stream, tools=tools)
        assert body.get("tool_stream") == (True if stream and tools else None)
    assert "tool_stream" not in encoded([user("q")], "moonshot", stream=True, tools=TOOLS)


@pytest.mark.parametrize("updates, effort, verbosity", [
    ([], "low", "low"), ([{"reasoning": {"effort": "high"}}], "high", "low"),
    ([{"reasoning": {"effort": "high"}}, {"reasoning": {"effort": "max"}}, {"reasoning": None}], "max", "low"),
    ([{"reasoning": {"effort": "high"}, "text": {"verbosity": "high"}}, {"text": {}}], "high", "high"),
])
def test_the_last_configuration_update_counts(updates: list[JSON], effort: str, verbosity: str) -> None:
    items = [user("q"), *({"type": "configuration_update", **update} for update in updates), user("r")]
    fields = {"reasoning": {"effort": "low"}, "text": {"verbosity": "low"}}
    body = encoded(items, "openai", "gpt-6", **fields)
    assert (body["reasoning_effort"], body["verbosity"]) == (effort, verbosity)
    assert [message["content"] for message in body["messages"]] == ["q\n\nr"]


def test_the_plain_fields_go_under_the_servers_names() -> None:
    asked: JSON = {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 7,
        "stream": True,
        "prompt_cache_key": "k",
    }
    assert encoded([user("q")], "openai", **asked) == {
        "model": "m",
        "messages": [{"role": "user", "content": "q"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_completion_tokens": 7,
        "prompt_cache_key": "k",
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert encoded([user("q")], "generic", **asked, store=False, include=[]) == {
        "model": "m",
        "messages": [{"role": "user", "content": "q"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_structured_output_is_a_response_format_or_said_in_words() -> None:
    wanted = {"format": {"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "object"}}}
    assert encoded([user("q")], text=wanted)["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
    }
    said = encoded([user("q")], "deepseek", text=wanted)
    assert (
        said["response_format"] == {"type": "json_object"}
        and '{"type":"object"}' in said["messages"][0]["content"]
    )


def test_19_a_longer_history_begins_with_the_bytes_of_the_shorter() -> None:
    turns = [
        user("q"),
        says("t"),
        function_call("a"),
        output("a"),
        says("u"),
        user("r"),
        function_call("b"),
        output("b"),
        user("s"),
    ]
    whole = encoded(turns, instructions="i")["messages"]
    for count in (1, 4, 6, 8):
        shorter = encoded(turns[:count], instructions="i")["messages"]
        assert whole[: len(shorter)] == shorter


# --- errors of providers

KINDS = {
    "chat/azure-err-401": "auth",
    "chat/azure-err-404-deployment": "model_not_found",
    "chat/azure-err-429-retry-after": "rate_limit",
    "chat/deepseek-err-400-model": "model_not_found",
    "chat/deepseek-err-400-tool-choice-thinking": "bad_request",
    "chat/deepseek-err-401": "auth",
    "chat/doubleword-err-403": "auth",
    "chat/groq-err-400-tool-use-failed": "tool_generation",
    "chat/groq-err-401": "auth",
    "chat/groq-err-404": "model_not_found",
    "chat/llamacpp-err-401": "auth",
    "chat/llamacpp-err-500-image": "bad_request",
    "chat/llamacpp-err-500-jinja": "bad_request",
    "chat/llamacpp-err-context": "context_length",
    "chat/mistral-err-400": "model_not_found",
    "chat/mistral-err-400-logprobs": "bad_request",
    "chat/ollama-cloud-err-400-context": "context_length",
    "chat/ollama-cloud-err-401": "auth",
    "chat/openai-err-400-param": "bad_request",
    "chat/openai-err-404-model": "model_not_found",
    "chat/openrouter-err-400-model": "model_not_found",
    "chat/openrouter-err-401": "auth",
    "chat/openrouter-err-429": "rate_limit",
    "chat/together-err-401": "auth",
    "chat/venice-err-404": "model_not_found",
    "anthropic/documented-err-429": "rate_limit",
    "anthropic/documented-err-529": "overload",
    "anthropic/err-400-anyof-root": "bad_request",
    "anthropic/err-400-context-length": "context_length",
    "anthropic/err-400-effort-unsupported": "bad_request",
    "anthropic/err-401": "auth",
    "anthropic/err-404-model": "model_not_found",
    "gemini/documented-err-503": "overload",
    "gemini/err-400-key": "auth",
    "gemini/err-400-vertex-context-length": "context_length",
    "gemini/err-404-model": "model_not_found",
    "gemini/err-429-quota-retryinfo": "rate_limit",
    "gemini/err-429-retryinfo-fraction": "rate_limit",
    "gemini/err-429-short": "rate_limit",
    "responses/codex-backend-err-401": "auth",
    "responses/documented-err-429-rate-limit": "rate_limit",
    "responses/err-400-context-length": "context_length",
    "responses/err-400-invalid-tool-schema": "bad_request",
    "responses/err-400-model": "model_not_found",
    "responses/err-400-prev-id": "bad_request",
    "responses/err-400-reasoning-item-missing": "bad_request",
    "responses/err-401": "auth",
}
WAITS = {
    "chat/azure-err-429-retry-after": 1.0,
    "anthropic/documented-err-429": 17.0,
    "gemini/err-429-quota-retryinfo": 48.0,
    "gemini/err-429-retryinfo-fraction": 34.4,
    "responses/documented-err-429-rate-limit": 11.054,
}


@NO_RECORDINGS
@pytest.mark.parametrize("name, kind", KINDS.items())
def test_50_recorded_errors_are_told_apart(name: str, kind: str) -> None:
    folder = RECORDED / name
    meta, body = json.loads((folder / "meta.json").read_bytes()), (folder / "response.json").read_bytes()
    error = pomex.provider_error(meta["status"], pomex.Headers(list(meta["response_headers"].items())), body)
    assert (error.kind, error.upstream_status) == (kind, meta["status"])
    assert error.retry_after_s == (pytest.approx(WAITS[name]) if name in WAITS else None)
    assert len(str(error)) <= 300 and str(error)
    assert error.retryable == (kind not in ("context_length", "bad_request"))


@NO_RECORDINGS
def test_no_recorded_chat_error_is_left_out() -> None:
    bodies = (
        path for path in exchanges("chat", "response.json") if "choices" not in json.loads(path.read_bytes())
    )
    assert {f"chat/{named(path)}" for path in bodies} == {name for name in KINDS if name.startswith("chat/")}


BODIES: dict[str, tuple[int, bytes, str, str]] = {
    "empty": (500, b"", "overload", "The provider answered HTTP 500 without a reason."),
    "html": (
        502,
        b"<html><head><title>502 Bad\n Gateway</title></head></html>",
        "overload",
        "502 Bad Gateway",
    ),
    "html without a title": (400, b"<p>no <b>good</b></p><script>x()</script>", "bad_request", "no good"),
    "text": (503, b"Loading model", "overload", "Loading model"),
    "string": (404, b'{"error":"Specified model not found"}', "model_not_found", "Specified model not found"),
    "detail": (400, b'{"detail":"nope"}', "bad_request", "nope"),
    "detail, listed": (
        422,
        b'{"detail":[{"loc":["body","messages"],"msg":"Field required"}]}',
        "bad_request",
        "body.messages: Field required",
    ),
    "array": (
        429,
        b'[{"error":{"code":429,"message":"slow","status":"RESOURCE_EXHAUSTED"}}]',
        "rate_limit",
        "slow",
    ),
    "bare": (400, b'{"object":"error","message":"bad","type":"invalid_request_error"}', "bad_request", "bad"),
    "openai's quota": (
        429,
        b'{"error":{"code":"insufficient_quota","message":"check your billing"}}',
        "quota",
        "check your billing",
    ),
    "payment": (402, b'{"error":{"message":"Insufficient Balance"}}', "quota", "Insufficient Balance"),
    "xai's empty purse": (
        403,
        b'{"error":"Your team has no more credits"}',
        "quota",
        "Your team has no more credits",
    ),
    "gemini's day": (
        429,
        b'{"error":{"message":"quota","status":"RESOURCE_EXHAUSTED","details":[{"violations":'
        b'[{"quotaId":"GenerateRequestsPerDay-Free"}]}]}}',
        "quota",
        "quota",
    ),
    "#47: vLLM's context": (
        400,
        b'{"message":"This model\'s maximum context length is 4096 tokens."}',
        "context_length",
        "This model's maximum context length is 4096 tokens.",
    ),
    "groq's 413": (
        413,
        b'{"error":{"message":"Request too large","type":"tokens","code":"rate_limit_exceeded"}}',
        "rate_limit",
        "Request too large",
    ),
    "moderation": (
        403,
        b'{"error":{"message":"Your input was flagged","code":403}}',
        "bad_request",
        "Your input was flagged",
    ),
    "anthropic's overload as 400": (
        400,
        b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}',
        "overload",
        "Overloaded",
    ),
    "project without the model": (
        403,
        b'{"error":{"code":"model_not_found","message":"no access"}}',
        "model_not_found",
        "no access",
    ),
    "too large": (413, b'{"error":{"type":"request_too_large","message":"32 MB"}}', "bad_request", "32 MB"),
    "auth says nothing": (
        401,
        b'{"error":{"message":"Incorrect API key sk-abc"}}',
        "auth",
        "The provider refused the gateway's credentials.",
    ),
    "not utf-8": (500, b"\xff\xfe", "overload", "\ufffd\ufffd"),
    "deep": (500, b"[" * 100_000, "overload", "[" * 299 + "…"),
}


@pytest.mark.parametrize("status, body, kind, message", BODIES.values(), ids=BODIES)
def test_errors_of_every_shape_are_read(status: int, body: bytes, kind: str, message: str) -> None:
    error = pomex.provider_error(status, pomex.Headers([]), body)
    assert (error.kind, str(error)) == (kind, message)


def test_the_client_is_told_its_own_mistake_with_param_and_code() -> None:
    said = {"message": "m", "type": "invalid_request_error", "param": "stop", "code": "no_such_thing"}
    body = json.dumps({"error": said}).encode()
    error = pomex.provider_error(422, pomex.Headers([]), body)
    assert error.body() == {
        "error": {
            "message": "m",
            "type": "invalid_request_error",
            "param": "stop",
            "code": "no_such_thing",
        }
    }
    assert error.status == 422
    assert pomex.provider_error(401, pomex.Headers([]), b"").status == 502


INBAND: list[tuple[Any, str]] = [
    (
        {"message": "m", "type": "invalid_request_error", "code": "tool_use_failed", "status_code": 400},
        "tool_generation",
    ),
    ({"code": 502, "message": "Upstream error"}, "overload"),
    ({"code": 429, "message": "m"}, "rate_limit"),
    ("m", "overload"),
    ({"type": "overloaded_error", "message": "Overloaded"}, "overload"),
    ({"type": "invalid_request_error", "message": "m"}, "bad_request"),
    ({"code": "context_length_exceeded", "message": "m"}, "context_length"),
    ({}, "overload"),
    (None, "overload"),
    (7, "overload"),
]


@pytest.mark.parametrize("error, kind", INBAND, ids=lambda value: json.dumps(value))
def test_errors_inside_a_stream_are_told_apart(error: Any, kind: str) -> None:
    assert pomex.classify_error(error).kind == kind


# every form that an error has somewhere: its words, and its kind inside a 200
FORMS: dict[str, tuple[JSON, str, str]] = {
    "base_resp": (
        {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
        "insufficient balance",
        "quota",
    ),
    "error_code": ({"error_code": 17, "error_msg": "Open api daily request limit"}, "Open api daily request limit", "overload"),
    "errors": (
        {"errors": [{"message": "AiError: too many images", "code": 5006}], "success": False, "result": {}, "messages": []},
        "AiError: too many images",
        "overload",
    ),
    "ret": ({"ret": ["FAIL_SYS", "RGV587_ERROR::SM::busy"], "data": {}}, "FAIL_SYS; RGV587_ERROR::SM::busy", "overload"),
    "code and msg": ({"code": 500, "msg": "no server", "data": None}, "no server", "overload"),
    "code and message": ({"code": "Throttling.RateQuota", "message": "slow", "request_id": "r"}, "slow", "rate_limit"),
    "code in words": (
        {"code": "DataInspectionFailed", "message": "Input may contain inappropriate content."},
        "Input may contain inappropriate content.",
        "bad_request",
    ),
    "code in a string": ({"code": "429", "msg": "busy"}, "busy", "rate_limit"),
    "status code": ({"statusCode": 500, "message": "Internal server error"}, "Internal server error", "overload"),
    "a string": ({"error": "no more credits", "success": False}, "no more credits", "quota"),
    "true": ({"error": True, "message": "broke"}, "broke", "overload"),
    "detail": ({"detail": "broke"}, "broke", "overload"),
    "raw, in JSON": (
        {
            "error": {
                "message": "Provider returned error",
                "code": 400,
                "metadata": {"raw": '{"error":{"message":"maximum context length is 9 tokens"}}', "provider_name": "X"},
            }
        },
        "maximum context length is 9 tokens",
        "context_length",
    ),
    "raw, an event": (
        {"error": {"message": "Provider returned error", "code": 502, "metadata": {"raw": 'event: error\ndata: {"message":"broke"}'}}},
        "broke",
        "overload",
    ),
    "raw, in words": (
        {"error": {"message": "Provider returned error", "code": 429, "metadata": {"raw": "m is rate-limited upstream"}}},
        "m is rate-limited upstream",
        "rate_limit",
    ),
    "no raw": ({"error": {"message": "broke", "code": 502, "metadata": {"raw": ""}}}, "broke", "overload"),
    "nothing known": ({"error": {"why": "the moon"}}, '{"error":{"why":"the moon"}}', "overload"),
}


def error_data(text: str) -> str:
    """What a decoder reads of an `event: error` with this data."""
    given: list[Any] = []
    reader = decoder()
    reader.read = given.append
    reader.feed(text, "error")
    return json.dumps(given[0])


@pytest.mark.parametrize("body, words, kind", FORMS.values(), ids=FORMS)
def test_the_words_and_the_kind_of_an_error_are_found_in_any_form(body: JSON, words: str, kind: str) -> None:
    text = json.dumps(body)
    for given in (text, f"event: error\n:HTTP_STATUS/400\ndata: {text}\n\n"):
        assert str(pomex.provider_error(400, pomex.Headers([]), given.encode())) == words
    for view in (view_of([text]), view_of([error_data(text)]), whole(decoder(), body)):
        assert isinstance(view.error, pomex.ProviderError) and view.items == {}
        assert view.error.kind == kind and (str(view.error) == words or "the moon" in str(view.error))
    broken = view_of([piece(content="a"), text])
    assert (broken.end(), broken.said()) == ("failed", "a")


def test_a_message_alone_is_an_error_where_nothing_else_comes() -> None:
    alone = {"message": "the moon is down", "id": "x"}
    for view in (view_of([alone, "[DONE]"]), whole(decoder(), alone)):
        assert str(view.error) == "the moon is down"
    reader = decoder()
    reader.feed(json.dumps(alone))
    reader.end()
    assert str(reader.sink.error) == "the moon is down"
    assert view_of([alone, piece(content="a"), STOPPED, "[DONE]"]).outcome()[-1] == "completed"
    assert "the moon is down" in error_data("the moon is down")


NO_ERRORS: list[JSON] = [
    {"base_resp": {"status_code": 0, "status_msg": ""}},
    {"base_resp": {"status_code": 0, "status_msg": "success"}, "choices": []},
    {"code": 0, "message": "ok"},
    {"code": "200", "msg": "done"},
    {"code": "Success", "message": "fine"},
    {"code": None, "message": None},
    {"error_code": 0, "error_msg": "queued"},
    {"errors": []},
    {"error": None},
    {"detail": None},
    {"ret": ["SUCCESS::ok"]},
    {"code": 1, "message": "success"},
]


@pytest.mark.parametrize("fields", NO_ERRORS, ids=json.dumps)
def test_an_answer_is_never_taken_for_an_error(fields: JSON) -> None:
    chunks = [piece(content="a"), {**fields}, STOPPED, "[DONE]"]
    assert view_of(chunks).end() == "completed"
    body = {"code": 7, "message": "m", **fields, "choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}
    assert whole(decoder(), body).end() == "completed" and not pomex.states_error({**body, "ret": ["x"]})
    for name in pomex.ANSWER_FIELDS:
        assert not pomex.states_error({"message": "m", "code": 7, "detail": "d", **fields, name: [1]}, whole=True)


def test_a_country_that_is_refused_is_said() -> None:
    text = "Country, region, or territory not supported"
    error = pomex.provider_error(403, pomex.Headers([]), json.dumps({"error": {"message": text}}).encode())
    assert (error.kind, str(error)) == ("auth", text)


FINISHES: list[tuple[Any, str | None, str]] = [
    ("tool_calls", "MAX_TOKENS", "max_output_tokens"),
    ("stop", "max_output_tokens", "max_output_tokens"),
    ("stop", "SAFETY", "content_filter"),
    ("length", "stop", "max_output_tokens"),
    ("stop", "STOP", "completed"),
    ("max_output_tokens", None, "max_output_tokens"),
    ("repetition", None, "max_output_tokens"),
    ({"type": "length"}, None, "max_output_tokens"),
    ({"reason": "stop"}, None, "completed"),
    ({}, None, "none"),
]


@pytest.mark.parametrize("reason, native, end", FINISHES)
def test_the_end_is_read_in_the_words_of_the_router_and_of_its_provider(reason: Any, native: str | None, end: str) -> None:
    finish = {"choices": [{"delta": {}, "finish_reason": reason, "native_finish_reason": native}]}
    view = view_of([call(0, "call_1", "f", '{"a":1}'), call(1, "call_2", "f", '{"a"'), finish])
    assert view.end() == end
    assert [item["closed"] for item in view.items.values()] == [True, False]


SECRETS = [
    "sk-proj-abcdefgh12345678",
    "Bearer abc.def.ghi",
    "AIzaSyA1234567890abcdefghij",
    "gsk_abcdefgh1234",
    "key=abcdef123",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIi.x",
    "/home/me/models/x.gguf",
    "a1" * 25,
    "org-abcdefgh1234",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_nothing_that_looks_like_a_secret_goes_on_to_the_client(secret: str) -> None:
    error = pomex.provider_error(
        400, pomex.Headers([]), json.dumps({"error": {"message": f"bad thing {secret} here"}}).encode()
    )
    assert (
        secret.removeprefix("key=") not in str(error) and "bad thing" in str(error) and "here" in str(error)
    )


@pytest.mark.parametrize(
    "text",
    [
        "claude-haiku-4-5-20251001 does no such thing",
        "see /v1/chat/completions",
        "tools.0.custom.input_schema",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert text in str(
        pomex.provider_error(400, pomex.Headers([]), json.dumps({"error": {"message": text}}).encode())
    )


DELAYS: list[tuple[dict[str, str], str, float | None]] = [
    ({"retry-after": "7"}, "", 7),
    ({"retry-after": "0.5"}, "", 0.5),
    ({"retry-after-ms": "250", "retry-after": "1"}, "", 0.25),
    ({"retry-after-ms": "0", "retry-after": "1"}, "", 1),
    ({"retry-after": "86400"}, "", 60),
    ({"retry-after": "Sun, 22 Nov 2026 08:00:05 GMT", "date": "Sun, 22 Nov 2026 08:00:00 GMT"}, "", 5),
    ({"retry-after": "Sun, 22 Nov 2026 08:00:05 GMT"}, "", None),
    ({"retry-after": "soon"}, "", None),
    ({"retry-after": "-5"}, "", None),
    ({}, "Please try again in 11.054s.", 11.054),
    ({}, "try again in 350ms", 0.35),
    ({}, "Please try again in 1m2s", 60),
    ({}, "Please retry in 48.9s.", 48.9),
    ({}, "try again in 7", 7),
    ({}, "try again in a while", None), ({}, "try again in " + "1" * 30_000, 60), ({"x-ratelimit-reset-requests": "1" * 30_000}, "x", None),
    (
        {
            "x-ratelimit-reset-tokens": "11.054s",
            "x-ratelimit-remaining-tokens": "0",
            "x-ratelimit-reset-requests": "50s",
            "x-ratelimit-remaining-requests": "9",
        },
        "",
        11.054,
    ),
    ({"x-ratelimit-reset-requests": "6m0s"}, "", 60),
    (
        {"anthropic-ratelimit-tokens-reset": "2026-11-22T08:00:09Z", "date": "Sun, 22 Nov 2026 08:00:00 GMT"},
        "",
        9,
    ),
    ({}, "", None),
]


@pytest.mark.parametrize("headers, message, wait_s", DELAYS)
def test_the_time_to_wait_is_found_wherever_it_is_said(
    headers: dict[str, str], message: str, wait_s: float | None
) -> None:
    error = pomex.provider_error(
        429, pomex.Headers(list(headers.items())), json.dumps({"error": {"message": message}}).encode()
    )
    assert error.retry_after_s == (None if wait_s is None else pytest.approx(wait_s))


def test_an_error_is_read_to_its_core_however_deep_it_lies() -> None:
    error = {"message": "slow down", "code": "rate_limit_exceeded"}
    for _ in range(20_000):
        error = {"error": [error], "code": "outer"}
    found = pomex.classify_error(error)
    assert (found.kind, str(found)) == ("rate_limit", "slow down")


def test_points_in_time_are_read_against_now_where_the_answer_has_no_date() -> None:
    headers = pomex.Headers([("retry-after", "Sun, 22 Nov 2026 08:00:05 GMT")])
    assert pomex.retry_after_s(headers, {}, 1795334400.0) == pytest.approx(5)
    assert dict(pomex.provider_error(429, headers, b"", 1795334400.0).headers) == {"retry-after": "5"}
