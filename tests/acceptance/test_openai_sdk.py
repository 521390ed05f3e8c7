"""The `openai` package, lines 1.x, 2.x and 3.x, against Pomex: its own parsing is the judge."""
from __future__ import annotations


import pytest
from conftest import model_of
from harness import JSON, SDK_LINES, Pomex, Sdk
from scripted import Call, Reasoning, Script, Seen, flat_text, says

WEATHER = {"type": "function", "name": "get_weather", "description": "The weather of a city.", "strict": True,
           "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
                          "additionalProperties": False}}
CITY = {"type": "object", "properties": {"name": {"type": "string"}, "people": {"type": "integer"}},
        "required": ["name", "people"], "additionalProperties": False}


@pytest.fixture(params=SDK_LINES, scope="module")
def sdk(request: pytest.FixtureRequest, pomex: Pomex) -> Sdk:       # type: ignore[misc]
    with Sdk(request.param, pomex.url, pomex.key) as driver:
        yield driver


@pytest.fixture
def model(wire: str) -> str:
    return model_of(wire)


def said(response: JSON) -> list[str]:
    return [part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"]]


def test_create_gives_the_answer_and_the_upstreams_counts(sdk: Sdk, script: Script, model: str) -> None:
    script.play(says("Hello ✓", input_tokens=50, cached_tokens=10, output_tokens=7))
    made = sdk("create", model=model, input="Hi", metadata={"k": "v"})
    assert (made["status"], made["model"], made["metadata"]) == ("completed", model, {"k": "v"})
    assert said(made) == ["Hello ✓"]
    usage = made["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (50, 7, 57)
    assert usage["input_tokens_details"]["cached_tokens"] == 10
    script.played_out(requests=1)


def test_create_with_stream_gives_typed_events(sdk: Sdk, script: Script, model: str) -> None:
    script.play(says(Reasoning("Thinking of it."), "Streamed ✓"))
    events = sdk("create_stream", model=model, input="Hi", reasoning={"summary": "auto"})
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == "Streamed ✓"
    assert events[-1]["type"] == "response.completed"
    output = events[-1]["response"]["output"]
    signed = model.startswith("gemini")         # a signature follows its text, in an item of its own
    assert [item["type"] for item in output] == ["reasoning", "message", "reasoning"][:2 + signed]
    assert output[0]["summary"][0]["text"] == "Thinking of it." or model.startswith(("chat", "thinker"))


def test_the_stream_helper_ends_with_the_whole_response(sdk: Sdk, script: Script, model: str) -> None:
    script.play(says("I ask.", Call("get_weather", {"city": "Oslo"}), Call("get_weather", {"city": "Rome"})))
    made = sdk("stream", model=model, input="Weather?", tools=[WEATHER])
    assert made["types"][0] == "response.created" and made["types"][-1] == "response.completed"
    calls = [item for item in made["final"]["output"] if item["type"] == "function_call"]
    assert [(call["name"], call["arguments"]) for call in calls] == [
        ("get_weather", '{"city": "Oslo"}'), ("get_weather", '{"city": "Rome"}')]
    assert len({call["call_id"] for call in calls}) == 2


def test_a_tool_loop_sends_back_what_the_sdk_holds(sdk: Sdk, script: Script, model: str) -> None:
    script.play(says(Reasoning("I need it."), Call("get_weather", {"city": "Oslo"})), says("21 degrees in Oslo."))
    made = sdk("tool_loop", model=model, input="Weather?", tools=[WEATHER])
    assert said(made["second"]) == ["21 degrees in Oslo."]
    assert script.seen[1].tool_results == ["21 degrees"]
    script.played_out(requests=2)


@pytest.mark.parametrize("way", ["parse", "stream_parse"])
def test_structured_output_is_parsed(sdk: Sdk, script: Script, model: str, way: str) -> None:
    script.play(says('{"name": "Oslo", "people": 717710}'))
    assert sdk(way, model=model, input="A city")["parsed"] == {"name": "Oslo", "people": 717710}
    assert fields_asked(script.seen[0]) == {"name", "people"}


def test_a_json_schema_given_by_hand_reaches_the_provider(sdk: Sdk, script: Script, model: str) -> None:
    script.play(says('{"name": "Oslo", "people": 717710}'))
    form = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    assert sdk("create", model=model, input="A city", text=form)["text"]["format"]["name"] == "city"
    assert fields_asked(script.seen[0]) == {"name", "people"}


def fields_asked(seen: Seen) -> set[str]:
    """The properties of the JSON schema that the provider was asked for."""
    if seen.schema is None:                     # DeepSeek takes none: it stands in the prompt
        return {name for name in CITY["properties"] if f'"{name}"' in flat_text(seen.items[0]["content"])}
    return set(seen.schema["properties"])


def test_a_length_cut_is_incomplete(sdk: Sdk, script: Script, model: str) -> None:
    script.play(says("The first half", end="length"))
    made = sdk("stream", model=model, input="Tell", max_output_tokens=16)
    assert made["types"][-1] == "response.incomplete"
    assert made["final"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert made["final"]["output"][0]["content"][0]["text"] == "The first half"


def test_a_finished_answer_without_its_terminal_event_is_completed(sdk: Sdk, script: Script, model: str) -> None:
    script.play(says("All of it", end="drop"))
    made = sdk("stream", model=model, input="Tell")
    assert (made["types"][-1], made["final"]["status"]) == ("response.completed", "completed")


def test_an_answer_cut_in_the_middle_raises(sdk: Sdk, script: Script, model: str) -> None:
    script.play(says("This is never whole, the wire is cut", end="cut"))
    error = sdk.error("create_stream", model=model, input="Tell")
    assert error["type"] == "APIError"


@pytest.mark.parametrize("how", ["create", "stream"])
def test_a_wrong_key_is_an_authentication_error(sdk: Sdk, how: str) -> None:
    error = sdk.error(how, key="sk-rh-nothing", model="demo/echo", input="Hi")
    assert (error["type"], error["status"], error["code"]) == ("AuthenticationError", 401, "invalid_api_key")
    assert error["request_id"]


def test_an_unknown_model_is_a_bad_request_with_a_suggestion(sdk: Sdk) -> None:
    error = sdk.error("create", model="native/plane-model", input="Hi")
    assert (error["type"], error["status"], error["code"]) == ("BadRequestError", 400, "model_not_found")
    assert error["param"] == "model" and "native/plain-model" in error["message"]


def test_models_are_listed(sdk: Sdk) -> None:
    assert {"native/plain-model", "chat/gpt-5.5", "demo/echo"} <= set(sdk("models"))


def test_the_demo_answers(sdk: Sdk) -> None:
    made = sdk("create", model="demo/echo", input="What is 2 + 2?")
    assert "What is 2 + 2?" in made["output"][-1]["content"][0]["text"]
    assert sdk("stream", model="demo/echo", input="Hi")["final"]["status"] == "completed"
    tools = [{**WEATHER, "name": "shell", "parameters": {
        "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"],
        "additionalProperties": False}}]
    called = sdk("stream", model="demo/tools", input="Look", tools=tools)["final"]["output"]
    assert [item["type"] for item in called].count("function_call") == 1
