"""The documentation site: `make docs` builds these pages, the reference and the pictures into build/docs."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

project = "kd_pipeline"
author = "the authors of kd_pipeline"
copyright = author
version = release = version_of("kd_pipeline")
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "code_links",
    "page_pictures",
    "python_reference",
    "repository_files",
    "site_links",
]
exclude_patterns = ["_build", "_ext", "**.ipynb_checkpoints"]

# Pages are written for GitHub too: headings have the anchors that GitHub gives them.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist", "fieldlist"]
repository_pages = {
    "README.md": "index",
    "SECURITY.md": "security",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
}

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

default_role = "docstring_code"
autoclass_content = "both"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"kd_pipeline {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
pygments_style = "tango"
pygments_dark_style = "native"
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
