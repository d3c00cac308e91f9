"""How one copy of a model is laid out on the devices that serve it.

Layout (hybrid hierarchical parallelism, arXiv 2505.21411): `n` devices hold one copy of the model.
Attention runs on n / tp data-parallel groups of tp devices, routed experts on ep x etp = n devices,
dense and shared MLPs and the vocabulary on all n. Around each sublayer the tokens are
reduce-scattered over its devices and gathered for the next, which is an all-reduce in two halves.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from configs.compose import load
from configs.planning import InferenceConfig
from configs.schema import Config, ModelConfig, MoEConfig
from configs.violation import ConfigError, Violation
from simulator.hardware import Hardware


@dataclass(frozen=True)
class Serving:
    """One copy of a model on `devices` devices: the layout and the precisions.

    `draft` is the model that drafts, None where the model's own layers or the prompt do. `chosen`
    are the probabilities `[layers, experts]` that a token chooses each expert, where they were
    measured (`simulator.moesd.read_popularity`), `touched` the tokens of passes and the experts of
    a layer that they touched (`read_touched`).
    """

    config: Config
    hardware: Hardware
    devices: int
    tp: int
    ep: int
    etp: int
    draft: Serving | None = None
    chosen: np.ndarray | None = field(default=None, compare=False)
    touched: tuple[np.ndarray, np.ndarray] | None = field(default=None, compare=False)

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def moe(self) -> MoEConfig:
        return self.config.moe

    @property
    def options(self) -> InferenceConfig:
        return self.config.inference

    @property
    def attention_dp(self) -> int:
        return self.devices // self.tp


def serving(config: Config, hardware: Hardware) -> Serving:
    """The layout of a configuration, checked.

    `parallel.tensor_model_parallel_size` is attention's. Where expert sizes are left at 1, experts
    are spread over all devices.

    Raises:
        ConfigError: with every size that does not divide, or a draft that is no model.
    """
    p, n = config.parallel, config.world_size
    ep, etp = p.expert_model_parallel_size, p.expert_tensor_parallel_size
    experts = config.model.num_experts
    if experts and ep * etp == 1:
        ep = n
    tp = p.tensor_model_parallel_size
    wrong = []
    if n % tp:
        wrong.append(Violation("parallel.tensor_model_parallel_size", tp, f"must divide {n}"))
    if config.model.num_attention_heads % tp:
        wrong.append(Violation("parallel.tensor_model_parallel_size", tp, "must divide the heads"))
    if experts and ep * etp != n:
        reason = f"times the expert tensor-parallel size {etp} must be the {n} devices"
        wrong.append(Violation("parallel.expert_model_parallel_size", ep, reason))
    if experts and experts % ep:
        reason = f"must divide the {experts} experts"
        wrong.append(Violation("parallel.expert_model_parallel_size", ep, reason))
    if p.pipeline_model_parallel_size != 1:
        value = p.pipeline_model_parallel_size
        wrong.append(
            Violation("parallel.pipeline_model_parallel_size", value, "serving has no pipeline")
        )
    limits: dict[str, float] = {
        "batch_size": 0,
        "prompt_length": 1,
        "max_new_tokens": 1,
        "draft_tokens": 0,
        "latency_limit_ms": 0,
    }
    for name, least in limits.items():
        given = getattr(config.inference, name)
        if given is not None and not given >= least:
            wrong.append(Violation(f"inference.{name}", given, f"must be at least {least}"))
    config = _without_16_bits(config, hardware)
    if hardware.decoding:  # where calls are counted, no operator costs another
        launch = replace(hardware.launch_us, matmul=0.0, vector=0.0)
        hardware = replace(hardware, launch_us=launch)
    rate = config.inference.acceptance_rate
    if not 0 <= rate <= 1:
        wrong.append(Violation("inference.acceptance_rate", rate, "must be between 0 and 1"))
    if wrong:
        raise ConfigError(wrong)
    hardware.peak(config.inference.compute_dtype)
    return Serving(config, hardware, n, tp, ep, etp, draft=_draft(config, hardware))


def _without_16_bits(config: Config, hardware: Hardware) -> Config:
    """float32 in place of 16 bits, on a machine that computes in none."""
    if {"bf16", "fp16"} & hardware.peak_tflops.keys():
        return config
    names = ("weight_dtype", "compute_dtype", "kv_dtype")
    wide = {name: "fp32" for name in names if getattr(config.inference, name) in ("bf16", "fp16")}
    return replace(config, inference=replace(config.inference, **wide))  # type: ignore[arg-type]


def _draft(config: Config, hardware: Hardware) -> Serving | None:
    """The model that drafts, whole on every device, each for its share of the sequences."""
    name = config.inference.draft
    if name in ("mtp", "ngram"):
        return None
    try:
        group = "experiment" if name.endswith((".yaml", ".yml")) else "model"
        model = load([f"{group}={name}"])
    except ConfigError as error:
        first = error.violations[0]
        reason = "is not mtp, ngram, or a model's name or file"
        raise ConfigError([Violation("inference.draft", name, reason, first.suggestion)]) from None
    if model.model.vocab_size != config.model.vocab_size:
        reason = (
            f"has {model.model.vocab_size} tokens, {config.model.name} {config.model.vocab_size}"
        )
        raise ConfigError([Violation("inference.draft", name, reason)])
    options = replace(config.inference, draft="ngram", draft_tokens=0)
    return serving(replace(model, hardware=config.hardware, inference=options), hardware)
