"""Spills within loops, found in the assembly: there they cost time at every step.

A spill between two loops costs next to nothing, so a count over the kernel says too little.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Syntax:
    """How to read one kind of assembly, line by line.

    Attributes:
        label: a line that names the place behind it (group 1).
        target: a place that an instruction may go to (group 1).
        leaves: an instruction behind which the next one does not run.
        spill: an instruction that writes or reads what was spilled.
    """

    label: re.Pattern[str]
    target: re.Pattern[str]
    leaves: re.Pattern[str]
    spill: re.Pattern[str]


# What nvdisasm -c prints.
SASS = Syntax(
    label=re.compile(r"^(\.L_x_\d+):"),
    target=re.compile(r"`\((\.L_x_\d+)\)"),
    # A predicate would stand between the address and the instruction, or behind its name.
    leaves=re.compile(r"\*/\s+(BRA `|EXIT\s*;|RET\b)"),
    spill=re.compile(r"\b(LDL|STL)\b"),
)
AMDGCN = Syntax(
    label=re.compile(r"^(\.LBB\w+):"),
    target=re.compile(r"\bs_c?branch\w*\s+(\.LBB\w+)"),
    leaves=re.compile(r"\b(s_branch|s_endpgm)\b"),
    # Kernels of ours have no other use of scratch memory.
    spill=re.compile(r"\bscratch_(load|store)|Folded (Spill|Reload)"),
)


def _blocks(lines: Sequence[str], syntax: Syntax) -> tuple[list[list[str]], list[set[int]]]:
    """Runs of lines that are entered at the first only, and where each may go on."""
    blocks: list[list[str]] = [[]]
    starts: dict[str, int] = {}
    for line in lines:
        if label := syntax.label.match(line):
            blocks.append([])
            starts[label[1]] = len(blocks) - 1
        blocks[-1].append(line)
        if syntax.target.search(line) or syntax.leaves.search(line):
            blocks.append([])
    next_blocks = []
    for index, block in enumerate(blocks):
        last = block[-1] if block else ""
        following = {starts[name] for name in syntax.target.findall(last) if name in starts}
        if not syntax.leaves.search(last) and index + 1 < len(blocks):
            following.add(index + 1)
        next_blocks.append(following)
    return blocks, next_blocks


def _comes_back(start: int, next_blocks: Sequence[set[int]]) -> bool:
    seen: set[int] = set()
    waiting = list(next_blocks[start])
    while waiting:
        block = waiting.pop()
        if block == start:
            return True
        if block not in seen:
            seen.add(block)
            waiting += next_blocks[block]
    return False


def spills_in_loops(assembly: str, syntax: Syntax) -> int:
    """How many instructions that write or read spilled registers can run more than once."""
    blocks, next_blocks = _blocks(assembly.splitlines(), syntax)
    count = 0
    for index, block in enumerate(blocks):
        spills = sum(1 for line in block if syntax.spill.search(line))
        if spills and _comes_back(index, next_blocks):
            count += spills
    return count
