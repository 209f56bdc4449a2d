"""The measurement from the command line with nothing but the core installed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

from ur_jax.performance import suite, sweeps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ur_jax.performance", description=__doc__)
    parser.add_argument("--preset", choices=sweeps.PRESETS, default="cpu")
    parser.add_argument("--against", choices=suite.AGAINST, default="nothing")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds to begin cases in")
    parser.add_argument("--compile-threads", type=int, default=1, help="programs compiled at once")
    parser.add_argument("--rehearse", action="store_true", help="all of it at toy size, on a CPU")
    parser.add_argument("--out", default="throughput.json", help="results, written case by case")
    args = parser.parse_args()
    if args.against == "torch":  # which needs some of the device's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    def write(results, context):
        content = {**context, "results": [dataclasses.asdict(r) for r in results]}
        with open(f"{args.out}.tmp", "w") as file:
            json.dump(content, file, indent=1)
        os.replace(f"{args.out}.tmp", args.out)
        print(f"{results[-1].work}: {len(results)} measurements so far", flush=True)

    chosen = sweeps.PRESETS[args.preset]
    if args.rehearse:
        chosen = sweeps.rehearsal(chosen)
    results, context = suite.run(
        chosen,
        against=args.against,
        budget=args.budget,
        compile_threads=args.compile_threads,
        on_results=write,
    )
    print(suite.markdown(results))
    print({name: value for name, value in context.items() if name != "results"})


if __name__ == "__main__":
    main()
