"""Differential fuzzing, in an environment that has h11 and httpx-sse: python fuzz_driver.py POMEX (http|sse) SEED SECONDS

Prints JSON: how many inputs were tried, how often each allowed difference was met, and the differences that none explains.
"""
from __future__ import annotations

import collections
import importlib.util
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import h11
import httpx
import httpx_sse

# --- HTTP requests: our reader against h11's ----------------------------------------------------------
#
# What we refuse is answered with an error and the connection is closed, so being stricter is safe; each way of it stands in
# STRICTER, by our own sentence. What we take and h11 does not, or reads in another way, stands in LAXER: there a second
# reading of the same bytes could hide.

STRICTER = [
    (r"does not end with CRLF|control character", "LF alone as a line end, or a control in a value: RFC 9112 2.2 allows to refuse"),
    (r"header line is malformed", "folded lines: RFC 9112 5.2 asks for 400; names with odd characters"),
    (r"needs HTTP/1\.1", "Transfer-Encoding in HTTP/1.0 or beside Content-Length: RFC 9112 6.1 calls the first faulty, and allows to refuse the other"),
    (r"exactly one Host", "Host missing or twice: RFC 9112 3.2; h11 asks for one too, but takes HTTP/1.0 with two"),
    (r"Host is not a host name", "a Host that is none: RFC 9112 3.2 asks for 400, h11 does not look"),
    (r"request target is neither", "a target outside of the grammar: h11 takes any visible ASCII"),
    (r"Only HTTP/1\.1 and HTTP/1\.0", "other versions: 505"),
    (r"request line is not|not an HTTP/1\.1 request", "the request line: one space, a token, a target, a version; h11 takes more blanks"),
    (r"only expectation met", "an unknown Expect: 417"),
    (r"more than \d+ header fields|are over \d+ bytes|line is over|body is over", "our limits"),
    (r"line before a chunk", "chunk extensions outside of the grammar, sizes over 16 digits, blanks behind the size"),
    (r"data of a chunk is not followed", "a chunk's end: h11 tells it later"),
    (r"only Transfer-Encoding taken", "transfer codings other than one `chunked`"),
    (r"not one decimal number", "Content-Length: a list, or over 19 digits"),
]


LAXER = [
    (r"illegal request line", "the CR of an empty line before a request may still get its LF: we wait, h11 does not"),
    (r"no request line received", "one empty line before a request is skipped: RFC 9112 2.2 asks for it"),
    (r"illegal chunk header: bytearray\(b'[0-9A-Fa-f]{1,16}(?: |\\t)+;", "a blank before a chunk extension: RFC 9112 7.1.1 asks to take it"),
    (r"bad Content-Length, we give out no more", "a Content-Length in a trailer: we pass over trailers, h11 reads them"),
]


REQUESTS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /v1/models?a=b HTTP/1.1\r\nhost: localhost:80\r\naccept: */*\r\n\r\n",
    b"POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", b"HEAD /x HTTP/1.0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3;x=y\r\nabc\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\ntransfer-encoding: Chunked\r\nTrailer: x\r\n\r\nA\r\n0123456789\r\n0\r\nx: y\r\n\r\n",
    b"PUT /a%20b HTTP/1.1\r\nHost: [::1]:8080\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", b"GET http://b/c HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi",
    b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
]
PIECES = [b"\r\n", b"\n", b"\r", b" ", b"\t", b"\x00", b"\x0b", b"\x85", b"\xa0", b":", b";", b",", b"0", b"1", b"+", b"-", b"_", b"0x",
          b"\xff", b"chunked", b"identity", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n", b"HTTP/1.1",
          b"HTTP/1.0", b"%", b"#", b"?", b"@", b"\"", b"99999999999999999999", b"0\r\n\r\n", b"\r\n\r\n", b"Connection: close\r\n", b"/", b"\\",
          b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", b"5\r\nhello\r\n", b"a=\"b\\\"c\"", b"Content-Length: 5\r\nContent-Length: 5\r\n"]


def mutated(random_: random.Random, data: bytes, pieces: list[bytes]) -> bytes:
    for _ in range(random_.choice((0, 1, 1, 1, 2, 2, 3, 5))):
        at, size = random_.randrange(len(data) + 1), random_.choice((0, 0, 1, 1, 2, 8, 30))
        piece = random_.choice((random_.choice(pieces), b"", data[at:at + size] * 2, bytes([random_.randrange(256)])))
        data = data[:at] + piece + data[at + size:]
    return data


def cut(random_: random.Random, data: bytes) -> list[bytes]:
    if random_.random() < 0.5:
        return [data]
    if random_.random() < 0.3:
        return [bytes([byte]) for byte in data]
    places = sorted(random_.randrange(len(data) + 1) for _ in range(random_.randrange(1, 4)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)])]


def compared(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without Host, of which ours is the target's own; h11 writes the framing's headers anew."""
    framing = ("transfer-encoding", "content-length")
    return sorted({(name, re.split("[ \t,]", value.lower())[0] if name in framing else value)
                   for name, value in headers if name != "host"})


def split_target(target: str) -> tuple[str, str]:
    """Path and query of a request target, without the authority of an absolute one."""
    path, _, query = re.sub("^https?://[^/?]*", "", target, flags=re.IGNORECASE).partition("?")
    return path or "/", query


def read_by_us(pomex: Any, pieces: Iterable[bytes]) -> list[Any]:
    """[method, path, query, headers, body, ...] and how it ended: "need" more, or our sentence."""
    reader, found, body = pomex.RequestReader(pomex.Limits(max_body_bytes=10_000)), [], b""
    for data in pieces:
        reader.feed(data)
        while True:
            try:
                part = reader.next()
            except pomex.ProtocolError as error:
                return [*found, body, f"refused: {error}"] if body else [*found, f"refused: {error}"]
            if part is pomex.NEED_DATA:
                break
            if part is pomex.END:
                found.append(body)
                body = b""
            elif isinstance(part, bytes):
                body += part
            else:
                found += [part.method, part.path, part.query, compared(part.headers)]
    return [*found, body, "need"] if body else [*found, "need"]


def read_by_h11(pieces: Iterable[bytes]) -> list[Any]:
    connection, found, body = h11.Connection(h11.SERVER, max_incomplete_event_size=80_000), [], b""
    for data in pieces:
        try:
            connection.receive_data(data)
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    break
                if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                    if connection.their_state is not h11.DONE:
                        return [*found, "need"]
                    connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                    connection.send(h11.EndOfMessage())
                    connection.start_next_cycle()
                elif isinstance(event, h11.Request):
                    found += [event.method.decode(), *split_target(event.target.decode()), compared(
                        (name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers)]
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    found.append(body)
                    body = b""
                    if connection.our_state is h11.MUST_CLOSE:
                        return [*found, "need"]
                    connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                    connection.send(h11.EndOfMessage())
                    if connection.our_state is h11.MUST_CLOSE or connection.their_state is h11.MUST_CLOSE:
                        return [*found, "need"]
                    connection.start_next_cycle()
        except h11.RemoteProtocolError as error:
            return [*found, body, f"refused: {error}"] if body else [*found, f"refused: {error}"]
    return [*found, body, "need"] if body else [*found, "need"]


def http_case(pomex: Any, random_: random.Random) -> tuple[bytes, Any, Any, str]:
    data = mutated(random_, b"".join(random_.choices(REQUESTS, k=random_.choice((1, 1, 2)))), PIECES)
    pieces = cut(random_, data)
    ours, theirs = read_by_us(pomex, pieces), read_by_h11([data])
    if ours == theirs:
        return data, ours, theirs, "the same"
    refused, theirs_refused = ours[-1].startswith("refused"), theirs[-1].startswith("refused")
    if refused and theirs_refused and ours[:-1] == theirs[:-1][:len(ours) - 1]:
        return data, ours, theirs, "both refuse"
    if refused and ours[:-1] == theirs[:len(ours) - 1] or refused and is_beginning(ours[:-1], theirs):
        return data, ours, theirs, next((why for pattern, why in STRICTER if re.search(pattern, ours[-1])), "")
    if theirs_refused and (theirs[:-1] == ours[:len(theirs) - 1] or is_beginning(theirs[:-1], ours)):
        said = theirs[-1] + (", we give out no more" if len(ours) == len(theirs) else "")
        return data, ours, theirs, next((why for pattern, why in LAXER if re.search(pattern, said)), "")
    return data, ours, theirs, ""


def is_beginning(refused: list[Any], whole: list[Any]) -> bool:
    """Did the one that refused give out no more than the other, where the last is a body of which a part came before?"""
    last = len(refused) - 1
    return (last < len(whole) and refused[:-1] == whole[:last] and isinstance(refused[-1], bytes)
            and isinstance(whole[last], bytes) and whole[last].startswith(refused[-1]))


# --- server-sent events: our decoder against httpx-sse's ----------------------------------------------

EVENTS = [
    b"data: a\n\n", b"event: x\ndata: {\"a\":1}\n\n", b": comment\n\n", b"data: 1\ndata: 2\n\n", b"id: 7\nevent: y\nretry: 3\ndata:z\n\n",
    b"data: caf\xc3\xa9 \xf0\x9f\x98\x80\r\n\r\n", b"data\n\n", b"event: only\n\n", b"data: [DONE]\n\n", b"\xef\xbb\xbfdata: bom\n\n",
    b"data:  two blanks\n\n", b"data: a\rdata: b\r\r",
]
SSE_PIECES = [b"\n", b"\r", b"\r\n", b"\n\n", b":", b" ", b"data", b"data:", b"event:", b"id: \x00", b"\x00", b"\xef\xbb\xbf", b"\xff", b"\xc3",
              b"\xe2\x80\xa8", b"\xc2\x85", b"\x0b", b"\x0c", b"\x1c", b"{", b"}", b"retry: x", b"Data: a", b" data: a", b"data : a"]


def sse_by_us(pomex: Any, pieces: Iterable[bytes]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The events, and those that only finish() gave."""
    decoder = pomex.SSEDecoder()
    events = [(event.event, event.data) for data in pieces for event in decoder.feed(data)]
    return events, [(event.event, event.data) for event in decoder.finish()]


def sse_by_httpx(data: bytes) -> Iterator[tuple[str, str, bool]]:
    response = httpx.Response(200, headers={"content-type": "text/event-stream; charset=utf-8"}, content=data)
    for event in httpx_sse.EventSource(response).iter_sse():
        yield event.event, event.data, bool(event.data)


def sse_case(pomex: Any, random_: random.Random) -> tuple[bytes, Any, Any, str]:
    data = mutated(random_, b"".join(random_.choices(EVENTS, k=random_.choice((1, 2, 3, 5)))), SSE_PIECES)
    ours, last = sse_by_us(pomex, cut(random_, data))
    theirs = list(sse_by_httpx(data))
    plain = [(event, text) for event, text, _ in theirs]
    if ours == plain and not last:
        return data, ours, theirs, "the same"
    for why, changed_ours, changed_theirs in allowed_sse(data, ours, last, theirs):
        if changed_ours == changed_theirs:
            return data, [*ours, *last], theirs, why
    return data, [*ours, *last], theirs, ""


def allowed_sse(data: bytes, ours: Any, last: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each allowed difference, with both sides as they are without it."""
    with_data = [(event, text) for event, text, has in theirs if has]
    ours_with_data = [(event, text) for event, text in ours if text]
    yield "the last event lacks its empty line: we give it out if it can be no part of a longer one", ours, [e[:2] for e in theirs]
    yield "an event without data: WHATWG gives none out, httpx-sse does", ours_with_data, with_data
    marked = data.removeprefix(b"\xef\xbb\xbf")
    if marked != data:
        inner = [(event, text) for event, text, has in sse_by_httpx(marked) if has]
        yield "a byte order mark at the beginning: WHATWG drops it, httpx-sse does not", ours_with_data, inner
    if re.search(rb"id:[^\r\n]*\x00", data):
        yield "an id with NUL is ignored by both, httpx-sse still counts it", ours_with_data, with_data


CASES: dict[str, Callable[[Any, random.Random], tuple[bytes, Any, Any, str]]] = {"http": http_case, "sse": sse_case}


def main() -> None:
    file, kind, seed, seconds = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("pomex", file)
    assert spec and spec.loader
    sys.modules["pomex"] = pomex = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pomex)
    random_, counts, unexplained = random.Random(seed), collections.Counter[str](), []
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end and len(unexplained) < 20:
        data, ours, theirs, why = CASES[kind](pomex, random_)
        counts[why] += 1
        if not why:
            unexplained.append({"data": repr(data), "ours": repr(ours), "theirs": repr(theirs)})
    print(json.dumps({"tried": sum(counts.values()), "counts": counts.most_common(), "unexplained": unexplained}))


if __name__ == "__main__":
    main()
