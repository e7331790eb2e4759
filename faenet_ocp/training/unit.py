"""The training step: what fairchem's MLIPTrainEvalUnit lacks for OC20, and nothing else.

Differences from the parent: losses are exact means over the global batch on any number of ranks and micro-batches; the
EMA warms up; the state is plain data for a single-file checkpoint; throughput and the wait for data are logged.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fairchem.core.common import distutils
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit.mlip_unit import MLIPTrainEvalUnit, Task
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchtnt.framework import State
from tqdm import tqdm

from faenet_ocp.config.optim import OptimConfig
from faenet_ocp.data.loader import Batches
from faenet_ocp.evaluation import log_names
from faenet_ocp.tasks.losses import SummedLoss, loss_mask, task_loss
from faenet_ocp.tasks.tasks import energy_gradient_forces, training_outputs
from faenet_ocp.training.loggers import MetricLogger
from faenet_ocp.training.nonfinite import FiniteSteps, Step
from faenet_ocp.training.optim import Plateau, WarmingEMA, learning_rate_schedule, make_optimizer, total_steps


class _LossTerm(NamedTuple):
    """One term of eq. (9): `value` gives its sum over a batch, from the model's outputs."""

    name: str
    loss: SummedLoss
    task: Task
    value: Callable[[Mapping[str, Any], AtomicData], Tensor]


class OCPTrainUnit(MLIPTrainEvalUnit):
    """One optimiser step for each list of micro-batches.

    Args:
        job_config: fairchem's job section.
        model: on the CPU, unwrapped.
        tasks: see `tasks.make_tasks`.
        optim: the `optim:` section.
        gradient_loss: the third term of eq. (9): predicted forces against -dE/dX, a constant target. The frames are
            constants in the derivative.
        steps_per_epoch: optimiser steps of an epoch.
        amp: bfloat16 autocast in the forward pass.
        print_every: steps between reports.
        failures: folder for what is needed to look into a step whose gradient is not finite.

    Attributes:
        stop_requested: set it (on any rank) to have all ranks stop after the same step.
        stopping: true on all ranks once that step has come.
        num_skipped: steps left out because their gradient was not finite.
    """

    def __init__(
        self,
        *,
        job_config: DictConfig,
        model: nn.Module,
        tasks: Sequence[Task],
        optim: OptimConfig,
        gradient_loss: SummedLoss | None,
        steps_per_epoch: int,
        amp: bool,
        print_every: int,
        failures: Path,
        plateau: Plateau | None = None,
    ):
        self.total_steps, self.warmup_steps = total_steps(optim, steps_per_epoch), optim.warmup_steps
        by_step = learning_rate_schedule(optim, self.total_steps)
        self.schedule = lambda step: by_step(step) * (1.0 if plateau is None else plateau.factor)
        super().__init__(
            job_config=job_config,
            model=model,
            optimizer_fn=make_optimizer(optim, distutils.get_device_for_local_rank()),
            cosine_lr_scheduler_fn=lambda n_iters_per_epoch, optimizer: LambdaLR(optimizer, self.schedule),
            tasks=[task for task in tasks if task.loss_fn is not None],
            bf16=amp,
            print_every=print_every,
            clip_grad_norm=optim.clip_grad_norm,
            ema_decay=None,
            save_inference_ckpt=False,
        )
        self.load_scheduler(steps_per_epoch)
        self.plateau = plateau
        self.all_tasks = list(tasks)
        self.terms = [_LossTerm(task.name, task.loss_fn, task, partial(task_loss, task)) for task in self.tasks]
        self.gradient_loss = gradient_loss
        if gradient_loss is not None:
            forces = next(task for task in tasks if task.name == "forces")
            self.terms.append(_LossTerm("gradient", gradient_loss, forces, self._gradient_loss))
        if optim.ema_decay is not None:
            self.ema_model = WarmingEMA(self.raw_model, optim.ema_decay)
        self.steps_per_epoch = steps_per_epoch
        self.failures = failures
        self.steps = FiniteSteps(self.optimizer, torch.device(distutils.get_device_for_local_rank()))
        self.num_skipped, self.max_skipped = 0, optim.skip_nonfinite
        self.stop_requested = self.stopping = False
        # Counts and stop requests are known on the CPU: no need to wait for the GPU to share them.
        self.cpu_group = dist.new_group(backend="gloo") if distutils.get_world_size() > 1 else None
        self.metric_logger: MetricLogger | None = None
        self._progress_bar: tqdm | None = None
        self._reset_window()

    @property
    def raw_model(self) -> nn.Module:
        """The model without DDP."""
        return self.model.module if hasattr(self.model, "module") else self.model

    @property
    def eval_model(self) -> nn.Module:
        """What is evaluated: the EMA of the weights where there is one."""
        return self.raw_model if self.ema_model is None else self.ema_model.module

    def train_step(self, state: State, data: Batches) -> None:
        """Forward, backward and optimiser step over the micro-batches of this rank."""
        self._add_data_wait(state)
        device = distutils.get_device_for_local_rank()
        counts = self._share(self._counts(data)).to(device, non_blocking=True)
        batches = [batch.to(device, non_blocking=True) for batch in data]
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(len(self.terms), device=device, dtype=torch.float64)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else self.model.no_sync():
                parts = self._losses(batch, counts)
                parts.sum().backward()
            losses += parts.detach()
        # Over all ranks, the same on each, before clipping.
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm or math.inf)
        step = self.train_progress.num_steps_completed + 1
        if self.steps.take(Step(step - 1, batches, losses), grad_norm) and self.ema_model is not None:
            self.ema_model.update_parameters(self.raw_model)
        for left_out in self.steps.left_out(all_steps=self.stopping or step == self.total_steps):
            self._skip_or_stop(left_out)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        self._window["systems"] += sum(len(batch.natoms) for batch in batches)
        self._show_progress(step)
        if step % self.print_every == 0 or step == self.total_steps:
            self._report(step, losses, learning_rate, grad_norm)

    def _losses(self, batch: AtomicData, counts: Tensor) -> Tensor:
        """This micro-batch's part of each loss; DDP averages gradients over ranks, hence the world size."""
        if self.gradient_loss is not None and self._has_begun(self.gradient_loss):
            batch.pos.requires_grad_(True)
        autocast = torch.autocast(batch.pos.device.type, enabled=self.autocast_enabled, dtype=self.autocast_dtype)
        outputs = training_outputs(self.model, self.all_tasks, batch, autocast)
        # A term that has not begun is multiplied by 0: every parameter takes part in every step, as DDP wants.
        parts = [term.value(outputs, batch) * float(self._has_begun(term.loss)) for term in self.terms]
        return torch.stack(parts) * (distutils.get_world_size() / counts)

    def _gradient_loss(self, outputs: Mapping[str, Any], batch: AtomicData) -> Tensor:
        """Predicted forces against -dE/dX; 0 before the term has begun, when there is nothing to differentiate by."""
        forces = outputs["forces"]["forces"]
        if self.gradient_loss is None or not batch.pos.requires_grad:
            return forces.new_zeros(())
        target = energy_gradient_forces(self.all_tasks, outputs, batch.pos, keep_graph=True)
        return self.gradient_loss(forces, target, loss_mask(self.terms[-1].task, batch), batch.natoms)

    def _has_begun(self, loss: SummedLoss) -> bool:
        return self.train_progress.num_epochs_completed >= loss.start_epoch

    def _counts(self, batches: Sequence[AtomicData]) -> Tensor:
        """Terms that each loss is a mean over in the micro-batches of this rank, (number of losses,)."""
        counts = [
            sum(loss.num_terms(batch[task.name], loss_mask(task, batch)) for batch in batches)
            for _, loss, task, _ in self.terms
        ]
        return torch.tensor(counts, dtype=torch.float64)

    def _share(self, counts: Tensor) -> Tensor:
        """Counts of all ranks together, at least 1 each; and whether any rank is asked to stop, in `stopping`."""
        shared = torch.cat([counts, counts.new_tensor([self.stop_requested])])
        if self.cpu_group is not None:
            dist.all_reduce(shared, group=self.cpu_group)
        self.stopping = bool(shared[-1])
        return shared[:-1].clamp(min=1)

    def _skip_or_stop(self, left_out: Step) -> None:
        """The gradient was not finite and the step was not taken: keeps the evidence, then goes on or stops.

        Raises:
            FloatingPointError: no more steps may be left out.
        """
        (step, batches, losses), rank = left_out, distutils.get_rank()
        self.failures.mkdir(parents=True, exist_ok=True)
        path = self.failures / f"step_{step:08d}_rank_{rank}.pt"
        evidence = {
            "step": step,
            "losses": self._by_name(losses),
            "sids": [sid for batch in batches for sid in batch.sid],
            "batches": [{k: v.detach().cpu() for k, v in batch if isinstance(v, Tensor)} for batch in batches],
            "model": self.raw_model.state_dict(),
            "model_step": self.train_progress.num_steps_completed,  # a GPU tells of a step when others have followed
        }
        torch.save(evidence, path)
        self.num_skipped += 1
        message = f"the gradient of step {step} is not finite (losses {evidence['losses']}); batch and weights: {path}"
        if self.num_skipped > self.max_skipped:
            raise FloatingPointError(
                f"{message}. Lower optim.lr_initial, set optim.clip_grad_norm, or allow optim.skip_nonfinite steps;"
                " the same command then goes on from the newest checkpoint"
            )
        logging.warning("%s. Step left out (%d of %d allowed)", message, self.num_skipped, self.max_skipped)

    def _by_name(self, losses: Tensor) -> dict[str, float]:
        return {term.name: value for term, value in zip(self.terms, losses.tolist(), strict=True)}

    # ------------------------------------------------------------------------------------ reports
    def _reset_window(self) -> None:
        self._window = {"systems": 0.0, "wait": 0.0}
        self._window_start = time.perf_counter()

    def exclude_time(self, seconds: float) -> None:
        """Time that was not spent on training (evaluation) does not count in samples/s."""
        self._window_start += seconds

    def _add_data_wait(self, state: State) -> None:
        if state.train_state is not None:
            waits = state.train_state.iteration_timer.recorded_durations.get("data_wait_time")
            if waits:
                self._window["wait"] += waits[-1]

    def _report(self, step: int, losses: Tensor, learning_rate: float, grad_norm: Tensor) -> None:
        world = distutils.get_world_size()
        if world > 1:
            dist.all_reduce(losses)
        parts = self._by_name(losses / world)
        value = sum(parts.values())
        seconds = time.perf_counter() - self._window_start
        values = {
            log_names.LOSS: value,
            log_names.LEARNING_RATE: learning_rate,
            log_names.SAMPLES_PER_S: self._window["systems"] * world / seconds,
            log_names.DATA_WAIT_SHARE: self._window["wait"] / seconds,
            log_names.GRAD_NORM: float(grad_norm),
        }
        if len(parts) > 1:
            values |= {log_names.loss_of(name): part for name, part in parts.items()}
        epoch = step / self.steps_per_epoch
        if self.metric_logger is not None:
            self.metric_logger.log(step, epoch, values)
        if distutils.is_master():
            shown = f"loss {value:.4f}, {values[log_names.SAMPLES_PER_S]:.0f} samples/s"
            if self._progress_bar is not None:
                self._progress_bar.set_postfix_str(shown)
            else:
                logging.info(
                    "epoch %.2f, step %d of %d: %s, lr %.3g, %.0f %% of the time waiting for data",
                    *(epoch, step, self.total_steps, shown, learning_rate, 100 * values[log_names.DATA_WAIT_SHARE]),
                )
        self._reset_window()

    def _show_progress(self, step: int) -> None:
        if self._progress_bar is None and distutils.is_master():
            bar = tqdm(total=self.total_steps, initial=step - 1, desc="train", unit="step", disable=None)
            self._progress_bar = None if bar.disable else bar
        if self._progress_bar is not None:
            self._progress_bar.update(step - self._progress_bar.n)

    def on_train_end(self, state: State) -> None:
        """Ends the progress bar."""
        if self._progress_bar is not None:
            self._progress_bar.close()
        logging.info("training is complete: %d steps", self.train_progress.num_steps_completed)

    def follow(self, value: float) -> None:
        """Tells the learning rate of the metric that it follows."""
        if self.plateau is not None and self.train_progress.num_steps_completed >= self.warmup_steps:
            self.plateau.step(value)
            self._set_rates(self.train_progress.num_steps_completed)

    def _set_rates(self, step: int) -> None:
        """The learning rate of the next step, after so many."""
        rates = [rate * self.schedule(step) for rate in self.scheduler.base_lrs]
        self.scheduler._last_lr = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    # ------------------------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        """Everything that training needs to go on, as plain data (DDP keeps ranks equal, so one rank's is enough)."""
        return {
            "model": self.raw_model.state_dict(),
            "ema": None if self.ema_model is None else self.ema_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "progress": self.train_progress.state_dict(),
            "num_skipped": self.num_skipped,
            "plateau": None if self.plateau is None else self.plateau.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, but for settings of optimiser and schedule, which are those of now."""
        self.raw_model.load_state_dict(state["model"])
        if self.ema_model is not None:
            self.ema_model.load_state_dict(state["ema"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        steps, base = state["progress"]["num_steps_completed"], self.scheduler.base_lrs
        if self.plateau is not None and state.get("plateau") is not None:
            self.plateau.load_state_dict(state["plateau"])
        self.scheduler.load_state_dict(state["scheduler"] | {"base_lrs": base})
        for group, now in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(now)
        self._set_rates(steps)
        epochs, in_epoch = divmod(steps, self.steps_per_epoch)  # an epoch that max_steps cut short goes on
        progress = {"num_epochs_completed": epochs, "num_steps_completed_in_epoch": in_epoch}
        self.train_progress.load_state_dict(progress | {"num_steps_completed": steps})
        self.num_skipped = state["num_skipped"]
