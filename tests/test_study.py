"""Studies, with the real Ray, Optuna and MLflow: one small study looked at from many sides, another
that starts from it, and what a study refuses."""

import hashlib
import io
import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import mlflow
import numpy as np
import optuna
import pytest
import requests
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune
from rich.console import Console

from disinhib import cli, config, training
from disinhib.checks import flatten
from disinhib.errors import ConfigError
from disinhib.tuning import (
    manifest as origins,
    options,
    progress,
    provenance,
    ray_backend,
    retention,
    space_tree,
    study,
    suggest,
)
from disinhib.tuning.event_log import COMPLETE, FAILED, KILLED, PRUNED, RUNNING, Journal, Record
from disinhib.tuning.worker import OVER_CAP, TrainingTrial, checkpoint_file, environment
from search_spaces import SPACES

pytestmark = pytest.mark.usefixtures("copied_stores")

ROOT = Path(__file__).parent.parent
RULES = {"bp": "non-dale", "exact-inv": "dale", "lin-thresh": "dale"}
TRIALS, PRUNED_TRIAL, DIVERGED_TRIAL, RAISED_TRIAL = 7, 4, 5, 6
STATES = [*[COMPLETE] * 4, PRUNED, FAILED, FAILED]
EPOCHS = [2, 2, 2, 2, 1, 0, 0]
TINY = ("experiment=smoke", "space=tiny", f"trials={TRIALS}", "cluster.max_concurrent=1")


def tiny(trial):
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


class Witness(tune.Callback):
    """Keeps every result."""

    def __init__(self):
        self.results = {}

    def on_trial_result(self, *, trial, result, **_):
        self.results.setdefault(trial.config["number"], []).append(result)


@pytest.fixture(scope="module", autouse=True)
def tiny_space():
    """The space, and the source as it is now: somebody may edit it while the tests run."""
    source = provenance.code(provenance.ROOT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPACES, "tiny", tiny)
        patch.setattr(provenance, "code", lambda _: deepcopy(source))
        yield


@pytest.fixture(scope="module")
def programs():
    """Environment of processes that compile in half the time, to programs that run slower."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture(scope="module")
def tries(tmp_path_factory):
    """A file with a line for each time that the trial that raises was begun."""
    return tmp_path_factory.mktemp("tries") / "tries"


@pytest.fixture(scope="module")
def finished(programs, tries, tmp_path_factory):
    """A finished study of seven trials, what a witness of it saw, and what it printed."""

    class Planted(TrainingTrial):  # here, so that it goes to Ray's workers by value
        def _epoch(self):
            if self._trial["number"] == RAISED_TRIAL:
                with tries.open("a") as file:
                    file.write("begun\n")
                raise RuntimeError("planted\nand more of it")
            return super()._epoch()

    printed, witness = io.StringIO(), Witness()
    console = Console(file=printed, width=120)
    asked = options.compose([*TINY, f"out_dir={tmp_path_factory.mktemp('study')}"])
    done = study.run(asked, console, Planted, [witness])
    study.summary(done, console)
    return done, witness, printed.getvalue()


def runs_of(done):
    """MLflow's client, and its runs of the trials, by number."""
    client = mlflow.MlflowClient(tracking_uri=done.tracking_uri)
    found = client.search_runs(
        [client.get_run(done.run_id).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{done.run_id}'",
    )
    assert client.get_run(done.run_id).info.status == "FINISHED"
    runs = {int(run.data.tags["trial"]): run for run in found}
    assert len(runs) == len(found)
    return client, runs


@pytest.fixture(scope="module")
def runs(finished):
    return runs_of(finished[0])


def load(done):
    """The study as anyone opens it in Optuna."""
    storage = JournalStorage(JournalFileBackend(str(done.study.folder / "optuna.log")))
    return optuna.load_study(study_name=done.study.name, storage=storage)


def ray_trials(done):
    """Ray's own trials, by number."""
    trials = tune.ExperimentAnalysis(str(done.study.folder / "ray")).trials or []
    assert len({trial.config["number"] for trial in trials}) == len(trials)
    return {trial.config["number"]: trial for trial in trials}


def ray_state(trial):
    if trial.status == "ERROR":
        return FAILED
    assert trial.status == "TERMINATED"
    whole = trial.last_result["training_iteration"] == trial.config["epochs"]
    return COMPLETE if whole else PRUNED


OPTUNA = {"COMPLETE": COMPLETE, "PRUNED": PRUNED, "FAIL": FAILED}


def test_states_agree_in_ray_optuna_and_mlflow(finished, runs):
    """One that diverged, one that raised, one that ASHA stopped, and complete ones."""
    done, _, _ = finished
    assert [record.number for record in done.records] == list(range(TRIALS))
    assert [record.state for record in done.records] == STATES
    in_ray = ray_trials(done)
    assert [ray_state(in_ray[n]) for n in range(TRIALS)] == STATES
    assert [OPTUNA[trial.state.name] for trial in load(done).trials] == STATES
    assert [runs[1][n].data.tags["trial_state"] for n in range(TRIALS)] == STATES
    statuses = [runs[1][n].info.status for n in range(TRIALS)]
    assert statuses == ["FINISHED"] * 5 + ["FAILED"] * 2
    assert done.undelivered == {}


def test_optuna_opens_the_store_and_counts_match(finished):
    done, _, _ = finished
    loaded = load(done)
    counts = Counter(OPTUNA[trial.state.name] for trial in loaded.trials)
    tally = progress.tally(done.records)
    assert counts == {COMPLETE: tally.complete, PRUNED: tally.pruned, FAILED: tally.failed}
    best = progress.best(done.records, "max")
    assert best and loaded.best_trial.number == best.number
    assert loaded.best_value == best.score
    assert loaded.best_trial.user_attrs["command"] == best.config["command"]


def test_optuna_dashboard_shows_the_store(finished, tmp_path):
    pytest.importorskip("optuna_dashboard")
    done, _, _ = finished
    shutil.copy(done.study.folder / "optuna.log", tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    command = [Path(sys.executable).parent / "optuna-dashboard", tmp_path / "optuna.log"]
    with subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", port, "--server", "wsgiref"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as dashboard:  # fmt: skip
        try:
            (summary,) = answer(f"http://127.0.0.1:{port}/api/studies", dashboard)[
                "study_summaries"
            ]
            assert summary["study_name"] == done.study.name
            address = f"http://127.0.0.1:{port}/api/studies/{summary['study_id']}"
            shown = Counter(trial["state"] for trial in answer(address, dashboard)["trials"])
        finally:
            dashboard.terminate()
    tally = progress.tally(done.records)
    assert shown == {"Complete": tally.complete, "Pruned": tally.pruned, "Fail": tally.failed}


def answer(address, server):
    """What `server` says at `address`, as soon as it answers."""
    while server.poll() is None:
        try:
            response = requests.get(address, timeout=60)
        except requests.ConnectionError:
            time.sleep(0.1)
            continue
        response.raise_for_status()
        return response.json()
    raise AssertionError(f"it ended with {server.returncode}")


def test_every_rule_gets_as_many_trials(finished):
    done, _, _ = finished
    assert [record.rule for record in done.records] == [*RULES, *RULES, "bp"]


def test_the_published_defaults_of_each_rule_come_first(finished, runs):
    done, _, _ = finished
    for number, rule in enumerate(RULES):
        searched = done.records[number].config["searched"]
        assert searched["optimizer.learning_rate"] == 1e-3
        if RULES[rule] == "dale":
            assert searched["model.vf.g_EI"] == 1.0
        assert float(runs[1][number].data.params["optimizer.learning_rate"]) == 1e-3
        assert load(done).trials[number].params["trainer"] == rule
    later = [record.config["searched"]["optimizer.learning_rate"] for record in done.records[3:]]
    assert 1e-3 not in later


def test_what_was_searched_is_logged_flat_and_dotted(finished, runs):
    done, _, _ = finished
    for number, run in runs[1].items():
        trained = run.data.params
        assert trained["trainer"] == done.records[number].rule
        assert trained["model.vf"] == RULES[done.records[number].rule]
        assert trained.keys() == {
            "trainer", "model.vf", "optimizer.learning_rate",
            *(["model.vf.g_EI"] if trained["model.vf"] == "dale" else []),
        }  # fmt: skip


def test_epochs_are_steps_and_the_same_in_all_three(finished, runs):
    done, witness, _ = finished
    client, children = runs
    in_ray, in_optuna = ray_trials(done), load(done).trials
    for number, run in children.items():
        seen = [r["metrics"]["valid_accuracy"] for r in witness.results.get(number, [])]
        assert len(seen) == EPOCHS[number]
        assert done.records[number].scores == seen
        history = client.get_metric_history(run.info.run_id, "valid_accuracy")
        assert [(m.step, m.value) for m in history] == list(enumerate(seen, start=1))
        assert in_optuna[number].intermediate_values == dict(enumerate(seen, start=1))
        assert int(run.data.tags["epochs"]) == len(seen)
        assert in_ray[number].last_result.get("score") == (seen[-1] if seen else None)


def test_the_metrics_are_those_of_training_under_the_published_names(finished, runs):
    names = set(runs[1][0].data.metrics)
    assert names >= {
        "train_CL_loss", "train_CL_accuracy", "train_CL_avg_solver_steps", "train_CL_residual",
        "train_CL_converged_share", "train_CL_weight_norm", "valid_loss", "valid_accuracy",
        "epoch_seconds", "compilations", "peak_memory_mb",
    }  # fmt: skip


def test_a_failed_trial_says_why_and_does_not_compete(finished, runs):
    done, _, printed = finished
    reasons = {n: runs[1][n].data.tags["reason"] for n in (DIVERGED_TRIAL, RAISED_TRIAL)}
    assert reasons[DIVERGED_TRIAL].startswith("Diverged: ")
    assert "epoch 1" in reasons[DIVERGED_TRIAL]
    assert reasons[RAISED_TRIAL] == "RuntimeError: planted"
    for number, reason in reasons.items():
        assert done.records[number].reason == reason
        assert load(done).trials[number].user_attrs["reason"] == reason
        assert f"trial {number} failed: {reason}" in printed
    assert "reason" not in runs[1][0].data.tags
    competing = {s.rule: s.best.number for s in progress.standings(done.records, "max") if s.best}
    assert competing["lin-thresh"] == 2
    assert competing["exact-inv"] == 1
    assert competing["bp"] in (0, 3)


def test_a_trial_that_raises_is_not_tried_again(finished, tries):
    assert tries.read_text() == "begun\n"


def test_the_second_trial_of_a_structure_compiles_nothing(finished):
    _, witness, _ = finished
    counts = {n: [r["metrics"]["compilations"] for r in witness.results[n]] for n in range(4)}
    assert counts[0][0] > 0 and counts[1][0] > 0
    assert counts[3] == [0, 0]  # bp, as trial 0, in the same worker
    assert witness.results[3][0]["pid"] == witness.results[0][0]["pid"]
    assert witness.results[PRUNED_TRIAL][0]["metrics"]["compilations"] == 0  # exact-inv, as 1


def test_the_pools_of_a_worker_are_of_its_share_of_the_cores():
    shared = environment(cpus=1, gpus=0)
    assert shared["PJRT_NPROC"] == "1" and shared["JAX_PLATFORMS"] == "cpu"
    assert "JAX_PLATFORMS" not in environment(cpus=2, gpus=0.5)


CORES = """
import os, time
os.sched_setaffinity(0, range(os.cpu_count()))
import jax, jax.numpy as jnp
product = jax.jit(lambda a: jax.lax.fori_loop(0, 40, lambda _, b: jnp.tanh(b @ a), a))
a = jnp.ones((1024, 1024)) / 1024
product(a).block_until_ready()
wall, cpu = time.perf_counter(), time.process_time()
product(a).block_until_ready()
print((time.process_time() - cpu) / (time.perf_counter() - wall))
"""


def test_xla_keeps_to_that_share():
    measured = subprocess.run(
        [sys.executable, "-c", CORES], env=os.environ | environment(cpus=1, gpus=0),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(measured.stdout) < 1.2


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_command_of_a_trial_repeats_it(finished, runs, number, tmp_path):
    _, witness, _ = finished
    command = shlex.split(runs[1][number].data.tags["command"])
    assert command[:3] == ["python", "-m", "disinhib"]
    again = subprocess.run(
        [sys.executable, *command[1:], f"out_dir={tmp_path}"],
        cwd=ROOT, env=os.environ | environment(cpus=1, gpus=0), capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    (results,) = tmp_path.rglob("results.json")
    accuracies = json.loads(results.read_text())["valid_accuracy"]
    assert accuracies == [r["metrics"]["valid_accuracy"] for r in witness.results[number]]


def test_what_runs_a_trial_again_is_kept_with_it(finished, runs, tmp_path):
    done, _, _ = finished
    client, children = runs
    client.download_artifacts(children[1].info.run_id, "", str(tmp_path))
    command = (tmp_path / "command.txt").read_text().strip()
    assert command == children[1].data.tags["command"]
    kept = config.parse(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert kept.architecture.rule == "exact-inv"
    assert [kept.seed] == suggest.trial_seeds(0, 1)
    made = json.loads((tmp_path / "provenance.json").read_text())
    assert made["data"]["sha256"] == children[1].data.tags["data_sha256"]
    assert made == json.loads((done.study.folder / "origin.json").read_text())["provenance"]
    space = json.loads((tmp_path / "space.json").read_text())
    assert space_tree.differences(space, space_tree.definition(tiny)) == []
    assert children[1].data.tags["space_sha256"] == space_tree.fingerprint(space)


def test_the_summary_comes_last_and_says_how_to_go_on(finished):
    done, _, printed = finished
    last = printed.strip().splitlines()
    assert f"{done.study.name}: 7 trials in" in printed
    assert "4 complete, 1 pruned, 2 failed" in printed
    assert f"mlflow ui --backend-store-uri {done.tracking_uri} " in last[-2]
    best = progress.best(done.records, "max")
    assert best and last[-1].endswith(best.config["command"].removeprefix("python "))
    table = printed[printed.index("best valid_accuracy") :].splitlines()[1:4]
    ranked = [s.rule for s in progress.standings(done.records, "max")]
    assert [line.split()[0] for line in table] == ranked
    assert "bp: 1 of 3 failed (1 x RuntimeError: planted)" in printed
    assert "lin-thresh: 1 of 2 failed (1 x Diverged: " in printed
    assert "mostly at high optimizer.learning_rate: 1e+30 to 1e+30 (the others 0.001" in printed


def test_the_folder_of_a_study_has_its_options(finished):
    done, _, _ = finished
    kept = yaml.safe_load((done.study.folder / "study.yaml").read_text())
    assert kept["options"]["space"] == "tiny" and kept["options"]["trials"] == TRIALS
    assert set(TINY) <= set(kept["overrides"])


def test_the_final_states_of_each_rules_best_are_kept(finished):
    done, _, _ = finished
    best = [s.best.number for s in progress.standings(done.records, "max") if s.best]
    files = {file.name for file in (done.study.folder / "checkpoints").rglob("*.msgpack")}
    assert len(best) == 3
    assert files == {f"{number:04d}.msgpack" for number in best}


# Another study that starts from it.

POISONED_TRIAL = 2
POINT = {"trainer": "bp", "optimizer.learning_rate": 0.015}


@pytest.fixture(scope="module")
def extended(finished, tmp_path_factory):
    """A study of four trials with two seeds each that extends the first; in trial 2 the second
    seed's weights are no numbers."""

    class Poisoned(TrainingTrial):
        def _begin(self):
            super()._begin()
            if self._trial["number"] == POISONED_TRIAL:
                weights = dict(self._state.parameters)
                weights["kernel_out"] = weights["kernel_out"].at[1].set(math.nan)
                self._state = self._state._replace(parameters=weights)

    done, _, _ = finished
    points = tmp_path_factory.mktemp("points") / "points.yaml"
    points.write_text(yaml.safe_dump([POINT]))
    asked = options.compose(
        [
            *(f"study={done.study.name}", f"out_dir={done.study.out_dir}", "extend=true"),
            *("trials=4", "replicates=2", f"points={points}"),
        ]
    )
    return study.run(asked, Console(file=io.StringIO()), Poisoned)


def test_a_study_that_extends_another_is_a_new_one_with_its_options(finished, extended):
    first = finished[0].study
    assert extended.study.name == f"{first.name}-2"
    assert extended.study.folder.parent == first.folder.parent
    flat, before = flatten(extended.study.options), flatten(first.options)
    assert {name for name in flat if flat[name] != before[name]} == {
        *("study", "warm_start", "trials", "replicates", "points", "seed")
    }
    assert extended.study.seed == first.seed + 1  # or it would propose the same trials again
    assert [record.state for record in finished[0].records] == STATES
    with closing(Journal(first.folder)) as journal:  # which it left alone
        assert len({event.trial for event in journal.events()}) == TRIALS


def test_it_learns_from_the_trials_of_the_other(finished, extended):
    origin = json.loads((extended.study.folder / "origin.json").read_text())
    learnt = [(trial["rule"], trial["state"], trial["scores"]) for trial in origin["past"]]
    usable = [record for record in finished[0].records if record.state != FAILED]
    assert learnt == [(record.rule, record.state, record.scores) for record in usable]
    guessers = origins.searcher(extended.study, origin).guessers
    assert [[t.state.name for t in guesser.trials] for guesser in guessers] == [
        ["COMPLETE", "COMPLETE"], ["COMPLETE", "PRUNED"], ["COMPLETE"],
    ]  # fmt: skip


def test_given_points_come_right_after_the_published_defaults(extended):
    rates = [r.config["searched"]["optimizer.learning_rate"] for r in extended.records]
    assert rates == [1e-3, 1e-3, 1e-3, POINT["optimizer.learning_rate"]]
    assert [record.rule for record in extended.records] == [*RULES, "bp"]


def test_replicates_are_trained_together_and_scored_by_their_mean(extended):
    client, runs = runs_of(extended)
    for number, run in runs.items():
        assert run.data.tags["seeds"] == ",".join(map(str, suggest.trial_seeds(1, number, 2)))
    assert len({seed for run in runs.values() for seed in run.data.tags["seeds"].split(",")}) == 8
    for number in (0, 1, 3):
        metrics = runs[number].data.metrics
        assert metrics["valid_accuracy"] == extended.records[number].score
        for name in ("valid_accuracy", "valid_loss", "train_CL_loss"):
            assert metrics[f"{name}_sd"] > 0
        history = client.get_metric_history(runs[number].info.run_id, "valid_loss_sd")
        epochs = extended.records[number].epochs
        assert [m.step for m in history] == list(range(1, epochs + 1))
    words = shlex.split(runs[0].data.tags["command"])
    assert f"seed={runs[0].data.tags['seeds']}" in words and "-m" in words[3:]


def test_a_seed_that_diverges_fails_its_trial(extended):
    failed = extended.records[POISONED_TRIAL]
    assert (failed.state, failed.epochs) == (FAILED, 0)
    bad = suggest.trial_seeds(1, POISONED_TRIAL, 2)[1]
    assert (failed.reason or "").startswith("Diverged: ")
    assert f"(seed {bad})" in (failed.reason or "")
    others = [record.state for record in extended.records if record is not failed]
    assert set(others) <= {COMPLETE, PRUNED}
    assert [OPTUNA[trial.state.name] for trial in load(extended).trials] == [
        record.state for record in extended.records
    ]


# Refusals. One line that names option, given and allowed; nothing written.


@pytest.fixture
def refuse(monkeypatch, capsys):
    """`refuse(*overrides)` gives the line with which `tune_main.py` refuses them."""

    def refused(*overrides):
        monkeypatch.setattr(sys, "argv", ["tune_main.py", *overrides])
        with pytest.raises(SystemExit) as exit:
            cli.run(study.main)
        assert exit.value.code == 2
        said = capsys.readouterr()
        (line,) = said.err.strip().splitlines()
        assert line.startswith("error: ")
        assert said.out == ""
        return line

    return refused


REFUSED = {
    "space=rulez": ["space: given rulez", "rules, bp", "did you mean rules?"],
    "trials=0": ["trials: given 0", "at least 1"],
    "trials=2.5": ["trials: given 2.5", "whole number"],
    "trails=5": ["trails: unknown option", "did you mean trials?"],
    "+searcher.seed=5": ["searcher.seed: unknown option"],
    "scheduler=ahsa": ["scheduler: given ahsa", "asha"],
    "searcher.n_startup=3": ["searcher.n_startup: unknown option", "n_startup_trials"],
    "scheduler.grace_period=99": ["scheduler.grace_period: given 99", "1 to epochs"],
    "metric=test_accuracy": ["metric: given test_accuracy", "valid_accuracy"],
    "mode=maximum": ["mode: given maximum", "one of max, min"],
    "seed=null": ["seed: given null", "whole number"],
    "batchsize=100000": ["batchsize: given 100000", "1150"],
    "epochs=-1": ["epochs: given -1", "at least 1"],
    "replicates=0": ["replicates: given 0", "at least 1"],
    "device=gpu": ["device: given gpu", "cluster.gpus_per_trial"],
    "resume=out": ["resume: given out", "true or false"],
    "resume=true": ["resume: given true", "false without the name of a study (study=NAME)"],
    "extend=true": ["extend: given true", "false without the name of a study (study=NAME)"],
    "scheduler.reduction_factor=1": ["scheduler.reduction_factor: given 1", "above 1"],
    "searcher.multivariate=false": ["searcher.group: given true", "searcher.multivariate"],
    "study=a/b": ["study: given a/b", "a folder's name"],
    "cluster.cpus_per_trial=0.5": ["cluster.cpus_per_trial: given 0.5", "whole number"],
    "metric=valid_loss": ["mode: given max", "min for metric=valid_loss"],
    "test_at_end=true": ["test_at_end: given true", "must not see the test set"],
    "space=[bp,rules]": ["space: given ['bp', 'rules']", "one of rules, bp"],
    "study=2024": ["study: given 2024", "a folder's name"],
    "tracking.uri=": ["tracking.uri: given ", "a text or null"],
    "cluster.address=127.0.0.1:1": ["cluster.address: given 127.0.0.1:1", "running Ray cluster"],
    "cluster.max_concurrent=0": ["cluster.max_concurrent: given 0", "at least 1"],
    "optimizer.learning_rate=0.1": ["optimizer.learning_rate: given 0.1", "searches it"],
    "dataset.path=nowhere": ["dataset.path", "nowhere"],
    "cluster.cpus_per_trial=4096": ["cluster.cpus_per_trial: given 4096", "at most"],
    "tracking.uri=http://127.0.0.1:9": ["tracking.uri: given http://127.0.0.1:9", "answers"],
    "out_dir=/dev/null/out": ["out_dir: given /dev/null/out", "folder that can be written"],
    "warm_start=nothing": ["warm_start: given nothing", "the name of a study in "],
    "points=nowhere.yaml": ["points: given nowhere.yaml", "No such file"],
    "checkpoints.keep_best=-1": ["checkpoints.keep_best: given -1", "at least 0"],
    "checkpoints.cap_gb=0": ["checkpoints.cap_gb: given 0", "above 0"],
    "searcher.storage=nosuch://x": ["searcher.storage: given nosuch://x", "null, or the URL"],
}


@pytest.mark.parametrize("override", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(override, tmp_path, monkeypatch, refuse):
    out_dir = [] if override.startswith("out_dir") else [f"out_dir={tmp_path / 'out'}"]
    monkeypatch.chdir(tmp_path)
    line = refuse(*out_dir, override)
    for part in REFUSED[override]:
        assert part in line
    assert not list(tmp_path.iterdir())


TOGETHER = {
    ("study=x", "resume=true", "extend=true"): ["extend: given true", "false with resume=true"],
    ("study=x", "resume=true"): ["study: given x", "none: there is no study"],
    ("study=x", "extend=true"): ["study: given x", "none: there is no study"],
    ("searcher=grid", "space=bp"): ["trials: given 60", "at most 3, the whole grid"],
    ("searcher=gp", "searcher.batch=0"): ["searcher.batch: given 0", "at least 1"],
}


@pytest.mark.parametrize("overrides", TOGETHER)
def test_what_does_not_go_together_likewise(overrides, tmp_path, monkeypatch, refuse):
    monkeypatch.chdir(tmp_path)
    line = refuse(f"out_dir={tmp_path / 'out'}", *overrides)
    for part in TOGETHER[overrides]:
        assert part in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("searcher", "package"), [("gp", "torch"), ("cmaes", "cmaes")])
def test_a_searcher_whose_package_is_missing_is_refused(
    searcher, package, tmp_path, monkeypatch, refuse
):
    without = lambda name, *rest: None if name == package else find_spec(name, *rest)
    monkeypatch.setattr("importlib.util.find_spec", without)
    line = refuse(f"searcher={searcher}", f"out_dir={tmp_path / 'out'}")
    assert line.startswith(f"error: searcher: given {searcher}, allowed is another without the")
    assert line.endswith(package)
    assert not list(tmp_path.iterdir())


POINTS = {
    "- {trainer: bp, optimizer.learning_rat: 0.01}": ["point 1", "optimizer.learning_rat"],
    "- {trainer: bp, optimizer.learning_rate: 7}": ["point 1", "optimizer.learning_rate: given 7"],
    "- {optimizer.learning_rate: 0.01}": ["point 1", "trainer: missing"],
    "trainer: bp": ["not a list of points"],
}


@pytest.mark.parametrize("text", POINTS)
def test_a_point_that_is_not_in_the_space_is_refused(text, tmp_path, refuse):
    points = tmp_path / "points.yaml"
    points.write_text(text)
    line = refuse(*TINY, f"out_dir={tmp_path / 'out'}", f"points={points}")
    for part in POINTS[text]:
        assert part in line
    assert list(tmp_path.iterdir()) == [points]


def test_the_real_command_refuses_likewise(tmp_path):
    refused = subprocess.run(
        [sys.executable, str(ROOT / "tune_main.py"), "trails=5"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    expected = (2, "", "error: trails: unknown option; did you mean trials?\n")
    assert (refused.returncode, refused.stdout, refused.stderr) == expected
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_taken_is_refused_and_a_default_one_is_numbered(tmp_path):
    (tmp_path / "bp-digits").mkdir()
    with pytest.raises(ConfigError, match=r"study: given bp-digits, .* or resume=true"):
        options.compose(["study=bp-digits", f"out_dir={tmp_path}"])
    assert options.compose(["space=bp", f"out_dir={tmp_path}"]).name == "bp-digits-2"


@pytest.fixture
def go_on(finished, refuse):
    """`go_on(*overrides)` gives the line with which resuming the finished study is refused, and
    sees that nothing was written."""
    done, _, _ = finished
    again = (f"study={done.study.name}", f"out_dir={done.study.out_dir}", "resume=true")

    def refused(*overrides):
        before = contents(done.study.out_dir)
        line = refuse(*again, *overrides)
        assert contents(done.study.out_dir) == before
        return line

    return refused


def contents(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_an_unknown_study_is_refused_with_those_that_there_are(finished, refuse):
    done, _, _ = finished
    line = refuse("study=tinny", f"out_dir={done.study.out_dir}", "resume=true")
    assert "study: given tinny, allowed is one of " in line
    assert done.study.name in line


def test_a_study_is_not_resumed_with_other_options(go_on):
    line = go_on("trials=9", "optimizer.b1=0.5", "scheduler=median")
    assert "trials=7 (now 9)" in line
    assert "optimizer.b1=0.9 (now 0.5)" in line
    assert "scheduler.name=asha (now median)" in line
    assert "epochs" not in line
    assert line.endswith("study=tiny-digits extend=true")


def test_a_study_is_not_resumed_with_another_search_space(go_on, monkeypatch):
    def wider(trial):
        gain = trial.suggest_float("bp.weight_scale", 0.5, 2.0)
        return {**tiny(trial), "weight_scale": gain}

    def other(trial):
        return {**tiny(trial), "optimizer.b1": 0.5}

    def faster(trial):
        rate = trial.suggest_float("bp.optimizer.learning_rate", 1e-3, 5e-2, log=True)
        return {"model/vf": "non-dale", "trainer": "bp", "optimizer.learning_rate": rate}

    monkeypatch.setitem(SPACES, "tiny", other)
    assert "optimizer.b1: not set, now 0.5" in go_on()
    monkeypatch.setitem(SPACES, "tiny", faster)
    line = go_on()
    assert "bp.optimizer.learning_rate: 0.001 to 0.02 (log), now 0.001 to 0.05 (log)" in line
    assert "trainer: one of bp, exact-inv, lin-thresh, now not searched" in line
    assert line.endswith("study=tiny-digits extend=true")


def test_a_study_is_not_resumed_with_other_code(go_on, monkeypatch):
    real = provenance.code

    def changed(root):
        made = real(root)
        files = {**made["files"], "disinhib/feedback.py": "0", "disinhib/new.py": "0"}
        del files["disinhib/losses.py"]
        return {**made, "files": files}

    monkeypatch.setattr(provenance, "code", changed)
    line = go_on()
    assert "disinhib/feedback.py changed" in line
    assert "disinhib/new.py is new" in line
    assert "disinhib/losses.py is gone" in line


def test_a_study_is_not_resumed_while_another_process_runs_it(finished, go_on):
    done, _, _ = finished
    hold = (
        "import sys; from pathlib import Path; from disinhib.tuning.event_log import Journal;"
        "journal = Journal(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, done.study.folder],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout and other.stdout.readline() == b"open\n"
        line = go_on()
        other.communicate()
    assert f"study: {done.study.folder} is open in another process" in line


def test_what_it_learns_from_must_be_comparable(finished, refuse):
    done, _, _ = finished
    line = refuse(
        *TINY, "metric=valid_loss", "mode=min", f"out_dir={done.study.out_dir}",
        f"warm_start={done.study.name}",
    )  # fmt: skip
    assert f"warm_start: {done.study.name} had metric=valid_accuracy, and this study has" in line


# Exit codes.


def ended(study_options, *records):
    whole = all(one.state != KILLED for one in records)
    return study.Finished(study_options, list(records), "sqlite:////m.db", "run", 1.0, {}, whole)


def test_the_exit_code_says_how_a_study_ended(tmp_path, monkeypatch, capsys):
    asked = [f"out_dir={tmp_path}"]
    endings = {
        0: lambda s, _: ended(s, record(0), record(1, state=FAILED, reason="E: x")),
        1: lambda s, _: ended(s, record(0, state=PRUNED)),
        130: lambda s, _: ended(s, record(0), record(1, state=KILLED)),
    }
    for code, run in endings.items():
        monkeypatch.setattr(study, "run", run)
        assert study.main(asked) == code
        said = capsys.readouterr().out
        assert ("resume=true" in said) == (code == 130)


def test_a_study_that_cannot_go_on_says_how_to_when_it_can(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise ray_backend.StudyStopped("no space left: /disk")

    monkeypatch.setattr(study, "run", full)
    assert study.main([f"out_dir={tmp_path}", "study=mine"]) == 1
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert line.startswith("error: no space left: /disk: make room, then resume: ")
    assert line.endswith(f"tune_main.py study=mine out_dir={tmp_path} resume=true")


def test_records_that_a_store_did_not_take_are_named(tmp_path):
    printed = io.StringIO()
    asked = options.compose([f"out_dir={tmp_path}", "study=mine"])
    done = study.Finished(asked, [record(0)], "http://server:5000", None, 1.0, {"mlflow": 3}, True)
    study.summary(done, Console(file=printed, width=120))
    assert "mlflow lacks 3 records: resume the study" in printed.getvalue()
    assert f"study=mine out_dir={tmp_path} resume=true" in printed.getvalue()


# Pieces.


POLICY = {"every_seconds": 0.0, "at_end": True, "cap_bytes": 1e9}


def branch_of(space, folder, *overrides, **policy):
    """A worker's configuration of the space's second branch: numbers at their high ends."""
    asked = options.compose(["experiment=smoke", f"space={space}", *overrides])
    _, branch, *_ = space_tree.branches(SPACES[space])
    told = options.configure(asked, 0, branch.overrides)
    return {**told, "checkpoints": {**POLICY, "folder": str(folder), **policy}}


@pytest.mark.usefixtures("unoptimised")
def test_too_few_converged_samples_fail_a_trial(tmp_path):
    """One evaluation of the network is not enough for any sample; the numbers are no score."""
    trial = TrainingTrial(branch_of("lin_thresh", tmp_path, "solver.max_iterations=1"))
    with pytest.raises(training.Diverged, match=r"train_CL_converged_share is 0\.\d+ in epoch 1"):
        trial.step()


def test_a_trial_goes_on_from_its_checkpoint_and_tells_of_earlier_epochs_again(tmp_path):
    told = branch_of("bp", tmp_path, "replicates=2")
    whole = TrainingTrial({**told, "checkpoints": {**told["checkpoints"], "at_end": False}})
    first = whole.step()
    shutil.copy(checkpoint_file(tmp_path, 0), tmp_path / "first")
    second = whole.step()
    assert not first["done"] and second["done"]
    (tmp_path / "first").rename(checkpoint_file(tmp_path, 0))

    resumed = TrainingTrial(dict(told))
    again = resumed.step()
    for name in ("score", "metrics", "place", "training_iteration", "done"):
        assert again[name] == first[name]
    last = resumed.step()
    assert (last["training_iteration"], last["done"]) == (2, True)
    assert math.isfinite(last["score"])
    for name, value in second["metrics"].items():
        if name.removesuffix("_sd") not in ("epoch_seconds", "compilations", "peak_memory_mb"):
            assert np.array_equal(value, last["metrics"][name]), name


def test_a_checkpoint_over_the_cap_is_left_out_and_said(tmp_path):
    trial = TrainingTrial(branch_of("bp", tmp_path, "replicates=2", cap_bytes=100.0))
    result = trial.step()
    assert result[OVER_CAP]
    assert not list(tmp_path.glob("*.msgpack"))


def record(number, rule="bp", state=COMPLETE, score=50.0, reason=None, **searched):
    config = {"number": number, "rule": rule, "epochs": 2, "searched": searched, "command": "c"}
    return Record(config, [score, score], state, reason)


def test_only_complete_trials_compete_and_the_first_of_equals_wins():
    records = [
        record(3, score=60.0), record(1, score=60.0), record(2, score=59.0),
        record(4, state=PRUNED, score=90.0), record(5, state=FAILED, score=99.0),
        record(6, state=KILLED, score=99.0), record(7, "taylor", PRUNED, 80.0),
    ]  # fmt: skip
    bp, taylor = progress.standings(records, "max")
    assert bp.best and bp.best.number == 1
    assert taylor.best is None and taylor.tally.pruned == 1
    lowest = progress.best(records, "min")
    assert lowest and lowest.number == 2


def test_time_left_is_at_the_pace_of_this_session():
    assert progress.seconds_left([], 10, 5.0) is None
    one = [record(0), record(1, state=RUNNING)]
    assert progress.seconds_left(one, 9, 5.0) == 40.0
    assert progress.seconds_left(one, 60, 5.0) is None  # too few to tell
    three = [record(number) for number in range(3)]
    assert progress.seconds_left(three, 10, 5.0, before=2) == 35.0
    assert progress.seconds_left(three, 10, 5.0, before=3) is None
    assert progress.clock(75.2) == "1 min 15 s"


def test_the_line_of_a_study_counts_states_and_names_each_rules_best():
    records = [
        record(0, score=60.0), record(1, "taylor", score=70.0), record(2, state=PRUNED),
        record(3, state=FAILED), record(4, state=RUNNING),
    ]  # fmt: skip
    assert progress.line(records, 10, 8.0, "max") == (
        "4/10 trials: 2 complete, 1 pruned, 1 failed, 1 running; best taylor 70.00, bp 60.00;"
        " 8 s, 12 s left"
    )


def test_failures_are_told_by_the_number_that_separates_them():
    rates = {0: 0.1, 1: 0.5, 2: 0.2, 3: 0.9, 4: 2.0}
    why = "Diverged: kernel_0 has non-finite values in epoch"
    records = [
        record(n, state=FAILED if n > 2 else COMPLETE, reason=f"{why} {n}" if n > 2 else None,
               rate=rate, other=1.0, name="x")
        for n, rate in rates.items()
    ]  # fmt: skip
    (line,) = progress.failures([*records, record(5, "taylor", rate=9.0)])
    assert line == (
        "bp: 2 of 5 failed (2 x Diverged: kernel_0 has non-finite values), mostly at high rate:"
        " 0.9 to 2 (the others 0.1 to 0.5)"
    )
    assert progress.failures(records[:3]) == []
    assert progress.failures([record(0, state=FAILED, reason="E: x")]) == [
        "bp: 1 of 1 failed (1 x E: x)"
    ]


def test_progress_prints_lines_where_there_is_no_terminal():
    printed = io.StringIO()
    with progress.Progress(Console(file=printed, width=80), 3, "valid_accuracy", "max") as shown:
        shown.update([record(0)])
        assert printed.getvalue() == ""  # too soon
        shown.shown -= progress.PLAIN_SECONDS
        shown.update([record(0)])
        shown.ended(record(1, state=FAILED, reason="E: [red]x[/red]"))
        shown.ended(record(2))
    first, second = printed.getvalue().splitlines()
    assert first.startswith("1/3 trials: 1 complete")
    assert second == "trial 1 failed: E: [red]x[/red]"


def test_the_checkpoints_of_the_best_stay_and_the_least_of_them_makes_room(tmp_path):
    records = [
        record(0, score=60.0), record(1, score=70.0), record(2, score=70.0),
        record(3, "taylor", score=20.0), record(4, state=PRUNED, score=99.0),
        record(5, state=RUNNING), record(6, "taylor", state=FAILED),
    ]  # fmt: skip
    for one in records:
        checkpoint_file(tmp_path, one.number).touch()
    left = lambda: sorted(int(file.stem) for file in tmp_path.iterdir())
    retention.tidy(tmp_path, records, "max", best=2)
    assert left() == [1, 2, 3, 5]
    assert retention.make_room(tmp_path, records, "max", best=2, cap_bytes=1)
    assert left() == [1, 2, 3, 5]  # one more fits
    gone, before = [], left()
    while retention.make_room(tmp_path, records, "max", best=2, cap_bytes=-1):
        gone += {*before} - {*left()}
        before = left()
    assert gone == [2, 3, 1]  # bp's second, then the first ones
    assert left() == [5]


EXPERIMENTS = sorted((ROOT / "conf/experiment").glob("*.yaml"))
STUDIES = [file.stem for file in EXPERIMENTS if "\ngrid:" not in file.read_text()]


@pytest.mark.parametrize("name", STUDIES)
def test_every_branch_of_an_experiments_space_composes(name):
    """(Without its data, which need not be here.)"""
    asked = options.compose([f"experiment={name}"])
    for branch in space_tree.branches(SPACES[asked.space]):
        trial = options.configure(asked, 0, branch.overrides)
        assert trial["epochs"] == asked.epochs and trial["searched"] == branch.overrides


@pytest.mark.parametrize("name", [file.stem for file in EXPERIMENTS if file.stem not in STUDIES])
def test_a_grid_is_no_study(name):
    with pytest.raises(ConfigError, match=r"needed is python -m analysis\.retrain experiment="):
        options.compose([f"experiment={name}"])


def kept_study(folder, *overrides):
    """The options of a study, kept in its folder, that somebody may go on from."""
    first = options.compose(["study=first", f"out_dir={folder}", *overrides])
    first.folder.mkdir(parents=True)
    (first.folder / options.FILE).write_text(yaml.safe_dump(options.kept(first)))
    return first


def test_what_was_given_for_a_searcher_goes_with_it(tmp_path):
    kept_study(tmp_path, "searcher.n_ei_candidates=50", "trials=9")
    place = ["study=first", "extend=true", f"out_dir={tmp_path}"]
    assert options.compose(place).searcher["n_ei_candidates"] == 50
    other = options.compose([*place, "searcher=random"])
    assert (other.searcher["name"], other.trials) == ("random", 9)


def test_an_extension_proposes_other_trials_unless_its_seed_is_given(tmp_path):
    kept_study(tmp_path, "seed=3")
    place = ["study=first", "extend=true", f"out_dir={tmp_path}"]
    assert options.compose(place).seed == 4
    assert options.compose([*place, "seed=3"]).seed == 3


def test_a_grid_leaves_out_what_is_known():
    asked = options.compose(["searcher=grid", "space=bp", "trials=2"])
    default, *rest = options.first_points(asked)
    assert options.first_points(asked, rest[:1]) == [default, *rest[1:]]
    with pytest.raises(ConfigError, match="trials: given 2, allowed is at most 1"):
        options.first_points(asked, rest)


def test_more_points_than_trials_of_their_rule_are_refused(tmp_path):
    file = tmp_path / "points.yaml"
    file.write_text(yaml.safe_dump([{"trainer": "exact-inv", "model.vf.g_EI": 1.5}] * 2))
    asked = options.compose([f"points={file}", "trials=7"])
    with pytest.raises(ConfigError, match="trials: given 7, allowed is at least 8"):
        options.first_points(asked)
    assert len(options.first_points(replace(asked, trials=8))) == 5


def test_passwords_in_addresses_are_masked():
    said = provenance.masked("storage=postgresql://me:secret@host/db uri=http://h:5000 x@y")
    assert said == "storage=postgresql://me:***@host/db uri=http://h:5000 x@y"


def test_shares_of_a_processor_are_counted_whole(monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}] * 2
    monkeypatch.setattr(ray_backend.ray, "nodes", lambda: nodes)
    assert ray_backend.trials_at_once({"cpu": 1, "gpu": 0.25}) == 8
    assert ray_backend.trials_at_once({"cpu": 0.5, "gpu": 0.2}) == 10
    assert ray_backend.trials_at_once({"cpu": 8, "gpu": 0}) == 0
