"""The figures of the paper, and of trained networks: `python -m analysis.figures.fig3`.

The module of a figure has `numbers(...)`, which computes its tables, and `draw(tables)`, which
draws from these tables only. `command` has what they share: options, style, files.

- `fig3`, `figS2`: one microcircuit as a plasticity experiment (disinhib/paper/plasticity.py)
- `figS1`: the same experiment with four other models (disinhib/paper/error_modulation.py)
- `fig4`: a student that learns while it runs (disinhib/paper/student_teacher.py)
- `trajectory`: a trained network in time, in open and closed loop
"""
