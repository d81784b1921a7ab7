import pytest
import torch

from microedit_trainer.solvers.kept_solution import KeptSolution

ROWS = torch.tensor([2, 5, 9])


@pytest.fixture
def change():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def kept_in(folder, name="scoring", origin="here"):
    return KeptSolution(folder, name, origin)


def test_rows_find_their_values_and_new_ones_start_at_0(tmp_path, change):
    kept_in(tmp_path).keep(ROWS, change)
    rows = torch.tensor([0, 2, 3, 9, 12])
    found = kept_in(tmp_path).start(rows, 4)
    wanted = torch.zeros(5, 4)
    wanted[1], wanted[3] = change[0], change[2]
    assert torch.equal(found, wanted)


def test_the_last_solution_takes_the_place_of_the_one_before(tmp_path, change):
    kept_in(tmp_path).keep(ROWS, change)
    kept_in(tmp_path).keep(ROWS[:2], 2 * change[:2])
    assert torch.equal(
        kept_in(tmp_path).start(ROWS, 4), torch.cat([2 * change[:2], 0 * change[:1]])
    )
    assert len(list(tmp_path.iterdir())) == 1


def test_another_change_model_or_width_starts_at_nothing(tmp_path, change):
    kept_in(tmp_path).keep(ROWS, change)
    assert kept_in(tmp_path, name="edit").start(ROWS, 4) is None
    assert kept_in(tmp_path, origin="elsewhere").start(ROWS, 4) is None
    assert kept_in(tmp_path).start(ROWS, 5) is None


def test_without_a_folder_nothing_is_kept(tmp_path, change):
    kept_in(None).keep(ROWS, change)
    assert kept_in(None).start(ROWS, 4) is None


def test_a_damaged_file_counts_as_none(tmp_path, change):
    kept_in(tmp_path).keep(ROWS, change)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert kept_in(tmp_path).start(ROWS, 4) is None
