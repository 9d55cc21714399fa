# SPDX-License-Identifier: Apache-2.0
"""The training loop: on one device, DDP or FSDP2, whatever `accelerate launch` says."""

import dataclasses
import logging
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..progress import Bar
from ..rollouts import float_dtype
from .blocks import block_names
from .checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from .config import DistillConfig
from .held_out import HeldOutError
from .inputs import InputMaker
from .loss import DenoiserInputs, StudentNetwork, Targets, observe
from .online import load_pool, save_pool
from .optimizer import MAX_GRADIENT_NORM, make_optimizer, parameter_groups, rate_factor
from .phases import Phase, plan_phases
from .progress import Evaluation, Progress
from .run_folder import load_student, save_student
from .trainable import whole
from .trainee import make_trainee, ternary_layers, train_others, write_back


logger = logging.getLogger(__name__)


class Trainer:
    """Runs the phases of a distillation, and goes on from the latest checkpoint in its folder.

    Args:
        accelerator (`Accelerator`): device, processes, precision and trackers.
        teacher (`nn.Module`): float denoiser on the accelerator's device.
        student (`nn.Module`): packed denoiser, there too; holds the result.
        inputs ([`InputMaker`]): of this process.
        held_out ([`HeldOutError`]): the evaluation.
        config ([`DistillConfig`]): how.
        folder (`pathlib.Path`): of the run: `checkpoints/`, `phases/` and `best/` are written there.
        show_progress (`bool`): a progress bar on stderr.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        teacher: nn.Module,
        student: nn.Module,
        *,
        inputs: InputMaker,
        held_out: HeldOutError,
        config: DistillConfig,
        folder: pathlib.Path,
        show_progress: bool = True,
    ) -> None:
        self.accelerator = accelerator
        self.teacher = teacher
        self.student = student
        self.inputs = inputs
        self.held_out = held_out
        self.config = config
        self.folder = folder
        self.blocks = block_names(ternary_layers(student))
        self.progress = Progress()
        visible = show_progress and accelerator.is_main_process
        self._bar = Bar(None, "Distilling", total=config.updates, visible=visible, leave=True)

    def run(self) -> Progress:
        """Trains; the student is then the best one that the held-out evaluation saw."""
        layers = list(ternary_layers(self.student))
        phases = plan_phases(self.config, layers, self._blocks_in_order())
        checkpoint = latest_checkpoint(self.folder / "checkpoints")
        if checkpoint is not None:
            load_pool(self.inputs.data, checkpoint.folder.parent, checkpoint.step, self.accelerator.process_index)
            self.progress = Progress.from_dict(checkpoint.progress)
            self._bar.update(self.progress.step)
        else:
            self._evaluate()
        for number, phase in enumerate(phases):
            if self.progress.stopped or number < self.progress.phase:
                continue
            if number > 0:
                self._load(self.folder / "phases" / str(number))
            resumed = checkpoint if checkpoint is not None and self.progress.phase == number else None
            self._run_phase(phase, number, resumed if self.progress.phase_step else None)
            self.accelerator.free_memory()
            self.progress.start_phase(number + 1)
        self._bar.close()
        self._load(self.folder / "best")
        return self.progress

    def _run_phase(self, phase: Phase, number: int, checkpoint: Checkpoint | None) -> None:
        trainee = make_trainee(self.student, self.teacher, phase.training)
        train_others(trainee, phase.train_other)
        self._enable_gradient_checkpointing(trainee)
        blocks = [phase.block] if phase.block else list(self.blocks) if self.config.block_weight else []
        self.progress.trained[phase.name] = sum(p.numel() for p in trainee.parameters() if p.requires_grad)
        groups = parameter_groups(trainee, self.config, steps=phase.steps)
        optimizer = make_optimizer(groups, self.config, self.accelerator.device)
        network: Any = StudentNetwork(trainee, blocks, block_weight=self.config.block_weight, stop_after=phase.block)
        self._name_blocks_for_fsdp(trainee)
        network, optimizer = self.accelerator.prepare(network, optimizer)
        peaks = [group["lr"] for group in optimizer.param_groups]
        if checkpoint is not None:
            load_checkpoint(checkpoint, network, optimizer.optimizer)
        for step in range(self.progress.phase_step, phase.steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate_factor(step, phase.steps)
            fault = self._step(network, blocks, phase.block, optimizer)
            if fault is not None:
                self.progress.stopped = f"step {self.progress.step}: {fault}"
                return
            self._after_step(trainee, network, optimizer, last=step + 1 == phase.steps)
        write_back(trainee, self.student)
        self._save_student(self.folder / "phases" / str(number + 1))

    def _step(self, network: nn.Module, blocks: Sequence[str], stop_after: str | None, optimizer: Any) -> str | None:
        """One update; returns why there must not be another."""
        start = time.perf_counter(), time.process_time()
        total, forwards = 0.0, self.config.gradient_accumulation_steps
        for forward in range(forwards):
            inputs = self._inputs(self.progress.step, forward)
            targets = self._targets(inputs, blocks, stop_after=stop_after)
            with self.accelerator.accumulate(network):
                loss = network(inputs, targets)
                total += float(self.accelerator.reduce(loss.detach(), "mean")) / forwards
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
                    fault = self.progress.guard.update(total if bool(torch.isfinite(whole(norm))) else float("nan"))
                    if fault is not None:
                        return fault
                optimizer.step()
                optimizer.zero_grad()
        self.progress.step += 1
        self.progress.phase_step += 1
        self.progress.loss = total
        self.progress.seconds += time.perf_counter() - start[0]
        self.progress.cpu_seconds += time.process_time() - start[1]
        return None

    def _inputs(self, step: int, forward: int) -> DenoiserInputs:
        return self.inputs.make(step, forward).to(self.accelerator.device, float_dtype(self.teacher))

    @torch.no_grad()
    def _targets(self, inputs: DenoiserInputs, blocks: Sequence[str], *, stop_after: str | None = None) -> Targets:
        return observe(self.teacher, inputs, blocks, stop_after=stop_after)

    def _after_step(self, trainee: nn.Module, network: nn.Module, optimizer: Any, *, last: bool) -> None:
        step = self.progress.step
        self._bar.update()
        if step % self.config.evaluation_interval == 0 or last:
            write_back(trainee, self.student)
            self._evaluate()
        self._bar.set_postfix(loss=f"{self.progress.loss:.4g}", held_out=f"{self.progress.history[-1].held_out:.4g}")
        self.accelerator.log({"loss": self.progress.loss}, step=step)
        if step % self.config.checkpoint_interval == 0 and not last:
            folder = self.folder / "checkpoints"
            # Before the checkpoint, which is not complete without it.
            save_pool(self.inputs.data, folder, step, self.accelerator.process_index)
            self.accelerator.wait_for_everyone()
            save_checkpoint(
                folder,
                step,
                network,
                optimizer.optimizer,
                dataclasses.asdict(self.progress),
                main_process=self.accelerator.is_main_process,
            )

    def _evaluate(self) -> None:
        """Held-out error of the packed student; the best one is kept."""
        error = self.held_out.of(self.student)
        now = Evaluation(self.progress.step, self.progress.loss, error, self.progress.cpu_seconds)
        self.progress.history.append(now)
        self.accelerator.log({"held_out_error": now.held_out}, step=now.step)
        if self.progress.best is now or not (self.folder / "best").exists():
            self._save_student(self.folder / "best")

    def _save_student(self, target: pathlib.Path) -> None:
        if self.accelerator.is_main_process:
            save_student(self.student, target)
        self.accelerator.wait_for_everyone()

    def _load(self, folder: pathlib.Path) -> None:
        self.student = load_student(folder, self.teacher, self.accelerator.device)

    def _enable_gradient_checkpointing(self, trainee: nn.Module) -> None:
        if not self.config.checkpoints_gradients(sum(x.spec.weights for x in ternary_layers(self.student).values())):
            return
        try:
            trainee.enable_gradient_checkpointing()  # type: ignore[operator]
        except (AttributeError, ValueError) as error:
            logger.warning("All activations are kept, which takes memory: %s", error)

    def _blocks_in_order(self) -> list[str]:
        """Blocks as they run, which is not always the order in which they are defined."""
        return list(self._targets(self._inputs(0, 0), self.blocks).blocks)

    def _name_blocks_for_fsdp(self, trainee: nn.Module) -> None:
        """FSDP wraps what is named here, with `--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP`."""
        plugin = self.accelerator.state.fsdp_plugin if self.accelerator.is_fsdp2 else None
        if plugin is not None and not plugin.transformer_cls_names_to_wrap:
            classes = {type(trainee.get_submodule(name)).__name__ for name in self.blocks}
            plugin.transformer_cls_names_to_wrap = sorted(classes)
