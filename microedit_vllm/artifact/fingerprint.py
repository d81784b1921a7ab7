"""What makes a base model this one and no other."""

import hashlib
import json
import struct
from pathlib import Path

from microedit_vllm.errors import MicroEditError

_BYTES_PER_TENSOR = 4096
_MAX_HEADER = 100_000_000


def fingerprint_model(folder: Path) -> str:
    """Fingerprint of a Hugging Face model folder, in milliseconds.

    SHA-256 over every tensor's name, dtype, shape and first 4,096 bytes, in order of name, so
    that it does not depend on how the weights are sharded, on file times or on the folder's name.

    Raises:
        MicroEditError: no safetensors weights, or a damaged file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MicroEditError(
            f"{folder} has no *.safetensors weights; "
            "save the model with save_pretrained() and name that folder"
        )
    tensors: dict[str, bytes] = {}
    for path in files:
        tensors.update(_tensor_samples(path))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name])
    return digest.hexdigest()


def _tensor_samples(path: Path) -> dict[str, bytes]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError("header too long")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("header is not a JSON object")
            header.pop("__metadata__", None)
            samples = {}
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end:
                    raise ValueError(f"offsets of {name!r} run backwards")
                file.seek(8 + length + begin)
                sample = file.read(min(end - begin, _BYTES_PER_TENSOR))
                samples[name] = f"{entry['dtype']}{entry['shape']}".encode() + sample
            return samples
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise MicroEditError(f"{path} is damaged ({error}); fetch the model again") from error
