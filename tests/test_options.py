"""A study's options: what is refused, in one line and before anything is written; and what they
give."""

import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import yaml

from disinhib import hydra_config
from disinhib.errors import ConfigError, InputError, masked
from disinhib.metrics import SELECTION
from disinhib.tuning import manifest, options, space_tree, study
from search_spaces import SPACES

ROOT = Path(__file__).parent.parent
source, tiny_space = tiny.source, tiny.tiny_space


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """`refuse(*overrides)`: the line with which a study is refused; nothing is written."""
    monkeypatch.chdir(tmp_path)

    def refused(*overrides):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError) as refusal:
            study.job(options.compose([f"out_dir={tmp_path / 'out'}", *overrides]))
        assert sorted(tmp_path.iterdir()) == before
        line = str(refusal.value)
        assert "\n" not in line
        return line

    return refused


REFUSED = {
    "space=rulez": ["space: given rulez", "rules, all_rules", "did you mean rules?"],
    "trials=0": ["trials: given 0", "at least 1"],
    "trials=2.5": ["trials: given 2.5", "whole number"],
    "trails=5": ["trails: unknown option", "did you mean trials?"],
    "+searcher.seed=5": ["searcher.seed: unknown option"],
    "scheduler=ahsa": ["scheduler: given ahsa", "asha"],
    "searcher.n_startup=3": ["searcher.n_startup: unknown option", "n_startup_trials"],
    "scheduler.grace_period=99": ["scheduler.grace_period: given 99", "1 to epochs"],
    "metric=test_accuracy": ["metric: given test_accuracy", "valid_accuracy"],
    "mode=maximum": ["mode: given maximum", "one of max, min"],
    "seed=null": ["seed: given null", "whole number"],
    "batchsize=100000": ["batchsize: given 100000", "1150"],
    "epochs=-1": ["epochs: given -1", "at least 1"],
    "replicates=0": ["replicates: given 0", "at least 1"],
    "device=gpu": ["device: given gpu", "cluster.gpus_per_trial"],
    "resume=out": ["resume: given out", "true, false or auto"],
    "resume=auto": ["resume: given auto", "without the name of a study (study=NAME)"],
    "cluster.gpus_per_trial=1.5": ["cluster.gpus_per_trial: given 1.5", "a share of a GPU below 1"],
    "cluster.gpus_per_trial=2": ["cluster.gpus_per_trial: given 2", "or 1"],
    "out_dir=s3://bucket/out": ["out_dir: given s3://bucket/out", "a folder that all machines"],
    "gpu_id=1": ["gpu_id: given 1", "Ray chooses"],
    "resume=true": ["resume: given true", "false without the name of a study (study=NAME)"],
    "extend=true": ["extend: given true", "false without the name of a study (study=NAME)"],
    "scheduler.reduction_factor=1": ["scheduler.reduction_factor: given 1", "above 1"],
    "searcher.multivariate=false": ["searcher.group: given true", "searcher.multivariate"],
    "study=a/b": ["study: given a/b", "a folder's name"],
    "cluster.cpus_per_trial=0.5": ["cluster.cpus_per_trial: given 0.5", "whole number"],
    "mode=min": ["mode: given min", "max for metric=valid_accuracy"],
    "metric=alignment_angle": ["metric: given alignment_angle", "diagnostics.alignment=true"],
    "test_at_end=true": ["test_at_end: given true", "must not see the test set"],
    "space=[bp,rules]": ["space: given ['bp', 'rules']", "one of rules, all_rules"],
    "study=mlflow.db": ["study: given mlflow.db", "but not mlflow.db"],
    f"study={'x' * 101}": ["study: given xxx", "at most 100 characters"],
    "experiment=nonsense": ["experiment: given nonsense", "one of fmnist_rules, smoke"],
    "~trials": ["~trials: has no meaning here"],
    "hydra.run.dir=x": ["hydra.run.dir=x: has no meaning here"],
    f"{'x' * 5000}=1": ["unknown option"],
    f"seed={'9' * 5000}": ["not understood"],
    f"seed={'9' * 40}": ["from 0 to 2147483647"],
    "tracking.uri=": ["tracking.uri: given ", "a text, or null"],
    "cluster.max_concurrent=0": ["cluster.max_concurrent: given 0", "at least 1"],
    "model/vf=dale": ["model/vf: given dale", "space=rules sets non-dale"],
    "trainer=backprop": ["trainer: given backprop, allowed is one of bp, bp-ei, exact-inv"],
    "optimizer.learning_rate=-1": ["optimizer.learning_rate: given -1", "above 0"],
    "search.optimizer.learning_rate=0.1": ["given 0.1", "[LOW,HIGH], two numbers above 0"],
    "search.optimizer.learning_rate=[0,1]": ["two numbers above 0, LOW below HIGH"],
    "search.optimizer.learning_rate=[0.1,0.01]": ["given [0.1, 0.01]", "LOW below HIGH"],
    "search.optimizer.rate=[0.1,0.2]": ["space=rules does not search it; did you mean optimizer.l"],
    "search.trainer=[bp,backprop]": [
        "search.trainer: given ['bp', 'backprop']",
        "some of bp, bp-ei, ex",
    ],
    "search.trainer.strong_fb=true": ["search.trainer.strong_fb: given true", "a list of choices"],
    "search.trainer=[bp": ["not understood"],
    "search.trainer.strong_fb=[[1,2],[3]]": ["given [[1, 2], [3]]", "a list of choices"],
    "trainer=bp,lin-thresh": ["trainer: given bp,lin-thresh", "or search.trainer=[...]"],
    "dataset.path=nowhere": ["dataset.path", "nowhere"],
    "out_dir=/dev/null/out": ["out_dir: given /dev/null/out", "folder that can be written"],
    "warm_start=nothing": ["warm_start: given nothing", "the name of a study in "],
    "points=nowhere.yaml": ["points: given nowhere.yaml", "No such file"],
    "checkpoints.keep_best=-1": ["checkpoints.keep_best: given -1", "at least 0"],
    "checkpoints.cap_gb=0": ["checkpoints.cap_gb: given 0", "above 0"],
}


@pytest.mark.parametrize("override", REFUSED)
def test_an_option_that_cannot_be_is_refused(override, refuse):
    line = refuse(override)
    for part in REFUSED[override]:
        assert part in line


TOGETHER = {
    ("device=cpu", "cluster.gpus_per_trial=1"): ["device: given cpu", "auto or gpu"],
    ("study=x", "resume=true", "extend=true"): ["extend: given true", "false with resume=true"],
    ("study=x", "resume=true"): ["study: given x", "none: there is no study"],
    ("study=x", "extend=true"): ["study: given x", "none: there is no study"],
    ("searcher=grid", "space=bp"): ["trials: given 60", "at most 3, the whole grid"],
    ("repeats=2", "warm_start=x"): ["repeats: given 2", "allowed is 1", "not independent"],
    ("repeats=2", "searcher=grid", "space=bp"): ["repeats: given 2", "the same points"],
    ("repeat_splits=true", "warm_start=x"): ["repeat_splits: given true", "other images"],
    ("repeat_splits=true", "dataset.valid_seed=5"): ["repeat_splits: given true", "valid_seed"],
    ("study=x", "extend=true", "repeats=0"): ["repeats: given 0", "at least 1"],
    ("searcher=gp", "searcher.batch=0"): ["searcher.batch: given 0", "at least 1"],
}


@pytest.mark.parametrize("overrides", TOGETHER)
def test_what_does_not_go_together_likewise(overrides, refuse):
    line = refuse(*overrides)
    for part in TOGETHER[overrides]:
        assert part in line


@pytest.mark.parametrize(("searcher", "package"), [("gp", "torch"), ("cmaes", "cmaes")])
def test_a_searcher_whose_package_is_missing_is_refused(searcher, package, monkeypatch, refuse):
    without = lambda name, *rest: None if name == package else find_spec(name, *rest)
    monkeypatch.setattr("importlib.util.find_spec", without)
    line = refuse(f"searcher={searcher}")
    assert line.startswith(f"searcher: given {searcher}, allowed is another without the")
    assert line.endswith(package)


POINTS = {
    "- {trainer: bp, optimizer.learning_rat: 0.01}": ["point 1", "optimizer.learning_rat"],
    "- {trainer: bp, optimizer.learning_rate: 7}": ["point 1", "optimizer.learning_rate: given 7"],
    "- {optimizer.learning_rate: 0.01}": ["point 1", "trainer: missing"],
    "trainer: bp": ["not a list of points"],
}


@pytest.mark.parametrize("text", POINTS)
@pytest.mark.usefixtures("tiny_space")
def test_a_point_that_is_not_in_the_space_is_refused(text, tmp_path, refuse):
    points = tmp_path / "points.yaml"
    points.write_text(text)
    line = refuse(*tiny.STUDY, f"points={points}")
    for part in POINTS[text]:
        assert part in line


def test_the_real_command_refuses_likewise(tmp_path):
    refused = subprocess.run(
        [sys.executable, str(ROOT / "tune_main.py"), "trails=5"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    expected = (2, "", "error: trails: unknown option; did you mean trials?\n")
    assert (refused.returncode, refused.stdout, refused.stderr) == expected
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_taken_is_refused_and_a_default_one_is_numbered(tmp_path):
    (tmp_path / "bp-digits").mkdir()
    with pytest.raises(ConfigError, match=r"study: given bp-digits, .* or resume=true"):
        options.compose(["study=bp-digits", f"out_dir={tmp_path}"])
    assert options.compose(["space=bp", f"out_dir={tmp_path}"]).name == "bp-digits-2"


# What narrows the search space.

RATE, STRONG = "optimizer.learning_rate", "trainer.strong_fb"


def searched_by(*overrides):
    """(the study, the parameters of its space, a trial of each branch)."""
    asked = options.compose(overrides)
    branches = list(space_tree.branches(asked.search_space))
    trials = [options.configure(asked, 0, branch.overrides) for branch in branches]
    return asked, space_tree.definition(asked.search_space)["parameters"], trials


def test_a_searched_option_that_is_given_is_fixed_and_the_others_are_searched():
    _, before, _ = searched_by()
    asked, parameters, trials = searched_by(f"{RATE}=1e-3", f"{STRONG}=true")
    assert asked.fixed == {RATE: 1e-3, STRONG: True}
    nudges = {name for name in before if name.endswith(".trainer.target_nudge")}
    gone = {name for name in before if name.endswith((RATE, STRONG))} | nudges  # only if not strong
    assert nudges and parameters == {name: before[name] for name in before.keys() - gone}
    assert {trial["rule"] for trial in trials} == {"bp", "bp-ei", "exact-inv", "lin-thresh"}
    for trial in trials:
        assert trial["options"]["optimizer"]["learning_rate"] == 1e-3
        assert trial["options"]["trainer"].get("strong_fb", True) is True
    points = options.first_points(asked)  # the published defaults, where they are allowed
    assert points and not any(name.endswith((RATE, STRONG)) for point in points for name in point)


def test_the_rule_is_fixed_like_any_other_choice():
    for rule in ("exact-inv", "bp", "bp-ei"):  # under the name by which it competes
        asked, parameters, trials = searched_by(f"trainer={rule}")
        assert {name.partition(".")[0] for name in parameters} == {rule}
        assert {trial["rule"] for trial in trials} == {rule}
        assert space_tree.rules_of(asked.search_space) == []


def test_what_is_fixed_is_so_in_every_branch_that_has_it():
    """Also where another choice rules it out of the search."""
    asked, _, trials = searched_by(f"{STRONG}=true", "trainer.target_nudge=0.2")
    assert asked.fixed == {STRONG: True, "trainer.target_nudge": 0.2}
    nudges = {trial["rule"]: trial["options"]["trainer"].get("target_nudge") for trial in trials}
    assert nudges == {"bp": None, "bp-ei": None, "exact-inv": 0.2, "lin-thresh": 0.2}


def test_an_experiment_fixes_what_it_sets(tmp_path, monkeypatch):
    shutil.copytree(hydra_config.CONFIGURATIONS, tmp_path / "conf")
    monkeypatch.setattr(hydra_config, "CONFIGURATIONS", tmp_path / "conf")
    file = tmp_path / "conf" / "experiment" / "slow.yaml"
    text = "space: bp\nmax_weight: 500\noptimizer:\n  learning_rate: ${max_weight}\n"
    file.write_text(f"# @package _global_\n{text}")
    asked, parameters, trials = searched_by("experiment=slow")
    assert (asked.fixed, parameters) == ({RATE: 500}, {})
    assert {trial["options"]["optimizer"]["learning_rate"] for trial in trials} == {500}
    _, parameters, _ = searched_by("experiment=slow", f"search.{RATE}=[1e-4,1e-2]")
    assert list(parameters) == [f"bp.{RATE}"]


def test_a_range_and_choices_may_be_others():
    _, parameters, trials = searched_by(
        f"search.{RATE}=[1e-5,1]", "search.trainer=[bp,lin-thresh]", f"search.{STRONG}=[true]"
    )
    assert {name.partition(".")[0] for name in parameters} == {"trainer", "bp", "lin-thresh"}
    assert parameters["trainer"]["choices"] == ["bp", "lin-thresh"]
    assert parameters[f"lin-thresh.{STRONG}"]["choices"] == [True]
    for rule in ("bp", "lin-thresh"):
        rate = parameters[f"{rule}.{RATE}"]
        assert (rate["low"], rate["high"], rate["log"]) == (1e-5, 1.0, True)
    assert {trial["options"]["optimizer"]["learning_rate"] for trial in trials} == {1e-5, 1.0}
    # A default outside of it is not tried first.
    high, _, _ = searched_by("space=bp", f"search.{RATE}=[0.5,1]")
    assert options.first_points(high) == []


def test_what_contradicts_itself_or_is_nowhere_is_refused(refuse):
    line = refuse(f"search.{RATE}=[1e-4,1]", f"{RATE}=0.1")
    assert line == f"search.{RATE}: given with {RATE}=0.1, needed is one"
    assert f"{STRONG}: unknown option here" in refuse("trainer=bp", f"{STRONG}=true")


def test_a_trial_of_a_narrowed_study_is_its_command():
    asked, _, trials = searched_by("space=bp", f"{RATE}=0.005", "batchsize=50")
    assert trials[0]["command"].startswith("python -m disinhib optimizer.learning_rate=0.005 ")
    assert options.kept(asked)["overrides"] == ["space=bp", f"{RATE}=0.005", "batchsize=50"]


# What they give.

EXPERIMENTS = {
    name: (ROOT / f"conf/experiment/{name}.yaml").read_text()
    for name in hydra_config.choices_of("experiment")
}
STUDIES = [name for name, text in EXPERIMENTS.items() if "\ngrid:" not in text]


@pytest.mark.parametrize("name", STUDIES)
def test_every_branch_of_an_experiments_space_composes(name):
    """(Without its data, which need not be here.)"""
    asked = options.compose([f"experiment={name}"])
    for branch in space_tree.branches(SPACES[asked.space]):
        trial = options.configure(asked, 0, branch.overrides)
        assert trial["epochs"] == asked.epochs and trial["searched"] == branch.overrides
        assert trial["final"] is False


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - STUDIES))
def test_a_grid_is_no_study(name):
    with pytest.raises(ConfigError, match=r"needed is python -m analysis\.retrain experiment="):
        options.compose([f"experiment={name}"])


def test_a_grid_leaves_out_what_is_known():
    asked = options.compose(["searcher=grid", "space=bp", "trials=2"])
    default, *rest = options.first_points(asked)
    assert options.first_points(asked, rest[:1]) == [default, *rest[1:]]
    with pytest.raises(ConfigError, match="trials: given 2, allowed is at most 1"):
        options.first_points(asked, rest)


def test_more_points_than_trials_of_their_rule_are_refused(tmp_path):
    file = tmp_path / "points.yaml"
    file.write_text(yaml.safe_dump([{"trainer": "exact-inv", "model.vf.g_EI": 1.5}] * 2))
    asked = options.compose([f"points={file}", "trials=10"])
    with pytest.raises(ConfigError, match="trials: given 10, allowed is at least 11"):
        options.first_points(asked)
    assert len(options.first_points(replace(asked, trials=11))) == 6


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("storage=postgresql://me:secret@host/db x@y", "storage=postgresql://me:***@host/db x@y"),
        ("http://me:p@ss@host:5000", "http://me:***@host:5000"),
        ("https://token@host", "https://***@host"),
        (
            "postgresql://me@host/db?sslPassword=x&a=b",
            "postgresql://me@host/db?sslPassword=***&a=b",
        ),
        ("http://host?access_token=x", "http://host?access_token=***"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
    ],
)
def test_passwords_in_addresses_are_masked(text, shown):
    assert masked(text) == shown


def test_options_are_checked_together_as_they_were_given():
    asked = options.compose(["epochs=100", "scheduler.grace_period=50"])
    assert asked.scheduler["grace_period"] == 50


@pytest.mark.parametrize("address", ["nonsense", "local", "1", "ray://h:1", "http://h:1", "h:"])
def test_an_address_of_no_cluster_is_refused(address):
    with pytest.raises(ConfigError, match=r"cluster\.address: given .* auto or HOST:PORT"):
        options.compose([f"cluster.address={address}"])


def test_a_place_may_refer_to_the_environment_or_to_nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("MINE", str(tmp_path))
    asked = options.compose(["dataset.path=${oc.env:MINE}/mnist"])
    assert asked.options["dataset"]["path"] == f"{tmp_path}/mnist"
    monkeypatch.chdir(tmp_path)
    asked = options.compose(["dataset.path=~nosuchuser/mnist"])
    assert asked.options["dataset"]["path"] == f"{tmp_path}/~nosuchuser/mnist"


def test_other_files_and_those_of_another_user_are_no_study(monkeypatch, tmp_path):
    other = tmp_path / "other" / "study.yaml"
    other.parent.mkdir()
    other.write_bytes(b"\xff")
    place = f"out_dir={tmp_path}"
    with pytest.raises(ConfigError, match="study: given other, allowed is none: there is no study"):
        options.compose([place, "study=other", "resume=true"])
    read = Path.read_text

    def refused(file, *_):
        if file == other:
            raise PermissionError(13, "Permission denied")
        return read(file, *_)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(ConfigError, match=r"study: given other, .* is another user's"):
        options.compose([place, "study=other", "resume=true"])
    with pytest.raises(ConfigError, match="study: given typo, allowed is none"):
        options.compose([place, "study=typo", "resume=true"])
    with pytest.raises(ConfigError, match=r"warm_start: given other, .* denied"):
        manifest.of_search(options.compose([place, "warm_start=other"]))


def test_the_mode_follows_the_metric(tmp_path):
    out = f"out_dir={tmp_path}"
    sign = lambda *words: SELECTION[options.compose([out, *words]).metric].sign
    assert sign("metric=valid_loss") == -1 == sign("metric=valid_loss", "mode=min")
    assert sign() == 1
    assert sign("metric=alignment_angle", "diagnostics.alignment=true", "mode=min") == -1


def test_an_experiment_gives_a_study_its_name(tmp_path):
    place = f"out_dir={tmp_path}"
    assert options.compose([place]).name == "rules-digits"
    assert options.compose([place, "experiment=smoke"]).name == "smoke"
    (tmp_path / "smoke").mkdir()
    assert options.compose([place, "experiment=smoke"]).name == "smoke-2"
    assert options.compose([place, "experiment=smoke", "study=mine"]).name == "mine"


@pytest.mark.parametrize("name", ["1", "1e3", "true", "0x1", "007", "dünn"])
def test_any_text_is_a_name(name, tmp_path):
    assert options.compose([f"out_dir={tmp_path}", f"study={name}"]).name == name


@pytest.mark.parametrize("name", ["lr=0.1 (a)", "a,b", "it's", "[x]", "{y}", "a: b", "é –", "'q'x"])
def test_any_folder_is_a_folder(name, tmp_path):
    asked = options.compose([f"out_dir={tmp_path / name}"])
    assert asked.out_dir == tmp_path / name


def test_relative_places_mean_the_same_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = options.compose(["searcher.storage=sqlite:///x.db", "tracking.uri=sqlite:///y.db"])
    assert asked.searcher["storage"] == f"sqlite:///{tmp_path}/x.db"
    assert asked.tracking["uri"] == f"sqlite:///{tmp_path}/y.db"
    assert f"searcher.storage=sqlite:///{tmp_path}/x.db" in asked.overrides


def test_the_environments_store_is_kept_with_the_study_but_no_password(tmp_path, monkeypatch):
    place = f"out_dir={tmp_path}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert options.compose([place]).tracking["uri"] == "http://there:5000"
    assert options.compose([place, "tracking.uri=http://h"]).tracking["uri"] == "http://h"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@there:5000")
    asked = options.compose([place])
    assert asked.tracking["uri"] == "http://me:secret@there:5000"
    assert "secret" not in str(options.kept(asked))


def test_one_command_begins_a_study_and_goes_on_with_it(tmp_path):
    words = [f"out_dir={tmp_path}", "study=mine", "trials=5", "resume=auto"]
    first = options.compose(words)
    assert not first.resume
    manifest.write(first.folder, study.job(first).manifest, options.kept(first))
    again = options.compose(words)
    assert again.resume and again.trials == 5
    assert options.compose([*words, "trials=6"]).trials == 6
    with pytest.raises(ConfigError, match=r"mine ran with epochs=20 \(now 6\)"):
        options.compose([*words, "epochs=6"])


@pytest.mark.parametrize(
    ("begun", "resumed", "store"),
    [
        ("", "http://another:5000", "sqlite:///{out}/mlflow.db"),
        ("sqlite:///a.db", "", "sqlite:///{cwd}/a.db"),
        ("http://there:5000", "http://another:5000", "http://there:5000"),
        ("http://me:secret@there:5000", "http://me:new@there:5000", "http://me:new@there:5000"),
    ],
)
def test_a_study_goes_on_in_its_own_store(begun, resumed, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", begun)
    asked = options.compose(["study=mine"])
    manifest.write(asked.folder, study.job(asked).manifest, options.kept(asked))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", resumed)
    store = store.format(cwd=tmp_path, out=tmp_path / "out")
    for how in ("resume", "extend"):
        assert options.compose(["study=mine", f"{how}=true"]).tracking["uri"] == store
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if "secret" in begun:
        with pytest.raises(ConfigError, match=r"tracking\.uri: missing, as a study keeps"):
            options.compose(["study=mine", "resume=true"])
    else:
        assert options.compose(["study=mine", "resume=true"]).tracking["uri"] == store
