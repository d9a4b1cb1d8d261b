"""How Sphinx builds the site: `make docs` writes it into build/docs."""

import inspect
import pydoc
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import unescape

from docutils import nodes
from latex2mathml.converter import convert_to_element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode
from sphinx.writers.html5 import HTML5Translator

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout that this file is part of, whatever is installed

import stabnorm

project = "stabnorm"
copyright = "the authors of stabnorm, Apache-2.0"
release = version = stabnorm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["README.md"]
html_theme = "furo"
html_title = f"stabnorm {release}"
html_copy_source = False
html_math_renderer = "mathml"
default_role = "py:obj"  # a name in single backticks is a link where the reference has it, see `resolve_name`

myst_enable_extensions = ["fieldlist"]
myst_heading_anchors = 3  # the anchors that GitHub gives to headings

autodoc_typehints_format = "short"
maximum_signature_line_length = 100
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_custom_sections = ["Shape", ("Attributes", "params_style")]
napoleon_use_rtype = False


def as_mathml(node: nodes.math | nodes.math_block, display: str) -> str:
    """Return a formula as MathML: browsers draw it without a script, and so without a network."""
    formula = convert_to_element(node.astext().replace("\n", " "), display=display)
    for over in formula.iter("mover"):
        if over[1].text == "&#x02015;":  # a bar: only with some fonts would it grow as wide as what it is over
            over.remove(over[1])
            over.tag, over.attrib["style"] = "mrow", "border-top: 0.06em solid; padding-top: 0.1em"
    return unescape(ElementTree.tostring(formula, encoding="unicode"))  # its characters are entities


def visit_math(writer: HTML5Translator, node: nodes.math) -> None:
    """Write a formula within a line."""
    writer.body.append(as_mathml(node, "inline"))
    raise nodes.SkipNode


def visit_math_block(writer: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on lines of its own."""
    writer.body.append(f'<div class="math">{as_mathml(node, "block")}</div>')
    raise nodes.SkipNode


def resolve_name(
    app: Sphinx, environment: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.Node | None:
    """Link a name in single backticks to its entry, whatever page has it, and leave other code as it is.

    A name that starts with "stabnorm." must exist.
    """
    if node["reftype"] != "obj":
        return None
    target = node["reftarget"].removesuffix("()")
    objects = environment.domains.python_domain.objects
    entries = [
        name
        for name, entry in objects.items()
        if name.endswith(f".{target}") and not entry.aliased and name.split(".")[-2].islower()  # and no method
    ]
    if len(entries) == 1:
        entry = objects[entries[0]]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text, entries[0])
    if target.startswith("stabnorm.") and pydoc.locate(target) is None:
        logging.getLogger(__name__).warning("there is no %s", target, location=node)
    return text


def show_init(
    app: Sphinx, what: str, name: str, thing: Any, options: object, signature: str, returns: str
) -> tuple[str, str] | None:
    """Show what `__init__` takes where a class has a `__new__` that hands everything on; a protocol takes nothing."""
    if what != "class" or not signature.startswith("(*args"):
        return None
    if getattr(thing, "_is_protocol", False):
        return "", ""
    takes = inspect.signature(thing.__init__)
    parameters = list(takes.parameters.values())[1:]  # without self
    return stringify_signature(
        takes.replace(parameters=parameters), show_return_annotation=False, unqualified_typehints=True
    ), returns


def setup(app: Sphinx) -> None:
    """Register what draws the formulas, and what resolves the names."""
    app.connect("autodoc-process-signature", show_init)
    app.connect("missing-reference", resolve_name)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
