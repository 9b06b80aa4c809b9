"""Training from a notebook or a script: in this process, with the command's options and numbers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import pandas as pd

from disinhib import export, hydra_config, numerics, training
from disinhib.checks import SEED, refusal
from disinhib.config import parse
from disinhib.export import Network
from disinhib.hydra_config import option_of
from disinhib.network import Parameters
from disinhib.rules import RuleState

# Options that say where a command runs and writes.
OF_THE_COMMAND = {
    "resume": "none: nothing is kept between two calls",
    "out_dir": "none: nothing is written",
    "device": "none: it is jax's own here (JAX_PLATFORMS, jax.default_device)",
    "gpu_id": "none: it is jax's own here (CUDA_VISIBLE_DEVICES, jax.default_device)",
}


class Trained(NamedTuple):
    """What `train` gives; the last two by seed."""

    metrics: (
        pd.DataFrame
    )  # a row for each seed and epoch: seed, epoch, and a column for each metric
    network: Network
    parameters: dict[int, Parameters]
    rule_states: dict[int, RuleState]  # what the rule remembers between batches


def train(config: Sequence[str], seeds: Sequence[int] | None = None) -> Trained:
    """`disinhib.train`, which see."""
    if isinstance(config, str):
        raise refusal("config", config, 'a list of overrides: ["dataset=digits", "epochs=5"]')
    overrides = [*config]
    given = {option_of(override): override.partition("=")[2] for override in overrides}
    for name, allowed in OF_THE_COMMAND.items():
        if name in given:
            raise refusal(name, given[name], allowed)
    if seeds is not None and "seed" in given:
        raise refusal("seed", given["seed"], f"none beside seeds={[*seeds]}")
    options, _ = hydra_config.compose(hydra_config.TRAINING, overrides)
    run = parse(options)
    if seeds is None:
        seeds = [secrets.randbelow(2**31) if run.seed is None else run.seed]
    seeds = _checked(seeds)
    rows: list[dict[str, Any]] = []

    def report(state: training.TrainingState, metrics: training.Metrics) -> None:
        for lane, seed in enumerate(seeds):
            values = {name: float(each[lane]) for name, each in metrics.items()}
            rows.append({"seed": seed, "epoch": int(state.epoch[lane]), **values})

    with numerics.settings():
        state = training.train(run, seeds, report)
        lanes = {
            seed: jax.tree.map(lambda leaf, lane=lane: leaf[lane], (state.parameters, state.rule))
            for lane, seed in enumerate(seeds)
        }
    table = pd.DataFrame(rows).sort_values(["seed", "epoch"], kind="stable", ignore_index=True)
    return Trained(
        table,
        export.network_of(run, options),
        {seed: export.with_feedback(run, *lane) for seed, lane in lanes.items()},
        {seed: rule_state for seed, (_, rule_state) in lanes.items()},
    )


def _checked(seeds: Sequence[int]) -> list[int]:
    allowed = "different whole numbers from 0 to 2147483647, at least one: [0, 1, 2]"
    try:
        whole = [int(seed) for seed in seeds if int(seed) == seed]
    except (TypeError, ValueError) as error:
        raise refusal("seeds", seeds, allowed) from error
    fitting = len(whole) == len({*whole}) == len(seeds) and all(map(SEED[0], whole))
    if not whole or not fitting:
        raise refusal("seeds", seeds, allowed)
    return whole
