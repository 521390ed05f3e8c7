"""The README's table of what is carried, held against what the code does."""
import json
import pathlib
import re

import pytest

import pomex

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
MARK = "zebra-7c1f"
IMAGE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PDF = "data:application/pdf;base64,JVBERi0xLjQ="
OFFERED = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}


def says(*parts):
    return [{"type": "message", "role": "user", "content": list(parts)}]


def result(*parts):
    return [*says({"type": "input_text", "text": "x"}), CALL, {"type": "function_call_output", "call_id": "c1", "output": list(parts)}]


def tool(**fields):
    return {"tools": [OFFERED, {"description": MARK, **fields}]}


# the feature as the README names it -> a request that has it, and what shows in the body that it went up
FEATURES = {
    "text": ({"input": MARK}, MARK),
    "images": ({"input": says({"type": "input_image", "image_url": IMAGE, "detail": "auto"})}, "iVBORw0KGgo"),
    "images in tool results": ({"input": result({"type": "input_image", "image_url": IMAGE, "detail": "auto"})}, "iVBORw0KGgo"),
    "PDF files": ({"input": says({"type": "input_text", "text": "x"},
                                 {"type": "input_file", "filename": "a.pdf", "file_data": PDF})}, "JVBERi0xLjQ="),
    "function tools": (tool(type="function", name="mark", parameters={"type": "object", "properties": {}}), MARK),
    "`custom` tools (`apply_patch`)": (tool(type="custom", name="apply_patch"), MARK),
    "`namespace` tools (MCP)": ({"tools": [{"type": "namespace", "name": "mcp__x", "description": "", "tools": [
        {"type": "function", "name": MARK, "parameters": {"type": "object", "properties": {}}}]}]}, MARK),
    "`tool_search`": (tool(type="tool_search", execution="client", parameters={"type": "object", "properties": {}}), MARK),
    "`local_shell`": ({"tools": [{"type": "local_shell"}]}, "local_shell"),
    "`web_search`": ({"tools": [{"type": "web_search"}]}, "earch"),
    "other hosted tools": ({"tools": [OFFERED, {"type": "image_generation"}]}, "image_generation"),
    "a forced tool": ({**tool(type="function", name="mark", parameters={"type": "object", "properties": {}}),
                       "tool_choice": {"type": "function", "name": "mark"}}, r'(tool_choice|toolConfig)": ?\{.*"mark"'),
    "a JSON schema for the answer": ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {
        "type": "object", "properties": {"mark": {"type": "string", "description": MARK}}, "required": ["mark"],
        "additionalProperties": False}}}}, MARK),
    "`reasoning.effort`": ({"reasoning": {"effort": "high"}}, r"(?i)(effort|thinking)[^}]*high"),
    "`max_output_tokens`": ({"max_output_tokens": 4321}, "4321"),
    "`temperature`": ({"temperature": 0.625}, r"0\.625"),
    "`top_logprobs`": ({"top_logprobs": 3}, r"logprobs\W+3"),
}
# the column -> wire, relay, model, dialect
COLUMNS = {
    "`responses`, `bytes`": ("responses", True, "gpt-5.3-codex", ""),
    "`responses`": ("responses", False, "some-model", ""),
    "`chat`": ("chat", False, "gpt-oss-120b", ""),
    "`messages`": ("messages", False, "claude-opus-4-6", ""),
    "`gemini`": ("gemini", False, "gemini-3.1-pro-preview", ""),
}


def table():
    lines = README[README.index("## What is carried"):].split("\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head = rows[0]
    return {row[0]: dict(zip(head[1:], row[1:])) for row in rows[2:] if len(row) == len(head)}


def test_the_table_has_the_features_and_columns_that_are_checked():
    rows = table()
    assert set(FEATURES) <= set(rows)
    assert all(list(row) == list(COLUMNS) for row in rows.values())


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("feature", FEATURES)
def test_what_the_readme_says_is_what_goes_up(feature, column):
    fields, shown = FEATURES[feature]
    wire, relay, model, dialect = COLUMNS[column]
    request = pomex.parse_request(json.dumps({"model": "p/m", "input": "x", "stream": True, **fields}).encode())
    answer = pomex.ResponsesAnswer(request, "resp_" + "0" * 32, 0, pomex.STANDARD)
    call = pomex.WIRES[wire].call(pomex.EncodeContext(answer, pomex.Envelope(b"s" * 32, "a"), "p", model, relay, dialect))
    sent = re.search(shown, call.body.decode(), re.DOTALL) is not None
    said = table()[feature][column]
    if said.startswith("dropped"):
        assert not sent and call.dropped, f"{call.dropped}\n{call.body.decode()}"
    else:
        assert sent and not call.dropped, f"{call.dropped}\n{call.body.decode()}"
