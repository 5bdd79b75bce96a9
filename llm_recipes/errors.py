"""What a user's mistake looks like: one line that says what, where, and what to do."""

import difflib
from collections.abc import Iterable

EXIT_STATUS = 2


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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the nearest known name, or a list of the known names."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(names)}"
