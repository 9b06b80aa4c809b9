"""Pieces that the branches of search spaces share.

Each names its parameters `<branch>.<option>` in Optuna and returns `{option: value}`; ranges are
dimensionless and centred on the published default. `trial` is an `optuna.Trial`.
"""

from __future__ import annotations

from typing import Any


def log_uniform(
    trial, branch: str, option: str, low: int | float, high: int | float
) -> dict[str, Any]:
    return {option: trial.suggest_float(f"{branch}.{option}", low, high, log=True)}


def either(trial, branch: str, option: str) -> dict[str, Any]:
    return {option: trial.suggest_categorical(f"{branch}.{option}", (False, True))}


def interneurons(trial, branch: str) -> dict[str, Any]:
    """Gains and activation of the interneurons.

    The rules read an error off the inverse of phi_I, so it must be strictly increasing: the soft
    rectifier stays, and its sharpness moves it from nearly linear to nearly a rectifier.
    """
    return {
        **log_uniform(trial, branch, "model.vf.g_EI", 0.4, 2.5),
        **log_uniform(trial, branch, "model.vf.g_IE", 0.4, 2.5),
        **log_uniform(trial, branch, "model.vf.actI.sharpness", 0.5, 2.0),
    }


def feedback(trial, branch: str) -> dict[str, Any]:
    """Controller gains, feedback weights and targets."""
    strong = either(trial, branch, "trainer.strong_fb")
    nudged = not strong["trainer.strong_fb"]
    return {
        **log_uniform(trial, branch, "model.vf.controller.k_p", 0.05, 0.8),
        **log_uniform(trial, branch, "model.vf.controller.k_i", 0.1, 1.6),
        **log_uniform(trial, branch, "trainer.norm_val", 0.25, 4.0),
        **either(trial, branch, "trainer.average_fb_weights"),
        **strong,
        # How far a nudged target lies from the open-loop output, towards the label.
        **(log_uniform(trial, branch, "trainer.target_nudge", 0.01, 0.5) if nudged else {}),
    }
