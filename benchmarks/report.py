# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of docs/performance.md from what the benchmarks and tools/gpu_check left.

    python benchmarks/report.py [--cpu FILE] [--gpu FILE] [--doc FILE]

FILE of --cpu is what ``pytest benchmarks -k test_ratio --ratios-json=FILE`` wrote, of --gpu what
``python tools/gpu_check --out FILE`` wrote; by default those in benchmarks/results. Only what is
between the markers of a section is replaced: the rest of the document is written by hand. Without a
file for the CPU its section stays as it is; without one for the GPU its section says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"

#: Of tools/gpu_check, in its order.
PHASES = (
    "needs",
    "build",
    "paths",
    "memcheck",
    "racecheck",
    "initcheck",
    "synccheck",
    "tests",
    "bandwidth",
    "benchmarks",
)
NO_GPU = "No GPU figure exists yet: `python tools/gpu_check` has not been run on one."

Record = dict[str, Any]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
                     for line in lines)  # fmt: skip


def provenance(machine: Record, command: str) -> str:
    """Where figures come from: date, machine, versions, command."""
    cpu = machine["device"] == "cpu"
    where = f"{machine['name']}" + (f" ({machine['cpu_capability']})" if cpu else "")
    threads = f", {machine['threads']} threads" if cpu else ""
    text = (
        f"Measured on {machine['date'][:10]} on {where}{threads}, torch {machine['torch']}, "
        f"fastnas {machine['fastnas']}, with\n\n```sh\n{command}\n```\n\n"
        f"A large copy moved {machine['copy_bandwidth'] / 1e9:.0f} GB/s (bytes read and written)."
    )
    if machine["load_average"] > 0.5:
        text += (
            f" The load average before was {machine['load_average']:.1f}: others were measured too."
        )
    return text


def ratios(content: Record) -> str:
    """The table of ratios of one session, and what it left out."""
    text = (
        "Each row is one interleaved run (the forms take turns, medians). The *best stock form* is "
        "the fastest of the plain\nformula in contiguous and channels_last format, under "
        "`torch.compile` and, on a GPU, under a CUDA graph; *eager* is\nneither compiled nor a "
        "graph. *Floor* is the share of what the machine could do at best "
        "([benchmarks](../benchmarks/README.md)).\n\n"
    )
    head = ["op and size", "dtype", "mode", "best stock form, ms", "best eager form, ms"]
    head += ["fastnas, ms", "against best", "quartiles", "against eager", "floor"]
    text += table(head, [ratio_row(r) for r in content["ratios"]])
    for reason, cases in content.get("left_out", {}).items():
        text += f"\n\nLeft out: {reason}: {', '.join(cases)}."
    return text


def ratio_row(record: Record) -> list[str]:
    seconds, best = record["median_seconds"], record["best_stock"]
    eager, ours = record["best_eager_stock"], record["best_fastnas"]
    faster, floor = record["faster"][ours], record["floor_seconds"]
    return [
        f"{record['op']} {record['size']}",
        record["dtype"],
        record["mode"],
        f"{best} {seconds[best] * 1e3:.3f}",
        f"{eager} {seconds[eager] * 1e3:.3f}",
        f"{ours.removeprefix('fastnas ')} {seconds[ours] * 1e3:.3f}",
        f"{faster['ratio']:.2f}x",
        f"{faster['lower_quartile']:.2f}..{faster['upper_quartile']:.2f}",
        f"{seconds[eager] / seconds[ours]:.2f}x",
        "-" if floor is None else f"{floor / seconds[ours]:.0%}",
    ]


def cpu_section(content: Record) -> str:
    return f"{provenance(content['machine'], content['command'])}\n\n{ratios(content)}"


def gpu_section(record: Record) -> str:
    """Everything of a record of tools/gpu_check; what failed or was not run is said."""
    phases = {entry["name"]: entry for entry in record["phases"]}
    facts = ((phases.get("needs") or {}).get("data") or {}).get("machine", {})
    names = {
        "gpu": "",
        "driver": "driver ",
        "torch": "torch ",
        "nvcc": "nvcc ",
        "python": "Python ",
    }
    machine = ", ".join(f"{text}{facts[n]}" for n, text in names.items() if facts.get(n))
    text = f"On {record['date'][:10]}, {machine or 'an unknown machine'}, with\n\n"
    text += f"```sh\n{record['command']}\n```\n\n### Checks\n\n{checks(phases)}"
    text += f"\n\n### Share of the copy bandwidth\n\n{bandwidth(phases.get('bandwidth'))}"
    return f"{text}\n\n### Against PyTorch\n\n{gpu_ratios(phases.get('benchmarks'))}"


def checks(phases: dict[str, Record]) -> str:
    rows = []
    for name in PHASES:
        entry = phases.get(name)
        if entry is None:
            rows.append([name, "not run", "", ""])
            continue
        rows.append([name, entry["status"], f"{entry['seconds']:.0f}", one_line(entry["summary"])])
    return table(["phase", "", "seconds", ""], rows)


def one_line(text: str) -> str:
    return " ".join(text.split())


def usable(entry: Record | None) -> tuple[Record | None, str]:
    """What a phase measured, if anything, and a sentence if it has not passed."""
    if entry is None:
        return None, "Not run."
    said = ""
    if entry["status"] != "passed":
        said = f"The phase has not passed ({entry['status']}: {one_line(entry['summary'])})."
    data = entry["data"] if isinstance(entry["data"], dict) else None
    return data, said or ("" if data else "It left no figures.")


def bandwidth(entry: Record | None) -> str:
    data, said = usable(entry)
    if not data or not data.get("rows"):
        return said or "It left no figures."
    machine = data["machine"]
    text = f"{said}\n\n" if said else ""
    text += (
        f"A large copy moves {machine['copy_bandwidth'] / 1e9:.0f} GB/s on {machine['name']}. Of "
        "that, each op reaches, by the bytes it\ncannot do without and the time of its kernels "
        "(replayed from a graph, the L2 flushed before):\n\n"
    )
    lines: dict[tuple[str, ...], dict[str, Record]] = {}
    for row in data["rows"]:
        key = (f"{row['op']} {row['size']}", row["dtype"], row["format"])
        lines.setdefault(key, {})[row["direction"]] = row
    cells = [
        [*key, *(part for d in ("forward", "backward") for part in direction(rows.get(d)))]
        for key, rows in lines.items()
    ]
    head = ["op and size", "dtype", "format", "forward, ms", "share", "backward, ms", "share"]
    return text + table(head, cells)


def direction(row: Record | None) -> list[str]:
    return ["-", "-"] if row is None else [f"{row['seconds'] * 1e3:.3f}", f"{row['share']:.0%}"]


def gpu_ratios(entry: Record | None) -> str:
    data, said = usable(entry)
    if not data or not data.get("ratios"):
        return said or "It left no figures."
    text = f"{said}\n\n" if said else ""
    return f"{text}{provenance(data['machine'], data['command'])}\n\n{ratios(data)}"


def replaced(document: str, section: str, text: str) -> str:
    """The document with another text between the markers of a section."""
    pattern = rf"(<!-- begin {section}\b.*?-->\n).*?(<!-- end {section} -->)"
    found = re.findall(pattern, document, re.S)
    if len(found) != 1:
        raise ValueError(f"expected one section {section!r} between markers, found {len(found)}")
    return re.sub(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", document, flags=re.S)


def render(document: str, cpu: Record | None, gpu: Record | None) -> str:
    """The document with the sections of both files."""
    if cpu is not None:
        document = replaced(document, "cpu", cpu_section(cpu))
    return replaced(document, "gpu", NO_GPU if gpu is None else gpu_section(gpu))


def load(path: Path) -> Record | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpu", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--gpu", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--doc", type=Path, default=DOCUMENT)
    options = parser.parse_args(arguments)
    cpu, gpu = load(options.cpu), load(options.gpu)
    if gpu is not None and gpu.get("format") != 1:
        print(f"{options.gpu} is no record of tools/gpu_check in format 1", file=sys.stderr)
        return 1
    if gpu is not None and gpu["device"] != "cuda":
        print(f"{options.gpu} is of a rehearsal on the CPU", file=sys.stderr)
        return 1
    if cpu is not None and "ratios" not in cpu:
        print(f"{options.cpu} holds no ratios of the benchmarks", file=sys.stderr)
        return 1
    text = render(options.doc.read_text(encoding="utf-8"), cpu, gpu)
    options.doc.write_text(text, encoding="utf-8")
    if cpu is None:
        print(f"there is no {options.cpu}: the section of the CPU stays as it is")
    return 0


if __name__ == "__main__":
    sys.exit(main())
