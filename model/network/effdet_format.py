"""The names that effdet 0.4 gives to weights, and the weights it published.

Both sides compute the same function, so a file of one is a file of the other under other names.
Source: rwightman/efficientdet-pytorch `efficientdet.py`, `config/model_config.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.errors import ConfigError, nearest
from model.network.scaling import NetworkSpec, Phi, Variant
from model.network.topology import TOPOLOGIES

RELEASES = "https://github.com/rwightman/efficientdet-pytorch/releases/download/v0.1/"


@dataclass(frozen=True)
class Published:
    """One model that effdet names. file: None where no weights were ever released."""

    phi: Phi
    variant: Variant
    file: str | None


PUBLISHED: dict[str, Published] = {
    "tf_efficientdet_d0": Published("0", "tf", "tf_efficientdet_d0_34-f153e0cf.pth"),
    "tf_efficientdet_d1": Published("1", "tf", "tf_efficientdet_d1_40-a30f94af.pth"),
    "tf_efficientdet_d2": Published("2", "tf", "tf_efficientdet_d2_43-8107aa99.pth"),
    "tf_efficientdet_d3": Published("3", "tf", "tf_efficientdet_d3_47-0b525f35.pth"),
    "tf_efficientdet_d4": Published("4", "tf", "tf_efficientdet_d4_49-f56376d9.pth"),
    "tf_efficientdet_d5": Published("5", "tf", "tf_efficientdet_d5_51-c79f9be6.pth"),
    "tf_efficientdet_d6": Published("6", "tf", "tf_efficientdet_d6_52-4eda3773.pth"),
    "tf_efficientdet_d7": Published("7", "tf", "tf_efficientdet_d7_53-6d1d7a95.pth"),
    "tf_efficientdet_d7x": Published("7x", "tf", "tf_efficientdet_d7x-f390b87c.pth"),
    "efficientdet_d0": Published("0", "pytorch", "efficientdet_d0-f3276ba8.pth"),
    "efficientdet_d1": Published("1", "pytorch", "efficientdet_d1-bb7e98fe.pth"),
    "efficientdet_d2": Published("2", "pytorch", None),
    "efficientdet_d3": Published("3", "pytorch", None),
    "efficientdet_d4": Published("4", "pytorch", None),
    "efficientdet_d5": Published("5", "pytorch", None),
}

_BLOCKS = (
    (r"^backbone\.network\.", "backbone."),
    (r"^pyramid\.extra\.0\.", "fpn.resample.3.conv.conv."),
    (r"^pyramid\.extra\.1\.", "fpn.resample.3.conv.bn."),
    (r"^pyramid\.cells\.(\d+)\.nodes\.(\d+)\.", r"fpn.cell.\1.fnode.\2."),
    (r"(fnode\.\d+)\.laterals\.(\d+)\.0\.", r"\1.combine.resample.\2.conv.conv."),
    (r"(fnode\.\d+)\.laterals\.(\d+)\.1\.", r"\1.combine.resample.\2.conv.bn."),
    (r"(fnode\.\d+)\.fuse\.weights$", r"\1.combine.edge_weights"),
    (r"(fnode\.\d+)\.conv\.", r"\1.after_combine.conv."),
    (r"(fnode\.\d+)\.norm\.", r"\1.after_combine.conv.bn."),
    (r"^(class|box)_head\.convs\.", r"\1_net.conv_rep."),
    (r"^(class|box)_head\.norms\.(\d+)\.(\d+)\.", r"\1_net.bn_rep.\2.\3.bn."),
    (r"^(class|box)_head\.predict\.", r"\1_net.predict."),
    (r"\.depthwise\.", ".conv_dw."),
    (r"\.pointwise\.", ".conv_pw."),
)
_WRAPPERS = ("module.", "model.")  # of DistributedDataParallel and of effdet's training bench


def effdet_name(name: str, spec: NetworkSpec) -> str:
    """Our name of a tensor -> effdet's.

    effdet numbers a lateral by the feature it reads, we by its position in the node, so that one
    topology's nodes need no knowledge of another's.
    """
    for pattern, replacement in _BLOCKS:
        name = re.sub(pattern, replacement, name)
    lateral = re.search(r"fnode\.(\d+)\.combine\.resample\.(\d+)\.", name)
    if lateral:
        node = TOPOLOGIES[spec.topology](spec.min_level, spec.max_level).nodes[int(lateral[1])]
        source = node.inputs[int(lateral[2])]
        start, end = lateral.span(2)
        name = f"{name[:start]}{source}{name[end:]}"
    # The first coarse level counts from the finest: one feature more where the pyramid has P2.
    return name.replace("fpn.resample.3.", f"fpn.resample.{6 - spec.min_level}.")


def to_effdet(tensors: Mapping[str, Tensor], spec: NetworkSpec) -> dict[str, Tensor]:
    """A detector's state dict under effdet's names.

    Raises:
        ConfigError: a network that effdet cannot compute.
    """
    if spec.fusion == "unbounded":
        raise ConfigError(
            "model.fusion", "fast, softmax or sum, which effdet knows", "unbounded",
            "keep the checkpoint as it is",
        )  # fmt: skip
    return {effdet_name(name, spec): tensor for name, tensor in tensors.items()}


def from_effdet(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], spec: NetworkSpec
) -> dict[str, Tensor]:
    """effdet's tensors under the names of `ours` (the state dict of a detector of `spec`).

    What has no counterpart keeps its name, so that the caller's comparison shows it.
    """
    names = {effdet_name(name, spec): name for name in ours}
    return {names.get(key, key): tensor for key, tensor in theirs.items()}


def is_effdet(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("class_net.") for name in tensors)


def unwrap(content: Mapping[str, object]) -> dict[str, Tensor]:
    """A weight file's content -> plain tensors: the average where a training checkpoint has one."""
    for key in ("state_dict_ema", "state_dict", "model"):
        inner = content.get(key)
        if isinstance(inner, Mapping):
            content = inner
            break
    tensors = {}
    for name, value in content.items():
        while name.startswith(_WRAPPERS):
            name = name.partition(".")[2]
        if isinstance(value, Tensor) and not name.startswith("anchors."):
            tensors[name] = value
    return tensors


def download(name: str, *, releases: str = RELEASES, folder: Path | None = None) -> Path:
    """The published weight file of `name`, from the cache or the release page; its hash is checked.

    Raises:
        ConfigError: no such name, no weights released, no connection, or another content.
    """
    if name not in PUBLISHED:
        raise ConfigError(
            "model.init", "a path, a URI or a published name", repr(name), nearest(name, PUBLISHED)
        )
    file = PUBLISHED[name].file
    if file is None:
        raise ConfigError(
            "model.init", "a model with released weights", name, f"there are tf_{name}'s"
        )
    folder = folder or Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / file
    expected = file.rpartition("-")[2].removesuffix(".pth")
    if path.is_file() and _sha256(path).startswith(expected):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(
            f"{releases}{file}", str(path), hash_prefix=expected, progress=False
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's word for a wrong hash
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            "model.init", f"the released weights of {name}", f"none could be fetched ({reason})",
            f"connect to the network, or put {file} into {folder}",
        ) from None  # fmt: skip
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
