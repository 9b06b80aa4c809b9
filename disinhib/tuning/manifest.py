"""The manifest: what is pinned when a study starts, and compared when it is resumed."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from disinhib import config
from disinhib.checks import flatten, refusal
from disinhib.errors import ConfigError, masked
from disinhib.tuning import lease, provenance, quasi_random, retention, space_tree, suggest, turns
from disinhib.tuning.event_log import INITIAL, REPEAT, Asked, EventLog, Record, follow, replay
from disinhib.tuning.loop import Proposer
from disinhib.tuning.options import Study, check_space, configure, first_points
from disinhib.tuning.resume import FILE, another, completed, free_name
from disinhib.tuning.steering import Adder

# Options that decide what a score is of.
OF_SCORE = ("metric", "epochs", "dataset.name", "dataset.valid_split", "dataset.valid_seed")
MANIFEST = "manifest.json"  # in the study's folder


@dataclass(frozen=True)
class Manifest:
    """What a study starts from, in plain values (JSON)."""

    id: str  # of the study, in every store
    provenance: dict[str, Any]  # code, packages, machine, data of its first trial
    space: dict[str, Any] | None = None  # space_tree.definition; None if nothing is searched
    points: list[dict[str, Any]] = field(default_factory=list)  # initial points
    # Trials of earlier studies, for a warm start.
    past: list[suggest.Tried] = field(default_factory=list)

    def tags(self, command: str) -> dict[str, str]:
        """MLflow tags: the provenance of a study that `command` started, and of its trials."""
        code = self.provenance["code"]
        space = {} if self.space is None else {"space_sha256": space_tree.fingerprint(self.space)}
        commit = {} if code["commit"] is None else {"mlflow.source.git.commit": code["commit"]}
        return {
            "command": masked(command),
            "code_version": code["version"],
            "code_dirty": "unknown" if code["commit"] is None else str(bool(code["diff"])).lower(),
            "data_sha256": self.provenance["data"]["sha256"],
            **space,
            **commit,
        }

    def files(self) -> dict[str, str]:
        """Artifacts of the study and of each of its trials: name -> text."""
        files = {"provenance.json": json.dumps(self.provenance, indent=1)}
        if self.space is not None:
            files["space.json"] = json.dumps(self.space, indent=1)
        return files


def of_search(study: Study) -> Manifest:
    """The manifest of a new search.

    Raises ConfigError if the space, a point or the study to warm-start from does not fit.
    """
    past = [] if study.warm_start is None else _past(study, study.warm_start)
    return Manifest(
        id=uuid.uuid4().hex,
        provenance=_provenance(study),
        space=space_tree.definition(study.search_space),
        points=first_points(study, [trial["point"]["params"] for trial in past]),
        past=past,
    )


def _provenance(study: Study) -> dict[str, Any]:
    first = config.parse(check_space(study)[0]["options"])
    return provenance.collect(first, study.cluster["cpus_per_trial"])


def _past(study: Study, name: str) -> list[suggest.Tried]:
    """The trials of the earlier study `name` that have ended, and those that it learned from.

    Raises ConfigError if there is no such study, if its scores are not comparable with this
    study's, or if none of its trials lies in this study's space.
    """
    folder = study.out_dir / name
    if not (folder / FILE).exists():
        raise refusal("warm_start", name, f"the name of a study in {study.out_dir}")
    try:
        kept = yaml.safe_load((folder / FILE).read_text("utf-8"))["options"]
    except OSError as error:
        allowed = f"a study that you can read ({folder / FILE}: {error.strerror})"
        raise refusal("warm_start", name, allowed) from error
    then, now = flatten(completed(kept)), flatten(study.options)
    if then["repeat_splits"]:
        words = "whose repeats validated on different images"
        raise ConfigError(f"warm_start: {name} is a study {words}: their scores are not comparable")
    for option in OF_SCORE:
        if then.get(option) != now[option]:
            raise ConfigError(
                f"warm_start: {name} had {option}={then.get(option)}, and this study has"
                f" {now[option]}: their scores are not comparable"
            )
    before = read(folder, name)
    same = provenance.decisive(provenance.source_of(study.options))["data"]
    if before.provenance["data"]["sha256"] != same["sha256"]:
        words = "other data (images, labels or split)"
        raise ConfigError(f"warm_start: {name} had {words}: their scores are not comparable")
    lease.refuse_live(folder)
    with closing(EventLog(folder, existing=True)) as log:
        records = replay(log.events()).values()
    space, fixed = study.search_space, study.fixed
    past = [*suggest.within(before.past, space, fixed), *suggest.as_tried(records, space, fixed)]
    if records and not past:
        raise refusal(
            "warm_start", name, f"a study with trials that lie in space={study.space} (it has none)"
        )
    return past


def read(folder: Path, name: str) -> Manifest:
    """The manifest in a study's folder. Raises ConfigError if this version cannot read one."""
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_text("utf-8")))
        for trial in manifest.past:
            if lacking := suggest.Tried.__required_keys__ - trial.keys():
                raise ValueError(f"its earlier trials have no {', '.join(lacking)}")
        return manifest
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"study: {name} in {folder.parent} has no {MANIFEST} that this version can read"
            " (another version made it): start a new study"
        ) from error


def write(folder: Path, manifest: Manifest, kept: Mapping[str, Any], numbered: bool = False) -> str:
    """Makes the study's folder, with its manifest and its options `kept`, whole or not at all.
    Returns its name, which is the next free one if another study has taken it and `numbered`.

    Nobody else can read the options, as an address in them may hold a password.
    """
    first = folder.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as part:
        whole = Path(part, "study")
        retention.folder(whole, manifest.id).mkdir(parents=True)
        texts = {FILE: yaml.safe_dump(dict(kept)), MANIFEST: json.dumps(asdict(manifest))}
        for file, text in texts.items():
            with open(os.open(whole / file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as opened:
                opened.write(text)
                opened.flush()
                os.fsync(opened.fileno())
        EventLog(whole).close()
        while True:
            try:
                whole.rename(folder)
                break
            except OSError as error:  # another study took the name in the meantime
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                if not numbered:
                    allowed = "a new name: it has just been taken"
                    raise refusal("study", folder.name, allowed) from error
                folder = folder.with_name(free_name(None, first, folder.parent))
    parent = os.open(folder.parent, os.O_RDONLY)
    os.fsync(parent)  # the name, too
    os.close(parent)
    return folder.name


def of_resumed(study: Study) -> Manifest:
    """The manifest of the search that is resumed.

    Raises ConfigError with the differences if the search space, the code, the packages or the
    data have changed.
    """
    manifest = read(study.folder, study.name)
    changed = [
        *space_tree.differences(manifest.space or {}, space_tree.definition(study.search_space)),
        *provenance.differences(manifest.provenance, _provenance(study)),
    ]
    if suggest.SAMPLERS[study.searcher["name"]].grid and study.trials > len(manifest.points):
        raise refusal("trials", study.trials, f"at most {len(manifest.points)}, the whole grid")
    if changed:
        raise ConfigError(
            f"resume: {study.name} has changed: {'; '.join(changed)}; undo that"
            + another(study.name, study.options)
        )
    return manifest


def sharing(study: Study, manifest: Manifest) -> turns.Sharing:
    """Among whom the trials of the study are shared."""
    rules = space_tree.rules_of(study.search_space) if study.searcher["balanced"] else []
    first = Counter(point.get(space_tree.RULE) if rules else None for point in manifest.points)
    return turns.Sharing(rules, study.repeats, study.budget, first)


def proposer(study: Study, manifest: Manifest) -> Proposer:
    """The study's proposer: (number, records so far) -> the trial of that number; a point that is
    given takes the place of the initial point of that number."""
    space, among = study.search_space, sharing(study, manifest)
    make = suggest.sampler(study.searcher)
    sampler = suggest.SAMPLERS[study.searcher["name"]]
    sequence = None
    if sampler.sequence:
        sequence = quasi_random.points(space, study.seed, among.rules, among.repeats)
    memory = sampler.memory
    if memory is not None:  # else there would be random trials for ever
        memory = max(memory, 2 * study.searcher["n_startup_trials"])

    def propose(
        number: int, records: Mapping[int, Record], point: Mapping[str, Any] | None = None
    ) -> Asked:
        whose = turns.turn(number, records, among)
        known = suggest.history(records, manifest.past, number, whose, study.batch, memory)
        fixed = point or suggest.fixed_params(whose, manifest.points)
        # Those of a grid are all its points, in random order.
        initial = point is None and not sampler.grid and bool(fixed.keys() - {space_tree.RULE})
        proposal = suggest.suggest(
            space,
            make,
            known,
            suggest.sampler_seed(study.seed, number),
            number,
            fixed if sequence is None else {**sequence(whose), **fixed},
        )
        tags = {REPEAT: str(whose.repeat)} if among.repeats > 1 else {}
        tags |= {INITIAL: "true"} if initial else {}
        trial = configure(study, number, proposal.overrides, whose.repeat)
        return Asked(number, trial, proposal.point, tags)

    return propose


def adder(study: Study, manifest: Manifest) -> Adder:
    """(a point, records so far) -> the trials up to that of `point`, asked for at once: it is the
    next one in which its rule has its turn and no initial point is left. Empty if there is none."""
    propose, among = proposer(study, manifest), sharing(study, manifest)

    def add(point: Mapping[str, Any], records: Mapping[int, Record]) -> list[Asked]:
        ahead = {**records}
        for its in range(len(records), study.all_trials):
            whose = turns.turn(its, ahead, among)
            initial = suggest.fixed_params(whose, manifest.points).keys() - {space_tree.RULE}
            if not initial and whose.rule in (None, point.get(space_tree.RULE)):
                break
            ahead[its] = turns.reserved(its, whose, study.epochs)
        else:
            return []
        asked, trials = {**records}, []
        for number in range(len(records), its + 1):
            trials.append(propose(number, asked, point if number == its else None))
            follow(asked, trials[-1])
        return trials

    return add
