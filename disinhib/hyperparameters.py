"""The two halves of a configuration: what is static and what is traced (DESIGN section 4).

Everything structural is in `Architecture`, hashable, so that it keys the compiled program;
everything continuous is in `Hyperparameters`, a pytree of scalars, so that one program serves
every trial of a structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Float

Scalar = Float[Array, ""] | float


@dataclass(frozen=True)
class Newton:
    """Direct solution of the equilibrium equations.

    `tolerance` bounds |equilibrium error| / (1 + |value|), in norms over a layer and over the
    controller (dimensionless; the published integration stops at 1e-3 of this kind);
    `max_iterations` caps evaluations of the network a solve, after which the sample counts as
    not converged.
    """

    tolerance: float = 1e-4
    max_iterations: int = 30


@dataclass(frozen=True)
class Ode:
    """Integration of the dynamics with Tsit5 (published `conf/model/default.yaml`).

    `dt`, `T` in seconds; with `early_termination` a solve stops at the steady-state event.
    """

    dt: float = 1e-3
    T: float = 2.0
    rtol: float = 1e-3
    atol: float = 1e-6
    adaptive_stepsize: bool = True
    early_termination: bool = True


@dataclass(frozen=True)
class Architecture:
    """Structure of a network and of what trains it; names are keys of the tables."""

    family: str  # of rules, which one program trains
    circuit: str  # "dale": E-I microcircuits; "non-dale": plain MLP
    sizes: tuple[int, ...]  # inputs, hidden ..., outputs
    use_bias: bool = True
    activation_e: str = "softrelu"
    activation_i: str = "softrelu"
    controller: str = "leaky-pi"
    loss: str = "softmax-cross-entropy"
    fb_to_readout: bool = True
    optimizer: str = "adam"
    batch_size: int = 100
    solver: Newton | Ode = Newton()

    @property
    def hidden_layers(self) -> int:
        return len(self.sizes) - 2


class Hyperparameters(NamedTuple):
    """Scalars that a search may move; defaults are the published ones (rates dimensionless).

    The first six hold the options of an entry each, by name: `config.published` has their defaults.
    """

    optimizer: Mapping[str, Scalar] = {}
    rule: Mapping[str, Scalar] = {}  # of its family, and which of its rules it is
    controller: Mapping[str, Scalar] = {}
    loss: Mapping[str, Scalar] = {}
    activation_e: Mapping[str, Scalar] = {}
    activation_i: Mapping[str, Scalar] = {}
    g_ei: Scalar = 1.0  # interneuron gain, E onto I
    g_ie: Scalar = 1.0  # interneuron gain, I onto E
    tau_e: Scalar = 20e-3  # s
    tau_i: Scalar = 5e-3  # s
    weight_scale: Scalar = 1.0  # multiplies the initial kernels
    soft_target: Scalar = 0.99  # target value of the right class

    def updated(self, **changes: Scalar | Mapping[str, Scalar]) -> Hyperparameters:
        """With other values: `updated(g_ei=2.0, controller={"k_p": 0.1})`.

        Raises ValueError for a name that is not there already.
        """
        values = self._asdict()
        for name, change in changes.items():
            before = values.get(name)
            if isinstance(change, Mapping) and isinstance(before, Mapping):
                unknown = [f"{name}[{key!r}]" for key in change if key not in before]
                values[name] = {**before, **change}
            else:
                unknown = [] if name in values and not isinstance(before, Mapping) else [name]
                values[name] = change
            if unknown:
                raise ValueError(f"no scalar {', '.join(unknown)}")
        return Hyperparameters(**values)
