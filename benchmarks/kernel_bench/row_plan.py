"""Row plan: its launches and its definition."""

import torch

from benchmarks.kernel_bench.adapter import Activity, Adapter, Inputs, require
from benchmarks.kernel_bench.floors import Work
from benchmarks.kernel_bench.shapes import Case
from benchmarks.kernel_bench.timing import Launch
from microedit_kernels.row_plan import kernel, reference


class RowPlan(Adapter):
    """Plans `activity`, which may be another operator's."""

    variants = 1

    def __init__(self, case: Case, inputs: Inputs, activity: Activity | None = None) -> None:
        self.activity = activity or Activity(inputs, case.rows)

    def launch(self, variant: int) -> None:
        a = self.activity
        kernel.group_rows(a.keys, a.rows, a.offsets)

    def check_active(self) -> None:
        a = self.activity
        rows, offsets = reference.group_rows(a.keys, a.num_keys)
        a.rows.fill_(-1)
        a.offsets.fill_(-1)
        self.launch(0)
        require(torch.equal(a.offsets, offsets), "offsets are wrong")
        require(torch.equal(a.rows[: len(rows)], rows), "rows are wrong")
        require((a.rows[len(rows) :] == -1).all(), "rows are written beyond their number")

    def work(self) -> Work:
        return Work(2 * self.activity.keys.nbytes + self.activity.offsets.nbytes)

    def baseline(self, variant: int) -> Launch | None:
        """All rows in order of key, and the offsets; the reference reads how many are active."""
        keys = self.activity.keys
        marks = torch.arange(-1, self.activity.num_keys, device=keys.device)
        return lambda: (keys.sort(stable=True), (keys[:, None] <= marks).sum(0))
