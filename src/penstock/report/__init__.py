"""Metrics, tables, plots and HTML pages from the columns of a run."""
