"""Links from pages to files outside of docs/: in the site, each such file or folder has a page that shows it."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util.osutil import relative_uri

REPOSITORY = Path(__file__).resolve().parents[2]
PREFIX = "files/"
LARGEST = 200_000
"""Bytes of the largest file that is shown."""


class FindRepositoryFiles(SphinxTransform):
    """Takes links to files of the repository from Sphinx, which would offer them as downloads or not find folders."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """Replace the links of one page."""
        for node in [
            *self.document.findall(addnodes.download_reference),
            *self.document.findall(addnodes.pending_xref),
        ]:
            if node.get("reftype") == "myst" and node.get("refdomain") != "doc":
                self._replace(node)

    def _replace(self, node: nodes.Element) -> None:
        target, _, anchor = node["reftarget"].partition("#")
        if not target:
            return
        _, absolute = self.env.relfn2path(target, self.env.docname)
        path = Path(absolute).resolve()
        if not path.exists() or not path.is_relative_to(REPOSITORY) or path.is_relative_to(self.env.srcdir):
            return
        name = path.relative_to(REPOSITORY).as_posix()
        reference = addnodes.pending_xref(refdoc=self.env.docname, refexplicit=True)
        page = self.config.repository_pages.get(name)
        if page is not None:
            reference |= {"refdomain": "doc", "reftype": "myst", "reftarget": page, "reftargetid": anchor or None}
        else:
            reference |= {"refdomain": "", "reftype": "repository_file", "reftarget": name}
            found(self.env).setdefault(self.env.docname, set()).add(name)
        node.replace_self(reference)
        reference += node.children


def found(env: BuildEnvironment) -> dict[str, set[str]]:
    """The files that each page links to."""
    if not hasattr(env, "repository_files"):
        env.repository_files = {}
    return env.repository_files


def resolve(app: Sphinx, env: BuildEnvironment, node: Any, content: nodes.Element) -> nodes.reference | None:
    """The link to the page of a file."""
    if node["reftype"] != "repository_file":
        return None
    uri = app.builder.get_relative_uri(node["refdoc"], PREFIX + node["reftarget"])
    return nodes.reference("", "", content, internal=True, refuri=uri)


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each file that is linked to, and for the files of each folder that is."""
    names = {name for each in found(app.env).values() for name in each}
    for name in [*names]:
        if (folder := REPOSITORY / name).is_dir():
            names |= {f"{name}/{child.name}" for child in shown_in(folder)}
    for name in sorted(names):
        path = REPOSITORY / name
        body = folder_body(path, name) if path.is_dir() else file_body(app, path)
        yield PREFIX + name, {"title": name, "body": f"<h1>{escape(name)}</h1>\n{body}"}, "page.html"


def shown_in(folder: Path) -> list[Path]:
    """The files of a folder, without what Python and the system write."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def folder_body(folder: Path, name: str) -> str:
    """A list of the files."""
    links = (
        f'<li><a href="{relative_uri(f"{PREFIX}{name}.html", f"{PREFIX}{name}/{path.name}.html")}">'
        f"<code>{escape(path.name)}</code></a></li>"
        for path in shown_in(folder)
    )
    return f"<ul>{''.join(links)}</ul>"


def file_body(app: Sphinx, path: Path) -> str:
    """The file's text, in color where its language is known."""
    content = path.read_bytes()
    try:
        text = content[:LARGEST].decode()
    except UnicodeDecodeError:
        return f"<p>{len(content)} bytes, not text.</p>"
    try:
        language = get_lexer_for_filename(path.name).aliases[0]
    except (ClassNotFound, IndexError):
        language = "text"
    block: str = app.builder.highlighter.highlight_block(text, language, force=True, location=str(path))
    return block


def purge(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    """Forget a page that is read again."""
    found(env).pop(docname, None)


def merge(app: Sphinx, env: BuildEnvironment, docnames: set[str], other: BuildEnvironment) -> None:
    """Take over what another process has read."""
    found(env).update({name: files for name, files in found(other).items() if name in docnames})


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_config_value("repository_pages", {}, "env", dict)
    app.add_transform(FindRepositoryFiles)
    app.connect("missing-reference", resolve)
    app.connect("html-collect-pages", pages)
    app.connect("env-purge-doc", purge)
    app.connect("env-merge-info", merge)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
