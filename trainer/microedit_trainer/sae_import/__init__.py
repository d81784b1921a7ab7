"""SAEs as others publish them, converted to the folder that editing and serving read.

A module per format reads a folder into a `PublishedSae`, which says what that library computes;
`fold` turns it into our form where that is exact, and refuses where it is not.
"""

from microedit_trainer.sae_import.convert import ImportOptions, import_sae

__all__ = ["ImportOptions", "import_sae"]
