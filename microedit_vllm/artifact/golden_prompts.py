"""`golden_prompts.json`: prompts with which a running engine proves where it reads z.

Golden activations prove the SAE; they are given z. What a layer off by one, a residual read before
it is summed, or a patch that never ran spoils is z itself, and that shows on prompts only.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from microedit_vllm.errors import MicroEditError

Misreading = Literal["layer_before", "layer_after", "hidden_states_alone", "residual_alone"]
TokenId = Annotated[int, Field(ge=0, strict=True)]
Ard = Annotated[float, Field(ge=0)] | None


class GoldenPrompt(BaseModel):
    """One prompt and what an engine must make of it.

    Attributes:
        token_ids: the request's prompt.
        edit_from: the decision position e.
        ard: the decision's statistic; None where nothing is scored.
        on: the switch.
        edited, plain: the first greedy answer tokens with the set and without it, as far as they
            are clear: they end in front of the first place where rounding could choose another
            token, and may be empty.
        misread: the ARD if z were read elsewhere: one layer too early or too late, or with one
            addend of the layer's last sum (vLLM's `hidden_states` and `residual`) left out. A
            misreading that the model does not have is absent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    token_ids: tuple[TokenId, ...] = Field(min_length=1)
    edit_from: int = Field(ge=0)
    ard: Ard
    on: bool
    edited: tuple[TokenId, ...]
    plain: tuple[TokenId, ...]
    misread: dict[Misreading, Ard]

    @model_validator(mode="after")
    def _consistent(self) -> "GoldenPrompt":
        if self.edit_from >= len(self.token_ids):
            raise ValueError(f"edit_from {self.edit_from} is beyond {len(self.token_ids)} tokens")
        if self.on and self.ard is None:
            raise ValueError("the switch is on and nothing is scored")
        return self


_FILE = TypeAdapter(tuple[GoldenPrompt, ...])


def write_golden_prompts(prompts: Sequence[GoldenPrompt], path: Path) -> None:
    """Write the file; nothing where there are no prompts."""
    if prompts:
        path.write_bytes(_FILE.dump_json(tuple(prompts), indent=1) + b"\n")


def read_golden_prompts(path: Path) -> tuple[GoldenPrompt, ...]:
    """Read and check the file; empty where it is missing, as in sets of older releases.

    Raises:
        MicroEditError: not JSON, or not golden prompts.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise MicroEditError(f"{path} cannot be read ({error}); make the set again") from error
    try:
        return _FILE.validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise MicroEditError(f"{path}: {where}: {first['msg']}; make the set again") from error
