"""Figures as plain data for plotly.js: `{"data": [traces], "layout": {...}}`, built by hand.

The Python package's own figure classes take seconds to import. Names of the user's are escaped here, since plotly.js
reads a little HTML in texts.
"""

import html
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from llm_recipes.reporting.texts import shown
from llm_recipes.reporting.thinning import thin

Figure = dict[str, Any]
Trace = dict[str, Any]

INK, FAINT, GRID = "#1d2733", "#8792a0", "#e6eaef"
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BROWN = (
    "#0072b2", "#d55e00", "#009e73", "#aa4499", "#56b4e9", "#e69f00", "#6b4e16",
)  # fmt: skip
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, BROWN, FAINT)
"""Told apart with any colour vision."""
DASHES = ("solid", "dash", "dot", "dashdot")
SCALE = ((22, 52, 122), (20, 136, 152), (222, 160, 20))
"""From low to high: dark to light as well, so that it reads without colour."""
FONT = (
    'system-ui, -apple-system, "Segoe UI", "Hiragino Sans", "Yu Gothic", "Noto Sans CJK JP", "Noto Sans JP", sans-serif'
)
BUCKETS_ALONE, BUCKETS_MANY = 400, 60
"""Spans of a thinned curve: of a run by itself, of one among many."""
SHOWN_IN_LEGEND = 12
FEW = 6
STRETCHES = 60
"""A mean is over so small a part of a curve."""


def escape(text: str) -> str:
    return html.escape(text, quote=False)


def scale_colour(at: float) -> str:
    """A colour for a place between 0 and 1."""
    place = min(max(at, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    mixed = (a + (b - a) * (place - low) for a, b in zip(SCALE[low], SCALE[low + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*(round(part) for part in mixed))


def colours(count: int) -> list[str]:
    """So many that belong in an order."""
    return [scale_colour(at / max(1, count - 1)) for at in range(count)]


def layout(x: str, y: str, height: int = 320, **changes: Any) -> dict[str, Any]:
    """A figure's frame; axis titles are texts of ours or escaped already."""
    axis = {
        "gridcolor": GRID, "zeroline": False, "linecolor": FAINT, "ticks": "outside", "tickcolor": GRID,
        "automargin": True, "exponentformat": "e",
    }  # fmt: skip
    made: dict[str, Any] = {
        "height": height,
        "autosize": True,
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": INK},
        "xaxis": {**axis, "title": {"text": x, "standoff": 8}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        "hoverlabel": {"align": "left", "namelength": -1, "font": {"family": FONT}},
        "hovermode": "closest",
    }
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(value, dict) and key in made else value
    return made


def is_logarithmic(values: Sequence[Any]) -> bool:
    """Whether values are numbers over a decade or more, all above 0."""
    good = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool) and value > 0]
    return len(good) == len(values) and len(good) > 1 and max(good) / min(good) >= 10


def value_axis(values: Sequence[Any]) -> dict[str, Any]:
    """An axis for a setting: logarithmic over decades, with the values themselves as ticks where they have room."""
    known = list(dict.fromkeys(values))
    numbers = [value for value in known if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(known):
        return {"type": "category"}
    if not is_logarithmic(known):
        return {"type": "linear"} | ({"tickvals": sorted(numbers)} if len(numbers) <= FEW else {})
    ends = math.log10(min(numbers)), math.log10(max(numbers))
    room = 0.08 * (ends[1] - ends[0])
    axis: dict[str, Any] = {"type": "log", "range": [ends[0] - room, ends[1] + room]}
    ordered = sorted(numbers)
    gaps = [math.log10(b / a) for a, b in pairwise(ordered)]
    if len(ordered) <= 8 and min(gaps) >= 0.1 * (ends[1] - ends[0]):
        return axis | {"tickmode": "array", "tickvals": ordered, "ticktext": [shown(value) for value in ordered]}
    return axis | {"dtick": 1, "exponentformat": "power"}


def curve(
    xs: Sequence[float], ys: Sequence[float | None], name: str, colour: str, buckets: int = BUCKETS_ALONE, **more: Any
) -> Trace:
    """A line over steps, thinned; a gap where there is no figure."""
    thin_xs, thin_ys = thin(xs, ys, buckets)
    line = {"color": colour, "width": 1.6} | more.pop("line", {})
    mode = "lines+markers" if len(thin_xs) <= 40 else "lines"
    return {
        "type": "scatter", "mode": mode, "x": thin_xs, "y": thin_ys, "name": escape(name), "line": line,
        "marker": {"size": 5, "color": colour}, "connectgaps": False, **more,
    }  # fmt: skip


def running_mean(ys: Sequence[float | None], stretch: int) -> list[float | None]:
    """At each place the mean of the known figures around it, half a stretch to either side."""
    sums, counts = [0.0], [0]
    for y in ys:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    half = stretch // 2
    spans = ((max(0, at - half), min(len(ys), at + half + 1)) for at in range(len(ys)))
    return [
        None if y is None else (sums[stop] - sums[start]) / (counts[stop] - counts[start])
        for y, (start, stop) in zip(ys, spans, strict=True)
    ]


def points(xs: Sequence[Any], ys: Sequence[Any], name: str, texts: Sequence[str], marker: dict[str, Any]) -> Trace:
    """Marks, each with a line of its own under the mouse."""
    return {
        "type": "scatter", "mode": "markers", "x": list(xs), "y": list(ys), "name": escape(name),
        "text": [escape(text) for text in texts], "hovertemplate": "%{text}<extra></extra>",
        "marker": {"size": 10, "line": {"width": 1.5, "color": "white"}} | marker,
    }  # fmt: skip


def level(xs: Sequence[Any], y: float, name: str) -> Trace:
    """A height over the whole width."""
    return {
        "type": "scatter", "mode": "lines", "x": list(xs), "y": [y] * len(xs), "name": escape(name),
        "line": {"color": INK, "width": 1.5, "dash": "dash"},
        "hovertemplate": f"{escape(name)}: %{{y:.4g}}<extra></extra>",
    }  # fmt: skip


def bars(names: Sequence[str], values: Sequence[float], x: str, colour: Sequence[str]) -> Figure:
    """Lying bars, the first on top."""
    trace = {
        "type": "bar", "orientation": "h", "y": [escape(name) for name in names], "x": list(values),
        "marker": {"color": list(colour)}, "hovertemplate": "%{y}: %{x:.3g}<extra></extra>",
    }  # fmt: skip
    axis = {"autorange": "reversed", "type": "category", "title": {"text": ""}}
    frame = layout(x, "", height=max(160, 70 + 26 * len(names)), yaxis=axis, xaxis={"rangemode": "tozero"})
    return {"data": [trace], "layout": frame}
