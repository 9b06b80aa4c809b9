"""Studies: the only rooms that know Ray, Optuna and MLflow.

    study     compose -> check -> run -> tell: the order of things
    options   what a study and each of its trials is asked to be, checked
    search    which configuration comes next (Optuna), and what became of it
    schedule  which trial is stopped early (Ray)
    trial     one configuration, trained epoch by epoch in a worker (JAX)
    tracking  what is remembered of it (MLflow), written by the driver alone
    progress  what is shown while it runs and when it is over

A trial's state means one thing everywhere (`trial.state`): complete, pruned, failed.
"""
