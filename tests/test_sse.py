"""Layer 4: server-sent events. Every stream goes in whole, byte by byte, and cut at random."""
import pathlib
import random
import time

import pytest

from pomex import Event, SSEDecoder, UpstreamError, sse_frame

BOM = b"\xef\xbb\xbf"
RECORDED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "recorded"


def byte_by_byte(data):
    return [data[i:i + 1] for i in range(len(data))]


def cut_at_random(data, seed):
    chance = random.Random(seed)
    cuts = sorted(chance.choices(range(len(data) + 1), k=chance.randint(1, 8)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]


def decode(pieces, finish=False):
    decoder = SSEDecoder()
    events = [event for piece in pieces for event in decoder.feed(piece)]
    return events + (decoder.finish() if finish else [])


def by_the_standard(data):
    """The algorithm of the WHATWG standard, 9.2.6, word for word and slow."""
    text = data.decode("utf-8", "replace").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    events, name, lines = [], "", []
    for line in text.split("\n")[:-1]:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if lines:
                events.append((name or "message", "\n".join(lines)))
            name, lines = "", []
        elif field == "data":
            lines.append(value)
        elif field == "event":
            name = value
    return events


STREAMS = {     # bytes, events
    "a name": (b"event: x\ndata: y\n\n", [("x", "y")]),
    "no name": (b"data: y\n\n", [("message", "y")]),
    "an empty name": (b"event: \ndata: y\n\nevent\ndata: z\n\n", [("message", "y"), ("message", "z")]),
    "the last name counts": (b"event: a\nevent: b\ndata: y\n\n", [("b", "y")]),
    "a name after the data": (b"data: y\nevent: x\n\n", [("x", "y")]),
    "a name does not stay": (b"event: x\ndata: y\n\ndata: z\n\n", [("x", "y"), ("message", "z")]),
    "a name alone is no event": (b"event: x\n\ndata: y\n\n", [("message", "y")]),
    "no blank": (b"event:x\ndata:y\n\n", [("x", "y")]),
    "one blank goes": (b"event:  x\ndata:  y \n\n", [(" x", " y ")]),
    "a tab stays": (b"data:\ty\n\n", [("message", "\ty")]),
    "colons": (b"data: a: b:\n\n", [("message", "a: b:")]),
    "lines": (b"data: a\ndata:\ndata: b\n\n", [("message", "a\n\nb")]),
    "empty data": (b"data:\n\ndata\n\ndata: \n\n", [("message", "")] * 3),
    "two empty lines of data": (b"data\ndata\n\n", [("message", "\n")]),
    "comments": (b": ping\n\n:\n\ndata: a\n: b\ndata: c\n\n: OPENROUTER PROCESSING\n\n", [("message",
        "a\nc")]),
    "id and retry": (b"id: 7\nretry: 5\ndata: y\n\nid\n\n", [("message", "y")]),
    "unknown fields": (b"Data: x\n data: x\ndatas: x\nx\ndata: y\n\n", [("message", "y")]),
    "empty lines": (b"\n\n\ndata: a\n\n\ndata: b\n\n\n\n\ndata: c\n\n", [("message", "a"), ("message", "b"),
        ("message", "c")]),
    "CRLF": (b"event: x\r\ndata: y\r\n\r\ndata: z\r\n\r\n", [("x", "y"), ("message", "z")]),
    "CR": (b"event: x\rdata: y\r\rdata: z\r\r", [("x", "y"), ("message", "z")]),
    "all line ends": (b"data: a\r\ndata: b\rdata: c\n\r\ndata: d\r\n\rdata: e\n\r", [("message", "a\nb\nc"),
        ("message", "d"), ("message", "e")]),
    "CR CR LF ends an event once": (b"data: a\r\r\ndata: b\r\r\n", [("message", "a"), ("message", "b")]),
    "a mark": (BOM + b"data: y\n\n", [("message", "y")]),
    "a mark only at the beginning": (BOM + BOM + b"data: y\n\ndata: z\n\n", [("message", "z")]),
    "a mark in the data": (b"data: " + BOM + b"y\n\n", [("message", "\ufeffy")]),
    "half a mark": (b"\xef\xbbdata: y\n\ndata: z\n\n", [("message", "z")]),
    "UTF-8": ("event: é\ndata: 日本 \U0001f600\n\n".encode(), [("é", "日本 \U0001f600")]),
    "broken UTF-8": (b"data: a\xe6\x97\n\ndata: \xff\xc3(\n\n", [("message", "a\ufffd"), ("message",
        "\ufffd\ufffd(")]),
    "other line separators are text": ("data: a\u2028b\x85c\x0bd\x1ee\n\n".encode(), [("message",
        "a\u2028b\x85c\x0bd\x1ee")]),
    "NUL": (b"data: \0\n\n", [("message", "\0")]),
    "done": (b'data: {"a":1}\n\ndata: [DONE]\n\n', [("message", '{"a":1}'), ("message", "[DONE]")]),
    "unfinished": (b"data: a\n\ndata: b\n", [("message", "a")]),
    "nothing": (b"", []),
    "only a mark": (BOM, []),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_decoded_as_the_standard_says_however_it_is_cut(name):
    data, events = STREAMS[name]
    assert by_the_standard(data) == events
    for pieces in ([data], byte_by_byte(data), *[cut_at_random(data, seed) for seed in range(50)]):
        assert decode(pieces) == events


@pytest.mark.parametrize("seed", range(40))
def test_any_mixture_of_lines_and_line_ends_is_decoded_as_the_standard_says(seed):
    chance = random.Random(seed)
    words = [b"data: ", b"data:", b"event: ", b"event:x", b"data", b": c", b"\xc3\xa9", b"\xe6", b"x", b" ",
        BOM, b"{}"]
    ends = [b"\n", b"\n\n", b"\r\n", b"\r", b"\r\n\r\n", b"\r\r", b"\n\r", b"\n\n\n"]
    for _ in range(25):
        count = chance.randint(1, 60)
        data = b"".join(chance.choice(words if chance.random() < 0.6 else ends) for _ in range(count))
        expected = by_the_standard(data)
        for pieces in ([data], byte_by_byte(data), cut_at_random(data, seed)):
            assert decode(pieces) == expected, data


def test_an_event_comes_out_with_its_last_line_end():
    for end in (b"\n\n", b"\r\r", b"\r\n\r\n", b"\r\n\r", b"\n\r"):
        assert decode([b"data: y" + end]) == [("message", "y")]


def test_events_have_names():
    assert decode([b"event: x\ndata: y\n\n"]) == [Event(event="x", data="y")]


ENDINGS = {     # what the body ends with: what is still given out
    b"": None,
    b"\n": None,
    b": ping": None,
    b"event: x\n": None,
    b"data: y\n": "y",
    b"data: y\r": "y",
    b"data: y\r\n": "y",
    b"data: a\ndata: b\n": "a\nb",
    b"data: [DONE]": "[DONE]",
    b"data:[DONE]": "[DONE]",
    b"data: [DON": None,
    b'data: {"a":{"b":1}}': '{"a":{"b":1}}',
    b'data: {"a":{"b":1}': None,
    b'data: {"a":"b': None,
    b"data: {": None,
    b"data: 12": None,                      # of 123?
    b"data: \"a\"": None,
    b"data: hello": None,
    b"data: a\ndata: b": None,
    b'data: {"a":\ndata: 1}': '{"a":\n1}',
    b'data: {"a":1}\nevent: mess': '{"a":1}',
    b'data: {"a":"\xe6\x97': None,
    b"data: " + b'{"a":' * 100_000: None,
    b"dat": None,
    b"\n\ndata: {}": "{}",
}


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: repr(ending[:30]))
@pytest.mark.parametrize("before", [b"", b"data: x\n\n", BOM])
def test_an_event_without_its_empty_line_is_given_out_if_it_is_whole(ending, before):
    first = [("message", "x")] if b"x" in before else []
    last = [] if ENDINGS[ending] is None else [ENDINGS[ending]]
    for pieces in ([before + ending], byte_by_byte(before + ending) if len(ending) < 100 else [before,
        ending]):
        events = decode(pieces, finish=True)
        assert events[:len(first)] == first and [event.data for event in events[len(first):]] == last


def test_finish_gives_an_event_only_once():
    decoder = SSEDecoder()
    decoder.feed(b"data: [DONE]")
    assert len(decoder.finish()) == 1 and decoder.finish() == []


@pytest.mark.parametrize("tail", [b"", b"\n"])
@pytest.mark.parametrize("pieces", [lambda data: [data], byte_by_byte])
def test_an_event_over_the_limit_is_an_error_of_the_upstream(tail, pieces):
    good, long = b"data: " + b"x" * 94 + b"\n\n", b"data: " + b"x" * 96 + b"\n" + tail
    decoder = SSEDecoder(max_event_bytes=100)
    for piece in pieces(good * 5):
        decoder.feed(piece)
    with pytest.raises(UpstreamError, match="more than 100 bytes"):
        for piece in pieces(good + long):
            decoder.feed(piece)


def test_many_small_events_are_not_over_the_limit():
    assert len(SSEDecoder(max_event_bytes=100).feed(b": comment\n\ndata: x\n\n" * 1000)) == 1000


def test_a_large_event_in_small_pieces_is_not_quadratic():
    decoder, started = SSEDecoder(), time.perf_counter()
    decoder.feed(b"data: ")
    for _ in range(20_000):
        assert decoder.feed(b"x" * 500) == []
    assert len(decoder.feed(b"\n\n")[0].data) == 10_000_000
    assert time.perf_counter() - started < 1


# --- the encoder ----------------------------------------------------------------------------------

@pytest.mark.parametrize("type, data, frame", [
    ("response.created", '{"a":1}', b'event: response.created\ndata: {"a":1}\n\n'),
    ("", "[DONE]", b"data: [DONE]\n\n"),
    ("x", "", b"event: x\ndata: \n\n"),
    ("x", "日", "event: x\ndata: 日\n\n".encode()),
    ("x", "a\nb\r\nc\rd", b"event: x\ndata: a\ndata: b\ndata: c\ndata: d\n\n"),
    ("x", "a\u2028b", "event: x\ndata: a\u2028b\n\n".encode()),
    ("x", "\ud83d!", b"event: x\ndata: ?!\n\n"),
])
def test_a_frame_is_its_type_and_its_data(type, data, frame):
    assert sse_frame(type, data) == frame


@pytest.mark.parametrize("data", ["{}", "", " a", "a\n b\n", "\n", ": x", "data: x", "é\u2028\x85"])
def test_what_we_encode_is_what_we_decode(data):
    assert decode(byte_by_byte(sse_frame("t", data) + sse_frame("", data))) == [("t", data), ("message",
        data)]


# --- recorded streams -----------------------------------------------------------------------------

def test_recorded_streams_are_decoded_as_the_standard_says():
    paths = sorted(RECORDED.rglob("*.sse"))
    if not paths:
        pytest.skip("no recorded streams lie beside this repository")
    for path in paths:
        data = path.read_bytes()
        expected = by_the_standard(data)
        for pieces in ([data], cut_at_random(data, 1), cut_at_random(data, 2)):
            assert decode(pieces) == expected, path
