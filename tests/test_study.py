"""Studies, with the real Ray, Optuna and MLflow: one small study looked at from many sides, and
what a study refuses."""

import io
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import optuna
import pytest
import yaml
from ray import tune
from rich.console import Console

from disinhib import command_line, config, training
from disinhib.config import ConfigError
from disinhib.tuning import options, progress, schedule, search, study
from disinhib.tuning.trial import (
    COMPLETE,
    FAILED,
    KILLED,
    PRUNED,
    Row,
    TrainingTrial,
    environment,
    state,
)
from search_spaces import SPACES

ROOT = Path(__file__).parent.parent
RULES = {"bp": "non-dale", "exact-inv": "dale", "lin-thresh": "dale"}
PRUNED_TRIAL, FAILED_TRIAL = 4, 5
TINY = ("experiment=smoke", "space=tiny", "cluster.max_concurrent=1")


def tiny(trial):
    """Two trials of each rule; exact-inv's second cannot learn, lin-thresh's second diverges."""
    rule = trial.suggest_categorical("trainer", tuple(RULES))
    rate = trial.suggest_float(f"{rule}.optimizer.learning_rate", 5e-3, 2e-2, log=True)
    overrides = {"model/vf": RULES[rule], "trainer": rule, "optimizer.learning_rate": rate}
    if RULES[rule] == "dale":
        gain = trial.suggest_float(f"{rule}.model.vf.g_EI", 0.5, 2.0)
        overrides["model.vf.g_EI"] = gain
    if trial.number == PRUNED_TRIAL:
        overrides["optimizer.learning_rate"] = 1e-12
    if trial.number == FAILED_TRIAL:
        overrides["optimizer.learning_rate"] = 1e30
    return overrides


class Witness(tune.Callback):
    """Keeps Ray's trials and every result."""

    def __init__(self):
        self.results = {}

    def on_trial_result(self, *, trial, result, **_):
        self.results.setdefault(trial.config["number"], []).append(result)

    def on_experiment_end(self, *, trials, **_):
        self.trials = {trial.config["number"]: trial for trial in trials}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Environment of processes that share what they compile, with each other only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield


@pytest.fixture(scope="module")
def finished(programs, tmp_path_factory):
    """A finished study of six trials, what a witness of it saw, and what it printed."""
    printed, witness = io.StringIO(), Witness()
    console = Console(file=printed, width=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPACES, "tiny", tiny)
        asked = options.compose([*TINY, f"out_dir={tmp_path_factory.mktemp('study')}"])
        options.check_space(asked)
        done = study.run(asked, console, callbacks=[witness])
    study.summary(done, console)
    return done, witness, printed.getvalue()


@pytest.fixture(scope="module")
def runs(finished):
    """MLflow's runs of the trials, by number."""
    done, _, _ = finished
    client = mlflow.MlflowClient(tracking_uri=done.tracking_uri)
    found = client.search_runs(
        [client.get_run(done.run_id).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{done.run_id}'",
    )
    assert client.get_run(done.run_id).info.status == "FINISHED"
    return client, {int(run.data.tags["trial"]): run for run in found}


def test_states_agree_in_ray_optuna_and_mlflow(finished, runs):
    done, witness, _ = finished
    expected = [COMPLETE] * 4 + [PRUNED, FAILED]
    assert [row.state for row in done.rows] == expected
    assert [row.number for row in done.rows] == [trial.number for trial in done.record.trials]
    assert {trial.state for trial in done.record.trials[:4]} == {optuna.trial.TrialState.COMPLETE}
    assert done.record.trials[PRUNED_TRIAL].state == optuna.trial.TrialState.PRUNED
    assert done.record.trials[FAILED_TRIAL].state == optuna.trial.TrialState.FAIL
    assert [witness.trials[n].status for n in range(6)] == ["TERMINATED"] * 5 + ["ERROR"]
    tags = [runs[1][n].data.tags["trial_state"] for n in range(6)]
    assert tags == expected
    assert [runs[1][n].info.status for n in range(6)] == ["FINISHED"] * 5 + ["FAILED"]


def test_every_rule_gets_as_many_trials(finished):
    done, _, _ = finished
    assert [row.rule for row in done.rows] == [*RULES, *RULES]


def test_what_was_searched_is_logged_flat_and_dotted(finished, runs):
    done, _, _ = finished
    for number, run in runs[1].items():
        trained = run.data.params
        assert trained["trainer"] == done.rows[number].rule
        assert trained["model.vf"] == RULES[done.rows[number].rule]
        assert trained.keys() == {
            "trainer", "model.vf", "optimizer.learning_rate",
            *(["model.vf.g_EI"] if trained["model.vf"] == "dale" else []),
        }  # fmt: skip


def test_epochs_are_steps_and_the_same_in_all_three(finished, runs):
    done, witness, _ = finished
    client, children = runs
    for number, run in children.items():
        seen = witness.results.get(number, [])
        history = client.get_metric_history(run.info.run_id, "valid_accuracy")
        assert [m.step for m in history] == list(range(1, len(seen) + 1))
        assert [m.value for m in history] == [r["metrics"]["valid_accuracy"] for r in seen]
        assert list(done.record.trials[number].intermediate_values.values()) == [
            m.value for m in history
        ]
        assert int(run.data.tags["epochs"]) == len(seen)
    assert [len(witness.results.get(n, [])) for n in range(6)] == [2, 2, 2, 2, 1, 0]


def test_the_metrics_are_those_of_training_under_the_published_names(finished, runs):
    names = set(runs[1][0].data.metrics)
    assert names >= {
        "train_CL_loss", "train_CL_accuracy", "train_CL_avg_solver_steps", "train_CL_residual",
        "train_CL_converged_share", "train_CL_weight_norm", "valid_loss", "valid_accuracy",
        "epoch_seconds", "compilations",
    }  # fmt: skip


def test_a_failed_trial_says_why_and_does_not_compete(finished, runs):
    done, _, printed = finished
    reason = runs[1][FAILED_TRIAL].data.tags["reason"]
    assert reason.startswith("Diverged: ") and "epoch 1" in reason
    assert f"trial {FAILED_TRIAL} failed: {reason}" in printed
    competing = {s.rule: s.best.number for s in progress.standings(done.rows, "max") if s.best}
    assert competing["lin-thresh"] == 2
    assert competing["exact-inv"] == 1


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
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    (results,) = tmp_path.rglob("results.json")
    accuracies = json.loads(results.read_text())["valid_accuracy"]
    assert accuracies == [r["metrics"]["valid_accuracy"] for r in witness.results[number]]


def test_command_and_options_are_artifacts(finished, runs, tmp_path):
    client, children = runs
    client.download_artifacts(children[1].info.run_id, "", str(tmp_path))
    command = (tmp_path / "command.txt").read_text().strip()
    assert command == children[1].data.tags["command"]
    kept = config.parse(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert kept.architecture.rule == "exact-inv"
    assert kept.seed == search.trial_seed(0, 1)


def test_the_summary_comes_last_and_says_how_to_go_on(finished):
    done, _, printed = finished
    last = printed.strip().splitlines()
    assert f"{done.study.name}: 6 trials in" in printed
    assert "4 complete, 1 pruned, 1 failed" in printed
    assert f"mlflow ui --backend-store-uri {done.tracking_uri} " in last[-2]
    best = progress.best(done.rows, "max")
    assert best and last[-1].endswith(best.command.removeprefix("python "))
    assert [line.split()[0] for line in last if line.strip().startswith(tuple(RULES))] == [
        s.rule for s in progress.standings(done.rows, "max")
    ]


def test_the_folder_of_a_study_has_its_options(finished):
    done, _, _ = finished
    kept = yaml.safe_load((done.study.folder / "study.yaml").read_text())
    assert kept["space"] == "tiny" and kept["trials"] == 6


# Refusals. One line that names option, given and allowed; nothing written.

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
    "device=gpu": ["device: given gpu", "cluster.gpus_per_trial"],
    "resume=out": ["resume: given out", "null"],
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
}


@pytest.mark.parametrize("override", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(override, tmp_path, monkeypatch, capsys):
    out_dir = [] if override.startswith("out_dir") else [f"out_dir={tmp_path / 'out'}"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune_main.py", *out_dir, override])
    with pytest.raises(SystemExit) as refused:
        command_line.run(study.main)
    assert refused.value.code == 2
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert line.startswith("error: ")
    for part in REFUSED[override]:
        assert part in line
    assert said.out == ""
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(ConfigError, match="study: given bp-digits"):
        options.compose(["study=bp-digits", f"out_dir={tmp_path}"])
    assert options.compose(["space=bp", f"out_dir={tmp_path}"]).name == "bp-digits-2"


# Pieces.


def test_too_few_converged_samples_fail_a_trial():
    """One evaluation of the network is not enough for any sample; the numbers are no score."""
    asked = options.compose(["experiment=smoke", "space=lin_thresh", "solver.max_iterations=1"])
    _, branch, *_ = search.branches(options.SPACES["lin_thresh"])  # numbers at their high ends
    chosen = options.configure(asked, 0, branch.overrides)
    trial = study.trial.TrainingTrial(config=dict(chosen))
    with pytest.raises(training.Diverged, match=r"train_CL_converged_share is 0\.\d+ in epoch 1"):
        trial.step()


def row(number, rule="bp", state=COMPLETE, score=50.0):
    return Row(number, rule, state, 2, 2, score, {}, "")


def test_only_complete_trials_compete_and_the_first_of_equals_wins():
    rows = [
        row(3, score=60.0), row(1, score=60.0), row(2, score=59.0),
        row(4, state=PRUNED, score=90.0), row(5, state=FAILED, score=99.0),
        row(6, state=KILLED, score=99.0), row(7, "taylor", PRUNED, 80.0),
    ]  # fmt: skip
    bp, taylor = progress.standings(rows, "max")
    assert bp.best and bp.best.number == 1
    assert taylor.best is None and taylor.tally.pruned == 1
    lowest = progress.best(rows, "min")
    assert lowest and lowest.number == 2


def test_time_left_is_at_the_pace_so_far():
    assert progress.seconds_left([], 10, 5.0) is None
    assert progress.seconds_left([row(0), row(1, state="running")], 10, 5.0) == 45.0
    assert progress.clock(75.2) == "1 min 15 s"


@pytest.mark.parametrize(
    ("status", "epochs", "stopped", "expected"),
    [
        ("ERROR", 2, False, FAILED),
        ("TERMINATED", 2, False, COMPLETE),
        ("TERMINATED", 1, False, PRUNED),
        ("RUNNING", 1, True, PRUNED),
        ("RUNNING", 1, False, "running"),
        ("PENDING", 0, False, "waiting"),
    ],
)
def test_states(status, epochs, stopped, expected):
    assert state(status, epochs, 2, stopped) == expected


def test_seeds_of_trials_differ_and_depend_on_the_study():
    seeds = [search.trial_seed(study_seed, n) for study_seed in (0, 1) for n in range(500)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert search.trial_seed(0, 0) not in {search.sampler_seed(0, b) for b in range(9)}


def searcher(rules=(), sampler=optuna.samplers.RandomSampler):
    def configure(number, overrides):
        return {"number": number, "epochs": 2, "searched": dict(overrides)}

    return search.Search("s", tiny, sampler, configure, "max", rules)  # pyright: ignore


def test_the_searcher_gives_a_number_once_and_the_same_again_for_the_same_trial():
    asked = searcher()
    first, second = asked.suggest("a"), asked.suggest("b")
    assert (first["number"], second["number"]) == (0, 1)
    assert asked.suggest("a") == first
    assert len(asked.record.trials) == 2


def test_the_searcher_tells_optuna_how_a_trial_ended():
    asked = searcher()
    for trial_id in "abc":
        asked.suggest(trial_id)
    asked.on_trial_result("a", {"score": 1.0, "training_iteration": 1})
    asked.on_trial_complete("a", {"score": 2.0, "training_iteration": 2})
    asked.on_trial_complete("b", {"score": 3.0, "training_iteration": 1})
    asked.on_trial_complete("c", None, error=True)
    states = [(trial.state.name, trial.value) for trial in asked.record.trials]
    assert states == [("COMPLETE", 2.0), ("PRUNED", 3.0), ("FAIL", None)]
    assert asked.record.trials[0].intermediate_values == {1: 1.0, 2: 2.0}
    assert [trial.state for trial in asked.guessers[0].trials] == [
        trial.state for trial in asked.record.trials
    ]


def test_a_balanced_searcher_learns_each_rule_by_itself():
    asked = searcher(rules=tuple(RULES))
    rules = [asked.suggest(str(n))["searched"]["trainer"] for n in range(7)]
    assert rules == [*RULES, *RULES, "bp"]
    assert [len(guesser.trials) for guesser in asked.guessers] == [3, 2, 2]
    for n, frozen in enumerate(asked.record.trials):
        assert frozen.params == asked.guessers[n % 3].trials[n // 3].params


def test_the_searcher_comes_back_from_its_file(tmp_path):
    asked = searcher(rules=tuple(RULES))
    asked.suggest("a")
    asked.save(str(tmp_path / "searcher"))
    back = searcher(rules=tuple(RULES))
    back.restore(str(tmp_path / "searcher"))
    assert back.suggest("a") == asked.suggest("a")
    assert back.suggest("b")["number"] == 1


@pytest.mark.parametrize("name", search.SAMPLERS)
def test_the_same_study_seed_proposes_the_same_trials(name):
    shipped = options.compose([f"searcher={name}", "space=rules"])
    proposed = [
        [study._searcher(shipped).suggest(str(n))["searched"] for n in range(4)] for _ in range(2)
    ]
    assert proposed[0] == proposed[1]


def test_a_trial_is_compared_with_its_own_rule_only():
    make = lambda: schedule.asha({"grace_period": 1, "reduction_factor": 2}, 4, "max")
    scheduler = schedule.WithinRule(make)

    class Trial:
        def __init__(self, name, rule):
            self.trial_id, self.config = name, {"rule": rule}

    trials = [Trial("a", "bp"), Trial("b", "taylor"), Trial("c", "bp")]
    decisions = []
    for trial, score in zip(trials, (90.0, 10.0, 10.0), strict=True):
        scheduler.on_trial_add(None, trial)  # pyright: ignore
        result = {"score": score, "training_iteration": 1}
        decision = scheduler.on_trial_result(None, trial, result)  # pyright: ignore
        decisions.append(decision)
    assert decisions == ["CONTINUE", "CONTINUE", "STOP"]


@pytest.mark.parametrize("name", schedule.SCHEDULERS)
def test_every_scheduler_of_conf_can_be_made(name):
    assert study._scheduler(options.compose([f"scheduler={name}"]))


@pytest.mark.parametrize("name", [f.stem for f in (ROOT / "conf/experiment").glob("*.yaml")])
def test_every_experiment_composes(name):
    options.check_space(options.compose([f"experiment={name}"]))


def test_a_trial_goes_on_from_its_checkpoint(tmp_path):
    asked = options.compose(["experiment=smoke", "space=lin_thresh"])
    overrides = next(search.branches(SPACES["lin_thresh"])).overrides
    told = dict(options.configure(asked, 0, overrides))
    whole, half, rest = (TrainingTrial(dict(told)) for _ in range(3))
    whole.step()
    uninterrupted = whole.step()
    half.step()
    half.save_checkpoint(str(tmp_path))
    rest.load_checkpoint(str(tmp_path))
    resumed = rest.step()
    for name, value in uninterrupted["metrics"].items():
        if name not in ("epoch_seconds", "compilations"):
            assert np.array_equal(value, resumed["metrics"][name]), name
    assert math.isfinite(resumed["score"])
