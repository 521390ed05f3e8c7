"""The dashboard in a real browser: Debian's chromium, driven by playwright-core, looked over by axe-core (npm)."""
import ast
import asyncio
import contextlib
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request

import dashboard_pictures
import pytest
from harness import CODEX_VERSIONS, TOOLS, Codex, free_port, required, running_pomex

import pomex

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from demos import slow_and_error  # noqa: E402

ANEW = os.environ.get("POMEX_SHOTS") == "1"
CHROMIUM = pathlib.Path(os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium")


@pytest.fixture(scope="module")
def packages():
    """playwright-core and axe-core."""
    required(CHROMIUM, "Debian's chromium")
    return required(TOOLS / "browser" / "node_modules" / "axe-core", "playwright-core with axe-core").parent


@pytest.fixture(scope="module")
def walk(packages, tmp_path_factory):
    """What the driver saw: one run for all tests."""
    folder = tmp_path_factory.mktemp("dashboard")
    shots = os.environ.get("POMEX_SURVEY", "")         # a folder: every route in both themes at both widths

    async def run():
        config = pomex.load_config(f'[server]\nport = 0\n[database]\nurl = "sqlite:{folder}/p.db"\n', str(folder / "pomex.toml"), {})
        with contextlib.closing(pomex.Ledger.open(config.database.place)) as ledger:
            key = await ledger.create_key("walkers-own", time.time())
            async with pomex.running(config, ledger) as server:
                link = await pomex.open_session(ledger.db, "link", 0, 600, time.time())
                process = await asyncio.create_subprocess_exec(
                    "node", str(HERE / "dashboard_driver.js"), "http://%s:%d" % server.address, link, key, shots,
                    stdout=subprocess.PIPE, env={**os.environ, "NODE_PATH": str(packages), "CHROMIUM": str(CHROMIUM)})
                out, _ = await process.communicate()
        return json.loads(out)
    with slow_and_error():
        return asyncio.run(run())


def test_the_walk_finds_everything_in_its_place(walk):
    assert {name: result for name, result in walk["checks"].items() if result is not True} == {}
    assert len(walk["checks"]) > 25


def test_what_the_playground_copies_sends_the_request_that_it_shows(walk):
    copied = walk["copied"]
    wanted = {"model": "demo/echo", "input": 'Is "it\'s true" null?', "stream": True,
              "tools": [{"type": "function", "name": "f", "strict": False, "parameters": None}]}
    assert json.loads(shlex.split(copied["curl"])[-1]) == wanted
    assert shlex.split(copied["Codex"]) == ["codex", "-m", wanted["model"], wanted["input"]]
    calls = [node for node in ast.walk(ast.parse(copied["Python"])) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(call.keywords[0].value) for call in calls if ast.unparse(call.func) == "client.responses.create"] == [wanted]


def test_no_console_error_no_other_host_no_csp_report_no_dialog_no_sideways_scroll(walk):
    assert walk["faults"] == []


def test_axe_finds_nothing_on_any_route_in_both_themes_at_both_widths(walk):
    assert walk["axe"] == []


# --- from the login link on, as a person goes ------------------------------------------------------

class Walk:
    """dashboard_walks.js with a page of its own, and what it says."""

    def __init__(self, way, link, packages, folder=""):
        self.process = subprocess.Popen(
            ["node", str(HERE / "dashboard_walks.js"), way, link.partition("/admin")[0], link, str(folder)], text=True,
            stdout=subprocess.PIPE,
            env={**os.environ, "NODE_PATH": str(packages), "CHROMIUM": str(CHROMIUM)})

    def hear(self):
        said = json.loads(self.process.stdout.readline() or '{"error": "the walk ended"}')
        assert "error" not in said, said
        return said

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def printed_link(gateway):
    """The login link that `serve` printed at its start."""
    return re.search(r"http://\S+#login=\S+", "".join(gateway.log))[0]


@pytest.fixture
def pictures(tmp_path):
    """Where pictures go: with POMEX_SHOTS=1 those of the README are made anew."""
    return HERE.parent / "shots" if ANEW else tmp_path


@pytest.fixture
def gateway(tmp_path):
    """A new machine: no configuration, no database, the gateway started in a terminal."""
    with running_pomex(tmp_path / "pomex", arguments=("--port", str(free_port()), "--no-detect")) as started:
        yield started


@pytest.mark.parametrize("version", CODEX_VERSIONS)
def test_a_key_and_a_block_from_the_page_bring_codex_in_and_a_revoked_key_keeps_it_out(
        version, gateway, packages, pictures, tmp_path):
    with Walk("mouse", printed_link(gateway), packages, pictures) as walk:
        copied = walk.hear()
        codex = Codex(version, tmp_path / "codex", copied["block"], copied["key"])
        assert "What is 2 + 2?" in codex.exec("What is 2 + 2?").answer
        seen = walk.hear()
        assert f"A request was receivedDone. demo/echo, codex_exec/{version.replace('latest', '')}" in seen["steps"][3]
        assert "Its stream ended with response.completed" in seen["steps"][4]
        assert seen["greenMs"] < 3000                   # since the request began, Codex and all
        assert "/v1/responses" in seen["detail"] and "response.completed" in seen["detail"] and "codex_exec" in seen["detail"]
        assert "demo/echo" in seen["row"] and "laptop" in seen["row"] and "$0" in seen["row"] and "completed" in seen["row"]
        assert seen["endpoint"].startswith("/v1/responses")

        refused = codex.exec("And now?")
        assert refused.code != 0
        assert "Key laptop was revoked on" in refused.stdout + refused.stderr
        last = walk.hear()
        assert "The key was refused" in last["refused"] and "Key laptop was revoked" in last["refused"]
        assert last["refusedMs"] < 3000                 # a second until it is written, and one until it is looked for
        assert last["faults"] == []


def test_everything_from_the_login_to_a_revoked_key_goes_by_keyboard_with_the_focus_in_sight(gateway, packages):
    with Walk("keyboard", printed_link(gateway), packages) as walk:
        assert walk.hear()["faults"] == []


def test_while_there_is_no_key_and_no_request_every_page_says_what_to_do(packages, tmp_path):
    async def run():
        text = f'[server]\nport = 0\n[database]\nurl = "sqlite:{tmp_path}/p.db"\n'
        config = pomex.load_config(text, str(tmp_path / "pomex.toml"), {})
        with contextlib.closing(pomex.Ledger.open(config.database.place)) as ledger:
            async with pomex.running(config, ledger) as server:
                link = await pomex.open_session(ledger.db, "link", 0, 600, time.time())
                with Walk("empty", "http://%s:%d/admin#login=%s" % (*server.address, link), packages) as walk:
                    return await asyncio.to_thread(walk.hear)
    assert asyncio.run(run())["faults"] == []


def test_the_pictures_of_the_readme_show_a_request_that_failed_over_and_are_small(packages, pictures, tmp_path):
    async def run():
        async with dashboard_pictures.demo(tmp_path) as (base, token, key):
            with Walk("pictures", f"{base}/admin#login={token}", packages, pictures) as walk:
                await asyncio.to_thread(walk.hear)
                body = b'{"model": "team/coder", "input": "Does it build?", "stream": true}'
                ask = urllib.request.Request(f"{base}/v1/responses", body, {
                    "authorization": f"Bearer {key}", "content-type": "application/json", "user-agent": "builder/1.0"})
                assert b"response.completed" in await asyncio.to_thread(lambda: urllib.request.urlopen(ask).read())
                return await asyncio.to_thread(walk.hear)
    assert asyncio.run(run())["faults"] == []
    sizes = {name: (pictures / f"{name}.png").stat().st_size for name in ("overview", "request", "keys")}
    assert max(sizes.values()) < 65_000, sizes


# --- with many rows ---------------------------------------------------------------------------------

ROWS, MOST_MS = 100_000, 200
PAGES = {   # the page -> what it asks for
    "overview": "overview?since={today}&step=3600000&slots=24", "overview, 30 days": "overview?since={month}&step=86400000&slots=30",
    "keys": "keys", "usage": "usage", "usage of a result": "usage?result=failed&model=openai/gpt-5.3-codex",
    "usage by text": "usage?text=resp_", "a later page": "usage?cursor={middle}", "a request": "usage/{id}", "models": "models",
    "usage of a session": "usage?session=none", "usage of a client": "usage?client=codex", "audit": "audit",
    "providers": "providers", "set-up": "setup", "session": "session", "statement": "accounts/default/statement?month={this_month}"}


def test_with_100_000_rows_every_page_has_its_data_soon(tmp_path):
    async def run():
        async with dashboard_pictures.demo(tmp_path) as (base, _, _):
            with contextlib.closing(pomex.Ledger.open(str(tmp_path / "pictures.db"))) as ledger:
                config = pomex.load_config(dashboard_pictures.CONFIG.format(port=1), str(tmp_path / "pomex.toml"), {})
                made = itertools.islice(itertools.chain.from_iterable(
                    dashboard_pictures.month(ledger, config, time.time(), seed) for seed in itertools.count()), ROWS)
                while batch := list(itertools.islice(made, 1000)):
                    await ledger.db.write(lambda tx, batch=batch: pomex.insert_rows(tx, batch))
                (rows, middle), = await ledger.db.read("SELECT count(*), max(id) / 2 FROM usage")
                (found,), = await ledger.db.read("SELECT response_id FROM usage WHERE id = ?", middle)
                token = await pomex.open_session(ledger.db, "admin", 0, 600, time.time())
            assert rows >= ROWS
            day = time.time() // 86400 * 86_400_000
            words = {"today": int(day), "month": int(day) - 29 * 86_400_000, "middle": middle, "id": found, "this_month": time.strftime("%Y-%m")}
            cookie = {"cookie": f"pomex_{base.rpartition(':')[2]}={token}"}
            taken = {}
            for name, path in PAGES.items():
                request = urllib.request.Request(f"{base}/admin/api/{path.format(**words)}", headers=cookie)
                times = []
                for _ in range(5):
                    await asyncio.sleep(1.05 if name.startswith("overview") else 0)         # its answer is shared for a second
                    begun = time.monotonic()
                    assert json.loads(await asyncio.to_thread(lambda request=request: urllib.request.urlopen(request).read()))
                    times.append((time.monotonic() - begun) * 1000)
                taken[name] = round(statistics.median(times))
            return taken
    taken = asyncio.run(run())
    print(f"{ROWS} rows, ms: {taken}")
    assert max(taken.values()) < MOST_MS, taken
