# SPDX-License-Identifier: Apache-2.0
"""The version of fastnas: read here by the package and, without importing it, by the build."""

__version__ = "0.1.0"
