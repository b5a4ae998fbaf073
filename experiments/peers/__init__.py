"""Other libraries on the same model, calibration text and evaluation, each in an environment of its own."""
