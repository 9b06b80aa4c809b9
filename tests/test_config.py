"""What `parse` refuses: a table of options, with the words that the one line must have."""

import re
from copy import deepcopy

import jax
import pytest

from disinhib import hydra_config
from disinhib.activations import ACTIVATIONS
from disinhib.checks import flatten
from disinhib.config import parse, published
from disinhib.controller import CONTROLLERS
from disinhib.data import DATASETS
from disinhib.errors import ConfigError
from disinhib.feedback import PATHS
from disinhib.hyperparameters import Architecture, Newton, Ode
from disinhib.losses import LOSSES
from disinhib.rules import RULES
from disinhib.rules.disinhibition import TANGENT_AT_MEAN

CIRCUIT = {"dale": ["model/vf=dale"], "non-dale": ["model/vf=non-dale"]}


def options(*overrides):
    return hydra_config.compose("train", list(overrides))[0]


def with_value(tree, name, value):
    tree = deepcopy(tree)
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    return tree


@pytest.fixture(scope="module")
def dale():
    return options("model/vf=dale", "trainer=lin-thresh")


def test_published_defaults():
    config = parse(options("dataset=fmnist", "model/vf=dale", "trainer=lin-thresh"))
    structure, hyper = config.architecture, config.hyperparameters
    assert structure.sizes == (784, 256, 256, 256, 10) and structure.batch_size == 100
    assert config.epochs == 50 and config.valid_split == 0.1
    assert hyper.controller == {"k_p": 0.2, "k_i": 0.4, "leak": 1.0, "tau": 100e-3}
    assert (hyper.tau_e, hyper.tau_i, hyper.soft_target) == (20e-3, 5e-3, 0.99)
    assert hyper.rule == {
        **{"avg_inh_lambda": 1.0, "avg_inh_init": 0.8, "norm_val": 1.0, "clip_val": 1.0},
        **{"strong_fb": 1.0, "target_nudge": 0.015, "y0": 1.0, "estimate": TANGENT_AT_MEAN},
        **{"average_fb_weights": 0.0, "clip_fb_weights": 0.0, "norm_fb_weights": 1.0},
        **{"feedback": 0.0, "feedback_rate": 0.01},
    }
    assert hyper.optimizer["learning_rate"] == 1e-3
    assert structure.fb_to_readout
    assert isinstance(structure.solver, Newton)
    assert (config.min_converged_share, config.max_weight) == (0.9, 1000)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("solver", [Newton, Ode])
def test_defaults_of_files_are_those_of_the_code(rule, solver):
    """What conf/ still says for itself: of the circuit, the network and the solvers."""
    circuit = next(iter(RULES[rule].circuits))
    config = parse(
        options(f"trainer={rule}", f"model/vf={circuit}", f"solver={solver.__name__.lower()}")
    )
    family = RULES[rule].family.name
    structure = Architecture(family, circuit, (64, 256, 256, 256, 10), solver=solver())
    assert (config.rule, config.architecture) == (rule, structure)
    wanted, hyper = published(structure, rule), config.hyperparameters
    unused = {} if circuit == "dale" else {"controller": {}, "activation_i": {}}
    assert hyper == wanted._replace(**unused)


def test_a_scalar_that_is_not_there_is_not_updated():
    hyper = published(Architecture("disinhibition", "dale", (4, 3)), "exact-inv")
    changed = hyper.updated(g_ei=2.0, rule={"norm_val": 3.0})
    assert (changed.g_ei, changed.rule["norm_val"]) == (2.0, 3.0)
    assert changed.rule.keys() == hyper.rule.keys()
    for wrong in ({"g_xi": 1.0}, {"rule": {"norm": 1.0}}, {"rule": 1.0}):
        with pytest.raises(ValueError, match="no scalar"):
            hyper.updated(**wrong)


def test_all_rules_of_dis_inhibition_and_their_feedback_are_one_structure(dale):
    rules = [name for name, rule in RULES.items() if rule.family.feedback_and_aim]
    feedback = [parse(options("model/vf=dale", f"trainer={rule}")) for rule in rules]
    for flag in ("strong_fb", "average_fb_weights", "clip_fb_weights", "norm_fb_weights"):
        on, off = (parse(with_value(dale, f"trainer.{flag}", value)) for value in (True, False))
        assert (on.hyperparameters.rule[flag], off.hyperparameters.rule[flag]) == (1, 0)
        feedback += [on, off]
    paths = [parse(with_value(dale, "trainer.feedback", path)) for path in PATHS]
    assert [run.hyperparameters.rule["feedback"] for run in paths] == [0, 1, 2, 3]
    feedback += paths
    assert {run.rule for run in feedback} == {"exact-inv", "lin-thresh", "lin-contrast", "taylor"}
    (_,) = {run.architecture for run in feedback}
    (_,) = {jax.tree.structure(run.hyperparameters) for run in feedback}


def test_published_integration_settings():
    config = parse(options("model/vf=dale", "trainer=exact-inv", "solver=ode"))
    assert config.architecture.solver == Ode(1e-3, 2.0, 1e-3, 1e-6, True, True)


def test_seed_zero_is_a_seed():
    assert parse(options("seed=0")).seed == 0
    assert parse(options("seed=null")).seed is None


def test_hard_targets_are_one_hot():
    config = parse(options("dataset.soft_targets=false"))
    assert config.hyperparameters.soft_target == 1.0


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("optimizer.learning_rate", 0, "a number above 0"),
        ("optimizer.learning_rate", -1e-3, "a number above 0"),
        ("optimizer.learning_rate", float("nan"), "a number above 0"),
        ("optimizer.learning_rate", "fast", "a number above 0"),
        ("optimizer.b1", 1.0, "from 0 to below 1"),
        ("optimizer.name", "adams", "did you mean adam?"),
        ("epochs", 0, "a whole number of at least 1"),
        ("epochs", 2.5, "a whole number of at least 1"),
        ("epochs", True, "a whole number of at least 1"),
        ("batchsize", -5, "a whole number of at least 1"),
        ("seed", -1, "a whole number from 0"),
        ("seed", 2**31, "a whole number from 0"),
        ("min_converged_share", 1.1, "a number from 0 to 1"),
        ("min_converged_share", -0.1, "a number from 0 to 1"),
        ("max_weight", 0.0, "a number above 0"),
        ("max_weight", float("inf"), "a number above 0"),
        ("device", "tpu", "one of auto, cpu, gpu"),
        ("gpu_id", -1, "a whole number of at least 0"),
        ("trainer.name", "exact", f"one of {', '.join(RULES)}"),
        ("trainer.norm_val", 0.0, "a number above 0"),
        ("trainer.strong_fb", "yes", "true or false"),
        ("trainer.avg_inh_lambda", 1.5, "a number from 0 to 1"),
        ("trainer.feedback", "learned", "sign-symmetric, random, learnt; did you mean learnt?"),
        ("trainer.feedback", 2, "one of jacobian"),
        ("model.vf.g_EI", -1.0, "a number above 0"),
        ("model.vf.g_IE", 0.0, "a number above 0"),
        ("model.vf.tauE", 0.0, "a number above 0"),
        ("model.vf.nb_hidden", -1, "a whole number of at least 0"),
        ("model.vf.sizes_hidden", [16, 16], "a size for each of model.vf.nb_hidden layers"),
        ("model.vf.sizes_hidden", [0], "one size of at least 1"),
        ("model.vf.sizes_hidden", [], "one size of at least 1"),
        ("model.vf.actI.name", "softplus", f"one of {', '.join(ACTIVATIONS)}"),
        ("model.vf.actI.sharpness", 0.0, "a number above 0"),
        ("model.vf.controller.name", "pid", f"one of {', '.join(CONTROLLERS)}"),
        ("model.vf.controller.leak", 0.0, "a number above 0"),
        ("model.vf.controller.k_p", -0.1, "a number of at least 0"),
        ("dataset.name", "cifar", f"one of {', '.join(DATASETS)}"),
        ("dataset.valid_split", 1.0, "a number between 0 and 1"),
        ("dataset.loss.name", "hinge", f"one of {', '.join(LOSSES)}"),
        ("solver.tolerance", 0, "a number above 0"),
        ("solver.name", "euler", "one of newton, ode"),
    ],
)
def test_a_value_that_cannot_be_is_refused(dale, name, value, allowed):
    with pytest.raises(ConfigError) as refused:
        parse(with_value(dale, name, value))
    message = str(refused.value)
    given = str(value).lower() if isinstance(value, bool) else str(value)
    assert message.startswith(f"{name}: given {given}, allowed is ") and allowed in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("activation", "y0", "allowed"),
    [
        ("softrelu", 0.0, "above 0"),
        ("tanh", 1.0, "between -1 and 1"),
        ("sigmoid", 1.0, "between 0"),
    ],
)
def test_a_rate_without_a_tangent_is_refused(activation, y0, allowed):
    tree = options(
        *("model/vf=dale", "trainer=taylor", f"trainer.y0={y0}"),
        f"model/vf/activation@model.vf.actI={activation}",
    )
    with pytest.raises(ConfigError, match=rf"trainer\.y0: given {y0}, allowed is .*{allowed}"):
        parse(tree)


def test_every_number_is_checked(dale):
    """No numeric option lets a text through: a new one cannot be forgotten."""
    numbers = [
        name
        for name, value in flatten(dale).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    assert len(numbers) > 25
    for name in numbers:
        with pytest.raises(ConfigError, match=re.escape(f"{name}: given much")):
            parse(with_value(dale, name, "much"))


def test_an_unknown_option_names_the_nearest(dale):
    tree = deepcopy(dale)
    tree["trainer"]["norm_vall"] = 1.0
    with pytest.raises(
        ConfigError, match=r"trainer\.norm_vall: unknown option; did you mean trainer"
    ):
        parse(tree)


def test_a_missing_option_is_named(dale):
    tree = deepcopy(dale)
    del tree["model"]["vf"]["g_EI"]
    with pytest.raises(ConfigError, match=r"model\.vf\.g_EI: missing, needed is a number above 0"):
        parse(tree)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("circuit", CIRCUIT)
def test_a_rule_trains_only_the_circuits_it_is_for(rule, circuit):
    tree = options(*CIRCUIT[circuit], f"trainer={rule}")
    if circuit in RULES[rule].circuits:
        assert parse(tree).rule == rule
    else:
        needed = " or ".join(RULES[rule].circuits)
        with pytest.raises(ConfigError, match=f"trainer={rule}: needs model/vf={needed}"):
            parse(tree)
