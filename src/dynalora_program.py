"""The console script `dynalora`. It stands outside of the package, because importing that loads PEFT and torch.

The package looks whether this module is imported, and then leaves registering its methods to the program
(`dynalora.cli`), which does so when a job begins. So `--help` and the shell's completion are there at once.
"""

from __future__ import annotations

from dynalora.cli.main import main as main
