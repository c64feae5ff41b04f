"""Models without an adapter: their blocks are found, and what flows between them is watched.

``declared``  tier B: a table of what watching cannot show
``blocks``    where the blocks are
``watch``     one dense call, watched: who gives what to whom
``pattern``   what follows from it: the streams of each block, or why its list is not cached
``attention`` which attention of a block can run here
``run``       how a block runs then
``tier``      all of it for one model
"""

from flashomni.models.generic.blocks import Blocks, blocks_of, declared

__all__ = ["Blocks", "blocks_of", "declared"]
