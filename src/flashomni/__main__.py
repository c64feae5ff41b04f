"""``flashomni`` and ``python -m flashomni``; without the extra ``lab`` only ``doctor`` runs."""

from __future__ import annotations

import sys

import flashomni

# What the commands import beyond the core's dependencies.
LAB = {
    "PIL", "accelerate", "matplotlib", "numpy", "rich", "tokenizers", "torchmetrics",
    "transformers", "typer",
}  # fmt: skip


def main() -> None:
    """Run the command line, or say in one sentence what it needs."""
    try:
        from flashomni.cli import app

        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in LAB:
            raise
        need = f"needs {missing}, which is not installed: pip install 'flashomni[lab]'"
        if sys.argv[1:] == ["--version"]:
            sys.stdout.write(f"flashomni {flashomni.__version__}\n")
            return
        if sys.argv[1:] != ["doctor"]:
            sys.stderr.write(f"error: this command {need}\n")
            raise SystemExit(2) from None
        from flashomni.lab import doctor

        sys.stdout.write(f"{doctor.text()}\n\nthe rest of this command line {need}\n")


if __name__ == "__main__":
    main()
