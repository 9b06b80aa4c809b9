"""Whose trial is next: each rule, and each repeat of its tuning, is to have as much as the others.

With `budget=trials` they take turns. With `budget=epochs` or `seconds` the trial goes to the one
that has spent least, so that a rule whose epochs are cheap has more trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from disinhib.tuning.event_log import COMPLETE, NO_POINT, PRUNED, REPEAT, Point, Record, TrialConfig
from disinhib.tuning.space_tree import RULE

TRIALS = "trials"
SPENT: dict[str, Callable[[Record], float]] = {  # by a trial
    "epochs": lambda record: record.epochs,
    "seconds": lambda record: record.training_seconds,
}
BUDGETS = (TRIALS, *SPENT)


class Sharing(NamedTuple):
    """Among whom a study shares its trials."""

    rules: Sequence[str] = ()  # none: the sampler chooses the rule
    repeats: int = 1
    budget: str = TRIALS
    first: Mapping[str | None, int] = {}  # initial points of a rule, which it tries in any case


class Turn(NamedTuple):
    """Whose trial a number is."""

    rule: str | None  # None: the sampler chooses it
    repeat: int  # from 1
    earlier: Sequence[int]  # the numbers of its trials before this one

    @property
    def index(self) -> int:
        """From 0, among the trials of this rule and repeat."""
        return len(self.earlier)


def turn(number: int, records: Mapping[int, Record], sharing: Sharing) -> Turn:
    """The turn of trial `number`, before which all trials are in `records` (which only a budget of
    epochs or seconds reads).

    In turns: first a trial of each repeat with the first rule, then with the second, ..., and then
    it begins anew.
    """
    rules, repeats = sharing.rules, sharing.repeats
    if sharing.budget != TRIALS:
        return _least_spent(number, records, sharing)
    place, repeat = divmod(number, repeats)
    turns = max(1, len(rules))
    own = range(number % (turns * repeats), number, turns * repeats)
    return Turn(rules[place % turns] if rules else None, repeat + 1, own)


def reserved(number: int, whose: Turn, epochs: int) -> Record:
    """A trial of which no more is known than whose it is, and its budget."""
    config = TrialConfig(number=number, rule=whose.rule or "", epochs=epochs)  # pyright: ignore
    point = NO_POINT if whose.rule is None else Point(**{**NO_POINT, "params": {RULE: whose.rule}})
    return Record(config, point, tags={REPEAT: str(whose.repeat)})


def _least_spent(number: int, records: Mapping[int, Record], sharing: Sharing) -> Turn:
    """Initial points come first. Then the turn is that of the rule and repeat that has spent least;
    where several have, that with fewer trials.

    A trial that runs, or has failed, counts as at least the mean one of its rule and repeat, or of
    all, that early stopping or its budget has ended: else a rule whose trials fail at once would
    have all of them.
    """
    shares: dict[tuple[str | None, int], list[Record]] = {
        (rule, repeat): []
        for rule in sharing.rules or (None,)
        for repeat in range(1, sharing.repeats + 1)
    }
    for earlier in range(number):
        record = records[earlier]
        # As the space calls it: its branch may choose a circuit on which the rule has another name.
        rule = record.point["params"][RULE] if sharing.rules else None
        shares[rule, record.repeat].append(record)
    cost = SPENT[sharing.budget]
    regular = lambda own: [cost(record) for record in own if record.state in (COMPLETE, PRUNED)]
    of_all = [spent for own in shares.values() for spent in regular(own)] or [0.0]
    spent = {}
    for share, own in shares.items():
        ended = regular(own)
        typical = fmean(ended or of_all)
        others = [max(cost(r), typical) for r in own if r.state not in (COMPLETE, PRUNED)]
        spent[share] = sum(ended) + sum(others)
    waits = lambda share: len(shares[share]) >= sharing.first.get(share[0], 0)
    key = lambda share: (waits(share), waits(share) and spent[share], len(shares[share]))
    rule, repeat = share = min(shares, key=key)
    return Turn(rule, repeat, [record.number for record in shares[share]])
