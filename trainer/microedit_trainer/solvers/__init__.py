"""Two ways from facts to decoder changes, behind one interface (`Solver`)."""

from microedit_trainer.solvers.executors import Executor, InProcess, Processes, RayCluster
from microedit_trainer.solvers.joint import JointSolver
from microedit_trainer.solvers.problem import EditProblem, Solution, Solver
from microedit_trainer.solvers.sequential import SequentialSolver

__all__ = [
    "EditProblem",
    "Executor",
    "InProcess",
    "JointSolver",
    "Processes",
    "RayCluster",
    "SequentialSolver",
    "Solution",
    "Solver",
]
