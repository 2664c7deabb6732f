"""Documentation site, built by Sphinx from the Markdown files of this folder and the docstrings: `make docs-site`."""

# Import before Sphinx documents a model: Sphinx then writes annotations from pydantic's source into `BaseModel`, and pydantic
# refuses to define a model with extra fields, as the client's are.
import vidgen_client as vidgen_client
from vidgen_ray.version import __version__

project = "vidgen-ray"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 3
# tests/test_docs.py checks all links, also those to files outside of this folder, which Sphinx does not know.
suppress_warnings = ["myst.xref_missing"]
# Docstrings are Markdown-like: `code` stands for code, not for a reference.
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = "vidgen-ray"
html_extra_path = ["openapi.json"]
