"""A study in Optuna's own store, which optuna-dashboard and optuna.load_study open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.distributions import json_to_distribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from disinhib.checks import refusal
from disinhib.errors import one_line
from disinhib.tuning.event_log import ASKED, COMPLETE, EPOCH, Event, Record
from disinhib.tuning.suggest import DIRECTIONS, STATES

FILE = "optuna.log"  # in the study's folder
ID = "study_id"  # the attribute by which a study there is known as ours


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The database at `url`, or by default a journal file in `folder`.

    Raises ConfigError if there is no such database or it does not answer.
    """
    if url is None:
        return JournalStorage(JournalFileBackend(str(_mended(folder / FILE))))
    try:
        return RDBStorage(url)
    except Exception as error:  # drivers and sockets raise their own kinds
        allowed = f"null, or the URL of a database that answers ({one_line(error)})"
        raise refusal("searcher.storage", url, allowed) from error


def refuse_taken(url: str, study: str, resume: bool) -> None:
    """Raises ConfigError if the database at `url` has a study of that name that is not ours."""
    storage = open_storage(url, Path())
    names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
    if study in names and not resume:
        raise refusal("study", study, f"a new name ({url} has a study {study})")


def _mended(file: Path) -> Path:
    """`file` without what a kill leaves: a lock that nobody holds, a line cut short.

    Only the study's own process writes it, and the study's journal says that there is no other.
    """
    Path(f"{file}.lock").unlink(missing_ok=True)
    if file.exists():
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with file.open("r+b") as opened:
                opened.truncate(whole)
    return file


class OptunaStore:
    """Writes the study `name` into the storage at `url`, or into its `folder`."""

    name, option = "optuna", "searcher.storage"

    def __init__(self, study: str, id: str, mode: str, url: str | None, folder: Path):
        self.study_name, self.id, self.mode = study, id, mode
        self.url, self.folder = url, folder
        self.address = url or str(folder)

    def load(self) -> set[int]:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            storage=open_storage(self.url, self.folder),
            study_name=self.study_name,
            direction=DIRECTIONS[self.mode],
            load_if_exists=True,
        )
        if self.study.user_attrs.get(ID, self.id) != self.id:
            raise refusal("study", self.study_name, "a name that no other study there has")
        self.study.set_user_attr(ID, self.id)
        trials = self.study.get_trials(deepcopy=False)
        self.ids = {trial.number: trial._trial_id for trial in trials}
        self.epochs = {trial.number: set(trial.intermediate_values) for trial in trials}
        self.ended = {trial.number for trial in trials if trial.state.is_finished()}
        return set(self.ids)

    def deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.kind == ASKED:
                self._ask(event)
            elif event.kind == EPOCH:
                self._report(event)
            else:
                self._end(event)

    def close(self, records: Mapping[int, Record], whole: bool) -> None:
        """Nothing: an interrupted trial is as unfinished as one that runs."""

    def _ask(self, event: Event) -> None:
        if event.trial in self.ids:
            return
        point, config = event.body["point"], event.body["config"]
        distributions = {
            name: json_to_distribution(text) for name, text in point["distributions"].items()
        }
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=point["params"],
                distributions=distributions,
                user_attrs={name: config[name] for name in ("rule", "command", "seeds")},
            )
        )
        self.ids[event.trial] = self.study.get_trials(deepcopy=False)[event.trial]._trial_id
        self.epochs[event.trial] = set()

    def _report(self, event: Event) -> None:
        if event.epoch not in self.epochs[event.trial]:
            trial = optuna.Trial(self.study, self.ids[event.trial])
            trial.report(event.body["score"], event.epoch)
            self.epochs[event.trial].add(event.epoch)

    def _end(self, event: Event) -> None:
        if event.trial in self.ended:
            return
        state, reason = event.body["state"], event.body["reason"]
        if reason is not None:
            trial = optuna.Trial(self.study, self.ids[event.trial])
            trial.set_user_attr("reason", reason)
        scores = self.study.get_trials(deepcopy=False)[event.trial].intermediate_values
        value = scores[max(scores)] if state == COMPLETE else None
        self.study.tell(event.trial, value, state=STATES[state])
        self.ended.add(event.trial)
