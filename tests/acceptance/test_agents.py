"""Real coding agents through Pomex's Chat Completions and Messages, on each provider wire, and on a real llama.cpp.

With POMEX_ACCEPTANCE_DIRECT=1 they speak to the scripted provider itself. POMEX_LONG=1 runs the other agents on all
wires; aider and cline are run where $POMEX_TOOLS has them.
"""
from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from coding_agents import AGENTS, Agent
from conftest import model_of, providers
from harness import DIRECT, Pomex, running_pomex
from scripted import Call, Refusal, ResponsesAnswer, Script, Seen, Upstream, says
from test_codex import png

LONG = os.environ.get("POMEX_LONG") == "1"
FOUR_WIRES = ["direct"] if DIRECT else ["messages", "native", "chat", "gemini"]      # Claude Code's own first: it is passed
CHAT_WIRES = ["direct"] if DIRECT else ["chat", "messages", *(["native", "gemini"] if LONG else [])]
CHAT_AGENTS = [name for name in AGENTS if name != "claude-code"]
through_pomex_only = pytest.mark.skipif(DIRECT, reason="there is no Pomex in between")

Start = Callable[..., Agent]


@pytest.fixture(autouse=True)
def may_ask_for_whole_answers(script: Script) -> None:
    """Claude Code asks without a stream where a stream has failed."""
    script.whole_answers = True
    script.play()


@pytest.fixture(scope="module")
def gateway(upstream: Upstream, pomex: Pomex, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pomex]:
    """Pomex with two targets for a model, and with one of Claude Code's own names sent elsewhere."""
    if DIRECT:
        yield pomex
        return
    config = "[server]\nport = 0\n" + providers(upstream)
    for wire in FOUR_WIRES:
        other = "native" if wire != "native" else "chat"
        config += f'[models."spare/{wire}"]\ntargets = ["{model_of(wire).replace("/", ":")}", "{other}:gpt-5.5"]\n'
    config += '[models."claude-opus-4-8"]\ntargets = ["native:gpt-6.2-sol"]\n'
    with running_pomex(tmp_path_factory.mktemp("agents"), config, {"SCRIPTED_KEY": "upstream-secret"}) as running:
        yield running


@pytest.fixture
def start(gateway: Pomex, tmp_path: Path) -> Start:
    def started(name: str, model: str, key: str = "") -> Agent:
        return Agent(name, tmp_path, gateway.url, key or gateway.key, model)
    return started


# --- Claude Code ------------------------------------------------------------------------------------

@pytest.fixture
def claude(wire: str, start: Start) -> Agent:
    return start("claude-code", "direct/claude-opus-4-8" if DIRECT else model_of(wire))


@pytest.mark.parametrize("wire", FOUR_WIRES)
def test_claude_code_shows_a_text_with_the_upstreams_counts(claude: Agent, script: Script) -> None:
    script.play(says("Two and two is four. ✓", input_tokens=120, cached_tokens=20, output_tokens=15))
    ran = claude.run("What is 2 + 2?")
    assert (ran.code, ran.result["is_error"], ran.result["result"]) == (0, False, "Two and two is four. ✓"), ran
    usage = ran.result["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (100, 20, 15)
    assert "What is 2 + 2?" in script.seen[0].text
    script.played_out(requests=1)


@pytest.mark.parametrize("wire", FOUR_WIRES)
def test_claude_code_changes_a_file_with_its_tools(claude: Agent, script: Script) -> None:
    target = claude.work / "target.txt"
    target.write_text("old line\nlast\n")
    edit = {"file_path": str(target), "old_string": "old line", "new_string": 'new "line" \\ ✓'}
    script.play(says("I read it.", Call("Read", {"file_path": str(target)})), says(Call("Edit", edit)), says("Changed."))
    ran = claude.run("Change the file")
    assert (ran.code, ran.result["result"]) == (0, "Changed."), ran
    assert target.read_text() == 'new "line" \\ ✓\nlast\n'
    assert "old line" in script.seen[1].tool_results[0]
    assert len(script.seen[2].tool_results) == 2
    script.played_out(requests=3)


@pytest.mark.parametrize("wire", FOUR_WIRES)
def test_claude_code_runs_parallel_calls(claude: Agent, script: Script) -> None:
    script.play(says(*(Call("Bash", {"command": f"echo {word}-$((1 + 1))", "description": word})
                       for word in ("first", "second"))), says("Both ran."))
    ran = claude.run("Run two")
    assert (ran.code, ran.result["result"]) == (0, "Both ran."), ran
    # it sends them back in the order in which they ended
    assert sorted(result.strip() for result in script.seen[1].tool_results) == ["first-2", "second-2"]
    script.played_out(requests=2)


@pytest.mark.parametrize("wire", FOUR_WIRES)
def test_claude_code_loads_a_deferred_tool(claude: Agent, script: Script) -> None:
    """What ToolSearch has found comes back as a `tool_reference`; the tool itself is offered from then on."""
    (claude.work / "one.ipynb").write_text(json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    cell = {"notebook_path": str(claude.work / "one.ipynb"), "new_source": "1 + 1", "cell_type": "code", "edit_mode": "insert"}
    script.play(says(Call("ToolSearch", {"query": "select:NotebookEdit"})),
                says(Call("Read", {"file_path": cell["notebook_path"]})), says(Call("NotebookEdit", cell)), says("Added."))
    ran = claude.run("Add a cell")
    assert (ran.code, ran.result["result"]) == (0, "Added."), ran
    assert "1 + 1" in (claude.work / "one.ipynb").read_text()
    script.played_out(requests=4)


@pytest.mark.parametrize("wire", FOUR_WIRES)
def test_claude_code_sees_an_image(claude: Agent, script: Script) -> None:
    (claude.work / "red.png").write_bytes(png(b"\xff\0\0"))
    script.play(says(Call("Read", {"file_path": str(claude.work / "red.png")})), says("Red."))
    ran = claude.run("What colour is red.png?")
    assert (ran.code, ran.result["result"]) == (0, "Red."), ran
    found = re.findall(r'"(?:data:image/png;base64,)?(iVBOR[^"]+)"', json.dumps(script.seen[1].body))
    assert len(found) == 1 and base64.b64decode(found[0]).endswith(b"IEND\xaeB`\x82")
    script.played_out(requests=2)


@pytest.mark.parametrize("wire", FOUR_WIRES)
def test_claude_code_asks_again_after_an_interrupted_stream(claude: Agent, script: Script) -> None:
    script.play(says("This one never gets to its end, the wire is cut.", end="cut"), says("Here it is, whole."))
    ran = claude.run("Say it")
    assert (ran.code, ran.result["result"]) == (0, "Here it is, whole."), ran
    script.played_out(requests=2)


@pytest.mark.parametrize("wire", FOUR_WIRES)
def test_claude_code_runs_an_interrupted_call_once_at_most(claude: Agent, wire: str, script: Script) -> None:
    """From Gemini a call comes whole: the agent runs it, whatever the stream does then, and goes on."""
    command = {"command": "echo ran >> ran.txt # " + "long " * 40, "description": "It runs"}
    again = [] if wire == "gemini" else [says(Call("Bash", command))]
    script.play(says(Call("Bash", command), end="cut"), *again, says("It ran."))
    ran = claude.run("Run it")
    assert (ran.code, ran.result["result"]) == (0, "It ran."), ran
    assert (claude.work / "ran.txt").read_text() == "ran\n"
    script.played_out(requests=2 + len(again))


@pytest.mark.parametrize("wire", FOUR_WIRES)
def test_claude_code_takes_a_finished_answer_without_its_terminal_event(claude: Agent, script: Script) -> None:
    command = {"command": "echo ran >> ran.txt", "description": "It runs"}
    script.play(says(Call("Bash", command), end="drop"), says("Ran once.", end="drop"))
    ran = claude.run("Run it")
    assert (ran.code, ran.result["result"]) == (0, "Ran once."), ran
    assert (claude.work / "ran.txt").read_text() == "ran\n"
    script.played_out(requests=2)


@through_pomex_only
@pytest.mark.parametrize("wire", FOUR_WIRES)
def test_claude_code_does_not_notice_a_failover(start: Start, wire: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    overloaded = Refusal(503, {"error": {"message": "overloaded", "type": "server_error", "code": "overloaded"}})

    def next_answer(seen: Seen) -> ResponsesAnswer | Refusal:
        return overloaded if f"/{wire}/" in seen.path else says("From the other.")
    monkeypatch.setattr(script, "next", next_answer)
    ran = start("claude-code", f"spare/{wire}").run("Hello")
    assert (ran.code, ran.result["result"]) == (0, "From the other."), ran
    assert [f"/{wire}/" in seen.path for seen in script.seen][-2:] == [True, False]


@through_pomex_only
def test_claude_codes_own_model_name_is_sent_elsewhere(start: Start, script: Script) -> None:
    script.play(says("Hello."))
    assert start("claude-code", "claude-opus-4-8").run("Hi").result["result"] == "Hello."
    assert (script.seen[0].model, "/native/" in script.seen[0].path) == ("gpt-6.2-sol", True)
    script.played_out(requests=1)


@through_pomex_only
def test_claude_code_with_a_wrong_key_says_so_at_once(start: Start, script: Script) -> None:
    begun = time.monotonic()
    ran = start("claude-code", "messages/plain-model", key="sk-rh-nothing").run("Hi")
    assert (ran.code, ran.result["is_error"], ran.result["api_error_status"]) == (1, True, 401), ran
    assert "key" in ran.result["result"].lower()
    assert time.monotonic() - begun < 30
    script.played_out(requests=0)


@through_pomex_only
def test_claude_code_with_an_unknown_model_is_told_which_there_is(start: Start, script: Script) -> None:
    ran = start("claude-code", "messages/plane-model").run("Hi")
    assert (ran.code, ran.result["is_error"]) == (1, True), ran
    assert "messages/plain-model" in ran.result["result"]
    script.played_out(requests=0)


# --- Claude Code and a real model -------------------------------------------------------------------

PERSONA = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def small(tools: str) -> tuple[str, ...]:
    """Options with which a request fits a small model's context."""
    return "--bare", "--system-prompt", PERSONA, "--tools", tools


@pytest.fixture(scope="module")
def llamas(llama: str, upstream: Upstream, pomex: Pomex, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pomex]:
    """Pomex before llama.cpp, by its chat and by its imitation of Messages, and before the scripted provider."""
    if DIRECT:
        yield Pomex(f"{llama}/v1", "any", {})
        return
    config = "[server]\nport = 0\n" + providers(upstream)
    for name in ("chat", "messages"):
        config += (f'[providers.llama-{name}]\nwire_api = "{name}"\nbase_url = "{llama}/v1"\nenv_key = "LLAMA_KEY"\n'
                   'models = ["*"]\n')
    secrets = {"SCRIPTED_KEY": "upstream-secret", "LLAMA_KEY": "any"}
    with running_pomex(tmp_path_factory.mktemp("llamas"), config, secrets) as running:
        yield running


@pytest.mark.parametrize("wire", ["messages"] if DIRECT else ["messages", "chat"])
def test_claude_code_is_answered_by_llamacpp(llamas: Pomex, wire: str, tmp_path: Path) -> None:
    agent = Agent("claude-code", tmp_path, llamas.url, llamas.key, f"llama-{wire}/smollm2")
    ran = agent.run("Say hello.", *small(""), timeout=180)
    assert (ran.code, ran.result["is_error"]) == (0, False), ran
    assert ran.result["result"].startswith("Hello")
    assert ran.result["usage"]["input_tokens"] + ran.result["usage"]["cache_read_input_tokens"] > 20


@pytest.mark.parametrize("wire", ["messages"] if DIRECT else ["chat", *(["messages"] if LONG else [])])
def test_llamacpp_calls_claude_codes_tool(llamas: Pomex, pomex: Pomex, wire: str, script: Script, tmp_path: Path) -> None:
    """Another model begins the session: after two examples even one of 135 million parameters calls for the third."""
    before = llamas if not DIRECT else pomex
    agent = Agent("claude-code", tmp_path, before.url, before.key, "direct/claude-opus-4-8" if DIRECT else model_of("messages"))
    for number, word in enumerate(("one", "two")):
        script.play(says(Call("Bash", {"command": f"echo {word}"})), says(f"It says {word}."))
        ran = agent.run(f"Run echo {word}", *small("Bash"), *(["--continue"] if number else []))
        assert ran.result["result"] == f"It says {word}.", ran
    agent.environment |= {"ANTHROPIC_BASE_URL": llamas.url.removesuffix("/v1"), "ANTHROPIC_MODEL": f"llama-{wire}/smollm2",
                          "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "60"}
    ran = agent.run("Run echo three", *small("Bash"), "--continue", timeout=180)
    session = next((agent.home / ".claude" / "projects").rglob("*.jsonl")).read_text()
    assert '"command":"echo three"' in session.replace('": "', '":"'), ran
    assert re.search(r'"tool_result","content":"three"', session), session[-3000:]


# --- the others -------------------------------------------------------------------------------------

@pytest.fixture
def agent(agent_name: str, wire: str, start: Start) -> Agent:
    return start(agent_name, model_of(wire))


@pytest.mark.parametrize("wire", CHAT_WIRES)
@pytest.mark.parametrize("agent_name", CHAT_AGENTS)
def test_an_agent_shows_a_text(agent: Agent, script: Script) -> None:
    script.play(says("Two and two is four. ✓"))
    ran = agent.run("What is 2 + 2?")
    assert ran.code == 0 and "Two and two is four. ✓" in ran.stdout, ran
    assert "What is 2 + 2?" in script.seen[0].text
    assert script.seen[0].streams
    script.played_out()


@pytest.mark.parametrize("wire", CHAT_WIRES)
@pytest.mark.parametrize("agent_name", CHAT_AGENTS)
def test_an_agent_writes_a_file_with_its_tool(agent: Agent, script: Script) -> None:
    last = [says("It is written.")] if AGENTS[agent.name].loops else []
    script.play(says("I write it.", agent.writes("new.txt", 'a "line" \\ ✓\n')), *last)
    ran = agent.run("Write new.txt")
    assert ran.code == 0, ran
    assert not last or "It is written." in ran.stdout, ran
    assert (agent.work / "new.txt").read_text() == 'a "line" \\ ✓\n', ran
    assert not last or script.seen[-1].tool_results
    script.played_out()


@through_pomex_only
@pytest.mark.parametrize("agent_name", CHAT_AGENTS)
def test_an_agent_with_a_wrong_key_says_so_at_once(agent_name: str, start: Start, script: Script) -> None:
    ran = start(agent_name, "chat/plain-model", key="sk-rh-nothing").run("Say hello", timeout=60)
    assert "key" in ran.shown.lower(), ran
    script.played_out(requests=0)


@through_pomex_only
@pytest.mark.parametrize("agent_name", CHAT_AGENTS)
def test_an_agent_with_an_unknown_model_is_told_which_there_is(agent_name: str, start: Start, script: Script) -> None:
    ran = start(agent_name, "chat/plane-model").run("Say hello", timeout=60)
    assert "chat/plain-model" in ran.shown.replace("\n", ""), ran
    script.played_out(requests=0)


@through_pomex_only
@pytest.mark.parametrize("wire", CHAT_WIRES)
def test_an_interrupted_stream_does_not_send_an_agent_round_in_circles(start: Start, wire: str, script: Script) -> None:
    """opencode asks again at once, and for ever, where a stream ends without a `finish_reason` and without an error."""
    script.play(says("This one never gets to its end, the wire is cut.", end="cut"), says("Here it is, whole."))
    ran = start("opencode", model_of(wire)).run("Say it")
    assert ran.code == 0 and "Here it is, whole." in ran.stdout, ran
    script.played_out(requests=2)
