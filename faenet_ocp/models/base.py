"""What a model is asked for: options that are checked once, inputs, features of atoms, and default heads.

Shapes: N atoms, E edges j -> i (row 0 of edge_index is j, row 1 is i), B systems, C channels.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from faenet_ocp.common.elements import MAX_ATOMIC_NUMBER, describe
from faenet_ocp.targets import Target

NUM_TAGS = 3
"""OC20's tags: 0 below the surface, 1 surface, 2 adsorbate."""


class NodeFeatures(NamedTuple):
    """What heads get.

    Attributes:
        node_embedding: final embedding of every atom, (N, C).
        hidden_states: embeddings before the first block and after each block, each (N, C).
        vectors: of equivariant networks, C vectors of every atom, (N, 3, C).
    """

    node_embedding: Tensor
    hidden_states: tuple[Tensor, ...] = ()
    vectors: Tensor | None = None


def option(default: Any, check: Callable[[str, Any], Any]) -> Any:
    """A checked field of `Options`; `check(name, value)` returns the value in its one form, or raises ValueError."""
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of frozen options, checked when they are made where they are an `option`.

    Raises:
        ValueError: an option has a value that it cannot have; names option, value and what it may be.
    """

    def __post_init__(self) -> None:
        for entry in fields(self):
            if check := entry.metadata.get("check"):
                self._set(entry.name, check(entry.name, getattr(self, entry.name)))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class Backbone(nn.Module):
    """Base of networks that turn a batch of systems into features of atoms. Keyword arguments are the options.

    Attributes:
        needs: what it reads besides atomic numbers: "edges", "tags".
        options: as they were checked, of the class `options_class`.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    options_class: ClassVar[type[Options]] = Options
    needs: tuple[str, ...] = ("edges",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = inspect.signature(cls.options_class)  # type: ignore[attr-defined]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options: Any = self.options_class(**options)

    def forward(
        self,
        *,
        atomic_numbers: Tensor,
        edge_index: Tensor,
        edge_vec: Tensor,
        batch: Tensor,
        num_systems: int,
        tags: Tensor | None = None,
    ) -> NodeFeatures:
        """Embed the atoms of a batch of systems.

        Args:
            atomic_numbers: (N,) integers from 1 to 118.
            edge_index: (2, E), j and i of every edge; best sorted by i.
            edge_vec: (E, 3) pos[j] - pos[i] + image, in the frame, Angstrom; not zero.
            batch: system of every atom, (N,).
            num_systems: B.
            tags: (N,) integers 0, 1 or 2, for models that need "tags".
        """
        raise NotImplementedError

    def scalar_output(self) -> nn.Module:
        """A new output block: `NodeFeatures` -> a number for every atom, (N, 1)."""
        raise NotImplementedError

    def vector_output(self) -> nn.Module:
        """A new output block: `NodeFeatures` -> a vector for every atom, (N, 3), in the frame.

        A network that does not define it has no forces of its own: they are -dE/dX.
        """
        raise NotImplementedError

    @classmethod
    def default_heads(cls, targets: Iterable[Target]) -> dict[str, dict[str, Any]]:
        """Heads for targets, where `model.heads` names none: head name -> `{module: <registered name>, **arguments}`.

        Scalars of systems are the sum of `scalar_output` over atoms, or the mean where they do not grow with the
        system; forces are `vector_output`, or -dE/dX, which is no head.

        Raises:
            ValueError: there is no head for one of the targets.
        """
        heads: dict[str, dict[str, Any]] = {}
        direct = cls.vector_output is not Backbone.vector_output
        for target in targets:
            if (target.level, target.rank) == ("system", 0):
                pooling = "sum" if target.extensive else "mean"
                heads[target.name] = {"module": "scalar_head", "prop": target.name, "pooling": pooling}
            elif (target.level, target.rank) == ("atom", 1) and direct:
                heads[target.name] = {"module": "vector_head", "prop": target.name}
            elif target.name != "forces":
                raise ValueError(f"outputs.{target.name}: {cls.__name__} has no head for it; name one in model.heads")
        return heads


def check_elements(atomic_numbers: Tensor, known: Tensor) -> None:
    """Refuse atomic numbers that have no row in a model's tables, or whose row was never trained.

    On the CPU this raises at once. Elsewhere looking at the values would make the host wait for the device in every
    step, so the device checks by itself: the error comes later and names no element. So it is in a compiled network.

    Args:
        atomic_numbers: (N,).
        known: for the numbers 0 to 118, (119,) bool.

    Raises:
        ValueError: naming the elements (on the CPU).
    """
    if atomic_numbers.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(known[atomic_numbers].all(), "atomic_numbers: an element that the model does not know")
        return
    in_table = (atomic_numbers > 0) & (atomic_numbers <= MAX_ATOMIC_NUMBER)
    known = in_table & known[atomic_numbers.where(in_table, 0)]
    if not known.all():
        names = [describe(z) for z in atomic_numbers[~known].unique().tolist()]
        raise ValueError(f"atomic_numbers: the model has no trained embedding for {', '.join(names)}")
