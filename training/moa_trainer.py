"""Train a mixture's router, its experts, or both, end to end with transformers' Trainer or TRL's SFTTrainer.

    model.moa_router.requires_grad_(True)         # what is to be trained: the router,
    model.set_requires_grad(["cats", "dogs"])     # and these experts (PEFT's own method)
    MoaTrainer(model=model, args=training, train_dataset=rows).train()

Hooks only. The loss is the trainer's own; rows with a column `task`, the index of the expert that they belong to,
add the router's cross-entropy to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from trl import SFTTrainer

from moa.config import GATES_NAME, ROUTER_NAME
from moa.model import MoaModel
from moa.peft_export import adapter_dtype
from moa.routing import RoutingMode
from moa.training.routing_tally import UNKNOWN


class MoaTrainerMixin:
    """Before a Trainer in the bases of a class, makes it one for a `MoaModel`.

        loss = language-model loss + router_loss_weight * cross-entropy(router's logits, task)

    The router reads the prompt alone, which is what `labels` mark with -100. Checkpoints are mixtures, saved and
    loaded whole; a run that was killed and resumed ends with the very weights of one that was not.

    Args:
        routing: how prompts are routed in training; default `soft` where the router learns, for a hard choice has no
            gradient, and else the mixture's own mode, which evaluations always use.
        router_loss_weight: factor on the cross-entropy of rows that name their `task`.

    Raises:
        TypeError: the model is no `MoaModel`.
        ValueError: nothing is trainable, or the arguments ask for what would let the router read the answer (label
            smoothing, a loss function of the caller's) or lose the rows' tasks (packing).
    """

    def __init__(self, *args: Any, routing: RoutingMode | None = None, router_loss_weight: float = 1.0, **kwargs: Any):
        model = kwargs.get("model", args[0] if args else None)
        if not isinstance(model, MoaModel):
            raise TypeError(
                f"{type(self).__name__} trains a MoaModel, got a {type(model).__name__}: "
                "make one with MoaModel.from_adapters"
            )
        columns = getattr(kwargs.get("train_dataset"), "column_names", None) or ()
        super().__init__(*args, **kwargs)
        _check(self, columns)
        _drop_thresholds(model)
        _check_fallback(model)
        self.routing = routing or _training_mode(model)
        self.router_loss_weight = router_loss_weight
        self.data_collator = keep_task(self.data_collator, model.experts)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        training = self.model.training
        with routed(self.model, self.routing if training else self.model.moa_config.routing):
            loss, outputs = _pair(super().compute_loss(model, inputs, return_outputs, num_items_in_batch))
        if inputs.get("task") is not None:
            # with num_items_in_batch the trainer leaves the division by the accumulated batches to the loss
            steps = self.current_gradient_accumulation_steps if training and num_items_in_batch is not None else 1
            loss = loss + self.router_loss_weight * self._router_loss(inputs["task"]) / steps
        return (loss, outputs) if return_outputs else loss

    def _router_loss(self, task: Tensor) -> Tensor:
        if self.model.last_routing is None:
            raise ValueError(
                "the rows name their task, and no router was asked, for the route is pinned or tokens choose for "
                "themselves: drop the column 'task', or route by the router"
            )
        return task_loss(self.model.last_routing.logits, task)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "task" not in self._signature_columns:
            self._signature_columns.append("task")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        refresh_fallback(self.model)
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        restore(self.model, self.state.best_model_checkpoint)


class MoaTrainer(MoaTrainerMixin, Trainer):
    """transformers' Trainer for a `MoaModel`; see `MoaTrainerMixin`."""


class MoaSFTTrainer(MoaTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer for a `MoaModel`; see `MoaTrainerMixin`. No telemetry is sent."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The mixture has written its own."""

    def _send_telemetry(self) -> None:
        return


@contextmanager
def routed(model: MoaModel, mode: RoutingMode) -> Iterator[None]:
    """Route forwards inside the block in this mode."""
    before = model.moa_config.routing
    model.moa_config.routing = mode
    try:
        yield
    finally:
        model.moa_config.routing = before


def task_loss(logits: Float[Tensor, "batch experts"], task: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the router on the rows whose task is known, in nats; zero where none is."""
    known = task.ne(UNKNOWN).sum().clamp(min=1)
    return F.cross_entropy(logits, task, ignore_index=UNKNOWN, reduction="sum") / known


Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


def keep_task(collate: Collator, experts: Sequence[str]) -> Collator:
    """A collator that passes the rows' `task`, an expert's index or name, on beside what `collate` makes of the rest.

    The result raises a ValueError where a task is no expert.
    """
    index = {name: place for place, name in enumerate(experts)}
    allowed = {UNKNOWN, *index.values()}

    def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
        if "task" not in rows[0]:
            return collate(rows)
        batch = collate([{name: value for name, value in row.items() if name != "task"} for row in rows])
        tasks = [index.get(row["task"], row["task"]) for row in rows]
        strange = [task for task in tasks if task not in allowed]
        if strange:
            raise ValueError(
                f"a row's task is {strange[0]!r}, and the experts are {', '.join(experts)}: give a name, an index "
                f"from 0 to {len(experts) - 1}, or {UNKNOWN} where the expert is unknown"
            )
        return {**batch, "task": torch.tensor([int(task) for task in tasks])}

    return collated


def refresh_fallback(model: MoaModel) -> None:
    """Merge the experts anew where they are being trained, as the fallback was merged.

    Leaves what is trainable, the random numbers and the mode as they are, so that saving does not change a training.
    """
    if not trained_experts(model):
        return
    with undisturbed(model):
        model.merge_fallback_again()


@contextmanager
def undisturbed(model: MoaModel) -> Iterator[None]:
    """Loading, merging and evaluating inside the block leaves no trace on a training."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    training, last = model.training, (model.last_routing, model.last_task)
    on_gpu = model.device.type != "cpu"
    with torch.random.fork_rng([model.device] if on_gpu else [], device_type=model.device.type if on_gpu else "cuda"):
        try:
            yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trainable)
            model.train(training)
            model.last_routing, model.last_task = last


def restore(model: MoaModel, directory: str | Path) -> None:
    """Put the experts and the router of a saved mixture into this model, in place, so that optimizers keep theirs.

    Raises:
        ValueError: the folder holds no mixture of these experts.
    """
    directory = Path(directory)
    missing = [f"expert {name!r}" for name in model.experts if not (directory / name).is_dir()]
    parts = {ROUTER_NAME: model.moa_router, GATES_NAME: model.moa_gates}
    held = {name: part for name, part in parts.items() if part is not None}
    missing += [name for name in held if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory} has no {missing[0]}: resume from a checkpoint of this mixture's own training")
    widened = adapter_dtype(model.get_base_model()) == torch.float32
    for name in model.experts:
        # as if trainable, for else PEFT puts the whole model into evaluation mode
        model.load_adapter(str(directory / name), name, is_trainable=True, autocast_adapter_dtype=widened)
    for name, part in held.items():
        part.load_state_dict(load_file(directory / name))


def trained_experts(model: MoaModel) -> set[str]:
    """Names of the experts that have a trainable parameter."""
    trainable = {part for name, one in model.named_parameters() if one.requires_grad for part in name.split(".")}
    return trainable & set(model.experts)


def _training_mode(model: MoaModel) -> RoutingMode:
    return "soft" if _router_learns(model) else model.moa_config.routing


def _router_learns(model: MoaModel) -> bool:
    router = model.moa_router
    return router is not None and any(parameter.requires_grad for parameter in router.parameters())


def _check_fallback(model: MoaModel) -> None:
    """Find out before the first step whether saving can merge the fallback anew."""
    for name in trained_experts(model):  # what lies beside an adapter was collected before this training
        model.expert_folders.pop(name, None)
    try:
        refresh_fallback(model)
    except ValueError as error:
        raise ValueError(
            "the merged adapter is merged anew from the experts at every save, and "
            f"{model.moa_config.fallback.method!r} cannot ({error}): before the training call "
            "model.set_fallback('svd'), or another method that reads the adapters alone"
        ) from error


def _drop_thresholds(model: MoaModel) -> None:
    """Drop thresholds that belong to the router as it was, with a warning."""
    fitted = model.moa_config.router
    measured = {"calibration": None, "abstention": None, "conformal": None}
    if _router_learns(model) and any(getattr(fitted, name) is not None for name in measured):
        warnings.warn(
            "the router learns, so its calibration and its thresholds for strange prompts no longer hold and are "
            "dropped: this mixture trusts its experts with every prompt from now on",
            stacklevel=3,
        )
        model.moa_config.router = replace(fitted, **measured)


def _check(trainer: Trainer, columns: Sequence[str]) -> None:
    args, model = trainer.args, trainer.model
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "nothing in this mixture is trainable: call model.moa_router.requires_grad_(True), "
            "model.moa_gates.requires_grad_(True), or model.set_requires_grad([names of experts])"
        )
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        raise ValueError(
            "label smoothing and compute_loss_func keep the labels from the model, whose router would then read the "
            "answer: leave them out"
        )
    if getattr(args, "packing", False) and "task" in columns:
        raise ValueError("packing drops the column 'task': pass padding_free=True instead, or drop the column")


def _pair(result: Any) -> tuple[Tensor, Any]:
    return result if isinstance(result, tuple) else (result, None)
