"""The picture of notebook 11."""

FIGURES = {}
