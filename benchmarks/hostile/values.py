"""Values that are wrong, missing, huge or of another grammar, for every command."""

from __future__ import annotations

from benchmarks.hostile.case import WORKS, Case, refused
from benchmarks.hostile.environments import PLAIN
from benchmarks.hostile.reference import OPTIONS, TRAINING, TUNE, WHOLE

EITHER = WORKS | refused()
NUMBERS = (
    *("-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "null", "", "two", "[1,2]", "{a: 1}"),
    *("true", "1,2", "'3'", "${x}", "${oc.env:NOTHING}", "???"),
)
# Of an option, values that it may not have.
TUNE_VALUES = {
    "trials": NUMBERS,
    "epochs": ("-1", "0", "nan", "null", "", "two", "1,2"),
    "seed": ("-1", "1.5", "nan", "null", "9" * 40, "two"),
    "space": ("nonsense", "ruels", "null", "", "[rules]", "../x", "rules,bp"),
    "metric": ("test_accuracy", "valid_acuracy", "null", ""),
    "mode": ("min", "up", "1"),
    "replicates": ("0", "-1", "nan", "null"),
    "searcher": ("nonsense", "tp", "", "tpe,random"),
    "searcher.batch": ("0", "nan", "null"),
    "searcher.deterministic": ("maybe", "1", "null", ""),
    "scheduler": ("nonsense", ""),
    "scheduler.grace_period": ("0", "-1", "99", "nan"),
    "cluster.cpus_per_trial": ("0", "-1", "1.5", "4096", "nan", "null"),
    "cluster.gpus_per_trial": ("-1", "1", "99", "nan", "null"),
    "cluster.max_concurrent": ("0", "-1", "nan", "''"),
    "checkpoints.every_seconds": ("-1", "nan", "null", "soon"),
    "checkpoints.cap_gb": ("0", "-1", "nan", "inf"),
    "checkpoints.keep_best": ("-1", "1.5", "null"),
    "batchsize": ("0", "-1", "nan", "null", "9" * 40, "1000000000"),
    "dataset": ("nonsense", "mnits", ""),
    "dataset.valid_split": ("0", "1", "-1", "nan", "1e-9", "null"),
    "model.vf.sizes_hidden": ("[]", "[0]", "[-1]", "[1.5]", "16", "[nan]", "[16,16,16]", "[a]"),
    "model.vf.nb_hidden": ("-1", "1.5", "null", "100000"),
    "trainer.nonsense": ("1",),
    "optimizer.learning_rate": ("-1", "nan", "inf", "null", "fast"),
    "points": ("/dev/null/x", "nowhere.yaml", "/dev/null", "out", ""),
    "warm_start": ("nowhere", "../x", "1"),
    "device": ("gpu", "tpu", "null"),
    "gpu_id": ("-1", "nan"),
    "test_at_end": ("true",),
    "tracking.experiment": ("null", ""),
    "resume": ("true", "maybe", "null"),
    "extend": ("true",),
    "study": ("null/x",),
    "experiment": ("nonsense", "smok", "table1", "../smoke"),
    "max_weight": ("-1", "nan"),
    "nonsense": ("1",),
    "trails": ("3",),
}
LIMITED = "ulimit -v 16000000; exec {}"  # KB: what is huge must not take the machine's memory
# Words in other grammars, after a study's or a training's own.
WORDS: dict[str, tuple[tuple[str, ...], str]] = {
    "+x=1": (("+x=1",), "x"),
    "++x=1": (("++x=1",), "x"),
    "~trials": (("~trials",), "trials"),
    "~x": (("~x",), "x"),
    "epochs": (("epochs",), "epochs"),
    "=1": (("=1",), ""),
    "=": (("=",), ""),
    "a=b=c": (("a=b=c",), "a"),
    "two values": (("seed=0,1",), "seed"),
    "a range": (("seed=range(3)",), "seed"),
    "a glob": (("seed=glob(*)",), "seed"),
    "nested brackets": (("model.vf.sizes_hidden=[[[16]]]",), "sizes_hidden"),
    "an open bracket": (("model.vf.sizes_hidden=[16",), "sizes_hidden"),
    "an open quote": (("optimizer='adam",), "optimizer"),
    "an option of Hydra's": (("hydra.run.dir=elsewhere",), "hydra"),
    "another package": (("trainer@x=bp",), "trainer"),
    "a word": (("hello",), "hello"),
    "an empty word": (("",), ""),
    "a byte that is no text": (("seed=\udcff",), "seed"),
    "an escape sequence": (("x\x1b[31m=1",), "x"),
    "a very long word": (("x" * 5000 + "=1",), "x"),
    "a very long value": (("seed=" + "9" * 5000,), "seed"),
}
# Hydra's flags. A study has none of them; a training takes them.
FLAGS = (
    *("-m", "--multirun", "--cfg", "--cfg=job", "--info", "--resolve", "--nonsense", "-x", "--"),
    *("--config-name=x", "--config-path=/nowhere", "--package", "--shell-completion"),
)
# What else is wrong: (name, words, what the line says).
REFUSED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("resume of nothing", (*TUNE, "study=nowhere", "resume=true"), "nowhere"),
    ("resume without a name", ("-m", "tune_main", "resume=true"), "resume"),
    ("extend of nothing", ("-m", "tune_main", "study=nowhere", "extend=true"), "nowhere"),
    ("resume and extend", ("-m", "tune_main", "study=x", "resume=true", "extend=true"), ""),
    ("resume of ../", ("-m", "tune_main", "study=../x", "resume=true"), "study"),
    ("a resumed training of nothing", ("-m", "disinhib", "resume=nowhere"), "resume"),
    ("a resumed training of a file", ("-m", "disinhib", "resume=/etc/passwd"), "resume"),
    ("a swept value that is wrong", ("-m", "disinhib", "-m", "epochs=-1,1"), "epochs"),
    ("--cfg nonsense", ("-m", "disinhib", "--cfg", "nonsense"), "cfg"),
    ("retrain nothing", ("-m", "analysis.retrain"), "needed"),
    ("retrain two files", ("-m", "analysis.retrain", "a", "b"), "needed"),
    ("retrain an experiment without a grid", ("-m", "analysis.retrain", "experiment=smoke"), ""),
    ("retrain no experiment", ("-m", "analysis.retrain", "experiment=nonsense"), "experiment"),
    ("retrain an unknown axis", ("-m", "analysis.retrain", "experiment=smoke_table1", "dept=1"),
     "dept"),
    ("retrain an unknown value of an axis",
     ("-m", "analysis.retrain", "experiment=smoke_table1", "depth=7"), "depth"),
    ("replay nothing", ("-m", "analysis.replay"), "run"),
    ("replay two", ("-m", "analysis.replay", "a", "b"), "a b"),
    ("disinhib nonsense", ("-m", "VERB", "nonsense"), "nonsense"),
    ("disinhib tun", ("-m", "VERB", "tun"), "did you mean tune"),
    ("disinhib figure", ("-m", "VERB", "figure", "fig9"), "fig9"),
    ("disinhib ''", ("-m", "VERB", ""), "verb"),
    ("disinhib --nonsense", ("-m", "VERB", "--nonsense"), "nonsense"),
    ("disinhib tune trials=-1", ("-m", "VERB", "tune", "trials=-1"), "trials"),
    ("disinhib runs nonsense=1", ("-m", "VERB", "runs", "nonsense=1"), "nonsense"),
    ("pipeline seeds=0", ("-m", "analysis.pipeline", *OPTIONS, "seeds=0"), "seeds"),
    ("pipeline seeds=nonsense", ("-m", "analysis.pipeline", *OPTIONS, "seeds=nonsense"), "seeds"),
    ("pipeline seeds=", ("-m", "analysis.pipeline", *OPTIONS, "seeds="), "seeds"),
    ("pipeline trials=-1", ("-m", "analysis.pipeline", "trials=-1"), "trials"),
    ("pipeline nonsense=1", ("-m", "analysis.pipeline", "nonsense=1"), "nonsense"),
    ("pipeline plan=maybe", ("-m", "analysis.pipeline", "plan=maybe"), "plan"),
)  # fmt: skip
# The same for a command that reads a study that is there.
READING: tuple[tuple[str, str], ...] = (
    ("selection", "study=nowhere"), ("selection", "study=whol"), ("selection", "study="),
    ("selection", "study='"), ("selection", "study=x' OR '1'='1"), ("selection", "study=%"),
    ("selection", "top=0"), ("selection", "top=-1"), ("selection", "top=nan"),
    ("selection", "top=1.5"), ("selection", "top="), ("selection", "top=null"),
    ("selection", "per=nonsense"), ("selection", "per="), ("selection", "per=[]"),
    ("selection", "per=null"), ("selection", "metric=test_accuracy"), ("selection", "metric="),
    ("selection", "nonsense=1"), ("selection", "tpo=1"), ("selection", "hello"),
    ("runs", "study=nowhere"), ("runs", "nonsense=1"), ("runs", "hello"), ("runs", "study=\udcff"),
    ("report", "study=nowhere"), ("report", "nonsense=1"), ("report", "uot=x"),
    ("replay", "0" * 32), ("replay", "nonsense"), ("replay", "run="), ("replay", "'"),
    ("replay", "../../etc"), ("replay", "nonsense=1"),
    ("retrain", "seeds=0"), ("retrain", "seeds=-1"), ("retrain", "seeds=nan"),
    ("retrain", "seeds=[1,1]"), ("retrain", "seeds="), ("retrain", "seeds=null"),
    ("retrain", "seeds=99999999999"), ("retrain", "seeds=[-1]"), ("retrain", "nonsense=1"),
    ("retrain", "epochs=3"), ("retrain", "trainer=bp"), ("retrain", "study=../x"),
    ("retrain", "study="), ("retrain", "cluster.cpus_per_trial=4096"),
    ("retrain", "cluster.nonsense=1"), ("retrain", "device=gpu"), ("retrain", f"study={WHOLE}"),
    ("retrain", "experiment=smoke_table1"),
)  # fmt: skip
BEGINNING = {
    "selection": ("-m", "analysis.selection"), "runs": ("-m", "analysis.runs"),
    "report": ("-m", "analysis.report"), "replay": ("-m", "analysis.replay"),
    "retrain": ("-m", "analysis.retrain", "selected.yaml"),
}  # fmt: skip
# What a points file holds.
POINTS = {
    "nothing": b"",
    "no list": b"trainer: bp\n",
    "no YAML": b"- {trainer: [",
    "binary": b"\x00\xff\xfe\x80",
    "an unknown option": b"- {trainer: bp, nonsense: 1}\n",
    "a value out of range": b"- {trainer: bp, optimizer.learning_rate: 1.0e+9}\n",
    "a text for a number": b"- {trainer: bp, optimizer.learning_rate: fast}\n",
    "NaN": b"- {trainer: bp, optimizer.learning_rate: .nan}\n",
    "a tag that runs code": b"- !!python/object/apply:os.system ['touch owned']\n",
    "too many": b"- {trainer: bp}\n" * 50,
}


def cases() -> list[Case]:
    verb = ("-c", "from disinhib.commands import run; run()")
    said = lambda words: verb + words[2:] if words[:2] == ("-m", "VERB") else words
    shown = lambda text: ascii(text)[1:-1] if len(text) < 40 else f"{ascii(text)[1:20]}..."
    refusals = [
        *(
            Case(
                f"values: {option}={shown(value)}: tune",
                "tune",
                refused(_last(option)),
                words=(*TUNE, f"{option}={value}"),
            )
            for option, values in TUNE_VALUES.items()
            for value in values
        ),
        *(
            Case(f"values: {what}: {command}", command, refused(says), words=(*words, *more))
            for what, (more, says) in WORDS.items()
            for command, words in (("tune", TUNE), ("train", ("-m", "disinhib", *TRAINING)))
            if not (command == "train" and what in ("~trials", "an option of Hydra's"))
        ),
        *(Case(f"values: {flag}: tune", "tune", refused(), words=(*TUNE, flag)) for flag in FLAGS),
        *(
            Case(f"values: {flag}: train", "train", EITHER, words=("-m", "disinhib", flag))
            for flag in (
                "--cfg=job",
                "--info",
                "--nonsense",
                "-x",
                "--config-name=x",
                "--config-path=/nowhere",
                "--package",
                "--resolve",
                "--version",
            )
        ),
        *(
            Case(f"values: {name}", "runs", refused(says), words=said(words))
            for name, words, says in REFUSED
        ),
        *(
            Case(
                f"values: {option.partition('=')[0] if len(option) > 40 else shown(option)}:"
                f" {command}",
                command,
                refused(),
                words=(*BEGINNING[command], option),
                needs=WHOLE,
            )
            for command, option in READING
        ),
        *(
            Case(
                f"values: points of {what}: tune",
                "tune",
                refused("points"),
                words=(*TUNE, "points=points.yaml"),
                prepare=lambda place, text=text: (place.cwd / "points.yaml").write_bytes(text),
            )
            for what, text in POINTS.items()
        ),
    ]
    return [
        *(case._replace(shell=LIMITED) for case in refusals),
        *(
            Case(f"values: {module} {flag}", "runs", WORKS, words=("-m", module, flag))
            for module in ("tune_main", "disinhib", "analysis.selection", "analysis.retrain",
                           "analysis.report", "analysis.runs", "analysis.replay",
                           "analysis.pipeline", "benchmarks.driver")
            for flag in ("--help", "-h", "help=true")
        ),
        Case("values: a folder that cannot be read, as points: tune", "tune", refused("points"),
             words=(*TUNE, "points=points.yaml"), shell=f"exec {PLAIN}{{}}",
             prepare=lambda place: (place.cwd / "points.yaml").touch(0o000)),
        Case("values: a plan of nothing: tune", "tune", refused("trials"),
             words=("-m", "tune_main", "plan=true", "trials=0")),
        Case("values: a plan: tune", "tune", WORKS, words=(*TUNE, "plan=true")),
    ]  # fmt: skip


def _last(option: str) -> str:
    return option.rpartition(".")[2]
