# SPDX-License-Identifier: Apache-2.0
"""The one exception that the command line turns into one clear line and exit code 2."""


class UserError(Exception):
    """A mistake of the caller: a missing file, an unknown model, an impossible option."""
