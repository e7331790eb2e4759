"""What a step asks of a device, counted as it is run: launches, bytes read and written, and waits for its numbers.

Tensors of the device "meta" have a shape and no numbers: a step on them takes the path that it takes on a GPU, at any
size, in a few milliseconds, and fails where the host would have to wait for a number. On a CPU such places are counted.

    with Counting() as counted:
        model(batch)
    counted.num_launches, counted.waits

Not counted: what optimisers that are fused do (one launch for many parameters), what other libraries launch without
torch knowing, and tensors made of Python's numbers (`x[:, [0, 1]]`), whose copies to a device are waited for.
"""

import re
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import faenet_ocp

_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "equal", "is_nonzero", "bincount")
"""Operations whose result, or its size, the host has to wait for."""
_GATHERS = ("index_select", "embedding", "index", "gather")
"""They read the rows that they give, not all that they are given."""
_SCATTERS = ("index_add", "index_add_", "scatter_add", "scatter_add_", "embedding_dense_backward")
_GENERATED = re.compile(r"\b(?:cpp_\w*fused\w*|triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(")
_PACKAGE = Path(faenet_ocp.__file__).parent
_OUTSIDE = "backward, or outside the package"


@dataclass(frozen=True)
class Launch:
    """One operation.

    Attributes:
        name: of torch, e.g. "addmm".
        place: the innermost file of this package that called it.
        num_bytes: read and written.
        result: shape and type of its largest result.
        result_bytes: of that.
    """

    name: str
    place: str
    num_bytes: int
    result: str
    result_bytes: int


class Counting(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        launches: in order; views and empty tensors are none.
        waits: name of the operation and where it was called, "file:function", of all that the host would wait for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.waits: list[tuple[str, str]] = []

    @property
    def num_launches(self) -> int:
        """How many operations a device would be given."""
        return len(self.launches)

    def bytes_by_place(self) -> dict[str, int]:
        """Bytes read and written by file of this package, most first."""
        total: Counter[str] = Counter()
        for launch in self.launches:
            total[launch.place] += launch.num_bytes
        return dict(total.most_common())

    def largest(self, count: int) -> list[Launch]:
        """The operations with the largest results."""
        return sorted(self.launches, key=lambda launch: -launch.result_bytes)[:count]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if _waits(name, args, kwargs):
            self.waits.append((name, _place(with_function=True)))
        out = func(*args, **kwargs)
        given, results = list(_tensors((args, kwargs))), list(_tensors(out))
        if results and not func.is_view and not name.startswith(("empty", "new_empty", "detach", "lift_fresh")):
            largest = max(results, key=_size)
            shown = f"{tuple(largest.shape)} {str(largest.dtype).removeprefix('torch.')}"
            self.launches.append(Launch(name, _place(), _moved(name, given, results), shown, _size(largest)))
        return out


def generated_launches(source: str) -> int:
    """Operations that code of torch's inductor gives to a device: fused ones, and those of libraries."""
    return len(_GENERATED.findall(source.rpartition("def call(")[2]))


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    if name in _READS:
        return True
    if name in ("index", "index_put", "index_put_"):
        return any(index.dtype == torch.bool for index in _tensors(args[1]))
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("_to_copy", "copy_"):  # from or to the CPU, unless it is told not to
        devices = {tensor.device.type for tensor in _tensors(args)}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        return len(devices) > 1 and not kwargs.get("non_blocking") and True not in args[2:]
    return False


def _moved(name: str, given: list[Tensor], results: list[Tensor]) -> int:
    written = sum(_size(tensor) for tensor in results)
    if name in _GATHERS:
        return 2 * written + sum(_size(tensor) for tensor in given[1:])
    if name in _SCATTERS:  # what is added is read, and its rows are read and written
        return 3 * max((_size(tensor) for tensor in given[1:]), default=0) + written
    return written + sum(_size(tensor) for tensor in given)


def _size(tensor: Tensor) -> int:
    """Bytes, of an expanded tensor those that are there."""
    numbers = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= length if stride else min(length, 1)
    return numbers * tensor.element_size()


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _place(*, with_function: bool = False) -> str:
    for frame in reversed(traceback.extract_stack(limit=60)):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE) and path.name != Path(__file__).name:
            name = path.relative_to(_PACKAGE).as_posix()
            return f"{name}:{frame.name}" if with_function else name
    return _OUTSIDE
