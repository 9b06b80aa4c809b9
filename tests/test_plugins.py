"""Plugins: what is refused, and that a plugin's entries are entries of every table.

A plugin that is loaded stays loaded in its process: a fixture takes it out again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import jax
import pytest
import yaml

import disinhib
from analysis.configurations import Configuration
from analysis.figures import trajectory
from disinhib import checkpoint, config, export, hydra_config, plugins, rules, training
from disinhib.errors import ConfigError, InputError
from disinhib.metrics import SELECTION
from disinhib.solvers import stability
from disinhib.tuning import manifest, options, provenance, space_tree, study as studies
from search_spaces import SPACES

RULE = """
    import dataclasses
    from dataclasses import dataclass
    import jax
    from disinhib.checks import POSITIVE, Option
    from disinhib.rules import RULES as THEIRS, Competitor, Family, Rule, Update

    @dataclass
    class Note:  # looks for its module
        text: str

    SPEED = (Option("speed", 2.0, POSITIVE, "of all gradients"),)

    def update(architecture, parameters, rule_state, hyper, x, target):
        own = THEIRS["bp"].family.update(architecture, parameters, rule_state, hyper, x, target)
        faster = jax.tree.map(lambda g: hyper.rule["speed"] * g, own.gradients)
        return own._replace(gradients=faster)

    def branch(trial):
        speed = trial.suggest_float("fast-bp.trainer.speed", 1.0, 4.0)
        return {"model/vf": "non-dale", "trainer": "fast-bp", "trainer.speed": speed}

    words = Competitor("bp with larger steps", "#123456", branch)
    family = Family("fast", update, options=SPEED)
    RULES = {"fast-bp": Rule("fast-bp", family, {"non-dale": words}, SPEED)}
"""
CLOSED_LOOP = """
    import jax.numpy as jnp
    from disinhib.checks import FLAG, Option
    from disinhib.feedback import jacobian_weights
    from disinhib.microcircuit import microcircuit
    from disinhib.rules import BRANCHES, RULES as THEIRS, Competitor, Family, Rule

    def update(architecture, parameters, rule_state, hyper, x, target):
        own = THEIRS["bp"].family.update(architecture, parameters, (), hyper, x, target)
        return own._replace(rule_state=rule_state + 1)

    def feedback_and_aim(architecture, parameters, rule_state, hyper, opened, target):
        circuit = microcircuit(architecture, hyper)
        return jacobian_weights(circuit, parameters, opened), target

    words = Competitor("counts its batches", "#123456", BRANCHES["bp-ei"])
    flags = (Option("average_fb_weights", False, FLAG, ""),)
    start = lambda architecture, hyper, key: jnp.zeros((), int)
    family = Family("counting", update, feedback_and_aim, flags, start)
    RULES = {"counting": Rule("counting", family, {"dale": words}, flags)}
"""
ROOT = str(Path(plugins.__file__).parents[1])
METRIC = """
    from disinhib.metrics import Metric
    METRICS = {"margin": Metric(lambda loss, output, target, labels: output[:, 0], 1, "margin", "")}
"""


@pytest.fixture(autouse=True)
def unloaded(recompiled):
    """Takes out what a test has loaded."""
    tables = [
        *(table.entries for table in plugins.tables().values()),
        *(rules.FAMILIES, rules.COMPETITORS, rules.BRANCHES, SELECTION, plugins.LOADED),
    ]
    before = [dict(table) for table in tables]

    def unload():
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
        hydra_config._base.cache_clear()
        options._cached.cache_clear()

    yield unload
    unload()


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.py"):
        (tmp_path / name).write_text(dedent(text), "utf-8")
        return str(tmp_path / name)

    return write


def refusal(given):
    with pytest.raises(ConfigError) as refused:
        plugins.load(plugins.read(given))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_rule_of_a_plugin_is_one_of_ours(write):
    given = [f"plugins={write(RULE)}", "trainer=fast-bp", "trainer.speed=3"]
    composed, choices = hydra_config.compose("train", given)
    run = config.parse(composed)
    assert run.rule == "fast-bp" and run.hyperparameters.rule == {"speed": 3.0}
    assert rules.words("fast-bp") and rules.colour("fast-bp") == "#123456"
    command = hydra_config.command(composed, choices)
    assert "fast-bp" in command and "mine.py" in command
    own, all_rules = SPACES["fast_bp"], SPACES["all_rules"]
    assert own is rules.BRANCHES["fast-bp"]
    study = options.compose([given[0], "search.trainer=[bp,fast-bp]", "space=all_rules"])
    trials = options.check_space(study)
    assert {trial["rule"] for trial in trials} == {"bp", "fast-bp"}
    assert "fast-bp" in space_tree.rules_of(all_rules)
    assert all(write(RULE) in trial["command"] for trial in trials)


def test_a_closed_loop_of_a_plugin_is_checked_and_named_as_ours(write):
    """Without our options, and with a whole number to remember."""
    small = ["model/vf=dale", "model.vf.nb_hidden=1", "model.vf.sizes_hidden=[4]", "batchsize=500"]
    given = [f"plugins={write(CLOSED_LOOP)}", "trainer=counting", *small, "epochs=1"]
    composed, _ = hydra_config.compose("train", given)
    run = config.parse(composed)
    state = training.train(run, [0], lambda state, metrics: None)
    parameters, memory = jax.tree.map(lambda leaf: leaf[0], (state.parameters, state.rule))
    assert memory == 2
    x, labels = training.prepare(run).validation
    metrics, why = stability.check(run, parameters, x[:4] / 16, labels[:4], memory)
    assert metrics["ode_reached"] == 1 and not why
    assert Configuration(composed, "", "counting", {}).feedback == "per sample"
    paths = space_tree.branches(SPACES["feedback_paths"])
    assert {p.overrides["trainer"] for p in paths} == {
        "exact-inv",
        "lin-thresh",
        "lin-contrast",
        "taylor",
    }


def test_a_study_goes_on_when_the_file_of_a_plugin_is_gone(write):
    file = write(RULE)
    study = options.compose([f"plugins=[{file}]", "space=fast_bp"])
    os.unlink(file)
    for branch in space_tree.branches(study.search_space):
        assert file in options.configure(study, 0, branch.overrides)["command"]
    with pytest.raises(ConfigError, match="No such file"):
        options.compose([f"plugins=[{file}]", "space=fast_bp"])


def test_a_study_is_resumed_with_the_text_that_it_has_kept(write, tmp_path, unloaded, capsys):
    """As where it was imported, too: there the file is another or none, and is not run."""
    file, place = write(RULE), f"out_dir={tmp_path}"
    begun = options.compose([place, "study=mine", f"plugins=[{file}]", "space=fast_bp"])
    manifest.write(begun.folder, studies.job(begun).manifest, options.kept(begun))
    write("raise SystemExit(3)")
    for state in ("has changed since", f"is gone from {file}"):
        unloaded()
        again = options.compose([place, "study=mine", "resume=true"])
        assert state in capsys.readouterr().out
        assert studies.job(again).manifest.provenance["plugins"][0]["text"] == dedent(RULE)
        (branch, *_) = space_tree.branches(again.search_space)
        assert options.configure(again, 0, branch.overrides)["rule"] == "fast-bp"
        with pytest.raises(ConfigError, match=r"mine began with another text of the plugin mine"):
            options.compose([place, "study=mine", "resume=auto", f"plugins=[{write('1 / 0')}]"])
        os.unlink(file)
    unloaded()
    with pytest.raises(ConfigError, match="No such file"):
        options.compose([place, "study=mine", "extend=true"])


def test_a_study_keeps_the_text_of_its_plugins(write):
    file = write(RULE)
    plugins.load(plugins.read(file))
    kept = json.loads(json.dumps(plugins.kept()))
    assert kept[0]["text"] == dedent(RULE) and kept[0]["sha256"] == plugins.read(file).sha256
    here = provenance.decisive(("digits", None, 0.1))
    assert here["code"]["files"]["plugin mine"] == kept[0]["sha256"]
    before = {**here, "code": {"files": {**here["code"]["files"], "plugin mine": "another"}}}
    assert provenance.differences(before, here) == ["plugin mine changed"]


def test_a_plugin_runs_from_its_kept_text(write, tmp_path):
    """In another process, as on another machine: its file has changed, then is gone."""
    file = write(RULE)
    kept = {**plugins.read(file)._asdict(), "sha256": plugins.read(file).sha256}
    code = (
        "import sys, json; from disinhib import plugins\n"
        "assert 'jax' not in sys.modules\n"
        "print(*plugins.load_kept(json.load(sys.stdin)), sep='\\n')\n"
        "from disinhib.rules import RULES; print('fast-bp' in RULES)"
    )

    def elsewhere():
        return subprocess.run(
            [sys.executable, "-c", code], input=json.dumps([kept]), capture_output=True, text=True,
            check=True, env={**os.environ, "PYTHONPATH": ROOT}, cwd=tmp_path,
        ).stdout.split("\n")  # fmt: skip

    used = "its kept text is used"
    write("RULES = {}")
    assert elsewhere()[:2] == [f"plugin mine: {file} has changed since: {used}", "True"]
    os.unlink(file)
    assert elsewhere()[:2] == [f"plugin mine is gone from {file}: {used}", "True"]


def test_a_plugin_is_loaded_once(write, tmp_path):
    first = plugins.read(write(METRIC))
    plugins.load(first)
    plugins.load(first)
    assert "valid_margin" in SELECTION and SELECTION["valid_margin"].words == "validation margin"
    study = options.compose([f"plugins=[{first.file}]", "metric=valid_margin"])
    assert study.metric == "valid_margin"
    write(METRIC + "\n# another")
    assert "another text of the plugin mine is loaded already" in refusal(first.file)


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("\n1 / 0", 2, "ZeroDivisionError: division by zero"),
        ("x = (", 1, "SyntaxError"),
        ("import not_there_at_all", 1, "ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", 1, "SystemExit: 3"),
        ("x = 1", None, "has no entry of RULES, DATASETS, SPACES"),
        ("RULES = {}", None, "has no entry of"),
        ("x = 1\nRULES = [1]", 2, "RULES is a list, needed is a dict"),
        ("RULES = {'r': 1}", 1, "RULES['r'] is a int, needed is a disinhib.rules.base.Rule"),
        ("SPACES = {'s': 1}", 1, "SPACES['s'] is a int, needed is a function of a trial"),
        ("SPACES = {'a b': print}", 1, "SPACES['a b']: a name has letters"),
        ("SPACES = {'rules': print}", 1, "SPACES['rules']: the name is taken"),
        ("import beside\nSPACES = {'s': print}", 1, "imports beside, which lies beside it"),
        ("def f():\n  import beside\nSPACES = {'s': f}", 2, "imports beside, which lies beside it"),
        ("from plain import own\nSPACES = {'s': own.f}", 1, "imports plain, which lies beside it"),
        (RULE.replace('Rule("fast-bp"', 'Rule("bp"'), 25, "its own name is bp"),
        (RULE.replace('Family("fast"', 'Family("bp"'), 25, "the family bp is another's"),
        (RULE.replace("#123456", "red"), 25, "colour red, allowed is #RRGGBB"),
        (RULE.replace('{"non-dale": words}', "words"), 25, "circuits is a Competitor, needed is"),
        (RULE.replace('": words}', '": ""}'), 25, "circuits['non-dale'] is a str, needed is a"),
        (RULE.replace('"fast-bp", family', '"fast-bp", 1'), 25, "family is a int, needed is a"),
        (RULE.replace(", branch)", ", None, 'a b')"), 25, "a b: a name has letters"),
        (
            RULE.replace("SPEED)}", "(1,))}"),
            25,
            "an option is a int, needed is a disinhib.checks.Option",
        ),
        (RULE.replace('{"non-dale"', '{"dales"'), 25, "circuits are dales, allowed is dale"),
        (RULE.replace(", options=SPEED)", ")"), 25, "options that its family has not: speed"),
    ],
    ids=lambda value: value.split("\n")[0][:20] if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_plugin_is_said_in_one_line(
    write, tmp_path, monkeypatch, text, line, why
):
    (tmp_path / "plain").mkdir()  # a package without __init__.py
    write("f = print", "plain/own.py")
    monkeypatch.syspath_prepend(os.path.dirname(write("y = 1", "beside.py")))
    for name in ("beside", "plain", "plain.own"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = {*rules.RULES}, {*SPACES}
    file = write(text)
    message = refusal(file)
    assert message.startswith(f"plugins: {file}" + (f", line {line}: " if line else " has"))
    assert why in message
    assert ({*rules.RULES}, {*SPACES}) == before and not plugins.LOADED


def test_a_plugin_that_cannot_be_read_is_refused(write, tmp_path):
    assert "No such file" in refusal(str(tmp_path / "gone.py"))
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    assert "text in UTF-8" in refusal(str(tmp_path / "latin.py"))
    missing = refusal("not.there")
    assert "allowed is a file that ends in .py, or an installed module" in missing
    assert missing.endswith("(ModuleNotFoundError: No module named 'not')")
    with pytest.raises(ConfigError, match=r"plugins: given \[5\], allowed is a list"):
        hydra_config.compose("train", ["plugins=[5]"])


def test_options_of_a_plugin_that_is_not_loaded_are_refused():
    composed, _ = hydra_config.compose("train", [])
    with pytest.raises(ConfigError, match="plugins: mine is not loaded"):
        config.parse({**composed, "plugins": ["/elsewhere/mine.py"]})


def test_an_installed_package_names_its_plugin(write, tmp_path, monkeypatch):
    """As pip installs it: a distribution with an entry point, and a module that imports its own."""
    (tmp_path / "pack").mkdir()
    write("", "pack/__init__.py")
    write("WORDS = 'margin'", "pack/words.py")
    text = METRIC.replace('"margin", ""', 'WORDS, ""')
    write("from .words import WORDS\n" + dedent(text), "pack/metric.py")
    (tmp_path / "pack-1.2.dist-info").mkdir()
    write("Metadata-Version: 2.1\nName: pack\nVersion: 1.2\n", "pack-1.2.dist-info/METADATA")
    write("[disinhib.plugins]\nmargins = pack.metric\n", "pack-1.2.dist-info/entry_points.txt")
    write("pack\n", "pack-1.2.dist-info/top_level.txt")
    monkeypatch.syspath_prepend(str(tmp_path))
    hydra_config.compose("train", ["plugins=[margins]"])
    assert SELECTION["valid_margin"].words == "validation margin"
    assert provenance.decisive(("digits", None, 0.1))["packages"]["pack"] == "1.2"
    assert "or one of margins; did you mean margins?" in refusal("margin")


def test_a_model_names_the_plugins_that_it_needs(write, tmp_path):
    file = write(METRIC)
    options, _ = hydra_config.compose("train", [f"plugins=[{file}]", "model.vf.sizes_hidden=[4]"])
    state = training.initial_state(config.parse(options), [0])
    parameters = jax.tree.map(lambda leaf: leaf[0], state.parameters)
    model = tmp_path / "model.msgpack"
    model.write_bytes(export.dump(options, parameters))
    plugins.LOADED.clear()  # as in another process, but for the tables
    with pytest.raises(ConfigError, match=r"needs plugin mine \(SHA-256 \w{64}\): give pl"):
        disinhib.load(model)
    write("\nSPACES = {'another': print}", "mine.py")
    with pytest.raises(ConfigError, match="needs plugin mine"):
        disinhib.load(model, plugins=[file])
    plugins.LOADED["mine"] = plugins.Plugin("mine", file, dedent(METRIC))
    network, _ = disinhib.load(model)
    assert network.dataset == "digits"


def test_a_trajectory_is_drawn_with_the_plugins_of_its_training(write, unloaded, tmp_path):
    file, folder = write(CLOSED_LOOP), tmp_path / "run"
    small = ["model/vf=dale", "model.vf.nb_hidden=1", "model.vf.sizes_hidden=[4]"]
    composed, _ = hydra_config.compose("train", [f"plugins={file}", "trainer=counting", *small])
    run = config.parse(composed)
    state = training.initial_state(run, [0])
    (folder / "plugins").mkdir(parents=True)
    write(CLOSED_LOOP, "run/plugins/mine.py")
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(composed)))
    checkpoint.save(folder / "checkpoint.msgpack", run, state)
    model = tmp_path / "model.msgpack"
    model.write_bytes(export.dump(composed, {k: v[0] for k, v in state.parameters.items()}))

    def refused(*given):
        unloaded()
        with pytest.raises(InputError) as no:
            trajectory.trained(*given)
        return str(no.value)

    assert f"needs plugin {file}: give plugins=[FILE]" in refused(folder)
    assert "no state of counting" in refused(model, [file])
    write(dedent(CLOSED_LOOP) + "# another")
    assert f"{file} has changed since: give plugins={folder}/plugins/mine.py" in refused(
        folder, [file]
    )
    unloaded()
    assert trajectory.trained(folder, [f"{folder}/plugins/mine.py"])[0].rule == "counting"


def test_entries_of_every_table_are_choices(write):
    file = write("""
        import numpy as np
        from disinhib import activations, controller, losses, optimizers
        from disinhib.data import Dataset, arrays

        def load(path):
            return arrays.loaded({"X": np.eye(20), "y": np.arange(20) % 2}, "mine")

        DATASETS = {"mine": Dataset(load, features=20, classes=2)}
        ACTIVATIONS = {"mine": activations.ACTIVATIONS["tanh"]}
        CONTROLLERS = {"mine": controller.CONTROLLERS["proportional"]}
        LOSSES = {"mine": losses.LOSSES["mse"]}
        OPTIMIZERS = {"mine": optimizers.OPTIMIZERS["sgd"]}
    """)
    choices = [
        *(f"plugins=[{file}]", "dataset=mine", "dataset/loss=mine", "optimizer=mine"),
        *("model/vf=dale", "trainer=exact-inv", "model/vf/controller=mine"),
        *(f"model/vf/activation@model.vf.{name}=mine" for name in ("actE", "actI")),
        "batchsize=4",
    ]
    run = config.parse(hydra_config.compose("train", choices)[0])
    built = run.architecture
    chosen = (built.activation_e, built.activation_i, built.controller, built.loss, built.optimizer)
    assert {*chosen, run.dataset} == {"mine"}
    training.check_data(run)


def test_a_metric_that_is_loaded_later_is_measured(write):
    small = ["model.vf.nb_hidden=1", "model.vf.sizes_hidden=[2]", "epochs=1", "batchsize=500"]
    seen = []
    for given in ([], [f"plugins=[{write(METRIC)}]"]):
        run = config.parse(hydra_config.compose("train", [*given, *small])[0])
        training.train(run, [0], lambda state, metrics: seen.append("valid_margin" in metrics))
    assert seen == [False, True]


def test_studies_are_compared_whose_plugin_has_changed_between_them(write, capsys):
    """The first text is enough for words and colours; without `beside`, it is a refusal."""
    plugins.load(plugins.read(write(RULE)))
    (first,) = plugins.kept()
    text = first["text"].replace("larger", "other")
    second = {**first, "text": text, "sha256": plugins.Plugin("mine", "", text).sha256}
    hydra_config.load_kept_plugins({"plugins": [second]}, beside=True)
    assert "plugin mine has another text in another study" in capsys.readouterr().out
    assert rules.words("fast-bp") == "bp with larger steps"
    hydra_config.load_kept_plugins({"plugins": [first]}, beside=True)
    assert not capsys.readouterr().out
    with pytest.raises(ConfigError, match="another text of the plugin mine is loaded"):
        hydra_config.load_kept_plugins({"plugins": [second]})


def test_the_last_plugins_that_are_given_count_as_with_every_option(write):
    first, second = write(RULE, "first.py"), write(CLOSED_LOOP, "second.py")
    given = ["trainer=bp", f"plugins=[{first}]", f"plugins=[{second}]"]
    known = hydra_config.load_plugins(given)
    assert known[0] == "trainer=bp" and len(known) == 2 and "second.py" in known[1]
    assert [plugin["name"] for plugin in plugins.kept()] == ["second"]
