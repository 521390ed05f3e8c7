"""The chat classes and the Messages classes of the SDKs through Pomex: one upstream that is passed, one translated to.

With POMEX_ACCEPTANCE_DIRECT=1 they speak to the scripted provider itself; POMEX_LONG=1 takes every wire.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coding_agents import NO_WAY_OUT, installed, node
from conftest import model_of
from harness import DIRECT, HERE, JSON, SDK_LINES, TOOLS, Driver, Pomex, clean_environment, package_python, sdk_python
from scripted import Call, Reasoning, ResponsesAnswer, Script, Seen, says

LONG = os.environ.get("POMEX_LONG") == "1"
CHAT = [*(f"openai-{line}" for line in SDK_LINES), "agents", "node-openai", "node-ai-chat"]
MESSAGES = ["anthropic", "node-anthropic", "node-ai-messages"]
PASSED = {"chat": CHAT, "messages": MESSAGES}
TRANSLATED = {"chat": ["messages", "native", "gemini"], "messages": ["gemini", "native", "chat"]}
through_pomex_only = pytest.mark.skipif(DIRECT, reason="there is no Pomex in between")


def wires(api: str) -> list[str]:
    return ["direct"] if DIRECT else [api, *TRANSLATED[api][:None if LONG else 1]]


def pairs(*names: str) -> list[tuple[str, str]]:
    """(package, wire) for every package, or for those that are named."""
    return [(name, wire) for api, packages in PASSED.items() for name in packages if not names or name in names
            for wire in wires(api)]


def command(name: str, folder: Path) -> list[str]:
    if name.startswith("node-"):
        modules = installed(TOOLS / "node-sdks" / "node_modules", "node-sdks")
        (folder / "node_modules").symlink_to(modules)
        shutil.copy(HERE / "node_driver.mjs", folder)
        return [str(node()), str(folder / "node_driver.mjs"), name.removeprefix("node-")]
    driver = {"anthropic": "messages_driver.py", "agents": "agents_driver.py"}.get(name, "chat_driver.py")
    python = sdk_python(int(name[-1])) if name.startswith("openai-") else package_python(name)
    return [str(python), str(HERE / driver)]


Sdks = Callable[[str], Driver]


@pytest.fixture(scope="module")
def sdks(pomex: Pomex, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sdks]:
    """A running driver for the name of a package."""
    running: dict[str, Driver] = {}

    def driver(name: str) -> Driver:
        if name not in running:
            folder = tmp_path_factory.mktemp(name)
            environment = clean_environment(folder, HTTPS_PROXY=NO_WAY_OUT, HTTP_PROXY=NO_WAY_OUT)
            running[name] = Driver(command(name, folder), pomex.url, pomex.key, environment)
        return running[name]
    yield driver
    for each in running.values():
        each.__exit__()


@pytest.fixture
def sdk(name: str, sdks: Sdks, script: Script) -> Driver:
    script.whole_answers = True
    script.play()
    return sdks(name)


@pytest.fixture(params=["whole", "streamed"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def chosen(wire: str) -> str:
    return "direct/claude-opus-4-8" if DIRECT else model_of(wire)


@pytest.mark.parametrize("name, wire", pairs())
def test_a_text_comes_with_the_upstreams_counts(sdk: Driver, wire: str, way: str, script: Script) -> None:
    script.play(says("Hello ✓", input_tokens=50, cached_tokens=10, output_tokens=7))
    made = sdk("text", way=way, model=chosen(wire))
    assert (made["text"], made["usage"]) == ("Hello ✓", [50, 10, 7])
    assert made.get("stop") in ("stop", "end_turn", None)
    script.played_out(requests=1)


@pytest.mark.parametrize("name, wire", pairs())
def test_a_tool_is_called_and_its_result_comes_back(sdk: Driver, wire: str, way: str, script: Script) -> None:
    script.play(says("I ask.", Call("get_weather", {"city": "Oslo"}), Call("get_weather", {"city": "Rome ✓"})),
                says("21 degrees in both."))
    made = sdk("tool", way=way, model=chosen(wire))
    assert made["calls"] == [["get_weather", {"city": "Oslo"}], ["get_weather", {"city": "Rome ✓"}]]
    assert made["text"] == "21 degrees in both."
    assert [result.strip('"') for result in script.seen[1].tool_results] == ["21 degrees"] * 2
    script.played_out(requests=2)


@pytest.mark.parametrize("name, wire", pairs())
def test_a_cut_stream_raises(sdk: Driver, wire: str, name: str, script: Script) -> None:
    if DIRECT and name != "node-anthropic":
        pytest.skip("without Pomex in between most of them take the half for the whole")
    script.play(says("This is never whole, the wire is cut", end="cut"))
    assert sdk.error("text", way="streamed", model=chosen(wire))["message"]
    assert len(script.seen) == 1


@through_pomex_only
@pytest.mark.parametrize("name, wire", pairs())
def test_a_finished_answer_without_its_terminal_event_is_whole(sdk: Driver, wire: str, script: Script) -> None:
    script.play(says("All of it", end="drop"))
    assert sdk("text", way="streamed", model=chosen(wire))["text"] == "All of it"


@through_pomex_only
@pytest.mark.parametrize("name", CHAT + MESSAGES)
def test_a_wrong_key_is_an_authentication_error(sdk: Driver, way: str, script: Script) -> None:
    error = sdk.error("text", key="sk-rh-nothing", way=way, model="demo/echo")
    assert (error["status"], "key" in error["message"].lower()) == (401, True), error
    script.played_out(requests=0)


@through_pomex_only
@pytest.mark.parametrize("name", CHAT + MESSAGES)
def test_an_unknown_model_is_refused_with_a_suggestion(sdk: Driver, way: str, script: Script) -> None:
    error = sdk.error("text", way=way, model="native/plane-model")
    assert (error["status"] in (400, 404), "native/plain-model" in error["message"]) == (True, True), error
    script.played_out(requests=0)


# --- what only some of them have --------------------------------------------------------------------

@pytest.mark.parametrize("name, wire", pairs(*(f"openai-{line}" for line in SDK_LINES)))
def test_structured_output_is_parsed(sdk: Driver, wire: str, way: str, script: Script) -> None:
    script.play(says('{"name": "Oslo", "people": 717710}'))
    assert sdk("parsed", way=way, model=chosen(wire)) == {"name": "Oslo", "people": 717710}
    assert script.seen[0].schema is not None


@pytest.mark.parametrize("name, wire", pairs(*(f"openai-{line}" for line in SDK_LINES)))
def test_the_chunk_with_the_usage_comes_only_where_it_is_asked_for(sdk: Driver, wire: str, script: Script) -> None:
    script.play(says("Hello"))
    chunks = sdk("chunks", way="streamed", model=chosen(wire))
    assert all(len(chunk["choices"]) == 1 and chunk["usage"] is None for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks].count("stop") == 1
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("name, wire", pairs(*(f"openai-{line}" for line in SDK_LINES), "anthropic"))
def test_a_length_cut_is_told(sdk: Driver, wire: str, way: str, name: str, script: Script) -> None:
    script.play(says("The first half", end="length"))
    if name == "anthropic":
        made = sdk("text", way=way, model=chosen(wire))
        assert (made["text"], made["stop"]) == ("The first half", "max_tokens")
    elif way == "whole":
        made = sdk("text", way=way, model=chosen(wire), max_tokens=16)
        assert (made["text"], made["stop"]) == ("The first half", "length")
    else:                                           # the helper of the package raises it
        assert sdk.error("text", way=way, model=chosen(wire), max_tokens=16)["type"] == "LengthFinishReasonError"


@pytest.mark.parametrize("name, wire", pairs("anthropic"))
def test_the_events_of_a_message_come_in_their_order(sdk: Driver, wire: str, script: Script) -> None:
    script.play(says("Hello"))
    kinds = [event["type"] for event in sdk("events", way="streamed", model=chosen(wire)) if event["type"] != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


@pytest.mark.parametrize("name, wire", pairs("anthropic"))
def test_a_thought_is_sent_back_as_it_came(sdk: Driver, wire: str, way: str, script: Script) -> None:
    """The provider looks at its own signatures (strict.py); the SDK holds and returns the blocks."""
    script.play(says(Reasoning("I should look."), Call("get_weather", {"city": "Oslo"})), says("Mild."))
    thinking = {"type": "adaptive", "display": "summarized"}
    made = sdk("tool", way=way, model=chosen(wire), thinking=thinking)
    assert (made["thoughts"], made["text"]) == (["I should look."], "Mild.")
    if wire in ("messages", "gemini"):
        assert script.seen[1].signatures == script.signed[:1]
    script.played_out(requests=2)


@pytest.mark.parametrize("name, wire", pairs("anthropic"))
def test_tokens_are_counted(sdk: Driver, wire: str, script: Script) -> None:
    assert 20 <= sdk("count", way="whole", model=chosen(wire)) <= 1000


@through_pomex_only
@pytest.mark.parametrize("name", ["openai-1", "openai-3", "anthropic"])
def test_models_are_listed(sdk: Driver) -> None:
    assert {"native/plain-model", "chat/gpt-5.5", "demo/echo"} <= set(sdk("models", way="whole", model=""))


# --- LangChain's own tests --------------------------------------------------------------------------

def clever(seen: Seen) -> ResponsesAnswer:
    """A model that calls the tool that it is offered, with arguments after its schema, and that ends on a result."""
    body = seen.body
    if seen.schema is not None:
        return says(json.dumps(example(seen.schema)))
    choice, tools = body.get("tool_choice"), [(tool.get("function") or tool) for tool in body.get("tools") or []]
    last = seen.items[-1]
    ended = last.get("role") == "tool" or last.get("type") == "function_call_output"
    if tools and (not ended or choice not in (None, "auto", {"type": "auto"})):
        tool = tools[0]
        parameters = tool.get("parameters") or tool.get("input_schema") or {}
        return says(Call(tool["name"], example(parameters)))
    if body.get("response_format") or "json" in seen.text.lower():
        return says('{"setup": "Why?", "punchline": "Because."}')
    return says("Hello there, a story about a cat.")


def example(schema: JSON) -> Any:
    """A value that fits a JSON schema."""
    if "enum" in schema:
        return schema["enum"][0]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return example(schema[key][0])
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        return {name: example(each) for name, each in schema.get("properties", {}).items()}
    return {"integer": 3, "number": 3, "boolean": True, "array": [], "null": None}.get(str(kind), "你好啊集团 こんにちは株式会社")


@pytest.mark.parametrize("wire", wires("chat"))
def test_langchains_standard_tests_pass(wire: str, pomex: Pomex, script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "next", clever)
    environment = clean_environment(tmp_path, CHAT_MODEL=model_of(wire), OTHER_MODEL=f"{wire}/gpt-5.5", CHAT_URL=pomex.url,
                                    CHAT_KEY=pomex.key, LANGSMITH_TRACING="false", HTTPS_PROXY=NO_WAY_OUT)
    shutil.copy(HERE / "langchain_standard.py", tmp_path / "test_langchain.py")
    loops = [option for name in ("mode=auto", "default_test_loop_scope=session", "default_fixture_loop_scope=session")
             for option in ("-o", f"asyncio_{name}")]
    ran = subprocess.run([str(package_python("langchain")), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *loops,
                          "test_langchain.py"], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout[-6000:]
    passed = int(ran.stdout.split(" passed")[0].split()[-1])
    assert passed >= 40, ran.stdout[-500:]
