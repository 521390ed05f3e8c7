"""Does anything grow? python3 tests/bench/soak.py [SECONDS] [--workers N] [--streams N]

STREAMS clients at once (200) ask one gateway for good and broken answers of every wire (tests/faults.py), streamed and not;
some leave early, some read slowly. Measured while nothing runs, at half of the time and at its end: memory, file
descriptors, threads and tasks of the gateway. And every request that was sent has its row in the ledger.
Exit code 1: something grew, or a row is missing.
"""
import argparse
import asyncio
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), os.environ.get("POMEX_FOLDER", str(TESTS.parent))]

import faults  # noqa: E402
import pomex  # noqa: E402

GROWTH_MB, GROWTH_FILES = 4.0, 3        # of an idle process, between the two measurements
PROVIDERS = {"responses": ("responses", "normalise"), "relayed": ("responses", "bytes"), "chat": ("chat", ""),
             "messages": ("messages", ""), "gemini": ("gemini", "")}
TOO_BIG = ("giant", "endless", "bomb", "byte-by-byte")     # they would measure the machine
PROGRAM = """
import asyncio, gc, os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import pomex
def report(number, frame):
    gc.collect()
    with open(f"tasks-{os.getpid()}", "w") as file:
        try:
            file.write(str(len(asyncio.all_tasks())))
        except RuntimeError:
            file.write("0")
signal.signal(signal.SIGUSR1, report)
sys.exit(pomex.main())
"""


def configuration(url, workers):
    text = f'[server]\nport = 0\nworkers = {workers}\nmax_connections = 2000\n[database]\nurl = "sqlite:pomex.db"\n'
    for name, (wire, relay) in PROVIDERS.items():
        text += (f'[providers.{name}]\nwire_api = "{wire}"\nbase_url = "{url}/v1"\napi_key = "sk-soak"\n'
                 "first_byte_timeout_s = 1\nidle_timeout_s = 1\n" + (f'relay = "{relay}"\n' if relay else ""))
    return text


def family(pid):
    """A process and its children."""
    with contextlib.suppress(OSError):
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]
    return [pid]


def measure(folder, pids):
    """pid -> (MB, file descriptors, threads, tasks). The processes are ours: the gateway that was started here."""
    found = {}
    for pid in pids:
        (folder / f"tasks-{pid}").unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR1)
    for pid in pids:
        deadline = time.monotonic() + 5
        while not (folder / f"tasks-{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.05)
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        found[pid] = (round(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, 1), len(os.listdir(f"/proc/{pid}/fd")),
                      int(re.search(r"Threads:\s+(\d+)", status)[1]), int((folder / f"tasks-{pid}").read_text() or 0))
    return found


class Soak:
    def __init__(self, port, key, seed):
        self.port, self.key, self.random = port, key, random.Random(seed)
        self.sent, self.ends = 0, collections.Counter()
        self.cases = [(f"{name}/{model}", streamed) for name, (wire, _) in PROVIDERS.items()
                      for streamed, models in ((True, faults.stream_faults(faults.WIRES[wire])), (False, faults.WHOLES))
                      for model in models if not any(word in model for word in TOO_BIG)]
        good = [case for case in self.cases if "/ok" in case[0]]
        self.cases += good * (len(self.cases) // len(good))         # half of all is good

    async def client(self, until):
        while time.monotonic() < until:
            model, streamed = self.random.choice(self.cases)
            manner = self.random.choices(("reads", "leaves", "dawdles"), (8, 1, 1))[0]
            try:
                self.ends[await asyncio.wait_for(self.ask(model, streamed, manner), 60)] += 1
            except (OSError, EOFError) as error:
                self.ends[f"{type(error).__name__} {manner}"] += 1
            except TimeoutError:
                self.ends["HANGS " + model] += 1

    async def ask(self, model, streamed, manner):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            body = json.dumps({"model": model, "input": "soak " * self.random.randrange(200), "stream": streamed}).encode()
            writer.write(b"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer "
                         + self.key.encode() + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
            self.sent += 1
            if manner == "leaves":
                await asyncio.wait({asyncio.ensure_future(reader.read(1))}, timeout=0.3 + self.random.random() / 2)
                return "left"
            data = b""
            while piece := await reader.read(500 if manner == "dawdles" else 65536):
                data += piece
                if manner == "dawdles":
                    await asyncio.sleep(0.005)
            status = data[9:12].decode()
            ends = re.findall(rb"event: response\.(completed|incomplete|failed)\n", data)
            if status == "200" and streamed:
                return f"200 {ends[0].decode()}" if len(ends) == 1 and data.endswith(b"0\r\n\r\n") else f"BROKEN {model}"
            return status or "nothing"
        finally:
            writer.transport.abort()


async def soak(folder, port, key, pid, seconds, streams):
    run = Soak(port, key, 1)
    began = time.monotonic()
    marks = []
    for until in (began + seconds / 2, began + seconds):
        await asyncio.gather(*(run.client(until) for _ in range(streams)))
        await asyncio.sleep(pomex.POOL_IDLE_S + 3)      # until idle upstream connections are closed, too
        marks.append(await asyncio.to_thread(measure, folder, family(pid)))
    return run, marks


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("seconds", nargs="?", type=float, default=600.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--streams", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        upstream = subprocess.Popen([sys.executable, "-c", "import asyncio, sys; sys.path.insert(0, sys.argv[1]); import faults\n"
                                     "async def main():\n  async with faults.Upstream() as up:\n    print(up.url, flush=True)\n"
                                     "    await asyncio.sleep(1e6)\nasyncio.run(main())", str(TESTS)],
                                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        stack.callback(upstream.kill)
        (folder / "pomex.toml").write_text(configuration(upstream.stdout.readline().strip(), args.workers))
        said = stack.enter_context(open(folder / "log", "w+"))
        gateway = subprocess.Popen([sys.executable, "-c", PROGRAM, str(pathlib.Path(pomex.__file__).parent), "serve", "--config",
                                    "pomex.toml"], cwd=folder, stderr=said)
        stack.callback(gateway.kill)
        while not (found := re.search(r"Listening on  http://127\.0\.0\.1:(\d+)", (folder / "log").read_text())):
            assert gateway.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        time.sleep(1)
        key = (folder / "first-key").read_text().strip()
        run, marks = asyncio.run(soak(folder, int(found[1]), key, gateway.pid, args.seconds, args.streams))
        gateway.terminate()
        code = gateway.wait(60)
        log = (folder / "log").read_text()
        with contextlib.closing(pomex.Ledger.open(str(folder / "pomex.db"))) as ledger:
            rows = ledger.db.commit(lambda tx: tx.read("SELECT coalesce(sum(requests), 0) FROM usage_rollups"))[0][0]
    return judge(run, marks, rows, log, code)


def judge(run, marks, rows, log, code):
    print(f"{run.sent} requests; {rows} rows; exit {code}")
    print(", ".join(f"{end}: {count}" for end, count in run.ends.most_common()))
    wrong = [] if rows == run.sent else [f"{run.sent - rows} rows are missing"]
    wrong += [end for end in run.ends if end.split()[0] in ("HANGS", "BROKEN", "nothing")]
    wrong += ["a traceback in the log"] * ("Traceback" in log) + [f"exit code {code}"] * bool(code)
    for pid, (mb, files, threads, tasks) in marks[1].items():
        before = marks[0].get(pid, (0, 0, 0, 0))
        print(f"pid {pid}: {before[0]} -> {mb} MB, {before[1]} -> {files} files, {before[2]} -> {threads} threads, "
              f"{before[3]} -> {tasks} tasks")
        if pid not in marks[0]:
            wrong.append(f"process {pid} is not one of the first")
        elif mb - before[0] > GROWTH_MB or files - before[1] > GROWTH_FILES or threads > before[2] or tasks > before[3]:
            wrong.append(f"process {pid} grew")
    print("FAILED: " + "; ".join(wrong) if wrong else "Nothing grew, nothing is missing.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
