"""Deep excitatory-inhibitory networks that learn by dis-inhibition."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disinhib.export import Network
    from disinhib.interactive import Trained
    from disinhib.network import Parameters

# jax reads its environment when it is imported, and some commands set that first: so it is imported
# when it is needed.


def train(config: Sequence[str], seeds: Sequence[int] | None = None) -> Trained:
    """Trains a network in this process; `config` are options as on the command line.

        result = disinhib.train(["model/vf=dale", "trainer=exact-inv", "epochs=5"], seeds=[0, 1])
        result.metrics          # a DataFrame: seed, epoch, and a column for each metric
        result.network.states(result.parameters[0], images)

    Options, defaults and numbers are those of `python -m disinhib`; nothing is written. `seeds` are
    whole numbers (default: the option `seed`), trained side by side as lanes.

    Raises ConfigError or data.DataError, in one line, for what the command refuses, and for options
    that mean nothing here; training.Diverged if a seed diverges.
    """
    from disinhib import interactive

    return interactive.train(config, seeds)


def load(path: str | Path, plugins: Sequence[str] = ()) -> tuple[Network, Parameters]:
    """The network and the parameters of a trained model (`model.msgpack` of a retrained seed), or
    of a training run (its folder, or the `checkpoint.msgpack` in it).

        network, parameters = disinhib.load("model.msgpack")
        potentials = network(parameters, images)  # [batch, classes] for images [batch, pixels]

    Inputs lie in [0, 1]. What was trained with plugins needs these: `plugins=["mine.py"]`.
    Raises ConfigError, in one line, if there is no model at `path`, or a plugin is missing.
    """
    from disinhib import export

    return export.load(path, plugins)
