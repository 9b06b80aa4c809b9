"""The Ray cluster of a study: started or joined, and checked before any trial."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from disinhib import process
from disinhib.checks import refusal
from disinhib.errors import ConfigError, one_line
from disinhib.tuning import environment

SWITCHES = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay where the study was started
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # its tables cannot be switched off; the old output's can
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # everything is in the log
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # `progress` prints a line for each
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # nor a traceback when nobody waits for it
}
# And left: breakpoint() would then be Ray's. (Not RAY_AUTH_MODE: this process has read it for good,
# and what another Ray starts without it could not speak to it.)
CGROUPS = Path("/sys/fs/cgroup")
LANES_OF_A_GPU = 32  # with cluster.lanes=auto; with a share of a GPU, that share of them
LONGEST_FOLDER = 107 - len("/ray/session_2026-11-25_16-50-00_076501_1234567/sockets/plasma_store")
# Of our own Ray, for the life of this process, which reads it once. (Ray would keep one in a file
# in the user's home that others can read.)
TOKEN = secrets.token_hex(32)
HEALTH_SECONDS = 120.0  # in which Ray's own command says whether a cluster takes our token
# Ray's only port that would answer everybody, with its metrics: what is no port is not opened.
CLOSED = {"AUTOSCALER_METRIC_PORT": "-1"}
# Our own Ray has one machine, which is not dead if it does not answer: it is busy, or was asleep.
PATIENT = {"RAY_health_check_failure_threshold": "100"}  # times 3 s
SET_BY_RAY = ("PYTHONBREAKPOINT",)


@contextmanager
def cluster(options: Mapping[str, Any]) -> Iterator[None]:
    """Starts or joins Ray for the duration of a study, with the options `cluster.*`. Does nothing
    if Ray is running in this process already.

    Raises ConfigError if there is no such cluster, or if no machine has the resources of a trial.
    """
    if ray.is_initialized():  # by a caller, who also shuts it down
        yield
        return
    cpus, gpus = options["cpus_per_trial"], options["gpus_per_trial"]
    own = (
        {}
        if options["address"]
        else {"RAY_TMPDIR": temporary_folder(), **CLOSED, **PATIENT, **_token()}
    )
    with environment.variables({**SWITCHES, **own}, also=SET_BY_RAY), _without_summary():
        try:
            _connect(options["address"], environment.of_worker(cpus, gpus))
            for option, kind, asked in (("cpus", "CPU", cpus), ("gpus", "GPU", gpus)):
                most = max(node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"])
                if asked > most:
                    allowed = f"at most {most:g}, what the largest machine has"
                    raise refusal(f"cluster.{option}_per_trial", asked, allowed)
            if not trials_at_once({"cpu": cpus, "gpu": gpus}):
                allowed = f"what one machine has together with {cpus} CPUs"
                raise refusal("cluster.gpus_per_trial", gpus, allowed)
            yield
        finally:
            with process.finishing(), _own_handler(signal.SIGTERM):
                ray.shutdown()


def _connect(address: str | None, worker_environment: Mapping[str, str]) -> None:
    elsewhere = nullcontext() if address else _in_another_group()
    with warnings.catch_warnings(), elsewhere, _own_handler(signal.SIGTERM):
        # jax warns of forks; Ray's forks are all followed by an exec.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        try:
            host, _, port = (address or "").rpartition(":")
            if host:  # Ray would wait for minutes if nothing there speaks its language (HTTP/2)
                with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as there:
                    tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
                    if not tls and not there.recv(9):
                        raise ConnectionError("closed by its other end")
            if address:
                _refuse_token(address)
            # "local", as None would join whatever cluster was last started on this machine, even
            # if it is no longer there.
            local = {"address": "local", "num_cpus": cores(), "include_dashboard": False}
            place: dict[str, Any] = {"address": address} if address else local
            ray.init(
                **place,
                runtime_env={"env_vars": dict(worker_environment)},
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        except ConfigError:
            raise
        except Exception as error:  # Ray raises many kinds
            if address is None:
                logs = Path(os.environ["RAY_TMPDIR"], "ray/session_latest/logs")
                words = f"Ray did not start on this machine ({one_line(error)}); its logs: {logs}"
                raise ConfigError(words) from error
            if isinstance(error, AuthenticationError):  # no token was found
                raise _no_entry(address, one_line(error)) from error
            allowed = f"auto or HOST:PORT of a running Ray cluster, or null ({one_line(error)})"
            raise refusal("cluster.address", address, allowed) from error


def _refuse_token(address: str) -> None:
    """Raises ConfigError if the cluster does not take the token in our environment. (`ray.init`
    would not say so, but fail to connect, after half a minute and as many lines.)"""
    place = [] if address == "auto" else ["--address", address]
    words = [sys.executable, "-m", "ray.scripts.scripts", "health-check", *place]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=HEALTH_SECONDS)
    except subprocess.TimeoutExpired:  # then Ray itself says what is wrong
        return
    if found := re.search(r"AuthenticationError: .*", done.stderr):
        raise _no_entry(address, found[0])


def _no_entry(address: str, words: str) -> ConfigError:
    why = re.sub(r"^AuthenticationError: (RPC error: \w+: )?", "", words).split(". ")[0]
    cure = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH as where that Ray was started"
    return ConfigError(f"cluster.address: {address}: {why}: {cure}")


@contextmanager
def _in_another_group() -> Iterator[None]:
    """What starts within it does not hear a signal to this process' group (of `timeout`, of a
    closed terminal). If Ray ended at once, Tune would wait for it, until Ray ended this process.

    On Linux, and not for the first process of a session, which cannot leave its group. A signal
    that comes meanwhile is taken by a placeholder, which also keeps the group alive, and passed on.
    """
    if sys.platform != "linux" or os.getsid(0) == os.getpid():
        yield
        return
    own = os.getpgrp()
    idle = partial(subprocess.Popen, ["cat"], stdin=subprocess.PIPE)
    with idle() as placeholder, idle(process_group=0) as other:
        os.setpgid(0, other.pid)
        try:
            yield
        finally:
            os.setpgid(0, own)
            ended_by = placeholder.poll()
            placeholder.kill()
            other.kill()
            if ended_by is not None:
                os.kill(os.getpid(), -ended_by)


@contextmanager
def _own_handler(number: signal.Signals) -> Iterator[None]:
    """Keeps the process' handler of a signal. (Ray's own, which it sets when it starts, would end
    the process at once, and so would the system's, which it sets when it ends.)"""
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)


def _token() -> dict[str, str]:
    """The variable with the token of our own Ray, unless the user has set one."""
    own = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    return {} if own else {"RAY_AUTH_TOKEN": TOKEN}


def cores() -> int:
    """The cores that this process may use: its affinity (taskset, SLURM), its cgroup's quota
    (containers, SLURM), and what SLURM has allotted on this node."""
    linux = hasattr(os, "sched_getaffinity")
    limits: list[int | None] = [len(os.sched_getaffinity(0)) if linux else os.cpu_count()]
    limits += [_quota(file) for file in _quota_files()]
    slurm = os.environ.get("SLURM_CPUS_ON_NODE", "")
    limits += [int(slurm)] if slurm.isdigit() else []
    return max(1, min(limit for limit in limits if limit))


def _quota_files() -> list[Path]:
    """Of this process' cgroup (version 2) and those above it."""
    try:
        name = Path("/proc/self/cgroup").read_text().split("0::/", 1)[1].splitlines()[0]
    except (OSError, IndexError):  # no Linux, or version 1
        return []
    groups = [CGROUPS / name, *(CGROUPS / name).parents]
    return [group / "cpu.max" for group in groups if group.is_relative_to(CGROUPS)]


def _quota(file: Path) -> int | None:
    """In whole cores; None if there is no limit."""
    try:
        most, period = file.read_text().split()
        return None if most == "max" else max(1, int(most) // int(period))
    except (OSError, ValueError):
        return None


def temporary_folder() -> str:
    """Where Ray keeps its sockets and logs: $RAY_TMPDIR, else the first of $TMPDIR and /tmp that
    can be written and whose name leaves room for a socket's, at most 107 bytes in all.

    Raises ConfigError if $RAY_TMPDIR, or all, will not do.
    """
    asked = os.environ.get("RAY_TMPDIR")
    folders = [asked] if asked else [*filter(None, [os.environ.get("TMPDIR")]), "/tmp"]
    for folder in folders:
        if len(os.fsencode(os.path.abspath(folder))) <= LONGEST_FOLDER:
            try:
                with tempfile.TemporaryDirectory(dir=folder):
                    return os.path.abspath(folder)
            except OSError:
                pass
    allowed = f"an absolute folder that can be written, of at most {LONGEST_FOLDER} bytes"
    raise ConfigError(f"RAY_TMPDIR: given {folders[-1]}, needed for Ray's sockets is {allowed}")


@contextmanager
def _without_summary() -> Iterator[None]:
    """Hides the error with which Tune lists failed trials; `progress` has printed them."""
    logger = logging.getLogger("ray.tune.tune")
    unsaid = lambda record: "Trials did not complete" not in str(record.msg)
    logger.addFilter(unsaid)
    try:
        yield
    finally:
        logger.removeFilter(unsaid)


def room(resources: Mapping[str, float], trial: Mapping[str, float]) -> int:
    """How many trials with the resources `trial` (cpu, gpu) fit on a machine with `resources`. A
    share of a GPU is never that of two."""
    fitting = []
    for kind, share in trial.items():
        has = resources.get(kind.upper(), 0)
        if 0 < share < 1:
            fitting.append(int(has) * int(1 / share + 1e-9))  # five of 0.2 are one
        elif share:
            fitting.append(int(has / share))
    return min(fitting)


def lanes(options: Mapping[str, Any], seeds: int = 1) -> int:
    """How many lanes a server of each device trains, of the options `cluster.*`, for trials of so
    many seeds; 1: none does."""
    asked, most = options["lanes"], options["max_concurrent"]
    if asked == "auto":
        asked = max(1, int(LANES_OF_A_GPU * options["gpus_per_trial"]))
    return asked if most is None else min(asked, most * seeds)


def trials_at_once(trial: Mapping[str, float]) -> int:
    """How many trials with the resources `trial` fit on the cluster now."""
    return sum(room(node["Resources"], trial) for node in ray.nodes() if node["Alive"])
