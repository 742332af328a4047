"""Of each file in kernels/: arguments for an example, the truth in float64, the reference, and what torch offers."""
