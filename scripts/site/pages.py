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

ROOT = Path(__file__).resolve().parents[2]
#: Patterns of files outside of docs/ that the site has.
BESIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "bench/README.md",
    "bench/results/**/*.md",
    "bench/results/**/*.png",
    "examples/*.ipynb",
)
#: Elsewhere on the site: a README.md would be the first page of its section.
MOVED = {"bench/README.md": "bench/scripts.md"}
_LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is beside docs/, under its path in the repository."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = _uri(path)
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the page with links that lead out of docs/, or into it, as the site has them."""
    docs = Path(config.docs_dir).resolve()
    source = Path(page.file.abs_src_path or "").resolve()

    def on_the_site(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve()
        inside = target.is_relative_to(docs)
        if (inside and source.is_relative_to(docs)) or not target.is_relative_to(ROOT):
            return match[0]
        uri = target.relative_to(docs).as_posix() if inside else _uri(target)
        link = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{link}{match[3] or ''}{match[4]}"

    return _LINK.sub(on_the_site, markdown)


def _uri(path: Path) -> str:
    """Where a file beside docs/ lies on the site."""
    uri = path.relative_to(ROOT).as_posix()
    return MOVED.get(uri, uri)
