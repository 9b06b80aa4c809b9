"""Quasi-random points: a sequence for each rule, even in every parameter, the same when resumed."""

import math
from collections import Counter

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import qmc

from disinhib.tuning import manifest, options, quasi_random, space_tree
from disinhib.tuning.event_log import Record
from disinhib.tuning.turns import Sharing, turn
from search_spaces import SPACES

RULES = space_tree.rules_of(SPACES["rules"])
EXACT = quasi_random.dimensions(SPACES["rules"], "exact-inv")
EXACT_RATE = EXACT["exact-inv.optimizer.learning_rate"]  # that of all rules
N = 64


def shares(points, kinds=EXACT):
    """Where the points lie, 0 to 1 in every parameter: `[points, parameters]`."""

    def share(kind, value):
        if isinstance(kind, CategoricalDistribution):
            return (kind.choices.index(value) + 0.5) / len(kind.choices)
        scale = math.log if kind.log else float
        return (scale(value) - scale(kind.low)) / (scale(kind.high) - scale(kind.low))

    return np.array([[share(kind, p[name]) for name, kind in kinds.items()] for p in points])


def test_a_rules_parameters_are_those_that_any_of_its_choices_leads_to():
    assert {*quasi_random.dimensions(SPACES["rules"], "bp")} == {"bp.optimizer.learning_rate"}
    assert "exact-inv.trainer.target_nudge" in EXACT and "trainer" not in EXACT
    assert all(name.startswith("exact-inv.") for name in EXACT)
    whole = quasi_random.dimensions(SPACES["rules"], None)
    assert whole.keys() == space_tree.definition(SPACES["rules"])["parameters"].keys()


def test_every_64_points_from_the_first_on_are_even_in_each_parameter():
    """One in each 64th of every range, and half with each choice. (Independent draws leave a third
    of the 64ths empty.)"""
    for seed in range(3):
        for first in (0, N):
            points = [quasi_random.point(EXACT, seed, first + n) for n in range(N)]
            for kind, column in zip(EXACT.values(), shares(points).T, strict=True):
                if isinstance(kind, CategoricalDistribution):
                    assert {*Counter(column).values()} == {N // len(kind.choices)}
                else:
                    assert sorted((column * N).astype(int)) == [*range(N)]


def test_any_number_of_points_covers_the_space_more_evenly_than_independent_draws():
    """By the centred discrepancy of the numeric parameters."""
    numeric = {n: k for n, k in EXACT.items() if not isinstance(k, CategoricalDistribution)}
    drawn = [np.random.default_rng(seed).random((20, len(numeric))) for seed in range(20)]
    own = [
        shares([quasi_random.point(numeric, seed, n) for n in range(20)], numeric)
        for seed in range(5)
    ]
    assert max(map(qmc.discrepancy, own)) < min(map(qmc.discrepancy, drawn))


def whose(number, rules=RULES, repeats=1):
    return turn(number, {}, Sharing(rules, repeats))


def test_rules_have_sequences_of_their_own_and_a_seed_another_scrambling():
    of = quasi_random.points(SPACES["rules"], 0, RULES)
    exact, linear = ([of(whose(4 * n + place)) for n in range(8)] for place in (2, 3))
    assert all(name.startswith("exact-inv.") for point in exact for name in point)
    gains = [[p[f"{rule}.model.vf.g_EI"] for p in points]
             for rule, points in (("exact-inv", exact), ("lin-thresh", linear))]  # fmt: skip
    assert not {*gains[0]} & {*gains[1]}
    assert quasi_random.points(SPACES["rules"], 1, RULES)(whose(2)) != exact[0]
    assert quasi_random.points(SPACES["rules"], 0, RULES)(whose(6)) == exact[1]


def test_repeats_have_sequences_of_their_own():
    of = quasi_random.points(SPACES["rules"], 0, RULES, repeats=3)
    (name,) = quasi_random.dimensions(SPACES["rules"], "bp")
    repeats = [
        [of(whose(12 * n + repeat, repeats=3))[name] for n in range(N)] for repeat in range(3)
    ]
    assert len({value for values in repeats for value in values}) == 3 * N
    for values in repeats:
        column = shares([{name: value} for value in values], {name: EXACT_RATE})[:, 0]
        assert sorted((column * N).astype(int)) == [*range(N)]


def test_where_rules_take_no_turns_the_rule_is_a_coordinate_too():
    of = quasi_random.points(SPACES["rules"], 0)
    counts = Counter(of(whose(n, ()))["trainer"] for n in range(64))
    assert counts == dict.fromkeys(RULES, 16)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (CategoricalDistribution(("a", None, True)), ["a"] * 4 + [None] * 4 + [True] * 4),
        (FloatDistribution(0.1, 0.4, step=0.1), [v for v in (0.1, 0.2, 0.3, 0.4) for _ in "abc"]),
        (IntDistribution(2, 6, step=2), [v for v in (2, 4, 6) for _ in "abcd"]),
        (IntDistribution(1, 4), [v for v in (1, 2, 3, 4) for _ in "abc"]),
    ],
)
def test_choices_and_steps_have_equal_shares(kind, values):
    got = [quasi_random.value_at(kind, (n + 0.5) / 12) for n in range(12)]
    assert [(type(v), v) for v in got] == [(type(v), v) for v in values]


def test_ranges_are_on_their_scale_and_never_left():
    log = FloatDistribution(1e-4, 1e-2, log=True)
    assert quasi_random.value_at(log, 0.5) == pytest.approx(1e-3)
    whole = IntDistribution(1, 100, log=True)
    assert isinstance(quasi_random.value_at(whole, 0.5), int)
    almost = np.nextafter(1, 0)
    for kind in (log, whole, FloatDistribution(-3.3, 0.1), IntDistribution(5, 5)):
        assert quasi_random.value_at(kind, 0.0) == pytest.approx(kind.low, rel=1e-12)
        assert kind.low <= quasi_random.value_at(kind, almost) <= kind.high
    assert quasi_random.point({}, 0, 5) == {}


def test_a_study_proposes_the_points_and_does_so_again_when_it_is_resumed(tmp_path):
    """After the published defaults, which take the place of the first ones, and around a point of
    a file, of which they give what it leaves out."""
    file = tmp_path / "points.yaml"
    file.write_text("[{trainer: exact-inv, trainer.norm_val: 1.5}]")
    study = options.compose(["searcher=qmc", "trials=12", f"points={file}", f"out_dir={tmp_path}"])
    begun = manifest.Manifest("", {}, points=options.first_points(study))
    own = quasi_random.points(study.search_space, study.seed, RULES)
    records = {}
    for number in range(12):
        asked = manifest.proposer(study, begun)(number, records)
        records[number] = Record(asked.config, asked.point)
        expected = {**own(whose(number)), "trainer": RULES[number % 4]}
        if number < 4:
            expected = begun.points[number]
        elif number == 6:
            expected["exact-inv.trainer.norm_val"] = 1.5
        assert asked.point["params"].items() <= expected.items()
        assert manifest.proposer(study, begun)(number, {}) == asked
