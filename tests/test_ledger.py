"""Layer 8: keys, the database, group commit and open requests, over real files and real processes."""
import asyncio
import contextlib
import itertools
import os
import pathlib
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time

import pomex
import postgres
import pytest
from conftest import of_a_file, of_a_server, outages
from ledgers import (
    account_made,
    audited,
    beats,
    change,
    dumped,
    key_made,
    key_of,
    kill_under_load,
    locked,
    read,
    recent,
    refusals,
    run,
    started,
    statements,
    stored,
    totals,
    under_way,
    until,
)

NOW = 1_763_629_920.0       # 2025-11-20 09:12 UTC
PRICE = "1 1 - - - -"


@pytest.fixture
def path(place):
    return place


@pytest.fixture
def ledger(path):
    ledger = pomex.Ledger.open(path)
    yield ledger
    ledger.close()


def row(response_id, **more):
    return pomex.UsageRow(response_id, "req_1", int(NOW * 1000), 1, "responses", "demo/echo", result="completed", input=9,
                          cached=4, output=3, reasoning=1, price=PRICE, cost_nanos=12_000)._replace(**more)


def begin(ledger, *response_ids):
    for response_id in response_ids:
        ledger.begin(response_id, lambda id=response_id: row(id, input=50, cached=0, output=0, reasoning=0, cost_nanos=50_000))


def rows(path):
    """The requests as they are after whoever had the file open is gone: (response_id, status, error_code), in order."""
    with contextlib.closing(pomex.Ledger.open(path)) as ledger:
        if not ledger.db.on_this_host:          # there nobody is asked whether he lives: he beats or not
            run(beats(ledger))
        assert under_way(ledger) == [] and run(pomex.verify(ledger.db))[1] == []
        return sorted((each["response_id"], each["status"], each["error_code"]) for each in recent(ledger, 10**6))


def child(code, *arguments, **options):
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(pomex.__file__))}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environ, **options)


# --- keys -----------------------------------------------------------------------------------------

def test_a_key_is_random_has_a_checksum_and_is_stored_as_its_digest_only(ledger):
    tokens = {key_made(ledger, f"k{n}", NOW) for n in range(20)}
    kept = stored(ledger)
    assert len(tokens) == 20 and all(key.digest.encode() in kept for key in ledger.list_keys())
    for token in tokens:
        assert re.fullmatch(r"sk-rh-[0-9A-Za-z]{32}", token)
        assert token[6:].encode() not in kept
    key = ledger.list_keys()[0]
    assert (key.name, key.created_s, key.expires_s, key.revoked_s) == ("k0", int(NOW), 0, 0)
    assert key.hint in {f"{t[:10]}…{t[-4:]}" for t in tokens} and key.digest not in repr(key)


def test_a_known_key_is_authorised_whatever_the_case_of_bearer(ledger):
    token = key_made(ledger, "laptop", NOW)
    for header in (f"Bearer {token}", f"bearer {token}", f"BEARER  {token} "):
        assert run(ledger.authorise(header, NOW)).name == "laptop"


KNOWN_SHAPE = "sk-rh-" + "a" * 28
UNKNOWN = KNOWN_SHAPE + pomex.key_check("a" * 28)
NO_KEY = ("No API key was sent. Export POMEX_API_KEY (in Codex the variable that env_key names) in this shell, then "
          "start the client again.")
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
        run(ledger.authorise(header, NOW))
    assert str(refused.value) == REFUSED[header]
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    assert ("www-authenticate", "Bearer") in refused.value.headers


def test_every_mistyped_character_is_told_apart_from_an_unknown_key(ledger):
    token = key_made(ledger, "laptop", NOW)
    wrong = [token[:at] + other + token[at + 1:] for at in range(6, len(token)) for other in "0Zk"
             if token[at] != other]
    for mistyped in [*wrong, token[:-1], token + "a"]:
        with pytest.raises(pomex.Unauthorized, match="mistyped or cut"):
            run(ledger.authorise(f"Bearer {mistyped}", NOW))


def test_a_revoked_key_says_when_and_its_name_is_free_again(ledger):
    token = key_made(ledger, "ci", NOW - 60)
    key = run(ledger.revoke_key("ci", NOW))
    assert (key.name, key.revoked_s) == ("ci", int(NOW))
    with pytest.raises(pomex.Unauthorized, match=r"^Key ci was revoked on 2025-11-20 09:12\.$"):
        run(ledger.authorise(f"Bearer {token}", NOW))
    second = key_made(ledger, "ci", NOW)
    assert run(ledger.authorise(f"Bearer {second}", NOW)).name == "ci"
    with pytest.raises(pomex.Unauthorized):
        run(ledger.authorise(f"Bearer {token}", NOW))


def test_an_expired_key_says_when(ledger):
    token = key_made(ledger, "ci", NOW, expires_s=int(NOW) + 60)
    assert run(ledger.authorise(f"Bearer {token}", NOW + 59))
    with pytest.raises(pomex.Unauthorized, match=r"^Key ci expired on 2025-11-20 09:13\.$"):
        run(ledger.authorise(f"Bearer {token}", NOW + 60))


@pytest.mark.parametrize("name", ["", " ", "-x", "a b", "a/b", "a\n", "ü", "x" * 65, "'; DROP TABLE keys"])
def test_a_key_name_that_could_spoil_a_line_is_refused(ledger, name):
    with pytest.raises(pomex.BadRequest):
        key_made(ledger, name, NOW)


def test_a_name_is_unique_among_active_keys_and_only_those_can_be_revoked(ledger):
    key_made(ledger, "ci", NOW)
    with pytest.raises(pomex.BadRequest, match="an active key named ci already. Revoke it first"):
        key_made(ledger, "ci", NOW)
    with pytest.raises(pomex.BadRequest, match="no active key"):
        run(ledger.revoke_key("other", NOW))


def test_a_key_made_changed_or_revoked_by_another_process_is_seen_within_a_second(path):
    def elsewhere(code):
        code = f"import asyncio, pomex, sys; ledger = pomex.Ledger.open(sys.argv[1]); print(asyncio.run(ledger.{code}) or '')"
        said, _ = child(code, path, stdout=subprocess.PIPE, text=True).communicate()
        return said.strip()

    async def check():
        async with started(path) as (ledger,):
            mine = await ledger.create_key("mine", NOW)
            made = await asyncio.to_thread(elsewhere, "create_key('a', 1, rpm=5)")
            key = await ledger.authorise(f"Bearer {made}", NOW)         # one that is not known is looked for at once
            assert (key.name, key.rpm) == ("a", 5)
            for code, seen in {"edit_key('a', rpm=7)": lambda: ledger.keys[key.id].rpm == 7,
                               "use_provider('azure', False)": lambda: ledger.disabled == {"azure"},
                               "use_provider('azure', True)": lambda: not ledger.disabled,
                               "revoke_key('a', 1)": lambda: ledger.keys[key.id].revoked_s}.items():
                await asyncio.to_thread(elsewhere, code)
                await until(seen, 1.0)
            with pytest.raises(pomex.Unauthorized, match="revoked"):
                await ledger.authorise(f"Bearer {made}", NOW)
            assert (await ledger.authorise(f"Bearer {mine}", NOW)).name == "mine"
    asyncio.run(check())


def test_many_changed_keys_are_taken_over_a_piece_at_a_time(path, ledger, monkeypatch):
    monkeypatch.setattr(pomex, "KEYS_AT_ONCE", 2)
    for name in "abcde":
        key_made(ledger, name, NOW)
    with contextlib.closing(pomex.Ledger.open(path)) as other:
        run(other.revoke_key("b", NOW))
        for name in "fgh":
            key_made(other, name, NOW)
        run(ledger.refresh())
        assert ledger.list_keys() == other.list_keys() and len(ledger.keys) == 8 and ledger.revision == other.revision


CHANGES = {     # what is done -> its row of the audit log: who, action, name, before, after
    "a key is created": (lambda ledger: ledger.create_key("ci", NOW, "ana", rpm=5), ("ana", "key created", "ci", {}, {"rpm": 5})),
    "it is edited": (lambda ledger: ledger.edit_key("laptop", "ana", rpm=9, models="demo/*"),
                     ("ana", "key edited", "laptop", {"rpm": 0, "models": ""}, {"rpm": 9, "models": "demo/*"})),
    "and revoked": (lambda ledger: ledger.revoke_key("laptop", NOW, "bo"),
                    ("bo", "key revoked", "laptop", {"revoked_s": 0}, {"revoked_s": int(NOW)})),
    "a provider is disabled": (lambda ledger: ledger.use_provider("azure", False, "bo"),
                               ("bo", "provider disabled", "azure", {"disabled": False}, {"disabled": True})),
    "or enabled": (lambda ledger: ledger.use_provider("azure", True),
                   ("", "provider enabled", "azure", {"disabled": False}, {"disabled": False})),
    "an account is made": (lambda ledger: account_made(ledger, "acme", True, None, pomex.ONE, NOW, "bo"),
                           ("bo", "account created", "acme", {}, {"prepaid": 1, "limit_usd": None, "multiplier": pomex.ONE})),
    "it gets credit": (lambda ledger: pomex.add_credit(ledger, "default", 5, "gift", NOW, "a\0\ud800"),
                       ("a??", "credit added", "default", {}, {"kind": "adjustment", "usd": "0.000000005", "reason": "gift"})),
}


@pytest.mark.parametrize("change, said", CHANGES.values(), ids=CHANGES)
def test_every_change_is_a_row_of_the_audit_log(ledger, change, said):
    key_made(ledger, "laptop", NOW)
    run(change(ledger))
    assert audited(ledger)[1:] == [said]


REFUSED_CHANGES = {
    "a name that is taken": lambda ledger: ledger.create_key("laptop", NOW),
    "no such key": lambda ledger: ledger.edit_key("ci", rpm=9),
    "no such account": lambda ledger: pomex.add_credit(ledger, "nobody", 5, "", NOW),
    "an account that is there": lambda ledger: account_made(ledger, "default", False, None, pomex.ONE, NOW),
}


@pytest.mark.parametrize("change", REFUSED_CHANGES.values(), ids=REFUSED_CHANGES)
def test_a_change_that_is_refused_leaves_nothing_behind(ledger, change):
    key_made(ledger, "laptop", NOW)
    before = dumped(ledger)
    with pytest.raises(pomex.BadRequest):
        run(change(ledger))
    assert dumped(ledger) == before


def test_no_secret_of_a_key_or_session_is_anywhere_in_the_database(ledger):
    secrets = [key_made(ledger, "laptop", NOW, who="ana"), run(pomex.open_session(ledger.db, "link", 0, 600, NOW))]
    run(ledger.edit_key("laptop", "ana", rpm=9))
    with pytest.raises(pomex.Unauthorized) as refused:
        run(ledger.authorise(f"Bearer {secrets[0]}x", NOW))
    ledger.refuse(0, {"time_ms": 1, "code": refused.value.code, "path": "/v1/responses", "message": str(refused.value)})
    run(ledger.save_counts())
    run(ledger.revoke_key("laptop", NOW, "ana"))
    assert len(audited(ledger)) == 3 and len(refusals(ledger)) == 1
    kept = stored(ledger)
    assert b"key revoked" in kept
    for secret in secrets:
        assert secret.encode() not in kept and secret.removeprefix("sk-rh-").encode() not in kept


# --- the file -------------------------------------------------------------------------------------

@of_a_file
def test_all_files_are_for_their_user_alone(path):
    old = os.umask(0)
    try:
        with contextlib.closing(pomex.Ledger.open(path)) as ledger:
            key_made(ledger, "a", NOW)
            folder = pathlib.Path(path).parent
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}
            assert modes == dict.fromkeys(["pomex.db", "pomex.db-wal", "pomex.db-shm"], 0o600)
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


def test_processes_that_open_a_new_database_at_once_agree(new_place):
    code = "import pomex, sys; print(pomex.Ledger.open(sys.argv[1]).secret.hex())"
    processes = [child(code, new_place, stdout=subprocess.PIPE) for _ in range(3)]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert [process.returncode for process in processes] == [0] * 3
    with contextlib.closing(pomex.Ledger.open(new_place)) as ledger:
        assert read(ledger, "SELECT id, name FROM accounts") == [(1, "default")]


@of_a_file
@pytest.mark.parametrize("durability, synchronous", [("process", 1), ("power", 2)])
def test_durability_power_waits_for_the_disk_at_every_commit(path, durability, synchronous):
    with contextlib.closing(pomex.Ledger.open(path, durability)) as ledger:
        assert ledger.db.writer.execute("PRAGMA synchronous").fetchone() == (synchronous,)


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
    db.execute(f"PRAGMA user_version = {pomex.SCHEMA_VERSION + 1}")
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


def owned_by_another(cluster, name):
    cluster.psql(f"ALTER DATABASE {name} OWNER TO {postgres.ADMIN}; REVOKE CREATE ON DATABASE {name} FROM PUBLIC")
    cluster.psql("REVOKE CREATE ON SCHEMA public FROM PUBLIC", name)
    return cluster.url(name)


def read_only(cluster, name):
    cluster.psql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    return cluster.url(name)


def without_connections(cluster, name):
    cluster.psql(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
    return cluster.url(name)


def with_tables_of_another_program(cluster, name):
    cluster.psql("CREATE TABLE keys (bookmark text)", name)
    return cluster.url(name)


UNUSABLE_SERVERS = {        # what makes it so, and gives the URL -> the sentence
    "no such database": (lambda cluster, _: cluster.url("nowhere"), r'is not there: database "nowhere" does not exist \(SQLSTATE 3D000\)'),
    "another user's": (owned_by_another, r"does not give this user the right: permission denied for schema public \(SQLSTATE 42501\)"),
    "another program's": (with_tables_of_another_program, "has tables of another program. Give Pomex one of its own"),
    "read-only": (read_only, r"is a standby, which cannot be written: it takes no writes \(SQLSTATE 25006\)"),
    "no connection left": (without_connections,
                           r'has no connection left: too many connections for database "\w+" \(SQLSTATE 53300\)'),
    "another password": (lambda cluster, name: cluster.url(name).replace(postgres.QUOTED, "guessed"),
                         r'refuses this user or password: password authentication failed for user "pomex" \(SQLSTATE 28P01\)'),
    "no password": (lambda cluster, name: cluster.url(name).replace(":" + postgres.QUOTED, ""),
                    r"refuses this user or password: it asks for a password: put it into the URL, or into PGPASSWORD \(SQLSTATE 28P01\)"),
    "without TLS": (lambda cluster, name: cluster.url(name, sslmode="disable"),
                    r'refuses this user or password: no pg_hba.conf entry for host .*, no encryption \(SQLSTATE 28000\)'),
    "an unknown authority": (lambda cluster, name: cluster.url(name, sslrootcert="system"), "cannot be reached: unable to get local issuer .*|"
                             "cannot be reached: self-signed certificate in certificate chain"),
    "nobody there": (lambda cluster, name: cluster.url(name).replace(f":{cluster.port}/", f":{postgres.free_port()}/"),
                     "cannot be reached: Connection refused"),
}


@pytest.mark.parametrize("spoil, words", UNUSABLE_SERVERS.values(), ids=UNUSABLE_SERVERS)
def test_an_unusable_server_is_refused_with_a_sentence_and_left_alone(cluster, spoil, words):
    name = pomex.read_postgres_url(cluster.create()).database
    url = spoil(cluster, name)
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    before = cluster.psql(tables, name)
    with pytest.raises(pomex.LedgerError) as refused:
        pomex.Ledger.open(url)
    assert re.fullmatch(rf"The database postgresql://pomex@localhost:\d+/\w+ ({words})\.", str(refused.value))
    assert (refused.value.status, refused.value.code) == (503, "ledger_unavailable")
    assert cluster.psql(tables, name) == before


# --- group commit ---------------------------------------------------------------------------------

def note(name, then=None):
    """A member of a batch: it writes a setting, then fails, or says its name."""
    def member(tx):
        tx.execute("INSERT INTO settings VALUES (?, '')", (name,))
        if then:
            then(tx)
        return name
    return member


def fail(tx):
    raise LookupError("its own")


FAILURES = {"an exception": (fail, LookupError, "its own"),
            "an error of SQL": (lambda tx: tx.execute("SELECT * FROM nowhere"), pomex.LedgerError, "nowhere"),
            "a row that is there": (note("first"), (sqlite3.IntegrityError, pomex.PostgresError), "settings")}


@pytest.mark.parametrize("then, kind, words", FAILURES.values(), ids=FAILURES)
def test_what_one_member_of_a_batch_raises_undoes_that_member_alone(ledger, then, kind, words):
    async def check():
        with statements(ledger) as said:
            names = "first", "second", "third"
            first, second, third = await asyncio.gather(
                *(ledger.commit(note(name, then if name == "second" else None)) for name in names), return_exceptions=True)
        assert (first, third) == ("first", "third") and isinstance(second, kind) and words in str(second)
        assert said.count("COMMIT") == 1
    asyncio.run(check())
    assert read(ledger, "SELECT name FROM settings WHERE value = '' ORDER BY name") == [("first",), ("third",)]


def test_a_writer_whose_caller_is_cancelled_is_written_with_the_others(ledger):
    async def check():
        writers = [asyncio.ensure_future(ledger.commit(note(name))) for name in "abc"]
        await asyncio.sleep(0)
        writers[1].cancel()
        ends = await asyncio.gather(*writers, return_exceptions=True)
        assert [type(each) for each in ends] == [str, asyncio.CancelledError, str]
    asyncio.run(check())
    assert read(ledger, "SELECT count(*) FROM settings WHERE value = ''") == [(3,)]


@pytest.mark.parametrize("turns", [1, 2, 3], ids=["not begun", "begun", "behind another"])
def test_who_waits_for_a_write_when_the_ledger_is_closed_is_answered(path, turns):
    async def check():
        ledger = pomex.Ledger.open(path)
        ledger.db.writing.submit(time.sleep, 0.05)
        writers = []
        for name in "ab":
            writers.append(asyncio.ensure_future(ledger.commit(note(name))))
            for _ in range(turns):
                await asyncio.sleep(0)
        ledger.close()
        assert await asyncio.wait_for(asyncio.gather(*writers), 1) == ["a", "b"]
    asyncio.run(check())


@pytest.mark.parametrize("durability", ["process", "power"])
def test_many_settlements_at_once_share_few_commits(path, durability):
    async def client(ledger, name):
        for number in range(10):
            begin(ledger, f"{name}-{number}")
            if number % 2:
                await ledger.recorded(f"{name}-{number}")
            await ledger.settle([row(f"{name}-{number}")])

    async def check():
        async with started(path, durability=durability) as (ledger,):
            with statements(ledger) as said:
                await asyncio.gather(*(ledger.settle([row(f"r{n}")]) for n in range(200)))
                assert said.count("COMMIT") == 1
                await asyncio.gather(*(client(ledger, name) for name in range(50)))
                assert said.count("COMMIT") < 50            # of 750 that they have waited for
    asyncio.run(check())
    assert len(rows(path)) == 700


# --- requests -------------------------------------------------------------------------------------

def test_a_settled_request_is_one_row_that_says_what_was_said(path):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("laptop", NOW)
            begin(ledger, "r1")
            said = row("r1", key_id=key_of(ledger, "laptop").id, provider="demo", estimated="cut", session="s", detail="{}")
            lost = row("r1", provider="azure", attempt=1, final=0, status="lost")
            await ledger.settle([lost, said._replace(attempt=2)])
            assert recent(ledger, 5) == [{"key": "laptop", **said._replace(attempt=2)._asdict()}]
            assert totals(ledger) == {"requests": 1, "input": 18, "cached": 8, "cache_write": 0, "output": 6, "reasoning": 2,
                                      "cost_nanos": 24_000}
    asyncio.run(check())
    assert rows(path) == [("r1", "completed", "")]


def test_of_several_settlements_of_one_response_the_first_counts(path):
    async def check():
        async with started(path, 2) as (ledger, other):
            await asyncio.gather(ledger.settle([row("r1")]), ledger.settle([row("r1", status="failed")]))
            await ledger.settle([row("r1", status="cancelled")])
            await other.settle([row("r1", final=0), row("r1", attempt=1, status="failed")])
            await ledger.settle([row("r2")])
            assert totals(ledger)["requests"] == 2
    asyncio.run(check())
    assert rows(path) == [("r1", "completed", ""), ("r2", "completed", "")]


def test_a_settlement_whose_caller_is_cancelled_is_not_lost(path):
    async def check():
        async with started(path, durability="power") as (ledger,):
            begin(ledger, "r1")
            task = asyncio.ensure_future(ledger.settle([row("r1")]))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    asyncio.run(check())
    assert rows(path) == [("r1", "completed", "")]


HOSTILE = {"huge": {"input": 10 ** 30}, "negative": {"output": -5}, "surrogate": {"model": "demo/\ud800"},
           "nul": {"model": "a\0b"}, "newline": {"error_code": "a\nb\r"}, "quote": {"model": "');"},
           "not whole": {"input": 1.5}, "infinite": {"input": float("inf")}, "not a number": {"input": float("nan")},
           "none": {"output": None}}


def test_a_row_of_odd_values_is_stored_and_does_not_stop_the_others(path):
    async def check():
        async with started(path) as (ledger,):
            for name, fields in HOSTILE.items():
                odd = row(name, **fields, cost_nanos=0)
                ledger.begin(name, lambda odd=odd: odd)
                await ledger.recorded(name)
            assert len(under_way(ledger)) == len(HOSTILE)
            await asyncio.gather(*(ledger.settle([row(name, **fields)]) for name, fields in HOSTILE.items()),
                                 ledger.settle([row("plain")]))
            assert totals(ledger)["requests"] == len(HOSTILE) + 1 and ledger.healthy
            assert {each["response_id"] for each in recent(ledger, 99)} == {*HOSTILE, "plain"}
    asyncio.run(check())


def fault():
    raise ValueError("of our own")


FAULTS = {"its open row cannot be made": lambda ledger: ledger.begin("bad", fault),
          "two rows of one attempt": lambda ledger: asyncio.ensure_future(ledger.settle([row("bad", final=0), row("bad")]))}


@pytest.mark.parametrize("spoil", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_ours_in_one_request_does_not_stop_the_others(path, spoil):
    async def check():
        async with started(path) as (ledger,):
            spoiled = spoil(ledger)
            await asyncio.wait_for(asyncio.gather(ledger.settle([row("r1")]), ledger.settle([row("r2")])), 1)
            assert ledger.available() and [each["response_id"] for each in recent(ledger, 9)] == ["r2", "r1"]
            await asyncio.gather(*filter(None, [spoiled]), return_exceptions=True)
    asyncio.run(check())


def test_every_sum_is_stored_as_a_number(ledger):
    run(ledger.settle([row("r1"), row("r2", estimated="why")]))
    kind, whole = ("typeof(%s)", "integer") if ledger.db.on_this_host else ("CAST(pg_typeof(%s) AS TEXT)", "bigint")
    found, = read(ledger, f"SELECT DISTINCT {', '.join(kind % name for name in pomex.SUMS)} FROM usage_rollups")
    assert dict(zip(pomex.SUMS, found)) == dict.fromkeys(pomex.SUMS, whole)


def test_an_open_request_is_recorded_after_a_while_or_with_what_is_written_next_or_when_that_is_asked_for(path):
    async def check():
        async with started(path) as (ledger,):
            begun = time.monotonic()
            begin(ledger, "after a while", "beside it")
            await until(lambda: under_way(ledger))
            assert time.monotonic() - begun >= pomex.OPEN_AFTER_S and under_way(ledger) == ["after a while", "beside it"]
            begin(ledger, "next")
            await ledger.settle([row("beside it")])
            assert under_way(ledger) == ["after a while", "next"]
            begin(ledger, "asked for")
            begun = time.monotonic()
            with statements(ledger) as said:
                await ledger.recorded("asked for")
                assert time.monotonic() - begun < pomex.OPEN_AFTER_S
                assert under_way(ledger) == ["after a while", "asked for", "next"]
                await ledger.recorded("asked for")          # it is already
                await ledger.recorded("never begun")
                assert said.count("COMMIT") == 1
            ledger.abandon("next")
            ledger.abandon("never begun")
            await ledger.schedule_flush()
            assert under_way(ledger) == ["after a while", "asked for"] and len(recent(ledger, 9)) == 1
    asyncio.run(check())


def test_an_open_request_is_never_written_where_its_end_is_there_already(path):
    async def check():
        async with started(path) as (ledger,):
            with statements(ledger) as said:
                names = [f"r{n}" for n in range(50)]
                begin(ledger, *names, "abandoned")
                ledger.abandon("abandoned")
                await asyncio.gather(*(ledger.settle([row(name)]) for name in names))
                await asyncio.sleep(pomex.OPEN_AFTER_S * 1.5)
                assert not [each for each in said if "INTO open_requests" in each] and not ledger.pending
            assert len(recent(ledger, 99)) == 50
    asyncio.run(check())


def test_what_was_begun_and_never_settled_is_interrupted_at_the_end_once(path):
    async def check():
        async with started(path) as (ledger,):
            begin(ledger, "r1", "r2")
            await ledger.recorded("r1")
            await ledger.settle([row("r2")])
    asyncio.run(check())
    with contextlib.closing(pomex.open_database(path)) as db:
        found = db.commit(lambda tx: tx.read("SELECT response_id, error_code FROM usage ORDER BY id"))
        assert found == [("r2", ""), ("r1", "interrupted")]
        left = [db.commit(lambda tx, table=table: tx.read(f"SELECT count(*) FROM {table}")) for table in ("open_requests", "processes")]
        assert left == [[(0,)]] * 2
    assert rows(path) == rows(path) == [("r1", "failed", "interrupted"), ("r2", "completed", "")]


def test_what_was_begun_and_not_recorded_yet_is_interrupted_at_the_end_too(path):
    async def check():
        async with started(path) as (ledger,):
            begin(ledger, "r1")
    asyncio.run(check())
    assert rows(path) == [("r1", "failed", "interrupted")]


@pytest.mark.parametrize("behind", [False, True], ids=["being written", "behind another"])
def test_what_is_still_to_be_written_at_the_end_is_written_once(path, behind):
    async def check():
        async with started(path) as (ledger,):
            change(ledger, "INSERT INTO rates VALUES ('key 1 tokens', 1000)")
            ledger.refuse(0, refusal("limit"))
            first = [ledger.commit(lambda tx: time.sleep(0.05))] if behind else []
            ledger.db.writing.submit(time.sleep, 0.05)          # so that what is handed to it is not there at once
            ends = []
            for each in (*first, ledger.settle([row("r1")], [(7, "key 1 tokens")]), ledger.save_counts()):
                ends.append(asyncio.ensure_future(each))
                await asyncio.sleep(0)
            for _ in range(3):
                await asyncio.sleep(0)
            assert ledger.flushing is not None and [*ledger.unsaved] == ["r1"] and len(ledger.writes) == 1 and not ends[-1].done()
        for each in ends:
            each.cancel()
        await asyncio.gather(*ends, return_exceptions=True)
    asyncio.run(check())
    with contextlib.closing(pomex.Ledger.open(path)) as ledger:
        assert [each["response_id"] for each in recent(ledger, 9)] == ["r1"]
        assert read(ledger, "SELECT full_ns FROM rates") == [(1007,)]
        assert run(ledger.counted()) == {("pomex_refusals_total", "limit"): 1} and len(refusals(ledger)) == 1


# --- when it cannot be written --------------------------------------------------------------------

@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(pomex, "RETRY_S", 0.02)
    monkeypatch.setattr(pomex, "SETTLE_WAIT_S", 0.15)


@outages("a stopped server")
def test_a_database_that_cannot_be_written_refuses_new_requests_until_it_heals_and_loses_nothing(path, outage, impatient, caplog):
    async def check():
        async with started(path) as (ledger,):
            names = [f"r{n:03}" for n in range(200)]
            begin(ledger, *names)
            await ledger.recorded("r199")
            outage.begin(ledger)
            begun = time.monotonic()
            await asyncio.gather(*(ledger.settle([row(name, model="m" * 300)]) for name in names))
            assert 0.1 < time.monotonic() - begun < 1 and not ledger.healthy and not ledger.available()
            assert len(ledger.unsaved) == 200 and recent(ledger, 5) == [] and len(under_way(ledger)) == 200
            with pytest.raises(pomex.LedgerError, match="ledger") as refused:
                begin(ledger, "new")
            assert (refused.value.status, refused.value.code) == (503, "ledger_unavailable")
            assert refused.value.headers == (("retry-after", "2"),)
            told = f"The database {ledger.db.name} {outage.words} New requests get 503 until it can be written."
            assert caplog.messages.count(told) == 1
            outage.end()
            await until(ledger.available)
            assert f"The database {ledger.db.name} can be written again." in caplog.messages
            begin(ledger, "new")
            await ledger.settle([row("new")])
            assert not ledger.unsaved and totals(ledger)["requests"] == 201
    asyncio.run(check())
    assert [each[0] for each in rows(path)] == ["new", *(f"r{n:03}" for n in range(200))]


@outages()
def test_what_cannot_be_recorded_is_not_sent_and_a_change_says_why(path, outage, impatient):
    async def check():
        async with started(path) as (ledger,):
            outage.begin(ledger)
            ledger.begin("r1", lambda: row("r1", model="m" * 9000))
            with pytest.raises(pomex.LedgerError, match="cannot be written at the moment"):
                await ledger.recorded("r1")
            with pytest.raises(pomex.LedgerError) as refused:
                await ledger.create_key("ci", NOW, models="m" * 9000)
            assert str(refused.value) == f"The database {ledger.db.name} {outage.words}"
            outage.end()
            await until(ledger.available)
            assert under_way(ledger) == ["r1"] and ledger.list_keys() == []
            ledger.abandon("r1")
            await ledger.create_key("ci", NOW)
    asyncio.run(check())
    assert rows(path) == []


@outages()
def test_no_more_than_max_unsaved_rows_are_kept_and_each_that_is_lost_is_told(path, outage, impatient, caplog):
    async def check():
        async with started(path, max_unsaved=3) as (ledger,):
            begin(ledger, "r4")
            await ledger.recorded("r4")
            outage.begin(ledger)
            await asyncio.gather(*(ledger.settle([row(f"r{n}", model="m" * 9000)]) for n in range(5)))
            assert [*ledger.unsaved] == ["r0", "r1", "r2"]
            assert [each for each in caplog.messages if "is lost" in each] == [
                f"ledger: the row of r{n} is lost: [database] max_unsaved rows wait already" for n in (3, 4)]
            outage.end()
            await until(ledger.available)
    asyncio.run(check())
    assert rows(path) == [(f"r{n}", "completed", "") for n in range(3)] + [("r4", "failed", "interrupted")]


@outages()
def test_a_row_takes_the_place_of_its_open_request_among_those_kept(path, outage, impatient, caplog):
    async def check():
        async with started(path, max_unsaved=1) as (ledger,):
            outage.begin(ledger)
            begin(ledger, "r1")
            await ledger.settle([row("r1", model="m" * 9000)])
            assert [*ledger.unsaved] == ["r1"] and "is lost" not in caplog.text
            outage.end()
            await until(ledger.available)
    asyncio.run(check())
    assert rows(path) == [("r1", "completed", "")]


@outages()
@pytest.mark.parametrize("heals", [True, False])
def test_at_the_end_what_is_left_is_tried_once_more_and_told_where_it_is_lost(path, outage, impatient, caplog, heals, monkeypatch):
    monkeypatch.setattr(pomex, "RETRY_S", 60)

    async def check():
        async with started(path) as (ledger,):
            outage.begin(ledger)
            await ledger.settle([row("r1", model="m" * 9000)])
            assert not ledger.healthy
            if heals:
                outage.end()
    asyncio.run(check())
    outage.end()
    assert rows(path) == [("r1", "completed", "")] * heals
    assert (f"{outage.words} 1 rows are lost." in caplog.text) != heals


def test_while_another_program_locks_the_database_everything_waits_and_nothing_fails(path):
    async def check():
        async with started(path) as (ledger,):
            token = await ledger.create_key("laptop", NOW)
            with locked(path):
                begin(ledger, "r1", "r2")
                waiting = [asyncio.ensure_future(each) for each in (
                    ledger.recorded("r1"), ledger.settle([row("r2")]), ledger.create_key("ci", NOW))]
                opening = asyncio.create_task(asyncio.to_thread(lambda: pomex.Ledger.open(path).close()))
                if ledger.db.on_this_host:          # there it writes
                    waiting.append(opening)
                begun, turns = time.monotonic(), 0
                while time.monotonic() - begun < 0.4:
                    turns += 1
                    assert (await ledger.authorise(f"Bearer {token}", NOW)).name == "laptop" and ledger.available()
                    await asyncio.sleep(0.005)
                assert turns > 20 and not any(each.done() for each in waiting)
                begin(ledger, "r3")
            await asyncio.wait_for(asyncio.gather(*waiting, opening), 1)
            await ledger.recorded("r3")
            assert under_way(ledger) == ["r1", "r3"] and key_of(ledger, "ci") and ledger.healthy
    asyncio.run(check())
    assert rows(path) == [("r1", "failed", "interrupted"), ("r2", "completed", ""), ("r3", "failed", "interrupted")]


def test_a_lock_that_lasts_too_long_counts_as_a_failure_and_heals(path, impatient, monkeypatch):
    monkeypatch.setattr(pomex, "BUSY_S", 0.05)
    monkeypatch.setattr(pomex, "TIMEOUTS_MS", (8000, 50, 3000))

    async def check():
        async with started(path) as (ledger,):
            with locked(path):
                await ledger.settle([row("r1")])
                assert not ledger.available() and recent(ledger, 1) == []
                with pytest.raises(pomex.LedgerError, match="is locked by another program"):
                    await ledger.create_key("ci", NOW)
            await until(ledger.available)
            assert len(recent(ledger, 9)) == 1
    asyncio.run(check())


# --- several processes, and their ends ------------------------------------------------------------

UNDER_LOAD = """
import asyncio, os, pomex, sys
async def client(ledger, name):
    for number in range(10 ** 9):
        row = pomex.UsageRow(f"{name}-{number}", "req", 1, 1, "responses", "demo/echo", input=number, price="0 0 0 0 0")
        ledger.begin(row.response_id, lambda: row)
        if number % 3:
            await ledger.recorded(row.response_id)
            os.write(1, f"recorded {row.response_id}\\n".encode())
            await asyncio.sleep(number % 3 / 200)
        await ledger.settle([row])
        os.write(1, f"settled {row.response_id}\\n".encode())
async def main():
    ledger = pomex.Ledger.open(sys.argv[1])
    ledger.start()
    await asyncio.gather(*(client(ledger, f"{os.getpid()}-{n}") for n in range(8)))
asyncio.run(main())
"""


def test_kill_9_at_any_moment_leaves_every_acknowledged_settlement_once(path):
    said = {"recorded": [], "settled": []}
    for delay_s in (0.0, 0.03, 0.11):
        processes = [child(UNDER_LOAD, path, stdout=subprocess.PIPE) for _ in range(2)]
        first = [process.stdout.readline() for process in processes]
        time.sleep(delay_s)
        for process in processes:
            process.kill()
        for line in b"".join([*first, *(process.communicate()[0] for process in processes)]).decode().splitlines():
            what, name = line.split()       # each line is one write to the pipe, so none is cut
            said[what].append(name)
    got = rows(path)
    ends = {name: (status, code) for name, status, code in got}
    assert len(said["settled"]) > 100 and len(ends) == len(got)
    assert {ends.get(name) for name in said["settled"]} == {("completed", "")}
    begun = set(said["recorded"]) - set(said["settled"])
    assert ("failed", "interrupted") in {ends[name] for name in begun} <= {("completed", ""), ("failed", "interrupted")}
    assert len(got) - len(said["settled"]) <= 3 * 2 * 8      # at most one a client was under way
    with contextlib.closing(pomex.open_database(path)) as db:        # the judge's own stays until another finds it gone
        assert db.commit(lambda tx: tx.read("SELECT count(*) FROM processes")) == [(0 if db.on_this_host else 1,)]


ONE_REQUEST = """
import asyncio, pomex, sys
async def main():
    ledger = pomex.Ledger.open(sys.argv[1])
    ledger.start()
    row = pomex.UsageRow("theirs", "req", 1, 1, "responses", "demo/echo", input=7, price="0 0 0 0 0")
    ledger.begin("theirs", lambda: row)
    await ledger.recorded("theirs")
    print("begun", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await ledger.settle([row])
    print("settled", flush=True)
    ledger.close()
asyncio.run(main())
"""


@contextlib.contextmanager
def one_request(path):
    """A process that has a request under way until it is told to end."""
    process = child(ONE_REQUEST, path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"begun\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def end_of(ledger):
    """[("theirs", how it ended)], or [] while it is under way."""
    return [(each["response_id"], each["error_code"] or each["status"]) for each in recent(ledger, 9)]


def test_the_requests_of_a_living_process_are_left_alone_until_it_ends(path):
    with one_request(path):
        with contextlib.closing(pomex.Ledger.open(path)) as ledger:
            assert end_of(ledger) == [] and under_way(ledger) == ["theirs"]
    assert rows(path) == [("theirs", "failed", "interrupted")]


def test_a_server_that_runs_settles_what_a_killed_process_left(path, caplog):
    async def check():
        async with started(path) as (ledger,):
            with one_request(path):
                await ledger.beat()
                assert end_of(ledger) == []
            await beats(ledger)
            assert end_of(ledger) == [("theirs", "interrupted")]
            assert read(ledger, "SELECT pid FROM processes WHERE process <> ?", ledger.process) == []
            assert caplog.text.count("1 requests of an ended process are marked as interrupted") == 1
    asyncio.run(check())


@of_a_server
def test_a_stopped_process_is_taken_for_dead_by_those_who_share_a_server_and_its_word_counts_when_it_wakes(path, caplog):
    async def check():
        async with started(path) as (ledger,):
            with one_request(path) as process:
                os.kill(process.pid, signal.SIGSTOP)
                await ledger.beat()
                assert end_of(ledger) == []
                await beats(ledger)
                assert end_of(ledger) == [("theirs", "interrupted")] and under_way(ledger) == []
                os.kill(process.pid, signal.SIGCONT)
                process.communicate(b"\n")
                assert process.returncode == 0
            assert end_of(ledger) == [("theirs", "completed")] and await pomex.verify(ledger.db) == (1, [])
            assert totals(ledger)["requests"] == 1
    asyncio.run(check())


@of_a_file
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_process_of_this_host_that_is_stopped_is_not_taken_for_dead(path, monkeypatch):
    monkeypatch.setattr(pomex, "DEAD_S", 0.05)

    async def check():
        async with started(path) as (ledger,):
            with one_request(path) as process:
                os.kill(process.pid, signal.SIGSTOP)
                await ledger.beat()
                await asyncio.sleep(0.06)
                await ledger.beat()
                assert end_of(ledger) == []
                os.kill(process.pid, signal.SIGCONT)
                process.communicate(b"\n")
            assert end_of(ledger) == [("theirs", "completed")]
    asyncio.run(check())


def test_a_process_elsewhere_is_dead_when_its_beats_stand_still_and_what_it_says_after_all_replaces_the_guess(path, monkeypatch):
    monkeypatch.setattr(pomex, "DEAD_S", 0.1)
    budget = 10**9

    async def check():
        async with started(path, 2) as (theirs, ours):
            await theirs.create_key("k", NOW, budget_nanos=budget)
            await ours.refresh()
            limit, = pomex.limits_of(key_of(ours, "k"), int(NOW // 86400))
            await ours.db.write(lambda tx: pomex.spent_and_granted(tx, limit))

            async def sums():
                assert (await pomex.verify(ours.db))[1] == []
                return (totals(ours)["requests"], totals(ours)["input"],
                        read(ours, "SELECT spent, granted FROM meters WHERE owner = 'key 1'")[0])
            asked = row("r1", input=50, cached=0, output=0, reasoning=0, cost_nanos=50_000)
            await theirs.reserve("r1", lambda: asked, [(limit, 70_000)], {})
            assert await sums() == (0, 0, (0, 70_000))
            change(ours, "UPDATE processes SET host = 'elsewhere'")
            for _ in range(3):              # it lives as long as it beats
                await ours.beat()
                await asyncio.sleep(0.06)
                await theirs.beat()
            assert under_way(ours) == ["r1"]
            await ours.beat()
            await asyncio.sleep(0.11)
            await ours.beat()
            assert end_of(ours) == [("r1", "interrupted")] and await sums() == (1, 50, (50_000, 0))
            lost = row("r1", provider="azure", attempt=1, final=0, status="lost")
            for _ in range(2):
                await theirs.settle([lost, row("r1", provider="openai", attempt=2)])
                assert end_of(ours) == [("r1", "completed")] and await sums() == (1, 18, (24_000, 0))
            assert {each["provider"]: each["requests"] for each in await pomex.usage_report(ours.db, "provider", 0, 10**5)
                    if each["requests"]} == {"openai": 1}
    asyncio.run(check())


def test_a_process_that_was_idle_for_long_is_not_taken_for_dead_when_it_begins_a_request(path, monkeypatch):
    monkeypatch.setattr(pomex, "DEAD_S", 0.1)

    async def check():
        async with started(path, 2) as (theirs, ours):
            begin(theirs, "r1")
            await theirs.recorded("r1")
            await theirs.settle([row("r1")])
            change(ours, "UPDATE processes SET host = 'elsewhere'")
            await ours.beat()
            await asyncio.sleep(0.11)
            begin(theirs, "r2")
            await theirs.recorded("r2")
            await ours.beat()
            assert under_way(ours) == ["r2"]
    asyncio.run(check())


def test_a_guess_replaces_nothing(path):
    async def check():
        async with started(path) as (ledger,):
            for settled in (row("r1"), pomex.interrupted(row("r1")), row("r2", error_code="x"), pomex.interrupted(row("r2")),
                            pomex.interrupted(row("r3")), pomex.interrupted(row("r3", input=1))):
                await ledger.settle([settled])
            assert totals(ledger)["requests"] == 3 and totals(ledger)["input"] == 27
    asyncio.run(check())
    assert rows(path) == [("r1", "completed", ""), ("r2", "completed", "x"), ("r3", "failed", "interrupted")]


# --- a file that goes wrong while it is in use ----------------------------------------------------

def seen_and_said_once(path, caplog, remove, missing, replace, replaced, restore):
    """What a running ledger does when its database is not there, then another one is, then its own again."""
    async def check():
        async with started(path) as (ledger,):
            token = await ledger.create_key("laptop", NOW)
            assert ledger.available() and not caplog.records
            remove()
            await until(lambda: not ledger.available(), 1.0)
            await ledger.refresh()
            assert caplog.text.count(f"The database {ledger.db.name} {missing} The keys stay as they were") == 1
            assert (await ledger.authorise(f"Bearer {token}", NOW)).name == "laptop"
            with pytest.raises(pomex.LedgerError):
                begin(ledger, "r1")
            replace()
            await ledger.refresh()
            assert not ledger.available() and replaced in caplog.text
            restore()
            await ledger.refresh()
            assert ledger.available()
            begin(ledger, "r1")
            await ledger.settle([row("r1")])
    asyncio.run(check())
    assert rows(path) == [("r1", "completed", "")]


@of_a_file
def test_a_file_that_is_removed_or_replaced_while_in_use_is_seen_and_said_once(path, caplog):
    seen_and_said_once(
        path, caplog, lambda: os.rename(path, path + "-away"), "cannot be used: No such file or directory.",
        lambda: open(path, "w").close(), "the file was replaced", lambda: os.replace(path + "-away", path))


@of_a_server
def test_a_database_that_is_renamed_or_replaced_while_in_use_is_seen_and_said_once(path, cluster, caplog):
    name = pomex.read_postgres_url(path).database

    def rename(old, new):
        cluster.psql(f"ALTER DATABASE {old} ALLOW_CONNECTIONS false")
        cluster.disconnect(old)
        cluster.psql(f"ALTER DATABASE {old} RENAME TO {new}; ALTER DATABASE {new} ALLOW_CONNECTIONS true")

    def restore():
        cluster.psql(f"DROP DATABASE {name} WITH (FORCE)")
        rename(name + "_away", name)
    seen_and_said_once(
        path, caplog, lambda: rename(name, name + "_away"),
        f'is not there: database "{name}" does not exist (SQLSTATE 3D000).',
        lambda: cluster.psql(f"CREATE DATABASE {name} OWNER {postgres.USER}"),
        'cannot be used: relation "keys" does not exist (SQLSTATE 42P01)', restore)


@of_a_server
def test_a_server_that_is_killed_under_load_and_started_again_has_every_row_once(path, cluster, monkeypatch):
    monkeypatch.setattr(pomex, "RETRY_S", 0.05)
    names, refused = [], []

    async def client(ledger, number):
        for count in itertools.count():
            name = f"{number}-{count}"
            try:
                begin(ledger, name)
                if count % 2:
                    await ledger.recorded(name)
            except pomex.LedgerError:
                ledger.abandon(name)
                refused.append(name)
                await asyncio.sleep(0.02)
                continue
            await asyncio.sleep(0.005)
            await ledger.settle([row(name)])
            names.append(name)

    async def check():
        async with started(path, 2) as ledgers:
            await kill_under_load(cluster, ledgers, client, 2, names, 100, refused)
    asyncio.run(check())
    ends = rows(path)
    assert len({name for name, *_ in ends}) == len(ends) and set(names) <= {name for name, status, _ in ends if status == "completed"}
    assert not {name for name, *_ in ends} & set(refused)


@of_a_file
def test_a_file_that_is_damaged_while_in_use_is_seen_and_said_once(path, caplog):
    async def check():
        async with started(path) as (ledger,):
            await ledger.create_key("laptop", NOW)
            for db in (ledger.db.writer, ledger.db.reader):
                db.execute("PRAGMA cache_size = 0")
                db.execute("PRAGMA shrink_memory")
            ledger.db.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            sound = pathlib.Path(path).read_bytes()
            with open(path, "r+b") as file:
                file.seek(4096)
                file.write(b"\xff" * (len(sound) - 4096))
            await until(lambda: not ledger.available(), 1.0)
            await ledger.refresh()
            assert caplog.text.count("is damaged. Restore a backup") == 1
            with pytest.raises(pomex.LedgerError):
                begin(ledger, "r1")
            with open(path, "r+b") as file:
                file.write(sound)
            await ledger.refresh()
            assert ledger.available() and ledger.list_keys()[0].name == "laptop"
    asyncio.run(check())


# --- what is counted ------------------------------------------------------------------------------

def refusal(code, path="/v1/responses", **more):
    return {"time_ms": int(NOW * 1000), "code": code, "path": path, **more}


def test_of_many_refusals_alike_in_a_second_one_is_kept_with_their_number(path):
    async def check():
        async with started(path) as (ledger,):
            for number in range(500):
                ledger.refuse(7, refusal("limit", message=f"no {number}"))
            ledger.refuse(8, refusal("limit"))
            ledger.refuse(7, refusal("limit", "/v1/models"))
            for number in range(20):        # a storm of different ones
                ledger.refuse(7, refusal(f"c{number}"))
            begun = time.monotonic()
            await until(lambda: refusals(ledger))
            assert time.monotonic() - begun < 1.5
            kept = refusals(ledger)[::-1]
            assert [(each["code"], each["path"], each["count"]) for each in kept[:3]] == [
                ("limit", "/v1/responses", 500), ("limit", "/v1/responses", 1), ("limit", "/v1/models", 1)]
            assert kept[0]["message"] == "no 0" and len(kept) == pomex.REFUSALS_AT_ONCE
            stored, = read(ledger, "SELECT time_ms, key_id, code, count FROM refusals ORDER BY id LIMIT 1")
            assert stored == (int(NOW * 1000), 7, "limit", 500)
            assert await ledger.counted() == {("pomex_refusals_total", "limit"): 502,
                                              **{("pomex_refusals_total", f"c{number}"): 1 for number in range(20)}}
            assert recent(ledger, 9) == []
            ledger.refuse(7, refusal("limit"))
            await ledger.save_counts()
            assert refusals(ledger)[0]["count"] == 1
    asyncio.run(check())


def test_only_the_newest_refusals_are_kept(ledger, monkeypatch):
    monkeypatch.setattr(pomex, "REFUSALS_KEPT", 10)

    async def check():
        for number in range(25):
            ledger.refuse(0, refusal("limit", number=number))
            await ledger.save_counts()
        assert [each["number"] for each in refusals(ledger)] == [*range(24, 14, -1)]
        assert await ledger.counted() == {("pomex_refusals_total", "limit"): 25}
    asyncio.run(check())


def test_the_counters_of_all_processes_are_given_together_and_survive_them(path):
    async def check():
        async with started(path, 2) as (one, other):
            for ledger, code, count in ((one, "limit", 3), (other, "limit", 4), (other, "key", 1)):
                for _ in range(count):
                    ledger.refuse(0, refusal(code))
            await one.counted()
            expected = {("pomex_refusals_total", "limit"): 7, ("pomex_refusals_total", "key"): 1}
            assert await other.counted() == await one.counted() == expected
            one.refuse(0, refusal("limit"))             # saved by its close
            return {**expected, ("pomex_refusals_total", "limit"): 8}
    expected = asyncio.run(check())
    with contextlib.closing(pomex.Ledger.open(path)) as ledger:
        assert run(ledger.counted()) == expected


@outages()
def test_counts_that_cannot_be_saved_are_kept_for_later(ledger, outage):
    async def check():
        outage.begin(ledger)
        ledger.refuse(0, refusal("limit", message="m" * 9000))
        with pytest.raises(pomex.LedgerError) as refused:
            await ledger.save_counts()
        assert outage.words in str(refused.value)
        ledger.refuse(0, refusal("limit"))
        outage.end()
        assert await ledger.counted() == {("pomex_refusals_total", "limit"): 2}
    asyncio.run(check())


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_process_has_ended_also_where_nobody_has_buried_it_or_its_number_came_again():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = pomex.start_of(process.pid)
    assert start and not pomex.has_ended(process.pid, start) and pomex.has_ended(process.pid, start + "0")
    process.kill()
    deadline = time.monotonic() + 5
    while not pomex.has_ended(process.pid, start):      # a zombie until it is waited for
        assert time.monotonic() < deadline
    assert process.wait() and pomex.has_ended(process.pid, start)


def test_a_change_among_ten_thousand_keys_holds_the_loop_for_two_milliseconds_at_most(path, monkeypatch):
    """CPU time of the longest step of the loop: a wall clock would measure the machine's other work."""
    async def check():
        async with started(path, 2) as (one, other):
            one.db.commit(lambda tx: tx.execute_many(
                "INSERT INTO keys (name, digest, hint, created_s, revision) VALUES (?, ?, 'h', 1, ?)",
                [(f"k{number}", f"{number:064x}", number + 1) for number in range(10_000)]))
            await until(lambda: len(one.keys) == len(other.keys) == 10_000)
            longest, run_step = [0.0], asyncio.events.Handle._run

            def timed(handle):
                begun = time.thread_time()
                run_step(handle)
                longest[0] = max(longest[0], time.thread_time() - begun)
            monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
            await one.edit_key("k77", rpm=5)
            await until(lambda: other.keys[78].rpm == 5)
            await one.db.write(lambda tx: tx.execute(f"UPDATE keys SET tpm = 9, revision = {pomex.NEXT_REVISION}"))
            await until(lambda: all(key.tpm == 9 for ledger in (one, other) for key in list(ledger.keys.values())[::500]))
            monkeypatch.undo()
            assert longest[0] < 0.002, longest
    asyncio.run(check())


def test_who_waits_for_others_to_join_its_commit_is_answered_when_the_ledger_is_closed(path):
    async def check():
        with contextlib.closing(pomex.Ledger.open(path)) as ledger:
            ledger.start()
            begin(ledger, "other")
            await ledger.settle([row("first")])
            waiting = asyncio.create_task(ledger.settle([row("second")]))
            await asyncio.sleep(0)          # it is asked for, and the next commit is not due yet
            assert ledger.flushed is not None
        await asyncio.wait_for(waiting, 1)
    asyncio.run(check())
    assert rows(path) == [("first", "completed", ""), ("other", "failed", "interrupted"), ("second", "completed", "")]
