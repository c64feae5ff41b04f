"""What two words of a message hold in a refresh; its slots are those of ``attention._hopper``."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

# A message has visits of the rest, of summaries, and a bit that tells it from the end ...
OF_SUMMARIES: gl.constexpr = gl.constexpr(1 << 15)
IS_TILE: gl.constexpr = gl.constexpr(1 << 30)
# ... and valid keys of the first live visit, of the first of the rest, and live visits.
OF_REST: gl.constexpr = gl.constexpr(1 << 8)
OF_LIVE: gl.constexpr = gl.constexpr(1 << 16)
MAX_VISITS = 1 << 15
