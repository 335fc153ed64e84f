"""The doctor's tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from model.data.findings import Finding, worst_first
from model.data.split_lint import ClassCount
from model.network.footprint import GIB
from orchestrator.launch.dataset_doctor import DataReport, SplitFacts
from orchestrator.launch.progress import Row, duration, print_table
from orchestrator.launch.size_estimate import SizeEstimate

PLAIN_WIDTH = 160
MOST_CLASSES, ENDS = 16, 8
COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}


def print_data(report: DataReport, out: TextIO) -> None:
    """What there is, how it is spread, what it asks of a network. Findings are printed apart."""
    print_table(
        "data",
        [
            *(row for split in report.splits for row in _split_rows(split)),
            *(("note", note) for note in report.notes),
        ],
        out,
    )
    if report.classes:
        _print_classes(report.classes, out)
    if report.anchors:
        now = report.anchors[0].share
        print_columns(
            f"training boxes that an anchor covers by half, {report.network}",
            ("anchors", "covered", "change", "work", "how"),
            [
                (trial.what, f"{trial.share:.1%}", f"{100 * (trial.share - now):+.1f}" if number else "",
                 f"x {trial.cost:.2f}", trial.setting or ("" if not number else "no setting"))
                for number, trial in enumerate(report.anchors)
            ],
            out,
        )  # fmt: skip
    if report.sizes and report.rates is not None:
        images = report.splits[0].images
        print_columns(
            "sizes of network on one device here, estimated",
            ("phi", "pixels", "parameters", "GMACs", "GiB an image", "computed again", "images that fit",
             "images/s", f"an epoch of {images:,}"),
            [_size_row(size, images) for size in report.sizes],
            out,
        )  # fmt: skip
        print(
            "* asked for. Memory: saved activations, traced. images/s: a guess within a factor of two, from "
            f"the {report.rates.tflop_per_s:.3g} TFLOP/s of a matrix product and {report.rates.gb_per_s:.3g} "
            "GB/s of a copy here, just now; jobs/benchmark.py measures",
            file=out,
        )


def _split_rows(split: SplitFacts) -> list[Row]:
    crowds = f", {split.crowds} crowds" if split.crowds else ""
    return [
        (split.name, f"{split.images:,} images, {split.boxes:,} boxes{crowds}, {split.classes} classes; "
         f"{split.looked_at:,} images decoded"),
        ("", f"{split.annotations} with images in {split.images_folder}"),
    ]  # fmt: skip


def _print_classes(classes: Sequence[ClassCount], out: TextIO) -> None:
    shown: list[ClassCount | None] = list(classes)
    title = f"{len(classes)} classes, most boxes first"
    if len(classes) > MOST_CLASSES:
        shown = [*classes[:ENDS], None, *classes[-ENDS:]]
    rows = [
        ("…", "", "", "", "") if one is None else
        (one.name, *(f"{n:,}" for n in (one.train_boxes, one.train_images, one.val_boxes, one.val_images)))
        for one in shown
    ]  # fmt: skip
    print_columns(title, ("class", "train boxes", "in images", "val boxes", "in images"), rows, out)


def _size_row(size: SizeEstimate, images: int) -> tuple[str, ...]:
    fit = "?" if size.images is None else f"{size.images} ({size.images_recomputed} computed again)"
    return (
        f"{size.phi}{' *' if size.asked else ''}", str(size.image_size_px), f"{size.params / 1e6:.1f} M",
        f"{size.gmacs:.1f}", f"{size.image_bytes / GIB:.2f}", f"{size.recomputed_bytes / GIB:.2f}", fit,
        f"{size.img_per_s:.3g}", duration(images / size.img_per_s),
    )  # fmt: skip


def print_findings(findings: Sequence[Finding], out: TextIO) -> None:
    """Worst first; one line says that there are none."""
    console = _console(out)
    if not findings:
        console.print("nothing found that is wrong")
        return
    table = Table(title="findings", title_justify="left", pad_edge=False, show_lines=True)
    for name in ("", "where", "number", "what", "for example", "what to do"):
        table.add_column(name, justify="right" if name == "number" else "left", overflow="fold",
                         no_wrap=name in ("", "where", "number"))  # fmt: skip
    for one in worst_first(findings):
        table.add_row(
            Text(one.severity, style=COLOURS[one.severity]), Text(one.where), f"{one.count:,}",
            Text(one.what), Text("\n".join(one.examples)), Text(one.remedy),
        )  # fmt: skip
    console.print(table)


def print_columns(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], out: TextIO
) -> None:
    """The first and the last column to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", pad_edge=False)
    for number, name in enumerate(header):
        left = number == 0 or name == "how"
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _console(out).print(table)


def _console(out: TextIO) -> Console:
    console = Console(file=out, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    return console
