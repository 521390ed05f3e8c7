"""What a request costs: python3 tests/bench

CPU time of Pomex beside that of nginx as a plain reverse proxy, in the same minutes, with keys and usage rows on;
memory at rest; time to the first answer. Figures are multiples, since only those can be compared between machines;
but for the latency of a token over a kept-alive connection, in ms, beside that of a connection straight to the provider.
Needs Linux, gcc, nginx and the load rig in ../shared/rig beside the repository; says what is missing.
Exit code 1: a target is missed.
"""
import argparse
import contextlib
import functools
import http.client
import http.server
import importlib.util
import json
import pathlib
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
RIG = REPOSITORY.parent / "shared" / "rig"
BARE = "import asyncio, ssl, sqlite3, tomllib"      # what the start is measured against
MAX_RSS_MB, MAX_START, MAX_TOKEN_MS = 30.0, 4.0, 3.0
TOKENS, TOKEN_S = 60, 0.005         # of one answer, and between two of them

# scenario of the rig, the model asked for ("paced/..." goes to the paced upstream), CPU counted per, at most x nginx
SCENARIOS = [
    ("JSON passed, 1 connection", "json_c1", "mock", "cpu_us_req", 5.0),
    ("JSON passed, 16 connections", "json_c16", "mock", "cpu_us_req", 5.0),
    ("122 KB body passed", "big_c16", "mock", "cpu_us_req", 6.0),
    ("burst event passed", "sse_c16", "mock", "cpu_us_ev", 2.0),
    ("paced event passed, 100 streams", "paced_100", "paced", "cpu_us_ev", 2.2),
    ("JSON from chat", "json_c16", "mockchat", "cpu_us_req", None),
    ("122 KB body to chat", "big_c16", "mockchat", "cpu_us_req", None),
    ("burst event from chat", "sse_c16", "mockchat", "cpu_us_ev", None),
    ("paced event from chat, 100 streams", "paced_100", "pacedchat", "cpu_us_ev", None),
]
UNIT = {"cpu_us_req": "us/request", "cpu_us_ev": "us/event"}

CONFIG = """
[server]
port = {port}
[database]
url = "sqlite:state/pomex.db"
[providers.mock]
wire_api = "responses"
relay = "bytes"
base_url = "http://127.0.0.1:{blast}/v1"
api_key = "env:MOCK_KEY"
[providers.paced]
wire_api = "responses"
relay = "bytes"
base_url = "http://127.0.0.1:{paced}/v1"
api_key = "env:MOCK_KEY"
[providers.mockchat]
wire_api = "chat"
base_url = "http://127.0.0.1:{blast}/v1"
api_key = "env:MOCK_KEY"
[providers.pacedchat]
wire_api = "chat"
base_url = "http://127.0.0.1:{paced}/v1"
api_key = "env:MOCK_KEY"
[providers.tokens]
wire_api = "responses"
relay = "bytes"
base_url = "http://127.0.0.1:{tokens}/v1"
api_key = "env:MOCK_KEY"
[providers.tokenschat]
wire_api = "chat"
base_url = "http://127.0.0.1:{tokens}/v1"
api_key = "env:MOCK_KEY"
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port, path="/health"):
    """Whether an HTTP server answers there by now."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status < 500
    except OSError:
        return False
    finally:
        connection.close()


def wait_for(port, process, what):
    deadline = time.monotonic() + 20
    while not answers(port):
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"{what} does not answer: {process.communicate()[1].decode(errors='replace')[-2000:]}")
        time.sleep(0.002)


@contextlib.contextmanager
def running(command, **options):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Bench:
    """A folder with a copy of the rig, a configuration, a database and a key; and the ports of all."""

    def __init__(self, folder, program):
        self.folder = folder
        self.program = [sys.executable, str(program)]
        self.ports = {name: free_port() for name in ("pomex", "blast", "paced", "nginx_blast", "nginx_paced", "tokens")}
        self.environ = {"MOCK_KEY": "sk-upstream", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
        (folder / "pomex.toml").write_text(CONFIG.format(
            port=self.ports["pomex"], blast=self.ports["blast"], paced=self.ports["paced"], tokens=self.ports["tokens"]))
        self.key = self.run("keys", "create", "bench").strip()

    def command(self, *arguments):
        return [*self.program, *arguments, "--config", str(self.folder / "pomex.toml")]

    def run(self, *arguments):
        done = subprocess.run(self.command(*arguments), env=self.environ, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"pomex {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def gateway(self):
        log = open(self.folder / "log", "wb")      # an access line a request is part of the cost
        return running(self.command("serve"), env=self.environ, stderr=log)

    # the rig

    def build_rig(self):
        rig = self.folder / "rig"
        shutil.copytree(RIG, rig, copy_function=shutil.copyfile)
        rig.chmod(0o755)
        for name in ("mock", "load"):
            subprocess.run(["gcc", "-O2", "-w", "-o", name, name + ".c"], cwd=rig, check=True)
        subprocess.run([sys.executable, "gen_canned.py"], cwd=rig, check=True)
        (rig / "run").mkdir(exist_ok=True)
        conf = (rig / "nginx.conf").read_text()
        for old, name in ((9100, "blast"), (9101, "paced"), (9200, "nginx_blast"), (9201, "nginx_paced")):
            conf = conf.replace(f"127.0.0.1:{old}", f"127.0.0.1:{self.ports[name]}")
        (rig / "nginx.conf").write_text(conf)
        spec = importlib.util.spec_from_file_location("rig_bench", rig / "bench.py")
        self.rig = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.rig)

    def mock(self):
        rig = self.folder / "rig"
        return running(["./mock", "canned", str(self.ports["blast"]), str(self.ports["paced"]), "10000"], cwd=rig,
                       stderr=subprocess.PIPE)

    def nginx(self):
        rig = self.folder / "rig"
        return running([nginx_program(), "-p", str(rig / "run"), "-c", str(rig / "nginx.conf")],
                       stderr=subprocess.PIPE)

    def target(self, name, pid, port, paced_port, model, paced_model):
        headers = [f"Authorization: Bearer {self.key}"]
        def end(port, model):
            return {"url": f"http://127.0.0.1:{port}/v1/responses", "model": model, "headers": headers}
        return {"name": name, "pids": [pid], "blast": end(port, model), "paced": end(paced_port, paced_model)}

    def load(self, scenario, model, pid, seconds):
        """One run of the rig against nginx (model "") or Pomex; its figures."""
        if model:
            name = f"{model}/gpt-mock"
            target = self.target("pomex", pid, self.ports["pomex"], self.ports["pomex"], name, name)
        else:
            target = self.target("nginx", pid, self.ports["nginx_blast"], self.ports["nginx_paced"], "m", "m")
        got = self.rig.run(target, scenario, seconds)
        if got.get("errors") or not got.get("done"):
            sys.exit(f"{target['name']}, {scenario}: {got.get('first_error') or got}")
        return got


class TokenProvider(http.server.BaseHTTPRequestHandler):
    """Sends a token every 5 ms, on the wire that it is asked on; its text is the moment of its sending, in ns."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self):
        with contextlib.suppress(ConnectionError):      # Pomex ends with a connection kept
            super().handle()

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        head, token, tail = responses_frames() if self.path.endswith("/responses") else chat_frames()
        self.send(*head)
        for _ in range(TOKENS):
            time.sleep(TOKEN_S)
            self.send(token(str(time.perf_counter_ns())))
        self.send(*tail)
        self.wfile.write(b"0\r\n\r\n")

    def send(self, *frames):
        data = "".join(f"data: {json.dumps(frame)}\n\n" for frame in frames).encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, *_):
        pass


def chat_frames():
    """What comes before the tokens, a token, and what comes behind them."""
    def choice(delta, reason=None):
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": TOKENS}}
    return [choice({"role": "assistant"})], lambda text: choice({"content": text}), [choice({}, "stop"), usage]


def responses_frames():
    response = {"id": "resp_1", "object": "response", "status": "in_progress", "model": "m", "output": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    done = {**item, "status": "completed", "content": [{"type": "output_text", "text": "x", "annotations": []}]}
    usage = {"input_tokens": 9, "output_tokens": TOKENS, "total_tokens": 9 + TOKENS}
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    head = [{"type": "response.created", "response": response},
            {"type": "response.output_item.added", "output_index": 0, "item": item}]
    tail = [{"type": "response.output_item.done", "output_index": 0, "item": done},
            {"type": "response.completed", "response": {**response, "status": "completed", "output": [done], "usage": usage}}]
    return head, lambda text: {"type": "response.output_text.delta", **where, "delta": text}, tail


@functools.cache
def nginx_program():
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin")


def missing():
    """What the load scenarios lack, in words."""
    wants = [(sys.platform == "linux", "Linux (/proc and epoll)"),
             (shutil.which("gcc"), "gcc (apt-get install gcc)"),
             (nginx_program(), "nginx (apt-get install nginx)"),
             (RIG.is_dir(), f"the load rig at {RIG}")]
    return [what for there, what in wants if not there]


def row(title, figure, limit, detail):
    """Prints one line of the table; True if the target is kept."""
    verdict = "" if limit is None else "ok" if figure <= limit else "MISSED"
    print(f"{title:36}{figure:8.2f}{'-' if limit is None else limit:>8}  {verdict:7} {detail}", flush=True)
    return verdict != "MISSED"


def measure_load(bench, repeat, seconds, only):
    """CPU of Pomex over that of nginx, taking turns; the median of the ratios of neighbours."""
    kept = True
    with bench.mock() as mock, bench.nginx() as nginx, bench.gateway() as gateway:
        for port, process, what in ((bench.ports["blast"], mock, "mock"), (bench.ports["nginx_blast"], nginx, "nginx"),
                                    (bench.ports["pomex"], gateway, "Pomex")):
            wait_for(port, process, what)
        for title, scenario, model, per, limit in SCENARIOS:
            if only and not any(word in f"{scenario} {model}" for word in only):
                continue
            if not scenario.startswith("paced"):        # warm up
                bench.load(scenario, "", nginx.pid, 1)
                bench.load(scenario, model, gateway.pid, 1)
            pairs = [(bench.load(scenario, "", nginx.pid, seconds), bench.load(scenario, model, gateway.pid, seconds))
                     for _ in range(repeat)]
            ratios = [ours[per] / max(theirs[per], 1e-9) for theirs, ours in pairs]
            middle = [statistics.median(run[per] for run in runs) for runs in zip(*pairs, strict=True)]
            kept &= row(title, statistics.median(ratios), limit,
                        f"{middle[1]:.2f} against {middle[0]:.2f} {UNIT[per]}; "
                        f"{min(ratios):.2f} to {max(ratios):.2f}; {pairs[-1][1]['rss']:.0f} MB")
    return kept


def measure_rest(bench):
    with bench.gateway() as gateway:
        wait_for(bench.ports["pomex"], gateway, "Pomex")
        time.sleep(1)
        status = pathlib.Path(f"/proc/{gateway.pid}/status")
        if not status.exists():
            print("memory at rest: not measured (needs /proc)")
            return True
        megabytes = int(status.read_text().split("VmRSS:")[1].split()[0]) / 1024
        return row("memory at rest, MB", megabytes, MAX_RSS_MB, "resident")


def measure_start(bench, repeat):
    ours, bare = [], []
    for _ in range(repeat + 1):         # the first pair warms the disk cache
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", BARE], env=bench.environ, check=True)
        bare.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        with bench.gateway() as gateway:
            wait_for(bench.ports["pomex"], gateway, "Pomex")
            ours.append(time.perf_counter() - begun)
    ratio = statistics.median(mine / other for mine, other in zip(ours[1:], bare[1:], strict=True))
    mine, other = statistics.median(ours[1:]), statistics.median(bare[1:])
    return row("start to first answer", ratio, MAX_START, f"{mine:.3f} s against {other:.3f} s of bare imports")


def measure_latency(bench, repeat):
    """From the provider's write of a token to its arrival, over one connection that is kept; and without Pomex."""
    provider = http.server.ThreadingHTTPServer(("127.0.0.1", bench.ports["tokens"]), TokenProvider)
    provider.daemon_threads = True
    threading.Thread(target=provider.serve_forever, daemon=True).start()
    kept = True
    with bench.gateway() as gateway:
        wait_for(bench.ports["pomex"], gateway, "Pomex")
        for title, model, path in (("token passed, p90, ms", "tokens/m", "/v1/responses"),
                                   ("token from chat, p90, ms", "tokenschat/m", "/v1/chat/completions")):
            direct = token_latencies(bench.ports["tokens"], path, model, bench.key, repeat)
            ours = token_latencies(bench.ports["pomex"], "/v1/responses", model, bench.key, repeat)
            kept &= row(title, ours[1], MAX_TOKEN_MS, "p50 {:.2f}, max {:.2f}; direct p50 {:.2f}, p90 {:.2f}, max {:.2f}"
                        .format(ours[0], ours[2], *direct))
    provider.shutdown()
    provider.server_close()
    return kept


def token_latencies(port, path, model, key, repeat):
    """p50, p90 and the longest, in ms, of the answers to some requests one after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = json.dumps({"model": model, "stream": True, "input": "Hello", "messages": []})
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    found = []
    for _ in range(4 * repeat):
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        while line := answer.readline():
            if sent := re.search(rb'"(?:delta|content)": ?"(\d+)"', line):
                found.append((time.perf_counter_ns() - int(sent[1])) / 1e6)
    connection.close()
    if len(found) != 4 * repeat * TOKENS:
        sys.exit(f"port {port}: {len(found)} tokens came of {4 * repeat * TOKENS}")
    found.sort()
    return found[len(found) // 2], found[len(found) * 9 // 10], found[-1]


def main():
    parser = argparse.ArgumentParser(prog="python3 tests/bench", description=__doc__.partition("\n")[0])
    parser.add_argument("only", nargs="*", help="parts of names: json big sse paced chat; rest, start, latency")
    parser.add_argument("-r", "--repeat", type=int, default=3, help="pairs of runs a scenario (default 3)")
    parser.add_argument("-t", "--seconds", type=int, default=2, help="of one run (default 2)")
    parser.add_argument("--program", default=REPOSITORY / "pomex.py", help="the pomex.py to measure")
    args = parser.parse_args()
    kept = True
    with tempfile.TemporaryDirectory(prefix="pomex-bench-") as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)             # nginx's worker is another user where this is run by root
        bench = Bench(folder, pathlib.Path(args.program).resolve())
        print(f"{'':36}{'figure':>8}{'at most':>8}")
        if not args.only or "rest" in args.only:
            kept &= measure_rest(bench)
        if not args.only or "start" in args.only:
            kept &= measure_start(bench, 2 * args.repeat + 1)
        if not args.only or "latency" in args.only:
            kept &= measure_latency(bench, args.repeat)
        if lacking := missing():
            print("CPU beside nginx: not measured. Missing: " + "; ".join(lacking))
        elif set(args.only) - {"rest", "start", "latency"} or not args.only:
            bench.build_rig()
            kept &= measure_load(bench, args.repeat, args.seconds, set(args.only) - {"rest", "start", "latency"})
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
