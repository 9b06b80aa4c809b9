"""A study on two nodes, each with its own raylet, that it did not start."""

import json
import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest
import ray
import tiny
from ray.cluster_utils import Cluster
from ray.tune import Callback

from disinhib.errors import ConfigError
from disinhib.tuning import cluster, manifest, options, study
from disinhib.tuning.event_log import COMPLETE, EpochDone, EventLog
from disinhib.tuning.worker import REPORT

pytestmark = pytest.mark.usefixtures("copied_stores")


@pytest.fixture(scope="module")
def nodes():
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    started.add_node(num_cpus=1)
    yield started
    started.shutdown()


@pytest.fixture
def compose(nodes, tmp_path):
    words = ["experiment=smoke", "trials=4", "space=bp", "scheduler=none", "study=two"]
    place = [f"cluster.address={nodes.address}", f"out_dir={tmp_path / 'out'}"]
    return lambda *overrides: options.compose([*words, *place, *overrides])


def placed():
    """Its epochs report their node, and wait until there is a trial on each of the two."""

    class Placed(tiny.played()):
        def step(self):
            node = ray.get_runtime_context().get_node_id()[:8]
            folder = Path(self.trial["policy"]["folder"])
            (folder / f"node-{node}").touch()
            while len(list(folder.glob("node-*"))) < 2:
                time.sleep(0.05)
            result = super().step()
            report = json.loads(result[REPORT])
            report["metrics"]["node"] = [float(int(node, 16))]
            return {**result, REPORT: json.dumps(report)}

    return Placed


def test_trials_run_on_every_node(compose):
    asked = compose()
    finished = study.run(asked, tiny.quiet(), placed())
    ends = [(record.state, record.reason) for record in finished.records]
    assert ends == [(COMPLETE, None)] * 4
    with closing(EventLog(asked.folder)) as log:
        events = [logged.event for logged in log.events()]
    places = {event.metrics["node"][0] for event in events if isinstance(event, EpochDone)}
    assert len(places) == 2


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


def test_a_machine_that_sees_another_folder_or_has_other_code_is_named(compose):
    asked = compose()
    job = study.job(asked)
    manifest.write(job.folder, job.manifest, job.kept)
    file, files = job.folder / manifest.MANIFEST, job.manifest.provenance["code"]["files"]
    with cluster.cluster(asked.cluster):
        cluster.check_machines(file, job.manifest.id, files)
        with pytest.raises(ConfigError, match=r"has other code: tune_main\.py"):
            cluster.check_machines(file, job.manifest.id, {**files, "tune_main.py": "0"})
        file.write_text(json.dumps({"id": "that of an earlier study"}))
        with pytest.raises(ConfigError, match=r"out_dir: .* does not see it"):
            cluster.check_machines(file, job.manifest.id, files)
        shutil.rmtree(asked.folder)
        with pytest.raises(ConfigError, match=r"out_dir: .* does not see it"):
            cluster.check_machines(file, job.manifest.id, files)


def test_shares_of_a_processor_are_counted_whole(monkeypatch):
    machines = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}] * 2
    monkeypatch.setattr(ray, "nodes", lambda: machines)
    assert cluster.trials_at_once({"cpu": 1, "gpu": 0.25}) == 8
    assert cluster.trials_at_once({"cpu": 0.5, "gpu": 0.2}) == 10
    assert cluster.trials_at_once({"cpu": 8, "gpu": 0}) == 0


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
