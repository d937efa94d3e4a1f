"""What is composed with a step: averages of params, groups, low-rank adaptation; and what is asked of a model."""
