"""The command line: one grammar, one line for each refusal, help from the table."""

import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from disinhib import cli
from disinhib.checks import COUNT, FLAG, OPTIONAL_TEXT, POSITIVE, TEXT, Option, one_of, or_null
from disinhib.errors import ConfigError

COMMAND = cli.Command(
    "room.command",
    "Does what is asked.",
    (
        Option("run", cli.REQUIRED, (TEXT[0], "a folder"), "the run"),
        Option("times", 25, COUNT, "how often"),
        Option("rate", None, or_null(POSITIVE), "in 1/s"),
        Option("quick", False, FLAG, "fewer points"),
        Option("form", "one", one_of(("one", "three")), "which"),
        Option("sizes", [3, 5], cli.list_of(COUNT), "of the samples"),
        Option("tracking.uri", None, OPTIONAL_TEXT, "where"),
    ),
    alone=("run",),
)


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["here"], {"run": "here"}),
        (["run=here"], {"run": "here"}),
        (["run=5"], {"run": "5"}),  # a text that looks like a number
        (["run=a=b,c"], {"run": "a=b,c"}),
        (["run='null'"], {"run": "null"}),
        (["here", "times=3"], {"run": "here", "times": 3}),
        (["times=3", "times=4", "here"], {"run": "here", "times": 4}),
        (["here", "rate=1e-3"], {"run": "here", "rate": 1e-3}),
        (["here", "rate=null"], {"run": "here", "rate": None}),
        (["here", "tracking.uri=NULL"], {"run": "here", "tracking.uri": None}),
        (["here", "tracking.uri=sqlite:///x?a=b"],
         {"run": "here", "tracking.uri": "sqlite:///x?a=b"}),
        (["here", "quick=True"], {"run": "here", "quick": True}),
        (["here", "sizes=7"], {"run": "here", "sizes": [7]}),
        (["here", "sizes=7,8"], {"run": "here", "sizes": [7, 8]}),
        (["here", "sizes=[7, 8]"], {"run": "here", "sizes": [7, 8]}),
        # as other programs write it
        (["--times", "3", "here"], {"run": "here", "times": 3}),
        (["--times=3", "here"], {"run": "here", "times": 3}),
        (["--quick", "here"], {"run": "here", "quick": True}),
        (["--quick", "false", "here"], {"run": "here", "quick": False}),
        (["here", "--quick", "--times", "3"], {"run": "here", "quick": True, "times": 3}),
    ],
)  # fmt: skip
def test_values(arguments, values):
    defaults = {option.name: option.default for option in COMMAND.options}
    assert COMMAND.parse(arguments) == defaults | values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run: missing, needed is a folder"),
        (["a", "b"], "given a b, allowed is name=value and one run (python -m room.command "),
        (["a", "-x"], "given a -x, allowed is name=value and one run"),
        (["a", "tims=1"], "tims: unknown option; did you mean times?"),
        (["a", "--tims", "1"], "tims: unknown option; did you mean times?"),
        (["a", "zzz=1"], "zzz: unknown option; options of room.command: run, times, rate, quick"),
        (["a", "+times=1"], "+times: unknown option; did you mean times?"),
        (["a", "times=0"], "times: given 0, allowed is a whole number of at least 1"),
        (["a", "times=2.5"], "times: given 2.5, allowed is a whole number of at least 1"),
        (["a", "times=1,2"], "times: given 1,2, allowed is a whole number of at least 1"),
        (["a", "times=true"], "times: given true, allowed is a whole number"),
        (["a", "times="], "times: given nothing, allowed is a whole number"),
        (["a", "--times"], "times: given nothing, allowed is a whole number"),
        (["a", "--times", "--quick"], "times: given nothing, allowed is a whole number"),
        (["a", "rate=nan"], "rate: given nan, allowed is a number above 0, or null"),
        (["a", "quick=1"], "quick: given 1, allowed is true or false"),
        (["a", "form=thre"], "form: given thre, allowed is one of one, three; did you mean three?"),
        (["a", "sizes=[]"], "sizes: given [], allowed is a comma-separated list, each a whole"),
        (["a", "sizes=1,x"], "sizes: given 1,x, allowed is a comma-separated list"),
        (["run="], "run: given nothing, allowed is a folder"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(arguments, message):
    with pytest.raises(ConfigError) as refusal:
        COMMAND.parse(arguments)
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "given",
    [["run=a b"], ["run=5", "times=3", "rate=0.5", "quick=true", "sizes=7,8", "tracking.uri=x=y"]],
)
def test_the_line_of_a_command_is_read_as_what_it_was_made_of(given):
    values = COMMAND.parse(given)
    line = COMMAND.line(values)
    assert COMMAND.parse(shlex.split(line)[3:]) == values
    assert line.startswith("python -m room.command run=") or "'run=a b'" in line


def test_a_command_without_words_takes_none():
    with pytest.raises(ConfigError, match=r"^given here, allowed is name=value \(python -m"):
        COMMAND._replace(alone=()).parse(["here"])


@pytest.mark.parametrize("asked", ["--help", "-h", "help=true"])
def test_help_is_made_from_the_table(asked):
    with pytest.raises(cli.Help) as help:
        COMMAND.parse(["nonsense=1", asked])
    lines = str(help.value).splitlines()
    assert lines[0] == "Does what is asked."
    for line in (
        "  run", "      the run (a folder)", "  times=25", "  rate=null", "  quick=false",
        "  sizes=3,5", "      how often (a whole number of at least 1)",
    ):  # fmt: skip
        assert line in lines


def test_words_and_options_of_a_command_that_hydra_composes():
    arguments = ["selected.yaml", "--seeds", "3", "grid={a: b}", "--out_dir=here", "./lr=1/x.yaml"]
    assert cli.split(arguments, "") == (
        ["selected.yaml", "./lr=1/x.yaml"],
        ["seeds=3", "grid={a: b}", "out_dir=here"],
    )


def test_ctrl_c_is_exit_code_130(monkeypatch, capsys):
    def main(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted by SIGINT\n"


PROGRAM = """
import sys
from disinhib import cli
from disinhib.checks import COUNT, Option
COMMAND = cli.Command("room.command", "Counts.", (Option("times", 3, COUNT, "how often"),))
def main(arguments):
    for number in range(COMMAND.parse(arguments)["times"]):
        print(number)
    if {"jax", "hydra", "ray", "mlflow"} & {*sys.modules}:
        return 3
cli.run(main)
"""


def test_a_command_from_end_to_end():
    run = partial(subprocess.run, text=True, capture_output=True, cwd=Path(__file__).parents[1])
    command = [sys.executable, "-c", PROGRAM]
    done = run([*command, "times=2"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n1\n", "")
    done = run([*command, "time=2"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: time: unknown option; did you mean times?\n")
    done = run([*command, "--help"])
    assert done.returncode == 0 and done.stdout.startswith("Counts.\n\nOptions:\n  times=3\n")
    quiet = " ".join(["'" + command[0] + "'", "-c", '"$0"', "times=100000", "| head -1"])
    done = run(["sh", "-c", quiet, PROGRAM])
    assert (done.stdout, done.stderr) == ("0\n", "")
