"""Weights in: our checkpoints and effdet's files, whatever classes they were made for."""

from __future__ import annotations

import functools
import hashlib
import http.server
import pickle
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from effdet import EfficientDet
from effdet.config import get_efficientdet_config
from helpers.peer import flat, randomise
from safetensors.torch import save_file
from torch import Tensor

from model.data.coco_classes import COCO_NAMES
from model.data.index import ClassMap
from model.errors import CheckpointError, ConfigError
from model.network import effdet_format
from model.network.detector import Detector
from model.network.effdet_format import PUBLISHED, Published, download
from model.network.scaling import ModelConfig, resolve
from model.training.initial import load_initial
from model.training.state import Progress, network_config, write_checkpoint

COCO = ClassMap(tuple(COCO_NAMES), tuple(COCO_NAMES.values()))
MODEL = ModelConfig(
    backbone="test_efficientnet", fpn_channels=16, fpn_repeats=1, head_layers=1, image_size_px=128
)


def classes(*names: str) -> ClassMap:
    return ClassMap(tuple(range(1, len(names) + 1)), names)


def detector(num_classes: int, **changes: Any) -> Detector:
    torch.manual_seed(9)
    return Detector(resolve(replace(MODEL, **changes), num_classes)).eval()


@pytest.fixture(scope="module")
def peer() -> EfficientDet:
    """With 90 outputs, for COCO's category ids."""
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.update(
        backbone_name="test_efficientnet", backbone_args={}, image_size=(128, 128),
        fpn_channels=16, fpn_cell_repeats=1, box_class_repeats=1,
    )  # fmt: skip
    network = EfficientDet(config, pretrained_backbone=False).eval()
    for module in network.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3  # theirs comes with the tf_ backbones' arguments
    randomise(network)
    return network


def outputs(network: Detector) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        found: tuple[Tensor, Tensor] = network(torch.randint(0, 256, (1, 3, 128, 128)))
    return found


def peer_outputs(network: EfficientDet, ours: Detector) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        levels = network(ours.normalise(torch.randint(0, 256, (1, 3, 128, 128))))
    return flat(levels[0], 90), flat(levels[1], 4)


def wrapped(state: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
    if kind == "plain":
        return dict(state)
    if kind == "bench":  # of effdet's training bench, which also stores its anchors
        return {f"model.{k}": v for k, v in state.items()} | {"anchors.boxes": torch.zeros(9, 4)}
    zeros = {k: torch.zeros_like(v) for k, v in state.items()}
    if kind == "training":
        return {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    return {"state_dict": zeros, "state_dict_ema": dict(state)}


@pytest.mark.parametrize("kind", ["plain", "bench", "training", "average", "safetensors"])
def test_an_effdet_file_of_90_outputs_serves_cocos_80_categories(
    peer: EfficientDet, tmp_path: Path, kind: str
) -> None:
    """Output k is the peer's output for category id k + 1, gaps left out; boxes are the same."""
    path = tmp_path / f"peer.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(peer.state_dict(), path)
    else:
        torch.save(wrapped(peer.state_dict(), kind), path)
    ours = detector(80)
    notes = load_initial(ours, path, COCO)
    assert "class predictor: 80 of 90 classes kept by name" in notes
    found, expected = outputs(ours), peer_outputs(peer, ours)
    rows = torch.tensor(COCO.category_ids) - 1
    torch.testing.assert_close(found[0], expected[0][..., rows], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4)


def test_classes_that_coco_does_not_have_start_anew(peer: EfficientDet, tmp_path: Path) -> None:
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    ours = detector(2)
    before = ours.class_head.predict.pointwise.weight.clone()
    notes = load_initial(ours, tmp_path / "peer.pth", classes("person", "forklift"))
    assert "class predictor starts anew: 90 classes there, 2 here" in notes
    assert torch.equal(ours.class_head.predict.pointwise.weight, before)
    mine, theirs = outputs(ours)[1], peer_outputs(peer, ours)[1]
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def checkpoint(folder: Path, network: Detector, of: ClassMap) -> Path:
    """Its plain weights are zeros: the average is what counts."""
    folder.mkdir()
    state = network.state_dict()
    write_checkpoint(
        folder,
        model={key: torch.zeros_like(value) for key, value in state.items()},
        ema=state,
        progress=Progress(1, {}, torch.zeros(6)),
        config={"network": network_config(network.spec)},
        classes=of,
        metrics={},
    )
    return folder


def test_a_checkpoint_of_ours(tmp_path: Path) -> None:
    source = detector(3)
    randomise(source)
    folder = checkpoint(tmp_path / "step_00000001", source, classes("cat", "dog", "cow"))
    same, other, fewer = detector(3), detector(4), detector(2)
    load_initial(same, folder, classes("cat", "dog", "cow"))
    notes = load_initial(other, folder, classes("cat", "dog", "cow", "emu"))
    assert "class predictor starts anew: 3 classes there, 4 here" in notes
    assert "class predictor: 2 of 3 classes kept by name" in load_initial(
        fewer, folder, classes("cow", "cat")
    )
    logits = outputs(source)[0]
    assert torch.equal(outputs(same)[0], logits)
    torch.testing.assert_close(outputs(fewer)[0], logits[..., [2, 0]])


def test_other_anchors_keep_the_towers(tmp_path: Path) -> None:
    source = detector(3)
    folder = checkpoint(tmp_path / "step_00000001", source, classes("a", "b", "c"))
    ours = detector(3, anchor_octaves=2)
    notes = load_initial(ours, folder, classes("a", "b", "c"))
    assert "box predictor starts anew: other anchors" in notes
    assert "class predictor starts anew: other anchors" in notes
    assert torch.equal(
        ours.box_head.predict.depthwise.weight, source.box_head.predict.depthwise.weight
    )


@pytest.mark.parametrize(
    "changes", [{"fpn_channels": 24}, {"fpn_repeats": 2}, {"head_layers": 2}, {"fusion": "sum"}]
)
def test_weights_of_another_network_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Nothing is loaded by halves: neither too many tensors nor too few."""
    for number, (mine, theirs) in enumerate((({}, changes), (changes, {}))):
        source = detector(3, **theirs)
        folder = checkpoint(tmp_path / f"step_0000000{number}", source, classes("a", "b", "c"))
        with pytest.raises(ConfigError, match=r"model\.init: expected the weights of Eff"):
            load_initial(detector(3, **mine), folder, classes("a", "b", "c"))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/should-not-exist"),)


def test_files_that_are_refused(tmp_path: Path) -> None:
    evil, text, empty = tmp_path / "evil.pth", tmp_path / "text.pth", tmp_path / "folder"
    torch.save({"state_dict": Payload()}, evil)
    text.write_text("not weights")
    empty.mkdir()
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Payload()))
    for path in (evil, text, tmp_path / "pickle.pth", tmp_path / "missing.pth", empty):
        with pytest.raises(ConfigError) as caught:
            load_initial(detector(3), path, classes("a", "b", "c"))
        assert "\n" not in str(caught.value)
    assert not Path("/tmp/should-not-exist").exists()


def test_a_run_instead_of_a_checkpoint_names_the_newest(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint(tmp_path / f"step_0000000{step}", detector(1), classes("a"))
    with pytest.raises(ConfigError, match="such as step_00000002"):
        load_initial(detector(1), tmp_path, classes("a"))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "step_00000001", detector(1), classes("a"))
    with (folder / "ema.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match="changed bytes"):
        load_initial(detector(1), folder, classes("a"))


@pytest.fixture
def releases(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A release page on this machine: its address and its folder."""
    folder = tmp_path / "releases"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/", folder
    server.shutdown()


def test_published_weights_are_fetched_once_and_checked(
    releases: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, page = releases
    content = b"weights of a detector"
    name = f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (page / name).write_bytes(content)
    monkeypatch.setitem(PUBLISHED, "tiny", Published("0", "tf", name))
    cache = tmp_path / "cache"
    path = download("tiny", releases=address, folder=cache)
    assert path.read_bytes() == content
    (page / name).unlink()
    assert download("tiny", releases=address, folder=cache) == path
    path.write_bytes(b"cut")
    with pytest.raises(ConfigError, match="404"):
        download("tiny", releases=address, folder=cache)
    (page / name).write_bytes(b"other")
    with pytest.raises(ConfigError, match="invalid hash"):
        download("tiny", releases=address, folder=cache)


def test_published_weights_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        download("tf_efficientdet_d0", releases="http://127.0.0.1:9/", folder=tmp_path)
    assert "put tf_efficientdet_d0_34-f153e0cf.pth into" in caught.value.remedy
    with pytest.raises(ConfigError, match="there are tf_efficientdet_d2's"):
        download("efficientdet_d2", folder=tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'tf_efficientdet_d0'"):
        download("tf_eficientdet_d0", folder=tmp_path)


def test_the_release_page_is_effdets_own() -> None:
    for name, published in PUBLISHED.items():
        theirs = get_efficientdet_config(name)
        expected = effdet_format.RELEASES + published.file if published.file else ""
        assert theirs.url == expected
        spec = resolve(ModelConfig(phi=published.phi, variant=published.variant), 90)
        assert theirs.backbone_name == spec.backbone
        assert (theirs.pad_type == "same") == (spec.padding == "same")
        assert theirs.redundant_bias == spec.redundant_bias
        assert theirs.image_size[0] == spec.image_size_px
