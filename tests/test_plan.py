"""The plan of a study: its numbers one by one, and one real plan."""

import re

import pytest

from disinhib import config
from disinhib.errors import ConfigError
from disinhib.tuning import cluster, manifest, plan, study
from disinhib.tuning.event_log import Record
from disinhib.tuning.options import check_space, compose
from disinhib.tuning.plan import Cost
from search_spaces import SPACES

RULES = ("bp", "bp-ei", "exact-inv", "lin-thresh")
FREE = Cost(first_epoch=1.0, epoch=1.0, tracing=0.0, memory_mb=1.0, checkpoint_mb=1.0, ready_at=0.0)
COSTS = {"bp": [FREE], "exact-inv": [FREE, FREE._replace(epoch=3.0)]}


def asked(*overrides):
    return compose(["trials=40", "epochs=16", *overrides])


@pytest.mark.parametrize("seeds", ["searcher.deterministic=false", "searcher.deterministic=true"])
def test_without_stopping_every_trial_runs_its_budget(seeds):
    assert plan.without_stopping(asked(seeds), COSTS, at_once=3).epochs == 40 * 16


def test_trials_at_a_time_share_the_epochs_and_what_is_between_trials():
    one = plan.without_stopping(asked(), {"bp": [FREE]}, at_once=1)
    four = plan.without_stopping(asked(), {"bp": [FREE]}, at_once=4)
    assert one.seconds == pytest.approx(40 * (16 + plan.TRIAL_SECONDS))
    assert four.seconds == pytest.approx(one.seconds / 4)


def test_a_worker_traces_a_structure_once():
    traced = plan.without_stopping(asked(), {"bp": [FREE._replace(tracing=5.0)]}, at_once=4)
    free = plan.without_stopping(asked(), {"bp": [FREE]}, at_once=4)
    assert traced.seconds == pytest.approx(free.seconds + 5)


def test_a_batch_waits_for_the_one_before():
    costs = {"bp": [FREE], "exact-inv": [FREE._replace(epoch=3.0)]}
    batches = asked("searcher.deterministic=true", "searcher.batch=2")
    estimate = plan.without_stopping(batches, costs, at_once=2)
    assert estimate.seconds == pytest.approx(20 * (3 * 16 + plan.TRIAL_SECONDS))


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
@pytest.mark.parametrize("metric", ["valid_accuracy", "valid_loss"])
def test_early_stopping_saves_epochs(scheduler, metric):
    mode = {"valid_accuracy": "max", "valid_loss": "min"}[metric]
    smaller = asked(f"scheduler={scheduler}", f"metric={metric}", f"mode={mode}")
    grace = 16 // 4
    stopped, whole = (f(smaller, COSTS, 2) for f in (plan.with_stopping, plan.without_stopping))
    assert 40 * grace < stopped.epochs < whole.epochs
    assert stopped.seconds < whole.seconds


def test_without_a_scheduler_nothing_is_saved():
    assert plan.with_stopping(asked("scheduler=none"), COSTS, 2).epochs == 40 * 16


def test_trials_of_a_rule_that_cannot_run_take_no_time():
    estimate = plan.without_stopping(asked(), {"bp": [FREE], "exact-inv": []}, at_once=1)
    assert estimate.epochs == 20 * 16


def test_disk_is_for_trials_that_run_and_the_best_of_each_rule():
    large = FREE._replace(checkpoint_mb=5.0)
    costs = {"bp": [FREE], "exact-inv": [FREE, large], "lin-thresh": []}
    assert plan.disk_mb(costs, at_once=3, keep_best=2) == 3 * 5 + 2 * (1 + 5)
    assert plan.disk_mb({"bp": []}, at_once=3, keep_best=2) == 0


@pytest.mark.parametrize(
    ("gpus", "may_take", "fits", "share"),
    [
        (0.25, 20_000, 125, 0.008),
        (1, 80_000, 125, 0.008),
        (1, 500, 1, 1.0),
        (0.5, 900, 2, 0.334),
    ],
)
def test_a_plan_says_how_many_trials_the_memory_of_a_gpu_has_room_for(gpus, may_take, fits, share):
    costs = [FREE, FREE._replace(memory_mb=600.0)]
    words = plan._memory([cost._replace(gpu_mb=may_take) for cost in costs], 4, gpus)
    assert f"600 MB a trial, which cluster.gpus_per_trial={gpus} lets take {may_take} MB" in words
    assert f"of one GPU {fits} trials fit (cluster.gpus_per_trial={share})" in words
    assert share * may_take / gpus >= 600 or share == 1
    assert cluster.room({"GPU": 1, "CPU": 999}, {"gpu": share, "cpu": 1}) == fits


def test_a_plan_leaves_out_what_jax_does_not_tell_of_a_gpu():
    assert plan._memory([FREE], 4, 1) == "\nGPU memory: 1 MB a trial"


def test_structures_of_the_shipped_space():
    smoke = asked("experiment=smoke")
    structures = plan.structures(smoke, check_space(smoke))
    names = {structure.name for structure in structures}
    assert names == {"exact-inv, lin-thresh", "bp-ei", "bp"}
    assert structures[-1].name == "bp"  # by far the fastest
    for structure in structures:
        run = config.parse(structure.trial["options"])
        assert run.hyperparameters.optimizer["learning_rate"] == 1e-3  # as published
        assert run.hyperparameters.rule.get("norm_val", 1.0) == 1.0


def test_a_number_that_decides_a_structure_is_kept(monkeypatch):
    def space(draw):
        width = draw.suggest_float("weight", 0.5, 2.0)
        layers = draw.suggest_int("model.vf.nb_hidden", 1, 2)
        return {"model/vf": "non-dale", "trainer": "bp"} | {
            "model.vf.weight_scale": width, "model.vf.nb_hidden": layers
        }  # fmt: skip

    monkeypatch.setitem(SPACES, "deep", space)
    deep = asked("space=deep")
    structures = plan.structures(deep, check_space(deep))
    runs = [config.parse(structure.trial["options"]) for structure in structures]
    assert [run.architecture.hidden_layers for run in runs] == [2, 1]  # the slower one first
    assert [run.hyperparameters.weight_scale for run in runs] == [1.0, 1.0]


def previews(of, points, rules):
    begun = manifest.of_search(of)
    propose = manifest.proposer(of, begun)
    given = begun.points if points is None else points
    return plan.previews(of, propose, given, rules), manifest.proposer(of, begun)


def test_each_rule_shows_its_published_default_and_a_sampled_point(tmp_path):
    file = tmp_path / "points.yaml"
    file.write_text("[{trainer: bp, optimizer.learning_rate: 0.005}]")
    smoke = asked(f"points={file}", "experiment=smoke", "trials=12")
    shown, propose = previews(smoke, None, len(RULES))
    expected = {(rule, kind) for rule in RULES for kind in (plan.PUBLISHED, plan.SAMPLED)}
    kinds = {(preview.trial["rule"], preview.kind) for preview in shown}
    assert kinds == {*expected, ("bp", plan.GIVEN)}
    (given,) = (preview.trial for preview in shown if preview.kind == plan.GIVEN)
    assert given["searched"]["optimizer.learning_rate"] == 0.005
    records = {}  # trials of the study itself, as far as none has ended
    for number in range(max(preview.trial["number"] for preview in shown) + 1):
        proposed = propose(number, records)
        records[number] = Record(proposed.config, proposed.point)
    for preview in shown:
        assert preview.trial == records[preview.trial["number"]].config


def test_a_grid_shows_two_of_its_points():
    grid = asked("space=bp", "searcher=grid", "trials=3", "searcher.points_per_range=3")
    shown, _ = previews(grid, [], 1)
    assert [(preview.trial["number"], preview.kind) for preview in shown] == [
        (0, plan.PUBLISHED), (1, plan.SAMPLED),
    ]  # fmt: skip


def mixed(trial):
    """Two structures: with too few iterations, no sample of exact-inv converges."""
    rule = trial.suggest_categorical("trainer", ("bp", "exact-inv"))
    rate = trial.suggest_float(f"{rule}.optimizer.learning_rate", 1e-4, 1e-2, log=True)
    circuit = {"bp": "non-dale", "exact-inv": "dale"}[rule]
    return {"model/vf": circuit, "trainer": rule, "optimizer.learning_rate": rate}


def test_a_real_plan_says_it_all_and_writes_nothing(tmp_path, monkeypatch, capsys):
    programs, here = (tmp_path / name for name in ("programs", "here"))
    for folder in (programs, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
    monkeypatch.setitem(SPACES, "mixed", mixed)
    words = ["experiment=smoke", "trials=6", "space=mixed", "solver.max_iterations=1"]
    assert study.main(["plan=true", "cluster.lanes=2", *words]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    default = "model/vf=non-dale trainer=bp optimizer.learning_rate=0.001"
    assert f"trial 0, published default: {default}" in lines
    assert "trial 2, sampled: model/vf=non-dale trainer=bp optimizer.learning_rate=" in said
    row = next(line for line in lines if line.startswith("bp  "))
    numbers = [float(word) for word in row.split()[1:]]
    assert len(numbers) == 4 and all(number > 0 for number in numbers)
    failed = next(line for line in lines if line.startswith("exact-inv  "))
    assert "failed: Diverged: train_CL_converged_share is 0.0000" in failed
    whole = next(line for line in lines if line.startswith("without early stopping: "))
    assert re.search(r" 6 epochs, \d+ trials an hour$", whole)  # of bp's 3 trials
    assert "not counted, because none of their structures could be timed: exact-inv" in lines
    for start in ("with scheduler=asha: ", "memory: ", "disk: at most "):
        assert any(line.startswith(start) for line in lines)
    assert " trials fit at once (2 lanes of " in said
    assert not list(here.iterdir())
    assert list(programs.iterdir())  # for the study to load


def test_bad_input_is_refused_as_by_the_study():
    with pytest.raises(ConfigError, match="but space=bp sets non-dale"):
        study.main(["plan=true", "space=bp", "model/vf=dale"])
