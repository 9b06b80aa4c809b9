"""A study in Optuna's own store, which optuna-dashboard and optuna.load_study open.

Beside the study, NAME, each rule of a space of several has one of its own, NAME/RULE, with its
trials that have ended: importances and slices over the trials of several rules would mean nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import optuna
from optuna.distributions import json_to_distribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from disinhib.checks import refusal
from disinhib.errors import one_line
from disinhib.tuning.event_log import REPEAT, Asked, Ended, EpochDone, Logged, Objective, Record
from disinhib.tuning.space_tree import RULE
from disinhib.tuning.suggest import STATES, value

FILE = "optuna.log"  # in the study's folder
ID = "study_id"  # the attribute that identifies our study there
TRIAL = "trial"  # the attribute of a trial of a rule's own study: its number in the study


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The database at `url`, or by default a journal file in `folder`.

    Raises ConfigError if there is no such database or it does not answer.
    """
    if url is None:
        file = folder / FILE
        # A kill may have left a lock that nobody holds, and an incomplete line. Only the process
        # that has the study's event log open writes this file.
        Path(f"{file}.lock").unlink(missing_ok=True)
        if file.exists():
            os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
        return JournalStorage(JournalFileBackend(str(file)))
    try:
        return RDBStorage(url)
    except Exception as error:  # drivers and sockets raise their own kinds
        allowed = f"null, or the URL of a database that answers ({one_line(error)})"
        raise refusal("searcher.storage", url, allowed) from error


def refuse_taken(url: str, study: str, resume: bool) -> None:
    """Raises ConfigError if the database at `url` has a study of that name that is not ours."""
    for name in optuna.get_all_study_names(open_storage(url, Path())):
        if not resume and (name == study or name.startswith(f"{study}/")):
            raise refusal("study", study, f"a new name ({url} has a study {name})")


def delete_study(url: str, id: str) -> bool:
    """Deletes a study, with those of its rules, from the database at `url`; returns whether it was
    there."""
    return _delete(open_storage(url, Path()), id)


def _delete(storage: BaseStorage, id: str) -> bool:
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    own = [summary.study_name for summary in summaries if summary.user_attrs.get(ID) == id]
    for name in own:
        optuna.delete_study(study_name=name, storage=storage)
    return bool(own)


class OptunaStore:
    """Writes a study into the storage at `url`, or into a file in its `folder`.

    Scores of the `objective` are stored as they were measured."""

    name, option = "optuna", "searcher.storage"

    def __init__(self, study: str, id: str, objective: Objective, url: str | None, folder: Path):
        self.study_name, self.id = study, id
        self.metric, self.sign = objective
        self.url, self.folder = url, folder
        self.address = url or FILE  # beside the log, wherever that is

    def load(self, records: Mapping[int, Record]) -> set[int]:
        self.storage = open_storage(self.url, self.folder)
        self._forget_earlier_name()
        self.study_id = self._open(self.study_name)
        id_of = partial(self.storage.get_trial_id_from_study_id_trial_number, self.study_id)
        count = self.storage.get_n_trials(self.study_id)
        self.ids = {number: id_of(number) for number in range(count)}
        self.of_rules: dict[str, tuple[int, set[int]]] = {}  # rule -> its study, and what that has
        for trial in self.storage.get_all_trials(self.study_id, deepcopy=False):
            self._copy_to_rule(trial.number, trial)  # a kill may have come between
        return set(self.ids)

    def _open(self, name: str) -> int:
        """Returns the id of the study of that name, which is made if it is not there."""
        study = optuna.create_study(
            storage=self.storage,
            study_name=name,
            direction="maximize" if self.sign > 0 else "minimize",
            load_if_exists=True,
        )
        if study.user_attrs.get(ID, self.id) != self.id:
            raise refusal("study", name, "a name that no other study there has")
        study.set_user_attr(ID, self.id)
        with warnings.catch_warnings():  # unchanged, and marked experimental, since Optuna 3.2
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([self.metric])
        return self.storage.get_study_id_from_name(name)

    def _copy_to_rule(self, number: int, trial: FrozenTrial) -> None:
        """Adds a trial, if it has ended, to the study of its rule, once."""
        if RULE not in trial.params or not trial.state.is_finished():
            return
        rule = trial.user_attrs["rule"]
        if rule not in self.of_rules:
            study = self._open(f"{self.study_name}/{rule}")
            there = self.storage.get_all_trials(study, deepcopy=False)
            self.of_rules[rule] = study, {one.user_attrs[TRIAL] for one in there}
        study, numbers = self.of_rules[rule]
        if number not in numbers:
            trial = deepcopy(trial)  # the storage may have given its own
            trial.set_user_attr(TRIAL, number)
            trial.params = {n: v for n, v in trial.params.items() if n != RULE}
            kinds = trial.distributions.items()
            trial.distributions = {n: kind for n, kind in kinds if n != RULE}
            self.storage.create_new_trial(study, trial)
            numbers.add(number)

    def _forget_earlier_name(self) -> None:
        """Optuna renames no study: one that has been renamed is written again."""
        summaries = optuna.get_all_study_summaries(self.storage, include_best_trial=False)
        if not any(summary.study_name == self.study_name for summary in summaries):
            _delete(self.storage, self.id)

    def deliver(self, events: Sequence[Logged]) -> None:
        known: dict[int, FrozenTrial] = {}  # one question of a store for each
        for _, _, event in events:
            if isinstance(event, Asked):
                if event.trial not in self.ids:
                    self.ids[event.trial] = self._create(event)
                continue
            trial = self.ids[event.trial]
            if trial not in known:
                known[trial] = self.storage.get_trial(trial)
            if known[trial].state.is_finished():
                continue
            if isinstance(event, EpochDone):
                score = self.sign * event.score
                self.storage.set_trial_intermediate_value(trial, event.epoch, score)
                continue
            if not isinstance(event, Ended):
                continue
            if event.reason is not None:
                self.storage.set_trial_user_attr(trial, "reason", event.reason)
            there = self.storage.get_trial(trial)
            scores = [score for _, score in sorted(there.intermediate_values.items())]
            last = value(event.state, scores)
            values = None if last is None else [last]
            self.storage.set_trial_state_values(trial, STATES[event.state], values)
            self._copy_to_rule(event.trial, self.storage.get_trial(trial))

    def close(self, records: Mapping[int, Record], whole: bool) -> None:
        """Does nothing: an interrupted trial stays unfinished, like a running one."""

    def _create(self, asked: Asked) -> int:
        """Returns the id of the new trial in this storage."""
        point, config = asked.point, asked.config
        trial = create_trial(
            state=TrialState.RUNNING,
            params=point["params"],
            distributions={n: json_to_distribution(d) for n, d in point["distributions"].items()},
            user_attrs={
                **{name: config[name] for name in ("rule", "command", "seeds")},
                **{name: tag for name, tag in asked.tags.items() if name == REPEAT},
            },
        )
        return self.storage.create_new_trial(self.study_id, trial)
