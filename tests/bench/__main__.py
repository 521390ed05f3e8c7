"""What a request costs: python3 tests/bench

CPU time of Pomex beside that of nginx as a plain reverse proxy, in the same minutes, with keys and usage rows on;
memory at rest; time to the first answer. Figures are multiples, since only those can be compared between machines.
Needs Linux, gcc, nginx and the load rig in ../shared/rig beside the repository; says what is missing.
Exit code 1: a target is missed.
"""
import argparse
import contextlib
import functools
import http.client
import importlib.util
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
RIG = REPOSITORY.parent / "shared" / "rig"
BARE = "import asyncio, ssl, sqlite3, tomllib"      # what the start is measured against
MAX_RSS_MB, MAX_START = 30.0, 4.0

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
        self.ports = {name: free_port() for name in ("pomex", "blast", "paced", "nginx_blast", "nginx_paced")}
        self.environ = {"MOCK_KEY": "sk-upstream", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
        (folder / "pomex.toml").write_text(CONFIG.format(
            port=self.ports["pomex"], blast=self.ports["blast"], paced=self.ports["paced"]))
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


def main():
    parser = argparse.ArgumentParser(prog="python3 tests/bench", description=__doc__.partition("\n")[0])
    parser.add_argument("only", nargs="*", help="parts of names: json big sse paced chat; rest, start")
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
        if lacking := missing():
            print("CPU beside nginx: not measured. Missing: " + "; ".join(lacking))
        elif set(args.only) - {"rest", "start"} or not args.only:
            bench.build_rig()
            kept &= measure_load(bench, args.repeat, args.seconds, set(args.only) - {"rest", "start"})
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
