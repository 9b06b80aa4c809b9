"""docs/your-own-rule.md, followed as it stands in an empty folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "your-own-rule.md"


def test_the_page_of_ones_own_rule_works_as_it_stands(tmp_path, mlflow_template):
    (tmp_path / "out").mkdir()
    shutil.copyfile(mlflow_template, tmp_path / "out" / "mlflow.db")
    lines: list[str] = []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S):
        if language == "python":
            name = text.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(text, "utf-8")
        else:
            lines += text.splitlines()
    *first, replay = lines
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}

    def follow(lines):
        words = ["bash", "-e", "-c", "\n".join(lines)]
        done = subprocess.run(words, cwd=tmp_path, env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    follow(first)
    (tmp_path / "my_rule.py").unlink()  # its text is kept
    said = follow([replay])
    assert "warning: plugin my_rule is gone" in said and "bit-equal" in said
    report = (tmp_path / "out" / "report-mine" / "report.md").read_text("utf-8")
    assert "readout-only" in report and "trainer.decay" in report
    html = (tmp_path / "out" / "report-mine" / "report.html").read_text("utf-8")
    assert "hidden layers stay random" in html and "inputs are scaled from 0 ... 16" in html
