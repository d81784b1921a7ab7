import json

import pytest

from microedit_trainer.run_config import RunConfig, shipped_configs
from microedit_vllm.errors import MicroEditError


def test_the_paper_s_settings_ship():
    assert shipped_configs() == ["llama3-8b", "mistral-7b"]
    llama, mistral = (RunConfig.find(name) for name in shipped_configs())
    assert llama.sae == {"layer": 30, "width": 131_072, "k": 192}
    # Layer 24 of the paper: SAE Lens' blocks.24.hook_resid_pre is the output of layer 23.
    assert mistral.sae == {"layer": 23, "width": 65_536, "k": 400}
    for config in (llama, mistral):
        solver = {"solver": "sequential", "position": "sequence", "lr": 5e-5, "alpha": 600}
        assert config.edit == solver | {
            "passes": 1,
            "rows_per_fact": 0,
            "statistic": "absolute",
        }
        assert str(config.sae["k"]) in config.description
    assert "hook_resid_pre" in mistral.description
    assert "calls the layer 24" in mistral.description


@pytest.mark.parametrize(
    ("name", "facts", "tau"),
    [
        ("llama3-8b", 1, 0.5),
        ("llama3-8b", 99, 0.5),
        ("llama3-8b", 100, 0.55),
        ("llama3-8b", 10_000, 0.55),
        ("mistral-7b", 10, 0.1),
        ("mistral-7b", 100, 0.15),
    ],
)
def test_tau_goes_by_the_number_of_facts(name, facts, tau):
    assert RunConfig.find(name).tau(facts) == tau


def test_a_file_has_the_same_form(tmp_path):
    path = tmp_path / "ours.json"
    path.write_text(json.dumps({"edit": {"rows-per-fact": 9, "tau": 0.4}, "sae": {"k": 32}}))
    config = RunConfig.find(str(path))
    assert config.edit == {"rows_per_fact": 9}
    assert (config.tau(1), config.tau(500)) == (0.4, 0.4)
    assert config.other_sae(3, 512, 8) == ["k = 8, not 32"]
    assert config.other_sae(None, 512, 32) == []
    path.write_text("{}")
    assert RunConfig.find(str(path)).tau(100) is None


BAD = {
    "[": "is not JSON",
    "[]": "it is not a JSON object",
    '{"edits": {}}': "edits is not known; known are description, sae, train, edit",
    '{"edit": []}': "edit is not a JSON object",
    '{"sae": {"width": 8.5}}': "width is 8.5; it must be a number",
    '{"sae": {"n": 8}}': "sae: n is not known; known are layer, width, k",
    '{"edit": {"tau": "low"}}': "tau must be a number or a list",
    '{"edit": {"tau": [[100, 0.5, 1]]}}': "tau must be a number or a list",
    '{"edit": {"tau": [[1, -0.5]]}}': "tau must be a number or a list",
}


@pytest.mark.parametrize(("text", "message"), BAD.items())
def test_what_is_no_config_is_refused(tmp_path, text, message):
    path = tmp_path / "ours.json"
    path.write_text(text)
    with pytest.raises(MicroEditError, match=message.replace("[", r"\[")) as raised:
        RunConfig.find(str(path))
    assert str(path) in str(raised.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(MicroEditError, match="no config llama; known ones are llama3-8b, mistral"):
        RunConfig.find("llama")
