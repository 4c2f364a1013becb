"""Stores of data that a kernel only moved and converted."""

from collections.abc import Iterator

from normquant.audit.source import kernel_values
from normquant.audit.source.kernel_code import KernelCode
from normquant.audit.source.kernel_values import Uses


def plain_copies(code: KernelCode, uses: Uses) -> Iterator[tuple[str, str, bool, tuple[str, ...]]]:
    """(load pointer, store pointer, same place, dtypes) of every store of data that is only moved and converted."""
    for stored in uses.stores:
        load, store = stored.value.loaded, stored.site
        if load is None or stored.atomic or load.masked or store.masked:
            continue
        cuts = kernel_values.cuts(load.index, store.index)
        source, destination = kernel_values.segments(load.index, cuts), kernel_values.segments(store.index, cuts)
        same = load.index.constant == store.index.constant and source == destination
        if load.index.linear is None or store.index.linear is None or load.index.indirect:
            continue
        if same or (_permutes(source) and {s[:3] for s in source} == {d[:3] for d in destination}):
            dtypes = (code.pointers.get(load.pointer, ""), *stored.value.casts, code.pointers.get(store.pointer, ""))
            yield load.pointer, store.pointer, same, dtypes


def _permutes(parts: frozenset[tuple[str, int, int, int]]) -> bool:
    """Whether different loop counters reach different elements, all upwards: no flip, no overlap."""
    reach = 0
    for _, low, high, coefficient in sorted(parts, key=lambda part: part[3]):
        if coefficient <= reach:
            return False
        reach += coefficient * (-(-high // low) - 1)
    return True
