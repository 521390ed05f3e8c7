"""Layer 12: client connections, against scripted raw clients on loopback."""
import asyncio
import contextlib
import errno
import gzip
import json
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import time

import pytest

import pomex

LIMITS = {"host": "127.0.0.1", "port": 0, "header_timeout_s": 1.0, "body_timeout_s": 1.0, "keep_alive_timeout_s": 1.0,
          "write_timeout_s": 1.0, "max_body_bytes": 10**6, "max_connections": 1000}
GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


def post(body, *lines, path="/"):
    head = [f"POST {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", *lines]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


class Handler:
    """Answers by path; remembers what it saw and how each request ended."""

    def __init__(self):
        self.seen, self.ends, self.running, self.statuses = [], [], 0, []

    async def __call__(self, client):
        self.running += 1
        try:
            self.seen.append(client.head.path)
            await getattr(self, client.head.path.strip("/") or "echo")(client)
            self.ends.append("done")
        except BaseException as error:
            self.ends.append(type(error).__name__)
            raise
        finally:
            self.running -= 1

    def access(self, client, status):
        self.statuses.append(status)

    async def echo(self, client):
        body = await client.body()
        await client.answer(200, [("content-type", "text/plain")], b"%d:" % len(body) + body[:50])

    async def health(self, client):
        await client.answer(200, [], client.peer.encode())

    async def early(self, client):
        raise pomex.Unauthorized("No such key.", headers=(("www-authenticate", "Bearer"),))

    async def broken(self, client):
        raise ZeroDivisionError("sk-secret")

    async def silent(self, client):
        await client.body()

    async def stream(self, client):
        await client.start(200, [("content-type", "text/event-stream")])
        for part in (b"one", b"", b"two"):
            await client.write(part)
        await client.end(b"three")

    async def cut(self, client):
        await client.start(200, [])
        await client.write(b"some")
        raise pomex.UpstreamError("gone") if client.head.query else ValueError("gone")

    async def unsent(self, client):
        await client.start(200, [])
        raise pomex.UpstreamError("It failed before its first byte.")

    async def wait(self, client):
        await client.body()
        await asyncio.sleep(5)

    async def streaming(self, client):
        await client.start(200, [])
        await client.write(b"begun")
        await asyncio.sleep(5)

    async def flood(self, client):
        await client.start(200, [])
        while True:
            await client.write(bytes(100000))

    async def stubborn(self, client):
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            if not client.gone:
                await client.answer(200, [], b"last words")
            raise

    async def empty(self, client):
        await client.answer(204, [], b"")


@contextlib.asynccontextmanager
async def serving(**fields):
    handler = Handler()
    server = pomex.Server(handler, pomex.ServerConfig(**{**LIMITS, **fields}), handler.access)
    await server.start()
    try:
        yield server, handler
    finally:
        await server.drain(0)
        assert not server.connections and not server.open_requests and not server.used


async def until(condition, limit_s=1.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.002)


def sockets():
    names = []
    for fd in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum(name.startswith("socket:") for name in names)


def run(main):
    """Runs it with a check that no task and no socket is left."""
    async def validate_request():
        before = sockets()
        await asyncio.wait_for(main(), 10)
        await until(lambda: len(asyncio.all_tasks()) == 1)
        await until(lambda: sockets() <= before)
    asyncio.run(validate_request())


@contextlib.asynccontextmanager
async def connected(server, **options):
    reader, writer = await asyncio.open_connection(*server.address, **options)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


async def answer(reader, method="GET"):
    """(status, headers, body) of the next answer; body None where it was cut."""
    parser = pomex.ResponseReader()
    parser.start(method)
    head, body = None, b""
    while True:
        try:
            part = parser.next()
        except pomex.ProtocolError:
            return head and (head.status, head.headers, None)
        if part is pomex.END:
            return head.status, head.headers, body
        if isinstance(part, pomex.ResponseHead):
            head = part
        elif isinstance(part, bytes):
            body += part
        elif data := await reader.read(1):
            parser.feed(data)
        else:
            parser.feed_eof()


async def exchange(server, data, method="GET", step=10**9):
    """Sends, and reads (the answer, what else comes up to the end or 0.05 s of silence)."""
    async with connected(server) as (reader, writer):
        for at in range(0, len(data), step):
            writer.write(data[at:at + step])
            await asyncio.sleep(0)
        got = await answer(reader, method)
        try:
            return got, await asyncio.wait_for(reader.read(100), 0.05)
        except TimeoutError:
            return got, None


# --- requests and answers -------------------------------------------------------------------------

@pytest.mark.parametrize("step", [10**9, 1])
def test_a_request_is_answered_however_it_is_cut(step):
    async def main():
        async with serving() as (server, handler):
            (status, headers, body), rest = await exchange(server, post(b"hello"), step=step)
            assert (status, body, rest) == (200, b"5:hello", None)
            assert [name for name, _ in headers] == ["date", "server", "x-request-id", "content-type", "content-length"]
            assert headers.get("server") == "pomex" and re.fullmatch(r"req_[0-9a-f]{32}", headers.get("x-request-id"))
            assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", headers.get("date"))
            assert handler.statuses == [200]
    run(main)


@pytest.mark.parametrize("wanted, echoed", [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("a b", False),
                                            ("a\xe9", False), ("", False)])
def test_a_sane_request_id_is_echoed(wanted, echoed):
    assert (pomex.request_id_for(wanted) == wanted) is echoed


STREAMS = {
    "HTTP/1.1": (b"GET /stream HTTP/1.1\r\nhost: localhost\r\n\r\n", "transfer-encoding", "chunked", b"onetwothree"),
    "HTTP/1.0": (b"GET /stream HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", "connection", "close", b"onetwothree"),
    "HEAD": (b"HEAD /stream HTTP/1.1\r\nhost: localhost\r\n\r\n", "transfer-encoding", "chunked", b""),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_framed_for_its_client(name):
    request, field, value, wanted = STREAMS[name]

    async def main():
        async with serving() as (server, _):
            (status, headers, body), rest = await exchange(server, request, name)
            assert (status, headers.get(field), body) == (200, value, wanted)
            assert rest == (b"" if name == "HTTP/1.0" else None)
    run(main)


def test_the_head_goes_out_with_the_first_piece_and_the_end_with_the_last():
    async def main():
        writes = []
        async with serving() as (server, handler):
            async def stream(client):
                transport = client.connection.writer.transport
                write = transport.write
                transport.write = lambda data: (writes.append(bytes(data)), write(data))
                await Handler.stream(handler, client)
            handler.stream = stream
            await exchange(server, b"GET /stream HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert len(writes) == 3 and writes[0].endswith(b"\r\n\r\n3\r\none\r\n")
        assert writes[1:] == [b"3\r\ntwo\r\n", b"5\r\nthree\r\n0\r\n\r\n"]
    run(main)


@pytest.mark.parametrize("request_, connection, closes", [
    (b"GET / HTTP/1.0\r\n\r\n", "close", True), (b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", "keep-alive", False),
    (GET, "", False), (b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", "close", True)])
def test_the_connection_is_kept_as_the_client_asks(request_, connection, closes):
    async def main():
        async with serving() as (server, _):
            (status, headers, body), rest = await exchange(server, request_)
            assert (status, headers.get("connection"), rest) == (200, connection, b"" if closes else None)
    run(main)


def test_head_and_204_have_no_body():
    async def main():
        async with serving() as (server, _):
            (_, headers, _), rest = await exchange(server, GET.replace(b"GET", b"HEAD"), "HEAD")
            assert headers.get("content-length") == "2" and rest is None
            (status, headers, _), rest = await exchange(server, GET.replace(b"/", b"/empty", 1))
            assert status == 204 and "content-length" not in headers and rest is None
    run(main)


def test_pipelined_requests_are_answered_in_order():
    async def main():
        async with serving() as (server, handler):
            async with connected(server) as (reader, writer):
                writer.write(post(b"a") + GET.replace(b"/", b"/stream", 1) + post(b"bb") + GET.replace(b"/", b"/early", 1) + GET)
                bodies = [(await answer(reader))[2] for _ in range(5)]
            assert bodies[0] == b"1:a" and bodies[1] == b"onetwothree" and bodies[2] == b"2:bb" and bodies[4] == b"0:"
            assert b"No such key" in bodies[3]
    run(main)


def test_pipelined_bytes_are_bounded_while_a_handler_runs():
    async def main():
        async with serving() as (server, handler):
            async with connected(server) as (reader, writer):
                writer.write(GET.replace(b"/", b"/wait", 1) + post(b"x" * 20000) * 2000)
                await until(lambda: handler.running)
                await asyncio.sleep(0.05)
                connection, = server.connections
                assert pomex.PIPELINE_BYTES < connection.protocol.unread <= 4 * pomex.PIPELINE_BYTES
                writer.transport.abort()
            connection.task.cancel()        # the end of the client stands behind bytes that were not read
    run(main)


def test_many_pipelined_requests_pass_the_bound_and_go_on():
    async def main():
        async with serving() as (server, handler):
            async with connected(server) as (reader, writer):
                writer.write(post(b"x" * 20000) * 100)
                for _ in range(100):
                    assert (await answer(reader))[0] == 200
    run(main)


# --- bodies ---------------------------------------------------------------------------------------

PACKED = gzip.compress(b"a" * 1000)
BODIES = {
    "chunked": (b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
                200, b"5:abcde"),
    "gzip": (post(PACKED, "content-encoding: gzip"), 200, b"1000:" + b"a" * 50),
    "identity": (post(b"a", "content-encoding: identity"), 200, b"1:a"),
    "unknown coding": (post(b"a", "content-encoding: br"), 415, b"unsupported_content_encoding"),
    "not gzip": (post(b"a" * 50, "content-encoding: gzip"), 400, b"not valid gzip"),
    "bomb": (post(gzip.compress(bytes(2 * 10**6)), "content-encoding: gzip"), 413, b"over 1000000 bytes"),
    "too long": (b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000001\r\n\r\n", 413, b"over 1000000 bytes"),
    "bad chunk": (b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400, b"chunk"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_taken_or_refused_with_a_reason(name):
    request, wanted, words = BODIES[name]

    async def main():
        async with serving() as (server, _):
            (status, headers, body), rest = await exchange(server, request)
            assert status == wanted and words in body
            if status != 200:
                assert headers.get("connection") == "close" and rest == b"" and headers.get("x-request-id")
                error = json.loads(body)["error"]
                assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    run(main)


def test_continue_is_sent_only_when_the_handler_asks_for_the_body():
    async def main():
        async with serving() as (server, _):
            async with connected(server) as (reader, writer):
                request = post(b"hello", "expect: 100-continue")
                writer.write(request[:-5])
                assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
                writer.write(b"hello")
                assert (await answer(reader))[2] == b"5:hello"
            async with connected(server) as (reader, writer):
                writer.write(post(b"hello", "expect: 100-continue", path="/early")[:-5])
                status, headers, _ = await answer(reader)
                assert (status, headers.get("connection"), await reader.read()) == (401, "close", b"")
    run(main)


def test_an_unread_small_body_is_dropped_and_the_connection_kept():
    async def main():
        async with serving() as (server, _):
            async with connected(server) as (reader, writer):
                writer.write(post(b"x" * 60000, path="/early")[:-10])
                assert (await answer(reader))[0] == 401
                writer.write(b"x" * 10 + post(b"next"))
                assert (await answer(reader))[2] == b"4:next"
    run(main)


def test_a_client_in_the_middle_of_a_long_body_can_read_its_early_answer():
    async def main():
        async with serving() as (server, _):
            async with connected(server) as (reader, writer):
                request = post(b"x" * 900000, path="/early")
                for at in range(0, 600000, 50000):
                    writer.write(request[at:at + 50000])
                    await asyncio.sleep(0.001)
                status, headers, body = await answer(reader)
                assert (status, headers.get("connection")) == (401, "close") and b"No such key" in body
                assert headers.get("www-authenticate") == "Bearer"
    run(main)


@pytest.mark.parametrize("bound, value", [("LINGER_BYTES", 100000), ("LINGER_S", 0.1)])
def test_lingering_is_bounded(bound, value, monkeypatch):
    monkeypatch.setattr(pomex, bound, value)

    async def main():
        async with serving() as (server, _):
            async with connected(server) as (reader, writer):
                writer.write(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999999999\r\n\r\n")
                assert (await answer(reader))[0] == 413
                if bound == "LINGER_BYTES":
                    writer.write(bytes(3 * value))
                await until(lambda: not server.connections, 0.5)
    run(main)


# --- errors ---------------------------------------------------------------------------------------

BROKEN = {"no http": (b"\x16\x03\x01\x02\x00\x01\x00", 400), "lf": (b"GET / HTTP/1.1\nhost: a\n\n", 400),
          "version": (b"GET / HTTP/2.0\r\nhost: localhost\r\n\r\n", 505), "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
          "long head": (b"GET / HTTP/1.1\r\nx: " + b"y" * 70000 + b"\r\n\r\n", 431),
          "smuggled": (post(b"a", "transfer-encoding: chunked") + GET, 400),
          "foreign host": (GET.replace(b"localhost", b"evil.example:7663"), 421)}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_http_is_refused_once_and_the_connection_closed(name):
    request, wanted = BROKEN[name]

    async def main():
        async with serving() as (server, handler):
            (status, headers, body), rest = await exchange(server, request)
            assert (status, rest, headers.get("connection"), handler.seen) == (wanted, b"", "close", [])
            assert json.loads(body)["error"]["message"] and headers.get("x-request-id").startswith("req_")
    run(main)


def test_a_broken_handler_is_logged_and_answered_without_details(caplog):
    async def main():
        async with serving() as (server, handler):
            for path in (b"/broken", b"/silent"):
                (status, headers, body), rest = await exchange(server, GET.replace(b"/", path, 1))
                assert (status, rest) == (500, None) and b"secret" not in body and b"Traceback" not in body
                assert headers.get("x-request-id") in body.decode()
        assert handler.statuses == [500, 500]
    with caplog.at_level(logging.ERROR, "pomex"):
        run(main)
    assert "ZeroDivisionError in serve" in caplog.text and "RuntimeError in serve" in caplog.text


@pytest.mark.parametrize("path", ["/cut", "/cut?upstream"])
def test_a_failure_after_the_head_cuts_the_answer(path):
    async def main():
        async with serving() as (server, handler):
            (status, _, body), rest = await exchange(server, GET.replace(b"/", path.encode(), 1))
            assert (status, body, rest) == (200, None, b"")
    run(main)


def test_a_failure_before_the_first_byte_is_an_answer():
    async def main():
        async with serving() as (server, _):
            (status, headers, body), rest = await exchange(server, GET.replace(b"/", b"/unsent", 1))
            assert (status, rest) == (502, None) and b"before its first byte" in body and headers.get("content-length")
    run(main)


HOSTS = [({}, "localhost:99", True), ({}, "LOCALHOST", True), ({}, "127.0.0.1", True), ({}, "[::1]:80", True),
         ({}, "evil.example", False), ({}, "127.0.0.1.evil.example", False), ({}, "0.0.0.0", False),
         ({"host": "::1"}, "[::1]", True), ({"public_hosts": ("gw.example",)}, "gw.example:443", True),
         ({"public_hosts": ("gw.example",)}, "other.example", False), ({"host": "0.0.0.0"}, "any.example", True),
         ({"host": "0.0.0.0", "public_hosts": ("gw.example",)}, "any.example", False),
         ({"host": "192.0.2.1", "public_hosts": ("gw.example",)}, "192.0.2.1", True)]


@pytest.mark.parametrize("fields, host, taken", HOSTS)
def test_only_our_own_names_are_answered_for(fields, host, taken):
    server = pomex.Server(Handler(), pomex.ServerConfig(**{**LIMITS, **fields}), print)
    reader = pomex.RequestReader(pomex.Limits())
    reader.feed(f"GET / HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
    head = reader.next()
    if taken:
        server.check_host(head)
        return
    with pytest.raises(pomex.ProtocolError, match="public_hosts in .server.") as caught:
        server.check_host(head)
    assert (caught.value.status, caught.value.code) == (421, "misdirected_request")


# --- limits ---------------------------------------------------------------------------------------

SLOW = {
    "head": ("header_timeout_s", [b"GET / HT"] + [b"T"] * 20, 408, "request head took longer than 0.1 s"),
    "body": ("body_timeout_s", [post(b"x" * 999)[:-950]] + [b"x"] * 20, 408, "request body took longer than 0.1 s"),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_dripping_client_runs_into_the_total_limit(name):
    limit, drops, wanted, words = SLOW[name]

    async def main():
        async with serving(**{limit: 0.1}) as (server, _):
            async with connected(server) as (reader, writer):
                async def drip():
                    for drop in drops:
                        writer.write(drop)
                        await asyncio.sleep(0.02)
                dripping = asyncio.create_task(drip())
                status, headers, body = await answer(reader)
                assert (status, headers.get("connection")) == (wanted, "close")
                assert words in json.loads(body)["error"]["message"]
                dripping.cancel()
    run(main)


@pytest.mark.parametrize("before", [b"", GET])
def test_an_idle_connection_is_closed_without_a_word(before):
    async def main():
        async with serving(keep_alive_timeout_s=0.1) as (server, _):
            async with connected(server) as (reader, writer):
                if before:
                    writer.write(before)
                    await answer(reader)
                begun = time.monotonic()
                assert await reader.read() == b"" and 0.05 < time.monotonic() - begun < 0.5
    run(main)


def test_a_client_that_takes_nothing_is_gone_after_the_write_limit():
    async def main():
        async with serving(write_timeout_s=0.1) as (server, handler):
            async with connected(server) as (reader, writer):
                writer.transport.pause_reading()
                writer.write(GET.replace(b"/", b"/flood", 1))
                await until(lambda: handler.ends == ["ClientGone"])
                await until(lambda: not server.connections)
    run(main)


def test_where_a_heartbeat_finds_that_the_client_takes_nothing_the_handler_ends_too():
    async def main():
        async with serving(write_timeout_s=0.1) as (server, handler):
            async def waits(client):            # for its provider, while another task says that it lives
                await client.start(200, [])
                client.connection.writer.transport.set_write_buffer_limits(high=0)
                client.connection.writer.transport.write(bytes(2 * 10**7))
                beat = asyncio.ensure_future(client.write(b": alive\n\n"))
                try:
                    await asyncio.sleep(60)
                finally:
                    assert isinstance((await asyncio.gather(beat, return_exceptions=True))[0], pomex.ClientGone)
            handler.waits = waits
            async with connected(server, limit=1024) as (reader, writer):
                writer.transport.pause_reading()
                writer.write(GET.replace(b"/", b"/waits", 1))
                await until(lambda: handler.ends == ["CancelledError"])
                await until(lambda: not server.connections)
    run(main)


def test_a_request_that_still_comes_in_at_the_stop_is_told_to_come_again():
    async def main():
        async with serving() as (server, handler):
            async with connected(server) as (reader, writer):
                writer.write(post(b"x" * 100)[:-50])
                await until(lambda: handler.running == 1)
                await server.drain(0.05)
                said = await reader.read()
                assert said.startswith(b"HTTP/1.1 503") and b"retry-after: 1\r\n" in said.lower(), said
    run(main)


@pytest.mark.parametrize("limit_s", [None, 5.0])
def test_a_stop_waits_for_the_first_request_of_who_has_just_connected(limit_s):
    async def main():
        async with serving() as (server, handler):
            async with connected(server) as (reader, writer), connected(server) as (kept, used):
                used.write(GET)
                await answer(kept)
                draining = asyncio.ensure_future(server.drain(limit_s))
                await asyncio.sleep(pomex.IDLE_GRACE_S + 0.15)
                assert await kept.read() == b""         # it has had its answer
                writer.write(GET)
                assert (await reader.read()).startswith(b"HTTP/1.1 200")
                begun = time.monotonic()
                await draining
                assert time.monotonic() - begun < 0.5   # and nobody else is waited for
    run(main)


def test_an_answer_that_is_never_taken_does_not_keep_the_socket():
    async def main():
        async with serving(write_timeout_s=0.1) as (server, handler):
            async def big(client):
                client.keep = False
                client.connection.writer.transport.set_write_buffer_limits(high=10**8)
                await client.answer(200, [], bytes(2 * 10**7))
            handler.big = big
            async with connected(server, limit=1024) as (reader, writer):
                writer.transport.pause_reading()
                writer.write(GET.replace(b"/", b"/big", 1))
                await until(lambda: handler.ends == ["done"])
                await until(lambda: not server.connections)
    run(main)


def test_too_many_connections_are_told_to_come_again(monkeypatch):
    monkeypatch.setattr(pomex, "LINGER_S", 0.1)

    async def main():
        async with serving(max_connections=2) as (server, handler):
            async with connected(server), connected(server):
                await until(lambda: server.used["connections", ""] == 2)
                (status, headers, body), rest = await exchange(server, GET)
                assert (status, headers.get("retry-after"), headers.get("connection"), rest) == (503, "1", "close", b"")
                assert json.loads(body)["error"]["code"] == "overloaded" and handler.seen == []
                crowd = [socket.create_connection(server.address) for _ in range(pomex.REFUSED_CONNECTIONS + 20)]
                await until(lambda: len(server.connections) == 2 + pomex.REFUSED_CONNECTIONS)
                for one in crowd:
                    one.close()
            await until(lambda: not server.connections)
            assert (await exchange(server, GET))[0][0] == 200
    run(main)


HEALTH = GET.replace(b" / ", b" /health ")


def test_where_there_is_no_room_health_is_still_answered_and_who_says_nothing_is_told(monkeypatch):
    monkeypatch.setattr(pomex, "REFUSED_WAIT_S", 0.1)
    monkeypatch.setattr(pomex, "LINGER_S", 0.1)

    async def main():
        async with serving(max_connections=2) as (server, _), contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                _, writer = await stack.enter_async_context(connected(server))
                writer.write(post(b"", path="/wait"))
            await until(lambda: server.open_requests == 2)
            (status, headers, _), rest = await exchange(server, HEALTH)
            assert (status, headers.get("connection"), rest) == (200, "close", b"")
            assert (await exchange(server, b""))[0][0] == 503
            crowd = [socket.create_connection(server.address) for _ in range(3 * pomex.REFUSED_CONNECTIONS)]
            assert (await exchange(server, HEALTH))[0][0] == 200
            for one in crowd:
                one.close()
    run(main)


def test_the_longest_idle_is_given_up_for_a_new_connection_but_no_young_one_and_none_that_works(monkeypatch):
    monkeypatch.setattr(pomex, "IDLE_SAFE_S", 0.2)

    async def main():
        async with serving(max_connections=3, keep_alive_timeout_s=9) as (server, _):
            async with connected(server) as (_, working), connected(server) as (first, _), connected(server) as (second, other):
                working.write(post(b"", path="/wait"))
                other.write(GET)
                assert (await answer(second))[0] == 200
                assert (await exchange(server, GET))[0][0] == 503, "all are young"
                await asyncio.sleep(0.25)
                async with connected(server) as (third, new):
                    new.write(GET)
                    assert (await answer(third))[0] == 200 and server.open_requests == 1
                    with contextlib.suppress(ConnectionError):
                        assert await first.read() == b""
                    other.write(GET)
                    assert (await answer(second))[0] == 200, "it was idle for less long"
    run(main)


def test_an_address_has_a_share_of_the_connections_but_not_loopback_and_no_proxy(monkeypatch):
    async def taken(**fields):
        async with serving(max_connections_per_address=2, **fields) as (server, _), contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                await stack.enter_async_context(connected(server))
            await until(lambda: len(server.connections) == 5)
            return server.used["connections", ""]

    async def main():
        assert await taken() == 5
        monkeypatch.setattr(pomex, "is_loopback", lambda host: False)
        assert await taken(public_hosts=("localhost",)) == 2
        assert await taken(trusted_proxies=("127.0.0.0/8",)) == 5
    run(main)


def test_handshakes_count_among_the_connections(certificate, monkeypatch):
    monkeypatch.setattr(pomex, "IDLE_SAFE_S", 0.3)

    async def main():
        context = ssl.create_default_context(cafile=certificate["tls_cert"])
        async with serving(max_connections=4, header_timeout_s=9, **certificate) as (server, _):
            crowd = [socket.create_connection(server.address) for _ in range(4 + pomex.REFUSED_CONNECTIONS + 30)]
            await until(lambda: server.used["connections", ""] == 4 and len(server.refused) == pomex.REFUSED_CONNECTIONS)
            await asyncio.sleep(0.4)
            async with connected(server, ssl=context) as (reader, writer):
                writer.write(GET)
                assert (await answer(reader))[0] == 200, "a handshake that goes on for long is given up"
            for one in crowd:
                one.close()
            await until(lambda: not server.connections)
    run(main)


PROXIED = {     # trusted, X-Forwarded-For lines -> the address, None where they are refused
    "nobody is trusted": ((), ["9.9.9.9"], "127.0.0.1"), "another is trusted": (("10.0.0.0/8",), ["9.9.9.9"], "127.0.0.1"),
    "one proxy": (("127.0.0.1",), ["9.9.9.9"], "9.9.9.9"), "what the client wrote": (("127.0.0.1",), ["6.6.6.6, 9.9.9.9"], "9.9.9.9"),
    "two proxies": (("127.0.0.0/8", "10.0.0.0/8"), ["6.6.6.6, 9.9.9.9, 10.1.2.3"], "9.9.9.9"),
    "two lines": (("127.0.0.0/8", "10.0.0.0/8"), ["9.9.9.9", "10.1.2.3"], "9.9.9.9"),
    "proxies only": (("127.0.0.0/8", "10.0.0.0/8"), ["10.1.2.3"], "10.1.2.3"), "none": (("127.0.0.1",), [], "127.0.0.1"),
    "IPv6": (("127.0.0.1",), ["2001:DB8::1"], "2001:db8::1"), "a name": (("127.0.0.1",), ["evil"], None),
    "empty": (("127.0.0.1",), [""], None), "unknown": (("127.0.0.1",), ["9.9.9.9, unknown"], None),
    "garbage that no proxy wrote": (("127.0.0.1",), ["<script>, 9.9.9.9"], "9.9.9.9"),
}


@pytest.mark.parametrize("name", PROXIED)
def test_only_a_trusted_proxy_says_who_asks(name):
    trusted, lines, expected = PROXIED[name]

    async def main():
        async with serving(trusted_proxies=trusted) as (server, handler):
            fields = "".join(f"x-forwarded-for: {line}\r\n" for line in lines).encode()
            status, _, body = (await exchange(server, HEALTH.replace(b"\r\n\r\n", b"\r\n" + fields + b"\r\n")))[0]
            assert (status, body.decode() if status == 200 else None) == (200 if expected else 400, expected)
            assert expected or not handler.seen
    run(main)


@pytest.mark.parametrize("shape", ["length", "chunks", "gzip"])
@pytest.mark.parametrize("whose, status", [("process", 503), ("address", 429)])
def test_bodies_under_way_have_a_budget_that_is_asked_before_they_are_read(shape, whose, status, monkeypatch):
    monkeypatch.setattr(pomex, "is_loopback", lambda host: False)
    monkeypatch.setattr(pomex, "RATIO_FREE_BYTES", 1000)
    monkeypatch.setattr(pomex, "MAX_RATIO", 30)
    fields = {"max_bodies_bytes": 1000, "max_bodies_bytes_each": 10**9} if whose == "process" else {"max_bodies_bytes_each": 1000}

    async def main():
        async with serving(public_hosts=("localhost",), **fields) as (server, _):
            async with connected(server) as (_, writer):
                writer.write(post(bytes(600), path="/wait"))
                await until(lambda: server.used["bytes", ""] == 600)
                body = {"length": bytes(500), "gzip": gzip.compress(bytes(500)), "chunks": b"1f4\r\n" + bytes(500) + b"\r\n0\r\n\r\n"}[shape]
                data = post(body, "content-encoding: gzip") if shape == "gzip" else post(body)
                if shape == "chunks":
                    data = data.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
                (got, headers, error), _ = await exchange(server, data)
                assert (got, headers.get("retry-after")) == (status, "1") and b"max_bodies_bytes" in error
                assert (await exchange(server, post(bytes(300))))[0][0] == 200 and server.used["bytes", ""] == 600
            await until(lambda: not any(share == "bytes" for share, _ in server.used))
            assert (await exchange(server, data))[0][0] == 200
    run(main)


class WithoutFiles(socket.socket):
    """A listening socket of a process that may open no more files, twice."""
    tries = 0

    def accept(self):
        WithoutFiles.tries += 1
        if WithoutFiles.tries < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_without_files_left_it_is_said_and_taken_up_again(caplog, monkeypatch):
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(asyncio.constants, "ACCEPT_RETRY_DELAY", 0.1)
    monkeypatch.setattr(WithoutFiles, "tries", 0)

    async def main():
        asyncio.get_running_loop().set_exception_handler(pomex.log_loop_error)
        given, handler = WithoutFiles(), Handler()
        given.bind(("127.0.0.1", 0))
        server = pomex.Server(handler, pomex.ServerConfig(**LIMITS), handler.access)
        await server.start([given])
        assert (await exchange(server, GET))[0][0] == 200 and WithoutFiles.tries >= 3
        assert caplog.text.count("socket.accept() out of system resource: too many open files") == 2
        await server.drain(0)
    run(main)


@pytest.mark.parametrize("files, fit", [(64, 8), (256, 64), (1024, 448), (2**20, 4096), (-1, 4096)])
def test_no_more_connections_are_taken_than_files_can_be_opened(files, fit, monkeypatch):
    monkeypatch.setattr(pomex.resource, "getrlimit", lambda which: (files, files))
    assert pomex.Server(print, pomex.ServerConfig(), print).config.max_connections == fit


def test_300_idle_and_half_sent_connections_do_not_delay_others():
    async def main():
        async with serving() as (server, _), contextlib.AsyncExitStack() as stack:
            for number in range(300):
                _, writer = await stack.enter_async_context(connected(server))
                writer.write(b"POST / HTTP/1.1\r\nhost: loc" if number % 2 else b"")
            begun = time.monotonic()
            for _ in range(20):
                assert (await exchange(server, GET.replace(b"1.1", b"1.0")))[0][0] == 200
            assert time.monotonic() - begun < 5
    run(main)


# --- clients that leave ---------------------------------------------------------------------------

def leave_by_reset(writer):
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
    writer.transport.abort()


LEAVING = {"close": lambda writer: writer.close(), "half-close": lambda writer: writer.write_eof(), "reset": leave_by_reset}


@pytest.mark.parametrize("path", ["/wait", "/streaming", "/flood"])
@pytest.mark.parametrize("way", LEAVING)
def test_a_client_that_leaves_cancels_its_handler_at_once(way, path):
    async def main():
        async with serving() as (server, handler):
            async with connected(server) as (reader, writer):
                writer.write(post(b"hello", path=path))
                await until(lambda: handler.running == 1)
                await asyncio.sleep(0.02)
                assert server.open_requests == 1
                if path == "/flood" and way == "half-close":
                    writer.close()      # its socket is full: no FIN is seen before it is read
                else:
                    LEAVING[way](writer)
                begun = time.monotonic()
                await until(lambda: handler.ends and not handler.running)
                assert time.monotonic() - begun < 0.3 and handler.ends[0] in ("CancelledError", "ClientGone")
                await until(lambda: not server.connections)
        assert len(handler.statuses) == 1
    run(main)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", post(b"hello")[:-2], GET * 2])
def test_a_client_may_leave_in_any_phase(sent, caplog):
    async def main():
        async with serving() as (server, handler):
            async with connected(server) as (reader, writer):
                writer.write(sent)
                await asyncio.sleep(0.02)
            await until(lambda: not server.connections)
            assert not handler.running
    with caplog.at_level(logging.INFO, "pomex"):
        run(main)
    assert "Traceback" not in caplog.text


def test_a_handler_that_has_answered_is_not_cancelled():
    async def main():
        async with serving() as (server, handler):
            async def settle(client):
                await client.answer(200, [], b"ok")
                await asyncio.sleep(0.05)
            handler.settle = settle
            async with connected(server) as (reader, writer):
                writer.write(GET.replace(b"/", b"/settle", 1))
                await answer(reader)
            await until(lambda: handler.ends == ["done"])
    run(main)


def test_a_write_to_a_client_that_left_says_so():
    async def main():
        async with serving() as (server, handler):
            async def late(client):
                try:
                    await asyncio.sleep(5)
                except asyncio.CancelledError:
                    assert client.gone
                    await client.write(b"too late")
            handler.late = late
            async with connected(server) as (reader, writer):
                writer.write(GET.replace(b"/", b"/late", 1))
                await until(lambda: handler.running)
            await until(lambda: handler.ends == ["ClientGone"])
    run(main)


# --- listening, TLS, and stopping -----------------------------------------------------------------

def test_every_address_of_the_host_is_listened_on_with_one_port():
    async def main():
        async with serving(host="localhost") as (server, _):
            ports = {listening.getsockname()[1] for listening in server.sockets}
            assert ports == {server.address[1]} and server.address[1] > 0
            assert (await exchange(server, GET))[0][0] == 200
    run(main)


def test_a_taken_port_is_an_error_and_a_given_socket_is_used():
    async def main():
        async with serving() as (server, _):
            with pytest.raises(OSError):
                await pomex.Server(Handler(), pomex.ServerConfig(**{**LIMITS, "port": server.address[1]}), print).start()
        given, handler = socket.create_server(("127.0.0.1", 0)), Handler()
        server = pomex.Server(handler, pomex.ServerConfig(**LIMITS), handler.access)
        await server.start([given])
        assert server.address == given.getsockname() and (await exchange(server, GET))[0][0] == 200
        await server.drain(0)
    run(main)


def nodelay(connection):
    return connection.writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def handed(host, family):
    """A listener as systemd and a parent process hand it over: known by its number alone."""
    return socket.socket(fileno=socket.create_server((host, 0), family=family).detach())


LISTENERS = {
    "our own": lambda: (),
    "made without a protocol": lambda: [socket.create_server(("127.0.0.1", 0))],
    "handed over": lambda: [handed("127.0.0.1", socket.AF_INET)],
    "handed over, IPv6": lambda: [handed("::1", socket.AF_INET6)],
}


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("name", LISTENERS)
def test_no_token_waits_for_an_acknowledgement(name, tls, request):
    """Nagle's algorithm holds a small write back until the one before it is acknowledged, which a client may put off by 40 ms."""
    if "IPv6" in name and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    fields = request.getfixturevalue("certificate") if tls else {}
    context = ssl._create_unverified_context() if tls else None
    handler = Handler()

    async def main():
        server = pomex.Server(handler, pomex.ServerConfig(**{**LIMITS, **fields}), handler.access)
        await server.start(LISTENERS[name]())
        async with connected(server, ssl=context) as (reader, writer):
            for _ in range(2):          # the second on the connection that was kept
                writer.write(GET)
                assert (await answer(reader))[0] == 200
                assert [nodelay(each) != 0 for each in server.connections] == [True]
        await server.drain(0)
    run(main)


def test_a_stream_may_run_on_a_socket_without_the_option():
    async def main():
        ours, theirs = socket.socketpair()
        transport, protocol = await asyncio.get_running_loop().create_connection(lambda: pomex.StreamProtocol(2**16), sock=ours)
        theirs.sendall(b"hello")
        assert await protocol.reader.readexactly(5) == b"hello"
        transport.abort()
        theirs.close()
    run(main)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("no openssl command to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return {"tls_cert": str(folder / "cert.pem"), "tls_key": str(folder / "key.pem")}


@pytest.mark.parametrize("version, taken", [(ssl.TLSVersion.TLSv1_3, True), (ssl.TLSVersion.TLSv1_2, True),
                                            (ssl.TLSVersion.TLSv1_1, False)])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
def test_tls_is_spoken_from_1_2_on(certificate, version, taken):
    async def main():
        context = ssl.create_default_context(cafile=certificate["tls_cert"])
        context.set_alpn_protocols(["http/1.1"])
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, version
        async with serving(**certificate) as (server, handler):
            if not taken:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    await asyncio.open_connection(*server.address, ssl=context)
                return
            async with connected(server, ssl=context) as (reader, writer):
                writer.write(post(b"hello"))
                assert (await answer(reader))[2] == b"5:hello"
                writer.write(post(b"x" * 900000, path="/early")[:300000])
                assert (await answer(reader))[0] == 401
            async with connected(server, ssl=context) as (reader, writer):
                writer.write(GET.replace(b"/", b"/wait", 1))
                await until(lambda: handler.running)
            await until(lambda: not handler.running)
    run(main)


def test_a_bad_certificate_is_a_configuration_error(tmp_path):
    async def main():
        bad = pomex.ServerConfig(**{**LIMITS, "tls_cert": str(tmp_path / "none.pem")})
        with pytest.raises(pomex.ConfigError, match="server.tls_cert and server.tls_key cannot be used: no such file"):
            await pomex.Server(Handler(), bad, print).start()
    run(main)


def test_draining_ends_what_is_idle_and_waits_for_what_runs():
    async def main():
        async with serving() as (server, handler):
            go_on = asyncio.Event()

            async def held(client):
                await client.start(200, [])
                await client.write(b"a")
                await go_on.wait()
                await client.end(b"b")
            handler.held = held
            async with connected(server) as (idle, _), connected(server) as (reader, writer):
                writer.write(GET.replace(b"/", b"/held", 1) + GET)
                await until(lambda: handler.running)
                draining = asyncio.create_task(server.drain(5))
                assert await idle.read() == b""
                with pytest.raises(ConnectionError):
                    await asyncio.open_connection(*server.address)
                go_on.set()
                assert (await answer(reader))[2] == b"ab"
                status, headers, _ = await answer(reader)       # it was here before the stop
                assert (status, headers.get("connection"), await reader.read()) == (200, "close", b"")
                await asyncio.wait_for(draining, 1)
                assert handler.ends == ["done", "done"]
    run(main)


def test_a_kept_connection_is_closed_when_its_last_request_ends_while_draining():
    async def main():
        async with serving() as (server, handler):
            async def swallow(client):
                await client.start(200, [])
                await client.write(b"begun")
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(5)
                await client.end(b", failed")
            handler.swallow = swallow
            async with connected(server) as (reader, writer):
                writer.write(GET.replace(b"/", b"/swallow", 1))
                await until(lambda: handler.running)
                begun = time.monotonic()
                draining = asyncio.create_task(server.drain(0.05))
                assert (await answer(reader))[2] == b"begun, failed" and await reader.read() == b""
                await draining
                assert time.monotonic() - begun < 5
    run(main)


def test_a_request_answered_while_draining_closes_its_connection():
    async def main():
        async with serving() as (server, handler):
            async with connected(server) as (reader, writer):
                writer.write(GET[:-2])
                await asyncio.sleep(0.02)
                draining = asyncio.create_task(server.drain(5))
                await asyncio.sleep(0.02)
                writer.write(GET[-2:])
                status, headers, _ = await answer(reader)
                assert (status, headers.get("connection")) == (200, "close")
                await asyncio.wait_for(draining, 1)
    run(main)


def test_draining_cancels_what_takes_too_long_and_lets_it_say_its_last_words():
    async def main():
        async with serving() as (server, handler):
            async with connected(server) as (reader, writer), connected(server) as (_, other):
                writer.write(GET.replace(b"/", b"/stubborn", 1))
                other.write(GET.replace(b"/", b"/wait", 1))
                await until(lambda: handler.running == 2)
                begun = time.monotonic()
                draining = asyncio.create_task(server.drain(0.1))
                assert (await answer(reader))[2] == b"last words"
                await draining
                assert 0.09 < time.monotonic() - begun < 1 and handler.ends == ["CancelledError"] * 2
    run(main)
