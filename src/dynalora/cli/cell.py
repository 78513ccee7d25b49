"""One cell of `dynalora compare`, in a process of its own: `python -m dynalora.cli.cell SETTINGS CELL`.

Both are JSON. The result goes into the comparison's folder; exit status 75 says that another process has the cell.
"""

from __future__ import annotations

import json
import sys

from dynalora.cli.screen import after_imports, complain, console, quiet
from dynalora.errors import DynaloraError


def main() -> int:
    """Run the cell that the command line names."""
    import filelock

    from dynalora.jobs.compare.cell import run_cell
    from dynalora.jobs.compare.contestants import Cell
    from dynalora.jobs.compare.runner import TAKEN
    from dynalora.jobs.compare.settings import CompareSpec
    from dynalora.lab.settings import settings_from

    quiet()
    after_imports()
    spec = settings_from(CompareSpec, json.loads(sys.argv[1]), source="the comparison")
    cell = Cell(**json.loads(sys.argv[2]))
    try:
        run_cell(spec, cell, console=console())
    except filelock.Timeout:
        return TAKEN
    except DynaloraError as error:
        complain(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
