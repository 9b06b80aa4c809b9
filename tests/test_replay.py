"""Replays, in another process than this one, of runs that it trained and wrote to SQLite."""

import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import replay, store as stores
from disinhib.errors import InputError

OPTIONS = [
    *("trainer=bp", "model/vf=non-dale", "model.vf.nb_hidden=1", "model.vf.sizes_hidden=[8]"),
    *("epochs=2", "seed=5"),
]
# Writes runs as a study does, and replays some; prints their ids, and what came of the replays.
CHILD = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout

folder, overrides = sys.argv[1], sys.argv[2:]
import jax, numpy as np, yaml
from mlflow import MlflowClient
from mlflow.entities import Metric
from analysis import replay
from disinhib import hydra_config, training
from disinhib.config import parse
from disinhib.tuning import provenance
from disinhib.tuning.event_log import over_seeds

client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
experiment = client.create_experiment("disinhib", artifact_location=f"file://{folder}/artifacts")

def trained(config, seeds):
    data, state = training.prepare(config), training.initial_state(config, seeds)
    for _ in range(config.epochs):
        try:
            state, lanes = training.run_epoch(config, data, state)
        except training.Diverged as error:
            yield f"Diverged: {error}"
            return
        yield over_seeds({name: values.tolist() for name, values in lanes.items()})

def write(seeds=(5,), more=(), state="complete", alter=lambda epochs: None, about=None, **extra):
    options, _ = hydra_config.compose("train", [*overrides, *more])
    config = parse(options)
    *epochs, last = trained(config, seeds)
    reason = last if isinstance(last, str) else None
    epochs += [] if reason else [last]
    alter(epochs)
    tags = {"study": "tiny", "trial": "3", "rule": "bp", "command": "python -m disinhib"}
    tags |= {"seeds": ",".join(map(str, seeds)), "trial_state": state, "epochs": str(len(epochs))}
    tags |= {"device": jax.devices()[0].device_kind} | ({"reason": reason} if reason else {})
    run = client.create_run(experiment, tags=tags | extra).info.run_id
    about = provenance.collect(config, 1) | (about or {})
    client.log_text(run, yaml.safe_dump(options), "config.yaml")
    client.log_text(run, json.dumps(about), "provenance.json")
    for number, values in enumerate(epochs, 1):
        logged = (values | {"compilations": 3.0}).items()
        client.log_batch(run, [Metric(name, value, 0, number) for name, value in logged])
    return run

def one_ulp(epochs):
    name = "valid_loss"
    epochs[1][name] = float(np.nextafter(epochs[1][name], 1))

def other_names(epochs):
    for values in epochs:
        values["score"] = values.pop("valid_accuracy")

def replayed(run):
    out, errors, before = io.StringIO(), io.StringIO(), dict(os.environ)
    with redirect_stdout(out), redirect_stderr(errors):
        code = replay.main([run, f"tracking.uri=sqlite:///{folder}/mlflow.db"])
    assert dict(os.environ) == before
    return code, out.getvalue().splitlines(), errors.getvalue()

broken = ["optimizer.learning_rate=1e30"]
trials = {
    "complete": write(),
    "two seeds": write(seeds=(5, 17), alter=other_names, about={"python": "3.10.1"}),
    "failed": write(more=broken, state="failed"),
    "other reason": write(more=broken, state="failed", reason="Diverged: otherwise"),
    "one ulp": write(alter=one_ulp),
}
others = {
    "interrupted": write(state="killed"),
    "study": client.create_run(experiment, tags={"study": "tiny"}).info.run_id,
    "no artifacts": client.create_run(experiment, tags={
        "study": "tiny", "trial": "3", "rule": "bp", "seeds": "5", "trial_state": "complete",
        "epochs": "2", "device": "cpu",
    }).info.run_id,
}
replays = {name: replayed(run) for name, run in trials.items()}
print(json.dumps({"runs": trials | others, "replays": replays}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


def process(*arguments, folder, **variables):
    """Python in another folder."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"},
        **variables,
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def written(folder, mlflow_template):
    """(ids of runs, what came of their replays), by their names."""
    shutil.copyfile(mlflow_template, folder / "mlflow.db")
    # The environment of a worker, which is what replays need.
    worker = {"PJRT_NPROC": "1", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    done = process("-c", CHILD, str(folder), *OPTIONS, folder=folder, **worker)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    return last["runs"], last["replays"]


@pytest.fixture(scope="module")
def runs(written):
    return written[0]


@pytest.fixture(scope="module")
def replayed(written):
    """`replayed(name)`: (exit code, lines of stdout, stderr)."""
    # Someone may be at work on the code while this runs.
    edited = re.compile(r"warning: \S+ (changed|is new|is gone)")

    def run(name):
        code, lines, errors = written[1][name]
        return code, [line for line in lines if not edited.fullmatch(line)], errors

    return run


def test_a_complete_trial_comes_out_the_same(replayed):
    code, lines, errors = replayed("complete")
    assert lines[0] == "study tiny, trial 3: bp, complete, 2 epochs, seed 5"
    assert len(lines) == 2, lines
    assert lines[1].startswith("the same: 2 epochs, ") and lines[1].endswith(", bit-equal")
    assert int(lines[1].split()[4]) >= 8  # metrics
    assert (code, errors) == (0, "")


def test_lanes_come_out_the_same_and_what_cannot_be_compared_is_said(replayed):
    code, lines, _ = replayed("two seeds")
    python = ".".join(map(str, sys.version_info[:2]))
    assert lines[:-1] == [
        "study tiny, trial 3: bp, complete, 2 epochs, seeds 5, 17",
        f"warning: python 3.10, now {python}",
        "warning: not compared, as training reports no such metric: score",
        "warning: not compared, as the run has no such metric: valid_accuracy",
    ]
    assert code == 0 and lines[-1].startswith("the same: 2 epochs, ")


def test_a_failed_trial_fails_again_for_the_same_reason(replayed):
    code, lines, _ = replayed("failed")
    assert lines[0] == "study tiny, trial 3: bp, failed, 0 epochs, seed 5"
    assert code == 0 and lines[-1].startswith("the same: 0 epochs, then Diverged: "), lines


def test_a_failure_for_another_reason_is_a_difference(replayed):
    code, lines, _ = replayed("other reason")
    assert code == 1
    assert lines[-1].startswith(
        "different: then it failed (Diverged: otherwise), now it failed (Diverged: "
    )


def test_one_last_bit_of_one_value_is_seen(replayed):
    code, lines, _ = replayed("one ulp")
    assert code == 1
    assert lines[1].startswith("different: 1 value, by ")
    assert float(lines[1].split()[4]) < 1e-15
    epoch, name, then, now = lines[3].split()
    assert (epoch, name) == ("2", "valid_loss")
    assert float(then) == math.nextafter(float(now), 1)


def test_a_run_that_is_not_there_is_refused_in_one_line(runs, folder):
    unknown = "0123456789abcdef"
    with pytest.raises(InputError, match=f"{unknown}: no such run in sqlite:///") as refusal:
        replay.main([unknown, f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"])
    assert "\n" not in str(refusal.value)


def test_the_real_command_replays_likewise(replayed, runs, folder):
    """With an environment that it sets itself."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    done = process(
        *("-m", "analysis.replay", runs["complete"], f"tracking.uri={uri}"), folder=folder
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == replayed("complete")[1][-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("study", r"not a trial of a study, or not ended \(it has no tag trial\)"),
        ("interrupted", "is killed, needed is one of complete, pruned, failed"),
        ("no artifacts", "cannot read its artifacts"),
    ],
)
def test_a_run_that_is_no_trial_is_refused_in_one_line(name, message, runs, folder):
    with pytest.raises(replay.Refused, match=f"{runs[name]}: .*{message}") as refusal:
        replay.read(runs[name], f"sqlite:///{folder / 'mlflow.db'}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["missing", "no database", "another database", "files"])
def test_a_store_that_cannot_be_read_is_refused_and_left_alone(kind, tmp_path):
    file = tmp_path / "some.db"
    if kind == "no database":
        file.write_text("text\n" * 1000)
    if kind == "another database":
        sqlite3.connect(file).execute("CREATE TABLE other (id)").connection.close()
    before = file.read_bytes() if file.exists() else None
    uri = str(tmp_path / "mlruns") if kind == "files" else f"sqlite:///{file}"
    with pytest.raises(replay.Refused, match=r"tracking\.uri: cannot read") as refusal:
        replay.read("0", uri)
    assert "\n" not in str(refusal.value)
    assert (file.read_bytes() if file.exists() else None) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run: missing, needed is the id of a trial's MLflow run"),
        (["a", "b"], "given a b, allowed is name=value and one run"),
        (["--halp"], "halp: unknown option; options of analysis.replay: run, tracking.uri"),
        (["a", "uri=x"], "uri: unknown option"),
        (["a"], r"tracking\.uri: missing"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=message):
        replay.main(arguments)


def test_the_store_is_the_one_given_else_the_environments_else_the_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("out").mkdir()
    Path("out/mlflow.db").touch()

    def address(*arguments):
        options = replay.COMMAND.parse(arguments)
        assert options["run"] == "a"
        return stores.address(options["tracking.uri"])

    assert address("a") == f"sqlite:///{Path.cwd()}/out/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert address("run=a") == "http://host"
    assert address("tracking.uri=http://x?a=b", "a") == "http://x?a=b"


def test_jax_is_not_there_before_the_environment_is_set(folder):
    done = process("-c", "import sys, analysis.replay; print('jax' in sys.modules)", folder=folder)
    assert done.stdout == "False\n", done.stderr


def test_every_value_is_compared_but_the_machines():
    then = {(1, "a"): 1.0, (2, "a"): math.nan, (1, "b"): 0.0, (1, "compilations"): 3.0}
    now = {(1, "a"): 1.0, (2, "a"): math.nan, (3, "a"): 2.0, (1, "epoch_seconds"): 1.0}
    assert replay.compare(then, now) == replay.Comparison(
        names=["a"], differing=[(3, "a", None, 2.0)], only_then=["b"], only_now=[]
    )
