# SPDX-License-Identifier: Apache-2.0
"""How fast it is here: the supernets of fastnas beside the plain formula, and how to measure.

``fastnas bench`` is this; the benchmarks of single ops (``benchmarks/``) measure by the same means.
"""
