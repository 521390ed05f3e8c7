"""The Responses API: the check of requests, tools under plain names, the assembler, the relay."""
import itertools
import json
import random
import time
import zlib

import pytest
import streams

import pomex
from pomex import Stop, Usage
from sinks import Recorder, adds, begins, calls, ends, tell

SECRET = b"s" * 32
EXEC = {"type": "function", "name": "exec", "description": "runs", "parameters": {"type": "object", "properties": {}}, "strict": False}
PATCH = {"type": "custom", "name": "apply_patch", "description": "patches", "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"}}
SPACE = {"type": "namespace", "name": "mcp__demo", "description": "", "tools": [{"type": "function", "name": "look", "parameters": None}]}
SEARCH = {"type": "tool_search", "execution": "client", "description": "finds", "parameters": {"type": "object"}}


def body(**fields):
    return {"model": "m/x", "input": "hello", **fields}


def ask(**fields):
    return pomex.parse_request(json.dumps(body(**fields)).encode())


def answer(profile=pomex.STANDARD, **fields):
    return pomex.ResponsesAnswer(ask(**{"stream": True, **fields}), "resp_1", 1_700_000_000, profile)


def seal(replay):
    return pomex.Envelope(SECRET, "a").seal("p", "m", replay)


def told(said, profile=pomex.STANDARD, error=None, **fields):
    """The stream that these calls of a sink make, and the attempt that made it."""
    attempt = pomex.Assembler(answer(profile, **fields), seal)
    attempt.estimated_input = 100
    tell(attempt, said)
    attempt.finish(error)
    raw = attempt.terminal(1_700_000_009)
    streams.check(raw, codex=profile is pomex.CODEX)
    return raw, attempt


# --- the request: what is refused, by which name and code

ITEMS = {
    "message": {"type": "message", "role": "user", "content": "x"},
    "call": {"type": "function_call", "call_id": "c", "name": "exec", "arguments": "{}"},
    "output": {"type": "function_call_output", "call_id": "c", "output": "x"},
}


def item(kind, **fields):
    return [{**ITEMS[kind], **fields}]


@pytest.mark.parametrize("fields, param, code", [
    ({"model": None}, "model", "missing_required_parameter"),
    ({"model": 5}, "model", "invalid_type"),
    ({"model": ""}, "model", "invalid_value"),
    ({"model": "x" * 257}, "model", "invalid_value"),
    ({"input": None}, "input", "missing_required_parameter"),
    ({"input": []}, "input", "invalid_value"),
    ({"input": {}}, "input", "invalid_type"),
    ({"input": [5]}, "input[0]", "invalid_type"),
    ({"input": [{}]}, "input[0].type", "missing_required_parameter"),
    ({"input": [{"type": 5}]}, "input[0].type", "missing_required_parameter"),
    ({"input": [{"id": "msg_1"}]}, "input[0]", "previous_response_not_found"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "previous_response_not_found"),
    ({"input": item("message", role="robot")}, "input[0].role", "invalid_value"),
    ({"input": item("message", role=[])}, "input[0].role", "invalid_type"),
    ({"input": item("message", content=None)}, "input[0].content", "invalid_type"),
    ({"input": item("message", content=[5])}, "input[0].content[0]", "invalid_type"),
    ({"input": item("message", content=[{"type": "input_text"}])}, "input[0].content[0].text", "invalid_type"),
    ({"input": item("call", name="")}, "input[0].name", "invalid_value"),
    ({"input": item("call", arguments={})}, "input[0].arguments", "invalid_type"),
    ({"input": item("call", call_id=[])}, "input[0].call_id", "invalid_type"),
    ({"input": item("call", namespace={})}, "input[0].namespace", "invalid_type"),
    ({"input": item("output", output=5)}, "input[0].output", "invalid_type"),
    ({"input": item("output", output=None)}, "input[0].output", "missing_required_parameter"),
    ({"input": item("output", output=[{"type": "input_text"}])}, "input[0].output[0].text", "invalid_type"),
    ({"input": [{"type": "custom_tool_call", "name": "a", "input": {}}]}, "input[0].input", "invalid_type"),
    ({"input": [{"type": "local_shell_call", "action": []}]}, "input[0].action", "invalid_type"),
    ({"input": [{"type": "additional_tools", "tools": {}}]}, "input[0].tools", "invalid_type"),
    ({"input": [{"type": "additional_tools", "tools": [{"type": "function"}]}]}, "input[0].tools[0].name", "missing_required_parameter"),
    ({"instructions": 5}, "instructions", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream": 1}, "stream", "invalid_type"),
    ({"store": "no"}, "store", "invalid_type"),
    ({"background": True}, "background", "unsupported_parameter"),
    ({"include": "x"}, "include", "invalid_type"),
    ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"max_output_tokens": 5.5}, "max_output_tokens", "invalid_type"),
    ({"max_output_tokens": True}, "max_output_tokens", "invalid_type"),
    ({"max_tool_calls": -1}, "max_tool_calls", "invalid_value"),
    ({"metadata": []}, "metadata", "invalid_type"),
    ({"metadata": {"k": 5}}, "metadata['k']", "invalid_type"),
    ({"parallel_tool_calls": 0}, "parallel_tool_calls", "invalid_type"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"top_p": -0.1}, "top_p", "invalid_value"),
    ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"reasoning": "high"}, "reasoning", "invalid_type"),
    ({"text": {"format": "text"}}, "text.format.type", "invalid_value"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "missing_required_parameter"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "missing_required_parameter"),
    ({"tools": {}}, "tools", "invalid_type"),
    ({"tools": ["exec"]}, "tools[0]", "invalid_type"),
    ({"tools": [{"name": "exec"}]}, "tools[0]", "invalid_type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
    ({"tools": [{"type": "function", "function": {"name": "exec"}}]}, "tools[0].name", "missing_required_parameter"),
    ({"tools": [{**EXEC, "parameters": "{}"}]}, "tools[0].parameters", "invalid_type"),
    ({"tools": [{**EXEC, "description": 5}]}, "tools[0].description", "invalid_type"),
    ({"tools": [{**PATCH, "format": "text"}]}, "tools[0].format", "invalid_type"),
    ({"tools": [{"type": "namespace", "name": "n"}]}, "tools[0].tools", "missing_required_parameter"),
    ({"tools": [{**SPACE, "tools": [{"type": "custom"}]}]}, "tools[0].tools[0].name", "missing_required_parameter"),
    ({"tool_choice": "maybe"}, "tool_choice", "invalid_value"),
    ({"tool_choice": {}}, "tool_choice.type", "invalid_value"),
    ({"tool_choice": {"type": "function", "name": "other"}, "tools": [EXEC]}, "tool_choice", "invalid_value"),
    ({"tool_choice": {"type": "function", "name": []}, "tools": [EXEC]}, "tool_choice", "invalid_value"),
    ({"truncation": "some"}, "truncation", "invalid_value"),
    ({"previous_response_id": "resp_0"}, "previous_response_id", "previous_response_not_found"),
    ({"conversation": "conv_0"}, "conversation", "unsupported_parameter"),
    ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
], ids=str)
def test_a_wrong_request_is_refused_by_the_name_of_its_field(fields, param, code):
    with pytest.raises(pomex.BadRequest) as refused:
        ask(**fields)
    assert (refused.value.param, refused.value.code, refused.value.status) == (param, code, 400)
    assert str(refused.value)


def test_tools_in_the_form_of_chat_lack_a_name():
    with pytest.raises(pomex.BadRequest, match=r"^Missing required parameter: tools\[0\].name\.$"):
        ask(tools=[{"type": "function", "function": {"name": "exec"}}])


@pytest.mark.parametrize("fields", [
    {"input": "x" * 100_000},
    {"input": [{"role": "user", "content": "bare"}]},
    {"input": [{"type": None, "role": "user", "content": "null counts as absent"}]},
    {"input": [{"type": "message", "role": role, "content": []} for role in ("user", "assistant", "system", "developer")]},
    {"input": [{"role": "user", "content": [{"type": "hologram", "text": 5}, {"type": "input_image", "image_url": "data:x"}]}]},
    {"input": [{"type": "from_the_future", "output": [5], "call_id": {}, "tools": 5, "content": 5}]},
    {"input": item("call", id=None, namespace=None, call_id=None, status="completed", caller={})},
    {"input": [{"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "x", "stderr": "", "outcome": {"type": "exit"}}]}]},
    {"input": [{"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot"}}]},
    {"input": [{"type": "reasoning", "summary": [], "content": None, "encrypted_content": None}]},
    {"input": [{"type": "additional_tools", "role": "developer", "tools": [SPACE]}]},
    {"input": [{"type": kind} for kind in ("compaction", "compaction_trigger", "web_search_call", "mcp_call", "image_generation_call")]},
    {"tools": [{"type": "hologram"}, {"type": "mcp", "server_label": "x", "name": 5}, {"type": "web_search"}, EXEC, PATCH, SPACE, SEARCH]},
    {"tools": None, "tool_choice": None, "temperature": None, "metadata": None, "text": None, "previous_response_id": None, "stream": None},
    {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "exec"}]}},
    {"tool_choice": {"type": "function", "name": "look"}, "tools": [SPACE]},
    {"text": {"format": {"type": "json_schema", "name": "n", "schema": {}}, "verbosity": "low"}},
    {"reasoning": {"effort": "beyond"}, "temperature": 2, "top_p": 0, "max_output_tokens": 10 ** 30, "service_tier": "ultrafast"},
    {"unknown": {"field": [1]}, "client_metadata": {"a": "b"}},
], ids=lambda fields: str(fields)[:60])
def test_what_is_unknown_or_null_is_tolerated(fields):
    request = ask(**fields)
    assert all(isinstance(i["type"], str) for i in request.input)
    items, dropped = pomex.unseal_items(request.input, pomex.Envelope(SECRET, "a"), "p")
    pomex.normalize_history(request.instructions, items, pomex.ToolMap(request.tools), dropped, {})
    pomex.dumps(pomex.echo_fields(request, True))


def test_tools_of_items_follow_those_of_the_request():
    found = {"type": "tool_search_output", "call_id": "s", "tools": [SPACE]}
    request = ask(tools=[EXEC], input=[{"type": "additional_tools", "tools": [PATCH]}, *item("message"), found])
    assert request.tools == [EXEC, PATCH, SPACE]


@pytest.mark.parametrize("raw", [
    b"", b"nonsense", b"null", b"5", b'"x"', b"[]", b"{}", b"{", b'{"model":"m","input":"x"', b'{"model":"m","input":"x"}}',
    b"[" * 100_000, b'{"a":' * 100_000, b'{"model":"m","input":"x","metadata":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"model":"m","input":"x","tools":[' + b'{"type":"namespace","name":"n","tools":[' * 4000 + b"]}" * 4000 + b"]}",
    b'{"model":"m","input":"x","temperature":NaN}', b'{"model":"m","input":"x","user":Infinity}',
    b'{"model":"m","input":"x","anything":1e999}', b'{"model":"m","input":"x","anything":[-1e999]}',
    b'{"model":"m","input":"x","anything":' + b"9" * 5000 + b"}",
    b'{"model":"m","input":"\\ud800"}', b'{"model":"m","input":"\\udc00\\ud800"}', b'{"model":"\\uD83D","input":"x"}',
    b'{"model":"m","input":"\xed\xa0\x80"}', b'{"model":"m","input":"\xff"}', b'\xef\xbb\xbf{"model":"m","input":"x"}',
    '{"model":"m","input":"x"}'.encode("utf-16"), b'{"model":"m","input":"a\nb"}', b"{'model':'m'}", b'{"model":"m","input":"x",}',
    b'{"model":"m","input":"x","model":5}', b'{"model":"m","input":"x","input":[]}', b'\x1f\x8b\x08\x00\x00',
], ids=lambda raw: repr(raw[:40]) + str(len(raw)))
def test_no_bytes_give_anything_but_a_bad_request(raw):
    with pytest.raises(pomex.BadRequest) as refused:
        pomex.parse_request(raw)
    json.dumps(refused.value.body(), ensure_ascii=False).encode()


@pytest.mark.parametrize("raw, text", [
    (b'{"model":"m","input":"\\ud83d\\ude00"}', "\N{GRINNING FACE}"), (b'{"model":"m","input":"a\\u0000b"}', "a\0b"),
    (b'{"model":"n","input":"x","input":"y","model":"m"}', "y"), (b'{"model":"m","input":"\\\\ud800"}', "\\ud800"),
])
def test_odd_but_right_json_is_taken(raw, text):
    request = pomex.parse_request(raw)
    assert (request.model, request.input[0]["content"]) == ("m", text)


def test_garbage_made_of_good_requests_gives_nothing_but_bad_requests():
    good = json.dumps(body(tools=[EXEC, PATCH, SPACE], input=[*item("message"), *item("call"), *item("output")], text={"format": {"type": "text"}}))
    values = [None, 5, -1, 1.5, True, "", "x", [], {}, [None], [[]], [{}], {"type": "message"}, {"type": []}]
    rng = random.Random(1)

    def spoil(value):
        """A copy with one thing in it replaced."""
        if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
            return rng.choice(values)
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy = value.copy()
        copy[key] = spoil(value[key])
        return copy

    for _ in range(3000):
        raw = json.dumps(spoil(json.loads(good))).encode()
        try:
            request = pomex.parse_request(raw)
        except pomex.BadRequest:
            continue
        answer = pomex.ResponsesAnswer(request, "resp_1", 1, pomex.STANDARD)
        for wire in pomex.WIRES.values():
            wire.call(pomex.EncodeContext(answer, pomex.Envelope(SECRET, "a"), "p", "m", False, ""))
        answer.response("in_progress")


def test_a_schema_nested_too_deeply_is_the_clients_fault():
    deep = b'{"model":"m","input":"x","tools":[{"type":"function","name":"f","parameters":%s}]}'
    for depth in (300, 500, 700, 900):
        raw = deep % (b'{"not":' * depth + b"{}" + b"}" * depth)
        try:
            request = pomex.parse_request(raw)
            job = pomex.EncodeContext(pomex.ResponsesAnswer(request, "resp_1", 1, pomex.STANDARD), pomex.Envelope(SECRET, "a"), "p", "m", False, "")
            pomex.WIRES["responses"].call(job)
        except pomex.BadRequest as refused:
            assert "nested too deeply" in str(refused)


# --- the echo

DEFAULTS = {
    "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "parallel_tool_calls": True,
    "previous_response_id": None, "prompt_cache_key": None, "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None, "service_tier": "default", "store": False, "background": False, "temperature": 1, "top_p": 1,
    "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0, "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tool_choice": "auto", "tools": [], "truncation": "disabled", "metadata": {}, "user": None}


@pytest.mark.parametrize("fields, echoed", [
    ({}, {}),
    ({name: None for name in DEFAULTS}, {}),
    ({"user": "u"}, {"user": "u"}),
    ({"temperature": 0.5, "top_p": 0, "metadata": {"a": "b"}}, {"temperature": 0.5, "top_p": 0, "metadata": {"a": "b"}}),
    ({"reasoning": {"effort": "high"}}, {"reasoning": {"effort": "high", "summary": None}}),
    ({"text": {"format": None, "verbosity": "low"}}, {"text": {"format": {"type": "text"}, "verbosity": "low"}}),
    ({"text": {"verbosity": None, "other": None}}, {}),
    ({"reasoning": {"effort": None, "other": None}}, {"reasoning": {"effort": None, "summary": None}}),
    ({"service_tier": "auto"}, {}), ({"service_tier": "flex"}, {"service_tier": "flex"}),
    ({"tools": [{"type": "function", "name": "f"}, PATCH]},
     {"tools": [{"type": "function", "name": "f", "description": None, "parameters": None, "strict": True}, PATCH]}),
    ({"tools": [EXEC], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
     {"tools": [EXEC], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}),
    ({"instructions": "be good"}, {"instructions": "be good"}),
], ids=str)
def test_a_response_repeats_the_request_with_its_defaults(fields, echoed):
    assert pomex.echo_fields(ask(**fields), True) == {**DEFAULTS, **echoed}


def test_to_codex_long_things_are_not_repeated():
    echoed = pomex.echo_fields(ask(tools=[EXEC], instructions="x" * 9), False)
    assert (echoed["tools"], echoed["instructions"]) == ([], None)


# --- envelopes

def test_an_envelope_opens_for_its_account_only_and_only_unaltered():
    envelope = pomex.Envelope(SECRET, "a")
    sealed = envelope.seal("anthropic", "m", {"blocks": [{"thinking": "x" * 100}]})
    assert sealed.startswith("pmx1.")
    assert envelope.open(sealed) == ("anthropic", "m", {"blocks": [{"thinking": "x" * 100}]})
    assert sealed == envelope.seal("anthropic", "m", {"blocks": [{"thinking": "x" * 100}]}), "the same item, the same bytes"
    assert pomex.Envelope(SECRET, "b").open(sealed) is None
    assert pomex.Envelope(b"t" * 32, "a").open(sealed) is None
    for at in range(5, len(sealed)):
        other = "A" if sealed[at] != "A" else "B"
        opened = envelope.open(sealed[:at] + other + sealed[at + 1:])
        assert opened is None or at == len(sealed) - 1      # the last letter's low bits may mean nothing
    for text in ("pmx1.", "pmx1.x", "pmx1.\N{SNOWMAN}", "pmx1." + "A" * 100):
        assert envelope.open(text) is None


def test_an_envelope_that_inflates_without_end_is_refused():
    envelope = pomex.Envelope(SECRET, "a")
    packed = zlib.compress(b'{"p":"' + b"x" * (pomex.MAX_ENVELOPE_BYTES + 1) + b'"}')
    bomb = pomex.base64.urlsafe_b64encode(envelope.mac(packed) + packed).decode().rstrip("=")
    assert envelope.open("pmx1." + bomb) is None


def test_items_are_unsealed_for_their_provider_and_dropped_by_name_for_others():
    def reasoning(sealed, kind="reasoning"):
        return {"type": kind, "id": "rs", "encrypted_content": sealed}
    mine, other = pomex.Envelope(SECRET, "a").seal("p", "m", {"k": 1}), pomex.Envelope(SECRET, "a").seal("q", "m", {"k": 1})
    stranger = pomex.Envelope(SECRET, "b").seal("p", "m", {"k": 1})
    items = [reasoning(mine), reasoning(other), reasoning(stranger), reasoning("gAAAA"), reasoning(None), reasoning(mine, "compaction"),
             {"type": "reasoning", "sealed_replay": {"forged": 1}}]
    kept, dropped = pomex.unseal_items(items, pomex.Envelope(SECRET, "a"), "p")
    replay = {"id": "rs", "sealed_replay": {"k": 1}}
    assert kept == [{"type": "reasoning", **replay}, reasoning("gAAAA"), reasoning(None), {"type": "compaction", **replay}, {"type": "reasoning"}]
    assert dropped == ["reasoning:q", "reasoning:unverified"]


# --- tools under plain names

@pytest.mark.parametrize("name, namespace, flat", [
    ("look", "", "look"), ("look", "mcp__demo", "mcp__demo__look"), ("a.b", "", None), ("x" * 64, "", "x" * 64),
    ("x" * 65, "", None), ("look", "n" * 70, None), ("Über", "", None),
])
def test_flat_names_are_short_plain_and_the_same_every_time(name, namespace, flat):
    made = pomex.upstream_tool_name(name, namespace)
    assert made == (flat or made) == pomex.upstream_tool_name(name, namespace)
    assert pomex.re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", made)


@pytest.mark.parametrize("tool, flat, kind, name, namespace", [
    (EXEC, "exec", "function_call", "exec", ""),
    (PATCH, "apply_patch", "custom_tool_call", "apply_patch", ""),
    (SPACE, "mcp__demo__look", "function_call", "look", "mcp__demo"),
    (SPACE, "look", "function_call", "look", "mcp__demo"),
    ({**SPACE, "tools": [PATCH]}, "mcp__demo__apply_patch", "custom_tool_call", "apply_patch", "mcp__demo"),
    (SEARCH, "tool_search", "tool_search_call", "tool_search", ""),
    ({"type": "local_shell"}, "local_shell", "local_shell_call", "local_shell", ""),
    ({**EXEC, "name": "x" * 80}, "x" * 55 + "_" + pomex.hashlib.sha256(b"x" * 80).hexdigest()[:8], "function_call", "x" * 80, ""),
    (EXEC, "never_offered", "function_call", "never_offered", ""),
], ids=lambda value: str(value)[:30])
def test_what_is_offered_comes_back_as_what_it_was(tool, flat, kind, name, namespace):
    assert pomex.ToolMap([tool]).resolve(flat) == pomex.Tool(kind, name, namespace)


def test_a_book_offers_functions_and_names_what_it_cannot():
    book = pomex.ToolMap([EXEC, PATCH, SPACE, {"type": "web_search"}, {**EXEC, "description": "twice"}, {"type": "tool_search"}])
    assert [f["name"] for f in book.functions] == ["exec", "apply_patch", "mcp__demo__look"]
    assert book.functions[0] == {"name": "exec", "description": "runs", "parameters": EXEC["parameters"], "strict": False}
    assert "start: X" in book.functions[1]["description"] and book.functions[1]["parameters"] == pomex.FREEFORM_PARAMETERS
    assert book.dropped == ["tools:web_search", "tools:tool_search"]


def test_codex_own_schema_keyword_is_taken_out_but_not_a_property_of_that_name():
    schema = {"type": "object", "properties": {"encrypted": {"type": "string", "encrypted": True}}, "items": [{"encrypted": False}]}
    offered = pomex.ToolMap([{"type": "function", "name": "f", "parameters": schema}]).functions[0]["parameters"]
    assert offered == {"type": "object", "properties": {"encrypted": {"type": "string"}}, "items": [{}]}


ODD = {"type": "function", "name": "odd", "parameters": {
    "type": "object", "required": ["$top", "plain"], "properties": {
        "$top": {"type": "integer"}, "@top": {"type": "integer"}, "plain": {"type": "string"}, "a.b": {"enum": ["$top"]}, "1st": {},
        "x" * 70: {}, "": {}, "list[]": {"type": "array", "items": {"$ref": "#/$defs/Row[int]"}}, "twin": {"$ref": "#/properties/$top"}},
    "$defs": {"Row[int]": {"type": "object", "properties": {"größe": {"type": "integer"}}, "required": ["größe"]}}}}


@pytest.mark.parametrize("model, rule", [("claude-opus-5", r"[a-zA-Z0-9_.-]{1,64}"), ("google/gemini-3-pro", "[a-zA-Z_][a-zA-Z0-9_]{0,63}")])
def test_parameters_are_offered_under_names_that_the_provider_takes_and_come_back_under_their_own(model, rule):
    book = pomex.ToolMap([ODD], model=model)
    schema = book.functions[0]["parameters"]
    fitted = book.by_upstream_name["odd"].fitted
    names = [*schema["properties"], *schema["$defs"]["Row[int]"]["properties"]]
    assert all(pomex.re.fullmatch(rule, name) for name in names) and len(set(names)) == 10
    assert schema["required"] == [fitted["$top"], "plain"] and schema["$defs"]["Row[int]"]["required"] == [fitted["größe"]]
    assert schema["properties"]["twin"] == {"$ref": f"#/properties/{fitted['$top']}"}
    assert schema["properties"][fitted.get("a.b", "a.b")] == {"enum": ["$top"]}         # a value is no name
    assert schema["properties"][fitted["list[]"]]["items"] == {"$ref": "#/$defs/Row[int]"}
    assert book.functions == pomex.ToolMap([ODD], model=model).functions
    given = {"$top": 5, "a.b": "$top", "list[]": [{"größe": 1, "free": {"x": None}}], "x" * 70: 1.5}
    theirs = pomex.rename_keys(json.dumps(given), fitted)
    deltas = [calls(0, "c", book.resolve("odd")), *(adds(0, theirs[i:i + 7], "arguments") for i in range(0, len(theirs), 7)), ends(0), Stop()]
    raw, attempt = told(deltas)
    assert json.loads(json.loads(attempt.output())[0]["arguments"]) == given
    assert raw.count(b"event: response.function_call_arguments.delta") == 1


def test_other_tools_and_vendors_keep_their_names_and_stream_on():
    for book, name in ((pomex.ToolMap([ODD], model="gpt-5"), "odd"), (pomex.ToolMap([ODD, EXEC], model="claude-opus-5"), "exec")):
        assert not book.by_upstream_name[name].fitted
        raw, _ = told([calls(0, "c", book.resolve(name)), adds(0, '{"$t', "arguments"), adds(0, 'op":1}', "arguments"), ends(0), Stop()])
        assert raw.count(b"event: response.function_call_arguments.delta") == 2


@pytest.mark.parametrize("arguments, whole", [("", "{}"), (" ", "{}"), ('{"_top"', None), ("[1]", None), ('{"_top": NaN}', None),
                                              ('{"a":' * 99_999, None)], ids=lambda value: str(value)[:12])
def test_fitted_arguments_are_whole_or_not_at_all(arguments, whole):
    book = pomex.ToolMap([{**ODD, "parameters": {"properties": {"$top": {}}}}], model="claude-opus-5")
    _, attempt = told([calls(0, "c", book.resolve("odd")), *([adds(0, arguments, "arguments")] if arguments else []), ends(0), Stop()])
    assert [item["arguments"] for item in json.loads(attempt.output())] == ([] if whole is None else [whole])
    assert attempt.status == ("failed" if whole is None else "completed")


def test_fitted_arguments_that_never_came_are_incomplete_like_any_other():
    for offered in ({"$top": {}}, {"top": {}}):
        book = pomex.ToolMap([{**ODD, "parameters": {"properties": offered}}], model="claude-opus-5")
        _, attempt = told([calls(0, "c", book.resolve("odd")), Stop()])
        assert (attempt.status, json.loads(attempt.output())) == ("failed", [])


@pytest.mark.parametrize("given, name", [
    ({"type": "custom_tool_call", "name": "apply_patch", "input": "x"}, "mcp__demo__apply_patch"),
    ({"type": "custom_tool_call", "name": "functions.apply_patch", "input": "x"}, "mcp__demo__apply_patch"),
    ({"type": "custom_tool_call", "name": "apply_patch", "namespace": "mcp__demo", "input": "x"}, "mcp__demo__apply_patch"),
    ({"type": "local_shell_call", "name": None, "action": {}}, "local_shell"),
])
def test_every_call_goes_back_under_the_name_of_its_tool(given, name):
    request = ask(input=[{"call_id": "c", **given}], tools=[{**SPACE, "tools": [PATCH]}])
    history = pomex.normalize_history("", request.input, pomex.ToolMap(request.tools), [], {})
    assert history.items[0]["name"] == name


# --- history for providers that know only functions

def call(call_id, **fields):
    return {"type": "function_call", "call_id": call_id, "name": "exec", "arguments": "{}", **fields}


def output(call_id, text="done"):
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def message(text, role="user"):
    return {"type": "message", "role": role, "content": [{"type": "output_text" if role == "assistant" else "input_text", "text": text}]}


def plain(text, role="user"):
    """A message whose text was none of the client's parts."""
    return {"type": "message", "role": role, "content": [{"type": "text", "text": text}]}


def thought(name):
    return {"type": "reasoning", "sealed_replay": {"k": name}}


NONE = pomex.NO_OUTPUT


@pytest.mark.parametrize("given, plain", [
    ([call("a"), output("a")], [call("a"), output("a")]),
    ([call("a"), call("b"), output("b", "2"), output("a", "1")], [call("a"), call("b"), output("a", "1"), output("b", "2")]),
    ([call("a"), message("so", "assistant"), output("a")], [message("so", "assistant"), call("a"), output("a")]),
    ([call("a"), message("stop")], [call("a"), output("a", NONE), message("stop")]),
    ([call("a"), message("stop"), output("a")], [call("a"), output("a"), message("stop")]),
    ([call("a"), output("a"), call("b"), output("b")], [call("a"), output("a"), call("b"), output("b")]),
    ([call("a"), output("a", "1"), call("a"), output("a", "2")], [call("a"), output("a", "1"), call("a_2"), output("a_2", "2")]),
    ([output("z", "lost")], [plain("[tool output] lost")]),
    ([call("a"), output("a"), output("a", "again")], [call("a"), output("a"), plain("[tool output] again")]),
    ([call(""), output("")], [call("call_1"), output("call_1")]),
    ([call("a", arguments="")], [call("a"), output("a", NONE)]),
    ([call("a", arguments="{cut")], [call("a", arguments='{"_raw":"{cut"}'), output("a", NONE)]),
    ([call("a", arguments="[1]")], [call("a", arguments='{"_raw":"[1]"}'), output("a", NONE)]),
    ([call("a", arguments='{"a":NaN}')], [call("a", arguments='{"_raw":"{\\"a\\":NaN}"}'), output("a", NONE)]),
    ([call("a", name="look", namespace="mcp__demo")], [call("a", name="mcp__demo__look"), output("a", NONE)]),
    ([{"type": "custom_tool_call", "call_id": "a", "name": "exec", "input": "x\n"}], [call("a", arguments='{"input":"x\\n"}'), output("a", NONE)]),
    ([{"type": "tool_search_call", "call_id": "a", "arguments": {"q": 1}}], [call("a", name="tool_search", arguments='{"q":1}'), output("a", NONE)]),
    ([{"type": "tool_search_call", "call_id": "a", "arguments": {}}, {"type": "tool_search_output", "call_id": "a", "tools": [SPACE]}],
     [call("a", name="tool_search"), output("a", "Found: look")]),
    ([{"type": "local_shell_call", "call_id": "a", "action": {"type": "exec", "command": ["ls"], "env": {}}},
      {"type": "local_shell_call_output", "call_id": "a", "output": "f"}],
     [call("a", name="local_shell", arguments='{"command":["ls"]}'), output("a", "f")]),
    ([{"type": "shell_call", "call_id": "a", "action": {"commands": ["ls"]}}, {"type": "shell_call_output", "call_id": "a", "output": []}],
     [call("a", name="shell", arguments='{"commands":["ls"]}'), output("a", "[]")]),
    ([{"type": "reasoning", "summary": []}, message("x")], [message("x")]),
    ([{"type": "agent_message", "content": [{"type": "input_text", "text": "hi"}]}], [message("hi")]),
    ([{"type": "agent_message", "content": "hi"}], [plain("hi")]),
    ([{"type": "agent_message", "content": [{"type": "encrypted_content", "encrypted_content": "gAAAA"}]}], []),
    ([{"type": "agent_message", "content": [{"type": "input_text", "text": "Payload:\n"}, {"type": "encrypted_content", "encrypted_content": "sum 42"}]}],
     [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Payload:\n"}, {"type": "text", "text": "sum 42"}]}]),
    ([message("x"), {"type": "message", "role": "assistant", "content": [{"type": "encrypted_content", "encrypted_content": "said"}]}],
     [message("x"), plain("said", "assistant")]),
    ([{"type": "compaction", "content": "so far"}, {"type": "compaction_summary", "summary": [{"type": "text", "text": "short"}]},
      {"type": "context_compaction", "encrypted_content": "gAAAA"}], [plain("so far"), plain("short")]),
    ([{"type": "apply_patch_call", "call_id": "a", "operation": {"type": "delete_file", "path": "f"}},
      {"type": "apply_patch_call_output", "call_id": "a", "status": "completed"}],
     [call("a", name="apply_patch", arguments='{"type":"delete_file","path":"f"}'), output("a", "completed")]),
    # what stands between calls and outputs: reasoning stays between the calls, an assistant's text goes before them
    ([call("a"), thought(1), call("b"), thought(2), message("so", "assistant"), output("b", "2"), output("a", "1")],
     [message("so", "assistant"), call("a"), thought(1), call("b"), thought(2), output("a", "1"), output("b", "2")]),
    ([call("a"), output("a"), thought(1), call("b"), output("b")], [call("a"), output("a"), thought(1), call("b"), output("b")]),
    ([call("a"), output("a", "1"), message("so", "assistant"), call("b"), call("c"), output("c", "3"), output("b", "2")],
     [call("a"), output("a", "1"), message("so", "assistant"), call("b"), call("c"), output("b", "2"), output("c", "3")]),
    ([call("a"), call("b"), output("a", "1"), call("c"), output("b", "2"), output("c", "3")],
     [call("a"), call("b"), output("a", "1"), output("b", "2"), call("c"), output("c", "3")]),
    # an output that comes late ends no turn but that of its call
    ([call("a"), message("stop"), message("so", "assistant"), output("a"), message("then", "assistant"), call("b"), call("c")],
     [call("a"), output("a"), message("stop"), message("so", "assistant"), message("then", "assistant"), call("b"), call("c"),
      output("b", NONE), output("c", NONE)]),
    ([call("a"), message("stop"), call("b"), output("a", "1"), call("c"), output("b", "2")],
     [call("a"), output("a", "1"), message("stop"), call("b"), output("b", "2"), call("c"), output("c", NONE)]),
    # given ids that are numbered ids of others
    ([call("a_2"), call("a"), call("a"), output("a", "1"), output("a", "2"), output("a_2", "0")],
     [call("a_2"), call("a"), call("a_3"), output("a_2", "0"), output("a", "1"), output("a_3", "2")]),
    ([call("a"), call("a"), call("a_2"), call(""), call("call_1")],
     [call("a"), call("a_2"), call("a_2_2"), call("call_1"), call("call_1_2"),
      *(output(name, NONE) for name in ("a", "a_2", "a_2_2", "call_1", "call_1_2"))]),
    ([{"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": "AAAA"}],
     [{"type": "message", "role": "user", "generated": True, "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}]),
    ([message("later", "developer"), message("x"), message("mid", "developer")], [message("x"), message("mid", "developer")]),
], ids=str)
def test_a_history_is_mended_into_pairs(given, plain):
    request = ask(input=given)
    history = pomex.normalize_history("", request.input, pomex.ToolMap(()), [], {})
    assert [{k: v for k, v in i.items()} for i in history.items] == plain
    calls = [i["call_id"] for i in history.items if i["type"] == "function_call"]
    assert sorted(calls) == sorted(i["call_id"] for i in history.items if i["type"] == "function_call_output")


def test_leading_instructions_are_collected_and_what_is_lost_is_named():
    request = ask(instructions="one", input=[message("two", "developer"), message("three", "system"), message("x"),
                                             {"type": "web_search_call"}, {"type": "web_search_call"}, {"type": "additional_tools", "tools": []}])
    dropped: list[str] = []
    history = pomex.normalize_history(request.instructions, request.input, pomex.ToolMap(()), dropped, {})
    assert history.system == ["one", "two", "three"]
    assert dropped == ["input:web_search_call"] * 2        # named once in the end: WireApi


# --- the assembler: what each item looks like

CREATED = ["created in_progress []", "in_progress in_progress []"]


@pytest.mark.parametrize("deltas, expected", [
    ([begins(0, "message"), adds(0, "Hel"), adds(0, "lo"), ends(0)], [
        'output_item.added 0 {"content": [], "role": "assistant", "status": "in_progress", "type": "message"}',
        'content_part.added 0 0 {"type": "output_text", "text": "", "annotations": [], "logprobs": []}',
        "output_text.delta 0 0 Hel", "output_text.delta 0 0 lo", "output_text.done 0 0 Hello",
        'content_part.done 0 0 {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}',
        'output_item.done 0 {"content": [{"annotations": [], "logprobs": [], "text": "Hello", "type": "output_text"}], "role": "assistant", "status": "completed", "type": "message"}']),
    ([begins(0, "message", fields={"phase": "commentary"}), adds(0, "No", "refusal"), ends(0)], [
        'output_item.added 0 {"content": [], "phase": "commentary", "role": "assistant", "status": "in_progress", "type": "message"}',
        'content_part.added 0 0 {"type": "refusal", "refusal": ""}', "refusal.delta 0 0 No", "refusal.done 0 0 No",
        'content_part.done 0 0 {"type": "refusal", "refusal": "No"}',
        'output_item.done 0 {"content": [{"refusal": "No", "type": "refusal"}], "phase": "commentary", "role": "assistant", "status": "completed", "type": "message"}']),
    ([begins(0, "message"), adds(0, "a"), lambda sink: sink.annotate({"type": "url_citation"}, 0), ends(0)], [
        'output_item.added 0 {"content": [], "role": "assistant", "status": "in_progress", "type": "message"}',
        'content_part.added 0 0 {"type": "output_text", "text": "", "annotations": [], "logprobs": []}', "output_text.delta 0 0 a",
        'output_text.annotation.added 0 0 0 {"type": "url_citation"}', "output_text.done 0 0 a",
        'content_part.done 0 0 {"type": "output_text", "text": "a", "annotations": [{"type": "url_citation"}], "logprobs": []}',
        'output_item.done 0 {"content": [{"annotations": [{"type": "url_citation"}], "logprobs": [], "text": "a", "type": "output_text"}], "role": "assistant", "status": "completed", "type": "message"}']),
    ([begins(0, "reasoning"), adds(0, "a", "summary", 1), adds(0, "b", "summary", 1), adds(0, "c", "summary", 2), ends(0)], [
        'output_item.added 0 {"status": "in_progress", "summary": [], "type": "reasoning"}',
        'reasoning_summary_part.added 0 0 {"type": "summary_text", "text": ""}', "reasoning_summary_text.delta 0 0 a", "reasoning_summary_text.delta 0 0 b",
        "reasoning_summary_text.done 0 0 ab", 'reasoning_summary_part.done 0 0 {"type": "summary_text", "text": "ab"}',
        'reasoning_summary_part.added 0 1 {"type": "summary_text", "text": ""}', "reasoning_summary_text.delta 0 1 c",
        "reasoning_summary_text.done 0 1 c", 'reasoning_summary_part.done 0 1 {"type": "summary_text", "text": "c"}',
        'output_item.done 0 {"status": "completed", "summary": [{"text": "ab", "type": "summary_text"}, {"text": "c", "type": "summary_text"}], "type": "reasoning"}']),
    ([begins(0, "reasoning"), adds(0, "hm", "raw"), ends(0)], [
        'output_item.added 0 {"status": "in_progress", "summary": [], "type": "reasoning"}',
        'content_part.added 0 0 {"type": "reasoning_text", "text": ""}', "reasoning_text.delta 0 0 hm", "reasoning_text.done 0 0 hm",
        'content_part.done 0 0 {"type": "reasoning_text", "text": "hm"}',
        'output_item.done 0 {"content": [{"text": "hm", "type": "reasoning_text"}], "status": "completed", "summary": [], "type": "reasoning"}']),
    ([begins(0, "function_call", "c1", "look", "ns"), adds(0, '{"a"', "arguments"), adds(0, ":1}", "arguments"), ends(0)], [
        'output_item.added 0 {"arguments": "", "call_id": "c1", "name": "look", "namespace": "ns", "status": "in_progress", "type": "function_call"}',
        'function_call_arguments.delta 0 {"a"', "function_call_arguments.delta 0 :1}", 'function_call_arguments.done 0 {"a":1} look',
        'output_item.done 0 {"arguments": "{\\"a\\":1}", "call_id": "c1", "name": "look", "namespace": "ns", "status": "completed", "type": "function_call"}']),
    ([begins(0, "function_call", "c1", "exec"), ends(0)], [
        'output_item.added 0 {"arguments": "", "call_id": "c1", "name": "exec", "status": "in_progress", "type": "function_call"}',
        "function_call_arguments.delta 0 {}", "function_call_arguments.done 0 {} exec",
        'output_item.done 0 {"arguments": "{}", "call_id": "c1", "name": "exec", "status": "completed", "type": "function_call"}']),
    ([begins(0, "custom_tool_call", "c1", "apply_patch"), adds(0, "raw ", "input"), adds(0, "text", "input"), ends(0)], [
        'output_item.added 0 {"call_id": "c1", "input": "", "name": "apply_patch", "status": "in_progress", "type": "custom_tool_call"}',
        "custom_tool_call_input.delta 0 raw ", "custom_tool_call_input.delta 0 text", "custom_tool_call_input.done 0 raw text",
        'output_item.done 0 {"call_id": "c1", "input": "raw text", "name": "apply_patch", "status": "completed", "type": "custom_tool_call"}']),
    ([begins(0, "tool_search_call", "c1", "tool_search"), adds(0, '{"q":"x"}', "arguments"), ends(0)], [
        'output_item.added 0 {"arguments": {}, "call_id": "c1", "execution": "client", "status": "in_progress", "type": "tool_search_call"}',
        'output_item.done 0 {"arguments": {"q": "x"}, "call_id": "c1", "execution": "client", "status": "completed", "type": "tool_search_call"}']),
    ([begins(0, "local_shell_call", "c1", "local_shell"), adds(0, '{"command":["ls"],"extra":1}', "arguments"), ends(0)], [
        'output_item.added 0 {"action": {"command": [], "env": {}, "type": "exec"}, "call_id": "c1", "status": "in_progress", "type": "local_shell_call"}',
        'output_item.done 0 {"action": {"command": ["ls"], "env": {}, "extra": 1, "type": "exec"}, "call_id": "c1", "status": "completed", "type": "local_shell_call"}']),
    ([lambda sink: sink.item({"type": "web_search_call", "status": "completed"})], [
        'output_item.added 0 {"status": "completed", "type": "web_search_call"}', 'output_item.done 0 {"status": "completed", "type": "web_search_call"}']),
], ids=lambda value: type(value[0]).__name__ + str(value[0])[:40])
def test_every_kind_of_item_has_its_events(deltas, expected):
    raw, attempt = told([*deltas, Stop()])
    assert streams.lines(raw)[:-1] == CREATED + expected
    assert attempt.status == "completed"


@pytest.mark.parametrize("calls_made, item", [
    ([begins(0, "message", fields={"phase": "commentary"}), adds(0, "caf\u00e9 \"x\"\n"),
      lambda sink: sink.annotate({"type": "url_citation", "title": "\u00e9"}, 0), adds(0, "No", "refusal"), ends(0, {"status": "incomplete"})],
     '{"id":"msg_1_0","type":"message","status":"incomplete","role":"assistant","phase":"commentary","content":[{"type":"output_text","text":'
     '"caf\\u00e9 \\"x\\"\\n","annotations":[{"type":"url_citation","title":"\\u00e9"}],"logprobs":[]},'
     '{"type":"refusal","refusal":"No"}]}'),
    ([begins(0, "reasoning"), adds(0, "raw", "raw"), adds(0, "a", "summary"), adds(0, "b", "summary", 1), ends(0, {"sealed_replay": None, "extra": [1]})],
     '{"id":"rs_1_0","type":"reasoning","status":"completed","extra":[1],"summary":[{"type":"summary_text","text":"a"},'
     '{"type":"summary_text","text":"b"}],"content":[{"type":"reasoning_text","text":"raw"}]}'),
    ([begins(0, "function_call", "c", "f", "ns"), adds(0, ' {"a":\n"\u00e9"}', "arguments"), ends(0, {"status": "incomplete"})],
     '{"id":"fc_1_0","type":"function_call","status":"incomplete","call_id":"c","name":"f",'
     '"arguments":" {\\"a\\":\\n\\"\\u00e9\\"}","namespace":"ns"}'),
], ids=["message", "reasoning", "call"])
def test_the_fields_of_an_item_are_in_order(calls_made, item):
    raw, attempt = told([*calls_made, Stop("max_output_tokens")])
    assert attempt.items == {0: item} and raw.count(item.encode()) == 2      # in output_item.done and in the terminal event


@pytest.mark.parametrize("pieces, arguments", [
    (['{\n "a": "x\ny\tz"\n}'], '{\n "a": "x\\ny\\tz"\n}'), (['{"a":"x', '\n', 'y"}'], '{"a":"x\\ny"}'),
    (['{"a":"\\"', '\n"', '}\n'], '{"a":"\\"\\n"}\n'), (['{"a":"\\\\', '"', '\n}'], '{"a":"\\\\"\n}'),
])
def test_arguments_are_json_for_strict_readers_too(pieces, arguments):
    raw, _ = told([begins(0, "function_call", "c1", "exec"), *(adds(0, piece, "arguments") for piece in pieces), ends(0), Stop()])
    assert streams.check(raw)["output"][0]["arguments"] == arguments and json.loads(arguments)


def test_two_calls_may_come_in_turns():
    raw, _ = told([begins(0, "function_call", "a", "f"), begins(1, "function_call", "b", "g"), adds(1, "{", "arguments"),
                   adds(0, "{", "arguments"), adds(1, "}", "arguments"), ends(1), adds(0, "}", "arguments"), ends(0), Stop()])
    assert [(i["call_id"], i["arguments"]) for i in streams.check(raw)["output"]] == [("a", "{}"), ("b", "{}")]


def test_sealed_reasoning_comes_with_the_finished_item_only():
    raw, _ = told([begins(0, "reasoning"), ends(0, {"sealed_replay": {"k": 1}}), Stop()])
    added, done = (e["item"] for e in streams.events(raw) if "item" in e)
    assert "encrypted_content" not in added
    assert pomex.Envelope(SECRET, "a").open(done["encrypted_content"]) == ("p", "m", {"k": 1})


@pytest.mark.parametrize("pieces, text", [
    (["a\ud83d", "\ude00b"], "a\N{GRINNING FACE}b"), (["\ud83d", "\ude00"], "\N{GRINNING FACE}"), (["\ud83d\ude00"], "\N{GRINNING FACE}"),
    (["a\ud83d", "b"], "a\ufffdb"), (["\ude00x"], "\ufffdx"), (["x\ud83d"], "x"), (["\n\n", " ", "x"], "\n\n x"), (["x", "", "y"], "xy"),
])
def test_text_is_whole_however_it_was_cut(pieces, text):
    raw, _ = told([begins(0, "message"), *(adds(0, piece) for piece in pieces), ends(0), Stop()])
    assert streams.check(raw)["output"][0]["content"][0]["text"] == text
    assert not any("\ud800" <= letter <= "\udfff" for event in streams.events(raw) for letter in json.dumps(event, ensure_ascii=False))


def test_a_message_of_white_space_is_none_but_an_answer_of_nothing_is_one():
    raw, _ = told([begins(0, "message"), adds(0, "\n\n"), ends(0), begins(1, "function_call", "c", "f"), ends(1), Stop()])
    assert [i["type"] for i in streams.check(raw)["output"]] == ["function_call"]
    raw, _ = told([begins(0, "message"), adds(0, " "), Stop()])
    assert [i["content"][0]["text"] for i in streams.check(raw)["output"]] == [""]


def test_a_fragment_of_nothing_open_is_the_upstreams_error():
    attempt = pomex.Assembler(answer(), seal)
    with pytest.raises(pomex.UpstreamError):
        attempt.add(0, "x", "text")
    attempt.done(0)
    attempt.annotate({}, 0)
    assert attempt.items == {} and attempt.out == []


# --- custom tools inside JSON

WRAPPED = [
    ('{"input":"*** Begin Patch\\n+a\\u00e9\\ud83d\\ude00\\"\\\\\\/\\t*** End Patch\\n"}', '*** Begin Patch\n+a\u00e9\N{GRINNING FACE}"\\/\t*** End Patch\n'),
    (' { "input" : "ls -l" } ', "ls -l"),
    ('{"input":""}', ""),
    ('{"input":"x"}', "x"),
    ('{"input":"a\nb"}', "a\nb"),
    ('{"input":"```\\n*** Begin Patch\\nx\\n*** End Patch\\n```"}', "*** Begin Patch\nx\n*** End Patch"),
    ('{"input":"\\n```patch\\n*** Begin Patch\\nx\\n*** End Patch\\n```\\n"}', "*** Begin Patch\nx\n*** End Patch"),
    ('{"input":"```js\\nlet x\\n```"}', "```js\nlet x\n```"),
    ('{"input":"\\n\\n  text"}', "\n\n  text"),
    ('{"input":"\\ud83d lost"}', "\ufffd lost"),
    ('{"patch":"*** Begin Patch"}', "*** Begin Patch"),
    ('{"why":"a","input":"b"}', "b"),
    ('{"a":"1","b":"2"}', '{"a":"1","b":"2"}'),
    ('{"input":{"deep":1}}', '{"input":{"deep":1}}'),
    ("{}", ""), ("", ""), ('"just text"', "just text"), ("*** Begin Patch\nraw", "*** Begin Patch\nraw"), ("5", "5"),
]


@pytest.mark.parametrize("arguments, text", WRAPPED, ids=lambda value: repr(value)[:40])
def test_a_custom_tools_text_comes_out_of_its_json_however_that_is_cut(arguments, text):
    cuts = [[arguments], list(arguments)] + [[arguments[:n], arguments[n:]] for n in range(1, len(arguments))]
    for pieces in cuts:
        raw, _ = told([begins(0, "custom_tool_call", "c", "t"), *(adds(0, p, "arguments") for p in pieces if p), ends(0), Stop()])
        assert streams.check(raw)["output"][0]["input"] == text, pieces


def test_a_custom_tools_text_in_json_is_one_delta_and_raw_text_streams_on():
    for channel, pieces, deltas in (("arguments", ('{"input":"one', " two", "\\", 'n three"}'), ["one two\n three"]),
                                    ("input", ("one", " two", "\n three"), ["one", " two", "\n three"])):
        raw, _ = told([begins(0, "custom_tool_call", "c", "t"), *(adds(0, piece, channel) for piece in pieces), ends(0), Stop()])
        assert [line for line in streams.lines(raw) if ".delta" in line] == [f"custom_tool_call_input.delta 0 {text}" for text in deltas]


@pytest.mark.parametrize("profile", [pomex.STANDARD, pomex.CODEX], ids=["standard", "codex"])
def test_a_custom_call_that_is_cut_is_never_done(profile):
    whole = WRAPPED[0][0]
    for cut, end in itertools.product(range(1, len(whole) - 1), ([], [ends(0), Stop()], [Stop()], [Stop("max_output_tokens")])):
        deltas = [begins(0, "custom_tool_call", "c", "t"), adds(0, whole[:cut], "arguments")]
        raw, attempt = told(deltas + end, profile)
        final = streams.check(raw, profile is pomex.CODEX)
        assert not [i for i in final["output"] if i["type"] == "custom_tool_call" and i["status"] == "completed"]
        assert attempt.status == ("incomplete" if end and end[0] == Stop("max_output_tokens") else "failed")


# --- the end

TEXT, HALF = [begins(0, "message"), adds(0, "Hi")], [begins(1, "function_call", "c", "f"), adds(1, '{"a":', "arguments")]
CALL = [begins(1, "function_call", "c", "f"), adds(1, "{}", "arguments")]
BROKEN = pomex.UpstreamTimeout("silent")


@pytest.mark.parametrize("deltas, error, standard, codex, items", [
    # finished, and said so
    ([*TEXT, ends(0), Stop()], None, "completed", "completed", ["message completed"]),
    ([*TEXT, Stop()], None, "completed", "completed", ["message completed"]),
    ([*TEXT, ends(0), *CALL, Stop()], None, "completed", "completed", ["message completed", "function_call completed"]),
    # finished, and then the connection broke
    ([*TEXT, Stop()], BROKEN, "completed", "completed", ["message completed"]),
    ([*TEXT, ends(0), *CALL, Stop()], BROKEN, "completed", "completed", ["message completed", "function_call completed"]),
    ([*TEXT, Stop("max_output_tokens")], BROKEN, "incomplete", "completed", {"standard": ["message incomplete"], "codex": ["message completed"]}),
    # no evidence
    ([], None, "failed", "failed", []),
    ([], BROKEN, "failed", "failed", []),
    (TEXT, None, "failed", "failed", {"standard": ["message incomplete"], "codex": []}),
    ([*TEXT, ends(0)], BROKEN, "failed", "failed", ["message completed"]),
    ([*TEXT, ends(0), *CALL], None, "failed", "failed", ["message completed"]),
    ([*TEXT, ends(0), *CALL, ends(1)], None, "failed", "failed", ["message completed", "function_call completed"]),
    ([*TEXT, ends(0), *HALF], BROKEN, "failed", "failed", ["message completed"]),
    # said to be finished, but half a call
    ([*TEXT, ends(0), *HALF, Stop()], None, "failed", "failed", ["message completed"]),
    ([*TEXT, ends(0), *HALF, ends(1), Stop()], None, "failed", "failed", ["message completed"]),
    # an error that the upstream reports wins
    ([*TEXT, ends(0), lambda sink: sink.fail(pomex.UpstreamError("no", code="slow_down"))], None, "failed", "failed", ["message completed"]),
    ([*TEXT, ends(0), Stop(), lambda sink: sink.fail(pomex.UpstreamError("no"))], None, "failed", "failed", ["message completed"]),
    # cut by length
    ([*TEXT, Stop("max_output_tokens")], None, "incomplete", "completed", {"standard": ["message incomplete"], "codex": ["message completed"]}),
    ([*TEXT, ends(0), *HALF, Stop("max_output_tokens")], None, "incomplete", "completed",
     {"standard": ["message completed", "function_call incomplete"], "codex": ["message completed"]}),
    ([*TEXT, ends(0), *CALL, Stop("max_output_tokens")], None, "incomplete", "completed", ["message completed", "function_call completed"]),
    ([*TEXT, ends(0), begins(1, "function_call", "c", "f"), Stop("max_output_tokens")], None, "incomplete", "completed",
     {"standard": ["message completed", "function_call incomplete"], "codex": ["message completed"]}),
    ([*TEXT, ends(0), begins(1, "custom_tool_call", "c", "f"), adds(1, "*** Begin", "input"), Stop("max_output_tokens")], None, "incomplete", "completed",
     {"standard": ["message completed", "custom_tool_call incomplete"], "codex": ["message completed"]}),
    ([begins(1, "tool_search_call", "c", "s"), adds(1, '{"q', "arguments"), Stop("max_output_tokens")], None, "incomplete", "completed",
     {"standard": ["tool_search_call incomplete"], "codex": []}),
    ([begins(1, "local_shell_call", "c", "s"), adds(1, '["x"]', "arguments"), Stop()], None, "failed", "failed", []),
    ([begins(0, "reasoning"), adds(0, "hm", "raw"), Stop("max_output_tokens")], None, "incomplete", "completed",
     {"standard": ["reasoning incomplete"], "codex": ["reasoning completed"]}),
    ([Stop("max_output_tokens")], None, "incomplete", "completed", []),
    # a filter
    ([Stop("content_filter", explanation="why")], None, "incomplete", "completed", ["message completed"]),
    ([begins(0, "reasoning"), ends(0), Stop("content_filter")], None, "incomplete", "completed", ["reasoning completed", "message completed"]),
    ([*TEXT, Stop("content_filter")], None, "incomplete", "completed", {"standard": ["message incomplete"], "codex": ["message completed"]}),
    # nothing to say is a way to end
    ([Stop()], None, "completed", "completed", ["message completed"]),
], ids=lambda value: " ".join(type(d).__name__ for d in value) if isinstance(value, list) and value and not isinstance(value[0], str) else "")
@pytest.mark.parametrize("profile", ["standard", "codex"])
def test_the_end_follows_from_the_evidence(deltas, error, standard, codex, items, profile):
    raw, attempt = told(deltas, pomex.STANDARD if profile == "standard" else pomex.CODEX, error)
    assert streams.events(raw)[-1]["type"] == "response." + (standard if profile == "standard" else codex)
    final = streams.check(raw, profile == "codex")
    assert final["status"] == standard, "inside, Codex is told the truth too"
    assert [f"{i['type']} {i['status']}" for i in final["output"]] == (items[profile] if isinstance(items, dict) else items)


def test_a_filtered_answer_says_why_in_the_form_that_the_client_shows():
    stop = [Stop("content_filter", explanation="because")]
    assert streams.check(told(stop)[0])["output"][0]["content"] == [{"type": "refusal", "refusal": "because"}]
    assert streams.check(told(stop, pomex.CODEX)[0], True)["output"][0]["content"][0]["text"] == "because"


def test_a_failure_carries_the_code_and_to_standard_clients_an_error_event():
    fail = [*TEXT, lambda sink: sink.fail(pomex.BadRequest("too long", code="context_length_exceeded"))]
    raw, _ = told(fail)
    assert streams.events(raw)[-2]["error"] == {"type": "invalid_request_error", "code": "context_length_exceeded", "message": "too long", "param": None}
    assert streams.check(raw)["error"] == {"code": "context_length_exceeded", "message": "too long"}
    assert streams.check(told(fail, pomex.CODEX)[0], True)["error"]["code"] == "context_length_exceeded"


MIXED = [begins(0, "reasoning"), adds(0, "hm", "summary"), ends(0, {"sealed_replay": {"k": 1}}), begins(1, "message"), adds(1, "Hel"),
         adds(1, "lo"), ends(1), begins(2, "function_call", "a", "f"), begins(3, "custom_tool_call", "b", "t"), adds(2, '{"x":', "arguments"),
         adds(3, '{"input":"p', "arguments"), adds(2, "1}", "arguments"), adds(3, 'q"}', "arguments"), ends(2), ends(3),
         Usage(5, output=3), Stop()]


@pytest.mark.parametrize("profile", [pomex.STANDARD, pomex.CODEX], ids=["standard", "codex"])
def test_a_stream_cut_anywhere_ends_once_and_truly(profile):
    for cut in range(len(MIXED) + 1):
        raw, attempt = told(MIXED[:cut], profile, None if cut == len(MIXED) else BROKEN)
        assert attempt.status == ("completed" if cut == len(MIXED) else "failed"), cut
        closed = sum(each.__qualname__.startswith("ends") for each in MIXED[:cut] if callable(each))
        assert sum(i["status"] == "completed" for i in streams.check(raw, profile is pomex.CODEX)["output"]) == closed, cut


def test_usage_is_the_providers_or_marked_as_estimated():
    _, attempt = told([*TEXT, Usage(10, 4, 3, 20, 6), Stop()])
    assert pomex.usage_object(attempt.usage) == {
        "input_tokens": 10, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 3}, "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 6}, "total_tokens": 30}
    _, attempt = told([begins(0, "message"), adds(0, "x" * 41), Stop()])
    assert attempt.usage == Usage(100, output=11, estimated=True)


def test_an_attempt_for_which_no_provider_was_asked_has_no_input():
    attempt = pomex.Attempt(answer())
    attempt.finish(BROKEN)
    assert attempt.usage == Usage(estimated=True)


@pytest.mark.parametrize("given, usage", [
    (None, None), ([], None), ({}, None), ({"tokens": 5}, None), ({"input_tokens": "5", "output_tokens": -5}, Usage()),
    ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3},
      "completion_tokens_details": {"reasoning_tokens": 1}}, Usage(5, 3, 0, 2, 1)),
    ({"input_tokens": 5.0, "output_tokens": True}, Usage(5)),
    ({"input_tokens": 5, "input_tokens_details": {"cached_tokens": 3}, "output_tokens": 2, "output_tokens_details": None}, Usage(5, 3, 0, 2)),
])
def test_a_foreign_usage_is_read_as_far_as_it_can_be_believed(given, usage):
    assert pomex.usage_from(given, {"usage": given}) == usage


def test_without_stream_there_are_no_frames_and_one_body():
    attempt = pomex.Assembler(answer(stream=False), seal)
    tell(attempt, MIXED)
    attempt.finish()
    assert attempt.take_output() == b""
    final = json.loads(attempt.body(1_700_000_009))
    assert final["output"] == streams.check(told(MIXED)[0])["output"]
    assert (final["status"], final["completed_at"]) == ("completed", 1_700_000_009)


def test_a_heartbeat_is_numbered_like_every_event():
    ours = answer()
    attempt = pomex.Assembler(ours, seal)
    raw = ours.start() + ours.heartbeat()
    for each in MIXED:
        tell(attempt, [each])
        raw += attempt.take_output() + ours.heartbeat()
    attempt.finish()
    streams.check(raw + attempt.terminal(1_700_000_009))


@pytest.mark.parametrize("originator, agent, codex", [
    ("codex_exec", "codex_exec/0.128.0 (Linux)", True), ("codex-tui", "", True), ("", "codex_cli_rs/0.1", True),
    ("", "OpenAI/Python 3.54.0", False), ("", "", False), ("my-codex", "curl", False)])
def test_codex_is_known_by_its_name(originator, agent, codex):
    assert pomex.client_profile(originator, agent) == (pomex.CODEX if codex else pomex.STANDARD)


# --- what goes up on the relay

RAW = '{"model":"m/x","input":"hello","tools":[{"type":"function","name":"f","parameters":{"properties":{"model":{"type":"string"}}}}],"store":false}'


@pytest.mark.parametrize("raw, expected", [
    (RAW, RAW.replace("m/x", "up")),
    ('{ "model" : "m/x" , "input":"a\\u00e9"}', '{ "model" : "up","store":false , "input":"a\\u00e9"}'),
    ('{"input":"x","model":"m/x"}', '{"input":"x","model":"up","store":false}'),
    ('{"input":"x","model":"m\\/x"}', '{"input":"x","model":"up","store":false}'),
    ('{"input":"say \\"model\\": \\"m/x\\"","model":"m/x"}', '{"input":"say \\"model\\": \\"m/x\\"","model":"up","store":false}'),
], ids=str)
def test_the_clients_own_bytes_go_up_with_the_model_replaced(raw, expected):
    request = pomex.parse_request(raw.encode())
    assert pomex.passthrough_body(request, request.input, [], "up").decode() == expected


@pytest.mark.parametrize("raw", [
    RAW, '{"input":"x","model":"m/x","store":true}', '{"input":"x","model":"m/x","store":null}', '{"model":"m/x","input":"x","model":"m/x"}',
    '{"model":"m/x","input":"x","mod\\u0065l":"m/x"}', '{"\\u006Dodel":"m/x","input":"x"}', '{"model":"a","input":"x","model":"m/x"}',
    '{"metadata":{"model":"m/x"},"input":"x","model":"m/x"}', '{"model":"m/x","input":"x","metadata":{"a\\"model":"y"}}',
    '{"model":"m/x","input":"x","st\\u006fre":true}', '{"model":"m/x","input":[{"type":"reasoning","id":"r","sealed_replay":{"x":1}}]}',
    '{"model":"m/x","input":[{"role":"user","content":"no type"}],"store":true}',
], ids=str)
def test_whatever_the_body_looks_like_the_model_is_theirs_and_nothing_is_stored(raw):
    request = pomex.parse_request(raw.encode())
    items, dropped = pomex.unseal_items(request.input, pomex.Envelope(SECRET, "a"), "p")
    pairs = json.loads(pomex.passthrough_body(request, items, dropped, 'up"\u00e9'), object_pairs_hook=list)
    assert [value for key, value in pairs if key == "model"] == ['up"\u00e9']
    assert [value for key, value in pairs if key == "store"] == [False]
    rest = {key for key, _ in pairs} - {"model", "store"}
    assert rest == set(request.body) - {"model", "store"}


def test_what_was_sealed_goes_back_up_byte_for_byte():
    secrets = ["gAAA\u00e9\\\"/+=", "second"]
    sealed = [seal({"encrypted_content": secret}) for secret in secrets]
    items = [{"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": s} for s in sealed] + [message("hello")]
    raw = json.dumps({"model": "m/x", "input": items, "store": False}).encode()
    request = pomex.parse_request(raw)
    opened, dropped = pomex.unseal_items(request.input, pomex.Envelope(SECRET, "a"), "p")
    up = pomex.passthrough_body(request, opened, dropped, "up")
    expected = raw.replace(b'"m/x"', b'"up"')
    for text, secret in zip(sealed, secrets):
        expected = expected.replace(json.dumps(text).encode(), json.dumps(secret).encode())
    assert up == expected, "spliced: only model and envelopes differ"
    for odd in (raw.replace(b"pmx1.", b"pmx\\u0031."), raw.replace(b'"hello"', json.dumps(sealed[0]).encode())):
        request = pomex.parse_request(odd)
        opened, dropped = pomex.unseal_items(request.input, pomex.Envelope(SECRET, "a"), "p")
        told_up = json.loads(pomex.passthrough_body(request, opened, dropped, "up"))
        assert [i["encrypted_content"] for i in told_up["input"][:2]] == secrets


def test_what_another_provider_sealed_does_not_go_up():
    foreign = pomex.Envelope(SECRET, "a").seal("q", "m", {"encrypted_content": "theirs"})
    request = ask(input=[{"type": "reasoning", "id": "r", "encrypted_content": foreign}, *item("message")])
    items, dropped = pomex.unseal_items(request.input, pomex.Envelope(SECRET, "a"), "p")
    up = json.loads(pomex.passthrough_body(request, items, dropped, "up"))
    assert dropped == ["reasoning:q"] and up["input"] == item("message")


def test_seals_that_hold_more_than_a_request_may_are_too_many(monkeypatch):
    monkeypatch.setattr(pomex, "MAX_ENVELOPES_BYTES", 5_000_000)
    envelope = pomex.Envelope(SECRET, "a")
    sealed = envelope.seal("p", "m", {"text": "a" * 1_000_000})
    assert len(sealed) < 2000
    items = [{"type": "reasoning", "summary": [], "encrypted_content": sealed}] * 6
    with pytest.raises(pomex.BadRequest, match="sealed reasoning") as told:
        pomex.unseal_items(items, envelope, "p")
    assert told.value.status == 413
    assert len(pomex.unseal_items(items[:4], envelope, "p")[0]) == 4, "counted anew for each call to a provider"


def test_a_thought_without_a_seal_does_not_go_up_where_nothing_is_stored():
    """Clients that ask for no encrypted_content, and other providers' thoughts under our ids: "Item with id 'rs_1' not found"."""
    shown = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]}
    raw = {"type": "reasoning", "id": "rs_2", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    call = pomex.WIRES["responses"].call(relay_job(ask(input=[message("x"), shown, raw, message("y", "assistant")])))
    assert call.dropped == ["input:reasoning"]
    assert json.loads(call.body)["input"] == [message("x"), raw, message("y", "assistant")]
    text = "Item with id 'rs_2' not found. Items are not persisted when `store` is set to false. Try again with `store` set to true."
    error = pomex.provider_error(404, pomex.Headers([]), json.dumps({"error": {"message": text, "code": None, "param": "input"}}).encode())
    assert error.kind == "bad_request", "the model is there"
    assert json.loads(call.repaired(error).body)["input"] == [message("x"), message("y", "assistant")]
    assert call.dropped == ["input:reasoning", "encrypted_content:refused"]
    for relay in (True, False):
        for nothing_sealed in ("x", [message("x")]):
            job = relay_job(ask(input=nothing_sealed), relay)
            assert pomex.WIRES["responses"].call(job).repaired(error) is None, "the same request would be refused again"


NEUTRAL = {"text": {"verbosity": "medium", "format": None}, "service_tier": "auto", "truncation": "disabled", "include": [],
           "top_logprobs": 0, "frequency_penalty": 0, "temperature": 1, "parallel_tool_calls": True, "metadata": {"a": "b"},
           "client_metadata": {}, "prompt_cache_key": "k", "reasoning": {"summary": "auto", "effort": None}, "seed": None}
CARRIED = {"responses": {"truncation", "include"}, "messages": {"user", "stop"}, "chat": {"seed", "stop", "presence_penalty"},
           "gemini": {"seed", "stop", "presence_penalty"}}


@pytest.mark.parametrize("wire", ["responses", "chat", "messages", "gemini"])
def test_every_field_that_a_wire_does_not_carry_is_named_by_its_path(wire):
    fields = {"truncation": "auto", "include": ["message.output_text.logprobs"], "context_management": [{"type": "compaction"}],
              "prompt_cache_options": {"ttl": "12h"}, "frobnicate": False, "seed": 0, "stop": ["x"], "presence_penalty": 0.5,
              "user": "u", "text": {"frobnicate": 1}, "reasoning": {"mode": "pro"}}
    call = pomex.WIRES[wire].call(relay_job(ask(**fields), relay=False))
    paths = {*fields, "text.frobnicate", "reasoning.mode"} - {"text", "reasoning"}
    assert set(call.dropped) == paths - CARRIED.get(wire, set())
    assert pomex.WIRES[wire].call(relay_job(ask(**NEUTRAL), relay=False)).dropped == []
    assert pomex.WIRES["responses"].call(relay_job(ask(**fields))).dropped == [], "the relay carries all"


LOOK = {"type": "function", "name": "look"}


@pytest.mark.parametrize("wire", ["responses", "chat", "messages", "gemini"])
def test_keys_of_tools_and_parts_that_a_wire_does_not_carry_are_named(wire):
    part = {"type": "input_text", "text": "q", "prompt_cache_breakpoint": {}, "cache_control": None}
    tools = [{**LOOK, "execution": "async", "strict": False}, {"type": "namespace", "name": "ns", "description": "d", "tools": [
        {**LOOK, "name": "f", "frobnicate": 1}]}, {"type": "custom", "name": "c", "description": "d", "format": None, "x": None}]
    items = [message("q"), {"type": "message", "role": "user", "content": [part]}, call("a"), output("a", [{**part, "detail": 1}])]
    dropped = pomex.WIRES[wire].call(relay_job(ask(tools=tools, input=items), relay=False)).dropped
    assert dropped == ["tools:function.execution", "tools:function.frobnicate", "content:input_text.prompt_cache_breakpoint",
                       "content:input_text.detail"]


@pytest.mark.parametrize("given, sent", [
    ({"type": "object", "properties": {"a": {"type": "string", "enum": None, "default": None}}, "required": None},
     {"type": "object", "properties": {"a": {"type": "string", "default": None}}}),
    ({"type": "object", "properties": {"a": {"type": "array", "items": None, "const": None}}, "$defs": None},
     {"type": "object", "properties": {"a": {"type": "array", "const": None}}}),
])
def test_nulls_of_a_tools_schema_that_ask_for_nothing_are_left_out(given, sent):
    """`"required": null` comes from Codex; strict servers refuse it (farion1231/cc-switch#7019)."""
    assert pomex.ToolMap([{**LOOK, "parameters": given}]).functions[0]["parameters"] == sent


def relay_job(request, relay=True):
    return pomex.EncodeContext(pomex.ResponsesAnswer(request, "resp_1", 1, pomex.STANDARD), pomex.Envelope(SECRET, "a"), "p", "m", relay, "")


@pytest.mark.parametrize("choice, up, dropped", [
    ("required", "required", []), ({"type": "function", "name": "look"}, {"type": "function", "name": "ns__look"}, []),
    ({"type": "function", "name": "look", "namespace": "other"}, {"type": "function", "name": "other__look"}, []),
    ({"type": "local_shell"}, {"type": "function", "name": "local_shell"}, []),
    ({"type": "mcp", "server_label": "x"}, "auto", ["tool_choice"]),
    ({"type": "allowed_tools", "tools": [{"type": "function", "name": "look"}]}, "auto", ["tool_choice.tools"]),
], ids=str)
def test_a_choice_goes_up_in_flat_names_or_is_named(choice, up, dropped):
    spaces = [{"type": "namespace", "name": name, "tools": [{"type": "function", "name": "look"}]} for name in ("ns", "other")]
    call = pomex.WIRES["responses"].call(relay_job(ask(tools=[*spaces, {"type": "local_shell"}], tool_choice=choice), relay=False))
    assert (json.loads(call.body)["tool_choice"], call.dropped) == (up, dropped)


def test_of_two_tools_that_flatten_alike_the_second_is_named():
    look, space = {"type": "function", "name": "ns__look"}, {"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "look"}]}
    assert pomex.ToolMap([look, space]).dropped == ["tools:ns__look"]
    assert pomex.ToolMap([look, look, space["tools"][0]]).dropped == [], "the same tool twice is no loss"


# --- the relay of frames

def frame(kind, number=None, **fields):
    numbered = {} if number is None else {"sequence_number": number}
    return f"event: {kind}\ndata: {pomex.dumps({'type': kind, **numbered, **fields})}\n\n".encode()


def response(status, **fields):
    return {"id": "resp_theirs", "object": "response", "created_at": 1_700_000_000, "model": "gpt", "status": status, "output": [], **fields}


GOOD_USAGE = {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 1}, "output_tokens": 2, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 11}
BEGIN = [frame("response.created", 0, response=response("in_progress")), frame("response.in_progress", 1, response=response("in_progress"))]


def theirs(at, item, *middle, status="completed"):
    """The frames of one item; `middle` are (kind, fields)."""
    added = {**item, "status": "in_progress", **({"content": []} if "content" in item else {}), **({"arguments": ""} if "arguments" in item else {})}
    return [frame("response.output_item.added", output_index=at, item=added), *(frame(k, output_index=at, item_id=item["id"], **f) for k, f in middle),
            frame("response.output_item.done", output_index=at, item={**item, "status": status})]


def numbered(stream):
    """The frames with sequence numbers put in."""
    number = itertools.count()
    bare = [pomex.re.sub(rb'"sequence_number":\d+,?', b"", f) for f in stream]
    return [pomex.re.sub(rb'(\{"type":"[\w.]+")', lambda m: m[1] + b',"sequence_number":%d' % next(number), f, count=1) for f in bare]


SAID = {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "Hi", "annotations": []}]}
PART = {"type": "output_text", "text": "", "annotations": []}
SAYING = theirs(0, SAID, ("response.content_part.added", {"content_index": 0, "part": PART}),
                ("response.output_text.delta", {"content_index": 0, "delta": "Hi", "logprobs": []}),
                ("response.output_text.done", {"content_index": 0, "text": "Hi", "logprobs": []}),
                ("response.content_part.done", {"content_index": 0, "part": {**PART, "text": "Hi"}}))
RUN = {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"}
RUNNING = theirs(1, RUN, ("response.function_call_arguments.delta", {"delta": "{}"}), ("response.function_call_arguments.done", {"arguments": "{}", "name": "f"}))
CUT_RUN = theirs(1, {**RUN, "arguments": '{"a'}, ("response.function_call_arguments.delta", {"delta": '{"a'}),
                 ("response.function_call_arguments.done", {"arguments": '{"a', "name": "f"}), status="incomplete")


def end(kind="completed", **fields):
    return [frame(f"response.{kind}", response=response(kind, usage=GOOD_USAGE, **fields))]


def relayed(pieces, profile=pomex.STANDARD, error=None, clean=True, early=b"", ours=None, after=None):
    ours = ours or answer(profile)
    attempt = pomex.ResponsesPassthrough(ours, seal, pomex.ResponsesDecoder(pomex.ToolMap([])))
    raw = early
    for piece in pieces:
        attempt.feed(piece)
        raw += attempt.take_output() if attempt.output_started else b""
        raw += after() if after and attempt.output_started else b""
    if clean:
        attempt.end()
    attempt.finish(error)
    raw += attempt.terminal(1_700_000_009)
    return raw, attempt


def test_frames_pass_as_they_came_but_for_id_and_model():
    stream = numbered([*BEGIN, *SAYING, *RUNNING, *end()])
    raw, attempt = relayed([b"".join(stream)])
    final = streams.check(raw)
    assert raw.split(b"\n\n")[2:-3] == b"".join(stream).split(b"\n\n")[2:-2]
    assert (final["id"], final["model"], final["usage"]["input_tokens"]) == ("resp_1", "m/x", 9)
    assert (attempt.status, attempt.terminal_by) == ("completed", "upstream")
    assert attempt.usage == Usage(9, 1, 0, 2)


@pytest.mark.parametrize("content", [[], [PART], [PART, PART], [{**PART, "logprobs": []}]])
def test_a_message_of_theirs_that_says_nothing_keeps_the_parts_that_it_has(content):
    parts = [(f"response.content_part.{what}", {"content_index": n, "part": part}) for n, part in enumerate(content) for what in ("added", "done")]
    raw, _ = relayed(numbered([*BEGIN, *theirs(0, {**SAID, "content": content}, *parts), *end()]))
    final = streams.check(raw, relayed=True)
    told = [event["item"] for event in streams.events(raw) if event["type"] == "response.output_item.done"]
    assert [item["content"] for item in (*told, *final["output"])] == [content, content]


@pytest.mark.parametrize("stream", [
    [*BEGIN, *SAYING, *RUNNING, *end()],
    [*BEGIN, b": ping\n\n", *SAYING[:2], b"event: ping\ndata:\n\n", *SAYING[2:], b":\n\n", *end(), b"data: [DONE]\n\n"],
    [frame("keepalive"), BEGIN[0], frame("response.metadata", headers={}), BEGIN[1], *SAYING, *end()],
    [BEGIN[0], frame("response.queued", response=response("queued")), BEGIN[1], *SAYING[:3], BEGIN[1].replace(b"1", b"5", 1), *SAYING[3:], *end()],
    [*SAYING, *end()],
    [*BEGIN, *SAYING, frame("response.new", x={"type": "error", "y": {"type": "response.completed"}}), *end()],
], ids=["plain", "comments", "unknown before", "repeated handshake", "no handshake", "nested types"])
def test_a_relayed_stream_is_whole_however_it_is_cut(stream):
    block = b"".join(numbered(stream))
    wanted, _ = relayed([block])
    assert [e["type"] for e in streams.events(wanted)].count("response.completed") == 1
    final = streams.check(wanted)
    assert final["output"][0]["content"][0]["text"] == "Hi"
    for pieces in ([block[n:n + 1] for n in range(len(block))], [block[n:n + 7] for n in range(0, len(block), 7)], block.splitlines(keepends=True),
                   [block.replace(b"\n", b"\r\n")], [bytes([b]) for b in block.replace(b"\n", b"\r\n")]):
        assert relayed(pieces)[0] == wanted


def test_nothing_of_a_stream_is_shown_before_its_output():
    for stream in ([*BEGIN, frame("keepalive"), frame("response.metadata")], [*BEGIN, frame("error", error={"code": "x"})], [*BEGIN, *end("failed", error={})]):
        attempt = pomex.ResponsesPassthrough(answer(), seal, pomex.ResponsesDecoder(pomex.ToolMap([])))
        attempt.feed(b"".join(stream))
        assert not attempt.output_started and not attempt.take_output() and attempt.answer.sequence == 0


def test_numbers_move_once_frames_of_ours_went_in():
    stream = numbered([*BEGIN, *SAYING, *RUNNING, *end()])
    ours = answer()
    early = ours.start() + ours.heartbeat()
    streams.check(relayed(stream, early=early, ours=ours)[0])
    ours = answer()
    streams.check(relayed(stream, ours=ours, after=ours.heartbeat)[0])
    late = [f.replace(b'"sequence_number":', b'"sequence_number": 7', 1) for f in stream]
    streams.check(relayed(late)[0])


@pytest.mark.parametrize("profile", [pomex.STANDARD, pomex.CODEX], ids=["standard", "codex"])
@pytest.mark.parametrize("clean", [True, False])
def test_a_lost_terminal_event_is_supplied_by_the_evidence(profile, clean):
    thought = theirs(0, {"type": "reasoning", "id": "rs_1", "summary": []})
    assert relayed(numbered([*BEGIN, *thought]), profile, None if clean else BROKEN, clean)[1].status == "failed", "it led to nothing yet"
    stream = numbered([*BEGIN, *SAYING, *RUNNING])
    for cut in range(len(stream) + 1):
        raw, attempt = relayed(stream[:cut], profile, None if clean else BROKEN, clean)
        done = sum(b"output_item.done" in f for f in stream[:cut])
        whole = done and done == sum(b"output_item.added" in f for f in stream[:cut])
        assert attempt.status == ("completed" if whole and clean else "failed"), cut
        final = streams.check(raw, profile is pomex.CODEX)
        assert len(final["output"]) == done, cut
        assert attempt.terminal_by == "gateway" and attempt.usage.estimated


def test_half_a_frame_at_the_end_is_not_shown_but_a_whole_one_without_its_empty_line_is():
    stream = b"".join(numbered([*BEGIN, *SAYING, *end()]))
    at = stream.index(b"event: response.completed")
    for cut in range(at + 1, len(stream) - 2, 13):
        raw, attempt = relayed([stream[:cut]])
        streams.check(raw)
        assert (attempt.status, attempt.terminal_by) == ("failed", "gateway")      # the torn event may have said anything
    raw, attempt = relayed([stream[:-2]])
    assert attempt.terminal_by == "upstream"
    middle = stream.index(b"event: response.output_text.done")
    for cut in range(middle + 1, middle + 60, 7):
        raw, attempt = relayed([stream[:cut]])
        streams.check(raw)
        assert attempt.status == "failed"


def test_done_of_theirs_never_goes_before_the_terminal_event():
    raw, attempt = relayed([b"".join(numbered([*BEGIN, *SAYING, frame("response.new")])) + b"data: [DONE]\n\n"])
    assert raw.count(b"[DONE]") == 1 and attempt.status == "completed"
    streams.check(raw)


@pytest.mark.parametrize("stream, standard, codex", [
    ([*BEGIN, *SAYING, *end("incomplete", incomplete_details={"reason": "max_output_tokens"})], ["message"], ["message"]),
    ([*BEGIN, *SAYING, *CUT_RUN, *end("incomplete", incomplete_details={"reason": "max_output_tokens"})], ["message", "function_call"], ["message"]),
    ([*BEGIN, *SAYING, *CUT_RUN, frame("response.new"), *end("incomplete")], ["message", "function_call"], ["message"]),
    ([*BEGIN, *end("incomplete", incomplete_details={"reason": "content_filter"})], [], ["message"]),
    ([*BEGIN, *SAYING, frame("response.completed", response=response("incomplete", incomplete_details={"reason": "max_output_tokens"}))],
     ["message"], ["message"]),
])
def test_codex_is_told_of_a_cut_as_of_an_end(stream, standard, codex):
    raw, attempt = relayed([b"".join(numbered(stream))])
    assert attempt.status == "incomplete" and streams.events(raw)[-1]["type"] == "response.incomplete"
    assert [i["type"] for i in streams.check(raw)["output"]] == standard
    raw, attempt = relayed([b"".join(numbered(stream))], pomex.CODEX)
    assert streams.events(raw)[-1]["type"] == "response.completed"
    assert [i["type"] for i in streams.check(raw, True, relayed=True)["output"]] == codex
    assert [e["item"]["type"] for e in streams.events(raw) if e["type"].endswith("item.done")] == codex


@pytest.mark.parametrize("error, code, status, retryable", [
    ({"code": "rate_limit_exceeded", "message": "slow, try again in 1.5s"}, "rate_limit_exceeded", 429, True),
    ({"code": "insufficient_quota", "message": "pay"}, "insufficient_quota", 429, True),
    ({"code": "context_length_exceeded", "message": "long"}, "context_length_exceeded", 400, False),
    ({"code": "server_error", "message": "oops"}, "server_error", 503, True),
    ({"code": "invalid_prompt", "message": "policy"}, "invalid_prompt", 400, False),
    ({"code": "cyber_policy", "message": "policy"}, "cyber_policy", 400, False),
    ({"code": "invalid_image_url", "message": "404"}, "invalid_image_url", 400, False),
    ({"message": ""}, "server_error", 503, True), ({}, "server_error", 503, True), (None, "server_error", 503, True), ("text", "server_error", 503, True),
])
@pytest.mark.parametrize("first", [True, False])
def test_an_error_of_theirs_keeps_what_clients_act_on(error, code, status, retryable, first):
    stream = [*BEGIN, *(SAYING if first else []), frame("error", error=error), *end("failed", error=error)]
    for profile in (pomex.STANDARD, pomex.CODEX):
        raw, attempt = relayed([b"".join(numbered(stream))], profile)
        assert (attempt.status, attempt.error.code, attempt.error.status, attempt.error.retryable) == ("failed", code, status, retryable)
        final = streams.check(raw, profile is pomex.CODEX)
        assert final["error"]["code"] == code and len(final["output"]) == first
        assert "HTTP 0" not in final["error"]["message"]


def test_sealed_content_of_theirs_is_put_into_our_envelope_everywhere():
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"}
    stream = numbered([*BEGIN, *theirs(0, thought), *theirs(1, {"type": "compaction", "id": "cmp_1", "encrypted_content": "gBBBB"}), *end(output=[thought])])
    raw, _ = relayed([b"".join(stream)])
    assert b"gAAAA" not in raw and b"gBBBB" not in raw
    opened = [pomex.Envelope(SECRET, "a").open(i["encrypted_content"]) for i in streams.check(raw)["output"]]
    assert opened == [("p", "m", {"encrypted_content": "gAAAA"}), ("p", "m", {"encrypted_content": "gBBBB"})]


@pytest.mark.parametrize("sealed, named", [
    ("gAAAAABo" + "x" * 40, True), ("pmx1.AAAA", True), ("Ab3+/" * 30, True), ("gAAAA is no cipher", False), ("look at src/" + "a/" * 60 + "b.py", False)])
@pytest.mark.parametrize("kind", [{"type": "agent_message"}, {"type": "message", "role": "user"}], ids=str)
def test_what_another_agent_was_told_is_text_unless_it_is_a_cipher(sealed, named, kind):
    request = ask(input=[{**kind, "content": [{"type": "input_text", "text": "a"}, {"type": "encrypted_content", "encrypted_content": sealed}]}])
    dropped: list[str] = []
    history = pomex.normalize_history("", request.input, pomex.ToolMap(()), dropped, {})
    assert [part["text"] for part in history.items[0]["content"]] == (["a"] if named else ["a", sealed])
    assert dropped == (["content:encrypted_content"] if named else [])


NO_OBJECTS = ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', "[1]", "3", '"x"', "null", '{"a"', "{} {}"]


@pytest.mark.parametrize("arguments", NO_OBJECTS)
@pytest.mark.parametrize("kind", ["function_call", "tool_search_call", "local_shell_call"])
def test_arguments_that_are_no_json_object_finish_no_call(arguments, kind):
    _, attempt = told([*TEXT, ends(0), begins(1, kind, "c", "f"), adds(1, arguments, "arguments"), ends(1), Stop()])
    assert attempt.status == "failed" and [item["type"] for item in json.loads(attempt.output())] == ["message"]


@pytest.mark.parametrize("arguments", NO_OBJECTS)
def test_arguments_of_theirs_that_are_no_json_object_finish_no_call(arguments):
    bad = {**RUN, "arguments": arguments}
    for stream in ([*SAYING, *theirs(1, bad), *end()], [*SAYING, *end(output=[SAID, bad])]):
        raw, attempt = relayed([b"".join(numbered([*BEGIN, *stream]))])
        assert attempt.status == "failed" and [item["type"] for item in streams.check(raw)["output"]] == ["message"]
    for streamed in (True, False):
        attempt = pomex.ResponsesPassthrough(answer(stream=streamed), seal, pomex.ResponsesDecoder(pomex.ToolMap([])))
        attempt.whole(json.dumps(response("completed", output=[bad], usage=GOOD_USAGE)).encode())
        attempt.finish()
        assert json.loads(attempt.body(1))["status"] == "failed"


def test_an_item_of_theirs_with_a_number_that_is_no_json_is_the_upstreams_error():
    with pytest.raises(pomex.UpstreamError):
        told([lambda sink: sink.item({"type": "tool_search_call", "call_id": "c", "arguments": {"a": float("nan")}}), Stop()])


def test_an_image_is_an_item_with_the_events_that_clients_know():
    raw, attempt = told([begins(0, "image_generation_call", fields={"result": None}), ends(0, {"result": "AAAA"}), Stop()])
    kinds = [event["type"] for event in streams.events(raw)][2:-1]
    assert kinds == ["response.output_item.added", "response.image_generation_call.in_progress",
                     "response.image_generation_call.generating", "response.image_generation_call.completed", "response.output_item.done"]
    (item,) = json.loads(attempt.output())
    assert item == {"id": "ig_1_0", "type": "image_generation_call", "status": "completed", "result": "AAAA"}
    assert raw.count(b"AAAA") == 2                  # in `done` and at the end, not in `added`


def test_a_filters_explanation_is_not_fooled_by_arguments():
    _, attempt = told([begins(0, "tool_search_call", "c", "s"), adds(0, '{"type":"message"}', "arguments"), ends(0),
                       Stop("content_filter", explanation="why")])
    assert [item["type"] for item in json.loads(attempt.output())] == ["tool_search_call", "message"]


@pytest.mark.parametrize("garbage", [b'data: {"type":"response.completed"\n\n', b'data: {"type":"response.output_item.done",]\n\n'])
def test_a_frame_that_must_be_read_and_cannot_is_the_upstreams_error(garbage):
    with pytest.raises(pomex.UpstreamError):
        relayed([*BEGIN, garbage])


@pytest.mark.parametrize("odd", [
    frame("response.output_item.done", output_index=0), frame("response.output_item.done", output_index=0, item=5),
    frame("response.output_item.added", item=None), frame("response.created", response=None), frame("error"), frame("error", error="text"),
    *(frame("response.completed", response={**response("completed"), "usage": usage}) for usage in ([1], 5, "x", {**GOOD_USAGE, "input_tokens_details": [1], "output_tokens_details": 7})),
])
def test_odd_frames_do_no_harm(odd):
    raw, _ = relayed([*BEGIN, odd, *SAYING, *end()])
    assert raw.count(b"event: response.completed") + raw.count(b"event: response.failed") == 1


def test_an_endless_frame_is_refused(monkeypatch):
    monkeypatch.setattr(pomex, "MAX_EVENT_BYTES", 1000)
    with pytest.raises(pomex.UpstreamError):
        relayed([b"data: " + b"x" * 600, b"x" * 600])


def test_an_answer_that_was_not_streamed_keeps_all_that_it_says():
    usage = {**GOOD_USAGE, "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0}}
    plain = json.dumps(response("completed", output=[SAID], usage=usage, other={"kept": 1.50})).encode()
    attempt = pomex.ResponsesPassthrough(answer(stream=False), seal, pomex.ResponsesDecoder(pomex.ToolMap([])))
    attempt.whole(plain)
    attempt.finish()
    assert json.loads(attempt.body(1)) == {**json.loads(plain), "id": "resp_1", "model": "m/x", "completed_at": 1}
    assert attempt.usage.input == 9


@pytest.mark.parametrize("fields", [
    {"output": [SAID, {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "gAAAA"}], "usage": GOOD_USAGE},
    {"output": [SAID], "metadata": {"model": "x"}, "usage": GOOD_USAGE}, {"output": [SAID], "usage": None}, {"output": None}, {"output": [5]},
    {"object": None, "output": [SAID]}, {"output": [SAID], "usage": GOOD_USAGE},        # a count is missing
])
def test_an_odd_answer_that_was_not_streamed_is_made_anew(fields):
    attempt = pomex.ResponsesPassthrough(answer(stream=False), seal, pomex.ResponsesDecoder(pomex.ToolMap([])))
    attempt.whole(json.dumps(response("completed", **fields)).encode())
    attempt.finish()
    final = json.loads(attempt.body(1))
    assert (final["id"], final["model"], final["status"]) == ("resp_1", "m/x", "completed")
    streams.check_usage(final["usage"])
    assert "gAAAA" not in json.dumps(final)


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b"{}", b"nope", b'{"status":', b'{"error":{"message":"x"}}'])
def test_an_answer_that_is_no_response_is_the_upstreams_error(body):
    with pytest.raises(pomex.UpstreamError):
        pomex.ResponsesPassthrough(answer(stream=False), seal, pomex.ResponsesDecoder(pomex.ToolMap([]))).whole(body)


@pytest.mark.parametrize("profile", [pomex.STANDARD, pomex.CODEX], ids=["standard", "codex"])
def test_an_object_in_the_endpoint_of_a_stream_becomes_a_stream(profile):
    half = {**RUN, "status": "incomplete", "arguments": '{"a'}
    attempt = pomex.ResponsesPassthrough(answer(profile), seal, pomex.ResponsesDecoder(pomex.ToolMap([])))
    looked = {**RUN, "namespace": "ns", "status": "completed"}
    attempt.whole(json.dumps(response("incomplete", output=[SAID, looked, half], usage=GOOD_USAGE)).encode())
    attempt.finish()
    final = streams.check(attempt.terminal(1_700_000_009), profile is pomex.CODEX, relayed=True)     # its items come whole
    assert [i["type"] for i in final["output"]] == ["message", "function_call"] + ["function_call"] * (profile is pomex.STANDARD)
    assert final["output"][1]["namespace"] == "ns"


# --- one table of streams, both roads

def ev(kind, **fields):
    return {"type": f"response.{kind}", **fields}


def added(item, **at):
    return ev("output_item.added", item=item, **at)


def done(item, **at):
    return ev("output_item.done", item=item, **at)


def over(*output, kind="completed", **fields):
    return ev(kind, response=response(kind, output=list(output), usage=GOOD_USAGE, **fields))


def says(text, item_id="msg_1", **fields):
    return {"id": item_id, "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text, "annotations": []}], **fields}


def asks(arguments='{"a":1}', call_id="c1", item_id="fc_1", **fields):
    return {"id": item_id, "type": "function_call", "call_id": call_id, "name": "f", "arguments": arguments, **fields}


def patches(text, **fields):
    return {"id": "ctc_1", "type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": text, **fields}


def thinks(text, item_id="rs_1"):
    return {"id": item_id, "type": "reasoning", "summary": [{"type": "summary_text", "text": text}]}


def without(item, *names):
    return {name: value for name, value in item.items() if name not in names}


BLANK, ASKED, PATCHED = {"id": "msg_1", "type": "message", "role": "assistant", "content": []}, asks(""), patches("")
AT0, OF_CALL, OF_TEXT = {"output_index": 0}, {"output_index": 0, "item_id": "fc_1"}, {"output_index": 0, "item_id": "msg_1"}
ARGS_MORE, ARGS_DONE, TEXT_MORE, TEXT_DONE = ("function_call_arguments.delta", "function_call_arguments.done", "output_text.delta", "output_text.done")
CALLED, CALLED_2 = ("f", "c1", '{"a":1}'), ("f", "c2", '{"a":1}')
EMPTY = ("f", "c1", "{}")
STREAMS = {
    # which item is which
    "an index that another id bears": ([added(thinks("hm"), **AT0), done(thinks("hm"), **AT0), added(ASKED, **AT0), ev(ARGS_MORE, delta='{"a":1}', **OF_CALL),
                                        done(asks(), **AT0), over()], ["hm", CALLED]),
    "an index for all, ids of their own": ([done(says("A", "m1"), **AT0), done(says("A", "m2"), **AT0), done(asks(), **AT0), done(asks(call_id="c2", item_id="fc_2"), **AT0),
                                            over()], ["A", "A", CALLED, CALLED_2]),
    "an id for all, indices of their own": ([part for at, text in enumerate("AB") for part in (
        added(BLANK, output_index=at), ev(TEXT_MORE, delta=text, output_index=at, item_id="msg_1"), done(says(text), output_index=at))] + [over(says("A"), says("B"))], ["A", "B"]),
    "both open at once under one id": ([added(BLANK, **AT0), added(BLANK, output_index=1), ev(TEXT_MORE, delta="A", **OF_TEXT),
                                        ev(TEXT_MORE, delta="B", output_index=1, item_id="msg_1"), done(says("A"), **AT0), done(says("B"), output_index=1), over()], ["A", "B"]),
    "neither index nor id": ([added(without(BLANK, "id")), ev(TEXT_MORE, delta="A"), done(without(says("A"), "id")), added(without(ASKED, "id")), ev(ARGS_MORE, delta='{"a":1}'),
                              done(without(asks(), "id")), over()], ["A", CALLED]),
    "neither, two calls alike": ([done(without(asks(), "id")), done(without(asks(call_id="c2"), "id")), over()], [CALLED, CALLED_2]),
    "neither, two messages": ([part for text in "AB" for part in (added(without(BLANK, "id")), ev(TEXT_MORE, delta=text), done(without(says(text), "id")))] + [over()], ["A", "B"]),
    "numbered from 1": ([added(BLANK, output_index=1), ev(TEXT_MORE, delta="A", output_index=1, item_id="msg_1"), done(says("A"), output_index=1), added(ASKED, output_index=2),
                         done(asks(), output_index=2), over(says("A"), asks())], ["A", CALLED]),
    "another id in done": ([added(BLANK, **AT0), ev(TEXT_MORE, delta="A", **OF_TEXT), done(says("A", "msg_9"), **AT0), added(ASKED, output_index=1),
                            done(asks(item_id="fc_9"), output_index=1), over(says("A", "msg_8"), asks(item_id="fc_8"))], ["A", CALLED]),
    "done twice": ([done(says("A"), **AT0), done(says("A"), **AT0), done(asks(), output_index=1), done(asks(), output_index=1), over(says("A"), asks())], ["A", CALLED]),
    "two calls alike": ([done(asks(), **AT0), done(asks(call_id="c2", item_id="fc_2"), output_index=1), over(asks(), asks(call_id="c2", item_id="fc_2"))], [CALLED, CALLED_2]),
    # what only the end holds
    "a call in the end alone": ([added(BLANK, **AT0), ev(TEXT_MORE, delta="A", **OF_TEXT), done(says("A"), **AT0), over(says("A"), asks())], ["A", CALLED]),
    "a text in the end alone": ([added(thinks("hm"), **AT0), done(thinks("hm"), **AT0), over(thinks("hm"), says("A"))], ["hm", "A"]),
    "one of two messages in the end alone": ([done(says("B", "m2"), **AT0), over(says("A", "m1"), says("B", "m2"))], ["B", "A"]),
    "the same under another id, and another": ([done(says("B", "m2"), **AT0), over(says("A", "m8"), says("B", "m9"))], ["B", "A"]),
    "all in the end": ([over(thinks("hm"), says("A"), asks(), asks(call_id="c2", item_id="fc_2"))], ["hm", "A", CALLED, CALLED_2]),
    "a second call in the end alone, numbered from 1": ([done(asks(), output_index=1), over(asks(), asks(call_id="c2", item_id="fc_2"))], [CALLED, CALLED_2]),
    "arguments in the end alone": ([added(ASKED, **AT0), ev(ARGS_DONE, arguments="", **OF_CALL), done(ASKED, **AT0), over(asks())], [CALLED]),
    "a placeholder, then arguments in the end": ([added(asks("{}"), **AT0), done(asks("{}"), **AT0), over(asks())], [CALLED]),
    "text in the end of an item that was done": ([added(BLANK, **AT0), done(BLANK, **AT0), over(says("A"))], ["A"]),
    "never done, whole in the end": ([added(ASKED, **AT0), added(BLANK, output_index=1), over(asks(), says("A"))], [CALLED, "A"]),
    "never done, nor in the end": ([added(ASKED, **AT0), ev(ARGS_MORE, delta='{"a":1}', **OF_CALL), over()], [CALLED]),
    "no end": ([added(ASKED, **AT0), ev(ARGS_DONE, arguments='{"a":1}', **OF_CALL), done(ASKED, **AT0)], [CALLED]),
    "an end of null": ([added(BLANK, **AT0), ev(TEXT_MORE, delta="A", **OF_TEXT), done(says("A"), **AT0),
                        ev("completed", response={**response("completed"), "output": None, "usage": GOOD_USAGE})], ["A"]),
    # what only the done events hold
    "arguments in done alone": ([added(ASKED, **AT0), ev(ARGS_DONE, arguments='{"a":1}', **OF_CALL), done(ASKED, **AT0), over(ASKED)], [CALLED]),
    "arguments in deltas alone": ([added(ASKED, **AT0), ev(ARGS_MORE, delta='{"a"', **OF_CALL), ev(ARGS_MORE, delta=":1}", **OF_CALL), done(ASKED, **AT0), over(ASKED)], [CALLED]),
    "arguments in added alone": ([added(asks(), **AT0), done(ASKED, **AT0), over(ASKED)], [CALLED]),
    "arguments before added": ([ev(ARGS_MORE, delta='{"a":1}', **OF_CALL), added(ASKED, **AT0), done(ASKED, **AT0), over()], [CALLED]),
    "an object": ([added(ASKED, **AT0), done(asks({"a": 1}), **AT0), over(asks({"a": 1}))], [CALLED]),
    "an object in done": ([added(ASKED, **AT0), ev(ARGS_DONE, arguments={"a": 1}, **OF_CALL), done(ASKED, **AT0), over(ASKED)], [CALLED]),
    "an object in the end alone": ([done(says("A"), **AT0), over(says("A"), asks({"a": 1}))], ["A", CALLED]),
    "no arguments at all": ([added(ASKED, **AT0), done(ASKED, **AT0), over(ASKED)], [EMPTY]),
    "no arguments, as they say": ([added(ASKED, **AT0), ev(ARGS_DONE, arguments="{}", **OF_CALL), done(asks("{}"), **AT0), over(asks("{}"))], [EMPTY]),
    "a patch in done alone": ([added(PATCHED, **AT0), ev("custom_tool_call_input.done", input="*** p", output_index=0, item_id="ctc_1"), done(PATCHED, **AT0), over(PATCHED)],
                              [("apply_patch", "c1", "*** p")]),
    "a patch in the end alone": ([added(PATCHED, **AT0), done(PATCHED, **AT0), over(patches("*** p"))], [("apply_patch", "c1", "*** p")]),
    "a patch in an object": ([added(PATCHED, **AT0), done(patches({"input": "*** p"}), **AT0), over()], [("apply_patch", "c1", "*** p")]),
    "an empty patch": ([added(PATCHED, **AT0), done(PATCHED, **AT0), over(PATCHED)], [("apply_patch", "c1", "")]),
    "text in done alone": ([added(BLANK, **AT0), ev(TEXT_DONE, text="A", content_index=0, **OF_TEXT), done(BLANK, **AT0), over()], ["A"]),
    "text in the part's done": ([added(BLANK, **AT0), ev("content_part.done", content_index=0, part={"type": "output_text", "text": "A"}, **OF_TEXT), done(BLANK, **AT0), over()], ["A"]),
    "a refusal in done alone": ([added(BLANK, **AT0), ev("refusal.done", refusal="A", content_index=0, **OF_TEXT), done(BLANK, **AT0), over()], ["A"]),
    "two texts in done alone": ([added(BLANK, **AT0), ev(TEXT_DONE, text="A", content_index=0, **OF_TEXT), ev(TEXT_DONE, text="B", content_index=1, **OF_TEXT), done(BLANK, **AT0), over()],
                                ["AB"]),
    # parts by whatever number
    "parts from 1": ([added(BLANK, **AT0), ev(TEXT_MORE, delta="A", content_index=1, **OF_TEXT), ev(TEXT_DONE, text="A", content_index=1, **OF_TEXT), done(says("A"), **AT0), over(says("A"))], ["A"]),
    "another number in done": ([added(BLANK, **AT0), ev(TEXT_MORE, delta="A", **OF_TEXT), ev(TEXT_DONE, text="A", content_index=3, **OF_TEXT), done(says("A"), **AT0), over(says("A"))], ["A"]),
    "parts with a gap": ([added(BLANK, **AT0), *(ev(TEXT_MORE, delta=text, content_index=at, **OF_TEXT) for at, text in ((2, "A"), (5, "B"))),
                          done({**BLANK, "content": [*says("A")["content"], *says("B")["content"]]}, **AT0), over()], ["AB"]),
    "parts that are all 0": ([added(BLANK, **AT0), *(ev(kind, content_index=0, **{field: text}, **OF_TEXT) for text in "AB" for kind, field in ((TEXT_MORE, "delta"), (TEXT_DONE, "text"))),
                              done({**BLANK, "content": [*says("A")["content"], *says("B")["content"]]}, **AT0), over()], ["AB"]),
    "summaries from 1": ([added(without(thinks(""), "summary"), **AT0), ev("reasoning_summary_text.delta", delta="hm", summary_index=1, output_index=0, item_id="rs_1"),
                          ev("reasoning_summary_text.done", text="hm", summary_index=1, output_index=0, item_id="rs_1"), done(thinks("hm"), **AT0), done(says("A"), output_index=1), over()],
                         ["hm", "A"]),
}


def facts(item):
    if "call_id" in item:
        return item["name"], item["call_id"], item.get("arguments", item.get("input"))
    return "".join(part.get("text", part.get("refusal")) for part in item.get("content") or item.get("summary"))


def decoded(pieces, profile=pomex.STANDARD):
    attempt = pomex.WIRES["responses"].call(pomex.EncodeContext(answer(profile), pomex.Envelope(SECRET, "a"), "p", "m", False, "")).attempt
    raw = b""
    for piece in pieces:
        attempt.feed(piece)
        raw += attempt.take_output()
    attempt.end()
    attempt.finish()
    return raw + attempt.terminal(1_700_000_009), attempt


def cuts(blocks):
    whole = b"".join(blocks)
    return [[whole], [whole[at:at + 1] for at in range(len(whole))], blocks, [b for block in blocks for b in (frame("response.new", delta="x"), block)]]


@pytest.mark.parametrize("road", [decoded, relayed])
@pytest.mark.parametrize("stream, items", STREAMS.values(), ids=STREAMS)
def test_every_item_comes_whole_once_and_in_order(stream, items, road):
    blocks = [*BEGIN, *(frame(event["type"], **without(event, "type")) for event in stream)]
    for profile, pieces in itertools.product((pomex.STANDARD, pomex.CODEX), cuts(blocks)):
        raw, attempt = road(pieces, profile)
        told = streams.events(raw)
        assert [facts(item) for item in told[-1]["response"]["output"]] == items
        assert sorted(map(str, items)) == sorted(str(facts(e["item"])) for e in told if e["type"] == "response.output_item.done"), "what Codex reads"
        assert attempt.status == "completed" and told[-1]["type"] == "response.completed"
        if road is decoded:
            streams.check(raw, codex=profile is pomex.CODEX)


@pytest.mark.parametrize("road", [decoded, relayed])
@pytest.mark.parametrize("stream, items", STREAMS.values(), ids=STREAMS)
def test_cut_after_any_event_nothing_is_made_up(stream, items, road):
    blocks = [*BEGIN, *(frame(event["type"], **without(event, "type")) for event in stream)]
    for count in range(len(blocks)):
        raw, attempt = road(blocks[:count])
        finished = [e["item"] for e in streams.events(raw) if e["type"] == "response.output_item.done" and e["item"].get("status") != "incomplete"]
        calls = [facts(item) for item in finished if "call_id" in item]
        assert len(set(calls)) == len(calls) and all(call in items or call[2] in ("", "{}") for call in calls), count


def test_what_is_remembered_of_a_stream_does_not_grow_with_its_events():
    decoder = pomex.ResponsesDecoder(pomex.ToolMap([]))
    decoder.sink = Recorder()
    for at in range(1000):
        decoder.feed(json.dumps(ev(TEXT_MORE, delta="x", output_index=0, item_id=f"msg_{at}")))
    assert (len(decoder.items), len(decoder.items.by_key)) == (1, 4)


PLAIN_RUNS = {
    "numbers as ours": lambda at: frame(f"response.{TEXT_MORE}", at + 3, item_id="msg_1", output_index=0, content_index=0, delta=f"t{at} "),
    "numbers behind ours": lambda at: frame(f"response.{TEXT_MORE}", at, item_id="msg_1", delta="t"),
    "numbers with gaps": lambda at: frame(f"response.{TEXT_MORE}", at * at, item_id="msg_1", delta='\\"sequence_number\\":7'),
    "one number for all": lambda at: frame(f"response.{TEXT_MORE}", 0, item_id="msg_1", delta='"type":"error"'),
    "no numbers": lambda at: frame(f"response.{TEXT_MORE}", item_id="msg_1", delta="t"),
    "some numbers": lambda at: frame(f"response.{TEXT_MORE}", at if at % 3 else None, item_id="msg_1", delta="\u65e5"),
    "arguments, whole texts, parts": lambda at: frame(f"response.{(ARGS_MORE, ARGS_DONE, TEXT_DONE, 'content_part.added', 'new')[at % 5]}", at, text="{}", delta="{"),
    "what is no event of theirs": lambda at: (frame(f"response.{TEXT_MORE}", at, delta="t"), b": ping\n\n", b'data: {"x":1}\n\n', b"data: [DONE]\n\n")[at % 4],
    "odd frames": lambda at: (b'data: {"delta":"t","type":"response.output_text.delta","sequence_number": 5}\n\n',
                              b'data: {"type":"response.output_text.delta",\ndata: "sequence_number":9}\n\n', frame(f"response.{TEXT_MORE}", at))[at % 3],
}


@pytest.mark.parametrize("event", PLAIN_RUNS.values(), ids=PLAIN_RUNS)
def test_a_run_of_plain_events_passes_as_each_of_them_alone(event, monkeypatch):
    opening = [*numbered([*BEGIN, frame("response.output_item.added", output_index=0, item=BLANK)])]
    stream = b"".join([*opening, *map(event, range(60)), *end()])
    chance = random.Random(1)
    cuts = [sorted(chance.sample(range(len(stream)), chance.randint(1, 40))) for _ in range(30)]
    pieces = [[stream], [stream[at:at + 1] for at in range(len(stream))], *([stream[a:b] for a, b in zip([0, *cut], [*cut, len(stream)])] for cut in cuts)]
    def outcome(each):
        raw, attempt = relayed(each)
        return raw, attempt.usage, attempt.status, attempt.output_chars

    whole = outcome([stream])
    told = [json.loads(e.data) for e in pomex.SSEDecoder().feed(whole[0]) if e.data != "[DONE]"]
    numbers = [e["sequence_number"] for e in told if "sequence_number" in e]
    assert numbers == list(range(len(numbers))) and whole[2] == "completed"
    torn = [[*each[:-1], each[-1][:len(each[-1]) // 2]] for each in pieces]
    with_runs = list(map(outcome, torn))
    assert all(outcome(each) == whole for each in pieces)
    monkeypatch.setattr(pomex.ResponsesPassthrough, "PLAIN_EVENTS", pomex.re.compile(b"(?!)"))
    assert all(outcome(each) == whole for each in pieces)
    assert list(map(outcome, torn)) == with_runs


def test_whole_texts_are_read_only_where_an_item_lacks_them(monkeypatch):
    read = []
    reader = pomex.ResponsesDecoder.read
    monkeypatch.setattr(pomex.ResponsesDecoder, "read", lambda self, event: (read.append(event["type"]), reader(self, event))[1])
    relayed([b"".join(numbered([*BEGIN, *SAYING, *RUNNING, *end()]))])
    assert not [kind for kind in read if kind not in ("response.output_item.added", "response.output_item.done", "response.completed")
                and "arguments" not in kind], "of SAYING nothing but its item; of RUNNING, whose arguments say nothing, also its deltas"


def test_what_is_held_of_passed_items_is_bounded():
    def limited(chars, items, *more):
        ours = answer()
        ours.max_chars, ours.max_items = chars, items
        return relayed(numbered([*BEGIN, *more]), ours=ours)

    long = frame("response.output_item.done", output_index=0, item=says("x" * 3000))
    assert limited(6000, 1, long, *end())[1].status == "completed"
    for chars, items, stream in ((3000, 1, [long]), (6000, 1, [*SAYING, *RUNNING]), (6000, 1, [done(asks(call_id=f"c{at}"), output_index=at) for at in range(2)])):
        with pytest.raises(pomex.GatewayError, match="max_answer_chars"):
            limited(chars, items, *(each if isinstance(each, bytes) else frame(each["type"], **without(each, "type")) for each in stream))


@pytest.mark.parametrize("road", [decoded, relayed])
def test_an_event_of_24_mb_in_small_pieces_takes_no_square_of_its_time(road):
    picture = frame("response.output_item.done", output_index=0, item={"type": "image_generation_call", "id": "ig_1", "result": "A" * (24 << 20)})
    begun = time.process_time()
    _, attempt = road([picture[at:at + 65536] for at in range(0, len(picture), 65536)])
    assert attempt.status == "completed" and time.process_time() - begun < 2        # 0.3; 3.1 where each piece was searched anew with all before


def test_the_time_for_a_large_frame_does_not_grow_with_its_square():
    attempt = pomex.ResponsesPassthrough(answer(), seal, pomex.ResponsesDecoder(pomex.ToolMap([])))
    picture = frame("response.output_item.done", output_index=0, item={"type": "image_generation_call", "id": "ig_1", "result": "A" * (12 << 20)})
    begun = time.process_time()
    for at in range(0, len(picture), 4096):
        attempt.feed(picture[at:at + 4096])
    assert attempt.output_started and time.process_time() - begun < 3        # 8 s where each piece was joined to all before


@pytest.mark.parametrize("road", [decoded, relayed])
@pytest.mark.parametrize("profile", [pomex.STANDARD, pomex.CODEX], ids=["standard", "codex"])
def test_a_call_cut_before_its_arguments_is_never_done(road, profile):
    cut = over(ASKED, kind="incomplete", incomplete_details={"reason": "max_output_tokens"})
    for stream in ([added(ASKED, **AT0), done(ASKED, **AT0), cut], [added(ASKED, **AT0), cut], [added(ASKED, **AT0), over()]):
        raw, attempt = road([*BEGIN, *(frame(event["type"], **without(event, "type")) for event in stream)], profile)
        finished = [e["item"] for e in streams.events(raw) if e["type"] == "response.output_item.done"]
        assert [item for item in finished if item.get("status") != "incomplete"] == [], finished


@pytest.mark.parametrize("road", [decoded, relayed])
@pytest.mark.parametrize("stream", [
    [added(ASKED, **AT0), over()],
    [added(ASKED, **AT0), ev(ARGS_MORE, delta='{"a', **OF_CALL), over()],
    [done(says("A"), **AT0), added(ASKED, output_index=1), over(says("A"))],
    [done(asks('{"a'), **AT0)],
    [done(asks(), **AT0), done(asks('{"a', "c2", "fc_2"), output_index=1)],
], ids=["no arguments", "half its arguments", "after a message", "done, and no end", "a second one, and no end"])
def test_a_call_that_is_never_finished_completes_no_answer(road, stream):
    for profile in (pomex.STANDARD, pomex.CODEX):
        raw, attempt = road(numbered([*BEGIN, *(frame(event["type"], **without(event, "type")) for event in stream)]), profile)
        assert attempt.status == "failed" and "not whole JSON" in str(attempt.error)
        whole = [event["item"] for event in stream if event["type"].endswith("item.done") and not pomex.is_incomplete_call(event["item"])]
        assert [facts(item) for item in streams.events(raw)[-1]["response"]["output"]] == list(map(facts, whole))


# --- the demo

def demo(model, **fields):
    request = ask(**{"stream": True, "input": "one two three four", **fields})
    job = pomex.EncodeContext(pomex.ResponsesAnswer(request, "resp_1", 1_700_000_000, pomex.CODEX), pomex.Envelope(SECRET, "a"), "demo", model, False, "")
    call = pomex.WIRES["demo"].call(job)
    error = None
    try:
        for data in call.frames:
            call.attempt.feed(data)
        call.attempt.end()
    except pomex.ProviderError as failed:
        error = failed
    call.attempt.finish(error)
    return streams.check(call.attempt.terminal(1_700_000_009), codex=True), call.attempt


@pytest.mark.parametrize("model, status, begun, by", [
    ("echo", "completed", True, "upstream"), ("tools", "completed", True, "upstream"), ("flaky", "failed", False, "gateway")])
def test_every_demo_model_ends_as_it_promises(model, status, begun, by):
    assert model in pomex.DEMO_MODELS
    final, attempt = demo(model)
    assert (attempt.status, attempt.output_started, attempt.terminal_by) == (status, begun, by)
    if model == "echo":
        assert "one two three four" in final["output"][-1]["content"][0]["text"]


def test_the_demo_asks_for_one_shell_call_and_ends_on_its_output():
    shell = {"type": "function", "name": "exec_command", "parameters": {
        "type": "object", "properties": {"cmd": {"type": "string"}, "workdir": {"type": "string"}}, "required": ["cmd"]}}
    final, _ = demo("tools", tools=[shell])
    made = final["output"][-1]
    assert (made["type"], made["name"], json.loads(made["arguments"])) == ("function_call", "exec_command", {"cmd": "echo hello from pomex"})
    asked = [message("go"), {k: made[k] for k in ("type", "call_id", "name", "arguments")}, output(made["call_id"], "hello from pomex")]
    final, _ = demo("tools", tools=[shell], input=asked)
    assert "hello from pomex" in final["output"][0]["content"][0]["text"]
    assert demo("tools", tools=[{"type": "local_shell"}])[0]["output"][0]["action"]["command"] == ["echo", "hello from pomex"]


@pytest.mark.parametrize("parameters, arguments", [
    ({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"type": "string"}},
      "required": ["city", "days"]}, {"city": "echo hello from pomex", "days": 1}),
    ({"type": "object", "properties": {}}, {}), ({"type": "object", "properties": {"a": {}}, "required": 5}, {}),
    ({"type": "object", "properties": {"a": {"type": ["string", "null"]}, "b": {"type": "boolean"}, "c": 5}, "required": ["a", "b", "c"]},
     {"a": "echo hello from pomex", "b": True, "c": "echo hello from pomex"}),
])
def test_the_demo_calls_a_shell_or_the_first_tool_that_is_offered(parameters, arguments):
    weather = {"type": "function", "name": "get_weather", "parameters": parameters}
    made = demo("tools", tools=[weather])[0]["output"][-1]
    assert (made["name"], json.loads(made["arguments"])) == ("get_weather", arguments)
    shell = {"type": "function", "name": "shell_command", "parameters": {}}
    assert demo("tools", tools=[weather, {**weather, "name": "b"}])[0]["output"][-1]["name"] == "get_weather"
    assert demo("tools", tools=[weather, shell])[0]["output"][-1]["name"] == "shell_command"
    assert demo("tools", tools=[shell, weather])[0]["output"][-1]["name"] == "shell_command"


# --- what a growing conversation repeats ------------------------------------------------------------

def grown(last, raw):
    """The request parsed with the last one known, and whether that was of use; equal to the one parsed alone."""
    before = pomex.parse_request(last)
    used = pomex.grown_body(raw, before) is not None
    try:
        alone = pomex.parse_request(raw)
    except pomex.BadRequest as error:
        with pytest.raises(pomex.BadRequest) as raised:
            pomex.parse_request(raw, before)
        assert (str(raised.value), raised.value.param, raised.value.code) == (str(error), error.param, error.code)
        return None, used
    found = pomex.parse_request(raw, before)
    assert found == alone and all(a is b for a, b in zip(found.input, before.input if used else ()))
    return found, used


FIRST = [{"role": "user", "content": "Hi é 😀"}, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{\"input\":[]}"},
         {"type": "function_call_output", "call_id": "c", "output": "x]}, {\"input\": ["}]
NEXT = [{"role": "assistant", "content": "there"}, {"role": "user", "content": "go on"}]
IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64," + 2000 * "A"}]}
TOOL_WITH_INPUT = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"input": {"enum": [["a"]]}},
                                                                    "examples": [{"input": ["a"]}]}}
SPACED = {"separators": (", ", ": ")}
ESCAPED = {"ensure_ascii": True}


def text(*items, before=None, after=None, **spelling):
    body = {"model": "p/m", **(before or {}), "input": [*FIRST, *items], **(after or {"tools": [], "prompt_cache_key": "k"})}
    return json.dumps(body, **{"ensure_ascii": False, "separators": (",", ":"), **spelling}).encode()


GROWN = {       # last body, next body, whether the first is of use
    "two more items": (text(), text(*NEXT), True),
    "with blanks": (text(**SPACED), text(*NEXT, **SPACED), True),
    "indented": (text(indent=1), text(*NEXT, indent=1), False),
    "the same": (text(), text(), False),
    "shorter": (text(*NEXT), text(), False),
    "other fields behind": (text(), text(*NEXT, after={"tools": [], "stream": True, "metadata": {"a": "b"}}), True),
    "other fields before": (text(), text(*NEXT, before={"instructions": "x"}), False),
    "an image more": (text(), text(IMAGE, *NEXT), True),
    "an image before": (text(IMAGE), text(IMAGE, *NEXT), True),
    "an image behind the input": (text(after={"x": IMAGE}), text(IMAGE, after={"x": IMAGE}), True),
    "tools among the items": (text({"type": "additional_tools", "tools": [TOOL_WITH_INPUT]}),
                              text({"type": "additional_tools", "tools": [TOOL_WITH_INPUT]}, *NEXT), True),
    "an input in the tools before": (
        text(before={"tools": [TOOL_WITH_INPUT]}, after={"x": 1}), text(*NEXT, before={"tools": [TOOL_WITH_INPUT]}, after={"x": 1}), False),
    "a surrogate pair in escapes": (text(**ESCAPED), text({"role": "user", "content": "😀"}, **ESCAPED), False),
    "escapes before only": (text(**ESCAPED), text(*NEXT, **ESCAPED), True),
    "half a pair": (text(), text().replace(b"]}, {", b"]}, {").replace(b'}],"tools"', b'},{"role":"user","content":"\\ud83d"}],"tools"'), False),
    "a longer list in the last item": (
        text({"role": "user", "content": [{"type": "input_text", "text": "a"}]}),
        text({"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}), False),
    "a bad item": (text(), text({"role": "nobody", "content": "x"}), True),
    "an item that is no object": (text(), text(5), True),
    "no comma": (text(), text().replace(b'}],"tools"', b'}{"role":"user","content":"x"}],"tools"'), False),
    "a comma too much": (text(), text().replace(b'}],"tools"', b'},],"tools"'), False),
    "two commas": (text(), text().replace(b'}],"tools"', b'},,{"role":"user","content":"x"}],"tools"'), False),
    "cut": (text(), text(*NEXT)[:-40], False),
    "more behind the end": (text(), text(*NEXT) + b"{}", False),
    "a second input": (text(), text(*NEXT, after={"a": 1}).replace(b'"a":1', b'"input":"other"'), False),
    "a second input of a list": (text(), text(*NEXT, after={"a": 1}).replace(b'"a":1', b'"input":[{"role":"user","content":"x"}]'), False),
    "NaN": (text(), text(*NEXT, after={"temperature": float("nan")}), False),
    "not UTF-8": (text(), text(*NEXT).replace(b"go on", b"go \xff on"), False),
    "a text in its place": (text(), text(*NEXT).replace(b'"input":[', b'"input":"a","x":['), False),
    "the mark itself": (text(), b'{"model":"p/m","input":"(input)"}', False),
    "nested too deeply": (text(), text(*NEXT).replace(b'"go on"', b"[" * 9000 + b"]" * 9000), False),
}


@pytest.mark.parametrize("name", GROWN)
def test_a_body_that_grows_is_read_as_if_it_came_alone(name):
    last, raw, useful = GROWN[name]
    _, used = grown(last, raw)
    assert used == useful


def test_any_two_bodies_are_read_as_if_they_came_alone():
    bodies = [body for last, raw, _ in GROWN.values() for body in (last, raw)]
    for last in bodies:
        try:
            pomex.parse_request(last)
        except pomex.BadRequest:
            continue
        for raw in bodies:
            grown(last, raw)


def test_the_fields_around_the_input_are_decoded_when_they_change(monkeypatch):
    decoded = []
    strict_json = pomex.strict_json
    monkeypatch.setattr(pomex, "strict_json", lambda text: decoded.append(text) or strict_json(text))
    bodies = [text(), text(*NEXT), text(*NEXT, *NEXT), text(*NEXT, *NEXT, *NEXT, after={"tools": [TOOL_WITH_INPUT]}),
              text(*4 * NEXT, after={"tools": [TOOL_WITH_INPUT]}), text(*5 * NEXT, after={"tools": [{"type": 5}]})]
    last, times = None, []
    for raw in bodies[:-1]:
        decoded.clear()
        last = pomex.parse_request(raw, last)
        times.append(len(decoded))
        assert last == pomex.parse_request(raw)
    assert times == [1, 1, 0, 1, 0]
    with pytest.raises(pomex.BadRequest, match=r"tools\[0\]"):
        pomex.parse_request(bodies[-1], last)


@pytest.mark.parametrize("fields", [{}, {"store": False}, {"store": True}, {"metadata": {"model": "x"}}, {"model": "p/other"}], ids=str)
def test_a_conversation_that_grows_passes_as_if_each_request_came_alone(fields):
    envelope = pomex.Envelope(b"k" * 32, "a")
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": envelope.seal("p", "m", {"encrypted_content": "gAAAA"})}
    foreign = {**thought, "encrypted_content": envelope.seal("q", "m", {"encrypted_content": "gAAAA"})}
    named = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "model": "in an item", "é": "\u006d"}
    for items in ([named], [thought, named], [foreign, named], [{"type": "reasoning", "id": "rs_2", "summary": []}, named]):
        last = None
        for count in range(1, 5):
            raw = text(*count * [*NEXT, *items], after={"tools": [TOOL_WITH_INPUT], **fields})
            alone, last = pomex.parse_request(raw), pomex.parse_request(raw, last)
            bodies = []
            for request in (alone, last):
                answer = pomex.ResponsesAnswer(request, "resp_1", 1, pomex.STANDARD)
                call = pomex.WIRES["responses"].call(pomex.EncodeContext(answer, envelope, "p", "upstream", True, ""))
                body = json.loads(call.body)
                body["input"] = [{"type": "message", **item} for item in body["input"]]       # which a client may leave out
                bodies.append((body, call.dropped))
            assert bodies[0] == bodies[1] and bodies[0][0]["model"] == "upstream" and bodies[0][0]["store"] is False
        assert last.around.start


def test_any_prefix_is_found():
    for one, other, expected in ((b"", b"", 0), (b"a", b"", 0), (b"abc", b"abd", 2), (b"abc", b"abc", 3), (b"abc", b"abcd", 3), (b"x", b"y", 0)):
        assert pomex.common_prefix(one, other) == pomex.common_prefix(other, one) == expected
    for at in range(200):
        assert pomex.common_prefix(b"a" * 200, b"a" * at + b"b" * 50) == at


def test_encoding_changes_no_item_of_a_request():
    raw = text(*NEXT, IMAGE, after={"tools": [TOOL_WITH_INPUT]})
    for wire, dialect in (("chat", ""), ("chat", "mistral"), ("messages", ""), ("gemini", ""), ("responses", "")):
        for passthrough in (True, False):
            request = pomex.parse_request(raw)
            before = json.dumps(request.input)
            answer = pomex.ResponsesAnswer(request, "resp_1", 1, pomex.STANDARD)
            pomex.WIRES[wire].call(pomex.EncodeContext(answer, pomex.Envelope(b"k" * 32, "a"), "p", "gemini-2.5-pro", passthrough, dialect))
            assert json.dumps(request.input) == before


def test_a_conversation_that_grows_is_encoded_as_if_each_request_came_alone():
    envelope = pomex.Envelope(b"k" * 32, "a")
    sealed = envelope.seal("p", "m", {"blocks": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}], "reasoning_content": "Hm."})
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": sealed}
    shell = {"type": "function", "name": "shell", "parameters": {"type": "object", "properties": {"in put": {"type": "string"}}}}

    def step(n):
        return [thought, {"type": "function_call", "call_id": f"call_{n % 2}", "name": "functions.shell", "arguments": '{"in put": "x"}'},
                {"type": "function_call_output", "call_id": f"call_{n % 2}", "output": f"out {n}"}, IMAGE, *NEXT,
                {"type": "unknown_item", "x": n}, {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "", "y": 1}]}]
    targets = [("chat", "m", ""), ("chat", "m", "mistral"), ("messages", "claude-opus-5", ""), ("gemini", "gemini-3-pro", ""),
               ("responses", "m", ""), ("messages", "claude-sonnet-4-5", "")]

    def encoded(request):
        for wire, model, dialect in targets:
            answer = pomex.ResponsesAnswer(request, "resp_1", 1, pomex.STANDARD)
            call = pomex.WIRES[wire].call(pomex.EncodeContext(answer, envelope, "p", model, False, dialect))
            yield call.path, call.body, call.dropped, list(call.headers)
    last = None
    for turns in range(1, 6):
        items = [item for n in range(turns) for item in step(n)]
        tools = [shell] if turns != 4 else [shell, {"type": "custom", "name": "patch"}]
        raw = text(*items, after={"tools": tools, "prompt_cache_key": "k"})
        alone, last = pomex.parse_request(raw), pomex.parse_request(raw, last)
        for _ in range(2):
            assert list(encoded(last)) == list(encoded(alone))
    assert len(last.memo) <= len(last.input) + 20       # what it holds does not grow with the requests
