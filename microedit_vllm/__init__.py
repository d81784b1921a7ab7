"""Knowledge edits for large language models, served inside vLLM.

Importing this package does not import vLLM.
"""

__version__ = "0.1.0"
