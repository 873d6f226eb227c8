"""Evaluation: systems on tasks, cell by cell, and the answer in one table and one page."""

if __name__ != "moa.evaluation":
    raise ImportError("import moa.evaluation, not evaluation: run 'pip install -e .' in the repository first")
