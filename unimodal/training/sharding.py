"""Sharded training: FSDP2, and HSDP where the shards are held more than once.

Every rank holds a part of each trained weight, of its gradient, its moments and its moving average; a layer's weights are
together while the layer runs. The backbone gets memory after it was cut, so no process ever holds all of it.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from unimodal.model import UnifiedModel
from unimodal.shards import reshard, write
from unimodal.training.sharded_files import Place, load_sharded, save_sharded


class Sharded(ModelParallelStrategy):
    """FSDP2 over all ranks, or HSDP: shards within groups of ranks, gradients averaged between the groups.

    Checkpoints are folders that every rank writes its part of; any number of ranks reads them, and so do other strategies.

    Args:
        replicas: how often the model is held; the ranks of one copy are neighbours (usually one machine's). 1 is FSDP.
        process_group_backend: how ranks talk; null takes the device's (nccl, gloo).
        timeout_minutes: how long a rank waits for others before it ends.
    """

    def __init__(
        self, replicas: int = 1, process_group_backend: str | None = None, timeout_minutes: float = 30.0
    ) -> None:
        if replicas < 1:
            raise ValueError(f"trainer.strategy.replicas: expected at least 1, got {replicas}")
        if timeout_minutes <= 0:
            raise ValueError(f"trainer.strategy.timeout_minutes: expected more than 0, got {timeout_minutes}")
        super().__init__(process_group_backend=process_group_backend, timeout=timedelta(minutes=timeout_minutes))
        self.replicas = replicas

    lightning_restore_optimizer = True  # `load_checkpoint` gives it, cut

    def setup_environment(self) -> None:
        """One axis of ranks, or two where the model is held more than once."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        shards, rest = divmod(self.world_size, self.replicas)
        if rest:
            raise ValueError(
                f"trainer.strategy.replicas: expected a divisor of the {self.world_size} ranks, got {self.replicas}"
            )
        shape, names = (
            ((shards,), ("shard",)) if self.replicas == 1 else ((self.replicas, shards), ("replica", "shard"))
        )
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank has data of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The parts of this rank."""
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        return self.lightning_module.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """The parts of this rank."""
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The parts of this rank."""
        return ParallelStrategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The parts of this rank."""
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder, whole or not at all."""
        self.checkpoint_io.written = save_sharded(checkpoint, Path(filepath))  # type: ignore[attr-defined]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Of a folder or of one file, with this rank's parts of what is sharded."""
        assert self.lightning_module is not None
        named = dict(self.lightning_module.named_parameters())
        groups = [[p for group in o.param_groups for p in group["params"]] for o in self.optimizers]

        def like(place: Place) -> DTensor | None:
            """The parameter that a tensor of a checkpoint belongs to, and is cut like."""
            found: Any = None
            match place:
                case ("state_dict", name) | ("callbacks", "EMA", "shadow", name):
                    found = named.get(str(name))
                case ("optimizer_states", int(i), "state", int(n), _) if i < len(groups):
                    found = groups[i][n]
            return found if isinstance(found, DTensor) else None

        return load_sharded(Path(checkpoint_path), like)


StrategyRegistry.register("sharded", Sharded, description="FSDP2 over all ranks")


def shard(
    model: UnifiedModel, mesh: DeviceMesh, device: torch.device, products: torch.dtype | None = None, fill: bool = True
) -> None:
    """Cut a model: a group of weights a layer, one for all else that is trained or may be; memory for a deferred backbone.

    The image tokenizer, which is small and frozen, is held by every rank. All ranks begin with what the first one has.

    Args:
        model: of every rank, built alike.
        mesh: one axis of ranks, or two: copies, and parts of a copy.
        device: of this rank.
        products: type that layers' weights travel and are multiplied in where it is not their own; gradients are summed in
            fp32. (Autocast would keep a copy of all layers' weights from forward to backward.)
        fill: whether a deferred backbone gets new values, or others will be written.
    """
    model._apply(lambda t: t if t.is_meta else t.to(device))
    seed = torch.tensor(model.backbone.seed, device=device)
    for tensor in (seed, *model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            dist.broadcast(tensor.detach(), 0)
    model.backbone.seed = int(seed)
    policy = MixedPrecisionPolicy(products, torch.float32, cast_forward_inputs=False)
    for layer in model.backbone.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, ignored_params=set(model.tokenizer.parameters()))
    model.backbone.products = products
    if model.backbone.deferred:
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
        if fill:
            model.backbone.reset_parameters(write)


def check_strategy(strategy: object, module: LightningModule) -> None:
    """Refuse what would not be sharded."""
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, Sharded):
        raise ValueError(f"trainer.strategy: expected sharded to have the weights cut, got {type(strategy).__name__}")
    if isinstance(strategy, Sharded) and not isinstance(getattr(module, "model", None), UnifiedModel):
        raise ValueError(f"trainer.strategy: expected ddp for {type(module).__name__}, got Sharded")
