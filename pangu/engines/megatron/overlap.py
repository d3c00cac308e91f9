"""Expert communication of one micro-batch beside another's computing (`overlap_expert_parallel`).

Megatron-core's schedules for it say which forward pass runs beside which backward pass. It then
interleaves the two layer by layer, out of pieces of its own. Here they are whole passes, as without
overlap, in a thread each: every dispatcher, recomputation and swap is what it is otherwise, and so
are the sums. Of a device's backward pass autograd's own threads would run every part; it is kept in
the thread that has the turn.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import backward_step, forward_step
from megatron.core.utils import get_model_type

from pangu import backends
from pangu.backends.turns import side_by_side


def forward_beside_backward(call: Any) -> tuple[Any, torch.Tensor | None, Any]:
    """megatron-core's `combined_forward_backward_step`, whose arguments `call` has: the forward
    pass's output and number of tokens, and the gradient of the backward pass's input. Either pass
    may be missing (`f_model`, `b_model` None)."""
    if call.f_model is None:
        return None, None, _backward(call)
    if call.b_model is None:
        return *_forward(call), None
    if call.pre_forward is not None:  # inside a pipeline: what the passes begin with arrives
        call.pre_forward()
        call.pre_backward()
    with torch.autograd.set_multithreading_enabled(False):
        gradient, (output, tokens) = side_by_side(lambda: _backward(call), lambda: _beside(call))
    if call.post_forward is not None:  # and what they end with leaves
        call.post_forward(output)
        call.post_backward(gradient)
    return output, tokens, gradient


def _beside(call: Any) -> tuple[Any, torch.Tensor]:
    device = backends.current().device
    torch.get_device_module(device).set_device(device)  # each thread begins with the first one
    return _forward(call)


def _forward(call: Any) -> tuple[Any, torch.Tensor]:
    return forward_step(
        call.forward_step_func,
        call.data_iterator,
        call.f_model,
        call.num_microbatches,
        call.input_tensor,
        call.forward_data_store,
        call.config,
        parallel_state.get_context_parallel_world_size(),
        call.collect_non_loss_data,
        is_first_microbatch=call.is_first_microbatch,
        current_microbatch=call.current_microbatch,
        vp_stage=call.f_model_chunk_id,
        is_last_stage=parallel_state.is_pipeline_last_stage(
            ignore_virtual=False, vp_stage=call.f_model_chunk_id
        ),
    )


def _backward(call: Any) -> Any:
    return backward_step(
        call.b_input_tensor,
        call.b_output_tensor,
        call.b_output_tensor_grad,
        get_model_type(call.b_model),
        call.config,
    )
