"""fit, validate, test and predict through LightningCLI, with errors of one line and a run folder."""

import fcntl
import logging
import os
import re
import shlex
import shutil
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from unimodal.backbone import deferred
from unimodal.export import check_weights, one_line, read_checkpoint
from unimodal.files import warn
from unimodal.training.checkpoints import Checkpoints, RandomStates, damage, newest_intact
from unimodal.training.logs import Board, Table
from unimodal.training.nonfinite import NonFinite
from unimodal.training.ranks import Ranks
from unimodal.training.run import Progress, RunFolder, Samples, StopOnSignal, from_outside
from unimodal.training.sharding import Sharded, check_strategy
from unimodal.training.watch import Watch

# Lightning's warnings about what is meant here: one stream in one process, a run folder that is continued.
QUIET = (
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    ".*treespec.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Experiment logs directory.*",
    ".*tensorboardX.*",
    ".*args parameter is intended.*",
    ".*in eval mode at the start of training.*",
    ".*predict returned None.*",
    ".*lr_scheduler.step.*",
    ".*Trying to infer the `batch_size`.*",
)

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK")
"""By which launchers number the processes of one run."""

RECIPE = re.compile(r"model\.(model\.)?(tokenizer|generator)\.(.+\.)?class_path$")
"""Keys of a file that is the recipe of a tokenizer or of a model, and not settings laid over one."""


class _Parser(LightningArgumentParser):
    """Says what is wrong in one line instead of fifty."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(one_line(message))


class _SaveConfig(SaveConfigCallback):
    """Writes the resolved config into the run folder before anything else happens there."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            root = Path(trainer.default_root_dir)
            root.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, root / "config.yaml", skip_none=False, overwrite=True, multifile=False)


class UnimodalCLI(LightningCLI):
    """LightningCLI with this project's defaults: a run folder, quiet output, checkpoints, samples and an export."""

    def __init__(self, args: list[str], plan: bool = False) -> None:
        self._plan = plan  # instead of training
        self.signals = StopOnSignal()
        self._command = shlex.join(["unimodal", *args])
        self._lock: TextIOWrapper | None = None  # of the run folder, held as long as the file is open
        self._made: Path | None = None  # the run folder, while nothing but this command's first lines are in it
        try:
            super().__init__(
                LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, args=args,
                save_config_callback=_SaveConfig, save_config_kwargs={"save_to_log_dir": False},
                seed_everything_default=0, trainer_defaults={
                    "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 10,
                    "max_epochs": -1, "check_val_every_n_epoch": None, "devices": 1, "use_distributed_sampler": False,
                    "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
                },
            )  # fmt: skip
        except (RuntimeError, ValueError, MisconfigurationException) as error:
            reason = from_outside(error, self.signals.stepped)
            if reason is not None:
                raise ValueError(reason) from error
            if isinstance(error, RuntimeError):
                raise
            trainer = getattr(self, "trainer", None)
            if self._made is not None and (trainer is None or (trainer.global_step == 0 and trainer.is_global_zero)):
                shutil.rmtree(self._made, ignore_errors=True)
            if isinstance(error, ValueError):
                message = str(error)
                if "Original Traceback" in message:  # from a loader's worker
                    raise ValueError(message.rpartition("ValueError: ")[2]) from error
                raise
            raise ValueError(f"trainer: {error}") from error

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Our parser, for the command and for each subcommand."""
        parser = _Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="YAML file; later files and options override.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Keys beside model, data and trainer."""
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Watch, "watch")
        parser.add_lightning_class_args(NonFinite, "nonfinite")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def instantiate_classes(self) -> None:
        """Settle the run folder and the checkpoint before anything is built."""
        config = self.config[self.subcommand]
        recipe = recipe_name([Path(str(path)) for path in config.get("config") or ()])
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = f"out/{recipe}"
        root = Path(config.trainer.default_root_dir)
        config.ckpt_path = self._checkpoint(config.get("ckpt_path"), root)
        if config.get("weights_only") is False:
            raise ValueError("weights_only: expected true (checkpoints that carry code are not read), got false")
        config.weights_only = True
        started = (root / "checkpoints" / "last.ckpt").exists()
        dry = config.trainer.fast_dev_run or self._plan
        if self.subcommand == "fit" and started and config.ckpt_path is None and not dry:
            raise ValueError(
                f"trainer.default_root_dir: {root} already holds a run; continue it with --ckpt_path last, or choose another"
            )
        self._recipe, self._root = recipe, root
        new = first_rank() and not root.exists()
        if self.subcommand == "fit" and not dry and first_rank():
            self._lock = _lock(root)
        self._made = root if new else None  # not before it is held: another run may have made it meanwhile
        try:
            with deferred() if _is_sharded(config.trainer.strategy) or self._plan else nullcontext():
                super().instantiate_classes()
        except ValueError as error:
            raise ValueError(one_line(str(error))) from error
        check_strategy(self.trainer.strategy, self.model)
        if config.ckpt_path is not None:
            check_weights(self.model, self._weights, config.ckpt_path)

    def _run_subcommand(self, subcommand: str) -> None:
        """Train, or say what that would take."""
        if self._plan:
            from unimodal.training.plan import describe, make_plan

            print(describe(make_plan(self.model, self.datamodule, self.trainer, self._ranks)))
        else:
            super()._run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        """Nothing: checkpoints hold no settings here, and `_checkpoint` reads them with care."""

    def _checkpoint(self, asked: str | None, root: Path) -> str | None:
        if asked is None and self.subcommand == "fit":
            return None
        named = None if asked in (None, "last") else Path(str(asked))
        # The first rank looks at every byte; what it finds is what all ranks load.
        path = newest_intact(root / "checkpoints", first_rank()) if named is None else named
        if path is None or not path.exists():
            missing = path or root / "checkpoints" / "last.ckpt"
            raise ValueError(f"ckpt_path: expected a checkpoint, got {asked or 'last'}: {missing} does not exist")
        checkpoint = read_checkpoint(path, "meta")
        if not {"state_dict", "loops", "pytorch-lightning_version"} <= set(checkpoint):
            raise ValueError(f"ckpt_path: expected a checkpoint of a training, got {path}, which holds something else")
        problem = damage(path) if named is not None and first_rank() else None
        if problem is not None:  # asked for by name, it is not passed over
            raise ValueError(f"ckpt_path: expected an undamaged checkpoint, got {path}: {problem}")
        self._weights = checkpoint["state_dict"]
        return str(path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with loggers and callbacks of the run folder."""
        config = dict(self._get(self.config_init, "trainer", default={}), **kwargs)
        if self._plan:  # by one process, of as many as are asked for
            self._ranks = Ranks.of(self.config[self.subcommand].trainer)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            config |= {"strategy": "auto", "devices": 1, "num_nodes": 1, "accelerator": device}
        else:
            config["devices"] = _devices(config.get("devices"), config.get("accelerator"))
        part = getattr(type(self.model), "part", None)
        if self.subcommand != "fit":  # a look at a checkpoint is no part of the run's curves
            config["logger"] = False
        elif config.get("logger") in (None, True):
            root = str(self._root)
            config["logger"] = [Table(root, "logs"), Board(root, "tensorboard")]
        elsewhere = self._get(self.config_init, "watch").logger(self._recipe, self._root)
        if elsewhere is not None and self.subcommand == "fit" and not self._plan:
            config["logger"] = [*_as_list(config["logger"] or None), elsewhere]
        resolved = self.config[self.subcommand].model.init_args
        keys = self._parser(self.subcommand).callback_keys
        callbacks = [*(self._get(self.config_init, key) for key in keys), self.signals, Samples(), RandomStates()]
        if config.get("fast_dev_run"):  # its last.ckpt would take the place of a run's
            callbacks = [c for c in callbacks if not isinstance(c, Checkpoints)]
            config["enable_checkpointing"] = False
        config["plugins"] = [
            *_as_list(config.get("plugins")),
            *(c.files for c in callbacks if isinstance(c, Checkpoints)),
        ]
        if config["logger"] and not config.get("fast_dev_run"):
            callbacks.append(LearningRateMonitor("step"))
        if part is not None:
            callbacks.append(RunFolder(self._recipe, resolved[part].as_dict(), self._command))
        if config.get("enable_progress_bar") is not False:
            callbacks.append(Progress(refresh_rate=10))
        return self._instantiate_trainer(config, callbacks)


def run(args: list[str]) -> int:
    """One of fit, validate, test, predict with its arguments; the exit code."""
    quiet()
    # An export to start from is a setting of the model with a name of its own.
    args = [f"--model.init_args.init{a.removeprefix('--init')}" if a.split("=")[0] == "--init" else a for a in args]
    for option, value in pairwise(args):
        if option in ("-c", "--config"):
            _check_config(Path(value))
    plan = "--plan" in args
    if plan and args[0] != "fit":
        raise ValueError(f"--plan: expected the command fit, got {args[0]}")
    cli = UnimodalCLI([a for a in args if a != "--plan"], plan)
    if cli.signals.received is not None:
        print(f"stopped by signal {cli.signals.received}; continue with --ckpt_path last")
        return 128 + cli.signals.received
    return 0


def recipe_name(files: Sequence[Path]) -> str:
    """What a run of these `-c` files is called, in its export too.

    It is the last file that names a class in the tokenizer or the generator (`tokenizer` or `generator` in `model`, or in
    the `model` inside it): overlays of a trainer, of data or of settings give no name. Where none does, it is the first.
    """
    named = [path for path in files if any(RECIPE.match(key) for key in _keys(path))]
    return (named[-1:] or [*files[:1]] or [Path("run")])[0].stem


def _keys(path: Path) -> Iterator[str]:
    """Where a file has values, as the command line spells it (model.tokenizer), however the file nests or dots them."""
    levels = [("", yaml.safe_load(path.read_text(encoding="utf-8")))] if path.is_file() else []
    while levels:
        start, level = levels.pop()
        for key, value in level.items() if isinstance(level, dict) else ():
            yield (name := f"{start}{key}".replace(".init_args", ""))
            levels.append((f"{name}.", value))


def first_rank() -> bool:
    """Whether this process is the first of its run, which holds the run folder for all of them."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def _lock(root: Path) -> TextIOWrapper | None:
    """Hold the run folder for this process, which lets go of it when it ends, however it ends."""
    root.mkdir(parents=True, exist_ok=True)
    file = (root / ".lock").open("a+", encoding="utf-8")
    try:
        # A lock of the process, not of the open file: the workers that are forked from it do not keep it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or "a process that has not said which"
        raise ValueError(
            f"trainer.default_root_dir: expected a folder that no other run writes to, got {root}, held by {owner}"
        ) from None
    except OSError as error:
        warn(f"run folder: {root} cannot be held for this run alone ({error})")
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _devices(asked: Any, accelerator: Any) -> Any:
    """As many as processes were started on this machine by torchrun, which a CPU's `auto` does not know of."""
    if accelerator in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise ValueError(f"trainer.accelerator: expected cpu on a machine without a GPU, got {accelerator}")
    started = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if asked in ("auto", -1, "-1") and accelerator == "cpu":
        return started
    if str(asked).isdecimal() and int(asked) < started:
        raise ValueError(f"trainer.devices: expected the {started} processes that were started here, got {asked}")
    return asked


def _is_sharded(strategy: Any) -> bool:
    """Whether the strategy that is asked for gives the backbone its memory."""
    return strategy == "sharded" or str(getattr(strategy, "class_path", "")).rpartition(".")[2] == Sharded.__name__


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _check_config(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"-c: expected a YAML file, got {path}, which does not exist")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"-c: {path} is no YAML ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"-c: expected keys such as model, data and trainer, got {path}, which holds none")


def quiet() -> None:
    """Progress, metrics and what matters; not Lightning's advertisements."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in QUIET:
        warnings.filterwarnings("ignore", pattern)
