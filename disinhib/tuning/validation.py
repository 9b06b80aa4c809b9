"""Checks of a study's own options: a table, and the few checks that involve several options."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from disinhib import checks
from disinhib.checks import (
    COUNT,
    FLAG,
    INDEX,
    OPTIONAL_TEXT,
    SEED,
    TEXT,
    Check,
    one_of,
    or_null,
    refusal,
)
from disinhib.errors import ConfigError, nearest
from disinhib.metrics import SELECTION, measures
from disinhib.tuning import turns
from disinhib.tuning.early_stopping import EARLY_STOPPING
from disinhib.tuning.suggest import SAMPLERS
from search_spaces import SPACES

STUDY_GROUPS = ("scheduler", "searcher", "cluster", "tracking", "experiment")
MOST_LANES = 1024  # of a server, which has a thread for each trial
RESERVED = ("mlflow.db", "mlflow-artifacts")  # in out_dir, beside the studies


def _is_name(value: Any) -> bool:
    whole = isinstance(value, str) and re.fullmatch(r"[\w.-]{0,99}\w", value) is not None
    return whole and value not in RESERVED


NAME: Check = (
    _is_name,
    f"a folder's name of at most 100 characters, but not {' or '.join(RESERVED)}",
)
OPTIONAL_NAME = or_null(NAME)
CHECKS: dict[str, Check] = {
    "study": OPTIONAL_NAME,
    "resume": (lambda v: isinstance(v, bool) or v == "auto", "true, false or auto"),
    "extend": FLAG,
    "plan": FLAG,
    "space": TEXT,  # and one of those there are: `check`
    "out_dir": (
        lambda v: TEXT[0](v) and "://" not in v,
        "a folder that all machines share (a server at tracking.uri may keep artifacts elsewhere)",
    ),
    "trials": COUNT,
    "repeats": COUNT,
    "repeat_splits": FLAG,
    "budget": one_of(turns.BUDGETS),
    "epochs": COUNT,
    "replicates": COUNT,
    "metric": TEXT,  # the same
    "mode": or_null(one_of(("max", "min"))),
    "seed": (lambda v: SEED[0](v) and v is not None, "a whole number from 0 to 2147483647"),
    "points": OPTIONAL_TEXT,
    "warm_start": OPTIONAL_NAME,
    "checkpoints.every_seconds": checks.NOT_NEGATIVE,
    "checkpoints.keep_best": INDEX,
    "checkpoints.cap_gb": checks.POSITIVE,
    "cluster.address": or_null(
        (
            lambda v: bool(re.fullmatch(r"auto|[\w.-]+:\d+|\[.+\]:\d+", str(v))),
            "auto or HOST:PORT of a running Ray cluster",
        )
    ),
    "cluster.cpus_per_trial": COUNT,
    "cluster.gpus_per_trial": (
        lambda v: checks.is_number(v) and 0 <= v <= 1,
        "0, a share of a GPU below 1, or 1",
    ),
    "cluster.lanes": (
        lambda v: v == "auto" or (COUNT[0](v) and v <= MOST_LANES),
        f"auto or a whole number from 1 to {MOST_LANES}",
    ),
    "cluster.max_concurrent": or_null(COUNT),
    "tracking.uri": OPTIONAL_TEXT,
    "tracking.experiment": TEXT,
}
# The options and groups that are checked here, in this order.
_CHECKED = dict.fromkeys((*(name.partition(".")[0] for name in CHECKS), *STUDY_GROUPS))
# Options and groups that only a study has; its other options are those of training.
STUDY_OPTIONS = _CHECKED.keys() - {"epochs", "seed", "out_dir"}


def check(options: Mapping[str, Any]) -> None:
    """Raises ConfigError if one of the study's own options, or of those of training that it checks
    itself, is not allowed."""
    if "grid" in options:
        raise ConfigError(
            "experiment: given one with a grid, which has nothing to tune; needed is"
            " python -m analysis.retrain experiment=..."
        )
    own = checks.flatten({name: options[name] for name in _CHECKED if name in options})
    # Plugins may have added to these tables.
    allowed = {**CHECKS, "space": one_of(SPACES), "metric": one_of(SELECTION)}
    for group, table in (("searcher", SAMPLERS), ("scheduler", EARLY_STOPPING)):
        name = f"{group}.name"
        allowed[name] = one_of(table)
        entry = table[checks.check(name, own[name], allowed[name])]
        allowed |= {f"{group}.{option.name}": option.check for option in entry.options}
    for name, value in own.items():
        if name not in allowed:
            raise ConfigError(f"{name}: unknown option{nearest(name, allowed)}")
        checks.check(name, value, allowed[name])
    searcher, scheduler = options["searcher"], options["scheduler"]
    sampler = SAMPLERS[searcher["name"]]
    if sampler.needs and importlib.util.find_spec(sampler.needs) is None:
        raise refusal("searcher", searcher["name"], f"another without the package {sampler.needs}")
    if options["repeats"] > 1:
        learns = options["warm_start"] is not None or options["extend"]
        for given, why in (
            (learns, "repeats that learn from the same earlier trials are not independent"),
            (sampler.grid, "searcher=grid tries the same points in every repeat"),
        ):
            if given:
                raise refusal("repeats", options["repeats"], f"1, as {why}")
    if options["repeat_splits"]:
        for given, why in (
            (options["warm_start"], "earlier trials were validated on other images (warm_start)"),
            (options.get("dataset", {}).get("valid_seed"), "dataset.valid_seed draws them for all"),
        ):
            if given is not None:
                raise refusal("repeat_splits", True, f"false, as {why}")
    if options["budget"] != turns.TRIALS:
        for given, why in (
            (searcher["deterministic"], "reproducible trials do not depend on what others took"),
            (
                options["repeats"] == 1 and not searcher["balanced"],
                "with searcher.balanced=false the sampler chooses the rule",
            ),
        ):
            if given:
                raise refusal("budget", options["budget"], f"{turns.TRIALS}, as {why}")
    if sampler.grid and searcher["balanced"]:
        raise refusal("searcher.balanced", True, "false with searcher=grid")
    if searcher.get("group") and not searcher["multivariate"]:
        raise refusal("searcher.group", True, "false without searcher.multivariate")
    grace = scheduler.get("grace_period")
    if grace is not None and grace > options["epochs"]:
        raise refusal("scheduler.grace_period", grace, f"1 to epochs ({options['epochs']})")
    check_device(options)
    mode = SELECTION[options["metric"]].mode
    if not measures(options, options["metric"]):
        raise refusal("metric", options["metric"], "another without diagnostics.alignment=true")
    if options["mode"] not in (None, mode):
        raise refusal("mode", options["mode"], f"{mode} for metric={options['metric']}")
    if options["test_at_end"]:
        raise refusal("test_at_end", True, "false: a search must not see the test set")
    if options["resume"] and options["extend"]:
        raise refusal("extend", True, "false with resume=true")


def check_device(options: Mapping[str, Any]) -> None:
    """Raises ConfigError if the device of trials is not that which Ray gives them."""
    device, gpus = options["device"], options["cluster"]["gpus_per_trial"]
    if device == "gpu" and not gpus:
        raise refusal("device", "gpu", "auto or cpu without cluster.gpus_per_trial")
    if device == "cpu" and gpus:
        raise refusal("device", "cpu", f"auto or gpu with cluster.gpus_per_trial={gpus:g}")
    if options["gpu_id"]:
        raise refusal("gpu_id", options["gpu_id"], "0 in a study: Ray chooses the GPU of a trial")
