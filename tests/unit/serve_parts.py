"""What the tests of the server share: settings, an order, and one loop for a coroutine."""

import asyncio
import threading

from flashomni.serve import Settings
from flashomni.serve.orders import Order

SETTINGS = Settings(recipes=("fora", "taylorseer"), recipe="lossless", max_images=3, max_steps=20)
ORDER = Order("a red circle", 3, "fora", size=(64, 64), steps=4)
NEVER = threading.Event()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))
