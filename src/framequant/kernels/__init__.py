"""Inner loops: every operation in plain torch and in a fast form, with one signature. Importing this loads neither."""
