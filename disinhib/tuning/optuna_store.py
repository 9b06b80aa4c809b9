"""A study in Optuna's own store, which optuna-dashboard and optuna.load_study open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import optuna
from optuna.distributions import json_to_distribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from disinhib.checks import refusal
from disinhib.errors import one_line
from disinhib.tuning.event_log import Asked, Ended, EpochDone, Logged, Record
from disinhib.tuning.suggest import STATES, value

FILE = "optuna.log"  # in the study's folder
ID = "study_id"  # the attribute that identifies our study there


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
    """`file` without the remains of a kill: a lock that nobody holds, an incomplete line.

    Only the study's own process writes the file, and the event log admits only one.
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
    """Writes a study into the storage at `url`, or into a file in its `folder`.

    `sign` is that of the metric: scores are stored as they were measured."""

    name, option = "optuna", "searcher.storage"

    def __init__(self, study: str, id: str, sign: int, url: str | None, folder: Path):
        self.study_name, self.id, self.sign = study, id, sign
        self.url, self.folder = url, folder
        self.address = url or str(folder)

    def load(self, records: Mapping[int, Record]) -> set[int]:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage, self.ids = open_storage(self.url, self.folder), {}
        study = optuna.create_study(
            storage=self.storage,
            study_name=self.study_name,
            direction="maximize" if self.sign > 0 else "minimize",
            load_if_exists=True,
        )
        if study.user_attrs.get(ID, self.id) != self.id:
            raise refusal("study", self.study_name, "a name that no other study there has")
        study.set_user_attr(ID, self.id)
        self.study_id = self.storage.get_study_id_from_name(self.study_name)
        return {trial.number for trial in study.get_trials(deepcopy=False)}

    def deliver(self, events: Sequence[Logged]) -> None:
        for logged in events:
            match logged.event:
                case Asked() as asked:
                    self._ask(asked)
                case EpochDone() as done:
                    self._report(done)
                case Ended() as ended:
                    self._end(ended)

    def close(self, records: Mapping[int, Record], whole: bool) -> None:
        """Does nothing: an interrupted trial stays unfinished, like a running one."""

    def _ask(self, asked: Asked) -> None:
        if self._id(asked.trial) is not None:
            return
        distributions = {
            name: json_to_distribution(text) for name, text in asked.point["distributions"].items()
        }
        about = {"rule": asked.config["rule"], "command": asked.config["command"]}
        self.storage.create_new_trial(
            self.study_id,
            create_trial(
                state=TrialState.RUNNING,
                params=asked.point["params"],
                distributions=distributions,
                user_attrs={**about, "seeds": asked.config["seeds"]},
            ),
        )

    def _report(self, done: EpochDone) -> None:
        trial = self._id(done.trial)
        if trial is not None and not self.storage.get_trial(trial).state.is_finished():
            self.storage.set_trial_intermediate_value(trial, done.epoch, self.sign * done.score)

    def _end(self, ended: Ended) -> None:
        trial = self._id(ended.trial)
        assert trial is not None  # its Asked event came before
        there = self.storage.get_trial(trial)
        if there.state.is_finished():
            return
        if ended.reason is not None:
            self.storage.set_trial_user_attr(trial, "reason", ended.reason)
        score = value(
            ended.state, [score for _, score in sorted(there.intermediate_values.items())]
        )
        values = None if score is None else [score]
        self.storage.set_trial_state_values(trial, STATES[ended.state], values)

    def _id(self, number: int) -> int | None:
        """The id of a trial in this storage; None if it is missing."""
        if number not in self.ids:
            with suppress(KeyError):
                self.ids[number] = self.storage.get_trial_id_from_study_id_trial_number(
                    self.study_id, number
                )
        return self.ids.get(number)
