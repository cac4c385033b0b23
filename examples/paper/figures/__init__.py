"""The ten figures of the paper: `table` says what each shows, `run` trains it, `summary` checks
the paper's claims by numbers, `draw` makes the pictures; `command` is ``python -m examples.paper
figures``.
"""
