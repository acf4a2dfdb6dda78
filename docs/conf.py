"""The site of these pages: `python -m tools.site OUT`. Pages stay where they are; the source is the whole checkout."""

from __future__ import annotations

project = "diffalign"
copyright = "the diffalign authors, Apache-2.0"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md"]
myst_heading_anchors = 4  # as on the hubs where these pages are read too
myst_links_external_new_tab = True
nitpicky = True

html_theme = "furo"
html_title = "diffalign"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_extra_path = ["site/front"]  # the site's front door leads to the first page
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
