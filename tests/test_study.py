# pyright: reportArgumentType=false
"""Studies, with the real Ray, Optuna and MLflow: one small study looked at from many sides, and
another that starts from it."""

import io
import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import mlflow
import mlflow_server
import optuna
import pytest
import requests
import tiny
import yaml
from conftest import bring_mlflow_here
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray import tune
from rich.console import Console
from tiny import DIVERGED_TRIAL, PRUNED_TRIAL, RAISED_TRIAL, RULES, TRIALS

from disinhib import config, hydra_config
from disinhib.checks import flatten
from disinhib.tuning import engine, environment, loop, options, progress, space_tree, study, suggest
from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    KILLED,
    PRUNED,
    EventLog,
    Record,
    over_seeds,
    replay,
)
from disinhib.tuning.turns import Sharing, turn
from disinhib.tuning.worker import REPORT, TrainingTrial

source, tiny_space = tiny.source, tiny.tiny_space
pytestmark = pytest.mark.usefixtures("tiny_space", "copied_stores", "one_ray")

ROOT = Path(__file__).parent.parent
STATES = [*[COMPLETE] * 4, PRUNED, FAILED, FAILED]
EPOCHS = [2, 2, 2, 2, 1, 0, 0]


class Witness(tune.Callback):
    """Keeps the reports of every trial's epochs, and who made them."""

    def __init__(self):
        self.reports, self.pids = {}, {}

    def on_trial_result(self, *, trial, result, **_):
        if REPORT in result:
            number = trial.config["number"]
            told = [epoch["metrics"] for epoch in json.loads(result[REPORT])["epochs"]]
            self.reports.setdefault(number, []).extend(told)
            self.pids[number] = result["pid"]


@pytest.fixture(scope="module")
def tries(tmp_path_factory):
    """A file with a line for each time that the trial that raises was begun."""
    return tmp_path_factory.mktemp("tries") / "tries"


@pytest.fixture(scope="module")
def finished(tiny_space, copied_stores, one_ray, tries, tmp_path_factory):
    """A finished study of seven trials, what a witness of it saw, and what it printed."""

    class Planted(TrainingTrial):  # here, so that it goes to Ray's workers by value
        def _here(self):
            from disinhib.tuning import lane_group, lane_server

            class Raising(lane_group.Group):
                def _report(self, trial, *args):
                    if trial.order["number"] == RAISED_TRIAL:
                        with tries.open("a") as file:
                            file.write("begun\n")
                        raise RuntimeError("planted\nand more of it")
                    super()._report(trial, *args)

            lane_server.Group = Raising
            return super()._here()

    printed, witness = io.StringIO(), Witness()
    console = Console(file=printed, width=120)
    asked = options.compose([*tiny.STUDY, f"out_dir={tmp_path_factory.mktemp('study')}"])
    done = study.run(asked, console, Planted, [witness])
    study.summary(done, asked, console)
    return done, witness, printed.getvalue()


def runs_of(done):
    """MLflow's client, and its runs of the trials, by number."""
    client = mlflow.MlflowClient(tracking_uri=done.tracking_uri)
    children = client.search_runs(
        [client.get_run(done.run_id).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{done.run_id}'",
    )
    assert client.get_run(done.run_id).info.status == "FINISHED"
    runs = {int(run.data.tags["trial"]): run for run in children}
    assert len(runs) == len(children)
    return client, runs


@pytest.fixture(scope="module")
def runs(finished):
    return runs_of(finished[0])


def load(done):
    """The study as anyone opens it in Optuna."""
    storage = JournalStorage(JournalFileBackend(str(done.job.folder / "optuna.log")))
    return optuna.load_study(study_name=done.job.name, storage=storage)


def ray_trials(done):
    """Ray's own trials, by number."""
    trials = tune.ExperimentAnalysis(str(done.job.folder / "ray")).trials or []
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
    assert done.undelivered == {} and done.whole


def test_optuna_opens_the_store_and_counts_match(finished):
    done, _, _ = finished
    loaded = load(done)
    counts = Counter(OPTUNA[trial.state.name] for trial in loaded.trials)
    tally = progress.tally(done.records)
    assert counts == {COMPLETE: tally.complete, PRUNED: tally.pruned, FAILED: tally.failed}
    best = progress.best(done.records)
    assert best and loaded.best_trial.number == best.number
    assert loaded.best_value == best.score
    assert loaded.best_trial.user_attrs["command"] == best.config["command"]


def test_optuna_dashboard_shows_the_store(finished, tmp_path):
    pytest.importorskip("optuna_dashboard")
    done, _, _ = finished
    shutil.copy(done.job.folder / "optuna.log", tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    command = [Path(sys.executable).parent / "optuna-dashboard", tmp_path / "optuna.log"]
    with subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", port, "--server", "wsgiref"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as dashboard:  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}/api/studies"
            states = {
                study["study_name"]: Counter(
                    trial["state"]
                    for trial in answer(f"{address}/{study['study_id']}", dashboard)["trials"]
                )
                for study in answer(address, dashboard)["study_summaries"]
            }
        finally:
            dashboard.terminate()
    tally, name = progress.tally(done.records), done.job.name
    rules = {record.config["rule"] for record in done.records}
    assert {*states} == {name, *(f"{name}/{rule}" for rule in rules)}
    of_all = states.pop(name)
    assert of_all == {"Complete": tally.complete, "Pruned": tally.pruned, "Fail": tally.failed}
    assert sum(states.values(), Counter()) == of_all


def answer(address, server):
    """What `server` says at `address`, as soon as it answers."""
    responses = []

    def answers():
        assert server.poll() is None, f"it ended with {server.returncode}"
        with suppress(requests.ConnectionError):
            responses.append(requests.get(address, timeout=60))
        return responses

    mlflow_server.wait(answers)
    responses[0].raise_for_status()
    return responses[0].json()


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
        assert float(runs[1][number].data.params[f"{rule}.optimizer.learning_rate"]) == 1e-3
        assert load(done).trials[number].params["trainer"] == rule
    later = [record.config["searched"]["optimizer.learning_rate"] for record in done.records[3:]]
    assert 1e-3 not in later


def test_what_was_searched_is_logged_as_optuna_has_it(finished, runs):
    done, _, _ = finished
    for number, run in runs[1].items():
        rule = done.records[number].rule
        assert run.data.params.keys() == {
            "trainer", f"{rule}.optimizer.learning_rate",
            *([f"{rule}.model.vf.g_EI"] if RULES[rule] == "dale" else []),
        }  # fmt: skip
        in_optuna = load(done).trials[number]
        assert run.data.params == {name: str(v) for name, v in in_optuna.params.items()}
        assert in_optuna.distributions.keys() == in_optuna.params.keys()


def test_epochs_are_steps_and_the_same_in_all_three(finished, runs):
    done, witness, _ = finished
    client, children = runs
    in_ray, in_optuna = ray_trials(done), load(done).trials
    for number, run in children.items():
        seen = [over_seeds(m)["valid_accuracy"] for m in witness.reports.get(number, [])]
        assert len(seen) == EPOCHS[number]
        assert done.records[number].scores == seen
        history = client.get_metric_history(run.info.run_id, "valid_accuracy")
        assert [(m.step, m.value) for m in history] == list(enumerate(seen, start=1))
        assert in_optuna[number].intermediate_values == dict(enumerate(seen, start=1))
        assert int(run.data.tags["epochs"]) == len(seen)
        last = in_ray[number].last_result.get("valid_accuracy")
        assert last == (seen[-1] if seen else None)


def test_the_metrics_are_those_of_training_under_the_published_names(runs):
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
    competing = {s.rule: s.best.number for s in progress.standings(done.records) if s.best}
    assert competing["lin-thresh"] == 2
    assert competing["exact-inv"] == 1
    assert competing["bp"] in (0, 3)


def test_a_trial_that_raises_is_not_tried_again(finished, tries):
    assert tries.read_text() == "begun\n"


def test_the_second_trial_of_a_structure_compiles_nothing(finished):
    _, witness, _ = finished
    counts = {n: [m["compilations"] for m in witness.reports[n]] for n in range(5)}
    assert counts[0][0][0] > 0 and counts[1][0][0] > 0
    assert counts[3] == [[0], [0]]  # bp, as trial 0, in the same worker
    assert witness.pids[3] == witness.pids[0]
    assert counts[PRUNED_TRIAL] == [[0]]  # exact-inv, as 1


def test_the_command_of_a_trial_repeats_it(finished, runs, tmp_path):
    _, witness, _ = finished
    command = shlex.split(runs[1][1].data.tags["command"])
    assert command[:3] == ["python", "-m", "disinhib"]
    variables = environment.of_worker(cpus=1, gpus=0)
    again = subprocess.run(
        [sys.executable, *command[1:], f"out_dir={tmp_path}"],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    (results,) = tmp_path.rglob("results.json")
    accuracies = json.loads(results.read_text())["valid_accuracy"]
    assert accuracies == [metrics["valid_accuracy"][0] for metrics in witness.reports[1]]


def test_the_command_of_every_trial_gives_its_options(finished):
    for record in finished[0].records:
        words = shlex.split(record.config["command"])[3:]
        composed, _ = hydra_config.compose(hydra_config.TRAINING, words)
        assert composed == record.config["options"]


def test_what_runs_a_trial_again_is_kept_with_it(finished, runs, tmp_path):
    done, _, _ = finished
    client, children = runs
    client.download_artifacts(children[1].info.run_id, "", str(tmp_path))
    command = (tmp_path / "command.txt").read_text().strip()
    assert command == children[1].data.tags["command"]
    kept = config.parse(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert kept.rule == "exact-inv"
    assert [kept.seed] == suggest.trial_seeds(0, 1)
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["data"]["sha256"] == children[1].data.tags["data_sha256"]
    assert provenance == done.job.manifest.provenance
    space = json.loads((tmp_path / "space.json").read_text())
    assert space_tree.differences(space, space_tree.definition(tiny.space)) == []
    assert children[1].data.tags["space_sha256"] == space_tree.fingerprint(space)


def test_the_summary_comes_last_and_says_how_to_go_on(finished):
    done, _, printed = finished
    last = printed.strip().splitlines()
    watched = f"/runs/{done.run_id}/model-metrics"
    assert printed.index(watched) < printed.index(f"{done.job.name}: 7 trials in")
    assert "4 complete, 1 pruned, 2 failed" in printed
    assert last[-3].endswith(f"mlflow ui --backend-store-uri {done.tracking_uri}")
    assert last[-2] == f"             then http://127.0.0.1:5000{done.page}"
    best = progress.best(done.records)
    assert best and last[-1].endswith(best.config["command"].removeprefix("python "))
    table = printed[printed.index("best valid_accuracy") :].splitlines()[1:4]
    ranked = [s.rule for s in progress.standings(done.records)]
    assert [line.split()[0] for line in table] == ranked
    assert "bp: 1 of 3 failed (1 x RuntimeError: planted)" in printed
    assert "lin-thresh: 1 of 2 failed (1 x Diverged: " in printed
    assert "mostly at high optimizer.learning_rate: 1e+30 to 1e+30 (the others 0.001" in printed


def test_the_log_is_what_the_study_says_of_itself(finished):
    done, _, _ = finished
    with closing(EventLog(done.job.folder)) as log:
        records = replay(log.events())
    assert [(r.state, r.scores, r.reason) for r in records.values()] == [
        (r.state, r.scores, r.reason) for r in done.records
    ]


def test_the_final_states_of_each_rules_best_are_kept(finished):
    done, _, _ = finished
    best = [s.best.number for s in progress.standings(done.records) if s.best]
    files = {file.name for file in done.job.checkpoint_folder.glob("*.msgpack")}
    assert len(best) == 3
    assert files == {f"{number:04d}.msgpack" for number in best}


# Another study that starts from it.

POISONED_TRIAL = 2
POINT = {"trainer": "bp", "optimizer.learning_rate": 0.015}


@pytest.fixture(scope="module")
def extended(finished, tmp_path_factory):
    """(study, what it left): four trials with two seeds each, which extend the first; in trial 2
    the second seed's weights are no numbers."""

    class Poisoned(TrainingTrial):
        def _here(self):
            from disinhib.tuning import lane_group, lane_server

            class Poisoning(lane_group.Group):
                def train(self, trial):
                    if trial.order["number"] == POISONED_TRIAL and trial.state is not None:
                        weights = dict(trial.state.parameters)
                        weights["kernel_out"] = weights["kernel_out"].at[1].set(math.nan)
                        trial.state = trial.state._replace(parameters=weights)
                    super().train(trial)

            lane_server.Group = Poisoning
            return super()._here()

    job = finished[0].job
    points = tmp_path_factory.mktemp("points") / "points.yaml"
    points.write_text(yaml.safe_dump([POINT]))
    asked = options.compose(
        [
            *(f"study={job.name}", f"out_dir={job.out_dir}", "extend=true"),
            *("trials=4", "replicates=2", f"points={points}"),
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        bring_mlflow_here(patch)
        return asked, study.run(asked, tiny.quiet(), Poisoned)


def test_a_study_that_extends_another_is_a_new_one_with_its_options(finished, extended):
    first, (asked, _) = finished[0].job, extended
    assert asked.name == f"{first.name}-2"
    assert asked.folder.parent == first.folder.parent
    flat, before = flatten(asked.options), flatten(first.kept["options"])
    assert {name for name in flat if flat[name] != before[name]} == {
        *("study", "warm_start", "trials", "replicates", "points", "seed")
    }
    assert asked.seed == before["seed"] + 1  # or it would propose the same trials again
    with closing(EventLog(first.folder)) as log:  # which it left alone
        assert [record.state for record in replay(log.events()).values()] == STATES


def test_it_learns_from_the_trials_of_the_other(finished, extended):
    past = extended[1].job.manifest.past
    learnt = [(trial["rule"], trial["state"], trial["scores"]) for trial in past]
    usable = [record for record in finished[0].records if record.state != FAILED]
    assert learnt == [(record.rule, record.state, record.scores) for record in usable]
    rules = space_tree.rules_of(tiny.space)
    whose = [turn(number, {}, Sharing(rules)) for number in range(3)]
    each = [suggest.history({}, past, number, turn) for number, turn in enumerate(whose)]
    assert [[trial["state"] for trial in own] for own in each] == [
        [COMPLETE, COMPLETE], [COMPLETE, PRUNED], [COMPLETE],
    ]  # fmt: skip


def test_given_points_come_right_after_the_published_defaults(extended):
    records = extended[1].records
    rates = [r.config["searched"]["optimizer.learning_rate"] for r in records]
    assert rates == [1e-3, 1e-3, 1e-3, POINT["optimizer.learning_rate"]]
    assert [record.rule for record in records] == [*RULES, "bp"]


def test_replicates_are_trained_together_and_scored_by_their_mean(extended):
    _, done = extended
    client, runs = runs_of(done)
    for number, run in runs.items():
        assert run.data.tags["seeds"] == ",".join(map(str, suggest.trial_seeds(1, number, 2)))
    assert len({seed for run in runs.values() for seed in run.data.tags["seeds"].split(",")}) == 8
    for number in (0, 1, 3):
        metrics = runs[number].data.metrics
        assert metrics["valid_accuracy"] == done.records[number].score
        for name in ("valid_accuracy", "valid_loss", "train_CL_loss"):
            assert metrics[f"{name}_sd"] > 0
        history = client.get_metric_history(runs[number].info.run_id, "valid_loss_sd")
        epochs = done.records[number].epochs
        assert [m.step for m in history] == list(range(1, epochs + 1))
    words = shlex.split(runs[0].data.tags["command"])
    assert f"seed={runs[0].data.tags['seeds']}" in words and "-m" in words[3:]


def test_a_seed_that_diverges_fails_its_trial(extended):
    _, done = extended
    failed = done.records[POISONED_TRIAL]
    assert (failed.state, failed.epochs) == (FAILED, 0)
    bad = suggest.trial_seeds(1, POISONED_TRIAL, 2)[1]
    assert (failed.reason or "").startswith("Diverged: ")
    assert f"(seed {bad})" in (failed.reason or "")
    others = [record.state for record in done.records if record is not failed]
    assert set(others) <= {COMPLETE, PRUNED}
    assert [OPTUNA[trial.state.name] for trial in load(done).trials] == [
        record.state for record in done.records
    ]


# Exit codes, and what is printed at the end.


def record(number, state=COMPLETE, reason=None):
    config: Any = {"number": number, "rule": "bp", "epochs": 2, "searched": {}, "command": "c"}
    return Record(config, scores=[50.0, 50.0], state=state, reason=reason)


def ended(asked, *records, uri="sqlite:////m.db", undelivered=None):
    whole = all(each.state != KILLED for each in records)
    return engine.Finished(
        study.job(asked), list(records), uri, "/#/page", "run", 1.0, undelivered or {}, whole
    )


def test_the_exit_code_says_how_a_study_ended(tmp_path, monkeypatch, capsys):
    endings = {
        0: (record(0), record(1, FAILED, "E: x")),
        1: (record(0, PRUNED),),
        130: (record(0), record(1, KILLED)),
    }
    for code, records in endings.items():

        def run(asked, _, tell, records=records):
            tell(finished := ended(asked, *records))
            return finished

        monkeypatch.setattr(study, "run", run)
        assert study.main([f"out_dir={tmp_path}"]) == code
        said = capsys.readouterr().out
        assert ("resume=true" in said) == (code == 130)


def test_a_study_that_cannot_go_on_says_how_to_when_it_can(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        (tmp_path / "mine").mkdir()
        raise loop.StudyStopped("no space left: /disk: make room")

    monkeypatch.setattr(study, "run", full)
    assert study.main([f"out_dir={tmp_path}", "study=mine"]) == 1
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert line.startswith("error: no space left: /disk: make room, then resume: ")
    assert line.endswith(f"tune_main.py study=mine out_dir={tmp_path} resume=true")


def test_records_that_a_store_did_not_take_are_named(tmp_path):
    printed = io.StringIO()
    asked = options.compose([f"out_dir={tmp_path}", "study=mine"])
    done = ended(asked, record(0), uri="http://server:5000", undelivered={"mlflow": 3})
    study.summary(done, asked, Console(file=printed, width=120))
    assert "mlflow lacks 3 records: resume the study" in printed.getvalue()
    assert f"study=mine out_dir={tmp_path} resume=true" in printed.getvalue()
