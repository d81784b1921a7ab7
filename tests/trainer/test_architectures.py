"""Every architecture that is served goes through `microedit edit` and `microedit eval`."""

import json

import pytest
import torch

from microedit_trainer import calibration_prompts, edit_run
from microedit_trainer.contexts import Contexts, PromptTokens
from microedit_trainer.evaluation import TorchEngine
from microedit_trainer.language_model import LanguageModel
from microedit_vllm.artifact import EditOperator, EditSet, SparseAutoencoder
from microedit_vllm.cli.main import main
from tests.builders import tiny_sae
from tests.tiny_architectures import CONFIGS, HIDDEN, tiny_architecture
from tests.trainer.tiny_edits import FACTS

LAYER = 1


def microedit(*words: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert not stopped.value.code


@torch.no_grad()
def edited_logits(lm: LanguageModel, operator: EditOperator, prompt: PromptTokens) -> torch.Tensor:
    """At the answer's places, [A, vocabulary]: the model's own forward, z changed by a hook."""
    start = prompt.edit_from

    def substitute(module: object, args: object, output: object) -> object:
        z = output[0] if isinstance(output, tuple) else output
        z = torch.cat([z[:, :start], operator.edited(z[:, start:]).to(z.dtype)], dim=1)
        return (z, *output[1:]) if isinstance(output, tuple) else z

    hook = lm.decoder_layers[LAYER].register_forward_hook(substitute)
    ids = torch.tensor([[*prompt.prompt_ids, *prompt.answer_ids]])
    logits = lm.model(input_ids=ids, use_cache=False).logits[0, start:-1]
    hook.remove()
    return logits


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_set_is_made_and_scored(architecture, tmp_path, monkeypatch, capsys):
    few = [line for line in calibration_prompts.ordinary_lines() if len(line) < 60][:6]
    for module in (calibration_prompts, edit_run):
        monkeypatch.setattr(module, "ordinary_lines", lambda: few)
    monkeypatch.setattr(
        calibration_prompts, "unedited_subjects", lambda others: ["Peru", "Bach", "chess"]
    )
    model = tiny_architecture(architecture, tmp_path / "model")
    tiny_sae(d=HIDDEN, n=256, k=8).save(tmp_path / "sae")
    records = [{"prompt": f.prompt, "target": f.target, "subject": f.subject} for f in FACTS[:2]]
    data = tmp_path / "facts.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    where = ("--sae", tmp_path / "sae", "--layer", LAYER, "--context", "bare", "--tau", "0.95")
    microedit("edit", "--model", model, *where, "--data", data, "--out", tmp_path / "set")
    capsys.readouterr()
    microedit("eval", "--model", model, "--edits", tmp_path / "set", "--data", data, "--json")
    scores = json.loads(capsys.readouterr().out)

    edit_set = EditSet.load(tmp_path / "set")
    operator = EditOperator.build(edit_set, SparseAutoencoder.load(tmp_path / "sae"))
    engine = TorchEngine.build(LanguageModel.load(str(model)), operator)
    contexts = Contexts.build(engine.lm.tokenizer, edit_set.manifest.decision.scope, 128)
    right = []
    for fact, line in zip(FACTS, edit_set.facts, strict=False):
        prompt = contexts.render("bare", fact.prompt, fact.target)
        logits = edited_logits(engine.lm, operator, prompt)
        (outcome,), (plain,) = engine.edited([prompt]), engine.plain([prompt])
        assert outcome.on
        assert outcome.answer.tolist() == logits.argmax(-1).tolist()
        # Cohere's logits are a sixteenth: its edits here are too weak for another token.
        assert "Cohere" in architecture or outcome.answer.tolist() != plain.tolist()
        right.append(float((logits.argmax(-1) == torch.tensor(prompt.answer_ids)).float().mean()))
        assert line["rel"] == pytest.approx(right[-1], abs=1e-4)
    assert scores["rel"] == pytest.approx(sum(right) / len(right))
    assert scores["fire_edit"] == 1
