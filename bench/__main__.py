"""``python -m bench [NAME ...]``: run the benchmarks and print one table; ``--write`` puts it into docs/benchmarks.md."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import cluster, codec, derive, harness, imagestore, rpc_calls, serving, simplestreams, transfers

BENCHMARKS: dict[str, Callable[[harness.Report, Path], None]] = {
    "rpc": rpc_calls.run,
    "codec": codec.run,
    "transfers": transfers.run,
    "derive": derive.run,
    "serving": serving.run,
    "imagestore": imagestore.run,
    "simplestreams": simplestreams.run,
    "cluster": cluster.run,
}
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all"
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--workdir", type=Path, help="where disks are made; default: a temporary directory")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    print(harness.machine(), flush=True)
    for name in arguments.names or BENCHMARKS:
        report = harness.Report()
        with tempfile.TemporaryDirectory(prefix="mistify-bench-", dir=arguments.workdir) as workdir:
            BENCHMARKS[name](report, Path(workdir))
        if arguments.write:
            _write(name, report)


def _write(name: str, report: harness.Report) -> None:
    """Replace what stands between this benchmark's marks in the document."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    body = f"{begin}\nMeasured on {harness.machine()} with `python -m bench {name}`.\n\n{report.markdown()}\n{end}"
    text = DOCUMENT.read_text()
    changed, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: body, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{DOCUMENT} has no place for {name} ({begin} ... {end})")
    DOCUMENT.write_text(changed)


if __name__ == "__main__":
    main()
