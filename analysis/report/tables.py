"""The numbers of a report, computed once, and the four forms in which they are told.

Accuracies are per cent. A row is a configuration; n counts the seeds that ran the whole budget, and
those that diverged stand beside them, in no mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis import stats
from analysis.selection import spent
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED

REFERENCE = "bp"  # what every rule is compared with
TEST, VALID = "test_accuracy", "valid_accuracy"
FEEDBACK = {"none": "none", "false": "per sample", "true": "averaged"}


def results(
    retrained: pd.DataFrame, trials: pd.DataFrame, metric: str = "valid_accuracy"
) -> pd.DataFrame:
    """A row for each configuration that was retrained, as numbers.

    Columns: dataset, rule, depth, feedback, trial (NaN if none was selected), epochs, n, diverged,
    flagged (seeds whose dynamics were not borne out), test_mean, test_sd, test_low, test_high,
    valid_mean, valid_sd, bp_mean, bp_low, bp_high, bp_paired (difference of test accuracy to bp on
    the same data with the same depth and epochs), tuned (the trial's score in the search), gap
    (that minus the mean of `metric` over the fresh seeds), search_trials and search_epochs (what
    the rule got of the search), key.
    """
    if retrained.empty:
        return pd.DataFrame()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in retrained.to_dict("records"):
        groups.setdefault(_key(row), []).append(row)
    tried = trials.to_dict("records")
    tuned = {row["run_id"]: row["score"] for row in tried}
    rows = []
    for key, seeds in groups.items():
        first = seeds[0]
        done = [seed for seed in seeds if seed["state"] == COMPLETE]
        test = stats.summary([seed[TEST] for seed in done])
        valid = stats.summary([seed[VALID] for seed in done])
        again = stats.summary([seed[metric] for seed in done])
        other = _reference(groups, first)
        versus = None
        if other is not None and other is not seeds:
            versus = stats.difference(_by_seed(seeds), _by_seed(other))
        score = tuned.get(first["of_run"], math.nan)
        rows.append(
            {
                "dataset": first["dataset"],
                "rule": first["rule"],
                "depth": first["depth"],
                "feedback": _feedback(first),
                "trial": first["trial"],
                "epochs": first["budget"],
                "n": test.n,
                "diverged": sum(seed["state"] == FAILED for seed in seeds),
                "flagged": sum(bool(seed["flag"]) for seed in seeds),
                "test_mean": test.mean,
                "test_sd": test.sd,
                "test_low": test.interval.low,
                "test_high": test.interval.high,
                "valid_mean": valid.mean,
                "valid_sd": valid.sd,
                "bp_mean": versus.mean if versus else math.nan,
                "bp_low": versus.interval.low if versus else math.nan,
                "bp_high": versus.interval.high if versus else math.nan,
                "bp_paired": versus.paired if versus else None,
                "tuned": score,
                "gap": score - again.mean,
                "search_trials": sum(row["rule"] == first["rule"] for row in tried),
                "search_epochs": spent(row for row in tried if row["rule"] == first["rule"]),
                "key": key,
            }
        )
    rows.sort(key=lambda r: (r["dataset"], r["depth"], r["rule"], r["feedback"], r["epochs"]))
    return pd.DataFrame(rows)


def _key(row: Mapping[str, Any]) -> str:
    return row["of_run"] or row["configuration"]


def _feedback(row: Mapping[str, Any]) -> str:
    return FEEDBACK["none" if not row["feedback"] else str(row["averaged"]).lower()]


def _by_seed(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    return {row["seed"]: row[TEST] for row in rows if row["state"] == COMPLETE}


def _reference(
    groups: Mapping[str, list[dict[str, Any]]], row: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """The seeds of back-propagation that `row` is compared with; of several configurations those
    that are best on validation data."""
    alike = ("dataset", "depth", "budget")
    mean = lambda seeds: stats.summary([s[VALID] for s in seeds if s["state"] == COMPLETE]).mean
    found = [
        seeds
        for seeds in groups.values()
        if seeds[0]["rule"] == REFERENCE
        and all(seeds[0][name] == row[name] for name in alike)
        and _by_seed(seeds)
    ]
    return max(found, key=mean, default=None)


def search(trials: pd.DataFrame, mode: str = "max") -> pd.DataFrame:
    """What each rule got of the search: a row a rule, the numbers of its trials by how they ended,
    epochs trained over all seeds, hours of its trials, best validation score."""
    rows = []
    for rule in dict.fromkeys(trials["rule"]):
        records = [row for row in trials.to_dict("records") if row["rule"] == rule]
        states = [row["state"] for row in records]
        scores = [row["score"] for row in records if row["state"] == COMPLETE]
        rows.append(
            {
                "rule": rule,
                "trials": len(records),
                **{state: states.count(state) for state in (COMPLETE, PRUNED, FAILED)},
                "epochs": spent(records),
                "hours": sum(row["seconds"] for row in records) / 3600,
                "best": {"max": max, "min": min}[mode](scores, default=math.nan),
            }
        )
    return pd.DataFrame(rows)


def shown(numbers: pd.DataFrame) -> pd.DataFrame:
    """`results` as a reader sees them: texts, to two decimals; a column of nothing is left out."""
    rows = numbers.to_dict("records")
    columns: dict[str, list[str]] = {
        "rule": [row["rule"] for row in rows],
        "hidden layers": [str(row["depth"]) for row in rows],
        "feedback": [row["feedback"] for row in rows],
        "trial": [_whole(row["trial"]) for row in rows],
        "epochs": [str(row["epochs"]) for row in rows],
        "test accuracy (n)": [f"{_spread(row, 'test')} ({row['n']})" for row in rows],
        "95 % interval": [_interval(row["test_low"], row["test_high"]) for row in rows],
        "validation": [_spread(row, "valid") for row in rows],
        "test minus bp": [_signed(row["bp_mean"]) for row in rows],
        "its 95 % interval": [_interval(row["bp_low"], row["bp_high"], _signed) for row in rows],
        "tuned": [_number(row["tuned"]) for row in rows],
        "tuned minus retrained": [_signed(row["gap"]) for row in rows],
        "diverged": [str(row["diverged"]) for row in rows],
        "flagged": [str(row["flagged"]) for row in rows],
    }
    optional = ("trial", "test minus bp", "its 95 % interval", "tuned", "tuned minus retrained")
    kept = {n: c for n, c in columns.items() if n not in optional or set(c) != {NOTHING}}
    return pd.DataFrame(kept)


NOTHING = "–"


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.2f}"


def _spread(row: Mapping[str, Any], what: str) -> str:
    return f"{_number(row[f'{what}_mean'])} ± {_number(row[f'{what}_sd'])}"


def _signed(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:+.2f}".replace("-", "−")


def _whole(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.0f}"


def _interval(low: float, high: float, number=_number) -> str:
    return NOTHING if math.isnan(low) else f"[{number(low)}, {number(high)}]"


def shown_search(numbers: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            **{name: [str(v) for v in numbers[name]] for name in numbers if name not in _SEARCH},
            "hours": [f"{hours:.2f}" for hours in numbers["hours"]],
            "best validation score": [_number(best) for best in numbers["best"]],
        }
    )


_SEARCH = ("hours", "best")


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; of texts."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def latex(table: pd.DataFrame) -> str:
    """A tabular for the package booktabs; of texts."""
    plain = table.map(_in_latex).rename(columns=_in_latex)
    return plain.to_latex(index=False, escape=False)


def _in_latex(text: str) -> str:
    for sign, command in (
        ("%", r"\%"), ("_", r"\_"), ("&", r"\&"), ("±", r"$\pm$"), ("−", "$-$"), (NOTHING, "--"),
    ):  # fmt: skip
        text = text.replace(sign, command)
    return text


def html(table: pd.DataFrame) -> str:
    """A table element; of texts, which are escaped."""
    return table.to_html(index=False, border=0, escape=True, justify="unset")
