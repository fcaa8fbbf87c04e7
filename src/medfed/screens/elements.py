"""The elements of a run's pages, as HTML: charts with their numbers, tables, key figures, and
numbers in words.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from medfed.monitor.metrics import Figure
from medfed.screens.reports import COLOURS
from medfed.screens.story import SHOWN, thin


def chart(
    title: str, caption: str, curves: Mapping[str, Mapping[Any, float | None]], across: str
) -> str:
    """Return a chart of curves, with its numbers in a table that opens;
    nothing where there is no number.
    """
    import plotly.graph_objects as go

    lines = {name: points for name, curve in curves.items() if (points := thin(curve))}
    if not lines:
        return ""
    figure = go.Figure()
    for i, (name, points) in enumerate(lines.items()):
        figure.add_scatter(
            x=[t for t, _ in points],
            y=[value for _, value in points],
            name=name,
            mode="lines+markers" if len(points) < 40 else "lines",
            line={
                "color": COLOURS[i % len(COLOURS)],
                "dash": ("solid", "dash", "dot")[i // len(COLOURS) % 3],
            },
        )
    figure.update_layout(
        template="plotly_white",
        height=340,
        margin={"l": 60, "r": 20, "t": 10, "b": 50},
        xaxis_title=across,
        legend={"orientation": "h", "y": -0.25},
        font={"size": 14, "color": "#1c2733"},
        showlegend=len(lines) > 1,
    )
    drawn = figure.to_html(
        div_id="chart-" + "".join(c if c.isalnum() else "-" for c in title.lower()),
        full_html=False,
        include_plotlyjs=False,
        config={"displayModeBar": False, "responsive": True},
    )
    rounds = sorted({t for points in lines.values() for t, _ in points})[-SHOWN:]
    by_round = {name: dict(points) for name, points in lines.items()}
    numbers = table(
        (across, *lines),
        [[t, *(number(by_round[name].get(t), digits=6) for name in lines)] for t in rounds],
    )
    label = f"{escape(title)}; the numbers are in the table below"
    return (
        f"<h2>{escape(title)}</h2><p class=note>{escape(caption)}</p>"
        f'<div role="img" aria-label="{label}">{drawn}</div>'
        f"<details><summary>The numbers</summary>{numbers}</details>"
    )


def key_figures(figures: Mapping[str, str]) -> str:
    """Return a page's first figures, each with its name."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in figures.items()
    )
    return f"<dl>{cells}</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; an empty name in `head` makes a corner, and numbers stand on the right."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in head)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return (
        f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    kind = " class=n" if isinstance(value, int | float) else ""
    return f"<td{kind}>{escape(str(value))}</td>"


def interval(figure: Figure) -> str:
    """Return a figure with its 95 % interval, where that was measured."""
    if figure.value is None:
        return "-"
    return f"{figure.value:.3f}{between(figure.low, figure.high)}"


def between(low: float | None, high: float | None, before: str = "") -> str:
    """Return an interval in brackets, `before` its ends; nothing where it was not measured."""
    if low is None or high is None:
        return ""
    return f" ({before}{low:.3f} to {high:.3f})"


def number(value: float | None, unit: str = "", digits: int = 4) -> str:
    """Return a number with its unit, or a dash for what was not measured."""
    return "-" if value is None else f"{value:.{digits}g}{unit}"


def size(count: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    units = ("bytes", "kB", "MB", "GB")
    power = next((i for i in range(4) if count < 1000 ** (i + 1)), 3)
    return f"{count / 1000**power:.3g} {units[power]}"
