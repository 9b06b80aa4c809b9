# pyright: reportArgumentType=false
"""Reports: the same numbers in four forms, and those of MLflow's raw metrics."""

import copy
import io
import math
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
import yaml
from mlflow import MlflowClient
from plotly.offline import get_plotlyjs
from scipy import stats as scipy_stats

from analysis import configurations, runs, selection, store as stores
from analysis.report import __main__ as program, checklist, comparison, contents, forms
from analysis.store import Refused
from disinhib.data import DATASETS
from disinhib.errors import InputError
from disinhib.tuning.event_log import COMPLETE, PRUNED, Ended, EpochDone
from disinhib.tuning.mlflow_store import OF_TRIAL

pytestmark = pytest.mark.usefixtures("copied_stores")

RULES = {"bp": 0, "exact-inv": 1, "lin-thresh": 2}  # the trials of `planted` that were selected
SEEDS = range(4)
OTHER = (
    planted.Planted("bp", (70.0, 92.0)),
    planted.Planted("bp", (60.0,), PRUNED, rate=1e-3),  # the published default
    planted.Planted("exact-inv", (60.0, 86.0)),
)
WON = 1 + 9 + 10  # searched options of the rules
METHOD = 14  # lines of how the study was done


def score(trial, seed):
    """Test accuracy that is planted; validation is 1 more. No two are alike."""
    return 80.0 - 3 * trial + math.sin(10 * trial + seed)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A planted study, its selected trials retrained over four seeds: one diverged, one flagged."""
    folder = tmp_path_factory.mktemp("planted")
    written = planted.write(folder, study="under_score")
    planted.retrain(written, SEEDS, trained)
    return written


@pytest.fixture(scope="module")
def two(study, tmp_path_factory):
    """A copy of its store, in which there is another study, whose bp was retrained with its
    published defaults, too."""
    folder = tmp_path_factory.mktemp("two") / "copied"
    shutil.copytree(study.folder, folder)
    other = planted.write(folder, study="other", trials=OTHER)
    planted.retrain(other, SEEDS, trained, "other-again", ["defaults=true"])
    return study._replace(uri=f"sqlite:///{folder / 'mlflow.db'}", folder=folder)


def trained(record):
    """How the retraining of a configuration went."""
    number, trial = record.number, int(record.tags[OF_TRIAL])
    for epoch in (1, 2):
        lanes = {"valid_accuracy": [score(trial, seed) + epoch - 1 for seed in SEEDS],
                 "train_CL_loss": [1 / epoch for _ in SEEDS]}  # fmt: skip
        if epoch == 2:
            lanes |= {"test_accuracy": [score(trial, seed) for seed in SEEDS],
                      "test_loss": [0.5 for _ in SEEDS]}  # fmt: skip
            if record.rule != "bp":
                lanes |= {"ode_gap": [1e-5] * 4, "ode_reached": [1.0] * 4,
                          "ode_growth": [-9.0 + seed for seed in SEEDS]}  # fmt: skip
        diverged, flags = {}, {}
        if (trial, epoch) == (2, 2):
            diverged = {"3": "Diverged: x<b>&"}
            lanes = {name: [*values[:3], math.nan] for name, values in lanes.items()}
        if (trial, epoch) == (1, 2):
            flags = {"2": "the steady state is unstable"}
        yield EpochDone(number, epoch, 0.0, lanes, planted.PLACE, diverged, flags)
        record.scores.append(0.0)
        record.diverged |= {seed: (epoch, why) for seed, why in diverged.items()}
        record.flags |= flags
    yield Ended(number, COMPLETE, 2, None, record.seed_ends(COMPLETE, None))


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    """What the command has written."""
    out = tmp_path_factory.mktemp("report")
    arguments = [f"study={study.run_id}", f"tracking.uri={study.uri}", f"out={out}"]
    assert program.main(arguments) == 0
    return out


def raw(study):
    """(rule, seed) -> test accuracy, straight from MLflow."""
    client = MlflowClient(tracking_uri=study.uri)
    experiment = client.get_run(study.run_id).info.experiment_id
    where = "tags.seed != '' and tags.trial_state = 'complete'"
    accuracies = {}
    for run in client.search_runs([experiment], where):
        (value,) = client.get_metric_history(run.info.run_id, "test_accuracy")
        accuracies[run.data.tags["rule"], int(run.data.tags["seed"])] = value.value
    return accuracies


class Cells(HTMLParser):
    """The texts of a page's tables, row by row."""

    def __init__(self):
        super().__init__()
        self.rows, self.cell = [], None

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
            self.cell = None


def tables_of_html(text):
    parser = Cells()
    parser.feed(text)
    return parser.rows


def tables_of_markdown(text):
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def tables_of_latex(text):
    plain = text
    for command, sign in ((r"\%", "%"), ("$-$", "−"), ("$<$", "<"), ("$>$", ">"), (r"\_", "_")):
        plain = plain.replace(command, sign)
    lines = [line for line in plain.splitlines() if line.endswith(r"\\")]
    rows = [[cell.strip() for cell in line.removesuffix(r"\\").split("&")] for line in lines]
    return [[{"--": "–"}.get(cell, cell) for cell in row] for row in rows]


def tables_of(text):
    """The tables of report.md by title, each a list of rows (dicts of cells)."""
    found = {}
    for part in text.split("## ")[1:]:
        lines = tables_of_markdown(part)
        rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
        found[part.partition("\n")[0]] = rows
    return found


def plain(text):
    return float(text.replace("−", "-"))


def test_the_four_forms_have_the_same_numbers(folder):
    text = (folder / "report.md").read_text()
    markdown = tables_of_markdown(text)
    latex = tables_of_latex((folder / "report.tex").read_text())
    html = tables_of_html((folder / "report.html").read_text())
    # each with a head: accuracies, comparisons, validation, what won, method, search, hardness
    assert len(markdown) == 4 + 3 + 4 + (1 + WON) + (1 + METHOD) + 4 + 4
    assert latex == markdown
    assert [row for row in html if row in markdown] == markdown
    numbers = pd.read_csv(io.StringIO((folder / "report.csv").read_text())).to_dict("records")
    tables = tables_of(text)
    tested = tables["Test accuracy on digits"]
    validated = tables["Validation accuracy on digits"]
    for cells, valid, row in zip(tested, validated, numbers, strict=True):
        assert cells["rule"] == valid["rule"] == row["rule"]
        assert cells["test accuracy"] == f"{row['test_mean']:.2f}"
        assert cells["95 % interval"] == f"[{row['test_low']:.2f}, {row['test_high']:.2f}]"
        assert cells["sd of training"] == f"{row['training_sd']:.2f}"
        assert cells["error of test set"] == f"{row['test_error']:.2f}"
        assert (cells["n"], cells["diverged"]) == (str(row["n"]), str(row["diverged"]))
        assert "repeats" not in cells and "sd of tuning" not in cells  # there was one tuning
        assert valid["validation"] == f"{row['valid_mean']:.2f}"
        assert valid["tuned"] == f"{row['tuned']:.2f}"
    compared = tables["Compared with bp on digits"]
    for cells, row in zip(compared, numbers[1:], strict=True):
        assert cells["rule"] == row["rule"]
        assert plain(cells["test minus bp"]) == round(row["bp_mean"], 2)
        assert cells["P(rule > bp)"] == f"{row['bp_better']:.2f}"
        low, high = f"{row['bp_better_low']:.2f}", f"{row['bp_better_high']:.2f}"
        assert cells["95 % interval of P"] == f"[{low}, {high}]"
        assert cells["p (Holm)"] in ("< 0.001", f"{row['bp_holm']:.3f}")


def test_the_numbers_are_those_of_mlflows_raw_metrics(study, folder):
    accuracies = raw(study)
    numbers = pd.read_csv(io.StringIO((folder / "report.csv").read_text())).to_dict("records")
    assert [row["rule"] for row in numbers] == list(RULES)
    for row in numbers:
        own = [value for (rule, _), value in sorted(accuracies.items()) if rule == row["rule"]]
        assert own == [score(RULES[row["rule"]], seed) for seed in range(len(own))]
        assert row["n"] == len(own) == (3 if row["rule"] == "lin-thresh" else 4)
        assert row["test_mean"] == pytest.approx(np.mean(own), abs=1e-12)
        assert row["training_sd"] == pytest.approx(np.std(own, ddof=1), abs=1e-12)
        t = scipy_stats.t.interval(0.95, len(own) - 1, np.mean(own), scipy_stats.sem(own))
        assert (row["test_low"], row["test_high"]) == pytest.approx(t)
        assert row["repeats"] == 1 and math.isnan(row["tuning_sd"])
        share = np.mean(own) / 100
        assert row["test_images"] == 360  # of digits
        assert row["test_error"] == pytest.approx(100 * math.sqrt(share * (1 - share) / 360))
        assert row["valid_mean"] == pytest.approx(np.mean(own) + 1, abs=1e-12)
        trial = planted.TRIALS[RULES[row["rule"]]]
        assert row["tuned"] == trial.scores[-1]
        assert row["gap"] == pytest.approx(trial.scores[-1] - np.mean(own) - 1, abs=1e-12)
    by = {row["rule"]: row for row in numbers}
    pairs = [accuracies["exact-inv", seed] - accuracies["bp", seed] for seed in SEEDS]
    assert by["exact-inv"]["bp_mean"] == pytest.approx(np.mean(pairs), abs=1e-12)
    assert by["exact-inv"]["bp_paired"] and not by["lin-thresh"]["bp_paired"]
    t = scipy_stats.t.interval(0.95, 3, np.mean(pairs), scipy_stats.sem(pairs))
    assert (by["exact-inv"]["bp_low"], by["exact-inv"]["bp_high"]) == pytest.approx(t)
    assert by["exact-inv"]["bp_p"] == pytest.approx(scipy_stats.ttest_1samp(pairs, 0)[1])
    assert (by["lin-thresh"]["diverged"], by["exact-inv"]["flagged"]) == (1, 1)


def test_the_report_says_what_the_search_cost(study, folder):
    rows = tables_of_markdown((folder / "report.md").read_text())[-8:-4]
    assert rows[0][:6] == ["rule", "trials", "complete", "pruned", "failed", "epochs"]
    assert [row[:6] for row in rows[1:]] == [
        ["bp", "3", "3", "0", "0", "6"],
        ["exact-inv", "2", "1", "1", "0", "3"],
        ["lin-thresh", "2", "1", "0", "1", "2"],
    ]
    numbers = pd.read_csv(io.StringIO((folder / "report.csv").read_text())).to_dict("records")
    spent = [(row["rule"], row["search_trials"], row["search_epochs"]) for row in numbers]
    assert spent == [(row[0], int(row[1]), int(row[5])) for row in rows[1:]]


def test_the_report_says_how_hard_each_rule_is_to_tune(folder):
    """The lowest of the best scores is 80. Without recorded seconds there is no column of them."""
    text = (folder / "report.md").read_text().partition("## How hard each rule is to tune")[2]
    head, *rows = tables_of_markdown(text)
    assert head == ["rule", "searched parameters", "within a point of its best", "one in",
                    "trials to 80", "epochs to it"]  # fmt: skip
    assert rows == [
        ["bp", "1", "2 of 3", "1.5", "1.0", "2"],
        ["exact-inv", "9", "2 of 2", "1.0", "1.0", "2"],
        ["lin-thresh", "10", "1 of 2", "2.0", "1.0", "1"],
    ]
    assert "tpe, learns from the scores" in text


def test_the_report_says_what_won(folder):
    """What was planted, with the ranges of the space and the defaults of the rules."""
    head, *rows = tables_of_markdown((folder / "report.md").read_text())[11 : 12 + WON]
    assert head == ["rule", "trial", "option", "value", "searched", "published default"]
    won = {(row[0], row[2]): row for row in rows}
    assert len(won) == WON and {(row[0], row[1]) for row in rows} == {
        (rule, str(number)) for rule, number in RULES.items()
    }
    for rule in RULES:
        planned = {n: v for n, v in planted.WAY[rule].items() if n not in ("trainer", "model/vf")}
        assert {n for r, n in won if r == rule} == planned.keys()
        for option, value in planned.items():
            shown = won[rule, option][3]
            assert shown == str(value) if isinstance(value, bool) else float(shown) == value
    assert won["bp", "optimizer.learning_rate"][3:] == ["0.005", "0.0001 to 0.01 (log)", "0.001"]
    strong = won["exact-inv", "trainer.strong_fb"]
    assert strong[3:] == ["True", "one of false, true", "True"]


def test_the_report_says_how_the_study_was_done(folder):
    head, *rows = tables_of_markdown((folder / "report.md").read_text())[12 + WON : -8]
    assert head == ["what", "how"] and len(rows) == METHOD
    how = dict(rows)
    assert how["to select"] == "python -m analysis.selection study=under_score"
    assert how["data"] == (
        "digits: 1150 train, 287 validation, 360 test samples; validation: the first 20 % of the"
        " training file"
    )
    assert how["hidden layers"] == "16" and how["budget"] == "2 epochs a trial, batches of 25"
    assert how["search"] == "space rules (27 parameters), 8 trials"
    assert how["sampler"].startswith("tpe, ") and "n_startup_trials=5" in how["sampler"]
    assert how["early stopping"].startswith("asha, ")
    assert how["early stopping"].endswith("; decides after epochs 1")
    assert how["seeds"] == (
        "1 a trial, drawn from the study's seed, 0; retraining: 0, 1, 2, 3, the same for every"
        " configuration"
    )
    assert "cores" in how["machines"] and how["machines"].endswith("trained on h (cpu)")
    assert how["to search"] == how["to retrain"] == "python tune_main.py"  # as planted
    html = (folder / "report.html").read_text()
    assert html.count("n_startup_trials=5") == 1


def of_data(name, words="", share=0.1, options=None, **dataset):
    """What is told of the data of a study that recorded these of it."""
    given = {"dataset": {"name": name, "valid_split": share, **dataset}, **(options or {})}
    study: Any = SimpleNamespace(
        options=given, provenance={"data": {"name": "arrays", "words": words}}
    )
    return contents._data(study, set())


def test_where_validation_comes_from_is_said_as_it_was_recorded(monkeypatch):
    words = "data my.npz: samples are shuffled by seed 0"
    assert of_data("arrays", words) == f"arrays: {words}"
    assert of_data("arrays") == "arrays: validation: the first 10 % of the training file"
    monkeypatch.setitem(contents.DATASETS, "arrays", DATASETS["fmnist"])
    of_grid = of_data("digits", share=0.2)  # kept by earlier versions, whatever its data
    assert of_grid == "arrays: validation: the first 10 % of the training file"


def test_seeds_that_not_every_configuration_has_are_not_called_the_same():
    rows = [{"configuration": name, "repeat": 1, "seed": n} for name in "ab" for n in (3, 4)]
    assert contents._seeds(rows) == "3, 4, the same for every configuration"
    assert contents._seeds(rows[:3]) == "3, 4, not all for every configuration"


def test_what_a_reader_must_know_is_in_the_report(folder):
    text = (folder / "report.md").read_text()
    for words in (
        "seed 3 diverged: Diverged: x<b>&",
        "seed 2: the steady state is unstable",
        "left out: trial 7: it has not ended",
        "not the luck of tuning, nor the choice of the test images",
        "The choice of the 360 test images gives an accuracy a standard error of ",
        "evaluated the test set during the search",
        "the groups had unequal budgets",
    ):
        assert words in text, words


def test_the_page_needs_nothing_else_and_has_no_empty_panel(folder):
    whole = (folder / "report.html").read_text()
    assert get_plotlyjs() in whole
    text = whole.replace(get_plotlyjs(), "")
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", text)
    sections = re.findall(r'<section id="([\w-]+)"', text)
    for name in ("learning", "history", "budget", "slices", "failures", "ode"):
        assert name in sections, sections
    assert "Diverged: x&lt;b&gt;&amp;" in text and "x<b>&" not in text
    for sentence in ("provenance", "SHA-256", "tune_main.py"):
        assert sentence in text


def test_it_is_attached_to_the_studys_run(study, folder):
    client = MlflowClient(tracking_uri=study.uri)
    attached = [f.path for f in client.list_artifacts(study.run_id, program.ARTIFACTS)]
    files = [*forms.FORMS, checklist.FILE]
    assert sorted(attached) == sorted(f"report/{file}" for file in files)


def test_the_checklist_is_what_the_record_knows_and_blank_elsewhere(study, folder):
    text = (folder / checklist.FILE).read_text()
    assert text.startswith("# Reproducibility checklist of the study under_score\n")
    items = dict(re.findall(r"^- \*\*(.+?)\*\*((?: .*)?(?:\n  - .*)*)", text, re.M))
    for question, answer in {
        "Which data, and how many samples in each split? How were they split?": "1150 train, 287",
        "Which learning rules?": "\n  - bp: back-propagation through a plain network",
        "How large is the network?": "hidden layers of 16",
        "What was searched, and in which ranges?": "`bp.optimizer.learning_rate`: 0.0001 to 0.01",
        "How was the best value chosen?": "Of the trials of each rule that ran",
        "What were the best values?": "trials 0 (bp), 1 (exact-inv), 2 (lin-thresh)",
        "How many runs?": "exact-inv: 2 trials (1 complete, 1 pruned, 0 failed)",
        "Which seeds?": "retraining: 0, 1, 2, 3",
        "When was the test set used?": "after its last epoch; but in the search, by trials 3",
        "Which machines?": "trained on h (cpu)",
        "How much was computed?": "search, bp: 6 epochs",
        "Which commands give the numbers again?": "to report: `python -m analysis.report study=",
        "Which code, in which version?": "\n  - packages: jax ",
    }.items():
        assert answer in items[question], (question, items[question])
    assert "retrained: 12 runs, 1 diverged, 1 flagged" in items["How many runs?"]
    assert "left out of these: trial 7: it has not ended" in items["How many runs?"]
    blank = {question for question, answer in items.items() if answer == f" {checklist.BLANK}"}
    assert {"Were other ranges or values tried before?", "How were inputs prepared?",
            "Where can the data be had, and under which licence?"} < blank  # fmt: skip
    assert "Which machines?" not in blank and text.count("\n- ") == len(items)


def test_without_retraining_it_reports_the_search_alone(tmp_path):
    written = planted.write(tmp_path, trials=planted.TRIALS[:3])
    program.main([f"study={written.study}", f"tracking.uri={written.uri}",
                  f"out={tmp_path / 'out'}"])  # fmt: skip
    rows = tables_of_markdown((tmp_path / "out" / "report.md").read_text())
    assert rows[0][:2] == ["rule", "trial"] and len(rows) == 1 + WON + METHOD + 4 + 4
    how = dict(rows[2 + WON : -8])
    assert "retraining" not in how["seeds"]
    assert how["to retrain"] == "python -m analysis.retrain selected.yaml seeds=10"
    assert rows[-8][:2] == ["rule", "trials"]
    assert len(pd.read_csv(tmp_path / "out" / "report.csv")) == 3
    asked = (tmp_path / "out" / checklist.FILE).read_text()
    assert "**When was the test set used?** not yet\n" in asked
    assert "**How was the best value chosen?** Of the trials of each rule that ran" in asked
    sections = re.findall(r'<section id="([\w-]+)"', (tmp_path / "out/report.html").read_text())
    assert "learning" not in sections and "history" in sections


def test_the_report_tells_how_its_trials_were_selected(tmp_path):
    """What selection was told, by the record of the retraining: not the default rule."""
    written = planted.write(tmp_path, trials=planted.TRIALS[:4])
    planted.retrain(written, SEEDS, trained, select=["top=2", "metric=valid_loss"])
    store = stores.connect(written.uri)
    report = contents.read(store, stores.find_study(store))
    how = dict(contents.method(report))
    command = "python -m analysis.selection study=planted top=2 metric=valid_loss"
    assert how["to select"] == command and str(tmp_path) not in how["to select"]
    assert (
        "of each rule that ran" in how["selection"]
        and "2 with the best valid_loss" in how["selection"]
    )
    text = checklist.text(report)
    assert f"**How was the best value chosen?** {how['selection']}\n" in text
    assert f"to select: `{command}`" in text


def test_how_trials_were_selected_is_not_guessed_if_their_retraining_has_not_recorded_it(study):
    """As earlier versions did not."""
    store = stores.connect(study.uri)
    report = contents.read(store, stores.find_study(store, study.study))
    unknown = report.data.retrained.assign(**{runs.SELECTED_BY: "{}"})
    older = report._replace(data=report.data._replace(retrained=unknown))
    assert not {"selection", "to select"} & dict(contents.method(older)).keys()
    assert f"**How was the best value chosen?** {checklist.BLANK}\n" in checklist.text(older)


def test_what_nothing_was_searched_for_and_the_test_set_are_told_as_they_are(study):
    store = stores.connect(study.uri)
    report = contents.read(store, stores.find_study(store, study.study))
    grid = report._replace(study=report.study._replace(space=None))
    (measured,) = (
        i for i in checklist._runs(grid, dict(contents.method(grid))) if "measured" in i.question
    )
    assert measured.answers == ["result: test accuracy in %"]
    alone = report._replace(data=report.data._replace(retrained=pd.DataFrame()))
    how = dict(contents.method(alone))
    (used,) = (i for i in checklist._runs(alone, how) if "test set" in i.question)
    assert used.answers == ["in the search, by trials 3"]


def test_splits_that_seeds_have_drawn_are_told_though_the_record_is_of_others(study):
    """The record, and its hash, is of the split by position."""
    words = "validation is their first dataset.valid_split"
    assert of_data("arrays", words) == f"arrays: {words}"
    for told, said in (
        (of_data("arrays", words, options={"repeat_splits": True}), "drawn for each repeat"),
        (of_data("arrays", words, valid_seed=7), "drawn by the seed 7"),
    ):
        assert told == (
            f"arrays: {words}; but in this study validation: 10 % of the training file, {said}"
        )
    store = stores.connect(study.uri)
    report = contents.read(store, stores.find_study(store, study.study))
    text = checklist.text(report)
    assert "hash of the images and labels of each split: digits" in text
    report.study.options["repeat_splits"] = True
    assert "cut by position (which samples seeds have drawn is not in it): " in checklist.text(
        report
    )


@pytest.mark.parametrize("again", [False, True], ids=["search", "retrained"])
def test_a_winner_at_the_edge_is_warned_of_by_selection_and_report(again, tmp_path):
    """With as few complete trials as the smoke study has, which is warned of too."""
    edge = planted.Planted("bp", (70.0, 95.0), rate=0.0099)
    written = planted.write(tmp_path, trials=[*planted.TRIALS[:3], edge])
    if again:
        planted.retrain(written, SEEDS, trained)
    where = [f"study={written.study}", f"tracking.uri={written.uri}"]
    assert selection.main([*where, f"selected={tmp_path / 'selected.yaml'}"]) == 0
    warned = yaml.safe_load((tmp_path / "selected.yaml").read_text())["warnings"]
    assert warned[0] == (
        "trial 3 (bp): optimizer.learning_rate=0.0099 lies at the upper edge of its range"
        " (0.0001 to 0.01); next best trials there: 0 of 1"
    )
    assert any(line.startswith("bp: 2 of 2 trials ran the whole budget") for line in warned)
    assert any("exact-inv.trainer.strong_fb=False (0 of 1)" in line for line in warned)
    assert program.main([*where, f"out={tmp_path}"]) == 0
    report = (tmp_path / "report.md").read_text().partition("## Warnings")[2].splitlines()
    first = report.index(f"- {warned[0]}")
    assert report[first : first + len(warned)] == [f"- {line}" for line in warned]
    assert "lies at the upper edge" in (tmp_path / "report.html").read_text()


def test_a_report_needs_every_trial_and_every_retrained_seed(study, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(study.folder, folder)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_run(study.run_id).info.experiment_id
    arguments = [f"study={study.run_id}", f"tracking.uri={uri}", f"out={tmp_path / 'out'}"]
    for where, message in (
        ("tags.seed = '1' and tags.rule = 'bp'", "1 of the 12 runs of again are missing"),
        ("tags.trial = '4' and tags.study = 'under_score'", "the runs of trials 4 are missing"),
    ):
        (run,) = client.search_runs([experiment], where)
        client.delete_run(run.info.run_id)
        with pytest.raises(Refused, match=message):
            program.main(arguments)
        client.restore_run(run.info.run_id)
    assert program.main(arguments) == 0


def test_tuned_minus_defaults(two, tmp_path):
    """The trial of the defaults was stopped, retrained as the other, and is no winner."""
    arguments = [f"tracking.uri={two.uri}", f"selected={tmp_path / 'selected.yaml'}"]
    assert selection.main(["study=other", "defaults=true", *arguments]) == 0
    file = yaml.safe_load((tmp_path / "selected.yaml").read_text())
    assert [(one["trial"], one["rank"]) for one in file["selected"]] == [(0, 1), (2, 1), (1, 0)]
    assert (
        "exact-inv: no trial has the published defaults of all searched options"
        in (file["warnings"])
    )
    assert program.main(["study=other", f"tracking.uri={two.uri}", f"out={tmp_path}"]) == 0
    text = (tmp_path / "report.md").read_text()
    section = text.partition("## Tuned minus defaults")[2].partition("\n## ")[0]
    head, row = tables_of_markdown(section)
    cells = dict(zip(head, row, strict=True))
    gains = [score(0, seed) - score(1, seed) for seed in SEEDS]
    assert cells["tuned minus defaults"] == f"{np.mean(gains):+.2f}"
    assert (cells["tuned: trial"], cells["defaults: trial"]) == ("0", "1")
    assert cells["compared"] == "paired by seed"
    assert cells["P(tuned > defaults)"] == "1.00"
    won = text.partition("## What won")[2].partition("\n## ")[0]
    assert {(line[0], line[1]) for line in tables_of_markdown(won)[1:]} == {
        ("bp", "0"), ("exact-inv", "2")
    }  # fmt: skip


DEFAULT = 1e-3  # published learning rate of bp
TWICE = (
    planted.Planted("bp", (70.0, 96.0), repeat=1),
    planted.Planted("bp", (60.0,), PRUNED, rate=DEFAULT, repeat=1),
    planted.Planted("exact-inv", (60.0, 85.0), repeat=1),
    planted.Planted("bp", (70.0, 97.0), rate=DEFAULT, repeat=2),  # the best is the default
    planted.Planted("bp", (70.0, 95.0), repeat=2),
    planted.Planted("exact-inv", (60.0, 86.0), repeat=2),
)


def trained_twice(record):
    """Test accuracy is 90 - trial + seed / 10; validation is the same."""
    seeds, trial = record.config["seeds"], int(record.tags[OF_TRIAL])
    tested = [90 - trial + seed % configurations.MOST_SEEDS / 10 for seed in seeds]
    for epoch in (1, 2):
        lanes = {"valid_accuracy": tested} | ({"test_accuracy": tested} if epoch == 2 else {})
        yield EpochDone(record.number, epoch, 0.0, lanes, planted.PLACE)
        record.scores.append(0.0)
    yield Ended(record.number, COMPLETE, 2, None, record.seed_ends(COMPLETE, None))


def test_a_repeated_study_from_selection_to_report(tmp_path):
    """In the first repeat the defaults were stopped, in the second they are the best trial."""
    written = planted.write(tmp_path, trials=TWICE)
    planted.retrain(written, [0, 1], trained_twice, select=["defaults=true"])
    where = [f"study={written.study}", f"tracking.uri={written.uri}", f"out={tmp_path}"]
    assert program.main(where) == 0
    text = (tmp_path / "report.md").read_text()
    tables = tables_of(text)
    tested = [
        (row["rule"], row["selected as"], row["repeats"], row["n"], row["test accuracy"])
        for row in tables["Test accuracy on digits"]
    ]
    assert tested == [
        ("bp", "tuned", "2", "4", "88.55"),  # trials 0 and 3
        ("bp", "published defaults", "2", "4", "88.05"),  # 1 and 3
        ("exact-inv", "tuned", "2", "4", "86.55"),  # 2 and 5
    ]
    (compared,) = tables["Compared with bp on digits"]
    assert (compared["rule"], compared["test minus bp"]) == ("exact-inv", "−2.00")
    assert compared["compared"] == "unpaired, by repeat"
    (gain,) = tables["Tuned minus defaults"]
    assert (gain["rule"], gain["tuned minus defaults"]) == ("bp", "+0.50")
    validated = tables["Validation accuracy on digits"]
    assert [row["tuned"] for row in validated] == ["96.50", "–", "85.50"]  # one was stopped
    store = stores.connect(written.uri)
    report = contents.read(store, stores.find_study(store, written.study))
    assert len(report.data.labels) == 5  # trials retrained: those of equal options apart


def test_studies_side_by_side(two, tmp_path):
    arguments = [f"tracking.uri={two.uri}", f"out={tmp_path}"]
    assert program.main(["study=under_score,other", *arguments]) == 0
    text = (tmp_path / "report.md").read_text()
    assert tables_of_latex((tmp_path / "report.tex").read_text()) == tables_of_markdown(text)
    html = (tmp_path / "report.html").read_text()
    shown = tables_of_html(html)
    assert all(row in shown for row in tables_of_markdown(text))
    sections = {part.partition("\n")[0]: part for part in text.split("## ")}
    head, *rows = tables_of_markdown(sections["Test accuracy on digits: under_score minus other"])
    bp, exact = (dict(zip(head, row, strict=True)) for row in rows)
    assert (bp["rule"], exact["rule"]) == ("bp", "exact-inv")
    assert bp["under_score minus other"] == "+0.00" and bp["compared"] == "paired by seed"
    assert (
        bp["its 95 % interval"] == "–" and bp["P(under_score > other)"] == "0.50"
    )  # the same runs
    assert "bp, digits: under_score leads other by 0.00 points (0.0 of 360 test images)" in text
    assert "Whether under_score and other agree cannot be told: they have the same seed." in text
    means = [
        np.mean([score(1, seed) for seed in SEEDS]),
        np.mean([score(2, seed) for seed in SEEDS if seed != 3]),  # it diverged
    ]
    assert exact["under_score minus other"] == f"{means[0] - means[1]:+.2f}"
    assert exact["compared"] == "unpaired"
    search = tables_of_markdown(sections["Best of each rule in the search"])
    best = {(row[0], row[1]): (row[2], row[-1]) for row in search[1:]}
    assert best["bp", "under_score"] == ("3", "90.00") and best["bp", "other"] == ("2", "92.00")
    assert ["trials", "6", "6"] not in shown and "What differs" not in sections  # nothing does
    assert "bp: the searches had unequal budgets: under_score 3 trials of 6 epochs" in text
    assert re.findall(r'<section id="([\w-]+)"', html) == [
        "results", "method", "learning", "best", "budget", "provenance"
    ]  # fmt: skip
    numbers = pd.read_csv(tmp_path / "report.csv")
    assert numbers["study"].tolist() == ["under_score", "other", "other", "under_score", "other",
                                         "under_score"]  # fmt: skip


def test_what_differs_between_studies_is_listed(two):
    store = stores.connect(two.uri)
    first, other = (stores.find_study(store, name) for name in ("under_score", "other"))
    options = {**other.options, "epochs": 5, "out_dir": "/elsewhere"}
    assert other.space is not None
    space = copy.deepcopy(other.space)
    space["parameters"]["bp.optimizer.learning_rate"]["high"] = 1.0
    del space["parameters"]["exact-inv.model.vf.g_EI"]
    grid = {"depth": {"1": ["model.vf.nb_hidden=1"], "2": ["model.vf.nb_hidden=2"]}}
    options["model"] = copy.deepcopy(options["model"])
    options["model"]["vf"]["nb_hidden"] = 2  # but the axis of the grid says how many
    options["grid"] = grid
    changed = other._replace(options=options, space=space)
    assert comparison.differing([first, changed]) == [
        ("epochs", "2", "5"),
        ("search.bp.optimizer.learning_rate", "0.0001 to 0.01 (log)", "0.0001 to 1.0 (log)"),
        ("search.exact-inv.model.vf.g_EI", "0.4 to 2.5 (log)", "not searched"),
    ]


def test_studies_that_must_not_be_compared_are_refused(two, tmp_path):
    store = stores.connect(two.uri)
    first, other = (stores.find_study(store, name) for name in ("under_score", "other"))
    loss = other._replace(options={**other.options, "metric": "valid_loss"})
    with pytest.raises(Refused, match=r"the same metric \(valid_accuracy, valid_loss\)$"):
        comparison.refuse_unlike([first, loss])
    split = {**other.options, "dataset": {**other.options["dataset"], "valid_split": 0.5}}
    with pytest.raises(Refused, match=r"same validation split \(the first 20 %.*the first 50"):
        comparison.refuse_unlike([first, other._replace(options=split)])
    data = {**other.provenance, "data": {**other.provenance["data"], "sha256": "0"}}
    reports = [contents.read(store, study) for study in (first, other)]
    reports[1] = reports[1]._replace(study=other._replace(provenance=data))
    with pytest.raises(Refused, match="digits is not the same"):
        comparison.page(reports)
    data["data"]["name"] = "mnist"
    reports[1] = reports[1]._replace(data=reports[1].data._replace(retrained=pd.DataFrame()))
    with pytest.raises(Refused, match=r"studies of the same data \(digits; mnist\)$"):
        comparison.page(reports)
    for names, words in (
        ("other,", "names with a comma between two"),
        ("other,other", "studies of different names"),
        ("other,nobody", "study: given nobody, allowed is one of other, under_score"),
    ):
        with pytest.raises(Refused, match=words):
            program.main([f"study={names}", f"tracking.uri={two.uri}", f"out={tmp_path}"])


def test_a_study_whose_name_has_a_comma_is_one_study(two):
    """As MLflow's page allows."""
    store = stores.connect(two.uri)
    run = stores.find_study(store, "other").run.info.run_id
    store.client.set_tag(run, "mlflow.runName", "under_score,other")
    try:
        (study,) = stores.find_studies(store, "under_score,other")
    finally:
        store.client.set_tag(run, "mlflow.runName", "other")
    assert study.run.info.run_id == run


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["study=other"], "study: given other, allowed is one of"),
        (["out=/proc/nothing"], "out: given /proc/nothing, allowed is a folder"),
        (["format=pdf"], "format: unknown option; options of analysis.report: study"),
        (["name"], "given name, allowed is name=value"),
    ],
)
def test_bad_input_is_refused_in_one_line(given, message, study):
    with pytest.raises(InputError, match=message) as refusal:
        program.main([*given, f"tracking.uri={study.uri}"])
    assert "\n" not in str(refusal.value)
