"""What a reviewer sees of an evaluation: numbers of `model.training.analysis` as pictures.

Every function gives a matplotlib Figure (object interface: no pyplot, no state); where there is
nothing to show, one that says so. Pictures with boxes are in `pictures.py`.
Colours: Okabe and Ito's eight, which colour-blind readers tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from model.training.analysis import ERRORS, FOREGROUND_IOU, Calibration, ErrorKinds

BLACK, GREY = "#000000", "#8c8c8c"
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, RED, PINK = "#0072B2", "#D55E00", "#CC79A7"
SERIES = (BLUE, ORANGE, GREEN, PINK, SKY, RED, BLACK)
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
RECALLS = np.linspace(0.0, 1.0, 101)
NAMED_CLASSES = 10  # more are drawn or written in a smaller way


def rgb(figure: Figure) -> NDArray[np.uint8]:
    """The figure as pixels [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return pixels[..., :3].copy()


def precision_recall(
    *, precision: NDArray[np.float64], names: Sequence[str], step: int | None
) -> Figure:
    """precision [10, 101, K] over IoU 0.5..0.95, recall and class; -1 without ground truth.

    Up to ten classes get a line each at IoU 0.5; more become the band of the middle 80 %.
    """
    figure = _figure("Precision and recall", step, size=(8.5, 5.2))
    known = [k for k in range(precision.shape[2]) if (precision[:, :, k] > -1).all()]
    if not known:
        return _nothing(figure, "no ground truth: no curve")
    axes = figure.add_subplot()
    curves = precision[:, :, known]
    if len(known) <= NAMED_CLASSES:
        for place, k in enumerate(known):
            colour, dash = SERIES[place % 6], DASHES[1 + place // 6]
            label = f"{names[k]}, IoU 0.5: {curves[0, :, place].mean():.3f}"
            axes.plot(RECALLS, curves[0, :, place], color=colour, ls=dash, lw=1, label=label)
    else:
        low, high = np.quantile(curves[0], (0.1, 0.9), axis=1)
        label = f"middle 80 % of {len(known)} classes, IoU 0.5"
        axes.fill_between(RECALLS, low, high, color=SKY, alpha=0.3, lw=0, label=label)
    for curve, label, colour, dash in (
        (curves[0], "IoU 0.5", BLUE, "-"),
        (curves[5], "IoU 0.75", RED, "--"),
        (curves.mean(axis=0), "mean of IoU 0.5 to 0.95", BLACK, "-."),
    ):
        line = curve.mean(axis=1)
        label = f"all classes, {label}: {line.mean():.3f}"
        axes.plot(RECALLS, line, color=colour, ls=dash, lw=2.6, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    order = [*range(len(labels) - 3, len(labels)), *range(len(labels) - 3)]
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        title="average precision",
        loc="outside right upper",
        fontsize=8,
        frameon=False,
    )
    return figure


def class_ap(*, ap: Mapping[str, float], step: int | None) -> Figure:
    """AP of each class by name, best first; in columns of forty."""
    ranked = sorted(ap.items(), key=lambda item: (-item[1], item[0]))
    columns = [ranked[i : i + 40] for i in range(0, len(ranked), 40)] or [[]]
    rows = max(map(len, columns))
    size = (1 + 4.8 * len(columns) + 2 * (len(columns) == 1), 1.6 + 0.23 * max(rows, 6))
    figure = _figure("AP of each class", step, size=size)
    if not ranked:
        return _nothing(figure, "no ground truth: no AP")
    mean = float(np.mean([value for _, value in ranked]))
    for place, column in enumerate(columns):
        axes = figure.add_subplot(1, len(columns), place + 1)
        values = [value for _, value in column]
        bars = axes.barh(range(len(column)), values, color=BLUE, height=0.72)
        texts = [f"{value:.3f}" for value in values]
        for label in axes.bar_label(bars, texts, padding=3, fontsize=8):  # above the mean's line
            label.set(zorder=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        axes.axvline(mean, color=RED, ls="--", lw=1.4, label=f"mean of {len(ranked)}: {mean:.3f}")
        axes.set_yticks(range(len(column)), [name for name, _ in column], fontsize=8)
        axes.set(
            xlim=(0, max(values[0] * 1.15, ranked[0][1] * 1.15, 0.05)), ylim=(rows - 0.4, -0.6)
        )
        axes.set_xlabel("AP, mean of IoU 0.5 to 0.95")
    _legend_below(figure, axes)
    return figure


def confusion_matrix(
    *, counts: NDArray[np.int64], names: Sequence[str], threshold: float, step: int | None
) -> Figure:
    """counts [K + 1, K + 1] of `analysis.confusion`; shares of each row; numbers in few cells."""
    few = len(names) <= NAMED_CLASSES
    side = max(5.2, 2.6 + (0.75 if few else 0.165) * (len(names) + 1))
    title = f"Confusion at score {threshold:.2f} and above, boxes matched at IoU {FOREGROUND_IOU}"
    figure = _figure(title, step, size=(side + 1.7, side))
    if not counts.sum():
        return _nothing(figure, "no boxes and no detections")
    axes = figure.add_subplot()
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto")
    small = 9 if few else 6.5
    axes.set_xticks(range(len(counts)), [*names, "not found"], rotation=90, fontsize=small)
    axes.set_yticks(range(len(counts)), [*names, "nothing there"], fontsize=small)
    axes.set(xlabel="predicted class", ylabel="true class")
    edge = len(names) - 0.5
    axes.axhline(edge, color=BLACK, lw=0.8)
    axes.axvline(edge, color=BLACK, lw=0.8)
    if few:
        for (row, column), number in np.ndenumerate(counts):
            if number:
                share = shares[row, column]
                colour = "white" if share > 0.4 else "black"
                text = f"{share:.0%}\n{number}"
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    bar = figure.colorbar(picture, ax=axes, shrink=0.7, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "5 %", "20 %", "50 %", "100 %"])
    bar.set_label("share of the row (colour by square root)")
    return figure


def error_kinds(*, errors: ErrorKinds, step: int | None) -> Figure:
    """How many mistakes of each kind, and what AP50 each of them costs."""
    figure = _figure("Kinds of mistakes (TIDE)", step, size=(10, 3.9))
    left, right = figure.subplots(1, 2, sharey=True)
    number = [errors.counts[name] for name in ERRORS]
    points = [100 * errors.delta_ap50[name] for name in ERRORS]
    known = not np.isnan(errors.ap50)
    for axes, values, texts, colour in (
        (left, number, [f"{n:,}" for n in number], ORANGE),
        (right, points if known else [0.0] * 6, [f"{p:.1f}" for p in points], BLUE),
    ):
        bars = axes.barh(range(len(ERRORS)), values, color=colour, height=0.72)
        if known or axes is left:
            axes.bar_label(bars, texts, padding=3, fontsize=9)
        axes.set_xlim(0, max(1, 1.18 * max(values)))
    left.set_yticks(range(len(ERRORS)), ERRORS)
    left.set_ylim(len(ERRORS) - 0.4, -0.6)
    left.set_title(
        f"score {errors.threshold:.2f} and above; {errors.correct:,} correct", fontsize=10
    )
    left.set_xlabel("mistakes (boxes)")
    left.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    right.set_xlabel("AP50 gained if repaired (points of 100)")
    right.set_title(f"all scores; AP50 is {100 * errors.ap50:.1f}" if known else "", fontsize=10)
    if not known:
        right.text(0.5, 0.5, "no ground truth: no AP50", transform=right.transAxes, ha="center")
    return figure


def calibration(*, calibration: Calibration, step: int | None) -> Figure:
    """Reliability diagram above the number of detections in each bin."""
    found = calibration
    figure = _figure("Calibration of scores", step, size=(6, 6.4))
    total = int(found.count.sum())
    if not total:
        return _nothing(figure, "no detections")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    width = np.diff(found.edges)
    axes.bar(
        found.edges[:-1],
        np.nan_to_num(found.precision),
        width,
        align="edge",
        color=SKY,
        edgecolor="white",
        label=f"correct at IoU {FOREGROUND_IOU}",
    )
    axes.plot([0, 1], [0, 1], color=BLACK, ls="--", lw=1.2, label="perfect")
    axes.plot(
        found.mean_score,
        found.precision,
        color=RED,
        marker="o",
        lw=1.2,
        label="at the mean score of the bin",
    )
    axes.set(ylim=(0, 1.03), ylabel="share correct")
    axes.set_title(
        f"{total:,} detections; expected calibration error {found.error:.3f}", fontsize=10
    )
    _legend_below(figure, axes)
    bars = below.bar(
        found.edges[:-1], found.count, width, align="edge", color=GREY, edgecolor="white"
    )
    below.bar_label(bars, [_short(n) for n in found.count], padding=2, fontsize=8)
    below.set_yscale("symlog", linthresh=1)
    below.set(ylim=(0, 20 * found.count.max()), xlim=(0, 1), xlabel="score", ylabel="detections")
    return figure


def _short(number: float) -> str:
    """312000 -> "312k"."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


def anchor_recall(*, best_iou: NDArray[np.float32], subject: str) -> Figure:
    """best_iou [M] of `analysis.best_anchor_iou`; subject: the data and network it is of."""
    figure = _figure(f"Best anchor of each box: {subject}", None, size=(7, 4.2))
    if not len(best_iou):
        return _nothing(figure, "no boxes")
    axes = figure.add_subplot()
    edges = np.linspace(0.0, 1.0, 21)
    count, _ = np.histogram(best_iou, edges)
    covered = best_iou >= FOREGROUND_IOU
    for side, colour, text in ((True, BLUE, "at or above"), (False, ORANGE, "below")):
        bins = (edges[:-1] >= FOREGROUND_IOU - 1e-9) == side
        label = (
            f"{text} {FOREGROUND_IOU}: {(covered == side).mean():.1%} of {len(best_iou):,} boxes"
        )
        axes.bar(
            edges[:-1][bins],
            count[bins],
            0.05,
            align="edge",
            color=colour,
            edgecolor="white",
            label=label,
        )
    axes.axvline(FOREGROUND_IOU, color=BLACK, ls="--", lw=1.4, label="positive from here on")
    axes.set(xlim=(0, 1), xlabel="IoU with the best anchor", ylabel="boxes")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    _legend_below(figure, axes)
    return figure


History = Mapping[str, tuple[Sequence[int], Sequence[float]]]


def fusion_weights(*, history: History, max_cells: int = 4) -> Figure:
    """Normalised weight over steps, keys "cell.node.input": a row a cell, a panel a node.

    Source: Figure 5 of arXiv 1911.09070v7. Of more than max_cells cells an even choice is shown.
    """
    panels: dict[tuple[str, str], dict[str, tuple[Sequence[int], Sequence[float]]]] = {}
    for key, series in history.items():
        cell, node, source = key.split(".")
        panels.setdefault((cell, node), {})[source] = series
    cells = list(dict.fromkeys(cell for cell, _ in panels))
    nodes = list(dict.fromkeys(node for _, node in panels))
    shown = [cells[i] for i in _spread(len(cells), max_cells)]
    last = max((steps[-1] for steps, _ in history.values() if len(steps)), default=None)
    left_out = (
        f"; {len(cells) - len(shown)} of {len(cells)} cells left out" if shown != cells else ""
    )
    size = (max(7.5, 0.8 + 1.75 * len(nodes)), 1.8 + 1.65 * max(len(shown), 1))
    figure = _figure(f"Learned fusion weights{left_out}", last, size=size)
    if last is None:
        return _nothing(figure, "no learned fusion weights")
    grid = figure.subplots(len(shown), len(nodes), sharex=True, sharey=True, squeeze=False)
    sources = list(dict.fromkeys(source for lines in panels.values() for source in lines))
    for row, cell in enumerate(shown):
        for column, node in enumerate(nodes):
            axes, lines = grid[row, column], panels.get((cell, node), {})
            axes.set_visible(bool(lines))
            for place, (source, (steps, weights)) in enumerate(lines.items()):
                look = sources.index(source)
                style = look // len(SERIES) % len(DASHES)
                single = len(steps) == 1  # equal weights are then rings around each other
                axes.plot(
                    steps,
                    weights,
                    color=SERIES[look % len(SERIES)],
                    ls=DASHES[style],
                    marker=MARKERS[style] if single else None,
                    markersize=4 + 4 * place,
                    fillstyle="none",
                    lw=1.6,
                    label=source,
                )
            axes.set_title(f"{cell}  {node}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    values = np.concatenate([np.asarray(weights) for _, weights in history.values()])
    low, high = min(0.0, float(values.min())), float(values.max())
    grid[0, 0].set_ylim(low - 0.02 * (high - low), high + 0.08 * (high - low))
    if all(len(steps) <= 1 for steps, _ in history.values()):
        grid[0, 0].set_xlim(last - 1, last + 1)
        grid[0, 0].set_xticks([last])
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("normalised weight", fontsize=9)
    handles = {
        label: h
        for axes in grid.flat
        for h, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [handles[source] for source in sources if source in handles],
        [source for source in sources if source in handles],
        title="input",
        loc="outside right center",
        fontsize=8,
        frameon=False,
    )
    return figure


def _spread(number: int, limit: int) -> list[int]:
    """Up to `limit` of range(number), first and last among them."""
    if number <= limit:
        return list(range(number))
    return sorted({round(i * (number - 1) / max(limit - 1, 1)) for i in range(limit)})


def _figure(title: str, step: int | None, *, size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title if step is None else f"{title}, step {step:,}", fontsize=12)
    return figure


def _nothing(figure: Figure, text: str) -> Figure:
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=13, color="#555555")
    return figure


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False
    )
