"""AdamW's two moments in fewer bits (`optim.state`), written back without drifting away.

    bf16    the upper half of an fp32 number: half the memory
    8bit    per number one byte, and for each BLOCK of a row one more for its scale: a quarter

A moment changes by a twentieth of itself or less in a step, which is less than the distance between two short numbers:
rounded to the nearest it would stand still for ever (a second moment that decays slowly stays several times too
large, and the steps as many times too small). So it is rounded at random to one of its two neighbours, with the
chances that make it right on average. Chance is a hash of the number, its place in its row and the step: nothing to
save, and the same after a resume, on any number of processes, and on each copy of the model. (Copies whose reduced
gradients differ in the last bit, which none has been seen to do, would differ by a neighbour's distance.)

Of the 8 bits the second moment, which is never negative, takes 5 for the exponent and 3 for the mantissa, the first
one a sign, 4 and 3: microscaling formats (Rouhani et al., "Microscaling Data Formats for Deep Learning", 2023), as
scales are powers of two: the exponent of the block's largest number, rounded up. So writing what was read changes
nothing. Blocks end where rows end. (Block-wise 8-bit states: Dettmers et al., "8-bit Optimizers via Block-wise
Quantization", 2022, whose code is another, and rounds to the nearest.)

On a GPU none of this has run yet.
"""

import torch
from torch.distributed.tensor import DTensor

from llm_recipes.errors import UserError

BLOCK = 64
"""Numbers of a row that share a scale."""
MANTISSA = 20
"""Bits of an fp32 number that 3 bits of mantissa leave out."""
BF16_LEFT_OUT = 16
LARGEST_SIGNED, LARGEST_UNSIGNED = 127, 255
"""The codes that stand for the scale itself; each 8 below is half as large, 0 is zero."""
SMALLEST_SCALE = 34
"""An exponent as fp32 has it, 2^-93. Below it the codes would be no fp32 numbers any more."""
SCALE = "_scale"

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def is_short(shape: tuple[int, ...], state: str) -> bool:
    """Whether a parameter of this shape has moments of fewer bits. Vectors have not, nor in 8 bits have matrices whose
    rows are no whole blocks: they are few, and stay as they are."""
    if len(shape) < 2 or not shape[-1] or state == "full":
        return False
    return state == "bf16" or shape[-1] % BLOCK == 0


def shapes(shape: tuple[int, ...], storage: torch.dtype, state: str) -> Shapes:
    """The tensors that hold both moments of a parameter, or of a part of it with whole rows.

    Args:
        shape: the parameter's.
        storage: its dtype.
        state: `optim.state`.
    """
    if not is_short(shape, state):
        return {name: (shape, storage) for name in ("exp_avg", "exp_avg_sq")}
    if state == "bf16":
        return {name: (shape, torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
    scales = (*shape[:-1], shape[-1] // BLOCK)
    return {
        name: each
        for moment in ("exp_avg", "exp_avg_sq")
        for name, each in ((moment, (shape, torch.uint8)), (moment + SCALE, (scales, torch.uint8)))
    }


def refuse_cut_rows(name: str, parameter: torch.Tensor, state: str) -> None:
    """
    Raises:
        UserError: numbers that share a scale would lie on several processes.
    """
    if state != "8bit" or not isinstance(parameter, DTensor) or not is_short(tuple(parameter.shape), state):
        return
    if any(each.is_shard(parameter.ndim - 1) for each in parameter.placements):
        raise UserError(
            f"optim.state=8bit: {name} of shape {tuple(parameter.shape)} is cut along its rows, in which numbers "
            "share a scale, on this number of processes; use another number of them, or optim.state=bf16 (a run that "
            "began with 8bit goes on so with run.allow_changes=true)"
        )


def chance(bits: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """A hash of each number's bits, of its place in its row, and of the step: int32, evenly spread over 0 to 2^20 - 1.

    Without the place, neighbours that once were equal would stay so. The constants and shifts are those of a mixer of
    32 bits (C. Wellons, "lowbias32"); int32 wraps around.

    Args:
        bits: int32, rows last.
        step: a scalar tensor on the same device.
    """
    places = torch.arange(bits.shape[-1], dtype=torch.int32, device=bits.device) * 0x2C1B3C6D
    mixed = bits + (places + step.to(torch.int32) * -0x61C88647)  # 2^32 over the golden ratio: steps lie far apart
    mixed ^= (mixed >> 16).bitwise_and_(0xFFFF)
    mixed *= 0x7FEB352D
    mixed ^= (mixed >> 15).bitwise_and_(0x1FFFF)
    mixed *= -0x7B935975
    mixed ^= (mixed >> 16).bitwise_and_(0xFFFF)
    return mixed.bitwise_right_shift_(12).bitwise_and_(0xFFFFF)


def to_bf16(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """fp32 numbers rounded to bf16 at random.

    Args:
        step: a scalar tensor on the same device.
    """
    bits = values.view(torch.int32)
    thrown = bits + (chance(bits, step) >> (MANTISSA - BF16_LEFT_OUT))
    thrown &= -(1 << BF16_LEFT_OUT)
    return thrown.view(torch.float32).to(torch.bfloat16)


def to_8bit(values: torch.Tensor, step: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 numbers rounded to 8 bits at random.

    A number too small for its block's scale becomes 0, or at random the smallest there is, where it may be negative;
    a second moment becomes the smallest there is: as 0 it would divide the first one by next to nothing.

    Args:
        values: (R, L), whole rows; finite, and if not `signed` not negative.
        step: a scalar tensor on the same device.

    Returns:
        Codes, uint8 (R, L), and scales, uint8 (R, L / BLOCK).
    """
    rows, length = values.shape
    largest = LARGEST_SIGNED if signed else LARGEST_UNSIGNED
    bits = values.view(torch.int32)
    blocks = rows, length // BLOCK, BLOCK
    thrown = chance(bits, step).view(blocks)
    bits = bits.view(blocks)
    size = bits & 0x7FFFFFFF if signed else bits
    upper = (size + thrown).bitwise_right_shift_(MANTISSA)
    scales = (upper.amax(-1) + 7 >> 3).clamp_(min=SMALLEST_SCALE)
    below = ((scales << 3) - largest)[..., None]
    codes = upper.sub_(below)
    if signed:
        smallest = (below + 1) << MANTISSA
        odds = thrown * (smallest.view(torch.float32) * 2.0**-MANTISSA)  # evenly spread below the smallest
        codes = torch.where(size < smallest, (size.view(torch.float32) > odds).to(torch.int32), codes)
        codes |= (bits >> 24).bitwise_and_(128)
    else:
        codes.clamp_(min=1).mul_(size > 0)
    return codes.to(torch.uint8).view(rows, length), scales.to(torch.uint8)


def from_8bit(codes: torch.Tensor, scales: torch.Tensor, signed: bool) -> torch.Tensor:
    """The numbers that `to_8bit` has written: fp32 (R, L)."""
    rows, length = codes.shape
    code = codes.view(rows, length // BLOCK, BLOCK).to(torch.int32)
    sizes = code & 127 if signed else code
    below = ((scales.to(torch.int32) << 3) - (LARGEST_SIGNED if signed else LARGEST_UNSIGNED))[..., None]
    values = (sizes + below).bitwise_left_shift_(MANTISSA).mul_(sizes > 0)
    if signed:
        values |= code.bitwise_and_(128).bitwise_left_shift_(24)
    return values.view(torch.float32).view(rows, length)


def read(stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second moment of some rows, (R, L) each, fp32, from what keeps them."""
    first, second = stored["exp_avg"], stored["exp_avg_sq"]
    if first.dtype != torch.uint8:
        return first.float(), second.float()
    return (
        from_8bit(first, stored["exp_avg" + SCALE], signed=True),
        from_8bit(second, stored["exp_avg_sq" + SCALE], signed=False),
    )


def write(stored: dict[str, torch.Tensor], first: torch.Tensor, second: torch.Tensor, step: torch.Tensor) -> None:
    """Put both moments of some rows back; as `read`, and as `to_8bit`."""
    for name, values in (("exp_avg", first), ("exp_avg_sq", second)):
        if stored[name].dtype != torch.uint8:
            stored[name].copy_(to_bf16(values, step))
            continue
        codes, scales = to_8bit(values, step, signed=name == "exp_avg")
        stored[name].copy_(codes)
        stored[name + SCALE].copy_(scales)
