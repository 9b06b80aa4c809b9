"""`cluster/slurm.sbatch` on a real SLURM: `python -m tests.slurm [only=REGEX] [keep=true]`.

SLURM runs for the duration in a temporary folder, with this machine as two nodes; it needs Debian's
`slurm-wlm` and `munge`, but no configuration of theirs. Each scenario is a small study, to its
report, in one job or several; then its trials are compared in its three stores, as `tests.kill`
does. Exit code 0: every study is whole, and no process, token or folder is left. `keep=true` keeps
the folder, to look into. Expect a quarter of an hour on two cores.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from disinhib import cli
from disinhib.checks import FLAG, OPTIONAL_TEXT, Option
from disinhib.errors import ConfigError, InputError
from disinhib.tuning import event_log
from disinhib.tuning.event_log import EpochDone
from tests import kill

SCRIPT = kill.ROOT / "cluster" / "slurm.sbatch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue")
# What the user edits in the script, for this machine.
EDITED = ("--account=test", "--partition=main", "--cpus-per-task=1", "--gpus-per-node=0")
SMALL = ("experiment=smoke", "trials=6")
LONG = ("experiment=smoke", "trials=16", "epochs=6", "checkpoints.every_seconds=5")
LONGER = (*LONG, "trials=48", "epochs=400", "scheduler=none")  # than LIMIT
LIMIT = ("--time=2", "--signal=B:USR1@30")  # SLURM looks at limits twice a minute
PATIENCE = 900.0  # s for a job
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
START = 60.0  # s in which SLURM starts

# Credentials expire soon, as SLURM waits for that before it starts a requeued job. Jobs that have
# ended are asked about at the end of a scenario: SLURM forgets them after MinJobAge.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
MinJobAge=86400
ReturnToService=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=n1,n2 PriorityTier=1 GraceTime=60 Default=YES
PartitionName=urgent Nodes=n1,n2 PriorityTier=2
"""


@dataclass
class Slurm:
    """A SLURM in a folder, and what it is told."""

    folder: Path
    environment: dict[str, str]
    daemons: list[subprocess.Popen] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    def call(self, *words: str) -> str:
        """Runs a command of SLURM; returns what it says."""
        done = subprocess.run(
            words, cwd=kill.ROOT, env=self.environment, capture_output=True, text=True
        )
        if done.returncode:
            raise kill.Failure(f"{shlex.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def start(self, *words: str) -> None:
        with open(self.folder / "daemons.log", "a") as log:
            self.daemons.append(
                subprocess.Popen(words, env=self.environment, stdout=log, stderr=log)
            )

    def wait_until_idle(self) -> None:
        began = time.monotonic()
        while True:
            try:
                nodes = self.call(
                    "sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"
                )
                if nodes.split() == ["idle", "idle"]:
                    return
            except kill.Failure:  # it does not answer yet
                nodes = ""
            if time.monotonic() - began > START:
                log = (self.folder / "daemons.log").read_text()
                raise kill.Failure(f"SLURM did not start: {nodes}\n{log[-2000:]}")
            time.sleep(1)

    def processes(self, kind: str = "") -> list[psutil.Process]:
        """Those of this SLURM and its jobs, which have its environment or, as slurmstepd writes its
        title there, its log; those whose command has `kind` in it."""
        found = []
        for process in psutil.process_iter():
            try:
                own = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if process.name().startswith("slurmstepd"):
                    files = [Path(file.path) for file in process.open_files()]
                    own = any(file.is_relative_to(self.folder) for file in files)
                if own and process.pid != os.getpid() and kind in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # another user's, or it has just ended
                pass
        return found

    def end(self) -> None:
        """Ends the jobs and the daemons that were started here, and no other process."""
        with suppress(kill.Failure):
            self.call("scancel", f"--user={getpass.getuser()}", "--signal=KILL", "--full")
            psutil.wait_procs(self.processes("slurmstepd"), timeout=10)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(self.processes(), timeout=5)
        for job in self.jobs:  # of those that were killed here
            job.token().unlink(missing_ok=True)

    def job(self, study: str, options: Sequence[str], limits: Sequence[str] = ()) -> Job:
        """Submits the study, with `limits` on the command line of sbatch."""
        log = self.folder / f"{study}-%j.log"
        where = (f"study={study}", f"out_dir={self.folder / 'out'}", "seeds=1")
        words = (*EDITED, *limits, f"--output={log}", str(SCRIPT), *where, *options)
        number = self.call("sbatch", "--parsable", *words)
        log = Path(str(log).replace("%j", number))
        self.jobs.append(Job(self, number, log, self.folder / "out" / study))
        return self.jobs[-1]


@dataclass
class Job:
    slurm: Slurm
    number: str
    log: Path
    study: Path  # its folder

    def about(self) -> dict[str, str]:
        words = self.slurm.call("scontrol", "--oneliner", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", words))

    def token(self) -> Path:
        return Path.home() / f".ray-token-{self.number}"

    def wait(self, there: Callable[[], bool], what: str) -> None:
        began = time.monotonic()
        while not there():
            if time.monotonic() - began > PATIENCE or (self.over() and not there()):
                raise kill.Failure(
                    f"job {self.number} {what}: never; it is {self.about()['JobState']}"
                )
            time.sleep(1)

    def over(self) -> bool:
        """Whether no process of the job is left, nor will be."""
        return self.about()["JobState"] in OVER

    def amid_trials(self) -> None:
        """Waits until a trial has ended an epoch since this call, and has not ended itself."""
        began = time.time()

        def amid() -> bool:
            with suppress(ConfigError):  # no log yet, or it was copied while it was being written
                events = event_log.read(self.study, copied=True) or []
                records = event_log.replay(events)
                return any(
                    isinstance(event, EpochDone) and when > began and not records[event.trial].ended
                    for _, when, event in events
                )
            return False

        self.wait(amid, "is amid its trials")

    def end(self) -> Job:
        self.wait(self.over, "ends")
        return self


def whole(slurm: Slurm) -> Iterator[Job]:
    """one job, from the first trial to the report"""
    yield slurm.job("whole", SMALL).end()


def limit(slurm: Slurm) -> Iterator[Job]:
    """a time limit of two minutes: the job requeues itself"""
    job = slurm.job("limit", LONGER, LIMIT).end()
    if job.about()["Restarts"] == "0":
        raise kill.Failure("the study ended within the time limit of its first job")
    yield job


def scancel(slurm: Slurm) -> Iterator[Job]:
    """scancel --signal=TERM, then scancel, each submitted again"""
    for how in (("--signal=TERM",), ()):
        job = slurm.job("scancel", LONG)
        job.amid_trials()
        slurm.call("scancel", *how, job.number)
        yield job.end()
    yield slurm.job("scancel", LONG).end()


def preempted(slurm: Slurm) -> Iterator[Job]:
    """an urgent job takes the nodes, with a minute of grace"""
    job = slurm.job("preempted", LONG)
    job.amid_trials()
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={os.devnull}")
    slurm.call("sbatch", *urgent, "--wrap=sleep 5")
    yield job.end()


def node(slurm: Slurm) -> Iterator[Job]:
    """the second node fails"""
    job = slurm.job("node", LONG)
    job.amid_trials()
    slurm.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        yield job.end()
    finally:
        slurm.call("scontrol", "update", "NodeName=n2", "State=RESUME")


def neighbour(slurm: Slurm) -> Iterator[Job]:
    """two studies on the same nodes, of which the other is cancelled"""
    job, other = slurm.job("neighbour", SMALL), slurm.job("cancelled", LONG)
    other.amid_trials()
    slurm.call("scancel", other.number)
    yield other.end()
    yield job.end()


SCENARIOS = (whole, limit, scancel, preempted, node, neighbour)
COMMAND = cli.Command(
    "tests.slurm",
    __doc__,
    (
        Option("only", None, OPTIONAL_TEXT, "the scenarios whose names match"),
        Option("keep", False, FLAG, "the temporary folder"),
    ),
)


def main(arguments: list[str]) -> int:
    options = COMMAND.parse(arguments)
    path = f"{os.environ['PATH']}:/usr/sbin"
    if lacking := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        raise InputError(
            f"{', '.join(lacking)}: not found, needed are Debian's slurm-wlm and munge"
        )
    table = Table("scenario", "jobs", "seconds", "trials whole", "report", "states")
    wrong = []
    with running(path, options["keep"]) as slurm:
        for scenario in SCENARIOS:
            if re.search(options["only"] or "", scenario.__name__):
                print(f"{scenario.__name__}: {scenario.__doc__}", flush=True)
                row, faults = carry_out(slurm, scenario)
                table.add_row(*row)
                wrong += [f"{scenario.__name__}: {fault}" for fault in faults]
    Console(width=100).print(table)
    print("\n".join(wrong or ["every study is whole, and nothing is left"]))
    return bool(wrong)


def carry_out(
    slurm: Slurm, scenario: Callable[[Slurm], Iterator[Job]]
) -> tuple[list[str], list[str]]:
    """(the scenario's row of the table, what is wrong)."""
    name, began, jobs, faults = scenario.__name__, time.monotonic(), [], []
    try:
        jobs += scenario(slurm)
    except kill.Failure as error:
        faults.append(str(error))
    seconds = time.monotonic() - began
    about = [job.about() for job in jobs]
    states = [each["JobState"] for each in about]
    starts = sum(1 + int(each["Restarts"]) for each in about)
    if states[-1:] != ["COMPLETED"]:
        faults.append(f"its last job is {states[-1] if states else 'missing'}")
    study = slurm.folder / "out" / name
    try:
        trials = kill.inspect(study) if study.exists() else []
    except InputError as error:  # a job has ended, and its study has not
        return [name, "", f"{seconds:.0f}", "", "", ", ".join(states)], [*faults, str(error)]
    numbers = {trial.number for trial in trials}
    whole = {t.number for t in trials if t.store == "log" and t.state in kill.ENDED}
    in_last = {trial.number for trial in trials if trial.store == "ray"}
    faults += kill.check(study, numbers - in_last) if trials else ["there is no study"]
    report = (study.parent / f"report-{name}" / "report.md").exists()
    faults += [] if report else ["there is no report"]
    faults += [f"{token} is left" for job in jobs if (token := job.token()).exists()]
    faults += [f"{process} is left" for process in slurm.processes("ray")]
    told = ", ".join(a["JobState"] + " (requeued)" * (a["Restarts"] != "0") for a in about)
    done = f"{len(whole)} of {len(numbers)}"
    return [name, str(starts), f"{seconds:.0f}", done, "yes" if report else "no", told], faults


@contextmanager
def running(path: str, keep: bool) -> Iterator[Slurm]:
    """SLURM, until the end of the block."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # or munge refuses it
    file = folder / "slurm.conf"
    # RAY_TMPDIR, because Ray's folders stay behind after scancel.
    own = {"PATH": path, "SLURM_CONF": str(file), "RAY_TMPDIR": str(folder)}
    slurm = Slurm(folder, {**os.environ, **own})
    host = socket.gethostname()
    words = {"host": host, "user": getpass.getuser(), "folder": folder, "ports": free_ports(3)}
    file.write_text(CONFIGURATION.format(**words))
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    munge = {
        "key-file": "key",
        "socket": "munge.socket",
        "pid-file": "munged.pid",
        "seed-file": "seed",
    }
    try:
        slurm.start("munged", "--foreground", *(f"--{k}={folder / v}" for k, v in munge.items()))
        slurm.start("slurmctld", "-D")
        for node in ("n1", "n2"):
            slurm.start("slurmd", "-D", "-N", node)
        slurm.wait_until_idle()
        yield slurm
    finally:
        slurm.end()
        if keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    cli.run(main)
