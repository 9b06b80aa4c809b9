"""Hostile inputs and environments, one after another: `python -m benchmarks.hostile [only=REGEX]`.

Variables, signals, folders, moved and half-deleted stores, servers, closed descriptors and wrong
options, drawn from the tables in `benchmarks/hostile/`. Each case is a real command that has to end
in success, with the numbers of a normal environment, or in one line and a documented exit code:
never in a traceback, a core file or a hang, and nothing is left outside its out_dir. Prints a line
for each case, and at the end the violations. Exit code 0: there is none.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.hostile import servers
from benchmarks.hostile.case import Case, perform
from benchmarks.hostile.cases import chosen
from benchmarks.hostile.reference import Reference
from disinhib import cli
from disinhib.checks import COUNT, FLAG, INDEX, OPTIONAL_TEXT, POSITIVE, Option, or_null

CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
COMMAND = cli.Command(
    "benchmarks.hostile",
    __doc__,
    (
        Option("only", None, OPTIONAL_TEXT, "a regular expression that names of cases have"),
        Option("cases", 150, or_null(COUNT), "how many are drawn without `only`; null: all"),
        Option("list", False, FLAG, "only list the cases"),
        Option("jobs", 1, COUNT, "cases at once"),
        Option("patience", 60.0, POSITIVE, "s until a command hangs, on an idle machine"),
        Option("seed", 0, INDEX, "seed of the draw, and of the moments of signals"),
        Option("folder", None, OPTIONAL_TEXT, "a short path, to keep the reference; null: none"),
    ),
)


def main(arguments: Sequence[str]) -> int:
    options = COMMAND.parse(arguments)
    cases = chosen(options["only"], options["cases"], options["seed"])
    if options["list"]:
        print("\n".join(case.name for case in cases), f"\n{len(cases)} cases")
        return 0
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))
    if CORE_PATTERN.exists() and CORE_PATTERN.read_text()[0] in "|/":
        print(f"core files are not seen: they go to {CORE_PATTERN.read_text().strip()}")
    violations: list[str] = []
    with ExitStack() as stack:
        # Short, because Ray makes sockets in a case's folder, whose paths may have 107 bytes.
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="h-", dir="/tmp"))
        Path(temporary).chmod(0o755)
        kept = Path(options["folder"] or temporary).absolute() / "reference"
        reference = Reference(kept, 10 * options["patience"])
        ports = stack.enter_context(servers.all_of_them())
        pool = ThreadPoolExecutor(options["jobs"])
        stack.callback(pool.shutdown, cancel_futures=True)  # Ctrl-C does not wait for all
        judge = partial(_judged, Path(temporary), reference, ports, options["patience"])
        jobs = [pool.submit(judge, number, case) for number, case in enumerate(cases)]
        for job in as_completed(jobs) if options["jobs"] > 1 else jobs:
            case, seconds, wrong = job.result()
            state = "FAILED" if wrong else "ok"
            print(f"{state:6} {seconds:5.1f} s  {case.name}", *wrong, sep="\n       ", flush=True)
            violations += [f"{case.name}: {line}" for line in wrong]
    print(f"\n{len(cases)} cases, {len(violations)} violations", *violations, sep="\n")
    return 1 if violations else 0


def _judged(
    folder: Path,
    reference: Reference,
    ports: dict[str, int],
    patience: float,
    number: int,
    case: Case,
) -> tuple[Case, float, list[str]]:
    began = time.monotonic()
    try:
        wrong = perform(case, folder / str(number), reference, ports, patience)
    except Exception as error:  # of the benchmark: the other cases go on
        traceback.print_exc(file=sys.stdout)
        wrong = [f"the case itself: {type(error).__name__}: {error}"]
    return case, time.monotonic() - began, wrong


if __name__ == "__main__":
    cli.run(main)
