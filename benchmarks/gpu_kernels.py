"""What each GPU kernel takes, compiled without a GPU: `python -m benchmarks.gpu_kernels [--only TEXT] [--arch 90]`.

Prints one line a variant and architecture: registers and spilled bytes of a thread, shared memory of a program. The
exit status is 1 if a variant does not compile, spills, or takes more shared memory than the card has. No speeds.
"""

from __future__ import annotations

import argparse

from tidewright.devices.cuda.compile_ahead import SHARED_MEMORY, all_variants, compile_for


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only variants whose name or shape has this in it")
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_MEMORY), action="append", help="default: all")
    parser.add_argument("--tested", action="store_true", help="only those that the test suite compiles")
    options = parser.parse_args()
    bad = 0
    print(f"{'kernel':20} {'shape':44} {'warps':>5} {'arch':>6} {'registers':>9} {'spills':>6} {'shared KiB':>10}")
    for variant in all_variants():
        if options.only not in f"{variant.name} {variant.shape}" or (options.tested and not variant.tested):
            continue
        for arch in options.arch or sorted(SHARED_MEMORY):
            if arch < variant.least_arch:
                continue
            took = compile_for(variant, arch)
            complaints = took.complaints(arch)
            bad += bool(complaints)
            print(
                f"{variant.name:20} {variant.shape:44} {variant.launch.warps:5} {f'sm_{arch}':>6} {took.registers:9}"
                f" {took.stack:6} {took.shared / 1024:10.1f}  {'; '.join(complaints)}".rstrip(),
                flush=True,
            )
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
