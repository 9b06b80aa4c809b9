"""What a learning rule is: a function from a batch to gradients, and an entry of the table.

Rules that differ in the values of scalars alone are a family: one compiled program trains them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from disinhib.checks import Option
from disinhib.feedback import FeedbackWeights
from disinhib.hyperparameters import Architecture, Hyperparameters
from disinhib.network import Parameters
from disinhib.solvers import Solution

RuleState = Any  # any pytree of arrays
Branch = Callable[[Any], dict[str, Any]]  # of an optuna.Trial: Hydra overrides


class Update(NamedTuple):
    """What one batch brings: `gradients` like the parameters, the rule's next state, and the
    solution that the training metrics describe (closed loop; for bp the open loop). `metrics` are
    scalars of the rule's own, of which `train_CL_<name>` is the mean over an epoch's batches.
    """

    gradients: Parameters
    rule_state: RuleState
    solution: Solution
    metrics: Mapping[str, Float[Array, ""]] = {}


class Competitor(NamedTuple):
    """A rule on one circuit, as it competes with others: words and colour of reports, and the
    branch that search spaces offer of it (without one, no space does). Its name is the rule's
    unless it says another."""

    words: str  # to a reader who has not seen it
    colour: str  # of figures, #RRGGBB: distinct from the others' also to colour-blind readers
    branch: Branch | None = None
    name: str | None = None


InitialState = Callable[[Architecture, Hyperparameters, PRNGKeyArray], RuleState]
ClosedLoop = Callable[..., tuple[FeedbackWeights, Float[Array, "batch out"]]]
Step = Callable[[Hyperparameters, Parameters, Parameters, RuleState], tuple[Parameters, RuleState]]


def added(
    hyper: Hyperparameters, parameters: Parameters, changes: Parameters, rule_state: RuleState
) -> tuple[Parameters, RuleState]:
    """The optimizer's step as it is."""
    return jax.tree.map(jnp.add, parameters, changes), rule_state


class Family(NamedTuple):
    """What its rules have in common; an entry of FAMILIES.

    `update(architecture, parameters, rule_state, hyper, x, target)` learns from a batch;
    `feedback_and_aim(architecture, parameters, rule_state, hyper, opened, target)` is what closes
    the loop in which it learns, from the open-loop state `opened`: feedback weights, and what the
    controller aims at (None if it runs open loop only); `options` are its scalars in `hyper.rule`;
    `initial_state(architecture, hyper, key)` is what it remembers between batches, which may be
    random; `step(hyper, parameters, changes, rule_state)` takes the optimizer's changes, for a rule
    whose own weights change with them.
    """

    name: str
    update: Callable[..., Update]
    feedback_and_aim: ClosedLoop | None = None
    options: tuple[Option, ...] = ()
    initial_state: InitialState = lambda architecture, hyper, key: ()
    step: Step = added


class Rule(NamedTuple):
    """An entry of RULES.

    `circuits` are those it can train; of several under one reported name, search spaces offer the
    first. `options` are those of the family's that can be set (the others keep their defaults), and
    `chosen` are scalars in `hyper.rule` by which the family tells its rules apart.
    """

    name: str
    family: Family
    circuits: Mapping[str, Competitor]
    options: tuple[Option, ...] = ()
    chosen: Mapping[str, float] = {}
