"""Data that the ranks of a group push into each other's memory, without a flag beside it and without a barrier.

Every rank has a buffer that its peers write to and it alone reads. A value all of whose bits are ones is absent: the
buffer starts out as such, no sender stores one, and the reader stores one again where it has read. So a value that is
there is its own flag, and a reader only looks until all that it waits for are there ("low latency", as in NCCL).

The buffer has two halves, for even and odd epochs. A rank cannot be two launches ahead of another one: to end a launch
it needs what the other pushes in that launch. So a half that was read and cleared in one launch is written again only
after the reader has ended that launch. The epoch lies in device memory and the last program of a launch advances it,
so that a CUDA graph may be replayed any number of times.

A rank that waits longer than the deadline says for whom, to the host and to its peers, and traps: a rank that went on
would read what is not there yet, or overwrite what is not read yet.
"""

import triton
import triton.language as tl

from normquant.kernels.exchange_layout import CONTROL_BYTES, UNIT_BYTES

CONTROL = tl.constexpr(CONTROL_BYTES)
UNIT = tl.constexpr(UNIT_BYTES)
# int64 after the addresses of the buffers in the table of a group.
REPORT, DEADLINE = tl.constexpr(0), tl.constexpr(1)
POLLS = tl.constexpr(1024)  # between two looks at the clock


@triton.jit
def load_addresses(table_ptr, WORLD: tl.constexpr):
    # The addresses of all ranks' buffers, which never change.
    addresses = ()
    for rank in tl.static_range(WORLD):
        addresses += (tl.load(table_ptr + rank),)
    return addresses


@triton.jit
def begin(state_ptr, half_units):
    # -> this launch's epoch, and where its half of every buffer starts, in bytes.
    epoch = tl.load(state_ptr, volatile=True)
    return epoch, CONTROL + (epoch & 1).to(tl.int64) * half_units * UNIT


@triton.jit
def finish(state_ptr, epoch):
    # Every program calls this once, when it needs the epoch no more.
    ended = tl.atomic_add(state_ptr + 1, 1, sem="relaxed")
    if ended == tl.num_programs(0) - 1:
        tl.store(state_ptr + 1, 0)
        tl.store(state_ptr, epoch + 1)


@triton.jit
def at_offset(address, offset, DTYPE: tl.constexpr):
    # The place `offset` bytes into a buffer, a multiple of 16, as a pointer to DTYPE.
    return tl.multiple_of((address + offset).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def sendable(words):
    # words int32 of two values of 16 bits each: two NaN of all ones become two other NaN.
    return tl.where(words == -1, 0x7FFF7FFF, words)


@triton.jit
def sendable_values(values, ON_CUDA: tl.constexpr):
    # values of 8 or 16 bits that were just converted. A GPU converts every NaN to one that has a zero, its sign.
    if not ON_CUDA:
        INTEGER: tl.constexpr = tl.int8 if values.dtype.primitive_bitwidth == 8 else tl.int16
        bits = values.to(INTEGER, bitcast=True)
        values = tl.where(bits == -1, ~(bits << values.dtype.primitive_bitwidth - 1), bits).to(
            values.dtype, bitcast=True
        )
    return values


@triton.jit
def absent(words, BYTES: tl.constexpr):
    # words int32 of values of BYTES bytes each -> nonzero where a value of the word is absent.
    if BYTES == 4:
        return (words == -1).to(tl.int32)
    ONES: tl.constexpr = 0x01010101 if BYTES == 1 else 0x00010001
    HIGH: tl.constexpr = -0x7F7F7F80 if BYTES == 1 else -0x7FFF8000  # the highest bit of each value
    return (~words - ONES) & words & HIGH  # a value of ~words is zero


@triton.jit
def any_absent(tiles, BYTES: tl.constexpr, PEERS: tl.constexpr, ON_CUDA: tl.constexpr):
    # -> whether a value of the tiles is absent for any thread, the same in all threads of the program.
    found = 0
    for kind in tl.static_range(len(BYTES)):
        missing = absent(tiles[kind * PEERS], BYTES[kind])
        for i in tl.static_range(1, PEERS):
            missing |= absent(tiles[kind * PEERS + i], BYTES[kind])
        found |= tl.max((missing != 0).to(tl.int32), axis=None)
    if ON_CUDA:
        found = any_thread(found)
    return found != 0


@triton.jit
def any_thread(flag):
    # Whether a scalar is nonzero in any thread of the program: the same answer in all of them. Where a tile has fewer
    # elements than there are threads, several hold the same element, each from a load of its own, and tl.max combines
    # what is different in a layout only: a loop that ended for some of them would clear what others still wait for.
    return tl.inline_asm_elementwise(
        "{ .reg .pred own, any; setp.ne.s32 own, $1, 0; barrier.red.or.pred any, 0, own; selp.b32 $0, 1, 0, any; }",
        "=r,r",
        [flag],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_words(places, masks):
    tiles = ()
    for i in tl.static_range(len(places)):
        tiles += (tl.load(places[i], mask=masks[i], other=0, volatile=True),)
    return tiles


@triton.jit
def wait_for_words(
    places,  # tiles of pointers to int32 in this rank's buffer: of each kind one for each peer, by rank
    masks,  # which of them there are
    addresses,
    table_ptr,
    epoch,
    row,  # for the report alone
    patience,  # in deadlines: who waits for what needs others waits longer, so that the first cause is reported
    BYTES: tl.constexpr,  # of a value of each kind
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    # -> the tiles, when all of their values are there; their places are cleared.
    tiles = load_words(places, masks)
    polls = 0
    started = tl.zeros((), tl.int64)
    while any_absent(tiles, BYTES, WORLD - 1, ON_CUDA):
        polls += 1
        if ON_CUDA:
            if polls % POLLS == 0:
                now = clock()
                started = tl.where(started == 0, now, started)
                if now - started > patience * tl.load(table_ptr + WORLD + DEADLINE):
                    give_up(tiles, addresses, table_ptr, epoch, row, BYTES, RANK, WORLD)
        tiles = load_words(places, masks)
    for i in tl.static_range(len(places)):
        tl.store(places[i], tl.full(places[i].shape, -1, tl.int32), mask=masks[i])
    return tiles


@triton.jit
def give_up(
    tiles, addresses, table_ptr, epoch, row, BYTES: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr
):  # fmt: skip
    # Reports the ranks that have not sent, as bits, and ends the kernel with an error.
    missing = 0
    for i in tl.static_range(len(tiles)):
        peer = i % (WORLD - 1)
        sender = peer + (peer >= RANK)
        missing |= tl.max((absent(tiles[i], BYTES[i // (WORLD - 1)]) != 0).to(tl.int32), axis=None) << sender
    # A peer that gave up before has named the cause, and has not sent because of it.
    told = 0
    for peer in tl.static_range(WORLD):
        told |= tl.load(at_offset(addresses[RANK], 0, tl.int32) + peer, volatile=True)
    missing = tl.where(told != 0, told, missing)
    for peer in tl.static_range(WORLD):
        tl.store(at_offset(addresses[peer], 0, tl.int32) + RANK, missing)
    report = tl.load(table_ptr + WORLD + REPORT).to(tl.pointer_type(tl.int64))
    tl.store(report + 1, missing.to(tl.int64))
    tl.store(report + 2, epoch.to(tl.int64))
    tl.store(report + 3, row.to(tl.int64))
    tl.store(report, tl.full((), 1, tl.int64))
    run_ptx("fence.sc.sys; mov.b32 $0, 0;")
    tl.debug_barrier()
    run_ptx("trap; mov.b32 $0, 0;")


@triton.jit
def clock():
    # Nanoseconds, the same in all threads of a program, which branch on it together.
    thread = tl.arange(0, tl.extra.cuda.num_threads())
    now = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l,r", [thread], dtype=tl.int64, is_pure=False, pack=1
    )
    return tl.max(now, axis=0)


@triton.jit
def run_ptx(TEXT: tl.constexpr):
    tl.inline_asm_elementwise(TEXT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
