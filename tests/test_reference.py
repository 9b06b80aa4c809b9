"""Every value of the published implementation that the reference folder holds.

The folder is $DISINHIB_REFERENCE, by default the project's own copy; shared/reference/README.md
says what is in a file. Whatever else a file holds than what is listed here as its input is
compared with ours, so that no array is passed over in silence.
"""

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import hyperparameters

from disinhib.config import published
from disinhib.controller import CONTROLLERS
from disinhib.feedback import jacobian_weights
from disinhib.hyperparameters import Architecture, Newton, Ode
from disinhib.losses import LOSSES
from disinhib.microcircuit import microcircuit
from disinhib.optimizers import OPTIMIZERS
from disinhib.rules import FAMILIES, RULES, disinhibition

pytestmark = pytest.mark.usefixtures("float64")

FOLDER = Path(os.environ.get("DISINHIB_REFERENCE") or Path(__file__).parent / "reference")
FILES = sorted(FOLDER.glob("*.npz"))
RULE_OF = {"exact": "exact-inv", "linthresh": "lin-thresh", "taylor": "taylor"}
INPUTS = ("config", "x", "target", "kernel_", "bias_", "init_")
SETTINGS = ("learning_rate", "avg_inh_lambda", "avg_inh_init", "taylor_y0")  # as in config

# Newton's tolerance leaves errors near rounding. The integrator's tolerances bound the error it
# makes on the way; at a fixed point of the equations it makes none, so that the 1e-6 asked of
# Newton holds for it too, once the slowest mode (leak/tau_c) has died out: see `integrated`.
RELATIVE = 1e-6
NEWTON = Newton(tolerance=1e-12, max_iterations=100)


@cache
def arrays(file):
    with np.load(file) as content:
        return {name: content[name] for name in content.files}


def files_with(name):
    found = [file for file in FILES if name in arrays(file)]
    return pytest.mark.parametrize("file", found, ids=[file.stem for file in found])


def test_the_folder_holds_cases_of_both_kinds_and_nothing_else():
    kinds = [{"ol_y", "init_kernel_out"} & set(arrays(file)) for file in FILES]
    assert {"ol_y"} in kinds or {"init_kernel_out"} in kinds, f"no cases in {FOLDER}"
    assert all(len(kind) == 1 for kind in kinds)


# --- Reading a case ----------------------------------------------------------------------------


def name_in(options, default):
    """A kind's name as this project spells it, from any of the keys that may hold it."""
    if isinstance(options, str):
        return options
    return options.get("kind", options.get("name", default))


def renamed(options, names):
    """The hyperparameters that `options` give, under their names here; absent ones keep their
    defaults, which are the published ones."""
    return {ours: options[theirs] for theirs, ours in names.items() if theirs in options}


def among(known, options):
    """Those of `options` that are `known`; flags as they are traced."""
    return {
        name: float(value) if isinstance(value, bool) else value
        for name, value in options.items()
        if name in known
    }


def read(file, solver):
    """(architecture, hyperparameters) of a case; its sizes are its kernels'."""
    data = arrays(file)
    config = json.loads(data["config"].item())
    vf, trainer = config["model"]["vf"], config["trainer"]
    control, optimizer = vf["controller"], dict(config.get("optimizer", {"name": "adam"}))
    optimizer_name = optimizer.pop("name", optimizer.pop("kind", "adam"))
    prefix = "init_" if "init_kernel_out" in data else ""
    names = [*(str(layer) for layer in range(vf["nb_hidden"])), "out"]
    kernels = [data[f"{prefix}kernel_{name}"] for name in names]
    rule = trainer.get("rule", "exact-inv")
    architecture = Architecture(
        family=RULES[rule].family.name,
        circuit="dale",
        sizes=(kernels[0].shape[0], *(kernel.shape[1] for kernel in kernels)),
        use_bias=vf["use_bias"],
        activation_e=name_in(vf["actE"], "softrelu"),
        activation_i=name_in(vf["actI"], "softrelu"),
        controller=name_in(control, "leaky-pi" if "k_i" in control else "proportional"),
        loss=name_in(config["dataset"]["loss"], "softmax-cross-entropy"),
        fb_to_readout=vf["fb_to_readout"],
        optimizer=optimizer_name,
        batch_size=data["x"].shape[-2],
        solver=NEWTON,
    )
    # The training cases have one rule; the static ones are read for all of them.
    known = hyperparameters()
    hyper = (
        published(architecture, rule)
        ._replace(rule=known.rule)
        .updated(
            optimizer=optimizer,
            activation_e=among(published(architecture, rule).activation_e, vf["actE"]),
            activation_i=among(published(architecture, rule).activation_i, vf["actI"]),
            controller=among(published(architecture, rule).controller, control),
            rule=among(known.rule, {**config, **trainer})
            | renamed({**config, **trainer}, {"taylor_y0": "y0"})
            | dict(RULES[rule].chosen),
            **renamed(vf, {"g_EI": "g_ei", "g_IE": "g_ie", "tauE": "tau_e", "tauI": "tau_i"}),
        )
    )
    if solver == "ode":
        architecture = replace(architecture, solver=integrated(architecture, hyper))
    return architecture, hyper


def integrated(architecture, hyper):
    """Tight, and for thirty time constants of the controller: e^-30 is 1e-13. (The reference was
    itself integrated for 30 s.)"""
    controller = CONTROLLERS[architecture.controller]
    slowest = max(controller.tau(hyper.controller), controller.settling(hyper.controller))
    return Ode(T=min(30.0, 30 * float(slowest)), rtol=1e-9, atol=1e-11, early_termination=False)


def parameters_in(data, prefix=""):
    marks = (f"{prefix}kernel_", f"{prefix}bias_")
    return {
        name.removeprefix(prefix): jnp.asarray(value, float)
        for name, value in data.items()
        if name.startswith(marks)
    }


# --- Comparing ---------------------------------------------------------------------------------


def compare(found, data, relative):
    """Every array of the file that is not an input, relative to its largest magnitude."""
    wanted = {
        name: value
        for name, value in data.items()
        if not name.startswith(INPUTS) and name not in SETTINGS
    }
    assert sorted(wanted) == sorted(set(wanted) & set(found)), "arrays that are not compared"
    errors = {}
    for name, value in wanted.items():
        ours = np.asarray(found[name])
        assert ours.shape == value.shape, name
        assert np.isfinite(ours).all(), name
        if np.isfinite(value).all():  # a saturated tangent is infinite in the published code
            errors[name] = np.max(np.abs(ours - value)) / (np.max(np.abs(value)) or 1.0)
    assert errors == {name: pytest.approx(0, abs=relative) for name in errors}


def once(function):
    """`function` whose first answer is given to all later callers."""
    answers = []

    def answer(*arguments):
        answers.append(arguments)
        if len(answers) == 1:
            answer.arguments = arguments
            answer.result = function(*arguments)
        return answer.result

    return answer


@pytest.mark.parametrize("solver", ["newton", "ode"])
@files_with("ol_y")
def test_a_static_case(file, solver, monkeypatch):
    architecture, hyper = read(file, solver)
    data = arrays(file)

    # In one program, to compile it once. The three rules share their solutions, which do not
    # depend on the rule; what they aim at and feed back is what the solver was given.
    @jax.jit
    def everything(parameters, hyper, x, target):
        opened, closed = once(disinhibition.open_loop), once(disinhibition.closed_loop)
        monkeypatch.setattr(disinhibition, "open_loop", opened)
        monkeypatch.setattr(disinhibition, "closed_loop", closed)
        found = {}
        for short, rule in RULE_OF.items():
            family = RULES[rule].family
            own = hyper.updated(rule=RULES[rule].chosen)
            means = family.initial_state(architecture, own, jax.random.key(0))
            update = family.update(architecture, parameters, means, own, x, target)
            for name, gradient in update.gradients.items():
                found[f"grad_{short}_{name}"] = gradient
            if rule == "lin-thresh":
                found |= {f"avg_rI_{layer}": y0 for layer, y0 in enumerate(update.rule_state.means)}
        *_, nudged_target, weights, _ = closed.arguments
        state = opened.result.state
        jacobians = jacobian_weights(microcircuit(architecture, hyper), parameters, state)
        layers = {
            "jac": jacobians,
            "Q": weights,
            "ol_uE": state.u_e,
            "ol_uI": state.u_i,
            "cl_uE": closed.result.state.u_e,
            "cl_uI": closed.result.state.u_i,
        }
        found |= {f"{name}_{l}": v for name, values in layers.items() for l, v in enumerate(values)}
        found |= {"ol_y": state.u_y, "cl_y": closed.result.state.u_y}
        found |= {"nudged_target": nudged_target}
        return found, (opened.result.converged, closed.result.converged)

    found, converged = everything(
        parameters_in(data), hyper, jnp.asarray(data["x"]), jnp.asarray(data["target"])
    )
    assert np.all(converged)
    compare(found, data, RELATIVE)


@files_with("init_kernel_out")
def test_a_training_case(file):
    architecture, hyper = read(file, "newton")
    data = arrays(file)
    optimizer = OPTIMIZERS[architecture.optimizer].transformation(hyper.optimizer)
    family = FAMILIES[architecture.family]

    def step(carry, batch):
        parameters, optimizer_state, memory = carry
        update = family.update(architecture, parameters, memory, hyper, *batch)
        loss = LOSSES[architecture.loss].value(update.solution.state.u_y, batch[1])
        changes, optimizer_state = optimizer.update(update.gradients, optimizer_state)
        parameters = optax.apply_updates(parameters, changes)
        return (parameters, optimizer_state, update.rule_state), jnp.mean(loss)

    parameters = parameters_in(data, "init_")
    memory = family.initial_state(architecture, hyper, jax.random.key(0))
    carry = (parameters, optimizer.init(parameters), memory)
    batches = tuple(jnp.asarray(data[name], float) for name in ("x", "target"))
    (parameters, *_), losses = jax.jit(lambda c, b: jax.lax.scan(step, c, b))(carry, batches)
    found = {f"final_{name}": value for name, value in parameters.items()}
    # Adam divides a gradient by its own size: parameters are good to less than gradients are.
    compare(found | {"closed_loop_loss": losses}, data, 1e-5)
