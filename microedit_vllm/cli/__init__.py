"""The `microedit` command."""
