"""The same under torch.compile, and its caches: `-m "not compiled"` leaves these engines out.

A model of six layers is enough: where nothing asks for less, inductor keeps a residual in fp32
for two layers, so that an op that rounds it shows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from microedit_vllm.engine import decisions
from tests.microedit_vllm.engine.synthetic import Residuals, make_edit_set, running
from tests.microedit_vllm.engine.test_offline import OFF, generate, logprobs, token_ids
from tests.tiny_model import tiny_model

pytestmark = pytest.mark.compiled

LAYERS = 6
ONE_LAYER, OTHER_LAYER = 4, 1
EDITED = ["The capital of Tavoria is", "Who leads the Meridian Company? It is"]
UNRELATED = ["Mix flour, an egg and milk into", "When the printer does not answer,"]
# The same form as in `test_offline`: prompts that fire, others, and the first with edits off.
MIXED = [*((prompt, None) for prompt in EDITED + UNRELATED), *((prompt, OFF) for prompt in EDITED)]
UNTOUCHED = range(len(EDITED), len(MIXED))


@dataclass(frozen=True)
class Start:
    """What one server answered to `MIXED`, and what it compiled.

    Attributes:
        kernels: compiled ones that this start added to the cache.
    """

    outputs: list[Any]
    decisions: dict[str, Any]
    kernels: set[Path]

    def is_on(self, index: int) -> bool:
        return self.decisions[self.outputs[index].request_id]["on"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return tiny_model(folder, layers=LAYERS, hidden=128, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def starts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Start]:
    """Four servers, one after another, that share a cache which was empty before the first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    tokenizer, root = AutoTokenizer.from_pretrained(model), tmp_path_factory.mktemp("edits")
    one, other = (
        make_edit_set(
            model, Residuals(tokenizer, loaded, layer), root / str(layer), EDITED, UNRELATED
        )
        for layer in (ONE_LAYER, OTHER_LAYER)
    )
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CACHE_ROOT", str(cache))
        environment.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        return {
            "plain": _start(model, None, cache),
            "one": _start(model, one, cache),
            "other": _start(model, other, cache),
            "one again": _start(model, one, cache),
        }


def _start(model: Path, edit_set: Path | None, cache: Path) -> Start:
    setting = {"microedit": {"edit_set": str(edit_set)}} if edit_set else {}
    before = set(cache.rglob("*.so"))
    with running(
        model,
        enforce_eager=False,
        enable_prefix_caching=False,
        additional_config=setting,
    ) as llm:
        outputs = generate(llm, MIXED)
        found = decisions(llm, [output.request_id for output in outputs]) if edit_set else {}
    return Start(outputs, found, set(cache.rglob("*.so")) - before)


EDITING = pytest.mark.parametrize("name", ["one", "other", "one again"])


@EDITING
def test_rows_that_are_off_keep_the_bits_of_the_plain_compiled_engine(starts, name):
    plain, edited = starts["plain"], starts[name]
    for index in UNTOUCHED:
        assert token_ids(edited.outputs[index]) == token_ids(plain.outputs[index])
        assert logprobs(edited.outputs[index]) == logprobs(plain.outputs[index])


@EDITING
def test_no_cache_leaves_the_patch_out(starts, name):
    """Neither the plain server's graphs nor those for another layer are taken for one's own."""
    plain, edited = starts["plain"], starts[name]
    for index, (prompt, options) in enumerate(MIXED):
        assert edited.is_on(index) is (prompt in EDITED and options != OFF)
    for index in range(len(EDITED)):
        assert token_ids(edited.outputs[index]) != token_ids(plain.outputs[index])


def test_a_second_start_compiles_nothing(starts):
    for name in ("plain", "one", "other"):
        assert starts[name].kernels
    assert not starts["one again"].kernels
    for first, again in zip(starts["one"].outputs, starts["one again"].outputs, strict=True):
        assert logprobs(first) == logprobs(again)
