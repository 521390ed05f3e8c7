"""Layer 13: what is printed where, exit codes, and a server that starts and stops as a user sees it."""
import asyncio
import contextlib
import dataclasses
import errno
import http.server
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
from ledgers import audited, key_made

import pomex

FILE = pomex.__file__
CONFIG = """
[providers.openai]
api_key = "file:key"

[providers.local]
wire_api = "chat"
base_url = "http://10.0.0.7:8000/v1"
models = ["qwen", "tiny-*"]

[models."my/coder"]
targets = ["openai:gpt-5.3-codex", ["local:qwen", "local:tiny-1"]]
context_window = 272000
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, with a home beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def configured(here):
    (here / "pomex.toml").write_text(CONFIG)
    (here / "key").write_text("sk-openai-0123456789abcdef\n")
    return here


@pytest.fixture
def local_ports(monkeypatch):
    """Sets which local servers there are; returns their addresses."""
    with contextlib.ExitStack() as stack:
        def ports(**answers):
            rows = {name: row for name, row in pomex.BUILTIN_PROVIDERS.items() if not row.local}
            for name, answer in answers.items():
                url = stack.enter_context(small_server(answer)) if answer is not None else f"http://127.0.0.1:{free_port()}"
                rows[name] = dataclasses.replace(pomex.BUILTIN_PROVIDERS["ollama"], name=name, base_url=url + "/v1")
            monkeypatch.setattr(pomex, "BUILTIN_PROVIDERS", rows)
            return {name: row.base_url.removesuffix("/v1") for name, row in rows.items()}
        yield ports


@contextlib.contextmanager
def small_server(answer):
    """A server on a free port that gives one answer to all; "silence" waits longer than anybody asks."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if answer == "silence":
                stop.wait(5)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *arguments):
            pass

    stop = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def run(*argv, **more):
    return subprocess.run([sys.executable, FILE, *argv], capture_output=True, text=True, timeout=20, **more)


@contextlib.contextmanager
def serving(*argv, **more):
    """A gateway in a process of its own: (process, its address, what it said)."""
    process = subprocess.Popen([sys.executable, FILE, "serve", "--port", "0", "--no-detect", *argv],
                               stderr=subprocess.PIPE, text=True, **more)
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"Listening on  (http[^\s\"]+)", line):
            break
    else:
        raise AssertionError(said)
    try:
        yield process, found[1], said
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


# --- usage and exit codes -------------------------------------------------------------------------

USAGE = {
    "no command": ([], 2, "Run the gateway:\n  serve            run the gateway\n"),
    "a mistyped command": (["serv"], 2, "unknown command serv. Did you mean serve?"),
    "a mistyped command of keys": (["keys", "lst"], 2, "unknown command lst. Did you mean list?"),
    "nothing like a command": (["xyzzy"], 2, "unknown command xyzzy.\n"),
    "a command of another program": (["run"], 2, "unknown command run. Did you mean serve?"),
    "another program's word for revoke": (["keys", "rm", "ana"], 2, "unknown command rm. Did you mean revoke?"),
    "a mistyped flag": (["keys", "list", "--jsn"], 2, "unknown option --jsn. Did you mean --json?"),
    "a mistyped flag with a value": (["serve", "--prot=9"], 2, "unknown option --prot=9. Did you mean --port?"),
    "a flag like none": (["usage", "--xyzzy"], 2, "unknown option --xyzzy.\n"),
    "a word too many": (["models", "all"], 2, "unexpected argument all"),
    "a flag of codex without --": (["codex", "--run", "exec", "--skip-git-repo-check"], 2, "unknown option --skip-git-repo-check."),
    "help about no command": (["help", "serv"], 2, "unknown command serv. Did you mean serve?"),
    "a bad port": (["serve", "--port", "x"], 2, "'x' must be an integer, not a string"),
    "a port out of range": (["serve", "--port", "65536"], 2, "'65536': its value must be between 0 and 65535"),
    "a bad format": (["serve", "--log-format", "xml"], 2, "'xml' must be one of plain, json"),
    "a key without name": (["keys", "create"], 2, "the following arguments are required: NAME"),
    "a configuration that is not there": (["check", "--config", "no.toml"], 78,
                                          "no.toml cannot be read: No such file or directory.\n"),
    "a name that is no key's": (["keys", "revoke", "nobody"], 1, "There is no active key of that name."),
    "a name no key can have": (["keys", "create", "a b"], 1, "A name is 1 to 64 letters"),
}


@pytest.mark.parametrize("argv, code, said", USAGE.values(), ids=USAGE)
def test_a_wrong_call_is_told_what_is_wrong(here, capsys, argv, code, said):
    assert pomex.main(argv) == code
    out, err = capsys.readouterr()
    assert out == "" and said in err


def test_a_bad_file_ends_every_command_with_78(here, capsys):
    (here / "pomex.toml").write_text("[server]\nprot = 1\n")
    for argv in (["serve"], ["check"], ["models"], ["codex"], ["keys", "list"]):
        assert pomex.main(argv) == 78
        assert capsys.readouterr().err == ('pomex.toml: unknown key "prot" in [server]. Did you mean port?\n')


def test_a_database_that_cannot_be_used_ends_with_69_and_a_sentence(here, capsys):
    (here / "pomex.toml").write_text('[database]\nurl = "sqlite:."\n')
    assert pomex.main(["keys", "list"]) == 69
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("The database ") and "Traceback" not in err


def test_the_version(capsys):
    assert pomex.main(["--version"]) == 0
    assert capsys.readouterr().out == f"Pomex {pomex.VERSION}\n"


def test_the_program_can_come_by_pipe(here):
    text = pathlib.Path(FILE).read_text()
    done = subprocess.run([sys.executable, "-", "codex", "--config", os.devnull], input=text, capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.startswith('model_provider = "pomex"\n')


# --- where the configuration comes from -----------------------------------------------------------

def test_the_configuration_is_the_named_one_else_the_first_there_is(here, monkeypatch):
    home = pathlib.Path.home()
    assert pomex.find_config("", {}) == ""
    (home / ".config/pomex").mkdir(parents=True)
    (home / ".config/pomex/pomex.toml").touch()
    assert pomex.find_config("", {}) == f"{home}/.config/pomex/pomex.toml"
    (here / "x/pomex").mkdir(parents=True)
    (here / "x/pomex/pomex.toml").touch()
    assert pomex.find_config("", {"XDG_CONFIG_HOME": "x"}) == "x/pomex/pomex.toml"
    (here / "pomex.toml").touch()
    assert pomex.find_config("", {}) == "pomex.toml"
    assert pomex.find_config("other.toml", {}) == "other.toml"


def test_a_flag_wins_over_a_variable_and_that_over_the_file(here, monkeypatch):
    (here / "pomex.toml").write_bytes(b"\xef\xbb\xbf[server]\nport = 1\nhost = '127.0.0.2'\nlog_format = 'json'\n")
    monkeypatch.setenv("POMEX_PORT", "2")
    monkeypatch.setenv("POMEX_HOST", "127.0.0.3")
    server = pomex.read_config(pomex.command_parser().parse_args(["serve", "--port", "0"])).server
    assert (server.port, server.host, server.log_format) == (0, "127.0.0.3", "json")
    monkeypatch.setenv("POMEX_CONFIG", "absent.toml")
    assert pomex.main(["check"]) == 78


# --- check, models, codex, keys -------------------------------------------------------------------

def test_check_says_what_is_configured(configured, capsys):
    assert pomex.main(["check"]) == 0
    assert capsys.readouterr().out == """\
pomex.toml   ok, 3 providers, 1 model described
  openai     key from file:key, readable
  local      http://10.0.0.7:8000/v1
  demo       works offline
  my/coder   openai:gpt-5.3-codex -> local:qwen | local:tiny-1
warning      local/qwen has no price: refused to keys with a budget, billed 0 to others
warning      local/tiny-1 has no price: refused to keys with a budget, billed 0 to others
2 warnings, 0 errors            (add --live to contact each provider)
"""


@pytest.mark.parametrize("command, complaint", [
    ("keys create k --models ''", "must be patterns like"), ("keys create k --models ,", "must be patterns like"),
    ("keys create k --models \u043e/*", "must be patterns like"), ("keys create k --rpm 9999999999", "at most nine digits"),
    ("keys create k --rpm -1", "at most nine digits"), ("keys create k --budget=-5/month", "must be like 50/month"),
    ("keys create k --budget inf/month", "must be like 50/month"), ("keys create k --expires 0d", "a time to come"),
    ("keys create k --expires 2001-01-01", "a time to come"), ("accounts create a --multiplier -1", "must be a number like 1.2"),
    ("accounts create a --limit -5", "must be an amount"), ("serve --host ''", "its length must be at least 1"),
    ("usage --by nope", "argument --by: invalid choice: 'nope'"), ("completion bash", "unknown command completion"),
    ("serv", "unknown command serv. Did you mean serve?"),
])
def test_a_wrong_argument_says_what_would_do(here, capsys, command, complaint):
    assert pomex.main(shlex.split(command)) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("prepare, command, said", [
    (lambda here: (here / "file").write_text(""), ["init", "file/pomex.toml"], "file/pomex.toml: Not a directory."),
    (lambda here: None, ["init", "no/where.toml"], "no/where.toml: No such file or directory."),
    (lambda here: (here / ".codex").write_text(""), ["codex", "--write"], ".codex: File exists."),
    (lambda here: [(here / ".codex").mkdir(), (here / ".codex" / "config.toml").write_bytes(b"\xff")], ["codex", "--write"],
     "config.toml is not TOML"),
])
def test_what_cannot_be_written_or_read_is_a_sentence(here, monkeypatch, capsys, prepare, command, said):
    monkeypatch.setenv("HOME", str(here))
    prepare(here)
    assert pomex.main(command) in (1, pomex.BAD_CONFIG)
    assert said in capsys.readouterr().err


def test_a_disk_without_room_and_a_locale_without_the_dots_are_no_tracebacks(configured):
    assert run("keys", "create", "ana").returncode == 0
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, FILE, "keys", "list"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "Output: No space left on device.\n")
    done = run("keys", "list", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "ana" in done.stdout and not done.stderr


def test_what_to_type_next_finds_the_gateway_that_runs(here):
    (here / "my.toml").write_text(f'[database]\nurl = "sqlite:{here}/x.db"\n')
    with serving("--config", "my.toml") as (process, url, said):
        port = url.rpartition(":")[2]
        hint = re.search(r"run: (.* codex --write)\n", said)[1]
        assert hint == f"{shlex.join([sys.executable, FILE])} --config my.toml --port {port} codex --write"
        written = subprocess.run(shlex.split(hint), capture_output=True, text=True, env={**os.environ, "CODEX_HOME": str(here / "c")})
        assert written.returncode == 0 and f'base_url = "{url}/v1"' in (here / "c" / "config.toml").read_text()
        assert f"--config my.toml --port {port} admin-url)" in said
        done = run("codex", "--config", "my.toml", "--port", port)
        assert f'base_url = "{url}/v1"' in done.stdout
        assert run("status", "--config", "my.toml", "--port", port).stdout.startswith(f"url                  {url}\n")
        assert run("admin-url", "--config", "my.toml", "--port", port).stdout.startswith(f"{url}/admin#login=")


def test_with_json_logs_every_line_is_an_object(here):
    with serving("--log-format", "json") as (process, url, said):
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    lines = [json.loads(line)["message"] for line in (said + rest).splitlines()]
    assert lines[-1] == "Stopped." and any(line.startswith("Listening on") for line in lines)


def test_check_live_asks_each_provider_for_its_models(here, capsys):
    with small_server('{"data": []}') as url:
        (here / "pomex.toml").write_text(f'[providers.up]\nwire_api = "chat"\nbase_url = "{url}/v1"\n[providers.gone]\n'
                                         f'wire_api = "messages"\nbase_url = "http://127.0.0.1:{free_port()}/v1"\n')
        assert pomex.main(["check", "--live"]) == 1
        said = capsys.readouterr().out
        assert re.search(r"^  up +http\S+, it answers$", said, re.MULTILINE)
        assert re.search(r"^  gone +http\S+, error: .*connection refused", said, re.MULTILINE) and said.endswith("\n0 warnings, 1 error\n")
        assert pomex.main(["check"]) == 0


def test_check_warns_of_a_key_that_others_can_read(here, capsys):
    (here / "pomex.toml").write_text('[providers.openai]\napi_key = "sk-openai-0123456789abcdef"\n')
    (here / "pomex.toml").chmod(0o644)
    assert pomex.main(["check"]) == 0
    out = capsys.readouterr().out
    assert "pomex.toml holds a key and others can read it; chmod 600 pomex.toml\n1 warning, 0 errors            (add --live to contact each provider)\n" in out
    assert "0123456789" not in out
    (here / "pomex.toml").chmod(0o600)
    pomex.main(["check"])
    assert "0 warnings, 0 errors            (add --live to contact each provider)\n" in capsys.readouterr().out


def test_models_lists_what_is_known_by_name(configured, capsys):
    assert pomex.main(["models"]) == 0
    out, err = capsys.readouterr()
    rows = [re.split(r"  +", line) for line in out.splitlines()]
    assert rows[:2] == [["MODEL", "PROVIDERS", "IN/1M", "CACHED", "OUT/1M", "CONTEXT", "STATE"],
                        ["my/coder", "openai, local", "1.75", "0.175", "14", "272 000", "ready"]]
    assert ["local/qwen", "local", "-", "-", "-", "-", "ready, no price"] in rows and "demo/echo" in out and "tiny" not in out
    assert err == "and any other model of openai, as openai/NAME\n"
    assert pomex.main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {
        "model": "my/coder", "providers": ["openai", "local"], "context_window": 272000, "price": {
            "input": "1.75", "output": "14", "cache_read": "0.175", "cache_write": "-", "cache_write_1h": "-",
            "search_per_1000": "10"}}


BLOCKS = {
    "nothing but the demo": ("", {}, "demo/echo", "http://127.0.0.1:7663"),
    "the first model described": (CONFIG, {}, "my/coder", "http://127.0.0.1:7663"),
    "a key in the environment": (None, {"OPENAI_API_KEY": "sk-1"}, "openai/gpt-6.2-sol", "http://127.0.0.1:7663"),
    "a provider of one model": ('[providers.openai]\napi_key = "x"\nmodels = ["gpt-6-sol"]\n', {}, "openai/gpt-6-sol",
                                "http://127.0.0.1:7663"),
    "a provider of some models": ('[providers.openai]\napi_key = "x"\nmodels = ["gpt-5*", "gpt-4o"]\n', {}, "openai/gpt-5.6-sol",
                                  "http://127.0.0.1:7663"),
    "a provider of other models": ('[providers.openai]\napi_key = "x"\nmodels = ["gpt-4o"]\n', {}, "openai/gpt-4o",
                                   "http://127.0.0.1:7663"),
    "a provider of nothing known": ('[providers.openai]\napi_key = "x"\nmodels = ["ft:*"]\n', {}, "demo/echo",
                                    "http://127.0.0.1:7663"),
    "a model described whose provider is missing": (
        '[providers.groq]\napi_key = "x"\n[models."openai/gpt-6-sol"]\ndescription = "x"\n', {}, "groq/openai/gpt-oss-120b",
        "http://127.0.0.1:7663"),
    "a port and every interface": ('[server]\nhost = "0.0.0.0"\nport = 80\n', {}, "demo/echo", "http://127.0.0.1:80"),
    "an IPv6 address": ('[server]\nhost = "::1"\n', {}, "demo/echo", "http://[::1]:7663"),
    "https": ('[server]\ntls_cert = "a"\ntls_key = "a"\n', {}, "demo/echo", "https://127.0.0.1:7663"),
    "a local server's model": ('[providers.local]\nwire_api = "chat"\nbase_url = "http://a/v1"\nmodels = ["q*", "m"]\n',
                               {}, "local/m", "http://127.0.0.1:7663"),
}


@pytest.mark.parametrize("text, environ, model, url", BLOCKS.values(), ids=BLOCKS)
def test_codex_prints_the_block(here, capsys, monkeypatch, local_ports, text, environ, model, url):
    local_ports()
    (here / "key").write_text("sk-openai")
    if text is not None:
        (here / "pomex.toml").write_text(text)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert pomex.main(["codex"]) == 0
    block = pomex.tomllib.loads(capsys.readouterr().out)
    known = re.match(r"openai/gpt-[56]", model)         # to Codex, with more than we know of it
    catalogue = {} if known else {"model_catalog_url": url + "/v1/models"}
    assert block == {"model_provider": "pomex", "model": model, "model_providers": {"pomex": {
        "name": "Pomex API", "base_url": url + "/v1", "env_key": "POMEX_API_KEY", "wire_api": "responses", **catalogue}}}


ONE = '[demo]\nenabled = false\n[providers.openai]\napi_key = "x"\nmodels = ["gpt-6-sol"]\n'
ASKED = {       # the configuration, --model -> exit code, what is said
    "known": (ONE, "openai/gpt-6-sol", 0, ""),
    "not of this provider": (ONE, "openai/gpt-5.5", 1, 'Model "openai/gpt-5.5" not found. Did you mean openai/gpt-6-sol?'),
    "no such provider": (ONE, "nope/x", 1, "A model that can be used: openai/gpt-6-sol"),
    "a provider without its key": (ONE, "groq/x", 1, "groq is not configured."),
    "a key that only the gateway may have": (None, "groq/x", 0, "groq is not configured."),
    "none, and none is known": (ONE.replace("gpt-6-sol", "ft:*"), "", 1, 'Model "PROVIDER/NAME" not found.'),
}


@pytest.mark.parametrize("form", [[], ["--write"]], ids=["print", "write"])
@pytest.mark.parametrize("text, model, code, said", ASKED.values(), ids=ASKED)
def test_codex_is_given_no_model_that_the_gateway_refuses(here, capsys, monkeypatch, local_ports, text, model, code, said, form):
    local_ports()
    monkeypatch.setenv("HOME", str(here))
    if text is not None:
        (here / "pomex.toml").write_text(text)
    assert pomex.main(["codex", *form, "--model", model]) == code
    out, err = capsys.readouterr()
    file = here / ".codex" / "config.toml"
    shown = out + (file.read_text() if file.exists() else "")
    assert said in err and (f'model = "{model}"' in shown) == (code == 0)
    assert file.exists() == (form == ["--write"] and code == 0)


def test_keys_are_created_listed_and_revoked(here, capsys):
    assert pomex.main(["keys", "create", "laptop"]) == 0
    token, err = capsys.readouterr()
    assert re.fullmatch(r"sk-rh-[0-9A-Za-z]{32}\n", token)
    assert err == "Key laptop created. It is not shown again.\n"
    assert pomex.main(["keys", "create", "laptop"]) == 1
    assert "There is an active key named laptop already." in capsys.readouterr().err
    hint = f"{token[:10]}…{token[-5:-1]}"
    assert pomex.main(["keys", "list"]) == 0
    assert re.fullmatch(rf"NAME +KEY +MODELS +SPENT +BUDGET +LAST USED +STATE\nlaptop +{hint} +all +0\.00 +none +never +active\n",
                        capsys.readouterr().out)
    assert pomex.main(["keys", "revoke", "laptop"]) == 0
    assert capsys.readouterr() == ("", f"Key laptop ({hint}) revoked. Requests in progress will finish.\n")
    assert pomex.main(["keys", "list", "--json"]) == 0
    row, = json.loads(capsys.readouterr().out)
    assert (row["name"], row["key"], row["expires_at"]) == ("laptop", hint, None)
    assert abs(row["revoked_at"] - time.time()) < 10


def test_what_is_changed_on_the_command_line_is_in_the_audit_log_with_who_did_it(here, capsys, monkeypatch):
    monkeypatch.setattr(pomex.getpass, "getuser", lambda: "jo")
    for line in ("keys create k --budget 5/day", "keys edit k --budget 7/week --rpm 3", "keys revoke k", "keys revoke k",
                 "accounts create team --prepaid", "accounts credit team 20", "keys list"):
        pomex.main(line.split())
    with contextlib.closing(pomex.Ledger.open(pomex.load_config("", "", os.environ).database.place)) as ledger:
        key, = ledger.list_keys()
        assert audited(ledger) == [
            ("jo (cli)", "key created", "k", {}, {"budget_usd": "5", "period": "day"}),
            ("jo (cli)", "key edited", "k", {"budget_usd": "5", "period": "day", "rpm": 0},
             {"budget_usd": "7", "period": "week", "rpm": 3}),
            ("jo (cli)", "key revoked", "k", {"revoked_s": 0}, {"revoked_s": key.revoked_s}),
            ("jo (cli)", "account created", "team", {}, {"prepaid": 1, "limit_usd": None, "multiplier": pomex.ONE}),
            ("jo (cli)", "credit added", "team", {}, {"kind": "top-up", "usd": "20", "reason": ""})]


def test_a_user_without_a_name_is_called_by_his_number(monkeypatch):
    def unknown():
        raise KeyError
    monkeypatch.setattr(pomex.getpass, "getuser", unknown)
    assert pomex.command_line_user() == f"user {os.getuid()} (cli)"


# --- looking around -------------------------------------------------------------------------------

MODELS = '{"object":"list","data":[{"id":"qwen3:8b"},{"id":"gemma"},{"no":"id"},7]}'
PORTS = {
    "a server with models": (MODELS, ["qwen3:8b", "gemma"]),
    "a server without models": ('{"data":[]}', []),
    "another service": ("<html>hello</html>", None),
    "another JSON service": ("[1, 2]", None),
    "one that does not answer": ("silence", None),
    "nobody": (None, None),
}


@pytest.mark.parametrize("answer, models", PORTS.values(), ids=PORTS)
def test_a_local_port_is_asked_once_and_briefly(local_ports, answer, models):
    local_ports(ollama=answer)
    begun = time.monotonic()
    config, found = asyncio.run(pomex.with_detected(pomex.load_config("", "", {})))
    assert time.monotonic() - begun < 1
    assert found.get("ollama") == models and ("ollama" in config.providers) is (models is not None)


def test_a_configuration_file_switches_detection_off(configured, capsys, monkeypatch, local_ports):
    local_ports(ollama=MODELS)
    monkeypatch.setenv("GROQ_API_KEY", "k")
    pomex.main(["models"])
    assert "qwen3" not in capsys.readouterr().out
    (configured / "pomex.toml").unlink()
    pomex.main(["models"])
    out, err = capsys.readouterr()
    assert re.search(r"^ollama/qwen3:8b +ollama +0 +0 +0 .* ready$", out, re.MULTILINE) and "groq/NAME" in err


def test_a_local_server_that_was_found_is_free_and_init_says_so(configured, capsys, local_ports):
    """No other is, whatever its address: it may lead to a provider that is paid."""
    (configured / "pomex.toml").write_text('[providers.ollama]\nbase_url = "http://127.0.0.1:1/v1"\nwire_api = "chat"\n')
    assert not pomex.read_config(pomex.command_parser().parse_args(["check"])).providers["ollama"].free
    (configured / "pomex.toml").unlink()
    local_ports(ollama=MODELS, lmstudio=None)
    assert pomex.main(["init"]) == 0
    written = pomex.read_config(pomex.command_parser().parse_args(["check"]))
    assert {name: row.free for name, row in written.providers.items() if name != "demo"} == {"ollama": True}


def test_the_local_servers_that_are_looked_for():
    assert [name for name, row in pomex.BUILTIN_PROVIDERS.items() if row.local] == ["ollama", "lmstudio", "vllm", "llama.cpp"]
    assert not any(row.free for row in pomex.BUILTIN_PROVIDERS.values())


def test_a_key_may_be_allowed_models_without_a_price(configured, capsys):
    def shown():
        pomex.main(["keys", "list", "--json"])
        return [row["allow_unpriced"] for row in json.loads(capsys.readouterr().out)]
    assert pomex.main(["keys", "create", "k", "--budget", "5/day", "--allow-unpriced", "yes"]) == 0
    assert "models without a price too" in capsys.readouterr().err and shown() == [True]
    assert pomex.main(["keys", "edit", "k", "--allow-unpriced", "no"]) == 0
    assert capsys.readouterr() and shown() == [False]


# --- the start ------------------------------------------------------------------------------------

def announced(capsys, config, found, looked, ledger, is_new=True):
    asyncio.run(pomex.announce(config, found, looked, is_new, "http://127.0.0.1:7663", ledger))
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.fixture
def ledger(here):
    with contextlib.closing(pomex.Ledger.open(pomex.load_config("", "", os.environ).database.place)) as opened:
        yield opened


def test_the_first_start_on_a_terminal_says_all_that_is_needed(here, capsys, monkeypatch, local_ports, ledger):
    urls = local_ports(ollama=MODELS, vllm=None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("GROQ_API_KEY", "gsk_" + 20 * "x")
    config, found = asyncio.run(pomex.with_detected(pomex.load_config("", "", os.environ)))
    said = announced(capsys, config, found, True, ledger)
    shown = re.sub(r"^  (anthropic|google) .*\n", "", said, flags=re.MULTILINE)     # where their wires are there
    shown = re.sub(r"#login=\S+ ", "#login=LINK ", shown)
    assert re.sub(r"sk-rh-\w{32}", "KEY", shown) == f"""\
Pomex {pomex.VERSION} on Python {sys.version.split()[0]}. No config file; using defaults.

Providers
  openai      no key      export OPENAI_API_KEY=...
  groq        ready       key from GROQ_API_KEY (…xxx), not contacted
  ollama      ready       {urls['ollama']}, 2 models
  vllm        not found   {urls['vllm']}
  demo        ready       works offline and costs nothing: demo/echo
Database      ~/.local/state/pomex/pomex.db (created, only you can read it)

First API key, shown once:
  export POMEX_API_KEY="KEY"

Codex: put this into ~/.codex/config.toml, or run: python3 pomex.py codex --write
  model_provider = "pomex"
  model = "groq/openai/gpt-oss-120b"

  [model_providers.pomex]
  name = "Pomex API"
  base_url = "http://127.0.0.1:7663/v1"
  env_key = "POMEX_API_KEY"    # another key later: codex app-server daemon restart
  wire_api = "responses"
  model_catalog_url = "http://127.0.0.1:7663/v1/models"

Then, in another terminal: codex "What is 2 + 2?"
Other agents: python3 pomex.py connect AGENT

Dashboard     http://127.0.0.1:7663/admin#login=LINK (one use, 10 minutes)
Listening on  http://127.0.0.1:7663   Ctrl-C stops it
"""
    assert [key.name for key in ledger.list_keys()] == ["first"]


def test_the_second_start_shows_no_key(here, capsys, ledger):
    key_made(ledger, "a", 1.0)
    said = announced(capsys, pomex.load_config("", "", os.environ), {}, False, ledger, is_new=False)
    assert "Keys          1 active. New one: python3 pomex.py keys create NAME\n" in said
    assert "sk-rh-" not in said and "Codex" not in said and "created" not in said
    asyncio.run(ledger.revoke_key("a", 2.0))
    assert "Keys          0 active." in announced(capsys, pomex.load_config("", "", os.environ), {}, False, ledger)


def test_without_a_terminal_the_first_key_goes_to_a_file(here, capsys, ledger):
    config = pomex.load_config("", "", os.environ)
    path = pathlib.Path(config.database.place).with_name("first-key")
    path.write_text("old")
    path.chmod(0o644)
    said = announced(capsys, config, {}, False, ledger)
    assert "First API key written to ~/.local/state/pomex/first-key (only you can read it). In the shell that starts Codex:\n" in said
    assert f'  export POMEX_API_KEY="$(cat {path})"\n' in said
    assert "sk-rh-" not in said
    assert path.read_text().startswith("sk-rh-") and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_who_listens_for_the_whole_network_is_told_so(here, capsys, ledger):
    config = pomex.load_config('[server]\nhost = "0.0.0.0"\n', "pomex.toml", os.environ)
    (here / "pomex.toml").touch()
    assert ("Warning       Anybody on this network can reach Pomex. Keys are required on every call; put TLS in front, "
            "or set tls_cert and tls_key.\n") in announced(capsys, config, {}, False, ledger)


# --- serve ----------------------------------------------------------------------------------------

def test_serve_serves_until_it_is_told_to_stop(here):
    with serving() as (process, url, said):
        assert "First API key written to " in said
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 5) as client:
            client.sendall(f"GET /health HTTP/1.1\r\nhost: {host}:{port}\r\nconnection: close\r\n\r\n".encode())
            answer = client.makefile("rb").read()
        assert b" 200 " in answer.split(b"\r\n")[0] and pomex.VERSION.encode() in answer
        taken = run("serve", "--no-detect", "--port", port)
        assert taken.returncode == 69
        assert re.fullmatch(rf"Port {port} is taken by another Pomex {pomex.VERSION}\. Use that one, or: "
                            rf".*pomex\.py --port {int(port) + 1} serve\n", taken.stderr)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert re.sub(r"[0-9:]{8} 200 -  GET /health\n", "", said) == "Stopping: 0 streams open.\nStopped.\n"
        assert said.count(" 200 -  GET /health\n") == 2, "no access line is lost at the end"
        assert process.wait(5) == 0


def test_a_port_that_another_program_holds_is_said_to_be_so(here, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert pomex.main(["serve", "--no-detect", "--port", str(port)]) == 69
    assert re.fullmatch(rf"Port {port} is taken by another program\. Use another: .*\n", capsys.readouterr().err)


REFUSALS = {
    "a port that needs privileges": (OSError(errno.EACCES, "Permission denied"), 443, 77, "Port 443 needs privileges."),
    "an address of another machine": (OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address"), 7663, 69,
                                      "Cannot listen on 127.0.0.1 port 7663: Cannot assign requested address."),
}


@pytest.mark.parametrize("error, port, code, sentence", REFUSALS.values(), ids=REFUSALS)
def test_a_server_that_cannot_start_says_why(error, port, code, sentence):
    found, said = asyncio.run(pomex.explain_listen_error(error, pomex.ServerConfig(port=port)))
    assert found == code and said.startswith(sentence)


class Draining:
    """A server with streams that end when they are told to, or never."""
    address = ("127.0.0.1", 1)
    config = pomex.ServerConfig()

    def __init__(self, streams, ends):
        self.open_requests, self.ends = streams, ends

    async def drain(self, timeout_s):
        assert timeout_s == 30
        await asyncio.sleep(0 if self.ends else 10)


STOPS = {
    "nothing is open": (0, True, 1, 0, "Stopping: 0 streams open.\nStopped.\n"),
    "one stream ends": (1, True, 1, 0, "Stopping: 1 stream open, waiting up to 30 s (Ctrl-C again to cut).\nStopped.\n"),
    "two streams are cut": (2, False, 2, 130, "Stopping: 2 streams open, waiting up to 30 s (Ctrl-C again to cut).\n"),
}


@pytest.mark.parametrize("streams, ends, signals, code, said", STOPS.values(), ids=STOPS)
def test_a_signal_stops_and_a_second_one_cuts(capsys, streams, ends, signals, code, said):
    async def scene():
        loop = asyncio.get_running_loop()
        for number in range(signals):
            loop.call_later(0.02 + 0.05 * number, os.kill, os.getpid(), signal.SIGINT)
        return await pomex.until_stopped(Draining(streams, ends), pomex.install_signal_handlers(), 30)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert asyncio.run(scene()) == code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == said


def test_a_log_line_is_plain_or_json(capsys):
    before = pomex.log.handlers[:], pomex.log.level, pomex.log.propagate
    try:
        pomex.set_up_logging("plain")
        pomex.log.info("200 laptop demo/echo")
        pomex.set_up_logging("json")
        pomex.log.info("both", extra={"lines": [(1.25, "200 laptop demo/echo"), (2.0, "400 laptop demo/echo")]})
    finally:
        pomex.log.handlers[:], pomex.log.level, pomex.log.propagate = before
    plain, *lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d 200 laptop demo/echo", plain)
    assert [json.loads(line) for line in lines] == [
        {"time": "1970-01-01T00:00:01.250Z", "level": "info", "pid": os.getpid(), "message": "200 laptop demo/echo"},
        {"time": "1970-01-01T00:00:02.000Z", "level": "info", "pid": os.getpid(), "message": "400 laptop demo/echo"}]


# --- help -----------------------------------------------------------------------------------------

def commands():
    return {name: each for group in pomex.COMMANDS.values() for name, each in group.items()}


def test_the_help_shows_every_command_in_its_group(capsys):
    assert pomex.main(["--help"]) == 0
    out = capsys.readouterr().out
    for group, members in pomex.COMMANDS.items():
        shown = out.partition(f"\n{group}:\n")[2].partition("\n\n")[0]
        assert [line.split("  ")[1] for line in shown.splitlines()] == [*members] and all(each.help in shown for each in members.values())
    assert pomex.main(["help"]) == 0 and capsys.readouterr().out == out
    assert pomex.main([]) == 2 and capsys.readouterr() == ("", out)
    assert pomex.main(["help", "keys"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} +{re.escape(commands()[f'keys {name}'].help)}$", shown, re.MULTILINE)
               for name in ("create", "edit", "revoke", "list"))


@pytest.mark.parametrize("name", commands())
def test_each_command_has_help_with_an_example_that_can_be_typed(name, capsys):
    assert pomex.main(["help", *name.split()]) == 0
    out, example = capsys.readouterr().out, commands()[name].example
    assert pomex.main([*name.split(), "--help"]) == 0 and capsys.readouterr().out == out
    assert f"example: python3 pomex.py {name} {example}".rstrip() in " ".join(out.split())
    assert pomex.parse_arguments([*name.split(), *shlex.split(example.partition("> ")[0])]).command is commands()[name]


def test_the_examples_of_the_help_can_be_typed():
    for example in pomex.EXAMPLES:
        assert pomex.parse_arguments(shlex.split(example)).command


def test_where_the_gateway_is_may_be_said_before_the_command_and_behind_it(here):
    (here / "my.toml").write_text("[server]\nport = 1\n")
    for words in (["--config", "my.toml", "--port", "9", "status"], ["status", "--config", "my.toml", "--port", "9"],
                  ["--config", "other.toml", "--port", "8", "status", "--port", "9", "--config", "my.toml"]):
        args = pomex.parse_arguments(words)
        assert (args.config, pomex.read_config(args).server.port) == ("my.toml", 9)


COMMANDS_TYPED = {      # orig_argv[0], argv[0] -> the words
    "a relative path": ("python3", "pomex.py", "python3 pomex.py"),
    "an absolute path": ("python3.12", "/opt/my files/pomex.py", "python3.12 '/opt/my files/pomex.py'"),
    "embedded": ("python3", "app.py", "python3 pomex.py"),
    "a pipe": ("python3", "-", "python3 pomex.py"),
}


@pytest.mark.parametrize("python, file, words", COMMANDS_TYPED.values(), ids=COMMANDS_TYPED)
def test_a_hint_begins_as_this_program_was_started(monkeypatch, python, file, words):
    monkeypatch.setattr(sys, "orig_argv", [python, file])
    monkeypatch.setattr(sys, "argv", [file])
    pomex.SAME_GATEWAY.clear()
    assert pomex.command("keys list") == f"{words} keys list"
    pomex.SAME_GATEWAY["config"] = "my file.toml"
    assert pomex.command("keys list") == f"{words} --config 'my file.toml' keys list"
    pomex.SAME_GATEWAY.clear()


def test_an_error_of_the_ledger_names_a_command_that_works(here, capsys):
    (here / "my.toml").write_text("")
    assert pomex.main(["keys", "revoke", "nobody", "--config", "my.toml"]) == 1
    assert capsys.readouterr().err.endswith("List keys with: python3 pomex.py --config my.toml keys list\n")


# --- a gateway that runs: ask, status, logs, reload ------------------------------------------------

@pytest.fixture
def up(here):
    """(its address, a key, what runs a command for it, its process)."""
    (here / "secret").write_text("sk-first-0123456789\n")
    (here / "pomex.toml").write_text('[providers.openai]\napi_key = "file:secret"\nbase_url = "http://127.0.0.1:1/v1"\n')
    with serving() as (process, url, _):
        key = (here / "first-key").read_text().strip()

        def typed(*words, **more):
            return run("--port", url.rpartition(":")[2], *words, env={**os.environ, "POMEX_API_KEY": key}, **more)
        yield url, key, typed, process


def test_ask_streams_the_text_of_an_answer(up):
    _, _, typed, _ = up
    said = "This is Pomex's offline demo, no model was asked. You sent: {}\n"
    done = typed("ask", "What is", "2 + 2?", "-m", "demo/echo")
    assert (done.returncode, done.stdout, done.stderr) == (0, said.format("What is 2 + 2?"), "")
    assert typed("ask", "-m", "demo/echo", input="from a pipe").stdout == said.format("from a pipe")
    assert typed("ask", "-m", "demo/echo", "review:", "-", input="a diff").stdout == said.format("review: a diff")
    assert typed("ask", "hi").returncode == 1           # the best model here is one that cannot be reached


def test_ask_says_what_is_wrong(up, here, monkeypatch):
    url, key, typed, process = up
    done = typed("ask", "hi", "-m", "demo/ecko")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith('Model "demo/ecko" not found. Did you mean demo/echo?')
    failed = typed("ask", "hi", "-m", "openai/gpt-6-sol")
    assert failed.returncode == 1 and "connection refused" in failed.stderr
    port = url.rpartition(":")[2]
    for name, value, said in (("POMEX_API_KEY", "", "POMEX_API_KEY is not set."), ("POMEX_API_KEY", "sk-rh-x", "placeholder")):
        done = run("ask", "hi", "--port", port, env={**os.environ, name: value})
        assert done.returncode == 1 and said in done.stderr
    process.kill()
    process.wait()
    done = typed("ask", "hi")
    assert done.returncode == 69 and done.stderr.startswith(f"No gateway answers at {url}. Start it in another terminal: ")
    assert done.stderr.endswith(f" --port {port} serve\n")


def test_status_says_how_the_gateway_is(up):
    url, _, typed, process = up
    done = typed("status")
    assert done.returncode == 0 and re.match(rf"url +{url}\nversion +{pomex.VERSION}\nstatus +ready\n", done.stdout) and not done.stderr
    typed("ask", "hi", "-m", "demo/echo")
    for _ in range(5):
        typed("ask", "hi", "-m", "openai/gpt-6-sol")
    assert json.loads(typed("status", "--json").stdout) == {
        "url": url, "version": pomex.VERSION, "status": "ready", "ledger": "ok", "providers": "ok", "accepting": "ok", "targets": "degraded",
        "open_requests": 0, "requests_today": 6, "spent_today_usd": "0.0000", "disabled_providers": ""}
    process.kill()
    process.wait()
    done = typed("status")
    assert done.returncode == 1 and re.search(r"^requests today +6$", done.stdout, re.MULTILINE)
    assert re.fullmatch(rf"No gateway answers at {url}\. Start it in another terminal: \S+ \S+ --port \d+ serve\n", done.stderr)
    assert not json.loads(typed("status", "--json").stdout)["version"]


def test_status_says_what_is_wrong_with_the_database(here):
    (here / "pomex.toml").write_text('[database]\nurl = "sqlite:."\n')
    done = run("status")
    assert (done.returncode, done.stdout) == (69, "") and done.stderr.startswith("The database ")


def test_logs_show_the_newest_requests_and_follow(up):
    url, key, typed, _ = up
    typed("ask", "hi", "-m", "demo/echo")
    typed("ask", "hi", "-m", "openai/gpt-6-sol")
    typed("ask", "hi", "-m", "demo/ecko")
    deadline = time.monotonic() + 5                        # refusals are written once a second
    while len(lines := typed("logs").stdout.splitlines()) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    moment = r"\d\d-\d\d \d\d:\d\d:\d\d"
    for line, said in zip(lines, (r"completed first demo/echo via demo  \d+ in \d+ out  first 0.0s total 0.0s  \$0.0000",
                                  r"failed first openai/gpt-6-sol via openai x connection refused \(2 tries\), openai  "
                                  r"0 in 0 out  total .*connection refused.*",
                                  r'400 first POST /v1/responses  Model "demo/ecko" not found.*'), strict=True):
        assert re.fullmatch(f"{moment} {said}", line), line
    assert typed("logs", "-n", "1").stdout.splitlines() == lines[-1:]
    for words, shown in ((["--model", "demo/echo"], lines[:1]), (["--status", "failed"], lines[1:2]), (["--status", "refused"], lines[2:]),
                         (["--key", "first"], lines), (["--key", "nobody"], []), (["--status", "completed"], lines[:1])):
        assert typed("logs", *words).stdout.splitlines() == shown, words
    rows = [json.loads(line) for line in typed("logs", "--jsonl").stdout.splitlines()]
    assert [row["result"] for row in rows] == ["completed", "failed", "refused"] and rows[0]["model"] == "demo/echo"
    def heed_ctrl_c():          # a shell's background job, which these tests may be, ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([sys.executable, FILE, "logs", "-f", "-n", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=heed_ctrl_c) as following:
        assert following.stdout.readline() == lines[-1] + "\n"
        typed("ask", "again", "-m", "demo/tools")
        assert "demo/tools" in following.stdout.readline()
        following.send_signal(signal.SIGINT)
        assert (following.wait(5), following.stderr.read()) == (130, "")


@pytest.mark.parametrize("workers", [1, 2])
def test_reload_takes_up_the_file_and_the_key_files(here, workers):
    (here / "secret").write_text("sk-first-0123456789\n")
    text = f'[server]\nworkers = {workers}\n[providers.openai]\napi_key = "file:secret"\n'
    (here / "pomex.toml").write_text(text)
    with serving() as (process, address, _):
        url = address.rstrip(",")
        for change, said in (
                (lambda: None, "Reloaded pomex.toml: nothing changed."),
                (lambda: (here / "secret").write_text("sk-second-0123456789\n"), "Reloaded pomex.toml: providers.openai."),
                (lambda: (here / "pomex.toml").write_text(text + 'env_http_headers = { x = "ONLY_HERE" }\n'),
                 "Reload refused, still running with the old file: [providers.openai.env_http_headers] x"),
                (lambda: (here / "pomex.toml").write_text(text), "Reloaded pomex.toml: nothing changed.")):
            change()
            done = run("reload", env={**os.environ, "ONLY_HERE": "1"})
            assert (done.returncode, done.stdout) == (0, f"{url} was asked (process {process.pid}); how it went is in its log\n"), done
            assert next(line for line in process.stderr if line.startswith("Reload")).startswith(said)
        (here / "pomex.toml").write_text(text + "x = 1\n")
        assert run("reload").returncode == 78
        (here / "pomex.toml").write_text(text)
    done = run("reload")
    assert done.returncode == 69 and done.stderr.startswith("No gateway that uses ") and done.stderr.endswith(" serve\n")


def test_admin_url_says_where_no_gateway_is(here, capsys):
    assert pomex.main(["admin-url"]) == 0
    assert "No gateway answers at http://127.0.0.1:7663. Start it in another terminal: python3 pomex.py serve\n" in capsys.readouterr().err


def test_lists_are_printed_as_csv_and_jsonl(here, capsys):
    for line in ("keys create ana --budget 50/month --models demo/*", "accounts create team --prepaid", "accounts credit team 20"):
        assert pomex.main(line.split()) == 0
    for words in ("keys list", "accounts list", "models", "prices show", "audit"):
        capsys.readouterr()
        rows = [pomex.main([*words.split(), "--json"]), json.loads(capsys.readouterr().out)][1]
        pomex.main([*words.split(), "--jsonl"])
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows and rows
        pomex.main([*words.split(), "--csv"])
        assert capsys.readouterr().out.startswith(",".join(rows[0]) + "\n")
