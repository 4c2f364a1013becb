"""What `normquant audit examples/my_model.py:build` compiles: an MLP with two norms and block-FP8 linears."""

import torch

import normquant as nq


class MLP(torch.nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(hidden)
        self.up = torch.nn.Linear(hidden, intermediate, bias=False)
        self.down_norm = torch.nn.RMSNorm(intermediate)
        self.down = torch.nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.down_norm(self.up(self.norm(x))))


def build() -> tuple[torch.nn.Module, torch.Tensor]:
    """The model and its inputs. Nothing is computed: tensors have no values here, take no memory, and need no GPU."""
    model = nq.block_fp8(MLP(1024, 2048).bfloat16().cuda())
    return model, torch.randn(64, 1024, dtype=torch.bfloat16, device="cuda")
