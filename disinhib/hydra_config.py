"""The border to Hydra, shared by `python -m disinhib` and `tune_main.py`.

Composes conf/ and the groups that are made from tables (`register`), says in one line what is wrong
with the options before anything is written, and turns a composed run back into the shortest command
that composes it.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from hydra import compose as hydra_compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from disinhib import plugins
from disinhib.activations import ACTIVATIONS
from disinhib.checks import Option, check, defaults, flatten, one_of, refusal
from disinhib.config import PLUGINS, with_sizes
from disinhib.controller import CONTROLLERS
from disinhib.data import DATASETS
from disinhib.errors import ConfigError, nearest
from disinhib.losses import LOSSES
from disinhib.optimizers import OPTIMIZERS
from disinhib.rules import RULES

# Where the package is installed, conf/ lies within it (setup.py); in a checkout, beside it.
_INSTALLED = Path(__file__).resolve().with_name("conf")
CONFIGURATIONS = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "conf"
TRAINING = "train"  # conf/train.yaml
# Options that are names, folders, files or addresses.
PLACES = (
    *("study", "warm_start", "out_dir", "points", "dataset.path", "cluster.address"),
    *("tracking.uri", "tracking.experiment", "searcher.storage"),
)

PLAIN = r"[A-Za-z_/.~][A-Za-z0-9_/.:@+-]*"  # texts that need no quotes
WORD = r"(?!(true|false|null|nan|inf)$)[a-z]+(-[a-z]+)*"  # nor does one of a choice

Options = dict[str, Any]
Choices = dict[str, str]

_REGISTERED: dict[str, list[str]] = {}  # the choices of each group that `register` was given


def register(group: str, choices: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes a Hydra group of `choices`: the options of each, nested as in a YAML file of conf/, of
    which "defaults" is Hydra's list. A choice that is there already is replaced."""
    for name, node in choices.items():
        ConfigStore.instance().store(name=name, node=dict(node), group=group)
    _REGISTERED[group] = list(dict.fromkeys((*_REGISTERED.get(group, ()), *choices)))


class Entry(Protocol):
    """An entry of a table, as far as Hydra is concerned."""

    @property
    def options(self) -> tuple[Option, ...]: ...


def nodes(table: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
    """The choices of a group that are a table's entries: name and options, with their defaults."""
    return {name: {"name": name, **defaults(entry.options)} for name, entry in table.items()}


LOSS = [{"loss": next(iter(LOSSES))}, "_self_"]


def register_tables() -> None:
    """Makes the groups of the tables, also of what plugins have added to them."""
    register("trainer", nodes(RULES))
    register("optimizer", nodes(OPTIMIZERS))
    register("model/vf/activation", nodes(ACTIVATIONS))
    register("model/vf/controller", nodes(CONTROLLERS))
    register("dataset/loss", nodes(LOSSES))
    data = {name: {"defaults": LOSS, **node} for name, node in nodes(DATASETS).items()}
    register("dataset", data)


register_tables()


def load_plugins(overrides: Sequence[str]) -> list[str]:
    """Loads the plugins that `overrides` name, by which options of their own exist. Returns the
    overrides with the plugins' files as they are called in any folder.

    Raises ConfigError for a plugin that is wrong.
    """
    names = plugins_in(overrides)
    for name in names:
        plugins.load(plugins.read(name))
    if not names:
        return list(overrides)
    register_tables()
    *_, last = filter(_names_plugins, overrides)
    known = [o for o in overrides if o == last or not _names_plugins(o)]
    return [f"plugins={_written(names)}" if o == last else o for o in known]


def plugins_in(overrides: Sequence[str]) -> list[str]:
    """The plugins that the last of `overrides` to do so names, as they are called in any folder.
    Raises ConfigError."""
    given: Any = []
    for override in filter(_names_plugins, overrides):
        given = value_of(override)
    given = [given] if isinstance(given, str) else given
    return [*map(plugins.resolved, check("plugins", given, PLUGINS))]


def _names_plugins(override: str) -> bool:
    return option_of(override) == "plugins" and not override.startswith("~")


def load_kept_plugins(provenance: Mapping[str, Any], beside: bool = False) -> None:
    """Loads the plugins that a study, or a trial, was made with, and says which have changed since.
    `beside` those of another study, for words and colours only: of two texts of a plugin the first
    is enough, which is said. Raises ConfigError if one cannot be loaded."""
    content = provenance.get("plugins", [])
    differing = plugins.loaded_differently(content) if beside else []
    for name in differing:
        print(f"warning: plugin {name} has another text in another study here: only words and"
              " colours of the first are used", flush=True)  # fmt: skip
    others = [plain for plain in content if plain["name"] not in differing]
    for line in plugins.load_kept(others):
        print(f"warning: {line}", flush=True)
    register_tables()


def is_group(name: str) -> bool:
    """Whether an override's name is that of a group: `trainer`, `model/vf` and
    `model/vf/activation@model.vf.actI` are, `optimizer.b1` is not."""
    group = name.partition("@")[0]
    return group in _REGISTERED or (group != "" and os.path.isdir(CONFIGURATIONS / group))


def choices_of(group: str) -> list[str]:
    """The choices of a group, sorted; none if there is no such group."""
    group = group.partition("@")[0]
    folder = CONFIGURATIONS / group
    found = folder.rglob if group == "experiment" else folder.glob  # experiments have subfolders
    files = found("*.yaml") if os.path.isdir(folder) else ()
    names = (file.relative_to(folder).with_suffix("").as_posix() for file in files)
    return sorted({*names, *_REGISTERED.get(group, ())})


def literal(config_name: str, overrides: Sequence[str]) -> list[str]:
    """`overrides` with what stands after the `=` of names and places quoted, so that a folder
    may be called `lr=0.1 (a)`, and a study 1. (`${...}` still refers to an option.)"""
    names = {*PLACES, *(["resume"] if config_name == TRAINING else [])}
    quoted = []
    for override in overrides:
        name, _, text = override.partition("=")
        plain = name.lstrip("+") in names and text.lower() not in ("", "null")
        is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        quoted.append(f"{name}={_written(text)}" if plain and not is_quoted else override)
    return quoted


def compose(config_name: str, overrides: Sequence[str]) -> tuple[Options, Choices]:
    """(resolved plain options, choice of each config group) of conf/<config_name>.yaml, with the
    plugins that `overrides` name loaded.

    Raises ConfigError: an override that does not parse, an unknown option, group or choice, a
    plugin that is wrong or has another text than when it was loaded.
    """
    return compose_loaded(config_name, load_plugins(overrides))


def compose_loaded(config_name: str, overrides: Sequence[str]) -> tuple[Options, Choices]:
    """The same with the plugins as they were loaded: a study goes on when their files change."""
    overrides = literal(config_name, overrides)
    for text in overrides:
        if text.startswith("~") or (text.startswith("hydra.") and config_name != TRAINING):
            raise ConfigError(f"{text}: has no meaning here, allowed is option=value")
    try:
        composed = _composed(config_name, overrides, with_hydra=True)
        choices = composed.hydra.runtime.choices
        options = OmegaConf.create({k: v for k, v in composed.items() if k != "hydra"})
        plain = OmegaConf.to_container(options, resolve=True)
    except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        raise _explained(error, config_name, overrides) from error
    own = {group: str(choice) for group, choice in choices.items() if "hydra/" not in group}
    experiment = own.get("experiment", "None")
    if experiment != "None":  # it is optional: Hydra ignores one that is not there
        check("experiment", experiment, one_of(choices_of("experiment")))
    return with_sizes(plain), own  # pyright: ignore[reportArgumentType]


def _composed(config_name: str, overrides: Sequence[str], with_hydra: bool = False) -> Any:
    # A study composes within `hydra.main` too, where Hydra is initialised already.
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGURATIONS), version_base="1.3", job_name=config_name):
        return hydra_compose(config_name, list(overrides), return_hydra_config=with_hydra)


def _explained(error: Exception, config_name: str, overrides: Sequence[str]) -> ConfigError:
    """What in `overrides` Hydra stumbled over, with the names that would have been right."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except (HydraException, ValueError):
            return ConfigError(f"{text}: not understood, allowed is option=value (Hydra's grammar)")
    groups = [override for override in parsed if choices_of(override.key_or_group)]
    for override in groups:
        allowed, given = choices_of(override.key_or_group), override.value()
        if given not in allowed:
            return ConfigError(
                f"{override.key_or_group}: given {given}, allowed is one of {', '.join(allowed)}"
                f"{nearest(str(given), allowed)}"
            )
    known = _known_options(config_name, [override.input_line or "" for override in groups])
    for override in parsed:
        name = override.key_or_group
        if override not in groups and known and name not in known:
            return ConfigError(f"{name}: unknown option{nearest(name, known)}")
    return ConfigError(" ".join(str(error).split()))


def _known_options(config_name: str, group_overrides: Sequence[str]) -> set[str]:
    """Every option, and every group, that exists under these choices of groups."""
    try:
        composed = _composed(config_name, group_overrides)
    except HydraException:
        return set()
    options = set(flatten(OmegaConf.to_container(composed)))  # pyright: ignore
    parents = {name.rsplit(".", depth)[0] for name in options for depth in range(1, 4)}
    groups = {
        str(folder.relative_to(CONFIGURATIONS))
        for folder in CONFIGURATIONS.rglob("*")
        if folder.is_dir()
    }
    return options | parents | groups | {*_REGISTERED}


def command(
    options: Mapping[str, Any], choices: Mapping[str, str], seeds: Sequence[int] = ()
) -> str:
    """The shortest `python -m disinhib ...` that composes to exactly these training options.

    `seeds`, if given, take the place of the option `seed`; several of them are Hydra's multirun,
    one run after another. Raises ConfigError if no command composes from conf/train.yaml to these.
    """
    wanted = flatten({**options, "seed": seeds[0]} if seeds else options)
    groups = _group_overrides(choices)
    base = flatten(_base(groups)[0])
    written = {
        name: _written(value)
        for name, value in wanted.items()
        if name not in base or base[name] != value
    }
    _verify(groups, written, base, wanted)
    multirun = []
    if len(seeds) > 1:
        multirun = ["-m"]
        written["seed"] = ",".join(map(str, seeds))
    values = [f"{name}={text}" for name, text in written.items()]
    return shlex.join(["python", "-m", "disinhib", *multirun, *groups, *values])


def _group_overrides(choices: Mapping[str, str]) -> tuple[str, ...]:
    """The fewest overrides of groups that lead to `choices`."""
    overrides: list[str] = []
    while True:  # a choice brings groups of its own, with their defaults
        _, chosen = _base(tuple(overrides))
        differing = [
            f"{group}={choice}"
            for group, choice in choices.items()
            if group in chosen and chosen[group] != choice
        ]
        if not differing:
            return tuple(overrides)
        overrides += differing


# What `_verify` has seen compose: groups, names, and the values but for their digits.
_VERIFIED: set[tuple[str, ...]] = set()


def _verify(
    groups: tuple[str, ...],
    written: Mapping[str, str],
    base: Mapping[str, Any],
    wanted: Mapping[str, Any],
) -> None:
    """Raises ConfigError unless `groups` and `written` compose to `wanted`.

    Composing takes Hydra 70 ms, so commands that differ only in the digits of their numbers are
    composed once: Hydra's grammar reads 0.0012 as it reads 0.5.
    """
    structure = (*groups, *(f"{name}={_kind(text)}" for name, text in written.items()))
    if structure in _VERIFIED and base.keys() <= wanted.keys():  # no override leaves one out
        return
    recomposed, _ = compose_loaded(TRAINING, [*groups, *(f"{k}={v}" for k, v in written.items())])
    if flatten(recomposed) != wanted:
        raise ConfigError(f"no command composes to these options: {wanted}")
    _VERIFIED.add(structure)


def _kind(text: str) -> str:
    """A written value with every number's digits as one 0; a quoted text as it is."""
    return text if "'" in text else re.sub(r"\d+", "0", text)


@lru_cache(maxsize=64)
def _base(group_overrides: tuple[str, ...]) -> tuple[Options, Choices]:
    """Training options under some choices of groups: a study asks for the same few all the time."""
    return compose_loaded(TRAINING, group_overrides)


def _written(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(_written(item) for item in value) + "]"
    if isinstance(value, str) and re.fullmatch(WORD, value):
        return value
    if isinstance(value, str):
        # Hydra reads a backslash as itself, except before a quote.
        text = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + "\\'" * bool(m[2]), value)
        return f"'{text}'"
    return repr(value)


def override(name: str, value: str) -> str:
    """`name=value` for a command that a user may paste, with quotes only where Hydra needs them."""
    return f"{name}={value if re.fullmatch(PLAIN, value) else _written(value)}"


def option_of(override: str) -> str:
    """What an override sets: `optimizer.b1` of `+optimizer.b1=0.5`."""
    return override.partition("=")[0].lstrip("+~")


def value_of(override: str) -> Any:
    """The value that an override gives. Raises ConfigError if it gives several, or if it is not
    understood."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, ValueError) as error:
        raise ConfigError(f"{override}: not understood, allowed is option=value") from error
    if parsed.is_sweep_override():
        several = f"one value, or search.{option_of(override)}=[...]"
        raise refusal(option_of(override), override.partition("=")[2], several)
    return parsed.value()


def settings_of(experiment: str | None) -> dict[str, Any]:
    """The options of a study that conf/experiment/NAME.yaml sets itself, by dotted name."""
    file = CONFIGURATIONS / "experiment" / f"{experiment}.yaml"
    if experiment is None or not file.is_file():
        return {}
    own = flatten(OmegaConf.to_container(OmegaConf.load(file)))  # pyright: ignore
    resolved = flatten(compose("study", [f"experiment={experiment}"])[0])
    return {name: resolved[name] for name in own if name in resolved}


def check_folder(folder: Path) -> None:
    """Raises ConfigError if nothing can be written there, or in the nearest parent that exists."""
    try:
        parents = (folder.absolute(), *folder.absolute().parents)
        existing = next(path for path in parents if os.path.lexists(path))  # a link to nowhere, too
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        allowed = f"a folder that can be written ({error.strerror})"
        raise refusal("out_dir", folder, allowed) from error
