"""Draws the losses of a run."""

from __future__ import annotations

from pathlib import Path

from modq.train.progress import History

SPAN = 0.1
"""Of the moving average drawn over the training loss, as a share of the steps."""


def plot_losses(history: History, path: Path) -> None:
    """Draw the training loss a step, its moving average and the validation loss into a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
    steps = [entry["step"] for entry in history.steps]
    losses = [entry["loss"] for entry in history.steps]
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, label="train")
    if len(losses) >= 50:  # with fewer there is little to smooth
        axes.plot(steps, _smoothed(losses), color="tab:blue", label="train, moving average")
    if history.evals:
        evals = [entry["step"] for entry in history.evals], [entry["loss"] for entry in history.evals]
        axes.plot(*evals, color="tab:orange", marker="o", label="validation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _smoothed(values: list[float]) -> list[float]:
    """The exponential moving average, its start corrected as Adam does it."""
    keep = 1 - 2 / (SPAN * len(values) + 1)
    total, weight, smoothed = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed
