"""`checklist.md`: what reproducibility checklists ask, as far as the study's own record answers it.

The questions are those of the NeurIPS paper checklist (experiments, compute, assets) and of the
machine learning reproducibility checklist (Pineau et al. 2021, JMLR 22(164)), in our words. What
the record does not know is left as a blank for the author.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from analysis import selection
from analysis.report import contents
from analysis.report.contents import Report
from disinhib.tuning import space_tree
from disinhib.tuning.event_log import COMPLETE, FAILED, PRUNED

FILE = "checklist.md"
BLANK = "_____"  # for the author to fill in
HEAD = (
    f"Filled in from the record of the study. {BLANK} is what the record does not know: fill it in,"
    " or say why it does not apply."
)


class Item(NamedTuple):
    question: str
    answers: Sequence[str]  # none: it is not in the record


def text(report: Report) -> str:
    """The checklist of one study, as Markdown."""
    parts = [f"# Reproducibility checklist of the study {report.study.name}\n", HEAD + "\n"]
    for title, items in sections(report).items():
        parts.append(f"## {title}\n")
        parts += [_line(item) for item in items]
        parts.append("")
    return "\n".join(parts)


def _line(item: Item) -> str:
    answers = item.answers or [BLANK]
    if len(answers) == 1:
        return f"- **{item.question}** {answers[0]}"
    return "\n".join([f"- **{item.question}**", *(f"  - {answer}" for answer in answers)])


def sections(report: Report) -> dict[str, list[Item]]:
    """The items by the title of their section."""
    how = dict(contents.method(report))
    known = dict(contents.provenance(report))
    drawn = contents.is_drawn(report.study.options)
    by_position = ", cut by position (which samples seeds have drawn is not in it)" if drawn else ""
    answer = lambda *names: [how[name] for name in names if name in how]
    recorded = lambda *names: [f"{name}: {known[name]}" for name in names if name in known]
    return {
        "Claims": [Item("What is claimed, and what limits it?", [])],
        "Data": [
            Item("Which data, and how many samples in each split? How were they split?",
                 answer("data")),
            Item("Is it certain that these were the data?",
                 [f"hash of the images and labels of each split{by_position}: {known['data']}"]),
            Item("How were inputs prepared?", [known["inputs"]] if "inputs" in known else []),
            Item("Where can the data be had, and under which licence?", []),
        ],
        "Models": [
            Item("Which learning rules?",
                 [f"{name}: {words}" for name, words in contents.rules(report.data)]),
            Item("How large is the network?",
                 [f"hidden layers of {how['hidden layers']}"] if "hidden layers" in how else []),
        ],
        "Hyperparameters": _hyperparameters(report, how),
        "Runs and their variation": _runs(report, how),
        "Compute": _compute(report, how),
        "Code": [
            Item("Which code, in which version?",
                 recorded("code", "plugins", "python", "packages")),
            Item("Which commands give the numbers again?",
                 [f"{name}: `{how[name]}`" for name in how
                  if name.startswith("to ") or name == "command"]),
            Item("Where is it, and under which licence?",
                 ["disinhib: MIT licence (file LICENSE)",
                  f"address of the code as it was used: {BLANK}"]),
            Item("Are the trained networks and the study's record available?", []),
        ],
        "Consequences": [Item("Ethics, societal impact, safeguards?", [])],
    }  # fmt: skip


def _hyperparameters(report: Report, how: Mapping[str, str]) -> list[Item]:
    study, won = report.study, report.won
    fixed = "all options: config.yaml among the artifacts of the study's run in MLflow"
    if study.space is None:
        return [Item("Which values?", [how["budget"], fixed]), Item("How were they chosen?", [])]
    ranges = [
        f"`{name}`: {space_tree.words(kind)}" for name, kind in study.space["parameters"].items()
    ]
    repeated = study.options.get("repeats", 1) > 1  # earlier versions had none
    chosen = [selection.how(study.options["metric"], repeated=repeated)]  # what would be retrained
    if recorded := contents.selections(report):
        chosen = [*dict.fromkeys(one.get("rule", BLANK) for one in recorded)]
    return [
        Item("What was searched, and in which ranges?", ranges),
        Item("How were values proposed, and trials stopped early?",
             [how["search"], how["sampler"], f"early stopping: {how['early stopping']}"]),
        Item("How was the best value chosen?", chosen),
        Item("What were the best values?",
             ["the report's table *What won*; trials "
              + ", ".join(f"{row['trial']} ({row['rule']})" for row in won)] if won else []),
        Item("What was not searched?", [how["budget"], fixed]),
        Item("Were other ranges or values tried before?", []),
    ]  # fmt: skip


def _runs(report: Report, how: Mapping[str, str]) -> list[Item]:
    trials = report.data.trials.to_dict("records")
    seeds = report.data.retrained.to_dict("records")
    counts = []
    for row in report.search.to_dict("records"):
        states = ", ".join(f"{row[state]} {state}" for state in (COMPLETE, PRUNED, FAILED))
        counts.append(f"search, {row['rule']}: {row['trials']} trials ({states})")
    failed = sum(row["state"] == FAILED for row in seeds)
    flagged = sum(bool(row["flag"]) for row in seeds)
    if seeds:
        counts.append(f"retrained: {len(seeds)} runs, {failed} diverged, {flagged} flagged")
    counts += [f"left out of these: {reason}" for reason in report.left_out]
    saw_test = [str(row["trial"]) for row in trials if row["saw_test"]]
    used = ["once for each retrained run, after its last epoch"] if seeds else []
    if saw_test:
        used.append(f"{'but ' if seeds else ''}in the search, by trials {', '.join(saw_test)}")
    by_data = report.results.groupby("dataset", sort=False) if len(report.results) else ()
    notes = [contents.note(numbers) for _, numbers in by_data]
    return [
        Item("How many runs?", counts),
        Item("Which seeds?", [how["seeds"]] if "seeds" in how else []),
        Item("What is measured?",
             ([f"score of the search: {how['score']}"] if "score" in how else [])
             + (["result: test accuracy in %"] if seeds else [])),
        Item("When was the test set used?", ["; ".join(used) or "not yet"]),
        Item("What do averages and intervals mean, and what varies?", list(dict.fromkeys(notes))),
        Item("What speaks against the numbers?",
             [f"{len(report.warnings)} warnings, listed in the report"] if report.warnings
             else ["the report has no warning"]),
    ]  # fmt: skip


def _compute(report: Report, how: Mapping[str, str]) -> list[Item]:
    spent = [
        f"search, {row['rule']}: {row['epochs']} epochs, {row['hours']:.2g} hours of trials"
        for row in report.search.to_dict("records")
    ]
    seeds = report.data.retrained.to_dict("records")
    if seeds:
        spent.append(f"retraining: {sum(row['epochs'] for row in seeds)} epochs")
    return [
        Item("Which machines?", [how["machines"]]),
        Item("How much was computed?", spent),
        Item("How much memory, how much energy?", []),
        Item("What was computed beyond this study (earlier searches, failed attempts)?", []),
    ]
