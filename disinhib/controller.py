"""The top-down controller: what it does in time, and what it comes to at equilibrium.

    tau_c dz/dt = e - leak z,  c = k_p e + k_i z     leaky PI
    c = k_p e                                        proportional

Published `src/core/controller.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float

from disinhib.hyperparameters import Hyperparameters, Scalar

Outputs = Float[Array, "batch out"]


class Controller(NamedTuple):
    """`signal(hyper, e, z)` is c; `velocity(hyper, e, z)` is dz/dt in 1/s; at equilibrium
    c = `gain(hyper)` e."""

    signal: Callable[[Hyperparameters, Outputs, Outputs], Outputs]
    velocity: Callable[[Hyperparameters, Outputs, Outputs], Outputs]
    gain: Callable[[Hyperparameters], Scalar]


CONTROLLERS: dict[str, Controller] = {
    "leaky-pi": Controller(
        signal=lambda hyper, e, z: hyper.k_p * e + hyper.k_i * z,
        velocity=lambda hyper, e, z: (e - hyper.leak * z) / hyper.tau_c,
        gain=lambda hyper: hyper.k_p + hyper.k_i / hyper.leak,
    ),
    "proportional": Controller(
        signal=lambda hyper, e, z: hyper.k_p * e,
        velocity=lambda hyper, e, z: 0 * z,
        gain=lambda hyper: hyper.k_p,
    ),
}
