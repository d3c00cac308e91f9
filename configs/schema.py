"""The configuration tree as dataclasses: what every key means, its unit and its default.

YAML files beside this module fill it in; `configs.compose` reads them and `configs.check` finds
what cannot work. Every number has its limits in its type (`configs.limits`). No torch here: the
trainer and the simulator both start from this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from configs.limits import (
    Amount,
    Count,
    Experts,
    Layers,
    Limits,
    Part,
    Positive,
    Ranks,
    Scale,
    Steps,
    Width,
)
from configs.planning import InferenceConfig, SimulationConfig
from configs.recording import CheckpointConfig, ProfileConfig, WatchConfig
from configs.running import BackendConfig, EngineConfig, LaunchConfig

KeyRounding = Literal["token", "channel"]
# megatron-core's names of a layer's linears; gate and up are `linear_fc1`, and an MoE layer's are
# its shared expert's; those of its routed experts are `experts_fc1` and `experts_fc2`.
LoraModule = Literal[
    "linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj",
    "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj", "linear_fc1", "linear_fc2",
    "experts_fc1", "experts_fc2",
]  # fmt: skip


@dataclass
class ModelConfig:
    """Shape of a language model. Everything that adds a parameter is here, except the router's
    own options (`MoEConfig`).

    `num_experts = 0` is a dense model. Widths are in elements, `rotary_base` is RoPE's θ.
    """

    name: str
    num_layers: Annotated[int, Limits(1, 10_000)]
    hidden_size: Annotated[int, Limits(1, 2**24)]
    num_attention_heads: Annotated[int, Limits(1, 2**16)]
    vocab_size: Annotated[int, Limits(1, 2**24)]
    ffn_hidden_size: Width = 0  # width of the dense layers' MLP; unused when every layer is MoE
    num_query_groups: Width = 0  # KV heads of GQA; 0 = as many as query heads
    kv_channels: Width = 0  # head size; 0 = hidden_size / num_attention_heads
    max_position_embeddings: Count = 4096

    attention: Literal["gqa", "mla"] = "gqa"
    q_lora_rank: Width = 0  # MLA; 0 = no low-rank query projection
    kv_lora_rank: Width = 0
    qk_head_dim: Width = 0  # MLA head size without rotation
    qk_pos_emb_head_dim: Width = 0  # MLA head size with rotation
    v_head_dim: Width = 0
    add_qkv_bias: bool = False
    add_attention_output_bias: bool = False
    qk_layernorm: bool = False
    rotary_base: Annotated[float, Limits(1, 1e18)] = 10000.0
    position_embedding: Literal["rope", "learned"] = "rope"
    # Positions beyond the original length: pairs of channels that turn less than `rope_slow` times
    # over it are slowed down by the factor, those that turn more than `rope_fast` times stay (YaRN,
    # and Llama 3.1's way). Queries and keys are multiplied by the attention factor each.
    rope_scaling: Literal["none", "yarn", "llama3"] = "none"
    rope_factor: Annotated[float, Limits(1, 1e6)] = 1.0
    rope_original_positions: Count = 4096
    rope_fast: Positive = 32.0
    rope_slow: Positive = 1.0
    rope_attention_factor: Positive = 1.0

    activation: Literal["swiglu", "gelu"] = "swiglu"
    add_mlp_bias: bool = False
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: Part = 1e-5
    tie_embeddings: bool = False

    num_experts: Experts = 0
    moe_ffn_hidden_size: Width = 0
    shared_expert_ffn_hidden_size: Width = 0  # one ungated MLP beside the routed experts; 0 = none
    num_dense_layers: Layers = 0  # leading layers with a dense MLP
    mtp_num_layers: Layers = 0  # multi-token prediction depth
    # L-MTP: so many heads, the model's own among them (0: it alone); head i (from 0) predicts the
    # token leap_stride * i + 1 positions on.
    leap_heads: Layers = 0
    leap_stride: Annotated[int, Limits(1, 64)] = 2
    # Weight of the loss of multi-token prediction, the mean of its depths, or of leap heads, beside
    # the main loss.
    mtp_loss_scaling_factor: Scale = 0.1

    # Layers, from 0, whose input passes a bias-free linear `[hidden, hidden]` first: where layers
    # were pruned away, it leads over the gap (LinearPatch).
    patched_layers: list[Layers] = field(default_factory=list)

    # What comes into the layers' linears is rounded to so many bits, token by token, symmetrically;
    # 0: it is not.
    activation_bits: Annotated[int, Limits(0, 8)] = 0
    # It passes a learned matrix first, the Kronecker product of two whose inverse is in the weight,
    # and is rounded within a learned part of its largest (FlatQuant); `pangu.compress` learns them.
    input_transforms: bool = False
    # Keys and values are rounded to so many bits before they are kept; 0: they are not. Keys either
    # by "token", after their rotation, in the Hadamard basis of a head (QuaRot), or by "channel",
    # before it, between limits that are a part of the model (KVQuant; not with latent attention).
    kv_bits: Annotated[int, Limits(0, 8)] = 0
    key_rounding: KeyRounding = "token"

    # LoRA: beside each of these linears a product of two matrices of this rank, times
    # lora_alpha / lora_rank, and nothing else is trained; 0: none. In training a part
    # `lora_dropout` of what comes into the products is set to zero.
    lora_rank: Width = 0
    lora_alpha: Positive = 16.0
    lora_dropout: Annotated[float, Limits(0, 0.99)] = 0.0
    lora_modules: list[LoraModule] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )

    # Depth-scaled sandwich norm (Pangu Ultra): a second norm after each sublayer, whose gain
    # starts at c/sqrt(num_layers).
    sandwich_norm: bool = False
    sandwich_attention_gain: Scale = 0.283
    sandwich_mlp_gain: Scale = 0.432
    # "tiny" is TinyInit: std = sqrt(1 / (2 * hidden_size * num_layers)), embedding std 0.5.
    init: Literal["normal", "tiny"] = "normal"
    init_std: Scale = 0.02


RouterType = Literal["moge", "top_k", "group_limited", "expert_choice", "forced_balance"]
DispatcherType = Literal["local", "allgather", "alltoall", "deduplicated", "hierarchical", "moge"]
DispatchDtype = Literal["model", "bf16", "int8"]
AuxLossScope = Literal["micro_batch", "sequence", "ep_group", "dp_group", "global_batch"]


@dataclass
class MoEConfig:
    """How tokens find experts, and how they travel.

    A model preset fills in its published routing; the `moe` group overrides it.
    `num_expert_groups` is MoGE's M (and DeepSeek's n_group); `top_k` is K.
    """

    router: RouterType = "top_k"
    top_k: Annotated[int, Limits(1, 2**16)] = 1
    num_expert_groups: Annotated[int, Limits(1, 2**16)] = 1
    topk_group: Experts = 0  # group_limited: how many groups a token may use
    # gated (CMoE): softmax over |SiLU(x·W)·(x·U)|; weights 1, with router_scale 1 + score·scale.
    score_function: Literal["softmax", "sigmoid", "gated"] = "softmax"
    # top_k only: softmax over the chosen logits (the MoGE paper's baseline, Mixtral) or over all.
    softmax_after_top_k: bool = False
    # CMoE inside experts: so many experts after each other are the parts of one, which the router
    # chooses whole (0: experts have no parts). Of its parts the first `shared_parts` serve all its
    # tokens, and each token `active_parts` of the others; top_k counts parts.
    expert_parts: Experts = 0
    shared_parts: Experts = 0
    active_parts: Experts = 1
    renormalize: bool = False  # chosen weights sum to 1
    scaling_factor: Scale = 1.0  # multiplies the chosen weights
    # Learned factor per expert, initialised to 1 (released Pangu Pro); with gated scores to 0.
    router_scale: bool = False
    # In training an expert serves so many times its even share of a rank's tokens at most, those
    # that weigh it highest, which bounds memory whatever the router does. 0: everyone is served.
    capacity_factor: Scale = 0.0
    expert_bias: bool = False  # bias-balanced, aux-loss-free: the bias moves the choice only
    expert_bias_update_rate: Scale = 1e-3
    aux_loss_scope: AuxLossScope = "micro_batch"
    aux_loss_coefficient: Scale = 1e-2
    z_loss_coefficient: Scale = 0.0
    # How tokens reach experts on other ranks (`configs.dispatch`): all of them gathered by every
    # rank; a row for each expert; a token once to each rank that holds some of its experts; tokens
    # gathered between nodes, rows exchanged inside (Pangu Ultra); or in MoGE's equal splits.
    dispatcher: Literal["auto", DispatcherType] = "auto"
    # Tokens on their way to experts: as the model computes, or rounded, in int8 with a scale per
    # token. Their gradients are not. On the way back rows travel and are summed in `combine_dtype`.
    dispatch_dtype: DispatchDtype = "model"
    combine_dtype: Literal["model", "bf16", "fp32"] = "model"
    # A layer's tokens travel in so many chunks in training, one beside the experts that compute
    # another; of one chunk nothing is beside them but the shared expert.
    dispatch_chunks: Annotated[int, Limits(1, 1024)] = 1
    # Where experts are (Pangu Ultra): always on the same rank, or moved between ranks every so many
    # steps, in layers where the coefficient of variation of device load falls by so much.
    placement: Literal["static", "dynamic"] = "static"
    placement_period: Count = 50
    placement_threshold: Scale = 0.08

    @property
    def equal_groups(self) -> int:
        """Groups of which a token chooses as many experts each: MoGE's, else one of all."""
        return self.num_expert_groups if self.router == "moge" else 1

    @property
    def fixed_choices(self) -> bool:
        """Whether every token has `top_k` experts that serve it."""
        return self.router != "expert_choice" and not self.capacity_factor


@dataclass
class ParallelConfig:
    """How the model is laid out over ranks, in Megatron's names.

    Data parallelism is what is left: world / (tensor * pipeline * context).
    """

    tensor_model_parallel_size: Ranks = 1
    sequence_parallel: bool = True  # takes effect when tensor_model_parallel_size > 1
    pipeline_model_parallel_size: Ranks = 1
    # Model chunks per pipeline rank.
    virtual_pipeline_model_parallel_size: Annotated[int, Limits(1, 10_000)] = 1
    # Layers of each virtual stage in order of depth (chunk-major), or null for an even split.
    # 0 is allowed: stages that hold only the embedding or the head. Where the last stage but one
    # holds none, multi-token prediction stands there, and the loss alone on the last.
    pipeline_layout: list[Layers] | None = None
    # Identity layers that fill an uneven depth up to the next multiple of the stages.
    num_noop_layers: Layers = 0
    context_parallel_size: Ranks = 1
    context_parallel_type: Literal["all_to_all", "ring"] = "all_to_all"
    expert_model_parallel_size: Ranks = 1
    expert_tensor_parallel_size: Ranks = 1
    # 0: plain data parallelism; 1: optimizer state sharded (megatron-core's distributed
    # optimizer); 2: gradients too; 3: weights too. engine=deepspeed has all of them.
    zero_stage: Annotated[int, Limits(0, 3)] = 1
    schedule: Literal["1f1b", "gpipe", "zero_bubble"] = "1f1b"
    # Expert communication of one micro-batch beside another's computing: a forward beside a
    # backward pass.
    overlap_expert_parallel: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


# megatron-core's names, and two of ours: `moe_permute`, from a token to its experts' rows (router,
# sorting, and the way between ranks once more); `moe_fc1`, the experts' first product with what
# `moe_act` recomputes.
RecomputeModule = Literal[
    "core_attn",
    "layernorm",
    "mla_up_proj",
    "mlp",
    "moe",
    "moe_act",
    "moe_fc1",
    "moe_permute",
    "shared_experts",
]


@dataclass
class MemoryConfig:
    """What is kept for the backward pass.

    `selective` recomputes `recompute_modules`; `full` recomputes whole layers,
    `recompute_num_layers` at a time (uniform) or the first so many of each stage (block). What is
    swapped waits on the host until it is needed; on a CPU that is a file in `run_dir`. `auto`
    stands for the modules that `simulator.memory_policy` chooses on the machine `hardware`.
    """

    recompute_granularity: Literal["none", "selective", "full", "auto"] = "none"
    limit_gib: Positive | None = None  # that no rank's peak may pass, with `auto` alone
    recompute_modules: list[RecomputeModule] = field(default_factory=lambda: ["core_attn"])
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: Annotated[int, Limits(1, 10_000)] = 1
    swap: list[RecomputeModule] = field(default_factory=list)  # activations of these modules
    swap_optimizer: bool = False  # its state, between steps; the trainer on a CPU alone


@dataclass
class DataConfig:
    """Tokenised corpora.

    `blend` maps a prefix of Megatron `.bin/.idx` files to its weight, of the tokens that are drawn
    or, `blend_by = "documents"`, of the documents. `name = "stdlib"` prepares Python's standard
    library source and needs no blend.
    """

    name: Literal["stdlib", "indexed", "synthetic"] = "stdlib"
    cache_dir: str = "data"
    blend: dict[str, Positive] = field(default_factory=dict)
    validation_blend: dict[str, Positive] = field(default_factory=dict)
    blend_by: Literal["tokens", "documents"] = "tokens"
    tokenizer: str = ""  # path of the tokenizer that wrote the corpus
    # Document-aware masking: attention stays inside a document, positions restart with it.
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False
    num_workers: Annotated[int, Limits(0, 1024)] = 0
    # Read the corpus through before the run, against its checksums: true at every start, null once
    # per file of up to 2 GiB, false never. Its structure is always checked.
    verify: bool | None = None


@dataclass
class Phase:
    """One stretch of training with its own schedule, e.g. Pangu Pro's general, reasoning and
    annealing phases. Starts where the one before it ended."""

    name: str
    steps: Steps
    lr: Scale
    min_lr: Scale
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Amount = 0
    global_batch_size: Count | None = None  # sequences; null keeps train.global_batch_size
    seq_length: Count | None = None  # tokens; null keeps train.seq_length


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate. `lr` is the peak, per step; `phases` replaces the single
    schedule."""

    lr: Scale = 3e-4
    min_lr: Scale = 3e-5
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Amount = 0
    decay_steps: Amount | None = None  # wsd: length of the final decay; null = a tenth of the steps
    adam_beta1: Annotated[float, Limits(0, 0.999999)] = 0.9
    adam_beta2: Annotated[float, Limits(0, 0.999999)] = 0.95
    adam_eps: Scale = 1e-8
    # Of AdamW's two moments; bf16 halves them. Float64 training keeps float64 under fp32.
    moments_dtype: Literal["fp32", "bf16"] = "fp32"
    weight_decay: Scale = 0.1
    clip_grad: Scale = 1.0
    phases: list[Phase] = field(default_factory=list)


@dataclass
class TrainConfig:
    """Length and batch of a run; batch sizes are in sequences, `seq_length` in tokens. Without
    validation where `validate_every` or `validation_batches` is 0."""

    steps: Steps = 100
    micro_batch_size: Count = 1
    global_batch_size: Count = 8
    seq_length: Count = 256
    # L-MTP's first stage: leap heads are trained, and every other weight keeps its bits.
    leap_heads_only: bool = False
    validate_every: Amount = 50
    validation_batches: Amount = 8  # global batches
    log_every: Count = 1
    # Non-finite steps in a row before rolling back, and rollbacks before giving up (exit 3).
    max_skipped_steps: Amount = 5
    max_rollbacks: Amount = 2


@dataclass
class Config:
    """The whole tree. `devices` is the size of a planned cluster; a real run knows its own."""

    model: ModelConfig
    moe: MoEConfig = field(default_factory=MoEConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    hardware: dict[str, Any] | None = None  # a preset of configs/hardware, read by the simulator
    devices: Ranks | None = None
    seed: Annotated[int, Limits(0, 2**32 - 1)] = 1234
    run_dir: str = "runs/default"

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.devices or self.launch.processes * self.launch.nodes

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the dense part; 0 where the sizes do not divide."""
        p = self.parallel
        size = (
            p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
        )
        return 0 if self.world_size % size else self.world_size // size

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per step and replica; 0 where the sizes do not divide."""
        per_pass = self.train.micro_batch_size * self.data_parallel_size
        if not per_pass or self.train.global_batch_size % per_pass:
            return 0
        return self.train.global_batch_size // per_pass
