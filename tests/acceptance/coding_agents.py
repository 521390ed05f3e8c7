"""Real coding agents, each started as a person would in a shell, with a home of its own and no way out but loopback.

An agent is a row of `AGENTS`: how it is called, what it is told of the gateway, and the tool with which it writes a file.
"""
from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import JSON, REQUIRE_TOOLS, ROOT, TOOLS, clean_environment, run_in_group
from vocabulary import Call, Item, Text

NO_WAY_OUT = "http://127.0.0.1:9"               # nobody listens there
PINNED = (ROOT / ".ci" / "run").read_text().split("BENEATH=")[0]


def installed(path: Path, place: str) -> Path:
    """The tool at `path`. Where it is absent the test is skipped; what .ci/run's table holds must be there in CI."""
    if not path.exists():
        if REQUIRE_TOOLS and f"\n{place} " in PINNED:
            pytest.fail(f"{place} is not installed (bash .ci/run installs it into $POMEX_TOOLS)")
        pytest.skip(f"{place} is not installed in $POMEX_TOOLS")
    return path


def npm_program(place: str, name: str) -> Path:
    return installed(TOOLS / place / "node_modules" / ".bin" / name, place)


def node() -> Path:
    """The Node.js of .ci/run's table: newer than what a system brings."""
    return npm_program("node", "node")


@dataclass
class Ran:
    """What one call of an agent did."""
    code: int
    stdout: str
    stderr: str

    @property
    def shown(self) -> str:
        """All that a person at the terminal reads."""
        return f"{self.stdout}\n{self.stderr}"

    @property
    def result(self) -> JSON:
        """Claude Code's own report."""
        found: JSON = json.loads(self.stdout)
        return found


class Agent:
    """One agent, told to use one gateway. `url` ends in /v1."""

    def __init__(self, name: str, place: Path, url: str, key: str, model: str) -> None:
        self.name, self.url, self.key, self.model = name, url, key, model
        self.home, self.work = place / "home", place / "work"
        for folder in (self.home, self.work):
            folder.mkdir(parents=True)
        self.environment = clean_environment(
            self.home, HTTPS_PROXY=NO_WAY_OUT, HTTP_PROXY=NO_WAY_OUT, https_proxy=NO_WAY_OUT, http_proxy=NO_WAY_OUT,
            no_proxy="127.0.0.1,localhost", XDG_DATA_HOME=str(self.home / "data"),
            XDG_CACHE_HOME=str(self.home / "cache"), TERM="dumb")
        self.command = AGENTS[name].prepare(self)

    def put(self, file: str, content: str) -> None:
        path = self.home / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def run(self, prompt: str, *options: str, timeout: float = 90) -> Ran:
        return Ran(*run_in_group([*self.command(prompt), *options], self.work, self.environment, timeout, self.name))

    def writes(self, file: str, content: str) -> Item:
        """What the model says to have a file written."""
        return AGENTS[self.name].writes(self.work / file, content)


# --- how each is called

Command = Callable[[str], list[str]]


def claude_code(agent: Agent) -> Command:
    program = npm_program("claude-code", "claude")
    agent.environment |= {"ANTHROPIC_BASE_URL": agent.url.removesuffix("/v1"), "ANTHROPIC_AUTH_TOKEN": agent.key,
                          "ANTHROPIC_MODEL": agent.model, "CLAUDE_CONFIG_DIR": str(agent.home / ".claude"),
                          "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1",
                          "DISABLE_TELEMETRY": "1", "DISABLE_ERROR_REPORTING": "1", "IS_SANDBOX": "1"}
    return lambda prompt: [str(program), "-p", prompt, "--output-format", "json", "--dangerously-skip-permissions"]


def qwen_code(agent: Agent) -> Command:
    program = npm_program("qwen-code", "qwen")
    agent.put(".qwen/settings.json", json.dumps({
        "$version": 3, "security": {"auth": {"selectedType": "openai"}}, "privacy": {"usageStatisticsEnabled": False},
        "telemetry": {"enabled": False}, "general": {"enableAutoUpdate": False},
        "memory": {"enableManagedAutoMemory": False, "enableManagedAutoDream": False}}))
    agent.environment |= {"OPENAI_API_KEY": agent.key, "OPENAI_BASE_URL": agent.url, "OPENAI_MODEL": agent.model,
                          "QWEN_CODE_SUPPRESS_YOLO_WARNING": "1"}
    return lambda prompt: [str(node()), str(program), "-p", prompt, "--yolo", "--auth-type", "openai"]


def opencode(agent: Agent) -> Command:
    program = npm_program("opencode", "opencode")
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "Pomex", "models": {agent.model: {"name": agent.model}},
                "options": {"baseURL": agent.url, "apiKey": agent.key}}
    agent.put(".config/opencode/opencode.json", json.dumps({
        "provider": {"pomex": provider}, "model": f"pomex/{agent.model}", "small_model": f"pomex/{agent.model}",
        "autoupdate": False, "share": "disabled", "permission": {"*": "allow"}}))
    agent.environment |= {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1",
                          "OPENCODE_DISABLE_LSP_DOWNLOAD": "1", "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1"}
    return lambda prompt: [str(program), "run", "--title", "A title", prompt]   # it asks the model for none


def continue_cli(agent: Agent) -> Command:
    program = npm_program("continue", "cn")
    agent.put(".continue/config.yaml", f"name: pomex\nversion: 1.0.0\nschema: v1\nmodels:\n  - name: pomex\n"
              f"    provider: openai\n    model: {agent.model}\n    apiBase: {agent.url}\n    apiKey: {agent.key}\n")
    agent.environment |= {"CONTINUE_TELEMETRY_ENABLED": "0"}
    return lambda prompt: [str(node()), str(program), "-p", prompt, "--auto", "--config",
                           str(agent.home / ".continue" / "config.yaml")]


def aider(agent: Agent) -> Command:
    program = installed(TOOLS / "aider" / "bin" / "aider", "aider")
    agent.environment |= {"OPENAI_API_KEY": agent.key, "OPENAI_API_BASE": agent.url, "AIDER_ANALYTICS": "false"}
    return lambda prompt: [
        str(program), "--model", f"openai/{agent.model}", "--message", prompt, "--edit-format", "diff", "--yes-always",
        "--no-git", "--no-check-update", "--no-show-release-notes", "--no-show-model-warnings", "--no-analytics",
        "--no-pretty"]


def cline(agent: Agent) -> Command:
    program = npm_program("cline", "cline")
    agent.environment |= {"CLINE_TELEMETRY_DISABLED": "1"}
    subprocess.run([str(program), "auth", "openai-compatible", "-k", agent.key, "-m", agent.model, "-b", agent.url],
                   env=agent.environment, cwd=agent.work, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True)
    return lambda prompt: [str(program), prompt]


# --- how each has a file written

def call(name: str, path_field: str, text_field: str) -> Callable[[Path, str], Item]:
    def written(path: Path, content: str) -> Item:
        return Call(name, {path_field: str(path), text_field: content})
    return written


def aider_block(path: Path, content: str) -> Item:
    return Text(f"\n\n{path.name}\n```\n<<<<<<< SEARCH\n=======\n{content}>>>>>>> REPLACE\n```\n")


@dataclass(frozen=True)
class Row:
    prepare: Callable[[Agent], Command]
    writes: Callable[[Path, str], Item]
    loops: bool = True                  # a turn with a tool takes a second request


AGENTS: dict[str, Row] = {
    "claude-code": Row(claude_code, call("Write", "file_path", "content")),
    "qwen-code": Row(qwen_code, call("write_file", "file_path", "content")),
    "opencode": Row(opencode, call("write", "filePath", "content")),
    "continue": Row(continue_cli, call("Write", "filepath", "content")),
    "aider": Row(aider, aider_block, loops=False),
    "cline": Row(cline, call("editor", "path", "new_text")),
}
