"""MLflow's settings: few messages and short timeouts. Import this module before `mlflow`.

Variables that the user has set keep their values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from disinhib.tuning import environment

# MLflow reads these once, when it is imported.
_ONCE = {**environment.UNTRACKED, "MLFLOW_LOGGING_LEVEL": "WARNING"}
# MLflow reads these for each request; its own timeouts are minutes.
_REQUESTS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the outbox tries again and loses nothing
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}

with environment.variables(environment.as_set(_ONCE)):
    import mlflow  # noqa: F401


_ours: set[str] = set()  # variables that `requests` has set, not the user


@contextmanager
def requests(**patience: str) -> Iterator[None]:
    """Within it, requests use these settings; `patience` (variable=value) overrides ours."""
    settings = {
        name: value
        for name, value in {**_REQUESTS, **patience}.items()
        if name in _ours or name not in os.environ
    }
    new = settings.keys() - _ours
    with environment.variables(settings):
        _ours.update(new)
        try:
            yield
        finally:
            _ours.difference_update(new)
