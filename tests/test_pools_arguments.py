"""Wrong arguments are refused where they are passed, in our words, and nothing is done before."""

from __future__ import annotations

import pytest
import torch

from opguard import pools
from opguard.pools import AttributeCommit, AutoManageHook, CommitObjectProxy, CommitWithAutoManage
from pools_kit import fresh_pools, tiny


@pytest.fixture
def cpu(tmp_path):
    with fresh_pools(tmp_path, "4MiB") as management:
        yield management


OPTIONS = {
    "priority": [("hi", TypeError), (1.5, TypeError), ([], TypeError), (2**63, ValueError)],
    "name": [(3, TypeError), (b"x", TypeError)],
    "inference": [
        ("x", ValueError),
        (-1, ValueError),
        (1.5, TypeError),
        (True, TypeError),
        (2**70, ValueError),
    ],
    "stream": [("x", TypeError), (3, TypeError)],
    "trust_files": [("x", TypeError)],
    "pin": [("no", TypeError)],
    "verify": [("x", ValueError), (True, ValueError)],
}


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [(option, value, kind) for option, each in OPTIONS.items() for value, kind in each],
)
def test_options_of_manage(cpu, option, value, kind):
    model, again = tiny(1), tiny(1)
    handle = pools.manage(again, name="mine")
    for obj in (model, again, handle):
        with pytest.raises(kind, match=rf"{option}.*expected|expected.*{option}"):
            pools.manage(obj, **{option: value})
    assert cpu.find(model) is None
    assert handle.name == "mine"
    assert handle.priority == 0


def test_numbers_of_other_libraries_are_numbers(cpu):
    numpy = pytest.importorskip("numpy")
    handle = pools.manage(
        tiny(1), priority=numpy.int64(3), inference="1MiB", pin=numpy.bool_(True), stream=False
    )
    assert handle.priority == 3
    assert handle.pinned
    for timeout in (numpy.float32(1), 1, float("inf"), -0.5):
        with handle.lease(timeout):
            pass


@pytest.mark.parametrize("timeout", ["1", [], True, 1 + 1j])
def test_a_timeout_is_seconds(cpu, timeout):
    model, handle = tiny(1), pools.manage(tiny(1))
    for use in (
        lambda: handle.lease(timeout),
        lambda: handle.load(timeout),
        lambda: pools.auto_manage(handle, timeout=timeout),
        lambda: pools.auto_manage(model, timeout=timeout),
        lambda: AutoManageHook(model, timeout=timeout),
        lambda: CommitObjectProxy(model, timeout=timeout),
        lambda: CommitWithAutoManage(handle, timeout=timeout),
        lambda: cpu.reserve("cpu", 1, timeout=timeout),
    ):
        with pytest.raises(TypeError, match="expected timeout in seconds"):
            use()
    assert cpu.find(model) is None


@pytest.mark.parametrize("timeout", [float("nan"), 10**400])
def test_a_timeout_is_a_number_of_seconds(cpu, timeout):
    with pytest.raises(ValueError, match="expected timeout in seconds"):
        pools.manage(tiny(1)).lease(timeout)


@pytest.mark.parametrize("methods", ["forward", 3, [3]])
def test_methods_are_names(methods):
    with pytest.raises(TypeError, match=r"methods: expected names .* such as \('encode',"):
        AutoManageHook(tiny(1), methods=methods)


@pytest.mark.parametrize("folder", [3, b"/var/tmp/x", [], ""])
def test_a_spill_folder_is_a_path(cpu, folder):
    for use in (
        lambda: pools.setup_default_pools(spill_dir=folder),
        lambda: cpu.use_folder(folder),
    ):
        with pytest.raises((TypeError, ValueError), match="expected spill_dir as the path of a"):
            use()
    assert pools.manage(tiny(1)) is not None  # the folder is the one it was


@pytest.mark.parametrize("commits", [None, 3, AttributeCommit("style", 3), AttributeCommit])
def test_commits_are_several(commits):
    with pytest.raises(TypeError, match="expected commits as a list"):
        CommitObjectProxy(tiny(1), commits)


def test_commits_take_what_they_are_for():
    with pytest.raises(TypeError, match="expected the name of an attribute as text, got 3"):
        AttributeCommit(3, 3)
    with pytest.raises(TypeError, match="expected a commit to apply meanwhile, got function"):
        CommitWithAutoManage(tiny(1), lambda obj: None)


@pytest.mark.parametrize("kind", [pools.TorchModuleWrapper, pools.DiffusersPipelineWrapper])
def test_users_are_of_objects_of_their_kind(cpu, kind):
    with pytest.raises(TypeError, match=rf"expected .* for {kind.__name__}, got int"):
        kind(3)


def test_a_share_of_nothing_is_not_called_too_large(cpu):
    with pytest.raises(ValueError, match=r"expected bytes to free .* not as a share, got '10%'"):
        pools.free(nbytes="10%")
    with pytest.raises(ValueError, match=r"at most 100 %.*got '101%'"):
        cpu.pool("cpu").budget = "101%"


def test_what_is_reserved_is_bytes(cpu):
    for nbytes in ("x", "1MiB", 1.5, None):
        with pytest.raises(TypeError, match="expected nbytes to reserve as an int"):
            cpu.reserve("cpu", nbytes)
    assert cpu.pool("cpu").used == 0
    cpu.release(cpu.reserve("cpu", torch.tensor(4096)))
