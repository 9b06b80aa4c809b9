"""What a study's own options may be: a table of checks, and the few that depend on each other."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from disinhib.checks import (
    COUNT,
    FLAG,
    INDEX,
    NOT_NEGATIVE,
    OPTIONAL_TEXT,
    POSITIVE,
    TEXT,
    Check,
    flatten,
    one_of,
    refusal,
)
from disinhib.errors import ConfigError, nearest
from disinhib.tuning import early_stopping, suggest
from search_spaces import SPACES

# Root options and groups that only a study has; the rest of its options are those of training.
STUDY_OPTIONS = (
    *("study", "resume", "extend", "plan", "space", "trials", "replicates", "metric", "mode"),
    *("points", "warm_start", "checkpoints"),
)
STUDY_GROUPS = ("scheduler", "searcher", "cluster", "tracking", "experiment")
# What selection may rest on, validation only, and which way is better.
METRICS = {"valid_accuracy": "max", "valid_loss": "min"}

OPTIONAL_COUNT: Check = (lambda v: v is None or COUNT[0](v), f"{COUNT[1]}, or null")
NAME: Check = (
    lambda v: isinstance(v, str) and re.fullmatch(r"[\w.-]*\w", v) is not None,
    "a folder's name",
)
OPTIONAL_NAME: Check = (lambda v: v is None or NAME[0](v), f"{NAME[1]} or null")
CHECKS: dict[str, Check] = {
    "study": OPTIONAL_NAME,
    "resume": FLAG,
    "extend": FLAG,
    "plan": FLAG,
    "space": (lambda v: isinstance(v, str) and v in SPACES, f"one of {', '.join(SPACES)}"),
    "out_dir": TEXT,
    "trials": COUNT,
    "epochs": COUNT,
    "replicates": COUNT,
    "metric": one_of(METRICS),
    "mode": one_of(("max", "min")),
    "seed": INDEX,
    "points": OPTIONAL_TEXT,
    "warm_start": OPTIONAL_NAME,
    "checkpoints.every_seconds": NOT_NEGATIVE,
    "checkpoints.keep_best": INDEX,
    "checkpoints.cap_gb": POSITIVE,
    "scheduler.name": one_of(early_stopping.SCHEDULERS),
    "scheduler.within_rule": FLAG,
    "scheduler.grace_period": OPTIONAL_COUNT,
    "scheduler.reduction_factor": (lambda v: POSITIVE[0](v) and v > 1, "a number above 1"),
    "scheduler.min_samples_required": COUNT,
    "searcher.name": one_of(suggest.SAMPLERS),
    "searcher.balanced": FLAG,
    "searcher.deterministic": FLAG,
    "searcher.batch": COUNT,
    "searcher.storage": OPTIONAL_TEXT,
    "searcher.points_per_range": COUNT,
    "searcher.n_startup_trials": INDEX,
    "searcher.n_ei_candidates": COUNT,
    "searcher.multivariate": FLAG,
    "searcher.group": FLAG,
    "searcher.constant_liar": FLAG,
    "searcher.warn_independent_sampling": FLAG,
    "searcher.sigma0": (lambda v: v is None or POSITIVE[0](v), f"{POSITIVE[1]}, or null"),
    "searcher.popsize": OPTIONAL_COUNT,
    "searcher.consider_pruned_trials": FLAG,
    "searcher.use_separable_cma": FLAG,
    "searcher.with_margin": FLAG,
    "searcher.lr_adapt": FLAG,
    "searcher.deterministic_objective": FLAG,
    "cluster.address": OPTIONAL_TEXT,
    "cluster.cpus_per_trial": COUNT,
    "cluster.gpus_per_trial": NOT_NEGATIVE,
    "cluster.max_concurrent": OPTIONAL_COUNT,
    "tracking.uri": OPTIONAL_TEXT,
    "tracking.experiment": TEXT,
}


def check(options: Mapping[str, Any]) -> None:
    """Raises ConfigError if an option of the study itself is not allowed."""
    if "grid" in options:
        raise ConfigError(
            "experiment: given one with a grid, which has nothing to tune; needed is"
            " python -m analysis.retrain experiment=..."
        )
    for name, value in flatten(_own(options)).items():
        if name not in CHECKS:
            raise ConfigError(f"{name}: unknown option{nearest(name, CHECKS)}")
        test, allowed = CHECKS[name]
        if not test(value):
            names = allowed.removeprefix("one of ").split(", ")
            raise refusal(name, value, allowed + nearest(str(value), names))
    searcher, scheduler = options["searcher"], options["scheduler"]
    needed = suggest.SAMPLERS[searcher["name"]].needs
    if needed and importlib.util.find_spec(needed) is None:
        raise refusal("searcher", searcher["name"], f"another without the package {needed}")
    if suggest.SAMPLERS[searcher["name"]].grid and searcher["balanced"]:
        raise refusal("searcher.balanced", True, "false with searcher=grid")
    if searcher.get("group") and not searcher["multivariate"]:
        raise refusal("searcher.group", True, "false without searcher.multivariate")
    grace = scheduler.get("grace_period")
    if grace is not None and grace > options["epochs"]:
        raise refusal("scheduler.grace_period", grace, f"1 to epochs ({options['epochs']})")
    if options["device"] == "gpu" and not options["cluster"]["gpus_per_trial"]:
        raise refusal("device", "gpu", "auto or cpu without cluster.gpus_per_trial")
    best = METRICS[options["metric"]]
    if options["mode"] != best:
        raise refusal("mode", options["mode"], f"{best} for metric={options['metric']}")
    if options["test_at_end"]:
        raise refusal("test_at_end", True, "false: a search must not see the test set")
    if options["resume"] and options["extend"]:
        raise refusal("extend", True, "false with resume=true")


def _own(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `training_options` leaves out, and what a study needs of the rest."""
    names = (*STUDY_OPTIONS, *STUDY_GROUPS, "epochs", "seed", "out_dir")
    return {name: options[name] for name in names if name in options}
