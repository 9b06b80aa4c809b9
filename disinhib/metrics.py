"""The metrics of a network on a split of the data, and which direction is better.

A new metric needs one entry here. It is then evaluated on every split (`valid_<name>`,
`test_<name>`, `train_OL_<name>`), a study can be tuned by its validation value, and reports and
figures can name it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from disinhib.losses import Loss, accuracy

Samples = Float[Array, " batch"]
ANGLE, NORM_RATIO = "alignment_angle", "alignment_norm_ratio"  # measured by alignment.py


class Criterion(NamedTuple):
    """What a study may be tuned by; `sign` is 1 where more is better, -1 where less is."""

    sign: int
    words: str
    unit: str

    @property
    def mode(self) -> str:
        """As Optuna and Ray Tune call the direction."""
        return "max" if self.sign > 0 else "min"


class Metric(NamedTuple):
    """`value(loss, output, target, labels)` gives one number a sample; `sign`, `words` and
    `unit` are those of a Criterion."""

    value: Callable[
        [Loss, Float[Array, "batch out"], Float[Array, "batch out"], Int[Array, " batch"]], Samples
    ]
    sign: int
    words: str
    unit: str


METRICS: dict[str, Metric] = {}
# By which a study may be tuned, and its trials selected: measured on validation data only.
SELECTION: dict[str, Criterion] = {}


def add(name: str, metric: Metric) -> None:
    """Makes `metric` known: an entry of METRICS, and of SELECTION."""
    METRICS[name] = metric
    SELECTION[f"valid_{name}"] = Criterion(metric.sign, f"validation {metric.words}", metric.unit)


add(
    "loss",
    Metric(
        lambda loss, output, target, labels: loss.value(output, target), -1, "loss", "dimensionless"
    ),
)
add(
    "accuracy",
    Metric(lambda loss, output, target, labels: accuracy(output, labels), 1, "accuracy", "%"),
)
SELECTION[ANGLE] = Criterion(-1, "angle between update and gradient", "degrees")


def measures(options: Mapping[str, Any], metric: str) -> bool:
    """Whether trials with these options have an entry of SELECTION after each epoch."""
    return metric != ANGLE or options.get("diagnostics", {}).get("alignment", False)
