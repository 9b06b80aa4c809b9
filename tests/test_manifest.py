"""What a study starts from: the trials of an earlier one, if it is to learn from them."""

from contextlib import closing

import pytest

from disinhib.errors import ConfigError
from disinhib.tuning import manifest, options, steering, study
from disinhib.tuning.event_log import (
    COMPLETE,
    FAILED,
    INITIAL,
    REPEAT,
    Asked,
    Ended,
    EpochDone,
    EventLog,
    Record,
    follow,
)
from search_spaces import SPACES

RULES = ["bp", "bp-ei", "exact-inv", "lin-thresh"]  # in the order of their turns


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """Studies whose trials have ended: by their names the space, and `failed`."""
    folder = tmp_path_factory.mktemp("studies")
    for name, space, state in (
        ("bp", "bp", COMPLETE), ("bp_ei", "bp_ei", COMPLETE), ("failed", "bp", FAILED)
    ):  # fmt: skip
        write(composed(folder, f"study={name}", f"space={space}"), state)
    return folder


def composed(folder, *words):
    return options.compose(["experiment=smoke", f"out_dir={folder}", *words])


def write(study, state):
    """The study as it is when its first four trials have ended."""
    begun = manifest.of_search(study)
    manifest.write(study.folder, begun, options.kept(study))
    propose, records = manifest.proposer(study, begun), {}
    with closing(EventLog(study.folder)) as log:
        for number in range(4):
            asked = propose(number, records)
            epochs = [EpochDone(number, n, 50.0 + number, {}, {}) for n in (1, 2)]
            log.append([asked, *epochs, Ended(number, state, 2)])


def test_repeats_are_tuned_side_by_side_each_from_the_published_defaults(tmp_path):
    study = composed(tmp_path, "space=bp", "repeats=3", "trials=2", "searcher=random")
    propose, records = manifest.proposer(study, manifest.of_search(study)), {}
    for number in range(study.all_trials):
        follow(records, propose(number, records))
    assert [record.repeat for record in records.values()] == [1, 2, 3, 1, 2, 3]
    assert len({seed for record in records.values() for seed in record.config["seeds"]}) == 6
    rates = [record.config["searched"]["optimizer.learning_rate"] for record in records.values()]
    assert rates[:3] == [1e-3] * 3
    assert len({*rates[3:]}) == 3
    assert [INITIAL in record.tags for record in records.values()] == [True] * 3 + [False] * 3
    assert propose(6, records).tags == {REPEAT: "1"}  # more trials go on in the same turns


def test_points_of_a_file_are_initial_and_those_of_a_grid_are_not(tmp_path):
    points = tmp_path / "points.yaml"
    points.write_text("[{optimizer.learning_rate: 0.002}, {optimizer.learning_rate: 0.003}]")
    of_tags = {}
    for name, own in (("file", f"points={points}"), ("grid", "searcher=grid")):
        study = composed(tmp_path, f"study={name}", "space=bp", "trials=3", own)
        propose = manifest.proposer(study, manifest.of_search(study))
        of_tags[name] = [INITIAL in propose(number, {}).tags for number in range(3)]
    assert not any(of_tags["grid"])
    assert of_tags["file"] == [True] * 3  # the published default first


def test_a_point_that_is_added_belongs_to_the_repeat_whose_turn_it_is(tmp_path):
    study = composed(tmp_path, "space=bp", "repeats=2", "trials=3", "searcher=random")
    begun, point = manifest.of_search(study), {"bp.optimizer.learning_rate": 2e-3}
    records = {}
    for number in range(3):
        follow(records, manifest.proposer(study, begun)(number, records))
    order = steering.Instruction(1, steering.ADD, point=point)
    add = manifest.adder(study, begun)
    (added,) = steering.events_of(order, records, add, lambda words: None)
    assert isinstance(added, Asked) and added.trial == 3
    assert added.config["searched"]["optimizer.learning_rate"] == 2e-3
    assert added.tags == {REPEAT: "2", steering.ADDED: "1"}


def test_each_repeat_may_validate_on_images_of_its_own(tmp_path):
    study = composed(tmp_path, "space=bp", "repeats=2", "repeat_splits=true")
    propose, records = manifest.proposer(study, manifest.of_search(study)), {}
    for number in range(4):
        follow(records, propose(number, records))
    trials = [record.config for record in records.values()]
    drawn = [trial["options"]["dataset"]["valid_seed"] for trial in trials]
    assert drawn[:2] == drawn[2:] and drawn[0] != drawn[1]
    for seed, trial in zip(drawn, trials, strict=True):
        assert f"dataset.valid_seed={seed}" in trial["command"]


@pytest.mark.parametrize(
    ("space", "earlier", "there"),
    [("bp_ei", "bp_ei", 4), ("rules", "bp_ei", 4), ("bp", "bp", 4), ("rules", "bp", 4)],
)
def test_a_study_learns_from_trials_that_lie_in_its_space(out_dir, space, earlier, there):
    study = composed(out_dir, "study=new", f"space={space}", f"warm_start={earlier}")
    begun = manifest.of_search(study)
    assert len(begun.past) == there
    assert {trial["rule"] for trial in begun.past} == {"bp-ei" if earlier == "bp_ei" else "bp"}
    assert [trial["scores"] for trial in begun.past] == [[50.0 + n] * 2 for n in range(4)]
    turn = RULES.index(begun.past[0]["rule"]) if space == "rules" else 0
    proposal = manifest.proposer(study, begun)(turn, {})
    assert isinstance(proposal, Asked) and proposal.config["rule"] == begun.past[0]["rule"]


@pytest.mark.parametrize("space", ["feedback_paths", "exact_inv", "bp"])
def test_an_earlier_study_none_of_whose_trials_lies_in_the_space_is_refused(out_dir, space):
    """Back-propagation through the E-I network is another rule than bp."""
    study = composed(out_dir, "study=new", f"space={space}", "warm_start=bp_ei")
    with pytest.raises(ConfigError) as refusal:
        manifest.of_search(study)
    assert str(refusal.value) == (
        "warm_start: given bp_ei, allowed is a study with trials that lie in"
        f" space={space} (it has none)"
    )


def test_nothing_is_learnt_from_failed_trials(out_dir):
    with pytest.raises(ConfigError, match=r"^warm_start: given failed, .* \(it has none\)$"):
        manifest.of_search(composed(out_dir, "study=new", "space=bp", "warm_start=failed"))


def test_a_point_that_is_added_has_the_next_turn_of_its_rule(tmp_path):
    """After the initial points, and asking for those in between as they would have been."""
    study = composed(tmp_path, "study=new", "trials=12")
    begun = manifest.of_search(study)
    propose, add = manifest.proposer(study, begun), manifest.adder(study, begun)
    point = {"trainer": "exact-inv", "exact-inv.optimizer.learning_rate": 0.005}
    trials = add(point, {})
    assert [trial.config["rule"] for trial in trials] == [*RULES, *RULES[:3]]
    assert trials[6].config["searched"]["optimizer.learning_rate"] == 0.005
    records = {}
    for number, trial in enumerate(trials[:6]):
        assert trial == propose(number, records)
        follow(records, trial)
    asked = lambda count: {number: Record(trials[0].config) for number in range(count)}
    later = add({**point, "trainer": "bp"}, asked(7))
    assert [trial.trial for trial in later] == [7, 8]
    assert add(point, asked(11)) == []


def test_a_study_of_a_space_that_branches_on_the_number_of_a_trial(tmp_path, monkeypatch):
    """Its first branch is what is checked and pinned; trials are asked for each in its own."""

    def space(trial):
        options = ("learning_rate", "b1")
        name = options[trial.number % 2]
        value = trial.suggest_float(f"bp.optimizer.{name}", 1e-3, 1e-2)
        return {"model/vf": "non-dale", "trainer": "bp", f"optimizer.{name}": value}

    monkeypatch.setitem(SPACES, "alternating", space)
    study = composed(tmp_path, "study=new", "space=alternating")
    write(study, COMPLETE)
    with closing(EventLog(study.folder)) as log:
        asked = [e.event for e in log.events() if isinstance(e.event, Asked)]
    assert [[*event.point["params"]] for event in asked] == [
        ["bp.optimizer.learning_rate"], ["bp.optimizer.b1"]
    ] * 2  # fmt: skip
    # And one that learns from it.
    more = composed(tmp_path, "study=more", "space=alternating", "warm_start=new")
    assert len(manifest.of_search(more).past) == 2


def test_of_two_studies_without_a_name_each_gets_one(tmp_path):
    job = study.job(composed(tmp_path))
    assert job.numbered
    names = [manifest.write(job.folder, job.manifest, job.kept, job.numbered) for _ in range(3)]
    assert names == ["smoke", "smoke-2", "smoke-3"]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == names
    with pytest.raises(ConfigError, match="it has just been taken"):
        manifest.write(job.folder, job.manifest, job.kept)


def test_nobody_else_reads_the_options_which_may_hold_a_password(tmp_path):
    job = study.job(composed(tmp_path))
    manifest.write(job.folder, job.manifest, job.kept)
    assert (job.folder / "study.yaml").stat().st_mode & 0o077 == 0
