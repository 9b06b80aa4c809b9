"""`disinhib VERB`, and commands as they can be typed from where one is."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from disinhib import commands
from disinhib.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def disinhib(monkeypatch):
    """`disinhib(*arguments)`: the exit code of the console script."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["disinhib", *arguments])
        with pytest.raises(SystemExit) as ended:
            commands.run()
        return ended.value.code or 0

    return run


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("figure",), ("figure", "--help")])
def test_help_is_one_screen_and_names_every_verb(arguments, disinhib, capsys):
    assert disinhib(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 80
    for name, verb in commands.VERBS.items():
        assert any(name in line and verb.words in line for line in lines)


def test_help_imports_nothing_that_takes_time():
    code = (
        "import sys; sys.argv[1:] = []; from disinhib import commands; commands.main([]);"
        "print({'jax', 'ray', 'mlflow', 'optuna', 'hydra', 'numpy'} & {*sys.modules})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("arguments", "named", "near"),
    [
        (["tunee"], "tunee", "tune"),
        (["selection", "top=2"], "selection", "select"),
        (["figure", "fig5"], "figure fig5", "figure fig4"),
    ],
)
def test_an_unknown_verb_is_refused_with_the_nearest(arguments, named, near, disinhib, capsys):
    assert disinhib(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {named}: unknown verb, allowed is one of train, tune, ")
    assert line.endswith(f"did you mean {near}?")


def test_every_verb_is_a_module_that_runs():
    for verb in commands.VERBS.values():
        found = importlib.util.find_spec(verb.module)
        assert found is not None and found.origin is not None
        file = Path(found.origin)
        if file.name == "__init__.py":
            file = file.with_name("__main__.py")
        assert re.search(r"cli\.run\((study\.)?main", file.read_text())


def test_a_verb_gets_the_arguments_after_it_and_its_exit_code_is_the_commands(
    disinhib, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "planted_verb.py").write_text(
        "import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n    sys.exit(7)\n"
    )
    monkeypatch.setitem(commands.VERBS, "plant", commands.Verb("planted_verb", "tries it"))
    assert disinhib("plant", "a=b", "--help") == 7
    assert capsys.readouterr().out == "['a=b', '--help']\n"


def test_the_command_of_a_study_is_one_that_works_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert commands.tune_words("study=a")[1:] == ["tune_main.py", "study=a"]
    monkeypatch.chdir(tmp_path)
    assert commands.tune_words("study=a")[1:] == ["-m", "tune_main", "study=a"]
    Path("tune_main.py").write_text("")  # another project's
    assert commands.tune_words("study=a")[1:] == ["-m", "tune_main", "study=a"]


def test_a_tool_is_named_as_short_as_it_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    assert commands.tool("mlflow") == "env/bin/mlflow"
    monkeypatch.chdir("/")
    assert commands.tool("mlflow").endswith("env/bin/mlflow")


def test_no_verb_is_an_input_error():
    with pytest.raises(InputError, match="unknown verb"):
        commands.main(["--version"])
