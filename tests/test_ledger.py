"""Layer 8: keys, the journal and the usage table, over real files and real processes."""
import asyncio
import contextlib
import os
import pathlib
import re
import sqlite3
import stat
import subprocess
import sys
import time

import pomex
import pytest
from ledgers import first_schema, recent, totals

NOW = 1_763_629_920.0       # 2025-11-20 09:12 UTC


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "state" / "pomex.db")


@pytest.fixture
def ledger(path):
    ledger = pomex.Ledger.open(path)
    yield ledger
    ledger.close()


def intent(response_id, **more):
    return pomex.Intent(response_id, "req_1", 1_700_000_000_000, 1, "responses", "demo/echo")._replace(**more)


def entry(response_id, **more):
    return pomex.Entry(*intent(response_id)[:6], input=9, cached=4, output=3, reasoning=1)._replace(**more)


@contextlib.asynccontextmanager
async def started(path, durability="process"):
    ledger = pomex.Ledger.open(path, durability)
    ledger.start()
    try:
        yield ledger
    finally:
        ledger.close()


async def until(condition, within_s=3.0):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def rows(path):
    """The table as it is after whoever had it open is gone: (response_id, status, error_code), in order."""
    ledger = pomex.Ledger.open(path)
    try:
        got = recent(ledger, 10 ** 6)
        return sorted((row["response_id"], row["status"], row["error_code"]) for row in got)
    finally:
        ledger.close()


def journals(path):
    return sorted(pathlib.Path(path).parent.glob("*-requests-*"))


def child(code, *arguments, **options):
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(pomex.__file__))}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environ, **options)


# --- keys -----------------------------------------------------------------------------------------

def test_a_key_is_random_has_a_checksum_and_is_stored_as_its_digest_only(ledger, path):
    tokens = {ledger.create_key(f"k{n}", NOW) for n in range(20)}
    assert len(tokens) == 20
    for token in tokens:
        assert re.fullmatch(r"sk-rh-[0-9A-Za-z]{32}", token)
        assert token.encode() not in b"".join(p.read_bytes() for p in pathlib.Path(path).parent.iterdir())
    key = ledger.list_keys()[0]
    assert (key.name, key.created_s, key.expires_s, key.revoked_s) == ("k0", int(NOW), 0, 0)
    assert key.hint in {f"{t[:10]}…{t[-4:]}" for t in tokens}


def test_a_known_key_is_authorised_whatever_the_case_of_bearer(ledger):
    token = ledger.create_key("laptop", NOW)
    for header in (f"Bearer {token}", f"bearer {token}", f"BEARER  {token} "):
        assert ledger.authorise(header, NOW).name == "laptop"


KNOWN_SHAPE = "sk-rh-" + "a" * 28
UNKNOWN = KNOWN_SHAPE + pomex.key_check("a" * 28)
NO_KEY = ("No API key was sent. Codex reads it from the variable named by env_key: export POMEX_API_KEY in "
          "this shell, then start codex again.")
OTHER = ("This looks like another provider's key. Clients need a Pomex key (sk-rh-…); the provider's key "
         "belongs in Pomex's config.")
PLACEHOLDER = "That is the guide's placeholder (sk-rh-xxxxxxxxxxxx). Put your own key into POMEX_API_KEY."
LITERAL = 'The key arrived as the text "%s"; the shell did not expand it. Use double quotes.'
NOT_OURS = "This is no Pomex key: those begin with sk-rh-. List keys with: python pomex.py keys list"
TWICE = 'The key was sent with "Bearer " in it. Put the key alone, from sk-rh- on, into POMEX_API_KEY.'
SCHEME = "The Authorization header must read: Bearer sk-rh-…"
CUT = "This key is mistyped or cut (sk-rh-…): its checksum does not fit. Copy the whole key again."
REFUSED = {
    "": NO_KEY,
    "   ": NO_KEY,
    "Bearer": NO_KEY,
    "Bearer ": NO_KEY,
    "Bearer sk-rh-xxxxxxxxxxxx": PLACEHOLDER,
    "Bearer sk-rh-" + "x" * 32: PLACEHOLDER,
    "Bearer $POMEX_API_KEY": LITERAL % "$POMEX_API_KEY",
    "Bearer ${POMEX_API_KEY}": LITERAL % "${POMEX_API_KEY}",
    "Bearer %POMEX_API_KEY%": LITERAL % "%POMEX_API_KEY%",
    "Bearer $env:POMEX_API_KEY": LITERAL % "$env:POMEX_API_KEY",
    "Bearer sk-ant-REDACTED": OTHER,
    "Bearer sk-proj-abcdefghijklmnopqrstuvwxyz": OTHER,
    "Bearer AIzaSyA-abcdefghijklmnop": OTHER,
    "Bearer $secret": NOT_OURS,
    "Bearer bad": NOT_OURS,
    "Bearer Bearer bad": TWICE,
    f"Bearer Bearer {UNKNOWN}": TWICE,
    f"Bearer bearer  {UNKNOWN}": TWICE,
    "Bearer gsk_abcdefghijklmnop": OTHER,
    "Bearer sk-or-v1-abcdef": OTHER,
    "Basic dXNlcjpwYXNz": SCHEME,
    UNKNOWN: SCHEME,
    f"Bearer {UNKNOWN}": f"This key is not known here (sk-rh-aaaa…{UNKNOWN[-4:]}). "
                         "List keys with: python pomex.py keys list",
    f"Bearer {KNOWN_SHAPE}bcde": CUT.replace("sk-rh-…", "sk-rh-aaaa…bcde"),
    "Bearer sk-rh-": CUT,
    "Bearer sk-rh-abcd1234": CUT,
    "Bearer sk-rh-" + "é" * 32: CUT,
    "Bearer sk-rh-" + "a" * 30 + "\n\x1b": CUT,
    "Bearer kéy\xff": NOT_OURS,
    "Bearer \ud800": NOT_OURS,
}


@pytest.mark.parametrize("header", REFUSED, ids=ascii)
def test_a_refused_header_is_answered_with_the_sentence_that_helps(ledger, header):
    with pytest.raises(pomex.Unauthorized) as refused:
        ledger.authorise(header, NOW)
    assert str(refused.value) == REFUSED[header]
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    assert ("www-authenticate", "Bearer") in refused.value.headers


def test_every_mistyped_character_is_told_apart_from_an_unknown_key(ledger):
    token = ledger.create_key("laptop", NOW)
    wrong = [token[:at] + other + token[at + 1:] for at in range(6, len(token)) for other in "0Zk"
             if token[at] != other]
    for mistyped in [*wrong, token[:-1], token + "a"]:
        with pytest.raises(pomex.Unauthorized, match="mistyped or cut"):
            ledger.authorise(f"Bearer {mistyped}", NOW)


def test_a_revoked_key_says_when_and_its_name_is_free_again(ledger):
    token = ledger.create_key("ci", NOW - 60)
    key = ledger.revoke_key("ci", NOW)
    assert (key.name, key.revoked_s) == ("ci", int(NOW))
    with pytest.raises(pomex.Unauthorized, match=r"^Key ci was revoked on 2025-11-20 09:12\.$"):
        ledger.authorise(f"Bearer {token}", NOW)
    second = ledger.create_key("ci", NOW)
    assert ledger.authorise(f"Bearer {second}", NOW).name == "ci"
    with pytest.raises(pomex.Unauthorized):
        ledger.authorise(f"Bearer {token}", NOW)


def test_an_expired_key_says_when(ledger):
    token = ledger.create_key("ci", NOW, expires_s=int(NOW) + 60)
    assert ledger.authorise(f"Bearer {token}", NOW + 59)
    with pytest.raises(pomex.Unauthorized, match=r"^Key ci expired on 2025-11-20 09:13\.$"):
        ledger.authorise(f"Bearer {token}", NOW + 60)


@pytest.mark.parametrize("name", ["", " ", "-x", "a b", "a/b", "a\n", "ü", "x" * 65, "'; DROP TABLE keys"])
def test_a_key_name_that_could_spoil_a_line_is_refused(ledger, name):
    with pytest.raises(pomex.BadRequest):
        ledger.create_key(name, NOW)


def test_a_name_is_unique_among_active_keys_and_only_those_can_be_revoked(ledger):
    ledger.create_key("ci", NOW)
    with pytest.raises(pomex.BadRequest, match="key named ci already that is not revoked"):
        ledger.create_key("ci", NOW)
    with pytest.raises(pomex.BadRequest, match="no active key"):
        ledger.revoke_key("other", NOW)


def test_a_key_made_or_revoked_by_another_process_is_seen_within_a_second(ledger, path):
    keys = ("import pomex, sys; ledger = pomex.Ledger.open(sys.argv[1]); print(ledger.create_key('a', 1));"
            "ledger.create_key('b', 1); ledger.close()")
    mine = ledger.create_key("mine", NOW)
    assert ledger.authorise(f"Bearer {mine}", NOW)
    made = child(keys, path, stdout=subprocess.PIPE, text=True).communicate()[0].strip()
    assert ledger.authorise(f"Bearer {made}", NOW + 1).name == "a"
    code = "import pomex, sys; ledger = pomex.Ledger.open(sys.argv[1]); ledger.revoke_key('a', 1)"
    assert child(code, path).wait() == 0
    with pytest.raises(pomex.Unauthorized, match="revoked"):
        ledger.authorise(f"Bearer {made}", NOW + 2)
    assert ledger.authorise(f"Bearer {mine}", NOW - 5000)      # a clock set back does not stop the looking


# --- the file -------------------------------------------------------------------------------------

def test_all_files_are_for_their_user_alone(path):
    old = os.umask(0)
    try:
        async def check():
            async with started(path) as ledger:
                ledger.create_key("a", NOW)
                await ledger.begin(intent("r1"))
                folder = pathlib.Path(path).parent
                assert stat.S_IMODE(folder.stat().st_mode) == 0o700
                modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}
                assert len(modes) == 4 and set(modes.values()) == {0o600}, modes
        asyncio.run(check())
        os.chmod(path, 0o644)
        pomex.Ledger.open(path).close()
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    finally:
        os.umask(old)


def test_the_secret_is_made_once_and_stays(path):
    first = pomex.Ledger.open(path)
    second = pomex.Ledger.open(path)
    assert len(first.secret) == 32 and first.secret == second.secret
    first.close()
    second.close()


def test_processes_that_open_a_new_file_at_once_agree(path):
    code = "import pomex, sys; print(pomex.Ledger.open(sys.argv[1]).secret.hex())"
    processes = [child(code, path, stdout=subprocess.PIPE) for _ in range(3)]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert [process.returncode for process in processes] == [0] * 3


def write_garbage(path):
    pathlib.Path(path).write_bytes(b"This is a text file, not a database. " * 200)


def write_damaged(path):
    pomex.Ledger.open(path).close()
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(os.urandom(os.path.getsize(path) - 100))


def write_foreign(path):
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE bookmarks (url)")
    db.close()


def write_newer(path):
    pomex.Ledger.open(path).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {len(pomex.MIGRATIONS) + 1}")
    db.close()


UNUSABLE = [
    (write_garbage, "not a SQLite database"),
    (write_damaged, "damaged"),
    (write_foreign, "belongs to another program"),
    (write_newer, "newer Pomex"),
    (os.mkdir, "cannot be used: Is a directory"),
]


@pytest.mark.parametrize("spoil, words", UNUSABLE, ids=lambda value: getattr(value, "__name__", ""))
def test_an_unusable_file_is_refused_with_a_sentence_and_left_alone(tmp_path, spoil, words):
    path = str(tmp_path / "pomex.db")
    spoil(path)
    before = os.path.isfile(path) and pathlib.Path(path).read_bytes()
    with pytest.raises(pomex.LedgerError, match=words) as refused:
        pomex.Ledger.open(path)
    assert str(refused.value).startswith("The database pomex.db ") and str(tmp_path) not in str(refused.value)
    assert (refused.value.status, refused.value.code) == (503, "ledger_unavailable")
    assert before == (os.path.isfile(path) and pathlib.Path(path).read_bytes())


@contextlib.contextmanager
def as_nobody():
    """Root may write read-only files: where the tests run as root, as another user for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX")
@pytest.mark.parametrize("file_mode, folder_mode", [(0o444, 0o755), (0o666, 0o555)], ids=["file", "folder"])
def test_a_read_only_place_is_refused_with_a_sentence(file_mode, folder_mode, tmp_path):
    folder = pathlib.Path("/tmp" if os.geteuid() == 0 else tmp_path) / f"pomex-test-{os.getpid()}"
    folder.mkdir()
    path = str(folder / "pomex.db")
    try:
        pomex.Ledger.open(path).close()
        os.chmod(path, file_mode)
        os.chmod(folder, folder_mode)
        with as_nobody(), pytest.raises(pomex.LedgerError, match="read-only|permissions") as refused:
            pomex.Ledger.open(path)
        assert str(folder) not in str(refused.value)
    finally:
        os.chmod(folder, 0o700)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_an_older_file_is_upgraded_in_place(path, monkeypatch):
    first = pomex.Ledger.open(path)
    token = first.create_key("ci", NOW)
    first.close()
    step = ("CREATE TABLE novelties (id INTEGER PRIMARY KEY)",)
    monkeypatch.setattr(pomex, "MIGRATIONS", [*pomex.MIGRATIONS, step])
    second = pomex.Ledger.open(path)
    assert second.secret == first.secret and second.authorise(f"Bearer {token}", NOW)
    assert second.read("SELECT count(*) FROM novelties") == [(0,)]
    second.close()


def test_an_upgrade_that_fails_changes_nothing(path, monkeypatch):
    pomex.Ledger.open(path).close()
    step = ("CREATE TABLE novelties (id INTEGER PRIMARY KEY)", "CREATE TABLE keys (id)")
    with monkeypatch.context() as patch:
        patch.setattr(pomex, "MIGRATIONS", [*pomex.MIGRATIONS, step])
        with pytest.raises(pomex.LedgerError):
            pomex.Ledger.open(path)
    ledger = pomex.Ledger.open(path)
    assert ledger.read("SELECT count(*) FROM sqlite_master WHERE name = 'novelties'") == [(0,)]
    ledger.close()


# --- requests -------------------------------------------------------------------------------------

def test_a_settled_request_is_one_row_that_says_what_was_said(path):
    async def check():
        async with started(path) as ledger:
            token = ledger.create_key("laptop", NOW)
            key = ledger.authorise(f"Bearer {token}", NOW)
            await ledger.begin(intent("r1", key_id=key.id))
            said = entry("r1", key_id=key.id, provider="demo", estimated="cut")
            await ledger.settle(said)
            await until(lambda: recent(ledger, 5))
            row, = recent(ledger, 5)
            assert {**row, "lost": ()} == {"key": "laptop", **said._asdict()}
            assert totals(ledger) == {"requests": 1, "input": 9, "cached": 4, "cache_write": 0, "output": 3,
                                       "reasoning": 1, "cost_nanos": 0}
    asyncio.run(check())
    assert journals(path) == []


def test_of_several_settlements_of_one_response_the_first_counts(path):
    async def check():
        async with started(path) as ledger:
            await ledger.settle(entry("r1"))                            # without an intent
            await ledger.settle(entry("r1", status="failed"))       # while the first is not in the table yet
            await until(lambda: recent(ledger, 5))
            await ledger.settle(entry("r1", status="cancelled"))    # and after
            await ledger.settle(entry("r2"))
    asyncio.run(check())
    assert rows(path) == [("r1", "completed", ""), ("r2", "completed", "")]


def test_a_settlement_whose_caller_is_cancelled_is_not_lost(path):
    async def check():
        async with started(path, "power") as ledger:
            await ledger.begin(intent("r1"))
            task = asyncio.ensure_future(ledger.settle(entry("r1")))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    asyncio.run(check())
    assert rows(path) == [("r1", "completed", "")]


HOSTILE = {"huge": {"input": 10 ** 30}, "negative": {"output": -5}, "surrogate": {"model": "demo/\ud800"},
           "nul": {"model": "a\0b"}, "newline": {"error_code": "a\nb\r"}, "quote": {"model": "');"},
           "not a number": {"input": 1.5}, "infinite": {"input": float("inf")}, "none": {"output": None}}


def test_a_row_of_odd_values_is_stored_and_does_not_stop_the_others(path):
    async def check():
        async with started(path) as ledger:
            for name, fields in HOSTILE.items():
                await ledger.settle(entry(name, **fields))
            await ledger.settle(entry("plain"))
            await until(lambda: totals(ledger)["requests"] == len(HOSTILE) + 1)
            assert ledger.healthy
    asyncio.run(check())
    assert {row[0] for row in rows(path)} == {*HOSTILE, "plain"}


def test_what_was_begun_and_never_settled_is_interrupted_at_the_next_start_once(path):
    async def check():
        async with started(path) as ledger:
            await ledger.begin(intent("r1"))
            await ledger.begin(intent("r2"))
            await ledger.settle(entry("r2"))
    asyncio.run(check())
    assert rows(path) == rows(path) == [("r1", "failed", "interrupted"), ("r2", "completed", "")]
    assert journals(path) == []


def test_a_journal_cut_anywhere_gives_its_whole_lines(path):
    lines = [pomex.journal_line(intent("r1")), pomex.journal_line(entry("r1")), pomex.journal_line(intent("r2"))]
    text = b"".join(lines)
    expected = [[], [("r1", "interrupted")], [("r1", "")], [("r1", ""), ("r2", "interrupted")]]
    for cut in range(len(text) + 1):
        whole = text[:text.rfind(b"\n", 0, cut) + 1]
        got = [(row.response_id, row.error_code) for row in pomex.journal_entries(whole)]
        assert got == expected[whole.count(b"\n")], cut
    garbage = b"\xff\x00\nS[]\nS{}\nI[1,2]\nnull\n\n" + text
    assert [row.response_id for row in pomex.journal_entries(garbage)] == ["r1", "r2"]


def test_a_long_journal_is_renewed_and_keeps_what_still_matters(path, monkeypatch):
    monkeypatch.setattr(pomex, "JOURNAL_BYTES", 1000)

    async def check():
        async with started(path) as ledger:
            await ledger.begin(intent("long"))
            for turn in range(3):
                for number in range(20):
                    await ledger.begin(intent(f"r{turn}-{number}"))
                    await ledger.settle(entry(f"r{turn}-{number}"))
                await until(lambda turn=turn: totals(ledger)["requests"] == 20 * turn + 20)
                await until(lambda: journals(path)[0].stat().st_size < 1000)
                assert len(journals(path)) == 1
    asyncio.run(check())
    assert ("long", "failed", "interrupted") in rows(path) and len(rows(path)) == 61


def test_with_durability_power_the_disk_is_asked_once_for_many(path, monkeypatch):
    syncs = []
    real = os.fsync
    monkeypatch.setattr(pomex.os, "fsync", lambda fd: (syncs.append(fd), real(fd)))

    async def one(ledger, name):
        await ledger.begin(intent(name))
        await ledger.settle(entry(name))

    async def check():
        async with started(path, "power") as ledger:
            assert ledger._writer.execute("PRAGMA synchronous").fetchone() == (2,)
            await asyncio.gather(*(one(ledger, f"r{n}") for n in range(50)))
            assert 2 <= len(syncs) <= 20
    asyncio.run(check())
    assert len(rows(path)) == 50


# --- when it cannot be written --------------------------------------------------------------------

def fill(ledger, full):
    pages = ledger._writer.execute("PRAGMA page_count").fetchone()[0]
    ledger._writer.execute(f"PRAGMA max_page_count = {pages if full else 10 ** 6}")


def break_journal(ledger):
    """Every write to it finds the disk full."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, ledger._journal.fd)
    os.close(full)


def test_a_full_disk_refuses_new_requests_until_it_heals_and_loses_nothing(path, monkeypatch):
    monkeypatch.setattr(pomex, "RETRY_S", 0.02)

    async def check():
        async with started(path) as ledger:
            fill(ledger, True)
            names = [f"r{n:03}" for n in range(200)]
            for name in names:
                await ledger.begin(intent(name))
            begun = time.monotonic()
            for name in names:
                await ledger.settle(entry(name, model="m" * 200))
            assert time.monotonic() - begun < 1     # the journal has them: nobody waits
            await until(lambda: not ledger.healthy)
            with pytest.raises(pomex.LedgerError, match="ledger") as refused:
                await ledger.begin(intent("new"))
            assert (refused.value.status, refused.value.code) == (503, "ledger_unavailable")
            fill(ledger, False)
            await until(lambda: ledger.healthy)
            await ledger.begin(intent("new"))
            await ledger.settle(entry("new"))
    asyncio.run(check())
    assert [row[0] for row in rows(path)] == ["new", *(f"r{n:03}" for n in range(200))]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_broken_journal_is_replaced_and_the_table_holds_the_row_before_settle_returns(path):
    async def check():
        async with started(path) as ledger:
            await ledger.begin(intent("running"))
            await ledger.begin(intent("r1"))
            break_journal(ledger)
            await ledger.settle(entry("r1"))
            assert [row["response_id"] for row in recent(ledger, 5)] == ["r1"]
            await until(lambda: ledger.healthy)
            break_journal(ledger)
            with pytest.raises(pomex.LedgerError):
                await ledger.begin(intent("refused"))
            await until(lambda: ledger.healthy)
    asyncio.run(check())
    assert rows(path) == [("r1", "completed", ""), ("running", "failed", "interrupted")]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_when_nothing_can_be_written_the_answer_goes_out_after_a_while_and_the_row_is_kept(path, monkeypatch):
    monkeypatch.setattr(pomex, "RETRY_S", 0.02)
    monkeypatch.setattr(pomex, "SETTLE_WAIT_S", 0.15)

    async def check():
        async with started(path) as ledger:
            await ledger.begin(intent("r1"))
            fill(ledger, True)
            break_journal(ledger)
            begun = time.monotonic()
            await ledger.settle(entry("r1", model="m" * 9000))
            assert 0.1 < time.monotonic() - begun < 1 and not ledger.healthy and recent(ledger, 5) == []
            fill(ledger, False)
            await until(lambda: ledger.healthy)
            assert [row["response_id"] for row in recent(ledger, 5)] == ["r1"]
    asyncio.run(check())
    assert rows(path) == [("r1", "completed", "")]


def test_another_program_that_locks_the_file_delays_no_answer(path, monkeypatch):
    monkeypatch.setattr(pomex, "RETRY_S", 0.02)
    monkeypatch.setattr(pomex, "BUSY_MS", 50)

    async def check():
        async with started(path) as ledger:
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            begun = time.monotonic()
            await ledger.begin(intent("r1"))
            await ledger.settle(entry("r1"))
            assert time.monotonic() - begun < 0.05
            await until(lambda: not ledger.healthy)
            other.execute("COMMIT")
            other.close()
            await until(lambda: ledger.healthy and recent(ledger, 1))
    asyncio.run(check())


# --- several processes, and their ends ------------------------------------------------------------

UNDER_LOAD = """
import asyncio, os, pomex, sys, threading
async def client(ledger, name):
    for number in range(10 ** 9):
        row = (f"{name}-{number}", "req", 1, 1, "responses", "demo/echo")
        await ledger.begin(pomex.Intent(*row))
        await asyncio.sleep(0)
        await ledger.settle(pomex.Entry(*row, input=number))
        os.write(1, (row[0] + "\\n").encode())
        await asyncio.sleep(0)
async def main():
    ledger = pomex.Ledger.open(sys.argv[1])
    ledger.start()
    await asyncio.gather(*(client(ledger, f"{os.getpid()}-{n}") for n in range(8)))
pomex.JOURNAL_BYTES = 50_000        # so that it is renewed many times
asyncio.run(main())
"""


def test_kill_9_at_any_moment_leaves_every_acknowledged_settlement_once(path):
    acknowledged = []
    for delay_s in (0.0, 0.03, 0.11):
        processes = [child(UNDER_LOAD, path, stdout=subprocess.PIPE) for _ in range(2)]
        first = [process.stdout.readline() for process in processes]
        time.sleep(delay_s)
        for process in processes:
            process.kill()
        said = b"".join([*first, *(process.communicate()[0] for process in processes)])
        acknowledged += said[:said.rfind(b"\n")].decode().split("\n")
    got = rows(path)
    names = [row[0] for row in got]
    assert len(acknowledged) > 100 and len(names) == len(set(names))
    assert set(acknowledged) <= {row[0] for row in got if row[1] == "completed"}
    assert len(names) - len(acknowledged) <= 3 * 2 * 8      # at most one a client was under way
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()
    assert journals(path) == []


def test_the_requests_of_a_living_process_are_left_alone_until_it_ends(path):
    code = ("import asyncio, pomex, sys, time\n"
            "async def main():\n"
            "    ledger = pomex.Ledger.open(sys.argv[1]); ledger.start()\n"
            "    await ledger.begin(pomex.Intent('theirs', 'req', 1, 1, 'responses', 'demo/echo'))\n"
            "    print('begun', flush=True); time.sleep(60)\n"
            "asyncio.run(main())")
    process = child(code, path, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"begun\n"
        assert rows(path) == [] and len(journals(path)) == 1
    finally:
        process.kill()
        process.communicate()
    assert rows(path) == [("theirs", "failed", "interrupted")]


# --- a file that goes wrong while it is in use ----------------------------------------------------

def test_a_file_that_is_removed_or_damaged_while_in_use_is_seen_and_said_once(path, caplog):
    async def scenario():
        async with started(path) as ledger:
            assert ledger.sound(NOW) and not caplog.records
            os.rename(path, path + "-away")
            assert [ledger.sound(NOW + n) for n in range(3)] == [False] * 3
            assert caplog.text.count("cannot be used: No such file or directory. The keys stay as they were") == 1
            open(path, "w").close()
            assert not ledger.sound(NOW) and "the file was replaced" in caplog.text
            os.replace(path + "-away", path)
            assert ledger.sound(NOW)
            ledger._db.execute("PRAGMA cache_size = 0")
            caplog.clear()
            real, ledger._db = ledger._db, Damaged()
            assert [ledger.sound(NOW + n) for n in range(3)] == [False] * 3
            ledger._db = real
            assert caplog.text.count("is damaged. Restore a backup") == 1 and ledger.sound(NOW)
    asyncio.run(scenario())


class Damaged:
    def execute(self, *_):
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


def test_a_copy_is_made_before_the_schema_changes(path, monkeypatch):
    with first_schema(path, monkeypatch):
        pass
    assert os.listdir(os.path.dirname(path)) == ["pomex.db"], "of a new file none is needed"
    for _ in range(2):
        pomex.Ledger.open(path).close()
    before = f"{path}.before-{len(pomex.MIGRATIONS)}"
    with contextlib.closing(sqlite3.connect(before)) as copy:
        assert pomex.schema_version(copy) == 1
    assert os.stat(before).st_mode & 0o777 == 0o600


def test_what_only_looks_like_a_journal_is_left_alone(path):
    pomex.Ledger.open(path).close()
    os.mkdir(path + "-requests-folder")
    os.mkfifo(path + "-requests-pipe")
    other = os.path.dirname(path) + "/other"
    open(other, "w").write("mine")
    os.symlink(other, path + "-requests-link")
    pomex.Ledger.open(path).close()
    assert open(other).read() == "mine"
