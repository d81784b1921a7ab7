"""From the setting to vLLM's configuration, before any engine."""

import subprocess
import sys
from typing import Any

import pytest

from microedit_vllm.config import ServingConfig
from microedit_vllm.errors import MicroEditError
from microedit_vllm.plugin import register
from tests.microedit_vllm.engine.synthetic import LAYER, change_manifest


@pytest.fixture(scope="module")
def make_config(smollm2) -> Any:
    from vllm import EngineArgs

    def make(**arguments: Any) -> Any:
        return EngineArgs(str(smollm2), enforce_eager=True, **arguments).create_engine_config()

    return make


def setting(folder: Any, **more: Any) -> dict[str, Any]:
    return {"microedit": {"edit_set": str(folder), **more}}


def test_without_the_setting_the_configuration_is_vllms_own(make_config):
    config = make_config()
    assert config.additional_config == {}
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.scheduler_config.scheduler_cls is None


def test_the_setting_names_our_worker_and_scheduler_and_the_layer(make_config, edit_set):
    config = make_config(additional_config=setting(edit_set))
    assert config.parallel_config.worker_cls == "microedit_vllm.engine.worker.EditCPUWorker"
    assert config.scheduler_config.scheduler_cls.startswith("microedit_vllm.engine.scheduler.Edit")
    read_back = ServingConfig.from_additional_config(config.additional_config)
    assert read_back == ServingConfig(edit_set.resolve(), None, LAYER)


def test_a_plain_server_s_compile_cache_is_not_ours(make_config, edit_set):
    plain, edited = make_config(), make_config(additional_config=setting(edit_set))
    assert plain.compute_hash() != edited.compute_hash()


def test_a_compile_cache_that_the_user_named_is_not_shared_with_a_plain_server(
    make_config, edit_set, tmp_path
):
    named = {"cache_dir": str(tmp_path)}
    plain = make_config(compilation_config=named)
    edited = make_config(compilation_config=named, additional_config=setting(edit_set))
    assert plain.compilation_config.cache_dir == str(tmp_path)
    assert edited.compilation_config.cache_dir == str(tmp_path / f"microedit-layer-{LAYER}")


def test_registering_twice_changes_nothing():
    from vllm import EngineArgs

    register()
    before = EngineArgs.create_engine_config
    register()
    assert EngineArgs.create_engine_config is before


def test_registering_is_silent_and_does_not_start_the_engine_s_code():
    check = (
        "import sys, vllm.plugins as p; p.load_general_plugins();"
        "sys.exit(any(name.startswith('microedit_vllm.engine.worker') for name in sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", check], capture_output=True, check=False)
    assert ended.returncode == 0
    assert b"microedit" not in (ended.stdout + ended.stderr).lower()


def test_offline_a_wrong_set_is_an_error_of_ours(make_config, copied_set):
    change_manifest(copied_set, position="sequence")
    with pytest.raises(MicroEditError, match="sequence"):
        make_config(additional_config=setting(copied_set))


@pytest.mark.parametrize(
    "value", ["folder", {}, {"edit_set": ""}, {"edit_set": 3}, {"edit_set": "x", "tau": 1}]
)
def test_a_setting_of_another_shape_is_refused_in_one_line(value):
    with pytest.raises(MicroEditError, match="additional_config") as caught:
        ServingConfig.from_additional_config({"microedit": value})
    assert "\n" not in str(caught.value)
