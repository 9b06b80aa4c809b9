"""The plan of a study (`python tune_main.py plan=true`): its trials, duration and needs.

Runs no trial and writes nothing. It times an epoch of every structure, in workers like those of
trials, and simulates the study with these numbers, made-up scores and the study's early stopping.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import ray
from rich.console import Console

from disinhib import config
from disinhib.checks import flatten, in_hydra
from disinhib.hyperparameters import Architecture
from disinhib.tuning import cluster, engine, manifest, progress, provenance, retention
from disinhib.tuning.engine import Job
from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    LANES,
    PRUNED,
    Asked,
    EpochDone,
    EventLog,
    Record,
    TrialConfig,
)
from disinhib.tuning.loop import Proposer, Stops, from_list, never
from disinhib.tuning.manifest import Manifest
from disinhib.tuning.options import Study, check_space, configure
from disinhib.tuning.suggest import SAMPLERS
from disinhib.tuning.turns import TRIALS, Sharing, reserved, turn
from disinhib.tuning.worker import GPU_MB

# Between two trials of a worker; `python -m benchmarks.trial_overhead` measured it.
TRIAL_SECONDS = 0.12
# Simulated studies, and epochs in all: a small study is simulated SEEDS times; a large one varies
# less and takes longer to simulate.
SEEDS, EPOCHS_ASKED = 5, 50_000
TIMED = 2  # epochs of each structure: the first, which compiles, and one that does not

PUBLISHED, GIVEN, SAMPLED = "published default", "given point", "sampled"


class Preview(NamedTuple):
    """A trial that the study would run."""

    trial: TrialConfig
    kind: str  # PUBLISHED, GIVEN or SAMPLED


class Structure(NamedTuple):
    """A structure: its trials, of one or more rules, share one compiled program. A rule may have
    several structures."""

    name: str
    rules: Sequence[str]
    trial: TrialConfig  # one of its trials


class Cost(NamedTuple):
    """The cost of a structure, measured in a worker that did nothing else."""

    first_epoch: float  # s, with tracing and with compiling or loading
    epoch: float  # s
    tracing: float  # s of the first epoch, in every worker again
    memory_mb: float  # the worker's peak
    checkpoint_mb: float
    ready_at: float  # s since 1970: code and data were loaded
    gpu_mb: float = math.nan  # what the worker may take of its GPU's memory, if it has one
    lanes: int = 1  # that were trained at once


Costs = Mapping[str, Sequence[Cost]]  # of the structures of each rule that could be timed


class Estimate(NamedTuple):
    epochs: float  # of all trials
    seconds: float


def previews(
    study: Study, propose: Proposer, points: Sequence[Mapping[str, Any]], rules: int
) -> list[Preview]:
    """The first trial of each kind for each of `rules` rules; GIVEN are those of `points`.

    Proposes at most ten trials a rule and repeat beyond `points`, and no more than the study has.
    """
    shown: dict[tuple[str, str], Preview] = {}
    records: dict[int, Record] = {}
    for number in range(min(study.all_trials, (len(points) + 10) * rules * study.repeats)):
        asked = propose(number, records)
        record = records[number] = Record(asked.config, asked.point, tags=asked.tags)
        searched = asked.config["searched"]
        groups = {name: value for name, value in searched.items() if isinstance(value, str)}
        kind = GIVEN if asked.point["params"] in points else SAMPLED
        if configure(study, number, groups, record.repeat)["options"] == asked.config["options"]:
            kind = PUBLISHED
        shown.setdefault((asked.config["rule"], kind), Preview(asked.config, kind))
        if sum(kind == SAMPLED for _, kind in shown) == rules:
            break
    return list(shown.values())


def structures(study: Study, branches: Sequence[TrialConfig]) -> list[Structure]:
    """The structures of the space, with the published default of every number that does not
    affect the structure; those that take longest to compile and run come first."""
    by_structure: dict[Architecture, list[TrialConfig]] = {}
    for branch in branches:
        by_structure.setdefault(config.parse(branch["options"]).architecture, []).append(branch)
    described = {each: flatten(asdict(each)) for each in by_structure}
    named = []
    for each in sorted(by_structure, key=lambda one: (one.circuit != "dale", -sum(one.sizes))):
        branch = by_structure[each][-1]
        rules = list(dict.fromkeys(one["rule"] for one in by_structure[each]))
        key = (each.family, each.circuit)
        family = [described[one] for one in by_structure if (one.family, one.circuit) == key]
        own = [
            f"{name}={value}"
            for name, value in described[each].items()
            if any(other.get(name) != value for other in family)
        ]
        choices = {n: v for n, v in branch["searched"].items() if not isinstance(v, float)}
        bare = configure(study, branch["number"], choices)
        unaffected = config.parse(bare["options"]).architecture == each
        name = " ".join([", ".join(rules), *own])
        named.append(Structure(name, rules, bare if unaffected else branch))
    return named


def simulate(study: Study, costs: Costs, at_once: int, stops: Stops, seed: int) -> Estimate:
    """Simulates a study, `at_once` trials at a time. Rules, the keys of `costs`, share the trials
    as the study's `budget` says, and a trial has a random structure of its rule; trials of a rule
    without structures fail at once.

    A trial's score approaches a random quality and takes 1/16 to 1/4 of the budget to get half
    way. `stops(records, trial)` decides which trials end early.
    """
    draw, trials = np.random.default_rng(seed), study.all_trials
    quality = draw.uniform(size=trials)
    half_way = study.epochs * 2.0 ** draw.uniform(-4, -2, trials)
    among, batch = Sharing(list(costs), study.repeats, study.budget), study.batch or trials
    records: dict[int, Record] = {}
    free, running = list(range(at_once)), []
    known: set[tuple[int, Cost]] = set()  # structures that a worker has traced already
    clock, begun = 0.0, 0
    while True:
        while len(records) < trials and free and (not running or len(records) // batch == begun):
            number = len(records)
            records[number] = reserved(number, turn(number, records, among), study.epochs)
            own = costs[records[number].rule]
            if not own:
                records[number].state = FAILED
                continue
            begun, worker = number // batch, free.pop()
            cost = own[int(draw.integers(len(own)))]
            start = TRIAL_SECONDS + (0 if (worker, cost) in known else cost.tracing)
            known.add((worker, cost))
            heappush(running, (clock + start + cost.epoch, number, worker, cost))
        if not running:  # the last ones failed at once
            break
        clock, number, worker, cost = heappop(running)
        record = records[number]
        score = quality[number] * (1 - 2 ** (-(record.epochs + 1) / half_way[number]))
        record.scores.append(float(score))
        record.seconds.append(cost.epoch)
        if stops(records, record) or record.epochs == study.epochs:
            record.state = PRUNED if record.epochs < study.epochs else COMPLETE
            free.append(worker)
        else:
            heappush(running, (clock + cost.epoch, number, worker, cost))
    return Estimate(sum(record.epochs for record in records.values()), clock)


def without_stopping(study: Study, costs: Costs, at_once: int) -> Estimate:
    return simulate(study, costs, at_once, never, 0)


def with_stopping(study: Study, costs: Costs, at_once: int) -> Estimate:
    """The mean over several simulated studies, with the study's early stopping."""
    seeds = max(1, min(SEEDS, EPOCHS_ASKED // (study.all_trials * study.epochs)))
    each = [simulate(study, costs, at_once, study.stops, seed) for seed in range(seeds)]
    return Estimate(*np.mean(each, axis=0).tolist())


def disk_mb(costs: Costs, at_once: int, keep_best: int) -> float:
    """Peak size of the checkpoints: of running trials, and of the best of each rule."""
    largest = [max(cost.checkpoint_mb for cost in own) for own in costs.values() if own]
    return at_once * max(largest, default=0.0) + keep_best * sum(largest)


def measure(
    study: Study, manifest: Manifest, structures: Sequence[Structure]
) -> dict[str, Cost | str]:
    """The cost of each structure by its name, or why it failed. Two epochs of each are trained as a
    study, in a temporary folder."""
    trials = [
        Asked(number, TrialConfig(**{**structure.trial, "number": number, "epochs": TIMED}))
        for number, structure in enumerate(structures)
    ]
    existing = next(path for path in (study.out_dir, *study.out_dir.parents) if path.exists())
    with tempfile.TemporaryDirectory(dir=existing, prefix=".plan.") as folder:
        job = Job(
            name="plan",
            out_dir=Path(folder),
            resume=False,
            manifest=replace(manifest, past=[]),
            data=[provenance.source_of(study.options)],
            kept={"options": {}},
            command="",
            objective=study.objective,
            source=from_list(trials),
            trials=lambda records: len(trials),
            cluster=study.cluster,
            checkpoints={"every_seconds": math.inf, "cap_gb": math.inf},
            tracking=None,
            keep_best=len(trials),
            decisions=lambda trial: [1],  # its epochs are reported one by one
        )
        finished = engine.run(job, Console(quiet=True))
        if not finished.whole:
            raise KeyboardInterrupt
        reports: dict[int, list[tuple[float, dict[str, float]]]] = {}  # when, metrics
        places: dict[int, dict[str, str]] = {}
        with closing(EventLog(job.folder)) as log:
            for _, when, event in log.events():
                if isinstance(event, EpochDone):
                    metrics = {name: values[0] for name, values in event.metrics.items()}
                    reports.setdefault(event.trial, []).append((when, metrics))
                    places[event.trial] = event.place
        costs: dict[str, Cost | str] = {}
        for structure, record in zip(structures, finished.records, strict=True):
            if record.epochs < TIMED:
                costs[structure.name] = record.reason or record.state
                continue
            (ended, first), (_, last) = reports[record.number]
            seconds, compiled = first["epoch_seconds"], first["compilation_seconds"]
            file = retention.checkpoint_file(job.checkpoint_folder, record.number)
            costs[structure.name] = Cost(
                first_epoch=seconds,
                epoch=last["epoch_seconds"],
                tracing=max(0.0, seconds - last["epoch_seconds"] - compiled),
                memory_mb=last["peak_memory_mb"],
                checkpoint_mb=file.stat().st_size / 1e6 if file.exists() else 0.0,
                ready_at=ended - seconds,
                gpu_mb=float(places[record.number].get(GPU_MB, "nan")),
                lanes=int(places[record.number].get(LANES, "1")),
            )
    return costs


def run(study: Study, console: Console) -> None:
    """Prints the plan of `study`.

    Raises ConfigError and data.DataError as the study would before it opens its stores.
    """
    started = time.time()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    say = partial(console.print, sep="\n", soft_wrap=True, highlight=False, markup=False)
    begun = manifest.of_resumed(study) if study.resume else manifest.of_search(study)
    branches = check_space(study)
    distinct = structures(study, branches)
    points = [] if SAMPLERS[study.searcher["name"]].grid else begun.points  # a grid is all points
    rules = len({branch["rule"] for branch in branches})
    shown = previews(study, manifest.proposer(study, begun), points, rules)
    whole = "; counts all trials, also those that have ended" if study.resume else ""
    say(f"plan of study {study.name}: runs no trial and writes nothing{whole}\n")
    for trial, kind in shown:
        words = [f"{name}={in_hydra(value)}" for name, value in trial["searched"].items()]
        say(f"trial {trial['number']}, {kind}: {' '.join(words)}")
    say(f"each was composed and checked, and so were {len(branches)} that cover all choices\n")
    with cluster.cluster(study.cluster):
        fitting = cluster.trials_at_once(study.resources)
        total = ray.cluster_resources()
        measured = measure(study, begun, distinct)
    most, seeds = study.cluster["max_concurrent"], study.replicates
    lanes = cluster.lanes(study.cluster, seeds)
    wide = max(len(structure.name) for structure in distinct)
    say(f"{'structure':<{wide}}  first epoch s  epoch s  memory MB  checkpoint MB")
    costs: dict[str, list[Cost]] = {rule: [] for one in distinct for rule in one.rules}
    for name, rules, _ in distinct:
        cost = measured[name]
        if isinstance(cost, str):
            say(f"{name:<{wide}}  failed: {cost}")
            continue
        for rule in rules:
            costs[rule].append(cost)
        say(
            f"{name:<{wide}}  {cost.first_epoch:13.2f}  {cost.epoch:7.3f}"
            f"  {cost.memory_mb:9.0f}  {cost.checkpoint_mb:13.2f}"
        )
    if not any(costs.values()):
        say("no structure could be timed: there is no estimate")
        return
    say("first epoch: with compiling, or loading if cached; the study will only load\n")
    # An epoch of many lanes takes a GPU as long as was measured; on a CPU they take turns.
    beside = min(cost.lanes for own in costs.values() for cost in own)
    at_once = fitting * max(1, beside // seeds) if study.cluster["gpus_per_trial"] else fitting
    fit = fitting * max(1, lanes // seeds)
    running = min(fit, most or fit)
    say(*_estimates(study, costs, min(at_once, running), running, started))
    turns = "" if study.cluster["gpus_per_trial"] else ", which take turns on a CPU"
    say(
        f"cluster: {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs;"
        f" {fit} trials fit at once"
        + (f" ({lanes} lanes of {fitting} servers{turns})" if lanes > 1 else "")
        + f", cluster.max_concurrent={in_hydra(most)}"
    )


def _estimates(study: Study, costs: Costs, at_once: int, running: int, started: float) -> list[str]:
    """Duration, memory and disk, in lines, of a study that trains as if `at_once` trials had a
    device each, of those `running`."""
    timed = [cost for own in costs.values() for cost in own]
    equal = f"next the rule that has spent fewest {study.budget}"
    shared = "rules in turn" if study.budget == TRIALS else equal
    startup = min(cost.ready_at for cost in timed) - started
    lines = []
    for name, estimate in (
        ("without early stopping", without_stopping(study, costs, at_once)),
        (f"with scheduler={study.scheduler['name']}", with_stopping(study, costs, at_once)),
    ):
        seconds = startup + estimate.seconds
        hours = f"{seconds / 3600:.2f} h ({progress.clock(seconds)})"
        rate = f"{3600 * study.all_trials / estimate.seconds:.0f} trials an hour"
        lines.append(f"{name}: {hours}, {estimate.epochs:.0f} epochs, {rate}")
    lines.append(
        f"assumed: {at_once} trials at a time, {shared}, a rule's structures equally often,"
        " random final scores that do not improve during the study, half of a score reached in"
        f" 1/16 to 1/4 of the budget, {TRIAL_SECONDS} s between trials, {startup:.1f} s to start"
    )
    if failing := ", ".join(rule for rule, own in costs.items() if not own):
        lines.append(f"not counted, because none of their structures could be timed: {failing}")
    keep, cap = study.checkpoints["keep_best"], study.checkpoints["cap_gb"]
    disk = disk_mb(costs, running, keep)
    return [
        *lines,
        _memory(timed, at_once, study.cluster["gpus_per_trial"]),
        f"disk: at most {disk:.1f} MB of checkpoints ({running} running, {keep} kept for each"
        f" rule; measured), {'over' if disk > cap * 1e3 else 'under'} checkpoints.cap_gb={cap:g}",
    ]


def _memory(timed: Sequence[Cost], at_once: int, gpus: float) -> str:
    """What trials need, and how many of them the memory of a GPU has room for."""
    memory = max(cost.memory_mb for cost in timed)
    if not gpus:
        return f"\nmemory: {memory:.0f} MB a trial, {memory * at_once / 1e3:.1f} GB in all"
    lanes = max(cost.lanes for cost in timed)
    one = "trial" if lanes == 1 else f"server of {lanes} lanes"
    needs = f"\nGPU memory: {memory:.0f} MB a {one}"
    may_take = min(cost.gpu_mb for cost in timed)
    if math.isnan(may_take) or lanes > 1:  # jax does not tell; more lanes do better than servers
        return needs
    share = min(1.0, math.ceil(1e3 * memory * gpus / may_take) / 1e3)
    return (
        f"{needs}, which cluster.gpus_per_trial={in_hydra(gpus)} lets take {may_take:.0f} MB;"
        f" of one GPU {int(1 / share + 1e-9)} trials fit"
        f" (cluster.gpus_per_trial={in_hydra(share)})"
    )
