"""A block of plain PyTorch: compiled stock and fused, compared value by value, and audited. Runs on a CPU, too."""

import torch
import torch.nn.functional as F

import normquant as nq


class GatedMLP(torch.nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(hidden, eps=1e-6)
        self.gate_up = torch.nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = torch.nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x + residual
        gate, up = self.gate_up(self.norm(residual)).chunk(2, -1)
        return self.down(F.silu(gate) * up), residual


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = nq.block_fp8(GatedMLP(1024, 2048).bfloat16().to(device))
    x, residual = (torch.randn(64, 1024, dtype=torch.bfloat16, device=device) for _ in range(2))
    stock = torch.compile(block)
    fused = torch.compile(block, options=nq.inductor_options("always"))
    with torch.inference_mode():
        for name, ours, theirs in zip(("output", "residual"), fused(x, residual), stock(x, residual), strict=True):
            print(f"{name}: {(ours != theirs).sum()} of {ours.numel()} values differ")
    print(nq.explain())
    for name, model in (("stock", stock), ("fused", fused)):
        report = nq.audit(model, (x, residual))
        print(f"{name}: {len(report.launches)} launches, {report.bytes:,} bytes")


if __name__ == "__main__":
    main()
