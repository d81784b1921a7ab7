"""Writes docs/architectures.md: `python -m microedit_vllm.engine.architecture_table FILE`."""

import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from microedit_vllm.artifact.atomic import write_atomically
from microedit_vllm.engine.architectures import Support, classify, registry

# Those that run beside a transformers forward with the same edit in
# tests/microedit_vllm/engine/test_architectures.py.
PROVEN = {
    "CohereForCausalLM",
    "Cohere2ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "StableLmForCausalLM",
}

_TEXT = """\
# Architectures

Every entry of vLLM {vllm}'s model registry, with transformers {transformers}. Written by

```console
$ python -m microedit_vllm.engine.architecture_table docs/architectures.md
```

{supported} of {all} entries are supported. *Proven* means that a small random model of the \
architecture gives the tokens, log-probabilities and decisions of a transformers forward with the \
same edit (`tests/microedit_vllm/engine/test_architectures.py`). The others were told from their \
source: what a decoder layer returns, and what the next one and the last norm make of it. A model \
whose source does not say is refused when the server starts, with the reason given here. So is a \
supported one whose attention is sliding-window in all layers, or that is served with LoRA.

| residual stream | meaning |
|---|---|
| hidden_states + residual | a layer returns the two apart, and the next norm adds them |
| first of a pair | a layer returns two tensors, and nobody reads the second |
| one tensor | a layer returns the stream |

## Supported

| architecture | residual stream | proven | not in |
|---|---|---|---|
{rows}

## Refused

{refused}
"""


def table() -> str:
    """The document, from the installed vLLM and transformers."""
    import vllm

    answers = {name: classify(name) for name in sorted(registry(), key=str.lower)}
    supported = {name: answer for name, answer in answers.items() if answer.supported}
    return _TEXT.format(
        vllm=vllm.__version__.split("+")[0],
        transformers=version("transformers"),
        supported=len(supported),
        all=len(answers),
        rows="\n".join(_row(name, answer) for name, answer in supported.items()),
        refused=_refused(answers),
    )


def _row(name: str, answer: Support) -> str:
    assert answer.form is not None
    proven = "yes" if name in PROVEN else ""
    return f"| {name} | {answer.form.value} | {proven} | {'' if answer.float16 else 'float16'} |"


def _refused(answers: dict[str, Support]) -> str:
    by_reason = defaultdict(list)
    for name, answer in answers.items():
        if not answer.supported:
            by_reason[answer.reason].append(name)
    rows = sorted(by_reason.items(), key=lambda row: (-len(row[1]), row[1]))
    lines = [f"| {reason} | {', '.join(names)} |" for reason, names in rows]
    return "\n".join(["| why | architectures |", "|---|---|", *lines])


if __name__ == "__main__":
    write_atomically(Path(sys.argv[1]), table().encode())
