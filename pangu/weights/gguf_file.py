"""A `.gguf` file (llama.cpp) seen as a Hugging Face model: the same names, the same config.json.

Quantised tensors are dequantised to float32 one at a time, by the `gguf` package, which reads
plain numbers: nothing in the file is executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pangu.checkpoint.tensor_files import WeightsError

_KINDS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Gguf:
    """The file's tensors under Hugging Face's names; `fields` is its config.json.

    Raises:
        WeightsError: the `gguf` package is missing, the file is damaged, or its architecture or a
            tensor is not known.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise WeightsError("reading .gguf needs the gguf package: pip install gguf") from None
        try:
            self._reader = gguf.GGUFReader(str(path))
        except FileNotFoundError:
            raise WeightsError(f"{path} is missing") from None
        except Exception as error:  # the reader raises whatever the bytes lead it to
            raise WeightsError(f"{path} is no sound GGUF file: {error}") from None
        self._dequantize = gguf.dequantize
        self.path = path
        kind = self.value("general.architecture")
        if kind not in _KINDS:
            raise WeightsError(f"{path} has the architecture {kind}, known are {', '.join(_KINDS)}")
        self.kind = str(kind)
        self._tensors = {self._name(tensor.name): tensor for tensor in self._reader.tensors}
        self.fields = self._fields()

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the file's header."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _name(self, name: str) -> str:
        if name in _WHOLE:
            return _WHOLE[name]
        parts = name.split(".")
        if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in _LAYER:
            return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
        raise WeightsError(f"{self.path} holds {name}, which has no place in a {self.kind} model")

    def _fields(self) -> dict[str, Any]:
        def need(key: str) -> Any:
            value = self.value(f"{self.kind}.{key}")
            if value is None:
                raise WeightsError(f"{self.path} lacks {self.kind}.{key}")
            return value

        if (scaling := self.value(f"{self.kind}.rope.scaling.type", "none")) != "none":
            raise WeightsError(
                f"{self.path} scales its rotary positions ({scaling}): not supported"
            )
        heads, hidden = need("attention.head_count"), need("embedding_length")
        embedding = self.shape("model.embed_tokens.weight")
        return {
            "architectures": [_KINDS[self.kind]],
            "model_type": self.kind,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": need("feed_forward_length"),
            "num_hidden_layers": need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.value(f"{self.kind}.attention.head_count_kv", heads),
            "head_dim": self.value(f"{self.kind}.attention.key_length", hidden // heads),
            # The file has float32: 1e-5 comes as 9.9999997e-06.
            "rms_norm_eps": float(f"{need('attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": float(self.value(f"{self.kind}.rope.freq_base", 10000.0)),
            "max_position_embeddings": need("context_length"),
            "vocab_size": embedding[0],
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "bos_token_id": self.value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.value("tokenizer.ggml.eos_token_id"),
            "torch_dtype": "float32",
        }

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Rows first, as in torch; GGUF lists dimensions the other way round."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> torch.Tensor:
        """Float32, with the rows of queries and keys in Hugging Face's order."""
        tensor = self._tensors[name]
        values = torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type).copy())
        values = values.view(self.shape(name)).float()
        # Only for llama does llama.cpp interleave the halves that the rotation pairs.
        if self.kind == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            grouped = values.unflatten(0, (self.fields[heads], -1, 2))
            values = grouped.transpose(1, 2).reshape(values.shape)
        return values
