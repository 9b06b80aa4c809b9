"""The metrics of a network on a split of the data, and which direction is better.

A new metric needs one entry here. It is then evaluated on every split (`valid_<name>`,
`test_<name>`, `train_OL_<name>`), a study can be tuned by its validation value, and reports and
figures can name it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from disinhib.losses import Loss, accuracy

Samples = Float[Array, " batch"]


class Metric(NamedTuple):
    """`value(loss, output, target, labels)` gives one number a sample; `sign` is 1 where more is
    better, -1 where less is."""

    value: Callable[
        [Loss, Float[Array, "batch out"], Float[Array, "batch out"], Int[Array, " batch"]], Samples
    ]
    sign: int
    words: str
    unit: str

    @property
    def mode(self) -> str:
        """As Optuna and Ray Tune call the direction."""
        return "max" if self.sign > 0 else "min"


METRICS: dict[str, Metric] = {}
# Metrics by which a study may be tuned and selected: of the validation data only.
SELECTION: dict[str, Metric] = {}


def add(name: str, metric: Metric) -> None:
    """Makes `metric` known: an entry of METRICS, and of SELECTION."""
    METRICS[name] = metric
    SELECTION[f"valid_{name}"] = metric._replace(words=f"validation {metric.words}")


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
