"""Resuming or extending a study: which of its options stay, and which may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from disinhib.checks import flatten, refusal
from disinhib.errors import ConfigError
from disinhib.files import write_whole
from disinhib.hydra_config import is_group, option_of
from disinhib.tuning.space_tree import SEARCH

FILE = "study.yaml"  # in a study's folder
# Options that may change when a study is resumed: where it runs and writes, not what it does.
RESUMED_WITH = (
    *("resume", "study", "out_dir", "plan", "cluster.address", "cluster.max_concurrent"),
    *("cluster.lanes", "cluster.gpus_per_trial"),
    *("tracking.uri", "checkpoints.", "searcher.storage", "dataset.path", "plugins"),
)


# Options that a study of an earlier version may lack, as it ran.
EARLIER = {"repeats": 1, "repeat_splits": False, "budget": "trials"}
EARLIER_DATA = {"valid_seed": None}


def completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a study has kept, with those that its version did not have yet."""
    return {**EARLIER, **options, "dataset": {**EARLIER_DATA, **options["dataset"]}}


def begun(options: Mapping[str, Any]) -> bool:
    """Whether the study with `resume=auto` has begun. Raises ConfigError if it has no name."""
    if options["study"] is None:
        raise refusal("resume", "auto", "true or false without the name of a study (study=NAME)")
    return (Path(options["out_dir"]).absolute() / options["study"] / FILE).exists()


def read_kept(options: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides and options of the search that `options` name. Raises ConfigError if there is
    none."""
    flag = "resume" if options["resume"] else "extend"
    if options["study"] is None:
        raise refusal(flag, True, "false without the name of a study (study=NAME)")
    folder = Path(options["out_dir"]).absolute() / options["study"]
    try:
        content = yaml.safe_load((folder / FILE).read_text("utf-8"))
        return {"overrides": content["overrides"], "options": completed(content["options"])}
    except PermissionError as error:
        allowed = f"a study of your own ({folder / FILE} is another user's)"
        raise refusal("study", options["study"], allowed) from error
    except (OSError, TypeError, KeyError, ValueError, yaml.YAMLError) as error:
        files = filter(_of_search, folder.parent.glob(f"*/{FILE}"))
        names = sorted(file.parent.name for file in files)
        allowed = f"one of {', '.join(names)}" if names else "none: there is no study"
        raise refusal("study", options["study"], f"{allowed} (in {folder.parent})") from error


def _of_search(file: Path) -> bool:
    """Whether it is the file of a search, and not of a retraining, that we can read."""
    try:
        return "overrides:" in file.read_text("utf-8")
    except (OSError, ValueError):
        return False


def on_top_of(
    earlier: Mapping[str, Any], overrides: Sequence[str], own: Mapping[str, Any]
) -> list[str]:
    """Overrides of a study that resumes or extends an earlier one."""
    # Its name and its folder are known. An option that is fixed and its range replace each other.
    left = {_subject(override) for override in overrides} | {"study", "out_dir"}
    if own["extend"]:
        name = free_name(None, own["study"], Path(own["out_dir"]).absolute())
        overrides = [o for o in overrides if option_of(o) not in ("study", "extend")]
        if "seed" not in left:  # or the same trials were proposed once more
            overrides.append(f"seed={earlier['options']['seed'] + 1}")
        overrides += [f"study={name}", f"warm_start={own['study']}"]
        left |= {"seed", "warm_start", "points"}  # it has initial points of its own
    # A new choice of a group, say another searcher, drops the options of the old choice.
    groups = tuple(name.replace("/", ".") + "." for name in left if is_group(name))
    before = [
        o
        for o in earlier["overrides"]
        if _subject(o) not in left and not option_of(o).startswith(groups)
    ]
    return [*before, *overrides]


def _subject(override: str) -> str:
    """The option that an override sets, or whose range it gives."""
    return option_of(override).removeprefix(SEARCH)


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ConfigError if the options `now` make another study of it than those `before`. (More
    trials do not, and the mode is that of the metric.)"""
    was, wanted = flatten(before), flatten(now)
    if wanted["trials"] < was["trials"]:
        raise refusal("trials", wanted["trials"], f"at least {was['trials']}, which the study has")
    changed = [
        f"{name}={was.get(name)} (now {wanted.get(name)})"
        for name in sorted({*was, *wanted} - {"trials", "mode"})
        if was.get(name) != wanted.get(name) and not name.startswith(RESUMED_WITH)
    ]
    if changed:
        raise ConfigError(
            f"resume: {now['study']} ran with {', '.join(changed)}; resume it as it was"
            + another(now["study"], now)
        )


def another(name: str, options: Mapping[str, Any]) -> str:
    """The other way out, in words, of who cannot resume the study `name`."""
    if options["repeats"] > 1 or options["repeat_splits"]:
        return ", or start a new one"  # nothing learns from those
    return f", or start another from it: study={name} extend=true"


def kept_trials(folder: Path) -> int:
    """How many trials the study in `folder` has, by its file."""
    return yaml.safe_load((folder / FILE).read_text("utf-8"))["options"]["trials"]


def keep_trials(folder: Path, trials: int) -> None:
    """Writes down that the study in `folder` has so many trials from now on."""
    content = yaml.safe_load((folder / FILE).read_text("utf-8"))
    if content["options"].get("trials") == trials:
        return
    if "overrides" in content:  # else a retraining, whose list follows from its seeds
        others = [o for o in content["overrides"] if option_of(o) != "trials"]
        content["overrides"] = [*others, f"trials={trials}"]
    content["options"]["trials"] = trials
    keep(folder, content)


def keep(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes FILE in `folder` anew, whole or not at all; only its owner can read it."""
    write_whole(folder / FILE, yaml.safe_dump(dict(content)).encode(), private=True)


def free_name(name: str | None, default: str, out_dir: Path) -> str:
    """The name of a new study: `name`, or by default a free one. Raises ConfigError if taken."""
    if name is None:
        names = [default, *(f"{default}-{i}" for i in range(2, 10_000))]
        return next(name for name in names if not (out_dir / name).exists())
    if (out_dir / name).exists():
        allowed = f"a new name, or resume=true ({out_dir / name} is there already)"
        raise refusal("study", name, allowed)
    return name
