"""Pure functions of tensors: which integers to choose for a linear, given its weight and its inputs."""
