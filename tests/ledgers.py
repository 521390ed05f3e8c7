"""What tests look at of a ledger: its newest rows, and the sums of all; and a ledger's file as it was at first."""
import contextlib

import pomex

COUNTS = ("requests", "input", "cached", "cache_write", "output", "reasoning", "cost_nanos")


def recent(ledger, limit):
    """The newest rows, newest first, with the key's name."""
    columns = ", ".join(f"usage.{name}" for name in pomex.USAGE_COLUMNS)
    rows = ledger.read(f"SELECT coalesce(keys.name, ''), {columns} FROM usage "
                       "LEFT JOIN keys ON keys.id = usage.key_id ORDER BY usage.id DESC LIMIT ?", (limit,))
    return [dict(zip(("key", *pomex.USAGE_COLUMNS), row)) for row in rows]


def totals(ledger):
    """Sums over all rows."""
    rows = ledger.read(f"SELECT {', '.join(f'coalesce(sum({name}), 0)' for name in COUNTS)} FROM daily")
    return dict(zip(COUNTS, rows[0]))


@contextlib.contextmanager
def first_schema(path, monkeypatch):
    """A new file of the first schema, open; migrations are those of today again after it."""
    with monkeypatch.context() as older:
        older.setattr(pomex, "MIGRATIONS", pomex.MIGRATIONS[:1])
        pomex.create_file(path)
        with contextlib.closing(pomex.open_database(path, "process")) as db:
            pomex.migrate(db, path)
            yield db
