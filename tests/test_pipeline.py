"""`make study`: each stage goes on from the study of the one before."""

from types import SimpleNamespace
from typing import Any

import planted
import pytest
import yaml

from analysis import pipeline
from disinhib import cli
from disinhib.errors import ConfigError, InputError
from disinhib.tuning import options, study as studies

pytestmark = pytest.mark.usefixtures("copied_stores")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run(*arguments)`: (exit code, studies that were tuned, [(module, arguments)] after that)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, code=0, codes=None, run_id="0123", undelivered=(), uri=None):
        tuned, called = [], []

        def carry_out(study):
            tuned.append(study)
            place = uri or f"sqlite:///{study.out_dir}/mlflow.db"
            lacking = dict(undelivered)
            return code, SimpleNamespace(
                run_id=run_id, undelivered=lacking, tracking_uri=place, job=study
            )

        def main_of(module):
            return lambda given: called.append((module, given)) or (codes or {}).get(module, 0)

        monkeypatch.setattr(studies, "carry_out", carry_out)
        monkeypatch.setattr(pipeline, "_main_of", main_of)
        return pipeline.main(list(arguments)), tuned, called

    return call


def test_every_stage_gets_the_study_the_store_and_the_folder(run, tmp_path):
    code, (study,), called = run("out_dir=there", "study=mine", "experiment=smoke")
    there, tracking = tmp_path / "there", f"tracking.uri=sqlite:///{tmp_path}/there/mlflow.db"
    assert (code, study.name, study.folder) == (0, "mine", there / "mine")
    selected = "there/mine/selected.yaml"
    assert called == [
        ("analysis.selection", ["study=0123", f"selected={selected}", tracking]),
        ("analysis.retrain", [selected, "seeds=3", "out_dir=there", tracking]),
        ("analysis.report", ["study=0123", "out=there/report-mine", tracking]),
    ]


def test_by_default_all_of_it_is_in_out(run):
    """And the commands are short: a report shows them."""
    _, _, called = run()
    selected = "out/rules-digits/selected.yaml"
    assert called == [
        ("analysis.selection", ["study=0123", f"selected={selected}"]),
        ("analysis.retrain", [selected, "seeds=3"]),
        ("analysis.report", ["study=0123", "out=out/report-rules-digits"]),
    ]


def test_a_folder_elsewhere_is_handed_on_as_it_is(run, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    _, _, called = run(f"out_dir={elsewhere}", "study=mine")
    assert called[1][1][0] == f"{elsewhere}/mine/selected.yaml"
    assert f"out_dir={elsewhere}" in called[1][1]


def test_a_folder_whose_name_looks_like_an_option_is_handed_on_whole(run, tmp_path):
    _, _, called = run("out_dir=lr=0.1", "study=mine")
    retraining = called[1][1]
    words, options = cli.split(retraining, "")
    assert words == [f"{tmp_path}/lr=0.1/mine/selected.yaml"]
    assert options[:2] == ["seeds=3", f"out_dir={tmp_path}/lr=0.1"]


def test_another_store_is_handed_on(run):
    _, _, called = run("tracking.uri=http://h:5000", uri="http://h:5000")
    assert all("tracking.uri=http://h:5000" in given for _, given in called)


def test_seeds_and_where_to_train_go_to_retraining(run):
    _, (study,), called = run(
        "seeds=[7,8]", "cluster.cpus_per_trial=2", "device=cpu", "optimizer.learning_rate=0.1"
    )
    assert "seeds=[7,8]" not in study.overrides
    assert called[1][1][-2:] == ["cluster.cpus_per_trial=2", "device=cpu"]
    assert called[1][1][1] == "seeds=[7,8]"


def test_a_password_is_handed_on_and_not_shown(run, capsys):
    uri = "postgresql://me:secret@host/db"
    _, _, called = run(uri=uri)
    assert f"tracking.uri={uri}" in called[0][1]
    assert "secret" not in capsys.readouterr().out


@pytest.mark.parametrize("code", [1, 130])
def test_it_ends_with_a_study_that_did_not_end_well(run, code):
    assert run(code=code)[::2] == (code, [])


def test_it_ends_with_the_first_stage_that_does_not_end_well(run):
    code, _, called = run(codes={"analysis.retrain": 1})
    assert code == 1 and [module for module, _ in called][-1] == "analysis.retrain"


def test_nothing_is_selected_of_what_mlflow_lacks(run, capsys):
    for lacking in ({"undelivered": {"MLflow": 3}}, {"run_id": None}):
        code, _, called = run(**lacking)
        assert (code, called) == (1, [])
        assert "nothing is selected" in capsys.readouterr().err


def test_a_plan_is_all_there_is_of_a_plan(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies.plan, "run", lambda *_: None)
    assert pipeline.main(["plan=true"]) == 0


def test_a_wrong_option_is_refused_before_anything(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="trails: unknown option; did you mean trials"):
        pipeline.main(["trails=5"])


@pytest.mark.parametrize("seeds", ["seeds=", "seeds=0", "seeds=nonsense", "seeds=[1,1]"])
def test_seeds_that_retraining_would_refuse_are_refused_before_the_search(run, monkeypatch, seeds):
    monkeypatch.setattr(pipeline, "compose", lambda arguments: pytest.fail("it goes on"))
    with pytest.raises(ConfigError, match=r"^seeds: given .* allowed is a number of seeds"):
        run(seeds)


def test_a_word_that_is_no_option_is_refused(run):
    with pytest.raises(InputError, match="smoke: not understood, allowed is option=value"):
        run("smoke")


def test_selection_is_of_the_study_that_is_handed_on_and_not_of_the_newest(tmp_path):
    older = planted.write(tmp_path, "older")
    planted.write(tmp_path, "newer")
    study = options.compose([f"out_dir={tmp_path}", "study=older"])
    finished: Any = SimpleNamespace(job=study, run_id=older.run_id, tracking_uri=older.uri)
    selection, retraining, _ = pipeline.stages(study, finished, ["seeds=3"])
    study.folder.mkdir()
    assert pipeline._main_of(selection.module)(selection.arguments) == 0
    selected = study.folder / "selected.yaml"
    assert retraining.arguments[0] == str(selected)
    assert yaml.safe_load(selected.read_text())["study_run"] == older.run_id
