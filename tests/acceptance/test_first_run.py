"""The first run as its user meets it: from the clone to Codex's first answer, every mistake of FIRST-RUN.md and of the guide
made for real, what doctor says of it, and its cure typed as it is printed."""
from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pomex as program
import pytest
from harness import (CODEX_VERSIONS, DIRECT, JSON, NEWEST_CODEX, POMEX, ROOT, Codex, Pomex, clean_environment, codex_binary,
                     found_in_log, free_port, keep_lines, running_pomex)
from scripted import ResponsesAnswer, Refusal, Upstream, says

pytestmark = pytest.mark.skipif(DIRECT, reason="there is no Pomex in between")


# --- a shell, as its user has one -------------------------------------------------------------------

@dataclass
class Shell:
    """A home with a checkout in it, and codex and python in PATH."""
    home: Path
    environment: dict[str, str]

    def type(self, *lines: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", "\n".join(lines)], env={**self.environment, **more}, cwd=self.home / "pomex",
                              text=True, capture_output=True, timeout=120, stdin=subprocess.DEVNULL, check=False)

    def doctor(self, *before: str, **more: str) -> Doctor:
        done = self.type(*before, "python pomex.py doctor", **more)
        return Doctor(done.returncode, done.stdout, done.stderr)

    @property
    def config(self) -> Path:
        return self.home / ".codex" / "config.toml"

    def configure(self, text: str | None) -> None:
        """Nothing but this in Codex's folder; None: not even that."""
        shutil.rmtree(self.config.parent)
        self.config.parent.mkdir()
        if text is not None:
            self.config.write_text(text)


@dataclass
class Doctor:
    code: int
    out: str
    err: str

    def row(self, what: str) -> str:
        found = [line for line in self.out.splitlines() if re.match(rf" *{re.escape(what)} ", line)]
        assert len(found) == 1, self
        return found[0]

    @property
    def wrong(self) -> list[str]:
        """What is a problem, by the second column."""
        found = re.findall(r"^ *(\S+(?: \S+)*?)  +(?:wrong|missing) ", self.out, re.M)
        counted = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        assert self.out.endswith(f"\n{counted}\n") and self.code == bool(found), self
        return found

    def fix(self, what: str) -> str:
        return self.row(what).partition("   fix: ")[2]


def shell(home: Path, **more: str) -> Shell:
    for folder in ("bin", "pomex", ".codex"):
        (home / folder).mkdir(parents=True)
    (home / "pomex" / "pomex.py").symlink_to(POMEX)
    for name in ("python", "python3"):
        (home / "bin" / name).symlink_to(sys.executable)
    (home / "bin" / "codex").symlink_to(codex_binary(NEWEST_CODEX))
    environment = clean_environment(home, **more)
    return Shell(home, {**environment, "PATH": f"{home / 'bin'}:{environment['PATH']}"})


def without(line: str) -> Callable[[str], str]:
    return lambda text: "".join(each for each in text.splitlines(keepends=True) if not each.startswith(line))


def swap(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert re.search(old, text), text
        return re.sub(old, new, text)
    return change


# --- doctor: planted faults, and their cures as they are printed -------------------------------------

@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, Pomex]]:
    """A gateway, and a shell beside it that uses the same database."""
    home = tmp_path_factory.mktemp("doctor")
    with running_pomex(home / "gateway", f"[server]\nport = {free_port()}\n") as gateway:
        made = shell(home, POMEX_CONFIG=str(home / "gateway" / "pomex.toml"), POMEX_API_KEY=gateway.key)
        made.configure(gateway.codex_block())
        yield made, gateway


@dataclass
class ErrorClass:
    what: str                               # the row that names it
    says: str                               # part of it
    change: Callable[[str], str | None] = lambda text: text         # of config.toml
    key: str | None = None                  # in the variable; "" is not set
    typed: bool = True                      # the cure is a command that can be typed here
    wrong: bool = True                      # counted as a problem


ERROR_CLASSES = {
    "no file": ErrorClass("config.toml", "there is no ~/.codex/config.toml: Codex asks OpenAI itself", lambda text: None),
    "no model_provider": ErrorClass("config.toml", "no model_provider, so Codex asks OpenAI", without("model_provider =")),
    "another table": ErrorClass("config.toml", 'model_provider is "pomex", but there is no [model_providers.pomex]',
                           swap(r"providers\.pomex\]", "providers.pomx]")),
    "no wire_api": ErrorClass("wire_api", 'not set, which means "responses"', without("wire_api"), wrong=False),
    "chat": ErrorClass("wire_api", '"chat" must be "responses"', swap('"responses"', '"chat"')),
    "no /v1": ErrorClass("base_url", '" lacks /v1', swap(r'(base_url = ".*)/v1"', r'\1"')),
    "another port": ErrorClass("base_url", '" is not http://127.0.0.1:', swap(r'(base_url = ".*):\d+/v1"', r'\1:1/v1"')),
    "https": ErrorClass("base_url", '" is not http://127.0.0.1:', swap('base_url = "http:', 'base_url = "https:')),
    "websockets": ErrorClass("websockets", "supports_websockets = true", lambda text: f"{text}supports_websockets = true\n",
                        typed=False),
    "no env_key": ErrorClass("env_key", "must be the name of a variable", without("env_key")),
    "the key as env_key": ErrorClass("env_key", "must be the name of a variable", swap('"POMEX_API_KEY"', '"sk-rh-0123456789abcdef"')),
    "a dollar in env_key": ErrorClass("env_key", "must be the name of a variable", swap('"POMEX_API_KEY"', '"$POMEX_API_KEY"')),
    "another variable": ErrorClass("env_key", "OTHER_KEY is not set in this shell", swap('"POMEX_API_KEY"', '"OTHER_KEY"')),
    "not exported": ErrorClass("env_key", "POMEX_API_KEY is not set in this shell", key=""),
    "the placeholder": ErrorClass("env_key", "That is the guide's placeholder (sk-rh-xxxxxxxxxxxx).", key="sk-rh-xxxxxxxxxxxx"),
    "single quotes": ErrorClass("env_key", 'The key arrived as the text "$POMEX_API_KEY"; the shell did not', key="$POMEX_API_KEY"),
    "another provider's": ErrorClass("env_key", "This looks like another provider's key.", key="sk-proj-0123456789"),
    "mistyped": ErrorClass("env_key", "This key is mistyped or cut (sk-rh-7Qm2…Ja1U)", key="sk-rh-7Qm2vKx9Tn4bWc8RzLp5HdYf3Gs6Ja1U"),
    "unknown": ErrorClass("env_key", "This key is not known here (sk-rh-", key="ELSEWHERE"),
    "revoked": ErrorClass("env_key", "Key gone was revoked on 20", key="REVOKED"),
    "unknown model": ErrorClass("model", 'Model "demo/ecko" not found. Did you mean demo/echo?', swap("demo/echo", "demo/ecko")),
    "no model": ErrorClass("model", "config.toml names none", without("model =")),
    "a provider without key": ErrorClass("model", "openai is not configured. Set OPENAI_API_KEY", swap("demo/echo", "openai/gpt-5.5")),
    "no TOML": ErrorClass("config.toml", "(at line 3, column ", lambda text: text.replace("\n", "\n\nmodel_provider pomex\n", 1)),
}


@pytest.mark.parametrize("name", ERROR_CLASSES)
def test_doctor_names_a_fault_and_its_cure_works_as_it_is_printed(place: tuple[Shell, Pomex], name: str, tmp_path: Path) -> None:
    made, gateway = place
    fault, block = ERROR_CLASSES[name], gateway.codex_block()
    made.configure(fault.change(block))
    key = gateway.key if fault.key is None else fault.key
    if key == "REVOKED":
        key = gateway.command("keys", "create", "gone").strip()
        gateway.command("keys", "revoke", "gone")
        revoked = time.monotonic()
        while gateway.post({}, key=key).status != 401:
            assert time.monotonic() < revoked + 1, "a revocation in another process holds within a second"
    if key == "ELSEWHERE":
        key = made.type("python pomex.py keys create laptop", POMEX_CONFIG="").stdout.strip()
    editor = tmp_path / "editor"            # goes to the line, as its user would
    editor.write_text('#!/bin/sh\nsed -i "${1#+}d" "$2"\n')
    editor.chmod(0o755)
    found = made.doctor(POMEX_API_KEY=key, EDITOR=str(editor))
    assert fault.says in found.row(fault.what) and (found.wrong == [fault.what]) is fault.wrong, found
    assert key not in found.out or key.startswith(("$", "sk-rh-xxxx")) or not key
    fix = found.fix(fault.what)
    assert fix, found
    if fault.typed:
        cured = made.doctor(fix, POMEX_API_KEY=key, EDITOR=str(editor))
        assert cured.wrong == [] and "fix:" not in cured.out, (fix, cured)


def test_doctor_finds_the_old_name_of_codexs_file(place: tuple[Shell, Pomex]) -> None:
    made, gateway = place
    made.configure(None)
    made.config.with_suffix(".json").write_text("{}")
    found = made.doctor()
    assert "there is no ~/.codex/config.toml, and config.json is not read" in found.row("config.toml")
    assert found.wrong == ["config.toml"]


def test_doctor_finds_that_codex_is_not_installed(place: tuple[Shell, Pomex]) -> None:
    made, gateway = place
    made.configure(gateway.codex_block())
    (made.home / "without").mkdir()
    (made.home / "without" / "python").symlink_to(sys.executable)
    found = made.doctor(PATH=f"{made.home / 'without'}:/usr/bin:/bin")
    assert found.wrong == ["codex"] and found.fix("codex") == "npm install -g @openai/codex"


def test_doctor_finds_that_no_gateway_runs_and_its_cure_starts_one(tmp_path: Path) -> None:
    port = free_port()
    made = shell(tmp_path, POMEX_PORT=str(port))
    made.type("python pomex.py codex --write")
    key = made.type("python pomex.py keys create laptop").stdout.strip()
    found = made.doctor(POMEX_API_KEY=key)
    assert found.wrong == ["gateway"] and f"nothing of Pomex answers at http://127.0.0.1:{port}" in found.row("gateway")
    started = subprocess.Popen(["bash", "-c", f"exec {found.fix('gateway')}"], cwd=tmp_path / "pomex", text=True,
                               env=made.environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert started.stderr is not None
    with contextlib.closing(started.stderr):
        assert any(line.startswith("Listening on") for line in started.stderr)
        assert made.doctor(POMEX_API_KEY=key).wrong == []
        started.terminate()
        started.wait(20)


def test_doctor_goes_to_the_gateway_that_codex_uses(place: tuple[Shell, Pomex]) -> None:
    """serve --port, and no word of it in a configuration."""
    made, gateway = place
    made.configure(gateway.codex_block())
    found = made.doctor(POMEX_PORT=str(free_port()))
    assert found.wrong == [] and gateway.url.removesuffix("/v1") in found.row("gateway")


# --- the troubleshooting table of FIRST-RUN.md, made for real ----------------------------------------

TOKEN = "0123456789abcdef-admin"


@dataclass
class Setup:
    """A gateway with everything that can go wrong, and what its Setup page is told, as it is told."""
    gateway: Pomex
    upstream: Upstream
    keys: dict[str, str]
    news: list[tuple[str, JSON]] = field(default_factory=list)

    def listen(self) -> None:
        self.news.extend(self.feed())

    def feed(self) -> Iterator[tuple[str, JSON]]:
        request = urllib.request.Request(self.gateway.url.replace("/v1", "/admin/api/events"),
                                         headers={"authorization": f"Bearer {TOKEN}"})
        kind = ""
        with contextlib.suppress(OSError, http.client.HTTPException), urllib.request.urlopen(request, timeout=60) as lines:
            for line in lines:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                kind = value if name == "event" else kind
                if name == "data":
                    yield kind, json.loads(value)

    def told(self, seen: int, kind: str) -> JSON:
        """The first of its kind behind the first `seen`: a refusal is written once a second, and the feed looks once a second."""
        ended = time.time()
        while time.time() < ended + 3:
            for of, data in self.news[seen:]:
                if of == kind and data.get("path") != "/v1/models":     # new Codex asks for them first, and is refused there, too
                    return data
            time.sleep(0.02)
        raise AssertionError(self.news[seen:])

    def page(self) -> JSON:
        request = urllib.request.Request(self.gateway.url.replace("/v1", "/admin/api/setup"),
                                         headers={"authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: JSON = json.load(answer)
        return found


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    upstream = Upstream()
    config = f"""[server]
port = {free_port()}
admin_token = "{TOKEN}"
[providers.up]
wire_api = "chat"
base_url = "{upstream.base_url("up")}"
models = ["m"]
[providers.gone]
wire_api = "chat"
base_url = "http://127.0.0.1:{free_port()}/v1"
models = ["m"]
[models."team/coder"]
targets = ["gone:m", "up:m"]
[prices."up/m"]
input = 1000
output = 1
"""
    home = tmp_path_factory.mktemp("setup")
    with running_pomex(home, config) as gateway:
        keys = {"good": gateway.key, "none": "", "placeholder": "sk-rh-xxxxxxxxxxxx", "literal": "$POMEX_API_KEY",
                "theirs": "sk-ant-api03-abcdefghijkl"}
        for name, limits in {"gone": (), "poor": ("--budget", "0.05/month"), "narrow": ("--models", "up/*"),
                             "late": ("--expires", "1d")}.items():
            keys[name] = gateway.command("keys", "create", name, *limits).strip()
        with contextlib.closing(program.Ledger.open(str(home / "pomex.db"))) as ledger:
            asyncio.run(ledger.edit_key("late", expires_s=int(time.time()) - 1))        # a day has passed
        keys["unknown"] = program.new_key()
        gateway.command("keys", "revoke", "gone")
        upstream.script.play(says("Much", input_tokens=120, cached_tokens=0))       # the estimate was less
        assert gateway.post({"model": "up/m", "input": "Hi", "max_output_tokens": 1}, key=keys["poor"]).status == 200
        made = Setup(gateway, upstream, keys)
        threading.Thread(target=made.listen, daemon=True).start()
        time.sleep(1.1)                     # until the feed is open
        yield made
    upstream.close()


@dataclass
class Mistake:
    sentence: str
    code: str
    status: int
    change: Callable[[str], str] = lambda text: text            # of config.toml
    key: str = "good"
    model: str = "demo/echo"
    answers: tuple[Refusal | ResponsesAnswer, ...] = ()
    refused: int = 0                                            # its own status, where Codex is told by a stream

    @property
    def planned(self) -> bool:
        """It has a row in the ledger; to Codex its status is a 200 and the sentence the end of its stream."""
        return self.status == 200 and not self.refused


DOWN = Refusal(529, {"error": {"message": "Overloaded", "type": "overloaded_error"}})
MISTAKES = {
    "no key": Mistake("No API key was sent. Export POMEX_API_KEY (in Codex the variable that env_key names) in this shell, then "
                      "start the client again.", "invalid_api_key", 401, without("env_key")),
    "unknown key": Mistake(r"This key is not known here (sk-rh-....….{4}). List keys with: python pomex.py keys list",
                           "invalid_api_key", 401, key="unknown"),
    "placeholder": Mistake("That is the guide's placeholder (sk-rh-xxxxxxxxxxxx). Put your own key into POMEX_API_KEY.",
                           "invalid_api_key", 401, key="placeholder"),
    "literal": Mistake('The key arrived as the text "$POMEX_API_KEY"; the shell did not expand it. Use double quotes.',
                       "invalid_api_key", 401, key="literal"),
    "their key": Mistake("This looks like another provider's key. Clients need a Pomex key (sk-rh-…); the provider's key belongs "
                         "in Pomex's config.", "invalid_api_key", 401, key="theirs"),
    "revoked": Mistake(r"Key gone was revoked on 20..-..-.. ..:...", "invalid_api_key", 401, key="gone"),
    "expired": Mistake(r"Key late expired on 20..-..-.. ..:...", "invalid_api_key", 401, key="late"),
    "wrong model": Mistake('Model "demo/ecko" not found. Did you mean demo/echo? All names: GET /v1/models or /admin#models', "model_not_found",
                           400, model="demo/ecko"),
    "no provider": Mistake('Model names are provider/model-name, and no provider lists "ecko". Did you mean demo/echo? All names: '
                           "GET /v1/models or /admin#models", "model_not_found", 400, model="ecko"),
    "provider without key": Mistake("anthropic/claude-sonnet-5-5 cannot be used: anthropic is not configured. Set "
                                    "ANTHROPIC_API_KEY and restart, or add it to pomex.toml.", "provider_not_configured", 400,
                                    model="anthropic/claude-sonnet-5-5"),
    "not for this key": Mistake("Key narrow may use up/*.", "model_not_allowed", 400, key="narrow"),
    "no /v1": Mistake(r"base_url must end with /v1: http://127.0.0.1:\d+/v1. The client adds the rest; this request came to "
                      r"/responses.", "wrong_base_url", 404,
                      swap('(base_url = ".*)/v1"', r'\1"')),
    "budget": Mistake("Key poor has used 0.12 of 0.05 USD this month; it resets on 1 [A-Z][a-z]+.", "insufficient_quota", 200,
                      key="poor", model="up/m", refused=429),
    "all failed": Mistake(r"gone: connection refused (127.0.0.1:\d+, \d tries); up: 529 overloaded (\d tries): Overloaded. No provider left.",
                          "server_error", 200, model="team/coder", answers=(DOWN,) * 6),
    "cut": Mistake("Provider up (127.0.0.1:\\d+) failed while reading the answer: The connection ended in the middle of a message.",
                   "server_error", 200, model="up/m", answers=(says("This one is cut in the middle", end="cut"),) * 6),
}
ONCE = [word for name in ("request", "stream") for word in ("-c", f"model_providers.pomex.{name}_max_retries=0")]
OLD_TOO = ("placeholder", "wrong model", "no provider", "provider without key", "not for this key", "budget")


def pattern(sentence: str) -> str:
    """The sentence, in which `.` and `\\d` stay what they are."""
    return sentence.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?").replace("*", r"\*").replace("$", r"\$")


@pytest.mark.parametrize("version, name", [*((NEWEST_CODEX, name) for name in MISTAKES), *(("0.128.0", name) for name in OLD_TOO)])
def test_codex_the_log_and_the_setup_page_say_the_same_sentence(setup: Setup, version: str, name: str, tmp_path: Path) -> None:
    mistake, gateway = MISTAKES[name], setup.gateway
    codex = Codex(version, tmp_path, mistake.change(gateway.codex_block()), setup.keys[mistake.key])
    codex.model = mistake.model
    setup.upstream.script.play(*mistake.answers)
    seen, logged = len(setup.news), len(gateway.log)
    turn = codex.exec("Hello", *ONCE)
    shown, printed = pattern(mistake.sentence), "".join(turn.errors)
    assert turn.code == 1 and re.search(shown, printed), turn
    assert mistake.status != 400 or re.fullmatch(shown, turn.errors[-1]), turn      # the sentence, and no JSON around it
    told = setup.told(seen, "usage" if mistake.planned else "refused")
    if mistake.planned:
        assert told["error_code"] == mistake.code and setup.page()["latest"][0]["error"], told
        sentence = setup.page()["latest"][0]["error"]
    else:
        assert (told["status"], told["code"]) == (mistake.refused or mistake.status, mistake.code), told
        assert told["user_agent"].startswith("codex"), told
        assert setup.page()["refused"][0] == told
        sentence = told["message"]
    assert re.fullmatch(shown, sentence), sentence
    lines = [line for line in gateway.log[logged:] if sentence in line]
    assert lines and lines[-1].split()[1] == str(mistake.status), gateway.log[logged:]


@pytest.mark.parametrize("version", CODEX_VERSIONS)
def test_codex_that_tries_a_websocket_is_told_so_and_goes_on_over_http(setup: Setup, version: str, tmp_path: Path) -> None:
    block = setup.gateway.codex_block() + "\nsupports_websockets = true\n"
    codex, seen = Codex(version, tmp_path, block, setup.keys["good"]), len(setup.news)
    codex.model = "demo/echo"
    assert "offline demo" in codex.exec("What is 2 + 2?").answer
    sentence = ('Codex tried a WebSocket. Set wire_api = "responses" in [model_providers.pomex] (and supports_websockets = false if '
                "present).")
    told = setup.told(seen, "refused")
    assert (told["status"], told["code"], told["message"]) == (426, "use_http_sse", sentence)
    assert any(f" 426 acceptance GET /v1/responses  {sentence}" in line for line in setup.gateway.log)


RAW = {     # what real Codex cannot be made to send any more
    "Gemini": ("/v1beta/models/m:generateContent", 404, "wrong_wire_api", "This API is not served"),
    "Claude Code's address with /v1": ("/v1/v1/messages", 400, "wrong_base_url", "ANTHROPIC_BASE_URL must be http://127.0.0.1"),
    "no JSON": ("/v1/responses", 400, "invalid_json", "The body is not valid JSON"),
}


@pytest.mark.parametrize("name", RAW)
def test_a_raw_mistake_is_told_the_same_way(setup: Setup, name: str) -> None:
    path, status, code, sentence = RAW[name]
    seen = len(setup.news)
    request = urllib.request.Request(setup.gateway.url.removesuffix("/v1") + path, b"{", {
        "authorization": f"Bearer {setup.keys['good']}", "content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    error = json.load(caught.value)["error"]
    assert (caught.value.code, error["code"]) == (status, code) and sentence in error["message"], error
    told = setup.told(seen, "refused")
    assert (told["status"], told["code"], told["message"]) == (status, code, error["message"])
    assert any(f" {status} acceptance POST {path}  {error['message']}" in line for line in setup.gateway.log)


def test_a_busy_limit_is_told_to_codex_as_a_wait(setup: Setup, tmp_path: Path) -> None:
    """Codex waits by itself and asks again: nobody needs to do anything."""
    key = setup.gateway.command("keys", "create", "slow", "--rpm", "1").strip()
    codex = Codex(NEWEST_CODEX, tmp_path, setup.gateway.codex_block(), key)
    codex.model = "demo/echo"
    assert setup.gateway.post({"model": "demo/echo", "input": "Hi"}, key=key).status == 200
    turn = codex.exec("Hello", *ONCE)
    assert re.search(r"Key slow may .*1 request.* a minute", "".join(turn.errors)), turn.errors
    assert re.search(r"try again in \d+", "".join(turn.errors)), turn.errors


# --- from the clone to Codex's first answer ----------------------------------------------------------

QUESTION = "What is 2 + 2?"
ANSWER = f"This is Pomex's offline demo, no model was asked. You sent: {QUESTION}"


@contextlib.contextmanager
def typed_in_a_terminal(made: Shell, line: str) -> Iterator[list[str]]:
    """A command that goes on in another terminal, and what that shows."""
    screen, end = os.openpty()
    process = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=made.home / "pomex", env=made.environment, stdin=end,
                               stdout=end, stderr=end)
    os.close(end)
    shown: list[str] = []
    reader = threading.Thread(target=keep_lines, args=(screen, shown), daemon=True)
    reader.start()
    try:
        found_in_log(process, shown, "(Ctrl-C stops it)")
        yield shown
    finally:
        process.terminate()
        process.wait(20)
        reader.join(5)


@pytest.fixture
def clone(tmp_path: Path) -> Shell:
    """A new machine with Python, git and Codex, and what the README says to begin with: a clone."""
    made = shell(tmp_path, POMEX_PORT=str(free_port()), HTTPS_PROXY="http://127.0.0.1:1")      # Codex looks for updates
    (made.home / "pomex" / "pomex.py").unlink()
    subprocess.run(["git", "clone", "-q", str(ROOT), "."], cwd=made.home / "pomex", check=True)
    (made.home / "pomex" / "pomex.py").write_bytes(POMEX.read_bytes())          # as it is, committed or not
    return made


@pytest.mark.parametrize("version", CODEX_VERSIONS)
def test_from_the_clone_to_codexs_first_answer(clone: Shell, version: str) -> None:
    use_codex(clone, version)
    command = re.findall(r"^```sh\n(\S+ pomex\.py \S+)", (ROOT / "README.md").read_text(), re.M)[0]
    began = time.monotonic()
    with typed_in_a_terminal(clone, command) as shown:
        lines = [line.rstrip() for line in shown]
        export = next(line for line in lines if line.startswith("  export POMEX_API_KEY="))
        start, end = (next(i for i, line in enumerate(lines) if line.startswith(sign)) for sign in ("Codex: put this into", "Then, in"))
        clone.config.write_text("\n".join(lines[start + 1:end]))
        asked = lines[end].partition("terminal: codex ")[2]
        assert asked == f'"{QUESTION}"', lines[end]
        turn = clone.type(export, f"codex exec {asked}")
        seconds = time.monotonic() - began
        assert turn.returncode == 0 and ANSWER in turn.stdout, turn
        again = clone.type(export, f"codex exec {asked}")
        assert again.returncode == 0, again
    print(f"Codex {version}: from `{command}` to the first answer {seconds:.1f} s")
    assert seconds < 20
    with typed_in_a_terminal(clone, command) as shown:
        assert any(line.startswith("Keys          1 active.") for line in shown)
        assert not any("sk-rh-" in line or "model_provider" in line for line in shown)
        assert clone.type(export, f"codex exec {asked}").returncode == 0


def use_codex(made: Shell, version: str) -> None:
    (made.home / "bin" / "codex").unlink()
    (made.home / "bin" / "codex").symlink_to(codex_binary(version))


def test_write_run_profile_and_undo_with_real_codex(clone: Shell) -> None:
    """Codex had a provider of its own before, and has it again after."""
    with typed_in_a_terminal(clone, "python3 pomex.py serve") as shown:
        export = next(line.strip() for line in shown if line.startswith("  export POMEX_API_KEY="))
        port = clone.environment["POMEX_PORT"]
        before = (f'# mine\nmodel = "demo/tools"   # for now\nmodel_provider = "mine"\n\n[model_providers.mine]\nname = "Mine"\n'
                  f'base_url = "http://127.0.0.1:{port}/v1"\nenv_key = "MY_KEY"\n')
        clone.config.write_text(before)
        ask = f'codex exec "{QUESTION}"'

        once = clone.type(f'python3 pomex.py codex --run -- exec "{QUESTION}"')         # with a key of its own
        assert once.returncode == 0 and ANSWER in once.stdout and "it ends in a day" in once.stderr, once
        assert clone.config.read_text() == before

        written = clone.type(export, "python3 pomex.py codex --write")
        assert "+model_provider" in written.stderr and "-model_provider" in written.stderr, written
        done = clone.type(export, ask)
        assert done.returncode == 0 and ANSWER in done.stdout and "provider: pomex" in done.stderr, done
        assert "# mine" in clone.config.read_text()
        undone = clone.type("python3 pomex.py codex --undo")
        assert undone.returncode == 0 and clone.config.read_text() == before, undone
        mine = clone.type(export, 'export MY_KEY="$POMEX_API_KEY"', ask)
        assert mine.returncode == 0 and "provider: mine" in mine.stderr, mine

        profile = clone.type(export, "python3 pomex.py codex --profile")
        assert clone.config.read_text() == before and "codex --profile pomex" in profile.stderr, profile
        done = clone.type(export, f'codex --profile pomex exec "{QUESTION}"')
        assert done.returncode == 0 and ANSWER in done.stdout and "provider: pomex" in done.stderr, done
        clone.type("python3 pomex.py codex --undo --profile")
        assert sorted(file.name for file in clone.config.parent.glob("*.toml")) == ["config.toml"]
        assert (clone.config.parent / "config.toml.pomex-bak").read_text() == before
        use_codex(clone, "0.128.0")
        old = clone.type(export, f'python3 pomex.py codex --run -- exec "{QUESTION}"')
        assert old.returncode == 0 and ANSWER in old.stdout, old


@pytest.mark.parametrize("before", [None, 'model = "gpt-5.5"   # mine\n'], ids=["no file", "a file"])
@pytest.mark.parametrize("version", ["0.128.0", "latest"])
def test_what_codex_itself_writes_between_write_and_undo_stays(tmp_path: Path, version: str, before: str | None) -> None:
    made = shell(tmp_path)
    use_codex(made, version)
    made.configure(before)
    added = made.type("python pomex.py codex --write --model demo/echo", "codex mcp add docs -- npx docs-server")
    assert added.returncode == 0 and "model_providers.pomex" in made.config.read_text(), added
    undone = made.type("python pomex.py codex --undo", "codex mcp list")
    assert undone.returncode == 0 and "docs-server" in undone.stdout and "Pomex's settings are out of" in undone.stderr, undone
    mine = {} if before is None else {"model": "gpt-5.5"}
    assert program.tomllib.loads(made.config.read_text()) == {**mine, "mcp_servers": {
        "docs": {"command": "npx", "args": ["docs-server"]}}}
    assert made.type("codex mcp remove docs").returncode == 0
    again = made.type("python pomex.py codex --write", "python pomex.py codex --undo", "python pomex.py codex --undo")
    assert again.returncode == 1 and "Nothing to undo" in again.stderr, again
    assert program.tomllib.loads(made.config.read_text() if made.config.exists() else "") == mine


def test_without_config_toml_codex_goes_to_openai_whatever_openai_base_url_says(place: tuple[Shell, Pomex]) -> None:
    """The guide's first trouble. In a network of its own, in which there is nobody: nothing may leave this machine."""
    made, gateway = place
    made.configure(None)
    alone = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespaces here")
    codex = subprocess.Popen([*alone, "codex", "exec", "--skip-git-repo-check", "Hello"], cwd=made.home / "pomex", text=True,
                             env={**made.environment, "OPENAI_BASE_URL": gateway.url, "OPENAI_API_KEY": gateway.key},
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    assert codex.stderr is not None
    with contextlib.closing(codex.stderr):
        assert any("failed to connect to Responses WebSocket" in line or "wss://api.openai.com" in line for line in codex.stderr)
        os.killpg(codex.pid, signal.SIGKILL)
        codex.wait(10)
    found = made.doctor()
    assert found.wrong == ["config.toml"] and "Codex asks OpenAI itself" in found.row("config.toml")
