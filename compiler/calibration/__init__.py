"""The parts of ``sage.calibrate``: budgets, inputs, probes, times, choices."""
