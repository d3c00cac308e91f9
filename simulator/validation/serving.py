"""Published latencies of served models, predicted.

The tables give input lengths but neither output lengths nor acceptance of drafted tokens: 1,024
tokens and 0.8 are assumed for every row.
"""

from __future__ import annotations

import csv
from pathlib import Path

from configs.compose import load
from simulator.hardware import load_hardware
from simulator.inference import ServingForecast, forecast
from simulator.serving import serving
from simulator.validation.rows import Outcome

TABLE = Path(__file__).parent / "serving.csv"
QUANTISED = ["inference.weight_dtype=int8", "inference.compute_dtype=int8"]
QUANTISED += ["inference.kv_dtype=int8", "inference.max_new_tokens=1024"]
DENSE = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_query_groups",
    "vocab": "vocab_size",
}


def predict_serving(row: dict[str, str]) -> ServingForecast:
    """The forecast behind one row of `serving.csv`."""
    if row["layers"]:
        model = ["model.name=dense", "model.num_experts=0", "model.kv_channels=128"]
        model += [f"model.{key}={row[column]}" for column, key in DENSE.items()]
    else:
        model = [f"model={row['model']}"]
    layout = [
        f"hardware={row['hardware']}",
        f"devices={row['devices']}",
        f"parallel.tensor_model_parallel_size={row['tp']}",
        f"parallel.expert_model_parallel_size={row['ep']}",
        f"parallel.expert_tensor_parallel_size={row['etp']}",
        f"inference.draft_tokens={row['draft_tokens']}",
        f"model.mtp_num_layers={row['draft_tokens']}",
    ]
    config = load(model + layout + QUANTISED)
    return forecast(serving(config, load_hardware(config.hardware)), int(row["batch"]))


def serving_outcomes() -> list[Outcome]:
    """Every row of the table, predicted."""
    outcomes = []
    with TABLE.open(newline="") as lines:
        for row in csv.DictReader(lines):
            result = predict_serving(row)
            seconds = result.tpot_seconds if row["metric"] == "tpot_ms" else result.ttft_seconds
            outcomes.append(
                Outcome(
                    id=row["id"],
                    source=f"{row['source']} (serving)",
                    metric=row["metric"],
                    measured=float(row["value"]),
                    predicted=1e3 * seconds,
                    split=row["split"],
                    kind="dense" if row["layers"] else "moe",
                    assumptions=row["notes"],
                )
            )
    return outcomes
