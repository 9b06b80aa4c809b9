"""Plugins: rules, data sets, search spaces and other entries of tables, from a user's own file.

A plugin is one Python file, or one installed module, with tables at its top level that have the
names of ours (`tables`) and entries of the same kinds:

    RULES = {"delta": Rule("delta", ...)}
    SPACES = {"small": space}

`load` runs it and adds its entries to our tables, where all commands find them. What runs is always
the text: a study keeps it and sends it to its workers, and `load` takes what was `kept`. So a file
may import installed packages, but none of its neighbours.

Does not import jax, which reads its environment when it is imported, before there is a plugin.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.abc
import importlib.util
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from disinhib.errors import ConfigError, nearest, one_line, reason_of

GROUP = "disinhib.plugins"  # of entry points: a name that a package gives to its module
NAME = r"[A-Za-z][\w-]*"  # of an entry, which is a choice on the command line
OURS = ("disinhib", "search_spaces", "analysis", "tune_main")


class Plugin(NamedTuple):
    """A plugin as it was read. (Plain values, as they are kept and sent.)"""

    name: str  # of a file without its ending, or of an installed module with its packages
    file: str  # where it was read
    text: str
    installed: bool = False  # a module, which may import its own package

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


LOADED: dict[str, Plugin] = {}  # in this process, by name


class Table(NamedTuple):
    """A table that a plugin can add to."""

    entries: Mapping[str, Any]
    kind: type | Callable[[Any], bool]
    add: Callable[[str, Any], None]


def tables() -> dict[str, Table]:
    """By the name that a plugin uses."""
    from disinhib import activations, controller, data, losses, metrics, optimizers, rules
    from search_spaces import SPACES, offer

    def add_rule(name: str, rule: rules.Rule) -> None:
        rules.add(rule)
        names = [rules.reported_name(name, circuit) for circuit in rule.circuits]
        offer({name: rules.BRANCHES[name] for name in names if name in rules.BRANCHES})

    def add_metric(name: str, metric: metrics.Metric) -> None:
        metrics.add(name, metric)
        if (training := sys.modules.get("disinhib.training")) is not None:
            training.programs.cache_clear()  # which measure what was known when they were made

    of = lambda table, kind: Table(table, kind, table.__setitem__)
    return {
        "RULES": Table(rules.RULES, rules.Rule, add_rule),
        "DATASETS": of(data.DATASETS, data.Dataset),
        "SPACES": of(SPACES, callable),
        "METRICS": Table(metrics.METRICS, metrics.Metric, add_metric),
        "ACTIVATIONS": of(activations.ACTIVATIONS, activations.Kind),
        "LOSSES": of(losses.LOSSES, losses.Loss),
        "OPTIMIZERS": of(optimizers.OPTIMIZERS, optimizers.Optimizer),
        "CONTROLLERS": of(controller.CONTROLLERS, controller.Controller),
    }


def name_of(given: str) -> str:
    """The name of the plugin that an option gives: of `/mine/my_rule.py` it is `my_rule`."""
    return Path(given).stem if given.endswith(".py") else given


def resolved(given: str) -> str:
    """What an option gives, as it means the same in any folder: an absolute path, or a module."""
    if given.endswith(".py"):
        return os.path.abspath(os.path.expanduser(given))
    return _named_modules().get(given, given)


def _named_modules() -> dict[str, str]:
    return {point.name: point.module for point in metadata.entry_points(group=GROUP)}


def read(given: str) -> Plugin:
    """The plugin that an option gives: a file `*.py`, an installed module, or the name that a
    package has given to one (an entry point of the group `disinhib.plugins`).

    Raises ConfigError if there is none, or if it cannot be read.
    """
    module = resolved(given)
    if given.endswith(".py"):
        return Plugin(name_of(given), module, _text(given, module))
    spec, why = None, ""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError) as error:  # a package of it is missing, or bad
        why = f" ({one_line(error)})"
    if spec is None or not (spec.origin or "").endswith(".py"):
        named = _named_modules()
        names = f", or one of {', '.join(named)}" if named else ""
        allowed = f"a file that ends in .py, or an installed module in Python{names}"
        suggested = nearest(given, named)
        raise ConfigError(f"plugins: given {given}, allowed is {allowed}{suggested}{why}")
    assert spec.origin is not None
    return Plugin(module, spec.origin, _text(given, spec.origin), installed=True)


def _text(given: str, file: str) -> str:
    try:
        return Path(file).read_text("utf-8")
    except OSError as error:
        allowed = f"a file that can be read ({error.strerror})"
    except ValueError:  # UnicodeDecodeError, or a null byte in the name
        allowed = "a file of text in UTF-8"
    raise ConfigError(f"plugins: given {given}, allowed is {allowed}")


def kept() -> list[dict[str, Any]]:
    """The plugins of this process, to be kept and sent, as plain values."""
    return [{**plugin._asdict(), "sha256": plugin.sha256} for plugin in LOADED.values()]


def load_kept(content: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loads plugins as they were `kept`; says, a line each, which of them are not in their place
    any more, or have changed there. Raises ConfigError as `load` does."""
    lines = []
    for plain in content:
        plugin = Plugin(**{name: plain[name] for name in Plugin._fields})
        try:
            now = read(plugin.name if plugin.installed else plugin.file)
        except ConfigError:
            lines.append(f"plugin {plugin.name} is gone from {plugin.file}: its kept text is used")
        else:
            if now.sha256 != plugin.sha256:
                words = f"{plugin.file} has changed since: its kept text is used"
                lines.append(f"plugin {plugin.name}: {words}")
        load(plugin)
    return lines


def loaded_differently(content: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of plugins that were `kept` of which another text is loaded in this process."""
    loaded = {name: LOADED[name].sha256 for name in LOADED}
    return [p["name"] for p in content if loaded.get(p["name"], p["sha256"]) != p["sha256"]]


def hashes() -> dict[str, str]:
    """The SHA-256 of each plugin of this process."""
    return {f"plugin {plugin.name}": plugin.sha256 for plugin in LOADED.values()}


def packages() -> list[str]:
    """The installed distributions that the plugins of this process belong to."""
    roots = {plugin.name.partition(".")[0] for plugin in LOADED.values() if plugin.installed}
    owners = metadata.packages_distributions() if roots else {}
    return sorted({owner for root in roots for owner in owners.get(root, ())})


def load(plugin: Plugin) -> None:
    """Runs a plugin and adds its entries to the tables, all or none; a second time does nothing.

    Raises ConfigError, with the file and the line: it raises; it has no entry; an entry is of the
    wrong kind, or has a name that is taken; another plugin of that name is loaded.
    """
    before = LOADED.get(plugin.name)
    if before is not None:
        if before.sha256 != plugin.sha256:
            raise ConfigError(
                f"plugins: given {plugin.file}, but another text of the plugin {plugin.name} is"
                f" loaded already ({before.file}): rename one, or start a new process"
            )
        return
    ours, module = tables(), _run(plugin)
    entries = []
    for name, table in ours.items():
        own = getattr(module, name, table.entries)
        if own is table.entries:  # it has none, or has imported ours
            continue
        entries += [(table, key, entry) for key, entry in _checked(plugin, name, own, table)]
    if not entries:
        raise ConfigError(f"plugins: {plugin.file} has no entry of {', '.join(ours)}")
    for table, key, entry in entries:
        table.add(key, entry)
    LOADED[plugin.name] = plugin


class _Text(importlib.abc.SourceLoader):
    """Python's loader of a module whose source is at hand."""

    def __init__(self, plugin: Plugin):
        self.plugin = plugin

    def get_filename(self, fullname: str) -> str:
        return self.plugin.file

    def get_data(self, path: str | bytes) -> bytes:
        if path != self.plugin.file:  # compiled code, of which there is none
            raise OSError
        return self.plugin.text.encode()


def _run(plugin: Plugin) -> Any:
    """The plugin's module. Raises ConfigError for whatever it raises."""
    # A file may have the name of a module that others import.
    name = plugin.name if plugin.installed else f"disinhib plugin {plugin.name}"
    spec = importlib.util.spec_from_loader(name, loader := _Text(plugin))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    before = {*sys.modules}
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _blamed(plugin, _line_of(error, plugin.file), reason_of(error)) from error
    if not plugin.installed:
        _refuse_neighbours(plugin, {*sys.modules} - before)
    return module


def _refuse_neighbours(plugin: Plugin, imported: set[str]) -> None:
    """Raises ConfigError if the plugin's text imports, be it in a function, what lies beside it, or
    if such modules have been `imported`: they would be neither kept nor sent."""
    lines: dict[str, int] = {}
    for node in ast.walk(ast.parse(plugin.text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in _imported(node):
                lines.setdefault(_root(name), node.lineno)
    folder = Path(os.path.realpath(plugin.file)).parent
    for name in sorted({*lines, *map(_root, imported)} - {*OURS}):
        if any(path.is_relative_to(folder) for path in _places(name) if not _is_installed(path)):
            words = f"imports {name}, which lies beside it and would not be kept with it: move what"
            words += f" it needs into the plugin, or install {name}"
            raise _blamed(plugin, lines.get(name), words)


def _root(name: str) -> str:
    return name.partition(".")[0]


def _places(name: str) -> list[Path]:
    """Where a module lies that can be imported: its file, or the folders of a package."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # one that was not imported, such as __main__
        spec = None
    if spec is None:
        return []
    files = [spec.origin] if spec.has_location and spec.origin else []
    return [Path(os.path.realpath(f)) for f in (*files, *(spec.submodule_search_locations or ()))]


def _is_installed(path: Path) -> bool:
    of_python = (os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
    return bool({"site-packages", "dist-packages"} & {*path.parts}) or any(
        path.is_relative_to(folder) for folder in of_python
    )


def _checked(plugin: Plugin, name: str, own: Any, table: Table) -> list[tuple[str, Any]]:
    """The entries of a plugin's table. Raises ConfigError for one that is wrong."""
    line = _line_where(plugin, lambda node: name in _assigned(node))
    if not isinstance(own, Mapping):
        needed = "a dict of entries by name, as ours"
        raise _blamed(plugin, line, f"{name} is a {type(own).__name__}, needed is {needed}")
    for key, entry in own.items():
        where = f"{name}[{key!r}]"
        if not isinstance(key, str) or not re.fullmatch(NAME, key):
            raise _blamed(plugin, line, f"{where}: a name has letters, digits, _ and -")
        if key in table.entries:
            taken = ", ".join(table.entries)
            raise _blamed(plugin, line, f"{where}: the name is taken (there are {taken})")
        if isinstance(table.kind, type):
            right = isinstance(entry, table.kind)
            needed = f"a {table.kind.__module__}.{table.kind.__qualname__}"
        else:
            right, needed = table.kind(entry), "a function of a trial"
        if not right:
            kind = type(entry).__name__
            raise _blamed(plugin, line, f"{where} is a {kind}, needed is {needed}")
        why = _wrong_with_options(getattr(entry, "options", ()))
        if why := why or (_wrong_with(key, entry) if name == "RULES" else None):
            raise _blamed(plugin, line, f"{where}: {why}")
    if name == "RULES":
        reported = [c.name or key for key, rule in own.items() for c in rule.circuits.values()]
        families = {id(rule.family): rule.family.name for rule in own.values()}
        for names in (reported, [*families.values()]):
            if twice := [one for one in {*names} if names.count(one) > 1]:
                raise _blamed(plugin, line, f"{name}: {twice[0]} is there twice")
    return [*own.items()]


def _wrong_with_options(options: Any) -> str | None:
    """What is wrong with the options of an entry."""
    from disinhib.checks import Option

    if not isinstance(options, tuple | list):
        return f"options are a {type(options).__name__}, needed is a tuple"
    for option in options:
        if not isinstance(option, Option):
            return f"an option is a {type(option).__name__}, needed is a disinhib.checks.Option"
        if option.name == "name" or not re.fullmatch(r"[A-Za-z_]\w*", option.name):
            return f"option {option.name}: not a name of an option"
    return None


def _wrong_with(name: str, rule: Any) -> str | None:
    """What is wrong with a rule, beside its kind and its own options."""
    from disinhib import rules
    from disinhib.config import CIRCUITS
    from search_spaces import SPACES

    if rule.name != name:
        return f"its own name is {rule.name}"
    if not isinstance(rule.family, rules.Family):
        return f"family is a {type(rule.family).__name__}, needed is a disinhib.rules.Family"
    if why := _wrong_with_options(rule.family.options):
        return f"family {rule.family.name}: {why}"
    if rules.FAMILIES.get(rule.family.name, rule.family) is not rule.family:
        return f"the family {rule.family.name} is another's: rename it"
    if not isinstance(rule.circuits, Mapping):
        return f"circuits is a {type(rule.circuits).__name__}, needed is a dict by circuit"
    if not rule.circuits or {*rule.circuits} - {*CIRCUITS}:
        given, allowed = ", ".join(map(str, rule.circuits)), ", ".join(CIRCUITS)
        return f"circuits are {given or 'none'}, allowed is {allowed}"
    if strange := {o.name for o in rule.options} - {o.name for o in rule.family.options}:
        return f"options that its family has not: {', '.join(sorted(strange))}"
    for circuit, competitor in rule.circuits.items():
        if not isinstance(competitor, rules.Competitor):
            return f"circuits[{circuit!r}] is a {type(competitor).__name__}, needed is a Competitor"
        reported = competitor.name or name
        if not re.fullmatch(NAME, str(reported)):
            return f"{reported}: a name has letters, digits, _ and -"
        if reported in rules.COMPETITORS:
            return f"a rule is reported as {reported} already"
        if competitor.branch is not None and reported.replace("-", "_") in SPACES:
            return f"its branch would be the space {reported.replace('-', '_')}, which there is"
        if not re.fullmatch("#[0-9A-Fa-f]{6}", str(competitor.colour)):
            return f"colour {competitor.colour}, allowed is #RRGGBB"
    return None


def _blamed(plugin: Plugin, line: int | None, why: str) -> ConfigError:
    where = f", line {line}" if line else ""
    return ConfigError(f"plugins: {plugin.file}{where}: {why}")


def _line_of(error: BaseException, file: str) -> int | None:
    """The last line of `file` that had to do with an error."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == file), None)


def _line_where(plugin: Plugin, wanted: Callable[[ast.stmt], bool]) -> int | None:
    """The first line at the top level with a statement that is `wanted`."""
    statements = ast.parse(plugin.text).body
    return next((statement.lineno for statement in statements if wanted(statement)), None)


def _assigned(node: ast.stmt) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if node.module else []
