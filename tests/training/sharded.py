"""Run by torchrun: a policy's weights sharded over the processes by torch's own fully_shard (FSDP2), twenty steps.

Arguments: the policy's folder, the batch, where to write the losses.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from rvlm.policy.factory import load_vla


def losses_of(model, batch, n=20):
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), 3e-3), []
    for _ in range(n):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model, _ = load_vla(sys.argv[1])
    model.backbone.get_output_embeddings().requires_grad_(True)
    batch = torch.load(sys.argv[2], weights_only=True)
    mine = {k: v.chunk(world)[rank] for k, v in batch.items()}
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.backbone.model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = losses_of(model, mine)
    dist.all_reduce(losses)
    share = sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    if rank == 0:
        result = {"losses": (losses / world).tolist(), "world": world, "share": share}
        result["is_sharded"] = isinstance(model, FSDPModule)
        Path(sys.argv[3]).write_text(json.dumps(result))
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort an interpreter that is torn down
