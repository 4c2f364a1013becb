"""The ops on a GPU: streams, CUDA graphs, programmatic dependent launch, large tensors, and what is compiled when."""

import pytest
import torch
from shared.compare import assert_bitwise
from shared.inputs import activations, weights

import normquant as nq
from normquant import QuantSpec, reference
from normquant.kernels.configs import config
from normquant.kernels.group_quant import group_quant_kernel
from normquant.kernels.rms_norm_quant import rms_norm_quant_kernel

K = 7168
SPEC = QuantSpec(layout="col_tma", rounding="twice")
STEPS = 24


def gpu(m: int, k: int = K, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(m, k, generator=generator, device="cuda", dtype=torch.bfloat16)


def norm(x, residual, weight):
    q, total, y = nq.add_rms_norm_quant(x, residual, weight, spec=SPEC, return_norm=True)
    return q.data, q.scale, total, y


class Chain:
    """Work that goes wrong where a kernel starts before its input is there, or after its input was overwritten.

    Each step writes x in place with a kernel of torch, which knows nothing of programmatic dependent launch, runs our
    op on it, runs our ops again on the outputs of the first, and reads all of it with other kernels of torch.
    """

    def __init__(self, m: int) -> None:
        self.sources = [gpu(m, seed=step) for step in range(STEPS)]
        self.x, self.residual = torch.empty_like(self.sources[0]), gpu(m, seed=99)
        self.weight = weights(K).cuda()

    def run(self, between=lambda: None) -> list[torch.Tensor]:
        outputs, residual = [], self.residual
        for source in self.sources:
            torch.mul(source, 2, out=self.x)
            between()
            first = norm(self.x, residual, self.weight)
            between()
            second = norm(first[3], first[2], self.weight)
            between()
            quantized = nq.group_quant(second[3], spec=SPEC)
            between()
            self.x.zero_()  # the kernels above must have read it
            residual = second[2]
            outputs += [t.clone() for t in (*first, *second, quantized.data, quantized.scale)]
            between()
        return outputs


@pytest.mark.parametrize("m", [1, 16, 257])
def test_kernels_wait_for_what_they_read(m):
    chain = Chain(m)
    expected = chain.run(between=torch.cuda.synchronize)
    for _ in range(5):
        assert_bitwise(chain.run(), expected)


@pytest.mark.parametrize("m", [1, 16, 257])
def test_cuda_graph(m):
    chain = Chain(m)
    expected = chain.run(between=torch.cuda.synchronize)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = chain.run()
    for _ in range(5):
        for t in outputs:
            t.view(torch.uint8).fill_(0x7F) if t.is_contiguous() else t.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_bitwise(outputs, expected)
    # other inputs in the same memory
    for i, source in enumerate(chain.sources):
        source.copy_(gpu(m, seed=1000 + i))
    expected = chain.run(between=torch.cuda.synchronize)
    graph.replay()
    torch.cuda.synchronize()
    assert_bitwise(outputs, expected)


def test_back_to_back():
    # Nothing but our kernels: each may start while the one before it still runs.
    weight = weights(K).cuda()

    def run(between=lambda: None):
        y, residual, outputs = gpu(4, seed=1), gpu(4, seed=2), []
        for _ in range(64):
            data, scale, residual, y = norm(y, residual, weight)
            outputs += [data, scale, residual, y]
            between()
        return outputs

    expected = run(between=torch.cuda.synchronize)
    for _ in range(10):
        assert_bitwise(run(), expected)


def test_many_streams():
    chains = [Chain(m) for m in (1, 16, 64, 257)]
    expected = [chain.run(between=torch.cuda.synchronize) for chain in chains]
    streams = [torch.cuda.Stream() for _ in chains]
    for _ in range(3):
        torch.cuda.synchronize()
        results = []
        for chain, stream in zip(chains, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(chain.run())
        torch.cuda.synchronize()
        for got, want in zip(results, expected, strict=True):
            assert_bitwise(got, want)


def test_an_output_may_be_freed_and_reused_at_once():
    # The allocator hands the memory of a dropped output to the next call, whose kernel may start early.
    weight, residual = weights(K).cuda(), gpu(8, seed=5)
    xs = [gpu(8, seed=i) for i in range(32)]
    expected = [norm(x, residual, weight)[3].float().sum().item() for x in xs]
    torch.cuda.synchronize()
    sums = torch.empty(len(xs), device="cuda")
    for i, x in enumerate(xs):
        y = norm(x, residual, weight)[3]
        sums[i] = y.float().sum()
        del y
    assert sums.tolist() == expected


@pytest.mark.parametrize("layout", ["row", "col_tma"])
def test_more_than_two_to_the_31_elements(layout):
    m = 300_000
    assert m * K > 2**31
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 32 * 2**30:
        pytest.skip(f"needs 32 GiB of GPU memory, {free / 2**30:.0f} are free")
    spec = SPEC.replace(layout=layout)
    x, weight = gpu(m), weights(K).cuda()
    residual = x.flip(0)
    q, total, y = nq.add_rms_norm_quant(x, residual, weight, spec=spec, return_norm=True)
    for rows in (slice(0, 64), slice(2**31 // K - 32, 2**31 // K + 32), slice(m - 64, m)):
        expected = reference.add_rms_norm_quant(x[rows], residual[rows], weight, 1e-6, spec)
        got = q.data[rows], q.scale[rows].contiguous(), total[rows], y[rows]
        assert_bitwise(got, (expected[0], expected[1].contiguous(), *expected[2:]))
    del q, total, y, residual
    q = nq.group_quant(x, spec=spec)
    rows = slice(m - 64, m)
    data, scale = reference.group_quant(x[rows], spec)
    assert_bitwise((q.data[rows], q.scale[rows].contiguous()), (data, scale.contiguous()))


def binaries(kernel) -> int:
    return len(kernel.device_caches[torch.cuda.current_device()][0])


def test_nothing_is_compiled_after_a_warm_up():
    # One launch of each config covers every M that has it, and every aligned stride and eps.
    weight, ms = weights(K).cuda(), (1, 2, 3, 4, 15, 16, 17, 255, 256, 257, 1000, 4097)
    capability = torch.cuda.get_device_capability()

    def run(m: int, stride: int, eps: float) -> None:
        x = torch.zeros(m, stride, device="cuda", dtype=torch.bfloat16)[:, :K]
        nq.add_rms_norm_quant(x, x, weight, eps, spec=SPEC)
        nq.rms_norm_quant(x, weight, eps, spec=SPEC)
        nq.group_quant(x, spec=SPEC)

    for op in ("add_rms_norm_quant", "rms_norm_quant", "group_quant"):
        for m in {config(op, K, m, capability): m for m in ms}.values():
            run(m, K, 1e-6)
    before = binaries(rms_norm_quant_kernel), binaries(group_quant_kernel)
    for m in ms:
        for stride in (K, K + 8, K + 24, 2 * K):
            run(m, stride, 1e-6)
    run(16, K, 1e-5)
    run(16, K, 1.0)
    assert (binaries(rms_norm_quant_kernel), binaries(group_quant_kernel)) == before


def test_tensors_on_two_devices_are_refused():
    x, weight = gpu(4), weights(K)
    for call, place in (
        (lambda: nq.rms_norm_quant(x, weight), "cpu"),
        (lambda: nq.rms_norm_quant(x.cpu(), weight.cuda()), "cuda:0"),
        (lambda: nq.add_rms_norm_quant(x, x.cpu(), weight.cuda()), "cpu"),
    ):
        with pytest.raises(ValueError, match=f"{place}.*one device"):
            call()


@pytest.mark.parametrize("m", [0, 1, 5])
def test_opcheck(m):
    x, weight = activations(m, 512).cuda(), weights(512).cuda()
    for spec in (QuantSpec(), SPEC, SPEC.replace(scale="ue8m0_packed")):
        text, ops = spec.encode(), torch.ops.normquant
        torch.library.opcheck(ops.rms_norm_quant_with_norm.default, (x, weight, 1e-6, 0.0, text))
        torch.library.opcheck(ops.add_rms_norm_quant.default, (x, x + 1, weight, 1e-6, 0.0, text))
        torch.library.opcheck(ops.group_quant.default, (x, text))


def test_a_compiled_caller_gets_the_same_bits():
    weight = weights(K).cuda()
    compiled = torch.compile(lambda x: norm(x, x, weight), fullgraph=True, dynamic=True)
    for m in (5, 16, 300):
        assert_bitwise(compiled(gpu(m)), norm(gpu(m), gpu(m), weight))
