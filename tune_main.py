"""One study: `python tune_main.py [option=value ...]` (options: conf/study.yaml)."""

from disinhib import command_line
from disinhib.tuning import study

if __name__ == "__main__":
    command_line.run(study.main)
