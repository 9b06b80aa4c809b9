"""From studies to numbers: selection, retraining, report, replay, figures. Reads MLflow."""
