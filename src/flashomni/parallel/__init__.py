"""One sequence on several ranks of torch.distributed: who holds what, and how it is exchanged."""

from flashomni.parallel.layout import Layout
from flashomni.parallel.mesh import Mesh
from flashomni.parallel.ranks import Agreement, Ranks
from flashomni.parallel.shard import Sent, Shard

__all__ = ["Agreement", "Layout", "Mesh", "Ranks", "Sent", "Shard"]
