"""The verbs of the command line, one module each: `add_arguments(parser)` and `run(args) -> exit code`.

A module imports nothing heavy at its top level, so that `mmalign VERB --help` and wrong input are answered at once.
"""
