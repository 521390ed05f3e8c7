"""What all tests share: a quiet environment, so that no key or setting of this machine changes a result."""
import os
import pathlib

import pytest

import pomex

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
QUIET = ("POMEX_", "XDG_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "NO_COLOR")


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch, tmp_path):
    keys = {row.env_key for row in pomex.BUILTIN_PROVIDERS.values()}
    for name in list(os.environ):
        if name.upper().startswith(QUIET) or name in keys:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
