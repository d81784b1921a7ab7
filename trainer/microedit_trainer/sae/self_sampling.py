"""Text that a model samples from itself, so that an SAE sees what the model says when served."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microedit_trainer.language_model import LanguageModel
from microedit_trainer.text_sources import Text, turn_texts

SELF = "self"
SELF_TURNS = "self turns"

_SEQUENCES_AT_ONCE = 64
_TOP_P = 0.98
_CANDIDATES = 4
_CHAT_SHARE = 2 / 3
_MARK_USER, _MARK_ASSISTANT = "\ue000", "\ue001"  # private use: no template contains them


@dataclass(frozen=True)
class TurnFrame:
    """What a chat template writes around a user's and an assistant's content."""

    header: str
    turn_break: str
    end: str

    @classmethod
    def of(cls, tokenizer: object) -> "TurnFrame | None":
        """None without a chat template, or with one that rewrites what it is given."""
        if not getattr(tokenizer, "chat_template", None):
            return None
        rendered = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            [
                {"role": "user", "content": _MARK_USER},
                {"role": "assistant", "content": _MARK_ASSISTANT},
            ],
            tokenize=False,
        )
        header, found, rest = rendered.partition(_MARK_USER)
        turn_break, found_too, end = rest.partition(_MARK_ASSISTANT)
        if not (found and found_too and turn_break):
            return None
        return cls(header, turn_break, end.strip())

    def parse(self, sampled: str) -> tuple[str, str]:
        """Question and answer in what a model wrote behind `header`; either may be empty."""
        question, _, rest = sampled.partition(self.turn_break)
        answer = rest.partition(self.end)[0] if self.end else rest
        return question.strip(), answer.strip()


def sample_texts(
    model: LanguageModel,
    tokens: int,
    length: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Text]:
    """About `tokens` sampled tokens: plain text, and questions with answers bare and in chat.

    Args:
        length: tokens per sample.
        progress: called with the tokens sampled and their total.
    """
    frame = TurnFrame.of(model.tokenizer)
    generator = torch.Generator(model.device).manual_seed(seed)
    turns = round(tokens * _CHAT_SHARE / length) if frame else 0
    plain = max(1, round(tokens / length) - turns)
    texts: list[Text] = []
    done = 0
    total = (plain + turns) * length

    def sampled(header: list[int], count: int) -> list[list[int]]:
        nonlocal done
        found: list[list[int]] = []
        for first in range(0, count, _SEQUENCES_AT_ONCE):
            rows = min(_SEQUENCES_AT_ONCE, count - first)
            start = torch.tensor([header] * rows)
            ids = sample_tokens(model, start, length, generator)
            found += ids.tolist()
            done += ids.numel()
            if progress:
                progress(done, total)
        return found

    for ids in sampled([_first_token(model)], plain):
        content = model.tokenizer.decode(_before_end(ids, model), skip_special_tokens=True)
        texts.append(Text(SELF, len(texts), content))
    if frame:
        header = model.tokenizer(frame.header, add_special_tokens=False).input_ids
        for number, ids in enumerate(sampled(header, turns), len(texts)):
            question, answer = frame.parse(model.tokenizer.decode(ids))
            pair = turn_texts(SELF_TURNS, question, answer, model.tokenizer) if question else []
            texts += [Text(t.source, number, t.content, t.is_chat) for t in pair]
    return [text for text in texts if text.content.strip()]


@torch.no_grad()
def sample_tokens(
    model: LanguageModel, start: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Ancestral sampling at temperature 1, top-p 0.98; an end token does not stop a row.

    Args:
        start: [B, S] int64.

    Returns:
        [B, count] int64, the new tokens.
    """
    ids = start.to(model.device)
    past = None
    columns = []
    for _ in range(count):
        out = model.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = out.past_key_values
        ids = draw(out.logits[:, -1].float().softmax(dim=-1), generator)
        columns.append(ids)
    return torch.cat(columns, dim=1).cpu()


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row from the top-p nucleus, by rejection: [B, vocabulary] → [B, 1] int64.

    A token is in the nucleus if the tokens likelier than it hold less than top-p together. That
    needs no sort of the vocabulary. A row whose candidates are all rejected takes its likeliest.
    """
    candidates = torch.multinomial(probabilities, _CANDIDATES, True, generator=generator)
    chosen = probabilities.argmax(dim=-1, keepdim=True)
    undecided = torch.arange(len(probabilities), device=probabilities.device)
    for column in range(_CANDIDATES):
        token = candidates[undecided, column : column + 1]
        mine = probabilities[undecided]
        likelier = mine > mine.gather(1, token)
        inside = mine.masked_fill_(~likelier, 0).sum(dim=-1) < _TOP_P
        chosen[undecided[inside]] = token[inside]
        undecided = undecided[~inside]
    return chosen


def _end_tokens(model: LanguageModel) -> set[int]:
    end = model.model.generation_config.eos_token_id
    found = set(end) if isinstance(end, list) else {end}
    return {token for token in (*found, model.tokenizer.eos_token_id) if token is not None}


def _before_end(ids: list[int], model: LanguageModel) -> list[int]:
    ends = _end_tokens(model)
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def _first_token(model: LanguageModel) -> int:
    """What a text starts from: BOS, else the end token, which separates texts in training."""
    candidates = (model.tokenizer.bos_token_id, *sorted(_end_tokens(model)), 0)
    return next(token for token in candidates if token is not None)
