"""Studies on three hosts to which things happen: `python -m tests.hosts [only=REGEX]`.

The hosts are network namespaces of this machine, each with its own address, name, home and Ray's
folder; the study's folder is shared. MLflow's server, on a PostgreSQL of its own, runs beside them.
In each scenario a study runs from the first host, something happens amid its trials, and at its end
its trials are compared in all stores, as `tests.kill` does. Exit code 0: every study is whole and
said what happened, and left no process of its own on the first host. It needs root, Linux, and
Debian's `iproute2` and `postgresql`. Expect a quarter of an hour on two cores.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flax import serialization
from rich.console import Console
from rich.table import Table

from disinhib import cli, compilation_cache
from disinhib.checks import OPTIONAL_TEXT, Option
from disinhib.errors import InputError
from disinhib.tuning import event_log, retention
from tests import kill, mlflow_server

NET = "10.203.77"  # .1 is this machine, with MLflow's server; .2 and so on are the hosts
# Below those that Linux gives to clients: who asks at a port where nobody listens may meet itself.
RAY_PORT, MLFLOW_PORT, POSTGRES_PORT = 6379, 25000, 25432
NAMES = ("a", "b", "c")
PATIENCE = 900.0  # s for anything to come, on a busy machine too
EPOCHS = 250  # of a trial
# Trials of half a minute, so that what happens does so amid them.
STUDY = (
    *("experiment=smoke", "space=bp", "scheduler=none", "trials=5", f"epochs={EPOCHS}"),
    *("checkpoints.every_seconds=3", "resume=auto"),
)
# As `ray start` is told on a user's hosts, with the settings of cluster/ray.env.
START = f"""
set -e
source {kill.ROOT}/cluster/ray.env
exec {sys.executable} -m ray.scripts.scripts start --block --disable-usage-stats \
    --object-store-memory 100000000 "$@"
"""
STUDY_START = 'source cluster/ray.env; exec "$@"'
# A namespace of its own for mounts and the host's name: PAIRS OF FOLDERS -- COMMAND
ENTER = """
set -e
hostname "$1"; shift
while [ "$1" != -- ]; do mount --bind "$1" "$2"; shift 2; done; shift
exec "$@"
"""


@dataclass
class Host:
    """A network namespace with a name of its own."""

    name: str
    address: str
    folder: Path  # its home, and Ray's folder
    environment: dict[str, str]

    @property
    def namespace(self) -> str:
        """Also the name of this machine's end of its cable."""
        return f"disinhib-{self.name}"

    def start(
        self, words: Sequence[str], log: Path, mounts: Sequence[tuple[Path, Path]] = ()
    ) -> subprocess.Popen:
        """Starts a process there, which sees the first of each pair in place of the second."""
        own = [(self.folder / "ray", Path("/tmp/ray")), *mounts]
        pairs = [str(path) for pair in own for path in pair]
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--uts"]
        with log.open("a") as out:
            return subprocess.Popen(
                [*enter, "sh", "-c", ENTER, "sh", self.name, *pairs, "--", *words],
                **{"cwd": kill.ROOT, "env": self.environment, "stdout": out, "stderr": out},
            )

    def join(self, head: Host, cpus: int, mounts: Sequence[tuple[Path, Path]] = ()) -> None:
        """Starts Ray there, as the head or as a node of `head`."""
        own = head is self
        where = (
            ("--head", f"--port={RAY_PORT}", "--include-dashboard=false")
            if own
            else (f"--address={head.address}:{RAY_PORT}",)
        )
        words = (*where, f"--node-ip-address={self.address}", f"--num-cpus={cpus}")
        self.start(("bash", "-c", START, "bash", *words), self.folder / "ray.log", mounts)

    def pids(self) -> list[int]:
        return [int(pid) for pid in call("ip", "netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """Ends all of its processes, as if its power had failed."""

        def dead() -> bool:
            for pid in (pids := self.pids()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not pids

        wait_until(dead, f"{self.name} is dead")

    def cut(self) -> None:
        call("ip", "link", "set", self.namespace, "down")

    def mend(self) -> None:
        call("ip", "link", "set", self.namespace, "up")

    def listening(self) -> list[str]:
        """What listens there: ADDRESS:PORT PROCESS."""
        lines = call("ip", "netns", "exec", self.namespace, "ss", "-Hltnp").splitlines()
        found = []
        for line in lines:
            process = re.search(r'users:\(\("([^"]+)"', line)
            found.append(f"{line.split()[3]} {process[1] if process else '?'}")
        return sorted(found)


@dataclass
class Server:
    """MLflow's server on PostgreSQL, on this machine's end of the network."""

    folder: Path
    uri: str = f"http://{NET}.1:{MLFLOW_PORT}"
    process: subprocess.Popen | None = None

    def postgres(self, *words: str) -> None:
        control = [str(programs() / "pg_ctl"), "-w", "-D", str(self.folder / "data")]
        done = subprocess.run(
            ["runuser", "-u", "postgres", "--", *control, "-l", str(self.folder / "log"), *words],
            **{"cwd": self.folder, "capture_output": True, "text": True},
        )
        if done.returncode:
            raise kill.Failure(f"pg_ctl {words[0]}: {done.stdout}{done.stderr}")

    def start(self) -> None:
        self.folder.mkdir()
        shutil.chown(self.folder, "postgres", "postgres")
        self.postgres("init", "-o", "--auth=trust")
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": POSTGRES_PORT,
            "unix_socket_directories": self.folder,
        }
        lines = [f"{name} = '{value}'\n" for name, value in settings.items()]
        (self.folder / "data" / "postgresql.auto.conf").write_text("".join(lines))
        self.postgres("start")
        store = f"postgresql+psycopg://postgres@127.0.0.1:{POSTGRES_PORT}/postgres"
        self.process = mlflow_server.serve(f"{NET}.1", MLFLOW_PORT, store, self.folder)

    def end(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if (self.folder / "data" / "postmaster.pid").exists():
            self.postgres("stop", "-m", "immediate")


class Epoch(NamedTuple):
    time: float  # s since 1970
    trial: int
    number: int
    host: str


@dataclass
class Study:
    """A study that is run from the first host, by one driver or several."""

    hosts: dict[str, Host]
    server: Server
    folder: Path
    options: Sequence[str] = ()
    said: list[tuple[float, str]] = field(default_factory=list)  # (s since 1970, a line)
    driver: subprocess.Popen | None = None
    ended_before: frozenset[int] = frozenset()  # trials that no driver but the first has had
    fault: float = 0.0  # when it happened
    noticed: float | None = None  # when the study, or the user, did
    repeated: int = 0  # epochs

    def start(self) -> None:
        head, log = self.hosts["a"], self.folder.parent / f"{self.folder.name}.log"
        place = [f"study={self.folder.name}", f"out_dir={self.folder.parent}"]
        where = [f"tracking.uri={self.server.uri}", f"cluster.address={head.address}:{RAY_PORT}"]
        begin = log.stat().st_size if log.exists() else 0
        words = [sys.executable, "tune_main.py", *STUDY, *place, *where, *self.options]
        self.driver = head.start(["bash", "-c", STUDY_START, "bash", *words], log)
        threading.Thread(target=self._follow, args=(log, begin, self.driver), daemon=True).start()

    def _follow(self, log: Path, begin: int, driver: subprocess.Popen) -> None:
        with log.open() as file:
            file.seek(begin)
            while True:
                over = driver.poll() is not None
                while line := file.readline():
                    self.said.append((time.time(), line.rstrip()))
                if over:
                    return
                time.sleep(0.05)

    def epochs(self) -> list[Epoch]:
        """All that are in the event log by now. (Its driver has locked it; a reader that does not
        care may see half a transaction, and looks again.)"""
        file = self.folder / event_log.FILE
        query = "SELECT time, trial, epoch, body FROM events WHERE kind = 'epoch' ORDER BY id"
        rows = []
        with (
            suppress(sqlite3.DatabaseError),
            closing(sqlite3.connect(f"file:{file}?immutable=1", uri=True)) as log,
        ):
            rows = log.execute(query).fetchall()
        return [
            Epoch(when, trial, epoch, json.loads(body)["place"]["host"])
            for when, trial, epoch, body in rows
        ]

    def wait(self, there: Callable[[], bool], what: str) -> None:
        def checked() -> bool:
            if self.driver is not None and self.driver.poll() is not None and not there():
                raise kill.Failure(f"before {what}, the study ended with {self.driver.returncode}")
            return there()

        wait_until(checked, what)

    def amid_trials(self, host: str = "b", epochs: int = 20) -> None:
        """Waits until the newest trial of `host` is amid its epochs; marks the time."""

        def amid() -> bool:
            own = [epoch for epoch in self.epochs() if epoch.host == host]
            return bool(own) and epochs <= own[-1].number < 0.8 * EPOCHS

        self.wait(amid, f"epoch {epochs} of a trial on {host}")
        self.fault = time.time()

    def line(self, pattern: str) -> float | None:
        """When a line that matches was said, since the fault."""
        times = [
            when for when, line in self.said if when >= self.fault and re.search(pattern, line)
        ]
        return times[0] if times else None

    def notices(self, pattern: str) -> None:
        """Waits for such a line."""
        self.wait(lambda: self.line(pattern) is not None, f"'{pattern}' is said")
        self.noticed = self.line(pattern)

    def end(self) -> None:
        """Waits for the driver's end."""
        assert self.driver is not None
        try:
            code = self.driver.wait(2 * PATIENCE)
        except subprocess.TimeoutExpired:
            raise kill.Failure("the study does not end") from None
        if code:
            raise kill.Failure(f"the study ended with {code}")

    def processes(self) -> list[str]:
        """Commands of the study, or of its workers, that run on the first host."""
        words = []
        for pid in self.hosts["a"].pids():
            with suppress(OSError):
                words.append(
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                )
        return [w for w in words if "tune_main.py" in w or "ray::TrainingTrial" in w]

    def lost_epochs(self) -> int:
        """Epochs that were reported before the fault and are trained again after it, as the lines
        `trial N goes on from epoch E` say."""
        lost = 0
        for when, line in self.said:
            found = re.search(r"trials? ([\d, ]+) go(?:es)? on from epochs? ([\d, ]+)", line)
            if found and when >= self.fault:
                numbers, epochs = ([*map(int, part.split(","))] for part in found.groups())
                for number, start in zip(numbers, epochs, strict=True):
                    before = [
                        e.number for e in self.epochs() if e.trial == number and e.time < self.fault
                    ]
                    lost += max(0, max(before, default=0) - start)
        return lost

    def longest_wait(self) -> float:
        """The longest time between two epochs of a trial, in s."""
        last: dict[int, float] = {}
        longest = 0.0
        for epoch in self.epochs():
            longest = max(longest, epoch.time - last.get(epoch.trial, epoch.time))
            last[epoch.trial] = epoch.time
        return longest


def undisturbed(study: Study) -> None:
    """nothing happens; what listens on each host is printed"""
    study.amid_trials()
    for host in (study.hosts["a"], study.hosts["b"]):
        print(f"  {host.name} ({host.address}): {', '.join(host.listening())}")


def killed(study: Study) -> None:
    """a node's power fails"""
    study.amid_trials()
    study.hosts["b"].kill()
    study.notices("is gone: trial")


def cut(study: Study) -> None:
    """a node's link is cut for good"""
    study.amid_trials()
    study.hosts["b"].cut()
    study.notices("is gone: trial")


def cut_25(study: Study) -> None:
    """a node's link is cut for 25 s"""
    study.amid_trials()
    study.hosts["b"].cut()
    time.sleep(25)
    study.hosts["b"].mend()


def joins(study: Study) -> None:
    """a node with two cores joins"""
    study.amid_trials(epochs=5)
    study.hosts["c"].join(study.hosts["a"], cpus=2)
    study.notices("joined: 2 more at once")
    two = lambda: len({epoch.trial for epoch in study.epochs() if epoch.host == "c"}) == 2
    study.wait(two, "two trials run on c")
    study.noticed = time.time()


def other_code(study: Study) -> None:
    """a node with other code joins"""
    own = study.hosts["c"].folder / "disinhib"
    shutil.copytree(kill.ROOT / "disinhib", own)
    with (own / "training.py").open("a") as file:
        file.write("# another line\n")
    _left_out(study, [(own, kill.ROOT / "disinhib")], "training.py changed")


def no_folder(study: Study) -> None:
    """a node joins that does not see out_dir"""
    empty = study.hosts["c"].folder / "empty"
    empty.mkdir()
    _left_out(study, [(empty, study.folder.parent)], "does not see .*out_dir must be a folder")


def no_data(study: Study) -> None:
    """a node joins that has no data"""
    empty = study.hosts["c"].folder / "empty"
    empty.mkdir()
    data = next(o for o in study.options if o.startswith("dataset.path=")).split("=", 1)[1]
    _left_out(study, [(empty, Path(data))], "cannot load the data")


def _left_out(study: Study, mounts: Sequence[tuple[Path, Path]], why: str) -> None:
    study.amid_trials(epochs=5)
    study.hosts["c"].join(study.hosts["a"], cpus=2, mounts=mounts)
    study.notices(f"{study.hosts['c'].address} is left out: .*{why}")
    study.end()
    if any(epoch.host == "c" for epoch in study.epochs()):
        raise kill.Failure("c has trained")


def database(study: Study) -> None:
    """PostgreSQL is ended at once, and started again when the study has noticed"""
    study.amid_trials()
    study.server.postgres("stop", "-m", "immediate")
    study.notices("does not take records")
    study.server.postgres("start")


def driver(study: Study) -> None:
    """the driver is killed, and the same command given again"""
    study.amid_trials()
    assert study.driver is not None
    for pid in study.hosts["a"].pids():
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"tune_main.py" in words:
                os.kill(pid, signal.SIGKILL)
    study.driver.wait()
    records = event_log.replay(kill.read_log(study.folder))
    study.ended_before = frozenset(r.number for r in records.values() if r.ended)
    for record in records.values():
        if not record.ended:
            study.repeated += record.epochs - saved(study.folder, record.number)
    study.start()
    study.notices("resumed with")


def saved(study: Path, number: int) -> int:
    """The epochs in a trial's checkpoint."""
    for file in (study / "checkpoints").glob(f"*/{retention.checkpoint_file('', number).name}"):
        content: Any = serialization.msgpack_restore(file.read_bytes())
        return len(json.loads(content["results"]))
    return 0


SCENARIOS = (
    *(undisturbed, killed, cut, cut_25, joins, other_code, no_folder, no_data, database, driver),
)
COMMAND = cli.Command(
    "tests.hosts",
    __doc__,
    (
        Option("only", None, OPTIONAL_TEXT, "the scenarios whose names match"),
        Option("data", None, OPTIONAL_TEXT, "a folder with Fashion-MNIST; null: no no_data"),
        Option("keep", None, OPTIONAL_TEXT, "new folder to leave everything in; null: none"),
    ),
)


def main(arguments: list[str]) -> int:
    options = COMMAND.parse(arguments)
    if os.geteuid():
        raise InputError("tests.hosts: needs root, for network namespaces")
    chosen = [s for s in SCENARIOS if re.search(options["only"] or "", s.__name__)]
    if options["data"] is None and no_data in chosen:
        print("no_data: left out, as data=FOLDER is not given")
        chosen.remove(no_data)
    table = Table(*("scenario", "noticed after", "epochs repeated", "longest wait", "trials whole"))
    wrong = []
    with ExitStack() as stack:
        folder = Path(options["keep"] or stack.enter_context(_temporary())).absolute()
        folder.mkdir(exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"keep: given {folder}, allowed is a folder that is new or empty")
        stack.enter_context(network())
        server = Server(folder / "server")
        stack.callback(server.end)
        server.start()
        for scenario in chosen:
            print(f"{scenario.__name__}: {scenario.__doc__}", flush=True)
            row, faults = carry_out(scenario, folder, server, options["data"])
            table.add_row(*row)
            wrong += [f"{scenario.__name__}: {fault}" for fault in faults]
    Console(width=120).print(table)
    print("\n".join(wrong or ["every study is whole"]))
    return bool(wrong)


def carry_out(
    scenario: Callable[[Study], None], folder: Path, server: Server, data: str | None
) -> tuple[list[str], list[str]]:
    """(the scenario's row of the table, what is wrong)."""
    name, faults = scenario.__name__, []
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    hosts = {}
    for index, host in enumerate(NAMES):
        home = folder / name / host
        (home / "ray").mkdir(parents=True)
        own = {
            "HOME": str(home),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            compilation_cache.FOLDER_VARIABLE: str(folder / "programs"),
        }
        # Set, it makes Ray's workers compile all that they import.
        given = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        hosts[host] = Host(host, f"{NET}.{index + 2}", home, {**given, **own})
    options = ["batchsize=1", "model.vf.sizes_hidden=[512]"]
    if scenario is no_data:
        size = ["batchsize=500", "model.vf.sizes_hidden=[32]", "epochs=30"]
        options = [*size, "dataset=fmnist", f"dataset.path={data}"]
    if scenario is joins:
        options.append("trials=8")  # enough for the new node too
    study = Study(hosts, server, folder / name / "out" / name, options)
    study.folder.parent.mkdir()
    try:
        hosts["a"].join(hosts["a"], cpus=1)
        wait_until(lambda: len(_nodes(hosts["a"])) == 1, "Ray has started")
        hosts["b"].join(hosts["a"], cpus=1)
        wait_until(lambda: len(_nodes(hosts["a"])) == 2, "Ray has two nodes")
        study.start()
        scenario(study)
        study.end()
        wait_until(lambda: not study.processes(), "the study's processes are gone")
        study.noticed = study.noticed or study.line("is lost|is gone|silent|does not take")
    except kill.Failure as error:
        faults.append(str(error))
    finally:
        for host in hosts.values():
            host.mend()
            host.kill()
    if study.folder.exists():
        faults += kill.check(study.folder, study.ended_before)
    # What was said until the summary.
    words = [line for when, line in study.said if study.fault and when >= study.fault]
    end = [number for number, line in enumerate(words) if line.startswith("study ")]
    words = words[: end[-1] + 1] if end else words
    for line in words:
        if line and not re.match(r"\d+/\d+ trials: ", line):
            print(f"  {line}")
    records = event_log.replay(kill.read_log(study.folder)) if study.folder.exists() else {}
    whole = sum(record.ended for record in records.values())
    noticed = f"{study.noticed - study.fault:.0f} s" if study.noticed else ""
    repeated = str(study.repeated or study.lost_epochs())
    told = [name, noticed, repeated, f"{study.longest_wait():.0f} s", f"{whole} of {len(records)}"]
    return told, faults


def _nodes(head: Host) -> list[str]:
    """The addresses of the nodes that are there, as Ray's own command says."""
    words = [sys.executable, "-c", NODES, f"{head.address}:{RAY_PORT}"]
    log = head.folder / "nodes.log"
    log.unlink(missing_ok=True)
    head.start(words, log).wait()
    return re.findall(r"^alive (\S+)", log.read_text(), re.MULTILINE)


NODES = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False)
for node in ray.nodes():
    print("alive" if node["Alive"] else "dead", node["NodeManagerAddress"])
"""


@contextmanager
def network() -> Iterator[None]:
    """A bridge and a namespace for each of NAMES, cabled to it."""
    bridge, rays = "disinhib", Path("/tmp/ray")
    spaces = [f"disinhib-{name}" for name in NAMES]
    # Cables first: a namespace takes its own along only after a while.
    for kind, name in [("link", n) for n in (bridge, *spaces)] + [("netns", n) for n in spaces]:
        with suppress(kill.Failure):  # of a run that was killed
            call("ip", kind, "del", name)
    with ExitStack() as stack:
        if not rays.exists():  # each host mounts its own there
            rays.mkdir()
            stack.callback(rays.rmdir)
        call("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(call, "ip", "link", "del", bridge)
        call("ip", "address", "add", f"{NET}.1/24", "dev", bridge)
        call("ip", "link", "set", bridge, "up")
        for index, space in enumerate(spaces):  # and the cable of the same name
            call("ip", "netns", "add", space)
            stack.callback(call, "ip", "netns", "del", space)
            call(
                *("ip", "link", "add", space, "type", "veth"),
                *("peer", "name", "eth0", "netns", space),
            )
            call("ip", "link", "set", space, "master", bridge, "up")
            inside = ("ip", "-n", space)
            call(*inside, "link", "set", "lo", "up")
            call(*inside, "address", "add", f"{NET}.{index + 2}/24", "dev", "eth0")
            call(*inside, "link", "set", "eth0", "up")
            call(*inside, "route", "add", "default", "via", f"{NET}.1")
        yield


@contextmanager
def _temporary() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="hosts-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)  # PostgreSQL runs as another user
        yield folder


def programs() -> Path:
    """PostgreSQL's folder, the newest."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        raise InputError("tests.hosts: PostgreSQL not found, needed is Debian's postgresql")
    return found[-1].parent


def call(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise kill.Failure(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def wait_until(there: Callable[[], bool], what: str) -> None:
    began = time.monotonic()
    while not there():
        if time.monotonic() - began > PATIENCE:
            raise kill.Failure(f"{what}: never")
        time.sleep(0.2)


if __name__ == "__main__":
    cli.run(main)
