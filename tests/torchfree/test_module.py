"""The module object itself: made twice, dropped, its types bound and unbound."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest


class Fake:
    pass


def test_two_modules_have_states_of_their_own(C, new_module):
    other = new_module()
    assert other is not C
    assert other.bind_types is not C.bind_types


def test_a_dropped_module_is_freed(new_module):
    other = new_module()
    bound = type("Bound", (), {})
    other.bind_types(bound, bound)
    gone = weakref.ref(bound)
    del other, bound
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("args", [(), (1, 2), (Fake, None), (Fake, Fake, Fake)])
def test_bind_types_takes_two_classes(C, args):
    with pytest.raises(TypeError):
        C.bind_types(*args)


def test_bind_types_does_not_leak(C):
    before = sys.getrefcount(Fake)
    for _ in range(100):
        C.bind_types(Fake, Fake)
    assert sys.getrefcount(Fake) <= before + 2


def test_load_ops_says_what_is_missing(C, tmp_path):
    with pytest.raises(ImportError, match="ops library"):
        C.load_ops(str(tmp_path / "absent.so"))
    with pytest.raises(TypeError):
        C.load_ops(3)


def test_ops_info_before_load_is_a_sentence(C):
    with pytest.raises(RuntimeError, match="import opguard"):
        C.ops_info()


def test_docstrings_have_signatures(C):
    import inspect

    for name in dir(C):
        value = getattr(C, name)
        if not name.startswith("_") and type(value).__name__ == "builtin_function_or_method":
            assert value.__doc__, name
            inspect.signature(value)
