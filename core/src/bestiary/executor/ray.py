"""Ranks as actors of a Ray cluster. Ray finds them a host; with the driver they speak as nodes do.

So messages take the same way, and a rank that dies is noticed as soon, as without Ray.
"""

import secrets
from typing import Any

from bestiary.config import EngineConfig
from bestiary.errors import EngineError, SettingError
from bestiary.executor import node
from bestiary.executor.nodes import Nodes, NodeTeam, introduction
from bestiary.executor.parallel import Inbox

__all__ = ["start"]

#: How long the cluster may take to find room, in seconds.
_PATIENCE = 120.0


def start(config: EngineConfig, ranks: int, inbox: Inbox) -> "_RayTeam":
    """As many ranks, each in a bundle of a placement group of its own.

    Joins the cluster of $RAY_ADDRESS, or the one that this host belongs to, or starts one of this host alone.
    """
    ray = _import()
    if not ray.is_initialized():
        ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
    return _RayTeam(ray, config, ranks, inbox)


def _import() -> Any:
    try:
        import ray
    except ImportError:
        raise SettingError("executor='ray' needs Ray: pip install 'bestiary[ray]', on every host") from None
    return ray


class _Rank:
    """The actor: a node of one rank."""

    def serve(self, address: str, port: int, hello: tuple[int, int, str, str]) -> None:
        """Until the driver goes."""
        node.serve(address, port, node.Hello(*hello))


class _RayTeam:
    """All ranks, with Ray's placement group of theirs."""

    def __init__(self, ray: Any, config: EngineConfig, ranks: int, inbox: Inbox) -> None:
        self._ray = ray
        self._actors: list[Any] = []
        self._calls: list[Any] = []
        like = introduction(0, ranks + 1, secrets.token_hex(16))
        self._place = Nodes(ray.util.get_node_ip_address(), 0, like)
        self._group: Any = ray.util.placement_group([_needs(ray, config)] * ranks, strategy="PACK")
        try:
            self._wait_for_room()
            for rank in range(ranks):
                self._start(rank, config, like)
            others = {rank + 1: range(rank, rank + 1) for rank in range(ranks)}
            self._team = NodeTeam(self._place, range(0), others, inbox, self._check)
        except BaseException:
            self._clear()
            raise
        self.meeting, self.send, self.look = self._team.meeting, self._team.send, self._team.look

    def _wait_for_room(self) -> None:
        try:
            self._ray.get(self._group.ready(), timeout=_PATIENCE)
        except self._ray.exceptions.GetTimeoutError:
            raise EngineError(
                f"the Ray cluster has no room for {len(self._group.bundle_specs)} ranks of "
                f"{self._group.bundle_specs[0]} each: free is {self._ray.available_resources()}"
            ) from None

    def _start(self, rank: int, config: EngineConfig, like: node.Hello) -> None:
        needs = _needs(self._ray, config)
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group, rank)
        kind = self._ray.remote(_Rank).options(
            num_cpus=needs.get("CPU", 0), num_gpus=needs.get("GPU", 0), scheduling_strategy=strategy
        )
        self._actors.append(kind.remote())
        hello = rank + 1, like.nodes, like.version, like.key
        self._calls.append(self._actors[-1].serve.remote(self._place.address, self._place.port, hello))

    def _check(self) -> None:
        """Raise EngineError where an actor ended before it came."""
        ended, _ = self._ray.wait(self._calls, timeout=0)
        try:
            self._ray.get(ended)
        except Exception as error:
            cause = getattr(error, "cause", None) or error  # what the actor raised, without Ray's traceback of it
            raise EngineError(f"Ray could not start a rank of the model: {type(cause).__name__}: {cause}") from error

    def stop(self) -> None:
        """End the actors, and give back what they had. A second call does nothing."""
        self._team.stop()
        self._clear()

    def _clear(self) -> None:
        self._place.close()
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
            self._group = None


def _needs(ray: Any, config: EngineConfig) -> dict[str, float]:
    """What a rank takes of the cluster: a GPU, or where there is none, or none is wanted, a core."""
    has = ray.cluster_resources().get("GPU", 0) > 0 and config.device != "cpu"
    return {"GPU": 1.0} if has else {"CPU": 1.0}
