"""A tiny random Llama with a tokenizer of bytes, as a model of ours, and its text."""

from pathlib import Path

import torch
from gloo import leave
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from pangu.compress import main
from pangu.weights.convert import import_model

TEXT = Path(__file__).read_text() * 4
VOCABULARY = 272


def byte_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {letter: 1 + number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


SETTINGS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "initializer_range": 0.15,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
}


def llama(folder: Path, **changes: object) -> PreTrainedModel:
    """The model of transformers; `folder / "ours"` is the same one, imported."""
    return saved(LlamaConfig(**{**SETTINGS, **changes}), folder)


def saved(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """A random model of `config`, no two layers of it alike, channels of different size."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("norm.weight"):
                value.copy_(1 + 0.3 * torch.randn_like(value))
    model.save_pretrained(folder / "theirs")
    byte_tokenizer(folder / "theirs")
    import_model(folder / "theirs", folder / "ours")
    (folder / "text").write_text(TEXT)
    return model


def compress(words: list[object]) -> int:
    """`python -m pangu.compress` in this process; its exit code."""
    leave()
    return main([str(word) for word in words])
