"""A strict reader of Responses streams, for tests: every rule of one stream in one place.

It knows the wire (RESPONSES.md section 7) and nothing of the program, so that both cannot be wrong together.
"""
import json

TERMINAL = ("response.completed", "response.incomplete", "response.failed")
ARGUMENTS = {"response.function_call_arguments": ("arguments", "arguments"),
             "response.custom_tool_call_input": ("input", "input")}
TEXTS = {"response.output_text": ("content_index", "text"), "response.refusal": ("content_index", "refusal"),
         "response.reasoning_text": ("content_index", "text"),
         "response.reasoning_summary_text": ("summary_index", "text")}
PARTS = {"response.content_part": "content_index", "response.reasoning_summary_part": "summary_index"}
USAGE = {"input_tokens": int, "output_tokens": int, "total_tokens": int,
         "input_tokens_details": {"cached_tokens": int, "cache_write_tokens": int},
         "output_tokens_details": {"reasoning_tokens": int}}


def frames(raw):
    """The (event, data) pairs of a stream of ours: two lines a frame, an empty one after it, nothing else."""
    assert raw.endswith(b"\n\n"), raw[-80:]
    pairs = []
    for block in raw.decode("utf-8").split("\n\n")[:-1]:
        lines = block.split("\n")
        name = lines.pop(0).removeprefix("event: ") if lines[0].startswith("event: ") else ""
        assert len(lines) == 1 and lines[0].startswith("data: "), block
        pairs.append((name, lines[0].removeprefix("data: ")))
    return pairs


def events(raw):
    """All events, without the final [DONE]."""
    return [json.loads(data) for _, data in frames(raw) if data != "[DONE]"]


def short(event):
    """One event as a line, as short as it can be without hiding a difference."""
    kind, rest = event["type"].removeprefix("response."), {k: v for k, v in event.items() if k not in ("type", "sequence_number")}
    if "response" in rest:
        response = rest["response"]
        return f"{kind} {response['status']} [{' '.join(item['type'] for item in response['output'])}]"
    if "item" in rest:
        item = rest["item"]
        return f"{kind} {rest['output_index']} " + json.dumps({k: v for k, v in item.items() if k != "id"}, sort_keys=True)
    rest = {k: v for k, v in rest.items() if k not in ("item_id", "logprobs")}
    return " ".join([kind, *(value if isinstance(value, str) else json.dumps(value) for value in rest.values())])


def lines(raw):
    return [short(event) for event in events(raw)]


class Items:
    """What the events of a stream say about its items, and whether they agree with each other."""

    def __init__(self):
        self.added, self.done = {}, {}
        self.texts, self.open_parts, self.done_parts, self.arguments = {}, set(), {}, {}

    def take(self, event):
        kind = event["type"]
        family, _, verb = kind.rpartition(".")
        if kind == "response.output_item.added":
            self.add(event)
        elif kind == "response.output_item.done":
            self.finish(event)
        elif "output_index" in event:
            index = event["output_index"]
            assert index in self.added and index not in self.done, f"{kind} outside of its item"
            assert event.get("item_id", self.added[index]["id"]) == self.added[index]["id"], f"{kind}: the item has another id"
            if family in PARTS:
                self.part(index, event[PARTS[family]], family, verb, event["part"])
            elif family in TEXTS:
                self.text(index, *TEXTS[family], family, verb, event)
            elif family in ARGUMENTS:
                self.argument(index, ARGUMENTS[family][0], verb, event)

    def add(self, event):
        index, item = event["output_index"], event["item"]
        assert index == len(self.added), "indices are not one after the other"
        assert item["id"] and item["id"] not in [other["id"] for other in self.added.values()], "an id appears twice"
        self.added[index] = item

    def finish(self, event):
        index, item = event["output_index"], event["item"]
        assert index in self.added and index not in self.done, "done without added, or twice"
        assert not [place for place in self.open_parts if place[0] == index], "done with an open part"
        for field in ("id", "type", "call_id", "name", "namespace"):
            assert item.get(field) == self.added[index].get(field), f"{field} changed between added and done"
        for field in ("arguments", "input"):
            if index in self.arguments and isinstance(item.get(field), str):
                assert item[field] == self.arguments[index][1], f"{field} of the item are not those of its events"
        parts = {(index, at, place): part for at in ("content_index", "summary_index")
                 for place, part in enumerate(item.get("content" if at == "content_index" else "summary") or [])}
        if item["type"] in ("message", "reasoning"):
            assert parts == {place: part for place, part in self.done_parts.items() if place[0] == index}, "other parts than shown"
        self.done[index] = item

    def part(self, index, place, family, verb, part):
        key = (index, PARTS[family], place)
        if verb == "added":
            assert key not in self.open_parts and key not in self.done_parts, "a part was opened twice"
            assert place == sum(other[:2] == key[:2] for other in self.done_parts), "part indices have a hole"
            self.open_parts.add(key)
        else:
            assert key in self.open_parts, "a part was closed that is not open"
            said = part.get("text", part.get("refusal"))
            assert said == self.texts.get(key, ("", ""))[1], "the part is not its text"
            self.open_parts.remove(key)
            self.done_parts[key] = part

    def text(self, index, at, field, family, verb, event):
        if verb not in ("delta", "done"):
            return
        key = (index, at, event[at])
        assert key in self.open_parts, f"{family}.{verb} outside of its part"
        deltas, done = self.texts.get(key, ("", None))
        assert done is None, "text after its done"
        if verb == "delta":
            assert event["delta"], "an empty delta"
            self.texts[key] = (deltas + event["delta"], None)
        else:
            assert event[field] == deltas, f"the deltas {deltas!r} are not the text {event[field]!r}"
            self.texts[key] = (deltas, deltas)

    def argument(self, index, field, verb, event):
        deltas, done = self.arguments.get(index, ("", None))
        assert done is None, "arguments after their done"
        if verb == "delta":
            self.arguments[index] = (deltas + event["delta"], None)
        else:
            assert event[field] == deltas, f"the deltas {deltas!r} are not the arguments {event[field]!r}"
            assert field != "arguments" or event["name"] == self.added[index]["name"]
            self.arguments[index] = (deltas, deltas)


class RelayedItems(Items):
    def take(self, event):
        if event["type"] == "response.output_item.added":
            self.added[event["output_index"]] = event["item"]
        elif event["type"] == "response.output_item.done":
            self.done[event["output_index"]] = event["item"]


def check_usage(usage, shape=USAGE):
    for name, kind in shape.items():
        if isinstance(kind, dict):
            check_usage(usage[name], kind)
        else:
            assert type(usage[name]) is kind and usage[name] >= 0, (name, usage)


def check(raw, codex=False, relayed=False):
    """All rules of one whole stream. Returns its terminal event's response. The inside of a `relayed` item is the
    upstream's affair: servers leave out deltas and names, and change ids."""
    try:
        return check_events(raw, codex, relayed)
    except AssertionError as error:
        raise AssertionError(f"{error}\n" + "\n".join(lines(raw))) from None


def check_events(raw, codex, relayed):
    pairs = frames(raw)
    assert pairs[-1] == ("", "[DONE]")
    told = [json.loads(data) for _, data in pairs[:-1]]
    assert relayed or [event["type"] for event in told] == [name for name, _ in pairs[:-1]], "names"
    if not relayed or all("sequence_number" in event for event in told):        # recordings of 2025 have none
        assert [event["sequence_number"] for event in told] == list(range(len(told))), "sequence numbers"
    kinds = [event["type"] for event in told]
    assert kinds[0] == "response.created" and "response.in_progress" in kinds[1:3], "the beginning"
    assert [kind in TERMINAL for kind in kinds] == [False] * (len(kinds) - 1) + [True], "one terminal event, and last"
    assert ("error" in kinds) == (kinds[-1] == "response.failed" and not codex)
    responses = [event["response"] for event in told if "response" in event]
    assert len({(r["id"], r["model"], r["created_at"]) for r in responses}) == 1, "id, model or time changed"
    assert all(r["output"] == [] and r.get("usage") is None for r in responses[:-1])
    items, final = RelayedItems() if relayed else Items(), responses[-1]
    for event in told:
        items.take(event)
    assert final["output"] == [items.done[index] for index in sorted(items.done)], "other items than shown"
    left = [item for index, item in items.added.items() if index not in items.done]
    assert not left or final["status"] == "failed" or codex and all("call_id" in item for item in left), f"never done: {left}"
    check_usage(final["usage"])
    expected = {"response.completed": ("completed", "incomplete") if codex else ("completed",),
                "response.incomplete": ("incomplete",), "response.failed": ("failed",)}[kinds[-1]]
    assert final["status"] in expected and not (codex and kinds[-1] == "response.incomplete")
    assert bool(final.get("error")) == (final["status"] == "failed")
    assert bool(final.get("incomplete_details")) == (final["status"] == "incomplete")
    if final["status"] == "completed":
        assert all(item.get("status", "completed") == "completed" for item in final["output"]), "half an item in a whole answer"
    if codex or final["status"] == "failed":
        assert not any(item.get("status") == "incomplete" and "call_id" in item for item in final["output"]), "half a call"
    return final
