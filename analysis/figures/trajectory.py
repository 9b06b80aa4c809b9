"""`python -m analysis.figures.trajectory run=RUN [sample=N] [plugins=FILE]`: a trained network in
time.

RUN is the folder of a training run (`python -m disinhib`) or a trained network's file
(`model.msgpack`, an artifact of a retrained seed). The network sees one sample, in open loop from
rest and then in closed loop, with the target fed back. Drawn are excitatory, inhibitory and readout
potentials and the control signal; dotted lines are the equilibria that Newton's method finds.
trajectory.csv has the trajectories, trajectory-equilibria.csv the equilibria.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import command
from analysis.figures.command import BLACK, GREY, ORANGE, VERMILION, Tables
from disinhib import checkpoint, cli, export, training
from disinhib.checks import INDEX, TEXT, Option
from disinhib.config import PLUGINS, RunConfig, parse
from disinhib.errors import InputError
from disinhib.hyperparameters import Newton, Ode
from disinhib.losses import soft_targets
from disinhib.network import NetworkState, Parameters
from disinhib.rules import RULES, RuleState
from disinhib.solvers import ode, stability

SECONDS, POINTS, QUICK_POINTS = 1.0, 501, 51  # of each loop
LOOPS = ("open", "closed")
NEURONS = 5  # drawn of a layer: those that feedback moves most
INTEGRATION = Ode(rtol=1e-6, atol=1e-9, early_termination=False)
NEWTON = Newton(tolerance=1e-6, max_iterations=100)


NETWORK = (TEXT[0], "the folder of a training run, or a model.msgpack")
RUN = Option("run", cli.REQUIRED, NETWORK, "the trained network")
SAMPLE = Option("sample", 0, INDEX, "number of a sample in the validation set")
NEEDED = Option("plugins", [], PLUGINS, "those that it was trained with")
COMMAND = command.command("trajectory", __doc__, RUN, SAMPLE, NEEDED, alone=("run",))


def trained(path: Path, given: Sequence[str] = ()) -> tuple[RunConfig, Parameters, RuleState]:
    """The configuration of a training run, its parameters, and what its closed loop needs of the
    rule's state, from its folder or a model's file, with the plugins `given`. Raises InputError
    unless a trained network with dynamics is there."""
    try:
        network, parameters = export.load(path, given)
        config = parse(network.options)
    except InputError as error:
        raise InputError(f"run: given {path}, allowed is {NETWORK[1]} ({error})") from error
    if config.architecture.circuit == "non-dale":
        raise InputError(f"run: given {path}, a plain MLP, which has no dynamics; needed is dale")
    if RULES[config.rule].family.feedback_and_aim is None:
        rules = ", ".join(name for name, rule in RULES.items() if rule.family.feedback_and_aim)
        raise InputError(
            f"run: given {path}, trained by {config.rule}, which has no closed loop;"
            f" needed is one of {rules}"
        )
    try:
        if path.is_dir():  # also of a plugin's rule, whose state no model has
            state = checkpoint.load(path / checkpoint.CHECKPOINT, config, "run").state
            return config, parameters, jax.tree.map(lambda lanes: lanes[0], state.rule)
        return config, parameters, network.memory(parameters)
    except InputError as error:
        raise InputError(f"run: given {path}: {error}") from error


def numbers(
    config: RunConfig, parameters: Parameters, rule_state: RuleState, sample: int, quick: bool
) -> Tables:
    """Of the validation set's `sample`: `loop` (open, closed), `seconds`, then a column for each
    neuron and output (u_E_1_17 is neuron 17 of the first hidden layer; neurons count from 0, layers
    from 1). Of the equilibria: `loop`, whether Newton's method `converged`, the sample's `label`,
    and the same columns. Raises InputError if there is no such sample."""
    images = training.prepare(config)
    count = len(images.validation.labels)
    if not 0 <= sample < count:
        raise InputError(f"sample: given {sample}, allowed is 0 to {count - 1}")
    chosen = slice(sample, sample + 1)
    with jax.enable_x64(True):
        wide = lambda value: jnp.asarray(value, jnp.float64)
        parameters, hyper, scale = jax.tree.map(
            wide, (parameters, config.hyperparameters, images.scale)
        )
        rule_state = stability.widened(rule_state)
        x = wide(images.validation.images[chosen]) * scale
        classes = config.architecture.sizes[-1]
        target = soft_targets(images.validation.labels[chosen], classes, hyper.soft_target)
        by_newton = replace(config.architecture, solver=NEWTON)
        by_ode = replace(config.architecture, solver=INTEGRATION)
        (_, opened), (control, closed) = stability.equilibria(
            by_newton, parameters, hyper, x, target, rule_state
        )
        feedback_and_aim = RULES[config.rule].family.feedback_and_aim
        assert control is not None and feedback_and_aim is not None  # `trained` sees to that
        network = by_newton, parameters, rule_state, hyper
        weights_at = lambda state: feedback_and_aim(*network, state, target)[0]
        times = jnp.linspace(0, SECONDS, QUICK_POINTS if quick else POINTS)
        states, signal = jax.jit(
            partial(ode.open_then_closed_trajectory, by_ode, weights_at=weights_at)
        )(parameters, hyper, x, control.target, times=times)
        seconds = np.concatenate([times, SECONDS + np.asarray(times)])
    moving = _columns(jax.tree.map(lambda v: v[0], states.network), signal[0])
    ends = [_columns(end.state, end.control) for end in (opened, closed)]
    at_rest = {name: np.concatenate([end[name] for end in ends]) for name in moving}
    equilibria = {
        "loop": LOOPS,
        "converged": [bool(end.converged[0]) for end in (opened, closed)],
        "label": int(images.validation.labels[sample]),
    }
    loop = np.repeat(LOOPS, len(times))
    return {
        "": pd.DataFrame({"loop": loop, "seconds": seconds, **moving}),
        "-equilibria": pd.DataFrame({**equilibria, **at_rest}),
    }


def _columns(state: NetworkState, control) -> dict[str, np.ndarray]:
    """By name, `[time]` each, of potentials and control `[time, neurons]`."""
    groups = {"u_y": state.u_y, "c": control}
    for layer, (u_e, u_i) in enumerate(zip(state.u_e, state.u_i, strict=True), start=1):
        groups |= {f"u_E_{layer}": u_e, f"u_I_{layer}": u_i}
    return {
        f"{group}_{neuron}": np.asarray(values)[:, neuron]
        for group, values in sorted(groups.items(), key=lambda item: item[0])
        for neuron in range(values.shape[-1])
    }


def draw(tables: Tables) -> Figure:
    moving, rest = tables[""], tables["-equilibria"]
    layers = sorted({int(name.split("_")[2]) for name in moving if name.startswith("u_E_")})
    groups = [f"u_{kind}_{layer}" for layer in layers for kind in "EI"] + ["u_y", "c"]
    figure = Figure(figsize=(8, 1.9 * len(groups) / 2), layout="constrained")
    figure.subplots(len(groups) // 2, 2)
    titles = {"u_y": "Readout", "c": "Control signal"}
    for axes, group in zip(figure.axes, groups, strict=True):
        kind = "Excitatory" if group.startswith("u_E") else "Inhibitory"
        title = titles.get(group) or f"{kind} neurons, hidden layer {group[4:]}"
        axes.set(title=title, ylabel="control" if group == "c" else "potential")
        _draw_group(axes, group, moving, rest)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("time in s (open loop, then closed)")
    return figure


def _draw_group(axes: Axes, group: str, moving: pd.DataFrame, rest: pd.DataFrame) -> None:
    names = [name for name in moving.columns if name.rpartition("_")[0] == group]
    is_class = group in ("u_y", "c")
    if not is_class:
        # The same neurons of both kinds: those whose excitatory potential feedback moves most.
        excitatory = [name.replace("u_I", "u_E") for name in names]
        moved = (rest[excitatory].iloc[1] - rest[excitatory].iloc[0]).abs()
        names = [names[index] for index in np.argsort(-moved.to_numpy())[:NEURONS]]
    for name in names:
        number = int(name.rpartition("_")[2])
        answers = is_class and number == rest["label"].iloc[0]
        label = f"class {number}, the label" if answers else None
        colour, width = (VERMILION, 1.8) if answers else (GREY if is_class else None, 1.2)
        axes.plot(moving["seconds"], moving[name], label=label, color=colour, linewidth=width)
        for loop, (converged, value) in enumerate(zip(rest["converged"], rest[name], strict=True)):
            if converged:
                ends = [loop * SECONDS, (loop + 1) * SECONDS]
                axes.plot(ends, [value, value], ":", color=BLACK, linewidth=0.9, zorder=3)
    axes.axvspan(SECONDS, 2 * SECONDS, color=ORANGE, alpha=0.1, linewidth=0)
    axes.axvline(SECONDS, color=GREY, linewidth=0.5)
    if group == "c":
        axes.legend()


def main(arguments: Sequence[str]) -> None:
    options = COMMAND.parse(arguments)
    run = trained(Path(options["run"]), options["plugins"])
    folder = command.check_folder(options["out"])
    command.set_jax()
    tables = numbers(*run, options["sample"], options["quick"])
    command.save(folder, "trajectory", tables, draw)


if __name__ == "__main__":
    cli.run(main)
