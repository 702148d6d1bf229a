"""The command line: one command a file, with `HELP`, `add_arguments` and `run`; `argen.cli.main` finds them."""
