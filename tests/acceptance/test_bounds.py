"""What one attacker can make of a running gateway, as its own process under limits of memory and files: /health is asked all the
while, and the figures are printed (pytest -s). A machine at work for others needs more room than the 200 ms: POMEX_SLOW=3."""
import asyncio
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
                with socket.create_connection(("127.0.0.1", self.port), 5 * SLOW) as made:
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


# --- what is linear, and how long others wait ------------------------------------------------------
#
# CPU of the gateway's process is compared, not time: it grows with what is asked and not with what else the machine does.

# One provider that answers by the first part of its path: huge-N sends one event of N MB in pieces of 64 KB, paced sends a token
# every 10 ms whose text is the moment of its sending, any other a short answer.
PROVIDER = r'''
import asyncio, json, re, time
def sse(event):
    return b"data: " + json.dumps(event).encode() + b"\n\n"
def frames(path, text):
    """What comes before a text, what makes an event of a text, and what comes after it."""
    if path.endswith("/chat/completions"):
        return [], lambda text: {"choices": [{"index": 0, "delta": {"content": text}}]}, [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
    if path.endswith("/messages"):
        return [{"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 1}}}, {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}], \
            lambda text: {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}, \
            [{"type": "content_block_stop", "index": 0}, {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}}, {"type": "message_stop"}]
    if "GenerateContent" in path:
        return [], lambda text: {"candidates": [{"content": {"parts": [{"text": text}]}}]}, [{"candidates": [{"content": {"parts": [{"text": "."}]}, "finishReason": "STOP"}]}]
    item = {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": [{"type": "output_text", "text": text, "annotations": []}]}
    place = {"item_id": "m", "output_index": 0, "content_index": 0}
    return [{"type": "response.created", "response": {"id": "r", "object": "response", "status": "in_progress", "output": []}},
            {"type": "response.output_item.added", "output_index": 0, "item": {**item, "status": "in_progress", "content": []}}], \
        lambda text: {"type": "response.output_text.delta", **place, "delta": text}, \
        [{"type": "response.output_item.done", "output_index": 0, "item": item}, {"type": "response.completed", "response": {"id": "r", "object": "response",
          "status": "completed", "output": [item], "usage": {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}}}]
async def serve(reader, writer):
    try:
        while True:
            top = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            left = int(re.search(r"(?i)content-length: (\d+)", top)[1])
            while left:
                left -= len(await reader.read(min(left, 1 << 20)))
            path = top.split(" ")[1].partition("?")[0]
            kind, size = path.split("/")[1], 0
            if kind.startswith("huge-"):
                size = int(kind[5:]) << 20
            head, made, tail = frames(path, "x" * size or "ok")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + b"".join(map(sse, head)))
            if kind == "paced":
                for _ in range(PACED_TOKENS):
                    await asyncio.sleep(0.01)
                    writer.write(sse(made(str(time.monotonic_ns()))))
            else:
                if not (size and path.endswith("/responses")):
                    writer.write(sse(made("ok")))
                data = b"".join(map(sse, [made("x" * size), *tail] if size and not path.endswith("/responses") else tail))
                for at in range(0, len(data), 65536):
                    writer.write(data[at:at + 65536])
                    await writer.drain()
                    await asyncio.sleep(0)
                tail = []
            writer.write(b"".join(map(sse, tail)))
            await writer.drain()
            return
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
'''
PACED_TOKENS = 150
PAUSE_GOAL_MS, MAX_PAUSE_MS = 50, 100
WIRES = {"passed": "wire_api = 'responses'\nrelay = 'bytes'", "responses": "wire_api = 'responses'", "chat": "wire_api = 'chat'",
         "messages": "wire_api = 'messages'", "gemini": "wire_api = 'gemini'"}
KINDS = ("short", "paced", "huge-6", "huge-24")
FOURFOLD = 7                    # four times the bytes cost four times the CPU, and a quadratic walk sixteen times
IMAGE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A gateway in front of PROVIDER, with a provider WIRE-KIND for each of WIRES and KINDS."""
    folder = tmp_path_factory.mktemp("linear")
    provider = subprocess.Popen([sys.executable, "-c", PROVIDER.replace("PACED_TOKENS", str(PACED_TOKENS))], stdout=subprocess.PIPE, text=True)
    port = int(provider.stdout.readline())
    fields = "".join(f"[providers.{wire}-{kind}]\n{lines}\nbase_url = 'http://127.0.0.1:{port}/{kind}'\napi_key = 'sk-x'\n"
                     for wire, lines in WIRES.items() for kind in KINDS)
    try:
        with gateway(folder, fields) as made:
            yield made
    finally:
        provider.kill()
        provider.wait()


def cpu_s(asked):
    """CPU that the gateway has had."""
    fields = pathlib.Path(f"/proc/{asked.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cost(asked, body, size_mb=0):
    """CPU of a request, and the longest that somebody waited for /health meanwhile."""
    asked.waits.clear()
    begun = cpu_s(asked)
    size, last = asked.post(json.dumps(body).encode())
    assert size > size_mb << 20 and (size_mb or b"response.completed" in last) and last.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), last[-500:]
    return cpu_s(asked) - begun, max(asked.waits)


NEIGHBOURS = {      # items of about 180 bytes that a wire puts into one turn
    "texts": lambda n: {"role": "user", "content": "n" * 145},
    "images": lambda n: {"role": "user", "content": [{"type": "input_image", "image_url": IMAGE}]},
    "answers": lambda n: {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a" * 80, "annotations": []}]},
    "notes": lambda n: {"type": "message", "role": "developer", "content": "d" * 120},
    "thoughts": lambda n: {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t" * 90}]},
    "calls": lambda n: {"type": "function_call", "name": "f", "arguments": '{"a": 1}', "call_id": f"call_{n:09}"} if n % 2 == 0 else
                       {"type": "function_call_output", "call_id": f"call_{n - 1:09}", "output": "o" * 100},
    "results of one turn": lambda n: {"type": "function_call_output", "call_id": f"call_{n:09}", "output": "o" * 100},
}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_18_mb_of_neighbours_cost_what_their_number_costs(kind, wire, linear):
    def body(count):
        items = [NEIGHBOURS[kind](n) for n in range(count)]
        if kind == "results of one turn":
            items = [{"type": "function_call", "name": "f", "arguments": "{}", "call_id": item["call_id"]} for item in items[:count // 2]] + items[:count // 2]
        return {"model": f"{wire}-short/m", "stream": True, "input": [{"role": "user", "content": "go"}, *items, {"role": "user", "content": "go on"}],
                "tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}]}
    whole_count = 96_000 if kind in ("texts", "images") else 32_000         # 18 MB; 6 MB tell the others
    quarter, _ = cost(linear, body(whole_count // 4))
    whole, waited = cost(linear, body(whole_count))
    print(f"\n{whole_count:,} {kind} to {wire}: {whole:.2f} s of CPU, a quarter {quarter:.2f} s; others waited at most {waited * 1000:.0f} ms")
    assert whole < max(FOURFOLD * quarter, 1.0)


@pytest.mark.parametrize("wire", WIRES)
def test_an_event_of_24_mb_in_small_pieces_costs_four_times_what_one_of_6_mb_costs(wire, linear):
    costs = [cost(linear, {"model": f"{wire}-huge-{size}/m", "stream": True, "input": "x"}, 2 * size) for size in (6, 24)]
    (quarter, _), (whole, waited) = costs
    print(f"\nan event of 24 MB from {wire}: {whole:.2f} s of CPU, one of 6 MB {quarter:.2f} s; others waited at most {waited * 1000:.0f} ms")
    assert whole < max(FOURFOLD * quarter, 1.0)


def conversation(megabytes):
    """A long conversation as an agent sends it again with every turn."""
    items, size = [{"role": "user", "content": "go"}], 0
    while size < megabytes << 20:
        n = len(items)
        output = f"{n} The quick brown fox \\ said \"jumps\" over\n\tthe lazy dog. " * 40
        items += [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": f"Step {n}. " + "I look. " * 20, "annotations": []}]},
                  {"type": "function_call", "name": "f", "arguments": json.dumps({"cmd": f"sed -n {n}p a.txt"}), "call_id": f"call_{n}"},
                  {"type": "function_call_output", "call_id": f"call_{n}", "output": output}]
        size += len(json.dumps(items[-3:]))
    return [*items, {"role": "user", "content": "go on"}]


async def token_waits(asked, model):
    """(when it came, how long it took from the provider) of every token of one stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", asked.port, limit=1 << 20)
    body = json.dumps({"model": model, "stream": True, "input": "x"}).encode()
    writer.write(f"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {asked.key}\r\n"
                 f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
    found = []
    while line := await reader.readline():
        if b"_text.delta" in line and (sent := re.search(rb'"delta": ?"(\d+)"', line)):
            now = time.monotonic_ns()
            found.append((now, now - int(sent[1])))
    writer.close()
    assert len(found) == PACED_TOKENS
    return found


async def longest_wait(asked, streams, body):
    """The longest that a token took, in ms: without and with a large request beside the streams."""
    running = [asyncio.ensure_future(token_waits(asked, f"{name}-paced/m")) for name in (["passed", "chat"] * streams)[:streams]]
    await asyncio.sleep(0.7)
    begun = time.monotonic_ns()
    _, last = await asyncio.to_thread(asked.post, body)
    ended = time.monotonic_ns()
    assert b"response.completed" in last, last[-500:]
    tokens = [token for stream in await asyncio.gather(*running) for token in stream]
    beside = [waited for came, waited in tokens if came - waited < ended and came > begun]
    alone = [waited for came, waited in tokens if came < begun]
    assert len(beside) > streams and len(alone) > streams, "the large request ran beside the streams"
    return max(alone) / 1e6, max(beside) / 1e6


@pytest.mark.parametrize("wire", WIRES)
def test_a_request_of_5_mb_holds_no_stream_up(wire, linear):
    body = json.dumps({"model": f"{wire}-short/m", "stream": True, "input": conversation(5),
                       "tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}]}).encode()
    waits = [asyncio.run(longest_wait(linear, 20, body)) for _ in range(4)]     # the best: the machine may be at work for others
    alone, beside = min(first for first, _ in waits), min(second for _, second in waits)
    print(f"\n{len(body) / 1e6:.1f} MB to {wire} beside 20 streams: a token took at most {beside:.0f} ms, {alone:.0f} ms without; goal {PAUSE_GOAL_MS} ms")
    assert beside < MAX_PAUSE_MS * SLOW
