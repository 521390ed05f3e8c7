"""Runs inside an environment with the openai package: walks its types of a Responses request, and asks of every field whether a
wire carries it or names it as dropped.

    python fields_driver.py POMEX.PY WIRE[:MODEL[:DIALECT]]
prints {"fields": [PATH ...], "silent": {PATH: [value ...]}, "refused": {PATH: message}}, with paths such as
`tools[web_search].filters.allowed_domains`. A value is *silent* if a request with it goes up as one without it, and no more is
named as dropped. What is in a thing that is dropped as a whole, and named, is not looked at; nor what is in one that is refused.
"""
from __future__ import annotations

import collections.abc
import json
import sys
import typing
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import typing_extensions
from encode_driver import load_pomex
from openai.types.responses import response_create_params

JSON = dict[str, Any]
PIXEL = ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==",
         "https://images.example/one.png")
TEXT_FILE = ("data:text/plain;base64,aGVsbG8=", "data:text/plain;base64,d29ybGQ=")
# Values for fields of which not every string will do.
STRINGS = {"image_url": PIXEL, "file_data": TEXT_FILE, "file_url": ("https://files.example/a.pdf", "https://files.example/b.pdf"),
           "arguments": ('{"a":1}', '{"b":2}'), "name": ("probe", "other_probe"), "call_id": ("call_probe", "call_other"),
           "server_url": ("https://mcp.example", "https://mcp2.example"), "input_type": ("json", "text")}
SCHEMA = ({"type": "object", "properties": {"a": {"type": "string"}}}, {"type": "object", "properties": {"b": {"type": "integer"}}})
# What a request has besides the field that is looked at, so that the field can mean something.
BESIDE: dict[str, JSON] = {
    "tool_choice": {"tools": [{"type": "function", "name": "probe", "parameters": SCHEMA[0]}, {"type": "custom", "name": "other_probe"}]},
    "parallel_tool_calls": {"tools": [{"type": "function", "name": "probe", "parameters": SCHEMA[0]}]},
}
# What makes a part with only its required fields a part at all.
FILLED: dict[str, JSON] = {"input_image": {"image_url": PIXEL[0]}, "input_file": {"file_data": TEXT_FILE[0], "filename": "probe.txt"}}
MAX_DEPTH = 7


class Outcome(NamedTuple):
    """What became of a request: `refused` in words, or the body that goes up and the names of what was dropped."""
    body: str
    dropped: tuple[str, ...]
    refused: str


def resolved(hint: Any) -> Any:
    """A type without the marks of being required, optional or annotated."""
    while typing.get_origin(hint) in (typing_extensions.Required, typing_extensions.NotRequired, typing.Annotated,
                                      typing_extensions.Annotated, typing.Required, typing.NotRequired):
        hint = typing.get_args(hint)[0]
    return hint


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Union or type(hint).__name__ == "UnionType"


def is_list(hint: Any) -> bool:
    return typing.get_origin(hint) in (list, collections.abc.Iterable, collections.abc.Sequence)


def fields_of(hint: Any) -> dict[str, tuple[Any, bool]]:
    """name -> (type, is it required), of a TypedDict. Its `__required_keys__` are wrong where annotations are strings."""
    hints = typing_extensions.get_type_hints(hint, include_extras=True)
    required = (typing.Required, typing_extensions.Required)
    return {name: (resolved(inner), typing.get_origin(inner) in required) for name, inner in hints.items()}


def scalars(hint: Any, name: str) -> list[Any]:
    """Values of a plain type, all different from what happens without the field as far as that can be known."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    if hint is str:
        return list(STRINGS.get(name, (f"probe {name} one", f"probe {name} two")))
    if hint is bool:
        return [True, False]
    if hint is int:
        return [2000 + zlib.crc32(name.encode()) % 999, 2] if name not in ("top_logprobs",) else [7, 3]
    if hint is float:
        return [0.37, 0.73]
    if hint is object or hint is Any:
        return ["probe value", {"probe": "value"}]
    if typing.get_origin(hint) is dict or hint is dict:
        if name in ("parameters", "schema"):
            return list(SCHEMA)
        inner = typing.get_args(hint)
        return [{"probe": scalars(resolved(arm), name)[0] if not typing_extensions.is_typeddict(arm) else smallest(arm, name)}
                for arm in (alternatives(resolved(inner[1])) if inner else [str])]
    return []


def alternatives(hint: Any) -> list[Any]:
    hint = resolved(hint)
    if is_union(hint):
        return [arm for each in typing.get_args(hint) if each is not type(None) for arm in alternatives(each)]
    return [hint]


def smallest(hint: Any, name: str) -> Any:
    """A value with only what is required."""
    hint = alternatives(hint)[0]
    if typing_extensions.is_typeddict(hint):
        return {field: smallest(inner, field) for field, (inner, required) in fields_of(hint).items()
                if required or field == "type" and typing.get_origin(inner) is typing.Literal}
    if is_list(hint):
        return [smallest(typing.get_args(hint)[0], name)]
    values = scalars(hint, name)
    return values[0] if values else None


class Walk:
    def __init__(self, pomex: Any, wire: str, model: str, dialect: str) -> None:
        self.pomex, self.target = pomex, (wire, model or "some-model", dialect)
        self.fields: set[str] = set()
        self.silent: dict[str, list[Any]] = {}
        self.refused: dict[str, str] = {}

    def ask(self, request: JSON) -> Outcome:
        try:
            body, dropped = self.encode(json.dumps(request).encode())
        except self.pomex.BadRequest as refused:
            return Outcome("", (), str(refused))
        return Outcome(body.decode(), tuple(dropped), "")

    def encode(self, raw: bytes) -> tuple[bytes, list[str]]:
        """The body that goes up, and what is named as not carried."""
        pomex, (wire, model, dialect) = self.pomex, self.target
        answer = pomex.ResponsesAnswer(pomex.parse_request(raw), "resp_" + "0" * 32, 1_700_000_000, pomex.CODEX)
        context = getattr(pomex, "Job", None) or pomex.EncodeContext
        call = pomex.WIRES[wire].call(context(answer, pomex.Envelope(b"s" * 32, "a"), "p", model, False, dialect))
        return call.body, call.dropped

    def look(self, path: str, value: Any, found: Outcome, without: Outcome) -> None:
        """Notes a value that makes no difference."""
        if found == without:
            self.silent.setdefault(path, []).append(value)

    def walk(self, hint: Any, path: str, name: str, build: Callable[[Any], JSON], without: Outcome | None, depth: int = 0) -> None:
        """`build` makes a request with a value of this type in its place; `without` is the outcome where the place is empty, None
        where it may not be."""
        for arm in alternatives(hint):
            if typing_extensions.is_typeddict(arm):
                self.walk_dict(arm, path, name, build, without, depth)
            elif is_list(arm):
                empty = without or self.ask(build([]))
                self.walk(typing.get_args(arm)[0], path + "[]", name, lambda value: build([value]), None if empty.refused else empty, depth)
            else:
                values = [value for value in scalars(arm, name) if value is not None]
                self.fields.add(path)
                if without is not None:
                    for value in values:
                        self.look(path, value, self.ask(build(value)), without)
                elif len(values) > 1 and name != "type":
                    self.look(path, values[1], self.ask(build(values[1])), self.ask(build(values[0])))

    def walk_dict(self, hint: Any, path: str, name: str, build: Callable[[Any], JSON], without: Outcome | None, depth: int) -> None:
        base = smallest(hint, name)
        base |= FILLED.get(str(base.get("type")), {})
        kind = base.get("type") or (base.get("role") and "message")
        path = f"{path.removesuffix('[]')}[{kind}]" if isinstance(kind, str) else path
        found = self.ask(build(base))
        self.fields.add(path)
        if found.refused:
            self.refused[path] = found.refused
            return
        if without is not None and found.body == without.body and found.dropped != without.dropped:
            return                      # dropped as a whole, and named
        if without is not None and found == without and set(base) - {"type"}:
            self.silent.setdefault(path, []).append(base)
            return
        if depth >= MAX_DEPTH:
            return
        for field, (inner, required) in fields_of(hint).items():
            if field == "type" and typing.get_origin(inner) is typing.Literal:
                continue
            empty = {key: value for key, value in base.items() if key != field}
            self.walk(inner, f"{path}.{field}", field, lambda value, field=field, empty=empty: build({**empty, field: value}),
                      None if required else found if field not in base else self.ask(build(empty)), depth + 1)


def in_conversation(item: Any) -> list[Any]:
    """An input item with the call or the output that belongs to it."""
    kind, call_id = str(item.get("type", "")), item.get("call_id", "")
    user = {"type": "message", "role": "user", "content": "hi"}
    calls = {"function_call": {"name": "probe", "arguments": "{}"}, "custom_tool_call": {"name": "probe", "input": "x"},
             "local_shell_call": {"id": "lsh_1", "status": "completed", "action": {"type": "exec", "command": ["ls"], "env": {}}},
             "tool_search_call": {"arguments": {"query": "x"}, "execution": "client"}}
    if kind in calls:
        return [user, item, {"type": f"{kind}_output", "call_id": call_id, "output": "done"}]
    if (call := kind.removesuffix("_output")) in calls and kind.endswith("_output"):
        return [user, {"type": call, "call_id": call_id, **calls[call]}, item]
    return [user, item]


def walk_request(walk: Walk) -> None:
    plain = {"model": "p/m", "stream": True, "input": "hi", "prompt_cache_key": "k"}      # left out, some dialects make one of all that is asked
    for name, (hint, _) in fields_of(response_create_params.ResponseCreateParamsBase).items():
        base = {key: value for key, value in {**plain, **BESIDE.get(name, {})}.items() if key != name or name == "input"}
        if name == "input":
            items = next(typing.get_args(arm)[0] for arm in alternatives(hint) if is_list(arm))
            walk.walk(items, "input[]", name, lambda item: {**plain, "input": in_conversation(item)}, walk.ask({**plain, "input": in_conversation({})[:1]}))
        elif name != "model":
            walk.walk(hint, name, name, lambda value, name=name, base=base: {**base, name: value}, walk.ask(base))


def main(path: str, form: str) -> None:
    wire, model, dialect = (form.split(":") + ["", ""])[:3]
    walk = Walk(load_pomex(path), wire, model, dialect)
    walk_request(walk)
    print(json.dumps({"fields": sorted(walk.fields), "silent": walk.silent, "refused": walk.refused}))


if __name__ == "__main__":
    main(*sys.argv[1:])
