"""Every search space: real options only, one distribution a name, every branch reached."""

import optuna
import pytest

from disinhib.errors import ConfigError
from disinhib.rules import BRANCHES
from disinhib.tuning import options, space_tree
from search_spaces import SPACES


def samples(space, n=150):
    """`n` random trials of a space, as (trial, overrides)."""
    record = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(n):
        trial = record.ask()
        overrides = space(trial)
        yield trial, overrides


@pytest.mark.parametrize("name", SPACES)
def test_every_branch_composes_to_a_valid_configuration(name):
    options.check_space(options.compose([f"space={name}"]))


@pytest.mark.parametrize("name", SPACES)
def test_a_parameter_has_one_distribution_wherever_it_occurs(name):
    seen = {}
    for trial, _ in samples(SPACES[name]):
        for parameter, distribution in trial.distributions.items():
            assert seen.setdefault(parameter, distribution) == distribution


@pytest.mark.parametrize("name", SPACES)
def test_branches_reach_every_choice_and_every_option_that_sampling_finds(name):
    walked = list(space_tree.branches(SPACES[name]))
    sampled = list(samples(SPACES[name]))
    choices = {
        (parameter, trial.params[parameter])
        for trial, _ in sampled
        for parameter, distribution in trial.distributions.items()
        if isinstance(distribution, optuna.distributions.CategoricalDistribution)
    }
    assert {item for branch in walked for item in branch.choices.items()} == choices
    assert {option for branch in walked for option in branch.overrides} == {
        option for _, overrides in sampled for option in overrides
    }


@pytest.mark.parametrize("name", SPACES)
def test_no_two_parameters_of_a_trial_move_the_same_option(name):
    for trial, overrides in samples(SPACES[name], n=20):
        searched = [parameter.partition(".")[2] or parameter for parameter in trial.params]
        assert len(set(searched)) == len(searched)
        assert set(searched) <= set(overrides)


def test_rules_has_the_single_rule_spaces_as_its_branches():
    assert space_tree.rules_of(SPACES["rules"]) == ["bp", "bp-ei", "exact-inv", "lin-thresh"]
    assert space_tree.rules_of(SPACES["all_rules"]) == [*BRANCHES]
    for name, branch in BRANCHES.items():
        assert branch is SPACES[name.replace("-", "_")]


def test_branches_of_dependent_choices_are_walked_in_their_context():
    def space(trial):
        outer = trial.suggest_categorical("outer", ("a", "b"))
        if outer == "b":
            return {"inner": trial.suggest_categorical("inner", (1, 2, 3))}
        return {"x": trial.suggest_float("x", 1.0, 2.0)}

    walked = [branch.overrides for branch in space_tree.branches(space)]
    ends = [{"x": 1.0}, {"x": 2.0}]
    assert walked == [*ends, *({"inner": i} for i in (1, 1, 2, 2, 3, 3))]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"trainer.norm_vall": 1.0}, "trainer.norm_vall"),
        ({"trainer": "exact-inverse"}, "exact-inverse"),
        ({"optimizer.learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_a_space_with_a_wrong_option_is_refused_in_one_line(monkeypatch, overrides, named):
    monkeypatch.setitem(SPACES, "wrong", lambda trial: overrides)
    with pytest.raises(ConfigError) as refusal:
        options.check_space(options.compose(["space=wrong"]))
    assert named in str(refusal.value)
    assert "space=wrong" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_option_that_the_space_sets_cannot_be_given_otherwise():
    with pytest.raises(ConfigError, match="model/vf: given dale, but space=bp sets non-dale; leav"):
        options.check_space(options.compose(["space=bp", "model/vf=dale"]))
    with pytest.raises(ConfigError, match="trainer: given bp, but space=exact_inv sets exact-inv"):
        options.check_space(options.compose(["space=exact_inv", "trainer=bp"]))


def test_an_option_may_repeat_what_the_space_fixes():
    options.check_space(options.compose(["space=bp", "trainer=bp"]))
