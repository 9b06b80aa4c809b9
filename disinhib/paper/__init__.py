"""The experiments of the paper's figures, on the core."""
