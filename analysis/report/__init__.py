"""The numbers of a study, as tables and figures: `python -m analysis.report`.

- `contents`: what a report says, read from MLflow; `comparison`: what one of several studies says
- `tables`: its tables, as numbers and as texts
- `panels`: its figures
- `checklist`: what reproducibility checklists ask, from the study's record
- `forms`: Markdown, CSV, LaTeX and HTML (`report.html.j2`)
"""
