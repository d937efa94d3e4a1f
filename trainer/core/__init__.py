"""The internals of states and steps: the bridge to nnx modules, calling the objective, mapped axes, paths, checks."""
