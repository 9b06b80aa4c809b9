"""`searcher.deterministic=true`: the same study, however its trials are timed."""

import io
import random
import time
from contextlib import closing

import pytest
from rich.console import Console

from disinhib.tuning import event_log, options, study
from disinhib.tuning.worker import TrainingTrial

MACHINE = ("epoch_seconds", "compilations", "peak_memory_mb")
pytestmark = pytest.mark.slow


def unpunctual_trial():
    """Real training, each epoch of which takes some time more. (A local class: Ray sends it to
    workers, which cannot import this file.)"""

    class UnpunctualTrial(TrainingTrial):
        def _epoch(self):
            time.sleep(random.uniform(0, 0.4))
            return super()._epoch()

    return UnpunctualTrial


def events(folder):
    with closing(event_log.Journal(folder)) as opened:
        return opened.events()


def told(found):
    """What trials were and did, in the order of their numbers, without what the machine did."""
    outcome = {}
    for event in found:
        body = dict(event.body)
        if event.kind == event_log.EPOCH:
            metrics = body["metrics"].items()
            body = {name: value for name, value in metrics if name not in MACHINE}
        outcome[event.trial, event.kind, event.epoch] = body
    return dict(sorted(outcome.items()))


def test_two_runs_propose_and_measure_the_same(tmp_path):
    found = []
    for name, trainable in (("punctual", TrainingTrial), ("not", unpunctual_trial())):
        asked = options.compose(
            [
                *("experiment=smoke", "trials=14", "epochs=4", "searcher.deterministic=true"),
                *("searcher.batch=5", "searcher.n_startup_trials=1", "scheduler.grace_period=1"),
                *("cluster.max_concurrent=2", f"study={name}", f"out_dir={tmp_path}"),
            ]
        )
        study.run(asked, Console(file=io.StringIO()), trainable)
        found.append(events(asked.folder))
    assert told(found[0]) == told(found[1])
    states = {event.body["state"] for event in found[0] if event.kind == event_log.ENDED}
    assert states == {event_log.COMPLETE, event_log.PRUNED}  # early stopping was at work
    order = [[(e.trial, e.kind, e.epoch) for e in run] for run in found]
    assert order[0] != order[1]  # and the timing was another
