"""What only plans are made from: a model that answers, and the engine that a forecast assumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from configs.limits import (
    Amount,
    Count,
    Limits,
    NotNegative,
    Part,
    PartAboveZero,
    Positive,
)

Dtype = Literal["fp32", "bf16", "fp16", "fp8", "int8", "fp4", "int4"]


@dataclass
class InferenceConfig:
    """What is asked of a model, and how it answers. Lengths in tokens; `batch_size` counts the
    sequences of one copy of the model, 0 finds the largest within memory and `latency_limit_ms`
    per new token.

    `python -m simulator infer` plans with all of it. `pangu.generate`, and the sample at the end of
    a run, know `max_new_tokens` alone: weights and cache stay in the checkpoint's precision.
    """

    batch_size: Amount = 0
    prompt_length: Count = 2048
    max_new_tokens: Count = 128
    # W8A8 is int8 and int8, W4A8 is int4 and int8. Where the machine computes in no 16 bits (a CPU
    # that was calibrated), float32 takes their place.
    weight_dtype: Dtype = "bf16"
    compute_dtype: Dtype = "bf16"
    kv_dtype: Dtype = "bf16"
    draft_tokens: Annotated[int, Limits(0, 1024)] = 0  # proposed for every sequence in each step
    # Who proposes: the model's own multi-token prediction, its prompt (which costs nothing), or a
    # model of `configs/model` or of a YAML file.
    draft: str = "mtp"
    # What the serving engine spends on each pass of a model beside the device's own time, and on
    # accepting drafts: scheduling, inputs, sampling. 0: hidden behind the device.
    host_ms: NotNegative = 0.0
    acceptance_rate: Part = 0.8  # of each drafted token, those before it being accepted
    latency_limit_ms: Positive | None = None

    @property
    def mean_context(self) -> float:
        """Positions in the cache on average: the prompt and half of the output."""
        return self.prompt_length + self.max_new_tokens / 2


@dataclass
class SimulationConfig:
    """Traits of the training engine that a forecast assumes. Read by the simulator alone; the
    defaults are this project's trainer, published runs of other engines set their own."""

    # TransformerEngine keeps a placeholder gradient of every weight shape and fuses norms.
    transformer_engine: bool = False
    fused_attention: bool = True  # scores never reach memory
    flash_attention_2: bool = False  # its rates, where later kernels are faster (Hopper)
    # Latent attention through a kernel that knows one width: values padded to the keys'.
    padded_values: bool = False
    fused_cross_entropy: bool = False  # the gradient overwrites the 16-bit logits
    # Otherwise logits in float32, overwritten by their exponentials and by the gradient where the
    # vocabulary is not cut (`pangu.ops.cross_entropy`); else megatron-core's own passes.
    inplace_cross_entropy: bool = True
    # Where the vocabulary is not cut, logits are made and used up a chunk of rows at a time, and
    # both gradients with them (`pangu.ops.linear_cross_entropy`); else those of all rows at once.
    chunked_cross_entropy: bool = True
    # Metrics that the engine computes from the logits beside the loss, each a cross-entropy.
    loss_metrics: Amount = 0
    # On NVIDIA: PyTorch's kernels for norms, rotary embedding, the router and what sorts and sums
    # rows, and an optimizer step in several passes; else fused ones as TransformerEngine's.
    torch_kernels: bool = True
    # Norms, rotary embedding and activations in one kernel each; eager code runs them in several.
    fused_kernels: bool = True
    grouped_experts: bool = True  # all experts of a rank in one product; else one by one
    # Experts' products on a few streams of their own (TransformerEngine's grouped linear).
    expert_streams: bool = False
    # The host issues a layer's kernels one by one, or replays graphs of them.
    launch: Literal["eager", "captured"] = "eager"
    # An MoE layer's messages go beside what it computes itself: the shared expert, other chunks
    # (`moe.dispatch_chunks`), weight gradients where micro-batches overlap. Else beside nothing.
    layer_overlap: bool = True
    # In every MoE layer the host reads how many rows an expert gets, and so cannot issue ahead.
    host_reads_counts: bool = False
    # Float8 wants every expert's rows in multiples: copied into padded tensors and back.
    padded_experts: bool = False
    # Experts' products, activation, biases and quantisation in a pair of kernels, forward and back.
    fused_experts: bool = False
    clamped_experts: bool = False  # gate and value clamped, in passes of their own (GPT-OSS)
    # Whole layers are repeated up to the last tensor that backward needs, not to their end
    # (PyTorch's non-reentrant checkpoints since 2.1): the last product and its sum are left out.
    recompute_stops_early: bool = False
    fp32_gradients: bool = True  # main gradients accumulated and reduced in float32
    # Weight gradients are added to the main gradients inside their product; else afterwards.
    gradient_accumulation_fusion: bool = False
    tp_comm_overlap: bool = False  # tensor-parallel collectives fused with their matrix products
    # `deduplicated` sends a token once to a node, not to a rank, and hands it on there, by kernels
    # that take few of the device's cores (DeepEP, HybridEP).
    node_forwarding: bool = False
    # Tensor-parallel collectives of the backward pass run beside the other gradient's product, as
    # megatron-core issues them; else they stand alone (PyTorch's DTensor).
    tp_gradient_overlap: bool = True
    # Operands are cast to float8 before tensor-parallel ranks or sharded weights are gathered
    # (torchao's tensor-wise scaling); else they are gathered in 16 bits.
    fp8_gathers: bool = False
    # Passes that casting an operand to float8 takes, each a read and two writes (rows and columns).
    fp8_cast_passes: Positive = 1.0
    # Attention and MLP read one norm and are added up once (PaLM's parallel layers): one gathering
    # and one reduction for both.
    parallel_block: bool = False
    # Interleaved pipelines send beside the next chunk's computing; else each send is waited for.
    overlap_sends: bool = True
    # Pipeline sends cut over tensor-parallel ranks even without sequence parallelism (Megatron of
    # 2021, arXiv 2104.04473).
    scatter_gather_sends: bool = False
    # Ring attention deals each rank an early and a late part of the sequence; without, the last
    # rank computes nearly twice its share of a causal mask.
    balanced_context: bool = True
    # Mean part of its causal past that a token attends to: less than 1 where packed documents are
    # masked from each other.
    attention_span: PartAboveZero = 1.0
    fp8_attention: bool = False  # scores and weighted values in float8, as the matrix products
    # ZeRO-3 as FSDP and Megatron run it, or as DeepSpeed did in 2021: rings that know nothing of
    # nodes, and weights gathered a third time for recomputation (arXiv 2104.07857, section 4.1).
    sharding: Literal["fsdp", "deepspeed_2021"] = "fsdp"
    # Zipf exponent of how often experts are chosen by a top-k router; 0: alike; null: what real
    # routers show (`simulator.imbalance`). Balance that is forced is declared: moe=forced_balance.
    expert_popularity_exponent: Annotated[float, Limits(0, 10)] | None = None
