"""The tokenizer inside a `.gguf` file, as a `tokenizer.json` of the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from pangu.checkpoint.tensor_files import WeightsError
from pangu.weights.gguf_file import Gguf

_CONTROL = 3  # llama.cpp's token types: normal 1, unknown 2, control 3, user defined 4, …
_USER_DEFINED = 4
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """How text is cut before byte pairs are merged, by llama.cpp's name for it."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if name == "gpt-2":
        return words
    if name == "qwen2":
        split = pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated")
        return pre_tokenizers.Sequence([split, whole])
    return None


def tokenizer_of(file: Gguf) -> Tokenizer:
    """The tokenizer with its control tokens as special ones.

    Raises:
        WeightsError: it is of a kind that is not known here.
    """
    kind = file.value("tokenizer.ggml.model")
    name = str(file.value("tokenizer.ggml.pre", ""))
    cut = _pre_tokenizer(name)
    if kind != "gpt2" or cut is None:
        raise WeightsError(f"{file.path} has a tokenizer of kind {kind}/{name}: not known here")
    tokens: list[str] = file.value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    types: list[int] = file.value("tokenizer.ggml.token_type", [])
    for token, type_ in zip(tokens, types, strict=False):
        if type_ in (_CONTROL, _USER_DEFINED):
            special = type_ == _CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    return tokenizer


def write_tokenizer(file: Gguf, folder: Path) -> None:
    """`tokenizer.json`, `tokenizer_config.json` and the chat template of `file`."""
    import json

    tokenizer_of(file).save(str(folder / "tokenizer.json"))
    tokens = file.value("tokenizer.ggml.tokens")
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in ("bos", "eos", "padding", "unknown"):
        if (number := file.value(f"tokenizer.ggml.{key}_token_id")) is not None:
            short = {"padding": "pad", "unknown": "unk"}.get(key, key)
            settings[f"{short}_token"] = tokens[number]
    if template := file.value("tokenizer.chat_template"):
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
