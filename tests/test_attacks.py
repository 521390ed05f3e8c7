"""What a hostile client can send to a running gateway (RELIABILITY.md 1, 4, 5): always an answer below 500, never a second
one, nothing of it unescaped in a log line, a header, a URL or SQL, and nobody else is kept waiting."""
import asyncio
import base64
import contextlib
import gzip
import json
import logging
import re
import sqlite3
import time
import types
import urllib.parse

import pytest

import pomex
import sinks
from ledgers import read

UPSTREAM_KEY = "sk-upstream-0123456789abcdef"
HEAD = "POST /v1/responses HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
CONFIG = """
[server]
port = 0
header_timeout_s = 0.4
body_timeout_s = 0.4
max_body_bytes = 8000000
[database]
url = "sqlite:pomex.db"
[providers.chat]
wire_api = "chat"
base_url = "{url}/v1"
api_key = "{secret}"
[providers.claude]
wire_api = "messages"
base_url = "{url}/v1"
api_key = "{secret}"
[providers.gemini]
wire_api = "gemini"
base_url = "{url}/v1beta"
api_key = "{secret}"
[providers.relayed]
wire_api = "responses"
relay = "bytes"
base_url = "{url}/v1"
api_key = "{secret}"
"""


class Gateway:
    """A gateway and an upstream that remembers what it was sent, and refuses all of it with an echo."""

    def __init__(self, server, key, log):
        self.server, self.key, self.log, self.seen = server, key, log, []

    async def upstream(self, reader, writer):
        try:
            while True:
                top = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", top)[1]))
                self.seen.append((top, body))
                echo = json.dumps({"error": {"message": f"bad {top.decode('latin-1')}", "code": "x"}}).encode()
                writer.write(b"HTTP/1.1 401 No\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(echo) + echo)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    async def raw(self, data, wait_s=5.0, close=False):
        """All bytes that come back; of a connection that stays open what came until it was silent for 0.3 s."""
        reader, writer = await asyncio.open_connection(*self.server.address)
        pieces = []
        try:
            for piece in data if isinstance(data, list) else [data]:
                writer.write(piece if isinstance(piece, bytes) else piece.encode("latin-1"))
                await writer.drain()
                if isinstance(data, list):
                    await asyncio.sleep(0.03)
            if close:
                writer.write_eof()
            end = time.monotonic() + wait_s
            while time.monotonic() < end:
                piece = await asyncio.wait_for(reader.read(65536), wait_s if not pieces else 0.3)
                if not piece:
                    break
                pieces.append(piece)
        except (TimeoutError, ConnectionError):
            pass
        writer.transport.abort()
        return b"".join(pieces)

    async def post(self, body, *lines):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = HEAD.format(key=self.key) + "connection: close\r\n" + "".join(line + "\r\n" for line in lines) + f"content-length: {len(data)}\r\n\r\n"
        return await self.raw(head.encode("latin-1") + data)

    async def alive(self):
        assert (await self.raw("GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")


def play(folder, scenario):
    lines = []

    class Log(logging.Handler):
        def emit(self, record):
            lines.extend(text for _, text in getattr(record, "lines", [(0, logging.Formatter("%(message)s").format(record))]))
    handler = Log()

    async def main():
        gateway = Gateway(None, "", lines)
        up = await asyncio.start_server(gateway.upstream, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{up.sockets[0].getsockname()[1]}"
        config = pomex.load_config(CONFIG.format(url=url, secret=UPSTREAM_KEY), str(folder / "pomex.toml"), {})
        ledger = pomex.Ledger.open(config.database.place)
        gateway.key = await ledger.create_key("laptop", time.time())
        async with pomex.running(config, ledger) as gateway.server:
            await scenario(gateway)
            await gateway.alive()
        ledger.close()
        up.close()
        text = "\n".join(lines)
        assert "Traceback" not in text, text[-3000:]
        assert gateway.key not in text and UPSTREAM_KEY not in text
        assert not [line for line in lines if re.search(r"[\x00-\x1f\x7f-\x9f]", line)], lines
    pomex.log.addHandler(handler)
    pomex.log.setLevel(logging.INFO)
    try:
        asyncio.run(asyncio.wait_for(main(), 60))
    finally:
        pomex.log.removeHandler(handler)


def statuses(answer):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


SMUGGLED = "GET /v1/evil HTTP/1.1\r\nhost: localhost\r\n\r\n"
POST = "POST /v1/responses HTTP/1.1\r\nhost: localhost\r\n"
FRAMING = {     # -> what may be answered, once, before the connection is closed
    "CL and TE": POST + "content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE and CL": POST + "transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two lengths": POST + "content-length: 0\r\ncontent-length: 44\r\n\r\n" + SMUGGLED,
    "a list of lengths": POST + "content-length: 0, 44\r\n\r\n" + SMUGGLED,
    "plus": POST + "content-length: +0\r\n\r\n" + SMUGGLED, "minus": POST + "content-length: -0\r\n\r\n" + SMUGGLED,
    "underscore": POST + "content-length: 1_0\r\n\r\n" + SMUGGLED, "hex": POST + "content-length: 0x0\r\n\r\n" + SMUGGLED,
    "huge": POST + "content-length: 99999999999999999999\r\n\r\n" + SMUGGLED,
    "blank inside": POST + "content-length: 1 0\r\n\r\n" + SMUGGLED,
    "nbsp": POST + "content-length: \xa00\r\n\r\n" + SMUGGLED, "vt": POST + "transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "xchunked": POST + "transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked twice": POST + "transfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked, identity": POST + "transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "identity": POST + "transfer-encoding: identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two TE": POST + "transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    ", chunked": POST + "transfer-encoding: , chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "TE in 1.0": POST.replace("1.1", "1.0") + "transfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "blank before colon": POST + "transfer-encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "folded": POST + "transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "LF only": (POST + "content-length: 0\r\n\r\n").replace("\r\n", "\n") + SMUGGLED,
    "CR only": POST + "x: y\rcontent-length: 44\r\n\r\n" + SMUGGLED,
    "NUL": POST + "x: y\0\r\ncontent-length: 0\r\n\r\n" + SMUGGLED,
    "chunk with sign": POST + "transfer-encoding: chunked\r\n\r\n+0\r\n\r\n" + SMUGGLED,
    "chunk with 0x": POST + "transfer-encoding: chunked\r\n\r\n0x0\r\n\r\n" + SMUGGLED,
    "chunk with LF": POST + "transfer-encoding: chunked\r\n\r\n0\n\n" + SMUGGLED,
    "chunk's end": POST + "transfer-encoding: chunked\r\n\r\n2\r\nabXX0\r\n\r\n" + SMUGGLED,
    "extension with LF": POST + "transfer-encoding: chunked\r\n\r\n0;a\n\r\n\r\n" + SMUGGLED,
    "no Host": "GET /health HTTP/1.1\r\n\r\n", "two Hosts": "GET /health HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n",
    "Host with a path": "GET /health HTTP/1.1\r\nhost: localhost/x\r\n\r\n", "Host with ?": "GET /health HTTP/1.1\r\nhost: localhost?x\r\n\r\n",
    "Host with @": "GET /health HTTP/1.1\r\nhost: a@localhost\r\n\r\n", "HTTP/1.10": "GET /health HTTP/1.10\r\nhost: localhost\r\n\r\n",
    "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "0.9": "GET /health\r\n\r\n", "blank before": " GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "two blanks": "GET  /health HTTP/1.1\r\nhost: localhost\r\n\r\n", "fragment": "GET /health#x HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "raw quote": "GET /he\"alth HTTP/1.1\r\nhost: localhost\r\n\r\n", "CONNECT": "CONNECT evil:443 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "long line": "GET /" + "a" * 9000 + " HTTP/1.1\r\nhost: localhost\r\n\r\n", "endless line": "G" * 100_000,
    "many headers": "GET /health HTTP/1.1\r\nhost: localhost\r\n" + "a: b\r\n" * 200 + "\r\n",
    "long header": "GET /health HTTP/1.1\r\nhost: localhost\r\na: " + "b" * 100_000 + "\r\n\r\n",
    "TLS": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "binary": "\x00\x01\x02\xff" * 50,
}


def test_broken_framing_is_answered_once_and_the_connection_closed(tmp_path):
    async def scenario(gateway):
        wrong = {}

        async def attack(name, data):
            answer = await gateway.raw(data)
            if not (len(statuses(answer)) == 1 and 400 <= statuses(answer)[0] < 506 and statuses(answer)[0] != 500
                    and b"connection: close" in answer and b"evil" not in answer):
                wrong[name] = answer[:300]

        def splinters(data):
            size = max(1, len(data) // 9)
            return [data[at:at + size] for at in range(0, len(data), size)]
        await asyncio.gather(*(attack(name, form) for name, data in FRAMING.items() for form in (data, splinters(data))))
        assert not wrong
    play(tmp_path, scenario)


def test_foreign_hosts_are_refused_and_the_own_names_taken(tmp_path):
    async def scenario(gateway):
        for host, status in {"evil.example": 421, "localhost.evil.example": 421, "127.0.0.1.evil": 421, "10.0.0.1": 421,
                             "127.0.0.1:1": 200, "[::1]": 200, "LOCALHOST": 200, "localhost:": 200}.items():
            answer = await gateway.raw(f"GET /health HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")
            assert statuses(answer) == [status], (host, answer)
        answer = await gateway.raw("GET http://evil.example/health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert statuses(answer) == [421]
    play(tmp_path, scenario)


def test_slow_senders_are_cut_by_a_total_limit_and_keep_nobody_waiting(tmp_path):
    async def scenario(gateway):
        async def drip(start, piece):
            reader, writer = await asyncio.open_connection(*gateway.server.address)
            began = time.monotonic()
            writer.write(start.encode())
            read = asyncio.ensure_future(reader.read(-1))
            while not read.done():
                writer.write(piece)
                await asyncio.wait({read}, timeout=0.05)
            writer.transport.abort()
            return (await read), time.monotonic() - began
        body = HEAD.format(key=gateway.key)
        slow = [drip("GET /health HTTP/1.1\r\n", b"x: y\r\n"), drip("", b"A"), drip(body + "content-length: 1000000\r\n\r\n", b" "),
                drip(body + "transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n")]
        idle = [await asyncio.open_connection(*gateway.server.address) for _ in range(500)]
        for _, writer in idle[::2]:
            writer.write(b"POST /v1/responses HT")
        began = time.monotonic()
        await gateway.alive()
        assert time.monotonic() - began < 0.5
        for answer, seconds in await asyncio.gather(*slow):
            assert statuses(answer) == [408] and seconds < 3, (answer, seconds)
        for _, writer in idle:
            writer.transport.abort()
    play(tmp_path, scenario)


BLOCKED_S = 2.0         # so long may one body keep the loop busy, on a slow machine


def nested(depth):
    return b'{"model":"chat/m","input":' + b"[" * depth + b"]" * depth + b"}"


BODIES = {
    "deep arrays": nested(100_000), "deep and large": nested(3_900_000), "deep objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "unclosed": b"[" * 7_000_000, "huge integer": b'{"model":"chat/m","input":"x","max_output_tokens":' + b"9" * 5000 + b"}",
    "huge exponent": b'{"model":"chat/m","input":"x","temperature":1e999999}', "NaN": b'{"model":"chat/m","input":"x","temperature":NaN}',
    "Infinity": b'{"model":"chat/m","input":"x","top_p":-Infinity}', "not UTF-8": b'{"model":"chat/m","input":"\xff\xfe"}',
    "UTF-16": json.dumps({"model": "chat/m", "input": "x"}).encode("utf-16"), "BOM": b'\xef\xbb\xbf{"model":"chat/m","input":"x"}',
    "array": b"[]", "number": b"1", "nothing": b"", "null input": b'{"model":"chat/m","input":null}',
    "model a list": b'{"model":["chat/m"],"input":"x"}', "model an object": b'{"model":{"$gt":""},"input":"x"}',
    "input of numbers": b'{"model":"chat/m","input":[1,2]}', "tools a string": b'{"model":"chat/m","input":"x","tools":"y"}',
    "tools of nulls": b'{"model":"chat/m","input":"x","tools":[null]}', "stream a string": b'{"model":"chat/m","input":"x","stream":"yes"}',
    "wrong roles": b'{"model":"chat/m","input":[{"type":"message","role":7,"content":{"a":1}}]}',
    "long model": b'{"model":"chat/' + b"m" * 1_000_000 + b'","input":"x"}', "empty keys": b'{"":{"":[]},"model":"chat/m","input":[{"":1}]}',
}
WORDS = {"CR LF": "a\r\nx-evil: 1\r\n\r\n", "escape": "\x1b[31m\x1b]0;evil\x07", "NUL": "a\0b", "surrogate": "\ud800", "C1": "\x9b31m",
         "line separators": "a\u2028b\x85c", "quotes": "a'\"`;--", "like": "%_%", "path": "../../etc?x=1#y", "format": "%s%n{0}{x}"}


def test_odd_bodies_are_refused_or_served_and_never_an_error_of_ours(tmp_path):
    async def scenario(gateway):
        wrong = {}
        for name, body in BODIES.items():
            for wire in (b"chat/", b"relayed/", b"gemini/"):
                began = time.monotonic()
                answer = await gateway.post(body.replace(b"chat/", wire))
                found = statuses(answer)
                if len(found) != 1 or found[0] == 500 or found[0] >= 500 and b"401" not in answer and b"provider" not in answer.lower() \
                        or time.monotonic() - began > BLOCKED_S:
                    wrong[name, wire] = answer[-300:], round(time.monotonic() - began, 2)
        assert not wrong
    play(tmp_path, scenario)


def test_what_a_caller_says_reaches_no_header_log_or_url_unescaped(tmp_path):
    async def scenario(gateway):
        for name, word in WORDS.items():
            text = json.dumps(word).encode()
            tool = {"type": "web_search_" + word, "name": word, "description": word, "parameters": {"type": "object", "x": word}}
            for wire in ("chat/", "gemini/", "relayed/"):
                for body in ({"model": wire + word, "input": word}, {"model": word, "input": word},
                             {"model": wire + "m", "input": [{"type": word, "role": word, "content": word}], "tools": [tool],
                              "metadata": {word: word}, "user": word, "prompt_cache_key": word, "service_tier": word, word: word}):
                    for streamed in (False, True):
                        answer = await gateway.post({**body, "stream": streamed}, "x-codex-turn-state: " + "v" * 50)
                        assert len(statuses(answer)) == 1 and statuses(answer)[0] != 500, (name, wire, answer[:500])
                        head = answer.partition(b"\r\n\r\n")[0]
                        assert b"x-evil" not in head and not re.search(rb"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]", head), head
                        assert UPSTREAM_KEY.encode() not in answer
            assert text     # (it is JSON)
        for top, _ in gateway.seen:
            line = top.split(b"\r\n")[0]
            assert re.fullmatch(rb"POST /(v1/(chat/completions|responses)|v1beta/models/[A-Za-z0-9%._~-]*:\w+(\?alt=sse)?) HTTP/1\.1", line), line
            assert b"x-evil" not in top.lower().replace(b"%0d%0ax-evil", b"")
    play(tmp_path, scenario)


def test_headers_of_a_caller_are_not_trusted(tmp_path):
    async def scenario(gateway):
        for value in ("x" * 200, "a b", "é", "\x80\xff", "sk-rh-\xe9", "'; DROP TABLE keys; --", "%0d%0aset-cookie: x"):
            for header in ("x-request-id", "authorization", "user-agent", "originator", "content-type", "x-codex-turn-state",
                           "accept-encoding", "traceparent", "session_id", "x-forwarded-for", "x-api-key", "cookie", "if-none-match"):
                for path in ("/v1/models", "/v1/models/" + "x" * 50, "/health", "/nothing"):
                    lines = HEAD.format(key=gateway.key) if header != "authorization" else "GET / HTTP/1.1\r\nhost: localhost\r\n"
                    data = re.sub(r"^\S+ \S+", f"GET {path}", lines) + f"{header}: {value}\r\nconnection: close\r\n\r\n"
                    answer = await gateway.raw(data.encode("latin-1"))
                    assert statuses(answer)[0] in (200, 304, 401, 404), (header, value, answer[:300])
                    assert b"set-cookie: x" not in answer.lower()
    play(tmp_path, scenario)


def test_compressed_bodies_cannot_grow_without_bound(tmp_path):
    async def scenario(gateway):
        bomb = gzip.compress(b" " * 200_000_000, 1)
        began = time.monotonic()
        assert statuses(await gateway.post(bomb, "content-encoding: gzip")) == [413]
        assert time.monotonic() - began < 3
        members = gzip.compress(b"") * 100_000
        assert statuses(await gateway.post(members, "content-encoding: gzip")) == [400]
        for coding in ("gzip, gzip", "br", "gzip\t;q=1", "compress", "x" * 100):
            assert statuses(await gateway.post(gzip.compress(b"{}"), f"content-encoding: {coding}")) == [415], coding
        assert statuses(await gateway.post(b"\x1f\x8b garbage", "content-encoding: gzip")) == [400]
        assert statuses(await gateway.post(gzip.compress(b'{"model":1}')[:-4], "content-encoding: gzip")) == [400]
    play(tmp_path, scenario)


def doubling(depth):
    """A tool whose schema names each definition twice: 2 ** depth, for who walks all of it."""
    ref = [{"$ref": f"#/$defs/d{n}"} for n in range(depth + 1)]
    defs = {f"d{n}": {"anyOf": [ref[n + 1], ref[n + 1]]} for n in range(depth)}
    return [{"type": "function", "name": "f", "parameters": {**ref[0], "$defs": defs}}]


COSTLY = {      # a body that is cheap to send -> what it may be answered
    "a schema that doubles": (lambda: {"model": "claude/m", "input": "x", "tools": doubling(40)}, 503),
    "runs just too short for an image": (lambda: {"model": "chat/m", "input": ";base64," + ("a" * 1023 + " ") * 4000}, 503),
    "many more items than a conversation has": (lambda: {"model": "chat/m", "input": [{}] * 100_001}, 400),
    "neighbours to be joined": (lambda: {"model": "chat/m", "input": [
        {"role": "user", "content": [{"type": "input_image", "image_url": "x"}] if n % 2 else "a"} for n in range(30_000)]}, 502),
    "millions of objects": (lambda: gzip.compress(b'{"model":"chat/m","input":[' + b"{}," * 2_500_000 + b"{}]}"), 413),
}


@pytest.mark.parametrize("name", COSTLY)
def test_what_is_cheap_to_send_is_cheap_to_answer(name, tmp_path):
    make, expected = COSTLY[name]

    async def scenario(gateway):
        body = make()
        began = time.monotonic()
        asked = asyncio.ensure_future(gateway.post(body, *["content-encoding: gzip"] * isinstance(body, bytes)))
        while not asked.done():
            looked = time.monotonic()
            await gateway.alive()
            assert time.monotonic() - looked < BLOCKED_S, "others waited"
        assert statuses(asked.result())[0] in (expected, 401, 502), asked.result()[:300]
        assert time.monotonic() - began < 3
    play(tmp_path, scenario)


@pytest.mark.parametrize("kind", ["text", "image", "thought"])
def test_neighbours_become_one_message_in_linear_time(kind):
    def encode(count):
        thought = {"type": "reasoning", "sealed_replay": {"reasoning_content": "a" * 500}}
        part = {"type": "input_text", "text": "b" * 500} if kind == "text" else \
            {"type": "input_image", "image_url": "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" * 3).decode()}
        item = thought if kind == "thought" else {"type": "message", "role": "user", "content": [part]}
        last = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}
        history = pomex.History([], pomex.gather_turns([*[item] * count, last]))
        began = time.perf_counter()
        ctx = types.SimpleNamespace(history=history, settings=pomex.DIALECTS["deepseek"], dropped=[])
        [message, *_] = pomex.ChatMessages(ctx).encode("")
        return time.perf_counter() - began, message
    took_s, message = encode(40_000)
    assert took_s < 1.0, "40,000 of them took minutes before"
    whole = message.get("reasoning_content") or message["content"]
    assert len(whole) == {"text": 40_000 * 502 - 2, "image": 40_000, "thought": 20_000_000}[kind]


@pytest.mark.parametrize("arguments", ["{}", '{"a": {"b": "%s"}' % ("x" * 2000)], ids=["none", "half"])
def test_calls_that_stay_open_are_not_read_again_whenever_another_begins(arguments):
    decoder = pomex.ChatDecoder(pomex.ToolMap([]), pomex.DIALECTS["generic"])
    decoder.sink = sinks.Recorder()
    began = time.perf_counter()
    for number in range(2000):
        call = {"index": number, "id": f"call_{number}", "function": {"name": "f", "arguments": arguments}}
        decoder.feed(json.dumps({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}))
    assert time.perf_counter() - began < 1.0, "2,000 of them took two to twenty seconds before"
    assert [name for name, *_ in decoder.sink.made].count("call") == 2000


def test_a_call_that_could_end_with_every_piece_is_not_read_again_with_every_piece():
    decoder = pomex.ChatDecoder(pomex.ToolMap([]), pomex.DIALECTS["generic"])
    decoder.sink = sinks.Recorder()
    began = time.perf_counter()
    for arguments in ['{"a": ["', *['{\\"x\\": 1}'] * 20_000, '"]}']:
        call = {"index": 0, "function": {"name": "f", "arguments": arguments}}
        decoder.feed(json.dumps({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}))
    assert time.perf_counter() - began < 2.0
    said = "".join(given[1] for name, given, _ in decoder.sink.made if name == "add")
    assert len(json.loads(said)["a"][0]) == 20_000 * 8


def test_the_values_of_a_long_body_are_counted_before_it_is_read():
    body = b'{"model":"chat/m","input":"x","metadata":[' + b"{}," * 3_000_000 + b"{}]}"
    began = time.perf_counter()
    with pytest.raises(pomex.BadRequest, match="more than 2000000 JSON values") as refused:
        pomex.parse_request(body)
    assert refused.value.status == 413 and time.perf_counter() - began < 0.3


@pytest.mark.parametrize("body, tokens", [
    (b'{"image_url":"data:image/png;base64,' + b"a" * 4096 + b'"}', 1500 + 9),
    (b'{"file_data":"' + b"a" * 4096 + b'"}', 1500 + 4),
    (b'{"file_data":"data:text/plain;base64,' + b"a" * 4096 + b'"}', 1500 + 9),
    (b'{"image_url":"data:image/png;base64,' + b"a" * 1000 + b'"}', 259),
    (b';base64,"' * 1_000_000, 2_250_000), (b";base64," * 1_000_000, 1502)], ids=range(6))
def test_the_estimate_of_a_request_takes_no_look_at_each_sign(body, tokens):
    began = time.perf_counter()
    assert pomex.weigh_input(body) // 4 == tokens
    assert time.perf_counter() - began < 1.0


SHAPES = ["hunter2hunter2hunter2", "4f9a8c7e" * 4, "my-gateway-token-of-team-7", "deadbeef", "p@ss/w0rd+x=y!", "task_execution",
          "x" * 290 + "-tail", UPSTREAM_KEY]
ECHOES = {      # what a provider does with its key (of a form) -> status, content type, body, by wire where they differ
    "an error": (400, lambda key, wire: {"error": {"message": f"bad {key} and {key[:3]} {key}", "code": key, "param": key, "type": key}}),
    "an error of status 429": (429, lambda key, wire: {"error": {"message": f"slow down, {key}", "code": key, "status": key}}),
    "an error of status 500": (500, lambda key, wire: {"error": key}), "a list": (422, lambda key, wire: {"detail": [{"loc": [key], "msg": key}]}),
    "a page": (500, lambda key, wire: f"<html><title>{key}</title></html>"), "a page for an answer": (200, lambda key, wire: f"<html>{key}"),
    "far behind": (400, lambda key, wire: {"error": {"message": "a" * 285 + key}}),
    "an error in the stream": (200, lambda key, wire: [{"type": "error", "error": {"type": "x", "code": key, "message": key, "param": key}}]),
    "its own words": (200, lambda key, wire: {
        "chat": [{"id": key, "choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": key, "type": "function", "function": {
            "name": "f", "arguments": "{}"}}]}}]}, {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}],
        "claude": [{"type": "message_start", "message": {"id": key, "usage": {}}}, {"type": "content_block_start", "index": 0, "content_block": {
            "type": "tool_use", "id": key, "name": "f", "input": {}}}, {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "refusal", "stop_details": {"explanation": key}}, "usage": {}}, {"type": "message_stop"}],
        "gemini": [{"responseId": key, "promptFeedback": {"blockReason": key, "blockReasonMessage": key}}],
    }.get(wire, [{"type": "response.created", "response": {"id": key, "status": "in_progress"}},
                 {"type": "response.failed", "response": {"id": key, "status": "failed", "error": {"code": key, "message": key}}}])),
}


def forms_of(key):
    raw = key.encode()
    return {"plain": key, "upper": key.upper(), "quoted": urllib.parse.quote(key, safe=""), "hex": raw.hex(),
            "HEX": raw.hex().upper(), "base64": base64.b64encode(raw).decode()}


@pytest.mark.parametrize("key", SHAPES, ids=lambda key: key[:12])
def test_a_provider_that_echoes_its_key_everywhere_is_not_heard(key, tmp_path, monkeypatch):
    """Neither by the client, nor in the log, the database, the pages' data or the metrics."""
    monkeypatch.setattr(pomex, "BACKOFF_S", 0.001)
    told = []

    async def upstream(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        wire = re.match(rb"\w+ /(\w+)/", head)[1].decode()
        if length := re.search(rb"(?i)content-length: (\d+)", head):
            await reader.readexactly(int(length[1]))
        status, make = now["echo"]
        body = make(now["form"], wire)
        kind, data = "application/json", json.dumps(body).encode()
        if isinstance(body, list):
            kind, data = "text/event-stream", b"".join(b"event: %s\ndata: %s\n\n" % (each.get("type", "message").encode(), json.dumps(each).encode()) for each in body)
        if isinstance(body, str):
            kind, data = "text/html", body.encode()
        writer.write(f"HTTP/1.1 {status} {now['form']}\r\ncontent-type: {kind}\r\nx-request-id: {now['form']}\r\nretry-after: 9{now['form']}\r\n"
                     f"connection: close\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        writer.close()
    now = {}

    async def scenario(gateway):
        up = await asyncio.start_server(upstream, "127.0.0.1", 0)
        port = up.sockets[0].getsockname()[1]
        text = f"[server]\nport = 0\nadmin_token = 'administrator-{key}'\n[database]\nurl = 'sqlite:{tmp_path}/echo.db'\n"
        for name, wire in (("chat", "chat"), ("claude", "messages"), ("gemini", "gemini"), ("plain", "responses"), ("relayed", "responses")):
            where = "http_headers = {'x-secret' = 'Token %s'}" % key if name == "gemini" else f"api_key = '{key}'"
            text += f"[providers.{name}]\nwire_api = '{wire}'\nbase_url = 'http://127.0.0.1:{port}/{name}'\n{where}\n" + "relay = 'bytes'\n" * (name == "relayed")
        config = pomex.load_config(text, str(tmp_path / "echo.toml"), {})
        ledger = pomex.Ledger.open(config.database.place)
        gateway.key, ours = await ledger.create_key("k", time.time()), gateway.server
        async with pomex.running(config, ledger) as gateway.server:
            count = 0
            for now["form"] in forms_of(key).values():
                for now["echo"] in ECHOES.values():
                    if now["form"] != key and now["echo"][0] == 500:
                        continue
                    for name in config.providers.keys() - {"demo"}:
                        gateway.server.gateway.router.health.circuits.clear()
                        told.append(await gateway.post({"model": f"{name}/m", "input": "x", "stream": count % 2 == 0}, *["originator: codex_exec"] * (count % 3 == 0)))
                        count += 1
            head = f"host: localhost:{gateway.server.address[1]}\r\nauthorization: Bearer administrator-{key}\r\nconnection: close\r\n\r\n"
            for path in ("metrics", "admin/api/usage?limit=500", "admin/api/usage.csv", "admin/api/overview", "admin/api/providers",
                         "admin/api/setup", "admin/api/audit"):
                told.append(await gateway.raw(f"GET /{path} HTTP/1.1\r\n{head}"))
                assert statuses(told[-1]) == [200], told[-1][:300]
            assert len(read(ledger, "SELECT id FROM usage WHERE final = 1")) > 50
            for response_id, in read(ledger, "SELECT response_id FROM usage WHERE detail <> '' GROUP BY status"):
                told.append(await gateway.raw(f"GET /admin/api/usage/{response_id} HTTP/1.1\r\n{head}"))
                assert statuses(told[-1]) == [200], told[-1][:300]
        ledger.close()
        with contextlib.closing(sqlite3.connect(config.database.place)) as db:
            told.append("\n".join(db.iterdump()).encode())
        assert all(f"CREATE TABLE {name} ".encode() in told[-1] for name in ("usage", "refusals", "settings", "counters"))
        up.close()
        gateway.server, told[:] = ours, [*told, "\n".join(gateway.log).encode()]
    play(tmp_path, scenario)
    everything = b"\n".join(told).decode("utf-8", "replace")
    for name, form in forms_of(key).items():
        places = [everything[found.start() - 150:found.end() + 20] for found in re.finditer(re.escape(form.rstrip("=")), everything, re.IGNORECASE)]
        assert not places, (name, len(places), places[:2])


@pytest.mark.parametrize("text", ["task_execution_failed: disk-usage-exceeded", "risk_assessment", "monkey-business-as-usual"])
def test_words_are_no_keys(text):
    assert str(pomex.classify_error({"message": text})) == text


@pytest.mark.parametrize("code", ["a b", "x" * 65, "", "<script>", "läuft", "a\nb", {"a": 1}])
def test_a_code_has_a_form_and_a_length(code):
    body = json.dumps({"error": {"message": "no", "code": code}}).encode()
    assert pomex.provider_error(400, pomex.Headers([]), body).code == "invalid_request_error"


def test_a_login_is_small(tmp_path):
    async def scenario(gateway):
        head = f"POST /admin/api/login HTTP/1.1\r\nhost: localhost:{gateway.server.address[1]}\r\nauthorization: x\r\nconnection: close\r\n"
        head += "content-type: application/json\r\n"
        bomb = gzip.compress(b'{"' + b"x" * 7_000_000 + b'":1}')
        began = time.monotonic()
        answer = await gateway.raw((head + f"content-encoding: gzip\r\ncontent-length: {len(bomb)}\r\n\r\n").encode() + bomb)
        assert statuses(answer) == [413] and time.monotonic() - began < 1
        answer = await gateway.raw(head.encode() + b"content-length: 70000\r\n\r\n" + b"x" * 70_000)
        assert statuses(answer) == [413]
        answer = await gateway.raw(head.encode() + b"transfer-encoding: chunked\r\n\r\n" + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 5 + b"0\r\n\r\n")
        assert statuses(answer) == [413]
    play(tmp_path, scenario)


def test_thousands_of_pipelined_requests_keep_nobody_waiting(tmp_path):
    async def scenario(gateway):
        reader, writer = await asyncio.open_connection(*gateway.server.address)
        writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 20_000)
        taken = asyncio.ensure_future(reader.read(-1))
        for _ in range(5):
            looked = time.monotonic()
            await gateway.alive()
            assert time.monotonic() - looked < 0.4
        taken.cancel()
        writer.transport.abort()
    play(tmp_path, scenario)


def test_too_long_bodies_are_refused_before_they_are_read(tmp_path):
    async def scenario(gateway):
        head = HEAD.format(key=gateway.key)
        for wrong_key in (head, head.replace(gateway.key, "sk-rh-x")):
            answer = await gateway.raw(wrong_key + "content-length: 999999999\r\nexpect: 100-continue\r\n\r\n")
            assert statuses(answer) == [413] and b"100 Continue" not in answer
        answer = await gateway.raw(head.replace(gateway.key, "sk-rh-x") + "content-length: 9999\r\nexpect: 100-continue\r\n\r\n")
        assert statuses(answer) == [401] and b"connection: close" in answer      # the body may come or not: nobody can know
        chunks = [head + "transfer-encoding: chunked\r\n\r\n", *["fffff\r\n" + "x" * 0xfffff + "\r\n"] * 9]
        assert statuses(await gateway.raw([piece.encode() for piece in chunks])) == [413]
    play(tmp_path, scenario)


def test_what_is_authorised_is_what_is_sent_and_nothing_else_chooses_a_destination(tmp_path):
    async def scenario(gateway):
        body = (b'{"model":"relayed/first","input":"x","api_base":"http://127.0.0.1:1","base_url":"http://127.0.0.1:1",'
                b'"metadata":{"model":"other"},"model":"relayed/second"}')
        await gateway.post(body, "x-api-base: http://127.0.0.1:1", "x-forwarded-host: evil", "openai-organization: org")
        [(top, sent)] = gateway.seen[-1:]
        assert json.loads(sent)["model"] == "second" and b'"first"' not in sent
        assert b"127.0.0.1:1\r\n" not in top and b"evil" not in top and b"org" not in top.lower().replace(b"authorization", b"")
        assert gateway.key.encode() not in top and f"Bearer {UPSTREAM_KEY}".encode() in top
    play(tmp_path, scenario)


@pytest.mark.parametrize("data", [b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED.encode(),
                                  b"GET /health HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n" % len(SMUGGLED) + SMUGGLED.encode() + b"\r\n0\r\n\r\n"])
def test_the_body_of_a_request_that_needs_none_is_no_second_request(tmp_path, data):
    async def scenario(gateway):
        answer = await gateway.raw(data)
        assert statuses(answer) == [200] and b"evil" not in answer
    play(tmp_path, scenario)
