"""The trainer of several adapters in one run: what is one for all in the Trainer is here one for each adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments, get_scheduler

from moa.mixture import RouteState, install
from moa.training.joint_batches import JointBatches, JointCollator, forwards_a_step, steps_alone
from moa.training.trainer import LoraTrainer, answer_positions

if TYPE_CHECKING:
    from datasets import Dataset

ONE_PASS = {
    "num_train_epochs": 1,
    "max_steps": -1,
    "train_sampling_strategy": "sequential",
}
"""`JointBatches` holds the whole run in its order, one forward an item; the Trainer only walks through it."""


class JointTrainer(LoraTrainer):
    """Trains all adapters of one PEFT model, each on its own task, as it would be trained alone.

    The loss is the sum over tasks of each task's own mean loss; gradients are clipped for each adapter by itself; each
    has its learning rate and its schedule over its own number of steps. An adapter whose steps are done takes no more,
    no weight decay either. Logs tell `loss/TASK` beside the sum. What is drawn at random while training (dropout, of
    the adapters or of the base model) is drawn for the joint batch, and is not what a run of one task would draw.

    Args:
        model: a PEFT model of plain LoRA adapters, one called after each task.
        args: settings of a run of one task; batch size and accumulation are of each task.
        datasets: the rows of each task, in TRL's formats.
        learning_rates: of each task.
        batch_size: rows of all tasks in one forward.
        kwargs: `processing_class`, `callbacks` of `SFTTrainer`.

    Raises:
        ValueError: a task without rows, a base model with a balance loss, a schedule that does not go by steps, or a
            loss that is no longer finite.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        datasets: Mapping[str, Dataset],
        learning_rates: Mapping[str, float],
        batch_size: int,
        **kwargs: Any,
    ):
        self.route = RouteState(tuple(datasets), model.peft_config)
        self.route.pinned = True
        install(model.get_base_model(), self.route)
        model.set_requires_grad(list(datasets))
        super().__init__(model, replace(args, **ONE_PASS), train_dataset=_join(datasets), **kwargs)
        if self.aux_loss_enabled:
            raise ValueError(
                "the base model balances its own experts by a loss over the batch, which would mix the tasks: pass "
                "--router_aux_loss_coef 0, or leave out --joint"
            )
        experts = self.train_dataset["expert"]
        sizes = [experts.count(place) for place in range(len(datasets))]
        runs = [steps_alone(size, args, name) for name, size in zip(datasets, sizes, strict=True)]
        self.args.gradient_accumulation_steps = forwards_a_step(runs, batch_size)
        self.args.per_device_train_batch_size = self._train_batch_size = 1  # an item; TRL saw how many rows one holds
        self.train_dataset = JointBatches(self.train_dataset, sizes, runs, batch_size)
        self.data_collator = JointCollator(self.data_collator, padding_free=args.padding_free)
        self.learning_rates = dict(learning_rates)
        self.steps = dict(zip(datasets, map(len, runs), strict=True))
        self.factors = {name: factors_of(model, name) for name in datasets}
        self.schedules = {name: schedule(args, learning_rates[name], steps) for name, steps in self.steps.items()}
        self.seen = torch.zeros(2, len(datasets), device=self.args.device)  # loss and steps since the last log
        self.told = torch.zeros(2, len(datasets))
        self.add_callback(NoStepWhenDone(self.factors, self.steps))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        experts, weights, rows = (inputs.pop(name) for name in ("experts", "weights", "rows"))
        if len(experts) == 0:
            return 0 * self.factors[self.route.experts[0]][0].sum()  # the Trainer calls backward on it
        # left set afterwards: gradient checkpointing recomputes the layers with it
        self.route.weights = F.one_hot(experts, len(self.steps)).float()
        self.route.token_rows = rows if self.args.padding_free else None
        losses, positions = answer_losses(model, inputs)
        rows = rows[:, positions + 1]
        shares = inputs["labels"][:, positions + 1].ne(-100) * weights[rows]
        losses = losses * weights[rows]
        self.seen.index_add_(1, experts[rows].flatten(), torch.stack([losses.detach(), shares]).flatten(1))
        return losses.sum() * self.accelerator.num_processes  # weights count every process's tokens, and DDP averages

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's, with groups of parameters for each adapter."""
        if self.optimizer is None:
            super().create_optimizer(model)
            groups = self.optimizer.param_groups
            of_adapters = {
                name: [_only(group, factors, lr=self.learning_rates[name]) for group in groups]
                for name, factors in self.factors.items()
            }
            owned = [(name, group) for name, of_one in of_adapters.items() for group in of_one if group["params"]]
            self.owners = [name for name, _ in owned]
            self.optimizer.param_groups = [group for _, group in owned]
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Each adapter's schedule runs over its own number of steps."""
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, [self.schedules[name] for name in self.owners])
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Each adapter's gradient to `max_grad_norm`; returns the norm of all before."""
        self.accelerator.unscale_gradients()
        norms = [nn.utils.clip_grad_norm_(factors, self.args.max_grad_norm) for factors in self.factors.values()]
        return torch.stack([norm.to(self.args.device) for norm in norms]).norm()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """All adapters trainable; the Trainer's own leaves all but the active one frozen."""
        for name in self.steps:
            self.model.load_adapter(Path(resume_from_checkpoint) / name, name, is_trainable=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update({f"loss/{name}": loss for name, loss in self._losses_since_last_log().items()})
        super().log(logs, start_time)

    def train_losses(self) -> dict[str, float]:
        """Mean loss of each task over the steps that this process ran."""
        self._losses_since_last_log()
        told = zip(self.steps, *self.told.tolist(), strict=True)
        return {name: loss / steps if steps else 0.0 for name, loss, steps in told}

    def _losses_since_last_log(self) -> dict[str, float]:
        seen = self.accelerator.reduce(self.seen, "sum").cpu()
        self.seen.zero_()
        self.told += seen
        losses = {name: loss / steps for name, loss, steps in zip(self.steps, *seen.tolist(), strict=True) if steps}
        broken = [name for name, loss in losses.items() if not math.isfinite(loss)]
        if broken:
            raise ValueError(
                f"the loss of {broken[0]} is no longer finite at step {self.state.global_step}, which can spoil the "
                "other adapters too: lower its --learning_rate, or train it without --joint"
            )
        return losses


class NoStepWhenDone(TrainerCallback):
    """Takes the gradients of finished adapters away: they are zero, but an optimizer would still decay and drift."""

    def __init__(self, factors: Mapping[str, Sequence[nn.Parameter]], steps: Mapping[str, int]):
        self.factors, self.steps = factors, steps

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        for name, factors in self.factors.items():
            if state.global_step >= self.steps[name]:
                for factor in factors:
                    factor.grad = None


def schedule(training: TrainingArguments, learning_rate: float, steps: int) -> Callable[[int], float]:
    """What an adapter's learning rate is multiplied by at each of its steps, as `transformers` has it.

    Raises:
        ValueError: the schedule does not go by steps.
    """
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=learning_rate),
        num_warmup_steps=training.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"--lr_scheduler_type {training.lr_scheduler_type} follows one loss, and a joint run has one for each "
            "task: choose a schedule by steps, such as cosine, or leave out --joint"
        )
    return scheduler.lr_lambdas[0]


def answer_losses(
    model: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "batch kept"], Int[Tensor, " kept"]]:
    """-log p of the answers' tokens in nats, 0 for others, and the positions that predict them.

    Logits are computed where answers are: on a CPU at the positions where some row has one, as `LoraTrainer` does, on
    a GPU by TRL's kernel.
    """
    labels = inputs["labels"]
    if labels.device.type != "cpu":
        losses = -model(**inputs, use_cache=False, fused_lm_head=True).log_probs
        return losses, torch.arange(losses.shape[1], device=losses.device)
    positions = answer_positions(labels)
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**rest, use_cache=False, logits_to_keep=positions).logits
    return F.cross_entropy(logits.float().transpose(1, 2), labels[:, positions + 1], reduction="none"), positions


def factors_of(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """The trainable parameters of one adapter."""
    return [p for key, p in model.named_parameters() if p.requires_grad and adapter in key.split(".")]


def _join(datasets: Mapping[str, Dataset]) -> Dataset:
    """The rows of all tasks, one task after another; `expert` says whose they are, as too long ones may be dropped."""
    from datasets import concatenate_datasets

    return concatenate_datasets(
        [rows.add_column("expert", [place] * len(rows)) for place, rows in enumerate(datasets.values())]
    )


def _only(group: Mapping[str, Any], factors: Sequence[nn.Parameter], **changes: Any) -> dict[str, Any]:
    """An optimizer's group of parameters, of these alone."""
    kept = set(map(id, factors))
    return {**group, "params": [parameter for parameter in group["params"] if id(parameter) in kept], **changes}
