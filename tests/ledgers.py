"""What tests look at of a ledger and put into it. Each helper opens the file for itself, so that it works with and without a
loop, whatever the ledger is writing meanwhile; `run` and `key_made` are for tests that have no loop."""
import asyncio
import contextlib
import json
import pathlib
import sqlite3
import threading
import time
import urllib.parse

import postgres

import pomex

COUNTS = ("requests", "input", "cached", "cache_write", "output", "reasoning", "cost_nanos")


@contextlib.contextmanager
def opened_file(ledger, mode):
    uri = f"file:{urllib.parse.quote(ledger.db.place)}?mode={mode}"
    with contextlib.closing(sqlite3.connect(uri, timeout=10, isolation_level=None, uri=True)) as db:
        yield db


def transact(ledger, run):
    """On a connection of its own."""
    if ledger.db.on_this_host:
        with opened_file(ledger, "rw") as db, db:
            db.execute("BEGIN IMMEDIATE")
            return run(pomex.Transaction(db))
    with contextlib.closing(pomex.open_database(as_keeper(ledger.db.place))) as db:
        return db.commit(run)


def as_keeper(url):
    """Of the same database, for whom no outage that a test makes keeps out."""
    return url.replace(f"://{postgres.USER}:", f"://{postgres.ADMIN}:")


def read(ledger, sql, *values):
    """All rows, as they are committed."""
    if not ledger.db.on_this_host:
        return transact(ledger, lambda tx: tx.read(sql, values))
    with opened_file(ledger, "ro") as db:
        return db.execute(sql, values).fetchall()


def recent(ledger, limit):
    """The newest requests, newest first, with the key's name: one row each, the final one."""
    columns = ", ".join(f"usage.{name}" for name in pomex.USAGE_COLUMNS)
    rows = read(ledger, f"SELECT coalesce(keys.name, ''), {columns} FROM usage LEFT JOIN keys ON keys.id = usage.key_id "
                        "WHERE final = 1 ORDER BY usage.id DESC LIMIT ?", limit)
    return [dict(zip(("key", *pomex.USAGE_COLUMNS), row)) for row in rows]


def lost(ledger):
    """The attempts that were given up and are billed, in the order in which they were written."""
    rows = read(ledger, f"SELECT {', '.join(pomex.USAGE_COLUMNS)} FROM usage WHERE final = 0 ORDER BY id")
    return [dict(zip(pomex.USAGE_COLUMNS, row)) for row in rows]


def under_way(ledger):
    """The ids of the open requests that are recorded."""
    return [response_id for response_id, in read(ledger, "SELECT response_id FROM open_requests ORDER BY response_id")]


def totals(ledger):
    """Sums over all rows."""
    rows = read(ledger, f"SELECT {', '.join(f'coalesce(sum({name}), 0)' for name in COUNTS)} FROM usage_rollups")
    return dict(zip(COUNTS, rows[0]))


def refusals(ledger):
    """What is kept of refusals, newest first."""
    return [json.loads(data) for data, in read(ledger, "SELECT data FROM refusals ORDER BY id DESC")]


def audited(ledger):
    """The audit log, oldest first: (who, action, name, before, after)."""
    rows = read(ledger, "SELECT who, action, name, before, after FROM audit ORDER BY id")
    return [(*row[:3], json.loads(row[3]), json.loads(row[4])) for row in rows]


def change(ledger, sql, *values):
    """Writes past the ledger, as another program may: how many rows it changed."""
    return transact(ledger, lambda tx: tx.execute(sql, values))


def insert(ledger, rows):
    """Rows and their sums, in a transaction of their own; none of them may be there."""
    transact(ledger, lambda tx: pomex.insert_rows(tx, rows))


def run(coroutine):
    """What a coroutine gives, for tests that have no loop."""
    async def awaited():
        return await coroutine
    return asyncio.run(awaited())


def key_made(ledger, name, now_s=None, **settings):
    """The token of a new key, for tests that have no loop."""
    return run(ledger.create_key(name, time.time() if now_s is None else now_s, **settings))


async def account_made(ledger, name, prepaid, limit_nanos, multiplier, now_s, who=""):
    await ledger.create("account", name, now_s, who, {
        "prepaid": int(prepaid), "limit_nanos": limit_nanos, "multiplier": multiplier})


def key_of(ledger, name):
    return next(key for key in ledger.list_keys() if key.name == name)


def dumped(ledger):
    """All that is in the database."""
    return {table: read(ledger, f"SELECT * FROM {table} ORDER BY {key}") for table, key in pomex.TABLE_KEYS.items()}


def stored(ledger):
    """All that a thief of the database gets."""
    if ledger.db.on_this_host:
        return b"".join(file.read_bytes() for file in pathlib.Path(ledger.db.place).parent.iterdir())
    return postgres.run(postgres.program("pg_dump"), ledger.db.place).encode()


@contextlib.contextmanager
def statements(ledger):
    """What is asked of the database in the meantime, without the values."""
    said = []
    if ledger.db.on_this_host:
        ledger.db.writer.set_trace_callback(said.append)
        yield said
        ledger.db.writer.set_trace_callback(None)
        return
    send = pomex.PostgresConnection.executemany

    def note(connection, sql, rows):
        rows = list(rows)
        if threading.current_thread().name.startswith("writer"):        # not what a helper looks up meanwhile
            said.extend([sql] * len(rows))
        send(connection, sql, rows)
    pomex.PostgresConnection.executemany = note
    try:
        yield said
    finally:
        pomex.PostgresConnection.executemany = send


@contextlib.contextmanager
def locked(place):
    """As long as another program writes."""
    if not pomex.POSTGRES_URL.fullmatch(place):
        with contextlib.closing(sqlite3.connect(place, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            yield
        return
    with contextlib.closing(pomex.open_database(place).connect()) as other:
        other.execute("BEGIN")
        other.execute("LOCK TABLE usage, meters, rates, open_requests IN EXCLUSIVE MODE").fetchall()
        yield


FULL = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN RAISE ''could not extend file: No space left on device'' USING ERRCODE = ''disk_full''; END';
DO 'DECLARE each text; BEGIN
    FOR each IN SELECT tablename FROM pg_tables WHERE schemaname = ''public'' LOOP
        EXECUTE ''CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON '' || each || '' EXECUTE FUNCTION refuse()'';
    END LOOP; END'
"""
OUTAGES = {     # of which database, how it begins, how it ends, what is said of it
    "a full disk": ("sqlite", "PRAGMA max_page_count = 1", "PRAGMA max_page_count = 1000000", "cannot grow: the disk is full."),
    "a server's full disk": ("postgresql", FULL, "DROP FUNCTION refuse CASCADE",
                             "has no room left: could not extend file: No space left on device (SQLSTATE 53100)."),
    "a standby in its place": ("postgresql", "ALTER DATABASE {0} SET default_transaction_read_only = on",
                               "ALTER DATABASE {0} RESET default_transaction_read_only",
                               "is a standby, which cannot be written: it takes no writes (SQLSTATE 25006)."),
    "no connection left": ("postgresql", "ALTER DATABASE {0} CONNECTION LIMIT 0", "ALTER DATABASE {0} CONNECTION LIMIT -1",
                           'has no connection left: too many connections for database "{0}" (SQLSTATE 53300).'),
    "a stopped server": ("postgresql", "", "", "cannot be reached: Connection refused."),
}


class Outage:
    """Keeps a ledger from writing; the helpers here still read, unless the server is stopped."""

    def __init__(self, kind, place, cluster):
        self.cluster, self.ledger = cluster, None
        self.name = "" if cluster is None else pomex.read_postgres_url(place).database
        _, self.first, self.last, self.words = (text.replace("{0}", self.name) for text in OUTAGES[kind])

    def begin(self, ledger):
        self.ledger = ledger
        if self.cluster is None:            # what it has, it may keep
            self.ledger.db.writer.execute(self.first)
        elif self.first:
            self.cluster.psql(self.first, self.name)
            self.cluster.disconnect(self.name)
        else:
            self.cluster.stop()

    def end(self):
        if self.ledger is None:
            return
        if self.cluster is None:
            with contextlib.suppress(sqlite3.ProgrammingError):         # closed
                self.ledger.db.writer.execute(self.last)
        elif self.last:
            self.cluster.psql(self.last, self.name)
        else:
            self.cluster.start()
        self.ledger = None


async def kill_under_load(cluster, ledgers, client, times, done, enough, refused):
    """Kills and starts the server so many times, each after so many more are done, while 16 clients ask; then ends these."""
    clients = [asyncio.create_task(client(ledgers[number % 2], number)) for number in range(16)]
    for _ in range(times):
        count = len(done)
        await until(lambda count=count: len(done) > count + enough)
        await asyncio.to_thread(cluster.kill)
        count = len(refused)
        await until(lambda count=count: len(refused) > count)
        await asyncio.to_thread(cluster.start)
        await until(lambda: all(ledger.available() for ledger in ledgers))
    for each in clients:
        each.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


async def beats(ledger):
    """As a running server beats, until it must have noticed who is dead."""
    dead_s, pomex.DEAD_S = pomex.DEAD_S, 0.25
    for _ in range(4):
        await ledger.beat()
        await asyncio.sleep(0.1)
    pomex.DEAD_S = dead_s


@contextlib.asynccontextmanager
async def started(path, count=1, **settings):
    """So many ledgers of one file, as running servers have them."""
    with contextlib.ExitStack() as stack:
        ledgers = [stack.enter_context(contextlib.closing(pomex.Ledger.open(path, **settings))) for _ in range(count)]
        for ledger in ledgers:
            ledger.start()
        yield ledgers


async def until(condition, within_s=5.0):
    """Waits for what is about to happen."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)
