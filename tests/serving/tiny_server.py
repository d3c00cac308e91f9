"""A tiny Llama with a chat template, imported, and a server of it on a real socket."""

import contextlib
import json
import socket
import threading
import time

import openai
import torch
import uvicorn

from pangu.serve import Options, _engine, _server
from pangu.serving.server import application
from pangu.trained_model import Trained

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_theirs(folder, experts=0):
    """A Hugging Face folder of a Llama, or with experts of a Mixtral."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat, and the dog sat on the log"] * 9, trainer)
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=backend.get_vocab_size() + (experts > 0),  # an even number, to be split
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = (
        MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=experts))
        if experts
        else LlamaForCausalLM(LlamaConfig(**sizes))
    )
    model.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@contextlib.contextmanager
def serving(server):
    """The address of a server, in a thread of this process."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(application(server), log_level="warning", access_log=False)
    run = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: run.run(sockets=[listening]))
    thread.start()
    while not run.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        run.should_exit = True
        thread.join()


def client(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


def server_of(folder, loaded, key="", **options):
    """A server of a model, its tokenizer and configuration."""
    asked, trained = Options(checkpoint=str(folder), **options), Trained(*loaded)
    return _server(asked, key, trained, _engine(asked, trained, several=False))
