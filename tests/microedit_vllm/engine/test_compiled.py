"""The same under torch.compile; minutes of compiling, so `-m "not compiled"` leaves it out."""

import pytest

from microedit_vllm.engine import decisions
from tests.microedit_vllm.engine.synthetic import EDITED, UNRELATED, running
from tests.microedit_vllm.engine.test_offline import ARD_NOISE, MIXED, OFF, generate, token_ids

pytestmark = pytest.mark.compiled


def test_decisions_and_edits_survive_torch_compile(smollm2, edit_set, residuals, operator):
    setting = {"microedit": {"edit_set": str(edit_set)}}
    with running(smollm2, enforce_eager=False, additional_config=setting) as llm:
        outputs = generate(llm, MIXED)
        found = decisions(llm, [output.request_id for output in outputs])
    for (prompt, options), output in zip(MIXED, outputs, strict=True):
        record = found[output.request_id]
        assert record["on"] is (prompt in EDITED and options != OFF)
        if options != OFF:
            wanted = residuals.ard(operator, prompt)
            assert record["ard"] == pytest.approx(wanted, abs=ARD_NOISE)
    off = outputs[len(EDITED) + len(UNRELATED) :]
    for edited, plain in zip(outputs, off, strict=False):
        assert token_ids(edited) != token_ids(plain)
