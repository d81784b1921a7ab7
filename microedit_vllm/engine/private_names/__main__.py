"""Prints `docs/private_names.md`."""

from microedit_vllm.engine.private_names.table import table

print(table(), end="")
