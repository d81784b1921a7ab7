"""A file for each table of docs/quality.md; each gives a `Section`."""
