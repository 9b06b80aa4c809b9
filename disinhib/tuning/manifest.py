"""What a study starts from: made once, kept in its folder, and compared when it goes on."""

from __future__ import annotations

import errno
import json
import os
import shlex
import tempfile
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from disinhib import config
from disinhib.checks import flatten, refusal
from disinhib.errors import ConfigError
from disinhib.tuning import provenance, retention, space_tree, suggest
from disinhib.tuning.event_log import Journal
from disinhib.tuning.options import FILE, Study, check_space, first_points, kept
from search_spaces import SPACES

ORIGIN = "origin.json"  # in the study's folder


def begin(study: Study) -> dict[str, Any]:
    """What a new study starts from and what its trials will be compared with, in plain values.

    Raises ConfigError if the space, a point or the study to learn from does not fit.
    """
    space = SPACES[study.space]
    past = [] if study.warm_start is None else _past(study, study.warm_start)
    return {
        "id": uuid.uuid4().hex,
        "provenance": _provenance(study),
        "space": space_tree.definition(space),
        "points": first_points(study, [trial["point"]["params"] for trial in past]),
        "past": past,
    }


def _provenance(study: Study) -> dict[str, Any]:
    first = config.parse(check_space(study)[0]["options"])
    return provenance.collect(first, study.cluster["cpus_per_trial"])


def _past(study: Study, name: str) -> list[suggest.Finished]:
    """The finished trials of the earlier study `name`, and those that it had learnt from itself.

    Raises ConfigError if there is none, or if its scores are not to be compared with this study's.
    """
    folder = study.out_dir / name
    if not (folder / FILE).exists():
        raise refusal("warm_start", name, f"the name of a study in {study.out_dir}")
    then = flatten(yaml.safe_load((folder / FILE).read_text())["options"])
    now = flatten(study.options)
    for option in ("metric", "epochs", "dataset.name", "dataset.valid_split"):
        if then[option] != now[option]:
            raise ConfigError(
                f"warm_start: {name} had {option}={then[option]}, and this study has"
                f" {now[option]}: their scores are not to be compared"
            )
    space = SPACES[study.space]
    earlier = json.loads((folder / ORIGIN).read_text())["past"]
    with closing(Journal(folder)) as journal:
        return [*suggest.within(earlier, space), *suggest.finished(journal.events(), space)]


def write(study: Study, origin: dict[str, Any]) -> None:
    """Makes the study's folder, whole or not at all."""
    study.out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=study.out_dir, prefix=f".{study.name}.") as part:
        made = Path(part, "study")
        retention.folder(made, origin["id"]).mkdir(parents=True)
        for file, text in ((FILE, yaml.safe_dump(kept(study))), (ORIGIN, json.dumps(origin))):
            with (made / file).open("w") as opened:
                opened.write(text)
                opened.flush()
                os.fsync(opened.fileno())
        Journal(made).close()
        try:
            made.rename(study.folder)
        except OSError as error:  # another study has taken the name meanwhile
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise refusal("study", study.name, "a new name: it has just been taken") from error
    folder = os.open(study.out_dir, os.O_RDONLY)
    os.fsync(folder)  # the name, too
    os.close(folder)


def go_on(study: Study) -> dict[str, Any]:
    """What `begin` gave when the study was new.

    Raises ConfigError with the differences if the search space, the code, the packages or the
    data are not what they were.
    """
    origin = json.loads((study.folder / ORIGIN).read_text())
    changed = [
        *space_tree.differences(origin["space"], space_tree.definition(SPACES[study.space])),
        *provenance.differences(origin["provenance"], _provenance(study)),
    ]
    if changed:
        raise ConfigError(
            f"resume: {study.name} is not what it was: {'; '.join(changed)}; undo that, or start"
            f" another study from it: study={study.name} extend=true"
        )
    return origin


def searcher(study: Study, origin: dict[str, Any]) -> suggest.Search:
    space = SPACES[study.space]
    return suggest.Search(
        space,
        suggest.sampler(study.searcher),
        study.mode,
        study.seed,
        space_tree.rules_of(space) if study.searcher["balanced"] else (),
        origin["points"],
        origin["past"],
        study.batch,
    )


def tags(study: Study, origin: dict[str, Any]) -> dict[str, str]:
    """What MLflow shows of where a study and each of its trials come from."""
    made = origin["provenance"]
    code = made["code"]
    return {
        "command": provenance.masked(command(study)),
        "code_version": code["version"],
        "code_dirty": "unknown" if code["commit"] is None else str(bool(code["diff"])).lower(),
        "data_sha256": made["data"]["sha256"],
        "space_sha256": space_tree.fingerprint(origin["space"]),
        **({} if code["commit"] is None else {"mlflow.source.git.commit": code["commit"]}),
    }


def files(origin: dict[str, Any]) -> dict[str, str]:
    return {
        "provenance.json": json.dumps(origin["provenance"], indent=1),
        "space.json": json.dumps(origin["space"], indent=1),
    }


def command(study: Study) -> str:
    """The study's own command line."""
    return shlex.join(["python", "tune_main.py", *study.overrides])
