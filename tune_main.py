"""Runs a study: `python tune_main.py [option=value ...]` (options: conf/study.yaml)."""

from disinhib import cli
from disinhib.tuning import study

if __name__ == "__main__":
    cli.run(study.main)
