"""Runs inside an environment with one line of the `openai` package: a request line of JSON in, an answer line out.

    {"do": "create", "base_url": ..., "key": ..., "arguments": {...}}  ->  {"result": ...} or {"raised": {...}}

Every object that the SDK makes goes back as JSON by its own `model_dump`, with pydantic's warnings as errors.
"""
from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import warnings

import openai
import pydantic

warnings.simplefilter("error", UserWarning)         # pydantic warns where a field has not the type it declares


class City(pydantic.BaseModel):
    name: str
    people: int


def dump(value):
    return value.model_dump(mode="json") if isinstance(value, pydantic.BaseModel) else value


def create(client, arguments):
    return dump(client.responses.create(**arguments))


def create_stream(client, arguments):
    return [dump(event) for event in client.responses.create(stream=True, **arguments)]


def stream(client, arguments):
    """The stream helper: it accumulates, and raises on ids that change or items that do not fit."""
    with client.responses.stream(**arguments) as events:
        seen = list(events)
        if seen[-1].type == "response.completed":       # of any other end the helper says only that it is none
            events.get_final_response()
        return {"types": [event.type for event in seen], "final": dump(seen[-1].response)}


def parse(client, arguments):
    made = client.responses.parse(text_format=City, **arguments)
    return {"parsed": dump(made.output_parsed), "status": made.status}


def stream_parse(client, arguments):
    with client.responses.stream(text_format=City, **arguments) as events:
        for _ in events:
            pass
        return {"parsed": dump(events.get_final_response().output_parsed)}


def tool_loop(client, arguments):
    """Two turns, the first one's output sent back as the SDK holds it."""
    first = client.responses.create(**arguments)
    results = [{"type": "function_call_output", "call_id": item.call_id, "output": "21 degrees"}
               for item in first.output if item.type == "function_call"]
    history = [{"role": "user", "content": arguments["input"]}, *first.output, *results]
    second = client.responses.create(**{**arguments, "input": history})
    return {"first": dump(first), "second": dump(second)}


def models(client, arguments):
    return [model.id for model in client.models.list()]


def validate(client, arguments):
    """The findings of validate_stream.py on captures: [{"capture", "body"}] -> [[[severity, code, message]]]."""
    spec = importlib.util.spec_from_file_location("validate_stream", arguments["tool"])
    tool = importlib.util.module_from_spec(spec)
    sys.modules["validate_stream"] = tool
    spec.loader.exec_module(tool)
    found = []
    for case in arguments["cases"]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            tool.main([case["capture"], "--body", case["body"], "--json"])
        report = json.loads(printed.getvalue())
        found.append([[f["sev"], f["code"], f["msg"]] for f in report["findings"] if f["sev"] == "E"])
    return found


DO = {f.__name__: f for f in (create, create_stream, stream, parse, stream_parse, tool_loop, models, validate)}


def answer(request):
    client = openai.OpenAI(base_url=request["base_url"], api_key=request["key"], max_retries=0, timeout=60)
    try:
        return {"result": DO[request["do"]](client, request["arguments"])}
    except openai.APIStatusError as error:
        return {"raised": {"type": type(error).__name__, "status": error.status_code, "code": error.code,
                           "param": error.param, "message": error.message,
                           "request_id": error.response.headers.get("x-request-id")}}
    except Exception as error:  # noqa: BLE001 - whatever the SDK raises is the answer
        return {"raised": {"type": type(error).__name__, "message": str(error)}}


for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
