"""Guard only; filled below."""

if __name__ != "moa.evaluation":
    raise ImportError("import moa.evaluation, not evaluation: run 'pip install -e .' in the repository first")
