"""Restarts under load: no request is lost. By a drain and a socket that somebody holds (as systemd does), with one process and
with four; by a reload of all workers; and by a drain alone, where a new connection is refused for a moment."""
from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), *filter(None, [os.environ.get("POMEX_FOLDER")])]

import test_life  # noqa: E402

CLIENTS, RESTARTS = 24, 4


class Load:
    """Clients that ask without a pause, half of them over kept connections, in a thread of their own."""

    def __init__(self, port: int, key: str) -> None:
        self.port, self.key = port, key
        self.ends: collections.Counter[str] = collections.Counter()
        self.refused, self.stopping = 0, False
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()), daemon=True)

    async def run(self) -> None:
        await asyncio.gather(*(self.client(number) for number in range(CLIENTS)))

    async def client(self, number: int) -> None:
        link: Any = None
        while not self.stopping:
            kept, streamed = number % 2 == 0, number % 4 < 2
            if link is None or link[0].at_eof():        # closed while it was idle: nothing was sent, nothing is lost
                link = await self.connect()
            try:
                end, keep = await asyncio.wait_for(self.ask(*link, streamed, kept), 30)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                end, keep = f"LOST {type(error).__name__} {'kept' if kept else 'new'}", False
            self.ends[end] += 1
            if not keep:
                link[1].transport.abort()
                link = None
            await asyncio.sleep(0.01)

    async def connect(self) -> Any:
        while True:
            try:
                return await asyncio.open_connection("127.0.0.1", self.port)
            except ConnectionRefusedError:
                self.refused += 1
                await asyncio.sleep(0.02)

    async def ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, streamed: bool, kept: bool) -> tuple[str, bool]:
        body = json.dumps({"model": "local/ok" if not streamed else "local/paced", "input": "x", "stream": streamed}).encode()
        writer.write(b"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\n" + (b"" if kept else b"connection: close\r\n")
                     + b"authorization: Bearer " + self.key.encode() + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        data = await (reader.readuntil(b"0\r\n\r\n") if b"chunked" in head else reader.readexactly(
            int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])))
        good = head.startswith(b"HTTP/1.1 200") and b'"status":"completed"' in data.replace(b'": "', b'":"')
        return "ok" if good else f"LOST {head[9:12].decode()}", kept and b"connection: close" not in head.lower()

    def __enter__(self) -> Load:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping = True
        self.thread.join(30)


@contextlib.contextmanager
def held_socket() -> Iterator[tuple[int, dict[str, Any]]]:
    """A listening socket that outlives every gateway, and how one is started behind it."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as held:
        os.dup2(held.fileno(), 3) if held.fileno() != 3 else None
        shell = f'export LISTEN_PID=$$ LISTEN_FDS=1; exec "{sys.executable}" "{test_life.FILE}" serve --config pomex.toml'
        yield held.getsockname()[1], {"command": ["sh", "-c", shell], "pass_fds": (3,)}


def told(load: Load) -> str:
    return f"{dict(load.ends)}, refused {load.refused}"


@pytest.mark.parametrize("workers", [1, 4])
def test_by_a_held_socket(tmp_path: Path, workers: int) -> None:
    with test_life.faults.in_thread(pace_s=0.01) as upstream, held_socket() as (port, how):
        how = {**how, "workers": workers, "url": upstream.url, "drain": 10}
        with contextlib.ExitStack() as stack:
            current = stack.enter_context(test_life.running(tmp_path, **how))
            with Load(port, current.key) as load:
                for _ in range(RESTARTS):
                    time.sleep(1)
                    current.signal(signal.SIGTERM)
                    assert current.end() == 0, current.said
                    current = stack.enter_context(test_life.running(tmp_path, **how))
                time.sleep(1)
            print(told(load))
            assert set(load.ends) == {"ok"} and not load.refused, told(load)
            assert len(current.settled(load.ends["ok"])) == load.ends["ok"]


def test_by_a_reload_of_all_workers(tmp_path: Path) -> None:
    with test_life.gateway(tmp_path, workers=4, drain=10, pace_s=0.01) as current:
        with Load(current.port, current.key) as load:
            before = test_life.until(lambda: len(current.workers) == 4 and current.workers)
            for number in range(2):
                time.sleep(1)
                current.write(workers=4, drain=10, more=f"[models.new{number}]\ntargets = ['demo:echo']")
                current.signal(signal.SIGHUP)
                current.says(rf"Reloaded pomex\.toml: .*models\.new{number}")
            time.sleep(1)
            assert current.workers == before
        print(told(load))
        assert set(load.ends) == {"ok"} and not load.refused, told(load)
        assert len(current.settled(load.ends["ok"])) == load.ends["ok"]


@pytest.mark.parametrize("workers", [1, 4])
def test_by_a_drain_alone(tmp_path: Path, workers: int) -> None:
    """Between the two nobody listens: who comes then is refused, which every client tries again; nobody is cut."""
    with test_life.faults.in_thread(pace_s=0.01) as upstream, contextlib.ExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        how = {"workers": workers, "url": upstream.url, "drain": 10, "POMEX_PORT": str(port)}
        current = stack.enter_context(test_life.running(tmp_path, **how))
        with Load(port, current.key) as load:
            for _ in range(RESTARTS):
                time.sleep(1)
                current.signal(signal.SIGTERM)
                assert current.end() == 0, current.said
                current = stack.enter_context(test_life.running(tmp_path, **how))
            time.sleep(1)
        print(told(load))
        assert set(load.ends) == {"ok"}, told(load)
