"""Which shard a loader reads: the one it was given, or that of its process, for which it asks until something depends
on it."""

import torch

from kd_pipeline._core.ranks import launched
from kd_pipeline.data.plan import Shard
from kd_pipeline.errors import ConfigError, StateError

__all__ = ["OwnShard"]


class OwnShard:
    """The shard of a loader."""

    def __init__(self, given: Shard | None) -> None:
        self._is_given = given is not None
        self._use: str | None = None
        """What depends on the number of processes, as the end of a sentence."""
        self._is_fixed = False
        """Whether batches were read, which depend on the rank too."""
        self.current = given or Shard()
        self.update()

    def update(self) -> bool:
        """Adopt what this process is now, unless something depends on what it was; return whether that is new.

        Processes that a framework starts may meet later than their loaders are made.
        """
        if self._is_given or self._is_fixed:
            return False
        try:
            now, _ = _of_process()
        except ConfigError:
            return False  # `require_known` raises it, if nobody finds out the rank until then
        if now == self.current or (self._use is not None and now.world_size != self.current.world_size):
            return False
        self.current = now
        return True

    def keep_size(self, use: str) -> None:
        """From now on refuse to read batches for a different number of processes, because of `use`."""
        self._use = self._use or use

    def keep(self) -> None:
        """From now on refuse to read batches for a different rank too.

        Raises:
            ConfigError: as `require_known`.
            StateError: the process was something else when something began to depend on it.
        """
        self.require_known()
        if not self._is_given:
            now, source = _of_process()
            if now != self.current:
                assert self._use is not None  # or `update` would have adopted it
                raise StateError(_changed(self.current, now, source, self._use))
        self._use, self._is_fixed = self._use or "its first batch was read", True

    def require_known(self) -> None:
        """Refuse to guess.

        Raises:
            ConfigError: the launcher's variables do not say the rank, and the processes have not met either.
        """
        if self._is_given:
            return
        try:
            _of_process()
        except ConfigError as exc:
            raise ConfigError(
                f"the loader does not know its part of the data: {exc}. Or call torch.distributed.init_process_group "
                "before the loader is used, or give it shard=Shard(rank, world_size)"
            ) from None

    def might_grow(self) -> bool:
        """Whether this may be one of several processes that have not met yet."""
        return not self._is_given and self.current.world_size == 1


def _of_process() -> tuple[Shard, str]:
    """What `torch.distributed` says about this process or, before it is initialized, the launcher; and who said so."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return Shard(distributed.get_rank(), distributed.get_world_size()), "torch.distributed"
    found = launched()
    if found is None:
        return Shard(), "no process group and no variables of a launcher"
    return Shard(found.rank, found.world_size), found.variables


def _changed(old: Shard, new: Shard, source: str, use: str) -> str:
    return (
        f"this process is rank {new.rank} of {new.world_size} now ({source}), but was rank {old.rank} of "
        f"{old.world_size} when {use}. Use the loader only while torch.distributed is initialized (with Lightning, "
        "make it in train_dataloader), make a new loader now, or give it shard=Shard(rank, world_size)"
    )
