"""The numbers of a study, as tables and figures: `python -m analysis.report`.

- `contents`: what a report says, read from MLflow
- `tables`: its tables, as numbers and as texts
- `panels`: its figures
- `forms`: Markdown, CSV, LaTeX and HTML (`report.html.j2`)
"""

RULES = {  # to a reader who has not seen them
    "bp": "back-propagation through a plain network, which the others are compared with",
    "bp-ei": "back-propagation through the network of excitatory-inhibitory microcircuits",
    "exact-inv": "dis-inhibitory control, by which each excitatory neuron of a microcircuit learns"
    " from how far top-down feedback has moved its interneuron",
    "lin-thresh": "the same where a neuron knows its interneuron's activation only as a straight"
    " line at its mean rate",
    "taylor": "the same with that line at a fixed rate",
}
