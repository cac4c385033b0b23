"""Hooks of mkdocs.yml: files beside docs/ that the site shows, too, and links to and from them.

Pages link to each other as files of the repository do, so that they work there. The site has docs/
as its root, and what `BESIDE` names under its own path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
#: Patterns of files outside of docs/ that the site has.
BESIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "bench/README.md",
    "bench/results/**/*.md",
    "bench/results/**/*.png",
)
_LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is beside docs/, under its path in the repository."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the page with links that lead out of docs/, or into it, as the site has them."""
    docs = Path(config.docs_dir)
    source = Path(page.file.abs_src_path or "")

    def on_the_site(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve()
        if target.is_relative_to(docs) == source.is_relative_to(docs):
            return match[0]
        root = docs if target.is_relative_to(docs) else ROOT
        uri = target.relative_to(root).as_posix()
        link = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{link}{match[3] or ''}{match[4]}"

    return _LINK.sub(on_the_site, markdown)
