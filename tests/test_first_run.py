"""The first five minutes: admin-url, init, codex --write and --undo, doctor."""
import asyncio
import contextlib
import os
import pathlib
import re
import time
import tomllib

import pytest

import pomex

BLOCK = pomex.codex_block("http://127.0.0.1:7663", "demo/echo")
WANTED = tomllib.loads("\n".join(BLOCK))

MERGES = {
    "nothing": "",
    "a comment": "# mine\n",
    "other keys": 'approval_policy = "never"\nmodel = "gpt-5"   # old\n',
    "other tables": 'model = "gpt-5"\n\n[tools]\nweb_search = true\n\n[model_providers.other]\nbase_url = "http://x/v1"\n',
    "an older block": 'model_provider = "pomex"\n\n[model_providers.pomex]\nbase_url = "http://127.0.0.1:1"\nwire_api = "chat"\n'
                      'request_max_retries = 4\n\n[mcp_servers.a]\ncommand = "x"\n',
    "only tables": '[a]\nb = 1\n[[c]]\nd = 2\n',
    "an inner table of ours": '[model_providers.pomex]\nname = "x"\n[model_providers.pomex.http_headers]\nx-a = "b"\n',
    "windows line ends": 'model = "gpt-5"\r\n[a]\r\nb = 1\r\n',
}


@pytest.mark.parametrize("text", MERGES.values(), ids=MERGES)
def test_the_block_is_merged_and_all_else_stays(text):
    merged = pomex.with_block(text, BLOCK)
    before, after = tomllib.loads(text), tomllib.loads(merged)
    assert pomex.holds(after, WANTED) and pomex.others(after, WANTED) == pomex.others(before, WANTED)
    assert pomex.with_block(merged, BLOCK) == merged
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert all(line in merged for line in comments)


@pytest.mark.parametrize("text", [
    'model_providers = { other = { base_url = "x" } }\n', 'model_providers.pomex.name = "x"\n',
    'a = """\n[model_providers.pomex]\n"""\n', '"model" = "x"\nmodel_provider = """\nx"""\n',
], ids=["inline", "dotted", "a header inside a text", "a value of two lines"])
def test_what_cannot_be_merged_safely_is_refused(text):
    with pytest.raises((pomex.ConfigError, tomllib.TOMLDecodeError)):
        merged = pomex.with_block(text, BLOCK)
        assert not merged       # shown where it was merged after all


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "codexhome"
    monkeypatch.setenv("CODEX_HOME", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return folder / "config.toml"


@pytest.mark.parametrize("before", ["", 'model = "gpt-5"\n\n[tools]\nweb_search = true\n'], ids=["no file", "a file"])
def test_write_keeps_a_backup_and_undo_puts_it_back(home, before, capsys):
    if before:
        home.parent.mkdir()
        home.write_text(before)
    assert pomex.main(["codex", "--write"]) == 0
    assert tomllib.loads(home.read_text())["model_provider"] == "pomex" and home.stat().st_mode & 0o77 == 0
    assert "+model_provider" in capsys.readouterr().err
    assert pomex.main(["codex", "--write"]) == 0 and "has it already" in capsys.readouterr().err
    assert pomex.main(["codex", "--write", "--model", "demo/tools"]) == 0       # the backup stays the first
    assert pomex.main(["codex", "--undo"]) == 0
    assert (home.read_text() if home.exists() else "") == before
    assert pomex.main(["codex", "--undo"]) == 1


def test_a_broken_file_is_left_alone(home):
    home.parent.mkdir()
    home.write_text("model = \n")
    assert pomex.main(["codex", "--write"]) == pomex.BAD_CONFIG
    assert home.read_text() == "model = \n" and os.listdir(home.parent) == ["config.toml"]


def test_admin_url_prints_a_link_that_works_once(home, capsys):
    assert pomex.main(["admin-url"]) == 0
    found = re.fullmatch(r"http://127\.0\.0\.1:7663/admin#login=([\w-]{20,})\n", capsys.readouterr().out)
    config = pomex.load_config("", "", os.environ)
    with contextlib.closing(pomex.Ledger.open(config.database.path)) as ledger:
        assert [pomex.use_login_link(ledger, found[1], time.time()) for _ in range(2)] == [True, False]


@pytest.mark.parametrize("environ", [{}, {"OPENAI_API_KEY": "sk-0123456789", "GEMINI_API_KEY": "x123456789"}], ids=["bare", "keys"])
def test_init_writes_a_file_that_check_takes(home, environ, monkeypatch, capsys):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert pomex.main(["init"]) == 0
    file = pathlib.Path("pomex.toml")
    assert file.stat().st_mode & 0o777 == 0o600 and "sk-0123456789" not in file.read_text()
    assert pomex.main(["check"]) == 0
    config = pomex.read_config(pomex.command_parser().parse_args(["check"]))
    assert {"openai", "google"} <= set(config.providers) or not environ
    assert pomex.main(["init"]) == 1 and "nothing was written" in capsys.readouterr().err


GOOD = "\n".join(BLOCK)
FAULTS = {      # planted: what is changed -> the row that must say so
    "nothing": (lambda text: text, None),
    "missing /v1": (lambda text: text.replace('/v1"\nenv', '"\nenv'), "base_url"),
    "another port": (lambda text: text.replace(':PORT/v1"\nenv', ':1/v1"\nenv'), "base_url"),
    "chat": (lambda text: text.replace('"responses"', '"chat"'), "wire_api"),
    "no table of that name": (lambda text: text.replace("providers.pomex", "providers.pomx"), "config.toml"),
    "no model_provider": (lambda text: text.replace('model_provider = "pomex"\n', ""), "config.toml"),
    "a key as env_key": (lambda text: text.replace('"POMEX_API_KEY"', '"sk-rh-abc"'), "env_key"),
    "a variable that is not set": (lambda text: text.replace('"POMEX_API_KEY"', '"OTHER_KEY"'), "env_key"),
    "an unknown model": (lambda text: text.replace("demo/echo", "demo/ecko"), "model"),
    "websockets": (lambda text: text + "\nsupports_websockets = true\n", "websockets"),
    "no TOML": (lambda text: text + "\nx =\n", "config.toml"),
    "no file": (lambda text: None, "config.toml"),
}


@pytest.fixture
def doctor(home, monkeypatch, tmp_path):
    """Examines with a gateway that runs: f(text of config.toml, key) -> the rows that are not ok."""
    async def inside(change, key):
        config = pomex.load_config(f'[server]\nport = 0\n[database]\nurl = "sqlite:{tmp_path}/p.db"\n', str(tmp_path / "p.toml"), {})
        with contextlib.closing(pomex.Ledger.open(config.database.path)) as ledger:
            token = ledger.create_key("walker", time.time())
            monkeypatch.setenv("POMEX_API_KEY", token if key is None else key)
            if key == "":
                monkeypatch.delenv("POMEX_API_KEY")
            async with pomex.running(config, ledger) as server:
                port = server.address[1]
                text = change(GOOD.replace("7663", "PORT"))
                if text is not None:
                    home.parent.mkdir()
                    home.write_text(text.replace("PORT", str(port)))
                config = pomex.dataclasses.replace(config, server=pomex.dataclasses.replace(config.server, port=port))
                return await pomex.examine(config, False)

    def run(change, key=None):
        rows = asyncio.run(inside(change, key))
        return rows, [row.what.strip() for row in rows if row.state != "ok" and row.what != "codex"]
    return run


@pytest.mark.parametrize("fault", FAULTS)
def test_doctor_finds_each_planted_fault_and_names_the_cure(doctor, fault):
    change, what = FAULTS[fault]
    rows, wrong = doctor(change)
    assert wrong == ([what] if what else [])
    assert all(row.fix for row in rows if row.state != "ok")
    assert [row.what for row in rows if row.state == "ok"][-3:] == ["stream", "lost end", "cut stream"]


@pytest.mark.parametrize("key, message", [("", "not set"), ("sk-rh-xxxxxxxxxxxx", "placeholder"), ("sk-ant-1", "another provider")])
def test_doctor_finds_a_key_that_does_not_work(doctor, key, message):
    rows, wrong = doctor(lambda text: text, key)
    assert wrong[-1] == "env_key" and message in rows[-1].text and "keys create" in rows[-1].fix


def test_doctor_says_where_no_gateway_is(home, capsys):
    assert pomex.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "python pomex.py serve" in out and out.rstrip().endswith("problems")


def test_run_starts_codex_with_overrides_and_a_key_and_changes_no_file(home, monkeypatch, tmp_path):
    started = []
    program = tmp_path / "codex"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(pomex.os, "execv", lambda path, words: started.append((path, words, os.environ["POMEX_API_KEY"])))
    monkeypatch.setenv("POMEX_API_KEY", "")
    pomex.main(["codex", "--run", "--", "exec", "What is 2 + 2?"])
    (path, words, key), = started
    assert path == str(program) and words[-2:] == ["exec", "What is 2 + 2?"] and key.startswith("sk-rh-")
    given = tomllib.loads("\n".join(word for flag, word in zip(words, words[1:]) if flag == "-c"))
    assert pomex.holds(given, WANTED) and not home.exists()
