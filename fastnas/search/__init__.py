# SPDX-License-Identifier: Apache-2.0
"""The search: a bilevel loop that joins a space, a method and data."""
