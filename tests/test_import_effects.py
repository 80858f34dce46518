"""`import opguard` changes nothing for other packages and brings in only its own names."""

import subprocess
import sys
import textwrap


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_in_no_heavy_package():
    """Fault C11: nothing heavy is imported, no other package's module is touched."""
    code = """
        import sys
        import torch
        import socket
        before = {name: id(module) for name, module in sys.modules.items()}
        lookup, connect = socket.getaddrinfo, socket.socket.connect
        import opguard
        heavy = {"transformers", "diffusers", "rich", "pydantic", "huggingface_hub", "accelerate",
                 "IPython", "pytest", "controlnet_aux", "numpy.testing"}
        print(sorted(heavy & set(sys.modules) - set(before)))
        changed = [name for name, old in before.items() if id(sys.modules.get(name)) != old]
        print(changed)
        print(socket.getaddrinfo is lookup, socket.socket.connect is connect)
    """
    assert run(code).splitlines() == ["[]", "[]", "True True"]


def test_star_import_gives_only_public_names():
    """Fault C11: no torch, os, gc or types through `from opguard import *`."""
    code = """
        names = {}
        exec("from opguard import *", names)
        names.pop("__builtins__")
        import types
        import opguard
        print(sorted(name for name, value in names.items() if isinstance(value, types.ModuleType)))
        print(sorted(name for name in names if name.startswith("_")))
        foreign = [name for name, value in names.items()
                   if not getattr(value, "__module__", "opguard").startswith("opguard")]
        print(sorted(foreign))
        print(sorted(names) == sorted(opguard.__all__))
    """
    modules, private, foreign, complete = run(code).splitlines()
    assert modules == "[]"
    assert private in ("[]", "['__version__']")
    assert foreign == "[]"
    assert complete == "True"


def test_the_guards_of_this_half_are_public():
    code = """
        import opguard
        wanted = '''device_guard dtype_guard variant_guard quant_guard init_guard local_guard
            cache_guard load_guard free_guard model_guard seed_guard deterministic_guard
            who_holds'''.split()
        print([name for name in wanted if name not in opguard.__all__])
    """
    assert run(code) == "[]"
