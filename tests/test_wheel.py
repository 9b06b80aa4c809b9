"""The package as others get it: a wheel, installed, used from an empty folder.

(`make wheel-check` does so in an environment with nothing else in it, and runs a study.)
"""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("disinhib", "search_spaces", "analysis", "benchmarks", "tests", "conf")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "tune_main.py")
HELP = """
import contextlib, io, sys
from disinhib import commands
for verb in commands.VERBS:
    said = io.StringIO()
    sys.argv = ["disinhib", *verb.split(), "--help"]
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        commands.run()
    print(verb, len(said.getvalue()), sep=": ")
"""


def call(*words, **options):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of a copy, as a build leaves files in its source, and goes by those it finds there."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    leave = shutil.ignore_patterns("__pycache__", ".*")
    for name in SOURCE:
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    call(sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", built, source)
    (file,) = built.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of executables of an environment with the wheel; its dependencies are ours."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    purelib = Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")[:-1]
    )
    # After its own folder on the path, so that the wheel is found before our editable install.
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps",
         "--no-index", "--ignore-installed", wheel)  # fmt: skip
    return place / "bin"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, and an environment that knows no other source."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def test_it_has_the_code_the_configurations_and_the_template(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    packages = ("disinhib", "search_spaces", "analysis")
    code = {
        file.relative_to(ROOT).as_posix()
        for package in packages
        for file in (ROOT / package).rglob("*.py")
    }
    configurations = {
        f"disinhib/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "conf").rglob("*.yaml")
    }
    template = "analysis/report/report.html.j2"
    assert names == {*code, *configurations, template, "tune_main.py"}


def test_it_finds_its_configurations_and_its_own_code(installed, elsewhere):
    code = (
        "import disinhib, disinhib.tuning.options; from disinhib import hydra_config as h;"
        "from disinhib.tuning import provenance as p;"
        "o, _ = h.compose('study', ['experiment=smoke']);"
        "print(disinhib.__file__, h.CONFIGURATIONS, o['space'], sep='\\n');"
        "print(*p.code(p.ROOT)['files'], sep='\\n')"
    )
    file, configurations, space, *files = call(installed / "python", "-c", code).splitlines()
    assert file.startswith(str(installed.parent))
    assert Path(configurations) == Path(file).with_name("conf")
    assert space
    # By the same names as in a checkout, so that a trial can be replayed in either.
    code = "from disinhib.tuning import provenance as p; print(*p.code(p.ROOT)['files'], sep='\\n')"
    assert files == call(sys.executable, "-c", code, cwd=ROOT).splitlines()


def test_every_verb_has_its_help(installed, elsewhere):
    assert "disinhib tune " in call(installed / "disinhib", "--help")
    said = dict(
        line.rsplit(": ", 1) for line in call(installed / "python", "-c", HELP).splitlines()
    )
    assert len(said) > 10 and min(map(int, said.values())) > 100
    assert list(elsewhere.iterdir()) == []


def test_commands_that_are_printed_work_without_the_repository(installed, elsewhere):
    code = "from disinhib import commands; print(*commands.tune_words('--help'), sep='\\n')"
    words = call(installed / "python", "-c", code).splitlines()
    assert call(*words).startswith("# A study: ")
