"""Times the kernels against what users run today: ``python -m benchmarks``."""
