"""python slow_clients.py [N]: what N clients cost that ask for an endless stream and then take nothing.

Not part of the core run. The upstream sends as fast as it can; what it got rid of, and the gateway's memory, say what is
held for one stream. PYTHONPATH has to lead to pomex.py.
"""
import asyncio
import json
import os
import resource
import socket
import sys
import tempfile
import time

import pomex

COUNT = int(sys.argv[1]) if sys.argv[1:2] and sys.argv[1].isdecimal() else 500
PAUSE_S = 3.0
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"a token or two "}}]}\n\n' * 50


async def endless(sent, left):
    """A chat server whose answers never end; `sent` counts what each connection took, `left` when it was closed."""
    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r")[0]))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.transport.set_write_buffer_limits(high=65536)
        slot = len(sent)
        sent.append(0)
        left.append(0.0)
        try:
            while True:
                writer.write(pomex.chunk(CHUNK))
                await writer.drain()
                sent[slot] += len(CHUNK)
        except (OSError, asyncio.CancelledError):
            left[slot] = time.monotonic()
            writer.close()
    return await asyncio.start_server(serve, "127.0.0.1", 0, backlog=4096)


def rss(pid):
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def gateway(port, pipe):
    async def main():
        config = pomex.load_config(f'[server]\nport = 0\n[providers.a]\nwire_api = "chat"\nbase_url = "http://127.0.0.1:{port}/v1"\n', "p.toml", {})
        with tempfile.TemporaryDirectory() as folder:
            ledger = pomex.Ledger.open(folder + "/pomex.db")
            token = await ledger.create_key("k", time.time())
            async with pomex.running(config, ledger) as server:
                os.write(pipe, json.dumps([list(server.address), token]).encode())
                await asyncio.sleep(3600)
    asyncio.run(main())


def connect(address, token):
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(tuple(address))
    body = json.dumps({"model": "a/m", "input": "hi", "stream": True}).encode()
    client.sendall(f"POST /v1/responses HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {token}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    return client


async def measure():
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sent, left = [], []
    upstream = await endless(sent, left)
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    pid = os.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, __file__, "gateway", str(upstream.sockets[0].getsockname()[1]), str(theirs)])  # noqa: S606
    address, token = json.loads(await asyncio.to_thread(os.read, ours, 4096))
    before = rss(pid)
    clients = [await asyncio.to_thread(connect, address, token) for _ in range(COUNT)]
    moved = 1
    while moved:                                # until all buffers are full, and what is in them is translated
        before_pause, busy_s = sum(sent), cpu_s(pid)
        await asyncio.sleep(PAUSE_S)
        moved = sum(sent) - before_pause or cpu_s(pid) - busy_s > PAUSE_S / 10
    held = rss(pid)
    print(f"{len(sent)} streams; rss {before >> 20} -> {held >> 20} MiB: {(held - before) / COUNT / 1024:.0f} KiB a stream; each took "
          f"{sum(sent) / max(1, len(sent)) / 1024:.0f} KiB of its upstream (kernel buffers included), then nothing for {PAUSE_S:g} s")
    gone = time.monotonic()
    for client in clients:
        client.close()
    while not all(left):
        await asyncio.sleep(0.05)
    waits = sorted(when - gone for when in left)
    await asyncio.sleep(PAUSE_S)
    print(f"all left at once: upstreams closed after {waits[len(waits) // 2]:.2f} s (median), {waits[-1]:.2f} s (last); "
          f"rss {rss(pid) >> 20} MiB, descriptors {len(os.listdir(f'/proc/{pid}/fd'))}")
    os.kill(pid, 9)
    os.waitpid(pid, 0)


if len(sys.argv) > 3:
    gateway(int(sys.argv[2]), int(sys.argv[3]))
else:
    asyncio.run(measure())
