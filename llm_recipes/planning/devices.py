"""Devices that a run may be bought, from their vendors' data sheets."""

import difflib
from dataclasses import dataclass

from llm_recipes.config import PlanConfig
from llm_recipes.errors import UserError
from llm_recipes.models.flops import peak_flops

MEMORY_GB = {
    "H200 NVL": 141,
    "H200": 141,
    "H100 NVL": 94,
    "H100 PCIe": 80,
    "H100": 80,
    "A100 40GB": 40,
    "A100": 80,
    "GB200": 186,
    "B200": 180,
}
"""Per device, as the data sheet says it. A device has about 6% more bytes than so many times 10^9: that is left for the
CUDA context, NCCL's buffers and what fragments."""


@dataclass(frozen=True)
class Device:
    """What a run can be put on.

    Attributes:
        name: as it is shown.
        memory: bytes.
        peak: dense bf16 operations a second.
    """

    name: str
    memory: float
    peak: float


def _plain(name: str) -> str:
    """`NVIDIA H100-NVL` and `h100 nvl` alike."""
    return "".join(each for each in name.casefold().replace("nvidia", "") if each.isalnum())


def find(name: str, config: PlanConfig) -> Device:
    """A device by its name, in any case; what the configuration gives by hand goes before the table.

    Raises:
        UserError: it is not in the table, and not given by hand.
    """
    known = {_plain(each): each for each in MEMORY_GB} | {"a10080gb": "A100", "h10080gb": "H100"}
    plain = _plain(name)
    if config.device_memory_gb is not None and config.device_tflops is not None:
        return Device(known.get(plain, name), config.device_memory_gb * 1e9, config.device_tflops * 1e12)
    if plain not in known:
        near = difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
        names = ", ".join(sorted({known[each] for each in near} or MEMORY_GB))
        hint = f"did you mean {names}?" if near else f"known: {names}"
        raise UserError(f"device={name}: not in the table, {hint} (or give device_memory_gb and device_tflops)")
    found = known[plain]
    peak = peak_flops(found)
    assert peak is not None, found
    memory = config.device_memory_gb if config.device_memory_gb is not None else MEMORY_GB[found]
    return Device(found, memory * 1e9, peak if config.device_tflops is None else config.device_tflops * 1e12)
