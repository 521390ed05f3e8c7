"""One scripted provider and one Pomex in front of it, for all acceptance tests of a run.

The provider is configured once for each wire, so a wire is chosen by the first part of the model's name.
With POMEX_ACCEPTANCE_DIRECT=1 Codex speaks to the scripted provider itself: it tells a change in Codex, or a
fault in a script, from a fault in Pomex.
"""
from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import (CODEX_VERSIONS, DIRECT, HERE, NEWEST_CODEX, SHARED, Codex, Pomex, free_port, llama_python,
                     running_pomex)
from scripted import Script, Upstream

MODELS = ("gpt-5.3-codex", "gpt-5.5", "gpt-5.6-luna", "gpt-5.6-sol", "gpt-6-sol", "gpt-6.2-sol", "plain-model",
          "claude-sonnet-4-5", "claude-opus-4-8", "claude-opus-5-5", "gemini-2.5-flash", "gemini-3.7-flash")
# The model of a wire: of two generations that differ in all that matters, one for each version of Codex.
OWN_MODELS = {"messages": {"0.128.0": "claude-sonnet-4-5", NEWEST_CODEX: "claude-opus-5-5", "": "claude-opus-4-8"},
              "gemini": {"0.128.0": "gemini-2.5-flash", NEWEST_CODEX: "gemini-3.7-flash", "": "gemini-3.7-flash"}}
WIRES = {
    "native": 'wire_api = "responses"\nrelay = "bytes"',            # as OpenAI: the upstream's own frames pass
    "foreign": 'wire_api = "responses"\nrelay = "normalise"',       # as a vendor's imitation: decoded, made anew
    "chat": 'wire_api = "chat"',
    "thinker": 'wire_api = "chat"\ndialect = "deepseek"',           # its reasoning must be sent back
    "messages": 'wire_api = "messages"',
    "gemini": 'wire_api = "gemini"',
}
ADMIN_TOKEN = "acceptance-admin-token"
if DIRECT:
    WIRES = {"direct": ""}


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    served = Upstream()
    yield served
    served.close()


@pytest.fixture(scope="session")
def pomex(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pomex]:
    """The gateway, with one provider for each wire."""
    if DIRECT:
        yield direct(upstream)
        return
    config = f'[server]\nport = {free_port()}\nadmin_token = "{ADMIN_TOKEN}"\n[database]\nurl = "sqlite:pomex.db"\n'
    config += providers(upstream)
    with running_pomex(tmp_path_factory.mktemp("pomex"), config, {"SCRIPTED_KEY": "upstream-secret"}) as gateway:
        yield gateway


def providers(upstream: Upstream) -> str:
    """The scripted provider in the configuration, once for each wire."""
    return "".join(f'\n[providers.{name}]\n{lines}\nbase_url = "{upstream.base_url(name)}"\n'
                   f'env_key = "SCRIPTED_KEY"\nmodels = {json.dumps(MODELS)}\n' for name, lines in WIRES.items())


def direct(upstream: Upstream) -> Pomex:
    """The scripted provider, dressed as a gateway."""
    entry = json.loads((SHARED / "reference" / "codex-model-entry.json").read_text())["models"][0]
    upstream.headers.clear()
    upstream.catalogue = {"object": "list", "data": [],
                          "models": [{**entry, "slug": f"direct/{name}"} for name in MODELS]}
    return Pomex(upstream.base_url("direct"), "sk-direct", {}, log=[
        'model_provider = "pomex"\n', 'model = "direct/gpt-5.3-codex"\n', "\n", "[model_providers.pomex]\n",
        'name = "Pomex API"\n', f'base_url = "{upstream.base_url("direct")}"\n', 'env_key = "POMEX_API_KEY"\n',
        'wire_api = "responses"\n', f'model_catalog_url = "{upstream.base_url("direct")}/models"\n', "\n"])


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The origin of a running llama.cpp."""
    log = (tmp_path_factory.mktemp("llama") / "log").open("w")
    process = subprocess.Popen([str(llama_python()), str(HERE / "llama_server.py")], text=True, stderr=log,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    origin = process.stdout.readline().strip()
    assert origin.startswith("http://127.0.0.1:"), Path(log.name).read_text()
    yield origin
    process.stdin.close()
    process.wait(20)
    process.stdout.close()
    log.close()


@pytest.fixture
def script(upstream: Upstream) -> Iterator[Script]:
    """The provider's script, empty at the start of each test. No request may have been refused at its end."""
    upstream.script.whole_answers = False
    upstream.script.play()
    upstream.script.refused.clear()
    yield upstream.script
    assert upstream.script.refused == []


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=CODEX_VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def codex(version: str, wire: str, pomex: Pomex, tmp_path: Path) -> Codex:
    """Codex with the block that Pomex prints, and the model of the wire under test."""
    made = Codex(version, tmp_path, pomex.codex_block(), pomex.key)
    made.model = model_of(wire, version, "gpt-5.3-codex")
    if wire in OWN_MODELS and version == "0.128.0":
        (tmp_path / "catalogue.json").write_bytes(pomex.catalogue())
        made.use_catalogue(tmp_path / "catalogue.json")
    return made


def model_of(wire: str, version: str = "", usual: str = "plain-model") -> str:
    return f"{wire}/{OWN_MODELS.get(wire, {}).get(version, usual)}"
