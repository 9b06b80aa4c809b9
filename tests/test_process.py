"""Signals and streams of a command."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from disinhib import process

ROOT = Path(__file__).parents[1]
run = partial(subprocess.run, text=True, capture_output=True, cwd=ROOT)
PROGRAM = """
import logging, os, signal, sys
logging.basicConfig()  # a handler with the stream that there is now
from disinhib import cli
def main(arguments):
    {body}
cli.run(main)
"""


def command(body: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(body=body)]


@pytest.mark.parametrize("number", [signal.SIGINT, *process.ENDING])
def test_a_signal_ends_a_command_with_its_exit_code(number):
    # A suite in a shell's background ignores SIGINT, one under nohup SIGHUP; so would its children.
    body = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    heeding = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    done = run(
        command(f"{body}; print('begun'); os.kill(os.getpid(), {int(number)}); 1 / 0"),
        preexec_fn=heeding,
    )
    assert done.returncode == 128 + number
    assert (done.stdout, done.stderr) == ("begun\n", f"interrupted by {number.name}\n")


def test_a_command_in_the_background_ends_on_signals_too():
    ignoring = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    body = "os.kill(os.getpid(), signal.SIGTERM); 1 / 0"
    done = run(command(body), preexec_fn=ignoring)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "interrupted by SIGTERM\n")


def test_a_signal_amid_garbage_collection_is_not_lost():
    # As jax's callback: what it raises is printed and dropped. It kills once.
    body = """
    import gc, time
    kills = [signal.SIGTERM]
    gc.callbacks.append(lambda *_: kills and os.kill(os.getpid(), kills.pop()))
    gc.collect()
    time.sleep(10)"""
    done = run(command(body))
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "interrupted by SIGTERM\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_being_finished_is_finished(number):
    body = f"""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from disinhib import process
    with process.finishing():
        os.kill(os.getpid(), {int(number)})
        print("finished")
    return process.interrupted()[0]"""
    done = run(command(body))
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "finished\n", "")


def test_only_the_first_of_several_signals_counts():
    body = """
    signal.signal(signal.SIGINT, lambda *_: print("interrupted"))  # as Ray Tune's
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    from disinhib import process
    return process.interrupted()[0]"""
    done = run(command(body))
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "interrupted\n")


def test_a_logger_that_had_the_stream_keeps_writing():
    done = run(command("logging.getLogger('optuna').warning('planted'); return 0"))
    assert (done.returncode, done.stderr) == (0, "WARNING:optuna:planted\n")


def test_a_signal_that_is_ignored_stays_ignored():
    body = "os.kill(os.getpid(), signal.SIGHUP); print('goes on')"
    ignoring = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    done = run(command(body), preexec_fn=ignoring)
    assert (done.returncode, done.stdout) == (0, "goes on\n")


# (what the shell does with the streams, the exit code of the command)
@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "| true", "2>&1 | true"])
def test_streams_that_nobody_reads_change_nothing(streams, tmp_path):
    """Not even a file that is opened afterwards."""
    body = f"""
    file = open({str(tmp_path / "file")!r}, "w")
    for number in range(20_000):
        print(number)
        print(number, file=sys.stderr)
    file.write("its own words"); file.close(); sys.stdout.flush()
    open({str(tmp_path / "ended")!r}, "w").close()
    return 7"""
    line = f'( "$0" -c "$1"; echo $? > "$2" ) {streams}'
    if "|" not in streams:
        line = f'"$0" -c "$1" {streams}; echo $? > "$2"'
    program = PROGRAM.format(body=body)
    run(["sh", "-c", line, sys.executable, program, str(tmp_path / "code")])
    assert (tmp_path / "code").read_text() == "7\n"
    assert (tmp_path / "file").read_text() == "its own words"
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
    ],
)
def test_words_that_the_encoding_lacks(variables):
    done = run(command("print('caf\\u00e9 \\u2013 end')"), env={**os.environ, **variables})
    assert done.returncode == 0 and done.stdout.endswith(" end\n") and not done.stderr


def test_a_full_disk_is_one_line():
    done = run(["sh", "-c", '"$0" -c "$1" > /dev/full', *command("print(1)")[::2]])
    assert done.returncode == 1
    assert done.stderr == "error: OSError: [Errno 28] No space left on device: make room\n"


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    (tmp_path / "gone").mkdir()
    line = 'cd "$2"; rmdir "$2"; exec "$0" -c "$1"'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = PROGRAM.format(body="print(1)")
    done = run(["sh", "-c", line, sys.executable, program, tmp_path / "gone"], env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the current folder is gone: change to one that is there\n"
