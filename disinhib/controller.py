"""The top-down controller: what it does in time, and what it comes to at equilibrium.

    tau_c dz/dt = e - leak z,  c = k_p e + k_i z     leaky PI
    c = k_p e                                        proportional

Published `src/core/controller.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jaxtyping import Array, Float

from disinhib.checks import NOT_NEGATIVE, POSITIVE, Option
from disinhib.hyperparameters import Scalar

Outputs = Float[Array, "*batch out"]
Scalars = Mapping[str, Scalar]  # a value for each of a controller's options


class Controller(NamedTuple):
    """`signal(scalars, e, z)` is c and `velocity(scalars, e, z)` is dz/dt in 1/s; at equilibrium
    c = `gain(scalars)` e and z = `integral(scalars, e)`. `tau` is the time constant of dz/dt, and
    `settling` that with which z comes to rest, both in s."""

    signal: Callable[[Scalars, Outputs, Outputs], Outputs]
    velocity: Callable[[Scalars, Outputs, Outputs], Outputs]
    gain: Callable[[Scalars], Scalar]
    integral: Callable[[Scalars, Outputs], Outputs]
    tau: Callable[[Scalars], Scalar]
    settling: Callable[[Scalars], Scalar]
    words: str
    options: tuple[Option, ...]


CONTROLLERS: dict[str, Controller] = {
    "leaky-pi": Controller(
        signal=lambda scalars, e, z: scalars["k_p"] * e + scalars["k_i"] * z,
        velocity=lambda scalars, e, z: (e - scalars["leak"] * z) / scalars["tau"],
        gain=lambda scalars: scalars["k_p"] + scalars["k_i"] / scalars["leak"],
        integral=lambda scalars, e: e / scalars["leak"],
        tau=lambda scalars: scalars["tau"],
        settling=lambda scalars: scalars["tau"] / scalars["leak"],
        words="tau dz/dt = e - leak z,  c = k_p e + k_i z",
        options=(
            Option("k_p", 0.2, NOT_NEGATIVE, "proportional gain"),
            Option("k_i", 0.4, NOT_NEGATIVE, "integral gain"),
            Option("leak", 1.0, POSITIVE, "of the integral"),
            Option("tau", 100e-3, POSITIVE, "s"),
        ),
    ),
    "proportional": Controller(
        signal=lambda scalars, e, z: scalars["k_p"] * e,
        velocity=lambda scalars, e, z: 0 * z,
        gain=lambda scalars: scalars["k_p"],
        integral=lambda scalars, e: 0 * e,
        # It has no dynamics of its own; the loop that it closes gets the leaky PI's time to settle.
        tau=lambda scalars: 100e-3,
        settling=lambda scalars: 100e-3,
        words="c = k_p e",
        options=(Option("k_p", 0.2, POSITIVE, "gain"),),
    ),
}
