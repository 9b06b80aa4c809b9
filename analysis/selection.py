"""`python -m analysis.selection [study=NAME] [top=1]`: selects the best trials of a study.

Uses validation data only. Writes the selected trials to a file for `python -m analysis.retrain`.
Prints how close the runners-up were, and warns if a best value lies at the edge
of its range, if trials nearby failed, if the groups had unequal budgets or few complete trials, if
a choice was hardly tried, or if a trial has seen the test set.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from analysis import runs, store as stores
from analysis.runs import SEARCHED
from analysis.store import Refused, StudyRun
from disinhib import cli, hydra_config
from disinhib.checks import COUNT, FLAG, OPTIONAL_TEXT, TEXT, Option, flatten
from disinhib.errors import masked, nearest
from disinhib.metrics import SELECTION, Criterion, measures
from disinhib.rules import RULES, reported_name
from disinhib.tuning import mlflow_connection, mlflow_settings
from disinhib.tuning.event_log import COMPLETE, FAILED, REPEAT
from disinhib.tuning.space_tree import RULE as OF_RULE, option_of, parameters_for, same
from disinhib.tuning.turns import TRIALS

HOW = (
    "Of the trials of each {group} that ran their whole budget (COMPLETE): the {number} with the"
    " best {metric} after the last epoch, mean over a trial's seeds; of equals, the one that was"
    " tried first."
)
HOW_DEFAULTS = " And of each {group} the trial with the published defaults, whatever its score."
TRAINER = "trainer"
PER = f"the groups: {TRAINER} (the learning rule), or options that were searched"
OPTIONS = (
    stores.STUDY,
    stores.TRACKING,
    Option("top", 1, COUNT, "trials to select of each group"),
    Option("per", [TRAINER], cli.list_of(TEXT), PER),
    Option("metric", None, OPTIONAL_TEXT, "the score, of the validation data; null: the study's"),
    Option("defaults", False, FLAG, "select the trials of the published defaults, too"),
    Option("selected", "selected.yaml", TEXT, "file to write"),
)
COMMAND = cli.Command("analysis.selection", __doc__, OPTIONS)
WHERE = (stores.TRACKING.name, "selected")  # options of places
RUNNERS_UP = 3  # shown
EDGE = 0.05  # share of a range, on its scale: a value as close to an end is at the edge
NEXT_BEST = 4  # complete trials of the rule, of which it is said how many lie at the same edge
FEW_COMPLETE = 5  # complete trials of a group
RARE = 3  # trials that had a choice
RARE_SHARE = 0.05  # of the trials that could have had it
NEIGHBOURS = 8  # nearest trials of the same rule, around a selected one
TOO_MANY_FAILED = 0.25  # share of the neighbours
UNEQUAL = 1.25  # ratio of the largest and the smallest number of epochs of a group

Row = Mapping[Any, Any]  # of `runs.trials`


class Choice(NamedTuple):
    """A selected trial."""

    group: dict[str, str]
    rank: int  # in its group, from 1; 0: it has the published defaults, whatever its score
    row: Row
    tied: list[int]  # other complete trials of the group with exactly this score
    runners_up: list[tuple[int, float]]  # trial, by how much it is worse; only with the last rank


def select(trials: pd.DataFrame, per: Sequence[str], top: int, metric: Criterion) -> list[Choice]:
    """The `top` best complete trials of each group, by HOW. Leaves out a group without any.

    Raises Refused if a name in `per` was not searched.
    """
    chosen = []
    for group, rows in groups(trials, per):
        complete = [row for row in rows if row["state"] == COMPLETE]
        ranked = sorted(complete, key=lambda row: (-metric.sign * row["score"], row["trial"]))
        for rank, row in enumerate(ranked[:top], start=1):
            tied = [o["trial"] for o in ranked if o["score"] == row["score"] and o is not row]
            behind = ranked[top : top + RUNNERS_UP] if rank == min(top, len(ranked)) else []
            gaps = [(other["trial"], abs(other["score"] - row["score"])) for other in behind]
            chosen.append(Choice(group, rank, row, tied, gaps))
    return chosen


def how(
    metric: str,
    per: Sequence[str] = (TRAINER,),
    top: int = 1,
    defaults: bool = False,
    repeated: bool = False,
) -> str:
    """How trials are selected, in words; `repeated` says that the tuning was."""
    of_repeat = [REPEAT] * repeated
    group = lambda names: " and ".join(["rule" if n == TRAINER else n for n in names] + of_repeat)
    number = "one" if top == 1 else f"{top}"
    words = HOW.format(group=group(per), number=number, metric=metric)
    return words + HOW_DEFAULTS.format(group=group([TRAINER])) * defaults


def metric_of(study: StudyRun, given: str | None = None) -> Criterion:
    """The metric `given`, else the study's. Raises Refused unless it is one of validation data that
    the study has measured."""
    name = given or study.options["metric"]
    if name not in SELECTION:
        who = "given" if given else f"study {study.name} was tuned by"
        allowed = f"one of {', '.join(SELECTION)} (validation data only)"
        raise Refused(f"metric: {who} {name}, allowed is {allowed}")
    if not measures(study.options, name):
        raise Refused(
            f"metric: given {name}, but study {study.name} ran without diagnostics.alignment=true"
        )
    return SELECTION[name]


def groups(trials: pd.DataFrame, per: Sequence[str]) -> list[tuple[dict[str, str], list[Row]]]:
    """The trials by the values of `per` and, if tuning was repeated, by repeat, in the order in
    which they were first tried."""
    parameters = [name.removeprefix(SEARCHED) for name in trials if name.startswith(SEARCHED)]
    columns: dict[str, list[str]] = {}
    for name in per:
        # By rule: back-propagation through the E-I network is another rule than through the MLP.
        searched = [SEARCHED + parameter for parameter in parameters_for(name, parameters)]
        columns[name] = ["rule"] if name == TRAINER else searched
        if not columns[name]:
            known = {option_of(parameter) for parameter in parameters}
            allowed = ", ".join(sorted(known | {TRAINER}))
            raise Refused(f"per: given {name}, allowed is one of {allowed}{nearest(name, known)}")
    repeated = len({*trials["repeat"]}) > 1
    by_values: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in trials.to_dict("records"):
        values: dict[str, str] = {
            name: next((row[column] for column in own if isinstance(row[column], str)), "none")
            for name, own in columns.items()
        }
        values |= {REPEAT: str(row["repeat"])} if repeated else {}
        by_values.setdefault(tuple(values.items()), []).append(row)
    return [(dict(key), rows) for key, rows in by_values.items()]


@cache
def published(rule: str) -> Mapping[str, Any]:
    """The published defaults of a rule, by option; of one that this version lacks, none."""
    for trainer, entry in RULES.items():
        for circuit in entry.circuits:
            if reported_name(trainer, circuit) == rule:
                groups = [f"trainer={trainer}", f"model/vf={circuit}"]
                return flatten(hydra_config.compose(hydra_config.TRAINING, groups)[0])
    return {}


def default_trials(trials: pd.DataFrame, space: Mapping[str, Any]) -> dict[tuple[str, int], Row]:
    """The first trial of each rule and repeat all of whose searched options have their published
    defaults."""
    defaults: dict[tuple[str, int], Row] = {}
    for row in trials.to_dict("records"):
        values = {
            option_of(name): parameter["value"]
            for name, parameter in runs.parameters_of(space, row).items()
            if name != OF_RULE
        }
        own = published(row["rule"])
        if all(option in own and same(own[option], value) for option, value in values.items()):
            defaults.setdefault((row["rule"], row["repeat"]), row)
    return defaults


def warnings(
    trials: pd.DataFrame,
    chosen: Sequence[Choice],
    per: Sequence[str],
    space: Mapping[str, Any] | None,
    metric: Criterion,
    budget: str = TRIALS,
) -> list[str]:
    """Reasons to doubt a selection, a line each. `budget` is the study's option."""
    rows = trials.to_dict("records")
    lines = []
    if space is not None:
        for choice in chosen:
            lines += _on_the_edge(choice, rows, space, metric)
            lines += _failed_nearby(choice, rows, space)
    of_groups = groups(trials, per)
    if budget == TRIALS:  # else it was kept as asked
        lines += _unequal_budgets(of_groups)
    if space is not None:
        lines += _rarely_tried(rows, space)
    for group, of_group in of_groups:
        name = _words(group)
        complete = sum(row["state"] == COMPLETE for row in of_group)
        if complete == 0:
            lines.append(f"{name}: no trial ran its whole budget, none is selected")
        elif complete < FEW_COMPLETE:
            lines.append(
                f"{name}: {complete} of {len(of_group)} trials ran the whole budget; the best of so"
                " few says little about the rule"
            )
    saw_test = [str(row["trial"]) for row in rows if row["saw_test"]]
    if saw_test:
        lines.append(
            f"trial{'s' * (len(saw_test) > 1)} {', '.join(saw_test)} evaluated the test set during"
            " the search; it is not used here, but may have influenced the search"
        )
    return lines


def _on_the_edge(
    choice: Choice, rows: Sequence[Row], space: Mapping[str, Any], metric: Criterion
) -> list[str]:
    """A warning for each number of a selected trial that lies at an end of its range. One of many
    parameters lies there by chance, so the next best trials are counted that lie there too."""
    row = choice.row
    complete = [o for o in rows if (o["rule"], o["state"]) == (row["rule"], COMPLETE)]
    others = [o for o in complete if o["trial"] != row["trial"]]
    others.sort(key=lambda other: (-metric.sign * other["score"], other["trial"]))
    lines = []
    for name, parameter in runs.parameters_of(space, row).items():
        if (end := _edge(parameter)) is None:
            continue
        its = [runs.parameters_of(space, other).get(name) for other in others]
        near = [_edge(one) == end for one in its if one is not None][:NEXT_BEST]
        lines.append(
            f"{_named(choice)}: {option_of(name)}={parameter['value']:.4g} lies at the {end}"
            f" edge of its range ({parameter['low']:g} to {parameter['high']:g})"
            + (f"; next best trials there: {sum(near)} of {len(near)}" if near else "")
        )
    return lines


def _edge(parameter: Mapping[str, Any]) -> str | None:
    """At which end of its range a number lies, if at one."""
    if parameter["kind"] == "categorical":
        return None
    position = runs.position(parameter)
    if min(position, 1 - position) > EDGE:
        return None
    return "lower" if position < 0.5 else "upper"


def _failed_nearby(choice: Choice, rows: Sequence[Row], space: Mapping[str, Any]) -> list[str]:
    """A warning if many of the nearest trials of the same rule failed: fresh seeds may fail too."""
    own = runs.parameters_of(space, choice.row)

    def square(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        if one["kind"] == "categorical":
            return one["value"] != other["value"]
        return (runs.position(one) - runs.position(other)) ** 2

    def distance(row: Row) -> float:
        """Euclidean and squared, every range of length 1. A different choice, or a parameter that
        only one of the two has, counts as a whole range."""
        its = runs.parameters_of(space, row)
        alone = len(own.keys() ^ its.keys())
        return alone + sum(square(own[name], its[name]) for name in own.keys() & its.keys())

    trial, rule = choice.row["trial"], choice.row["rule"]
    others = [row for row in rows if row["rule"] == rule and row["trial"] != trial]
    near = sorted(others, key=distance)[:NEIGHBOURS]
    failed = sum(row["state"] == FAILED for row in near)
    if not failed or failed < TOO_MANY_FAILED * len(near):
        return []
    return [f"{_named(choice)}: {failed} of the {len(near)} trials nearest to it failed"]


def _rarely_tried(rows: Sequence[Row], space: Mapping[str, Any]) -> list[str]:
    """A warning of the choices that hardly any trial had, and fewer than an equal share."""
    tried: dict[str, Counter[str]] = {}
    for row in rows:
        for name, parameter in runs.parameters_of(space, row).items():
            if parameter["kind"] == "categorical":
                none_yet = Counter(dict.fromkeys(map(str, parameter["choices"]), 0))
                tried.setdefault(name, none_yet)[str(parameter["value"])] += 1
    rare = [
        f"{name}={choice} ({count} of {counts.total()})"
        for name, counts in tried.items()
        for choice, count in counts.items()
        if count < min(max(RARE, RARE_SHARE * counts.total()), counts.total() / len(counts))
    ]
    return [f"hardly tried (trials): {', '.join(rare)}"] if rare else []


def _unequal_budgets(groups: Sequence[tuple[dict[str, str], list[Row]]]) -> list[str]:
    """A warning if the groups, each over all its repeats, had unequal budgets: repeats of one rule
    nearly always differ, where trials are stopped early."""
    over_repeats: dict[str, list[Row]] = {}
    for group, rows in groups:
        own = {name: value for name, value in group.items() if name != REPEAT}
        over_repeats.setdefault(_words(own), []).extend(rows)
    budgets = [(name, len(rows), spent(rows)) for name, rows in over_repeats.items()]
    counts, epochs = {count for _, count, _ in budgets}, [spent for *_, spent in budgets]
    if not budgets or (len(counts) == 1 and max(epochs) <= UNEQUAL * min(epochs)):
        return []
    words = ", ".join(f"{name} {count} trials of {spent} epochs" for name, count, spent in budgets)
    return [f"the groups had unequal budgets: {words}"]


def spent(trials: Iterable[Mapping[str, Any]]) -> int:
    """Epochs trained in all these trials, over all seeds."""
    return sum(row["epochs"] * len(row["seeds"]) for row in trials)


def _named(choice: Choice) -> str:
    return f"trial {choice.row['trial']} ({choice.row['rule']})"


def _words(group: Mapping[str, str]) -> str:
    return ", ".join(
        value if name == TRAINER else f"{name}={value}" for name, value in group.items()
    )


def content(
    study: StudyRun,
    uri: str,
    database: str | None,
    chosen: Sequence[Choice],
    selected_by: Mapping[str, Any],
    warned: list[str],
) -> dict[str, Any]:
    """The content of `selected.yaml`; `database` is the store's file, if it is one, as seen from
    there; `selected_by` has the fields of `runs.HOW_SELECTED`."""
    return {
        "study": study.name,
        "study_run": study.run.info.run_id,
        "tracking_uri": masked(uri),
        "database": database,
        **selected_by,
        "selected": [
            {
                "trial": choice.row["trial"],
                "run_id": choice.row["run_id"],
                "group": dict(choice.group),  # or YAML would write the second as an alias
                "rank": choice.rank,
                "score": choice.row["score"],
                "tied_with": choice.tied,
                "command": choice.row["command"],
            }
            for choice in chosen
        ],
        "warnings": warned,
    }


@mlflow_settings.requests()
def main(arguments: list[str]) -> int:
    options = COMMAND.parse(arguments)
    store = stores.connect(stores.address(options["tracking.uri"]))
    study = stores.find_study(store, options["study"])
    print(stores.said(store, study), flush=True)
    stores.load_plugins(study.provenance)
    runs.refuse_missing(store, study)
    direction = metric_of(study, options["metric"])
    metric = study.options["metric"] = options["metric"] or study.options["metric"]
    per, top = options["per"], options["top"]
    trials, dropped = runs.trials(store, study)
    choices = select(trials, per, top, direction)
    if not choices:
        raise Refused(f"study {study.name}: none of its {len(trials)} trials ran its whole budget")
    warning_lines = warnings(
        trials, choices, per, study.space, direction, study.options.get("budget", TRIALS)
    )
    if options["defaults"]:
        of_defaults, lacking = _defaults(trials, study, choices)
        choices += of_defaults
        warning_lines += lacking
    file = Path(options["selected"])
    database = mlflow_connection.sqlite_file(store.uri)
    seen = None if database is None else os.path.relpath(database, file.absolute().parent)
    repeated = len({*trials["repeat"]}) > 1
    what = {name: value for name, value in options.items() if name not in WHERE}
    selected_by = {
        "metric": metric,
        "rule": how(metric, per, top, options["defaults"], repeated),
        "per": per,
        "top": top,
        "command": COMMAND.line({**what, "study": study.name}),
    }
    selected = content(study, store.uri, seen, choices, selected_by, warning_lines)
    runs.write(file, yaml.safe_dump(selected, sort_keys=False), "selected")
    print(f"study {study.name}: selected of {len(trials)} trials ({len(dropped)} left out)")
    for reason in dropped:
        print(f"left out: {reason}")
    print(selected_by["rule"])
    for choice in choices:
        print(_line(choice, metric))
    for line in warning_lines:
        print(f"warning: {line}")
    print(f"written: {options['selected']}")
    return 0


def _defaults(
    trials: pd.DataFrame, study: StudyRun, choices: Sequence[Choice]
) -> tuple[list[Choice], list[str]]:
    """(the trials of the published defaults that are not among `choices`, a line for each rule that
    has none). Raises Refused if nothing was searched."""
    if study.space is None:
        raise Refused(f"defaults: given true, but study {study.name} has searched nothing")
    there = default_trials(trials, study.space)
    chosen = {choice.row["run_id"] for choice in choices}
    new, lacking = [], []
    for group, rows in groups(trials, [TRAINER]):
        row = there.get((group[TRAINER], rows[0]["repeat"]))
        if row is None:
            words = "no trial has the published defaults of all searched options"
            lacking.append(f"{_words(group)}: {words}")
        elif row["state"] == FAILED:
            words = "the trial of the published defaults failed"
            lacking.append(f"{_words(group)}: {words} ({row['reason']})")
        elif row["run_id"] not in chosen:
            new.append(Choice(group, 0, row, [], []))
    return new, lacking


def _line(choice: Choice, metric: str) -> str:
    if choice.rank == 0:
        state = "" if choice.row["state"] == COMPLETE else f", {choice.row['state']}"
        return f"{_words(choice.group)}, published defaults: trial {choice.row['trial']}{state}"
    behind = ", ".join(f"trial {n} by {gap:.4g}" for n, gap in choice.runners_up)
    ties = f"; as good: trials {', '.join(map(str, choice.tied))}" if choice.tied else ""
    return (
        f"{_words(choice.group)}, rank {choice.rank}: trial {choice.row['trial']},"
        f" {metric} {choice.row['score']:.4g}{ties}" + (f"; next {behind}" if behind else "")
    )


if __name__ == "__main__":
    cli.run(main)
