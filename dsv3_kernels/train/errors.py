"""What ends a run with one line on stderr and exit code 1."""


class TrainError(Exception):
    """The message is the whole story: what was wrong, where, and what to do."""
