"""Guard only; filled below."""

if __name__ != "moa.training":
    raise ImportError("import moa.training, not training: run 'pip install -e .' in the repository first")
