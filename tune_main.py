"""One study: `python tune_main.py [option=value ...]` (options: conf/study.yaml)."""

from disinhib import errors
from disinhib.tuning import study

if __name__ == "__main__":
    errors.run(study.main)
