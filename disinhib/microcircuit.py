"""One layer of excitatory-inhibitory microcircuits at its equilibrium (DESIGN section 2).

    u_E = a - g_IE phi_I(u_I)          u_I = g_EI phi_E(u_E) - s

Eliminating u_I leaves one scalar equation a neuron, f(u_E) = u_E + g_IE phi_I(u_I) - a = 0.
For increasing activations and positive gains f' >= 1, so the root is unique and |f| bounds the
distance to it: it lies between u and u - f.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from disinhib.activations import Activation, bind
from disinhib.hyperparameters import Architecture, Hyperparameters, Scalar

Neurons = Float[Array, "*batch_neurons"]  # any number of axes: every neuron is alone


class Microcircuit(NamedTuple):
    """Activations and interneuron gains of an E-I layer."""

    phi_e: Activation
    phi_i: Activation
    g_ei: Scalar
    g_ie: Scalar


def microcircuit(architecture: Architecture, hyper: Hyperparameters) -> Microcircuit:
    return Microcircuit(
        bind(architecture.activation_e, hyper.activation_e),
        bind(architecture.activation_i, hyper.activation_i),
        hyper.g_ei,
        hyper.g_ie,
    )


def inhibitory_potential(circuit: Microcircuit, u_e: Neurons, s: Neurons | float) -> Neurons:
    """u_I in equilibrium with u_E under the top-down dis-inhibition `s`."""
    return circuit.g_ei * circuit.phi_e.value(u_e) - s


def imbalance(
    circuit: Microcircuit, u_e: Neurons, a: Neurons, s: Neurons | float
) -> tuple[Neurons, Neurons]:
    """f(u_E), the excitatory equation's residual, and its slope f'(u_E) >= 1."""
    u_i = inhibitory_potential(circuit, u_e, s)
    f = u_e + circuit.g_ie * circuit.phi_i.value(u_i) - a
    return f, 1 + loop_gain(circuit, u_e, u_i)


def loop_gain(circuit: Microcircuit, u_e: Neurons, u_i: Neurons) -> Neurons:
    """g_IE g_EI phi_I'(u_I) phi_E'(u_E): how strongly a neuron's own interneuron holds it."""
    return (
        circuit.g_ie * circuit.g_ei * circuit.phi_i.derivative(u_i) * circuit.phi_e.derivative(u_e)
    )


class Search(NamedTuple):
    """Newton's method on f(u_E) = 0, safeguarded: the root lies in [low, high]."""

    u_e: Neurons
    low: Neurons
    high: Neurons
    imbalance: Neurons  # |f| before a Newton step, inf after the bracket was halved


def search_from(u_e: Neurons) -> Search:
    unknown = jnp.full_like(u_e, jnp.inf)
    return Search(u_e, -unknown, unknown, unknown)


def relax(circuit: Microcircuit, search: Search, a: Neurons, s: Neurons | float) -> Search:
    """One Newton step on f within the root's bracket; after one that did not halve |f|, the bracket
    is halved instead. (Saturating activations make f neither convex nor concave, and Newton's
    method can jump from one side of the root to the other for ever.)"""
    u_e, low, high, last = search
    f, slope = imbalance(circuit, u_e, a, s)
    # f' >= 1 puts the root within |f| of u.
    low = jnp.maximum(low, u_e - jnp.maximum(f, 0))
    high = jnp.minimum(high, u_e - jnp.minimum(f, 0))
    newton = jnp.clip(u_e - f / slope, low, high)
    stalled = 2 * jnp.abs(f) > last
    return Search(
        jnp.where(stalled, 0.5 * (low + high), newton),
        low,
        high,
        jnp.where(stalled, jnp.inf, jnp.abs(f)),
    )
