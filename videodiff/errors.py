"""The one error that is the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what, where, why and what to do.

    The command line prints the message and exits with a non-zero status; it never shows a traceback for it.
    """
