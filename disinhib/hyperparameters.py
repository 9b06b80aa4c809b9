"""The two halves of a configuration: what is static and what is traced (DESIGN section 4).

Everything structural is in `Architecture`, hashable, so that it keys the compiled program;
everything continuous is in `Hyperparameters`, a pytree of scalars, so that one program serves
every trial of a structure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Float

from disinhib.activations import Shape

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
    """Structure of a network and of the rule that trains it; names are keys of the tables."""

    rule: str
    circuit: str  # "dale": E-I microcircuits; "non-dale": plain MLP
    sizes: tuple[int, ...]  # inputs, hidden ..., outputs
    use_bias: bool = True
    activation_e: str = "softrelu"
    activation_i: str = "softrelu"
    controller: str = "leaky-pi"
    loss: str = "softmax-cross-entropy"
    fb_to_readout: bool = True
    average_fb_weights: bool = False
    clip_fb_weights: bool = False
    norm_fb_weights: bool = True
    optimizer: str = "adam"
    batch_size: int = 100
    solver: Newton | Ode = Newton()

    @property
    def hidden_layers(self) -> int:
        return len(self.sizes) - 2


class Hyperparameters(NamedTuple):
    """Scalars that a search may move; defaults are the published ones (rates dimensionless)."""

    optimizer: dict[str, Scalar]
    shape_e: Shape = Shape()
    shape_i: Shape = Shape()
    g_ei: Scalar = 1.0  # interneuron gain, E onto I
    g_ie: Scalar = 1.0  # interneuron gain, I onto E
    tau_e: Scalar = 20e-3  # s
    tau_i: Scalar = 5e-3  # s
    tau_c: Scalar = 100e-3  # s
    k_p: Scalar = 0.2
    k_i: Scalar = 0.4
    leak: Scalar = 1.0
    norm_val: Scalar = 1.0  # Frobenius norm of a sample's feedback weights
    clip_val: Scalar = 1.0
    strong_fb: Scalar = 1.0  # 1: control towards the target itself, 0: towards a nudge
    target_nudge: Scalar = 0.015  # how far the nudge lies from the open-loop output
    avg_inh_lambda: Scalar = 1.0  # lin-thresh: weight of the newest batch in y0
    avg_inh_init: Scalar = 0.8  # lin-thresh: y0 before the first batch
    y0: Scalar = 1.0  # taylor: fixed point of linearisation
    weight_scale: Scalar = 1.0  # multiplies the initial kernels
    soft_target: Scalar = 0.99  # target value of the right class
