"""Runs inside an environment with a provider's package: encodes requests with pomex.py, validates the bodies by its types.

    python encode_driver.py POMEX.PY WIRE[:MODEL[:DIALECT]] FILE...
prints {"FILE": {"body": {...}, "headers": {...}, "complaints": ["what is wrong", ...]}, ...}; a file that parse_request refuses is given as null.
"""
from __future__ import annotations

import importlib.util
import json
import sys
import typing
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pydantic
import typing_extensions

warnings.simplefilter("error", UserWarning)


def load_pomex(path):
    spec = importlib.util.spec_from_file_location("pomex", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pomex"] = module
    spec.loader.exec_module(module)
    return module


# --- what a body is held against

def forbid_extras(hint: Any, seen: set[Any]) -> None:
    """TypedDicts, and the answers' blocks that may stand among them, take unknown keys unless they are told not to:
    all that `hint` leads to are told."""
    is_model = isinstance(hint, type) and issubclass(hint, pydantic.BaseModel)
    if (typing_extensions.is_typeddict(hint) or is_model) and hint not in seen:
        seen.add(hint)
        inside = [f.annotation for f in hint.model_fields.values()] if is_model else typing_extensions.get_type_hints(hint).values()
        for inner in inside:
            forbid_extras(inner, seen)
        if is_model:
            hint.model_config["extra"] = "forbid"
            hint.model_rebuild(force=True)
        else:
            hint.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    for inner in typing.get_args(hint):
        forbid_extras(inner, seen)


def typed_dict(streaming: Any, whole: Any) -> Callable[[Any], Any]:
    adapters = []
    for typed in (whole, streaming):
        forbid_extras(typed, set())
        adapters.append(pydantic.TypeAdapter(typed))
    return lambda body: adapters[bool(body.get("stream"))].validate_python(body)


def chat_judge():
    from openai.types.chat import completion_create_params as params
    return typed_dict(params.CompletionCreateParamsStreaming, params.CompletionCreateParamsNonStreaming)


def responses_judge():
    from openai.types.responses import response_create_params as params
    return typed_dict(params.ResponseCreateParamsStreaming, params.ResponseCreateParamsNonStreaming)


def messages_judge():
    """`block_binding` has a type of its own: it is a beta's, whose header asks for it."""
    from anthropic.types import message_create_params as params
    from anthropic.types.beta.beta_thinking_block_binding_param import BetaThinkingBlockBindingParam as Binding
    plain = typed_dict(params.MessageCreateParamsStreaming, params.MessageCreateParamsNonStreaming)
    forbid_extras(Binding, set())
    binding = pydantic.TypeAdapter(Binding)

    def judge(body):
        thinking = dict(body.get("thinking", {}))
        binding.validate_python(thinking.pop("block_binding", {}))
        return plain({**body, "thinking": thinking} if thinking else body)
    return judge


def gemini_judge():
    """google-genai has no type of the body as a whole, but of each of its fields; all of them forbid unknown ones."""
    from google.genai import types
    fields = {"contents": (list[types.Content], ...), "systemInstruction": (types.Content, None),
              "tools": (list[types.Tool], None), "toolConfig": (types.ToolConfig, None),
              "generationConfig": (types.GenerationConfig, None)}
    body_type = pydantic.create_model("Body", __config__=pydantic.ConfigDict(extra="forbid"), **fields)
    return lambda body: body_type.model_validate_json(json.dumps(body))     # as JSON: what is bytes is base64


JUDGES = {"chat": chat_judge, "responses": responses_judge, "messages": messages_judge, "gemini": gemini_judge}


def consumed(value: Any) -> None:
    """pydantic validates an Iterable when it is read."""
    if isinstance(value, dict):
        for inner in value.values():
            consumed(inner)
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes, pydantic.BaseModel)):
        for inner in value:
            consumed(inner)


def complaints(body, judge) -> list[str]:
    try:
        consumed(judge(body))
    except UserWarning as warning:          # google-genai of an enumeration's unknown value
        return [str(warning)]
    except pydantic.ValidationError as error:
        return [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()[:8]]
    return []


def encode(pomex, wire, model, dialect, raw) -> Any:
    request = pomex.parse_request(raw)
    answer = pomex.ResponsesAnswer(request, "resp_" + "0" * 32, 1_700_000_000, pomex.CODEX)
    context = pomex.EncodeContext(answer, pomex.Envelope(b"s" * 32, "a"), "p", model, False, dialect)
    call = pomex.WIRES[wire].call(context)
    return json.loads(call.body), dict(call.headers)


def main(path, form, *files):
    pomex = load_pomex(path)
    wire, model, dialect = (form.split(":") + ["", ""])[:3]
    judge = JUDGES[wire]()
    found = {}
    for file in files:
        with open(file, "rb") as opened:
            raw = opened.read()
        try:
            pomex.parse_request(raw)
        except pomex.BadRequest:
            found[file] = None
            continue
        # nothing that was taken may be refused here
        body, headers = encode(pomex, wire, model or "some-model", dialect, raw)
        found[file] = {"body": body, "headers": headers, "complaints": complaints(body, judge)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
