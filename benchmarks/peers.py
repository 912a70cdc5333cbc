"""Small networks of the kinds that other tools tile, briefly trained, for `sr-bench tiling --peer`.

    python -m benchmarks.peers PHOTOGRAPHS OUT

writes compact-x2 (Real-ESRGAN's SRVGGNetCompact) and rrdb-x2 (ESRGAN's RRDBNet), made of spandrel's own classes, as
.safetensors for spandrel and as .onnx for `sr-export --onnx`. Random weights would not carry as far as trained ones.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from sdk.errors import SRError

from .pictures import find_pictures, read_picture
from .quality import reduce

SCALE = 2
LR_SIDE, BATCH = 32, 8
RATE = 1e-3
SEED = 1
# name -> (class of spandrel.architectures, arguments)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "compact": ("Compact", {"num_feat": 32, "num_conv": 16, "upscale": SCALE}),
    "rrdb": ("ESRGAN", {"num_filters": 32, "num_blocks": 2, "scale": SCALE}),
}


def train_peer(
    name: str, photographs: list[np.ndarray], *, steps: int, progress: Callable[[str], None] = lambda news: None
) -> Any:
    """Train a network of NETWORKS on random crops and their bicubic reductions; L1, Adam, a rate that falls to zero.

    photographs: (H, W, 3) uint8, sides of at least LR_SIDE * SCALE.
    """
    import torch
    from torch.nn import functional

    kind, arguments = NETWORKS[name]
    torch.manual_seed(SEED)
    network = getattr(importlib.import_module(f"spandrel.architectures.{kind}"), kind)(**arguments)
    if name == "compact":  # PyTorch's own start fades away in so many plain layers, and nothing is learnt
        *layers, last = (layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d))
        for layer in layers:
            torch.nn.init.kaiming_normal_(layer.weight, a=0.25)
        torch.nn.init.normal_(last.weight, std=1e-3)
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    rng = np.random.default_rng(SEED)
    for step in range(1, steps + 1):
        lr, hr = (torch.from_numpy(part).permute(0, 3, 1, 2) / 255 for part in _draw_batch(photographs, rng))
        loss = functional.l1_loss(network(lr), hr)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            progress(f"{name}: step {step} of {steps}, loss {loss.item():.4f}")
    return network.eval()


def _draw_batch(photographs: list[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Give LR (BATCH, LR_SIDE, LR_SIDE, 3) and HR, uint8."""
    side = LR_SIDE * SCALE
    crops = []
    for index in rng.integers(len(photographs), size=BATCH):
        height, width = photographs[index].shape[:2]
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        crops.append(np.rot90(photographs[index][top : top + side, left : left + side], int(rng.integers(4))))
    return np.stack([reduce(crop, SCALE) for crop in crops]), np.stack(crops)


@click.command()
@click.argument("photographs", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(40), default=800, show_default=True)
def main(photographs: Path, out: Path, steps: int) -> None:
    """Train both networks on the photographs of a folder; takes the extras peers, train and export."""
    import torch
    from safetensors.torch import save_file

    try:
        pictures = [read_picture(path) for path in find_pictures(photographs)]
    except SRError as exc:
        raise click.ClickException(str(exc)) from exc
    pictures = [picture for picture in pictures if min(picture.shape[:2]) >= LR_SIDE * SCALE]
    if not pictures:
        raise click.ClickException(f"{photographs}: no picture has {LR_SIDE * SCALE} pixels on each side")
    out.mkdir(parents=True, exist_ok=True)
    for name in NETWORKS:
        network = train_peer(name, pictures, steps=steps, progress=click.echo)
        save_file(network.state_dict(), out / f"{name}-x{SCALE}.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter that keeps sizes free
            torch.onnx.export(
                network, (torch.zeros(1, 3, LR_SIDE, LR_SIDE),), str(out / f"{name}-x{SCALE}.onnx"), dynamo=False,
                opset_version=17, input_names=["lr"], output_names=["sr"],
                dynamic_axes={"lr": {0: "n", 2: "h", 3: "w"}, "sr": {0: "n", 2: "H", 3: "W"}},
            )  # fmt: skip


if __name__ == "__main__":
    main()
