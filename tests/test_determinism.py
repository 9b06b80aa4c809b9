"""`searcher.deterministic=true`: the same study, however many of its trials run at a time."""

from contextlib import closing

import pytest
import tiny

from disinhib.tuning import options, study
from disinhib.tuning.event_log import COMPLETE, PRUNED, Ended, EpochDone, EventLog
from search_spaces import SPACES

OF_MACHINE = ("epoch_seconds", "compilations", "compilation_seconds", "peak_memory_mb")
pytestmark = pytest.mark.usefixtures("copied_stores", "one_ray")


def two_rules(trial):
    rule = trial.suggest_categorical("trainer", ("bp", "exact-inv"))
    rate = trial.suggest_float(f"{rule}.optimizer.learning_rate", 1e-5, 1e-1, log=True)
    circuit = {"bp": "non-dale", "exact-inv": "dale"}[rule]
    return {"model/vf": circuit, "trainer": rule, "optimizer.learning_rate": rate}


def computed(events):
    """What trials were and did, in the order of their numbers, without what the machine did."""
    outcome = {}
    for event in events:
        body = dict(vars(event))
        if isinstance(event, EpochDone):
            body = {name: v for name, v in event.metrics.items() if name not in OF_MACHINE}
        outcome[event.trial, event.kind, event.epoch] = body
    return dict(sorted(outcome.items()))


def test_two_runs_propose_and_measure_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(SPACES, "two_rules", two_rules)
    runs = []
    for at_once in (2, 1):
        asked = options.compose(
            [
                *("experiment=smoke", "space=two_rules", "trials=9", "epochs=3"),
                *("searcher.deterministic=true", "searcher.batch=4", "scheduler.grace_period=1"),
                *("searcher.n_startup_trials=1", f"cluster.max_concurrent={at_once}"),
                *(f"study=at-once-{at_once}", f"out_dir={tmp_path}"),
            ]
        )
        study.run(asked, tiny.quiet())
        with closing(EventLog(asked.folder)) as log:
            runs.append([logged.event for logged in log.events()])
    first, second = runs
    assert computed(first) == computed(second)
    states = {event.state for event in first if isinstance(event, Ended)}
    assert states == {COMPLETE, PRUNED}  # early stopping was at work
    order = [[(e.trial, e.kind, e.epoch) for e in run] for run in runs]
    assert order[0] != order[1]  # and the timing was another
