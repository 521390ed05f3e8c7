"""What all tests share: a quiet environment, so that no key or setting of this machine changes a result."""
import contextlib
import os
import pathlib

import ledgers
import postgres
import pytest

import pomex

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
REQUIRED = os.environ.get("POMEX_REQUIRE_TOOLS") == "1"         # then what is not installed is a failure
QUIET = ("POMEX_", "PGPASSWORD", "XDG_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "NO_COLOR")


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch, tmp_path):
    keys = {row.env_key for row in pomex.BUILTIN_PROVIDERS.values()}
    for name in list(os.environ):
        if name.upper().startswith(QUIET) or name in keys:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def need_postgres(*more):
    """Skips the test where it, or one of these programs, is not installed; or fails, if POMEX_REQUIRE_TOOLS=1."""
    if reason := postgres.missing(*more):
        (pytest.fail if REQUIRED else pytest.skip)(reason)


@pytest.fixture(scope="session")
def cluster():
    """A PostgreSQL for all tests of a run."""
    need_postgres()
    with postgres.Cluster() as started:
        yield started


@pytest.fixture(scope="session")
def template(cluster):
    """The name of a database with Pomex's tables, to make others of."""
    place = cluster.create()
    with contextlib.closing(pomex.open_database(place)) as db:
        db.migrate()
    return pomex.read_postgres_url(place).database


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request, tmp_path):
    """A database that is empty, of PostgreSQL with Pomex's tables, which is quicker: a file's path or a URL."""
    if request.param == "sqlite":
        return str(tmp_path / "state" / "pomex.db")
    return request.getfixturevalue("cluster").create(request.getfixturevalue("template"))


@pytest.fixture(params=["sqlite", "postgresql"])
def new_place(request, tmp_path):
    """A database that is not there, or has no tables."""
    return str(tmp_path / "pomex.db") if request.param == "sqlite" else request.getfixturevalue("cluster").create()


@pytest.fixture
def outage(request, place):
    made = ledgers.Outage(request.param, place, None if ledgers.OUTAGES[request.param][0] == "sqlite" else request.getfixturevalue("cluster"))
    yield made
    made.end()


def outages(*but):
    """All, but these."""
    return pytest.mark.parametrize("place, outage", [(row[0], kind) for kind, row in ledgers.OUTAGES.items() if kind not in but],
                                   indirect=True, ids=[kind for kind in ledgers.OUTAGES if kind not in but])


of_a_file = pytest.mark.parametrize("place", ["sqlite"], indirect=True)           # what only SQLite has, or this host's processes
of_a_server = pytest.mark.parametrize("place", ["postgresql"], indirect=True)      # what only PostgreSQL has
