"""What Anthropic and Google refuse: the 400s of their APIs, said again without a look at the gateway's tables.

A check is given a request's body and answers with the provider's own complaint, or with "". Signatures are the
scripted provider's: each holds a digest of what it signs, so that any change of a signed part is seen.
"""
from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

JSON = dict[str, Any]
THINKING_BLOCKS = ("thinking", "redacted_thinking")
DIRECT = os.environ.get("POMEX_ACCEPTANCE_DIRECT") == "1"      # a client itself asks, with a key of its own


class Refused(Exception):
    """The request is a 400 of the provider's."""


def need(condition: object, complaint: str) -> None:
    if not condition:
        raise Refused(complaint)


def need_base64(data: Any, where: str) -> None:
    try:
        need(base64.b64decode(data, validate=True), f"{where}: empty")
    except (ValueError, TypeError):
        raise Refused(f"{where}: not base64") from None


# --- signatures

def seal(signed: Any, carried: bytes = b"") -> str:
    """A signature of `signed`, a different one each time; it may carry data."""
    nonce = os.urandom(9)
    return base64.b64encode(nonce + digest(nonce, signed) + carried).decode()


def digest(nonce: bytes, signed: Any) -> bytes:
    return hashlib.sha256(nonce + json.dumps(signed, sort_keys=True).encode()).digest()[:16]


def is_seal(signature: Any, signed: Any) -> bool:
    try:
        data = base64.b64decode(signature, validate=True)
    except (ValueError, TypeError):
        return False
    return data[9:25] == digest(data[:9], signed)


# --- Anthropic

@dataclass(frozen=True)
class AnthropicModel:
    """What a model takes (TRANSLATION.md 3.2 and 5.1). The defaults are of no Claude: another's behind the same API."""
    thinking: tuple[str, ...] = ()
    efforts: tuple[str, ...] = ()
    cap: int = 1 << 31
    sampling: bool = True
    forced: bool = True
    system_anywhere: bool = False
    prefill: bool = True
    bound: bool = False             # a thought belongs to its model and to all that came before it
    omits: bool = False             # thoughts come without their text unless it is asked for
    json_schema: bool = False


ANTHROPIC_MODELS = {
    "claude-sonnet-4-5": AnthropicModel(("enabled", "disabled"), (), 64_000, json_schema=True),
    "claude-opus-4-8": AnthropicModel(("adaptive", "disabled"), ("low", "medium", "high", "xhigh", "max"), 128_000, sampling=False,
                              system_anywhere=True, prefill=False, omits=True, json_schema=True),
    "claude-opus-5-5": AnthropicModel(("adaptive",), ("low", "medium", "high", "xhigh", "max"), 128_000, sampling=False,
                              forced=False, system_anywhere=True, prefill=False, bound=True, omits=True, json_schema=True),
}
MESSAGES_FIELDS = {"model", "max_tokens", "messages", "system", "tools", "tool_choice", "thinking", "output_config",
                   "metadata", "temperature", "top_p", "top_k", "stop_sequences", "stream", "service_tier"}
NEWER_VERSION = "2026-10-21"            # the SDKs', which send their key as a Bearer; 2023-06-01 stays valid
BETA_FIELDS = {"context_management": "context-management-", "speed": "fast-mode-", "mcp_servers": "mcp-client-"}
BLOCK_FIELDS = {
    "text": {"text", "citations"}, "tool_reference": {"tool_name"}, "image": {"source"}, "document": {"source", "title", "context", "citations"},
    "thinking": {"thinking", "signature"}, "redacted_thinking": {"data"}, "tool_use": {"id", "name", "input", "caller"},
    "tool_result": {"tool_use_id", "content", "is_error"}, "server_tool_use": {"id", "name", "input", "caller"},
    "web_search_tool_result": {"tool_use_id", "content", "caller"}}
BINDING = "thinking-binding-controls-2026-08-01"
SERVER_BLOCKS = ("server_tool_use", "web_search_tool_result")
ROLE_BLOCKS = {"user": {"text", "image", "document", "tool_result"}, "system": {"text"},
               "assistant": {"text", "tool_use", *THINKING_BLOCKS, *SERVER_BLOCKS}}
RESULT_BLOCKS = {"text", "image", "document", "tool_reference"}
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")


@dataclass
class Memory:
    """What a provider has given out."""
    thought_of: dict[str, list[JSON]] = field(default_factory=dict)     # Anthropic: by call id, its answer's thoughts
    signed_calls: dict[str, str] = field(default_factory=dict)          # Gemini: by the call's JSON, its signature
    recorded: bytes = b""                                               # streams that real ones gave
    whole_answers: bool = False                                         # a client may ask for an answer that is not streamed

    def recorded_here(self, signature: str) -> bool:
        return json.dumps(signature).encode() in self.recorded


def in_blocks(body: JSON) -> JSON:
    """A Messages request with every text that stands as a string as the one block that it means."""
    def blocks(content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content
    messages = [{**message, "content": blocks(message["content"])} for message in body.get("messages", [])]
    return {**body, "messages": messages, **({"system": blocks(body["system"])} if "system" in body else {})}


def messages_complaint(body: JSON, headers: dict[str, str], memory: Memory) -> str:
    try:
        body = in_blocks(body)
        row = ANTHROPIC_MODELS.get(body.get("model", "").removeprefix("direct/"), AnthropicModel())
        check_messages(body, row, headers, memory.whole_answers)
        check_loops(body, memory.thought_of)
        for where, block, before in thoughts_of(body):
            check_signature(where, block, before, body, row, memory)
    except Refused as refused:
        return str(refused)
    return ""


def check_messages(body: JSON, row: AnthropicModel, headers: dict[str, str], whole_answers: bool = False) -> None:
    key = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
    need(DIRECT or key == "upstream-secret", "invalid x-api-key")
    version = headers.get("anthropic-version")
    need(version in ("2023-06-01", NEWER_VERSION), "anthropic-version: header is required")
    need(version != NEWER_VERSION or not {"temperature", "top_p", "top_k"} & set(body), "temperature: not supported")
    betas = headers.get("anthropic-beta", "")
    extra = sorted(set(body) - MESSAGES_FIELDS - {name for name, beta in BETA_FIELDS.items() if beta in betas})
    need(not extra, f"{extra[:1]}: Extra inputs are not permitted")
    need(isinstance(body.get("max_tokens"), int) and body["max_tokens"] >= 1, "max_tokens: Field required")
    need(body["max_tokens"] <= row.cap, f"max_tokens: {body['max_tokens']} > {row.cap}, which is the maximum allowed")
    need(body.get("stream") is True or whole_answers,
         "Streaming is strongly recommended for operations that may take longer than 10 minutes")
    check_blocks("system", body.get("system", []), {"text"})
    check_claude_tools(body, row, betas)
    check_thinking(body, row, headers)
    check_output_config(body.get("output_config", {}), row)
    check_marks(body)
    check_turns(body, row)


def check_blocks(where: str, blocks: Any, allowed: set[str]) -> None:
    need(isinstance(blocks, list), f"{where}: Input should be a valid list")
    for n, block in enumerate(blocks):
        kind, at = block.get("type"), f"{where}.{n}"
        need(kind in allowed, f"{at}: Input tag '{kind}' found using 'type' does not match any of the expected tags")
        extra = sorted(set(block) - BLOCK_FIELDS[kind] - {"type", "cache_control"})
        need(not extra, f"{at}.{kind}.{extra[:1]}: Extra inputs are not permitted")
        if kind == "text":
            need(block["text"], f"{at}: text content blocks must be non-empty")
            need(block["text"].strip(), f"{at}: text content blocks must contain non-whitespace text")
        elif kind in ("image", "document"):
            check_source(at, kind, block["source"])
        elif kind == "tool_use":
            need(re.fullmatch(r"[a-zA-Z0-9_-]+", block["id"]), f"{at}.id: String should match pattern")
            need(TOOL_NAME.fullmatch(block["name"]), f"{at}.name: String should match pattern")
            need(isinstance(block["input"], dict), f"{at}.tool_use.input: Input should be a valid dictionary")
        elif kind == "tool_result" and not isinstance(block.get("content", ""), str):
            check_blocks(f"{at}.content", block["content"], RESULT_BLOCKS)


def check_source(at: str, kind: str, source: JSON) -> None:
    if source["type"] == "url":
        need(re.match("https?://", source["url"]), f"{at}.source.url: invalid")
    elif source["type"] == "text":
        need(source["media_type"] == "text/plain" and source["data"], f"{at}.source: invalid")
    else:
        types = {"image": ("image/jpeg", "image/png", "image/gif", "image/webp"), "document": ("application/pdf",)}[kind]
        need(source["media_type"] in types, f"{at}.source.base64.media_type: Input should be one of {types}")
        need_base64(source["data"], f"{at}.source.base64.data")


def check_claude_tools(body: JSON, row: AnthropicModel, betas: str) -> None:
    tools = body.get("tools", [])
    fields = {"name", "description", "input_schema", "cache_control", "type", "strict", "eager_input_streaming"}
    fields |= {"defer_loading", "allowed_callers", "input_examples"} if "advanced-tool-use-" in betas else set()
    names = [tool["name"] for tool in tools]
    need(len(set(names)) == len(names), "tools: Tool names must be unique.")
    for n, tool in enumerate(tools):
        need(TOOL_NAME.fullmatch(tool["name"]), f"tools.{n}.name: String should match pattern")
        if str(tool.get("type", "")).startswith("web_search_"):
            continue
        need("input_schema" in tool, f"tools.{n}.custom.input_schema: Field required")
        need(tool["input_schema"].get("type") == "object", f"tools.{n}.custom.input_schema.type: Field required")
        need(not {"anyOf", "oneOf", "allOf"} & set(tool["input_schema"]),
             f"tools.{n}.custom.input_schema: input_schema does not support oneOf, allOf, or anyOf at the top level")
        need(set(tool) <= fields and tool.get("type") in (None, "custom"), f"tools.{n}: Extra inputs {sorted(tool)}")
    choice = body.get("tool_choice")
    if choice is None:
        return
    need(tools, "tool_choice may only be specified while providing tools")
    need(choice["type"] in ("auto", "any", "tool", "none"), "tool_choice: unknown type")
    need(choice["type"] != "none" or set(choice) == {"type"}, "tool_choice.none: Extra inputs are not permitted")
    if choice["type"] in ("any", "tool"):
        need(row.forced, "tool_choice forces tool use, which this model does not support")
        need(body.get("thinking", {}).get("type") != "enabled", "Thinking may not be enabled when tool_choice forces tool use.")
    if choice["type"] == "tool":
        need(choice["name"] in names, f"Tool '{choice['name']}' not found in provided tools")


def check_thinking(body: JSON, row: AnthropicModel, headers: dict[str, str]) -> None:
    thinking = body.get("thinking")
    kind = thinking["type"] if thinking else ""
    need(not thinking or kind in row.thinking, f'"thinking.type.{kind}" is not supported for this model.')
    need("block_binding" not in (thinking or {}) or (kind == "adaptive" and BINDING in headers.get("anthropic-beta", "")),
         "thinking.adaptive.block_binding: Extra inputs are not permitted")
    if kind == "enabled":
        need(thinking["budget_tokens"] >= 1024, "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024")
        need(thinking["budget_tokens"] < body["max_tokens"], "`max_tokens` must be greater than `thinking.budget_tokens`.")
    given = {"temperature", "top_p"} & set(body)
    need(row.sampling or not given, f"{given}: not supported for this model")
    need(len(given) < 2, "`temperature` and `top_p` cannot both be specified for this model.")
    need(not given or kind not in ("enabled", "adaptive"), "`temperature` may only be set to 1 when thinking is enabled.")
    need(0 <= body.get("temperature", 0) <= 1, "temperature: Input should be less than or equal to 1")


def check_output_config(config: JSON, row: AnthropicModel) -> None:
    need(set(config) <= {"effort", "format"}, "output_config: Extra inputs are not permitted")
    effort = config.get("effort")
    need(effort is None or effort in row.efforts, f"This model does not support effort level '{effort}'.")
    if "format" in config:
        need(row.json_schema, "output_config.format: not supported for this model")
        for schema in schemas_in(config["format"]["schema"]):
            refused = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength",
                       "maxItems", "pattern", "oneOf", "$schema", "uniqueItems", "patternProperties"} & set(schema)
            need(not refused, f"output_config.format.schema: {refused} not supported")
            need(schema.get("type") != "object" or schema.get("additionalProperties") is False,
                 "output_config.format.schema: For 'object' type, 'additionalProperties' must be explicitly set to false")


def schemas_in(schema: Any) -> Iterator[JSON]:
    """A schema and all within it: names of properties are no keywords."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in schema.items():
        if key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, dict):
            inner: Iterable[Any] = value.values()
        elif key in ("items", "additionalProperties", "not"):
            inner = [value]
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            inner = value
        else:
            continue
        for each in inner:
            yield from schemas_in(each)


def check_marks(body: JSON) -> None:
    """cache_control: four at most, the longer kept first, none on a thought."""
    blocks = [*body.get("tools", []), *body.get("system", [])]
    for message in body["messages"]:
        for block in message["content"]:
            blocks += [*(block["content"] if isinstance(block.get("content"), list) else []), block]
    marked = [block for block in blocks if "cache_control" in block]
    need(len(marked) <= 4, f"A maximum of 4 blocks with cache_control may be provided. Found {len(marked)}.")
    need(all(block.get("type") not in THINKING_BLOCKS for block in marked), "cache_control cannot be set on thinking blocks")
    ttls = [block["cache_control"].get("ttl", "5m") for block in marked]
    need(ttls == sorted(ttls), "a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block.")


def check_turns(body: JSON, row: AnthropicModel) -> None:
    messages, open_ids, seen = body["messages"], [], set()
    need(messages, "messages: at least one message is required")
    need(messages[0]["role"] == "user", "messages: first message must use the \"user\" role")
    for n, (before, message, after) in enumerate(zip([None, *messages], messages, [*messages[1:], None], strict=False)):
        role, blocks = message["role"], message["content"]
        need(blocks, f"messages.{n}: all messages must have non-empty content except for the optional final assistant message")
        check_blocks(f"messages.{n}.content", blocks, ROLE_BLOCKS[role])
        kinds = [block["type"] for block in blocks]
        if role == "system":
            need(row.system_anywhere, "messages: Unexpected role \"system\".")
            need(before and before["role"] == "user" and (after is None or after["role"] == "assistant"),
                 f"messages.{n}: a system message stands after a user turn, before an assistant turn or at the end")
            continue
        results = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        missing = set(open_ids) - set(results)
        need(not missing, f"messages.{n - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: "
                          f"{sorted(missing)}")
        unexpected = set(results) - set(open_ids)
        need(not unexpected, f"messages.{n}: unexpected `tool_use_id` found in `tool_result` blocks: {sorted(unexpected)}")
        need(len(set(results)) == len(results), f"messages.{n}: each tool_use must have a single result")
        need(kinds[:len(results)] == ["tool_result"] * len(results), f"messages.{n}: tool_result blocks must come first")
        open_ids = [block["id"] for block in blocks if block["type"] == "tool_use"]
        need(len(set(open_ids)) == len(open_ids) and not seen & set(open_ids), "messages: `tool_use` ids must be unique")
        seen |= set(open_ids)
        need(role != "assistant" or kinds[-1] not in THINKING_BLOCKS,
             f"messages.{n}: The final block in an assistant message cannot be `thinking`.")
        need(before is None or before["role"] != role, f"messages.{n}: roles must alternate")
    last = messages[-1]
    need(not open_ids, "messages: `tool_use` ids were found without `tool_result` blocks")
    paused = any(block["type"] == "server_tool_use" for block in last["content"])
    if last["role"] == "assistant" and not paused:
        need(row.prefill and body.get("thinking", {}).get("type") not in ("enabled", "adaptive"),
             "This model does not support assistant message prefill. The conversation must end with a user message.")
        text = last["content"][-1].get("text", "")
        need(text == text.rstrip(), "messages: final assistant content cannot end with trailing whitespace")


def check_loops(body: JSON, thought_of: dict[str, list[JSON]]) -> None:
    """The thoughts of an open tool loop: all of them as they were, and with a budget some at its beginning."""
    messages = [message for message in body["messages"] if message["role"] != "system"]
    if len(messages) < 2 or messages[-1]["content"][0]["type"] != "tool_result":
        return
    blocks = messages[-2]["content"]
    if body.get("thinking", {}).get("type") == "enabled":
        need(blocks[0]["type"] in THINKING_BLOCKS, "messages: Expected `thinking` or `redacted_thinking`, but found "
                                            f"`{blocks[0]['type']}`. When `thinking` is enabled, a final `assistant` message "
                                            "must start with a thinking block.")
    first = next(block["id"] for block in blocks if block["type"] == "tool_use")
    if first in thought_of:
        need([block for block in blocks if block["type"] in THINKING_BLOCKS] == thought_of[first],
             "messages: `thinking` or `redacted_thinking` blocks in the latest assistant message cannot be modified.")


def thoughts_of(body: JSON) -> Iterator[tuple[str, JSON, Any]]:
    """Every thought of a request with its place and all that came before it."""
    for n, message in enumerate(body["messages"]):
        for m, block in enumerate(message["content"]):
            if block["type"] in THINKING_BLOCKS:
                yield f"messages.{n}.content.{m}", block, conversation(body, n)


def conversation(body: JSON, messages: int | None = None) -> Any:
    """What a thought is bound to: system, tools and the messages before, without the marks for the cache."""
    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(each) for key, each in value.items() if key != "cache_control"}
        return [bare(each) for each in value] if isinstance(value, list) else value
    return bare([body.get("system"), body.get("tools"), body["messages"][:messages]])


def signed_by_claude(block: JSON, before: Any, body: JSON, row: AnthropicModel) -> JSON:
    signed = {"thinking": block.get("thinking", "")}
    return {**signed, "model": body["model"], "before": before} if row.bound else signed


def check_signature(where: str, block: JSON, before: Any, body: JSON, row: AnthropicModel,
                    memory: Memory) -> None:
    given = block.get("signature") if block["type"] == "thinking" else block.get("data")
    need(given, f"{where}.{block['type']}.signature: Field required")
    good = memory.recorded_here(given) or is_seal(given, signed_by_claude(block, before, body, row))
    if row.bound and "block_binding" in body.get("thinking", {}):
        return                      # it leaves out itself what belongs to another conversation
    need(good or not row.bound, f"{where}: Invalid `signature` in `thinking` block. "
                                "The block is bound to a different conversation")
    need(good, f"{where}: Invalid `signature` in `thinking` block")


# --- Gemini

GEMINI_FIELDS = {"contents", "systemInstruction", "tools", "toolConfig", "generationConfig", "safetySettings", "cachedContent"}
PART_KINDS = {"text", "inlineData", "fileData", "functionCall", "functionResponse", "toolCall", "toolResponse"}
FUNCTION_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_.:-]{0,127}")
DUMMIES = (base64.b64encode(b"skip_thought_signature_validator").decode(),)
NO_KEYWORDS = {"$schema", "discriminator", "examples", "title", "exclusiveMinimum", "exclusiveMaximum", "const"}
LEVELS = {"MINIMAL", "LOW", "MEDIUM", "HIGH"}


def is_old(model: str) -> bool:
    """Before Gemini 3."""
    return bool(re.match(r"gemini-[12]", model))


def gemini_complaint(model: str, body: JSON, headers: dict[str, str], memory: Memory) -> str:
    try:
        need(headers.get("x-goog-api-key") == "upstream-secret", "API key not valid. Please pass a valid API key.")
        extra = sorted(set(body) - GEMINI_FIELDS)
        need(not extra, f'Invalid JSON payload received. Unknown name "{extra[:1]}": Cannot find field.')
        names = check_gemini_tools(model, body)
        check_generation(model, body.get("generationConfig", {}), bool(names))
        if "systemInstruction" in body:
            check_parts("system_instruction", body["systemInstruction"]["parts"], {"text"})
        check_contents(body["contents"])
        check_gemini_signatures(model, body["contents"], memory)
    except Refused as refused:
        return str(refused)
    return ""


def check_gemini_tools(model: str, body: JSON) -> list[str]:
    functions = [each for tool in body.get("tools", []) for each in tool.get("functionDeclarations", [])]
    names = [function["name"] for function in functions]
    need(all(tool for tool in body.get("tools", [])), "tools[0]: must have one initialized field")
    need(len(set(names)) == len(names), "Duplicate function declaration found")
    for function in functions:
        need(FUNCTION_NAME.fullmatch(function["name"]),
             f"tools[0].function_declarations[0].name: Invalid function name {function['name']!r}")
        need(set(function) <= {"name", "description", "parametersJsonSchema"}, "Unknown name in function_declarations")
        for schema in schemas_in(function["parametersJsonSchema"]):
            refused = NO_KEYWORDS & set(schema)
            need(not refused, f'Invalid JSON payload received. Unknown name "{sorted(refused)[:1]}" at \'tools[0]\'')
            need("$ref" not in schema or all(key.startswith("$") for key in schema), "no other properties beside $ref")
    searching = any("googleSearch" in tool for tool in body.get("tools", []))
    need(not (searching and names and is_old(model)), "Tool use with function calling is unsupported")
    mode = body.get("toolConfig", {}).get("functionCallingConfig", {})
    need(not mode or names, "Function calling config is set without function_declarations.")
    allowed = mode.get("allowedFunctionNames", [])
    need(set(allowed) <= set(names), "allowed_function_names: not declared")
    need(not allowed or mode.get("mode") in ("ANY", "VALIDATED"),
         "allowed_function_names should be set only when the function calling mode is ANY or VALIDATED.")
    return names


def check_generation(model: str, config: JSON, functions: bool) -> None:
    thinking = config.get("thinkingConfig", {})
    need(not {"thinkingBudget", "thinkingLevel"} <= set(thinking), "You can only set one of thinking budget and thinking level.")
    need("thinkingLevel" not in thinking or not is_old(model), "Thinking level is not supported for this model.")
    need(thinking.get("thinkingLevel", "LOW") in LEVELS, "Invalid value at 'thinking_level'")
    budget = thinking.get("thinkingBudget", 0)
    need(isinstance(budget, int) and -1 <= budget <= 32768, "thinking_budget: out of range")
    need(not (thinking.get("includeThoughts") and thinking.get("thinkingBudget") == 0), "include_thoughts needs thinking")
    need(0 <= config.get("temperature", 1) <= 2 and 0 <= config.get("topP", 1) <= 1, "temperature or top_p: out of range")
    need(config.get("maxOutputTokens", 1) >= 1, "max_output_tokens must be positive.")
    need(not ("responseMimeType" in config and functions and is_old(model)),
         "Function calling with a response mime type: 'application/json' is unsupported")
    need("responseJsonSchema" not in config or config.get("responseMimeType") == "application/json",
         "response_json_schema needs response_mime_type")
    for schema in schemas_in(config.get("responseJsonSchema")):
        need(not NO_KEYWORDS & set(schema), f"Unknown name {NO_KEYWORDS & set(schema)} at 'generation_config.response'")


def check_parts(where: str, parts: Any, allowed: set[str]) -> None:
    need(parts, f"{where}.parts must not be empty.")
    for n, part in enumerate(parts):
        kinds, at = PART_KINDS & set(part), f"{where}.parts[{n}]"
        need(len(kinds) == 1, f"{at}.data: required oneof field 'data' must have one initialized field")
        need(kinds <= allowed, f"{at}: {kinds} is not allowed here")
        need(set(part) <= {*kinds, "thoughtSignature", "thought"}, f"Unknown name at '{at}'")
        need(part.get("text") != "" or part.get("thoughtSignature"), f"{at}: must not be empty")
        if "inlineData" in part:
            need_base64(part["inlineData"]["data"], at)
            need(set(part["inlineData"]) == {"mimeType", "data"}, f"{at}.inline_data: mime_type is required")
        call, result = part.get("functionCall"), part.get("functionResponse")
        if call is not None:
            need(FUNCTION_NAME.fullmatch(call["name"]) and isinstance(call["args"], dict), f"{at}.function_call: invalid")
            need(set(call) <= {"name", "args", "id"}, f"Unknown name at '{at}.function_call'")
        if result is not None:
            need(FUNCTION_NAME.fullmatch(result.get("name", "")), f"{at}.function_response.name: Name cannot be empty.")
            need(isinstance(result["response"], dict), f"{at}.function_response.response: must be a Struct")
            need(set(result) <= {"name", "response", "id", "parts"}, f"Unknown name at '{at}.function_response'")
        if "thoughtSignature" in part:
            need_base64(part["thoughtSignature"], f"Base64 decoding failed at '{at}.thought_signature'")


def check_contents(contents: list[JSON]) -> None:
    need(contents, "contents is not specified")
    need(contents[0]["role"] == "user", "Please ensure that multiturn requests begin with a user role.")
    need(contents[-1]["role"] == "user", "Please ensure that multiturn requests end with a user role or a function response.")
    before: JSON = {"role": "", "parts": []}
    for n, content in enumerate(contents):
        allowed = PART_KINDS - {"functionResponse" if content["role"] == "model" else "functionCall"}
        need(content["role"] in ("user", "model"), "Please use a valid role: user, model.")
        need(content["role"] != before["role"], "Please ensure that roles alternate.")
        check_parts(f"contents[{n}]", content["parts"], allowed)
        calls = [part["functionCall"] for part in before["parts"] if "functionCall" in part]
        results = [part["functionResponse"] for part in content["parts"] if "functionResponse" in part]
        need(len(calls) == len(results), "Please ensure that the number of function response parts is equal to the number "
                                         "of function call parts of the function call turn.")
        for call, result in zip(calls, results, strict=True):
            need((call["name"], call.get("id")) == (result["name"], result.get("id")),
                 "Please ensure that function response names and ids match the function call turn's.")
        before = content


def check_gemini_signatures(model: str, contents: list[JSON], memory: Memory) -> None:
    """A signature must stand on the part that it signs; in the current turn each step's first call needs one."""
    texts = [n for n, content in enumerate(contents) if content["role"] == "user"
             and any("text" in part for part in content["parts"])]
    for n, content in enumerate(contents):
        calls = [part for part in content["parts"] if "functionCall" in part]
        for part in content["parts"]:
            given = part.get("thoughtSignature")
            issued = memory.signed_calls.get(json.dumps(part.get("functionCall"), sort_keys=True))
            need(issued is None or given == issued, "the signature that was given with this call is not there")
            good = given in (None, *DUMMIES) or memory.recorded_here(given) or is_seal(given, signed_by_gemini(part))
            need(good, "Corrupted thought signature.")
        if calls and not is_old(model) and n > (texts or [-1])[-1]:
            need("thoughtSignature" in calls[0], "Function call is missing a thought_signature in functionCall parts. "
                                                 "This is required for tools to work correctly")


def signed_by_gemini(part: JSON) -> JSON:
    return {key: value for key, value in part.items() if key != "thoughtSignature"}


def signatures_in(body: JSON) -> list[str]:
    """Every signature of a request, in order, on either wire."""
    found = []
    for block in itertools.chain(*(message["content"] for message in body.get("messages", ()))):
        found += [block["signature"]] if block["type"] == "thinking" else []
        found += [block["data"]] if block["type"] == "redacted_thinking" else []
    for part in itertools.chain(*(content["parts"] for content in body.get("contents", ()))):
        found += [part["thoughtSignature"]] if "thoughtSignature" in part else []
    return found
