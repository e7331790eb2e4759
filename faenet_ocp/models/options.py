"""Options of FAENet and its heads: names, defaults, and what each may be, in one place."""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

from faenet_ocp.common.checks import choice, flag, positive, switched_off, whole_number
from faenet_ocp.models.base import Options, option
from faenet_ocp.models.functional import ACTIVATIONS

EDGE_EMBED_TYPES = ("all_rij", "rij", "sh", "all")
MP_TYPES = ("base", "simple", "basic", "updownscale", "updownscale_base", "updown_local_env", "base_with_att", "att")
ATTENTION = ("base_with_att", "att")
GRAPH_NORMS = ("system", "batch", "none")
ENVELOPES = ("none", "polynomial")
SKIP_CONNECTIONS = ("concat", "add", "concat_atom", "none")
ENERGY_HEADS = ("weighted-av-final-embeds", "weighted-av-initial-embeds", "sum")
FORCE_DECODERS = ("mlp", "simple", "res", "res_updown")
FORCE_NORMS = ("batch1d", "layer", "none")


def _one_of(allowed: tuple[str, ...], *, off: str = "", on: str = "") -> Any:
    """A check for one of these names; false, null or "" stand for `off`, true for `on`."""

    def check(name: str, value: Any) -> str:
        if off and switched_off(value):
            return off
        return choice(name, on if on and value is True else value, allowed)

    return check


def _at_least(minimum: int) -> Any:
    return partial(whole_number, minimum=minimum)


_act = _one_of(tuple(ACTIVATIONS))
_skip_co = _one_of(SKIP_CONNECTIONS, off="none")


@dataclass(frozen=True, kw_only=True)
class FAENetOptions(Options):
    """Options of `FAENet`. Defaults are the paper's for IS2RE (Table 7).

    Attributes:
        hidden_channels: C, channels of a node embedding.
        num_filters: F, channels of an edge embedding. `mp_type: basic` multiplies edge and node embeddings, and takes
            C instead.
        num_interactions: number of interaction blocks.
        num_gaussians: Gaussians of the distance expansion, at least 2.
        cutoff: end of the distance expansion, Angstrom; the cutoff of the graph.
        tag_hidden_channels: channels of the tag embedding; 0 for data without tags.
        pg_hidden_channels: channels of the period embedding, and of the group embedding; or 0.
        phys_embeds: whether atoms are described by physical properties too.
        phys_hidden_channels: channels of a learnt layer on these properties; 0 for none.
        second_layer_MLP: two layers instead of one in the MLPs of both embeddings.
        edge_embed_type: features of an edge: all_rij, rij, sh or all (see `EdgeEmbedding`).
        mp_type: form of the messages (see `message_passing`).
        att_heads: attention heads of the `att` and `base_with_att` types.
        complex_mp: two layers instead of one in the update of an interaction block.
        envelope: "polynomial" multiplies messages by a polynomial of the distance that is zero, with two derivatives,
            at the cutoff: the energy is then smooth where neighbours come and go, if graphs are not cut by number
            (`max_neighbors: null`). Not with attention, whose weights add up to one however far the neighbours are.
            "none" (or false) is the paper's.
        graph_norm: GraphNorm of the messages, with statistics over each "system" (or true), over the whole "batch", or
            "none" (or false). "batch" is what the published code does, and is there for its weights: a prediction then
            depends on what else is in the batch.
        skip_co: jumping connections. "concat_atom" computes the final embedding from those of all blocks; "concat" and
            "add" are of the energies, see `EnergyHead`; or "none" (or false).
        act: activation function.
    """

    hidden_channels: int = option(384, _at_least(1))
    num_filters: int = option(480, _at_least(2))
    num_interactions: int = option(5, _at_least(1))
    num_gaussians: int = option(104, _at_least(2))
    cutoff: float = option(6.0, positive)
    tag_hidden_channels: int = option(64, _at_least(0))
    pg_hidden_channels: int = option(64, _at_least(0))
    phys_embeds: bool = option(True, flag)
    phys_hidden_channels: int = option(0, _at_least(0))
    second_layer_MLP: bool = option(False, flag)
    edge_embed_type: str = option("all_rij", _one_of(EDGE_EMBED_TYPES))
    mp_type: str = option("base", _one_of(MP_TYPES))
    att_heads: int = option(1, _at_least(1))
    complex_mp: bool = option(True, flag)
    envelope: str | bool | None = option("none", _one_of(ENVELOPES, off="none"))
    graph_norm: str | bool = option("system", _one_of(GRAPH_NORMS, off="none", on="system"))
    skip_co: str | bool | None = option("concat", _skip_co)
    act: str = option("swish", _act)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.att_heads > 1 and self.mp_type not in ATTENTION:
            _warn(f"att_heads: {self.att_heads} has no effect with mp_type {self.mp_type!r}")
        if self.mp_type == "basic" and self.num_filters != self.hidden_channels:
            _warn(f"num_filters: {self.num_filters} has no effect with mp_type 'basic': it is hidden_channels there")
            self._set("num_filters", self.hidden_channels)
        if self.envelope != "none" and self.mp_type in ATTENTION:
            raise ValueError(
                f"envelope: {self.envelope!r} does not make mp_type {self.mp_type!r} smooth; write envelope: none, or "
                f"another mp_type than {' and '.join(ATTENTION)}"
            )
        if self.phys_hidden_channels and not self.phys_embeds:
            _warn(f"phys_hidden_channels: {self.phys_hidden_channels} has no effect without phys_embeds")
        if self.graph_norm == "batch":
            _warn(
                "graph_norm 'batch' normalises over all atoms of a batch: a prediction depends on the "
                "other systems in the batch. Use it for weights of the published code only"
            )


@dataclass(frozen=True, kw_only=True)
class EnergyHeadOptions(Options):
    """Options of `EnergyHead`.

    Attributes:
        hidden_channels: C, as in `FAENet`.
        num_interactions: as in `FAENet`.
        energy_head: the weights alpha_i: a linear function of the embedding h_i ("weighted-av-final-embeds"), of the
            initial embedding ("weighted-av-initial-embeds"), or one ("sum", or false).
        skip_co: jumping connections: energies are computed from the embeddings before the first block and after each,
            and combined by a linear layer ("concat") or summed ("add"). "none" (or false) and "concat_atom" use the
            final embedding alone.
        act: activation function.
    """

    hidden_channels: int = option(384, _at_least(2))
    num_interactions: int = option(5, _at_least(1))
    energy_head: str | bool | None = option("weighted-av-final-embeds", _one_of(ENERGY_HEADS, off="sum"))
    skip_co: str | bool | None = option("concat", _skip_co)
    act: str = option("swish", _act)


@dataclass(frozen=True, kw_only=True)
class ForceHeadOptions(Options):
    """Options of `ForceHead`.

    Attributes:
        hidden_channels: C, as in `FAENet`.
        force_decoder_type: simple, mlp, res or res_updown, see `ForceHead`.
        force_hidden_channels: H.
        force_norm: "batch1d" (BatchNorm over the atoms of all ranks, the authors' choice: running statistics when
            evaluating, so that predictions do not depend on the batch), "layer", or "none" (or null).
        act: activation function.
    """

    hidden_channels: int = option(256, _at_least(1))
    force_decoder_type: str = option("mlp", _one_of(FORCE_DECODERS))
    force_hidden_channels: int = option(256, _at_least(1))
    force_norm: str | None = option("batch1d", _one_of(FORCE_NORMS, off="none"))
    act: str = option("swish", _act)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)
