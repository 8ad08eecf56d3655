"""The errors that end in one line: a mistake that is the user's to mend, and a loss that a new start mends."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

USERS_TO_MEND = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what, where, why and what to do.

    The command line prints the message and exits with a non-zero status; it never shows a traceback for it.
    echoed: raised on this rank because of rank 0, which tells it; here the command line prints nothing.
    shared: raised on every rank at one point, so that none need be told of it.
    """

    echoed = False
    shared = False


class LostError(UserError):
    """Nothing in what the user gave is wrong, but something it stood on is gone (a rank, a node, the run's lease).

    The same command, given again, goes on.
    """


def disk_error(error: OSError, message: str) -> UserError:
    """What to raise for an error of a disk: the user's to mend (it is full), or a loss (it was away)."""
    return UserError(message) if error.errno in USERS_TO_MEND else LostError(message)


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """End the program with the one line of a UserError in place of a traceback."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
