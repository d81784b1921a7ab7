"""Edits served by Model Runner V2. A program: `python edits_on_v2.py MODEL SET REQUESTS OUT`.

A process of its own, see `v2_on_cpu`. REQUESTS is JSON: [token ids, whether with edits] each.
"""

import json
import sys
from pathlib import Path

from tests.microedit_vllm.engine.v2_on_cpu import use_v2

TOKENS = 4


def main(model: str, edit_set: str, requests: str, out: Path) -> None:
    use_v2(plugins="microedit")
    from vllm import LLM, SamplingParams

    from microedit_vllm.engine import decisions

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=6,
        max_num_batched_tokens=40,
        num_gpu_blocks_override=24,
        additional_config={"microedit": {"edit_set": edit_set}},
    )
    asked = json.loads(requests)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in asked],
        [
            SamplingParams(
                temperature=0,
                max_tokens=TOKENS,
                ignore_eos=True,
                extra_args=None if edits else {"microedit": "off"},
            )
            for _, edits in asked
        ],
    )
    found = decisions(llm, [output.request_id for output in outputs])
    worker = llm.llm_engine.model_executor.driver_worker.worker
    result = {
        "runner": type(worker.model_runner).__module__,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "decisions": [found[output.request_id] for output in outputs],
    }
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
