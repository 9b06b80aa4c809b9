"""Learning rules: from a batch to gradients that an optimizer descends (DESIGN section 2).

Every rule has one signature,

    update(architecture, parameters, rule_state, hyper, x, target) -> Update

and one entry in RULES: a new rule is a file here and its entry in the table. Rules of one family
are one compiled program.
"""

from __future__ import annotations

from disinhib.rules.backprop import BP
from disinhib.rules.base import Branch, Competitor, Family, Rule, RuleState, Update
from disinhib.rules.disinhibition import EXACT_INVERSE, LINEAR_CONTRAST, LINEAR_THRESHOLD, TAYLOR
from disinhib.rules.feedback_alignment import DFA, FA, KOLEN_POLLACK, SIGN_SYMMETRIC

__all__ = [
    "BRANCHES",
    "COMPETITORS",
    "FAMILIES",
    "RULES",
    "Branch",
    "Competitor",
    "Family",
    "Rule",
    "RuleState",
    "Update",
    "add",
    "colour",
    "reported_name",
    "words",
]

RULES: dict[str, Rule] = {}
FAMILIES: dict[str, Family] = {}
COMPETITORS: dict[str, Competitor] = {}  # by reported name
BRANCHES: dict[str, Branch] = {}  # what search spaces offer, by reported name


def reported_name(trainer: str, circuit: str) -> str:
    """Under what name a rule (a key of RULES) competes on a circuit: back-propagation through the
    E-I network is another rule than through the plain one."""
    competitor = RULES[trainer].circuits.get(circuit)
    return trainer if competitor is None else competitor.name or trainer


def add(rule: Rule) -> None:
    """Makes `rule` known: an entry of RULES, and of the tables that follow from it."""
    RULES[rule.name] = rule
    FAMILIES[rule.family.name] = rule.family
    own: dict[str, Competitor] = {}
    for circuit, competitor in rule.circuits.items():
        own.setdefault(reported_name(rule.name, circuit), competitor)
    COMPETITORS.update(own)
    BRANCHES.update({name: one.branch for name, one in own.items() if one.branch is not None})


for rule in (
    BP,
    EXACT_INVERSE,
    LINEAR_THRESHOLD,
    TAYLOR,
    LINEAR_CONTRAST,
    FA,
    DFA,
    SIGN_SYMMETRIC,
    KOLEN_POLLACK,
):
    add(rule)


def words(name: str) -> str:
    """What the rule of this reported name is, to a reader who has not seen it."""
    return COMPETITORS[name].words


def colour(name: str) -> str:
    """The colour (#RRGGBB) that the rule of this reported name has in every figure."""
    return COMPETITORS[name].colour
