# SPDX-License-Identifier: Apache-2.0
"""benchmarks/report.py: docs/performance.md from the files that measurements leave."""

from __future__ import annotations

import copy
import json

import pytest
import report

MACHINE = {
    "name": "Some CPU",
    "device": "cpu",
    "threads": 2,
    "torch": "2.13.0+cpu",
    "fastnas": "0.1.0",
    "cpu_capability": "AVX512",
    "python": "3.11.7",
    "date": "2026-11-22T10:00:00+00:00",
    "load_average": 0.1,
    "copy_bandwidth": 31e9,
    "gemm_rate": 1e11,
}
RATIO = {
    "op": "mixed_sum",
    "size": "64x64x8x8",
    "dtype": "float32",
    "mode": "forward",
    "rounds": 8,
    "median_seconds": {
        "torch loop NCHW": 4e-3,
        "torch.compile": 2e-3,
        "fastnas NCHW": 1e-3,
        "fastnas channels_last": 0.5e-3,
    },
    "best_stock": "torch.compile",
    "best_eager_stock": "torch loop NCHW",
    "best_fastnas": "fastnas channels_last",
    "faster": {
        "fastnas channels_last": {"ratio": 4.0, "lower_quartile": 3.5, "upper_quartile": 4.25}
    },
    "floor_seconds": 0.4e-3,
    "saved_bytes": {},
    "left_out": {},
}
CPU = {
    "machine": MACHINE,
    "command": "pytest benchmarks -k test_ratio",
    "ratios": [RATIO, RATIO | {"mode": "forward + backward", "floor_seconds": None}],
    "left_out": {"torch.compile: 20 of 20 s spent": ["mixed_sum 256x16x32x32"]},
}
GPU_MACHINE = MACHINE | {"name": "NVIDIA H200", "device": "cuda", "copy_bandwidth": 4.3e12}


def entry(name, data=None, status="passed", summary="as it should be"):
    return {"name": name, "status": status, "summary": summary, "seconds": 12.3, "data": data}


ROW = {
    "op": "mixed_sum",
    "size": "64x16x32x32",
    "dtype": "bfloat16",
    "format": "channels_last",
    "direction": "forward",
    "seconds": 10e-6,
    "bytes": 1,
    "share": 0.85,
}
NEEDS = {"machine": {"gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0+cu130"}}
GPU = {
    "format": 1,
    "command": "python tools/gpu_check",
    "date": "2026-12-01T10:00:00+00:00",
    "device": "cuda",
    "phases": [
        entry("needs", NEEDS),
        *(entry(n) for n in ("build", "paths", "memcheck", "racecheck", "initcheck", "synccheck")),
        entry(
            "bandwidth",
            {
                "machine": GPU_MACHINE,
                "rows": [
                    ROW,
                    ROW | {"direction": "backward", "seconds": 30e-6, "share": 0.7},
                    ROW | {"op": "gate_gradient"},
                ],
                "complete": True,
            },
        ),
        entry("tests", {"counts": {"passed": 2000}}),
        entry("benchmarks", {**CPU, "machine": GPU_MACHINE}),
    ],
}
DOCUMENT = """\
# Performance

By hand.

<!-- begin cpu: written -->
old | figures \\1
<!-- end cpu -->

Also by hand \\1.

<!-- begin gpu: written -->
<!-- end gpu -->

## What bounds it
"""


def without(phase: str):
    record = copy.deepcopy(GPU)
    record["phases"] = [p for p in record["phases"] if p["name"] != phase]
    return record


def test_prose_stays_and_figures_are_replaced():
    text = report.render(DOCUMENT, CPU, None)
    for kept in ("By hand.", "Also by hand \\1.", "## What bounds it", "<!-- end cpu -->"):
        assert kept in text
    assert "old | figures" not in text and report.NO_GPU in text
    assert report.render(text, CPU, None) == text  # once more changes nothing


def test_without_a_file_for_the_cpu_its_section_stays():
    text = report.render(DOCUMENT, None, GPU)
    assert "old | figures \\1" in text and report.NO_GPU not in text


def test_markers_that_are_missing_are_an_error():
    with pytest.raises(ValueError, match="one section 'gpu' between markers, found 0"):
        report.render(DOCUMENT.replace("<!-- end gpu -->", ""), None, None)


def test_ratios_have_machine_date_and_command():
    text = report.cpu_section(CPU)
    head = "Measured on 2026-11-22 on Some CPU (AVX512), 2 threads, torch 2.13.0+cpu"
    assert text.startswith(head)
    assert "```sh\npytest benchmarks -k test_ratio\n```" in text and "31 GB/s" in text
    assert "load average" not in text
    assert (
        "| mixed_sum 64x64x8x8 | float32 | forward | torch.compile 2.000 | torch loop NCHW 4.000 "
        "| channels_last 0.500 | 4.00x | 3.50..4.25 | 8.00x | 80% |"
    ) in text
    assert "| 8.00x | - |" in text  # a row without a floor
    assert "Left out: torch.compile: 20 of 20 s spent: mixed_sum 256x16x32x32." in text


def test_a_busy_machine_is_said():
    busy = report.cpu_section({**CPU, "machine": MACHINE | {"load_average": 3.25}})
    assert "The load average before was 3.2: others were measured too." in busy


def test_all_of_a_gpu_record():
    text = report.gpu_section(GPU)
    assert text.startswith("On 2026-12-01, NVIDIA H200, driver 580.1, torch 2.11.0+cu130, with")
    assert "```sh\npython tools/gpu_check\n```" in text
    assert "| memcheck | passed | 12 | as it should be |" in text
    assert "A large copy moves 4300 GB/s on NVIDIA H200." in text
    share = "| mixed_sum 64x16x32x32 | bfloat16 | channels_last | 0.010 | 85% | 0.030 | 70% |"
    assert share in text
    assert "| gate_gradient 64x16x32x32 | bfloat16 | channels_last | 0.010 | 85% | - | - |" in text
    assert "Measured on 2026-11-22 on NVIDIA H200, torch 2.13.0+cpu, fastnas 0.1.0" in text
    assert "threads" not in text


@pytest.mark.parametrize("phase", [p["name"] for p in GPU["phases"]])
def test_a_phase_that_was_not_run(phase):
    text = report.gpu_section(without(phase))
    assert f"| {phase} | not run |" in text
    assert ("Not run." in text) == (phase in ("bandwidth", "benchmarks"))
    assert ("an unknown machine" in text) == (phase == "needs")


@pytest.mark.parametrize("phase", [p["name"] for p in GPU["phases"]])
@pytest.mark.parametrize("partly", [False, True])
def test_a_phase_that_failed(phase, partly):
    record = copy.deepcopy(GPU)
    for place in record["phases"]:
        if place["name"] == phase:
            place.update(status="timed out", summary="stopped\nafter | 45 s")
            if not partly:
                place["data"] = None
    text = report.gpu_section(record)
    assert f"| {phase} | timed out | 12 | stopped after \\| 45 s |" in text
    said = "The phase has not passed (timed out: stopped after | 45 s)."
    measured = phase in ("bandwidth", "benchmarks")
    assert (said in text) == measured
    if measured and partly:  # what was measured until then is shown
        assert text.count("mixed_sum 64x16x32x32") == 1 or phase == "benchmarks"


def test_the_command(tmp_path, capsys):
    doc, cpu, gpu = (tmp_path / name for name in ("doc.md", "cpu.json", "gpu.json"))
    doc.write_text(DOCUMENT)
    arguments = ["--doc", str(doc), "--cpu", str(cpu), "--gpu", str(gpu)]
    assert report.main(arguments) == 0
    assert "the section of the CPU stays as it is" in capsys.readouterr().out
    cpu.write_text(json.dumps(CPU))
    gpu.write_text(json.dumps(GPU))
    assert report.main(arguments) == 0
    assert doc.read_text() == report.render(DOCUMENT, CPU, GPU)

    gpu.write_text(json.dumps(GPU | {"device": "cpu"}))
    assert report.main(arguments) == 1
    gpu.write_text(json.dumps({"ratios": []}))
    assert report.main(arguments) == 1
    gpu.unlink()
    cpu.write_text(json.dumps(GPU))
    assert report.main(arguments) == 1
    said = capsys.readouterr().err
    assert "is of a rehearsal on the CPU" in said and "is no record of tools/gpu_check" in said
    assert "holds no ratios" in said


def test_the_document_is_what_the_results_say():
    cpu, gpu = (report.load(report.RESULTS / name) for name in ("cpu.json", "gpu.json"))
    text = report.DOCUMENT.read_text(encoding="utf-8")
    assert report.render(text, cpu, gpu) == text, "run: python benchmarks/report.py"
