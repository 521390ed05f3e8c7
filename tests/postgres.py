"""A real PostgreSQL for tests: TLS and SCRAM-SHA-256 only, on a loopback port, in a temporary folder; and a pgbouncer before it.
The server refuses to run as root: then it runs as the user `postgres` of Debian's package."""
import contextlib
import glob
import itertools
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.parse

PASSWORD = "p@ss w/ü:#%"        # each of these must be quoted in a URL, and one is not ASCII
QUOTED = urllib.parse.quote(PASSWORD, safe="")
USER, ADMIN = "pomex", "keeper"         # with the same password
NEEDED = "initdb", "postgres", "psql", "pg_dump", "openssl", "ps"
FAST = {"fsync": "off", "full_page_writes": "off"}        # survives a kill of its processes, not of the machine
numbers = itertools.count(1)


def program(name):
    """Where it is, or None: Debian has the server's programs beside PATH."""
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda path: [*map(int, re.findall("[0-9]+", path))], reverse=True)
    return shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/sbin"]))


def runner():
    """The user that the server runs as; None: this one."""
    return "postgres" if os.geteuid() == 0 else None


def missing(*more):
    """Why no server, or none of these programs, can be started; "" if they can."""
    if os.name != "posix":
        return "PostgreSQL is tested on POSIX systems"
    absent = [name for name in (*NEEDED, *more) if program(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (on Debian and Ubuntu: apt install postgresql pgbouncer openssl procps)"
    if runner() and subprocess.run(["id", runner()], capture_output=True, check=False).returncode:
        return "PostgreSQL does not run as root, and there is no user postgres"
    return ""


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def run(*command, **options):
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=60, check=False, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def is_alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


class Cluster:
    """`with Cluster() as cluster: cluster.create()`"""

    def __init__(self, durable=False, settings=()):
        self.settings = {"max_connections": "100", "ssl": "on", "password_encryption": "scram-sha-256",
                         **({} if durable else FAST), **dict(settings)}

    def __enter__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="postgres-"))
        self.port, self.server, self.guard = free_port(), None, None
        self.data = self.folder / "data"
        try:
            self.make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def make(self):
        if runner():
            shutil.chown(self.folder, runner())
        self.folder.chmod(0o755)
        self.make_certificates()
        secret = self.write("secret", PASSWORD)
        run(program("initdb"), "-D", self.data, "-U", ADMIN, "-A", "scram-sha-256", "-E", "UTF8", *self.order_of_words(),
            f"--pwfile={secret}", "--no-sync", user=runner(), cwd=self.folder)
        (self.data / "pg_hba.conf").write_text("local all all scram-sha-256\nlocal replication all scram-sha-256\n"
                                               "hostssl all all 127.0.0.1/32 scram-sha-256\nhostssl replication all 127.0.0.1/32 scram-sha-256\n")
        self.start()
        quoted = PASSWORD.replace("'", "''")
        self.psql(f"CREATE ROLE {USER} LOGIN PASSWORD '{quoted}'")
        self.psql(f"ALTER ROLE {ADMIN} SET default_transaction_read_only = off")         # whatever a database says

    def order_of_words(self):
        """As of an operator's database, not of the bytes, where this PostgreSQL can: tests see what relies on an order."""
        known = run(program("initdb"), "--help")
        return ("--locale=C", *(("--locale-provider=icu", "--icu-locale=en-US") if "--icu-locale" in known else ()))

    def __exit__(self, *_):
        if self.server is not None:             # so that it removes its shared memory
            self.resume()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop("immediate")
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, name, text):
        path = self.folder / name
        path.write_text(text)
        if runner():
            shutil.chown(path, runner())
        path.chmod(0o600)
        return path

    def make_certificates(self):
        """An authority, and the server's certificate for localhost and 127.0.0.1."""
        self.authority, key = self.folder / "authority.pem", self.folder / "authority.key"
        run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=Authority of a test",
            "-keyout", key, "-out", self.authority)
        run("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", self.folder / "server.key",
            "-out", self.folder / "server.csr")
        names = self.write("names", "subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        run("openssl", "x509", "-req", "-in", self.folder / "server.csr", "-CA", self.authority, "-CAkey", key, "-CAcreateserial",
            "-days", "2", "-extfile", names, "-out", self.folder / "server.crt")
        self.authority.chmod(0o644)
        for name in ("server.crt", "server.key"):
            self.write(name, (self.folder / name).read_text())

    def start(self):
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": self.folder,
                    "ssl_cert_file": self.folder / "server.crt", "ssl_key_file": self.folder / "server.key", **self.settings}
        flags = [flag for name, value in settings.items() for flag in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("a") as log:
            self.server = subprocess.Popen([program("postgres"), "-D", str(self.data), *flags], user=runner(), cwd=self.folder,
                                           stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self.guard = subprocess.Popen(["sh", "-c", 'read _; kill -QUIT "$0"', str(self.server.pid)], stdin=subprocess.PIPE,
                                      stderr=subprocess.DEVNULL, start_new_session=True)        # if this process is killed
        for _ in range(600):
            with contextlib.suppress(AssertionError):
                self.psql("SELECT 1")
                return
            if self.server.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def processes(self):
        """The server, stopped so that it makes no more of them, and its children."""
        os.kill(self.server.pid, signal.SIGSTOP)
        found = [line.split() for line in run("ps", "-A", "-o", "pid=,ppid=").splitlines()]
        return [self.server.pid, *(int(pid) for pid, parent in found if int(parent) == self.server.pid)]

    def signal(self, pids, number):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self):
        """As by the kernel, with all that it had begun."""
        if self.server is None:
            return
        pids = self.processes() if self.server.poll() is None else []
        self.signal(pids, signal.SIGKILL)
        self.ended()
        for pid in pids[1:]:            # nobody's children: another server would find them in its folder
            for _ in range(400):
                if not is_alive(pid):
                    break
                time.sleep(0.01)

    def stop(self, mode="fast"):
        """Smart waits for all clients, fast disconnects them, immediate leaves the rest to the next start."""
        self.server.send_signal({"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        self.ended()

    def ended(self):
        self.server.wait(30)
        self.guard.kill()
        self.guard.communicate()
        self.server = self.guard = None

    def pause(self):
        self.signal(self.processes(), signal.SIGSTOP)

    def resume(self):
        self.signal(self.processes()[::-1], signal.SIGCONT)

    def psql(self, sql, database="postgres"):
        return run(program("psql"), "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-h", self.folder, "-p", self.port, "-U", ADMIN,
                   "-d", database, "-c", sql, env={**os.environ, "PGPASSWORD": PASSWORD}).strip()

    def disconnect(self, database):
        """Ends all that is under way there."""
        self.psql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'")

    def url(self, name, **parameters):
        words = {"sslmode": "verify-full", "sslrootcert": str(self.authority), **parameters}
        return (f"postgresql://{USER}:{QUOTED}@localhost:{self.port}/{name}?"
                + "&".join(f"{word}={urllib.parse.quote(value, safe='')}" for word, value in words.items()))

    def create(self, template="template0"):
        """The URL of a new database."""
        name = f"test_{os.getpid()}_{next(numbers)}"
        self.psql(f"CREATE DATABASE {name} OWNER {USER} TEMPLATE {template}")
        return self.url(name)

    @contextlib.contextmanager
    def standby(self):
        """A streaming replica, ready to be promoted; with the same certificates and users."""
        other = object.__new__(Cluster)
        other.__dict__.update(self.__dict__, folder=pathlib.Path(tempfile.mkdtemp(prefix="postgres-")), port=free_port(), server=None, guard=None)
        if runner():
            shutil.chown(other.folder, runner())
        other.folder.chmod(0o755)
        other.data = other.folder / "data"
        run(program("pg_basebackup"), "-D", other.data, "-R", "-X", "stream", "-c", "fast", "-h", self.folder, "-p", self.port, "-U", ADMIN,
            user=runner(), cwd=other.folder, env={**os.environ, "PGPASSWORD": PASSWORD})
        for name in ("server.crt", "server.key"):
            other.write(name, (self.folder / name).read_text())
        try:
            other.start()
            yield other
        finally:
            other.__exit__()

    def promote(self):
        self.psql("SELECT pg_promote(true, 30)")

    @contextlib.contextmanager
    def pgbouncer(self):
        """In transaction mode, with TLS and SCRAM on both sides: gives its port."""
        port = free_port()
        self.write("users", f'"{USER}" "{PASSWORD}"\n')
        self.write("pgbouncer.ini", f"""\
[databases]
* = host=localhost port={self.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {self.folder}/users
pool_mode = transaction
default_pool_size = 5
client_tls_sslmode = require
client_tls_cert_file = {self.folder}/server.crt
client_tls_key_file = {self.folder}/server.key
server_tls_sslmode = verify-full
server_tls_ca_file = {self.authority}
""")
        with (self.folder / "pgbouncer.log").open("a") as log:
            started = subprocess.Popen([program("pgbouncer"), str(self.folder / "pgbouncer.ini")], user=runner(), cwd=self.folder,
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            for _ in range(500):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert started.poll() is None, (self.folder / "pgbouncer.log").read_text()[-2000:]
                time.sleep(0.02)
            yield port
        finally:
            started.terminate()
            started.wait(20)
