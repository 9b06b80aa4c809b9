"""Parameters and states of a whole network, and its passes from layer to layer.

Parameters are a flat dict `kernel_0`, `bias_0`, ..., `kernel_out` (the readout has no bias);
kernels are `[pre, post]`. Hidden layers count from 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from disinhib.activations import bind
from disinhib.hyperparameters import Architecture, Hyperparameters, Scalar
from disinhib.microcircuit import Microcircuit, imbalance

Parameters = dict[str, Array]
Layers = tuple[Float[Array, "batch _neurons"], ...]


class NetworkState(NamedTuple):
    """Potentials `[batch, neurons]` of every layer; a plain MLP has no `u_i`."""

    u_e: Layers
    u_i: Layers
    u_y: Float[Array, "batch out"]


def initial_parameters(
    architecture: Architecture, weight_scale: Scalar, key: PRNGKeyArray
) -> Parameters:
    """LeCun-normal kernels (truncated, as flax's Dense) times `weight_scale`; biases zero."""
    initializer = jax.nn.initializers.lecun_normal()
    names = [*(str(layer) for layer in range(architecture.hidden_layers)), "out"]
    parameters = {}
    for index, name in enumerate(names):
        shape = architecture.sizes[index : index + 2]
        kernel = initializer(jax.random.fold_in(key, index), shape)
        parameters[f"kernel_{name}"] = weight_scale * kernel
        if architecture.use_bias and name != "out":
            parameters[f"bias_{name}"] = jnp.zeros(shape[1])
    return parameters


def feedforward_input(parameters: Parameters, layer: int, rate: Array) -> Array:
    """a_l = r_{l-1} W_l + b_l of hidden layer `layer`."""
    a = rate @ parameters[f"kernel_{layer}"]
    bias = parameters.get(f"bias_{layer}")
    return a if bias is None else a + bias


def mlp_forward(
    architecture: Architecture, parameters: Parameters, hyper: Hyperparameters, x: Array
) -> NetworkState:
    """The plain ("non-dale") MLP with the same phi_E (published `src/models/nondale/vf.py`)."""
    phi = bind(architecture.activation_e, hyper.activation_e)
    rate, potentials = x, []
    for layer in range(architecture.hidden_layers):
        potentials.append(feedforward_input(parameters, layer, rate))
        rate = phi.value(potentials[-1])
    return NetworkState(tuple(potentials), (), rate @ parameters["kernel_out"])


def implicit_output(
    circuit: Microcircuit, parameters: Parameters, x: Array, u_e: Layers
) -> Float[Array, "batch out"]:
    """The open-loop output as a differentiable function of parameters, at a known equilibrium.

    One Newton step from the (constant) equilibrium `u_e` moves nothing, but its derivative is
    the implicit function theorem's: du/da = 1 / f'(u). First derivatives only.
    """
    rate = x
    for layer, u in enumerate(u_e):
        u = jax.lax.stop_gradient(u)
        a = feedforward_input(parameters, layer, rate)
        f, slope = imbalance(circuit, u, a, 0.0)
        rate = circuit.phi_e.value(u - f / jax.lax.stop_gradient(slope))
    return rate @ parameters["kernel_out"]
