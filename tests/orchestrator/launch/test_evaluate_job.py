"""An evaluation in this process, on a dataset of four pictures."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from model.data.coco_classes import COCO_NAMES
from model.data.dataset import DetectionDataset
from model.data.index import ClassMap, parse_coco
from model.data.transforms import AugmentConfig
from model.detection.anchors import make_anchors
from model.detection.postprocess import PostprocessConfig
from model.network.detector import Detector
from model.network.effdet_format import to_effdet
from model.network.scaling import ModelConfig, resolve
from model.training.evaluation import COLUMNS, detect, score
from model.training.state import Progress, network_config, write_checkpoint
from orchestrator.config.codec import encode
from orchestrator.config.evaluate_cli import EvaluateOptions, parse_evaluate
from orchestrator.config.schema import DataConfig, RunConfig, TrainJob
from orchestrator.errors import ConfigError, UserError
from orchestrator.launch.evaluate_job import (
    EvaluateOutcome,
    Images,
    MakeExaminer,
    Plan,
    find_images,
    look,
    make_plan,
    run_evaluate_job,
)
from orchestrator.launch.evaluate_report import Pace

NETWORK = {
    "backbone": "test_efficientnet", "fpn_channels": 16, "fpn_repeats": 1, "head_layers": 1,
    "image_size_px": 64, "max_level": 6,
}  # fmt: skip
SETTINGS = [part for key, value in NETWORK.items() for part in ("--set", f"model.{key}={value}")]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def document_of(folder: Path, split: str = "val") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (folder / "annotations" / f"instances_{split}.json").read_text()
    )
    return found


def classes_of(folder: Path) -> ClassMap:
    return parse_coco(json.dumps(document_of(folder)).encode(), "val").classes


def detector_of(num_classes: int, seed: int = 4) -> Detector:
    """Random weights with uneven statistics, and scores all over."""
    torch.manual_seed(seed)
    detector = Detector(resolve(ModelConfig(**NETWORK), num_classes)).eval()  # type: ignore[arg-type]
    for tensor in detector.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return detector.requires_grad_(False)


def checkpoint(folder: Path, data: Path, seed: int = 4, classes: ClassMap | None = None) -> Path:
    classes = classes or classes_of(data)
    detector = detector_of(classes.num_classes, seed)
    folder.mkdir()
    job = encode(TrainJob(data=DataConfig(root=str(data)), run=RunConfig(name="a run/x")))
    job["evaluation"] |= {"batch_size": 3, "detections": 30}
    write_checkpoint(
        folder, model={}, ema=detector.state_dict(), progress=Progress(7, {}, torch.zeros(6)),
        config={"network": network_config(detector.spec), "job": job}, classes=classes, metrics={},
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def found_boxes(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny dataset, annotated with some of what `detector_of(6)` finds there, so that it scores."""
    folder = Path(shutil.copytree(shapes, tmp_path_factory.mktemp("found") / "data"))
    for split in ("train", "val"):
        document, categories = document_of(folder, split), classes_of(folder).category_ids
        images = images_of(folder, split)
        rows = rows_of(images, detector_of(6))
        document["annotations"] = []
        for image, image_id in enumerate(images.index.image_ids):
            mine = rows[rows[:, 0] == image]
            for row in mine[[0, 3, 7, 15]]:
                box = [round(float(side), 1) for side in row[1:5]]
                document["annotations"].append(
                    {
                        "id": len(document["annotations"]) + 1, "image_id": int(image_id),
                        "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
                        "category_id": categories[int(row[6])],
                    }
                )  # fmt: skip
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(document))
    return folder


@pytest.fixture
def data(found_boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(found_boxes, tmp_path / "data"))


@pytest.fixture
def model(data: Path, tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "step_00000007", data)


def evaluate(*arguments: Any, figures: bool = False) -> EvaluateOutcome:
    given = [str(one) for one in arguments] + ([] if figures else ["--no-figures"])
    request, _ = parse_evaluate("", [*given, "--threads-per-worker", "1"])
    return run_evaluate_job(request, EvaluateOptions(json=False), io.StringIO())


def refused(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        evaluate(*arguments)
    return str(caught.value)


def images_of(folder: Path, split: Literal["train", "val"] = "val") -> Images:
    return find_images(TrainJob(data=DataConfig(root=str(folder))), split)[0]


def rows_of(images: Images, detector: Detector, **changes: Any) -> NDArray[np.float64]:
    """As a training would find them at its end."""
    dataset = DetectionDataset(images.index, images.split.reader(), 64, AugmentConfig(), 0)
    return detect(
        detector.to(memory_format=torch.channels_last), dataset.evaluation(),
        make_anchors(detector.spec), PostprocessConfig(**({"detections": 30} | changes)),
        rank=0, world_size=1, batch_size=3, workers=0, device=torch.device("cpu"), autocast=False,
    )  # fmt: skip


def expected_metrics(folder: Path, detector: Detector, **changes: Any) -> dict[str, float]:
    images = images_of(folder)
    return score(images.index, rows_of(images, detector, **changes))


def assert_scores(report: dict[str, Any], expected: dict[str, float]) -> None:
    found = {f"val/{name}": value for name, value in report["metrics"].items()}
    known = {name: value for name, value in report["classes"].items() if value is not None}
    assert found | {f"val_class/{name}": value for name, value in known.items()} == expected


def test_scores_and_files(data: Path, model: Path, tmp_path: Path) -> None:
    done = evaluate(model, figures=True)
    assert (done.code, done.report["status"], done.report["step"]) == (0, "finished", 7)
    assert_scores(done.report, expected_metrics(data, detector_of(6)))
    assert 0.1 < done.report["metrics"]["AP"] < 1
    folder = tmp_path / "runs" / "evaluations" / "a-run-x-step7-val"
    assert Path(done.report["output"]) == folder
    assert json.loads((folder / "metrics.json").read_text()) == done.report
    names = {path.name for path in (folder / "figures").iterdir()}
    assert names == {
        "precision_recall.png", "class_ap.png", "confusion.png", "error_kinds.png",
        "calibration.png", "anchor_recall.png", "images.png", "images_best.png", "images_worst.png",
    }  # fmt: skip
    assert all(np.asarray(Image.open(folder / "figures" / name)).std() > 5 for name in names)
    assert not list(folder.glob("*.partial"))


def test_detections_are_cocos_with_the_datasets_ids(data: Path, model: Path) -> None:
    document = document_of(data)
    moved = {image["id"]: 1000 - 3 * image["id"] for image in document["images"]}
    for image in document["images"]:
        image["id"] = moved[image["id"]]
    for box in document["annotations"]:
        box["image_id"] = moved[box["image_id"]]
    (data / "annotations" / "instances_val.json").write_text(json.dumps(document))
    done = evaluate(model, "--output", "out")
    rows = json.loads(Path("out/detections.json").read_text())
    assert len(rows) == done.report["detections"] > 0
    assert {row["image_id"] for row in rows} <= set(moved.values())
    assert {row["category_id"] for row in rows} <= {one["id"] for one in document["categories"]}
    index = parse_coco(json.dumps(document).encode(), "val")
    position = {int(i): p for p, i in enumerate(index.image_ids)}
    label = {i: k for k, i in enumerate(index.classes.category_ids)}
    again = np.array(
        [[position[r["image_id"]], *r["bbox"], r["score"], label[r["category_id"]]] for r in rows]
    )
    assert again.shape[1] == COLUMNS
    assert_scores(done.report, score(index, again))
    assert not Path("out/figures").exists()


def test_settings_win_over_the_runs(data: Path, model: Path) -> None:
    done = evaluate(model, "--nms", "hard", "--detections", 9,
                    "--set", "evaluation.iou=0.3")  # fmt: skip
    expected = expected_metrics(data, detector_of(6), nms="hard", detections=9, iou=0.3)
    assert_scores(done.report, expected)
    assert done.report["evaluation"]["nms"] == "hard"


def test_the_training_images_and_a_given_annotation_file(data: Path, model: Path) -> None:
    by_split = evaluate(model, "--split", "train").report
    assert (by_split["data"]["split"], by_split["data"]["images"]) == ("train", 8)
    by_path = evaluate(
        model,
        "--set", f"data.val.annotations={data}/annotations/instances_train.json",
        "--set", f"data.val.images={data}/images/train",
    ).report  # fmt: skip
    assert by_path["metrics"] == by_split["metrics"]
    assert by_path["data"]["digest"] == by_split["data"]["digest"]


def test_without_validation_data_the_training_images_are_taken_and_said(
    data: Path, model: Path
) -> None:
    (data / "annotations" / "instances_val.json").unlink()
    request, options = parse_evaluate("", [str(model), "--no-figures", "--threads-per-worker", "1"])
    out = io.StringIO()
    assert run_evaluate_job(request, options, out).report["data"]["split"] == "train"
    assert "evaluating on the TRAINING images" in out.getvalue()
    assert "annotations/*val*.json" in refused(model, "--split", "val")


def test_an_effdet_file_scores_as_the_checkpoint_it_came_from(
    data: Path, model: Path, tmp_path: Path
) -> None:
    detector = detector_of(6)
    torch.save(to_effdet(detector.state_dict(), detector.spec), tmp_path / "weights.pth")
    same = ["--data", data, "--detections", 30, "--batch-size", 3]
    from_file = evaluate(tmp_path / "weights.pth", *SETTINGS, *same).report
    assert from_file["metrics"] == evaluate(model, *same).report["metrics"]
    assert (from_file["step"], from_file["metrics"]["AP"] > 0.1) == (None, True)
    said = refused(tmp_path / "weights.pth", "--data", data, "--phi", 1)
    assert said.startswith(f"MODEL {tmp_path}/weights.pth: expected the weights of EfficientDet-D1")


def test_cocos_ninety_outputs_are_cut_to_the_classes_by_name(data: Path, tmp_path: Path) -> None:
    detector = detector_of(90)
    torch.save(to_effdet(detector.state_dict(), detector.spec), tmp_path / "coco.pth")
    said = refused(tmp_path / "coco.pth", *SETTINGS, "--data", data)
    assert "without 'circle', 'square', 'triangle', 'star', 'cross' and 1 more" in said
    assert "it knows 'person'" in said
    document = document_of(data)
    for category, name in zip(document["categories"], list(COCO_NAMES.values())[3:], strict=False):
        category["name"] = name
    (data / "annotations" / "instances_val.json").write_text(json.dumps(document))
    report = evaluate(
        tmp_path / "coco.pth", *SETTINGS, "--data", data, "--batch-size", 3,
        "--detections", 30,
    ).report  # fmt: skip
    ids = [k - 1 for k, name in COCO_NAMES.items() if name in list(COCO_NAMES.values())[3:9]]
    cut = detector_of(6)
    state = detector.state_dict()
    for part in ("weight", "bias"):
        key = f"class_head.predict.pointwise.{part}"
        state[key] = state[key].unflatten(0, (9, 90))[:, ids].flatten(0, 1)
    cut.load_state_dict(state)
    assert_scores(report, expected_metrics(data, cut))


def test_classes_in_another_order_are_matched_by_name(data: Path, tmp_path: Path) -> None:
    theirs = classes_of(data)
    turned = ClassMap((1, 2, 3, 4, 5, 6, 7), ("extra", *reversed(theirs.names)))
    model = checkpoint(tmp_path / "turned", data, classes=turned)
    rows = [7 - 1 - k for k in range(6)]
    cut, whole = detector_of(6), detector_of(7).state_dict()
    for part in ("weight", "bias"):
        key = f"class_head.predict.pointwise.{part}"
        whole[key] = whole[key].unflatten(0, (9, 7))[:, rows].flatten(0, 1)
    cut.load_state_dict(whole)
    report = evaluate(model).report
    assert_scores(report, expected_metrics(data, cut))


def test_a_model_that_lacks_classes_is_refused_until_they_are_left_out(
    data: Path, tmp_path: Path
) -> None:
    theirs = classes_of(data)
    few = ClassMap(theirs.category_ids[:2], theirs.names[:2])
    model = checkpoint(tmp_path / "few", data, classes=few)
    said = refused(model)
    assert "a model of the 6 classes of instances_val.json" in said
    assert "one without 'triangle', 'star', 'cross', 'ring' (it knows 'circle', 'square')" in said
    report = evaluate(model, "--set", "data.classes=[square,circle]").report
    assert set(report["classes"]) == {"circle", "square"}


def test_more_views(model: Path) -> None:
    plain = evaluate(model).report
    more = evaluate(model, "--flip", "--scales", "1,2").report
    assert (more["flip"], more["scales"]) == (True, [1.0, 2.0])
    assert more["metrics"] != plain["metrics"]
    assert evaluate(model, "--scales", "1").report["metrics"] == plain["metrics"]


def test_a_level_of_one_cell_at_other_sizes_is_pointed_out(model: Path) -> None:
    for scales, said in (("1", False), ("1,2", True)):
        request, options = parse_evaluate("", [str(model), "--no-figures", "--scales", scales])
        out = io.StringIO()
        run_evaluate_job(request, options, out)
        assert ("level P6 is one cell at the 64 px" in out.getvalue()) == said


def test_two_models(data: Path, model: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", data, seed=9)
    request, options = parse_evaluate(
        "",
        [
            str(model),
            "--against",
            str(other),
            "--resamples",
            "20",
            "--threads-per-worker",
            "1",
            "--no-figures",
        ],
    )
    out = io.StringIO()
    report = run_evaluate_job(request, options, out).report
    a, b = (expected_metrics(data, detector_of(6, seed)) for seed in (4, 9))
    assert_scores(report, a)
    assert_scores(report["against"], b)
    told = report["comparison"]["metrics"]["AP"]
    assert told["difference"] == pytest.approx(a["val/AP"] - b["val/AP"], abs=1e-9)
    assert told["low"] <= told["high"]
    assert "too few images to tell" in report["comparison"]["verdict"]
    assert "too few images to tell" in out.getvalue()
    written = {path.name for path in Path(report["output"]).glob("*.json")}
    assert written == {"metrics.json", "detections.json", "detections_against.json"}


def test_a_model_against_itself(model: Path) -> None:
    found = evaluate(model, "--against", model, "--resamples", 20).report
    for one in found["comparison"]["metrics"].values():
        assert (one["difference"], one["low"], one["high"], one["better"]) == (0, 0, 0, None)


def test_a_damaged_image_is_said_and_counts_as_empty(data: Path, model: Path) -> None:
    (data / "images" / "val" / document_of(data)["images"][2]["file_name"]).write_bytes(b"x")
    out = io.StringIO()
    request, options = parse_evaluate("", [str(model), "--no-figures", "--threads-per-worker", "1"])
    assert run_evaluate_job(request, options, out).report["data"]["damaged"] == 1
    assert "1 could not be read" in out.getvalue()
    assert "expected a readable image" in refused(model, "--set", "data.damaged=fail")


def test_without_one_readable_image_there_is_no_score(data: Path, model: Path) -> None:
    for path in (data / "images" / "val").iterdir():
        path.write_bytes(b"x")
    said = refused(model, "--set", "data.check=none")
    assert "data.root: expected images that can be read, got none of 4 below" in said
    assert not list(Path("runs/evaluations").rglob("metrics.json"))


def planned(model: Path, threads: int = 1) -> Plan:
    given = [str(model), "--no-figures", "--threads-per-worker", str(threads)]
    return make_plan(parse_evaluate("", given)[0])


def test_a_node_without_the_images_is_said(data: Path, model: Path) -> None:
    """Each of them would count as empty."""
    plan = planned(model)
    make = MakeExaminer(plan.models[0], plan.views[0], plan.images, plan.job, cpu_only=True)
    shutil.rmtree(data / "images" / "val")
    with pytest.raises(ConfigError, match=r"data\.root: expected images that every node reaches"):
        make()


def test_work_ends_with_its_caller(model: Path) -> None:
    class Broken(Pace):
        def add(self, images: int) -> None:
            raise KeyboardInterrupt

    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        look(planned(model, threads=before + 1), 0, Broken(4, "", io.StringIO()))
    assert torch.get_num_threads() == before


def test_nothing_of_an_evaluation_before_stays(data: Path, model: Path) -> None:
    first = evaluate(model, "--against", model, "--resamples", 2, "--output", "o", figures=True)
    mine = Path("o/figures/notes.txt")
    mine.write_text("")
    assert first.code == 0
    assert len(list(Path("o").rglob("*.*"))) > 5
    evaluate(model, "--output", "o")
    left = set(Path("o").rglob("*.*"))
    assert left == {Path("o/metrics.json"), Path("o/detections.json"), mine}


def no_boxes(document: dict[str, Any]) -> None:
    document["annotations"] = []


def crowds_only(document: dict[str, Any]) -> None:
    for box in document["annotations"]:
        box["iscrowd"] = 1


def no_images(document: dict[str, Any]) -> None:
    document["images"], document["annotations"] = [], []


def one_missing(document: dict[str, Any]) -> None:
    document["images"][0]["file_name"] = "gone.jpg"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_boxes, "at least one box to find, got none"),
        (crowds_only, "crowds only"),
        (no_images, "at least one image, got none"),
        (one_missing, "gone.jpg"),
    ],
)
def test_data_that_cannot_be_scored(data: Path, model: Path, spoil: Any, message: str) -> None:
    document = document_of(data)
    spoil(document)
    (data / "annotations" / "instances_val.json").write_text(json.dumps(document))
    assert message in refused(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "--phi", "1"], "model.phi: expected no network to be named beside a checkpoint"),
        (["{model}", "--output", "taken"], "--output: expected a place to write"),
        (["{model}", "--data", "nowhere"], "data.root: expected a folder, got none at"),
        (["{model}", "--score", "1.5"], "evaluation.score: expected 0 <= score < 1"),
        (["{model}", "--set", "evaluation.sigma=0"], "evaluation.sigma: expected more than 0"),
        (["{model}", "--set", "evaluation.sygma=1"], "did you mean 'sigma'?"),
        (["{model}", "--nms", "sotf"], "did you mean 'soft'?"),
        (["{model}", "--workers", "-1"], "--workers: expected at least 0"),
        (["{model}", "--scales", "1,1.01"], "--scales: expected different multiples of 64 px"),
        (["nowhere/step_1"], "MODEL: expected a path, a URI or a name that effdet published"),
        (["{model}/.."], "MODEL: expected a checkpoint folder with meta.json"),
        (["tf_efficientdet_d1", "--phi", "0"], "--phi: expected 1, as tf_efficientdet_d1 has"),
        (["efficientdet_d2"], "MODEL efficientdet_d2: expected a model with released weights"),
        (["junk.pth", "--data", "data"], "MODEL junk.pth: expected a weight file"),
        (["{model}", "--against", "gone"], "MODEL: expected a path"),
    ],
)  # fmt: skip
def test_refusals(
    data: Path, model: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("taken").write_text("a file")
    Path("junk.pth").write_bytes(b"junk")
    from orchestrator.storage import weights

    if arguments[0] == "tf_efficientdet_d1":  # never fetched
        monkeypatch.setattr(weights, "download", lambda name: Path("junk.pth"))
    assert message in refused(*(one.format(model=model) for one in arguments))
    assert not Path("runs/evaluations").exists()


def test_a_checkpoint_of_something_else(tmp_path: Path, write: Any) -> None:
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    write(1)(folder)
    assert "expected a detector's config.json" in refused(folder)
    (folder / "ema.safetensors").write_bytes(b"cut")
    assert "bytes of ema.safetensors" in refused(folder)
