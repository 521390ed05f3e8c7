"""A script's answers in the wires of Anthropic and of Google, and their requests as the items of a history."""
from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator

from strict import ANTHROPIC_MODELS, AnthropicModel, conversation, is_old, seal, signed_by_claude, signed_by_gemini
from vocabulary import JSON, ResponsesAnswer, Call, Custom, Reasoning, Text, pieces

Spell = Callable[[Call | Custom], tuple[str, JSON]]     # a call as (name, arguments) that the request's tools ask for
_ids = itertools.count(1)


# --- Anthropic -------------------------------------------------------------------------------------

def messages_blocks(body: JSON, answer: ResponsesAnswer, spell: Spell) -> list[JSON]:
    """The content of one answer. A reasoning without text is a redacted block."""
    blocks: list[JSON] = []
    for item in answer.items:
        if isinstance(item, Text):
            blocks.append({"type": "text", "text": item.text})
        elif isinstance(item, Reasoning):
            blocks.append(thought(body, item))
        else:
            name, arguments = spell(item)
            blocks.append({"type": "tool_use", "id": f"toolu_{next(_ids):06d}", "name": name, "input": arguments})
    return blocks


def thought(body: JSON, item: Reasoning) -> JSON:
    row = ANTHROPIC_MODELS.get(body["model"], AnthropicModel())
    if not item.text:
        sealed = seal(signed_by_claude({}, conversation(body), body, row), item.encrypted.encode())
        return {"type": "redacted_thinking", "data": sealed}
    omitted = row.omits and body.get("thinking", {}).get("display") != "summarized"
    block = {"type": "thinking", "thinking": "" if omitted else item.text}
    return {**block, "signature": seal(signed_by_claude(block, conversation(body), body, row))}


def messages_head(body: JSON, answer: ResponsesAnswer) -> JSON:
    """A message as its stream begins it."""
    usage = {"input_tokens": answer.input_tokens - answer.cached_tokens, "cache_creation_input_tokens": 0,
             "cache_read_input_tokens": answer.cached_tokens, "output_tokens": 1}
    return {"id": f"msg_{next(_ids):06d}", "type": "message", "role": "assistant", "model": body["model"], "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": usage}


def stop_reason(answer: ResponsesAnswer, blocks: list[JSON]) -> str:
    called = any(block["type"] == "tool_use" for block in blocks)
    return "max_tokens" if answer.end == "length" else "tool_use" if called else "end_turn"


def messages_whole(body: JSON, answer: ResponsesAnswer, blocks: list[JSON]) -> JSON:
    """An answer that is not streamed."""
    head = messages_head(body, answer)
    return {**head, "content": blocks, "stop_reason": stop_reason(answer, blocks),
            "usage": {**head["usage"], "output_tokens": answer.output_tokens}}


def messages_events(body: JSON, answer: ResponsesAnswer, blocks: list[JSON]) -> list[JSON]:
    message = messages_head(body, answer)
    usage = message["usage"]
    events: list[JSON] = [{"type": "message_start", "message": message}]
    for index, block in enumerate(blocks):
        cut = answer.end == "length" and index == len(blocks) - 1
        events += [{**event, "index": index} for event in block_events(block, cut)]
        if index == 0:
            events.insert(-1, {"type": "ping"})
    events.append({"type": "message_delta", "delta": {"stop_reason": stop_reason(answer, blocks), "stop_sequence": None},
                   "usage": {**usage, "output_tokens": answer.output_tokens}})
    if answer.end == "cut":
        del events[1 + len(events) // 2:]
    return events if answer.end in ("cut", "drop") else [*events, {"type": "message_stop"}]


def block_events(block: JSON, cut: bool) -> Iterator[JSON]:
    kind, deltas = block["type"], []
    empty = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}, "tool_use": {"input": {}}}.get(kind, {})
    yield {"type": "content_block_start", "content_block": {**block, **empty}}
    if kind == "text":
        deltas = [{"type": "text_delta", "text": piece} for piece in pieces(block["text"])]
    elif kind == "thinking":
        deltas = [{"type": "thinking_delta", "thinking": piece} for piece in pieces(block["thinking"])]
        deltas.append({"type": "signature_delta", "signature": block["signature"]})
    elif kind == "tool_use":
        text = json.dumps(block["input"]) if block["input"] else ""
        text = text[:len(text) // 2] if cut else text
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in ["", *pieces(text)]]
    yield from ({"type": "content_block_delta", "delta": delta} for delta in deltas)
    yield {"type": "content_block_stop"}


def messages_items(body: JSON) -> list[JSON]:
    """The history as Responses items."""
    items: list[JSON] = [{"role": "system", "content": [{"type": "input_text", "text": block["text"]}]}
                         for block in body.get("system", [])]
    for message in body["messages"]:
        for block in message["content"]:
            items.append(messages_item(message["role"], block))
    return items


def messages_item(role: str, block: JSON) -> JSON:
    kind = block["type"]
    if kind == "tool_use":
        return {"type": "function_call", "call_id": block["id"], "name": block["name"], "arguments": json.dumps(block["input"])}
    if kind == "tool_result":
        content = block.get("content", "")
        return {"type": "function_call_output", "call_id": block["tool_use_id"], "output": content if isinstance(content, str)
                else [messages_part(part) for part in content]}
    if kind in ("thinking", "redacted_thinking"):
        return {"type": "reasoning", "text": block.get("thinking", ""),
                "encrypted_content": block.get("signature") or block.get("data")}
    return {"role": role, "content": [messages_part(block)]}


def messages_part(block: JSON) -> JSON:
    if block["type"] == "image":
        return {"type": "input_image", "image_url": f"data:{block['source']['media_type']};base64,{block['source']['data']}"}
    return {"type": "input_text", "text": block.get("text", "")}


# --- Google ----------------------------------------------------------------------------------------

def gemini_parts(model: str, body: JSON, answer: ResponsesAnswer, spell: Spell) -> list[JSON]:
    """The parts of one answer: the first call is signed, or else the text at the end."""
    parts: list[JSON] = []
    shown = body.get("generationConfig", {}).get("thinkingConfig", {}).get("includeThoughts")
    for item in answer.items:
        if isinstance(item, Text):
            parts.append({"text": item.text})
        elif isinstance(item, Reasoning):
            parts += [{"text": item.text, "thought": True}] if shown and item.text else []
        else:
            name, arguments = spell(item)
            own = {} if is_old(model) else {"id": f"{next(_ids):08x}"}
            parts.append({"functionCall": {"name": name, "args": arguments, **own}})
    signed = next((part for part in parts if "functionCall" in part), parts[-1] if parts else {})
    if signed and not signed.get("thought") and not (is_old(model) and "text" in signed):
        signed["thoughtSignature"] = seal(signed_by_gemini(signed))
    return parts


def gemini_answers(model: str, answer: ResponsesAnswer, parts: list[JSON], stream: bool) -> list[JSON]:
    """The events of a stream, or the one whole answer. In a stream a text's signature comes on an empty part."""
    sent: list[JSON] = []
    last: JSON = {"text": ""}
    for part in parts:
        if "functionCall" in part:
            sent.append(part)
            continue
        bare = {key: value for key, value in part.items() if key != "thoughtSignature"}
        sent += [{**bare, "text": piece} for piece in pieces(part["text"])]
        if "thoughtSignature" in part:
            last = {"text": "", "thoughtSignature": seal({"text": ""})}
    usage = {"promptTokenCount": answer.input_tokens, "candidatesTokenCount": answer.output_tokens,
             "totalTokenCount": answer.total_tokens, "cachedContentTokenCount": answer.cached_tokens}
    head = {"usageMetadata": {name: count for name, count in usage.items() if count}, "modelVersion": model,
            "responseId": f"r{next(_ids):06d}"}

    def event(content: list[JSON], **more: str) -> JSON:
        return {"candidates": [{"content": {"parts": content, "role": "model"}, "index": 0, **more}], **head}
    reason = "MAX_TOKENS" if answer.end == "length" else "STOP"
    if not stream:
        return [event(parts, finishReason=reason)]
    events = [*(event([part]) for part in sent), event([last], finishReason=reason)]
    return events[:(1 + len(events)) // 2] if answer.end == "cut" else events


def gemini_items(body: JSON) -> list[JSON]:
    """The history as Responses items."""
    system = body.get("systemInstruction", {}).get("parts", [])
    items: list[JSON] = [{"role": "system", "content": [{"type": "input_text", "text": part["text"]}]} for part in system]
    for content in body["contents"]:
        for part in content["parts"]:
            items += gemini_item(content["role"], part)
    return items


def gemini_item(role: str, part: JSON) -> list[JSON]:
    signed = [{"type": "reasoning", "text": "", "encrypted_content": part["thoughtSignature"]}] \
        if "thoughtSignature" in part else []
    if "functionCall" in part:
        call = part["functionCall"]
        return [*signed, {"type": "function_call", "name": call["name"], "arguments": json.dumps(call["args"])}]
    if "functionResponse" in part:
        given = part["functionResponse"]
        text = [{"type": "input_text", "text": str(value)} for value in given["response"].values()]
        return [{"type": "function_call_output", "output": [*text, *map(gemini_part, given.get("parts", []))]}]
    return [{"role": "assistant" if role == "model" else role, "content": [gemini_part(part)]}, *signed]


def gemini_part(part: JSON) -> JSON:
    if "inlineData" in part:
        return {"type": "input_image", "image_url": "data:{mimeType};base64,{data}".format(**part["inlineData"])}
    return {"type": "input_text", "text": part.get("text", "")}


def gemini_model(path: str) -> str:
    found = re.search(r"/models/([^/:]+):(streamGenerateContent\?alt=sse|generateContent)$", path)
    return found[1] if found else ""
