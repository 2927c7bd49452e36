# SPDX-License-Identifier: Apache-2.0
"""What the end of each phase's command means."""

from __future__ import annotations

import re
from typing import Any

from phase import Finished, Verdict

_REPORTS = 20  # of a sanitizer, kept in the record


def needs(end: Finished) -> Verdict:
    if end.result is None:
        return Verdict(False, last_line(end.output))
    missing = end.result["missing"]
    if missing:
        return Verdict(False, "; ".join(missing), end.result)
    absent = [f"no {name}: {effect}" for name, effect in end.result["absent"].items()]
    facts = end.result["machine"]
    names = [facts[name] for name in ("gpu", "torch") if facts.get(name)]
    return Verdict(end.returncode == 0, ", ".join(names) + "".join(f"; {a}" for a in absent),
                   end.result)  # fmt: skip


def build(end: Finished) -> Verdict:
    said = re.findall(r"^\s*(fastnas: .*)$", end.output, re.M)
    summary = said[-1] if said else last_line(end.output)
    return Verdict(end.returncode == 0, summary)


def paths(end: Finished) -> Verdict:
    if end.result is None:
        return Verdict(False, last_line(end.output))
    different, draws = end.result["different"], end.result["draws"]
    error = end.result["probability_error_in_eps"]
    summary = f"{different} of {draws} draws differ; probabilities by {error:.1f} eps at most"
    return Verdict(end.returncode == 0, summary, end.result)


def sanitizer(tool: str, end: Finished) -> Verdict:
    """Passed if the program ran to its end and nothing is reported of the package's kernels."""
    ran = re.search(r"small cases: (\d+) calls done", end.output)
    total = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", end.output)
    found = reports(end.output)
    ours = [report for report in found if "fastnas" in report]
    data = {"reported": int(total[1]) if total else None, "ours": len(ours)}
    data |= {"calls": int(ran[1]) if ran else None, "reports": ours[:_REPORTS]}
    if ran is None or total is None:
        return Verdict(False, f"it did not come to its end: {last_line(end.output)}", data)
    # initcheck watches the kernels of PyTorch as well; of the others every report counts.
    bad = len(ours) if tool == "initcheck" else max(len(ours), int(total[1]))
    others = f", {total[1]} of other kernels" if tool == "initcheck" and int(total[1]) else ""
    summary = f"{bad} reports on {ran[1]} calls{others}"
    return Verdict(bad == 0 and end.returncode == 0, summary, data)


def reports(output: str) -> list[str]:
    """The blocks of ``=========`` lines that say what happened and where."""
    found: list[list[str]] = []
    for line in output.splitlines():
        marked = re.match(r"=========( *)(.*)", line)
        if not marked:
            continue
        indent, text = len(marked[1]), marked[2].strip()
        if indent > 1:
            if found:
                found[-1].append(text)
        elif re.match(r"(Invalid|Uninitialized|Error: |Warning: |Barrier error|Misaligned)", text):
            found.append([text])
        else:
            found.append([])  # a headline of another kind
    return [" ".join(block[:4]) for block in found if block and block[0]]


def bandwidth(end: Finished) -> Verdict:
    if end.result is None:
        return Verdict(False, last_line(end.output))
    rows, rate = end.result["rows"], end.result["machine"]["copy_bandwidth"]
    summary = f"{len(rows)} rows; a copy moves {rate / 1e9:.0f} GB/s"
    return Verdict(end.returncode == 0 and end.result["complete"], summary, end.result)


def tests(end: Finished) -> Verdict:
    if end.result is None:
        return Verdict(False, last_line(end.output))
    counts = end.result["counts"]
    summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    passed = end.returncode == 0 and counts.get("passed", 0) > 0
    return Verdict(passed, summary or last_line(end.output), end.result)


def benchmarks(end: Finished) -> Verdict:
    if end.result is None:
        return Verdict(False, last_line(end.output))
    ratios = end.result["ratios"]
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", end.output, re.M)
    summary = f"{len(ratios)} ratios" + (f", {len(failed)} failed: {failed[0]}" if failed else "")
    data: dict[str, Any] = {**end.result, "failed": failed}
    return Verdict(end.returncode == 0 and len(ratios) > 0, summary, data)


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
