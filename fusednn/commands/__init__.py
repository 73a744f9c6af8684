"""The commands of ``python -m fusednn``: each module adds its arguments to a parser, and runs."""
