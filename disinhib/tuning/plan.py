"""What a study would do, how long it takes and what it needs: `python tune_main.py plan=true`.

No trial runs and nothing is written. One epoch of every structure is timed, in workers like those
of trials; the rest follows from these numbers and from the study's own early stopping, which is
asked about made-up trials.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np
import optuna
import ray
from ray.exceptions import RayError
from rich.console import Console

from disinhib import config
from disinhib.checks import flatten
from disinhib.tuning import manifest as origins, progress, ray_backend, space_tree, worker
from disinhib.tuning.early_stopping import Stopping
from disinhib.tuning.options import Study, check_space, configure
from disinhib.tuning.suggest import SAMPLERS, Search
from disinhib.tuning.worker import TrialConfig

# Between two trials of a worker; `python -m benchmarks.trial_overhead` measured it.
TRIAL_SECONDS = 0.12
# Epochs of made-up trials: enough for a mean of SEEDS studies that are small; a large study
# varies less, and asking about each of its epochs takes a while.
SEEDS, EPOCHS_ASKED = 5, 50_000


PUBLISHED, GIVEN, SAMPLED = "published default", "given point", "sampled"


class Preview(NamedTuple):
    """A trial that the study would run."""

    trial: TrialConfig
    kind: str  # PUBLISHED, GIVEN or SAMPLED


class Structure(NamedTuple):
    """What is compiled by itself; the trials of a rule may have several."""

    name: str
    trial: TrialConfig  # one that has it


class Cost(NamedTuple):
    """Of a structure, measured in a worker that did nothing else."""

    first_epoch: float  # s, with what had to be traced, compiled or loaded
    epoch: float  # s
    tracing: float  # s of the first epoch that no later study is spared
    memory_mb: float  # the most that the worker held
    checkpoint_mb: float
    ready_at: float  # s since the epoch (1970): code and data were there


class Estimate(NamedTuple):
    epochs: float  # of all trials
    seconds: float


def previews(study: Study, search: Search, points: Sequence[Mapping[str, Any]]) -> list[Preview]:
    """The first trial of each rule and kind, given are those of `points`.

    Looks as far as ten trials a rule beyond `points`, and not beyond those of the study.
    """
    rules = max(1, len(space_tree.rules_of(search.space)))
    shown: dict[tuple[str, str], Preview] = {}
    for number in range(min(study.trials, (len(points) + 10) * rules)):
        proposal = search.propose(number)
        made = configure(study, number, proposal.overrides)
        kind = GIVEN if proposal.point["params"] in points else SAMPLED
        kind = PUBLISHED if _is_published(study, made) else kind
        shown.setdefault((made["rule"], kind), Preview(made, kind))
        if sum(kind == SAMPLED for _, kind in shown) == rules:
            break
    return list(shown.values())


def _is_published(study: Study, made: TrialConfig) -> bool:
    groups = {name: value for name, value in made["searched"].items() if isinstance(value, str)}
    return configure(study, made["number"], groups)["options"] == made["options"]


def structures(study: Study, branches: Sequence[TrialConfig]) -> list[Structure]:
    """The distinct structures of the space, with the published default of every number that does
    not decide them; those that take longest to compile and run come first."""
    found = {config.parse(branch["options"]).architecture: branch for branch in branches}
    by_cost = sorted(found, key=lambda made: (made.circuit != "dale", -sum(made.sizes)))
    described = {made: flatten(asdict(made)) for made in found}
    named = []
    for made in by_cost:
        rule = found[made]["rule"]
        family = [described[other] for other in found if found[other]["rule"] == rule]
        own = [
            f"{name}={value}"
            for name, value in described[made].items()
            if any(other.get(name) != value for other in family)
        ]
        named.append(Structure(" ".join([rule, *own]), _at_defaults(study, found[made])))
    return named


def _at_defaults(study: Study, branch: TrialConfig) -> TrialConfig:
    """`branch` without the numbers that its space chose, unless they decide its structure."""
    chosen = {n: value for n, value in branch["searched"].items() if not isinstance(value, float)}
    bare = configure(study, branch["number"], chosen)
    made, wanted = (config.parse(one["options"]).architecture for one in (bare, branch))
    return bare if made == wanted else branch


def simulate(
    study: Study,
    costs: Mapping[str, Sequence[Cost]],
    at_once: int,
    stops: Callable[[Mapping[str, Any], int, float], bool],
    seed: int,
) -> Estimate:
    """A study of made-up trials, `at_once` at a time. Rules, the keys of `costs`, take turns, and a
    trial has one of its rule's structures at random; trials of a rule without any fail at once.

    A trial's score approaches a random quality and takes 1/16 to 1/4 of the budget for half of
    the way. `stops(trial, epoch, score)` decides who ends early.
    """
    draw = np.random.default_rng(seed)
    quality = draw.uniform(size=study.trials) * {"max": 1, "min": -1}[study.mode]
    half_way = study.epochs * 2.0 ** draw.uniform(-4, -2, study.trials)
    rules, batch = list(costs), study.batch or study.trials
    rule_of = lambda number: rules[number % len(rules)]
    waiting = deque(number for number in range(study.trials) if costs[rule_of(number)])
    free, running = list(range(at_once)), []
    known: set[tuple[int, Cost]] = set()  # structures that a worker has traced
    clock, epochs, begun = 0.0, 0, 0
    while waiting or running:
        while waiting and free and (not running or waiting[0] // batch == begun):
            number, worker = waiting.popleft(), free.pop()
            begun = number // batch
            own = costs[rule_of(number)]
            cost = own[int(draw.integers(len(own)))]
            start = TRIAL_SECONDS + (0 if (worker, cost) in known else cost.tracing)
            known.add((worker, cost))
            heappush(running, (clock + start + cost.epoch, number, 1, worker, cost))
        clock, number, epoch, worker, cost = heappop(running)
        epochs += 1
        score = quality[number] * (1 - 2 ** (-epoch / half_way[number]))
        stopped = stops({"number": number, "rule": rule_of(number)}, epoch, float(score))
        if stopped or epoch == study.epochs:
            free.append(worker)
        else:
            heappush(running, (clock + cost.epoch, number, epoch + 1, worker, cost))
    return Estimate(epochs, clock)


def without_stopping(study: Study, costs: Mapping[str, Sequence[Cost]], at_once: int) -> Estimate:
    return simulate(study, costs, at_once, lambda *_: False, 0)


def with_stopping(study: Study, costs: Mapping[str, Sequence[Cost]], at_once: int) -> Estimate:
    """The mean over some studies, each with early stopping of its own."""
    seeds = max(1, min(SEEDS, EPOCHS_ASKED // (study.trials * study.epochs)))
    stopping = lambda: Stopping(study.scheduler, study.epochs, study.mode, study.batch)
    each = [simulate(study, costs, at_once, stopping().stops, seed) for seed in range(seeds)]
    return Estimate(*(statistics.mean(values) for values in zip(*each, strict=True)))


def disk_mb(costs: Mapping[str, Sequence[Cost]], at_once: int, keep_best: int) -> float:
    """The most that checkpoints take: of the trials that run, and of the best of each rule."""
    largest = [max(cost.checkpoint_mb for cost in own) for own in costs.values() if own]
    return at_once * max(largest, default=0.0) + keep_best * sum(largest)


def measure(
    found: Sequence[Structure], resources: Mapping[str, float], at_once: int
) -> Iterator[tuple[Structure, Cost | str]]:
    """What each structure costs, or why it failed, in the order in which they are done; each has
    a worker of its own, `at_once` at a time. Ray must be running."""
    worker = _worker(resources)
    waiting, running = deque(found), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            structure = waiting.popleft()
            actor = worker.remote(structure.trial)
            running[actor.measure.remote()] = structure, actor
        (done,), _ = ray.wait(list(running))
        structure, actor = running.pop(done)
        try:
            yield structure, Cost(**ray.get(done))
        except RayError as error:
            yield structure, ray_backend.reason(error)
        ray.kill(actor)


def _worker(resources: Mapping[str, float]) -> Any:
    # A class within a function is sent whole: a worker need not import this module, and so holds
    # what a trial's worker holds and no more.
    class Measuring(worker.TrainingTrial):
        def __init__(self, given: TrialConfig):
            # Tune's own would make a folder in ~/ray_results.
            nowhere = worker.Checkpoints(
                folder="/nonexistent", every_seconds=math.inf, at_end=False, cap_bytes=0
            )
            self.setup({**given, "checkpoints": nowhere})

        def measure(self) -> dict[str, float]:
            import tempfile
            from pathlib import Path

            from disinhib import checkpoint, config, training

            training.prepare(config.parse(self._trial["options"]))
            ready_at, before = time.time(), len(self._compilations)
            start = time.perf_counter()
            self.step()
            middle, compiled = time.perf_counter(), sum(self._compilations[before:])
            result = self.step()
            first_epoch, epoch = middle - start, time.perf_counter() - middle
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "checkpoint")
                checkpoint.save(file, self._run, self._state, self._results)
                checkpoint_mb = file.stat().st_size / 1e6
            return {
                "first_epoch": first_epoch,
                "epoch": epoch,
                "tracing": max(0.0, first_epoch - epoch - compiled),
                "memory_mb": result[worker.METRICS]["peak_memory_mb"],
                "checkpoint_mb": checkpoint_mb,
                "ready_at": ready_at,
            }

    share = ray.remote(
        num_cpus=resources["cpu"], num_gpus=resources["gpu"], scheduling_strategy="SPREAD"
    )
    return share(Measuring)


def run(study: Study, console: Console) -> None:
    """Prints the plan of `study`.

    Raises ConfigError and data.DataError where the study itself would before it opens its stores.
    """
    started = time.time()
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def say(*lines: str) -> None:
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False, markup=False)

    origin = origins.go_on(study) if study.resume else origins.begin(study)
    branches = check_space(study)
    found = structures(study, branches)
    # Of a grid, all points are given.
    given = [] if SAMPLERS[study.searcher["name"]].grid else origin["points"]
    shown = previews(study, origins.searcher(study, origin), given)
    with ray_backend.cluster(study.cluster):
        resources = {
            "cpu": study.cluster["cpus_per_trial"],
            "gpu": study.cluster["gpus_per_trial"],
        }
        fitting = ray_backend.trials_at_once(resources)
        at_once = min(fitting, study.cluster["max_concurrent"] or fitting)
        total = ray.cluster_resources()
        whole = "; for all of its trials, also those that ended" if study.resume else ""
        say(f"plan of study {study.name}: runs no trial and writes nothing{whole}\n")
        say(*_preview_lines(shown, len(branches)), "")
        wide = max(len(structure.name) for structure in found)
        say(f"{'structure':<{wide}}  first epoch s  epoch s  memory MB  checkpoint MB")
        costs: dict[str, list[Cost]] = {structure.trial["rule"]: [] for structure in found}
        ready_at = math.inf
        for structure, cost in measure(found, resources, at_once):
            say(_structure_line(structure, cost, wide))
            if isinstance(cost, Cost):
                costs[structure.trial["rule"]].append(cost)
                ready_at = min(ready_at, cost.ready_at)
    if not any(costs.values()):
        say("no structure ran: there is nothing to estimate from")
        return
    say(*_time_lines(study, costs, at_once, ready_at - started), "")
    say(*_need_lines(study, costs, at_once, fitting, total))


def _preview_lines(shown: Sequence[Preview], branches: int) -> list[str]:
    lines = []
    for made, kind in shown:
        words = [f"{name}={_written(value)}" for name, value in made["searched"].items()]
        lines.append(f"trial {made['number']}, {kind}: {' '.join(words)}")
    return [
        *lines,
        f"each was composed and checked, as were {branches} that make every choice of the space",
    ]


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _structure_line(structure: Structure, cost: Cost | str, wide: int) -> str:
    if isinstance(cost, str):
        return f"{structure.name:<{wide}}  failed: {cost}"
    return (
        f"{structure.name:<{wide}}  {cost.first_epoch:13.2f}  {cost.epoch:7.3f}"
        f"  {cost.memory_mb:9.0f}  {cost.checkpoint_mb:13.2f}"
    )


def _time_lines(
    study: Study, costs: Mapping[str, Sequence[Cost]], at_once: int, startup: float
) -> list[str]:
    estimates = {
        "without early stopping": without_stopping(study, costs, at_once),
        f"with scheduler={study.scheduler['name']}": with_stopping(study, costs, at_once),
    }
    failing = [rule for rule, own in costs.items() if not own]
    return [
        "first epoch: compiled, or loaded if it was; the study only loads what this plan compiled",
        "",
        *(
            f"{name}: {_hours(startup + estimate.seconds)}, {estimate.epochs:.0f} epochs"
            for name, estimate in estimates.items()
        ),
        f"assumed: {at_once} trials at a time, rules in turn, a rule's structures equally often,"
        " qualities uniformly random and no better later in the study, half of a quality learnt in"
        f" 1/16 to 1/4 of the budget, {TRIAL_SECONDS} s between trials, {startup:.1f} s to start",
        *([f"not counted, as none of their structures ran: {', '.join(failing)}"] * bool(failing)),
    ]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h ({progress.clock(seconds)})"


def _need_lines(
    study: Study,
    costs: Mapping[str, Sequence[Cost]],
    at_once: int,
    fitting: int,
    total: Mapping[str, float],
) -> list[str]:
    memory = max(cost.memory_mb for own in costs.values() for cost in own)
    keep, cap = study.checkpoints["keep_best"], study.checkpoints["cap_gb"]
    disk = disk_mb(costs, at_once, keep)
    of_what = "GPU memory" if study.cluster["gpus_per_trial"] else "memory"
    most = study.cluster["max_concurrent"]
    return [
        f"{of_what}: {memory:.0f} MB a trial, {memory * at_once / 1e3:.1f} GB in all",
        f"disk: at most {disk:.1f} MB of checkpoints ({at_once} that run, {keep} kept for each"
        f" rule; written and weighed), {'over' if disk > cap * 1e3 else 'under'}"
        f" checkpoints.cap_gb={cap:g}",
        f"cluster: {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs; {fitting} trials fit"
        f" at once, cluster.max_concurrent={'null' if most is None else most}",
    ]
