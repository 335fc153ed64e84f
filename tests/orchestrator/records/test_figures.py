"""What the figures show: bars, lines, words and colours, with much, little and nothing."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import ImageColor

from model.training.analysis import ERRORS, Calibration, ErrorKinds
from orchestrator.records import figures, pictures
from orchestrator.records.pictures import CAPTION_PX, CELL_PX, GAP_PX, HEADER_PX, Picture

NAMES = tuple(f"class {k}" for k in range(80))


def words(figure: Figure) -> str:
    """All text of a drawn figure."""
    figures.rgb(figure)
    found = [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]
    return "\n".join(found)


def assert_nothing_overlaps(figure: Figure) -> None:
    """Axes with their labels, titles and legends stay apart and inside the figure."""
    figures.rgb(figure)
    renderer = figure.canvas.get_renderer()
    parts = [axes.get_tightbbox(renderer) for axes in figure.axes if axes.get_visible()]
    parts += [legend.get_window_extent(renderer) for legend in figure.legends]
    parts += [figure._suptitle.get_window_extent(renderer)]
    width, height = figure.canvas.get_width_height()
    for place, part in enumerate(parts):
        assert part.x0 >= -1
        assert part.y0 >= -1
        assert part.x1 <= width + 1
        assert part.y1 <= height + 1
        for other in parts[:place]:
            apart_x = part.x1 <= other.x0 + 1 or other.x1 <= part.x0 + 1
            assert apart_x or part.y1 <= other.y0 + 1 or other.y1 <= part.y0 + 1


def bars(axes: Axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches]


def falling(num_classes: int) -> NDArray[np.float64]:
    """precision [10, 101, K]: class k at IoU t has 1 - t / 20 up to recall 1 - k / 200, then 0."""
    recall = np.linspace(0, 1, 101)[None, :, None]
    height = 1 - np.arange(10)[:, None, None] / 20
    reach = 1 - np.arange(num_classes)[None, None] / 200
    return height * (recall <= reach + 1e-9)


def kinds(**changed: float) -> ErrorKinds:
    counts = dict(zip(ERRORS, (35, 9, 6, 4, 1234, 61), strict=True))
    gains = dict(zip(ERRORS, (0.174, 0.036, 0.003, 0.002, 0.008, 0.077), strict=True))
    return ErrorKinds(0.41, 215, counts, changed.get("ap50", 0.682), gains)


def calibrated(count: list[int]) -> Calibration:
    numbers = np.array(count)
    share = np.where(numbers > 0, [0.1, 0.4, 0.9], np.nan)
    return Calibration(np.linspace(0, 1, 4), share, share, numbers, 0.25 if sum(count) else np.nan)


def history(cells: int, steps: list[int]) -> dict[str, tuple[list[int], list[float]]]:
    return {
        f"cell{cell}.{node}.{source}": (steps, [weight] * len(steps))
        for cell in range(cells)
        for node, sources in {"P4_td": ("P4", "P5"), "P4_out": ("P4", "P4_td", "P3")}.items()
        for source, weight in zip(sources, (0.3, 0.6, 0.1), strict=False)
    }


def test_precision_recall_names_few_classes_and_their_ap() -> None:
    precision = falling(3)
    precision[:, :, 1] = -1  # no ground truth
    figure = figures.precision_recall(precision=precision, names=NAMES[:3], step=1500)
    text = words(figure)
    assert "Precision and recall, step 1,500" in text
    assert len(figure.axes[0].lines) == 2 + 3
    assert "class 0, IoU 0.5: 1.000" in text
    assert "class 2, IoU 0.5: 0.990" in text
    assert "class 1" not in text
    assert "all classes, IoU 0.5: 0.995" in text
    assert "all classes, IoU 0.75: 0.746" in text
    assert "all classes, mean of IoU 0.5 to 0.95: 0.771" in text


def test_precision_recall_of_many_classes_is_a_band() -> None:
    figure = figures.precision_recall(precision=falling(80), names=NAMES, step=1)
    assert len(figure.axes[0].lines) == 3
    assert len(figure.axes[0].collections) == 1
    assert "middle 80 % of 80 classes" in words(figure)


@pytest.mark.parametrize("num_classes", [1, 6, 80])
def test_class_ap_is_sorted_and_complete(num_classes: int) -> None:
    ap = {name: (k * 37 % 80) / 100 for k, name in enumerate(NAMES[:num_classes])}
    figure = figures.class_ap(ap=ap, step=1)
    drawn = [width for axes in figure.axes for width in bars(axes)]
    assert drawn == pytest.approx(sorted(ap.values(), reverse=True))
    labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert labels == sorted(ap, key=lambda name: -ap[name])
    limits = {axes.get_xlim() for axes in figure.axes}
    assert len(limits) == 1  # columns can be compared
    assert f"mean of {num_classes}: {np.mean(list(ap.values())):.3f}" in words(figure)


def test_confusion_writes_numbers_in_few_cells_only() -> None:
    counts = np.array([[8, 1, 1], [0, 0, 0], [3, 1, 0]])
    figure = figures.confusion_matrix(counts=counts, names=NAMES[:2], threshold=0.4, step=7)
    text = words(figure)
    shown = figure.axes[0].images[0].get_array()
    assert np.allclose(shown, [[0.8, 0.1, 0.1], [0, 0, 0], [0.75, 0.25, 0]])
    assert {t.get_text() for t in figure.axes[0].texts} == {
        "80%\n8", "10%\n1", "75%\n3", "25%\n1",
    }  # fmt: skip
    assert "score 0.40 and above" in text
    assert "not found" in text
    assert "nothing there" in text
    many = figures.confusion_matrix(counts=np.eye(81, dtype=int), names=NAMES, threshold=0, step=7)
    assert len(many.axes[0].texts) == 0
    assert NAMES[79] in words(many)


def test_error_kinds_shows_counts_and_costs() -> None:
    figure = figures.error_kinds(errors=kinds(), step=7)
    left, right = figure.axes
    assert bars(left) == [35, 9, 6, 4, 1234, 61]
    assert bars(right) == pytest.approx([17.4, 3.6, 0.3, 0.2, 0.8, 7.7])
    text = words(figure)
    assert [label.get_text() for label in left.get_yticklabels()] == list(ERRORS)
    assert "score 0.41 and above; 215 correct" in text
    assert "AP50 is 68.2" in text
    assert "1,234" in text


def test_calibration_shows_share_and_number_of_each_bin() -> None:
    figure = figures.calibration(calibration=calibrated([312_000, 0, 40]), step=7)
    above, below = figure.axes
    assert [bar.get_height() for bar in above.patches] == pytest.approx([0.1, 0, 0.9])
    assert [bar.get_height() for bar in below.patches] == [312_000, 0, 40]
    text = words(figure)
    assert "312,040 detections; expected calibration error 0.250" in text
    assert "312k" in text


def test_anchor_recall_splits_at_a_half() -> None:
    best = np.array([0.1, 0.49, 0.5, 0.72, 1.0], dtype=np.float32)
    figure = figures.anchor_recall(best_iou=best, subject="shapes at 512 px")
    heights = {round(bar.get_x(), 2): bar.get_height() for bar in figure.axes[0].patches}
    assert {x for x, height in heights.items() if height} == {0.1, 0.45, 0.5, 0.7, 0.95}
    text = words(figure)
    assert "at or above 0.5: 60.0% of 5 boxes" in text
    assert "below 0.5: 40.0% of 5 boxes" in text
    assert "shapes at 512 px" in text
    assert figure.axes[0].lines[0].get_xdata()[0] == 0.5


def test_fusion_weights_have_a_panel_a_node_and_a_line_an_input() -> None:
    figure = figures.fusion_weights(history=history(3, [0, 100, 200]))
    assert [axes.get_title() for axes in figure.axes[:3]] == [
        "cell0  P4_td", "cell0  P4_out", "cell1  P4_td",
    ]  # fmt: skip
    assert [len(axes.lines) for axes in figure.axes] == [2, 3] * 3
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    assert list(lines["P4_td"].get_ydata()) == [0.6, 0.6, 0.6]
    assert lines["P4"].get_color() == figure.axes[0].lines[0].get_color()  # one input, one colour
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "P4",
        "P5",
        "P4_td",
        "P3",
    ]
    assert "step 200" in words(figure)
    assert "left out" not in words(figure)


def test_fusion_weights_say_which_cells_are_left_out() -> None:
    figure = figures.fusion_weights(history=history(7, [0, 1]), max_cells=3)
    assert len(figure.axes) == 6
    titles = [axes.get_title().split()[0] for axes in figure.axes[::2]]
    assert titles == ["cell0", "cell3", "cell6"]
    assert "4 of 7 cells left out" in words(figure)


def test_a_single_point_in_time_is_seen() -> None:
    equal = {f"cell0.P4.{source}": ([500], [0.5]) for source in ("a", "b")}
    figure = figures.fusion_weights(history=equal)
    pixels = figures.rgb(figure)
    panel = figure.axes[0].get_window_extent()
    inside = pixels[:, int(panel.x0) : int(panel.x1)]  # the legend stands to the right
    for line in figure.axes[0].lines:  # one around the other
        assert count(inside, str(line.get_color())) > 5


EVERY: dict[str, Callable[[int], Figure]] = {
    "precision_recall": lambda k: figures.precision_recall(
        precision=falling(k), names=NAMES[:k], step=12_345
    ),
    "class_ap": lambda k: figures.class_ap(ap=dict.fromkeys(NAMES[:k], 0.5), step=12_345),
    "confusion_matrix": lambda k: figures.confusion_matrix(
        counts=np.ones((k + 1, k + 1), dtype=int), names=NAMES[:k], threshold=0.3, step=12_345
    ),
    "error_kinds": lambda k: figures.error_kinds(errors=kinds(), step=12_345),
    "calibration": lambda k: figures.calibration(calibration=calibrated([k, 3, 9]), step=12_345),
    "anchor_recall": lambda k: figures.anchor_recall(
        best_iou=np.linspace(0, 1, k, dtype=np.float32), subject="coco val at 512 px"
    ),
    "fusion_weights": lambda k: figures.fusion_weights(history=history(k, [0, 30_000])),
}


@pytest.mark.parametrize("num_classes", [1, 6, 80])
@pytest.mark.parametrize("name", EVERY)
def test_nothing_overlaps(name: str, num_classes: int) -> None:
    assert_nothing_overlaps(EVERY[name](num_classes))


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        (figures.precision_recall(precision=-np.ones((10, 101, 2)), names=NAMES[:2], step=1), "no ground truth"),
        (figures.precision_recall(precision=np.ones((10, 101, 0)), names=(), step=1), "no ground truth"),
        (figures.class_ap(ap={}, step=1), "no ground truth"),
        (figures.confusion_matrix(counts=np.zeros((3, 3), dtype=int), names=NAMES[:2], threshold=0.5, step=1), "no boxes"),
        (figures.error_kinds(errors=kinds(ap50=float("nan")), step=1), "no ground truth"),
        (figures.calibration(calibration=calibrated([0, 0, 0]), step=1), "no detections"),
        (figures.anchor_recall(best_iou=np.zeros(0, dtype=np.float32), subject="x"), "no boxes"),
        (figures.fusion_weights(history={}), "no learned fusion weights"),
        (figures.fusion_weights(history={"cell0.P4.P5": ([], [])}), "no learned fusion weights"),
    ],
)  # fmt: skip
def test_nothing_to_show_is_said(figure: Figure, said: str) -> None:
    assert said in words(figure)
    assert figures.rgb(figure).std() > 0
    assert "nan" not in words(figure)


def test_rgb_is_the_figure_in_pixels() -> None:
    figure = figures.class_ap(ap={"a": 0.5}, step=1)
    pixels = figures.rgb(figure)
    width, height = figure.get_size_inches() * figure.dpi
    assert pixels.dtype == np.uint8
    assert pixels.shape == (int(height), int(width), 3)
    assert (pixels == ImageColor.getrgb(figures.BLUE)).all(axis=-1).mean() > 0.01  # the bar


@pytest.mark.parametrize("module", [figures, pictures])
def test_pyplot_stays_out(module: ModuleType) -> None:
    """It keeps figures for ever and is not safe in threads."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    named = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert any("numpy" in name for name in named)
    assert not any("pyplot" in name for name in named)


GROUND = (90, 120, 60)


def picture(
    *,
    boxes: list[tuple[float, ...]] | None = None,
    labels: list[int] | None = None,
    true: list[tuple[float, ...]] | None = None,
    true_labels: list[int] | None = None,
    size_hw: tuple[int, int] = (CELL_PX, CELL_PX),
) -> Picture:
    image = np.full((*size_hw, 3), GROUND, dtype=np.uint8)
    return Picture(
        image,
        np.array(boxes or [], dtype=np.float32).reshape(-1, 4),
        np.linspace(0.9, 0.5, len(boxes or [])),
        np.array(labels or [], dtype=np.int64),
        np.array(true or [], dtype=np.float32).reshape(-1, 4),
        np.array(true_labels or [], dtype=np.int64),
        caption="an image",
    )


def count(pixels: NDArray[np.uint8], colour: str) -> int:
    return int((pixels == ImageColor.getrgb(colour)).all(axis=-1).sum())


def test_predicted_boxes_are_drawn_where_they_are_in_their_colours() -> None:
    drawn = pictures.draw_boxes(
        picture(boxes=[(100, 200, 300, 400), (20, 60, 80, 120)], labels=[0, 8]), NAMES
    )
    first, second = (ImageColor.getrgb(pictures.COLOURS[k]) for k in (0, 8 % 7))
    assert first != second
    assert tuple(drawn[300, 101]) == tuple(drawn[399, 200]) == tuple(drawn[300, 299]) == first
    assert tuple(drawn[90, 21]) == second
    assert tuple(drawn[300, 200]) == tuple(drawn[90, 10]) == GROUND
    tag = drawn[185:199, 102:140].reshape(-1, 3)  # label and score, just above the box
    assert (tag == first).all(axis=-1).mean() > 0.4
    assert (tag > 200).all(axis=-1).any()


def test_true_boxes_are_dashed_in_white_and_black() -> None:
    drawn = pictures.draw_boxes(picture(true=[(100, 200, 300, 400)], true_labels=[3]), NAMES)
    edge = {tuple(int(v) for v in pixel) for pixel in drawn[220:380, 100]}
    assert edge == {(255, 255, 255), (0, 0, 0)}
    assert tuple(drawn[300, 200]) == GROUND


def test_a_true_box_is_named_only_where_no_prediction_agrees() -> None:
    here = (100.0, 200.0, 300.0, 400.0)
    agreed, wrong, alone = (
        count(pictures.draw_boxes(shown, NAMES), "#ffffff")
        for shown in (
            picture(boxes=[here], labels=[0], true=[here], true_labels=[0]),
            picture(boxes=[here], labels=[1], true=[here], true_labels=[0]),
            picture(true=[here], true_labels=[0]),
        )
    )
    assert agreed + 200 < wrong
    assert agreed + 200 < alone


def test_labels_do_not_cover_each_other() -> None:
    """A crowd of boxes in one place: all tags stay whole, those without a place are left out."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 300, (60, 2))
    boxes = [tuple(row) for row in np.concatenate([low, low + rng.uniform(2, 180, (60, 2))], 1)]
    used: list[pictures.Area] = []
    canvas = pictures.Image.new("RGB", (CELL_PX, CELL_PX))
    draw = pictures.ImageDraw.Draw(canvas)
    for box in boxes:
        pictures._label(draw, box, "person 0.93", figures.BLUE, canvas.size, used)
    assert 10 < len(used) <= 60
    for place, area in enumerate(used):
        assert min(area) >= 0
        assert max(area) <= CELL_PX
        assert not any(pictures._touch(area, other) for other in used[:place])


@pytest.mark.parametrize("size_hw", [(100, 50), (900, 1200), (1, 640)])
def test_pictures_are_scaled_to_one_size_with_their_boxes(size_hw: tuple[int, int]) -> None:
    height, width = size_hw
    whole = (0.0, 0.0, float(width), float(height))
    drawn = pictures.draw_boxes(picture(boxes=[whole], labels=[0], size_hw=size_hw), NAMES)
    assert max(drawn.shape) == CELL_PX
    assert drawn.shape[0] / drawn.shape[1] == pytest.approx(height / width, abs=0.01)
    assert tuple(drawn[-1, -1]) == ImageColor.getrgb(pictures.COLOURS[0])


def test_boxes_outside_the_image_are_cut() -> None:
    drawn = pictures.draw_boxes(
        picture(boxes=[(-50, 100, 900, 200), (700, 700, 800, 800)], labels=[0, 1]), NAMES
    )
    assert tuple(drawn[150, 0]) == ImageColor.getrgb(pictures.COLOURS[0])
    assert drawn.shape == (CELL_PX, CELL_PX, 3)


def test_the_sheet_is_a_grid() -> None:
    tall = picture(size_hw=(400, 200))
    flat = picture(size_hw=(100, 200))
    sheet = pictures.picture_sheet(
        pictures=[flat, flat, tall, flat], names=NAMES, title="Best, step 7", columns=3
    )
    below = CAPTION_PX + GAP_PX
    assert sheet.shape == (
        HEADER_PX + CELL_PX + below + CELL_PX // 2 + below, 3 * CELL_PX + 4 * GAP_PX, 3,
    )  # fmt: skip
    last_top = HEADER_PX + CELL_PX + below
    for row, column in ((HEADER_PX, 0), (HEADER_PX, 1), (HEADER_PX, 2), (last_top, 0)):
        left = GAP_PX + column * (CELL_PX + GAP_PX)
        assert tuple(sheet[row + 5, left + 5]) == GROUND
    assert tuple(sheet[last_top + 5, CELL_PX + 3 * GAP_PX]) == (255, 255, 255)
    caption = sheet[HEADER_PX + CELL_PX // 2 : HEADER_PX + CELL_PX // 2 + CAPTION_PX, :CELL_PX]
    assert count(caption, "#000000") > 20


def test_a_sheet_without_pictures_says_so() -> None:
    sheet = pictures.picture_sheet(pictures=[], names=NAMES, title="Best, step 7")
    assert sheet.shape[2] == 3
    assert (sheet[HEADER_PX:] < 128).any()
