"""An upstream on loopback that speaks all four wires and breaks in every way: RELIABILITY.md, PAINS.md A, TRANSLATION.md 2.

The model that is asked for names the fault (`cut-7-fin`, `stall-before-head` ...). STREAMS and WHOLES are the tables:
for each fault what goes over the socket, and what the gateway has to make of it.
"""
import asyncio
import contextlib
import functools
import gzip
import json
import re
import threading
from dataclasses import dataclass, field

SECRET = "sk-upstream-0123456789abcdef"
TEXT = ("Hello", ", wörld", ' of "many', "\n\nwords\".")
ARGUMENTS = ('{"command":', '["ls",', '"-la"]}')
STALL_S = 30.0              # longer than any limit of the gateway under test

COMPLETED, INCOMPLETE, FAILED = "completed", "incomplete", "failed"


def sse(data, event=""):
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()


# --- the wires, when all is well ------------------------------------------------------------------

@dataclass(eq=False)
class Wire:
    """What a provider of this wire says: `frames`, of which `finish` is the evidence of the end (DESIGN 2)."""
    name: str
    frames: list
    output: int                 # the first frame with output
    finish: int                 # the frame that is the evidence
    calls: tuple                # the frames in which a call's arguments come
    whole: dict                 # the same, not streamed
    errors: dict = field(default_factory=dict)          # dialect -> frames of an error in the stream
    length: list = field(default_factory=list)          # frames in the place of `calls[1]`...: cut by length in mid-call
    half: list = field(default_factory=list)            # the end claimed with half a call


def chat():
    def chunk(delta, finish=None, **more):
        return sse({"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m",
                    "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})

    def call(arguments, **more):
        return chunk({"tool_calls": [{"index": 0, **more, "function": {"arguments": arguments, **(
            {"name": "shell"} if more else {})}}]})
    usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
    frames = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": text}) for text in TEXT),
              call("", id="call_1", type="function"), *map(call, ARGUMENTS), chunk({}, "tool_calls"),
              sse({"id": "c1", "object": "chat.completion.chunk", "choices": [], "usage": usage}), sse("[DONE]")]
    message = {"role": "assistant", "content": "".join(TEXT), "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "shell", "arguments": "".join(ARGUMENTS)}}]}
    whole = {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "usage": usage,
             "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    error = {"message": "upstream broke", "type": "server_error", "code": 500}
    return Wire("chat", frames, 1, 9, (6, 7, 8), whole, {
        "openai": sse({"error": error}), "groq": sse({"error": error}, "error"),
        "named": sse({"message": "upstream broke"}, "error") + sse("[DONE]"), "string": sse({"error": "upstream broke"}),
        "openrouter": sse({"id": "c1", "error": error, "choices": [{"index": 0, "delta": {"content": ""},
                                                                  "finish_reason": None}]}) + sse("[DONE]"),
    }, length=[chunk({}, "length"), sse("[DONE]")], half=[chunk({}, "tool_calls"), sse("[DONE]")])


def messages():
    def event(kind, **more):
        return sse({"type": kind, **more}, kind)

    def delta(index, **more):
        return event("content_block_delta", index=index, delta=more)
    usage = {"input_tokens": 10, "output_tokens": 20}

    def end(reason):
        return [event("message_delta", delta={"stop_reason": reason, "stop_sequence": None}, usage=usage), event("message_stop")]
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": None, "stop_sequence": None}
    frames = [event("message_start", message={**message, "content": [], "usage": {"input_tokens": 10, "output_tokens": 1}}),
              event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
              *(delta(0, type="text_delta", text=text) for text in TEXT), event("content_block_stop", index=0),
              event("content_block_start", index=1, content_block={"type": "tool_use", "id": "toolu_1", "name": "shell", "input": {}}),
              *(delta(1, type="input_json_delta", partial_json=text) for text in ARGUMENTS), event("content_block_stop", index=1),
              *end("tool_use")]
    whole = {**message, "stop_reason": "tool_use", "usage": usage, "content": [
        {"type": "text", "text": "".join(TEXT)},
        {"type": "tool_use", "id": "toolu_1", "name": "shell", "input": json.loads("".join(ARGUMENTS))}]}
    return Wire("messages", frames, 2, 12, (8, 9, 10), whole, {
        "overloaded": event("error", error={"type": "overloaded_error", "message": "Overloaded"}),
        "api": event("error", error={"type": "api_error", "message": "upstream broke"}),
    }, length=end("max_tokens"), half=end("tool_use"))


def gemini():
    def chunk(parts, **more):
        return sse({"candidates": [{"content": {"role": "model", "parts": parts}, "index": 0, **more}],
                    "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 20, "totalTokenCount": 30},
                    "modelVersion": "m", "responseId": "r1"})
    call = {"functionCall": {"name": "shell", "args": json.loads("".join(ARGUMENTS))}}
    frames = [*(chunk([{"text": text}]) for text in TEXT), chunk([call]), chunk([{"text": ""}], finishReason="STOP")]
    whole = json.loads(chunk([{"text": "".join(TEXT)}, call], finishReason="STOP")[6:])
    error = {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}
    return Wire("gemini", frames, 0, 5, (4,), whole,
                {"object": sse({"error": error}), "list": sse([{"error": error}]),
                 "malformed": chunk([], finishReason="MALFORMED_FUNCTION_CALL")},
                length=[chunk([{"text": ""}], finishReason="MAX_TOKENS")])


def responses():
    numbers = iter(range(1000))

    def event(kind, **more):
        return sse({"type": kind, "sequence_number": next(numbers), **more}, kind)
    usage = {"input_tokens": 10, "output_tokens": 20, "total_tokens": 30, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
             "output_tokens_details": {"reasoning_tokens": 0}}

    def response(status, output, **more):
        return {"id": "resp_up", "object": "response", "created_at": 1, "status": status, "model": "m", "output": output,
                "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": None, "error": None,
                "incomplete_details": None, **more}
    part = {"type": "output_text", "text": "".join(TEXT), "annotations": []}
    said = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    call = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "shell", "arguments": "".join(ARGUMENTS),
            "status": "completed"}
    at, item = {"output_index": 0, "item_id": "msg_1", "content_index": 0}, {"output_index": 1, "item_id": "fc_1"}
    frames = [event("response.created", response=response("in_progress", [])),
              event("response.in_progress", response=response("in_progress", [])),
              event("response.output_item.added", output_index=0, item={**said, "content": [], "status": "in_progress"}),
              event("response.content_part.added", **at, part={**part, "text": ""}),
              *(event("response.output_text.delta", **at, delta=text) for text in TEXT),
              event("response.output_text.done", **at, text="".join(TEXT)),
              event("response.content_part.done", **at, part=part),
              event("response.output_item.done", output_index=0, item=said),
              event("response.output_item.added", output_index=1, item={**call, "arguments": "", "status": "in_progress"}),
              *(event("response.function_call_arguments.delta", **item, delta=text) for text in ARGUMENTS),
              event("response.function_call_arguments.done", **item, arguments="".join(ARGUMENTS)),
              event("response.output_item.done", output_index=1, item=call),
              event("response.completed", response=response("completed", [said, call], usage=usage))]
    error = {"code": "server_error", "message": "upstream broke"}
    cut = {**call, "arguments": ARGUMENTS[0], "status": "incomplete"}
    return Wire("responses", frames, 2, 17, (12, 13, 14), response("completed", [said, call], usage=usage), {
        "event": sse({"type": "error", "sequence_number": 99, **error, "param": None}, "error"),
        "nested": sse({"type": "error", "sequence_number": 99, "error": {"type": "server_error", **error}}, "error"),
        "failed": sse({"type": "response.failed", "sequence_number": 99,
                       "response": response("failed", [], error=error)}, "response.failed"),
    }, length=[event("response.output_item.done", output_index=1, item=cut),
               event("response.incomplete", response=response("incomplete", [said, cut], usage=usage,
                                                              incomplete_details={"reason": "max_output_tokens"}))])


WIRES = {wire.name: wire for wire in (responses(), chat(), messages(), gemini())}


# --- what can go over the socket ------------------------------------------------------------------
# A script is a list of steps: bytes to write, seconds to wait, or FIN or RST, which end the connection.

FIN, RST = "fin", "rst"


def head(status=200, kind="text/event-stream", *lines):
    return "\r\n".join([f"HTTP/1.1 {status} Status", f"content-type: {kind}", *lines, "", ""]).encode()


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


LAST = b"0\r\n\r\n"


def stream(frames, *lines, end=LAST, kind="text/event-stream"):
    """A stream as it should be: chunked, each frame in a write of its own."""
    return [head(200, kind, "transfer-encoding: chunked", *lines), *map(chunk, frames), end]


def counted(status, body, *lines, kind="application/json"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return [head(status, kind, f"content-length: {len(data)}", *lines) + data]


def begun(wire, count):
    """The head, and so many frames."""
    return stream(wire.frames[:count], end=b"")


@dataclass(frozen=True)
class ErrorClass:
    """`steps(wire)` is the script; `ends` how the stream may end; `silent`: it breaks before any output."""
    steps: object
    ends: object                    # a status, or a function of the wire that gives one
    silent: bool = False

    def expected(self, wire):
        return self.ends(wire) if callable(self.ends) else self.ends


HTML = b"<!doctype html><html><body><h1>502 Bad Gateway</h1></body></html>"
ECHO = {"error": {"message": f"Incorrect API key provided: {SECRET}. Headers: Authorization: Bearer {SECRET}",
                  "type": "invalid_request_error", "code": "invalid_api_key"}}
GIANT = "x" * 1_000_000
DEEP = "[" * 100_000


def text_frame(wire, text):
    """The wire's first text frame with another text."""
    at = next(at for at, frame in enumerate(wire.frames) if b'Hello"' in frame)
    return at, wire.frames[at].replace(b'"Hello"', text)


def with_text(wire, text):
    """Of `responses` the later copies of the text are changed too, as the real one's would be."""
    frames = list(wire.frames)
    if wire.name == "responses":
        return [frame.replace(b'Hello', text[1:-1]) for frame in frames]
    at, frame = text_frame(wire, text)
    frames[at] = frame
    return frames


def after_call_begun(wire, tail):
    """The stream up to the first piece of the call's arguments, then something else."""
    return stream([*wire.frames[:wire.calls[0] + 1], *tail])


def gzipped(frames, cut=0, spoil=False):
    data = gzip.compress(b"".join(frames))
    if spoil:
        data = data[:len(data) // 2] + bytes(20) + data[len(data) // 2 + 20:]
    return stream([data[:len(data) - cut]], "content-encoding: gzip")


def insert_everywhere(frames, extra):
    return [piece for frame in frames for piece in (extra, frame)]


GOOD = {
    "ok": lambda w: stream(w.frames),
    "ok-in-one-write": lambda w: [b"".join(stream(w.frames))],
    "ok-byte-by-byte": lambda w: [bytes([byte]) for byte in b"".join(stream(w.frames))],
    "ok-in-odd-chunks": lambda w: stream([b"".join(w.frames)[at:at + 7] for at in range(0, len(b"".join(w.frames)), 7)]),
    "ok-with-crlf": lambda w: stream([frame.replace(b"\n", b"\r\n") for frame in w.frames]),
    "ok-with-cr": lambda w: stream([frame.replace(b"\n", b"\r") for frame in w.frames]),
    "ok-with-bom": lambda w: stream([b"\xef\xbb\xbf" + w.frames[0], *w.frames[1:]]),
    "ok-until-close": lambda w: [head(), *w.frames, FIN],
    "ok-http-1.0": lambda w: [head().replace(b"1.1", b"1.0"), *w.frames, FIN],
    "ok-by-length": lambda w: [head(200, "text/event-stream", f"content-length: {len(b''.join(w.frames))}"), *w.frames],
    "ok-gzip": lambda w: gzipped(w.frames),
    "ok-with-comments": lambda w: stream(insert_everywhere(w.frames, b": keep-alive\n\n")),
    "ok-with-unknown-events": lambda w: stream(insert_everywhere(w.frames, sse({"type": "ping"}, "ping"))
                                               if w.name == "messages" else insert_everywhere(w.frames, b"id: 7\nretry: 3\n\n")),
    "ok-without-last-blank": lambda w: stream([*w.frames[:-1], w.frames[-1].rstrip(b"\n")]),
    "ok-after-100-and-103": lambda w: [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nlink: </x>\r\n\r\n", *stream(w.frames)],
    "ok-with-trailers": lambda w: stream(w.frames, end=b"0\r\nx-late: 1\r\n\r\n"),
    "ok-with-chunk-extensions": lambda w: [part.replace(b"\r\n", b";a=b\r\n", 1) if at else part
                                           for at, part in enumerate(stream(w.frames))],
    "ok-as-json-type": lambda w: stream(w.frames, kind="text/event-stream; charset=utf-8"),
    "twice-its-end": lambda w: stream([*w.frames[:w.finish + 1], *w.frames[w.finish:]]),
    "late-events": lambda w: stream([*w.frames, *w.frames[w.output:w.output + 2]]),
    "late-error": lambda w: stream([*w.frames, next(iter(w.errors.values()))]) if w.name == "responses" else stream(w.frames),
    "late-garbage": lambda w: stream([*w.frames, b"\x00\xff garbage"]),
    "rst-after-all": lambda w: [*stream(w.frames, end=b""), RST],
    "stall-after-all": lambda w: [*stream(w.frames, end=b""), STALL_S],
    "pings-after-all": lambda w: [*stream(w.frames, end=b""), *[chunk(b": ping\n\n"), 0.05] * 200],
    "bytes-behind-the-answer": lambda w: [*stream(w.frames), b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nboo"],
    "giant-frame": lambda w: stream(with_text(w, f'"Hello{GIANT}"'.encode())),
    "giant-frame-in-splinters": lambda w: stream([b"".join(with_text(w, f'"Hello{GIANT}"'.encode()))[at:at + 50_000]
                                                  for at in range(0, len(b"".join(with_text(w, b"")) ) + len(GIANT) * (5 if w.name == "responses" else 1), 50_000)]),
    "lone-surrogate": lambda w: stream(with_text(w, b'"Hello\\ud800"')),
    "control-characters": lambda w: stream(with_text(w, b'"Hello\\u0000\\u001b[31m\\u2028"')),
}


def parts_of(wire):
    """Where a stream can be cut: behind each frame, inside its name, its JSON, and between its two line ends."""
    for at, frame in enumerate(wire.frames):
        yield f"{at}-inside", b"".join(wire.frames[:at]) + frame[:len(frame) * 2 // 3], at
        yield f"{at}-name", b"".join(wire.frames[:at]) + frame[:3], at
        yield f"{at}-behind", b"".join(wire.frames[:at + 1]), at + 1


def at_a_cut(wire, frames_seen, clean):
    """How a stream ends of which so many whole frames came. `clean`: the body ended as it should, behind a whole frame."""
    whole_items = wire.name == "responses" and clean and frames_seen in (wire.finish, 11)      # all that was added is done
    return COMPLETED if frames_seen > wire.finish or whole_items else FAILED


def cuts(wire):
    """name -> Fault, of this wire: ended cleanly, by a FIN without the last chunk, and by a reset."""
    for name, data, seen in parts_of(wire):
        for how, tail in (("clean", LAST), ("fin", FIN), ("rst", RST)):
            steps = [head(200, "text/event-stream", "transfer-encoding: chunked"), chunk(data), tail]
            ends = at_a_cut(wire, seen, how == "clean" and name.endswith("behind"))
            yield f"cut-{name}-{how}", ErrorClass(lambda w, steps=steps: steps, ends, seen <= wire.output)


ERROR_CLASSES = {
    # before the head
    "close-at-once": ErrorClass(lambda w: [FIN], FAILED, True),
    "rst-at-once": ErrorClass(lambda w: [RST], FAILED, True),
    "stall-before-head": ErrorClass(lambda w: [STALL_S], FAILED, True),
    "half-a-head": ErrorClass(lambda w: [head()[:30], FIN], FAILED, True),
    "half-a-head-then-stall": ErrorClass(lambda w: [head()[:30], STALL_S], FAILED, True),
    "not-http": ErrorClass(lambda w: [b"SSH-2.0-OpenSSH_9.6\r\n", FIN], FAILED, True),
    "tls-hello": ErrorClass(lambda w: [b"\x16\x03\x01\x02\x00\x01\x00", 0.01, FIN], FAILED, True),
    "giant-head": ErrorClass(lambda w: [head(200, "text/event-stream", "x: " + "y" * 200_000), FIN], FAILED, True),
    "countless-headers": ErrorClass(lambda w: [head(200, "text/event-stream", *["x: y"] * 5000), FIN], FAILED, True),
    "two-lengths": ErrorClass(lambda w: [head(200, "text/event-stream", "content-length: 5", "content-length: 6") + b"hello!"], FAILED, True),
    "folded-header": ErrorClass(lambda w: [head(200, "text/event-stream", "x: y", " z"), FIN], FAILED, True),
    "endless-1xx": ErrorClass(lambda w: [b"HTTP/1.1 102 Processing\r\n\r\n" * 500, STALL_S], FAILED, True),
    "redirect": ErrorClass(lambda w: counted(302, {}, "location: http://127.0.0.1:1/elsewhere"), FAILED, True),
    "unknown-coding": ErrorClass(lambda w: stream(w.frames, "content-encoding: br"), FAILED, True),
    # before output
    "empty": ErrorClass(lambda w: stream([]), FAILED, True),
    "empty-by-length": ErrorClass(lambda w: counted(200, b"", kind="text/event-stream"), FAILED, True),
    "only-comments": ErrorClass(lambda w: stream([b": hi\n\n"] * 3), FAILED, True),
    "only-done": ErrorClass(lambda w: stream([sse("[DONE]")]), lambda w: None if w.name == "chat" else FAILED, True),
    "stall-after-head": ErrorClass(lambda w: [head(200, "text/event-stream", "transfer-encoding: chunked"), STALL_S], FAILED, True),
    "stall-before-output": ErrorClass(lambda w: [*begun(w, w.output), STALL_S], FAILED, True),
    "garbage-bytes": ErrorClass(lambda w: stream([bytes(range(256)) * 20]), FAILED, True),
    "garbage-events": ErrorClass(lambda w: stream([sse("{not json"), sse("also not")]), FAILED, True),
    "wrong-json": ErrorClass(lambda w: stream([sse(x) for x in (1, [1], "null", {"a": [None]}, {"choices": 7, "candidates": {}, "type": 3})]),
                        FAILED, True),
    "deep-json": ErrorClass(lambda w: stream([sse(DEEP)]), FAILED, True),
    "deep-json-in-place": ErrorClass(lambda w: stream([*w.frames[:text_frame(w, b"")[0]], text_frame(w, DEEP.encode())[1]]), FAILED),
    "giant-number": ErrorClass(lambda w: stream([sse('{"a":' + "9" * 10_000 + "}")]), FAILED, True),
    "html": ErrorClass(lambda w: counted(200, HTML, kind="text/html"), FAILED, True),
    "html-as-stream": ErrorClass(lambda w: counted(200, HTML, kind="text/event-stream"), FAILED, True),
    "error-that-drips": ErrorClass(lambda w: [head(503, "application/json", "transfer-encoding: chunked"), *[chunk(b" "), 0.05] * 200],
                              FAILED, True),
    "error-that-is-cut": ErrorClass(lambda w: [head(529, "application/json", "content-length: 99") + b'{"error":', FIN], FAILED, True),
    "error-object-with-200": ErrorClass(lambda w: counted(200, {"error": {"message": "broke", "code": 500}}), FAILED, True),
    "error-list-with-200": ErrorClass(lambda w: counted(200, [{"error": {"message": "broke", "code": 500}}]), FAILED, True),
    "not-gzip": ErrorClass(lambda w: stream(w.frames, "content-encoding: gzip"), FAILED, True),
    "gzip-bomb-of-blanks": ErrorClass(lambda w: gzipped([b"\n" * 3_000_000]), FAILED, True),
    # after output
    "stall": ErrorClass(lambda w: [*begun(w, w.output + 2), STALL_S], FAILED),
    "drip-then-stall": ErrorClass(lambda w: [*begun(w, w.output + 2), *[chunk(b":"), 0.02] * 3, STALL_S], FAILED),
    "stall-in-a-chunk": ErrorClass(lambda w: [*begun(w, w.output + 2), b"ffff\r\ndata: {", STALL_S], FAILED),
    "bad-chunk-size": ErrorClass(lambda w: [*begun(w, w.output + 2), b"zz\r\n", FIN], FAILED),
    "bad-chunk-end": ErrorClass(lambda w: [*begun(w, w.output + 2), b"5\r\n: abcdefg\r\n", FIN], FAILED),
    "negative-chunk": ErrorClass(lambda w: [*begun(w, w.output + 2), b"-5\r\n", FIN], FAILED),
    "endless-chunk": ErrorClass(lambda w: [*begun(w, w.output + 2), b"f" * 17 + b"\r\n", FIN], FAILED),
    "body-shorter-than-length": ErrorClass(lambda w: [head(200, "text/event-stream", "content-length: 99999"), *w.frames[:w.output + 2], FIN],
                                      FAILED),
    "body-longer-than-length": ErrorClass(lambda w: [head(200, "text/event-stream", f"content-length: {len(b''.join(w.frames[:w.output + 2]))}")
                                                + b"".join(w.frames)], FAILED),
    "spoiled-gzip": ErrorClass(lambda w: gzipped(w.frames * 3, spoil=True), lambda w: None),
    "cut-gzip": ErrorClass(lambda w: [*gzipped(w.frames[:w.output + 2], cut=12)], FAILED),
    "garbage-after-output": ErrorClass(lambda w: stream([*w.frames[:w.output + 2], sse("{half"), *w.frames[w.output + 2:]]), lambda w: None),
    "deep-json-after-output": ErrorClass(lambda w: stream([*w.frames[:w.output + 2], sse(DEEP)]), FAILED),
    "half-a-call-and-a-reset": ErrorClass(lambda w: [*begun(w, w.calls[0] + 1 - (w.name == "gemini")), RST], FAILED),
}
ENDS_EARLY = {
    "length-in-a-call": ErrorClass(lambda w: after_call_begun(w, w.length), INCOMPLETE),
    "half-a-call-called-done": ErrorClass(lambda w: after_call_begun(w, w.half) if w.half else stream(w.frames[:w.finish]),
                                     lambda w: None if w.half else at_a_cut(w, w.finish, True)),
}
STATUSES = {
    "400": (400, {"error": {"message": "bad", "type": "invalid_request_error", "code": "x"}}),
    "401-echo": (401, ECHO), "403": (403, {"error": {"message": "no"}}), "404": (404, {"error": "no such model"}),
    "408": (408, {}), "413": (413, HTML), "429": (429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}),
    "429-quota": (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}),
    "500": (500, {"detail": "oops"}), "500-echo": (500, ECHO), "502-html": (502, HTML), "503": (503, [{"error": {"message": "later"}}]),
    "504-empty": (504, b""), "529": (529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
    "599": (599, b"\xff\x00not text"), "418-crlf": (418, {"error": {"message": "a\r\nx-evil: 1\r\n\u001b[31m", "code": "a\r\nb"}}),
    "500-endless": (500, b"x" * 2_000_000),
}
for _name, (_status, _body) in STATUSES.items():
    ERROR_CLASSES[f"status-{_name}"] = ErrorClass(lambda w, s=_status, b=_body: counted(s, b), FAILED, True)
ERROR_CLASSES["status-503-cut"] = ErrorClass(lambda w: [head(503, "application/json", "content-length: 500") + b'{"error":', FIN], FAILED, True)
ERROR_CLASSES["status-503-stalls"] = ErrorClass(lambda w: [head(503, "application/json", "content-length: 500") + b'{"error":', STALL_S], FAILED, True)


@functools.cache
def stream_faults(wire):
    """All faults of a streamed answer: name -> Fault."""
    errors = {f"error-{when}-{dialect}": ErrorClass(
        lambda w, f=frame, at=at: stream([*w.frames[:at], *([f] if isinstance(f, bytes) else f)]), FAILED, when == "first")
        for dialect, frame in wire.errors.items() for when, at in (("first", wire.output), ("later", wire.output + 2),
                                                                   ("then", wire.finish))}
    return {**{name: ErrorClass(steps, COMPLETED) for name, steps in GOOD.items()}, **ERROR_CLASSES, **ENDS_EARLY, **errors, **dict(cuts(wire))}


WHOLES = {      # an answer that is not streamed: what goes over the socket, and whether it is good
    "ok": (lambda w: counted(200, w.whole), True),
    "ok-chunked": (lambda w: [head(200, "application/json", "transfer-encoding: chunked"),
                              *map(chunk, re.findall(rb"(?s).{1,50}", json.dumps(w.whole).encode())), LAST], True),
    "ok-gzip": (lambda w: counted(200, gzip.compress(json.dumps(w.whole).encode()), "content-encoding: gzip"), True),
    "ok-byte-by-byte": (lambda w: [bytes([byte]) for byte in counted(200, w.whole)[0]], True),
    "ok-until-close": (lambda w: [head(200, "application/json") + json.dumps(w.whole).encode(), FIN], True),
    "ok-though-a-stream": (lambda w: stream(w.frames), True),
    "close-at-once": (lambda w: [FIN], False), "rst-at-once": (lambda w: [RST], False),
    "stall-before-head": (lambda w: [STALL_S], False), "half-a-head": (lambda w: [head()[:30], FIN], False),
    "stall-in-body": (lambda w: [counted(200, w.whole)[0][:-40], STALL_S], False),
    "cut-in-body": (lambda w: [counted(200, w.whole)[0][:-40], FIN], False),
    "rst-in-body": (lambda w: [counted(200, w.whole)[0][:-40], RST], False),
    "cut-in-chunks": (lambda w: [head(200, "application/json", "transfer-encoding: chunked"), chunk(json.dumps(w.whole).encode()), FIN],
                      False),
    "shorter-json": (lambda w: counted(200, json.dumps(w.whole).encode()[:-20]), False),
    "empty": (lambda w: counted(200, b""), False), "empty-object": (lambda w: counted(200, {}), False),
    "null": (lambda w: counted(200, b"null"), False), "list": (lambda w: counted(200, b"[]"), False),
    "wrong-shapes": (lambda w: counted(200, {"choices": [None], "content": 7, "candidates": "x", "output": [3], "status": 1}), False),
    "html": (lambda w: counted(200, HTML, kind="text/html"), False),
    "html-as-json": (lambda w: counted(200, HTML), False), "garbage": (lambda w: counted(200, bytes(range(256))), False),
    "deep-json": (lambda w: counted(200, DEEP.encode()), False),
    "giant-number": (lambda w: counted(200, b'{"a":' + b"9" * 10_000 + b"}"), False),
    "error-with-200": (lambda w: counted(200, {"error": {"message": "broke", "code": 500}}), False),
    "bad-gzip": (lambda w: counted(200, json.dumps(w.whole).encode(), "content-encoding: gzip"), False),
    "cut-gzip": (lambda w: counted(200, gzip.compress(json.dumps(w.whole).encode())[:-9], "content-encoding: gzip"), False),
    "redirect": (lambda w: counted(302, {}, "location: http://127.0.0.1:1/elsewhere"), False),
    "cut-stream": (lambda w: stream(w.frames[:w.output + 2]), False),
    **{f"status-{name}": (lambda w, s=status, b=body: counted(s, b), False) for name, (status, body) in STATUSES.items()},
}


# --- the server -----------------------------------------------------------------------------------

class Upstream:
    """Serves on loopback, on the loop that runs: `async with Upstream() as upstream: upstream.url`. `pace_s` slows every
    step of the model `paced`, `seen` counts requests, `live` the scripts that are being played."""

    def __init__(self, pace_s=0.1):
        self.pace_s, self.seen, self.live, self.port = pace_s, [], 0, 0
        self.server = None

    async def __aenter__(self):
        for wire in WIRES.values():
            for model in stream_faults(wire):
                script(wire, model, True)
            for model in WHOLES:
                script(wire, model, False)
        self.server = await asyncio.start_server(self.connection, "127.0.0.1", 0, limit=2**20, backlog=1000)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def connection(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self.request(reader, writer):
                pass
        writer.transport.abort()

    async def request(self, reader, writer):
        top = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        target = top.split(" ", 2)[1]
        body = json.loads(await reader.readexactly(int(re.search(r"(?i)\r\ncontent-length: (\d+)", top)[1])))
        name, model, streams = asked(target, body)
        wire = WIRES[name]
        self.seen.append((name, model, streams))
        self.live += 1
        try:
            return await self.play(script(wire, model, streams), reader, writer, self.pace_s if model == "paced" else 0.0)
        finally:
            self.live -= 1

    async def play(self, steps, reader, writer, pace_s):
        """Whether the connection can carry another request."""
        gone = asyncio.ensure_future(reader.read(1)) if any(isinstance(step, float) for step in steps) or pace_s else None
        for at, step in enumerate(steps):
            if isinstance(step, bytes):
                writer.write(step)
                if len(steps) < 100 or at % 20 == 0:
                    await writer.drain()
                    await asyncio.sleep(0)
                step = pace_s
            if step == RST:
                writer.transport.get_extra_info("socket").setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")     # SO_LINGER 0
                writer.transport.abort()
                return False
            if step == FIN:
                await writer.drain()
                writer.close()
                return False
            if step:
                await asyncio.wait({gone}, timeout=step)
                if gone.done():
                    return False
        if gone is not None:
            gone.cancel()
        return gone is None


def asked(target, body):
    """(wire, model, whether a stream is wanted) of a request."""
    if found := re.search(r"/models/([^:]+):(stream)?", target):
        return "gemini", found[1], bool(found[2])
    name = {"/responses": "responses", "/chat/completions": "chat", "/messages": "messages"}[re.search(r"/[a-z]+(/completions)?$", target)[0]]
    return name, body["model"], bool(body.get("stream"))


@functools.cache
def script(wire, model, streams):
    if model == "paced":
        return stream([*wire.frames[:wire.output], *[wire.frames[wire.output]] * 20, *wire.frames[wire.output:]]) \
            if wire.name != "responses" else stream(wire.frames)
    if model in WHOLES and not (streams and model in stream_faults(wire)):       # messages is always asked for a stream
        return WHOLES[model][0](wire)
    return stream_faults(wire)[model].steps(wire)


@contextlib.contextmanager
def in_thread(**how):
    """The upstream on a loop of its own."""
    loop, upstream, ready = asyncio.new_event_loop(), Upstream(**how), threading.Event()

    async def serve():
        async with upstream:
            ready.set()
            await stop
    stop = loop.create_future()
    task = loop.create_task(serve())

    def run():
        loop.run_until_complete(task)
        for each in asyncio.all_tasks(loop):
            each.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(10)
    yield upstream
    loop.call_soon_threadsafe(stop.set_result, None)
    thread.join(10)
