"""How many facts each table edits."""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.quality.records import Chosen


@dataclass(frozen=True)
class Plan:
    """Attributes:
    few: of a set that is small on purpose.
    some, more: of ZsRE, jointly and (some) sequentially.
    between: of both, more than those and fewer than all.
    all_records: every record of ZsRE and CounterFact.
    budgets: decoder rows in each change that has a budget, by what is edited; None: all of them.
    sequential_budgets: decoder rows a fact, of the sequential solver; None: all of them.
    ablated: what the variations edit: the first all of them, the others those that matter.
    """

    few: Chosen
    some: Chosen
    more: Chosen
    between: Chosen
    all_records: Chosen
    selfcheck: Chosen
    budgets: Mapping[Chosen, tuple[int | None, ...]]
    sequential_budgets: Mapping[Chosen, tuple[int | None, ...]]
    ablated: tuple[Chosen, ...]


def zsre(count: int, counterfact: int = 0) -> Chosen:
    """So many ZsRE records, and so many of CounterFact."""
    own = (("zsre", count),)
    return (*own, ("counterfact", counterfact)) if counterfact else own


FULL = Plan(
    few=zsre(10),
    some=zsre(100),
    more=zsre(300),
    between=zsre(300, 700),
    all_records=zsre(600, 1000),
    selfcheck=(("selfcheck", 100),),
    budgets={
        zsre(10): (100, 300, 1000, None),
        zsre(100): (1000, 2000, 3000, 6000, None),
        zsre(300, 700): (5000, 10_000, None),
    },
    sequential_budgets={zsre(10): (40, 100, None), zsre(100): (20, 40, None)},
    ablated=(zsre(100), zsre(300)),
)
# To try the whole way: minutes, and figures that mean little.
QUICK = Plan(
    few=zsre(4),
    some=zsre(10),
    more=zsre(30),
    between=zsre(20, 10),
    all_records=zsre(10, 10),
    selfcheck=(("selfcheck", 10),),
    budgets={zsre(10): (100, 500, None), zsre(20, 10): (500, None)},
    sequential_budgets={zsre(10): (20, None)},
    ablated=(zsre(10), zsre(30)),
)
