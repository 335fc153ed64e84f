"""How the site is built: sphinx-build -W -n --keep-going docs docs/_build (make docs)."""

from __future__ import annotations

import sys
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from docs.building import api_pages, command_pages, message_page, settings_page  # noqa: E402
from docs.building.docstrings import on_docstring  # noqa: E402

project = "EfficientDet on Ray"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "building", "screenshots.py", "images"]
myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 4
nitpicky = True
# Names of other packages are shown, not linked: nothing is fetched to build the site.
nitpick_ignore_regex = [("py:.*", r"(?!(model|orchestrator)\.).*")]
nitpick_ignore = [("py:class", name) for name in api_pages.type_variables()]
autodoc_inherit_docstrings = False  # torch's own would stand at every forward
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries = False
python_use_unqualified_type_names = True
smartquotes = False  # -- of a flag stays two characters

html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
pygments_style = "tango"
pygments_dark_style = "monokai"


def generate(app: Sphinx) -> None:
    """Write the pages that come from the sources; one that is the same is not touched."""
    folder = HERE / "generated"
    pages = {
        "settings.md": settings_page.page(),
        "messages.md": message_page.page(),
        **{f"commands/{name}.md": text for name, text in command_pages.pages().items()},
        **{f"api/{name}.rst": text for name, text in api_pages.pages().items()},
    }
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
    for path in folder.rglob("*.*"):
        if path.relative_to(folder).as_posix() not in pages:
            path.unlink()


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", generate)
    app.connect("autodoc-process-docstring", on_docstring)
    app.add_lexer("mermaid", TextLexer)
