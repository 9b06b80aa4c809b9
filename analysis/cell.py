"""One configuration trained over its seeds, as lanes of one program, in a Ray worker.

Training, evaluation and the check of the dynamics are `disinhib`'s; here they are put in a row,
with a checkpoint now and then. A seed that diverges ends alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from disinhib.tuning.worker import place

COMPLETE, FAILED = "complete", "failed"


class Seed(NamedTuple):
    """What became of one seed."""

    seed: int
    state: str  # complete: it ran its whole budget; failed: it diverged
    reason: str | None  # it failed for
    epochs: list[tuple[float, dict[str, float]]]  # (s since 1970, metrics) of each that counts
    flag: str  # why the dynamics do not bear out its steady states; "" if they do
    model: bytes | None  # disinhib.export; of one that is complete


class Outcome(NamedTuple):
    seeds: list[Seed]
    place: dict[str, str]  # host and device


def train(
    options: Mapping[str, Any], seeds: Sequence[int], file: str, every_seconds: float
) -> Outcome:
    """Trains `options` (resolved training options) over `seeds` to the whole budget, evaluates the
    test set after the last epoch, and checks the dynamics. State and results are kept in `file`,
    from which it goes on if it is there; beside it stands how many epochs are done.

    Raises what training raises, but for divergence.
    """
    from disinhib import checkpoint, compilation_cache, config, training

    compilation_cache.share()

    run = config.parse({**options, "test_at_end": True})
    data = training.prepare(run)
    kept = Path(file)
    if kept.exists():
        state, results = checkpoint.load(kept, run)
    else:
        state, results = training.initial_state(run, seeds), []
    saved = time.monotonic()
    while len(results) < run.epochs and len(_broken(results)) < len(seeds):
        state, metrics = training.advance(run, data, state)
        results.append(
            {
                "time": time.time(),
                "metrics": {name: values.tolist() for name, values in metrics.items()},
                "diverged": {
                    str(lane): why
                    for lane, why in training.divergences(run, metrics, state).items()
                },
            }
        )
        if time.monotonic() - saved >= every_seconds or len(results) == run.epochs:
            checkpoint.save(kept, run, state, results)
            saved = time.monotonic()
        _progress(kept).write_text(str(len(results)))
    return Outcome(
        [_end(run, data, options, state, results, lane) for lane in range(len(seeds))], place()
    )


def _progress(file: Path) -> Path:
    return file.with_suffix(".epochs")


def epochs_done(file: Path) -> int:
    """How far the configuration of `file` is, as its worker last said."""
    told = _progress(file)
    return int((told.read_text() if told.exists() else "") or 0)


def checkpoint_file(folder: Path, key: str, code: str) -> Path:
    """Where a configuration's state is kept; not for other code, which would go on otherwise."""
    return folder / f"{key[:16]}-{code[:8]}.msgpack"


def forget(folder: Path, key: str) -> None:
    """Removes all that was kept of a configuration, also for other code."""
    for left in folder.glob(f"{key[:16]}-*"):
        left.unlink(missing_ok=True)


def _broken(results: Sequence[Mapping[str, Any]]) -> dict[int, tuple[int, str]]:
    """Lanes that have diverged: in which epoch, and why, when they first did."""
    found: dict[int, tuple[int, str]] = {}
    for epoch, result in enumerate(results, start=1):
        for lane, why in result["diverged"].items():
            found.setdefault(int(lane), (epoch, why))
    return found


def _end(run, data, options, state, results, lane: int) -> Seed:
    import jax

    from disinhib import export

    seed = int(state.seed[lane])
    diverged, why = _broken(results).get(lane, (math.inf, ""))
    epochs = [
        (result["time"], {name: values[lane] for name, values in result["metrics"].items()})
        for epoch, result in enumerate(results, start=1)
        if epoch < diverged
    ]
    if why:
        return Seed(seed, FAILED, f"Diverged: {why}", epochs, "", None)
    parameters = jax.tree.map(lambda leaf: leaf[lane], state.parameters)
    checked, flag = _dynamics(run, data, parameters)
    epochs[-1][1].update(checked)
    content = export.dump({**options, "seed": seed}, parameters)
    return Seed(seed, COMPLETE, None, epochs, flag, content)


def _dynamics(run, data, parameters) -> tuple[dict[str, float], str]:
    """(metrics, flag) of the check that the ODE reaches what Newton found (DESIGN section 3), on
    the first validation images, as many as a batch has."""
    from disinhib.losses import soft_targets
    from disinhib.solvers import stability

    size = run.architecture.batch_size
    x = data.validation.images[:size].astype(float) * data.scale
    labels = data.validation.labels[:size]
    target = soft_targets(labels, run.architecture.sizes[-1], run.hyperparameters.soft_target)
    found = stability.probe(run, parameters, x, target)
    if found is None:
        return {}, ""
    metrics = {"ode_gap": found.gap, "ode_reached": found.reached, "ode_growth": found.growth}
    if stability.settles(found):
        return metrics, ""
    reasons = []
    if found.reached < 1:
        reasons.append(
            f"the ODE reaches Newton's steady state in {100 * found.reached:.0f} % of {len(x)}"
            f" samples only (gap {found.gap:.2g})"
        )
    if not found.growth < 0:
        reasons.append(f"the steady state is unstable (eigenvalue {found.growth:+.2g} /s)")
    return metrics, "; ".join(reasons)
