"""The commands of the figures: files that are whole, numbers that are their tables, refusals."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib import image

from analysis.figures import fig3, fig4, figS1, figS2, trajectory
from disinhib import checkpoint, export
from disinhib.config import parse
from disinhib.errors import InputError
from disinhib.training import initial_state

FIGURES = {"fig3": fig3, "fig4": fig4, "figS1": figS1, "figS2": figS2}
QUICK = {
    "fig3": {"": 2 * 41 + 41 + 4 * 41 + 3 * 41 + 4 * 41},
    "figS1": {"": 4 * 3 * 41 + 3 * 4 * 41},
    "figS2": {"": 5 * (2 * 41 + 4 * 41 + 2 * 41 + 4 * 41)},
    "fig4": {"": 2 * 3, "-traces": 2 * 1001},
}


def check_files(folder, name, rows):
    kinds = {f"{name}.pdf", f"{name}.png", *(f"{name}{ending}.csv" for ending in rows)}
    assert {file.name for file in folder.iterdir()} == kinds
    assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert np.std(image.imread(folder / f"{name}.png")) > 0.05  # not blank
    for ending, count in rows.items():
        assert len(pd.read_csv(folder / f"{name}{ending}.csv")) == count


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "fig4"])
def test_a_figure_is_made(name, tmp_path, capsys):
    check_made(name, tmp_path, capsys)
    if name == "fig3":  # the same figure is the same file
        fig3.main([f"out={tmp_path / 'again'}", "quick=true"])
        for file in (tmp_path / "again").iterdir():
            assert file.read_bytes() == (tmp_path / "new/figures" / file.name).read_bytes()


def check_made(name, tmp_path, capsys):
    folder = tmp_path / "new" / "figures"
    FIGURES[name].main([f"out={folder}", "quick=true"])
    check_files(folder, name, QUICK[name])
    assert capsys.readouterr().out.split()[-1] == str(folder / f"{name}.png")


@pytest.mark.parametrize("name", [*FIGURES, "trajectory"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(name, run_folder):
    main = trajectory.main if name == "trajectory" else FIGURES[name].main
    given = ["out=/proc/figures", *([str(run_folder)] if name == "trajectory" else [])]
    with pytest.raises(InputError, match=r"out: given /proc/figures, allowed is a folder") as no:
        main(given)
    assert "\n" not in str(no.value)


def test_a_refusal_is_one_line_and_exit_code_2():
    run = subprocess.run(
        [sys.executable, "-m", "analysis.figures.fig3", "quik=true"], capture_output=True, text=True
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == "error: quik: unknown option; did you mean quick?\n"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run on digits that has just begun."""
    from disinhib import hydra_config

    options, _ = hydra_config.compose(
        hydra_config.TRAINING,
        ["trainer=exact-inv", "model/vf=dale", "model.vf.nb_hidden=2", "model.vf.sizes_hidden=[8]"],
    )
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(options)))
    config = parse(options)
    checkpoint.save(folder / "checkpoint.msgpack", config, initial_state(config, [0]))
    return folder


def test_a_trajectory_ends_where_newton_says(run_folder, tmp_path):
    trajectory.main([f"run={run_folder}", f"out={tmp_path}", "quick=true", "sample=3"])
    check_files(tmp_path, "trajectory", {"": 2 * 51, "-equilibria": 2})
    moving = pd.read_csv(tmp_path / "trajectory.csv")
    found = pd.read_csv(tmp_path / "trajectory-equilibria.csv")
    assert np.all(found["converged"]) and np.all(found["label"].isin(range(10)))
    rest = found.drop(columns=["loop", "converged", "label"])
    assert list(moving.columns[2:]) == list(rest.columns) and len(rest.columns) == 4 * 8 + 2 * 10
    assert not np.any(moving.iloc[0][rest.columns])  # at rest
    # A second is ten time constants of the controller, of which e^-10 is 5e-5.
    for end, equilibrium in ((50, 0), (101, 1)):
        gap = moving.iloc[end][rest.columns] - rest.iloc[equilibrium]
        assert np.max(np.abs(gap)) < 1e-3
    assert np.max(np.abs(rest.iloc[1] - rest.iloc[0])) > 0.01


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nowhere"], r"run: given nowhere, allowed is .* cannot be read"),
        (["a" * 300], r"run: given a+, allowed is .*File name too long"),
        (["."], r"run: given \., allowed is the folder of a training run, or a model.msgpack"),
        ([], "run: missing, needed is the folder of a training run, or a model.msgpack"),
        (["RUN", "sample=x"], "sample: given x, allowed is a whole number of at least 0"),
    ],
)
def test_a_trajectory_of_nothing_is_refused(given, message, tmp_path):
    with pytest.raises(InputError, match=message) as no:
        trajectory.main([*given, f"out={tmp_path}"])
    assert "\n" not in str(no.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", [b"# caf\xe9", b"x: 2026-13-45", b"x: [1", None])
def test_a_configuration_that_cannot_be_read_is_refused(line, run_folder, tmp_path):
    content = (run_folder / "config.yaml").read_bytes()
    (tmp_path / "config.yaml").write_bytes(b"" if line is None else content + line)
    with pytest.raises(InputError, match=r"run: given .*, allowed is the folder") as no:
        trajectory.trained(tmp_path)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("path", ["random", "learnt"])
def test_a_model_without_its_feedback_weights_is_refused(path, run_folder, tmp_path):
    options = yaml.safe_load((run_folder / "config.yaml").read_text())
    options["trainer"]["feedback"] = path
    state = initial_state(parse(options), [0])
    file = tmp_path / "model.msgpack"
    file.write_bytes(export.dump(options, {k: v[0] for k, v in state.parameters.items()}))
    needed = f"lacking feedback_0, feedback_1, the feedback weights of trainer.feedback={path}"
    with pytest.raises(InputError, match=needed) as no:
        trajectory.trained(file)
    assert "\n" not in str(no.value)


def test_a_sample_that_is_not_there_is_refused(run_folder, tmp_path):
    with pytest.raises(InputError, match=r"sample: given 9999, allowed is 0 to 286"):
        trajectory.main([str(run_folder), f"out={tmp_path}", "sample=9999"])


# The last one, as what follows it would be optimised, too.
@pytest.mark.usefixtures("optimised")
def test_figure_4_which_runs_for_long_is_made(tmp_path, capsys):
    check_made("fig4", tmp_path, capsys)
