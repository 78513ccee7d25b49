"""`python -m dynalora`: the program without its script."""

from __future__ import annotations

from dynalora.cli.main import main

if __name__ == "__main__":
    main()
