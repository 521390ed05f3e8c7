"""How a gateway starts, changes its configuration and ends: signals, systemd, handed sockets, several processes.

Everything that is signalled here is a process of this test's own, by its id.
"""
import asyncio
import collections
import contextlib
import errno
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

import faults
import pomex
from ledgers import audited, recent

FILE = pomex.__file__
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
CONFIG = """
[server]
port = 0
drain_timeout_s = {drain}
workers = {workers}
[database]
url = "sqlite:pomex.db"
[providers.local]
wire_api = "chat"
base_url = "{url}/v1"
api_key = "none"
{more}
"""


def until(condition, limit_s=10.0):
    """The condition's value, once it is true."""
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
    return found


class Gateway:
    """A gateway in a process of its own, and what it says."""

    def __init__(self, folder, drain=5, workers=1, command=None, more="", pass_fds=(), url="http://127.0.0.1:9", **environ):
        self.folder, self.url = folder, url
        self.write(drain, workers, more)
        self.process = subprocess.Popen(
            command or [sys.executable, FILE, "serve", "--config", "pomex.toml"], cwd=folder, text=True, pass_fds=pass_fds,
            stderr=subprocess.PIPE, env={**os.environ, **environ})
        self.lines = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        self.port = int(self.says(r"Listening on  http://127\.0\.0\.1:(\d+)")[1])

    def write(self, drain=5, workers=1, more=""):
        (self.folder / "pomex.toml").write_text(CONFIG.format(drain=drain, workers=workers, more=more, url=self.url))

    def read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def said(self):
        return "".join(self.lines)

    def says(self, pattern):
        assert self.process.poll() is None or re.search(pattern, self.said), self.said
        return until(lambda: re.search(pattern, self.said))

    def signal(self, number):
        self.process.send_signal(number)

    def end(self):
        code = self.process.wait(10)
        self.reader.join(5)
        return code

    @property
    def workers(self):
        """The ids of its children."""
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as file:
            return sorted(map(int, file.read().split()))

    @property
    def key(self):
        return (self.folder / "first-key").read_text().strip()

    def ask(self, path, timeout=5):
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as link:
            link.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
            return b"".join(iter(lambda: link.recv(65536), b"")).decode()

    def stream(self, model="local/paced"):
        """A request that streams for 1.5 s, sent; its socket."""
        body = json.dumps({"model": model, "input": "hello", "stream": True}).encode()
        link = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        link.sendall(b"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer " + self.key.encode()
                     + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        return link

    def settled(self, count):
        """The usage rows, once there are so many."""
        return until(lambda: len(rows := recent(self.ledger, 10**6)) >= count and rows)

    @property
    def ledger(self):
        """What helpers read the database of: they only look, nothing is settled by this test."""
        return types.SimpleNamespace(db=types.SimpleNamespace(on_this_host=True, place=str(self.folder / "pomex.db")))

    @property
    def settings_changed(self):
        return [row for row in audited(self.ledger) if row[1] == "settings changed"]


@contextlib.contextmanager
def gateway(folder, **how):
    """A gateway before an upstream that takes its time."""
    with faults.in_thread(pace_s=how.pop("pace_s", 0.05)) as upstream, running(folder, url=upstream.url, **how) as started:
        yield started


@contextlib.contextmanager
def running(folder, **how):
    started = Gateway(folder, **how)
    try:
        yield started
    finally:
        workers = started.workers if started.process.poll() is None else []
        started.process.kill()
        started.process.wait()
        for pid in workers:     # they end by themselves, as their parent is gone
            until(lambda pid=pid: not alive(pid))
        started.reader.join(5)
        started.process.stderr.close()


def alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def begun(link):
    """What came of a stream so far, once its first text is there."""
    data = b""
    while b"output_text.delta" not in data:
        piece = link.recv(65536)
        assert piece, data
        data += piece
    return data


def rest(link):
    with contextlib.closing(link):
        return b"".join(iter(lambda: link.recv(65536), b""))


# --- one process ----------------------------------------------------------------------------------

def test_a_stop_lets_streams_finish_up_to_the_limit_and_ends_the_rest_with_a_terminal_event(tmp_path):
    with gateway(tmp_path, drain=1, pace_s=0.3) as pomex_:
        link = pomex_.stream()
        data = begun(link)
        pomex_.signal(signal.SIGTERM)
        pomex_.says("Stopping: 1 stream open, waiting up to 1 s")
        until(lambda: refused(pomex_.port))
        data += rest(link)
        assert data.count(b"event: response.failed") == 1 and b"The gateway is stopping" in data
        assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert pomex_.end() == 0 and pomex_.said.endswith("Stopped.\n")
        [row] = pomex_.settled(1)
        assert (row["status"], row["terminal_by"]) == ("failed", "gateway")


def refused(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def test_while_draining_ready_says_no_on_a_connection_that_is_there(tmp_path):
    with gateway(tmp_path) as pomex_, socket.create_connection(("127.0.0.1", pomex_.port)) as link:
        stream = pomex_.stream()
        begun(stream)
        pomex_.signal(signal.SIGTERM)
        pomex_.says("Stopping")
        link.sendall(b"GET /ready HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = b"".join(iter(lambda: link.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 503") and b'"accepting":"failed"' in answer and b"connection: close" in answer
        assert b"event: response.completed" in rest(stream)
        assert pomex_.end() == 0


def test_a_new_configuration_is_taken_up_whole_and_open_streams_keep_the_old_one(tmp_path):
    with gateway(tmp_path) as pomex_:
        stream = pomex_.stream()
        data = begun(stream)
        pomex_.write(workers=2, more='[providers.other]\nwire_api = "chat"\nbase_url = "http://127.0.0.1:8/v1"\n'
                     'api_key = "sk-hidden"\n[demo]\nenabled = false')
        pomex_.signal(signal.SIGHUP)
        said = pomex_.says(r"Reloaded .*\n")[0]
        assert said == ("Reloaded pomex.toml: demo.enabled, providers.demo, providers.other, server.workers; "
                        "1 open stream keeps the old settings; only a restart changes server.workers.\n")
        assert until(lambda: pomex_.settings_changed) == [
            ("SIGHUP", "settings changed", "pomex.toml", {}, {"changed": said.partition(": ")[2].partition(";")[0]})]
        assert b"model_not_found" in rest_until(pomex_.stream("demo/echo"), b"}}")
        data += rest_until(stream, b"[DONE]")
        assert b"event: response.completed" in data
        pomex_.signal(signal.SIGTERM)
        assert pomex_.end() == 0


def rest_until(link, mark):
    data = b""
    with contextlib.closing(link):
        while mark not in data and (piece := link.recv(65536)):
            data += piece
    return data


@pytest.mark.parametrize("text, said", {
    "a wrong key": ("[server]\nport = 0\n[providers.local]\nbase-url = 'x'", r"unknown key \"base-url\" in"),
    "not TOML": ("[server]\nport = ]", "line 2: "),
    "gone": (None, "cannot be read: No such file"),
}.values(), ids=["a wrong key", "not TOML", "gone"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_new_configuration_is_refused_with_its_reason_and_the_old_one_goes_on(tmp_path, workers, text, said):
    with gateway(tmp_path, workers=workers) as pomex_:
        if text is None:
            (tmp_path / "pomex.toml").unlink()
        else:
            (tmp_path / "pomex.toml").write_text(text)
        pomex_.signal(signal.SIGHUP)
        pomex_.says("Reload refused, still running with the old file: " + said)
        assert pomex_.ask("/ready").startswith("HTTP/1.1 200")
        pomex_.signal(signal.SIGTERM)
        assert pomex_.end() == 0


# --- systemd --------------------------------------------------------------------------------------

@pytest.fixture
def notified(tmp_path):
    """A notification socket, and what has come to it."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(path)
        made.settimeout(10)
        yield path, lambda: made.recv(4096).decode()


@pytest.mark.parametrize("workers", [1, 2])
def test_systemd_is_told_of_start_reload_and_stop_and_hears_of_a_living_loop(tmp_path, notified, workers):
    path, told = notified
    with gateway(tmp_path, workers=workers, NOTIFY_SOCKET=path, WATCHDOG_USEC="100000") as pomex_:
        seen = []

        def hear(wanted):
            while not (seen and re.fullmatch(wanted, seen[-1])):
                seen.append(told())
            return seen[-1]
        hear("READY=1")
        hear("WATCHDOG=1")
        pomex_.signal(signal.SIGHUP)
        usec = int(re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", hear(r"RELOADING=1\nMONOTONIC_USEC=\d+"))[1])
        assert 0 <= time.monotonic() * 1e6 - usec < 5e6
        hear("READY=1")
        if workers == 1:            # a loop that stands still feeds nobody
            pomex_.signal(signal.SIGSTOP)
            time.sleep(0.1)
            while select_now(told):
                pass
            assert not select_now(told, 0.3)
            pomex_.signal(signal.SIGCONT)
            hear("WATCHDOG=1")
        pomex_.signal(signal.SIGTERM)
        hear("STOPPING=1")
        assert pomex_.end() == 0


def select_now(told, wait_s=0.0):
    made = told.__closure__[0].cell_contents
    made.settimeout(wait_s or 0.001)
    try:
        return bool(told())
    except (TimeoutError, BlockingIOError):
        return False
    finally:
        made.settimeout(10)


@pytest.mark.parametrize("environ, pid, expected", {
    "not asked for": ({}, 7, 0.0),
    "for us": ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 7, 15.0),
    "for another process": ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, 7, 0.0),
    "for whoever runs": ({"WATCHDOG_USEC": "3000000"}, 7, 1.5),
    "nonsense": ({"WATCHDOG_USEC": "+1"}, 7, 0.0),
}.values())
def test_the_watchdog_is_fed_twice_as_often_as_asked(monkeypatch, environ, pid, expected):
    monkeypatch.setattr(os, "getpid", lambda: pid)
    assert pomex.watchdog_s(environ) == expected


@pytest.mark.parametrize("environ", [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid())},
                                     {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "+1"}])
def test_sockets_that_were_handed_to_another_are_not_taken(environ):
    assert pomex.systemd_sockets(environ) == [] and not environ


@pytest.mark.parametrize("workers", [1, 2])
def test_a_restart_behind_a_handed_socket_loses_no_connection(tmp_path, workers):
    """The socket is held as systemd holds it: who connects between two gateways waits, and is answered."""
    with socket.create_server(("127.0.0.1", 0)) as held, contextlib.ExitStack() as stack:
        port = held.getsockname()[1]
        os.dup2(held.fileno(), 3) if held.fileno() != 3 else None
        shell = f'export LISTEN_PID=$$ LISTEN_FDS=1; exec "{sys.executable}" "{FILE}" serve --config pomex.toml'
        how = {"workers": workers, "command": ["sh", "-c", shell], "pass_fds": (3,)}
        first = stack.enter_context(gateway(tmp_path, **how))
        assert first.port == port and first.ask("/health").startswith("HTTP/1.1 200")
        first.signal(signal.SIGTERM)
        assert first.end() == 0
        waiting = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(20)]
        for link in waiting:
            link.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        stack.enter_context(gateway(tmp_path, **how))
        for link in waiting:
            with link:
                assert link.recv(65536).startswith(b"HTTP/1.1 200")


def test_the_units_of_the_readme_are_good(tmp_path):
    tool = shutil.which("systemd-analyze")
    readme = (pathlib.Path(FILE).parent / "README.md").read_text()
    units = re.findall(r"```ini\n(\[Unit\].*?)```", readme, re.DOTALL)
    service, = (unit for unit in units if "[Service]" in unit)
    assert f"TimeoutStopSec={pomex.ServerConfig().drain_timeout_s + 10:.0f}\n" in service and "Type=notify\n" in service
    start = f"ExecStart={sys.executable} {FILE} serve --config"
    (tmp_path / "pomex.service").write_text(re.sub(r"ExecStart=\S+ \S+ serve --config", start, service))
    (tmp_path / "pomex.socket").write_text(next(unit for unit in units if "[Socket]" in unit))
    if not tool:
        pytest.skip("there is no systemd-analyze here")
    done = subprocess.run([tool, "verify", "--man=no", str(tmp_path / "pomex.service"), str(tmp_path / "pomex.socket")],
                          capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "pomex" in line]
    assert not complaints, done.stderr


def test_it_starts_from_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    """As under systemd, or in a container: no compiled code can be kept beside the file. (Of root no folder is safe, so here
    it is another place that cannot be made.)"""
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", "/dev/null")
    with running(tmp_path, url="http://127.0.0.1:9") as started:
        assert started.ask("/health").startswith("HTTP/1.1 200")


@pytest.mark.parametrize("how", [["-m", "pomex"], ["-I", FILE], ["-OO", FILE], ["-"]], ids=lambda how: how[0])
def test_it_serves_however_it_is_started(tmp_path, monkeypatch, how):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(FILE))
    with open(FILE, "rb") as source, monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", functools.partial(subprocess.Popen, stdin=source))      # what `-` reads
        with running(tmp_path, command=[sys.executable, *how, "serve", "--config", "pomex.toml"]) as started:
            assert started.ask("/health").startswith("HTTP/1.1 200")


def test_status_says_by_its_exit_code_whether_the_gateway_is_ready(tmp_path):
    with gateway(tmp_path) as pomex_:
        def status():
            return subprocess.run([sys.executable, FILE, "status", "--json"], cwd=tmp_path, capture_output=True, text=True,
                                  env={**os.environ, "POMEX_PORT": str(pomex_.port)})
        done = status()
        assert done.returncode == 0 and json.loads(done.stdout)["url"] == f"http://127.0.0.1:{pomex_.port}", done
        pomex_.signal(signal.SIGTERM)
        pomex_.end()
        assert status().returncode == 1


# --- several processes ----------------------------------------------------------------------------

def both(pomex_):
    """The two workers, once both answer."""
    until(lambda: pomex_.ask("/health") and len(set(re.findall(r"\[(\d+)\] 200 -  GET /health", pomex_.said))) == 2)
    return pomex_.workers


def test_workers_share_port_and_ledger_and_one_that_is_killed_loses_its_own_streams_only(tmp_path):
    with gateway(tmp_path, workers=2) as pomex_:
        parent = pomex_.process.pid
        first = both(pomex_)
        streams = [pomex_.stream() for _ in range(24)]
        heads = [begun(link) for link in streams]
        os.kill(first[0], signal.SIGKILL)       # a child of the gateway of this test
        ends = [head + rest_until_end(link) for head, link in zip(heads, streams)]
        whole = [b"event: response.completed" in end for end in ends]
        assert 0 < sum(whole) < 24, "both had some"
        until(lambda: pomex_.said.count("local/paced") == sum(whole))
        assert {re.search(r"\[(\d+)\]", line)[1] for line in pomex_.lines if "local/paced" in line} == {str(first[1])}
        pomex_.says(rf"worker {first[0]} ended with -9 and is replaced")
        until(lambda: len(pomex_.workers) == 2 and first[0] not in pomex_.workers)
        assert pomex_.process.pid == parent
        assert b"response.completed" in rest_until(pomex_.stream("demo/echo"), b"[DONE]")
        pomex_.signal(signal.SIGTERM)
        assert pomex_.end() == 0
        rows = pomex_.settled(25)
        assert [row["status"] for row in rows].count("completed") == sum(whole) + 1
        assert [row["error_code"] for row in rows].count("interrupted") == 24 - sum(whole)


ADMIN_TOKEN = "machine-token-0123456789"


def administer(pomex_, path, body=None):
    """What the admin API answers, from whichever worker."""
    data = b"" if body is None else json.dumps(body).encode()
    head = (f"{'GET' if body is None else 'POST'} /admin/api/{path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            f"authorization: Bearer {ADMIN_TOKEN}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n")
    with socket.create_connection(("127.0.0.1", pomex_.port), timeout=5) as link:
        link.sendall(head.encode() + data)
        return json.loads(b"".join(iter(lambda: link.recv(65536), b"")).partition(b"\r\n\r\n")[2])


class Feed:
    """A live feed of whichever worker took it."""

    def __init__(self, pomex_):
        self.data, self.link = b"", socket.create_connection(("127.0.0.1", pomex_.port), timeout=5)
        self.link.sendall(b"GET /admin/api/events HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer %s\r\n\r\n"
                          % ADMIN_TOKEN.encode())
        while b": hello" not in self.data:
            self.data += self.link.recv(65536)
        self.link.setblocking(False)

    def heard(self):
        """So many of each kind."""
        with contextlib.suppress(BlockingIOError):
            while piece := self.link.recv(65536):
                self.data += piece
        return collections.Counter(re.findall(r"^event: (\w+)$", self.data.decode(), re.MULTILINE))


def test_what_one_worker_sees_the_others_show_too_within_two_seconds(tmp_path):
    with gateway(tmp_path, workers=3, POMEX_ADMIN_TOKEN=ADMIN_TOKEN) as pomex_, contextlib.ExitStack() as stack:
        until(lambda: pomex_.ask("/health") and len(set(re.findall(r"\[(\d+)\] 200 -  GET /health", pomex_.said))) == 3)

        def all_show(path, find):
            return [find(administer(pomex_, path)) for _ in range(9)]
        feeds = [Feed(pomex_) for _ in range(9)]
        for feed in feeds:
            stack.callback(feed.link.close)
        time.sleep(0.1)                             # they know what is old
        link = pomex_.stream()
        begun(link)
        # it stands in the database before its first byte is seen
        assert all_show("setup", lambda page: page["running"]["model"]) == ["local/paced"] * 9
        assert ["pomex_streams_open 1\n" in pomex_.ask("/metrics") for _ in range(9)] == [True] * 9
        rest_until_end(link)
        for number in range(6):
            assert " 404 " in pomex_.ask(f"/nothing/{number}")
        assert b"response.failed" in rest_until(pomex_.stream("local/cut-gzip"), b"[DONE]")
        assert "token" in administer(pomex_, "keys", {"name": "new"})
        assert administer(pomex_, "providers/demo/disable", {}) == {"name": "demo"}
        ended = time.monotonic()
        failed, = [row for row in pomex_.settled(2) if row["model"] == "local/cut-gzip"]
        # what has a row is the same at once
        assert all_show("usage/" + failed["response_id"], lambda page: page["row"]["error"]) == [failed["error"]] * 9
        assert failed["error"]

        events = {"started": 1, "usage": 2, "refused": 6, "key": 1, "provider": 1}
        counts = {"pomex_requests_total": 2, "pomex_refusals_total": 6, "pomex_request_duration_seconds_count": 2,
                  "pomex_streams_open": 0}

        def counted(text):
            return {name: sum(map(int, re.findall(rf"^{name}(?:\{{.*\}})? (\d+)$", text, re.MULTILINE))) for name in counts}

        def of(page, name):
            return next(each for each in page["providers"] if each["name"] == name)

        def alike():
            return (all_show("keys", lambda page: page["keys"][0]["name"]) == ["new"] * 9
                    and all(show == (None, 6) for show in all_show("setup", lambda page: (page["running"], len(page["refused"]))))
                    and all_show("providers", lambda page: of(page, "demo")["state"]) == ["disabled"] * 9
                    and all(all_show("providers", lambda page: of(page, "local")["error"]))
                    and all(counted(pomex_.ask("/metrics")) == counts for _ in range(9))
                    and all(feed.heard() >= collections.Counter(events) for feed in feeds))
        until(alike, 4.0)
        assert time.monotonic() - ended < 3.5, "a second until it is written, and one until it is looked for"
        assert all({**feed.heard(), "started": 1} == events for feed in feeds), "each once, but for the quick one's start"
        own = [set(re.findall(rf'{name}\{{worker="(\d+)"\}} [0-9.]+\n', "".join(pomex_.ask("/metrics") for _ in range(12))))
               for name in ("process_start_time_seconds", "process_cpu_seconds_total")]
        assert all(each and each <= set(map(str, pomex_.workers)) for each in own)


def rest_until_end(link):
    data = b""
    with contextlib.closing(link), contextlib.suppress(ConnectionResetError):
        while b"[DONE]" not in data and (piece := link.recv(65536)):
            data += piece
    return data


def test_a_reload_reaches_every_worker_and_cuts_no_stream(tmp_path):
    with gateway(tmp_path, workers=2, drain=1) as pomex_:
        first = until(lambda: len(pomex_.workers) == 2 and pomex_.workers)
        streams = [pomex_.stream() for _ in range(6)]
        heads = [begun(link) for link in streams]
        pomex_.write(workers=2, drain=1, more="[demo]\nenabled = false")
        pomex_.signal(signal.SIGHUP)
        pomex_.says(r"Reloaded pomex\.toml: .*providers")
        until(lambda: pomex_.settings_changed)
        for head, link in zip(heads, streams):      # longer than drain_timeout_s
            assert b"event: response.completed" in head + rest_until(link, b"[DONE]")
        for _ in range(12):                         # whichever worker takes it
            assert b"model_not_found" in rest_until(pomex_.stream("demo/echo"), b"}}")
        assert pomex_.workers == first, "the same processes"
        assert len(pomex_.settings_changed) == 1, "once, not once a worker"
        pomex_.signal(signal.SIGTERM)
        assert pomex_.end() == 0


def test_without_their_parent_workers_end_their_streams_and_go(tmp_path):
    with gateway(tmp_path, workers=2, drain=1, pace_s=0.3) as pomex_:
        workers = until(lambda: len(pomex_.workers) == 2 and pomex_.workers)
        link = pomex_.stream()
        data = begun(link)
        pomex_.process.kill()
        data += rest(link)
        assert data.count(b"event: response.failed") == 1
        until(lambda: not any(map(alive, workers)))


def test_a_worker_that_hangs_is_killed(monkeypatch):
    """The decision alone, without processes."""
    ended, started = [], []
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.append((pid, number)))
    config = pomex.load_config("[server]\nworkers = 2", "", {})
    parent = pomex.Workers(config, {}, [], None)
    parent.start = started.append
    for pid, heard in ((1, 0.0), (2, 20.0)):
        parent.workers.append(pomex.Worker(pid, 0.0, [heard, 0.0]))
    for now in range(29, 32):
        parent.kill_hung(float(now))
    assert ended == [(1, signal.SIGKILL)] and not started
    parent.kill_hung(100.0)                    # all stood still: who was to be heard meanwhile?
    assert len(ended) == 1


def test_where_no_process_can_be_made_the_others_go_on(monkeypatch, caplog):
    def no_room():
        raise BlockingIOError(errno.EAGAIN, "")
    monkeypatch.setattr(os, "fork", no_room)
    monkeypatch.setattr(pomex, "TICK_S", 0.1)
    parent = pomex.Workers(pomex.load_config("[server]\nworkers = 2", "", {}), {}, [], None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    parent.block_signals()
    open_files = len(os.listdir("/proc/self/fd"))
    stop = threading.Timer(0.35, os.kill, (os.getpid(), signal.SIGTERM))
    stop.start()
    assert parent.run() == 0
    stop.join()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert 2 <= caplog.text.count("no worker can be started: resource temporarily unavailable") <= 5
    assert len(os.listdir("/proc/self/fd")) == open_files and not parent.workers


def test_an_embedded_gateway_can_be_given_a_new_configuration(tmp_path):
    async def scenario():
        config = pomex.load_config('[server]\nport = 0\n[database]\nurl = "sqlite:pomex.db"', str(tmp_path / "x.toml"), {})
        async with pomex.running(config) as server:
            port, before = server.address, server.gateway
            server.reload(pomex.load_config("[demo]\nenabled = false", "", {}))
            assert server.address == port and server.gateway is not before and "demo" in before.config.providers
            assert not server.gateway.config.providers and server.gateway.ledger is before.ledger
            assert server.config.port == 0 and server.gateway.config.database == before.config.database
    asyncio.run(scenario())
