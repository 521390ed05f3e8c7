"""What a request costs: python3 tests/bench

The headline is a turn of Codex: a recorded request of 121 KB, answered by a stream of 308 events. It is measured as agents
send it, with a body that grows by a turn each time, and as the first turn of a conversation; both are printed, and their mean is
held to the target.

CPU time of Pomex beside that of nginx as a plain reverse proxy, in the same minutes, with keys and usage rows on;
memory at rest; time to the first answer. Figures are multiples, since only those can be compared between machines;
but for the latency of a token over a kept-alive connection, in ms, beside that of a connection straight to the provider.
Needs Linux, gcc, nginx, the load rig in ../shared/rig and the requests in ../shared/codex-requests beside the repository; says
what is missing.
The ledger alone: how long an answer waits until its row is committed.
Exit code 1: a target is missed.
"""
import argparse
import concurrent.futures
import contextlib
import functools
import http.client
import http.server
import importlib.util
import json
import os
import pathlib
import random
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
TURN = REPOSITORY.parent / "shared" / "codex-requests" / "0.169.0" / "03-shell-turn2-with-output.json"
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
# a turn of Codex: title, the model asked for, at most x nginx
TURNS = [
    ("Codex turn passed", "mock", 8.0),
    ("Codex turn from chat", "mockchat", 14.0),
    ("Codex turn from messages", "mockmessages", 14.0),
    ("Codex turn from gemini", "mockgemini", 14.0),
]
# the same conversation over each client API: title, API, the provider, at most x the first of its kind
CLIENTS = [
    ("Responses turn passed", "responses", "mock", None),
    ("Chat turn passed", "chat", "mockchat", 1.0),
    ("Messages turn passed", "messages", "mockmessages", 1.0),
    ("Responses turn from chat", "responses", "mockchat", None),
    ("Messages turn from chat", "messages", "mockchat", 1.0),
    ("Responses turn from messages", "responses", "mockmessages", None),
    ("Chat turn from messages", "chat", "mockmessages", 1.0),
    ("Responses turn from gemini", "responses", "mockgemini", None),
    ("Chat turn from gemini", "chat", "mockgemini", 1.0),
    ("Messages turn from gemini", "messages", "mockgemini", 1.0),
]
# API: its path, the end of a stream
APIS = {"responses": ("/v1/responses", b'"response.completed"'), "chat": ("/v1/chat/completions", b"data: [DONE]"),
        "messages": ("/v1/messages", b'"message_stop"')}
TURN_BYTES, TURN_DELTAS = 121_000, 300
CONVERSATIONS, TURNS_EACH = 4, 16       # at once, each over its own connection; turns of one in a run
SETTLE_S = 0.05                         # the usage rows are written after the answer
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
[providers.mockmessages]
wire_api = "messages"
base_url = "http://127.0.0.1:{blast}/v1"
api_key = "env:MOCK_KEY"
[providers.mockgemini]
wire_api = "gemini"
base_url = "http://127.0.0.1:{blast}/v1beta"
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

    def turns(self, model, pid, conversations, grows, api="responses"):
        """CPU of nginx (model "") or Pomex for a turn, in us: of conversations that grow, without their first turns, or of first turns."""
        port, name = (self.ports["pomex"], f"{model}/gpt-mock") if model else (self.ports["nginx_blast"], "m")
        parts = [list(conversations.bodies(name, TURNS_EACH + 1, api)) if grows else
                 [body for _ in range(TURNS_EACH + 1) for body in conversations.bodies(name, 1, api)] for _ in range(CONVERSATIONS)]
        self.beside(port, api, [part[:1] for part in parts])
        pids = self.rig.tree([pid])
        before = cpu_us(pids)
        self.beside(port, api, [part[1:] for part in parts])
        time.sleep(SETTLE_S)
        return (cpu_us(pids) - before) / (CONVERSATIONS * TURNS_EACH)

    def beside(self, port, api, parts):
        with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
            for done in [pool.submit(play, port, api, self.key, part) for part in parts]:
                done.result()


class Conversations:
    """Bodies of Codex turns: of a recorded request, with text of the stated lengths and as many tool calls as make it TURN_BYTES long.
    All share instructions and tools, and nothing else."""

    def __init__(self):
        self.random = random.Random(3)
        words = "the model answers with words that look like plain english code def return import os \"x\" \\n (a, b) -> None: # note".split(" ")
        self.words = "".join(self.random.choice(words) + (" " if self.random.random() > 0.1 else "\n") for _ in range(60_000))
        recorded = json.loads(TURN.read_bytes())
        self.request = self.filled(recorded.get("body", recorded))

    def text(self, length):
        begin = self.random.randrange(len(self.words) - length)
        return self.words[begin:begin + length]

    def filled(self, value):
        if isinstance(value, dict):
            return {name: self.filled(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.filled(each) for each in value]
        if isinstance(value, str):
            return re.sub(r"<text of (\d+) characters>", lambda found: self.text(int(found[1])), value)
        return value

    def bodies(self, model, count, api="responses"):
        """The turns of a new conversation, the one in the middle about TURN_BYTES long."""
        key = f"{self.random.getrandbits(128):032x}"
        request = {**self.request, "model": model, "stream": True, "prompt_cache_key": key,
                   "input": [self.message(1000), *self.request["input"]]}
        size, number, added = len(dumped(request)), 0, 0
        while size + added * (count - 1) / 2 < TURN_BYTES:
            turn = self.turn(number)
            request["input"] += turn
            added = len(dumped(turn))
            size, number = size + added, number + 1
        for _ in range(count):
            yield dumped(AS_API[api](request))      # ends with a call's output, as an agent's requests do
            request["input"] += self.turn(number)
            number += 1

    def turn(self, number):
        call = {"type": "function_call", "name": "shell_command", "call_id": f"call_{number}", "id": f"fc_{number}",
                "arguments": json.dumps({"command": self.text(60), "workdir": "/w"})}
        return [call, {"type": "function_call_output", "call_id": f"call_{number}", "output": self.text(1500)}]

    def message(self, length):
        return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": self.text(length)}]}


def text_of(content):
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def as_chat(request):
    """The same request as Chat Completions has it."""
    messages = [{"role": "system", "content": request.get("instructions") or "Be brief."}]
    for item in request["input"]:
        if item["type"] == "message":
            messages.append({"role": item["role"], "content": text_of(item["content"])})
        elif item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            messages.append({"role": "assistant", "content": None,
                             "tool_calls": [{"id": item["call_id"], "type": "function", "function": function}]})
        elif item["type"] == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text_of(item["output"])})
    tools = [{"type": "function", "function": {name: tool[name] for name in ("name", "description", "parameters")}}
             for tool in request["tools"] if tool["type"] == "function"]
    return {"model": request["model"], "messages": messages, "tools": tools, "stream": True,
            "stream_options": {"include_usage": True}, "prompt_cache_key": request["prompt_cache_key"]}


def as_messages(request):
    """The same request as Anthropic's Messages API has it, with the cache marks that Claude Code sets."""
    mark, messages = {"cache_control": {"type": "ephemeral"}}, []
    for item in request["input"]:
        role = "assistant" if item["type"] == "function_call" or item.get("role") == "assistant" else "user"
        if item["type"] == "function_call":
            block = {"type": "tool_use", "id": item["call_id"], "name": item["name"], "input": json.loads(item["arguments"])}
        elif item["type"] == "function_call_output":
            block = {"type": "tool_result", "tool_use_id": item["call_id"], "content": text_of(item["output"])}
        elif item["type"] == "message":
            block = {"type": "text", "text": text_of(item["content"])}
        else:
            continue
        if not messages or messages[-1]["role"] != role:
            messages.append({"role": role, "content": []})
        messages[-1]["content"].append(block)
    messages[-1]["content"][-1] |= mark
    tools = [{"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]}
             for tool in request["tools"] if tool["type"] == "function"]
    system = [{"type": "text", "text": request.get("instructions") or "Be brief.", **mark}]
    return {"model": request["model"], "messages": messages, "system": system, "tools": tools, "max_tokens": 64000, "stream": True,
            "metadata": {"user_id": request["prompt_cache_key"]}}


AS_API = {"responses": lambda request: request, "chat": as_chat, "messages": as_messages}


def dumped(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def play(port, api, key, bodies):
    """Sends bodies over one connection, one after the other, and reads the answers to their ends."""
    path, terminal = APIS[api]
    # a conversation of its own over each connection; Claude Code names its session so
    key += f"\r\nx-claude-code-session-id: {random.getrandbits(64):x}" if api == "messages" else ""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for body in bodies:
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            pieces, end = [], b""
            while not end.endswith(b"\r\n0\r\n\r\n"):
                pieces.append(connection.recv(1 << 18))
                end = (end + pieces[-1])[-7:]
                if not pieces[-1]:
                    sys.exit(f"port {port}: cut after {b''.join(pieces)[-300:]}")
            answer = b"".join(pieces)
            if not answer.startswith(b"HTTP/1.1 200") or answer.count(b"data: {") < TURN_DELTAS or terminal not in answer:
                sys.exit(f"port {port}: {answer[:500]} ... {answer[-300:]}")


def cpu_us(pids):
    """CPU that processes have had, all threads, in us."""
    total = 0
    for pid in pids:
        for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1000


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
             (RIG.is_dir(), f"the load rig at {RIG}"),
             (TURN.is_file(), f"a recorded request at {TURN}")]
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


def measure_turns(bench, repeat, only):
    """Codex turns, Pomex and nginx taking turns; the medians of the ratios of neighbours, and the mean of both kinds of turn."""
    kept, conversations = True, Conversations()
    with bench.mock() as mock, bench.nginx() as nginx, bench.gateway() as gateway:
        for port, process, what in ((bench.ports["blast"], mock, "mock"), (bench.ports["nginx_blast"], nginx, "nginx"),
                                    (bench.ports["pomex"], gateway, "Pomex")):
            wait_for(port, process, what)
        for title, model, limit in TURNS:
            if only and not any(word in f"codex-{model.removeprefix('mock') or 'passed'}" for word in only):
                continue
            figures = []
            for kind, grows in (("one turn more", True), ("the first turn", False)):
                pairs = [(bench.turns("", nginx.pid, conversations, grows), bench.turns(model, gateway.pid, conversations, grows))
                         for _ in range(repeat + 1)][1:]        # the first pair warms up
                ratios = [ours / theirs for theirs, ours in pairs]
                figures.append(statistics.median(ratios))
                theirs, ours = (statistics.median(each) for each in zip(*pairs, strict=True))
                row(f"  {kind}", figures[-1], None, f"{ours:.0f} against {theirs:.0f} us/request; {min(ratios):.2f} to {max(ratios):.2f}")
            kept &= row(title, statistics.mean(figures), limit, "the mean of both")
    return kept


def measure_clients(bench, repeat):
    """A turn over each client API, Pomex beside itself: the first of a kind (passed, translated) is the measure of the rest."""
    kept, conversations = True, Conversations()
    with bench.mock() as mock, bench.gateway() as gateway:
        wait_for(bench.ports["blast"], mock, "mock")
        wait_for(bench.ports["pomex"], gateway, "Pomex")
        figures = {title: [] for title, *_ in CLIENTS}
        for _ in range(repeat + 1):                 # the first round warms up
            for title, api, model, _ in CLIENTS:
                figures[title].append([bench.turns(model, gateway.pid, conversations, grows, api) for grows in (True, False)])
        for title, _, _, limit in CLIENTS:
            rounds = figures[title][1:]
            if limit is None:
                first = rounds
            ratios = [sum(ours) / sum(theirs) for ours, theirs in zip(rounds, first, strict=True)]
            more, new = (statistics.median(each) for each in zip(*rounds, strict=True))
            kept &= row(title, statistics.median(ratios), limit,
                        f"one turn more {more:.0f}, the first turn {new:.0f} us; {min(ratios):.2f} to {max(ratios):.2f}")
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


SETTLING = """
import asyncio, sys, time
import pomex
async def main(path):
    sys.setswitchinterval(pomex.SWITCH_S)
    ledger = pomex.Ledger.open(path)
    ledger.start()
    for at_once in (1, 16, 128):
        waits_ms = []
        async def one():
            for _ in range(4000 // at_once):
                name = pomex.new_response_id(time.time())
                row = pomex.UsageRow(name, "req", int(time.time() * 1000), 1, "/v1/responses", "m", result="completed")
                ledger.begin(name, lambda: row)
                await ledger.recorded(name)         # as a stream does before its first byte
                begun = time.perf_counter()
                await ledger.settle([row])
                waits_ms.append((time.perf_counter() - begun) * 1000)
        begun = time.process_time()
        await asyncio.gather(*(one() for _ in range(at_once)))
        waits_ms.sort()
        print(at_once, waits_ms[len(waits_ms) // 2], waits_ms[len(waits_ms) * 99 // 100], (time.process_time() - begun) / len(waits_ms) * 1e6)
    ledger.close()
asyncio.run(main(sys.argv[1]))
"""


def measure_ledger(bench):
    """How long an answer waits for its usage row, with so many at once, and the CPU of its two writes."""
    done = subprocess.run([sys.executable, "-c", SETTLING, str(bench.folder / "ledger.db")], capture_output=True, text=True, check=True,
                          env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(pathlib.Path(bench.program[-1]).parent)})
    for line in done.stdout.splitlines():
        at_once, median, most, cpu_us = map(float, line.split())
        print(f"{f'settlement, {at_once:.0f} at once':36}{median:8.2f}         ms, p99 {most:.2f} ms, {cpu_us:.0f} us of CPU a request")
    return True


def measure_database(bench, repeat):
    """The same requests of a key with a budget on SQLite and on PostgreSQL, taking turns: CPU of the gateway, and how long it took.
    And a first key on an empty database: how long the command takes."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import postgres
    if reason := postgres.missing():
        print(f"PostgreSQL beside SQLite: not measured. {reason}")
        return True
    figures = {(kind, at_once): [] for kind in ("SQLite", "PostgreSQL") for at_once in (1, 16)}
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(postgres.Cluster(durable=True))
        gateways = {}
        for kind, url in (("SQLite", f"sqlite:{bench.folder}/beside.db"), ("PostgreSQL", cluster.create())):
            port, config = free_port(), bench.folder / f"{kind}.toml"
            config.write_text(f'[server]\nport = {port}\n[database]\nurl = "{url}"\n')
            environ = {"PATH": os.environ["PATH"], "HOME": str(bench.folder), "POMEX_CONFIG": str(config)}
            begun = time.perf_counter()
            key = subprocess.run([*bench.program, "keys", "create", "k", "--budget", "1000/month"], env=environ, check=True,
                                 capture_output=True, text=True).stdout.strip()
            took_s = time.perf_counter() - begun
            log = stack.enter_context((bench.folder / f"{kind}.log").open("w"))         # a pipe would fill
            process = stack.enter_context(running([*bench.program, "serve"], env=environ, stderr=log))
            wait_for(port, process, "Pomex")
            begun = time.perf_counter()
            ask_echo(port, key, 1)
            gateways[kind] = process.pid, port, key
            print(f"{f'a first key on {kind}':36}{took_s * 1000:8.0f}         ms with the program's start; its first request "
                  f"{(time.perf_counter() - begun) * 1000:.0f} ms")
        for _ in range(repeat):
            for (kind, at_once), found in figures.items():
                pid, port, key = gateways[kind]
                before, begun = cpu_us([pid]), time.perf_counter()
                with concurrent.futures.ThreadPoolExecutor(at_once) as clients:
                    list(clients.map(lambda _, port=port, key=key, at_once=at_once: ask_echo(port, key, 320 // at_once), range(at_once)))
                time.sleep(SETTLE_S)
                found.append(((cpu_us([pid]) - before) / 320, (time.perf_counter() - begun) / 320 * 1e3))
    kept = True
    for at_once in (1, 16):
        (ours, ours_ms), (theirs, theirs_ms) = (map(statistics.median, zip(*figures[kind, at_once])) for kind in ("PostgreSQL", "SQLite"))
        kept &= row(f"PostgreSQL x SQLite, {at_once} at once", ours / theirs, 1.4, f"{ours:.0f} and {theirs:.0f} us of CPU a request, "
                    f"{ours_ms:.2f} and {theirs_ms:.2f} ms")
    return kept


def ask_echo(port, key, count):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = json.dumps({"model": "demo/echo", "stream": True, "input": "word " * 5})
    for _ in range(count):
        connection.request("POST", "/v1/responses", body, {"authorization": f"Bearer {key}", "content-type": "application/json"})
        if b"response.completed" not in connection.getresponse().read():
            sys.exit("an answer is missing")
    connection.close()


def main():
    parser = argparse.ArgumentParser(prog="python3 tests/bench", description=__doc__.partition("\n")[0])
    parser.add_argument("only", nargs="*", help="parts of names: codex (codex-passed, codex-chat ...) json big sse paced chat; clients, rest, start, latency, ledger, database")
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
        lacking, words = missing(), set(args.only)
        turns = {word for word in words if word.startswith("codex")}
        loads = words - turns - {"rest", "start", "latency", "ledger", "clients", "database"}
        if lacking:
            print("CPU beside nginx: not measured. Missing: " + "; ".join(lacking))
        elif turns or loads or not words or "clients" in words:
            bench.build_rig()
        if not lacking and (turns or not words):
            kept &= measure_turns(bench, args.repeat, turns)
        if not lacking and (not words or "clients" in words):
            kept &= measure_clients(bench, args.repeat)
        if not words or "rest" in words:
            kept &= measure_rest(bench)
        if not words or "start" in words:
            kept &= measure_start(bench, 2 * args.repeat + 1)
        if not words or "latency" in words:
            kept &= measure_latency(bench, args.repeat)
        if not words or "database" in words:
            kept &= measure_database(bench, args.repeat)
        if not words or "ledger" in words:
            kept &= measure_ledger(bench)
        if not lacking and (loads or not words):
            kept &= measure_load(bench, args.repeat, args.seconds, loads)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
