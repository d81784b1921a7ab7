"""Operators of MicroEdit: tensors in, tensors out.

Each operator is a folder whose ``reference.py`` (plain torch, with the equation numbers of
Wang et al., EMNLP 2025) is its definition. Nothing here imports the rest of the project.
"""
