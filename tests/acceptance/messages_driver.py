"""Runs where the `anthropic` package is: its messages, told and answering as in chat_driver.py."""
from __future__ import annotations

import warnings

import anthropic
from driver_lines import answer_lines

warnings.simplefilter("error", UserWarning)
WEATHER = {"name": "get_weather", "description": "The weather of a city.",
           "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}


def told(made):
    made.model_dump(mode="json")
    usage = made.usage
    cached = usage.cache_read_input_tokens or 0
    return {"text": "".join(block.text for block in made.content if block.type == "text"), "stop": made.stop_reason,
            "calls": [[block.name, block.input] for block in made.content if block.type == "tool_use"], "model": made.model,
            "thoughts": [block.thinking for block in made.content if block.type == "thinking"],
            "usage": [usage.input_tokens + cached, cached, usage.output_tokens]}


def asked(way, client, **arguments):
    if way == "whole":
        return client.messages.create(max_tokens=4096, **arguments)
    with client.messages.stream(max_tokens=4096, **arguments) as events:
        return events.get_final_message()


def text(client, way, model, **more):
    return told(asked(way, client, model=model, messages=[{"role": "user", "content": "Hi"}], **more))


def tool(client, way, model, **more):
    """Two turns, the first one's blocks sent back as the SDK holds them: thoughts with their signatures too."""
    history = [{"role": "user", "content": "Weather?"}]
    first = asked(way, client, model=model, messages=history, tools=[WEATHER], **more)
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "21 degrees"}
               for block in first.content if block.type == "tool_use"]
    history += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = asked(way, client, model=model, messages=history, tools=[WEATHER], **more)
    before = told(first)
    return {**told(second), "calls": before["calls"], "first_stop": before["stop"], "thoughts": before["thoughts"]}


def events(client, way, model):
    """Every event of a stream, as the SDK reads it."""
    stream = client.messages.create(max_tokens=4096, model=model, messages=[{"role": "user", "content": "Hi"}], stream=True)
    return [event.model_dump(mode="json") for event in stream]


def count(client, way, model):
    return client.messages.count_tokens(model=model, messages=[{"role": "user", "content": "Hi " * 100}]).input_tokens


def models(client, way, model):
    return [model.id for model in client.models.list()]


DO = {f.__name__: f for f in (text, tool, events, count, models)}


def answer(request):
    client = anthropic.Anthropic(base_url=request["base_url"].removesuffix("/v1"), api_key=request["key"], max_retries=0,
                                 timeout=60)
    return DO[request["do"]](client, **request["arguments"])


answer_lines(answer, anthropic.APIStatusError, ["body", "request_id"])
