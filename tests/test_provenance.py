"""What is kept to run a trial again: git repositories made here, the real digits."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest

from disinhib import config as configuration, data, hydra_config
from disinhib.tuning import provenance

FILES = {
    "disinhib/feedback.py": "rule = 1\n",
    "disinhib/tuning/worker.py": "trial = 1\n",
    "search_spaces/bp.py": "space = 1\n",
    "conf/train.yaml": "seed: 0\n",
    "conf/model/vf/dale.yaml": "name: dale\n",
    "tune_main.py": "",
    "pyproject.toml": "[project]\n",
    "analysis/report.py": "",
    "tests/test_rules.py": "",
    "README.md": "",
}
DECISIVE = {
    *("disinhib/feedback.py", "disinhib/tuning/worker.py", "search_spaces/bp.py"),
    *("conf/train.yaml", "conf/model/vf/dale.yaml", "tune_main.py"),
}


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # set where a hook runs the tests
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "repository"
    write(folder, FILES)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_clean_checkout_is_its_commit(repository):
    code = provenance.code(repository)
    assert code["commit"] == git(repository, "rev-parse", "HEAD")
    assert code["diff"] == ""
    assert set(code["files"]) == DECISIVE


def test_commit_and_diff_give_the_files_back(repository, tmp_path):
    write(
        repository,
        {
            "disinhib/feedback.py": "rule = 2  # Größe\n",
            "disinhib/new.py": "new = 1\n",
            "conf/model/new one.yaml": "name: new\n",
            "disinhib/notes.txt": "no source\n",
            "tests/test_new.py": "not of ours\n",
            "README.md": "not of ours\n",
        },
    )
    (repository / "search_spaces/bp.py").unlink()
    git(repository, "add", "disinhib/feedback.py")  # what is staged is in it too
    git(repository, "config", "color.ui", "always")
    git(repository, "config", "diff.noprefix", "true")
    code = provenance.code(repository)
    assert "notes.txt" not in code["diff"] and "not of ours" not in code["diff"]

    copied = tmp_path / "copied"
    git(tmp_path, "clone", "-q", str(repository), str(copied))
    git(copied, "checkout", "-q", code["commit"])
    (tmp_path / "patch").write_text(code["diff"])
    git(copied, "apply", str(tmp_path / "patch"))
    assert provenance.code(copied)["files"] == code["files"]


def test_in_a_hook_the_repository_is_still_the_one_of_the_code(repository, monkeypatch):
    commit = git(repository, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert provenance.code(repository)["commit"] == commit


@pytest.mark.parametrize("lacking", ["repository", "its own repository", "commit", "git"])
def test_without_a_checkout_there_are_only_hashes(lacking, repository, tmp_path, monkeypatch):
    folder = tmp_path / "plain"
    if lacking == "its own repository":
        folder = repository / "site-packages"
    write(folder, FILES)
    if lacking == "commit":
        git(folder, "init", "-q")
    if lacking == "git":
        folder = repository
        monkeypatch.setenv("PATH", str(tmp_path))
    code = provenance.code(folder)
    assert (code["commit"], code["diff"], set(code["files"])) == (None, "", DECISIVE)


@pytest.fixture(scope="module")
def run():
    options, _ = hydra_config.compose(hydra_config.TRAINING, [])
    return configuration.parse(options)


@pytest.fixture(scope="module")
def collected(run):
    return provenance.collect(run, threads=2)


def test_a_provenance_is_plain_and_the_same_when_nothing_changed(run, collected):
    assert json.loads(json.dumps(collected)) == collected
    assert provenance.collect(run, threads=2) == collected
    assert {"disinhib/feedback.py", "conf/train.yaml", "tune_main.py"} < set(
        collected["code"]["files"]
    )
    assert set(collected["packages"]) == set(provenance.PACKAGES)
    assert None not in collected["packages"].values()
    assert collected["machine"]["cpu"] and collected["machine"]["cores"] >= 1
    assert collected["data"]["name"] == "digits" and collected["threads"] == 2


def changed(collected, **parts):
    """A copy with `parts`, e.g. packages={"jax": "1"}; None removes."""
    copied = copy.deepcopy(collected)
    for part, values in parts.items():
        if not isinstance(values, dict):
            copied[part] = values
            continue
        into = copied["code"]["files"] if part == "files" else copied[part]
        into.update(values)
        for name in [name for name, value in values.items() if value is None]:
            into.pop(name)
    return copied


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        ({"files": {"disinhib/feedback.py": "0"}}, ["disinhib/feedback.py changed"]),
        ({"files": {"conf/x.yaml": "0"}}, ["conf/x.yaml is new"]),
        ({"files": {"tune_main.py": None}}, ["tune_main.py is gone"]),
        ({"packages": {"jax": "0.12.0"}}, ["jax 0.10.2, now 0.12.0"]),
        ({"packages": {"jax": None}}, ["jax 0.10.2, now none"]),
        ({"packages": {"orbax": "1.0"}}, ["orbax none, now 1.0"]),
        ({"python": "3.12.1"}, ["python 3.11, now 3.12"]),
        ({"data": {"sha256": "0"}}, ["data digits: other images, labels or split"]),
        ({"data": {"name": "mnist", "sha256": "0"}}, ["data digits, now mnist"]),
        (
            {"files": {"disinhib/feedback.py": "0"}, "packages": {"jax": "0.12.0"}},
            ["disinhib/feedback.py changed", "jax 0.10.2, now 0.12.0"],
        ),
        ({"python": "3.11.99"}, []),
        ({"machine": {"host": "other", "cores": 64}}, []),
        ({"code": {"commit": "0", "diff": "a README's", "version": "2"}}, []),
        ({"threads": 8}, []),
    ],
)
def test_differences_are_what_makes_results_incomparable(collected, now, lines):
    before = changed(collected, python="3.11.2", packages={"jax": "0.10.2"})
    assert provenance.differences(before, changed(before, **now)) == lines


@pytest.mark.parametrize("part", ["train", "validation", "test", "labels", "split"])
def test_the_data_hash_covers_every_image_and_label(part, monkeypatch):
    hashed = provenance._data.__wrapped__
    before = hashed("digits", None, 0.1, None)
    splits = data.load("digits", None, 0.2 if part == "split" else 0.1)
    if part == "labels":
        labels = np.roll(splits.train.labels, 1)
        splits = splits._replace(train=splits.train._replace(labels=labels))
    elif part != "split":
        images = getattr(splits, part).images.copy()
        images[-1, 20] ^= 1
        splits = splits._replace(**{part: getattr(splits, part)._replace(images=images)})
    monkeypatch.setattr(data, "load", lambda *_: splits)
    assert hashed("digits", None, 0.1, None) != before


def test_it_is_quick_and_leaves_jax_out():
    code = """
import sys, time
from types import SimpleNamespace
from sklearn.datasets import load_digits  # which training needs anyway
from disinhib.tuning import provenance

start = time.perf_counter()
provenance.collect(SimpleNamespace(dataset="digits", dataset_path=None, valid_split=0.1), 1)
print(time.perf_counter() - start, "jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, jax = done.stdout.split()
    assert jax == "False"
    assert float(seconds) < 0.5  # measured: 0.03
