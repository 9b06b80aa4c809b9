"""What is read out of studies that have run."""
