"""Several studies side by side: what differs between them, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import pandas as pd

from analysis import selection, stats
from analysis.report import accuracy, contents, panels, tables
from analysis.report.accuracy import Pair, Tuning
from analysis.report.contents import Page, Report, Section
from analysis.report.panels import plot_data
from analysis.report.tables import NOTHING
from analysis.store import Refused, StudyRun
from disinhib.checks import flatten, in_hydra
from disinhib.tuning import space_tree

# Options that say where and how a study runs, not what it is; their first part, or whole.
ELSEWHERE = {"study", "out_dir", "tracking", "cluster", "checkpoints", "resume", "plan", "device",
             "gpu_id", "points", "grid", "experiment"}  # fmt: skip
SEEDS = {"seed", "seeds"}  # options in which two studies may differ and should agree
NAMED = 3  # options that are named if they differ
DIFFERS_NOTE = (
    "What the studies do not share: options that both have (where they run, left out), searched"
    " parameters with their ranges, code and packages. What is not listed is equal."
)
DIFFERENCES_NOTE = (
    "Accuracies in %, of each study's selected configuration of the rule (the best in its search;"
    " of several groups, or of a grid, on validation data) over n retrained seeds. p is corrected"
    " for all studies together."
)
METHOD_NOTE = "How each study was done, and the commands that give its numbers again."
SEARCH_NOTE = (
    "The best complete trial of each rule on validation data, and what finding it has cost. More"
    " trials have a better best one by chance alone. Epochs are summed over all seeds of a trial,"
    " hours over all trials, many of which may share a device."
)


class Versus(NamedTuple):
    """Two studies' test accuracies on a data set."""

    dataset: str
    first: str
    second: str
    numbers: pd.DataFrame  # accuracy.differences
    agreement: str  # `agreement`


def refuse_unlike(studies: Sequence[StudyRun]) -> None:
    """Raises Refused if the numbers of these studies must not be compared: their searches have
    another metric, or their data another split."""
    names = ",".join(study.name for study in studies)
    told = {
        "the same metric": [s.options["metric"] for s in studies if s.space is not None],
        "the same validation split": [contents.split(s) for s in studies],
    }
    for what, values in told.items():
        if len({*values}) > 1:
            given = ", ".join(map(str, dict.fromkeys(values)))
            raise Refused(f"study: given {names}, allowed are studies with {what} ({given})")


def page(reports: Sequence[Report]) -> Page:
    """Raises Refused as `_shared_data`."""
    names = [report.study.name for report in reports]
    shared = _shared_data(reports)
    joined = _results(reports, shared)
    differences = _differences(reports, shared)
    sections = []
    for dataset, first, second, rows, agree in differences:
        shown = accuracy.shown_differences(rows, first, second)
        title = f"Test accuracy on {dataset}: {first} minus {second}"
        note = contents.differences_note(f"{agree} {DIFFERENCES_NOTE}", rows)
        sections.append(Section(title, shown, note))
    for dataset, rows in joined.groupby("dataset", sort=False) if len(joined) else ():
        shown = accuracy.shown(rows)
        shown.insert(1, "study", list(rows["study"]))
        title = f"All retrained configurations on {dataset}"
        sections.append(Section(title, shown, contents.note(rows)))
    search = _search(reports, shared)
    if len(search):
        shown = tables.shown_search(search)
        sections.append(Section("Best of each rule in the search", shown, SEARCH_NOTE))
    count = len(reports)
    if differs := differing([report.study for report in reports]):
        table = pd.DataFrame(differs, columns=["what", *names])
        sections.append(Section("What differs", table, DIFFERS_NOTE, count, "differs"))
    table = pd.DataFrame(_method(reports), columns=["what", *names])
    sections.append(Section("How the studies were done", table, METHOD_NOTE, count, "method"))
    data = {report.study.name: _only(report, shared) for report in reports}
    counts = [f"{report.study.name}: {contents.counts(report.data)}" for report in reports]
    return Page(
        title=" and ".join(names) if count == 2 else ", ".join(names),
        subtitle="; ".join([*counts, contents.written()]),
        rules=list(
            dict.fromkeys(rule for report in reports for rule in contents.rules(report.data))
        ),
        summary=_summary(differences),
        sections=sections,
        warnings=[*_warnings(reports, shared, differences, search), *_of_each(reports)],
        panels=lambda: panels.panels(data, panels.COMPARED),
        provenance=[
            (f"{report.study.name}: {what}", value)
            for report in reports
            for what, value in contents.provenance(report)
        ],
        record={report.study.name: report.study.provenance for report in reports},
        numbers=search if joined.empty else joined,
    )


def _datasets(report: Report) -> dict[str, set[str]]:
    """The data sets of a study, each with the hashes under which it was used."""
    own = report.study.provenance["data"]
    hashes = {own["name"]: {own["sha256"]}} if len(report.data.trials) else {}
    for row in report.data.retrained.to_dict("records"):
        hashes.setdefault(row["dataset"], set()).add(row["data"])
    return hashes


def _shared_data(reports: Sequence[Report]) -> list[str]:
    """The data sets that all studies have. Raises Refused if there is none, or if one of them is
    another under the same name."""
    names = ",".join(report.study.name for report in reports)
    every = [_datasets(report) for report in reports]
    shared = [name for name in every[0] if all(name in own for own in every)]
    if not shared:
        given = "; ".join(", ".join(own) for own in every)
        raise Refused(f"study: given {names}, allowed are studies of the same data ({given})")
    for name in shared:
        if len(set[str]().union(*(own[name] for own in every))) > 1:
            raise Refused(
                f"study: given {names}, allowed are studies of the same data ({name} is not the"
                " same: other files or another split)"
            )
    return shared


def _only(report: Report, shared: Iterable[str]) -> plot_data.PlotData:
    """Its rows of these data sets, of each rule only the selected configuration."""
    chosen = [tuning for own in _selected(report).values() for tuning in own.values()]
    runs = {seed["run_id"] for one in chosen for seed in one.seeds if seed["dataset"] in shared}
    retrained = report.data.retrained
    own = report.study.provenance["data"]["name"] in shared
    return report.data._replace(
        trials=report.data.trials if own else report.data.trials[:0],
        retrained=retrained[retrained["run_id"].isin([*runs])],
    )


def _results(reports: Sequence[Report], shared: Sequence[str]) -> pd.DataFrame:
    """`accuracy.results` of all studies, with the column `study`, rule by rule."""
    rows = [
        {"study": report.study.name, **row}
        for report in reports
        for row in plot_data.records(report.results)
        if row["dataset"] in shared
    ]
    rows.sort(key=lambda row: (row["dataset"], row["rule"], row["depth"]))  # stable: study by study
    return pd.DataFrame(rows)


def _search(reports: Sequence[Report], shared: Sequence[str]) -> pd.DataFrame:
    """`tables.search` of all studies, with the column `study`, rule by rule."""
    rows = [
        {"rule": row["rule"], "study": report.study.name, **row}
        for report in reports
        if report.study.provenance["data"]["name"] in shared
        for row in plot_data.records(report.search)
    ]
    order = list(dict.fromkeys(row["rule"] for row in rows))
    return pd.DataFrame(sorted(rows, key=lambda row: order.index(row["rule"])))


def _selected(report: Report) -> dict[tuple[str, str], dict[int, Tuning]]:
    """What was selected, by (data set, rule) and depth."""
    of_rule: dict[tuple[str, str], dict[int, Tuning]] = {}
    place = lambda tuning: tuple(tuning.seeds[0][name] for name in ("dataset", "rule", "depth"))
    for (dataset, rule, depth), alike in plot_data.grouped(report.tunings, place).items():
        if best := accuracy.selected(alike):
            of_rule.setdefault((dataset, rule), {})[depth] = best
    return of_rule


def _differences(reports: Sequence[Report], shared: Sequence[str]) -> list[Versus]:
    """The first study against each other. A rule is compared at each depth that both have, or if
    there is none, at the depths that they have. On a data set, p is corrected for the number of
    comparisons with all studies."""
    first, *others = reports
    own = _selected(first)
    differences = []
    for dataset in shared:
        pairs = {other.study.name: _pairs(own, _selected(other), dataset) for other in others}
        numbers = accuracy.differences(chain(*pairs.values()))
        against = pd.Series([name for name, its in pairs.items() for _ in its], dtype=str)
        studies = {other.study.name: other.study for other in others}
        for name, rows in numbers.groupby(against, sort=False):
            agree = agreement((first.study, studies[str(name)]), rows)
            differences.append(Versus(dataset, first.study.name, str(name), rows, agree))
    return differences


def _pairs(
    own: Mapping[tuple[str, str], Mapping[int, Tuning]],
    its: Mapping[tuple[str, str], Mapping[int, Tuning]],
    dataset: str,
) -> list[Pair]:
    pairs = []
    for name, by_depth in own.items():
        theirs = its.get(name, {}) if name[0] == dataset else {}
        alike = [Pair(by_depth[n], theirs[n]) for n in by_depth if n in theirs]
        pairs += alike or [Pair(a, b) for a in by_depth.values() for b in theirs.values()]
    return pairs


def agreement(studies: Sequence[StudyRun], numbers: pd.DataFrame) -> str:
    """Whether two studies of which only the seeds differ have come to the same, or why that cannot
    be told. `numbers` are their `accuracy.differences`."""
    names = " and ".join(study.name for study in studies)
    differs = [what for what, *_ in _settings(studies)]
    if others := [what for what in differs if what not in SEEDS]:
        listed = ", ".join(others[:NAMED]) + " and more" * (len(others) > NAMED)
        return f"{names} need not agree: they differ in {listed}."
    rows = [row for row in plot_data.records(numbers) if not math.isnan(row["p"])]
    unknown = "no difference has an interval"
    if any(study.space is not None for study in studies):
        rows = [row for row in rows if min(row["first_repeats"], row["second_repeats"]) > 1]
        unknown = "with one tuning, its luck is not in the intervals (repeats=5 puts it in)"
        if not differs:
            rows, unknown = [], "they have the same seed"
    if not rows:
        return f"Whether {names} agree cannot be told: {unknown}."
    apart = [row["rule"] for row in rows if row["holm"] < 1 - stats.LEVEL]
    words = f"do not agree on {', '.join(dict.fromkeys(apart))}" if apart else "agree"
    return (
        f"{names} {words}: {len(apart) or 'none'} of {len(rows)} differences"
        f" {'are' if len(apart) > 1 else 'is'} significant (p < 0.05, Holm). The intervals say how"
        " large they may be."
    )


def _summary(differences: Sequence[Versus]) -> list[str]:
    lines = []
    for dataset, first, second, numbers, agree in differences:
        lines.append(f"{dataset}: {agree}")
        for row in numbers.to_dict("records"):
            if not pd.isna(row["mean"]):
                words = "above" if row["mean"] >= 0 else "below"
                lines.append(
                    f"{row['rule']}, {dataset}: {first} is {abs(row['mean']):.2f} points {words}"
                    f" {second}, 95 % interval {tables.interval(row['low'], row['high'], '+.2f')}."
                )
    return lines


def differing(studies: Sequence[StudyRun]) -> list[tuple[str, ...]]:
    """What is not the same in all studies: (what, its value in each)."""
    lines: dict[str, list[str]] = {}
    about = [study.provenance for study in studies]
    lines["code"] = [
        f"disinhib {one['code']['version']}, commit {one['code']['commit'] or 'unknown'}"
        + (", with uncommitted changes" if one["code"]["diff"] else "")
        for one in about
    ]
    lines["python"] = [one["python"] for one in about]
    for name in dict.fromkeys(name for one in about for name in one["packages"]):
        lines[name] = [one["packages"].get(name) or NOTHING for one in about]
    return [*_settings(studies), *_unequal(lines)]


def _settings(studies: Sequence[StudyRun]) -> list[tuple[str, ...]]:
    """The options and searched parameters that are not the same in all studies."""
    lines: dict[str, list[str]] = {}
    options = [flatten(study.options) for study in studies]
    spaces = [(study.space or {"parameters": {}})["parameters"] for study in studies]
    searched = {space_tree.option_of(name) for space in spaces for name in space}
    apart = ELSEWHERE | _varied(studies)  # options, and groups of them
    for name in options[0]:
        groups = accumulate(name.split("."), "{}.{}".format)
        outside = name in searched or not apart.isdisjoint(groups)
        if not outside and all(name in own for own in options):
            lines[name] = [in_hydra(own[name]) for own in options]
    if all(study.space is not None for study in studies):
        for name in dict.fromkeys(name for space in spaces for name in space):
            lines[f"search.{name}"] = [space_tree.words(space.get(name)) for space in spaces]
    return _unequal(lines)


def _unequal(lines: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    return [(what, *values) for what, values in lines.items() if len({*values}) > 1]


def _varied(studies: Sequence[StudyRun]) -> set[str]:
    """What the axes of grids set: each configuration has its own."""
    grids = [study.options.get("grid") or {} for study in studies]
    alternatives = [axis.values() for grid in grids for axis in grid.values()]
    overrides = [one for alternative in alternatives for each in alternative for one in each]
    return {override.partition("=")[0] for override in overrides}


def _method(reports: Sequence[Report]) -> list[tuple[str, ...]]:
    """How each study was done, side by side: (what, how in each)."""
    methods = [dict(contents.method(report)) for report in reports]
    names = dict.fromkeys(what for method in methods for what in method)
    return [(what, *(method.get(what, NOTHING) for method in methods)) for what in names]


def _warnings(
    reports: Sequence[Report],
    shared: Sequence[str],
    differences: Sequence[Versus],
    search: pd.DataFrame,
) -> list[str]:
    """What a reader of the comparison must know, a line each."""
    lines = []
    for report in reports:
        if alone := [name for name in _datasets(report) if name not in shared]:
            words = f"{', '.join(alone)}, which not all studies have"
            lines.append(f"left out of {report.study.name}: {words}")
    for versus in differences:
        lines += accuracy.close_pairs(versus.numbers, versus.first, versus.second)
        for row in versus.numbers.to_dict("records"):
            for name in ("depth", "epochs"):
                one, other = row[f"first_{name}"], row[f"second_{name}"]
                if one != other:
                    word = {"depth": "hidden layers", "epochs": "epochs"}[name]
                    lines.append(f"{row['rule']}: retrained with {one} and {other} {word}")
    for rule, own in search.groupby("rule", sort=False) if len(search) else ():
        if max(own["epochs"]) > selection.UNEQUAL * min(own["epochs"]):
            spent = zip(own["study"], own["trials"], own["epochs"], strict=True)
            words = ", ".join(f"{name} {n} trials of {epochs} epochs" for name, n, epochs in spent)
            lines.append(f"{rule}: the searches had unequal budgets: {words}")
    if not differences:
        lines.append("no rule was retrained in two studies: there is no test accuracy to compare")
    return list(dict.fromkeys(lines))


def _of_each(reports: Sequence[Report]) -> list[str]:
    return [f"{report.study.name}: {line}" for report in reports for line in report.warnings]
