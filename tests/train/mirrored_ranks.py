"""Run by torchrun in two processes: rank 1 gets the samples of rank 0 mirrored, and must give the same result."""

from __future__ import annotations

import torch
import torch.distributed as dist

from occfeat_train.config import LIFTINGS
from occfeat_train.distributed import average_gradients, processes
from tests.train.test_network import augmented, mirrorable_network


def check(lifting: str, rank: int) -> None:
    alone, network = (mirrorable_network(lifting) for _ in range(2))
    plain = alone(augmented([[False, False]] * 2))
    plain.square().mean().backward()
    found = network(augmented([[rank == 1] * 2] * 2))
    found.square().mean().backward()
    average_gradients(network)
    maps = [torch.empty_like(plain) for _ in range(2)]
    dist.all_gather(maps, found.detach().contiguous())
    for each in maps:
        assert (each - plain).norm() < 1e-9 * plain.norm(), lifting
    assert (gradients(network) - gradients(alone)).norm() < 1e-9 * gradients(alone).norm(), lifting


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    with processes("cpu") as process:
        assert process.world == 2, "run it under torchrun --nproc-per-node 2"
        for lifting in LIFTINGS:
            check(lifting, process.rank)
            if process.is_main:
                print(f"{lifting}: the same on both ranks", flush=True)
        dist.barrier()  # without it, torch 2.13 can hang when it destroys the group


if __name__ == "__main__":
    main()
