"""How a run is spread over ranks, and what the ranks tell each other: counted, before any of them begins."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ranks:
    """`replicas` copies of the model, each cut into `shards` parts: (N, 1) is DDP, (1, N) FSDP, else HSDP."""

    replicas: int = 1
    shards: int = 1

    @property
    def count(self) -> int:
        """Ranks, each of which trains on packs of its own."""
        return self.replicas * self.shards

    @classmethod
    def of(cls, settings: Any) -> "Ranks":
        """What the trainer's settings (strategy, devices, num_nodes) ask for.

        Raises:
            ValueError: replicas that do not divide the ranks, or a strategy that is not this project's.
        """
        import torch

        devices, strategy = settings.devices, settings.strategy
        found = torch.cuda.device_count() if torch.cuda.is_available() else 1
        if isinstance(devices, str) and "," in devices:
            devices = [device for device in devices.split(",") if device.strip()]
        each = found if devices in ("auto", -1, "-1") else int(devices) if str(devices).isdecimal() else len(devices)
        count = each * settings.num_nodes
        path = str(getattr(strategy, "class_path", strategy))
        if path != "sharded" and not path.endswith(".Sharded"):
            if path not in ("auto", "ddp"):
                raise ValueError(f"--plan: expected trainer.strategy ddp or sharded, got {path}")
            return cls(replicas=count)
        replicas = int(getattr(getattr(strategy, "init_args", None), "replicas", 1))
        if replicas < 1 or count % replicas:
            raise ValueError(f"trainer.strategy.replicas: expected a divisor of the {count} ranks, got {replicas}")
        return cls(replicas, count // replicas)


@dataclass(frozen=True)
class Weights:
    """Bytes of a model, by how they are spread."""

    copied: int  # on every rank: the image tokenizer, buffers
    layers: int  # of all layers together
    layer: int  # of the largest
    root: int  # cut, but in no layer: embedding, head, generator, encoders
    trained: int  # of what is trained: as large are its gradients and its average
    itemsize: int = 4  # of one

    @property
    def whole(self) -> int:
        """All of them."""
        return self.copied + self.layers + self.root

    def held(self, ranks: Ranks) -> int:
        """What a rank keeps of the weights."""
        return self.copied + -(-(self.layers + self.root) // ranks.shards)

    def gathered(self, ranks: Ranks) -> int:
        """What lies together in a backward pass: a layer, the one that comes, what is in none, and their gradients; fp32."""
        if ranks.shards == 1:
            return self.trained if ranks.replicas > 1 else 0  # DDP's buckets hold gradients a second time
        return 3 * self.layer + 2 * self.root

    def traffic(self, ranks: Ranks, packs: int, cast: float = 1.0) -> int:
        """Bytes that a rank receives in a step of `packs` packs, with rings.

        Cut weights come twice a pack (forward and backward), those of layers at `cast` of their size where products are in a
        smaller type; what is in no layer comes once. Gradients of cut weights are summed and cut each pack. Copies sum
        gradients: once a step where nothing is cut (DDP), each pack where it is (HSDP).
        """
        s, r = ranks.shards, ranks.replicas
        cut = packs * (s - 1) / s * (2 * cast * self.layers + self.root + self.trained)
        between = 2 * (r - 1) / r * self.trained / s * (packs if s > 1 else 1)
        return round(cut + between)
