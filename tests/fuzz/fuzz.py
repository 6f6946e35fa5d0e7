"""`make fuzz`: random guests, frontends and control clients, for as long as one likes.

    python -m tests.fuzz.fuzz --seconds 600 [--seed N] [--only rings,races,iommu,iommu-races,...]
    python -m tests.fuzz.fuzz --case build/fuzz/rings-1234.json

A case that makes the switch do what it may not, or end, is cut down and written to build/fuzz; the
second form runs it again. `--sanitized DIR` has it all done with the extensions built there.
Exit status: 0 nothing found, 1 found something, 2 cannot run.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOUND = ROOT / "build" / "fuzz"
KINDS = ("rings", "races", "iommu", "iommu-races", "messages", "control")
CASE_PATIENCE_S = 120.0
"""A case that takes longer has hung."""
FRESH_EVERY = 2000
"""Cases after which a process starts anew, so that a failure depends on few others."""

Case = dict[str, Any]


def sanitized(folder: Path) -> int:
    """Run this program again with the extensions in `folder`; returns its exit status."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if not Path(path).is_absolute():
            print(f"error: gcc has no {name}", file=sys.stderr)
            return 2
        libraries.append(path)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        # Python itself keeps memory until its end.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": f"{folder.resolve()}:{ROOT}",
        "PYTHONSAFEPATH": "1",
    }
    arguments = [a for a in sys.argv[1:] if a not in ("--sanitized", str(folder))]
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz.fuzz", *arguments], env=environment
    ).returncode


def makers() -> dict[str, Callable[[int], Case]]:
    from tests.fuzz import control, iommucases, messages, races, ringcases

    return {
        "rings": ringcases.make,
        "races": races.make,
        "iommu": iommucases.make,
        "iommu-races": iommucases.make_race,
        "messages": messages.make,
        "control": control.make,
    }


def open_bench(kind: str) -> Any:
    """What runs cases of a kind: has `run`, `close` and `reached`."""
    if kind == "rings":
        from tests.fuzz.bed import Bed

        return Bed()
    if kind == "races":
        from tests.fuzz.races import RacingBed

        return RacingBed()
    if kind == "iommu":
        from tests.fuzz.iommu import IommuBed

        return IommuBed()
    if kind == "iommu-races":
        from tests.fuzz.iommuraces import RacingIommuBed

        return RacingIommuBed()
    if kind == "messages":
        from tests.fuzz.messages import MessageBench

        return MessageBench()
    from tests.fuzz.control import ControlBench

    return ControlBench()


class Progress:
    """What a child is at, in memory that survives it: seed, cases done, and what was reached."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 1 << 16)

    def note(self, seed: int, done: int) -> None:
        struct.pack_into("<QQ", self._map, 0, seed, done)

    @property
    def seed(self) -> int:
        return int(struct.unpack_from("<Q", self._map, 0)[0])

    @property
    def done(self) -> int:
        return int(struct.unpack_from("<Q", self._map, 8)[0])

    def leave(self, reached: Counter[str]) -> None:
        raw = json.dumps(reached).encode()
        struct.pack_into("<I", self._map, 16, len(raw))
        self._map[20 : 20 + len(raw)] = raw

    def take(self) -> Counter[str]:
        (length,) = struct.unpack_from("<I", self._map, 16)
        raw, self._map[16:20] = self._map[20 : 20 + length], bytes(4)
        return Counter(json.loads(raw)) if length else Counter()


def in_child(work: Callable[[], None], patience_s: float) -> tuple[str, str]:
    """Run `work` in a process of its own; ("", "") or how it ended and what it said.

    A fork is right here: this process never has threads, for every bench is opened in a child.
    """
    report = os.memfd_create("report")
    pid = os.fork()
    if pid == 0:
        os.dup2(report, 2)
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)
    deadline = time.monotonic() + patience_s
    ended = status = 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            time.sleep(0.002)  # between two looks
    how = ""
    if not ended:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        how = f"hung for {patience_s:g} s"
    elif os.WIFSIGNALED(status):
        how = f"ended by signal {os.WTERMSIG(status)}"
    elif os.WEXITSTATUS(status):
        how = "failed"
    text = os.pread(report, 1 << 20, 0).decode(errors="replace")
    os.close(report)
    return how, text if how else ""


def run_alone(case: Case) -> tuple[str, str]:
    """Run one case on a fresh bench in a fresh process."""

    def work() -> None:
        bench = open_bench(case["kind"])
        bench.run(case)
        bench.close()

    return in_child(work, CASE_PATIENCE_S)


def minimise(case: Case, until: float) -> Case:
    """Leave out what is not needed for the failure (Zeller's ddmin over `ops`)."""
    ops = case["ops"]
    size = max(1, len(ops) // 2)
    while size and time.monotonic() < until:
        at = 0
        while at < len(ops) and time.monotonic() < until:
            fewer = ops[:at] + ops[at + size :]
            if run_alone(case | {"ops": fewer})[0]:
                ops = fewer
            else:
                at += size
        size //= 2
    case = case | {"ops": ops}
    for key in sorted(case.keys() - {"kind", "ops", "race", "seed"}):
        smaller = {k: v for k, v in case.items() if k != key}
        if run_alone(smaller)[0]:
            case = smaller
    return case


def report(case: Case, how: str, text: str) -> None:
    """Cut a failing case down, write it to a file and say what it is."""
    kind, seed = case["kind"], case["seed"]
    print(f"\n{kind}, seed {seed}: {how}\n{text[-6000:]}")
    again, said = run_alone(case)
    if again:
        print(f"it does so alone, too; cutting down {len(case['ops'])} steps ...")
        case = minimise(case, time.monotonic() + 120)
        again, said = run_alone(case)
        print(f"{len(case['ops'])} steps are left: {again}\n{said[-3000:]}")
    else:
        print("alone it passes: it depends on what came before, or on chance")
    FOUND.mkdir(parents=True, exist_ok=True)
    path = FOUND / f"{kind}-{seed}.json"
    path.write_text(json.dumps(case, indent=1) + "\n")
    print(f"again: make fuzz CASE={path.relative_to(ROOT)}")


def fuzz(kind: str, seconds: float, seed: int) -> bool:
    """Run cases of a kind from `seed` on; True when nothing was found."""
    make = makers()[kind]
    progress = Progress()
    reached: Counter[str] = Counter()
    begun = time.monotonic()
    until = begun + seconds
    total = 0
    while time.monotonic() < until:

        def work(first: int = seed) -> None:
            bench = open_bench(kind)
            for number in range(first, first + FRESH_EVERY):
                progress.note(number, number - first)
                bench.run(make(number))
                if time.monotonic() >= until:
                    break
            progress.note(number + 1, number + 1 - first)
            progress.leave(bench.reached)
            bench.close()

        how, text = in_child(work, until - time.monotonic() + CASE_PATIENCE_S)
        total += progress.done
        reached += progress.take()
        if how:
            report(make(progress.seed), how, text)
            return False
        seed = progress.seed
    rate = total / (time.monotonic() - begun)
    print(f"{kind}: {total} cases up to seed {seed - 1}, {rate:.0f} a second; reached:")
    print("  " + ", ".join(f"{name} {n}" for name, n in sorted(reached.items())))
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the switch.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--case", type=Path, help="run this case file again")
    parser.add_argument("--sanitized", type=Path, help="folder with the sanitizers' build")
    options = parser.parse_args()
    if options.sanitized is not None:
        return sanitized(options.sanitized)
    if options.case is not None:
        how, text = run_alone(json.loads(options.case.read_text()))
        print(f"{how}\n{text}" if how else "passed")
        return 1 if how else 0
    seed = options.seed
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
    kinds = options.only.split(",")
    print(f"seed {seed}, {options.seconds:g} s, {', '.join(kinds)}", flush=True)
    good = [fuzz(kind, options.seconds / len(kinds), seed) for kind in kinds]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
