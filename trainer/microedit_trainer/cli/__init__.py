"""Sub-commands of `microedit` that train, edit and evaluate."""
