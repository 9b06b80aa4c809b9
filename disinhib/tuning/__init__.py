"""Studies: the only rooms that know Ray, Optuna and MLflow.

    study         compose -> check -> begin, or go on -> run -> tell: the order of things
    options       what a study and each of its trials is asked to be
    checks        what its own options may be
    origin        what it starts from, kept in its folder
    plan          what it would try, how long it would take

    journal       what happened, in order: the truth, of which the stores have copies
    conductor     the course of a study: who is next, who was heard, who ends
    execution     Ray, through which the conductor's trials run
    trial         one configuration, trained epoch by epoch in a worker (JAX)
    checkpoints   which of its states are kept

    search        which configuration comes next (Optuna)
    spaces        what a search space says when it is asked
    points        configurations to be tried by name
    schedule      which trial is stopped early (Ray's rules)

    delivery      from the journal to the stores, whatever becomes of them
    tracking      the store that is MLflow
    optuna_store  the store that is Optuna's
    provenance    what is needed to run a trial again
    progress      what is shown while a study runs and when it is over

A trial's state means one thing everywhere (`journal`): complete, pruned, failed.
"""
