"""Studies: the only package that writes to Ray, Optuna and MLflow.

    study            the command `tune_main.py`: compose, check, begin or resume, run, print
    options          options of a study and of each of its trials
    validation       checks of a study's own options
    resume           which options a resumed or extended study keeps
    manifest         what is pinned when a study starts, in its folder
    plan             what a study would try, how long it takes and what it needs

    inventory        the studies in a folder, and how they stand
    steering         instructions to a study while it runs
    upkeep           a study is renamed, deleted, brought in step in its stores
    archive          a study in one file: export and import

    engine           opens a study, runs its loop, closes it
    loop             the study loop: asks for trials, starts them, hears from them, ends them
    event_log        everything that happened, in order: a study's only state
    suggest          the next configuration (Optuna)
    early_stopping   which trials end early
    space_tree       a search space as a tree of choices
    initial_points   configurations to try first

    ray_backend      Ray Tune, which runs the loop's trials
    ray_workaround   a bug of Ray, worked around
    cluster          the Ray cluster: started or joined, and checked
    environment      environment variables of workers
    worker           one trial in a worker, epoch by epoch (JAX)
    retention        which checkpoints stay

    outbox           sends the log's events to the stores
    mlflow_store     what a study writes into MLflow
    mlflow_connection  where MLflow's store is: opened, made, moved, cleared
    mlflow_settings  MLflow's settings
    optuna_store     Optuna's own store
    provenance       code, packages, data and machine of a run
    progress         what the terminal shows

A trial's state means one thing everywhere (`event_log`): complete, pruned, failed.
"""
