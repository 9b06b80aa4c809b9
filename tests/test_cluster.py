"""A study on two nodes, each with its own raylet, that it did not start."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import requests
import tiny
from ray.cluster_utils import Cluster
from ray.tune import Callback
from rich.console import Console

from disinhib.errors import ConfigError
from disinhib.tuning import cluster, engine, machines, options, study
from disinhib.tuning.event_log import COMPLETE
from disinhib.tuning.loop import StudyStopped
from disinhib.tuning.worker import MACHINE, NODE, SAVED

pytestmark = pytest.mark.usefixtures("copied_stores", "mlflow_here")
RAY = (sys.executable, "-m", "ray.scripts.scripts")


@pytest.fixture(scope="module")
def nodes():
    # Ray notices within seconds that a machine is gone.
    noticed = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 1, "_system_config": noticed}
    started = Cluster(initialize_head=True, head_node_args=head)
    started.add_node(num_cpus=1)
    yield started
    started.shutdown()


@pytest.fixture
def compose(nodes, tmp_path):
    words = ["experiment=smoke", "trials=3", "space=bp", "scheduler=none", "study=two"]
    place = [f"cluster.address={nodes.address}", f"out_dir={tmp_path / 'out'}"]
    return lambda *overrides: options.compose([*words, *place, *overrides])


TOO_MUCH = {
    "cluster.cpus_per_trial=4096": "cluster.cpus_per_trial: given 4096, allowed is at most 1",
    "cluster.gpus_per_trial=1": "cluster.gpus_per_trial: given 1, allowed is at most 0",
}


@pytest.mark.parametrize("override", TOO_MUCH)
def test_what_no_machine_has_is_refused_and_nothing_written(override, compose, tmp_path):
    class Started(Callback):
        def on_trial_start(self, **_):
            raise AssertionError("a trial was started")

    with pytest.raises(ConfigError, match=TOO_MUCH[override]):
        study.run(compose(override), tiny.quiet(), tiny.played(), [Started()])
    assert not list(tmp_path.iterdir())
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def joined(nodes):
    """The studies from here on share one connection, which takes seconds."""
    place = {"address": nodes.address, "cpus_per_trial": 1, "gpus_per_trial": 0}
    with cluster.cluster(place):
        yield


def placed(machines=2):
    """Its epochs wait until there have been trials on so many `machines`."""

    class Placed(tiny.played()):
        def step(self):
            node = ray.get_runtime_context().get_node_id()
            folder = Path(self.trial["policy"]["folder"])
            (folder / f"node-{node}").touch()
            while len(list(folder.glob("node-*"))) < machines:
                time.sleep(0.05)
            return super().step()

    return Placed


def free_port():
    with closing(socket.create_server(("127.0.0.1", 0))) as unused:
        return unused.getsockname()[1]


def run(asked, trainable, *callbacks):
    """(the records of the study, what was printed)."""
    printed = io.StringIO()
    finished = study.run(asked, Console(file=printed, width=120), trainable, callbacks)
    assert [record.state for record in finished.records] == [COMPLETE] * asked.trials
    return finished.records, printed.getvalue()


def test_a_machine_at_fault_is_left_out_and_its_trials_go_elsewhere(compose, nodes, joined):
    bad = nodes.list_all_nodes()[1].node_id

    class Faulty(placed()):
        def step(self):
            result = super().step()
            if result[NODE] == bad and self.epoch == 1:
                self.failure = OSError("planted")
                return {MACHINE: "there: planted", NODE: bad, SAVED: 0}
            return result

    _, said = run(compose(), Faulty)
    (reason,) = re.findall(r"^(\S+ is left out): planted$", said, re.MULTILINE)
    assert f"{reason}: trial" in said and "goes on from epoch 0" in said and " lost" not in said


def test_only_if_no_machine_is_left_does_the_study_stop(compose, joined):
    class Faulty(tiny.played()):
        def step(self):
            self.failure = OSError("planted")
            node = ray.get_runtime_context().get_node_id()
            return {MACHINE: f"{node}: planted", NODE: node, SAVED: 0}

    with pytest.raises(StudyStopped, match="planted: mend it"):
        study.run(compose("trials=2"), tiny.quiet(), Faulty)


def test_a_worker_that_is_never_born_is_no_failed_trial(compose, joined):
    class Unborn(tiny.played()):
        def setup(self, config):
            os._exit(1)

    with pytest.raises(StudyStopped, match=r"^Ray could not start a worker .*: mend it$"):
        study.run(compose("trials=1"), tiny.quiet(), Unborn)


class Change(Callback):
    """A machine joins with the first trial, and is lost when it has one. Makes the files `joined`
    and `gone` in `folder` when the study has `printed` so."""

    def __init__(self, nodes, printed, folder):
        self.nodes, self.printed, self.folder = nodes, printed, folder
        self.added: Any = None

    def __getstate__(self):
        return {}  # Ray pickles its callbacks

    def on_trial_start(self, **_):
        self.added = self.added or self.nodes.add_node(num_cpus=1)

    def on_trial_result(self, *, result, **_):
        if result[NODE] == self.added.node_id and self.added in self.nodes.worker_nodes:
            self.nodes.remove_node(self.added, allow_graceful=False)

    def on_step_end(self, **_):
        for file, words in (("joined", "joined: 1 more at once"), ("gone", "is gone")):
            if words in self.printed.getvalue():
                (self.folder / file).touch()


def test_a_machine_that_joins_is_used_and_one_that_leaves_costs_no_trial(
    compose, nodes, joined, tmp_path
):
    """Trials run on all three."""

    class Waiting(placed(machines=3)):
        def step(self):
            while not (tmp_path / ("gone" if self.epoch else "joined")).exists():
                time.sleep(0.05)
            return super().step()

    printed = io.StringIO()
    asked = compose("trials=4")
    change = Change(nodes, printed, tmp_path)
    finished = study.run(asked, Console(file=printed, width=120), Waiting, [change])
    assert [record.state for record in finished.records] == [COMPLETE] * 4
    assert "is gone: trial" in printed.getvalue()
    assert "goes on from epoch 0" in printed.getvalue()
    assert "(raylet)" in (asked.folder / engine.RAY_LOG).read_text()


def test_a_machine_that_is_not_as_the_drivers_is_named_and_nothing_begun(
    compose, joined, monkeypatch
):
    asked = compose()
    require = machines.require

    def other(*given):
        need = require(*given)
        file = Path(need["file"])
        content = json.loads(file.read_text())
        content["has"][0]["code"]["files"]["tune_main.py"] = "0"
        file.write_text(json.dumps(content))
        return need

    monkeypatch.setattr(machines, "require", other)
    with pytest.raises(ConfigError, match=r"^cluster: \S+ is not as the driver was: tune_main\.py"):
        study.run(asked, tiny.quiet(), tiny.played())
    assert not asked.folder.exists()


@pytest.mark.parametrize(
    ("lanes", "gpus", "most", "seeds", "expected"),
    [
        ("auto", 0, None, 1, 1),
        ("auto", 1, None, 1, 32),
        ("auto", 0.25, None, 1, 8),  # four servers share the GPU
        ("auto", 0.01, None, 1, 1),
        (64, 0.25, None, 1, 64),
        (64, 1, 4, 1, 4),  # no more than there are trials
        (64, 1, 4, 10, 40),
        (1, 1, 4, 10, 1),
    ],
)
def test_a_server_has_as_many_lanes_as_it_can_use(lanes, gpus, most, seeds, expected):
    options = {"lanes": lanes, "gpus_per_trial": gpus, "max_concurrent": most}
    assert cluster.lanes(options, seeds) == expected


def test_shares_of_a_processor_are_counted_whole(monkeypatch):
    machines = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}] * 2
    monkeypatch.setattr(ray, "nodes", lambda: machines)
    assert cluster.trials_at_once({"cpu": 1, "gpu": 0.25}) == 8
    assert cluster.trials_at_once({"cpu": 0.5, "gpu": 0.2}) == 10
    assert cluster.trials_at_once({"cpu": 8, "gpu": 0}) == 0
    assert cluster.room({"CPU": 8.0, "GPU": 2.0}, {"cpu": 1, "gpu": 0.6}) == 2


def test_within_a_cluster_there_is_no_other(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "init", None)
    monkeypatch.setattr(ray, "shutdown", None)
    with cluster.cluster({"address": None, "cpus_per_trial": 1, "gpus_per_trial": 0}):
        pass


@pytest.mark.parametrize(
    ("affinity", "quota", "slurm", "cores"),
    [
        (128, "max 100000", None, 128),
        (4, "max 100000", None, 4),  # taskset
        (128, "400000 100000", None, 4),  # a container
        (128, "50000 100000", None, 1),
        (128, "max 100000", "16", 16),
        (128, "max 100000", "16(x2)", 128),
    ],
)
def test_the_cores_of_this_machine_are_those_that_we_may_use(
    affinity, quota, slurm, cores, tmp_path, monkeypatch
):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(cluster, "CGROUPS", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(affinity), raising=False)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    if slurm:
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", slurm)
    assert cluster.cores() == cores


def test_ray_gets_a_folder_whose_name_leaves_room_for_its_sockets(tmp_path, monkeypatch):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.delenv("RAY_TMPDIR")
    for folder in (long, tmp_path / "missing"):
        monkeypatch.setenv("TMPDIR", str(folder))
        assert cluster.temporary_folder() == "/tmp"
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("TMPDIR", short)
        assert cluster.temporary_folder() == short
    monkeypatch.setenv("RAY_TMPDIR", str(long))  # asked for
    with pytest.raises(ConfigError, match=r"^RAY_TMPDIR: given .* of at most 3\d bytes$"):
        cluster.temporary_folder()


def test_our_own_ray_has_a_token_that_is_in_no_file(monkeypatch):
    assert cluster._token() == {}  # the suite's
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert cluster._token() == {"RAY_AUTH_TOKEN": cluster.TOKEN} and len(cluster.TOKEN) == 64
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/mine")
    assert cluster._token() == {}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """The address of a Ray that asks for a token."""
    folder = tmp_path_factory.mktemp("guarded")
    address = f"127.0.0.1:{free_port()}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64}
    host, port = address.split(":")
    words = ("--head", "--block", f"--node-ip-address={host}", f"--port={port}", "--num-cpus=1")
    with tempfile.TemporaryDirectory(dir="/tmp") as short, (folder / "log").open("w") as log:
        head = subprocess.Popen(
            [*RAY, "start", *words, "--include-dashboard=false", f"--temp-dir={short}"],
            **{"env": os.environ | token, "stdout": log, "stderr": log},
        )
        while subprocess.run(
            [*RAY, "health-check", f"--address={address}"],
            **{"env": os.environ | token, "capture_output": True},
        ).returncode:
            assert head.poll() is None, (folder / "log").read_text()
        yield address
        head.terminate()
        head.wait()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("RAY_AUTH_TOKEN", "0" * 64, "Authentication token is missing or incorrect"),
        ("RAY_AUTH_TOKEN_PATH", "/missing", "file cannot be opened or is empty: /missing"),
    ],
)
def test_a_token_that_is_wrong_or_missing_is_named(name, value, says, guarded, tmp_path):
    own = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_TOKEN"}
    place = [f"cluster.address={guarded}", f"out_dir={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "tune_main.py", "experiment=smoke", *place],
        **{"env": {**own, "RAY_AUTH_MODE": "token", name: value}, "capture_output": True},
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: cluster.address: {guarded}: ")
    assert says in done.stderr and "RAY_AUTH_TOKEN_PATH as where" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


OWN = """
import sys, time
from disinhib.tuning import cluster
with cluster.cluster({"address": None, "cpus_per_trial": 1, "gpus_per_trial": 0}):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_our_own_ray_answers_nobody_else_and_hears_no_signal_to_our_group(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", OWN], process_group=0, **pipes) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == "ready\n"
        log = Path(os.environ["RAY_TMPDIR"], "ray/session_latest/logs/monitor.log")
        while not (log.exists() and "Starting autoscaler metrics server" in log.read_text()):
            assert driver.poll() is None
            time.sleep(0.05)
        own = {driver.pid, *(p.pid for p in psutil.Process(driver.pid).children(recursive=True))}
        places = {
            connection.laddr[:2]
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.pid in own
        }
        answers = [answer for place in places for answer in http(*place)]
        assert [pid for pid in own if os.getpgid(pid) == driver.pid] == [driver.pid]
        driver.communicate()
    assert len(places) > 3 and {*answers} == {401}


PASSED_ON = """
import sys
from disinhib.tuning import cluster
with cluster._in_another_group():
    print("ready", flush=True)
    sys.stdin.read()
print("not reached")
"""


def test_a_signal_to_our_group_while_ray_starts_is_passed_on():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PASSED_ON], process_group=0, **pipes) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == "ready\n"
        assert os.getpgid(driver.pid) != driver.pid
        placeholders = psutil.Process(driver.pid).children()
        (ours,) = (child for child in placeholders if os.getpgid(child.pid) == driver.pid)
        os.killpg(driver.pid, signal.SIGTERM)
        while ours.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert driver.communicate()[0] == ""
    assert driver.returncode == -signal.SIGTERM


def http(host, port):
    """The status that it answers, unless it speaks Ray's own language, which asks for a token."""
    with suppress(requests.ConnectionError):  # it has greeted first, in HTTP/2
        address = f"http://{host.replace('::', '127.0.0.1')}:{port}"
        yield requests.get(address, timeout=300).status_code


def test_a_ray_that_does_not_start_is_one_line(monkeypatch):
    def broken(**_):
        raise RuntimeError("The current node timed out\nduring startup")

    monkeypatch.setattr(ray, "init", broken)
    local = {"address": None, "cpus_per_trial": 1, "gpus_per_trial": 0, "max_concurrent": None}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with (
        pytest.raises(ConfigError, match=r"^Ray did not start on this machine \(RuntimeError: "),
        cluster.cluster(local),
    ):
        pass
