"""The time of a profile of a large model on many GPUs: computed, not measured.

    python benchmarks/scaling_model.py    # writes benchmarks/results/scaling_computed.csv

Operations and bytes are counted: `tests/ranks` compares sent data with the needed data, and
`bench_distributed.py` measures it. The rate of arithmetic is that of a training step as measured on
one H100 (`results/engines_nvidia-h100-80gb-hbm3.csv`). The rates of NVLink and InfiniBand are
NVIDIA's own figures for an H100 of a DGX, as no two GPUs were measured. No overlap is assumed, so a
run that prefetches takes less.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROWS, TOKENS_A_ROW = 400, 64
"""Rows, and tokens of each row, of the forget and of the retain data each."""
N_RISKS = 2
BATCH = 8192
"""Tokens that a rank takes at once."""
GIB = 2**30

NVLINK, INFINIBAND = 450e9, 50e9
"""Bytes that a GPU sends in a second: to GPUs of its machine, and to other machines."""
PER_MACHINE = 8
STEPS_PARAMETERS = 1.236e9
"""Number of parameters of the model whose training step was measured (Llama-3.2-1B's shape)."""
MEMORY = 80e9


@dataclass(frozen=True)
class Model:
    """A Llama.

    Attributes:
        name: its name.
        parameters: number of parameters.
    """

    name: str
    parameters: float


MODELS = (Model("Llama-3-8B", 8.03e9), Model("Llama-3-70B", 70.6e9))


def rate() -> float:
    """Operations a second of a training step on one H100: 6 a parameter and token."""
    with (RESULTS / "engines_nvidia-h100-80gb-hbm3.csv").open(newline="") as file:
        step = next(row for row in csv.DictReader(file) if row["what"] == "training step")
    return 6 * STEPS_PARAMETERS * float(step["tokens"]) / float(step["seconds"])


def computed(model: Model, gpus: int, sharding: str, per_second: float) -> dict[str, object]:
    """A row: memory, operations and bytes of a rank, and the seconds that both take."""
    p, share = model.parameters, (gpus - 1) / gpus
    held = {"none": 1, "fsdp": gpus, "hsdp": PER_MACHINE}[sharding]
    batches = -(-2 * ROWS * TOKENS_A_ROW // (BATCH * gpus))
    tokens = 2 * ROWS * TOKENS_A_ROW / gpus
    # Risks: a step, and products of retain rows with one direction. Objectives, of forget rows
    # alone: a step, for whole gradients, and products with two directions.
    operations = (6 + 2 / 2 + (6 + 2 * N_RISKS) / 2) * p * tokens
    wire = NVLINK if gpus <= PER_MACHINE else INFINIBAND
    between = 0.0
    if sharding == "none":
        sent = 2 * 4 * p * (N_RISKS + 1) * share
    else:
        # In bf16: the weights of a forward and a backward, and directions (rows, sent where they
        # are fewer bytes, would be less). In fp32: sums.
        a_pass = 2 * p * 2 + 4 * p
        sent = batches * (a_pass + 2 * p / 2 + (a_pass + 2 * p * N_RISKS) / 2) * (held - 1) / held
    if sharding == "hsdp":  # sums of parts go on to the other machines
        wire, machines = NVLINK, gpus / PER_MACHINE
        between = batches * 1.5 * 2 * 4 * p / held * (machines - 1) / machines
    memory = (2 * p + 4 * (N_RISKS + 1) * p) / held
    arithmetic, talking = operations / per_second, sent / wire + between / INFINIBAND
    fits = memory < 0.8 * MEMORY
    return {
        "model": model.name,
        "gpus": gpus,
        "sharding": sharding,
        "memory_gib": round(memory / GIB, 1),
        "fits": "yes" if fits else "no",
        "batches": batches,
        "petaflop": round(operations / 1e15, 2),
        "sent_gib": round((sent + between) / GIB, 1),
        "compute_s": round(arithmetic, 2) if fits else "",
        "communication_s": round(talking, 2) if fits else "",
        "seconds": round(arithmetic + talking, 1) if fits else "",
    }


def main() -> None:
    """Write the CSV, and print it."""
    per_second = rate()
    rows = [
        computed(model, gpus, sharding, per_second)
        for model in MODELS
        for gpus in (8, 64)
        for sharding in ("none", "fsdp", "hsdp")
        if sharding != "hsdp" or gpus > PER_MACHINE
    ]
    for row in rows:
        row["tflops_measured"] = round(per_second / 1e12)
        print(row)
    with (RESULTS / "scaling_computed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
