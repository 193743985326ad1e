"""Time SWAT beside what a PyTorch user would pick instead, in one run, with the device's limits: `python -m perf`."""
