"""Random engines and random traces of requests, and what of the invariants they break.

The invariants are those of the design notes: (1) off means untouched, (2) one request, one
answer, (3) nothing edited leaks. Everything follows from a seed.
"""

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from microedit_vllm.engine import decisions
from microedit_vllm.engine.records import external_id
from tests.microedit_vllm.engine.in_process import engine_here
from tests.microedit_vllm.engine.tiny_served import CLEAR, VOCABULARY, Answer, TinyServed

MAX_LENGTH = 256
AT_THE_END = 10**6
PROBES = 4
REUSED_BLOCKS = -1
OFF = {"microedit": "off"}


@dataclass(frozen=True)
class Ask:
    """One request of a trace.

    Attributes:
        arrive: the step before which it arrives.
        abort: steps after its arrival when it is aborted; None lets it finish.
        probe: it continues an edited answer with edits off: a leak would show in it.
    """

    name: str
    tokens: tuple[int, ...]
    count: int
    arrive: int
    edits: bool = True
    edit_from: int | None = None
    samples: int = 1
    prompt_logprobs: bool = False
    abort: int | None = None
    probe: bool = False

    @property
    def options(self) -> dict[str, Any] | None:
        if not self.edits:
            return OFF
        return None if self.edit_from is None else {"microedit_edit_from": self.edit_from}

    def expected(self, served: TinyServed, edits: bool = True) -> Answer:
        """What it must answer, with the edit set or without."""
        return served.answer(list(self.tokens), self.count, edits and self.edits, self.edit_from)


@dataclass
class Run:
    """What an engine made of a trace: per ask its samples as (token, log-probabilities) steps."""

    samples: dict[str, list[list[tuple[int, dict[int, float]]]]] = field(default_factory=dict)
    decisions: dict[str, dict[str, Any]] = field(default_factory=dict)
    schedule: list[list[tuple[str, int]]] = field(default_factory=list)
    cached_tokens: int = 0
    preemptions: int = 0


def random_engine(rng: random.Random, position: str) -> dict[str, Any]:
    """Arguments of a vLLM engine in which a trace meets as many schedules as possible."""
    if position == "sequence":
        return {
            "enable_chunked_prefill": False,
            "enable_prefix_caching": False,
            "max_num_batched_tokens": rng.choice([MAX_LENGTH, 2 * MAX_LENGTH]),
            "max_num_seqs": rng.choice([2, 8]),
            "num_gpu_blocks_override": rng.choice([9, 12, 18, 80]),
            "async_scheduling": rng.random() < 0.5,
            "block_size": 32,
        }
    speculate = rng.random() < 0.3
    block_size = rng.choice([32, 32, 64])
    arguments: dict[str, Any] = {
        "max_num_batched_tokens": rng.choice([8, 13, 17, 32, 40, 61, 100, 512]),
        "max_num_seqs": rng.choice([1, 3, 8]),
        # From hardly more than the longest request to more than all of them.
        "num_gpu_blocks_override": rng.choice([320, 320, 448, 640, 2560]) // block_size,
        "enable_prefix_caching": rng.random() < 0.7,
        "async_scheduling": rng.random() < 0.5 and not speculate,
        "block_size": block_size,
    }
    if rng.random() < 0.3:
        arguments["long_prefill_token_threshold"] = rng.choice([3, 11])
    if speculate:
        arguments["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": rng.choice([1, 3]),
            "prompt_lookup_max": 2,
            "prompt_lookup_min": 1,
        }
    return arguments


def random_trace(rng: random.Random, served: TinyServed, size: int) -> list[Ask]:
    """Requests that share prefixes, repeat and continue each other, and mix on with off."""
    trace: list[Ask] = []
    while len(trace) < size:
        ask = _random_ask(rng, served, trace)
        tau = served.manifest.decision.tau
        ard = ask.expected(served).ard
        # Nearer to τ, rounding decides.
        if len(ask.tokens) + ask.count < MAX_LENGTH and not 0.95 < ard / tau < 1.05:
            trace.append(ask)
    return [*trace, *_last_probes(served, trace)]


def _last_probes(served: TinyServed, trace: list[Ask]) -> list[Ask]:
    """Edited answers continued with edits off, once all else has ended and the cache is warm."""
    longest = sorted(trace, key=lambda ask: -ask.count)
    edited = [ask for ask in longest if ask.expected(served).on and ask.abort is None]
    return [
        Ask(
            name=f"p{index}",
            tokens=(*ask.tokens, *ask.expected(served).tokens),
            count=4,
            arrive=AT_THE_END,
            edits=False,
            probe=True,
        )
        for index, ask in enumerate(edited[:PROBES])
    ]


def _random_ask(rng: random.Random, served: TinyServed, trace: list[Ask]) -> Ask:
    fresh = ["edited", "edited", "behind", "behind", "unrelated"]
    kind = rng.choice(
        fresh if not trace else [*fresh, "again", "again", "grown", "second turn", "forced"]
    )
    before = rng.choice(trace) if trace else None
    edits, probe, edit_from = rng.random() < 0.75, False, None
    arrive = rng.choice([0, 0, 3, 10, 30, 60])
    if kind == "edited":
        tokens = rng.choice(served.edited)
    elif kind == "behind":
        tokens = [1, *_some(rng, 1, 90), *rng.choice(served.edited)[1:]]
    elif kind == "unrelated":
        tokens = rng.choice([[1], *served.unrelated])
    else:
        assert before is not None
        answer = list(before.expected(served).tokens)
        tokens = list(before.tokens)
        if kind == "grown":
            tokens += _some(rng, 1, 40)
        elif kind == "second turn":
            probe = before.expected(served).on and rng.random() < 0.7
            edits = not probe and edits
            tokens += [*answer, *_some(rng, 1, 40)]
            # Some arrive while the first turn is still being answered.
            arrive = before.arrive + rng.choice([0, before.count, 2 * before.count + 10])
        elif kind == "forced":
            edits, edit_from = True, len(tokens) - 1
            tokens += answer
    return Ask(
        name=f"r{len(trace)}",
        tokens=tuple(tokens),
        count=rng.choice([1, 2, 8, 20, 40]),
        arrive=arrive,
        edits=edits,
        edit_from=edit_from,
        samples=rng.choice([1, 1, 1, 2]),
        prompt_logprobs=rng.random() < 0.1,
        abort=rng.choice([None] * 9 + [4]),
        probe=probe,
    )


def _some(rng: random.Random, least: int, most: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(least, most))]


def reused_blocks(served: TinyServed) -> tuple[dict[str, Any], list[Ask]]:
    """The blocks of a scored request go to one with edits off, and then to one that asks for them.

    All prompts are as long, so that a window lies in the same place of the same block.
    """
    rng = random.Random(0)
    edited = served.edited[-1]
    trace = [Ask("scored", tuple(edited), 1, 0)]
    for index in range(8):
        tokens = (1, *_some(rng, len(edited) - 1, len(edited) - 1))
        arrive = AT_THE_END + 2 * index
        trace.append(Ask(f"off{index}", tokens, 1, arrive, edits=False))
        trace.append(Ask(f"asks{index}", tokens, 1, arrive + 1))
    arguments = {
        "max_num_batched_tokens": 512,
        "max_num_seqs": 3,
        "num_gpu_blocks_override": 1 + 8,
        "block_size": 32,
    }
    return arguments, trace


def run_trace(served: TinyServed, arguments: dict[str, Any], trace: list[Ask], edits: bool) -> Run:
    """Run a trace on an engine in this process, with the edit set or plain."""
    setting = {"microedit": {"edit_set": str(served.edit_set)}} if edits else {}
    with engine_here(
        served.model,
        max_model_len=MAX_LENGTH,
        disable_log_stats=False,
        additional_config=setting,
        **arguments,
    ) as llm:
        return _run(llm, trace, edits)


def _run(llm: Any, trace: list[Ask], edits: bool) -> Run:
    engine, run = llm.llm_engine, Run()
    _record_schedule(engine.engine_core.engine_core.scheduler, run)
    waiting, step = sorted(trace, key=lambda ask: ask.arrive), 0
    aborts: dict[str, int] = {}
    while waiting or engine.has_unfinished_requests():
        while waiting and (waiting[0].arrive <= step or not engine.has_unfinished_requests()):
            ask = waiting.pop(0)
            prompt = {"prompt_token_ids": list(ask.tokens)}
            engine.add_request(ask.name, prompt, _sampling(ask))
            if ask.abort is not None:
                aborts[ask.name] = step + ask.abort
        for output in engine.step():
            if output.finished:
                run.samples[output.request_id] = [_steps(sample) for sample in output.outputs]
                run.cached_tokens += output.num_cached_tokens or 0
        due = [name for name, at in aborts.items() if at <= step and name not in run.samples]
        engine.abort_request(due)
        aborts = {name: at for name, at in aborts.items() if name not in due}
        step += 1
    run.preemptions = int(
        sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    )
    if edits:
        run.decisions = decisions(llm, [ask.name for ask in trace])
    return run


def _sampling(ask: Ask) -> Any:
    from vllm import SamplingParams

    # vLLM wants n = 1 with temperature 0; top_k = 1 chooses the same token.
    many = {"temperature": 1.0, "top_k": 1} if ask.samples > 1 else {"temperature": 0.0}
    return SamplingParams(
        n=ask.samples,
        max_tokens=ask.count,
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=1 if ask.prompt_logprobs else None,
        extra_args=ask.options,
        **many,
    )


def _steps(sample: Any) -> list[tuple[int, dict[int, float]]]:
    tops = [{t: entry.logprob for t, entry in top.items()} for top in sample.logprobs]
    return list(zip(sample.token_ids, tops, strict=True))


def _record_schedule(scheduler: Any, run: Run) -> None:
    schedule = scheduler.schedule

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        counts = output.num_scheduled_tokens
        run.schedule.append([(external_id(name), counts[name]) for name in counts])
        return output

    scheduler.schedule = recorded


@dataclass
class Report:
    """What a configuration showed: broken invariants as lines, and what was covered."""

    violations: list[tuple[int, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def check_seed(
    served: TinyServed, seed: int, size: int = 14, plain_runs: dict[int, Run] | None = None
) -> Report:
    """Run one trace on one engine, plain and with edits, and compare.

    Args:
        seed: of a random engine and trace; `REUSED_BLOCKS` for the one that is made up.
        plain_runs: the plain runs so far by seed, for whoever checks a seed more than once.
    """
    rng = random.Random(seed)
    if seed == REUSED_BLOCKS:
        arguments, trace = reused_blocks(served)
    else:
        arguments = random_engine(rng, served.manifest.position)
        trace = random_trace(rng, served, size)
    if "speculative_config" in arguments:
        # The CPU engine's rejection sampler takes greedy requests only.
        trace = [replace(ask, samples=1) for ask in trace]
    runs = {} if plain_runs is None else plain_runs
    if seed not in runs:
        runs[seed] = run_trace(served, arguments, trace, edits=False)
    plain, edited = runs[seed], run_trace(served, arguments, trace, edits=True)
    report = Report()
    report.counts.update(
        configurations=1,
        requests=len(trace),
        preemptions=edited.preemptions,
        cached_tokens=edited.cached_tokens,
        cached_tokens_plain=plain.cached_tokens,
    )
    for ask in trace:
        if ask.name in edited.samples:
            _check(ask, served, plain, edited, report)
    return report


def _check(ask: Ask, served: TinyServed, plain: Run, edited: Run, report: Report) -> None:
    expected = ask.expected(served)
    record = edited.decisions.get(ask.name, {})
    report.counts["on" if expected.on else "off"] += 1
    report.counts["leak probes"] += ask.probe
    wanted = expected.ard if expected.ard < float("inf") else None
    ard = record.get("ard")
    same_ard = ard == wanted or (None not in (ard, wanted) and abs(ard - wanted) < 1e-3 * wanted)
    if record.get("on") is not expected.on or not same_ard:
        report.violations.append((2, f"{ask.name}: {record}, expected {expected.on} {wanted}"))
    for sample in edited.samples[ask.name]:
        if not _agrees(sample, expected):
            found = [token for token, _ in sample]
            which = 3 if ask.probe else 2
            report.violations.append((which, f"{ask.name}: {found}, expected {expected.tokens}"))
    if not expected.on and ask.name in plain.samples:
        same_schedule = plain.schedule == edited.schedule
        report.counts["off under the plain engine's schedule"] += same_schedule
        if not _untouched(plain.samples[ask.name], edited.samples[ask.name], same_schedule):
            report.violations.append((1, f"{ask.name} is off and differs from the plain engine"))


def _agrees(sample: list[tuple[int, dict[int, float]]], expected: Answer) -> bool:
    """Same tokens, up to the first choice that rounding can turn."""
    for (token, _), wanted, gap in zip(sample, expected.tokens, expected.gaps, strict=True):
        if gap < CLEAR:
            return True
        if token != wanted:
            return False
    return True


def _untouched(plain: Any, edited: Any, same_schedule: bool) -> bool:
    """Bit for bit under the same schedule; under another, as near as the plain engine is."""
    if same_schedule:
        return bool(plain == edited)
    for one, other in zip(plain, edited, strict=True):
        for (token, tops), (other_token, other_tops) in zip(one, other, strict=True):
            if token != other_token:
                best = sorted(tops.values())[-2:]
                return best[-1] - best[0] < CLEAR
            if abs(tops[token] - other_tops[token]) > CLEAR:
                return False
    return True
