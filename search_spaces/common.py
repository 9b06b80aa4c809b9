"""Pieces that the spaces share. Each names its parameters `<branch>.<option>` in Optuna and returns
`{option: value}`; ranges are dimensionless and centred on the published default."""


def log_uniform(trial, branch, option, low, high):
    return {option: trial.suggest_float(f"{branch}.{option}", low, high, log=True)}


def either(trial, branch, option):
    return {option: trial.suggest_categorical(f"{branch}.{option}", (False, True))}


def interneurons(trial, branch):
    """Gains and activation of the interneurons.

    The rules read an error off the inverse of phi_I, so it must be strictly increasing: the soft
    rectifier stays, and its sharpness moves it from nearly linear to nearly a rectifier.
    """
    return {
        **log_uniform(trial, branch, "model.vf.g_EI", 0.4, 2.5),
        **log_uniform(trial, branch, "model.vf.g_IE", 0.4, 2.5),
        **log_uniform(trial, branch, "model.vf.actI.sharpness", 0.5, 2.0),
    }


def feedback(trial, branch):
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
