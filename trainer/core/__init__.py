"""What a state and a step are made of: the bridge to nnx modules, calling the objective, mapped axes, paths, checks."""
