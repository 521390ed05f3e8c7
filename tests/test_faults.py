"""Every fault of the kit (faults.py), on every wire, streamed and not, against the promises of the design (section 2).

All scenarios run once, together, through one gateway; each is then judged by itself.
"""
import asyncio
import json
import logging
import os
import re
import time

import pytest

import faults
import pomex
import streams
from ledgers import recent
from faults import COMPLETED, FAILED, INCOMPLETE, SECRET, WHOLES, WIRES, stream_faults

PROVIDERS = {"responses": ("responses", "normalise"), "relayed": ("responses", "bytes"), "chat": ("chat", ""),
             "messages": ("messages", ""), "gemini": ("gemini", "")}
PROMPT = "PROMPT-SECRET-4711"
LIMITS = """connect_timeout_s = 3
first_byte_timeout_s = 3
idle_timeout_s = 3
total_timeout_s = 20
"""         # a busy machine takes two seconds for an event of 1,500 bytes that comes a byte at a time beside 80 others
TOOL = {"type": "function", "name": "shell", "description": "", "parameters": {"type": "object", "properties": {
    "command": {"type": "array", "items": {"type": "string"}}}}}
HANG_S = 20.0           # all scenarios together: a single one that hangs shows here
TOGETHER = 80
ALL = os.environ.get("POMEX_FAULTS") == "all"       # else of the places where a stream can be cut only every kind
# What the design leaves to a relay of bytes: frames that it does not read pass as they came, also half ones, and OpenAI and
# Azure, the only ones whose bytes are passed on, end their lines with LF.
RELAYED_AS_IT_CAME = {"garbage-after-output": "completed", "deep-json-in-place": "failed"}
NOT_READ_BY_A_RELAY = ("ok-with-cr",)


def played_faults(name):
    """The faults that are played on one provider's wire."""
    wire = WIRES[PROVIDERS[name][0]]
    seen, chosen = set(), {}
    for model, fault in stream_faults(wire).items():
        place = re.fullmatch(r"cut-(\d+)-(\w+)-(\w+)", model)
        at = int(place[1]) if place else 0
        kind = place and (sum(at >= limit for limit in (1, wire.output, wire.calls[0], wire.finish, wire.finish + 1)), *place.groups()[1:])
        if not kind or ALL or kind not in seen:
            chosen[model] = fault
        seen.add(kind)
    return chosen


def configuration(url, folder):
    text = f'[server]\nport = 0\n[database]\nurl = "sqlite:{folder}/pomex.db"\n'
    for name, (wire, relay) in PROVIDERS.items():
        base = f"{url}/v1beta" if wire == "gemini" else f"{url}/v1"
        text += f'[providers.{name}]\nwire_api = "{wire}"\nbase_url = "{base}"\napi_key = "{SECRET}"\n{LIMITS}'
        text += f'relay = "{relay}"\n' if relay else ""
    for name in PROVIDERS:
        for model in dict.fromkeys([*played_faults(name), *WHOLES]):
            text += f'[models."two/{name}-{model}"]\ntargets = ["{name}:{model}", "{name}:ok"]\n'
    return pomex.load_config(text, f"{folder}/pomex.toml", {})


class Log(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        message = logging.Formatter("%(message)s").format(record)
        self.lines.extend(text for _, text in getattr(record, "lines", [(0, message)]))     # access lines come in blocks


async def ask(server, key, model, streamed):
    """(status, body, seconds) of one request over a connection of its own."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(*server.address)
    body = json.dumps({"model": model, "input": PROMPT, "stream": streamed, "tools": [TOOL]}).encode()
    writer.write(b"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer "
                 + key.encode() + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    raw = await reader.read(-1)
    writer.close()
    parser = pomex.ResponseReader()
    parser.start("POST")
    parser.feed(raw)
    parser.feed_eof()
    head, told = parser.next(), b""
    while (part := parser.next()) is not pomex.END:
        assert isinstance(part, bytes), "the answer is cut"
        told += part
    return head.status, told, time.monotonic() - began


SCENARIOS = [(name, model, streamed, two) for name in PROVIDERS for two in (False, True)
             for streamed, models in ((True, played_faults(name)), (False, WHOLES)) for model in models
             if not two or not streamed or models[model].silent]


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """All scenarios: what came of each, the log, the rows, and what was left behind."""
    folder = tmp_path_factory.mktemp("faults")
    log, after_stop_s = Log(), pomex.AFTER_STOP_S
    pomex.log.addHandler(log)
    pomex.log.setLevel(logging.INFO)
    pomex.AFTER_STOP_S = 0.3

    async def scenario():
        gate, results = asyncio.Semaphore(TOGETHER), {}
        async with faults.Upstream() as upstream:
            config = configuration(upstream.url, folder)
            ledger = pomex.Ledger.open(config.database.place)
            key = await ledger.create_key("faults", time.time())
            async with pomex.running(config, ledger) as server:
                async def one(case):
                    name, model, streamed, two = case
                    async with gate:
                        try:
                            results[case] = await ask(server, key, f"two/{name}-{model}" if two else f"{name}/{model}", streamed)
                        except Exception as error:  # noqa: BLE001
                            results[case] = (0, repr(error).encode(), 0.0)      # judged by its own test
                await asyncio.gather(*map(one, SCENARIOS))
                end = time.monotonic() + 2
                while upstream.live and time.monotonic() < end:
                    await asyncio.sleep(0.01)
                left = upstream.live, server.open_requests, len(asyncio.all_tasks())
            ledger.close()
        with pomex.Ledger.open(config.database.place) as ledger_again:
            return results, left, recent(ledger_again, 10**6), key
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pomex.Ledger, "__enter__", lambda self: self, raising=False)
            patch.setattr(pomex.Ledger, "__exit__", lambda self, *_: self.close(), raising=False)
            patch.setattr(pomex.ConnectionPool, "disable_reuse", lambda self, origin: None)     # all share an origin: it shall be used again
            results, left, rows, key = asyncio.run(asyncio.wait_for(scenario(), 120))
    finally:
        pomex.log.removeHandler(log)
        pomex.AFTER_STOP_S = after_stop_s
    return {"results": results, "left": left, "rows": rows, "log": log.lines, "key": key}


def outcome(raw, relayed):
    """The terminal response of a stream, all of whose rules are kept."""
    response = streams.check(raw, relayed=relayed)
    for item in response["output"]:
        if item["type"] == "function_call" and item.get("status") != "incomplete":
            json.loads(item["arguments"])
    return response


def text_of(response):
    return "".join(part.get("text", "") for item in response["output"] if item["type"] == "message" for part in item["content"])


WHOLE_TEXT = "".join(faults.TEXT)


def judge_failure(status, raw, key):
    error = json.loads(raw)["error"]
    assert status in (400, 404, 413, 418, 422, 429, 502, 503, 504), status
    assert error["message"] and set(error) == {"message", "type", "param", "code"}
    assert SECRET not in raw.decode() and key not in raw.decode() and PROMPT not in raw.decode()
    return error


@pytest.mark.parametrize("name, model", [case[:2] for case in SCENARIOS if case[2:] == (True, False)])
def test_a_stream_ends_once_and_truly(played, name, model):
    wire = WIRES[PROVIDERS[name][0]]
    fault = stream_faults(wire)[model]
    status, raw, seconds = played["results"][name, model, True, False]
    assert status, raw
    if name == "relayed" and model in RELAYED_AS_IT_CAME:
        ends = [end for end in (COMPLETED, INCOMPLETE, FAILED) for _ in range(raw.count(f"event: response.{end}".encode()))]
        assert ends == [RELAYED_AS_IT_CAME[model]] and raw.endswith(b"data: [DONE]\n\n")
        return
    if status != 200:
        assert fault.expected(wire) in (FAILED, None) or name == "relayed" and model in NOT_READ_BY_A_RELAY, (status, raw)
        judge_failure(status, raw, played["key"])
        return
    assert SECRET.encode() not in raw
    response = outcome(raw, relayed=name == "relayed")
    expected = fault.expected(wire)
    assert expected is None or response["status"] == expected, raw[-1500:].decode()
    said = text_of(response)
    if model in ("ok", "ok-gzip", "ok-byte-by-byte"):
        assert said == WHOLE_TEXT and [item["type"] for item in response["output"]] == ["message", "function_call"]
    if response["status"] != INCOMPLETE and "giant" not in model and "lone" not in model and "control" not in model:
        assert WHOLE_TEXT.startswith(said) or said.startswith(WHOLE_TEXT), said
    if fault.silent and expected == FAILED:
        assert response["status"] == FAILED and not said


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("model", WHOLES)
def test_without_streaming_a_failure_is_a_status_and_a_good_answer_is_whole(played, name, model):
    status, raw, seconds = played["results"][name, model, False, False]
    assert status, raw
    if WHOLES[model][1]:
        assert status == 200, raw
        response = json.loads(raw)
        assert response["status"] == COMPLETED and text_of(response) == WHOLE_TEXT
        assert json.loads(response["output"][-1]["arguments"]) == json.loads("".join(faults.ARGUMENTS))
        streams.check_usage(response["usage"])
    else:
        judge_failure(status, raw, played["key"])


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("streamed", [True, False])
def test_with_a_second_target_no_fault_before_output_is_seen(played, name, streamed):
    wrong = {}
    for case, (status, raw, seconds) in played["results"].items():
        if (case[0], case[2], case[3]) != (name, streamed, True) or re.match(r"status-(400|413|404|418)", case[1]):
            continue
        try:
            assert status == 200, raw
            response = outcome(raw, name == "relayed") if streamed else json.loads(raw)
            expected = stream_faults(WIRES[PROVIDERS[name][0]])[case[1]].expected(None) if case[1] != "only-done" and streamed else FAILED
            assert response["status"] == COMPLETED or expected is None, response["status"]
            assert case[1] == "only-done" or text_of(response) == WHOLE_TEXT, text_of(response)[:100]
        except (AssertionError, ValueError) as error:
            wrong[case[1]] = str(error)[:300]
    assert not wrong, json.dumps(wrong, indent=1)


def test_nothing_hangs_and_nothing_is_left(played):
    slow = {case: round(seconds, 1) for case, (_, _, seconds) in played["results"].items() if seconds > HANG_S}
    assert not slow
    live, open_requests, _ = played["left"]
    assert (live, open_requests) == (0, 0)


def test_every_request_has_one_row_that_says_what_the_client_was_told(played):
    rows = played["rows"]
    assert len(rows) == len(SCENARIOS) == len({row["response_id"] for row in rows})
    by_id = {row["response_id"]: row for row in rows}
    for case, (status, raw, _) in played["results"].items():
        if status == 200 and case[1] not in RELAYED_AS_IT_CAME:
            response = outcome(raw, case[0] == "relayed") if case[2] else json.loads(raw)
            row = by_id[response["id"]]
            assert row["status"] == response["status"], case
            if usage := response.get("usage"):
                assert (row["input"], row["output"]) == (usage["input_tokens"], usage["output_tokens"]), case
    assert sum(row["status"] == "failed" for row in rows) >= sum(status != 200 for status, _, _ in played["results"].values())


def test_the_log_has_no_traceback_no_secret_and_one_line_a_record(played):
    text = "\n".join(played["log"])
    assert "Traceback" not in text, text[text.index("Traceback") - 300:][:3000]
    for word in (SECRET, played["key"], PROMPT):
        assert word not in text
    assert not [line for line in played["log"] if re.search(r"[\x00-\x1f\x7f]", line)]


@pytest.mark.parametrize("trusted", [True, False], ids=["kept", "distrusted"])
@pytest.mark.parametrize("name", [*PROVIDERS, "whole"])
def test_an_answer_too_many_never_becomes_the_answer_to_another_request(tmp_path, monkeypatch, name, trusted):
    """An upstream sends a second answer behind the first, a moment late: the next request gets it, fails, and its own answer
    must not be left for the one behind. `trusted`: even if such an upstream's connections were used again."""
    wire, streamed = WIRES[PROVIDERS.get(name, ("chat", ""))[0]], name != "whole"
    seen, connections = [], []
    if trusted:
        monkeypatch.setattr(pomex.ConnectionPool, "disable_reuse", lambda self, origin: None)

    async def upstream(reader, writer):
        connections.append(writer)
        try:
            while True:
                top = await reader.readuntil(b"\r\n\r\n")
                body = json.loads(await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", top)[1])))
                asked = faults.asked(top.split(b" ", 2)[1].decode(), body)[1]
                seen.append(asked)
                text = f'"Hello for {asked}"'.encode()
                await asyncio.sleep(0.15 * (asked != "first"))      # late enough for the leftover to be taken first
                writer.write(b"".join(faults.stream(faults.with_text(wire, text))) if streamed else faults.counted(200, {
                    **wire.whole, "choices": [{"index": 0, "finish_reason": "stop", "message": {
                        "role": "assistant", "content": f"Hello for {asked}"}}]})[0])
                if asked == "first":
                    await asyncio.sleep(0.05)
                    writer.write(faults.counted(200, b"boo", kind="text/event-stream" if streamed else "application/json")[0])
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    async def scenario():
        up = await asyncio.start_server(upstream, "127.0.0.1", 0)
        kind, relay = PROVIDERS.get(name, ("chat", ""))
        config = pomex.load_config(
            f'[server]\nport = 0\n[database]\nurl = "sqlite:{tmp_path}/pomex.db"\n[providers.p]\nwire_api = "{kind}"\n'
            + (f'relay = "{relay}"\n' if relay else "")
            + f'base_url = "http://127.0.0.1:{up.sockets[0].getsockname()[1]}/v1"\n', f"{tmp_path}/pomex.toml", {})
        ledger = pomex.Ledger.open(config.database.place)
        key = await ledger.create_key("k", time.time())
        async with pomex.running(config, ledger) as server:
            async def said(model):
                status, raw, _ = await ask(server, key, f"p/{model}", streamed)
                response = (outcome(raw, name == "relayed") if streamed else json.loads(raw)) if status == 200 else {"output": []}
                told = text_of(response)
                assert not told or told.startswith(f"Hello for {model}"), (model, told)
                return bool(told)
            answered = [await said(model) for model in ("first", "m1", "m2", "m3")]
            if not trusted:
                await asyncio.sleep(0.1)                # the surplus is here now, on a connection that waits
                answered += [await said("first"), await asyncio.sleep(0.1) or await said("m4"), await said("m5")]
        ledger.close()
        up.close()
        return answered
    answered = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert answered[0] and answered[2:4] == [True, True] and (trusted or answered[5:] == [True, True])
    assert trusted or len(connections) == 4         # the one with the leftover, the next, and one each for m4 and m5
