"""How far a stage is: one line a minute."""

from __future__ import annotations

from k8s.decide import Progress

PACE_S = 60.0


class Pace:
    """Step, loss and speed from the heartbeats; what is left by the steps that passed on our own clock."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._said = 0.0

    def line(self, progress: Progress, now: float) -> str:
        figures, step = progress.figures, progress.step
        if figures is None:
            return ""
        if self._first is None or step < self._first[0]:
            self._first, self._said = (step, now), now
        if now - self._said < PACE_S:
            return ""
        self._said = now
        done, seconds = step - self._first[0], now - self._first[1]
        parts = [f"step {step} of {figures.num_steps}", f"loss {figures.loss:.4f}"]
        parts.append(f"{figures.tokens_per_s:,.0f} tokens/s")
        if done > 0:
            parts.append(f"{_duration(seconds / done * (figures.num_steps - step))} left")
        if progress.committed_step is not None:
            parts.append(f"committed {progress.committed_step}")
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
