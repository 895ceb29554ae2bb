"""Scripts of the checkout as modules."""

import importlib.util
import sys
from functools import cache
from pathlib import Path

from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[2]


@cache
def load_script(name: str, folder: str = "examples"):
    """A script as a module; each `main` starts as a new process would."""
    path = ROOT / folder / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # where the script finds modules beside it
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as Python does when it runs a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    main = module.main

    def fresh_main(arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        main(arguments)

    module.main = fresh_main
    if hasattr(module, "make_parser"):
        module.make_parser = cache(module.make_parser)  # flags of eight levels: half a second
    return module
