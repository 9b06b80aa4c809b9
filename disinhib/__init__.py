"""Deep excitatory-inhibitory networks that learn by dis-inhibition."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disinhib.export import Network
    from disinhib.network import Parameters


def load(path: str | Path, plugins: Sequence[str] = ()) -> tuple[Network, Parameters]:
    """The network and the parameters of a trained model (`model.msgpack` of a retrained seed).

        network, parameters = disinhib.load("model.msgpack")
        potentials = network(parameters, images)  # [batch, classes] for images [batch, pixels]

    Inputs lie in [0, 1]. A model that was trained with plugins needs these: `plugins=["mine.py"]`.
    Raises ConfigError, in one line, if there is no model at `path`, or a plugin is missing.
    """
    # Here, as jax reads its environment when it is imported, and some commands set that first.
    from disinhib import export

    return export.load(path, plugins)
