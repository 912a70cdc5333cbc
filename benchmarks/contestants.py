"""What the SDK is timed beside: interpolation, and the same network run by other means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sdk import Bundle, Upscaler
from sdk.backends import MODULES
from sdk.errors import BackendError, BackendUnavailable, BundleError, OptionError, SRError

from . import plain, torch_eager
from .bilinear import bilinear_bundle
from .cores import strays
from .pictures import BICUBIC, BILINEAR, LANCZOS, enlarge
from .result import first_line

# (h, w, 3), or (N, h, w, 3) of a batch, uint8 -> the same, scale times as large.
Runner = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Contestant:
    """engine: a backend of the SDK, THROUGH and a backend for interpolation on it, or one of OTHERS."""

    engine: str
    device: str
    precision: str

    @property
    def name(self) -> str:
        parts = (self.engine, "" if self.precision == "uint8" else self.precision, self.device.replace("cpu", ""))
        return " ".join(filter(None, parts))


@dataclass(frozen=True)
class Setup:
    """What all of them run.

    run: folder of the weights that PyTorch uses. threads: cores the process is limited to. batch: windows that the SDK
    runs at once, None is what the engine likes.
    """

    model: str | None = None
    stage: str = "auto"
    run: Path | None = None
    threads: int | None = None
    batch: int | None = None


THROUGH = "bilinear through "
BASELINE = Contestant("bilinear", "cpu", "uint8")
REFERENCE = Contestant("onnxruntime", "cpu", "fp32")
EAGER = Contestant("pytorch", "cpu", "fp32")
CONTESTANTS = (
    BASELINE,
    Contestant("bicubic", "cpu", "uint8"),
    Contestant("lanczos", "cpu", "uint8"),
    Contestant("opencv bilinear", "cpu", "uint8"),
    Contestant("opencv bicubic", "cpu", "uint8"),
    Contestant("opencv lanczos", "cpu", "uint8"),
    Contestant(f"{THROUGH}onnxruntime", "cpu", "fp32"),
    Contestant(f"{THROUGH}openvino", "cpu", "fp32"),
    Contestant(f"{THROUGH}tensorrt", "cuda:0", "fp16"),
    Contestant(f"{THROUGH}onnxruntime", "cuda:0", "fp16"),
    REFERENCE,
    Contestant("openvino", "cpu", "fp32"),
    Contestant("openvino", "cpu", "bf16"),
    Contestant("onnxruntime", "cpu", "int8"),
    Contestant("openvino", "cpu", "int8"),
    Contestant("tensorrt", "cuda:0", "fp32"),
    Contestant("tensorrt", "cuda:0", "fp16"),
    Contestant("onnxruntime", "cuda:0", "fp32"),
    Contestant("onnxruntime", "cuda:0", "fp16"),
    Contestant("plain onnxruntime", "cpu", "fp32"),
    Contestant("plain openvino", "cpu", "fp32"),
    Contestant("plain openvino", "cpu", "bf16"),
    Contestant("plain onnxruntime", "cuda:0", "fp32"),
    Contestant("plain onnxruntime", "cuda:0", "fp16"),
    EAGER,
    Contestant("pytorch", "cpu", "bf16"),
    Contestant("pytorch compiled", "cpu", "bf16"),
    Contestant("pytorch", "cuda:0", "fp32"),
    Contestant("pytorch", "cuda:0", "fp16"),
    Contestant("pytorch", "cuda:0", "bf16"),
    Contestant("pytorch compiled", "cuda:0", "fp16"),
)


def choose(names: tuple[str, ...]) -> tuple[Contestant, ...]:
    """Give the contestants of those names, and the baseline; all of them for no names.

    Raises: OptionError for a name that none has.
    """
    known = {contestant.name: contestant for contestant in CONTESTANTS}
    if wrong := [name for name in names if name not in known]:
        raise OptionError(f"no contestant is called {wrong[0]!r}; there are {', '.join(known)}")
    return tuple(each for each in CONTESTANTS if not names or each.name in names or each == BASELINE)


def open_contestants(
    contestants: Iterable[Contestant], setup: Setup, stack: ExitStack
) -> tuple[dict[Contestant, Runner], list[dict[str, str]]]:
    """Make ready what runs here; give the rest with reasons. `stack` closes them.

    Raises: the SRErrors of open_contestant that are about what was asked for.
    """
    runners, skipped = {}, []
    for contestant in contestants:
        try:
            with ExitStack() as own:  # what is skipped leaves no thread behind
                runners[contestant] = open_contestant(contestant, setup, own)
                stack.enter_context(own.pop_all())
        except (BackendError, BundleError) as exc:  # BundleError: exported without that precision
            skipped.append({"contestant": contestant.name, "reason": str(exc)})
        except SRError:
            raise
        except Exception as exc:  # each engine has errors of its own
            skipped.append({"contestant": contestant.name, "reason": first_line(exc)})
    return runners, skipped


def open_contestant(contestant: Contestant, setup: Setup, stack: ExitStack) -> Runner:
    """Make a runner ready; `stack` closes it.

    Raises: BackendUnavailable if it cannot run here, another SRError for a model or run that is not right.
    """
    backend = contestant.engine.removeprefix(THROUGH)
    before = strays()
    if backend in MODULES:
        model: str | Path | None = setup.model
        if backend != contestant.engine:
            model = stack.enter_context(bilinear_bundle(Bundle.load(setup.model).manifest.scale))
        upscaler = Upscaler(
            model, backend=backend, device=contestant.device, precision=contestant.precision,
            stage=setup.stage if model == setup.model else "auto", batch=setup.batch or "auto",
        )  # fmt: skip
        runner = _sdk(stack.enter_context(upscaler))
    else:
        runner = OTHERS[contestant.engine](contestant, setup)
    is_network = contestant.precision != "uint8"
    if setup.threads is not None and is_network and contestant.device == "cpu" and strays() - before:
        raise BackendUnavailable(f"{contestant.name} does not keep to the cores that --threads gives it")
    return runner


def _sdk(upscaler: Upscaler) -> Runner:
    return lambda lr: upscaler.upscale(lr) if lr.ndim == 3 else np.stack(upscaler.upscale_batch(list(lr)))


def _each(enlarge_one: Runner) -> Runner:
    """Make a runner of what takes one picture."""
    return lambda lr: enlarge_one(lr) if lr.ndim == 3 else np.stack([enlarge_one(picture) for picture in lr])


def _pillow(contestant: Contestant, setup: Setup) -> Runner:
    resample = {"bilinear": BILINEAR, "bicubic": BICUBIC, "lanczos": LANCZOS}[contestant.engine]
    return _each(partial(enlarge, scale=Bundle.load(setup.model).manifest.scale, resample=resample))


def _opencv(contestant: Contestant, setup: Setup) -> Runner:
    try:
        import cv2
    except ImportError as exc:
        raise BackendUnavailable("OpenCV is not installed; install sr-sdk[peers]") from exc
    kernels = {
        "opencv bilinear": cv2.INTER_LINEAR, "opencv bicubic": cv2.INTER_CUBIC, "opencv lanczos": cv2.INTER_LANCZOS4
    }  # fmt: skip
    kernel, scale = kernels[contestant.engine], Bundle.load(setup.model).manifest.scale
    return _each(lambda lr: np.asarray(cv2.resize(lr, None, fx=scale, fy=scale, interpolation=kernel)))


def _plain_onnxruntime(contestant: Contestant, setup: Setup) -> Runner:
    return plain.open_onnxruntime(
        Bundle.load(setup.model), stage=setup.stage, device=contestant.device, precision=contestant.precision
    )


def _plain_openvino(contestant: Contestant, setup: Setup) -> Runner:
    return plain.open_openvino(Bundle.load(setup.model), precision=contestant.precision, stage=setup.stage)


def _pytorch(contestant: Contestant, setup: Setup) -> Runner:
    return torch_eager.open_network(
        Bundle.load(setup.model), run=setup.run, device=contestant.device, precision=contestant.precision,
        compiled=contestant.engine == "pytorch compiled", stage=setup.stage,
    )  # fmt: skip


OTHERS: dict[str, Callable[[Contestant, Setup], Runner]] = {
    **dict.fromkeys(("bilinear", "bicubic", "lanczos"), _pillow),
    **dict.fromkeys(("opencv bilinear", "opencv bicubic", "opencv lanczos"), _opencv),
    "plain onnxruntime": _plain_onnxruntime,
    "plain openvino": _plain_openvino,
    **dict.fromkeys(("pytorch", "pytorch compiled"), _pytorch),
}
