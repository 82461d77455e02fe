"""Makes the site of files from all over the repository, under their paths in it.

So a link works alike in the site, in an editor and where the repository is browsed.
"""

import pathlib

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

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


def _add(files: Files, config: MkDocsConfig, root: pathlib.Path, src_uri: str, site_uri: str) -> None:
    if src_uri in _NOT_SHOWN or "__pycache__" in src_uri:
        return
    dest_uri = File(site_uri, str(root), config.site_dir, config.use_directory_urls).dest_uri
    files.append(File(src_uri, str(root), config.site_dir, config.use_directory_urls, dest_uri=dest_uri))
