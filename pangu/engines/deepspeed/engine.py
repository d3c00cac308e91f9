"""DeepSpeed behind the engine's contract: megatron-core's model and losses, DeepSpeed's gradients
and optimizer."""

from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from configs.schema import Config
from configs.violation import ConfigError, Violation
from pangu import backends
from pangu.engines.contract import Batch, StepResult, StepShape
from pangu.engines.deepspeed import library, optimizer_state
from pangu.engines.deepspeed.groups import (
    EXPERTS,
    DataParallelGroups,
    is_expert,
    mark_experts,
)
from pangu.engines.deepspeed.optimizer_state import Drive
from pangu.engines.deepspeed.weights_file import WeightsFile
from pangu.engines.megatron.process_groups import sum_over_losses
from pangu.engines.megatron.step import count_tokens, forward_step, mtp_loss, run_schedule
from pangu.engines.state_parts import Part
from pangu.model.build import build_model
from pangu.model.transformer_config import PanguTransformerConfig
from pangu.moe.balancing_bias import balance
from pangu.ops.total_norm import total_norm


class DeepSpeedEngine:
    """The model inside DeepSpeed's engine, and torch's AdamW inside its optimizer."""

    def __init__(self, config: Config, model: Any, settings: PanguTransformerConfig) -> None:
        self.deepspeed = library.load(nvme=config.engine.offload == "nvme")
        self.chunks = [model]
        self.settings = settings
        self.stage, self.clip = config.parallel.zero_stage, config.optimizer.clip_grad
        mark_experts(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.adam = _adamw(config, trained)
        self.drive: Drive | None = None
        self.weights_file: WeightsFile | None = None
        try:
            self._shard(config, model, trained)
        except OSError as error:
            if config.engine.offload != "nvme":
                raise
            path, why = config.engine.nvme_path, error.strerror
            reason = f"what is to be on the drive cannot be written: {why}"
            raise ConfigError([Violation("engine.nvme_path", path, reason)]) from None

    def _shard(self, config: Config, model: Any, trained: list[torch.nn.Parameter]) -> None:
        """Give the model to DeepSpeed.

        Raises:
            OSError: the drive is full.
        """
        nvme, folder = config.engine.offload == "nvme", library.swap_folder(config)
        if nvme:
            weakref.finalize(self, _clear, folder, dist.get_rank())
        self.replica, *_ = self.deepspeed.initialize(
            model=model,
            optimizer=self.adam,
            config=library.settings(config, sum(p.numel() for p in trained), DataParallelGroups),
            mpu=DataParallelGroups,
            dist_init_required=False,
        )
        if nvme:
            self.drive = Drive(self.replica.optimizer)
            self.weights_file = WeightsFile(model, self.replica.optimizer, folder)

    @classmethod
    def build(cls, config: Config) -> DeepSpeedEngine:
        """The initialised model of a configuration, and its optimizer.

        Raises:
            ConfigError: the backend's own precision is none that this engine has, or DeepSpeed
                does not take `engine.config`.
        """
        dtype = backends.torch_dtype(config.backend.precision)
        kinds = [torch.float32, *([torch.bfloat16] if config.parallel.zero_stage > 0 else [])]
        if dtype not in kinds:
            precision, stage = config.backend.precision, config.parallel.zero_stage
            reason = (
                f"engine=deepspeed trains in {' and '.join(map(str, kinds))} at stage {stage}, "
            )
            reason += f"{backends.current().name} in {dtype}"
            hint = "backend.precision=fp32; or engine=megatron"
            raise ConfigError([Violation("backend.precision", precision, reason, hint)])
        (model,), settings = build_model(config)
        return cls(config, model, settings)

    @property
    def data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    @property
    def data_parallel_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    def set_learning_rate(self, lr: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = lr

    def train_step(self, batches: Iterator[Batch], shape: StepShape) -> Callable[[], StepResult]:
        if self.drive:
            self.drive.put_back()
        micro_batches = list(islice(batches, shape.num_microbatches))
        step = self.settings.step = count_tokens(micro_batches, self.settings)
        # DeepSpeed takes means over ranks; megatron-core's gradients are sums, over the tokens of
        # the global batch. The losses that exist in the backward alone are scaled by it too: the
        # router's by megatron-core's schedule, those of further tokens where it has modules of its
        # own for them, which leap heads are not.
        scale = self.data_parallel_size / step.trained.clamp(min=1)
        self.settings.grad_scale_func = partial(torch.mul, scale)
        MTPLossAutoScaler.set_loss_scale(scale)
        reports: list[torch.Tensor] = []
        for left in reversed(range(len(micro_batches))):
            batch = iter([micro_batches[len(reports)]])
            self.replica.set_gradient_accumulation_boundary(left == 0)
            loss = self._forward(batch, shape, reports)
            self.replica.backward(loss * scale, scale_wrt_gas=False)
        MTPLossAutoScaler.set_loss_scale(torch.ones_like(scale))
        total = sum_over_losses(torch.stack(reports).sum(0))
        loss = total[0] / total[1]
        ahead = mtp_loss(self.chunks, step)
        grad_norm = self._apply_gradients(finite=math.isfinite(loss.item()))
        if self.weights_file:
            self.weights_file.put_away()
        skipped = grad_norm is None
        balance(self.chunks, self.settings.moe.expert_bias_update_rate, skipped=skipped)
        norm = float("nan") if grad_norm is None else grad_norm
        further = None if ahead is None else ahead.item()
        result = StepResult(loss.item(), norm, int(total[1]), skipped, further)
        return lambda: result

    def evaluate(self, batches: Iterator[Batch], shape: StepShape) -> float:
        self.replica.eval()
        micro_batches = list(islice(batches, shape.num_microbatches))
        with torch.no_grad():
            total = run_schedule(self.chunks, micro_batches, shape, forward_only=True)
        self.replica.train()
        return (total[0] / total[1]).item()

    def state_parts(self) -> list[Part]:
        return optimizer_state.parts(self.replica, self.adam, self.drive)

    def replicas(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def whole_weights(self, *, changing: bool = False) -> AbstractContextManager[None]:
        if self.stage < 3:
            return nullcontext()
        weights = list(self.chunks[0].parameters())
        return self.deepspeed.zero.GatheredParameters(weights, 0 if changing else None)

    def _forward(
        self, batch: Iterator[Batch], shape: StepShape, reports: list[torch.Tensor]
    ) -> torch.Tensor:
        """The sum of a micro-batch's token losses; appends what is to be reported of it."""
        total, _ = schedules.forward_step(
            partial(forward_step, settings=self.settings),
            batch,
            self.replica,
            shape.num_microbatches,
            None,
            reports,
            self.settings,
            parallel_state.get_context_parallel_world_size(),
        )
        return total

    def _apply_gradients(self, *, finite: bool) -> float | None:
        """Clip and step; the norm before clipping, over all ranks. None, and nothing has changed,
        where the loss or a gradient is not finite."""
        if self.stage == 0:
            norm = self._clip()
            if not (finite and math.isfinite(norm)):
                self.replica.zero_grad()
                return None
            self.replica.step()
            return norm
        if not finite:  # which DeepSpeed finds in gradients alone
            weight = next(p for p in self.chunks[0].parameters() if p.requires_grad)
            nothing = torch.full(getattr(weight, "ds_shape", weight.shape), torch.nan)
            self.deepspeed.utils.safe_set_full_grad(weight, nothing.to(weight))
        self.replica.step()
        if not self.replica.was_step_applied():
            if self.stage < 3:  # which offloaded would add the next gradients to these
                sums = self.replica.optimizer.averaged_gradients
                sums.update(dict.fromkeys(sums))
            return None
        return float(self.replica.get_global_grad_norm())

    def _clip(self) -> float:
        """What DeepSpeed's optimizers do from stage 1 on."""
        weights = [p for p in self.chunks[0].parameters() if p.grad is not None]
        experts, others = (
            total_norm([weight.grad for weight in weights if is_expert(weight) == kind]).square()
            for kind in (True, False)
        )
        dist.all_reduce(experts, group=parallel_state.get_expert_model_parallel_group())
        norm = (experts + others).sqrt()
        if self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(weights, self.clip, norm)
        return norm.item()


def _clear(folder: Path, rank: int) -> None:
    """Leave nothing of a rank on the drive, and no empty folders."""
    mine = folder / "zero_stage_3" / "optimizer" / f"rank{rank}"
    shutil.rmtree(mine, ignore_errors=True)
    for above in (mine.parent, mine.parents[1], folder):
        with suppress(OSError):  # others' are there still
            above.rmdir()


def _adamw(config: Config, trained: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    """Only matrices decay, as with megatron-core; experts are in groups of their own."""
    o = config.optimizer
    groups: list[dict[str, Any]] = []
    for experts in (False, True):
        for decays in (True, False):
            weights = [p for p in trained if (is_expert(p), p.dim() > 1) == (experts, decays)]
            decay = o.weight_decay if decays else 0.0
            named = {"moe": True, "name": EXPERTS} if experts else {}
            groups += [{"params": weights, "weight_decay": decay, **named}] if weights else []
    return torch.optim.AdamW(
        groups,
        lr=o.lr,
        betas=(o.adam_beta1, o.adam_beta2),
        eps=o.adam_eps,
        fused=backends.current().fused_adamw or None,
    )
