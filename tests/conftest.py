# SPDX-License-Identifier: Apache-2.0
"""Options, markers and the device of the whole suite."""

import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--extended", action="store_true", help="also run the long sweeps and the slow compiles")
    parser.addoption("--abi", action="store_true", help="also run the wheel under torch 2.11 (downloads it)")


def pytest_configure(config):
    config.addinivalue_line("markers", "extended: long; runs with --extended only")
    config.addinivalue_line("markers", "abi: needs another torch; runs with --abi only")


def pytest_collection_modifyitems(config, items):
    for option in ("extended", "abi"):
        if not config.getoption(f"--{option}"):
            skip = pytest.mark.skip(reason=f"needs --{option}")
            for item in items:
                if option in item.keywords:
                    item.add_marker(skip)


@pytest.fixture(scope="session")
def device():
    """The device under test: TOKENPRUNE_TEST_DEVICE, cpu by default."""
    return torch.device(os.environ.get("TOKENPRUNE_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def extended(request):
    return request.config.getoption("--extended")
