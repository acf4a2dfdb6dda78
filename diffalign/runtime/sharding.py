"""A frozen network that does not fit one card, held in equal parts by all processes: torch's FSDP2, block by block.

Each block's weights are gathered for its own forward pass, and again for its gradient. What is trained is small: every process has it
whole, adds its gradients up as ever, and checkpoints are those of an unsharded run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn


def shard(module: nn.Module, trained: Iterable[Tensor], device: str) -> None:
    """Give each process its part of a network, which lies in host memory; `trained`, and the few parameters of another type than most, stay
    whole on the device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    own = {id(parameter) for parameter in trained}
    frozen = [parameter for parameter in module.parameters() if id(parameter) not in own]
    kind = Counter(parameter.dtype for parameter in frozen).most_common(1)[0][0]
    kept = {parameter for parameter in module.parameters() if id(parameter) in own or parameter.dtype != kind}
    for tensor in (*kept, *module.buffers()):
        tensor.data = tensor.data.to(device)
    for part in [*blocks(module), module]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=kept)  # type: ignore[arg-type]


def blocks(module: nn.Module) -> list[nn.Module]:
    """What a network runs one after another: the elements of its lists."""
    return [block for part in module.children() if isinstance(part, nn.ModuleList) for block in part]
