"""What `argen eval` can measure: one measure a file, with `HELP`, `add_arguments` and `run`."""
