"""Features composed with a step (averaged params, param groups, LoRA), and tools that inspect a model."""
