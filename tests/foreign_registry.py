# SPDX-License-Identifier: Apache-2.0
"""Forwards that a proof takes, and forwards that it must not take, each with the reason."""

from __future__ import annotations


class Registry:
    """By the names of the functions; the refused ones with a part of the reason."""

    def __init__(self):
        self.PROVED, self.REFUSED = {}, {}

    def proved(self, forward):
        self.PROVED[forward.__name__] = forward
        return forward

    def refused(self, reason):
        def register(forward):
            self.REFUSED[forward.__name__] = (forward, reason)
            return forward

        return register
