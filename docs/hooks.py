"""Makes the site of files from all over the repository, under their paths in it.

So a link works alike in the site, in an editor and where the repository is browsed.
"""

import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# What is shown or linked besides docs/: pages, pictures and tables. In the site docs/ itself is the root.
_ELSEWHERE = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "results/RESULTS.md",
    "results/*.csv",
    "results/*.png",
    "results/figures/*.png",
    "notebooks/*.ipynb",
)
_NOT_SHOWN = ("docs/hooks.py", "docs/requirements.in", "docs/requirements.txt")

# A link whose text is the name of the file.
_LINK_BY_NAME = re.compile(r"\[(?P<name>[\w./]+\.md)\](?=\((?P<path>[\w./]+\.md)(#[\w-]+)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Names the files of docs/ by their paths in the repository, and adds those that lie elsewhere."""
    root = pathlib.Path(config.config_file_path).parent
    for file in list(files):
        if pathlib.Path(file.src_dir or "") == root / "docs":
            files.remove(file)
            _add(files, config, root, f"docs/{file.src_uri}", file.src_uri)
    for pattern in _ELSEWHERE:
        for path in sorted(root.glob(pattern)):
            uri = path.relative_to(root).as_posix()
            _add(files, config, root, uri, uri)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Has links say the title of a page where they say the name of its file."""
    titles = dict(_titles(config.nav))
    directory = posixpath.dirname(page.file.src_uri)

    def title(link: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(directory, link["path"]))
        return f"[{titles.get(path, link['name'])}]"

    return _LINK_BY_NAME.sub(title, markdown)


def _add(files: Files, config: MkDocsConfig, root: pathlib.Path, src_uri: str, site_uri: str) -> None:
    if src_uri in _NOT_SHOWN or "__pycache__" in src_uri:
        return
    dest_uri = File(site_uri, str(root), config.site_dir, config.use_directory_urls).dest_uri
    files.append(File(src_uri, str(root), config.site_dir, config.use_directory_urls, dest_uri=dest_uri))


def _titles(nav: list[dict]):
    for entry in nav:
        for title, content in entry.items():
            if isinstance(content, str):
                yield content, title
            else:
                yield from _titles(content)
