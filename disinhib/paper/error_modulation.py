"""Four other models of error-modulated plasticity, as the same experiment (Supplementary Fig. S1).

Each is one synapse with input x onto one neuron; phi is a soft rectifier S(1, 1, 0). Its weight
change as a function of the neuron's rate is computed with the model's feedback (a target), without
it (None), and, but for Payeur et al., with inhibition clamped. Published:
`notebooks/Supplementary Figure S1.ipynb`. All dimensionless.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from disinhib.activations import bind
from disinhib.hyperparameters import Scalar
from disinhib.microcircuit import Microcircuit
from disinhib.paper.plasticity import Curve, Points, solved

PHI = bind("softrelu")
BASELINE = 0.5  # burst probability without error, sigmoid(0)

# Sacramento et al. (2018): conductances, and the weights from interneuron and to it
G_LEAK, G_B, G_A, G_D = 0.1, 1.0, 0.8, 1.0
W_IE, W_EI = -0.55, 1.0
SOMA, INTERNEURON = G_LEAK + G_B + G_A, G_LEAK + G_D
GREEDY_SLOPE = 4.0  # of the burst probability in the apical potential


def _sacramento_change(x: Points, u_e: Points) -> Curve:
    expected = x * G_B / SOMA  # the soma's potential if the apical dendrite were at 0
    return Curve(x, PHI.value(u_e), x * (PHI.value(u_e) - PHI.value(expected)))


@jax.jit
def sacramento(x: Points, target: Scalar | None) -> Curve:
    """Sacramento, Costa, Bengio & Senn (2018): dendritic errors cancelled by an interneuron.

    du_E = -g_leak u_E + g_B (x - u_E) + g_A (w_IE phi(u_I) + target - u_E) and
    du_I = -g_leak u_I + g_D (w_EI phi(u_E) - u_I) + target are one microcircuit at equilibrium.
    """
    shown = 0.0 if target is None else target
    circuit = Microcircuit(PHI, PHI, g_ei=G_D * W_EI / INTERNEURON, g_ie=-G_A * W_IE / SOMA)
    a = (G_B * x + G_A * shown) / SOMA
    s = jnp.full_like(x, -shown / INTERNEURON)
    return _sacramento_change(x, solved(circuit, a, s).u_e)


@jax.jit
def sacramento_clamped(x: Points, r_i: Scalar) -> Curve:
    """The apical dendrite is clamped at -r_I."""
    return _sacramento_change(x, (G_B * x - G_A * r_i) / SOMA)


@jax.jit
def meulemans(x: Points, target: Scalar | None) -> Curve:
    """Meulemans et al. (2021, 2022): control at the soma, du = -u + x + (target - phi(u)).

    u + phi(u) = x + target is a microcircuit whose interneuron copies the potential.
    """
    u = x
    if target is not None:
        circuit = Microcircuit(bind("linear"), PHI, 1.0, 1.0)
        u = solved(circuit, x + target, jnp.zeros_like(x)).u_e
    return Curve(x, PHI.value(u), x * (u - x))


@jax.jit
def meulemans_clamped(x: Points, r_i: Scalar) -> Curve:
    """u = x - r_I."""
    u = x - r_i
    return Curve(x, PHI.value(u), x * (u - x))


@jax.jit
def payeur(x: Points, target: Scalar | None) -> Curve:
    """Payeur et al. (2021): the error is in the burst probability p = sigmoid(target - e) of the
    events e = phi(x); dw = x e (p - sigmoid(0))."""
    events = PHI.value(x)
    error = 0.0 if target is None else target - events
    bursts = jax.nn.sigmoid(jnp.asarray(error))
    return Curve(x, events, x * events * (bursts - BASELINE))


@jax.jit
def greedy(x: Points, target: Scalar | None) -> Curve:
    """Greedy et al. (2022): the bursts of an output neuron, against their expectation.

    With events e = phi(x) and e_o = phi(e), h = phi'(x) / e and h_o = phi'(e) / e_o, the output
    bursts with probability p_b + p_b (e_o - target) h_o, p_b = sigmoid(0); the apical potential is
    p_b e_o minus the output's bursts; p = sigmoid(4 u h) and dw = x e (p - p_b).
    """
    events = PHI.value(x)
    output = PHI.value(events)
    error = jnp.zeros_like(x) if target is None else output - target
    output_bursts = BASELINE + BASELINE * error * PHI.derivative(events) / output
    apical = BASELINE * output - output * output_bursts
    return _greedy_change(x, jax.nn.sigmoid(GREEDY_SLOPE * apical * _relative_slope(x)))


@jax.jit
def greedy_clamped(x: Points, r_i: Scalar) -> Curve:
    """The apical potential is -r_I, and bursts are rarer where events are few:
    p = 1.6 (1 - exp(-e / 10)) sigmoid(4 u h), as the published code imitates Poisson statistics."""
    bursts = jax.nn.sigmoid(-GREEDY_SLOPE * r_i * _relative_slope(x))
    return _greedy_change(x, 1.6 * (1 - jnp.exp(-PHI.value(x) / 10)) * bursts)


def _relative_slope(x: Points) -> Points:
    return PHI.derivative(x) / PHI.value(x)


def _greedy_change(x: Points, bursts: Points) -> Curve:
    events = PHI.value(x)
    return Curve(x, events, x * events * (bursts - BASELINE))


class Model(NamedTuple):
    """An entry of MODELS: curves for the inputs `x` with a target or without feedback, and with
    inhibition clamped, if the model has any; and the largest input that is shown of each."""

    citation: str
    rate: str  # what its curves call the rate
    feedback: Callable[[Points, float | None], Curve]
    x_with_target: float
    x_without: float
    clamped: Callable[[Points, float], Curve] | None = None
    x_clamped: float | None = None


MODELS: dict[str, Model] = {
    "sacramento": Model(
        *("Sacramento et al. 2018", "firing rate", sacramento, 10.0, 13.0),
        *(sacramento_clamped, 10.0),
    ),
    "meulemans": Model(
        *("Meulemans et al. 2021, 2022", "firing rate", meulemans, 5.0, 13.0),
        *(meulemans_clamped, 10.0),
    ),
    "payeur": Model("Payeur et al. 2021", "event rate", payeur, 10.0, 13.0),
    "greedy": Model("Greedy et al. 2022", "event rate", greedy, 5.0, 13.0, greedy_clamped, 25.0),
}
