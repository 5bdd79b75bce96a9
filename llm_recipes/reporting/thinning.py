"""Long curves for a page: few points, and no spike lost."""

from collections.abc import Sequence


def thin(xs: Sequence[float], ys: Sequence[float | None], buckets: int) -> tuple[list[float], list[float | None]]:
    """First, lowest, highest and last of each of `buckets` spans of points, and one gap of a span that has any.

    Args:
        xs, ys: a curve; None where there is no figure.
        buckets: spans of equally many points; a curve of no more than four points in each stays as it is.

    Returns:
        The same curve with at most five points in each span, in the same order.
    """
    count = len(xs)
    if count <= 4 * buckets:
        return list(xs), list(ys)
    kept: list[int] = []
    for number in range(buckets):
        start, stop = number * count // buckets, (number + 1) * count // buckets
        known = [at for at in range(start, stop) if ys[at] is not None]
        picked = {start, stop - 1}
        if known:
            picked |= {min(known, key=ys.__getitem__), max(known, key=ys.__getitem__)}  # type: ignore[arg-type]
        if len(known) < stop - start:
            picked.add(next(at for at in range(start, stop) if ys[at] is None))
        kept += sorted(picked)
    return [xs[at] for at in kept], [ys[at] for at in kept]
