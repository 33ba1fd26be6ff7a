"""Run a person's own Python program as one worker, as plain Python would run it.

``python -P -m scaletrain.programs.script RUN_DIR PROGRAM``, where PROGRAM is ``script.py``,
``-m module`` or ``-c code`` with its arguments. ``-P`` before it leaves the script's directory out
of ``sys.path``. Under every launcher the program finds RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, so that ``torch.distributed.init_process_group()``
works as it stands. If it raises, the traceback is recorded and shown once.
"""

import builtins
import io
import itertools
import os
import pkgutil
import runpy
import sys
from importlib.machinery import BuiltinImporter, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

from scaletrain import programs

programs.begin(__name__)  # before torch is imported

from scaletrain.engine import ddp_end, rendezvous
from scaletrain.errors import UserError
from scaletrain.run import progress
from scaletrain.timeouts import Timeouts
from scaletrain.world import World

# Frames of these files run the program and explain nothing. The second is "<frozen runpy>".
_RUNNER_FILES = (__file__, runpy.run_path.__code__.co_filename)


def main(run_dir: Path, words: list[str]) -> None:
    """Run the program as ``__main__``, and report how it ended."""
    world = World.from_env()
    hook = _ExceptHook()
    try:
        with progress.ending(), progress.reporting(run_dir, world, _RUNNER_FILES):
            # Inside `reporting`, so that the mistake is shown once and not by every rank.
            if not words[0].startswith("-") and not os.path.exists(words[0]):
                raise UserError(f"{words[0]}: there is no such file")
            os.environ.update(variables(world, run_dir))
            # From here on the script promises no signs of life, and silence is no hang.
            progress.alive(progress.SCRIPT)
            _prepare_breakpoint(world)
            ddp_end.mend()  # a program that ends as it should must not wait for ever
            programs.done()
            with hook:
                _run(words)
    except SystemExit:
        # The failure is on disk and the supervisor counts the seconds, before anybody's hook, which
        # may send a report over a network.
        hook.call()
        raise


def variables(world: World, run_dir: Path) -> dict[str, str]:
    """Return variables that torch.distributed needs and the launcher did not set.

    Where rank 0 must be found, every rank has to call this.
    """
    # Our launcher chose this process to serve the store: the other ranks already try to join it.
    if rendezvous.STORE_FD in os.environ:
        rendezvous.serve()
    # The launcher has said everything: nothing of it is overruled.
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ and "RANK" in os.environ:
        return {}
    store = rendezvous.connect(world, run_dir, Timeouts().join)
    world = rendezvous.place(world, store)
    address, port = rendezvous.address_of(store)
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        # torch's env:// then joins the store that runs there, on every rank. Without it, rank 0
        # would try to serve another one at the same port.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


class _ExceptHook:
    """Calls ``sys.excepthook`` for an exception of the program, as Python does for its own.

    The default hook stays silent about an exception that was reported: the supervisor shows it,
    once for all ranks. A hook of the program's own, such as an error tracker's, is called.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._error: BaseException | None = None  # of the program; set when the body raises
        self._trace: TracebackType | None = None  # of that exception, without frames of ours
        self._is_called = False
        self._default = sys.excepthook
        # Both names, so that a program that compares them finds the default hook in place.
        sys.excepthook = sys.__excepthook__ = self._show

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, SystemExit):
            self._error = error
            while trace and trace.tb_frame.f_code.co_filename in _RUNNER_FILES:
                trace = trace.tb_next
            self._trace = trace
        if os.getpid() != self._pid and self._error is not None:
            # A forked child of the program reports nothing, and ends as plain Python would.
            self.call()
            raise SystemExit(1)

    def call(self) -> None:
        """Call the hook that is set now, once, if the program raised."""
        error = self._error
        if error is None or self._is_called:
            return
        self._is_called = True
        sys.excepthook(type(error), error.with_traceback(self._trace), self._trace)

    def _show(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if error is not self._error or os.getpid() != self._pid:
            self._default(kind, error, trace)


def _prepare_breakpoint(world: World) -> None:
    """Let ``breakpoint()`` pass on ranks without standard input, where a debugger cannot ask."""
    if world.rank == 0 or "PYTHONBREAKPOINT" in os.environ:
        return

    def refuse(*arguments: object, **options: object) -> None:
        line = f"rank {world.rank} goes on past breakpoint(): only rank 0 has standard input"
        print(f"scaletrain: {line}", file=sys.stderr)

    sys.breakpointhook = refuse


def _run(words: list[str]) -> None:
    """Run a program in a ``__main__`` module of its own, which stays for good.

    Its threads may outlive it, and pickle and multiprocessing look for ``__main__`` at any time.
    """
    options = itertools.takewhile(lambda word: word != "-P", sys.orig_argv)
    sys.orig_argv = [*options, *words]
    is_safe_path = bool(os.environ.get("PYTHONSAFEPATH")) and not sys.flags.ignore_environment
    if words[0] == "-P":
        words = words[1:]
        is_safe_path = True
    main_module = _main_module()
    if words[0] == "-m":
        sys.argv = words[1:]  # runpy puts the module's file in the place of its name
        if not is_safe_path:
            _put_first(os.getcwd())
        # The interpreter itself calls this for -m. The public functions of runpy take __main__
        # away again when its code has run.
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        if not is_safe_path:
            _put_first("")
        main_module.__loader__ = BuiltinImporter
        exec(compile(words[1], "<string>", "exec", dont_inherit=True), vars(main_module))
    elif pkgutil.get_importer(words[0]) is not None:  # a directory or a zip file
        sys.argv = words
        _put_first(os.path.join(os.getcwd(), words[0]))
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
    else:
        sys.argv = words
        if not is_safe_path:
            _put_first(os.path.dirname(os.path.realpath(words[0])))
        _run_file(words[0], main_module)


def _main_module() -> ModuleType:
    """Return a fresh ``__main__``, in place of this program's own."""
    main_module = ModuleType("__main__")
    vars(main_module)["__builtins__"] = builtins
    if sys.version_info < (3, 14):
        main_module.__annotations__ = {}
    sys.modules["__main__"] = main_module
    return main_module


def _run_file(script: str, main_module: ModuleType) -> None:
    file = os.path.join(os.getcwd(), script)
    main_module.__file__ = file
    main_module.__cached__ = None  # type: ignore[attr-defined]
    main_module.__loader__ = SourceFileLoader("__main__", file)
    with io.open_code(file) as source:
        code = compile(source.read(), file, "exec", dont_inherit=True)
    exec(code, vars(main_module))


def _put_first(directory: str) -> None:
    """Put a directory first on ``sys.path``, and let the program import its modules.

    A module that we or torch have loaded from elsewhere is forgotten if the directory holds one of
    the same name, such as a person's own ``yaml.py``: the program would not have loaded ours.
    """
    sys.path.insert(0, directory)
    for name in [name for name in sys.modules if "." not in name]:
        # Python itself has loaded `encodings` before a program begins.
        if name in ("__main__", "encodings"):
            continue
        loaded = sys.modules[name]
        origin = getattr(getattr(loaded, "__spec__", None), "origin", None)
        found = PathFinder.find_spec(name, [directory or os.getcwd()])
        # A folder without __init__.py hides no module, and modules in the interpreter come first.
        if found is None or found.origin is None or origin in (None, "built-in", "frozen"):
            continue
        if not _is_same_file(found.origin, origin):
            for part in [part for part in sys.modules if f"{part}.".startswith(f"{name}.")]:
                del sys.modules[part]


def _is_same_file(first: str, second: str) -> bool:
    # Members of a zip file are no files.
    if not (os.path.exists(first) and os.path.exists(second)):
        return first == second
    return os.path.samefile(first, second)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except UserError as mistake:
        # It came before the worker could report it: the variables that say its rank are wrong.
        print(f"scaletrain: error: {mistake}", file=sys.stderr)
        sys.exit(2)
