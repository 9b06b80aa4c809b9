"""What tests of whole studies share: a search space in small, and trials that only play."""

import io
import json
import math
import os
import signal
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.air.constants import TRAINING_ITERATION
from rich.console import Console

from disinhib.tuning import machines, manifest, options, provenance, study
from disinhib.tuning.ray_backend import RayBackend
from disinhib.tuning.worker import FAILURE, NODE, REPORT, SAVED
from search_spaces import SPACES

RULES = {"bp": "non-dale", "exact-inv": "dale", "lin-thresh": "dale"}
TRIALS, PRUNED_TRIAL, DIVERGED_TRIAL, RAISED_TRIAL = 7, 4, 5, 6
STUDY = ("experiment=smoke", "space=tiny", f"trials={TRIALS}", "cluster.max_concurrent=1")


def space(trial):
    """Two trials of each rule; exact-inv's second cannot learn, lin-thresh's second diverges."""
    rule = trial.suggest_categorical("trainer", tuple(RULES))
    rate = trial.suggest_float(f"{rule}.optimizer.learning_rate", 1e-3, 2e-2, log=True)
    overrides = {"model/vf": RULES[rule], "trainer": rule, "optimizer.learning_rate": rate}
    if RULES[rule] == "dale":
        gain = trial.suggest_float(f"{rule}.model.vf.g_EI", 0.5, 2.0)
        overrides["model.vf.g_EI"] = gain
    if trial.number == PRUNED_TRIAL:
        overrides["optimizer.learning_rate"] = 1e-12
    if trial.number == DIVERGED_TRIAL:
        overrides["optimizer.learning_rate"] = 1e30
    return overrides


@pytest.fixture(scope="module")
def source():
    """The source as it is now: somebody may edit it while the tests run."""
    code = provenance.code(provenance.ROOT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "code", lambda _: deepcopy(code))
        yield


@pytest.fixture(scope="module")
def tiny_space(source):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPACES, "tiny", space)
        yield


def begin(*overrides):
    """A study that has begun, and has tried nothing yet: its folder is there."""
    asked = options.compose([*STUDY, *overrides])
    job = study.job(asked)
    manifest.write(job.folder, job.manifest, job.kept)
    return asked


def cluster_of_one():
    """The machines of the Ray that the module shares (`one_ray`)."""
    need: Any = {"file": "", "id": "", "sources": [("digits", None, 0.1)], "gpus": 0, "plugins": []}
    found = machines.Machines({"cpu": 1, "gpu": 0}, need)
    machines.survey(found)
    return found


def backend(trainable, folder, on_over_cap=lambda: None, say=print):
    """Ray Tune as it runs trials of one core each, whose checkpoints would be in `folder`."""
    policy: Any = {"folder": str(folder), "cap_bytes": 1e9, "lanes": 1}
    return RayBackend(
        trainable, {"cpu": 1, "gpu": 0}, policy, lambda trial: (), folder, cluster_of_one(),
        lambda: None, on_over_cap, say,
    )  # fmt: skip


def quiet():
    return Console(file=io.StringIO(), width=120)


def played():
    """A trainable that plays what the trial's `searched` says of an epoch: `raise`, `die`, `die
    once`, `die twice` or `die in each` (its worker), `hang` (once), `stay` for a moment, `wait`
    (until a file `go` is in its folder), `full` (the disk), `over cap`, or `diverge` (its last
    seed); else its score is the number there, or 50.
    A final trial has a test set. (A local class: Ray sends it to workers, which cannot import this
    file.)
    """

    class Played(tune.Trainable):
        def setup(self, config):
            self.reset_config(config)

        def reset_config(self, new_config):
            self.trial, self.epoch, self.failure = new_config, 0, None
            self.diverged = False
            return True

        def step(self):
            if self.failure is not None:
                raise self.failure
            self.epoch += 1
            act = self.trial["searched"].get(str(self.epoch))
            mark = Path(self.trial["policy"]["folder"], f"died-{self.trial['number']}")
            if act == "raise":
                self.failure = RuntimeError("planted")
                return {FAILURE: "RuntimeError: planted"}
            if act == "die" or (act == "die once" and not mark.exists()):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            again = mark.with_name(f"{mark.name}-{self.epoch}")
            if act in ("die in each", "hang") and not again.exists():
                again.touch()
                os.kill(os.getpid(), signal.SIGSTOP if act == "hang" else signal.SIGKILL)
            deaths = len(list(mark.parent.glob(f"{mark.name}-*")))
            if act == "die twice" and deaths < 2:
                mark.with_name(f"{mark.name}-{deaths}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if act == "stay":
                time.sleep(0.2)
            while act == "wait" and not mark.with_name("go").exists():
                time.sleep(0.01)
            score = act if isinstance(act, float) else 50.0
            names = ["valid_accuracy"]
            if self.trial["final"] and self.epoch == self.trial["epochs"]:
                names.append("test_accuracy")
            seeds, diverged = self.trial["seeds"], {}
            if act == "diverge":
                self.diverged, diverged = True, {str(seeds[-1]): "Diverged: planted"}
            last = math.nan if self.diverged else score
            report = {
                "epoch": self.epoch,
                "metrics": {name: [*[score] * (len(seeds) - 1), last] for name in names},
                "place": {"host": "h", "device": "cpu"},
                "diverged": diverged,
            }
            words = {
                **({"obstacle": "No space left on device: there"} if act == "full" else {}),
                **({"over_cap": True} if act == "over cap" else {}),
            }
            shown = {"valid_accuracy": score, TRAINING_ITERATION: self.epoch}
            node = ray.get_runtime_context().get_node_id()
            text = json.dumps({"epochs": [report], **words})
            return {**shown, REPORT: text, NODE: node, SAVED: 0}

    return Played
