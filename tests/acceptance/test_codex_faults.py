"""Real Codex while its provider breaks: what the user sees, how often Codex asks, what becomes of the files.

    POMEX_FAULT_TURNS=100 POMEX_FAULT_SEED=7 pytest -s tests/acceptance/test_codex_faults.py -k random

Providers: WIRE breaks as a test says, spare-WIRE and calm-WIRE never do, at gone-WIRE nobody listens.
"""
from __future__ import annotations

import collections
import itertools
import json
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import conftest
import pytest
from harness import CODEX_VERSIONS, DIRECT, JSON, Codex, Pomex, Turn, free_port, running_pomex
from scripted import RESET, STALL, ResponsesAnswer, Broken, Call, Custom, Script, Seen, Upstream, says
from strict import Memory

pytestmark = pytest.mark.skipif(DIRECT, reason="there is no Pomex in between")
TURNS = int(os.environ.get("POMEX_FAULT_TURNS", "12"))
SEED = int(os.environ.get("POMEX_FAULT_SEED", "5"))

WIRES = {name: lines for name, lines in conftest.WIRES.items() if name != "thinker"}
SPARE = {"native": "messages", "messages": "chat", "chat": "gemini", "gemini": "foreign", "foreign": "native"}
Step = bytes | str
# Of a request, its whole answer and a place in it from 0 to 1: what goes over the socket instead.
ErrorClass = Callable[[Seen, bytes, float], list[Step]]


# --- what breaks ------------------------------------------------------------------------------------

LAST = b"0\r\n\r\n"
HTML = b"<!doctype html><html><head><title>Sign in</title></head><body>Welcome to the hotel</body></html>"
ERRORS = {      # an overload, said inside a stream
    "messages": b'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}\n\n',
    "chat": b'data: {"error": {"message": "Overloaded", "type": "server_error", "code": 529}}\n\n',
    "gemini": b'data: {"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}}\n\n',
    "responses": b'event: error\ndata: {"type": "error", "code": "server_error", "message": "Overloaded", "param": null}\n\n',
}
CALL_BEGINS = {"messages": rb'_block_start".*"tool_use"', "chat": rb'"tool_calls"', "gemini": rb'"functionCall"',
               "responses": rb'output_item.added".*_call"'}
CALL_ENDED = {"messages": rb'"message_delta"', "chat": rb'"finish_reason": "', "gemini": rb'"finishReason"',
              "responses": rb'"response.completed"'}


def wire_api(seen: Seen) -> str:
    ends = {"/messages": "messages", "/completions": "chat", "/responses": "responses"}
    return next((wire for end, wire in ends.items() if seen.path.endswith(end)), "gemini")


def plain(status: int, body: bytes | JSON, kind: str = "application/json") -> ErrorClass:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} Status\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\nconnection: close\r\n\r\n"
    return lambda seen, payload, place: [head.encode() + data]


def stream(*parts: Step) -> list[Step]:
    """Bytes in chunks of their own, between them what is no bytes; LAST ends it."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return [head, *(part if isinstance(part, str) or part == LAST else b"%x\r\n%b\r\n" % (len(part), part)
                    for part in parts if part)]


def frames(payload: bytes) -> list[bytes]:
    return re.findall(rb".+?\n\n", payload, re.S)


def first(pattern: bytes, payload: bytes) -> int:
    """Where the first frame that fits begins."""
    sizes = [0, *itertools.accumulate(map(len, frames(payload)))]
    return next(at for at, frame in zip(sizes, frames(payload)) if re.search(pattern, frame, re.S))


# Before any output: another target can take over, and nobody needs to know.
BEFORE: dict[str, ErrorClass] = {
    "reset": lambda seen, payload, place: [RESET],
    "503": plain(503, {"error": {"message": "Try later", "type": "server_error"}}),
    "529-inside": lambda seen, payload, place: stream(ERRORS[wire_api(seen)], LAST),
    "html": plain(200, HTML, "text/html"),
    "empty": lambda seen, payload, place: stream(LAST),
    "stall": lambda seen, payload, place: [STALL],
    "garbage": lambda seen, payload, place: stream(b"\x00\xff\xfe{{{data: [[[\n\ndata: {oops\n\n", LAST),
}


def cut(payload: bytes, place: float) -> bytes:
    """At a random byte of a random frame: by bytes alone the first frame, with all the tools, would be most of it."""
    parts = frames(payload)
    whole = int(place * len(parts))
    return b"".join(parts[:whole]) + parts[whole][:int((place * len(parts) - whole) * len(parts[whole]))]


def whole_frames(payload: bytes, place: float) -> bytes:
    return b"".join(frames(payload)[:int(place * len(frames(payload)))])


# At any byte.
ANYWHERE: dict[str, ErrorClass] = {
    "cut-reset": lambda seen, payload, place: stream(cut(payload, place), RESET),
    "cut-close": lambda seen, payload, place: stream(cut(payload, place)),
    "cut-stall": lambda seen, payload, place: stream(cut(payload, place), STALL),
    "cut-garbage": lambda seen, payload, place: stream(cut(payload, place) + random.Random(place).randbytes(300), RESET),
    "cut-error": lambda seen, payload, place: stream(whole_frames(payload, place), ERRORS[wire_api(seen)], LAST),
    # A clean end is Responses' own sign that all was said, when every item is done: no fault that anybody could see
    "cut-end": lambda seen, payload, place: stream(cut(payload, place), RESET if wire_api(seen) == "responses" else LAST),
}


def at_call(seen: Seen, payload: bytes, place: float) -> list[Step]:
    """A reset before a call (0), inside it, or behind it (1). Text came before."""
    begin, end = (first(table[wire_api(seen)], payload) for table in (CALL_BEGINS, CALL_ENDED))
    return stream(payload[:begin + int(place * (end - begin))], RESET)


OTHERS: dict[str, ErrorClass] = {
    "at-call": at_call,
    "401": plain(401, {"error": {"message": "Incorrect API key: sk-secret-secret", "code": "invalid_api_key"}}),
    "quota": plain(429, {"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}}),
}
ERROR_CLASSES = {**BEFORE, **ANYWHERE, **OTHERS}


class Break(NamedTuple):
    """How one answer goes wrong."""
    fault: str
    place: float = 0.0

    def __call__(self, seen: Seen, payload: bytes) -> list[Step]:
        return ERROR_CLASSES[self.fault](seen, payload, self.place)


# --- a model ----------------------------------------------------------------------------------------

class Task(NamedTuple):
    """One change of a file. Wherever a history shows the call, there is its mark."""
    mark: str
    call: Call | Custom


Plan = list[list[list[Task]]]           # turns of steps of tasks that may run at once


def append(mark: str, file: str = "log.txt") -> Task:
    return Task(mark, Call("exec_command", {"cmd": f"echo 'line {mark} ✓' >> {file}"}))


def patch(mark: str, *lines: str) -> Task:
    return Task(mark, Custom("apply_patch", "\n".join(("*** Begin Patch", *lines, "*** End Patch\n"))))


class Actor(Script):
    """A model that goes by what it is shown: it calls what the newest turn has planned and the history lacks. So a
    repeated request changes nothing, and each fault that loses or repeats a call shows in the files."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: Plan = []
        self.breaks: dict[str, Iterator[Break | None]] = {}         # by target: of its next answers, None for a whole one
        self.broken: collections.Counter[str] = collections.Counter()
        self.memories: collections.defaultdict[str, Memory] = collections.defaultdict(Memory)

    def act(self, plan: Plan, breaks: dict[str, Iterable[Break | None]]) -> None:
        self.play()
        self.broken.clear()
        self.memories.clear()
        self.plan, self.breaks = plan, {target: iter(faults) for target, faults in breaks.items()}

    def memory_of(self, seen: Seen) -> Memory:
        return self.memories[provider(seen)]

    def next(self, seen: Seen) -> ResponsesAnswer | Broken:
        answer = self.answer(seen)
        broken = next(self.breaks.get(target(seen), iter(())), None)
        if broken is None:
            return answer
        self.broken[f"{provider(seen)} {broken.fault}"] += 1
        return Broken(answer, broken)

    def answer(self, seen: Seen) -> ResponsesAnswer:
        history = seen.text
        turn = max(map(int, re.findall(r"Turn (\d+):", history)))
        for number, step in enumerate(self.plan[turn]):
            if missing := [task.call for task in step if task.mark not in history]:
                return says(intent(turn, number), *missing)
        return says(end(turn))


def provider(seen: Seen) -> str:
    return seen.path.split("/")[1]


def target(seen: Seen) -> str:
    return f"{provider(seen)}:{seen.model}"


def intent(turn: int, step: int) -> str:
    return f"Step {step} of turn {turn} is what I do next. ✓"


def end(turn: int) -> str:
    return f"That was turn {turn}, all of it."


def texts(plan: Plan, turn: int) -> set[str]:
    """All that the model may say in a turn; anything else is spliced."""
    return {end(turn), *(intent(turn, step) for step in range(len(plan[turn])))}


# --- the bench --------------------------------------------------------------------------------------

def model_of(wire: str, version: str) -> str:
    return conftest.model_of(wire, version, f"plain-{version}").partition("/")[2]


def models(version: str) -> dict[str, list[str]]:
    """What Codex may ask for, and its targets. Where a target stays broken it is one that no other test uses."""
    found = {}
    for wire, spare in SPARE.items():
        own, other = f"{wire}:{model_of(wire, version)}", f"spare-{spare}:{model_of(spare, version)}"
        found |= {f"{wire}/pair-{version}": [own, other], f"{wire}/alone-{version}": [own],
                  f"{wire}/calm-{version}": [f"calm-{own}"]}
        for fault in BEFORE:
            found[f"{wire}/{fault}-{version}"] = [f"{wire}:{fault}-{version}", other]
        found[f"{wire}/always-{version}"] = [f"{wire}:always-{version}", other]
        found[f"{wire}/refused-{version}"] = [f"gone-{wire}:refused-{version}", other]
    for name, case in NOBODY_LEFT.items():
        found[f"left/{name}-{version}"] = [f"{each}:{name}-{version}" for each in case.providers]
    return found


def configuration(upstream: Upstream, closed: int) -> str:
    text = f'[server]\nport = {free_port()}\n[database]\nurl = "sqlite:pomex.db"\n'
    for wire, lines in WIRES.items():
        for name in (wire, f"spare-{wire}", f"calm-{wire}", f"gone-{wire}"):
            base_url = f"http://127.0.0.1:{closed}/v1" if name.startswith("gone-") else upstream.base_url(name)
            limits = "first_byte_timeout_s = 0.7\nidle_timeout_s = 0.7\n" if name == wire else ""
            text += f'[providers.{name}]\n{lines}\nbase_url = "{base_url}"\nenv_key = "SCRIPTED_KEY"\n{limits}'
    for version in CODEX_VERSIONS:
        for model, targets in models(version).items():
            text += f'[models."{model}"]\ntargets = {json.dumps(targets)}\n'
    return text


@dataclass
class Bench:
    pomex: Pomex
    actor: Actor
    catalogue: Path

    def codex(self, version: str, place: Path, model: str) -> Codex:
        made = Codex(version, place, self.pomex.codex_block(), self.pomex.key)
        made.model = f"{model}-{version}"
        if version == "0.128.0":
            made.use_catalogue(self.catalogue)
        return made

    def requests(self, model: str = "") -> int:
        """How often Codex asked (for this model): lines of the access log."""
        time.sleep(0.1)
        return sum(bool(re.search(rf" {re.escape(model) or '[a-z]+/[a-z0-9.-]+'} via ", line)) for line in list(self.pomex.log))

    def asked(self) -> collections.Counter[str]:
        """Upstream calls, by target."""
        return collections.Counter(map(target, self.actor.seen))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    actor, place = Actor(), tmp_path_factory.mktemp("faults")
    upstream = Upstream(actor)
    with socket.socket() as closed:             # bound, and never listened on
        closed.bind(("127.0.0.1", 0))
        config = configuration(upstream, closed.getsockname()[1])
        with running_pomex(place / "pomex", config, {"SCRIPTED_KEY": "upstream-secret"}) as pomex:
            bench = Bench(pomex, actor, place / "catalogue.json")
            bench.catalogue.write_bytes(pomex.catalogue())
            yield bench
    upstream.close()


@pytest.fixture
def bench(served: Bench) -> Iterator[Bench]:
    """No request may be one that the provider would refuse."""
    yield served
    complaints = served.actor.refused + served.actor.faults
    served.actor.refused.clear()
    assert complaints == []


def reconnects(turn: Turn) -> int:
    return sum("Reconnecting" in message for message in turn.errors)


def together(codexes: Iterable[Codex], prompt: str) -> list[Turn]:
    """All at once: most of its time Codex waits."""
    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(lambda codex: codex.exec(prompt), codexes))


# --- before output: nothing is seen -----------------------------------------------------------------

@pytest.mark.parametrize("wire", ["messages", "chat", "native"])
def test_a_fault_before_output_is_not_seen(bench: Bench, version: str, wire: str, tmp_path: Path) -> None:
    faults = ["refused", *BEFORE]
    bench.actor.act([[]], {f"{wire}:{fault}-{version}": itertools.repeat(Break(fault)) for fault in faults})
    codexes = [bench.codex(version, tmp_path / fault, f"{wire}/{fault}") for fault in faults]
    for fault, codex, turn in zip(faults, codexes, together(codexes, "Turn 0: say something")):
        assert turn.answer == end(0), fault                             # and no "Reconnecting"
        assert turn.messages == [end(0)], fault
        assert bench.requests(codex.model) == 1, fault
    asked, spare = bench.asked(), SPARE[wire]
    assert asked.pop(f"spare-{spare}:{model_of(spare, version)}") == len(faults)
    assert sorted(asked) == sorted(f"{wire}:{fault}-{version}" for fault in BEFORE)


# --- after output: one reconnect --------------------------------------------------------------------

@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["after-text", "inside-a-call", "after-a-call"])
def test_a_fault_after_output_costs_one_reconnect(bench: Bench, version: str, place: float, tmp_path: Path) -> None:
    plan = [[[append("job-0-0")]]]
    bench.actor.act(plan, {f"{wire}:{model_of(wire, version)}": [Break("at-call", place)] for wire in WIRES})
    codexes = [bench.codex(version, tmp_path / wire, f"{wire}/pair") for wire in WIRES]
    before = [bench.requests(codex.model) for codex in codexes]
    for wire, codex, old, turn in zip(WIRES, codexes, before, together(codexes, "Turn 0: append a line")):
        assert turn.code == 0, (wire, turn)
        assert reconnects(turn) == 1, (wire, turn)
        assert bench.requests(codex.model) - old <= 3, wire
        assert (codex.work / "log.txt").read_text() == "line job-0-0 ✓\n", wire
        assert set(turn.messages) == texts(plan, 0), (wire, turn.messages)
        assert turn.messages[-1] == end(0), wire


def test_a_target_that_breaks_every_answer_is_left_for_the_healthy_one(bench: Bench, version: str, tmp_path: Path) -> None:
    """It is counted out after three in a row, or else Codex would be sent to it until it gives up."""
    bench.actor.act([[[append("job-0-0")]]], {f"{wire}:always-{version}": itertools.repeat(Break("cut-reset", 0.5)) for wire in WIRES})
    codexes = [bench.codex(version, tmp_path / wire, f"{wire}/always") for wire in WIRES]
    for wire, codex, turn in zip(WIRES, codexes, together(codexes, "Turn 0: append a line")):
        assert turn.code == 0, (wire, turn)
        assert reconnects(turn) <= 3, (wire, turn)
        assert (codex.work / "log.txt").read_text() == "line job-0-0 ✓\n", wire
        assert turn.messages[-1] == end(0), wire


# --- no target left: six requests, and the right words ----------------------------------------------

class Nobody(NamedTuple):
    """All targets stay broken. What Codex shows of the first request, and at the end: by then some are left out."""
    providers: list[str]
    how: Break
    requests: int
    first: str
    last: str


CUT_OFF = "stream disconnected before completion: "
NOBODY_LEFT = {
    "dead": Nobody(["gone-chat", "native", "messages"], Break("503"), 6,
                   CUT_OFF + r"gone-chat: connection refused \(127\.0\.0\.1:\d+, 2 tries\); native: 503 overloaded \(2 tries\): Try later; "
                   r"messages: 503 overloaded \(2 tries\): Try later\. No provider left\.",
                   f"^{CUT_OFF}.*(gone-chat: connection refused|native: 503|messages: 503).* No provider left\\.$"),
    "cut": Nobody(["chat"], Break("at-call"), 6, CUT_OFF + "Provider chat .* failed while reading the answer",
                  f"^{CUT_OFF}Provider chat .* failed while reading the answer: connection reset by peer\\.$"),
    "key": Nobody(["messages", "chat"], Break("401"), 6,
                  CUT_OFF + "messages: 401 credentials refused; chat: 401 credentials refused. No provider left.",
                  f"^{CUT_OFF}.*credentials.*$"),
    "quota": Nobody(["native"], Break("quota"), 1, "^Quota exceeded", r"^Quota exceeded\. Check your plan and billing details\.$"),
}


def test_with_no_target_left_codex_asks_six_times_and_says_why(bench: Bench, tmp_path: Path) -> None:
    runs = [(name, version) for name in NOBODY_LEFT for version in CODEX_VERSIONS]
    bench.actor.act([[[append("job-0-0")]]], {f"{provider}:{name}-{version}": itertools.repeat(NOBODY_LEFT[name].how)
                                              for name, version in runs for provider in NOBODY_LEFT[name].providers})
    codexes = [bench.codex(version, tmp_path / f"{name}-{version}", f"left/{name}") for name, version in runs]
    for (name, version), codex, turn in zip(runs, codexes, together(codexes, "Turn 0: append a line")):
        case = NOBODY_LEFT[name]
        assert turn.code == 1, (name, turn)
        assert re.search(case.first, turn.errors[0]), (name, version, turn.errors[0])
        assert re.search(case.last, turn.errors[-1]), (name, version, turn.errors[-1])
        assert "sk-secret" not in turn.stdout + turn.stderr
        assert bench.requests(codex.model) == case.requests, name
        assert sum(seen.model == f"{name}-{version}" for seen in bench.actor.seen) <= 6 * case.requests, name
        assert not (codex.work / "log.txt").exists(), name


# --- at random --------------------------------------------------------------------------------------

class Scene(NamedTuple):
    """A turn at random: which model is asked, and what becomes of its target's answers."""
    model: str
    faults: list[Break | None]

    @property
    def wire(self) -> str:
        return self.model.partition("/")[0]


def random_plan(rng: random.Random, turns: int, at_once: bool) -> Plan:
    """Turns that add files, change lines of older ones and append to logs, by apply_patch and by exec_command."""
    notes: list[str] = []               # the newest line of each note
    plan: Plan = []
    for turn in range(turns):
        tasks = []
        for n in range(rng.randint(1, 3)):
            mark = f"job-{turn}-{n}"
            kind = rng.choice(("append", "add", "update") if notes else ("append", "add"))
            if kind == "append":
                tasks.append(append(mark, f"log-{n}.txt"))
            elif kind == "add":
                tasks.append(patch(mark, f"*** Add File: note-{len(notes)}.txt", "+first", f"+\"{mark}\" \\ ✓", "+last"))
                notes.append(f"\"{mark}\" \\ ✓")
            else:
                which = rng.randrange(len(notes))
                tasks.append(patch(mark, f"*** Update File: note-{which}.txt", "@@", " first", f"-{notes[which]}", f"+again {mark}"))
                notes[which] = f"again {mark}"
        together = at_once and len({file_of(task) for task in tasks}) == len(tasks) and rng.random() < 0.5
        plan.append([tasks] if together else [[task] for task in tasks])
    return plan


def file_of(task: Task) -> str:
    return re.findall(r"[a-z]+-\d+\.txt", str(task.call))[0]


def random_scene(rng: random.Random, steps: int) -> Scene:
    """One fault in most turns, some have more; the first at an answer that the turn is sure to need."""
    faults: list[Break | None] = [None] * rng.randint(0, steps)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        faults.append(Break(rng.choice([*BEFORE, *ANYWHERE, *ANYWHERE]), rng.random()))
    return Scene(f"{rng.choice(list(WIRES))}/{rng.choice(('pair', 'alone'))}", faults)


def files(codex: Codex) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(codex.work.iterdir())}


def test_at_random_the_files_are_those_of_the_run_without_faults(bench: Bench, version: str, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    plan = random_plan(rng, TURNS, at_once=version != "0.128.0")       # which hangs now and then, also without Pomex
    scenes = [random_scene(rng, len(steps)) for steps in plan]
    bench.actor.act(plan, {})
    before, began = bench.requests(), time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        calm = pool.submit(play, bench, version, tmp_path / "calm", [Scene(f"{s.wire}/calm", []) for s in scenes])
        shaken = pool.submit(play, bench, version, tmp_path / "shaken", scenes)
    (expected, calm_turns), (found, turns) = calm.result(), shaken.result()
    print(f"\nCodex {version}, seed {SEED}: {TURNS} turns in {time.monotonic() - began:.0f} s, {len(expected)} files, "
          f"{bench.requests() - before} requests of Codex in both runs, {len(bench.actor.seen)} upstream calls, "
          f"{bench.actor.broken.total()} faults, {sum(map(reconnects, turns))} reconnects\n{dict(bench.actor.broken)}")
    assert found == expected
    assert sum(map(reconnects, calm_turns)) == 0
    for number, turn in enumerate(turns):
        assert set(turn.messages) == texts(plan, number)
        assert reconnects(turn) <= len(scenes[number].faults)


def play(bench: Bench, version: str, place: Path, scenes: list[Scene]) -> tuple[dict[str, str], list[Turn]]:
    """One session of all turns; the files that it leaves."""
    codex, turns = bench.codex(version, place, ""), []
    for number, scene in enumerate(scenes):
        codex.model = f"{scene.model}-{version}"
        if scene.faults:
            bench.actor.breaks = {f"{scene.wire}:{model_of(scene.wire, version)}": iter(scene.faults)}
        turns.append((codex.resume if number else codex.exec)(f"Turn {number}: as planned"))
        assert turns[-1].code == 0, (number, scene, turns[-1])
    return files(codex), turns
