"""One prompt explained: what the switch saw, which rows fired, and whose facts they are."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from microedit_trainer.audit.explanation import Explanation, Firing
from microedit_trainer.audit.fact_overlap import compare_facts, stored_facts, trained_context
from microedit_trainer.audit.firing import ChangeAtTokens, FiredChanges
from microedit_trainer.audit.tokens import decision_of
from microedit_trainer.contexts import ContextName, Contexts, PromptTokens
from microedit_trainer.evaluation import TorchEngine
from microedit_trainer.language_model import Progress
from microedit_trainer.stored_residuals import store_residuals
from microedit_vllm.errors import MicroEditError

STRONGEST_LATENTS = 8
FACTS_PER_ROW = 3
NEAREST_FACTS = 5


@dataclass(frozen=True)
class Request:
    """What to explain, and how much of it.

    Attributes:
        prompt: bare it is taken without blanks at its end.
        chat: through the model's chat template, behind `system` where that is given.
        max_tokens: length of the answers.
        facts: how many of the set's facts are compared.
        rows: how many of the changed rows are named.
    """

    prompt: str
    chat: bool = False
    system: str | None = None
    max_tokens: int = 20
    facts: int = 1000
    rows: int = 10

    def __post_init__(self) -> None:
        """Raises MicroEditError: no text to explain, or a system prompt without a chat."""
        for name, text in (("prompt", self.prompt), ("system prompt", self.system or "")):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise MicroEditError(f"the {name} is not valid Unicode; write it again") from error
        if not self.prompt.strip():
            raise MicroEditError("the prompt is empty; give the words that you ask with")
        if self.system is not None and not self.chat:
            raise MicroEditError("a system prompt needs a chat; add --chat")

    @property
    def context(self) -> ContextName:
        return "chat" if self.chat else "bare"


@torch.no_grad()
def explain(engine: TorchEngine, request: Request, folder: Path, progress: Progress) -> Explanation:
    """Explain one prompt.

    Args:
        engine: the set in `folder` over its model.
        progress: called with the number of facts done since the last call, of
            `stored_facts(edit_set, request.facts)`.

    Raises:
        MicroEditError: too long for the model, or no chat template for a chat.
    """
    operator, lm = engine.operator, engine.lm
    edit_set = operator.edit_set
    manifest, decision = edit_set.manifest, edit_set.manifest.decision
    contexts = Contexts(lm.tokenizer, decision.scope, decision.turn, lm.max_length)
    prompt = contexts.render(request.context, request.prompt, system=request.system)
    _check_length(prompt, request.max_tokens, lm.max_length)
    # Alone, as a server runs a request by itself: in bf16 a padded batch rounds otherwise.
    stored = store_residuals(lm, manifest.layer, [prompt], decision.max_norm)[0]
    ard, tokens = decision_of(operator, stored, lm.tokenizer)
    on = bool(operator.is_on(ard))
    deciding = torch.tensor([t.position for t in tokens if t.decides], dtype=torch.long)
    scoring = ChangeAtTokens.scoring(operator, stored.z, deciding)
    edit = ChangeAtTokens.edit(operator, stored.z, torch.tensor([prompt.edit_from]))
    carried = ChangeAtTokens.carried(operator, stored.z, stored.scored)
    fired = FiredChanges(scoring, edit, carried)
    facts = stored_facts(edit_set, request.facts)
    context = trained_context(edit_set, request.context)
    overlap = compare_facts(engine, contexts, context, facts, fired, request.rows, progress)

    def described(change: ChangeAtTokens, acts: Tensor) -> Firing:
        return change.describe(overlap.behind_rows(acts, FACTS_PER_ROW), STRONGEST_LATENTS)

    before = _answer(engine, prompt, False, request.max_tokens)
    return Explanation(
        edit_set=str(folder),
        model=lm.name,
        layer=manifest.layer,
        context=request.context,
        prompt=request.prompt,
        system=request.system,
        statistic=decision.statistic,
        alpha=decision.alpha,
        tau=decision.tau,
        ard=float(ard) if ard.isfinite() else None,
        on=on,
        decision_position=prompt.edit_from,
        top_k=manifest.sae.k,
        tokens=tokens,
        scoring=described(scoring, overlap.scoring),
        edit=described(edit, overlap.edit),
        carried=described(carried, overlap.carried) if operator.carries else None,
        nearest=overlap.nearest(NEAREST_FACTS),
        facts_compared=len(facts),
        facts_total=len(edit_set.facts),
        before=before,
        after=_answer(engine, prompt, True, request.max_tokens) if on else before,
    )


def _check_length(prompt: PromptTokens, max_tokens: int, limit: int) -> None:
    length = len(prompt.prompt_ids)
    if length + max_tokens > limit:
        raise MicroEditError(
            f"the prompt has {length} tokens, with {max_tokens} of an answer more than the "
            f"model's context of {limit}; shorten it or lower --max-tokens"
        )


def _answer(engine: TorchEngine, prompt: PromptTokens, on: bool, max_tokens: int) -> str:
    ids: list[int] = []
    for token, _ in islice(engine.greedy(prompt, on), max_tokens):
        if token == prompt.end_id:
            break
        ids.append(token)
    return str(engine.lm.tokenizer.decode(ids, skip_special_tokens=True)).strip()
