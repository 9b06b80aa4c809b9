"""What the project's speed claims rest on; each is `python -m benchmarks.<name>`."""
