"""Hooks of mkdocs: what a page links to outside docs/ is named, not linked, in the site, which has no such
file (on a code host the same link works as it is); and nothing that a page loads lies elsewhere.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)\)")
ELSEWHERE = re.compile(r"""<(script|link|img|iframe|source)\b[^>]*\s(src|href)=["']?(https?:)?//[^>]*>""")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page's text with such links as names of files."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def named(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        return found[0] if target.startswith("docs/") else f"{found[1]} (`{target}`)"

    return LINK.sub(named, markdown)


def on_post_build(config: Any, **_: Any) -> None:
    """Refuse a site whose pages load anything from elsewhere."""
    for file in Path(config.site_dir).rglob("*.html"):
        if found := ELSEWHERE.search(file.read_text(encoding="utf-8")):
            raise PluginError(f"{file} loads what lies elsewhere: {found[0]}")
