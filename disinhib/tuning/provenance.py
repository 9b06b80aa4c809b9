"""The provenance of a run: code, packages, data, threads and variables of XLA, which are needed to
run it again, and the machine.

Plain values (JSON). Does not import jax: a replay reads the provenance first, to set the number of
XLA's threads.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disinhib import data, numerics, plugins

if TYPE_CHECKING:  # it imports jax
    from disinhib.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
# Files that affect results, and those that the patch covers.
DECISIVE = ("disinhib/**/*.py", "search_spaces/*.py", "conf/**/*.yaml", "tune_main.py")
SOURCES = ("disinhib", "search_spaces", "analysis", "conf", "tune_main.py", "pyproject.toml")
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "diffrax", "numpy", "scipy", "scikit-learn"),
    *("optuna", "ray", "mlflow", "hydra-core"),
)


def collect(config: RunConfig, threads: int) -> dict[str, Any]:
    """The provenance of a training run of `config` by `threads` threads, in this process' code.

    Raises data.DataError.
    """
    return {
        **decisive((config.dataset, config.dataset_path, config.valid_split)),
        "code": code(ROOT),
        "plugins": plugins.kept(),
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
        },
        "threads": threads,
    }


DataSource = tuple[str, str | None, float]  # of data: its name, its folder and the validation split


def source_of(options: Mapping[str, Any]) -> DataSource:
    """Of training options."""
    dataset = options["dataset"]
    return dataset["name"], dataset["path"], dataset["valid_split"]


def decisive(source: DataSource) -> dict[str, Any]:
    """What `differences` compares, of this process. Raises data.DataError."""
    return {
        "code": {"files": {**_hashes(ROOT), **plugins.hashes()}},
        "packages": {name: _version(name) for name in (*PACKAGES, *plugins.packages())},
        "python": platform.python_version(),
        "data": {"name": source[0], **_data(*source, data.version(source[1]))},
        "numerics": numerics.recorded(),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences that make results of two provenances incomparable, a short line each.

    The machine and the number of threads do not count, because a replay may choose them; nor does
    the commit, because one that changes only a README has the same code.
    """
    files, files_now = before["code"]["files"], now["code"]["files"]
    lines = []
    for file in sorted(f for f in {*files, *files_now} if files.get(f) != files_now.get(f)):
        how = "is new" if file not in files else "is gone" if file not in files_now else "changed"
        lines.append(f"{file} {how}")
    versions = {"python": _minor(before["python"]), **before["packages"]}
    versions_now = {"python": _minor(now["python"]), **now["packages"]}
    for name in dict.fromkeys([*versions, *versions_now]):
        version, version_now = versions.get(name), versions_now.get(name)
        if version != version_now:
            lines.append(f"{name} {version or 'none'}, now {version_now or 'none'}")
    was, becomes = before.get("numerics", {}), now.get("numerics", {})
    lines += [
        f"{name}={was.get(name, 'not set')}, now {becomes.get(name, 'not set')}"
        for name in sorted({*was, *becomes})
        if was.get(name) != becomes.get(name)
    ]
    name, name_now = before["data"]["name"], now["data"]["name"]
    if name != name_now:
        lines.append(f"data {name}, now {name_now}")
    elif before["data"]["sha256"] != now["data"]["sha256"]:
        lines.append(f"data {name}: other images, labels or split")
    return lines


def code(root: Path) -> dict[str, Any]:
    """The source below `root`: its version, commit and patch (where git knows them) and hashes.

    `git apply` of `diff` on a checkout of `commit` gives these very files.
    """
    commit = _commit(root)
    return {
        "version": _version("disinhib"),
        "commit": commit,
        "diff": "" if commit is None else _patch(root),
        "files": {**_hashes(root), **plugins.hashes()},
    }


def _hashes(root: Path) -> dict[str, str]:
    """Every decisive file by its name in a checkout; a wheel has conf/ within the package."""
    installed = root / "disinhib"
    places = dict.fromkeys(DECISIVE, root)
    if (installed / "conf").is_dir():
        places["conf/**/*.yaml"] = installed
    files = {
        file.relative_to(place).as_posix(): file
        for pattern, place in places.items()
        for file in place.glob(pattern)
    }
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in sorted(files.items())
    }


def _commit(root: Path) -> str | None:
    """None unless `root` is the top of a git repository with a commit. (A folder within another
    project's, as an environment's site-packages may be, is no checkout.)"""
    try:
        top, commit = _git(root, "rev-parse", "--show-toplevel", "HEAD").splitlines()
    except (OSError, RuntimeError):  # no git, no repository or no commit
        return None
    return commit if Path(top).resolve() == root.resolve() else None


def _patch(root: Path) -> str:
    # Settings of the user's that would make it something else than a patch are overruled.
    plain = ("--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")
    changes = _git(root, "diff", *plain, "HEAD", "--", *SOURCES)
    listed = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *SOURCES)
    files = (name for name in listed.split("\0") if name.endswith((".py", ".yaml")))
    # A comparison with nothing exits with 1, for it finds a difference.
    new = (
        _git(root, "diff", *plain, "--no-index", "--", os.devnull, name, codes=(0, 1))
        for name in files
    )
    return "".join([changes, *new])


def _git(root: Path, *arguments: str, codes: Iterable[int] = (0,)) -> str:
    # In a hook git sets variables that name another repository or index.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode not in codes:
        raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _version(package: str) -> str | None:
    """None where it is not installed (a checkout on the path needs no installing)."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _cpu() -> str:
    information = Path("/proc/cpuinfo")  # Linux; platform names only the architecture there
    lines = information.read_text().splitlines() if information.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


@lru_cache(maxsize=4)  # the trials of a study share their data
def _data(name: str, path: str | None, valid_split: float, version: Any) -> dict[str, Any]:
    """How many samples each of the three splits has, SHA-256 over what every array of them is
    (dtype, shape, bytes), and what was done to them, in words. `version` is data.version(path).

    They are split by position: with the option dataset.valid_seed, validation is other samples of
    the same training file, so that repeats with splits of their own are known to share their data.
    """
    splits = data.load(name, path, valid_split)
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    digest = hashlib.sha256()
    for split in parts.values():
        for array in split:
            digest.update(f"{array.dtype.str} {array.shape} ".encode())
            digest.update(array.tobytes())
    samples = {part: len(split.labels) for part, split in parts.items()}
    return {"sha256": digest.hexdigest(), "samples": samples, "words": splits.words}
