"""Links from pages to files outside of docs/: in the site, each such file or folder has a page that shows it."""

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from markdown_it import MarkdownIt
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform
from sphinx.util.osutil import relative_uri

REPOSITORY = Path(__file__).resolve().parents[2]
PREFIX = "files/"
NAMED = re.compile(r"(?:examples|benchmarks|configs|tools)/[\w/.-]+\.(?:py|json|jsonl|yaml|txt|md)")
"""Files whose names in code are links."""
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
            if node.get("reftype") == "myst":
                self._replace(node)
        for node in [*self.document.findall(nodes.literal)]:
            is_alone = not isinstance(node.parent, nodes.reference | addnodes.pending_xref | nodes.title)
            if is_alone and NAMED.fullmatch(name := node.astext()) and (REPOSITORY / name).is_file():
                reference = self._reference(name)
                node.replace_self(reference)
                reference += node

    def _reference(self, name: str) -> addnodes.pending_xref:
        found(self.env).setdefault(self.env.docname, set()).add(name)
        return addnodes.pending_xref(
            refdoc=self.env.docname, refexplicit=True, refdomain="", reftype="repository_file", reftarget=name
        )

    def _replace(self, node: nodes.Element) -> None:
        target, _, anchor = node["reftarget"].partition("#")
        if not target:
            return
        if node.get("refdomain") == "doc":  # MyST takes every .md for a page
            path, anchor = Path(f"{target}.md"), node["reftargetid"]
        else:
            path = Path(self.env.relfn2path(target, self.env.docname)[1]).resolve()
            if not path.exists():  # a page may include a text of the repository, whose links begin there
                path = (REPOSITORY / target).resolve()
        if not path.is_absolute() or not path.exists() or not is_outside(path, self.env):
            return
        name = path.relative_to(REPOSITORY).as_posix()
        reference = self._reference(name)
        if (page := self.config.repository_pages.get(name)) is not None:
            found(self.env)[self.env.docname].discard(name)
            anchor = anchor or None
            reference.attributes |= {"refdomain": "doc", "reftype": "myst", "reftarget": page, "reftargetid": anchor}
        node.replace_self(reference)
        reference += node.children


def is_outside(path: Path, env: BuildEnvironment) -> bool:
    """Whether a path is in the repository and no page."""
    return path.is_relative_to(REPOSITORY) and not path.is_relative_to(env.srcdir)


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
    """A page for each file that is linked to, and for the files that a folder has or a text names in turn."""
    waiting, done = sorted({name for each in found(app.env).values() for name in each}), set[str]()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        path = REPOSITORY / name
        if path.is_dir():
            body = folder_body(path, name)
            waiting += [f"{name}/{child.name}" for child in shown_in(path)]
        elif path.suffix == ".md":
            body, linked = text_body(app, path, name)
            waiting += linked
        else:
            body = f"<h1>{escape(name)}</h1>\n{file_body(app, path)}"
        yield PREFIX + name, {"title": name, "body": body}, "page.html"


def text_body(app: Sphinx, path: Path, name: str) -> tuple[str, list[str]]:
    """A text in Markdown, and the files of the repository that it links to."""
    parser = MarkdownIt("commonmark").enable("table")
    tokens, linked = parser.parse(path.read_text(encoding="utf-8")), []
    for token in [child for block in tokens for child in block.children or ()]:
        target, _, anchor = str(token.attrGet("href") or "").partition("#")
        if token.type != "link_open" or not target or ":" in target:
            continue
        file = (path.parent / target).resolve()
        if is_outside(file, app.env) and file.exists():
            linked.append(file.relative_to(REPOSITORY).as_posix())
            page = f"{PREFIX}{linked[-1]}"
        else:
            page = str(app.env.path2doc(file))
            if page not in app.env.all_docs:
                raise ExtensionError(f"{name} links to {target}, which does not exist")
        uri = app.builder.get_relative_uri(PREFIX + name, page)
        token.attrSet("href", f"{uri}#{anchor}" if anchor else uri)
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="table-wrapper"><table class="docutils">').replace(
        "</table>", "</table></div>"
    )
    return re.sub("<code>(?!<)", '<code class="docutils literal">', body), linked


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
    return f"<h1>{escape(name)}</h1>\n<ul>{''.join(links)}</ul>"


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
