#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
"""Pomex: an LLM API gateway in one file, standard library only.

    python pomex.py serve         answers OpenAI Responses API requests (/v1/responses) from any
                                  configured provider, with one key and one usage record

The middle is pure and the edge is thin: bytes become events, events become calls of a sink, and these become
the client's events. This part uses no socket, clock or file. A definition uses only names of its own layer or
of an earlier one, so the file can be read once, from top to bottom.

     1  errors and constants      the failures, and their messages for the client; JSON readers
     2  stream events             the calls between providers and the Responses stream
     3  HTTP/1.1                  heads and bodies, for client and server, from bytes
     4  SSE                       events, read from bytes and written to bytes
     5  the Responses API         request validation, and the assembler that ends every stream once
     6  providers                 one block per wire API, then the table
     7  configuration             TOML to frozen dataclasses
    --  above: pure; below: the edge
     8  ledger                    keys, accounts, prices, limits and usage rows in SQLite
     9  upstream                  TLS, connection pool, one exchange with its timeouts
    10  routing                   the choice of a target, retries and failover
    11  handlers                  one function per endpoint, the admin API
    12  server                    accept, limits, drain, access log
    13  command line              serve, check, keys, accounts, usage, models, codex ...
    14  data                      the price table and the page

`import pomex` does nothing. `pomex.main(argv) -> int` is the command line.
"""
from __future__ import annotations

import sys

if sys.version_info < (3, 11):     # the file parses on 3.8 and later, so they can print this sentence
    sys.exit("Pomex needs Python 3.11 or newer; this is %s at %s." % (sys.version.split()[0], sys.executable))

import importlib.util
import os
import py_compile

LAUNCH = """\
import importlib.util, sys
sys.orig_argv[0], sys.argv[:] = sys.argv[1], sys.argv[2:]
spec = importlib.util.spec_from_file_location("pomex", sys.argv[0])
sys.modules["pomex"] = pomex = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pomex)
sys.exit(pomex.main())"""

if __name__ == "__main__" and "serve" in sys.argv and sys.platform != "win32" \
        and sys.argv[0] in sys.orig_argv and sys.argv[0].endswith(".py"):
    # Python keeps the syntax tree of a running script in memory: 14 MB for this one. So the server runs as a
    # module, whose code is also cached. `curl ... | python3 - serve` has no file to start from, and `python3
    # -m pomex` names none: both just run.
    source, code = sys.argv[0], importlib.util.cache_from_source(sys.argv[0])
    try:
        if not os.path.isfile(code) or os.path.getmtime(code) < os.path.getmtime(source):
            py_compile.compile(source, quiet=2)
    except OSError:     # without write access, as under systemd, it is compiled at every start
        pass
    options = sys.orig_argv[1:sys.orig_argv.index(source)]
    launch = [sys.executable, *options, "-c", LAUNCH, sys.orig_argv[0], *sys.argv]
    os.execv(sys.executable, launch)  # noqa: S606

import argparse
import asyncio
import asyncio.staggered
import base64
import bisect
import calendar
import codecs
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import decimal
import difflib
import email.utils
import enum
import errno
import fnmatch
import functools
import gc
import getpass
import hashlib
import hmac
import http
import io
import ipaddress
import itertools
import json
import logging
import math
import mmap
import operator
import pathlib
import random
import re
import secrets
import shlex
import signal
import socket
import sqlite3
import ssl
import stat
import stringprep
import struct
import subprocess
import threading
import time
import tomllib
import traceback
import unicodedata
import urllib.parse
import urllib.request
import weakref
import zlib
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, NamedTuple, NoReturn, TypeAlias, TypeVar

if sys.platform != "win32":
    import resource

JSON: TypeAlias = dict[str, Any]    # one decoded JSON object; the function that takes it names its shape

log = logging.getLogger("pomex")


# === 1. errors and constants ===

VERSION = "v00083"  # the product's own numbering


class GatewayError(Exception):
    """A failure as an HTTP status and the fields of an OpenAI error. `str(error)` is a sentence for the
    client, without a key, a path of this machine or a prompt."""
    status = 500
    type = code = "server_error"
    retryable = False  # another target, or the same one later, may succeed
    ledger_code = ""  # the code in the ledger, if it differs from the client's
    plain = False  # the body is only the sentence, for a client that shows raw bodies
    # of a failed upstream call
    upstream_status = 0
    retry_after_s: float | None = None
    brief = where = ""  # see TransportError

    def __init__(
        self, message: str, *, status: int = 0, type: str = "", code: str | None = None,
        param: str | None = None, headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status or self.status
        self.type = type or self.type
        self.code = code or self.code
        self.param = param
        self.headers = headers  # of the answer, e.g. (("retry-after", "3"),)

    def body(self) -> JSON:
        """The OpenAI error envelope."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(GatewayError):
    """The client's mistake: never retried, never sent to another target."""
    status, type, code = 400, "invalid_request_error", "invalid_request_error"


class Unauthorized(BadRequest):
    status, code = 401, "invalid_api_key"


class UpstreamError(GatewayError):
    """A provider failed or violated its protocol."""
    status, retryable = 502, True


class UpstreamTimeout(UpstreamError):
    status = 504


Raised = TypeVar("Raised", bound=Exception)


def without_traceback(error: Raised) -> Raised:
    """Drops the frames that a stored error would keep alive in a reference cycle."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def fault_location(error: BaseException) -> str:
    """The place of a bug, innermost frame first, without the message: it may hold private data."""
    frames = traceback.walk_tb(error.__traceback__)
    places = [f"{frame.f_code.co_name} line {line}" for frame, line in frames if frame.f_globals is globals()]
    return f"a fault of Pomex itself, {type(error).__name__} in {' < '.join(places[::-1])}"


class ConfigError(Exception):
    """An unusable configuration. The message names the file, the line or key path, and a fix."""


def sanitize(text: str, limit: int = 100) -> str:
    """One short line for an error or the log, without control and writing direction characters."""
    if len(text) <= limit and text.isprintable():
        return text
    return "".join(each if each.isprintable() else "?" for each in text[:limit])


# --- JSON ---

dumps = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
json_string = json.encoder.encode_basestring_ascii


def reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON (RFC 8259 section 6)")


def finite(digits: str) -> float:
    """Rejects 1e999, a valid JSON number that Python reads as infinity."""
    number = float(digits)
    return number if math.isfinite(number) else reject_constant(digits[:20])


# The lenient one is for models, which leave raw line ends in strings.
LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
STRICT_DECODER = json.JSONDecoder(parse_constant=reject_constant, parse_float=finite)
strict_json = STRICT_DECODER.decode
lenient_json = json.JSONDecoder(parse_constant=reject_constant, parse_float=finite, strict=False).decode


def load_json(raw: bytes) -> Any:
    """Reads JSON strictly; the ValueError names the mistake and its place."""
    try:
        value = strict_json(raw.decode())
        if LONE_SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()  # fails here rather than in log or ledger
    except UnicodeEncodeError:
        raise ValueError("a string holds half of a UTF-16 surrogate pair") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    return value


def parse_object(text: str) -> JSON | None:
    """Reads a JSON object leniently; else None."""
    try:
        value = lenient_json(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def as_dict(value: Any) -> JSON:
    return value if isinstance(value, dict) else {}


def only_dicts(value: Any) -> list[JSON]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


# === 2. stream events ===
#
# A decoder reports a provider's stream only by calls of a Sink.

ItemType: TypeAlias = Literal[
    "message", "reasoning", "function_call", "custom_tool_call", "tool_search_call",
    "local_shell_call", "web_search_call", "image_generation_call"]
PartType: TypeAlias = Literal["text", "refusal", "summary", "raw", "arguments", "input"]


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of the whole response so far. A later Usage replaces an earlier one; they are not added."""
    input: int = 0  # including cached and cache_write
    cached: int = 0  # read from the provider's prompt cache
    cache_write: int = 0
    output: int = 0  # including reasoning
    reasoning: int = 0
    estimated: bool = False  # the provider gave no count
    cache_write_1h: int = 0  # with a long lifetime: 1 h at Anthropic, 12 h at OpenAI
    web_searches: int = 0  # requests of the provider's own search tool
    inconsistency: str = ""  # the contradiction in the provider's counts
    # from the answer, beside its counts; "" if it has none
    tier: str = field(default="", compare=False)  # "priority", "standard fast us"
    model: str = field(default="", compare=False)  # that answered
    cost: str = field(default="", compare=False)  # in US dollars


COUNTED = ("input", "cached", "cache_write", "output", "reasoning", "cache_write_1h", "web_searches")
MAX_TOKENS = 1 << 24  # a larger count is a mistake and would spoil every sum


def count(holder: Any, *names: str) -> int:
    """The first of these fields with a positive number, or 0. A provider's number may be 1e999."""
    for value in map(as_dict(holder).get, names):
        if isinstance(value, (int, float)) and value is not True and value > 0:
            return int(min(value, 2 * MAX_TOKENS))
    return 0


def billing_facts(facts: JSON) -> dict[str, Any]:
    """The fields of Usage that change a price, from an answer and its usage object merged."""
    cost = facts.get("cost")
    is_cost = isinstance(cost, (int, float)) and 0 < cost < 10**6
    tiers = map(facts.get, ("service_tier", "speed", "inference_geo"))
    return {
        "web_searches": (
            count(as_dict(facts.get("tool_usage")).get("web_search"), "num_requests")  # OpenAI
            or count(facts.get("server_tool_use"), "web_search_requests")  # Anthropic, OpenRouter
            or count(facts.get("server_side_tool_usage_details"), "web_search_calls")),  # xAI
        "tier": " ".join(tier for tier in tiers if isinstance(tier, str) and tier != "auto").lower(),
        "model": str(facts.get("model") or "")[:200],
        "cost": f"{cost:.12f}" if is_cost else "",
    }


def checked_usage(usage: Usage) -> Usage:
    """The usage with consistent counts. A reduced count is named and makes the usage an estimate."""
    most: JSON = dict.fromkeys(("input", "output", "web_searches"), MAX_TOKENS)
    most["cached"] = min(usage.input, MAX_TOKENS)
    most["cache_write"] = most["cached"] - min(usage.cached, most["cached"])
    most["reasoning"] = min(usage.output, MAX_TOKENS)
    most["cache_write_1h"] = min(usage.cache_write, most["cache_write"])
    reduced = {name: most[name] for name in COUNTED if getattr(usage, name) > most[name]}
    if not reduced:
        return usage
    inconsistency = f"the provider's count of {', '.join(reduced)} cannot be"
    return dataclasses.replace(usage, **reduced, estimated=True, inconsistency=inconsistency)


@dataclass(frozen=True, slots=True)
class Stop:
    """The provider's evidence that the model has finished."""
    incomplete_reason: str = ""  # "" or a reason of Responses: "max_output_tokens", "content_filter"
    final: bool = False  # nothing more will come: reading can end
    explanation: str = ""  # for the user: why a content filter stopped the answer


class Sink:
    """The calls of a decoder; this class ignores them. An item's key is unique in the stream, or None. Only
    one item without a key is open at a time; it ends when any other item begins."""
    def text(self, text: str, channel: PartType = "text") -> None:
        """Adds to the message without a key, which begins with its first visible character; with the channel
        "summary", to the reasoning item without a key, which "" only begins."""
    def open(self, key: Any, kind: ItemType, **fields: Any) -> None:
        """Begins an item with these fields of its own."""
    def call(self, key: Any, call_id: str, tool: Tool) -> None:
        """Begins a tool call."""
    def add(self, key: Any, text: str, channel: PartType, part: int = 0) -> None:
        """Adds to an item: text, refusal, summary, raw reasoning, a call's arguments (JSON text) or a custom
        call's input (raw text). A higher part number begins another part."""
    def add_all(self, key: Any, texts: list[str], channel: PartType) -> None:
        """Calls `add`, or `text`, for each piece."""
    def annotate(self, annotation: JSON, key: Any = None) -> None: ...
    def done(self, key: Any = None, **fields: Any) -> None:
        """Completes the item if it is open, with its last fields: encrypted_content, action, status."""
    def item(self, item: JSON) -> None:
        """Passes on a complete item of a type that is not built here."""
    def set_usage(self, usage: Usage) -> None: ...
    def set_stop(self, stop: Stop) -> None: ...
    def fail(self, error: GatewayError) -> None:
        """Reports an error inside the upstream's stream. It overrides any evidence of an end."""


# === 3. HTTP/1.1 ===
#
# Both sides, fed with bytes. The parser refuses what two parsers could read in two ways (LF or CR alone as a
# line end, folded lines, a blank before the colon ...): RFC 9112 allows several, each has been a hole in some
# server. Patterns check numbers before int(), which takes "+5" and "1_0". Blanks are only SP and HTAB;
# strip() removes more.

PROTOCOL_CODES = {
    408: "request_timeout", 413: "request_too_large", 414: "uri_too_long",
    415: "unsupported_content_encoding", 417: "expectation_failed", 421: "misdirected_request",
    431: "headers_too_large", 501: "not_implemented", 505: "http_version_not_supported",
}


class ProtocolError(GatewayError):
    """The peer violated HTTP or exceeded a limit: the connection is closed after the answer."""
    status, type, code = 400, "invalid_request_error", "invalid_http"

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message, status=status, code=PROTOCOL_CODES.get(status))


class Headers:
    """Header fields in order; names are lower case, values are decoded as latin-1."""
    __slots__ = ("items", "_first")

    def __init__(self, items: list[tuple[str, str]]) -> None:
        self.items = items
        self._first = dict(reversed(items))     # name -> its first value

    def get(self, name: str, default: str = "") -> str:
        return self._first.get(name, default)

    def get_all(self, name: str) -> list[str]:
        return [value for key, value in self.items if key == name] if name in self._first else []

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.items)


class Limits(NamedTuple):
    max_line_bytes: int = 8192          # the request line (RFC 9112 3 asks for 8000); all trailers
    max_head_bytes: int = 65536         # Codex sends several KiB of turn state
    max_headers: int = 100              # the SDKs send about 20, Azure about 40
    max_body_bytes: int = 64 << 20      # providers accept 32 to 50 MB


# streams have no size limit; the collector of an answer sets one
ANSWER_LIMITS = Limits(max_body_bytes=sys.maxsize)
MAX_CHUNK_LINE_BYTES = 256      # with extensions, which are expensive (CVE-2023-39326)


class RequestHead(NamedTuple):
    method: str
    path: str                   # raw: routing and authorization see the same path
    query: str
    http11: bool                # else HTTP/1.0
    headers: Headers            # `host` comes from an absolute target (RFC 9112 3.2.2)
    keep_alive: bool
    expect_continue: bool
    length: int | None          # of the body; None if it comes in chunks


class ResponseHead(NamedTuple):
    status: int
    headers: Headers
    keep_alive: bool            # also False if the body ends with the connection
    length: int | None          # of the body; None if it comes in chunks or ends with the connection


class Signal(enum.Enum):
    NEED_DATA = 1       # feed more, or feed_eof()
    END = 2             # the message is complete


NEED_DATA: Final = Signal.NEED_DATA
END: Final = Signal.END
Head = TypeVar("Head", RequestHead, ResponseHead)

# --- grammar (RFC 9110 5, RFC 9112, RFC 3986) ---

CRLF = b"\r\n"
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
PATH = rb"[A-Za-z0-9._~!$&'()*+,;=:@/-]*(?:%[0-9A-Fa-f]{2}[A-Za-z0-9._~!$&'()*+,;=:@/-]*)*"
QUERY = PATH.replace(b"@/", b"@/?")
HOST = rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)(?::[0-9]{0,5})?"

HOST_VALUE = re.compile(HOST.decode())
REQUEST_START = re.compile(TOKEN + rb"(?: |\Z)|\r?\Z")      # every beginning of a request, cut anywhere
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9]\.[0-9])")
TARGET = re.compile(rb"(?=[/Hh])(?:[Hh][Tt][Tt][Pp][Ss]?://(" + HOST + rb"))?"
                    rb"(/" + PATH + rb")?(?:\?(" + QUERY + rb"))?")
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [\t -~\x80-\xff]*)?")    # some omit the last SP
FIELD = re.compile("(?m)^(" + TOKEN.decode() + r"):[\t ]*+([\t -~\x80-\xff]*+)(?:\r\n|\Z)")   # *+: linear
FIELD_LINE = re.compile(TOKEN + rb": [\t -~\x80-\xff]*\r\n")
STRAY_BYTE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\x00")     # in a section of lines that is incomplete
CONTENT_LENGTH = re.compile(r"[0-9]{1,19}")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[ \t]*" + TOKEN
                        + rb"(?:[ \t]*=[ \t]*(?:" + TOKEN + rb"|" + QUOTED + rb"))?)*\r\n")
CHUNK_START = re.compile(rb"(?:[0-9A-Fa-f]{1,16}(?:[ \t;][\t -~\x80-\xff]*)?)?\r?")     # an incomplete one


def parse_fields(section: bytes, max_headers: int) -> Headers:
    """Parses the header lines, without the last one's CRLF."""
    lines = section.count(b"\n") + bool(section)
    if lines > max_headers:
        raise ProtocolError(f"There are more than {max_headers} header fields.", 431)
    found = FIELD.findall(section.decode("latin-1"))
    if len(found) != lines:
        raise ProtocolError("A header line is malformed: no colon, a blank before it, a folded line,"
                            " a character that is not allowed, or an end that is not CRLF.")
    return Headers([(name.lower(), value.rstrip(" \t")) for name, value in found])


def list_values(headers: Headers, name: str) -> list[str]:
    """The elements of a comma-separated header, lower case, of all its lines."""
    return [element.strip(" \t").lower() for value in headers.get_all(name) for element in value.split(",")]


def keeps_alive(headers: Headers, http11: bool) -> bool:
    """RFC 9112 9.3; `close` has priority."""
    options = list_values(headers, "connection")
    return "close" not in options and (http11 or "keep-alive" in options)


def body_framing(headers: Headers, http11: bool, max_body_bytes: int) -> tuple[int | None, bool]:
    """Content-Length if there is one, and whether the body is chunked (RFC 9112 6.1, 6.3; strict)."""
    lengths = list_values(headers, "content-length")
    codings = list_values(headers, "transfer-encoding")
    if codings:
        if lengths or not http11:
            raise ProtocolError("Transfer-Encoding needs HTTP/1.1, and no Content-Length beside it.")
        if codings != ["chunked"]:
            raise ProtocolError("The only Transfer-Encoding taken is chunked, once.", 501)
        return None, True
    if not lengths:
        return None, False
    if len(set(lengths)) > 1 or not CONTENT_LENGTH.fullmatch(lengths[0]):   # equal values count as one
        raise ProtocolError("Content-Length is not one decimal number.")
    return check_body_size(int(lengths[0]), max_body_bytes), False


def check_body_size(size: int, max_bytes: int) -> int:
    if size > max_bytes:
        raise ProtocolError(f"The body is over {max_bytes} bytes.", 413)
    return size


def parse_request_head(line: bytes, headers: Headers, max_body_bytes: int) -> RequestHead:
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise ProtocolError("The request line is not 'METHOD target HTTP/1.1'.")
    method, target, version = match.groups()
    if version not in (b"1.0", b"1.1"):
        raise ProtocolError("Only HTTP/1.1 and HTTP/1.0 are spoken here.", 505)
    http11 = version == b"1.1"
    authority, path, query = b"", target, b""
    if target != b"*" or method != b"OPTIONS":      # origin or absolute form (RFC 9112 3.2)
        match = TARGET.fullmatch(target)
        if match is None:
            raise ProtocolError("The request target is neither a path nor an http URL,"
                                " or has a character that must be percent-encoded.")
        authority, path, query = match.groups(b"")
    hosts = headers.get_all("host")
    if len(hosts) > 1 or (http11 and not hosts):
        raise ProtocolError("A request has exactly one Host header.")
    if hosts and not HOST_VALUE.fullmatch(hosts[0]):    # CVE-2026-48710: "a?x" changed the path checked
        raise ProtocolError("Host is not a host name or address with an optional port.")
    if authority:       # it has priority over the Host header
        headers = Headers([("host", authority.decode()), *(item for item in headers if item[0] != "host")])
    length, chunked = body_framing(headers, http11, max_body_bytes)
    if not chunked:
        length = length or 0        # neither header: no body (RFC 9112 6.3)
    expectations = list_values(headers, "expect")
    if expectations not in ([], ["100-continue"]):
        raise ProtocolError("The only expectation met is 100-continue.", 417)
    expect_continue = bool(expectations) and http11 and length != 0     # not in HTTP/1.0 (RFC 9110 10.1.1)
    return RequestHead(method.decode(), path.decode() or "/", query.decode(), http11, headers,
                       keeps_alive(headers, http11), expect_continue, length)


# --- readers ---

class Reader(Generic[Head]):
    """The part that both sides share: the buffer, header blocks, and bodies by length or by chunks.

    next() returns the head, then body pieces as they come, then END; or NEED_DATA where more input is needed,
    which after feed_eof() is an error. A ProtocolError is the same at every later call."""

    def __init__(self, limits: Limits = ANSWER_LIMITS) -> None:
        self.limits = limits
        self._method = ""               # of the request under way; "" between messages
        self._data = b""
        self._at = 0                    # all bytes before it have been returned
        self._scanned = 0               # so many from there on hold no end of a header block
        self._eof = False
        self._error: ProtocolError | None = None
        self._parts: Iterator[Head | bytes | Signal] = self._messages()

    @property
    def idle(self) -> bool:
        """The reader is between messages and holds no byte of another one."""
        return not self._method and self._at == len(self._data)

    def _messages(self) -> Iterator[Head | bytes | Signal]:
        raise NotImplementedError

    def feed(self, data: bytes) -> None:
        self._data = self._data[self._at:] + data
        self._at = 0

    def feed_eof(self) -> None:
        """The peer will send nothing more."""
        self._eof = True

    def next(self) -> Head | bytes | Signal:
        if self._error is not None:
            raise self._error
        try:
            part = next(self._parts)
        except ProtocolError as error:
            self._error = error
            raise
        if part is NEED_DATA or part is END:
            self.feed(b"")              # an idle connection keeps no buffer alive
        return part

    def _need_more_data(self) -> Signal:
        """Yielded in the middle of a message."""
        if self._eof:
            raise ProtocolError("The connection ended in the middle of a message.")
        return NEED_DATA

    def _header_block(self, limit: int) -> tuple[bytes, Headers] | None:
        """The next line and the header fields behind it; None while they are incomplete."""
        data, at = self._data, self._at
        end = data.find(b"\r\n\r\n", at + max(0, self._scanned - 3), at + limit + 4)
        if end >= 0:
            self._at, self._scanned = end + 4, 0
            line, _, fields = data[at:end].partition(CRLF)
            return line, parse_fields(fields, self.limits.max_headers)
        if len(data) - at >= limit + 4:
            raise ProtocolError(f"The headers are over {limit} bytes.", 431)
        if STRAY_BYTE.search(data, at + max(0, self._scanned - 1)):     # otherwise bare LFs would wait
            raise ProtocolError("A header has a control character, or a line that does not end with CRLF.")
        self._scanned = len(data) - at
        return None

    def _take(self, size: int) -> bytes:
        """At most `size` of the buffered bytes."""
        piece = self._data[self._at:self._at + size]
        self._at += len(piece)
        return piece

    def _fixed_length_body(self, length: int) -> Iterator[bytes | Signal]:
        while length:
            piece = self._take(length)
            length -= len(piece)
            yield piece or self._need_more_data()

    def _chunked_body(self) -> Iterator[bytes | Signal]:
        """RFC 9112 7.1. Buffered chunks come joined; a size is checked before its data is read."""
        limits, total = self.limits, 0
        while True:
            data, at, pieces = self._data, self._at, []
            while line := CHUNK_LINE.match(data, at, at + MAX_CHUNK_LINE_BYTES):
                start, size = line.end(), int(line[1], 16)
                end = start + size
                if data[end:end + 2] != CRLF or not size:
                    break
                pieces.append(data[start:end])
                at = end + 2
            if pieces:
                self._at = at
                joined = b"".join(pieces)
                total = check_body_size(total + len(joined), limits.max_body_bytes)
                yield joined
                continue
            if line is None:
                if len(data) - at >= MAX_CHUNK_LINE_BYTES or not CHUNK_START.fullmatch(data, at):
                    raise ProtocolError("The line before a chunk is malformed or too long.")
                yield self._need_more_data()
                continue
            if not size:
                break
            self._at = start
            total = check_body_size(total + size, limits.max_body_bytes)
            yield from self._fixed_length_body(size)
            while not self._data.startswith(CRLF, self._at):
                if not CRLF.startswith(self._data[self._at:self._at + 2]):  # CVE-2025-43859: check both bytes
                    raise ProtocolError("The data of a chunk is not followed by CRLF.")
                yield self._need_more_data()
            self._at += 2
        # trailers: checked and dropped (RFC 9110 6.5.1)
        while self._header_block(limits.max_line_bytes) is None:
            yield self._need_more_data()


class RequestReader(Reader[RequestHead]):
    """The server's side. After END comes the next request, unless the last one closes."""

    def _messages(self) -> Iterator[RequestHead | bytes | Signal]:
        limits, blank_skipped = self.limits, False
        while not self._method:
            if not blank_skipped and self._data.startswith(CRLF, self._at):     # RFC 9112 2.2
                self._at += 2
                blank_skipped = True
            if not REQUEST_START.match(self._data, self._at):       # before any CRLF: a TLS hello has none
                raise ProtocolError("This is not an HTTP/1.1 request (is it https or HTTP/2?).")
            line_end = self._at + limits.max_line_bytes + 2
            if len(self._data) >= line_end and self._data.find(CRLF, self._at, line_end) < 0:
                raise ProtocolError(f"The request line is over {limits.max_line_bytes} bytes.", 414)
            block = self._header_block(limits.max_head_bytes)
            if block is None:
                yield NEED_DATA if self.idle else self._need_more_data()
                continue
            head = parse_request_head(*block, limits.max_body_bytes)
            self._method = head.method
            yield head
            yield from self._chunked_body() if head.length is None else self._fixed_length_body(head.length)
            if head.keep_alive:
                self._method = ""
            blank_skipped = False
            yield END
        yield from itertools.repeat(NEED_DATA)      # what follows the last request is not read


class ResponseReader(Reader[ResponseHead]):
    """The client's side."""

    def start(self, method: str) -> None:
        """Begins a request with that method. Earlier bytes would be taken for its answer."""
        if not self.idle:
            raise RuntimeError("the connection is not ready for another request")
        self._method = method

    def _messages(self) -> Iterator[ResponseHead | bytes | Signal]:
        while True:
            if not self._method:
                yield NEED_DATA
                continue
            if not b"HTTP/1.".startswith(self._data[self._at:self._at + 7]):
                raise ProtocolError("The answer does not begin with HTTP/1.1.")
            block = self._header_block(self.limits.max_head_bytes)
            if block is None:
                yield self._need_more_data()
                continue
            line, headers = block
            match = STATUS_LINE.fullmatch(line)
            if match is None or match[2] == b"101":     # Pomex never requests an upgrade
                raise ProtocolError("The answer's status line is malformed, or switches protocols.")
            http11, status = match[1] == b"1", int(match[2])
            if status < 200:        # the final answer follows
                continue
            length: int | None = 0
            chunked = False
            if self._method == "CONNECT" and status < 300:          # RFC 9110 9.3.6: a tunnel has no framing
                length = None
            elif self._method != "HEAD" and status not in (204, 304):       # RFC 9112 6.3: these have no body
                length, chunked = body_framing(headers, http11, self.limits.max_body_bytes)
            keep_alive = keeps_alive(headers, http11) and (chunked or length is not None)
            yield ResponseHead(status, headers, keep_alive, length)
            if chunked:
                yield from self._chunked_body()
            elif length is not None:
                yield from self._fixed_length_body(length)
            else:
                while not self._eof or self._at < len(self._data):
                    yield self._take(len(self._data)) or NEED_DATA
            self._method = ""
            yield END


# --- writers ---

REASONS = {status.value: status.phrase for status in http.HTTPStatus}
HeaderFields: TypeAlias = "Iterable[tuple[str, str]]"     # names and values
LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@functools.lru_cache(256)       # most fields are the same in each message
def field_line(name: str, value: str) -> bytes:
    """ValueError, without the value, for a header that our own reader would refuse."""
    line = f"{name}: {value}\r\n".encode("latin-1")
    if not FIELD_LINE.fullmatch(line):
        raise ValueError(f"header {name!r} has a character that no header may have")
    return line


def request_bytes(method: str, target: str, headers: HeaderFields, body: bytes) -> bytes:
    """One request; the caller supplies host and content-length."""
    line = f"{method} {target} HTTP/1.1".encode("latin-1")
    if not REQUEST_LINE.fullmatch(line):
        raise ValueError(f"{method!r} or its target cannot stand in a request line")
    return b"".join([line, CRLF, *itertools.starmap(field_line, headers), CRLF, body])


def response_head(status: int, headers: HeaderFields) -> bytes:
    line = f"HTTP/1.1 {status} {REASONS.get(status, '')}\r\n".encode()
    return b"".join([line, *itertools.starmap(field_line, headers), CRLF])


def chunk(data: bytes) -> bytes:
    """Nothing for empty data: an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


# --- content codings ---

MAX_MEMBERS = 1024          # a body of countless empty gzip members costs work and gives no output
INFLATE_SLICE = 65536       # zlib copies the rest of its input at each member's end
MAX_RATIO = 200             # of a request's size to its compressed size: prompts have 3 to 20
RATIO_FREE_BYTES = 4 << 20  # output up to this size has no ratio limit


class ContentDecoder:
    """Decodes a gzip body or passes an uncoded one; 413 as soon as it exceeds `max_bytes`."""

    def __init__(self, encoding: str, max_bytes: int | None = None) -> None:
        coding = encoding.strip(" \t").lower()
        if coding not in ("", "identity", "gzip", "x-gzip"):
            raise ProtocolError("Content-Encoding must be gzip or none.", 415)
        self._gzip = coding.endswith("gzip")
        self._max_bytes = max_bytes
        self._coded = self._decoded = 0     # bytes so far
        self._members = 0
        self._member: zlib._Decompress | None = None

    def feed(self, data: bytes) -> bytes:
        if not self._gzip:
            return self._limited(data)
        pieces = []
        for start in range(0, len(data), INFLATE_SLICE):
            rest = data[start:start + INFLATE_SLICE]
            self._coded += len(rest)
            while rest:
                if self._member is None or self._member.eof:
                    self._members += 1          # RFC 1952 2.2 allows several members
                    if self._members > MAX_MEMBERS:
                        raise ProtocolError(f"The gzip body has more than {MAX_MEMBERS} members.")
                    self._member = zlib.decompressobj(16 + zlib.MAX_WBITS)
                room = 0 if self._max_bytes is None else self._max_bytes + 1 - self._decoded    # 0: no limit
                try:
                    pieces.append(self._limited(self._member.decompress(rest, room)))
                except zlib.error as error:
                    raise ProtocolError("The body is not valid gzip.") from error
                rest = self._member.unused_data
        return b"".join(pieces)

    def finish(self) -> None:
        if self._member and not self._member.eof:
            raise ProtocolError("The gzip body is cut short.")

    def _limited(self, data: bytes) -> bytes:
        self._decoded += len(data)
        if self._max_bytes is not None:
            if self._decoded > self._max_bytes:
                raise ProtocolError(f"The decompressed body is over {self._max_bytes} bytes.", 413)
            if self._coded and self._decoded > max(RATIO_FREE_BYTES, MAX_RATIO * self._coded):
                raise ProtocolError(f"The body grows to more than {MAX_RATIO} times its size.", 413)
        return data


# === 4. SSE ===
#
# Server-sent events (WHATWG HTML 9.2.6), whole events at a time.

MAX_EVENT_BYTES = 32 << 20  # the terminal event repeats the answer, images included
LINE_END = re.compile(r"\r\n|\r|\n")


class Event(NamedTuple):
    event: str      # "message" if the stream names none
    data: str


def parse_event(block: str) -> Event | None:
    """The event in the lines between two empty lines, if it has `data`."""
    if block.startswith("data: ") and "\n" not in block:
        return Event("message", block[6:])
    name, data = "", []
    for line in block.split("\n"):
        key, _, value = line.partition(":")     # a comment has the key ""
        if key == "data":
            data.append(value.removeprefix(" "))
        elif key == "event":
            name = value.removeprefix(" ")
    return Event(name or "message", "\n".join(data)) if data else None


class SSEDecoder:
    """Turns bytes into events. It ignores `id` and `retry`: Pomex never resumes a stream."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.max_event_bytes = max_event_bytes
        self.truncated = False  # after finish(): the body ended inside an event
        self._rest = bytearray()  # holds no empty line, but may end with a line end
        self._started = False  # no byte order mark can follow
        self._after_cr = False  # a leading LF belongs to that line end

    def feed(self, data: bytes) -> list[Event]:
        return self.parse(self.split(data))

    def split(self, data: bytes) -> bytes:
        """Everything up to the last empty line, with LF as line ends."""
        if b"\r" in data or (self._after_cr and data):
            if self._after_cr:
                data = data.removeprefix(b"\n")
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        end = data.rfind(b"\n\n") + 2
        if end == 1 and not (self._rest.endswith(b"\n") and data.startswith(b"\n")):
            self._rest += data
            data = b""
        elif self._rest or end < len(data):
            rest = data[end:]
            data = bytes(self._rest) + data[:end]
            self._rest = bytearray(rest)
        longest = len(self._rest) - 1
        if len(data) > self.max_event_bytes:
            longest = max(longest, *map(len, data.split(b"\n\n")))
        if longest > self.max_event_bytes:
            raise UpstreamError(f"The upstream sent an event of more than {self.max_event_bytes} bytes.")
        return data

    def parse(self, data: bytes) -> list[Event]:
        """The events in whole blocks."""
        events = map(parse_event, self.decode(data).split("\n\n"))
        return [event for event in events if event]

    def decode(self, data: bytes) -> str:
        """Whole blocks as text."""
        text = data.decode("utf-8", "replace")
        if text and not self._started:
            self._started = True
            text = text.removeprefix("\ufeff")
        return text

    def finish(self) -> list[Event]:
        """Ends the body. An event without its empty line (many chat servers) counts if all its lines are
        complete, or if its data cannot be part of something longer."""
        rest, self._rest = bytes(self._rest), bytearray()
        events = self.parse(rest.strip(b"\n"))
        if events and not rest.endswith(b"\n"):
            events = [event for event in events
                      if event.data == "[DONE]" or parse_object(event.data) is not None]
        has_field = re.search(rb"(?m)^[^:\n]", rest.removeprefix(codecs.BOM_UTF8))
        self.truncated = not events and has_field is not None
        return events


def sse_frame(type: str, data: str) -> bytes:
    """One event; without a type (as for `[DONE]`) only data. Lone surrogates become `?`."""
    if "\n" in data or "\r" in data:
        data = LINE_END.sub("\ndata: ", data)
    name = f"event: {type}\n" if type else ""
    return f"{name}data: {data}\n\n".encode("utf-8", "replace")


# === 5. the Responses API ===
# This layer makes every `response.*` event and ends every stream, once.

# --- 5.1 the request ---

def sha256_hex(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def json_digest(value: Any) -> str:
    return sha256_hex(json.dumps(value, sort_keys=True))[:16]


JSON_NAMES = {
    str: "a string", int: "an integer", float: "a number", bool: "true or false",
    dict: "an object", list: "an array", type(None): "null",
}


def invalid_param(path: str, words: str, code: str | None = "invalid_value") -> BadRequest:
    return BadRequest(f"{path}{words}", param=path, code=code)


Strings: TypeAlias = "tuple[str, ...]"


class Field(NamedTuple):
    """The valid values of a field: of a request, of pomex.toml, of an admin body or of a command."""
    types: tuple[type, ...] = (str,)
    minimum: float | None = None  # of a number, or of a string's length
    maximum: float = math.inf
    choices: Collection[str] = ()
    items: Field | None = None  # for each entry of an array or object
    inner: Callable[[Any, str], None] | None = None  # a further check, called with value and path
    pattern: str = ""  # for the whole text
    read: Callable[[Any], Any] | None = None  # converts; ValueError, ArithmeticError or KeyError: invalid
    wanted: str = ""  # completes "must be" if the types are not enough
    meaning: str = ""  # for people
    secret: bool = False  # never shown


Fields: TypeAlias = "Mapping[str, Field]"  # by name


def check(value: Any, spec: Field, path: str) -> Any:
    """Returns the value as `spec` converts it; raises BadRequest if it is not valid."""
    if type(value) not in spec.types:
        raise type_error(value, spec, path)
    if spec.minimum is not None:
        what, size = ("length", len(value)) if isinstance(value, str) else ("value", value)
        if not spec.minimum <= size <= spec.maximum:
            bounded = spec.maximum < math.inf
            limits = f"between {spec.minimum} and {spec.maximum}" if bounded else f"at least {spec.minimum}"
            raise invalid_param(path, f": its {what} must be {limits}.")
    if spec.choices and value not in spec.choices:
        raise invalid_param(path, f" must be one of {', '.join(filter(None, spec.choices))}.")
    if spec.items and not isinstance(value, str):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            check(entry, spec.items, f"{path}[{key!r}]")
    if spec.inner:
        spec.inner(value, path)
    if not spec.pattern and not spec.read:
        return value
    try:
        if spec.pattern and not re.fullmatch(spec.pattern, value):
            raise ValueError
        return spec.read(value) if spec.read else value
    except (ValueError, ArithmeticError, KeyError) as error:
        words = f" must be {spec.wanted}." if spec.wanted else f": {error}."
        raise invalid_param(path, words, None) from None


def type_error(value: Any, spec: Field, path: str) -> BadRequest:
    if spec.wanted:
        return invalid_param(path, f" must be {spec.wanted}.", "invalid_type")
    if value is None:
        message = f"Missing required parameter: {path}."
        return BadRequest(message, param=path, code="missing_required_parameter")
    wanted = "a number" if float in spec.types else " or ".join(JSON_NAMES[each] for each in spec.types)
    given = JSON_NAMES.get(type(value), "a date")
    return invalid_param(path, f" must be {wanted}, not {given}.", "invalid_type")


def check_members(value: JSON, members: Fields, path: str) -> None:
    for name, spec in members.items():
        given = value.get(name)
        # most values need no call
        if (type(given) not in spec.types or spec.minimum is not None
                or (spec.choices and given not in spec.choices)):
            check(given, spec, f"{path}.{name}")
        elif spec.inner:
            spec.inner(given, f"{path}.{name}")


def object_with(members: Fields) -> Field:
    return OBJECT._replace(inner=lambda value, path: check_members(value, members, path))


def check_content(content: Any, path: str) -> None:
    if isinstance(content, list) and not all(map(is_text_part, content)):  # nearly all are
        check_typed(content, PART_FIELDS, path)


def is_text_part(part: Any) -> bool:
    return (type(part) is dict and part.get("type") in ("input_text", "output_text")
            and type(part.get("text")) is str)


def check_typed(entries: list[Any], known: Mapping[str, Fields], path: str) -> None:
    """Checks objects by their type. Unknown types have any members."""
    for index, entry in enumerate(entries):
        kind = entry.get("type") if isinstance(entry, dict) else None
        if not isinstance(kind, str):
            raise invalid_param(f"{path}[{index}]", " must be an object with a type.", "invalid_type")
        if kind in known:
            check_members(entry, known[kind], f"{path}[{index}]")


def check_printable(name: str, path: str) -> None:
    if not name.isprintable():
        raise invalid_param(path, " holds characters that no name has.")


def check_format(text: JSON, path: str) -> None:
    shape = text.get("format")
    if shape is None:
        return
    kind = shape.get("type") if isinstance(shape, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise invalid_param(f"{path}.format.type", " must be text, json_object or json_schema.")
    if kind == "json_schema":
        check_members(shape, JSON_SCHEMA, f"{path}.format")


TEXT = Field()
NAME = Field(minimum=1)
FLAG = Field((bool,))
OBJECT = Field((dict,))
MAYBE_TEXT = Field((str, type(None)))
MAYBE_OBJECT = Field((dict, type(None)))
JSON_SCHEMA = {"name": Field(minimum=1, maximum=64), "schema": OBJECT}
PART_TEXT = {"text": Field(wanted="a string")}
CONTENT = Field((str, list), inner=check_content, wanted="a string or an array of parts")
OUTPUT = CONTENT._replace(wanted="")
TOOLS = Field((list,), inner=lambda tools, path: check_typed(tools, TOOL_FIELDS, path))

# Other fields go unchecked. null counts as absent: SDKs send it.
REQUEST_FIELDS: Fields = {
    **dict.fromkeys(("stream", "store", "background", "parallel_tool_calls"), FLAG),
    **dict.fromkeys(("prompt_cache_key", "user", "service_tier"), TEXT),
    **dict.fromkeys(("stream_options", "reasoning", "prompt_cache_options"), OBJECT),
    **dict.fromkeys(("input", "instructions"), Field((str, list))),
    "model": Field(minimum=1, maximum=256, inner=check_printable),
    "include": Field((list,)),
    "max_output_tokens": Field((int,), 1),
    "max_tool_calls": Field((int,), 0),
    "metadata": Field((dict,), items=TEXT),
    "temperature": Field((int, float), 0, 2),
    "top_p": Field((int, float), 0, 1),
    "top_logprobs": Field((int,), 0, 20),
    "text": Field((dict,), inner=check_format),
    "tools": TOOLS,
    "tool_choice": Field((str, dict)),
    "truncation": Field(choices=("auto", "disabled")),
    "safety_identifier": Field(maximum=512, minimum=0),
}

# Requests that need stored state are refused rather than answered wrongly.
NEEDS_STATE = {
    "previous_response_id": "Pomex stores no responses: send the whole history in input.",
    "conversation": "Pomex stores no conversations: send the whole history in input.",
    "prompt": "Pomex stores no prompt templates: send instructions and input.",
    "background": "Pomex runs no background responses: send background: false.",
}

# Known items, parts and tools, with the fields that Pomex reads. Unknown ones are never refused.
MESSAGE = {"role": Field(choices=("assistant", "developer", "system", "user")), "content": CONTENT}
CALL = {"call_id": MAYBE_TEXT, "namespace": MAYBE_TEXT}
CALL_FIELDS: dict[str, Fields] = {
    "function_call": {"name": NAME, "arguments": TEXT},
    "custom_tool_call": {"name": NAME, "input": TEXT},
    **dict.fromkeys(("function_call_output", "custom_tool_call_output"), {"output": OUTPUT}),
    **dict.fromkeys(("local_shell_call_output", "apply_patch_call_output"), {"output": MAYBE_TEXT}),
    **dict.fromkeys(("local_shell_call", "shell_call"), {"action": MAYBE_OBJECT}),
    **dict.fromkeys(("tool_search_output", "additional_tools"), {"tools": TOOLS}),
    **dict.fromkeys(("shell_call_output", "apply_patch_call", "tool_search_call"), {}),
}
ITEM_FIELDS = {"message": MESSAGE, **{kind: {**CALL, **fields} for kind, fields in CALL_FIELDS.items()}}
PART_FIELDS = {"input_text": PART_TEXT, "output_text": PART_TEXT}
TOOL_FIELDS: dict[str, Fields] = {
    "function": {"name": NAME, "description": MAYBE_TEXT, "parameters": MAYBE_OBJECT},
    "custom": {"name": NAME, "description": MAYBE_TEXT, "format": MAYBE_OBJECT},
    "namespace": {"name": NAME, "tools": TOOLS},
    "tool_search": {"description": MAYBE_TEXT, "parameters": MAYBE_OBJECT},
}


def check_item(item: JSON, path: str) -> JSON:
    """Returns an input item with its `type`, which a message may omit."""
    if not isinstance(item, dict):
        raise type_error(item, OBJECT, path)
    kind = item.get("type")
    if kind is None and "role" in item:
        kind = "message"
        item = {**item, "type": kind}
    if kind == "item_reference" or (kind is None and "id" in item):
        words = ": Pomex stores no items: send the item itself."
        raise invalid_param(path, words, "previous_response_not_found")
    if not isinstance(kind, str):
        raise invalid_param(f"{path}.type", " must be a string.", "missing_required_parameter")
    check_members(item, ITEM_FIELDS.get(kind, {}), path)
    return item


def check_tool_choice(choice: Any, tools: Sequence[JSON]) -> None:
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise invalid_param("tool_choice", " must be none, auto, required or an object.")
    if isinstance(choice, dict):
        if not isinstance(choice.get("type"), str):
            raise invalid_param("tool_choice.type", " must be a string.")
        name = choice.get("name")
        if choice["type"] in ("function", "custom") and name not in list(tool_names(tools)):
            raise invalid_param("tool_choice", f" names {str(name)[:64]!r}, which is not among the tools.")


def tool_names(tools: Sequence[JSON]) -> Iterator[str]:
    for tool in tools:
        if tool["type"] == "namespace":
            yield from tool_names(tool["tools"])
        elif isinstance(tool.get("name"), str):
            yield tool["name"]


class AroundInput(NamedTuple):
    """A body with a mark in place of its input array, if the two were decoded apart."""
    text: str = ""
    body: JSON = {}
    start: int = 0  # of the array, in the bytes of the body
    behind: int = 0  # the number of bytes behind it


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """A validated request. `input` is a list of items that have a type; `tools` holds those of the body, then
    those of input items. A request of another client API is translated into this form; its input and tools
    only on demand, by `translated()`."""
    body: JSON
    raw: bytes
    model: str
    stream: bool
    instructions: str
    input: list[JSON]
    tools: list[JSON]
    weight: int  # see weigh_input
    around: AroundInput = field(default=AroundInput(), compare=False)
    # the prepared tools and items, shared by the requests of a growing conversation
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)
    api: str = "responses"  # of CLIENT_APIS
    given: JSON = field(default_factory=dict, compare=False)  # the client's own body, decoded

    @property
    def estimated_input(self) -> int:
        """The input size in tokens."""
        return self.weight // 4

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the body; null counts as absent."""
        value = self.body.get(name)
        return default if value is None else value

    def translated(self) -> ResponsesRequest:
        """The request with its input and tools."""
        if self.input or self.api == "responses":
            return self
        body = {**CLIENT_APIS[self.api].translate(self), **self.body}
        checked = dataclasses.replace(self, body={}, input=body["input"])
        whole = validate_request(body, self.raw, self.weight, checked, self.around)
        return dataclasses.replace(whole, model=self.model, api=self.api, given=self.given)

    def cache_key(self) -> str:
        """prompt_cache_key, or a key shared by all requests with the same beginning."""
        beginning = [self.model, self.instructions, self.body.get("tools")]
        return self.get("prompt_cache_key") or sha256_hex(dumps(beginning))[:32]


# images and files
INLINE_DATA = (re.compile(rb';base64,([^"]*)'), re.compile(rb'"file_data":"(?!data:)([^"]*)'))
INLINE_DATA_BYTES = 1024  # shorter data counts as text
INLINE_DATA_WEIGHT = 6000  # for each, 1,500 tokens: a large image at the providers that document it


def weigh_input(raw: bytes, start: int = 0) -> int:
    """The request bytes from `start` on; four make a token. Inline images and files have a fixed weight."""
    sizes = [len(match[1]) for pattern in INLINE_DATA for match in pattern.finditer(raw, start)]
    large = [size for size in sizes if size >= INLINE_DATA_BYTES]
    return len(raw) - start - sum(large) + INLINE_DATA_WEIGHT * len(large)


MAX_INPUT_ITEMS = 100_000  # a conversation of several weeks has some thousands
MAX_JSON_VALUES = 2_000_000  # each takes a hundred bytes of memory
COUNTED_BODY_BYTES = 8 << 20  # a smaller body cannot hold many more, and text has commas too
INPUT_ARRAYS = {  # by the field's name; never inside a JSON string, which escapes quotes
    name: re.compile(rb'"%s"\s*:\s*\[' % name.encode()) for name in ("input", "messages")}
INPUT_MARK = "(input)"  # stands for the array while the rest is decoded


def common_prefix(one: bytes, other: bytes) -> int:
    """Its length, by bisection."""
    start, end = 0, min(len(one), len(other))
    while start < end:
        middle = (start + end + 1) // 2
        if one[start:middle] == other[start:middle]:
            start = middle
        else:
            end = middle - 1
    return start


def grown_body(raw: bytes, last: ResponsesRequest) -> tuple[JSON, int, AroundInput] | None:
    """The decoded body, its weight and the text around its input, if `raw` is the body of `last` with more
    input items. Only new text is decoded."""
    name = CLIENT_APIS[last.api].history
    shared = common_prefix(raw, last.raw)
    array = INPUT_ARRAYS[name].search(raw, 0, shared)
    if array is None or LONE_SURROGATE.search(raw, shared):
        return None
    start, body, same = array.end() - 1, last.around.body, last.given[name]
    try:
        if raw[shared:shared + 1] + last.raw[shared:shared + 1] != b",]":  # more here, the end there
            # Claude Code moves its cache marks, so its messages differ in the last one
            shared = raw.rfind(b',{"role":', start, shared)
            if shared < 0 or last.api == "responses":
                return None
            changed, _ = STRICT_DECODER.raw_decode("[0" + last.raw[shared:].decode())
            same = same[:1 - len(changed)]
        text = "[0" + raw[shared:].decode()
        items, end = STRICT_DECODER.raw_decode(text)
        around = raw[:start].decode() + json_string(INPUT_MARK) + text[end:]  # it may not be JSON
        if around != last.around.text:
            body = strict_json(around)
    except (ValueError, RecursionError):
        return None
    if body.get(name) != INPUT_MARK:
        return None
    grown = {**body, name: [*same, *items[1:]]}
    weight = last.weight - weigh_input(last.raw, shared) + weigh_input(raw, shared)
    return grown, weight, AroundInput(around, body, start, len(text[end:].encode()))


def parse_request(raw: bytes, last: ResponsesRequest | None = None,
                  api: str = "responses") -> ResponsesRequest:
    """Parses a body of one of CLIENT_APIS. A BadRequest names the field and its valid values. What it shares
    with `last`, the conversation's previous request, is neither decoded nor validated again."""
    if len(raw) > COUNTED_BODY_BYTES and sum(map(raw.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise BadRequest(f"The body holds more than {MAX_JSON_VALUES} JSON values. Send a shorter history.",
                         status=413, code="request_too_large")
    grown = last and last.api == api and grown_body(raw, last)
    if grown:
        body, weight, around = grown
    else:
        try:
            body = load_json(raw)
        except ValueError as error:
            raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
        if not isinstance(body, dict):
            mistake = f"The body must be a JSON object, not {JSON_NAMES[type(body)]}."
            raise BadRequest(mistake, code="invalid_json")
        last, weight, around = None, weigh_input(raw), AroundInput()
    try:
        if api != "responses":
            fields = CLIENT_APIS[api].fields(body)
            return ResponsesRequest(fields, raw, fields["model"], fields.get("stream", False), "", [], [],
                                    weight, around, last.memo if last else {}, api, body)
        return validate_request(body, raw, weight, last, around)
    except RecursionError:  # newer Pythons decode deeper than they call
        raise BadRequest("The tools are nested too deeply.", param="tools", code="invalid_value") from None


def validate_request(body: JSON, raw: bytes, weight: int, last: ResponsesRequest | None,
                     around: AroundInput) -> ResponsesRequest:
    """The request in a decoded body. It shares the first input items of `last`, and perhaps fields."""
    valid = last.body if last else {}
    for name, sentence in NEEDS_STATE.items():
        if body.get(name):
            is_previous = name == "previous_response_id"
            code = "previous_response_not_found" if is_previous else "unsupported_parameter"
            raise BadRequest(sentence, param=name, code=code)
    for name, spec in REQUEST_FIELDS.items():
        value = body.get(name)
        if (value is not None and value is not valid.get(name)) or name in ("model", "input"):
            check(value, spec, name)
    given = body["input"]
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if len(given) > MAX_INPUT_ITEMS:
        raise invalid_param("input", f" has {len(given)} items; at most {MAX_INPUT_ITEMS} are taken.",
                           "array_above_max_length")
    items = [*last.input] if last else []
    items += [check_item(given[index], f"input[{index}]") for index in range(len(items), len(given))]
    if not items:
        raise invalid_param("input", " is empty: send at least one item.")
    tools = [*(body.get("tools") or ())]
    for item in items:
        if "tools" in ITEM_FIELDS.get(item["type"], ()):
            tools += item["tools"]
    check_tool_choice(body.get("tool_choice"), tools)
    instructions = body.get("instructions") or ""
    if isinstance(instructions, list):
        instructions = "\n\n".join(text_of(item.get("content")) for item in only_dicts(instructions))
    return ResponsesRequest(body, raw, body["model"], bool(body.get("stream")), instructions, items, tools,
                            weight, around, last.memo if last else {}, given=body)


def text_of(content: Any, separator: str = "") -> str:
    """The text of a message content or a tool output, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in only_dicts(content)]
    return separator.join(text for text in texts if isinstance(text, str))


# --- 5.2 the envelope of reasoning ---

ENVELOPE_PREFIX = "pmx1."
MAC_BYTES = 16
MAX_ENVELOPE_BYTES = 4 << 20  # inflated; signed thinking blocks have below 200 KB
MAX_ENVELOPES_BYTES = 32 << 20  # of all in a request: 1.5 KB may inflate to 1 MB and can be repeated


@dataclass(slots=True)
class Envelope:
    """Data that a provider needs back with the next turn, carried by the client in `encrypted_content`:
    authenticated, not secret, bound to the account, marked with its origin."""
    secret: bytes
    account: str
    inflated: int = 0  # total size of all opened envelopes

    def seal(self, provider: str, model: str, replay: JSON) -> str:
        content = {"p": provider, "m": model, "b": replay}
        packed = zlib.compress(dumps(content).encode())
        return ENVELOPE_PREFIX + base64.urlsafe_b64encode(self.mac(packed) + packed).decode().rstrip("=")

    def open(self, text: str) -> tuple[str, str, JSON] | None:
        """(provider, model, replay); None if the text was altered or belongs to another account."""
        try:
            data = base64.urlsafe_b64decode(text.removeprefix(ENVELOPE_PREFIX) + "==")
            packed = data[MAC_BYTES:]
            if not hmac.compare_digest(self.mac(packed) + packed, data):
                return None
            plain = zlib.decompressobj().decompress(packed, MAX_ENVELOPE_BYTES)
            self.inflated += len(plain)
            content = json.loads(plain)
        except (ValueError, zlib.error):
            return None
        return content["p"], content["m"], content["b"]

    def mac(self, packed: bytes) -> bytes:
        return hmac.digest(self.secret, self.account.encode() + b"\0" + packed, "sha256")[:MAC_BYTES]


def unseal_items(items: list[JSON], envelope: Envelope, provider: str) -> tuple[list[JSON], list[str]]:
    """The input items that `provider` may see, with the content of envelopes as `sealed_replay`, and the
    names of dropped ones: of another provider, or not verified. Content without our prefix stays: only a
    Responses upstream can judge it."""
    kept, dropped = [], []
    envelope.inflated = 0
    for item in items:
        if "sealed_replay" in item:  # from a client: only content of an envelope is trusted
            item = {name: value for name, value in item.items() if name != "sealed_replay"}
        sealed = item.get("encrypted_content")
        if isinstance(sealed, str) and sealed.startswith(ENVELOPE_PREFIX):
            opened = envelope.open(sealed)
            if envelope.inflated > MAX_ENVELOPES_BYTES:
                raise BadRequest(f"The sealed reasoning in input is over {MAX_ENVELOPES_BYTES} bytes.",
                                 param="input", status=413, code="request_too_large")
            if opened is None or opened[0] != provider:
                dropped.append(f"{item['type']}:{opened[0] if opened else 'unverified'}")
                continue
            item = {**item, "sealed_replay": opened[2]}
            del item["encrypted_content"]
        kept.append(item)
    return kept, dropped


# --- 5.3 tools for providers that know only functions ---

MAX_NAME = 64  # of OpenAI's functions; the strictest of all providers
SAFE_NAME = re.compile("[a-zA-Z_][a-zA-Z0-9_-]{0,63}")  # Gemini's names begin with a letter or _
UNSAFE = re.compile(r"^(?=\d)|^$|\W", re.ASCII)
FREEFORM_PARAMETERS: JSON = {
    "type": "object", "additionalProperties": False, "required": ["input"],
    "properties": {
        "input": {"type": "string", "description": "The raw text, as the tool's description asks."}},
}
COMMAND = {"type": "array", "items": {"type": "string"}, "description": "The command and its arguments."}
LOCAL_SHELL: JSON = {
    "description": "Runs a command on the user's machine and returns its output.",
    "parameters": {
        "type": "object", "additionalProperties": False, "required": ["command"],
        "properties": {
            "command": COMMAND, "working_directory": {"type": "string"}, "timeout_ms": {"type": "integer"}},
    },
}


class Tool(NamedTuple):
    """The client's tool behind an upstream name."""
    kind: ItemType
    name: str
    namespace: str
    fitted: Mapping[str, str] = {}  # renamed parameters: the client's name -> the provider's


# valid names of a tool's parameters, from Anthropic's error and Google's reference; others accept any
PARAMETER_NAMES = {
    "claude": re.compile(r"[a-zA-Z0-9_.-]{1,64}"),
    "gemini": re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,63}"),
    "": re.compile("(?s:.*)"),
}


def rename_keys(arguments: str, names: Mapping[str, str]) -> str:
    """A call's arguments with the keys of all objects renamed by `names`."""
    if not names:
        return arguments
    renamed = json.loads(arguments, strict=False, object_hook=lambda holder: {
        names.get(key, key): value for key, value in holder.items()})
    return dumps(renamed)


def upstream_tool_name(name: str, namespace: str) -> str:
    """A name that every provider accepts, the same in every process: `ns__name`, fitted."""
    full = f"{namespace}__{name}" if namespace else name
    return full if SAFE_NAME.fullmatch(full) else fit_name(full)


def fit_name(name: str) -> str:
    """A valid name of a tool or a parameter, shortened, with a digest of the original one."""
    return f"{UNSAFE.sub('_', name)[:MAX_NAME - 9]}_{sha256_hex(name)[:8]}"


def freeform_description(tool: JSON) -> str:
    """A custom tool's description with its grammar as advice, since nothing enforces it."""
    shape = tool.get("format") or {}
    if grammar := shape.get("definition"):
        grammar = f"The text must follow this {shape.get('syntax') or 'lark'} grammar:\n{grammar}"
    advice = "Put the raw text into `input`: no markdown fence, no extra quoting."
    return "\n\n".join(filter(None, (tool.get("description"), grammar, advice)))


SCHEMA_MAPS = frozenset(("properties", "$defs", "definitions", "patternProperties", "dependentSchemas"))
SCHEMA_DATA = frozenset(("enum", "const", "default", "required", "example", "examples"))


def map_schema(schema: Any, change: Callable[[JSON], JSON]) -> Any:
    """A copy of a JSON schema with every schema object changed, inner ones first. `change` may alter its
    argument."""
    if isinstance(schema, list):
        return [map_schema(entry, change) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made: JSON = {}
    for key, value in schema.items():
        if key in SCHEMA_MAPS and isinstance(value, dict):
            value = {name: map_schema(inner, change) for name, inner in value.items()}
        elif isinstance(value, (dict, list)) and key not in SCHEMA_DATA:
            value = map_schema(value, change)
        made[key] = value
    return change(made)


def fit_parameters(parameters: JSON, rule: re.Pattern[str]) -> tuple[JSON, dict[str, str]]:
    """A tool's parameters for a provider, and replacements for the names that break its rule."""
    schemas: list[JSON] = []
    names: JSON = {}  # a set in order

    def clean(schema: JSON) -> JSON:
        if isinstance(schema.get("encrypted"), bool):  # only in Codex (openai/codex#27331); others refuse it
            del schema["encrypted"]
        if None in schema.values():  # `"required": null` of Codex: strict servers refuse it (cc-switch#7019)
            schema = {key: schema[key] for key in schema
                      if schema[key] is not None or key in ("default", "const")}
        names.update(as_dict(schema.get("properties")))
        schemas.append(schema)
        return schema

    cleaned = map_schema(parameters, clean)
    taken, fitted = set(names), {}
    for name in names:
        if not rule.fullmatch(name):
            safe = UNSAFE.sub("_", name)[:MAX_NAME]
            fitted[name] = fit_name(name) if safe in taken else safe
            taken.add(safe)
    for schema in schemas if fitted else ():
        properties, required, ref = map(schema.get, ("properties", "required", "$ref"))
        if isinstance(properties, dict):
            schema["properties"] = {fitted.get(name, name): inner for name, inner in properties.items()}
        if isinstance(required, list):
            schema["required"] = [fitted.get(str(name), name) for name in required]
        if isinstance(ref, str):
            schema["$ref"] = re.sub("(?<=/properties/)[^/]+", lambda at: fitted.get(at[0], at[0]), ref)
    return cleaned, fitted


# what chat templates leave in a tool's name: `functions.x`, `default_api:x`, `x:0`, `x<|channel|>commentary`
TEMPLATE_REMAINS = re.compile(r"^(functions|default_api)[.:]|(:\d+)?\s*(<\|.*)?$", re.DOTALL)


class ToolMap:
    """The request's tools under the names that providers see."""

    def __init__(self, tools: Sequence[JSON], searches: bool = False, model: str = "") -> None:
        vendor = next(each for each in PARAMETER_NAMES if each in model.lower())
        self.parameter_names = PARAMETER_NAMES[vendor]
        self.searches = searches
        self.functions: list[JSON] = []  # name, description, parameters, strict?
        self.hosted: list[JSON] = []  # web_search tools, for a provider that `searches` itself
        self.dropped: list[str] = []  # the other tools, as "tools:TYPE"
        self.by_upstream_name: dict[str, Tool] = {}
        self.by_name: dict[str, Tool | None] = {}  # also without a namespace, if the name is unique
        self._add(tools, "")
        self.by_name |= self.by_upstream_name

    def resolve(self, name: str) -> Tool:
        """The tool that a model means; a function of that name if none is offered."""
        found = self.by_name.get(name)
        if not found and not name.isidentifier():  # nearly all are; a pattern match for each call is slow
            found = self.by_name.get(TEMPLATE_REMAINS.sub("", name))
        return found or Tool("function_call", name, "")

    def _add(self, tools: Sequence[JSON], namespace: str) -> None:
        for tool in tools:
            kind = tool["type"]
            if kind == "namespace":
                self._add(tool["tools"], tool["name"])
            elif kind == "function":
                self._add_function("function_call", tool["name"], namespace, tool)
            elif kind == "custom":
                freeform = {"description": freeform_description(tool), "parameters": FREEFORM_PARAMETERS}
                self._add_function("custom_tool_call", tool["name"], namespace, freeform)
            elif kind == "tool_search" and tool.get("execution") == "client":
                self._add_function("tool_search_call", kind, "", tool)
            elif kind == "local_shell":
                self._add_function("local_shell_call", kind, "", LOCAL_SHELL)
            elif kind.startswith("web_search") and self.searches:  # also _preview and dated names
                self.hosted.append(tool)
            else:
                self.dropped.append(f"tools:{kind}")

    def _add_function(self, kind: ItemType, name: str, namespace: str, given: JSON) -> None:
        upstream_name = upstream_tool_name(name, namespace)
        parameters = given.get("parameters") or {"type": "object", "properties": {}}
        parameters, fitted = fit_parameters(parameters, self.parameter_names)
        tool = Tool(kind, name, namespace, fitted)
        first = self.by_upstream_name.setdefault(upstream_name, tool)
        if first is not tool:  # the first of two equal names wins
            if first[:3] != tool[:3]:
                self.dropped.append(f"tools:{upstream_name}")
            return
        self.by_name[name] = None if name in self.by_name else tool
        description, strict = given.get("description") or "", given.get("strict")
        function = {"name": upstream_name, "description": description, "parameters": parameters}
        self.functions.append(function if strict is None else {**function, "strict": strict})


def split_trailing_surrogate(text: str) -> tuple[str, str]:
    """The text, and half a surrogate pair at its end, whose other half comes next."""
    half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
    return fix_surrogates(text.removesuffix(half)), half


def fix_surrogates(text: str) -> str:
    """Joins surrogate pairs and replaces lone halves."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def unwrap(raw: str) -> str | None:
    """The freeform text in a call's arguments: `input`, else the only string member, else the raw text;
    without a patch's markdown fence."""
    try:
        value = json.loads(raw, strict=False)
    except (ValueError, RecursionError):
        if raw.lstrip().startswith("{"):  # a truncated object is no input
            return None
        value = raw
    members = value if isinstance(value, dict) else {"input": value}
    texts = {name: text for name, text in members.items() if isinstance(text, str)}
    text = texts.get("input", raw if members else "")
    if len(texts) == 1:
        [text] = texts.values()
    text = fix_surrogates(text)
    fenced = re.fullmatch(r"\s*```[a-z]*\n(\*\*\* Begin Patch\n.*?)\n?```\s*", text, re.DOTALL)
    return fenced[1] if fenced else text


JSON_STRING = re.compile(r'"(?:[^"\\]++|\\[^\x00-\x1f])*+"?')
CONTROL = re.compile(r"[\x00-\x1f]")
CONTROL_ESCAPES = {code: json_string(chr(code))[1:-1] for code in range(32)}


# --- 5.4 history for providers that know only functions ---

class Turn(NamedTuple):
    """Consecutive plain items of one role, and the outputs of its calls."""
    role: str  # "assistant", "user", "system" or "developer"
    items: list[JSON]  # messages, and reasoning before the calls
    calls: list[JSON]  # calls, and reasoning between them
    results: list[JSON]  # an output for each call, in the order of the calls


class History(NamedTuple):
    """A conversation in turns of plain items, which have four types:

    - message {role, content: [part], generated?: the content is an image that the model made}
    - reasoning {sealed_replay}
    - function_call {call_id, name, arguments}: an upstream name, arguments that are a JSON object
    - function_call_output {call_id, output: str | [part]}
    """
    system: list[str]  # the leading instructions
    turns: list[Turn]

    @property
    def items(self) -> list[JSON]:
        return [item for turn in self.turns for item in (*turn.items, *turn.calls, *turn.results)]


NO_OUTPUT = "no output was recorded for this call"


def normalize_history(instructions: str, items: Sequence[JSON], tool_map: ToolMap, dropped: list[str],
                      memo: dict[Any, Any]) -> History:
    """Instructions and unsealed items as a History; names lost content in `dropped`. `memo` keeps the plain
    form of each item object."""
    system = [instructions] if instructions else []
    plain: list[JSON] = []
    for item in items:
        known = memo.get(id(item))
        if known is None or known[:2] != (item, tool_map):
            names: list[str] = []
            known = item, tool_map, normalize_item(item, tool_map, names), names
            if "sealed_replay" not in item:  # a different object in each request
                memo[id(item)] = known
        *_, made, names = known
        dropped += names
        if made is None:
            if item["type"] != "additional_tools" and not is_summary_only(item):
                dropped.append(f"input:{item['type']}")
        elif made.get("role") in ("system", "developer") and not plain:
            system.append(text_of(made["content"], "\n\n"))
        else:
            plain.append(made)
    return History(system, gather_turns(plain))


def is_summary_only(item: JSON) -> bool:
    """Reasoning of which the provider needs nothing back."""
    return item["type"] == "reasoning" and not (item.get("encrypted_content") or item.get("content"))


def gather_turns(items: Sequence[JSON]) -> list[Turn]:
    """Groups plain items into turns. Each call gets an output and a unique id: local servers begin at call_0
    in every turn. Later items change no id, so a growing history keeps its bytes."""
    turns: list[Turn] = []
    role = ""  # of the current turn
    numbers = collections.Counter[str]()  # call id -> number of renamed duplicates
    # call id -> results that still have no output
    waiting = collections.defaultdict[str, collections.deque[JSON]](collections.deque)
    for item in items:
        kind, given = item["type"], item.get("call_id", "")
        if kind == "function_call_output":
            if waiting[given]:
                waiting[given].popleft()["output"] = item["output"]
                if turns[-1].calls:
                    role = ""
                continue
            # a made-up call would block the thread (CLIProxyAPI#5375)
            item = user_message(text_block(f"[tool output] {text_of(item['output'])}"))
        speaker = item.get("role", "assistant")
        if speaker != role:
            role = speaker
            turns.append(Turn(role, [], [], []))
        turn = turns[-1]
        if kind == "function_call":
            unique = given
            while not unique or unique in numbers:
                numbers[given] += 1
                unique = f"{given}_{numbers[given] + 1}" if given else f"call_{numbers[given]}"
            numbers[unique] = 0
            turn.calls.append({**item, "call_id": unique})
            result = {"type": "function_call_output", "call_id": unique, "output": NO_OUTPUT}
            turn.results.append(result)
            waiting[given].append(result)
        elif kind == "reasoning" and turn.calls:
            turn.calls.append(item)
        else:  # text between a call and its output goes before the call (mlx-openai-server#268)
            turn.items.append(item)
    return turns


CALL_ARGUMENTS = {  # the field of each call type, even if its tool is no longer offered
    "function_call": "arguments", "custom_tool_call": "input", "tool_search_call": "arguments",
    "local_shell_call": "action", "shell_call": "action", "apply_patch_call": "operation",
}
OUTPUT_TYPES = ("function_call_output", "custom_tool_call_output", "tool_search_output",
                "local_shell_call_output", "shell_call_output", "apply_patch_call_output")
# our envelope, OpenAI's encryption, anybody's
ENCRYPTED_TEXT = re.compile(r"pmx1\..*|gAAAA[\w=-]*|[\w+/=-]{100,}", re.ASCII)


def normalize_item(item: JSON, tool_map: ToolMap, dropped: list[str]) -> JSON | None:
    """A plain item; None for an item without such a form."""
    kind, call_id = item["type"], item.get("call_id") or ""
    if kind in ("message", "agent_message"):
        return normalize_message(item, dropped)
    if kind in CALL_ARGUMENTS:
        name, namespace = item.get("name") or kind.removesuffix("_call"), item.get("namespace")
        # the model must not see a misspelt name again
        tool = tool_map.resolve(upstream_tool_name(name, namespace) if namespace else name)
        arguments = rename_keys(call_arguments(item), tool.fitted)
        name = upstream_tool_name(tool.name, tool.namespace)
        return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}
    if kind in OUTPUT_TYPES:
        return {"type": "function_call_output", "call_id": call_id, "output": call_output(item)}
    if kind == "reasoning" and "sealed_replay" in item:
        return item
    if kind == "image_generation_call" and item.get("result"):
        image = {"type": "input_image", "image_url": f"data:image/png;base64,{item['result']}"}
        return {**user_message(image), "generated": True}
    if kind in ("compaction", "compaction_summary", "context_compaction"):
        text = text_of(item.get("content") or item.get("summary"))
        return user_message(text_block(text)) if text else None
    return None


def normalize_message(item: JSON, dropped: list[str]) -> JSON | None:
    role, content = item.get("role") or "user", item.get("content")
    given = [text_block(content)] if isinstance(content, str) else only_dicts(content)
    parts = []
    for part in given:
        encrypted = str(part.get("encrypted_content") or "")  # of OpenAI's messages between agents
        if ENCRYPTED_TEXT.fullmatch(encrypted):
            dropped.append("content:encrypted_content")
        elif encrypted:
            parts.append(text_block(encrypted))
        else:
            parts.append({"type": "unknown", **part})
    if not parts and item["type"] == "agent_message":
        return None
    return {"type": "message", "role": role, "content": parts}


def text_block(text: str) -> JSON:
    return {"type": "text", "text": text}


def user_message(part: JSON) -> JSON:
    return {"type": "message", "role": "user", "content": [part]}


def call_arguments(item: JSON) -> str:
    """A call's arguments as a JSON object: some servers refuse a model's mistake with a 400."""
    name = CALL_ARGUMENTS[item["type"]]
    given: Any = item.get(name)
    if name == "input":
        return dumps({"input": given})
    given = given or {}
    if name == "action":
        return dumps({key: value for key, value in given.items() if key != "type" and value})
    text = given if given and item["type"] == "function_call" else dumps(given)
    with contextlib.suppress(ValueError):
        if isinstance(load_json(text.encode()), dict):
            return text
    return dumps({"_raw": text})


def call_output(item: JSON) -> Any:
    kind, output = item["type"], item.get("output")
    if kind == "tool_search_output":
        names = ", ".join(tool_names(item["tools"]))
        output = f"Found: {names or 'no tools'}"
    elif kind == "shell_call_output":
        output = dumps(output or [])
    elif kind == "apply_patch_call_output":
        output = output or item.get("status")
    return output or ""


class Attachment(NamedTuple):
    """An image or a file: an address or bytes."""
    mime: str  # from the bytes, as declared, or from the extension; "": unknown
    name: str
    detail: Any  # of an image, as the client gave it
    url: str = ""
    data: str = ""  # clean base64
    text: str | None = None  # of a text file


MAGIC = {
    "image/png": rb"\x89PNG\r\n\x1a\n", "image/jpeg": rb"\xff\xd8\xff", "image/gif": rb"GIF8[79]a",
    "image/webp": rb"(?s:RIFF....WEBP)", "image/heic": rb"(?s:....)ftyp(hei[cx]|mif1)",
    "application/pdf": rb"%PDF-",
}
IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")  # known to every provider
TYPE_BY_ENDING = {
    **{name: f"image/{name}" for name in ("png", "jpeg", "gif", "webp", "heic")},
    "jpg": "image/jpeg", "pdf": "application/pdf", "txt": "text/plain", "mp4": "video/mp4",
}


def read_attachment(part: JSON) -> Attachment | None:
    """The image or file in a part. None for a mere id at OpenAI, or invalid base64, which would have every
    later turn refused."""
    source = part.get("file_data") or part.get("image_url") or part.get("file_url")
    if part["type"] not in ("input_image", "input_file") or not isinstance(source, str):
        return None
    is_image, is_url = part["type"] == "input_image", re.match("(https?|gs)://", source)
    name, detail = str(part.get("filename") or ""), part.get("detail")
    path = source.split("?")[0] if is_url else name
    mime = TYPE_BY_ENDING.get(path.rpartition(".")[2].lower(), "")
    if is_url:
        return Attachment(mime or ("image/" if is_image else ""), name, detail, url=source)
    head, comma, encoded = source.rpartition(",")
    # without line ends, in the standard alphabet, with padding
    data = "".join(encoded.split()).rstrip("=").replace("-", "+").replace("_", "/")
    data += "=" * (-len(data) % 4)
    try:
        content = base64.b64decode(data, validate=True)
    except ValueError:
        return None
    if not content or (comma and not head.endswith(";base64")):
        return None
    found = next((known for known, magic in MAGIC.items() if re.match(magic, content)), "")
    declared = head.removeprefix("data:").partition(";")[0].lower().replace("image/jpg", "image/jpeg")
    mime = found or declared or mime
    is_media = found or is_image or re.match("(image|audio|video)/(?!svg)", mime)
    if not is_media and b"\0" not in content:
        with contextlib.suppress(UnicodeDecodeError):
            return Attachment("text/plain", name, detail, data=data, text=content.decode("utf-8-sig"))
    return Attachment(mime, name, detail, data=data)


# --- 5.5 client profiles ---

class ClientProfile(NamedTuple):
    """How a client differs from the standard."""
    incomplete_as_completed: bool = False  # a truncated answer ends as complete, without truncated calls
    refusal_as_text: bool = False  # the client shows only output_text
    # errors that it would retry over HTTP become 200 + response.failed, without an `error` event before it
    errors_as_events: bool = False
    echo_request: bool = True  # every response object repeats tools and instructions
    final_failures: bool = False  # it would repeat for minutes what has been tried here on every target


STANDARD = ClientProfile()
CODEX = ClientProfile(
    incomplete_as_completed=True, refusal_as_text=True, errors_as_events=True, echo_request=False)
CLAUDE_CODE = ClientProfile(refusal_as_text=True, final_failures=True)


def client_profile(originator: str, user_agent: str) -> ClientProfile:
    """Codex names itself in `originator` (codex_exec, codex-tui ...) and in its User-Agent."""
    if user_agent.startswith("claude-cli/"):
        return CLAUDE_CODE
    return CODEX if originator.startswith("codex") or user_agent.startswith("codex") else STANDARD


# --- 5.6 the answer, one per client request ---

DONE_FRAME = b"data: [DONE]\n\n"
FILTERED = "The provider's content filter stopped this answer."
# the fields of a response object that repeat the request, with their defaults
ECHO_DEFAULTS: JSON = {
    **dict.fromkeys(("instructions", "max_output_tokens", "max_tool_calls", "previous_response_id")),
    **dict.fromkeys(("prompt_cache_key", "safety_identifier", "user")),
    **dict.fromkeys(("store", "background"), False),
    **dict.fromkeys(("temperature", "top_p"), 1),
    **dict.fromkeys(("top_logprobs", "presence_penalty", "frequency_penalty"), 0),
    "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tool_choice": "auto",
    "tools": [],
    "truncation": "disabled",
    "metadata": {},
}
FUNCTION_DEFAULTS = {"description": None, "parameters": None, "strict": True}  # required by Open Responses


def echo_fields(request: ResponsesRequest, echo_request: bool) -> JSON:
    fields = {name: request.get(name, default) for name, default in ECHO_DEFAULTS.items()}
    fields["store"] = False  # Pomex keeps nothing
    for name in ("reasoning", "text"):
        given = {key: value for key, value in fields[name].items() if value is not None}
        fields[name] = {**ECHO_DEFAULTS[name], **given}
    if fields["service_tier"] == "auto":
        fields["service_tier"] = "default"
    if not echo_request:
        fields |= {"instructions": None, "tools": []}
    fields["tools"] = [{**tool, **FUNCTION_DEFAULTS, **tool} if tool.get("type") == "function" else tool
                       for tool in fields["tools"]]
    return fields


@dataclass(eq=False)
class ClientAnswer:
    """The state that the attempts at one answer share, and the frames of its stream in the client's API. The
    client sees the output of only one attempt: no frame is asked for before its output has started."""
    request: ResponsesRequest
    id: str
    created_s: int
    profile: ClientProfile
    # set later, if at all
    started = False
    max_chars = 32 << 20  # of one attempt's output
    max_items = 4096
    estimated_input = 0  # tokens
    secrets = re.compile(r"(?!)")  # a call id must not match it

    def start(self, attempt: Attempt | None = None) -> bytes:
        """The frames that open the stream, once; without an attempt, those that need none."""
        return b""

    def heartbeat(self) -> bytes:
        return b""

    # what an Assembler reports: an item begins, a part of it begins, grows and ends, the item ends

    def begin_item(self, item: Item) -> bytes:
        return b""

    def begin_part(self, item: Item, shape: PartShape) -> bytes:
        return b""

    def delta(self, item: Item, text: str) -> bytes:
        """More text of the open part, or of a call."""
        return f"{item.delta_head}{json_string(text)}{item.delta_tail}".encode()

    def deltas(self, item: Item, texts: list[str]) -> bytes:
        between = item.delta_tail + item.delta_head
        return f"{item.delta_head}{between.join(map(json_string, texts))}{item.delta_tail}".encode()

    def annotate(self, item: Item, annotation: JSON) -> bytes:
        """A source of the open text, now the last of `item.annotations`."""
        return b""

    def end_part(self, item: Item, shape: PartShape, text: str, part: str) -> bytes:
        """`text` and the whole `part` as JSON text."""
        return b""

    def end_item(self, item: Item, rest: str, arguments: str, json: str) -> bytes:
        """`rest`: what no delta has brought of a call's `arguments`; `json`: the whole item."""
        return b""

    def whole_item(self, index: int, json: str) -> bytes:
        """An item that begins and ends at once, of a type that only Responses has."""
        return b""

    def terminal(self, attempt: Attempt, now_s: int) -> bytes:
        """The frames that end the stream, after the attempt has ended."""
        raise NotImplementedError

    def body(self, attempt: Attempt, now_s: int) -> str:
        """The whole answer as JSON text, for a client that does not stream."""
        raise NotImplementedError


class ResponsesAnswer(ClientAnswer):
    """Events of the Responses API, numbered."""
    sequence = 0  # of the next event

    @functools.cached_property
    def echo_json(self) -> str:
        """The echo without its opening brace, encoded once: 30 KB of tools in up to three events."""
        return dumps(echo_fields(self.request, self.profile.echo_request))[1:]

    def response(self, status: str, output: str = "[]", **fields: Any) -> str:
        """The response object as JSON text, like `output`."""
        head = {
            "id": self.id, "object": "response", "created_at": self.created_s, "status": status,
            "model": self.request.model,
            **dict.fromkeys(("completed_at", "error", "incomplete_details", "usage")), **fields}
        return f'{dumps(head)[:-1]},"output":{output},{self.echo_json}'

    def frame(self, kind: str, fields: str) -> bytes:
        """One SSE frame; `fields` is JSON text without its braces."""
        number = self.sequence
        self.sequence += 1
        return f'event: {kind}\ndata: {{"type":"{kind}","sequence_number":{number},{fields}}}\n\n'.encode()

    def item_frame(self, step: str, index: int, json: str) -> bytes:
        return self.frame(f"response.output_item.{step}", f'"output_index":{index},"item":{json}')

    def start(self, attempt: Attempt | None = None) -> bytes:
        if self.started:
            return b""
        self.started = True
        return self.frame("response.created", f'"response":{self.response("in_progress")}') + self.heartbeat()

    def heartbeat(self) -> bytes:
        """A data event: comments do not reset Codex's idle timer."""
        return self.frame("response.in_progress", f'"response":{self.response("in_progress")}')

    def begin_item(self, item: Item) -> bytes:
        item.location = f'"item_id":{json_string(item.id)},"output_index":{item.index}'
        if item.kind in CALL_FIELD:
            item.delta_head = f'{item.location},"delta":'
            item.delta_event = f"response.{item.kind}_{CALL_FIELD[item.kind]}.delta"
        frames = self.item_frame("added", item.index, item.to_json("in_progress"))
        for step in HOSTED_STEPS.get(item.kind, ()):
            frames += self.frame(f"response.{item.kind}.{step}", item.location)
        return frames

    def begin_part(self, item: Item, shape: PartShape) -> bytes:
        number = len(item.parts[shape.container])
        item.part_location = f'{item.location},"{shape.container}_index":{number}'
        item.delta_event = f"{shape.delta}.delta"
        item.delta_head = f'{item.part_location}{shape.more},"delta":'
        return self.frame(f"{shape.event}.added", f'{item.part_location},"part":{item.part_json(shape)}')

    def delta(self, item: Item, text: str) -> bytes:
        return self.frame(item.delta_event, item.delta_head + json_string(text))

    def deltas(self, item: Item, texts: list[str]) -> bytes:
        before = f'event: {item.delta_event}\ndata: {{"type":"{item.delta_event}","sequence_number":'
        numbered = enumerate(map(json_string, texts), self.sequence)
        self.sequence += len(texts)
        frames = [f"{before}{number},{item.delta_head}{text}}}\n\n" for number, text in numbered]
        return "".join(frames).encode()

    def annotate(self, item: Item, annotation: JSON) -> bytes:
        number = len(item.annotations) - 1
        fields = f'{item.part_location},"annotation_index":{number},"annotation":{item.annotations[-1]}'
        return self.frame("response.output_text.annotation.added", fields)

    def end_part(self, item: Item, shape: PartShape, text: str, part: str) -> bytes:
        return (self.frame(f"{shape.delta}.done", f'{item.part_location},"{shape.text}":{text}{shape.more}')
                + self.frame(f"{shape.event}.done", f'{item.part_location},"part":{part}'))

    def end_item(self, item: Item, rest: str, arguments: str, json: str) -> bytes:
        frames = self.delta(item, rest) if rest else b""
        if item.kind in CALL_FIELD:
            name = CALL_FIELD[item.kind]
            more = f',"name":{json_string(item.tool.name)}' if item.tool and name == "arguments" else ""
            fields = f'{item.location},"{name}":{json_string(arguments)}{more}'
            frames += self.frame(f"response.{item.kind}_{name}.done", fields)
        if item.kind in HOSTED_STEPS:
            frames += self.frame(f"response.{item.kind}.completed", item.location)
        return frames + self.item_frame("done", item.index, json)

    def whole_item(self, index: int, json: str) -> bytes:
        return self.item_frame("added", index, json) + self.item_frame("done", index, json)

    def terminal(self, attempt: Attempt, now_s: int) -> bytes:
        frames, error, kind = self.start(attempt), attempt.error, attempt.status
        if error and not self.profile.errors_as_events:
            frames += self.frame("error", f'"error":{dumps(error.body()["error"])}')
        if kind == "incomplete" and self.profile.incomplete_as_completed:
            kind = "completed"
        return frames + self.frame(f"response.{kind}", f'"response":{attempt.body(now_s)}') + DONE_FRAME

    def body(self, attempt: Attempt, now_s: int) -> str:
        error, usage, status = attempt.error, attempt.usage, attempt.status
        assert usage is not None
        return self.response(
            status, attempt.output(),
            completed_at=now_s if status == "completed" else None,
            error={"code": error.code, "message": str(error)} if error else None,
            incomplete_details={"reason": attempt.incomplete_reason} if status == "incomplete" else None,
            usage=usage_object(usage))


def usage_object(usage: Usage) -> JSON:
    """All fields, always: Codex fails the turn if one is missing."""
    return {
        "input_tokens": usage.input,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": usage.cache_write},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.input + usage.output,
    }


def usage_from(
        given: Any, answer: JSON, asked_12h: bool = False, reasoning_within: bool = True) -> Usage | None:
    """Reads `given`, the usage object of `answer`, in the fields of Responses or Chat Completions; None if it
    has neither. `asked_12h`: the lifetime of cache writes where the answer names none."""
    given = as_dict(given)
    totals = map(given.get, ("input_tokens", "prompt_tokens", "output_tokens", "completion_tokens"))
    if not {int, float} & set(map(type, totals)):
        return None
    inputs = as_dict(given.get("prompt_tokens_details")) | as_dict(given.get("input_tokens_details"))
    outputs = as_dict(given.get("completion_tokens_details")) | as_dict(given.get("output_tokens_details"))
    input_tokens = count(given, "input_tokens", "prompt_tokens")
    output_tokens = count(given, "output_tokens", "completion_tokens")
    reasoning = count(outputs, "reasoning_tokens") or count(given, "reasoning_tokens")
    # xAI, also behind Azure, adds reasoning only to the total; Vercel (Gemini) not even to that
    is_apart = count(given, "total_tokens") == input_tokens + output_tokens + reasoning
    if is_apart or (reasoning > output_tokens and not reasoning_within):
        output_tokens += reasoning
    # DeepSeek and Moonshot use the second form
    cached = count(inputs, "cached_tokens") or count(given, "prompt_cache_hit_tokens", "cached_tokens")
    written = count(inputs, "cache_write_tokens")
    split = inputs.get("cache_write_tokens_details") or {"ttl_12h_tokens": written if asked_12h else 0}
    written_12h = count(split, "ttl_12h_tokens")
    return Usage(input_tokens, cached, written, output_tokens, reasoning, cache_write_1h=written_12h,
                 **billing_facts({**answer, **given}))


def merge_counts(held: JSON, given: Any) -> JSON:
    """Updates counts with those of a later usage; omitted and null fields stay."""
    for name, value in as_dict(given).items():
        if isinstance(value, dict):
            held[name] = merge_counts(as_dict(held.get(name)), value)
        elif value is not None:
            held[name] = value
    return held


class Attempt(Sink):
    """One target's attempt at the answer. Subclasses turn an upstream stream into frames; this class ends it.

    After any number of `feed`s comes one `finish`: `status`, `usage` and `error` hold the outcome, and
    `terminal()` makes the last frames. The client gets nothing of `out` before `output_started`.
    """
    output_started = False  # too late for another target
    upstream_done = False  # no more data will come
    ended = False
    usage: Usage | None = None
    stop: Stop | None = None
    error: GatewayError | None = None
    status = "in_progress"
    terminal_by = "gateway"  # "": the answer was an error's status, not a stream
    output_chars = 0  # for estimates
    unbilled = False  # the provider refused the request and will not bill it
    estimated_input = 0  # tokens; 0 if no provider was called
    opening = b""  # the upstream's own first event, where it passes

    def __init__(self, answer: ClientAnswer) -> None:
        self.answer = answer
        self.out: list[bytes] = []
        self.items: dict[int, str] = {}  # finished items as JSON text, by output_index
        self.output_limit = answer.max_chars  # of output_chars; other held data lowers it
        self.items_left = answer.max_items

    @property
    def incomplete_reason(self) -> str:
        return self.stop.incomplete_reason if self.stop else ""

    def take_output(self) -> bytes:
        """The frames since the last call."""
        block = b"".join(self.out)
        self.out.clear()
        return block

    def emit(self, frames: Callable[..., bytes], *arguments: Any) -> None:
        """Adds frames of the answer, if it is streamed."""
        if self.answer.request.stream:
            self.out += self.answer.start(self), frames(*arguments)

    def finish(self, error: GatewayError | None = None, notify_client: bool = True) -> None:
        """Ends the attempt, which fails without evidence that the model had finished. `error`: of a broken
        connection. For a client that left, no item is closed: 20 ms for a long answer."""
        if self.ended:
            return
        self.ended = True
        self.terminal_by = "upstream" if self.upstream_done else "gateway"
        usage, reported = self.usage, self.error
        unbilled = self.unbilled or (reported is not None and not self.output_chars)
        self.error = reported or self.find_error(error)
        if usage == Usage() and self.error is reported:  # the answer is not empty
            usage = None
        if notify_client:
            self.close_open_items()
        self.status = "incomplete" if self.incomplete_reason else "completed"
        if self.error is not None:
            self.status = "failed"
        counts = usage or Usage(0 if unbilled else self.estimated_input, estimated=not unbilled)
        if usage is None or usage.estimated:  # Anthropic counts input first, output at the end
            counts = dataclasses.replace(counts, output=max(counts.output, -(-self.output_chars // 4)))
        self.usage = checked_usage(counts)

    def find_error(self, error: GatewayError | None) -> GatewayError | None:
        """The error of an answer without evidence of its end, or without output."""
        if self.stop is None:
            return error or UpstreamError("The provider's stream ended before the model had finished.")
        usage = self.usage
        if usage is None or usage.estimated or usage.output or self.output_started or self.incomplete_reason:
            return None
        return UpstreamError("The provider's answer is empty, and its usage counts no output.")

    def check_limits(self, chars: int = 0, items: int = 0) -> None:
        """Counts held data other than the output itself. Fails an answer that is too long."""
        self.output_limit -= chars
        self.items_left -= items
        if self.output_chars > self.output_limit or self.items_left < 0:
            self.stop = None
            self.error = GatewayError(
                f"The provider's answer is longer than max_answer_chars = {self.answer.max_chars} and "
                f"max_answer_items = {self.answer.max_items} in [server] allow.",
                status=502, headers=(("x-should-retry", "false"),))
            raise self.error

    # Sink calls that are no output

    def set_usage(self, usage: Usage) -> None:
        if usage.input or usage.output or not self.usage or self.usage.estimated:
            self.usage = usage

    def set_stop(self, stop: Stop) -> None:
        self.upstream_done |= stop.final
        if self.stop is None or stop.incomplete_reason:
            self.stop = stop

    def fail(self, error: GatewayError) -> None:
        self.error = error
        self.upstream_done = True

    def close_open_items(self) -> None:
        """Finishes or abandons the open items, before the status is decided."""

    def has_no_message(self) -> bool:
        return not any(json.loads(item)["type"] == "message" for item in self.items.values())

    def output(self) -> str:
        return "[" + ",".join(self.items[index] for index in sorted(self.items)) + "]"

    def body(self, now_s: int) -> str:
        """The whole answer as JSON text, after finish()."""
        return self.answer.body(self, now_s)

    def terminal(self, now_s: int) -> bytes:
        """The last frames, after finish()."""
        return self.take_output() + self.answer.terminal(self, now_s)


# --- 5.7 the assembler: from decoder calls to events ---

class PartShape(NamedTuple):
    """The wire format of one channel of text."""
    type: str
    delta: str  # family of the text's .delta and .done
    text: str = "text"  # the field that holds the text
    more: str = ""  # further fields of these events, required by the SDK's types
    event: str = "response.content_part"  # family of the part's own .added and .done
    container: str = "content"  # the item's list of such parts; a part's number is its `{container}_index`


PARTS = {
    "text": PartShape("output_text", "response.output_text", more=',"logprobs":[]'),
    "refusal": PartShape("refusal", "response.refusal", "refusal"),
    "summary": PartShape("summary_text", "response.reasoning_summary_text",
                         event="response.reasoning_summary_part", container="summary"),
    "raw": PartShape("reasoning_text", "response.reasoning_text"),
}
ID_PREFIX = {
    "message": "msg_", "reasoning": "rs_", "function_call": "fc_", "custom_tool_call": "ctc_",
    "tool_search_call": "tsc_", "local_shell_call": "lsh_", "web_search_call": "ws_",
    "image_generation_call": "ig_",
}
HOSTED_STEPS = {
    "web_search_call": ("in_progress", "searching"), "image_generation_call": ("in_progress", "generating")}
CALL_FIELD = {"function_call": "arguments", "custom_tool_call": "input"}  # their text


@dataclass
class Item:
    """An output item that is being streamed, with at most one open part."""
    kind: ItemType
    fields: JSON = field(default_factory=dict)  # that no part fills, e.g. {"phase": "commentary"}
    # of a call
    call_id: str = ""
    tool: Tool | None = None
    arguments: list[str] = field(default_factory=list)  # or input, in pieces
    held_back: bool = False  # sent as a whole: controls are escaped, parameters renamed, input unwrapped
    # since output_item.added
    id = ""
    index = -1
    location = ""  # `"item_id":..,"output_index":..`
    parts: dict[str, list[str]] = field(default_factory=dict)  # finished ones as JSON text, by container
    # of the open part, or of a call
    shape: PartShape | None = None
    upstream_part = 0  # the provider's number for it
    delta_event = ""
    delta_head = ""  # a delta's fields before its text: `"item_id":..,"output_index":..,"delta":`
    delta_tail = ""  # what follows it
    part_location = ""  # `"item_id":..,"output_index":..,"content_index":..`
    annotations: list[str] = field(default_factory=list)  # as JSON text
    text: list[str] = field(default_factory=list)  # also white space before a part
    pending_surrogate: str = ""  # the first half of a pair
    done = False  # the provider has ended the item

    def part_json(self, shape: PartShape, text: str = '""') -> str:
        """The part as JSON text, like `text`: a long one is encoded only once."""
        more = ""
        if shape.type == "output_text":
            more = f',"annotations":[{",".join(self.annotations)}]{shape.more}'
        return f'{{"type":"{shape.type}","{shape.text}":{text}{more}}}'

    def complete_arguments(self) -> str | None:
        """A call's arguments or input; None if they are truncated."""
        raw = "".join(self.arguments)
        if self.kind == "custom_tool_call":
            return unwrap(raw) if self.held_back else raw
        if self.tool is None:
            return raw
        if self.held_back:  # models write raw line ends in strings, which strict readers refuse
            raw = JSON_STRING.sub(lambda string: string[0].translate(CONTROL_ESCAPES), raw)
        if self.done and not raw.strip():  # a tool without arguments
            raw += "{}"
        if parse_object(raw) is None:
            return None
        try:
            return rename_keys(raw, {fit: own for own, fit in self.tool.fitted.items()})
        except RecursionError:
            return None

    def to_json(self, status: str, arguments: str = "") -> str:
        fields: JSON = {"id": self.id, "type": self.kind, "status": status}
        if self.tool is not None:
            fields |= {"call_id": self.call_id, **call_fields(self.tool, arguments)}
        lists = [f',"{name}":[{",".join(parts)}]' for name, parts in self.parts.items()]
        return dumps({**fields, **self.fields})[:-1] + "".join(lists) + "}"


class Assembler(Attempt):
    """The Sink that makes Responses events: numbered, with each item complete, in order and once."""

    def __init__(self, answer: ClientAnswer, seal: Callable[[JSON], str]) -> None:
        super().__init__(answer)
        self.estimated_input = answer.estimated_input
        self.seal = seal
        self.open_items: dict[Any, Item] = {}  # by key
        self.next_index = 0
        self.shapes = dict(PARTS)
        if answer.profile.refusal_as_text:
            self.shapes["refusal"] = PARTS["text"]

    # the calls of a decoder

    def text(self, text: str, channel: PartType = "text") -> None:
        kind: ItemType = "reasoning" if channel == "summary" else "message"
        item = self.open_items.get(None)
        if item is None or item.kind != kind:
            self.open(None, kind)
        self.add(None, text, channel)

    def open(self, key: Any, kind: ItemType, **fields: Any) -> None:
        item = Item(kind, fields)
        if kind == "message":
            item.fields = {"role": "assistant", **fields}
            item.parts["content"] = []
        elif kind == "reasoning":
            item.parts["summary"] = []
        self.begin(key, item)

    def call(self, key: Any, call_id: str, tool: Tool) -> None:
        if self.answer.secrets.search(call_id):
            call_id = self.new_item_id("call_")
        held_back = bool(tool.fitted) or tool.kind not in CALL_FIELD
        self.begin(key, Item(tool.kind, {}, call_id, tool, held_back=held_back))

    def add(self, key: Any, text: str, channel: PartType, part: int = 0) -> None:
        item = self.open_items.get(key)
        if item is None:
            raise UpstreamError(f"The provider sent a piece of item {key}, which is not open.")
        if item.pending_surrogate or not text.isascii():
            text, item.pending_surrogate = split_trailing_surrogate(item.pending_surrogate + text)
        if not text:
            return
        if not item.id:
            item.text.append(text)
            if not text.strip():  # claude-opus-4-6 opens with "\n\n" before it thinks
                self.check_limits(len(text))
                return
            text = "".join(item.text)
            self.item_added(item)
        self.output_chars += len(text)
        if self.output_chars > self.output_limit:
            self.check_limits()
        shape = self.shapes.get(channel)
        if shape is None:  # a call
            item.arguments.append(text)
            if channel == "arguments" and (item.kind == "custom_tool_call" or CONTROL.search(text)):
                item.held_back = True
            if item.held_back:
                return
        elif item.shape is not shape or item.upstream_part < part:
            self.open_part(item, shape, part)
        self.text_delta(item, text)

    def add_all(self, key: Any, texts: list[str], channel: PartType) -> None:
        item = self.open_items[key]
        is_open = item.shape and item.shape is self.shapes.get(channel) and not item.pending_surrogate
        if len(texts) == 1 or not is_open:
            for text in texts:
                self.add(key, text, channel)
            return
        self.output_chars += sum(map(len, texts))
        self.check_limits()
        texts = list(filter(None, texts))
        item.text += texts
        if self.answer.request.stream:
            self.out.append(self.answer.deltas(item, texts))

    def annotate(self, annotation: JSON, key: Any = None) -> None:
        item = self.open_items.get(key)
        if item is None or item.shape is not PARTS["text"]:
            return
        text = dumps(annotation)
        self.check_limits(len(text))
        item.annotations.append(text)
        self.emit(self.answer.annotate, item, annotation)

    def done(self, key: Any = None, **fields: Any) -> None:
        item = self.open_items.get(key)
        if item is None or not item.id:  # nothing but white space, or less
            self.open_items.pop(key, None)
            return
        item.done = True
        if replay := fields.pop("sealed_replay", None):
            fields["encrypted_content"] = self.seal(replay)
        item.fields |= fields
        self.finish_item(key, item)

    def item(self, item: JSON) -> None:
        self.done()
        if not item.get("id"):
            item = {**item, "id": self.new_item_id(ID_PREFIX.get(item.get("type", ""), "item_"))}
        index = self.next_index
        self.next_index += 1
        self.output_started = True
        text = dumps(item)
        if parse_object(text) is None:
            raise UpstreamError("The provider sent an item with a number that is not JSON.")
        self.check_limits(len(text), 1)
        self.emit(self.answer.whole_item, index, text)
        self.items[index] = text

    # items and their parts

    def begin(self, key: Any, item: Item) -> None:
        self.done()
        self.open_items[key] = item
        self.check_limits(items=1)
        if item.kind != "message":  # a message is added with its first visible character
            self.item_added(item)

    def new_item_id(self, prefix: str) -> str:
        return f"{prefix}{self.answer.id.removeprefix('resp_')}_{self.next_index}"

    def item_added(self, item: Item) -> None:
        item.index, item.id = self.next_index, self.new_item_id(ID_PREFIX[item.kind])
        self.next_index += 1
        self.output_started = True
        self.emit(self.answer.begin_item, item)

    def open_part(self, item: Item, shape: PartShape, upstream_part: int = 0) -> None:
        self.close_part(item)
        item.parts.setdefault(shape.container, [])  # reasoning may have content, too
        item.shape, item.upstream_part = shape, upstream_part
        item.text, item.annotations = [], []
        self.emit(self.answer.begin_part, item, shape)

    def close_part(self, item: Item) -> None:
        shape = item.shape
        if shape is None:
            return
        text = json_string("".join(item.text))
        part = item.part_json(shape, text)
        self.emit(self.answer.end_part, item, shape, text, part)
        item.parts[shape.container].append(part)
        item.shape = None

    def text_delta(self, item: Item, text: str) -> None:
        if not text:
            return
        item.text.append(text)
        if self.answer.request.stream:
            self.out.append(self.answer.delta(item, text))

    def finish_item(self, key: Any, item: Item, status: str = "completed") -> None:
        """Finishes an item, but leaves a call with truncated arguments open."""
        arguments = item.complete_arguments() if status == "completed" else "".join(item.text)
        if arguments is None:
            return
        del self.open_items[key]
        self.close_part(item)
        rest = ""
        if item.tool and item.kind in CALL_FIELD:
            rest = arguments.removeprefix("".join(item.text))  # e.g. input without its fence
        text = item.to_json(status, arguments)
        self.emit(self.answer.end_item, item, rest, arguments, text)
        self.items[item.index] = text

    def close_open_items(self) -> None:
        self.open_items = {key: item for key, item in self.open_items.items() if item.id}
        if self.error is None:
            self.finish_complete_items()
        profile = self.answer.profile
        if self.error is not None and (profile.errors_as_events or self.output_chars > self.output_limit):
            return  # Codex retries and would keep half a message in its history
        status = "completed" if profile.incomplete_as_completed else "incomplete"
        for key, item in list(self.open_items.items()):
            # truncated calls are only for clients that see their status
            if item.tool is None or (self.error is None and status == "incomplete"):
                self.finish_item(key, item, status)

    def finish_complete_items(self) -> None:
        truncated = self.incomplete_reason
        for key, item in list(self.open_items.items()):
            if not truncated or parse_object("".join(item.arguments)) is not None:
                self.finish_item(key, item)
        if truncated or not self.open_items:
            self.add_placeholder_message()
            return
        names = ", ".join(item.tool.name for item in self.open_items.values() if item.tool)
        self.error = UpstreamError(
            f"The provider ended, but the arguments of its call are not whole JSON: {names}.")

    def add_placeholder_message(self) -> None:
        """Adds an empty message to an empty answer, or why a content filter emptied it."""
        stop = self.stop or Stop()
        filtered = stop.incomplete_reason == "content_filter"
        if filtered:
            is_open = any(item.kind == "message" for item in self.open_items.values())
            is_answered = is_open or not self.has_no_message()
        else:
            is_answered = bool(self.items or stop.incomplete_reason)
        if is_answered:
            return
        self.open(None, "message")
        item = self.open_items[None]
        self.item_added(item)
        self.open_part(item, self.shapes["refusal" if filtered else "text"])
        if filtered:
            self.text_delta(item, stop.explanation or FILTERED)
        self.done()


def call_fields(tool: Tool, arguments: str) -> JSON:
    if tool.kind == "tool_search_call":
        return {"execution": "client", "arguments": parse_object(arguments) or {}}
    if tool.kind == "local_shell_call":
        return {"action": {"command": [], **(parse_object(arguments) or {}), "type": "exec", "env": {}}}
    fields = {"name": tool.name, CALL_FIELD[tool.kind]: arguments}
    return {**fields, "namespace": tool.namespace} if tool.namespace else fields


# --- 5.8 the items of a Responses upstream ---

# type of a part, or of .delta and .done events -> channel, kind of item, field of the whole text
TEXTS: dict[str, tuple[PartType, str, str]] = {
    "output_text": ("text", "message", "text"),
    "refusal": ("refusal", "message", "refusal"),
    "summary_text": ("summary", "reasoning", "text"),
    "reasoning_summary_text": ("summary", "reasoning", "text"),
    "reasoning_text": ("raw", "reasoning", "text"),
    "reasoning": ("raw", "reasoning", "text"),  # of Open Responses
    "function_call_arguments": ("arguments", "call", "arguments"),
    "custom_tool_call_input": ("input", "call", "input"),
}
TEXT_KINDS = ("message", "reasoning", "call")


@dataclass(slots=True, eq=False)
class UpstreamText:
    """One text of an item: a part, or a call's arguments."""
    channel: PartType
    pieces: list[str] = field(default_factory=list)
    index: int = 0
    sent: bool = False  # the sink has everything so far
    done: bool = False
    annotations: list[JSON] = field(default_factory=list)  # of a snapshot's text

    def so_far(self) -> str:
        self.pieces[:] = ["".join(self.pieces)]
        return self.pieces[0]


@dataclass(slots=True, eq=False)
class UpstreamItem:
    """The current state of an item."""
    kind: Any  # "message", "reasoning", "call", or the type of another item
    item: JSON  # its newest snapshot
    upstream_index: Any
    index: int = -1  # ours
    shown: bool = False  # the sink knows of it
    done: bool = False  # the server called it done
    closed: bool = False  # no further event is expected for it
    annotation_count: int = 0  # from annotation events
    texts: list[UpstreamText] = field(default_factory=list)
    numbered: dict[Any, UpstreamText] = field(default_factory=dict)

    def text(self, channel: PartType, number: Any, done: bool = False) -> UpstreamText:
        """The text that a piece continues, or that a `done` event, perhaps with another number, completes."""
        text = self.numbered.get((channel, number))
        if text is None and done and self.texts:
            last = self.texts[-1]
            text = last if last.channel == channel and not last.done else None
        if text is None or (text.done and not done):
            text = UpstreamText(channel, index=len(self.texts))
            self.texts.append(text)
        text.done = done
        self.numbered[channel, number] = text
        return text

    def is_other(self, item_id: Any, call_id: Any) -> bool:
        """Does one of these ids differ from the item's own?"""
        own_id, own_call_id = map(self.item.get, ("id", "call_id"))
        return bool(own_id and item_id and own_id != item_id
                    or own_call_id and call_id and own_call_id != call_id)

    def is_followed(self, event: JSON, kind: Any, begins: bool, other: bool) -> bool:
        """Is an event with its index, or of its kind and without an index, about the next item?"""
        item = event.get("item")
        if self.kind != kind:
            return bool(item or self.done or self.kind in TEXT_KINDS)
        without_index = event.get("output_index") is None
        if begins or (self.done and "delta" in event):
            return other or without_index or (begins and self.done)
        if not self.done:
            return other and without_index
        return bool(item) and (other or item_content(item or {}) != item_content(self.item))


def item_kind(item: JSON) -> Any:
    return "call" if item.get("type") in CALL_FIELD else item.get("type")


def item_content(item: JSON) -> str:
    return dumps({name: value for name, value in item.items() if name not in ("id", "call_id", "status")})


def pair(given: list[Any], known: list[Any], *keys: Callable[[Any], Any]) -> dict[Any, Any]:
    """Maps each given item to the first known one with the same key, once. Later keys serve the rest."""
    found: dict[Any, Any] = {}
    for key in keys:
        free = collections.defaultdict[Any, Any](collections.deque)
        for each in known:
            free[key(each)].append(each)
        for new in given:
            if same := free[key(new)]:
                found[new] = same.popleft()
        taken = set(found.values())
        given = [new for new in given if new not in found]
        known = [each for each in known if each not in taken]
        if not given or not known:
            break  # some keys cost as much as their item
    return found


class UpstreamItems(list[UpstreamItem]):
    """The items of a stream, found by their events. Servers give an item a new id in every event (Copilot),
    distinguish items only by id (llama.cpp) or not at all, count from 1, or give all the same index. So any
    key identifies an open item; an event without one is about the newest of its kind. An `added` event, or
    one for a finished item, begins another item if a key differs."""
    open_count = 0

    def __init__(self) -> None:
        # by (kind, id, index), (kind, call_id), (kind, id), index, kind
        self.by_key: dict[Any, UpstreamItem] = {}

    def take(self, event: JSON, kind: Any) -> UpstreamItem:
        """The item of an event. For a text it may be an item of a kind whose texts are not read."""
        index = event.get("output_index")
        known = self.by_key.get((kind, event.get("item_id"), index))
        if known and not known.done and "item" not in event:  # nearly always
            return known
        begins = event["type"] == "response.output_item.added"
        item = event.get("item") or {}
        item_id, call_id = event.get("item_id") or item.get("id"), item.get("call_id")
        for key in ((kind, item_id, index), (kind, call_id), (kind, item_id)):
            known = self.by_key.get(key)
            if known and not known.is_other(None, call_id) and (
                    not (known.done or begins)
                    or index is None or known.upstream_index in (None, index)
                    or (call_id and known.item.get("id") == item_id)):
                break
        else:
            known = self.by_key.get(kind if index is None else index)
            if known and known.is_followed(event, kind, begins, other=known.is_other(item_id, call_id)):
                known = None
        if known is None:
            return self.add(UpstreamItem(kind, {"id": item_id, **item}, index))
        self.add_keys(known, item)
        return known

    def add(self, known: UpstreamItem) -> UpstreamItem:
        known.index = len(self)
        self.append(known)
        self.open_count += 1
        self.by_key[known.upstream_index] = known
        self.by_key[known.kind] = known
        self.add_keys(known, known.item)
        return known

    def add_keys(self, known: UpstreamItem, item: JSON) -> None:
        for name in ("call_id", "id"):
            if item.get(name):
                self.by_key[known.kind, item[name]] = known
        if item.get("id"):
            self.by_key[known.kind, item["id"], known.upstream_index] = known

    def take_final(self, output: list[JSON]) -> list[tuple[UpstreamItem, JSON]]:
        """The items of a final response, each with its record: by id, by content, in order among its kind
        (but no call matches a finished one). New items take the following indices."""
        given = [UpstreamItem(item_kind(item), item, None) for item in output]
        found = pair(
            given, self,
            lambda each: (each.kind, each.item.get("call_id") or each.item.get("id") or each),
            lambda each: item_content(each.item),
            lambda each: (each.kind, each.kind == "call" and each.done and each, each.item.get("name")))
        used = [each.upstream_index for each in self if isinstance(each.upstream_index, int)]
        numbers = itertools.count(max([len(self) - 1, *used]) + 1)
        for new in given:
            if new not in found:
                new.upstream_index = next(numbers)
                self.add(new)
        return [(found.get(new, new), new.item) for new in given]


def as_text(value: Any) -> str:
    """Arguments as text; some servers send an object."""
    if isinstance(value, dict):
        return dumps(value)
    return value if isinstance(value, str) else ""


def item_texts(item: JSON) -> list[UpstreamText]:
    """The texts of a snapshot. `{}` may be a placeholder for later arguments."""
    texts = []
    custom = item.get("input")
    if isinstance(custom, str) and custom.strip():
        texts.append(UpstreamText("input", [custom]))
    arguments = as_text(item.get("arguments") or as_dict(custom))
    if arguments.strip() not in ("", "{}"):
        texts.append(UpstreamText("arguments", [arguments]))
    for part in only_dicts(item.get("summary")) + only_dicts(item.get("content")):
        channel, _, name = TEXTS.get(str(part.get("type")), ("text", "", ""))
        whole = as_text(part.get(name))
        if whole:
            texts.append(UpstreamText(channel, [whole], annotations=part.get("annotations") or []))
    return texts


def fill_item(item: JSON, known: UpstreamItem) -> bool:
    """Fills an item without content from its events. Returns whether that was needed."""
    has_text = bool(item_texts(item))
    if known.kind == "call":
        name = CALL_FIELD[item["type"]]
        if has_text and isinstance(item.get(name), str):
            return False
        whole = "".join(text.so_far() for text in known.texts)
        if name == "input" and known.texts and known.texts[0].channel == "arguments":
            whole = unwrap(whole) or whole
        item[name] = whole or ("{}" if name == "arguments" else "")
        return True
    if known.kind != "message" or has_text:
        return False
    shapes = [(PARTS[text.channel], text.so_far()) for text in known.texts]
    filled = [{"type": shape.type, shape.text: text, "annotations": []} for shape, text in shapes]
    item["content"] = filled or only_dicts(item.get("content"))
    return True


def is_incomplete_call(item: JSON) -> bool:
    """A call that its provider calls incomplete, or whose arguments are not a JSON object."""
    if "call_id" not in item:
        return False
    arguments = as_text(item.get("arguments")).strip() or "{}"
    return item.get("status") == "incomplete" or parse_object(arguments) is None


# --- 5.9 passthrough ---
#
# If the upstream speaks the client's API, its events pass unchanged. A subclass for each wire has its
# patterns, and a method for each type of parsed event: on_response_created for `response.created`.

# possessive: the backtracking state would take 130 bytes for each byte
MODEL_FIELD = re.compile(rb'"model"\s*:\s*("(?:[^"\\]++|\\.)*+")')
SEQUENCE_NUMBER = re.compile(rb'"sequence_number": ?\d+')


class Passthrough(Attempt):
    """An attempt whose events pass unread, except PARSED_EVENTS. Their numbers follow ours."""
    API_EVENTS: bytes  # occurs in every event of the API
    OUTPUT_EVENTS: re.Pattern[bytes]  # output begins: too late for another target
    PARSED_EVENTS: re.Pattern[bytes]
    PLAIN_EVENTS: re.Pattern[bytes]  # a run of numbered events that pass unread, in the usual form
    DEFERRED_EVENTS: tuple[bytes, ...]  # one occurs in each unread event that may be needed later
    whole: Callable[[bytes], None]  # takes a response that came as one JSON object

    def __init__(self, answer: ClientAnswer, seal: Callable[[JSON], str], decoder: Any) -> None:
        super().__init__(answer)
        self.estimated_input = answer.estimated_input
        self.seal = seal
        self.decoder = decoder  # reads the events too, for usage and evidence
        self.decoder.sink = weakref.proxy(self)  # a cycle would keep both until a collection
        self.events = SSEDecoder(MAX_EVENT_BYTES)
        self.withheld: list[bytes] = []  # until output begins; for Chat also the end
        self.deferred: list[bytes] = []
        self.passed_bytes = 0
        self.final_response: JSON = {}  # the upstream's own object

    def feed(self, data: bytes) -> None:
        """Reads bytes of any length. UpstreamError if an event that must be read is not JSON."""
        block, at = self.events.split(data), 0
        while not self.upstream_done and (end := block.find(b"\n\n", at)) >= 0:
            run = self.PLAIN_EVENTS.match(block, at) if self.output_started else None
            if run:  # nearly always
                self.pass_unread(run[0], len(run[0]))
                at = run.end()
                continue
            for event in self.events.parse(block[at:end]):
                self.take_event(event)
            at = end + 2

    def take_event(self, event: Event) -> None:
        name, data = event
        frame = sse_frame("" if name == "message" else name, data)
        if self.upstream_done:
            return
        if self.PARSED_EVENTS.search(frame):
            self.read(data, frame)
        elif self.API_EVENTS in frame:
            self.pass_unread(frame)
        else:  # not an event of the API: an error counts in any form
            self.error = self.error or self.decoder.stray_error(data, name == "error")

    def read(self, data: str, frame: bytes) -> None:
        try:
            self.handle(json.loads(data), frame)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UpstreamError("The provider sent an event that cannot be read.") from None

    def handle(self, event: JSON, frame: bytes) -> None:
        handler = getattr(self, f"on_{event.get('type') or 'error'}".replace(".", "_"), None)
        if handler:
            handler(event, frame)
        else:                                   # the type was a nested one
            self.forward(frame)

    def pass_unread(self, block: bytes, most: int = 1) -> None:
        """Forwards at `most` that many events, and keeps them if they may be needed later."""
        for mark in self.DEFERRED_EVENTS:
            if mark in block:
                self.deferred.append(block)
                break
        self.forward(block, most)

    def forward(self, block: bytes, most: int = 1) -> None:
        """Sends the client at `most` that many events, once output has begun."""
        if not self.output_started:
            self.withheld.append(block)
            if not self.OUTPUT_EVENTS.search(block):
                self.check_limits(len(block))
                return
            self.output_started = True
            if self.answer.request.stream:
                self.out.append(self.answer.start(self))
            block, most = b"".join(self.withheld), len(self.withheld)
            self.withheld.clear()
        if self.answer.request.stream:
            self.send(block, most)
        self.passed_bytes += self.counted_bytes(block)
        self.output_chars = self.passed_bytes // 8  # a delta event of 150 bytes has about one token of text
        if self.output_chars > self.output_limit:
            self.check_limits()

    def counted_bytes(self, block: bytes) -> int:
        return len(block)

    def send(self, block: bytes, most: int) -> None:
        """Adds the events to the output, changed where the client's API promises something of ours."""
        self.out.append(block)

    def end(self) -> None:
        """The body ended cleanly. If every item is done, that counts as an end."""
        for event in self.events.finish():
            self.take_event(event)
        if not self.events.truncated:  # a truncated event may have contained anything
            self.decoder.end()

    def fail(self, error: GatewayError) -> None:
        self.error = self.error or error  # its response.failed may follow, with usage


class ResponsesPassthrough(Passthrough):
    """The first and terminal events are ours, and those of items that only the final response contains."""
    API_EVENTS = b'"response.'
    OUTPUT_EVENTS = re.compile(rb'"type": ?"response\.\w+\.')  # output_text.delta, not response.metadata
    PARSED_EVENTS = re.compile(
        rb'"type": ?"(?:error|response\.(?:created|queued|in_progress|completed|failed|incomplete'
        rb'|output_item\.added|output_item\.done))"')
    PLAIN_EVENTS = re.compile(
        rb'(?:event: response.++\n'
        rb'data: \{"type":"response\.(?!output_item)\w++\.\w++","sequence_number":\d++,.++\n\n)++')
    DEFERRED_EVENTS = (b'.done"', b"_call_")  # whole texts, and the arguments of calls
    streamed_items = math.inf  # the number of items that came before the final response
    answer: ResponsesAnswer

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.decoder.asked_12h = self.answer.request.get("prompt_cache_options", {}).get("ttl") == "12h"
        self.incomplete_calls: dict[int, tuple[JSON, bytes]] = {}  # done events, for an incomplete answer

    def send(self, block: bytes, most: int) -> None:
        """Numbers the events, continuing from our last one."""
        numbers = itertools.count(self.answer.sequence)
        self.out.append(SEQUENCE_NUMBER.sub(lambda _: b'"sequence_number":%d' % next(numbers), block, most))
        self.answer.sequence = next(numbers)

    def on_response_created(self, event: JSON, frame: bytes) -> None:
        """Ignores the upstream's first events: ours are sent."""

    on_response_queued = on_response_in_progress = on_response_created

    def on_response_output_item_done(self, event: JSON, frame: bytes) -> None:
        """An item is added or done. One without content waits for the final response."""
        item, items = event.get("item"), self.decoder.items
        if not isinstance(item, dict):
            return
        done = event["type"] == "response.output_item.done"
        if done and not item_texts(item):
            self.read_deferred()
        before = len(items)
        known = self.decoder.read(event)
        self.check_limits(len(frame), len(items) - before)
        if not items.open_count:
            self.deferred.clear()
        if done:
            self.give_item(known, event, frame)
        else:
            self.forward(self.adapted(event, frame))

    on_response_output_item_added = on_response_output_item_done

    def read_deferred(self) -> None:
        """Reads whole texts and the deltas of calls that passed unread."""
        for event in SSEDecoder().feed(b"".join(self.deferred)):
            if re.search(r'"response\.\w+(_call_\w+\.delta|\.done)"', event.data):
                self.decoder.feed(event.data)
        self.deferred.clear()

    def give_item(self, known: UpstreamItem, event: JSON, frame: bytes) -> None:
        """Sends a closed item, once, in a usable form. An incomplete call waits for the end."""
        item = event["item"]
        if not known.closed or known.index in self.items:
            return
        if is_incomplete_call(item) and not self.ended:
            self.incomplete_calls[known.index] = event, frame
            return
        if fill_item(item, known):
            frame = b""
        frame = self.adapted(event, frame)
        self.items[known.index] = dumps(item)
        if known.index >= self.streamed_items:
            self.forward(frame.replace(b"output_item.done", b"output_item.added", 2))
        self.forward(frame)

    def release_items(self) -> None:
        """Sends the items that waited for the final response, or that only it contains."""
        for known in self.decoder.items:
            event = {"type": "response.output_item.done", "sequence_number": 0,
                     "output_index": known.upstream_index, "item": known.item}
            self.give_item(known, *self.incomplete_calls.get(known.index, (event, b"")))

    def adapted(self, event: JSON, frame: bytes) -> bytes:
        """The frame of an item's event, with sealed encrypted content, and refusals as text where the client
        reads only that. Makes the frame if none is given."""
        item = event["item"]
        if encrypted := item.get("encrypted_content"):
            item["encrypted_content"] = self.seal({"encrypted_content": encrypted})
            frame = b""
        for part in only_dicts(item.get("content")):
            if part.get("type") == "refusal" and self.answer.profile.refusal_as_text:
                part.update(type="output_text", text=part.pop("refusal", ""), annotations=[])
                frame = b""
        return frame or sse_frame(event["type"], dumps(event))

    def on_response_completed(self, event: JSON, frame: bytes) -> None:
        self.streamed_items = len(self.decoder.items)
        self.read_deferred()
        self.decoder.read(event)
        self.conclude(event.get("response") or {})

    on_response_incomplete = on_response_failed = on_response_completed

    def on_error(self, event: JSON, frame: bytes) -> None:
        self.decoder.read(event)

    def whole(self, data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        response = parse_object(text) or {}
        error = None if "output" in response else self.decoder.stray_error(text, whole=True)
        if error:
            raise error
        status = response.get("status")
        if not isinstance(status, str) or status in ("queued", "in_progress", "cancelled"):
            raise UpstreamError("The provider's answer is not a response object.")
        output = response["output"] = only_dicts(response.get("output"))
        self.streamed_items = 0
        self.decoder.whole(response)
        self.check_limits(len(data), len(output))
        self.conclude(response)

    def conclude(self, response: JSON) -> None:
        self.release_items()
        self.upstream_done = True
        self.final_response = response

    def end(self) -> None:
        super().end()
        self.release_items()

    def close_open_items(self) -> None:
        reason, profile = self.incomplete_reason, self.answer.profile
        if self.error is not None:
            return
        if not reason:
            calls = [known for known in self.decoder.items if "call_id" in known.item]
            if any(not call.closed or is_incomplete_call(call.item) for call in calls):
                self.error = UpstreamError("The provider ended, but a call's arguments are not whole JSON.")
        elif not profile.incomplete_as_completed:
            self.release_items()
        elif reason == "content_filter" and self.has_no_message():
            self.decoder.add_final([{
                "id": f"msg_{self.answer.id.removeprefix('resp_')}",
                "type": "message", "status": "completed", "role": "assistant",
                "content": [{"type": "output_text", "text": FILTERED, "annotations": []}]}])
            self.release_items()

    def body(self, now_s: int) -> str:
        """The upstream's own response, if any, with our id and model and the items sent."""
        answer, response = self.answer, self.final_response
        if self.status == "failed" or not response.get("object"):
            return super().body(now_s)
        assert self.usage is not None
        usage = merge_counts(as_dict(response.get("usage")), usage_object(self.usage))
        response = {**response, "id": answer.id, "created_at": answer.created_s,
                    "model": answer.request.model, "status": self.status, "usage": usage}
        if self.incomplete_reason:
            response["incomplete_details"] = {"reason": self.incomplete_reason}
        else:
            response["completed_at"] = now_s  # by the clock of created_at
        response.pop("output", None)
        return f'{dumps(response)[:-1]},"output":{self.output()}}}'


# --- 5.10 Chat Completions for clients ---

CHAT_FIELDS: Fields = {
    **REQUEST_FIELDS,
    **dict.fromkeys(("input", "instructions", "include", "text", "max_output_tokens"),
                    Field((), wanted="absent: it is a field of the Responses API, at /v1/responses")),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), REQUEST_FIELDS["max_output_tokens"]),
    **dict.fromkeys(("reasoning_effort", "verbosity"), TEXT),
    **dict.fromkeys(("response_format", "web_search_options"), OBJECT),
    **dict.fromkeys(("messages", "tools"), Field((list,))),
    "n": Field((int,), 1, 128),
    "stop": Field((str, list), items=TEXT),
}
CHAT_CONTENT = CONTENT._replace(inner=None)
MAYBE_CONTENT = Field((str, list, type(None)))
CHAT_MESSAGES: dict[str, Fields] = {        # by role, with the fields that are read
    **dict.fromkeys(("developer", "system", "user"), {"content": CHAT_CONTENT}),
    "assistant": {"content": MAYBE_CONTENT, "refusal": MAYBE_TEXT, "function_call": MAYBE_OBJECT,
                  "tool_calls": Field((list, type(None)))},
    "tool": {"content": CHAT_CONTENT, "tool_call_id": TEXT, "name": MAYBE_TEXT},
    "function": {"content": MAYBE_CONTENT, "name": TEXT},
}
CHAT_PARTS = {"text": PART_TEXT, "refusal": {"refusal": TEXT}}
# what stands in a member of its type's name
CHAT_FILES = {"image_url": {"url": TEXT}, "file": {"file_data": MAYBE_TEXT}}
CALL_TYPES = {"function": "function_call", "custom": "custom_tool_call"}
CHAT_CALLS = {kind: ITEM_FIELDS[item] for kind, item in CALL_TYPES.items()}
CHAT_TOOLS = {kind: TOOL_FIELDS[kind] for kind in CALL_TYPES}
CHAT_FORMATS: dict[str, Fields] = {"text": {}, "json_object": {}, "json_schema": JSON_SCHEMA}
REASONING_KEYS = frozenset(("reasoning_content", "reasoning", "reasoning_details"))
# fields with another name or place in Responses
CHAT_MOVED = frozenset("""messages max_tokens max_completion_tokens reasoning reasoning_effort response_format
tools tool_choice verbosity web_search_options""".split())
CHAT_OWN_NAMES = {
    "max_output_tokens": "max_tokens",
    "reasoning.effort": "reasoning_effort",
    "text.format": "response_format",
    "text.verbosity": "verbosity",
}
ONLY_CHAT_SERVERS = {"n": "n = 1", "functions": "tools", "function_call": "tool_choice"}


def chat_fields(given: JSON) -> JSON:
    for name, spec in CHAT_FIELDS.items():
        if given.get(name) is not None or name in ("model", "messages"):
            check(given.get(name), spec, name)
    fields = {name: value for name, value in given.items()
              if name not in CHAT_MOVED and value not in (None, [], {})}
    if limit := given.get("max_completion_tokens") or given.get("max_tokens"):
        fields["max_output_tokens"] = limit
    if isinstance(given.get("stop"), str):
        fields["stop"] = [given["stop"]]
    return fields


def read_messages(request: ResponsesRequest, read: Callable[[Any, str], tuple[list[JSON], Any]]
                  ) -> Iterator[tuple[list[JSON], Any]]:
    """What `read` makes of each message and its path. Those of a growing conversation are read once."""
    for index, message in enumerate(request.given["messages"]):
        known = request.memo.get(id(message))
        if known is None or known[0] is not message:
            known = request.memo[id(message)] = message, read(message, f"messages[{index}]")
        yield known[1]


def translate_chat(request: ResponsesRequest) -> JSON:
    """What has no place in an item becomes a field `messages.NAME`, which no wire carries."""
    given = request.given
    body: JSON = {"input": [], "include": ["reasoning.encrypted_content"]}
    for items, lost in read_messages(request, chat_items):
        body["input"] += items
        body |= lost
    if not body["input"]:
        raise invalid_param("messages", " must hold some content.")
    offered, search, choice, shape = map(
        given.get, ("tools", "web_search_options", "tool_choice", "response_format"))
    tools = [read_entry(tool, CHAT_TOOLS, f"tools[{index}]") for index, tool in enumerate(offered or ())]
    if search is not None:
        tools.append(flatten({**search, "type": "web_search"}))
    if shape is not None:
        shape = read_entry(shape, CHAT_FORMATS, "response_format")
    reasoning = {"effort": given.get("reasoning_effort"), **(given.get("reasoning") or {})}
    if reasoning["effort"]:
        reasoning = {"summary": "auto", **reasoning}
    return {
        **body,
        "tools": tools,
        "tool_choice": flatten(choice) if isinstance(choice, dict) else choice,
        "reasoning": reasoning,
        "text": {"verbosity": given.get("verbosity"), "format": shape}}


def flatten(given: JSON) -> JSON:
    """{"type": T, T: {...}} in the form of Responses: {"type": T, ...}."""
    kind = str(given.get("type"))
    flat = {**as_dict(given.get(kind)), **given}
    flat.pop(kind, None)
    for name in ("format", "user_location"):
        if isinstance(flat.get(name), dict):
            flat[name] = flatten(flat[name])
    if "tools" in flat:
        flat["tools"] = [flatten(tool) for tool in only_dicts(flat["tools"])]
    return flat


def read_entry(given: Any, known: Mapping[str, Fields], path: str) -> JSON:
    """Checks an object by its type, one of `known`, and flattens it."""
    check(given, OBJECT, path)
    kind = check(given.get("type"), Field(choices=known), f"{path}.type")
    if known[kind]:
        check_members(check(given.get(kind), OBJECT, f"{path}.{kind}"), known[kind], f"{path}.{kind}")
    return flatten(given)


def chat_items(message: Any, path: str) -> tuple[list[JSON], JSON]:
    """The items of a message, and fields for what has no place in them."""
    check(message, OBJECT, path)
    role = check(message.get("role"), Field(choices=CHAT_MESSAGES), f"{path}.role")
    check_members(message, CHAT_MESSAGES[role], path)
    content = chat_content(message.get("content") or "", role, f"{path}.content")
    refusal, sealed = message.get("refusal"), sealed_details(message)
    unread = message.keys() - CHAT_MESSAGES[role].keys() - {"role"} - (REASONING_KEYS if sealed else set())
    lost = {f"messages.{name}": True for name in unread if message[name]}
    if role in ("tool", "function"):
        call_id = message.get("tool_call_id") or message["name"]
        return [{"type": "function_call_output", "call_id": call_id, "output": content}], lost
    contents = content, refusal and [{"type": "refusal", "refusal": refusal}]
    items = [{"type": "message", "role": role, "content": each} for each in contents if each]
    calls = [*(message.get("tool_calls") or ())]
    if old := message.get("function_call"):     # its result has no other id than the name
        calls.append({"id": old.get("name"), "type": "function", "function": old})
    for index, call in enumerate(calls):
        kind = read_entry(call, CHAT_CALLS, f"{path}.tool_calls[{index}]")["type"]
        call_id = check(call.get("id"), TEXT, f"{path}.tool_calls[{index}].id")
        items.append({**call[kind], "type": CALL_TYPES[kind], "call_id": call_id})
        others = call.keys() - {"id", "type", "index", kind}
        lost |= {f"messages.tool_calls.{name}": True for name in others if call[name]}
    for detail in sealed:
        made = {"type": "reasoning", "summary": [], "encrypted_content": detail["data"]}
        items.insert(count(detail, "index"), made)
    return items, lost


def chat_content(content: str | list[JSON], role: str, path: str) -> str | list[JSON]:
    """Content with parts as those of Responses; of other types unchanged."""
    if isinstance(content, str):
        return content
    check_typed(content, CHAT_PARTS, path)
    text = "output_text" if role == "assistant" else "input_text"
    types = {"text": text, "image_url": "input_image", "file": "input_file"}
    parts = []
    for index, part in enumerate(content):
        kind = part["type"]
        if kind in CHAT_FILES:
            part = read_entry(part, CHAT_FILES, f"{path}[{index}]")
        if kind == "image_url":
            part[kind] = part.pop("url")
        parts.append({**part, "type": types.get(kind, kind)})
    return parts


def sealed_details(message: JSON) -> list[JSON]:
    """The envelopes among a message's reasoning_details."""
    return [detail for detail in only_dicts(message.get("reasoning_details"))
            if str(detail.get("data")).startswith(ENVELOPE_PREFIX)]


CHAT_TEXTS = {      # type of a part -> the field of a message
    "output_text": "content",
    "refusal": "refusal",
    "summary_text": "reasoning_content",
    "reasoning_text": "reasoning_content",
}
FINISH_REASONS = {"max_output_tokens": "length", "content_filter": "content_filter"}
CHUNK_TAIL = '},"finish_reason":null}]}\n\n'


def chat_entry(item: JSON, index: int) -> tuple[str, JSON]:
    """The list of a message that an item without text belongs in, "" if none, and its entry there. The SDK
    joins streamed entries of one index; that of reasoning is its place in the answer, where it returns to."""
    if field := CALL_FIELD.get(item["type"]):
        kind, _, _ = item["type"].partition("_")
        call = {"name": item["name"], field: item[field]}
        return "tool_calls", {"id": item["call_id"], "type": kind, kind: call}
    if sealed := item.get("encrypted_content"):
        detail = {"type": "reasoning.encrypted", "data": sealed, "format": "pomex", "index": index}
        return "reasoning_details", detail
    if image := item.get("result"):
        link = {"url": f"data:image/png;base64,{image}"}
        return "images", {"type": "image_url", "image_url": link, "index": index}
    return "", {}


class ChatAnswer(ClientAnswer):
    """Chunks of Chat Completions. Its texts of one kind are one text, joined by empty lines."""
    calls = 0               # begun in the stream
    texts_begun: frozenset[str] = frozenset()
    cited = False
    # where the upstream's chunks pass: one of them, and what they have said of the end
    passed: JSON = {}
    finished = counted = False

    def head(self, kind: str) -> JSON:
        return {
            "id": self.passed.get("id") or f"chatcmpl-{self.id.removeprefix('resp_')}",
            "object": kind,
            "created": self.passed.get("created") or self.created_s,
            "model": self.request.given["model"]}

    @functools.cached_property
    def chunk_head(self) -> str:
        head = dumps(self.head("chat.completion.chunk"))
        return f'data: {head[:-1]},"choices":[{{"index":0,"delta":{{'

    def chunk(self, name: str, value: Any) -> bytes:
        """A chunk whose delta has one field."""
        return f'{self.chunk_head}"{name}":{dumps(value)}{CHUNK_TAIL}'.encode()

    def start(self, attempt: Attempt | None = None) -> bytes:
        if self.started or attempt is None or isinstance(attempt, Passthrough):
            return b""
        self.started = True
        return f'{self.chunk_head}"role":"assistant","content":""{CHUNK_TAIL}'.encode()

    def heartbeat(self) -> bytes:
        return b": keep-alive\n\n"

    def begin_item(self, item: Item) -> bytes:
        if item.tool is None:
            return b""
        field, index = CALL_FIELD[item.kind], self.calls
        self.calls += 1
        given = {"type": item.kind, "call_id": item.call_id, "name": item.tool.name, field: ""}
        name, call = chat_entry(given, index)
        item.delta_head = f'{self.chunk_head}"{name}":[{{"index":{index},"{call["type"]}":{{"{field}":'
        item.delta_tail = "}}]" + CHUNK_TAIL
        return self.chunk(name, [{"index": index, **call}])

    def begin_part(self, item: Item, shape: PartShape) -> bytes:
        name = CHAT_TEXTS[shape.type]
        item.delta_head, item.delta_tail = f'{self.chunk_head}"{name}":', CHUNK_TAIL
        is_first = name not in self.texts_begun
        self.texts_begun |= {name}
        return b"" if is_first else self.delta(item, "\n\n")

    def annotate(self, item: Item, annotation: JSON) -> bytes:
        self.cited = True       # the SDK takes only one list of them
        return b""

    def end_item(self, item: Item, rest: str, arguments: str, text: str) -> bytes:
        if item.tool:
            return self.delta(item, rest) if rest else b""
        return self.whole_item(item.index, text)

    def whole_item(self, index: int, text: str) -> bytes:
        name, entry = chat_entry(json.loads(text), index)
        return self.chunk(name, [entry]) if name else b""

    def terminal(self, attempt: Attempt, now_s: int) -> bytes:
        """What the end still lacks, and [DONE]; of a failure only the error."""
        if attempt.error is not None:
            return sse_frame("", dumps(attempt.error.body()))
        frames = self.start(attempt)
        if self.cited:
            frames += self.chunk("annotations", self.message(attempt)["annotations"])
        if not self.finished:
            reason = json_string(self.finish_reason(attempt))
            frames += (self.chunk_head + CHUNK_TAIL.replace("null", reason)).encode()
        if self.wants_usage and not self.counted:
            head = self.head("chat.completion.chunk")
            frames += sse_frame("", dumps({**head, "choices": [], "usage": self.usage(attempt)}))
        return frames + DONE_FRAME

    @property
    def wants_usage(self) -> bool:
        return bool(self.request.get("stream_options", {}).get("include_usage"))

    def usage(self, attempt: Attempt) -> JSON:
        assert attempt.usage is not None
        return {name.replace("input", "prompt").replace("output", "completion"): value
                for name, value in usage_object(attempt.usage).items()}

    def finish_reason(self, attempt: Attempt) -> str:
        return FINISH_REASONS.get(attempt.incomplete_reason, "tool_calls" if self.calls else "stop")

    def message(self, attempt: Attempt) -> JSON:
        """The finished items as one message. A truncated call is left out: no client can use it."""
        lists = collections.defaultdict[str, list[Any]](list)
        for index in sorted(attempt.items):
            item = json.loads(attempt.items[index])
            if item.get("status") != "incomplete":
                name, entry = chat_entry(item, index)
                lists[name].append(entry)
            for part in only_dicts(item.get("summary")) + only_dicts(item.get("content")):
                texts = lists[CHAT_TEXTS.get(part["type"], "")]
                begin = sum(map(len, texts), 2 * len(texts))
                texts.append(part.get("text", part.get("refusal")))
                for given in part.get("annotations", ()):
                    kind = given.pop("type")
                    for place in given.keys() & {"start_index", "end_index"}:
                        given[place] += begin
                    lists["annotations"].append({"type": kind, kind: given})
        message = {name: "\n\n".join(entries) if name in CHAT_TEXTS.values() else entries
                   for name, entries in lists.items() if name}
        content = None if "tool_calls" in message else ""
        return {"role": "assistant", "content": content, "refusal": None, **message}

    def body(self, attempt: Attempt, now_s: int) -> str:
        message = self.message(attempt)
        self.calls = len(message.get("tool_calls", ()))
        reason = self.finish_reason(attempt)
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        head = self.head("chat.completion")
        return dumps({**head, "choices": [choice], "usage": self.usage(attempt)})


# of chunks: members that end nothing, the first ones in OpenAI's order; and the texts
CHUNK_HEAD = (
    rb'(?:"id":"[^"\\\n]++","object":"chat.completion.chunk","created":\d++,"model":"[^"\\\n]++",'
    rb'(?:"service_tier":"\w++",)?+(?:"system_fingerprint":(?:null|"\w++"),)?+)?+')
CHUNK_MEMBERS = (
    rb'(?:"(?:finish_reason": ?null|(?!finish_reason"|error"|message")\w++": ?'
    rb'(?:"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"|\d++|null)),? ?)*+')
CHUNK_TEXTS = re.compile(rb'"(?:content|reasoning\w*|arguments)": ?"([^"\\]*+(?:\\.[^"\\]*+)*+)')


class ChatPassthrough(Passthrough):
    """The chunks of a chat server, with the client's name of the model. The end is withheld, because an error
    may follow, and the usage chunk dropped if the client did not ask for it."""
    OUTPUT_EVENTS = re.compile(
        rb'"(?:content|reasoning_content|reasoning|thinking|refusal)": ?"[^"]'
        rb'|"(?:content|tool_calls|reasoning_details|images|function_call|audio)": ?[\[{]')
    PLAIN_EVENTS = re.compile(
        rb'(?:data: \{1 0"choices": ?\[\{0"delta": ?\{0\},? ?0\}\],? ?0\}\n\n)++'
        .replace(b"1 ", CHUNK_HEAD).replace(b"0", CHUNK_MEMBERS))
    DEFERRED_EVENTS = ()
    answer: ChatAnswer
    stops = 0
    fail = Attempt.fail         # nothing follows

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ours = b'"model":' + json_string(self.answer.request.given["model"]).encode()
        self.theirs = self.ours             # as the last chunk spells it that was read

    def set_stop(self, stop: Stop) -> None:
        """Takes the stop of the last choice. The calls of several ones are not told apart."""
        self.stops += 1
        choices = self.answer.request.get("n", 1)
        if stop.final or self.stops >= choices:
            super().set_stop(stop)
        broken = any(call.text and not call.closed for call in self.decoder.calls)
        if broken and choices == 1 and not stop.incomplete_reason:
            self.fail(UpstreamError("The provider ended, but a call's arguments are not whole JSON."))

    def take_event(self, event: Event) -> None:
        name, data = event
        if not self.answer.request.stream:
            raise UpstreamError("The provider streamed an answer that should have come whole.")
        if self.upstream_done:
            return
        if name == "error" or data == "[DONE]":
            self.decoder.feed(data, name)
            return
        chunk = parse_object(data)
        if chunk is None:
            raise UpstreamError("The provider sent an event that cannot be read.")
        self.decoder.read(chunk)
        if chunk.get("id"):
            self.final_response = chunk
        wanted = self.answer.wants_usage or chunk.get("choices") or not chunk.get("usage")
        if wanted and self.error is None:
            give = self.forward if self.stop is None else self.withhold
            give(self.with_model(sse_frame("", data)))

    def withhold(self, block: bytes) -> None:
        self.withheld.append(block)
        self.output_started |= self.OUTPUT_EVENTS.search(block) is not None
        self.output_chars += self.counted_bytes(block) // 8
        self.check_limits(len(block))

    def counted_bytes(self, block: bytes) -> int:
        """Only the text: what else a chunk has is of any length."""
        return 8 * sum(map(len, CHUNK_TEXTS.findall(block)))

    def send(self, block: bytes, most: int) -> None:
        self.out.append(block.replace(self.theirs, self.ours))

    def with_model(self, block: bytes) -> bytes:
        if found := MODEL_FIELD.search(block):
            self.theirs = found[0]
        return block.replace(self.theirs, self.ours)

    def whole(self, data: bytes) -> None:
        """A client that streams gets it as one chunk."""
        body = parse_object(data.decode("utf-8", "replace")) or {}
        if not self.answer.request.stream:
            self.decoder.whole(body)
            self.withhold(self.with_model(data))
            return
        for choice in only_dicts(body.get("choices")):
            choice["delta"] = delta = as_dict(choice.pop("message", None))
            for index, call in enumerate(only_dicts(delta.get("tool_calls"))):
                call["index"] = index
        self.take_event(Event("", dumps({**body, "object": "chat.completion.chunk"})))
        self.take_event(Event("", "[DONE]"))

    def terminal(self, now_s: int) -> bytes:
        answer = self.answer
        if self.error is None:
            self.send(b"".join(self.withheld), 0)
        answer.passed = self.final_response
        answer.calls = len(self.decoder.calls)
        answer.finished = self.decoder.stop is not None
        answer.counted = not (self.usage and self.usage.estimated)
        return super().terminal(now_s)

    def body(self, now_s: int) -> str:
        return b"".join(self.withheld).decode("utf-8", "replace")


# --- 5.11 Messages for clients ---
#
# Another provider's model gets a translation; its reasoning becomes thinking blocks with our envelope as
# their signature. An Anthropic upstream gets the client's own body, and its events pass.

UNSIGNED = ENVELOPE_PREFIX      # the signature of thinking that no provider needs back
TOOL_ERROR = "[error] "         # only Anthropic has a field for it
BILLING_HEADER = "x-anthropic-billing-header:"      # a text of Claude Code that would spoil every cache
UNCALLED_TOOL = "DeferredToolPlaceholder"   # of Claude Code
THINKING_EFFORTS = {16384: "high", 10000: "medium", 0: "low"}   # by the least budget
MAX_USER_ID = 64                # of a safety_identifier at OpenAI

MESSAGES_PARTS = {      # their members that are read; the others are fields of their own
    "thinking": {"type": Field(choices="enabled adaptive disabled between_tools".split())},
    "output_config": {"effort": MAYBE_TEXT},
    "metadata": {"user_id": MAYBE_TEXT},
}
READ_APART = frozenset("type budget_tokens display effort format user_id".split())
MESSAGES_FIELDS: Fields = {
    **{name: REQUEST_FIELDS[name] for name in "model stream temperature top_p service_tier".split()},
    **{name: object_with(members) for name, members in MESSAGES_PARTS.items()},
    "max_tokens": REQUEST_FIELDS["max_output_tokens"],
    "messages": Field((list,)),
    "stop_sequences": Field((list,), items=TEXT),
    "system": Field((str, list)),
    "tool_choice": OBJECT,
    "tools": Field((list,)),
    "top_k": Field((int,), 0),
}
TRANSLATED = "messages system tools tool_choice output_format service_tier cache_control".split()
# unknown ones get a prefix, because Responses may have a field of that name
SAME_NAME = frozenset("""model stream temperature top_p top_k billing_policy compaction container
context_management diagnostics fallbacks fallback_credit_token inference_geo mcp_servers speed thread
user_profile_id workspace_id""".split())
MESSAGES_NAMES = {
    "max_output_tokens": "max_tokens",
    "stop": "stop_sequences",
    "reasoning.effort": "thinking",
    "text.format": "output_config.format",
    "safety_identifier": "metadata.user_id",
}
RESPONSES_NAMES = {own: name for name, own in MESSAGES_NAMES.items()} | {name: name for name in SAME_NAME}
MESSAGES_FORMAT = object_with({"type": Field(choices=("json_schema",)), "schema": OBJECT})
CLIENT_MESSAGE = {
    "role": Field(choices=("user", "assistant", "system")),
    "content": Field((str, list)),
}
# the known blocks and their fields; the others have no meaning for another provider and are named
MESSAGE_BLOCKS: dict[str, Fields] = {
    "text": {"text": TEXT, "citations": Field((list, type(None)))},
    "image": {"source": OBJECT},
    "document": {"source": OBJECT, "title": MAYBE_TEXT},
    "search_result": {"source": TEXT, "title": TEXT, "content": Field((list,))},
    "thinking": {"thinking": MAYBE_TEXT, "signature": MAYBE_TEXT},
    "redacted_thinking": {"data": TEXT},
    "tool_use": {"id": NAME, "name": NAME, "input": OBJECT, "caller": MAYBE_OBJECT},
    "tool_result": {
        "tool_use_id": NAME,
        "content": Field((str, list, type(None))),
        "is_error": Field((bool, type(None))),
    },
    "tool_reference": {"tool_name": NAME},
    "compaction": {"content": MAYBE_TEXT},
}
MESSAGE_SOURCES: dict[str, Fields] = {      # of images and documents
    "base64": {"media_type": NAME, "data": NAME},
    "content": {"content": CLIENT_MESSAGE["content"]},
    "text": {"data": NAME},
    "url": {"url": NAME},
}
MESSAGES_TOOL = {"name": NAME, "description": MAYBE_TEXT, "input_schema": OBJECT}
WITHOUT_EFFECT = ("type", "cache_control", "eager_input_streaming", "defer_loading")    # keys of tools
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": "function"}


def messages_fields(given: JSON) -> JSON:
    """The fields of a Messages body under the names of Responses, or else their own."""
    fields = {name: value for name, value in given.items() if value is not None}
    for name, spec in MESSAGES_FIELDS.items():
        if name in fields or name in ("model", "messages"):
            check(given.get(name), spec, name)
    made: JSON = {"include": ["reasoning.encrypted_content"]}
    for name, value in fields.items():
        if name in MESSAGES_PARTS:
            made |= {f"{name}.{key}": each for key, each in value.items() if key not in READ_APART}
        elif name not in TRANSLATED:
            made[RESPONSES_NAMES.get(name, f"messages:{name[:64]}")] = value
    if made.get("speed") == "standard":
        del made["speed"]
    thinking, config, metadata = (fields.get(name, {}) for name in MESSAGES_PARTS)
    kind, effort = thinking.get("type"), config.get("effort")
    if kind == "enabled":
        budget = check(thinking.get("budget_tokens"), Field((int,), 1), "thinking.budget_tokens")
        effort = effort or next(name for least, name in THINKING_EFFORTS.items() if budget >= least)
    shown = kind and thinking.get("display") != "omitted"
    made["reasoning"] = {"effort": effort, "summary": "auto" if shown else None}
    if kind in ("disabled", "between_tools"):
        made["reasoning"] = {"effort": "none"}
    shape = fields.get("output_format") or config.get("format")
    if shape is not None:
        schema = check(shape, MESSAGES_FORMAT, "output_config.format")["schema"]
        made["text"] = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    if user := metadata.get("user_id"):
        made["safety_identifier"] = user if len(user) <= MAX_USER_ID else sha256_hex(user)
    if "service_tier" in fields:
        made["service_tier"] = fields["service_tier"].replace("standard_only", "default")
    return made


def translate_messages(request: ResponsesRequest) -> JSON:
    """The conversation and the tools as those of Responses. What is lost becomes a field of its own, which no
    wire carries."""
    given, dropped = request.given, list[str]()
    items: list[JSON] = []
    for made, names in read_messages(request, message_items):
        items += made
        dropped += names
    if not items:
        raise invalid_param("messages", " have no content.")
    system = block_parts(given.get("system") or [], "system", dropped)
    offered = enumerate(given.get("tools") or ())
    tools = [messages_client_tool(tool, f"tools[{index}]") for index, tool in offered
             if as_dict(tool).get("name") != UNCALLED_TOOL]
    body: JSON = {"input": items, "instructions": text_of(system, "\n\n"), "tools": tools}
    if choice := given.get("tool_choice"):
        kind = check(choice.get("type"), Field(choices=TOOL_CHOICES), "tool_choice.type")
        body["tool_choice"] = TOOL_CHOICES[kind]
        if kind == "tool":
            name = check(choice.get("name"), NAME, "tool_choice.name")
            hosted = any(tool["type"] == name for tool in tools)
            body["tool_choice"] = {"type": name} if hosted else {"type": "function", "name": name}
        body["parallel_tool_calls"] = not choice.get("disable_parallel_tool_use")
    return {**dict.fromkeys(dropped, True), **body}


def message_items(message: Any, path: str) -> tuple[list[JSON], list[str]]:
    """The items of a message, and what is lost: neighbouring texts, images and files are one."""
    check_members(check(message, OBJECT, path), CLIENT_MESSAGE, path)
    role = message["role"].replace("system", "developer")
    items, dropped = list[JSON](), list[str]()
    for made in block_parts(message["content"], f"{path}.content", dropped):
        if not made["type"].startswith("input_"):
            items.append(made)
        elif items and items[-1]["type"] == "message":
            items[-1]["content"].append(made)
        else:
            items.append({"type": "message", "role": role, "content": [made]})
    return items, dropped


def input_text(text: str) -> JSON:
    return {"type": "input_text", "text": text}


def block_parts(blocks: Any, path: str, dropped: list[str]) -> list[JSON]:
    """Content as parts, and blocks that are items of their own."""
    if isinstance(blocks, str):
        return [input_text(blocks)]
    check_typed(blocks, MESSAGE_BLOCKS, path)
    made: list[JSON] = []
    for index, block in enumerate(blocks):
        kind = block["type"]
        if kind not in MESSAGE_BLOCKS:
            dropped.append(f"messages:{kind[:64]}")
            continue
        more = block.keys() - MESSAGE_BLOCKS[kind].keys() - {"type", "cache_control"}
        dropped += [f"messages:{kind}.{name[:64]}" for name in sorted(more) if block[name]]
        made += block_part(block, f"{path}[{index}]", dropped)
    return made


def block_part(block: JSON, path: str, dropped: list[str]) -> list[JSON]:
    kind, text = block["type"], block.get("text") or block.get("content") or ""
    if kind == "tool_use":
        call_id, arguments = own_call_id(block["id"]), dumps(block["input"])
        return [{"type": "function_call", "call_id": call_id, "name": block["name"], "arguments": arguments}]
    if kind == "tool_result":
        mark = TOOL_ERROR if block.get("is_error") else ""
        output = mark + text if isinstance(text, str) else block_parts(text, f"{path}.content", dropped)
        if mark and not isinstance(output, str):
            output.insert(0, input_text(mark))
        call_id = own_call_id(block["tool_use_id"])
        return [{"type": "function_call_output", "call_id": call_id, "output": output}]
    if kind.endswith("thinking"):
        sealed = block.get("signature") or block.get("data") or ""
        if not sealed.startswith(ENVELOPE_PREFIX):
            dropped.append(f"messages:{kind}")      # only its own provider can read it
        elif sealed != UNSIGNED:
            return [{"type": "reasoning", "summary": [], "encrypted_content": sealed}]
        return []
    if kind in ("image", "document"):
        return source_parts(block, f"{path}.source", dropped)
    if kind == "search_result":
        found = text_of(block_parts(text, f"{path}.content", dropped))
        text = f"{block['title']}\n{block['source']}\n\n{found}"
    if kind == "tool_reference":
        text = f"The tool {block['tool_name']} is available."
    if text.startswith(BILLING_HEADER):
        dropped.append(f"system:{BILLING_HEADER[:-1]}")
        return []
    return [input_text(text)] if text else []       # of a compaction, too


def source_parts(block: JSON, path: str, dropped: list[str]) -> list[JSON]:
    """An image or a document as parts; a text is only text."""
    source, title = block["source"], block.get("title") or ""
    kind = str(source.get("type"))
    if kind not in MESSAGE_SOURCES:
        dropped.append(f"messages:{block['type']}.{kind[:64]}")     # a file that lies at Anthropic
        return []
    check_members(source, MESSAGE_SOURCES[kind], path)
    if kind == "content":
        return block_parts(source["content"], f"{path}.content", dropped)
    if kind == "text":
        return [input_text(f"{title}\n\n{source['data']}".strip("\n"))]
    data = source["url"] if kind == "url" else f"data:{source['media_type']};base64,{source['data']}"
    if block["type"] == "image":
        return [{"type": "input_image", "image_url": data}]
    name = (title or "document").removesuffix(".pdf") + ".pdf"
    file = {"file_url": data} if kind == "url" else {"filename": name, "file_data": data}
    return [{"type": "input_file", **file}]


def messages_client_tool(tool: Any, path: str) -> JSON:
    check(tool, OBJECT, path)
    kind = check(tool.get("type") or "custom", NAME, f"{path}.type")
    more = {name: value for name, value in tool.items() if name not in WITHOUT_EFFECT}
    if kind == "custom":
        check_members(tool, MESSAGES_TOOL, path)
        schema = more.pop("input_schema")
        return {**more, "type": "function", "parameters": schema}
    if not kind.startswith("web_search"):
        return {"type": kind}
    more.pop("name", None)
    filters = {name: more.pop(name) for name in ("allowed_domains", "blocked_domains") if name in more}
    return {**more, "type": "web_search", "filters": filters}


MESSAGES_ERRORS = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def messages_error(error: GatewayError, request_id: str) -> JSON:
    """The error in Anthropic's form, in words by which Claude Code compacts or asks no more."""
    kind = MESSAGES_ERRORS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    if (error.ledger_code or error.code) in ("insufficient_quota", "price_unknown"):
        kind = "billing_error"
    return {"type": "error", "error": {"type": kind, "message": str(error)}, "request_id": request_id}


def messages_counts(usage: Usage) -> JSON:
    """The usage object: cached input is counted apart."""
    return {
        "input_tokens": usage.input - usage.cached - usage.cache_write,
        "cache_creation_input_tokens": usage.cache_write,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
    }


def messages_frame(kind: str, **fields: Any) -> bytes:
    return sse_frame(kind, dumps({"type": kind, **fields}))


MESSAGE_STOP = messages_frame("message_stop")
LASTING_ID = re.compile("[a-zA-Z0-9_-]{12,64}")     # Anthropic takes it, and call_0 would come again
SHORT_ID = re.compile("[a-zA-Z0-9_-]{1,11}")


def own_call_id(tool_use_id: str) -> str:
    """The id that the provider gave the call: its reasoning may name it."""
    return re.sub(r"^fc_[0-9a-f]+_\d+__", "", tool_use_id)


def item_blocks(item: JSON) -> list[JSON]:
    """The content blocks of a finished item of Responses. A truncated call is none, and an empty text: the
    next request would be refused for it."""
    kind, sealed = item["type"], item.get("encrypted_content")
    if kind == "message":
        blocks = [text_block(part.get("text") or part.get("refusal") or "") for part in item["content"]]
        for block, part in zip(blocks, item["content"]):
            if cited := only_dicts(part.get("annotations")):
                block["citations"] = [*map(citation, cited)]
        return [block for block in blocks if block["text"]]
    if kind == "reasoning":
        text = "\n\n".join(part["text"] for part in (*item.get("summary", ()), *item.get("content", ())))
        if text:
            return [{"type": "thinking", "thinking": text, "signature": sealed or UNSIGNED}]
        return [{"type": "redacted_thinking", "data": sealed}] if sealed else []
    if kind not in CALL_FIELD:
        return []
    given = {"input": item["input"]} if "input" in item else parse_object(item["arguments"])
    return [] if given is None else [tool_use(item["call_id"], item["id"], item["name"], given)]


def tool_use(call_id: str, item_id: str, name: str, given: JSON) -> JSON:
    if SHORT_ID.fullmatch(call_id):
        call_id = f"{item_id}__{call_id}"       # own_call_id() finds it again
    elif not LASTING_ID.fullmatch(call_id):
        call_id = item_id
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def citation(annotation: JSON) -> JSON:
    """The source of a text. Its index is ours, so that it never goes up."""
    return {
        "type": "web_search_result_location",
        "cited_text": "",
        "encrypted_index": UNSIGNED,
        "title": annotation.get("title"),
        "url": str(annotation.get("url") or ""),
    }


BLOCK_DELTAS = {        # what is sent in pieces: the field of a block -> the type of delta, and its field
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "signature": ("signature_delta", "signature"),
    "input": ("input_json_delta", "partial_json"),
}


def whole_block(index: int, block: JSON) -> bytes:
    """The frames of a block that is complete."""
    cited = block.get("citations") or ()
    deltas = [{"type": "citations_delta", "citation": each} for each in cited]
    empty = {name: value for name, value in block.items() if name != "citations"}
    for name, (kind, piece) in BLOCK_DELTAS.items():
        if name in block:
            empty[name] = type(block[name])()
            deltas.append({"type": kind, piece: block[name] if empty[name] == "" else dumps(block[name])})
    frames = [messages_frame("content_block_start", index=index, content_block=empty)]
    frames += [messages_frame("content_block_delta", index=index, delta=delta) for delta in deltas]
    return b"".join([*frames, messages_frame("content_block_stop", index=index)])


LIVE_BLOCKS: dict[str, tuple[str, JSON]] = {    # by kind of item: the field of its text, and the block
    "message": ("text", text_block("")),
    "reasoning": ("thinking", {"type": "thinking", "thinking": "", "signature": ""}),
    "function_call": ("input", {}),
}


class MessagesAnswer(ClientAnswer):
    """Events of the Messages API. One block is open at a time: an item that begins while another streams
    comes after it, as a whole."""
    blocks = 0              # begun
    is_open = False         # the last of them
    live: Item | None = None    # the item that streams
    waiting: dict[int, list[JSON]]      # the blocks of items that have ended, by index
    stop_reason = "end_turn"
    held: Sequence[JSON] = ()       # thoughts that may follow the last text, where no client expects a block

    def message(self, content: list[JSON], stop_reason: str | None, usage: Usage) -> JSON:
        return {
            "id": f"msg_{self.id.removeprefix('resp_')}",
            "type": "message",
            "role": "assistant",
            "model": self.request.given["model"],
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": messages_counts(usage),
        }

    def start(self, attempt: Attempt | None = None) -> bytes:
        if self.started:
            return b""
        self.started, self.waiting = True, {}
        if attempt and attempt.opening:
            return attempt.opening
        usage = (attempt and attempt.usage) or Usage(self.estimated_input)
        return messages_frame("message_start", message=self.message([], None, usage))

    def heartbeat(self) -> bytes:
        return messages_frame("ping")

    def begin_block(self, item: Item) -> bytes:
        held = self.whole_blocks(self.held)
        text, block = LIVE_BLOCKS[item.kind]
        kind, name = BLOCK_DELTAS[text]
        if item.tool:
            self.stop_reason = "tool_use"
            block = tool_use(item.call_id, item.id, item.tool.name, {})
        item.delta_head = (f'event: content_block_delta\ndata: {{"type":"content_block_delta",'
                           f'"index":{self.blocks},"delta":{{"type":"{kind}","{name}":')
        item.delta_tail = "}}\n\n"
        self.blocks += 1
        self.is_open = True
        return held + messages_frame("content_block_start", index=self.blocks - 1, content_block=block)

    def block_delta(self, **delta: Any) -> bytes:
        return messages_frame("content_block_delta", index=self.blocks - 1, delta=delta)

    def end_block(self) -> bytes:
        was_open, self.is_open = self.is_open, False
        return messages_frame("content_block_stop", index=self.blocks - 1) if was_open else b""

    def begin_item(self, item: Item) -> bytes:
        if self.live or item.kind not in LIVE_BLOCKS:
            return b""
        self.live = item
        return self.begin_block(item) if item.tool else b""

    def begin_part(self, item: Item, shape: PartShape) -> bytes:
        """The parts of a thought are one block."""
        return self.delta(item, "\n\n") if self.is_open and item.kind == "reasoning" else b""

    def deltas(self, item: Item, texts: list[str]) -> bytes:
        if item is not self.live:
            return b""
        begun = b"" if self.is_open else self.begin_block(item)
        return begun + super().deltas(item, texts)

    def delta(self, item: Item, text: str) -> bytes:
        return self.deltas(item, [text])

    def annotate(self, item: Item, annotation: JSON) -> bytes:
        is_live = item is self.live
        return self.block_delta(type="citations_delta", citation=citation(annotation)) if is_live else b""

    def end_part(self, item: Item, *given: Any) -> bytes:
        return self.end_block() if item is self.live and item.kind == "message" else b""

    def end_item(self, item: Item, rest: str, arguments: str, text: str) -> bytes:
        """Ends the item's block, or makes those of an item that did not stream."""
        frames = []
        if item.tool and not self.live:         # it waited, and is cut
            frames.append(self.begin_item(item))
            rest = arguments
        if rest:
            frames.append(self.delta(item, rest))
        if item is self.live:
            if self.is_open and item.kind == "reasoning":
                signature = item.fields.get("encrypted_content") or UNSIGNED
                frames.append(self.block_delta(type="signature_delta", signature=signature))
            frames.append(self.end_block())
            self.live = None
        if not item.delta_head:
            self.waiting[item.index] = item_blocks(json.loads(text))
        while self.waiting and not self.live:
            blocks = [*self.held, *self.waiting.pop(min(self.waiting))]
            if blocks and blocks[-1]["type"] == "redacted_thinking":
                self.held = blocks
            else:
                frames.append(self.whole_blocks(blocks))
        return b"".join(frames)

    def whole_blocks(self, blocks: Sequence[JSON]) -> bytes:
        self.held = ()
        frames = [whole_block(index, block) for index, block in enumerate(blocks, self.blocks)]
        self.blocks += len(blocks)
        if any("input" in block for block in blocks):
            self.stop_reason = "tool_use"
        return b"".join(frames)

    def reason(self, attempt: Attempt) -> str:
        filtered = self.stop_reason if self.profile.refusal_as_text else "refusal"
        reasons = {"": self.stop_reason, "content_filter": filtered}
        return reasons.get(attempt.incomplete_reason, "max_tokens")

    def terminal(self, attempt: Attempt, now_s: int) -> bytes:
        if attempt.error:
            return messages_frame("error", error=messages_error(attempt.error, "")["error"])
        assert attempt.usage is not None
        delta = {"stop_reason": self.reason(attempt), "stop_sequence": None}
        ending = messages_frame("message_delta", delta=delta, usage=messages_counts(attempt.usage))
        only = b"" if self.blocks else self.whole_blocks(self.held)
        return self.start(attempt) + only + ending + MESSAGE_STOP

    def body(self, attempt: Attempt, now_s: int) -> str:
        content = [block for item in json.loads(attempt.output()) for block in item_blocks(item)]
        while len(content) > 1 and content[-1]["type"] == "redacted_thinking":
            content.pop()
        if any("input" in block for block in content):
            self.stop_reason = "tool_use"
        assert attempt.usage is not None
        return dumps(self.message(content, self.reason(attempt), attempt.usage))


class MessagesPassthrough(Passthrough):
    """The upstream's message with our `model`. What follows its stop_reason is withheld until the end."""
    API_EVENTS = b""
    OUTPUT_EVENTS = re.compile(rb'"type": ?"content_block_(?:delta|stop)"')
    PARSED_EVENTS = re.compile(rb"\A(?!event: content_block_delta\n)")
    PLAIN_EVENTS = re.compile(
        rb'(?:event: content_block_delta\ndata: \{"type": ?"content_block_delta",.++\n\n)++')
    DEFERRED_EVENTS = (b"input_json_delta",)
    fail = Attempt.fail         # nothing follows an error
    answer: MessagesAnswer
    open_block: Any = None      # of the decoder
    block_end = b""
    ending = b""
    message_stop = MESSAGE_STOP
    whole_text = ""             # for a client that does not stream

    def read(self, data: str, frame: bytes) -> None:
        for event in SSEDecoder().feed(b"".join(self.deferred)):
            self.decoder.feed(event.data)
        self.deferred.clear()
        if data.strip() != "[DONE]":
            super().read(data, frame)

    def handle(self, event: JSON, frame: bytes) -> None:
        kind, index = event.get("type"), event.get("index", 0)
        if kind == "content_block_delta":
            self.pass_unread(frame)
            return
        if kind == "content_block_start":
            self.close_block()
        elif kind == "content_block_stop" and self.decoder.blocks.get(index) is not self.open_block:
            return                              # it has ended
        is_error = frame.startswith(b"event: error\n")      # whatever its form
        self.decoder.read({**event, "type": "error"} if is_error else event)
        if self.error is not None:
            return
        if kind == "message_start":
            named = json_string(self.answer.request.given["model"]).encode()
            renamed = MODEL_FIELD.sub(lambda at: at[0].removesuffix(at[1]) + named, frame, 1)
            self.opening = self.opening or renamed
        elif kind == "content_block_stop":
            self.block_end = frame
            self.close_block(at_end=False)
        elif kind == "message_stop":
            self.close_block()
            self.message_stop = frame
        elif kind == "message_delta" and self.stop:
            self.close_block()
            self.ending += frame
        else:
            self.forward(frame)
        if kind == "content_block_start":
            self.check_limits(items=1)
            self.open_block = self.decoder.blocks[index]
            self.block_end = messages_frame("content_block_stop", index=index)

    def close_block(self, at_end: bool = True) -> None:
        """Ends the open block. A call whose input is not whole JSON waits: its answer may have been cut."""
        block = self.open_block
        if block is None:
            return
        if block.channel == "arguments":
            self.answer.stop_reason = "tool_use"
            text = "".join(block.pieces).strip()
            if text and not self.incomplete_reason and parse_object(text) is None:
                if at_end:
                    self.fail(UpstreamError("The provider's call is not one whole JSON object."))
                return
        self.open_block = None
        self.forward(self.block_end)

    def whole(self, data: bytes) -> None:
        """For a client that streams, the events that would have made this message."""
        message = parse_object(data.decode("utf-8", "replace")) or {}
        content = message.get("content")
        if not isinstance(content, list):
            self.decoder.read({**message, "type": "error"})
        elif self.answer.request.stream:
            stop = {name: message.get(name) for name in ("stop_reason", "stop_sequence", "stop_details")}
            message |= {**dict.fromkeys(stop), "content": []}
            frames = [whole_block(index, block) for index, block in enumerate(only_dicts(content))]
            end = messages_frame("message_delta", delta=stop, usage=message.get("usage"))
            frames.insert(0, messages_frame("message_start", message=message))
            self.feed(b"".join(frames) + end + MESSAGE_STOP)
        else:
            self.check_limits(len(data), len(content))
            self.decoder.whole(message)
            self.whole_text = dumps({**message, "model": self.answer.request.given["model"]})

    def close_open_items(self) -> None:
        if self.error is not None:
            return
        if self.whole_text or self.answer.request.stream:
            self.close_block()      # the key's limit left it open
        else:
            self.error = UpstreamError("The provider streamed its answer, which was not asked for.")

    def terminal(self, now_s: int) -> bytes:
        """The upstream's own end, if it sent one, completed."""
        if self.error is not None or not self.ending:
            return super().terminal(now_s)
        pings = b"".join(self.withheld)
        return self.take_output() + self.answer.start(self) + pings + self.ending + self.message_stop

    def body(self, now_s: int) -> str:
        return self.whole_text


# --- 5.12 the table ---

def openai_error(error: GatewayError, request_id: str) -> JSON:
    return error.body()


class ClientApi(NamedTuple):
    """An API that clients speak. Its name is also that of the wire whose providers speak it."""
    endpoint: str
    history: str                    # the field of the body that holds the conversation
    answer: type[ClientAnswer]
    error: Callable[[GatewayError, str], JSON] = openai_error     # its body, with the request's id
    # of another API than Responses: checks the body and returns all its fields but the conversation, the
    # instructions and the tools, as those of Responses; and these three, when a target needs them
    fields: Callable[[JSON], JSON] = dict
    translate: Callable[[ResponsesRequest], JSON] = lambda request: {}
    # paths of Responses fields -> the API's own, for messages
    own_names: Mapping[str, str] = {}
    # the code of an error -> the status, and words at its beginning, by which this API's clients know it
    known_errors: Mapping[str, tuple[int, str]] = {}
    untranslated: Mapping[str, str] = {}    # fields that only providers of this API take -> what to send

    def adapt_error(self, error: GatewayError) -> None:
        """Gives an error the status and the words of known_errors."""
        status, words = self.known_errors.get(error.code or "", (error.status, ""))
        if words.lower().rstrip(".") not in str(error).lower():
            error.args = (f"{words} {error}",)
        error.status = status


CLIENT_APIS: dict[str, ClientApi] = {
    "responses": ClientApi("/v1/responses", "input", ResponsesAnswer),
    "chat": ClientApi(
        "/v1/chat/completions", "messages", ChatAnswer,
        fields=chat_fields,
        translate=translate_chat,
        own_names=CHAT_OWN_NAMES,
        untranslated=ONLY_CHAT_SERVERS,
        known_errors={
            "insufficient_quota": (402, ""),        # agents ask again after a 429
            "context_length_exceeded": (400, "The input is over the maximum context length "
                                             "(context_length_exceeded)."),     # opencode's words, aider's
        }),
    "messages": ClientApi(
        "/v1/messages", "messages", MessagesAnswer,
        error=messages_error,
        fields=messages_fields,
        translate=translate_messages,
        own_names=MESSAGES_NAMES,
        known_errors={
            "insufficient_quota": (402, ""),
            "context_length_exceeded": (400, "Prompt is too long."),    # Claude Code compacts
        }),
}


def api_of(path: str) -> str:
    """The client API that a path belongs to; Responses for any other path."""
    found = (name for name, api in CLIENT_APIS.items() if path.startswith(api.endpoint))
    return next(found, "responses")


# === 6. providers ===
#
# A block per wire API: an encoder of the request, and a decoder that is fed events and calls a Sink.

def object_in(holder: JSON, name: str) -> JSON:
    """The member of this name if it is an object, else {}."""
    return as_dict(holder.get(name))


def objects_in(holder: JSON, name: str) -> list[JSON]:
    """The objects in the array of this name."""
    return only_dicts(holder.get(name))


# --- 6.0 errors of providers ---
#
# Routing goes by an error's kind, as its status misleads: Gemini answers a bad key with 400, llama.cpp
# refuses with 500.

ErrorKind: TypeAlias = Literal[
    "rate_limit", "quota", "overload", "network", "auth", "model_not_found", "context_length", "bad_request",
    "tool_generation"]


class ErrorClass(NamedTuple):
    """The client's error. Status 0: the provider's own if it is a 4xx, else 400."""
    status: int
    type: str = "server_error"
    code: str = "server_error"
    retryable: bool = True


ERROR_CLASSES: dict[ErrorKind, ErrorClass] = {
    "rate_limit":      ErrorClass(429, "rate_limit_error", "rate_limit_exceeded"),
    "quota":           ErrorClass(429, "insufficient_quota", "insufficient_quota"),
    "overload":        ErrorClass(503),
    "network":         ErrorClass(502),
    "auth":            ErrorClass(502),
    "model_not_found": ErrorClass(404, "invalid_request_error", "model_not_found"),
    "context_length":  ErrorClass(400, "invalid_request_error", "context_length_exceeded", retryable=False),
    "bad_request":     ErrorClass(0, "invalid_request_error", "invalid_request_error", retryable=False),
    "tool_generation": ErrorClass(502),
}

# The first match decides: a name of the failure (error_names, the HTTP status), or its message.
ERROR_RULES: list[tuple[ErrorKind, str, str]] = [
    ("tool_generation", "tool_use_failed", ""),
    ("context_length", "context_length_exceeded exceed_context_size_error model_context_window_exceeded",
     r"prompt (is )?too long|input token count|maximum context length|exceeds the (available )?context"
     r"|exceeds? (the )?max(imum)? context|range of input length"),
    # xAI reports an exhausted balance as 403; Gemini says "quota" for every limit, only PerDay is a long one
    ("quota", "http402 insufficient_quota billing_error billing_hard_limit_reached quota_exceeded "
     "usage_limit_reached",
     r"perday|insufficient (balance|credit|fund)|credit balance|(out of|any|more) credits|spend(ing)? limit"
     r"|arrearage"),
    ("auth", "http401 api_key_invalid authentication_error invalid_api_key unauthenticated", ""),
    ("rate_limit", "http429 rate_limit_error rate_limit_exceeded ratelimitreached resource_exhausted "
     "too_many_requests",
     r"rate.?limit|too many requests|throttling"),
    ("model_not_found", "model_not_found invalid_model deploymentnotfound",  # 400 at DeepSeek and OpenRouter
     r"not a valid model|supported api model names|model\b.{0,80}\b(does not exist|not found)"),
    # OpenRouter sends 403; OpenAI 404 for a reasoning item that it did not store
    ("bad_request", "", r"requires moderation|input was flagged|items are not persisted"
     r"|inappropriate content|invalidparameter"),
    ("auth", "http403 permission_error permission_denied", ""),
    ("model_not_found", "http404", ""),
    # llama.cpp answers 500 if the server was started without the feature
    ("bad_request", "", r"requires --jinja|mmproj|input is not supported|not supported by this model"),
    ("overload", "http408 http5xx overloaded_error api_error server_is_overloaded server_error internal "
     "unavailable internal_server_error service_unavailable deadline_exceeded timeout_error",
     r"overloaded"),
    # inside a stream there is no status, only the error's name
    ("bad_request", "http4xx invalid_request_error", ""),
]

MAX_UPSTREAM_TEXT = 300  # characters of a message that the client gets
MAX_SOURCE_TEXT = 65536  # characters searched for configured secrets
MAX_RETRY_AFTER_S = 60.0

# keys, tokens and paths
SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:sk|pk|rk|gsk|xai|hf|fw|tgp|csk|nvapi|pplx|key|org|proj)[-_][\w*.-]{6,}"
    r"|AIza[\w-]{10,}|AKIA\w{12,}|bearer\s+[^\s\"',]+|eyJ[\w-]{8,}\.[\w.-]+"
    r"|(?<=key=)[^\s&\"']+|[A-Za-z0-9+/]{40,}={0,2}"
    r"|(?<![\w:/.])/(?:home|root|Users|mnt|opt|var|tmp|data|srv|private|workspace|models)/[^\s\"',:;)]+",
    re.IGNORECASE)
ERROR_FIELDS = "error base_resp errors ret detail".split()
MESSAGE_FIELDS = "message msg error_msg errorMessage status_msg errmsg".split()
CODE_FIELDS = "code error_code errorCode statusCode status_code errcode".split()
STATUS_FIELDS = "status_code code status raw_status_code".split()
ANSWER_FIELDS = "choices candidates content output".split()
SUCCESS = re.compile(r"|0+|2\d\d|ok|null|none|true|success.*", re.IGNORECASE | re.DOTALL)
CODE = re.compile(r"(?!\d+$)[A-Za-z0-9_.-]{1,64}", re.ASCII)
STATUS = re.compile("[45][0-9][0-9]")
HTML_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
HTML_TAG = re.compile(r"<(style|script)\b.*?</\1\s*>|<[^>]*>", re.IGNORECASE | re.DOTALL)


class ProviderError(UpstreamError):
    """`status` and `code` are for the client, `kind` and `retry_after_s` for routing."""

    def __init__(
        self, message: str, *,
        kind: ErrorKind,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        upstream_status: int = 0,  # 0: in a stream, or no answer at all
        source_text: str = "",  # before `redacted` shortened it
    ) -> None:
        shown = ERROR_CLASSES[kind]
        status = shown.status or (upstream_status if 400 <= upstream_status < 500 else 400)
        super().__init__(message, status=status, type=shown.type, code=code or shown.code, param=param)
        if retry_after_s and kind in ("rate_limit", "overload"):
            self.headers = (("retry-after", str(math.ceil(retry_after_s))),)
        self.kind = kind
        self.retryable = shown.retryable
        self.retry_after_s = retry_after_s
        self.upstream_status = upstream_status
        self.source_text = source_text


def provider_error(status: int, headers: Headers, body: bytes, now_s: float = 0.0) -> ProviderError:
    return classify_error(decode_error(body.decode("utf-8", "replace")), status, headers, now_s)


def classify_error(
    decoded: Any, status: int = 0, headers: Iterable[tuple[str, str]] = (), now_s: float = 0.0,
) -> ProviderError:
    """Without an HTTP status the one in the error's own fields counts."""
    fields = error_object(decoded)
    numbers = map(str, map(fields.get, STATUS_FIELDS))
    status = status or int(next(filter(STATUS.fullmatch, numbers), 0))
    source = fields["message"] or (dumps(decoded) if decoded else "")
    names = error_names(fields)
    kind = error_kind({*names, f"http{status}", f"http{status // 100}xx"}, " ".join((source, *names)))
    answered = f"answered HTTP {status}" if status else "failed"
    message = redacted(source) or f"The provider {answered} without a reason."
    if kind == "auth" and not re.search("country|territory", source):
        message = "The provider refused the gateway's credentials."
        source = ""  # remarks on our key are not for the client
    code, param = str(fields["code"] or ""), fields.get("param")
    if kind != "bad_request" or not CODE.fullmatch(code):
        code = "server_is_overloaded" if "server_is_overloaded" in names else ""
    return ProviderError(
        message, kind=kind, code=code, param=param if isinstance(param, str) else None,
        retry_after_s=retry_after_s(Headers([*headers]), fields, now_s), upstream_status=status,
        source_text=source[:MAX_SOURCE_TEXT])


def error_kind(names: set[str], text: str) -> ErrorKind:
    for kind, known_names, pattern in ERROR_RULES:
        if not names.isdisjoint(known_names.split()) or (pattern and re.search(pattern, text, re.IGNORECASE)):
            return kind
    return "overload"


def error_object(decoded: Any) -> JSON:
    """The fields of an error of any form, at least `message` and `code`. The innermost wins: in `error` (or a
    string), MiniMax's `base_resp`, Cloudflare's `errors`, Alibaba's `ret`, FastAPI's `detail`."""
    fields: JSON = {"message": "", "code": None}
    while decoded:
        if isinstance(decoded, list):  # Gemini wraps one in an array; FastAPI lists several
            texts = [each for each in decoded if isinstance(each, str)]
            decoded = "; ".join(texts) or decoded[0]
            continue
        level = decoded if isinstance(decoded, dict) else {"message": decoded}
        text, code = (
            next(filter(None, map(level.get, names)), None) for names in (MESSAGE_FIELDS, CODE_FIELDS))
        fields |= without_empty({**level, "message": value_text(text), "code": code})
        if isinstance(level.get("loc"), list):  # FastAPI
            fields["param"] = place = ".".join(map(str, level["loc"]))
            fields["message"] = f"{place}: {fields['message']}"
        raw = object_in(level, "metadata").get("raw")
        if isinstance(raw, str):
            raw = decode_error(raw)
        inner = [each for each in (raw, *map(level.get, ERROR_FIELDS)) if isinstance(each, (str, list, dict))]
        decoded = next(filter(None, inner), None)
    return fields


def decode_error(text: str) -> Any:
    """An error's JSON, perhaps in an SSE event, else its text."""
    event = re.search(r"^data: ?(\{.*)", text, re.MULTILINE)
    try:
        return json.loads(event[1] if event else text)
    except (ValueError, RecursionError):
        return plain_text(text)


def error_names(fields: JSON) -> list[str]:
    """The provider's names for the failure, in lower case."""
    names = ["tool_use_failed"] if "failed_generation" in fields else []  # Groq
    holders = [fields, object_in(fields, "metadata")]
    for detail in objects_in(fields, "details"):
        holders += [detail, *objects_in(detail, "violations")]
    for holder in holders:
        values = map(holder.get, ("type", "code", "status", "error_type", "reason", "quotaId"))
        names += [value.lower() for value in values if isinstance(value, str)]
    return names


def states_error(body: JSON, whole: bool = False) -> bool:
    """Is an event, or a `whole` answer with 200, an error? With content only for `error` and `base_resp`."""
    if body.get("error") or is_failure(object_in(body, "base_resp").get("status_code")):
        return True
    if any(map(body.get, ANSWER_FIELDS)):
        return False
    if body.get("object") == "error" or body.get("errors") or body.get("detail"):
        return True
    fields = error_object(body)
    return is_failure(fields["message"]) and (whole or is_failure(fields["code"]) or "ret" in body)


def is_failure(code: Any) -> bool:
    return not SUCCESS.fullmatch(str(code))


def value_text(value: Any) -> str:
    """A string unchanged, null as "", and anything else as JSON."""
    if isinstance(value, str):
        return value.strip()
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def plain_text(text: str) -> str:
    """The title of an HTML page, else its text."""
    text = text[:8192]  # both patterns search for an end from every start
    title = HTML_TITLE.search(text)
    words = title[1] if title else HTML_TAG.sub(" ", text)
    return " ".join(words.split())


def redacted(text: str) -> str:
    """At most 300 characters, without anything that looks like a secret."""
    text = SECRET.sub("[redacted]", text[:4 * MAX_UPSTREAM_TEXT])
    return text if len(text) <= MAX_UPSTREAM_TEXT else text[:MAX_UPSTREAM_TEXT - 1] + "…"


def redact_configured(error: GatewayError, configured: re.Pattern[str]) -> None:
    """Removes the configured secrets, even one that `redacted` cut in two."""
    source = getattr(error, "source_text", "") or str(error)
    if configured.search(f"{source} {error.code} {error.param}"):
        error.args = (redacted(configured.sub("[redacted]", source)),)
        error.code = configured.sub("redacted", error.code)
        error.param = error.param and configured.sub("[redacted]", error.param)


# --- the time to wait

NUMBER = r"\d{1,12}(?:\.\d{1,12})?"  # bounded: on n digits \d+ takes n * n steps
DURATION = re.compile(f"({NUMBER})(ms|s|m|h)")
TRY_AGAIN = re.compile(f"(?:try again|retry) in ((?:{NUMBER}(?:ms|h|m|s))+|{NUMBER})", re.IGNORECASE)
UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
LIMIT_RESET = re.compile("x-ratelimit-reset-.*|anthropic-ratelimit-.*-reset")


def retry_after_s(headers: Headers, error: JSON, now_s: float) -> float | None:
    """At most 60, or None. The first source above 0 counts (Azure sends `retry-after-ms: 0` beside
    `retry-after: 1`), of exhausted limits the longest. Points in time are relative to Date, else `now_s`."""
    date_s = parse_time_s(headers.get("date")) or now_s
    texts = [
        headers.get("retry-after-ms") + "ms", headers.get("retry-after"),
        *(str(detail.get("retryDelay")) for detail in objects_in(error, "details")),
        *TRY_AGAIN.findall(error.get("message", ""))]
    waits = [wait_s(text, date_s) for text in texts]
    resets = [
        wait_s(value, date_s) for name, value in headers
        if LIMIT_RESET.fullmatch(name) and headers.get(name.replace("-reset", "-remaining"), "0") == "0"]
    for seconds in (*waits, max(resets, default=0.0)):
        if seconds > 0:
            return min(seconds, MAX_RETRY_AFTER_S)
    return None


def wait_s(text: str, date_s: float) -> float:
    """The seconds in "11.054s", "350ms", "1m2s" or "7", or from `date_s` to a point in time; else 0."""
    if parts := DURATION.findall(text):
        return sum(float(amount) * UNIT_S[unit] for amount, unit in parts)
    if re.fullmatch(NUMBER, text):
        return float(text)
    return parse_time_s(text) - date_s if date_s else 0.0


def parse_time_s(text: str) -> float:
    """The Unix time of an HTTP date or an RFC 3339 time; else 0."""
    for read in (email.utils.parsedate_to_datetime, datetime.datetime.fromisoformat):
        try:
            return read(text).timestamp()
        except (ValueError, TypeError, OverflowError, IndexError):
            continue
    return 0.0


# --- shared by all encoders

# the gateway answers these itself, or every wire carries them as far as it can
CARRIED_BY_ALL = frozenset("""model input instructions tools tool_choice parallel_tool_calls reasoning.summary
stream stream_options store background metadata client_metadata prompt_cache_key""".split())
# values that mean the default
NEUTRAL: dict[str, list[Any]] = {
    "text.verbosity": ["medium"],
    "service_tier": ["auto", "default"],
    "truncation": ["disabled"],
    "include": [[], ["reasoning.encrypted_content"]],
    "logprobs": [False],
    "modalities": [["text"]],
    **dict.fromkeys("temperature top_p n".split(), [1]),
    **dict.fromkeys("top_logprobs max_tool_calls presence_penalty frequency_penalty".split(), [0]),
}
# carried or without effect; other types are carried or reported as a whole
KNOWN_KEYS = {kind: {"type", "cache_control", *keys.split()} for kind, keys in {
    "function": "name description parameters strict defer_loading",
    "custom": "name description format defer_loading",
    "namespace": "name description tools",
    "tool_search": "execution description parameters",
    "web_search": "filters user_location external_web_access search_context_size search_content_types",
    "input_text": "text",
    "output_text": "text annotations logprobs",
    "input_image": "image_url file_id detail",
    "input_file": "file_data file_url file_id filename detail",
}.items()}


def unknown_keys(prefix: str, holders: Iterable[JSON]) -> Iterator[str]:
    """Keys that no wire carries, as PREFIX:TYPE.KEY."""
    for holder in holders:
        kind = str(holder.get("type"))
        known = KNOWN_KEYS.get(kind, holder.keys())
        for key in sorted(holder.keys() - known):
            if holder[key] is not None:
                yield f"{prefix}:{kind}.{key}"
        if kind == "namespace":
            yield from unknown_keys(prefix, holder["tools"])


def request_fields(body: JSON) -> JSON:
    """Those that are not null; nested ones by their paths."""
    fields: JSON = {}
    for name, value in body.items():
        nested = isinstance(value, dict) and name in ("reasoning", "text")
        fields |= {f"{name}.{key}": inner for key, inner in value.items()} if nested else {name: value}
    return {path: value for path, value in fields.items() if value is not None}


EFFORTS = "none minimal low medium high xhigh max".split()


def effort_value(values: str, effort: Any) -> str:
    """`values` has one for each of EFFORTS, the last for all that follow; "" for "-" and without an effort.
    An unknown effort counts as high (TRANSLATION.md 1.3)."""
    if not values or not effort:
        return ""
    known = effort if effort in EFFORTS else "high"
    return values.split()[:EFFORTS.index(known) + 1][-1].strip("-")


VENDOR = re.compile(r"^(?:.*?(?=claude-)|.*/(?=.))")


@functools.lru_cache(1000)
def bare_model_name(name: str) -> str:
    """Without the vendor (anthropic/, us.anthropic., models/), and with 4-5 for 4.5."""
    return VENDOR.sub("", name).replace(".", "-")


def longest_prefix(rows: Mapping[str, Any], model: str) -> Any:
    """The entry of the model's longest prefix, or None."""
    name = bare_model_name(model)
    prefixes = [
        prefix for prefix in rows
        if model.startswith(prefix) or name.startswith(bare_model_name(prefix))]
    return rows.get(max(prefixes, key=len, default=""))


def fill_table(table: dict[str, Any], usual: Any, text: str) -> None:
    """Adds a table of layer 14, whose rows are for several names and omit what is `usual`."""
    for names, fields in json.loads(text).items():
        base = table.get(fields.pop("like", None), usual)
        table |= dict.fromkeys(names.split(" "), base._replace(**fields))


def resolve_tool_choice(ctx: EncodeContext, subset_modes: Sequence[str] = ()) -> tuple[str, list[str]]:
    """tool_choice: "none", "auto" or "required", and the only tools that may be called, if any are named.
    Every wire can force one tool; in `subset_modes` it accepts several names."""
    choice = ctx.request.get("tool_choice", "auto")
    offered = ctx.tool_map.by_upstream_name
    if isinstance(choice, str):
        return choice, []
    if choice["type"] != "allowed_tools":
        choice = {"mode": "required", "tools": [choice]}
    mode = "required" if choice.get("mode") == "required" else "auto"
    names: list[str] = []
    for tool in objects_in(choice, "tools"):
        name = str(tool.get("name") or tool.get("type"))
        exact = upstream_tool_name(name, tool.get("namespace") or "")
        found = [flat for flat, known in offered.items() if exact == flat or name == known.name]
        names += [exact] if exact in found else found[:1]
    if not names:
        ctx.dropped.append("tool_choice")
        return "auto", []
    if mode in subset_modes or (mode == "required" and len(names) == 1):
        return mode, names
    if not offered.keys() <= set(names):  # all stay offered: prompt caches begin with them
        ctx.dropped.append("tool_choice.tools")
    return mode, []


def without_empty(fields: JSON) -> JSON:
    return {name: value for name, value in fields.items() if value not in (None, "", [], {})}


def fit_call_id(call_id: str, pattern: re.Pattern[str], length: int) -> str:
    return call_id if pattern.fullmatch(call_id) else sha256_hex(call_id)[:length]


LATER_SYSTEM = "<developer_message>\n{}\n</developer_message>"  # same history, same bytes


class TurnEncoder:
    """A History as a provider's messages. Subclasses have a method for each type of items, and for files."""
    PARTS = "content"  # the field for parts
    encode_file: Callable[[Attachment], JSON | None]

    def __init__(self, ctx: EncodeContext) -> None:
        self.history = ctx.history
        self.settings = ctx.settings
        self.dropped = ctx.dropped
        self.out: list[JSON] = []

    def encode_items(self) -> None:
        for item in self.history.items:
            getattr(self, item["type"])(item)

    def message(self, item: JSON) -> None:
        role = item["role"]
        parts = self.encode_parts(item["content"])
        if role in ("user", "assistant"):
            self.add(role, parts)
        else:
            self.add_system(text_of(parts, "\n\n"))

    def add(self, role: str, parts: list[JSON]) -> None:
        """Merges neighbours of one role: many servers require alternating ones."""
        if parts and role == self.last_role():
            self.out[-1][self.PARTS] += parts
        elif parts:
            self.out.append({"role": role, self.PARTS: parts})

    def last_role(self) -> str:
        return self.out[-1]["role"] if self.out else ""

    def add_system(self, text: str) -> None:
        """After the leading ones few servers have a place for it."""
        if text:
            self.add("user", [self.text_part(LATER_SYSTEM.format(text))])

    def add_fillers(self, may_begin: bool = False, may_end: bool = False) -> None:
        """Makes the user begin and end the conversation, unless the assistant may."""
        if self.last_role() == "assistant" and not may_end:
            self.add("user", [self.text_part("Continue.")])
        if not self.out or (self.out[0]["role"] == "assistant" and not may_begin):
            self.out.insert(0, {"role": "user", self.PARTS: [self.text_part("(continue)")]})

    def encode_parts(self, content: str | list[JSON]) -> list[JSON]:
        """Without empty texts; parts that the provider cannot take are named."""
        if isinstance(content, str):
            return [part for part in [self.text_part(content)] if part]
        parts = []
        for given in content:
            part = self.encode_part(given)
            if part is None:
                self.dropped.append(f"content:{given['type']}")
            elif part:
                parts.append(part)
        return parts

    def encode_part(self, part: JSON) -> JSON | None:
        if file := read_attachment(part):
            return self.encode_file(file)
        text = part.get("text", part.get("refusal"))
        return self.text_part(text) if isinstance(text, str) else None

    def text_part(self, text: str) -> JSON:
        return text_block(text) if text else {}


# --- 6.1 responses: OpenAI's own API and its dialects ---

ENVELOPED = re.compile(rb'"(pmx1\.[A-Za-z0-9_-]+)"')
# an escaped ASCII letter, digit, "-" or "." may hide a key or an envelope
LETTER_ESCAPE = re.compile(rb"\\u00(?:2[de]|3\d|[4-7])")


def splice_model(request: ResponsesRequest, model: str, added: JSON) -> tuple[bytes, bool]:
    """The client's own bytes with `model` replaced and fields added, and whether that is exact."""
    named = dumps({"model": model, **added})[len('{"model":'):-1].encode()
    # a NUL, which JSON cannot contain, takes the place of a long input
    raw, around = request.raw, request.around
    start, end = around.start or len(raw), len(raw) - around.behind
    outside, models = MODEL_FIELD.subn(
        lambda at: at[0].removesuffix(at[1]) + named,
        raw[:start] + b"\0" + raw[end:])
    exact = models == 1 and not LETTER_ESCAPE.search(outside)
    return outside.replace(b"\0", raw[start:end]), exact


def passthrough_body(request: ResponsesRequest, items: list[JSON], dropped: list[str], model: str) -> bytes:
    """The client's own bytes with `model` replaced, `store` false (only the gateway keeps state) and the
    envelopes of `items` opened: spliced if that is exact, otherwise encoded again."""
    body = request.body
    envelopes: dict[bytes, bytes] = {}
    for given, item in zip(request.input, items):
        if "sealed_replay" in item:
            item.update(item.pop("sealed_replay"))
            if not dropped:  # otherwise the two lists do not match
                envelope = given["encrypted_content"].encode()
                envelopes[envelope] = json_string(item["encrypted_content"]).encode()
    spliced, exact = splice_model(request, model, {} if "store" in body else {"store": False})
    if envelopes and exact:
        spliced, opened = ENVELOPED.subn(lambda at: envelopes.get(at[1], at[0]), spliced)
        exact = opened == len(envelopes) and not LETTER_ESCAPE.search(spliced)
    if exact and not dropped and body is request.given and body.get("store", False) is False:
        return spliced
    body = {**body, "model": model, "store": False}
    if isinstance(body["input"], list):
        body["input"] = items
    return dumps(body).encode()


# Any Responses server should know these.
RESPONSES_FIELDS = """max_output_tokens temperature top_p text.verbosity text.format reasoning.effort
reasoning.summary truncation include prompt_cache_key service_tier""".split()


def encode_responses(ctx: EncodeContext) -> JSON:
    """For a server that knows messages, functions and reasoning, and refuses everything else."""
    history, functions = ctx.history, ctx.tool_map.functions
    body: JSON = {"model": ctx.model}
    if history.system:
        body["instructions"] = "\n\n".join(history.system)
    body["input"] = [responses_item(item, index) for index, item in enumerate(history.items)]
    if functions:
        mode, names = resolve_tool_choice(ctx)
        body["tools"] = [{"type": "function", "strict": None, **function} for function in functions]
        body["tool_choice"] = {"type": "function", "name": names[0]} if names else mode
        body["parallel_tool_calls"] = ctx.request.get("parallel_tool_calls", True)
    fields = {path: ctx.take(path) for path in RESPONSES_FIELDS}
    for path, value in without_empty(fields).items():
        outer, _, name = path.rpartition(".")
        holder = body.setdefault(outer, {}) if outer else body
        holder[name] = value
    return {**body, "stream": ctx.request.stream, "store": False}


def responses_item(item: JSON, index: int) -> JSON:
    """In the strictest reading of the API: ids only if the SDK's types require them."""
    if item["type"] == "reasoning":
        return {"type": "reasoning", "id": f"rs_{index}", "summary": [], **item["sealed_replay"]}
    if item["type"] == "message":
        assistant = item["role"] == "assistant"
        fixed = {"id": f"msg_{index}", "status": "completed"} if assistant else {}
        parts = [responses_part(part, assistant) for part in item["content"]]
        return {"type": "message", **fixed, "role": item["role"], "content": parts}
    output = item.get("output")
    if isinstance(output, list) and all(part["type"] in ("input_text", "output_text") for part in output):
        # llama.cpp accepts only strings (ggml-org/llama.cpp#23465)
        return {**item, "output": text_of(output)}
    return item


def responses_part(part: JSON, assistant: bool) -> JSON:
    if part["type"] == "input_image":
        return {"detail": "auto", **part}
    if "text" not in part:
        return part
    if assistant:
        return {"type": "output_text", "text": part["text"], "annotations": []}
    return {"type": "input_text", "text": part["text"]}


def drop_encrypted(body: JSON) -> None:
    if isinstance(body["input"], list):
        body["input"] = [item for item in body["input"]
                         if item.get("type") != "reasoning" and "encrypted_content" not in item]


# Patterns of refusals that every later turn would meet, and the change of the body for each, called with the
# pattern's groups. What a model cannot take is a setting: `overrides`.
Repairs: TypeAlias = dict[str, Callable[..., None]]
def drop_reasoning(body: JSON, *refused: str) -> None:
    """The model does not reason, or not at this effort."""
    for name in ("reasoning", "include"):
        body.pop(name, None)


RESPONSES_REPAIRS: Repairs = {
    r"value: '(none|minimal)' is not supported|parameter: '(reasoning)|(encrypted) content is not supported":
        drop_reasoning,
    # Another organisation, region or key sealed it. Some gateways drop the code (lidge-jun/opencodex#2269).
    r"invalid_encrypted_content|encrypted content .*could not be|could not be verified|item with id .rs_"
    r"|of type .reasoning. was provided without": drop_encrypted,
    # a model that does not reason
    "encrypted content is not supported": lambda body: body.pop("include", None),
}


# codes of refusals: another target would refuse too, and clients act on them (CODEX.md 7.3)
REFUSED = re.compile(r"invalid_\w+|\w*image\w*|\w+_policy(_violation)?")


def responses_error(error: Any) -> GatewayError:
    if isinstance(error, dict) and REFUSED.fullmatch(str(error.get("code"))):
        error = {**error, "type": "invalid_request_error"}
    return classify_error(error)


class TextDelta(NamedTuple):
    """A piece of an open item's text, and nothing else."""
    field: str
    pieces: list[str]  # the decoder's list of them
    key: Any  # for the sink
    channel: PartType


class Decoder:
    """Reads one upstream stream and calls its sink."""
    sink: Sink
    delta: TextDelta | None = None  # of the last event; none for Responses, which numbers its events
    failed = False
    paused: list[JSON] = []  # of a paused turn: to be returned to the provider

    items_begun = 0  # by the helpers, on wires whose items have no number of their own
    notice: ProviderError | None = None  # reported if nothing else follows

    def __init__(self, tool_map: ToolMap, settings: Any = None, prefix: str = "call_") -> None:
        self.tool_map = tool_map
        self.settings = settings  # of the model or the server
        self.prefix = prefix  # of call ids made here: unique in the conversation
        self.call_ids: set[str] = set()

    def feed(self, data: str, name: str = "") -> None:
        """Ignores unknown events; UpstreamError for an unreadable one. The name alone may mark an error."""
        data = data.strip()
        if name == "error":
            error = parse_object(data) or {"message": plain_text(data)}
            data = data if error.get("error") else dumps({"error": error})
        if data == "[DONE]":
            self.on_done()
        elif data:
            self.read(provider_json(data))

    def on_done(self) -> None:
        """Handles [DONE], which only a chat stream needs."""

    def read(self, event: Any) -> Any:
        """For Responses, returns the UpstreamItem that the event begins or ends."""
        try:
            return self.on_event(event)
        except ProviderError as error:
            self.failed = True
            self.sink.fail(error)
        except (ValueError, KeyError, TypeError, AttributeError):
            text = "The provider's answer does not have the form that its API defines."
            raise UpstreamError(text) from None

    def on_event(self, event: Any) -> Any:
        """Calls the method for its type, if any. ProviderError: it reports an error."""
        name = event_type(event).removeprefix("response.").replace(".", "_")
        handler = getattr(self, f"on_{name}", None)
        return handler and handler(event)

    def whole(self, body: Any) -> None:
        """Reads an answer that was not streamed; Gemini's may be an array."""
        self.read(body)

    def end(self) -> None:
        """A clean end of the body is no evidence that the model had finished."""
        if self.notice and not self.items_begun:
            self.sink.fail(self.notice)

    def _new_key(self) -> int:
        self.items_begun += 1
        return self.items_begun - 1

    def _call_id(self, item_key: int, given: Any) -> str:
        """The provider's, or one made here if it is missing or was used before."""
        call_id = str(given or f"{self.prefix}{item_key}")
        if call_id in self.call_ids:
            call_id = f"{call_id}_{item_key}"
        self.call_ids.add(call_id)
        return call_id

    def _carry(self, replay: JSON) -> None:
        """Ends the open reasoning item, or a new one, with what the next turn must return."""
        self.sink.text("", "summary")
        self.sink.done(sealed_replay=replay)

    def _image(self, data: str) -> None:
        self._new_key()
        self.sink.open(None, "image_generation_call", result=None)
        self.sink.done(result=data)

    def _annotate(self, start: int, end: int, source: JSON) -> None:
        """Adds the source of some characters of the open message, if it has an address."""
        if isinstance(source.get("url"), str):
            self.sink.annotate({
                "type": "url_citation", "start_index": start, "end_index": end,
                "url": source["url"], "title": source.get("title") or ""})


class ResponsesDecoder(Decoder):
    """Servers may omit `added`, deltas, `done` or the final output: each fact is read once, from any."""
    asked_12h = False  # of the prompt cache
    ended = False

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.items = UpstreamItems()

    def stray_error(self, data: str, named: bool = False, whole: bool = False) -> GatewayError | None:
        """The failure in data that is not an event of this API."""
        body = parse_object(data) or {}
        if not named and not states_error(body, whole):
            return None
        return responses_error(body.get("error") or body or data)

    def on_event(self, event: Any) -> Any:
        family, _, step = event_type(event).removeprefix("response.").rpartition(".")
        if family in TEXTS and step in ("delta", "done"):
            return self._text(event, family, step)
        return super().on_event(event)

    def whole(self, body: JSON) -> None:
        """Like the last event of a stream."""
        response = as_dict(body)
        error, status = response.get("error"), response.get("status")
        if not isinstance(response.get("output"), list) and not error:
            raise UpstreamError("The provider's answer is not a response object.")
        if status not in ("incomplete", "failed"):
            status = "failed" if error else "completed"
        self.read({"type": f"response.{status}", "response": response})

    def end(self) -> None:
        """If every item is done, the model had finished, but not after reasoning alone."""
        kinds = {known.kind for known in self.items}
        if not self.ended and not self.items.open_count and not kinds <= {"reasoning"}:
            incomplete = any(known.item.get("status") == "incomplete" for known in self.items)
            self._conclude([], Stop("max_output_tokens" if incomplete else ""))

    def on_output_item_done(self, event: JSON) -> UpstreamItem:
        item = event.get("item") or {}
        known = self.items.take(event, item_kind(item))
        if event["type"] == "response.output_item.done":
            self._finish(known, item)
        elif known.kind != "call" or item.get("name"):
            self._show(known, item)
        return known

    on_output_item_added = on_output_item_done

    def _show(self, known: UpstreamItem, item: JSON) -> None:
        """Kinds without texts are sent whole, once done."""
        if known.shown:
            return
        known.shown = True
        kind, index = item.get("type"), known.index
        if known.kind == "call":
            tool = Tool(item["type"], str(item.get("name") or ""), str(item.get("namespace") or ""))
            if kind == "function_call" and not tool.namespace:
                tool = self.tool_map.resolve(tool.name)
            self.sink.call(index, str(item.get("call_id") or f"call_{index}"), tool)
        elif kind in TEXT_KINDS:
            fields = {"phase": item["phase"]} if item.get("phase") else {}
            self.sink.open(index, kind, **fields)
        for text in known.texts:
            self._extend(known, text, "")

    def _text(self, event: JSON, name: str, step: str) -> None:
        channel, kind, field = TEXTS[name]
        done = step == "done"
        text = as_text(event.get(field)) if done else event.get("delta")
        if not text or not isinstance(text, str):
            return
        known = self.items.take(event, kind)
        if known.kind == kind:
            number = event.get("content_index", event.get("summary_index", 0))
            place = known.text(channel, number, done)
            add = self._complete if done else self._extend
            add(known, place, text)

    def on_content_part_done(self, event: JSON) -> None:
        part = object_in(event, "part")
        if part.get("type") in TEXTS:
            self._text({**event, **part}, part["type"], "done")

    on_reasoning_summary_part_done = on_content_part_done

    def _extend(self, known: UpstreamItem, text: UpstreamText, piece: str) -> None:
        """Empty arguments wait: `{}` may be a placeholder for later ones."""
        if not known.shown and known.kind != "call":  # late `added` (litellm#22102); a call needs a name
            self._show(known, {"type": known.kind})
        text.pieces.append(piece)
        if known.closed or not known.shown:
            return
        if not text.sent:
            piece = text.so_far()
            if text.channel == "arguments":
                piece = piece.lstrip().removeprefix("{}").lstrip()
                text.pieces[0] = piece
            text.sent = piece not in ("", "{")
        if text.sent:
            self.sink.add(known.index, piece, text.channel, text.index)

    def _complete(self, known: UpstreamItem, text: UpstreamText, whole: str) -> None:
        """Adds what is beyond the pieces. An item's last text may grow, none may shrink."""
        so_far = text.so_far()
        if text is known.texts[-1] and whole.startswith(so_far):
            self._extend(known, text, whole[len(so_far):])

    def _merge(self, known: UpstreamItem, snapshot: JSON) -> None:
        """Adds what is beyond the item's events."""
        texts = item_texts(snapshot)
        found = pair(
            texts, known.texts, lambda text: (text.channel, text.so_far()), lambda text: text.channel)
        for new in texts:
            text = found.get(new) or known.text(new.channel, new)
            self._complete(known, text, new.so_far())
            for annotation in new.annotations:
                if known.annotation_count:
                    known.annotation_count -= 1
                else:
                    self.sink.annotate(annotation, known.index)

    def on_output_text_annotation_added(self, event: JSON) -> None:
        known = self.items.take(event, "message")
        annotation = event.get("annotation")
        if known.shown and not known.closed and isinstance(annotation, dict):
            known.annotation_count += 1
            self.sink.annotate(annotation, known.index)

    def _finish(self, known: UpstreamItem, item: JSON) -> None:
        """Of an item that its server calls done. Without content it waits for the final response."""
        self._show(known, item)
        if known.closed:
            return
        self.items.open_count -= not known.done
        added = known.item
        known.done = True
        known.item = {**added, **item}
        if known.kind not in TEXT_KINDS:
            known.closed = True
            self.sink.item(item)
            return
        self._merge(known, item)
        if not known.texts:
            self._merge(known, added)
        if is_incomplete_call(item):
            known.closed = True  # the sink closes it at the end of the answer
        elif known.texts or known.kind == "reasoning":
            self._close(known)

    def _close(self, known: UpstreamItem) -> None:
        for text in known.texts:
            if not text.sent and text.so_far():  # the start of the arguments
                self.sink.add(known.index, text.so_far(), text.channel, text.index)
        known.closed = True
        item = known.item
        fields: JSON = {}
        if item.get("status") == "incomplete":
            fields["status"] = "incomplete"
        sealed = item.get("encrypted_content")
        if sealed and isinstance(sealed, str):  # Copilot's is bound to the id: "item_id did not match"
            fields["sealed_replay"] = without_empty({"encrypted_content": sealed, "id": item.get("id")})
        self.sink.done(known.index, **fields)

    def on_completed(self, event: JSON) -> None:
        response = event.get("response") or {}
        usage = usage_from(response.get("usage"), response, self.asked_12h)
        if usage is not None:
            self.sink.set_usage(usage)
        if event["type"] == "response.failed":
            self.sink.fail(responses_error(response.get("error") or {}))
            return
        reason = ""
        # for Codex a gateway marks an incomplete answer as `completed`, but the object's status is true
        if event["type"] == "response.incomplete" or response.get("status") == "incomplete":
            reason = object_in(response, "incomplete_details").get("reason") or "max_output_tokens"
        self._conclude(response.get("output") or [], Stop(reason, final=True))

    on_incomplete = on_failed = on_completed

    def add_final(self, output: list[JSON]) -> None:
        for known, item in self.items.take_final(output):
            self._finish(known, item)

    def _conclude(self, output: list[JSON], stop: Stop) -> None:
        """Reads what only the final response has, then ends the items that waited for it."""
        self.add_final(output)
        complete = not stop.incomplete_reason
        for known in self.items:
            item, call = known.item, known.kind == "call"
            if known.closed:
                continue
            if known.done:
                if complete or not call or item.get("arguments"):
                    self._close(known)
            elif call and complete and item.get("name") and known.texts:
                text = known.texts[0]
                if text.channel == "input" or parse_object(text.so_far()) is not None:
                    self._finish(known, {**item, "status": "completed"})  # only its `done` is missing
        self.ended = True
        self.sink.set_stop(stop)

    def on_error(self, event: JSON) -> None:
        self.sink.fail(responses_error(event.get("error") or event))


def event_type(event: JSON) -> Any:
    """Without a type it is an error or a proxy's heartbeat (`event: ping`, `data: {}`)."""
    if event.get("type") is None:
        return "error" if states_error(event) else ""
    return event["type"]


def provider_json(data: str | bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UpstreamError("The provider's answer is not JSON.") from None


# why an answer ended -> incomplete_reason or kind of failure: agents repeat empty answers (coder#28470)
END_REASONS: dict[str, Any] = {reason: outcome for outcome, reasons in {
    # pause_turn: of a pause that cannot be resumed
    "max_output_tokens": "length max_tokens max_output_tokens model_length model_context_window_exceeded "
    "repetition continuation pause_turn",
    "content_filter": "content_filter safety sensitive refusal recitation language blocklist spii no_image "
    "prohibited_content image_safety image_prohibited_content image_recitation image_other model_armor "
    "escalation pup_limited_disabled",
    "overload": "error abort network_error insufficient_system_resource",
    "tool_generation": "function_call_filter malformed_function_call malformed_response "
    "unexpected_tool_call too_many_tool_calls",
}.items() for reason in reasons.split()}


def search_action(queries: list[str]) -> JSON:
    return {"type": "search", "query": queries[0] if queries else "", "queries": queries}


# --- 6.2 chat: Chat Completions and its dialects ---
#
# One wire API for some forty kinds of server: requests differ by DIALECTS, one decoder reads all streams.

class EffortRule(NamedTuple):
    """One of EFFORT_FORMS, a value for each of EFFORTS, if any, and what is `always` part of a request."""
    form: str = "effort"
    values: str = ""
    always: Mapping[str, Any] = {}


class Dialect(NamedTuple):
    """The properties of one kind of chat server."""
    max_tokens: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    replay: Literal["", "reasoning_content", "reasoning_details", "thinking"] = ""  # the reasoning's field
    replay_always: bool = False  # calls without it are refused, even if empty: "must be passed back"
    efforts: Mapping[str, JSON] = {}  # by a part of the model's name: the first match counts
    think_tags: bool = False  # an answer may begin with <think>
    system_anywhere: bool = False
    strict_tools: bool = False
    tool_parts: bool = False  # tool results may contain images
    files: bool = False  # {"type": "file"} parts
    json_schema: bool = True  # response_format may be a schema
    forced_choice: bool = True  # tool_choice may force a call
    short_ids: bool = False  # call ids must be nine letters or digits
    reasoning_within: bool = False  # completion_tokens include the reasoning even if its count is larger
    tool_stream: bool = False  # arguments are streamed only on request; otherwise minutes pass in silence
    passthrough_fields: Sequence[str] = ()


DIALECTS: dict[str, Dialect] = {}  # filled in layer 14


# --- the request

SHORT_CALL_ID = re.compile("[a-zA-Z0-9]{9}")
CALL_ID = re.compile(".{0,40}", re.DOTALL)  # OpenAI: "Expected a string with maximum length 40"


SAMPLING_FIELDS = "temperature top_p stop seed presence_penalty frequency_penalty".split()  # of all servers


def encode_chat(ctx: EncodeContext) -> JSON:
    dialect: Dialect = ctx.settings
    shape, instruction = response_format(ctx.take("text.format", {}), dialect)
    thinking = chat_thinking(ctx)
    body: JSON = {"model": ctx.model, "messages": ChatMessages(ctx).encode(instruction)}
    if ctx.tool_map.functions:
        forbids_thinking = thinking.get("thinking") == {"type": "disabled"}
        body |= chat_tools(ctx, dialect.forced_choice or forbids_thinking)
    for path in (*SAMPLING_FIELDS, *dialect.passthrough_fields):
        body[path.rpartition(".")[2]] = ctx.take(path)
    if "prompt_cache_key" in body:
        body["prompt_cache_key"] = ctx.request.cache_key()
    body[dialect.max_tokens] = ctx.take("max_output_tokens")
    body |= {**thinking, "response_format": shape}
    if ctx.request.stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
        if dialect.tool_stream and ctx.tool_map.functions:
            body["tool_stream"] = True
    return without_empty(body)


def chat_tools(ctx: EncodeContext, may_force: bool) -> JSON:
    """tools, tool_choice and parallel_tool_calls, which only work together."""
    tools = []
    for given in ctx.tool_map.functions:
        function = {**given}
        if not ctx.settings.strict_tools:  # most servers refuse a tool with it
            function.pop("strict", None)
        tools.append({"type": "function", "function": function})
    mode, names = resolve_tool_choice(ctx)
    choice: Any = None  # like auto: every server's default
    if mode == "required" and not may_force:
        ctx.dropped.append("tool_choice")
    elif names:
        choice = {"type": "function", "function": {"name": names[0]}}
    elif mode != "auto":
        choice = mode
    parallel = ctx.request.get("parallel_tool_calls")
    return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel}


def response_format(shape: JSON, dialect: Dialect) -> tuple[JSON | None, str]:
    """response_format, and an instruction for servers that support no schemas."""
    kind = shape.get("type", "text")
    if kind == "json_schema" and dialect.json_schema:
        known = {name: shape.get(name) for name in ("name", "description", "schema", "strict")}
        return {"type": kind, kind: without_empty(known)}, ""
    if kind == "json_schema":
        schema = dumps(shape["schema"])
        return {"type": "json_object"}, f"Answer with one JSON object that fits this JSON schema:\n{schema}"
    return None if kind == "text" else {"type": kind}, ""


EFFORT_FORMS: dict[str, Callable[[str], JSON]] = {  # value -> request fields
    "effort": lambda value: {"reasoning_effort": value},
    "reasoning": lambda value: {"reasoning": {"effort": value}},
    "template": lambda value: {"chat_template_kwargs": {"enable_thinking": value == "enabled"}},
    "thinking": lambda value: {"thinking": {"type": value}},
    "thinking_effort": lambda value: {"thinking": {"type": "enabled"}, "reasoning_effort": value}
    if value != "disabled" else {"thinking": {"type": value}},
    "budget": lambda value: {"enable_thinking": value != "0", "thinking_budget": int(value) or None},
}


def chat_thinking(ctx: EncodeContext) -> JSON:
    name = ctx.model.lower()
    fitting = (rule for part, rule in ctx.settings.efforts.items() if part in name)
    rule = EffortRule(**next(fitting, {}))
    value = ctx.take_effort(rule.values)
    asked = EFFORT_FORMS[rule.form](value) if value else {}
    return {**rule.always, **asked}


class ChatMessages(TurnEncoder):
    """An assistant's turn is one message, followed by the results of its calls."""

    def encode(self, closing: str) -> list[JSON]:
        """All messages; `closing` ends the system message."""
        for turn in self.history.turns:
            if turn.role == "assistant":
                self._assistant_turn(turn)
            else:
                for item in turn.items:
                    self.message(item)
        # Mistral and Claude behind a router refuse a final assistant message
        self.add_fillers(may_begin=True)
        for message in self.out:  # joined once: merging neighbours one by one is quadratic
            parts = message["content"]
            if message["role"] == "user" and all(part["type"] == "text" for part in parts):
                message["content"] = text_of(parts, "\n\n")
        system = "\n\n".join(filter(None, (*self.history.system, closing)))
        if system:
            self.out.insert(0, {"role": "system", "content": system})
        return self.out

    def add_system(self, text: str) -> None:
        if self.settings.system_anywhere:
            self.out.append({"role": "system", "content": text})
        else:
            self.add("user", [text_block(LATER_SYSTEM.format(text))])

    def _assistant_turn(self, turn: Turn) -> None:
        parts: list[JSON] = []
        replays: list[JSON] = []
        calls: dict[str, JSON] = {}
        for item in (*turn.items, *turn.calls):
            if item["type"] == "message":
                parts += self.encode_parts(item["content"])
            elif item["type"] == "reasoning":
                replays.append(item["sealed_replay"])
            else:
                calls[item["call_id"]] = {
                    "id": self._call_id(item["call_id"]), "type": "function",
                    "function": {"name": item["name"], "arguments": item["arguments"]}}
        text = text_of(parts, "\n\n")
        if not text and not calls:
            return
        message: JSON = {"role": "assistant", "content": text}  # Mistral and llama.cpp need even an empty one
        self.out.append(message)
        form = self.settings.replay
        pieces = [replay[form] for replay in replays if form in replay]
        reasoning: Any = "".join(pieces) if form == "reasoning_content" else [*itertools.chain(*pieces)]
        if form == "thinking" and reasoning:
            message["content"] = [*reasoning, text_block(text)] if text else reasoning
        elif reasoning or (form and calls and self.settings.replay_always):
            message[form] = reasoning or ""
        for replay in replays:
            for extra in replay.get("extra_content", ()):
                calls.get(extra["id"], {})["extra_content"] = extra["extra_content"]
        if calls:
            message["tool_calls"] = [*calls.values()]
            self._add_results(turn.results)

    def _add_results(self, results: list[JSON]) -> None:
        images: list[JSON] = []  # for the user message after them
        for result in results:
            output = result["output"]
            parts = [] if isinstance(output, str) else self.encode_parts(output)
            content: Any = text_of(parts or output, "\n")
            others = [part for part in parts if part["type"] != "text"]
            if others and self.settings.tool_parts:
                content = parts
            elif others:  # elsewhere a tool message is only text
                images += [text_block(f"Images from tool call {result['call_id']}:"), *others]
                content = content or "The images follow."
            call_id = self._call_id(result["call_id"])
            self.out.append({"role": "tool", "tool_call_id": call_id, "content": content})
        self.add("user", images)

    def _call_id(self, given: str) -> str:
        if self.settings.short_ids:
            return fit_call_id(given, SHORT_CALL_ID, 9)
        return fit_call_id(given, CALL_ID, 40)

    def encode_file(self, file: Attachment) -> JSON | None:
        name = file.name or "file"
        if file.text is not None:
            return text_block(f'<file name="{name}">\n{file.text}\n</file>')
        url = file.url or f"data:{file.mime};base64,{file.data}"
        if file.mime.startswith("image/") and (file.url or file.mime in IMAGE_TYPES):
            image = {"url": url}
            if file.detail in ("low", "high"):  # auto is the default; other values are unknown
                image["detail"] = file.detail
            return {"type": "image_url", "image_url": image}
        if file.url or not file.mime or not self.settings.files:
            return None
        return {"type": "file", "file": {"filename": name, "file_data": url}}


# --- the answer

scan_string = vars(json.decoder)["scanstring"]  # unknown to type checkers


REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # one text may come in two of them
TEXT_CHANNELS: dict[str, PartType] = {"content": "text", **dict.fromkeys(REASONING_FIELDS, "summary")}
IGNORED_FIELDS = frozenset(
    "id object created model provider system_fingerprint service_tier choices index delta role".split())


ESCAPED = re.compile(r"\\.", re.DOTALL)


@dataclass(slots=True)
class ChatCall:
    name: str
    id: str = ""  # "" if missing
    item_key: int | None = None  # None: neither name nor item has arrived
    closed: bool = False
    streamed: bool = False  # its arguments arrived after its item
    next_name: str = ""  # its name, if a piece without arguments repeated it
    arguments: io.StringIO = field(default_factory=io.StringIO)
    last: str = ""  # the last that is not blank
    held: str = ""  # a piece whose meaning the next one shows
    scanned: int = 0  # characters scanned for braces
    depth: float = 0
    quote: str = ""  # of an open string

    @property
    def text(self) -> str:
        return self.arguments.getvalue() + self.held

    def add(self, piece: str) -> str:
        """What is new in it: some servers repeat pieces. Ambiguous ones are held; the last is empty."""
        held, self.held = self.held, ""
        length = self.arguments.tell()
        if held and not piece.lstrip().startswith(held.rstrip(" }")):
            is_more = piece or parse_object(self.text + held) is not None
            new = self._append(held if is_more else held[length:])
            return new + self.add(piece)
        rest = None
        if self.last and length <= 2 * len(piece):  # a shorter piece repeats nothing
            rest = rest_of_snapshot(self.text, piece)
        # {} may be a placeholder; does {"a":1} continue {"a": or repeat it?
        is_placeholder = not self.last and parse_object(piece) == {}
        if is_placeholder or (rest is not None and self.last in ":[,"):
            self.held = piece
            return ""
        return self._append(piece if rest is None else rest)

    def _append(self, text: str) -> str:
        self.arguments.write(text)
        self.last = text.rstrip()[-1:] or self.last
        return text

    def is_complete(self) -> bool:
        """Are the arguments one JSON object? Each piece is scanned once."""
        if self.held:
            return parse_object(self.text) is not None
        if self.last != "}":
            return False
        self.arguments.seek(self.scanned)
        text = self.quote + self.arguments.read()
        self.scanned = self.arguments.tell()
        parts = ESCAPED.sub("", text).split('"')
        self.quote = "" if len(parts) % 2 else '"'
        unquoted = "".join(parts[::2])
        self.depth += unquoted.count("{") - unquoted.count("}")
        if self.depth == 0 and parse_object(self.text) is None:
            self.depth = math.inf  # it can never become JSON
        return self.depth == 0

    def is_followed_by(self, call_id: str, name: str, arguments: str) -> bool:
        """Does a piece with this call's key begin another call? Ollama and many shims number all calls 0."""
        if name and self.name and name != self.name:
            return True
        if call_id and self.id:  # an id that only rotates comes without a name, or with the same name
            if call_id == self.id:
                return False
            is_bare = not self.name or not self.arguments.tell()
            return self.is_complete() or bool(name and is_bare)
        if not arguments.strip() or not (name or self.next_name) or not self.is_complete():
            return False
        # without an id: perhaps the snapshot of a call that was streamed or has one; whole calls may be alike
        may_be_snapshot = not self.next_name and (self.streamed or self.id)
        return not may_be_snapshot or rest_of_snapshot(self.text, arguments) is None


def rest_of_snapshot(text: str, snapshot: str) -> str | None:
    """What a snapshot has beyond `text`; None if it does not repeat it in any spelling."""
    if snapshot.startswith(text):
        return snapshot[len(text):]
    arguments = parse_object(text)
    return None if arguments is None or arguments != parse_object(snapshot) else ""


THINK, END_THINK = "<think>", "</think>"


class ThinkTags:
    """Separates content from reasoning in leading <think> tags. Where a field carries the reasoning too, the
    text in the tags waits for their end: a second copy is dropped."""

    def __init__(self, expected: bool, reasoning: list[str]) -> None:
        # start, inside, waiting (inside, and a field may have the text), behind; "" if no tag can come
        self.place = "start" if expected else ""
        self.held = ""  # perhaps the beginning of a tag
        self.waiting: list[str] = []
        self.reasoning = reasoning  # of fields and tags; the decoder adds to it

    def read(self, content: str) -> tuple[str, str]:
        text, self.held = self.held + content, ""
        reasoning = ""
        if self.place == "start":
            bare = text.lstrip()
            if not bare.startswith(THINK):
                self.held = text
                return ("", "") if THINK.startswith(bare) else self.flush()
            self.place = "waiting" if self.reasoning else "inside"
            text = bare.removeprefix(THINK)
        if self.place in ("inside", "waiting"):
            reasoning, tag, text = text.partition(END_THINK)
            start, mark, rest = reasoning.rpartition("<")
            if not tag and END_THINK.startswith(mark + rest):
                reasoning, self.held = start, mark + rest
            if self.place == "waiting":
                self.waiting.append(reasoning)
                reasoning = ""
            if tag:
                waiting = "".join(self.waiting)
                if waiting.strip() not in "".join(self.reasoning):
                    reasoning = waiting
                self.place = "behind"
        text = text.lstrip()
        if text:
            self.place = ""
        return reasoning, text

    def flush(self) -> tuple[str, str]:
        """The rest, when no tag can follow. A tag that never ended is text if its text waits."""
        held, self.held = self.held, ""
        place = self.place
        if place == "waiting":
            waiting, _ = self.read(END_THINK)
            held = THINK + waiting + held if waiting else ""
        self.place = ""
        return (held, "") if place == "inside" else ("", held)


class ChatDecoder(Decoder):
    """Chat never marks the end of an item: it ends when another begins, a call when its arguments are
    complete. Only calls may be open together: some servers mix the pieces of parallel ones."""
    open_item = ""  # "message" or "reasoning"
    sealed_texts = 0  # how many texts["summary"] ended items have
    cited = False
    streamed = False  # after a delta, a message is a snapshot
    stop: Stop | None = None

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.texts = collections.defaultdict[PartType, list[str]](list)
        self.details: dict[Any, tuple[JSON, list[str]]] = {}  # of the open reasoning item
        self.tags = ThinkTags(self.settings.think_tags, self.texts["summary"])
        self.images: set[str] = set()
        self.calls: list[ChatCall] = []
        self.changed: list[ChatCall] = []  # since complete ones were ended
        self.by_key: dict[Any, ChatCall] = {}  # the newest of an index or an id; "": of all
        self.counts: JSON = {}  # of all usages

    def whole(self, body: Any) -> None:
        super().whole(body)
        self.on_done()

    def on_event(self, event: Any) -> None:
        chunk = as_dict(event)
        choices = objects_in(chunk, "choices")
        given = [holder.get("usage") for holder in (chunk, object_in(chunk, "x_groq"), *choices)]
        merge_counts(self.counts, {"service_tier": chunk.get("service_tier")})
        counts = any(given) and merge_counts(self.counts, next(filter(None, given)))
        usage = usage_from(counts, chunk, reasoning_within=self.settings.reasoning_within)
        if usage:  # OpenRouter's reasoning is sometimes one more
            reasoning = min(usage.reasoning, usage.output)
            self.sink.set_usage(dataclasses.replace(usage, reasoning=reasoning))
        errors = [choice["error"] for choice in choices if choice.get("error")]
        if errors or states_error(chunk):
            raise classify_error(errors or chunk)
        if not choices and isinstance(chunk.get("message"), str):
            self.notice = classify_error(chunk)
        for choice in choices:  # Copilot splits text and calls of one answer into two choices
            for name in ("delta", "message"):
                if message := object_in(choice, name):
                    self._message(message, whole=name == "message")
            self._finish(choice)
        if len(choices) == 1:
            self._note_delta(chunk, choices[0])
        elif usage and self.stop and not choices:  # OpenAI's order: finish, usage, [DONE]
            self.sink.set_stop(dataclasses.replace(self.stop, final=True))

    def _note_delta(self, chunk: JSON, choice: JSON) -> None:
        """Remembers a chunk with one text and nothing else."""
        delta = object_in(choice, "delta")
        fields = {**chunk, **choice, **delta}
        name, *others = {name for name, value in fields.items() if value} - IGNORED_FIELDS or [""]
        channel = TEXT_CHANNELS.get(name)
        in_tags = self.tags.place == "inside" or (channel == "text" and self.tags.place)
        if channel and not others and isinstance(delta.get(name), str) and not in_tags:
            self.delta = TextDelta(name, self.texts[channel], None, channel)

    def _message(self, message: JSON, whole: bool) -> None:
        """Reads a delta, or a `whole` message: the answer, or a snapshot of its deltas."""
        self.streamed |= not whole
        snapshot = whole and self.streamed
        known: dict[PartType, str] = {}  # what the snapshot has yet to repeat
        if snapshot:
            known = {channel: "".join(texts) for channel, texts in self.texts.items() if texts}
        if "summary" not in known:
            for detail in objects_in(message, "reasoning_details"):
                self._detail(detail)
        for channel, text in message_texts(message):
            pieces = known.get(channel, "").lstrip()
            if pieces:
                text = text.lstrip()
                is_whole = text.startswith(pieces)
                known[channel] = "" if is_whole else pieces.removeprefix(text)
                text = text[len(pieces):] if is_whole else ""
            if text:
                self._take(channel, text)
        for image in objects_in(message, "images"):  # OpenRouter
            link = object_in(image, "image_url")
            self._show_image(text_of(link.get("url")))
        if self.open_item == "message" and not (snapshot and self.cited):
            for annotation in objects_in(message, "annotations"):
                self.cited = True
                citation = object_in(annotation, "url_citation")  # of OpenAI's and OpenRouter's search
                self._annotate(count(citation, "start_index"), count(citation, "end_index"), citation)
        calls = objects_in(message, "tool_calls")
        for place, call in enumerate(calls):
            self._call(call, whole, place if snapshot else None)

    # messages and reasoning

    def _take(self, channel: PartType, text: str) -> None:
        if channel == "text" and self.tags.place:
            reasoning, text = self.tags.read(text)
            self._add("summary", reasoning)
        elif channel == "summary" and self.tags.place == "inside":
            if any(map(str.strip, self.texts[channel])):  # the tags carry it
                return
            self.tags.place = "waiting"
        self._add(channel, text)

    def _add(self, channel: PartType, text: str, begins: bool = False) -> None:
        """Adds to the message or the reasoning item, or begins it, with an empty text only if it `begins`."""
        if not text and not begins:
            return
        kind = "reasoning" if channel == "summary" else "message"
        if self.open_item != kind:
            self._end_text()
            if kind == "reasoning" or text.strip():  # Kimi sends blanks around its calls
                self._end_calls()
            self.open_item = kind
            self._new_key()
        self.texts[channel].append(text)
        self.sink.text(text, channel)

    def _detail(self, detail: JSON) -> None:
        """OpenRouter's details: pieces by type and index. Encrypted ones are whole and share the index."""
        self._add("summary", "", begins=True)
        kind = str(detail.get("type"))
        name = "summary" if kind == "reasoning.summary" else "text"
        place = len(self.details) if kind == "reasoning.encrypted" else str(detail.get("index"))
        fields, pieces = self.details.setdefault((name, kind, place), ({}, []))
        for member, value in detail.items():
            if value is not None or member not in (*fields, name):
                fields[member] = value
        if isinstance(detail.get(name), str):
            pieces.append(detail[name])

    def _show_image(self, url: str) -> None:
        _, comma, data = url.partition(";base64,")
        if not comma:
            self._take("text", url)
        elif data not in self.images:  # the whole message may repeat it
            self.images.add(data)
            self._end_items()
            self._image(data)

    # calls

    def _call(self, given: JSON, whole: bool, place: int | None) -> None:
        """Reads a piece of a call, or a `whole` one; `place` is its place in a snapshot."""
        function = object_in(given, "function")
        name = str(function.get("name") or "")
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = value_text(arguments)
        call_id = str(given.get("id") or "")
        key = given.get("index")
        if not isinstance(key, int):
            key = object() if whole else call_id  # a whole call continues no other
        call = self._find_call(key, call_id, name, arguments, place)
        call.id = call.id or call_id
        call.name = call.name or name
        self.by_key |= {key: call, call.id or key: call}
        if call.closed:  # some servers repeat a call when it is done
            return
        new = ""
        if arguments:
            call.streamed = call.item_key is not None
            new = call.add(arguments)
        else:
            call.next_name = name if call.last and not call_id else ""
        if call.item_key is None and call.name:
            self._begin_call(call, given.get("extra_content"))
            new = call.arguments.getvalue()
        if call.item_key is not None and new:
            self.sink.add(call.item_key, new, "arguments")
        self.changed.append(call)  # after the calls that its beginning ended

    def _find_call(self, key: Any, call_id: str, name: str, arguments: str, place: int | None) -> ChatCall:
        """Continued by a piece (by index, else by id, else the newest), begun by it, or repeated by a
        snapshot (by id, else by place)."""
        if place is not None:
            if call_id and call_id in self.by_key:
                return self.by_key[call_id]
            for call in self.calls[place:place + 1]:
                if call.name == name and rest_of_snapshot(call.text, arguments) is not None:
                    return call
        known = self.by_key.get(key)
        if known:
            if not known.is_followed_by(call_id, name, arguments):
                return known
            name = name or known.next_name
        call = ChatCall(name)
        self.calls.append(call)
        self.by_key[""] = call
        return call

    def _begin_call(self, call: ChatCall, signature: Any) -> None:
        self._end_items()
        item_key = call.item_key = self._new_key()
        call_id = self._call_id(item_key, call.id)
        if signature:  # Gemini's OpenAI endpoint
            self._carry({"extra_content": [{"id": call_id, "extra_content": signature}]})
        self.sink.call(item_key, call_id, self.tool_map.resolve(call.name))

    # ends

    def _end_text(self) -> None:
        text = "".join(self.texts["summary"][self.sealed_texts:])
        details = [
            {**fields, name: "".join(pieces)} if pieces else fields
            for (name, *_), (fields, pieces) in self.details.items()]
        replays = {
            "reasoning_content": text, "reasoning_details": details,
            "thinking": text and [{"type": "thinking", "thinking": [text_block(text)]}]}
        form = self.settings.replay
        value = replays.get(form)
        self.sink.done(sealed_replay={form: value} if value else {})
        self.details.clear()
        self.sealed_texts = len(self.texts["summary"])
        self.open_item = ""

    def _end_calls(self, last: bool = False) -> None:
        """Ends the complete calls; at the `last` end those without arguments too."""
        for call in self.calls if last else self.changed:
            if call.item_key is None or call.closed:
                continue
            if last and (rest := call.add("")):
                self.sink.add(call.item_key, rest, "arguments")
            is_whole = call.is_complete() and not call.held
            if is_whole or (last and not call.last):
                call.closed = True
                self.sink.done(call.item_key)
        self.changed.clear()

    def _end_items(self, last: bool = False) -> None:
        reasoning, text = self.tags.flush()
        self._add("summary", reasoning)
        self._add("text", text)
        self._end_text()
        self._end_calls(last)

    def _finish(self, choice: JSON) -> None:
        reason = choice.get("finish_reason")
        if isinstance(reason, dict):
            reason = reason.get("type") or reason.get("reason")
        if not reason:
            return
        reason = str(reason).lower()
        native = str(choice.get("native_finish_reason")).lower()
        word, *_ = reason.split(":")
        outcome = END_REASONS.get(word) or END_REASONS.get(native, "")
        if outcome in ERROR_CLASSES:
            name = native if native in END_REASONS else reason
            raise ProviderError(f"The provider broke off its answer: {name[:64]}.", kind=outcome)
        results = object_in(choice, "content_filter_results")  # Azure
        filters = ", ".join(name for name in results if object_in(results, name).get("filtered"))
        explanation = f"The provider's content filter stopped this answer: {filters}." if filters else ""
        self.stop = Stop(outcome, explanation=explanation)
        self._end_items(last=not outcome)
        self.sink.set_stop(self.stop)

    def on_done(self) -> None:
        """Handles [DONE], or the end of a whole answer."""
        if self.failed:
            return
        stop = self.stop or Stop()
        self._end_items(last=not stop.incomplete_reason)
        if any(call.item_key is None and call.text for call in self.calls):
            text = "The provider sent a tool call without a name."
            self.sink.fail(ProviderError(text, kind="tool_generation"))
        elif self.stop is None and not self.items_begun:
            empty = ProviderError("The provider's answer is empty.", kind="overload")
            self.sink.fail(self.notice or empty)
        else:
            self.sink.set_stop(dataclasses.replace(stop, final=True))


def message_texts(message: JSON) -> Iterator[tuple[PartType, str]]:
    details = objects_in(message, "reasoning_details")  # Snowflake sends only them
    shown = [{"text": detail.get("text") or detail.get("summary")} for detail in details]
    fields = filter(None, map(message.get, REASONING_FIELDS))
    yield "summary", text_of(next(fields, shown))
    content = message.get("content")  # Mistral sends an array
    for part in [text_block(content)] if isinstance(content, str) else only_dicts(content):
        if part.get("type") == "thinking":
            yield "summary", text_of(part.get("thinking"))
        else:
            yield "text", text_of(part.get("text"))
    yield "refusal", text_of(message.get("refusal"))


# --- 6.3 messages: Anthropic ---
#
# The next turn must return thinking blocks byte for byte: reasoning items have them in their envelopes.

class AnthropicModel(NamedTuple):
    """The defaults are the strictest, so that an unknown model refuses no request."""
    thinking: Literal["", "budget", "adaptive"] = "adaptive"
    # the type; "": no `thinking` at all
    disable_thinking: Literal["", "disabled", "between_tools", "never"] = "never"
    efforts: str = "low low low medium high xhigh max"  # for each of EFFORTS; "": none
    max_tokens: int = 128_000  # 0: unknown
    default_max_tokens: int = 0  # if the client names none; 0: max_tokens
    sampling: bool = False  # temperature or top_p
    forced_choice: bool = False  # but never with a thinking budget
    json_schema: bool = True
    # honours system messages among the others (claude-sonnet-5 accepts and ignores them)
    system_anywhere: bool = False
    prefill: bool = False  # the last turn may be the assistant's
    always_show_thinking: bool = False  # its thinking contains the texts between calls
    binds_thinking: bool = False  # refuses thinking of a changed conversation, unless asked to drop it
    web_search: str = "web_search_20260209"  # "": none


ANTHROPIC_MODELS: dict[str, AnthropicModel] = {}  # filled in layer 14

THINKING_BUDGETS = "0 1024 2048 10000 16384 32768"  # tokens, for each of EFFORTS
LEAST_BUDGET = 1024
THINKING_BLOCKS = frozenset(("thinking", "redacted_thinking"))


def native_web_search(tool_map: ToolMap, settings: AnthropicModel) -> list[JSON]:
    """The provider's own tool; a function of the same name replaces it."""
    if not tool_map.hosted or "web_search" in tool_map.by_upstream_name:
        return []
    asked = tool_map.hosted[0]
    filters = object_in(asked, "filters")
    place = without_empty({**object_in(asked, "user_location"), "type": ""})
    allowed = filters.get("allowed_domains")
    dynamic = settings.web_search >= "web_search_20260209"
    return [without_empty({
        "type": settings.web_search,
        "name": "web_search",
        "allowed_callers": ["direct"] if dynamic else None,  # called from code, it gives no citations
        "allowed_domains": allowed,
        "blocked_domains": None if allowed else filters.get("blocked_domains"),  # never both
        "user_location": place and {"type": "approximate", **place},
    })]


# --- the request

JSON_ONLY = "Answer with one JSON object and nothing else."


def encode_messages(ctx: EncodeContext) -> JSON:
    """Always asks for a stream: long answers are refused otherwise."""
    settings: AnthropicModel = ctx.settings
    turns = MessagesTurns(ctx)
    shape, instruction = output_format(ctx.take("text.format", {}), settings)
    system = [part for part in (*ctx.history.system, instruction) if part.strip()]
    max_tokens, thinking, effort = fit_thinking(ctx, turns.missing_thinking())
    kind = thinking.get("type")
    native = native_web_search(ctx.tool_map, settings)
    tools = [messages_tool(function) for function in ctx.tool_map.functions] + native
    choice: JSON = {}
    closing = ""
    if tools:
        may_force = settings.forced_choice and kind != "enabled"
        choice, closing = messages_tool_choice(ctx, may_force, bool(native))
    user = ctx.take("safety_identifier", ctx.take("user", ""))
    if len(user) > 256:
        user = sha256_hex(user)
    body: JSON = {
        "model": ctx.model,
        "max_tokens": max_tokens,
        "system": [*map(text_block, system)],
        "tools": tools,
        "tool_choice": choice,
        "messages": turns.finish(closing, bool(thinking)),
        "thinking": thinking,
        "output_config": without_empty({"effort": effort, "format": shape}),
        "metadata": without_empty({"user_id": user}),
        "stop_sequences": ctx.take("stop"),
    }
    if settings.sampling and kind not in ("enabled", "adaptive"):
        body["top_k"] = ctx.take("top_k")
        for name in ("temperature", "top_p"):
            if name in ctx.fields and "temperature" not in body:  # never both
                body[name] = min(ctx.take(name), 1)
    if ctx.tool_map.hosted and not native:
        ctx.dropped.append("tools:web_search")
    place_cache_control(body, ctx.prompt_cache)
    return {**without_empty(body), "stream": True}


def fit_thinking(ctx: EncodeContext, missing_thinking: bool) -> tuple[int, JSON, str]:
    """A thinking budget is added to max_tokens, below the cap."""
    settings: AnthropicModel = ctx.settings
    asked = ctx.take("reasoning.effort")
    shown = settings.always_show_thinking or ctx.fields.get("reasoning.summary") not in (None, "none")
    cap = settings.max_tokens or 1 << 31
    max_tokens = min(ctx.take("max_output_tokens") or settings.default_max_tokens or cap, cap)
    if asked == "none" and settings.disable_thinking != "never":
        return max_tokens, without_empty({"type": settings.disable_thinking}), ""
    effort = effort_value(settings.efforts, asked)
    kind = settings.thinking if asked or shown or settings.binds_thinking else ""
    thinking: JSON = {}
    if kind == "adaptive":
        thinking["type"] = kind
        if shown:
            thinking["display"] = "summarized"
        if settings.binds_thinking:
            thinking["block_binding"] = DROP_STALE
    elif kind == "budget" and max_tokens > LEAST_BUDGET and not missing_thinking:
        budget = int(effort_value(THINKING_BUDGETS, asked or "medium"))
        max_tokens = min(cap, max_tokens + budget)
        budget = max(LEAST_BUDGET, min(budget, max_tokens - LEAST_BUDGET))
        thinking = {"type": "enabled", "budget_tokens": budget}
    if asked and not effort and not thinking:
        ctx.dropped.append("reasoning.effort")
    return max_tokens, thinking, effort


def messages_tool_choice(ctx: EncodeContext, may_force: bool, native: bool) -> tuple[JSON, str]:
    """tool_choice, and the instruction that replaces it if a call may not be forced."""
    asked = as_dict(ctx.request.get("tool_choice"))
    mode, names = "required", ["web_search"]
    if not native or not str(asked.get("type")).startswith("web_search"):
        mode, names = resolve_tool_choice(ctx)
    instruction = ""
    if mode == "required" and not may_force:
        mode = "auto"
        wanted = f"the tool {names[0]}" if names else "one of the tools"
        instruction = f"Answer this turn with a call of {wanted}."
    choice: JSON = {"type": mode}
    if mode == "required":
        choice = {"type": "tool", "name": names[0]} if names else {"type": "any"}
    if mode != "none" and ctx.request.get("parallel_tool_calls") is False:
        choice["disable_parallel_tool_use"] = True
    is_default = choice == {"type": "auto"} and not instruction
    return {} if is_default else choice, instruction


def messages_tool(function: JSON) -> JSON:
    """A tool without `strict`: a request may have at most 20 strict tools and 24 optional parameters."""
    schema = function["parameters"]
    # the old name, of zod-to-json-schema
    defs = object_in(schema, "definitions") | object_in(schema, "$defs")
    tool = {"name": function["name"], "description": function["description"]}
    return without_empty({**tool, "input_schema": object_root(schema, defs)})


def object_root(schema: JSON, defs: JSON) -> JSON:
    """A tool's schema with `type: object` at its root, where anyOf, oneOf, allOf and $ref are not allowed:
    their branches become one object, which requires what all of them require. Each of `defs` is used only at
    its first mention: two mentions in each of n would make 2 ** n."""
    root = {**schema, "type": "object"}
    if root.keys().isdisjoint(("$ref", "anyOf", "oneOf", "allOf")):
        return root
    target = defs.pop(str(root.pop("$ref", "")).rpartition("/")[2], None)
    root["allOf"] = objects_in(root, "allOf") + only_dicts([target])

    def take(keyword: str) -> list[JSON]:
        return [object_root(branch, defs) for branch in only_dicts(root.pop(keyword, None))]

    options = take("anyOf") + take("oneOf")
    merged = [root, *take("allOf")]
    properties: JSON = {}
    for branch in merged + options:
        for name, inner in object_in(branch, "properties").items():
            known = properties.setdefault(name, inner)
            if known != inner:
                properties[name] = {"anyOf": [known, inner]}
    needed = set().union(*map(required_by, merged))
    if options:
        needed |= set.intersection(*map(required_by, options))
    required = [name for name in properties if name in needed]
    return without_empty({**root, "properties": properties, "required": required})


def required_by(schema: JSON) -> set[str]:
    required = schema.get("required")
    return set(map(str, required)) if isinstance(required, list) else set()


def output_format(shape: JSON, settings: AnthropicModel) -> tuple[JSON | None, str]:
    """output_config.format, or the instruction that replaces it."""
    kind = shape.get("type", "text")
    if kind != "json_schema":
        return None, JSON_ONLY if kind == "json_object" else ""
    with contextlib.suppress(ValueError):
        if settings.json_schema:
            return {"type": kind, "schema": strict_schema(shape["schema"])}, ""
    return None, f"{JSON_ONLY} It fits this JSON schema:\n{dumps(shape['schema'])}"


STRICT_KEYWORDS = frozenset("""type enum const description title required properties $defs definitions items
anyOf oneOf allOf""".split())
STRICT_VALUES = {  # for other keywords
    "minItems": (0, 1), "format": "date-time time date duration email hostname uri ipv4 ipv6 uuid".split()}


def strict_schema(schema: JSON) -> Any:
    """In the part of JSON Schema that output_config.format accepts; the rest goes into the description.
    ValueError: that would lose an object with members of any name."""
    def change(made: JSON) -> JSON:
        if "$ref" in made:  # no other keyword is allowed beside it
            return {key: made[key] for key in ("$ref", "$defs", "definitions") if key in made}
        is_map = made.pop("additionalProperties", None) or made.get("patternProperties")
        made.pop("$schema", None)
        lost = {
            key: made.pop(key) for key, value in [*made.items()]
            if key not in STRICT_KEYWORDS and value not in STRICT_VALUES.get(key, ())}
        if lost:
            texts = filter(None, (made.get("description"), dumps(lost)))
            made["description"] = "\n\n".join(texts)
        if "properties" in made or "object" in (made.get("type") or ""):
            if is_map or "properties" not in made:
                raise ValueError("a map")
            made["additionalProperties"] = False
        return {"anyOf" if key == "oneOf" else key: value for key, value in made.items()}
    return map_schema(schema, change)


TOOL_USE_ID = re.compile("[a-zA-Z0-9_-]{1,64}")


class MessagesTurns(TurnEncoder):
    """Reasoning goes before its consequences, results before text."""

    def __init__(self, ctx: EncodeContext) -> None:
        super().__init__(ctx)
        self.pending_reasoning: list[JSON] = []  # waits for other blocks: no turn may end with it
        self.pending_system: list[str] = []  # waits for the end of the user's turn, its only place
        self.encode_items()

    def finish(self, closing: str, thinks: bool) -> list[JSON]:
        """`closing` is added at the end. A model that thinks begins its turn itself."""
        self.add_system(closing)
        self.add_fillers(may_end=self.settings.prefill and not thinks and not self.pending_system)
        last = self.out[-1]["content"][-1]
        if self.last_role() == "assistant" and last["type"] == "text":
            last["text"] = last["text"].rstrip()  # trailing whitespace is refused there
        self._place_system()
        return self.out

    def missing_thinking(self) -> bool:
        """Does the last turn answer calls without reasoning before them? A 400 with a thinking budget."""
        begins = [message["content"][0]["type"] for message in self.out[-2:]]
        return begins[1:] == ["tool_result"] and begins[0] not in THINKING_BLOCKS

    def add(self, role: str, parts: list[JSON]) -> None:
        if not parts:
            return
        if role == "assistant":
            self._place_system()
            parts = self.pending_reasoning + parts
        self.pending_reasoning = []
        super().add(role, parts)

    def add_system(self, text: str) -> None:
        if text and self.settings.system_anywhere:
            self.pending_system.append(text)
            self.pending_reasoning = []
        else:
            super().add_system(text)

    def _place_system(self) -> None:
        """Goes right behind a user's turn, and before the assistant's or to the end."""
        role, form = ("system", "{}") if self.last_role() == "user" else ("user", LATER_SYSTEM)
        super().add(role, [text_block(form.format(text)) for text in self.pending_system])
        self.pending_system = []

    def reasoning(self, item: JSON) -> None:
        blocks = objects_in(item["sealed_replay"], "blocks")
        if not blocks:
            self.dropped.append("reasoning")
        elif blocks[-1]["type"] in THINKING_BLOCKS:
            self._place_system()
            self.pending_reasoning += blocks
        else:
            self.add("assistant", blocks)

    def function_call(self, item: JSON) -> None:
        self.add("assistant", [{
            "type": "tool_use", "id": fit_call_id(item["call_id"], TOOL_USE_ID, 64),
            "name": item["name"], "input": json.loads(item["arguments"])}])

    def function_call_output(self, item: JSON) -> None:
        output = item["output"]
        result: JSON = {"type": "tool_result", "tool_use_id": fit_call_id(item["call_id"], TOOL_USE_ID, 64)}
        content = output if isinstance(output, str) and output.strip() else self.encode_parts(output)
        if content:
            result["content"] = content
        if output == NO_OUTPUT:
            result["is_error"] = True
        self.add("user", [result])

    def text_part(self, text: str) -> JSON:
        return text_block(text) if text.strip() else {}  # a blank text is a 400

    def encode_part(self, part: JSON) -> JSON | None:
        block = super().encode_part(part)
        if block and isinstance(part.get("cache_control"), dict):
            block["cache_control"] = part["cache_control"]
        return block

    def encode_file(self, file: Attachment) -> JSON | None:
        source = {"type": "base64", "media_type": file.mime, "data": file.data}
        if file.url:
            source = {"type": "url", "url": file.url}
        elif file.text is not None:
            source |= {"type": "text", "data": file.text}
        elif file.mime not in (*IMAGE_TYPES, "application/pdf"):
            return None
        if file.mime.startswith("image/"):
            return {"type": "image", "source": source}
        return without_empty({"type": "document", "source": source, "title": file.name})


def place_cache_control(body: JSON, ttl: str) -> None:
    """Marks what the provider should cache, unless the client did: the last tool and system block, the ends
    of the last turn and of the user turn before it (a step of over 20 blocks would miss the first)."""
    messages = body["messages"]
    blocks = [block for message in messages for block in message["content"]]
    inner = [part for block in blocks for part in objects_in(block, "content")]
    if ttl == "off" or any("cache_control" in block for block in blocks + inner):
        return
    mark = {"type": "ephemeral"} if ttl == "5m" else {"type": "ephemeral", "ttl": ttl}
    users = [message for message in messages[:-1] if message["role"] == "user"]
    turns = [message["content"] for message in (*users[-1:], messages[-1])]
    for content in (body["tools"], body["system"], *turns):
        for block in reversed(content):
            if block.get("type") not in THINKING_BLOCKS:
                block["cache_control"] = mark
                break


BINDING_BETA = "thinking-binding-controls-2026-08-01"
INTERLEAVED_BETA = "interleaved-thinking-2025-05-14"  # thinking between calls, for models with a budget
DROP_STALE = {"prefix_mismatch_behavior": "drop_block"}


def messages_headers(body: JSON) -> list[tuple[str, str]]:
    thinking = body.get("thinking", {})
    headers = [("anthropic-version", "2023-06-01")]
    if "block_binding" in thinking:
        headers.append(("anthropic-beta", BINDING_BETA))
    elif thinking.get("type") == "enabled" and "tools" in body:
        headers.append(("anthropic-beta", INTERLEAVED_BETA))
    return headers


# --- repairs after a refusal


def drop_stale_thoughts(body: JSON) -> None:
    """Adaptive thinking can itself drop the thinking of another conversation."""
    thinking = body["thinking"] = body.get("thinking") or {"type": "adaptive"}
    if thinking["type"] == "adaptive" and "block_binding" not in thinking:
        thinking["block_binding"] = DROP_STALE
    else:
        drop_thoughts(body)


def drop_thoughts(body: JSON) -> None:
    for message in body["messages"]:
        if isinstance(message["content"], list):  # a client may send a string
            message["content"] = [
                block for block in message["content"] if block["type"] not in THINKING_BLOCKS]
    if object_in(body, "thinking").get("type") == "enabled":
        del body["thinking"]


MESSAGES_REPAIRS: Repairs = {
    r"bound to a different (?:conversation|model)": drop_stale_thoughts,
    r"invalid .?signature|expected .{0,3}(?:redacted_)?thinking|thinking.? blocks.*cannot be modified":
        drop_thoughts,
}


# --- the answer

MAX_PAUSES = 5  # a turn that is still paused after so many resumptions counts as truncated
DELTA_FIELDS = {
    "text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json",
    "signature_delta": "signature", "citations_delta": "citation"}
BLOCK_CHANNELS: dict[Any, PartType] = {"text": "text", "thinking": "summary", "tool_use": "arguments"}


@dataclass(slots=True)
class Block:
    content: JSON  # completed by its signature and citations, at its end by its text or input
    item_key: int
    channel: Any  # PartType, or None: the client sees no text of it
    pieces: list[str] = field(default_factory=list)  # of text, thinking or arguments


class MessagesDecoder(Decoder):
    """After a pause the next stream continues the same items. Adjacent texts form one message: citations
    split a sentence into blocks. Unknown blocks are ignored: of compaction, fallback, code execution."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.id: str | None = None  # of the current message
        self.blocks: dict[int, Block] = {}  # open ones, by the provider's index
        self.length = 0  # of the open message's ended blocks
        # without arguments: the following event shows whether they were truncated
        self.empty_calls: list[int] = []
        self.searches: list[int] = []  # without results so far; those come in order
        self.counts: JSON = {}  # of this stream
        self.earlier = self.usage = Usage()  # of earlier streams; of all streams
        self.content: list[JSON] = []  # for a resumption
        self.pauses = 0
        self.stop = Stop()

    def whole(self, body: Any) -> None:
        self.read({"type": "message", **as_dict(body)})

    def on_message(self, body: JSON) -> None:
        self.on_message_start({"message": body})
        for block in body["content"]:
            self.on_content_block_start({"content_block": block})
            self.on_content_block_stop({})
        self.on_message_delta({**body, "delta": body})
        self.on_message_stop({})

    # messages

    def on_message_start(self, event: JSON) -> None:
        message = event.get("message") or {}
        if self.id is None:
            self.id = message.get("id")
            usage = object_in(message, "usage")  # the output is counted at the end
            self._count({**usage, "model": message.get("model")}, estimated=True)
        elif self.items_begun and message.get("id") != self.id:
            # some proxies repeat the event, others splice in a second answer (vercel/ai)
            raise ProviderError("The provider spliced a second message into its stream.", kind="overload")

    def on_message_delta(self, event: JSON) -> None:
        usage = object_in(event, "usage")
        self._count(usage, estimated="output_tokens" not in usage)
        delta = event.get("delta") or {}
        reason = delta.get("stop_reason")
        if reason == "pause_turn" and self.content and self.pauses < MAX_PAUSES:
            self.paused, self.content = self.content, []
            self.pauses += 1
            self.id, self.earlier, self.counts = None, self.usage, {}  # the next stream continues the turn
            self.sink.done()
        elif reason:
            explanation = object_in(delta, "stop_details").get("explanation") or ""
            self._finish(Stop(END_REASONS.get(reason, ""), explanation=explanation))

    def on_message_stop(self, event: JSON) -> None:
        if not self.paused:
            self._finish(dataclasses.replace(self.stop, final=True))

    def on_error(self, event: JSON) -> None:
        raise classify_error(event)

    def _finish(self, stop: Stop) -> None:
        """Ends no truncated call, nor an empty one that may be truncated."""
        for index, block in list(self.blocks.items()):
            if block.channel != "arguments":
                self.on_content_block_stop({"index": index})
        self.sink.done()
        if not stop.incomplete_reason:
            self._end_empty_calls()
        while self.searches:
            self.sink.done(self.searches.pop(0), status="failed")
        self.stop = stop
        self.sink.set_stop(stop)

    def _count(self, given: JSON, estimated: bool) -> None:
        """Adds the usage of earlier streams."""
        now = messages_usage(merge_counts(self.counts, given))
        totals = {name: getattr(self.earlier, name) + getattr(now, name) for name in COUNTED}
        self.usage = dataclasses.replace(now, estimated=estimated, **totals)
        self.sink.set_usage(self.usage)

    # blocks

    def on_content_block_start(self, event: JSON) -> None:
        content = event.get("content_block") or {}
        kind = content.get("type")
        block = Block(content, self._new_key(), BLOCK_CHANNELS.get(kind))
        self.blocks[event.get("index", 0)] = block
        self._end_empty_calls()
        if kind != "text":
            self.sink.done()
            self.length = 0
        if kind == "tool_use":
            call_id = self._call_id(block.item_key, content.get("id"))
            self.sink.call(block.item_key, call_id, self.tool_map.resolve(str(content.get("name") or "")))
        elif kind == "web_search_tool_result" and self.searches:
            status = "completed" if isinstance(content.get("content"), list) else "failed"
            self.sink.done(self.searches.pop(0), status=status)
        self._text(block, content.get(kind) or "")  # of a text or thinking block

    def on_content_block_delta(self, event: JSON) -> None:
        block, delta = self.blocks[event.get("index", 0)], event.get("delta") or {}
        name = DELTA_FIELDS.get(str(delta.get("type")), "")
        piece = delta.get(name) or ""
        if name == "signature":
            block.content[name] = piece
        elif name == "citation":
            block.content["citations"] = [*objects_in(block.content, "citations"), piece]
        elif piece:
            self._text(block, piece)
            if len(event) == 3 and len(delta) == 2 and block.channel:
                key = block.item_key if block.channel == "arguments" else None
                self.delta = TextDelta(name, block.pieces, key, block.channel)

    def _text(self, block: Block, text: str) -> None:
        if not text:
            return
        block.pieces.append(text)
        if block.channel == "arguments":
            self.sink.add(block.item_key, text, block.channel)
        elif block.channel:
            self.sink.text(text, block.channel)

    def on_content_block_stop(self, event: JSON) -> None:
        block = self.blocks.pop(event.get("index", 0), None)
        if block is None:
            return
        content = block.content
        kind = content.get("type")
        text = "".join(block.pieces)
        if kind in ("text", "thinking"):
            content[kind] = text
        elif text.strip():
            content["input"] = parse_object(text) or {}  # the API refuses null, even for a truncated call
        if kind == "text":
            start = self.length
            self.length += len(text)
            for citation in objects_in(content, "citations"):
                self._annotate(start, self.length, citation)  # no client knows the file of a document
        elif kind in THINKING_BLOCKS:
            sealed = content.get("signature") or content.get("data")
            if sealed or text:  # without a signature it cannot be returned; with nothing else it must be
                self._carry({"blocks": [content]} if sealed else {})
        elif kind == "tool_use":
            self._finish_call(block)
        elif kind == "server_tool_use" and content.get("name") == "web_search":
            query = object_in(content, "input").get("query") or ""
            self.searches.append(block.item_key)
            self.sink.open(block.item_key, "web_search_call", action=search_action([query]))
        if self.tool_map.hosted and kind and content.get("text") != "":  # only hosted tools pause a turn
            self.content.append(content)

    def _finish_call(self, block: Block) -> None:
        """Unless the arguments are truncated, or may be, because they are empty."""
        given = block.content.get("input")
        if given and not block.pieces:  # some servers send the whole input at once
            self._text(block, dumps(given))
        arguments = "".join(block.pieces)
        if not arguments.strip():
            self.empty_calls.append(block.item_key)
        elif parse_object(arguments) is not None:
            self.sink.done(block.item_key)

    def _end_empty_calls(self) -> None:
        while self.empty_calls:
            self.sink.done(self.empty_calls.pop(0))


def messages_usage(counts: JSON) -> Usage:
    """Cached input is counted apart; of several passes (compaction, fallback) the sum has only the last."""
    passes = objects_in(counts, "iterations") or [counts]
    fresh, read, written, output = (
        sum(count(each, name) for each in passes)
        for name in (
            "input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens"))
    kept_long = sum(count(each.get("cache_creation"), "ephemeral_1h_input_tokens") for each in passes)
    reasoning = count(counts.get("output_tokens_details"), "thinking_tokens")
    return Usage(
        input=fresh + read + written, cached=read, cache_write=written, output=output,
        reasoning=min(reasoning, output), cache_write_1h=min(kept_long, written), **billing_facts(counts))


# --- 6.4 gemini: Google's generateContent ---
#
# Every event of a stream is a whole answer with a few further parts. A thought signature must come back on
# its very part: it travels in a reasoning item of its own, before its call or after its message.

class GeminiModel(NamedTuple):
    """The defaults are the newest generation's."""
    # a request with both is refused
    thinking_param: Literal["", "thinkingBudget", "thinkingLevel"] = "thinkingLevel"
    values: str = "MINIMAL MINIMAL LOW MEDIUM HIGH HIGH HIGH"  # for each of EFFORTS
    # accepts functions with googleSearch or a response schema, media inside a function's result
    combines_tools: bool = True
    web_search: bool = True
    max_tokens: int = 0  # of a streamed answer, others have half; 0: unknown


NEVER_THINKS = "none -"  # without thinking_param only `none` is no loss
GEMINI_MODELS: dict[str, GeminiModel] = {}  # filled in layer 14


# --- the request

# ai.google.dev, thought-signatures
DUMMY_SIGNATURE = base64.b64encode(b"skip_thought_signature_validator").decode()
MINTED_ID = re.compile(r"call_(?:\w+_)?g\d+(?:_\d+)?")  # made by GeminiDecoder
# in functionResponse.parts; in a content
RESULT_MEDIA = frozenset("image/png image/jpeg image/webp application/pdf text/plain".split())
GEMINI_MEDIA = re.compile(r"image/(png|jpeg|webp|heic|heif)|application/pdf|text/plain|audio/|video/")


def encode_gemini(ctx: EncodeContext) -> JSON:
    system = [{"text": text} for text in ctx.history.system if text]
    return without_empty({
        "systemInstruction": without_empty({"parts": system}), **gemini_tools(ctx),
        "contents": GeminiContents(ctx).encode(), "generationConfig": gemini_config(ctx)})


CALLING_MODES = {"none": "NONE", "auto": "VALIDATED", "required": "ANY"}


def gemini_tools(ctx: EncodeContext) -> JSON:
    """tools and toolConfig: a calling mode without functions is refused."""
    functions, hosted, dropped = ctx.tool_map.functions, ctx.tool_map.hosted, ctx.dropped
    tools: list[JSON] = []
    config: JSON = {}
    # AUTO accepts no names; VALIDATED does, since 2.5
    modes = ("required", "auto") if ctx.settings.thinking_param else ("required",)
    mode, names = resolve_tool_choice(ctx, modes)
    if functions:
        tools.append({"functionDeclarations": [{
            "name": function["name"], "description": function["description"],
            "parametersJsonSchema": gemini_schema(function["parameters"])} for function in functions]})
        if names or mode != "auto":
            calling = {"mode": CALLING_MODES[mode], "allowedFunctionNames": names}
            config["functionCallingConfig"] = without_empty(calling)
    elif mode == "required":
        dropped.append("tool_choice")
    if hosted and functions and not ctx.settings.combines_tools:
        dropped.append("tools:web_search")
    elif hosted:
        tools.append({"googleSearch": {}})
        dropped += [f"web_search.{name}" for name in ("filters", "user_location") if hosted[0].get(name)]
        if functions:
            config["includeServerSideToolInvocations"] = True  # required for both together
    return {"tools": tools, "toolConfig": config}


GEMINI_SAMPLING = {
    "temperature": "temperature", "top_p": "topP", "top_k": "topK", "stop": "stopSequences", "seed": "seed",
    "presence_penalty": "presencePenalty", "frequency_penalty": "frequencyPenalty"}


def gemini_config(ctx: EncodeContext) -> JSON:
    settings: GeminiModel = ctx.settings
    functions, shape = ctx.tool_map.functions, ctx.take("text.format", {})
    asks_json = shape.get("type", "text") != "text"
    if asks_json and functions and not settings.combines_tools:
        ctx.dropped.append("text.format")
        asks_json = False
    max_tokens = ctx.take("max_output_tokens")
    if max_tokens and settings.max_tokens:
        cap = settings.max_tokens if ctx.request.stream else settings.max_tokens // 2
        max_tokens = min(max_tokens, cap)
    param = settings.thinking_param
    value = ctx.take_effort(settings.values if param else NEVER_THINKS)
    thinking: JSON = {}
    if param:
        shown = value != "0" and ctx.fields.get("reasoning.summary") not in (None, "none")
        thinking = {param: int(value) if value.isdigit() else value, "includeThoughts": shown or None}
    if functions and ctx.request.get("parallel_tool_calls") is False:
        ctx.dropped.append("parallel_tool_calls")  # there is no such switch
    return without_empty({
        "maxOutputTokens": max_tokens, **{name: ctx.take(path) for path, name in GEMINI_SAMPLING.items()},
        "thinkingConfig": without_empty(thinking),
        "responseMimeType": "application/json" if asks_json else None,
        "responseJsonSchema": gemini_schema(shape.get("schema")) if asks_json else None})


# --- its schemas

UNKNOWN_KEYWORDS = "$schema discriminator examples title exclusiveMinimum exclusiveMaximum".split()
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object",
              type(None): "null"}


def gemini_schema(schema: Any, refused: str = "") -> Any:
    """Without `refused` and what Gemini refuses; a string's format goes into its description."""
    unknown = {*UNKNOWN_KEYWORDS, refused}

    def change(made: JSON) -> JSON:
        for key in made.keys() & unknown:
            del made[key]
        if "definitions" in made:  # renamed in the 2019 draft; Gemini knows only the new name
            made["$defs"] = as_dict(made.pop("definitions")) | object_in(made, "$defs")
        if "$ref" in made:  # "no other properties, except for those starting as a $, may be set"
            made["$ref"] = made["$ref"].replace("#/definitions/", "#/$defs/", 1)
            return {key: value for key, value in made.items() if key.startswith("$")}
        if "const" in made:
            made["enum"] = [made.pop("const")]
            made["type"] = made.get("type") or JSON_TYPES[type(made["enum"][0])]
        if made.get("type") == "string" and "format" in made:
            form, text = made.pop("format"), made.get("description")
            made["description"] = f"{text} (format: {form})" if text else f"Format: {form}"
        return made
    return map_schema(schema, change)


# --- its contents

class GeminiContents(TurnEncoder):
    """User and model in turn, the results of one turn's calls together in the next."""
    PARTS = "parts"

    def encode(self) -> list[JSON]:
        self.calls: dict[str, JSON] = {}  # by call_id: what a result repeats
        self.signatures: dict[str, tuple[str, Any]] = {}  # by call_id, with json_digest of the arguments
        # index of a content -> number of its parts before new text
        self.searched = collections.Counter[int]()
        self.encode_items()
        self.add_fillers()
        for content in self.out:
            if content["role"] == "user":  # a result's media go after all results
                content["parts"].sort(key=lambda part: "functionResponse" not in part)
                continue
            content["role"] = "model"
            if self.settings.thinking_param:
                add_thought_signature(content)
        return self.out

    def message(self, item: JSON) -> None:
        if "generated" in item:
            item = {**item, "role": "assistant"}
        super().message(item)

    def reasoning(self, item: JSON) -> None:
        replay = item["sealed_replay"]
        signature = replay.get("signature")
        if "part" in replay and self.settings.combines_tools:  # older models refuse a server's tool
            self.add("assistant", [replay["part"]])
        elif not signature:
            self.dropped.append("reasoning:foreign")
        elif "for" in replay:
            self.signatures[replay["for"]] = signature, replay.get("arguments")
        else:
            self._sign_text(signature, replay.get("characters", 0))

    def _sign_text(self, signature: str, characters: int) -> None:
        """Signs the last `characters` of text since the last signature; 0: an image or an empty part."""
        parts = self.out[-1]["parts"] if self.last_role() == "assistant" else []
        if not characters:
            if not parts or "inlineData" not in parts[-1]:
                parts = [{"text": ""}]
                self.add("assistant", parts)
            parts[-1]["thoughtSignature"] = signature
            return
        for at in reversed(range(self.searched[len(self.out)], len(parts))):
            text = parts[at].get("text")
            if text:
                parts[at] = {"text": text[-characters:], "thoughtSignature": signature}
                if len(text) > characters:
                    parts.insert(at, {"text": text[:-characters]})
                break
        else:
            self.dropped.append("reasoning:signature")
        self.searched[len(self.out)] = len(parts)

    def function_call(self, item: JSON) -> None:
        call_id = item["call_id"]
        call = self.calls[call_id] = {"name": item["name"]}
        if not MINTED_ID.fullmatch(call_id):
            call["id"] = call_id
        part: JSON = {"functionCall": {**call, "args": json.loads(item["arguments"])}}
        # gather_turns numbers repeated ids; the newest signature counts
        unnumbered = re.sub(r"_\d+$", "", call_id)
        found = self.signatures.get(call_id) or self.signatures.get(unnumbered)
        # Claude Code adds the defaults of its tools: that is another call than the signed one
        if found and found[1] in (None, json_digest(part["functionCall"]["args"])):
            part["thoughtSignature"] = found[0]
        self.add("assistant", [part])

    def function_call_output(self, item: JSON) -> None:
        parts = self.encode_parts(item["output"])
        inside, outside = [], []  # of the result, and behind all results
        for part in parts:
            mime = part.get("inlineData", {}).get("mimeType")
            if mime in RESULT_MEDIA and self.settings.combines_tools:
                inside.append(part)
            elif "text" not in part:
                outside.append(part)
        key = "error" if item["output"] == NO_OUTPUT else "result"
        text = text_of(parts, "\n") or ("The content follows." if parts else "")
        response: JSON = {**self.calls[item["call_id"]], "response": {key: text}}
        if inside:
            response["parts"] = inside
        self.add("user", [{"functionResponse": response}, *outside])

    def text_part(self, text: str) -> JSON:
        return {"text": text} if text else {}

    def encode_file(self, file: Attachment) -> JSON | None:
        if file.url:
            address = {"fileUri": file.url, "mimeType": file.mime.removesuffix("image/")}
            return {"fileData": without_empty(address)}
        if GEMINI_MEDIA.match(file.mime):
            return {"inlineData": {"mimeType": file.mime, "data": file.data}}
        return None


def add_thought_signature(content: JSON) -> None:
    """Signs the first call of a step, which must be signed: in old turns too, so their bytes never change."""
    for part in content["parts"]:
        if "functionCall" in part:
            part.setdefault("thoughtSignature", DUMMY_SIGNATURE)
            break


# --- its refusals

def replace_signatures(body: JSON) -> None:
    for content in body["contents"]:
        for part in content["parts"]:
            part.pop("thoughtSignature", None)
        add_thought_signature(content)


def drop_keyword(body: JSON, keyword: str) -> None:
    """Drops the keyword that an "Unknown name" error quotes from all schemas and their holders."""
    for holder, name in ((body, "tools"), (body.get("generationConfig", {}), "responseJsonSchema")):
        if name in holder:
            holder[name] = gemini_schema(holder[name], keyword)


GEMINI_REPAIRS: Repairs = {
    r"thought.?signature": replace_signatures,
    r"Unknown name \W*(\w+)\W* at \W*(?:tools|generation_config\.response)": drop_keyword,
}


# --- the answer

GEMINI_ENDS = {
    **END_REASONS,
    "stop": "",
    "other": "tool_generation",
    "missing_thought_signature": "bad_request"}  # our request's fault: no other target may be tried
UNSPECIFIED = (None, "", "FINISH_REASON_UNSPECIFIED", "BLOCKED_REASON_UNSPECIFIED")


class GeminiDecoder(Decoder):
    """Parts follow each other, so only one item is open at a time. The message stays open after its
    signature, because its citations come with the last event."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.prefix += "g"
        self.open: PartType | None = None  # "text" or "summary": of the open item
        self.texts: list[str] = []  # of the open item
        self.signature: JSON = {}  # of its last part; the item after it carries it
        self.counts: JSON = {}  # the newest of each, and the model
        self.grounding: JSON = {}
        self.searched = False  # a web_search_call has been sent
        self.finished = False  # there was output, then a finishReason

    def on_event(self, event: Any) -> None:
        """A chunk, or an array of them: without alt=sse even a stream is one array."""
        for chunk in only_dicts(event if isinstance(event, list) else [event]):
            self._chunk(chunk)

    def _chunk(self, chunk: JSON) -> None:
        candidate = next(iter(objects_in(chunk, "candidates")), {})
        self.grounding = object_in(candidate, "groundingMetadata") or self.grounding
        self._count({**object_in(chunk, "usageMetadata"), "model": chunk.get("modelVersion")})
        if states_error(chunk):
            raise classify_error(chunk)
        if self.finished:
            return
        content = object_in(candidate, "content")
        parts = objects_in(content, "parts")
        for part in parts:
            self._part(part)
        reason = candidate.get("finishReason")
        if reason not in UNSPECIFIED:
            self._finish(candidate, str(reason))
        elif len(parts) == 1 and parts[0].keys() <= {"text", "thought"} and not self.grounding:
            if parts[0].get("text") and self.open:
                self.delta = TextDelta("text", self.texts, None, self.open)
        feedback = object_in(chunk, "promptFeedback")
        if not candidate and feedback.get("blockReason") not in UNSPECIFIED:
            explanation = block_reason("blocked this prompt", feedback, "blockReason", "blockReasonMessage")
            self.sink.set_stop(Stop("content_filter", explanation=explanation))

    def _count(self, given: JSON) -> None:
        if self.finished:  # after the end only higher counts are used
            given = {
                name: value for name, value in given.items()
                if name not in self.counts or count(given, name) > count(self.counts, name)}
        usage = gemini_usage(merge_counts(self.counts, given), self.grounding)
        if usage is not None:
            self.sink.set_usage(usage)

    # parts

    def _part(self, part: JSON) -> None:
        text = part.get("text")
        thought = part.get("thought")
        signature = str(part.get("thoughtSignature") or "")
        media = object_in(part, "inlineData")
        if isinstance(part.get("functionCall"), dict):
            self._function_call(part["functionCall"], signature)
            return
        if isinstance(text, str):
            self._text("summary" if thought else "text", text)
        elif part.get("toolCall") or part.get("toolResponse"):
            # the model combined this search with functions: both halves must come back unchanged
            self._close_texts()
            self._carry({"part": part})
            call = object_in(part, "toolCall")
            if str(call.get("toolType")).startswith("GOOGLE_SEARCH"):
                self._search(object_in(call, "args").get("queries"))
            return
        elif str(media.get("mimeType")).startswith("image/") and not thought:
            self._close_texts()
            self._image(str(media.get("data")))
        else:
            return  # there is no item for audio, or for code that Google ran
        if signature and not thought:
            if self.signature:
                self._close_texts()
            self.signature = {"signature": signature, "characters": len(text or "")}

    def _text(self, channel: PartType, text: str) -> None:
        if not text:
            return
        if channel != self.open or self.signature:  # a signed part accepts no more text
            self._close_texts()
            self._new_key()
            self.open = channel
        self.texts.append(text)
        self.sink.text(text, channel)

    def _search(self, queries: Any) -> None:
        self.searched = True
        action = search_action(queries if isinstance(queries, list) else [])
        self.sink.item({"type": "web_search_call", "status": "completed", "action": action})

    def _close_texts(self) -> None:
        if self.open == "text":
            for citation in citations("".join(self.texts), self.grounding):
                self._annotate(*citation)
        self.sink.done()
        if self.signature:
            self._carry(self.signature)
        self.open = None
        self.signature = {}
        self.texts = []

    def _function_call(self, given: JSON, signature: str) -> None:
        name, args = given.get("name"), given.get("args")
        in_pieces = given.get("partialArgs") or given.get("willContinue")  # Vertex sends them on request
        if in_pieces or (args and not name):
            message = "The provider sent a tool call without a name, or in pieces."
            raise ProviderError(message, kind="tool_generation")
        if name and isinstance(name, str):
            self._close_texts()
            item_key = self._new_key()
            call_id = self._call_id(item_key, given.get("id"))
            if signature:
                self._carry({"for": call_id, "signature": signature, "arguments": json_digest(args or {})})
            self.sink.call(item_key, call_id, self.tool_map.resolve(name))
            self.sink.add(item_key, value_text(args) or "{}", "arguments")
            self.sink.done(item_key)

    def _finish(self, candidate: JSON, reason: str) -> None:
        outcome = GEMINI_ENDS.get(reason.lower(), "" if self.items_begun else "tool_generation")
        if outcome in ERROR_CLASSES:
            # without its finishMessage: that repeats the model's text, and failures are logged
            message = block_reason("broke off its answer", candidate, "finishReason", "")
            code = "invalid_prompt" if outcome == "bad_request" else None
            raise ProviderError(message, kind=outcome, code=code)
        self._close_texts()
        self.finished = self.items_begun > 0  # some proxies begin with an empty STOP
        if self.grounding.get("webSearchQueries") and not self.searched:
            self._search(self.grounding["webSearchQueries"])
        explanation = block_reason("stopped this answer", candidate, "finishReason", "finishMessage")
        self.sink.set_stop(Stop(outcome, explanation=explanation if outcome == "content_filter" else ""))


def citations(text: str, grounding: JSON) -> Iterator[tuple[int, int, JSON]]:
    """Start, end and source. Gemini counts bytes, and is sometimes off by one."""
    encoded = text.encode("utf-8", "replace")
    sources = [object_in(chunk, "web") for chunk in objects_in(grounding, "groundingChunks")]
    for support in objects_in(grounding, "groundingSupports"):
        segment = object_in(support, "segment")
        start = count(segment, "startIndex")
        end = count(segment, "endIndex")
        cited = str(segment.get("text") or encoded[start:end].decode("utf-8", "ignore"))
        begin = len(encoded[:start].decode("utf-8", "ignore"))
        if not text.startswith(cited, begin):
            begin = text.find(cited)
        indices = support.get("groundingChunkIndices")
        if not cited or begin < 0 or not isinstance(indices, list):
            continue
        for index, source in enumerate(sources):
            if source and index in indices:
                yield begin, begin + len(cited), {**source, "url": source.get("uri") or ""}


def block_reason(action: str, holder: JSON, reason: str, message: str) -> str:
    """For the user: why the provider gave no answer."""
    words = [str(holder.get(reason))]
    for rating in objects_in(holder, "safetyRatings"):
        if rating.get("blocked"):
            words.append(str(rating.get("category")))
    more = redacted(value_text(holder.get(message)))
    return f"The provider {action} ({', '.join(words)[:200]}){': ' + more if more else '.'}"


def gemini_usage(given: JSON, grounding: JSON) -> Usage | None:
    """Thoughts and tools' input are counted apart. Search queries are billed, by Gemini 2 one an answer."""
    if not given.keys() & {"promptTokenCount", "candidatesTokenCount"}:
        return None  # Vertex sends {"trafficType": ...} until the end
    thoughts = count(given, "thoughtsTokenCount")
    inputs = count(given, "promptTokenCount") + count(given, "toolUsePromptTokenCount")
    queries = grounding.get("webSearchQueries")
    model = str(given.get("model") or "")
    searches = len(queries) if isinstance(queries, list) else 0
    if model.startswith("gemini-2"):
        searches = min(searches, 1)
    tier = str(given.get("serviceTier") or given.get("trafficType") or "").lower()
    return Usage(
        input=inputs, cached=min(count(given, "cachedContentTokenCount"), inputs),
        output=count(given, "candidatesTokenCount") + thoughts, reasoning=thoughts,
        web_searches=searches, tier=tier.removeprefix("on_demand_"), model=model[:200])


# --- 6.5 demo: a provider that works offline ---
#
# It speaks Chat Completions to the gateway, so everything else runs as with a real provider.

DEMO_SAYS = "This is Pomex's offline demo, no model was asked."
DEMO_MODELS = {
    "echo": "repeats what you sent, word by word",
    "tools": "calls one of your tools, a shell if there is one, then finishes on its output",
    "flaky": "fails at the first call, and answers the second",
}
MAX_DEMO_TEXT = 2000  # characters: the demo is no file server
# of Codex and its relatives; others are second choice
DEMO_SHELLS = ("exec_command", "shell_command", "shell")
DEMO_VALUES = {
    "array": ["echo", "hello from pomex"], "number": 1, "integer": 1, "boolean": True, "object": {}}


def demo_frames(ctx: EncodeContext) -> Iterator[bytes]:
    """Chat completion chunks."""
    if ctx.model == "flaky" and ctx.calls == 1:
        raise ProviderError("The demo provider fails on purpose.", kind="overload", upstream_status=529)
    deltas = demo_answer(ctx)
    for delta in deltas:
        yield sse_frame("", dumps({"choices": [{"delta": delta}]}))
    usage = {"prompt_tokens": -(-len(ctx.request.raw) // 4), "completion_tokens": len(deltas)}
    yield sse_frame("", dumps({"choices": [{"finish_reason": "stop"}], "usage": usage}))
    yield DONE_FRAME


def encode_demo(ctx: EncodeContext) -> JSON:
    """Nothing is sent, and nothing is lost."""
    ctx.fields = {}
    return {}


def demo_answer(ctx: EncodeContext) -> list[JSON]:
    """The words of a text, or a call."""
    items, functions = ctx.history.items, ctx.tool_map.functions
    sent = [item["content"] for item in items if item.get("role") == "user"]
    says, content = "You sent: ", sent[-1] if sent else ""
    if ctx.model == "tools" and items and items[-1]["type"] == "function_call_output":
        says, content = "The command printed: ", items[-1]["output"]
    elif ctx.model == "tools" and functions:
        tool = max(functions, key=lambda function: function["name"].endswith(DEMO_SHELLS))  # or the first
        properties = object_in(tool["parameters"], "properties")
        arguments = {
            name: DEMO_VALUES.get(str(object_in(properties, name).get("type")), "echo hello from pomex")
            for name in properties if name in required_by(tool["parameters"])}
        function = {"name": tool["name"], "arguments": dumps(arguments)}
        return [{"tool_calls": [{"index": 0, "id": f"call_{len(items)}_demo", "function": function}]}]
    elif ctx.model == "tools":
        says, content = "You offered no tool, so there is nothing to run.", ""
    text = f"{DEMO_SAYS} {says}{text_of(content).strip()[:MAX_DEMO_TEXT]}"
    return [{"content": word} for word in re.findall(r"\S+\s*|\s+", text)]


# --- 6.6 the table ---

NUMBERS = re.compile(r"\d+")
MAX_TEMPLATES = 8  # in a row without a match: the events of some streams always differ


class DeltaTemplate(NamedTuple):
    """The constant parts of a stream's events that differ only in one text: they need no JSON parser."""
    before: str = ""  # up to the quote that opens the text; "" matches no event
    after: str = ""  # from the quote that closes it
    counts: str = ""  # the rest of the event, in which only numbers differ

    def texts(self, block: str, at: int) -> tuple[list[str], int]:
        """Texts of the matching events from `at` on, and their end. With counts the last stays, for these."""
        before, after, counts = self
        texts: list[str] = []
        last = at
        while before and block.startswith(before, at):
            start = at + len(before)
            try:
                text, end = scan_string(block, start)
            except ValueError:
                break
            if not block.startswith(after, end - 1) or block.find("\\u", start, end) >= 0:
                break  # no match, or perhaps half a surrogate pair
            end += len(after) - 1
            if counts:
                start, end = end, block.find("\n\n", end) + 2
                if NUMBERS.sub("0", block[start:end]) != counts:
                    break
            texts.append(text)
            last, at = at, end
        if counts and texts:
            texts.pop()
            return texts, last
        return texts, at


def field_template(event: str, name: str) -> DeltaTemplate:
    """The template of an event whose text is its only `name`. A backslash elsewhere may hide another."""
    if event.count(f'"{name}"') > 1:
        return DeltaTemplate()
    found = re.fullmatch(rf'([^\\]*"{name}"\s*:\s*")[^"\\]*+(?:\\.[^"\\]*+)*+("[^\\]*)', event)
    if found is None:
        return DeltaTemplate()
    before, after = found.groups()
    constant, usage, counts = after.partition('"usageMetadata"')
    return DeltaTemplate(before, constant, NUMBERS.sub("0", usage + counts))


class TranslatedStream(Assembler):
    """Bytes become events, and the decoder's calls become frames."""

    def __init__(self, ctx: EncodeContext, decoder: Decoder) -> None:
        super().__init__(ctx.answer, ctx.seal)
        self.decoder = decoder
        self.decoder.sink = weakref.proxy(self)  # a cycle would keep both until a collection
        self.events = SSEDecoder()
        self.template = DeltaTemplate()
        self.templates_left = MAX_TEMPLATES

    def feed(self, data: bytes) -> None:
        block, at = self.events.decode(self.events.split(data)), 0
        while not self.upstream_done and (end := block.find("\n\n", at)) >= 0:
            texts, run_end = self.template.texts(block, at)
            delta = self.decoder.delta
            if delta and texts:
                delta.pieces.extend(texts)
                self.add_all(delta.key, texts, delta.channel)
                self.templates_left = MAX_TEMPLATES
                at = run_end
                continue
            self.read(parse_event(block[at:end]))
            self.template = DeltaTemplate()
            delta = self.decoder.delta
            if delta and self.templates_left:
                self.templates_left -= 1
                self.template = field_template(block[at:end + 2], delta.field)
            at = end + 2

    def read(self, event: Event | None) -> None:
        self.decoder.delta = None
        if event and not self.upstream_done:
            self.decoder.feed(event.data, event.event)

    def whole(self, data: bytes) -> None:
        body = provider_json(data)
        if not isinstance(body, (dict, list)):
            raise UpstreamError("The provider's answer is not a JSON object.")
        if isinstance(body, dict) and not body.get("error") and states_error(body, whole=True):
            raise classify_error(body)
        self.decoder.whole(body)

    def end(self) -> None:
        for event in self.events.finish():
            self.read(event)
        if not self.events.truncated:
            self.decoder.end()


@dataclass(slots=True)
class EncodeContext:
    """One request for one target: the input of an encoder, then of a decoder."""
    answer: ClientAnswer
    envelope: Envelope
    provider: str  # its name in envelopes
    model: str  # the provider's own name
    passthrough: bool  # an upstream that speaks the client's API gets its own bytes
    dialect: str
    prompt_cache: str = "5m"  # how long, at a messages provider
    # of the known properties of models, by prefix
    overrides: Mapping[str, JSON] = field(default_factory=dict)
    calls: int = 1  # upstream, including this one
    # set by WireApi.call
    dropped: list[str] = field(init=False)  # what the target cannot carry: encoders add to it
    settings: Any = None  # known properties of the model
    tool_map: ToolMap = field(init=False)
    history: History = field(init=False)
    fields: JSON = field(init=False)  # by path: encoders remove theirs, the rest is reported

    @property
    def request(self) -> ResponsesRequest:
        return self.answer.request

    @property
    def seal(self) -> Callable[[JSON], str]:
        return functools.partial(self.envelope.seal, self.provider, self.model)

    def take(self, path: str, default: Any = None) -> Any:
        return self.fields.pop(path, default)

    def take_effort(self, values: str) -> str:
        """An effort without a value is reported as dropped."""
        asked = self.take("reasoning.effort")
        value = effort_value(values, asked)
        if asked and not value:
            self.dropped.append("reasoning.effort")
        return value


class UpstreamCall(NamedTuple):
    """The request for the provider, and the reader of its answer."""
    wire: WireApi
    path: str
    body: bytes
    attempt: Passthrough | TranslatedStream
    dropped: list[str]  # for x-pomex-dropped
    headers: Sequence[tuple[str, str]] = ()
    frames: Iterable[bytes] = ()  # demo: the answer itself

    def repaired(self, error: GatewayError) -> UpstreamCall | None:
        """The call changed after a known refusal, if any. Once per request."""
        body, refused = json.loads(self.body), ""
        for pattern, repair in self.wire.repairs.items():
            found = re.search(pattern, f"{error.code} {error}", re.IGNORECASE)
            if found:
                repair(body, *found.groups())
                refused = "reasoning" if repair is drop_reasoning else "encrypted_content"
                break
        if body == json.loads(self.body):
            return None
        if self.wire.repairs is RESPONSES_REPAIRS:
            self.dropped.append(f"{refused}:refused")
        return self._with(body)

    def resumed(self) -> UpstreamCall | None:
        """Continues a paused turn in the same attempt."""
        paused, self.attempt.decoder.paused = self.attempt.decoder.paused, []
        if not paused:
            return None
        body = json.loads(self.body)
        if body["messages"][-1]["role"] != "assistant":
            body["messages"].append({"role": "assistant", "content": []})
        body["messages"][-1]["content"] += paused
        return self._with(body)

    def _with(self, body: JSON) -> UpstreamCall:
        return self._replace(body=dumps(body).encode(), headers=self.wire.headers(body))


class WireApi(NamedTuple):
    path: str
    encode: Callable[[EncodeContext], JSON]
    decoder: Callable[[ToolMap, Any, str], Decoder]
    models: Mapping[str, Any] = {}  # known properties, by dialect or by prefix; "" for unknown ones
    repairs: Repairs = {}
    headers: Callable[[JSON], list[tuple[str, str]]] = lambda body: []
    # the key is never in the address, which is logged
    auth: Callable[[str], list[tuple[str, str]]] = lambda key: [("authorization", "Bearer " + key)]
    vendor: str = ""  # whose rule for parameter names applies; "": the model's name decides
    # for clients of this API: their own body with little changed, and the reader of the answer
    relay: Callable[[EncodeContext], tuple[bytes, Passthrough]] | None = None

    def call(self, ctx: EncodeContext) -> UpstreamCall:
        try:
            ctx.dropped = []
            if ctx.passthrough and self.relay and self is WIRES[ctx.request.api]:
                body, attempt = self.relay(ctx)
                return UpstreamCall(self, self.path, body, attempt, ctx.dropped, self.headers({}))
            for name, instead in CLIENT_APIS[ctx.request.api].untranslated.items():
                if ctx.request.get(name, 1) != 1:
                    sentence = f"Only Chat Completions servers know {name}: for this model send {instead}."
                    raise BadRequest(sentence, param=name, code="unsupported_parameter")
            ctx.answer.request = ctx.request.translated()
            items, ctx.dropped = unseal_items(ctx.request.input, ctx.envelope, ctx.provider)
            if ctx.passthrough and self.encode is encode_responses:
                return self._send_whole(ctx, items)
            return self._translate(ctx, items)
        except RecursionError:
            raise BadRequest("The request is nested too deeply.", code="invalid_json") from None

    def _send_whole(self, ctx: EncodeContext, items: list[JSON]) -> UpstreamCall:
        """OpenAI's own API needs nothing simplified in the request of a client of another API."""
        request, own_names = ctx.request, CLIENT_APIS[ctx.request.api].own_names
        for item in items:
            item.update(item.pop("sealed_replay", {}))
        body: JSON = {"model": ctx.model, "input": items, "store": False}
        for name, value in request.body.items():
            if name in REQUEST_FIELDS:
                body.setdefault(name, value)
            elif name not in CARRIED_BY_ALL and value not in NEUTRAL.get(name, ()):
                ctx.dropped.append(name)
        dropped = list(dict.fromkeys(own_names.get(name, name) for name in ctx.dropped))
        attempt = TranslatedStream(ctx, ResponsesDecoder(ToolMap(())))
        return UpstreamCall(self, self.path, dumps(body).encode(), attempt, dropped)

    def model_settings(self, ctx: EncodeContext) -> Any:
        row = self.models.get(ctx.dialect or "generic") or longest_prefix(self.models, ctx.model) or Dialect()
        return row._replace(**(longest_prefix(ctx.overrides, ctx.model) or {}))

    def _translate(self, ctx: EncodeContext, items: list[JSON]) -> UpstreamCall:
        request = ctx.request
        ctx.settings = self.model_settings(ctx)
        searches = getattr(ctx.settings, "web_search", False)
        vendor = self.vendor or ctx.model
        tools, tool_map = request.memo.get((vendor, searches), (None, None))
        if tools != request.tools:
            tool_map = ToolMap(request.tools, searches, vendor)
            request.memo[vendor, searches] = request.tools, tool_map
        ctx.tool_map = tool_map
        ctx.dropped += tool_map.dropped
        ctx.history = normalize_history(request.instructions, items, tool_map, ctx.dropped, request.memo)
        ctx.fields = request_fields(request.body)
        ctx.dropped += unknown_keys("tools", request.tools)
        for item in request.input:
            parts = only_dicts(item.get("content") or item.get("output"))
            ctx.dropped += unknown_keys("content", parts)
            if item["type"] == "configuration_update":  # the last one counts
                update = {name: item.get(name) for name in ("reasoning", "text")}
                ctx.fields |= request_fields(update)
        body = self.encode(ctx)
        own_names = CLIENT_APIS[request.api].own_names
        for path, value in ctx.fields.items():
            if path not in CARRIED_BY_ALL and value not in NEUTRAL.get(path, ()):
                ctx.dropped.append(path)
        dropped = list(dict.fromkeys(own_names.get(name, name) for name in ctx.dropped))
        model = urllib.parse.quote(ctx.model.removeprefix("models/"), safe="")
        method = "streamGenerateContent?alt=sse" if request.stream else "generateContent"
        path = self.path.format(model, method)
        decoder = self.decoder(tool_map, ctx.settings, f"call_{ctx.answer.id[-12:]}_")
        attempt = TranslatedStream(ctx, decoder)
        return UpstreamCall(self, path, dumps(body).encode(), attempt, dropped, self.headers(body),
                            frames=() if path else demo_frames(ctx))


def relay_responses(ctx: EncodeContext) -> tuple[bytes, Passthrough]:
    """The client's own bytes go up, and the upstream's bytes come down."""
    unsealed, dropped = unseal_items(ctx.request.input, ctx.envelope, ctx.provider)
    ctx.dropped += dropped
    # nothing is stored there: a reasoning item with only its id would be a 404 in every later turn
    items = [item for item in unsealed if "sealed_replay" in item or not is_summary_only(item)]
    if len(items) < len(unsealed):
        ctx.dropped.append("input:reasoning")
    body = passthrough_body(ctx.request, items, ctx.dropped, ctx.model)
    return body, ResponsesPassthrough(ctx.answer, ctx.seal, ResponsesDecoder(ToolMap(())))


def relay_chat(ctx: EncodeContext) -> tuple[bytes, Passthrough]:
    """The client's own bytes go up, with the usage asked for and the key's limit; the chunks come down."""
    request, given = ctx.request, ctx.request.given
    ctx.settings = WIRES["chat"].model_settings(ctx)
    changes: JSON = {}
    if request.stream:
        changes["stream_options"] = {**(given.get("stream_options") or {}), "include_usage": True}
    limits = [name for name in ("max_tokens", "max_completion_tokens") if given.get(name)]
    if limit := request.get("max_output_tokens"):
        for name in limits or [ctx.settings.max_tokens]:
            changes[name] = min(given.get(name) or limit, limit)
    if ENVELOPE_PREFIX.encode() in request.raw:
        changes["messages"] = [without_envelopes(message) for message in given["messages"]]
    changes = {name: value for name, value in changes.items() if value != given.get(name)}
    if "messages" in changes:
        ctx.dropped.append("reasoning_details")
    body, exact = splice_model(request, ctx.model, changes)
    if not exact or changes.keys() & given.keys():
        body = dumps({**given, "model": ctx.model, **changes}).encode()
    return body, ChatPassthrough(ctx.answer, ctx.seal, ChatDecoder(ToolMap(()), ctx.settings))


def without_envelopes(message: Any) -> Any:
    """A message without sealed reasoning, which is another provider's: a chat server's own is not sealed."""
    sealed = sealed_details(as_dict(message))
    if not sealed:
        return message
    rest = {**message}
    kept = [detail for detail in rest.pop("reasoning_details") if detail not in sealed]
    return {**rest, "reasoning_details": kept} if kept else rest


def relay_messages(ctx: EncodeContext) -> tuple[bytes, Passthrough]:
    """The client's own bytes go up, but for `model`, what only Pomex understands, and the key's limit."""
    request, given = ctx.request, ctx.request.given
    changes: JSON = {}
    if ENVELOPE_PREFIX.encode() in request.raw:
        changes["messages"] = opened_messages(given["messages"], ctx)
    limit = request.get("max_output_tokens")
    if limit != given.get("max_tokens"):
        changes["max_tokens"] = limit
        thinking = object_in(given, "thinking")
        if count(thinking, "budget_tokens") >= limit:
            changes["thinking"] = {**thinking, "budget_tokens": limit - 1}
            if limit <= LEAST_BUDGET:
                changes["thinking"] = {"type": "disabled"}
                ctx.dropped.append("thinking")
    body, exact = splice_model(request, ctx.model, {})
    if changes or not exact:
        body = dumps({**given, **changes, "model": ctx.model}).encode()
    return body, MessagesPassthrough(ctx.answer, ctx.seal, MessagesDecoder(ToolMap(())))


def opened_messages(messages: list[Any], ctx: EncodeContext) -> list[Any]:
    """Messages without our envelopes: this provider's own thoughts are opened, those of others dropped."""
    found = dict.fromkeys(text.decode() for text in ENVELOPED.findall(ctx.request.raw))
    items = [{"type": "thinking", "encrypted_content": text, "at": text} for text in found]
    kept, dropped = unseal_items(items, ctx.envelope, ctx.provider)
    ctx.dropped += dict.fromkeys(dropped)
    opened = {item["at"]: objects_in(item["sealed_replay"], "blocks") for item in kept}
    made = []
    for message in messages:
        content = as_dict(message).get("content")
        if isinstance(content, list):
            blocks: list[Any] = []
            for block in content:
                fields = as_dict(block)
                sealed = str(fields.get("signature") or fields.get("data"))
                cited = objects_in(fields, "citations")
                kept_sources = [each for each in cited if each.get("encrypted_index") != UNSIGNED]
                if len(kept_sources) < len(cited):
                    block = {**block, "citations": kept_sources or None}
                blocks += opened.get(sealed, []) if sealed.startswith(ENVELOPE_PREFIX) else [block]
            if content and not blocks:
                continue
            message = {**message, "content": blocks}
        made.append(message)
    return made


WIRES: dict[str, WireApi] = {
    "responses": WireApi(
        "/responses", encode_responses, decoder=ResponsesDecoder, repairs=RESPONSES_REPAIRS,
        relay=relay_responses),
    "chat": WireApi("/chat/completions", encode_chat, decoder=ChatDecoder, models=DIALECTS, relay=relay_chat),
    "messages": WireApi(
        "/messages", encode_messages, decoder=MessagesDecoder, models=ANTHROPIC_MODELS,
        repairs=MESSAGES_REPAIRS, headers=messages_headers, auth=lambda key: [("x-api-key", key)],
        vendor="claude", relay=relay_messages),
    "gemini": WireApi(
        "/models/{}:{}", encode_gemini, decoder=GeminiDecoder, models=GEMINI_MODELS, repairs=GEMINI_REPAIRS,
        auth=lambda key: [("x-goog-api-key", key)], vendor="gemini"),
    "demo": WireApi("", encode_demo, decoder=ChatDecoder, models=DIALECTS),
}


# === 7. configuration ===
#
# pomex.toml as frozen dataclasses. A field made by `option` is a key of the file; the others are derived.

def parse_dollars(value: float) -> decimal.Decimal:
    """The decimal number as written in the file: a float's shortest text."""
    number = decimal.Decimal(str(value))
    if number != round(number, 6):
        raise ValueError
    return number


def target_tiers(value: list[Any]) -> tuple[tuple[Target, ...], ...]:
    """Reads tiers: a string is a tier of its own, a list of strings is one tier."""
    tiers = [tier if isinstance(tier, list) else [tier] for tier in value]
    if not all(re.fullmatch("[^:]+:.+", name) for tier in tiers for name in tier or [""]):
        raise ValueError
    return tuple(tuple(Target(*name.split(":", 1)) for name in tier) for tier in tiers)


def read_base_url(url: str) -> str:
    """The address without its last slash."""
    if urllib.parse.urlsplit(url).port == 0:  # above 65535 is a ValueError, too
        raise ValueError
    return url.rstrip("/")


# by the type of a key's default
OPTION_FIELDS: dict[type, Field] = {
    str: TEXT,
    bool: FLAG,
    int: Field((int,)),
    float: Field((int, float), read=float),
    tuple: Field((list,), items=NAME, read=tuple, wanted="a list of strings"),
    dict: Field((dict,), items=TEXT, wanted='a table of strings, like { "name" = "value" }'),
    type(None): Field((int, float), read=parse_dollars,
                      wanted="an amount of dollars with at most six decimals"),
}


def option(
    default: Any, meaning: str, minimum: float | None = None, maximum: float = math.inf, **rules: Any,
) -> Any:
    """A key of pomex.toml, of the default's type; `rules` are attributes of its Field."""
    spec = OPTION_FIELDS[type(default)]
    spec = spec._replace(meaning=meaning, minimum=minimum, maximum=maximum, **rules)
    return field(
        default_factory=lambda: default,
        repr=not spec.secret,
        metadata={"spec": spec})


Dollars: TypeAlias = "decimal.Decimal | None"
seconds = functools.partial(option, minimum=0.1, maximum=3600)
price_option = functools.partial(option, None, minimum=0, maximum=100000)


PUBLIC_HOST = Field(pattern=r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]",
                    wanted="a plain name, without scheme, port or wildcard")
NETWORK = Field(read=ipaddress.ip_network, wanted='an address or a network, like "10.0.0.7" or "10.0.0.0/8"')


@dataclass(frozen=True)
class ServerConfig:
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every interface", 1)
    port: int = option(7663, "port to listen on; 0 takes a free one", 0, 65535)
    workers: int = option(1, "processes that share port and database; one a core", 1, 64)
    tls_cert: str = option("", "certificate chain (PEM file); with it the gateway speaks https itself")
    tls_key: str = option("", "its private key (PEM file)")
    public_hosts: Strings = option(
        (), "more host names that clients use, e.g. a proxy's", items=PUBLIC_HOST)
    trusted_proxies: Strings = option(
        (), "addresses and networks whose X-Forwarded-For names the client", items=NETWORK)
    header_timeout_s: float = seconds(30.0, "longest wait for a whole request head")
    body_timeout_s: float = seconds(120.0, "longest wait for a whole body")
    keep_alive_timeout_s: float = seconds(75.0, "how long an idle client connection is kept")
    write_timeout_s: float = seconds(60.0, "a client that reads nothing for this long is disconnected")
    drain_timeout_s: float = option(30.0, "how long open streams may go on after a stop signal", 0, 3600)
    heartbeat_s: float = seconds(15.0, "silence before a heartbeat; proxies cut at 60")
    early_200_after_s: float = seconds(20.0, "wait for output before 200 and heartbeats")
    max_head_bytes: int = option(65536, "longest request head; real ones have about 2 KB", 1024, 16777216)
    max_body_bytes: int = option(67108864, "longest request body; images come inline", 1024, 4294967296)
    max_bodies_bytes: int = option(
        1073741824, "request bodies in memory, of all open requests", 1024, 1 << 50)
    max_bodies_bytes_each: int = option(
        268435456, "the share of one key or one address in it", 1024, 1 << 50)
    max_connections: int = option(4096, "client connections at once; a stream takes two files", 1, 1000000)
    max_connections_per_address: int = option(
        512, "the share of one address, perhaps a whole office", 1, 1000000)
    request_deadline_s: float = option(3600.0, "longest request, all attempts together", 0.1, 86400)
    log_format: str = option("plain", "log lines on stderr", choices=("plain", "json"))
    admin_token: Strings = option(
        (), 'opens the admin API to machines: "env:NAME", "file:PATH", 16 characters or more; or a list',
        types=(list, str), items=TEXT, secret=True, wanted="a string or a list of strings",
        read=lambda value: tuple(filter(None, [value] if isinstance(value, str) else value)))
    max_answer_chars: int = option(
        33554432, "longest answer: text, reasoning and arguments; real ones end below 1 MB", 1024, 4294967296)
    max_answer_items: int = option(4096, "output items of one answer; real ones have below 100", 1, 1000000)
    reserve_output_tokens: int = option(
        16384, "output that a request of a key with a budget reserves at first", 256, 1000000)
    allow_unpriced: bool = option(False, "keys with a budget may use models without a price, at no cost")


@dataclass(frozen=True)
class DatabaseConfig:
    url: str = option(
        "sqlite:pomex.db", "keys and usage: a file (relative: beside this one), or one PostgreSQL for "
        'many machines, "postgresql://user@host/name"; "env:NAME" or "file:PATH" too', secret=True,
        pattern="(sqlite:(?!//)|postgres(ql)?://|env:|file:).+",
        wanted='like "sqlite:pomex.db" or "postgresql://user@host/name"')
    durability: str = option(
        "process", "what answered requests survive with SQLite: a killed process, or a power loss",
        choices=("process", "power"))
    max_unsaved: int = option(
        10_000, "usage rows kept in memory while the database cannot be written", 1, 1_000_000)

    @property
    def place(self) -> str:
        """The file, or PostgreSQL's URL."""
        return self.url.removeprefix("sqlite:")

    @property
    def postgres(self) -> PostgresAddress | None:
        return read_postgres_url(self.url) if POSTGRES_URL.fullmatch(self.url) else None


@dataclass(frozen=True)
class DemoConfig:
    enabled: bool = option(True, "demo/echo and its family: works offline, costs nothing, calls no model")


@dataclass(frozen=True)
class ProviderConfig:
    name: str
    wire_api: str = option("", "the API it speaks", choices=tuple(WIRES))
    base_url: str = option(
        "", "its address with its version; Pomex appends e.g. /chat/completions", read=read_base_url,
        pattern=r"(?!.*([?#]|//[^/]*@|/(chat/completions|responses|messages)/*$))"
                r"https?://[0-9A-Za-z\[][!-~]*",
        wanted='an address like "https://api.example.com/v1": no user, query or fragment (there are api_key'
               " and query_params), and no /chat/completions, /responses or /messages, which Pomex appends")
    env_key: str = option("", "the environment variable that holds its key")
    api_key: str = option("", 'instead: "file:/run/secrets/x", "env:NAME", or the key itself', secret=True)
    api_keys: Strings = option(
        (), "instead: several such keys; one that fails is skipped", secret=True)
    http_headers: dict[str, str] = option({}, "headers added to every call", secret=True)
    env_http_headers: dict[str, str] = option({}, "the same, each value taken from an environment variable")
    query_params: dict[str, str] = option({}, "query parameters added to every call", secret=True)
    models: Strings = option(("*",), "which names clients may use as provider/NAME; * is any text")
    relay: str = option(
        "normalise", "a responses provider's stream: normalised, or passed through byte for byte",
        choices=("normalise", "bytes"))
    dialect: str = option(
        "", "the kind of chat server, e.g. deepseek; by default a plain one", choices=DIALECTS)
    ca_file: str = option("", "certificates to trust in place of the system's (PEM file)")
    proxy: str = option(
        "off", '"http://host:port", or "env" for HTTPS_PROXY', secret=True,
        pattern="off|env|http://([!-.0-?A-~]+@)?[!-.0-?A-~]+:[0-9]{1,5}/?",
        wanted='"off", "env" or an address like "http://proxy.example:3128"')
    connect_timeout_s: float = seconds(10.0, "longest wait for a connection, TLS included")
    first_byte_timeout_s: float = option(300.0, "longest wait for the answer's head", 0.1, 86400)
    idle_timeout_s: float = option(300.0, "longest silence inside an answer; pings are silence", 0.1, 86400)
    total_timeout_s: float = option(3600.0, "longest answer", 0.1, 86400)
    prompt_cache: str = option(
        "5m", "how long a messages provider is asked to keep prompts", choices=("5m", "1h", "off"))
    overrides: dict[str, JSON] = option(
        {}, "capability overrides by model-name prefix", items=OBJECT,
        wanted='a table of tables, like { "name" = { key = value } }')
    free: bool = option(False, "its models cost nothing where they have no price")
    local: bool = False   # base_url is on this machine or its private network
    key_source: str = ""  # "env:NAME", "file:PATH", or the configuration file's name; "" without a key


class Target(NamedTuple):
    """One model at one provider, written provider:model."""
    provider: str
    model: str


@dataclass(frozen=True)
class ModelConfig:
    name: str
    targets: tuple[tuple[Target, ...], ...] = option(
        (), "tiers in failover order",
        items=Field((str, list), items=TEXT), read=target_tiers,
        wanted='a list of "provider:model"; a list inside it is one tier')
    context_window: int = option(0, "tokens, for clients to compact by; 0: not known", 0, 100000000)
    description: str = option("", "one line for the model list")


@dataclass(frozen=True)
class PriceConfig:
    """US dollars per million tokens. An omitted cache price equals the price of plain input."""
    input: Dollars = price_option("input that is not cached; 0 is free")
    output: Dollars = price_option("output, reasoning included")
    cache_read: Dollars = price_option("input read from the provider's cache")
    cache_write: Dollars = price_option("input written to it")
    cache_write_1h: Dollars = price_option("input written to be kept long: 1 h at Anthropic")
    search_per_1000: Dollars = price_option("a thousand of the provider's own web searches")
    tiers: dict[str, decimal.Decimal] = option(
        {}, "price factors of service tiers",
        items=Field((int, float), 0, 999_999_999),
        read=lambda table: {name: parse_dollars(value) for name, value in table.items()},
        wanted="a table of numbers, like { priority = 2 }")
    long_over: int = option(
        0, "with more input than this a request has the long_ prices; 0: never", 0, 100000000)
    long_input: Dollars = price_option("input of a long request")
    long_output: Dollars = price_option("its output")
    long_cache_read: Dollars = price_option("input that it reads from the cache")
    long_cache_write: Dollars = price_option("input that it writes there")
    long_cache_write_1h: Dollars = price_option("input that it writes there to be kept long")


@dataclass(frozen=True)
class Config:
    server: ServerConfig
    database: DatabaseConfig
    demo: DemoConfig
    providers: dict[str, ProviderConfig]
    models: dict[str, ModelConfig]
    prices: dict[str, PriceConfig]
    path: str = ""  # of the file; "" without one

    @property
    def warnings(self) -> list[str]:
        return [
            f"{provider.name}: http sends every prompt in the clear; use https where the server has it"
            for provider in self.providers.values()
            if provider.base_url.startswith("http:") and not provider.local
        ]


SECTIONS = {"server": ServerConfig, "database": DatabaseConfig, "demo": DemoConfig}
NAMED_SECTIONS = {"providers": ProviderConfig, "models": ModelConfig, "prices": PriceConfig}


BUILTIN_PROVIDERS: dict[str, ProviderConfig] = {}  # filled in layer 14
DEMO_PROVIDER = ProviderConfig("demo", wire_api="demo", local=True)


def fill_providers(text: str) -> None:
    """Adds the built-in providers, one per line. A chat server's name is its dialect; no key: it is local."""
    for line in text.splitlines():
        values: JSON = dict(zip(("name", "wire_api", "base_url", "env_key", "relay"), line.split()))
        name = values["name"]
        dialect = name if values["wire_api"] == "chat" else ""
        BUILTIN_PROVIDERS[name] = ProviderConfig(**values, dialect=dialect, local="env_key" not in values)


def config_fields(section: type[Any]) -> Fields:
    keys = dataclasses.fields(section)
    return {key.name: key.metadata["spec"] for key in keys if key.metadata}


# --- 7.1 the file ---

def check_text(text: str, spec: Field, path: str) -> Any:
    """Converts and checks the text of a variable or an argument."""
    value: Any = text
    kind = spec.types[-1]
    if kind is list:
        value = [entry.strip() for entry in text.split(",")]
    elif kind is bool:
        value = {"true": True, "false": False}.get(text, text)
    else:
        with contextlib.suppress(ValueError):  # check reports the mistake
            value = kind(text)
    return check(value, spec, path)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?', or '' without a similar name."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""


def toml_name(path: Strings) -> str:
    """A key path as a user writes it."""
    bare = re.compile(r"[A-Za-z0-9_-]+")
    return ".".join(key if bare.fullmatch(key) else f'"{key}"' for key in path)


def no_file(path: str) -> str:
    raise OSError(errno.ENOENT, "no files here")


REFERENCE = ("env:", "file:")  # any other secret is a literal
PATH_KEYS = {"tls_cert", "tls_key", "ca_file"}


@dataclass(eq=False, repr=False)
class ConfigFile:
    """One configuration file, with the variables and files that it may refer to."""
    text: str
    name: str
    environ: Mapping[str, str]
    read_file: Callable[[str], str]

    def __post_init__(self) -> None:
        try:
            self.toml: JSON = tomllib.loads(self.text)
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, deeply nested brackets
            at = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error), re.DOTALL)
            where = f" line {at[2]}: {at[1]} (column {at[3]})" if at else f": {error}"
            raise ConfigError(self.name + where) from None
        sections = (*SECTIONS, *NAMED_SECTIONS)
        for name in (key for key in self.toml if key not in sections):
            if isinstance(self.toml[name], dict):
                raise self.error(f"unknown section [{toml_name((name,))}].{did_you_mean(name, sections)}")
            raise self.error(f'key "{name}" stands outside any section, like [server].')

    def error(self, sentence: str) -> ConfigError:
        return ConfigError(f"{self.name}: {sentence}")

    @contextlib.contextmanager
    def about(self, path: Strings, value: object, secret: bool) -> Iterator[None]:
        """Turns an error into a message about this value."""
        try:
            yield
        except (ValueError, BadRequest) as error:
            shown = json.dumps(value, ensure_ascii=False, default=str)[:100]
            if secret:
                shown = "(hidden)"
            sentence = str(error).lstrip(": ")
            raise self.error(f"[{toml_name(path[:-1])}] {path[-1]} = {shown}: {sentence}") from None

    def table(self, *path: str) -> JSON:
        """A table of the file; empty if omitted."""
        table: Any = functools.reduce(lambda inner, key: inner.get(key, {}), path, self.toml)
        if not isinstance(table, dict):
            raise self.error(f"{toml_name(path)} must be a table: [{toml_name(path)}]")
        return table

    def settings(self, fields: Fields, *path: str, prefix: str = "") -> JSON:
        """The checked values of a table. Variables with the prefix, like POMEX_PORT, override the file."""
        values = {}
        for name, value in self.table(*path).items():
            if name not in fields:
                hint = did_you_mean(name, fields) or f" Known keys: {', '.join(fields)}." * bool(fields)
                raise self.error(f'unknown key "{name}" in [{toml_name(path)}].{hint}')
            with self.about((*path, name), value, fields[name].secret):
                values[name] = check(value, fields[name], "")
        for name, spec in fields.items():
            variable = prefix + name.upper()
            if prefix and self.environ.get(variable):
                try:
                    values[name] = check_text(self.environ[variable], spec, variable)
                except BadRequest as error:
                    raise ConfigError(str(error)) from None
        for name in values.keys() & PATH_KEYS:
            values[name] = self.resolve_path(values[name])
        return values

    def resolve_path(self, path: str) -> str:
        """A path relative to the file, with ~ for the home directory."""
        if path.startswith("~/"):
            path = self.environ.get("HOME", "~") + path[1:]
        folder = os.path.dirname(self.name)
        return os.path.join(folder, path) if path else ""

    def variable(self, name: str) -> str:
        """A variable's value; the ValueError names a similar one that is set."""
        if value := self.environ.get(name, "").strip():
            return value
        known = [key for key in self.environ if self.environ[key].strip()]
        raise ValueError(f"that variable is not set.{did_you_mean(name, known)}")

    def secret(self, reference: str) -> str:
        """The secret behind "env:NAME", "file:PATH" or a literal."""
        kind, _, rest = reference.partition(":")
        if kind == "env":
            return self.variable(rest)
        if kind != "file":
            return reference
        try:
            return self.read_file(self.resolve_path(rest)).strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ValueError(f"that file cannot be read ({reason}).") from None


# --- 7.2 providers and models ---

PROVIDER_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
MODEL_NAME = re.compile(r"[!-.0-~]+/[!-~]+")
KEY_VALUE = re.compile(r"[!-~]+")
OWN_HEADER = re.compile("(?i)host|content-length|transfer-encoding|connection|expect")


def is_private(url: str) -> bool:
    """Is this address on this machine or its own network?"""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:  # a name: a single word, or in a domain for private use (RFC 6761, 6762, 8375)
        domains = (".localhost", ".local", ".internal", ".lan", ".home.arpa")
        return "." not in host or host.endswith(domains)


def read_provider(source: ConfigFile, name: str) -> ProviderConfig:
    """One [providers.NAME]. A built-in provider's table needs only the differences."""
    path = ("providers", name)
    if not PROVIDER_NAME.fullmatch(name):
        raise source.error(f'provider name "{name}": use small letters, digits, "_", "." and "-".')
    values = source.settings(config_fields(ProviderConfig), *path)
    if values.keys() & {"base_url", "api_key", "api_keys"}:
        values.setdefault("env_key", "")  # a built-in provider's key goes to no other address
    if "base_url" in values:
        values.setdefault("relay", "normalise")  # no other server is trusted to behave like the original
    base = BUILTIN_PROVIDERS.get(name, DEMO_PROVIDER if name == "demo" else ProviderConfig(name))
    provider = dataclasses.replace(base, **values)
    if not provider.wire_api:
        raise source.error(f"[{toml_name(path)}] lacks wire_api, one of {', '.join(WIRES)}.")
    models = WIRES[provider.wire_api].models
    facts = models[""]._asdict() if models else {}
    known = {
        name: Field((type(value),))
        for name, value in facts.items()
        if isinstance(value, (str, int))
    }
    for prefix in provider.overrides:
        source.settings(known, *path, "overrides", prefix)
    headers = read_headers(source, provider)
    keys = read_keys(source, provider)
    local = is_private(provider.base_url)
    if provider.wire_api != "demo":
        if not provider.base_url:
            raise source.error(f'[{toml_name(path)}] lacks base_url, like "https://api.example.com/v1".')
        if provider.base_url.startswith("http:") and (keys or provider.env_http_headers) and not local:
            raise source.error(
                f"[{toml_name(path)}] base_url: plain http would expose the API key; use https.")
    return dataclasses.replace(provider, http_headers=headers, local=local, **keys)


def read_keys(source: ConfigFile, provider: ProviderConfig) -> JSON:
    """A provider's keys and their sources, as values of its configuration; {} without any."""
    path = ("providers", provider.name)
    given = [name for name in ("env_key", "api_key", "api_keys") if getattr(provider, name)]
    if not given:
        return {}
    if len(given) > 1:
        raise source.error(f"[{toml_name(path)}] has both {' and '.join(given)}; keep one.")
    keys: dict[str, str] = {}  # key -> its source
    for reference in provider.api_keys or (provider.api_key or f"env:{provider.env_key}",):
        secret = not reference.startswith(REFERENCE)
        with source.about((*path, given[0]), provider.env_key or reference, secret):
            key = source.secret(reference)
            if not KEY_VALUE.fullmatch(key):
                raise ValueError("the key is empty, or has a space or a character not allowed in keys.")
            keys.setdefault(key, source.name if secret else reference)
    return {
        "api_key": [*keys][0],
        "api_keys": tuple(keys) if len(keys) > 1 else (),
        "key_source": ", ".join(dict.fromkeys(keys.values())),
    }


def read_headers(source: ConfigFile, provider: ProviderConfig) -> dict[str, str]:
    """The headers of every call, including those from the environment."""
    headers = {}
    for table in ("http_headers", "env_http_headers"):
        literal = table == "http_headers"
        for name, value in getattr(provider, table).items():
            with source.about(("providers", provider.name, table, name), value, secret=literal):
                headers[name] = value if literal else source.variable(value)
                if OWN_HEADER.fullmatch(name):
                    raise ValueError("is a header that Pomex sets itself.")
                try:
                    field_line(name, headers[name])
                except ValueError:
                    raise ValueError("a header needs a plain name and a value of one line.") from None
    return headers


def read_model(
    source: ConfigFile, name: str, providers: Mapping[str, ProviderConfig],
) -> ModelConfig:
    """One [models.NAME]; without targets, a description."""
    path = ("models", name)
    model = ModelConfig(name, **source.settings(config_fields(ModelConfig), *path))
    bare = model.targets and "/" not in name and KEY_VALUE.fullmatch(name)
    if not bare and not MODEL_NAME.fullmatch(name):
        raise source.error(f'model name "{name}": it must be like "openai/gpt-5.3-codex", or have targets.')
    for target in itertools.chain.from_iterable(model.targets):
        if target.provider not in providers:
            table = toml_name(("providers", target.provider))
            hint = did_you_mean(target.provider, providers) or f" Add [{table}]."
            written = f'[{toml_name(path)}] targets: "{":".join(target)}"'
            raise source.error(f"{written} names no configured provider.{hint}")
    return model


def read_prices(source: ConfigFile, name: str) -> PriceConfig:
    path = ("prices", name)
    if not MODEL_NAME.fullmatch(name):
        raise source.error(f'model name "{name}": it must be like "openai/gpt-5.3-codex".')
    prices = PriceConfig(**source.settings(config_fields(PriceConfig), *path))
    if prices.input is None or prices.output is None:
        raise source.error(
            f"[{toml_name(path)}] needs input and output, in US dollars per million tokens; 0 is free.")
    if prices.long_over and (prices.long_input is None or prices.long_output is None):
        raise source.error(f"[{toml_name(path)}] long_over needs long_input and long_output.")
    return prices


# --- 7.3 PostgreSQL's address ---

POSTGRES_URL = re.compile(r"postgres(?:ql)?://(?:([^/?]*)@)?([^@/?]*)(?:/([^?]*))?(?:\?(.*))?")
POSTGRES_HOST = re.compile(r"(/[^\0]*|\[[^\]\0]+\]|[\w-]{1,63}(?:\.[\w-]{1,63})*\.?)(?::([0-9]{1,5}))?")
POSTGRES_PARAMETERS = {  # name -> its values, and the sentence for others
    **dict.fromkeys(("host", "port", "user", "password", "dbname"), (".*", "")),
    "sslmode": (
        "disable|require|verify-ca|verify-full",
        "sslmode must be verify-full, verify-ca, require or disable. (allow and prefer would go on in the "
        "clear without a word.)"),
    **dict.fromkeys(("sslrootcert", "sslcert", "sslkey"), (".*", "")),
    "connect_timeout": ("[1-9][0-9]{0,2}", "connect_timeout is in seconds, from 1 to 999."),
    "application_name": (".*", ""),
    "target_session_attrs": (
        "any|read-write|primary", "target_session_attrs must be read-write: Pomex writes.")}


class PostgresAddress(NamedTuple):
    """A connection URI of libpq (PostgreSQL's manual, 34.1.1.2)."""
    hosts: tuple[tuple[str, int], ...]  # tried in this order; "/run/postgresql" is a socket's folder
    user: str
    password: str
    database: str
    sslmode: str  # disable | require | verify-ca | verify-full
    parameters: Mapping[str, str]

    @property
    def name(self) -> str:
        """Without the password, for messages."""
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"postgresql://{self.user}@{hosts}/{self.database}"


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or bool(re.fullmatch(r".*\.localhost|127(\.\d+){3}", host))


def read_postgres_url(url: str) -> PostgresAddress:
    """ValueError says what is wrong, without the URL."""
    found = POSTGRES_URL.fullmatch(url)
    if found is None:
        raise ValueError('must be like "postgresql://user@host:5432/name?sslmode=verify-full".')
    login, netloc, path, query = (text or "" for text in found.groups())
    user, _, password = login.partition(":")
    pairs = [word.partition("=")[::2] for word in query.split("&") if word]
    for name, _ in pairs:
        if name not in POSTGRES_PARAMETERS:
            hint = did_you_mean(name, POSTGRES_PARAMETERS)
            shown = "(hidden)" if "@" in query else name[:40]  # of a password with a question mark
            raise ValueError(f"the parameter {shown} is not known here.{hint} Known: "
                             f"{', '.join(POSTGRES_PARAMETERS)}.")
    parts = ("user", user), ("password", password), ("host", netloc), ("dbname", path)
    pairs += [part for part in parts if part[1]]
    given = {name: urllib.parse.unquote(value) for name, value in pairs}
    hosts = read_hosts(given.get("host", ""), given.get("port", "5432"))
    for name, value in given.items():
        pattern, sentence = POSTGRES_PARAMETERS[name]
        if sentence and not re.fullmatch(pattern, value):
            raise ValueError(sentence)
    if "user" not in given:
        raise ValueError("it names no user, like postgresql://user@host/name.")
    local = all(host.startswith("/") or is_loopback(host) for host, _ in hosts)
    return PostgresAddress(
        hosts, given["user"], given.get("password", ""), given.get("dbname") or given["user"],
        given.get("sslmode", "disable" if local else "verify-full"), given)


def read_hosts(texts: str, usual_port: str) -> tuple[tuple[str, int], ...]:
    hosts = []
    for text in texts.split(","):
        at = POSTGRES_HOST.fullmatch(text)
        port = (at and at[2]) or usual_port
        if at is None or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError("it names no host, or a port that is none. (The folder of a socket is "
                             "?host=/run/postgresql; in a password @ : / ? # % are %40 %3A %2F %3F %23 %25.)")
        hosts.append((at[1].strip("[]"), int(port)))
    return tuple(hosts)


def database_url(source: ConfigFile, url: str) -> str:
    """With what the file or variable behind it says, an absolute path, and PGPASSWORD. ConfigError."""
    with source.about(("database", "url"), "", secret=True):
        url = check(source.secret(url), config_fields(DatabaseConfig)["url"], "")
        if url.startswith("sqlite:"):
            return f"sqlite:{source.resolve_path(url.removeprefix('sqlite:'))}"
        password = source.environ.get("PGPASSWORD", "")
        if password and not read_postgres_url(url).password:
            url += f"{'&' if '?' in url else '?'}password={urllib.parse.quote(password, safe='')}"
        read_postgres_url(url)
        return url


# --- 7.4 the whole configuration ---

ADMIN_TOKEN = Field(pattern="(?!sk-rh-)[!-~]{16,}",
                    wanted="at least 16 characters, without spaces, and no API key")


def load_config(
    text: str, name: str, environ: Mapping[str, str], read_file: Callable[[str], str] = no_file,
) -> Config:
    """The configuration in a file's text; without a name, the defaults."""
    source = ConfigFile(text, name, environ, read_file)
    server = source.settings(config_fields(ServerConfig), "server", prefix="POMEX_")
    if bool(server.get("tls_cert")) != bool(server.get("tls_key")):
        raise source.error("[server] tls_cert and tls_key need each other.")
    tokens = []
    for token in server.get("admin_token", ()):
        with source.about(("server", "admin_token"), token, secret=not token.startswith(REFERENCE)):
            tokens.append(check(source.secret(token), ADMIN_TOKEN, ""))
    server["admin_token"] = tuple(tokens)
    database = source.settings(config_fields(DatabaseConfig), "database", prefix="POMEX_DATABASE_")
    if not name:  # without a file, the state folder holds the database
        home = environ.get("HOME") or environ.get("USERPROFILE") or "."
        state = environ.get("XDG_STATE_HOME") or f"{home}/.local/state"
        database.setdefault("url", f"sqlite:{state}/pomex/pomex.db")
    database["url"] = database_url(source, DatabaseConfig(**database).url)
    demo = DemoConfig(**source.settings(config_fields(DemoConfig), "demo"))
    providers = {each: read_provider(source, each) for each in source.table("providers")}
    if demo.enabled:
        providers.setdefault("demo", DEMO_PROVIDER)
    models = {each: read_model(source, each, providers) for each in source.table("models")}
    prices = {each: read_prices(source, each) for each in source.table("prices")}
    return Config(
        ServerConfig(**server), DatabaseConfig(**database), demo, providers, models, prices, path=name)


PLAIN_VALUES = re.compile(
    r"(?i)(api|anthropic|openai)-(version|beta)|accept|content-type|user-agent|http-referer|x-title")


def secret_pattern(providers: Iterable[ProviderConfig], *more: str) -> re.Pattern[str]:
    """A pattern for the configured secrets, also in a URL, in hex and in base64."""
    found = set(more)
    for provider in providers:
        found |= {provider.api_key, *provider.api_keys, provider.proxy}
        for name, value in {**provider.http_headers, **provider.query_params}.items():
            if not PLAIN_VALUES.fullmatch(name):
                found |= {value, *value.split()}
    forms = set()
    for secret in found:
        if len(secret) >= 8:
            raw = secret.encode()
            forms |= {secret, urllib.parse.quote(secret, safe=""), raw.hex()}
            forms.add(base64.b64encode(raw).decode().rstrip("="))
    longest_first = sorted(map(re.escape, forms), key=len, reverse=True)
    return re.compile("|".join(longest_first) or "(?!)", re.IGNORECASE)


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Does a name match one of these patterns with * and ?"""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def detect_providers(environ: Mapping[str, str]) -> dict[str, ProviderConfig]:
    """The built-in providers whose key is in the environment."""
    found = {}
    for name, row in BUILTIN_PROVIDERS.items():
        key = environ.get(row.env_key, "").strip()
        if KEY_VALUE.fullmatch(key):
            found[name] = dataclasses.replace(row, api_key=key, key_source=f"env:{row.env_key}")
    return found


# === 8. ledger ===
#
# One database, shared by all processes. `usage` has a row for each attempt that a provider bills, the last of a request marked
# `final`; the same transaction adds them to `usage_rollups`, from which reports are summed, and to the meters of limits. A
# settlement is committed before the client sees how its request ended; an open request is recorded before the client sees its
# first byte, and becomes a row marked interrupted if its process dies: no answered request is without its row, none has two.
#
# Money is integer nano-dollars. A balance is the sum of an account's credits less its charges.

KEY_PREFIX = "sk-rh-"
KEY_RANDOM = 28  # base62 characters, 166 bits, of which lists show 48
KEY_CHECK = 4  # of a checksum over those
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_NUMBER = 2 ** 42  # tokens, or Unix milliseconds; two million of these can still be summed
DAY_MS = 86_400_000
HALF_HOUR_MS = 1_800_000


class LedgerError(GatewayError):
    """Nothing is sent that could not be billed."""
    status, code = 503, "ledger_unavailable"
    in_doubt = False  # it may have been written all the same


@dataclass(frozen=True, slots=True)
class Key:
    id: int
    name: str
    digest: str = field(repr=False)
    hint: str  # "sk-rh-7Qm2…Ja1U"
    created_s: int
    expires_s: int  # 0: never
    revoked_s: int  # 0: active
    account_id: int
    models: str  # patterns, separated by spaces; "": any
    budget_nanos: int | None
    period: str  # of the budget: day | week | month | total
    rpm: int  # requests a minute; 0: any number, as below
    tpm: int  # tokens a minute
    concurrent: int  # requests open at once
    allow_unpriced: int  # 1: models without a price are served in spite of its budget
    account: str  # its account's name, and what that says
    prepaid: int
    account_limit_nanos: int | None
    multiplier: int

    @property
    def money_limited(self) -> bool:
        return bool(self.budget_nanos is not None or self.prepaid or self.account_limit_nanos is not None)

    def state(self, now_s: float) -> str:
        return "revoked" if self.revoked_s else "expired" if 0 < self.expires_s <= now_s else "active"

    def may_use(self, model: str) -> bool:
        return not self.models or matches_any(model, self.models.split())


KEY_COLUMNS = tuple(Key.__annotations__)[:15]  # the others are its account's
KEY_SETTINGS = KEY_COLUMNS[5:]  # these may change
SELECT_KEYS = f"""SELECT keys.{', keys.'.join(KEY_COLUMNS)}, accounts.name, prepaid, limit_nanos, multiplier, revision
    FROM keys JOIN accounts ON accounts.id = account_id WHERE revision > ? ORDER BY revision, keys.id"""
NEXT_REVISION = "(SELECT max(revision) + 1 FROM keys)"  # of a change: other processes look for it
SELECT_DISABLED = "SELECT substr(name, 10) FROM settings WHERE name LIKE 'disabled/%'"


class UsageRow(NamedTuple):
    """A billed attempt, as in the table `usage`; an open request in `open_requests`."""
    response_id: str
    request_id: str
    started_ms: int  # Unix time
    key_id: int
    endpoint: str
    model: str  # as the client asked for it
    attempt: int = 0  # its number, from 1
    final: int = 1  # 0: a failed attempt, billed all the same
    account_id: int = 1
    provider: str = ""
    upstream_model: str = ""
    served_model: str = ""  # as the answer names it, where it is another
    status: str = "completed"  # completed | incomplete | failed | cancelled; lost if not final
    result: str = ""  # of its request, one of RESULTS
    error_code: str = ""
    error: str = ""  # in words
    terminal_by: str = "upstream"  # upstream | gateway; "": the answer is a status
    estimated: str = ""  # why the tokens are not the provider's own count
    tier: str = ""  # as the provider says
    session: str = ""  # the client's name of the conversation
    client: str = ""  # its User-Agent
    input: int = 0  # tokens, as in Usage
    cached: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0
    cache_write_1h: int = 0
    web_searches: int = 0
    price: str = ""  # USD per million tokens, as section 8.7 has it; "": no price
    multiplier: int = 1_000_000  # of the account, in millionths
    cost_nanos: int = 0
    saved_nanos: int = 0  # by the cache
    asked_ms: int = 0  # from the request: to the newest upstream call,
    answering_ms: int = 0  # to the head of its answer,
    first_ms: int = 0  # to the first output; 0: none came
    total_ms: int = 0  # and to the end
    attempts: int = 0  # requests sent upstream
    upstream_id: str = ""  # the provider's request id
    detail: str = ""  # JSON of `tried`, `tried_ms` and `dropped`


USAGE_COLUMNS = UsageRow._fields
SUMS = ("requests", "failed", "estimated", "unpriced", "input", "cached", "cache_write", "output", "reasoning", "cost_nanos",
        "saved_nanos")
ROLLUP_KEY = ("started_ms", "key_id", "account_id", "model", "provider", "endpoint", "result")
ROLLUP_COLUMNS = (*ROLLUP_KEY, *SUMS, "last_ms")
RESULTS = ("completed", "incomplete", "failed over", "ended by gateway", "failed", "cancelled")


def result_of(status: str, terminal_by: str, attempts: int) -> str:
    if status in ("failed", "cancelled"):
        return status
    return "ended by gateway" if terminal_by == "gateway" else "failed over" if attempts > 1 else status


# --- 8.1 keys ---

def key_check(body: str) -> str:
    number = zlib.crc32(body.encode("utf-8", "replace"))
    return "".join(BASE62[number // 62 ** place % 62] for place in range(KEY_CHECK))


def model_patterns(text: str) -> str:
    """Names with * and ? as stored, separated by blanks; "" for all. ValueError for an empty text: an unset variable?"""
    patterns = " ".join(text.replace(",", " ").split())
    if not re.fullmatch("[!-~ ]+", patterns):
        raise ValueError
    return "" if patterns == "all" else patterns


def new_key() -> str:
    body = "".join(secrets.choice(BASE62) for _ in range(KEY_RANDOM))
    return KEY_PREFIX + body + key_check(body)


def mask_key(token: str) -> str:
    """As lists and messages show it; nothing of a token that cannot be a whole key of ours."""
    body = token[len(KEY_PREFIX):]
    if re.fullmatch("[0-9A-Za-z]{24,}", body):
        return f"{KEY_PREFIX}{body[:4]}…{body[-4:]}"
    return KEY_PREFIX + "…"


def key_digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def utc_minute(unix_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(unix_s))


def day_text(day: int) -> str:
    return utc_minute(day * 86400)[:10]


def day_of(text: str) -> int:
    """2026-11-30 as a day since 1970; ValueError for another text."""
    return datetime.date.fromisoformat(text).toordinal() - datetime.date(1970, 1, 1).toordinal()


BAD_KEYS = (  # "scheme token" of an Authorization header -> what to do
    (r"(bearer)? \Z", "No API key was sent. Export POMEX_API_KEY (in Codex the variable that env_key names) in this shell, "
     "then start the client again."),
    (r"(?!bearer )", "The Authorization header must read: Bearer sk-rh-…"),
    (r"bearer (\$([A-Z0-9_]{1,64}|\{[A-Z0-9_]{1,64}\}|env:[A-Z0-9_]{1,64})|%[A-Z0-9_]{1,64}%)\Z",
     'The key arrived as the text "{token}"; the shell did not expand it. Use double quotes.'),
    (r"bearer (?i:bearer) ", 'The key was sent with "Bearer " in it. Put the key alone, from sk-rh- on, into POMEX_API_KEY.'),
    (r"bearer (sk-(?!rh-)|gsk_|xai-|AIza|AQ\.|hf_|pplx-|r8_|nvapi-|csk-|fw_|eyJ)", "This looks like another provider's key. "
     "Clients need a Pomex key (sk-rh-…); the provider's key belongs in Pomex's config."),  # of vendors; and JWTs
    (r"bearer (?!sk-rh-)", "This is no Pomex key: those begin with sk-rh-. List keys with: python pomex.py keys list"),
    (r"bearer sk-rh-x+\Z",
     "That is the guide's placeholder (sk-rh-xxxxxxxxxxxx). Put your own key into POMEX_API_KEY."),
)


def has_checksum(token: str) -> bool:
    body = token[len(KEY_PREFIX):]
    return key_check(body[:KEY_RANDOM]) == body[KEY_RANDOM:]


def explain_bad_key(header: str) -> str:
    """Discloses the two ends of a key of ours, or a variable's name; nothing else."""
    scheme, _, token = header.strip(" \t").partition(" ")
    token = token.strip(" \t")
    for pattern, sentence in BAD_KEYS:
        if re.match(pattern, f"{scheme.lower()} {token}"):
            return sentence.replace("{token}", token)
    if not has_checksum(token):
        return f"This key is mistyped or cut ({mask_key(token)}): its checksum does not fit. Copy the whole key again."
    return f"This key is not known here ({mask_key(token)}). List keys with: python pomex.py keys list"


def unauthorized(sentence: str) -> Unauthorized:
    # RFC 9110 11.6.1; Claude Code would repeat it for three minutes
    return Unauthorized(sentence, headers=(("www-authenticate", "Bearer"), ("x-should-retry", "false")))


NEW_KEY = "codex app-server daemon restart"  # Codex 0.169 and newer, but not codex exec


# --- 8.2 the database ---
#
# All SQL is in the subset that SQLite 3.34 and PostgreSQL 12 share; POSTGRES_WORDS has what differs in the schema.

SCHEMA_VERSION = 5
APPLICATION_ID = 0x506F6D78  # "Pomx", in the header: no other program's file is written to
ROW_ID = "INTEGER PRIMARY KEY AUTOINCREMENT"
INTEGER = "BIGINT NOT NULL DEFAULT 0"
STRING = "TEXT NOT NULL DEFAULT ''"
TYPES = {name: STRING if "str" in str(kind) else INTEGER for name, kind in UsageRow.__annotations__.items()}
ROW_TYPES = ", ".join(map(" ".join, TYPES.items()))
ROLLUP_TYPES = ", ".join(f"{name} {TYPES[name] if name in ROLLUP_KEY else INTEGER}" for name in ROLLUP_COLUMNS)
SCHEMA = (
    f"CREATE TABLE IF NOT EXISTS settings (name {STRING} PRIMARY KEY, value {STRING}) WITHOUT ROWID",
    f"""CREATE TABLE IF NOT EXISTS accounts (
        id {ROW_ID}, name {STRING} UNIQUE, prepaid {INTEGER}, limit_nanos BIGINT, multiplier BIGINT NOT NULL DEFAULT 1000000,
        created_s {INTEGER})""",
    f"""CREATE TABLE IF NOT EXISTS keys (
        id {ROW_ID}, name {STRING}, digest {STRING} UNIQUE, hint {STRING}, created_s {INTEGER}, expires_s {INTEGER},
        revoked_s {INTEGER}, account_id BIGINT NOT NULL DEFAULT 1, models {STRING}, budget_nanos BIGINT,
        period TEXT NOT NULL DEFAULT 'month', rpm {INTEGER}, tpm {INTEGER}, concurrent {INTEGER}, allow_unpriced {INTEGER},
        revision BIGINT NOT NULL DEFAULT 1)""",
    "CREATE UNIQUE INDEX IF NOT EXISTS keys_active ON keys (name) WHERE revoked_s = 0",
    "CREATE INDEX IF NOT EXISTS keys_revision ON keys (revision)",
    f"""CREATE TABLE IF NOT EXISTS credits (
        id {ROW_ID}, account_id {INTEGER}, created_s {INTEGER}, kind {STRING}, nanos {INTEGER}, reason {STRING})""",
    "CREATE INDEX IF NOT EXISTS credits_account ON credits (account_id)",
    f"CREATE TABLE IF NOT EXISTS usage (id {ROW_ID}, {ROW_TYPES}, UNIQUE (response_id, attempt))",
    "CREATE INDEX IF NOT EXISTS usage_started ON usage (started_ms)",
    f"CREATE TABLE IF NOT EXISTS usage_rollups ({ROLLUP_TYPES}, PRIMARY KEY ({', '.join(ROLLUP_KEY)})) WITHOUT ROWID",
    f"""CREATE TABLE IF NOT EXISTS meters (
        owner {STRING}, since_day {INTEGER}, spent {INTEGER}, granted {INTEGER},
        PRIMARY KEY (owner, since_day)) WITHOUT ROWID""",
    f"CREATE TABLE IF NOT EXISTS rates (owner {STRING} PRIMARY KEY, full_ns {INTEGER}) WITHOUT ROWID",
    f"""CREATE TABLE IF NOT EXISTS processes (
        process {STRING} PRIMARY KEY, host {STRING}, pid {INTEGER}, start {STRING}, beats {INTEGER})""",
    f"CREATE TABLE IF NOT EXISTS open_requests (process {STRING}, reserved {STRING}, {ROW_TYPES}, PRIMARY KEY (response_id))",
    f"""CREATE TABLE IF NOT EXISTS refusals (
        id {ROW_ID}, time_ms {INTEGER}, key_id {INTEGER}, code {STRING}, count {INTEGER}, data {STRING})""",
    f"CREATE TABLE IF NOT EXISTS counters (name {STRING} PRIMARY KEY, value {INTEGER}) WITHOUT ROWID",
    f"""CREATE TABLE IF NOT EXISTS audit (
        id {ROW_ID}, time_ms {INTEGER}, who {STRING}, action {STRING}, name {STRING}, before {STRING}, after {STRING})""",
    f"""CREATE TABLE IF NOT EXISTS sessions (
        id {ROW_ID}, digest {STRING} UNIQUE, kind {STRING}, key_id {INTEGER}, expires_s {INTEGER})""",
)
POSTGRES_WORDS = {
    ROW_ID: "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY", " WITHOUT ROWID": "", "TEXT ": 'TEXT COLLATE "C" '}
TABLE_KEYS = {  # in whose order rows are copied
    "settings": "name", "accounts": "id", "keys": "id", "credits": "id", "usage": "id", "usage_rollups": ", ".join(ROLLUP_KEY),
    "meters": "owner, since_day", "rates": "owner", "processes": "process", "open_requests": "response_id", "refusals": "id",
    "counters": "name", "audit": "id", "sessions": "id"}

Written = TypeVar("Written")
Row: TypeAlias = tuple[Any, ...]
Attempted: TypeAlias = tuple[Any, Exception | None]  # returned, or raised
SETTLE_WAIT_S = 2.0  # how long an answer waits for a failing ledger
CHANGES = 0  # the lock of keys and settings; those of keys and accounts are lock_of()


def insertion(table: str, columns: Collection[str]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES {placeholders(columns)}"


def placeholders(values: Collection[Any]) -> str:
    return f"({', '.join('?' * len(values)) or 'NULL'})"


@dataclass(slots=True)
class Transaction:
    """Used by one thread at a time."""
    connection: sqlite3.Connection | PostgresConnection

    def execute(self, sql: str, values: Sequence[Any] = ()) -> int:
        """The number of rows it changed."""
        return self.connection.execute(sql, values).rowcount

    def insert(self, table: str, row: Mapping[str, Any]) -> None:
        self.execute(insertion(table, row), [*row.values()])

    def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """With PostgreSQL a later statement raises the error, at the latest the end of `attempt`."""
        self.connection.executemany(sql, rows)

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        return self.connection.execute(sql, values).fetchall()

    def attempt(self, run: Callable[[Transaction], Any]) -> Attempted:
        """Rolls back what `run` did if it raises."""
        self.connection.execute("SAVEPOINT attempt")
        try:
            attempted: Attempted = run(self), None
            self.connection.execute("RELEASE attempt").fetchall()
        except Exception as error:  # noqa: BLE001 - returned to the caller
            if not self.connection.in_transaction:  # e.g. a full disk ended it
                raise
            self.connection.execute("ROLLBACK TO attempt")
            self.connection.execute("RELEASE attempt")
            attempted = None, error
        return attempted

    def lock(self, names: Iterable[int]) -> None:
        """Until the transaction ends. SQLite has one writer at a time."""

    def now_ns(self) -> int:
        """The clock of all processes."""
        return time.time_ns()

    def continue_ids(self, table: str, key: str) -> None:
        """After rows were copied with theirs. SQLite does so by itself."""


class Database:
    """What all processes share: one thread writes, others read. Values stand for `?` in SQL."""
    readers = 1
    patience_s: float | None = None  # how long answers wait for a commit; None: a busy one is waited for
    look_s: float | None = None  # and how long a look for revoked keys may take
    on_this_host = True  # so that its processes can be asked whether they live
    own_check = "PRAGMA integrity_check"

    def __init__(self, place: str, name: str) -> None:
        self.place, self.name = place, name
        self.reading = concurrent.futures.ThreadPoolExecutor(self.readers, "reader")
        self.looking = self.reading
        self.writing = concurrent.futures.ThreadPoolExecutor(1, "writer")

    def trouble(self, error: Exception) -> LedgerError:
        raise NotImplementedError

    def fetch(self, sql: str, values: Row) -> list[Row]:
        raise NotImplementedError

    def transact(self, run: Callable[[Transaction], Written], snapshot: bool) -> Written:
        raise NotImplementedError

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, PostgresError, OSError, RuntimeError) as error:  # RuntimeError: its thread has ended
            raise self.trouble(error) from error

    async def read(self, sql: str, *values: Any) -> list[Row]:
        with self.errors():
            return await asyncio.get_running_loop().run_in_executor(self.reading, self.fetch, sql, values)

    async def look(self, sql: str, *values: Any) -> list[Row]:
        """What all requests wait for, before any report."""
        with self.errors():
            return await asyncio.get_running_loop().run_in_executor(self.looking, self.fetch, sql, values)

    async def write(self, run: Callable[[Transaction], Written]) -> Written:
        """Rolls back if it raises. A transaction that loses against another one, or its connection, runs again."""
        with self.errors():
            return await asyncio.get_running_loop().run_in_executor(self.writing, self.commit, run)

    def commit(self, run: Callable[[Transaction], Written], snapshot: bool = False) -> Written:
        """On the calling thread, without a running loop. A snapshot sees one moment, and may take its time."""
        with self.errors():
            return self.transact(run, snapshot)

    def check(self) -> None:
        """LedgerError if it is not what was opened."""

    def migrate(self) -> None:
        raise NotImplementedError

    def copy(self, path: str) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """Then only `commit` and `close` may be called."""
        for each in (self.writing, self.reading, self.looking):
            each.shutdown()

    def close(self) -> None:
        raise NotImplementedError


def open_database(place: str, durability: str = "process") -> Database:
    """A SQLite file, or a PostgreSQL by its URL."""
    return PostgreSQL(place) if POSTGRES_URL.fullmatch(place) else SQLite(place, durability)


def copy_database(source: Database, target: Database) -> dict[str, int]:
    """All rows, of one moment, into an empty database, read again and compared there: how many of each table, or nothing is
    written. BadRequest: it is not empty."""
    def read_pages(tx: Transaction, table: str, key: str) -> Iterator[list[Row]]:
        columns, last = key.split(", "), Row()
        while True:
            after = f"WHERE ({key}) > {placeholders(last)} " if last else ""
            rows = tx.read(f"SELECT {key}, {table}.* FROM {table} {after}ORDER BY {key} LIMIT 1000", last)
            if not rows:
                return
            last = rows[-1][:len(columns)]
            yield rows

    def fill(out: Transaction, into: Transaction) -> dict[str, int]:
        if any(into.read(f"SELECT 1 FROM {table} LIMIT 1") for table in ("keys", "usage", "credits", "audit", "open_requests")):
            raise BadRequest(f"{target.name} is not empty: nothing was copied.")
        counts = dict.fromkeys(TABLE_KEYS, 0)
        for table, key in TABLE_KEYS.items():
            into.execute(f"DELETE FROM {table}")
            width = len(key.split(", "))
            for rows in read_pages(out, table, key):
                into.execute_many(f"INSERT INTO {table} VALUES {placeholders(rows[0][width:])}", [row[width:] for row in rows])
                counts[table] += len(rows)
            pages = itertools.zip_longest(read_pages(out, table, key), read_pages(into, table, key))
            if any(ours != theirs for ours, theirs in pages):
                raise LedgerError(f"{target.name}: the rows of {table} came back changed: nothing was copied.")
            into.continue_ids(table, key)
        return counts
    return source.commit(lambda out: target.commit(functools.partial(fill, out), snapshot=True), snapshot=True)


# --- 8.3 SQLite ---

BUSY_S = 30.0  # for another program's write; then it is a failure
FILE_TROUBLE = {  # SQLite's primary result code -> for the operator
    sqlite3.SQLITE_NOTADB: "is not a SQLite database. Give another file in [database] url.",
    sqlite3.SQLITE_CORRUPT: "is damaged. Restore a backup of it, or move it away to begin with an empty one.",
    sqlite3.SQLITE_READONLY: "cannot be written: it, its folder or its disk is read-only for this user. "
                             "Another place: POMEX_DATABASE_URL=sqlite:FOLDER/pomex.db",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: look at the permissions of the file and of its folder.",
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full.",
    sqlite3.SQLITE_BUSY: "is locked by another program.",
}


def is_database_failure(error: Exception) -> bool:
    """False for a fault of the values it was given."""
    if isinstance(error, PostgresError):
        return not error.sqlstate.startswith(VALUE_ERRORS)
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError


def create_file(path: str) -> None:
    """For this user alone; SQLite gives -wal and -shm the mode of the file."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    with contextlib.suppress(OSError):  # it belongs to another user, whose choice it is
        for suffix in ("", "-wal", "-shm"):
            os.chmod(path + suffix, 0o600)


class SQLite(Database):
    """A file of this machine."""

    def __init__(self, path: str, durability: str) -> None:
        super().__init__(path, os.path.basename(path))
        with self.errors():
            create_file(path)
            self.file = os.stat(path)
            self.reader, self.writer = (sqlite3.connect(path, BUSY_S, isolation_level=None, check_same_thread=False)
                                        for _ in range(2))
            self.writer.execute("PRAGMA synchronous = " + ("FULL" if durability == "power" else "NORMAL"))

    def trouble(self, error: Exception) -> LedgerError:
        """Does not disclose the file's folder."""
        code, reason = getattr(error, "sqlite_errorcode", 0) & 0xFF, str(error)
        if isinstance(error, OSError):
            reason = error.strerror or ""  # str() would give the path
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                code = sqlite3.SQLITE_READONLY
        return LedgerError(f"The database {self.name} " + FILE_TROUBLE.get(code, f"cannot be used: {reason}."))

    def check(self) -> None:
        with self.errors():
            if not os.path.samestat(os.stat(self.place), self.file):
                raise FileNotFoundError(errno.ENOENT, "the file was replaced: restart on a sound one")

    def fetch(self, sql: str, values: Row) -> list[Row]:
        return Transaction(self.reader).read(sql, values)

    def transact(self, run: Callable[[Transaction], Written], snapshot: bool) -> Written:
        with self.writer:
            self.writer.execute("BEGIN IMMEDIATE")
            return run(Transaction(self.writer))

    def stop(self) -> None:
        super().stop()
        self.writer.execute("PRAGMA busy_timeout = 2000")  # another program has had its turn

    def close(self) -> None:
        self.reader.close()
        self.writer.close()

    def copy(self, path: str) -> None:
        """A complete copy or none, while servers run; overwrites nothing."""
        part = path + ".part"
        with self.errors():
            with contextlib.suppress(FileNotFoundError):  # left by a copy that was killed
                os.unlink(part)
            try:
                os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
                with contextlib.closing(sqlite3.connect(part)) as copy:
                    self.reader.backup(copy)
                if os.path.lexists(path):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
                os.rename(part, path)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(part)

    def migrate(self) -> None:
        """Upgrades an older file after copying it."""
        folder, name = os.path.dirname(os.path.abspath(self.place)), self.name
        version, application, tables = (self.writer.execute(sql).fetchone()[0] for sql in (
            "PRAGMA user_version", "PRAGMA application_id", "SELECT count(*) FROM sqlite_master"))
        if tables and application != APPLICATION_ID:
            raise LedgerError(f"The database {name} belongs to another program. Give another file in [database] url.")
        if version > SCHEMA_VERSION:
            raise LedgerError(f"The database {name} was written by a newer Pomex (schema {version}; this one, {VERSION}, knows "
                              f"{SCHEMA_VERSION}). Start that version, or give another file in [database] url.")
        self.use_wal()
        if version == SCHEMA_VERSION:
            return
        before = f"{self.place}.before-{SCHEMA_VERSION}"
        journal = next((file for file in os.listdir(folder) if file.startswith(f"{name}-requests-")), None)
        if tables and journal:
            raise LedgerError(f"The database {name} is in use by v00083, or has requests that v00083 has not billed yet (in "
                              f"{journal} beside it). Start and stop v00083 once, then start this version.")
        if tables and not os.path.exists(before):
            self.copy(before)
            log.info("ledger: %s is upgraded; a copy of the old file is in %s", name, os.path.basename(before))
        self.commit(create_tables)

    def use_wal(self) -> None:
        """Several processes may open a new file at once, and SQLite does not wait for this lock."""
        for attempt in range(20):
            try:
                self.writer.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if attempt == 19:
                    raise
                time.sleep(0.05)


def create_tables(tx: Transaction) -> None:
    if tx.read("PRAGMA user_version")[0][0] == SCHEMA_VERSION:  # another process was faster
        return
    found = tx.read("SELECT type, name FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite%' ORDER BY type DESC")
    for kind, name in found:  # triggers, tables, indexes
        tx.execute(f"ALTER TABLE {name} RENAME TO old_{name}" if kind == "table" else f"DROP {kind} {name}")
    for statement in SCHEMA:
        tx.execute(statement)
    if found:
        take_over_old_tables(tx)
        for kind, name in found:
            if kind == "table":
                tx.execute(f"DROP TABLE old_{name}")
    else:
        insert_first_rows(tx)
    tx.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    tx.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def insert_first_rows(tx: Transaction) -> None:
    tx.execute("INSERT INTO accounts (name, created_s) VALUES ('default', ?)", (tx.now_ns() // 10**9,))
    tx.execute("INSERT INTO settings VALUES ('secret', ?)", (secrets.token_hex(32),))


# --- 8.4 files of v00083 ---
#
# A row of `usage` is a request there, one of `attempts` a failed attempt, one of `daily` the sums of a day, pruned rows too.

def old_rows(request: JSON, lost: Iterable[JSON]) -> list[UsageRow]:
    request["result"] = result_of(request["status"], request["terminal_by"], request["attempts"])
    rows = [{**request, **attempt, "final": 0, "status": "lost"} for attempt in lost]
    rows.append({**request, "attempt": max([request["attempts"], *(row["attempt"] + 1 for row in rows)])})
    return [UsageRow(**{name: row[name] for name in USAGE_COLUMNS if name in row},
                     saved_nanos=saved_nanos(row["price"], row["cached"])) for row in rows]


def read_old(tx: Transaction, query: str, *values: Any) -> Iterator[JSON]:
    assert isinstance(tx.connection, sqlite3.Connection)
    cursor = tx.connection.cursor()
    cursor.row_factory = sqlite3.Row
    return map(dict, cursor.execute("SELECT * FROM old_" + query, values))


def take_over_old_tables(tx: Transaction) -> None:
    for table in ("accounts", "keys", "credits"):
        for row in read_old(tx, table):
            if table == "keys":
                row |= {"digest": row["digest"].hex(), "revision": row["id"]}
            tx.insert(table, row)
    for name, value in tx.read("SELECT * FROM old_settings"):
        if name in ("secret", "pruned_day") or name.startswith("disabled/"):
            tx.execute("INSERT INTO settings VALUES (?, ?)", (name, value.hex() if name == "secret" else str(value)))
    # the sums of a day go into its first half hour, less those of its rows: what is left was pruned
    columns = ", ".join((*ROLLUP_KEY[1:-1], *SUMS[:-1], "last_ms"))
    tx.execute(f"INSERT INTO usage_rollups (started_ms, result, {columns}) "
               f"SELECT day * {DAY_MS}, 'unknown', {columns} FROM old_daily")
    requests = read_old(tx, "usage ORDER BY id")
    while batch := [*itertools.islice(requests, 1000)]:
        rows = insert_rows(tx, [row for request in batch for row in old_rows(
            request, read_old(tx, "attempts WHERE response_id = ? ORDER BY attempt", request["response_id"]))])
        upsert_rollups(tx, [row._replace(started_ms=row.started_ms // DAY_MS * DAY_MS, result="unknown", saved_nanos=0)
                            for row in rows], -1)


# --- 8.5 PostgreSQL's protocol ---
#
# The frontend's side of protocol 3.0 (PostgreSQL's manual, chapter 55), as far as a ledger needs it: extended queries with
# unnamed statements, in text form. Nothing is kept in a session, so that a pooler may give each transaction another one.

MAX_MESSAGE_BYTES = 1 << 26  # a row's, of which texts are cut at 1 KB; a web server's answer looks like one of 1 GB
MAX_RESULT_BYTES = 1 << 28
MAX_UNANSWERED = 500  # statements sent before their answers are read: neither side may wait until the other reads
SCRAM_ROUNDS = range(1, 1_000_001)  # PostgreSQL's own are 4096; a million take a second
PROTOCOL_3, SSL_REQUEST, CANCEL_REQUEST = 196608, 80877103, 80877102
VALUE_ERRORS = ("22", "23", "54")  # SQLSTATE classes of a value's own fault
STATEMENT_ERRORS = (*VALUE_ERRORS, "42")  # and of a statement's: a savepoint undoes it
RESTARTED = ("40001", "40P01")  # lost against another transaction
LOST = ("08", "250", "25P", "57P")  # beginnings of what a kept connection is told when its server goes
SQLSTATES = {  # beginning -> for the operator
    "28": "refuses this user or password",
    "3D000": "is not there",
    "08007": "was lost",
    "25006": "is a standby, which cannot be written",
    "42501": "does not give this user the right",
    "53300": "has no connection left",
    "53": "has no room left",
    "55P03": "is locked by another program",
    "57014": "took too long",
    "57P": "is stopping or starting",
}


class PostgresError(Exception):
    """An error that the server reports, or its breach of the protocol."""

    def __init__(self, sqlstate: str, message: str) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


def postgres_message(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return kind + struct.pack("!i", len(body) + 4) + body


def startup_message(address: PostgresAddress) -> bytes:
    words = {"user": address.user, "database": address.database, "client_encoding": "UTF8",
             "application_name": address.parameters.get("application_name", "pomex")}
    texts = [text.encode() + b"\0" for text in itertools.chain.from_iterable(words.items())]
    return postgres_message(b"", struct.pack("!i", PROTOCOL_3), *texts, b"\0")


def encode_value(value: Any) -> bytes:
    """In text form, behind its length. No text of PostgreSQL has a NUL."""
    if value is None:
        return struct.pack("!i", -1)
    data = str(int(value) if isinstance(value, bool) else value).replace("\0", "?").encode()
    return struct.pack("!i", len(data)) + data


@functools.lru_cache(1024)
def parse_message(sql: str) -> bytes:
    """Of the unnamed statement, with $1 for the first `?`. The server infers the values' types."""
    numbers = itertools.count(1)
    numbered = re.sub(r"'[^']*'|\?", lambda found: f"${next(numbers)}" if found[0] == "?" else found[0], sql)
    return postgres_message(b"P", b"\0", numbered.encode(), b"\0\0\0")


EXECUTE = postgres_message(b"D", b"P\0") + postgres_message(b"E", b"\0\0\0\0\0")  # with the types of its columns
SYNC = postgres_message(b"S")


def bind_message(values: Sequence[Any]) -> bytes:
    return postgres_message(b"B", b"\0\0\0\0", struct.pack("!h", len(values)), *map(encode_value, values), b"\0\0")


def take_message(data: bytearray) -> tuple[bytes, bytes] | None:
    """The first whole message (kind, body), taken out of what has arrived."""
    if len(data) < 5:
        return None
    size: int = struct.unpack_from("!i", data, 1)[0]
    if not 4 <= size <= MAX_MESSAGE_BYTES:
        raise PostgresError("08P01", f"it sent a message of {size} bytes")
    if len(data) <= size:
        return None
    kind, body = bytes(data[:1]), bytes(data[5:size + 1])
    del data[:size + 1]
    return kind, body


def read_error(body: bytes) -> PostgresError:
    fields = {part[:1]: part[1:].decode("utf-8", "replace") for part in body.split(b"\0")}
    state = fields.get(b"C", "")
    return PostgresError(state if re.fullmatch("[0-9A-Z]{5}", state) else "XX000",
                         sanitize(fields.get(b"M", "it does not say why"), 200))


def read_number(data: bytes) -> float:
    """A sum is numeric, and whole."""
    return float(data) if b"." in data else int(data)


VALUE_READERS: dict[int, Callable[[bytes], Any]] = {  # by the OID of a type; all others are text
    16: lambda data: int(data == b"t"), 20: int, 21: int, 23: int, 700: float, 701: float, 1700: read_number}


def read_columns(body: bytes) -> list[Callable[[bytes], Any]]:
    """The reader of each column of a RowDescription."""
    (count,), at = struct.unpack_from("!h", body), 2
    readers = []
    for _ in range(count):
        at = body.index(b"\0", at) + 1
        readers.append(VALUE_READERS.get(struct.unpack_from("!i", body, at + 6)[0], bytes.decode))
        at += 18
    return readers


def read_row(body: bytes, readers: Sequence[Callable[[bytes], Any]]) -> Row:
    """Of a DataRow."""
    at, row = 2, []
    for reader in readers:
        size, = struct.unpack_from("!i", body, at)
        at += 4
        row.append(None if size < 0 else reader(body[at:at + size]))
        at += max(size, 0)
    if at != len(body):
        raise PostgresError("08P01", "it sent a row that is longer than its columns")
    return tuple(row)


def prepare_password(password: str) -> bytes:
    """SASLprep (RFC 4013), or as it is where that forbids it, as PostgreSQL does."""
    spaced = (" " if stringprep.in_table_c12(char) else char for char in password)
    text = "".join(char for char in spaced if not stringprep.in_table_b1(char))
    forbidden = (
        stringprep.in_table_a1, stringprep.in_table_c12, stringprep.in_table_c21_c22, stringprep.in_table_c3,
        stringprep.in_table_c4, stringprep.in_table_c5, stringprep.in_table_c6, stringprep.in_table_c7,
        stringprep.in_table_c8, stringprep.in_table_c9)
    wrong = any(is_forbidden(char) for char in text for is_forbidden in forbidden)
    if any(map(stringprep.in_table_d1, text)):  # written from right to left: wholly
        wrong = wrong or any(map(stringprep.in_table_d2, text)) or not all(map(stringprep.in_table_d1, (text[0], text[-1])))
    return (password if wrong or not text else unicodedata.normalize("NFKC", text)).encode()


def scram_sha_256(password: str, nonce: str) -> Generator[bytes, bytes, None]:
    """Yields the client's messages for the server's (RFC 5802, RFC 7677), and b"" when the server has proved that it knows the
    password, too. PostgresError: it does not."""
    def fields(data: bytes) -> dict[str, str]:
        return dict(part.split("=", 1) for part in data.decode("ascii").split(","))

    def sign(key: bytes, data: bytes) -> bytes:
        return hmac.digest(key, data, "sha256")
    bare = f"n=,r={nonce}".encode()
    first = yield b"n,," + bare
    asked = fields(first)
    rounds = int(asked["i"])
    if not asked["r"].startswith(nonce) or len(asked["r"]) == len(nonce) or rounds not in SCRAM_ROUNDS:
        raise PostgresError("28P01", f"it asks for {rounds} rounds of SCRAM, or for another client's nonce")
    salted = hashlib.pbkdf2_hmac("sha256", prepare_password(password), base64.b64decode(asked["s"], validate=True), rounds)
    client_key = sign(salted, b"Client Key")
    final = f"c=biws,r={asked['r']}".encode()
    messages = b",".join((bare, first, final))
    signature = sign(hashlib.sha256(client_key).digest(), messages)
    proof = bytes(map(operator.xor, client_key, signature))
    last = fields((yield final + b",p=" + base64.b64encode(proof)))
    expected = sign(sign(salted, b"Server Key"), messages)
    if not hmac.compare_digest(base64.b64decode(last.get("v", "")), expected):
        raise PostgresError("28P01", "it does not know the password itself: is it the right server?")
    yield b""


# --- 8.6 PostgreSQL ---

ROUND_TRIP_S = 10.0  # then what a writer asked is cancelled
READ_S = 20.0  # the sums of a year
SETTINGS_OF_A_TRANSACTION = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
TIMEOUTS_MS = 8000, 5000, 1500  # the last: a process that stands still lets the others go on
BEGIN_VALUES = (f"SELECT {', '.join(f'set_config({name!r}, ?, true)' for name in SETTINGS_OF_A_TRANSACTION)}, "
                "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT) * 1000")
LOCK_SPACE = APPLICATION_ID << 32  # of ours, among the database's advisory locks
MIGRATION = 1 << 31  # a lock beside CHANGES and lock_of()
TRIES = 6


@dataclass(eq=False)
class Statement:
    """Sent with others; its result is awaited when it is asked for."""
    connection: PostgresConnection
    rows: list[Row] = field(default_factory=list)
    tag = b""  # "UPDATE 3"

    @property
    def rowcount(self) -> int:
        self.connection.flush()
        count = self.tag.rpartition(b" ")[2]
        return int(count) if count.isdigit() else 0

    def fetchall(self) -> list[Row]:
        self.connection.flush()
        return self.rows


class PostgresConnection:
    """A session, for one thread at a time, with the methods of a sqlite3.Connection that Transaction needs."""
    in_transaction = True  # it can go on: no answer is outstanding, no error spoiled it
    committing = False  # COMMIT was sent and not answered
    limit_s = ROUND_TRIP_S  # of what is sent and answered at once
    key = b""  # of the session, to cancel what it does

    def __init__(self, address: PostgresAddress, host: str, port: int) -> None:
        self.address, self.place = address, (host, port)
        self.data, self.asked, self.statements = bytearray(), bytearray(), list[Statement]()
        self.connect_s = float(address.parameters.get("connect_timeout", "5"))
        self.deadline = time.monotonic() + self.connect_s
        self.socket = self.open_socket()
        try:
            with self.protocol_errors():
                self.log_in()
                (read_only, encoding), = self.execute(
                    "SELECT current_setting('transaction_read_only'), current_setting('server_encoding')").fetchall()
            if read_only == "on":
                raise PostgresError("25006", "it takes no writes")
            if encoding != "UTF8":
                raise PostgresError("22P05", f"its encoding is {sanitize(str(encoding))}, not UTF8")
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def protocol_errors(self) -> Iterator[None]:
        try:
            yield
        except (struct.error, ValueError, LookupError) as error:
            raise PostgresError("08P01", "it sent what is not PostgreSQL's protocol") from error

    def open_socket(self) -> socket.socket:
        host, port = self.place
        is_file = host.startswith("/")
        made = socket.socket(socket.AF_UNIX) if is_file else socket.create_connection((host, port), self.connect_s)
        try:
            if is_file:
                made.settimeout(self.connect_s)
                made.connect(f"{host}/.s.PGSQL.{port}")
                return made
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return made if self.address.sslmode == "disable" else self.use_tls(made)
        except BaseException:
            made.close()
            raise

    def use_tls(self, made: socket.socket) -> socket.socket:
        words, mode = self.address.parameters, self.address.sslmode
        made.sendall(struct.pack("!ii", 8, SSL_REQUEST))
        answer = made.recv(1)
        if not answer:
            raise ConnectionError(errno.ECONNRESET, "it closed the connection")
        if answer != b"S":
            raise PostgresError("08P01", f"it offers no TLS, and sslmode is {mode}")
        try:
            authority = words.get("sslrootcert", "system")
            context = ssl.create_default_context(cafile=None if authority == "system" else authority)
            if "sslcert" in words:
                context.load_cert_chain(words["sslcert"], words.get("sslkey"))
        except OSError as error:
            raise PostgresError("08001", f"sslrootcert or sslcert: {error.strerror}") from error
        context.check_hostname = mode == "verify-full"
        if mode == "require" and "sslrootcert" not in words:
            context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(made, server_hostname=self.place[0])

    def log_in(self) -> None:
        self.socket.sendall(startup_message(self.address))
        scram = None
        while True:
            kind, body = self.receive()
            if kind == b"E":
                raise read_error(body)
            if kind == b"K":
                self.key = body
            if kind == b"Z" and scram is None:
                return
            if kind not in b"RKNS":
                raise ValueError
            if kind != b"R":
                continue
            asked, = struct.unpack_from("!i", body)
            if asked == 10 and b"SCRAM-SHA-256" in body[4:].split(b"\0"):
                if not self.address.password:
                    raise PostgresError("28P01", "it asks for a password: put it into the URL, or into PGPASSWORD")
                scram = scram_sha_256(self.address.password, secrets.token_urlsafe(18))
                first = next(scram)
                self.socket.sendall(postgres_message(b"p", b"SCRAM-SHA-256\0", struct.pack("!i", len(first)), first))
            elif asked in (11, 12) and scram is not None:
                answer = scram.send(body[4:])
                if (asked == 11) != bool(answer):
                    raise ValueError
                self.socket.sendall(postgres_message(b"p", answer) if answer else b"")
                scram = scram if answer else None
            elif asked != 0 or scram is not None:
                raise PostgresError("28000", "it asks for another authentication than SCRAM-SHA-256, like md5 or a password in "
                                    "the clear (see password_encryption, when the password was set, and pg_hba.conf)")

    def receive(self) -> tuple[bytes, bytes]:
        while (message := take_message(self.data)) is None:
            left_s = self.deadline - time.monotonic()
            if left_s <= 0:  # however busily it sends
                raise TimeoutError
            self.socket.settimeout(left_s)
            data = self.socket.recv(1 << 16)
            if not data:
                raise ConnectionError(errno.ECONNRESET, "it closed the connection")
            self.data += data
        return message

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Statement:
        if sql.startswith("ROLLBACK"):  # an error before it, in the same round trip, would pass over it
            with contextlib.suppress(PostgresError):
                self.flush()
        self.executemany(sql, [values])
        return self.statements[-1]

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        for values in rows:
            if len(self.statements) >= MAX_UNANSWERED:
                self.flush()
            self.asked += parse_message(sql) + bind_message(values) + EXECUTE
            self.statements.append(Statement(self))

    def flush(self) -> None:
        """Sends what was asked, and reads the results. After an error the server passes over the rest."""
        if not self.statements:
            return
        asked, statements = self.asked + SYNC, self.statements
        self.asked, self.statements, self.in_transaction = bytearray(), [], False
        self.deadline = time.monotonic() + self.limit_s
        try:
            self.socket.settimeout(self.limit_s)
            self.socket.sendall(asked)
            with self.protocol_errors():
                error = self.read_results(iter(statements))
        except TimeoutError:
            self.cancel()
            raise
        self.committing = False
        self.in_transaction = error is None or error.sqlstate.startswith(STATEMENT_ERRORS)
        if error is not None:
            raise error

    def read_results(self, statements: Iterator[Statement]) -> PostgresError | None:
        """Until the server is ready again; the first error."""
        error, rows, readers, size = None, list[Row](), list[Callable[[bytes], Any]](), 0
        while True:
            try:
                kind, body = self.receive()
            except ConnectionError:
                raise error or ConnectionError(errno.ECONNRESET, "it closed the connection") from None
            size += len(body)
            if size > MAX_RESULT_BYTES:
                raise PostgresError("08P01", f"it sent more than {MAX_RESULT_BYTES} bytes")
            if kind == b"T":
                readers = read_columns(body)
            elif kind == b"D":
                rows.append(read_row(body, readers))
            elif kind in b"CI":
                statement = next(statements, None)
                if statement is None:
                    raise ValueError
                statement.rows, statement.tag, rows = rows, body[:-1], []
            elif kind == b"E":
                error = error or read_error(body)
            elif kind == b"Z":
                if error is None and next(statements, None) is not None:
                    raise ValueError
                return error
            elif kind not in b"12nNSA":
                raise ValueError

    def cancel(self) -> None:
        """What takes too long."""
        with contextlib.suppress(OSError, PostgresError), self.open_socket() as other:
            other.sendall(struct.pack("!ii", 8 + len(self.key), CANCEL_REQUEST) + self.key)

    def begin(self, snapshot: bool) -> None:
        self.execute("BEGIN ISOLATION LEVEL " + ("REPEATABLE READ" if snapshot else "READ COMMITTED"))
        self.first = self.execute(BEGIN_VALUES, [0] * len(TIMEOUTS_MS) if snapshot else TIMEOUTS_MS)

    def commit(self) -> None:
        self.flush()
        ended = self.execute("COMMIT")
        self.committing = True
        ended.fetchall()
        if ended.tag != b"COMMIT":
            raise PostgresError("25P02", "it rolled back")

    def close(self) -> None:
        with contextlib.suppress(OSError), self.socket:
            if self.in_transaction:
                self.socket.sendall(postgres_message(b"X"))


class PostgresTransaction(Transaction):
    """Between its statements others commit; what must not change meanwhile is locked."""
    connection: PostgresConnection

    def lock(self, names: Iterable[int]) -> None:
        """In one order for all, so that no two wait for each other."""
        self.execute_many("SELECT pg_advisory_xact_lock(?)", [(LOCK_SPACE + name,) for name in sorted(set(names))])

    def now_ns(self) -> int:
        """Of the database, when the transaction began."""
        return int(self.connection.first.fetchall()[0][-1])

    def continue_ids(self, table: str, key: str) -> None:
        if key == "id":
            self.read(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), coalesce(max(id), 0) + 1, false) FROM {table}")


class PostgreSQL(Database):
    """One for all gateways. Each thread has a connection of its own."""
    readers = 2
    patience_s, look_s = SETTLE_WAIT_S, 5.0
    on_this_host = False
    own_check = "SELECT 'ok'"

    def __init__(self, url: str) -> None:
        self.address = read_postgres_url(url)
        self.connections: dict[int, PostgresConnection] = {}  # by thread
        super().__init__(url, self.address.name)
        self.looking = concurrent.futures.ThreadPoolExecutor(1, "looker")

    def trouble(self, error: Exception) -> LedgerError:
        state, reason = getattr(error, "sqlstate", ""), str(error)
        if isinstance(error, OSError):
            reason = getattr(error, "verify_message", "") or error.strerror or reason
        if isinstance(error, TimeoutError):
            reason = "no answer in time"
        words = next((words for start, words in SQLSTATES.items() if state.startswith(start)),
                     "cannot be used" if state else "cannot be reached")
        trouble = LedgerError(f"The database {self.name} {words}: {reason}{f' (SQLSTATE {state})' if state else ''}.")
        trouble.in_doubt = state == "08007"
        return trouble

    def connect(self) -> PostgresConnection:
        """To the first host that takes writes."""
        failures: list[Exception] = []
        for host, port in self.address.hosts:
            try:
                return PostgresConnection(self.address, host, port)
            except (OSError, PostgresError) as error:
                failures.append(error)
        raise failures[-1]

    def use(self, limit_s: float, work: Callable[[PostgresConnection], Written]) -> Written:
        """On a kept connection, or a new one. Again, if another transaction won, or the kept one had been lost."""
        thread = threading.get_ident()
        for tries in itertools.count(1):
            kept = self.connections.get(thread)
            connection = self.connections[thread] = kept or self.connect()
            connection.limit_s = limit_s
            try:
                return work(connection)
            except BaseException as error:
                if not connection.in_transaction:
                    self.connections.pop(thread).close()
                if connection.committing:
                    raise PostgresError("08007", "the connection was lost while it committed, so that it is not known "
                                        "whether the change was made") from error
                state = getattr(error, "sqlstate", "")
                lost = kept and (state.startswith(LOST) or isinstance(error, OSError) and not isinstance(error, TimeoutError))
                if tries == TRIES or not lost and state not in RESTARTED:
                    raise
                time.sleep(random.uniform(0, 0.02 * tries))  # noqa: S311 - jitter, no secret
        raise AssertionError

    def fetch(self, sql: str, values: Row) -> list[Row]:
        return self.use(READ_S, lambda connection: connection.execute(sql, values).fetchall())

    def transact(self, run: Callable[[Transaction], Written], snapshot: bool) -> Written:
        def work(connection: PostgresConnection) -> Written:
            connection.begin(snapshot)
            try:
                result = run(PostgresTransaction(connection))
                connection.commit()
                return result
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK").fetchall()
                raise
        return self.use(ROUND_TRIP_S, work)

    def migrate(self) -> None:
        """Only ever adds, so that an older version goes on beside a newer one."""
        def run(tx: Transaction) -> None:
            tx.lock([MIGRATION])
            found = ", ".join(f"to_regclass('{table}')" for table in TABLE_KEYS)
            (comment, any_table), = tx.read(f"SELECT obj_description(to_regclass('settings'), 'pg_class'), coalesce({found})")
            ours = re.fullmatch("Pomex schema ([0-9]+)", comment or "")
            if any_table and not ours:
                raise LedgerError(f"The database {self.name} has tables of another program. Give Pomex one of its own.")
            if ours and int(ours[1]) >= SCHEMA_VERSION:
                return
            for statement in SCHEMA:
                for word, other in POSTGRES_WORDS.items():
                    statement = statement.replace(word, other)
                tx.execute(statement)
            if not ours:
                insert_first_rows(tx)
            tx.execute(f"COMMENT ON TABLE settings IS 'Pomex schema {SCHEMA_VERSION}'")
        self.commit(run)

    def copy(self, path: str) -> None:
        raise BadRequest(f"PostgreSQL makes its own backups: pg_dump --format=custom --file={shlex.quote(path)} "
                         f"{shlex.quote(self.name)}. (A copy in SQLite: python pomex.py db copy FROM TO)", param="file")

    def stop(self) -> None:
        super().stop()
        self.close()  # the last commit gets a new one: this thread's has been idle ever since, and may have fallen silent

    def close(self) -> None:
        while self.connections:
            self.connections.popitem()[1].close()


# --- 8.7 prices ---
#
# A price is a text: USD per million tokens of input, output, cache read, cache write, cache write kept long, then USD per
# thousand searches; "-" where there is none.

ONE = 1_000_000  # a multiplier of 1
PEAK_HOURS = (1, 2, 3, 6, 7, 8, 9)  # UTC: DeepSeek's, 9-12 and 14-18 in Beijing, not on weekends there
USUAL = {  # of all models of a provider; rows override them
    "anthropic": "search=10 fast=2 us=1.1 batch=0.5", "google": "search=14 priority=1.8 flex=0.5 batch=0.5",
    "groq": "search=5", "meta": "search=2.5", "xai": "search=5 batch=0.8 over199999=2",
    "openai": "search=10 priority=2 ultrafast=6 flex=0.5 batch=0.5 gov=1.1",
}
REGIONS = {"eu.api.openai.com": "geo", "us.api.openai.com": "geo", "gov.api.openai.com": "gov"}
FREE = "0 0 0 0 0"
DATED = re.compile(r"-(?:20\d{6}|20\d\d-\d\d-\d\d|latest)$")  # a dated model costs what its family does


class Price(NamedTuple):
    """In pico-dollars: per token, per search, and per answer where the provider reports its cost."""
    input: int
    output: int
    cache_read: int
    cache_write: int
    cache_write_1h: int
    search: int
    answer: int = 0


@functools.lru_cache(4096)
def price_of(text: str) -> Price | None:
    """Cache reads and writes without a price of their own cost the same as plain input."""
    if not text:
        return None
    if text.startswith("provider "):
        return Price(0, 0, 0, 0, 0, 0, int(decimal.Decimal(text[9:]) * 10**12))
    words = f"{text} - - - -".split()[:6]
    for place, instead in ((2, 0), (3, 0), (4, 3)):
        if words[place] == "-":
            words[place] = words[instead]
    picos = [0 if word == "-" else int(decimal.Decimal(word) * 10**6) for word in words]
    picos[5] *= 1000  # per thousand, tokens per million
    return Price(*picos)


@functools.cache
def scaled(text: str, factors: str) -> str:
    """Each token price times its factor ("2/1.5/2"); the last factor applies to all that follow."""
    numbers = factors.split("/")
    numbers = [*numbers, *numbers[-1:] * 4][:5] + ["1"]
    return " ".join(word if word == "-" else format(round(decimal.Decimal(word) * decimal.Decimal(number), 6).normalize(), "f")
                    for word, number in zip(text.split(), numbers))


class PriceSchedule(NamedTuple):
    """All prices of one model."""
    base: str
    over: int = 0  # input tokens above which a request costs `long`; 0: none does
    long: str = ""
    changes: tuple[tuple[int, str], ...] = ()  # (day since 1970 UTC, price from then on), in order
    factors: Mapping[str, str] = {}  # of service tiers, regions and peak hours
    ends: str = ""  # the day its provider retires the model
    source: str = ""  # for people

    def price(self, started_ms: int, input_tokens: int, tiers: str = "") -> str:
        """By a request's start, its size (cached and written input included), and what it was served as."""
        text = self.base
        for day, changed in self.changes:
            text = changed if started_ms >= day * DAY_MS else text
        if self.over and input_tokens > self.over:
            text = self.long
        beijing_day = (started_ms + 8 * 3_600_000) // DAY_MS
        peak = started_ms % DAY_MS // 3_600_000 in PEAK_HOURS and (beijing_day + 3) % 7 < 5  # day 0 was a Thursday
        for tier in (tiers + " peak" * peak).split():
            text = scaled(text, self.factors[tier]) if tier in self.factors else text
        return text


def model_rows() -> Iterator[tuple[str, list[str]]]:
    provider, shared = "", list[str]()
    for names, *columns in map(str.split, MODEL_TABLE.splitlines()):
        if names.endswith("/"):
            provider, shared = names, columns
        else:
            yield from ((provider + name, shared + columns) for name in names.split(","))


@functools.cache
def builtin_schedules() -> dict[str, PriceSchedule]:
    schedules = {}
    for name, (_, _, *words) in model_rows():
        words = [*USUAL.get(name.partition("/")[0], "").split(), *words]
        factors = dict(word.split("=") for word in words if "=" in word)
        prices = [word for word in words if "=" not in word]
        base = " ".join([*prices, *"-----"][:5] + [factors.pop("search", "-")])
        over, long, changes = 0, "", []
        for kind in [*factors]:
            if kind.startswith("over"):  # the row's own comes last
                over, long = int(kind[4:]), scaled(base, factors.pop(kind))
            elif kind.startswith("from"):
                changes.append((day_of(kind[4:]), scaled(base, factors.pop(kind))))
        ends = factors.pop("ends", "")
        source = f"{name} in the table of {PRICES_DATE}"
        schedules[name] = PriceSchedule(base, over, long, tuple(changes), factors, ends, source)
    return schedules


def configured_schedule(name: str, prices: PriceConfig) -> PriceSchedule:
    """Of [prices."provider/model"]."""
    def text(prefix: str) -> str:
        values = [*(getattr(prices, prefix + name) for name in Price._fields[:5]), prices.search_per_1000]
        return " ".join("-" if value is None else format(value, "f") for value in values)
    factors = {tier: format(factor, "f") for tier, factor in prices.tiers.items()}
    return PriceSchedule(text(""), prices.long_over, text("long_") if prices.long_over else "", factors=factors,
                  source=f"{name} in pomex.toml")


class PriceTable:
    """A target's price: of its own name, of its family, the one configured for the requested name, zero at a free provider."""

    def __init__(self, config: Config) -> None:
        self.configured = {name: configured_schedule(name, prices) for name, prices in config.prices.items()}
        self.known = {**builtin_schedules(), **self.configured}
        self.free = {name: PriceSchedule(FREE, source="free") for name, provider in config.providers.items()
                     if provider.free or provider.wire_api == "demo"}
        # only of providers that accept a service tier, or a speed
        self.regions = {name: REGIONS.get(urllib.parse.urlsplit(provider.base_url).hostname or "", "")
                        for name, provider in config.providers.items() if provider.wire_api not in ("gemini", "demo")}

    def schedule(self, provider: str, model: str, asked: str = "") -> PriceSchedule | None:
        name = f"{provider}/{model}"
        return (self.known.get(name) or self.known.get(DATED.sub("", name)) or self.configured.get(asked)
                or self.free.get(provider))


def cost_nanos(price: str, multiplier: int, usage: Usage) -> int:
    """Pico-dollars times the account's multiplier, rounded once, half up."""
    rate = price_of(price)
    if rate is None:
        return 0
    picos: int = sum(map(operator.mul, billed_counts(usage, rate), rate))
    return min((picos * multiplier + 500_000_000) // 1_000_000_000, MAX_NUMBER)


def billed_counts(usage: Usage, rate: Price) -> Price:
    """How many of each part of a price are billed."""
    fresh, short = usage.input - usage.cached - usage.cache_write, usage.cache_write - usage.cache_write_1h
    return Price(fresh, usage.output, usage.cached, short, usage.cache_write_1h, usage.web_searches, int(rate.answer > 0))


def saved_nanos(price: str, cached: int) -> int:
    """How much more the cached input would have cost without the cache."""
    rate = price_of(price)
    return cached * (rate.input - rate.cache_read) // 1000 if rate else 0


def format_usd(nanos: int, places: int = 2) -> str:
    """12.31, rounded half away from zero."""
    return f"{decimal.Decimal(nanos).scaleb(-9).quantize(decimal.Decimal(1).scaleb(-places), decimal.ROUND_HALF_UP):f}"


def parse_decimal(text: str, unit: int, least: int = 0) -> int:
    """A number in plain digits, in whole units of 1/unit; ValueError for any other text."""
    if not re.fullmatch(r"-?(?=\.?[0-9])[0-9]{0,12}\.?[0-9]{0,12}", text):
        raise ValueError
    number = decimal.Decimal(text) * unit
    if number != int(number) or not least <= number < 2**60:
        raise ValueError
    return int(number)


# --- 8.8 usage rows ---

INSERT_USAGE = insertion("usage", USAGE_COLUMNS)
INSERT_OPEN = insertion("open_requests", ("process", "reserved", *USAGE_COLUMNS)) + " ON CONFLICT (response_id) DO NOTHING"
COLUMNS = ", ".join(USAGE_COLUMNS)
ADD_TO_ROLLUPS = (insertion("usage_rollups", ROLLUP_COLUMNS)
                  + f" ON CONFLICT ({', '.join(ROLLUP_KEY)}) DO UPDATE SET "
                  + ", ".join(f"{name} = usage_rollups.{name} + excluded.{name}" for name in SUMS)
                  + ", last_ms = CASE WHEN excluded.last_ms > usage_rollups.last_ms THEN excluded.last_ms "
                  "ELSE usage_rollups.last_ms END")


def to_storable(value: Any) -> int | str:
    """An absurd count from one provider must not stop the rows committed with it."""
    if type(value) is int and 0 <= value <= MAX_NUMBER or isinstance(value, str) and value.isascii() and "\0" not in value:
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\0", "?")
    return int(max(0, min(value, MAX_NUMBER))) if isinstance(value, (int, float)) else 0


ROLLUP_PLACE, ROLLUP_COUNTS = operator.attrgetter(*ROLLUP_KEY[1:]), operator.attrgetter(*SUMS[4:])


def upsert_rollups(tx: Transaction, rows: Sequence[UsageRow], sign: int = 1) -> None:
    """Adds rows to the rollups and meters, or subtracts them."""
    rollups, meters = [], []
    for row in rows:
        unpriced = row.final and not row.price and row.input + row.output > 0
        counts = row.final, row.status == "failed", row.estimated != "", unpriced, *ROLLUP_COUNTS(row)
        half_hour_ms = row.started_ms // HALF_HOUR_MS * HALF_HOUR_MS
        rollups.append((half_hour_ms, *ROLLUP_PLACE(row), *(sign * count for count in counts), row.started_ms))
        if row.cost_nanos:
            meters += [(sign * row.cost_nanos, owner, row.started_ms // DAY_MS)
                       for owner in (f"key {row.key_id}", f"account {row.account_id}")]
    tx.execute_many(ADD_TO_ROLLUPS, sorted(rollups))
    tx.execute_many("UPDATE meters SET spent = spent + ? WHERE owner = ? AND since_day <= ?",
                    sorted(meters, key=operator.itemgetter(1, 2)))
    if sign < 0:
        tx.execute_many("DELETE FROM usage_rollups WHERE requests = 0 AND estimated = 0 AND input + output + cost_nanos = 0 "
                        "AND started_ms = ?", {place[:1] for place in rollups})


def insert_rows(tx: Transaction, rows: Iterable[UsageRow]) -> Sequence[UsageRow]:
    """As stored."""
    storable = [UsageRow._make(map(to_storable, row)) for row in rows]
    tx.execute_many(INSERT_USAGE, storable)
    upsert_rollups(tx, storable)
    return storable


def read_rows(tx: Transaction, query: str, *values: Any) -> list[UsageRow]:
    return [UsageRow(*row) for row in tx.read(f"SELECT {', '.join(USAGE_COLUMNS)} FROM {query}", values)]


def settle_requests(tx: Transaction, requests: Iterable[Sequence[UsageRow]]) -> Collection[str]:
    """The ids whose rows were inserted. A request's first settlement counts, unless it was a guess: the true one replaces
    `interrupted`."""
    by_id = {rows[-1].response_id: rows for rows in requests if rows}
    found: dict[str, str] = dict(tx.read(f"SELECT response_id, error_code FROM usage WHERE final = 1 AND response_id IN "
                                         f"{placeholders(by_id)}", [*by_id]))
    for response_id, error_code in found.items():
        if error_code == "interrupted" != by_id[response_id][-1].error_code:
            upsert_rollups(tx, read_rows(tx, "usage WHERE response_id = ?", response_id), -1)
            tx.execute("DELETE FROM usage WHERE response_id = ?", (response_id,))
        else:
            del by_id[response_id]
    insert_rows(tx, itertools.chain.from_iterable(by_id.values()))
    return by_id


def close_requests(tx: Transaction, response_ids: Collection[str]) -> None:
    """Releases what they had reserved."""
    these = f"FROM open_requests WHERE response_id IN {placeholders(response_ids)}"
    reserved = tx.read(f"SELECT reserved {these}", [*response_ids])
    tx.execute_many("UPDATE meters SET granted = granted - ? WHERE owner = ? AND since_day = ?",
                    [amount for text, in reserved for amount in json.loads(text or "[]")])
    tx.execute_many(f"DELETE {these}", [[*response_ids]])


def interrupted(row: UsageRow) -> UsageRow:
    """Of an open request whose process died, billed for its estimated input."""
    return row._replace(status="failed", result="failed", error_code="interrupted", terminal_by="gateway",
                        error="The gateway ended before the answer did.", estimated="the gateway ended before the answer did")


def lock_of(owner: str, number: int | str) -> int:
    """Of a key's or an account's meters, rates and rollups. A thousand in all: a server has room for some thousand locks, and a
    batch may be of 10,000 keys."""
    return 1 + 2 * (int(number) % 2**9) + (owner == "account")


def locks_of(rows: Iterable[UsageRow]) -> set[int]:
    return {lock for row in rows for lock in (lock_of("key", row.key_id), lock_of("account", row.account_id))}


def recover_open_requests(tx: Transaction, dead: Iterable[Row]) -> None:
    """Of processes that have not beaten since (id, beats), and of unregistered ones."""
    for process in dead:
        tx.execute("DELETE FROM processes WHERE process = ? AND beats = ?", process)
    ended = "open_requests WHERE process NOT IN (SELECT process FROM processes)"
    rows = read_rows(tx, ended)
    if rows:
        tx.lock(locks_of(rows))
        rows = read_rows(tx, ended)  # those that no other process has settled meanwhile
        settle_requests(tx, [[interrupted(row)] for row in rows])
        close_requests(tx, [row.response_id for row in rows])
        log.warning("ledger: %d requests of an ended process are marked as interrupted", len(rows))


# --- 8.9 limits ---
#
# A limit of money, or of open requests, is a row of `meters`: spent, and granted. A request reserves its estimated input and
# some output, extends that while output streams, and releases it with its settlement, or by `open_requests` if its process
# dies. A rate is a token bucket (GCRA): a row of `rates` with the time when it is full.

RESERVED_STEP = 4096  # tokens by which a running answer's reservation grows
LEAST_OUTPUT = 256  # with room for fewer tokens a request is refused
WINDOW_NS = 60 * 10**9  # a rate's bucket holds what may be used in a minute
PERIODS = {"day": "today", "week": "this week", "month": "this month", "total": "in total"}


class Limit(NamedTuple):
    owner: str  # of the meter: "key 7", "account 2", "key 7 open"; of a rate: "key 7 requests"
    unit: str  # nanos | requests | tokens | open
    maximum: int  # 0 for prepaid credit, whose bound is its balance
    kind: str  # key | account | credit | open | rate
    since_day: int  # of a meter: it counts what was spent since then


@dataclass(eq=False)
class LimitExceeded(Exception):
    limit: Limit
    remaining: int
    need: int
    wait_s: float
    spent: int = 0


def period_bounds(period: str, now_s: float) -> tuple[int, int]:
    """Its first day (since 1970, UTC), and the next one's; (0, 0) for total."""
    day, now = int(now_s // 86400), time.gmtime(now_s)
    monday, first = day - now.tm_wday, day - now.tm_mday + 1
    month = first, first + calendar.monthrange(now.tm_year, now.tm_mon)[1]
    return {"day": (day, day + 1), "week": (monday, monday + 7), "month": month, "total": (0, 0)}[period]


@functools.lru_cache(4096)
def limits_of(key: Key, day: int) -> list[Limit]:
    start, month = (period_bounds(period, day * 86400)[0] for period in (key.period, "month"))
    owner, account = f"key {key.id}", f"account {key.account_id}"
    limits = (
        (owner, "nanos", key.budget_nanos, "key", start),
        (account, "nanos", 0 if key.prepaid else None, "credit", 0),
        (account, "nanos", key.account_limit_nanos, "account", month),
        (f"{owner} open", "open", key.concurrent or None, "open", 0),
        (f"{owner} requests", "requests", key.rpm or None, "rate", 0),
        (f"{owner} tokens", "tokens", key.tpm or None, "rate", 0))
    return [Limit._make(limit) for limit in limits if limit[2] is not None]


def is_owner(owner: str) -> str:
    """SQL of a condition: key_id = 7 of "key 7"."""
    return owner.replace(" ", "_id = ")


def select_spent(owner: str) -> str:
    """SQL of what an owner has spent since a time."""
    return f"SELECT coalesce(sum(cost_nanos), 0) FROM usage_rollups WHERE {is_owner(owner)} AND started_ms >= ?"


def spent_and_granted(tx: Transaction, limit: Limit) -> Row:
    """Of its meter, which is created if needed."""
    found = tx.read("SELECT spent, granted FROM meters WHERE owner = ? AND since_day = ?", (limit.owner, limit.since_day))
    if found:
        return found[0]
    spent = 0
    if limit.kind != "open":
        spent = tx.read(select_spent(limit.owner), (limit.since_day * DAY_MS,))[0][0]
        tx.execute("DELETE FROM meters WHERE owner = ? AND since_day > 0 AND since_day < ? AND granted = 0",  # long over
                   (limit.owner, limit.since_day - 62))
    tx.execute("INSERT INTO meters VALUES (?, ?, ?, 0) ON CONFLICT DO NOTHING", (limit.owner, limit.since_day, spent))
    return spent, 0


def acquire(tx: Transaction, limit: Limit, amount: int, now_ns: int) -> tuple[int, float]:
    """Takes `amount`, or LimitExceeded. Returns of a rate (what remains, seconds until it is full again)."""
    if limit.kind == "rate":
        each_ns, end_ns = WINDOW_NS // limit.maximum, now_ns + WINDOW_NS
        # a time more than two minutes ahead was stored before the clock was set back
        found = tx.read("SELECT full_ns FROM rates WHERE owner = ? AND full_ns > ? AND full_ns <= ?",
                        (limit.owner, now_ns, end_ns + WINDOW_NS))
        left_ns, need_ns = end_ns - (found[0][0] if found else now_ns), amount * each_ns
        if need_ns > left_ns:
            raise LimitExceeded(limit, left_ns // each_ns, amount, (need_ns - left_ns) / 10**9)
        left_ns -= need_ns
        tx.execute_many("INSERT INTO rates VALUES (?, ?) ON CONFLICT (owner) DO UPDATE SET full_ns = excluded.full_ns",
                        [(limit.owner, end_ns - left_ns)])
        return left_ns // each_ns, (WINDOW_NS - left_ns) / 10**9
    maximum = limit.maximum
    if limit.kind == "credit":
        maximum = tx.read(f"SELECT coalesce(sum(nanos), 0) FROM credits WHERE {is_owner(limit.owner)}")[0][0]
    take = "UPDATE meters SET granted = granted + ? WHERE owner = ? AND since_day = ? AND spent + granted + ? <= ?"
    values = amount, limit.owner, limit.since_day, amount, maximum
    if not tx.execute(take, values):  # it is used up, or there is no meter yet
        spent, granted = spent_and_granted(tx, limit)
        if not tx.execute(take, values):
            raise LimitExceeded(limit, maximum - spent - granted, amount, 1.0, spent)
    return 0, 0.0


# --- 8.10 the ledger ---

KEYS_POLL_S = 0.5  # a revocation in another process holds within a second
OPEN_AFTER_S = 0.05  # an open request is recorded with the next settlement, or after so long
GATHER_S = 0.005  # between two commits, while requests are open: more join
RETRY_S = 0.25  # between two attempts of a failing ledger to write
BEAT_S = 4.0  # how often a process says that it lives
KEYS_AT_ONCE = 100  # per step of the loop: half a millisecond
DEAD_S = 16.0  # without a beat a process is dead: its requests are settled within half a minute
UNSAVED_AT_ONCE = 10_000  # values of a statement: SQLite takes 32,766
REFUSALS_KEPT, REFUSALS_AT_ONCE = 1000, 8
SELECT_PROCESSES = "SELECT process, host, pid, start, beats FROM processes"
ADD_TO_COUNTERS = "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = counters.value + excluded.value"
OpenRow: TypeAlias = Callable[[], UsageRow]  # makes the row when it is written
Settlement: TypeAlias = tuple[Sequence[UsageRow], Sequence[tuple[int, str]]]  # rows, and corrections of rates (ns, owner)
Unsaved: TypeAlias = OpenRow | Settlement


def host_name() -> str:
    """Where process ids are comparable: the host and PID namespace."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def start_of(pid: int) -> str:
    """When a process that runs was started, "" if unknown: process ids are reused."""
    with contextlib.suppress(OSError, IndexError):
        state, *fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[18] if state != "Z" else ""
    return ""


def has_ended(pid: int, start: str) -> bool:
    if sys.platform == "win32":  # there os.kill would end it
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return start_of(pid) != start


class Ledger:
    """Called on the loop's thread; the database has its own. While rows cannot be written `healthy` is False: `begin` refuses,
    settled rows are kept in memory and tried again."""
    healthy = True
    failed_s = 0.0  # since when it has not been
    trouble = ""  # why the keys could not be read last time
    skew_s = 0.0  # of the database's clock, which all share
    looked_s = -math.inf  # when the newest look at the keys began
    beaten = steady_since = -math.inf  # the newest beat; since when they had no gap
    secret = b""  # authenticates what clients carry for us
    disabled: frozenset[str] = frozenset()  # providers, by an administrator
    revision = 0  # of the keys
    flushed: asyncio.Future[LedgerError | None] | None = None  # when the next commit is done; None: not yet asked for
    flushed_at = 0.0  # when the one before began
    flushing: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    maintaining: asyncio.Task[None] | None = None

    def __init__(self, db: Database, max_unsaved: int) -> None:
        self.db, self.max_unsaved = db, max_unsaved
        self.look = asyncio.Lock()
        self.keys: dict[int, Key] = {}  # by id, revoked ones too
        self.by_digest: dict[str, Key] = {}
        self.process, self.host, self.began = secrets.token_hex(6), host_name(), start_of(os.getpid())
        self.pending: dict[str, OpenRow] = {}  # begun, not settled
        # what the next commit writes
        self.unsaved: dict[str, Unsaved] = {}
        self.writes: list[tuple[Collection[int], Callable[[Transaction], None]]] = []  # each with its locks
        # what one commit of each half second writes
        self.counters = collections.Counter[tuple[str, ...]]()  # of /metrics
        self.refusals: dict[Row, JSON] = {}
        self.notes: dict[str, str] = {}  # settings: the last error of each provider
        self.beats: dict[tuple[str, int], float] = {}  # of other processes: when first seen

    @classmethod
    def open(cls, place: str, durability: str = "process", max_unsaved: int = 10_000) -> Ledger:
        """Creates or upgrades the database; LedgerError: it cannot be used."""
        with contextlib.ExitStack() as opened:
            db = open_database(place, durability)
            opened.callback(db.close)
            db.migrate()
            ledger = cls(db, max_unsaved)
            db.commit(ledger.begin_process)
            opened.pop_all()
            return ledger

    # keys

    def apply_keys(self, rows: Iterable[Row]) -> None:
        for *columns, self.revision in rows:
            key = Key(*columns)
            self.keys[key.id] = self.by_digest[key.digest] = key

    async def refresh(self) -> None:
        """What any process changed of keys, and which providers are disabled. Of all who ask meanwhile, one looks."""
        asked = time.monotonic()
        async with self.look:
            if self.looked_s <= asked:
                self.looked_s = time.monotonic()
                await self.look_at_keys()

    async def look_at_keys(self) -> None:
        try:
            self.db.check()
            with self.db.errors():
                async with asyncio.timeout(self.db.look_s):
                    rows = await self.db.look(SELECT_KEYS, self.revision)
                    self.disabled = frozenset(name for name, in await self.db.look(SELECT_DISABLED))
            for start in range(0, len(rows), KEYS_AT_ONCE):
                self.apply_keys(rows[start:start + KEYS_AT_ONCE])
                await asyncio.sleep(0)
            self.trouble = ""
        except LedgerError as error:
            if self.trouble != str(error):
                log.error("%s The keys stay as they were. New requests get 503 until it can be read.", error)
            self.trouble = str(error)

    async def authorise(self, header: str, now_s: float) -> Key:
        """Unauthorized says what to do."""
        token = header[7:].strip(" \t")
        digest = key_digest(token)
        if digest not in self.by_digest and has_checksum(token):
            if self.available():
                await self.refresh()  # another process may have made it just now
            if digest not in self.by_digest and not self.available():
                raise self.unavailable()
        key = self.by_digest.get(digest)
        if key is None or header[:7].lower() != "bearer ":
            reason = explain_bad_key(header)
        elif key.revoked_s:
            reason = f"Key {key.name} was revoked on {utc_minute(key.revoked_s)}."
        elif key.state(now_s) == "expired":
            reason = f"Key {key.name} expired on {utc_minute(key.expires_s)}."
        else:
            return key
        raise unauthorized(reason)

    def now_s(self) -> float:
        return time.time() + self.skew_s

    def list_keys(self) -> list[Key]:
        """Oldest first, revoked ones too."""
        return sorted(self.keys.values(), key=lambda key: key.id)

    def available(self) -> bool:
        """Can rows be written and keys be read, in the file that was opened?"""
        return self.healthy and not self.trouble

    # requests

    def start(self) -> None:
        self.maintaining = asyncio.create_task(self.maintain())

    def begin(self, response_id: str, row: OpenRow) -> None:
        """Before a request is sent upstream; the next commit records it. LedgerError: nothing may be sent."""
        if not self.available():
            raise self.unavailable()
        self.pending[response_id] = self.unsaved[response_id] = row
        if self.timer is None:
            self.timer = asyncio.get_running_loop().call_later(OPEN_AFTER_S, self.schedule_flush)

    async def recorded(self, response_id: str) -> None:
        """When the open request survives the end of this process; LedgerError: it cannot."""
        if not await self.is_written(response_id):
            raise self.unavailable()

    async def is_written(self, response_id: str) -> bool:
        """Waits until it is, or until the ledger has failed for SETTLE_WAIT_S."""
        left_s = SETTLE_WAIT_S if self.healthy else self.failed_s + SETTLE_WAIT_S - time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.db.patience_s if self.healthy else left_s):
                if response_id in self.unsaved:
                    await asyncio.shield(self.schedule_flush())
                async with asyncio.timeout(left_s):
                    while response_id in self.unsaved:
                        await asyncio.shield(self.schedule_flush())
        return response_id not in self.unsaved

    async def reserve(self, response_id: str, row: OpenRow, needs: Sequence[tuple[Limit, int]],
                      held: Mapping[Limit, int]) -> dict[Limit, tuple[int, float]]:
        """Takes `needs` beside what is `held`, and records the open request. Returns what `acquire` does for each."""
        if not self.available():
            raise self.unavailable()

        def run(tx: Transaction) -> dict[Limit, tuple[int, float]]:
            now_ns, meters = tx.now_ns(), [each for each in held.items() if each[0].kind != "rate"]
            known = tx.read("SELECT reserved FROM open_requests WHERE response_id = ?", (response_id,))
            tx.execute_many("DELETE FROM open_requests WHERE response_id = ?", [(response_id,)])
            # unknown: this process was taken for dead and what it held was released
            taken = (*(() if known else meters), *needs)
            states = {limit: acquire(tx, limit, amount, now_ns) for limit, amount in taken}
            before = json.loads(known[0][0] or "[]") if known else []  # more than is held, if a caller did not wait for it
            reserved = [(amount, limit.owner, limit.since_day) for limit, amount in taken if limit.kind != "rate"]
            self.insert_open(tx, [row()], dumps([*before, *reserved]))
            return states
        self.pending[response_id] = row
        try:
            async with asyncio.timeout(self.db.look_s):
                return await self.commit(run, {lock_of(*limit.owner.split()[:2]) for limit in (*dict(needs), *held)})
        except LimitExceeded:
            if not held:
                self.pending.pop(response_id, None)
            raise
        except BaseException as error:  # it may have been written
            if not held:
                self.abandon(response_id)
            if isinstance(error, LedgerError | TimeoutError):
                raise self.unavailable() from error
            raise

    def insert_open(self, tx: Transaction, rows: Sequence[UsageRow], reserved: str = "") -> None:
        if rows:
            self.register(tx)
        tx.execute_many(INSERT_OPEN, [(self.process, reserved, *map(to_storable, row)) for row in rows])

    def abandon(self, response_id: str) -> None:
        """Forgets a request that was begun but not sent."""
        self.pending.pop(response_id, None)
        self.unsaved[response_id] = (), ()
        self.schedule_flush()

    async def settle(self, rows: Sequence[UsageRow], rates: Sequence[tuple[int, str]] = ()) -> None:
        """Returns when a request's rows, the final one last, survive the end of this process, or the ledger has failed for
        SETTLE_WAIT_S: then they are kept and tried again. A cancelled caller undoes nothing."""
        response_id = rows[-1].response_id
        if self.pending.pop(response_id, None) is None and response_id in self.unsaved:
            return
        if len(self.unsaved) >= self.max_unsaved and response_id not in self.unsaved:
            log.error("ledger: the row of %s is lost: [database] max_unsaved rows wait already", response_id)
            return
        self.unsaved[response_id] = rows, rates
        await self.is_written(response_id)

    async def commit(self, run: Callable[[Transaction], Written], locks: Collection[int] = ()) -> Written:
        """Together with all that waits; an exception undoes `run` alone, a cancelled caller nothing."""
        attempts: list[Attempted] = []
        self.writes.append((locks, lambda tx: attempts.append(tx.attempt(run))))
        failure = await asyncio.shield(self.schedule_flush())
        if failure is not None:
            raise failure
        written: Written
        written, error = attempts[-1]
        if error is not None:
            raise self.db.trouble(error) if is_database_failure(error) else error
        return written

    def schedule_flush(self) -> asyncio.Future[LedgerError | None]:
        """Done when what waits now is written, or that has failed."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.flushed is None:
            self.flushed = asyncio.get_running_loop().create_future()
        if self.flushing is None:
            self.flushing = asyncio.create_task(self.flush())
        return self.flushed

    async def flush(self) -> None:
        """Until nothing is asked for. Requests whose commit fails wait for the next."""
        try:
            while self.flushed is not None:
                if self.pending or not self.healthy:  # others may join, or the database may heal
                    await asyncio.sleep(self.flushed_at + (GATHER_S if self.healthy else RETRY_S) - time.monotonic())
                    if self.flushed is None:  # the ledger was closed
                        return
                self.flushed_at = time.monotonic()
                flushed, writes = self.flushed, self.writes
                unsaved = dict(itertools.islice(self.unsaved.items(), UNSAVED_AT_ONCE))
                self.flushed, self.writes = None, []
                failure, slow = None, None
                if self.db.patience_s is not None:
                    reason = f"The database {self.db.name} does not answer."
                    slow = asyncio.get_running_loop().call_later(self.db.patience_s, self.fail, reason)
                try:
                    await self.db.write(functools.partial(self.write_batch, writes, unsaved))
                except LedgerError as error:
                    failure = error
                    if unsaved:
                        self.fail(str(error))
                else:
                    if not self.healthy:
                        log.warning("The database %s can be written again.", self.db.name)
                    self.healthy = True
                    # what has changed meanwhile has been settled since
                    self.unsaved = {name: each for name, each in self.unsaved.items() if unsaved.get(name) is not each}
                finally:
                    if slow is not None:
                        slow.cancel()
                flushed.set_result(failure)
        finally:
            self.flushing = None

    def fail(self, reason: str) -> None:
        if self.healthy:
            log.error("%s New requests get 503 until it can be written.", reason)
            self.healthy, self.failed_s = False, self.flushed_at

    def write_batch(self, writes: Iterable[tuple[Collection[int], Callable[[Transaction], None]]],
                    unsaved: Mapping[str, Unsaved], tx: Transaction) -> None:
        settled = [row for each in unsaved.values() if not callable(each) for row in each[0]]
        tx.lock(locks_of(settled).union(*(locks for locks, _ in writes)))
        for _, write in writes:  # first: what a request reserves goes before its settlement
            write(tx)
        self.write_requests(unsaved, tx)

    def write_requests(self, unsaved: Mapping[str, Unsaved], tx: Transaction) -> None:
        """All at once; each alone, where one of them is at fault."""
        _, error = tx.attempt(functools.partial(self.write_all, unsaved))
        if error is None:
            return
        if is_database_failure(error):
            raise error
        if len(unsaved) == 1:
            log.error("ledger: the row of %s is lost: %s", *unsaved, fault_location(error))
            return
        for response_id, each in unsaved.items():
            self.write_requests({response_id: each}, tx)

    def write_all(self, unsaved: Mapping[str, Unsaved], tx: Transaction) -> None:
        self.insert_open(tx, [each() for each in unsaved.values() if callable(each)])
        settling = {response_id: each for response_id, each in unsaved.items() if not callable(each)}
        if not settling:
            return
        settled = settle_requests(tx, [rows for rows, _ in settling.values()])
        close_requests(tx, settling)
        most_ns = tx.now_ns() + 2 * WINDOW_NS
        tx.execute_many("UPDATE rates SET full_ns = CASE WHEN full_ns + ? < ? THEN full_ns + ? ELSE ? END WHERE owner = ?", [
            (change, most_ns, change, most_ns, owner) for response_id in settled for change, owner in settling[response_id][1]])

    def unavailable(self) -> LedgerError:
        return LedgerError("The usage ledger cannot be written at the moment, so nothing is sent to a "
                           "provider. Try again in a few seconds.", headers=(("retry-after", "2"),))

    def close(self) -> None:
        for task in (self.maintaining, self.timer):
            if task is not None:
                task.cancel()
        self.db.stop()
        failure = None
        try:
            if self.maintaining is not None or self.writes:
                self.db.commit(self.end_process)
                self.unsaved.clear()
        except LedgerError as error:
            failure = error
            log.error("%s %d rows are lost.", error, len(self.unsaved))
        finally:
            self.db.close()
        flushed, self.flushed = self.flushed, None
        if flushed is not None:
            with contextlib.suppress(RuntimeError):  # its loop has ended
                flushed.set_result(failure)

    # processes

    def begin_process(self, tx: Transaction) -> None:
        self.secret = bytes.fromhex(tx.read("SELECT value FROM settings WHERE name = 'secret'")[0][0])
        self.apply_keys(tx.read(SELECT_KEYS, (0,)))
        self.disabled = frozenset(name for name, in tx.read(SELECT_DISABLED))
        self.read_clock(tx)
        if self.db.on_this_host:
            recover_open_requests(tx, [(process, beats) for process, host, pid, start, beats in tx.read(SELECT_PROCESSES)
                                       if host == self.host and has_ended(pid, start)])

    def end_process(self, tx: Transaction) -> None:
        self.write_batch(self.writes, self.unsaved, tx)
        self.write_counts(self.counters, self.refusals, self.notes, tx)
        recover_open_requests(tx, tx.read("SELECT process, beats FROM processes WHERE process = ?", (self.process,)))

    async def maintain(self) -> None:
        """The background work of a running server."""
        for tick in itertools.count(1):
            try:
                await self.refresh()
                if not self.healthy:
                    self.schedule_flush()
                await self.save_counts()
                if tick % int(BEAT_S / KEYS_POLL_S) == 0:
                    await self.beat()
            except LedgerError:  # requests meet it too, where it is reported
                pass
            except Exception as error:  # noqa: BLE001 - our own bug; revocations must still be seen
                log.error("ledger: %s", fault_location(error))
            await asyncio.sleep(KEYS_POLL_S)

    async def beat(self) -> None:
        """Says that this process lives, and settles the open requests of dead ones. Whoever had a gap himself judges nobody by
        silence: perhaps the database was away from all."""
        def run(tx: Transaction) -> None:
            self.read_clock(tx)
            self.register(tx)
        if self.pending or not self.db.on_this_host:
            await self.db.write(run)
        now, dead, seen = time.monotonic(), list[Row](), self.beats
        if now - self.beaten > 2 * BEAT_S:
            self.steady_since = now
        self.beaten, self.beats = now, {}
        for process, host, pid, start, beats in await self.db.look(SELECT_PROCESSES):
            since = self.beats[process, beats] = seen.get((process, beats), now)
            silent = min(now - since, now - self.steady_since) > DEAD_S
            if has_ended(pid, start) if self.db.on_this_host and host == self.host else silent:
                dead.append((process, beats))
        if dead:
            await self.db.write(lambda tx: recover_open_requests(tx, dead))

    def read_clock(self, tx: Transaction) -> None:
        self.skew_s = tx.now_ns() / 10**9 - time.time()

    def register(self, tx: Transaction) -> None:
        tx.execute_many("INSERT INTO processes VALUES (?, ?, ?, ?, 0) "
                        "ON CONFLICT (process) DO UPDATE SET beats = processes.beats + 1",
                        [(self.process, self.host, os.getpid(), self.began)])

    # counters and refusals

    def refuse(self, key_id: int, refusal: JSON) -> None:
        """Of many alike within a second only one is stored, with their count."""
        self.counters["pomex_refusals_total", refusal["code"]] += 1
        place = key_id, refusal["code"], refusal["path"]
        if place in self.refusals or len(self.refusals) < REFUSALS_AT_ONCE:
            self.refusals.setdefault(place, {**refusal, "count": 0})["count"] += 1

    async def save_counts(self) -> None:
        counts = dict(self.counters), dict(self.refusals), dict(self.notes)
        if not any(counts):
            return
        for each in (self.counters, self.refusals, self.notes):
            each.clear()
        try:
            await self.commit(functools.partial(self.write_counts, *counts))
        except LedgerError as error:
            if not error.in_doubt:
                self.counters.update(counts[0])
                self.refusals, self.notes = {**counts[1], **self.refusals}, {**counts[2], **self.notes}
            raise

    def write_counts(self, counters: Mapping[Row, int], refusals: Mapping[Row, JSON], notes: Mapping[str, str],
                     tx: Transaction) -> None:
        tx.execute_many(ADD_TO_COUNTERS, sorted((dumps(name), count) for name, count in counters.items()))
        tx.execute_many("INSERT INTO refusals (time_ms, key_id, code, count, data) VALUES (?, ?, ?, ?, ?)", [
            (each["time_ms"], key_id, code, each["count"], dumps(each)) for (key_id, code, _), each in refusals.items()])
        tx.execute_many("DELETE FROM refusals WHERE id <= (SELECT max(id) FROM refusals) - ?", [(REFUSALS_KEPT,)])
        tx.execute_many("INSERT INTO settings VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                        sorted(notes.items()))

    async def counted(self) -> dict[tuple[str, ...], int]:
        """Of all processes together."""
        await self.save_counts()
        found = await self.commit(lambda tx: tx.read("SELECT name, value FROM counters"))  # behind what is on its way
        return {tuple(json.loads(name)): value for name, value in found}

    # changes of keys and providers

    async def change(self, who: str, action: str, name: str, run: Callable[[Transaction], object], after: JSON,
                     before: JSON | None = None) -> None:
        """Commits a change with its row of the audit log."""
        def audited(tx: Transaction) -> None:
            run(tx)
            tx.insert("audit", {
                "time_ms": tx.now_ns() // 10**6, "who": to_storable(who), "action": action, "name": to_storable(name),
                "before": dumps(in_usd(before or {})), "after": dumps(in_usd(after))})
        await self.commit(audited, [CHANGES])  # in whose order revisions are seen
        await self.refresh()

    async def create(self, kind: str, name: str, now_s: float, who: str, settings: JSON, **columns: Any) -> None:
        """BadRequest: the name is malformed or taken."""
        if not KEY_NAME.fullmatch(name):
            raise BadRequest("A name is 1 to 64 letters, digits, dots, dashes or underscores.", param="name")

        def run(tx: Transaction) -> None:
            tx.insert(f"{kind}s", {"name": name, "created_s": int(now_s), **columns, **settings})
            tx.execute(f"UPDATE keys SET revision = {NEXT_REVISION} WHERE revision = 0")  # of a new key
        try:
            await self.change(who, f"{kind} created", name, run, settings)
        except (sqlite3.IntegrityError, PostgresError):
            hint = f" Revoke it first with: python pomex.py keys revoke {name}" if kind == "key" else ""
            raise BadRequest(f"There is an active {kind} named {name} already.{hint}", param="name") from None

    async def create_key(self, name: str, now_s: float, who: str = "", **settings: Any) -> str:
        """The new key is stored nowhere; `settings` are of KEY_SETTINGS."""
        token = new_key()
        await self.create("key", name, now_s, who, settings, digest=key_digest(token), hint=mask_key(token), revision=0)
        return token

    async def revoke_key(self, name: str, now_s: float, who: str = "") -> Key:
        return await self.edit_key(name, who, "key revoked", revoked_s=int(now_s))

    async def edit_key(self, name: str, who: str = "", action: str = "key edited", **settings: Any) -> Key:
        """Of an active key; running servers know within a second."""
        await self.refresh()
        key = next((key for key in self.keys.values() if key.name == name and not key.revoked_s), None)
        if key is None:
            raise BadRequest("There is no active key of that name. List keys with: python pomex.py keys list", param="name")
        changes = "".join(f"{column} = ?, " for column in settings)
        await self.change(who, action, name, lambda tx: tx.execute(
            f"UPDATE keys SET {changes}revision = {NEXT_REVISION} WHERE id = ?", (*settings.values(), key.id)),
            settings, {column: getattr(key, column) for column in settings})
        return self.keys[key.id]

    async def use_provider(self, name: str, use: bool, who: str = "") -> None:
        """In every process."""
        change = "DELETE FROM settings WHERE name = ?" if use else "INSERT INTO settings VALUES (?, '1') ON CONFLICT DO NOTHING"
        await self.change(who, f"provider {'enabled' if use else 'disabled'}", name, lambda tx: tx.execute(
            change, (f"disabled/{name}",)), {"disabled": not use}, {"disabled": name in self.disabled})


def in_usd(values: JSON) -> JSON:
    """{"limit_nanos": 12_500_000_000} as {"limit_usd": "12.5"}."""
    return {name.replace("nanos", "usd"): format_usd(value, 9).rstrip("0").rstrip(".")
            if "nanos" in name and value is not None else value for name, value in values.items()}


# --- 8.11 what one request may use, and what it costs ---

@dataclass(eq=False)
class Reservation:
    """What one request has reserved, and the rows of its failed attempts."""
    prices: PriceTable
    ledger: Ledger
    key: Key
    response_id: str
    model: str
    started_ms: int
    named: Mapping[str, Any]  # columns that all its rows share: request_id, endpoint, session and client
    asked_tier: str = ""
    reserved_output = 0  # tokens whose cost is reserved
    charged_output = 0  # tokens charged to a rate
    max_output_tokens = 0  # of the answer
    exhausted = False  # the last extension failed or was cut short
    max_price = ""  # that reservations are made at
    first = "", "", Usage()  # the target asked first, and what goes into it

    def __post_init__(self) -> None:
        self.failed_attempts: list[UsageRow] = []
        self.limits = limits_of(self.key, self.started_ms // DAY_MS)
        self.held = collections.Counter[Limit]()  # what is reserved
        self.states: dict[Limit, tuple[int, float]] = {}  # as acquire() said

    def price(self, provider: str, model: str, usage: Usage) -> str:
        """Of the tier that the answer names, else the dearer of the standard tier and the one asked for."""
        schedule, region = self.prices.schedule(provider, model, self.model), self.prices.regions.get(provider)
        if schedule is None:
            return f"provider {usage.cost}" if usage.cost else ""
        asked = "priority" if self.asked_tier == "fast" else self.asked_tier
        tiers = [usage.tier] if usage.tier or region is None else ["", asked]
        return max((schedule.price(self.started_ms, usage.input, f"{tier} {region or ''}") for tier in tiers),
                   key=lambda text: price_of(text) or ())

    def row(self, provider: str, model: str, usage: Usage, **more: Any) -> UsageRow:
        """Of an attempt."""
        price, key = self.price(provider, model, usage), self.key
        return UsageRow(
            self.response_id, started_ms=self.started_ms, key_id=key.id, model=self.model, account_id=key.account_id,
            provider=provider, upstream_model=model, price=price, multiplier=key.multiplier,
            cost_nanos=cost_nanos(price, key.multiplier, usage), saved_nanos=saved_nanos(price, usage.cached), tier=usage.tier,
            estimated=usage.inconsistency or ("no count from the provider" if usage.estimated else ""),
            **{name: getattr(usage, name) for name in COUNTED}, **self.named, **more)

    def open_row(self) -> UsageRow:
        return self.row(*self.first, status="in flight")

    async def reserve(self, targets: Sequence[tuple[ProviderConfig, str]], input_tokens: int, wanted: int, reserve: int) -> int:
        """`wanted` is the client's max_output_tokens, 0 for none. Returns the one to send upstream where the money is enough
        for no more, else 0; LimitExceeded says no."""
        self.first, self.max_output_tokens = (targets[0][0].name, targets[0][1], Usage(input_tokens)), wanted
        if not self.limits:
            self.ledger.begin(self.response_id, self.open_row)
            return 0
        prices = {self.price(provider.name, model, Usage(input_tokens)) for provider, model in targets}
        output = min(wanted or reserve, reserve)
        self.max_price = max(prices, key=lambda price: self._nanos(price, input_tokens, output))
        await self._acquire(input_tokens, output, min(output, RESERVED_STEP), 1)
        if self.reserved_output == output:
            return 0
        self.max_output_tokens = self.reserved_output
        return self.reserved_output

    def _nanos(self, price: str, input_tokens: int, output: int) -> int:
        """Input may be written to the cache, at the dearer price."""
        rate, multiplier = price_of(price), self.key.multiplier
        writes = rate is not None and rate.cache_write > rate.input
        return cost_nanos(price, multiplier, Usage(input_tokens, 0, input_tokens if writes else 0, output))

    async def _acquire(self, input_tokens: int, output: int, charged: int, first: int = 0) -> None:
        """Money for the input and for as much of the output as there is money for, and rates."""
        least, rate = min(LEAST_OUTPUT, output) if first else 1, price_of(self.max_price)
        while True:
            # a request larger than a whole minute's tokens passes when the bucket is full
            amounts = {"nanos": self._nanos(self.max_price, input_tokens, output), "requests": first, "open": first,
                       "tokens": min(input_tokens + charged, self.key.tpm)}
            needs = [(limit, amounts[limit.unit]) for limit in self.limits if amounts[limit.unit]]
            try:
                if needs:
                    self.states.update(await self.ledger.reserve(self.response_id, self.open_row, needs, self.held))
                elif first:
                    self.ledger.begin(self.response_id, self.open_row)
                break
            except LimitExceeded as no:
                self.states[no.limit] = max(no.remaining, 0), no.wait_s
                left = no.remaining - self._nanos(self.max_price, input_tokens, 0)
                less = left * 1_000_000_000 // (rate.output * self.key.multiplier) if rate and rate.output else 0
                if no.limit.unit != "nanos" or not least <= less < output:
                    raise
                output = less
        self.held.update(dict(needs))
        self.reserved_output += output
        self.charged_output += charged

    def covers(self, written: int) -> bool:
        """Is the reservation ahead of `written` characters of output?"""
        return not self.limits or self._tokens_ahead(written) <= min(self.reserved_output, self.charged_output)

    def _tokens_ahead(self, written: int) -> int:
        return written // 4 + (0 if 0 < self.max_output_tokens <= self.reserved_output else RESERVED_STEP // 2)

    async def extend(self, written: int) -> bool:
        """False: the reservation is used up. Thinking can exceed max_output_tokens, and some servers ignore it."""
        while not self.covers(written) and self.ledger.available():
            if self.exhausted:
                return written // 4 < min(self.reserved_output, self.charged_output)
            ahead = self._tokens_ahead(written)
            step, charged = (RESERVED_STEP * (ahead > each) for each in (self.reserved_output, self.charged_output))
            enough = self.reserved_output + step
            try:
                async with asyncio.timeout(self.ledger.db.patience_s):
                    await self._acquire(0, step, charged)
                self.exhausted = self.reserved_output < enough
            except LimitExceeded:
                self.exhausted = True
            except (LedgerError, TimeoutError):  # it is away: answers that run finish
                return True
        return True

    def add_failed_attempt(self, attempt: int, provider: str, model: str, usage: Usage, error_code: str) -> None:
        """A row if the provider will bill it."""
        if usage.input or usage.output:
            self.failed_attempts.append(self.row(provider, model, usage, attempt=attempt, final=0, status="lost",
                                                 error_code=error_code))

    async def settle(self, final: UsageRow) -> None:
        """Releases what was reserved, too."""
        rows = [*(row._replace(result=final.result) for row in self.failed_attempts), final]
        tokens = sum(row.input + row.output for row in rows)
        rates = [(min(tokens - charged, max(limit.maximum - charged, 0)) * (WINDOW_NS // limit.maximum), limit.owner)
                 for limit, charged in self.held.items() if limit.unit == "tokens"]
        self.held = collections.Counter()
        await self.ledger.settle(rows, rates)

    def headers(self) -> list[tuple[str, str]]:
        """x-ratelimit-*, of keys that have a rate."""
        found = []
        for limit, (remaining, reset_s) in self.states.items():
            if limit.kind == "rate":
                values = {"limit": limit.maximum, "remaining": remaining, "reset": f"{math.ceil(reset_s)}s"}
                found += [(f"x-ratelimit-{name}-{limit.unit}", str(value)) for name, value in values.items()]
        return found


RATES = {"requests": "send {} requests a minute", "tokens": "use {} tokens a minute", "open": "have {} requests open at once"}


def limit_error(key: Key, no: LimitExceeded, now_s: float, to_codex: bool) -> GatewayError:
    """Codex shows the text of invalid_prompt alone; the ledger keeps the true code."""
    if no.limit.unit in RATES:
        wait_s = max(1, math.ceil(no.wait_s))
        rate = RATES[no.limit.unit].format(no.limit.maximum)
        return GatewayError(f"Key {key.name} may {rate}. Please try again in {wait_s}s.", status=429, type="rate_limit_error",
                            code="rate_limit_exceeded", headers=(("retry-after", str(wait_s)),))
    if no.limit.kind == "credit":
        message = f"The credit of account {key.account} is used up: {format_usd(no.remaining)} USD are left."
    else:
        who, period = (f"Key {key.name}", key.period) if no.limit.kind == "key" else (f"Account {key.account}", "month")
        message = f"{who} has used {format_usd(no.spent)} of {format_usd(no.limit.maximum)} USD {PERIODS[period]}"
        if no.spent < no.limit.maximum:
            message += f" and this request may cost {format_usd(no.need, 4)}"
        reset = period_bounds(period, now_s)[1]
        when = time.strftime("%d %B", time.gmtime(reset * 86400)).lstrip("0")
        message += f"; it resets on {when}." if reset else "."
    error = GatewayError(message, status=429, type="insufficient_quota",
                         code="invalid_prompt" if to_codex else "insufficient_quota", headers=(("x-should-retry", "false"),))
    error.ledger_code = "insufficient_quota"
    return error


# --- 8.12 accounts and credit ---

async def list_accounts(db: Database, now_s: float) -> list[JSON]:
    """With the limit a month (None: none), the multiplier in millionths, `prepaid` (1: refused when the credit is used up), and
    the sums of credit and of what was spent."""
    credit: dict[int, int] = dict(await db.read("SELECT account_id, sum(nanos) FROM credits GROUP BY account_id"))
    spent, month = [await spent_nanos(db, "account_id", day) for day in (0, period_bounds("month", now_s)[0])]
    names = ("id", "name", "prepaid", "limit_nanos", "multiplier", "created_s", "credit_nanos", "spent_nanos", "month_nanos")
    accounts = await db.read(f"SELECT {', '.join(names[:6])} FROM accounts ORDER BY id")
    return [dict(zip(names, (*row, *(sums.get(row[0], 0) for sums in (credit, spent, month))))) for row in accounts]


async def account_named(db: Database, name: str) -> int:
    found = await db.read("SELECT id FROM accounts WHERE name = ?", name)
    if not found:
        raise BadRequest(f"There is no account named {name}. List them with: python pomex.py accounts list", param="name")
    return int(found[0][0])


async def add_credit(ledger: Ledger, name: str, nanos: int, reason: str, now_s: float, who: str = "") -> None:
    """Adds a top-up, or with a reason an adjustment."""
    if not nanos:
        raise BadRequest("The amount of a credit must not be 0.", param="amount")
    if nanos < 0 and not reason:
        raise BadRequest("Taking credit away needs its reason.", param="reason")
    account_id = await account_named(ledger.db, name)
    entry = {"kind": "adjustment" if reason else "top-up", "nanos": nanos, "reason": reason}
    await ledger.change(who, "credit added", name, lambda tx: tx.insert(
        "credits", {"account_id": account_id, "created_s": int(now_s), **entry}), entry)


# --- 8.13 reports and care ---

KEY_NAME_OF, ACCOUNT_NAME_OF = (f"coalesce((SELECT name FROM {table}s WHERE {table}s.id = {table}_id), '')"
                                for table in ("key", "account"))
REPORT_BY = {"model": "model", "provider": "provider", "endpoint": "endpoint", "day": f"started_ms / {DAY_MS}",
             "key": KEY_NAME_OF, "account": ACCOUNT_NAME_OF}
ROW_SUMS = {  # of rows, what the same name sums of rollups
    "requests": "final", "failed": "CASE WHEN status = 'failed' THEN 1 ELSE 0 END",
    "estimated": "CASE WHEN estimated <> '' THEN 1 ELSE 0 END",
    "unpriced": "CASE WHEN final = 1 AND price = '' AND input + output > 0 THEN 1 ELSE 0 END"}


async def usage_sums(db: Database, group: Sequence[str], since_ms: int, until_ms: int, where: str = "1 = 1",
                     values: Sequence[Any] = (), table: str = "usage_rollups") -> list[tuple[Row, JSON]]:
    """(group, sums) of rollups, which have the time of their half hour, or of rows."""
    columns = [ROW_SUMS.get(name, name) if table == "usage" else name for name in SUMS]
    selected = ", ".join([*group, *(f"coalesce(sum({column}), 0)" for column in columns)])
    grouped = " GROUP BY " + ", ".join(map(str, range(1, len(group) + 1))) if group else ""
    rows = await db.read(f"SELECT {selected} FROM {table} WHERE started_ms >= ? AND started_ms < ? AND {where}{grouped}",
                         since_ms, until_ms, *values)
    return [(row[:len(group)], dict(zip(SUMS, row[len(group):]))) for row in rows]


def id_condition(column: str, number: int) -> str:
    """SQL; 0 is any."""
    return f"{column} = {int(number)}" if number else "1 = 1"


def key_condition(key_id: int) -> str:
    return id_condition("key_id", key_id)


async def spent_nanos(db: Database, column: str, first_day: int, end_day: int = MAX_NUMBER // DAY_MS, where: str = "1 = 1"
                      ) -> dict[int, int]:
    """What was spent in some days, by key or account."""
    return dict(await db.read(
        f"SELECT {column}, sum(cost_nanos) FROM usage_rollups WHERE started_ms >= ? AND started_ms < ? AND {where} "
        f"GROUP BY {column}", first_day * DAY_MS, end_day * DAY_MS))


async def usage_report(db: Database, by: str, first_day: int, last_day: int, account_id: int = 0) -> list[JSON]:
    """The sums by one column, the dearest first (days in order)."""
    found = await usage_sums(db, [REPORT_BY[by]], first_day * DAY_MS, (last_day + 1) * DAY_MS,
                             id_condition("account_id", account_id))
    rows = [{by: day_text(name) if by == "day" else name, **sums} for (name,), sums in found]
    return sorted(rows, key=lambda row: (row[by],) if by == "day" else (-row["cost_nanos"], -row["requests"], row[by]))


def month_bounds(text: str) -> tuple[int, int]:
    """Of 2026-11, as days since 1970; ValueError for another text."""
    first, after = period_bounds("month", day_of(text + "-01") * 86400)
    return first, after - 1


async def statement_rows(db: Database, account_id: int, first_day: int, last_day: int) -> JSON:
    """An account's month: balance before, credit entries, charges by model, balance after."""
    first_s = first_day * 86400
    (before,), = await db.read("SELECT coalesce(sum(nanos), 0) FROM credits WHERE account_id = ? AND created_s < ?",
                               account_id, first_s)
    before -= (await spent_nanos(db, "account_id", 0, first_day)).get(account_id, 0)
    entries = await db.read("SELECT created_s, kind, nanos, reason FROM credits WHERE account_id = ? AND created_s >= ? "
                            "AND created_s < ? ORDER BY id", account_id, first_s, (last_day + 1) * 86400)
    credits = [dict(zip(("created_s", "kind", "nanos", "reason"), entry)) for entry in entries]
    charges = await usage_report(db, "model", first_day, last_day, account_id)
    spent = sum(row["cost_nanos"] for row in charges)
    return {"before_nanos": before, "credits": credits, "charges": charges, "spent_nanos": spent,
            "after_nanos": before + sum(entry["nanos"] for entry in credits) - spent}


def round_preserving_sum(parts: Sequence[int], unit: int) -> list[int]:
    """In units, rounded so that they add up to the rounded sum."""
    totals = [(total + unit // 2) // unit for total in itertools.accumulate(parts, initial=0)]
    return [after - before for before, after in itertools.pairwise(totals)]


async def rows_in_pages(db: Database, since_ms: int = 0) -> AsyncIterator[JSON]:
    """In the order in which requests were settled."""
    last_id = 0
    while rows := await db.read(f"SELECT id, {KEY_NAME_OF}, {ACCOUNT_NAME_OF}, {COLUMNS} FROM usage "
                                "WHERE started_ms >= ? AND id > ? ORDER BY id LIMIT 5000", since_ms, last_id):
        for row in rows:
            yield dict(zip(("key", "account", *USAGE_COLUMNS), row[1:]))
        last_id = rows[-1][0]


async def verify(db: Database) -> tuple[int, list[str]]:
    """(rows checked, problems) of costs against prices, rollups against rows, meters against rollups."""
    wrong = [found for found, in await db.read(db.own_check) if found != "ok"]
    checked = 0
    async for row in rows_in_pages(db):
        checked += 1
        usage = Usage(**{name: row[name] for name in COUNTED})
        try:
            cost = cost_nanos(row["price"], row["multiplier"], usage)
        except (ValueError, ArithmeticError, LookupError):
            cost = -1
        if cost != row["cost_nanos"]:
            wrong.append(f"{row['response_id']}: {row['cost_nanos']} nano-dollars, its price and tokens give {cost}")
        if checked_usage(usage) is not usage:
            wrong.append(f"{row['response_id']}: its token counts contradict each other")
    (pruned_day,), = await db.read("SELECT coalesce(max(CAST(value AS BIGINT)), 0) FROM settings WHERE name = 'pruned_day'")
    rows, sums = [dict(await usage_sums(db, [REPORT_BY["day"], *ROLLUP_KEY[1:]], pruned_day * DAY_MS, MAX_NUMBER, table=table))
                  for table in ("usage", "usage_rollups")]
    days = {place[0] for place in rows.keys() | sums.keys() if rows.get(place) != sums.get(place)}
    wrong += [f"day {day_text(day)}: the sums differ from the rows" for day in sorted(days)]
    for owner, since_day, spent in await db.read("SELECT owner, since_day, spent FROM meters WHERE owner NOT LIKE '% open'"):
        if await db.read(select_spent(owner), since_day * DAY_MS) != [(spent,)]:
            wrong.append(f"{owner}: its limit counts another sum than the rollups")
    return checked, wrong


async def prune(ledger: Ledger, before_day: int) -> int:
    """Removes the rows of whole days; their sums stay, and with them every balance."""
    def run(tx: Transaction) -> int:
        tx.execute("INSERT INTO settings VALUES ('pruned_day', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value "
                   "WHERE CAST(settings.value AS BIGINT) < CAST(excluded.value AS BIGINT)", (str(before_day),))
        return tx.execute("DELETE FROM usage WHERE id IN (SELECT id FROM usage WHERE started_ms < ? LIMIT 5000)",
                          (before_day * DAY_MS,))
    gone = 0
    while removed := await ledger.commit(run):  # a part at a time: running servers write in between
        gone += removed
    return gone


async def audit_rows(db: Database, before_id: int = MAX_NUMBER, limit: int = 500, since_ms: int = 0) -> list[JSON]:
    """A page, newest first."""
    names = ("id", "time_ms", "who", "action", "name", "before", "after")
    rows = await db.read(f"SELECT {', '.join(names)} FROM audit WHERE id < ? AND time_ms >= ? ORDER BY id DESC LIMIT ?",
                         before_id, since_ms, limit)
    return [dict(zip(names, (*row, json.loads(before), json.loads(after)))) for *row, before, after in rows]


# === 9. upstream ===
#
# One exchange with a provider. An error says in which phase it happened and whether the request had been sent; it never holds
# a key.

READ_BYTES = 2**18        # of one read: a large body costs 42 % less CPU than with 64 KiB
WRITE_HIGH_BYTES = 2**18  # unsent bytes of a connection before its writer waits: a burst of 1,000 events
HAPPY_EYEBALLS_S = 0.25   # before the next address of a host is tried in parallel (RFC 8305 5)
POOL_IDLE_S = 30.0        # less than the idle timeouts of common load balancers (nginx 75 s, AWS and Azure 60 s)
POOL_SIZE = 256           # idle connections of one origin
PUMPED_BYTES = 2**16      # of a stream, translated in one step: with a larger read other tasks must run between
INFLATE_BYTES = 2**14     # inflated at a time: at most 16 MiB, with gzip's ratio of 1032:1
PHASES = {"connect": "connecting", "tls": "setting up TLS", "send": "sending the request",
          "head": "waiting for the answer", "body": "reading the answer"}


def do_nothing() -> None:
    """The callback where none is set."""


class StreamProtocol(asyncio.StreamReaderProtocol):
    """asyncio's streams report the peer's end only to a reader; this calls on_end() at once, and on_closed() when the socket
    is gone. While `pump` is set, it is called with the bytes that arrive, and no task wakes."""
    unread = 0  # bytes in the reader
    pump: Callable[[bytes], None] | None = None
    fault: Exception | None = None  # a reset: raised by the reader, it would hide the bytes before it

    def __init__(self, buffer_bytes: int,
                 connected: Callable[[StreamProtocol, asyncio.StreamWriter], None] | None = None) -> None:
        self.reader = asyncio.StreamReader(buffer_bytes)  # which holds up to twice that
        super().__init__(self.reader, connected and (lambda _, writer: connected(self, writer)))
        self.on_end = self.on_closed = do_nothing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio sets TCP_NODELAY only where a socket was made with IPPROTO_TCP."""
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        with contextlib.suppress(OSError):  # a Unix socket has no such option
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self.pump is not None:
            self.pump(data)
        else:
            self.unread += len(data)
            super().data_received(data)

    def eof_received(self) -> bool:
        super().eof_received()
        self.on_end()
        return False  # the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        self.fault = exc
        super().connection_lost(None)
        self.on_end()
        self.on_closed()


class StreamConnection:
    """Of either side: its streams, and the HTTP reader of the peer's messages."""
    http: RequestReader | ResponseReader

    def __init__(self, protocol: StreamProtocol, writer: asyncio.StreamWriter) -> None:
        self.protocol, self.reader, self.writer = protocol, protocol.reader, writer

    async def receive(self) -> bool:
        """Feeds the HTTP reader; False at the end. OSError: the connection broke."""
        data = await self.reader.read(READ_BYTES)
        self.protocol.unread -= len(data)
        self.http.feed(data)
        return data != b""

    def unsent_bytes(self) -> int:
        return self.writer.transport.get_write_buffer_size()

    def abort(self) -> None:
        """Drops unsent bytes."""
        self.writer.transport.abort()


class UpstreamConnection(StreamConnection):
    http: ResponseReader
    answered = False                           # a byte of the answer has come
    expiry: asyncio.TimerHandle | None = None  # while it is idle

    def __init__(self, protocol: StreamProtocol, writer: asyncio.StreamWriter) -> None:
        super().__init__(protocol, writer)
        self.http = ResponseReader()

    async def receive(self) -> bool:
        if await super().receive():
            self.answered = True
            return True
        if self.protocol.fault is not None:
            raise self.protocol.fault
        self.http.feed_eof()
        return False

    @property
    def reusable(self) -> bool:
        """No unsolicited bytes have come."""
        return not self.writer.is_closing() and not self.protocol.unread and self.http.idle


class TransportError(UpstreamError):
    """No connection, no TLS, or an incomplete answer."""

    def __init__(self, message: str, phase: str, sent: bool, brief: str = "", where: str = "") -> None:
        super().__init__(message)
        self.phase = phase  # a key of PHASES
        self.sent = sent    # the provider may have seen the request
        self.brief = brief  # what went wrong, in a few words
        self.where = where  # host:port


class TransportTimeout(TransportError, UpstreamTimeout):
    """A limit of the provider's configuration."""


# --- 9.1 endpoints and proxies ---

def host_and_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Proxy(NamedTuple):
    host: str
    port: int
    fields: tuple[tuple[str, str], ...]  # headers: its user and password


class Origin(NamedTuple):
    """The far end of a connection and the way to it: requests to the same may share connections."""
    scheme: str
    host: str
    port: int
    proxy: Proxy | None
    ca_file: str

    @property
    def authority(self) -> str:
        return host_and_port(self.host, self.port)


class Endpoint(NamedTuple):
    """What all requests to one base_url have in common."""
    origin: Origin
    prefix: str                    # of the request target: the path, and before a proxy the whole URL
    fields: list[tuple[str, str]]  # headers


def environment_proxy(scheme: str, authority: str) -> str:
    """As Python's own clients read HTTPS_PROXY, ALL_PROXY and NO_PROXY: lower case wins; a name matches what lies below it."""
    proxies = urllib.request.getproxies_environment()
    skipped = urllib.request.proxy_bypass(authority)
    return "" if skipped else proxies.get(scheme) or proxies.get("all", "")


def parse_proxy(proxy: str) -> Proxy:
    """ValueError: it does not speak HTTP."""
    url = urllib.parse.urlsplit(proxy if "://" in proxy else "http://" + proxy)
    if url.scheme != "http" or not url.hostname:
        raise ValueError("only proxies like http://host:port are supported")
    port = url.port or 1080  # curl's default
    if url.username is None:
        return Proxy(url.hostname, port, ())
    pair = f"{urllib.parse.unquote(url.username)}:{urllib.parse.unquote(url.password or '')}"
    return Proxy(url.hostname, port, (("proxy-authorization", "Basic " + base64.b64encode(pair.encode()).decode()),))


def endpoint_of(provider: ProviderConfig) -> Endpoint:
    """ValueError: the environment's proxy cannot be used."""
    url = urllib.parse.urlsplit(provider.base_url)
    usual = 443 if url.scheme == "https" else 80
    host, port = url.hostname or "", url.port or usual
    address = "" if provider.proxy == "off" or is_loopback(host) else provider.proxy
    if address == "env":
        address = environment_proxy(url.scheme, host_and_port(host, port))
    proxy = parse_proxy(address) if address else None
    origin = Origin(url.scheme, host, port, proxy, provider.ca_file)
    name, path = origin.authority.removesuffix(f":{usual}"), url.path.rstrip("/")
    fields = [("host", name), ("accept-encoding", "gzip")]
    if proxy and url.scheme == "http":  # RFC 9112 3.2.2: proxies need the absolute form
        return Endpoint(origin, f"http://{name}{path}", [*fields, *proxy.fields])
    return Endpoint(origin, path, fields)


# --- 9.2 one exchange ---

def describe_error(error: BaseException) -> str:
    """Without addresses and paths."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message or "the certificate is not valid"
    if isinstance(error, ssl.SSLError):
        return (error.reason or "failed").replace("_", " ").lower()
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "the name cannot be resolved"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error).removesuffix(".")


def overloaded(message: str, status: int = 503, code: str = "overloaded") -> GatewayError:
    return GatewayError(message, status=status, code=code, headers=(("retry-after", "1"),))


NO_HEADERS = Headers([])
LOCAL_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)  # not a provider's


@dataclass(eq=False)
class Exchange:
    """One request and its answer. Its holder calls close() in any case."""
    pool: ConnectionPool
    provider: ProviderConfig
    origin: Origin
    status = 0
    headers = NO_HEADERS
    connection: UpstreamConnection | None = None  # None after close()
    keep_alive = False
    finished = False         # the body was read to its end
    heard = True             # the last piece held more than comments and pings: set by the caller of read()
    idle_due = 0.0           # when silence inside the answer becomes a timeout
    paused_since = math.inf  # when the last piece was returned
    inflater: ContentDecoder | None = None
    compressed = b""  # bytes not inflated yet

    def __post_init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.total_due = self.loop.time() + self.provider.total_timeout_s

    def failed(self, phase: str, error: Exception, limit: str = "", sent: bool = True) -> TransportError:
        """The error to raise; of a timeout, `limit` is its setting."""
        if self.connection is not None:
            self.connection.abort()
        where = self.origin.authority
        who, doing = f"Provider {self.provider.name} ({where})", PHASES[phase]
        if limit:
            limit_s = getattr(self.provider, limit)
            message = f"{who} took longer than {limit} = {limit_s:g} s while {doing}."
            return TransportTimeout(message, phase, sent, f"no answer in {limit_s:g} s", where)
        reason = describe_error(without_traceback(error))
        return TransportError(f"{who} failed while {doing}: {reason}.", phase, sent, reason.partition(";")[0], where)

    async def next(self, connection: UpstreamConnection, phase: str, limit: str, due: float) -> ResponseHead | bytes | Signal:
        """The next part of the answer, by the deadline `due` of the setting `limit`. Any failure, cancellation too, closes the
        socket at once."""
        if due > self.total_due:
            limit, due = "total_timeout_s", self.total_due
        if self.loop.time() >= due:  # while bytes keep coming, no timer fires
            raise self.failed(phase, TimeoutError(), limit)
        timeout = asyncio.timeout_at(due)
        try:
            part = connection.http.next()
            if part is NEED_DATA:
                async with timeout:
                    while part is NEED_DATA:
                        await connection.receive()
                        part = connection.http.next()
            return part
        except (OSError, ProtocolError) as error:
            if phase == "head" and connection.unsent_bytes():
                phase = "send"
            raise self.failed(phase, error, limit if isinstance(error, TimeoutError) and timeout.expired() else "") from None
        except BaseException:
            connection.abort()
            raise

    async def begin(self, connection: UpstreamConnection, method: str, request: bytes) -> None:
        """Sends the request and waits for the head of its answer."""
        self.connection, connection.answered = connection, False
        connection.http.start(method)
        connection.writer.write(request)
        due = self.loop.time() + self.provider.first_byte_timeout_s
        head = await self.next(connection, "head", "first_byte_timeout_s", due)
        assert isinstance(head, ResponseHead)
        self.status, self.headers, self.keep_alive = head.status, head.headers, head.keep_alive
        coding = self.headers.get("content-encoding").lower()
        if 300 <= head.status < 400:
            redirect = f"it answered {head.status}, a redirect; none is ever followed: check base_url"
            raise self.failed("head", ProtocolError(redirect))
        if coding in ("gzip", "x-gzip"):
            self.inflater = ContentDecoder(coding)
        elif coding not in ("", "identity"):
            raise self.failed("head", ProtocolError("it answered in a content-encoding that was not asked for"))

    async def read(self) -> bytes:
        """The next decoded piece of the body; b"" at its clean end. After a piece that was `heard`, idle_timeout_s counts from
        this call: the time before was the client's."""
        connection, now = self.connection, self.loop.time()
        assert connection is not None
        if self.heard:
            self.idle_due = now + self.provider.idle_timeout_s
            self.total_due += max(0.0, now - self.paused_since)
        try:
            while not self.finished:
                if self.compressed:
                    if piece := self.inflate():
                        return piece
                    continue
                part = await self.next(connection, "body", "idle_timeout_s", self.idle_due)
                if not isinstance(part, bytes):
                    self.finished = True
                    self.inflate()
                elif self.inflater is None:
                    return part
                else:
                    self.compressed = part
            return b""
        finally:
            self.paused_since = self.loop.time()

    async def pump(self, take: Callable[[bytes], bool]) -> None:
        """Calls take(), which sets `heard`, with each piece of the body as it arrives, without waking this task: until it
        returns False, the body ends or breaks, or a deadline passes. read() then says which."""
        connection = self.connection
        if connection is None or self.finished or self.inflater or connection.protocol.unread or connection.reader.at_eof():
            return
        pump, protocol = Pump(self, connection, take), connection.protocol
        protocol.pump, protocol.on_end = pump.receive, pump.stop
        try:
            pump.take_parts()
            while not pump.stopped.done() and (left_s := min(self.idle_due, self.total_due) - self.loop.time()) > 0:
                await asyncio.wait([pump.stopped], timeout=left_s)
        finally:
            protocol.pump, protocol.on_end = None, do_nothing
            self.paused_since = self.loop.time()
        if pump.error is not None:
            raise pump.error
        if not pump.stopped.done():
            self.heard = False  # so read() raises the timeout

    def inflate(self) -> bytes:
        """The next slice of `compressed`; at the end of the body checks that it was complete."""
        if self.inflater is None:
            return b""
        piece, self.compressed = self.compressed[:INFLATE_BYTES], self.compressed[INFLATE_BYTES:]
        try:
            if self.finished:
                self.inflater.finish()
                return b""
            return self.inflater.feed(piece)
        except ProtocolError as error:
            raise self.failed("body", error) from None

    async def read_all(self, max_bytes: int) -> bytes:
        """The whole body. One over max_bytes is an error; that of an error answer is truncated."""
        pieces, size = [], 0
        while data := await self.read():
            pieces.append(data)
            size += len(data)
            if size > max_bytes:
                if self.status < 400:
                    raise self.failed("head", ProtocolError(f"its answer is longer than {max_bytes} bytes"))
                break
        return b"".join(pieces)[:max_bytes]

    async def close(self, reusable: bool = True) -> None:
        """Returns the connection to the pool if the answer is complete and nothing followed it: reused with unexpected bytes,
        it could hand one client's answer to another."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        if reusable and self.keep_alive and await self.is_complete(connection) and connection.reusable:
            self.pool.release(self.origin, connection)
            return
        if self.finished and (connection.protocol.unread or not connection.http.idle):
            self.pool.disable_reuse(self.origin)
        connection.abort()

    async def is_complete(self, connection: UpstreamConnection) -> bool:
        """Were request and answer sent whole? The decoder may have stopped at the last event."""
        try:
            if not self.finished and connection.protocol.unread:
                await connection.receive()  # without waiting: the bytes are in the buffer
            while not self.finished and (part := connection.http.next()) is not NEED_DATA:
                self.finished = part is END
        except ProtocolError:
            return False
        return self.finished and not connection.unsent_bytes()


@dataclass(eq=False)
class Pump:
    """Gives the bytes of an answer to take() as the event loop receives them."""
    exchange: Exchange
    connection: UpstreamConnection
    take: Callable[[bytes], bool]
    error: Exception | None = None  # of take()

    def __post_init__(self) -> None:
        self.stopped = self.exchange.loop.create_future()

    def receive(self, data: bytes) -> None:
        if len(data) <= PUMPED_BYTES:
            self.connection.http.feed(data)
            self.take_parts()
        else:
            self.stop()
            self.connection.protocol.data_received(data)

    def take_parts(self) -> None:
        exchange = self.exchange
        exchange.heard = False
        try:
            while isinstance(part := self.connection.http.next(), bytes) and self.take(part):
                pass
        except ProtocolError:  # the HTTP reader raises it again, for read()
            self.stop()
            return
        except Exception as error:  # noqa: BLE001 - for the task to handle
            self.error = error
            self.stop()
            return
        if exchange.heard:
            exchange.idle_due = exchange.loop.time() + exchange.provider.idle_timeout_s
        if part is not NEED_DATA:
            exchange.finished = part is END
            self.stop()

    def stop(self) -> None:
        self.connection.protocol.pump = None
        if not self.stopped.done():
            self.stopped.set_result(None)


# --- 9.3 connections ---

class ConnectionPool:
    """All connections to providers of this process."""
    closed = False
    secrets = re.compile(r"(?!)")  # never repeated from a provider's answer

    def __init__(self) -> None:
        self.idle: dict[Origin, list[UpstreamConnection]] = {}  # the newest is last, and used first
        self.endpoints: dict[tuple[str, str, str], Endpoint] = {}
        self.contexts: dict[str, ssl.SSLContext] = {}  # by ca_file
        self.lookups: dict[str, concurrent.futures.Future[list[str]]] = {}  # in progress, by host
        self.not_reused: set[Origin] = set()  # that sent unsolicited bytes

    async def exchange(self, provider: ProviderConfig, method: str, path: str, headers: list[tuple[str, str]],
                       body: bytes, again: Callable[[], bool] = lambda: True) -> Exchange:
        """Sends one request and waits for the head of its answer; TransportError or TransportTimeout. A pooled connection may
        be closing: if it breaks before any byte of an answer, a new one is used, if again() allows it."""
        endpoint = self.endpoint(provider)
        target = endpoint.prefix + path
        if provider.query_params:
            target += ("&" if "?" in target else "?") + urllib.parse.urlencode(provider.query_params)
        fields = [*endpoint.fields, *headers, ("content-length", str(len(body)))]
        request = request_bytes(method, target, fields, body)
        connection = self.acquire(endpoint.origin)
        exchange = Exchange(self, provider, endpoint.origin)
        if connection is not None:
            try:
                await exchange.begin(connection, method, request)
                return exchange
            except TransportError as error:
                if isinstance(error, TransportTimeout) or connection.answered or not again():
                    raise
        await exchange.begin(await self.connect(exchange), method, request)
        return exchange

    def endpoint(self, provider: ProviderConfig) -> Endpoint:
        key = provider.base_url, provider.ca_file, provider.proxy
        if key not in self.endpoints:
            try:
                self.endpoints[key] = endpoint_of(provider)
            except ValueError as error:  # of a proxy in the environment
                message = f"Provider {provider.name} cannot be reached: {error}."
                raise TransportError(message, "connect", sent=False) from None
        return self.endpoints[key]

    def acquire(self, origin: Origin) -> UpstreamConnection | None:
        """The newest that is idle and can be reused."""
        connections = self.idle.get(origin, [])
        while connections:
            connection = connections.pop()
            if connection.expiry is not None:
                connection.expiry.cancel()
            if connection.reusable:
                return connection
            if not connection.writer.is_closing():  # a closing one may have received a 408
                self.disable_reuse(origin)
            connection.abort()
        return None

    def disable_reuse(self, origin: Origin) -> None:
        """They could be read as the answer to another client's request."""
        if origin not in self.not_reused:
            self.not_reused.add(origin)
            log.warning("%s sends unsolicited bytes; its connections are no longer reused", origin.authority)
        for connection in self.idle.pop(origin, []):
            connection.abort()

    def release(self, origin: Origin, connection: UpstreamConnection) -> None:
        connections = self.idle.setdefault(origin, [])
        if len(connections) >= POOL_SIZE:
            connections[:] = [other for other in connections if not other.writer.is_closing()]
        if self.closed or len(connections) >= POOL_SIZE or origin in self.not_reused:
            connection.abort()
            return
        connection.expiry = asyncio.get_running_loop().call_later(POOL_IDLE_S, connection.abort)
        connections.append(connection)

    async def connect(self, exchange: Exchange) -> UpstreamConnection:
        """A new connection, through proxy and TLS, within connect_timeout_s."""
        origin, phase, connection = exchange.origin, "connect", None
        timeout = asyncio.timeout(exchange.provider.connect_timeout_s)
        try:
            async with timeout:
                connection = await self.dial(origin)
                if origin.scheme == "https":
                    if origin.proxy is not None:
                        await self.open_tunnel(connection, origin, origin.proxy)
                    phase = "tls"
                    await connection.writer.start_tls(self.context(origin.ca_file), server_hostname=origin.host)
            return connection
        except BaseException as error:
            if connection is not None:
                connection.abort()
            if not isinstance(error, (OSError, ProtocolError, ValueError)):
                raise
            limit = "connect_timeout_s" if timeout.expired() else ""
            if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
                raise overloaded(f"The gateway has no room for another connection: {describe_error(error)}.") from None
            raise exchange.failed(phase, error, limit, sent=False) from None

    async def dial(self, origin: Origin) -> UpstreamConnection:
        peer = origin.proxy or origin
        tries = [functools.partial(open_connection, address, peer.port) for address in await self.addresses(peer.host)]
        connection: UpstreamConnection | None
        connection, _, errors = await asyncio.staggered.staggered_race(tries, HAPPY_EYEBALLS_S)
        if connection is None:
            raise next(filter(None, reversed(errors)))
        opened = connection.writer.get_extra_info("socket")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # NATs drop silent connections after some minutes
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        return connection

    async def addresses(self, host: str) -> list[str]:
        """Each look-up has a daemon thread: a silent nameserver would block all threads of asyncio's executor."""
        with contextlib.suppress(ValueError):
            return [str(ipaddress.ip_address(host))]
        lookup = self.lookups.get(host)
        if lookup is None:
            self.lookups[host] = lookup = concurrent.futures.Future()
            lookup.set_running_or_notify_cancel()  # waiters may be cancelled, the look-up may not
            lookup.add_done_callback(lambda _: self.lookups.pop(host))
            threading.Thread(target=resolve, args=(lookup, host), daemon=True).start()
        return await asyncio.wrap_future(lookup)

    async def open_tunnel(self, connection: UpstreamConnection, origin: Origin, proxy: Proxy) -> None:
        """After the proxy's 2xx, the connection leads to the origin (RFC 9110 9.3.6)."""
        fields = [("host", origin.authority), *proxy.fields]
        connection.writer.write(request_bytes("CONNECT", origin.authority, fields, b""))
        connection.http.start("CONNECT")
        while (head := connection.http.next()) is NEED_DATA:
            await connection.receive()
        assert isinstance(head, ResponseHead)
        if not 200 <= head.status < 300:
            raise ConnectionError(f"the proxy answered {head.status} to CONNECT")
        if connection.protocol.unread or isinstance(connection.http.next(), bytes):
            raise ConnectionError("the proxy sent bytes of its own into the tunnel")
        connection.http = ResponseReader()

    def context(self, ca_file: str) -> ssl.SSLContext:
        """Verifies with the system's authorities, or only those of ca_file."""
        if ca_file not in self.contexts:
            context = ssl.create_default_context(cafile=ca_file or None)
            context.set_alpn_protocols(["http/1.1"])
            self.contexts[ca_file] = context
        return self.contexts[ca_file]

    async def close(self) -> None:
        """Open exchanges are closed by their holders."""
        self.closed = True
        for connections in self.idle.values():
            for connection in connections:
                connection.abort()
        self.idle.clear()
        await asyncio.sleep(0)  # lets the sockets go before the loop may end


def resolve(lookup: concurrent.futures.Future[list[str]], host: str) -> None:
    """In a thread: the addresses of a host, the families alternating (RFC 8305 4)."""
    families: dict[int, list[str]] = {}
    try:
        for family, _, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            families.setdefault(family, []).append(str(address[0]))
    except (OSError, UnicodeError) as error:
        lookup.set_exception(error)
    else:
        lookup.set_result([address for turn in itertools.zip_longest(*families.values()) for address in turn if address])


async def open_connection(address: str, port: int) -> UpstreamConnection:
    """asyncio.open_connection(), with our protocol."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(lambda: StreamProtocol(READ_BYTES // 2), address, port)
    return UpstreamConnection(protocol, asyncio.StreamWriter(transport, protocol, protocol.reader, loop))


# === 10. routing ===
#
# The targets of a model, their order, and the loop over them. Pure functions decide; the loop only waits.

AFTER_STOP_S = 5.0  # wait for the usage, which chat servers send after finish_reason
STOPPING, NO_ROOM = "The gateway is stopping; try again.", "Too many connections. Try again in a moment."
UNREADABLE = "The gateway could not read the provider's answer."
PACED_BYTES = 1 << 13  # a larger read is part of a burst, which costs the task no more than the pump
MAX_ANSWER_JSON_BYTES = 64 << 20  # of an answer that is not streamed: it is held in memory
RELAYED_HEADERS = re.compile(r"x-codex-(?!turn-state$).*|session[-_]id|thread-id|originator|user-agent|openai-beta|"
                             r"x-client-request-id|x-openai-(?:subagent|internal-codex-responses-lite)|traceparent|"
                             r"anthropic-(?:beta|version)|x-app|x-claude-code-session-id")
JSON_HEADERS = [("content-type", "application/json"), ("cache-control", "no-store"), ("x-content-type-options", "nosniff")]
STREAM_HEADERS = [("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-store"),
                  ("x-accel-buffering", "no")]  # an nginx in front must not buffer the stream


# --- 10.1 names ---

class Candidate(NamedTuple):
    """A target with one of its provider's keys. Retries and circuits are per candidate."""
    provider: ProviderConfig  # with this one key
    model: str
    id: str  # stable: made only of the configuration
    origin: str  # its name in envelopes
    window: int = 0  # tokens; 0: unknown


# wire -> models whose sealed blocks only the account that made them can read
ACCOUNT_BOUND: dict[str, str] = {"responses": r".*", "messages": r"claude-(sonnet|haiku)-5-5\b.*"}


class ModelCatalog:
    """The names of all known models, and the targets of any name."""

    def __init__(self, config: Config, found: Mapping[str, Sequence[str]]) -> None:
        self.config = config
        names = [*config.models]
        self.by_bare_name: dict[str, list[str]] = {}
        self.keyed: dict[str, list[tuple[ProviderConfig, str]]] = {}  # with each key, and a mark that tells the keys apart
        for name, provider in config.providers.items():
            self.keyed[name] = [(dataclasses.replace(provider, api_key=key), f"#{sha256_hex(key)[:8]}")
                                for key in provider.api_keys] or [(provider, "")]
            for model in offered_models(provider, found.get(name, ())):
                self.by_bare_name.setdefault(model, []).append(f"{name}/{model}")
                names.append(f"{name}/{model}")
        self.names = list(dict.fromkeys(names))
        self.tiers = functools.lru_cache(256)(self.resolve_candidates)

    def targets(self, model: str) -> list[tuple[ProviderConfig, str]]:
        """The (provider, model) pairs of a model's targets, as configured."""
        return [each[:2] for tier in self.tiers(model) for each in tier]

    def candidates(self, provider_name: str, model: str, known_as: str) -> list[Candidate]:
        window = known_models(provider_name).get(model, ModelFacts()).context_window
        found = []
        for provider, mark in self.keyed[provider_name]:
            bound = mark if re.fullmatch(ACCOUNT_BOUND.get(provider.wire_api, ""), model) else ""
            found.append(Candidate(provider, model, f"{provider_name}{mark}:{known_as}", provider_name + bound, window))
        return found

    def full_name(self, model: str) -> str:
        """provider/model-name for a bare name: of the one provider that lists the model, enabled or not, so that no outage
        moves a name to another vendor; else of the vendor that is known for it."""
        if "/" in model or model in self.config.models:
            return model
        vendors = (vendor for vendor in BUILTIN_PROVIDERS if model in known_models(vendor))
        found = self.by_bare_name.get(model) or [f"{vendor}/{model}" for vendor in vendors]
        if len(found) == 1:
            return found[0]
        reason = "several providers have this one" if found else f'no provider lists "{sanitize(model)}"'
        raise self.unknown(model, f"Model names are provider/model-name, and {reason}.", found)

    def resolve_candidates(self, model: str) -> Sequence[Sequence[Candidate]]:
        """The targets of a model by tier. BadRequest: the name is unknown, or its provider not configured."""
        configured = self.config.models.get(model)
        if configured and configured.targets:
            return [[each for target in tier for each in self.candidates(*target, target.model)]
                    for tier in configured.targets]
        provider_name, _, name = model.partition("/")
        provider = self.config.providers.get(provider_name)
        if provider is None and provider_name in BUILTIN_PROVIDERS:
            env_key = BUILTIN_PROVIDERS[provider_name].env_key
            advice = f"Set {env_key} and restart, or add it to pomex.toml." if env_key else "Start it, then restart Pomex."
            raise BadRequest(f"{sanitize(model)} cannot be used: {provider_name} is not configured. {advice}", param="model",
                             code="provider_not_configured")
        if provider is None or not name or not matches_any(name, served_models(provider)):
            raise self.unknown(model, f'Model "{sanitize(model)}" not found.')
        return [self.candidates(provider_name, name, "*")]  # names chosen by callers share one circuit

    def facts(self, name: str) -> ModelFacts:
        """The limits of a model: from the configuration, else from the built-in table by its first target."""
        configured = self.config.models.get(name)
        if configured and configured.context_window:
            return ModelFacts(configured.context_window)
        provider, model = self.first_target(name)
        return known_models(provider).get(model, ModelFacts())

    def first_target(self, name: str) -> tuple[str, str]:
        configured = self.config.models.get(name)
        if configured and configured.targets:
            return configured.targets[0][0]
        provider, _, model = name.partition("/")
        return provider, model

    def unknown(self, model: str, sentence: str, meant: Sequence[str] = ()) -> BadRequest:
        guesses = " or ".join(meant) or self.closest(model)
        hint = f" Did you mean {guesses}?" if guesses not in ("", model) else ""
        return BadRequest(f"{sentence}{hint} All names: GET /v1/models or /admin#models", param="model", code="model_not_found")

    def closest(self, model: str) -> str:
        """The most similar known name, or "". Only on the error path: difflib is slow."""
        wanted = model[:256].lower()
        by_tail = {name.partition("/")[2].lower(): name for name in reversed(self.names)}
        if wanted in by_tail:
            return by_tail[wanted]
        near = difflib.get_close_matches(wanted, self.names[:2000], 1, 0.7) or [
            by_tail[tail] for tail in difflib.get_close_matches(wanted.rpartition("/")[2], list(by_tail)[:2000], 1, 0.7)]
        return near[0] if near else ""


def header_value(text: str, limit: int = 1000) -> str:
    return sanitize(text, limit).encode("ascii", "replace").decode()


def served_models(provider: ProviderConfig) -> Collection[str]:
    """Patterns of names."""
    return DEMO_MODELS if provider.wire_api == "demo" else provider.models


def offered_models(provider: ProviderConfig, found: Sequence[str]) -> Iterable[str]:
    """The names in its configuration, those `found` at the provider, or those in the built-in table."""
    patterns = served_models(provider)
    plain = [pattern for pattern in patterns if not set(pattern) & set("*?[")]
    known = [model for model in known_models(provider.name) if not plain and matches_any(model, patterns)]
    return dict.fromkeys((*plain, *found, *known))


@functools.cache
def known_models(provider: str) -> dict[str, ModelFacts]:
    """The models of one provider in the built-in table."""
    mine = f"{provider}/"
    return {name.removeprefix(mine): ModelFacts(int(window), int(output))
            for name, (window, output, *_) in sorted(model_rows()) if name.startswith(mine)}


class ModelFacts(NamedTuple):
    context_window: int = 0  # 0: unknown
    max_output: int = 0


# --- 10.2 retries and circuit breakers ---
#
# Pure: time and randomness are arguments. After output has reached the client, nothing is retried.

MAX_ATTEMPTS = 6  # upstream calls of one request, including repairs and continuations
BACKOFF_S = 0.2  # before the first retry, then doubled; with 50 % jitter
MAX_RETRY_WAIT_S = 3.0  # with a longer Retry-After, another target is used, or the client has to wait


class RetryPolicy(NamedTuple):
    """The reaction to one class of failure."""
    label: str  # for users
    retries: int  # if there is another target
    retries_if_last: int  # if there is none
    threshold: int = 0  # consecutive failures that open the circuit; 0: not the target's fault
    open_s: float = 0.0  # the first time, then doubled each time
    max_open_s: float = 0.0
    failover: str = "any"  # to "any" target, to one with a "larger" context window, "": to none


RETRY_POLICIES: dict[str, RetryPolicy] = {
    "rate_limit": RetryPolicy("rate limited", 1, 1, 2, 2, 60),
    "quota": RetryPolicy("quota used up", 0, 0, 1, 600, 3600),
    "overload": RetryPolicy("overloaded", 1, 2, 3, 5, 60),
    "unreachable": RetryPolicy("no connection", 1, 2, 2, 5, 60),  # nothing was sent
    "network": RetryPolicy("connection broken", 1, 1, 3, 5, 60),
    "timeout": RetryPolicy("no answer in time", 0, 0, 2, 10, 120),
    "no_answer": RetryPolicy("no valid answer", 1, 1, 3, 10, 120),  # empty, HTML, garbage, cut
    "auth": RetryPolicy("credentials refused", 0, 0, 1, 600, 3600),
    "model_not_found": RetryPolicy("no such model", 0, 0, 1, 300, 3600),
    "tool_generation": RetryPolicy("invalid tool call", 1, 1),
    "context_length": RetryPolicy("context too long", 0, 0, failover="larger"),
    "bad_request": RetryPolicy("request refused", 0, 0, failover=""),
}


def fault_class(error: GatewayError) -> str:
    """The row of RETRY_POLICIES that a failure belongs to."""
    if isinstance(error, ProviderError):
        return error.kind
    if isinstance(error, UpstreamTimeout):
        return "timeout"
    if isinstance(error, TransportError):
        return "network" if error.sent else "unreachable"
    return "no_answer" if error.retryable else "bad_request"


def decide_retry(policy: RetryPolicy, shown: bool, tries: int, attempts: int, left_s: float, retry_after_s: float | None,
                 has_other: bool, is_open: bool, chance: float) -> tuple[Literal["retry", "failover", "give_up"], float]:
    """What follows a failure, and after how many seconds. `shown`: the client has output; `tries` of this target, `attempts`
    of all; `left_s` until the request's deadline; `has_other` target; this one `is_open` by now; `chance` from 0 to 1."""
    if shown or attempts >= MAX_ATTEMPTS or left_s <= 0:
        return "give_up", 0.0
    spread = 0.5 + chance
    wait_s = BACKOFF_S * 2 ** (tries - 1) * spread if retry_after_s is None else retry_after_s + 0.1 * spread
    retries = policy.retries if has_other else policy.retries_if_last
    if tries <= retries and wait_s <= min(MAX_RETRY_WAIT_S, left_s) and not (is_open and has_other):
        return "retry", wait_s
    return "failover" if has_other and policy.failover else "give_up", 0.0


@dataclass(slots=True)
class Circuit:
    fault: str = ""
    failures: int = 0  # in a row
    times_open: int = 0  # in a row; 0: it is closed
    until: float = 0.0  # open until then, afterwards one request may probe
    probing: bool = False  # that request is in progress
    recovering: bool = False  # that request has output: closed, unless it still fails


class CircuitBreakers:
    """One circuit for each candidate, of this process alone. `now`: the monotonic clock."""

    def __init__(self) -> None:
        self.circuits: dict[str, Circuit] = {}  # by Candidate.id, so bounded by the configuration

    def state(self, id: str, now: float) -> Literal["closed", "half-open", "open"]:
        circuit = self.circuits.get(id)
        if circuit is None or not circuit.times_open or circuit.recovering:
            return "closed"
        return "open" if now < circuit.until or circuit.probing else "half-open"

    def record_failure(self, id: str, fault: str, retry_after_s: float | None, now: float) -> float:
        """Counts a failure that is the target's fault. Returns for how many seconds this opens its circuit."""
        policy, circuit = RETRY_POLICIES[fault], self.circuits.setdefault(id, Circuit())
        circuit.fault, circuit.failures = fault, circuit.failures + 1
        asked_s = retry_after_s if retry_after_s and retry_after_s > MAX_RETRY_WAIT_S else 0.0
        if not (asked_s or circuit.times_open or circuit.failures >= policy.threshold) or now < circuit.until:
            return 0.0
        open_s = max(asked_s, min(policy.open_s * 2.0 ** min(circuit.times_open, 16), policy.max_open_s))
        self.circuits[id] = Circuit(fault, circuit.failures, circuit.times_open + 1, now + open_s)
        return open_s

    def record_success(self, id: str, whole: bool = True) -> bool:
        """Closes the circuit at the first output; resets the failures only at a `whole` answer: a target may break every
        stream. True if the circuit was open."""
        circuit = self.circuits.get(id)
        if circuit is None or not circuit.failures:
            return False
        was_open = circuit.times_open > 0 and not circuit.recovering
        circuit.recovering = circuit.times_open > 0
        if whole:
            self.circuits[id] = Circuit()
        return was_open

    def probe(self, id: str, now: float) -> Circuit | None:
        """Claims the one probe of a half-open circuit; None if the circuit needs none now."""
        if self.state(id, now) != "half-open":
            return None
        self.circuits[id].probing = True
        return self.circuits[id]

    def choose(self, candidates: Sequence[Candidate], now: float) -> Candidate | None:
        """The first whose circuit is not open; if all are open, the one that closes first."""
        ready = next((each for each in candidates if self.state(each.id, now) != "open"), None)
        return ready or min(candidates, key=lambda each: self.circuits[each.id].until, default=None)

    def forget(self, providers: set[str]) -> None:
        """Drops the circuits of providers that were removed or changed."""
        for id in [id for id in self.circuits if re.split("[#:]", id, maxsplit=1)[0] in providers]:
            del self.circuits[id]

    def rows(self, now: float) -> list[tuple[str, str, str, float]]:
        """(target, state, fault, seconds left) of each target that ever failed."""
        return [(id, self.state(id, now), each.fault, max(0.0, each.until - now)) for id, each in self.circuits.items()]

    def degraded(self, now: float) -> bool:
        return any(self.state(id, now) != "closed" for id in self.circuits)


# --- 10.3 affinity ---
#
# A conversation stays with the target that has its prompt cached and can read its sealed reasoning: named by our turn state,
# else by the newest envelope in the input. Rendezvous hashing spreads new ones, the same in every process: if a target is
# lost, only its conversations move.

SESSION_HEADERS = ("session_id", "session-id", "thread-id", "x-session-id", "x-claude-code-session-id")
ENVELOPES_READ = 8  # newest first, until one verifies


def conversation_of(request: ResponsesRequest, headers: Headers) -> str:
    """An identifier shared by all its requests: its cache key, its session, else a hash of what precedes the first answer."""
    named: str = request.get("prompt_cache_key", "") or next(filter(None, map(headers.get, SESSION_HEADERS)), "")
    if named:
        return named
    first = itertools.takewhile(lambda item: item["type"] == "message" and item.get("role") != "assistant", request.input)
    return sha256_hex(dumps([request.model, request.instructions, *first]))


def rendezvous_score(conversation: str, target: Candidate) -> bytes:
    """The conversation goes to the target of a tier with the highest score."""
    return hashlib.blake2b(f"{target.id}\0{conversation}".encode("utf-8", "replace"), digest_size=16).digest()


def turn_state(envelope: Envelope, target: Candidate) -> str:
    """Our x-codex-turn-state: names a target, readable only by us and not forgeable."""
    return "pmt1." + base64.urlsafe_b64encode(envelope.mac(f"turn\0{target.id}".encode())).decode().rstrip("=")


def sticky_candidate(
        candidates: Sequence[Candidate], envelope: Envelope, state: str, items: Sequence[JSON]) -> Candidate | None:
    """The target that the conversation already has, if its request shows it."""
    for each in candidates if state.startswith("pmt1.") else ():
        if hmac.compare_digest(turn_state(envelope, each).encode(), state.encode("utf-8", "replace")):
            return each
    sealed = (item.get("encrypted_content") for item in reversed(items))
    ours = (text for text in sealed if isinstance(text, str) and text.startswith(ENVELOPE_PREFIX))
    opened = next(filter(None, map(envelope.open, itertools.islice(ours, ENVELOPES_READ))), None)
    if opened is None:
        return None
    near = [each for each in candidates if each.origin == opened[0]]
    return max(near, key=lambda each: each.model == opened[1], default=None)


def order_candidates(tiers: Sequence[Sequence[Candidate]], disabled: Collection[str], request: ResponsesRequest,
                     headers: Headers, envelope: Envelope) -> list[Candidate]:
    """All targets of enabled providers, in the order in which this request should try them."""
    enabled = [[each for each in tier if each.provider.name not in disabled] for tier in tiers]
    found = [each for tier in enabled for each in tier]
    if not found:
        names = " and ".join(dict.fromkeys(each.provider.name for tier in tiers for each in tier))
        raise BadRequest(f"An administrator disabled {names}, and no other provider has this model. Enable it on the Providers "
                         "page of the dashboard, or ask for another model.", param="model", code="provider_disabled")
    if len(found) == 1:
        return found
    request = request.translated()
    score = functools.partial(rendezvous_score, conversation_of(request, headers))
    found = [each for tier in enabled for each in sorted(tier, key=score, reverse=True)]
    sticky = sticky_candidate(found, envelope, headers.get("x-codex-turn-state"), request.input)
    return sorted(found, key=lambda each: each is not sticky)


# --- 10.4 the answer to the client ---

class FailedAttempt(NamedTuple):
    """One failed try of a target, for the client and the log."""
    provider: str
    brief: str  # "529 overloaded", "connection refused"
    where: str  # host:port, if it failed below HTTP
    fault: str  # of RETRY_POLICIES
    error: GatewayError
    at_ms: int  # since the request began


def failed_attempt(provider: str, error: GatewayError, at_ms: int) -> FailedAttempt:
    fault = fault_class(error)
    status = f"{error.upstream_status} " if error.upstream_status else ""
    brief = error.brief or status + RETRY_POLICIES[fault].label
    return FailedAttempt(provider, brief, error.where, fault, error, at_ms)


def describe_attempts(failures: Sequence[FailedAttempt]) -> Iterator[str]:
    """`openai: connection refused (api.openai.com:443, 2 tries)`, `anthropic: 529 overloaded`"""
    for _, alike in itertools.groupby(failures, key=lambda failure: failure[:3]):
        *others, failure = alike
        tries = f"{len(others) + 1} tries" if others else ""
        notes = ", ".join(filter(None, (failure.where, tries)))
        reason = str(failure.error).rstrip(".")
        words = "" if failure.where or failure.fault == "auth" or reason.endswith("without a reason") else f": {reason}"
        yield f"{failure.provider}: {failure.brief}" + (f" ({notes})" if notes else "") + words


class ClientStream:
    """One answer on its way to the client: its head, its blocks, and the heartbeats between them."""

    def __init__(self, client: Client, answer: ClientAnswer, server: ServerConfig, reservation: Reservation,
                 envelope: Envelope) -> None:
        self.client, self.answer, self.server = client, answer, server
        self.reservation, self.envelope = reservation, envelope
        self.streaming: bool = answer.request.stream
        self.attempt = Attempt(answer)  # the newest
        self.loop = asyncio.get_running_loop()
        self.active = self.loop.time()
        self.due = self.active + server.request_deadline_s
        self.writing = asyncio.Lock()  # held while the client is slow
        self.timer: asyncio.TimerHandle | None = None
        self.beat: asyncio.Task[None] | None = None
        if self.streaming:
            self.timer = self.loop.call_later(server.early_200_after_s, self._tick)

    def headers(self, early: bool = False) -> list[tuple[str, str]]:
        """Of a 200. No upstream header is relayed: OpenAI-Model alone makes Codex warn of fraud."""
        fields, client = STREAM_HEADERS if self.streaming else JSON_HEADERS, self.client
        if not early:  # a target has answered
            own = [("x-pomex-provider", client.provider), ("x-pomex-attempts", str(client.attempts)),
                   ("openai-processing-ms", str(client.elapsed_ms())),
                   ("x-pomex-dropped", header_value(", ".join(dict.fromkeys(client.dropped)))),
                   ("x-codex-turn-state", client.turn_state)]
            fields = fields + [header for header in own if header[1]]
        return fields + self.reservation.headers()

    def put(self, attempt: Attempt) -> bool:
        """Writes the pending output, if that needs no waiting; False: send() it."""
        if not attempt.out:
            return True
        if not self.client.first_ms or self.writing.locked():
            return False
        self.active = self.loop.time()
        return self.client.put(attempt.take_output())

    async def send(self, block: bytes, last: bool = False) -> None:
        """Writes a block of the answer, after its head; `last` ends it. Waits while the client is slow."""
        if last:
            self.stop()
        async with self.writing:
            client, self.active = self.client, self.loop.time()
            if not client.status:
                if not last:
                    await self.reservation.ledger.recorded(self.answer.id)  # before the client sees a byte
                answered = client.attempts > 0 if last else self.attempt.output_started
                await client.start(200, self.headers(early=not answered))
            await (client.end if last else client.write)(block)

    def _tick(self) -> None:
        """After enough silence sends an early 200 with the opening events, or a heartbeat."""
        silent_s = self.loop.time() - self.active
        limit_s = self.server.heartbeat_s if self.client.status else self.server.early_200_after_s
        if self.writing.locked() or silent_s >= limit_s - 0.001:
            if not self.writing.locked():  # else the client is not reading
                self.beat = self.loop.create_task(self._beat())
            silent_s, limit_s = 0.0, self.server.heartbeat_s
        self.timer = self.loop.call_later(limit_s - silent_s, self._tick)

    async def _beat(self) -> None:
        with contextlib.suppress(OSError, GatewayError, asyncio.CancelledError):  # the request itself meets them, too
            if self.timer is not None and not self.writing.locked():  # neither ended nor being written meanwhile
                await self.send(self.answer.start() or self.answer.heartbeat())

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


# --- 10.5 the loop ---

Result = TypeVar("Result")
COUNT_S = 10.0  # how long a provider may take to count tokens
LARGE_BODY_BYTES = 1 << 18  # parsing or encoding a larger body takes milliseconds, in which streams would wait
SWITCH_S = 0.001  # how long a thread may keep the interpreter from the loop; Python's 5 ms add up


async def off_loop(size: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments), in a thread for a large body. A cancelled caller still waits for the end: the thread holds
    the body, so its bytes stay counted."""
    if size < LARGE_BODY_BYTES:
        return function(*arguments)
    running = asyncio.get_running_loop().run_in_executor(None, function, *arguments)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


class DemoExchange(Exchange):
    """A stream of the demo instead of a provider's."""
    status, headers = 200, Headers([("content-type", "text/event-stream")])

    def __init__(self, frames: Iterable[bytes]) -> None:
        self.frames = iter(frames)

    async def read(self) -> bytes:
        return next(self.frames, b"")


class Router:
    """Tries the targets of a request until one gives output, or none is left."""

    def __init__(self, upstream: ConnectionPool, counters: collections.Counter[Strings]) -> None:
        """`counters` are the ledger's, of METRICS by name and labels."""
        self.upstream, self.counters = upstream, counters
        self.health = CircuitBreakers()

    def metrics(self, now: float) -> dict[Strings, int]:
        """(metric, label values...) -> value."""
        return {("pomex_circuit_state", id): ("closed", "half-open", "open").index(state)
                for id, state, _, _ in self.health.rows(now)}

    async def route(self, candidates: Sequence[Candidate], down: ClientStream) -> None:
        """Tries `candidates` in their order. Afterwards down.attempt is finished, unless the client left."""
        tries = collections.Counter[str]()  # by Candidate.id
        target = self.health.choose(candidates, down.loop.time())
        try:
            while target is not None:
                tries[target.id] += 1
                if len(candidates) > 1 and down.answer.profile is CODEX:
                    down.client.turn_state = turn_state(down.envelope, target)
                await self.attempt(target, down)
                target = await self.next_target(target, candidates, tries, down)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if down.client.gone or task is None:
                raise
            task.uncancel()  # the gateway stops: the client is still there, and gets its terminal event
            down.attempt.finish(overloaded(STOPPING, code="server_error"))

    async def next_target(self, target: Candidate, candidates: Sequence[Candidate], tries: Mapping[str, int],
                          down: ClientStream) -> Candidate | None:
        """Records the result of the newest try. Returns the target of the next one, after its backoff; None: no more tries."""
        client = down.client
        name, error, now = target.provider.name, down.attempt.error, down.loop.time()
        fault = fault_class(error) if error else "ok"
        self.counters["pomex_upstream_attempts_total", name, fault] += 1
        if error is None:
            self.on_success(target)
            return None
        policy = RETRY_POLICIES[fault]
        client.failures.append(failed_attempt(name, error, client.elapsed_ms()))
        log.warning("%s %s: %s", client.request_id, target.id, sanitize(str(error), 1000))
        if now < down.due:
            self.on_failure(target, error, now)
        is_open = {each.id for each in candidates if self.health.state(each.id, now) == "open"}
        others = [each for each in candidates if each.id not in tries]
        if policy.failover == "larger":
            others = [each for each in others if each.window > target.window > 0]
        if is_open & tries.keys() - {target.id}:
            others = [each for each in others if each.id not in is_open]
        other = self.health.choose(others, now)
        shown = down.streaming and down.attempt.output_started
        decision, wait_s = decide_retry(
            policy, shown, tries[target.id], client.attempts, down.due - now, error.retry_after_s, other is not None,
            target.id in is_open, random.random())  # noqa: S311 - jitter, no secret
        if decision == "give_up":
            return None
        await asyncio.sleep(wait_s)
        down.reservation.add_failed_attempt(client.tries, name, target.model, down.attempt.usage or Usage(), error.code or "")
        if decision == "failover":
            self.counters["pomex_failovers_total", name, fault] += 1
        return other if decision == "failover" else target

    def on_failure(self, target: Candidate, error: GatewayError, now: float) -> None:
        """Counts it in the target's circuit, unless the client chose a model that is unknown or not permitted."""
        fault = fault_class(error)
        unknown = fault == "model_not_found" or error.upstream_status == 403
        if target.provider.wire_api == "demo" or (unknown and target.id.endswith(":*")):
            return
        if not RETRY_POLICIES[fault].threshold:
            if isinstance(error, ProviderError):  # so the target works
                self.on_success(target)
        elif open_s := self.health.record_failure(target.id, fault, error.retry_after_s, now):
            log.warning("circuit of %s is open for %.0f s: %s", target.id, open_s, RETRY_POLICIES[fault].label)

    def on_success(self, target: Candidate, whole: bool = True) -> None:
        if self.health.record_success(target.id, whole):
            log.warning("circuit of %s is closed again", target.id)

    async def attempt(self, target: Candidate, down: ClientStream) -> None:
        """One try of one target, from encoding to its end. Afterwards down.attempt is finished, unless cancelled."""
        client = down.client
        provider, failure = target.provider, None
        probe = self.health.probe(target.id, down.loop.time())
        client.provider, client.model, client.tries = provider.name, target.model, client.tries + 1
        down.attempt, client.dropped = Attempt(down.answer), []
        try:
            call = await off_loop(len(down.answer.request.raw), encode_call, target, down)
            down.attempt, client.dropped = call.attempt, call.dropped
            async with asyncio.timeout_at(down.due):
                await self.exchanges(target, call, down)
        except GatewayError as error:
            failure = error
            down.attempt.unbilled = isinstance(error, ProviderError) or (isinstance(error, TransportError) and not error.sent)
        except TimeoutError:
            limit_s = down.server.request_deadline_s
            failure = UpstreamTimeout(f"The request took longer than request_deadline_s = {limit_s:g} s.")
        except ConnectionError:  # the client's: those of providers are GatewayErrors
            raise
        except Exception as error:  # noqa: BLE001 - our own bug, or a wire misread: the client gets its terminal event
            log.error("%s %s: %s", client.request_id, target.id, fault_location(error))
            failure = UpstreamError(UNREADABLE)
        finally:
            if probe is not None:
                probe.probing = False
        try:
            if stop := down.attempt.stop:
                explanation = self.upstream.secrets.sub("[redacted]", stop.explanation)
                down.attempt.stop = dataclasses.replace(stop, explanation=explanation)
            down.attempt.finish(failure and without_traceback(failure))
        except Exception as error:  # noqa: BLE001 - our own bug
            log.error("%s %s: %s", client.request_id, target.id, fault_location(error))
            down.attempt = failed_copy(down.attempt)
        if down.attempt.error is not None:
            redact_configured(down.attempt.error, self.upstream.secrets)

    def headers(self, target: Candidate, call: UpstreamCall, client: Client) -> list[tuple[str, str]]:
        """Of a call: the configured ones, some of the client's where its body passes, the wire's own."""
        provider, given = target.provider, client.head.headers
        fields = [("content-type", "application/json"), *provider.http_headers.items()]
        if provider.api_key:
            fields += WIRES[provider.wire_api].auth(provider.api_key)
        if isinstance(call.attempt, Passthrough):
            fields += [(name, value) for name, value in given if RELAYED_HEADERS.fullmatch(name)]
        elif given.get("anthropic-beta"):
            client.dropped.append("anthropic-beta")
        sent = {name for name, _ in fields} - {"anthropic-beta"}        # a list: a repair adds to the client's own
        return [*fields, *(header for header in call.headers if header[0] not in sent)]

    async def exchanges(self, target: Candidate, call: UpstreamCall, down: ClientStream) -> None:
        """One exchange; a second if a known refusal can be repaired, more if the provider pauses its turn."""
        client, provider = down.client, target.provider
        more: UpstreamCall | None = call
        repaired = False
        while more is not None:
            call = more
            if not client.count_attempt():
                raise UpstreamError(f"The request has used its {MAX_ATTEMPTS} upstream calls.")
            client.asked_ms, client.answering_ms, client.upstream_id = client.elapsed_ms(), 0, ""
            if provider.wire_api == "demo":
                exchange: Exchange = DemoExchange(call.frames)
            else:
                headers = self.headers(target, call, client)
                exchange = await self.upstream.exchange(provider, "POST", call.path, headers, call.body, client.count_attempt)
            reusable = False
            client.answering_ms = client.elapsed_ms()
            upstream_id = exchange.headers.get("x-request-id") or exchange.headers.get("request-id")
            client.upstream_id = self.upstream.secrets.sub("[redacted]", upstream_id)
            try:
                await self.read(exchange, call.attempt, target, down)
                reusable = call.attempt.error is None and call.attempt.stop is not None
                more = call.resumed()
            except GatewayError as error:
                final = repaired or call.attempt.output_started or client.attempts >= MAX_ATTEMPTS
                more = None if final else call.repaired(error)
                if more is None:
                    raise
                repaired = True
            finally:
                await exchange.close(reusable)

    async def read(self, exchange: Exchange, attempt: Passthrough | TranslatedStream, target: Candidate,
                   down: ClientStream) -> None:
        """Reads the whole answer into the attempt; sends its frames to the client once output has begun."""
        kind = exchange.headers.get("content-type")
        if exchange.status >= 400:
            raise provider_error(exchange.status, exchange.headers, await read_error_body(exchange), time.time())
        if kind.startswith("text/html"):        # of a proxy or a login
            page = self.upstream.secrets.sub("", plain_text((await read_error_body(exchange)).decode("utf-8", "replace")))
            raise UpstreamError(f"The provider answered with a page, not with an answer: {redacted(page)}")
        reservation = down.reservation
        due: float | None = None        # after the model's end: when to stop waiting for the rest

        def take(piece: bytes) -> bool:
            """Translates and sends; False where the task has to go on: to wait, to end, or to extend the reservation."""
            before = output_size(attempt)
            attempt.feed(piece)
            exchange.heard |= output_size(attempt) > before
            sent = not (attempt.output_started and down.streaming) or down.put(attempt)
            return sent and not (attempt.stop or attempt.error) and reservation.covers(attempt.output_chars)

        is_object = not (down.streaming or kind.startswith("text/event-stream"))
        data = b"" if is_object else await exchange.read()
        if is_object or data.lstrip()[:1] in (b"{", b"["):      # some answer a streamed request with an object
            attempt.whole(data + await exchange.read_all(MAX_ANSWER_JSON_BYTES))
            return await self.show(attempt, target, down)
        while data:
            exchange.heard = False
            for at in range(0, len(data), PUMPED_BYTES):
                going = take(data[at:at + PUMPED_BYTES])
                await self.show(attempt, target, down)
                if len(data) > PUMPED_BYTES:
                    await asyncio.sleep(0)              # reading a flood of comments never waits
            if going and len(data) <= PACED_BYTES:
                await exchange.pump(take)
                await self.show(attempt, target, down)
            if attempt.upstream_done or (attempt.error and not attempt.output_started):
                return
            if attempt.stop or attempt.error:
                due = due or down.loop.time() + AFTER_STOP_S
            elif not await reservation.extend(attempt.output_chars):
                attempt.stop = Stop("max_output_tokens")        # the key's money is used up
                return
            data = b""
            with contextlib.suppress(TimeoutError):     # the model had finished: only the rest is missing
                async with asyncio.timeout_at(due):
                    data = await exchange.read()
        attempt.end()
        await self.show(attempt, target, down)

    async def show(self, attempt: Passthrough | TranslatedStream, target: Candidate, down: ClientStream) -> None:
        """Sends the pending output, and waits while the client is slow."""
        if not (attempt.output_started and down.streaming):
            return
        if attempt.out:
            if not down.client.first_ms:
                down.client.first_ms = down.client.elapsed_ms()
                self.on_success(target, whole=False)
            await down.send(attempt.take_output())
        else:
            await down.client.connection.drain()


def output_size(attempt: Attempt) -> int:
    """A number that grows with any output: text, items, and held parts of them."""
    return attempt.output_chars - attempt.output_limit - attempt.items_left


async def read_error_body(exchange: Exchange) -> bytes:
    """The body of an error answer, or the part of it that comes soon: the error is known without it."""
    body = b""
    with contextlib.suppress(TimeoutError, TransportError):
        async with asyncio.timeout(AFTER_STOP_S):
            while len(body) < 1 << 20 and (data := await exchange.read()):
                body += data
    return body


def encode_call(target: Candidate, down: ClientStream) -> UpstreamCall:
    """Encodes the request for a target. An encoder's exception is caused by the client's input, so it is no target's fault."""
    provider = target.provider
    passes = provider.relay == "bytes" or provider.wire_api != "responses"
    ctx = EncodeContext(down.answer, down.envelope, target.origin, target.model, passes, provider.dialect,
                        provider.prompt_cache, provider.overrides, down.client.attempts + 1)
    request, limit = down.answer.request, known_models(provider.name).get(target.model, ModelFacts()).max_output
    # Messages requires a limit, so it is no wish: Claude Code sends 64,000, whatever the model
    is_over = 0 < limit < request.get("max_output_tokens", 0) and request.api == "messages" != provider.wire_api
    if is_over:
        down.answer.request = dataclasses.replace(request, body={**request.body, "max_output_tokens": limit})
    try:
        call = WIRES[provider.wire_api].call(ctx)
        call.dropped.extend(["max_tokens"] * is_over)
        return call
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        log.error("%s %s: %s", down.client.request_id, target.id, fault_location(error))
        raise BadRequest("A field of the request has a type that it may not have.", code="invalid_type") from None


def failed_copy(attempt: Attempt) -> Attempt:
    """A failed attempt instead of one whose end raised an exception, with the same output and usage."""
    failed = Attempt(attempt.answer)
    for name in ("out", "output_started", "usage", "output_chars", "estimated_input"):
        setattr(failed, name, getattr(attempt, name))
    failed.items = {index: item for index, item in attempt.items.items() if type(index) is int}
    failed.finish(UpstreamError(UNREADABLE))
    return failed


# --- 10.6 metrics ---
#
# The ledger keeps the counters of all processes, by (metric, label values...).

BUCKETS_S: dict[str, Sequence[float]] = {
    "pomex_request_duration_seconds": (*(0.01 * 2**k for k in range(14)), 163.84, 327.68),
    "pomex_time_to_first_token_seconds": (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)}  # reasoning models take their time
METRICS: dict[str, tuple[str, str, Strings]] = {  # name -> type, help, labels
    "pomex_build_info": ("gauge", "the version of pomex.py", ("version",)),
    "pomex_streams_open": ("gauge", "requests in flight", ()),
    "process_start_time_seconds": ("gauge", "when the process started", ("worker",)),
    "process_cpu_seconds_total": ("counter", "CPU time of the process", ("worker",)),
    "pomex_requests_total": ("counter", "requests sent to a provider", ("endpoint", "model", "provider", "outcome")),
    "pomex_tokens_total": ("counter", "tokens billed", ("model", "provider", "kind")),
    "pomex_cost_usd_total": ("counter", "cost of the tokens", ("model", "provider")),
    "pomex_refusals_total": ("counter", "requests refused before any provider was asked", ("code",)),
    "pomex_upstream_attempts_total": ("counter", "attempts at targets, by result", ("provider", "result")),
    "pomex_failovers_total": ("counter", "failovers to another target, by cause", ("provider", "fault")),
    "pomex_circuit_state": (
        "gauge", "circuits of targets that ever failed: 0 closed, 1 half-open, 2 open", ("target", "worker")),
    "pomex_terminal_fallbacks_total": ("counter", "streams ended by the gateway", ("provider", "status")),
    "pomex_request_duration_seconds": ("histogram", "from the request's head to its settlement", ("provider", "model")),
    "pomex_time_to_first_token_seconds": ("histogram", "from the request's head to the first output", ("provider", "model")),
}
OUTCOMES = frozenset((  # codes of ours; any other is a provider's choice, or says nothing of how it went
    *(fault.code for fault in ERROR_CLASSES.values()), "server_is_overloaded", "upstream_unavailable", "client_gone",
    "interrupted", "price_unknown"))
TOKEN_KINDS = ("input", "cached", "cache_write", "output", "reasoning")
LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r'\"', "\n": r"\n"})


def count_request(
        counters: collections.Counter[Strings], known_models: Collection[str], rows: Sequence[UsageRow]) -> None:
    """Counts a settled request. Unknown models count as "other": a client cannot create series."""
    row = rows[-1]
    model = row.model if row.model in known_models else "other"
    outcome = row.error_code if row.error_code in OUTCOMES else row.status
    counters["pomex_requests_total", row.endpoint, model, row.provider, outcome] += 1
    for each in rows:
        counters["pomex_cost_usd_total", model, each.provider] += each.cost_nanos
        for kind in TOKEN_KINDS:
            counters["pomex_tokens_total", model, each.provider, kind] += getattr(each, kind)
    if row.terminal_by == "gateway":
        counters["pomex_terminal_fallbacks_total", row.provider, row.status] += 1
    for name, value_ms in zip(BUCKETS_S, (row.total_ms, row.first_ms)):
        if value_ms:
            bucket = bisect.bisect_left(BUCKETS_S[name], value_ms / 1000)
            counters[name, row.provider, model, str(bucket)] += 1
            counters[name, row.provider, model, "sum"] += value_ms


def metrics_text(samples: Mapping[Strings, float], worker: Sequence[str]) -> str:
    """Samples as Prometheus text 0.0.4. `worker`: the label of this process among several."""
    lines, ordered = [], sorted(samples.items())
    for name, (kind, meaning, labels) in METRICS.items():
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
        found = {place[1:]: sample for place, sample in ordered if place[0] == name}
        if kind != "histogram":
            lines += [sample_line(name, labels, (*series, *worker), sample) for series, sample in found.items()]
            continue
        for series in dict.fromkeys(place[:-1] for place in found):
            count: float = 0
            for bucket, bound in enumerate((*BUCKETS_S[name], "+Inf")):
                count += found.get((*series, str(bucket)), 0)
                lines.append(sample_line(f"{name}_bucket", (*labels, "le"), (*series, str(bound)), count))
            lines += [sample_line(f"{name}_sum", labels, series, found.get((*series, "sum"), 0) / 1000),
                      sample_line(f"{name}_count", labels, series, count)]
    return "\n".join(lines) + "\n"


def sample_line(name: str, labels: Sequence[str], values: Sequence[str], sample: float) -> str:
    """One line of a metric. A label without a value is left out."""
    pairs = ",".join(f'{label}="{value.translate(LABEL_ESCAPES)}"' for label, value in zip(labels, values))
    number = format_usd(int(sample), 9) if name == "pomex_cost_usd_total" else sample
    return f"{name}{{{pairs}}} {number}" if pairs else f"{name} {number}"


# === 11. handlers ===
#
# One function an endpoint, and at the end the table of routes. To follow one request, begin at `generate`.

class Gateway:
    """The state that requests share, under one configuration."""

    def __init__(self, config: Config, ledger: Ledger, upstream: ConnectionPool, found: Mapping[str, Sequence[str]],
                 old: Gateway | None = None) -> None:
        """`old` had another configuration: its circuits, counters and memories stay."""
        self.config, self.ledger, self.upstream = config, ledger, upstream
        self.catalogue = ModelCatalog(config, found)
        self.prices = PriceTable(config)
        passwords = [address.password] if (address := config.database.postgres) else []
        upstream.secrets = secret_pattern(config.providers.values(), *config.server.admin_token, *passwords)
        self.known_models = frozenset(self.catalogue.names)
        self.overviews: dict[tuple[int, ...], JSON] = {}      # by second and what was asked
        if old is None:
            self.router, self.memo, self.started_s = Router(upstream, ledger.counters), RequestMemo(), int(time.time())
            self.watchers: collections.Counter[int] = collections.Counter()     # live feeds by key id
            self.login_failures: dict[str, list[float]] = {}                    # times, by client address
        else:
            self.router, self.memo, self.started_s = old.router, old.memo, old.started_s
            self.watchers, self.login_failures = old.watchers, old.login_failures
            self.router.health.forget({name for name, was in old.config.providers.items() if config.providers.get(name) != was})

    async def handle(self, client: Client) -> None:
        """Answers one request. The server turns GatewayErrors into answers."""
        client.started_s += self.ledger.skew_s
        head = client.head
        try:
            answer = await self.route(head)(self, client)
            if answer is not None:
                await client.answer(200, JSON_HEADERS, dumps(answer).encode())
        except GatewayError as error:
            await note_refusal(self, client, error)
            CLIENT_APIS[api_of(head.path)].adapt_error(error)
            agent = head.headers.get("user-agent")
            if error.status == 400 and client_profile(head.headers.get("originator"), agent) is CODEX:
                error.headers += (("x-pomex-error", header_value(error.code or "")),)
                error.plain = 0 < codex_release(agent) < NEW_CODEX          # which shows the raw body
                make_codex_show(error, ("model_not_found", "invalid_prompt", "cyber_policy", "context_length_exceeded"))
            raise

    def route(self, head: RequestHead) -> Handler:
        path = re.sub(r"^(/v1/models/).+|^(/admin/api/\w+/)[^/]+", r"\1\2*", head.path)
        method = "GET" if head.method == "HEAD" else head.method
        if handler := ROUTES.get(f"{method} {path}"):
            return handler
        allowed = ", ".join(each for each in ("GET", "POST") if f"{each} {path}" in ROUTES).replace("GET", "GET, HEAD")
        if not allowed:
            raise not_found(head, bool(self.config.server.tls_cert))
        if head.headers.get("upgrade").lower() == "websocket":
            raise BadRequest("Codex tried a WebSocket. Set wire_api = \"responses\" in [model_providers.pomex] (and "
                             "supports_websockets = false if present).", status=426, code="use_http_sse",
                             headers=(("upgrade", "HTTP/1.1"),))
        raise BadRequest(f"{sanitize(head.method)} is not allowed here; {allowed} is.", status=405,
                         code="method_not_allowed", headers=(("allow", allowed),))

    async def key(self, client: Client) -> Key:
        headers = client.head.headers
        try:
            return await self.ledger.authorise(authorization(headers), client.started_s)
        except Unauthorized as error:
            if headers.get("originator") != "codex-tui":
                raise
            raise unauthorized(f"{error} Newer Codex keeps the key of its first start in a background server: run {NEW_KEY} "
                               "in the shell that has the right key.") from None


def authorization(headers: Headers) -> str:
    """The Authorization header, or Anthropic's x-api-key in its form. Unauthorized: they hold different keys."""
    given, key = headers.get("authorization"), headers.get("x-api-key").strip()
    if not key:
        return given
    if given and given[7:].strip(" \t") != key:
        raise unauthorized("x-api-key and Authorization hold two different keys. Send one of them.")
    return f"Bearer {key}"


NO_COMPACTION = ("Pomex does not compact conversations. Codex does it by itself unless its provider is named \"OpenAI\": set "
                 "name = \"Pomex API\" in [model_providers.pomex].")
# Paths that clients ask for by mistake: (pattern, code, problem and remedy). The first match counts.
NOT_SERVED: tuple[tuple[str, str, str], ...] = (
    (r"/v1/completions|/(v1beta|api)/.*", "wrong_wire_api",
     "This API is not served: {path}. Set the client to an OpenAI-compatible provider at {base}, or Claude Code to {root}."),
    (r"(/.*)?/messages(/count_tokens)?", "wrong_base_url",
     "ANTHROPIC_BASE_URL must be {root}, without /v1 (in opencode with it); this request came to {path}."),
    (r"(/.*)?/(responses|models|chat/completions)|/v1/v1/.*", "wrong_base_url",
     "base_url must end with /v1: {base}. The client adds the rest; this request came to {path}."),
    (r"/v1/responses/input_tokens", "not_found",
     "Pomex does not count tokens beforehand: usage in the answer has the true counts."),
    (r"/v1/responses/compact", "not_found", NO_COMPACTION),
    (r"/v1/responses/.*", "not_found",
     "Pomex stores no responses, so there is none to fetch, cancel or continue. Send the whole history in input."),
    (r"/v1/conversations(/.*)?", "not_found", "Pomex stores no conversations. Send the whole history in input."),
    (r"/v1/alpha/search", "not_found",
     "Pomex has no search service of its own. Leave supports_standalone_web_search out of [model_providers.pomex]: "
     "web_search is then a tool of the model."),
    (r"/v1/(embeddings|images|audio|moderations|files|uploads|(messages/)?batches|fine_tuning|vector_stores|realtime|assistants"
     r"|threads)(/.*)?", "not_found", "Pomex serves answers of models only, not {path}. Send this to the provider itself."))


def not_found(head: RequestHead, tls: bool) -> BadRequest:
    """404, with the remedy for common mistakes (FIRST-RUN.md 3)."""
    scheme = "https" if tls or head.headers.get("x-forwarded-proto") == "https" else "http"
    root, path = f"{scheme}://{sanitize(head.headers.get('host'))}", sanitize(head.path)
    for paths, code, sentence in NOT_SERVED:
        if re.fullmatch(paths, head.path):
            status = 400 if "ANTHROPIC" in sentence else 404       # Claude Code hides the text of a 404
            return BadRequest(sentence.format(root=root, base=f"{root}/v1", path=path), status=status, code=code)
    return BadRequest(f"There is nothing at {path}. Pomex serves POST /v1/responses, /v1/chat/completions and /v1/messages, "
                      "GET /v1/models; its dashboard is at /admin.", status=404, code="not_found")


# --- 11.1 POST /v1/responses ---

def new_response_id(now_s: float) -> str:
    """In order of time: inserting its row takes 4 us, with a random id 20."""
    return f"resp_{int(now_s * 1000):012x}{secrets.token_hex(10)}"


MEMO_BYTES = 16 << 20           # of all bodies and what was decoded from them: some thirty conversations of 120 KB
DECODED_RATIO = 4               # memory of a body and what was decoded from it, as a multiple of its size
REMEMBERED_BYTES = 16384        # decoding a smaller body is as fast as looking it up
NEAR_THE_END = 8192             # where clients write prompt_cache_key
CACHE_KEY = re.compile(rb'"prompt_cache_key"\s*:\s*"([^"]{1,128})"')


class RequestMemo:
    """The last request of each recent conversation: the next one most likely repeats its input."""

    def __init__(self) -> None:
        self.requests: collections.OrderedDict[Any, ResponsesRequest] = collections.OrderedDict()
        self.size = 0

    def put(self, conversation: Any, request: ResponsesRequest) -> None:
        if len(request.raw) < REMEMBERED_BYTES:
            return
        if old := self.requests.pop(conversation, None):
            self.size -= DECODED_RATIO * len(old.raw)
        self.requests[conversation] = request
        self.size += DECODED_RATIO * len(request.raw)
        while self.size > MEMO_BYTES:
            _, old = self.requests.popitem(last=False)
            self.size -= DECODED_RATIO * len(old.raw)


def conversation_hint(headers: Headers, raw: bytes) -> str:
    """An identifier of the conversation, found before the body is decoded; "" if there is none."""
    found = CACHE_KEY.search(raw, max(0, len(raw) - NEAR_THE_END))
    named = next(filter(None, map(headers.get, SESSION_HEADERS)), "")
    return named or (found[1].decode("latin-1") if found else "")


async def read_request(
        api: str, gateway: Gateway, client: Client, key: Key | None = None) -> tuple[ClientStream, list[Candidate]]:
    """The answer of a request, with nothing reserved yet, and the targets in their order."""
    key, headers = key or await gateway.key(client), client.head.headers
    raw = await client.body(key=f"key {key.id}")
    session = conversation_hint(headers, raw)
    conversation = key.id, session
    request = await off_loop(len(raw), parse_request, raw, gateway.memo.requests.get(conversation), api)
    gateway.memo.put(conversation, request)
    profile = client_profile(headers.get("originator"), headers.get("user-agent"))
    if (name := gateway.catalogue.full_name(request.model)) != request.model:
        request = dataclasses.replace(request, model=name)
    tiers = gateway.catalogue.tiers(request.model)
    check_model_access(key, request.model, profile)
    envelope = Envelope(gateway.ledger.secret, key.account)
    candidates = order_candidates(tiers, gateway.ledger.disabled, request, headers, envelope)
    config, client_api = gateway.config.server, CLIENT_APIS[api]
    named = {"request_id": client.request_id, "endpoint": client_api.endpoint,
             "client": header_value(headers.get("user-agent"), 200),
             "session": sanitize(session or request.get("prompt_cache_key", ""), 128)}
    tier = f"speed {request.get('speed')}" if request.get("speed") else request.get("service_tier", "")
    reservation = Reservation(gateway.prices, gateway.ledger, key, new_response_id(client.started_s), request.model,
                              int(client.started_s * 1000), named, tier)
    answer = client_api.answer(request, reservation.response_id, int(client.started_s), profile)
    answer.estimated_input, answer.secrets = request.estimated_input, gateway.upstream.secrets
    answer.max_chars, answer.max_items = config.max_answer_chars, config.max_answer_items
    return ClientStream(client, answer, config, reservation, envelope), candidates


async def generate(api: str, gateway: Gateway, client: Client, key: Key | None = None) -> None:
    """One request of an API in CLIENT_APIS, from its body to its end. `key`: used instead of the one in its headers."""
    down, candidates = await read_request(api, gateway, client, key)
    answer, key = down.answer, down.reservation.key
    request, refused = answer.request, None
    unpriced = not key.money_limited or key.allow_unpriced or gateway.config.server.allow_unpriced
    payable = [each for each in candidates
               if unpriced or gateway.prices.schedule(each.provider.name, each.model, request.model)]
    try:
        if api == "messages" and "max_output_tokens" not in request.body:
            raise type_error(None, TEXT, "max_tokens")
        if api == "responses" and request.input[-1]["type"] == "compaction_trigger" and candidates[0].provider.relay != "bytes":
            raise BadRequest(NO_COMPACTION, param="input", code="unsupported_parameter")        # any answer breaks Codex
        if not payable:
            raise price_unknown(key, candidates[0])
        choices = request.get("n", 1) if api == "chat" else 1
        if cap := await down.reservation.reserve([each[:2] for each in payable], request.estimated_input,
                                                 request.get("max_output_tokens", 0) * choices,
                                                 down.server.reserve_output_tokens):
            # as many as the money is enough for
            limit = max(1, cap // choices)
            answer.request = dataclasses.replace(request, body={**request.body, "max_output_tokens": limit})
        await gateway.router.route(payable, down)
    except LimitExceeded as no:
        refused = limit_error(key, no, client.started_s, answer.profile.errors_as_events and request.stream)
        refused.headers += tuple(down.reservation.headers())
    except BadRequest as error:         # not of the router: it raises none
        refused = error
    except LedgerError:                 # nothing was sent
        raise
    except BaseException:               # the client left; the output so far is billed
        down.attempt.finish(GatewayError("The client left.", code="client_gone"), notify_client=False)
        down.attempt.status = "cancelled"
        await asyncio.shield(settle(gateway, down))
        raise
    finally:
        down.stop()
    await finish(gateway, down, refused)


async def finish(gateway: Gateway, down: ClientStream, refused: GatewayError | None) -> None:
    """Settles, then sends the end: the terminal event, the whole answer, or an error's status."""
    answer = down.answer
    if refused is not None:
        down.attempt.unbilled = True
        down.attempt.finish(refused)
    if down.attempt.status == "failed":
        down.attempt.error = client_error(gateway, down)
    error, to_codex = down.attempt.error, answer.profile.errors_as_events
    # an empty answer ends its stream: after a 5xx an SDK would retry, and pay for the input each time
    ended = down.client.status != 0 or down.attempt.stop is not None or error is None
    in_stream = down.streaming and (ended or (to_codex and error is not None and errors_in_stream(error)))
    if error is not None and in_stream:
        CLIENT_APIS[answer.request.api].adapt_error(error)
        if to_codex:
            make_codex_show(error, ("context_length_exceeded",))
    last = b""
    if error is None or in_stream:
        try:
            last = down.attempt.terminal(int(time.time())) if in_stream else down.attempt.body(int(time.time())).encode()
        except Exception as bug:         # noqa: BLE001 - our own bug; one row and one end all the same
            log.error("%s: %s", down.client.request_id, fault_location(bug))
            down.attempt = failed_copy(down.attempt)
            last = down.attempt.terminal(int(time.time())) if in_stream else b""
    if down.attempt.error is not None and not in_stream:
        down.attempt.terminal_by = ""
    if refused is None:
        await settle(gateway, down)
    else:
        await note_refusal(gateway, down.client, refused, down.reservation.key)
    if in_stream:
        await down.send(last, last=True)
    elif down.attempt.error is not None:
        raise down.attempt.error
    else:
        await down.client.answer(200, down.headers(), last)


def check_model_access(key: Key, model: str, profile: ClientProfile) -> None:
    """Refuses a model that the key may not use; for Codex with a 400, whose text it shows."""
    if not key.may_use(model):
        raise BadRequest(f"Key {key.name} may use {', '.join(key.models.split())}.", param="model", code="model_not_allowed",
                         status=400 if profile.errors_as_events else 403)


def price_unknown(key: Key, target: Candidate) -> BadRequest:
    """A key with a limit of money cannot use a model without a price."""
    name = f"{target.provider.name}/{sanitize(target.model)}"
    return BadRequest(f"""Key {key.name} has a limit in US dollars, and {name} has no price.
Put its price per million tokens into pomex.toml:

[{toml_name(("prices", name))}]
input = 0.0
output = 0.0

Or let the key use it without one: python pomex.py keys edit {key.name} --allow-unpriced yes""", param="model",
                      code="price_unknown")


def client_error(gateway: Gateway, down: ClientStream) -> GatewayError:
    """The last target's error; after several tries one error that lists them."""
    error = down.attempt.error or GatewayError("The request failed.")
    client, profile = down.client, down.answer.profile
    failures = client.failures
    if not failures:
        return error
    kinds = {failure.fault for failure in failures}
    if kinds == {"model_not_found"}:
        sentence = f'{client.provider} has no model "{sanitize(client.model)}".'
        return gateway.catalogue.unknown(down.answer.request.model, sentence)
    message, status, code, headers = str(error), error.status, error.code, error.headers
    waits = [wait_s for each in failures if (wait_s := getattr(each.error, "retry_after_s", None)) is not None]
    if len(failures) > 1 and RETRY_POLICIES[failures[-1].fault].failover == "any":
        message = f"{'; '.join(describe_attempts(failures))}. No provider left."
        if len({failure.provider for failure in failures}) > 1 and (len(kinds) > 1 or status >= 500):
            status = status if len(kinds) == 1 else 503
            code = "server_error" if profile.errors_as_events else "upstream_unavailable"
        headers = (("retry-after", str(max(1, math.ceil(min(waits))))),) if waits and kinds != {"quota"} else ()
    if kinds == {"rate_limit"} and waits and profile.errors_as_events:
        message = f"{message} Please try again in {max(1, round(min(waits)))}s."       # Codex takes its delay from the text
    final = profile.final_failures and len(failures) > 1
    headers += (("x-should-retry", "false"),) if kinds == {"quota"} or final else ()
    return GatewayError(message, status=status, type="server_error" if status >= 500 else error.type, code=code,
                        param=error.param, headers=headers)


def make_codex_show(error: GatewayError, shown: Sequence[str]) -> None:
    """Gives a client error a code whose text Codex shows, and after which it does not retry, unless its code is one of those,
    `shown`. The ledger keeps the exact code."""
    if error.status == 400 and error.code not in shown:
        error.ledger_code = error.ledger_code or error.code or ""
        error.code = "model_not_found" if error.param == "model" and "model_not_found" in shown else "invalid_prompt"


def errors_in_stream(error: GatewayError) -> bool:
    """Codex gets an error that it would retry, or whose text it would not show, as a 200 with response.failed; other client
    errors stay a 400, which it does not retry."""
    return error.status == 429 or error.status >= 500 or error.code in ("context_length_exceeded", "price_unknown")


async def settle(gateway: Gateway, down: ClientStream) -> None:
    """Stores the usage row, before the client can see the end; makes the note for the access line."""
    client, attempt, reservation = down.client, down.attempt, down.reservation
    usage, error = attempt.usage or Usage(), attempt.error
    names = {DATED.sub("", name.rpartition("/")[2].lower()) for name in (usage.model, client.model)}
    failures, detail = client.failures[:20], ""
    if failures or client.dropped:
        detail = dumps({"tried": [f"{each.provider}: {each.brief}" for each in failures],
                        "tried_ms": [each.at_ms for each in failures],
                        "dropped": [sanitize(name) for name in client.dropped[:20]]})
    row = reservation.row(
        client.provider, client.model, usage, attempt=client.tries, status=attempt.status,
        result=result_of(attempt.status, attempt.terminal_by, client.attempts), terminal_by=attempt.terminal_by,
        error_code=(error.ledger_code or error.code or "") if error else "",
        error=sanitize(str(error), 500) if error else "", upstream_id=sanitize(client.upstream_id),
        served_model=usage.model if usage.model and len(names) > 1 else "", total_ms=client.elapsed_ms(), detail=detail,
        asked_ms=client.asked_ms, answering_ms=client.answering_ms, first_ms=client.first_ms, attempts=client.attempts)
    for each in client.failures:
        gateway.ledger.notes["error/" + each.provider] = dumps(
            {"time_ms": row.started_ms, "message": sanitize(str(each.error), 500)})
    rows = [*reservation.failed_attempts, row]
    client.note = request_line(reservation.key.name, row, sum(each.cost_nanos for each in rows))
    count_request(gateway.ledger.counters, gateway.known_models, rows)
    await reservation.settle(row)


def request_line(key: str, row: UsageRow, cost_nanos: int) -> str:
    """`laptop openai/gpt-5.3-codex via openai  48.2k in (41.9k cached) 1.1k out  first 0.7s total 9.4s  $0.0412`; the cost is
    that of all attempts together."""
    failed = ""
    before = read_detail(row.detail)["tried"][:row.attempt - 1] if row.detail else ()
    for text, alike in itertools.groupby(before):       # ` anthropic x 529 (2 tries),`
        provider, _, brief = text.partition(": ")
        status, tries = brief.partition(" ")[0], len([*alike])
        failed += f" {provider} x {status if status.isdecimal() else brief}" + f" ({tries} tries)" * (tries > 1) + ","
    cached = f" ({short_count(row.cached)} cached)" if row.cached else ""
    about = "~" if row.estimated else ""
    first = f"first {row.first_ms / 1000:.1f}s " if row.first_ms else ""
    ends = {"completed": "", "incomplete": "  incomplete", "cancelled": "  client left", "failed": f"  failed: {row.error}"}
    cost = "  no price" if row.input + row.output else ""
    if row.price:
        cost = f"  ${format_usd(cost_nanos, 4)}"
    return (f"{key} {sanitize(row.model)} via{failed} {row.provider or 'nobody'}  "
            f"{about}{short_count(row.input)} in{cached} {short_count(row.output)} out  "
            f"{first}total {row.total_ms / 1000:.1f}s{ends[row.status]}{cost}")


async def note_refusal(gateway: Gateway, client: Client, error: GatewayError, key: Key | None = None) -> None:
    """Counts a request that was refused before any provider was asked: it has no usage row."""
    head = client.head
    if client.note or (key is None and head.path.startswith("/admin")):
        return
    if key is None:
        with contextlib.suppress(GatewayError):
            key = await gateway.ledger.authorise(authorization(head.headers), client.started_s)
    method, path, name, number = sanitize(head.method), sanitize(head.path), key.name if key else "", key.id if key else 0
    client.note = f"{name or '- '} {method} {path}  {sanitize(str(error), 400)}"
    gateway.ledger.refuse(number, {
        "time_ms": int(client.started_s * 1000), "method": method, "path": path, "status": error.status,
        "code": error.ledger_code or error.code, "message": str(error)[:500], "key": name, "key_id": number,
        "user_agent": header_value(head.headers.get("user-agent"), 100), "request_id": client.request_id})


def short_count(count: int) -> str:
    if count < 1000:
        return str(count)
    return f"{count / 1000:.1f}k" if count < 1_000_000 else f"{count / 1_000_000:.1f}M"


async def count_tokens(gateway: Gateway, client: Client) -> None:
    """The size of a Messages request: the provider's own count, or an estimate, which a header admits."""
    down, (target, *_) = await read_request("messages", gateway, client)
    reservation, counted = down.reservation, 0
    try:
        await reservation.reserve([target[:2]], 0, 0, 0)        # it costs nothing, and counts as a request
        if target.provider.wire_api == "messages":
            call, router = encode_call(target, down), gateway.router
            async with asyncio.timeout(COUNT_S):
                exchange = await router.upstream.exchange(
                    target.provider, "POST", f"{call.path}/count_tokens", router.headers(target, call, client), call.body)
                told = await exchange.read_all(MAX_ANSWER_JSON_BYTES)
                await exchange.close()
            counted = count(provider_json(told), "input_tokens")
    except LimitExceeded as no:
        raise limit_error(reservation.key, no, client.started_s, to_codex=False) from None
    except (UpstreamError, TimeoutError):       # an estimate will do
        pass
    finally:
        down.stop()
        gateway.ledger.abandon(reservation.response_id)
    own = [] if counted else [("x-pomex-estimated", "true")]
    body = dumps({"input_tokens": counted or down.answer.estimated_input}).encode()
    await client.answer(200, [*JSON_HEADERS, *own, *reservation.headers()], body)


# --- 11.2 models ---

NEW_CODEX = 169                         # reads every effort, and the error object of a 400; 0.128 does neither
DEFAULT_CONTEXT_WINDOW = 128_000        # of a model that nothing is known of: most have at least this
CODEX_EFFORTS = "low medium high xhigh max ultra".split()
CODEX_TIERS = [{"id": "priority", "name": "Fast", "description": "Faster, at a higher price"},
               {"id": "flex", "name": "Flex", "description": "Slower, at a lower price"}]


def model_object(gateway: Gateway, name: str) -> JSON:
    """In the forms of OpenAI and Anthropic at once: clients ignore what they do not know."""
    created = datetime.datetime.fromtimestamp(gateway.started_s, datetime.UTC)
    return {"id": name, "object": "model", "created": gateway.started_s, "owned_by": name.partition("/")[0],
            "type": "model", "display_name": name, "created_at": f"{created:%Y-%m-%dT%H:%M:%SZ}"}


def codex_release(text: str) -> int:
    """128 of codex_exec/0.128.0 and of client_version=0.128.0; 0 where none is named."""
    found = re.search(r"\b0\.(\d{1,6})\.", text)
    return int(found[1]) if found else 0


def codex_entry(gateway: Gateway, name: str, priority: int, release: int) -> JSON:
    """An entry of Codex's model catalogue: the fields that every version requires, and those of known models."""
    configured = gateway.config.models.get(name, ModelConfig(name))
    known = codex_fields(name, CODEX_TABLE)
    window = gateway.catalogue.facts(name).context_window or DEFAULT_CONTEXT_WINDOW
    windows = {"context_window": window, "max_context_window": window}
    provider = gateway.config.providers.get(gateway.catalogue.first_target(name)[0])
    carried = provider is not None and provider.wire_api == "responses"
    entry = {
        "slug": name, "display_name": name, "description": configured.description,
        "visibility": "list", "supported_in_api": True, "priority": priority, "shell_type": "shell_command",
        "base_instructions": BASE_INSTRUCTIONS, "support_verbosity": carried, "service_tiers": CODEX_TIERS if carried else [],
        "truncation_policy": {"mode": "tokens", "limit": 10000}, "experimental_supported_tools": [],
        "supports_reasoning_summaries": True, "supports_parallel_tool_calls": True,
        "supports_search_tool": bool(known),        # of other models it would hide MCP and agent tools behind a search
        "supported_reasoning_levels": EFFORTS, "default_reasoning_level": "medium",
        "default_reasoning_summary": "none" if known else "auto",
        "apply_patch_tool_type": "freeform", "web_search_tool_type": "text", "input_modalities": ["text", "image"],
        **windows, **(known or codex_fields(name, CODEX_OLD_TABLE)), **(windows if configured.context_window else {})}
    entry["supported_reasoning_levels"] = [
        {"effort": effort, "description": ""} for effort in entry["supported_reasoning_levels"]
        if release >= NEW_CODEX or effort not in ("max", "ultra")]       # 0.128 rejects a list with these
    return entry


def codex_fields(model: str, table: str) -> JSON:
    """The catalogue fields that Codex itself knows for a model: of the first name in the table that starts the model's."""
    bare = model.rpartition("/")[2]
    for line in table.splitlines():
        name, visibility, effort, verbosity, highest, window, max_window, *more = line.split()
        if bare.startswith(name):
            agents, subagent_effort, *tools = [None if word == "-" else word for word in more]
            return {
                "visibility": visibility, "support_verbosity": True, "default_verbosity": verbosity,
                "default_reasoning_level": effort,
                "supported_reasoning_levels": CODEX_EFFORTS[:CODEX_EFFORTS.index(highest) + 1],
                "context_window": int(window), "max_context_window": int(max_window), "service_tiers": CODEX_TIERS,
                "experimental_supported_tools": tools, "web_search_tool_type": "text_and_image",
                "supports_image_detail_original": True,
                "use_responses_lite": bool(agents), "tool_mode": "code_mode_only" if agents else None,
                "multi_agent_version": agents, "multi_agent_reasoning_effort": subagent_effort,
                "supports_reasoning_effort_updates": bool(subagent_effort)}
    return {}


async def answer_tagged(client: Client, headers: HeaderFields, body: bytes) -> None:
    """Answers with a tag of the body, without the body where the client has it already."""
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    has_it = tag in client.head.headers.get("if-none-match")
    await client.answer(304 if has_it else 200, [*headers, ("etag", tag)], b"" if has_it else body)


async def models(gateway: Gateway, client: Client) -> None:
    """OpenAI's list, Anthropic's and Codex's in one body. Never waits for an upstream: Codex allows five seconds."""
    names = model_names(gateway, await gateway.key(client))
    release = codex_release(client.head.query)
    first, last = (names[0], names[-1]) if names else (None, None)
    body = {"object": "list", "data": [model_object(gateway, name) for name in names],
            "has_more": False, "first_id": first, "last_id": last,
            "models": [codex_entry(gateway, name, index, release) for index, name in enumerate(names)]}
    await answer_tagged(client, JSON_HEADERS, dumps(body).encode())


def model_names(gateway: Gateway, key: Key | None) -> list[str]:
    return [name for name in gateway.catalogue.names if key is None or key.may_use(name)]


async def model(gateway: Gateway, client: Client) -> JSON:
    """One model, listed or not: whether this key may ask for it."""
    key = await gateway.key(client)
    name = urllib.parse.unquote(client.head.path.removeprefix("/v1/models/"))
    try:
        name = gateway.catalogue.full_name(name)
        gateway.catalogue.tiers(name)
    except BadRequest as error:
        error.status = 404
        raise
    check_model_access(key, name, STANDARD)
    return model_object(gateway, name)


# --- 11.3 health ---

async def health(gateway: Gateway, client: Client) -> JSON:
    """The process answers. No key, no database, no provider."""
    return {"status": "ok", "version": VERSION}


async def root(gateway: Gateway, client: Client) -> JSON | None:
    """A browser is sent to the dashboard; to others (Claude Code asks before it begins) the process answers."""
    if "text/html" not in client.head.headers.get("accept"):
        return await health(gateway, client)
    await client.answer(303, [("location", "/admin")], b"")
    return None


async def ready(gateway: Gateway, client: Client) -> None:
    """Whether requests should be sent here: one word a check, since no key is needed."""
    if gateway.ledger.available():
        await gateway.ledger.refresh()
    checks = {"ledger": gateway.ledger.available(), "providers": bool(gateway.config.providers),
              "accepting": not client.connection.server.draining}
    words = {name: "ok" if ok else "failed" for name, ok in checks.items()}
    words["targets"] = "degraded" if gateway.router.health.degraded(time.monotonic()) else "ok"     # others may be left
    status, word = (200, "ready") if all(checks.values()) else (503, "not ready")
    await client.answer(status, JSON_HEADERS, dumps({"status": word, "checks": words}).encode())


# --- 11.4 key limits, metrics, the page ---

async def key_facts(gateway: Gateway, client: Client) -> JSON:
    """The key's own limits, in OpenRouter's form (amounts in USD)."""
    key = await gateway.key(client)
    start, end = period_bounds(key.period, client.started_s)
    spent = (await spent_nanos(gateway.ledger.db, "key_id", start, where=key_condition(key.id))).get(key.id, 0)
    limit = key.budget_nanos
    data = {
        "label": key.name, "account": key.account, "models": key.models.split(), "expires_at": key.expires_s or None,
        "usage": spent / 10**9, "limit": None, "limit_remaining": None, "limit_period": key.period, "limit_reset": None,
        "rate_limit": {"requests_per_minute": key.rpm or None, "tokens_per_minute": key.tpm or None,
                       "concurrent_requests": key.concurrent or None}}
    if limit is not None:
        data.update(limit=limit / 10**9, limit_remaining=max(limit - spent, 0) / 10**9,
                    limit_reset=f"{day_text(end)}T00:00:00Z" if end else None)
    return {"data": data}


PROXY_HEADER = re.compile("forwarded|x-forwarded-.*|x-real-ip|via")


async def metrics(gateway: Gateway, client: Client) -> None:
    """For local clients, unless a proxy could make others look local; else for the administrator."""
    server = gateway.config.server
    proxied = server.public_hosts or any(map(PROXY_HEADER.fullmatch, dict(client.head.headers)))
    if not proxied and is_loopback(client.connection.peer):
        client.connection.server.check_host(client.head, dashboard=True)
    elif (await authenticate(gateway, client))[0] is not None:
        raise Forbidden("An API key does not open this: send [server] admin_token.", code="admin_only")
    samples = {**await gateway.ledger.counted(), **gateway.router.metrics(time.monotonic()),
               ("pomex_build_info", VERSION): 1, ("pomex_streams_open",): len(await open_requests(gateway.ledger.db, 0)),
               ("process_start_time_seconds",): gateway.started_s,
               ("process_cpu_seconds_total",): round(time.process_time(), 3)}
    text = metrics_text(samples, [str(os.getpid())] if server.workers > 1 else [])
    await client.answer(200, [("content-type", "text/plain; version=0.0.4; charset=utf-8")], text.encode())


async def show_page(gateway: Gateway, client: Client) -> None:
    client.connection.server.check_host(client.head, dashboard=True)
    await answer_tagged(client, *page_answer("gzip" in client.head.headers.get("accept-encoding")))


HEALTH_PATHS = ("/health", "/healthz", "/livez")        # answered also where there is no room for another connection


# --- 11.5 usage log and sums ---
#
# `key_id` narrows each answer to one key, for its holder; 0 is every key.

FILTERS: dict[str, str] = {         # of the usage log: query parameter -> condition
    "from": "started_ms >= ?",
    "to": "started_ms < ?",
    "key": "key_id IN (SELECT id FROM keys WHERE name = ?)",
    "account": "account_id IN (SELECT id FROM accounts WHERE name = ?)",
    "model": "model = ?",
    "provider": "provider = ?",
    "endpoint": "endpoint = ?",
    "result": "result = ?",
    "min_cost": "cost_nanos >= ?",
    "session": "session = ?",
    "client": "lower(client) LIKE lower(?) ESCAPE '!'",
    "text": "lower(response_id || ' ' || request_id || ' ' || error_code || ' ' || error) LIKE lower(?) ESCAPE '!'",
}
DIGITS = Field(pattern="[0-9]{1,18}", read=int, wanted="a whole number")
SUBSTRING = Field(read=lambda text: "%" + re.sub("[!%_]", r"!\g<0>", str(to_storable(text))) + "%")
STORABLE = Field(read=to_storable)
FILTER_VALUES = {"from": DIGITS, "to": DIGITS, "min_cost": DIGITS, "result": Field(choices=RESULTS), "client": SUBSTRING,
                 "text": SUBSTRING}         # of the others: STORABLE
ROW_FILTERS = ("min_cost", "session", "client", "text")     # columns that rollups do not have
LOST_NANOS = ("(SELECT coalesce(sum(lost.cost_nanos), 0) FROM usage AS lost WHERE lost.response_id = usage.response_id "
              "AND lost.final = 0)")
ROW_COLUMNS = ("id", "key", "account", "lost_nanos", *USAGE_COLUMNS)
SELECT_ROWS = f"SELECT id, {KEY_NAME_OF}, {ACCOUNT_NAME_OF}, {LOST_NANOS}, {', '.join(USAGE_COLUMNS)} FROM usage WHERE "
PLAY_KEY = "playground"             # the dashboard's own, to which nobody holds the secret
LATENCY_ROWS = 5000             # of the newest rows: enough for their p95


async def latencies(db: Database, since_ms: int, key_id: int) -> list[Row]:
    """(provider, ms to the first output, ms to the end) of answered requests."""
    newest = f"SELECT * FROM usage WHERE {key_condition(key_id)} ORDER BY id DESC LIMIT {LATENCY_ROWS}"
    return await db.read(f"SELECT provider, first_ms, total_ms FROM ({newest}) AS newest WHERE started_ms >= ? "
                         "AND status IN ('completed', 'incomplete')", since_ms)


def latency_percentiles(rows: Sequence[Row]) -> JSON:
    """p50 and p95 of rows of latencies(); 0 of none."""
    def percentiles(column: int) -> list[int]:
        values = sorted(row[column] for row in rows if row[column]) or [0]
        return [values[len(values) * part // 100] for part in (50, 95)]
    return {"first_ms": percentiles(1), "total_ms": percentiles(2)}


DIMENSIONS = {"model": "model", "key": KEY_NAME_OF, "endpoint": "endpoint", "result": "result"}


async def overview(db: Database, since_ms: int, step_ms: int, slots: int, now_s: float, key_id: int) -> JSON:
    """The sums of a time of `slots` steps, each of whole half hours, and of the month."""
    since_ms -= since_ms % HALF_HOUR_MS
    until_ms, now_ms = since_ms + step_ms * slots, int(now_s * 1000)
    mine = key_condition(key_id)
    found = await usage_sums(db, [*DIMENSIONS.values()], since_ms, until_ms, mine)
    series: dict[str, JSON] = collections.defaultdict(
        lambda: {name: [0] * slots for name in ("cost_nanos", "requests", "tokens")})
    slot_and_provider = [f"(started_ms - {since_ms}) / {step_ms}", "provider"]
    for (slot, provider), sums in await usage_sums(db, slot_and_provider, since_ms, until_ms, mine):
        sums["tokens"] = sums["input"] + sums["output"]
        for name, values in series[provider].items():
            values[slot] = sums[name]
    before_ms = 2 * since_ms - until_ms         # as much of the time before as has passed of this one
    passed_ms = (min(now_ms, until_ms) - since_ms) // HALF_HOUR_MS * HALF_HOUR_MS
    (_, before), = await usage_sums(db, (), before_ms, before_ms + passed_ms, mine)
    first_day, next_day = period_bounds("month", now_s)
    return {
        "since_ms": since_ms, "step_ms": step_ms, "now_ms": now_ms, "before_nanos": before["cost_nanos"],
        "totals": {name: sum(sums[name] for _, sums in found) for name in SUMS},
        "month": {"spent_nanos": sum((await spent_nanos(db, "key_id", first_day, where=mine)).values()), "first_day": first_day,
                  "next_day": next_day, "budget_nanos": 0 if key_id else await month_budget(db, now_s)},
        **latency_percentiles(await latencies(db, since_ms, key_id)),
        "series": [{"name": name, **line} for name, line in series.items()],
        "by": {dimension: sum_by(found, place) for place, dimension in enumerate(DIMENSIONS)}}


def sum_by(found: Iterable[tuple[Row, JSON]], place: int) -> list[JSON]:
    """The sums by one column of their groups, the most expensive first."""
    sums: dict[Any, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for group, each in found:
        sums[group[place]].update(each)
    rows = [{"name": name, **each} for name, each in sums.items()]
    return sorted(rows, key=lambda row: (-row["cost_nanos"], -row["requests"]))


def usage_where(filters: Mapping[str, str], key_id: int) -> tuple[str, list[Any], str]:
    """The condition of a filtered usage log, its values, and the table that has its sums."""
    where = [key_condition(key_id)]
    values: list[Any] = []
    table = "usage_rollups"
    for name, text in filters.items():
        if name in ("cursor", "limit") or not text:
            continue
        if name not in FILTERS:
            raise BadRequest(f"The usage log has no filter {name[:40]!r}. It has {', '.join(FILTERS)}.", param=name[:40])
        value = check(text, FILTER_VALUES.get(name, STORABLE), name)
        if name in ROW_FILTERS or name in ("from", "to") and value % HALF_HOUR_MS:
            table = "usage"
        where.append(FILTERS[name])
        values.append(value)
    return " AND ".join(where), values, table


async def usage_rows(db: Database, where: str, values: Sequence[Any], limit: int) -> list[JSON]:
    """Requests by a condition, newest first."""
    rows = await db.read(f"{SELECT_ROWS}final = 1 AND {where} ORDER BY id DESC LIMIT ?", *values, limit)
    return [dict(zip(ROW_COLUMNS, row)) for row in rows]


async def one_request(db: Database, response_id: str, key_id: int) -> list[JSON]:
    """All rows that are billed for it, its own last."""
    rows = await db.read(f"{SELECT_ROWS}response_id = ? AND {key_condition(key_id)} ORDER BY attempt", response_id)
    if not rows:
        raise NotFound("There is no such request here: perhaps its row was pruned.")
    return [dict(zip(ROW_COLUMNS, row)) for row in rows]


async def key_rows(ledger: Ledger, now_s: float) -> list[JSON]:
    """Every key with what it has spent in its period and this month; revoked ones last, else newest first."""
    keys = sorted(ledger.keys.values(), key=lambda key: (key.revoked_s > 0, -key.id))
    spent = {period: await spent_nanos(ledger.db, "key_id", period_bounds(period, now_s)[0])
             for period in {"month", *(key.period for key in keys)}}
    last: dict[int, int] = dict(await ledger.db.read("SELECT key_id, max(last_ms) FROM usage_rollups GROUP BY key_id"))
    return [{**{name: getattr(key, name) for name in Key.__slots__ if name != "digest"},
             "spent_nanos": spent[key.period].get(key.id, 0), "month_nanos": spent["month"].get(key.id, 0),
             "last_ms": last.get(key.id, 0)} for key in keys]


async def month_budget(db: Database, now_s: float) -> int:
    """What may be spent this month: by the accounts' limits, else by the keys' monthly budgets; 0 where one has none."""
    accounts = await db.read("SELECT limit_nanos FROM accounts WHERE id IN (SELECT account_id FROM keys)")
    keys = await db.read("SELECT CASE period WHEN 'month' THEN budget_nanos END FROM keys WHERE revoked_s = 0 "
                         "AND name <> ? AND (expires_s = 0 OR expires_s > ?)", PLAY_KEY, int(now_s))
    return next((sum(nanos for nanos, in rows) for rows in (accounts, keys) if rows and (None,) not in rows), 0)


def csv_line(cells: Iterable[object]) -> str:
    """One line of CSV. An apostrophe before what a spreadsheet would take for a formula, also after a semicolon, where many
    countries' spreadsheets split cells."""
    texts = (re.sub(r'(^|;"*)(?=[=+@-])', r"\1'", cell) if isinstance(cell, str) else str(cell) for cell in cells)
    return ",".join('"' + text.replace('"', '""') + '"' if set(text) & set(',"\r\n') else text for text in texts)


# --- 11.6 live state and events ---

FEEDS_A_KEY = 20                # and for the administrator; each open page has one
POLL_S = 1.0
FEED_HEARTBEAT_S = 15.0         # proxies cut a silent stream at 60 s
EVENTS_AT_ONCE = 100            # usage rows of one poll; the log has the older ones
REFUSALS_SHOWN = 50
NEWEST_IDS = "SELECT " + ", ".join(f"(SELECT coalesce(max(id), 0) FROM {table})" for table in ("usage", "refusals", "audit"))
OPEN_COLUMNS = ("response_id", "started_ms", "key_id", "model", "provider", "status", "session", "client")


async def live_news(db: Database, seen: Sequence[int], known: Sequence[int], running: Collection[str], key_id: int
                    ) -> tuple[Row, Row, Collection[str], bytes]:
    """What any process has written since a watcher's last look: what it has `seen` now, what is there, what is `running`, and
    the events since as SSE. Another machine's row may come after one with a higher id: the newest wait for the next look."""
    there, = await db.read(NEWEST_IDS)
    newest = there if db.on_this_host else tuple(map(min, there, known))
    in_flight = await open_requests(db, key_id)
    mine = key_condition(key_id)
    usage, refusals, changes = zip(seen, newest)
    rows = await usage_rows(db, f"id > ? AND id <= ? AND {mine}", usage, EVENTS_AT_ONCE)
    refused = await db.read(f"SELECT data FROM refusals WHERE id > ? AND id <= ? AND {mine} ORDER BY id", *refusals)
    events = [*(("started", item) for item in in_flight if item["response_id"] not in running),
              *(("usage", row_view(row)) for row in reversed(rows)),
              *(("refused", json.loads(data)) for data, in refused)]
    if not key_id:
        changed = await db.read("SELECT action, name FROM audit WHERE id > ? AND id <= ? ORDER BY id", *changes)
        events += [("provider" if action.startswith("provider") else "key", {"name": name}) for action, name in changed]
    # a browser that reconnects sends the id as last-event-id
    frames = [(b"id: %d\n" % data["id"] if kind == "usage" else b"") + sse_frame(kind, dumps(data)) for kind, data in events]
    return newest, there, [item["response_id"] for item in in_flight], b"".join(frames)


async def open_requests(db: Database, key_id: int) -> list[JSON]:
    """The requests in flight in all processes, oldest first."""
    rows = await db.read(f"SELECT {', '.join(OPEN_COLUMNS)}, {KEY_NAME_OF} FROM open_requests "
                         f"WHERE {key_condition(key_id)} ORDER BY response_id")
    return [dict(zip((*OPEN_COLUMNS, "key"), row)) for row in rows]


def read_detail(detail: str) -> JSON:
    return {"tried": [], "tried_ms": [], "dropped": [], **json.loads(detail or "{}")}


def row_view(row: JSON) -> JSON:
    """A request for the page: with the cost of all its attempts, and the providers that failed."""
    tried = dict.fromkeys(text.partition(":")[0] for text in read_detail(row["detail"])["tried"])
    return {**row, "cost_nanos": row["cost_nanos"] + row["lost_nanos"], "tried": [*tried]}


CODING_MODELS = {       # for the block that is printed, beside those that Codex knows; a client may ask for any other
    "anthropic": ("claude-sonnet-5-5",), "google": ("gemini-pro-latest",), "openrouter": ("openai/gpt-5.5",),
    "xai": ("grok-build-latest",), "deepseek": ("deepseek-v4-pro",), "mistral": ("devstral-latest",),
    "groq": ("openai/gpt-oss-120b",),
}


def best_model(catalogue: ModelCatalog, key: Key | None = None) -> str:
    """The model to begin with: the first configured, else the best of the first provider that is ready."""
    best = {"openai": [row.split()[0] for row in (CODEX_TABLE + CODEX_OLD_TABLE).splitlines()], **CODING_MODELS}
    coding = [f"{name}/{model}" for name in catalogue.config.providers for model in best.get(name, ())]
    known = sorted(catalogue.names, key=lambda name: name.startswith("demo/"))
    for name in (*catalogue.config.models, *coding, *known):
        with contextlib.suppress(BadRequest):       # its provider may serve other models only
            if catalogue.tiers(name) and (key is None or key.may_use(name)):
                return name
    return "PROVIDER/NAME"


class Agent(NamedTuple):
    """A coding agent and its settings, for a gateway at {URL} and a {MODEL}: in a file, else lines for a shell."""
    name: str
    settings: str
    variable: str = ""          # moves `home`
    home: str = ""
    file: str = ""


CODEX_AGENT = Agent("codex", """\
model_provider = "pomex"
model = "{MODEL}"

[model_providers.pomex]
name = "Pomex API"
base_url = "{URL}/v1"
env_key = "POMEX_API_KEY"    # another key later: codex app-server daemon restart
wire_api = "responses"
model_catalog_url = "{URL}/v1/models\"""", "CODEX_HOME", "~/.codex", "config.toml")      # "OpenAI" would be a special name
AGENTS = {each.name: each for each in (
    CODEX_AGENT,
    Agent("claude-code", """\
{"apiKeyHelper":"printenv POMEX_API_KEY","env":{"ANTHROPIC_BASE_URL":"{URL}","ANTHROPIC_MODEL":"{MODEL}",
"ANTHROPIC_DEFAULT_OPUS_MODEL":"{MODEL}","ANTHROPIC_DEFAULT_SONNET_MODEL":"{MODEL}",
"ANTHROPIC_DEFAULT_HAIKU_MODEL":"{MODEL}"}}""", "CLAUDE_CONFIG_DIR", "~/.claude", "settings.json"),
    Agent("opencode", """\
{"model":"pomex/{MODEL}","small_model":"pomex/{MODEL}","provider":{"pomex":{"npm":"@ai-sdk/openai-compatible",
"options":{"baseURL":"{URL}/v1","apiKey":"{env:POMEX_API_KEY}"},"models":{"{MODEL}":{}}}}}""",
          "XDG_CONFIG_HOME", "~/.config", "opencode/opencode.json"),
    Agent("qwen-code", """\
{"security":{"auth":{"selectedType":"openai","baseUrl":"{URL}/v1","apiKey":"$POMEX_API_KEY"}},
"model":{"name":"{MODEL}"}}""", "QWEN_HOME", "~/.qwen", "settings.json"),
    Agent("aider", """\
export AIDER_OPENAI_API_BASE="{URL}/v1"
export AIDER_OPENAI_API_KEY="$POMEX_API_KEY"
export AIDER_MODEL=openai/{MODEL}"""),
    Agent("cline", 'cline auth openai-compatible -b "{URL}/v1" -k "$POMEX_API_KEY" -m {MODEL}'),
    Agent("continue", """\
{"name":"Pomex","version":"1.0.0","schema":"v1","models":[{"name":"Pomex","provider":"openai","model":"{MODEL}",
"apiBase":"{URL}/v1","apiKey":"${{ secrets.POMEX_API_KEY }}","roles":["chat","edit","apply"]}]}""",
          "CONTINUE_GLOBAL_DIR", "~/.continue", "config.yaml"))}       # YAML includes JSON


def agent_settings(agent: Agent, url: str, model: str) -> str:
    """Ready to paste. Codex 0.128 passes over model_catalog_url. Newer ones take all they know of models from it, so it is
    left out for a model of which they know more than we do."""
    text = agent.settings
    if text.startswith("{"):
        text = dump_json(json.loads(text))
    elif agent is CODEX_AGENT and model.count("/") < 2 and codex_fields(model, CODEX_TABLE):    # it takes one prefix off
        text = text.rpartition("\n")[0]
    fit = dumps(model)[1:-1] if agent.file else shlex.quote(model)
    return text.replace("{URL}", url).replace("{MODEL}", fit)


def dump_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


# --- 11.7 access to the dashboard and the admin API ---

LOGIN_FAILURES, LOGIN_WINDOW_S = 5, 60.0
ADDRESSES_KEPT = 1000
MAX_FORM_BYTES = 1 << 16        # of a login or a form: it is read before it is known who sent it
PAGE_HEADERS = [("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer"), ("x-frame-options", "DENY"),
                ("cross-origin-opener-policy", "same-origin")]
NOT_LOGGED_IN = "Log in first: python pomex.py admin-url prints a link."
BAD_LOGIN = ("Invalid or expired login: a link works once and for ten minutes. Print a new one with: python pomex.py "
             "admin-url. Or use [server] admin_token, or an API key to see its own usage.")
ADMIN_ONLY = ("An API key opens the view of its holder only. This needs the admin login: python pomex.py admin-url, or "
              "[server] admin_token.")
SESSION_S = 12 * 3600           # a working day
LOGIN_LINK_S = 600


class Forbidden(BadRequest):
    status, code = 403, "forbidden"


class NotFound(BadRequest):
    status, code = 404, "not_found"


# Sessions are in the database, since any process may be asked. Only digests are stored.

async def open_session(db: Database, kind: str, key_id: int, life_s: int, now_s: float) -> str:
    """A new secret of the kind "link" (one login), "admin" or "key"."""
    token = secrets.token_urlsafe(18)

    def run(tx: Transaction) -> None:
        tx.execute("DELETE FROM sessions WHERE expires_s <= ?", (int(now_s),))
        tx.execute("INSERT INTO sessions (digest, kind, key_id, expires_s) VALUES (?, ?, ?, ?)",
                   (key_digest(token), kind, key_id, int(now_s) + life_s))
    await db.write(run)
    return token


async def use_login_link(db: Database, token: str, now_s: float) -> bool:
    """Whether the link was valid; now it is used up. A wrong guess writes nothing."""
    found = "FROM sessions WHERE digest = ? AND kind = 'link' AND expires_s > ?"
    values = (key_digest(token), int(now_s))
    if not await db.read(f"SELECT 1 {found}", *values):
        return False
    return await db.write(lambda tx: tx.execute(f"DELETE {found}", values)) == 1


@dataclass(slots=True)
class AdminRequest:
    """A request to the admin API."""
    client: Client
    query: dict[str, str]
    name: str                           # what stands in the path for a *
    key: Key | None = None              # of the holder who asks; None: the administrator
    who: str = ""                       # the administrator, for the audit log

    @property
    def key_id(self) -> int:
        return self.key.id if self.key else 0

    def number(self, name: str, default: int, maximum: int) -> int:
        value: int = check(self.query.get(name) or str(default), DIGITS, name)
        if value > maximum:
            raise invalid_param(name, f" must be at most {maximum}.")
        return value

    async def read_body(self, arguments: Sequence[Argument]) -> JSON:
        return read_fields(await self.client.body(MAX_FORM_BYTES), arguments)


def check_origin(gateway: Gateway, headers: Headers) -> None:
    """A change comes from our own page, or from a machine that sends its token with it."""
    if not headers.get("content-type").lower().startswith("application/json"):
        raise BadRequest("Changes are sent as content-type: application/json.", status=415, code="unsupported_media_type")
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    ours = origin.partition("://")[2] in (headers.get("host"), *gateway.config.server.public_hosts)
    if origin and not ours or site not in ("", "same-origin") or not (origin or site or headers.get("authorization")):
        raise Forbidden("Changes are taken from the dashboard's own page (its Origin), or with an Authorization header.",
                        code="cross_origin")


def session_cookie(client: Client) -> tuple[str, str]:
    """Its name, which holds the port since browsers share cookies between the ports of a host, and its value."""
    name = f"pomex_{client.connection.server.address[1]}"
    found = re.search(rf"(?:^|[; ]){name}=([^;\s]*)", client.head.headers.get("cookie"))
    return name, found[1] if found else ""


async def authenticate(gateway: Gateway, client: Client) -> tuple[Key | None, str]:
    """(the key whose holder asks, ""), or (None, the administrator for the audit log)."""
    header = client.head.headers.get("authorization")
    now_s = gateway.ledger.now_s()         # of a live feed the start is long ago
    if header:
        key = await check_token(gateway, client, header[7:].strip(" \t"), link=False)
        return key, "" if key else f"admin_token from {client.peer}"
    sessions = await gateway.ledger.db.read("SELECT kind, key_id, id FROM sessions WHERE digest = ? AND kind <> 'link' "
                                            "AND expires_s > ?", key_digest(session_cookie(client)[1]), int(now_s))
    if not sessions:
        raise Unauthorized(NOT_LOGGED_IN, code="not_logged_in")
    kind, key_id, session = sessions[0]
    if kind == "admin":
        return None, f"session {session} from {client.peer}"
    key = gateway.ledger.keys.get(key_id)
    if key is None or key.state(now_s) != "active":
        raise Unauthorized("The key of this session was revoked or has expired.", code="not_logged_in")
    return key, ""


async def check_token(gateway: Gateway, client: Client, token: str, link: bool = True) -> Key | None:
    """The API key that a token is; None if it is the administrator's, or that of a login `link`."""
    now_s, digest, failures = gateway.ledger.now_s(), key_digest(token), gateway.login_failures
    if any(hmac.compare_digest(digest, key_digest(each)) for each in gateway.config.server.admin_token) \
            or link and await use_login_link(gateway.ledger.db, token, now_s):
        return None
    try:
        if not token.startswith(KEY_PREFIX):
            raise Unauthorized(BAD_LOGIN, code="bad_login")
        return await gateway.ledger.authorise("Bearer " + token, now_s)
    except Unauthorized:        # only wrong logins wait: others at the same address must not be locked out
        failed = [each_s for each_s in failures.pop(client.peer, []) if each_s > now_s - LOGIN_WINDOW_S]
        failures[client.peer] = [*failed, now_s][:LOGIN_FAILURES]
        if len(failures) > ADDRESSES_KEPT:
            del failures[next(iter(failures))]
        if len(failed) < LOGIN_FAILURES:
            raise
        wait_s = math.ceil(LOGIN_WINDOW_S - (now_s - failed[0]))
        raise BadRequest(f"Too many failed logins from this address. Try again in {wait_s} s.", status=429,
                         code="too_many_logins", headers=(("retry-after", str(wait_s)),)) from None


# --- 11.8 operations: what the command line and the admin API both do ---

class Argument(NamedTuple):
    """A member of an admin body, or an argument of a command."""
    name: str
    field: Field = TEXT                     # without `read`: text on one line
    metavar: str | None = None
    empty: str = ""                         # the value that an empty text in a body stands for
    required: bool = False                  # in a command an argument without --; in a body empty where it is missing
    more: Mapping[str, Any] = {}            # for argparse


def parse_usd(text: str, minimum: int = 0) -> int:
    return parse_decimal(text.removeprefix("$"), 10**9, minimum)


def parse_limit(text: str) -> int | None:
    return None if text == "none" else parse_usd(text)


def parse_budget(text: str) -> JSON:
    amount, _, period = text.partition("/")
    if text != "none" and period not in PERIODS:
        raise ValueError
    return {"budget_nanos": parse_limit(amount), "period": period or "month"}


def parse_day(text: str) -> int:
    """7d: the first of the last seven days (since 1970, UTC); or the day of a date."""
    if found := re.fullmatch(r"([0-9]{1,5})d", text):
        return int(time.time()) // 86400 - int(found[1]) + 1
    return day_of(text)


def parse_expiry(text: str) -> dict[str, int]:
    if text in ("never", "0"):
        return {"expires_s": 0}
    found, now_s = re.fullmatch(r"([0-9]{1,5})d?", text), int(time.time())
    end_s = now_s + int(found[1]) * 86400 if found else parse_day(text) * 86400
    if end_s <= now_s:
        raise ValueError
    return {"expires_s": end_s}


TRUTH = {"": False, "0": False, "False": False, "no": False, "1": True, "True": True, "yes": True}.__getitem__
BOOLEAN = Field(read=TRUTH, wanted="true or false")
COUNT = Field(pattern="[0-9]{1,9}", read=int, wanted="a whole number of at most nine digits")
USD = Field(read=parse_limit, wanted="an amount like 50 or 12.50")
NAME_FIELD = Argument("name", metavar="NAME", required=True)
EXPIRY = Field(read=parse_expiry, wanted="a time to come, like 30d or 2027-01-31, or never", meaning="when it expires; never")
KEY_FIELDS = (
    Argument("budget", metavar="USD/PERIOD", field=Field(
        read=parse_budget, wanted="like 50/month (day, week, month, total), or none",
        meaning="spending limit in USD per day, week, month or in total, e.g. 50/month; none")),
    Argument("models", empty="all", field=Field(
        read=model_patterns, wanted="patterns like openai/*,demo/echo, or all",
        meaning="models it may use, e.g. 'openai/*,anthropic/*'; all")),
    *(Argument(name, COUNT._replace(meaning=f"{meaning}; 0 = unlimited"), "N", "0") for name, meaning in (
        ("rpm", "requests per minute"), ("tpm", "tokens per minute"), ("concurrent", "requests open at once"))),
    Argument("allow_unpriced", BOOLEAN._replace(meaning="may it use models without a price in spite of its budget"), "yes|no"),
    Argument("expires", EXPIRY, "30d|DATE", "never"),
    Argument("account", Field(meaning="the account that pays"), "NAME"))
KEY_BODY_FIELDS = (         # of the admin API beside those, or in place of the same name
    Argument("budget", USD._replace(read=lambda text: {"budget_nanos": parse_limit(text)}), empty="none"),
    Argument("period", Field(choices=tuple(PERIODS))), Argument("expires_days", EXPIRY, empty="never"))


def read_argument(argument: Argument, value: object) -> Any:
    """The value of a body's member; where the field converts, numbers and booleans may be JSON or text."""
    spec = argument.field
    plain = isinstance(value, str) or (spec.read and isinstance(value, (int, float)))
    text = str(value).strip() if plain else "\n"
    if len(text) > 1000 or not text.isprintable():
        raise invalid_param(argument.name, f" must be {spec.wanted or 'text, on one line'}.", None)
    return check(text or argument.empty, spec, argument.name)


def read_fields(data: bytes, arguments: Sequence[Argument]) -> JSON:
    """The values of a body. Unknown members are refused: a mistyped limit would be no limit."""
    try:
        body = strict_json((data or b"{}").decode())
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    known = [argument.name for argument in arguments]
    for name in body:
        if name not in known:
            hint = did_you_mean(name, known) or (f" It has {', '.join(known)}." if known else "")
            raise BadRequest(f"The body has no field {sanitize(name)!r}.{hint}", param=sanitize(name))
    return {argument.name: read_argument(argument, body.get(argument.name, "")) for argument in arguments
            if argument.required or argument.name in body}


async def key_settings(ledger: Ledger, values: JSON) -> dict[str, Any]:
    """A key's settings among the values given; the others stay as they are."""
    settings: dict[str, Any] = {}
    for name, value in values.items():
        settings.update(value if isinstance(value, dict) else {name: value})
    if "account" in values:
        settings["account_id"] = await account_named(ledger.db, values["account"])
    return {name: value for name, value in settings.items() if name in KEY_SETTINGS}


async def create_key(ledger: Ledger, who: str, values: JSON) -> JSON:
    settings = await key_settings(ledger, values)
    return {"token": await ledger.create_key(values["name"], ledger.now_s(), who, **settings)}


async def edit_key(ledger: Ledger, who: str, values: JSON) -> JSON:
    if settings := await key_settings(ledger, values):
        await ledger.edit_key(values["name"], who, **settings)
    return {}


async def revoke_key(ledger: Ledger, who: str, values: JSON) -> JSON:
    await ledger.revoke_key(values["name"], ledger.now_s(), who)
    return {}


async def new_account(ledger: Ledger, who: str, values: JSON) -> JSON:
    await ledger.create("account", values["name"], ledger.now_s(), who, {
        "prepaid": int(values.get("prepaid", False)), "limit_nanos": values.get("limit"),
        "multiplier": values.get("multiplier", ONE)})
    return {}


async def enter_credit(ledger: Ledger, who: str, values: JSON) -> JSON:
    await add_credit(ledger, values["name"], values["amount"], values.get("reason", ""), ledger.now_s(), who)
    return {}


async def statement(ledger: Ledger, who: str, values: JSON) -> JSON:
    first, last = values["month"]
    account_id = await account_named(ledger.db, values["account"])
    return {"first_day": first, "last_day": last, **await statement_rows(ledger.db, account_id, first, last)}


class Operation(NamedTuple):
    route: str                  # in the admin API; its * is the first field
    run: Callable[[Ledger, str, JSON], Awaitable[JSON]]     # who asks, the fields' values -> what to answer beside the first
    help: str
    fields: Sequence[Argument]
    more_fields: Sequence[Argument] = ()        # of the admin API alone


OPERATIONS = {              # by the words of the command
    "keys create": Operation("POST keys", create_key, "create an API key", [NAME_FIELD, *KEY_FIELDS], KEY_BODY_FIELDS),
    "keys edit": Operation("POST keys/*", edit_key, "change a key's limits", [NAME_FIELD, *KEY_FIELDS], KEY_BODY_FIELDS),
    "keys revoke": Operation("POST keys/*/revoke", revoke_key, "revoke a key", [NAME_FIELD]),
    "accounts create": Operation("POST accounts", new_account, "create an account that pays for keys", [
        NAME_FIELD,
        Argument("prepaid", BOOLEAN._replace(meaning="stop when its credit is used up")),
        Argument("limit", USD._replace(meaning="monthly limit in USD"), "USD", "none"),
        Argument("multiplier", empty="1", metavar="FACTOR", field=Field(
            read=lambda text: parse_decimal(text, ONE), wanted="a number like 1.2", meaning="on all prices, e.g. 1.2"))]),
    "accounts credit": Operation("POST accounts/*/credit", enter_credit, "add credit, or correct it with --reason", [
        NAME_FIELD,
        Argument("amount", metavar="USD", empty="0", required=True, field=USD._replace(
            read=functools.partial(parse_usd, minimum=-2**60), meaning="-- before a negative amount, which needs --reason")),
        Argument("reason", Field(meaning="why; makes it an adjustment"))]),
    "statement": Operation("GET accounts/*/statement", statement, "an account's bill for a month", [
        Argument("account", metavar="ACCOUNT", required=True),
        Argument("month", metavar="YYYY-MM", more={"default": ""}, field=Field(
            read=lambda text: month_bounds(text or time.strftime("%Y-%m", time.gmtime())), wanted="a month like 2026-11",
            meaning="by default this one"))]),
}


async def operate(operation: Operation, gateway: Gateway, request: AdminRequest) -> JSON:
    first, *others = operation.fields
    in_path, in_query = "*" in operation.route, operation.route.startswith("GET")
    fields = {each.name: each for each in (*operation.fields[in_path:], *operation.more_fields)}
    values = await request.read_body([*fields.values()])
    if in_path:
        values[first.name] = active_name(gateway, request) if operation.route.startswith("POST keys") else request.name
    if in_query:
        values |= {each.name: read_argument(each, request.query.get(each.name, "")) for each in others}
    return {first.name: values[first.name], **await operation.run(gateway.ledger, request.who, values)}


# --- 11.9 the admin API, and all routes ---

OVERVIEWS_KEPT = 16
EXPORT_TYPES = {"csv": "text/csv; charset=utf-8", "jsonl": "application/jsonl; charset=utf-8"}


@functools.cache
def page_answer(gzipped: bool) -> tuple[HeaderFields, bytes]:
    """The policy allows the page's one script and its one style by their hashes."""
    hashes = {tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
              for tag in ("script", "style") for text in re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)}
    policy = (f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
              "img-src data:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'")
    headers = [("content-type", "text/html; charset=utf-8"), ("cache-control", "no-cache"), ("vary", "accept-encoding"),
               ("content-security-policy", policy), *PAGE_HEADERS]
    if gzipped:
        return [*headers, ("content-encoding", "gzip")], zlib.compress(PAGE.encode(), 9, 31)       # 31: as gzip
    return headers, PAGE.encode()


async def admin(who: str, handler: AdminHandler, gateway: Gateway, client: Client) -> JSON | None:
    """A request to the admin API, where `who` may ask."""
    head = client.head
    client.connection.server.check_host(head, dashboard=True)
    if head.method == "POST":
        check_origin(gateway, head.headers)
    query = dict(urllib.parse.parse_qsl(head.query, keep_blank_values=True))
    request = AdminRequest(client, query, urllib.parse.unquote(f"{head.path}/".split("/")[4]))
    if who != "anybody":
        request.key, request.who = await authenticate(gateway, client)
        if request.key is not None and who == "admin":
            raise Forbidden(ADMIN_ONLY, code="admin_only")
    return await handler(gateway, request)


async def log_in(gateway: Gateway, request: AdminRequest) -> None:
    client = request.client
    values = await request.read_body([Argument("token", required=True)])
    request.key = key = await check_token(gateway, client, values["token"])
    log.info("%s logged in to the dashboard as %s", client.peer, f"the holder of {key.name}" if key else "administrator")
    token = await open_session(gateway.ledger.db, "key" if key else "admin", request.key_id, SESSION_S, client.started_s)
    await set_cookie(gateway, client, token, SESSION_S)


async def log_out(gateway: Gateway, request: AdminRequest) -> None:
    digest = key_digest(session_cookie(request.client)[1])
    await gateway.ledger.db.write(lambda tx: tx.execute("DELETE FROM sessions WHERE digest = ?", (digest,)))
    await set_cookie(gateway, request.client, "", 0)


async def set_cookie(gateway: Gateway, client: Client, token: str, life_s: int) -> None:
    """Answers a login or logout."""
    secure = bool(gateway.config.server.tls_cert) or client.head.headers.get("origin").startswith("https:")
    cookie = (f"{session_cookie(client)[0]}={token}; Path=/admin; Max-Age={life_s}; HttpOnly; SameSite=Strict"
              + "; Secure" * secure)
    await client.answer(200, [*JSON_HEADERS, ("set-cookie", cookie)], b"{}")


async def show_session(gateway: Gateway, request: AdminRequest) -> JSON:
    """What the frame around the pages shows. A holder learns nothing of the other keys."""
    now_s, ledger = gateway.ledger.now_s(), gateway.ledger
    host, port = request.client.connection.server.address
    counts, own = {"models": len(model_names(gateway, request.key))}, None
    if request.key:
        own, = [row for row in await key_rows(ledger, now_s) if row["id"] == request.key_id]
    else:
        counts.update(keys=count_active_keys(ledger), providers=len(gateway.config.providers))
    return {"role": "key" if own else "admin", "version": VERSION, "up_s": int(now_s) - gateway.started_s,
            "address": f"{host}:{port}", "key": own, "counts": counts}


def count_active_keys(ledger: Ledger) -> int:
    now_s = ledger.now_s()
    return sum(key.state(now_s) == "active" for key in ledger.keys.values())


async def show_overview(gateway: Gateway, request: AdminRequest) -> JSON:
    """Every open page asks after each request: within a second all get the same answer."""
    now_s, db, key_id = gateway.ledger.now_s(), gateway.ledger.db, request.key_id
    since_ms = request.number("since", int(now_s) * 1000 - DAY_MS, MAX_NUMBER)
    slots = request.number("slots", 25, 400)
    step_ms = max(request.number("step", 3_600_000, 366 * DAY_MS), HALF_HOUR_MS)
    wanted = int(now_s), since_ms, step_ms, slots, key_id
    answer = gateway.overviews.get(wanted)
    if answer is None:
        answer = await overview(db, since_ms, step_ms, slots, now_s, key_id)
        answer["latest"] = [row_view(row) for row in await usage_rows(db, key_condition(key_id), [], 10)]
        answer["providers"] = await provider_views(gateway) if request.key is None else []
        if len(gateway.overviews) >= OVERVIEWS_KEPT:
            gateway.overviews.clear()
        gateway.overviews[wanted] = answer
    return answer


def page_of(rows: list[JSON], limit: int) -> JSON:
    """The first `limit` rows, and the cursor of the next page."""
    return {"rows": rows[:limit], "cursor": rows[limit - 1]["id"] if len(rows) > limit else None}


async def show_usage(gateway: Gateway, request: AdminRequest) -> JSON:
    """A page of the log; the first one with the sums of all pages."""
    before = request.number("cursor", MAX_NUMBER, MAX_NUMBER)
    limit = request.number("limit", 50, 500)
    db = gateway.ledger.db
    where, values, table = usage_where(request.query, request.key_id)
    rows: list[JSON] = []
    sums: JSON | None = None
    if "cursor" not in request.query:
        (_, sums), = await usage_sums(db, (), 0, MAX_NUMBER, where, values, table)
    if sums is None or sums["requests"]:
        rows = await usage_rows(db, f"{where} AND id < ?", [*values, before], limit + 1)
    return {**page_of([row_view(row) for row in rows], limit), "sums": sums}


async def export_usage(gateway: Gateway, request: AdminRequest) -> None:
    """The whole filtered log as CSV or JSON lines, newest first, streamed."""
    client, before = request.client, MAX_NUMBER
    ending = client.head.path.rpartition(".")[2]
    where, values, _ = usage_where(request.query, request.key_id)
    await client.start(200, [("content-type", EXPORT_TYPES[ending]), ("cache-control", "no-store"), *PAGE_HEADERS,
                             ("content-disposition", f"attachment; filename=pomex-usage.{ending}")])
    await client.write((csv_line(ROW_COLUMNS) + "\r\n").encode() if ending == "csv" else b"")
    while rows := await usage_rows(gateway.ledger.db, f"{where} AND id < ?", [*values, before], 1000):
        before = rows[-1]["id"]
        lines = (csv_line(row.values()) + "\r\n" if ending == "csv" else dumps(row) + "\n" for row in rows)
        await client.write("".join(lines).encode())
    await client.end()


async def show_request(gateway: Gateway, request: AdminRequest) -> JSON:
    *_, row = lines = await one_request(gateway.ledger.db, request.name, request.key_id)
    return {"row": row_view(row), "trace": read_detail(row["detail"]),
            "lines": [{**line, "parts": cost_parts(line)} for line in lines]}


COST_PARTS = {"input": "input", "cache_read": "cached input", "cache_write": "written to cache",
              "cache_write_1h": "written to cache, kept long", "output": "output", "search": "web searches",
              "answer": "as the provider says"}


def cost_parts(line: JSON) -> list[JSON]:
    """The parts of a row's cost: tokens times price (USD per million) = nano-dollars, each rounded for display only."""
    rate = price_of(line["price"])
    if rate is None:
        return []
    counts = billed_counts(Usage(**{name: line[name] for name in COUNTED}), rate)
    parts = [(words, getattr(counts, name), getattr(rate, name)) for name, words in COST_PARTS.items()]
    return [{"what": words, "count": count, "picos": picos, "nanos": count * picos * line["multiplier"] // 1_000_000_000}
            for words, count, picos in parts if count]


async def show_keys(gateway: Gateway, request: AdminRequest) -> JSON:
    now_s, ledger = gateway.ledger.now_s(), gateway.ledger
    return {"keys": await key_rows(ledger, now_s), "accounts": await list_accounts(ledger.db, now_s), "now_s": int(now_s)}


def active_name(gateway: Gateway, request: AdminRequest) -> str:
    for key in gateway.ledger.keys.values():
        if str(key.id) == request.name and not key.revoked_s:
            return key.name
    raise NotFound("There is no such active key.")


async def show_audit(gateway: Gateway, request: AdminRequest) -> JSON:
    before, limit = request.number("cursor", MAX_NUMBER, MAX_NUMBER), request.number("limit", 200, 500)
    return page_of(await audit_rows(gateway.ledger.db, before, limit + 1), limit)


def missing_keys(gateway: Gateway) -> list[JSON]:
    return [{"name": row.name, "env_key": row.env_key} for name, row in BUILTIN_PROVIDERS.items()
            if name not in gateway.config.providers and row.env_key]


async def show_models(gateway: Gateway, request: AdminRequest) -> JSON:
    rows = [model_view(gateway, name) for name in model_names(gateway, request.key)]
    open_ended = [name for name, provider in gateway.config.providers.items() if "*" in provider.models and name != "demo"]
    return {"models": rows, "missing": [] if request.key else missing_keys(gateway), "any": open_ended,
            "prices_date": PRICES_DATE}


CIRCUIT_WORDS = {"open": "left out", "half-open": "recovering"}


def model_view(gateway: Gateway, name: str) -> JSON:
    """Its state is `ready` if any of its targets would be asked now."""
    catalogue, now = gateway.catalogue, time.monotonic()
    configured = gateway.config.models.get(name)
    schedule = gateway.prices.schedule(*catalogue.first_target(name), name) or PriceSchedule("")
    facts = catalogue.facts(name)
    targets, states = [], []
    try:
        for each in itertools.chain(*catalogue.tiers(name)):
            targets.append(f"{each.provider.name}:{each.model}")
            states.append("disabled" if each.provider.name in gateway.ledger.disabled
                          else CIRCUIT_WORDS.get(gateway.router.health.state(each.id, now), "ready"))
    except BadRequest as error:         # in [models], but of a provider that is not configured
        states.append(str(error))
    return {
        "name": name, "targets": targets, "state": "ready" if "ready" in states else states[0],
        "description": configured.description if configured else DEMO_MODELS.get(name.removeprefix("demo/"), ""),
        "context": facts.context_window, "max_output": facts.max_output, "source": schedule.source,
        "price": schedule.base.split() or None, "long_over": schedule.over, "long": schedule.long.split(),
        "peak": int(schedule.factors.get("peak", 1))}


async def show_providers(gateway: Gateway, request: AdminRequest) -> JSON:
    return {"providers": await provider_views(gateway), "missing": missing_keys(gateway)}


async def provider_views(gateway: Gateway) -> list[JSON]:
    """Each with its last hour, by minutes ([requests, failed] each), and its last error."""
    db, providers = gateway.ledger.db, gateway.config.providers
    since_ms = (int(gateway.ledger.now_s()) // 60 - 59) * 60_000
    minutes = {name: [[0, 0] for _ in range(60)] for name in providers}
    for (name, minute), sums in await usage_sums(db, ["provider", f"(started_ms - {since_ms}) / 60000"], since_ms,
                                                 since_ms + 3_600_000, table="usage"):
        if name in minutes:
            minutes[name][minute] = [sums["requests"], sums["failed"]]
    times = await latencies(db, since_ms, 0)
    in_flight = collections.Counter(each["provider"] for each in await open_requests(db, 0))
    errors = {**dict(await db.read("SELECT name, value FROM settings WHERE name LIKE 'error/%'")), **gateway.ledger.notes}
    circuits = {re.split("[:#]", id)[0]: (CIRCUIT_WORDS[state], math.ceil(left_s))     # and until when
                for id, state, _, left_s in gateway.router.health.rows(time.monotonic()) if state in CIRCUIT_WORDS}
    circuits.update(dict.fromkeys(gateway.ledger.disabled, ("disabled", 0)))
    views = []
    for name, provider in providers.items():
        state, back_s = circuits.get(name) or (provider_state(minutes[name]), 0)
        requests, failed = map(sum, zip(*minutes[name]))
        views.append({
            "name": name, "wire_api": provider.wire_api, "base_url": provider.base_url, "key_source": provider.key_source,
            "state": state, "back_s": back_s, "minutes": minutes[name], "requests": requests, "failed": failed,
            "open": in_flight[name], **latency_percentiles([row for row in times if row[0] == name]),
            "error": json.loads(errors.get(f"error/{name}", "null"))})
    return views


def provider_named(gateway: Gateway, name: str) -> ProviderConfig:
    if name not in gateway.config.providers:
        raise NotFound("There is no such provider.")
    return gateway.config.providers[name]


async def use_provider(gateway: Gateway, request: AdminRequest, use: bool) -> JSON:
    """No process of this ledger sends a new request to a disabled provider, also after a restart."""
    name = provider_named(gateway, request.name).name
    await gateway.ledger.use_provider(name, use, request.who)
    log.warning("%s %s the provider %s on the dashboard", request.client.peer, "enabled" if use else "disabled", name)
    return {"name": name}


def provider_state(minutes: Sequence[Sequence[int]]) -> str:
    """By the newest five minutes that had requests."""
    failed = [failed / count for count, failed in minutes if count][-5:]
    if not failed:
        return "no requests"
    if failed[-1] > 0.5:
        return "failing"
    return "recovering" if max(failed) > 0.5 else "healthy"


async def contact(upstream: ConnectionPool, provider: ProviderConfig) -> int:
    """The status of a provider's list of models, which proves address, certificate and key at no cost; else GatewayError."""
    headers = [("accept", "application/json"), *provider.http_headers.items()]
    headers += WIRES[provider.wire_api].auth(provider.api_key) if provider.api_key else []
    exchange = await upstream.exchange(provider, "GET", "/models", headers, b"")
    try:
        body = await exchange.read_all(1 << 22)
    finally:
        await exchange.close()
    if exchange.status >= 400:
        error = provider_error(exchange.status, exchange.headers, body, time.time())
        redact_configured(error, secret_pattern([provider]))
        raise error
    return exchange.status


async def test_provider(gateway: Gateway, request: AdminRequest) -> JSON:
    provider, started = provider_named(gateway, request.name), time.monotonic()
    if provider.wire_api == "demo":
        return {"ok": True, "ms": 0, "text": "The demo works offline."}
    try:
        good, text = True, f"It answers ({await contact(gateway.router.upstream, provider)})."
    except GatewayError as error:
        good, text = False, str(error)
    return {"ok": good, "ms": int((time.monotonic() - started) * 1000), "text": text}


async def show_setup(gateway: Gateway, request: AdminRequest) -> JSON:
    """What the set-up page checks. It replaces {ORIGIN} with the address that the browser used."""
    db, providers = gateway.ledger.db, gateway.config.providers
    mine = key_condition(request.key_id)
    running = await open_requests(db, request.key_id)
    model = best_model(gateway.catalogue, request.key)
    refused = await db.read(f"SELECT data FROM refusals WHERE {mine} ORDER BY id DESC LIMIT {REFUSALS_SHOWN}")
    return {
        "agents": [(each.name, each.file and f"{each.home}/{each.file}", agent_settings(each, "{ORIGIN}", model))
                   for each in AGENTS.values()],
        "keys": 1 if request.key else count_active_keys(gateway.ledger),
        "providers": [name for name in providers if name != "demo"],
        "demo": "demo" in providers,
        "latest": [row_view(row) for row in await usage_rows(db, f"{mine} AND client NOT LIKE 'Mozilla%'", [], 1)],
        "running": running[-1] if running else None,
        "refused": [json.loads(data) for data, in refused]}


async def playground(gateway: Gateway, request: AdminRequest) -> None:
    """Billed to the holder's key; the administrator's requests to a key that nobody holds."""
    ledger = gateway.ledger
    key = request.key or next((each for each in ledger.keys.values() if each.name == PLAY_KEY and not each.revoked_s), None)
    if key is None:
        await ledger.create_key(PLAY_KEY, ledger.now_s(), request.who)
        key = ledger.list_keys()[-1]
    await generate("responses", gateway, request.client, key)


async def live_events(gateway: Gateway, request: AdminRequest) -> None:
    """The live feed (SSE), until the session ends or the gateway stops: then the browser reconnects."""
    client, db, key_id = request.client, gateway.ledger.db, request.key_id
    if gateway.watchers[key_id] >= FEEDS_A_KEY:
        raise overloaded(f"{FEEDS_A_KEY} live feeds are open already. Try again in a moment.", 429)
    gateway.watchers[key_id] += 1
    try:
        none = [MAX_NUMBER] * 3
        seen, known, running, _ = await live_news(db, none, none, (), key_id)        # what exists already is no news
        if re.fullmatch("[0-9]{1,15}", last := client.head.headers.get("last-event-id")):
            seen = int(last), *seen[1:]
        await client.start(200, STREAM_HEADERS)
        await client.write(b"retry: 2000\n\n: hello\n\n")
        checked = time.monotonic()
        while not client.connection.server.draining:
            seen, known, running, news = await live_news(db, seen, known, running, key_id)
            if time.monotonic() - checked >= FEED_HEARTBEAT_S:
                checked = time.monotonic()
                await authenticate(gateway, client)     # the session may have ended
                news += b": \n\n"
            if news:
                await client.write(news)
            await asyncio.sleep(POLL_S)
    finally:
        gateway.watchers[key_id] -= 1
    await client.end()


AdminHandler: TypeAlias = Callable[[Gateway, AdminRequest], Awaitable[JSON | None]]       # None: it has answered
ADMIN_ROUTES: dict[str, dict[str, AdminHandler]] = {    # who may ask -> method and path under /admin/api/ -> handler
    "anybody": {"POST login": log_in, "POST logout": log_out},
    "holder": {             # of an API key, for what is its own; the administrator too
        "GET session": show_session,
        "GET overview": show_overview,
        "GET usage": show_usage,
        "GET usage.csv": export_usage,
        "GET usage.jsonl": export_usage,
        "GET usage/*": show_request,        # * is a name or number
        "GET models": show_models,
        "GET setup": show_setup,
        "GET events": live_events,
        "POST playground": playground},
    "admin": {
        "GET keys": show_keys,
        **{each.route: functools.partial(operate, each) for each in OPERATIONS.values()},
        "GET audit": show_audit,
        "GET providers": show_providers,
        "POST providers/*/test": test_provider,
        "POST providers/*/disable": functools.partial(use_provider, use=False),
        "POST providers/*/enable": functools.partial(use_provider, use=True)},
}
Handler: TypeAlias = Callable[[Gateway, "Client"], Awaitable[JSON | None]]        # None: it has answered
ROUTES: dict[str, Handler] = {
    **{f"POST {api.endpoint}": functools.partial(generate, name) for name, api in CLIENT_APIS.items()},
    "POST /v1/messages/count_tokens": count_tokens,
    "GET /v1/models": models,
    "GET /v1/models/*": model,
    "GET /v1/key": key_facts,
    "GET /metrics": metrics,
    "GET /": root,
    "GET /admin": show_page,
    "GET /admin/": show_page,
    "GET /ready": ready,
    "GET /readyz": ready,
    **{f"GET {path}": health for path in HEALTH_PATHS},
    **{name.replace(" ", " /admin/api/"): functools.partial(admin, who, handler)
       for who, routes in ADMIN_ROUTES.items() for name, handler in routes.items()},
}


# === 12. server ===
#
# A connection's requests are answered in order, one at a time. When a client leaves, its handler is cancelled at once.
# Half-closing counts as leaving: no HTTP client in use does it.

BACKLOG = 4096  # a burst of clients after a restart
PIPELINE_BYTES = 2**17  # asyncio stops reading at twice this, while a handler runs
REST_BYTES = 2**16  # an unread body up to this size is dropped, to keep the connection
LINGER_BYTES = 2**20  # dropped after an early answer, for LINGER_S: closing with unread bytes resets the connection
LINGER_S = 2.0  # before the client has read it (RFC 9112 9.6)
ACCEPT_STEP = 8  # connections in one turn of the loop
REFUSED_CONNECTIONS = 64  # beyond max_connections: all but /health is answered with 503; the oldest is closed first
REFUSED_WAIT_S = 1.0  # for their request
IDLE_SAFE_S = 5.0  # a connection idle for less is not closed for a new one: its request may be on the way
SHARES = {  # resource -> limit of the process, of one address or key
    "connections": ("max_connections", "max_connections_per_address"), "bytes": ("max_bodies_bytes", "max_bodies_bytes_each")}
OWN_FILES = 128  # kept free for /health, the ledger and the log
IDLE_GRACE_S = 0.25  # while draining, a connection stays open after its last answer
FIRST_GRACE_S = 2.0  # and one that has had no request yet
GRACE_S = 5.0  # for cancelled handlers to settle and write their terminal event
CLIENT_LEFT = 499  # nginx's status, for the log


class ClientGone(ConnectionError):
    """The client left, or read nothing for write_timeout_s."""


class Client:
    """One request: its record, to which every layer adds, and its answer: body(), then answer(), or start(), write(), end()."""
    status = 0  # 0 before it is known
    note = ""  # of its handler, for the access line
    # the record of its targets
    provider, model = "", ""  # of the newest attempt
    tries = 0  # of targets: one may need several upstream calls
    attempts = 0  # upstream calls
    turn_state = ""  # names the target, for Codex
    upstream_id = ""  # its provider's request id
    asked_ms, answering_ms = 0, 0  # when the newest call began, and when its answer's head came
    first_ms = 0  # when the first output left
    # the answer
    sent_bytes = 0
    ended = False  # the whole answer was handed over
    pending = b""  # the head, which goes out with the body's first bytes
    chunked = False
    data: bytes | None = None  # the request's body
    held = 0  # bytes of it that count
    holders: Sequence[str] = ()  # for whom

    def __init__(self, connection: Connection, head: RequestHead) -> None:
        self.connection, self.head, self.peer = connection, head, connection.peer
        self.request_id = request_id_for(head.headers.get("x-request-id"))
        self.started_s, self.started = time.time(), time.monotonic()
        self.keep = head.keep_alive  # the connection, for another request
        self.failures: list[FailedAttempt] = []
        self.dropped: list[str] = []  # what the target cannot carry

    @property
    def gone(self) -> bool:
        return self.connection.gone

    def elapsed_ms(self) -> int:
        return max(1, int((time.monotonic() - self.started) * 1000))

    def count_attempt(self) -> bool:
        """False if the request has used all of its upstream calls."""
        if self.attempts >= MAX_ATTEMPTS:
            return False
        self.attempts += 1
        return True

    async def body(self, most_bytes: int = sys.maxsize, key: str = "") -> bytes:
        """Decoded; ProtocolError if it is too long, too slow, or malformed. `key`: its bytes count for it."""
        if self.data is None:
            server, coding = self.connection.server, self.head.headers.get("content-encoding")
            most_bytes = min(most_bytes, server.config.max_body_bytes)
            self.holders = [*server.holders(self.peer), *filter(None, [key])]
            self.hold(min(self.head.length or 0, most_bytes))
            data = await self.connection.read_body(self, most_bytes)
            if coding:
                self.hold(min(most_bytes, max(RATIO_FREE_BYTES, MAX_RATIO * len(data))))
            inflater = ContentDecoder(coding, most_bytes)
            data = inflater.feed(data)
            inflater.finish()
            self.hold(len(data))
            self.data = data
        return self.data

    def hold(self, size: int) -> None:
        """Counts bytes of the body before they are read; GatewayError: too many."""
        if size == self.held:
            return
        if limit := self.connection.server.acquire("bytes", self.holders, size - self.held):
            raise overloaded(f"The requests under way hold all the bytes that {limit} in [server] allows. Try again in a "
                             "moment.", 429 if limit.endswith("_each") else 503)
        self.held = size

    async def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """In one write."""
        await self.start(status, headers, len(body))
        await self.end(body)

    async def start(self, status: int, headers: list[tuple[str, str]], size: int | None = None) -> None:
        """Of `size` bytes, or of unknown length. The head goes out with the first write()."""
        connection, http11 = self.connection, self.head.http11
        self.status, self.chunked = status, size is None and http11
        if api_of(self.head.path) == "messages":
            headers = [*headers, ("request-id", self.request_id)]
        # without chunks the end of the connection is the end of the body
        self.keep = connection.may_keep(self.head) and self.keep and (http11 or size is not None)
        if self.chunked:
            headers = [*headers, ("transfer-encoding", "chunked")]
        elif size is not None and status != 204:
            headers = [*headers, ("content-length", str(size))]
        if not self.keep:
            headers = [*headers, ("connection", "close")]
        elif not http11:
            headers = [*headers, ("connection", "keep-alive")]
        self.pending = connection.server.answer_head(status, headers, self.request_id)

    def put(self, data: bytes) -> bool:
        """One write, which waits for nothing; ClientGone when the client left. False: drain() before the next one."""
        connection = self.connection
        if connection.gone:
            raise ClientGone("the client left")
        if self.head.method == "HEAD":
            data = b""
        elif self.chunked:
            data = chunk(data) + LAST_CHUNK if self.ended else chunk(data)
        if self.pending:
            data, self.pending = self.pending + data, b""
        if data:
            connection.writer.write(data)
            self.sent_bytes += len(data)
        return connection.unsent_bytes() <= WRITE_HIGH_BYTES

    async def write(self, data: bytes) -> None:
        """put(), then drain() where the client is slow."""
        if not self.put(data):
            await self.connection.drain()

    async def end(self, data: bytes = b"") -> None:
        """With a last piece of the answer in the same write."""
        self.ended = True
        await self.write(data)

    async def fail(self, error: GatewayError) -> None:
        """If a part of another answer was sent, closes the connection."""
        self.keep = self.keep and not isinstance(error, ProtocolError) and not self.sent_bytes
        if self.sent_bytes:
            return
        error_body = CLIENT_APIS[api_of(self.head.path)].error
        kind, body = "application/json", json.dumps(error_body(error, self.request_id))
        if error.plain:
            kind, body = "text/plain; charset=utf-8", str(error)
        await self.answer(error.status, [("content-type", kind), *error.headers], body.encode())


NO_REQUEST = RequestHead("", "", "", http11=True, headers=NO_HEADERS, keep_alive=False, expect_continue=False, length=0)
SANE_ID = re.compile(r"[!-~]{1,128}")


def request_id_for(wanted: str) -> str:
    """The client's own if it is valid, or a new one (not secret: `secrets` costs ten times as much)."""
    return wanted if SANE_ID.fullmatch(wanted) else f"req_{random.getrandbits(128):032x}"


# --- 12.1 one connection ---

class Connection(StreamConnection):
    """One client connection and the task that answers its requests."""
    http: RequestReader

    body_done = True  # the current request was read to its end
    client: Client | None = None  # whose handler runs
    gone = False  # nothing more will come, and nobody reads what is sent
    holders: Sequence[str] = ()  # for whom it counts; none: it may only ask for /health
    served = False  # it has sent a request
    waiting: asyncio.Timeout | None = None  # for the next request

    def __init__(self, server: Server, protocol: StreamProtocol, writer: asyncio.StreamWriter, peer: str) -> None:
        super().__init__(protocol, writer)
        self.server, self.peer = server, peer
        self.http = RequestReader(server.limits)
        self.loop = asyncio.get_running_loop()
        self.task = self.loop.create_task(self.run())

    def on_client_gone(self) -> None:
        """Cancels the handler, unless the answer is complete."""
        if not self.gone:
            self.gone = True
            if self.client is not None and not self.client.ended:
                self.task.cancel()

    async def run(self) -> None:
        try:
            if self.server.context is not None:
                await self.handshake(self.server.context)
            while (head := await self.next_head()) is not None:
                self.served = True
                if not await self.serve(Client(self, head)):
                    break
                if not self.http.idle:
                    await asyncio.sleep(0)  # answering pipelined requests may never wait
            if not (self.holders or self.served or self.gone):
                raise overloaded(NO_ROOM)
        except GatewayError as error:  # before there was a request
            if self.holders:  # there may be thousands of refused ones
                log.info("connection of %s: %s", self.peer, error)
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await Client(self, NO_REQUEST).fail(error)
                await self.linger()
        except (OSError, asyncio.CancelledError):  # ClientGone, TimeoutError: nobody waits for this task
            pass
        except Exception as error:  # noqa: BLE001 - our own bug
            log.error("connection of %s: %s", self.peer, fault_location(error))
        finally:
            self.close()

    async def handshake(self, context: ssl.SSLContext) -> None:
        """TLS, within header_timeout_s."""
        try:
            await self.writer.start_tls(context, ssl_handshake_timeout=self.server.config.header_timeout_s)
        except BaseException as error:
            if isinstance(error, OSError):
                log.info("connection of %s: %s", self.peer, describe_error(error))
            self.abort()
            self.server.release(self)  # asyncio does not call connection_lost
            raise

    async def next_head(self) -> RequestHead | None:
        """None if no more will come. header_timeout_s counts from the first byte. Draining waits briefly: one may be coming."""
        if self.holders:
            self.server.idle.setdefault(self, self.loop.time())
        while (part := self.http.next()) is NEED_DATA and self.http.idle:
            if self.server.closing:
                return None
            try:
                async with asyncio.timeout(self.idle_s()) as self.waiting:
                    came = await self.receive()
            except TimeoutError:
                came = self.protocol.unread > 0 and await self.receive()  # received in the same turn of the loop
            finally:
                self.waiting = None
            if not came:
                return None
        started = self.loop.time()
        while not isinstance(part, RequestHead):
            if not await self.receive_within(self.server.config.header_timeout_s, started, "request head"):
                return None
            part = self.http.next()
        self.server.idle.pop(self, None)
        self.body_done = False
        return part

    def idle_s(self) -> float:
        if self.server.draining:
            return IDLE_GRACE_S if self.served else FIRST_GRACE_S
        return self.server.config.keep_alive_timeout_s if self.holders else REFUSED_WAIT_S

    async def receive_within(self, limit_s: float, started: float, what: str) -> bool:
        try:
            async with asyncio.timeout_at(started + limit_s):
                return await self.receive()
        except TimeoutError:
            raise ProtocolError(f"The {what} took longer than {limit_s:g} s.", 408) from None

    async def serve(self, client: Client) -> bool:
        """True if the connection may carry another request."""
        server, self.client = self.server, client
        server.open_requests += 1
        try:
            if not self.holders and client.head.path not in HEALTH_PATHS:
                raise overloaded(NO_ROOM)
            server.check_host(client.head)
            client.peer = server.client_address(self.peer, client.head.headers)
            await server.handler(client)
            if not client.ended and not self.gone:
                raise RuntimeError("the handler did not end its answer")
        except GatewayError as error:
            await client.fail(without_traceback(error))
        except ClientGone:
            raise
        except asyncio.CancelledError:
            if self.gone or client.status or not server.closing:
                raise
            await client.fail(overloaded(STOPPING, code="server_error"))  # its request was still coming in
        except Exception as error:  # noqa: BLE001 - our own bug
            log.error("request %s: %s", client.request_id, fault_location(error))
            await client.fail(GatewayError("The gateway failed on this request; its log says more under "
                                           f"{client.request_id}."))
        finally:
            self.client = None
            client.hold(0)
            server.open_requests -= 1
            server.access(client, client.status or CLIENT_LEFT)
        return not self.gone and await self.discard_body(client)

    async def read_body(self, client: Client, most_bytes: int) -> bytes:
        pieces: list[bytes] = []
        length, expected, started = client.head.length, client.head.expect_continue, self.loop.time()
        while True:
            check_body_size(length or client.held, most_bytes)
            part = self.http.next()
            if part is END:
                self.body_done = True
                return b"".join(pieces)  # of one piece: itself
            if isinstance(part, bytes):
                pieces.append(part)
                if length is None:
                    client.hold(client.held + len(part))
                continue
            if expected:
                expected = False
                self.writer.write(CONTINUE)
            if not await self.receive_within(self.server.config.body_timeout_s, started, "request body"):
                raise ClientGone("the client left")

    async def discard_body(self, client: Client) -> bool:
        """True if another request may follow."""
        if not client.keep:
            if not self.body_done:
                await self.linger()
            return False
        if not self.skip_body():
            async with asyncio.timeout(self.server.config.body_timeout_s):
                while not self.skip_body():
                    if not await self.receive():
                        return False
        return True

    def skip_body(self) -> bool:
        """Drops what has come of an unread body; True at its end."""
        while not self.body_done:
            part = self.http.next()
            if part is NEED_DATA:
                return False
            self.body_done = part is END
        return True

    async def linger(self) -> None:
        """Half-closes, then reads and drops for a while."""
        if self.writer.can_write_eof() and not self.writer.is_closing():
            self.writer.write_eof()
        left = LINGER_BYTES
        async with asyncio.timeout(LINGER_S):
            while left > 0 and (data := await self.reader.read(REST_BYTES)):
                left -= len(data)

    def may_keep(self, head: RequestHead) -> bool:
        """After an answer that begins now? The unread rest must be small."""
        try:
            coming = head.length is not None and head.length <= REST_BYTES and not head.expect_continue
            return (self.skip_body() or coming) and bool(self.holders) and not self.server.draining and not self.gone
        except ProtocolError:
            return False

    async def drain(self) -> None:
        """Waits while WRITE_HIGH_BYTES are unsent; ClientGone: the client left, or made no room in write_timeout_s."""
        if self.unsent_bytes() <= WRITE_HIGH_BYTES:
            return
        try:
            async with asyncio.timeout(self.server.config.write_timeout_s):
                await self.writer.drain()
        except TimeoutError:
            self.gone = asyncio.current_task() is self.task  # a heartbeat's: connection_lost cancels the handler
            self.abort()
            raise ClientGone("the client takes nothing") from None
        except ConnectionError:
            self.gone = True
        if self.gone:
            raise ClientGone("the client left")

    def close(self) -> None:
        """Closes after the last bytes; if they are not read in time, without them."""
        self.client = None
        if not self.writer.is_closing() and self.unsent_bytes():
            self.loop.call_later(self.server.config.write_timeout_s, self.abort)
        self.writer.close()


# --- 12.2 the server ---

def connections_allowed_by_files() -> int:
    """The limit set by the open files of the process: a stream takes two."""
    if sys.platform == "win32":
        return sys.maxsize
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if files == resource.RLIM_INFINITY else max((files - OWN_FILES) // 2, files // 8)


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    if not config.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key or None)
    except OSError as error:  # ssl.SSLError is one too
        raise ConfigError(f"server.tls_cert and server.tls_key cannot be used: {describe_error(error)}.") from error
    return context


@functools.lru_cache(1)
def http_date(now_s: int) -> str:
    return email.utils.formatdate(now_s, usegmt=True)


async def listen(config: ServerConfig) -> list[socket.socket]:
    """A socket for each address of the host, all with one port."""
    host, port = config.host, config.port
    found = await asyncio.get_running_loop().getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    failure = OSError(errno.EADDRNOTAVAIL, "no address to listen on")
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            sockets.append(socket.create_server((address[0], port), family=family, backlog=BACKLOG))
            port = sockets[0].getsockname()[1]
        except OSError as error:
            failure = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # like ::1 without IPv6
                for made in sockets:
                    made.close()
                raise
    if not sockets:
        raise failure
    return sockets


class Server:
    """Has each request answered by `handler`, then calls `access(client, status)`."""
    address = ("", 0)
    sockets: Sequence[socket.socket] = ()  # that listen
    open_requests = 0
    draining = False  # takes no new connections, and closes idle ones
    closing = False  # draining, and handlers are no longer waited for

    def __init__(self, handler: Callable[[Client], Awaitable[None]], config: ServerConfig,
                 access: Callable[[Client, int], None]) -> None:
        self.handler, self.access = handler, access
        self.use(config)
        self.listeners: list[asyncio.Server] = []
        self.connections: set[Connection] = set()  # with an open socket, also during TLS setup
        self.used: collections.Counter[tuple[str, str]] = collections.Counter()  # by resource and holder; "": the process
        self.idle: dict[Connection, float] = {}  # without a request: since when, the longest first
        self.refused: dict[Connection, float] = {}  # beyond the limits: since when, the oldest first
        self.empty = asyncio.Event()  # draining, and no connection is left
        self.context = tls_context(config)

    def use(self, config: ServerConfig) -> None:
        """For the next connections and requests. Host, port and tls_cert stay."""
        fit = connections_allowed_by_files()
        self.config = dataclasses.replace(config, max_connections=min(config.max_connections, fit))
        self.max_refused = min(REFUSED_CONNECTIONS, fit)
        self.limits = Limits(max_head_bytes=config.max_head_bytes, max_body_bytes=config.max_body_bytes)
        self.proxies = [ipaddress.ip_network(proxy) for proxy in config.trusted_proxies]
        own = ("localhost", "127.0.0.1", "[::1]", config.host, f"[{config.host}]")
        self.hosts = {name.lower() for name in (*own, *config.public_hosts)}
        self.any_host = not config.public_hosts and not is_loopback(config.host)

    async def start(self, sockets: Sequence[socket.socket] = (), at_once: int = ACCEPT_STEP) -> None:
        """Accepts `at_once` in one turn of the loop; without sockets on new ones for host and port."""
        loop = asyncio.get_running_loop()
        self.sockets = sockets or await listen(self.config)
        self.address = self.sockets[0].getsockname()[:2]
        for listening in self.sockets:
            self.listeners.append(await loop.create_server(self.new_protocol, sock=listening, backlog=at_once))
            listening.listen(BACKLOG)  # `backlog` is also how many asyncio accepts at a time

    def new_protocol(self) -> StreamProtocol:
        return StreamProtocol(PIPELINE_BYTES, self.connected)

    def connected(self, protocol: StreamProtocol, writer: asyncio.StreamWriter) -> None:
        """Admits a new connection; beyond the limits only for /health."""
        address, transport = writer.get_extra_info("peername"), writer.transport
        assert isinstance(transport, asyncio.Transport)
        if not address:  # it has gone again
            transport.abort()
            return
        connection = Connection(self, protocol, writer, str(address[0]))
        if self.used["connections", ""] >= self.config.max_connections:
            self.evict(self.idle, IDLE_SAFE_S)
        holders, waiting = self.holders(connection.peer), self.refused
        if not (self.closing or self.acquire("connections", holders, 1)):
            connection.holders, waiting = holders, self.idle
        elif len(waiting) >= self.max_refused:
            self.evict(waiting, 0.0)
        waiting[connection] = connection.loop.time()
        self.connections.add(connection)
        protocol.on_end, protocol.on_closed = connection.on_client_gone, functools.partial(self.release, connection)
        if self.context is not None:
            transport.pause_reading()  # until the handshake reads

    def holders(self, peer: str) -> list[str]:
        """Of its connections and bodies: the process, and its address, unless that is a proxy's or local."""
        return [""] if is_loopback(peer) or self.trusts(peer) else ["", peer]

    def acquire(self, share: str, holders: Sequence[str], more: int) -> str:
        """Adds `more`, perhaps negative, for each holder, or returns the name of the limit that forbids it."""
        for holder in holders:
            limit = SHARES[share][holder != ""]
            if more > 0 and self.used[share, holder] + more > getattr(self.config, limit):
                return limit
        for holder in holders:
            self.used[share, holder] += more
            if not self.used[share, holder]:
                del self.used[share, holder]
        return ""

    def evict(self, waiting: Mapping[Connection, float], least_s: float) -> None:
        """The one that has waited longest, if at least for least_s."""
        connection = next(iter(waiting), None)
        if connection is not None and connection.loop.time() - waiting[connection] >= least_s:
            self.release(connection)
            connection.abort()

    def release(self, connection: Connection) -> None:
        if connection in self.connections:
            self.connections.remove(connection)
            self.idle.pop(connection, None)
            self.refused.pop(connection, None)
            self.acquire("connections", connection.holders, -1)
        if self.draining and not self.connections:
            self.empty.set()

    def trusts(self, peer: str) -> bool:
        return any(ipaddress.ip_address(peer) in network for network in self.proxies)

    def client_address(self, peer: str, headers: Headers) -> str:
        """Behind trusted proxies the last in X-Forwarded-For that is not one of them."""
        entries = list_values(headers, "x-forwarded-for") if self.proxies else []
        while entries and self.trusts(peer):
            try:
                peer = str(ipaddress.ip_address(entries.pop()))
            except ValueError:
                raise ProtocolError("X-Forwarded-For must be a list of addresses.") from None
        return peer

    def check_host(self, head: RequestHead, dashboard: bool = False) -> None:
        """Another site could point its name here (DNS rebinding). The dashboard's is checked also where any name is allowed."""
        name = head.headers.get("host").lower()
        if ":" in name and name[-1] != "]":  # a port, not the end of an IPv6 address
            name = name.rpartition(":")[0]
        if name in self.hosts or not (dashboard or name):  # without a name: an HTTP/1.0 client, so not a browser
            return
        with contextlib.suppress(ValueError):
            if self.any_host and (not dashboard or ipaddress.ip_address(name.strip("[]"))):
                return
        raise ProtocolError(f"This gateway does not answer for the host {name[:100]!r}. If that is its name, add it to "
                            "public_hosts in [server] of pomex.toml.", 421)

    def answer_head(self, status: int, headers: HeaderFields, request_id: str) -> bytes:
        own = ("date", http_date(int(time.time()))), ("server", "pomex"), ("x-request-id", request_id)
        return response_head(status, [*own, *headers])

    async def drain(self, timeout_s: float | None) -> None:
        """Handlers that still run after timeout_s (None: no limit) are cancelled."""
        self.draining = True
        await self.stop_listening()
        for connection in self.connections:
            if connection.waiting is not None:
                connection.waiting.reschedule(connection.loop.time() + connection.idle_s())
        if not await self.wait_closed(timeout_s):
            self.closing = True
            for connection in self.connections:
                connection.task.cancel()
            await self.wait_closed(GRACE_S)
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)  # lets the sockets go before the loop may end

    async def stop_listening(self) -> None:
        """Accepts the connections in the queues first: the system would reset them."""
        loop, made = asyncio.get_running_loop(), []
        sockets, self.sockets = self.sockets, ()
        with contextlib.suppress(NotImplementedError):  # Windows
            for listening in sockets:
                loop.remove_reader(listening.fileno())
        for _ in range(3):
            await asyncio.sleep(0)  # asyncio reports those it has accepted
        for listening, listener in zip(sockets, self.listeners):
            with contextlib.suppress(OSError):
                while True:
                    made.append(listening.accept()[0])
            listener.close()
        for accepted in made:
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(self.new_protocol, accepted)

    async def wait_closed(self, timeout_s: float | None) -> bool:
        if self.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.empty.wait(), timeout_s)
        return not self.connections


# --- 12.3 systemd ---
#
# It hands over listening sockets (sd_listen_fds(3)) and is told the state of the process (sd_notify(3)).

FIRST_HANDED_FD = 3


def systemd_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Removes the variables, so that no child sees them."""
    names = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    pid, count, _ = (environ.pop(name, "") for name in names)
    if pid != str(os.getpid()) or not re.fullmatch("[0-9]{1,4}", count):
        return []
    sockets = []
    for fd in range(FIRST_HANDED_FD, FIRST_HANDED_FD + int(count)):
        os.set_inheritable(fd, False)
        made = socket.socket(fileno=fd)
        if made.family not in (socket.AF_INET, socket.AF_INET6) or made.type != socket.SOCK_STREAM:
            raise ConfigError("The socket unit must listen on TCP, like: ListenStream=127.0.0.1:7663")
        sockets.append(made)
    return sockets


def with_address(config: ServerConfig, sockets: Sequence[socket.socket]) -> ServerConfig:
    """The address of the sockets: of several, one that other machines can reach."""
    if not sockets:
        return config
    host, port, *_ = min((made.getsockname() for made in sockets), key=lambda address: is_loopback(address[0]))
    return dataclasses.replace(config, host=host, port=port)


def notify(*states: str) -> None:
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.setblocking(False)
        made.sendto("\n".join(states).encode(), "\0" + path[1:] if path[0] == "@" else path)


def notify_reloading() -> None:
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_s(environ: Mapping[str, str]) -> float:
    """Half the interval of systemd's watchdog (sd_watchdog_enabled(3)); 0: it is off."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(usec) / 2e6 if re.fullmatch("[0-9]{1,15}", usec) and pid == str(os.getpid()) else 0.0


async def feed_watchdog() -> None:
    """A task of the loop: if the loop hangs, systemd restarts the gateway."""
    while interval_s := watchdog_s(os.environ):
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)


# --- 12.4 a running gateway ---

# Only a restart changes these: a running server keeps its port, and its ledger.
RESTART_ONLY = ("host", "port", "tls_cert", "tls_key", "workers", "log_format")


def merge_reloadable(old: Config, new: Config) -> Config:
    fixed = {name: getattr(old.server, name) for name in RESTART_ONLY}
    return dataclasses.replace(new, database=old.database, server=dataclasses.replace(new.server, **fixed))


ACCESS_LOG_S = 0.05  # a log record for each request costs as much as parsing it


class GatewayServer(Server):
    """Takes another configuration while it runs."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway.handle, gateway.config.server, self.log_request)
        self.gateway = gateway
        self.lines: list[tuple[float, str]] = []  # of the access log: time and text

    async def drain(self, timeout_s: float | None) -> None:
        await super().drain(timeout_s)
        self.flush_access_log()

    def log_request(self, client: Client, status: int) -> None:
        head = client.head
        if head.path.startswith("/admin") and status < 400 and not client.note:
            return  # an open dashboard asks every few seconds
        if not self.lines:
            asyncio.get_running_loop().call_later(ACCESS_LOG_S, self.flush_access_log)
        self.lines.append((time.time(), f"{status} {client.note or f'-  {sanitize(head.method)} {sanitize(head.path)}'}"))

    def flush_access_log(self) -> None:
        lines, self.lines = self.lines, []
        if lines:
            log.info("\n".join(text for _, text in lines), extra={"lines": lines})

    def reload(self, config: Config, models: Mapping[str, Sequence[str]] | None = None) -> None:
        """For new requests: those in progress keep the old settings. ConfigError: nothing was changed."""
        old = self.gateway
        if self.context is not None:  # a renewed certificate is used, a broken one refused
            tls_context(old.config.server)
            self.context.load_cert_chain(old.config.server.tls_cert, old.config.server.tls_key or None)
        fresh = Gateway(merge_reloadable(old.config, config), old.ledger, old.upstream, models or {}, old)
        old.upstream.contexts.clear()  # ca_file may be new, too
        self.use(fresh.config.server)
        self.gateway, self.handler = fresh, fresh.handle


def open_ledger(config: Config) -> contextlib.closing[Ledger]:
    database = config.database
    return contextlib.closing(Ledger.open(database.place, database.durability, database.max_unsaved))


@contextlib.asynccontextmanager
async def running(config: Config, ledger: Ledger | None = None, models: Mapping[str, Sequence[str]] | None = None,
                  sockets: Sequence[socket.socket] = (), accept: int = ACCEPT_STEP) -> AsyncIterator[GatewayServer]:
    """A gateway that serves while the block runs: `async with pomex.running(config) as server: ... server.address`.

    `models` are names that local servers have said, `accept` is how many connections are taken from `sockets` at once."""
    async with contextlib.AsyncExitStack() as stack:
        if ledger is None:
            ledger = stack.enter_context(open_ledger(config))
        ledger.start()
        upstream = ConnectionPool()
        stack.push_async_callback(upstream.close)
        gateway = Gateway(config, ledger, upstream, models or {})
        server = GatewayServer(gateway)
        await server.start(sockets, accept)
        stack.push_async_callback(server.drain, 0.0)
        yield server


# === 13. command line ===
#
# Results go to stdout, all else to stderr, so that pipes work. A line says what happened and, if it is bad, what
# to do. The first key is shown once and only on a terminal; elsewhere it goes to a file of mode 600.

UNAVAILABLE, NO_PERMISSION, BAD_CONFIG, INTERRUPTED = 69, 77, 78, 130   # sysexits.h; Windows lacks os.EX_*
PROBE_TIMEOUT_S = 0.3           # for a question to a port of this machine: a server there answers in a few ms
HEALTH_TIMEOUT_S = 5.0
PROBE_MAX_BYTES = 1 << 24       # Codex's catalogue has 20 KB a model
Args: TypeAlias = argparse.Namespace
ALWAYS_LISTED = ("openai", "anthropic", "google")       # providers named at start even without a key
SAME_GATEWAY: dict[str, str] = {}       # --config, --host and --port of this process, where given

# --- 13.1 configuration ---

def command(words: str) -> str:
    """A command for this program, to be typed as it is: with what this process was told, so it finds the same gateway."""
    own = os.path.basename(sys.argv[0]) == os.path.basename(globals().get("__file__", ""))      # else embedded, or from a pipe
    program = [sys.orig_argv[0], sys.argv[0]] if own else ["python3", "pomex.py"]
    flags = [word for name, value in SAME_GATEWAY.items() for word in (f"--{name}", value)]
    return f"{shlex.join([*program, *flags])} {words}"


def find_config(named: str, environ: Mapping[str, str]) -> str:
    """The path of the configuration file: the one that is named, else the first there is, else ""."""
    if named:
        return named
    home = environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return next((path for path in ("pomex.toml", f"{home}/pomex/pomex.toml") if os.path.isfile(path)), "")


def read_text(path: str) -> str:
    return pathlib.Path(path).read_text(encoding="utf-8-sig")      # Windows editors put a BOM before the text


def write_new(path: str | pathlib.Path, text: str) -> None:
    """A file for this user alone; FileExistsError where there is one."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8", newline="") as file:
        file.write(text)


def given(args: Args) -> JSON:
    return {name: value for name, value in vars(args).items() if value is not None}


def read_config(args: Args) -> Config:
    """The configuration by flags, environment, file and defaults, in this order."""
    path = find_config(getattr(args, "config", "") or os.environ.get("POMEX_CONFIG", ""), os.environ)
    try:
        text = read_text(path) if path else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"{path} cannot be read: {reason}.") from None
    config = load_config(text, path, os.environ, read_text)
    for provider in config.providers.values():
        try:
            if provider.ca_file:
                ssl.create_default_context(cafile=provider.ca_file)
        except OSError as error:            # ssl.SSLError is one
            raise ConfigError(f"{path}: [providers.{provider.name}] ca_file cannot be used: {describe_error(error)}.") from None
    flags = {name: value for name, value in given(args).items() if name in ("host", "port", "log_format")}
    return dataclasses.replace(config, server=dataclasses.replace(config.server, **flags))


def config_warnings(config: Config) -> list[str]:
    warnings = list(config.warnings)
    holds_key = any(provider.key_source == config.path != "" for provider in config.providers.values())
    if holds_key and os.name == "posix" and os.stat(config.path).st_mode & 0o077:
        warnings.append(f"{config.path} holds a key and others can read it; chmod 600 {config.path}")
    if config.providers.keys() <= {"demo"}:
        warnings.append("no provider is configured")
    if (address := config.database.postgres) and "disable" in address.parameters.get("sslmode", ""):
        warnings.append("[database] sslmode=disable: keys, usage and their secret go to the database in the clear")
    return warnings


# --- 13.2 this machine ---

@contextlib.asynccontextmanager
async def open_exchange(url: str, key: str, tls_cert: str, body: JSON | None = None) -> AsyncIterator[Exchange]:
    """A GET of this machine, or with a body a POST. OSError or GatewayError: there was no answer."""
    upstream, server = ConnectionPool(), ProviderConfig("Pomex", base_url=url)
    if tls_cert:            # the gateway has to show this very certificate, whatever name or authority it has
        upstream.contexts[""] = context = ssl.create_default_context(cafile=tls_cert)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    headers = [("content-type", "application/json"), *(WIRES["chat"].auth(key) if key else [])]
    method, data = ("POST", dumps(body).encode()) if body else ("GET", b"")
    try:
        exchange = await upstream.exchange(server, method, "", headers, data)
        yield exchange
        await exchange.close()
    finally:
        await upstream.close()


async def stream_events(url: str, key: str, body: JSON, tls_cert: str) -> AsyncIterator[tuple[str, JSON]]:
    """(type, data) of the events of a streamed answer; of a refusal one `error`."""
    async with open_exchange(f"{url}/v1/responses", key, tls_cert, {**body, "stream": True}) as exchange:
        if exchange.status != 200:
            yield "error", json.loads(await exchange.read_all(PROBE_MAX_BYTES))["error"]
            return
        decoder = SSEDecoder()
        while data := await exchange.read():
            for event in decoder.feed(data):
                if event.data != "[DONE]":
                    yield event.event, json.loads(event.data)


def describe_end(kind: str, last: JSON) -> str:
    """Why a stream that ended with this event did not complete."""
    response = last.get("response") or {"error": last}
    return str(as_dict(response.get("error")).get("message") or as_dict(response.get("incomplete_details")).get("reason")
               or f"ended with {kind or 'nothing'}")


async def get_json(url: str, timeout_s: float = PROBE_TIMEOUT_S, tls_cert: str = "", key: str = "") -> JSON:
    """The JSON object at an address of this machine; {} if none comes in time."""
    try:
        async with asyncio.timeout(timeout_s), open_exchange(url, key, tls_cert) as exchange:
            return parse_object((await exchange.read_all(PROBE_MAX_BYTES)).decode()) or {}
    except (OSError, ValueError, GatewayError):     # TimeoutError is an OSError
        return {}


async def running_version(server: ServerConfig, url: str = "", timeout_s: float = HEALTH_TIMEOUT_S) -> str:
    """The version of the Pomex at an address of this machine, else at its configured one; "" if there is none."""
    health = await get_json(f"{url or own_url(server)}/health", timeout_s, server.tls_cert)
    return str(health.get("version", "")) if health.get("status") == "ok" else ""


def public_url(server: ServerConfig, address: tuple[str, int]) -> str:
    """The gateway's own address, as a client on this machine would write it."""
    host, port = address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"{'https' if server.tls_cert else 'http'}://{host_and_port(host, port)}"


def own_url(server: ServerConfig) -> str:
    return public_url(server, (server.host, server.port))


async def with_detected(config: Config, no_detect: bool = False) -> tuple[Config, dict[str, list[str]]]:
    """(the configuration with the providers found here, the models of local servers). A configuration file names all
    providers; only without one Pomex looks for others. Keys are only read, the local ports are asked once, in parallel. No
    call leaves this machine."""
    if config.path or no_detect:
        return config, {}
    rows = [row for row in BUILTIN_PROVIDERS.values() if row.local]
    answers = await asyncio.gather(*(get_json(row.base_url + "/models") for row in rows))
    found = {row.name: [each["id"] for each in only_dicts(answer["data"]) if isinstance(each.get("id"), str)]
             for row, answer in zip(rows, answers) if isinstance(answer.get("data"), list)}
    local = {name: dataclasses.replace(BUILTIN_PROVIDERS[name], free=True) for name in found}
    providers = {**detect_providers(os.environ), **local, **config.providers}
    return dataclasses.replace(config, providers=providers), found


# --- 13.3 texts ---

def say(*lines: str) -> None:
    """To whoever started the program; of a server that logs JSON each line is a record of its log."""
    if any(isinstance(handler.formatter, JSONFormatter) for handler in log.handlers):
        for line in filter(None, map(str.strip, lines)):
            log.info("%s", line)
    else:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    print(dump_json(value))


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def time_span(seconds: float) -> str:
    """A length of time in one unit: 12 s, 2 min, 3 h, 5 d."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def home_short(path: str | pathlib.Path) -> str:
    home, path = os.path.expanduser("~"), str(path)
    return "~" + path[len(home):] if path.startswith(home + os.sep) else path


NUMBER_CELL = re.compile(r"[-0-9., ]+[%M]?|none")


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns; those of numbers, under their heading, to the right."""
    columns = []
    for column in zip(*rows):
        width, right = max(map(len, column)), len(column) > 1 and all(map(NUMBER_CELL.fullmatch, column[1:]))
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in column])
    return ["   ".join(row).rstrip() for row in zip(*columns)]


def print_row(args: Args, row: JSON, first: bool) -> None:
    if args.jsonl:
        print(dumps(row))
        return
    if first:
        print(csv_line(row))
    print(csv_line(dumps(cell) if isinstance(cell, (dict, list)) else cell for cell in row.values()))


def print_rows(args: Args, rows: Sequence[JSON], columns: Callable[[JSON], Mapping[str, str]]) -> None:
    """As --json, --csv or --jsonl; else as a table, of which `columns` gives a row: heading -> text."""
    table = [columns(row) for row in rows]
    if args.json:
        print_json(rows)
    elif args.csv or args.jsonl:
        for row in rows:
            print_row(args, row, row is rows[0])
    elif table:
        print(*table_lines([[*table[0]], *([*row.values()] for row in table)]), sep="\n")
    else:
        say("There are none.")


def spaced(count: int) -> str:
    return f"{count:,}".replace(",", " ")


def provider_lines(config: Config, found: Mapping[str, Sequence[str]], detected: bool) -> list[str]:
    """One line a provider: those that are ready, and where Pomex looked for some, those that might be."""
    rows = []
    for name in dict.fromkeys([*(BUILTIN_PROVIDERS if detected else ()), *config.providers]):
        row = config.providers.get(name) or BUILTIN_PROVIDERS[name]
        state, text, key = "ready", f"{row.base_url}, no key, not contacted", row.api_key
        if row.wire_api == "demo":
            text = "works offline and costs nothing: demo/echo"
        elif name in found:
            text = f"{row.base_url.removesuffix('/v1')}, {plural(len(found[name]), 'model')}"
        elif key:
            source = row.key_source.removeprefix("env:") + (f" (…{key[-3:]})" if len(key) >= 20 else "")
            text = f"key from {source}, not contacted"
        elif name not in config.providers and row.local:
            state, text = "not found", row.base_url.removesuffix("/v1")
        elif name not in config.providers:
            state, text = "no key", f"export {row.env_key}=..."
        if state != "no key" or name in ALWAYS_LISTED:
            rows.append((name, state, text))
    return [f"  {line}" for line in table_lines(rows)]


def listed_models(config: Config, found: Mapping[str, Sequence[str]]) -> dict[str, list[tuple[ProviderConfig, str]]]:
    """Every model that is known by name: its targets (provider, name there) in the order they are tried."""
    catalogue, models = ModelCatalog(config, found), {}
    for name in catalogue.names:
        with contextlib.suppress(BadRequest):       # described, but of a provider that is not configured
            models[name] = catalogue.targets(name)
    return models


# --- 13.4 serve ---

class LineFormatter(logging.Formatter):
    """A line for each of a record's `lines` (of the access log), or for its message."""
    process = ""            # of several: its id

    def format(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        lines = getattr(record, "lines", [(record.created, record.getMessage())])
        return "\n".join(self.line(record, time_s, text, trace) for time_s, text in lines)

    def line(self, record: logging.LogRecord, time_s: float, text: str, trace: str) -> str:
        return f"{clock_text(int(time_s))} {self.process}{text}" + ("\n" + trace if trace else "")


class JSONFormatter(LineFormatter):
    """One JSON object a line."""

    def line(self, record: logging.LogRecord, time_s: float, text: str, trace: str) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time_s))
        members = {"time": f"{moment}.{int(time_s % 1 * 1000):03}Z", "level": record.levelname.lower(), "pid": record.process,
                   "message": text, **({"traceback": trace} if trace else {})}
        return json.dumps(members, ensure_ascii=False)


@functools.lru_cache(1)
def clock_text(time_s: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time_s))


def set_up_logging(log_format: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if log_format == "json" else LineFormatter())
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def first_key_lines(token: str, database: str) -> list[str]:
    """The first key: shown on a terminal; without one (systemd, Docker) written beside the database."""
    if sys.stderr.isatty():
        return ["First API key, shown once:", f'  export POMEX_API_KEY="{token}"']
    path = os.path.join(os.path.dirname(database), "first-key")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    write_new(path, token + "\n")
    return [f"First API key written to {home_short(path)} (only you can read it). In the shell that starts Codex:",
            f'  export POMEX_API_KEY="$(cat {shlex.quote(path)})"']


async def announce(config: Config, found: Mapping[str, Sequence[str]], detected: bool, is_new: bool, url: str,
                   ledger: Ledger) -> None:
    ledger.notes[f"gateway/{ledger.host} {url}"] = f"{os.getpid()} {ledger.began}"      # for `reload`
    with contextlib.suppress(LedgerError):
        await ledger.save_counts()
    said = f"Config {home_short(config.path)}." if config.path else "No config file; using defaults."
    shared = config.database.postgres
    path = shared.name if shared else home_short(config.database.place)
    say(f"Pomex {VERSION} on Python {sys.version.split()[0]}. {said}", "",
        "Providers", *provider_lines(config, found, detected),
        f"Database      {path}{' (created, only you can read it)' if is_new else ''}")
    if ledger.list_keys() or shared:
        say(f"Keys          {count_active_keys(ledger)} active. New one: {command('keys create NAME')}")
    else:
        say("", *first_key_lines(await ledger.create_key("first", ledger.now_s(), command_line_user()), config.database.place),
            "", f"Codex: put this into ~/.codex/config.toml, or run: {command('codex --write')}",
            re.sub("(?m)^(?=.)", "  ", agent_settings(CODEX_AGENT, url, best_model(ModelCatalog(config, found)))),
            "", 'Then, in another terminal: codex "What is 2 + 2?"', f"Other agents: {command('connect AGENT')}")
    warnings = config_warnings(config) if config.path else []
    if not is_loopback(config.server.host):
        warnings.append("Anybody on this network can reach Pomex. Keys are required on every call"
                        + ("." if config.server.tls_cert else "; put TLS in front, or set tls_cert and tls_key."))
        if not config.server.public_hosts:
            warnings.append("The dashboard opens only under the names in [server] public_hosts, and on this machine.")
    if (fit := connections_allowed_by_files()) < config.server.max_connections:
        warnings.append(f"{fit} connections at once, not max_connections = {config.server.max_connections}: this process may "
                        "open no more files (ulimit -n).")
    several = f", {config.server.workers} workers" if config.server.workers > 1 else ""
    # the link itself is a secret, for a terminal only
    dashboard = f"{await login_link(ledger, url)} (one use, 10 minutes)" if sys.stderr.isatty() else (
        f"{url}/admin (log in with a link: {command('admin-url')})")
    say(*(f"Warning       {warning}" for warning in warnings), "", f"Dashboard     {dashboard}",
        f"Listening on  {url}{several}   Ctrl-C stops it")


def allow_files() -> None:
    """As many open files as the system lets us have: a stream takes two, and shells often give 1,024."""
    if sys.platform != "win32":
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(ValueError, OSError):      # macOS calls a number unlimited that it does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def run_serve(args: Args) -> int:
    config = read_config(args)
    allow_files()
    set_up_logging(config.server.log_format)
    handed = systemd_sockets(os.environ)
    if config.server.workers > 1 and not hasattr(signal, "sigtimedwait"):
        raise ConfigError("[server] workers: more than one process needs Linux.")

    async def reread() -> tuple[Config, Mapping[str, Sequence[str]]]:
        fresh = read_config(args)
        if config.path and not fresh.path:
            raise ConfigError("it is gone.")
        return await with_detected(dataclasses.replace(fresh, server=with_address(fresh.server, handed)), args.no_detect)

    is_new = not config.database.postgres and not os.path.exists(config.database.place)
    detected = not config.path and not args.no_detect
    config, found = asyncio.run(reread())
    tls_context(config.server)
    try:
        sockets = handed or asyncio.run(listen(config.server))
    except OSError as error:
        code, sentence = asyncio.run(explain_listen_error(error, config.server))
        say(sentence)
        return code
    address = sockets[0].getsockname()[:2]
    if "port" in SAME_GATEWAY:
        SAME_GATEWAY["port"] = str(address[1])          # 0 took a free one
    url = public_url(config.server, address)
    announcing = functools.partial(announce, config, found, detected, is_new, url)
    if config.server.workers == 1:
        return asyncio.run(serve(config, found, sockets, reread, announcing))
    parent = Workers(config, found, sockets, reread)
    parent.block_signals()
    with open_ledger(config) as ledger:     # no database may be open when a process forks
        asyncio.run(announcing(ledger))
    settle_memory()
    return parent.run()


async def serve(config: Config, found: Mapping[str, Sequence[str]], sockets: Sequence[socket.socket], reread: Reread,
                announce: Callable[[Ledger], Awaitable[None]]) -> int:
    asyncio.get_running_loop().set_exception_handler(log_loop_error)
    with open_ledger(config) as ledger:
        async with running(config, ledger, found, sockets) as server:
            signals = install_signal_handlers()        # before anybody reads that it listens
            await announce(ledger)
            settle_memory()
            notify("READY=1")
            feeding = asyncio.create_task(feed_watchdog())
            code = await until_stopped(server, signals, lambda: reload(
                server.gateway.config, reread, server.reload, server.open_requests, lambda: contextlib.nullcontext(ledger)))
            feeding.cancel()
            return code


def log_loop_error(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """What asyncio itself met, like a socket that could not be accepted: in the log, without paths."""
    error = context.get("exception")
    reason = "" if error is None else describe_error(error) if isinstance(error, OSError) else fault_location(error)
    log.error("%s: %s", context["message"], reason)


def settle_memory() -> None:
    """Objects made so far stay: not scanned, collections can be rare (7 % less CPU a request). Not too rare: failed
    connections leave cycles, which hold unsent data."""
    gc.freeze()
    gc.set_threshold(10_000, 5, 5)
    sys.setswitchinterval(SWITCH_S)


def stopping_sentence(streams: int, drain_timeout_s: float) -> str:
    return (f"Stopping: {plural(streams, 'stream')} open"
            + (f", waiting up to {drain_timeout_s:g} s (Ctrl-C again to cut)." if streams else "."))


HANG_UP: signal.Signals | None = getattr(signal, "SIGHUP", None)        # Windows has none
STOP_SIGNALS = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, HANG_UP)))


def install_signal_handlers() -> asyncio.Queue[int]:
    loop, signals = asyncio.get_running_loop(), asyncio.Queue[int]()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda got, frame: loop.call_soon_threadsafe(signals.put_nowait, got))
    return signals


async def until_stopped(server: Server, signals: asyncio.Queue[int], reload: Callable[[], Awaitable[None]]) -> int:
    """Waits for a stop signal, then for the open streams; a second signal ends them at once."""
    on_terminal = sys.stderr.isatty()
    while await signals.get() == HANG_UP and on_terminal == sys.stderr.isatty():
        await reload()          # if the terminal itself is gone it is the end
    if HANG_UP is not None:
        signal.signal(HANG_UP, signal.SIG_IGN)
    drain_timeout_s = server.config.drain_timeout_s
    notify("STOPPING=1")
    say(stopping_sentence(server.open_requests, drain_timeout_s))
    if not await drain_until_signal(server, signals):
        return INTERRUPTED
    say("Stopped.")
    return 0


async def drain_until_signal(server: Server, signals: asyncio.Queue[int]) -> bool:
    """Waits for the open requests, at most drain_timeout_s. False: another signal came, to end them at once."""
    draining = asyncio.create_task(server.drain(server.config.drain_timeout_s))
    again = asyncio.create_task(signals.get())
    done, waiting = await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    return draining in done


async def explain_listen_error(error: OSError, server: ServerConfig) -> tuple[int, str]:
    """(exit code, sentence) for a server that could not start."""
    port = server.port
    if error.errno == errno.EACCES and port < 1024:
        return NO_PERMISSION, f"Port {port} needs privileges. Use a reverse proxy, or systemd socket activation (README.md)."
    if error.errno != errno.EADDRINUSE:
        return UNAVAILABLE, f"Cannot listen on {server.host} port {port}: {error.strerror or error}."
    version = await running_version(server, timeout_s=PROBE_TIMEOUT_S)
    said = f"another Pomex {version}. Use that one, or:" if version else "another program. Use another:"
    SAME_GATEWAY["port"] = str(port + 1) if port < 65535 else "7663"
    return UNAVAILABLE, f"Port {port} is taken by {said} {command('serve')}"


# --- 13.5 check and models ---

def run_check(args: Args) -> int:
    config, _ = asyncio.run(with_detected(read_config(args)))
    rows = [(config.path or "(no file)", f"ok, {plural(len(config.providers), 'provider')}, "
             f"{plural(len(config.models), 'model')} described")]
    answers = asyncio.run(contact_all(config)) if args.live else {}
    for name, provider in config.providers.items():
        state = "set" if provider.key_source.startswith("env:") else "readable"
        said = f"key from {provider.key_source}, {state}" if provider.api_key else provider.base_url or "works offline"
        rows.append((f"  {name}", said + answers.get(name, "")))
    rows += [(f"  {name}", " -> ".join(" | ".join(map(":".join, tier)) for tier in model.targets))
             for name, model in config.models.items() if model.targets]
    warnings = [*config_warnings(config), *unpriced(config)]
    rows += [("warning", warning) for warning in warnings]
    errors = sum(answer != ANSWERS for answer in answers.values())
    print(*table_lines(rows), f"{plural(len(warnings), 'warning')}, {plural(errors, 'error')}"
          + ("" if args.live else "            (add --live to contact each provider)"), sep="\n")
    return 1 if errors else 0


def unpriced(config: Config) -> list[str]:
    book = PriceTable(config)
    targets = {(provider.name, model): name for name, tried in listed_models(config, {}).items() for provider, model in tried}
    return [f"{provider}/{model} has no price: refused to keys with a budget, billed 0 to others"
            for (provider, model), name in targets.items() if book.schedule(provider, model, name) is None]


ANSWERS = ", it answers"


async def contact_all(config: Config) -> dict[str, str]:
    """provider -> whether it answers, else what is wrong."""
    upstream = ConnectionPool()
    providers = [provider for provider in config.providers.values() if provider.wire_api != "demo"]
    errors = await asyncio.gather(*(contact(upstream, provider) for provider in providers), return_exceptions=True)
    await upstream.close()
    return {provider.name: f", error: {error}" if isinstance(error, BaseException) else ANSWERS
            for provider, error in zip(providers, errors)}


PRICE_COLUMNS = ("input", "output", "cache_read", "cache_write", "cache_write_1h", "search_per_1000")


def run_models(args: Args) -> None:
    config, found = asyncio.run(with_detected(read_config(args)))
    catalogue, book = ModelCatalog(config, found), PriceTable(config)
    rows: list[JSON] = []
    for name, targets in listed_models(config, found).items():
        first, model = targets[0]
        schedule = book.schedule(first.name, model, name)
        rows.append({"model": name, "providers": list(dict.fromkeys(provider.name for provider, _ in targets)),
                     "context_window": catalogue.facts(name).context_window or None,
                     "price": dict(zip(PRICE_COLUMNS, schedule.base.split())) if schedule else None})

    def columns(row: JSON) -> dict[str, str]:
        price = row["price"] or dict.fromkeys(PRICE_COLUMNS, "-")
        return {"MODEL": row["model"], "PROVIDERS": ", ".join(row["providers"]), "IN/1M": price["input"],
                "CACHED": price["cache_read"], "OUT/1M": price["output"],
                "CONTEXT": spaced(row["context_window"]) if row["context_window"] else "-",
                "STATE": "ready" if row["price"] else "ready, no price"}
    print_rows(args, rows, columns)
    for name, provider in config.providers.items():
        if "*" in provider.models and name not in found and name != "demo":
            say(f"and any other model of {name}, as {name}/NAME")


# --- 13.6 keys, accounts and bills ---

def of_ledger(run: Callable[[Ledger, Args], Coroutine[Any, Any, int | None]]) -> Callable[[Args], int | None]:
    def run_with(args: Args) -> int | None:
        with open_ledger(read_config(args)) as ledger:
            return asyncio.run(run(ledger, args))
    return run_with


def command_line_user() -> str:
    """For the audit log."""
    try:
        return f"{getpass.getuser()} (cli)"
    except (OSError, KeyError):         # a user id without a name
        return f"user {os.getuid()} (cli)"


def describe_limits(key: Key) -> str:
    """`50.00 USD a month, models openai/*`"""
    period = "in total" if key.period == "total" else f"a {key.period}"
    rates = ((key.rpm, "requests a minute"), (key.tpm, "tokens a minute"), (key.concurrent, "at once"))
    return ", ".join(filter(None, (
        f"{format_usd(key.budget_nanos)} USD {period}" if key.budget_nanos is not None else "",
        f"models {', '.join(key.models.split())}" if key.models else "",
        *(f"{most} {what}" for most, what in rates if most),
        "models without a price too" if key.allow_unpriced else "",
        f"account {key.account}" if key.account_id != 1 else "",
        f"until {utc_minute(key.expires_s)} UTC" if key.expires_s else "")))


async def show_key(ledger: Ledger, args: Args, result: JSON) -> None:
    """A key that was just created, edited or revoked."""
    key = next(key for key in reversed(ledger.list_keys()) if key.name == args.name)
    limits = describe_limits(key)
    if "token" in result:
        print(result["token"], flush=True)
        say(f"Key {key.name} created{': ' * bool(limits)}{limits}. It is not shown again.")
    elif key.revoked_s:
        say(f"Key {key.name} ({key.hint}) revoked. Requests in progress will finish.")
    else:
        say(f"Key {key.name} ({key.hint}): {limits or 'no limits'}.")


def format_limit(nanos: int | None) -> str:
    return "none" if nanos is None else format_usd(nanos)


def describe_use(row: JSON) -> str:
    """A key's state, or how much of its budget is used where that is nearly all."""
    spent, budget, state = row["spent_nanos"], row["budget_nanos"], str(row["state"])
    return f"{spent * 100 // budget} % used" if state == "active" and budget and spent * 5 >= budget * 4 else state


@of_ledger
async def run_keys_list(ledger: Ledger, args: Args) -> None:
    now_s = time.time()
    rows = [{**row, "key": row["hint"], "expires_at": row["expires_s"] or None, "revoked_at": row["revoked_s"] or None,
             "state": ledger.keys[row["id"]].state(now_s)} for row in await key_rows(ledger, now_s)]
    rows.sort(key=operator.itemgetter("id"))
    print_rows(args, rows, lambda row: {
        "NAME": row["name"], "KEY": row["key"], "MODELS": row["models"].replace(" ", ",") or "all",
        "SPENT": format_usd(row["spent_nanos"]),
        "BUDGET": format_limit(row["budget_nanos"]) + f"/{row['period']}" * (row["budget_nanos"] is not None),
        "LAST USED": time_span(now_s - row["last_ms"] / 1000) + " ago" if row["last_ms"] else "never",
        "STATE": describe_use(row)})


async def show_new_account(ledger: Ledger, args: Args, result: JSON) -> None:
    say(f"Account {args.name} created. Give it a key: {command(f'keys create NAME --account {args.name}')}")


async def show_credit(ledger: Ledger, args: Args, result: JSON) -> None:
    say(f"{'Adjustment' if args.reason else 'Top-up'} of {format_usd(args.amount)} USD entered for account {args.name}.")


@of_ledger
async def run_accounts_list(ledger: Ledger, args: Args) -> None:
    rows = [{**row, "balance_usd": format_usd(row["credit_nanos"] - row["spent_nanos"], 9)}
            for row in await list_accounts(ledger.db, ledger.now_s())]
    print_rows(args, rows, lambda row: {
        "NAME": row["name"], "KIND": "prepaid" if row["prepaid"] else "open" if row["limit_nanos"] is None else "monthly",
        "THIS MONTH": format_usd(row["month_nanos"]), "LIMIT": format_limit(row["limit_nanos"]),
        "BALANCE": format_usd(row["credit_nanos"] - row["spent_nanos"]), "PRICES": f"x {row['multiplier'] / ONE:g}"})


def no_price(row: JSON) -> str:
    if not row["unpriced"]:
        return ""
    return "no price" if row["unpriced"] == row["requests"] else f"{spaced(row['unpriced'])} without a price"


def millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 100_000 else spaced(count)


@of_ledger
async def run_usage(ledger: Ledger, args: Args) -> None:
    rows = await usage_report(ledger.db, args.by, args.since, int(time.time()) // 86400)
    if not (args.json or args.csv or args.jsonl):
        rows.append({args.by: "total", **{name: sum(row[name] for row in rows) for name in SUMS}})
    print_rows(args, rows, lambda row: {
        args.by.upper(): str(row[args.by]) or "-", "REQUESTS": spaced(row["requests"]), "INPUT": millions(row["input"]),
        "CACHED": f"{100 * row['cached'] / row['input']:.1f} %" if row["input"] else "-", "OUTPUT": millions(row["output"]),
        "USD": format_usd(row["cost_nanos"]), "": no_price(row)})


async def show_statement(ledger: Ledger, args: Args, bill: JSON) -> None:
    first, last = (day_text(bill[name]) for name in ("first_day", "last_day"))
    if args.json:
        print_json({"account": args.account, **bill, "first_day": first, "last_day": last})
        return
    entries, counts = bill["credits"], ("requests", "input", "cached", "cache_write", "output")
    costs = whole_cents([row["cost_nanos"] for row in bill["charges"]])
    total = {"model": "total", **{name: sum(row[name] for row in bill["charges"]) for name in (*counts, "unpriced")}}
    rows = [["MODEL", "REQUESTS", "INPUT", "CACHED", "WRITTEN", "OUTPUT", "USD", ""]]
    for row, cost in zip([*bill["charges"], total], [*costs, sum(costs)]):
        rows.append([row["model"], *(spaced(row[name]) for name in counts), format_usd(cost), no_price(row)])
    print(f"Statement of account {args.account}, {first} to {last} (UTC), in USD", "", *table_lines(rows), sep="\n")
    if entries or bill["before_nanos"]:
        steps = whole_cents([bill["before_nanos"], *(entry["nanos"] for entry in entries), -bill["spent_nanos"]])
        names = ["balance before", *(f"{utc_minute(entry['created_s'])[:10]} {entry['kind']} {entry['reason']}".rstrip()
                                     for entry in entries), "charges above", "balance after"]
        print("", *table_lines([*zip(names, map(format_usd, (*steps, sum(steps))))]), sep="\n")


def whole_cents(nanos: Sequence[int]) -> list[int]:
    return [cents * 10**7 for cents in round_preserving_sum(nanos, 10**7)]


def run_prices_show(args: Args) -> None:
    """The table has the basic prices alone, JSON and the others all that is known."""
    rows = [{"model": name, **schedule._asdict()} for name, schedule in sorted(PriceTable(read_config(args)).known.items())]
    headings = ("USD PER MILLION", "INPUT", "OUTPUT", "CACHED", "WRITE", "LONG WRITE", "1000 SEARCHES", "SOURCE")
    print_rows(args, rows, lambda row: dict(zip(headings, [
        row["model"], *f"{row['base']} -".split()[:6], row["source"].partition(" in ")[2]])))


@of_ledger
async def run_verify(ledger: Ledger, args: Args) -> int:
    checked, wrong = await verify(ledger.db)
    if args.json:
        print_json({"lines": checked, "wrong": wrong})
    else:
        print(*wrong[:100], f"{spaced(checked)} lines computed again, {plural(len(wrong), 'problem')}.", sep="\n")
    return min(len(wrong), 1)


@of_ledger
async def run_export(ledger: Ledger, args: Args) -> None:
    first = True
    async for row in rows_in_pages(ledger.db, args.since * DAY_MS):
        print_row(args, row, first)
        first = False


@of_ledger
async def run_prune(ledger: Ledger, args: Args) -> None:
    gone = await prune(ledger, args.older)
    say(f"{spaced(gone)} rows from before {day_text(args.older)} deleted; the sums of their half hours stay.")


@of_ledger
async def run_audit(ledger: Ledger, args: Args) -> None:
    print_rows(args, await audit_rows(ledger.db, limit=MAX_NUMBER, since_ms=args.since * DAY_MS), lambda row: {
        "UTC": utc_minute(row["time_ms"] // 1000), "WHO": row["who"], "WHAT": row["action"], "NAME": row["name"],
        "CHANGE": ", ".join(f"{name} {row['before'].get(name, '')} -> {value}" for name, value in row["after"].items())})


@of_ledger
async def run_backup(ledger: Ledger, args: Args) -> None:
    ledger.db.copy(args.file)
    say(f"Copied to {args.file} (only you can read it).")


def run_db_copy(args: Args) -> None:
    """With the gateways stopped: what they write meanwhile stays behind."""
    source = ConfigFile("", "db copy", os.environ, read_text)
    ours, theirs = (DatabaseConfig(database_url(source, url)) for url in (args.source, args.target))
    if ours.postgres is None:
        os.stat(ours.place)         # opening would make it
    with contextlib.closing(open_database(ours.place)) as old, contextlib.closing(open_database(theirs.place)) as new:
        for db in (old, new):
            db.migrate()
        counts = copy_database(old, new)
    print(*table_lines([(table, spaced(count)) for table, count in counts.items()]), sep="\n")
    say(f"Copied from {old.name} to {new.name}, and compared row by row. Now set [database] url.")


# --- 13.7 the first five minutes ---

async def login_link(ledger: Ledger, url: str) -> str:
    return f"{url}/admin#login={await open_session(ledger.db, 'link', 0, LOGIN_LINK_S, ledger.now_s())}"


def run_admin_url(args: Args) -> None:
    config = read_config(args)
    with open_ledger(config) as ledger:
        print(asyncio.run(login_link(ledger, own_url(config.server))))
    say("It opens the dashboard once, within ten minutes.")
    asyncio.run(look_for_gateway(config))


async def look_for_gateway(config: Config) -> str:
    """Its version; "" if none answers, which is said."""
    version = await running_version(config.server)
    if not version:
        say(f"No gateway answers at {own_url(config.server)}. Start it in another terminal: {command('serve')}")
    return version


def run_init(args: Args) -> None:
    """Never overwrites."""
    config, _ = asyncio.run(with_detected(load_config("", "", os.environ, read_text)))
    if os.path.lexists(args.file):
        raise BadRequest(f"{args.file} already exists; nothing was written.")
    url = "env:POMEX_DATABASE_URL" if config.database.postgres else config.database.url  # with a password in it, perhaps
    lines = ["# Every key with its meaning and default: pomex.toml.example. A provider is a table like [providers.openai].", "",
             "[database]", f"url = {json.dumps(url)}"]
    providers = [provider for provider in config.providers.values() if provider.wire_api != "demo"]
    for provider in providers:
        keys = ("env_key",) if provider.env_key else ("base_url", "wire_api", "free")
        lines += ["", f"[{toml_name(('providers', provider.name))}]"]
        lines += [f"{key} = {json.dumps(getattr(provider, key))}" for key in keys]
    write_new(args.file, "\n".join([*lines, ""]))
    if args.file != "pomex.toml":
        SAME_GATEWAY["config"] = args.file
    say(f"Wrote {args.file} (mode 600, {plural(len(providers), 'provider')} found). Check it: {command('check')}")


# connect

KeyPath: TypeAlias = tuple[str, ...]


def agent_home(agent: Agent = CODEX_AGENT) -> pathlib.Path:
    return pathlib.Path(os.environ.get(agent.variable) or os.path.expanduser(agent.home))


def settings_leaves(agent: Agent, text: str) -> dict[KeyPath, Any]:
    """key path -> value, of everything that is not a table, in JSON also of empty ones."""
    is_toml = agent is CODEX_AGENT

    def walk(path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, Any]]:
        if not isinstance(value, dict) or (path and not value and not is_toml):
            yield path, value
            return
        for key, inner in value.items():
            yield from walk((*path, key), inner)
    return dict(walk((), tomllib.loads(text.removeprefix("\ufeff")) if is_toml else json.loads(text or "{}")))


def own_keys(agent: Agent) -> set[KeyPath]:
    """The keys and tables of the agent's file that are Pomex's."""
    return {path[:2] for path in settings_leaves(agent, agent.settings)}


def json_text(leaves: Mapping[KeyPath, Any]) -> str:
    """AttributeError, TypeError or ValueError: they do not fit together."""
    tables: JSON = {}
    for (*folders, last), value in leaves.items():
        table = tables
        for name in folders:
            table = table.setdefault(name, {})
        table[last] = value
    return dump_json(tables) + "\n"


def toml_statements(text: str, own: Collection[KeyPath]) -> Iterator[tuple[bool, str]]:
    """(is it about own keys?, text) of each header, pair and comment, with its newline and blank lines before it."""
    header = statement = ""
    for line in re.findall(r"[^\n]*\n|[^\n]+", text.removeprefix("\ufeff")):
        statement += line
        if not statement.strip():
            continue
        is_header = statement.lstrip().startswith("[")
        with contextlib.suppress(tomllib.TOMLDecodeError):      # else a value of several lines goes on
            tomllib.loads(statement)
            header = statement if is_header else header
            paths = settings_leaves(CODEX_AGENT, f"{header}\n_ = 0" if is_header else f"{header}\n{statement}")
            yield any(path[:2] in own for path in paths), statement
            statement = ""
    yield False, statement


def toml_text(text: str, own: Collection[KeyPath], values: Mapping[KeyPath, Any]) -> str:
    """The text with these values of Codex's own keys: those of the top before all else, the table behind all else."""
    line_end = "\r\n" if "\r\n" in text else "\n"
    top: list[str] = []
    table = ["", "[model_providers.pomex]"]
    for path, value in values.items():
        block = table if path[2:] else top
        block.append(f"{toml_name(path[2:] or path)} = {json.dumps(value, ensure_ascii=False, default=str)}")
    body = "".join(statement for ours, statement in toml_statements(text, own) if not ours)
    body += line_end * (body[-1:] not in ("\n", ""))
    before, after = (line_end.join([*lines, ""]) for lines in (top, table if table[2:] else []))
    return "\ufeff" * text.startswith("\ufeff") + before + body + after


def with_settings(agent: Agent, path: pathlib.Path, text: str, values: dict[KeyPath, Any]) -> str:
    """The text of the file with these values of its own keys, and no other; all else stays."""
    own = own_keys(agent)
    wanted = {name: value for name, value in (settings_leaves(agent, text) | values).items()
              if name in values or name[:2] not in own}
    with contextlib.suppress(AttributeError, TypeError, ValueError):        # TOMLDecodeError is a ValueError
        changed = toml_text(text, own, values) if agent is CODEX_AGENT else json_text(wanted)
        if settings_leaves(agent, changed) == wanted:
            return changed
    raise unsafe_file(agent, path, "has a form that cannot be changed safely here")


def has_settings(agent: Agent, found: Mapping[KeyPath, Any]) -> bool:
    """Are they Pomex's? Then they refer to its key."""
    return "POMEX_API_KEY" in str([found.get(path) for path in settings_leaves(agent, agent.settings)])


def connect_words(agent: Agent) -> str:
    return "connect " * (agent is not CODEX_AGENT) + agent.name


def unsafe_file(agent: Agent, path: pathlib.Path, reason: str) -> ConfigError:
    return ConfigError(f"{home_short(path)} {reason}; nothing was changed. Edit it by hand. Pomex's lines are those that "
                       f"this prints: {command(connect_words(agent))}")


def read_settings(agent: Agent, path: pathlib.Path) -> tuple[str, dict[KeyPath, Any]]:
    """(text, leaves) of a file; nothing if there is none. ConfigError if it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(f"{home_short(path)} is not a regular file. Nothing was changed.")
        text = path.read_bytes().decode()
        return text, settings_leaves(agent, text)
    except FileNotFoundError:
        return "", {}
    except (ValueError, RecursionError) as error:       # UnicodeDecodeError is a ValueError
        raise unsafe_file(agent, path, f"is not {'TOML' if agent is CODEX_AGENT else 'JSON'}: {error}") from None


def replace_file(path: pathlib.Path, text: str) -> None:
    """Whole or not at all, with the mode that it had; a new one is for this user alone."""
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        write_new(fresh, text)
        with contextlib.suppress(FileNotFoundError):
            os.chmod(fresh, stat.S_IMODE(os.stat(path).st_mode))
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def kept_copies(path: pathlib.Path) -> list[pathlib.Path]:
    """The copies beside a file, the newest last."""
    copies = [each for each in path.parent.iterdir() if each.name.startswith(f"{path.name}.pomex-bak") and each.is_file()]
    return sorted(copies, key=os.path.getmtime)


def keep_copy(path: pathlib.Path, text: str) -> str:
    """The name of the newest copy, which has this text: a new one, or one that had it already."""
    names = (path.with_name(f"{path.name}.pomex-bak" + f".{number}" * (number > 0)) for number in itertools.count())
    same = (each for each in kept_copies(path) if each.read_bytes() == text.encode())
    copy = next(same, None) or next(each for each in names if not os.path.lexists(each))
    replace_file(copy, text)
    return copy.name


def change_file(path: pathlib.Path, now: str, after: str) -> None:
    """Shows what changes and does it."""
    say(*difflib.unified_diff(now.splitlines(), after.splitlines(), home_short(path), "after", "", "", 2, ""), "")
    if after.strip("\ufeff\r\n"):
        replace_file(path, after)
    else:
        path.unlink()


def write_settings(agent: Agent, path: pathlib.Path, settings: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    now, found = read_settings(agent, path)
    own, known = own_keys(agent), settings_leaves(agent, agent.settings)
    more = {name: value for name, value in found.items() if name[:2] in own and name not in known}     # put there by others
    after = with_settings(agent, path, now, {**more, **settings_leaves(agent, settings)})
    if settings_leaves(agent, after) == found:
        say(f"{home_short(path)} is already up to date.")
        return
    kept = ""
    if (now or kept_copies(path)) and not has_settings(agent, found):       # as its user had it; for no file an empty one
        kept = f" The file before this is kept beside it as {keep_copy(path, now)}."
    change_file(path, now, after)
    profile = " --profile" * (path.name == "pomex.config.toml")
    say(f"Wrote {home_short(path)}.{kept} To undo: {command(f'{connect_words(agent)} --undo{profile}')}")
    if not os.environ.get("POMEX_API_KEY"):
        say(f"Now export POMEX_API_KEY in the shell that starts {agent.name}. A new key: {command('keys create NAME')}")


def undo_settings(agent: Agent, path: pathlib.Path) -> int:
    """What was replaced comes back from the newest copy: if nothing else has changed since, that very text."""
    now, found = read_settings(agent, path)
    if not has_settings(agent, found):
        say(f"Nothing to undo: {home_short(path)} has no block that {connect_words(agent)} --write made.")
        return 1
    copies = kept_copies(path)
    before, old = read_settings(agent, copies[-1]) if copies else ("", {})
    own = own_keys(agent)
    after = with_settings(agent, path, now, {name: value for name, value in old.items() if name[:2] in own})
    if with_settings(agent, path, now, {}) == with_settings(agent, path, before, {}):
        after = before
    change_file(path, now, after)
    say(f"Pomex's settings are out of {home_short(path)}.")
    return 0


def run_connect(args: Args) -> int:
    agent = AGENTS[args.agent]
    path = agent_home(agent) / ("pomex.config.toml" if args.profile else agent.file)
    path = pathlib.Path(os.path.realpath(path))         # dotfiles are often links into a repository
    if not agent.file and (args.write or args.undo):
        raise BadRequest(f"{agent.name} takes its settings from a shell, not from a file: {command(connect_words(agent))}")
    if args.undo:
        return undo_settings(agent, path)
    config, found = asyncio.run(with_detected(read_config(args)))
    catalogue = ModelCatalog(config, found)
    model = args.model or best_model(catalogue)
    try:
        catalogue.tiers(model)
    except BadRequest as error:
        say(f"{error} A model that can be used: {best_model(catalogue)}")
        if config.path or error.code != "provider_not_configured":      # the gateway may have a key that this shell has not
            return 1
    settings = agent_settings(agent, own_url(config.server), model)
    if not (args.write or args.profile or args.run):
        place = f"For {home_short(path)}; to put it there: {command(connect_words(agent))} --write"
        say(place if agent.file else "For a shell:")
        print(settings)
        return 0
    if not args.run:
        write_settings(agent, path, settings)
    asyncio.run(look_for_gateway(config))
    if args.run:
        return start_codex(config, settings, args.prompt)
    if args.profile:
        say(f"Start it with: codex --profile pomex. Codex 0.128.0 reads no such file; there: {command('codex --run')}")
    return 0


def start_codex(config: Config, settings: str, arguments: Sequence[str]) -> int:
    """Takes this process's place; a key of its own expires within a day."""
    overrides = [word for path, value in settings_leaves(CODEX_AGENT, settings).items()
                 for word in ("-c", f"{toml_name(path)}={json.dumps(value)}")]
    if not os.environ.get("POMEX_API_KEY"):
        with open_ledger(config) as ledger:
            name = f"codex-run-{secrets.token_hex(3)}"
            os.environ["POMEX_API_KEY"] = asyncio.run(ledger.create_key(
                name, time.time(), command_line_user(), expires_s=int(time.time()) + 86400))
        say(f"Key {name} created for this run; it ends in a day.")
    try:
        os.execvp("codex", ["codex", *overrides, *arguments])      # noqa: S606, S607
    except FileNotFoundError:
        say("There is no codex in PATH. Install it with: npm install -g @openai/codex")
        return UNAVAILABLE


# doctor

DOCTOR_WAIT_S = 20.0


class Check(NamedTuple):
    name: str
    state: str              # ok | note | wrong | missing: the last two are problems
    text: str
    fix: str = ""


def expect(name: str, good: str, problem: str, fix: str = "codex --write", state: str = "wrong") -> Check:
    return Check(name, state, problem, command(fix)) if problem else Check(name, "ok", good)


async def diagnose(config: Config) -> list[Check]:
    """Each link between Codex and the answers of this gateway."""
    tls_cert = config.server.tls_cert
    file, codex, provider = check_codex_file()
    shown, version = await locate_gateway(config, provider)
    url = shown if version else ""
    checks = [expect("gateway", f"{shown} answers, Pomex {version}", "" if url else f"nothing of Pomex answers at {shown}",
                     "serve", "missing"), check_program(), file]
    checks += check_provider(provider, url) if provider else []
    if (agent_home() / "app-server-control" / "app-server-control.sock").exists():
        checks.append(Check("  server", "note", "Codex's background server runs, with the key of its first start", NEW_KEY))
    check, key = await check_key(provider, url, tls_cert)
    if not (url and key):
        return [*checks, check]
    name = codex.get("model") if codex else "demo/echo"
    if isinstance(name, str):
        _, problem = await ask_gateway(f"{url}/v1/models/{urllib.parse.quote(name, safe='/')}", key, tls_cert, "id")
        model = expect("model", name, problem)
    else:
        model = expect("model", "", "config.toml names none, and Codex's own has no provider/ in front", state="missing")
    return [*checks, check, model, await check_stream(url, key, tls_cert)]


async def ask_gateway(url: str, key: str, tls_cert: str, wanted: str) -> tuple[Any, str]:
    """(that member of its answer, ""), or (None, what is wrong)."""
    answer = await get_json(url, HEALTH_TIMEOUT_S, tls_cert, key)
    error = as_dict(answer.get("error")).get("message", "the gateway gave no answer")
    return answer.get(wanted), "" if wanted in answer else error


async def locate_gateway(config: Config, provider: JSON) -> tuple[str, str]:
    """(URL, version) where Codex looks for it on this machine, else by the configuration; version "": none runs."""
    own, parts = own_url(config.server), urllib.parse.urlsplit(str(provider.get("base_url", "")))
    if is_loopback(parts.hostname or "") and own.startswith(f"{parts.scheme}:"):
        url = f"{parts.scheme}://{parts.netloc}"
        if version := await running_version(config.server, url):
            return url, version
    return own, await running_version(config.server)


def check_program() -> Check:
    try:
        done = subprocess.run(["codex", "--version"], capture_output=True, timeout=20)      # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return Check("codex", "missing", "no codex in PATH", "npm install -g @openai/codex")
    return Check("codex", "ok", f"{sanitize(done.stdout.decode('utf-8', 'replace').strip())} in PATH")


def check_codex_file() -> tuple[Check, JSON, JSON]:
    """(what it is like, what it says, its table of the provider)."""
    path = agent_home() / "config.toml"
    shown = home_short(path)
    if not path.is_file():
        other = ", and config.json is not read" if path.with_suffix(".json").is_file() else ""
        problem = f"there is no {shown}{other}: Codex asks OpenAI itself"
        return expect("config.toml", "", problem, state="missing"), {}, {}
    try:
        codex = tomllib.loads(read_text(str(path)))
    except (OSError, ValueError) as error:
        line = re.search(r"line (\d+)", str(error))
        fix = f"${{EDITOR:-nano}} +{line[1] if line else 1} {shown}"
        return Check("config.toml", "wrong", f"{shown}: {error}", fix), {}, {}
    codex |= as_dict(as_dict(codex.get("profiles")).get(str(codex.get("profile"))))
    chosen = codex.get("model_provider")
    provider = as_dict(as_dict(codex.get("model_providers")).get(str(chosen)))
    problem = (f'model_provider is "{chosen}", but there is no [model_providers.{chosen}]' if chosen
               else "no model_provider, so Codex asks OpenAI itself")
    good = f'{shown}, model_provider "{chosen}"'
    return expect("config.toml", good, "" if provider else f"{shown}: {problem}"), codex, provider


def check_provider(provider: JSON, url: str) -> list[Check]:
    """The provider's table, but for the key. Of an address on another machine only its end is known."""
    wire_api, base = provider.get("wire_api"), str(provider.get("base_url", "")).rstrip("/")
    problem, state = "" if wire_api == "responses" else f'"{wire_api}" must be "responses"', "wrong"
    if wire_api is None:
        problem, state = 'not set, which means "responses" to Codex 0.128.0 and newer', "note"
    checks = [expect("  wire_api", '"responses"', problem, state=state)]
    if provider.get("supports_websockets"):
        checks.append(Check("  websockets", "wrong", "supports_websockets = true", "delete that line"))
    elsewhere = url and is_loopback(urllib.parse.urlsplit(base).hostname or "") and base != f"{url}/v1"
    problem = "lacks /v1" if not base.endswith("/v1") else f"is not {url}/v1" if elsewhere else ""
    return [*checks, expect("  base_url", f'"{base}"', problem and f'"{base}" {problem}')]


async def check_key(provider: JSON, url: str, tls_cert: str) -> tuple[Check, str]:
    """The key that Codex would send, and the one for the other checks: where Codex has none, that of this shell."""
    own = os.environ.get("POMEX_API_KEY", "")
    what, name = ("  env_key", str(provider.get("env_key", ""))) if provider else ("key", "POMEX_API_KEY")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):       # not shown: it may be a key
        return expect(what, "", "must be the name of a variable, which holds the key"), own
    fix, key = f'export {name}="$({command(f"keys create codex-{secrets.token_hex(2)}")})"', os.environ.get(name, "")
    if not key:
        return Check(what, "missing", f"{name} is not set in this shell", fix), own
    known = ""
    if url:
        found, problem = await ask_gateway(f"{url}/v1/key", key, tls_cert, "data")
        if problem:
            return Check(what, "wrong", problem, fix), ""
        known = f" and is key {found['label']}"
    return Check(what, "ok", f"{name} is set in this shell{known}"), key


async def check_stream(url: str, key: str, tls_cert: str) -> Check:
    count, end = 0, ("", JSON())
    try:
        async with asyncio.timeout(DOCTOR_WAIT_S):
            async for event in stream_events(url, key, {"model": "demo/echo", "input": "Say OK."}, tls_cert):
                count, end = count + 1, event
    except (OSError, ValueError, GatewayError) as error:
        end = "", {"message": f"the gateway broke off: {error or type(error).__name__}"}
    kind, last = end
    if kind == "response.completed":
        return Check("stream", "ok", f"{count} events, ended with {kind}")
    state = "note" if last.get("param") == "model" else "wrong"         # no demo here, or not for this key
    return Check("stream", state, describe_end(kind, last), "the gateway's log says more")


def run_doctor(args: Args) -> int:
    checks = asyncio.run(diagnose(read_config(args)))
    for line, each in zip(table_lines([each[:3] for each in checks]), checks):
        print(line + (f"   fix: {each.fix}" if each.fix else ""))
    problems = sum(each.state in ("wrong", "missing") for each in checks)
    print(plural(problems, "problem"))
    return 1 if problems else 0


# --- 13.8 a gateway that runs ---

LOGS_A_LOOK = 500
Reread: TypeAlias = Callable[[], Coroutine[Any, Any, tuple[Config, Mapping[str, Sequence[str]]]]]


@of_ledger
async def run_status(ledger: Ledger, args: Args) -> int:
    """What the running gateway answers, and what the database says of today."""
    config, today_ms = read_config(args), int(time.time()) // 86400 * DAY_MS
    url, version = own_url(config.server), await look_for_gateway(config)
    ready = await get_json(f"{url}/ready", HEALTH_TIMEOUT_S, config.server.tls_cert)
    (_, sums), = await usage_sums(ledger.db, (), today_ms, MAX_NUMBER)
    status = {"url": url, "version": version, "status": ready.get("status", ""), **ready.get("checks", {}),
              "open_requests": len(await open_requests(ledger.db, 0)), "requests_today": sums["requests"],
              "spent_today_usd": format_usd(sums["cost_nanos"], 4), "disabled_providers": ", ".join(sorted(ledger.disabled))}
    if args.json:
        print_json(status)
    else:
        print(*table_lines([(name.replace("_", " "), str(value)) for name, value in status.items()]), sep="\n")
    return 0 if status["status"] == "ready" else 1


def run_ask(args: Args) -> int:
    """Prints an answer while it streams."""
    if not args.question and sys.stdin.isatty():
        raise BadRequest(f"What is the question? Like: {command('ask')} \"What is 2 + 2?\"")
    question = " ".join(sys.stdin.read() if word == "-" else word for word in args.question or ["-"])
    key = os.environ.get("POMEX_API_KEY", "")
    if not key:
        say(f'POMEX_API_KEY is not set. With a new key: export POMEX_API_KEY="$({command("keys create NAME")})"')
        return 1
    return asyncio.run(ask_model(read_config(args), key, args.model, question))


async def ask_model(config: Config, key: str, model: str | None, question: str) -> int:
    if not await look_for_gateway(config):
        return UNAVAILABLE
    body = {"model": model or best_model(ModelCatalog(*await with_detected(config))), "input": question}
    kind, last = "", JSON()
    async for kind, last in stream_events(own_url(config.server), key, body, config.server.tls_cert):
        if kind == "response.output_text.delta":
            print(last["delta"], end="", flush=True)
    if kind != "error":
        print()
    if kind != "response.completed":
        say(describe_end(kind, last))
    return 0 if kind == "response.completed" else 1


def describe_request(row: JSON) -> str:
    """`11-30 14:52:07 completed laptop openai/gpt-5.5 via openai  48.2k in 1.1k out  total 9.4s  $0.0412`"""
    when = time.strftime("%m-%d %H:%M:%S", time.localtime(row["started_ms"] / 1000))
    if row["result"] == "refused":
        return sanitize(f"{when} {row['status']} {row['key'] or '-'} {row['method']} {row['path']}  {row['message']}", 400)
    line = request_line(row["key"], UsageRow(*(row[name] for name in USAGE_COLUMNS)), row["cost_nanos"])
    return f"{when} {row['result']} {line}"


@of_ledger
async def run_logs(ledger: Ledger, args: Args) -> None:
    """Requests and refusals, the newest last."""
    filters = {name: value for name, value in (("key", args.key), ("model", args.model), ("result", args.status)) if value}
    seen: Collection[Row] = ()          # those of the latest look
    while True:
        rows: list[JSON] = []
        if args.status != "refused":
            where, values, _ = usage_where(filters, 0)
            rows += [row_view(row) for row in await usage_rows(ledger.db, where, values, max(args.lines, LOGS_A_LOOK))]
        if args.status in (None, "refused") and not args.model:
            for data, in await ledger.db.read(f"SELECT data FROM refusals ORDER BY id DESC LIMIT {REFUSALS_SHOWN}"):
                row = json.loads(data)
                rows += [{"started_ms": row["time_ms"], "result": "refused", **row}] if args.key in (None, row["key"]) else []
        rows.sort(key=operator.itemgetter("started_ms"))
        found = {(row["started_ms"], row["request_id"]): row for row in rows}
        fresh = [row for place, row in found.items() if place not in seen]
        if not seen:
            del fresh[:-args.lines]
        for row in fresh:
            print(dumps(row) if args.jsonl else describe_request(row), flush=True)
        if not args.follow:
            return
        seen = found.keys()
        await asyncio.sleep(POLL_S)


def changed_settings(old: Config, new: Config) -> list[str]:
    """The names of what differs, like server.port and providers.openai."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return sorted(f"{section}.{name}" for section in (*SECTIONS, *NAMED_SECTIONS) for name in before[section] | after[section]
                  if before[section].get(name) != after[section].get(name))


def reload_sentence(old: Config, new: Config, streams: int) -> str:
    """`Reloaded pomex.toml: providers.openai, server.port; only a restart changes server.port.`"""
    changed = changed_settings(old, new)
    kept = f"; {plural(streams, 'open stream')} {'keeps' if streams == 1 else 'keep'} the old settings" if streams else ""
    waiting = [name for name in changed if name.removeprefix("server.") in RESTART_ONLY or name.startswith("database.")]
    restart = f"; only a restart changes {', '.join(waiting)}" if waiting else ""
    return f"Reloaded {home_short(new.path) or 'the defaults'}: {', '.join(changed) or 'nothing changed'}{kept}{restart}."


async def reload(old: Config, reread: Reread, use: Callable[[Config, Mapping[str, Sequence[str]]], None], streams: int,
                 ledger: Callable[[], contextlib.AbstractContextManager[Ledger]]) -> None:
    """Takes up the configuration as it is now, whole or not at all. The audit log has no values: some are secrets."""
    notify_reloading()
    try:
        new, found = await reread()
        use(new, found)
        say(reload_sentence(old, new, streams))
        with contextlib.suppress(LedgerError), ledger() as audited:
            await audited.change("SIGHUP", "settings changed", os.path.basename(new.path), lambda tx: None,
                                 {"changed": ", ".join(changed_settings(old, new))})
    except (ConfigError, OSError) as error:
        say(f"Reload refused, still running with the old file: {str(error).removeprefix(old.path).lstrip(' :')}")
    notify("READY=1")


@of_ledger
async def run_reload(ledger: Ledger, args: Args) -> int:
    """Asks each gateway of this database on this machine to read its configuration again."""
    rows = await ledger.db.read("SELECT name, value FROM settings WHERE name LIKE ?", f"gateway/{ledger.host} %")
    running = [(name, int(pid)) for name, value in rows for pid, start in [value.split(" ")] if not has_ended(int(pid), start)]
    if HANG_UP is None or not running:
        say("Windows knows no such signal: restart the gateway." if HANG_UP is None else
            f"No gateway that uses {home_short(ledger.db.name)} runs on this machine. Start it: {command('serve')}")
        return UNAVAILABLE
    for name, pid in running:
        os.kill(pid, HANG_UP)
        print(f"{name.rpartition(' ')[2]} was asked (process {pid}); how it went is in its log")
    return 0


# --- 13.9 several processes ---
#
# The parent holds the listening sockets and forks the workers, which serve as a single process does. With SO_REUSEPORT a
# worker that ends would reset the connections in its own queue; a socket that all inherit loses none. A worker reports once
# a second, in memory shared with the parent; a silent one hangs and is killed. The parent waits for signals: of a reload and
# a stop, which it passes on, and of a worker's end.

TICK_S = 1.0
START_TICK_S = 0.05         # until all workers are ready
HUNG_S = 30.0               # a checkpoint of the database on a bad disk may stop a loop for seconds
STABLE_AFTER_S = 60.0       # a worker that lived this long did not die of its start
ACCEPT_AT_ONCE = 4          # connections that a worker takes before another one has its turn


async def worker_main(config: Config, found: Mapping[str, Sequence[str]], sockets: Sequence[socket.socket], reread: Reread,
                      board: memoryview[float], parent: int) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_loop_error)
    with open_ledger(config) as ledger:
        async with running(config, ledger, found, sockets, ACCEPT_AT_ONCE) as server:
            signals = install_signal_handlers()
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            reporting = loop.create_task(report(server, board, parent))
            while await signals.get() == HANG_UP:
                with contextlib.suppress(ConfigError, OSError):     # the parent has read it too, and reports the error
                    server.reload(*await reread())
            await drain_until_signal(server, signals)
            reporting.cancel()
    return 0


async def report(server: GatewayServer, board: memoryview[float], parent: int) -> None:
    """Reports the time and the number of open requests; without its parent a worker stops."""
    while os.getppid() == parent:
        board[0], board[1] = time.monotonic(), server.open_requests
        await asyncio.sleep(TICK_S)
    os.kill(os.getpid(), signal.SIGTERM)


class Worker(NamedTuple):
    pid: int
    started: float              # by the monotonic clock, as are all times here
    board: memoryview[float]    # shared with it: the time of its last report (0: none yet), and its open requests


class Workers:
    """The parent: keeps the configured number of workers alive."""
    stopping = False
    code = 0
    ready = False           # all have been at once
    not_before = 0.0        # no worker is started earlier: they die too fast
    deaths = 0              # in a row
    checked = math.inf      # when the workers were last checked
    awake_since = 0.0       # when this process last stood still itself

    def __init__(self, config: Config, found: Mapping[str, Sequence[str]], sockets: Sequence[socket.socket],
                 reread: Reread) -> None:
        self.config, self.found, self.sockets, self.reread = config, found, sockets, reread
        self.workers: list[Worker] = []
        self.pid, self.signals = os.getpid(), {*STOP_SIGNALS, signal.SIGCHLD}

    def block_signals(self) -> None:
        """So that they wait for run(), in workers for their handlers."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)

    def run(self) -> int:
        feed_s = watchdog_s(os.environ)
        while self.workers or not self.stopping:
            now = time.monotonic()
            self.kill_hung(now)
            self.start_missing(now)
            if not self.ready and self.workers and all(worker.board[0] for worker in self.workers):
                self.ready = True
                notify("READY=1")
            if feed_s:
                notify("WATCHDOG=1")
            tick_s = TICK_S if self.ready else START_TICK_S
            got = signal.sigtimedwait(self.signals, min(tick_s, feed_s or tick_s))
            if got is not None and got.si_signo == HANG_UP:
                self.reload()
            elif got is not None and got.si_signo in STOP_SIGNALS:
                self.stop()
            self.reap(time.monotonic())
        say("Stopped.")
        return self.code

    def kill_hung(self, now: float) -> None:
        if now - self.checked > 5 * TICK_S:     # a paused container, or Ctrl-Z: no worker could report either
            self.awake_since = now
        self.checked = now
        for worker in self.workers:
            if now - max(worker.started, worker.board[0], self.awake_since) > HUNG_S:
                log.error("worker %d has not reported for %d s and is killed", worker.pid, HUNG_S)
                os.kill(worker.pid, signal.SIGKILL)

    def start_missing(self, now: float) -> None:
        try:
            while len(self.workers) < self.config.server.workers and not self.stopping and now >= self.not_before:
                self.start(now)
        except OSError as error:        # too many processes or files: the others go on
            log.error("no worker can be started: %s; retried in a second", describe_error(error))
            self.not_before = now + TICK_S

    def start(self, now: float) -> None:
        sys.stderr.flush()
        board = memoryview(mmap.mmap(-1, 16)).cast("d")
        pid = os.fork()
        if not pid:
            self.become_worker(board)
        self.workers.append(Worker(pid, now, board))

    def become_worker(self, board: memoryview[float]) -> NoReturn:
        """In the new process."""
        code = 1
        try:
            os.setsid()             # Ctrl-C goes to the parent alone
            os.environ.pop("NOTIFY_SOCKET", "")
            LineFormatter.process = f"[{os.getpid()}] "
            code = asyncio.run(worker_main(self.config, self.found, self.sockets, self.reread, board, self.pid))
        except (ConfigError, GatewayError, OSError) as error:
            log.error("worker %d cannot work: %s", os.getpid(), error)
        except BaseException:
            log.exception("worker %d", os.getpid())
        finally:
            os._exit(code)

    def reap(self, now: float) -> None:
        """Takes note of the workers that have ended. They are replaced; ever later, if they die at their start."""
        for worker in self.workers.copy():
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if not pid:
                continue
            self.workers.remove(worker)
            if self.stopping:
                continue
            self.deaths = 0 if now - worker.started > STABLE_AFTER_S else self.deaths + 1
            self.not_before = now + (min(30.0, 0.1 * 2 ** min(self.deaths, 10)) if self.deaths > 1 else 0.0)
            log.error("worker %d ended with %d and is replaced; its %s were cut", pid, os.waitstatus_to_exitcode(status),
                      plural(int(worker.board[1]), "open request"))
            if not self.ready and not worker.board[0]:
                self.code = UNAVAILABLE         # none can start: the exit code says so
                self.stop()

    def open_requests(self) -> int:
        return int(sum(worker.board[1] for worker in self.workers))

    def send(self, number: signal.Signals) -> None:
        for worker in self.workers:
            os.kill(worker.pid, number)

    def stop(self) -> None:
        """The first time workers drain, the second time they end at once."""
        if self.stopping:
            self.code = INTERRUPTED
        else:
            notify("STOPPING=1")
            say(stopping_sentence(self.open_requests(), self.config.server.drain_timeout_s))
        for listening in self.sockets:      # before the workers close theirs: a connection to ours alone would be cut
            listening.close()
        self.stopping = True
        self.send(signal.SIGTERM)

    def reload(self) -> None:
        if not self.stopping:       # the ledger is closed before a process forks
            asyncio.run(reload(self.config, self.reread, self.use, self.open_requests(), lambda: open_ledger(self.config)))

    def use(self, config: Config, found: Mapping[str, Sequence[str]]) -> None:
        """Of a new configuration: each worker reads it again, and keeps its streams."""
        tls_context(self.config.server)
        self.config, self.found = merge_reloadable(self.config, config), found
        self.deaths, self.not_before = 0, 0.0
        self.send(signal.SIGHUP)


# --- 13.10 the table of commands ---

def run_help(args: Args) -> int:
    return main([*args.topic, "--help"])


class Command(NamedTuple):
    run: Callable[[Args], int | None]
    help: str
    example: str = ""           # what may stand behind its name
    fields: Sequence[Argument] = ()


def flag(name: str, meaning: str) -> Argument:
    return Argument(name, Field(read=TRUTH, meaning=meaning))


def server_flag(name: str) -> Argument:
    """Wins over the key of [server] of the same name, and is checked as that is."""
    return Argument(name, config_fields(ServerConfig)[name])


def of_operation(name: str, example: str, show: Callable[[Ledger, Args, JSON], Awaitable[None]], *more: Argument) -> Command:
    """Runs an operation and shows what it gave."""
    operation = OPERATIONS[name]

    async def run(ledger: Ledger, args: Args) -> None:
        await show(ledger, args, await operation.run(ledger, command_line_user(), given(args)))
    return Command(of_ledger(run), operation.help, example, [*operation.fields, *more])


CONFIG = Field(meaning="else POMEX_CONFIG, ./pomex.toml, $XDG_CONFIG_HOME/pomex/pomex.toml, or none")
WHERE = Argument("config", CONFIG, "FILE"), server_flag("host"), server_flag("port")        # of every command: which gateway
AS_JSON, AS_CSV, AS_JSONL = flag("json", "print JSON"), flag("csv", "print CSV"), flag("jsonl", "print one JSON object a line")
LISTED = AS_JSON, AS_CSV, AS_JSONL
SINCE = Argument("since", Field(read=parse_day, wanted="like 7d or 2026-11-01", meaning="whole days (UTC), with today"),
                 "7d|DATE", more={"default": "7d"})
MODEL = Argument("model", Field(meaning="a name that `models` lists"))
CONNECT = (MODEL, flag("write", "merge them into its file, of which a copy is kept"),
           flag("undo", "take them out again; all other changes stay"))
SHORT = {"model": "-m", "follow": "-f", "lines": "-n"}
COMMANDS = {
    "Run the gateway": {
        "serve": Command(run_serve, "run the gateway", "--port 8080", [server_flag("log_format"), flag(
            "no_detect", "look for no provider keys in the environment and no servers on local ports")]),
        "status": Command(run_status, "is it ready (so says the exit code), and what was spent today", "", [AS_JSON]),
        "logs": Command(run_logs, "show the newest requests, refused ones too", "-f --key laptop", [
            Argument("lines", Field(pattern="[1-9][0-9]{0,6}", read=int, wanted="a number from 1", meaning="how many"), "N",
                     more={"default": "20"}),
            flag("follow", "go on with each new one"), Argument("key", Field(meaning="only of this key"), "NAME"), MODEL,
            Argument("status", Field(choices=(*RESULTS, "refused"), meaning=f"{', '.join(RESULTS)} or refused")),
            AS_JSONL]),
        "reload": Command(run_reload, "make it read its configuration and key files again")},
    "Configure it": {
        "init": Command(run_init, "write a pomex.toml with the providers found on this machine", "", [
            Argument("file", metavar="FILE", required=True, more={"nargs": "?", "default": "pomex.toml"})]),
        "check": Command(run_check, "check the configuration", "--live", [
            flag("live", "ask each provider for its list of models, which costs nothing")]),
        "models": Command(run_models, "list the models that clients can use", "", LISTED),
        "prices show": Command(run_prices_show, "list all prices", "", LISTED)},
    "Clients": {
        "ask": Command(run_ask, "ask a model a question", '"What is 2 + 2?" -m demo/echo', [MODEL, Argument(
            "question", Field(meaning="- or nothing: read it from a pipe"), "QUESTION", required=True, more={"nargs": "*"})]),
        "connect": Command(run_connect, "print the settings for a coding agent, or put them in place", "claude-code", [
            Argument("agent", metavar="AGENT", required=True, more={"choices": AGENTS}), *CONNECT]),
        "codex": Command(run_connect, "the same for Codex, or start it", "--run -- exec 'Hello'", [
            *CONNECT, flag("run", "start codex with them, changing no file"),
            flag("profile", "in a file of its own, pomex.config.toml: codex --profile pomex"),
            Argument("prompt", Field(meaning="behind --: what codex gets"), "ARGUMENT", required=True, more={"nargs": "*"})]),
        "doctor": Command(run_doctor, "diagnose the connection between Codex and the gateway"),
        "admin-url": Command(run_admin_url, "print a link that opens the dashboard once")},
    "Keys and money": {
        "keys create": of_operation("keys create", "ana --budget 50/month --models 'openai/*'", show_key),
        "keys edit": of_operation("keys edit", "ana --budget none --rpm 60", show_key),
        "keys revoke": of_operation("keys revoke", "ana", show_key),
        "keys list": Command(run_keys_list, "list the keys", "", LISTED),
        "accounts create": of_operation("accounts create", "team --prepaid", show_new_account),
        "accounts credit": of_operation("accounts credit", "team 20", show_credit),
        "accounts list": Command(run_accounts_list, "list the accounts", "", LISTED),
        "usage": Command(run_usage, "sums of tokens and cost", "--since 30d --by key", [SINCE, Argument(
            "by", more={"choices": sorted(REPORT_BY), "default": "model"}), *LISTED]),
        "statement": of_operation("statement", "team --month 2026-11", show_statement, AS_JSON)},
    "The database": {
        "ledger verify": Command(run_verify, "compute every cost and sum again", "", [AS_JSON]),
        "ledger export": Command(run_export, "print every row as CSV", "> usage.csv", [
            SINCE._replace(more={"default": "1970-01-01"}), AS_CSV, AS_JSONL]),
        "audit": Command(run_audit, "list who changed keys, accounts, credits, providers and settings", "--since 30d", [
            SINCE, *LISTED]),
        "prune": Command(run_prune, "delete old usage rows; their sums are kept", "--older 90d", [
            SINCE._replace(name="older", field=SINCE.field._replace(meaning="delete rows older than this"), metavar="90d|DATE",
                           more={"required": True})]),
        "backup": Command(run_backup, "copy the database while gateways run", "pomex-copy.db", [
            Argument("file", metavar="FILE", required=True)]),
        "db copy": Command(run_db_copy, "move everything into another, empty database",
                           "sqlite:pomex.db postgresql://pomex@db.example.com/pomex", [
            Argument("source", Field(meaning="sqlite:FILE, postgresql://..., env:NAME or file:PATH"), "FROM", required=True),
            Argument("target", Field(meaning="the same"), "TO", required=True)])},
    "Help": {
        "help": Command(run_help, "explain a command", "keys create", [
            Argument("topic", metavar="COMMAND", required=True, more={"nargs": "*"})])},
}
EXAMPLES = ("serve", "codex --write", 'ask "What is 2 + 2?"', "keys create ana --budget 50/month")
MEANT = {"run": "serve", "start": "serve", "config": "check", "delete": "revoke", "rm": "revoke"}      # in other programs


class CommandParser(argparse.ArgumentParser):
    """argparse, with suggestions for what was mistyped."""
    overview = ""               # the whole help

    def format_help(self) -> str:
        return self.overview or super().format_help()

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"argument COMMAND: invalid choice: '(.*)' \(choose from (.*)\)", message):
            known = re.findall(r"[a-z-]+", found[2])
            message = f"unknown command {found[1]}.{did_you_mean(MEANT.get(found[1], found[1]), known)}"
        super().error(message)


def flag_name(argument: Argument) -> str:
    return f"--{argument.name.replace('_', '-')}"


def argument_type(argument: Argument) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return check_text(text, argument.field, repr(text))
        except BadRequest as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
    return read


def add_fields(parser: argparse.ArgumentParser, fields: Iterable[Argument]) -> None:
    for each in fields:
        meaning = each.field.meaning.replace("%", "%%")
        names = [each.name] if each.required else [*filter(None, [SHORT.get(each.name)]), flag_name(each)]
        if each.field.read is TRUTH and each.metavar is None:
            parser.add_argument(*names, action="store_true", help=meaning)
        else:
            parser.add_argument(*names, type=argument_type(each), help=meaning, metavar=each.metavar, **each.more)


def help_text() -> str:
    lines = ["usage: pomex.py [--config FILE] [--host HOST] [--port PORT] COMMAND ...", "", "An LLM API gateway in one file."]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:", *(f"  {name:<17}{each.help}" for name, each in commands.items())]
    return "\n".join([*lines, "", "Examples:", *(f"  {command(example)}" for example in EXAMPLES), "",
                      f"More about a command: {command('help COMMAND')}", ""])


def command_parser() -> CommandParser:
    where = CommandParser(add_help=False, argument_default=argparse.SUPPRESS)
    add_fields(where, WHERE)
    parser = CommandParser(prog="pomex.py", parents=[where])
    parser.overview = help_text()
    parser.add_argument("--version", action="version", version=f"Pomex {VERSION}")
    groups = {"": parser.add_subparsers(metavar="COMMAND")}
    for name, each in itertools.chain.from_iterable(commands.items() for commands in COMMANDS.values()):
        group, _, last = name.rpartition(" ")
        if group not in groups:
            groups[group] = groups[""].add_parser(group).add_subparsers(metavar="COMMAND", required=True)
        example = f"example: {command(f'{name} {each.example}'.rstrip())}"
        added = groups[group].add_parser(last, help=each.help, description=each.help, epilog=example, parents=[where])
        added.set_defaults(command=each, parser=added, agent="codex", run=False, profile=False)
        add_fields(added, each.fields)
    return parser


def parse_arguments(argv: Sequence[str]) -> Args:
    parser = command_parser()
    args, unknown = parser.parse_known_args(argv)
    if not hasattr(args, "command"):
        parser.print_help(sys.stderr)
        parser.exit(2)
    if unknown:
        hint = did_you_mean(unknown[0], map(flag_name, (*WHERE, *args.command.fields)))
        args.parser.error(f"unknown option {unknown[0]}.{hint}" if unknown[0].startswith("-")
                          else f"unexpected argument {unknown[0]}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")        # a locale that lacks the … of a key
    SAME_GATEWAY.clear()
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        SAME_GATEWAY.update({each.name: str(getattr(args, each.name)) for each in WHERE if hasattr(args, each.name)})
        code: int = args.command.run(args) or 0
        sys.stdout.flush()                  # here a full disk can still be told
        return code
    except SystemExit as stop:              # argparse: --help, --version, wrong usage
        return stop.code if isinstance(stop.code, int) else 0
    except ConfigError as error:
        say(str(error))
        return BAD_CONFIG
    except GatewayError as error:           # the ledger's: no usable database, or a name that is not right
        say(re.sub(r"python3? pomex\.py ", lambda found: command(""), str(error)))
        return UNAVAILABLE if isinstance(error, LedgerError) else 1
    except BrokenPipeError:                 # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:                # a file or folder that cannot be written, a full disk
        say(f"{error.filename or 'Output'}: {error.strerror or error}.")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


# === 14. data ===

# A provider, input and output tokens at most, factors; then models that share these: names; USD per million tokens of input,
# output, cache read, cache write, cache write kept long (1 h at Anthropic, 12 h at OpenAI); factors of these, the last for all
# that follow: overN= where input exceeds N tokens (xAI's tier includes 200,000), fromDATE= from that day (UTC) on, peak=
# DeepSeek's hours, any other a tier or region; search= USD per thousand; ends= when it is retired. From litellm 1.110.2,
# genai-prices 0.2.3.
PRICES_DATE = "2026-11-30"
MODEL_TABLE = """\
anthropic/ 1000000 128000
claude-fable-5,claude-mythos-5 10 50 1 12.5 20
claude-fable-5-1,claude-mythos-5-1 10 50 0.25 12.5 20
claude-fable-5-2,claude-mythos-5-2 8 40 0.2 10 16
claude-haiku-5-5 0.1 0.5 0.01 0.125 0.2 over100000=5
claude-opus-4-6,claude-opus-4-7,claude-opus-4-8,claude-opus-5 5 25 0.5 6.25 10
claude-opus-5-5 4 20 0.2 5 8
claude-sonnet-4-6 3 15 0.3 3.75 6
claude-sonnet-5 2 10 0.2 2.5 4
claude-sonnet-5-5 2 10 0.1 2.5 4
anthropic/ 200000 64000
claude-haiku-4-5 1 5 0.1 1.25 2
claude-opus-4-5 5 25 0.5 6.25 10
claude-sonnet-4-5 3 15 0.3 3.75 6 ends=2026-11-30
deepseek/ 1000000 393216
deepseek-flash,deepseek-v4-flash 0.15 0.6 0.003 peak=2
deepseek-v4-pro 0.66 1.98 0.022 peak=2
deepseek/ 163840 163840
deepseek-v3.2 0.28 0.4 0.028
google/ 1048576 65536
gemini-2.5-flash 0.3 2.5 0.03 flex=0.5/0.5/1 search=35 ends=2026-12-01
gemini-2.5-flash-lite 0.1 0.4 0.01 flex=0.5/0.5/1 search=35
gemini-2.5-pro 1.25 10 0.125 over200000=2/1.5/2 flex=0.5/0.5/1 search=35 ends=2026-12-01
gemini-3-flash-preview 0.5 3 0.05 flex=0.5/0.5/1
gemini-3.1-flash-lite 0.25 1.5 0.025 ends=2027-05-07
gemini-3.1-pro-preview,gemini-pro-latest 2 12 0.2 over200000=2/1.5/2 flex=0.5/0.5/1
gemini-3.5-flash 1.5 9 0.15 flex=0.5/0.5/0.533334
gemini-3.5-flash-lite,gemini-flash-lite-latest 0.3 2.5 0.03 priority=1.8/1.8/1.666667 flex=0.5/0.5/0.666667
gemini-3.6-flash,gemini-3.7-flash,gemini-3.8-flash,gemini-flash-latest 0.75 3.75 0.075 from2027-01-01=2
google/ 1048576 1048576
gemini-4-argon 2 10 0.1 from2026-12-01=2
gemini-4-hydrogen 1.5 7.5 0.075
groq/ 131072 65536
openai/gpt-oss-120b 0.15 0.6 0.075
openai/gpt-oss-20b 0.075 0.3 0.0375
groq/ 131072 16384
qwen/qwen3.8-27b 0.8 4
meta/ 1048576 131072
muse-spark-1.3 1.25 4.25 0.15
muse-wonder-1.0 4 20 0.2
minimax/ 1000000 128000
MiniMax-M3 0.3 1.2 0.06 over512000=2
MiniMax-M3.1-Flash 0.15 0.6 0.015
mistral/ 128000 128000
codestral-2508,codestral-latest 0.3 0.9 0.03
pixtral-large-latest 2 6 0.2
mistral/ 256000 256000
devstral-latest,devstral-medium-latest 0.4 2 0.04
devstral-small-latest 0.1 0.3 0.01
mistral/ 262144 262144
magistral-medium-latest,mistral-medium,mistral-medium-2604,mistral-medium-3.5,mistral-medium-latest 1.5 7.5 0.15
magistral-small-latest,mistral-small-2603,mistral-small-latest 0.15 0.6 0.015
ministral-14b-2512,ministral-14b-latest 0.2 0.2 0.02
ministral-8b-2512,ministral-8b-latest 0.15 0.15 0.015
mistral-large-2512 0.5 1.5 0.05 ends=2027-04-30
mistral-large-3,mistral-large-latest 0.5 1.5 0.05
mistral/ 131072 131072
ministral-3b-2512,ministral-3b-latest 0.1 0.1 0.01
mistral/ 1048576 1048576
mistral-large-4 0.7 2.1 0.07
mistral/ 32000 8191
mistral-small 0.1 0.3 0.01
moonshot/ 262144 262144
kimi-k2.6 0.95 4 0.16
kimi-k2.7-code 0.95 4 0.19
moonshot/ 1048576 1048576
kimi-k3 3 15 0.3 3 6
kimi-k3.1-pro 2 10 0.2 2 4
kimi-k3.1-pro-highspeed 4 20 0.2 4 8
openai/ 400000 128000
chat-latest 5 30 0.5
openai/ 922000 128000
daybreak-blue 4 20 0.4 5 10 over272000=2/1.5/2
gpt-6-astra-law 10 50 1
gpt-6-cyber 20 100 2 25 50
gpt-6-rosalind 15 75 1.5 18.75 37.5 over272000=2/1.5/2
openai/ 272000 128000
daybreak-red,gpt-5.6-cyber 12.5 75 1.25 15.625 31.25 over272000=2/1.5/2
gpt-5 1.25 10 0.125 ends=2026-12-11
gpt-5-mini 0.25 2 0.025 priority=1.8 ends=2026-12-11
gpt-5-nano 0.05 0.4 0.005 ends=2026-12-11
gpt-5.1 1.25 10 0.125 ends=2027-04-01
gpt-5.2 1.75 14 0.175
gpt-5.2-pro 21 168
gpt-5.3-codex 1.75 14 0.175 ends=2027-04-01
gpt-5.4-mini 0.75 4.5 0.075 geo=1.1
gpt-5.4-nano 0.2 1.25 0.02 geo=1.1 ends=2027-04-01
gpt-5.5-cyber 12.5 75 1.25
gpt-rosalind-discovery,gpt-rosalind-research 5 25 0.5
openai/ 1047576 32768
gpt-4.1 2 8 0.5 priority=1.75 search=25 ends=2027-01-14
gpt-4.1-mini 0.4 1.6 0.1 priority=1.75 search=25 ends=2027-01-14
openai/ 128000 16384
gpt-4o 2.5 10 1.25 priority=1.7 ends=2027-01-14
gpt-4o-mini 0.15 0.6 0.075 priority=1.666667 search=25 ends=2027-01-14
openai/ 400000 272000
gpt-5-pro 15 120 ends=2026-12-11
openai/ 1050000 128000 over272000=2/1.5/2 geo=1.1
gpt-5.4 2.5 15 0.25
gpt-5.4-pro,gpt-5.5-pro 30 180 over272000=2/1.5
gpt-5.5 5 30 0.5 priority=2.5
gpt-6.2-astra 8 40 0.4 10 20
gpt-6.2-sol 2 10 0.1 2.5 5
openai/ 922000 128000 over272000=2/1.5/2 geo=1.1
gpt-5.6,gpt-5.6-sol 4 20 0.4 5 10
gpt-5.6-luna 0.2 1.2 0.02 0.25 0.5
gpt-5.6-terra 2 12 0.2 2.5 5
gpt-6-astra 10 50 1 12.5 25
gpt-6-luna 0.1 0.5 0.01 0.125 0.25
gpt-6-sol 2 10 0.2 2.5 5
gpt-6.1-sol 2 10 0.1 2.5 5
gpt-6.1-terra 1 5 0.05 1.25 2.5
openai/ 200000 100000
o3 2 8 0.5 priority=1.75 ends=2026-12-11
o3-pro 20 80 ends=2026-12-11
xai/ 1000000 1000000
grok-4.20,grok-4.20-0309-non-reasoning,grok-4.20-0309-reasoning,grok-4.20-multi-agent 1.25 2.5 0.2
grok-4.20-multi-agent-0309,grok-4.20-non-reasoning,grok-4.20-reasoning,grok-4.3,grok-4.3-latest 1.25 2.5 0.2
xai/ 500000 500000
grok-4.5,grok-4.5-latest,grok-build-latest 2 6 0.3
grok-4.6,grok-4.7 2 6 0.5
xai/ 256000 256000
grok-build-0.1,grok-code-fast 1 2 0.2
grok-code-fast-1 1 2 0.2 ends=2026-05-15
zai/ 1000000 128000
glm-5.3 1.4 4.4 0.26
zai/ 1048576 128000
glm-5.3-flash 0.15 0.5 0.03
glm-5.3-flashx 0.37 1.25 0.075
"""

# What layers 6 and 7 know of servers, models and providers, in the form of `overrides`: names or prefixes, then fields. A row
# that is `like` an earlier one names only the fields that differ.

# Chat servers. One that is unknown is sent an effort only for models that are the same everywhere. Z.ai: GLM-5.3 thinks at
# full depth for any other word, and keeps its thoughts only where asked (opencrabs#1348 #1349). MiniMax: without
# reasoning_split the thoughts stand in the text. DeepSeek: "Thinking mode does not support this tool_choice".
fill_table(DIALECTS, Dialect(), """{
"": {"think_tags": true, "efforts": {"gpt-oss": {"values": "low low low medium high"}}, "passthrough_fields": ["top_k"]},
"generic together fireworks ollama lmstudio": {"like": ""},
"vllm llama.cpp llamacpp": {"like": "", "efforts": {
    "gpt-oss": {"values": "low low low medium high"},
    "qwen3": {"form": "template", "values": "disabled enabled"},
    "glm-4": {"form": "template", "values": "disabled enabled"}}},
"openai": {"max_tokens": "max_completion_tokens", "system_anywhere": true, "strict_tools": true, "files": true,
    "passthrough_fields": ["text.verbosity", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier"],
    "efforts": {
        "gpt-3": {}, "gpt-4": {}, "chat-latest": {},
        "o1": {"values": "low low low medium high"},
        "o3": {"values": "low low low medium high"},
        "o4": {"values": "low low low medium high"},
        "gpt-6.2": {"values": "low low low medium high xhigh max"},
        "": {"values": "none minimal low medium high xhigh max"}}},
"azure": {"like": "openai", "files": false,
    "passthrough_fields": ["text.verbosity", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"]},
"deepseek": {"replay": "reasoning_content", "replay_always": true, "json_schema": false, "forced_choice": false,
    "efforts": {"": {"form": "thinking_effort", "values": "disabled low low high high high max"}}},
"openrouter": {"replay": "reasoning_details", "files": true, "passthrough_fields": ["top_k"], "reasoning_within": true,
    "efforts": {"": {"form": "reasoning", "values": "none minimal low medium high xhigh"}}},
"groq": {"like": "", "max_tokens": "max_completion_tokens", "tool_parts": true, "passthrough_fields": ["service_tier"],
    "efforts": {"gpt-oss": {"values": "low low low medium high"}, "qwen3": {"values": "none default"}}},
"xai": {"efforts": {"mini": {"values": "low low low low high"}}},
"mistral": {"replay": "thinking", "tool_parts": true, "short_ids": true,
    "efforts": {"small": {"values": "none high"}}},
"cerebras": {"like": "", "max_tokens": "max_completion_tokens", "passthrough_fields": []},
"moonshot": {"replay": "reasoning_content", "replay_always": true, "efforts": {
    "k3": {"values": "low low low high high high max"},
    "k2.": {"form": "thinking", "values": "disabled enabled"}}},
"zai": {"replay": "reasoning_content", "tool_stream": true, "efforts": {
    "glm-5.3": {"values": "low low low high high max", "always": {"thinking": {"type": "enabled", "clear_thinking": false}}},
    "": {"form": "thinking", "values": "disabled enabled"}}},
"minimax": {"like": "cerebras", "replay": "reasoning_details", "efforts": {
    "m3.1": {"values": "low low low medium high max", "always": {"reasoning_split": true}},
    "m3": {"form": "thinking", "values": "disabled adaptive", "always": {"reasoning_split": true}},
    "": {"always": {"reasoning_split": true}}}},
"qwen dashscope": {"replay": "reasoning_content", "efforts": {
    "coder": {},
    "": {"form": "budget", "values": "0 1024 2048 10000 16384 32768", "always": {"preserve_thinking": true}}}}
}""")

# Before claude-sonnet-4-5 input and max_tokens together must fit the context window: hence default_max_tokens. The last row is
# another vendor's model behind the same API: llama.cpp, vLLM, DeepSeek, Moonshot, Z.ai.
fill_table(ANTHROPIC_MODELS, AnthropicModel(), """{
"claude-": {},
"claude-mythos-5-1": {"system_anywhere": true},
"claude-fable-5 claude-mythos-5": {"system_anywhere": true, "forced_choice": true},
"claude-fable-5-1 claude-fable-5-2 claude-mythos-5-2": {"system_anywhere": true, "binds_thinking": true},
"claude-opus-5-5": {"system_anywhere": true, "binds_thinking": true, "always_show_thinking": true},
"claude-opus-5": {"system_anywhere": true, "forced_choice": true, "disable_thinking": "disabled"},
"claude-opus-4-8": {"system_anywhere": true, "forced_choice": true, "disable_thinking": ""},
"claude-opus-4-7": {"forced_choice": true, "disable_thinking": ""},
"claude-sonnet-5": {"forced_choice": true, "disable_thinking": "disabled"},
"claude-haiku-5-5": {"like": "claude-sonnet-5", "binds_thinking": true, "always_show_thinking": true},
"claude-sonnet-5-5": {"disable_thinking": "between_tools", "binds_thinking": true, "always_show_thinking": true},
"claude-opus-4-6 claude-sonnet-4-6": {"like": "claude-opus-4-7", "efforts": "low low low medium high max", "sampling": true},
"claude-sonnet-4-5 claude-haiku-4-5": {
    "thinking": "budget", "disable_thinking": "", "efforts": "", "max_tokens": 64000, "sampling": true,
    "forced_choice": true, "prefill": true, "web_search": "web_search_20250305"},
"claude-opus-4-5": {"like": "claude-sonnet-4-5", "efforts": "low low low medium high"},
"claude-sonnet-4 claude-3-7": {"like": "claude-sonnet-4-5", "default_max_tokens": 8192, "json_schema": false},
"claude-opus-4": {"like": "claude-sonnet-4", "max_tokens": 32000},
"claude-opus-4-1": {"like": "claude-opus-4", "json_schema": true},
"claude-3-5": {"like": "claude-sonnet-4", "thinking": "", "max_tokens": 8192},
"claude-3": {"like": "claude-3-5", "max_tokens": 4096, "web_search": ""},
"": {"like": "claude-3", "max_tokens": 0, "prefill": false}
}""")

# gemini-2.5-pro cannot stop thinking
fill_table(GEMINI_MODELS, GeminiModel(), """{
"": {},
"gemini-3.1-flash-lite-image": {"values": "MINIMAL MINIMAL HIGH"},
"gemini-3-pro": {"values": "LOW LOW LOW HIGH"},
"gemini-3.1-pro gemini-3.7-flash gemini-3.8-flash gemini-4 gemini-pro-latest": {"values": "LOW LOW LOW MEDIUM HIGH"},
"gemini-4-argon": {"like": "gemini-4", "max_tokens": 65536},
"gemini-2.5-pro": {"thinking_param": "thinkingBudget", "values": "128 512 2048 8192 16384 32768", "combines_tools": false},
"gemini-2.5": {"thinking_param": "thinkingBudget", "values": "0 512 2048 8192 16384 24576", "combines_tools": false},
"gemini-2.5-flash-image gemini-2. gemini-1 gemini-pro gemma learnlm": {"thinking_param": "", "combines_tools": false}
}""")

# Name, wire_api and base_url of the built-in providers; env_key and relay where they have them.
fill_providers("""\
openai     responses https://api.openai.com/v1 OPENAI_API_KEY bytes
anthropic  messages  https://api.anthropic.com/v1 ANTHROPIC_API_KEY
google     gemini    https://generativelanguage.googleapis.com/v1beta GEMINI_API_KEY
openrouter chat      https://openrouter.ai/api/v1 OPENROUTER_API_KEY
xai        chat      https://api.x.ai/v1 XAI_API_KEY
deepseek   chat      https://api.deepseek.com/v1 DEEPSEEK_API_KEY
mistral    chat      https://api.mistral.ai/v1 MISTRAL_API_KEY
groq       chat      https://api.groq.com/openai/v1 GROQ_API_KEY
ollama     chat      http://127.0.0.1:11434/v1
lmstudio   chat      http://127.0.0.1:1234/v1
vllm       chat      http://127.0.0.1:8000/v1
llama.cpp  chat      http://127.0.0.1:8080/v1
""")

# What Codex 0.171 knows of models itself (`codex debug models`) and takes from a catalogue instead where it is given one:
# name; shown in its picker? default effort and verbosity; highest effort; context window, and how large a user may make it;
# version of the multi-agent tools (- without code mode); effort of subagents, where it can change; experimental tools. Its
# prompts (20 KB each) cannot be given back: see agent_settings.
CODEX_TABLE = """\
gpt-6.2-sol   list low    low ultra 500000 872000 v2 xhigh request_user_input_async \
send_message_to_user_async clock literature_search_query multi_agent_v2_in_code_mode
gpt-6.2-astra list low    low ultra 272000 872000 v2 xhigh request_user_input_async \
send_message_to_user_async clock literature_search_query multi_agent_v2_in_code_mode
gpt-6.1-sol   list low    low ultra 500000 872000 v2 xhigh send_user_message_async clock
gpt-6.1-terra list low    low ultra 500000 872000 v2 xhigh send_user_message_async clock
gpt-6-astra   list low    low ultra 272000 872000 v2 xhigh send_user_message_async clock
gpt-6-sol     list medium low ultra 272000 872000 v2 -     send_user_message_async clock
gpt-6-luna    list medium low max   272000 872000 v2 -     send_user_message_async clock
gpt-5.6-sol   list low    low ultra 272000 872000 v2 -
gpt-5.6-terra list medium low ultra 272000 872000 v2 -
gpt-5.6-luna  list medium low max   272000 872000 v1 -
gpt-5.5       list medium low xhigh 272000 272000 -  -
gpt-daybreak-blue-latest hide low    low  ultra 272000 872000 v2 -
gpt-daybreak-red-latest  hide medium high ultra 372000 372000 v2 -
codex-auto-review        hide medium low  max   272000 872000 v1 -
"""
CODEX_OLD_TABLE = """\
gpt-5.4-mini  list medium medium xhigh 272000 272000  - -
gpt-5.4       list xhigh  low    xhigh 272000 1000000 - -
gpt-5.3-codex list medium low    xhigh 272000 272000  - -
gpt-5.2       list medium low    xhigh 272000 272000  - -
"""             # these only 0.128 knows

# The base prompt of catalogue entries: Codex sends none of its own for a model that a catalogue describes.
BASE_INSTRUCTIONS = """\
You are a coding agent in the Codex CLI, working in the user's terminal on the user's files. You are precise, safe and \
helpful. You can read files, run commands, and change files with the tools you are given; what you print is shown to the \
user as plain text.

How you work
- Keep going until the request is fully done; only then end your turn. Do not guess: read the code, run the command, look.
- Before a group of tool calls, say in one short sentence what you are about to do. Do not narrate every step.
- For work of several steps keep a short plan, with the plan tool where there is one; skip it for simple requests.
- Follow AGENTS.md files: each speaks for the folder it stands in and all below; deeper ones win; the user's words win over all.
- Search with `rg` and `rg --files` where it is installed: it is faster than grep and find.

Changing files
- Use the `apply_patch` tool for edits where it is offered, with a patch of this form and nothing around it:
*** Begin Patch
*** Update File: path/to/file.py
@@ def example():
-    pass
+    return 123
*** End Patch
  `*** Add File:` with lines that begin with +, and `*** Delete File:`, stand for new and removed files. Paths are relative.
- Mend the cause, not the symptom. Keep changes small, in the style of the code around them. Leave other bugs alone, but say so.
- Never undo changes that you did not make. Do not commit or create branches unless asked. Add no licence headers unless asked.
- Add comments only where the code does not speak for itself.

Checking
- Where there are tests, or a way to build or run the program, use them: first the narrowest check of your change, then more.
- If a check fails for a reason that is not yours, say so rather than repairing what was not asked for.

Permissions
- Commands may run in a sandbox, and some may need the user's approval. If a command fails because of the sandbox and it \
matters, ask for approval the way your tools allow; if approval is never possible, find another way or say what is missing.
- Be careful with what destroys: ask before you delete or overwrite something that cannot be restored.

Answering
- Be brief and concrete. Say what you changed and where, as `path/file.py:12`, what you checked, and what is left. No long \
quotes of files that you wrote: the user has them. Use short lists where they help, plain sentences where they do not.
"""


# The dashboard, a static page. Its script asks /admin/api/ for JSON and writes text nodes only, since anybody may have sent
# the names, user agents and errors that it shows.
PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark"><title>Pomex</title><link rel="icon" href="data:,">
<style>
:root{color-scheme:light dark;--bg:light-dark(#f5f6f3,#0f1210);--surface:light-dark(#fff,#161a17);
  --sunken:light-dark(#eceee9,#0b0d0c);--line:light-dark(#dfe2da,#282e2a);--line2:light-dark(#848d82,#6f7a72);
  --ink:light-dark(#151a16,#ecefec);--ink2:light-dark(#434b45,#b9c1bb);--ink3:light-dark(#5d665f,#929b94);
  --accent:light-dark(#0b6650,#63cfa8);--on-accent:light-dark(#fff,#05221a);--accent-soft:light-dark(#e1f0ea,#12322a);
  --warn:light-dark(#855300,#e6b65e);--warn-soft:light-dark(#fbf1dc,#33280f);--bad:light-dark(#ab231c,#ff938a);
  --bad-soft:light-dark(#fbeae8,#3a1a18);--s1:light-dark(#0f7a60,#46b890);--s2:light-dark(#4a60cf,#8c9df7);
  --s3:light-dark(#b8690f,#dd9a45);--s4:light-dark(#9c4488,#d487c0);--s5:light-dark(#6f7a72,#8b958d)}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:14px/20px Inter,system-ui,sans-serif;font-variant-numeric:tabular-nums}
h1,h2,p,dl,dd,ul,ol,pre{margin:0;padding:0}
ul,ol{list-style:none}
h1{font-size:24px;line-height:32px;font-weight:640;letter-spacing:-.018em}
h2{font-size:14px;font-weight:620}
code,pre,.mono{font-family:ui-monospace,"Cascadia Mono",monospace;font-size:12.5px}
a{color:inherit}
svg{flex:none}
button{border:0;background:none;padding:0;font:inherit;cursor:pointer}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:4px}
.brand,.nav a,.top,.leg li,.hdr,.tb{display:flex;align-items:center}
.foot div,.top,.hd,.leg,.hdr,.tb,.mk,.acts{display:flex;flex-wrap:wrap}
.live,.btn,.tag{display:inline-flex;align-items:center}
h1,.foot,.note,.leg li,.wrap,.name,.rows li,.keyv code,.steps li,.facts dd,.out{overflow-wrap:anywhere}
.sr,.btn,.v,th,.nw,.tag{white-space:nowrap}
.live,.seg button,.btn.s,.hd span,.sub,.lab,.note,.leg,.read,table,.rows li,.keyv code,.steps li,label,.facts{font-size:13px}
.foot,.d,.tag,.err{font-size:12px;line-height:18px}
.nav a,.live,.seg button,.empty,.leg,.read,.tag,.steps li,label{color:var(--ink2)}
.nav .n,.foot,.hd span,.sub,.lab,.v i,.d,th,.dim,.hop,.st,.facts dt{color:var(--ink3)}
.ok{--tone:var(--accent);--soft:var(--accent-soft)}
.warn{--tone:var(--warn);--soft:var(--warn-soft)}
.bad{--tone:var(--bad);--soft:var(--bad-soft)}
.ok,.warn,.bad{fill:var(--tone)}
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.skip{position:absolute;left:8px;top:-60px;background:var(--accent);color:var(--on-accent);padding:8px 12px;border-radius:6px;
  z-index:9}
.skip:focus{top:8px}
.app{display:grid;grid-template-columns:212px minmax(0,1fr);min-height:100vh}
.rail{position:sticky;top:0;height:100vh;padding:20px 12px 16px;display:flex;flex-direction:column}
.brand{gap:10px;padding:0 8px 20px;font-weight:660;font-size:16px;letter-spacing:-.01em}
.brand svg{width:24px}
.nav a{gap:10px;height:36px;padding:0 10px;border-radius:7px;text-decoration:none;font-weight:500}
.nav a:hover,.btn.g:hover{background:var(--sunken)}
.nav a[aria-current]{background:var(--surface);color:var(--ink);box-shadow:inset 0 0 0 1px var(--line);font-weight:600}
.nav svg{width:16px}
.nav a[aria-current] svg{color:var(--accent)}
.nav .n{margin-left:auto;font-size:12px;font-weight:500}
.foot{margin-top:auto;padding:0 10px}
.foot p{white-space:pre-line}
.foot div{gap:0 4px;margin:0 0 10px -10px}
main{padding:24px 32px 48px;max-width:1272px;width:100%;border-left:1px solid var(--line)}
main:focus{outline:0}
.top{gap:12px 16px;margin-bottom:20px}
.top h1,.hd h2{margin-right:auto}
.live{gap:8px}
.dot,.st.now::after{width:8px;height:8px;border-radius:50%;background:var(--tone);flex:none;display:inline-block}
.dot.off{background:none;border:1.5px solid var(--ink3)}
.live .ok{animation:pulse 2s infinite}
@keyframes pulse{50%{opacity:.3}}
.seg{display:inline-flex;background:var(--sunken);border-radius:8px;padding:2px}
.seg button{height:30px;padding:0 12px;border-radius:6px}
.seg button[aria-pressed=true]{background:var(--surface);color:var(--ink);font-weight:600;
  box-shadow:0 0 0 1px var(--line)}
.btn,input,select,textarea{height:34px;border:1px solid var(--line2);border-radius:8px;background:var(--surface);
  color:var(--ink)}
.btn{justify-content:center;padding:0 14px;font-weight:560;text-decoration:none}
.btn:hover{border-color:var(--ink2)}
.btn:disabled{opacity:.55;cursor:default}
.btn.p{background:var(--accent);border-color:var(--accent);color:var(--on-accent)}
.btn.s{height:28px;padding:0 10px;border-radius:6px}
.btn.g{border-color:transparent;background:none}
.btn.del{color:var(--bad)}
.card,dialog{background:var(--surface);border:1px solid var(--line);border-radius:12px}
.card{min-width:0;box-shadow:0 1px 2px light-dark(#151a160a,#0000),0 8px 24px -18px light-dark(#151a1640,#0000)}
.grid{display:grid;gap:16px;grid-template-columns:repeat(12,minmax(0,1fr));margin-top:16px}
.grid>*{grid-column:1/-1}
.c8{grid-column:span 8}.c7{grid-column:span 7}.c6{grid-column:span 6}.c5{grid-column:span 5}.c4{grid-column:span 4}
.pad{padding:18px 20px}
.hd{align-items:baseline;gap:8px 12px;margin-bottom:12px}
button.sub{text-decoration:underline}
.sum,.kpis,.two{display:grid;gap:1px;background:var(--line);overflow:hidden}
.sum{grid-template-columns:minmax(270px,1.25fr) 3fr}
.money,.kpi,.two>div{background:var(--surface);min-width:0}
.money{padding:20px 22px}
.lab{line-height:18px}
.big{font-size:38px;line-height:44px;font-weight:620;letter-spacing:-.03em;margin:2px 0 4px}
.v i{line-height:1;font-style:normal;font-size:.58em;letter-spacing:0;font-weight:500}
.kpis{grid-template-columns:repeat(3,1fr)}
.kpi{padding:16px 20px}
.v{font-size:22px;line-height:28px;font-weight:600;letter-spacing:-.02em}
.money .hd{margin:18px 0 8px}.money .d{margin-top:8px}
.note{display:flex;gap:10px;margin-top:14px;padding:10px 12px;border-radius:8px;background:var(--soft);color:var(--tone)}
.note .btn{margin-left:auto}
ul+.hd,ol+.hd{margin:20px 0 10px}
.empty{padding:36px 20px;text-align:center}
.empty p{margin:4px auto 14px;max-width:52ch}
svg text{font-size:11px;fill:var(--ink3)}
.k1{fill:var(--s1)}.k2{fill:var(--s2)}.k3{fill:var(--s3)}.k4{fill:var(--s4)}.k5{fill:var(--s5)}
.trk{fill:var(--sunken)}
.gl{stroke:var(--line)}
.cur{fill:var(--ink);opacity:.07}
.tick{stroke:var(--ink);stroke-width:2}
.bar,.strip,.chart{display:block;width:100%}
.bar{height:8px}
.soft{opacity:.35}
.strip{height:28px;margin-bottom:14px}
.leg{gap:6px 18px}
.leg li{gap:7px}
.leg svg{width:10px}
.leg b,.steps b{font-weight:600;color:var(--ink)}
.read{min-height:20px;margin:10px 0 6px}
.read b,.name{color:var(--ink)}
.chart{flex:1 1 208px;min-height:208px;touch-action:pan-y}
.grow{display:flex;flex-direction:column}
.scroll{overflow:auto;max-height:320px}
table{border-collapse:collapse;width:100%}
th{font-weight:500;text-align:left;padding:0 12px 8px 0;font-size:12px}
td,.rows li,.ev li{border-top:1px solid var(--line)}
td{padding:9px 12px 9px 0}
td:last-child,th:last-child{padding-right:0}
tfoot td{font-weight:600}
.r{text-align:right}
div.mono{min-width:168px}
th.ka{font-size:0}
tbody tr:hover td{background:linear-gradient(var(--sunken),var(--sunken)) no-repeat;background-size:100% 100%}
.full{padding:18px 0 6px}
.full .hd,.full>.pad2{padding:0 20px}
.full th:first-child,.full td:first-child{padding-left:20px}
.full th:last-child,.full td:last-child{padding-right:20px}
.name,.tag{font-weight:560}
a.name{text-decoration:none}
a.name:hover{text-decoration:underline}
.tag{padding:1px 8px;border-radius:99px;background:var(--soft,var(--sunken));max-width:100%;overflow:hidden}
.tag:is(.ok,.warn,.bad){color:var(--tone)}
.hop s{text-decoration-color:var(--bad);text-decoration-thickness:1.5px}
.rows li{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:2px 12px;padding:9px 0}
.rows li:first-child{border-top:0;padding-top:0}
.rows .bar{grid-column:1/-1;height:5px;margin-top:3px}
.new{border-color:var(--accent);overflow:hidden}
.hdr{background:var(--accent-soft);padding:16px 20px;gap:12px}
.hdr div{margin-right:auto;max-width:64ch}
.two{grid-template-columns:1fr 1.25fr}
.two>div{padding:20px}
.keyv{display:flex;gap:8px;margin:6px 0 4px}
.keyv code{flex:1;min-width:0;background:var(--sunken);border-radius:8px;padding:8px 12px;line-height:18px}
.steps{margin:20px 0 0;display:grid;gap:12px}
.steps li{display:grid;grid-template-columns:22px minmax(0,1fr);gap:10px}
.steps b{display:block}
.st{width:20px;height:20px;border-radius:50%;border:1.5px solid var(--line2);display:grid;place-items:center;font-size:11px;
  font-weight:600}
.st.done{background:var(--accent);border-color:var(--accent);color:var(--on-accent)}
.st.bad{border-color:var(--bad);color:var(--bad)}
.st.now{border-color:var(--accent);--tone:var(--accent)}
.st.now::after{content:"";animation:pulse 1.4s infinite}
.code{background:var(--sunken);border-radius:8px;padding:14px 16px;overflow:auto;margin-top:10px}
pre.wrap,.out{white-space:pre-wrap}
.tb{justify-content:space-between;gap:8px}
.tb+table{margin-top:8px}
.mk{gap:12px;align-items:flex-end}
label{display:grid;gap:4px;font-weight:500;align-content:start}
.err:empty{display:none}
.err{color:var(--bad);font-weight:400}
input,select,textarea{font:inherit;padding:0 10px;min-width:0;width:100%}
textarea{height:auto;padding:8px 10px;resize:vertical}
input[aria-invalid]{border-color:var(--bad)}
.w{flex:1 1 220px}.m{flex:1 1 100px}
.gap{display:grid;gap:16px;align-content:start}
dialog{color:var(--ink);padding:22px;width:min(560px,calc(100vw - 32px));max-height:calc(100vh - 48px)}
dialog::backdrop{background:#0008}
dialog h2{font-size:16px;margin-bottom:12px}
.acts{gap:8px;justify-content:flex-end;margin-top:18px}
.fields{display:grid;grid-template-columns:1fr 1fr;gap:12px}
.fields p{grid-column:1/-1}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:7px 16px}
.ev{font-size:12.5px}
.ev summary{display:grid;cursor:pointer;grid-template-columns:64px 38px minmax(0,1fr);gap:8px;padding:5px 0}
.ev summary::-webkit-details-marker,.only{display:none}
.out{min-height:60px}
.login{max-width:420px;margin:12vh auto;padding:0 16px;border:0}
.login .card{padding:28px}.login h1{margin:0 0 6px}
.login form{margin-top:18px}
.login .brand{padding:0 0 18px}
@media (max-width:1080px){
.sum,.two{grid-template-columns:minmax(0,1fr)}
.grid>*{grid-column:1/-1}
}
@media (max-width:1180px){.opt2{display:none!important}}
@media (max-width:960px){.opt{display:none!important}}
@media (max-width:760px){
.app,.only{display:block}
.rail{z-index:5;height:auto;background:var(--bg);border-bottom:1px solid var(--line);padding:12px 16px 8px;display:grid;
  grid-template-columns:1fr auto;gap:8px 12px}
.brand,.foot{padding:0}
.foot p,.nav svg,.nav .n,.stack thead{display:none}
.foot div{margin:0;flex-wrap:nowrap}
.rail nav{grid-column:1/-1;order:3;min-width:0}
.nav{display:flex;overflow-x:auto;scrollbar-width:none;margin:0 -16px;padding:3px 12px;scroll-padding:0 16px}
.nav li{flex:none}.nav a{height:40px}
main{padding:16px 16px 40px;border:0}
.top h1{width:100%}
.kpis{grid-template-columns:1fr 1fr}
.kpi{padding:14px 16px}
.btn,.seg button{height:40px}.btn.s{height:36px}
.pad,.two>div{padding:16px}
.full .hd,.full>.pad2{padding:0 16px}
.stack tr{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:3px 12px;padding:12px 16px;border-top:1px solid var(--line)}
.stack td:nth-child(n){border:0;padding:0;background:none;overflow-wrap:anywhere}
.second,.full-row{order:1}
.full-row{grid-column:1/-1}
.stack .ka{margin-left:-10px;text-align:left}
.stack .ml{text-align:left;color:var(--ink3)}
label,label.m{flex:1 1 40%}.w,.keyv code{flex-basis:100%}
.mk .btn{flex:1 1 100%}
input,select{height:40px}
input,select,textarea{font-size:16px}
.keyv{flex-wrap:wrap}.keyv .btn{flex:1}
}
@media (prefers-reduced-motion:reduce){*{animation:none!important}}
@media (forced-colors:active){
.tag,.card,.kpi,.seg button[aria-pressed=true]{border:1px solid}
.k1,.k2,.k3,.k4,.k5,svg .ok,svg .warn,svg .bad{stroke:CanvasText}
}
</style></head><body>
<a class="skip" href="#main">Skip to content</a>
<svg class="sr"></svg><div id="root"></div><div class="sr" id="say" role="status"></div>
<noscript>The dashboard needs JavaScript. The same numbers: python pomex.py usage</noscript>
<script>
"use strict";
// --- nodes ---
const $ = (selector, root = document) => root.querySelector(selector);

// Callers can send names of any length, and characters that change the direction of the text around them.
function clip(value, length = 120) {
  const text = String(value ?? "").replace(/\0/g, "␀");
  return text.length > length ? text.slice(0, length) + "…" : text;
}

// Attributes may be just a class; one of null or false is left out, a function listens. Children are nodes or text,
// never markup.
function el(tag, attributes, ...children) {
  const like = /^(svg|path|rect|line|text)$/.test(tag) ? $("svg") : document.body;
  const node = document.createElementNS(like.namespaceURI, tag);
  const named = typeof attributes === "string" ? {class: attributes} : attributes || {};
  for (const [name, value] of Object.entries(named)) {
    if (value == null || value === false) continue;
    if (typeof value === "function" || name === "value") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  const shown = children.flat(4).filter(child => child != null && child !== false);
  node.append(...shown.map(child => child instanceof Node ? child : clip(child, 600)));
  return node;
}
const [div, span, para, ul, td, svg, rect] = ["div", "span", "p", "ul", "td", "svg", "rect"].map(tag =>
  (...parts) => el(tag, ...parts));
const [h2, bold, code, li, tr] = ["h2", "b", "code", "li", "tr"].map(tag => (...content) => el(tag, "", content));
const card = (className, ...content) => div("card " + className, content);
const heading = (title, ...content) => div("hd", h2(title), content);
const pageTop = (title, ...content) => div("top", el("h1", "", title), content);
const link = (className, href, text, attributes) => el("a", {class: className, href, ...attributes}, text);
const button = (text, className, onclick, label, id) => el("button", {class: "btn " + className, type: "button", id,
  "aria-label": label, onclick: event => onclick(event.currentTarget)}, text);
const submitButton = text => el("button", "btn p", text);
const copyButton = (text, className, getText, label, id) =>
  button(text, className, pressed => copy(getText(), pressed), label, id);

// The title has what is clipped.
function bdi(value, length = 120) {
  const isClipped = String(value ?? "").length > length;
  return el("bdi", {title: isClipped && clip(value, 2000)}, clip(value, length));
}

// A column is [heading, class, cell(row)].
const tableRows = (columns, rows) => rows.map(row => tr(columns.map(([, className, cell]) => td(className, cell(row)))));
const table = (className, caption, columns, rows, foot) => el("table", className, el("caption", "sr", caption),
  el("thead", "", tr(columns.map(([heading, className]) => el("th", {class: className, scope: "col"}, heading)))),
  el("tbody", "", tableRows(columns, rows)), foot);
const facts = pairs => el("dl", "facts",
  pairs.filter(Boolean).map(([term, detail]) => [el("dt", "", term), el("dd", "", detail)]));

// The user's choices on the overview; a measure of "" is spend if there is any, else requests.
const picked = {range: "today", breakdown: "model", measure: ""};
// Buttons of which one is pressed, of `choices`: {value: {title}}.
function segments(label, name, choices, chosen, draw = view.redraw) {
  const box = div({class: "seg", role: "group", "aria-label": label});
  function press(value) {
    for (const each of box.children) each.ariaPressed = each.value === value;
  }
  function onclick({currentTarget}) {
    picked[name] = currentTarget.value;
    press(picked[name]);
    draw();
  }
  box.append(...Object.entries(choices).map(([value, {title}]) => el("button", {type: "button", value, onclick}, title)));
  press(chosen);
  return box;
}

// A box that scrolls takes the focus, so that the keyboard can scroll it.
const scrollBox = (tag, className, label, ...content) =>
  el(tag, {class: className, tabindex: 0, role: "group", "aria-label": label}, content);

const piece = (className, x, width) => rect({class: className, x, width: Math.max(.6, Math.min(100, width)), height: 8});
const track = (...pieces) => svg(
  {class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true"},
  piece("trk", 0, 100), pieces);
function bar(fraction, className, mark) {
  const x = mark * 100;
  const line = {class: "tick", x1: x, x2: x, y1: 0, y2: 8, "vector-effect": "non-scaling-stroke"};
  return track(fraction > 0 && piece(className, 0, fraction * 100), mark > 0 && el("line", line));
}
function budgetClass(fraction) {
  if (fraction >= .95) return "bad";
  return fraction >= .8 ? "warn" : "ok";
}

const STROKE = {fill: "none", "stroke-linecap": "round", "stroke-linejoin": "round"};
const drawing = (size, ...shapes) => svg({viewBox: `0 0 ${size} ${size}`, "aria-hidden": "true"}, shapes);
const icon = d => drawing(16, el("path", {d, ...STROKE, stroke: "currentColor", "stroke-width": 1.5}));
const brand = () => div("brand", drawing(24,
  el("path", {class: "ok", d: "M12 6.6c-1.6-1.3-3.6-1.6-5.3-.8C4.3 6.9 3 9.4 3 12.4 3 17.3 6.2 22 9.2 22c1 0 1.8-.5 " +
    "2.8-.5s1.8.5 2.8.5c3 0 6.2-4.7 6.2-9.6 0-3-1.3-5.5-3.7-6.6-1.7-.8-3.7-.5-5.3.8zm.6-1.4" +
    "c-.1-2.2 1.4-3.7 3.7-3.9.1 2.2-1.5 3.8-3.7 3.9z"}),
  el("path", {d: "M7.5 13h8M13 10.2l2.9 2.8-2.9 2.8", ...STROKE, stroke: "var(--on-accent)", "stroke-width": 1.9})),
  "Pomex");

function announce(text) {
  $("#say").textContent = "";
  setTimeout(() => $("#say").textContent = text, 50);
}

// Replacing a button between pointerdown and click would lose the click.
let pressedAt = 0;
addEventListener("pointerdown", () => pressedAt = Date.now());
addEventListener("click", () => pressedAt = 0, true);

// Replaces the content of a box. A focus in it moves to the same control of the new content, or to the page.
function swap(box, ...content) {
  if (Date.now() - pressedAt < 999) return setTimeout(swap, 50, box, ...content);
  const active = document.activeElement, hadFocus = box.contains(active);
  box.replaceChildren(...content.flat().filter(Boolean));
  if (hadFocus) focusSame(box, active);
}
const identity = node => node.id || node.href || node.ariaLabel || node.textContent;
function focusSame(box, lost) {
  const controls = [...box.querySelectorAll("a,button,input,select,[tabindex]")];
  const same = controls.find(each => identity(each) === identity(lost));
  (same || $("#main")).focus({preventScroll: true});
}

async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {                 // the clipboard API needs HTTPS or localhost
    const area = el("textarea");
    area.value = text;
    (pressed.closest("dialog") || document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const label = pressed.dataset.label ||= pressed.textContent;
  pressed.textContent = "Copied";
  announce("Copied");
  setTimeout(() => pressed.textContent = label, 1600);
  pressed.focus();
}

// --- numbers and times ---
const DAY_MS = 864e5;
const sum = (items, value) => items.reduce((total, each) => total + value(each), 0);
const count = n => n.toLocaleString("en-US");
const pct = (part, whole, digits = 1) => whole ? (100 * part / whole).toFixed(digits) + " %" : "0 %";

const usd = (nanos, digits = Math.abs(nanos) < 99995e4 ? 4 : 2) => nanos ? (nanos / 1e9).toLocaleString("en-US",
  {style: "currency", currency: "USD", minimumFractionDigits: digits, maximumFractionDigits: digits}) : "$0";
function tokens(n) {
  if (n >= 1e6) return (n / 1e6).toFixed(1) + " M";
  return n >= 1e3 ? (n / 1e3).toFixed(1) + " k" : String(n);
}
const axisUsd = nanos =>        // $0.0025, $0.50, $2
  "$" + (nanos / 1e9).toLocaleString("en-US", {maximumSignificantDigits: 4}).replace(/\.\d$/, "$&0");
const shortTokens = n => tokens(n).replace(".0", "");
const seconds = ms => (ms / 1000).toFixed((ms < 1e3) + (ms < 1e5));      // 0.25, 2.5, 250
function duration(total) {
  const [unit, size] = [["d", 86400], ["h", 3600], ["min", 60]].find(each => total >= each[1]) || ["s", 1];
  return `${Math.max(0, Math.floor(total / size))} ${unit}`;
}
const ago = ms => ms ? duration((Date.now() - ms) / 1000) + " ago" : "never";
const midnight = () => new Date().setHours(0, 0, 0, 0);
const clock = date => date.toTimeString().slice(0, 5);
const day = date => date.getDate() + " " + date.toLocaleString("en-US", {month: "short"});
function time(ms) {
  const date = new Date(ms), isToday = date.toDateString() === new Date().toDateString();
  return el("time", {title: date.toString(), datetime: date.toISOString()},
    isToday ? "" : day(date) + " ", date.toTimeString().slice(0, 8));
}

// --- forms and dialogs ---
function field(label, name, {wide, ...attributes} = {}, tag = "input", ...content) {
  const id = "f-" + name, error = id + "-error";
  const control = {name, id, autocomplete: "off", spellcheck: "false", "aria-describedby": error, ...attributes};
  return el("label", wide ? "w" : "m", label, el(tag, control, content), span({class: "err", id: error}));
}
const amount = (label, name, placeholder, value) => field(label + ", USD", name, {inputmode: "decimal", placeholder, value});
const choice = (label, name, options, attributes = {}) => field(label, name, attributes, "select",
  options.map(([value, text = value]) => el("option", {value, selected: value === attributes.value}, text)));

// Shows an error at the field that it names, else below the form.
function showFormError(form, error) {
  for (const each of form.querySelectorAll(".err")) each.textContent = "";
  for (const each of form.querySelectorAll("[aria-invalid]")) each.ariaInvalid = null;
  if (!error) return;
  const control = error.param && form.elements.namedItem(error.param === "expires_s" ? "expires_days" : error.param);
  if (control) {
    control.ariaInvalid = "true";
    control.focus();
  }
  const place = control ? control.nextElementSibling : $(".err.all", form) || para({class: "err all", role: "alert"});
  if (!control) form.append(place);
  place.textContent = clip(error.message, 300);
}

const fieldError = (param, message) => Object.assign(new Error(message), {param});
const formValues = form => Object.fromEntries(new FormData(form));
const whenSubmitted = send => async event => {
  event.preventDefault();
  const form = event.currentTarget, pressed = $("button:not([type])", form);
  pressed.disabled = true;
  showFormError(form);
  try {
    await send(formValues(form), form);
  } catch (error) {
    showFormError(form, error);
  }
  pressed.disabled = false;
};

// The focus returns to the control that opened the dialog, even if the page was drawn again meanwhile.
function openDialog(title, ...content) {
  const opener = document.activeElement;
  const onclose = () => {
    dialog.remove();
    if (document.activeElement === document.body) focusSame(document, opener);
  };
  const dialog = el("dialog", {"aria-label": title, onclose}, h2(title), content);
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}
function openForm(title, fields, verb, send, cancel = "Cancel") {
  const onsubmit = whenSubmitted(async values => {
    await send(values);
    dialog.close();
    announce("Done");
    view.refresh?.();
  });
  const dialog = openDialog(title, el("form", {novalidate: true, onsubmit}, div("fields", fields),
    div("acts", button(cancel, "", () => dialog.close()), submitButton(verb))));
}

// --- the gateway ---
let session = null;
let view = {};              // refresh() and live(kind, data) of the page that is shown, where it has them
let visit = 0;              // counts the pages shown: an answer for an earlier one is not drawn
const isAdmin = () => session.role === "admin";

const post = body => ({method: "POST", headers: {"content-type": "application/json"}, body: JSON.stringify(body)});
async function api(path, body) {
  const response = await fetch("/admin/api/" + path, body && post(body)).catch(() => {
    throw new Error("The gateway does not answer. Is it running?");
  });
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const {message, param} = answer.error || {}, {status} = response;
  if (status === 401 && path !== "login") showLogin(session ? "The session has ended. Log in again." : "");
  throw Object.assign(fieldError(param, message || "HTTP " + status), {status});
}

// Loads data and draws it, or the error, into a box, unless the user has left the page meanwhile.
async function fill(box, load, draw) {
  const begun = visit;
  try {
    const data = await load();
    if (visit === begun) swap(box, draw(data));
  } catch (error) {
    if (visit !== begun || !session) return;
    const retry = button("Retry", "s", () => fill(box, load, draw));
    swap(box, div({class: "note bad", role: "alert"}, span("", error.message), retry));
  }
}

// --- login ---
function showLogin(note) {
  session = null;
  closeFeed();
  visit++;
  document.title = "Log in · Pomex";
  const onsubmit = whenSubmitted(async ({token}) => {
    await api("login", {token: token.trim()}).catch(error => {
      throw fieldError("token", error.message);
    });
    begin();
  });
  $("#root").replaceChildren(el("main", {class: "login", id: "main", tabindex: -1}, div("card", brand(),
    el("h1", "", "Log in"),
    para("sub", "With the admin token, or with an API key to see its own usage. To get a login link, run: ",
      code("python pomex.py admin-url")),
    el("form", {class: "gap", onsubmit},
      field("Admin token or API key", "token", {type: "password", required: true}), submitButton("Log in")))));
  $("#f-token-error").textContent = note;
  $("#f-token").focus();
}

// A login link is /admin#login=TOKEN: browsers do not send the part after # to the server.
async function begin() {
  const [, token] = /^#login=(.+)$/.exec(location.hash) || [];
  let note = "";
  if (token) {
    history.replaceState(null, "", "/admin#overview");
    await api("login", {token: decodeURIComponent(token)}).catch(error => note = error.message);
  }
  try {
    session = await api("session");         // a used link does no harm while its session lasts
  } catch (error) {
    return showLogin(note || (error.status === 401 ? "" : error.message));
  }
  showFrame();
  openFeed();
  route();
}

// --- the frame around the pages ---
const LINES = "M3 3h10M3 8h10M3 13h6";
const PAGES = [     // [id, title, icon, show(main, query, rest of the path)]
  ["overview", "Overview", "M2 9h4l2-6 2 11 2-5h2", showOverview],
  ["keys", "Keys", "M6.5 9.5 13 3m-2 2 2 2m-4 0 1.5 1.5M4.5 8.5a3 3 0 1 0 .1 6 3 3 0 0 0 0-6", showKeys],
  ["usage", "Usage log", LINES, showUsage],
  ["models", "Models", "M8 1.8 14 5v6l-6 3.2L2 11V5zM2 5l6 3.2L14 5M8 8.2v6", showModels],
  ["providers", "Providers", "M3 3h10v4H3zM3 9h10v4H3zM5.5 5h.01M5.5 11h.01", showProviders],
  ["playground", "Playground", "M4 3v10l9-5z", showPlayground],
  ["setup", "Setup", "M2.5 8.5 6 12l7.5-8", showSetup],
  ["audit", "Audit", LINES, showAudit],
];
const openPages = () => PAGES.filter(([id]) => isAdmin() || !["keys", "providers", "audit"].includes(id));

function showFrame() {
  const {counts, key, address, version, up_s} = session;
  const links = openPages().map(([id, title, d]) => li(
    link(null, "/admin#" + id, [icon(d), title, id in counts && span("n", counts[id])], {"data-id": id})));
  async function logOut() {
    await api("logout", {}).catch(() => null);
    showLogin("Logged out.");
  }
  $("#root").replaceChildren(div("app",
    el("header", "rail", brand(), el("nav", {"aria-label": "Pages"}, ul({class: "nav", id: "nav"}, links)),
      div("foot", div("", button("Light / dark", "s g", switchTheme), button("Log out", "s g", logOut)),
        para("", key && `Key ${key.name}\n`, `${address}\npomex.py ${version}\nup ${duration(up_s)}`))),
    el("main", {id: "main", tabindex: -1})));
}

const {style} = document.documentElement;
style.colorScheme = localStorage.getItem("pomex-theme");
function switchTheme() {
  const current = style.colorScheme || (matchMedia("(prefers-color-scheme:dark)").matches ? "dark" : "light");
  style.colorScheme = current === "dark" ? "light" : "dark";
  localStorage.setItem("pomex-theme", style.colorScheme);
}

function route() {
  if (!session) return;
  const [path, query] = (location.hash.slice(1) || "overview").split("?");
  const [id, ...rest] = path.split("/");
  const page = openPages().find(each => each[0] === id);
  if (!page) return location.replace("#overview");
  if (newKey && id !== "keys" && !newKey.leaveAsked) {
    newKey.leaveAsked = true;
    history.replaceState(null, "", "#keys");
    return askToLeave(path);
  }
  const [, title, , show] = page, main = $("#main"), isFirst = !visit++;
  for (const each of document.querySelectorAll("#nav a")) each.ariaCurrent = each.dataset.id === id ? "page" : null;
  document.title = title + " · Pomex";
  main.replaceChildren();
  view = {};
  view = show(main, new URLSearchParams(query), rest.join("/")) || {};
  if (!isFirst) {
    main.focus({preventScroll: true});
    scrollTo(0, 0);
  }
  $("#nav").scrollLeft = $("#nav [aria-current]").offsetLeft - 80;
}
addEventListener("hashchange", () => location.hash.startsWith("#login=") ? begin() : route());

// --- live events: one connection, closed while the page is hidden ---
let feed = null;
function liveMark() {
  const isOpen = feed?.readyState === EventSource.OPEN;
  return span({class: "live", id: "live"}, span(isOpen ? "dot ok" : "dot off"), isOpen ? "Live" : "Reconnecting");
}
const showFeed = () => $("#live")?.replaceWith(liveMark());
function openFeed() {
  closeFeed();
  if (!session || document.hidden) return;
  const source = feed = new EventSource("/admin/api/events");
  source.onopen = showFeed;
  source.onerror = () => {
    source.close();
    showFeed();
    setTimeout(() => feed === source && resumeFeed(), 3000);
  };
  for (const kind of ["started", "usage", "refused", "key", "provider"]) {
    source.addEventListener(kind, event => receive(kind, JSON.parse(event.data)));
  }
}
function closeFeed() {
  feed?.close();
  feed = null;
}
async function resumeFeed() {
  await api("session").catch(() => null);       // shows the login if the session has ended
  openFeed();
  if (session) view.refresh?.();
}
document.addEventListener("visibilitychange", () => document.hidden ? closeFeed() : resumeFeed());

function receive(kind, data) {
  const isRequest = kind === "started" || kind === "usage";
  if (isRequest && newKey && newKey.name === data.key && (newKey.seen || data).response_id === data.response_id) {
    newKey.seen = data;
    $("#new-key-steps")?.replaceChildren(...newKeySteps());
    announce("First request received");
  }
  view.live?.(kind, data);
}

// Calls `action` soon, at most once in 1.5 s, and not after its page was left.
function throttle(action) {
  const begun = visit;
  let timer = 0, last = 0;
  function run() {
    timer = 0;
    last = Date.now();
    if (visit === begun) action();
  }
  return () => timer ||= setTimeout(run, Math.max(50, last + 1500 - Date.now()));
}

// A page with a body that is drawn from what `load` answers, again when something happens. Of what it returns, `redraw`
// is for other choices of the user, from the same data.
function livePage(main, parts, load, draw) {
  const body = div();
  let data = null;
  const redraw = () => data && swap(body, draw(data));
  const refresh = () => fill(body, load, answer => {
    data = answer;
    return draw(data);
  });
  main.append(...parts, body);
  refresh();
  return {refresh, redraw, live: throttle(refresh)};
}

// --- parts of several pages ---
const NO_PROVIDER = "no provider";
const RESULTS = {       // of a request: the class of its tag
  completed: "ok", incomplete: "warn", "failed over": "warn", "ended by gateway": "warn", failed: "bad", cancelled: "",
};
const STATES = {        // of a provider: the class of its dot
  healthy: "ok", failing: "bad", "left out": "bad", recovering: "warn", "no requests": "off", disabled: "off",
};
const stateDot = provider => span("dot " + STATES[provider.state]);

const resultTag = ({result, error_code}) =>
  span("tag " + (RESULTS[result] || ""), result === "failed" && error_code ? bdi(error_code, 28) : result);

const costOfAll = ({cost_nanos, unpriced}) => unpriced && !cost_nanos ? span("dim", "no price") : usd(cost_nanos);
const costOf = row => costOfAll({...row, unpriced: !row.price && row.input + row.output > 0});

function requestPath(row) {
  const last = row.tried.length - 1;
  const failed = row.tried.filter((name, i) => row.status === "failed" ? i < last : name !== row.provider);
  const hops = failed.map(name => [el("s", "", name), span("sr", " failed, then"), span({"aria-hidden": "true"}, " → ")]);
  return span("hop", " via ", hops, row.provider || NO_PROVIDER);
}

const REQUEST_COLUMNS = [
  ["Time", "nw dim opt", row => time(row.started_ms)],
  ["Model and path", "", row => [link("name", "#usage/" + encodeURIComponent(row.response_id), bdi(row.model)),
    requestPath(row)]],
  ["Key", "second", row => row.key || "deleted key"],
  ["In / cached / out", "r nw opt opt2", row => [row.input, row.cached, row.output].map(tokens).join(" / ")],
  ["First token / total", "r nw opt", ({first_ms, total_ms}) =>
    (first_ms ? seconds(first_ms) + " / " : "") + seconds(total_ms) + " s"],
  ["Cost", "r nw second", costOf],
  ["Result", "r", resultTag],
];
const usageOf = (filter, name) => "#usage?" + new URLSearchParams({[filter]: name});
const usageLink = (filter, name, className) =>
  link(className, usageOf(filter, name), "Usage", {"aria-label": "Usage of " + name});
const requestTable = rows => table("stack", "Requests, newest first", REQUEST_COLUMNS, rows);

function missingKeys(providers) {
  if (!providers.length) return null;
  const rows = providers.map(({name, env_key}) => li(name, code(`export ${env_key}=...`)));
  return div("grid", card("pad", heading("Providers without a key"), ul("rows", rows), para("d", "Then restart Pomex.")));
}

const ARROWS = {ArrowLeft: -1, ArrowRight: 1};

const shellQuote = text => "'" + text.replace(/'/g, "'\\''") + "'";
const PYTHON_WORDS = {true: "True", false: "False", null: "None"};
const pythonText = value => JSON.stringify(value).replace(/"(\\.|[^"\\])*"|true|false|null/g,
  found => PYTHON_WORDS[found] || found);
// What sends a request, given its body.
const curlCommand = body => `curl -N ${location.origin}/v1/responses \\
  -H "Authorization: Bearer $POMEX_API_KEY" \\
  -H "Content-Type: application/json" \\
  -d ${shellQuote(JSON.stringify(body))}`;
const COMMANDS = {
  curl: curlCommand,
  Codex: ({model, input}) => `codex -m ${shellQuote(model)} ${shellQuote(input)}`,
  Python: body => `import os
from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ["POMEX_API_KEY"])
for event in client.responses.create(**${pythonText(body)}):
    print(event)`,
};

// How to set up one agent at a time; `agents` are [name, file, settings].
function setupBox(agents, token = "sk-rh-…") {
  const all = [...agents,
    ["Shell", "~/.zshrc or ~/.bashrc", `export POMEX_API_KEY="${token}"\n\n# then\ncodex "What is 2 + 2?"`],
    ["curl", "", curlCommand({model: "demo/echo", input: "hello", stream: true})]];
  const shown = scrollBox("pre", "code", "Set-up snippet"), where = para("d");
  function show(wanted) {
    const [, file, text] = all.find(([name]) => name === wanted);
    where.textContent = file ? "For " + file : "For a shell";
    shown.textContent = text.replaceAll("{ORIGIN}", location.origin);
  }
  show("codex");
  return div("", div("tb", choice("Client", "agent", all.map(([name]) => [name, name]),
    {onchange: event => show(event.target.value)}),
    copyButton("Copy", "s", () => shown.textContent)), where, shown);
}

const STEP_MARKS = {done: "✓", bad: "!"};
const STEP_WORDS = {done: "Done. ", now: "Waiting. "};
const step = (state, title, ...details) => li(span("st " + state, STEP_MARKS[state]),
  span("", bold(title), span("sr", STEP_WORDS[state]), details));

// --- the overview ---
const RANGES = {
  today: {title: "Today", days: 1, stepMs: 36e5, slots: 24, labelEvery: 3, unit: "hour"},
  "7d": {title: "7 days", days: 7, stepMs: 216e5, slots: 28, labelEvery: 4, unit: "6 hours"},
  "30d": {title: "30 days", days: 30, stepMs: DAY_MS, slots: 30, labelEvery: 5, unit: "day"},
};
const MEASURES = {
  cost_nanos: {title: "Spend", format: usd, formatAxis: axisUsd, least: 1e6},
  requests: {title: "Requests", format: count, formatAxis: shortTokens, least: 3},
  tokens: {title: "Tokens", format: tokens, formatAxis: shortTokens, least: 3},
};

function showOverview(main) {
  const ranges = segments("Time range", "range", RANGES, picked.range, () => view.refresh());
  function load() {
    const {days, stepMs, slots} = RANGES[picked.range];
    return api(`overview?since=${midnight() - (days - 1) * DAY_MS}&step=${stepMs}&slots=${slots}`);
  }
  return livePage(main, [pageTop("Overview", liveMark(), ranges)], load, drawOverview);
}

function drawOverview(data) {
  const {totals, by, latest} = data, isEmpty = !totals.requests && !latest.length;
  const share = ({name, requests}, className, barClass) => requests > 0 && li(span(className, name),
    span("", count(requests), span("dim", "  " + pct(requests, totals.requests))), bar(requests / totals.requests, barClass));
  return [
    div("card sum", spendBox(data), div("kpis", keyFigures(data))),
    div("grid",
      isEmpty && card("empty", h2("No request yet"), para("", "Set up a client, or try the demo in the playground."),
        link("btn p", "#setup", "Set up a client"), " ", link("btn", "#playground", "Open the playground")),
      card("pad c8 grow", overviewChart(data)),
      card("pad c4", heading("By endpoint", span("", "requests")),
        ul("rows", by.endpoint.map(each => share(each, "mono", "ok"))),
        heading("By result"), ul("rows", by.result.map(each => share(each, "", RESULTS[each.name] || "k5")))),
      card("pad " + (isAdmin() ? "c7" : ""), whereItWent(by)),
      isAdmin() && card("pad c5", heading("Providers", span("", "first token, p50 to p95, last hour")),
        providerLatencies(data.providers)),
      card("full", heading("Latest requests", link("sub", "#usage", "Open the usage log")),
        latest.length ? requestTable(latest) : para("empty", "None yet."))),
  ];
}

function spendBox({totals, before_nanos, month, now_ms}) {
  const {title, days} = RANGES[picked.range], isToday = days === 1;
  // The spend of the month, or of the budget period of the user's key.
  const {key} = session, {budget_nanos: budget} = key || month;
  const {spent_nanos: spent} = key && budget ? key : month;
  const isMonth = !key || key.period === "month" || !budget;
  const start = month.first_day * DAY_MS, end = month.next_day * DAY_MS;
  const passed = (now_ms - start) / (end - start);
  const name = new Date((start + end) / 2).toLocaleString("en", {month: "long", timeZone: "UTC"});
  const pace = usd(Math.round(spent / Math.max(passed, .02)), 0);
  return div("money", div("lab", "Spent " + (isToday ? "today" : "in " + title)), div("big", usd(totals.cost_nanos, 2)),
    para("sub", usd(before_nanos, 2) + (isToday ? " yesterday by this hour" : ` in the ${title} before`)),
    heading(isMonth ? name : "Budget, " + key.period,
      span("", usd(spent, 2) + (budget ? " of " + usd(budget, 2) : ", no budget"))),
    budget > 0 && bar(spent / budget, budgetClass(spent / budget), isMonth && passed),
    isMonth && para("d", budget > 0 && "The mark is today. ", `At this pace the month ends at ${pace}.`),
    totals.unpriced > 0 && para("d", count(totals.unpriced) + " requests had no price"));
}

function keyFigures({totals, by, first_ms, total_ms}) {
  const {requests, input, output, cached, saved_nanos} = totals;
  const found = (kind, wanted) => by[kind].find(each => each.name === wanted)?.requests || 0;
  const failed = found("result", "failed");
  const figures = [
    ["Requests", count(requests), "", count(found("endpoint", "/v1/responses")) + " through /v1/responses"],
    ["Tokens", tokens(input + output), " in + out", `${tokens(input)} in, ${tokens(output)} out`],
    ["Served from cache", pct(cached, input), " of input", `${tokens(cached)} tokens, ${usd(saved_nanos)} saved`],
    ["First token, p50", seconds(first_ms[0]), " s", `p95 ${seconds(first_ms[1])} s`],
    ["Full response, p50", seconds(total_ms[0]), " s", `p95 ${seconds(total_ms[1])} s`],
    ["Errors seen by clients", pct(failed, requests, 2), "",
      `${count(failed)} of ${count(requests)}; failover saved ${count(found("result", "failed over"))}`],
  ];
  return figures.map(([title, value, unit, note]) =>
    div("kpi", div("lab", title), div("v", value, unit && el("i", "", unit)), div("d", note)));
}

const COLORS = {openai: 1, anthropic: 2, google: 3, demo: 5};      // of providers; the first of the others has 4
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value || 1));
  return [1, 2, 2.5, 5, 10].map(factor => factor * power).find(each => each >= value) || value;
}

// Stacked bars with a line of text for one of them, or the same data as a table.
function overviewChart({totals, series: found, since_ms, step_ms, now_ms}) {
  const shown = picked.measure || (totals.cost_nanos ? "cost_nanos" : "requests");
  const {days, slots, labelEvery, unit} = RANGES[picked.range];
  const {format, formatAxis, least} = MEASURES[shown], title = `${MEASURES[shown].title} by ${unit}`;
  const [other] = found.map(each => each.name).filter(name => !COLORS[name]).sort();
  const colorOf = name => COLORS[name] || (name === other ? 4 : 5);
  const series = found.filter(each => each[shown].some(Boolean))
    .map(({name, ...each}) => ({name: name || NO_PROVIDER, color: colorOf(name), values: each[shown]}))
    .sort((a, b) => a.color - b.color || a.name.localeCompare(b.name));
  const sums = Array.from({length: slots}, (_, slot) => sum(series, each => each.values[slot]));
  const highest = Math.max(...sums), left = 44, top = 8, bottom = 22;
  let current = 0;
  const reading = para({class: "read", "aria-live": "polite"});
  const plot = svg({class: "chart", id: "chart", role: "application", tabindex: 0, onpointermove, onkeydown,
    "aria-label": title + ", stacked by provider. Left and right arrow keys read each bar."});
  const box = div("grow", reading, plot);

  const startOf = slot => new Date(since_ms + slot * step_ms);
  const tick = slot => days === 1 ? clock(startOf(slot)).slice(0, 2) : day(startOf(slot));
  function label(slot) {
    const start = startOf(slot);
    if (days === 30) return day(start);
    return (days > 1 ? day(start) + " " : "") + clock(start) + " to " + clock(startOf(slot + 1));
  }
  function draw() {
    const width = plot.clientWidth, height = Math.max(208, plot.clientHeight);
    if (width < 60) return;
    const slotWidth = (width - left) / slots, plotHeight = height - top - bottom;
    const step = roundUp(Math.max(highest, least) / 3);
    const limit = Math.max(step * Math.ceil(highest / step), step);
    const x = slot => left + slot * slotWidth;
    const y = value => top + plotHeight * (1 - value / limit);
    const shapes = [];
    for (let value = 0; value <= limit * 1.001; value += step) {
      shapes.push(el("line", {class: "gl", x1: left, x2: width, y1: y(value), y2: y(value)}),
        el("text", {x: 0, y: y(value) + 4}, formatAxis(value)));
    }
    shapes.push(rect({class: "cur", x: x(current), width: slotWidth, y: top, height: plotHeight}));
    for (let slot = 0; slot < slots; slot++) {
      let below = 0;
      for (const {color, values} of series.filter(each => each.values[slot])) {
        const y1 = y(below + values[slot]), gap = below ? 1 : 0;
        shapes.push(rect({class: "k" + color, x: x(slot + .16), width: slotWidth * .68, y: y1,
          height: Math.max(.5, y(below) - y1 - gap), rx: 1.5}));
        below += values[slot];
      }
    }
    for (let slot = 0; slot < slots; slot += labelEvery * (width < 520 ? 2 : 1)) {
      shapes.push(el("text", {x: x(slot + .5), y: height - 5, "text-anchor": "middle"}, tick(slot)));
    }
    plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    plot.replaceChildren(...shapes);
    const parts = series.filter(each => each.values[current]).map(each => `  ·  ${each.name} ${format(each.values[current])}`);
    reading.replaceChildren(bold(label(current)), "  " + format(sums[current]), ...parts);
  }
  function moveTo(slot) {
    current = Math.max(0, Math.min(slots - 1, slot));
    draw();
  }
  function onpointermove(event) {
    const place = plot.getBoundingClientRect();
    moveTo(Math.floor((event.clientX - place.left - left) / ((place.width - left) / slots)));
  }
  function onkeydown(event) {
    const move = ARROWS[event.key];
    if (!move) return;
    moveTo(current + move);
    event.preventDefault();
  }
  function asTable() {
    const columns = [...series, {name: "All", values: sums}].map(({name, values}) => [name, "r", slot => format(values[slot])]);
    const used = [...sums.keys()].filter(slot => sums[slot]);
    return scrollBox("div", "scroll", title + " as a table", table(null, title, [["Time", "nw", label], ...columns], used));
  }
  function onclick() {
    const isChart = box.contains(plot);
    flip.textContent = isChart ? "View as chart" : "View as table";
    swap(box, isChart ? asTable() : [reading, plot]);
  }
  const flip = el("button", {class: "sub", type: "button", id: "flip", onclick}, "View as table");
  const legend = series.map(({name, color, values}) => li(
    drawing(10, rect({width: 10, height: 10, rx: 2, class: "k" + color})), name + " ", bold(format(sum(values, Number)))));
  moveTo(Math.floor((now_ms - since_ms) / step_ms));
  new ResizeObserver(draw).observe(plot);       // calls it at once, too
  return [heading(title, segments("Measure", "measure", MEASURES, shown), flip), ul("leg", legend), box];
}

function whereItWent(by) {
  const columns = [
    ["Name", "", ({name}) => link("name", usageOf(picked.breakdown, name), bdi(name || "deleted key"))],
    ["Requests", "r opt", row => count(row.requests)],
    ["Input", "r opt", row => tokens(row.input)],
    ["Cached", "r opt", row => tokens(row.cached)],
    ["Cost", "r nw", costOfAll],
  ];
  const choices = {model: {title: "Model"}, key: {title: "Key"}};
  return [
    div("tb", h2("Where it went"), isAdmin() && segments("Break down by", "breakdown", choices, picked.breakdown)),
    table(null, "Where it went", columns, by[picked.breakdown].slice(0, 8)),
  ];
}

function providerLatencies(providers) {
  const longest = Math.max(1, ...providers.map(each => each.first_ms[1]));
  function range({first_ms}) {
    const [from, to] = first_ms.map(ms => ms / longest * 100);
    return track(to > 0 && [piece("ok soft", from, to - from), piece("ok", Math.min(from, 98), 2)]);
  }
  const columns = [
    ["Provider", "nw", each => span("name", stateDot(each), "  " + each.name)],
    ["State", "nw", each => each.state],
    ["Range", "", range],
    ["p50 / p95", "r nw", ({first_ms: [p50, p95]}) => p95 ? `${seconds(p50)} / ${seconds(p95)} s` : span("dim", "-")],
  ];
  const latencies = table(null, "Providers in the last hour", columns, providers.slice(0, 8));
  $("thead", latencies).className = "sr";
  const failing = providers.find(each => each.error && STATES[each.state] === "bad");
  const {name, error, back_s} = failing || {};
  return [latencies, failing && para("note bad", `${name}: ${error.message}`, back_s > 0 && ` (tried again in ${back_s} s)`)];
}

// --- keys and accounts ---
const PERIODS = [["month", "monthly"], ["week", "weekly"], ["day", "daily"], ["total", "never"]];
const EXPIRIES = [["0", "never"], ["30", "in 30 days"], ["90", "in 90 days"], ["365", "in a year"]];
const keyFields = ({budget_nanos, period, models = ""}) => [
  amount("Budget", "budget", "no limit", budget_nanos == null ? null : budget_nanos / 1e9),
  choice("Resets", "period", PERIODS, {value: period}),
  field("Models (patterns)", "models", {value: models.split(" ").join(", "), placeholder: "all models"}),
];
let newKey = null;          // the key just created, which nobody else has

function showKeys(main) {
  const panel = div();
  let shown = null;
  async function load() {
    if (newKey) newKey.setup ||= await api("setup");
    return api("keys");
  }
  function draw(data) {
    if (shown !== newKey) swap(panel, newKeyPanel());
    shown = newKey;
    return drawKeys(data);
  }
  const onsubmit = whenSubmitted(async (wanted, form) => {
    newKey = await api("keys", wanted);
    form.reset();
    await view.refresh();
    announce(`Key ${newKey.name} created`);
    $("#copykey")?.focus();
  });
  const form = el("form", {class: "mk", novalidate: true, onsubmit},
    field("Name", "name", {wide: true, placeholder: "ci-runner", required: true}),
    keyFields({}), choice("Expires", "expires_days", EXPIRIES), submitButton("Create key"));
  return livePage(main, [pageTop("Keys"), panel, div("grid", card("pad", heading("Create a key"), form))], load, draw);
}

const requestText = row => [bdi(row.model), ", ", bdi(row.client), " at ", time(row.started_ms)];
const WAITING = "Waiting for the first request…";

function newKeySteps() {
  const {seen} = newKey;
  return [
    step("", "Put the settings in place", "Then export POMEX_API_KEY in the same shell"),
    seen ? step("done", "First request received: " + seen.status, requestText(seen))
      : step("now", WAITING, 'Like: codex "What is 2 + 2?"'),
  ];
}

function newKeyPanel() {
  if (!newKey) return [];
  const {name, token, setup} = newKey;
  function stored() {
    newKey = null;
    view.refresh();
  }
  return div({class: "card new", role: "region", "aria-labelledby": "new-key"},
    div("hdr", div("", el("b", {id: "new-key"}, name, " is ready. Copy the key now."),
      para("", "Pomex keeps only its hash, so nobody can show it again.")), button("I have stored it", "", stored)),
    div("two", div("", div("lab", "API key"),
      div("keyv", el("code", {id: "kv"}, token), copyButton("Copy", "p", () => token, "Copy the key", "copykey")),
      el("ol", {class: "steps", id: "new-key-steps"}, newKeySteps())), setupBox(setup.agents, token)));
}

function askToLeave(path) {
  const text = para("", "It is not shown again once you leave this page.");
  openForm(`Have you stored the key of ${newKey.name}?`, text, "I have stored it", () => {
    newKey = null;
    location.hash = path;
  }, "Back to the key");
}
addEventListener("beforeunload", event => {
  if (newKey) event.preventDefault();
});

// The spent part of a key's budget; a budget of 0 is used up.
const usedPart = key => key.budget_nanos ? key.spent_nanos / key.budget_nanos : 1;
function keyState(key, now_s) {
  if (key.revoked_s) return span("tag", "revoked");
  if (key.expires_s && key.expires_s <= now_s) return span("tag", "expired");
  const used = key.budget_nanos == null ? 0 : usedPart(key);
  if (used >= .8) return span("tag " + budgetClass(used), Math.floor(used * 100) + " % used");
  return key.last_ms ? span("tag ok", "active") : span("tag", "waiting");
}

function drawKeys({keys, accounts, now_s}) {
  const active = keys.filter(key => !key.revoked_s).length;
  $("#nav [data-id=keys] .n").textContent = active;
  if (!keys.length) $("#f-name").focus();
  const spent = sum(keys, key => key.month_nanos);
  return div("grid",
    card("full", heading("All keys", span("", `${active} active, ${usd(spent, 2)} this month`)),
      keys.length ? table("stack", "All keys", keyColumns(accounts, now_s), keys)
        : para("empty", "No keys. Create the first one above.")),
    card("full", heading("Accounts", span("", "prepaid credit, a monthly limit, or neither"),
      button("New account", "s", openNewAccount)), table("stack", "Accounts", ACCOUNT_COLUMNS, accounts)));
}

function keyColumns(accounts, now_s) {
  function spent(key) {
    const budget = key.budget_nanos, total = usd(key.spent_nanos, 2) + " ";
    if (budget == null) return [total, span("dim", "no budget")];
    const period = key.period === "total" ? "in all" : Object.fromEntries(PERIODS)[key.period];
    const limit = `of ${usd(budget, budget % 1e9 ? 2 : 0)} ${period}`;
    return [div("nw", total, span("dim", limit)), bar(usedPart(key), budgetClass(usedPart(key)))];
  }
  return [
    ["Name", "", key => span("name", key.name)],
    ["Key", "nw dim opt", key => code(key.hint)],
    ["Models", "opt wrap", key => key.models ? bdi(key.models.split(" ").join(", "), 60) : "all models"],
    ["Spent", "full-row", spent],
    ["Last used", "nw opt", key => ago(key.last_ms)],
    ["State", "", key => keyState(key, now_s)],
    ["Actions", "r nw ka full-row", key => [
      usageLink("key", key.name, "btn s g"),
      !key.revoked_s && [
        button("Edit", "s g", () => openEditKey(key, accounts), "Edit key " + key.name),
        button("Revoke", "s g del", () => openRevokeKey(key), "Revoke key " + key.name)]]],
  ];
}

function accountKind({prepaid, limit_nanos, multiplier}) {
  const unpaid = limit_nanos == null ? "open" : "monthly limit";
  return (prepaid ? "prepaid" : unpaid) + (multiplier === 1e6 ? "" : " × " + multiplier / 1e6);
}
const ACCOUNT_COLUMNS = [
  ["Name", "", each => span("name", each.name)],
  ["Kind", "opt", accountKind],
  ["This month", "r nw", each => usd(each.month_nanos, 2)],
  ["Limit", "r nw opt", each => each.limit_nanos == null ? "none" : usd(each.limit_nanos, 2)],
  ["Balance", "r nw", ({prepaid, credit_nanos, spent_nanos}) =>
    prepaid || credit_nanos ? usd(credit_nanos - spent_nanos, 2) : ""],
  ["Actions", "r nw ka full-row", each => [
    button("Add credit", "s g", () => openCredit(each), "Add credit to " + each.name),
    button("Statement", "s g", () => openStatement(each), "Statement of " + each.name)]],
];

function openEditKey(key, accounts) {
  const limit = (label, name) => field(label + " (0: no limit)", name, {value: key[name], inputmode: "numeric"});
  const expiry = key.expires_s ? "on " + day(new Date(key.expires_s * 1000)) : "never (unchanged)";
  openForm("Edit key " + key.name, [
    keyFields(key), choice("Account", "account", accounts.map(({name}) => [name]), {value: key.account}),
    limit("Requests a minute", "rpm"), limit("Tokens a minute", "tpm"), limit("Concurrent requests", "concurrent"),
    choice("Expires", "expires_days", [["keep", expiry], ...EXPIRIES]),
  ], "Save", ({expires_days, ...values}) =>
    api("keys/" + key.id, expires_days === "keep" ? values : {...values, expires_days}));
}

function openRevokeKey({name, id}) {
  const text = "Its next request is refused. Streams in progress end normally. This cannot be undone.";
  openForm(`Revoke key ${name}?`, para("", text), "Revoke", () => api(`keys/${id}/revoke`, {}), "Keep it");
}

function openNewAccount() {
  openForm("New account", [
    field("Name", "name"),
    choice("Kind", "prepaid", [["", "open, or with a monthly limit"], ["1", "prepaid credit"]]),
    amount("Monthly limit", "limit", "none"),
    field("Price multiplier", "multiplier", {inputmode: "decimal", placeholder: "1"}),
  ], "Create account", values => api("accounts", values));
}

function openCredit({name}) {
  openForm("Add credit to " + name, [amount("Amount", "amount"), field("Reason (makes it an adjustment)", "reason")],
    "Add credit", values => api(`accounts/${name}/credit`, values));
}

function openStatement({name}) {
  const now = new Date();
  const months = Array.from({length: 12}, (_, i) => {
    const first = new Date(Date.UTC(now.getUTCFullYear(), now.getUTCMonth() - i));
    const text = first.toLocaleString("en-US", {month: "short", year: "numeric", timeZone: "UTC"});
    return [first.toISOString().slice(0, 7), text];
  });
  const body = div();
  const dialog = openDialog("Statement of " + name, div("gap", choice("Month (UTC)", "month", months, {onchange: show}), body),
    div("acts", button("Close", "", () => dialog.close())));
  // The month may change while its statement loads.
  async function load() {
    const month = $("select", dialog).value;
    const bill = await api(`accounts/${name}/statement?month=${month}`);
    return month === $("select", dialog).value ? bill : load();
  }
  function show() {
    fill(body, load, statementTable);
  }
  show();
}

function statementTable({charges, credits, before_nanos, spent_nanos, after_nanos}) {
  const columns = [
    ["Model", "wrap", row => bdi(row.model)],
    ["Requests", "r", row => row.requests && count(row.requests)],
    ["Tokens", "r nw", row => row.requests && tokens(row.input + row.output)],
    ["USD", "r nw", costOfAll],
  ];
  const credit = ({created_s, kind, reason, nanos}) =>
    ({model: `${new Date(created_s * 1000).toISOString().slice(0, 10)} ${kind} ${reason}`, cost_nanos: nanos});
  const balance = [
    {model: "Balance before", cost_nanos: before_nanos}, ...credits.map(credit),
    {model: "Charges", cost_nanos: -spent_nanos}, {model: "Balance after", cost_nanos: after_nanos},
  ];
  return table(null, "Charges by model", columns, charges, el("tfoot", "", tableRows(columns, balance)));
}

// --- the usage log and one request ---
const FILTERS = {       // [label, choices]
  time: ["Time", [["", "any time"], ["today"], ["1d", "last 24 hours"], ["7d", "last 7 days"], ["30d", "last 30 days"]]],
  result: ["Result", [["", "any"], ...Object.keys(RESULTS).map(result => [result])]],
  text: ["ID or error"], key: ["Key"], model: ["Model"], provider: ["Provider"], endpoint: ["Endpoint"],
  min_cost: ["Cost from, USD"],
};

function showUsage(main, query, id) {
  if (id) return showRequest(main, id);
  const exports = div("tb"), older = div("acts pad2");
  let rows = [];

  function params(extra) {
    const found = new URLSearchParams(extra);
    for (const name in FILTERS) {
      const value = query.get(name);
      if (!value) continue;
      if (name === "time") found.set("from", value === "today" ? midnight() : Date.now() - parseInt(value) * DAY_MS);
      else found.set(name, name === "min_cost" ? Math.round(parseFloat(value) * 1e9) || 0 : value);
    }
    return found;
  }
  function draw(data) {
    rows = data.rows;
    exports.replaceChildren(...["csv", "jsonl"].map(format => link("btn s", `/admin/api/usage.${format}?${params()}`,
      "Export " + format.toUpperCase(), {download: ""})));
    swap(older, olderButton(data.cursor));
    return div("grid", div("card full gap", para("sub pad2", describeTotals(data.sums)),
      rows.length ? requestTable(rows) : noRequests(query), older));
  }
  const olderButton = cursor => cursor && button("Show older", "", async pressed => {
    pressed.disabled = true;
    await fill(older, () => api(`usage?${params({cursor})}`), data => {
      rows.push(...data.rows);
      $("#main tbody").append(...tableRows(REQUEST_COLUMNS, data.rows));
      return olderButton(data.cursor);
    });
    older.firstChild?.focus();
  });
  function filter([name, [label, choices]]) {
    function onchange({target}) {
      query.set(name, target.value.trim());
      if (!query.get(name)) query.delete(name);
      history.replaceState(null, "", "#usage?" + query);
      view.refresh();
    }
    const value = query.get(name) || "";
    return choices ? choice(label, name, choices, {value, onchange}) : field(label, name, {value, onchange});
  }
  const onsubmit = event => event.preventDefault();
  const form = el("form", {class: "mk", role: "search", "aria-label": "Filters", onsubmit},
    Object.entries(FILTERS).filter(([name]) => isAdmin() || name !== "key").map(filter));
  const parts = [pageTop("Usage log", liveMark(), exports), card("pad", form)];
  const page = livePage(main, parts, () => api(`usage?${params()}`), draw);
  // New rows must not replace older ones that the user asked for.
  return {...page, live: throttle(() => rows.length <= 50 && page.refresh())};
}

function describeTotals({requests, input, cached, output, cost_nanos, unpriced}) {
  return `${count(requests)} requests, ${tokens(input)} in (${pct(cached, input)} cached), ${tokens(output)} out, ` +
    usd(cost_nanos) + (unpriced ? `; ${count(unpriced)} without a price` : "");
}

const noRequests = query => query.size
  ? div("empty", h2("Nothing matches"), para("", "No request matches these filters."), link("btn", "#usage", "Clear filters"))
  : div("empty", h2("No request yet"), para("", link(null, "#setup", "Set up a client"), " to see requests here."));

function showRequest(main, id) {
  const back = link("btn s", "#usage", "Back to the log");
  livePage(main, [pageTop("Request", back)], () => api("usage/" + id), drawRequest);
}

function drawRequest({row, trace, lines}) {
  const curl = () => curlCommand({model: row.model, input: "…", stream: true});
  const counts = `${tokens(row.input)} in (${tokens(row.cached)} cached, ${tokens(row.cache_write)} written), ` +
    `${tokens(row.output)} out (${tokens(row.reasoning)} reasoning)`;
  return div("grid",
    card("pad c6", heading("What happened", resultTag(row)), facts(requestFacts(row, trace)),
      div("acts", copyButton("Copy as curl", "s", curl))),
    card("pad c6", heading("Path"), el("ol", "steps", attemptSteps(row, trace)),
      heading("Time"), ul("rows", phases(row)),
      para("d", `Total: ${seconds(row.total_ms)} s. Prompts and answers are not stored.`)),
    card("full", heading("Tokens and cost", span("", counts)), costTable(row, lines)));
}

function requestFacts(row, {dropped}) {
  let terminal = row.terminal_by ? `response.${row.status}, sent by the ${row.terminal_by}` : "none: an error status";
  if (row.status === "cancelled") terminal = "none: the client left";
  return [
    ["Time", time(row.started_ms)],
    ...["Model", "Key", "Account", "Endpoint", "Client", "Session", "Tier"].map(each =>
      [each, bdi(row[each.toLowerCase()] || "-")]),
    ["Response id", code(bdi(row.response_id))], ["x-request-id", code(bdi(row.request_id))],
    row.upstream_id && ["Upstream id", code(bdi(row.upstream_id))],
    ["Terminal event", terminal],
    row.error_code && ["Error", [code(row.error_code), " ", row.error]],
    dropped.length && ["Dropped", dropped.join(", ")],
    row.estimated && ["Tokens", "estimated: " + row.estimated],
  ];
}

function attemptSteps(row, {tried, tried_ms}) {
  const steps = tried.map((text, i) => {
    const [name, ...reason] = text.split(": "), ms = tried_ms[i] - (tried_ms[i - 1] || 0);
    return step("bad", name, `${reason.join(": ")}, after ${seconds(ms)} s`);
  });
  const name = row.provider || NO_PROVIDER, isFirst = !steps.length;
  if (row.status !== "failed") {
    const attempts = isFirst && row.attempts > 1 && ` at attempt ${row.attempts}`;
    steps.push(step("done", name, "answered", attempts));
  } else if (isFirst) steps.push(step("bad", name, row.error || row.error_code));
  return steps;
}

function phases(row) {
  const total = Math.max(1, row.total_ms);
  const ends = [
    row.answering_ms && [`Before ${row.provider} was called`, row.asked_ms, "k5"],
    row.answering_ms && ["Until it began to answer", row.answering_ms, "warn"],
    row.first_ms && ["Until the first output", row.first_ms, "warn"],
    ["The answer", total, "ok"],
  ];
  let start = 0;
  return ends.filter(Boolean).map(([name, end_ms, barClass]) => {
    const from = start, length = Math.max(from, end_ms) - from;
    start += length;
    return li(span("", name), span("", seconds(length) + " s"),
      track(piece(barClass, from / total * 100, length / total * 100)));
  });
}

function costTable(row, lines) {
  const parts = lines.flatMap(line => line.parts.map(part => ({...part, line})));
  if (!parts.length) {
    const isUnpriced = !row.price && row.input + row.output > 0;
    return para("empty", isUnpriced ? "No price: set one under [prices] in pomex.toml." : "No tokens were billed.");
  }
  const columns = [
    ["What", "", part => part.what],
    ["Provider", "opt", ({line}) => line.provider + (line === lines.at(-1) ? "" : ", given up")],
    ["Tokens", "r", part => count(part.count)],
    ["USD per million", "r ml", ({what, picos}) => what === "web searches" ? `$${picos / 1e9} / 1,000` : "$" + picos / 1e6],
    ["Cost", "r", part => usd(part.nanos, 6)],
  ];
  const factor = row.multiplier === 1e6 ? "" : ` (prices × ${row.multiplier / 1e6})`;
  return table("stack", "Cost lines", columns, parts,
    el("tfoot", "", tr(td("", "Total" + factor), td("opt"), td("r"), td("r"), td("r", usd(row.cost_nanos, 6)))));
}

// --- models, providers, audit ---
function showModels(main) {
  const name = "Find a model";
  const input = el("input", {type: "search", placeholder: name, "aria-label": name, oninput: () => view.redraw()});
  function draw(data) {
    const wanted = input.value.toLowerCase();
    const models = data.models.filter(model => model.name.toLowerCase().includes(wanted));
    const any = data.any.join(", ");
    return [
      div("grid", card("full",
        heading(models.length + " models", span("", "USD per million tokens; prices of " + data.prices_date)),
        models.length ? table("stack", "Models", MODEL_COLUMNS, models.slice(0, 400))
          : para("empty", "No model of that name."))),
      any && para("note ok", `Any other model of ${any} works too, as provider/model-name.`),
      missingKeys(data.missing),
    ];
  }
  const {refresh, redraw} = livePage(main, [pageTop("Models", div("", input))], () => api("models"), draw);
  return {refresh, redraw};
}

// Prices are [input, output, cached input] in USD per million tokens.
const inOut = ([input, output]) => `$${input} in, $${output} out`;
const priceText = ({price}, i) => price && ((price[i] ?? "-") === "-" ? "-" : "$" + price[i]);
function modelName({name, description, price, context, long, long_over, peak}) {
  const contextText = context ? `, ${shortTokens(context)} context` : "";
  return [span("name", bdi(name)), description && div("d", bdi(description)),
    price && div("d only", `${inOut(price)} per million${contextText}`),
    long_over > 0 && div("d", `over ${shortTokens(long_over)} input: ${inOut(long)}`),
    peak > 1 && div("d", `× ${peak} in peak hours`)];
}
const MODEL_COLUMNS = [
  ["Name", "", modelName],
  ["In", "r opt", model => priceText(model, 0)],
  ["Cached", "r opt", model => priceText(model, 2)],
  ["Out", "r opt", model => priceText(model, 1)],
  ["Context / output", "r opt nw", ({context, max_output}) =>
    [context, max_output].filter(Boolean).map(shortTokens).join(" / ") || "-"],
  ["Goes to", "opt opt2 dim wrap", model => bdi(model.targets.join(" → "))],
  ["State", "", modelTag],
  ["Actions", "r nw ka full-row", ({name}) => [
    copyButton("Copy", "s g", () => name, "Copy " + name),
    link("btn s g", "#playground?model=" + encodeURIComponent(name), "Try", {"aria-label": "Try " + name})]],
];

function modelTag({state, price, source}) {
  const tag = (className, title, text) => span({class: "tag " + className, title}, text);
  if (state in STATES) return tag(STATES[state], state, state);
  if (state !== "ready") return tag("warn", state, "not usable");
  return price ? tag("ok", "Price from " + source, "ready") : tag("warn", null, "no price set");
}

function showProviders(main) {
  const results = {};
  const action = (name, verb, text) => button(text, "s", async pressed => {
    pressed.disabled = true;
    const result = await api(`providers/${encodeURIComponent(name)}/${verb}`, {}).catch(error => ({text: error.message}));
    results[name] = result;
    announce(`${name}: ${result.text || verb + "d"}`);
    view.refresh();
  }, `${text}: ${name}`);
  function drawProvider(provider) {
    const {name, state, back_s, minutes, requests, failed} = provider;
    const isDisabled = state === "disabled", {ok, text, ms} = results[name] || {};
    return card("pad c6",
      div("hd", h2(stateDot(provider), "  " + name),
        span("tag " + STATES[state], state, back_s > 0 && `, back in ${back_s} s`)),
      minuteStrip(minutes, `${requests} requests in the last hour, ${failed} failed`), facts(providerFacts(provider)),
      isDisabled && para("note warn", "No new request goes there until you enable it."),
      text && para({class: "note " + (ok ? "ok" : "bad"), role: "status"}, text + (ms ? ` ${ms} ms.` : "")),
      div("acts", usageLink("provider", name, "btn s"), action(name, "test", "Test now"),
        isDisabled ? action(name, "enable", "Enable") : action(name, "disable", "Disable")));
  }
  const draw = ({providers, missing}) => [div("grid", providers.map(drawProvider)), missingKeys(missing)];
  return livePage(main, [pageTop("Providers", liveMark())], () => api("providers"), draw);
}

// A column for each minute of the last hour.
function minuteStrip(minutes, label) {
  const highest = Math.max(1, ...minutes.map(([requests]) => requests));
  const column = (className, minute, n) => {
    const height = 28 * n / highest;
    return n > 0 && rect({class: className, x: minute * 4, width: 3, y: 28 - height, height});
  };
  return svg({class: "strip", viewBox: "0 0 240 28", preserveAspectRatio: "none", role: "img", "aria-label": label},
    minutes.map(([requests, failed], i) => [column("trk", i, highest), column("ok", i, requests), column("bad", i, failed)]));
}

function providerFacts(provider) {
  const {requests, failed, error, key_source} = provider;
  const latency = ([p50, p95]) => p95 ? `p50 ${seconds(p50)} s, p95 ${seconds(p95)} s` : "-";
  return [
    ["Last hour", `${count(requests)} requests, ${count(failed)} failed`],
    ["In flight", count(provider.open)],
    ["First token", latency(provider.first_ms)], ["Full response", latency(provider.total_ms)],
    ["Speaks", provider.wire_api + (provider.base_url ? " at " + provider.base_url : ", offline")],
    key_source && ["Key from", key_source],
    error && ["Last error", [time(error.time_ms), " ", error.message]],
  ];
}

function showAudit(main) {
  const change = ({before, after}) =>
    Object.keys(after).map(each => `${each} ${before[each] ?? ""} → ${after[each]}`).join(", ");
  const columns = [
    ["Time", "nw dim", row => time(row.time_ms)],
    ["Who", "", row => bdi(row.who)],
    ["What", "", row => [row.action + " ", bdi(row.name)]],
    ["Change", "wrap", row => bdi(change(row), 400)],
  ];
  const draw = ({rows}) => card("full", table("stack", "Changes", columns, rows));
  return livePage(main, [pageTop("Audit")], () => api("audit"), draw);
}

// --- the playground ---
function showPlayground(main, query) {
  const output = scrollBox("div", "out", "Answer");
  const events = el("ol", {class: "ev scroll", tabindex: 0, "aria-label": "Events"});
  const status = para({class: "sub", role: "status"}, "Nothing sent yet.");
  const names = el("datalist", {id: "names"});
  const stop = button("Stop", "", () => running.abort());
  stop.disabled = true;
  let running = null;

  function requestBody() {
    const {model, input, instructions, tools, effort} = formValues(form);
    const body = {model: model.trim(), input, stream: true};
    if (instructions.trim()) body.instructions = instructions;
    if (effort) body.reasoning = {effort};
    try {
      if (tools.trim()) body.tools = JSON.parse(tools);
    } catch (error) {
      throw fieldError("tools", "The tools must be a JSON list: " + error.message);
    }
    return body;
  }
  const copyAs = name => button(name, "s g", pressed => {
    try {
      copy(COMMANDS[name](requestBody()), pressed);
    } catch (error) {
      showFormError(form, error);
    }
  }, "Copy as " + name);
  async function run(body) {
    const begun = performance.now();
    output.replaceChildren();
    events.replaceChildren();
    running = new AbortController();
    stop.disabled = false;
    status.textContent = "Sent.";
    let id = "";
    try {
      const response = await fetch("/admin/api/playground", {...post(body), signal: running.signal});
      if (!response.ok) {
        status.textContent = "HTTP " + response.status;
        output.append(clip(await response.text(), 4000));
        return;
      }
      for await (const [type, data] of readEvents(response)) {
        const ms = performance.now() - begun, event = data === "[DONE]" ? {} : JSON.parse(data);
        addEvent(ms, type || data, event);
        id = event.response?.id || id;
        showEvent(type, event, ms);
      }
      if (id) setTimeout(showCost, 350, id);
    } catch (error) {
      status.textContent = error.name === "AbortError" ? "Stopped." : clip(error.message, 300);
    } finally {
      stop.disabled = true;
    }
  }
  function addEvent(ms, type, event) {
    if (events.childElementCount >= 600) return;
    const shown = el("pre", "code wrap");
    const ontoggle = () => shown.textContent = clip(JSON.stringify(event, null, 1), 20000);
    events.append(li(el("details", {ontoggle}, el("summary", "", span("dim r", Math.round(ms) + " ms"),
      span("dim r", event.sequence_number), span("", type)), shown)));
  }
  function showEvent(type, {delta, name, response, ...event}, ms) {
    if (type === "response.output_text.delta") output.append(delta);
    if (type === "response.function_call_arguments.done") {
      output.append(`\n[call ${clip(name)} ${clip(event.arguments, 2000)}]`);
    }
    if (!/^response\.(completed|incomplete|failed)$/.test(type)) return;
    const {usage, error} = response;
    const used = usage ? `, ${tokens(usage.input_tokens)} in, ${tokens(usage.output_tokens)} out` : "";
    const problem = error ? ": " + clip(error.message, 400) : "";
    status.textContent = `${type} after ${seconds(ms)} s${used}${problem}`;
  }
  async function showCost(id) {
    const found = await api("usage/" + id).catch(() => null);
    if (found) status.append(", ", costOf(found.row), " ", link(null, "#usage/" + id, "Show the request"));
  }

  const area = (label, name, attributes, text) => field(label, name, attributes, "textarea", text);
  const form = el("form", {class: "gap", onsubmit: whenSubmitted(async () => run(requestBody()))},
    field("Model", "model", {list: "names", value: query.get("model") || "demo/echo", required: true}), names,
    area("Input", "input", {rows: 4, required: true}, "What is 2 + 2?"),
    area("Instructions", "instructions", {rows: 2, placeholder: "none"}),
    area("Tools, as JSON", "tools", {rows: 2, placeholder: "[]"}),
    choice("Reasoning effort", "effort", [["", "model default"], ["low"], ["medium"], ["high"]]),
    div("tb", span("", submitButton("Send"), " ", stop), span("sub", "Copy as", Object.keys(COMMANDS).map(copyAs))));
  main.append(pageTop("Playground"), div("grid", card("pad c5", form),
    div("c7 gap", card("pad", heading("Answer"), output, status), card("pad", heading("Events"), events))));
  api("models").then(({models}) =>
    names.append(...models.slice(0, 400).map(({name}) => el("option", {value: name})))).catch(() => null);
}

// Yields [type, data] of each server-sent event.
async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const [, type] = /^event: (.*)/m.exec(frame) || ["", ""];
      const data = Array.from(frame.matchAll(/^data: (.*)/gm), found => found[1]).join("");
      if (data) yield [type, data];
    }
  }
}

// --- set-up ---
const CAUSES = {
  invalid_api_key: "The key was refused", wrong_base_url: "base_url is wrong", use_http_sse: "A WebSocket was tried",
  wrong_wire_api: "Another API was asked",
};

function showSetup(main) {
  const steps = el("ol", {class: "steps"}), snippets = div();
  function draw({agents, refused, ...state}) {
    if (!snippets.firstChild) snippets.append(setupBox(agents));
    swap(steps, setupSteps(state));
    const found = refused.length ? table("stack", "Refused requests", REFUSED_COLUMNS, refused)
      : para("empty", "None. A wrong key, model or address appears here within a second, with its fix.");
    return div("grid", card("full", heading("Refused requests", span("", "newest first")), found));
  }
  const parts = [pageTop("Setup", liveMark()), card("two", div("", heading("Checks"), steps), snippets)];
  const page = livePage(main, parts, () => api("setup"), draw);
  function live(kind, event) {
    if (kind === "refused") announce(`${CAUSES[event.code] || "Refused"}: ${event.message}`);
    if (kind === "usage") announce("A request ended: " + event.status);
    page.live();
  }
  return {...page, live};
}

function setupSteps({providers, demo, keys, running, latest}) {
  let provider = step("bad", "No provider is ready", "Set a provider's key.");
  if (demo) provider = step("done", "The demo is ready", "For real models set a provider's key.");
  if (providers.length) provider = step("done", "Providers are configured", providers.join(", "));
  const key = keys ? step("done", keys === 1 ? "A key exists" : keys + " keys exist")
    : step("bad", "No key yet", link(null, "#keys", "Create a key"));
  return [step("done", "The gateway answers on " + location.host), provider, key,
    ...requestSteps(running, latest[0])];
}

function requestSteps(running, latest) {
  const end = step("", "Its stream ends as it should");
  if (running) return [step("now", "A request is in flight", requestText(running)), end];
  if (!latest) return [step("now", WAITING, 'Paste the settings, export POMEX_API_KEY, then run: codex "What is 2 + 2?"'), end];
  const {status, error, endpoint} = latest;
  const ended = (endpoint === "/v1/responses" ? "Its stream ended with response." : "Its stream ended: ") + status;
  return [step("done", "A request was received", requestText(latest)),
    step(status === "completed" ? "done" : "bad", status === "cancelled" ? "The client left" : ended, clip(error, 300))];
}

const REFUSED_COLUMNS = [
  ["Time", "nw dim opt", row => time(row.time_ms)],
  ["Problem and fix", "", row => [div("name", CAUSES[row.code] || "The request was refused"),
    div("wrap", bdi(row.message, 600)),
    div("d wrap", row.key ? ["key ", bdi(row.key), ", "] : null, bdi(row.user_agent || "no User-Agent"))]],
  ["Request", "opt wrap", row => div("mono", bdi(row.method + " " + row.path))],
  ["Status", "r nw", row => span("tag bad", row.status)],
];

$(".skip").onclick = event => {
  event.preventDefault();
  $("#main").focus();
};
begin();
</script></body></html>
"""


if __name__ == "__main__":
    sys.exit(main())
