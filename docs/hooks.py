"""Makes the site of files from all over the repository, under their paths in it.

So a link works alike in the site, in an editor and where the repository is browsed.
"""

import pathlib
import posixpath
import re
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_NOT_SHOWN = ("docs/hooks.py", "docs/requirements.in", "docs/requirements.txt")

# A link to a file of the repository.
_LINK = re.compile(r"\]\((?P<path>[\w./-]+)(#[\w-]+)?\)")

# A link whose text is the name of the file.
_LINK_BY_NAME = re.compile(r"\[(?P<name>[\w./]+\.md)\](?=\((?P<path>[\w./]+\.md)(#[\w-]+)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Names the files of docs/ by their paths in the repository; adds other pages, and what pages link to."""
    root = pathlib.Path(config.config_file_path).parent
    for file in list(files):
        if pathlib.Path(file.src_dir or "") == root / "docs":
            files.remove(file)
            if f"docs/{file.src_uri}" not in _NOT_SHOWN and "__pycache__" not in file.src_uri:
                _add(files, config, f"docs/{file.src_uri}")
    for page in (path for path, _ in _titles(config.nav)):
        _add(files, config, page)
        text = (root / page).read_text() if (root / page).exists() else ""
        for link in _LINK.finditer(text):
            _add(files, config, _target(page, link))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Has links say the title of a page where they say the name of its file."""
    titles = dict(_titles(config.nav))

    def title(link: re.Match) -> str:
        return f"[{titles.get(_target(page.file.src_uri, link), link['name'])}]"

    return _LINK_BY_NAME.sub(title, markdown)


def _add(files: Files, config: MkDocsConfig, path: str) -> None:
    """Adds a file by its path in the repository, if it is there. In the site docs/ is the root."""
    root = pathlib.Path(config.config_file_path).parent
    if path.startswith("../") or not (root / path).is_file() or files.get_file_from_path(path):
        return
    in_site = File(path.removeprefix("docs/"), str(root), config.site_dir, config.use_directory_urls)
    files.append(File(path, str(root), config.site_dir, config.use_directory_urls, dest_uri=in_site.dest_uri))


def _target(page: str, link: re.Match) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link["path"]))


def _titles(nav: list[dict]) -> Iterator[tuple[str, str]]:
    """Yields path and title of each page."""
    for entry in nav:
        for title, content in entry.items():
            if isinstance(content, str):
                yield content, title
            else:
                yield from _titles(content)
