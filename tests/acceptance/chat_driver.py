"""Runs where the `openai` package is: its chat completions, told by lines of JSON as in sdk_driver.py.

Every driver of a chat or Messages client answers alike: the text, the calls, what the API gives as the reason of the
end, and the tokens [input, of these cached, output].
"""
from __future__ import annotations

import json
import warnings

import openai
import pydantic
from driver_lines import answer_lines

warnings.simplefilter("error", UserWarning)         # pydantic warns where a field has not the type it declares
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}


class City(pydantic.BaseModel):
    name: str
    people: int


def told(made):
    made.model_dump(mode="json")                    # pydantic's own look at every field
    choice, usage = made.choices[0], made.usage
    calls = [[call.function.name, json.loads(call.function.arguments)] for call in choice.message.tool_calls or []]
    return {"text": choice.message.content, "calls": calls, "stop": choice.finish_reason, "model": made.model,
            "usage": [usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, usage.completion_tokens]}


def whole(client, **arguments):
    return client.chat.completions.create(**arguments)


def streamed(client, **arguments):
    """The stream helper: it accumulates, and raises on chunks that do not fit."""
    with client.chat.completions.stream(stream_options={"include_usage": True}, **arguments) as events:
        for _ in events:
            pass
        return events.get_final_completion()


def asked(way, client, **arguments):
    return (streamed if way == "streamed" else whole)(client, **arguments)


def text(client, way, model, **more):
    return told(asked(way, client, model=model, messages=[{"role": "user", "content": "Hi"}], **more))


def tool(client, way, model):
    """Two turns, the first one's message sent back as the SDK holds it."""
    history = [{"role": "user", "content": "Weather?"}]
    first = asked(way, client, model=model, messages=history, tools=[WEATHER])
    message = first.choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "21 degrees"} for call in message.tool_calls]
    kept = message.model_dump(exclude_none=True, exclude={"parsed"})
    for call in kept["tool_calls"]:
        call["function"].pop("parsed_arguments", None)
    second = asked(way, client, model=model, messages=[*history, kept, *results], tools=[WEATHER])
    return {**told(second), "calls": told(first)["calls"], "first_stop": told(first)["stop"]}


def parsed(client, way, model):
    arguments = {"model": model, "messages": [{"role": "user", "content": "A city"}], "response_format": City}
    made = streamed(client, **arguments) if way == "streamed" else client.chat.completions.parse(**arguments)
    return made.choices[0].message.parsed.model_dump()


def chunks(client, way, model):
    """Every chunk of a stream, as the SDK reads it, without the helper and without `include_usage`."""
    stream = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}], stream=True)
    return [chunk.model_dump(mode="json") for chunk in stream]


def models(client, way, model):
    return [model.id for model in client.models.list()]


DO = {f.__name__: f for f in (text, tool, parsed, chunks, models)}


def answer(request):
    client = openai.OpenAI(base_url=request["base_url"], api_key=request["key"], max_retries=0, timeout=60)
    return DO[request["do"]](client, **request["arguments"])


answer_lines(answer, openai.APIStatusError)
