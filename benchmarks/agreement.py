"""Do trainer and server agree, and does a mixed batch leave everyone else's answers alone?

    python benchmarks/agreement.py --model demo/model --edits demo/edits --data zsre.jsonl

Two eager `vllm serve` processes, a plain one and one with the edit set, one after another:

(a) Prompts of the set, paraphrases and other records, bare and in chat: ARD, switch decision and
    greedy answer of the trainer's torch code against the server's.
(b) Edited and unrelated requests in one batch: unrelated answers against the plain server's under
    the same schedule, to the bit; edited answers against those of the request served alone.

The same schedule: a batch is queued while the scheduler is paused, every answer has the same
length, and the prefix cache is off, as hits would differ. Each batch runs twice to prove it.
`--dtype float32` takes bf16's rounding out of the comparison.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.ordinary import ordinary_prompts
from microedit_trainer.calibration_prompts import ordinary_lines
from microedit_trainer.contexts import ContextName, Contexts, PromptTokens
from microedit_trainer.demo.server import VllmServer
from microedit_trainer.evaluation import TorchEngine
from microedit_trainer.facts import prompt_digest, read_facts
from microedit_trainer.language_model import LanguageModel
from microedit_trainer.server_engine import ServerEngine
from microedit_vllm.artifact import EditOperator, EditSet, SparseAutoencoder
from microedit_vllm.artifact.atomic import write_atomically

ANSWER_TOKENS = 12
BATCH_TOKENS = 16
TOP = 20  # vLLM gives no more
SERVE = ["--enforce-eager", "--no-enable-prefix-caching", "--max-model-len", "1024"]
# Opens /pause and /resume, with which a whole batch is queued before its first step.
DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}
QUEUEING_SECONDS = 3.0
ARD_TOLERANCE, LARGE_ARD = 0.02, 0.1
DECISIONS, ANSWERS = 0.99, 0.97
CAPTION = "floor: trainer one prompt at a time (ARD, decisions), both sides without any edit"


Step = Callable[[list[PromptTokens]], list[Tensor]]


class Asked(NamedTuple):
    """A prompt and what it is: "edited", "paraphrase", "other" or "unrelated"."""

    kind: str
    context: ContextName
    prompt: PromptTokens


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its tokens, and the most likely ones of each step with their logprobs."""

    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...] = ()

    def until(self, end: int) -> "Answer":
        """Without what was generated behind the end token."""
        size = self.tokens.index(end) + 1 if end in self.tokens else len(self.tokens)
        return Answer(self.tokens[:size], self.logprobs[:size])


def difference(first: Answer, second: Answer) -> float | None:
    """How much more likely, in nats, the first answer held its token than the second's where the
    two part; None where they don't. A lower bound where the second's token is not reported.
    """
    pairs = list(zip_longest(first.tokens, second.tokens))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return None
    step, (own, other) = first.logprobs[at], pairs[at]
    return step[own] - step.get(other, min(step.values()))


def greedy(
    step: Step, prompts: Sequence[PromptTokens], drafts: Sequence[tuple[int, ...]], tokens: int
) -> list[tuple[int, ...]]:
    """Greedy answers without a cache: a draft as far as the model says the same, the rest token
    by token. `step` gives the predictions at each answer's places, as `TorchEngine` does.
    """
    answers: list[tuple[int, ...]] = [() for _ in prompts]
    guesses = [draft[:tokens] for draft in drafts]
    while going := [
        i for i, p in enumerate(prompts) if len(answers[i]) < tokens and p.end_id not in answers[i]
    ]:
        # The last place predicts the next token, whatever stands there.
        asked = [replace(prompts[i], answer_ids=(*guesses[i][: tokens - 1], 0)) for i in going]
        for i, predicted in zip(going, step(asked), strict=True):
            # What is taken stays: another batch's rounding must not undo it.
            done, own = len(answers[i]), tuple(predicted.tolist())
            pairs = zip(own[done:], guesses[i][done:], strict=False)
            right = next((n for n, (a, b) in enumerate(pairs, done) if a != b), len(own) - 1)
            taken = Answer((*answers[i], *own[done : right + 1]))
            guesses[i] = answers[i] = taken.until(prompts[i].end_id).tokens
    return answers


def ard_agreement(
    trainer: Sequence[float], server: Sequence[float], tau: float
) -> dict[str, float]:
    """Differences of two lists of ARDs, relative to the first; equal infinities agree."""
    pairs = list(zip(trainer, server, strict=True))
    absolute = [0.0 if a == b else abs(a - b) for a, b in pairs]
    relative = [d / a if d else 0.0 for d, (a, _) in zip(absolute, pairs, strict=True)]
    large = [r for r, (a, _) in zip(relative, pairs, strict=True) if a > LARGE_ARD] or [0.0]
    found = {
        "mean_difference": sum(absolute) / sum(a for a, _ in pairs if math.isfinite(a)),
        "max_absolute": max(absolute),
        "within_of_tau": share([d <= ARD_TOLERANCE * tau for d in absolute]),
    }
    for prefix, values in (("", sorted(relative)), ("large_", sorted(large))):
        found[f"{prefix}median"] = statistics.median(values)
        found[f"{prefix}p95"] = values[math.ceil(0.95 * len(values)) - 1]
        found[f"{prefix}max"] = values[-1]
        found[f"{prefix}within"] = share([v <= ARD_TOLERANCE for v in values])
    return found


def share(flags: Sequence[bool]) -> float:
    """Share of true ones; 1 of none."""
    return sum(flags) / len(flags) if flags else 1.0


class Side:
    """One running server, asked by token ids."""

    def __init__(self, server: VllmServer) -> None:
        self.engine = ServerEngine.connect(server.base_url)
        self.base_url = server.base_url

    def answer(
        self, prompts: Sequence[PromptTokens], tokens: int, same_length: bool = False
    ) -> tuple[str, list[Answer]]:
        """All prompts in one call: its id and the answers."""
        body: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        if same_length:
            body["ignore_eos"] = True  # min_tokens would forbid the end token instead
        completion: Any = self.engine.client.completions.create(
            model=self.engine.model,
            prompt=[list(p.prompt_ids) for p in prompts],
            max_tokens=tokens,
            temperature=0,
            logprobs=TOP,
            extra_body=body,
        )
        choices = sorted(completion.choices, key=lambda choice: choice.index)
        return completion.id, [_answer(choice) for choice in choices]

    def together(self, prompts: Sequence[PromptTokens]) -> tuple[str, list[Answer]]:
        """`answer`, with every prompt in the queue before the first step."""
        self._post("pause?mode=keep")
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self.answer, prompts, BATCH_TOKENS, True)
            time.sleep(QUEUEING_SECONDS)
            self._post("resume")
            return future.result()

    def _post(self, path: str) -> None:
        httpx.post(f"{self.base_url}/{path}", timeout=60, trust_env=False).raise_for_status()


def _answer(choice: Any) -> Answer:
    steps = choice.logprobs.top_logprobs
    named = tuple({int(name.removeprefix("token_id:")): v for name, v in s.items()} for s in steps)
    return Answer(tuple(choice.token_ids), named)


class Agreement:
    """Model, set and prompts, and both comparisons over them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.lm = LanguageModel.load(options.model, options.dtype)
        edit_set = EditSet.load(options.edits)
        sae = SparseAutoencoder.load(options.sae or edit_set.sae_folder(options.edits))
        operator = EditOperator.build(edit_set, sae.to(self.lm.device))
        self.trainer, self.edit_set = TorchEngine.build(self.lm, operator), edit_set
        decision, length = edit_set.manifest.decision, self.lm.max_length
        self.contexts = Contexts(self.lm.tokenizer, decision.scope, decision.turn, length)
        draw = random.Random(options.seed)
        self.asked, self.batch = self._zsre(draw), self._batch(draw)

    def _rendered(self, kind: str, prompts: Sequence[str]) -> list[Asked]:
        """In each context in turn."""
        names = self.contexts.names
        pairs = [(names[i % len(names)], prompt) for i, prompt in enumerate(prompts)]
        return [Asked(kind, name, self.contexts.render(name, prompt)) for name, prompt in pairs]

    def _zsre(self, draw: random.Random) -> list[Asked]:
        """Half edited prompts, a quarter paraphrases, a quarter other records."""
        edit_set = self.edit_set
        own = [fact["prompt"] for fact in edit_set.facts]
        known = {*edit_set.manifest.hyperparameters["held_out"], *map(prompt_digest, own)}
        records = [fact.prompt for fact in read_facts(self.options.data)]
        pools = {
            "edited": own,
            "paraphrase": [p for fact in edit_set.facts for p in fact["paraphrases"][:1]],
            "other": [prompt for prompt in records if prompt_digest(prompt) not in known],
        }
        asked = []
        for (kind, pool), part in zip(pools.items(), (2, 4, 4), strict=True):
            asked += self._rendered(kind, draw.sample(pool, self.options.prompts // part))
        return asked

    def _batch(self, draw: random.Random) -> list[Asked]:
        """Half edited requests, half unrelated ones, shuffled."""
        half = self.options.requests // 2
        own = [fact["prompt"] for fact in self.edit_set.facts]
        edited = self._rendered("edited", [own[i % len(own)] for i in range(half)])
        unrelated = self._rendered("unrelated", draw.sample(ordinary_lines(), half))
        if self.options.text is not None:
            kinds = ordinary_prompts(self.contexts, self.options.text)
            pool = [prompt for prompts in kinds.values() for prompt in prompts]
            unrelated = [Asked("unrelated", "bare", p) for p in draw.sample(pool, half)]
        return draw.sample(edited + unrelated, 2 * half)

    def run(self) -> dict[str, Any]:
        """One server after the other, then the trainer; both comparisons."""
        prompts = [a.prompt for a in self.asked]
        outcomes = self.trainer.edited([replace(p, answer_ids=(0,)) for p in prompts])
        plain = self._serve([], {"VLLM_PLUGINS": ""})
        sae = ["--microedit-sae", str(self.options.sae)] if self.options.sae else []
        edited = self._serve(["--microedit", str(self.options.edits), *sae], {})
        served, unedited = ([a.tokens for a in side["answers"]] for side in (edited, plain))
        torch_edited = greedy(self._edited, prompts, served, ANSWER_TOKENS)
        torch_plain = greedy(self.trainer.plain, prompts, unedited, ANSWER_TOKENS)
        drafts = [replace(p, answer_ids=t) for p, t in zip(prompts, served, strict=True)]
        both, decisions = zip(self._edited(drafts), served, strict=True), edited["decisions"]
        columns: dict[str, Sequence[Any]] = {
            "asked": [f"{a.kind}, {a.context}" for a in self.asked],
            "ard": [(o.ard, d["ard"]) for o, d in zip(outcomes, decisions, strict=True)],
            # A prompt is stored the first time that it is seen: this one for itself.
            "ard_alone": [float(self.trainer.ards([p])) for p in prompts],
            "on": [(o.on, d["on"]) for o, d in zip(outcomes, decisions, strict=True)],
            "edited": list(map(difference, edited["answers"], map(Answer, torch_edited))),
            "plain": list(map(difference, plain["answers"], map(Answer, torch_plain))),
            "forced": [float((f == torch.tensor(t)).float().mean()) for f, t in both],
        }
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        own = [a.kind == "edited" for a in self.batch]
        return {
            "agreement": agreement(rows, self.edit_set.manifest.decision.tau),
            "concurrency": concurrency(own, plain, edited, prompts[0].end_id),
            "rows": rows,
        }

    def _edited(self, drafts: list[PromptTokens]) -> list[Tensor]:
        return [outcome.answer for outcome in self.trainer.edited(drafts)]

    def _serve(self, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
        """What one server makes of the prompts and, twice together and once alone, of the batch."""
        batch, model = [a.prompt for a in self.batch], self.options.model
        settings = {**DEV_MODE, **environment}
        words = [*SERVE, "--dtype", self.options.dtype, *arguments]
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "log.txt"
            with VllmServer(model, words, log=log, environment=settings) as server:
                side = Side(server)
                call, answers = side.answer([a.prompt for a in self.asked], ANSWER_TOKENS)
                batch_call, first = side.together(batch)
                runs = [first, side.together(batch)[1]]
                alone = [side.answer([p], BATCH_TOKENS, True)[1][0] for p in batch]
                found: dict[str, Any] = {"answers": answers, "runs": runs, "alone": alone}
                if arguments:
                    look = side.engine.decision
                    found["decisions"] = [look(f"{call}-{i}") for i in range(len(answers))]
                    found["on"] = [look(f"{batch_call}-{i}")["on"] for i in range(len(batch))]
        return found


def agreement(rows: Sequence[dict[str, Any]], tau: float) -> dict[str, Any]:
    """The figures of (a), and what each is where no server or no edit is involved."""
    trainer, server = ([r["ard"][side] for r in rows] for side in (0, 1))
    alone = [r["ard_alone"] for r in rows]
    differing = [r for r in rows if r["edited"] is not None]
    noise = [r["plain"] for r in rows if r["plain"] is not None]
    on, off = (
        [r["edited"] is None for r in rows if r["on"][1] is state] for state in (True, False)
    )
    return {
        "ard": ard_agreement(trainer, server, tau),
        "ard_one_at_a_time": ard_agreement(alone, server, tau),
        "ard_floor": ard_agreement(trainer, alone, tau),
        "decisions": share([r["on"][0] == r["on"][1] for r in rows]),
        "decisions_floor": share([r["on"][0] == (r["ard_alone"] <= tau) for r in rows]),
        "answers": 1 - len(differing) / len(rows),
        "answers_floor": 1 - len(noise) / len(rows),
        "answers_on": share(on),
        "answers_off": share(off),
        "gaps": sorted(r["edited"] for r in differing),
        "gaps_plain": sorted(noise),
        "same_but_for_ties": share([(r["edited"] or 0) <= max(noise, default=0) for r in rows]),
        "differing_also_plain": sum(r["plain"] is not None for r in differing),
        "forced_tokens": statistics.mean(r["forced"] for r in rows),
    }


def concurrency(
    is_edited: Sequence[bool], plain: dict[str, Any], edited: dict[str, Any], end: int
) -> dict[str, Any]:
    """The figures of (b), from what `Agreement._serve` gives; nobody reads behind the end token."""
    own, others = ([i for i, f in enumerate(is_edited) if f is kind] for kind in (True, False))

    def gaps(server: dict[str, Any], indices: Sequence[int]) -> list[float]:
        alone, together = server["alone"], server["runs"][0]
        found = [difference(alone[i].until(end), together[i].until(end)) for i in indices]
        return sorted(gap for gap in found if gap is not None)

    return {
        "edited": len(own),
        "edited_on": sum(edited["on"][i] for i in own),
        "edited_gaps": gaps(edited, own),
        "edited_plain_gaps": gaps(plain, own),
        "unrelated": len(others),
        "unrelated_on": sum(edited["on"][i] for i in others),
        "unrelated_same": sum(plain["runs"][0][i] == edited["runs"][0][i] for i in others),
        "unrelated_plain_gaps": gaps(plain, others),
        "repeats": sum(server["runs"][0] == server["runs"][1] for server in (plain, edited)),
    }


Row = tuple[str, float, float | None, str, bool | None]


def judge(found: dict[str, Any]) -> list[Row]:
    """Rows of name, share, noise floor, bar and whether it is met (None: no bar)."""
    a, b = found["agreement"], found["concurrency"]
    ard, floor, decisions, answers = a["ard"], a["ard_floor"], a["decisions"], a["answers"]
    mean, within, ties = ard["mean_difference"], ard["within"], a["same_but_for_ties"]
    same, changed = b["unrelated_same"] / b["unrelated"], len(b["edited_gaps"]) / b["edited"]
    noise = len(b["edited_plain_gaps"]) + len(b["unrelated_plain_gaps"])
    noise_share = noise / (b["edited"] + b["unrelated"])
    return [
        ("ARD, mean difference", mean, floor["mean_difference"], "≤ 2%", mean <= ARD_TOLERANCE),
        ("ARD, median difference", ard["median"], floor["median"], "", None),
        ("ARD, 95th percentile", ard["p95"], floor["p95"], "", None),
        ("ARD within 2%, prompts", within, floor["within"], "100%", within == 1),
        (f"… where ARD > {LARGE_ARD}", ard["large_within"], floor["large_within"], "", None),
        ("ARD within 2% of τ", ard["within_of_tau"], floor["within_of_tau"], "", None),
        ("decisions", decisions, a["decisions_floor"], "≥ 99%", decisions >= DECISIONS),
        ("greedy answers", answers, a["answers_floor"], "≥ 97%", answers >= ANSWERS),
        ("… but for near-ties as plain", ties, None, "", None),
        ("… tokens, teacher forced", a["forced_tokens"], None, "", None),
        ("batches that repeat to the bit", b["repeats"] / 2, None, "100%", b["repeats"] == 2),
        ("unrelated, same to the bit", same, None, "100%", same == 1),
        ("edited, changed by company", changed, noise_share, "≤ floor", changed <= noise_share),
    ]


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title="trainer against server, then batches", caption=CAPTION)
    for heading in ("", "measured", "noise floor", "bar", "met"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value, floor, bar, met in judge(found):
        cells = [name, f"{value:.1%}", "" if floor is None else f"{floor:.1%}", bar]
        table.add_row(*cells, "" if met is None else "yes" if met else "NO")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--edits", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="facts file with other records")
    parser.add_argument("--sae", type=Path, help="folder of the set's SAE, if it has moved")
    parser.add_argument("--text", type=Path, help="passages, for more kinds of unrelated prompts")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="of both sides: auto or float32")
    parser.add_argument("--out", type=Path, help="JSON result")
    options = parser.parse_args()
    found = Agreement(options).run()
    show(found)
    if options.out:
        text = json.dumps({**vars(options), **found}, indent=1, default=str)
        write_atomically(options.out, (text + "\n").encode())


if __name__ == "__main__":
    main()
