"""Several processes on one database: one that stands still, two that are asked the same, and a backup that is restored."""
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

from test_money import ask, command, configuration, counting, read, serving

ADMIN = "an-admin-token-of-the-test"
STOPPED_S = 10.0


def test_while_a_process_stands_still_no_limit_is_exceeded_and_nothing_stays_reserved(tmp_path: Path) -> None:
    async def load() -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]]:
        async with counting(faults=False, modest=True, wait_s=1.0) as (_, origin):
            config = configuration(tmp_path, origin)
            key = command(config, "keys", "create", "k", "--budget", "0.02/day").strip()
            with serving(config, 2) as ((still, _), (still_port, port)):
                theirs = [asyncio.create_task(ask(still_port, key, number, "plain/m")) for number in range(6)]
                await asyncio.sleep(0.5)
                still.send_signal(signal.SIGSTOP)
                stopped = time.monotonic()
                ours: list[tuple[int, bytes]] = []
                while time.monotonic() - stopped < STOPPED_S:
                    first = 100 + len(ours)
                    ours += await asyncio.gather(*(ask(port, key, number, "plain/m") for number in range(first, first + 8)))
                    spent, granted = read(config, "SELECT spent, granted FROM meters WHERE owner LIKE 'key%'")[0]
                    assert spent + granted <= 20_000_000
                assert granted > 0, "what the stopped process holds is still held"
                still.send_signal(signal.SIGCONT)
                return await asyncio.gather(*theirs), ours
    theirs, ours = asyncio.run(load())
    served = sum(status == 200 for status, _ in ours)
    rows = read(tmp_path / "pomex.toml", "SELECT status, error_code, cost_nanos FROM usage")
    spent = sum(nanos for _, _, nanos in rows)
    print(f"6 requests of the stopped process and {served} of {len(ours)} of the other were served for {spent / 1e9:.4f} of 0.02 USD")
    assert all(status == 200 and b"event: response.completed" in data for status, data in theirs)
    assert 3 <= served < len(ours) and len(rows) == 6 + served and spent <= 20_000_000
    assert {code for _, code, _ in rows} == {""}
    assert read(tmp_path / "pomex.toml", "SELECT coalesce(sum(granted), 0), (SELECT count(*) FROM open_requests) FROM meters") == [(0, 0)]
    assert json.loads(command(tmp_path / "pomex.toml", "ledger", "verify", "--json"))["wrong"] == []


def admin(port: int, path: str) -> str:
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"authorization": f"Bearer {ADMIN}"})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


COUNTERS = re.compile(r"^pomex_(?!build|circuit)\w+(?:\{.*\})? .*", re.MULTILINE)


def test_two_processes_say_the_same_of_what_both_did(tmp_path: Path) -> None:
    async def load() -> None:
        async with counting(faults=False, modest=True, wait_s=1.5) as (_, origin):
            config = configuration(tmp_path, origin)
            config.write_text(config.read_text().replace("[server]", f'[server]\nadmin_token = "{ADMIN}"'))
            key = command(config, "keys", "create", "k", "--rpm", "20").strip()
            with serving(config, 2) as (_, ports):
                asked = [asyncio.create_task(ask(ports[number % 2], key, number, "plain/m")) for number in range(30)]
                await asyncio.sleep(1.0)
                assert [sum(each["open"] for each in await said(port, "providers", "providers")) for port in ports] == [20, 20]
                statuses = [status for status, _ in await asyncio.gather(*asked)]
                assert statuses.count(200) == 20 and statuses.count(429) == 10
                await asyncio.sleep(1.5)            # counts are saved once a second
                both = [COUNTERS.findall(await asyncio.to_thread(admin, port, "/metrics")) for port in ports]
                assert both[0] == both[1] and 'pomex_refusals_total{code="rate_limit_exceeded"} 10' in both[0]
                assert [await said(port, "overview", "totals") for port in ports][0]["requests"] == 20
                refused = [await said(port, "setup", "refused") for port in ports]
                assert refused[0] == refused[1] and sum(each["count"] for each in refused[0]) == 10
                tries = [await ask(port, key, 99, "plain/m") for port in ports]
                assert [status for status, _ in tries] == [200, 429] or [status for status, _ in tries] == [429, 429]
    asyncio.run(load())


async def said(port: int, path: str, name: str) -> Any:
    return json.loads(await asyncio.to_thread(admin, port, f"/admin/api/{path}"))[name]


def test_a_backup_is_restored_by_the_words_of_the_readme(tmp_path: Path) -> None:
    async def load(count: int, first: int) -> None:
        async with counting(faults=False, modest=True) as (_, origin):
            config = configuration(tmp_path, origin)
            with serving(config) as (_, (port,)):
                if first:
                    command(config, "backup", str(tmp_path / "saved.db"))
                assert all(status == 200 for status, _ in await asyncio.gather(
                    *(ask(port, key, number, "plain/m") for number in range(first, first + count))))
    config = configuration(tmp_path, "http://127.0.0.1:1")
    key = command(config, "keys", "create", "k", "--budget", "1/month").strip()
    asyncio.run(load(20, 0))
    asyncio.run(load(5, 100))
    assert len(read(config, "SELECT 1 FROM usage")) == 25
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{tmp_path}/pomex.db{suffix}")
    shutil.copy(tmp_path / "saved.db", tmp_path / "pomex.db")
    found = json.loads(command(config, "ledger", "verify", "--json"))
    assert found["wrong"] == [] and found["lines"] == 20
    asyncio.run(load(5, 0))
    assert len(read(config, "SELECT 1 FROM usage")) == 25 and json.loads(command(config, "ledger", "verify", "--json"))["wrong"] == []
