"""A real llama.cpp with a small real model behind Pomex: over chat, and over its own imitations of Responses and Messages."""
from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

import pytest
from harness import JSON, Pomex, Reply, running_pomex, stream_events, terminal

WEATHER = {"type": "function", "name": "get_weather", "description": "The weather of a city.", "strict": False,
           "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
                          "additionalProperties": False}}
PERSONA = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
HELLO = {"instructions": PERSONA, "input": "Say hello.", "temperature": 0, "max_output_tokens": 100}


def weather_history() -> list[JSON]:
    """Two cities asked and answered: after that even a model of 135 million parameters calls for the third."""
    history: list[JSON] = []
    for n, city in enumerate(("Rome", "Bern")):
        history += [{"role": "user", "content": f"What is the weather in {city}?"},
                    {"type": "function_call", "call_id": f"call_{n}", "name": "get_weather",
                     "arguments": json.dumps({"city": city})},
                    {"type": "function_call_output", "call_id": f"call_{n}", "output": "sunny"},
                    {"role": "assistant", "content": f"It is sunny in {city}."}]
    return [*history, {"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture(scope="module")
def gateway(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pomex]:
    config = "[server]\nport = 0\n"
    for name, lines in (("chat", 'wire_api = "chat"'), ("foreign", 'wire_api = "responses"\nrelay = "normalise"'),
                        ("messages", 'wire_api = "messages"')):
        config += f'[providers.{name}]\n{lines}\nbase_url = "{llama}/v1"\nenv_key = "LLAMA_KEY"\nmodels = ["*"]\n'
    with running_pomex(tmp_path_factory.mktemp("gateway"), config, {"LLAMA_KEY": "any"}) as pomex:
        yield pomex


def direct(llama: str, messages: list[JSON], **more: object) -> JSON:
    """llama.cpp's own answer to a chat request, as the measure."""
    body = {"model": "smollm2", "messages": messages, "temperature": 0, **more}
    request = urllib.request.Request(f"{llama}/v1/chat/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: JSON = json.load(answer)
    return found


def outcome(reply: Reply, stream: bool) -> JSON:
    assert reply.status == 200, reply.raw
    made: JSON = terminal(stream_events(reply.raw))["response"] if stream else reply.json
    return made


@pytest.fixture(params=["chat", "foreign", "messages"])
def wire(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_stops_by_itself_with_llamacpps_own_counts(
        gateway: Pomex, llama: str, wire: str, stream: bool) -> None:
    made = outcome(gateway.post({**HELLO, "model": f"{wire}/smollm2", "stream": stream}), stream)
    messages = [{"role": "system", "content": PERSONA}, {"role": "user", "content": "Say hello."}]
    measure = direct(llama, messages, max_tokens=100)
    assert measure["choices"][0]["finish_reason"] == "stop"
    assert made["status"] == "completed"
    assert made["output"][0]["content"][0]["text"] == measure["choices"][0]["message"]["content"]
    counts = (made["usage"]["input_tokens"], made["usage"]["output_tokens"], made["usage"]["total_tokens"])
    assert counts == tuple(measure["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens"))


@pytest.mark.parametrize("stream", [True, False])
def test_a_limit_on_the_output_is_kept_and_told(gateway: Pomex, wire: str, stream: bool) -> None:
    body = {**HELLO, "model": f"{wire}/smollm2", "max_output_tokens": 8, "stream": stream}
    made = outcome(gateway.post(body), stream)
    assert made["usage"]["output_tokens"] == 8
    # llama.cpp's /v1/responses calls a cut answer completed: nothing in it tells the two apart.
    told = ("completed", None) if wire == "foreign" else ("incomplete", {"reason": "max_output_tokens"})
    assert (made["status"], made["incomplete_details"]) == told


@pytest.mark.parametrize("stream", [True, False])
def test_an_offered_tool_is_called(gateway: Pomex, wire: str, stream: bool) -> None:
    body = {"model": f"{wire}/smollm2", "input": weather_history(), "tools": [WEATHER], "temperature": 0,
            "max_output_tokens": 100, "stream": stream}
    made = outcome(gateway.post(body), stream)
    calls = [item for item in made["output"] if item["type"] == "function_call"]
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [("get_weather", {"city": "Oslo"})]
    assert made["status"] == "completed"


def test_a_context_that_is_too_long_is_named_as_such(gateway: Pomex, wire: str) -> None:
    reply = gateway.post({"model": f"{wire}/smollm2", "input": "word " * 6000, "max_output_tokens": 8})
    assert (reply.status, reply.json["error"]["code"]) == (400, "context_length_exceeded")
