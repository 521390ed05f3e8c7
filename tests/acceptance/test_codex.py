"""Real Codex, the oldest supported and the newest, through Pomex: demo models, then a scripted provider per wire."""
from __future__ import annotations

import base64
import json
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import DIRECT, HERE, NEWEST_CODEX, Codex, Hung, Pomex, Turn, free_port, running_pomex
from scripted import ResponsesAnswer, Call, Custom, Reasoning, Refusal, Script, Seen, flat_text, offered, says

newest = pytest.mark.parametrize("version", [NEWEST_CODEX])             # what older ones do not do
through_pomex_only = pytest.mark.skipif(DIRECT, reason="there is no Pomex in between")


# --- the first run: nothing configured --------------------------------------------------------------

@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pomex]:
    """`python pomex.py serve` as on a new machine."""
    arguments = ("--port", str(free_port()), "--no-detect")
    with running_pomex(tmp_path_factory.mktemp("fresh"), arguments=arguments) as gateway:
        yield gateway


@pytest.fixture
def demo_codex(version: str, fresh: Pomex, tmp_path: Path) -> Codex:
    return Codex(version, tmp_path, fresh.codex_block(), fresh.key)


@through_pomex_only
def test_the_printed_block_gives_an_answer(demo_codex: Codex) -> None:
    answer = demo_codex.exec("What is 2 + 2?").answer
    assert "offline demo" in answer and "What is 2 + 2?" in answer


@through_pomex_only
def test_demo_tools_makes_one_shell_call_and_finishes_on_its_output(demo_codex: Codex) -> None:
    demo_codex.model = "demo/tools"
    turn = demo_codex.exec("Look around.")
    assert turn.answer
    calls = turn.items("command_execution")
    assert [call["exit_code"] for call in calls] == [0]


@through_pomex_only
def test_demo_flaky_is_answered_at_its_second_call(demo_codex: Codex) -> None:
    demo_codex.model = "demo/flaky"
    assert demo_codex.exec("Hello there").answer


@through_pomex_only
def test_an_unknown_model_is_refused_once_with_a_suggestion(demo_codex: Codex) -> None:
    demo_codex.model = "demo/ecko"
    turn = demo_codex.exec("Hello there")
    assert turn.code == 1
    turn.without_retry()
    assert "demo/echo" in turn.errors[-1]


# --- a scripted provider, each wire -----------------------------------------------------------------

def test_a_plain_answer_with_the_upstreams_own_counts(codex: Codex, script: Script) -> None:
    script.play(says("Two and two is four. ✓", input_tokens=120, cached_tokens=20, output_tokens=15))
    turn = codex.exec("What is 2 + 2?")
    assert turn.answer == "Two and two is four. ✓"
    used = {key: turn.usage[key] for key in ("input_tokens", "cached_input_tokens", "output_tokens")}
    assert used == {"input_tokens": 120, "cached_input_tokens": 20, "output_tokens": 15}
    assert script.seen[0].model == (codex.model if DIRECT else codex.model.partition("/")[2])
    script.played_out(requests=1)


def test_a_shell_round_trip(codex: Codex, script: Script) -> None:
    script.play(says("I look first.", Call("exec_command", {"cmd": "echo the-sum-is-$((40 + 2))"})), says("42."))
    turn = codex.exec("Ask the shell")
    assert turn.answer == "42."
    assert turn.messages == ["I look first.", "42."]
    assert "the-sum-is-42" in script.seen[1].tool_results[0]
    script.played_out(requests=2)


def test_a_file_is_changed_by_apply_patch(codex: Codex, script: Script) -> None:
    target = codex.work / "target.txt"
    target.write_text("old line\n")
    patch = "*** Begin Patch\n*** Update File: target.txt\n@@\n-old line\n+new \"line\" \\ ✓\n*** End Patch\n"
    script.play(says(Custom("apply_patch", patch)), says("Changed."))
    assert codex.exec("Change the file").answer == "Changed."
    assert target.read_text() == "new \"line\" \\ ✓\n"
    assert "Success" in script.seen[1].tool_results[0]
    assert json.dumps(patch, ensure_ascii=False)[1:-1] in unescaped(script.seen[1])
    script.played_out(requests=2)


def unescaped(seen: Seen) -> str:
    """The history as text, with a call's JSON arguments decoded once more."""
    texts = [seen.text]
    for item in seen.items:
        for call in (item, *(tool["function"] for tool in item.get("tool_calls") or ())):
            if "arguments" in call:
                texts.append(json.dumps(json.loads(call["arguments"]), ensure_ascii=False))
    return "\n".join(texts)


def test_parallel_calls_come_back_as_one_batch_in_order(codex: Codex, script: Script) -> None:
    words = ("first", "second", "third")
    calls = says(*(Call("exec_command", {"cmd": f"echo {word}-$((1 + 1))"}) for word in words))
    turn = turn_with_parallel_calls(codex, script, calls, says("All ran."))
    assert turn.answer == "All ran."
    assert len(turn.items("command_execution")) == 3
    results = script.seen[1].tool_results
    assert [word in result for word, result in zip(words, results, strict=True)] == [True] * 3
    assert calls_before_outputs(script.seen[1]) == "cccooo"
    script.played_out(requests=2)


def turn_with_parallel_calls(codex: Codex, script: Script, *answers: ResponsesAnswer) -> Turn:
    """Codex 0.128.0 hangs by itself at three `exec_command` at once, once in some fifteen turns, also without Pomex in between:
    it has six tries, and its own log of each hang is kept and told as a warning. No other test tries anything twice."""
    if codex.version != "0.128.0":
        script.play(*answers)
        return codex.exec("Run three")
    codex.environment["RUST_LOG"] = "info"
    for number in range(6):
        script.play(*answers)
        try:
            return codex.exec("Run three", timeout=8)
        except Hung as hung:
            log = codex.home.parent / f"hung-{number}.log"
            log.write_text(str(hung))
            warnings.warn(f"{len(script.seen)} requests came; kept as {log}:\n{str(hung)[-3000:]}", stacklevel=2)
    raise Hung("Codex 0.128.0 hung six times: see the warnings")


def calls_before_outputs(seen: Seen) -> str:
    """`c` for each call of the history, `o` for each output, in order."""
    marks = ""
    for item in seen.items:
        kind = item.get("type", "")
        marks += "c" * (kind.endswith("_call") + len(item.get("tool_calls") or ()))
        marks += "o" * (kind.endswith("_call_output") or item.get("role") == "tool")
    return marks


def add_mcp_server(codex: Codex) -> None:
    codex.add_config(f"[mcp_servers.demo]\ncommand = {json.dumps(sys.executable)}\n"
                     f"args = [{json.dumps(str(HERE / 'mcp_server.py'))}]")


def test_an_mcp_tool_is_called_in_its_namespace(codex: Codex, script: Script) -> None:
    add_mcp_server(codex)
    script.play(says(Call("get_weather", {"city": "Oslo"}, namespace="mcp__demo")), says("It is mild."))
    turn = codex.exec("Weather?")
    assert turn.answer == "It is mild."
    assert [call["status"] for call in turn.items("mcp_tool_call")] == ["completed"]
    assert "Oslo: 21 degrees, from the MCP server" in script.seen[1].tool_results[0]
    script.played_out(requests=2)


def png(colour: bytes, side: int = 10) -> bytes:
    def part(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    header = side.to_bytes(4, "big") * 2 + bytes((8, 2, 0, 0, 0))
    return (b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header)
            + part(b"IDAT", zlib.compress((b"\0" + colour * side) * side)) + part(b"IEND", b""))


def test_an_image_arrives_whole(codex: Codex, script: Script) -> None:
    picture = codex.work / "red.png"
    picture.write_bytes(png(b"\xff\0\0"))
    script.play(says("Red."))
    assert codex.exec("What colour?", "-i", str(picture)).answer == "Red."
    urls = images(script.seen[0])
    assert len(urls) == 1
    assert base64.b64decode(urls[0].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    script.played_out(requests=1)


def images(seen: Seen) -> list[str]:
    parts = [part for item in seen.items if isinstance(item.get("content"), list) for part in item["content"]]
    found = [part["image_url"] for part in parts if part["type"] in ("input_image", "image_url")]
    return [url["url"] if isinstance(url, dict) else url for url in found]


def test_a_session_is_resumed_with_its_history(codex: Codex, script: Script) -> None:
    script.play(says(Call("exec_command", {"cmd": "echo remember-me"})), says("Noted."), says("You said remember-me."))
    assert codex.exec("Remember this").answer == "Noted."
    assert codex.resume("What was it?").answer == "You said remember-me."
    history = script.seen[2].text
    for part in ("Remember this", "echo remember-me", "Noted.", "What was it?"):
        assert part in history, part
    assert upstream_prefix(script.seen[1]) == upstream_prefix(script.seen[2])[:len(upstream_prefix(script.seen[1]))]
    script.played_out(requests=3)


def upstream_prefix(seen: Seen) -> list[str]:
    """The history, item by item, without what Codex itself changes between two processes (its developer texts)."""
    return [json.dumps(item) for item in seen.items if item.get("role") not in ("developer", "system")]


def test_an_output_schema_reaches_the_provider(codex: Codex, script: Script) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}, "required": ["answer"],
              "additionalProperties": False}
    file = codex.work / "schema.json"
    file.write_text(json.dumps(schema))
    script.play(says('{"answer": 4}'))
    assert json.loads(codex.exec("What is 2 + 2?", "--output-schema", str(file)).answer) == {"answer": 4}
    asked = script.seen[0].schema
    if asked is None:               # DeepSeek takes none: it stands in the prompt. Gemini 2.5 takes none beside functions
        assert '"answer"' in flat_text(script.seen[0].items[0]["content"]) or script.seen[0].model == "gemini-2.5-flash"
    else:
        assert asked == schema
    script.played_out(requests=1)


def test_reasoning_is_carried_over_turns(codex: Codex, wire: str, script: Script) -> None:
    """With Anthropic and Gemini the provider itself looks at each signature and at what it signs (strict.py)."""
    blob = "gAAAAABopaque+/=="
    script.play(says(Reasoning("I should look.", blob), Call("exec_command", {"cmd": "echo seen"})),
                says(Reasoning("That is enough.", blob + "2"), "It says seen."), says("Still seen."))
    turn = codex.exec("Think, then look")
    assert turn.answer == "It says seen."
    assert codex.resume("And now?").answer == "Still seen."
    for seen, blobs, texts in zip(script.seen, ([], [blob], [blob, blob + "2"]),
                                  ([], ["I should look."], ["I should look.", "That is enough."]), strict=True):
        if wire == "thinker":       # DeepSeek asks for it on every message with calls; on the others it may stand
            replayed = [m.get("reasoning_content") for m in seen.items if m.get("tool_calls")]
            assert replayed == texts[:1]
        elif wire in ("messages", "gemini"):
            assert seen.signatures == script.signed[:script.seen.index(seen)]
        elif wire != "chat":
            assert [item.get("encrypted_content") for item in seen.of_type("reasoning")] == blobs
    script.played_out(requests=3)


@through_pomex_only
def test_an_answer_cut_by_its_length_is_shown_and_not_asked_again(codex: Codex, script: Script) -> None:
    script.play(says("The first half of a long", end="length"))
    assert codex.exec("Tell me all").messages == ["The first half of a long"]
    script.played_out(requests=1)


@through_pomex_only
def test_a_finished_answer_without_its_terminal_event_is_completed(codex: Codex, script: Script) -> None:
    script.play(says(Call("exec_command", {"cmd": "echo once"}), end="drop"), says("Ran once.", end="drop"))
    turn = codex.exec("Run it")
    assert turn.answer == "Ran once."
    assert len(turn.items("command_execution")) == 1
    script.played_out(requests=2)


def test_an_answer_cut_in_the_middle_is_asked_again(codex: Codex, script: Script) -> None:
    script.play(says("This one never gets to its end, the wire is cut.", end="cut"), says("Here it is, whole."))
    turn = codex.exec("Say it")
    assert (turn.code, turn.messages) == (0, ["Here it is, whole."])
    assert "Reconnecting... 1/5" in turn.stdout
    script.played_out(requests=2)


@through_pomex_only
def test_a_context_that_is_too_long_is_named_as_such_at_once(codex: Codex, script: Script) -> None:
    error = {"message": "This model's maximum context length is 8192 tokens.", "type": "invalid_request_error",
             "param": "messages", "code": "context_length_exceeded"}
    script.play(Refusal(400, {"error": error}))
    turn = codex.exec("Much text")
    assert turn.code == 1
    turn.without_retry()
    assert "context window" in turn.errors[-1]
    script.played_out(requests=1)


# --- what newer Codex does with models that it knows ------------------------------------------------

KNOBS = ("-c", 'model_reasoning_effort="xhigh"', "-c", 'service_tier="fast"', "-c", 'model_verbosity="high"')


def without_catalogue(codex: Codex) -> None:
    """Codex's own idea of the model: the line with the catalogue's address goes."""
    config = codex.home / "config.toml"
    config.write_text("".join(line for line in config.read_text().splitlines(keepends=True)
                              if "model_catalog_url" not in line))


@newest
def test_deferred_tools_are_found_and_called(codex: Codex, wire: str, script: Script) -> None:
    without_catalogue(codex)
    add_mcp_server(codex)
    codex.model = f"{wire}/gpt-5.5"
    script.play(says(Call("tool_search", {"query": "weather"})),
                says(Call("get_weather", {"city": "Rome"}, namespace="mcp__demo")), says("Mild in Rome."))
    assert codex.exec("Weather?").answer == "Mild in Rome."
    assert "Rome: 21 degrees" in script.seen[2].tool_results[-1]
    script.played_out(requests=3)


@newest
def test_code_mode_runs_a_script(codex: Codex, wire: str, script: Script) -> None:
    without_catalogue(codex)
    codex.model = f"{wire}/gpt-5.6-sol"
    code = "const r = await tools.exec_command({cmd: 'echo from-code-$((1 + 1))'}); text(JSON.stringify(r));"
    script.play(says(Custom("exec", code, namespace="functions")), says("It ran."))
    assert codex.exec("Run code").answer == "It ran."
    assert "from-code-2" in script.seen[1].tool_results[-1]
    script.played_out(requests=2)


@through_pomex_only
@newest
@pytest.mark.parametrize("wire", ["native"])            # here the offer arrives as Codex makes it
@pytest.mark.parametrize("model", ["gpt-5.3-codex", "gpt-5.5", "gpt-5.6-luna", "gpt-5.6-sol", "gpt-6-sol", "gpt-6.2-sol"])
@pytest.mark.parametrize("knobs", [(), KNOBS])
def test_the_catalogue_takes_nothing_from_a_model(codex: Codex, wire: str, script: Script, model: str, knobs: tuple[str]) -> None:
    codex.model = f"{wire}/{model}"
    script.play(says("With."), says("Without."))
    turn = codex.exec("Hello", *knobs)
    assert turn.answer == "With." and "not advertised" not in turn.stdout
    without_catalogue(codex)
    assert codex.exec("Hello", *knobs).messages == ["Without."]
    with_it, without = (seen.body for seen in script.seen)
    for field in ("reasoning", "text"):
        assert (without.get(field) or {}).items() <= (with_it.get(field) or {}).items()
    for field in ("service_tier", "include"):
        assert without.get(field) in (None, with_it.get(field))
    names, own_names = ({tool["name"] for tool in offered(body)} for body in (with_it, without))
    assert own_names - {"tool_search"} <= names
    assert "apply_patch" in names or "exec" in names
    assert not knobs or (with_it["service_tier"], with_it["reasoning"]["effort"]) == ("priority", "xhigh")


# --- agents of agents ------------------------------------------------------------------------------

@newest
@through_pomex_only
def test_a_sub_agent_is_told_its_task(codex: Codex, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multi-agent v2 hands the task on as an `encrypted_content` part, whose text is plain where the model is not OpenAI's."""
    task = "compute-42 PLEASE"

    def next_answer(seen: Seen) -> ResponsesAnswer:
        """The parent spawns, waits and ends; the child answers."""
        if "NEW_TASK" in seen.text:
            return says("child says 42")
        if not seen.tool_results:
            return says(Call("spawn_agent", {"message": task, "task_name": "one"}))
        if "child says 42" in seen.text:
            return says("parent done")
        return says(Call("wait_agent", {"timeout_ms": 10_000}))
    monkeypatch.setattr(script, "next", next_answer)
    assert codex.exec("What is 6 times 7?", "--enable", "multi_agent_v2").answer == "parent done"
    child = next(seen for seen in script.seen if "NEW_TASK" in seen.text)
    assert task in child.text.partition("NEW_TASK")[2]
