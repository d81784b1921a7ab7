"""Why an edit set fires on a prompt, or does not: tokens, rows, and the facts behind them."""

from microedit_trainer.audit.explain import Request, explain
from microedit_trainer.audit.explanation import Explanation

__all__ = ["Explanation", "Request", "explain"]
