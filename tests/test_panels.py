"""Figures of hand-made tables: that they say what they are; their page."""

import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from markupsafe import Markup

from analysis import runs
from analysis.report import forms, panels
from analysis.report.panels import comparison
from analysis.report.panels.drawing import PALE, axis_title, wrapped
from analysis.report.panels.plot_data import PlotData
from disinhib.metrics import ANGLE, NORM_RATIO, SELECTION
from disinhib.rules import colour
from disinhib.tuning import space_tree
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED

EVIL = "</script><b>&"


def space(trial):
    rule = trial.suggest_categorical("trainer", ("bp", "lin-thresh"))
    rate = trial.suggest_float(f"{rule}.optimizer.learning_rate", 1e-4, 1e-2, log=True)
    options = {"trainer": rule, "optimizer.learning_rate": rate}
    if rule == "bp":
        return options
    options["model.vf.g_EI"] = trial.suggest_float("lin-thresh.model.vf.g_EI", 0.5, 2.5)
    strong = trial.suggest_categorical("lin-thresh.trainer.strong_fb", (False, True))
    nudge = 0.1 if strong else trial.suggest_float("lin-thresh.trainer.target_nudge", 0.0, 0.5)
    return {**options, "trainer.strong_fb": strong, "trainer.target_nudge": nudge}


SPACE = space_tree.definition(space)


def trial(number, rule, state, scores, rate, **searched):
    """A row of `runs.trials`; `searched` are the other parameters, by their options."""
    of_rule = {"optimizer.learning_rate": rate, **searched}
    params = {"trainer": rule, **{f"{rule}.{name}": value for name, value in of_rule.items()}}
    return {
        "trial": number,
        "run_id": f"run{number}",
        "rule": rule,
        "state": state,
        "drawn": True,
        "reason": f"Diverged: {EVIL}" if state == FAILED else None,
        "epochs": len(scores),
        "seeds": (number,),
        "training_seconds": len(scores) * (0.5 if rule == "bp" else 2.0),
        "budget": 3,
        "score": scores[-1] if scores else math.nan,
        **{f"{ANGLE}_{n}": (88 + 4 * n) - scores[-1] / 2 if scores else math.nan for n in (0, 1)},
        **{runs.SEARCHED + name: str(value) for name, value in params.items()},
    }


def lin(number, state, scores, rate=1e-3, gain=1.5, strong=True, nudge=None):
    more = {} if nudge is None else {"trainer.target_nudge": nudge}
    gains = {"model.vf.g_EI": gain, "trainer.strong_fb": strong}
    return trial(number, "lin-thresh", state, scores, rate, **gains, **more)


def retrained(configuration, rule, seed, dataset="digits", state=COMPLETE, **numbers):
    return {
        "run_id": f"{configuration}-{seed}",
        "of_run": None,
        "configuration": configuration,
        "rule": rule,
        "dataset": dataset,
        "depth": 3,
        "seed": seed,
        "state": state,
        "reason": f"Diverged: {EVIL}" if state == FAILED else None,
        "flag": "",
        "ode_gap": math.nan,
        **numbers,
    }


def history(rows):
    """The scores of trials at epoch 1 and at their end."""
    epochs = [(row, epoch) for row in rows for epoch in sorted({1, row["epochs"]} - {0})]
    points = [
        (row["run_id"], "m", n, 60.0 + row["trial"] if n == 1 else row["score"])
        for row, n in epochs
    ]
    return pd.DataFrame(points, columns=["run_id", "metric", "epoch", "value"])


TRIALS = [
    trial(0, "bp", COMPLETE, [70.0, 75.0, 80.0], 1e-3),
    lin(1, PRUNED, [60.0], rate=1e-4, gain=0.5, strong=False, nudge=0.5),
    trial(2, "bp", PRUNED, [60.0], 1e-2),
    lin(3, COMPLETE, [70.0, 71.0, 72.0], gain=1.0),
    trial(4, "bp", FAILED, [], 1e-2),
    lin(5, COMPLETE, [70.0, 71.0, 78.0], rate=2e-3, gain=2.0),
    lin(6, COMPLETE, [70.0, 71.0, 76.0], gain=1.9, strong=False, nudge=0.1),
    lin(7, COMPLETE, [70.0, 71.0, 78.0], rate=3e-3, gain=2.1),
    lin(8, FAILED, [50.0], rate=1e-2, gain=2.5),
]
RETRAINED = [
    retrained("a", "bp", 1),
    retrained("a", "bp", 2, state=FAILED),
    retrained("b", "lin-thresh", 1, ode_gap=1e-4, ode_growth=-8.0, ode_reached=1.0),
    retrained("b", "lin-thresh", 2),
    retrained("c", "lin-thresh", 1, ode_gap=1e-2, ode_growth=3.0, ode_reached=0.5, flag=EVIL),
    retrained("d", "bp", 1, dataset="mnist"),
]
CURVES = [
    (f"{run}", metric, epoch, value * epoch)
    for run in ("a-1", "a-2", "b-1", "c-1", "d-1")
    for metric, value in (("valid_accuracy", 20.0), ("train_CL_loss", 0.1))
    for epoch in (2, 1, 3)
]
CURVES += [
    (run, metric + layer, epoch, value / epoch)
    for run, value in (("a-1", 60.0), ("a-2", 90.0), ("b-1", 60.0), ("b-2", 30.0), ("d-1", 60.0))
    for metric in (ANGLE, NORM_RATIO)
    for layer in ("_out", "", "_1", "_0", "_10")
    for epoch in (2, 1)
]
LABELS = {
    "a": "bp (trial 0)",
    "b": "lin-thresh (trial 5)",
    "c": f"other {EVIL}",
    "d": "bp on mnist",
}
FULL = PlotData(
    metric=SELECTION["valid_accuracy"],
    space=SPACE,
    trials=pd.DataFrame(TRIALS),
    retrained=pd.DataFrame(RETRAINED),
    curves=pd.DataFrame(CURVES, columns=["run_id", "metric", "epoch", "value"]),
    labels=LABELS,
    scores=history(TRIALS),
)
# As `runs` gives them when there is nothing.
NO_TRIALS = pd.DataFrame(columns=["trial", "rule", "state"])
NO_RETRAINED = pd.DataFrame(columns=["run_id", "state"])
NO_CURVES = pd.DataFrame(columns=["run_id", "metric", "epoch", "value"])
NOT_RETRAINED = FULL._replace(retrained=NO_RETRAINED, curves=NO_CURVES)
LOSSES = FULL._replace(metric=SELECTION["valid_loss"])


NAMES = [name for name, *_ in panels.PANELS]
DRAW = {name: draw for name, _, _, draw in panels.PANELS}


def traces(drawing) -> Any:
    return drawing.figure.data


def rows_in(*states):
    return FULL.trials[FULL.trials["state"].isin(states)]


@pytest.fixture(scope="module")
def shown():
    return {panel.id: panel for panel in panels.panels(FULL, panels.PANELS)}


@pytest.fixture(scope="module")
def of_losses():
    return {panel.id: panel for panel in panels.panels(LOSSES, panels.PANELS)}


# --- drawings


def test_every_panel_is_there(shown):
    assert list(shown) == NAMES
    ids = [*shown, *(drawing.id for panel in shown.values() for drawing in panel.figures)]
    assert len(ids) == len({*ids})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("score", ["valid_accuracy", "valid_loss"])
def test_every_figure_says_what_it_shows(name, score, shown, of_losses):
    panel = (shown if score == "valid_accuracy" else of_losses)[name]
    assert panel.title and panel.sentence.endswith(".") and ". " not in panel.sentence
    for drawing in panel.figures:
        figure = drawing.figure
        assert figure.data and all(len(trace.x) and len(trace.y) for trace in figure.data)
        assert figure.layout.height and figure.layout.width is None
        if name == "parallel":
            assert figure.layout.xaxis.ticktext[0] == wrapped(axis_title(SELECTION[score]), 14)
            continue
        for axis in figure.select_xaxes():
            assert axis.title.text
        assert next(figure.select_yaxes()).title.text


@pytest.mark.parametrize(
    ("data", "missing"),
    [
        (NOT_RETRAINED, "learning ode"),
        (NOT_RETRAINED._replace(trials=NO_TRIALS), " ".join(NAMES)),
        (FULL._replace(space=None), "importances parallel slices failures"),
        (FULL._replace(curves=NO_CURVES), "learning"),
        (FULL._replace(retrained=FULL.retrained[FULL.retrained["rule"] == "bp"]), "ode"),
        (
            FULL._replace(trials=NO_TRIALS),
            "history budget hits importances parallel slices failures",
        ),
        (FULL._replace(trials=rows_in(COMPLETE, PRUNED)), "failures"),
        (FULL._replace(trials=rows_in(PRUNED)), "history hits importances parallel failures"),
        (FULL._replace(trials=rows_in(FAILED)), "history budget hits importances parallel slices"),
    ],
)
def test_a_panel_with_nothing_to_show_is_left_out(data, missing):
    assert {*NAMES} - {panel.id for panel in panels.panels(data, panels.PANELS)} == {
        *missing.split()
    }


def test_learning_has_a_figure_for_each_data_set_and_rule(shown):
    captions = [(drawing.heading, drawing.caption) for drawing in shown["learning"].figures]
    assert captions == [
        (f"{data}, 3 hidden layers: {what}", caption)
        for data, rules in (
            ("digits", (LABELS["a"], "lin-thresh")),  # of two configurations
            ("mnist", (LABELS["d"],)),
        )
        for what in ("validation accuracy", "training loss")
        for caption in rules
    ]
    accuracy, two_rules, loss = (drawing.figure for drawing in shown["learning"].figures[:3])
    assert loss.layout.yaxis.type == "log" and accuracy.layout.yaxis.type == "linear"
    assert accuracy.layout.yaxis.range == two_rules.layout.yaxis.range
    entries = [trace.name for trace in accuracy.data if trace.showlegend]
    assert len(entries) == 2 and "a seed failed after this epoch" in entries
    dashes = {trace.legendgroup: trace.line.dash for trace in two_rules.data if trace.legendgroup}
    assert dashes == {"b": "solid", "c": "dash"}
    (others,) = (trace for trace in two_rules.data if not trace.legendgroup)
    assert list(others.x) == [1, 2, 3, None] and list(others.y) == [20, 40, 60, None]  # their mean


def test_history_is_the_best_of_complete_trials(shown, of_losses):
    bp, lin_thresh = (drawing.figure for drawing in shown["history"].figures)
    assert [drawing.caption for drawing in shown["history"].figures] == ["bp", "lin-thresh"]
    assert bp.layout.yaxis.range == lin_thresh.layout.yaxis.range
    assert bp.layout.xaxis.range == lin_thresh.layout.xaxis.range
    others, dots, line = traces(shown["history"].figures[1])
    assert list(dots.x) == [2, 3, 4, 5] and list(dots.customdata) == [3, 5, 6, 7]
    assert list(line.y) == [None, 72, 78, 78, 78, 78]
    assert list(others.y) == [80, 80, 80, None] and others.line.color == PALE
    without = DRAW["history"](FULL._replace(trials=FULL.trials[1:]))
    assert without.note.endswith("Without a complete trial: bp.")
    assert line.line.color == dots.marker.color == colour("lin-thresh")
    _, _, lowest = traces(of_losses["history"].figures[1])
    assert list(lowest.y) == [None, 72, 72, 72, 72, 72]


def test_alignment_over_all_trials_and_by_layer(shown):
    figures = shown["alignment"].figures
    assert [drawing.caption for drawing in figures] == [
        *("bp", "lin-thresh"),
        *(LABELS["a"], LABELS["b"], LABELS["d"]) * 2,
    ]
    others, pruned, complete = traces(figures[1])
    assert list(complete.x) == [54, 51, 52, 51] and list(complete.y) == [72, 78, 76, 78]
    assert (pruned.marker.symbol, list(pruned.x)) == ("circle-open", [60])
    assert complete.marker.color == colour("lin-thresh") and others.marker.color == PALE
    of_layers = figures[3].figure
    labels = [(label.text, label.x) for label in of_layers.layout.annotations]
    assert labels == [("0", 2), ("1", 2), ("10", 2), ("out", 2), ("all", 2)]
    band, line, *_ = of_layers.data
    assert list(line.x) == [1, 2] and list(line.y) == [45, 22.5]  # the mean of two seeds
    assert list(band.y) == [60, 30, 15, 30]  # their range
    assert list(traces(figures[2])[0].y) == [60, 30]  # without the seed that has diverged
    assert of_layers.layout.yaxis.range == figures[2].figure.layout.yaxis.range


def test_alignment_without_retraining_is_that_of_the_best_trials():
    curves = FULL.curves.replace({"run_id": {"b-1": "run5"}})
    drawn = DRAW["alignment"](NOT_RETRAINED._replace(curves=curves)).figures
    assert [one.caption for one in drawn[2:]] == ["lin-thresh (trial 5)"] * 2


def test_correlation_of_score_and_angle_is_that_of_complete_trials():
    rows = [lin(n, COMPLETE, [70.0 + n], gain=1 + n / 9) for n in range(5)]
    caption = lambda: DRAW["alignment"](FULL._replace(trials=pd.DataFrame(rows))).figures[0].caption
    assert caption() == "lin-thresh, rank correlation \N{MINUS SIGN}1.00"
    rows[0]["state"] = PRUNED
    assert caption() == "lin-thresh"  # too few


def test_lines_of_the_budget_have_their_rules_names_at_their_ends(shown):
    """Against trials, and against the epochs and seconds that they have cost."""
    ends = [(3, 6), (3 + 1, 4 * 3 + 1 + 1), (4 * 0.5, (4 * 3 + 1 + 1) * 2.0)]
    for drawing, end in zip(shown["budget"].figures, ends, strict=True):
        labels: Any = drawing.figure.layout.annotations
        assert [label.text for label in labels] == ["bp", "lin-thresh"]
        assert [label.x for label in labels] == pytest.approx(end)
        assert [label.y for label in labels] == pytest.approx([80, 78])
        assert not drawing.figure.layout.showlegend


def test_what_was_not_recorded_is_not_drawn_as_a_cost():
    trials = FULL.trials.drop(columns="training_seconds")
    titles = [
        one.figure.layout.xaxis.title.text  # pyright: ignore[reportAttributeAccessIssue]
        for one in DRAW["budget"](FULL._replace(trials=trials)).figures
    ]
    assert titles == ["number k of trials of the rule", "epochs, over all seeds"]


def test_scores_that_are_far_off_are_told_of():
    rows = [lin(n, COMPLETE, [score], gain=1 + n / 9) for n, score in enumerate([10.0, 80, 84, 88])]
    history = DRAW["history"](FULL._replace(trials=pd.DataFrame(rows)))
    layout: Any = history.figures[0].figure.layout
    low, high = layout.yaxis.range
    assert 10 < low < 80 and high > 88
    assert "worse than 80 lie outside" in history.note


def test_a_rule_that_is_much_worse_is_in_sight():
    better = [trial(9 + n, "bp", COMPLETE, [90.0 + n / 9], 1e-3) for n in range(9)]
    rows = [lin(1, COMPLETE, [60.0]), lin(2, COMPLETE, [61.0]), *better]
    for name in ("history", "budget"):
        layout: Any = DRAW[name](FULL._replace(trials=pd.DataFrame(rows))).figures[0].figure.layout
        assert layout.yaxis.range[0] < 60.5 and layout.yaxis.range[1] > 90


def test_importances_find_what_the_score_depends_on():
    rng = np.random.default_rng(0)
    rows = []
    for n in range(40):
        rate, gain = rng.uniform(size=2)
        score = 80 - 40 * abs(rate - 0.3)
        rows.append(lin(n, COMPLETE, [score], 1e-4 * 100**rate, 0.5 + 2 * gain))
    rows.append(TRIALS[0])
    panel = DRAW["importances"](FULL._replace(trials=pd.DataFrame(rows), scores=history(rows)))
    (drawing,) = panel.figures
    (bars,) = traces(drawing)  # no trial was stopped early
    assert bars.name == "final scores of the 40 complete trials"
    by_name = dict(zip(bars.y, bars.x, strict=True))
    assert by_name["optimizer.learning_rate"] > 0.9
    assert by_name["trainer.strong_fb"] == 0 and bars.text[-1] == "all True"
    assert "bp is left out: final scores of the 1 complete trial: 1 trial, at least 4" in panel.note


def test_importances_of_all_trials_show_what_early_stopping_has_sorted_out():
    """Every trial without strong feedback is bad, and was stopped at epoch 1."""
    rng = np.random.default_rng(0)
    rows, early = [], []
    for n in range(40):
        strong, gain = bool(n % 2), rng.uniform(0.5, 2.5)
        scores = [60.0 + 20 * strong + gain] if not strong else [80.0 + gain, 0.0, 90 + gain]
        rows.append(
            lin(n, COMPLETE if strong else PRUNED, scores, 10 ** rng.uniform(-4, -2), gain, strong)
        )
        early.append((f"run{n}", "m", 1, scores[0]))
    rows.append(lin(40, FAILED, []))
    scores = pd.DataFrame(early, columns=FULL.scores.columns)
    panel = DRAW["importances"](FULL._replace(trials=pd.DataFrame(rows), scores=scores))
    (drawing,) = panel.figures
    every, complete = traces(drawing)
    assert every.name == "scores after epoch 1 of 40 of the 41 trials"
    assert complete.name == "final scores of the 20 complete trials"
    shares, of_complete = (dict(zip(bars.y, bars.x, strict=True)) for bars in (every, complete))
    assert every.y[0] == "trainer.strong_fb" and shares["trainer.strong_fb"] > 0.9
    assert of_complete["trainer.strong_fb"] == 0
    assert complete.text[list(complete.y).index("trainer.strong_fb")] == "all True"
    assert of_complete["model.vf.g_EI"] > 0.9


def test_conditional_parameters_have_no_importance(shown):
    every, complete = traces(shown["importances"].figures[0])
    assert not any("target_nudge" in name for name in (*every.y, *complete.y))
    assert "not every trial has it: trainer.target_nudge" in shown["importances"].note


def test_parallel_coordinates_have_whole_names(shown, of_losses):
    (drawing,) = shown["parallel"].figures  # bp has one parameter
    names = [text.replace("<br>", "") for text in drawing.figure.layout.xaxis.ticktext]
    assert names[1:] == [
        "model.vf.g_EI",
        "optimizer.learning_rate",
        "trainer.strong_fb",
        "trainer.target_nudge",
    ]
    assert len(drawing.figure.data) == 4  # complete trials
    best = max(drawing.figure.data, key=lambda line: line.opacity)
    assert best.y[0] == 1 and best.opacity == 1
    lowest = of_losses["parallel"].figures[0].figure
    assert max(lowest.data, key=lambda line: line.opacity).y[0] == 0
    assert drawing.width > 400


def vertical_lines(figure):
    return sorted(shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1)


def test_slices_mark_the_edges_and_the_best(shown):
    figures = {drawing.caption: drawing.figure for drawing in shown["slices"].figures}
    assert vertical_lines(figures["bp"]) == [1e-4, 1e-2]
    assert vertical_lines(figures["lin-thresh"]) == [0.0, 1e-4, 1e-2, 0.5, 0.5, 2.5]
    assert figures["bp"].layout.xaxis.type == "log"
    assert list(figures["bp"].layout.xaxis.ticktext) == ["0.0001", "0.001", "0.01"]
    stars = [trace for trace in figures["lin-thresh"].data if trace.name == "best"]
    assert [list(star.y) for star in stars] == [[78]] * 3
    assert [list(star.x) for star in stars] == [[2.0], [2e-3], ["True"]]
    names = {trace.name for trace in figures["lin-thresh"].data}
    assert names == {COMPLETE, "best", "worse than shown"}  # the pruned one, at 60, is far off
    shown = [trace.name for trace in figures["lin-thresh"].data if trace.showlegend]
    assert sorted(shown) == sorted(names)  # each once


@pytest.mark.parametrize("metric", SELECTION.values())
def test_slices_clip_what_is_far_off(metric):
    sign = metric.sign
    scores = [sign * score for score in (10.0, 80.0, 84.0, 88.0)]
    rows = [lin(n, COMPLETE, [score], gain=1 + n / 9) for n, score in enumerate(scores)]
    slices = DRAW["slices"](FULL._replace(trials=pd.DataFrame(rows), metric=metric))
    marks: Any = slices.figures[0].figure.data
    off = [trace for trace in marks if trace.name == "worse than shown"]
    assert [list(trace.y) for trace in off] == [[sign * 80]] * 3
    assert f"{sign * 10}" in off[0].text[0]


def test_failures(shown):
    assert [drawing.caption for drawing in shown["failures"].figures] == [
        "bp, 1 of 3 trials failed",
        "lin-thresh, 1 of 6 trials failed",
    ]
    others, failed = shown["failures"].figures[0].figure.data
    assert list(failed.x) == [1.0] and list(others.x) == pytest.approx([0.5, 1.0])
    assert "&lt;b&gt;" in failed.text[0]
    assert vertical_lines(shown["failures"].figures[0].figure) == [0, 1]


def test_ode(shown):
    gap, growth = (drawing.figure for drawing in shown["ode"].figures)
    assert gap.layout.xaxis.type == "log" and growth.layout.xaxis.type == "linear"
    assert vertical_lines(gap) == [1e-3] and vertical_lines(growth) == [0]
    sound, flagged = growth.data
    assert list(sound.x) == [-8] and list(flagged.x) == [3]
    assert growth.layout.yaxis.ticktext[flagged.y[0]].startswith("other")
    assert "50 % of the samples" in flagged.text[0]


# --- studies side by side


def test_lines_of_studies_are_their_numbers():
    """`other` has another best trial of bp, and no other rule."""
    few = [TRIALS[0], trial(9, "bp", COMPLETE, [1.0, 2.0, 99.0], 1e-3)]
    other = FULL._replace(trials=pd.DataFrame(few), scores=history(few), retrained=NO_RETRAINED)
    studies = {"full": FULL, "other": other}
    best = {(line.caption, line.study): line for line in comparison.best_trials(studies)}
    assert [*best] == [("bp", "full"), ("lin-thresh", "full"), ("bp", "other")]
    assert best["bp", "full"][2:] == ("trial 0, epoch", [1, 3], [60.0, 80.0])
    assert best["lin-thresh", "full"].hover == "trial 5, epoch"  # of equals, the first
    assert best["bp", "other"].y == [69.0, 99.0]
    budget = {(line.caption, line.study): line for line in comparison.best_by_budget(studies)}
    assert budget["bp", "other"].x == [1, 2] and budget["bp", "other"].y == [89.5, 99.0]
    runs_of = {line.caption: line.hover for line in comparison.learning(studies)}
    assert runs_of["bp, 3 hidden layers, mnist"] == "seed 1, epoch"
    (bp, lin) = comparison.draw_best_trials(studies).figures
    assert [line.name for line in traces(bp)] == ["full", "other"]
    assert [line.line.color for line in traces(bp)] == [*comparison.COLOURS[:2]]
    assert [line.name for line in traces(lin)] == ["full"]


# --- the page


def test_html_is_escaped_and_the_same_again(shown):
    drawing = shown["learning"].figures[0]._replace(caption=EVIL)
    text = panels.html(drawing)
    assert text == panels.html(drawing)
    assert "&lt;/script&gt;&lt;b&gt;&amp;" in text
    assert "<b>" not in text and text.count("</script>") == text.count("<script")
    assert (
        'id="learning-1"' in text
        and '"responsive": true' in text
        and '"displaylogo": false' in text
    )
    assert len(text) < 100_000  # plotly.js is not in it


def test_the_page_escapes_and_links_to_its_sections(shown):
    table = {"title": EVIL, "note": EVIL, "html": Markup("<table></table>")}
    text = forms.filled_in(
        title=EVIL,
        subtitle=EVIL,
        summary=[EVIL],
        tables=[table],
        parts=[table | {"id": "search"}],
        warnings=[EVIL],
        panels=shown.values(),
        provenance=[("name", EVIL)],
        provenance_json=EVIL,
        commands=[EVIL],
        plotly_js=Markup("var Plotly;"),
    )
    assert EVIL not in text and "<b>" not in text
    assert text.count("<script>var Plotly;</script>") == 1
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)  # nothing is fetched
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len({*ids})
    linked = re.findall(r'href="#([^"]+)"', text)
    assert linked == ["results", "search", *shown, "provenance"]
    assert {*linked} <= {*ids}


def test_the_page_of_nothing_has_no_empty_section():
    text = forms.filled_in(title="nothing", plotly_js=Markup("var Plotly;"))
    assert not re.search(
        "<section|<table|<details|<h2|<ul|<nav|Plotly", text.partition("<body>")[2]
    )
