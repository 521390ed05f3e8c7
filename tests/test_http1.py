"""Layer 3: HTTP/1.1 fed with bytes. Every vector goes in whole, byte by byte, and cut at random."""
import email.message
import gzip
import http.client
import http.server
import io
import random
import time
import zlib

import pytest

import pomex
from pomex import (
    END,
    LAST_CHUNK,
    NEED_DATA,
    Headers,
    ContentDecoder,
    Limits,
    ProtocolError,
    RequestReader,
    ResponseReader,
    chunk,
)

LIMITS = Limits(max_line_bytes=300, max_head_bytes=2000, max_headers=10, max_body_bytes=1000)


def whole(data):
    return [data]


def byte_by_byte(data):
    return [data[i:i + 1] for i in range(len(data))]


def cut_at_random(data, seed=0):
    chance = random.Random(seed)
    cuts = sorted(chance.sample(range(len(data) + 1), min(len(data), chance.randint(1, 8))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]


CUTTINGS = [whole, byte_by_byte]
both_cuttings = pytest.mark.parametrize("cut", CUTTINGS)


def drain(reader, parts):
    """Takes what there is: heads, bodies (pieces joined), END."""
    while True:
        piece = reader.next()
        if piece is NEED_DATA:
            return
        if isinstance(piece, bytes):
            assert piece, "an empty piece says nothing"
            if parts and isinstance(parts[-1], bytes):
                piece = parts.pop() + piece
        parts.append(piece)
        if piece is END and not isinstance(reader, RequestReader):
            return


def read(reader, pieces, eof=False):
    """All parts, then the status that answers a bad request, or the word for a bad answer."""
    parts = []
    try:
        for data in pieces:
            reader.feed(data)
            drain(reader, parts)
        if eof:
            reader.feed_eof()
            drain(reader, parts)
    except ProtocolError as error:
        parts.append(error.status if isinstance(reader, RequestReader) else "broken")
    return parts


def request(cut, data, limits=LIMITS, eof=False):
    return read(RequestReader(limits), cut(data), eof)


def answer(cut, data, method="GET", limits=pomex.ANSWER_LIMITS, eof=False):
    reader = ResponseReader(limits)
    reader.start(method)
    return read(reader, cut(data), eof)


def plain(parts):
    """Heads by what tells them apart, for comparing."""
    return [(tuple(part.headers), *[getattr(part, name, None) for name in (
        "http11", "path", "query", "status", "length", "keep_alive")])
            if isinstance(part, (pomex.RequestHead, pomex.ResponseHead)) else part for part in parts]


# --- requests that are taken ----------------------------------------------------------------------

HOST = b"Host: a\r\n"
GET = b"GET /x HTTP/1.1\r\n" + HOST
POST = b"POST /x HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

TAKEN = {   # name: bytes, attributes of the head, body
    "a plain GET": (GET + b"\r\n",
                    {"method": "GET", "path": "/x", "query": "", "http11": True,
                     "length": 0, "keep_alive": True, "expect_continue": False},
                    b""),
    "one empty line before": (b"\r\n" + GET + b"\r\n", {"path": "/x"}, b""),
    "a query": (b"GET /a/b?c=d&e=%20?/ HTTP/1.1\r\n" + HOST + b"\r\n",
                {"path": "/a/b", "query": "c=d&e=%20?/"}, b""),
    "an empty query": (b"GET /a? HTTP/1.1\r\n" + HOST + b"\r\n", {"path": "/a", "query": ""},
                       b""),
    "percent signs are left": (b"GET /a%2fb%00 HTTP/1.1\r\n" + HOST + b"\r\n", {"path": "/a%2fb%00"}, b""),
    "two slashes are a path": (b"GET //b/c HTTP/1.1\r\n" + HOST + b"\r\n", {"path": "//b/c"}, b""),
    "asterisk": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", {"path": "*"}, b""),
    "any token is a method": (b"M-SEARCH!x /x HTTP/1.1\r\n" + HOST + b"\r\n", {"method": "M-SEARCH!x"}, b""),
    "absolute": (b"GET http://b:8/y?z HTTP/1.1\r\n" + HOST + b"\r\n",
                 {"path": "/y", "query": "z"}, b""),
    "absolute without path": (b"GET HTTPS://b?z HTTP/1.1\r\n" + HOST + b"\r\n", {"path": "/", "query": "z"},
                              b""),
    "HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", {"http11": False, "keep_alive": False}, b""),
    "HTTP/1.0 keep-alive": (b"GET / HTTP/1.0\r\nConnection: x, Keep-Alive\r\n\r\n", {"keep_alive": True},
                            b""),
    "HTTP/1.0 both": (b"GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n", {"keep_alive": False}, b""),
    "close": (GET + b"Connection: close\r\n\r\n", {"keep_alive": False}, b""),
    "close in a second line": (GET + b"Connection: te\r\nConnection: x ,\tCLOSE\r\n\r\n",
                               {"keep_alive": False}, b""),
    "closed is not close": (GET + b"Connection: closed\r\n\r\n", {"keep_alive": True}, b""),
    "a length": (POST + b"Content-Length: 5\r\n\r\nhello", {"length": 5}, b"hello"),
    "leading zeros": (POST + b"Content-Length: 0005\r\n\r\nhello", {"length": 5}, b"hello"),
    "length 0": (POST + b"Content-Length: 0\r\n\r\n", {"length": 0}, b""),
    "an equal list": (POST + b"Content-Length: 5, 5\r\nContent-Length:5\r\n\r\nhello", {"length": 5},
                      b"hello"),
    "the largest body": (POST + b"Content-Length: 1000\r\n\r\n" + b"x" * 1000, {"length": 1000}, b"x" * 1000),
    "a GET with a body": (GET + b"Content-Length: 2\r\n\r\n\r\n", {"length": 2}, b"\r\n"),
    "chunks": (CHUNKED + b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n", {"length": None}, b"hello!"),
    "no chunks": (CHUNKED + b"0\r\n\r\n", {"length": None}, b""),
    "many zeros": (CHUNKED + b"0000000000000005\r\nhello\r\n000\r\n\r\n", {}, b"hello"),
    "hex": (CHUNKED + b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", {}, b"0123456789" * 2),
    "line ends in chunks": (CHUNKED + b"6\r\n\r\n0\r\n\r\r\n0\r\n\r\n", {}, b"\r\n0\r\n\r"),
    "extensions": (CHUNKED + b'5;a\r\nhello\r\n1 ; b=c;d = "e;\\\\"\r\n!\r\n0;x=y\r\n\r\n', {}, b"hello!"),
    "a quoted quote": (CHUNKED + b'1;d="e\\"f"\r\n!\r\n0\r\n\r\n', {}, b"!"),
    "trailers": (CHUNKED + b"1\r\n!\r\n0\r\nA: b\r\nContent-Length: 7\r\n\r\n", {}, b"!"),
    "Chunked in capitals": (POST + b"Transfer-Encoding: \tChunked \r\n\r\n1\r\n!\r\n0\r\n\r\n",
                            {"length": None}, b"!"),
    "expect": (POST + b"Expect: 100-Continue\r\nContent-Length: 1\r\n\r\nx", {"expect_continue": True}, b"x"),
    "expect without a body": (GET + b"Expect: 100-continue\r\n\r\n", {"expect_continue": False}, b""),
    "expect in 1.0": (b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
                      {"expect_continue": False}, b"x"),
    "a request line at its limit": (b"GET /" + b"x" * 286 + b" HTTP/1.1\r\n" + HOST + b"\r\n", {}, b""),
    "as many headers as may be": (GET + b"a: b\r\n" * 9 + b"\r\n", {}, b""),
    "a head at its limit": (GET + b"a: " + b"x" * (2000 - len(GET) - 3) + b"\r\n\r\n", {}, b""),
}
for name in (b"a.b", b"127.0.0.1", b"127.0.0.1:80", b"[::1]", b"[::1]:8", b"a:", b"a-_b", b"%41", b"A:1"):
    TAKEN["Host " + name.decode()] = (b"GET / HTTP/1.1\r\nHost: " + name + b"\r\n\r\n", {"path": "/"}, b"")


@pytest.mark.parametrize("name", TAKEN)
@both_cuttings
def test_what_http_allows_is_taken(name, cut):
    data, attributes, body = TAKEN[name]
    head, *rest = request(cut, data, eof=True)
    assert {key: getattr(head, key) for key in attributes} == attributes
    assert rest == [*([body] if body else []), END]


def test_every_request_reads_the_same_however_it_is_cut():
    for seed, (data, _, _) in enumerate(TAKEN.values()):
        expected = plain(request(whole, data))
        for extra in range(30):
            assert plain(request(lambda data: cut_at_random(data, seed + extra * 1000), data)) == expected


@both_cuttings
def test_pipelined_requests_come_out_one_after_the_other(cut):
    kept = [data for data, _, _ in TAKEN.values() if request(whole, data)[0].keep_alive]
    parts = request(cut, b"".join(kept))
    assert parts.count(END) == len(kept) > 30
    assert plain(parts) == [part for data in kept for part in plain(request(whole, data))]


@both_cuttings
def test_each_request_may_have_its_empty_line(cut):
    assert request(cut, (b"\r\n" + GET + b"\r\n") * 3 + b"\r\n", eof=True).count(END) == 3


@both_cuttings
def test_after_close_nothing_more_is_read(cut):
    parts = request(cut, GET + b"Connection: close\r\n\r\n" + GET + b"\r\n", eof=True)
    assert len(parts) == 2 and parts[-1] is END


def test_headers_keep_order_and_are_lower_case_latin_1():
    head = request(whole, GET + b"X-A:\t one \t\r\nx-b:\r\nX-A: tw\xf6,\t3\r\n\r\n")[0]
    assert head.headers.items == list(head.headers) == [("host", "a"), ("x-a", "one"), ("x-b", ""), ("x-a",
        "tw\xf6,\t3")]
    assert head.headers.get("x-a") == "one" and head.headers.get_all("x-a") == ["one", "tw\xf6,\t3"]
    assert head.headers.get_all("x-b") == [""]
    assert head.headers.get("x-c") == "" and head.headers.get("x-c",
        "d") == "d" and head.headers.get_all("x-c") == []


def test_headers_show_nothing_of_themselves():
    assert "secret" not in repr(Headers([("authorization", "secret")]))


@pytest.mark.parametrize("before", [b"GET http://b:8/ HTTP/1.1\r\nX: y\r\nHost: a\r\n\r\n",
    b"GET http://b:8/ HTTP/1.0\r\nX: y\r\n\r\n"])
def test_an_absolute_target_wins_over_host(before):
    assert request(whole, before)[0].headers.items == [("host", "b:8"), ("x", "y")]


def test_a_body_is_not_copied_when_the_reads_hold_nothing_else():
    reader = RequestReader(Limits())
    reader.feed(POST + b"Content-Length: 200000\r\n\r\n")
    reader.next()
    piece = bytes(100000)
    for _ in range(2):
        reader.feed(piece)
        assert reader.next() is piece
    assert reader.next() is END


def test_all_whole_chunks_at_hand_are_one_piece():
    reader = RequestReader(Limits())
    reader.feed(CHUNKED + b"".join(chunk(b"x" * n) for n in range(1, 40)) + b"64\r\nyy")
    reader.next()
    assert [reader.next(), reader.next()] == [b"x" * 780, b"yy"]
    assert reader.next() is NEED_DATA
    reader.feed(b"z" * 98 + b"\r\n" + LAST_CHUNK)
    assert [reader.next(), reader.next(), reader.next()] == [b"z" * 98, END, NEED_DATA]


def test_good_chunks_before_a_bad_one_are_given_out():
    assert request(whole, CHUNKED + b"2\r\nab\r\n3\r\ncd")[1:] == [b"abcd"]
    assert request(whole, CHUNKED + b"2\r\nab\r\nzz\r\n")[1:] == [b"ab", 400]


def test_idle_means_nothing_of_the_next_request_is_here():
    reader = RequestReader(LIMITS)
    assert reader.idle
    for data, idle in ((b"G", False), (GET[1:] + b"\r\n", True), (b"\r\n", True), (b"GET", False)):
        reader.feed(data)
        drain(reader, [])
        assert reader.idle is idle


def test_an_idle_reader_keeps_no_buffer():
    reader = RequestReader(LIMITS)
    reader.feed((GET + b"\r\n") * 1000)
    drain(reader, [])
    assert reader._data == b""


@pytest.mark.parametrize("sent", [b"", b"\r\n", GET + b"\r\n"])
def test_the_end_between_requests_is_no_error(sent):
    assert 400 not in request(whole, sent, eof=True)


@pytest.mark.parametrize("name", TAKEN)
def test_the_end_inside_a_request_is_an_error(name):
    data = TAKEN[name][0].removeprefix(b"\r\n")
    for end in range(1, len(data)) if len(data) < 300 else (1, 100, len(data) - 1):
        assert request(whole, data[:end], eof=True)[-1] == 400


# --- requests that are refused --------------------------------------------------------------------

BAD: dict[str, tuple[bytes, int]] = {}


def bad(status, template, *fillings):
    """One vector for each filling of the template's @."""
    for filling in fillings or (b"",):
        data = template.replace(b"@", filling)
        BAD[f"{status} {data[:90]!r} {len(data)}"] = (data, status)


CONTROLS = [bytes([byte]) for byte in [*range(9), 11, 12, *range(14, 32), 127]]
NEXT = b"\r\n" + HOST + b"\r\n"

# The request line.
bad(400, b"@" + NEXT,
    b"GET", b"GET ", b"GET /", b"GET / ", b"GET / HTTP", b"GET / HTTP/", b"GET / HTTP/1", b"GET / HTTP/1.",
    b"GET / HTTP/.1", b"GET / HTTP/1.1 ", b"GET / HTTP/1.1x", b"GET / HTTP/1.1.1", b"GET / HTTP/1.10",
    b"GET / HTTP/11.1", b"GET / HTTP/01.1", b"GET / HTTP/+1.1", b"GET / HTTP/1,1", b"GET / HTTP 1.1",
    b"GET / HTTP/ 1.1", b"GET / http/1.1", b"GET / HTTPS/1.1", b"GET / Http/1.1", b"GET / ICE/1.0",
    b"GET / RTSP/1.0", b"GET / 1.1", b"GET / HTTP/1.\xb2", b"GET / HTTP/0x1.1", b" GET / HTTP/1.1",
    b"\tGET / HTTP/1.1", b"GET  / HTTP/1.1", b"GET /  HTTP/1.1", b"GET\t/ HTTP/1.1", b"GET /\tHTTP/1.1",
    b"GET / x HTTP/1.1", b"GET /\x0b HTTP/1.1", b"GET /\x85 HTTP/1.1", b"GET /\xa0HTTP/1.1",
    b"GET\xa0/ HTTP/1.1", b"G\x00T / HTTP/1.1", b"G\xc4T / HTTP/1.1", b"G(T / HTTP/1.1", b"GET: / HTTP/1.1",
    b'"GET" / HTTP/1.1', b"G@T / HTTP/1.1", b"G\rT / HTTP/1.1", b"G\nT / HTTP/1.1", b"GET /\r HTTP/1.1",
    b"GET /\n HTTP/1.1", b"GET / HTTP/1.1\r", b"GET / HTTP/1.1\n", b"GET /\x00 HTTP/1.1",
    b"GET / HTTP/1.1\x00", b"/ HTTP/1.1", b"HTTP/1.1 200 OK", b"{}", b"")
# Targets.
bad(400, b"GET @ HTTP/1.1" + NEXT,
    b"x", b"x/y", b"*", b"?x", b"", b"a:80", b"#", b"/#a", b"/a#b", b"/a?b#c", b"/%", b"/%1", b"/%zz",
    b"/%1g?x", b"/?%", b"/?%4", b"/\xe4", b"/?\xe4", b'/"', b"/<", b"/>", b"/\\", b"/^", b"/`", b"/{", b"/|",
    b"/}", b"/?{}", b"/?|", b"/?\\", b"/[", b"/?]", b"\\", b"http:", b"http:/", b"http://", b"http:///",
    b"http:///x", b"http://?x", b"http://a b/", b"http://u@h/", b"http://u:p@h/", b"http://a#b",
    b"http://a:b/", b"http://a:1:2/", b"http://[::1/", b"http://::1/", b"http://a\\b/", b"ftp://a/",
    b"file:///etc/passwd", b"https:a/b", b"xhttp://a/", b"http//a/", b"javascript:0", b"http://a:123456/")
bad(400, b"OPTIONS @ HTTP/1.1" + NEXT, b"**", b"*?x", b"*/")
bad(400, b"CONNECT a:443 HTTP/1.1" + NEXT)
# Versions.
bad(505, b"GET / HTTP/@" + NEXT, b"0.9", b"1.2", b"1.9", b"2.0", b"0.0", b"3.0", b"9.9")
bad(505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
# What is not HTTP at all is refused before any line is whole.
bad(400, b"@",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x16", b"\x00", b"\x00\x00\x00", b"\x80\x2e\x01", b" ",
    b"\n", b"\nGET", b"\rG", b"\r\n\r\n", b"\r\n\r\nGET", b"\r\n\n", b"\r\r", b"\x05\x01\x00", b"{\"a\"",
    b"\x1f\x8b", b"<x>", b"\xef\xbb\xbfGET", b"GET\n", b"GET\r", b"GET\x00", b"GET\t")
# Header names and values.
bad(400, GET + b"a@: c\r\n\r\n", *CONTROLS)
bad(400, GET + b"a: b@c\r\n\r\n", *CONTROLS)
bad(400, GET + b"a: @\r\n\r\n", *CONTROLS)
bad(400, GET + b"a@b: c\r\n\r\n", *[bytes([byte]) for byte in b'(),/;<=>?@[\\]{}" \t\x80\xa0\xff'])
bad(400, GET + b"@\r\n\r\n",
    b"a", b":", b": b", b" a: b", b"\ta: b", b"a : b", b"a\t: b", b"a b: c", b" ", b"a: b\r\n c",
    b"a: b\r\n\tc", b"a: b\r\n ", b"a: b\rc: d", b"a: b\nc: d", b"a: b\n", b"a: b\r", b"a: b\r\r", b"a\r: b",
    b"a\n: b", b"a:\rb", b"a:\nb", b"\r: b", b"\xe4: b", b"a=b", b"\xef\xbb\xbfa: b", b"a: \x00",
    b"Host\x00: b", b"\x0ba: b", b"a\x0b: b", b"a\x85: b", b"a\xa0: b")
# Line ends: each of them, with only a half, or the wrong way round.
for end in (b"\n", b"\r", b"\n\r", b"\r\r\n", b"\n\n"):
    bad(400, b"GET / HTTP/1.1@Host: a\r\nb: c\r\n\r\n", end)
    bad(400, b"GET / HTTP/1.1\r\nHost: a@b: c\r\n\r\n", end)
    bad(400, b"GET / HTTP/1.1\r\nHost: a\r\nb: c@\r\n", end)
    bad(400, b"GET / HTTP/1.1\r\nHost: a\r\nb: c\r\n@x", end)
bad(400, b"GET / HTTP/1.1\nHost: a\n\n")
# Host.
bad(400, b"GET / HTTP/1.1\r\n\r\n")
bad(400, b"GET http://a/ HTTP/1.1\r\n\r\n")
bad(400, b"GET / HTTP/1.1\r\nHost: a\r\n@\r\n\r\n", b"Host: a", b"host: b", b"HOST:")
bad(400, b"GET @ HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n", b"/", b"http://a/")
bad(400, b"GET / HTTP/1.1\r\nHost: @\r\n\r\n",
    b"", b"a?x", b"a/x", b"a#x", b"a x", b"a,\tb", b"a\\b", b"u@a", b"http://a", b"//a", b"a:b", b"a:-1",
    b"a:+1", b"a: 1", b"a:1:2", b"a:123456", b"::1", b"[::1", b"::1]", b"[]", b"[a]x", b"[::1]x",
    b"[::1%25e]", b"[x]", b"<a>", b'"a"', b"{a}", b"a|b", b"a^b", b"a`b", b"\xe4", b"a%", b"a%4", b"a%zz",
    b":80", b"a:\xb2", b"a\x85")
bad(400, b"GET http://a/ HTTP/1.1\r\nHost: @\r\n\r\n", b"", b"a?x", b"a/b")
# Content-Length.
LENGTHS = [b"+5", b"-5", b"-0", b"+0", b"5 5", b"5,6", b"5, 5, 6", b"5,", b",5", b",", b"", b"0x5", b"5h",
           b"1_0", b"5.0", b"5e0", b"0b1", b"5;", b'"5"', b"five", b"\xb2", b"\xd9\xa5", b"\xef\xbc\x95",
           b"5\xa0", b"\x855", b"5,\xa05", b"05,5", b"5 ,+5", b"1" * 20, b"9" * 100, b"0" * 50 + b"5",
           b"18446744073709551621"]
bad(400, POST + b"Content-Length: @\r\n\r\nhello", *LENGTHS)
bad(400, POST + b"Content-Length: 5\r\nContent-Length: @\r\n\r\nhello", b"6", b"05", b"", b"+5", b"5,6", b"0")
bad(413, POST + b"Content-Length: @\r\n\r\n", b"1001", b"99999", b"9" * 19, b"1001, 1001")
# Transfer-Encoding.
bad(501, POST + b"Transfer-Encoding: @\r\n\r\n0\r\n\r\n",
    b"", b",", b",chunked", b"chunked,", b"chunked,,", b"chunked, chunked", b"chunked;q=1",
    b"chunked chunked", b"\"chunked\"", b"chunked\xa0", b"\x85chunked", b"chunk\xebd", b"chunked;",
    b"'chunked' x", b"ch unked")
bad(501, POST + b"Transfer-Encoding: chunked\r\n@\r\n\r\n0\r\n\r\n", b"Transfer-Encoding: chunked", b"Transfer-Encoding:")
bad(400, POST + b"Transfer-Encoding: chunked\r\n@\r\n\r\n0\r\n\r\n", b"Content-Length: 5", b"Content-Length: 0",
    b"content-length:", b"Content-Length: x", b"Transfer-Encoding : chunked",
    b"Transfer-Encoding:\x0bchunked", b"Transfer_Encoding\x00: x")
bad(501, POST + b"Transfer-Encoding: @\r\n\r\n",
    b"gzip", b"identity", b"gzip, chunked", b"xchunked", b"chunkedchunked", b"deflate", b"chunked, gzip",
    b"x", b"chunked, identity", b"identity, chunked", b"chun", b"chunked-x", b"'chunked'")
bad(501, POST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n")
bad(400, b"POST / HTTP/1.0\r\nTransfer-Encoding: @\r\n\r\n", b"chunked", b"gzip", b"identity")
bad(400, b"POST / HTTP/1.0\r\nContent-Length: 1\r\nTransfer-Encoding: @\r\n\r\n", b"chunked", b"gzip")
# Expect.
bad(417, POST + b"Expect: @\r\n\r\n", b"", b"100", b"200-ok", b"100-continue, x", b"100-continue;x",
    b"100-continue,100-continue", b"x=y")
# Chunks.
bad(400, CHUNKED + b"@\r\nhello\r\n0\r\n\r\n",
    b"", b"g", b"0x5", b"+5", b"-5", b" 5", b"5 ", b"5\t", b"5_0", b"\xb2", b"5\x00", b"5\x0b", b"5,5",
    b"5 5", b"5;\x00", b"5;", b"5;;a", b"5;=", b"5;a=", b"5;a=b=c", b"5;a b", b'5;a="', b'5;a="b',
    b'5;a="b"c', b"5;a=\x7f", b'5;a="\x01"', b"5;a\r", b"5;a=b\n", b"5\n", b"5\r", b"5\r\r", b"5\n\n",
    b"0" * 16 + b"5", b"1" * 17, b"5;" + b"a" * 300, b'5;a="' + b"b" * 300 + b'"', b"05h", b"5;a:b", b"5;(a)",
    b"\r", b"\n", b"\x00", b"5;a=b;", b"5 a", b"5; a=b c")
bad(400, CHUNKED + b"5\r\nhello@0\r\n\r\n", b"xx", b"\rx", b"x\n", b"\n\r", b"\n", b"\r\r", b"\n\n", b"!\r\n",
    b" \r\n", b"\x00\r\n")
bad(400, CHUNKED + b"5\nhello\n0\n\n")
bad(400, CHUNKED + b"1\r\nx\r\n@", b"x\r\n", b"0 \r\n", b"0\n", b"0\rx", b"-0\r\n", b"0x0\r\n", b"\r\n")
bad(400, CHUNKED + b"0\r\n@\r\n\r\n", b"a", b"a : b", b" a: b", b"a: b\n", b"a: \x00", b"a: b\r\n c", b"\n",
    b"\r", b"GET / HTTP/1.1", b": b", b"a\rb: c")
bad(431, CHUNKED + b"0\r\n@\r\n\r\n", b"a: b\r\n" * 10 + b"a: b", b"a: " + b"x" * 400)
bad(413, CHUNKED + b"@\r\n", b"3e9", b"ffffffff", b"f" * 16, b"3e8\r\n" + b"x" * 1000 + b"\r\n1")
# Limits of the head.
bad(414, b"GET /@", b"x" * 400, b"x" * 3000, b"x" * 288 + b" HTTP/1.1" + NEXT,
    b"x" * 400 + b" HTTP/1.1" + NEXT)
bad(414, b"G@", b"E" * 301, b"E" * 400)         # 300 and a CRLF would fit
bad(414, b"GET /@ HTTP/1.1" + NEXT, b"x" * 287)
bad(431, GET + b"@\r\n\r\n", b"a: b\r\n" * 9 + b"a: b", b"a: " + b"x" * 2000, b"a: " + b"x" * 5000,
    (b"a: " + b"x" * 900 + b"\r\n") * 3 + b"a: b")
bad(431, GET + b"@", b"a: " + b"x" * 2000, b"a: b\r\n" * 1000, b"a: " + b"x" * (2001 - len(GET)),
    b"a: " + b"x" * (1998 - len(GET)) + b"\r\n\r\n")


def test_there_are_hundreds_of_bad_requests():
    assert len(BAD) > 400


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_at_once_and_for_good(name):
    data, status = BAD[name]
    for cut in CUTTINGS:
        reader = RequestReader(LIMITS)
        assert read(reader, cut(data))[-1] == status, cut.__name__
        reader.feed(GET + b"\r\n")
        with pytest.raises(ProtocolError) as caught:
            reader.next()
        assert (caught.value.status, caught.value.type) == (status, "invalid_request_error")
        assert caught.value.code and not caught.value.retryable and not reader.idle


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_behind_a_good_one_spoils_only_itself(name):
    data, status = BAD[name]
    if data.startswith(b"\r"):      # one empty line before a request is skipped
        return
    first, end, *_, last = request(whole, GET + b"\r\n" + data)
    assert (first.path, end, last) == ("/x", END, status)


def test_the_default_limits_are_what_the_standard_and_the_clients_need():
    long_target = b"/" + b"x" * 8000
    many = b"".join(b"a%d: %b\r\n" % (n, b"x" * 600) for n in range(99))
    head = request(whole, b"GET " + long_target + b" HTTP/1.1\r\n" + HOST + b"\r\n", Limits())[0]
    assert head.path == long_target.decode()
    assert len(request(whole, GET + many + b"\r\n", Limits())[0].headers.items) == 100


def test_a_message_does_not_repeat_what_was_sent():
    for data, _ in BAD.values():
        reader = RequestReader(LIMITS)
        reader.feed(data.replace(b" b", b" secret").replace(b"/", b"/secret"))
        reader.feed_eof()
        with pytest.raises(ProtocolError) as caught:
            drain(reader, [])
        assert "secret" not in str(caught.value) and str(caught.value).isprintable()


# --- answers --------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
ANSWERS = {     # name: bytes, method, attributes, body, needs the end of the connection
    "length": (OK + b"Content-Length: 2\r\n\r\nhi", "GET",
               {"status": 200, "keep_alive": True, "length": 2}, b"hi", False),
    "length 0": (OK + b"Content-Length: 0\r\n\r\n", "POST", {"length": 0}, b"", False),
    "chunked": (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx: y\r\n\r\n", "GET",
                {"length": None, "keep_alive": True}, b"hi", False),
    "until close": (OK + b"\r\nhi", "GET", {"length": None, "keep_alive": False}, b"hi",
                    True),
    "nothing until close": (OK + b"\r\n", "GET", {"keep_alive": False}, b"", True),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", "GET",
                 {"keep_alive": False}, b"hi", False),
    "1.0 keep-alive": (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi", "GET",
                       {"keep_alive": True}, b"hi", False),
    "close": (OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi", "GET", {"keep_alive": False}, b"hi",
              False),
    "HEAD": (OK + b"Content-Length: 99\r\n\r\n", "HEAD", {"length": 0, "keep_alive": True}, b"", False),
    "HEAD chunked": (OK + b"Transfer-Encoding: chunked\r\n\r\n", "HEAD", {"length": 0}, b"", False),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", "GET", {"status": 204, "length": 0}, b"", False),
    "304": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "GET", {"status": 304}, b"", False),
    "205 has a body like others": (b"HTTP/1.1 205 R\r\nContent-Length: 1\r\n\r\nx", "GET", {"status": 205},
        b"x", False),
    "no reason": (b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", "GET", {"status": 200}, b"", False),
    "no blank": (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", "GET", {"status": 200}, b"", False),
    "529": (b"HTTP/1.1 529 Site is overl\xf6aded\r\nContent-Length: 0\r\n\r\n", "GET",
            {"status": 529}, b"", False),
    "100 before": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nhi", "POST",
                   {"status": 200}, b"hi", False),
    "102, 103 before": (b"HTTP/1.1 102 P\r\n\r\nHTTP/1.1 103 E\r\nContent-Length: 7\r\n\r\n"
                        + OK + b"Content-Length: 2\r\n\r\nhi", "GET", {"status": 200}, b"hi", False),
    "a tunnel": (OK + b"Content-Length: 1\r\n\r\n\x16\x03", "CONNECT", {"keep_alive": False}, b"\x16\x03",
                 True),
    "no tunnel": (b"HTTP/1.1 403 F\r\nContent-Length: 1\r\n\r\nx", "CONNECT", {"status": 403}, b"x", False),
    "equal lengths": (OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi", "GET", {"length": 2}, b"hi",
                      False),
}


@pytest.mark.parametrize("name", ANSWERS)
@both_cuttings
def test_answers_are_read(name, cut):
    data, method, attributes, body, by_close = ANSWERS[name]
    parts = answer(cut, data, method, eof=by_close)
    assert {key: getattr(parts[0], key) for key in attributes} == attributes
    assert parts[1:] == [*([body] if body else []), END]
    if by_close:
        assert END not in answer(cut, data, method)


def test_every_answer_reads_the_same_however_it_is_cut():
    for data, method, _, _, by_close in ANSWERS.values():
        expected = plain(answer(whole, data, method, eof=by_close))
        for seed in range(30):
            assert plain(answer(lambda data: cut_at_random(data, seed), data, method,
                eof=by_close)) == expected


@pytest.mark.parametrize("name", ANSWERS)
def test_a_cut_answer_is_the_upstreams_failure(name):
    data, method, _, body, by_close = ANSWERS[name]
    last = len(data) - len(body) - 1 if by_close else len(data) - 1
    for end in range(last + 1):
        assert answer(whole, data[:end], method, eof=True)[-1] == "broken"


BAD_ANSWERS = [
    *[line + b"\r\nContent-Length: 2\r\n\r\nhi" for line in (
        b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 099 OK", b"HTTP/1.1 +20 OK", b"HTTP/1.1 2x0 OK",
        b"HTTP/1.1  200 OK", b"HTTP/1.1 200OK", b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.2 200 OK", b"HTTP/2 200 OK", b"HTTP/2.0 200 OK", b"HTTP/0.9 200 OK",
        b"http/1.1 200 OK", b"HTTP/1.1\t200 OK", b"HTTP/1.1 200\tOK",
        b"HTTP/1.1 200 \x00", b"HTTP/1.1 200 \x7f", b"HTTP/1.1 200 O\nK", b"HTTP/1.1 200 O\rK",
        b"HTTP/1.1 101 Switching Protocols", b"ICY 200 OK", b" HTTP/1.1 200 OK",
        b"\r\nHTTP/1.1 200 OK", b"<html>", b"SSH-2.0-x", b"\x15\x03\x01", b"HTTP/1.1 \xb2\xb2\xb2 OK",
        b"HTTP/1.1 200 OK\nA: b")],
    *[OK + b"Content-Length: " + length + b"\r\n\r\nhello" for length in LENGTHS],
    *[OK + line + b"\r\n\r\nhello" for line in (
        b"Transfer-Encoding: chunked\r\nContent-Length: 5", b"Transfer-Encoding: gzip",
        b"Transfer-Encoding: identity", b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding:", b"Transfer-Encoding: ,chunked",
        b"a : b", b" a: b", b"a: b\r\n c", b"a: \x00", b"a: b\n", b"a",
        b"a: b\r\n" * 100 + b"a: b", b"a: " + b"x" * 70000)],
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"HTTP/1.1 100 C\r\na\x00: b\r\n\r\n",
    OK + b"a: " + b"x" * 70000,
    *[OK + b"Transfer-Encoding: chunked\r\n\r\n" + data.removeprefix(CHUNKED)
      for data, status in BAD.values() if data.startswith(CHUNKED) and status == 400],
]


@pytest.mark.parametrize("number", range(len(BAD_ANSWERS)))
def test_a_bad_answer_is_the_upstreams_failure(number):
    for cut in CUTTINGS if len(BAD_ANSWERS[number]) < 10000 else [whole]:
        reader = ResponseReader()
        reader.start("GET")
        assert read(reader, cut(BAD_ANSWERS[number]))[-1] == "broken"
        reader.feed(OK + b"Content-Length: 0\r\n\r\n")
        with pytest.raises(ProtocolError):
            reader.next()


def test_a_connection_carries_answer_after_answer():
    reader = ResponseReader()
    for method, data in (("GET", OK + b"Content-Length: 2\r\n\r\nhi"),
                         ("HEAD", OK + b"Content-Length: 2\r\n\r\n"),
                         ("POST", OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")):
        assert reader.idle
        reader.start(method)
        assert not reader.idle
        assert read(reader, [data])[-1] is END


def test_surplus_bytes_keep_a_connection_from_being_used_again():
    reader = ResponseReader()
    reader.start("GET")
    assert read(reader, [OK + b"Content-Length: 2\r\n\r\nhi" + OK])[-1] is END
    assert not reader.idle and reader.next() is NEED_DATA
    with pytest.raises(RuntimeError):
        reader.start("GET")


def test_an_answer_may_be_limited():
    small = Limits(max_body_bytes=5)
    assert answer(whole, OK + b"Content-Length: 6\r\n\r\n", limits=small) == ["broken"]
    assert answer(whole, OK + b"Transfer-Encoding: chunked\r\n\r\n6\r\n", limits=small)[1:] == ["broken"]


# --- writers --------------------------------------------------------------------------------------

FIELDS = [("host", "a:1"), ("X-Empty", ""), ("x-a", "one"), ("x-a", "tw\xf6\t!")]


@pytest.mark.parametrize("target", ["/", "/v1/x?y=z", "*"])
@pytest.mark.parametrize("body", [b"", b"hello\r\n\r\n"])
@both_cuttings
def test_our_request_is_read_by_our_reader(target, body, cut):
    fields = [*FIELDS, ("content-length", str(len(body)))]
    head, *rest = request(cut, pomex.request_bytes("OPTIONS", target, fields, body))
    assert (head.method, head.path + "?" * bool(head.query) + head.query) == ("OPTIONS", target)
    assert list(head.headers) == [(name.lower(), value) for name, value in fields]
    assert rest == [*([body] if body else []), END]


@pytest.mark.parametrize("status", [200, 404, 429, 529])
@both_cuttings
def test_our_answer_is_read_by_our_reader(status, cut):
    pieces = [b"a", b"", b"b" * 300, b"\r\n0\r\n\r\n"]
    data = pomex.response_head(status, [*FIELDS, ("transfer-encoding", "chunked")])
    head, *rest = answer(cut, data + b"".join(map(chunk, pieces)) + LAST_CHUNK)
    assert head.status == status
    assert list(head.headers)[:-1] == [(name.lower(), value) for name, value in FIELDS]
    assert rest == [b"".join(pieces), END]


def test_writers_add_nothing():
    assert pomex.response_head(404, []) == b"HTTP/1.1 404 Not Found\r\n\r\n"
    assert pomex.response_head(529, [("a", "b")]) == b"HTTP/1.1 529 \r\na: b\r\n\r\n"
    assert pomex.request_bytes("GET", "/", [("A", "b")], b"c") == b"GET / HTTP/1.1\r\nA: b\r\n\r\nc"
    assert (chunk(b""), chunk(b"x" * 26)) == (b"", b"1a\r\n" + b"x" * 26 + b"\r\n")
    assert answer(whole, pomex.CONTINUE) == []


INJECTIONS = ["a\r\nb: c", "a\nb", "a\rb", "a\x00b", "\n", "\r\n\r\n", "\x7f", "\x0b", "\u010d\u010a", "\ud800"]


@pytest.mark.parametrize("text", INJECTIONS)
@pytest.mark.parametrize("write", [
    lambda text: pomex.response_head(200, [("a", text)]),
    lambda text: pomex.response_head(200, [(text, "a")]),
    lambda text: pomex.request_bytes("GET", "/", [("a", text)], b""),
    lambda text: pomex.request_bytes("GET", "/", [(text, "a")], b""),
    lambda text: pomex.request_bytes("GET", text, [], b""),
    lambda text: pomex.request_bytes(text, "/", [], b"")])
def test_nothing_is_injected(text, write):
    with pytest.raises(ValueError):
        write(text)


@pytest.mark.parametrize("name", ["", " ", "a ", "a:", "a b", "\xe4", "a\t"])
def test_a_header_name_is_a_token(name):
    with pytest.raises(ValueError):
        pomex.response_head(200, [(name, "x")])


def test_a_refused_header_does_not_show_its_value():
    with pytest.raises(ValueError) as caught:
        pomex.request_bytes("GET", "/", [("authorization", "Bearer sk-secret\n")], b"")
    assert "secret" not in str(caught.value) and "authorization" in str(caught.value)


# --- beside the standard library ------------------------------------------------------------------

class FakeSocket:
    def __init__(self, incoming=b""):
        self.incoming, self.sent = incoming, b""

    def makefile(self, mode, *_):
        return io.BytesIO(self.incoming)

    def sendall(self, data):
        self.sent += bytes(data)

    def close(self):
        pass


@pytest.mark.parametrize("body, chunked", [(None, False), (b"hello", False), (iter([b"he", b"llo"]), True)])
def test_what_http_client_sends_is_read(body, chunked):
    connection = http.client.HTTPConnection("a", 8)
    connection.sock = FakeSocket()
    connection.request("POST", "/x?y", body=body, headers={"X-A": "b"}, encode_chunked=chunked)
    head, *rest = request(byte_by_byte, connection.sock.sent)
    assert (head.path, head.query) == ("/x", "y")
    assert (head.headers.get("host"), head.headers.get("x-a")) == ("a:8", "b")
    assert rest == [*([b"hello"] if body else []), END]


@pytest.mark.parametrize("status", [200, 404, 529])
def test_what_we_answer_is_read_by_http_client(status):
    data = pomex.response_head(status, [("a", "b"), ("transfer-encoding", "chunked")])
    response = http.client.HTTPResponse(FakeSocket(data + chunk(b"hello") + chunk(b"!") + LAST_CHUNK))
    response.begin()
    assert (response.status, response.getheader("a"), response.will_close) == (status, "b", False)
    assert response.read() == b"hello!"


def test_what_we_send_is_read_by_http_server():
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def setup(self):
            self.rfile, self.wfile = io.BytesIO(self.request), io.BytesIO()

        def finish(self):
            pass

        def do_POST(self):
            seen.append((self.path, self.headers.items(), self.rfile.read()))

    fields = [("host", "a"), ("content-length", "5")]
    Handler(pomex.request_bytes("POST", "/x?y", fields, b"hello"), ("", 0), None)
    assert seen == [("/x?y", fields, b"hello")]


@pytest.mark.parametrize("name", TAKEN)
def test_http_client_parses_the_same_headers(name):
    data = TAKEN[name][0].removeprefix(b"\r\n")
    if b"http://" in data.lower() or b"https://" in data.lower():      # there Host is replaced
        return
    parsed: email.message.Message = http.client.parse_headers(io.BytesIO(data.split(b"\r\n", 1)[1]))
    headers = request(whole, data)[0].headers
    assert list(headers) == [(key.lower(), value.strip(" \t")) for key, value in parsed.items()]


# --- content codings ------------------------------------------------------------------------------

TEXT = b"".join(b'{"type":"input_text","text":"%d"}' % number for number in range(2000))


PACKED = {
    "gzip": ("gzip", gzip.compress(TEXT)),
    "in capitals": (" GZIP\t", gzip.compress(TEXT)),
    "x-gzip": ("x-gzip", gzip.compress(TEXT)),
    "members": ("gzip", gzip.compress(TEXT[:999]) + gzip.compress(b"") + gzip.compress(TEXT[999:])),
    "identity": ("identity", TEXT),
    "none": ("", TEXT),
}


def inflate(coding, pieces, max_bytes=None):
    inflater = ContentDecoder(coding, max_bytes)
    data = b"".join([inflater.feed(piece) for piece in pieces])
    inflater.finish()
    return data


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("limit", [None, len(TEXT)])
def test_a_packed_body_is_unpacked_however_it_is_cut(name, limit):
    coding, data = PACKED[name]
    for pieces in (whole(data), byte_by_byte(data), *[cut_at_random(data, seed) for seed in range(20)]):
        assert inflate(coding, pieces, limit) == TEXT


@pytest.mark.parametrize("name", PACKED)
@both_cuttings
def test_a_packed_body_over_the_limit_is_refused(name, cut):
    with pytest.raises(ProtocolError) as caught:
        inflate(PACKED[name][0], cut(PACKED[name][1]), len(TEXT) - 1)
    assert caught.value.status == 413


@pytest.mark.parametrize("name", [name for name in PACKED if name not in ("identity", "none")])
def test_a_packed_body_that_is_cut_or_goes_on_is_refused(name):
    coding, data = PACKED[name]
    for broken in (data[:1], data[:2], data[:-1], data[:-9], data + b"x", data + b"xx", data + b"\0" * 100,
                   b"\xff" + data[1:], b"hello world"):
        for cut in CUTTINGS:
            with pytest.raises(ProtocolError) as caught:
                inflate(coding, cut(broken))
            assert caught.value.status == 400


def test_a_wrong_checksum_is_refused():
    data = bytearray(gzip.compress(TEXT))
    data[-8] ^= 1
    with pytest.raises(ProtocolError, match="not valid gzip"):
        inflate("gzip", [bytes(data)])


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, gzip", "gzip,br", "compress", "gzip;q=1", "\xa0gzip", "chunked"])
def test_an_unknown_coding_is_refused(coding):
    with pytest.raises(ProtocolError) as caught:
        ContentDecoder(coding)
    assert caught.value.status == 415


@pytest.mark.parametrize("coding", ["gzip", "identity", ""])
def test_an_empty_body_is_good_in_any_coding(coding):
    assert inflate(coding, []) == inflate(coding, [b""]) == b""


def test_each_flush_of_a_stream_comes_out_at_once():
    packer, inflater = zlib.compressobj(wbits=31), ContentDecoder("gzip")
    for number in range(100):
        event = b"data: %d\n\n" % number
        assert inflater.feed(packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH)) == event


def test_a_bomb_costs_no_more_than_the_limit():
    bomb, started = gzip.compress(bytes(50 << 20)), time.perf_counter()
    with pytest.raises(ProtocolError) as caught:
        ContentDecoder("gzip", 1 << 20).feed(bomb)
    assert caught.value.status == 413 and time.perf_counter() - started < 3


def test_countless_empty_members_are_refused():
    started = time.perf_counter()
    with pytest.raises(ProtocolError):
        ContentDecoder("gzip").feed(gzip.compress(b"") * 100_000)
    assert time.perf_counter() - started < 3


# --- cost -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("data", [
    GET + b"a: " + b"x" * 60000, CHUNKED + b"1\r\nx\r\n" * 10000, b"GET /" + b"x" * 8000])
def test_a_byte_at_a_time_is_not_quadratic(data):
    started = time.perf_counter()
    request(byte_by_byte, data, Limits())
    assert time.perf_counter() - started < 3


def test_ten_thousand_pipelined_requests_take_no_long_time():
    started = time.perf_counter()
    assert request(whole, (GET + b"\r\n") * 10_000).count(END) == 10_000
    assert time.perf_counter() - started < 3


@pytest.mark.parametrize("line", [b"a:" + b" " * 60_000 + b"\x01", b"a" * 60_000, b"a: " + b"x \t" * 20_000 + b"\x01"], ids=["blanks", "a name", "words"])
def test_a_malformed_header_is_refused_in_linear_time(line):
    started = time.perf_counter()
    with pytest.raises(ProtocolError):
        pomex.parse_fields(line, 100)
    assert time.perf_counter() - started < 1
