"""A study on two nodes, each with its own raylet, that it did not start."""

import io
import json
import shutil
from contextlib import closing

import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from disinhib.errors import ConfigError
from disinhib.tuning import manifest as origins, options, ray_backend, study
from disinhib.tuning.event_log import COMPLETE, EPOCH, Journal
from disinhib.tuning.worker import TrainingTrial


@pytest.fixture(scope="module")
def cluster():
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    started.add_node(num_cpus=1)
    yield started
    started.shutdown()


def asked_for(cluster, folder):
    words = ("experiment=smoke", "trials=4", "space=bp", "scheduler=none", "study=two")
    return options.compose([*words, f"cluster.address={cluster.address}", f"out_dir={folder}"])


def test_trials_run_on_every_node(cluster, tmp_path):
    asked = asked_for(cluster, tmp_path)
    finished = study.run(asked, Console(file=io.StringIO()), placed_trial())
    assert [record.state for record in finished.records] == [COMPLETE] * 4
    with closing(Journal(asked.folder)) as opened:
        events = opened.events()
    nodes = {event.body["metrics"]["node"] for event in events if event.kind == EPOCH}
    assert len(nodes) == 2


def placed_trial():
    """Real training that reports its node. (A local class: Ray sends it to workers, which cannot
    import this file.)"""

    class PlacedTrial(TrainingTrial):
        def _epoch(self):
            body = super()._epoch()
            node = ray.get_runtime_context().get_node_id()
            body["metrics"]["node"] = float(int(node[:8], 16))
            return body

    return PlacedTrial


def test_a_machine_that_sees_another_folder_or_has_other_code_is_named(cluster, tmp_path):
    asked = asked_for(cluster, tmp_path)
    origin = origins.begin(asked)
    origins.write(asked, origin)
    file, files = asked.folder / origins.ORIGIN, origin["provenance"]["code"]["files"]
    with ray_backend.cluster(asked.cluster):
        ray_backend.check_machines(file, origin["id"], files)
        with pytest.raises(ConfigError, match=r"has other code: tune_main\.py"):
            ray_backend.check_machines(file, origin["id"], {**files, "tune_main.py": "0"})
        file.write_text(json.dumps({"id": "that of an earlier study"}))
        with pytest.raises(ConfigError, match=r"out_dir: .* does not see it"):
            ray_backend.check_machines(file, origin["id"], files)
        shutil.rmtree(asked.folder)
        with pytest.raises(ConfigError, match=r"out_dir: .* does not see it"):
            ray_backend.check_machines(file, origin["id"], files)
