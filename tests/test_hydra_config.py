"""The command line as its user meets it: published commands, one run, and every bad input."""

import gzip
import json
import os
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest
import yaml

from disinhib import __main__ as program, cli, hydra_config
from disinhib.activations import ACTIVATIONS
from disinhib.config import parse
from disinhib.data import DATASETS
from disinhib.errors import ConfigError
from disinhib.rules import RULES

TINY = ["model.vf.nb_hidden=1", "model.vf.sizes_hidden=[8]", "epochs=2", "device=cpu"]

PUBLISHED = [
    "dataset=fmnist model/vf=non-dale trainer=bp model.vf.nb_hidden=3",
    "dataset=fmnist model/vf=dale trainer=exact-inv model.vf.nb_hidden=3",
    "dataset=fmnist model/vf=dale trainer=lin-thresh model.vf.nb_hidden=3",
    "dataset=mnist model/vf=dale trainer=exact-inv trainer.average_fb_weights=True",
    "dataset=mnist model/vf=dale trainer=lin-thresh model.vf.sizes_hidden=[256] epochs=50"
    " batchsize=100 seed=0 device=cpu optimizer.learning_rate=1e-3",
]


@pytest.mark.parametrize("arguments", PUBLISHED)
def test_published_commands_compose(arguments):
    options, _ = hydra_config.compose("train", arguments.split())
    config = parse(options)
    assert config.architecture.sizes == (784, 256, 256, 256, 10)
    assert config.dataset in arguments and config.rule in arguments


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["seed=5", "epochs=3"],
        ["model/vf=dale", "trainer=lin-thresh", "trainer.norm_val=0.1234567890123"],
        ["model/vf=dale", "trainer=taylor", "model/vf/activation@model.vf.actI=tanh"],
        ["model/vf=dale", "trainer=exact-inv", "model/vf/controller=proportional", "solver=ode"],
        ["dataset/loss=mse", "model.vf.sizes_hidden=[3,4,5]", "dataset.path='/tmp/a b'"],
        ["model/vf=dale", "trainer=exact-inv", "trainer.feedback=sign-symmetric", "out_dir='null'"],
        ["optimizer=sgd", "optimizer.momentum=0.9", "dataset=fmnist", "seed=null"],
    ],
    ids=" ".join,
)
def test_a_command_composes_to_the_options_it_came_from(arguments):
    options, choices = hydra_config.compose("train", arguments)
    written = shlex.split(hydra_config.command(options, choices))
    assert written[:3] == ["python", "-m", "disinhib"]
    again, chosen = hydra_config.compose("train", written[3:])
    assert again == options and chosen == choices
    assert len(written) - 3 <= len(arguments)  # and no longer than it was


def test_options_that_no_command_composes_are_refused():
    options, choices = hydra_config.compose("train", [])
    options["model"]["vf"]["no_such_option"] = 1
    with pytest.raises(ConfigError):
        hydra_config.command(options, choices)


def test_an_option_left_out_is_refused_even_of_a_known_structure():
    options, choices = hydra_config.compose("train", ["epochs=3"])
    hydra_config.command(options, choices)
    del options["optimizer"]["b1"]
    with pytest.raises(ConfigError, match="no command composes to these options"):
        hydra_config.command(options, choices)


def test_a_structure_is_composed_once(monkeypatch):
    """What Hydra takes 70 ms for; numbers in all the forms that Python writes come back."""
    options, choices = hydra_config.compose("train", ["model/vf=dale", "trainer=exact-inv"])
    composed, compose = [], hydra_config.compose_loaded

    def counted(name, overrides):
        composed.append(overrides)
        return compose(name, overrides)

    monkeypatch.setattr(hydra_config, "compose_loaded", counted)
    monkeypatch.setattr(hydra_config, "_VERIFIED", set())
    rates = [0.1234, 0.25, 2.0, 17.125, 1e-7, 2.5e-08, 1e22]
    commands = []
    for rate in rates:
        options["optimizer"]["learning_rate"] = rate
        commands.append(hydra_config.command(options, choices))
    verified = [overrides[-1] for overrides in composed if "learning_rate" in str(overrides)]
    kinds = (0.1234, 1e-7, 2.5e-08, 1e22)  # digits, 0e-0, 0.0e-0, 0e+0
    assert verified == [f"optimizer.learning_rate={rate!r}" for rate in kinds]
    for rate, written in zip(rates, commands, strict=True):
        again, _ = compose("train", shlex.split(written)[3:])
        assert again["optimizer"]["learning_rate"] == rate


def test_texts_are_a_structure_each():
    """A text may hold what Hydra would read as something else."""
    options, choices = hydra_config.compose("train", [])
    for path in ("/data/1", "/data/2", "it's", "a,b", "null"):
        options["dataset"]["path"] = path
        written = shlex.split(hydra_config.command(options, choices))
        assert hydra_config.compose("train", written[3:])[0] == options


def test_one_seed_takes_the_place_of_the_option():
    options, choices = hydra_config.compose("train", ["seed=5"])
    assert hydra_config.command(options, choices).endswith(" seed=5")
    assert hydra_config.command(options, choices, [7]).endswith("disinhib seed=7")
    assert hydra_config.command(options, choices, [0]).endswith("disinhib")  # the default
    several = hydra_config.command(options, choices, [0, 7])
    assert several == "python -m disinhib -m seed=0,7"


def test_a_group_is_known_by_its_registration_or_its_folder():
    groups = ("trainer", "dataset/loss", "model/vf/activation@model.vf.actI", "model/vf", "solver")
    assert all(map(hydra_config.is_group, groups))
    assert not any(map(hydra_config.is_group, ("trainer.norm_val", "epochs", "trainers", "")))
    assert hydra_config.choices_of("trainer") == sorted(RULES)
    assert hydra_config.choices_of("solver") == ["newton", "ode"]
    assert hydra_config.choices_of("model") == ["default"]
    assert hydra_config.choices_of("trainer.norm_val") == []


def invoke(monkeypatch, folder, *arguments):
    """`python -m disinhib ARGUMENTS` in this process, in an empty folder; its exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["disinhib", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.run(program.main)
    return ended.value.code


BAD = [
    (["optimizer.learning_rat=1"], "did you mean optimizer.learning_rate?"),
    (["lerning_rate=1"], "lerning_rate: unknown option"),
    (["+more=1"], "more: unknown option"),
    (["trainer=exact"], f"one of {', '.join(sorted(RULES))}"),
    (["model/vf=dal"], "did you mean dale?"),
    (["dataset=cifar"], f"one of {', '.join(sorted(DATASETS))}"),
    (
        ["model/vf=dale", "model/vf/activation@model.vf.actI=elu"],
        f"one of {', '.join(sorted(ACTIVATIONS))}",
    ),
    (["trainer=exact-inv"], "needs model/vf=dale, given model/vf=non-dale"),
    (["trainer.norm_val=2"], "trainer.norm_val: unknown option"),  # bp has no feedback
    (["epochs=0"], "epochs: given 0, allowed is a whole number of at least 1"),
    (["optimizer.learning_rate=-1"], "given -1, allowed is a number above 0"),
    (["model.vf.nb_hidden=2", "model.vf.sizes_hidden=[3,4,5]"], "model.vf.sizes_hidden: given"),
    (["batchsize=2000"], "batchsize: given 2000, allowed is 1 to 1150 (digits)"),
    (["dataset=fmnist", "dataset.path=/no/such/folder"], "/no/such/folder"),
    (["dataset.valid_split=1.5"], "dataset.valid_split: given 1.5"),
    (["resume=no-such-run"], "resume: given no-such-run, allowed is the folder of a run"),
    (["seed=["], "seed=[: not understood, allowed is option=value (Hydra's grammar)\n"),
    (["dataset=fmnist", "dataset.path=~/a"], "~/a"),
    (["dataset=fmnist", "dataset.path=/tmp/dünn"], "/tmp/dünn"),
    (["dataset=fmnist", "dataset.path=a=b, (c)"], "a=b, (c)"),
    (["--config-name=x"], "--config-name=x: has no meaning here"),
    (["--cfg", "nonsense"], "--cfg: given nonsense, allowed is one of job, hydra, all"),
    (["--package"], "--package: given nothing, allowed is one of NAME"),
    (["epochs"], "epochs: not understood, allowed is option=value"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(monkeypatch, tmp_path, capsys, arguments, words):
    assert invoke(monkeypatch, tmp_path, "device=cpu", *arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert words in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_data_file_is_refused(monkeypatch, tmp_path, capsys):
    folder, work = tmp_path / "data", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"not images"))
    assert invoke(monkeypatch, work, "dataset=mnist", f"dataset.path={folder}") == 2
    message = capsys.readouterr().err
    assert "train-images-idx3-ubyte.gz" in message and "SHA-256" in message
    assert message.count("\n") == 1 and list(work.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")  # root may write into any folder, but not here
    assert invoke(monkeypatch, tmp_path, "out_dir=file/out") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: out_dir: given file/out, allowed is a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("target", ["out", "nowhere"])
def test_a_link_that_leads_to_no_folder_is_refused(target, monkeypatch, tmp_path, capsys):
    (tmp_path / "out").symlink_to(target)
    assert invoke(monkeypatch, tmp_path, "out_dir=out") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: out_dir: given out, allowed is a folder")
    assert message.count("\n") == 1


def disinhib(folder, *arguments):
    environment = {**os.environ, "PJRT_NPROC": "1"}
    return subprocess.run(
        [sys.executable, "-m", "disinhib", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )


# Several commands, each in a folder of its own, in one process: what takes long is to start one.
CHILD = """
import contextlib, io, json, os, sys
from disinhib import __main__ as program, cli

told = {}
for folder, arguments in json.loads(sys.argv[1]).items():
    os.mkdir(folder)
    os.chdir(folder)
    sys.argv[1:] = arguments
    code, out, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            cli.run(program.main)
        except SystemExit as ended:
            code = ended.code or 0
    told[os.path.basename(folder)] = code, out.getvalue(), errors.getvalue()
print(json.dumps(told))
"""


class Told(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 2 epochs in a process of its own: (its folder's parent, folder, process)."""
    work = tmp_path_factory.mktemp("run")
    process = disinhib(work, *TINY, "hydra.run.dir=first", "OL_eval_on_train=true")
    return work, work / "first", process


@pytest.fixture(scope="module")
def others(run):
    """What other commands told, by the name of their folder beside that of the run."""
    work, folder, _ = run
    here, four = "hydra.run.dir=.", ["epochs=4", "OL_eval_on_train=true"]
    options, choices = hydra_config.compose("train", [*TINY, "OL_eval_on_train=true"])
    seeds = shlex.split(hydra_config.command(options, choices, [0, 4]))
    assert seeds[:4] == ["python", "-m", "disinhib", "-m"] and seeds[-1] == "seed=0,4"
    commands = {
        "whole": [*TINY, *four, here],
        "second": [*TINY, *four, here, f"resume={folder}"],
        "diverged": [*TINY, "optimizer=sgd", "optimizer.learning_rate=1e20", here],
        "seeds": seeds[3:],
        "shown": ["--cfg", "job", "model/vf=dale", "trainer=exact-inv"],
    }
    given = json.dumps({str(work / name): words for name, words in commands.items()})
    process = subprocess.run(
        [sys.executable, "-c", CHILD, given],
        capture_output=True,
        text=True,
        env={**os.environ, "PJRT_NPROC": "1"},
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return {name: Told(*told) for name, told in json.loads(process.stdout).items()}


def test_a_run_leaves_its_results(run):
    _, folder, process = run
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "results.json").read_text())
    assert results.pop("wall_time") > sum(results["epoch_seconds"]) > 0
    assert results["epoch"] == [1, 2]
    assert all(len(values) == 2 for values in results.values())
    assert {"train_CL_loss", "train_OL_loss", "valid_accuracy"} <= set(results)
    assert not any(name.startswith("test") for name in results)  # only when asked
    assert (folder / "checkpoint.msgpack").stat().st_size > 0
    assert "epoch 2/2" in (folder / "train.log").read_text()
    assert "epoch 2/2" in process.stdout
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["model"]["vf"]["sizes_hidden"] == [8] and resolved["epochs"] == 2
    assert parse(resolved).architecture.sizes == (64, 8, 10)


def test_a_run_goes_on_from_its_folder(run, others):
    """2 epochs and 2 more give the numbers of 4 at once."""
    work, _, _ = run
    whole, resumed = others["whole"], others["second"]
    assert whole.returncode == resumed.returncode == 0, whole.stderr + resumed.stderr
    at_once = json.loads((work / "whole" / "results.json").read_text())
    later = json.loads((work / "second" / "results.json").read_text())
    assert later["epoch"] == [1, 2, 3, 4]
    for name in ("train_CL_loss", "valid_loss", "train_CL_weight_norm", "train_OL_loss"):
        assert at_once[name] == later[name]
    assert later["wall_time"] > sum(later["epoch_seconds"])
    assert (work / "whole/checkpoint.msgpack").read_bytes() == (
        work / "second/checkpoint.msgpack"
    ).read_bytes()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate=0.001 (given 0.1)"),
        ("seed=5", "seed=0 (given 5)"),
        ("batchsize=50", "batchsize=100 (given 50)"),
        ("epochs=2", "epochs: given 2, allowed is more than the 2 that"),
    ],
)
def test_another_run_is_not_resumed(run, monkeypatch, tmp_path, capsys, changed, words):
    _, folder, _ = run
    arguments = [*TINY, "epochs=4", f"resume={folder}", changed]
    assert invoke(monkeypatch, tmp_path, *arguments) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_diverges_says_where_and_fails(run, others):
    work, process = run[0], others["diverged"]
    assert process.returncode == 1
    assert "diverged: " in process.stdout and "epoch 1 (seed 0)" in process.stdout
    assert "Traceback" not in process.stderr
    assert not (work / "diverged" / "results.json").exists()


def test_a_command_of_several_seeds_is_a_run_of_each(run, others):
    """Hydra's multirun, with the numbers of the run of that seed alone."""
    work, alone, _ = run
    assert others["seeds"].returncode == 0, others["seeds"].stderr
    options, _ = hydra_config.compose("train", [*TINY, "OL_eval_on_train=true"])
    folders = sorted(path.parent for path in (work / "seeds").rglob("results.json"))
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    assert configs == [{**options, "seed": 0}, {**options, "seed": 4}]
    zero, four, expected = (
        json.loads((folder / "results.json").read_text())["valid_loss"]
        for folder in (*folders, alone)
    )
    assert zero == expected != four


def test_bad_input_in_a_process_of_its_own(tmp_path):
    process = disinhib(tmp_path, "trainer=bq")
    assert process.returncode == 2 and process.stdout == ""
    allowed = ", ".join(sorted(RULES))
    assert process.stderr == f"error: trainer: given bq, allowed is one of {allowed}\n"
    assert list(tmp_path.iterdir()) == []


def test_hydra_shows_the_configuration(run, others):
    shown = others["shown"]
    assert shown.returncode == 0
    assert yaml.safe_load(shown.stdout)["trainer"]["name"] == "exact-inv"
    assert list((run[0] / "shown").iterdir()) == []
