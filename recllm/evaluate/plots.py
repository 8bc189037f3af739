"""The pictures of a report. Plain numbers enter, one SVG text a picture leaves.

Text stays text and colours stay literal, so that `themed` can hand the colours to the page's CSS (light and dark) and
`standalone` can make a file that reads on any background. The same numbers give the same bytes: ids are salted with the
picture's name and no date is written.
"""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

# name → (light, dark). Systems: Okabe & Ito 2008; experts: Tol's muted scheme. Both are safe for colour-blind readers.
PALETTE = {
    "ink": ("#1d2430", "#e8ebf0"),
    "muted": ("#5f6874", "#a3adba"),
    "grid": ("#dde2e8", "#363d48"),
    "surface": ("#fdfdfe", "#1b2028"),
    "blue": ("#0072b2", "#4fb0ee"),
    "sky": ("#56b4e9", "#8fd0f7"),
    "orange": ("#e08e00", "#f2b134"),
    "green": ("#009e73", "#2fc79b"),
    "pink": ("#cc79a7", "#e39cc4"),
    "vermillion": ("#d55e00", "#ff8a3d"),
    "grey": ("#808893", "#98a1ad"),
    "olive": ("#8a8a1f", "#c5c54d"),
    "maroon": ("#8c2d62", "#d96aa0"),
    "expert_indigo": ("#332288", "#9a8cf0"),
    "expert_teal": ("#44aa99", "#5fcfbc"),
    "expert_rose": ("#cc6677", "#f08a9b"),
    "expert_sand": ("#b59a2e", "#e6d27a"),
    "expert_cyan": ("#4aa5cc", "#88ccee"),
    "expert_green": ("#117733", "#4fbf74"),
    "expert_purple": ("#aa4499", "#d67fca"),
    "expert_wine": ("#882255", "#d0609c"),
    # Heat maps: blue above, orange below (safe for colour-blind readers); ink is legible on every one of them
    "below_4": ("#f0a050", "#9a4a00"),
    "below_3": ("#f6bd84", "#7c4210"),
    "below_2": ("#fad6b1", "#5e3a1c"),
    "below_1": ("#fce9d5", "#453224"),
    "even": ("#f0f2f5", "#2a303a"),
    "above_1": ("#dcebf7", "#22384a"),
    "above_2": ("#b9d8ef", "#1d4a6b"),
    "above_3": ("#8fc1e6", "#185a8a"),
    "above_4": ("#62a8dc", "#0f68ab"),
}
HEAT_STEPS = (1.05, 1.2, 1.5, 2.0)  # ratios at which a heat map's colour changes, and their inverses
SYSTEM_COLOURS = {
    "adapter": ("blue", "maroon", "expert_indigo"),
    "control": ("sky", "olive"),
    "base_model": ("orange",),
    "baseline": ("green", "pink", "vermillion", "grey"),
}
EXPERT_COLOURS = tuple(name for name in PALETTE if name.startswith("expert_"))
SYSTEM_MARKERS = {
    "adapter": ("o", "P", "X"),
    "control": ("o", "D", "s"),
    "base_model": ("s",),
    "baseline": ("^", "D", "v", "p", "h"),
}
EXPERT_MARKERS = "osD^vPXp"
FONTS = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', 'DejaVu Sans', sans-serif"
MAX_POINTS = 2000  # users drawn in the map: more only makes the file slow to open
LABEL_LENGTH = 24


class Style(NamedTuple):
    """How one system or expert looks in every picture."""

    colour: str  # a key of PALETTE
    marker: str  # of matplotlib
    filled: bool = True


class HeatCell(NamedTuple):
    """One cell of a heat map: what is written, and the ratio to "even" that colours it (None: no colour)."""

    text: str
    ratio: float | None
    strong: bool = False


class Row(NamedTuple):
    """One line of a dot plot: a value with its interval."""

    label: str
    value: float
    low: float | None
    high: float | None
    style: Style


def system_styles(kinds: Mapping[str, str]) -> dict[str, Style]:
    """System name → style, in the order of `kinds` (name → kind), so that a system looks the same in every picture."""
    styles: dict[str, Style] = {}
    seen: dict[str, int] = {}
    for name, kind in kinds.items():
        position = seen[kind] = seen.get(kind, -1) + 1
        colours, markers = SYSTEM_COLOURS.get(kind, ("grey",)), SYSTEM_MARKERS.get(kind, ("o",))
        # Controls are hollow: they are the run's own adapter with the gate taken away.
        styles[name] = Style(colours[position % len(colours)], markers[position % len(markers)], kind != "control")
    return styles


def expert_style(expert: int) -> Style:
    """Style of expert number `expert`."""
    return Style(EXPERT_COLOURS[expert % len(EXPERT_COLOURS)], EXPERT_MARKERS[expert % len(EXPERT_MARKERS)])


def dots(
    name: str,
    title: str,
    rows: Sequence[Row],
    xlabel: str = "",
    reference: float | None = None,
    limits: tuple[float, float] | None = None,
    width: float = 4.7,
) -> str:
    """Dot plot with intervals, first row on top; `reference` is a vertical line (zero, or chance)."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _finish(axes, title, xlabel, grid="x")
        if reference is not None:
            axes.axvline(reference, color=_light("muted"), linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for position, row in enumerate(rows):
            _dot(axes, position, row)
        axes.set_yticks(range(len(rows)), [_shorten(row.label) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(*limits) if limits else axes.margins(x=0.08)
        axes.tick_params(axis="y", length=0, labelcolor=_light("ink"))

    return render(name, title, (width, 0.72 + 0.27 * max(len(rows), 2)), draw)


def lines(
    name: str,
    title: str,
    series: Mapping[str, tuple[np.ndarray, np.ndarray, Style]],
    xlabel: str,
    reference: tuple[float, str] | None = None,
    limits: tuple[float, float] | None = None,
    faint: Sequence[str] = (),
) -> str:
    """Line plot, label → (xs, ys, style); `reference` is a labelled horizontal line, `faint` series stay behind."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _finish(axes, title, xlabel, grid="y")
        for label, (xs, ys, style) in series.items():
            _line(axes, label, xs, ys, style, label in faint)
        if reference is not None:
            _level(axes, *reference)
        if limits:
            axes.set_ylim(*limits)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(series) - len(faint) > 1:
            figure.legend(loc="outside lower left", ncols=3, labelcolor=_light("ink"))

    legend = 0.2 * -(-len(series) // 3) if len(series) > 1 else 0.0
    return render(name, title, (4.7, 2.7 + legend), draw)


def weight_histograms(name: str, title: str, weights: np.ndarray, uniform: float) -> str:
    """Distribution of every expert's weight, one row an expert; weights (N, K) in [0, 1], dashed at `uniform`."""
    experts = weights.shape[1]
    bins = np.linspace(0, 1, 41)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(experts, 1, sharex=True, squeeze=False)
        for expert, axes in enumerate(panels[:, 0]):
            _finish(axes, title if expert == 0 else "", "gate weight" if expert == experts - 1 else "", grid=None)
            colour = _light(expert_style(expert).colour)
            axes.hist(np.clip(weights[:, expert], 0, 1), bins=bins.tolist(), color=colour, linewidth=0)
            axes.axvline(uniform, color=_light("muted"), linewidth=1, linestyle=(0, (4, 3)))
            axes.set_yticks([])
            axes.set_ylabel(f"expert {expert}", rotation=0, ha="right", va="center", color=_light("ink"))
            axes.set_xlim(0, 1)

    return render(name, title, (4.7, 0.8 + 0.5 * experts), draw)


def heat_map(
    name: str, title: str, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[HeatCell]], legend: str
) -> str:
    """Labelled rows × columns of written values, coloured by their ratio in steps (HEAT_STEPS); strong ones in bold."""
    label_width = 0.075 * max(len(_shorten(row)) for row in rows) + 0.25
    width = min(max(4.7, label_width + 0.62 * len(columns)), 8.6)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _finish(axes, title, "", grid=None)
        for y, line in enumerate(cells):
            for x, cell in enumerate(line):
                _heat_cell(axes, x, y, cell)
        axes.set_yticks(range(len(rows)), [_shorten(row) for row in rows])
        axes.set_xticks(range(len(columns)), columns)
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelcolor=_light("ink"))
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _heat_legend(figure, legend)

    return render(name, title, (width, 1.15 + 0.24 * len(rows)), draw)


def heat_colour(ratio: float) -> str:
    """The colour of a ratio, a key of PALETTE.

    >>> heat_colour(1.0), heat_colour(1.3), heat_colour(1 / 3)
    ('even', 'above_2', 'below_4')
    """
    size = max(ratio, 1 / ratio) if ratio > 0 else float("inf")
    step = sum(size >= edge for edge in HEAT_STEPS)
    return f"{'above' if ratio > 1 else 'below'}_{step}" if step else "even"


def _heat_cell(axes: Axes, x: int, y: int, cell: HeatCell) -> None:
    if cell.ratio is not None:
        colour = _light(heat_colour(cell.ratio))
        axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, linewidth=0))
    weight = "bold" if cell.strong else "normal"
    axes.text(x, y, cell.text, ha="center", va="center", color=_light("ink"), fontweight=weight)


def _heat_legend(figure: Figure, label: str) -> None:
    """The steps as swatches: as many times what is even, from the smallest to the largest."""
    edges = [f"≤ {1 / HEAT_STEPS[3]:.1f}", *(f"{1 / edge:.2f}" for edge in reversed(HEAT_STEPS[:3])), "even"]
    edges += [*(f"{edge:.2f}" for edge in HEAT_STEPS[:3]), f"≥ {HEAT_STEPS[3]:.0f}"]
    names = [*(f"below_{step}" for step in (4, 3, 2, 1)), "even", *(f"above_{step}" for step in (1, 2, 3, 4))]
    swatches = [Rectangle((0, 0), 1, 1, facecolor=_light(name), linewidth=0) for name in names]
    made = figure.legend(
        swatches,
        edges,
        loc="outside lower left",
        ncols=9,
        title=label,
        labelcolor=_light("muted"),
        fontsize=7,
        handlelength=0.9,
        handletextpad=0.3,
        columnspacing=0.7,
        alignment="left",
    )
    made.get_title().set(color=_light("muted"), fontsize=7)


def reliability(name: str, title: str, series: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, Style]]) -> str:
    """How often answers of a confidence are right: label → (confidences, accuracies, shares of the examples, style).

    On the dashed diagonal confidence is what it says; a mark's area is the share of the examples that it stands for.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _finish(axes, title, "confidence", grid="y")
        axes.plot([0, 1], [0, 1], color=_light("muted"), linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for label, (confidences, accuracies, shares, style) in series.items():
            colour = _light(style.colour)
            face = colour if style.filled else _light("surface")
            axes.plot(confidences, accuracies, color=colour, linewidth=1.2, alpha=0.6, label="_" + label)
            axes.scatter(
                confidences,
                accuracies,
                s=12 + 160 * np.asarray(shares),
                marker=style.marker,
                facecolors=face,
                edgecolors=colour,
                linewidths=1.4,
                label=_shorten(label),
                zorder=3,
            )
        axes.set_ylabel("share of right answers")
        axes.set_xlim(0, 1.02)
        axes.set_ylim(-0.02, 1.02)
        # legend marks of one size: the sizes in the plot mean something else
        for handle in figure.legend(loc="outside lower left", ncols=3, labelcolor=_light("ink")).legend_handles:
            if handle is not None:
                handle.set(sizes=[30])

    return render(name, title, (4.7, 3.6), draw)


def histogram(name: str, title: str, values: np.ndarray, xlabel: str, reference: tuple[float, str]) -> str:
    """Histogram of `values` (N,) from zero to a little beyond the labelled vertical line `reference`."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _finish(axes, title, xlabel, grid="y")
        level, label = reference
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        # Rounding may lift a value a hair above the largest possible: it belongs into the last bin.
        axes.hist(np.clip(values, 0, level), bins=np.linspace(0, level, 41).tolist(), color=_light("blue"), linewidth=0)
        axes.axvline(level, color=_light("muted"), linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            label,
            (level, 1),
            (-5, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            va="top",
            color=_light("muted"),
        )
        axes.set_xlim(0, level * 1.04)

    return render(name, title, (4.7, 2.7), draw)


def user_map(name: str, title: str, x: np.ndarray, y: np.ndarray, strongest: np.ndarray, num_experts: int) -> str:
    """Users (N,) at (x, y) in the colour of their strongest expert (-1: none); at most MAX_POINTS, by a fixed seed."""
    kept = np.arange(len(x))
    if len(x) > MAX_POINTS:
        kept = np.sort(np.random.default_rng(0).choice(len(x), MAX_POINTS, replace=False))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _finish(axes, title, "first principal component of the representation", grid=None)
        for expert in range(-1, num_experts):
            mine = kept[strongest[kept] == expert]
            style = expert_style(expert) if expert >= 0 else Style("muted", "o")
            if len(mine):
                axes.plot(
                    x[mine],
                    y[mine],
                    linestyle="",
                    marker=style.marker,
                    markersize=4,
                    alpha=0.75,
                    color=_light(style.colour),
                    markeredgewidth=0,
                    label=f"expert {expert}" if expert >= 0 else "none: all weigh the same",
                )
        axes.set_ylabel("second")
        axes.set_xticks([])
        axes.set_yticks([])
        figure.legend(loc="outside lower left", ncols=4, labelcolor=_light("ink"), handletextpad=0.1)

    return render(name, title, (4.7, 4.0), draw)


def render(name: str, title: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Run `draw` on a fresh figure of `size` (inches) and return its SVG; `name` must be unique on a page."""
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return _tidy(buffer.getvalue(), name, title)


def themed(svg: str) -> str:
    """The SVG with CSS variables for its colours: for a page that defines the names of PALETTE."""
    for name, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg.replace(' xmlns="http://www.w3.org/2000/svg"', "")


def standalone(svg: str) -> str:
    """The SVG as a file: on its own light ground, legible in a dark page too."""
    head, bracket, rest = svg.partition(">")
    return f'{head}{bracket}\n <rect width="100%" height="100%" fill="{PALETTE["surface"][0]}"/>{rest}'


def css_variables(dark: bool) -> Iterable[tuple[str, str]]:
    """(name, colour) of every colour, for the page's style sheet."""
    return [(name, colours[int(dark)]) for name, colours in PALETTE.items()]


_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a title or a system's name is a dollar
    "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same layout on every machine
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}


def _light(name: str) -> str:
    return PALETTE[name][0]


def _shorten(label: str) -> str:
    return label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "…"


def _finish(axes: Axes, title: str, xlabel: str, grid: str | None) -> None:
    """Title on the left, quiet axes, a grid along one direction."""
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    if title:
        axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=_light("ink"), pad=8)
    axes.set_xlabel(xlabel, color=_light("muted"))
    axes.yaxis.label.set_color(_light("muted"))
    axes.tick_params(colors=_light("muted"), length=3, width=0.8)
    axes.spines["bottom"].set_color(_light("muted"))
    if grid == "x":
        axes.xaxis.grid(True, color=_light("grid"), linewidth=0.8)
    elif grid == "y":
        axes.yaxis.grid(True, color=_light("grid"), linewidth=0.8)
        axes.tick_params(axis="y", length=0)


def _dot(axes: Axes, position: int, row: Row) -> None:
    colour = _light(row.style.colour)
    if row.low is not None and row.high is not None:
        axes.plot(
            [row.low, row.high], [position, position], color=colour, linewidth=2, solid_capstyle="round", alpha=0.55
        )
    face = colour if row.style.filled else _light("surface")
    axes.plot(
        [row.value],
        [position],
        marker=row.style.marker,
        markersize=6.5,
        color=colour,
        markerfacecolor=face,
        markeredgewidth=1.6,
        zorder=3,
    )


def _line(axes: Axes, label: str, xs: np.ndarray, ys: np.ndarray, style: Style, faint: bool) -> None:
    axes.plot(
        xs,
        ys,
        color=_light(style.colour),
        linewidth=1 if faint else 1.9,
        alpha=0.35 if faint else 1,
        linestyle="-" if style.filled else (0, (4, 2)),
        marker="" if len(xs) > 25 else style.marker,
        markersize=3.5,
        label="_" + label if faint else _shorten(label),  # a leading underscore keeps it out of the legend
    )


def _level(axes: Axes, level: float, label: str) -> None:
    axes.axhline(level, color=_light("muted"), linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        label,
        (1, level),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=_light("muted"),
    )


def _tidy(svg: str, name: str, title: str) -> str:
    """Only the <svg> element, without metadata and comments, with ids of its own and a label for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href=", "href=")
    for before in (' id="', 'href="#', "url(#"):
        svg = svg.replace(before, f"{before}{name}-")
    svg = svg.replace("'DejaVu Sans'", FONTS)
    return svg.replace("<svg ", f'<svg role="img" aria-label={quoteattr(title)} ', 1)
