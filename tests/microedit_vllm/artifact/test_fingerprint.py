import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from microedit_vllm.artifact import fingerprint_model
from microedit_vllm.errors import MicroEditError


def weights():
    torch.manual_seed(0)
    return {f"layers.{i}.weight": torch.randn(3, 4) for i in range(4)}


def save_shards(folder, *shards):
    folder.mkdir()
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-{number}.safetensors")
    return fingerprint_model(folder)


def test_sharding_and_the_folder_do_not_matter(tmp_path):
    tensors = list(weights().items())
    whole = save_shards(tmp_path / "whole", dict(tensors))
    halves = save_shards(tmp_path / "halves", dict(tensors[2:]), dict(tensors[:2]))
    assert whole == halves


def changed_weight(tensors):
    tensors["layers.1.weight"][2, 3] += 1e-3


def changed_name(tensors):
    tensors["layers.9.weight"] = tensors.pop("layers.1.weight")


def changed_shape(tensors):
    tensors["layers.1.weight"] = tensors["layers.1.weight"].reshape(4, 3).contiguous()


def changed_dtype(tensors):
    tensors["layers.1.weight"] = tensors["layers.1.weight"].view(torch.int32)


def one_more(tensors):
    tensors["extra"] = torch.zeros(1)


@pytest.mark.parametrize(
    "change", [changed_weight, changed_name, changed_shape, changed_dtype, one_more]
)
def test_every_change_shows(tmp_path, change):
    before = save_shards(tmp_path / "before", weights())
    tensors = weights()
    change(tensors)
    assert save_shards(tmp_path / "after", tensors) != before


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(MicroEditError, match=r"no \*\.safetensors weights"):
        fingerprint_model(tmp_path)


def with_header(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 16


def entry(begin, end):
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        struct.pack("<Q", 2**62),
        with_header(b"{"),
        with_header([1]),
        with_header(b"[" * 50_000),
        with_header({"a": 3}),
        with_header({"a": {"dtype": "F32", "shape": [4]}}),
        with_header(entry("x", 16)),
        with_header(entry(8, 0)),
        with_header(entry(-(2**40), 0)),
    ],
    ids=[
        "empty",
        "short",
        "huge",
        "not json",
        "list",
        "nested",
        "no entry",
        "no offsets",
        "text offsets",
        "backwards",
        "negative",
    ],
)
def test_hostile_headers_are_refused(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(MicroEditError, match="is damaged"):
        fingerprint_model(tmp_path)
