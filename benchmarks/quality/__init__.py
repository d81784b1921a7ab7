"""`make quality`: all of docs/quality.md, from a model and benchmark records."""
