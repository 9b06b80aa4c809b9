"""Going on with a study, or from one: what stays, what may change, and what is refused."""

import hashlib
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import tiny
import yaml

from disinhib.errors import ConfigError, InputError
from disinhib.tuning import manifest, options, provenance, resume, study
from disinhib.tuning.event_log import COMPLETE, Asked, Ended, EpochDone, EventLog
from search_spaces import SPACES

ROOT = Path(__file__).parent.parent
ALONE = ("experiment=smoke", "cluster.max_concurrent=1")  # as each worker takes seconds to start
source, tiny_space = tiny.source, tiny.tiny_space
pytestmark = pytest.mark.usefixtures("copied_stores", "mlflow_here")


@pytest.fixture(scope="module")
def begun(tiny_space, tmp_path_factory):
    """A study that can be resumed."""
    return tiny.begin(f"out_dir={tmp_path_factory.mktemp('begun')}")


def contents(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def refuse(begun):
    """`refuse(*overrides)`: the line with which a study in the folder of `begun` is refused, which
    stays as it was."""

    def refused(*overrides):
        before = contents(begun.out_dir)
        with pytest.raises(InputError) as refusal:
            study.run(options.compose([f"out_dir={begun.out_dir}", *overrides]), tiny.quiet())
        assert contents(begun.out_dir) == before
        line = str(refusal.value)
        assert "\n" not in line
        return line

    return refused


@pytest.fixture
def go_on(begun, refuse):
    return lambda *overrides: refuse(f"study={begun.name}", "resume=true", *overrides)


def test_an_unknown_study_is_refused_with_those_that_there_are(begun, refuse):
    line = refuse("study=tinny", "resume=true")
    assert f"study: given tinny, allowed is one of {begun.name}" in line


def test_a_study_is_not_resumed_with_other_options(go_on):
    line = go_on("trials=9", "optimizer.b1=0.5", "scheduler=median")
    assert "trials" not in line
    assert "optimizer.b1=0.9 (now 0.5)" in line
    assert "scheduler.name=asha (now median)" in line
    assert "epochs" not in line
    assert line.endswith("study=smoke extend=true")


def test_it_may_have_more_trials_but_not_fewer(go_on, tiny_space, one_ray, tmp_path):
    """For good: whoever resumes it later need not say so again."""
    assert "trials: given 6, allowed is at least 7, which the study has" in go_on("trials=6")
    words = [*ALONE, "space=tiny", "study=mine", f"out_dir={tmp_path}", "resume=auto"]
    run = lambda *more: study.run(options.compose([*words, *more]), tiny.quiet(), tiny.played())
    first = [record.config for record in run("trials=2").records]
    more = options.compose([*words, "trials=4"])
    assert study.resume_command(more, "mine").endswith(" resume=true trials=4")
    again = run("trials=4")
    assert study.resume_command(more, "mine").endswith(" resume=true")
    assert [record.config for record in again.records][:2] == first and again.whole
    assert len(again.records) == 4
    kept = yaml.safe_load((tmp_path / "mine" / resume.FILE).read_text())
    assert kept["options"]["trials"] == 4 and kept["overrides"][-1] == "trials=4"
    assert len(run().records) == 4


def test_what_is_fixed_stays_so(tiny_space, one_ray, tmp_path):
    words = [*ALONE, "space=tiny", "study=mine", f"out_dir={tmp_path}", "resume=auto"]
    fixed = "optimizer.learning_rate=0.004"
    run = lambda *more: study.run(options.compose([*words, *more]), tiny.quiet(), tiny.played())
    for trials in (2, 4):
        done = run(f"trials={trials}", *([fixed] if trials == 2 else []))
        rates = [record.config["options"]["optimizer"]["learning_rate"] for record in done.records]
        assert rates == [0.004] * trials
        assert not any(
            n.endswith("rate") for record in done.records for n in record.point["params"]
        )
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.004, now 0\.005"):
        run("optimizer.learning_rate=0.005")


def test_it_may_go_on_elsewhere(begun):
    """Where it runs and writes is no part of what it does."""
    asked = options.compose([
        f"study={begun.name}", f"out_dir={begun.out_dir}", "resume=true",
        "cluster.max_concurrent=4", "tracking.uri=http://elsewhere", "checkpoints.every_seconds=1",
    ])  # fmt: skip
    assert study.job(asked).manifest == manifest.read(begun.folder, begun.name)


def test_a_study_is_not_resumed_with_another_search_space(go_on, monkeypatch):
    def other(trial):
        return {**tiny.space(trial), "optimizer.b1": 0.5}

    def faster(trial):
        rate = trial.suggest_float("bp.optimizer.learning_rate", 1e-3, 5e-2, log=True)
        return {"model/vf": "non-dale", "trainer": "bp", "optimizer.learning_rate": rate}

    monkeypatch.setitem(SPACES, "tiny", other)
    assert "optimizer.b1: not set, now 0.5" in go_on()
    monkeypatch.setitem(SPACES, "tiny", faster)
    line = go_on()
    assert "bp.optimizer.learning_rate: 0.001 to 0.02 (log), now 0.001 to 0.05 (log)" in line
    assert "trainer: one of bp, exact-inv, lin-thresh, now not searched" in line
    assert line.endswith("study=smoke extend=true")


def test_a_study_is_not_resumed_with_other_code(go_on, monkeypatch):
    real = provenance.code

    def changed(root):
        code = real(root)
        files = {**code["files"], "disinhib/feedback.py": "0", "disinhib/new.py": "0"}
        del files["disinhib/losses.py"]
        return {**code, "files": files}

    monkeypatch.setattr(provenance, "code", changed)
    line = go_on()
    assert "disinhib/feedback.py changed" in line
    assert "disinhib/new.py is new" in line
    assert "disinhib/losses.py is gone" in line


def test_a_study_of_another_version_is_not_resumed(tiny_space, tmp_path):
    old = tiny.begin(f"out_dir={tmp_path}")
    (old.folder / manifest.MANIFEST).rename(old.folder / "origin.json")
    words = [f"study={old.name}", f"out_dir={tmp_path}", "resume=true"]
    with pytest.raises(InputError, match=r"has no manifest\.json that this version can read"):
        study.job(options.compose(words))


def test_a_study_is_not_resumed_while_another_process_runs_it(begun, go_on):
    hold = (
        "import sys; from pathlib import Path; from disinhib.tuning.event_log import EventLog;"
        "log = EventLog(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, begun.folder],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout and other.stdout.readline() == b"open\n"
        line = go_on()
        other.communicate()
    assert f"study: {begun.folder} is open in another process" in line


# From one.


def test_what_it_learns_from_must_be_comparable(begun, refuse):
    line = refuse(
        *tiny.STUDY, "study=new", "metric=valid_loss", "mode=min", f"warm_start={begun.name}"
    )
    assert f"warm_start: {begun.name} had metric=valid_accuracy, and this study has" in line


def test_a_study_of_an_earlier_version_had_one_repeat_and_the_same_split(tiny_space, tmp_path):
    old = tiny.begin(f"out_dir={tmp_path}", "study=old")
    content = yaml.safe_load((old.folder / resume.FILE).read_text())
    for name in ("repeats", "repeat_splits"):
        del content["options"][name]
    del content["options"]["dataset"]["valid_seed"]
    resume.keep(old.folder, content)
    place = f"out_dir={tmp_path}"
    again = options.compose([place, "study=old", "resume=true"])
    assert (again.repeats, again.options) == (1, {**old.options, "resume": True})
    study.job(options.compose([place, "study=old", "extend=true"]))
    study.job(options.compose([*tiny.STUDY, place, "study=new", "warm_start=old"]))


@pytest.mark.parametrize("repeats", [1, 2])
def test_nothing_learns_from_scores_on_other_images(repeats, tiny_space, tmp_path):
    place = f"out_dir={tmp_path}"
    tiny.begin(place, "study=old", f"repeats={repeats}", "repeat_splits=true")
    with pytest.raises(ConfigError, match="warm_start: old is a study whose repeats validated"):
        study.job(options.compose([*tiny.STUDY, place, "study=new", "warm_start=old"]))
    with pytest.raises(
        ConfigError, match=r"^(repeats: given 2|repeat_splits: given true), allowed"
    ):
        options.compose([place, "study=old", "extend=true"])
    with pytest.raises(ConfigError, match=r"resume it as it was, or start a new one$"):
        options.compose([place, "study=old", "resume=true", "epochs=7"])


def test_what_another_version_had_learnt_from_is_refused(tiny_space, tmp_path):
    old = tiny.begin(f"out_dir={tmp_path}")
    file = old.folder / manifest.MANIFEST
    past = [{"rule": "bp", "point": {}, "scores": [], "state": COMPLETE}]  # before there was more
    file.write_text(json.dumps({**json.loads(file.read_text()), "past": past}))
    words = [*tiny.STUDY, "study=new", f"out_dir={tmp_path}", f"warm_start={old.name}"]
    with pytest.raises(ConfigError, match=r"has no manifest\.json that this version can read"):
        study.job(options.compose(words))


def test_what_it_learns_from_must_lie_in_its_space(tiny_space, tmp_path, monkeypatch):
    first = tiny.begin(f"out_dir={tmp_path}", "study=first")
    propose = manifest.proposer(first, manifest.read(first.folder, "first"))
    with closing(EventLog(first.folder)) as log:
        asked = propose(0, {})
        log.append([
            asked,
            EpochDone(0, 1, 50.0, {"valid_accuracy": [50.0]}, {"host": "h", "device": "cpu"}),
            Ended(0, COMPLETE, 1),
        ])  # fmt: skip
    assert isinstance(asked, Asked) and asked.config["rule"] == "bp"
    words = [*tiny.STUDY, f"out_dir={tmp_path}", "warm_start=first"]
    (past,) = study.job(options.compose([*words, "study=second"])).manifest.past
    assert (past["rule"], past["scores"], past["state"]) == ("bp", [50.0], COMPLETE)

    def without_bp(trial):
        gain = trial.suggest_float("model.vf.g_EI", 0.5, 2.0)
        return {"model/vf": "dale", "trainer": "exact-inv", "model.vf.g_EI": gain}

    monkeypatch.setitem(SPACES, "tiny", without_bp)
    with pytest.raises(InputError, match=r"warm_start: given first, .* \(it has none\)"):
        study.job(options.compose([*words, "study=third"]))


@pytest.fixture
def first(tmp_path):
    """`first(*overrides)` keeps the options of a study; gives those that name it to extend it."""

    def keep(*overrides):
        asked = options.compose(["study=first", f"out_dir={tmp_path}", *overrides])
        asked.folder.mkdir(parents=True)
        (asked.folder / resume.FILE).write_text(yaml.safe_dump(options.kept(asked)))
        return ["study=first", "extend=true", f"out_dir={tmp_path}"]

    return keep


def test_what_was_given_for_a_searcher_goes_with_it(first):
    place = first("searcher.n_ei_candidates=50", "trials=9")
    assert options.compose(place).searcher["n_ei_candidates"] == 50
    other = options.compose([*place, "searcher=random"])
    assert (other.searcher["name"], other.trials) == ("random", 9)


def test_an_extension_proposes_other_trials_unless_its_seed_is_given(first):
    place = first("seed=3")
    assert options.compose(place).seed == 4
    assert options.compose([*place, "seed=3"]).seed == 3


def test_the_folder_of_a_study_has_its_options_and_what_it_started_from(begun):
    kept = yaml.safe_load((begun.folder / resume.FILE).read_text())
    assert kept["options"]["space"] == "tiny" and kept["options"]["trials"] == tiny.TRIALS
    assert {*tiny.STUDY} <= {*kept["overrides"]}
    pinned = json.loads((begun.folder / manifest.MANIFEST).read_text())
    assert pinned.keys() == {"id", "provenance", "space", "points", "past"}
