"""The site as it is built: strictly, whole, and without a dead link."""

from __future__ import annotations

import ast
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from helpers import ROOT, environment

from docs.building import api_pages
from docs.building.settings_page import settings

pytestmark = pytest.mark.integration
BUILD_S = 400


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does, elsewhere."""
    base = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-d", str(base / "trees"),
         str(ROOT / "docs"), str(base / "html")],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=BUILD_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stderr == ""
    return base / "html"


class Links(HTMLParser):
    """What a page links to and shows, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif (tag, name) in (
                ("a", "href"),
                ("img", "src"),
                ("link", "href"),
                ("script", "src"),
            ):
                self.targets.append(value or "")


def test_no_link_is_dead(site: Path) -> None:
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 30
    dead = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or target in ("", "#"):
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[there].anchors if there in pages else set()
            if not there.exists() or (
                parts.fragment and there in pages and unquote(parts.fragment) not in anchors
            ):
                dead.append(f"{path.relative_to(site)}: {target}")
    assert dead == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """The pages work where there is no network."""
    for path in site.rglob("*.html"):
        for target in Links(path.read_text()).targets:
            if target.endswith((".js", ".css", ".png", ".svg", ".woff2")):
                assert not urlsplit(target).netloc, (path, target)


def test_each_job_has_a_page(site: Path) -> None:
    scripts = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"bootstrap"}
    folder = site / "generated" / "commands"
    assert {path.stem for path in folder.glob("*.html")} == scripts | {"index"}
    for script in scripts:
        text = (folder / f"{script}.html").read_text()
        assert f"usage: jobs/{script}.py" in text
        assert "--json" in text


def test_each_setting_is_shown(site: Path) -> None:
    anchors = Links((site / "generated" / "settings.html").read_text()).anchors
    wanted = {setting.path.replace(".", "-").replace("_", "-") for setting in settings()}
    assert len(wanted) > 90
    assert wanted <= anchors


def test_what_is_public_is_in_the_reference(site: Path) -> None:
    folder = site / "generated" / "api"
    there = {path.stem: Links(path.read_text()).anchors for path in folder.glob("*.html")}
    names = [name for package in api_pages.PACKAGES for name in api_pages.modules(package)]
    assert len(names) > 100
    for name in names:
        page = there[name.rpartition(".")[0]]
        tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())
        missing = {f"{name}.{thing}" for _, thing in api_pages.public(tree)} - page
        assert missing == set()
    assert "model.training.runtime.Runtime.restore" in there["model.training"]
    text = (folder / "model.training.html").read_text()
    assert "The newest committed checkpoint as a local folder" in text


def test_the_picture_follows_the_theme(site: Path) -> None:
    """It stands in the page itself: the page's colours, light or dark, are its own."""
    text = (site / "architecture.html").read_text()
    assert text.count('<svg class="architecture"') == 1
    assert "var(--color-foreground-primary" in text
