"""Sinks for tests: one that puts the calls of a decoder together, one that only records them; and calls as values."""
from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pomex

JSON = dict[str, Any]
CHANNELS = ("text", "refusal", "summary", "raw", "arguments", "input")


class View:
    """What the calls of a decoder amount to, with the rules that every decoder keeps checked on the way."""

    def __init__(self) -> None:
        self.items: dict[int, JSON] = {}
        self.keys: dict[Any, JSON] = {}             # the open ones
        self.used: set[Any] = set()
        self.usage: pomex.Usage | None = None
        self.stops: list[pomex.Stop] = []
        self.error: pomex.GatewayError | None = None

    def _begin(self, key: Any, kind: str, **fields: Any) -> JSON:
        self.done()
        assert key is None or key not in self.used, "a key used twice"
        self.used.add(key)
        item = {"kind": kind, "id": "", "name": "", "namespace": "", "closed": False, "annotations": [], "fields": {},
                **dict.fromkeys(CHANNELS, ""), **fields}
        self.items[len(self.items)] = self.keys[key] = item
        return item

    def text(self, text: str, channel: str = "text") -> None:
        assert text or channel == "summary"
        kind = "reasoning" if channel == "summary" else "message"
        item = self.keys.get(None)
        if item is None or item["kind"] != kind:
            item = self._begin(None, kind)
        item[channel] += text

    def open(self, key: Any, kind: str, **fields: Any) -> None:
        self._begin(key, kind, fields=fields)

    def call(self, key: Any, call_id: str, tool: pomex.Tool) -> None:
        self._begin(key, tool.kind, id=call_id, name=tool.name, namespace=tool.namespace)

    def add(self, key: Any, text: str, channel: str, part: int = 0) -> None:
        assert text
        self.keys[key][channel] += text

    def add_all(self, key: Any, texts: list[str], channel: str) -> None:
        for text in texts:
            self.add(key, text, channel)

    def annotate(self, annotation: JSON, key: Any = None) -> None:
        self.keys[key]["annotations"].append(annotation)

    def done(self, key: Any = None, **fields: Any) -> None:
        item = self.keys.pop(key, None)
        assert item or key is None, "done without being open"
        if item:
            item["closed"] = True
            item["fields"] |= {name: value for name, value in fields.items() if value or name != "sealed_replay"}

    def item(self, item: JSON) -> None:
        self._begin(None, item["type"], fields=item)
        self.done()

    def set_usage(self, usage: pomex.Usage) -> None:
        self.usage = usage

    def set_stop(self, stop: pomex.Stop) -> None:
        self.stops.append(stop)

    def fail(self, error: pomex.GatewayError) -> None:
        self.error = self.error or error

    def all(self, kind: str) -> list[JSON]:
        return [item for item in self.items.values() if item["kind"] == kind]

    def said(self, channel: str = "text") -> str:
        return "".join(item[channel] for item in self.items.values())

    def kinds(self) -> list[str]:
        return [item["kind"] for item in self.items.values()]

    def end(self) -> str:
        if self.error is not None:
            return "failed"
        return (self.stops[-1].incomplete_reason or "completed") if self.stops else "none"


class Recorder:
    """Every call, as (method, arguments, fields)."""

    def __init__(self) -> None:
        self.made: list[tuple[str, Any, JSON]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given, **fields: self.made.append((name, [getattr(each, "args", each) for each in given], fields))


def feed_all(reader: Any, events: Any) -> Any:
    """Feeds each event, JSON or text; returns the reader's sink."""
    for event in events:
        reader.feed(event if isinstance(event, str) else json.dumps(event))
    return reader.sink


def feed_bytes(reader: Any, pieces: Any) -> Any:
    """Feeds an SSE body to its end; returns the reader's sink."""
    events = pomex.SSEDecoder()
    for data in pieces:
        feed_all(reader, [event.data for event in events.feed(data)])
    feed_all(reader, [event.data for event in events.finish()])
    reader.end()
    return reader.sink


def whole(reader: Any, body: Any) -> Any:
    reader.whole(body)
    return reader.sink


# --- calls as values, for tables

def begins(key: Any, kind: str, call_id: str = "", name: str = "", namespace: str = "", fields: JSON | None = None) -> Any:
    if call_id:
        return lambda sink: sink.call(key, call_id, pomex.Tool(kind, name, namespace))
    return lambda sink: sink.open(key, kind, **(fields or {}))


def calls(key: Any, call_id: str, tool: pomex.Tool) -> Any:
    return lambda sink: sink.call(key, call_id, tool)


def adds(key: Any, text: str, channel: str = "text", part: int = 0) -> Any:
    return lambda sink: sink.add(key, text, channel, part)


def ends(key: Any, fields: JSON | None = None) -> Any:
    return lambda sink: sink.done(key, **(fields or {}))


def tell(sink: Any, said: Any) -> None:
    """Makes these calls of a sink; a Stop or a Usage stands for its own."""
    for each in said:
        if isinstance(each, pomex.Stop):
            sink.set_stop(each)
        elif isinstance(each, pomex.Usage):
            sink.set_usage(each)
        else:
            each(sink)
