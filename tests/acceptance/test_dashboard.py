"""The dashboard in a real browser: Debian's chromium, driven by playwright-core, looked over by axe-core (npm)."""
import asyncio
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import time

import pytest
from harness import TOOLS, required

import pomex

HERE = pathlib.Path(__file__).resolve().parent
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
    shots = os.environ.get("POMEX_SHOTS", "")

    async def run():
        config = pomex.load_config(f'[server]\nport = 0\n[database]\nurl = "sqlite:{folder}/p.db"\n', str(folder / "pomex.toml"), {})
        with contextlib.closing(pomex.Ledger.open(config.database.path)) as ledger:
            key = ledger.create_key("walkers-own", time.time())
            async with pomex.running(config, ledger) as server:
                link = pomex.open_session(ledger, "link", 0, 600, time.time())
                process = await asyncio.create_subprocess_exec(
                    "node", str(HERE / "dashboard_driver.js"), "http://%s:%d" % server.address, link, key, shots,
                    stdout=subprocess.PIPE, env={**os.environ, "NODE_PATH": str(packages), "CHROMIUM": str(CHROMIUM)})
                out, _ = await process.communicate()
        return json.loads(out)
    return asyncio.run(run())


def test_the_walk_finds_everything_in_its_place(walk):
    assert {name: result for name, result in walk["checks"].items() if result is not True} == {}
    assert len(walk["checks"]) > 25


def test_no_console_error_no_other_host_no_csp_report_no_dialog_no_sideways_scroll(walk):
    assert walk["faults"] == []


def test_axe_finds_nothing_on_any_route_in_both_themes_at_both_widths(walk):
    assert walk["axe"] == []
