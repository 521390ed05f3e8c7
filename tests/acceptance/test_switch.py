"""One conversation over several providers: what is signed comes back to whom it belongs, byte for byte; the rest is named."""
from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from harness import DIRECT, JSON, Pomex
from scripted import Call, Custom, Reasoning, Script, Seen, says
from strict import DUMMIES, conversation
from test_codex import png
from test_streams import FREEFORM, FUNCTION, SPACE

pytestmark = pytest.mark.skipif(DIRECT, reason="there is no Pomex in between")
PICTURE = "data:image/png;base64," + base64.b64encode(png(b"\xff\0\0")).decode()
MODELS = {"messages": "messages/claude-opus-5-5", "gemini": "gemini/gemini-3.7-flash", "thinker": "thinker/plain-model"}
ROUNDS = ("messages", "gemini", "thinker", "messages", "gemini", "thinker", "messages")


class Conversation:
    """A client that sends back all that it was given."""

    def __init__(self, pomex: Pomex) -> None:
        self.pomex = pomex
        self.history: list[JSON] = []
        self.requests = 0

    def ask(self, model: str, **more: Any) -> set[str]:
        """One request, every other one streamed; what was dropped, by name."""
        self.requests += 1
        body = {"model": model, "instructions": "Be useful.", "input": self.history, "store": False,
                "tools": [FUNCTION, SPACE, FREEFORM], "include": ["reasoning.encrypted_content"],
                "reasoning": {"effort": "high", "summary": "auto"}, "stream": self.requests % 2 == 0, **more}
        reply = self.pomex.post(body)
        assert reply.status == 200, reply.raw
        final = reply.final if body["stream"] else reply.json
        assert final["status"] == "completed"
        self.history += final["output"]
        return {name for name in reply.headers.get("x-pomex-dropped", "").split(", ") if name}

    def say(self, *content: JSON) -> None:
        self.history.append({"type": "message", "role": "user", "content": list(content)})

    def run_calls(self, picture: bool) -> None:
        """An output for each call that has none; the first of them with a picture."""
        open_calls = [item for item in self.history if item["type"].endswith("_call")]
        done = {item["call_id"] for item in self.history if item["type"].endswith("_call_output")}
        for n, call in enumerate(call for call in open_calls if call["call_id"] not in done):
            output: Any = f"result of {call['name']}"
            if picture and n == 0:
                output = [{"type": "input_text", "text": output}, {"type": "input_image", "image_url": PICTURE}]
            self.history.append({"type": f"{call['type']}_output", "call_id": call["call_id"], "output": output})


def scripted_round(n: int) -> list[Any]:
    """Three answers: parallel calls after two thoughts, one without text; a freeform call; text."""
    patch = f'*** Begin Patch\n"{n}" ✓\n*** End Patch'
    return [says(Reasoning(f"Look {n} ✓"), Reasoning("", f"hidden {n}"), f"I look, {n}.", Call("look", {"at": f"a{n}"}),
                 Call("look", {"at": f"b{n}"}, namespace="mcp__demo")),
            says(Reasoning(f"Patch {n}"), Custom("apply_patch", patch)),
            says(Reasoning(f"Done {n}"), f"Done, {n}.")]


def test_a_conversation_of_many_turns_goes_through_all_providers_and_back(pomex: Pomex, script: Script) -> None:
    script.play(*(answer for n in range(len(ROUNDS)) for answer in scripted_round(n)))
    talk, own, seen_before = Conversation(pomex), {name: [] for name in MODELS}, set()
    last: dict[str, Seen] = {}
    for n, name in enumerate(ROUNDS):
        talk.say({"type": "input_text", "text": f"Question {n}"}, {"type": "input_image", "image_url": PICTURE})
        for step in range(3):
            signed = len(script.signed)
            dropped = talk.ask(MODELS[name])
            seen = script.seen[-1]
            assert dropped == {f"reasoning:{other}" for other in seen_before - {name}}, (n, step)
            assert [each for each in seen.signatures if each not in DUMMIES] == own[name], (n, step)
            own[name] += script.signed[signed:]
            if name in last:
                assert prefix(last[name]) == prefix(seen)[:len(prefix(last[name]))], (n, step)
            last[name] = seen
            seen_before.add(name)
            talk.run_calls(picture=step == 0)
    script.played_out(requests=3 * len(ROUNDS))
    assert len(own["messages"]) == 3 * 4 and len(own["gemini"]) == 2 * 3    # what this test is about
    foreign = [""] * 4          # DeepSeek wants the field on every message with calls
    assert thoughts_of_chat(last["thinker"]) == [*foreign, "Look 2 ✓", "Patch 2", *foreign, "Look 5 ✓", "Patch 5"]


def prefix(seen: Seen) -> list[str]:
    """What must stay as it is from turn to turn: system, tools and messages."""
    if "contents" in seen.body:
        return [json.dumps(part) for part in (seen.body.get("systemInstruction"), seen.body["tools"], *seen.body["contents"])]
    if "system" not in seen.body:
        return [json.dumps(part) for part in (seen.body["tools"], *seen.body["messages"])]
    system, tools, messages = conversation(seen.body)
    return [json.dumps(part) for part in (system, tools, *messages)]


def thoughts_of_chat(seen: Seen) -> list[str]:
    return [message["reasoning_content"] for message in seen.items if message.get("tool_calls")]


def test_thoughts_of_another_claude_are_left_out_at_its_request(pomex: Pomex, script: Script) -> None:
    """Models that bind their thoughts refuse those of others, unless they are asked beforehand to drop them."""
    script.play(says(Reasoning("So."), "First."), says("Second."), says("Third."))
    talk = Conversation(pomex)
    talk.say({"type": "input_text", "text": "One"})
    talk.ask("messages/claude-sonnet-4-5")
    talk.say({"type": "input_text", "text": "Two"})
    talk.ask("messages/claude-opus-5-5")
    assert not script.refused
    assert script.seen[-1].body["thinking"]["block_binding"] == {"prefix_mismatch_behavior": "drop_block"}
    talk.say({"type": "input_text", "text": "Three"})
    talk.ask("messages/claude-sonnet-4-5")
    assert script.seen[-1].signatures == script.signed[:1]
    script.played_out(requests=3)


@pytest.mark.parametrize("name", MODELS)
def test_what_no_longer_verifies_is_dropped_and_named(pomex: Pomex, script: Script, name: str) -> None:
    script.play(says(Reasoning("So."), Call("look", {"at": "x"})), says("Done."))
    talk = Conversation(pomex)
    talk.say({"type": "input_text", "text": "Go"})
    talk.ask(MODELS[name])
    talk.run_calls(picture=False)
    for item in talk.history:
        if item["type"] == "reasoning" and item.get("encrypted_content"):
            item["encrypted_content"] = item["encrypted_content"][:-6] + "AAAAAA"
    script.memory.signed_calls.clear()          # the provider is not to expect what the client has lost
    script.memory.thought_of.clear()
    assert talk.ask(MODELS[name]) == {"reasoning:unverified"}
    assert [each for each in script.seen[-1].signatures if each not in DUMMIES] == []
    script.played_out(requests=2)
