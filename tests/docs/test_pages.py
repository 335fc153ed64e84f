"""What the pages say against the program: messages, settings, sizes, and docstrings made into pages."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import get_type_hints

import pytest
from helpers import ROOT

from docs.building import docstrings, settings_page
from docs.building.message_page import ANYTHING, Message, messages
from docs.building.settings_page import ALSO, settings
from model.network.footprint import network_cost
from model.network.scaling import PHI_TABLE, ModelConfig, resolve
from orchestrator import errors
from orchestrator.config.cli import TRAIN_FLAGS
from orchestrator.config.codec import decode, nest
from orchestrator.config.schema import TrainJob

DOCS = ROOT / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text()
SHAPES = [shape for shape in re.findall(r"`([^`\n]+)`", PAGE) if ": expected " in shape]


def explains(shape: str, message: Message) -> bool:
    """Whether a shape of the page is that message's; … stands for anything, and the end is open."""
    pattern = ".+".join(map(re.escape, shape.removesuffix(ANYTHING).rstrip().split(ANYTHING)))
    return re.match(pattern, message.asked) is not None


@pytest.mark.parametrize("message", messages(), ids=str)
def test_each_message_is_explained(message: Message) -> None:
    assert any(explains(shape, message) for shape in SHAPES), (
        f"docs/troubleshooting.md has no entry for\n  {message}\n  ({message.file})"
    )


def test_no_shape_explains_everything() -> None:
    for shape in SHAPES:
        assert len(shape.replace(ANYTHING, "").replace(": expected ", "").strip()) >= 2, shape
    assert not any(explains(shape, Message("", "", ("?", "?", "", ""))) for shape in SHAPES)


def test_each_shape_is_of_a_message_that_there_is() -> None:
    """An entry about a line that the program no longer says is found."""
    known = messages()
    stale = [shape for shape in SHAPES if not any(explains(shape, one) for one in known)]
    assert [shape for shape in stale if not shape.startswith("error: ")] == []


def test_each_kind_of_error_is_named() -> None:
    kinds = set(errors.__all__) - {"nearest", "UserError"}
    listed = dict(re.findall(r"^\| `(\w+Error)` \| (.*) \|$", PAGE, re.MULTILINE))
    assert set(listed) == kinds
    for name, says in listed.items():
        assert len(says) > 20, name


def test_sections_that_are_linked_in_a_page_exist() -> None:
    for path in DOCS.glob("*.md"):
        text = path.read_text()
        titles = {
            re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        } | set(re.findall(r"^\((\w+)\)=$", text, re.MULTILINE))
        assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= titles, path.name


def test_every_setting_says_what_it_is() -> None:
    found = list(settings())
    assert [one.path for one in found if len(one.meaning) < 5] == []
    for flag in TRAIN_FLAGS:
        (setting,) = [one for one in found if one.path == flag.path]
        assert flag.name in setting.flags


def test_a_settings_default_is_what_the_program_takes() -> None:
    """Each, written as the page has it, gives the configuration that nobody changed."""
    import yaml

    for setting in settings():
        mapping = nest(setting.path, yaml.safe_load(setting.default))
        assert decode(TrainJob, mapping) == TrainJob(), setting


def test_what_is_said_beside_the_dataclasses_is_needed() -> None:
    paths = {setting.path for setting in settings()}
    assert set(ALSO) <= paths
    sections = get_type_hints(TrainJob)
    for path in ALSO:
        owner, *rest = path.split(".")
        cls = sections[owner]
        for name in rest[:-1]:
            cls = get_type_hints(cls)[name]
        assert rest[-1] not in docstrings.fields_explained(cls), f"{path}: its dataclass says it"


def test_settings_that_pages_name_exist() -> None:
    """`train.bn_group`, `checkpoint.keep_latest=3`: in prose and in commands."""
    sections = "|".join(get_type_hints(TrainJob))
    paths = {setting.path for setting in settings()}
    known = paths | {".".join(path.split(".")[:n]) for path in paths for n in (1, 2)}
    for path in DOCS.glob("*.md"):
        if path.name == "sweeps.md":  # whose paths test_sweeps_page decodes
            continue
        for named in re.findall(rf"`(?:--set )?((?:{sections})\.[a-z_.]+)[=`]", path.read_text()):
            assert named in known or named.endswith((".py", ".yaml", ".txt")), (path.name, named)


def test_figures_that_are_named_are_drawn() -> None:
    page = (DOCS / "own-dataset.md").read_text()
    drawn = (ROOT / "orchestrator" / "records" / "exhibits.py").read_text()
    named = re.findall(r"^\| `(\w+)\.png` \|", page, re.MULTILINE)
    assert len(named) >= 4
    assert [name for name in named if f'"{name}"' not in drawn] == []


def row(text: str, phi: str) -> list[str]:
    (found,) = re.findall(rf"^\| {phi} \|(.*)\|$", text, re.MULTILINE)
    return [cell.strip() for cell in found.split("|")]


@pytest.mark.parametrize("phi", list(PHI_TABLE))
def test_sizes_are_those_of_the_networks(phi: str) -> None:
    """Memory is what k8s/README.md has, which a test there holds to preflight's estimate."""
    cells = row((DOCS / "choosing-phi.md").read_text(), phi)
    pixels, params, gmacs, each, again, fixed, small, large, checkpoint = cells
    cost = network_cost(resolve(ModelConfig(phi=phi), 90))  # type: ignore[arg-type]
    assert int(pixels) == PHI_TABLE[phi].image_size_px
    assert float(params.removesuffix(" M")) == round(cost.params / 1e6, 1)
    assert float(gmacs) == round(cost.gmacs, 1)
    theirs = row((ROOT / "k8s" / "README.md").read_text(), phi)
    assert [fixed, each, again] == theirs[:3]
    assert [small, large] == [cell.split(" ")[0] for cell in theirs[4:6]]
    assert checkpoint == theirs[-1]


def test_the_seam_is_described_call_by_call() -> None:
    from model.training.runtime import Runtime

    text = (DOCS / "architecture.md").read_text()
    calls = {name for name in vars(Runtime) if not name.startswith("_")}
    assert set(re.findall(r"^\| `(\w+)\(", text, re.MULTILINE)) == calls
    picture = ET.parse(DOCS / "images" / "architecture.svg").getroot()
    words = " ".join("".join(one.itertext()) for one in picture.iter() if one.tag.endswith("text"))
    assert calls <= set(re.findall(r"\w+", words))
    for package in ("model", "orchestrator"):
        for folder in re.findall(rf"`{package}/(\w+)/`", text):
            assert (ROOT / package / folder).is_dir(), folder


@pytest.mark.parametrize(
    ("text", "names", "shown"),
    [
        ("Plain: a * b ** c_ and |x|.", [], r"Plain: a \* b \*\* c\_ and \|x\|."),
        ("Takes `a`s.", [], "Takes \\ ``a``\\ s."),
        ("1. is no list", [], "\\ 1. is no list"),
        ("All of it. size: in px; name: what for.", ["size", "name"],
         "All of it.\n\n``size``\n    in px\n``name``\n    what for."),
        ("Do.\n\nRaises:\n    ConfigError: not\n        so.\n    DataError", [],
         "Do.\n\n**Raises**\n\n``ConfigError``\n    not so.\n\n``DataError``"),
    ],
)  # fmt: skip
def test_a_docstring_is_shown_as_it_was_meant(text: str, names: list[str], shown: str) -> None:
    lines = "\n".join(docstrings.to_rst(text.splitlines(), names))
    assert re.sub(r"\n{3,}", "\n\n", lines).strip() == shown


def test_the_page_of_settings_reads_well() -> None:
    text = settings_page.page()
    assert (
        "[`train.batch_size`]{#train-batch-size} — whole number, default `16`, `--batch-size`"
        in text
    )
    assert ": images of one step over ALL workers." in text
