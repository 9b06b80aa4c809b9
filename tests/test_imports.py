"""The core trains on a machine that has neither Ray, MLflow, Optuna nor Hydra."""

import subprocess
import sys

from conftest import CORE


def test_the_core_leaves_ray_mlflow_optuna_and_hydra_out():
    modules = ", ".join(CORE)
    code = (
        f"import sys, {modules};print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "jax" in loaded and "disinhib" in loaded
    assert not loaded & {"ray", "mlflow", "optuna", "hydra", "omegaconf"}
