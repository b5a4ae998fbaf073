"""Inner loops: every operation in plain torch and in a fast form with the same signature."""
