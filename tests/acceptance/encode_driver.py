"""Runs inside an environment with a provider's package: encodes requests with pomex.py, validates the bodies by its types.

    python encode_driver.py POMEX.PY WIRE[:MODEL[:DIALECT]] FILE...      prints {"FILE": ["what is wrong", ...], ...}
"""
from __future__ import annotations

import importlib.util
import json
import sys
import typing
from collections.abc import Iterable
from typing import Any

import pydantic
import typing_extensions


def load_pomex(path):
    spec = importlib.util.spec_from_file_location("pomex", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pomex"] = module
    spec.loader.exec_module(module)
    return module


def chat_type():
    from openai.types.chat import completion_create_params as params
    return params.CompletionCreateParamsStreaming | params.CompletionCreateParamsNonStreaming


def responses_type():
    from openai.types.responses import response_create_params as params
    return params.ResponseCreateParamsStreaming | params.ResponseCreateParamsNonStreaming


TYPES = {"chat": chat_type, "responses": responses_type}


def consumed(value: Any) -> None:
    """pydantic validates an Iterable when it is read."""
    if isinstance(value, dict):
        for inner in value.values():
            consumed(inner)
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        for inner in value:
            consumed(inner)


def unknown_keys(body, typed) -> list[str]:
    known = set().union(*(typing_extensions.get_type_hints(t) for t in typing.get_args(typed) or [typed]))
    return [f"{key}: not a field of the request" for key in body if key not in known]


def complaints(body, typed, adapter) -> list[str]:
    try:
        consumed(adapter.validate_python(body))
    except pydantic.ValidationError as error:
        return [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()[:5]]
    return unknown_keys(body, typed)


def encode(pomex, wire, model, dialect, raw) -> Any:
    request = pomex.check_request(raw)
    answer = pomex.Answer(request, "resp_" + "0" * 32, 1_700_000_000, pomex.CODEX)
    job = pomex.Job(answer, pomex.Envelope(b"s" * 32, "a"), "p", model, False, dialect)
    return json.loads(pomex.WIRES[wire].call(job).body)


def main(path, form, *files):
    pomex = load_pomex(path)
    wire, model, dialect = (form.split(":") + ["", ""])[:3]
    typed = TYPES[wire]()
    adapter = pydantic.TypeAdapter(typed)
    found = {}
    for file in files:
        with open(file, "rb") as opened:
            raw = opened.read()
        try:
            body = encode(pomex, wire, model or "some-model", dialect, raw)
        except pomex.BadRequest as refused:
            found[file] = [f"refused: {refused}"]
            continue
        found[file] = complaints(body, typed, adapter)
    print(json.dumps(found))


main(*sys.argv[1:])
