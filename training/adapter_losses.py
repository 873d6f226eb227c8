"""How well each expert answers each example: the right expert is the one that answers best."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

import torch
from jaxtyping import Float
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from moa.answer_losses import cross_entropy
from moa.answer_rows import Row, predict
from moa.base_model import cache_dir
from moa.fingerprint import fingerprint
from moa.model import MoaModel
from moa.model_objective import experts_sha256


def losses_of_experts(
    model: MoaModel, rows: Sequence[Row], *, padding: int, batch_size: int = 16
) -> Float[Tensor, "rows experts"]:
    """-log p(answer) of each row under each expert alone, mean over the answer's tokens, in nats; kept in the cache.

    Every row of a batch may run another expert, so that the batches hold rows of like lengths.
    """
    asked = [fingerprint(model.get_base_model()), *experts_sha256(model), [[row.ids, row.answer] for row in rows]]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    file = cache_dir() / "losses" / f"{digest}.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        save_file({"losses": _computed(model, rows, padding, batch_size)}, scratch)
        scratch.replace(file)
    return load_file(file)["losses"]


@torch.no_grad()
def _computed(model: MoaModel, rows: Sequence[Row], padding: int, batch_size: int) -> Tensor:
    count = len(model.experts)
    pairs = [(place, expert) for place in range(len(rows)) for expert in range(count)]
    pairs.sort(key=lambda pair: len(rows[pair[0]].ids))
    losses = torch.empty(len(rows), count)
    starts = range(0, len(pairs), batch_size)
    for start in track(starts, description=f"{len(rows)} answers under {count} experts", transient=True):
        places, experts = map(list, zip(*pairs[start : start + batch_size], strict=True))
        with model.route_state.gated(F.one_hot(torch.tensor(experts), count).float().to(model.device)):
            predicted = predict(model, [rows[place] for place in places], padding)
        losses[places, experts] = cross_entropy(predicted).float().cpu()
    return losses
