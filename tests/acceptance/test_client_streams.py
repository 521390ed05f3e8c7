"""Every recorded exchange and field case, as clients of Chat Completions and of Messages get it, read by their SDKs.

The SDKs' own types must take every event, strictly, and their own code must put together what tests/client_streams.py reads.
"""
from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import test_client_apis as exchanges
from client_streams import Result
from harness import HERE, JSON, clean_environment, package_python

PACKAGES = [("chat", "openai-1"), ("chat", "openai-2"), ("chat", "openai-3"), ("messages", "anthropic")]
NOW_S = 1_790_000_002
# Fields that clients read although the types of their SDKs do not have them.
KNOWN_EXTRA = {
    "chat": {f"{at}.{name}" for at in (".choices.delta", ".choices.message")
             for name in ("reasoning_content", "reasoning_details", "annotations")}
    | {".usage.prompt_tokens_details.cache_write_tokens"},
    "messages": set(),
}


class Answer(NamedTuple):
    raw: bytes
    read: Result        # by the reader of ours


def stream_of(api: str, source: exchanges.Source, count: int | None = None) -> Answer:
    names = exchanges.names_of(exchanges.expected_of_stream(source))
    raw = exchanges.run(exchanges.attempt_of(source, api, names), source.blocks[:count])
    return Answer(raw, exchanges.check_stream(api, raw))


def answers(api: str) -> dict[str, Answer]:
    """By file name: each stream whole and cut in half, and each answer that is not streamed."""
    found = {}
    for source in exchanges.STREAMS:
        found[f"{source.name}.sse"] = stream_of(api, source)
        found[f"{source.name}.half.sse"] = stream_of(api, source, len(source.blocks) // 2)
    for source in exchanges.WHOLES:
        wanted = exchanges.expected_of_whole(source)
        attempt = exchanges.attempt_of(source, api, exchanges.names_of(wanted), stream=False)
        if wanted.end != "failed":
            body = exchanges.run_whole(attempt, source.raw).body(NOW_S)
            found[f"{source.name}.json"] = Answer(body.encode(), exchanges.check_whole(api, body))
    return found


def read_by_sdk(api: str, package: str, given: dict[str, Answer], folder: Path) -> dict[str, JSON]:
    captures = folder / "captures"
    captures.mkdir()
    for name, answer in given.items():
        (captures / name).write_bytes(answer.raw)
    done = subprocess.run([str(package_python(package)), str(HERE / "client_streams_driver.py"), api, str(captures)],
                          env=clean_environment(folder), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, JSON] = json.loads(done.stdout)
    return found


def differences(got: JSON, wanted: Result) -> list[str]:
    """Where the SDK has something else in hand."""
    if got["complaints"]:
        return list(got["complaints"])
    found = []
    ours = [[call.id, call.name] for call in wanted.calls + wanted.partial]
    if [call[:2] for call in got["calls"]] != ours:
        found.append(f"calls {got['calls']}, not {ours}")
    whole = [json.loads(call.arguments or "{}") for call in wanted.calls]
    if [json.loads(arguments or "{}") for _, _, arguments in got["calls"][:len(whole)]] != whole:
        found.append(f"arguments {got['calls']}, not {whole}")
    if got["text"] != wanted.text:
        found.append(f"text {got['text']!r}, not {wanted.text!r}")
    if (got["error"] is None) != wanted.ok or (wanted.ok and got["end"] != wanted.end):
        found.append(f"ends {got['end']} {got['error']}, not {wanted.end}")
    return found


@pytest.mark.parametrize("api, package", PACKAGES)
def test_an_sdk_reads_what_was_said(api: str, package: str, tmp_path: Path) -> None:
    given = answers(api)
    assert len(given) > 200
    found = read_by_sdk(api, package, given, tmp_path)
    wrong = {name: said for name, answer in given.items() if (said := differences(found[name], answer.read))}
    assert not wrong, json.dumps(wrong, indent=1)[:4000]
    extra = {field for each in found.values() for field in each["extra"]}
    if package != "openai-1":       # it is older than some of the fields
        assert extra <= KNOWN_EXTRA[api], sorted(extra - KNOWN_EXTRA[api])


@pytest.mark.parametrize("api, package", [("chat", "openai-3"), ("messages", "anthropic")])
def test_an_sdk_would_say_what_is_wrong(api: str, package: str, tmp_path: Path) -> None:
    """The driver itself: a type that is none, and a piece too many, are seen."""
    source = next(each for each in exchanges.STREAMS if exchanges.expected_of_stream(each).calls)
    good = stream_of(api, source)
    marks = {"chat": (b'"index":0', b'"index":"0"'), "messages": (b'"output_tokens":', b'"output_tokens":"1","was":')}
    broken = good._replace(raw=good.raw.replace(*marks[api]))
    assert broken.raw != good.raw
    other = good._replace(read=Result(end=good.read.end, text=good.read.text + "x"))
    found = read_by_sdk(api, package, {"good.sse": good, "broken.sse": broken}, tmp_path)
    assert differences(found["good.sse"], good.read) == []
    assert found["broken.sse"]["complaints"]
    assert len(differences(found["good.sse"], other.read)) >= 2
