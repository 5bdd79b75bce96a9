"""Judges every update before the optimizer moves, on the device, and says when a run must go back.

A loss or gradient norm that is not finite, or far above what the last updates had, leaves the update out: fused AdamW
skips it where `found_inf` is set. "Far above" is a robust z-score (Iglewicz and Hoaglin, "How to Detect and Handle
Outliers", 1993) of the loss and of the logarithm of the norm,

    z = (x - median) / (1.4826 * MAD + floor)

over a window of accepted updates. Nothing waits for the device until `read`, at logged steps and before a save.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llm_recipes.config import GuardConfig
from llm_recipes.errors import UserError

FINE, NOT_FINITE, LOSS_SPIKE, GRAD_NORM_SPIKE, OVERFLOW = range(5)
NAMES = {
    NOT_FINITE: "not_finite",
    LOSS_SPIKE: "loss_spike",
    GRAD_NORM_SPIKE: "grad_norm_spike",
    OVERFLOW: "overflow",
}
"""Why updates were left out. An overflow under fp16's loss scaling is no trouble: the scale goes down."""
RELATIVE_FLOOR = 0.01
"""Of the loss's median: what deviates by less is nothing, however quiet the window."""
NORM_FLOOR = 0.05
"""Of the norm's logarithm: a twentieth."""
OVERFLOWS_IN_A_ROW = 100


@dataclass(frozen=True)
class LeftOut:
    """An update that was left out."""

    step: int
    """Steps done, this one included."""
    reason: str
    loss: float
    grad_norm: float
    positions: tuple[int, int]
    """The samples of its batch: first, and last + 1."""


class Guard:
    """Of one run, the same on every rank: its figures are summed over all ranks before they come here.

    Args:
        config: window, threshold and patience.
        scales_loss: fp16 with loss scaling, where a gradient that overflows is expected.
    """

    def __init__(self, config: GuardConfig, device: torch.device, scales_loss: bool = False) -> None:
        self.config = config
        self.scales_loss = scales_loss
        self.left_out: dict[str, int] = dict.fromkeys(NAMES.values(), 0)
        """Updates of the whole run, by reason."""
        self.recent: list[LeftOut] = []
        """Those of the last `window` steps, without overflows."""
        self._overflows = 0
        self._usual = torch.full((2, config.window), torch.inf, device=device)
        """Loss and log norm of the last accepted updates, in a ring."""
        self._accepted = torch.zeros((), dtype=torch.int64, device=device)
        self._unread: list[tuple[int, Sequence[int], torch.Tensor]] = []

    def judge(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """The verdict on an update from its loss and gradient norm: FINE, or why it is left out; fp32 scalar."""
        now = torch.stack([loss, grad_norm.log()])
        verdict = torch.zeros_like(loss)
        if self.config.threshold is not None:
            high = self._z_scores(now) > self.config.threshold
            verdict = torch.where(high[1], float(GRAD_NORM_SPIKE), verdict)
            verdict = torch.where(high[0], float(LOSS_SPIKE), verdict)
        bad_norm = OVERFLOW if self.scales_loss else NOT_FINITE
        verdict = torch.where(torch.isfinite(grad_norm), verdict, float(bad_norm))
        verdict = torch.where(torch.isfinite(loss), verdict, float(NOT_FINITE))
        fine = verdict == FINE
        place = (self._accepted % self.config.window).reshape(1, 1).expand(2, 1)
        now = torch.where(fine & torch.isfinite(now), now, self._usual.gather(1, place).squeeze(1))  # norm 0: log -inf
        self._usual.scatter_(1, place, now.unsqueeze(1))
        self._accepted += fine
        return verdict

    def _z_scores(self, now: torch.Tensor) -> torch.Tensor:
        """Of loss and log norm, (2,); -inf while the window says too little."""
        window = self.config.window
        count = self._accepted.clamp(max=window)
        middle = ((count - 1).clamp(min=0) // 2).reshape(1, 1).expand(2, 1)
        # Sorting and not torch.median: that one is refused where deterministic algorithms are asked for.
        median = self._usual.sort(1).values.gather(1, middle)
        away = (self._usual - median).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        spread = 1.4826 * away.sort(1).values.gather(1, middle).squeeze(1)
        median = median.squeeze(1)
        floor = torch.stack([RELATIVE_FLOOR * median[0].abs(), torch.full_like(median[1], NORM_FLOOR)])
        enough = count >= max(8, window // 4)
        return torch.where(enough, (now - median) / (spread + floor), -torch.inf)

    def restart(self) -> None:
        """Another mixture begins: what was usual says nothing of it."""
        self._usual.fill_(torch.inf)
        self._accepted.zero_()
        self.recent = []

    def add(self, step: int, positions: Sequence[int], loss: torch.Tensor, norm: torch.Tensor, verdict: Any) -> None:
        """Note a step's verdict; it is read later."""
        self._unread.append((step, positions, torch.stack([verdict, loss, norm])))

    def read(self) -> list[LeftOut]:
        """The updates left out since the last time, overflows among them; waits for the device.

        Raises:
            UserError: fp16 overflows in every step.
        """
        if not self._unread:
            return []
        rows = torch.stack([figures for _, _, figures in self._unread]).tolist()
        found = []
        for (step, positions, _), (verdict, loss, norm) in zip(self._unread, rows, strict=True):
            self._overflows = self._overflows + 1 if verdict == OVERFLOW else 0
            if verdict != FINE:
                name = NAMES[int(verdict)]
                self.left_out[name] += 1
                found.append(LeftOut(step, name, loss, norm, (positions[0], positions[-1] + 1)))
        last = self._unread[-1][0]
        self._unread = []
        # As if every step had been read by itself: whether and where a run goes back does not depend on when it is.
        for each in found:
            if each.reason != NAMES[OVERFLOW] and not self.too_many:
                self.recent = [*self._within(each.step), each]
        if not self.too_many:
            self.recent = self._within(last)
        if self._overflows >= OVERFLOWS_IN_A_ROW:
            raise UserError(
                f"step {last}: the gradient overflowed fp16 in {self._overflows} steps one after another, and no "
                "update was made; use parallel.precision=bf16-mixed, or look at the data"
            )
        return found

    def _within(self, last: int) -> list[LeftOut]:
        return [each for each in self.recent if each.step > last - self.config.window]

    @property
    def too_many(self) -> bool:
        """Whether the run must go back. After `read`."""
        return len(self.recent) >= self.config.patience

    def state(self) -> dict[str, Any]:
        """For `state.json`: a run that is resumed judges as it would have."""
        assert not self._unread, "verdicts that nobody has read"
        count = int(self._accepted)
        return {
            "usual": self._usual[:, : min(count, self.config.window)].tolist(),
            "accepted": count,
            "recent": [asdict(each) for each in self.recent],
            "left_out": dict(self.left_out),
            "overflows": self._overflows,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up the state of a run; with another window what is usual is learned anew."""
        self.restart()
        self._unread = []
        self.left_out = dict.fromkeys(NAMES.values(), 0) | state["left_out"]
        self.recent = [LeftOut(**each | {"positions": tuple(each["positions"])}) for each in state["recent"]]
        self._overflows = state["overflows"]
        known = len(state["usual"][0])
        if known == min(state["accepted"], self.config.window):
            self._usual[:, :known] = torch.tensor(state["usual"], device=self._usual.device)
            self._accepted.fill_(state["accepted"])
