"""What a report says, before it is written in any form: numbers, notes, warnings, provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup

from analysis import runs, selection, store as stores
from analysis.report import accuracy, panels, tables
from analysis.report.panels import hardness, plot_data
from analysis.report.panels.plot_data import PlotData
from analysis.report.panels.retraining import CURVES
from analysis.selection import TRAINER, Choice
from analysis.store import Refused, Store, StudyRun
from disinhib.checks import in_hydra
from disinhib.data import DATASETS
from disinhib.metrics import SELECTION
from disinhib.rules import COMPETITORS
from disinhib.tuning.early_stopping import EARLY_STOPPING
from disinhib.tuning.event_log import COMPLETE, FAILED
from disinhib.tuning.suggest import SAMPLERS
from disinhib.tuning.turns import TRIALS

SEARCH_NOTE = (
    "The search budget of each rule. Epochs are summed over all seeds of a trial, hours over all"
    " trials, many of which may share a device. Pruned trials were stopped by the scheduler; failed"
    " trials diverged or raised an error. Only complete trials compete."
)
WINNERS_NOTE = (
    "The searched options of the trials that were retrained (or else of each rule's best one), the"
    " ranges in which they were searched, and the published defaults."
)
DEFAULTS_NOTE = (
    "What tuning has gained: of each rule the selected trial, and the one with the published"
    " defaults of all searched options, both retrained. Options that the study has fixed are the"
    " same in both."
)
TARGET_NOTE = (
    "The last columns are what it takes until the expected best score of a rule reaches one that"
    " every rule has reached with drawn configurations."
)
METHOD_NOTE = (
    "What the numbers rest on, and the commands that give them again. All options are in the file"
    " config.yaml of the study's run in MLflow."
)


# How often the intervals hold the truth, in % of simulated studies: the lowest in the table of
# docs/results.md, rounded down, but for normal data's mean (exact: Student's t) and the 3 seeds
# (1,000 studies, with benchmarks.coverage). tests/test_stats.py simulates each anew.
COVERS = {
    "mean": 95,
    "mean, skewed": 92,
    "mean, strongly skewed": 87,
    "another study's mean": 95,
    "another study's mean, strongly skewed": 91,
    "difference": 91,
    "P": 89,
    "P, strongly skewed": 87,
    # One tuning, and the truth is that of rules whose tuning varies as much as training.
    "difference, 3 seeds, of rules": 76,
    "difference, 10 seeds, of rules": 35,
    "difference, one tuning and several, of rules": 79,
}
# Of studies that compare three such rules with an equally good bp: in how many one has p < 0.05.
FALSE_ALARMS = {3: 23, 10: 87}  # by number of seeds of the one tuning
MEAN_COVERS = (
    f"Such intervals cover the mean in {COVERS['mean']} % of cases if data are normal, in"
    f" {COVERS['mean, skewed']} % or more if they are skewed, in"
    f" {COVERS['mean, strongly skewed']} % or more if strongly"
)
ANOTHER_NOTE = (
    f"In the interval “{accuracy.ANOTHER}” lies that of a study like this one with other seeds, in"
    f" {COVERS[accuracy.ANOTHER]} % of cases"
    f" ({COVERS[f'{accuracy.ANOTHER}, strongly skewed']} % if data are strongly skewed); in that of"
    " the mean itself it lies less often, as it varies, too."
)
COMPARED_NOTE = (
    "Rules with one tuning each and the same seeds are compared in pairs, others by their means"
    " (Welch's t test; means of repeats, if there are several). p is corrected for the number of"
    " comparisons (Holm). P is the probability that another network of the first is better than one"
    " of the second: from a new seed and, with repeats, tuned again. The intervals cover"
    f" {COVERS['difference']} % of cases or more, those of P {COVERS['P']} %"
    f" ({COVERS['P, strongly skewed']} % if data are strongly skewed)"
)
ONCE_COMPARED_NOTE = (
    "With one tuning, difference, p and P are of these configurations, not of the rules: they leave"
    " out the luck of tuning. If that is as large as the luck of training, the interval covers the"
    f" difference of the rules in {COVERS['difference, 3 seeds, of rules']} % of cases with 3 seeds"
    f" and in {COVERS['difference, 10 seeds, of rules']} % with 10, and p < 0.05 tells one of three"
    f" rules from an equally good bp in {FALSE_ALARMS[3]} % and {FALSE_ALARMS[10]} % of studies."
)
MIXED_COMPARED_NOTE = (
    "One tuning is compared with several: the interval covers the difference of such rules in"
    f" {COVERS['difference, one tuning and several, of rules']} % of cases or more."
)
VALIDATION_NOTE = (
    "Accuracies in %, over the same networks. “tuned” is the selected trial's score in the search"
    " ({metric}; the mean over repeats); what it loses on fresh seeds was due to chance in the"
    " selection."
)


class Section(NamedTuple):
    """A table as a reader sees it, and how to read it."""

    title: str
    table: pd.DataFrame  # of texts
    note: str
    prose: int = 0  # so many of its last columns have sentences, which need several lines
    id: str = ""  # of its own part of the page; else it is among the results

    @property
    def html(self) -> Markup:
        classes = "prose" if self.prose else None
        return Markup(
            self.table.to_html(index=False, border=0, escape=True, justify="unset", classes=classes)
        )


class Page(NamedTuple):
    """What is written, in each form: all that a reader sees."""

    title: str
    subtitle: str
    rules: list[tuple[str, str]]  # (rule, what it is)
    summary: list[str]  # in sentences
    sections: list[Section]
    warnings: list[str]
    panels: Callable[[], list[panels.Panel]]  # only pages draw
    provenance: list[tuple[str, str]]  # (name, value)
    record: Mapping[str, Any]  # the whole of it
    numbers: pd.DataFrame  # of the main table, unrounded


class Report(NamedTuple):
    study: StudyRun
    retrained_by: list[str]  # the commands of its retrainings
    data: PlotData  # all rows that were read
    tunings: list[accuracy.Tuning]
    results: pd.DataFrame  # accuracy.results
    search: pd.DataFrame  # tables.search
    tuned: pd.DataFrame  # accuracy.tuned
    won: list[plot_data.Row]  # tables.winners
    left_out: list[str]  # the reasons for which runs were left out
    warnings: list[str]


def read(store: Store, study: StudyRun) -> Report:
    """Raises Refused if no trial and no retrained seed has ended."""
    metric = study.options["metric"]
    trials, dropped = runs.trials(store, study)
    retrained, unfinished = runs.retrained(store, study)
    if trials.empty and retrained.empty:
        raise Refused(f"study {study.name}: nothing has ended yet that could be reported")
    defaults = [] if study.space is None else _defaults(trials, study.space)
    if len(trials):
        seconds = runs.training_seconds(store, trials.to_dict("records"))
        trials = trials.assign(training_seconds=seconds)
    # Where updates point, of the retrained seeds, or else of the trials that would be retrained.
    won = tables.winners(trials, retrained, defaults, SELECTION[metric])
    aligned = list(retrained["run_id"]) or [row["run_id"] for row in won]
    alignment = {n for table in (trials, retrained) for n in table if n.startswith(runs.ALIGNMENT)}
    data = PlotData(
        metric=SELECTION[metric],
        space=study.space,
        trials=trials,
        retrained=retrained,
        curves=pd.concat(
            [
                runs.curves(store, list(retrained["run_id"]), tuple(CURVES)),
                runs.curves(store, aligned, sorted(alignment)),
            ]
        ),
        scores=runs.curves(store, [row["run_id"] for row in trials.to_dict("records")], (metric,)),
        labels={plot_data.configuration(row): _label(row) for row in plot_data.records(retrained)},
        defaults=defaults,
        adaptive=None if study.space is None else _adaptive(study.options["searcher"]["name"]),
    )
    left_out = [*dropped, *unfinished]
    of_study = [] if study.space is None else stores.retrainings(store, study)
    tunings = accuracy.tunings(retrained, defaults)
    results = accuracy.results(tunings, trials, metric)
    return Report(
        study,
        [run.data.tags["command"] for run in of_study],
        data,
        tunings,
        results,
        tables.search(trials, data.metric),
        accuracy.tuned(tunings),
        won,
        left_out,
        [
            *(f"left out: {reason}" for reason in left_out),
            *accuracy.warnings(tunings),
            *accuracy.close(results),
            *_warnings(data, won, study.options),
        ],
    )


def _defaults(trials: pd.DataFrame, space: Mapping[str, Any]) -> list[str]:
    return [row["run_id"] for row in selection.default_trials(trials, space).values()]


def _adaptive(sampler: str) -> str | None:
    return sampler if SAMPLERS[sampler].adaptive else None


def page(report: Report) -> Page:
    return Page(
        title=report.study.name,
        subtitle=f"{counts(report.data)}; {written()}",
        rules=rules(report.data),
        summary=summary(report),
        sections=sections(report),
        warnings=report.warnings,
        panels=lambda: panels.panels(report.data, panels.PANELS),
        provenance=provenance(report),
        record=report.study.provenance,
        numbers=report.search if report.results.empty else report.results,
    )


def _warnings(
    data: PlotData, won: Sequence[plot_data.Row], options: Mapping[str, Any]
) -> list[str]:
    seeds = plot_data.records(data.retrained)
    choices = [Choice({TRAINER: row["rule"]}, 1, row, [], []) for row in won]
    args = (data.trials, choices, [TRAINER], data.space, data.metric)
    lines = selection.warnings(*args, options.get("budget", TRIALS))
    for row in seeds:
        if row["state"] == FAILED:
            lines.append(f"{_label(row)}, seed {row['seed']} diverged: {row['reason']}")
        elif row["flag"]:
            lines.append(f"{_label(row)}, seed {row['seed']}: {row['flag']}")
    if len({row["code"] for row in seeds}) > 1:
        lines.append("the retrained seeds were trained by different versions of the code")
    return lines


def _label(row: plot_data.Row) -> str:
    """What was retrained, in words; of a row of `runs.retrained`, or of `accuracy.results`."""
    called = runs.called(row["rule"], row["feedback"], row["depth"], row["dataset"], row["trial"])
    selected = accuracy.selected_as(row)
    return called if selected in (accuracy.TUNED, tables.NOTHING) else f"{called}, {selected}"


def sections(report: Report) -> list[Section]:
    """One for each data set, then what has won, how the study was done, and what it cost."""
    sections, data = [], report.data
    if len(report.results):
        for dataset, numbers in report.results.groupby("dataset", sort=False):
            shown = accuracy.shown(numbers)
            sections.append(Section(f"Test accuracy on {dataset}", shown, note(numbers)))
            shown = accuracy.shown_comparisons(numbers)
            if len(shown):
                sections.append(Section(f"Compared with bp on {dataset}", shown, bp_note(numbers)))
            shown = accuracy.shown_validation(numbers, data.metric)
            of_metric = VALIDATION_NOTE.format(metric=data.metric.words)
            sections.append(Section(f"Validation accuracy on {dataset}", shown, of_metric))
    if len(report.tuned):
        shown = accuracy.shown_differences(report.tuned, "tuned", "defaults")
        sections.append(
            Section("Tuned minus defaults", shown, differences_note(DEFAULTS_NOTE, report.tuned))
        )
    if report.won and report.study.space is not None:
        chosen = tables.chosen(report.won, report.study.space)
        if len(chosen):
            sections.append(Section("What won", chosen, WINNERS_NOTE))
    done = pd.DataFrame(method(report), columns=["what", "how"])
    sections.append(Section("How the study was done", done, METHOD_NOTE, 1, "method"))
    if len(report.search):
        shown = tables.shown_search(report.search)
        sections.append(Section("What the search cost", shown, SEARCH_NOTE, id="search"))
    if data.space is not None and (rows := hardness.hardness(data)):
        shown = tables.shown_hardness(rows, hardness.target(data), data.metric)
        note_ = f"{hardness.note(data)} {TARGET_NOTE}"
        sections.append(Section("How hard each rule is to tune", shown, note_, id="tuning"))
    return sections


def note(numbers: pd.DataFrame) -> str:
    """How to read the table, and what its intervals leave out."""
    rows = plot_data.records(numbers)
    repeated = {row["repeats"] > 1 for row in rows if row["n"]}
    sentences = [
        "Accuracies in %, of n networks with seeds that no search has used. The test set was"
        " evaluated once, after the last epoch."
    ]
    if True in repeated:
        sentences.append(
            "With several repeats of the tuning, the mean is over repeats, and its interval (of"
            " Student's t, from the means of the repeats) has the luck of tuning and that of"
            " training in it, but not the choice of the test images."
        )
    if False in repeated:
        sentences.append(
            "The interval (of Student's t) is over retraining seeds of one tuning: not the luck of"
            " tuning, nor the choice of the test images."
        )
    of_what = "" if False not in repeated else "; with one tuning, that of the configuration only"
    sentences.append(f"{MEAN_COVERS}{of_what}.")
    sentences += of_test_set(rows)
    if True in repeated:
        sentences.append(ANOTHER_NOTE)
    if any(row["diverged"] for row in rows):
        sentences.append("Means exclude diverged seeds.")
    if any(row["flagged"] for row in rows):
        sentences.append(
            "Flagged seeds failed the final check: integrating the dynamics did not confirm the"
            " steady states that training computes."
        )
    return " ".join(sentences)


def bp_note(numbers: pd.DataFrame) -> str:
    rows = [row for row in plot_data.records(numbers) if row["n"]]
    sentences = [
        "Test accuracy on the same data, with the same depth and epochs, in points.",
        *compared({row["repeats"] > 1 for row in rows}),
        *of_test_set(rows),
    ]
    return " ".join(sentences)


def differences_note(beginning: str, numbers: pd.DataFrame) -> str:
    rows = plot_data.records(numbers)
    sides = [(f"{side}_n", f"{side}_repeats") for side in ("first", "second")]
    repeated = {row[repeats] > 1 for row in rows for n, repeats in sides if row[n]}
    return " ".join([beginning, *compared(repeated), *of_test_set(rows, "first_")])


def compared(repeated: set[bool]) -> list[str]:
    """How to read a comparison, in sentences: of rules with several repeats, with one, or both."""
    sentences = [f"{COMPARED_NOTE}."]
    if False in repeated:
        sentences.append(ONCE_COMPARED_NOTE)
    if len(repeated) > 1:
        sentences.append(MIXED_COMPARED_NOTE)
    return sentences


def of_test_set(rows: Sequence[plot_data.Row], prefix: str = "") -> list[str]:
    """What the choice of the test images adds to the error of an accuracy, in a sentence; none if
    their number is unknown."""
    known = [row for row in rows if row[f"{prefix}test_error"] >= 0]
    if not known:
        return []
    numbers = sorted({row[prefix + runs.TEST_IMAGES] for row in known})
    images = " or ".join(f"{n:,.0f}" for n in numbers)
    errors = sorted(row[f"{prefix}test_error"] for row in known)
    ends = " to ".join(dict.fromkeys(f"{error:.1f}" for error in (errors[0], errors[-1])))
    return [
        f"The choice of the {images} test images gives an accuracy a standard error of {ends}"
        " points."
    ]


def summary(report: Report) -> list[str]:
    """The table in sentences, best first."""
    lines = []
    rows = plot_data.records(report.results)
    for row in sorted(rows, key=lambda row: row["test_mean"] if row["n"] else 0, reverse=True):
        label = _label(row)
        if row["n"] == 0:
            lines.append(f"{label}: no seed completed its training.")
            continue
        several = f"{row['repeats']} repeats, " if row["repeats"] > 1 else ""
        line = f"{label}: {row['test_mean']:.2f} % test accuracy ({several}n = {row['n']})"
        if not math.isnan(row["bp_mean"]):
            words = "above" if row["bp_mean"] >= 0 else "below"
            line += f", {abs(row['bp_mean']):.2f} points {words} bp"
        lines.append(line + ".")
    for row in plot_data.records(report.tuned):
        if not math.isnan(row["mean"]):
            words = "more" if row["mean"] >= 0 else "less"
            group = f", {row['first_group']}" if row["first_group"] else ""
            lines.append(
                f"{row['rule']}{group}: {abs(row['mean']):.2f} points {words} than with its"
                " published defaults."
            )
    return lines


def rules(data: PlotData) -> list[tuple[str, str]]:
    """(rule, what it is), of the rules that were read."""
    rows = [*data.trials.to_dict("records"), *data.retrained.to_dict("records")]
    present = {row["rule"] for row in rows}
    return [(name, one.words) for name, one in COMPETITORS.items() if name in present]


def counts(data: PlotData) -> str:
    """How much was read."""
    parts = []
    if len(data.trials):
        complete = list(data.trials["state"]).count(COMPLETE)
        parts.append(f"{len(data.trials)} trials, {complete} of them complete")
    if len(data.retrained):
        parts.append(f"{len(data.retrained)} retrained seeds")
    return ", ".join(parts)


def written() -> str:
    return f"written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def method(report: Report) -> list[tuple[str, str]]:
    """How the study was done: (what, how), without what it lacks."""
    study, options = report.study, report.study.options
    trials = report.data.trials.to_dict("records")
    seeds = report.data.retrained.to_dict("records")
    machine, equal = study.provenance["machine"], options.get("budget", TRIALS)
    places = {(row["host"], row["device"]) for row in (*trials, *seeds)}
    ran_on = sorted(f"{host} ({device})" for host, device in places if isinstance(host, str))
    lines = {  # in this order
        "data": _data(study, {row["dataset"] for row in seeds}),
        "hidden layers": _layers(study),
        "budget": f"{options['epochs']} epochs a trial, batches of {options['batchsize']}"
        + (f"; as many {equal} for every rule" if equal != TRIALS else ""),
        "score": "",
        "search": "",
        "sampler": "",
        "early stopping": "",
        "selection": "",
        "seeds": "",
        "machines": f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"
        + (f"; trained on {', '.join(ran_on)}" if ran_on else ""),
    }
    if study.space is not None:
        lines["score"] = f"{report.data.metric.words} after the last epoch"
        lines |= _search(options, len(study.space["parameters"]))
        lines["selection"] = " ".join(_selections(report, "rule"))
    lines["seeds"] = "; ".join(
        [
            *([f"{options['replicates']} a trial, drawn from the study's seed, {options['seed']}"]
              if study.space is not None else []),
            *([f"retraining: {_seeds(seeds)}"] if seeds else []),
        ]
    )  # fmt: skip
    lines |= _commands(report)
    return [(what, how) for what, how in lines.items() if how]


def selections(report: Report) -> list[dict[str, Any]]:
    """How the retrained trials were selected: the different ones of `runs.SELECTED_BY`, of which
    one is empty if that was not recorded of all. None if nothing was retrained."""
    seeds = report.data.retrained.to_dict("records")
    return [json.loads(text) for text in dict.fromkeys(row[runs.SELECTED_BY] for row in seeds)]


def _selections(report: Report, field: str) -> list[str]:
    """Their `field`, as far as it was recorded."""
    return [*dict.fromkeys(one[field] for one in selections(report) if field in one)]


def _seeds(retrained: Sequence[Mapping[Any, Any]]) -> str:
    """Those of the configurations that were retrained."""
    of_each: dict[Any, set[int]] = {}
    of_repeat: dict[Any, set[int]] = {}
    for row in retrained:
        of_each.setdefault((row["configuration"], row["repeat"]), set()).add(row["seed"])
        of_repeat.setdefault(row["repeat"], set()).add(row["seed"])
    listed = "; ".join(
        (f"repeat {repeat}: " if len(of_repeat) > 1 else "") + ", ".join(map(str, sorted(seeds)))
        for repeat, seeds in sorted(of_repeat.items())
    )
    shared = all(seeds == of_repeat[repeat] for (_, repeat), seeds in of_each.items())
    how = "the same for every configuration" if shared else "not all for every configuration"
    return f"{listed}, {how}"


def _data(study: StudyRun, retrained: set[str]) -> str:
    """The splits, as far as they were recorded: their sizes, and where validation comes from; and
    further data sets of a grid. What was recorded in words is of a split by position."""
    data = study.provenance["data"]
    words, validation = data.get("words"), f"validation: {split(study)}"
    if words:
        drawn = is_drawn(study.options)
        validation = f"{words}; but in this study {validation}" if drawn else words
    samples = ", ".join(f"{n} {part}" for part, n in data.get("samples", {}).items())
    parts = [
        *([f"{samples} samples"] if samples else []),
        validation,
        *([f"also {', '.join(sorted(others))}"] if (others := retrained - {data["name"]}) else []),
    ]
    return f"{data['name']}: {'; '.join(parts)}"


def is_drawn(options: Mapping[str, Any]) -> bool:
    """Whether a seed decides which samples validate."""
    seed = options["dataset"].get("valid_seed")  # earlier versions had neither
    return seed is not None or options.get("repeat_splits", False)


def split(study: StudyRun) -> str:
    """What validates a study's configurations, in words."""
    options, name = study.options, study.provenance["data"]["name"]
    share, seed = options["dataset"]["valid_split"], options["dataset"].get("valid_seed")
    if options["dataset"]["name"] != name and name in DATASETS:
        share = DATASETS[name].valid_split  # grids of earlier versions kept another data set's
    of_file = f"{100 * share:g} % of the training file"
    if options.get("repeat_splits"):  # earlier versions had none
        return f"{of_file}, drawn for each repeat"
    return f"the first {of_file}" if seed is None else f"{of_file}, drawn by the seed {seed}"


def _layers(study: StudyRun) -> str:
    """Their sizes; empty if every configuration has its own."""
    network = study.options["model"]["vf"]
    sizes, number = network["sizes_hidden"], network["nb_hidden"]
    if study.space is None or any("hidden" in name for name in study.space["parameters"]):
        return ""
    return ", ".join(map(str, sizes * number if len(sizes) == 1 else sizes))


def _search(options: Mapping[str, Any], parameters: int) -> dict[str, str]:
    """The sampler and early stopping, with their options."""
    given = lambda group: ", ".join(
        f"{name}={in_hydra(value)}"
        for name, value in options[group].items()
        if name not in ("name", "storage") and value is not None
    )
    sampler, stopping = options["searcher"]["name"], options["scheduler"]["name"]
    entry = EARLY_STOPPING[stopping]
    epochs = list(entry.decides(options["scheduler"], options["epochs"]))
    when = f"; decides after epochs {', '.join(map(str, epochs))}" if epochs else ""
    repeats = options.get("repeats", 1)  # earlier versions had none
    of_each = f" in each of {repeats} repeats" if repeats > 1 else ""
    return {
        "search": f"space {options['space']} ({parameters} parameters), {options['trials']} trials"
        + of_each,
        "sampler": f"{sampler}, {SAMPLERS[sampler].words} ({given('searcher')})",
        "early stopping": f"{stopping}, {entry.words} ({given('scheduler')}){when}",
    }


def _commands(report: Report) -> dict[str, str]:
    """What was run, and where no retraining is recorded, what would retrain the best trials. How
    they were selected, only their retraining knows."""
    study = report.study
    own = study.run.data.tags.get("command", "")
    commands = {"command": own}
    if study.space is not None:
        select = [f"python -m analysis.selection study={study.name}"]
        retrain = ["python -m analysis.retrain selected.yaml seeds=10"]
        if len(report.data.retrained):
            select, retrain = _selections(report, "command"), report.retrained_by or retrain
        commands = {
            "to search": own,
            "to select": "; ".join(select),
            "to retrain": "; ".join(retrain),
        }
    return {**commands, "to report": f"python -m analysis.report study={study.name}"}


def provenance(report: Report) -> list[tuple[str, str]]:
    """Where the numbers come from: (name, value)."""
    study = report.study
    about = study.provenance
    code = about["code"]
    seeds = report.data.retrained.to_dict("records")
    values = lambda name: ", ".join(sorted({str(row[name]) for row in seeds if row[name]}))
    data = {(about["data"]["name"], about["data"]["sha256"])}
    data |= {(row["dataset"], row["data"]) for row in seeds}
    return [
        ("study", f"{study.name} ({study.id})"),
        ("code", f"disinhib {code['version']}, commit {code['commit'] or 'unknown'}"
         + (", with uncommitted changes" if code["diff"] else "")),
        *([("plugins", ", ".join(f"{p['name']}, SHA-256 {p['sha256']}" for p in about["plugins"]))]
          if about.get("plugins") else []),
        ("packages", ", ".join(f"{n} {v}" for n, v in about["packages"].items() if v)),
        ("python", about["python"]),
        ("data", ", ".join(f"{name}, SHA-256 {sha256}" for name, sha256 in sorted(data))),
        *([("inputs", about["data"]["words"])] if about["data"].get("words") else []),
        *([("code of the retraining", f"SHA-256 of its files begins with {values('code')}")]
          if seeds else []),
    ]  # fmt: skip
