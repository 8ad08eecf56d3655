"""The errors that end in one line: a mistake that is the user's to mend, and a loss that a new start mends."""


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what, where, why and what to do.

    The command line prints the message and exits with a non-zero status; it never shows a traceback for it.
    """


class LostError(UserError):
    """Nothing in what the user gave is wrong, but something it stood on is gone (a rank, a node, the run's lease).

    The same command, given again, goes on.
    """
