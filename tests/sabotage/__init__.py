"""Edits of the package that a reader of the course would care about, and who notices them."""
