"""What one attacker can make of a running gateway, as its own process under limits of memory and files: /health is asked all the
while, and the figures are printed (pytest -s). A machine at work for others needs more room than the 200 ms: POMEX_SLOW=3."""
import contextlib
import json
import os
import pathlib
import re
import resource
import socket
import subprocess
import sys
import threading
import time

import pytest

POMEX = pathlib.Path(__file__).resolve().parents[2] / "pomex.py"
SLOW = float(os.environ.get("POMEX_SLOW", "1"))
FLOOD = '''
import asyncio, json
CHUNK = {"choices": [{"index": 0, "delta": {"content": "a word "}}]}
ITEM = {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "call_%d", "function": {"name": "f", "arguments": "{}"}}]}}]}
RELAYED = {"type": "response.output_text.delta", "item_id": "m", "output_index": 0, "content_index": 0, "delta": "a word "}
OPEN = [{"type": "response.created", "response": {"id": "r", "status": "in_progress"}},
        {"type": "response.output_item.added", "output_index": 0, "item": {"id": "m", "type": "message", "content": []}}]
def sse(each):
    return b"data: " + json.dumps(each).encode() + b"\\n\\n"
async def serve(reader, writer):
    try:
        top = await reader.readuntil(b"\\r\\n\\r\\n")
        writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-type: text/event-stream\\r\\n\\r\\n")
        number = 0
        for each in OPEN if b"/relayed/" in top else ():
            writer.write(sse(each))
        while True:
            number += 1
            block = sse(RELAYED) * 2000 if b"/relayed/" in top else b": ping\\n\\n" * 9000 if b"/comments/" in top else \\
                b"".join(sse(ITEM).replace(b"%d", b"%d" % (number * 100 + n)) for n in range(100)) if b"/items/" in top else sse(CHUNK) * 2000
            writer.write(block)
            await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
'''


class Gateway:
    def __init__(self, port, key, process, folder):
        self.port, self.key, self.process, self.folder = port, key, process, folder
        self.waits, self.failed, self.stopped = [], [], threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()

    def watch(self):
        """Asks for /health by a connection of its own, again and again."""
        while not self.stopped.wait(0.02):
            began = time.monotonic()
            try:
                with socket.create_connection(("127.0.0.1", self.port), 5) as made:
                    made.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                    if not made.recv(100).startswith(b"HTTP/1.1 200"):
                        self.failed.append("no 200")
            except OSError as error:
                self.failed.append(repr(error))
            self.waits.append(time.monotonic() - began)

    def peak_mib(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

    def log(self):
        return (self.folder / "log").read_text()

    def post(self, body, wait_s=120):
        head = f"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {self.key}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), wait_s) as made:
            with contextlib.suppress(ConnectionError):      # refused before it was taken
                made.sendall(head.encode() + body)
            size, last, self.seen = 0, b"", False
            while data := made.recv(1 << 20):
                size, last = size + len(data), last[-300:] + data
                self.seen = self.seen or b"max_answer_chars = 33554432" in last
        known = len(self.waits)
        while len(self.waits) < known + 2:      # whoever asked for /health meanwhile has been answered
            time.sleep(0.01)
        return size, last

    def told(self, what):
        return f"{what}: slowest /health {max(self.waits) * 1000:.0f} ms of {len(self.waits)}, peak {self.peak_mib():.0f} MiB, log {len(self.log())} bytes"


@contextlib.contextmanager
def gateway(folder, server="", files=4096, memory_mib=4096, fields=""):
    flood = subprocess.Popen([sys.executable, "-c", FLOOD], stdout=subprocess.PIPE, text=True)
    up = flood.stdout.readline().strip()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = f"[server]\nport = {port}\n{server}\n[database]\nurl = 'sqlite:{folder}/pomex.db'\n"
    for name, wire in (("text", "chat"), ("items", "chat"), ("comments", "chat"), ("relayed", "responses")):
        text += f"[providers.{name}]\nwire_api = '{wire}'\nbase_url = 'http://127.0.0.1:{up}/{name}'\napi_key = 'sk-x'\n{fields}\n" + "relay = 'bytes'\n" * (name == "relayed")
    (folder / "pomex.toml").write_text(text)
    command = [sys.executable, str(POMEX)]
    environment = {**os.environ, "POMEX_CONFIG": str(folder / "pomex.toml")}
    key = subprocess.run([*command, "keys", "create", "k"], env=environment, capture_output=True, text=True, check=True).stdout
    key = re.search(r"sk-rh-\w+", key)[0]

    def limits():
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([*command, "serve"], env=environment, stdout=log, stderr=log, preexec_fn=limits)     # noqa: PLW1509
    try:
        for _ in range(400):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        made = Gateway(port, key, process, folder)
        try:
            yield made
        finally:
            made.stopped.set()
            made.watcher.join()
        assert not made.failed, made.failed[:5]
        assert "Traceback" not in made.log()
    finally:
        process.terminate()
        process.wait(30)
        flood.kill()
        flood.wait()


def test_60_mb_of_small_items(tmp_path):
    with gateway(tmp_path) as asked:
        size, last = asked.post(b'{"model":"text/m","input":[' + b"{}," * 20_000_000 + b"{}]}")
        assert b"more than 2000000 JSON values" in last
        print("\n" + asked.told("20 million objects"))
        item = b'{"role":"user","content":"%s"},' % (b"n" * 570)
        size, last = asked.post(b'{"model":"text/m","input":[' + item * 100_001 + b"{}]}")
        assert b"at most 100000 are taken" in last
        assert max(asked.waits) < 1.0 * SLOW
        asked.waits.clear()
        body = b'{"model":"nobody/m","input":[' + (item * 100_000)[:-1] + b"]}"
        size, last = asked.post(body)
        assert b"nobody" in last
        print(asked.told(f"a body of {len(body) >> 20} MiB and 100,000 items, read and checked"))
        assert max(asked.waits) < 1.0 * SLOW


@pytest.mark.parametrize("kind", ["text", "items", "relayed"])
def test_an_endless_answer(kind, tmp_path):
    with gateway(tmp_path, memory_mib=3072) as asked:
        began = time.monotonic()
        size, last = asked.post(json.dumps({"model": f"{kind}/m", "input": "x", "stream": True}).encode())
        assert asked.seen and last.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        print("\n" + asked.told(f"endless {kind}, {size >> 20} MiB came in {time.monotonic() - began:.0f} s"))
        assert asked.peak_mib() < 1500


def test_a_flood_of_comments(tmp_path):
    with gateway(tmp_path, fields="idle_timeout_s = 3") as asked:
        began = time.monotonic()
        _, last = asked.post(json.dumps({"model": "comments/m", "input": "x", "stream": False}).encode())
        took_s = time.monotonic() - began
        assert b"idle_timeout_s = 3 s" in last or b"No provider left" in last
        print("\n" + asked.told(f"comments for {took_s:.1f} s"))
        assert took_s < 20 * SLOW and max(asked.waits) < 0.2 * SLOW and asked.peak_mib() < 150


@pytest.mark.parametrize("files, most", [(8192, 500), (8192, 4096), (256, 4096)])
def test_2000_idle_connections(files, most, tmp_path):
    with gateway(tmp_path, f"max_connections = {most}", files=files) as asked:
        asked.waits.clear()
        crowd = []
        for _ in range(2000):
            with contextlib.suppress(OSError):
                crowd.append(socket.create_connection(("127.0.0.1", asked.port), 5))
        time.sleep(8)
        more = [socket.create_connection(("127.0.0.1", asked.port), 5) for _ in range(100)]
        time.sleep(1)
        print("\n" + asked.told(f"2,000 idle connections, room for {most}, {files} files"))
        assert max(asked.waits) < 0.2 * SLOW and asked.peak_mib() < 150 and len(asked.log()) < 500_000
        for one in crowd + more:
            one.close()
