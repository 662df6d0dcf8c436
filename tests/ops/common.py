# SPDX-License-Identifier: Apache-2.0
"""What the family tests share."""

import re

import pytest
import torch


def ints(values, device="cpu", dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


def expect(error, op, rule, function, *args, **kwargs):
    """The call fails with the message form of the house: ``tokenprune::op: ... rule ...``."""
    pattern = rf"tokenprune::{re.escape(op)}: .*{rule}"
    with pytest.raises(error, match=pattern) as caught:
        function(*args, **kwargs)
    assert type(caught.value) is error
