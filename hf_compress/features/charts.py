"""The charts of a feature report, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 460, 250, 66, 44, 12, 12  # of a chart and its margins
_POINTS = 400  # of a curve, at most
_SPREAD = 20.0  # a curve whose largest value is so many times its smallest is drawn on a log scale
_DEPTH = 1e-5  # of its largest value: what is smaller stands on the lowest line of a log scale


def training_curve(curve: dict[str, list[float]]) -> str:
    steps = curve.get("step", [])
    if not steps:
        return "<p>How the training went is not known, or there were no steps.</p>"
    charts = []
    for name, caption, style in (
        ("retention", "Share of the features kept", "blue"),
        ("error", "Squared error, relative to the stream’s variance", "red"),
    ):
        pairs = zip(steps, curve.get(name, []), strict=False)
        points = _thinned([(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)])
        if not points:
            continue
        frame = _Frame([x for x, _ in points], [y for _, y in points], ("training step", name), zero=name == "error")
        line = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        inside = f'<polyline class="curve {style}" points="{line}"/>'
        charts.append(f"<figure><figcaption>{caption}</figcaption>{frame.drawn(inside, caption)}</figure>")
    return "".join(charts)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_POINTS`: means of as many neighbours each."""
    size = -(-len(points) // _POINTS) or 1
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def spectrum(importance: Sequence[float], kept: Sequence[int] | None) -> str:
    """Importances in falling order. What is kept is a dot, what is cut a cross."""
    if not importance:
        return "<p>The importance of the features is not known.</p>"
    if not (largest := max(importance)) > 0:
        return "<p>All features have the importance 0: none was measured.</p>"
    own = set(range(len(importance)) if kept is None else kept)
    order = sorted(range(len(importance)), key=lambda index: -importance[index])
    axes = ("rank of the feature", "importance")
    frame = _Frame([1, len(order)], [importance[index] for index in order], axes, log=True)
    shown: dict[bool, list[str]] = {True: [], False: []}
    for rank in range(0, len(order), -(-len(order) // (2 * _POINTS))):
        at = f"M{frame.x(rank + 1):.1f} {frame.y(importance[order[rank]]):.1f}"
        mark = _DOT if order[rank] in own else _CROSS
        shown[order[rank] in own].append(at + mark)
    inside = f'<path class="dots" d="{"".join(shown[True])}"/><path class="crosses" d="{"".join(shown[False])}"/>'
    legend = f'<span class="pos">●</span> kept ({len(own):,}) &nbsp; '
    legend += f'<span class="neg">✕</span> cut ({len(order) - len(own):,})'
    legend = legend if kept is not None else f"{len(order):,} features, those cut not told apart"
    small = sum(value < _DEPTH * largest for value in importance)
    legend += f" · {small:,} below {_DEPTH * largest:.2g} stand on the lowest line" if small else ""
    caption = "Importance of the features, in falling order"
    return (
        f'<figure><figcaption>{caption}</figcaption>{frame.drawn(inside, caption)}<p class="soft">{legend}</p></figure>'
    )


_DOT = "m-2.2 0a2.2 2.2 0 1 0 4.4 0a2.2 2.2 0 1 0-4.4 0"
_CROSS = "m-3.5-3.5l7 7m0-7l-7 7"


class _Frame:
    """Axes of a chart around values xs and ys. Log where asked for, or where ys, none negative, are far apart.

    zero: a linear scale begins at 0.
    """

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], axes: tuple[str, str], log: bool = False, zero: bool = False
    ) -> None:
        self.axes = axes
        least, most = min(ys), max(ys)
        self.log = log or (least >= 0 and most > _SPREAD * least)
        self.floor = max(least, _DEPTH * most)
        low, high = (math.log10(self.floor), math.log10(most)) if self.log else (least, most)
        low = min(0.0, low) if zero and not self.log else low
        room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        self.low, self.high = (low if zero and not self.log else low - room), high + room
        self.first, self.last = min(xs), max(max(xs), min(xs) + 1)

    def x(self, value: float) -> float:
        return _LEFT + (value - self.first) / (self.last - self.first) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        value = math.log10(max(value, self.floor)) if self.log else value
        height = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - height * (_HEIGHT - _BOTTOM - _TOP)

    def drawn(self, inside: str, caption: str) -> str:
        """The chart with what is in it."""
        bottom, middle = _HEIGHT - _BOTTOM, (_LEFT + _WIDTH - _RIGHT) / 2
        parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{caption}">']
        for value in self._levels():
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
        for value in (tick for tick in _ticks(self.first, self.last, 5) if tick == round(tick)):
            parts.append(f'<text x="{self.x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{number(value)}</text>')
        name = f"{self.axes[1]} (log scale)" if self.log else self.axes[1]
        high = (_TOP + bottom) / 2
        parts.append(f'<path class="grid" d="M{_LEFT} {_TOP}V{bottom}H{_WIDTH - _RIGHT}" fill="none"/>{inside}')
        parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{self.axes[0]}</text>')
        parts.append(f'<text transform="translate(14 {high})rotate(-90)" text-anchor="middle">{name}</text></svg>')
        return "".join(parts)

    def _levels(self) -> list[float]:
        if not self.log:
            return _ticks(self.low, self.high, 5)
        decades = range(math.ceil(self.low - 1), math.floor(self.high) + 1)
        wide = -(-len(decades) // 6)
        steps = (1, 2, 5) if self.high - self.low < 2 else (1,)
        values = [step * 10.0**decade for decade in decades if decade % wide == 0 for step in steps]
        inside = [value for value in values if self.low <= math.log10(value) <= self.high]
        return inside if len(inside) > 1 else _ticks(10**self.low, 10**self.high, 4)


def number(value: float) -> str:
    """At an axis, where there is room for six characters."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from low to high, about `count`."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= 0.7 * raw)
    return [round(step * k, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
