"""Models without an adapter: their blocks are found, and what flows between them is watched.

``declared``  tier B: a table of what watching cannot show
``blocks``    where the blocks are
``watch``     one dense call, watched: who gives what to whom
``pattern``   what follows from it: the streams of each block, or why its list is not cached
``attention`` which attention of a block can run here
``run``       how a block runs then
``tier``      all of it for one model
``hosted``    a model whose program calls us, with hooks of its own
"""

from flashomni.models.generic.blocks import Blocks, declared
from flashomni.models.generic.declared import DECLARED

__all__ = ["DECLARED", "Blocks", "declared"]
