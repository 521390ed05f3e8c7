"""Layer 9: one exchange with a provider, against scripted raw servers on loopback."""
import asyncio
import contextlib
import gzip
import os
import re
import shutil
import socket
import ssl
import subprocess
import time

import pytest

import pomex

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello"
PACKED = gzip.compress(b"hello" * 20000)


class Scripted:
    """A raw server: `script(reader, writer, n)` plays connection number n; remembers what it was sent."""

    def __init__(self, script, **options):
        self.script, self.options = script, options
        self.requests, self.connections, self.open = [], 0, 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.play, "127.0.0.1", 0, **self.options)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, failed, *_):
        self.server.close()
        if not failed:
            await until(lambda: self.open == 0)

    async def play(self, reader, writer):
        self.connections += 1
        self.open += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                await self.script(self, reader, writer, self.connections)
        finally:
            writer.close()
            self.open -= 1

    async def request(self, reader):
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        self.requests.append((head, body))
        return head


def says(*answers, close=False):
    """A script that gives the answers in turn, each to a request, then waits for the end (or closes)."""
    async def script(self, reader, writer, n):
        for answer in answers:
            await self.request(reader)
            writer.write(answer)
        if not close:
            await reader.read()
    return script


async def until(condition, limit_s=1.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.002)


def provider(port, scheme="http", host="127.0.0.1", **fields):
    base = {"connect_timeout_s": 1.0, "first_byte_timeout_s": 1.0, "idle_timeout_s": 1.0, "total_timeout_s": 2.0}
    return pomex.ProviderConfig("acme", wire_api="chat", base_url=f"{scheme}://{host}:{port}/v1", **{**base, **fields})


async def ask(upstream, to, body=b"{}", method="POST", headers=()):
    exchange = await upstream.exchange(to, method, "/chat", list(headers), body)
    try:
        return exchange.status, await exchange.read_all(10**7)
    finally:
        await exchange.close()


def run(main):
    """Runs it with a check that no task and no socket is left."""
    async def validate_request():
        before = sockets()
        await asyncio.wait_for(main(), 10)
        await until(lambda: len(asyncio.all_tasks()) == 1)
        await until(lambda: sockets() <= before)
    asyncio.run(validate_request())


def sockets():
    if not os.path.isdir("/proc/self/fd"):
        return 0
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sum(name.startswith("socket:") for name in names)


@contextlib.asynccontextmanager
async def upstream_of():
    upstream = pomex.ConnectionPool()
    try:
        yield upstream
    finally:
        await upstream.close()


# --- where a name leads ----------------------------------------------------------------------------

def names(monkeypatch, **rows):
    """name -> addresses, or seconds that the nameserver takes to say that there is none."""
    def getaddrinfo(host, *_, **__):
        found = rows[host.replace(".", "_")]
        if not isinstance(found, list):
            time.sleep(found)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return [(socket.AF_INET6 if ":" in each else socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in found]
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_a_nameserver_that_is_silent_holds_nobody_elses_names_and_not_the_end(monkeypatch):
    names(monkeypatch, dead_example=3.0, well_example=["127.0.0.1"])

    async def main():
        async with Scripted(says(*[ANSWER] * 99)) as server, upstream_of() as upstream:
            to = provider(server.port, host="dead.example", connect_timeout_s=0.1)
            begun = time.monotonic()
            failed = await asyncio.gather(*(ask(upstream, to) for _ in range(40)), return_exceptions=True)
            assert {type(error) for error in failed} == {pomex.TransportTimeout} and len(upstream.lookups) == 1
            assert await ask(upstream, provider(server.port, host="well.example")) == (200, b"hello")
            assert time.monotonic() - begun < 1.5
    begun = time.monotonic()
    run(main)
    assert time.monotonic() - begun < 2.5


def test_of_several_addresses_the_first_that_answers_is_taken(monkeypatch):
    names(monkeypatch, some_example=["::1", "127.0.0.9", "127.0.0.1"], missing_example=0.0)

    async def main():
        async with Scripted(says(ANSWER)) as server, upstream_of() as upstream:
            assert await ask(upstream, provider(server.port, host="some.example")) == (200, b"hello")
            with pytest.raises(pomex.TransportError, match="the name cannot be resolved"):
                await ask(upstream, provider(server.port, host="missing.example"))
            assert not upstream.lookups
    run(main)


def test_an_address_that_is_silent_gives_way_to_the_next():
    async def main():
        async with Scripted(says(ANSWER)) as server:
            real = pomex.open_connection

            async def connect_to(address, port):
                await asyncio.sleep(60 if address == "127.0.0.7" else 0.3 if address == "127.0.0.8" else 0)
                return await real("127.0.0.1", port)
            with pytest.MonkeyPatch.context() as patch:
                names(patch, some_example=["127.0.0.7", "127.0.0.8", "127.0.0.9"])
                patch.setattr(pomex, "open_connection", connect_to)
                async with upstream_of() as upstream:
                    begun = time.monotonic()
                    assert await ask(upstream, provider(server.port, host="some.example")) == (200, b"hello")
                    assert 0.45 < time.monotonic() - begun < 0.9
    run(main)


# --- what goes out and comes back -----------------------------------------------------------------

def test_the_request_is_sent_whole_with_what_http_needs():
    async def main():
        async with Scripted(says(ANSWER)) as server, upstream_of() as upstream:
            to = provider(server.port, query_params={"api-version": "2 5"})
            assert await ask(upstream, to, b'{"a":1}', headers=[("authorization", "Bearer k")]) == (200, b"hello")
            head, body = server.requests[0]
            assert head.startswith(b"POST /v1/chat?api-version=2+5 HTTP/1.1\r\n") and body == b'{"a":1}'
            for line in (f"host: 127.0.0.1:{server.port}", "accept-encoding: gzip", "content-length: 7",
                         "authorization: Bearer k"):
                assert line.encode() + b"\r\n" in head
    run(main)


BODIES = {"length": (ANSWER, b"hello"), "chunks": (CHUNKED, b"hello world"), "until close": (UNTIL_CLOSE, b"hello"),
          "empty": (b"HTTP/1.1 204 No Content\r\n\r\n", b""), "after 100": (b"HTTP/1.1 100 Continue\r\n\r\n" + ANSWER, b"hello"),
          "gzip": (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(PACKED) + PACKED,
                   b"hello" * 20000)}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("step", [10**6, 1])
def test_an_answer_is_the_same_however_it_is_cut(name, step):
    answer, body = BODIES[name]

    async def script(self, reader, writer, n):
        await self.request(reader)
        for at in range(0, len(answer), step):
            writer.write(answer[at:at + step])
            await writer.drain()
            await asyncio.sleep(0)
        if name != "until close":
            await reader.read()

    async def main():
        async with Scripted(script) as server, upstream_of() as upstream:
            assert (await ask(upstream, provider(server.port)))[1] == body
    run(main)


def test_a_compressed_bomb_is_read_in_bounded_pieces():
    packed = gzip.compress(bytes(60 * 2**20), 9)

    async def main():
        answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed) + packed
        async with Scripted(says(answer)) as server, upstream_of() as upstream:
            exchange = await upstream.exchange(provider(server.port), "GET", "/", [], b"")
            assert 0 < len(await exchange.read()) <= 17 * 2**20
            with pytest.raises(pomex.TransportError, match="longer than 1000"):
                await exchange.read_all(1000)
            await exchange.close()
    run(main)


def test_a_long_error_answer_is_cut_and_a_long_good_one_refused():
    long = b"content-length: 5000\r\n\r\n" + b"x" * 5000

    async def main():
        async with Scripted(says(b"HTTP/1.1 500 No\r\n" + long)) as server, upstream_of() as upstream:
            exchange = await upstream.exchange(provider(server.port), "GET", "/", [], b"")
            assert await exchange.read_all(100) == b"x" * 100
            await exchange.close()
        async with Scripted(says(b"HTTP/1.1 200 OK\r\n" + long)) as server, upstream_of() as upstream:
            exchange = await upstream.exchange(provider(server.port), "GET", "/", [], b"")
            with pytest.raises(pomex.TransportError, match="longer than 100 bytes"):
                await exchange.read_all(100)
            await exchange.close()
    run(main)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_a_reader_that_pauses_holds_the_provider_back(tls, request):
    folder = request.getfixturevalue("certificates") if tls else None
    options = {"ssl": server_context(folder)} if tls else {}
    to = {"scheme": "https", "host": "localhost", "ca_file": str(folder / "ca.pem")} if tls else {}

    async def script(self, reader, writer, n):
        await self.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 90000000\r\n\r\n")
        self.sent = 0
        while self.sent < 90000000:
            writer.write(bytes(1000000))
            await writer.drain()
            self.sent += 1000000

    async def main():
        async with Scripted(script, **options) as server, upstream_of() as upstream:
            exchange = await upstream.exchange(provider(server.port, **to), "GET", "/", [], b"")
            await asyncio.sleep(0.1)
            assert exchange.connection.protocol.unread <= 2 * pomex.READ_BYTES and server.sent < 60000000
            size = 0
            while data := await exchange.read():
                size += len(data)
            assert size == 90000000
            await exchange.close()
    run(main)


def chunks(*pieces):
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def pumped(steps, ending=b"0\r\n\r\n"):
    """A script: a head, then the steps in turn (bytes, or seconds to wait), then `ending`."""
    async def script(self, reader, writer, n):
        await self.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for step in steps:
            await asyncio.sleep(step) if isinstance(step, float) else writer.write(step)
        writer.write(ending)
        await reader.read()
    return script


PAUSED = [piece for number in range(9) for piece in (chunks(b"%d" % number), 0.02)]
PUMPS = {       # steps -> pieces that take() says no to, how many pieces read() has to give
    "one by one": (PAUSED, (), 1), "stopped once": (PAUSED, (b"4",), 2), "stopped each time": (PAUSED, [b"%d" % n for n in range(9)], 5),
    "all at once": ([0.05, chunks(*[b"%d" % number for number in range(9)])], (), 1),
    "cut anywhere": ([each for byte in chunks(b"01", b"2345678") for each in (bytes([byte]), 0.003)], (), 1),
}


@pytest.mark.parametrize("name", PUMPS)
def test_a_pump_gives_what_arrives_without_waking_the_task(name):
    steps, refused, expected_reads = PUMPS[name]

    async def main():
        async with Scripted(pumped(steps)) as server, upstream_of() as upstream:
            exchange = await upstream.exchange(provider(server.port), "GET", "/", [], b"")
            taken, reads = [], 0

            def take(piece):
                taken.append(piece)
                exchange.heard = True
                return piece not in refused
            while data := await exchange.read():
                taken.append(data)
                reads += 1
                await exchange.pump(take)
            assert b"".join(taken) == b"012345678" and reads == expected_reads
            await exchange.close()
            assert sum(map(len, upstream.idle.values())) == 1, "the connection is kept"
    run(main)


def test_a_pump_leaves_large_reads_to_the_task():
    async def main():
        big = bytes(300000)
        async with Scripted(pumped([chunks(b"a"), 0.05, chunks(big), 0.05, chunks(b"b")])) as server, upstream_of() as upstream:
            exchange = await upstream.exchange(provider(server.port), "GET", "/", [], b"")
            pumped_sizes, read_sizes = [], []
            while data := await exchange.read():
                read_sizes.append(len(data))
                await exchange.pump(lambda piece: pumped_sizes.append(len(piece)) or True)
            assert sum(read_sizes) + sum(pumped_sizes) == 300002 and max(read_sizes) > max(pumped_sizes, default=0)
            assert max(pumped_sizes, default=0) <= pomex.PUMPED_BYTES
            await exchange.close()
    run(main)


ENDS = {    # steps, ending, heard -> the limit or the words of the failure
    "cut": (PAUSED[:4], b"", True, "took longer than idle_timeout_s = 0.3 s while reading the answer"),
    "pings": ([each for _ in range(40) for each in (chunks(b": ping"), 0.02)], b"", False, "idle_timeout_s = 0.3 s"),
    "output for too long": ([each for _ in range(60) for each in (chunks(b"x"), 0.02)], b"", True, "total_timeout_s = 0.6 s"),
    "no chunk": (PAUSED[:4], b"this is no chunk\r\n", True, "The line before a chunk is malformed"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_pump_that_is_stopped_says_why_in_read(name):
    steps, ending, heard, words = ENDS[name]

    async def main():
        async with Scripted(pumped(steps, ending)) as server, upstream_of() as upstream:
            to = provider(server.port, idle_timeout_s=0.3, total_timeout_s=0.6)
            exchange = await upstream.exchange(to, "GET", "/", [], b"")

            def take(piece):
                exchange.heard = heard
                return True
            with pytest.raises(pomex.TransportError, match=re.escape(words)):
                while await exchange.read():
                    exchange.heard = heard
                    await exchange.pump(take)
            await exchange.close()
    run(main)


@pytest.mark.parametrize("end", ["cut", "whole"])
def test_an_end_that_came_before_the_pump_is_seen_at_once(end):
    async def script(self, reader, writer, n):
        await self.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n" + (b"transfer-encoding: chunked\r\n\r\n" + chunks(b"a") if end == "cut" else b"\r\na"))
        writer.write_eof()

    async def main():
        async with Scripted(script) as server, upstream_of() as upstream:
            exchange = await upstream.exchange(provider(server.port, idle_timeout_s=9, total_timeout_s=9), "GET", "/", [], b"")
            assert await exchange.read() == b"a"
            await asyncio.sleep(0.05)               # the client is slow; meanwhile the connection ends
            await asyncio.wait_for(exchange.pump(lambda piece: True), 1)
            if end == "cut":
                with pytest.raises(pomex.TransportError, match="in the middle of a message"):
                    await exchange.read()
            else:
                assert await exchange.read() == b""
            await exchange.close()
    run(main)


def test_what_take_raises_comes_up_in_the_task():
    async def main():
        async with Scripted(pumped(PAUSED)) as server, upstream_of() as upstream:
            exchange = await upstream.exchange(provider(server.port), "GET", "/", [], b"")
            await exchange.read()
            with pytest.raises(ZeroDivisionError):
                await exchange.pump(lambda piece: 1 // 0)
            await exchange.close(reusable=False)
    run(main)


# --- the pool -------------------------------------------------------------------------------------

def test_a_connection_is_used_again():
    async def main():
        async with Scripted(says(ANSWER, CHUNKED, ANSWER)) as server, upstream_of() as upstream:
            for _ in range(3):
                await ask(upstream, provider(server.port))
            assert server.connections == 1
    run(main)


def options_of(upstream):
    """TCP_NODELAY of every connection that is kept."""
    kept = [each.writer.get_extra_info("socket") for idle in upstream.idle.values() for each in idle]
    return [made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0 for made in kept]


def test_a_request_does_not_wait_for_an_acknowledgement(certificates):
    async def main():
        async with Scripted(says(ANSWER)) as server, upstream_of() as upstream:
            await ask(upstream, provider(server.port))
            assert options_of(upstream) == [True]
        async with Scripted(says(ANSWER), ssl=server_context(certificates)) as server, upstream_of() as upstream:
            await ask(upstream, provider(server.port, "https", "localhost", ca_file=str(certificates / "ca.pem")))
            assert options_of(upstream) == [True]
    run(main)


def test_a_decoder_that_stops_at_the_last_event_still_gives_the_connection_back():
    async def main():
        async with Scripted(says(CHUNKED, ANSWER)) as server, upstream_of() as upstream:
            exchange = await upstream.exchange(provider(server.port), "GET", "/", [], b"")
            assert await exchange.read() == b"hello world"
            await exchange.close()
            await ask(upstream, provider(server.port))
            assert server.connections == 1
    run(main)


UNFIT = {
    "connection: close": b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    "bytes behind the answer": ANSWER + b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n",
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_connection_is_not_used_again(name):
    async def main():
        async with Scripted(says(UNFIT[name])) as server, upstream_of() as upstream:
            assert await ask(upstream, provider(server.port)) == (200, b"hello")
            assert await ask(upstream, provider(server.port)) == (200, b"hello")
            assert server.connections == 2
    run(main)


@pytest.mark.parametrize("late", [b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n", b""])
def test_what_comes_on_an_idle_connection_is_never_the_next_answer(late):
    async def script(self, reader, writer, n):
        await self.request(reader)
        writer.write(ANSWER)
        await asyncio.sleep(0.01)
        writer.write(late)

    async def main():
        async with Scripted(script) as server, upstream_of() as upstream:
            await ask(upstream, provider(server.port))
            await asyncio.sleep(0.03)
            assert await ask(upstream, provider(server.port)) == (200, b"hello")
            assert [body for _, body in server.requests] == [b"{}", b"{}"] and server.connections == 2
    run(main)


def test_a_stale_connection_is_replaced_once():
    async def script(self, reader, writer, n):
        await self.request(reader)
        writer.write(ANSWER)
        if n == 1:
            await self.request(reader)      # closes in the very moment of the second request
        else:
            await reader.read()

    async def main():
        async with Scripted(script) as server, upstream_of() as upstream:
            await ask(upstream, provider(server.port))
            assert await ask(upstream, provider(server.port), b"two") == (200, b"hello")
            assert [body for _, body in server.requests] == [b"{}", b"two", b"two"]
    run(main)


def test_nothing_is_sent_twice_after_a_byte_of_answer_or_on_a_new_connection():
    async def script(self, reader, writer, n):
        await self.request(reader)
        writer.write(ANSWER)
        await self.request(reader)
        writer.write(b"H")

    async def main():
        async with Scripted(script) as server, upstream_of() as upstream:
            await ask(upstream, provider(server.port))
            with pytest.raises(pomex.TransportError) as caught:
                await ask(upstream, provider(server.port))
            assert (caught.value.phase, caught.value.sent, len(server.requests)) == ("head", True, 2)
        async with Scripted(says(b"", close=True)) as server, upstream_of() as upstream:
            with pytest.raises(pomex.TransportError):
                await ask(upstream, provider(server.port))
            assert server.connections == 1
    run(main)


def test_idle_connections_are_bounded_and_expire(monkeypatch):
    monkeypatch.setattr(pomex, "POOL_SIZE", 2)
    monkeypatch.setattr(pomex, "POOL_IDLE_S", 0.05)

    async def main():
        async with Scripted(says(ANSWER, ANSWER)) as server, upstream_of() as upstream:
            await asyncio.gather(*(ask(upstream, provider(server.port)) for _ in range(5)))
            await until(lambda: server.open == 2)
            await until(lambda: server.open == 0)
            await ask(upstream, provider(server.port))
            assert server.connections == 6
    run(main)


def test_providers_with_other_settings_do_not_share_connections():
    async def main():
        async with Scripted(says(ANSWER, ANSWER)) as server, upstream_of() as upstream:
            await ask(upstream, provider(server.port))
            await ask(upstream, provider(server.port, ca_file="other.pem"))
            assert server.connections == 2
    run(main)


# --- failures -------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n"
ERROR_CLASSES = {
    "nothing": (b"", "head", "ended in the middle"), "half a head": (b"HTTP/1.1 200 OK\r\nco", "head", "ended in the middle"),
    "garbage": (b"\x15\x03\x01\x00\x02\x02\x16", "head", "does not begin with HTTP"),
    "redirect": (b"HTTP/1.1 302 Found\r\nlocation: http://evil/\r\ncontent-length: 0\r\n\r\n", "head", "302, a redirect"),
    "brotli": (b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 0\r\n\r\n", "head", "content-encoding"),
    "cut by length": (HEAD + b"some", "body", "ended in the middle"),
    "cut in chunks": (CHUNKED[:-9], "body", "ended in the middle"),
    "bad chunk": (CHUNKED[:-5] + b"zz\r\n", "body", "chunk is malformed"),
    "bad gzip": (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnope", "body", "not valid gzip"),
    "cut gzip": (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 60\r\n\r\n" + PACKED[:60], "body", "cut short"),
}


@pytest.mark.parametrize("name", ERROR_CLASSES)
def test_every_fault_of_a_provider_is_named_with_its_phase(name):
    answer, phase, words = ERROR_CLASSES[name]

    async def main():
        async with Scripted(says(answer, close=True)) as server, upstream_of() as upstream:
            with pytest.raises(pomex.TransportError) as caught:
                await ask(upstream, provider(server.port), headers=[("authorization", "Bearer sk-secret")])
            error = caught.value
            assert words in str(error) and f"acme (127.0.0.1:{server.port})" in str(error)
            assert (error.phase, error.sent, error.status, error.retryable) == (phase, True, 502, True)
            assert "secret" not in str(error) and "evil" not in str(error) and "/v1" not in str(error)
            assert not isinstance(error, pomex.UpstreamTimeout)
    run(main)


def test_a_reset_is_an_error_and_closes_the_socket():
    async def script(self, reader, writer, n):
        await self.request(reader)
        writer.write(HEAD + b"some")
        await writer.drain()
        linger = bytes([1, 0, 0, 0, 0, 0, 0, 0])
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async def main():
        async with Scripted(script) as server, upstream_of() as upstream:
            with pytest.raises(pomex.TransportError, match="reading the answer: connection reset by peer"):
                await ask(upstream, provider(server.port))
    run(main)


def test_a_refused_connection_and_an_unknown_name_say_that_nothing_was_sent():
    async def main():
        async with upstream_of() as upstream:
            with socket.socket() as unused:
                unused.bind(("127.0.0.1", 0))
                port = unused.getsockname()[1]
                with pytest.raises(pomex.TransportError, match="while connecting: connection refused") as caught:
                    await ask(upstream, provider(port))
                assert (caught.value.phase, caught.value.sent) == ("connect", False)
            with pytest.raises(pomex.TransportError, match="cannot be resolved") as caught:
                await ask(upstream, provider(80, host="nowhere.invalid", connect_timeout_s=5.0))
    run(main)


SLOW = {
    "head": ("first_byte_timeout_s", b""), "body": ("idle_timeout_s", HEAD + b"some"),
    "half a head": ("first_byte_timeout_s", b"HTTP/1.1 200"),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_silent_provider_runs_into_the_limit_that_is_named(name):
    limit, answer = SLOW[name]

    async def main():
        async with Scripted(says(answer)) as server, upstream_of() as upstream:
            begun = time.monotonic()
            with pytest.raises(pomex.UpstreamTimeout, match=f"longer than {limit} = 0.05 s") as caught:
                await ask(upstream, provider(server.port, **{limit: 0.05}))
            assert 0.04 < time.monotonic() - begun < 0.5
            assert isinstance(caught.value, pomex.TransportTimeout) and caught.value.status == 504 and caught.value.sent
            await until(lambda: server.open == 0)
    run(main)


def test_a_dripping_provider_runs_into_the_total_limit():
    async def script(self, reader, writer, n):
        await self.request(reader)
        writer.write(HEAD)
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async def main():
        async with Scripted(script) as server, upstream_of() as upstream:
            with pytest.raises(pomex.UpstreamTimeout, match="total_timeout_s = 0.1 s while reading"):
                await ask(upstream, provider(server.port, total_timeout_s=0.1))
    run(main)


def test_a_request_that_is_not_taken_runs_into_the_first_byte_limit_while_sending():
    async def script(self, reader, writer, n):
        await asyncio.sleep(0.3)

    async def main():
        async with Scripted(script, limit=1024) as server, upstream_of() as upstream:
            with pytest.raises(pomex.UpstreamTimeout, match="while sending the request") as caught:
                await ask(upstream, provider(server.port, first_byte_timeout_s=0.1), bytes(30 * 2**20))
            assert caught.value.phase == "send"
    run(main)


def test_a_slow_client_is_no_idle_provider():
    async def main():
        async with Scripted(says(HEAD + b"x" * 50)) as server, upstream_of() as upstream:
            exchange = await upstream.exchange(provider(server.port, idle_timeout_s=0.05), "GET", "/", [], b"")
            await exchange.read()
            await asyncio.sleep(0.12)
            assert await exchange.read() == b""
            await exchange.close()
    run(main)


@pytest.mark.parametrize("name", ["connect", "head", "body", "between"])
def test_cancelling_closes_the_socket_at_once(name):
    async def main():
        answer = {"head": b"", "body": HEAD, "between": HEAD + b"x", "connect": b""}[name]
        tls = {"scheme": "https"} if name == "connect" else {}       # the server never answers the TLS hello

        async def script(self, reader, writer, n):
            if name == "connect":
                await reader.read()
                await reader.read()
            await says(answer)(self, reader, writer, n)

        async def relay():
            exchange = await upstream.exchange(provider(server.port, **tls), "GET", "/", [], b"")
            try:
                await exchange.read()
                await asyncio.sleep(5)
            finally:
                await exchange.close()

        async with Scripted(script) as server, upstream_of() as upstream:
            task = asyncio.create_task(relay())
            await until(lambda: server.open == 1)
            await asyncio.sleep(0.02)
            begun = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: server.open == 0)
            assert time.monotonic() - begun < 0.2
    run(main)


# --- TLS ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A self-signed CA and a certificate of it for localhost."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl command to make certificates with")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Test CA",
            "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=keyCertSign,digitalSignature")
    openssl("req", *key, "-keyout", "key.pem", "-out", "request.pem", "-subj", "/CN=localhost")
    (folder / "names").write_text("subjectAltName=DNS:localhost,DNS:provider.example\n")
    openssl("x509", "-req", "-in", "request.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-out", "cert.pem", "-extfile", "names")
    return folder


def server_context(folder):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def test_tls_with_an_authority_of_ones_own(certificates):
    async def main():
        chosen = []

        async def script(self, reader, writer, n):
            chosen.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
            await says(ANSWER, ANSWER)(self, reader, writer, n)

        async with Scripted(script, ssl=server_context(certificates)) as server, upstream_of() as upstream:
            to = provider(server.port, "https", "localhost", ca_file=str(certificates / "ca.pem"))
            for _ in range(2):
                assert await ask(upstream, to) == (200, b"hello")
            assert server.connections == 1 and chosen == ["http/1.1"] and len(upstream.contexts) == 1
    run(main)


def test_tls_is_always_verified(certificates):
    async def main():
        async with Scripted(says(ANSWER), ssl=server_context(certificates)) as server, upstream_of() as upstream:
            for to, words in ((provider(server.port, "https", "localhost"), "certificate|issuer"),
                              (provider(server.port, "https", ca_file=str(certificates / "ca.pem")), "IP address mismatch")):
                with pytest.raises(pomex.TransportError, match=words) as caught:
                    await ask(upstream, to)
                assert (caught.value.phase, caught.value.sent) == ("tls", False) and not server.requests
            with pytest.raises(pomex.TransportError, match="no such file") as caught:
                await ask(upstream, provider(server.port, "https", "localhost", ca_file=str(certificates / "none.pem")))
            assert str(certificates) not in str(caught.value)
    run(main)


def test_a_slow_tls_handshake_runs_into_the_connect_limit():
    async def script(self, reader, writer, n):
        while await reader.read(1000):
            pass

    async def main():
        async with Scripted(script) as server, upstream_of() as upstream:
            with pytest.raises(pomex.UpstreamTimeout, match="connect_timeout_s = 0.1 s while setting up TLS") as caught:
                await ask(upstream, provider(server.port, "https", connect_timeout_s=0.1))
            assert (caught.value.phase, caught.value.sent) == ("tls", False)
    run(main)


def test_a_provider_without_tls_fails_in_the_handshake():
    async def script(self, reader, writer, n):
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async def main():
        async with Scripted(script) as server, upstream_of() as upstream:
            with pytest.raises(pomex.TransportError) as caught:
                await ask(upstream, provider(server.port, "https"))
            assert caught.value.phase == "tls"
    run(main)


# --- proxies --------------------------------------------------------------------------------------

@pytest.fixture
def proxies_of(monkeypatch):
    """Makes these the proxies of the environment, and no others."""
    def use(environ):
        for name in list(os.environ):
            if name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
    return use


ENVIRON = {"http_proxy": "http://p1:1", "HTTP_PROXY": "http://p2:2", "HTTPS_PROXY": "http://p3:3",
           "no_proxy": "example.com, .internal,10.0.0.1:8443,[2001:db8::1]:443,[2001:db8::2]"}
PROXIES = [
    ("http", "a.net", 80, "http://p1:1"), ("https", "a.net", 443, "http://p3:3"), ("https", "example.com", 443, ""),
    ("https", "api.example.com", 443, ""), ("https", "notexample.com", 443, "http://p3:3"), ("http", "x.internal", 80, ""),
    ("https", "10.0.0.1", 8443, ""), ("https", "10.0.0.1", 443, "http://p3:3"), ("https", "2001:db8::1", 443, ""),
    ("https", "2001:db8::1", 444, "http://p3:3"), ("https", "2001:db8::2", 1, ""),
]


@pytest.mark.parametrize("scheme, host, port, proxy", PROXIES)
def test_the_environment_names_the_proxy(scheme, host, port, proxy, proxies_of):
    proxies_of(ENVIRON)
    assert pomex.environment_proxy(scheme, pomex.host_and_port(host, port)) == proxy


@pytest.mark.parametrize("environ, proxy", [
    ({"HTTP_PROXY": "http://p:1"}, "http://p:1"), ({"HTTP_PROXY": "http://p:1", "REQUEST_METHOD": "GET"}, ""),
    ({"HTTP_PROXY": "http://p:1", "http_proxy": ""}, ""), ({"all_proxy": "p:1"}, "p:1"), ({"http_proxy": "p:1", "NO_PROXY": "*"}, ""),
    ({"http_proxy": "p:1", "NO_PROXY": "a.net", "no_proxy": "b.net"}, "p:1")])
def test_more_rules_of_the_environment(environ, proxy, proxies_of):
    proxies_of(environ)
    assert pomex.environment_proxy("http", "a.net:80") == proxy


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "[::1]"])
def test_loopback_never_goes_through_a_proxy(host, proxies_of):
    proxies_of({"http_proxy": "http://p:1"})
    to = provider(80, host=host, proxy="http://p:1")
    assert pomex.endpoint_of(to).origin.proxy is None


def test_plain_http_goes_to_the_proxy_in_absolute_form():
    async def main():
        async with Scripted(says(ANSWER, ANSWER)) as proxy, upstream_of() as upstream:
            to = provider(80, host="provider.example", proxy=f"http://us%40er:pw@127.0.0.1:{proxy.port}")
            assert await ask(upstream, to) == (200, b"hello")
            head = proxy.requests[0][0]
            assert head.startswith(b"POST http://provider.example/v1/chat HTTP/1.1\r\nhost: provider.example\r\n")
            assert b"proxy-authorization: Basic dXNAZXI6cHc=\r\n" in head
    run(main)


def test_https_goes_through_a_tunnel_and_only_the_proxy_sees_its_password(certificates, proxies_of):
    async def main():
        async def tunnel(self, reader, writer, n):
            await self.request(reader)
            there, out = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

            async def pump(source, sink):
                with contextlib.suppress(ConnectionError):
                    while data := await source.read(65536):
                        sink.write(data)
                sink.close()
            await asyncio.gather(pump(reader, out), pump(there, writer))

        async with Scripted(says(ANSWER), ssl=server_context(certificates)) as server, Scripted(tunnel) as proxy:
            proxies_of({"https_proxy": f"me:pw@127.0.0.1:{proxy.port}"})
            async with upstream_of() as upstream:
                to = provider(443, "https", "provider.example", proxy="env", ca_file=str(certificates / "ca.pem"))
                assert await ask(upstream, to) == (200, b"hello")
            assert proxy.requests[0][0] == (b"CONNECT provider.example:443 HTTP/1.1\r\nhost: provider.example:443\r\n"
                                            b"proxy-authorization: Basic bWU6cHc=\r\n\r\n")
            assert b"POST /v1/chat HTTP/1.1\r\nhost: provider.example:443\r\n" not in server.requests[0][0]
            assert b"proxy-authorization" not in server.requests[0][0]
    run(main)


@pytest.mark.parametrize("answer, words", [
    (b"HTTP/1.1 407 No\r\ncontent-length: 0\r\n\r\n", "the proxy answered 407"),
    (b"HTTP/1.1 200 OK\r\n\r\n\x16\x03\x01", "bytes of its own"), (b"", "ended in the middle")])
def test_a_proxy_that_gives_no_tunnel_is_named(answer, words):
    async def main():
        async with Scripted(says(answer, close=True)) as proxy, upstream_of() as upstream:
            to = provider(443, "https", "provider.example", proxy=f"http://me:pw@127.0.0.1:{proxy.port}")
            with pytest.raises(pomex.TransportError, match=words) as caught:
                await ask(upstream, to)
            assert (caught.value.phase, caught.value.sent) == ("connect", False) and "pw" not in str(caught.value)
    run(main)


def test_other_kinds_of_proxy_are_refused(proxies_of):
    proxies_of({"https_proxy": "socks5://p:1"})

    async def main():
        async with upstream_of() as upstream:
            with pytest.raises(pomex.TransportError, match="only proxies like http://host:port"):
                await ask(upstream, provider(443, "https", "provider.example", proxy="env"))
    run(main)
