"""One forward pass of a model that is not compiled, watched: which quantizations read which results as they are.

The producers, norms and gated products, run by our kernels already, where their arithmetic was found, and the readers
as in vLLM. For each read of a producer's result it is looked at

- that it is the tensor that the producer returned, or a view of all of it;
- that nothing wrote to it in between: no operation that says so in its schema, seen below torch's dispatcher, and no
  other, as the values are still the same;
- that the reader computes from our quantization, on some rows, to the bit what vLLM does.

Kernels that write through a pointer only where some value asks for it are seen by none of these; a switch compares
every hit with a fresh quantization.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from normquant.vllm.origins import Origins
from normquant.vllm.producers import Inputs, Producer
from normquant.vllm.quantizing_readers import Reader

WATCH = "_normquant_watch"
SAME = 32  # rows whose values are kept, the first of a tensor; of all others there is a sum


@dataclass
class Watch:
    """A producer's result. y: the tensor, alive for as long as somebody may read it. writer: what wrote to it since."""

    producer: Producer
    y: weakref.ref[torch.Tensor]
    version: int
    sample: torch.Tensor
    total: torch.Tensor
    writer: str = ""

    @classmethod
    def of(cls, producer: Producer, y: torch.Tensor) -> Watch:
        """Watch y, which can carry a form."""
        watch = cls(producer, weakref.ref(y), y._version, *_values(y))
        setattr(y, WATCH, watch)
        return watch

    def written(self, y: torch.Tensor) -> str:
        """What wrote to y since it was made, "" for nothing; waits for the GPU."""
        if self.writer:
            return f"{self.writer} writes to it before"
        sample, total = _values(y)
        if y._version != self.version or not torch.equal(sample, self.sample) or not torch.equal(total, self.total):
            return "something writes to it before"
        return ""


@dataclass
class Read:
    """A quantization that reads a producer's result. reason: why it must stay as it is, "" where it need not."""

    reader: Reader
    reason: str


@dataclass
class Seen:
    """What is known of a producer. reads: by the reader's name. reason: why it stays as it is, "" where it need not.

    inputs, y: tensors of no rows that are like its inputs and its result.
    """

    reads: dict[str, Read] = field(default_factory=dict)
    reason: str = ""
    inputs: Inputs = ()
    y: torch.Tensor | None = None


class FirstForward(TorchDispatchMode):
    """Watches from `__enter__` to `__exit__`. seen: what there is to say of each producer that is called, by its name.

    lone: readers that do not read a producer's result as it is, by name, and what they read.
    """

    def __init__(self, model: nn.Module, producers: Iterable[Producer], readers: Iterable[Reader]) -> None:
        super().__init__()
        self.producers, self.readers = tuple(producers), tuple(readers)
        self.seen: dict[str, Seen] = defaultdict(Seen)
        self.lone: dict[str, str] = {}
        self._origins = Origins(model)
        self._by_storage: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()

    def __enter__(self) -> FirstForward:
        for producer in self.producers:
            producer.replace_forward(self._produce)
        for reader in self.readers:
            reader.replace(self._read)
        self._origins.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._origins.stop()
        for producer in self.producers:
            producer.restore()
        for reader in self.readers:
            reader.restore()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written: list[Any] = []
        for position, name in _written(func):
            given = args[position] if position < len(args) else kwargs.get(name)
            written += given if isinstance(given, (list, tuple)) else [given]
        for tensor in written:
            self._note_write(tensor, str(func))
        result = func(*args, **kwargs)
        self._origins.note(func, (args, kwargs), written, result)
        return result

    def _note_write(self, tensor: object, by: str) -> None:
        if isinstance(tensor, torch.Tensor):
            watch = self._by_storage.get(tensor.untyped_storage()._cdata)
            if watch is not None and not watch.writer:
                watch.writer = by

    def _produce(self, producer: Producer, *args: Any, **kwargs: Any) -> Any:
        """A producer's call: ours where its arithmetic is, so that what is seen is what will be."""
        seen, inputs = self.seen[producer.name], producer.inputs(*args, **kwargs)
        if inputs is None:
            seen.reason = "it is called with more than its op takes"
        elif not seen.reason and producer.arithmetic is None:
            seen.reason = _tried(partial(producer.see, *inputs))
        if inputs is None or seen.reason or producer.arithmetic is None:
            return producer.stock(*args, **kwargs)
        made = producer.run(producer.arithmetic, *inputs)
        seen.inputs = tuple(t.new_empty((0, t.shape[-1])) for t in inputs)
        seen.y = made.y.new_empty((0, made.y.shape[1]))
        self._by_storage[made.y.untyped_storage()._cdata] = Watch.of(producer, made.y)
        return made.returned(inputs[0])

    def _read(self, reader: Reader, *args: Any, **kwargs: Any) -> Any:
        """A reader's call: vLLM's, and a note of what it read."""
        x = reader.input(*args, **kwargs)
        watch = None if x is None else _watch_of(x)
        if x is None or watch is None:
            self.lone.setdefault(reader.name, reader.OTHERWISE if x is None else self._instead(reader, x))
            return reader.stock(*args, **kwargs)
        reason = watch.written(x) or _tried(partial(reader.unlike, *args, **kwargs))
        reads = self.seen[watch.producer.name].reads
        if reader.name not in reads or reason:
            reads[reader.name] = Read(reader, reason)
        return reader.stock(*args, **kwargs)

    def _instead(self, reader: Reader, x: torch.Tensor) -> str:
        """What a reader reads that is not the tensor that a producer returned."""
        watch = self._by_storage.get(x.untyped_storage()._cdata)
        y = None if watch is None else watch.y()
        origin = self._origins.of(x, reader.name)
        return f"{origin}, as another tensor" if y is not None and y.numel() == x.numel() else origin


def _tried(look: Callable[[], str]) -> str:
    try:
        return look()
    except Exception as error:  # kernels of other packages raise whatever they like
        return f"{type(error).__name__}: {error}"


def _watch_of(x: torch.Tensor) -> Watch | None:
    """The watch of a producer's result that x is, or is a view of all of."""
    y = x if hasattr(x, WATCH) else x._base
    watch: Watch | None = getattr(y, WATCH, None)
    if y is None or watch is None or watch.y() is not y:
        return None
    whole = x.is_contiguous() and (x.data_ptr(), x.numel(), x.shape[-1]) == (y.data_ptr(), y.numel(), y.shape[-1])
    return watch if whole else None


def _values(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of the first rows, and the sum of all bits."""
    bits = y.detach().view(-1, y.shape[-1]).view(torch.int16)
    return bits[:SAME].clone(), bits.sum(dtype=torch.int64)


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that an operation says it writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)
