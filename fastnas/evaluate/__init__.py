# SPDX-License-Identifier: Apache-2.0
"""Training and testing of derived networks.

result = Evaluation(preset_config("demo", source="PC_DARTS_cifar", out=None)).run()
print(result.accuracy, result.parameters, result.macs)
"""

from __future__ import annotations

from fastnas.evaluate.config import PRESETS, EvaluateConfig, preset_config
from fastnas.evaluate.export import Classifier, export_classifier, load_classifier
from fastnas.evaluate.progress import Progress, TextProgress
from fastnas.evaluate.result import EvaluationResult, load_network
from fastnas.evaluate.source import GenotypeSource, find_genotype
from fastnas.evaluate.train import Evaluation

__all__ = [
    "PRESETS",
    "Classifier",
    "EvaluateConfig",
    "Evaluation",
    "EvaluationResult",
    "GenotypeSource",
    "Progress",
    "TextProgress",
    "export_classifier",
    "find_genotype",
    "load_classifier",
    "load_network",
    "preset_config",
]
