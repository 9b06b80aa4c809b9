"""`python -m disinhib`: one training run (options: conf/train.yaml).

The output folder gets `config.yaml` (resolved), `results.json` (per-epoch lists, wall time in
seconds), `checkpoint.msgpack` and `train.log`. Hydra's own flags (`--cfg job`, `--multirun`,
`--help`) work as everywhere.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import hydra
import jax
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from disinhib import checkpoint, command_line, training
from disinhib.config import RunConfig, parse, refusal

CHECKPOINT = "checkpoint.msgpack"
log = logging.getLogger("disinhib")


def main(arguments: list[str]) -> int | None:
    """Checks everything before Hydra makes the run's folder, then hands over to it."""
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if len(overrides) == len(arguments):  # Hydra's flags may sweep or only show: checked later
        options, _ = command_line.compose(command_line.TRAINING, overrides)
        _check(options)
    # The folder above the package is where conf/ is; Hydra takes an absolute path.
    decorate = hydra.main(
        version_base="1.3",
        config_path=str(command_line.CONFIGURATIONS),
        config_name=command_line.TRAINING,
    )
    decorate(_task)()


def _task(composed: DictConfig) -> None:
    try:
        options = OmegaConf.to_container(composed, resolve=True)
        config, state = _check(options)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        _run(config, state, options, folder)  # pyright: ignore[reportArgumentType]
    except training.Diverged as error:
        log.error("diverged: %s", error)
        sys.exit(1)


def _check(options: Mapping[str, Any]) -> tuple[RunConfig, training.TrainingState | None]:
    """The run's configuration and the state it resumes from.

    Raises ConfigError or data.DataError for whatever is wrong; writes nothing.
    """
    config = parse(options)
    _select_device(config)
    _check_folder(Path(options["out_dir"]))
    training.prepare(config)
    if options["resume"] is None:
        return config, None
    path = Path(options["resume"])
    return config, checkpoint.load(path / CHECKPOINT if path.is_dir() else path, config)


def _select_device(config: RunConfig) -> None:
    if config.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        return
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    if config.device == "gpu" and not gpus:
        raise refusal("device", "gpu", "auto or cpu (no GPU found)")
    if gpus:
        if config.gpu_id >= len(gpus):
            raise refusal("gpu_id", config.gpu_id, f"0 to {len(gpus) - 1}")
        jax.config.update("jax_default_device", gpus[config.gpu_id])


def _check_folder(folder: Path) -> None:
    """Tries whether something can be written there, or in the nearest parent that exists."""
    parents = (folder.absolute(), *folder.absolute().parents)
    existing = next(path for path in parents if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise refusal(
            "out_dir", folder, f"a folder that can be written ({existing}: {error.strerror})"
        ) from error


def _run(
    config: RunConfig,
    state: training.TrainingState | None,
    options: dict[str, Any],
    folder: Path,
) -> None:
    start = time.perf_counter()
    if state is not None:
        seed = int(state.seed[0])
    else:
        seed = secrets.randbelow(2**31) if config.seed is None else config.seed
    config = replace(config, seed=seed)
    (folder / "config.yaml").write_text(yaml.safe_dump({**options, "seed": seed}, sort_keys=False))
    log.info("seed %d, %s, output in %s", seed, jax.devices()[0].device_kind, folder)

    results: dict[str, Any] = {}
    console = Console(stderr=True)
    columns = (
        TextColumn("epoch"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    done = 0 if state is None else int(state.epoch[0])
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=config.epochs, completed=done)
        _log_to(sys.stdout)  # which is rich's while the bar is drawn: lines go above it

        def report(state: training.TrainingState, metrics: training.Metrics) -> None:
            for name, values in metrics.items():
                results.setdefault(name, []).append(float(values[0]))
            checkpoint.save(folder / CHECKPOINT, config, state)
            log.info(_line(int(state.epoch[0]), config.epochs, results))
            progress.advance(bar)

        training.train(config, [seed], report, state)
    _log_to(sys.stdout)
    results["wall_time"] = time.perf_counter() - start
    results["first_epoch"] = done + 1
    _write_json(folder / "results.json", results)


def _log_to(stream: TextIO) -> None:
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setStream(stream)


def _line(epoch: int, epochs: int, results: Mapping[str, list[float]]) -> str:
    last = {name: values[-1] for name, values in results.items()}
    parts = [f"epoch {epoch}/{epochs}"]
    for split, name in (("train_CL", "train"), ("train_OL", "train OL"), ("valid", "valid")):
        if f"{split}_loss" in last:
            parts.append(f"{name} {last[f'{split}_loss']:.3f}, {last[f'{split}_accuracy']:.1f} %")
    if "test_loss" in last:
        parts.append(f"test {last['test_loss']:.3f}, {last['test_accuracy']:.1f} %")
    if (converged := last["train_CL_converged_share"]) < 1:
        parts.append(f"converged {100 * converged:.1f} %")
    return " | ".join([*parts, f"{last['epoch_seconds']:.1f} s"])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=4))
    part.replace(path)


if __name__ == "__main__":
    command_line.run(main)
