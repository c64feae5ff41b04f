"""``python contract.py PACKAGE``: what the fakes promise holds in the real package."""

import importlib
import inspect
import sys

import fake_servers

for path, uses in fake_servers.SAME.items():
    if path.partition(".")[0] == sys.argv[1]:
        for use in uses:
            real = importlib.import_module(path)
            for name in use.__qualname__.split("."):
                real = getattr(real, name)
            ours, theirs = (
                [(each.name, each.kind) for each in inspect.signature(f).parameters.values()]
                for f in (use, real)
            )
            assert ours == theirs, (path, use.__qualname__, ours, theirs)
            print("same", path, use.__qualname__)
