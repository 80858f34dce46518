"""local_guard: no connection inside, the user's settings untouched, contexts independent.

Nothing here needs a network: what must not happen is counted by an audit hook, and the one server
that may be reached is on this machine.
"""

import asyncio
import concurrent.futures
import contextvars
import os
import socket
import subprocess
import sys
import textwrap
import threading
import weakref

import pytest
import torch

from opguard.guards.loading import load_guard
from opguard.guards.locality import LocalFileMissing, LocalityError, is_local, local_guard

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

_watch: list | None = None


def _hook(event, args):
    if _watch is not None and event in (
        "socket.connect",
        "socket.getaddrinfo",
        "socket.sendto",
        "socket.sendmsg",
    ):
        _watch.append((event, args))


sys.addaudithook(_hook)


@pytest.fixture
def sockets():
    """The list of connections and lookups that anything in this process tried."""
    global _watch  # noqa: PLW0603
    _watch = []
    yield _watch
    _watch = None


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(folder)
    return folder


def _one_sentence(caught):
    text = str(caught.value)
    assert "\n" not in text
    assert "hf download" in text
    return text


@pytest.mark.parametrize("user", [None, "1"])
def test_user_setting_unset_or_set_stands(monkeypatch, user):
    """Fault C4: the guard works on huggingface_hub in-process, and leaves the variable alone."""
    if user is None:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", user)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", bool(user))
    before = dict(os.environ)
    for flag in (True, False):
        with local_guard(local_files_only=flag) as g:
            assert g.local_files_only is flag
            assert bool(hub.is_offline_mode()) is (flag or bool(user))
            assert bool(constants.HF_HUB_OFFLINE) is (flag or bool(user))
            assert dict(os.environ) == before
        assert constants.HF_HUB_OFFLINE is bool(user)
    assert dict(os.environ) == before


def test_nothing_is_left_behind_after_an_error():
    before = socket.getaddrinfo, vars(socket.socket).get("connect"), constants.HF_HUB_OFFLINE

    def fail():
        assert socket.getaddrinfo is not before[0]
        raise KeyError("x")

    with pytest.raises(KeyError), local_guard():
        fail()
    after = socket.getaddrinfo, vars(socket.socket).get("connect"), constants.HF_HUB_OFFLINE
    assert after == before
    assert not is_local()


def test_an_inner_permissive_guard_does_not_open_the_outer():
    with local_guard():
        with local_guard(local_files_only=False):
            assert is_local()
        with local_guard():
            pass
        assert is_local()
        assert hub.is_offline_mode()
    assert not is_local()


def test_threads_overlapping_are_independent():
    """Fault C4: two threads in and out of turn leave nothing set, and neither sees the other."""
    before = constants.HF_HUB_OFFLINE
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with local_guard():
            first_in.set()
            second_in.wait(10)
            seen["first"] = bool(hub.is_offline_mode())
        first_out.set()

    def second():
        first_in.wait(10)
        seen["outside"] = bool(hub.is_offline_mode())
        with local_guard():
            second_in.set()
            first_out.wait(10)
            seen["second"] = bool(hub.is_offline_mode())
        seen["after"] = bool(hub.is_offline_mode())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == {"first": True, "outside": bool(before), "second": True, "after": bool(before)}
    assert constants.HF_HUB_OFFLINE is before


def test_asyncio_tasks_are_independent():
    async def inside(entered, go):
        with local_guard():
            entered.set()
            await go.wait()
            return is_local()

    async def main():
        entered, go = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(inside(entered, go))
        await entered.wait()
        outside = is_local()
        go.set()
        return outside, await task

    assert asyncio.run(main()) == (False, True)


def test_a_context_can_be_handed_to_a_thread():
    seen = []
    with local_guard():
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(lambda: seen.append(is_local()),))
        thread.start()
        thread.join()
    assert seen == [True]


def test_decorator():
    @local_guard()
    def inside():
        return is_local()

    assert inside() is True
    assert is_local() is False


def test_decorated_generators_and_coroutines_are_local_only_while_they_run():
    @local_guard()
    def numbers():
        for _ in range(2):
            yield is_local()

    assert [(inside, is_local()) for inside in numbers()] == [(True, False)] * 2

    @local_guard()
    async def work():
        first = is_local()
        await asyncio.sleep(0)
        return first, is_local()

    async def main():
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        return is_local(), await task

    assert asyncio.run(main()) == (False, (True, True))


def test_old_hub_sessions_are_dropped_at_both_ends(monkeypatch):
    """huggingface_hub before 1.0 keeps sessions that were made offline; it has reset_sessions."""
    http = pytest.importorskip("huggingface_hub.utils._http")
    seen = []
    monkeypatch.setattr(http, "reset_sessions", lambda: seen.append(is_local()), raising=False)
    with local_guard():
        assert seen == [True]
    assert seen == [True, False]


def test_a_failure_inside_leaves_nothing_alive():
    refs = []

    def fail():
        model = torch.nn.Linear(2, 2)
        refs.append(weakref.ref(model))
        hub.hf_hub_download("nobody/nothing", "a.bin")

    with pytest.raises(LocalFileMissing) as caught, local_guard():
        fail()
    assert caught.value.__cause__ is not None
    assert refs[0]() is None


@pytest.mark.parametrize("guard", [local_guard, lambda: load_guard(local_files_only=True)])
def test_the_sentence_does_not_keep_its_caller_alive(guard, empty_cache, collected):
    refs = []

    def caller():
        mine = torch.ones(2)
        refs.append(weakref.ref(mine))
        with guard():
            hub.snapshot_download("nobody/nothing")

    try:
        caller()
    except LocalFileMissing as missing:
        assert missing.__cause__ is not None
    assert refs[0]() is None


def test_last_line_refuses_any_connection_to_another_machine(sockets):
    with local_guard():
        with pytest.raises(LocalityError, match=r"got one to 'example\.invalid'"):
            socket.create_connection(("example.invalid", 80), timeout=1)
        with socket.socket() as sock, pytest.raises(LocalityError, match=r"192\.0\.2\.1"):
            sock.connect(("192.0.2.1", 80))
        with socket.socket() as sock, pytest.raises(LocalityError):
            sock.connect_ex(("192.0.2.1", 80))
    assert sockets == []


@pytest.mark.parametrize("address", [("192.0.2.1", 9), ("127.example.invalid", 9)])
def test_no_datagram_leaves_this_machine(address, sockets):
    """UDP needs no connection: sendto and sendmsg name where a datagram goes."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock, local_guard():
        for send in (
            lambda: sock.sendto(b"x", address),
            lambda: sock.sendto(b"x", 0, address),
            lambda: sock.sendmsg([b"x"], [], 0, address),
            lambda: sock.connect(address),
        ):
            with pytest.raises(LocalityError, match=r"no connection to another machine"):
                send()
    assert sockets == []


def test_datagrams_to_this_machine_arrive():
    with (
        socket.socket(type=socket.SOCK_DGRAM) as server,
        socket.socket(type=socket.SOCK_DGRAM) as client,
        local_guard(),
    ):
        server.bind(("127.0.0.1", 0))
        server.settimeout(5)
        client.sendto(b"1", server.getsockname())
        client.sendmsg([b"2"], [], 0, server.getsockname())
        assert {server.recv(9), server.recv(9)} == {b"1", b"2"}
        client.connect(server.getsockname())
        client.sendmsg([b"3"])
        assert server.recv(9) == b"3"


def test_a_pair_of_unix_sockets_is_this_machine():
    first, second = socket.socketpair()
    with first, second, local_guard():
        first.sendmsg([b"x"])
        assert second.recv(9) == b"x"


def refused(host="192.0.2.1"):
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((host, 9))
        except LocalityError:
            return True
    return False


def test_a_thread_started_inside_stays_off_the_network_to_its_end(sockets):
    inside_left, seen = threading.Event(), []

    class Thread(threading.Thread):
        def run(self):
            seen.append((is_local(), refused()))
            inside_left.wait(10)
            seen.append((is_local(), refused(), bool(hub.is_offline_mode())))

    start = threading.Thread.start
    with local_guard():
        thread = Thread()
        thread.start()
    inside_left.set()
    thread.join(20)
    assert seen == [(True, True), (True, True, True)]
    assert sockets == []
    assert "run" not in vars(thread)
    assert threading.Thread.start is start  # taken down after the last one


def test_a_thread_of_a_thread_and_a_timer_are_held_too():
    seen = []

    def outer():
        inner = threading.Timer(0, lambda: seen.append(refused()))
        inner.start()
        inner.join()

    with local_guard():
        thread = threading.Thread(target=outer)
        thread.start()
        thread.join()
    assert seen == [True]


def test_a_thread_that_cannot_start_is_left_as_it_was():
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    with local_guard(), pytest.raises(RuntimeError, match="once"):
        thread.start()
    assert "run" not in vars(thread)


def test_jobs_of_a_pool_are_held_where_they_were_given_and_nowhere_else():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with local_guard():
            assert pool.submit(refused).result(10)
            assert list(pool.map(lambda n: is_local(), range(2))) == [True, True]
        assert pool.submit(is_local).result(10) is False  # the same worker, begun inside
    assert not is_local()


def test_a_bar_watched_to_the_end_of_the_process_does_not_keep_the_layers_up():
    lookup = socket.getaddrinfo

    class Watching(threading.Thread):
        __module__ = "tqdm._monitor"

        def __init__(self):
            threading.Thread.__init__(self, daemon=True)
            self.end = threading.Event()

        def run(self):
            self.end.wait(20)

    with local_guard():
        thread = Watching()
        thread.start()
    try:
        assert socket.getaddrinfo is lookup
    finally:
        thread.end.set()
        thread.join()


def test_a_constant_set_inside_a_guard_does_not_open_the_next(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with local_guard():
        constants.HF_HUB_OFFLINE = False
        with local_guard():
            assert hub.is_offline_mode()
    assert constants.HF_HUB_OFFLINE is False


def test_threads_outside_are_not_touched():
    seen = []
    entered, done = threading.Event(), threading.Event()

    def other():
        entered.wait(10)
        thread = threading.Thread(target=lambda: seen.append(is_local()))
        thread.start()
        thread.join()
        done.set()

    helper = threading.Thread(target=other)
    helper.start()
    with local_guard():
        entered.set()
        done.wait(10)
    helper.join()
    assert seen == [False]


def test_no_conversion_thread_asks_the_hub(tmp_path, monkeypatch, empty_cache, sockets):
    """transformers converts weights that are no safetensors in a thread of its own."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    repo = empty_cache / "models--org--bins"
    folder = repo / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    config.save_pretrained(folder)
    torch.save(transformers.BertModel(config).state_dict(), folder / "pytorch_model.bin")
    begun, start = [], threading.Thread.start

    def watched(self):
        begun.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", watched)
    with local_guard():
        transformers.BertModel.from_pretrained("org/bins")
    for thread in begun:
        thread.join(20)
    assert sockets == []


@pytest.mark.parametrize("lookup", ["getaddrinfo", "gethostbyname", "gethostbyname_ex"])
def test_no_name_of_another_machine_is_looked_up(lookup):
    real = getattr(socket, lookup)
    with local_guard(), pytest.raises(LocalityError, match=r"'example\.org'; load from a local"):
        getattr(socket, lookup)("example.org", *([80] if lookup == "getaddrinfo" else []))
    assert getattr(socket, lookup) is real


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, local_guard():
        address = server.getsockname()
        with socket.create_connection(address, timeout=5) as client:
            assert client.getpeername() == address


def test_hub_refuses_even_where_it_was_told_to_go(sockets):
    """A server on this machine stands in for the hub: not one request reaches it."""
    with local_guard():
        api = hub.HfApi(endpoint="http://127.0.0.1:9")
        with pytest.raises(OSError, match="offline mode is enabled"):
            api.list_repo_files("a/b")
    assert sockets == []


@pytest.mark.parametrize("loader", ["AutoModel", "AutoTokenizer", "AutoConfig", "BertModel"])
def test_transformers_absent_repo(loader, sockets, empty_cache):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(LocalFileMissing) as caught, local_guard():
        getattr(transformers, loader).from_pretrained("nobody/nothing")
    text = _one_sentence(caught)
    assert "'nobody/nothing'" in text
    assert str(empty_cache) in text
    assert "hf download nobody/nothing" in text
    assert isinstance(caught.value, OSError)
    assert sockets == []


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
@pytest.mark.parametrize("loader", ["AutoencoderTiny", "DiffusionPipeline", "DDPMScheduler"])
def test_diffusers_absent_repo(loader, sockets, empty_cache):
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(LocalFileMissing) as caught, local_guard():
        getattr(diffusers, loader).from_pretrained("nobody/nothing")
    assert "hf download nobody/nothing" in _one_sentence(caught)
    assert sockets == []


def test_revision_is_in_the_command(sockets, empty_cache):
    with pytest.raises(LocalFileMissing) as caught, local_guard():
        hub.hf_hub_download("nobody/nothing", "a.bin", revision="v2")
    text = _one_sentence(caught)
    assert text.endswith("hf download nobody/nothing a.bin --revision v2")
    assert sockets == []


def test_missing_weights_of_a_local_folder(bert_folder, vae_folder, tmp_path, sockets):
    transformers, diffusers = (pytest.importorskip(n) for n in ("transformers", "diffusers"))
    for cls, folder in (
        (transformers.BertModel, bert_folder),
        (diffusers.AutoencoderTiny, vae_folder),
    ):
        target = tmp_path / cls.__name__
        target.mkdir()
        (target / "config.json").write_bytes((folder / "config.json").read_bytes())
        with pytest.raises(LocalFileMissing) as caught, local_guard():
            cls.from_pretrained(str(target))
        text = _one_sentence(caught)
        assert f"in the folder {str(target)!r}" in text
        assert ".safetensors" in text or ".bin" in text
    empty = tmp_path / "empty"
    empty.mkdir()
    for loader in (transformers.AutoModel, diffusers.AutoencoderTiny):
        with (
            pytest.raises(LocalFileMissing, match=r"expected config\.json in the folder"),
            local_guard(),
        ):
            loader.from_pretrained(str(empty))
    with pytest.raises(LocalFileMissing, match="there is no folder"), local_guard():
        transformers.AutoModel.from_pretrained(str(tmp_path / "not" / "there"))
    assert sockets == []


def test_other_errors_stay_what_they_are(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Unrecognized model"), local_guard():
        transformers.AutoModel.from_pretrained(str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught, local_guard():
        open(tmp_path / "nope")  # noqa: SIM115
    assert type(caught.value) is FileNotFoundError


def test_local_folders_load_without_a_socket(bert_folder, vae_folder, sockets):
    transformers, diffusers = (pytest.importorskip(n) for n in ("transformers", "diffusers"))
    with local_guard():
        model = transformers.AutoModel.from_pretrained(str(bert_folder))
        vae = diffusers.AutoencoderTiny.from_pretrained(str(vae_folder))
    assert model(torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 8)
    assert isinstance(vae, torch.nn.Module)
    assert sockets == []


def test_libraries_imported_inside_the_guard_are_held_too(tmp_path):
    """In a fresh process with nothing imported before, and the user's variable unset."""
    code = """
        import os, sys
        seen = []
        names = ("socket.connect", "socket.getaddrinfo")
        sys.addaudithook(lambda event, args: event in names and seen.append(args))
        from opguard.guards.locality import local_guard
        assert "huggingface_hub" not in sys.modules
        with local_guard():
            import transformers
            try:
                transformers.AutoConfig.from_pretrained("nobody/nothing")
            except OSError:
                pass
            else:
                raise SystemExit("loaded")
        import huggingface_hub
        assert huggingface_hub.constants.HF_HUB_OFFLINE is False
        assert not huggingface_hub.is_offline_mode()
        assert "HF_HUB_OFFLINE" not in os.environ
        print("seen", seen)
    """
    env = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    env["HF_HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "seen []", done.stderr
