"""`python -m tensorbridge`: info, plan-matrix, bench, demo, trace."""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec

import tensorbridge as tb
from tensorbridge import _bench
from tensorbridge._commands import _matrix


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tensorbridge", description=tb.__doc__)
    parser.add_argument("--version", action="version", version=f"tensorbridge {tb.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("info", help="what is installed, which devices are seen, which routes share")
    commands.add_parser("plan-matrix", help="what shares and what copies, as a Markdown table")
    _bench.add_arguments(commands.add_parser("bench", help="measure what a copy costs against shared memory, here"))
    demo = commands.add_parser("demo", help="real data from NumPy through torch and back")
    demo.add_argument("topic", nargs="?", choices=("digits", "why-detach"), default="digits")
    trace = commands.add_parser("trace", help="run a script or a module and report every conversion in it")
    trace.add_argument("--save", metavar="PATH", help="also write Chrome trace JSON")
    trace.add_argument("-m", dest="module", action="store_true", help="a module follows, as for `python -m`: no file")
    trace.add_argument("script", help="a Python file, or with -m the name of a module; run as __main__")
    rest = trace.add_argument("args", nargs=argparse.REMAINDER, help="what follows the script is given to it")
    rest.required = False  # argparse would name it as missing where only the script is
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    if args.command == "info":
        for name in ("torch", "cupy"):  # so that their devices are seen
            if find_spec(name) is not None:
                importlib.import_module(name)
        return read_by(lambda: print(tb.info()))
    if args.command == "plan-matrix":
        return read_by(lambda: print(_matrix.markdown()))
    if args.command == "bench":
        return _bench.main(args)
    if args.command == "demo":
        shown = "_demo" if args.topic == "digits" else "_why_detach"
        module = importlib.import_module(f"tensorbridge._commands.{shown}")
        return read_by(module.main)
    return traced(args.script, args.args, args.save, module=args.module)


def read_by(prints: Callable[[], int | None]) -> int:
    """Print, for a reader who may stop early (``| head``)."""
    try:
        status = prints() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more as it ends
        return 1
    return status


def traced(script: str, arguments: list[str], save: str | None, *, module: bool) -> int:
    """Run a script, or a module, as ``__main__`` with a trace on; the report is printed even if it fails."""
    if module:
        sys.path[0] = os.getcwd()  # as Python has it for one
    if not (_is_module(script) if module else os.path.isfile(script)):
        print(f"python -m tensorbridge trace: no such {'module' if module else 'script'}: {script}", file=sys.stderr)
        return 2
    if not module and os.path.splitext(script)[1] not in ("", ".py", ".pyw", ".pyc", ".pyz"):  # JSON would run
        takes = "which is what it takes: a file that ends in .py, or in nothing"
        does = "It runs it and reports the conversions in it"
        opens = "a trace that was saved is opened by Perfetto or chrome://tracing"
        print(f"python -m tensorbridge trace: {script} is no Python script, {takes}. {does}; {opens}.", file=sys.stderr)
        return 2
    if save:
        try:
            with open(save, "a"):  # before the script has run for an hour
                pass
        except OSError as error:
            print(f"python -m tensorbridge trace: --save {save}: {error.strerror}", file=sys.stderr)
            return 2
    sys.argv[:] = [script, *arguments]
    if not module:
        sys.path[0] = os.path.dirname(os.path.abspath(script))
    block = tb.trace()
    seen = block.__enter__()

    @atexit.register  # when Python has waited for the threads of the program, and for its pools
    def told() -> None:
        block.__exit__(None, None, None)
        print(seen.report(), file=sys.stderr)
        if save:
            seen.save(save)

    if module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")
    return 0


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


if __name__ == "__main__":
    sys.exit(main())
