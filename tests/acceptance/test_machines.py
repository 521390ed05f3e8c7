"""Two gateways with files and homes of their own on one PostgreSQL (TLS, SCRAM), nginx before them: limits, deaths, and a
database that is killed, stopped, paused, or takes over from another. POMEX_LONG=1 lets a gateway sleep for a whole minute."""
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import POMEX, REQUIRE_TOOLS, clean_environment, free_port
from test_money import listening
from test_processes import COUNTERS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import postgres  # noqa: E402 - the core tests' own

SLEEP_S = 60.0 if os.environ.get("POMEX_LONG") == "1" else 28.0        # a process is dead after 16 s
ADMIN = "an-admin-token-of-the-test"
INPUT, NANOS = 1000, 1_000_000 + 10_000         # of a request, and what it costs with one token of output; each more: 10,000
Answers = list["Answer"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[postgres.Cluster]:
    reason = postgres.missing() or ("" if shutil.which("nginx") or os.path.exists("/usr/sbin/nginx") else "nginx is not installed")
    if reason:
        assert not REQUIRE_TOOLS, reason
        pytest.skip(reason)
    with postgres.Cluster(durable=True) as started:
        yield started


class Answer:
    """What one client saw of a request for so many tokens, one each so many seconds."""

    def __init__(self, number: int) -> None:
        self.number, self.data, self.pieces, self.ended_s = number, b"", list[float](), 0.0

    @property
    def status(self) -> int:
        return int(self.data[9:12] or b"0")

    @property
    def completed(self) -> bool:
        return b"event: response.completed" in self.data

    @property
    def id(self) -> str:
        found = re.search(rb'"id": ?"(resp_\w+)"', self.data)
        return found[1].decode() if found else ""

    @property
    def longest_gap_s(self) -> float:
        return max((later - earlier for earlier, later in zip(self.pieces, self.pieces[1:])), default=0.0)


class Provider:
    """A chat provider that sends as many tokens, as slowly, as the question says."""

    def __init__(self) -> None:
        self.sent_s: dict[int, float] = {}          # when the end of each answer was sent

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = re.search(rb"(?i)content-length: (\d+)", head)
                body = (await reader.readexactly(int(size[1]))).decode() if size else ""
                asked = re.search(r"number (\d+): (\d+) tokens, one each (\d+) ms", body)
                assert asked, body
                number, tokens, each_ms = map(int, asked.groups())
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
                for _ in range(tokens):
                    self.write(writer, {"choices": [{"index": 0, "delta": {"content": "word "}}]})
                    await writer.drain()
                    await asyncio.sleep(each_ms / 1000)
                self.write(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                self.write(writer, {"choices": [], "usage": {"prompt_tokens": INPUT, "completion_tokens": tokens}})
                writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
                self.sent_s[number] = time.monotonic()
                await writer.drain()
        writer.close()

    @staticmethod
    def write(writer: asyncio.StreamWriter, chunk: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))


class Machines:
    """The gateways, and nginx before them."""

    def __init__(self, folder: Path, url: str, origin: str, provider: Provider) -> None:
        self.folder, self.url, self.provider, self.number = folder, url, provider, 0
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ports: list[int] = []
        self.port = free_port()
        for name in ("one", "two", "desk"):
            (folder / name).mkdir()
            (folder / name / "pomex.toml").write_text(f"""\
[server]
port = 0
admin_token = "{ADMIN}"
[database]
url = "env:DB"
[providers.p]
wire_api = "chat"
base_url = "{origin}/v1"
[prices."p/m"]
input = 1
output = 10
""")

    def environment(self, name: str) -> dict[str, str]:
        return clean_environment(self.folder / name, DB=self.url, POMEX_CONFIG=str(self.folder / name / "pomex.toml"))

    def serve(self, name: str) -> None:
        log = self.folder / name / "log"
        with log.open("w") as file:
            self.processes.append(subprocess.Popen([sys.executable, str(POMEX), "serve"], env=self.environment(name), stderr=file,
                                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        self.ports.append(listening(log))

    def nginx(self) -> None:
        servers = "".join(f"server 127.0.0.1:{port};" for port in self.ports)
        (self.folder / "nginx.conf").write_text(f"""\
daemon off; pid {self.folder}/nginx.pid; error_log {self.folder}/nginx.log; worker_processes 1;
events {{ worker_connections 2048; }}
http {{
  access_log off; client_body_temp_path {self.folder}/body; proxy_temp_path {self.folder}/proxy; fastcgi_temp_path {self.folder}/f;
  uwsgi_temp_path {self.folder}/u; scgi_temp_path {self.folder}/s;
  upstream gateways {{ {servers} }}
  server {{ listen 127.0.0.1:{self.port};
    location / {{ proxy_pass http://gateways; proxy_http_version 1.1; proxy_set_header Host localhost; proxy_buffering off;
                  proxy_read_timeout 300; }} }}
}}
""")
        self.folder.chmod(0o755)
        self.processes.append(subprocess.Popen(["/usr/sbin/nginx", "-c", f"{self.folder}/nginx.conf", "-g", "user root;"],
                                               stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()
        for name in ("one", "two"):
            assert "Traceback" not in (self.folder / name / "log").read_text()

    async def command(self, *arguments: str) -> str:
        """From a third machine."""
        done = await asyncio.create_subprocess_exec(sys.executable, str(POMEX), *arguments, env=self.environment("desk"),
                                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, said = await done.communicate()
        assert done.returncode == 0, out + said
        return out.decode()

    async def get(self, port: int, path: str) -> tuple[int, str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {ADMIN}\r\nconnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return int(head[9:12]), body.decode()

    async def ask(self, port: int, key: str, tokens: int = 1, each_ms: int = 0) -> Answer:
        self.number += 1
        answer = Answer(self.number)
        body = json.dumps({"model": "p/m", "stream": True, "max_output_tokens": max(tokens, 256),
                           "input": f"number {answer.number}: {tokens} tokens, one each {each_ms} ms"}).encode()
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer %s\r\nconnection: close\r\n"
                         b"content-length: %d\r\n\r\n" % (key.encode(), len(body)) + body)
            while piece := await reader.read(65536):
                answer.data += piece
                if b"output_text.delta" in piece:
                    answer.pieces.append(time.monotonic())
                if b"event: response.completed" in piece or b"event: response.failed" in piece:
                    answer.ended_s = time.monotonic()
            writer.close()
        return answer

    async def settled(self, cluster: postgres.Cluster) -> None:
        """Nothing is open, nothing reserved, and all sums are right."""
        for _ in range(300):
            if await self.sql(cluster, "SELECT (SELECT count(*) FROM open_requests) + (SELECT coalesce(sum(granted), 0) FROM meters)") == "0":
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError(await self.sql(cluster, "SELECT * FROM open_requests"))
        assert json.loads(await self.command("ledger", "verify", "--json"))["wrong"] == []

    async def sql(self, cluster: postgres.Cluster, sql: str) -> str:
        name = re.search(r"/(test_\w+)\?", self.url)
        assert name
        return await asyncio.to_thread(cluster.psql, sql, name[1])

    async def rows(self, cluster: postgres.Cluster) -> dict[str, tuple[str, int]]:
        """Of each request how it ended and what it cost; each has one final row."""
        lines = (await self.sql(cluster, "SELECT response_id, error_code, cost_nanos FROM usage WHERE final = 1")).splitlines()
        found = {name: (code, int(nanos)) for name, code, nanos in (line.split("|") for line in lines)}
        assert len(found) == len(lines)
        return found

    async def billed_once(self, cluster: postgres.Cluster, answers: Answers) -> None:
        await self.settled(cluster)
        rows = await self.rows(cluster)
        missing = [answer.id for answer in answers if answer.completed and answer.id not in rows]
        assert missing == [] and {rows[answer.id] for answer in answers if answer.completed and len(answer.pieces) < 2} <= {("", NANOS)}
        assert {code for code, _ in rows.values()} <= {"", "ledger_unavailable"}, "nobody is called dead"


@contextlib.asynccontextmanager
async def machines(folder: Path, url: str, balanced: bool = False) -> AsyncIterator[Machines]:
    provider = Provider()
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0)
    made = Machines(folder, url, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", provider)
    try:
        for name in ("one", "two"):
            await asyncio.to_thread(made.serve, name)
        if balanced:
            made.nginx()
            await asyncio.sleep(0.5)
        yield made
    finally:
        await asyncio.to_thread(made.stop)
        server.close()


LIMITS = {  # what the key gets, the meter that is looked at, its most, and how many of 200 are answered
    "a budget": (["--budget", "0.0303/month"], "key 1", 30_300_000, range(8, 31)),
    "prepaid credit": ([], "account 2", 30_300_000, range(8, 31)),
    "requests a minute": (["--rpm", "20"], "", 0, range(20, 24)),
    "requests at once": (["--concurrent", "5"], "key 1 open", 5, range(5, 200)),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_no_limit_is_exceeded_by_two_hundred_at_once_on_two_machines(limit: str, cluster: postgres.Cluster, tmp_path: Path) -> None:
    settings, meter, most, expected = LIMITS[limit]

    async def load() -> None:
        async with machines(tmp_path, cluster.create(), balanced=True) as made:
            if limit == "prepaid credit":
                await made.command("accounts", "create", "team", "--prepaid")
                await made.command("accounts", "credit", "team", "0.0303")
                settings.extend(["--account", "team"])
            key = (await made.command("keys", "create", "k", *settings)).strip()
            asked = [asyncio.create_task(made.ask(made.port, key, 1, 100)) for _ in range(200)]
            seen = []
            while not all(task.done() for task in asked):
                if meter:
                    seen.append(int(await made.sql(cluster, f"SELECT coalesce(max(spent + granted), 0) FROM meters WHERE owner = '{meter}'")))
                await asyncio.sleep(0.02)
            answers = [task.result() for task in asked]
            assert all(each <= most for each in seen)
            served = [answer for answer in answers if answer.completed]
            print(f"{limit}: {len(served)} of 200 served, at most {max(seen, default=0)} of {most} seen in {len(seen)} looks")
            assert len(served) in expected and {answer.status for answer in answers} <= {200, 429}
            await made.billed_once(cluster, answers)
            rows = await made.rows(cluster)
            assert sum(nanos for _, nanos in rows.values()) == len(served) * NANOS and (not most or len(served) * NANOS <= 30_300_000
                                                                                     or meter.endswith("open"))
            await asyncio.sleep(1.5)            # counters are saved once a half second
            said = [[await made.get(port, path) for path in ("/admin/api/overview", "/metrics")] for port in made.ports]
            totals = [json.loads(overview)["totals"] for (_, overview), _ in said]
            assert totals[0] == totals[1] and totals[0]["cost_nanos"] == len(served) * NANOS
            counters = [COUNTERS.findall(metrics) for _, (_, metrics) in said]
            assert counters[0] == counters[1] != []
    asyncio.run(load())


def test_what_a_killed_machine_left_is_settled_by_the_other_within_half_a_minute(cluster: postgres.Cluster, tmp_path: Path) -> None:
    async def load() -> None:
        async with machines(tmp_path, cluster.create()) as made:
            key = (await made.command("keys", "create", "k", "--budget", "1/month")).strip()
            doomed = [asyncio.create_task(made.ask(made.ports[0], key, 100, 100)) for _ in range(5)]
            living = [asyncio.create_task(made.ask(made.ports[1], key, 300, 100)) for _ in range(3)]
            await asyncio.sleep(2)
            made.processes[0].kill()
            killed_s = time.monotonic()
            while await made.sql(cluster, "SELECT count(*) FROM usage WHERE error_code = 'interrupted'") != "5":
                assert time.monotonic() - killed_s < 30
                await asyncio.sleep(0.2)
            print(f"settled {time.monotonic() - killed_s:.1f} s after the kill")
            assert await made.sql(cluster, "SELECT count(*) FROM open_requests") == "3"
            answers = await asyncio.gather(*living)
            assert all(answer.completed for answer in answers) and not any(answer.completed for answer in await asyncio.gather(*doomed))
            await made.settled(cluster)
            assert sorted(code for code, _ in (await made.rows(cluster)).values()) == [""] * 3 + ["interrupted"] * 5
    asyncio.run(load())


OUTAGES = {"killed and restarted": 0.0, "stopped": 20.0, "paused": 20.0}


@pytest.mark.parametrize("outage", OUTAGES)
def test_a_database_that_is_away_stops_no_stream_and_loses_no_bill(outage: str, cluster: postgres.Cluster, tmp_path: Path) -> None:
    away_s = OUTAGES[outage]

    async def load() -> None:
        async with machines(tmp_path, cluster.create()) as made:
            key = (await made.command("keys", "create", "k")).strip()
            quick: list[asyncio.Task[Answer]] = []
            lasting = [asyncio.create_task(made.ask(port, key, round((each + 2 + away_s) * 10), 100))
                       for port in made.ports for each in (0, 6)]               # the first end in the outage, the others after it
            lasting += [asyncio.create_task(made.ask(port, key, 60, 100)) for port in made.ports]
            states, refused = [], []
            begun = time.monotonic()
            happened = asyncio.create_task(asyncio.to_thread(happen))
            while time.monotonic() - begun < away_s + 9:
                quick.append(asyncio.create_task(made.ask(made.ports[len(quick) % 2], key)))
                states.append((await made.get(made.ports[0], "/ready"))[0])
                await asyncio.sleep(0.05)
            await happened
            answers = await asyncio.gather(*quick, *lasting)
            refused = [answer for answer in answers if answer.status == 503]
            assert all(b"ledger_unavailable" in answer.data and b"retry-after: " in answer.data for answer in refused)
            assert {answer.status for answer in answers} <= {200, 503} and (refused or not away_s)
            assert all(answer.completed for answer in answers[len(quick):])
            late = [answer.ended_s - made.provider.sent_s[answer.number] for answer in answers if answer.completed]
            gaps = [answer.longest_gap_s for answer in answers[len(quick):]]
            print(f"{outage}: {len(answers)} asked, {len(refused)} refused; ends at most {max(late):.2f} s late, median "
                  f"{statistics.median(late):.3f}; longest gap between two tokens (of 0.1 s) {max(gaps):.2f} s")
            assert max(late) < 2.5 and max(gaps) < 0.6
            if away_s:
                assert 503 in states and states[-1] == 200
            await made.billed_once(cluster, answers)
            long_rows = await made.rows(cluster)
            assert all(long_rows[answer.id][1] == 1_000_000 + 10_000 * len(answer.pieces) for answer in answers[len(quick):]
                       if len(answer.pieces) == answer.data.count(b"event: response.output_text.delta"))

    def happen() -> None:
        time.sleep(3)
        if outage == "paused":
            cluster.pause()
            time.sleep(away_s)
            cluster.resume()
            return
        if outage == "stopped":
            cluster.stop()
        else:
            cluster.kill()
        time.sleep(away_s)
        cluster.start()
    asyncio.run(load())


def test_a_machine_that_slept_settles_its_request_with_the_true_figures(cluster: postgres.Cluster, tmp_path: Path) -> None:
    async def load() -> None:
        async with machines(tmp_path, cluster.create()) as made:
            key = (await made.command("keys", "create", "k", "--budget", "1/month", "--concurrent", "9")).strip()
            asked = asyncio.create_task(made.ask(made.ports[0], key, 40, 100))
            await asyncio.sleep(1.5)
            made.processes[0].send_signal(signal.SIGSTOP)
            begun = time.monotonic()
            others = []
            while time.monotonic() - begun < SLEEP_S:
                others.append(await made.ask(made.ports[1], key))
                await asyncio.sleep(0.2)
            called_dead = await made.sql(cluster, "SELECT count(*) FROM usage WHERE error_code = 'interrupted'")
            made.processes[0].send_signal(signal.SIGCONT)
            answer = await asyncio.wait_for(asked, 30)
            assert called_dead == "1" and answer.completed and all(each.completed for each in others)
            await made.billed_once(cluster, [answer, *others])
            assert (await made.rows(cluster))[answer.id] == ("", 1_000_000 + 40 * 10_000)
            assert (await made.ask(made.ports[0], key)).completed
    asyncio.run(load())


def test_a_revocation_holds_everywhere_within_a_second_also_behind_pgbouncer(cluster: postgres.Cluster, tmp_path: Path) -> None:
    async def load() -> None:
        url = cluster.create()
        with cluster.pgbouncer() as port:
            async with machines(tmp_path, url.replace(f":{cluster.port}/", f":{port}/")) as made:
                key = (await made.command("keys", "create", "k", "--budget", "1/month")).strip()
                running = [asyncio.create_task(made.ask(port, key, 60, 100)) for port in made.ports]
                before = await asyncio.gather(*(made.ask(made.ports[number % 2], key) for number in range(50)))
                assert {answer.status for answer in before} == {200}
                await made.command("keys", "revoke", "k")
                await asyncio.sleep(1)
                after = await asyncio.gather(*(made.ask(made.ports[number % 2], key) for number in range(10)))
                assert {answer.status for answer in after} == {401}
                running_answers = await asyncio.gather(*running)
                assert all(answer.completed for answer in running_answers)
                await made.billed_once(cluster, [*before, *running_answers])
    asyncio.run(load())


def test_a_standby_takes_over_without_a_restart(cluster: postgres.Cluster, tmp_path: Path) -> None:
    async def load() -> None:
        with postgres.Cluster(durable=True) as first:
            url = first.create()
            first.psql(f"ALTER ROLE {postgres.USER} REPLICATION")
            with first.standby() as second:
                both = url.replace(f"localhost:{first.port}/", f"localhost:{second.port},localhost:{first.port}/")
                async with machines(tmp_path, both + "&target_session_attrs=read-write") as made:
                    key = (await made.command("keys", "create", "k", "--budget", "1/month")).strip()
                    answers = await asyncio.gather(*(made.ask(made.ports[number % 2], key) for number in range(40)))
                    assert all(answer.completed for answer in answers)
                    lasting = [asyncio.create_task(made.ask(port, key, 80, 100)) for port in made.ports]
                    await asyncio.sleep(2)              # the open requests are on the standby by now
                    await asyncio.to_thread(first.kill)
                    await asyncio.sleep(1)
                    await asyncio.to_thread(second.promote)
                    for _ in range(100):
                        if {(await made.get(port, "/ready"))[0] for port in made.ports} == {200}:
                            break
                        await asyncio.sleep(0.1)
                    answers += await asyncio.gather(*(made.ask(made.ports[number % 2], key) for number in range(40)))
                    answers += await asyncio.gather(*lasting)
                    assert all(answer.completed for answer in answers)
                    await made.billed_once(second, answers)
    asyncio.run(load())
