"""Training, thin over TRL and transformers' Trainer: one adapter a task, then the router over them."""

if __name__ != "moa.training":
    raise ImportError("import moa.training, not training: run 'pip install -e .' in the repository first")
