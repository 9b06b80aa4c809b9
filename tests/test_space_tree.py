"""What `space_tree` and `initial_points` say of a space is what Optuna finds when it runs it."""

import itertools
import json
import math
from functools import cache

import optuna
import pytest
import yaml
from hypothesis import given, strategies as st

from disinhib import hydra_config
from disinhib.checks import flatten
from disinhib.errors import ConfigError
from disinhib.rules.branches import either, feedback, log_uniform
from disinhib.tuning import space_tree
from disinhib.tuning.initial_points import defaults, grid, read_points
from search_spaces import SPACES


def configured(overrides):
    """The training options under those of `overrides` that choose a group."""
    groups = (f"{name}={value}" for name, value in overrides.items() if hydra_config.is_group(name))
    return _composed(tuple(groups))


@cache
def _composed(groups):
    return flatten(hydra_config.compose("train", groups)[0])


def run(space, point):
    """The trial that Optuna makes of `point`, and the overrides that the space returns."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(point)
    trial = study.ask()
    overrides = space(trial)
    return trial, overrides


def samples(space, n):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(n):
        trial = study.ask()
        yield trial, space(trial)


def two_kinds(trial):
    """Numbers and choices of every kind, some of them conditional on two choices or on a number."""
    overrides = {"a": trial.suggest_categorical("a", (False, True))}
    overrides["b"] = trial.suggest_categorical("b", ("x", "y"))
    if overrides["a"] and overrides["b"] == "y":
        overrides["both"] = trial.suggest_float("both", 0.0, 1.0, step=0.25)
    overrides["layers"] = trial.suggest_int("layers", 1, 3)
    for layer in range(overrides["layers"]):
        overrides[f"size{layer}"] = trial.suggest_int(f"size{layer}", 8, 64, log=True)
    overrides["rate"] = trial.suggest_float("rate", 1e-3, 1e-1, log=True)
    return overrides


def ranged(kind, **arguments):
    """A space of one number."""
    return lambda trial: {"x": getattr(trial, f"suggest_{kind}")("x", **arguments)}


def changed(**now):
    """exact-inv's branch as shipped, but for what is given."""

    def space(trial):
        return {
            "model/vf": now.get("circuit", "dale"),
            "trainer": "exact-inv",
            **log_uniform(
                trial, "exact-inv", "optimizer.learning_rate", 1e-4, now.get("high", 1e-2)
            ),
            **(log_uniform(trial, "exact-inv", "x", 1, 2) if "added" in now else {}),
            **({} if "removed" in now else either(trial, "exact-inv", "trainer.strong_fb")),
        }

    return space


ALL = {**SPACES, "two_kinds": two_kinds}
every_space = pytest.mark.parametrize("space", [pytest.param(ALL[name], id=name) for name in ALL])
shipped = pytest.mark.parametrize("space", [pytest.param(SPACES[name], id=name) for name in SPACES])


# Definitions


@every_space
def test_a_definition_has_every_parameter_and_setting_that_optuna_finds(space):
    described = json.loads(json.dumps(space_tree.definition(space)))  # in JSON's own types
    branches = {json.dumps(b["choices"], sort_keys=True): b for b in described["branches"]}
    kinds = {}
    for trial, overrides in samples(space, 200):
        for name, kind in trial.distributions.items():
            kinds[name] = {k: v for k, v in vars(kind).items() if not k.startswith("_")}
        choices = {n: v for n, v in trial.params.items() if "choices" in kinds[n]}
        branch = branches[json.dumps(choices, sort_keys=True)]
        assert set(trial.params) <= {*branch["choices"], *branch["parameters"]}
        for option, value in overrides.items():
            assert branch["overrides"][option] in (None, value)
    parameters = {
        name: {key: value for key, value in described["parameters"][name].items() if key != "kind"}
        for name in kinds
    }
    assert set(described["parameters"]) == set(kinds)
    assert parameters == json.loads(json.dumps(kinds))


def test_a_definition_tells_what_a_number_moves_from_what_is_fixed():
    (branch,) = space_tree.definition(SPACES["bp"])["branches"]
    assert branch == {
        "choices": {},
        "parameters": ["bp.optimizer.learning_rate"],
        "overrides": {"model/vf": "non-dale", "trainer": "bp", "optimizer.learning_rate": None},
    }


@shipped
def test_a_fingerprint_is_the_same_for_a_space_and_for_its_definition_read_back(space):
    before = space_tree.definition(space)
    again = json.loads(json.dumps(space_tree.definition(space)))
    assert space_tree.fingerprint(before) == space_tree.fingerprint(again)
    assert space_tree.differences(before, again) == []


def test_a_space_that_branches_on_the_number_of_a_trial_is_traced_as_for_the_first():
    def space(trial):
        return log_uniform(trial, "r", "even" if trial.number % 2 == 0 else "odd", 1, 2)

    assert list(space_tree.definition(space)["parameters"]) == ["r.even"]
    assert [branch.overrides for branch in space_tree.branches(space)] == [{"even": 1}, {"even": 2}]


def test_every_two_spaces_have_other_fingerprints_and_differences():
    defined = [space_tree.definition(space) for space in ALL.values()]
    assert len({space_tree.fingerprint(one) for one in defined}) == len(ALL)
    assert all(space_tree.differences(a, b) for a in defined for b in defined if a is not b)


def test_the_order_in_which_parameters_are_asked_for_is_no_difference():
    def forward(trial):
        return {**either(trial, "r", "a"), **log_uniform(trial, "r", "b", 1, 2)}

    def backward(trial):
        return {**log_uniform(trial, "r", "b", 1, 2), **either(trial, "r", "a")}

    one, other = space_tree.definition(forward), space_tree.definition(backward)
    assert space_tree.fingerprint(one) == space_tree.fingerprint(other)


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (
            {"high": 0.1},
            "exact-inv.optimizer.learning_rate: 0.0001 to 0.01 (log), now 0.0001 to 0.1 (log)",
        ),
        ({"added": True}, "exact-inv.x: not searched, now 1.0 to 2.0 (log)"),
        (
            {"removed": True},
            "exact-inv.trainer.strong_fb: one of false, true, now not searched",
        ),
        ({"circuit": "non-dale"}, "model/vf: dale, now non-dale"),
    ],
)
def test_differences_are_one_line_for_each_parameter_or_setting(now, line):
    before, after = space_tree.definition(changed()), space_tree.definition(changed(**now))
    assert space_tree.differences(before, after) == [line]


def test_a_difference_says_in_which_branches():
    def renamed(trial):
        overrides = dict(SPACES["rules"](trial))
        return {**overrides, "model/vf": "other"} if overrides["trainer"] == "bp" else overrides

    before, after = space_tree.definition(SPACES["rules"]), space_tree.definition(renamed)
    assert space_tree.differences(before, after) == [
        "model/vf: dale, now other (where trainer=bp-ei)",
        "model/vf: non-dale, now other (where trainer=bp)",
    ]


def test_a_parameter_that_moves_to_another_choice_is_a_difference():
    def under(value):
        def space(trial):
            chosen = trial.suggest_categorical("k", ("a", "b"))
            return {"k": chosen, **(log_uniform(trial, "r", "x", 1, 2) if chosen == value else {})}

        return space_tree.definition(space)

    assert space_tree.differences(under("a"), under("b")) == [
        "x: not set, now searched (where k=b)",
        "x: searched, now not set (where k=a)",
    ]


def test_differences_are_never_silent_about_another_fingerprint():
    def under(value):
        def space(trial):
            chosen = trial.suggest_categorical("k", ("a", "b"))
            if chosen == value:
                trial.suggest_categorical("inner", (1, 2))
            return {}

        return space_tree.definition(space)

    assert space_tree.fingerprint(under("a")) != space_tree.fingerprint(under("b"))
    assert len(space_tree.differences(under("a"), under("b"))) == 1


# Defaults


@shipped
def test_a_shipped_space_contains_the_published_defaults_of_each_of_its_rules(space):
    rules = space_tree.rules_of(space)
    points = defaults(space, configured)
    assert [point.get("trainer") for point in points] == (rules or [None])
    for point in points:
        trial, overrides = run(space, point)
        assert trial.params == point  # Optuna drew nothing itself, and moved nothing
        published = configured({k: v for k, v in overrides.items() if isinstance(v, str)})
        searched = {k: v for k, v in overrides.items() if not isinstance(v, str)}
        assert searched == {name: published[name] for name in searched}


def test_defaults_follow_the_conditions_that_they_open():
    def space(trial):
        return {"model/vf": "dale", "trainer": "exact-inv", **feedback(trial, "exact-inv")}

    def nudged(overrides):
        return {**configured(overrides), "trainer.strong_fb": False}

    (strong,), (weak,) = defaults(space, configured), defaults(space, nudged)
    assert "exact-inv.trainer.target_nudge" not in strong
    assert weak["exact-inv.trainer.target_nudge"] == 0.015


def test_a_searched_group_keeps_its_own_default():
    group = "model/vf/activation@model.vf.actI"

    def space(trial):
        kind = trial.suggest_categorical(f"r.{group}", ("sigmoid", "softrelu"))
        return {"model/vf": "dale", "trainer": "exact-inv", group: kind}

    def with_groups(overrides):
        return {group: "softrelu", **configured(overrides), **overrides}

    assert defaults(space, with_groups) == [{f"r.{group}": "softrelu"}]


@pytest.mark.parametrize("option", ["trainer.norm_val", "trainer.no_such_option"])
def test_a_rule_without_a_default_in_its_range_is_left_out(option):
    def space(trial):
        rule = trial.suggest_categorical("trainer", ("bp", "exact-inv"))
        more = {} if rule == "bp" else log_uniform(trial, "r", option, 2.0, 4.0)
        return {"trainer": rule, "model/vf": "dale", **more}

    assert defaults(space, configured) == [{"trainer": "bp"}]


def test_defaults_of_groups_that_never_settle_are_left_out():
    def space(trial):
        return {"g": "b" if trial.suggest_categorical("flag", (False, True)) else "a"}

    assert defaults(space, lambda groups: {"flag": groups.get("g") != "b"}) == []


# Grids


@pytest.mark.parametrize("points", [1, 2])
@every_space
def test_a_grid_has_points_that_optuna_takes_as_they_are_and_none_twice(space, points):
    whole = grid(space, points)
    assert whole == grid(space, points)
    assert len({json.dumps(point, sort_keys=True) for point in whole}) == len(whole)
    for point in whole[:: max(1, len(whole) // 50)]:
        assert run(space, point)[0].params == point


def test_a_grid_is_the_product_of_its_values_where_they_exist():
    def space(trial):
        outer = trial.suggest_categorical("outer", ("a", "b"))
        if outer == "b":
            trial.suggest_float("inner", 0.0, 1.0)
        trial.suggest_int("n", 1, 2)
        return {}

    assert grid(space, 2) == [
        {"outer": "a", "n": 1},
        {"outer": "a", "n": 2},
        *({"outer": "b", "inner": x, "n": n} for x in (0.0, 1.0) for n in (1, 2)),
    ]


def test_a_grid_of_the_rules_has_that_of_each_rule():
    sizes = [len(grid(SPACES[name], 2)) for name in ("bp", "exact_inv", "lin_thresh", "bp_ei")]
    assert len(grid(SPACES["rules"], 2)) == sum(sizes)
    # exact-inv: 7 numbers, with a nudge 8; averaged feedback weights or not.
    assert sizes[1] == 2 * (2**7 + 2**8)


@pytest.mark.parametrize(
    ("space", "points", "values"),
    [
        (ranged("float", low=0, high=1), 3, [0.0, 0.5, 1.0]),
        (ranged("float", low=0, high=1), 1, [0.5]),
        (ranged("float", low=2, high=2), 3, [2.0]),
        (ranged("float", low=1e-4, high=1e-2, log=True), 1, [1e-3]),
        (ranged("float", low=1e-4, high=1e-2, log=True), 3, [1e-4, 1e-3, 1e-2]),
        (ranged("float", low=0.1, high=0.5, step=0.1), 9, [0.1, 0.2, 0.3, 0.4, 0.5]),
        (ranged("float", low=0.1, high=0.5, step=0.1), 3, [0.1, 0.3, 0.5]),
        (ranged("int", low=1, high=3), 9, [1, 2, 3]),
        (ranged("int", low=0, high=100), 3, [0, 50, 100]),
        (ranged("int", low=0, high=9, step=3), 2, [0, 9]),
        (ranged("int", low=1, high=100, log=True), 3, [1, 10, 100]),
        (ranged("int", low=1, high=100, log=True), 1, [10]),
        (ranged("int", low=1, high=10, log=True), 9, [1, 2, 3, 4, 5, 6, 7, 8, 10]),
    ],
)
def test_values_of_a_grid(space, points, values):
    xs = [point["x"] for point in grid(space, points)]
    assert xs == pytest.approx(values, rel=1e-12)  # powers of ten round
    assert [type(value) for value in xs] == [type(value) for value in values]


@st.composite
def ranges(draw):
    """(kind, arguments) of any range of numbers that Optuna takes."""
    log = draw(st.booleans())
    if draw(st.booleans()):
        low, width = draw(st.integers(1 if log else -50, 50)), draw(st.integers(0, 200))
        step = 1 if log else draw(st.integers(1, 7))
        return "int", {"low": low, "high": low + width // step * step, "log": log, "step": step}
    low = draw(st.floats(1e-6 if log else -1e3, 1e3))
    high = draw(st.floats(low, 2e3))
    return "float", {"low": low, "high": high, "log": log}


@given(ranges(), st.integers(1, 12))
def test_a_range_of_a_grid_is_ordered_even_and_from_end_to_end(drawn, points):
    kind, arguments = drawn
    low, high = arguments["low"], arguments["high"]
    values = [point["x"] for point in grid(ranged(kind, **arguments), points)]
    assert values == sorted(set(values))
    assert low <= values[0] and values[-1] <= high
    if points > 1 or low == high:
        assert values[0] == low and values[-1] == high
    if kind == "int":
        assert len(values) == min(points, (high - low) // arguments["step"] + 1)
        assert all((value - low) % arguments["step"] == 0 for value in values)
    elif len(values) > 2:
        scaled = [math.log(v) for v in values] if arguments["log"] else values
        gaps = [b - a for a, b in itertools.pairwise(scaled)]
        # To rounding of the values, not of their gaps.
        assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-6, abs=1e-11)


# Points that someone gives


@every_space
def test_points_read_back_as_the_trials_that_they_come_from(space):
    trials = [trial for trial, _ in samples(space, 20)]
    text = yaml.safe_dump([trial.params for trial in trials])
    assert read_points(text, space) == [trial.params for trial in trials]


@shipped
def test_points_may_name_options_and_groups_instead(space):
    trials = list(samples(space, 20))
    text = yaml.safe_dump([dict(overrides) for _, overrides in trials])
    assert read_points(text, space) == [trial.params for trial, _ in trials]


def test_a_point_may_have_some_of_the_parameters_nested_and_in_any_notation():
    text = """
      - trainer: exact-inv
        model: {vf: {g_EI: 1}}
        optimizer.learning_rate: 1e-3
      - trainer: bp
      - {trainer: bp, model/vf: dale}
      - {trainer: bp-ei, model/vf: dale}
    """
    assert read_points(text, SPACES["rules"]) == [
        {
            "trainer": "exact-inv",
            "exact-inv.model.vf.g_EI": 1.0,
            "exact-inv.optimizer.learning_rate": 1e-3,
        },
        {"trainer": "bp"},
        {"trainer": "bp-ei"},
        {"trainer": "bp-ei"},
    ]
    assert read_points("[]", SPACES["rules"]) == []


def test_a_point_of_one_rule_is_none_of_another():
    """bp-ei is trainer=bp, too, but in another circuit, which a point of it says."""
    narrowed = space_tree.narrowed(SPACES["rules"], {}, {"trainer": ["bp-ei", "exact-inv"]})
    with pytest.raises(ConfigError, match="trainer: given bp, allowed is one of bp-ei, exact-inv"):
        read_points("[{trainer: bp, optimizer.learning_rate: 2e-3}]", narrowed)
    (point,) = read_points("[{trainer: bp, model/vf: dale}]", narrowed)
    assert point == {"trainer": "bp-ei"}


@pytest.mark.parametrize("trainer", ["bp", "bp-ei"])
def test_a_point_of_several_rules_suits_a_study_of_one(trainer):
    for space in (SPACES["bp_ei"], space_tree.narrowed(SPACES["rules"], {"trainer": "bp-ei"}, {})):
        (point,) = read_points(f"[{{trainer: {trainer}, optimizer.learning_rate: 2e-3}}]", space)
        assert point == {"bp-ei.optimizer.learning_rate": 2e-3}


@pytest.mark.parametrize("text", ["", "3", "text", "trainer: bp", "[", "\x00", "- [1]\n- [", "- 3"])
def test_what_is_no_list_of_mappings_is_refused_in_one_line(text):
    with pytest.raises(ConfigError, match=r"not YAML|a mapping") as refusal:
        read_points(text, SPACES["rules"])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (
            {"trainer": "exact-inverse"},
            "trainer: given exact-inverse, allowed is one of bp, bp-ei, exact-inv, lin-thresh;"
            " did you mean exact-inv?",
        ),
        (
            {"optimizer.learning_rate": 0.001},
            "trainer: missing, needed is one of bp, bp-ei, exact-inv, lin-thresh",
        ),
        (
            {"trainer": "bp", "optimizer.learning_rate": 0.1},
            "optimizer.learning_rate: given 0.1, allowed is 0.0001 to 0.01 (log)",
        ),
        (
            {"trainer": "bp", "optimizer.learning_rate": "a\nb"},
            "optimizer.learning_rate: given a b, allowed is 0.0001 to 0.01 (log)",
        ),
        (
            {"trainer": "bp", "optimizer.learning_rate": float("nan")},
            "optimizer.learning_rate: given nan, allowed is 0.0001 to 0.01 (log)",
        ),
        (
            {"trainer": "bp", "optimizer.learning_rat": 0.001},
            "optimizer.learning_rat: not searched in this branch;"
            " did you mean optimizer.learning_rate?",
        ),
        (
            {"trainer": "bp", "exact-inv.model.vf.g_EI": 1.0},
            "exact-inv.model.vf.g_EI: not searched in this branch",
        ),
        ({"trainer": "bp", "epochs": [1]}, "epochs: not searched in this branch"),
        (
            {"trainer": "exact-inv", "model/vf": "non-dale"},
            "model/vf: given non-dale, allowed is dale in",
        ),
        (
            {"trainer": "exact-inv", "trainer.strong_fb": 1},
            "trainer.strong_fb: given 1, allowed is one of false, true",
        ),
        (
            {"trainer": "exact-inv", "trainer.strong_fb": True, "trainer.target_nudge": 0.1},
            "exact-inv.trainer.target_nudge: not searched with this point's other choices",
        ),
        (
            {"trainer": "bp", "optimizer.learning_rate": 1e-3, "bp.optimizer.learning_rate": 1e-3},
            "bp.optimizer.learning_rate: given twice",
        ),
    ],
)
def test_a_wrong_point_is_refused_in_one_line(point, message):
    text = yaml.safe_dump([{"trainer": "bp"}, point])
    with pytest.raises(ConfigError) as refusal:
        read_points(text, SPACES["rules"])
    assert str(refusal.value).startswith(f"point 2: {message}")
    assert "\n" not in str(refusal.value)


def test_an_option_that_two_parameters_search_needs_the_full_name():
    def space(trial):
        kind = trial.suggest_categorical("kind", ("a", "b"))
        return {"kind": kind, **log_uniform(trial, kind, "x", 1, 2)}

    with pytest.raises(ConfigError, match=r"point 1: x: could be a\.x or b\.x; give the full name"):
        read_points("- x: 1.5", space)
    assert read_points("- b.x: 1.5", space) == [{"b.x": 1.5}]


@pytest.mark.parametrize(
    ("space", "right", "wrong"),
    [
        (ranged("int", low=0, high=9, step=3), [0, 3, 9.0], [1, 2.5, 12, True, "3"]),
        (ranged("float", low=0, high=1, step=0.1), [0, 0.3, 1], [0.25, 1.1, False]),
        (ranged("categorical", choices=(1e-3, None, "on")), ["1e-3", None, "on"], [True, 1]),
    ],
)
def test_values_of_a_point(space, right, wrong):
    for value in right:
        (point,) = read_points(yaml.safe_dump([{"x": value}]).replace("'1e-3'", "1e-3"), space)
        assert run(space, point)[0].params == point
    for value in wrong:
        with pytest.raises(ConfigError, match=r"point 1: x: given .*, allowed is"):
            read_points(yaml.safe_dump([{"x": value}]), space)
