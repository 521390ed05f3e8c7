"""Layer 10: which target answers, what a failure means, and that nothing of it shows while another target can help."""
import asyncio
import base64
import collections
import contextlib
import errno
import dataclasses
import gzip
import itertools
import json
import re
import socket
import time

import faults
import pytest
from ledgers import lost, recent
from streams import check

import pomex

SECRET = b"s" * 32
HEADERS = pomex.Headers([])
QUICK = 0.15                # the upstream's time limits, where a test runs into them


# --- the decision ---------------------------------------------------------------------------------

def failure(fault, **more):
    return dict(policy=pomex.RETRY_POLICIES[fault], shown=False, tries=1, attempts=1, left_s=100.0, retry_after_s=None, has_other=True,
                is_open=False) | more


DECISIONS = {
    "overloaded: once more, soon": (failure("overload"), "retry", 0.2),
    "then elsewhere": (failure("overload", tries=2, attempts=2), "failover", 0),
    "without another target twice more, later each time": (failure("overload", tries=2, attempts=2, has_other=False), "retry", 0.4),
    "then nobody": (failure("overload", tries=3, attempts=3, has_other=False), "give_up", 0),
    "what is left out by now is not asked again": (failure("overload", is_open=True), "failover", 0),
    "unless there is nothing else": (failure("overload", is_open=True, has_other=False), "retry", 0.2),
    "a short Retry-After is waited out": (failure("rate_limit", retry_after_s=2.0), "retry", 2.1),
    "a long one is not": (failure("rate_limit", retry_after_s=20.0), "failover", 0),
    "nor where there is no other: the client can wait itself": (failure("rate_limit", retry_after_s=8.0, has_other=False), "give_up", 0),
    "a quota comes back too late for this request": (failure("quota"), "failover", 0),
    "nor is a refused key tried twice": (failure("auth", has_other=False), "give_up", 0),
    "no connection: once more": (failure("unreachable"), "retry", 0.2),
    "a time limit was long enough once": (failure("timeout"), "failover", 0),
    "an empty answer: once more": (failure("no_answer"), "retry", 0.2),
    "a model that is not there is perhaps elsewhere": (failure("model_not_found"), "failover", 0),
    "a broken tool call: once more": (failure("tool_generation"), "retry", 0.2),
    "the client's own doing is never tried again": (failure("bad_request"), "give_up", 0),
    "a context fits only where more does": (failure("context_length"), "failover", 0),
    "and nowhere else": (failure("context_length", has_other=False), "give_up", 0),
    "what was shown cannot be taken back": (failure("overload", shown=True), "give_up", 0),
    "six calls are enough": (failure("overload", attempts=6), "give_up", 0),
    "the deadline is over": (failure("overload", left_s=0.0), "give_up", 0),
    "no wait beyond the deadline": (failure("rate_limit", retry_after_s=2.0, left_s=1.0), "failover", 0),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_a_failure_leads_to_the_same_target_another_or_none(name, monkeypatch):
    monkeypatch.setattr(pomex, "BACKOFF_S", 0.2)
    given, decision, wait_s = DECISIONS[name]
    assert pomex.decide_retry(**given, chance=0.5) == (decision, pytest.approx(wait_s, abs=0.01))


def test_back_off_grows_and_is_spread(monkeypatch):
    monkeypatch.setattr(pomex, "BACKOFF_S", 0.2)
    waits = [[pomex.decide_retry(**failure("overload", tries=n, has_other=False), chance=chance)[1] for chance in (0.0, 1.0)]
             for n in (1, 2)]
    assert waits == [[0.1, pytest.approx(0.3)], [0.2, pytest.approx(0.6)]]


ERRORS = {
    **{kind: (pomex.ProviderError("x", kind=kind), kind) for kind in pomex.ERROR_CLASSES},
    "refused": (pomex.TransportError("x", "connect", False), "unreachable"),
    "handshake": (pomex.TransportError("x", "tls", False), "unreachable"),
    "reset": (pomex.TransportError("x", "head", True), "network"),
    "cut": (pomex.TransportError("x", "body", True), "network"),
    "slow connect": (pomex.TransportTimeout("x", "connect", False), "timeout"),
    "stall": (pomex.TransportTimeout("x", "body", True), "timeout"),
    "garbage": (pomex.UpstreamError("x"), "no_answer"),
    "client": (pomex.BadRequest("x"), "bad_request"),
    "gateway": (pomex.GatewayError("x"), "bad_request"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_every_failure_has_a_row_in_the_table(name):
    error, fault = ERRORS[name]
    assert pomex.fault_class(error) == fault and fault in pomex.RETRY_POLICIES


# --- cooldown -------------------------------------------------------------------------------------

def test_a_target_is_left_out_after_enough_failures_and_for_longer_each_time():
    health = pomex.CircuitBreakers()
    assert [health.record_failure("a", "overload", None, now) for now in (0.0, 0.1, 0.2)] == [0, 0, 5.0]
    assert health.state("a", 5.1) == "open" and health.state("a", 5.3) == "half-open"
    assert health.record_failure("a", "overload", None, 6.0) == 10.0        # the probe failed
    assert health.record_failure("a", "overload", None, 7.0) == 0           # one that had been under way
    for expected in (20.0, 40.0, 60.0, 60.0):
        assert health.record_failure("a", "overload", None, health.circuits["a"].until) == expected
    assert health.record_success("a") and health.state("a", 1000.0) == "closed"
    assert not health.record_success("a")
    assert health.record_failure("a", "overload", None, 2000.0) == 0


def test_quota_and_credentials_leave_a_target_out_at_once_and_for_long():
    health = pomex.CircuitBreakers()
    assert health.record_failure("a", "quota", 1.0, 0.0) == 600.0 and health.record_failure("b", "auth", None, 0.0) == 600.0
    assert health.record_failure("c", "rate_limit", 30.0, 0.0) == 30.0            # it said so
    assert health.record_failure("d", "rate_limit", 1.0, 0.0) == 0


def test_one_request_probes_while_the_others_stay_away():
    health, now = pomex.CircuitBreakers(), 700.0
    health.record_failure("a", "quota", None, 0.0)
    probe = health.probe("a", now)
    assert probe is not None and health.state("a", now) == "open" and health.probe("a", now) is None
    probe.probing = False                                           # its client left: somebody else may
    assert health.state("a", now) == "half-open"
    assert health.probe("b", now) is None                           # never failed: no probe, just requests


def test_where_all_are_left_out_the_one_that_is_back_first_is_asked():
    health, ways = pomex.CircuitBreakers(), [way("a"), way("b"), way("c")]
    for name, fault in (("a", "quota"), ("b", "auth"), ("c", "quota")):
        health.record_failure(f"{name}:m", fault, None, {"a": 5.0, "b": 1.0, "c": 8.0}[name])
    assert health.choose(ways, 10.0).id == "b:m"
    assert health.choose([], 10.0) is None
    health.record_success("c:m")
    assert health.choose(ways, 10.0).id == "c:m"
    assert health.degraded(10.0)
    assert [row[:3] for row in health.rows(10.0)] == [("a:m", "open", "quota"), ("b:m", "open", "auth"), ("c:m", "closed", "")]


# --- affinity -------------------------------------------------------------------------------------

def way(name, model="m", key=""):
    provider = pomex.ProviderConfig(name, wire_api="chat", base_url="http://x", api_key=key)
    return pomex.Candidate(provider, model, f"{name}:{model}", name)


def request(**body):
    return pomex.parse_request(json.dumps({"model": "x/y", "input": "hi", **body}).encode())


def sealed(envelope, provider, model="m"):
    return {"type": "reasoning", "summary": [], "encrypted_content": envelope.seal(provider, model, {"x": 1})}


TIER = [way(name) for name in "abcde"]
ASKED, ENVELOPE = request(), pomex.Envelope(SECRET, "1")


def home(conversation, lost=(), items=(), ways=TIER, state=""):
    """Where the gateway sends the next request of a conversation."""
    health = pomex.CircuitBreakers()
    for each in lost:
        health.record_failure(f"{each}:m", "quota", None, 0.0)
    asked = dataclasses.replace(ASKED, body={"prompt_cache_key": conversation}, input=list(items))
    order = pomex.order_candidates([ways], (), asked, pomex.Headers([("x-codex-turn-state", state)] if state else []), ENVELOPE)
    return health.choose(order, 1.0).provider.name


def test_of_ten_thousand_conversations_only_those_of_a_lost_target_move():
    envelope = pomex.Envelope(SECRET, "1")
    replies = {name: [sealed(envelope, name)] for name in "abcde"}
    before = {f"c{n}": home(f"c{n}") for n in range(10_000)}
    shares = collections.Counter(before.values())
    assert all(1800 < share < 2200 for share in shares.values()), shares
    during = {c: home(c, lost="b", items=replies[where]) for c, where in before.items()}
    moved = [c for c in before if during[c] != before[c]]
    assert moved == [c for c in before if before[c] == "b"] and len(moved) == shares["b"]
    assert all(400 < share < 600 for share in collections.Counter(during[c] for c in moved).values())
    after = {c: home(c, items=replies[during[c]]) for c in before}
    assert after == during                                          # b is back: who runs elsewhere stays there
    assert {c: home(c) for c in before} == before                   # new ones return
    assert {c: home(c, ways=TIER[::-1]) for c in list(before)[:500]} == {c: before[c] for c in list(before)[:500]}


def test_the_turn_state_wins_over_the_newest_envelope_and_that_over_the_hash():
    envelope = pomex.Envelope(SECRET, "1")
    state = pomex.turn_state(envelope, TIER[3])
    older, newer = sealed(envelope, "a"), sealed(envelope, "c")
    assert home("x", items=[older, newer], state=state) == "d"
    assert home("x", items=[older, newer]) == "c"
    foreign = sealed(pomex.Envelope(SECRET, "2"), "e")              # another account's is no evidence
    assert home("x", items=[newer, foreign, {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}]) == "c"
    hashed = home("x")
    for forged in ("pmt1.AAAA", "pmt1.é", pomex.turn_state(pomex.Envelope(SECRET, "2"), TIER[3]), "d", state[:-1], "x" * 5000):
        assert home("x", state=forged) == hashed
    assert home("x", items=[newer], lost="c") not in "c"
    assert "d" not in re.sub(r"^pmt1\.", "", base64.urlsafe_b64encode(b"").decode()) and len(state) < 40


def test_an_earlier_tier_comes_first_but_a_running_conversation_stays_in_the_later():
    envelope, tiers = pomex.Envelope(SECRET, "1"), [[way("a")], [way("b"), way("c")]]
    orders = {tuple(w.provider.name for w in pomex.order_candidates(tiers, (), request(prompt_cache_key=str(n)), HEADERS,
                                                                             envelope)) for n in range(20)}
    assert orders == {("a", "b", "c"), ("a", "c", "b")}
    running = request(input=[{"type": "message", "role": "user", "content": "hi"}, sealed(envelope, "c")])
    assert [w.provider.name for w in pomex.order_candidates(tiers, (), running, HEADERS, envelope)][0] == "c"


def test_a_conversation_is_known_by_its_key_its_session_or_its_beginning():
    first, said = {"type": "message", "role": "user", "content": "hi"}, {"type": "message", "role": "assistant", "content": "ho"}
    more = {"type": "message", "role": "user", "content": "and?"}
    of = pomex.conversation_of
    assert of(request(prompt_cache_key="k"), HEADERS) == "k"
    assert of(request(), pomex.Headers([("session_id", "s")])) == "s" == of(request(), pomex.Headers([("session-id", "s")]))
    assert of(request(input=[first]), HEADERS) == of(request(input=[first, said, more]), HEADERS)
    assert of(request(input=[first]), HEADERS) != of(request(input=[more]), HEADERS)
    assert pomex.rendezvous_score("k\ud800", TIER[0])


def test_every_key_of_a_provider_is_a_target_of_its_own():
    config = pomex.load_config('[providers.openai]\napi_keys = ["env:A", "env:B", "env:A"]\n'
                               '[providers.anthropic]\napi_keys = ["one", "two"]\nmodels = ["*"]\n'
                               '[models."x/y"]\ntargets = [["openai:gpt-5.5", "anthropic:claude-opus-5"], "anthropic:claude-sonnet-5-5"]\n',
                               "pomex.toml", {"A": "key-a", "B": "key-b"})
    assert config.providers["openai"].key_source == "env:A, env:B" and "key-a" not in repr(config)
    tiers = pomex.ModelCatalog(config, {}).tiers("x/y")
    assert [[w.provider.api_key for w in tier] for tier in tiers] == [["key-a", "key-b", "one", "two"], ["one", "two"]]
    assert len({w.id for tier in tiers for w in tier}) == 6 and not any("key" in w.id for tier in tiers for w in tier)
    a, b, one, two = tiers[0]
    assert a.origin != b.origin and a.origin.startswith("openai#")      # blobs of OpenAI are the account's
    assert one.origin == two.origin == "anthropic"                      # those of this model any account can read
    assert {w.origin for w in tiers[1]} & {"anthropic"} == set()        # but not of this one
    assert [w.id.partition(":")[2] for w in pomex.ModelCatalog(config, {}).tiers("openai/whatever")[0]] == ["*", "*"]
    assert pomex.ModelCatalog(config, {}).targets("x/y")[4][1] == "claude-sonnet-5-5"


@pytest.mark.parametrize("text,complaint", [
    ('env_key = "A"\napi_keys = ["x"]', "has both env_key and api_keys; keep one"),
    ('api_keys = ["env:C"]', "that variable is not set"),
    ('api_keys = ["sec ret"]', r"\(hidden\): the key is empty, or has a space"),
    ('api_keys = "x"', r"\(hidden\): must be a list of strings")])
def test_a_list_of_keys_is_checked_like_one(text, complaint):
    with pytest.raises(pomex.ConfigError, match=complaint) as caught:
        pomex.load_config(f"[providers.openai]\n{text}\n", "pomex.toml", {"A": "x"})
    assert "sec ret" not in str(caught.value)


# --- the loop, over a scripted upstream on loopback ------------------------------------------------

def sse(*events, named=False):
    return b"".join((f"event: {e['type']}\n" if named else "").encode() + f"data: {json.dumps(e)}\n\n".encode() for e in events)


MESSAGE = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
           "content": [{"type": "output_text", "text": "hi", "annotations": [], "logprobs": []}]}
PART = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
RESPONSE = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": "in_progress", "output": [], "usage": None}
COUNTS = {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, "output_tokens": 3,
          "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 10}
FINAL = {**RESPONSE, "status": "completed", "output": [MESSAGE], "usage": COUNTS}


def numbered(*events):
    return [{**event, "sequence_number": n} for n, event in enumerate(events)]


RESPONSES = numbered(
    {"type": "response.created", "response": RESPONSE}, {"type": "response.in_progress", "response": RESPONSE},
    {"type": "response.output_item.added", "output_index": 0, "item": {**MESSAGE, "status": "in_progress", "content": []}},
    {"type": "response.content_part.added", **PART, "part": {"type": "output_text", "text": "", "annotations": [], "logprobs": []}},
    {"type": "response.output_text.delta", **PART, "delta": "hi", "logprobs": []},
    {"type": "response.output_text.done", **PART, "text": "hi", "logprobs": []},
    {"type": "response.content_part.done", **PART, "part": MESSAGE["content"][0]},
    {"type": "response.output_item.done", "output_index": 0, "item": MESSAGE},
    {"type": "response.completed", "response": FINAL})
CHAT = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}, {"choices": [{"index": 0, "delta": {"content": "hi"}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}]
MESSAGES = [
    {"type": "message_start", "message": {"id": "m", "role": "assistant", "content": [], "usage": {"input_tokens": 7, "output_tokens": 1}}},
    {"type": "ping"}, {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}}, {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}}, {"type": "message_stop"}]
GEMINI = [{"candidates": [{"content": {"role": "model", "parts": [{"text": "hi"}]}}]},
          {"candidates": [{"content": {"role": "model", "parts": []}, "finishReason": "STOP"}],
           "usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 3, "totalTokenCount": 10}}]
SILENT = {"chat": CHAT[:1], "messages": MESSAGES[:2], "gemini": [{"candidates": [{"content": {"role": "model", "parts": []}}]}],
          "responses": RESPONSES[:2], "bytes": RESPONSES[:2]}       # an answer that begins without output
STREAMED = {"chat": CHAT, "messages": MESSAGES, "gemini": GEMINI, "responses": RESPONSES, "bytes": RESPONSES}
WHOLE = {"chat": {"choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
                  "usage": {"prompt_tokens": 7, "completion_tokens": 3}},
         "messages": {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn",
                      "usage": {"input_tokens": 7, "output_tokens": 3}},
         "gemini": {**GEMINI[1], "candidates": [{**GEMINI[0]["candidates"][0], "finishReason": "STOP"}]}, "responses": FINAL, "bytes": FINAL}
INBAND = {"chat": {"error": {"message": "Overloaded", "type": "server_error", "code": 529}},
          "messages": {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
          "gemini": {"error": {"code": 503, "status": "UNAVAILABLE", "message": "Overloaded"}},
          "responses": {"type": "error", "sequence_number": 2, "code": "server_is_overloaded", "message": "Overloaded"},
          "bytes": {"type": "response.failed", "sequence_number": 2, "response": {
              **RESPONSE, "status": "failed", "error": {"code": "server_error", "message": "Overloaded"}}}}
WIRES = list(STREAMED)


def http(status, body, kind="application/json", *more, length=None):
    head = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(body) if length is None else length}", *more]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def stream(body, end=b"0\r\n\r\n", *more):
    head = ["HTTP/1.1 200 OK", "content-type: text/event-stream", "transfer-encoding: chunked", *more]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + b"".join(pomex.chunk(each) for each in [body] if each) + end


def good(wire, streaming):
    return stream(sse(*STREAMED[wire])) if streaming else http(200, json.dumps(WHOLE[wire]).encode())


STALL = b"stall"            # after these bytes nothing more comes
HTML = b"<html><title>502 Bad Gateway</title><p>nginx</html>"
ERROR_CLASSES = {
    "closes": lambda wire, streaming: b"",
    "half a head": lambda wire, streaming: b"HTTP/1.1 200 O",
    "no HTTP": lambda wire, streaming: b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "never answers": lambda wire, streaming: STALL,
    "429": lambda wire, streaming: http(429, b'{"error":{"message":"slow down","type":"rate_limit_error"}}', "application/json", "retry-after: 20"),
    "402": lambda wire, streaming: http(402, b'{"error":{"message":"pay"}}'),
    "401": lambda wire, streaming: http(401, b'{"error":{"message":"bad key sk-upstream-1234567"}}'),
    "404": lambda wire, streaming: http(404, b'{"error":{"message":"no such model"}}'),
    "500": lambda wire, streaming: http(500, b""),
    "502 in HTML": lambda wire, streaming: http(502, HTML, "text/html"),
    "529": lambda wire, streaming: http(529, b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'),
    "a redirect": lambda wire, streaming: http(302, b"", "text/plain", "location: http://169.254.169.254/"),
    "HTML with 200": lambda wire, streaming: http(200, HTML, "text/html; charset=utf-8"),
    "HTML that says it is the answer": lambda wire, streaming: http(200, HTML, "text/event-stream" if streaming else "application/json"),
    "an empty body": lambda wire, streaming: http(200, b"", "text/event-stream" if streaming else "application/json"),
    "an empty object": lambda wire, streaming: http(200, b"{}"),
    "a body that is cut": lambda wire, streaming: http(200, b'{"choices":[', length=1000),
    "an unknown coding": lambda wire, streaming: http(200, b"xxxx", "text/event-stream", "content-encoding: br"),
    "bad gzip": lambda wire, streaming: http(200, gzip.compress(json.dumps(WHOLE[wire]).encode())[:-9] + b"123456789", "application/json",
                                             "content-encoding: gzip"),
    "an error with 200": lambda wire, streaming: http(200, json.dumps({"error": {"message": "Overloaded", "code": 529}}).encode()),
    "only comments": lambda wire, streaming: stream(b": ping\n\n: ping\n\n"),
    "garbage": lambda wire, streaming: stream(b'event: response.created\ndata: {"type":"response.created", not json\n\n' * 3),
    "a begin, then the end": lambda wire, streaming: stream(sse(*SILENT[wire])),
    "a begin, then a cut": lambda wire, streaming: stream(sse(*SILENT[wire]), b""),
    "a begin, then silence": lambda wire, streaming: stream(sse(*SILENT[wire]), b"") + STALL,
    "a begin, then an error": lambda wire, streaming: stream(sse(*SILENT[wire], INBAND[wire])),
    "a begin, an error, then silence": lambda wire, streaming: stream(sse(*SILENT[wire], INBAND[wire]), b"") + STALL,
    "a begin, then a bad chunk": lambda wire, streaming: stream(sse(*SILENT[wire]), b"zz\r\n"),
}


class Scripted:
    """A provider for each name in the path; each call gets the next of its answers, the last one for ever."""

    def __init__(self, **answers):
        self.answers = {name: list(each) if isinstance(each, list) else [each] for name, each in answers.items()}
        self.calls, self.open = [], 0
        self.heads, self.bodies = [], []

    async def serve(self, reader, writer):
        self.open += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.bodies.append(await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1])))
                name = re.match(r"POST /(\w+)/", head)[1]
                self.calls.append(name)
                self.heads.append(head)
                answers = self.answers[name]
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                if callable(answer):
                    await answer(writer)
                    continue
                stalls = answer.endswith(STALL)
                writer.write(answer.removesuffix(STALL))
                if stalls:
                    await reader.read()
                if not answer.startswith(b"HTTP/1.1") or not answer.endswith((b"0\r\n\r\n", b"}")):
                    break
        writer.close()
        self.open -= 1


@contextlib.asynccontextmanager
async def gateway(scripted, providers, path, targets=None, server="", fields=""):
    """A gateway over {provider: wire}; the model x/m has them all as targets, one after the other."""
    upstream = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
    port = upstream.sockets[0].getsockname()[1]
    text = f"[server]\nport = 0\n{server}\n"
    for name, wire in providers.items():
        relay = '\nrelay = "bytes"' if wire == "bytes" else ""
        to = 1 if name == "refused" else port
        text += (f'[providers.{name}]\nwire_api = "{wire.replace("bytes", "responses")}"{relay}\nbase_url = "http://127.0.0.1:{to}/{name}"\n'
                 f"{fields or f'first_byte_timeout_s = {QUICK}{chr(10)}idle_timeout_s = {QUICK}'}\n")
    text += f"[models.\"x/m\"]\ntargets = {targets or json.dumps([f'{name}:m' for name in providers])}\n"
    config = pomex.load_config(text, "pomex.toml", {})
    with contextlib.closing(pomex.Ledger.open(str(path / "pomex.db"))) as ledger:
        token = await ledger.create_key("k", time.time())
        async with pomex.running(config, ledger) as running:
            yield lambda **more: ask(running, token, **more), ledger, config
    upstream.close()


async def rows_of(ledger, count=1):
    """The newest rows, as soon as there are so many."""
    for _ in range(100):
        if len(rows := recent(ledger, 100)) >= count:
            return rows
        await asyncio.sleep(0.01)
    raise AssertionError("no row")


async def begin(server, token, body=None, stream=True, window=0, **headers):
    client = socket.socket()
    if window:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    client.connect(tuple(server.address))
    reader, writer = await asyncio.open_connection(sock=client)
    payload = json.dumps({"model": "x/m", "input": "hello", "stream": stream, **(body or {})}).encode()
    fields = {"host": "127.0.0.1", "authorization": f"Bearer {token}", "content-length": str(len(payload)), "connection": "close", **headers}
    writer.write(("POST /v1/responses HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items())).encode() + b"\r\n" + payload)
    return reader, writer


async def ask(server, token, leave=False, path="", **more):
    if path:
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
    else:
        reader, writer = await begin(server, token, **more)
    if leave:
        return reader, writer
    head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    if b"transfer-encoding: chunked" in head:
        sizes, rest, whole = True, rest, b""
        while sizes:
            size, _, rest = rest.partition(b"\r\n")
            sizes = int(size, 16)
            whole, rest = whole + rest[:sizes], rest[sizes + 2:]
        rest = whole
    lines = head.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(each.split(": ", 1) for each in lines[1:]), rest


def run(main):
    async def whole():
        before = len(asyncio.all_tasks())
        await asyncio.wait_for(main(), 20)
        await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks()) <= before
    asyncio.run(whole())


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(pomex, "BACKOFF_S", 0.002)


def text_of(response):
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


async def fault_is_invisible(wire, streaming, path):
    """Every fault, each with a second target: the client sees one whole answer, and nothing else."""
    names = {f"f{n}": fault for n, fault in enumerate(ERROR_CLASSES)}
    scripted = Scripted(**{name: ERROR_CLASSES[fault](wire, streaming) for name, fault in names.items()}, well=good(wire, streaming))
    seen = {}
    async with gateway(scripted, dict.fromkeys([*names, "refused", "well"], wire), path) as (ask, ledger, config):
        for name in [*names, "refused"]:
            model = f"x/{name}"
            config.models[model] = pomex.ModelConfig(model, ((pomex.Target(name, "m"),), (pomex.Target("well", "m"),)))
            scripted.calls.clear()
            status, headers, body = await ask(stream=streaming, body={"model": model})
            response = check(body, relayed=wire == "bytes") if streaming else json.loads(body)
            assert (status, response["status"], text_of(response)) == (200, "completed", "hi"), (names.get(name, name), body)
            assert headers["x-pomex-provider"] == "well"
            made = len(scripted.calls) + (2 if name == "refused" else 0)
            assert headers["x-pomex-attempts"] == str(made) and made <= 3, (names.get(name), scripted.calls, headers)
            seen[names.get(name, name)] = made
        rows = await rows_of(ledger, len(seen))
        assert len(rows) == len(seen) and {row["status"] for row in rows} == {"completed"}
        assert {row["input"] for row in rows} == {7}
    return seen


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("wire", WIRES)
def test_every_fault_before_output_is_invisible_where_there_is_a_second_target(wire, streaming, tmp_path):
    run(lambda: fault_is_invisible(wire, streaming, tmp_path))


@pytest.mark.parametrize("wire", WIRES)
def test_after_output_nothing_is_spliced(wire, tmp_path):
    cut = {"chat": 2, "messages": 4, "gemini": 1, "responses": 5, "bytes": 5}[wire]

    async def main():
        ends = [b"", b"0\r\n\r\n", STALL, b"zz\r\n", pomex.chunk(sse(INBAND[wire])) + b"0\r\n\r\n"]
        scripted = Scripted(a=[stream(sse(*STREAMED[wire][:cut]), end) for end in ends], b=good(wire, True))
        async with gateway(scripted, {"a": wire, "b": wire}, tmp_path) as (ask, ledger, config):
            for n, end in enumerate(ends):
                config.models[f"x/{n}"] = pomex.ModelConfig(f"x/{n}", ((pomex.Target("a", f"m{n}"),), (pomex.Target("b", "m"),)))
                status, headers, body = await ask(body={"model": f"x/{n}"})
                response = check(body, relayed=wire == "bytes")
                assert (status, response["status"]) == (200, "failed") and len(re.findall(rb'"delta": ?"hi"', body)) == 1, (end, body)
                assert headers["x-pomex-attempts"] == "1"
        assert scripted.calls == ["a"] * len(ends)
    run(main)


def test_a_target_that_breaks_every_stream_it_begins_is_left_out(tmp_path):
    """Its beginnings are no answers: or else a client would be sent back to it until it gives up."""
    async def main():
        broken = stream(sse(*CHAT[:2]), b"")
        scripted = Scripted(a=broken, b=good("chat", True))
        async with gateway(scripted, {"a": "chat", "b": "chat"}, tmp_path) as (ask, _, __):
            ends = [check((await ask())[2])["status"] for _ in range(5)]
        assert ends == ["failed", "failed", "failed", "completed", "completed"]
        assert "".join(scripted.calls) == "aaabb"
    run(main)


def test_a_target_that_gives_output_again_is_in_use_and_stays_on_probation():
    health = pomex.CircuitBreakers()
    health.record_failure("a", "rate_limit", 10.0, 0.0)
    assert health.probe("a", 20.0) is not None and health.state("a", 20.0) == "open"     # others keep away
    assert health.record_success("a", whole=False) and not health.record_success("a", whole=False) and health.state("a", 20.0) == "closed"
    assert health.record_failure("a", "network", None, 21.0) == 10.0 and health.state("a", 21.0) == "open"      # at once, and for longer
    assert health.probe("a", 40.0) is not None and health.record_success("a", whole=False)
    assert not health.record_success("a")            # that it is back was said before
    assert health.record_failure("a", "network", None, 41.0) == 0.0 and health.state("a", 41.0) == "closed"


def test_without_streaming_failover_goes_on_to_the_end(tmp_path):
    """What a client does not see until it is whole can still be had elsewhere."""
    async def main():
        half = http(200, json.dumps(WHOLE["chat"]).encode()[:-20], length=500)
        scripted = Scripted(a=half, b=stream(sse(*CHAT[:2]), b""), c=good("chat", False))
        async with gateway(scripted, dict.fromkeys("abc", "chat"), tmp_path) as (ask, _, _):
            status, headers, body = await ask(stream=False)
            assert scripted.calls == list("aabbc")
            assert status == 200 and text_of(json.loads(body)) == "hi" and headers["x-pomex-attempts"] == "5"
    run(main)


def test_at_most_six_upstream_calls_and_one_sentence_about_them(tmp_path, caplog):
    caplog.set_level("INFO", "pomex")

    async def main():
        scripted = Scripted(**{name: ERROR_CLASSES["529"]("messages", True) for name in "abcdefgh"})
        async with gateway(scripted, dict.fromkeys("abcdefgh", "messages"), tmp_path) as (ask, ledger, _):
            status, headers, body = await ask()
            error = json.loads(body)["error"]
            assert len(scripted.calls) == 6 and (await rows_of(ledger))[0]["attempts"] == 6
            assert (status, error["code"]) == (503, "upstream_unavailable")
            assert error["message"] == ("a: 529 overloaded (2 tries): Overloaded; b: 529 overloaded (2 tries): Overloaded; "
                                        "c: 529 overloaded (2 tries): Overloaded. No provider left.")
    run(main)
    assert "via a x 529 (2 tries), b x 529 (2 tries), c x 529, c " in caplog.text


TOLD = {
    "mixed": (["refused", "529"], {}, 503, "upstream_unavailable",
              r"refused: connection refused \(127\.0\.0\.1:1, 2 tries\); b: 529 overloaded \(3 tries\): Overloaded\. No provider left\.", None),
    "mixed, to Codex": (["refused", "529"], {"originator": "codex_exec"}, 200, "server_error", r".*No provider left\.", None),
    "all rate limited": (["429", "429"], {}, 429, "rate_limit_exceeded", r"a: 429 rate limited: slow down; b: 429 rate limited: slow down\. No provider left\.", "20"),
    "one of them rate limited": (["402", "429"], {}, 503, "upstream_unavailable", r"a: 402 quota used up: pay; b: 429 rate limited: slow down\. .*", "20"),
    "all rate limited, to Codex": (["429", "429"], {"originator": "codex_exec"}, 200, "rate_limit_exceeded", r".*try again in 20s\.", None),
    "one target, one try": (["401"], {}, 502, "server_error", r"The provider refused the gateway's credentials\.", None),
    "no model": (["404", "404"], {}, 404, "model_not_found", r"b has no model .*", None),
}


@pytest.mark.parametrize("name", TOLD)
def test_who_is_left_without_a_provider_is_told_what_was_tried(name, tmp_path):
    faults, headers, status, code, message, wait = TOLD[name]

    async def main():
        scripted = Scripted(**{n: ERROR_CLASSES[f]("chat", True) for n, f in zip("ab", faults) if f != "refused"})
        names = ["refused" if fault == "refused" else n for n, fault in zip("ab", faults)]
        async with gateway(scripted, dict.fromkeys(names, "chat"), tmp_path) as (ask, _, _):
            got, fields, body = await ask(**headers)
            error = check(body, codex=True)["error"] if got == 200 else json.loads(body)["error"]
            assert error["code"] == code and re.fullmatch(message, error["message"]), error
            if name != "no model":
                assert got == status
            assert fields.get("retry-after") == wait
    run(main)


WORDS = {"error_code": 7, "error_msg": "the moon is down, sk-abcdefgh1234"}
SAID = {
    "whole": lambda: http(200, json.dumps(WORDS).encode()),
    "data": lambda: stream(sse(WORDS)),
    "event: error": lambda: stream(b"event: error\n" + sse(WORDS)),
    "500": lambda: http(500, json.dumps(WORDS).encode()),
}


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("wire", WIRES)
def test_the_words_of_an_unknown_error_reach_answer_and_log_after_several_tries(wire, said, tmp_path, caplog):
    async def main():
        scripted = Scripted(a=SAID[said](), b=SAID[said]())
        async with gateway(scripted, dict.fromkeys("ab", wire), tmp_path) as (ask, _, _):
            status, _, body = await ask()
            message = json.loads(body)["error"]["message"]
            assert (status, len(scripted.calls)) == (503, 5) and message.count("the moon is down, [redacted]") == 2, message
    run(main)
    assert caplog.text.count("the moon is down, [redacted]") >= 5 and "sk-abcdefgh1234" not in caplog.text


def empty(wire, streaming, tokens):
    """An answer that ends as it should, holds nothing, and whose usage counts `tokens` of input and none of output."""
    words = {"chat": ("prompt_tokens", "completion_tokens"), "gemini": ("promptTokenCount", "candidatesTokenCount")}
    usage = dict(zip(words.get(wire, ("input_tokens", "output_tokens")), (tokens, 0)))
    whole = {"chat": {"choices": [{"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}], "usage": usage},
             "messages": {**WHOLE["messages"], "content": [], "usage": usage},
             "gemini": {"candidates": [{"content": {"role": "model"}, "finishReason": "STOP"}], "usageMetadata": usage},
             "responses": {**FINAL, "output": [], "usage": usage}}[wire.replace("bytes", "responses")]
    if not streaming:
        return http(200, json.dumps(whole).encode())
    end = {"chat": [CHAT[0], CHAT[2], {"choices": [], "usage": usage}], "gemini": [whole],
           "messages": [{"type": "message_start", "message": {"id": "m", "usage": usage}},
                        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 0}}, MESSAGES[-1]],
           "responses": [*RESPONSES[:2], {"type": "response.completed", "sequence_number": 2, "response": whole}]}
    return stream(sse(*end[wire.replace("bytes", "responses")]))


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("wire", WIRES)
def test_an_empty_answer_that_counts_no_output_is_no_success(wire, streaming, tmp_path):
    async def main():
        scripted = Scripted(a=[empty(wire, streaming, 5), empty(wire, streaming, 0)], b=good(wire, streaming),
                            alone=empty(wire, streaming, 5), nothing=empty(wire, streaming, 0))
        async with gateway(scripted, {"a": wire, "b": wire}, tmp_path) as (ask, ledger, _):
            status, _, body = await ask(stream=streaming)
            assert status == 200 and scripted.calls == ["a", "a", "b"]
            assert text_of(check(body, relayed=wire == "bytes") if streaming else json.loads(body)) == "hi"
            await rows_of(ledger)
            given_up, = lost(ledger)            # what counts nothing costs nothing
            assert [given_up[name] for name in ("provider", "input", "output", "estimated", "attempt")] == ["a", 5, 0, "", 1]
        for name, tokens in (("alone", 5), ("nothing", 0)):
            home = tmp_path / name
            home.mkdir()
            async with gateway(scripted, {name: wire}, home) as (ask, ledger, _):
                status, _, body = await ask(stream=streaming)
                response = check(body) if streaming else json.loads(body)
                assert (status, response.get("status")) == ((200, "failed") if streaming else (502, None))
                assert "no valid answer (2 tries)" in response["error"]["message"]
                row = (await rows_of(ledger))[0]
                assert (row["status"], row["input"], row["output"], row["estimated"]) == ("failed", tokens, 0, "")
                assert [each["input"] for each in lost(ledger)] == [5] * bool(tokens)
    run(main)


@pytest.mark.parametrize("wire", ["chat", "responses", "messages", "gemini", "bytes"])
def test_a_usage_of_nothing_beside_an_answer_is_none(wire, tmp_path):
    nothing = {"chat": {"usage": {"prompt_tokens": 0, "completion_tokens": 0}}, "messages": {"usage": {"input_tokens": 0, "output_tokens": 0}},
               "gemini": {"usageMetadata": {"promptTokenCount": 0, "candidatesTokenCount": 0}}}
    whole = {**WHOLE[wire], **nothing.get(wire, {"usage": {"input_tokens": 0, "output_tokens": 0}})}

    async def main():
        async with gateway(Scripted(a=http(200, json.dumps(whole).encode())), {"a": wire}, tmp_path) as (ask, ledger, _):
            status, _, body = await ask(stream=False)
            row = (await rows_of(ledger))[0]
            assert (status, row["estimated"], row["input"] > 0) == (200, "no count from the provider", True)
    run(main)


def test_a_bad_request_is_asked_once_and_told_as_it_is(tmp_path):
    async def main():
        scripted = Scripted(a=http(400, b'{"error":{"message":"temperature is wrong","param":"temperature"}}'), b=good("chat", True))
        async with gateway(scripted, dict.fromkeys("ab", "chat"), tmp_path) as (ask, _, _):
            status, _, body = await ask()
            assert status == 400 and json.loads(body)["error"]["message"] == "temperature is wrong" and scripted.calls == ["a"]
    run(main)


@pytest.mark.parametrize("wire", ["bytes", "responses"])
def test_sealed_reasoning_that_its_provider_refuses_is_left_out_once(wire, tmp_path):
    """Another organisation's ciphertext would make every later turn of the conversation fail."""
    refused = http(400, b'{"error":{"message":"The encrypted content gAAA... could not be verified.","type":"invalid_request_error","code":null}}')

    async def main():
        scripted = Scripted(a=[refused, good(wire, True)])
        async with gateway(scripted, {"a": wire}, tmp_path) as (ask, ledger, _):
            said = {"type": "message", "role": "user", "content": "hi"}
            key = pomex.Envelope(ledger.secret, "default")
            old = {"type": "reasoning", "summary": [], "encrypted_content": key.seal("a", "m", {"encrypted_content": "gAAAA"})}
            status, headers, body = await ask(body={"input": [said, old, said]})
            assert (status, check(body, relayed=wire == "bytes")["status"]) == (200, "completed")
            assert headers["x-pomex-attempts"] == "2" and "encrypted_content:refused" in headers["x-pomex-dropped"]
            assert b"gAAAA" in scripted.bodies[0] and b"gAAAA" not in scripted.bodies[1] and b"hi" in scripted.bodies[1]
    run(main)


def test_a_context_that_is_too_long_goes_only_to_a_larger_window(tmp_path):
    async def main():
        long = http(400, b'{"error":{"message":"too long","code":"context_length_exceeded"}}')
        scripted = Scripted(openai=long, mistral=good("chat", True))
        targets = '["openai:gpt-5.3-codex", "mistral:ministral-3b-latest", "mistral:mistral-large-4"]'
        async with gateway(scripted, {"openai": "chat", "mistral": "chat"}, tmp_path, targets=targets) as (ask, ledger, _):
            status, _, body = await ask()
            assert status == 200 and (await rows_of(ledger))[0]["upstream_model"] == "mistral-large-4"
            assert scripted.calls == ["openai", "mistral"]
    run(main)


def test_a_lost_target_is_left_out_shown_and_probed_by_one(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "pomex")
    monkeypatch.setitem(pomex.RETRY_POLICIES, "quota", pomex.RETRY_POLICIES["quota"]._replace(open_s=0.2))

    async def main():
        slow = asyncio.Event()

        async def answers_late(writer):
            await slow.wait()
            writer.write(good("chat", True))
        scripted = Scripted(a=[ERROR_CLASSES["402"]("chat", True), answers_late, good("chat", True)], b=good("chat", True))
        async with gateway(scripted, dict.fromkeys("ab", "chat"), tmp_path, fields="idle_timeout_s = 5") as (ask, _, _):
            word = lambda answer: json.loads(answer[2])["checks"]["targets"]          # noqa: E731
            assert word(await ask(path="/ready")) == "ok"
            await ask()
            await ask()
            assert scripted.calls == ["a", "b", "b"]                # the second asked b at once
            assert (await ask(path="/ready"))[0] == 200 and word(await ask(path="/ready")) == "degraded"
            counted = (await ask(path="/metrics"))[2].decode()
            for line in ('circuit_state{target="a:m"} 2', 'failovers_total{provider="a",fault="quota"} 1',
                         'upstream_attempts_total{provider="a",result="quota"} 1', 'upstream_attempts_total{provider="b",result="ok"} 2'):
                assert f"pomex_{line}\n" in counted
            await asyncio.sleep(0.21)
            probe = asyncio.ensure_future(ask())
            await asyncio.sleep(0.03)
            await asyncio.gather(ask(), ask())
            assert scripted.calls == ["a", "b", "b", "a", "b", "b"]
            slow.set()
            assert (await probe)[1]["x-pomex-provider"] == "a" and word(await ask(path="/ready")) == "ok"
            await ask()
            assert scripted.calls[-1] == "a"
    run(main)
    assert "circuit of a:m is open for 0 s: quota used up" in caplog.text and "circuit of a:m is closed again" in caplog.text


def stumbles(*_, **__):
    raise KeyError("PROMPT-TEXT")


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("place", ["close_open_items", "output", "feed"])
def test_where_an_answer_cannot_be_told_there_is_an_end_and_a_row(place, streaming, tmp_path, monkeypatch, caplog):
    """A fault of our own, wherever it strikes: one terminal event or a status, one row, and no word of the text in the log."""
    monkeypatch.setattr(pomex.TranslatedStream if place == "feed" else pomex.Assembler, place, stumbles)
    monkeypatch.setattr(pomex.TranslatedStream, "whole", stumbles if place == "feed" else pomex.TranslatedStream.whole)

    async def main():
        async with gateway(Scripted(a=good("chat", streaming)), {"a": "chat"}, tmp_path) as (ask, ledger, _):
            status, _, body = await ask(stream=streaming)
            if status == 200:
                assert check(body)["status"] == "failed" and b"could not read the provider" in body
            else:
                assert status == 502 and json.loads(body)["error"]["code"] == "server_error", body
            assert (status == 200) == (streaming and place != "feed")
            (row,) = await rows_of(ledger)
            assert row["status"] == "failed" and (place == "feed" or (row["input"], row["output"]) == (7, 3))
    run(main)
    assert "a fault of Pomex itself, KeyError in " in caplog.text
    assert "PROMPT-TEXT" not in caplog.text and "Traceback" not in caplog.text


def test_what_an_encoder_stumbles_over_blames_no_target_and_praises_none(tmp_path, monkeypatch, caplog):
    async def main():
        scripted = Scripted(a=[ERROR_CLASSES["401"]("chat", True), good("chat", True)], b=good("chat", True))
        async with gateway(scripted, dict.fromkeys("ab", "chat"), tmp_path) as (ask, ledger, _):
            await ask()                                 # a is left out by its own fault
            with monkeypatch.context() as patch:
                patch.setitem(pomex.WIRES, "chat", pomex.WIRES["chat"]._replace(encode=stumbles))
                for _ in range(4):
                    status, _, body = await ask()
                    assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_type")
            assert scripted.calls == ["a", "b"]
            await ask()
            assert scripted.calls == ["a", "b", "b"] and len(await rows_of(ledger, 6)) == 6
    run(main)
    assert "circuit of b" not in caplog.text and "closed again" not in caplog.text


def test_a_refusal_of_the_request_itself_shows_that_its_target_answers():
    router, target = pomex.Router(None, collections.Counter()), way("a")
    router.on_failure(target, pomex.provider_error(401, pomex.Headers([]), b"", 0.0), 0.0)
    router.on_failure(target, pomex.BadRequest("our own word"), 1.0)
    assert router.health.state(target.id, 1.0) == "open"
    router.on_failure(target, pomex.provider_error(400, pomex.Headers([]), b"", 0.0), 1.0)
    assert router.health.state(target.id, 1.0) != "open"


@pytest.mark.parametrize("refusal", [ERROR_CLASSES["404"]("chat", True), http(403, b'{"error":{"message":"not for you"}}')])
def test_a_name_that_a_client_made_up_leaves_no_target_out(refusal, tmp_path):
    async def main():
        scripted = Scripted(a=refusal)
        async with gateway(scripted, {"a": "chat"}, tmp_path) as (ask, _, _):
            for n in range(3):
                await ask(body={"model": f"a/made-up-{n}"})
            assert json.loads((await ask(path="/ready"))[2])["checks"]["targets"] == "ok"
    run(main)


def test_codex_gets_a_turn_state_that_brings_it_back(tmp_path):
    async def main():
        scripted = Scripted(**{name: good("chat", True) for name in "abc"})
        codex = {"originator": "codex_exec"}
        async with gateway(scripted, dict.fromkeys("abc", "chat"), tmp_path, targets='[["a:m", "b:m", "c:m"]]') as (ask, _, _):
            states = {}
            for n in range(30):
                _, headers, _ = await ask(body={"prompt_cache_key": str(n)}, **codex)
                states[headers["x-pomex-provider"]] = headers["x-codex-turn-state"]
            assert set(states) == set("abc") and len(set(states.values())) == 3
            for name, state in states.items():
                for n in range(3):
                    _, headers, _ = await ask(body={"prompt_cache_key": str(n)}, **codex, **{"x-codex-turn-state": state})
                    assert headers["x-pomex-provider"] == name
            assert "x-codex-turn-state" not in (await ask())[1]                 # nobody else knows it
            assert not any("turn-state" in head for head in scripted.heads)     # and it is nobody else's affair
    run(main)


def test_failover_goes_on_behind_an_early_200(tmp_path):
    async def main():
        for n, (last, status) in enumerate([(good("chat", True), "completed"), (ERROR_CLASSES["529"]("chat", True), "failed")]):
            (tmp_path / str(n)).mkdir()
            scripted = Scripted(a=ERROR_CLASSES["never answers"]("chat", True), b=ERROR_CLASSES["a begin, then silence"]("chat", True), c=last)
            async with gateway(scripted, dict.fromkeys("abc", "chat"), tmp_path / str(n), server="early_200_after_s = 0.1\nheartbeat_s = 0.1") as (ask, _, _):
                got, headers, body = await ask(originator="codex_exec")
                response = check(body, codex=True)
                assert got == 200 and response["status"] == status and body.count(b"event: response.in_progress") > 1
                assert "x-pomex-provider" not in headers and "x-codex-turn-state" not in headers     # not known when they went
                assert set(scripted.calls) == set("abc")
    run(main)


def drips(head, every_s=0.003):
    """An answer whose body goes on for ever."""
    async def answer(writer):
        with contextlib.suppress(OSError):
            writer.write(head)
            while not writer.is_closing():
                writer.write(b"5\r\n: x\n\n\r\n")
                await writer.drain()
                await asyncio.sleep(every_s)
    return answer


def endless(begin, frame):
    """A stream that goes on for ever: `frame` is what it repeats, or gives the frame of a number."""
    make = frame if callable(frame) else lambda number: frame

    async def answer(writer):
        with contextlib.suppress(OSError):
            writer.write(b"".join([*begin, faults.chunk(make(1))]))
            await asyncio.sleep(0.05)
            for start in itertools.count(2, 50):
                if writer.is_closing():
                    break
                writer.write(faults.chunk(b"".join(map(make, range(start, start + 50)))))
                await writer.drain()
                await asyncio.sleep(0)
    return answer


def flood(wire, kind):
    """(what the answer begins with, what it repeats): text in an item, or items one behind the other."""
    played = faults.WIRES[wire.replace("bytes", "responses")]
    at, frame = faults.text_frame(played, b'"%s"' % (b"x" * 100))
    if wire == "bytes":
        frame = re.sub(rb'"sequence_number":\d+,', b"", frame)
    if kind == "text":
        return faults.begun(played, at + 1), frame
    if played.name == "chat":
        return faults.begun(played, at), lambda number: sse({"choices": [{"index": 0, "delta": {"tool_calls": [
            {"id": f"call_{number}", "index": number, "type": "function", "function": {"name": "f", "arguments": '{"n":1}'}}]}}]})
    if played.name == "gemini":
        return faults.begun(played, 1), sse({"candidates": [{"content": {"parts": [{"functionCall": {"name": "f", "args": {}}}]}}]})
    if played.name == "messages":
        return faults.begun(played, 1), lambda number: sse(
            {"type": "content_block_start", "index": number, "content_block": {"type": "tool_use", "id": f"toolu_{number}", "name": "f", "input": {}}},
            {"type": "content_block_stop", "index": number})
    item = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "shell", "arguments": '{"n":1}', "status": "completed"}
    return faults.begun(played, 2), lambda number: sse(
        *[{"type": f"response.output_item.{kind}", "output_index": number, "item": {**item, "id": f"fc_{number}", "call_id": f"call_{number}"}}
          for kind in ("added", "done")])


@pytest.mark.parametrize("wire", ["chat", "messages", "gemini", "responses", "bytes"])
@pytest.mark.parametrize("kind, streaming", [("text", True), ("items", True), ("text", False), ("items", False)])
def test_an_endless_answer_is_ended_kept_billed_and_not_asked_for_again(wire, kind, streaming, tmp_path):
    begin, frame = flood(wire, kind)

    async def main():
        scripted = Scripted(a=endless(begin, frame), b=good("chat", True))
        limits = "max_answer_chars = 100000\nmax_answer_items = 20"
        async with gateway(scripted, {"a": wire, "b": "chat"}, tmp_path, server=limits, fields="idle_timeout_s = 5") as (ask, ledger, _):
            status, headers, body = await ask(stream=streaming)
            [row] = await rows_of(ledger)
            assert scripted.calls == ["a"] and (row["status"], row["error_code"], row["terminal_by"]) == ("failed", "server_error", "gateway" * streaming)
            assert row["output"] > 0 and row["input"] > 0 and (row["estimated"] or wire == "gemini")       # which counts in every chunk
            if not streaming:
                assert status == 502 and "max_answer_chars = 100000" in json.loads(body)["error"]["message"]
                assert headers["x-should-retry"] == "false"
                return
            response = check(body, relayed=wire == "bytes")
            assert (status, response["status"], response["error"]["code"]) == (200, "failed", "server_error")
            assert "max_answer_items = 20 in [server] allow" in response["error"]["message"]
            assert len(response["output"]) <= 20 and len(body) < 1_000_000
            assert kind == "text" or len(response["output"]) > 5, "what was finished is kept"
    run(main)


@pytest.mark.parametrize("kind, streaming", [("text", True), ("items", False), ("text", False)])
@pytest.mark.parametrize("wire", ["chat", "bytes"])
def test_an_answer_that_comes_whole_has_the_same_limits(wire, kind, streaming, tmp_path):
    whole = json.loads(json.dumps(faults.WIRES[wire.replace("bytes", "responses")].whole))
    if wire == "chat":
        message = whole["choices"][0]["message"]
        message.update({"content": "x" * 200_000} if kind == "text" else {"tool_calls": message["tool_calls"] * 30})
    else:
        whole["output"] = [{**whole["output"][0], "content": [{"type": "output_text", "text": "x" * 200_000, "annotations": []}]}] \
            if kind == "text" else whole["output"] * 30

    async def main():
        scripted = Scripted(a=http(200, json.dumps(whole).encode()), b=good("chat", True))
        async with gateway(scripted, {"a": wire, "b": "chat"}, tmp_path, server="max_answer_chars = 100000\nmax_answer_items = 20") as (ask, ledger, _):
            status, _, body = await ask(stream=streaming)
            [row] = await rows_of(ledger)
            assert scripted.calls == ["a"] and (row["status"], row["error_code"]) == ("failed", "server_error") and row["input"] > 0
            assert status == 502 and "max_answer_chars" in json.loads(body)["error"]["message"]        # no stream had begun
    run(main)


IDLE = {        # what a provider may send for ever without saying anything
    "comments": b": OPENROUTER PROCESSING\n\n", "pings": b'event: ping\ndata: {"type": "ping"}\n\n',
    "keepalives": b'event: keepalive\ndata: {"type":"keepalive","sequence_number":3}\n\n',
    "chunks without anything": sse({"id": "c1", "choices": [{"index": 0, "delta": {}, "finish_reason": None}]}),
}


@pytest.mark.parametrize("wire", ["chat", "messages", "gemini", "responses", "bytes"])
@pytest.mark.parametrize("name", IDLE)
@pytest.mark.parametrize("limit", ["idle_timeout_s", "total_timeout_s"])
def test_who_only_pings_is_idle_and_a_flood_moves_no_deadline(wire, name, limit, tmp_path):
    if wire not in ("chat",) and name.startswith("chunks") or wire not in ("responses", "bytes") and name == "keepalives":
        pytest.skip("no such thing there")
    played = faults.WIRES[wire.replace("bytes", "responses")]

    async def main():
        scripted = Scripted(a=endless(faults.begun(played, played.output + 3), IDLE[name]))
        fields = f"idle_timeout_s = 0.3\ntotal_timeout_s = {9 if limit.startswith('idle') else 0.3}"
        async with gateway(scripted, {"a": wire}, tmp_path, fields=fields) as (ask, ledger, _):
            begun = time.monotonic()
            _, _, body = await ask()
            assert 0.2 < time.monotonic() - begun < 2
            assert f"{limit} = 0.3 s while reading" in check(body, relayed=wire == "bytes")["error"]["message"]
    run(main)


def test_an_answer_that_goes_on_behind_its_end_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(pomex, "AFTER_STOP_S", 0.3)

    async def main():
        scripted = Scripted(a=drips(stream(sse(*CHAT[:3]), b"")))
        async with gateway(scripted, {"a": "chat"}, tmp_path, fields="idle_timeout_s = 5") as (ask, _, _):
            begun = time.monotonic()
            status, _, body = await ask()
            assert (status, check(body)["status"]) == (200, "completed") and 0.25 < time.monotonic() - begun < 2
    run(main)


@pytest.mark.parametrize("status, fault", [(503, "overload"), (402, "quota")])
@pytest.mark.parametrize("cut", [True, False])
def test_what_an_errors_status_says_does_not_wait_for_its_body(status, fault, cut, tmp_path, monkeypatch):
    monkeypatch.setattr(pomex, "AFTER_STOP_S", 0.2)
    head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n" % status

    async def main():
        scripted = Scripted(a=head + b"5\r\n{\"err" if cut else drips(head), b=good("chat", True))
        async with gateway(scripted, dict.fromkeys("ab", "chat"), tmp_path) as (ask, _, _):
            begun = time.monotonic()
            got, headers, _ = await ask()
            assert (got, headers["x-pomex-provider"]) == (200, "b") and time.monotonic() - begun < 3
            counted = (await ask(path="/metrics"))[2].decode()
            assert re.search(rf'pomex_upstream_attempts_total\{{provider="a",result="{fault}"\}} \d', counted), counted
    run(main)


def test_a_provider_that_was_mended_or_taken_away_is_not_held_to_its_past(tmp_path):
    async def main():
        scripted = Scripted(a=ERROR_CLASSES["401"]("chat", True), b=good("chat", True))
        async with gateway(scripted, dict.fromkeys("ab", "chat"), tmp_path) as (ask, _, config):
            await ask()
            assert json.loads((await ask(path="/ready"))[2])["checks"]["targets"] == "degraded"
            upstream = pomex.ConnectionPool()
            old = pomex.Gateway(config, pomex.Ledger.open(str(tmp_path / "other.db")), upstream, {})
            for id in ("a:m", "a#1234abcd:m", "b:m"):
                old.router.health.record_failure(id, "auth", None, 0.0)
            providers = {**config.providers, "a": pomex.dataclasses.replace(config.providers["a"], api_key="mended")}
            new = pomex.Gateway(pomex.dataclasses.replace(config, providers=providers), old.ledger, upstream, {}, old)
            assert list(new.router.health.circuits) == ["b:m"]
            gone = pomex.dataclasses.replace(config, providers={"a": providers["a"]}, models={})
            assert not pomex.Gateway(gone, old.ledger, upstream, {}, new).router.health.circuits
            old.ledger.close()
    run(main)


def test_when_the_gateway_has_no_more_files_no_target_is_to_blame(tmp_path, monkeypatch):
    async def no_room(*_):
        raise OSError(errno.EMFILE, "")
    monkeypatch.setattr(pomex, "open_connection", no_room)

    async def main():
        async with gateway(Scripted(a=b"", b=b""), dict.fromkeys("ab", "chat"), tmp_path) as (ask, _, _):
            status, headers, body = await ask()
            assert (status, headers["retry-after"]) == (503, "1") and b"no room for another connection" in body
            assert json.loads((await ask(path="/ready"))[2])["checks"]["targets"] == "ok"
    run(main)


def test_codes_of_providers_choice_make_no_endless_series(tmp_path):
    async def main():
        wrong = [http(400, json.dumps({"error": {"message": "no", "code": f"code{n}"}}).encode()) for n in range(100)]
        async with gateway(Scripted(a=wrong), {"a": "chat"}, tmp_path) as (ask, _, _):
            for _ in range(100):
                await ask()
            counted = re.findall(r'^pomex_requests_total\{.*outcome="(\w+)"\} (\d+)$', (await ask(path="/metrics"))[2].decode(), re.M)
            assert counted == [("failed", "100")]
    run(main)


def test_a_request_has_one_deadline_for_all_its_tries(tmp_path):
    async def main():
        scripted = Scripted(a=ERROR_CLASSES["never answers"]("chat", True), b=ERROR_CLASSES["a begin, then silence"]("chat", True))
        async with gateway(scripted, dict.fromkeys("ab", "chat"), tmp_path, server="request_deadline_s = 0.4",
                           fields="idle_timeout_s = 0.25\nfirst_byte_timeout_s = 0.25") as (ask, ledger, _):
            begun = time.monotonic()
            status, _, body = await ask()
            assert 0.35 < time.monotonic() - begun < 0.8 and status == 504, body
            assert "a: no answer in 0.25 s" in body.decode() and scripted.calls == ["a", "b"]
            assert json.loads((await ask(path="/ready"))[2])["checks"]["targets"] == "ok"      # its own limit was not reached
    run(main)


LEAVING = {                 # phase -> what the upstream does, and whether the provider's answer had begun
    "waiting for the head": (STALL, 0),
    "before output": (stream(sse(*CHAT[:1]), b"") + STALL, 0),
    "stalled after output": (stream(sse(*CHAT[:2]), b"") + STALL, 1),
    "pinged": (stream(b": ping\n\n" + sse(*CHAT[:2]), b"") + STALL, 1),
    "backing off": (http(429, b'{"error":{"message":"later"}}', "application/json", "retry-after: 2"), 0),
}


@pytest.mark.parametrize("phase", LEAVING)
def test_when_the_client_leaves_the_upstream_is_closed_and_the_rest_is_billed(phase, tmp_path):
    answer, begun = LEAVING[phase]

    async def main():
        scripted = Scripted(a=answer)
        server = "early_200_after_s = 0.1\nheartbeat_s = 0.1" if phase == "pinged" else ""
        async with gateway(scripted, {"a": "chat"}, tmp_path, server=server, fields="idle_timeout_s = 5") as (ask, ledger, _):
            for streaming in (True, False):
                count = len(recent(ledger, 9))
                reader, writer = await ask(leave=True, stream=streaming)
                await asyncio.sleep(0.25 if phase == "pinged" else 0.1)
                assert len(scripted.calls) == count + 1 and (scripted.open == 1 or phase == "backing off")
                writer.close()
                left = time.monotonic()
                row = (await rows_of(ledger, count + 1))[0]
                while scripted.open and phase != "backing off":
                    assert time.monotonic() - left < 1.0, "it is still open"
                    await asyncio.sleep(0.01)
                assert (row["status"], row["attempts"]) == ("cancelled", 1)
                assert row["output"] == begun and row["estimated"] or phase == "backing off"
    run(main)


@pytest.mark.parametrize("phase", LEAVING)
def test_when_the_gateway_stops_in_any_phase_the_client_gets_its_terminal_event(phase, tmp_path):
    async def main():
        scripted, codex = Scripted(a=LEAVING[phase][0]), {"originator": "codex_exec"}
        async with gateway(scripted, {"a": "chat"}, tmp_path, fields="idle_timeout_s = 5") as (ask, _, _):
            waiting = asyncio.ensure_future(ask(**codex))
            await asyncio.sleep(0.1)
        status, _, body = await waiting
        assert status == 200 and check(body, codex=True)["status"] == "failed"
    run(main)


def test_a_pooled_connection_that_breaks_counts_among_the_six(tmp_path):
    async def main():
        async def breaks(writer):
            writer.close()
        scripted = Scripted(a=[good("chat", False), breaks])
        async with gateway(scripted, {"a": "chat"}, tmp_path) as (ask, _, _):
            await ask(stream=False)                 # leaves a connection in the pool
            status, _, body = await ask(stream=False)
            assert status >= 500 and len(scripted.calls) <= 1 + 6
    run(main)


def test_demo_flaky_shows_a_second_try(tmp_path, caplog):
    caplog.set_level("INFO", "pomex")

    async def main():
        async with gateway(Scripted(), {}, tmp_path, targets="[]") as (ask, _, _):
            status, headers, body = await ask(body={"model": "demo/flaky"})
            assert status == 200 and headers["x-pomex-attempts"] == "2" and check(body)["status"] == "completed"
            assert json.loads((await ask(path="/ready"))[2])["checks"]["targets"] == "ok"
    run(main)
    assert "via demo x 529, demo" in caplog.text


def test_heartbeats_do_not_disturb_a_client_that_is_slow_to_take(tmp_path):
    """Only one may wait for a connection at a time: a heartbeat that waited too would leave the stream waiting for ever."""
    async def main():
        piece = sse({"choices": [{"index": 0, "delta": {"content": "x" * 60_000}}]})
        body = sse(CHAT[0]) + piece * 60 + sse(*CHAT[2:])
        scripted = Scripted(a=stream(body))
        async with gateway(scripted, {"a": "chat"}, tmp_path, server="early_200_after_s = 0.1\nheartbeat_s = 0.1", fields="idle_timeout_s = 5") as (ask, _, _):
            reader, writer = await ask(leave=True, window=65536)
            await asyncio.sleep(0.4)                # several heartbeats would have been due
            got = b""
            while data := await reader.read(1 << 20):
                got += data
            assert got.endswith(b"0\r\n\r\n") and got.count(b"response.completed") >= 1
            writer.close()
    run(main)


