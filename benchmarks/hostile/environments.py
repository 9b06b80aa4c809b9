"""Variables of the user's shell, of schedulers and of other programs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.hostile.case import PLACE, WORKS, Case, refused, says
from benchmarks.hostile.place import BIN, MARK, Expected, Place

EITHER = WORKS | refused()
LONG = "/".join([PLACE, "tmp", *["a-long-name-of-a-folder"] * 5])  # sockets have 107 bytes
# Root may write everywhere, unless it has given up that right.
RIGHTS = "-dac_override,-dac_read_search"
PLAIN = f"setpriv --inh-caps={RIGHTS} --bounding-set={RIGHTS} " if os.geteuid() == 0 else ""


class Row(NamedTuple):
    variables: Mapping[str, str | None]
    commands: str
    expected: Expected = WORKS
    leaves: tuple[str, ...] = ()


def _jax(name: str, value: str, commands: str = "train") -> Row:
    return Row({name: value}, commands, says(f"{name}={value} is ignored"))


OTHER = f"sqlite:///{PLACE}/elsewhere.db"
VARIABLES = (
    # What would change numbers: set by the product, or recorded.
    _jax("JAX_ENABLE_X64", "1", "tune train resume"),
    Row({"JAX_ENABLE_X64": "1"}, "replay retrain"),
    _jax("JAX_DEFAULT_MATMUL_PRECISION", "bfloat16"),
    _jax("JAX_DEFAULT_PRNG_IMPL", "rbg", "tune train"),
    _jax("JAX_THREEFRY_PARTITIONABLE", "0"),
    _jax("JAX_NUMPY_DTYPE_PROMOTION", "strict"),
    _jax("JAX_NUMPY_RANK_PROMOTION", "raise"),
    _jax("JAX_RANDOM_SEED_OFFSET", "7"),
    _jax("JAX_DEBUG_NANS", "1", "tune train"),
    _jax("JAX_DISABLE_JIT", "1", "tune train"),
    Row({"JAX_LOG_COMPILES": "1", "JAX_TRACEBACK_FILTERING": "off"}, "train"),
    Row({"JAX_ENABLE_X64": "nonsense"}, "train tune", EITHER | refused("JAX_ENABLE_X64")),
    Row({"JAX_PLATFORMS": "cuda"}, "train", refused("JAX_PLATFORMS")),
    Row({"JAX_PLATFORMS": "cuda"}, "tune replay"),
    Row({"JAX_PLATFORMS": "nonsense"}, "train", refused("JAX_PLATFORMS")),
    Row({"JAX_PLATFORM_NAME": "gpu"}, "train", WORKS | refused("JAX_PLATFORM|gpu")),
    Row({"CUDA_VISIBLE_DEVICES": ""}, "tune train"),
    Row({"CUDA_VISIBLE_DEVICES": "7,nonsense"}, "tune"),
    Row({"XLA_FLAGS": "--xla_nonsense=1"}, "train tune", refused("XLA_FLAGS")),
    Row({"XLA_FLAGS": "nonsense"}, "train", EITHER),
    Row({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, "train tune"),
    Row({"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}, "resume", refused("XLA_FLAGS")),
    Row({"OMP_NUM_THREADS": "0"}, "tune train"),
    Row({"OMP_NUM_THREADS": "many", "PJRT_NPROC": "none"}, "train tune", EITHER),
    Row({"PJRT_NPROC": "7"}, "replay"),
    # Stores: an option, then the environment, then out/mlflow.db.
    Row({"MLFLOW_TRACKING_URI": OTHER}, "tune", WORKS, ("elsewhere.db",)),
    Row({"MLFLOW_TRACKING_URI": OTHER}, "selection report", refused("elsewhere.db")),
    Row({"MLFLOW_TRACKING_URI": "nonsense://x"}, "tune selection", refused("nonsense")),
    Row({"MLFLOW_TRACKING_URI": ""}, "tune selection"),
    Row({"MLFLOW_TRACKING_URI": "http://127.0.0.1:PORT_closed"}, "tune retrain",
        refused("127.0.0.1")),
    Row({"MLFLOW_EXPERIMENT_NAME": "other", "MLFLOW_EXPERIMENT_ID": "999"}, "tune selection"),
    Row({"MLFLOW_RUN_ID": "0" * 32}, "tune"),
    Row({"MLFLOW_REGISTRY_URI": "nonsense://x"}, "tune"),
    Row({"MLFLOW_HTTP_REQUEST_TIMEOUT": "soon"}, "selection", EITHER),
    Row({"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_TOKEN": "x"}, "selection"),
    Row({"MLFLOW_ENABLE_ASYNC_LOGGING": "true"}, "tune"),
    Row({"OPTUNA_STORAGE": "sqlite:///nowhere/x.db"}, "tune"),
    # Ray.
    Row({"RAY_ADDRESS": "127.0.0.1:PORT_closed"}, "tune"),
    Row({"RAY_ADDRESS": "ray://no.such.host.invalid:10001"}, "tune"),
    Row({"RAY_TMPDIR": LONG}, "tune", EITHER),
    Row({"RAY_TMPDIR": "/dev/null/x"}, "tune", WORKS | refused("RAY_TMPDIR")),
    Row({"RAY_AUTH_MODE": "token"}, "tune", EITHER),
    Row({"RAY_OVERRIDE_RESOURCES": '{"CPU": 0}'}, "tune", EITHER),
    Row({"RAY_RUNTIME_ENV_HOOK": "no.such.module"}, "tune", EITHER),
    Row({"RAY_NAMESPACE": "a b", "RAY_BACKEND_LOG_LEVEL": "debug"}, "tune"),
    Row({"RAY_AIR_NEW_OUTPUT": "1", "RAY_CHDIR_TO_TRIAL_DIR": "1"}, "tune"),
    # Folders.
    Row({"TMPDIR": LONG}, "tune", WORKS),
    Row({"TMPDIR": "/dev/null/x"}, "tune selection train"),
    Row({"TMPDIR": ""}, "selection"),
    Row({"HOME": "/dev/null/x"}, "tune train selection"),
    Row({"HOME": None, "USER": None, "LOGNAME": None}, "tune train"),
    Row({"XDG_CACHE_HOME": "/dev/null/x"}, "train"),
    Row({"JAX_COMPILATION_CACHE_DIR": "/dev/null/x"}, "train tune"),
    Row({"JAX_COMPILATION_CACHE_DIR": None, "HOME": "/dev/null/x"}, "train"),
    Row({"MPLCONFIGDIR": "/dev/null/x"}, "report"),
    Row({"DISINHIB_DATA": "/dev/null/x"}, "tune"),
    # Languages and terminals.
    Row({"LC_ALL": "C", "LANG": None}, "tune report selection train"),
    Row({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "tune report selection"),
    Row({"PYTHONIOENCODING": "ascii"}, "tune report runs"),
    Row({"LANG": "xx", "LC_ALL": "xx_YY.nonsense"}, "tune report"),
    Row({"LC_NUMERIC": "de_DE.UTF-8", "TZ": "Antarctica/Troll"}, "selection"),
    Row({"TZ": "nonsense/place"}, "tune"),
    Row({"COLUMNS": "1", "LINES": "0"}, "tune selection"),
    Row({"COLUMNS": "nonsense"}, "tune"),
    Row({"TERM": "dumb", "NO_COLOR": "1"}, "tune"),
    Row({"FORCE_COLOR": "1", "TERM": "xterm-256color"}, "tune"),
    Row({"MPLBACKEND": "nonsense"}, "report"),
    # Networks.
    Row({"http_proxy": "http://127.0.0.1:PORT_closed", "https_proxy": "http://127.0.0.1:1"},
        "tune selection"),
    Row({"HTTP_PROXY": "nonsense", "ALL_PROXY": "socks5://127.0.0.1:1"}, "tune", EITHER),
    Row({"REQUESTS_CA_BUNDLE": "/nowhere.pem", "SSL_CERT_FILE": "/nowhere.pem"}, "tune"),
    # Python and Hydra.
    Row({"PYTHONWARNINGS": "error"}, "train selection", EITHER),
    Row({"PYTHONHASHSEED": "1"}, "tune"),
    Row({"PYTHONOPTIMIZE": "1"}, "tune selection report"),
    Row({"PYTHONOPTIMIZE": "2"}, "tune selection", EITHER),  # without docstrings
    Row({"PYTHONDEVMODE": "1"}, "train"),
    Row({"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}, "tune"),
    Row({"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}, "tune"),
    Row({"PYTHONBREAKPOINT": "no.such", "PYTHONINTMAXSTRDIGITS": "640"}, "train"),
    Row({"HYDRA_FULL_ERROR": "1"}, "train"),
    # Git and the machine.
    Row({"GIT_DIR": "/nowhere", "GIT_INDEX_FILE": "/nowhere"}, "tune"),
    Row({"PATH": str(BIN)}, "tune train"),
    Row({"PATH": ""}, "tune", EITHER),
    Row({"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "1", "SLURM_NTASKS": "64",
         "SLURM_PROCID": "3", "SLURM_NODELIST": "n[1-4]", "SLURM_LOCALID": "0"}, "tune train"),
    Row({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "WORLD_SIZE": "4"}, "train"),
    Row({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "COLAB_GPU": "1"}, "tune"),
)  # fmt: skip


def _readonly(place: Place) -> None:
    for folder in (place.home, place.tmp):
        folder.chmod(0o555)


# (what is done to the home and the folder of temporary files, how the command is run, commands)
RIGHTS_LOST = (
    ("HOME cannot be written", lambda place: place.home.chmod(0o555), "tune train selection"),
    ("HOME cannot be entered", lambda place: place.home.chmod(0o000), "tune train"),
    ("TMPDIR cannot be written", lambda place: place.tmp.chmod(0o555), "tune train selection"),
    ("neither can be written", _readonly, "train selection"),
    ("the current folder cannot be written", lambda p: p.cwd.chmod(0o555), "selection train"),
)


def cases() -> list[Case]:
    rows = [
        Case(f"variables: {_named(row.variables)}: {command}", command, row.expected,
             env=row.variables, leaves=row.leaves,
             fresh=row.variables.get("MLFLOW_TRACKING_URI") is not None)
        for row in VARIABLES
        for command in row.commands.split()
    ]  # fmt: skip
    rights = [
        Case(f"rights: {name}: {command}", command, EITHER, prepare=prepare,
             shell=f"exec {PLAIN}{{}}")
        for name, prepare, commands in RIGHTS_LOST
        for command in commands.split()
    ]  # fmt: skip
    return [
        *rows,
        *rights,
        Case("variables: HYDRA_FULL_ERROR=1 and a wrong value: train", "train",
             refused("epochs"), words=("-m", "disinhib", "epochs=-1"),
             env={"HYDRA_FULL_ERROR": "1"}),
        Case("variables: DISINHIB_DATA of nothing, and a data set that needs it: train", "train",
             refused("mnist|DISINHIB_DATA"), words=("-m", "disinhib", "dataset=mnist"),
             env={"DISINHIB_DATA": "/dev/null/x", "https_proxy": "http://127.0.0.1:1"}),
        Case("variables: none at all: tune", shell="exec env -i HOME=$HOME TMPDIR=$TMPDIR "
             f"PYTHONPATH=$PYTHONPATH {MARK}=${MARK} {{}}"),
        Case("variables: MLFLOW_TRACKING_URI of another store, the option wins: selection",
             "selection", options=("tracking.uri=sqlite:///out/mlflow.db",),
             env={"MLFLOW_TRACKING_URI": OTHER}),
        Case("variables: a proxy before a store elsewhere: tune", "tune", refused("http_proxy"),
             options=("tracking.uri=http://mlflow.example.invalid:5000",),
             env={"http_proxy": "http://127.0.0.1:PORT_closed"}),
    ]  # fmt: skip


def _named(variables: Mapping[str, str | None]) -> str:
    return " ".join(
        f"{name}={value if value is not None and len(value) < 40 else 'a long path'}"
        if value is not None
        else f"no {name}"
        for name, value in variables.items()
    )
