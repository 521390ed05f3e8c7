"""What clients really send and providers refuse: nothing of it may end in a 400 of a (strictly scripted) provider."""
from __future__ import annotations

from typing import Any

import pytest
from harness import DIRECT, JSON, Pomex
from scripted import Script, says
from test_streams import FREEFORM, FUNCTION, SPACE
from test_switch import PICTURE

pytestmark = pytest.mark.skipif(DIRECT, reason="there is no Pomex in between")
MODELS = ("messages/claude-sonnet-4-5", "messages/claude-opus-4-8", "messages/claude-opus-5-5", "messages/plain-model",
          "gemini/gemini-2.5-flash", "gemini/gemini-3.7-flash")
ODD_SCHEMA = {"$schema": "x", "type": "object", "title": "T", "properties": {
    "at": {"type": "integer", "exclusiveMinimum": 0, "maximum": 9}, "kind": {"const": "a"}, "x": {"$ref": "#/$defs/X", "title": "X"},
    "when": {"type": "string", "format": "date-time", "pattern": "^2"}, "l": {"type": "array", "items": {"type": "string"}, "maxItems": 3}},
    "required": ["at"], "$defs": {"X": {"type": "object", "properties": {"y": {"type": "string", "examples": ["z"]}}}}}


def user(*texts: str) -> JSON:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text} for text in texts]}


def said(role: str, text: str) -> JSON:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def call(call_id: str, name: str = "look", **more: Any) -> JSON:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": '{"at": "x"}', **more}


def output(call_id: str, given: Any = "ok") -> JSON:
    return {"type": "function_call_output", "call_id": call_id, "output": given}


HISTORIES: dict[str, list[JSON]] = {
    "blank texts": [user("", " \n"), said("assistant", " "), user("", "Hi", "\t"), call("a"), output("a", "")],
    "nothing but blanks": [user(" ")],
    "a call without output": [user("Hi"), call("a"), user("Go on")],
    "a call without output at the end": [user("Hi"), call("a"), call("b"), output("b")],
    "an output without call": [user("Hi"), output("nobody"), output("")],
    "outputs out of order": [user("Hi"), call("a"), call("b"), output("b"), output("a")],
    "outputs apart": [user("Hi"), call("a"), call("b"), output("a"), user("Wait"), output("b"), user("Go")],
    "text between call and output": [user("Hi"), call("a"), said("assistant", "I wait."), output("a")],
    "the same ids again": [user("Hi"), call("c"), output("c"), user("More"), call("c"), output("c")],
    "odd ids": [user("Hi"), call("a.b|c é"), output("a.b|c é"), call("x" * 90), output("x" * 90)],
    "odd arguments": [user("Hi"), call("a", arguments=""), output("a"), call("b", arguments="[1"), output("b")],
    "an assistant first": [said("assistant", "Hello "), user("Hi")],
    "an assistant last": [user("Hi"), said("assistant", "Half of it \n")],
    "developers everywhere": [said("developer", "A"), user("Hi"), said("developer", "B"), said("assistant", "Yes."),
                              said("developer", "C"), user("And?"), call("a"), said("developer", "D"), output("a"),
                              said("system", "E")],
    "only a developer": [said("developer", "Answer.")],
    "pictures": [user("Hi"), call("a"), output("a", [{"type": "input_image", "image_url": PICTURE}]),
                 {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": PICTURE}]}],
    "thoughts of others": [user("Hi"), {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"}, call("a"),
                           output("a")],
    "a long loop": [user("Hi"), *(item for n in range(30) for item in (call(f"c{n}"), output(f"c{n}")))],
}
SETTINGS: dict[str, JSON] = {
    "plain": {}, "no tools": {"tools": []},
    "thinking": {"reasoning": {"effort": "xhigh", "summary": "auto"}},
    "not thinking": {"reasoning": {"effort": "none"}, "temperature": 2, "top_p": 0.5},
    "forced": {"tool_choice": "required", "reasoning": {"effort": "low"}, "parallel_tool_calls": False},
    "forced by name": {"tool_choice": {"type": "function", "name": "look"}, "max_output_tokens": 16},
    "forbidden": {"tool_choice": "none", "parallel_tool_calls": False},
    "searching": {"tools": [FUNCTION, {"type": "web_search"}]},
    "a schema": {"text": {"format": {"type": "json_schema", "name": "n", "schema": ODD_SCHEMA}}, "max_output_tokens": 10**6},
    "json": {"text": {"format": {"type": "json_object"}}, "reasoning": {"effort": "medium"}, "max_output_tokens": 1500},
    "odd tools": {"tools": [{**FUNCTION, "name": "9 lives.of a cat", "parameters": ODD_SCHEMA}, {**FUNCTION, "parameters": None},
                            {**FUNCTION, "name": "b", "parameters": {"anyOf": [ODD_SCHEMA, {"type": "object"}]}}]},
}


@pytest.mark.parametrize("model", MODELS)
def test_no_history_and_no_setting_is_refused(pomex: Pomex, script: Script, model: str) -> None:
    wrong = {}
    for name, history in HISTORIES.items():
        for setting, more in SETTINGS.items():
            script.play(says("Good."))
            body = {"model": model, "input": history, "tools": [FUNCTION, SPACE, FREEFORM], "store": False, **more}
            reply = pomex.post(body)
            if script.refused or reply.status != 200:
                wrong[f"{name}, {setting}"] = script.refused[:1] or reply.raw[:300]
                script.refused.clear()
    assert not wrong, wrong
