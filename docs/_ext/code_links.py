"""Code in the text of a page is a link if it is a key of configs or a name of the library, as arXiv's numbers are."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform

KEYS = "reference/config"
ARXIV = re.compile(r"arXiv:? ?(\d{4}\.\d{5})")


class LinkCode(SphinxPostTransform):
    """Makes references of code, where it names something that has a place in the reference."""

    default_priority = 8  # before references are resolved

    def run(self, **kwargs: Any) -> None:
        """Replace the code of one page."""
        keys = keys_of(self.env) if self.env.docname != KEYS else frozenset()
        for node in [*plain(self.document, nodes.literal)]:
            code = node.astext()
            name = code.removeprefix("kd_pipeline.").removesuffix("()")
            is_name = re.fullmatch(r"[A-Z]\w+(\.\w+)?|losses\.\w+|[a-z]+_\w+", name) or code.startswith("kd_pipeline.")
            reference: nodes.Element
            if code in keys:
                uri = self.app.builder.get_relative_uri(self.env.docname, KEYS)
                reference = nodes.reference("", "", internal=True, refuri=f"{uri}#{code}")
            elif is_name and f"kd_pipeline.{name}" in self.env.domains.python_domain.objects:
                reference = addnodes.pending_xref(
                    refdomain="py", reftype="obj", reftarget=f"kd_pipeline.{name}", refdoc=self.env.docname
                )
            else:
                continue
            node.replace_self(reference)
            reference += node


class LinkPapers(SphinxTransform):
    """Makes links of the numbers of papers."""

    default_priority = 800

    def apply(self, **kwargs: Any) -> None:
        """Replace the numbers on one page."""
        for node in [*plain(self.document, nodes.Text)]:
            parts = ARXIV.split(node.astext())
            if len(parts) > 1:
                texts = [nodes.Text(part) for part in parts]
                for at in range(1, len(parts), 2):
                    address = f"https://arxiv.org/abs/{parts[at]}"
                    texts[at] = nodes.reference("", f"arXiv {parts[at]}", refuri=address)
                node.parent.replace(node, texts)


def plain(document: nodes.document, kind: Any) -> Iterator[Any]:
    """Nodes of a kind in the text, but not in links, headings, signatures and blocks of code."""
    apart = (nodes.reference, addnodes.pending_xref, nodes.title, addnodes.desc_signature, nodes.literal_block)
    apart += (nodes.comment, nodes.raw) if kind is nodes.literal else (nodes.comment, nodes.raw, nodes.literal)
    for node in document.findall(kind):
        parent = node.parent
        while parent is not None and not isinstance(parent, apart):
            parent = parent.parent
        if parent is None:
            yield node


def keys_of(env: BuildEnvironment) -> frozenset[str]:
    """All keys with a dot, as the page of configs has them."""
    page = (Path(env.srcdir) / f"{KEYS}.md").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^- \*\*`(\w+(?:\.\w+)+)`\*\*", page, flags=re.MULTILINE))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_post_transform(LinkCode)
    app.add_transform(LinkPapers)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
