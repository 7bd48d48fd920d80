"""A hook of mkdocs that makes links between files work on the site.

In the repository a page links to `../examples/loop.py`, and readers of the files follow the link.
On the site this file lies unchanged beside the pages; CONTRIBUTING.md and CHANGELOG.md are pages.
A link to a missing file stays unchanged, and mkdocs, which is strict, refuses it. In a file, a bar
within code in a table is escaped; on the site the escape would show, so the hook removes it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Pages of the site that lie at the top of the repository."""

ESCAPED_BAR = re.compile(r"\\\|(?=[^`\n]*`(?:[^`\n]*`[^`\n]*`)*[^`\n]*$)", re.MULTILINE)
"""An escaped bar that is followed by an odd number of backticks on its line."""
LINK = re.compile(r"(?<=\]\()([\w./-]+)(?=(?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of the docs folder."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point every link to its file's place on the site, and add linked files as needed."""
    here = page.file.src_uri
    written = (ROOT if here in OUTSIDE else DOCS) / here

    def led(link: re.Match[str]) -> str:
        target = (written.parent / link[1]).resolve()
        if not target.is_relative_to(ROOT) or not target.is_file():
            return link[1]
        inside = target.is_relative_to(DOCS)
        uri = target.relative_to(DOCS if inside else ROOT).as_posix()
        if not inside and uri not in OUTSIDE:
            uri = f"files/{uri}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(target)))
        return Path(os.path.relpath(uri, Path(here).parent)).as_posix()

    return ESCAPED_BAR.sub("|", LINK.sub(led, markdown))
