"""Compiled programs that processes share: who finds them, who must not, and how many are kept."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from disinhib import compilation_cache

COMPILE = """
import sys
from pathlib import Path
import jax
from disinhib import compilation_cache

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
compilation_cache.share(Path(sys.argv[1]))
jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((3, 3))).block_until_ready()
print(sum(e == "/jax/compilation_cache/cache_hits" for e in events), end=" ")
print(sum(e == "/jax/compilation_cache/cache_misses" for e in events))
"""
PROCESSOR = """processor\t: 0
model name\t: Some Processor 9
flags\t\t: sse2 avx2 fma

processor\t: 1
model name\t: Some Processor 9
flags\t\t: sse2 avx2 fma
"""


@pytest.fixture(autouse=True)
def settings_of_jax(monkeypatch):
    """`share` sets some for all of its process."""
    monkeypatch.delenv(compilation_cache.FOLDER_VARIABLE, raising=False)
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_second_process_compiles_nothing(tmp_path):
    def compiled():
        run = subprocess.run(
            [sys.executable, "-c", COMPILE, str(tmp_path)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return tuple(map(int, run.stdout.split()))

    hits, misses = compiled()
    assert hits == 0 and misses > 0
    assert compiled() == (misses, 0)


ALONE = """
import sys, time
from pathlib import Path
import jax
from disinhib import compilation_cache

folder, me, other = Path(sys.argv[1]), *sys.argv[2:]
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
compilation_cache.share(folder / "programs")
if me == "second":
    while not (folder / "first").exists():
        time.sleep(0.01)
    (folder / "second").touch()
with compilation_cache.alone("a program"):
    (folder / me).touch()
    while not (folder / other).exists():
        time.sleep(0.01)
    jax.jit(lambda x: (x @ x).sum()).lower(jax.numpy.ones((3, 3))).compile()
print(sum(e == "/jax/compilation_cache/cache_misses" for e in events))
"""


def test_a_program_is_compiled_by_one_process_while_the_others_wait(tmp_path):
    """The second process asks while the first is at it."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, str(tmp_path), *names],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for names in (("first", "second"), ("second", "first"))
    ]  # fmt: skip
    try:
        compiled = [int(process.communicate(timeout=300)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert compiled[0] > 0 and compiled[1] == 0


def test_a_lock_that_cannot_be_had_holds_up_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache.tempfile, "gettempdir", lambda: str(tmp_path / "gone"))
    compilation_cache.share(tmp_path)
    with compilation_cache.alone("a program"):
        assert not (tmp_path / "gone").exists()


def test_nobody_waits_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(compilation_cache, "LONGEST_COMPILATION", 0.1)
    compilation_cache.share(tmp_path / "programs")
    entered = []
    with compilation_cache.alone("a program"), compilation_cache.alone("a program"):
        entered.append("both")
    assert entered and len([*tmp_path.glob("disinhib-programs-*/*")]) == 1


@pytest.mark.parametrize(
    ("changed", "to"),
    [("avx2", "avx2 avx512f"), ("fma", ""), ("Processor 9", "Processor 10")],
    ids=["more instructions", "fewer instructions", "another model"],
)
def test_another_processor_has_a_folder_of_its_own(changed, to, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(compilation_cache, "CPU_INFO", file)
    file.write_text(PROCESSOR)
    before = compilation_cache.machine()
    file.write_text(PROCESSOR.replace(changed, to))
    assert compilation_cache.machine() != before


def test_hosts_with_the_same_processor_share_a_folder(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(compilation_cache, "CPU_INFO", file)
    file.write_text(PROCESSOR)
    before = compilation_cache.machine()
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    file.write_text(PROCESSOR.replace("sse2 avx2 fma", "fma sse2 avx2"))
    assert compilation_cache.machine() == before


def test_a_gpu_has_a_folder_of_its_own(monkeypatch):
    class Gpu:
        platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    on_cpu = compilation_cache.machine()
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    assert compilation_cache.machine() == f"{on_cpu}-nvidia-h100-80gb-hbm3"


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    for age, name in enumerate(("a", "b", "c", "d")):
        file = tmp_path / name / "program"  # of several machines
        file.parent.mkdir()
        file.write_bytes(bytes(100))
        os.utime(file, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "d" / "program", (2e9, 1e9 - 3))  # made first, and read since
    compilation_cache.share(tmp_path, max_bytes=250)
    assert sorted(file.parent.name for file in tmp_path.rglob("program")) == ["a", "d"]


def test_within_the_bound_nothing_goes(tmp_path):
    (tmp_path / "program").write_bytes(bytes(100))
    compilation_cache.trim(tmp_path, 100)
    assert (tmp_path / "program").exists()


def test_without_a_folder_to_write_in_it_goes_on_and_says_so_once(tmp_path, caplog):
    (tmp_path / "file").touch()
    before = jax.config.values["jax_compilation_cache_dir"]
    compilation_cache.share(tmp_path / "file")
    (line,) = caplog.messages
    assert line.startswith("compiled programs are not kept: ") and "Not a directory" in line
    assert jax.config.values["jax_compilation_cache_dir"] == before
    assert jax.jit(lambda x: x + 1)(1) == 2


def test_a_folder_of_the_users_own_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(compilation_cache.FOLDER_VARIABLE, str(tmp_path / "own"))
    compilation_cache.share(tmp_path, max_bytes=0)
    assert list(tmp_path.iterdir()) == []


def test_by_default_programs_are_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache.pooch, "os_cache", lambda name: tmp_path / name)
    compilation_cache.share()
    folder = tmp_path / "disinhib" / "xla" / compilation_cache.machine()
    assert Path(jax.config.values["jax_compilation_cache_dir"]) == folder and folder.is_dir()
