"""What is measured: the paper's two SAEs, batch sizes, edit sets, and the model of the step."""

from dataclasses import dataclass, replace

OPERATORS = ("row_plan", "topk_encode", "sparse_decode", "edit_change")


@dataclass(frozen=True)
class SaeShape:
    """d: width of the residual stream; n: latents; k: active ones per token."""

    name: str
    d: int
    n: int
    k: int


@dataclass(frozen=True)
class ModelShape:
    """Of a decoder whose SAE sits behind layer `sae_layer` (0-based), and its cached tokens."""

    name: str
    d: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    sae_layer: int


@dataclass(frozen=True)
class EditShape:
    """`sets` edit sets of `latents` changed rows each, in one batch."""

    latents: int
    sets: int


@dataclass(frozen=True)
class Case:
    """One operator at one shape; `edit` for the edit change alone."""

    operator: str
    sae: SaeShape
    rows: int
    edit: EditShape | None = None

    @property
    def label(self) -> str:
        if self.operator == "row_plan":
            return "one key"
        if self.edit is None:
            return self.sae.name
        return f"{self.edit.latents:,} latents" + f" × {self.edit.sets}" * (self.edit.sets > 1)


@dataclass(frozen=True)
class Plan:
    """Everything of one run."""

    saes: tuple[SaeShape, ...]
    rows: tuple[int, ...]
    edits: tuple[EditShape, ...]
    model: ModelShape
    step_rows: tuple[int, ...]

    def cases(self, operators: tuple[str, ...]) -> list[Case]:
        found = []
        for operator in operators:
            # The row plan and the edit change do not depend on n and k.
            saes = self.saes if operator in ("topk_encode", "sparse_decode") else self.saes[:1]
            edits = self.edits if operator == "edit_change" else (None,)
            found += [
                Case(operator, sae, rows, edit)
                for sae in saes
                for edit in edits
                for rows in self.rows
            ]
        return found


LLAMA = SaeShape("LLaMA-3-8B", d=4096, n=131_072, k=192)
MISTRAL = SaeShape("Mistral-7B", d=4096, n=65_536, k=400)
LLAMA_MODEL = ModelShape("LLaMA-3-8B", 4096, 32, 32, 8, 128, 14_336, 128_256, 1024, sae_layer=30)
EDITS = (EditShape(5_000, 1), EditShape(500, 1), EditShape(500, 8))

FULL = Plan((LLAMA, MISTRAL), (1, 8, 64, 256, 2048, 8192), EDITS, LLAMA_MODEL, (1, 8, 64, 256))
QUICK = replace(FULL, rows=(1, 64, 2048), edits=EDITS[:1], step_rows=(64,))
# For the interpreter: sizes that are multiples of nothing in the second.
SMALL = Plan(
    (SaeShape("small", 64, 512, 16), SaeShape("odd", 72, 301, 7)),
    (1, 3, 8),
    (EditShape(40, 1), EditShape(13, 3)),
    ModelShape("small", 64, 3, 4, 2, 16, 96, 128, 16, sae_layer=1),
    (1, 3),
)
