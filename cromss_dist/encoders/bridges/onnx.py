"""ONNX: an encoder as one file that runs without torch."""

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from cromss_dist.data.staging import write_atomically
from cromss_dist.encoders.bridges.extras import require
from cromss_dist.encoders.bridges.plain import describe, refuse_existing
from cromss_dist.encoders.pretrained import PretrainedEncoder
from cromss_dist.errors import ConfigError, PackageError
from cromss_dist.models.encoder import PROBE_PX

INPUT = "image"
TOLERANCE = 1e-4  # of a map's largest magnitude
_OPSET = 20


def export_onnx(encoder: PretrainedEncoder, path: Path) -> Path:
    """Writes an encoder, in evaluation mode, as an ONNX file, after ONNX Runtime has given the same features with it.

    The input `image` is float32 (batch, bands, height, width) in [0, 1], as `encoder.normalise` makes it; height and width are
    multiples of `card.input_multiple`, and these and batch are free. The outputs `stride_<s>` are the maps, in order. The file's
    metadata say bands and normalisation (`describe`).

    Args:
        encoder: On any device, of any precision; not changed.
        path: File to write; its folder is made.

    Returns:
        `path`.

    Raises:
        ConfigError: the packages are not installed, `path` lies in a package, or the encoder has a layer that ONNX lacks.
        OutputExistsError: `path` is there already.
        PackageError: ONNX Runtime's maps differ by more than `TOLERANCE`.
    """
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    refuse_existing(path)
    maps = _Maps(encoder).eval()
    content = _exported(maps, encoder)
    _check(content, maps, encoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path


class _Maps(nn.Module):
    """A copy of an encoder in float32 on the CPU; the maps as a tuple, which is what the exporter takes."""

    def __init__(self, encoder: PretrainedEncoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).cpu().float()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.encoder(image))


def _exported(maps: _Maps, encoder: PretrainedEncoder) -> bytes:
    from torch.export import Dim

    card = encoder.card
    free = {0: Dim("batch"), 2: card.input_multiple * Dim("rows"), 3: card.input_multiple * Dim("columns")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about torch's own code
        try:
            program = torch.onnx.export(
                maps,
                (_example(encoder, 2, 1, 1),),
                dynamo=True,
                opset_version=_OPSET,
                input_names=[INPUT],
                output_names=[f"stride_{s}" for s in card.strides],
                dynamic_shapes={INPUT: free},
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().split("\n")[0]  # the exporter's own text is a page for developers
            raise ConfigError(f"Encoder {card.encoder!r} cannot be written as ONNX: {reason} Use another route.") from error
    assert program is not None
    model = program.model_proto
    for value, stride in [(model.graph.input[0], 1), *zip(model.graph.output, card.strides, strict=True)]:
        batch, _, height, width = value.type.tensor_type.shape.dim
        batch.dim_param = "batch"
        for size, name in ((height, "height"), (width, "width")):
            size.dim_param = name if stride == 1 else f"{name}/{stride}"
    for key, text in describe(encoder).items():
        model.metadata_props.add(key=key, value=text)
    content: bytes = model.SerializeToString()
    return content


def _check(content: bytes, maps: _Maps, encoder: PretrainedEncoder) -> None:
    """Compares the maps of two images of other sizes than the export saw."""
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for size in ((1, 2, 1), (3, 1, 3)):
        image = _example(encoder, *size)
        with torch.no_grad():
            wanted = maps(image)
        for stride, ours, values in zip(encoder.card.strides, wanted, session.run(None, {INPUT: image.numpy()}), strict=True):
            theirs = torch.from_numpy(values)
            if theirs.shape != ours.shape or not (theirs - ours).abs().max() <= TOLERANCE * ours.abs().max():
                raise PackageError(
                    f"ONNX Runtime gives other features than the encoder at stride {stride}, by more than {TOLERANCE:g} of the "
                    "largest; nothing was written. Use another route, and report this encoder."
                )


def _example(encoder: PretrainedEncoder, batch: int, rows: int, columns: int) -> Tensor:
    """An image in [0, 1] of so many times a size that every encoder accepts, always the same."""
    shape = (batch, encoder.card.in_channels, rows * PROBE_PX, columns * PROBE_PX)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))
