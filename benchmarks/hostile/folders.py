"""Names of folders, files and studies, and what may be where a folder is expected."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from benchmarks.hostile.case import BEST, UI, WORKS, Case, Scene, in_path, pasted, printed, refused
from benchmarks.hostile.environments import PLAIN
from benchmarks.hostile.place import Ended, Expected, Place
from benchmarks.hostile.reference import NEW, OPTIONS, WHOLE
from benchmarks.hostile.servers import unused_port

EITHER = WORKS | refused()
# Of a folder: all of them work as out_dir, unless MLflow can have no store there.
NAMES = (
    *("a b", " lead and trail ", "100%", "%41%2F", "what?", "?mode=memory", "a#b", "it's"),
    *('say "x"', "lr=0.1 (a)", "a,b", "[1]", "{a: 1}", "$HOME", "`id`", "a;b&c|d", "*", "~", "!x"),
    *("back\\slash", "a:b", "a+b@c", "tüb-日本", "cafe\u0301", "-dash", "--help=1", "null", "true"),
    *("1", "0x10", "1e3", "trailing/", "./dot/./x", "../up", "a" * 200),
)
REFUSED_NAMES = ("new\nline", "tab\there", "x" * 300, "${nothing}", "", "\udcff", "a\x1b[31mb")
STUDIES = {
    **dict.fromkeys(("1", "true", "0.1", "1e3", "a.b", "x" * 100), WORKS),
    **dict.fromkeys(
        ("../x", "a/b", "/abs", ".", "..", "a b", "%", "?", "#", "it's", "a,b", "[a]", "-", "$x",
         "x" * 300, "a\nb", "*", "mlflow.db", "mlflow-artifacts"),
        refused("study"),
    ),
    **dict.fromkeys(("", "null", "ü", "-x", ".hidden", "con", "report-x"), EITHER),
}  # fmt: skip


def _file(path: str, content: str = "x") -> Callable[[Place], None]:
    def prepare(place: Place) -> None:
        (place.cwd / path).parent.mkdir(parents=True, exist_ok=True)
        (place.cwd / path).write_text(content)

    return prepare


def _folder(path: str, mode: int = 0o755) -> Callable[[Place], None]:
    return lambda place: (place.cwd / path).mkdir(mode, parents=True)


def _link(path: str, to: str) -> Callable[[Place], None]:
    return lambda place: (place.cwd / path).symlink_to(to)


def _pipe(place: Place) -> None:
    os.mkfifo(place.cwd / "there")


def _socket(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(place.cwd / "there"))


# What is there already, at the path `there`.
THERE: dict[str, tuple[Callable[[Place], None], Expected]] = {
    "a file": (_file("there"), refused("there")),
    "a folder that cannot be written": (_folder("there", 0o555), refused("there")),
    "a folder that cannot be entered": (_folder("there", 0o000), refused("there")),
    "a link to itself": (_link("there", "there"), refused("there")),
    "a link to nothing": (_link("there", "nowhere/x"), EITHER),
    "a pipe": (_pipe, refused("there")),
    "a socket": (_socket, refused("there")),
}
OUT_DIRS = {
    "/dev/null/x": refused("out_dir"),
    "/proc/x": refused("out_dir"),
    "/sys": refused("out_dir"),
    "/dev/full": refused("out_dir"),
    "http://there/x": EITHER,
    "s3://bucket/x": EITHER,
}


def _shown(name: str) -> str:
    return ascii(name) if len(name) < 30 else f"{name[:5]!a} x {len(name)}"


def cases() -> list[Case]:
    tune = lambda *options: ("-m", "tune_main", *OPTIONS, *options)
    top = lambda name: f"cwd/{Path(name).parts[0]}" if name.strip("./") else "cwd/out"
    return [
        *(
            Case(f"folders: out_dir={_shown(name)}: tune", "tune", in_path(name),
                 options=(f"out_dir={name}",), out=name)
            for name in NAMES
        ),
        *(
            Case(f"folders: out_dir={_shown(name)}: tune", "tune", EITHER,
                 words=tune(f"study={NEW}", f"out_dir={name}"), leaves=(top(name),))
            for name in REFUSED_NAMES
        ),
        *(
            Case(f"folders: out_dir={_shown(name)}: train", "train", WORKS,
                 options=(f"out_dir={name}",), out=name)
            for name in NAMES[:: 3]
        ),
        *(
            Case(f"folders: current folder {_shown(name)}: {command}", command, in_path(name),
                 current=name)
            for name in ("a b", "100%", "what?", "a#b", "it's", "lr=0.1 (a)", "a,b", "tüb-日本")
            for command in ("tune", "selection")
        ),
        *(
            Case(f"folders: study={_shown(name)}: tune", "tune", expected,
                 words=tune(f"study={name}"))
            for name, expected in STUDIES.items()
        ),
        *(
            Case(f"folders: selected={_shown(name)}: selection", "selection", WORKS,
                 words=("-m", "analysis.selection", f"study={WHOLE}", f"selected={name}"),
                 needs=WHOLE, leaves=(f"cwd/{name}",))
            for name in ("a b.yaml", "100%.yaml", "it's", "a,b", "[1]", "1", "tüb", "-x")
        ),
        *(
            Case(f"folders: out={_shown(name + ending)}: {module}", "runs", WORKS,
                 words=("-m", f"analysis.{module}", f"study={WHOLE}", f"out={name}{ending}"),
                 needs=WHOLE, leaves=(f"cwd/{name}{ending}",))
            for module, ending in (("runs", ".csv"), ("report", ""))
            for name in ("a b", "100%", "what?#", "it's", "a,b", "1")
        ),
        *(
            Case(f"folders: {module} {option}={_shown(name)}", "runs", refused(option),
                 words=("-m", f"analysis.{module}", f"study={WHOLE}", f"{option}={name}"),
                 needs=WHOLE)
            for module, option in (("runs", "out"), ("report", "out"), ("selection", "selected"))
            for name in ("", "/dev/null/x", "out/mlflow.db/x", "x" * 300)
        ),
        *(
            Case(f"folders: out_dir is {what}: {module}", "tune", expected, prepare=prepare,
                 words=("-m", module, "out_dir=there", *more), leaves=("cwd/there", "cwd/nowhere"),
                 shell=f"exec {PLAIN}{{}}")
            for what, (prepare, expected) in THERE.items()
            for module, more in (("tune_main", OPTIONS), ("disinhib", ("epochs=1",)))
        ),
        *(
            Case(f"folders: dataset.path is {what}: train", "train", refused("there|dataset.path"),
                 prepare=prepare, shell=f"exec {PLAIN}{{}}",
                 words=("-m", "disinhib", "dataset=mnist", "dataset.path=there"))
            for what, (prepare, _) in THERE.items()
        ),
        *(
            Case(f"folders: dataset.path of {what}: train", "train", refused(says),
                 prepare=_file(f"there/{file}", "\x00\x00\x08\x03"),
                 words=("-m", "disinhib", "dataset=mnist", "dataset.path=there"))
            for what, file, says in (
                ("Kaggle's names", "train-images.idx3-ubyte", "idx3-ubyte"),
                ("a folder called like the file",
                 "train-images-idx3-ubyte/train-images-idx3-ubyte", "idx3-ubyte"),
                ("torchvision's folders", "MNIST/raw/train-images-idx3-ubyte", "idx3-ubyte"),
                ("another suffix", "train-images-idx3-ubyte.zip", "idx3-ubyte"),
            )
        ),
        *(
            Case(f"folders: out_dir={name}: tune", "tune", expected,
                 words=tune(f"study={NEW}", f"out_dir={name}"), leaves=("cwd/http:", "cwd/s3:"))
            for name, expected in OUT_DIRS.items()
        ),
        *(
            Case(f"pasted: the best trial, from {_shown(name)}", options=(f"out_dir={name}",),
                 out=name, then=pasted(BEST), leaves=("cwd/out",))
            for name in ("out", "lr=0.1 (a)", "it's [1]; $HOME")
        ),
        *(
            Case(f"pasted: the UI, for a store in {_shown(name)}", options=(f"out_dir={name}",),
                 out=name, then=_opens_ui)
            for name in ("out", "a b, it's; $HOME")
        ),
    ]  # fmt: skip


def _opens_ui(scene: Scene, ended: Ended) -> list[str]:
    """The UI that is printed shows the study's runs; it runs on another port than it says."""
    line, port = printed(ended, UI), unused_port()
    if line is None:
        return ["it prints no line with the UI's command"]
    asks = (
        f"from mlflow import MlflowClient; c = MlflowClient('http://127.0.0.1:{port}'); "
        "e = [e.experiment_id for e in c.search_experiments()]; "
        f"assert any(r.info.run_name == '{NEW}' for r in c.search_runs(e))"
    )
    asks_health = f'import urllib.request as u; u.urlopen("http://127.0.0.1:{port}/health")'
    done = scene.run(
        f"{line} --port {port} > ui 2>&1 & ui=$!; "
        f"until python -c '{asks_health}' 2> /dev/null"
        f'; do kill -0 $ui || exit 9; sleep 1; done; python -c "{asks}"; code=$?; '
        "kill $ui; wait $ui; cat ui; rm ui; exit $code",
        WORKS,
    )
    return done.wrong
