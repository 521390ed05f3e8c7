"""The first five minutes: admin-url, init, codex and connect with --write and --undo, doctor."""
import asyncio
import contextlib
import json
import os
import pathlib
import re
import subprocess
import time

import pytest

import pomex

BLOCK = pomex.agent_settings(pomex.CODEX_AGENT, "http://127.0.0.1:7663", "demo/echo")
OWN_KEYS = {("model_provider",), ("model",), ("model_providers", "pomex")}


def toml_leaves(text):
    return pomex.settings_leaves(pomex.CODEX_AGENT, text)


WANTED = toml_leaves(BLOCK)

MERGES = {
    "nothing": "",
    "a comment": "# mine\n",
    "other keys": 'approval_policy = "never"\nmodel = "gpt-5"   # old\n',
    "other tables": 'model = "gpt-5"\n\n[tools]\nweb_search = true\n\n[model_providers.other]\nbase_url = "http://x/v1"\n',
    "an older block": 'model_provider = "pomex"\n\n[model_providers.pomex]\nbase_url = "http://127.0.0.1:1"\nwire_api = "chat"\n'
                      'name = "x"\nrequest_max_retries = 4\n\n[mcp_servers.a]\ncommand = "x"\n',
    "only tables": '[a]\nb = 1\n[[c]]\nd = 2\n',
    "an inner table of ours": '[model_providers.pomex]\nname = "x"\n[model_providers.pomex.http_headers]\nx-a = "b"\n',
    "windows line ends": 'model = "gpt-5"\r\n[a]\r\nb = 1\r\n',
    "a byte order mark": '\ufeffmodel = "gpt-5"\n[a]\nb = 1\n',
    "no newline at the end": '[a]\nb = 1',
    "dotted": 'model_providers.pomex.name = "x"\nmodel_providers.pomex.base_url = "http://x/v1"\n[a]\nb = 1\n',
    "inline in the table of providers": '[model_providers]\npomex = { name = "x", http_headers = { a = "b" } }\n'
                                        'other = { name = "y" }\n',
    "dotted in the table of providers": '[model_providers]\npomex.name = "x"\n[a]\nb = 1\n',
    "quoted keys": '"model" = "x"\n["model_providers"."pomex"]\n"name" = "y"\n',
    "a header inside a text": 'a = """\n[model_providers.pomex]\nmodel = 1\n"""\n',
    "values of several lines": 'model_provider = """\nx"""\nb = [\n  "]", # ]\n  "model = 1",\n]\nc = \'\'\'\n[a]\'\'\'\n',
}
IMPOSSIBLE = {
    "an inline table of providers": 'model_providers = { other = { name = "x" } }\n',
    "providers that are no table": "model_providers = 5\n",
    "a provider with a list of tables": '[model_providers.pomex]\nname = "x"\nlist = [{ a = 1 }]\n',
}


def others(text):
    """What a configuration says beside our keys."""
    return {path: value for path, value in toml_leaves(text).items() if path[:2] not in OWN_KEYS}


def changed(text, values):
    return pomex.with_settings(pomex.CODEX_AGENT, pathlib.Path("config.toml"), text, values)


@pytest.mark.parametrize("text", MERGES.values(), ids=MERGES)
def test_our_keys_are_put_in_all_else_stays_and_comes_back(text):
    assert pomex.own_keys(pomex.CODEX_AGENT) == OWN_KEYS
    merged, rest = changed(text, WANTED), changed(text, {})
    assert toml_leaves(merged) == {**others(text), **WANTED} and toml_leaves(rest) == others(text)
    assert [line for line in text.splitlines() if line.startswith("#") or "other" in line] == [
        line for line in merged.splitlines() if line.startswith("#") or "other" in line]
    assert rest.removeprefix("\ufeff").rstrip() in merged
    assert merged.startswith("\ufeff") == text.startswith("\ufeff")
    assert merged.count("\r\n") == merged.count("\n") * ("\r\n" in text)
    assert changed(merged, {}) == rest
    old = {path: value for path, value in toml_leaves(text).items() if path[:2] in OWN_KEYS}
    assert toml_leaves(changed(merged, old)) == toml_leaves(text)
    assert changed(rest, WANTED) == changed(merged, WANTED) == merged


@pytest.mark.parametrize("text", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_merged_safely_is_refused(home, capsys, text):
    put(home, text)
    assert codex("--write") == pomex.BAD_CONFIG and home.read_text() == text and not beside(home)
    said = capsys.readouterr().err
    assert "nothing was changed" in said and "Pomex's lines are those that this prints: python3 pomex.py codex\n" in said


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "codexhome"
    monkeypatch.setenv("CODEX_HOME", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return folder / "config.toml"


# --- codex --write, edits by others, --undo ----------------------------------------------------------

def codex(*words):
    return pomex.main(["codex", *words])


def put(file, text):
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(text.encode())


def beside(file):
    """The other files in Codex's folder: their names and what they hold."""
    return {each.name: each.read_bytes().decode() for each in file.parent.iterdir() if each.name != file.name}


ADDED = {("mcp_servers", "docs", "command"): "npx", ("projects", "/work", "trust_level"): "trusted"}
ADDS = '[mcp_servers.docs]\ncommand = "npx"\n\n[projects."/work"]\ntrust_level = "trusted"\n'
EDITS = {       # what is done to the text that write left
    "tables at the end": lambda text: f"{text}\n{ADDS}",
    "tables before ours": lambda text: f"\n{ADDS}[model_providers.pomex]\n".join(text.rsplit("\n[model_providers.pomex]\n", 1)),
    "other line ends": lambda text: f"{text}\n{ADDS}".replace("\r", "").replace("\n", "\r\n"),
    "another model": lambda text: f"{text}\n{ADDS}".replace('"demo/echo"', '"demo/tools"'),
    "more in our table": lambda text: f"{text}\n{ADDS}".replace('wire_api = "responses"', 'wire_api = "responses"\nmore = 1'),
    "a table in our table": lambda text: f'{text}\n{ADDS}[model_providers.pomex.env_http_headers]\nx = "y"\n',
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("before", [None, *MERGES.values()], ids=["no file", *MERGES])
def test_undo_gives_the_file_before_with_the_edits_since(home, capsys, before, edit):
    if before is not None:
        put(home, before)
    assert codex("--write", "--model", "demo/echo") == 0
    written = home.read_bytes().decode()
    assert beside(home).get("config.toml.pomex-bak") == (before or None) and written != before
    edited = EDITS[edit](written.replace("\r\n", "\n"))
    put(home, edited)
    capsys.readouterr()
    assert codex("--undo") == 0
    said, old = capsys.readouterr().err, toml_leaves(before or "")
    assert toml_leaves(home.read_bytes().decode()) == {**old, **ADDED} and "Pomex's settings are out of" in said
    assert beside(home).get("config.toml.pomex-bak") == (before or None)
    assert codex("--undo") == 1 and "Nothing to undo" in capsys.readouterr().err


@pytest.mark.parametrize("before", [None, *MERGES.values()], ids=["no file", *MERGES])
def test_undo_without_edits_gives_the_very_file_or_none(home, before):
    if before is not None:
        put(home, before)
    assert codex("--write") == 0 and codex("--undo") == 0
    now = home.read_bytes().decode() if home.exists() else ""
    assert now.removesuffix("\n") == (before or "").removesuffix("\n")
    assert home.exists() == bool(before) and bool(before) == ("config.toml.pomex-bak" in beside(home))


@pytest.mark.parametrize("add", ["# a comment\n", "\n[tools]\n"], ids=["a comment", "an empty table"])
def test_undo_keeps_what_changes_no_setting(home, add):
    put(home, '# mine\nmodel = "gpt-5"   # mine too\n')
    assert codex("--write") == 0
    put(home, home.read_text() + add)
    assert codex("--undo") == 0 and home.read_text() == 'model = "gpt-5"\n# mine\n' + add


def test_a_file_that_names_no_key_of_ours_is_left_alone(home, capsys):
    put(home, '[model_providers.pomex]\nname = "x"\nenv_key = "MY_KEY"\n')
    now = home.read_text()
    assert codex("--undo") == 1 and home.read_text() == now
    assert "Nothing to undo: ~/codexhome/config.toml has no block that codex --write made." in capsys.readouterr().err


def test_what_cannot_be_undone_safely_is_left_alone(home, capsys):
    assert codex("--write", "--model", "demo/echo") == 0
    put(home, 'model_providers = { pomex = { env_key = "POMEX_API_KEY" }, mine = { name = "y" } }\n')
    now = home.read_text()
    assert codex("--undo") == pomex.BAD_CONFIG and home.read_text() == now
    assert "Edit it by hand. Pomex's lines are those that this prints: " in capsys.readouterr().err


def test_a_second_write_and_a_second_undo_say_what_is_true(home, capsys):
    put(home, 'model = "gpt-5"   # mine\n')
    said = []
    for words in (["--undo"], ["--write"], ["--write"], ["--write", "--model", "demo/tools"], ["--undo"], ["--undo"]):
        said.append((codex(*words), capsys.readouterr().err))
    nothing = "Nothing to undo: ~/codexhome/config.toml has no block that codex --write made.\n"
    assert [code for code, _ in said] == [1, 0, 0, 0, 0, 1] and said[0][1] == said[5][1] == nothing
    assert "+model_provider" in said[1][1] and " The file before this is kept beside it as config.toml.pomex-bak. To undo: " in said[1][1]
    assert said[2][1].startswith("~/codexhome/config.toml is already up to date.\n")
    assert "-model = \"demo/echo\"" in said[3][1] and "kept beside it" not in said[3][1], "that copy would be of our own"
    assert "Pomex's settings are out of ~/codexhome/config.toml." in said[4][1]
    assert home.read_text() == 'model = "gpt-5"   # mine\n'
    assert beside(home) == {"config.toml.pomex-bak": home.read_text()}


def test_a_second_write_keeps_what_was_added_to_our_table_and_a_model_codex_knows_takes_the_catalogue_out(home):
    assert codex("--write", "--model", "demo/echo") == 0
    put(home, home.read_text().replace('wire_api = "responses"', 'wire_api = "responses"\nrequest_max_retries = 4'))
    with open("pomex.toml", "w") as file:
        file.write('[providers.openai]\napi_key = "x"\n')
    assert codex("--write", "--model", "openai/gpt-6-sol") == 0
    known = pomex.agent_settings(pomex.CODEX_AGENT, "http://127.0.0.1:7663", "openai/gpt-6-sol")
    assert "model_catalog_url" not in home.read_text()
    assert toml_leaves(home.read_text()) == {**toml_leaves(known),
                                                   ("model_providers", "pomex", "request_max_retries"): 4}


def test_the_block_that_serve_prints_and_somebody_pasted_is_up_to_date(home, capsys):
    put(home, BLOCK + "\n")
    assert codex("--write", "--model", "demo/echo") == 0 and "already up to date" in capsys.readouterr().err
    assert home.read_text() == BLOCK + "\n" and not beside(home)


def test_what_is_added_between_two_writes_outlives_the_undo(home):
    put(home, 'model = "gpt-5"\n')
    assert codex("--write") == 0
    put(home, home.read_text() + "\n" + ADDS)
    assert codex("--write", "--model", "demo/tools") == 0 and codex("--undo") == 0
    assert toml_leaves(home.read_text()) == {("model",): "gpt-5", **ADDED}
    assert beside(home)["config.toml.pomex-bak"] == 'model = "gpt-5"\n'


def test_no_file_that_is_there_is_taken_for_the_copy(home, capsys):
    put(home, 'model = "current"\n')
    strangers = {"config.toml.bak": "ancient", "config.toml.pomex-bak": 'model = "older"\n'}
    for name, text in strangers.items():
        put(home.with_name(name), text)
    assert codex("--write") == 0 and "kept beside it as config.toml.pomex-bak.1." in capsys.readouterr().err
    assert codex("--undo") == 0 and pomex.tomllib.loads(home.read_text())["model"] == "current"
    assert beside(home) == {**strangers, "config.toml.pomex-bak.1": 'model = "current"\n'}


def test_settings_that_were_taken_out_by_hand_do_not_come_back(home):
    put(home, 'model = "ancient"\n')
    assert codex("--write") == 0
    put(home, 'model = "mine"\n')                  # by hand
    assert codex("--write") == 0 and codex("--undo") == 0
    assert home.read_text() == 'model = "mine"\n'
    assert beside(home) == {"config.toml.pomex-bak": 'model = "ancient"\n', "config.toml.pomex-bak.1": 'model = "mine"\n'}


def test_a_file_that_is_gone_needs_no_undo(home, capsys):
    put(home, 'model = "gpt-5"\n')
    assert codex("--write") == 0
    home.unlink()
    assert codex("--undo") == 1 and not home.exists()
    assert beside(home) == {"config.toml.pomex-bak": 'model = "gpt-5"\n'}
    assert codex("--write") == 0 and codex("--undo") == 0 and not home.exists(), "nothing of the first write's copy comes back"
    assert beside(home) == {"config.toml.pomex-bak": 'model = "gpt-5"\n', "config.toml.pomex-bak.1": ""}


@pytest.mark.parametrize("link", ["dotfiles/codex.toml", "{home}/dotfiles/codex.toml"], ids=["relative", "absolute"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link_and_the_mode_of_its_file_stays(home, tmp_path, link, exists):
    home.parent.mkdir()
    target = home.parent / "dotfiles" / "codex.toml"
    target.parent.mkdir()
    home.symlink_to(link.format(home=home.parent))
    if exists:
        target.write_text('model = "gpt-5"\n')
        target.chmod(0o644)
    assert codex("--write") == 0
    assert home.is_symlink() and target.stat().st_mode & 0o777 == (0o644 if exists else 0o600)
    assert all(each.stat().st_mode & 0o77 == 0 for each in target.parent.iterdir() if each != target)
    assert codex("--undo") == 0 and home.is_symlink()
    assert {each.name: each.read_text() for each in target.parent.iterdir()}.get(target.name, "") == 'model = "gpt-5"\n' * exists


def a_loop(file):
    file.symlink_to(file.name)


HOSTILE = {     # what is done at the place of the file, what is said
    "a loop of links": (a_loop, "config.toml: Too many levels of symbolic links."),
    "a pipe": (os.mkfifo, "config.toml is not a regular file. Nothing was changed."),
    "a folder": (os.mkdir, "config.toml is not a regular file. Nothing was changed."),
    "no UTF-8": (lambda file: file.write_bytes(b"\xff"), "config.toml is not TOML: 'utf-8' codec"),
    "no TOML": (lambda file: file.write_text("model = \n"), "config.toml is not TOML: Invalid value (at line 1"),
    "too deep": (lambda file: file.write_text("a = " + "[" * 5000 + "]" * 5000), "config.toml is not TOML"),
}


@pytest.mark.parametrize("words", [["--write"], ["--undo"]], ids=["write", "undo"])
@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_file_of_codexs_is_left_alone_and_named(home, capsys, case, words):
    make, said = HOSTILE[case]
    home.parent.mkdir()
    make(home)
    code = codex(*words)
    shown = capsys.readouterr().err
    assert code in (1, pomex.BAD_CONFIG) and shown.count("\n") == 1
    assert said in shown and os.listdir(home.parent) == [home.name]


@pytest.mark.parametrize("case", HOSTILE)
def test_a_place_of_the_copy_that_is_taken_is_passed_over(home, case):
    put(home, 'model = "gpt-5"\n')
    HOSTILE[case][0](home.with_name("config.toml.pomex-bak"))
    assert codex("--write") == 0
    assert home.with_name("config.toml.pomex-bak.1").read_text() == 'model = "gpt-5"\n'


def test_a_disk_that_is_full_changes_nothing(home, monkeypatch):
    put(home, 'model = "gpt-5"\n')

    def full(path, text):
        pathlib.Path(path).write_text(text[:3])
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(pomex, "write_new", full)
    assert codex("--write") == 1
    assert home.read_text() == 'model = "gpt-5"\n' and not beside(home)


# --- connect: the other agents ----------------------------------------------------------------------

URL = "http://127.0.0.1:7663"
FILES = {       # the file, what it says of the gateway, the model and the key
    "claude-code": (".claude/settings.json", {"ANTHROPIC_BASE_URL": URL, "ANTHROPIC_MODEL": "demo/echo",
                                              "apiKeyHelper": "printenv POMEX_API_KEY"}),
    "opencode": (".config/opencode/opencode.json", {"baseURL": URL + "/v1", "model": "pomex/demo/echo", "demo/echo": {},
                                                    "apiKey": "{env:POMEX_API_KEY}"}),
    "qwen-code": (".qwen/settings.json", {"baseUrl": URL + "/v1", "name": "demo/echo", "apiKey": "$POMEX_API_KEY"}),
    "continue": (".continue/config.yaml", {"apiBase": URL + "/v1", "model": "demo/echo",
                                           "apiKey": "${{ secrets.POMEX_API_KEY }}"}),
}
SHELLS = {      # what a shell makes of the lines; `cline` is a function that shows its arguments
    "aider": {f"AIDER_OPENAI_API_BASE={URL}/v1", "AIDER_OPENAI_API_KEY=sk-rh-secret", "AIDER_MODEL=openai/demo/echo"},
    "cline": {f"<auth><openai-compatible><-b><{URL}/v1><-k><sk-rh-secret><-m><demo/echo>"},
}
# a user's own file: other keys, and others' values in the places of ours
OWN = {
    "claude-code": {"permissions": {"allow": ["Bash(ls:*)"]}, "env": {"ANTHROPIC_MODEL": "opus", "FOO": "é"}, "hooks": {}},
    "opencode": {"$schema": "x", "model": "anthropic/claude-opus-5", "provider": {"mine": {"models": {"a": {}}}}, "mcp": {"pomex": {"a": 1}}},
    "qwen-code": {"model": {"name": "qwen3", "maxSessionTurns": 3}, "security": {"auth": {"selectedType": "qwen-oauth"}}},
    "continue": {"name": "Mine", "models": [{"name": "gpt", "provider": "openai"}], "rules": ["short"]},
}
WRONG_FORMS = {
    "claude-code": '{"env": ["A=1"]}', "opencode": '{"provider": "anthropic"}', "qwen-code": '{"security": {"auth": 5}}', "continue": "[]",
}


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    """name -> an agent's file in an empty home."""
    for agent in pomex.AGENTS.values():
        monkeypatch.delenv(agent.variable, raising=False) if agent.variable else None
    monkeypatch.setenv("POMEX_API_KEY", "sk-rh-secret")

    def made(name, text=None):
        file = tmp_path / FILES[name][0]
        if text is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return file
    return made


def connect(*words):
    return pomex.main(["connect", *words])


def members(value):
    """Every (key, value) at any depth."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield key, inner
        yield from members(inner)


def says(text, wanted):
    found = list(members(json.loads(text)))
    return all(pair in found for pair in wanted.items())


def test_every_agent_is_tested():
    assert {"codex", *FILES, *SHELLS} == set(pomex.AGENTS) and set(OWN) == set(WRONG_FORMS) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_connect_prints_what_write_puts_there_and_a_second_write_changes_nothing(place, capsys, name):
    file, wanted = place(name), FILES[name][1]
    assert connect(name, "--model", "demo/echo") == 0
    printed, hint = capsys.readouterr()
    assert says(printed, wanted) and "sk-rh-" not in printed
    assert hint == f"For ~/{FILES[name][0]}; to put it there: python3 pomex.py connect {name} --write\n"
    assert connect(name, "--model", "demo/echo", "--write") == 0
    assert json.loads(file.read_text()) == json.loads(printed) and file.stat().st_mode & 0o777 == 0o600
    said = capsys.readouterr().err
    assert f"To undo: python3 pomex.py connect {name} --undo\n" in said and "+" in said and "kept beside" not in said
    before = file.read_bytes()
    assert connect(name, "--model", "demo/echo", "--write") == 0 and "already up to date" in capsys.readouterr().err
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]
    assert connect(name, "--undo") == 0 and not file.exists()
    assert connect(name, "--undo") == 1 and "Nothing to undo" in capsys.readouterr().err


@pytest.mark.parametrize("edited", [False, True], ids=["as written", "changed since"])
@pytest.mark.parametrize("name", FILES)
def test_what_else_the_file_says_stays_and_undo_brings_back_what_was_replaced(place, capsys, name, edited):
    own = json.dumps(OWN[name], indent=4, ensure_ascii=False)
    file = place(name, own)
    assert connect(name, "--write") == 0
    assert f"kept beside it as {file.name}.pomex-bak." in capsys.readouterr().err
    assert (file.parent / f"{file.name}.pomex-bak").read_text() == own
    assert connect(name, "--write", "--model", "demo/tools") == 0 and "kept beside" not in capsys.readouterr().err
    agent = pomex.AGENTS[name]
    before, ours, found = (pomex.settings_leaves(agent, each) for each in (own, agent.settings, file.read_text()))
    kept = [path for path in before if path not in ours]
    assert all(found[path] == before[path] for path in kept) and len(kept) >= 1
    if edited:
        file.write_text(json.dumps({**json.loads(file.read_text()), "$version": 4}))
    assert connect(name, "--undo") == 0
    assert json.loads(file.read_text()) == {**OWN[name], **({"$version": 4} if edited else {})}
    assert (file.read_text() == own) == (not edited) and beside(file) == {f"{file.name}.pomex-bak": own}


@pytest.mark.parametrize("name", FILES)
def test_a_later_undo_brings_back_the_file_of_the_later_write(place, name):
    texts = [json.dumps({"name": word, "model": {"name": word}, "env": {"ANTHROPIC_MODEL": word}})
             if name != "opencode" else json.dumps({"model": word}) for word in ("one", "two", "one")]
    for text in texts:
        file = place(name, text)
        assert connect(name, "--write") == 0 and connect(name, "--undo") == 0
        assert file.read_text() == text


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_names_the_key_elsewhere_is_the_users(place, name, capsys):
    own = json.dumps({"elsewhere": "POMEX_API_KEY"})
    file = place(name, own)
    assert connect(name, "--undo") == 1 and "Nothing to undo" in capsys.readouterr().err
    assert connect(name, "--write") == 0 and "kept beside it" in capsys.readouterr().err
    assert connect(name, "--undo") == 0 and file.read_text() == own


@pytest.mark.parametrize("text, said", [
    ("// a comment\n{}", "is not JSON: Expecting value"), ("name: Mine\n", "is not JSON"), ("{", "is not JSON"), ("\ufeff{}", "is not JSON"),
    ("[" * 100_000, "is not JSON"), (None, "has a form that cannot be changed safely here")],
    ids=["comments", "YAML", "cut", "a byte order mark", "too deep", "another form"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_changed_safely_is_left_alone_and_named(place, capsys, name, text, said):
    text = WRONG_FORMS[name] if text is None else text
    file = place(name, text)
    assert connect(name, "--write") == pomex.BAD_CONFIG
    shown = capsys.readouterr().err
    assert said in shown and "othing was changed" in shown and f"prints: python3 pomex.py connect {name}\n" in shown
    assert file.read_text() == text and os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("name", SHELLS)
def test_lines_for_a_shell_do_what_they_say_and_need_no_file(place, capsys, name):
    assert connect(name, "--model", "demo/echo") == 0
    printed, hint = capsys.readouterr()
    done = subprocess.run(["sh", "-ec", "cline() { printf '<%s>' \"$@\"; echo; }\n" + printed + "\nenv"],
                          capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()) >= SHELLS[name] and hint == "For a shell:\n" and "sk-rh-" not in printed
    for flag in ("--write", "--undo"):
        assert connect(name, flag) == 1
        assert f"{name} takes its settings from a shell, not from a file: python3 pomex.py connect {name}\n" in capsys.readouterr().err


HOSTILE_NAME = "x'$(touch /tmp/no)`\"\\é"


@pytest.mark.parametrize("name", pomex.AGENTS)
def test_no_name_of_a_model_breaks_out_of_the_settings(name):
    agent = pomex.AGENTS[name]
    text = pomex.agent_settings(agent, URL, HOSTILE_NAME)
    if agent.file:
        values = pomex.settings_leaves(agent, text)
        assert any(HOSTILE_NAME in str([*path, inner]) or HOSTILE_NAME in (inner, *path)
                   for path, value in values.items() for inner in (value, *[each for _, each in members(value)]))
    else:
        done = subprocess.run(["sh", "-ec", "cline() { printf '%s' \"$8\"; }\n" + text + "\nprintf '%s' \"$AIDER_MODEL\""],
                              capture_output=True, text=True, check=True)
        assert done.stdout.removeprefix("openai/") == HOSTILE_NAME


@pytest.mark.parametrize("name", [*FILES, "codex"])
def test_the_variable_that_moves_an_agents_folder_moves_its_file(place, tmp_path, monkeypatch, name):
    agent = pomex.AGENTS[name]
    monkeypatch.setenv(agent.variable, str(tmp_path / "elsewhere"))
    assert connect(name, "--write") == 0
    assert (tmp_path / "elsewhere" / agent.file).is_file() and not (tmp_path / agent.home.removeprefix("~/") / agent.file).exists()


def test_connect_codex_is_the_codex_command(place, home, capsys):
    shown = [(run("--model", "demo/echo"), capsys.readouterr().out) for run in (lambda *words: connect("codex", *words), codex)]
    assert shown[0] == shown[1] == (0, BLOCK + "\n")
    assert connect("codex", "--write") == 0 and codex("--undo") == 0 and not home.exists()


def test_an_unknown_agent_is_refused_with_those_that_are_known(place, capsys):
    assert connect("clippy") == 2
    assert "invalid choice: 'clippy' (choose from 'codex', 'claude-code', " in capsys.readouterr().err


def test_admin_url_prints_a_link_that_works_once(home, capsys):
    assert pomex.main(["admin-url"]) == 0
    found = re.fullmatch(r"http://127\.0\.0\.1:7663/admin#login=([\w-]{20,})\n", capsys.readouterr().out)
    config = pomex.load_config("", "", os.environ)
    with contextlib.closing(pomex.Ledger.open(config.database.place)) as ledger:
        assert [asyncio.run(pomex.use_login_link(ledger.db, found[1], time.time())) for _ in range(2)] == [True, False]


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
    assert pomex.main(["init"]) == 1 and "already exists; nothing was written" in capsys.readouterr().err


GOOD = BLOCK
ERROR_CLASSES = {      # planted: what is changed -> the row that must say so
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
        with contextlib.closing(pomex.Ledger.open(config.database.place)) as ledger:
            token = await ledger.create_key("walker", time.time())
            monkeypatch.setenv("POMEX_API_KEY", token if key is None else key)
            if key == "":
                monkeypatch.delenv("POMEX_API_KEY")
            async with pomex.running(config, ledger) as server:
                port = server.address[1]
                text = change(GOOD.replace("7663", "PORT"))
                if text is not None:
                    home.parent.mkdir(exist_ok=True)
                    home.write_text(text.replace("PORT", str(port)))
                config = pomex.dataclasses.replace(config, server=pomex.dataclasses.replace(config.server, port=port))
                return await pomex.diagnose(config)

    def run(change, key=None):
        rows = asyncio.run(inside(change, key))
        return rows, [row.name.strip() for row in rows if row.state != "ok" and row.name != "codex"]
    return run


@pytest.mark.parametrize("fault", ERROR_CLASSES)
def test_doctor_finds_each_planted_fault_and_names_the_cure(doctor, fault):
    change, what = ERROR_CLASSES[fault]
    rows, wrong = doctor(change)
    assert wrong == ([what] if what else [])
    assert all(row.fix for row in rows if row.state != "ok")
    assert [row.name for row in rows if row.state == "ok"][-1:] == ["stream"]


@pytest.mark.parametrize("key, message", [("", "not set"), ("sk-rh-xxxxxxxxxxxx", "placeholder"), ("sk-ant-1", "another provider")])
def test_doctor_finds_a_key_that_does_not_work(doctor, key, message):
    rows, wrong = doctor(lambda text: text, key)
    assert wrong[-1] == "env_key" and message in rows[-1].text and "keys create" in rows[-1].fix


def test_doctor_names_the_background_server_that_keeps_an_older_key(doctor, home):
    def change(text):
        socket = home.parent / "app-server-control" / "app-server-control.sock"
        socket.parent.mkdir(parents=True)
        socket.touch()
        return text
    rows, wrong = doctor(change)
    assert wrong == ["server"] and [row.fix for row in rows if row.state == "note"] == ["codex app-server daemon restart"]


def test_doctor_says_where_no_gateway_is(home, capsys):
    assert pomex.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "python3 pomex.py serve" in out and out.rstrip().endswith("problems")


def test_run_starts_codex_with_overrides_and_a_key_and_changes_no_file(home, monkeypatch):
    started = []
    monkeypatch.setattr(pomex.os, "execvp", lambda path, words: started.append((path, words, os.environ["POMEX_API_KEY"])))
    monkeypatch.setenv("POMEX_API_KEY", "")
    pomex.main(["codex", "--run", "--", "exec", "What is 2 + 2?"])
    (path, words, key), = started
    assert path == words[0] == "codex" and words[-2:] == ["exec", "What is 2 + 2?"] and key.startswith("sk-rh-")
    given = toml_leaves("\n".join(word for flag, word in zip(words, words[1:]) if flag == "-c"))
    assert given == WANTED and not home.exists()


def test_run_says_where_there_is_no_codex(home, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("POMEX_API_KEY", "sk-rh-x")
    assert pomex.main(["codex", "--run"]) == 69
    assert capsys.readouterr().err.endswith("There is no codex in PATH. Install it with: npm install -g @openai/codex\n")
