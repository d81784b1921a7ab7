"""Two ways from facts to decoder changes, behind one interface (`Solver`)."""

from microedit_trainer.solvers.joint import JointSolver
from microedit_trainer.solvers.problem import EditProblem, Solution, Solver
from microedit_trainer.solvers.sequential import SequentialSolver

__all__ = ["EditProblem", "JointSolver", "SequentialSolver", "Solution", "Solver"]
