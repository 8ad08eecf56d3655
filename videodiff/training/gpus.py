"""What GPUs can do, for plans and for the share of it that a run reaches."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """Memory in bytes, dense matrix operations a second in bf16 (fp16 where there is none), bytes a second to peers."""

    memory: float
    flops: float
    link: float


# GiB as drivers tell them; from data sheets dense TFLOP/s, and GB/s a direction between the GPUs of a node.
GPUS = {
    name: GPU(memory * GIB, flops * 1e12, link * 1e9)
    for name, (memory, flops, link) in {
        "b200": (179, 2250, 900), "h200": (140, 989, 450), "h100": (79.6, 989, 450), "a100": (79.3, 312, 300),
        "a100-40": (39.6, 312, 300), "l40s": (44.7, 362, 32), "a10": (22.5, 125, 32), "v100": (31.7, 125, 150),
        "rtx4090": (23.6, 165, 32), "rtx3090": (23.7, 71, 32),
    }.items()
}  # fmt: skip


def by_device_name(name: str) -> GPU | None:
    """The GPU that a driver calls so ("NVIDIA H100 80GB HBM3"); None when it is not in the table."""
    plain = name.lower().replace(" ", "").replace("geforce", "")
    if "a100" in plain and "40gb" in plain:
        return GPUS["a100-40"]
    found = [key for key in GPUS if key in plain]
    return GPUS[max(found, key=len)] if found else None
