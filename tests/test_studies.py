# pyright: reportArgumentType=false
"""Studies as things: one small study and its retraining, with the real stores, listed, steered,
renamed, exported, deleted and imported again."""

import hashlib
import io
import json
import platform
import re
import shutil
import threading
import zipfile
from contextlib import closing, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import optuna
import pandas as pd
import pytest
import tiny
import yaml
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from analysis import (
    configurations,
    replay,
    retrain,
    runs,
    selection,
    store as stores,
    studies,
    supplement,
)
from analysis.report import __main__ as report
from disinhib.errors import ConfigError, InputError
from disinhib.tuning import event_log, inventory, lease, manifest, options, steering, upkeep
from disinhib.tuning.event_log import COMPLETE, PRUNED, Ended, EpochDone, Logged

source = tiny.source
pytestmark = pytest.mark.usefixtures("source", "copied_stores", "mlflow_here")

BEGAN = 1_700_000_000.0  # s since 1970
SCORES = ((80.0, 90.0), (60.0,), (70.0, 85.0))  # of trials, by epoch


def call(*arguments):
    """What the command prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert studies.main([str(argument) for argument in arguments]) == 0
    return printed.getvalue()


def refused(*arguments):
    with pytest.raises(InputError) as refusal:
        call(*arguments)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def begin(out_dir, name, trials, ended):
    """A search of `trials` trials, of which the first few have ended."""
    asked = ["experiment=smoke", "space=bp", f"trials={trials}"]
    study = options.compose([*asked, f"study={name}", f"out_dir={out_dir}"])
    begun = manifest.of_search(study)
    kept = {**options.kept(study), "command": "python tune_main.py space=bp"}
    manifest.write(study.folder, begun, kept)
    propose, records, events = manifest.proposer(study, begun), {}, []
    for number, scores in enumerate(SCORES[: ended + 1]):
        events.append(propose(number, records))
        event_log.follow(records, events[-1])
        epochs = enumerate(scores, start=1)
        place = {"host": "h", "device": "cpu"}
        events += [
            EpochDone(number, n, s, {"valid_accuracy": [s], "valid_loss": [1 / s]}, place)
            for n, s in epochs
        ]
        if number < ended:
            state = COMPLETE if len(scores) == study.epochs else PRUNED
            events.append(Ended(number, state, len(scores)))
    with closing(event_log.EventLog(study.folder)) as log:
        log.copy(Logged(i, BEGAN + i, event) for i, event in enumerate(events, start=1))
    entry = inventory.find(out_dir, name)
    upkeep.bring_up(upkeep.job_of(entry, upkeep.address(entry)), ended == trials)
    return entry


class Tables(NamedTuple):
    """What the analysis says of a study, but for where it is."""

    runs: str
    report: dict[str, str]  # the files that have no date


def tables(uri, name, folder):
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert runs.main([f"study={name}", f"tracking.uri={uri}"]) == 0
        assert report.main([f"study={name}", f"tracking.uri={uri}", f"out={folder}"]) == 0
    first = printed.getvalue().partition("written: ")[0].splitlines()
    texts = {n: (folder / f"report.{n}").read_text() for n in ("md", "csv", "tex")}
    return Tables("\n".join(line for line in first if uri not in line), texts)


class Told(NamedTuple):
    """What MLflow and Optuna know of a study, by trial (and seed), but for ids and places."""

    mlflow: dict[Any, Any]
    optuna: list[Any]


CHANGING = ("mlflow.parentRunId", "mlflow.user", "retrains_run", "mlflow.runName")


def told(entry):
    uri = upkeep.address(entry)
    client, known = MlflowClient(tracking_uri=uri), {}
    (experiment,) = (e for e in client.search_experiments() if e.name == "disinhib-smoke")
    for run in client.search_runs([experiment.experiment_id]):
        tags, info = run.data.tags, run.info
        histories = {
            name: [
                (m.step, m.timestamp, m.value) for m in client.get_metric_history(info.run_id, name)
            ]
            for name in run.data.metrics
        }
        if not tags["study"].startswith(entry.name):
            continue
        key = tags["study"], int(tags.get("trial", -1)), tags.get("seed")
        own = {name: text for name, text in tags.items() if name not in CHANGING}
        files = sorted(file.path for file in client.list_artifacts(info.run_id))
        of_run = info.run_name, info.status, info.start_time, info.end_time
        inputs = [i.dataset.digest for i in (run.inputs.dataset_inputs if run.inputs else ())]
        known[key] = of_run, run.data.params, own, histories, files, inputs
    storage = JournalStorage(JournalFileBackend(str(entry.folder / "optuna.log")))
    (name,) = optuna.get_all_study_names(storage)
    assert name == entry.name
    trials = optuna.load_study(study_name=name, storage=storage).trials
    return Told(known, [(t.state, t.params, t.values, t.intermediate_values) for t in trials])


class World(NamedTuple):
    """One study and its retraining, exported and imported elsewhere."""

    out_dir: Path
    before: Tables
    known: Told
    archive: Path
    elsewhere: Path


@pytest.fixture(scope="module")
def shelf(source, copied_stores, mlflow_here, tmp_path_factory):
    """A folder with two studies: `stopped` was interrupted, `first` is finished."""
    out_dir = tmp_path_factory.mktemp("shelf")
    begin(out_dir, "stopped", trials=6, ended=2)
    begin(out_dir, "first", trials=3, ended=3)
    return out_dir


@pytest.fixture
def copy(shelf, tmp_path):
    """A copy of the shelf."""
    return Path(shutil.copytree(shelf, tmp_path / "copy"))


@pytest.fixture(scope="module")
def world(source, copied_stores, mlflow_here, tmp_path_factory):
    out_dir, elsewhere = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("elsewhere")
    begin(out_dir, "first", trials=3, ended=3)
    uri, selected = f"sqlite:///{out_dir}/mlflow.db", out_dir / "selected.yaml"
    with redirect_stdout(io.StringIO()):
        selection.main(["study=first", f"tracking.uri={uri}", f"selected={selected}"])
        assert retrain.main([str(selected), "seeds=2", f"out_dir={out_dir}"]) == 0
    called = call("rename", "first", "second", f"out_dir={out_dir}")
    assert [line.split(" in ")[0].rstrip(",") for line in called.splitlines()] == [
        "first-retrained is now second-retrained", "first is now second"
    ]  # fmt: skip
    before = tables(uri, "second", out_dir / "report")
    known = told(inventory.find(out_dir, "second"))
    archive = out_dir / "second.zip"
    assert "second, second-retrained" in call(
        "export", "second", f"file={archive}", f"out_dir={out_dir}"
    )
    call("import", archive, f"out_dir={elsewhere}")
    return World(out_dir, before, known, archive, elsewhere)


def test_a_study_that_was_renamed_has_its_new_name_everywhere(world):
    assert {key[0] for key in world.known.mlflow} == {"second", "second-retrained"}
    assert len(world.known.optuna) == len(SCORES)
    names = {file.parent.name for file in world.out_dir.glob("*/study.yaml")}
    assert names == {"second", "second-retrained"}
    kept = yaml.safe_load((world.out_dir / "second" / "study.yaml").read_text())
    assert kept["options"]["study"] == "second" and upkeep.RENAMED not in kept
    again = options.compose([f"out_dir={world.out_dir}", "study=second", "resume=true"])
    assert again.name == "second" and "study=first" not in again.overrides


def test_exported_and_imported_the_tables_are_byte_equal(world, tmp_path):
    uri = f"sqlite:///{world.elsewhere}/mlflow.db"
    assert tables(uri, "second", tmp_path) == world.before


def test_the_stores_know_the_same_of_it(world):
    """Runs with their times, params, tags, metrics with steps and times, files; Optuna's trials."""
    there = told(inventory.find(world.elsewhere, "second"))
    assert there.optuna == world.known.optuna
    assert there.mlflow.keys() == world.known.mlflow.keys()
    for key, own in world.known.mlflow.items():
        of_run, *rest = there.mlflow[key]
        was, *rest_was = own
        assert rest == rest_was, key
        # A study's own run begins with its first event.
        assert [*of_run[:2], *of_run[3:]] == [*was[:2], *was[3:]] and of_run[2] >= was[2], key
        assert key[1] < 0 or of_run == was, key


def test_what_goes_on_from_an_imported_study(world, tmp_path, monkeypatch):
    """Its retraining finds its seeds, and a retrained seed is trained again, number for number."""
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{world.elsewhere}/mlflow.db"
    with redirect_stdout(io.StringIO()):
        assert selection.main(["study=second", f"tracking.uri={uri}"]) == 0
    settings = configurations.checked_settings([f"out_dir={world.elsewhere}"])
    _, study, planned = configurations.of_selection(Path("selected.yaml"), settings, set())
    retraining = inventory.find(world.elsewhere, "second-retrained")
    lacking = partial(retrain.lacking, planned, records=retraining.records, threads=1, origin={})
    assert lacking(seeds={None: [0, 1]}) == []
    assert lacking(seeds={None: [0, 1, 2]})[0].config["seeds"] == [2]
    store = stores.connect(uri)
    again = runs.retrained(store, study).rows
    assert sorted(again["seed"]) == [0, 1]  # those that were there
    with redirect_stdout(io.StringIO()):
        assert replay.main([again["run_id"][0], f"tracking.uri={uri}"]) == 0


def test_it_has_no_place_of_where_it_was(world):
    with zipfile.ZipFile(world.archive) as zipped:
        names = zipped.namelist()
        texts = [zipped.read(name) for name in names]
    for name, text in zip(names, texts, strict=True):
        if name.endswith("study.yaml"):  # which has the command that was typed
            text = yaml.safe_dump({**yaml.safe_load(text), "command": None}).encode()
        if name.startswith("report/"):  # as has the report
            text = re.sub(rb"analysis\.retrain[^<\n]*", b"", text)
        assert str(world.out_dir).encode() not in text, name
    models = [name for name in names if name.endswith(".model")]
    assert models == [f"second-retrained/checkpoints/0000-{seed}.model" for seed in (0, 1)]
    own = pd.read_csv(io.BytesIO(texts[names.index("curves.csv")]), dtype=str)
    own = own[own["metric"] == "valid_accuracy"]
    assert {*own["study"]} == {"second", "second-retrained"} and "all" not in {*own["seed"]}
    assert {"runs.csv", "retrained.csv", "curves.csv", "report/report.html"} <= {*names}


def test_without_models_it_has_none(world, tmp_path):
    file = tmp_path / "small.zip"
    call("export", "second", f"file={file}", "models=false", f"out_dir={world.out_dir}")
    with zipfile.ZipFile(file) as zipped:
        assert not [name for name in zipped.namelist() if "checkpoints/" in name]


def changed(archive, file, change):
    """A copy of an archive whose (name, content) pairs are changed."""
    with zipfile.ZipFile(archive) as zipped, zipfile.ZipFile(file, "w") as copy:
        for name, content in change({n: zipped.read(n) for n in zipped.namelist()}).items():
            copy.writestr(name, content)
    return file


def outside(files):
    """As whoever wants to write outside would make it, index and all."""
    index = json.loads(files["archive.json"])
    index["files"]["../evil"] = hashlib.sha256(b"evil").hexdigest()
    return {**files, "../evil": b"evil", "archive.json": json.dumps(index)}


def twice(files):
    """Whose log has an event twice, index and all."""
    index, name = json.loads(files["archive.json"]), "second/events.jsonl"
    text = files[name] + files[name].splitlines()[0]
    index["files"][name] = hashlib.sha256(text).hexdigest()
    return {**files, name: text, "archive.json": json.dumps(index)}


def indexed(**own):
    return lambda files: {
        **files, "archive.json": json.dumps({**json.loads(files["archive.json"]), **own})
    }  # fmt: skip


def of_id(files):
    """Whose id would be a path, index and all."""
    index, name = json.loads(files["archive.json"]), "second/manifest.json"
    text = json.dumps({**json.loads(files[name]), "id": "../../x"}).encode()
    index["files"][name] = hashlib.sha256(text).hexdigest()
    return {**files, name: text, "archive.json": json.dumps(index)}


REFUSED = {
    "../evil is no file of a study": outside,
    "x is not in its index": lambda files: {**files, "x": b""},
    "second/manifest.json has changed": lambda files: {**files, "second/manifest.json": b"{}"},
    "There is no item named 'runs.csv'": lambda f: {n: c for n, c in f.items() if n != "runs.csv"},
    "allowed is an archive of form 1 (it has form 2": indexed(form=2),
    "study: given ../victim, allowed is a folder's name": indexed(study="../victim"),
    "study: given 5, allowed is a folder's name": indexed(study=5),
    "it has no third/study.yaml": indexed(study="third"),
    "second has no id": of_id,
    "There is no item named 'archive.json'": lambda files: {},
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_file_that_is_no_whole_archive_is_refused_and_leaves_nothing(words, world, tmp_path):
    file = changed(world.archive, tmp_path / "bad.zip", REFUSED[words])
    assert words in refused("import", file, f"out_dir={tmp_path / 'there'}")
    assert not [*(tmp_path / "there").iterdir()] and not (tmp_path / "evil").exists()


def test_a_log_that_has_an_event_twice_is_refused(world, tmp_path):
    file = changed(world.archive, tmp_path / "bad.zip", twice)
    line = refused("import", file, f"out_dir={tmp_path / 'there'}")
    assert "a whole archive of `export` (IntegrityError: UNIQUE constraint" in line
    assert inventory.listed(tmp_path / "there") == ([], [])


def test_half_a_file_and_no_file_are_refused(world, tmp_path):
    (tmp_path / "half.zip").write_bytes(world.archive.read_bytes()[:999])
    for name, words in (("half.zip", "a whole archive"), ("none.zip", "that can be read")):
        assert words in refused("import", tmp_path / name, f"out_dir={tmp_path / 'there'}")


def test_what_is_there_is_not_imported_again(world):
    line = refused("import", world.archive, f"out_dir={world.elsewhere}")
    assert line.endswith(f"({world.elsewhere / 'second'} is)")


def test_a_study_that_is_there_under_another_name_is_not_imported(world, tmp_path):
    """Two folders would share its runs, and to delete one would delete those of both."""
    out_dir = Path(shutil.copytree(world.elsewhere, tmp_path / "copy"))
    for name in ("second", "second-retrained"):
        (out_dir / name).rename(out_dir / name.replace("second", "mine"))
    line = refused("import", world.archive, f"out_dir={out_dir}")
    assert line.endswith(f"are not there yet ({out_dir / 'mine'} is)")
    shutil.rmtree(out_dir / "mine")
    file = out_dir / "mine-retrained" / manifest.MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), "more": "of a later version"}))
    assert f"({out_dir / 'mine-retrained'} is)" in refused(
        "import", world.archive, f"out_dir={out_dir}"
    )


def test_a_store_that_has_the_study_does_not_get_it_again(world, tmp_path):
    store = f"tracking.uri=sqlite:///{world.elsewhere}/mlflow.db"
    line = refused("import", world.archive, f"out_dir={tmp_path}", store)
    assert line.endswith("a store without the study (it has it as second)")
    assert not [*tmp_path.iterdir()]


def test_an_interrupted_import_is_repeated_by_the_same_command(world, tmp_path, monkeypatch):
    """Also into a store whose address depends on the folder of the command."""
    monkeypatch.chdir(tmp_path)
    words = ("import", world.archive, "out_dir=there", "tracking.uri=sqlite:///mine.db")
    bring_up = upkeep.bring_up

    def killed(*arguments):
        bring_up(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "bring_up", killed)
        with pytest.raises(KeyboardInterrupt):
            call(*words)
    assert not [*(tmp_path / "there").iterdir()]
    uri = f"sqlite:///{tmp_path}/mine.db"
    other = refused("import", world.archive, "out_dir=another", f"tracking.uri={uri}")
    assert f"from an import into {platform.node()}:{tmp_path}/there that has not ended" in other
    assert "imported: second (finished" in call(*words)
    entry = inventory.find(tmp_path / "there", "second")
    assert entry.tracking_uri == uri
    assert len(told(entry).mlflow) == len(world.known.mlflow)
    again = refused("import", world.archive, "out_dir=another", f"tracking.uri={uri}")
    assert again.endswith("(it has it as second)")


def test_a_study_is_deleted_everywhere_and_others_are_left_alone(world, tmp_path):
    out_dir = Path(shutil.copytree(world.out_dir, tmp_path / "copy"))
    begin(out_dir, "stopped", trials=6, ended=2)
    assert refused("delete", "second", f"out_dir={out_dir}").startswith("yes: given false")
    printed = call("delete", "second", "yes=true", f"out_dir={out_dir}")
    assert "second-retrained: its 3 runs" in printed and "second: its 4 runs" in printed
    assert [f.parent.name for f in out_dir.glob("*/study.yaml")] == ["stopped"]
    assert names_in_mlflow(out_dir) == {"stopped"}
    assert not [*(out_dir / "mlflow-artifacts").rglob("model.msgpack")]  # nor in MLflow's trash
    assert "allowed is one of stopped" in refused("delete", "second", f"out_dir={out_dir}")


def test_an_interrupted_deletion_is_finished_by_the_same_command(copy):
    for name in ("first", "first-retrained"):
        (copy / "first").rename(copy / inventory.DELETED.format(name))
        shutil.copytree(copy / "stopped", copy / "first")
    shutil.rmtree(copy / "first")
    assert "first" not in call("list", f"out_dir={copy}")
    assert "what an interrupted deletion had left" in call("delete", "first", f"out_dir={copy}")
    assert not [*copy.glob(".first*")]


def test_an_interrupted_renaming_is_finished_by_the_same_command(copy, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    words = ("rename", "first", "second", f"out_dir={copy}")
    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "bring_up", killed)
        with pytest.raises(KeyboardInterrupt):
            call(*words)
    assert names_in_mlflow(copy) == {"first", "stopped"}
    assert "first is now second" in call(*words)
    assert names_in_mlflow(copy) == {"second", "stopped"}
    assert "allowed is one of second, stopped" in refused(*words)


def names_in_mlflow(out_dir):
    client = MlflowClient(tracking_uri=f"sqlite:///{out_dir}/mlflow.db")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.data.tags["study"] for run in client.search_runs(ids)}


@pytest.mark.parametrize("new", ["mlflow.db", "a/b", "second"])
def test_a_name_that_cannot_be_is_refused(new, world):
    assert refused("rename", "second", new, f"out_dir={world.out_dir}").startswith("to: given ")


# A study that is interrupted, or runs.


def test_the_list_says_how_each_study_stands(copy):
    (copy / "broken").mkdir()
    (copy / "broken" / "study.yaml").write_text("options: {metric: valid_accuracy}")
    (copy / "a folder of something else").mkdir()
    head, *rows, last = call("list", f"out_dir={copy}").splitlines()
    assert head.split()[:4] == ["study", "state", "trials", "best"]
    assert {row.split()[0]: row.split()[1:5] for row in rows} == {
        "stopped": ["interrupted", "2/6", "bp", "90.00"],
        "first": ["finished", "3/3", "bp", "90.00"],
    }
    assert last.startswith("left out: study: broken") and "manifest.json" in last
    assert call("list", f"out_dir={copy}/nowhere") == f"no study in {copy}/nowhere\n"


def change(folder, **own):
    """Changes options in a study's file."""
    kept = yaml.safe_load((folder / "study.yaml").read_text())
    kept["options"] |= own
    (folder / "study.yaml").write_text(yaml.safe_dump(kept))


def test_a_study_of_a_plugins_metric_needs_no_plugin_to_be_listed_renamed_or_deleted(copy):
    where = f"out_dir={copy}"
    assert yaml.safe_load((copy / "first" / "study.yaml").read_text())["options"]["mode"] == "max"
    change(copy / "first", metric="valid_margin")
    rows = call("list", where).splitlines()[1:]
    assert {row.split()[0] for row in rows} == {"stopped", "first"}
    assert "best valid_margin" in call("show", "first", where)
    assert "first is now second" in call("rename", "first", "second", where)
    assert "stopped: its folder" in call("delete", "stopped", "yes=true", where)
    change(copy / "second", mode=None)  # as an earlier version kept it
    printed = call("list", where)
    assert printed.startswith("no study") and "second has no study.yaml that can be read" in printed


def test_a_retraining_that_cannot_be_read_is_named_by_what_leaves_it_out(copy):
    damaged = Path(shutil.copytree(copy / "stopped", copy / "first-retrained"))
    (damaged / manifest.MANIFEST).write_text("{}")
    for words in (
        ("show", "first"),
        ("export", "first", f"file={copy / 'first.zip'}"),
        ("rename", "first", "second"),
        ("delete", "second", "yes=true"),
    ):
        assert "left out: study: first-retrained in " in call(*words, f"out_dir={copy}"), words


def test_a_retraining_that_was_interrupted_is_not_finished(world, tmp_path):
    """Its trials are asked for one after another: the log does not say how many there will be."""
    folder = Path(shutil.copytree(world.out_dir / "second-retrained", tmp_path / "copy"))
    assert inventory.look(folder).state == inventory.FINISHED
    change(folder, trials=2)
    assert inventory.look(folder).state == inventory.INTERRUPTED


def test_the_log_of_a_study_that_another_machine_may_run_is_not_opened(copy, monkeypatch):
    """Locks may hold on each machine alone, and to open a log rolls back what is being written."""
    folder = copy / "stopped"
    write = lambda beat: (folder / lease.FILE).write_text(
        json.dumps({"id": "0", "machine": "another", "host": "far", "pid": 7, "beat": beat})
    )
    with closing(event_log.EventLog(folder)):  # stands in for the lock that is not seen
        write(0)
        monkeypatch.setattr(lease, "LIST_SECONDS", 0)
        entry = inventory.look(folder)  # its driver is dead, or slow
        assert entry.state == inventory.INTERRUPTED and len(entry.records) == 3
        monkeypatch.setattr(lease.time, "sleep", write)
        monkeypatch.setattr(lease, "LIST_SECONDS", 1)
        monkeypatch.setattr(event_log, "read", None)
        entry = inventory.look(folder)
        assert (entry.state, (entry.driver or {})["host"]) == (inventory.RUNNING, "far")


def test_nobody_begins_to_run_a_study_while_it_is_renamed(copy, monkeypatch):
    check, checked = upkeep.engine.check_stores, []

    def resumed(job, mlflow):
        checked.append(job.name)
        with pytest.raises(ConfigError, match="is open in another process"):
            event_log.EventLog(copy / "first", existing=True)
        check(job, mlflow)

    monkeypatch.setattr(upkeep.engine, "check_stores", resumed)
    assert "first is now second" in call("rename", "first", "second", f"out_dir={copy}")
    assert checked == ["second"]


def test_show_says_what_can_be_done(shelf):
    printed = call("show", "stopped", f"out_dir={shelf}")
    assert "search stopped: interrupted, 2/6 trials ended" in printed
    assert "space=bp, metric=valid_accuracy, trials=6" in printed
    assert f"tune_main.py study=stopped out_dir={shelf} resume=true" in printed


def given(folder):
    files = sorted((folder / steering.FOLDER).glob("*.json"))
    return [json.loads(file.read_text()) for file in files]


def test_instructions_to_a_study_that_nobody_runs_wait_in_its_folder(copy):
    where = f"out_dir={copy}"
    for words in (("pause", "stopped"), ("end", "stopped", 2)):
        assert "takes it in when it is resumed" in call(*words, where)
    call("add", "stopped", where, "optimizer.learning_rate=5e-3")
    pause, end, add = given(copy / "stopped")
    assert (pause["verb"], end["verb"], end["trial"]) == ("pause", "end", 2)
    assert add["point"] == {"bp.optimizer.learning_rate": 0.005}
    said = []
    taken = [*steering.take(copy / "stopped", said.append)]
    assert [instruction.verb for instruction in taken] == ["pause", "end", "add"]
    assert given(copy / "stopped") == [] and said == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["stop", "stopped"], "study: stopped is interrupted: no driver runs it"),
        (["end", "stopped", 0], "trial: given 0, allowed is one that has not ended: 2"),
        (["add", "stopped"], "add: missing, needed is OPTION=VALUE ... of the search space"),
        (["add", "stopped", "optimizer.learning_rate=7"], "given 7, allowed is 0.0001 to 0.01"),
        (["add", "stopped", "optimizer.lerning_rate=1"], "did you mean"),
        (["pause", "stoped"], "did you mean stopped?"),
        (["pause", "first"], "study: first is finished: resume it with more trials first"),
        (["pauze", "first"], "pauze: unknown verb"),
    ],
)
def test_what_cannot_be_is_refused(words, line, shelf):
    assert line in refused(*words, f"out_dir={shelf}")
    assert given(shelf / "stopped") == given(shelf / "first") == []


@pytest.mark.parametrize(("trial", "code"), [(2, 0), (0, 1)])
def test_the_command_says_what_the_driver_answers(trial, code, copy, capsys):
    """The driver knows more than the command: the trial may have ended since."""
    entry, said, over = inventory.find(copy, "stopped"), [], threading.Event()

    def drive():
        while not said and not over.is_set():
            for order in steering.take(entry.folder, said.append):
                steering.carry_out(entry.folder, order, entry.records, None, said.append)

    with closing(event_log.EventLog(entry.folder)), lease.held(entry.folder) as own:
        own.status = {**entry.outline, "unfinished": [0, 2]}
        own.write()
        driver = threading.Thread(target=drive)
        driver.start()
        try:
            assert studies.main(["end", "stopped", str(trial), f"out_dir={copy}"]) == code
        finally:
            over.set()
            driver.join()
    assert capsys.readouterr().out == f"stopped: {said[0]}\n"
    assert not [*(entry.folder / steering.FOLDER).iterdir()]


def test_what_is_no_instruction_is_removed_and_said(tmp_path):
    (tmp_path / steering.FOLDER).mkdir()
    for name, text in (("1.json", "{"), ("2.json", '{"id": 2, "verb": "dance"}')):
        (tmp_path / steering.FOLDER / name).write_text(text)
    steering.give(tmp_path, steering.STOP)
    said = []
    assert [i.verb for i in steering.take(tmp_path, said.append)] == ["stop"]
    assert len(said) == 2 and not [*(tmp_path / steering.FOLDER).glob("*.json")]
    steering.give(tmp_path, steering.STOP)
    steering.give(tmp_path, steering.ADD, point={"trainer": "stop"})
    steering.forget(tmp_path)
    assert [i.verb for i in steering.take(tmp_path, said.append)] == ["add"]


def test_curves_name_the_seed_also_where_a_trial_has_one():
    def curves(*seeds):
        done = EpochDone(0, 1, 0.0, {"valid_loss": [0.5] * len(seeds), "hours": [0.1]}, {})
        records = {0: SimpleNamespace(config={"seeds": [*seeds]})}
        entry = SimpleNamespace(name="s", events=[(1, 0.0, done)], records=records)
        return supplement.curves([entry])[["metric", "seed"]].to_numpy().tolist()

    assert curves(7, 8) == [["valid_loss", 7], ["valid_loss", 8], ["hours", "all"]]
    assert curves(7) == [["valid_loss", 7], ["hours", 7]]


def test_a_study_that_runs_is_listed_by_its_lease_and_left_alone(shelf):
    entry, where = inventory.find(shelf, "stopped"), f"out_dir={shelf}"
    with closing(event_log.EventLog(entry.folder)), lease.held(entry.folder) as own:
        own.status = {**entry.outline, "ended": 4, "paused": True}
        own.write()
        (row,) = (r for r in call("list", where).splitlines() if r.startswith("stopped"))
        assert row.split()[1:4] == ["running,", "paused", "4/6"]
        for words in (("rename", "stopped", "new"), ("delete", "stopped"), ("export", "stopped")):
            assert "stop it first" in refused(*words, where)


def test_help_names_every_verb():
    from disinhib import cli

    for verb in ("", *studies.VERBS):
        with pytest.raises(cli.Help) as help:
            studies.main([verb, "--help"] if verb else [])
        assert all(f" {name} " in str(help.value) for name in studies.VERBS)
