"""Forces from node embeddings (FAENet, section 4, output block; Table 7).

The head sees the system in its frame, and its forces are in that frame: F = F' U^T turns them back.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from faenet_ocp.common.checks import activation, choice, switched_off, whole_number
from faenet_ocp.models.norms import RankBatchNorm

FORCE_DECODERS = ("mlp", "simple", "res", "res_updown")
FORCE_NORMS = ("batch1d", "layer", "none")


class ForceHead(nn.Module):
    """A force vector for every atom from its embedding alone.

    With dense(a, b) = act(norm(linear from a to b channels)), C hidden_channels and H
    force_hidden_channels:

        simple       F = W act(linear(C, H)), without norm
        mlp          F = W dense(C, H)
        res          F = W dense(C, H) of h + dense(C, C) dense(C, C) h
        res_updown   F = W dense(C, H) of h + dense(H, C) dense(H, H) dense(C, H) h

    Args:
        hidden_channels: C, as in `FAENet`.
        force_decoder_type: one of the above.
        force_hidden_channels: H.
        force_norm: "batch1d" (BatchNorm over the atoms of all ranks, the authors' choice: running
            statistics when evaluating, so that predictions do not depend on the batch), "layer",
            or "none" (or null).
        act: activation function.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    def __init__(
        self,
        *,
        hidden_channels: int = 256,
        force_decoder_type: str = "mlp",
        force_hidden_channels: int = 256,
        force_norm: str | None = "batch1d",
        act: str = "swish",
    ) -> None:
        super().__init__()
        kind = choice("force_decoder_type", force_decoder_type, FORCE_DECODERS)
        norm = "none" if switched_off(force_norm) else choice("force_norm", force_norm, FORCE_NORMS)
        channels = whole_number("hidden_channels", hidden_channels, minimum=1)
        inner = whole_number("force_hidden_channels", force_hidden_channels, minimum=1)
        sizes = {"res": (channels,) * 3, "res_updown": (channels, inner, inner, channels)}
        self.residual = _mlp(sizes[kind], norm, act) if kind in sizes else None
        self.hidden = _mlp((channels, inner), "none" if kind == "simple" else norm, act)
        self.out = nn.Linear(inner, 3)

    def forward(self, node_embedding: Tensor) -> Tensor:
        """(N, C) -> forces in the frame, (N, 3). In full precision also under autocast."""
        h = node_embedding
        with torch.autocast(h.device.type, enabled=False):
            if self.residual is not None:
                h = h + self.residual(h)
            return self.out(self.hidden(h))


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.act = activation("act", name)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def _mlp(sizes: tuple[int, ...], norm: str, act: str) -> nn.Sequential:
    """Linear layers between these numbers of channels, each with its norm and activation."""
    layers: list[nn.Module] = []
    for in_channels, out_channels in pairwise(sizes):
        layers.append(nn.Linear(in_channels, out_channels))
        if norm != "none":
            layers.append((RankBatchNorm if norm == "batch1d" else nn.LayerNorm)(out_channels))
        layers.append(_Activation(act))
    return nn.Sequential(*layers)
