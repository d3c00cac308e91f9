"""Models small enough to decode from in a test, and decoding without any cache."""

import gloo
import torch

from configs.compose import load

TINY = [
    "backend=cpu",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "model.vocab_size=64",
    "model.num_experts=8",
    "model.moe_ffn_hidden_size=16",
    "model.shared_expert_ffn_hidden_size=16",
    "model.init_std=0.3",
    "train.seq_length=16",
]
MLA = [
    "model.attention=mla",
    "model.qk_layernorm=true",
    "model.q_lora_rank=24",
    "model.kv_lora_rank=16",
    "model.qk_head_dim=8",
    "model.qk_pos_emb_head_dim=4",
    "model.v_head_dim=6",
]
KINDS = {
    "moge": [],
    "top_k": ["moe.num_expert_groups=1", "moe.top_k=2"],
    "dense": ["model.num_experts=0", "model.ffn_hidden_size=48"],
    "mla": MLA,
    "learned": ["model.position_embedding=learned"],
}


def build(*overrides):
    from pangu.model.build import build_model

    gloo.single()
    return build_model(load([*TINY, *overrides]))[0][0].eval()


def whole_forward(model, tokens):
    """Logits `[seq, vocab]` without any cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0]


def greedy(model, prompt, count):
    """`count` tokens, each the argmax of a forward pass over all before it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(whole_forward(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def prompts(count, seed=0, shortest=1, longest=40, vocab=64):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    return [tuple(torch.randint(vocab, (int(n),), generator=generator).tolist()) for n in lengths]


def decode(engine, requests):
    """Every request's tokens, decoded together."""
    numbers = [engine.add(request) for request in requests]
    found = {number: [] for number in numbers}
    while engine.busy:
        for update in engine.step():
            found[update.number] += update.tokens
    return [found[number] for number in numbers]
