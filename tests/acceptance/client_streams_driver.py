"""Runs inside an environment with the openai or the anthropic package: reads answers as its clients do.

    python client_streams_driver.py chat|messages FOLDER
prints {file name: {"complaints": [...], "end", "text", "calls": [[id, name, arguments]], "error", "extra": [...]}} for each
*.sse and *.json of the folder. Types are pydantic's, strictly; the answer is put together by the package's own code.
`extra` names the fields that the types do not have.
"""
from __future__ import annotations

import json
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pydantic

JSON = dict[str, Any]
warnings.simplefilter("error", UserWarning)         # pydantic warns where a field has not the type it declares


def extras(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, pydantic.BaseModel):
        for name in value.model_extra or {}:
            yield f"{path}.{name}"
        for name in type(value).model_fields:
            yield from extras(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, list):
        for each in value:
            yield from extras(each, path)


class Strict:
    """Validates by a type, and remembers what is wrong and what the type does not have."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.extra: set[str] = set()

    def __call__(self, kind: Any, value: JSON) -> Any:
        try:
            made = pydantic.TypeAdapter(kind).validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            self.complaints += [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5]]
            raise
        self.extra |= set(extras(made))
        return made


# --- openai

def read_chunks(raw: bytes, strict: Strict) -> JSON:
    from openai._streaming import SSEDecoder
    from openai.lib.streaming.chat import ChatCompletionStreamState
    from openai.types.chat import ChatCompletionChunk

    state, error, told = ChatCompletionStreamState(), None, []
    for sse in SSEDecoder().iter_bytes(iter([raw])):
        if sse.data.startswith("[DONE]"):
            break
        data = sse.json()
        if data.get("error"):
            error = data["error"]
            break
        for event in state.handle_chunk(strict(ChatCompletionChunk, data)):
            told.append(event.type)
    answer = read_choice(state.current_completion_snapshot) if told else {"end": None, "text": "", "calls": []}
    return {**answer, "error": error}


def read_completion(raw: bytes, strict: Strict) -> JSON:
    from openai.types.chat import ChatCompletion

    return {**read_choice(strict(ChatCompletion, json.loads(raw))), "error": None}


def read_choice(completion: Any) -> JSON:
    choice = completion.choices[0]
    calls = [[call.id, call.function.name, call.function.arguments] for call in choice.message.tool_calls or []]
    return {"end": choice.finish_reason, "text": choice.message.content or "", "calls": calls}


# --- anthropic

def read_events(raw: bytes, strict: Strict) -> JSON:
    from anthropic._streaming import SSEDecoder
    from anthropic.lib.streaming._messages import accumulate_event
    from anthropic.types import RawMessageStreamEvent
    from anthropic.types.shared import ErrorResponse

    message, error, buffers = None, None, {}
    for sse in SSEDecoder().iter_bytes(iter([raw])):
        if sse.event == "ping":
            continue
        if sse.event == "error":
            error = strict(ErrorResponse, sse.json()).model_dump()["error"]
            break
        event = strict(RawMessageStreamEvent, sse.json())
        message = accumulate_event(event=event, current_snapshot=message, json_bufs=buffers)
    answer = read_message(message) if message else {"end": None, "text": "", "calls": []}
    return {**answer, "error": error}


def read_whole_message(raw: bytes, strict: Strict) -> JSON:
    from anthropic.types import Message

    return {**read_message(strict(Message, json.loads(raw))), "error": None}


def read_message(message: Any) -> JSON:
    calls = [[block.id, block.name, json.dumps(block.input)] for block in message.content if block.type == "tool_use"]
    text = "".join(block.text for block in message.content if block.type == "text")
    return {"end": message.stop_reason, "text": text, "calls": calls}


READERS: dict[tuple[str, str], Callable[[bytes, Strict], JSON]] = {
    ("chat", ".sse"): read_chunks, ("chat", ".json"): read_completion,
    ("messages", ".sse"): read_events, ("messages", ".json"): read_whole_message}


def read(api: str, path: pathlib.Path) -> JSON:
    strict = Strict()
    try:
        answer = READERS[api, path.suffix](path.read_bytes(), strict)
    except Exception as error:  # noqa: BLE001 - whatever the package raises is the answer
        answer = {}
        strict.complaints.append(f"{type(error).__name__}: {str(error)[:300]}")
    return {**answer, "complaints": strict.complaints, "extra": sorted(strict.extra)}


api, folder = sys.argv[1:]
print(json.dumps({path.name: read(api, path) for path in sorted(pathlib.Path(folder).iterdir())}))
