"""The figures of the paper, and of trained networks: `python -m analysis.figures.fig3`.

A figure's module has `numbers(...)`, which computes its tables, and `draw(tables)`, which draws
from nothing else. `command` is shared by all of them: options, style, files.

- `fig3`, `figS2`: one microcircuit as a plasticity experiment (disinhib/plasticity.py)
- `figS1`: four other models of it (disinhib/error_modulation.py)
- `fig4`: a student that learns while it runs (disinhib/student_teacher.py)
- `trajectory`: a trained network in time, open loop and closed
"""
