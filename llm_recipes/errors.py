"""What a user's mistake looks like: one line that says what, where, and what to do."""

import difflib
import errno
from collections.abc import Iterable

EXIT_STATUS = 2
REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR,
    errno.ENOSPC, errno.EDQUOT, errno.EIO,
)  # fmt: skip
"""What a system answers to a path or a disk of the user's, and to no bug of ours."""


class UserError(Exception):
    """A mistake in the user's input. Printed as one line, without a traceback; the process exits 2.

    Anything else that escapes is a bug of ours and keeps its traceback.

    Args:
        message: the line.
        everywhere: whether every rank meets the mistake alike, so that rank 0 speaks for all.
    """

    def __init__(self, message: str, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def as_user_error(error: BaseException) -> UserError | None:
    """The user's mistake that an exception is, or None where it is none: a file that the system refuses is one."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}", everywhere=False)
    return None


def first_line(error: BaseException) -> str:
    """What a library's exception says, short enough for a line of ours."""
    said = (str(error).strip().splitlines() or [""])[0][:300]
    return said if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: {said}".rstrip(": ")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the nearest known name, or a list of the known names."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(names)}"
