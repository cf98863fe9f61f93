"""Draws the curves of a run, as the training notes show them: PYTHONPATH=. python docs/plot_run.py WORKDIR OUT.png"""

import pathlib
import sys

import matplotlib.figure

from finemem_jax.evaluation import report_plots
from finemem_jax.runtime import files

PANELS = {
    "valid operations": "operations/valid_fraction",
    "chunk score": "reward/chunk",
    "global score": "reward/outcome",
    "memory length (tokens)": "memory/tokens",
    "response length (tokens)": "rollout/response_tokens",
    "entropy (nats per token)": "loss/entropy",
}


def main(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Draws a panel for each curve: a point a step, and the moving average."""
    lines = files.read_metrics(workdir)
    figure = matplotlib.figure.Figure(figsize=(10, 5.5), layout="constrained")
    for axes, (title, name) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        points = [(line["step"] + 1, line[name]) for line in lines if name in line]
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, ".", color="0.7", markersize=4)
        axes.plot(steps, report_plots.moving_average(values), color="tab:blue")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("training step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
