"""Programs that share a row and exchange one sum each, through each other's shared memory.

The programs are a thread block cluster, which the hardware schedules together from Hopper on. Each has a mailbox in its
shared memory, a slot for every program of the cluster and a barrier that counts the bytes that have come in. A program
sends its sum to all of them, itself too, and waits until its own mailbox is full. PTX ISA: mapa, st.async, mbarrier.

Nothing is stored in a program that has ended: it does not end before all others have sent to it.
"""

import triton
import triton.language as tl

from normquant.kernels.capability import MAX_CLUSTER

# A mailbox: MAX_CLUSTER slots of an fp32 each, then the barrier.
BARRIER = 4 * MAX_CLUSTER
MAILBOX_BYTES = BARRIER + 8


@triton.constexpr_function
def opening(programs):
    """PTX: makes a mailbox that waits for the sums of so many programs, and gives its address.

    The programs are told that it is there; who has heard it from all may send, which `exchange` waits for.
    """
    return f"""{{
        .shared .align 16 .b8 mailbox[{MAILBOX_BYTES}];
        .reg .pred first;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first mbarrier.init.shared::cta.b64 [mailbox + {BARRIER}], 1;
        @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [mailbox + {BARRIER}], {4 * programs};
        @first fence.mbarrier_init.release.cluster;
        barrier.cluster.arrive.relaxed;
        mov.u32 $0, mailbox;
    }}"""


@triton.constexpr_function
def exchange(programs):
    """PTX: from the mailbox's address and this program's sum to the sums of all programs, zero where there is none."""
    mailbox, own_sum = f"${MAX_CLUSTER}", f"${MAX_CLUSTER + 1}"  # operands, after as many results as there are slots
    sums = [f"ld.shared::cta.f32 ${i}, [{mailbox} + {4 * i}];" for i in range(programs)]
    sums += [f"mov.f32 ${i}, 0f00000000;" for i in range(programs, MAX_CLUSTER)]
    return f"""{{
        .reg .pred sends, full;
        .reg .b32 thread, slot, barrier;
        barrier.cluster.wait.acquire;
        mov.u32 thread, %tid.x;
        setp.lt.u32 sends, thread, {programs};
        mov.u32 slot, %cluster_ctarank;
        mad.lo.u32 slot, slot, 4, {mailbox};
        add.u32 barrier, {mailbox}, {BARRIER};
        @sends mapa.shared::cluster.u32 slot, slot, thread;
        @sends mapa.shared::cluster.u32 barrier, barrier, thread;
        @sends st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [slot], {own_sum}, [barrier];
        add.u32 barrier, {mailbox}, {BARRIER};
    wait:
        mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 full, [barrier], 0;
        @!full bra wait;
        {" ".join(sums)}
    }}"""


@triton.jit
def open_mailbox(PROGRAMS: tl.constexpr):
    # Every program of the cluster calls this once, early, and exchanges sums through what it returns.
    return tl.inline_asm_elementwise(opening(PROGRAMS), "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def leave_mailbox():
    # For a program that has no sum, as all others of its cluster: it does not end with a barrier half passed.
    tl.inline_asm_elementwise("barrier.cluster.wait; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def sum_of_all(mailbox, s, PROGRAMS: tl.constexpr):
    # s: this program's part of a sum, a scalar -> the sum of all parts, by the binary tree over neighbours.
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
        exchange(PROGRAMS),
        "=f,=f,=f,=f,=f,=f,=f,=f,r,f",
        [mailbox, s],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )
    return ((a + b) + (c + d)) + ((e + f) + (g + h))
