"""`python -m disinhib`: one training run (options: conf/train.yaml).

The output folder gets `config.yaml` (resolved), `results.json` (per-epoch lists, wall time in
seconds), `checkpoint.msgpack` and `train.log`. Hydra's own flags (`--cfg job`, `--multirun`,
`--help`) work as everywhere.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TextIO

import hydra
import jax
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from disinhib import checkpoint, cli, data, hydra_config, numerics, plugins, training
from disinhib.checkpoint import CHECKPOINT, CONFIG
from disinhib.checks import flatten, refusal
from disinhib.config import RunConfig, parse, with_sizes
from disinhib.errors import FULL_DISK, ConfigError, masked, one_line, printable
from disinhib.files import write_whole
from disinhib.rules import RULES

RESULTS = "results.json"
PLUGINS = "plugins"  # a folder, in the run's
# Options that may differ from those of the run that is resumed.
RESUMED_WITH = {
    *("epochs", "resume", "out_dir", "device", "gpu_id", "dataset.path", "plugins"),
    *("OL_eval_on_train", "test_at_end", "diagnostics.alignment"),
    *("min_converged_share", "max_weight"),
}
# Hydra's flags, without those that would replace conf/, and the values of those that have one.
PLAIN = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--resolve",
    "--run",
    "-r",
    "--multirun",
    "-m",
)
SHOWN = ("job", "hydra", "all")  # parts of the configuration
WITH_VALUE = {"--cfg": SHOWN, "-c": SHOWN, "--package": None, "-p": None}
log = logging.getLogger("disinhib")


def main(arguments: list[str]) -> int | None:
    """Checks all options before Hydra makes the run's folder, then starts Hydra."""
    for line in numerics.ignored():
        print(f"warning: {line}", file=sys.stderr)
    if "help=true" in arguments:  # as with every other command
        arguments = sys.argv[1:] = ["--help"]
    _check_flags(arguments)
    numerics.check()
    numerics.set_jax()
    # Before Hydra knows options of theirs.
    arguments = sys.argv[1:] = hydra_config.load_plugins(arguments)
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if len(overrides) == len(arguments):  # Hydra's flags may sweep or only show: checked later
        options, _ = hydra_config.compose_loaded(hydra_config.TRAINING, overrides)
        _check(options)
        sys.argv[1:] = hydra_config.literal(hydra_config.TRAINING, overrides)
    # The folder above the package is where conf/ is; Hydra takes an absolute path.
    decorate = hydra.main(
        version_base="1.3",
        config_path=str(hydra_config.CONFIGURATIONS),
        config_name=hydra_config.TRAINING,
    )
    decorate(_task)()


def _check_flags(arguments: list[str]) -> None:
    """Raises ConfigError for a flag that is wrong, where Hydra would print its usage."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, _, value = argument.partition("=")
        if flag in WITH_VALUE:
            value = value or (rest.pop(0) if rest else "")
            allowed = WITH_VALUE[flag]
            if not value or (allowed and value not in allowed):
                raise refusal(flag, value or "nothing", f"one of {', '.join(allowed or ['NAME'])}")
        elif flag.startswith("-") and flag not in PLAIN:
            raise ConfigError(f"{argument}: has no meaning here, allowed is option=value")


def _task(composed: DictConfig) -> None:
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
        options = with_sizes(plain)  # pyright: ignore[reportArgumentType]
        config, past = _check(options)
    except ValueError as error:
        print(f"error: {printable(masked(str(error)))}", file=sys.stderr)
        sys.exit(2)
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        _run(config, past, options, folder)
    except training.Diverged as error:
        log.error("diverged: %s", error)
        sys.exit(1)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        print(f"error: {one_line(error)}: make room", file=sys.stderr)
        sys.exit(1)


class Past(NamedTuple):
    """State and results of the run that is resumed."""

    state: training.TrainingState
    results: dict[str, Any]


def _check(options: Mapping[str, Any]) -> tuple[RunConfig, Past | None]:
    """The run's configuration, and the run that it resumes, if any.

    Raises ConfigError or data.DataError for invalid options or data; writes nothing.
    """
    config = parse(options)
    _select_device(config)
    hydra_config.check_folder(Path(options["out_dir"]))
    training.prepare(config)
    if options["resume"] is None:
        return config, None
    return config, _past(Path(options["resume"]), config, options)


def _past(folder: Path, config: RunConfig, options: Mapping[str, Any]) -> Past:
    """State and results of the run in `folder`. Raises ConfigError if there is no run, if it had
    other options (naming the differences), or if it has already done all `epochs`."""
    try:
        before = flatten(yaml.safe_load((folder / CONFIG).read_text("utf-8")))
        results = json.loads((folder / RESULTS).read_text("utf-8"))
    except (OSError, ValueError) as error:
        allowed = f"the folder of a run ({type(error).__name__}: no {CONFIG} or {RESULTS})"
        raise refusal("resume", folder, allowed) from error
    now = flatten(options)
    if now["seed"] is None:  # any: so the one it had
        now["seed"] = before["seed"]
    changed = [
        f"{name}={before.get(name)} (given {now.get(name)})"
        for name in sorted({*before, *now} - RESUMED_WITH)
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(
            f"resume: {folder} ran with {', '.join(changed)}; give the same options as then, and"
            " resume"
        )
    state = checkpoint.load(folder / CHECKPOINT, config).state
    done = int(state.epoch[0])
    if config.epochs <= done:
        raise refusal("epochs", config.epochs, f"more than the {done} that {folder} has done")
    # Results are written before the checkpoint: those of a later epoch will be computed again.
    kept = {name: v[:done] if isinstance(v, list) else v for name, v in results.items()}
    return Past(state, kept)


def _select_device(config: RunConfig) -> None:
    if config.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        return
    try:
        gpus = [device for device in jax.devices() if device.platform == "gpu"]
    except (RuntimeError, AssertionError) as error:  # jax raises either
        wanted = os.environ.get("JAX_PLATFORMS", jax.config.jax_platforms)  # pyright: ignore
        allowed = f"one that jax finds here: {one_line(error)}"
        raise refusal("JAX_PLATFORMS", wanted, allowed) from error
    if config.device == "gpu" and not gpus:
        raise refusal("device", "gpu", "auto or cpu (no GPU found)")
    if gpus:
        if config.gpu_id >= len(gpus):
            raise refusal("gpu_id", config.gpu_id, f"0 to {len(gpus) - 1}")
        jax.config.update("jax_default_device", gpus[config.gpu_id])


def _run(
    config: RunConfig,
    before: Past | None,
    options: dict[str, Any],
    folder: Path,
) -> None:
    start = time.perf_counter()
    state, results = before or (None, {})
    if state is not None:
        seed = int(state.seed[0])
    else:
        seed = secrets.randbelow(2**31) if config.seed is None else config.seed
    (folder / CONFIG).write_text(
        yaml.safe_dump({**options, "seed": seed}, sort_keys=False), "utf-8"
    )
    log.info("seed %d, %s, output in %s", seed, jax.devices()[0].device_kind, folder)
    for plugin in plugins.LOADED.values():  # as they are now
        (folder / PLUGINS).mkdir(exist_ok=True)
        (folder / PLUGINS / f"{plugin.name}.py").write_text(plugin.text, "utf-8")
        log.info("plugin %s, SHA-256 %s", plugin.file, plugin.sha256)
    if words := data.words(config.dataset, config.dataset_path):
        log.info("%s", words)

    start -= results.pop("wall_time", 0.0)
    console = Console(stderr=True)
    moves = console.is_terminal and not console.is_dumb_terminal
    done = 0 if state is None else int(state.epoch[0])
    columns = TextColumn("epoch {task.fields[epoch]}/{task.total}"), EpochBar(), EpochClock()
    with Progress(
        *columns, console=console, disable=not moves, expand=True, refresh_per_second=2
    ) as progress:
        began = {"epoch": min(done + 1, config.epochs), "past": (), "began": time.monotonic()}
        bar = progress.add_task("", total=config.epochs, completed=done, **began)
        past: list[float] = []
        _log_to(sys.stdout)  # which is rich's while the bar is drawn: lines go above it

        def report(state: training.TrainingState, metrics: training.Metrics) -> None:
            epoch = int(state.epoch[0])
            results.setdefault("epoch", []).append(epoch)
            for name, values in metrics.items():
                results.setdefault(name, []).append(float(values[0]))
            results["wall_time"] = time.perf_counter() - start
            write_whole(folder / RESULTS, json.dumps(results, indent=4).encode())
            checkpoint.save(folder / CHECKPOINT, config, state)
            log.info(_line(config, epoch, metrics))
            past.append(float(metrics["epoch_seconds"][0]))
            progress.update(
                bar,
                completed=epoch,
                epoch=min(epoch + 1, config.epochs),
                past=past,
                began=time.monotonic(),
            )

        training.train(config, [seed], report, state)
    _log_to(sys.stdout)


def epoch_share(past: Sequence[float], elapsed: float) -> float:
    """How much of an epoch is done after `elapsed` s, by the durations (s) of those before; below
    1, as it has not ended. (An epoch is one compiled program, which tells nothing before its end.)
    """
    return min(0.99, elapsed / usual(past)) if past else 0.0


def usual(past: Sequence[float]) -> float:
    """The usual duration of an epoch; the first one compiles."""
    return max(1e-6, median(past[1:] or past))


def epoch_clock(past: Sequence[float], elapsed: float, after: int) -> str:
    """How long this epoch takes and, with `after` more, the run: `12/30 s, 0:08:40 left`."""
    if not past:
        return f"{elapsed:.0f} s in the first epoch"
    left = usual(past) * (after + 1 - epoch_share(past, elapsed))
    return f"{elapsed:.0f}/{usual(past):.0f} s, {timedelta(seconds=round(left))} left"


class EpochBar(BarColumn):
    """A bar of epochs that also moves within an epoch."""

    def __init__(self) -> None:
        super().__init__(bar_width=None, table_column=Column(ratio=1))  # as wide as there is room

    def render(self, task: Task) -> ProgressBar:
        bar = super().render(task)
        past, elapsed = task.fields["past"], time.monotonic() - task.fields["began"]
        if not task.finished:
            bar.update(bar.completed + epoch_share(past, elapsed))
        bar.pulse = not past and not task.finished
        return bar


class EpochClock(ProgressColumn):
    def render(self, task: Task) -> Text:
        if task.finished:
            return Text()
        elapsed = time.monotonic() - task.fields["began"]
        after = round(task.total or 0) - task.fields["epoch"]
        return Text(epoch_clock(task.fields["past"], elapsed, after), no_wrap=True)


def _log_to(stream: TextIO) -> None:
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setStream(stream)


def _line(config: RunConfig, epoch: int, metrics: training.Metrics) -> str:
    parts = [f"epoch {epoch}/{config.epochs}"]
    # With the target fed back, the training accuracy shows how well the controller works.
    learning = "train" if RULES[config.rule].family.feedback_and_aim is None else "closed loop"
    splits = {"train_CL": learning, "train_OL": "open loop", "valid": "valid", "test": "test"}
    for split, name in splits.items():
        if f"{split}_loss" in metrics:
            loss, accuracy = metrics[f"{split}_loss"][0], metrics[f"{split}_accuracy"][0]
            parts.append(f"{name} {loss:.3f}, {accuracy:.1f} %")
    if (converged := metrics["train_CL_converged_share"][0]) < 1:
        parts.append(f"converged {100 * converged:.1f} %")
    return " | ".join([*parts, f"{metrics['epoch_seconds'][0]:.1f} s"])


if __name__ == "__main__":
    cli.run(main)
