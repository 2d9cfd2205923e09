"""Notebooks in JupyterLab, in a real browser: `python -m tests.browser --help`."""
