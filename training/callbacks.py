"""Callbacks for a `MoaModel` in any trainer: transformers' own, TRL's, ours; one process or several.

trainer = SFTTrainer(model=model, ...)
trainer.add_callback(RoutingCallback(trainer))
trainer.add_callback(MergeCallback("ties", evaluate, trainer=trainer, when="save"))
trainer.add_callback(PushFusedCallback("me/my-mixture"))
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, Literal, get_args

import torch
from accelerate.utils import gather_object, reduce
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moa.merging import find_method
from moa.model import MoaModel
from moa.training.moa_trainer import refresh_fallback, undisturbed
from moa.training.routing_tally import RoutingTally

SCORE = "merge_score"
SCORES = "merge_scores.json"
CANDIDATE = "merge_candidate"  # the name of a merge while it is being evaluated
When = Literal["save", "end"]


class RoutingCallback(TrainerCallback):
    """Adds how prompts are routed to the trainer's log, and so to TensorBoard, Weights & Biases, ...

    Over all processes, since the last log: `routing_accuracy` of rows that name their expert in a column `task`,
    `routing_entropy` (nats), `routing_calibration_error` (ECE) and `routing_use_NAME`, each expert's mean weight. In
    an evaluation the same with the prefix `eval_`, so that `metric_for_best_model="eval_routing_accuracy"` works.

    Args:
        trainer: needed where the trainer reports to a tracker, for the metrics must join the log before the tracker
            reads it; without one they stand in the log and in `state.log_history`.

    A plain Trainer drops columns that the base model's forward does not name, `task` among them: pass it
    `remove_unused_columns=False`, and to SFTTrainer a collator that keeps it. `MoaTrainer` keeps it by itself. Rows
    that several processes see twice, to fill the last batch, count twice.
    """

    def __init__(self, trainer: Trainer | None = None):
        self.trainer = trainer
        self.train, self.evaluation = RoutingTally(), RoutingTally()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Refuse what could not be reported."""
        _checked(kwargs["model"], self)
        if self.trainer is None and args.report_to:
            raise ValueError(
                f"RoutingCallback would add its metrics after {args.report_to[0]} has read the log: "
                "make it with RoutingCallback(trainer) and trainer.add_callback"
            )

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._seen(self.train, kwargs["model"])

    on_step_end = on_substep_end

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self._seen(self.evaluation, kwargs["model"])

    def on_predict(self, *args: Any, **kwargs: Any):
        self.evaluation.clear()  # a prediction logs nothing

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ):
        """Add the metrics to a training log, which has a loss, or to an evaluation's, which has its time."""
        ran = next((name for name in logs if name.endswith("_runtime") and name != "train_runtime"), None)
        if ran is None and "loss" not in logs:
            return
        prefix, tally = (ran.removesuffix("runtime"), self.evaluation) if ran else ("", self.train)
        experts = kwargs["model"].experts
        sums = reduce(tally.sums(len(experts)).to(args.device), "sum").cpu()
        metrics = {f"{prefix}{name}": value for name, value in tally.metrics(sums, experts).items()}
        tally.clear()
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def _seen(self, tally: RoutingTally, model: MoaModel) -> None:
        if self.trainer is not None:  # before the trackers, which log what they are given
            handler = self.trainer.callback_handler
            handler.callbacks = [self, *(one for one in handler.callbacks if one is not self)]
        if model.last_routing is not None and model.last_routing.logits is not None:
            tally.add(model.last_routing, model.last_task)


class MergeCallback(TrainerCallback):
    """Merges the experts as they are now, evaluates the merge, and keeps the best: the adapter and its report.

    `OUTPUT_DIR/best_merge` receives the adapter, which stock PEFT loads, `merge_report.json`, and
    `merge_scores.json` with every score so far; each score also stands in `state.log_history` as `merge_score`. The
    training itself goes on as if nothing had happened: weights, gradients and random numbers are left as they were.

    Args:
        method: a merge method, see `moa methods`.
        evaluate: takes the model, on which the merge alone runs, in evaluation mode and without gradients; returns a
            number. It is called on every process, and their mean is the score.
        when: `save` merges at each checkpoint, `end` once.
        keep_best: False keeps the latest instead.
        greater_is_better: False for losses.
        trainer: also sends the score to the trainer's trackers.
        options: `weights`, `rank`, `scale`, `seed`, and the method's own, as for `MoaModel.merge_adapters`.

    Raises:
        ValueError: an unknown method or moment, or a score that is no finite number.
    """

    def __init__(
        self,
        method: str,
        evaluate: Callable[[MoaModel], float],
        *,
        when: When = "end",
        keep_best: bool = True,
        greater_is_better: bool = True,
        trainer: Trainer | None = None,
        **options: Any,
    ):
        find_method(method)
        if when not in get_args(When):
            raise ValueError(f"when={when!r} is no moment to merge at: choose one of {', '.join(get_args(When))}")
        self.method, self.evaluate, self.options = method, evaluate, options
        self.when, self.keep_best, self.greater_is_better, self.trainer = when, keep_best, greater_is_better, trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        _checked(kwargs["model"], self)
        if state.global_step:
            self._recall(Path(args.output_dir) / "best_merge" / SCORES, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.when == "save":
            self._merge(args, state, kwargs["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.when == "end":
            self._merge(args, state, kwargs["model"])

    def _merge(self, args: TrainingArguments, state: TrainerState, model: MoaModel) -> None:
        scratch, written = Path(args.output_dir) / f".best_merge-{state.global_step}", {}
        if args.should_save:  # only there: a slower process would remove what this one has written by then
            shutil.rmtree(scratch, ignore_errors=True)  # what a killed run has left
            written = {"output": scratch}
        with undisturbed(model), torch.no_grad():
            model.merge_adapters(self.method, into=CANDIDATE, **written, **self.options)
            model.eval()
            try:
                with model.using(CANDIDATE):
                    score = float(self.evaluate(model))
            finally:
                model.delete_adapter(CANDIDATE)
        score = mean(gather_object([score]))
        if not math.isfinite(score):
            raise ValueError(f"evaluate gave {score} for the {self.method} merge: return a finite number")
        best = self._is_best(score, state)
        self._log(state, score)
        if args.should_save:
            self._keep(scratch, Path(args.output_dir) / "best_merge", best, state)

    def _recall(self, told: Path, state: TrainerState) -> None:
        """Take up the scores that the checkpoint of a resumed run lacks: it was written before its own merge."""
        seen = {entry["step"] for entry in state.log_history if SCORE in entry}
        for one in json.loads(told.read_text())["scores"] if told.is_file() else []:
            if one["step"] <= state.global_step and one["step"] not in seen:
                state.log_history.append({SCORE: one["score"], "epoch": state.epoch, "step": one["step"]})

    def _is_best(self, score: float, state: TrainerState) -> bool:
        earlier = [entry[SCORE] for entry in state.log_history if SCORE in entry]
        if not self.keep_best or not earlier:
            return True
        return score > max(earlier) if self.greater_is_better else score < min(earlier)

    def _log(self, state: TrainerState, score: float) -> None:
        if self.trainer is not None:
            self.trainer.log({SCORE: score})
        else:
            state.log_history.append({SCORE: score, "epoch": state.epoch, "step": state.global_step})

    def _keep(self, scratch: Path, kept: Path, best: bool, state: TrainerState) -> None:
        if best:
            shutil.rmtree(kept, ignore_errors=True)
            scratch.replace(kept)
        else:
            shutil.rmtree(scratch)
        scores = [{"step": one["step"], "score": one[SCORE]} for one in state.log_history if SCORE in one]
        told = {"method": self.method, "greater_is_better": self.greater_is_better, "scores": scores}
        unfinished = kept / f".{SCORES}"  # cut short, the file would stop a resumed run
        unfinished.write_text(json.dumps(told, indent=2) + "\n")
        unfinished.replace(kept / SCORES)


class PushFusedCallback(TrainerCallback):
    """Pushes the mixture, or one adapter or model fused from it, with its model card when training ends.

    The first process pushes. The fallback is merged anew where experts were trained.

    Args:
        repo_id: repository on the Hub, made if it is not there.
        form: None pushes the mixture, `"adapter"` its fallback alone, `"model"` the base with the fallback folded in.
        kwargs: `private`, `token`, `commit_message`, `revision`.
    """

    def __init__(self, repo_id: str, form: Literal["adapter", "model"] | None = None, **kwargs: Any):
        if form not in (None, "adapter", "model"):
            raise ValueError(f"form={form!r} does not exist: choose 'adapter', 'model', or None for the mixture")
        self.repo_id, self.form, self.kwargs = repo_id, form, kwargs

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        _checked(kwargs["model"], self)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if not state.is_world_process_zero:
            return
        refresh_fallback(kwargs["model"])
        print(f"pushed to {kwargs['model'].push_to_hub(self.repo_id, fused=self.form, **self.kwargs)}", flush=True)


def _checked(model: Any, callback: TrainerCallback) -> None:
    if not isinstance(model, MoaModel):
        raise TypeError(
            f"{type(callback).__name__} is for a MoaModel, this trainer has a {type(model).__name__}: "
            "make one with MoaModel.from_adapters"
        )
