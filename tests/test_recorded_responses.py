"""Recorded exchanges of Responses servers, and Codex's own requests, through decoder, relay and encoders.

What an exchange holds is read here by rules of this file, not by those of the program.
"""
import itertools
import json
import pathlib
import re

import pytest
import streams
from sinks import adds, calls, ends, tell

import pomex

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
RECORDED = SHARED / "recorded" / "responses"
CODEX = SHARED / "codex-requests"
if not RECORDED.is_dir() or not CODEX.is_dir():
    pytest.skip("the recorded exchanges are not beside the repository", allow_module_level=True)

STREAMS = sorted(path.parent.name for path in RECORDED.glob("*/response.sse"))
STATUS = {path.parent.name: json.loads(path.read_text())["status"] for path in RECORDED.glob("*/meta.json")}
UNARY = sorted(path.parent.name for path in RECORDED.glob("*/response.json") if STATUS[path.parent.name] == 200)
ERRORS = sorted(name for name, status in STATUS.items() if status >= 400)
REQUESTS = sorted(RECORDED.glob("*/request.json")) + sorted(CODEX.glob("*/[0-9]*.json"))
# what the gateway refuses because it would need state
STATEFUL = {"err-400-prev-id", "background-queued-stream"}
ENVELOPE = pomex.Envelope(b"s" * 32, "a")
TERMINAL = ("response.completed", "response.incomplete", "response.failed")
HANDSHAKE = ("response.created", "response.queued", "response.in_progress")


# --- an exchange, read by rules of our own

def blocks(raw):
    """The events of a stream as bytes, each with its empty line."""
    return [block + b"\n\n" for block in raw.replace(b"\r\n", b"\n").split(b"\n\n") if block.strip()]


def event(block):
    """The event of one block, or None for a comment or [DONE]."""
    data = b"\n".join(line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:"))
    return json.loads(data) if data.startswith(b"{") else None


def part_text(part):
    return part.get("text", part.get("refusal", ""))


def essence(item):
    """What of an item must survive a translation: kind and content, not ids."""
    kind = item["type"]
    if kind == "message":
        return kind, "".join(map(part_text, item["content"])), [a for part in item["content"] for a in part.get("annotations") or []]
    if kind == "reasoning":
        return kind, [part_text(p) for p in item["summary"]], [part_text(p) for p in item.get("content") or []], bool(item.get("encrypted_content"))
    if kind in ("function_call", "custom_tool_call"):
        return kind, item["call_id"], item["name"], item.get("namespace"), item.get("arguments", item.get("input"))
    return kind, {name: value for name, value in item.items() if name != "id"}


class Exchange:
    def __init__(self, name):
        self.name = name
        folder = RECORDED / name
        asked = json.loads((folder / "request.json").read_text()) if (folder / "request.json").exists() else {}
        self.stream = (folder / "response.sse").exists()
        self.raw = (folder / ("response.sse" if self.stream else "response.json")).read_bytes()
        self.blocks = blocks(self.raw) if self.stream else []
        self.events = [event(block) for block in self.blocks]
        self.body = {"model": "m/x", "input": "hello", "stream": self.stream, "tools": asked.get("tools") or []}

    def job(self, relay, profile=pomex.STANDARD, **fields):
        request = pomex.parse_request(json.dumps({**self.body, **fields}).encode())
        return pomex.EncodeContext(pomex.ResponsesAnswer(request, "resp_1", 1_700_000_000, profile), ENVELOPE, "p", "m", relay, "")

    def attempt(self, relay, profile=pomex.STANDARD):
        return pomex.WIRES["responses"].call(self.job(relay, profile)).attempt

    def held(self, count=None):
        """(status, items, usage) of the first `count` events: what the evidence allows to be said of them."""
        told = [e for e in self.events[:count] if e]
        done = {e["output_index"]: e["item"] for e in told if e["type"] == "response.output_item.done"}
        added = {e["output_index"] for e in told if e["type"] == "response.output_item.added"}
        last = next((e for e in told if e["type"] in TERMINAL), None)
        if last is not None:
            status = last["type"].removeprefix("response.")
        else:
            half = any(item.get("status") == "incomplete" for item in done.values())
            answered = any(item["type"] != "reasoning" for item in done.values())       # a thought leads to something
            status = "failed" if not answered or set(done) != added else "incomplete" if half else "completed"
        items = [done[index] for index in sorted(done)]
        return status, items, (last or {}).get("response", {}).get("usage")


def run(attempt, pieces, error=None, clean=True):
    raw = b""
    for piece in pieces:
        attempt.feed(piece)
        raw += attempt.take_output()
    if clean:
        attempt.end()
    attempt.finish(error)
    return raw + attempt.terminal(1_700_000_002)


@pytest.fixture(params=STREAMS)
def stream(request):
    return Exchange(request.param)


# --- translated

def test_a_recorded_stream_is_translated_without_loss(stream):
    attempt = stream.attempt(relay=False)
    raw = run(attempt, [stream.raw])
    final = streams.check(raw)
    status, items, usage = stream.held()
    assert attempt.status == final["status"] == status
    visible = [essence(item) for item in items if item["type"] != "message" or "".join(map(part_text, item["content"])).strip()]
    assert [essence(item) for item in final["output"]] == visible
    check_usage(final["usage"], usage, attempt)
    assert attempt.terminal_by == "upstream"


def check_usage(ours, theirs, attempt):
    if theirs is None:
        assert attempt.usage.estimated or attempt.usage == pomex.Usage()        # an error in place of output costs nothing
        return
    assert (ours["input_tokens"], ours["output_tokens"]) == (theirs["input_tokens"], theirs["output_tokens"])
    assert ours["input_tokens_details"]["cached_tokens"] == (theirs.get("input_tokens_details") or {}).get("cached_tokens", 0)
    assert ours["output_tokens_details"]["reasoning_tokens"] == (theirs.get("output_tokens_details") or {}).get("reasoning_tokens", 0)


def cuttings(stream):
    step = 1 if len(stream.raw) < 10_000 else 7
    yield [stream.raw[n:n + step] for n in range(0, len(stream.raw), step)]
    yield stream.blocks
    yield [stream.raw.replace(b"\n", b"\r\n")]
    unknown = b'event: response.from_the_future\ndata: {"type":"response.from_the_future","output_index":0,"delta":5}\n\n: comment\n\n'
    yield [piece for block in stream.blocks for piece in (unknown, block)]


def test_however_it_is_cut_the_translation_is_the_same(stream):
    whole = run(stream.attempt(relay=False), [stream.raw])
    for pieces in cuttings(stream):
        assert run(stream.attempt(relay=False), pieces) == whole


def test_cut_after_any_event_it_ends_once_and_truly(stream):
    step = 1 if len(stream.blocks) < 60 else 5
    counts = [*range(0, len(stream.blocks), step), len(stream.blocks)]
    for count, clean, relay, profile in itertools.product(counts, (True, False), (True, False), (pomex.STANDARD, pomex.CODEX)):
        attempt = stream.attempt(relay, profile)
        raw = run(attempt, [b"".join(stream.blocks[:count])], None if clean else pomex.UpstreamTimeout("silent"), clean)
        final = streams.check(raw, profile is pomex.CODEX, relay)
        status, items, _ = stream.held(count)
        said = any(e and e["type"] in TERMINAL for e in stream.events[:count])
        reported = any(e and e["type"] == "error" for e in stream.events[:count])
        expected = status if said or clean and not reported else "failed"
        assert final["status"] == expected, (count, clean, relay, profile)
        kept = [essence(i) for i in final["output"]]
        finished = [essence(i) for i in items if i.get("status") != "incomplete"]
        assert expected != "failed" or all(e in kept for e in finished if e[:2] != ("message", "")), "what was finished is kept"


# --- relayed

def bare(block):
    return re.sub(rb'"sequence_number": ?\d+', b"", block)


def test_relayed_frames_are_the_upstreams_own_bytes(stream):
    attempt = stream.attempt(relay=True)
    raw = run(attempt, [stream.raw])
    final = streams.check(raw, relayed=True)
    status, items, usage = stream.held()
    assert (attempt.status, final["id"], final["model"]) == (status, "resp_1", "m/x")
    ours = [bare(b) for b in blocks(raw) if (e := event(b)) and e["type"] not in (*HANDSHAKE, *TERMINAL, "error") and not sealed(e)]
    theirs = [bare(b) for b, e in zip(stream.blocks, stream.events) if e and e["type"] not in (*HANDSHAKE, *TERMINAL, "error") and not sealed(e)]
    assert ours == theirs
    assert [essence(i) for i in final["output"]] == [essence(i) for i in items]
    check_usage(final["usage"], usage, attempt)
    for secret in [i["encrypted_content"] for i in items if i.get("encrypted_content")]:
        assert secret.encode() not in raw


def sealed(e):
    return bool((e.get("item") or {}).get("encrypted_content"))


def test_however_it_is_cut_the_relay_gives_the_same(stream):
    whole = run(stream.attempt(relay=True), [stream.raw])
    first, *others = cuttings(stream)
    for pieces in (first, *others[:-1]):
        assert run(stream.attempt(relay=True), pieces) == whole
    kept = [e for e in streams.events(run(stream.attempt(relay=True), others[-1])) if "future" not in e["type"]]
    assert [{**e, "sequence_number": 0} for e in kept] == [{**e, "sequence_number": 0} for e in streams.events(whole)]


def test_what_the_relay_sealed_goes_up_again_as_it_was(stream):
    raw = run(stream.attempt(relay=True), [stream.raw])
    output = streams.check(raw, relayed=True)["output"]
    _, items, _ = stream.held()
    call = pomex.WIRES["responses"].call(stream.job(True, input=[{"role": "user", "content": "again"}, *output]))
    up = json.loads(call.body)
    known = [i for i in items if i["type"] != "reasoning" or i.get("encrypted_content") or i.get("content")]
    assert up["input"][1:] == known and up["model"] == "m" and up["store"] is False
    assert call.dropped == (["input:reasoning"] if len(known) < len(items) else [])


# --- not streamed

@pytest.mark.parametrize("name", UNARY)
def test_a_recorded_answer_that_was_not_streamed(name):
    exchange = Exchange(name)
    theirs = json.loads(exchange.raw)
    for relay in (True, False):
        attempt = exchange.attempt(relay)
        attempt.whole(exchange.raw)
        attempt.finish()
        final = json.loads(attempt.body(2))
        assert final["status"] in (theirs["status"], theirs["status"] + "d")        # one says "complete"
        assert (final["id"], final["model"]) == ("resp_1", "m/x")
        assert [essence(i) for i in final["output"]] == [essence(i) for i in theirs["output"]]
        check_usage(final["usage"], theirs.get("usage"), attempt)
    streamed = pomex.WIRES["responses"].call(exchange.job(False, stream=True)).attempt
    streamed.whole(exchange.raw)
    streamed.finish()
    assert [essence(i) for i in streams.check(streamed.terminal(1_900_000_000))["output"]] == [essence(i) for i in theirs["output"]]


def test_interleaved_reasoning_keeps_its_order_over_two_turns():
    for name in ("interleaved-reasoning-1", "interleaved-reasoning-2"):
        exchange = Exchange(name)
        attempt = exchange.attempt(relay=False)
        attempt.whole(exchange.raw)
        attempt.finish()
        output = json.loads(attempt.body(2))["output"]
        outputs = [{"type": "function_call_output", "call_id": i["call_id"], "output": "1"} for i in output if i["type"] == "function_call"]
        up = json.loads(pomex.WIRES["responses"].call(exchange.job(False, input=[{"role": "user", "content": "x"}, *output, *outputs])).body)
        kinds = [i["type"] for i in json.loads(exchange.raw)["output"]]
        assert [i["type"] for i in up["input"][1:]] == kinds + ["function_call_output"] * len(outputs)
        secrets = [i["encrypted_content"] for i in json.loads(exchange.raw)["output"] if i["type"] == "reasoning"]
        assert [i["encrypted_content"] for i in up["input"] if i["type"] == "reasoning"] == secrets


# --- errors

@pytest.mark.parametrize("name", ERRORS)
def test_a_recorded_error_is_one_of_ours(name):
    codes = {"err-400-context-length": (400, "context_length_exceeded"), "documented-err-429-rate-limit": (429, "rate_limit_exceeded"),
             "err-400-model": (404, "model_not_found"), "err-401": (502, "server_error"), "codex-backend-err-401": (502, "server_error"),
             "err-400-prev-id": (400, "previous_response_not_found"), "fco-audio-array-err-400": (400, "unsupported_file")}
    error = pomex.provider_error(STATUS[name], pomex.Headers([]), (RECORDED / name / "response.json").read_bytes())
    if name in codes:
        assert (error.status, error.code) == codes[name]
    else:
        assert error.status == 400 and not error.retryable
    assert str(error)


@pytest.mark.parametrize("name, code, retryable", [
    ("failed-quota-stream", "insufficient_quota", True), ("failed-rate-limited-stream", "rate_limit_exceeded", True),
    ("failed-unknown-error-stream", "server_error", True)])
def test_a_recorded_failure_inside_a_stream_gives_no_output_and_its_code(name, code, retryable):
    exchange = Exchange(name)
    for relay in (True, False):
        attempt = exchange.attempt(relay)
        attempt.feed(exchange.raw)
        assert not attempt.output_started and not attempt.take_output(), "another target may still take over"
        attempt.finish()
        assert (attempt.status, attempt.error.code, attempt.error.retryable) == ("failed", code, retryable)


# --- habits of servers, small

def translated(*told, profile=pomex.STANDARD, tools=()):
    exchange = Exchange("text-stream")
    attempt = pomex.WIRES["responses"].call(exchange.job(False, profile, tools=list(tools))).attempt
    raw = run(attempt, [b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in told)])
    return streams.check(raw, codex=profile is pomex.CODEX), attempt


def part(kind, **fields):
    return {"type": f"response.{kind}", "output_index": 0, **fields}


MESSAGE = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a":1}'}
ADDED = part("output_item.added", item={"type": "message", "role": "assistant", "content": []})
HEL, LO = part("output_text.delta", content_index=0, delta="Hel"), part("output_text.delta", content_index=0, delta="lo")
DONE = part("output_item.done", item=MESSAGE)
END = {"type": "response.completed", "response": {"output": [MESSAGE]}}


@pytest.mark.parametrize("told", [
    [ADDED, HEL, LO, DONE, END], [HEL, LO, DONE, END], [ADDED, HEL, DONE, END], [ADDED, DONE, END], [DONE, END], [END], [ADDED, HEL, END],
    [ADDED, HEL, LO, DONE], [DONE], [HEL, LO, DONE], [ADDED, ADDED, HEL, LO, DONE, DONE, END], [ADDED, HEL, LO, {"type": "response.completed"}],
    [{"type": "response.in_progress"}, ADDED, {k: v for k, v in HEL.items() if k != "content_index"}, LO, DONE, END],
])
def test_what_one_event_lacks_another_has(told):
    final, attempt = translated(*told)
    assert [essence(i) for i in final["output"]] == [("message", "Hello", [])]
    assert attempt.status == "completed"


@pytest.mark.parametrize("told", [
    [part("output_item.added", item={**CALL, "arguments": ""}), part("function_call_arguments.delta", delta='{"a":1}'), part("output_item.done", item=CALL)],
    [part("output_item.added", item={**CALL, "arguments": ""}), part("function_call_arguments.done", arguments='{"a":1}'), part("output_item.done", item=CALL)],
    [part("function_call_arguments.delta", delta='{"a":1}'), part("output_item.done", item=CALL)],
    [{"type": "response.completed", "response": {"output": [CALL]}}],
])
def test_a_call_comes_whole_from_whatever_events_there_are(told):
    final, _ = translated(*told)
    assert [essence(i) for i in final["output"]] == [essence(CALL)]


def test_an_answer_that_only_its_end_holds_comes_whole():
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "gAAA"}
    search = {"type": "web_search_call", "id": "ws", "status": "completed", "action": {}}
    final, _ = translated({"type": "response.completed", "response": {"output": [thought, search, MESSAGE, CALL]}})
    assert [essence(i) for i in final["output"]] == [essence(i) for i in (thought, search, MESSAGE, CALL)]


def test_an_item_that_is_done_only_when_the_next_begins():
    second = {**MESSAGE, "content": [{"type": "output_text", "text": "two"}]}
    final, _ = translated(ADDED, HEL, LO, {**ADDED, "output_index": 1}, DONE, {**DONE, "output_index": 1, "item": second}, END)
    assert [essence(i)[1] for i in final["output"]] == ["Hello", "two"]


def test_annotations_are_taken_once_from_events_or_items():
    note = {"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 1}
    noted = {**MESSAGE, "content": [{"type": "output_text", "text": "Hello", "annotations": [note]}]}
    heard = part("output_text.annotation.added", content_index=0, annotation_index=0, annotation=note)
    for told in ([ADDED, HEL, LO, heard, part("output_item.done", item=noted)], [ADDED, HEL, LO, part("output_item.done", item=noted)],
                 [{"type": "response.completed", "response": {"output": [noted]}}]):
        assert [essence(i) for i in translated(*told)[0]["output"]] == [essence(noted)]


@pytest.mark.parametrize("profile", [pomex.STANDARD, pomex.CODEX], ids=["standard", "codex"])
def test_half_a_call_is_done_only_where_the_answer_is_incomplete(profile):
    half = {**CALL, "status": "incomplete", "arguments": '{"a'}
    told = [part("output_item.added", item={**CALL, "arguments": ""}), part("function_call_arguments.delta", delta='{"a'), part("output_item.done", item=half)]
    cut = {"type": "response.incomplete", "response": {"incomplete_details": {"reason": "max_output_tokens"}, "output": [half]}}
    assert translated(*told, profile=profile)[0]["status"] == "incomplete", "a call that is done and incomplete was cut"
    final, _ = translated(*told, cut, profile=profile)
    assert [i["status"] for i in final["output"]] == ([] if profile is pomex.CODEX else ["incomplete"])


def test_usage_is_counted_whatever_the_end():
    usage = {"input_tokens": 7, "output_tokens": 2}
    for kind in TERMINAL:
        final, attempt = translated(ADDED, HEL, LO, DONE, {"type": kind, "response": {"usage": usage}})
        assert (attempt.usage.input, attempt.usage.output, attempt.usage.estimated) == (7, 2, False)


@pytest.mark.parametrize("data", ["nonsense", "[]", "5", '{"type":[]}', '{"type":"response.output_item.added","item":5}',
                                  '{"type":"response.output_item.done","output_index":[],"item":{}}', '{"type":"response.completed","response":5}',
                                  '{"type":"response.completed","response":{"output":[5]}}', "{" * 100_000])
def test_garbage_is_the_upstreams_error(data):
    with pytest.raises(pomex.UpstreamError):
        pomex.ResponsesDecoder(pomex.ToolMap([])).feed(data)


def test_an_event_without_a_type_is_an_error_or_a_sign_of_life():
    final, _ = translated({}, ADDED, {}, HEL, LO, DONE, {}, {"type": "response.completed", "response": {}})
    assert (final["status"], len(final["output"])) == ("completed", 1)
    final, _ = translated(ADDED, HEL, {"error": {"message": "boom", "code": "rate_limit_exceeded"}})
    assert final["error"] == {"code": "rate_limit_exceeded", "message": "boom"}


def test_items_that_are_told_in_turns_lose_nothing():
    call = part("output_item.added", output_index=1, item={**CALL, "arguments": ""})
    thought = {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "gAAA"}
    told = [ADDED, HEL, call, LO, DONE, part("output_item.added", output_index=2, item={**thought, "encrypted_content": None}),
            part("output_item.done", output_index=1, item=CALL), part("output_item.done", output_index=2, item=thought)]
    for end in ([], [{"type": "response.completed", "response": {}}]):
        assert [essence(i) for i in translated(*told, *end)[0]["output"]] == [essence(i) for i in (MESSAGE, CALL, thought)]


def test_a_cut_that_was_told_as_completed_is_a_cut():
    cut = {"type": "response.completed", "response": {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}}
    final, _ = translated(ADDED, HEL, LO, DONE, cut)
    assert (final["status"], final["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_a_thought_goes_back_under_the_id_it_is_bound_to():
    thought = {"type": "reasoning", "id": "rs_theirs", "summary": [], "encrypted_content": "gAAA"}
    output = translated(part("output_item.done", item=thought), part("output_item.done", output_index=1, item=MESSAGE))[0]["output"]
    request = pomex.parse_request(json.dumps({"model": "m/x", "input": [{"role": "user", "content": "q"}, *output]}).encode())
    job = pomex.EncodeContext(pomex.ResponsesAnswer(request, "resp_2", 1_700_000_000, pomex.STANDARD), ENVELOPE, "p", "up", False, "")
    assert json.loads(pomex.WIRES["responses"].call(job).body)["input"][1] == thought


def test_deltas_of_kinds_that_pass_whole_say_nothing():
    item = {"type": "mcp_call", "id": "m", "name": "x", "status": "completed"}
    final, _ = translated(part("output_item.added", item=item), part("output_text.delta", content_index=0, delta="x"),
                          part("function_call_arguments.delta", delta="{}"), part("output_item.done", item=item))
    assert final["output"] == [item]


# --- requests

def tools_within(tools, namespace=""):
    for tool in tools:
        if tool["type"] == "namespace":
            yield from tools_within(tool["tools"], tool["name"])
        else:
            yield namespace, tool


@pytest.mark.parametrize("path", REQUESTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_real_request_goes_up_on_every_wire(path):
    raw = path.read_bytes()
    if path.parent.name in STATEFUL:
        with pytest.raises(pomex.BadRequest):
            pomex.parse_request(raw)
        return
    request = pomex.parse_request(raw)
    jobs = {relay: pomex.EncodeContext(pomex.ResponsesAnswer(request, "resp_1", 1_700_000_000, pomex.CODEX), ENVELOPE, "p", "up", relay, "") for relay in (True, False)}
    relayed = json.loads(pomex.WIRES["responses"].call(jobs[True]).body)
    assert relayed == {**json.loads(raw), "model": "up", "store": False}
    normal = pomex.WIRES["responses"].call(jobs[False])
    chat = pomex.WIRES["chat"].call(jobs[False])
    for call in (normal, chat):
        assert json.loads(call.body)["model"] == "up"
        assert call.body == (pomex.WIRES["responses"] if call is normal else pomex.WIRES["chat"]).call(jobs[False]).body, "the same bytes each time"
    up = json.loads(normal.body)
    assert all(tool["type"] == "function" for tool in up.get("tools", []))
    assert {i["type"] for i in up["input"]} <= {"message", "reasoning", "function_call", "function_call_output"}
    calls = [i["call_id"] for i in up["input"] if i["type"] == "function_call"]
    assert sorted(calls) == sorted(i["call_id"] for i in up["input"] if i["type"] == "function_call_output")
    assert "encrypted" not in re.findall(r'"(encrypted)": ?(?:true|false)', normal.body.decode())


@pytest.mark.parametrize("path", sorted(CODEX.glob("*/[0-9]*.json")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_tool_that_codex_offers_comes_back_as_its_own_kind(path):
    request = pomex.parse_request(json.dumps({**json.loads(path.read_bytes()), "stream": True}).encode())
    book = pomex.ToolMap(request.tools)
    offered = {function["name"]: function for function in book.functions}
    kinds = {"function": "function_call", "custom": "custom_tool_call", "tool_search": "tool_search_call", "local_shell": "local_shell_call"}
    for namespace, tool in tools_within(request.tools):
        if tool["type"] not in kinds:
            assert f"tools:{tool['type']}" in book.dropped
            continue
        name = tool.get("name", tool["type"])
        flat = pomex.upstream_tool_name(name, namespace)
        assert offered[flat]["parameters"]["type"] == "object"
        attempt = pomex.Assembler(pomex.ResponsesAnswer(request, "resp_1", 1_700_000_000, pomex.CODEX), str)
        tell(attempt, [calls(0, "c", book.resolve(flat)), adds(0, '{"input":"x"}', "arguments"), ends(0), pomex.Stop()])
        attempt.finish()
        item = streams.check(attempt.terminal(1_700_000_002), codex=True)["output"][0]
        assert item["type"] == kinds[tool["type"]] and item["call_id"] == "c"
        assert item.get("namespace", "") == namespace and item.get("name", name) == name
        content = item.get("arguments", item.get("input"))
        assert content == {"function": '{"input":"x"}', "custom": "x", "tool_search": {"input": "x"}}.get(tool["type"])
