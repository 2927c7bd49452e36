# SPDX-License-Identifier: Apache-2.0
"""The proof behind ``accelerate``: somebody's mixed op and ours are the same function.

Three parts, each for what the others cannot see:

* ``observation``: both are run on the same random data with the real candidates, forward and
  backward, in training and in evaluation, and everything a step takes from them is compared.
* ``stand_ins``: both are run with random maps in the place of the candidates, in other batches and
  with zero weights, while ``watch`` notes what the ``forward`` does with tensors and which branches
  it takes. Nothing but products, sums and rearrangements, and no branch untaken: then agreement on
  random data is agreement on all data.
* ``reading``: the compiled code of the ``forward`` is searched for what no run shows, such as a
  global variable, the gradient mode or a value kept for the next call.

``forms`` does the same for the candidates that are cut before their BatchNorm, and ``verdict`` puts
the parts together. ``cells`` and ``cell_formula`` prove by the same means what cells do with their
mixed ops.
"""

from fastnas.nn.proof.cells import CellJudge, CellVerdict
from fastnas.nn.proof.verdict import Verdict, form_of, judge

__all__ = ["CellJudge", "CellVerdict", "Verdict", "form_of", "judge"]
