"""Sphinx: `python -m sphinx docs docs/_build` after `pip install -e ".[docs]"`."""

import diffaugkit

project = "diffaugkit"
author = "diffaugkit developers"
project_copyright = "2026, diffaugkit developers"
version = release = diffaugkit.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2

autosummary_generate = True
numpydoc_class_members_toctree = False
numpydoc_show_class_members = False
autodoc_default_options = {
    "members": True,
    # Own base classes hold methods that users call; those of other libraries are left out.
    "inherited-members": "BaseEstimator, TransformerMixin, ClassNamePrefixFeaturesOutMixin, "
    "ClassifierMixin, ClusterMixin, _MetadataRequester, _SetOutputMixin, Module, Rows, "
    "Exception, BaseException",
    # scikit-learn writes these methods, with links into its own pages.
    "exclude-members": "set_fit_request, set_fit_resample_request, set_inverse_transform_request, "
    "set_predict_request, set_predict_proba_request, set_score_request",
}
# Inherited docstrings refer to pages of scikit-learn.
suppress_warnings = ["ref.ref", "ref.term", "sphinx_gallery.duplicate_filename"]
default_role = "literal"

# Examples take minutes: they are shown, not run.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "ignore_pattern": "benchmarks",
    "plot_gallery": "False",
    "download_all_examples": False,
    "show_signature": False,
}

html_theme = "pydata_sphinx_theme"
