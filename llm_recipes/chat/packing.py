"""Conversations into windows: best fit decreasing, so that little is padding and nothing is cut.

The longest goes first, each into the fullest window that still has room for it (Johnson, 1974: at most 11/9 of the
fewest windows possible; Ding et al., 2024, use it for pretraining). Many lengths at once leave nearly no room; few, or
all just over half a window, cannot be packed well by anybody.
"""

from collections.abc import Sequence

import numpy as np

BLOCK = 1 << 16
"""Conversations that are packed at once."""
SPARSE = 0.01
"""Room in a window, as a share of it, that the next block is to fill."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the items in each window.

    Args:
        lengths: each from 1 to `capacity`.

    Raises:
        ValueError: one is longer than a window.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    windows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where a window with room r is open
    for item in order:
        length = lengths[item]
        if not 0 < length <= capacity:
            raise ValueError(f"an item of {length} in a window of {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            window = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, window = capacity, len(windows)
            windows.append([])
        windows[window].append(item)
        by_room[room - length].append(window)
        rooms |= 1 << (room - length)
    return windows


def pack(lengths: np.ndarray, order: np.ndarray, capacity: int, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Pack items block by block, in memory that does not grow with their number.

    What lies in windows with much room left goes into the next block once more, a quarter of a block at most.

    Args:
        lengths: of every item, int64.
        order: the items' numbers in the order in which blocks take them.

    Returns:
        The items' numbers, window by window; and where each window starts in them, with the end: int64 both.
    """
    packed: list[np.ndarray] = []
    counts: list[int] = []
    carried = np.empty(0, np.int64)
    for first in range(0, len(order), block):
        last = first + block >= len(order)
        items = np.concatenate([carried, order[first : first + block]])
        windows = best_fit(lengths[items].tolist(), capacity)
        keep, again = (windows, []) if last else _filled(windows, lengths[items], capacity, block // 4)
        packed += [items[window] for window in keep]
        counts += [len(window) for window in keep]
        carried = items[[item for window in again for item in window]] if again else np.empty(0, np.int64)
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return (np.concatenate(packed) if packed else np.empty(0, np.int64)), starts.astype(np.int64)


def _filled(
    windows: list[list[int]], lengths: np.ndarray, capacity: int, most: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows that stay, and those, the emptiest first, whose items are packed again."""
    room = [capacity - int(lengths[window].sum()) for window in windows]
    again: list[int] = []
    items = 0
    for number in sorted(range(len(windows)), key=lambda each: (-room[each], each)):
        if room[number] <= SPARSE * capacity or items + len(windows[number]) > most:
            break
        again.append(number)
        items += len(windows[number])
    taken = set(again)
    return [w for n, w in enumerate(windows) if n not in taken], [windows[n] for n in again]
