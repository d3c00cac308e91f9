"""Runs several layouts of one model in the same processes, and returns what each step gave."""

import warnings

from configs.compose import load

MODEL = [
    "model.hidden_size=32",
    "model.kv_channels=8",
    "model.vocab_size=256",
    "model.num_experts=8",
    "model.moe_ffn_hidden_size=32",
    "model.shared_expert_ffn_hidden_size=32",
    "moe.top_k=2",
    "moe.num_expert_groups=2",
    "data=synthetic",
    "train.seq_length=32",
    "train.global_batch_size=8",
    "train.micro_batch_size=1",
    "optimizer.lr=1e-3",
    "optimizer.warmup_steps=0",
    "backend=cpu",
]


def steps(overrides: list[str], world_size: int, count: int) -> list[tuple[float, ...]]:
    """(loss, gradient norm, and the loss of multi-token prediction if there is any) of the first
    `count` steps on this rank's part of a layout."""
    import gloo

    from pangu.data.datasets import batches, build_datasets
    from pangu.engines.contract import StepShape
    from pangu.engines.megatron import process_groups
    from pangu.engines.placement import ExpertPlacement
    from pangu.moe.load import read_load
    from pangu.training.run import build_engine

    warnings.filterwarnings("ignore")
    config = load([*MODEL, f"launch.processes={world_size}", *overrides])
    process_groups.initialize(config)
    train = config.train
    data = build_datasets(
        config,
        train_samples=count * train.global_batch_size,
        validation_samples=0,
        seq_length=train.seq_length,
    )
    engine = build_engine(config)
    shape = StepShape(config.num_microbatches, train.micro_batch_size, train.seq_length)
    iterator = batches(
        data.train,
        config,
        data_parallel_rank=engine.data_parallel_rank,
        data_parallel_size=engine.data_parallel_size,
        consumed_sequences=0,
        micro_batch_size=train.micro_batch_size,
    )
    results = []
    placement = ExpertPlacement(config, engine)
    for step in range(1, count + 1):
        engine.set_learning_rate(config.optimizer.lr)
        result = engine.train_step(iterator, shape)()
        if placement.active:
            placement.after_step(step, read_load(engine.chunks))
        ahead = () if result.mtp_loss is None else (result.mtp_loss,)
        results.append((result.loss, result.grad_norm, *ahead))
    gloo.drop_groups()
    return results


def all_layouts(
    layouts: dict[str, list[str]], world_size: int, count: int
) -> dict[str, list[tuple[float, ...]]]:
    """`steps` of every layout, by name."""
    return {name: steps(overrides, world_size, count) for name, overrides in layouts.items()}
