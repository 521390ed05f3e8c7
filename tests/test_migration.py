"""Layer 8: files of v00083, and of the programs between it and this schema, are taken over once, to the nano-dollar."""
import asyncio
import contextlib
import importlib.util
import os
import pathlib
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

import pomex

NOW = int(time.time())
TODAY = NOW // 86400
V00083 = "ed367ec"          # the commit whose program made the oldest files that are taken over
PRICE = "1.5 10.25 0.1 1.875 - -"

OLD_TABLES = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE keys (id INTEGER PRIMARY KEY, name TEXT NOT NULL, digest BLOB NOT NULL UNIQUE, hint TEXT NOT NULL, created_s INTEGER NOT NULL,
    expires_s INTEGER NOT NULL DEFAULT 0, revoked_s INTEGER NOT NULL DEFAULT 0, account_id INTEGER NOT NULL DEFAULT 1,
    models TEXT NOT NULL DEFAULT '', budget_nanos INTEGER, period TEXT NOT NULL DEFAULT 'month', rpm INTEGER NOT NULL DEFAULT 0,
    tpm INTEGER NOT NULL DEFAULT 0, concurrent INTEGER NOT NULL DEFAULT 0);
CREATE UNIQUE INDEX keys_active ON keys (name) WHERE revoked_s = 0;
CREATE TRIGGER keys_UPDATE AFTER UPDATE ON keys BEGIN UPDATE settings SET value = value + 1 WHERE name = 'keys_revision'; END;
CREATE TABLE usage (id INTEGER PRIMARY KEY, response_id TEXT NOT NULL UNIQUE, request_id TEXT NOT NULL, started_ms INTEGER NOT NULL,
    key_id INTEGER NOT NULL, endpoint TEXT NOT NULL, model TEXT NOT NULL, provider TEXT NOT NULL, upstream_model TEXT NOT NULL,
    status TEXT NOT NULL, error_code TEXT NOT NULL, terminal_by TEXT NOT NULL, estimated TEXT NOT NULL, input INTEGER NOT NULL,
    cached INTEGER NOT NULL, cache_write INTEGER NOT NULL, output INTEGER NOT NULL, reasoning INTEGER NOT NULL, first_ms INTEGER NOT NULL,
    total_ms INTEGER NOT NULL, attempts INTEGER NOT NULL, account_id INTEGER NOT NULL DEFAULT 1, cache_write_1h INTEGER NOT NULL DEFAULT 0,
    web_searches INTEGER NOT NULL DEFAULT 0, price TEXT NOT NULL DEFAULT '', multiplier INTEGER NOT NULL DEFAULT 1000000,
    cost_nanos INTEGER NOT NULL DEFAULT 0);
CREATE TABLE accounts (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, prepaid INTEGER NOT NULL DEFAULT 0, limit_nanos INTEGER,
    multiplier INTEGER NOT NULL DEFAULT 1000000, created_s INTEGER NOT NULL);
CREATE TABLE credits (id INTEGER PRIMARY KEY, account_id INTEGER NOT NULL, created_s INTEGER NOT NULL, kind TEXT NOT NULL,
    nanos INTEGER NOT NULL, reason TEXT NOT NULL);
CREATE TRIGGER credits_DELETE BEFORE DELETE ON credits BEGIN SELECT raise(ABORT, 'credit entries stay'); END;
CREATE TABLE attempts (response_id TEXT NOT NULL, attempt INTEGER NOT NULL, provider TEXT NOT NULL, upstream_model TEXT NOT NULL,
    error_code TEXT NOT NULL, estimated TEXT NOT NULL, input INTEGER NOT NULL, cached INTEGER NOT NULL, cache_write INTEGER NOT NULL,
    output INTEGER NOT NULL, reasoning INTEGER NOT NULL, cache_write_1h INTEGER NOT NULL, web_searches INTEGER NOT NULL, price TEXT NOT NULL,
    multiplier INTEGER NOT NULL, cost_nanos INTEGER NOT NULL, PRIMARY KEY (response_id, attempt)) WITHOUT ROWID;
CREATE TABLE daily (day INTEGER NOT NULL, key_id INTEGER NOT NULL, account_id INTEGER NOT NULL, model TEXT NOT NULL, provider TEXT NOT NULL,
    endpoint TEXT NOT NULL, requests INTEGER NOT NULL, failed INTEGER NOT NULL, estimated INTEGER NOT NULL, unpriced INTEGER NOT NULL,
    input INTEGER NOT NULL, cached INTEGER NOT NULL, cache_write INTEGER NOT NULL, output INTEGER NOT NULL, reasoning INTEGER NOT NULL,
    cost_nanos INTEGER NOT NULL, last_ms INTEGER NOT NULL, PRIMARY KEY (day, key_id, account_id, model, provider, endpoint)) WITHOUT ROWID;
CREATE TABLE leases (meter TEXT NOT NULL, slot INTEGER NOT NULL, process TEXT NOT NULL, amount INTEGER NOT NULL, expires_s REAL NOT NULL,
    PRIMARY KEY (meter, slot, process)) WITHOUT ROWID;
CREATE TABLE sessions (digest BLOB PRIMARY KEY, kind TEXT NOT NULL, key_id INTEGER NOT NULL, expires_s INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX usage_started ON usage (started_ms);
INSERT INTO settings VALUES ('keys_revision', 7), ('disabled/azure', 1), ('pruned_day', {pruned});
INSERT INTO settings VALUES ('secret', x'00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff');
INSERT INTO accounts VALUES (1, 'default', 0, NULL, 1000000, 1), (2, 'acme', 1, 50000000000, 1200000, 2);
INSERT INTO keys (id, name, digest, hint, created_s, account_id, budget_nanos, rpm) VALUES (3, 'ci', x'{digest}', 'sk-rh-abcd…wxyz', 5, 2, 9000000000, 30);
INSERT INTO credits VALUES (1, 2, 5, 'top-up', 20000000000, ''), (2, 2, 6, 'adjustment', -1000000000, 'double');
INSERT INTO leases VALUES ('key 3 0', 0, 'dead', 12345, 1e12);
INSERT INTO usage VALUES (9, 'r1', 'q1', {now_ms}, 3, '/v1/responses', 'm', 'openai', 'gpt', 'completed', '', 'upstream', '', 1000, 400, 0, 50, 0,
    5, 60, 2, 2, 0, 0, '1.5 10.25 0.1 1.875 - -', 1200000, 1743000);
INSERT INTO attempts VALUES ('r1', 1, 'azure', 'g', 'server_error', '', 10, 0, 0, 5, 0, 0, 0, '2 10 - - - -', 1200000, 84000);
INSERT INTO daily VALUES ({today}, 3, 2, 'm', 'openai', '/v1/responses', 1, 0, 0, 0, 1000, 400, 0, 50, 0, 1743000, {now_ms}),
    ({today}, 3, 2, 'm', 'azure', '/v1/responses', 0, 0, 0, 0, 10, 0, 0, 5, 0, 84000, {now_ms}),
    ({old}, 3, 2, 'm', 'openai', '/v1/responses', 40, 7, 3, 2, 5000, 100, 0, 900, 30, 7000000001, {old_ms});
PRAGMA application_id = 1349479800;
"""
TOKEN = "sk-rh-" + "a" * 28 + pomex.key_check("a" * 28)
def old_file(path, version=3, more=""):
    texts = {"now_ms": NOW * 1000, "today": TODAY, "old": TODAY - 40, "old_ms": (TODAY - 40) * 86_400_000 + 5, "pruned": TODAY - 10,
             "digest": pomex.key_digest(TOKEN)}
    pathlib.Path(path).parent.mkdir(exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(OLD_TABLES.format(**texts) + more + f"PRAGMA user_version = {version};")
    return path


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "state" / "pomex.db")


def read(path, sql):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


ADDED_LATER = ("ALTER TABLE keys ADD COLUMN allow_unpriced INTEGER NOT NULL DEFAULT 0; UPDATE keys SET allow_unpriced = 1;"
               "ALTER TABLE usage ADD COLUMN served_model TEXT NOT NULL DEFAULT ''; UPDATE usage SET served_model = 'gpt-mini';")


@pytest.mark.parametrize("version, more, later", [(3, "", (0, "")), (4, ADDED_LATER, (1, "gpt-mini"))], ids=["v00083", "its successor"])
def test_keys_accounts_rows_and_sums_are_taken_over(path, version, more, later):
    old_file(path, version, more)

    async def check(ledger):
        key = await ledger.authorise(f"Bearer {TOKEN}", NOW)
        assert (key.id, key.name, key.account, key.budget_nanos, key.rpm, key.prepaid) == (3, "ci", "acme", 9_000_000_000, 30, 1)
        assert ledger.secret.hex() == "00112233445566778899aabbccddeeff" * 2 and ledger.disabled == {"azure"}
        acme = (await pomex.list_accounts(ledger.db, NOW))[1]
        assert (acme["credit_nanos"], acme["spent_nanos"]) == (19_000_000_000, 7_000_000_001 + 1_743_000 + 84_000)
        days = {row["day"]: row for row in await pomex.usage_report(ledger.db, "day", 0, 10**6)}
        old = days[pomex.day_text(TODAY - 40)]
        assert [old[name] for name in pomex.SUMS] == [40, 7, 3, 2, 5000, 100, 0, 900, 30, 7_000_000_001, 0]
        assert days[pomex.day_text(TODAY)]["requests"] == 1 and days[pomex.day_text(TODAY)]["input"] == 1010
        assert await ledger.db.read("SELECT started_ms, result, last_ms FROM usage_rollups WHERE result = 'unknown'") == [
            ((TODAY - 40) * pomex.DAY_MS, "unknown", (TODAY - 40) * pomex.DAY_MS + 5)]
        *_, row = lines = await pomex.one_request(ledger.db, "r1", 0)
        assert (row["result"], row["cost_nanos"], row["lost_nanos"], row["saved_nanos"]) == ("failed over", 1_743_000, 84_000, 560_000)
        assert [(line["attempt"], line["final"], line["status"], line["provider"]) for line in lines] == [
            (1, 0, "lost", "azure"), (2, 1, "completed", "openai")]
        assert (key.allow_unpriced, row["served_model"]) == later
        assert await pomex.verify(ledger.db) == (2, [])
    with contextlib.closing(pomex.Ledger.open(path)) as ledger:
        asyncio.run(check(ledger))
    assert sorted(os.listdir(os.path.dirname(path))) == ["pomex.db", "pomex.db.before-5"]
    assert read(path + ".before-5", "PRAGMA user_version") == [(version,)] and os.stat(path + ".before-5").st_mode & 0o777 == 0o600
    assert not [name for name, in read(path, "SELECT name FROM sqlite_master") if name.startswith("old_") or name == "leases"]
    pomex.Ledger.open(path).close()         # once: nothing is taken over again
    assert len(read(path, "SELECT 1 FROM usage")) == 2


def test_a_file_with_a_journal_of_v00083_is_refused_until_that_has_finished_it(path):
    file = pathlib.Path(old_file(path) + "-requests-0123456789ab")
    file.write_text('I["r3", "q3"]\n')
    with pytest.raises(pomex.LedgerError) as refused:
        pomex.Ledger.open(path)
    assert str(refused.value) == (
        "The database pomex.db is in use by v00083, or has requests that v00083 has not billed yet (in pomex.db-requests-0123456789ab "
        "beside it). Start and stop v00083 once, then start this version.")
    assert read(path, "PRAGMA user_version") == [(3,)] and file.exists() and not os.path.exists(path + ".before-5")
    file.unlink()
    pomex.Ledger.open(path).close()
    assert read(path, "PRAGMA user_version") == [(pomex.SCHEMA_VERSION,)]


def test_an_upgrade_that_fails_changes_nothing(path, monkeypatch):
    old_file(path)
    with monkeypatch.context() as patch:
        patch.setattr(pomex, "SCHEMA", (*pomex.SCHEMA, "CREATE TABLE keys (id)"))
        with pytest.raises(pomex.LedgerError, match="already exists"):
            pomex.Ledger.open(path)
    assert read(path, "PRAGMA user_version") == [(3,)] and len(read(path, "SELECT 1 FROM attempts")) == 1
    pomex.Ledger.open(path).close()
    assert read(path, "PRAGMA user_version") == [(pomex.SCHEMA_VERSION,)]


# --- with the old program itself ------------------------------------------------------------------

@pytest.fixture(scope="module")
def v00083(tmp_path_factory):
    found = subprocess.run(["git", "-C", REPOSITORY, "show", f"{V00083}:pomex.py"], capture_output=True)
    if found.returncode:
        pytest.skip(f"commit {V00083} is not in this clone")
    file = tmp_path_factory.mktemp("old") / "pomex_v00083.py"
    file.write_bytes(found.stdout)
    spec = importlib.util.spec_from_file_location("pomex_v00083", file)
    module = sys.modules["pomex_v00083"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(old, path, count):
    """A file of v00083 with so many requests in 60 days, failover and prepaid accounts among them, and its reports."""
    chance = random.Random(count)
    ledger = old.Ledger.open(path)
    ledger.create_key("a", NOW)
    ledger.create_key("b", NOW, budget_nanos=10**12)
    old.create_account(ledger, "acme", True, None, 1_200_000, NOW)
    old.add_credit(ledger, "acme", 500 * 10**9, "", NOW - 50 * 86400)
    ledger.create_key("c", NOW, account_id=2)
    entries = []
    for number in range(count):
        started_ms, key_id = NOW * 1000 - chance.randrange(60 * pomex.DAY_MS), chance.choice([1, 2, 3])
        tokens = old.Usage(chance.randrange(1, 5000), output=chance.randrange(900))
        usage = old.Usage(tokens.input, chance.randrange(tokens.input), 0, tokens.output)
        name, multiplier = f"resp_{started_ms:012x}{number:020x}", 1_200_000 if key_id == 3 else old.ONE
        price, status = chance.choice([PRICE, PRICE, PRICE, ""]), chance.choice(["completed"] * 8 + ["failed", "cancelled", "incomplete"])
        lost = (old.Line(name, 1, "azure", "gpt", "server_error", "", usage.input, 0, 0, 3, 0, 0, 0, PRICE, multiplier,
                         old.cost_nanos(PRICE, multiplier, old.Usage(usage.input, output=3))),) if number % 37 == 0 else ()
        entries.append(old.Entry(
            name, "req", started_ms, key_id, "/v1/responses", f"plain/m{number % 5}", "plain", "m", status, "", "upstream", "cut" * (number % 11 == 0),
            usage.input, usage.cached, 0, usage.output, 0, 5, 50, 1 + bool(lost), 2 if key_id == 3 else 1, 0, 0, price, multiplier,
            old.cost_nanos(price, multiplier, usage), lost))
    for start in range(0, count, 1000):
        old.insert_entries(ledger._writer, entries[start:start + 1000])
    return ledger


def reports_of(old, ledger):
    month = old.month_bounds(time.strftime("%Y-%m", time.gmtime(NOW)))
    return ({by: old.usage_report(ledger, by, 0, 10**6) for by in old.REPORT_BY}, [old.statement_rows(ledger, account, *month) for account in (1, 2)],
            [(each.name, each.credit_nanos, each.spent_nanos, each.month_nanos) for each in old.list_accounts(ledger, NOW)])


def without_saved(rows):
    return [{name: value for name, value in row.items() if name != "saved_nanos"} for row in rows]


async def reports(ledger):
    db, month = ledger.db, pomex.month_bounds(time.strftime("%Y-%m", time.gmtime(NOW)))
    statements = [await pomex.statement_rows(db, account, *month) for account in (1, 2)]
    return ({by: without_saved(await pomex.usage_report(db, by, 0, 10**6)) for by in pomex.REPORT_BY},
            [{**bill, "charges": without_saved(bill["charges"])} for bill in statements],
            [tuple(each[name] for name in ("name", "credit_nanos", "spent_nanos", "month_nanos")) for each in await pomex.list_accounts(db, NOW)])


@pytest.mark.parametrize("count, pruned", [(3000, False), (3000, True), (100_000, True)], ids=["whole", "pruned", "100,000 rows, pruned"])
def test_every_report_is_the_same_to_the_nano_dollar(v00083, path, count, pruned):
    with contextlib.closing(fill(v00083, path, count)) as ledger:
        if pruned:
            assert v00083.prune(ledger, TODAY - 20) > count / 2
        before = reports_of(v00083, ledger)
        checked, wrong = v00083.verify(ledger)
        assert not wrong
    with contextlib.closing(pomex.Ledger.open(path)) as ledger:
        assert asyncio.run(reports(ledger)) == before
        assert asyncio.run(pomex.verify(ledger.db)) == (checked, [])
    with contextlib.closing(v00083.Ledger.open(path + ".before-5")) as copy:
        assert reports_of(v00083, copy) == before and v00083.verify(copy) == (checked, [])


KILLED = """
import asyncio, os, signal, sys
sys.path.insert(0, sys.argv[1])
import pomex_v00083 as old
async def main():
    ledger = old.Ledger.open(sys.argv[2])
    ledger.start(asyncio.get_running_loop())
    await ledger.begin(old.Intent("r3", "q3", 1, 1, "/v1/responses", "m", 1, "openai", "gpt", 20, "1 1 - - - -", old.ONE, 20_000))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


def test_what_a_killed_v00083_left_is_billed_by_its_next_start_and_then_taken_over(v00083, path):
    v00083.Ledger.open(path).close()
    ended = subprocess.run([sys.executable, "-c", KILLED, os.path.dirname(v00083.__file__), path], timeout=20)
    assert ended.returncode == -signal.SIGKILL
    for _ in range(2):
        with pytest.raises(pomex.LedgerError, match="Start and stop v00083 once"):
            pomex.Ledger.open(path)
    v00083.Ledger.open(path).close()
    pomex.Ledger.open(path).close()
    assert read(path, "SELECT response_id, status, error_code, cost_nanos FROM usage") == [("r3", "failed", "interrupted", 20_000)]


def test_killed_in_the_middle_the_file_is_as_it_was(v00083, path):
    with contextlib.closing(fill(v00083, path, 20_000)) as ledger:
        before = reports_of(v00083, ledger)
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for delay_s in (0.05, 0.3):
        opening = subprocess.Popen([sys.executable, "-c", "import pomex, sys; print(1, flush=True); pomex.Ledger.open(sys.argv[1])", path],
                                   env=environ, stdout=subprocess.PIPE)
        opening.stdout.readline()
        time.sleep(delay_s)
        opening.send_signal(signal.SIGKILL)
        opening.communicate()
        assert read(path, "PRAGMA user_version") == [(3,)], "it was done already: the file is too small"
    with contextlib.closing(v00083.Ledger.open(path)) as ledger:
        assert reports_of(v00083, ledger) == before
    with contextlib.closing(pomex.Ledger.open(path)) as ledger:
        assert asyncio.run(reports(ledger)) == before
