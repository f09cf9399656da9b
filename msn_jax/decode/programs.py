"""Compilation of decoding programs: now, or in the background while another program decodes."""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import jax

from msn_jax import cli

_EXECUTOR = ThreadPoolExecutor(1, "compile")  # the interpreter waits for it at exit
_RUNNING: set[Future] = set()  # compilations in the background, of all `Programs`


class Programs:
    """Which programs are compiled. JAX itself keeps them; a key stands for all arguments that compile a new one."""

    def __init__(self):
        """None is compiled."""
        self._called: set[Hashable] = set()
        self._background: dict[Hashable, Future] = {}  # compilations, running or done

    @contextlib.contextmanager
    def calling(self, key: Hashable) -> Iterator[None]:
        """For a block that calls the program `key`. If it is not compiled yet, a terminal shows "compiling".

        Waits for its compilation in the background, if there is one, because the block would compile it again.
        """
        future = self._background.get(key)
        is_ready = key in self._called or (future is not None and future.done())
        with contextlib.nullcontext() if is_ready else cli.status("compiling"):
            if future is not None:
                wait([future])  # if it has failed, the block will say why
            yield
        self._called.add(key)

    def was_called(self, key: Hashable) -> bool:
        """Whether the program has been called."""
        return key in self._called

    def is_compiled(self, key: Hashable) -> bool:
        """Whether the program is compiled. Raises what its compilation in the background has raised."""
        if key in self._called:
            return True
        future = self._background.get(key)
        if future is None or not future.done():
            return False
        future.result()
        return True

    def is_new(self, key: Hashable) -> bool:
        """Whether the program is neither compiled nor being compiled in the background."""
        return key not in self._called and key not in self._background

    def compile_in_background(self, key: Hashable, lower: Callable[[], jax.stages.Lowered]) -> None:
        """Starts to compile the program that `lower` lowers, a new one."""
        self._background[key] = future = _EXECUTOR.submit(lambda: lower().compile())
        _RUNNING.add(future)
        future.add_done_callback(_RUNNING.discard)

    def wait(self) -> None:
        """Returns when nothing is being compiled in the background."""
        for future in self._background.values():
            future.result()


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """The names of the programs that are compiled, or read from the cache, in the block, in any thread."""
    programs: list[str] = []

    def listen(event: str, duration: float, fun_name: str = "", **_: object) -> None:
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def is_compiling() -> bool:
    """Whether any program is being compiled in the background, which makes everything else slower."""
    return bool(_RUNNING)


def abstract(tree: object) -> object:
    """The shapes, dtypes and shardings of a tree of arrays, to lower a program that donates them."""

    def describe(array: jax.Array) -> jax.ShapeDtypeStruct:
        # With a sharding for arrays that were not placed explicitly, it would be another program.
        placed = {"sharding": array.sharding} if array.committed else {}
        return jax.ShapeDtypeStruct(array.shape, array.dtype, weak_type=jax.typeof(array).weak_type, **placed)

    return jax.tree.map(describe, tree)
